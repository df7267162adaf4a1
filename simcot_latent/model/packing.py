"""Ragged rows without padding: all their tokens lie one after the other, in one dimension.

Everything but attention treats tokens one by one, so it needs no rectangle; attention alone lays rows out as
rectangles, of rows of similar length where it can.

Shapes: P tokens of all rows, B rows, T positions of the longest, S slots of all rectangles, N numbers a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# One more rectangle is one more call of attention: it must save this share of the tokens in padding.
WORTH_A_RECTANGLE = 1 / 16


@dataclass(frozen=True)
class Packing:
    """Which row each of P tokens belongs to, and where in its row it stands. Tokens may lie in any order.

    Attributes:
        row_P: the row of each token.
        offset_P: its place among the tokens of its row, from 0.
        slot_P: its place in the rectangles, the slots of one after those of the other.
        length_B: tokens of each row.
        longest: T.
        rectangles: rows and positions of each.
        is_grid: whether the tokens are one rectangle already, row by row.
    """

    row_P: Tensor
    offset_P: Tensor
    slot_P: Tensor
    length_B: Tensor
    longest: int
    rectangles: tuple[tuple[int, int], ...]
    is_grid: bool

    @classmethod
    def of(cls, *sections: Sequence[int], tight: bool = False) -> Packing:
        """Rows that are read in sections: all rows' first section, row by row, then all rows' second, and so on.

        So the tokens that something is to be read from can be put last, where they are a slice.

        Args:
            sections: tokens of each row in each section.
            tight: lay rows out as several rectangles where that saves padding, not all of them as one, in their order.
                Not for a pass that sees what a cache holds.
        """
        lengths_SB = torch.tensor(sections, dtype=torch.long)
        rows_S = [torch.arange(lengths_SB.shape[1]).repeat_interleave(lengths_B) for lengths_B in lengths_SB]
        starts_SB = lengths_SB.cumsum(0) - lengths_SB
        offsets = [
            torch.arange(len(row)) + (start_B - lengths_B.cumsum(0) + lengths_B)[row]
            for row, start_B, lengths_B in zip(rows_S, starts_SB, lengths_SB, strict=True)
        ]
        row_P, offset_P, length_B = torch.cat(rows_S), torch.cat(offsets), lengths_SB.sum(0)
        lengths = length_B.tolist()
        longest = max(lengths, default=0)
        order, rectangles = range(len(lengths)), ((len(lengths), longest),)
        if tight and longest > 0:
            order = sorted(order, key=lambda row: lengths[row], reverse=True)
            rectangles = tight_rectangles([lengths[row] for row in order])
        width_B = torch.tensor([width for rows, width in rectangles for _ in range(rows)], dtype=torch.long)
        first_slot_B = torch.empty_like(width_B)
        first_slot_B[list(order)] = width_B.cumsum(0) - width_B
        slot_P = first_slot_B[row_P] + offset_P
        return cls(row_P, offset_P, slot_P, length_B, longest, rectangles, is_grid=False)

    @classmethod
    def grid(cls, rows: int, length: int, device: torch.device | None = None) -> Packing:
        """Rows of equal length, token by token and row by row."""
        slot_P = torch.arange(rows * length, device=device)
        length_B = torch.full((rows,), length, device=device)
        row_P, offset_P = slot_P // max(1, length), slot_P % max(1, length)
        return cls(row_P, offset_P, slot_P, length_B, length, ((rows, length),), is_grid=True)

    def to(self, device: torch.device) -> Packing:
        """The same on another device."""
        tensors = {name: getattr(self, name) for name in ("row_P", "offset_P", "slot_P", "length_B")}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})

    def __len__(self) -> int:
        return len(self.row_P)

    @property
    def rows(self) -> int:
        return len(self.length_B)

    @property
    def slots(self) -> int:
        """S, tokens and padding."""
        return sum(rows * width for rows, width in self.rectangles)

    def lay_out(self, x_PN: Tensor) -> list[Tensor]:
        """Tokens (P, ...) as rectangles, zeros where there is none."""
        if not self.is_grid:
            x_PN = x_PN.new_zeros(self.slots, *x_PN.shape[1:]).index_copy(0, self.slot_P, x_PN)
        parts = x_PN.split([rows * width for rows, width in self.rectangles]) if len(self.rectangles) > 1 else [x_PN]
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.rectangles, strict=True)]

    def pad(self, x_PN: Tensor) -> Tensor:
        """Tokens (P, ...) as the only rectangle (B, T, ...)."""
        (x_BTN,) = self.lay_out(x_PN)
        return x_BTN

    def unpad(self, *rectangles: Tensor) -> Tensor:
        """Rectangles as tokens (P, ...)."""
        flat = [x_BTN.flatten(0, 1) for x_BTN in rectangles]
        x_SN = flat[0] if len(flat) == 1 else torch.cat(flat)
        return x_SN if self.is_grid else take(x_SN, self.slot_P)


def tight_rectangles(lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Rows and width of each rectangle, for rows (at least one) that come longest first.

    Of all ways to cut them, the one of least slots, where each rectangle counts for `WORTH_A_RECTANGLE` of the tokens.
    """
    price, rows = WORTH_A_RECTANGLE * sum(lengths), len(lengths)
    cuts = [i for i in range(rows) if i == 0 or lengths[i] != lengths[i - 1]] + [rows]
    least = {rows: (0.0, rows)}  # from a row on: slots and prices, and where the next cut is
    for n, begin in reversed(list(enumerate(cuts[:-1]))):
        least[begin] = min((least[end][0] + (end - begin) * lengths[begin] + price, end) for end in cuts[n + 1 :])
    rectangles, begin = [], 0
    while begin < rows:
        end = least[begin][1]
        rectangles.append((end - begin, lengths[begin]))
        begin = end
    return tuple(rectangles)


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
