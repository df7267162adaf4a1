"""python -m benchmarks.soak: hours of training with a checkpoint per minute; does memory grow, does the disk fill?

It prints a line per minute, then a report as JSON: memory of the training process over its steps (least squares over
the second half, when everything that is kept has been met), and the most that its folder ever held against the size of
one checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

# A small model that thinks from the first step on, so that a step is the same from the start to the end.
TRAINING = ("mode=latent", "latent.warmup=0", "latent.stages=0", "device=cpu", "dtype=float32", "data.train_size=20000",
            "target_examples_per_step=8", "eval_examples=32", "max_new_tokens=32")  # fmt: skip


def memory_mb(pid: int) -> float:
    """Resident memory of a process, in MB (Linux)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise ProcessLookupError(pid)


def disk_mb(folder: Path) -> float:
    """What lies under a folder, in MB; files may vanish while it is counted."""
    total = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(directory) / name).lstat().st_size
            except FileNotFoundError:
                pass
    return total / 1e6


def last_step(file: Path) -> int:
    """The step of the last whole line of `metrics.jsonl`; 0 where there is none."""
    if not file.exists():
        return 0
    with file.open("rb") as handle:
        handle.seek(max(0, file.stat().st_size - 4096))
        lines = handle.read().split(b"\n")[:-1]
    return json.loads(lines[-1])["step"] if lines else 0


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the least squares line through points."""
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


def samples(process: subprocess.Popen[bytes], out_dir: Path, seconds: float) -> Iterator[tuple[int, float, float]]:
    """Step, memory and disk use every so many seconds, while a process runs."""
    while process.poll() is None:
        time.sleep(seconds)
        try:
            memory = memory_mb(process.pid)
        except (FileNotFoundError, ProcessLookupError):
            return
        yield last_step(out_dir / "metrics.jsonl"), memory, disk_mb(out_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--out-dir", type=Path, default=Path("runs/soak"))
    parser.add_argument("--keep", type=int, default=2, help="keep_checkpoints")
    parser.add_argument("options", nargs="*", help="options of training, in place of the small model's")
    given = parser.parse_args()

    def train(out_dir: Path, *more: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "simcot_latent.train", *TRAINING, *given.options, f"out_dir={out_dir}", *more]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL)

    # How many steps are a minute? The second half of a short run tells.
    trial = given.out_dir.with_name(given.out_dir.name + "-trial")
    process = train(trial, "num_iterations=100000000", "max_minutes=1", "log_every=1", "checkpoint_every=-1")
    seen = [(time.monotonic(), step) for step, *_ in samples(process, trial, 1) if step]
    if process.wait():
        raise SystemExit("training failed")
    (t0, step0), (t1, step1) = seen[len(seen) // 2], seen[-1]
    a_minute = max(1, round(60 * (step1 - step0) / (t1 - t0)))
    checkpoint_mb = disk_mb((trial / "latest").resolve())
    shutil.rmtree(trial)
    print(f"a checkpoint per {a_minute} steps, {checkpoint_mb:.1f} MB", flush=True)

    began = time.monotonic()
    process = train(given.out_dir, "num_iterations=100000000", f"max_minutes={given.minutes}", f"eval_every={a_minute}",
                    f"checkpoint_every={a_minute}", f"keep_checkpoints={given.keep}")  # fmt: skip
    points: list[tuple[float, float]] = []
    most_disk = 0.0
    for step, memory, disk in samples(process, given.out_dir, 10):
        points.append((step, memory))
        most_disk = max(most_disk, disk)
        if len(points) % 6 == 0:
            minutes = (time.monotonic() - began) / 60
            print(f"{minutes:6.1f} min | step {step} | {memory:.1f} MB | disk {disk:.1f} MB", flush=True)
    half = points[len(points) // 2 :]
    report = {
        "minutes": (time.monotonic() - began) / 60,
        "steps": points[-1][0],
        "status": process.returncode,
        "memory_mb": {"a tenth": points[len(points) // 10][1], "half": half[0][1], "end": half[-1][1]},
        "memory_mb_per_1000_steps": 1000 * slope(half),
        "checkpoint_mb": checkpoint_mb,
        "most_disk_mb": most_disk,
        "metrics_mb": (given.out_dir / "metrics.jsonl").stat().st_size / 1e6,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
