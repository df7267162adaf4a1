"""Ragged rows without padding: all their tokens lie one after the other, in one dimension.

Everything but attention treats tokens one by one, so it needs no rectangle; attention alone lays them out as one.

Shapes: P tokens of all rows, B rows, T positions of the longest, N numbers a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Which row each of P tokens belongs to, and where in its row it stands. Tokens may lie in any order.

    Attributes:
        row_P: the row of each token.
        offset_P: its place among the tokens of its row, from 0.
        slot_P: its place in the rectangle (B * T).
        length_B: tokens of each row.
        longest: T.
        is_grid: whether the tokens are that rectangle already, row by row.
    """

    row_P: Tensor
    offset_P: Tensor
    slot_P: Tensor
    length_B: Tensor
    longest: int
    is_grid: bool

    @classmethod
    def of(cls, *sections: Sequence[int]) -> Packing:
        """Rows that are read in sections: all rows' first section, row by row, then all rows' second, and so on.

        So the tokens that something is to be read from can be put last, where they are a slice.

        Args:
            sections: tokens of each row in each section.
        """
        lengths_SB = torch.tensor(sections, dtype=torch.long)
        rows_S = [torch.arange(lengths_SB.shape[1]).repeat_interleave(lengths_B) for lengths_B in lengths_SB]
        starts_SB = lengths_SB.cumsum(0) - lengths_SB
        offsets = [
            torch.arange(len(row)) + (start_B - lengths_B.cumsum(0) + lengths_B)[row]
            for row, start_B, lengths_B in zip(rows_S, starts_SB, lengths_SB, strict=True)
        ]
        row_P, offset_P, length_B = torch.cat(rows_S), torch.cat(offsets), lengths_SB.sum(0)
        longest = max(length_B.tolist(), default=0)
        return cls(row_P, offset_P, row_P * longest + offset_P, length_B, longest, is_grid=False)

    @classmethod
    def grid(cls, rows: int, length: int, device: torch.device | None = None) -> Packing:
        """Rows of equal length, token by token and row by row."""
        slot_P = torch.arange(rows * length, device=device)
        length_B = torch.full((rows,), length, device=device)
        return cls(slot_P // max(1, length), slot_P % max(1, length), slot_P, length_B, length, is_grid=True)

    def __len__(self) -> int:
        return len(self.row_P)

    @property
    def rows(self) -> int:
        return len(self.length_B)

    def pad(self, x_PN: Tensor) -> Tensor:
        """Tokens (P, ...) as a rectangle (B, T, ...), zeros where there is none."""
        if not self.is_grid:
            x_PN = x_PN.new_zeros(self.rows * self.longest, *x_PN.shape[1:]).index_copy(0, self.slot_P, x_PN)
        return x_PN.unflatten(0, (self.rows, self.longest))

    def unpad(self, x_BTN: Tensor) -> Tensor:
        """A rectangle (B, T, ...) as tokens (P, ...)."""
        x_SN = x_BTN.flatten(0, 1)
        return x_SN if self.is_grid else take(x_SN, self.slot_P)


def take(x_SN: Tensor, index_P: Tensor) -> Tensor:
    """The rows of `x_SN` at `index_P`, of which no two may be equal: its gradient is then a copy, not a sum."""
    return _Take.apply(x_SN, index_P)  # type: ignore[no-any-return]


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SN: Tensor, index_P: Tensor) -> Tensor:
        ctx.save_for_backward(index_P)
        ctx.rows = len(x_SN)
        return x_SN.index_select(0, index_P)

    @staticmethod
    def backward(ctx: Any, grad_PN: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (index_P,) = ctx.saved_tensors
        return grad_PN.new_zeros(ctx.rows, *grad_PN.shape[1:]).index_copy_(0, index_P, grad_PN), None
