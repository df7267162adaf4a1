"""python -m benchmarks.methods: what every method learns on the embedded data in the same training time.

Each run is the command a user would type: `python -m simcot_latent.train method=X seed=S num_iterations=N`, or the
`experiment=arithmetic_X` where a method needs other sizes on these data, then `python -m evals.arithmetic`. N is what
fits into the minutes, the same for all seeds. Before anything else, a trial of every method, its whole schedule in few
steps, tells how long a step takes on average; nothing else should use the cores meanwhile. Every run has one thread on
a core of its own, as many side by side as there are `--cores`.

Trials and results are kept run by run in `--out-dir`, so a command that was stopped goes on where it was. The table
shows, per method, the mean over seeds of the test accuracy with the 95% Wilson interval of all answers together, each
seed's, the steps read out of the thoughts, tokens, thoughts and passes per answer, and the median over seeds of
questions per second and of training seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.common import report
from simcot_latent.metrics import wilson_interval

METHODS = (
    "no_cot", "cot", "weighted", "icot", "coconut", "simcot_coconut", "codi", "simcot_codi", "pccot", "lotus", "kava",
    "colar", "soft", "pause", "pause_multipass",
)  # fmt: skip
EXPERIMENTS = ("codi", "simcot_codi", "pccot", "lotus", "kava", "colar", "icot")
"""Methods whose published sizes are not those of the embedded data: `experiment=arithmetic_...`."""

TRIAL = 120
"""Optimizer steps of a trial."""

QUIET = ("eval_every=-1", "checkpoint_every=-1")


def main() -> None:
    args = parse_arguments()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    cores: SimpleQueue[int] = SimpleQueue()
    for core in args.cores:
        cores.put(core)

    def on_a_core(work: Callable[..., Any], *values: Any) -> Any:
        core = cores.get()
        try:
            return work(*values, core, args)
        finally:
            cores.put(core)

    runs = [(method, seed) for seed in args.seeds for method in args.methods]
    with ThreadPoolExecutor(len(args.cores)) as pool:
        list(pool.map(partial(on_a_core, seconds_per_step), args.methods))
        results = list(pool.map(lambda run: on_a_core(result, *run), runs))
    rows = [summary(method, [r for r in results if r["method"] == method]) for method in args.methods]
    args.cores, args.out_dir = list(args.cores), str(args.out_dir)
    report("methods", args, rows, table_of(rows), runs=results)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=4, help="of training, per run")
    parser.add_argument("--cores", nargs="+", type=int, default=sorted(os.sched_getaffinity(0)), help="one run on each")
    parser.add_argument("--out-dir", type=Path, default=Path("runs/methods"))
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("options", nargs="*", help="further options of training, of every run: key=value")
    return parser.parse_args()


def overrides(method: str) -> list[str]:
    """What the command line of training has to say."""
    return [f"experiment=arithmetic_{method}" if method in EXPERIMENTS else f"method={method}"]


def seconds_per_step(method: str, core: int, args: argparse.Namespace) -> float:
    """Of an optimizer step, on average over a method's stages, by a trial, unless that has been done."""
    kept: Path = args.out_dir / f"{method}-trial.json"
    options = [*overrides(method), *QUIET, *args.options, f"num_iterations={TRIAL}"]
    if not kept.exists():
        seconds = train(kept.with_suffix(""), options, core)
        shutil.rmtree(kept.with_suffix(""))
        kept.write_text(json.dumps({"options": options, "seconds": seconds}) + "\n", encoding="utf-8")
    return read_kept(kept, options)["seconds"] / TRIAL


def read_kept(file: Path, options: list[str]) -> dict[str, Any]:
    """What an earlier command has found, with the same options."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if found["options"] != options:
        raise SystemExit(f"{file}: was made with {' '.join(found['options'])}; give another --out-dir")
    return found


def result(method: str, seed: int, core: int, args: argparse.Namespace) -> dict[str, Any]:
    """Trains and scores one run, unless that has been done."""
    folder: Path = args.out_dir / f"{method}-{seed}"
    kept = folder / "result.json"
    steps = max(TRIAL, round(60 * args.minutes / seconds_per_step(method, core, args)))
    options = [*overrides(method), f"seed={seed}", *QUIET, *args.options, f"num_iterations={steps}"]
    if kept.exists():
        return read_kept(kept, options)
    seconds = train(folder, options, core)
    command([sys.executable, "-m", "evals.arithmetic", f"ckpt={folder}/latest"], core)
    scores = json.loads(next(folder.glob("evals/arithmetic.test.*.json")).read_text(encoding="utf-8"))
    found = {"method": method, "seed": seed, "options": options, "steps": steps, "train_s": seconds, "scores": scores}
    kept.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def train(folder: Path, options: Sequence[str], core: int) -> float:
    """Trains a run; the seconds of its optimizer steps, as training itself reports them."""
    shutil.rmtree(folder, ignore_errors=True)
    said = command([sys.executable, "-m", "simcot_latent.train", *options, f"out_dir={folder}"], core)
    line = next(line for line in said.splitlines() if " steps in " in line)
    return float(line.split(" steps in ")[1].split(" s;")[0])


def command(words: list[str], core: int) -> str:
    """What a command prints, on one core with one thread."""
    print(f"{time.strftime('%H:%M:%S')} core {core}: {' '.join(words[1:])}", flush=True)
    done = subprocess.run(
        ["taskset", "-c", str(core), *words], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        raise SystemExit(
            f"{' '.join(words)}: exit status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return done.stdout


def summary(method: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A method's row: all of its seeds together."""
    scores = [run["scores"] for run in runs]
    n, correct = sum(s["n"] for s in scores), sum(s["correct"] for s in scores)
    row: dict[str, Any] = {
        "method": method,
        "accuracy": correct / n,
        "ci95": list(wilson_interval(correct, n)),
        "accuracies": [s["accuracy"] for s in scores],
        "steps": round(statistics.mean(run["steps"] for run in runs)),
    }
    for key in ("tokens_per_answer", "thoughts_per_answer", "passes_per_answer"):
        row[key] = statistics.mean(s[key] for s in scores)
    # Medians: what else the machine does slows one run, not all.
    row["questions_per_s"] = statistics.median(s["questions_per_s"] for s in scores)
    row["train_s"] = statistics.median(run["train_s"] for run in runs)
    exact = [s["step_exact_match"] for s in scores if "step_exact_match" in s]
    row["step_exact_match"] = statistics.mean(exact) if len(exact) == len(scores) else None
    return row


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for people, the most accurate first."""
    titles = ("method", "accuracy", "per seed", "steps read", "tokens", "passes", "questions/s", "steps", "train, s")
    table = Table(*titles, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in sorted(rows, key=lambda row: -row["accuracy"]):
        low, high = row["ci95"]
        read = row["step_exact_match"]
        table.add_row(
            row["method"], f"{row['accuracy']:.1%} ({low:.1%} to {high:.1%})",
            ", ".join(f"{value:.1%}" for value in row["accuracies"]), "-" if read is None else f"{read:.1%}",
            f"{row['tokens_per_answer']:.1f}", f"{row['passes_per_answer']:.1f}", f"{row['questions_per_s']:.0f}",
            str(row["steps"]), f"{row['train_s']:.0f}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    main()
