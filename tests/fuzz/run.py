"""Throws broken files at the readers for minutes.

    python tests/fuzz/run.py [--minutes 10] [TARGET ...]        random changes of valid files
    python tests/fuzz/run.py --atheris TARGET [--minutes 10]    guided by coverage; takes `pip install atheris`

What a reader did not survive is kept in a file, whose name is printed; `--replay FILE TARGET` reads it once more.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HANG = 120
"""Seconds after which the whole program ends with a traceback of where it hung."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help="default: all")
    parser.add_argument("--minutes", type=float, default=10, help="per target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory-gb", type=float, default=4, help="what reading may allocate")
    parser.add_argument("--out", type=Path, default=Path("fuzz_crashes"), help="where broken files are kept")
    parser.add_argument("--replay", type=Path)
    parser.add_argument("--atheris", action="store_true")
    options = parser.parse_args()
    atheris: Any = importlib.import_module("atheris") if options.atheris else None
    if atheris is not None:
        with atheris.instrument_imports(include=["simcot_latent", "targets"]):
            from targets import TARGETS, Fuzzed, broken
    else:
        from targets import TARGETS, Fuzzed, broken

    folder = Path(tempfile.mkdtemp())
    names = options.targets or list(TARGETS)
    if unknown := [name for name in names if name not in TARGETS]:
        parser.error(f"unknown target {unknown[0]}; there are {', '.join(TARGETS)}")
    targets = {name: Fuzzed(name, folder) for name in names}
    limit_memory(options.memory_gb)
    if options.replay is not None:
        print(targets[names[0]].read(options.replay.read_bytes()))
        return
    if atheris is not None:
        run_atheris(atheris, targets[names[0]], folder, options)
    found = 0
    for name, fuzzed in targets.items():
        chance, cases, refused, slowest = random.Random(options.seed), 0, 0, 0.0
        end = time.monotonic() + 60 * options.minutes
        kept: set[str] = set()
        while time.monotonic() < end:
            data = broken(fuzzed.seed, chance)
            faulthandler.dump_traceback_later(HANG, exit=True)
            began = time.process_time()
            try:
                refused += fuzzed.read(data) != "read"
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt | SystemExit):
                    raise
                reason = f"{type(error).__name__}: {error}"[:300]
                if type(error).__name__ + str(error)[:40] not in kept:  # one of each kind
                    kept.add(type(error).__name__ + str(error)[:40])
                    options.out.mkdir(parents=True, exist_ok=True)
                    file = options.out / f"{name}_{cases}"
                    file.write_bytes(data)
                    print(f"{name}: {reason} | kept in {file}", flush=True)
                    found += 1
            slowest = max(slowest, time.process_time() - began)
            cases += 1
        faulthandler.cancel_dump_traceback_later()
        print(
            f"{name}: {cases} files, {refused} refused, slowest {slowest:.2f} s, {len(kept)} kinds of crash", flush=True
        )
    sys.exit(1 if found else 0)


def limit_memory(gigabytes: float) -> None:
    """What the process has now, and so much more."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = now + int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def run_atheris(atheris: Any, fuzzed: Any, folder: Path, options: argparse.Namespace) -> None:
    corpus = folder / "corpus"
    corpus.mkdir()
    (corpus / "seed").write_bytes(fuzzed.seed)
    arguments = [sys.argv[0], str(corpus), f"-max_total_time={int(60 * options.minutes)}", f"-timeout={HANG}",
                 "-rss_limit_mb=0", f"-max_len={2 * len(fuzzed.seed) + 1000}",
                 f"-artifact_prefix={options.out}/"]  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    atheris.Setup(arguments, lambda data: fuzzed.read(data) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
