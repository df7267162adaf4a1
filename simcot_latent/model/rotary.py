"""Rotary positions (https://arxiv.org/abs/2104.09864), half-split layout.

Shapes: P tokens, X heads, E head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simcot_latent.errors import require


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of slow rotations to a longer context (rope_type "llama3" of Hugging Face's configs).

    Frequencies whose wave is longer than `original_context / low_freq_factor` positions are divided by `factor`, those
    shorter than `original_context / high_freq_factor` stay, and those between go over smoothly.
    Source: `apply_scaling` in https://github.com/meta-llama/llama-models (models/llama3/model.py).
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int

    def __post_init__(self) -> None:
        require(self.factor > 0, "rope_scaling.factor", self.factor, "above 0")
        require(self.original_context >= 1, "rope_scaling.original_context", self.original_context, "at least 1")
        low, high = self.low_freq_factor, self.high_freq_factor
        require(low < high, "rope_scaling.low_freq_factor", low, f"below high_freq_factor={high}")

    def __call__(self, frequency_E: Tensor) -> Tensor:
        """Scaled frequencies, radians a position."""
        waves_E = self.original_context * frequency_E / (2 * math.pi)  # how many fit into the original context
        kept_E = (waves_E - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return torch.lerp(frequency_E / self.factor, frequency_E, kept_E.clamp(0, 1))


@dataclass(frozen=True)
class Rotary:
    """The angles of P positions.

    Attributes:
        cos_P1E, sin_P1E: cosine and sine (equation 34); the sine of the left half is negated, which is all the sign
            that a rotation needs.
    """

    cos_P1E: Tensor
    sin_P1E: Tensor

    @classmethod
    def at(cls, position_P: Tensor, head_width: int, base: float, scaling: RopeScaling | None = None) -> Rotary:
        """The angles position * base ** (-2i / E), frequencies scaled where there is a `scaling`."""
        exponent_E = torch.arange(0, head_width, 2, device=position_P.device, dtype=torch.float32) / head_width
        frequency_E = base**-exponent_E
        if scaling is not None:
            frequency_E = scaling(frequency_E)
        angle_P1E = (position_P.float().unsqueeze(-1) * frequency_E).unsqueeze(1)
        cos_P1E, sin_P1E = angle_P1E.cos(), angle_P1E.sin()
        return cls(torch.cat((cos_P1E, cos_P1E), dim=-1), torch.cat((-sin_P1E, sin_P1E), dim=-1))

    def __call__(self, x_PXE: Tensor) -> Tensor:
        """Rotates queries or keys, differentiably."""
        return _Rotate.apply(x_PXE, self)  # type: ignore[no-any-return]

    def turn(self, x_PXE: Tensor) -> Tensor:
        """The same, for use where autograd does not look."""
        return _turned(x_PXE, self.cos_P1E, self.sin_P1E)

    def turn_back(self, x_PXE: Tensor) -> Tensor:
        """The rotation by the negative angles: the gradient of `turn`."""
        return _turned(x_PXE, self.cos_P1E, self.sin_P1E, sign=-1)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_PXE: Tensor, rotary: Rotary) -> Tensor:
        ctx.rotary = rotary
        return rotary.turn(x_PXE)

    @staticmethod
    def backward(ctx: Any, grad_PXE: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.rotary.turn_back(grad_PXE), None


def _turned(x_PXE: Tensor, cos_P1E: Tensor, sin_P1E: Tensor, sign: int = 1) -> Tensor:
    left, right = x_PXE.chunk(2, dim=-1)
    return torch.addcmul(x_PXE * cos_P1E, torch.cat((right, left), dim=-1), sin_P1E, value=sign).to(x_PXE.dtype)
