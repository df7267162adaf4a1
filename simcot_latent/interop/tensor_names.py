"""Names of tensors, as the model has them: without what wrappers, savers and quantisers put around them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simcot_latent.errors import UserError, some

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
"""Parts of names that DDP and DeepSpeed, `torch.compile`, FSDP, activation checkpointing and Lightning Fabric add."""

STATE_KEYS = ("state_dict", "model_state_dict", "model", "module")
"""Under which of a file's keys trainers keep the model, beside their optimizer and the like."""

PACKED = (
    ".qweight",
    ".qzeros",
    ".absmax",
    ".quant_map",
    ".SCB",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
)
"""Endings of names that GPTQ, AWQ, bitsandbytes, compressed-tensors and float8 give to their tensors."""


def unwrapped(content: Any) -> Any:
    """The state dict in what a trainer saved: content itself, or what lies in it under one of `STATE_KEYS`."""
    while isinstance(content, dict):
        inner = next((content[key] for key in STATE_KEYS if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        content = inner
    return content


def plain_names(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Tensors by the names that they have in a model that nothing is wrapped around.

    Args:
        path: where they are from, for errors.

    Raises:
        UserError: they are quantised, or two different ones have the same name then.
    """
    packed = [name for name in tensors if name.endswith(PACKED) or ".quant_state." in name]
    packed += [name for name, x in tensors.items() if name.endswith(".weight") and not x.is_floating_point()]
    if packed:
        raise UserError(f"{path}: is quantised ({some(packed)}), which is not read; give the weights it was made from")
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if short in plain and not (plain[short].shape == tensor.shape and torch.equal(plain[short], tensor)):
            raise UserError(f"{path}: holds {short} twice, once as {name}, and they differ")
        plain[short] = tensor
    return plain
