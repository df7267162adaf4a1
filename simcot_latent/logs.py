"""What a run says: console, progress bar, `metrics.jsonl`, wandb. All on rank 0 only."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Task as RichTask
from rich.text import Text

from simcot_latent.errors import UserError

T = TypeVar("T")

SECONDS_A_LINE = 5.0
"""How often progress is told where there is no terminal to draw a bar on."""


class RateColumn(ProgressColumn):
    """Units a second."""

    def render(self, task: RichTask) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s")


def make_progress(console: Console) -> Progress:
    """A bar with count, rate and time left on a terminal; nothing where the output is a file or a pipe."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), RateColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def make_console(is_main: bool = True) -> Console:
    """The console of a command; silent on other ranks than 0. Lines are not wrapped in a file or a pipe."""
    # Questions, paths and what a model writes are no markup.
    console = Console(quiet=not is_main, highlight=False, markup=False, emoji=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 160
    return console


def track(
    items: Sequence[T], description: str, console: Console, unit_sizes: Sequence[int] | None = None
) -> Iterator[T]:
    """Goes through `items` under a progress bar; without a terminal, a plain line every few seconds.

    Args:
        unit_sizes: how many units each item counts for (a batch: its rows); default 1.
    """
    sizes = [1] * len(items) if unit_sizes is None else list(unit_sizes)
    total, done, told = sum(sizes), 0, time.monotonic()
    with make_progress(console) as progress:
        task = progress.add_task(description, total=total)
        for item, size in zip(items, sizes, strict=True):
            yield item
            progress.advance(task, size)
            done += size
            if not console.is_terminal and time.monotonic() - told >= SECONDS_A_LINE:
                told = time.monotonic()
                speed = progress.tasks[task].speed
                console.print(f"{description} {done}/{total}" + ("" if speed is None else f" | {speed:.1f}/s"))


class RunLog:
    """A training run's metrics: a line a record in `metrics.jsonl`, the same to wandb if the run has a name.

    Args:
        out_dir: the run's folder.
        is_main: whether this is rank 0; other ranks log nothing.
        from_step: the step training goes on from; what an earlier attempt logged beyond it is cut off.
        run: name of the wandb run; empty: no wandb.
        project: wandb project.
        config: what wandb stores beside the run.
    """

    def __init__(
        self, out_dir: Path, is_main: bool, from_step: int, run: str, project: str, config: dict[str, Any]
    ) -> None:
        self.is_main = is_main
        self.file = out_dir / "metrics.jsonl"
        self.wandb = None
        if not is_main:
            return
        kept: list[str] = []
        if from_step and self.file.exists():
            lines = self.file.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= from_step]
        self.file.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        if run:
            import wandb  # only here: it takes half a second to import

            try:
                settings = wandb.Settings(console="off")
                self.wandb = wandb.init(project=project, name=run, config=config, dir=out_dir, settings=settings)
            except (wandb.Error, ValueError) as error:  # no key, no network, an impossible WANDB_ variable
                raise UserError(
                    f"run={run}: wandb cannot start ({' '.join(str(error).split())}); log in with `wandb login`, "
                    "set WANDB_MODE=offline, or leave run= empty"
                ) from error

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Records the metrics of a step; what is not finite is left out of the file (JSON has no nan)."""
        if not self.is_main:
            return
        finite = {key: value for key, value in metrics.items() if math.isfinite(value)}
        with self.file.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({"step": step, **finite}) + "\n")
        if self.wandb is not None:
            self.wandb.log(metrics, step=step)

    def close(self) -> None:
        if self.wandb is not None:
            self.wandb.finish()


def warn(console: Console, text: str) -> None:
    """A line that begins with `warning:`."""
    console.print(f"warning: {text}", style="yellow")
