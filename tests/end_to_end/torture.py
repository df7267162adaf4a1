"""python tests/end_to_end/torture.py: training is killed (kill -9) at random moments, goes on, and must not show it.

A process that has imported everything forks one process per attempt, so an attempt costs no seconds of imports. Half of
the kills come at any moment, half as soon as a checkpoint is being written. After each, `latest` must load and
`metrics.jsonl` have whole lines, none twice; a run that has come to its end must equal one that was never interrupted,
bit for bit. It prints what it did as JSON.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from simcot_latent import cli, train
from simcot_latent.checkpoint import load_checkpoint, load_trainer_state

SETTINGS = ("model.n_layer=1", "model.n_embd=32", "model.n_head=2", "device=cpu", "dtype=float32", "num_iterations=24",
            "target_examples_per_step=8", "device_batch_size=4", "eval_examples=4", "max_new_tokens=4", "log_every=1",
            "eval_every=4", "checkpoint_every=3", "data.train_size=64", "data.validation_size=8",
            "data.test_size=12")  # fmt: skip
MODES = {"weighted": ("mode=weighted",), "latent": ("mode=latent", "latent.warmup=0.4", "latent.reset_optimizer=true")}
CLOCK = ("tokens_per_s", "data_wait")
LONGEST = 90.0
"""Seconds within which an attempt that is left alone must end."""
ALONE = 15.0
"""Seconds after which a rank whose partner was killed is told to end, and killed 30 later, as torchrun does. As a rule
one that has met its partner notices by itself, and sooner; one that waits within a connection may not."""


def start(out_dir: Path, mode: str, ranks: int, port: int) -> list[int]:
    """An attempt: process ids, one per rank."""
    processes: list[int] = []
    for rank in range(ranks):
        if (pid := os.fork()) == 0:
            log = os.open(out_dir.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if ranks > 1:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank),
                               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
            faulthandler.register(signal.SIGUSR2)
            sys.argv = ["train", *SETTINGS, *MODES[mode], f"out_dir={out_dir}", "resume=auto"]
            status = 1
            try:
                cli.run(train.main, "train")
                status = 0
            except SystemExit as stop:
                status = stop.code if isinstance(stop.code, int) else 1
            finally:
                sys.stdout.flush()
                os._exit(status)
        processes.append(pid)
    return processes


def is_saving(out_dir: Path) -> bool:
    return any(out_dir.glob(".step_*.partial"))


def kill_sometime(processes: list[int], out_dir: Path, rng: random.Random, usual: float) -> bool:
    """Kills one rank at a random moment; False if all came to their end before."""
    while_saving = rng.random() < 0.5
    at = time.monotonic() + rng.uniform(0, usual if not while_saving else 0.5 * usual)
    chosen = rng.choice(processes)
    while time.monotonic() < at or (while_saving and not is_saving(out_dir)):
        if os.waitid(os.P_PID, chosen, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
        time.sleep(0.0005)
    time.sleep(rng.uniform(0, 0.01) if while_saving else 0)
    os.kill(chosen, signal.SIGKILL)
    return True


def have_met(processes: list[int], out_dir: Path) -> bool:
    """Whether the ranks of an attempt knew of each other: only then does rank 0 take the folder, and it never gave it
    back if it was killed."""
    with suppress(FileNotFoundError, ValueError):
        return json.loads((out_dir / "lock.json").read_text())["pid"] == processes[0]
    return False


def wait_for(processes: list[int], out_dir: Path, hit: bool = False) -> list[int]:
    """The exit statuses of an attempt; -9 of one that was killed.

    Args:
        hit: whether one was killed.

    Raises:
        AssertionError: one does not end.
    """
    statuses: list[int] = []
    began = time.monotonic()
    told = False
    for pid in processes:
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses.append(os.waitstatus_to_exitcode(status))
                break
            waited = time.monotonic() - began
            if hit and waited > ALONE and not told:
                os.kill(pid, signal.SIGUSR2)  # it writes where it waits into the log
                time.sleep(0.5)
                os.kill(pid, signal.SIGTERM)
                told = True
                print(f"a rank did not notice that its partner died:\n{where_it_waits(out_dir)}", file=sys.stderr)
            if waited > (ALONE + 30 if hit else LONGEST):
                for other in processes:
                    with suppress(ProcessLookupError):
                        os.kill(other, signal.SIGKILL)
                if not hit:
                    raise AssertionError(f"an attempt did not end within {LONGEST:g} s")
            time.sleep(0.002)
    return statuses


def where_it_waits(out_dir: Path) -> str:
    """The end of a log, the stacks of a rank that was asked for them."""
    return out_dir.with_suffix(".log").read_text(errors="replace")[-3000:]


def records(out_dir: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` without what depends on the clock."""
    file = out_dir / "metrics.jsonl"
    text = file.read_bytes().decode("utf-8") if file.exists() else ""
    assert text == "" or text.endswith("\n"), f"a torn line: {text[-80:]!r}"
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in text.splitlines()]


