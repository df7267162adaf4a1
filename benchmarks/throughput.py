"""python -m benchmarks.throughput --data path/to/gsm8k: a whole short training run and a whole evaluation.

Both are the commands that a user types, from files to report: reading, encoding, training with held-out evaluations and
checkpoints, and then the test set. What they say of themselves (tokens/s, share of the time that steps wait for data,
padding, questions/s) is collected, beside the time on the wall and the share of it that steps are.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.common import make_parser, report


def main() -> None:
    args = parse_arguments()
    rows = [measure(mode, args) for mode in track(args.modes, "modes", console=Console(stderr=True))]
    table = Table("mode", "training, s", "tokens/s", "data wait", "padding", "evaluation, s", "questions/s")
    for row in rows:
        table.add_row(
            row["mode"],
            f"{row['train_s']:.0f}",
            f"{row['tokens_per_s']:.0f}",
            f"{row['data_wait']:.2%}",
            f"{row['padding']:.1%}",
            f"{row['eval_s']:.0f}",
            f"{row['questions_per_s']:.1f}",
        )
    report("throughput", args, rows, table)


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--modes", nargs="+", choices=("weighted", "latent"), default=["weighted", "latent"])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--limit", type=int, default=1319, help="test problems")
    parser.add_argument("--overrides", nargs="*", default=["model=small"], help="of the training command")
    parser.set_defaults(threads=os.cpu_count())
    return parser.parse_args()


def measure(mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """One run and its evaluation."""
    source = ("data=gsm8k", f"data.path={Path(args.data).resolve()}")
    with tempfile.TemporaryDirectory() as folder:
        train_s = timed(
            args.threads,
            "simcot_latent.train", f"mode={mode}", *source, f"num_iterations={args.steps}", f"seed={args.seed}",
            f"eval_every={args.steps}", "eval_examples=100", "max_new_tokens=64", f"out_dir={folder}", *args.overrides,
        )  # fmt: skip
        eval_s = timed(args.threads, "evals.gsm8k", f"ckpt={folder}", source[1], f"limit={args.limit}")
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        scores = json.loads(next(Path(folder).glob("evals/gsm8k.*.json")).read_text())
    steps = [line for line in lines if "tokens_per_s" in line and line["step"] > 1]
    return {
        "mode": mode,
        "train_s": train_s,
        "eval_s": eval_s,
        "questions_per_s": scores["questions_per_s"],
        **{key: statistics.median(line[key] for line in steps) for key in ("tokens_per_s", "data_wait", "padding")},
    }


def timed(threads: int, module: str, *arguments: str) -> float:
    """Seconds that a command took."""
    began = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, "-m", module, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
