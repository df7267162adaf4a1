"""Weights that PEFT has wrapped (https://github.com/huggingface/peft), by the model's own names, LoRA merged.

Shapes: I numbers in and O out of a linear layer, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from simcot_latent.errors import UserError
from simcot_latent.interop.families import Family

LORA_A, LORA_B = ".lora_A.default.weight", ".lora_B.default.weight"
PEFT = "base_model.model."


def without_peft(tensors: Mapping[str, Tensor], alpha: float, family: Family, source: str | Path) -> dict[str, Tensor]:
    """A model's weights by its own names; if PEFT has wrapped it, with LoRA merged: W + alpha / R * B A.

    Source: LoRA, https://arxiv.org/abs/2106.09685, section 4.1.

    Raises:
        UserError: factors do not fit each other or their weight.
    """

    def turned(weight: Tensor) -> Tensor:
        return weight.T if family.transposed else weight

    weights = {
        name.removeprefix(PEFT).replace(".base_layer.", ".").replace(".modules_to_save.default.", "."): tensor
        for name, tensor in tensors.items()
        if ".original_module." not in name
    }
    for name in [name for name in weights if name.endswith(LORA_A)]:
        layer = name.removesuffix(LORA_A)
        a_RI, b_OR, weight = weights.pop(name), weights.pop(layer + LORA_B, None), weights.get(f"{layer}.weight")
        if b_OR is None or weight is None or weight.dim() != 2 or a_RI.dim() != 2 or len(a_RI) == 0:
            raise UserError(f"source={source}: has {name}, but no lora_B or no matrix for them to change")
        R, (O, I) = len(a_RI), turned(weight).shape  # noqa: E741
        if (a_RI.shape, b_OR.shape) != ((R, I), (O, R)):
            raise UserError(
                f"source={source}: LoRA of {layer} does not fit: lora_A is {tuple(a_RI.shape)} and lora_B "
                f"{tuple(b_OR.shape)}; they must be (rank, {I}) and ({O}, rank)"
            )
        weights[f"{layer}.weight"] = turned(turned(weight).float() + alpha / R * b_OR.float() @ a_RI.float())
    return weights
