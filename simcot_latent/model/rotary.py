"""Rotary positions (https://arxiv.org/abs/2104.09864), half-split layout.

Shapes: P tokens, X heads, E head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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
    def at(cls, position_P: Tensor, head_width: int, base: float) -> Rotary:
        """The angles position * base ** (-2i / E)."""
        exponent_E = torch.arange(0, head_width, 2, device=position_P.device, dtype=torch.float32) / head_width
        angle_P1E = (position_P.float().unsqueeze(-1) * base**-exponent_E).unsqueeze(1)
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
        return _turned(x_PXE, self.cos_P1E, -self.sin_P1E)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_PXE: Tensor, rotary: Rotary) -> Tensor:
        ctx.rotary = rotary
        return rotary.turn(x_PXE)

    @staticmethod
    def backward(ctx: Any, grad_PXE: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.rotary.turn_back(grad_PXE), None


def _turned(x_PXE: Tensor, cos_P1E: Tensor, sin_P1E: Tensor) -> Tensor:
    left, right = x_PXE.chunk(2, dim=-1)
    return torch.addcmul(x_PXE * cos_P1E, torch.cat((right, left), dim=-1), sin_P1E).to(x_PXE.dtype)
