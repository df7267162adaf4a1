"""Weights in safetensors files: written to the disk with their hash, read with their shapes compared first."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from simcot_latent.errors import UserError, some
from simcot_latent.files import require_regular
from simcot_latent.folders import Fingerprint
from simcot_latent.model.gpt import GPTConfig
from simcot_latent.paths import writing

# safetensors' names of number formats, in the order in which it sorts them.
DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}


WIDTH_ORDER = list(DTYPES)
M = TypeVar("M", bound=nn.Module)


def save_weights(module: nn.Module, file: Path, shared: str | None = None) -> Fingerprint:
    """A module's weights, but for those under the prefix `shared`, which another file holds."""
    weights = module.state_dict()
    return save_tensors({n: v for n, v in weights.items() if not (shared and n.startswith(shared))}, file)


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> Fingerprint:
    """Writes a safetensors file to the disk, and hashes in the same pass what it writes.

    The format: https://github.com/huggingface/safetensors#format. Tensors lie in the library's own order (wide numbers
    first, then by name), so the file is byte for byte the one that `safetensors.torch.save_file` writes.

    Raises:
        UserError: it cannot be written.
    """
    order = sorted(tensors.items(), key=lambda item: (-WIDTH_ORDER.index(item[1].dtype), item[0]))
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in order:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    pieces: list[bytes | Tensor] = [len(text).to_bytes(8, "little") + text, *(tensor for _, tensor in order)]
    digest, size = hashlib.sha256(), 0
    with writing(file), ThreadPoolExecutor(1) as hasher, file.open("wb", buffering=0) as handle:
        for piece in pieces:
            data = memoryview(piece if isinstance(piece, bytes) else raw_bytes(piece))
            size += len(data)
            hasher.submit(digest.update, data)
            while data:
                data = data[handle.write(data) :]
        os.fsync(handle.fileno())  # here, where the hashing goes on meanwhile
    return Fingerprint(size, digest.hexdigest())


def raw_bytes(tensor: Tensor) -> Any:
    """A tensor's numbers as they lie in memory, row by row."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def load_module(make: Callable[[GPTConfig], M], config: GPTConfig, file: Path, shared: str | None = None) -> M:
    """A module with the weights of a file, on the CPU.

    The shapes that the file names are compared with those of the configuration before anything of their size is made:
    of as many blocks as the configuration says only the first is built for that, since all are alike.

    Args:
        make: makes the module of a configuration.
        shared: see `load_weights`.

    Raises:
        UserError: see `load_weights`.
    """
    found = read_shapes(file)
    if config.n_layer > len(found):
        raise UserError(
            f"{file}: does not fit the model: it holds {len(found)} tensors, config.json says n_layer={config.n_layer}"
        )
    try:
        with torch.device("meta"):
            first = weight_shapes(make(replace(config, n_layer=1)), shared)
    except RuntimeError as error:  # more numbers than a tensor can count
        raise UserError(f"{file}: config.json says a model larger than any") from error
    wanted: dict[str, torch.Size] = {}
    for name, shape in first.items():
        before, block, after = name.partition(".blocks.0.")
        wanted |= {f"{before}.blocks.{n}.{after}": shape for n in range(config.n_layer)} if block else {name: shape}
    require_shapes(found, wanted, file)
    with torch.device("meta"):
        module = make(config)
    load_weights(module, file, shared)
    return module


def load_weights(module: nn.Module, file: Path, shared: str | None = None) -> None:
    """Gives a module the weights of a file, in the number formats that it has; `shared` is a prefix that the file
    leaves out. Where the module is on the `meta` device they become its own.

    Raises:
        UserError: the file is missing or broken, or a weight is missing, left over, of another shape or not finite.
    """
    require_shapes(read_shapes(file), weight_shapes(module, shared), file)
    ours = module.state_dict()
    # Copies: what was read may be the file itself, mapped into memory.
    state = {name: weight.to(ours[name].dtype, copy=True) for name, weight in read_tensors(file).items()}
    require_finite(state, file)
    module.load_state_dict(state, strict=False, assign=True)


@torch.no_grad()
def broken_weights(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of weights that hold what is no number, or one so large (over 1e19) that no model computes with it."""
    norms = {name: weight.float().norm() for name, weight in named}
    # One read for all of them; a norm squares, so it is infinite long before the numbers are.
    finite = torch.stack(list(norms.values())).isfinite().tolist() if norms else []
    return [name for name, ok in zip(norms, finite, strict=True) if not ok]


def require_finite(weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Refuses the weights of a model that would answer nothing but nonsense.

    Args:
        source: what they are from, for the error.

    Raises:
        UserError: some are not finite; the message names the first.
    """
    if broken := broken_weights(weights.items()):
        more = f" and {len(broken) - 1} more weights hold" if len(broken) > 1 else " holds"
        raise UserError(f"{source}: {broken[0]}{more} numbers that are not finite, or over 1e19")


def weight_shapes(module: nn.Module, shared: str | None = None) -> dict[str, torch.Size]:
    """The shapes of a module's weights, but for those under the prefix `shared`."""
    return {n: v.shape for n, v in module.state_dict().items() if not (shared and n.startswith(shared))}


def require_shapes(found: Mapping[str, torch.Size], wanted: Mapping[str, torch.Size], file: Path) -> None:
    """Refuses a file whose tensors are not those that are wanted; the message names the first three.

    Raises:
        UserError: a weight is missing, left over or of another shape.
    """
    lacking = [name for name in wanted if name not in found]
    left_over = [name for name in found if name not in wanted]
    misshapen = [
        f"{name} of shape {tuple(found[name])}, not {tuple(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    problems = [f"lacks {some(lacking)}"] if lacking else []
    problems += [f"has {some(left_over)}, which the model has not"] if left_over else []
    problems += [f"has {some(misshapen)}"] if misshapen else []
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{file}: does not fit the model: it {'; it '.join(problems[:3])}{more}")


def read_shapes(file: Path) -> dict[str, torch.Size]:
    """The names and shapes of a safetensors file's tensors, from its header alone.

    Raises:
        UserError: it is missing or broken.
    """
    with safetensors_errors(file), safe_open(file, framework="pt") as tensors:
        return {name: torch.Size(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        UserError: it is missing or broken.
    """
    with safetensors_errors(file):
        return load_file(file)


@contextmanager
def safetensors_errors(file: Path) -> Iterator[None]:
    """Turns whatever goes wrong while a safetensors file is read into a `UserError` that names it."""
    if not file.exists():
        raise UserError(f"{file}: no such file; the checkpoint is incomplete")
    require_regular(file)
    try:
        yield
    except Exception as error:  # broken bytes end in whatever they happen to mean to the library
        raise UserError(f"{file}: not a whole safetensors file ({' '.join(str(error).split())[:200]})") from error
