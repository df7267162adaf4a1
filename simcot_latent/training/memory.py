"""What is said when memory does not suffice."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from simcot_latent.errors import UserError

# How the allocators of torch's CPU and MPS backends say it; CUDA's has an exception of its own.
_REFUSED = re.compile(r"can't allocate memory|not enough memory|Cannot allocate memory|out of memory|std::bad_alloc")
_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+ \w+)")


@contextmanager
def out_of_memory(doing: str | Callable[[], str], device: torch.device, helps: str) -> Iterator[None]:
    """Turns running out of memory within it into a `UserError`.

    Args:
        doing: what was being done, with its sizes; or what makes that text once it is needed.
        device: whose memory is most likely meant.
        helps: the settings that need less.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        text = str(error)
        refused = isinstance(error, MemoryError | torch.OutOfMemoryError) or _REFUSED.search(text)
        if not refused or isinstance(error, UserError):
            raise
        asked = _ASKED.search(text)
        size = f", {_in_units(asked[1])} more were asked for" if asked else ""
        what = doing if isinstance(doing, str) else doing()
        raise UserError(f"out of memory {what}, on {device}{_total(device)}{size}; {helps}") from error


def _in_units(size: str) -> str:
    """`3000000000 bytes` as `3.0 GB`; what has a larger unit already stays."""
    number, unit = size.split()
    return in_units(float(number)) if unit == "bytes" else size


def in_units(size: float) -> str:
    """A number of bytes for people: three digits at most, in the largest unit that it is one of."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size /= 1000
        units.pop(0)
    unit = units[0]
    return f"{size:.0f} {unit}" if size >= 9.95 or unit == "bytes" else f"{size:.1f} {unit}"


def _total(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    return f" of {torch.cuda.get_device_properties(device).total_memory / 1e9:.0f} GB"
