"""Key/value cache of one pass after another over the same rows, in training and in generation.

A row's keys and values lie in the columns of their positions, without gaps: whatever the lengths of the rows, column c
holds position c, so who may see what is `column <= position`. Every pass writes its own columns in place and copies
nothing of what is there; autograd follows (see `KVCache.attend`).

Shapes: B rows, P new tokens, T new tokens of the longest row, C columns, H query heads, G key/value heads, R = H / G
query heads a key/value head, E head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor

from simcot_latent.model.packing import Packing


class KVCache:
    """Keys and values of everything that a batch of rows has read so far.

    Args:
        capacity: C, the positions that the longest row may come to.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.longest = 0  # an upper bound that is known without asking the device
        self.length_B: Tensor | None = None
        self._kv: list[Tensor] = []  # (2, B, G, C, E) a layer
        self._tokens: list[Tensor] = []  # what links the passes of a layer for autograd

    @property
    def is_empty(self) -> bool:
        return self.length_B is None

    def positions(self, packing: Packing) -> Tensor:
        """The positions (P,) of new tokens."""
        if self.length_B is None:
            return packing.offset_P
        return self.length_B[packing.row_P] + packing.offset_P

    def advance(self, packing: Packing) -> None:
        """Counts tokens that every layer has read."""
        self.length_B = packing.length_B if self.length_B is None else self.length_B + packing.length_B
        self.longest += packing.longest

    def fill(self, layer: int, k_BGTE: Tensor, v_BGTE: Tensor) -> None:
        """Takes the keys and values of a first pass; columns beyond a row's length hold nothing of meaning."""
        B, G, _, E = k_BGTE.shape
        kv = k_BGTE.new_zeros(2, B, G, self.capacity, E)
        self._kv.append(kv)
        self._tokens.append(_Fill.apply(k_BGTE, v_BGTE, kv))  # type: ignore[arg-type]
        assert len(self._kv) == layer + 1

    def attend(self, layer: int, q_BHTE: Tensor, k_PGE: Tensor, v_PGE: Tensor, view: CacheView) -> Tensor:
        """Writes a later pass's keys and values and lets its queries see all that they may; (B, H, T, E).

        The gradient of the cache is one buffer a layer. It is handed from the last pass back to the first along a
        chain of tokens (tensors without storage that only tell autograd the order); each pass adds to it what its
        queries saw, and takes out the gradient of its own columns, which is complete by then.
        """
        out_BHTE, self._tokens[layer] = _Attend.apply(q_BHTE, k_PGE, v_PGE, self._tokens[layer], self._kv[layer], view)  # type: ignore[misc]
        return out_BHTE

    def keep(self, rows_N: Tensor) -> None:
        """Keeps only the rows with these indices (N,), in their order. For generation: gradients end here."""
        assert self.length_B is not None
        self.length_B = self.length_B[rows_N]
        self._kv = [kv[:, rows_N] for kv in self._kv]


class CacheView:
    """Where a later pass writes and what it sees: worked out once for all layers.

    Args:
        cache: not empty.
        packing: the new tokens.
        position_P: their positions.
        heads: G.
    """

    def __init__(self, cache: KVCache, packing: Packing, position_P: Tensor, heads: int, repeats: int) -> None:
        C, G, device = cache.capacity, heads, position_P.device
        end = cache.longest + packing.longest
        if end > C:
            raise ValueError(f"a cache of {C} positions cannot hold {end}")
        # Columns that nobody has reached yet are left out; in training the whole buffer is used, whose gradient
        # products want it contiguous.
        self.end = C if torch.is_grad_enabled() else end
        head_G = torch.arange(G, device=device)
        self.slot_N = rearrange((packing.row_P.unsqueeze(1) * G + head_G) * C + position_P.unsqueeze(1), "p g -> (p g)")
        position_BT = packing.pad(position_P)
        hidden_BTC = torch.arange(self.end, device=device) > position_BT.unsqueeze(2)
        bias_BTC = torch.zeros(hidden_BTC.shape, device=device).masked_fill_(hidden_BTC, -math.inf)
        self.bias = repeat(bias_BTC, "b t c -> (b g) (r t) c", g=G, r=repeats)


