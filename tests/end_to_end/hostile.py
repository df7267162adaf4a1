"""Uses a checkpoint whose `config.json` has been tampered with, one place at a time, within limits of memory.

Command: python tests/end_to_end/hostile.py CHECKPOINT FOLDER SHARE

Each leaf of the file (text, number, truth value, null) is replaced by each of `HOSTILE`, and each object gets each of
`KEYS`; a SHARE of all these are tried, drawn at random. Prints one JSON object: what came of each.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

from commands import run

PWNED = "pwned"
"""The file that appears in the working folder if a checkpoint's code is run."""

CALL: dict[str, Any] = {"_target_": "os.system", "_args_": [f"touch {PWNED}"]}
WRITE = {
    "_target_": "pathlib.Path.write_text",
    "_args_": [{"_target_": "pathlib.Path", "_args_": [PWNED]}, "y"],
}
HOSTILE: list[Any] = [
    CALL, WRITE, [CALL, WRITE], "${oc.env:SECRET}", ["${oc.env:SECRET}"], "${run.mode}", "os.system", "/dev/zero",
    "/dev/stdin", "../../../etc", "x" * 5000, "\0", "\ud800", 10**13, 2**40, 2**31 - 1, 2**63, 10**400, -1, 0, 1e308,
    True, None, [], [[[]]], {},
]  # fmt: skip
KEYS: dict[str, Any] = {
    "_target_": "os.system", "_args_": [f"touch {PWNED}"], "_partial_": True, "_recursive_": True, "_convert_": "all",
    "unknown": WRITE, "self": 1,
}  # fmt: skip
MEMORY = 2 * 2**30
"""Bytes that a use may allocate beyond what the program takes anyway."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where everything in a JSON value stands."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def tampered(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every tampered configuration, and what was done to it."""
    for path in places(config):
        value: Any = config
        for key in path:
            value = value[key]
        changes = [(None, hostile) for hostile in HOSTILE]
        if isinstance(value, dict):
            changes = list(KEYS.items())
        for key, hostile in changes:
            copy = deepcopy(config)
            inner: Any = copy
            for step in path if key is not None else path[:-1]:
                inner = inner[step]
            if key is None and not path:
                continue
            inner[path[-1] if key is None else key] = hostile
            yield f"{'.'.join(map(str, path))}{'' if key is None else f' + {key}'} = {hostile!r}"[:200], copy


def main() -> None:
    checkpoint, folder, share = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    chance = random.Random(0)
    config = json.loads((checkpoint / "config.json").read_text())
    uses = [
        ("evals.arithmetic", f"ckpt={checkpoint}", "limit=2", "verify=false", "device=cpu"),
        ("simcot_latent.probe", f"ckpt={checkpoint}", "data=arithmetic", "limit=2", "verify=false", "device=cpu"),
    ]
    for use in uses:
        run(*use, folder=folder).ok()  # imports everything
    before = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (before + MEMORY, before + MEMORY))
    outcomes: list[dict[str, Any]] = []
    for what, changed in tampered(config):
        # What a data source is told, and numbers, are always tried: they are what did harm.
        if chance.random() > (5 * share if ".data" in what else share):
            continue
        (checkpoint / "config.json").write_text(json.dumps(changed))
        use = uses[len(outcomes) % 2]
        began = time.process_time()
        outcome = run(*use, folder=folder)
        seconds = time.process_time() - began
        outcomes.append({"what": what, "use": use[0], "status": outcome.status, "err": outcome.err, "out": outcome.out,
                         "seconds": seconds})  # fmt: skip
    print(json.dumps({"outcomes": outcomes}))


if __name__ == "__main__":
    main()
