"""The table of parts: what `loop=pause` or `terms=[contrast]` on a command line, or in a checkpoint, stands for.

A method is a choice of parts. Each is found by its group and its key in the table below, never by a class path, which
a file could choose. A part of your own registers itself where its module is imported, which `use=[module]` does:

    @register("loop", "noisy")
    class Noisy(Sequential): ...
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from simcot_latent.errors import UserError, did_you_mean

FILE_NAME = re.compile(r"[a-z][a-z0-9_]{0,99}")
"""What a part that learns may be called, since a checkpoint keeps it in a file of its name."""

RESERVED = ("model", "lora", "loop", "step_decoder", "trainer_state")
"""Names of files that a checkpoint has already."""

NONE = "none"
"""The key of no part, in every group of which a method has one."""

PARTS: dict[str, dict[str, str | type]] = {
    "curriculum": {
        "fixed_k": "simcot_latent.curricula.fixed_k.FixedK",
        NONE: "simcot_latent.curricula.none.NoCurriculum",
        "remove_tokens": "simcot_latent.curricula.remove_tokens.RemoveTokens",
        "replace": "simcot_latent.curricula.replace.Replace",
    },
    "loop": {
        "compressed": "simcot_latent.loops.compressed.Compressed",
        "jacobi": "simcot_latent.loops.jacobi.Jacobi",
        "looped": "simcot_latent.loops.looped.Looped",
        "pause": "simcot_latent.loops.pause.Pause",
        "pause_multipass": "simcot_latent.loops.pause_multipass.PauseMultipass",
        "sequential": "simcot_latent.loops.sequential.Sequential",
        "soft": "simcot_latent.loops.soft.Soft",
    },
    "steps": {
        "compressed": "simcot_latent.terms.compressed.CompressedTerm",
        "decoder": "simcot_latent.terms.step_decoder.StepDecoderTerm",
        "own_head": "simcot_latent.terms.own_head.OwnHead",
    },
    "distill": {
        "hidden": "simcot_latent.terms.hidden.Hidden",
        "kv": "simcot_latent.terms.keys.Keys",
    },
    "written": {
        "joint": "simcot_latent.terms.written.Joint",
    },
    "term": {},
}
"""By group: each key's class, or where it is, so that no part is imported before it is needed."""


T = TypeVar("T", bound=type)


def register(group: str, key: str) -> Callable[[T], T]:
    """Puts a class into the table, as a decorator of it.

    Args:
        group: `curriculum`, `loop`, `steps`, `distill`, `written` or `term`.
        key: what a command line and a checkpoint call it.

    Raises:
        UserError: there is no such group, or the key is another part's.
    """
    if group not in PARTS:
        raise UserError(f"register({group!r}, {key!r}): the group must be one of {', '.join(PARTS)}")
    if key == NONE or not FILE_NAME.fullmatch(key):
        raise UserError(f"register({group!r}, {key!r}): the key must be small letters, digits and _, and not none")

    def put(cls: T) -> T:
        if fault := fault_of(cls):
            raise UserError(f"register({group!r}, {key!r}): {getattr(cls, '__name__', cls)} {fault}")
        there = PARTS[group].get(key)
        path = there if isinstance(there, str) or there is None else f"{there.__module__}.{there.__qualname__}"
        if path not in (None, f"{cls.__module__}.{cls.__qualname__}"):
            raise UserError(f"register({group!r}, {key!r}): is {path} already; take another key")
        PARTS[group][key] = cls
        return cls

    return put


def fault_of(cls: Any) -> str | None:
    """What is wrong with the class of a part; None: nothing that can be seen before it is used."""
    if not isinstance(cls, type):
        return "must be a class"
    if missing := sorted(getattr(cls, "__abstractmethods__", ())):
        return f"must define {', '.join(missing)}"
    config = getattr(cls, "Config", None)
    if "Config" in vars(cls) and not (isinstance(config, type) and is_dataclass(config)):
        return "must have a dataclass as Config"
    if isinstance(config, type) and is_dataclass(config):
        without = [f.name for f in fields(config) if f.default is MISSING and f.default_factory is MISSING]
        if without:
            return f"must have a Config in which {without[0]} has a default"
    return None


def find(group: str, key: str, where: str | None = None) -> Any:
    """The class of a part.

    Args:
        where: what the error begins with; None: `group=key`.

    Raises:
        UserError: the table has none of that key.
    """
    found = PARTS[group].get(key)
    if found is None:
        known = [other for other in keys(group) if other != key]  # a checkpoint may not say loop.key=none
        right = f"one of {', '.join(known)}" if known else "registered"
        raise UserError(
            f"{where or named(group, key)}: must be {right}{did_you_mean(key, known)}; a part of your own is "
            "registered by the module that use=[module] names"
        )
    if isinstance(found, str):
        module, _, name = found.rpartition(".")
        return getattr(import_module(module), name)
    return found


def named(group: str, key: str) -> str:
    """A part as a command line chooses it."""
    return f"terms=[{key}]" if group == "term" else f"{group}={key}"


def keys(group: str) -> list[str]:
    """What a group offers, `none` included where a method may go without."""
    return sorted(PARTS[group].keys() | (set() if group == "term" else {NONE}))


def key_of(group: str, cls: type) -> str:
    """The key under which a class is in the table; empty: under none."""
    path = f"{cls.__module__}.{cls.__qualname__}"
    return next((key for key, found in PARTS[group].items() if found is cls or found == path), "")


def use(modules: Sequence[str]) -> None:
    """Imports modules that register parts; those of the current folder are found too.

    Raises:
        UserError: one is not there, or fails.
    """
    here = str(Path.cwd())
    if modules and here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    for module in modules:
        try:
            import_module(module)
        except UserError:
            raise
        except (Exception, SystemExit) as error:  # whatever it raises
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"use=[{module}]: cannot be imported ({reason})") from error