class _Fill(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k_BGTE: Tensor, v_BGTE: Tensor, kv: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.length = T = k_BGTE.shape[2]
        kv[0, :, :, :T], kv[1, :, :, :T] = k_BGTE, v_BGTE
        return kv.new_empty(1).expand(kv.shape)

    @staticmethod
    def backward(ctx: Any, grad_kv: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        if grad_kv is None:
            return None, None, None
        return grad_kv[0, :, :, : ctx.length], grad_kv[1, :, :, : ctx.length], None


class _Attend(torch.autograd.Function):
    """softmax(q k^T / sqrt(E) + bias) v over a cache that is written in place (https://arxiv.org/abs/1706.03762)."""

    @staticmethod
    def forward(
        ctx: Any, q_BHTE: Tensor, k_PGE: Tensor, v_PGE: Tensor, token: Tensor, kv: Tensor, view: CacheView
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        half = kv[0].numel()
        flat = kv.view(-1, kv.shape[-1])
        rows = half // kv.shape[-1]
        flat[:rows].index_copy_(0, view.slot_N, k_PGE.flatten(0, 1))
        flat[rows:].index_copy_(0, view.slot_N, v_PGE.flatten(0, 1))
        q, k, v, scale = _grouped(q_BHTE, kv), *_columns(kv, view.end), q_BHTE.shape[-1] ** -0.5
        weights = torch.baddbmm(view.bias, q, k.transpose(1, 2), alpha=scale).softmax(-1)
        ctx.save_for_backward(q, weights)
        ctx.kv, ctx.slot_N, ctx.shape, ctx.scale = kv, view.slot_N, q_BHTE.shape, scale
        return _ungrouped(torch.bmm(weights, v), q_BHTE.shape), kv.new_empty(1).expand(kv.shape)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_BHTE: Tensor | None, grad_kv: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        kv, scale = ctx.kv, ctx.scale
        if grad_kv is None:
            grad_kv = torch.zeros_like(kv)
        grad_q_BHTE = None
        if grad_BHTE is not None:  # None: nothing came of these queries, only of the keys beside them
            q, weights = ctx.saved_tensors
            k, v = _columns(kv, kv.shape[3])
            grad_k, grad_v = _columns(grad_kv, kv.shape[3])
            grad_out = _grouped(grad_BHTE, kv)
            grad_v.baddbmm_(weights.transpose(1, 2), grad_out)
            grad_weights = torch.bmm(grad_out, v.transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_k.baddbmm_(grad_scores.transpose(1, 2), q, alpha=scale)
            grad_q_BHTE = _ungrouped(torch.bmm(grad_scores, k).mul_(scale), ctx.shape)
        new = [part.view(-1, kv.shape[-1]).index_select(0, ctx.slot_N) for part in grad_kv.unbind(0)]
        grad_k_PGE, grad_v_PGE = (rearrange(x, "(p g) e -> p g e", g=kv.shape[2]) for x in new)
        return grad_q_BHTE, grad_k_PGE, grad_v_PGE, grad_kv, None, None


def _columns(kv: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """The first columns of keys and of values, (B * G, end, E) each, without a copy."""
    return tuple(part.flatten(0, 1)[:, :end] for part in kv.unbind(0))  # type: ignore[return-value]


def _grouped(x_BHTE: Tensor, kv: Tensor) -> Tensor:
    """Query heads beside the key/value head that they share, (B * G, R * T, E)."""
    return rearrange(x_BHTE, "b (g r) t e -> (b g) (r t) e", g=kv.shape[2])


def _ungrouped(x: Tensor, shape: torch.Size) -> Tensor:
    return rearrange(x, "(b g) (r t) e -> b (g r) t e", b=shape[0], t=shape[2])
