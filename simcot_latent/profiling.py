"""profile=true: where the time of a training step goes.

Parts of a step are named with `part("think")` where they are; a part costs next to nothing while nobody profiles.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile, record_function, schedule, supported_activities

PREFIX = "part: "
SKIPPED, WARMUP, PROFILED = 5, 1, 3
"""Steps before the profiler, steps for it to get going, steps that count."""


def part(name: str) -> record_function:
    """Names what happens within it."""
    return record_function(PREFIX + name)


class StepProfile:
    """Profiles a few steps of a run, then writes `trace.json` (for chrome://tracing or ui.perfetto.dev) and
    `table.txt`, and shows where the time of a step went.

    Args:
        folder: where to write.
        console: where to show the table.
    """

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder, self.console = folder, console
        self.profiler = profile(
            activities=[a for a in supported_activities() if a in (ProfilerActivity.CPU, ProfilerActivity.CUDA)],
            schedule=schedule(wait=SKIPPED, warmup=WARMUP, active=PROFILED, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
        )
        self.profiler.start()

    def step(self) -> None:
        """Called after every step."""
        self.profiler.step()

    def close(self) -> None:
        """Called when training ends."""
        self.profiler.stop()

    def _write(self, profiler: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / "trace.json"))
        events = profiler.key_averages()
        table = parts_table(events)
        with (self.folder / "table.txt").open("w", encoding="utf-8") as file:
            Console(file=file, width=100).print(table)
            file.write(events.table(sort_by="self_cpu_time_total", row_limit=30))
        self.console.print(table)
        self.console.print(f"profile of {PROFILED} steps: {self.folder}")


def parts_table(events: EventList) -> Table:
    """Milliseconds a step that each part took on the CPU, and on a GPU."""
    table = Table("part of a step", "ms on the CPU", "ms on the device")
    for event in events:
        if event.key.startswith(PREFIX):
            times = (event.cpu_time_total, event.device_time_total)
            table.add_row(event.key.removeprefix(PREFIX), *(f"{us / PROFILED / 1000:.1f}" for us in times))
    return table
