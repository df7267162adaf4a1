"""python -m benchmarks.gpu [--minutes 8] [--out FOLDER] [--device cuda] [--tiny] [--parts ...]

Finds out whether the CUDA path is right and how fast it is, on one card, in a stated number of minutes. Its parts run
in the order of their value, each in a process of its own with its own time limit, so that one that fails or hangs costs
only itself. Each writes a JSON report as it goes; at the end one short table says what came of them.

It starts on a bare machine, from a checkout: torch, numpy, transformers, einops, tiktoken, safetensors, rich, regex,
huggingface_hub and pyarrow are all it needs.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.gpu.common import add_options, card_name, options_of, read_report, slug, write_report


@dataclass(frozen=True)
class Part:
    """One part of the benchmark.

    Attributes:
        module: what is run; it takes the options of `add_options`.
        share: of all the time that is left for this part and those after it, against the others' shares.
        most: seconds that it gets at most.
        what: in a few words.
    """

    module: str
    share: float
    most: float
    what: str


PARTS = {
    "correct": Part("benchmarks.gpu.correct", 0.25, 120, "numbers against the CPU"),
    "train": Part("benchmarks.gpu.train", 0.25, 600, "training steps against their bound"),
    "generate": Part("benchmarks.gpu.generate", 0.10, 300, "answers against transformers"),
    "learn": Part("benchmarks.gpu.learn", 0.35, 3600, "what is learnt in minutes"),
    "profile": Part("benchmarks.gpu.profile", 0.05, 60, "where a latent step's time goes"),
}

LEAST = 20.0
"""Seconds that every part gets, however little is left."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add_options(parser)
    args = parser.parse_args()
    if args.minutes <= 0:
        parser.error(f"--minutes {args.minutes}: must be above 0")
    if args.out is None:
        args.out = Path("runs/gpu_tiny" if args.tiny else f"benchmarks/results/{slug(card_name(args.device))}")
    args.out.mkdir(parents=True, exist_ok=True)
    parts = {name: PARTS[name] for name in args.parts}
    seconds = args.minutes * 60
    if args.tiny:  # two minutes of work, but let no part run out of time because a laptop is busy
        seconds *= 5
        parts = {name: replace(part, most=10 * part.most) for name, part in parts.items()}
    states = run_parts(parts, seconds, args.out, options_of(args))
    Console().print(states_table(args.out, states))
    Console().print(f"reports: {args.out}", soft_wrap=True)
    sys.exit(0 if all(state == "done" for state in states.values()) else 1)


def run_parts(parts: Mapping[str, Part], seconds: float, out: Path, options: Sequence[str]) -> dict[str, str]:
    """Runs parts one after the other; what became of each: `done`, `failed (..)` or `stopped after N s`.

    Args:
        seconds: for all of them. What a part leaves goes to those after it.
        out: where reports go.
        options: of `options_of`.
    """
    states: dict[str, str] = {}
    end = time.monotonic() + seconds
    left = dict(parts)
    for name, part in parts.items():
        share = part.share / sum(other.share for other in left.values())
        limit = min(part.most, max(LEAST, share * (end - time.monotonic())))
        del left[name]
        print(f"--- {name}: {part.what}, at most {limit:.0f} s", flush=True)
        (out / f"{name}.json").unlink(missing_ok=True)  # an older report must not pass for this one
        command = [sys.executable, "-m", part.module, "--out", str(out), "--seconds", f"{limit:.0f}", *options]
        states[name] = run_with_limit(command, limit, out / f"{name}.log")
        if states[name] != "done":
            print(f"{name}: {states[name]}; its output is in {out / f'{name}.log'}", flush=True)
        write_report(out, name, read_report(out, name) | {"part": name, "state": states[name], "limit_s": limit})
    return states


def run_with_limit(command: Sequence[str], limit: float, log: Path) -> str:
    """Runs a command, its output into a file; it and all that it started are killed at the limit (seconds)."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:  # at Ctrl-C too
            kill_group(process)
    if status is None:
        return f"stopped after {limit:.0f} s"
    if status == 0:
        return "done"
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"failed (status {status}: {lines[-1].strip()[:200] if lines else 'no output'})"


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and its children, those that outlived it too."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def states_table(out: Path, states: Mapping[str, str]) -> Table:
    """What became of each part, in a line each."""
    table = Table("part", "state", "found")
    for name, state in states.items():
        table.add_row(name, state, "\n".join(read_report(out, name).get("headlines", [])))
    return table


if __name__ == "__main__":
    main()
