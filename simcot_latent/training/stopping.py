"""Why a run ends before its time, and how its process then ends."""

from __future__ import annotations

import math
import os
import signal
import time
from types import FrameType

from simcot_latent.distributed import Ranks

KILLING = (signal.SIGINT, signal.SIGTERM)
HANGUP: signal.Signals | None = getattr(signal, "SIGHUP", None)
"""What a terminal that is closed sends; Windows has no such signal."""


class StopSignal:
    """Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 and the end of `max_minutes`, kept until the step is done.

    A second Ctrl-C or SIGTERM kills at once. A second SIGHUP does not: a terminal that is closed often sends two, one
    by way of its shell.

    Args:
        max_minutes: minutes from now; None: no limit.
    """

    def __init__(self, max_minutes: float | None) -> None:
        self.received: int | None = None
        self.max_minutes = max_minutes
        self._listening = False
        self._deadline = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
        if hasattr(signal, "SIGUSR1"):  # which would end the process while it still reads its data
            signal.signal(signal.SIGUSR1, self._receive)

    def listen(self) -> None:
        """From here on all of them are kept; before, there is nothing to save, and most end the process.

        A SIGHUP that is ignored, as under `nohup`, stays so.
        """
        self._listening = True
        for number in KILLING:
            signal.signal(number, self._receive)
        if HANGUP is not None and signal.getsignal(HANGUP) != signal.SIG_IGN:
            signal.signal(HANGUP, self._receive)

    def reader_gone(self) -> bool:
        """To be told when the pipe that the console writes to is closed (`| head`): the run ends as by SIGPIPE.

        Returns:
            Whether there is a run to save; else the caller may end at once.
        """
        if self._listening:
            self.received = self.received or signal.SIGPIPE
        return self._listening

    @property
    def asked(self) -> bool:
        """Whether this process was asked to stop."""
        return self.received is not None or time.monotonic() >= self._deadline

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if number in KILLING:
            signal.signal(number, signal.SIG_DFL)

    def status(self, ranks: Ranks) -> tuple[str, int]:
        """What stopped the run, on whichever rank, and the exit status that says so.

        128 + its number for a signal, 0 for `max_minutes`. Under torchrun 0 for SIGUSR1 too: torchrun takes anything
        else for a crash, and starts the ranks again if it may.
        """
        numbers = [number for number in ranks.gather(self.received) if number is not None]
        if not numbers:
            return f"after max_minutes={self.max_minutes:g}", 0
        number = self.received or numbers[0]
        restarted = "TORCHELASTIC_RUN_ID" in os.environ and number not in (*KILLING, HANGUP)
        return f"by a signal, {signal.Signals(number).name},", 0 if restarted else 128 + number