def check(out_dir: Path, had_latest: bool) -> bool:
    """What must hold after every kill; whether there is a `latest`."""
    kinds = Counter((row["step"], "val_loss" in row) for row in records(out_dir))
    assert not [kind for kind, count in kinds.items() if count > 1], f"double lines: {kinds}"
    if not (out_dir / "latest").exists():
        assert not had_latest, "latest is gone"
        return False
    checkpoint = load_checkpoint(out_dir)
    assert load_trainer_state(checkpoint.path or out_dir).values["step"] == checkpoint.step
    logged = {row["step"] for row in records(out_dir) if "loss" in row}
    assert set(range(1, checkpoint.step + 1)) <= logged, "a checkpoint is ahead of its metrics"
    return True


def assert_same(ours: Path, theirs: Path) -> None:
    """The same run, but for the clock and where it lies."""
    mine, other = ours / "latest", theirs / "latest"
    assert mine.readlink() == other.readlink()
    names = sorted(str(file.relative_to(mine)) for file in mine.rglob("*") if file.is_file())
    assert names == sorted(str(file.relative_to(other)) for file in other.rglob("*") if file.is_file())
    for name in names:
        # These tell how the command was given (`out_dir`).
        if name not in ("config.json", "manifest.json"):
            assert (mine / name).read_bytes() == (other / name).read_bytes(), f"{name} differs"
    assert records(ours) == records(theirs)
    kept = {path.name for path in ours.iterdir() if not path.name.startswith("metrics-")}
    assert kept == {path.name for path in theirs.iterdir()}, f"something is left over: {kept}"


def torture(folder: Path, mode: str, kills: int, ranks: int, rng: random.Random) -> dict[str, Any]:
    """So many kills in one mode."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    once = folder / f"{mode}-{ranks}-once"
    began = time.monotonic()
    log = once.with_suffix(".log")
    assert wait_for(start(once, mode, ranks, port), once) == [0] * ranks, log.read_text()
    usual = time.monotonic() - began
    killed = saving = finished = 0
    slowest = 0.0
    while killed < kills or not finished:
        out_dir = folder / f"{mode}-{ranks}-{finished}"
        had_latest = False
        while True:
            port += 1
            log = out_dir.with_suffix(".log")
            processes = start(out_dir, mode, ranks, port)
            # The last attempts are left alone.
            hit = killed < kills and kill_sometime(processes, out_dir, rng, usual)
            hit_at = time.monotonic()
            met = have_met(processes, out_dir)
            statuses = wait_for(processes, out_dir, hit)
            if hit and ranks > 1 and met:
                slowest = max(slowest, time.monotonic() - hit_at)
            killed += hit
            saving += hit and is_saving(out_dir)
            assert -signal.SIGKILL in statuses or statuses == [0] * ranks, log.read_text()
            had_latest = check(out_dir, had_latest)
            if statuses == [0] * ranks:
                break
        assert_same(out_dir, once)
        shutil.rmtree(out_dir)
        finished += 1
    report = {"mode": mode, "ranks": ranks, "kills": killed, "of them in a save": saving, "runs finished": finished}
    return report | ({"slowest end of the other rank, s": round(slowest, 2)} if ranks > 1 else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="per mode")
    parser.add_argument("--kills-of-two-ranks", type=int, default=10, help="per mode")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        for mode in given.modes:
            for kills, ranks in ((given.kills, 1), (given.kills_of_two_ranks, 2)):
                if kills:
                    print(json.dumps(torture(Path(folder), mode, kills, ranks, rng)), flush=True)


if __name__ == "__main__":
    main()
