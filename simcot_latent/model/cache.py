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
from simcot_latent.model.rotary import Rotary


class KVCache:
    """Keys and values of everything that a batch of rows has read so far.

    Args:
        capacity: C, the sum over passes of what each one's longest row reads.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.longest = 0  # an upper bound that is known without asking the device
        self.length_B: Tensor | None = None
        self._layers: list[_Layer] = []
        # What links the passes of each layer for autograd; apart from the layers, which the graph refers to.
        self._links: list[Tensor] = []

    @property
    def is_empty(self) -> bool:
        return self.length_B is None

    def positions(self, packing: Packing) -> Tensor:
        """The positions (P,) of new tokens.

        Raises:
            ValueError: they are more than the cache has room for.
        """
        if self.longest + packing.longest > self.capacity:
            raise ValueError(f"a cache of {self.capacity} positions cannot hold {self.longest + packing.longest}")
        if self.length_B is None:
            return packing.offset_P
        return self.length_B[packing.row_P] + packing.offset_P

    def advance(self, packing: Packing) -> None:
        """Counts tokens that every layer has read."""
        self.length_B = packing.length_B if self.length_B is None else self.length_B + packing.length_B
        self.longest += packing.longest

    def slots(self, packing: Packing, position_P: Tensor, kv_heads: int) -> Tensor:
        """Where the keys, and the values, of new tokens lie in a layer's (B * G * C, E): (P * G,)."""
        head_G = torch.arange(kv_heads, device=position_P.device)
        slot_PG = (packing.row_P.unsqueeze(1) * kv_heads + head_G) * self.capacity + position_P.unsqueeze(1)
        return rearrange(slot_PG, "p g -> (p g)")

    def fill(self, k_PGE: Tensor, v_PGE: Tensor, rows: int, slot_N: Tensor) -> None:
        """Takes the next layer's keys and values of a first pass; columns beyond a row's length hold nothing.

        Args:
            rows: B.
            slot_N: see `slots`.
        """
        _, G, E = k_PGE.shape
        layer = _Layer(k_PGE.new_zeros(2, rows, G, self.capacity, E))
        self._layers.append(layer)
        self._links.append(_Fill.apply(k_PGE, v_PGE, layer, slot_N))  # type: ignore[arg-type]

    def attend(self, layer: int, qkv_PXE: Tensor, view: CacheView) -> Tensor:
        """Attention of a later pass (P, H * E): writes its keys and values, and its queries see all that they may.

        Going back, a pass only leaves behind what its queries did with the columns. Along a chain of links (tensors
        without numbers that only tell autograd the order) an earlier pass finds all later ones done, and takes the
        gradient of its own columns; that of the first pass, which has nearly all columns, is one product.

        Args:
            qkv_PXE: queries, keys and values, not rotated yet; X = H + 2G.
        """
        out_PD, self._links[layer] = _Attend.apply(  # type: ignore[misc]
            qkv_PXE, self._links[layer], self._layers[layer], view
        )
        return out_PD

    def keep(self, rows_N: Tensor) -> None:
        """Keeps only the rows with these indices (N,), in their order. For generation: gradients end here."""
        assert self.length_B is not None
        self.length_B = self.length_B[rows_N]
        self._layers = [_Layer(layer.kv[:, rows_N]) for layer in self._layers]
        self._links = [layer.new_link() for layer in self._layers]


class _Layer:
    """One layer's keys and values (2, B, G, C, E), and views of them; what passes going back have left behind."""

    def __init__(self, kv: Tensor) -> None:
        self.kv = kv
        self.k, self.v = (rearrange(half, "b g c e -> (b g) c e") for half in kv)
        self.k_rows, self.v_rows = (rearrange(half, "b g c e -> (b g c) e") for half in kv)
        self.queries = 0  # R * T of all later passes so far
        self.left: _LeftBehind | None = None

    def new_link(self) -> Tensor:
        return self.kv.new_empty(0)


class _LeftBehind:
    """What the queries of later passes, S = R * T of them all, did with keys and values.

    Attributes:
        scores: gradients of their scores, scaled, and their weights: (2, B * G, S, C).
        others: the queries themselves, and the gradients of what they saw: (2, B * G, S, E). The gradient of column c's
            key and value is the product of `scores[..., c]` and this.
        begin: the queries before this one are still to come.
    """

    def __init__(self, kv: Tensor, queries: int) -> None:
        _, B, G, C, E = kv.shape
        self.scores, self.others = kv.new_empty(2, B * G, queries, C), kv.new_empty(2, B * G, queries, E)
        self.begin = queries

    def next(self, queries: int) -> tuple[Tensor, Tensor]:
        """Where an earlier pass is to leave its `scores` and `others`."""
        self.begin, end = self.begin - queries, self.begin
        return self.scores[:, :, self.begin : end], self.others[:, :, self.begin : end]

    def grad_all_columns(self) -> Tensor:
        """Gradients of keys and values at all columns, (2, B * G, C, E)."""
        scores, others = self._so_far()
        return torch.bmm(scores.transpose(1, 2), others).unflatten(0, (2, -1))

    def grad_columns(self, column: Tensor) -> Tensor:
        """The same at T columns of each row and head, (2 * B * G, 1, T): (2, B * G, T, E)."""
        scores, others = self._so_far()
        scores = scores.gather(2, column.expand(-1, scores.shape[1], -1))
        return torch.bmm(scores.transpose(1, 2), others).unflatten(0, (2, -1))

    def _so_far(self) -> tuple[Tensor, Tensor]:
        return self.scores[:, :, self.begin :].flatten(0, 1), self.others[:, :, self.begin :].flatten(0, 1)


class CacheView:
    """Where a later pass writes and what it sees: worked out once for all layers.

    Args:
        cache: not empty.
        packing: the new tokens.
        position_P: their positions.
        rotary: their angles; None: no rotation.
        heads: H and G.
    """

    def __init__(
        self,
        cache: KVCache,
        packing: Packing,
        position_P: Tensor,
        rotary: Rotary | None,
        heads: tuple[int, int],
    ) -> None:
        self.packing, self.rotary, self.heads = packing, rotary, heads
        self.sizes = {"b": packing.rows, "t": packing.longest, "r": heads[0] // heads[1]}  # none is told by a size of 0
        (H, G), C, device = heads, cache.capacity, position_P.device
        # Columns that nobody has reached yet are left out; in training the whole buffer is used, whose gradient
        # products want it contiguous.
        self.end = C if torch.is_grad_enabled() else cache.longest + packing.longest
        self.slot_N = cache.slots(packing, position_P, G)
        position_BT = packing.pad(position_P)
        self.column = repeat(position_BT, "b t -> (half b g) 1 t", half=2, g=G)
        hidden_BTC = torch.arange(self.end, device=device) > position_BT.unsqueeze(2)
        bias_BTC = torch.zeros(hidden_BTC.shape, device=device).masked_fill_(hidden_BTC, -math.inf)
        self.bias = repeat(bias_BTC, "b t c -> (b g) (r t) c", g=G, r=H // G)


class _Fill(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k_PGE: Tensor, v_PGE: Tensor, layer: _Layer, slot_N: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.layer, ctx.slot_N = layer, slot_N
        layer.k_rows.index_copy_(0, slot_N, k_PGE.flatten(0, 1))
        layer.v_rows.index_copy_(0, slot_N, v_PGE.flatten(0, 1))
        return layer.new_link()

    @staticmethod
    def backward(ctx: Any, link: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if link is None:  # no later pass counts
            return None, None, None, None
        layer = ctx.layer
        grads, layer.left = layer.left.grad_all_columns().flatten(1, 2), None
        grad_k_PGE, grad_v_PGE = (x.index_select(0, ctx.slot_N).unflatten(0, (-1, layer.kv.shape[2])) for x in grads)
        return grad_k_PGE, grad_v_PGE, None, None


class _Attend(torch.autograd.Function):
    """softmax(q k^T / sqrt(E) + bias) v over a cache that is written in place (https://arxiv.org/abs/1706.03762)."""

    @staticmethod
    def forward(ctx: Any, qkv_PXE: Tensor, link: Tensor, layer: _Layer, view: CacheView) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        H, G = view.heads
        qk_PXE, v_PGE = qkv_PXE[:, : H + G], qkv_PXE[:, H + G :]
        if view.rotary is not None:
            qk_PXE = view.rotary.turn(qk_PXE)
        layer.k_rows.index_copy_(0, view.slot_N, qk_PXE[:, H:].flatten(0, 1))
        layer.v_rows.index_copy_(0, view.slot_N, v_PGE.flatten(0, 1))
        # Query heads beside the key/value head that they share.
        q = rearrange(view.packing.pad(qk_PXE[:, :H]), "b t (g r) e -> (b g) (r t) e", g=G, **view.sizes)
        k, v, scale = layer.k[:, : view.end], layer.v[:, : view.end], q.shape[-1] ** -0.5
        scores = torch.baddbmm(view.bias.to(q.dtype), q, k.transpose(1, 2), alpha=scale)
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        out_BTD = rearrange(torch.bmm(weights, v), "(b g) (r t) e -> b t (g r e)", g=G, **view.sizes)
        ctx.save_for_backward(q, weights)
        layer.queries += q.shape[1]
        ctx.layer, ctx.view, ctx.scale, ctx.queries = layer, view, scale, layer.queries
        return view.packing.unpad(out_BTD), layer.new_link()

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_PD: Tensor | None, link: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        layer, view = ctx.layer, ctx.view
        if link is None:
            if grad_PD is None:
                return None, None, None, None
            layer.left = _LeftBehind(layer.kv, ctx.queries)  # the last pass that counts
        (H, G), E = view.heads, layer.kv.shape[-1]
        q, weights = ctx.saved_tensors
        scores, others = layer.left.next(q.shape[1])
        if grad_PD is None:  # nothing came of these queries, only of the keys beside them
            scores.zero_()
            others.zero_()
            grad_q_PHE = q.new_zeros(len(view.packing), H, E)
        else:
            grad_out = rearrange(view.packing.pad(grad_PD), "b t (g r e) -> (b g) (r t) e", g=G, e=E, **view.sizes)
            grad_weights = torch.bmm(grad_out, layer.v.transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            torch.mul(grad_scores, ctx.scale, out=scores[0])
            scores[1].copy_(weights)
            others[0].copy_(q)
            others[1].copy_(grad_out)
            grad_q = rearrange(torch.bmm(scores[0], layer.k), "(b g) (r t) e -> b t (g r) e", g=G, **view.sizes)
            grad_q_PHE = view.packing.unpad(grad_q)
        grad_kv = rearrange(layer.left.grad_columns(view.column), "half (b g) t e -> b t half g e", g=G)
        grad_k_PGE, grad_v_PGE = view.packing.unpad(grad_kv).unbind(1)
        grad_PXE = torch.cat((grad_q_PHE, grad_k_PGE, grad_v_PGE), dim=1)
        if view.rotary is not None:
            grad_PXE[:, : H + G] = view.rotary.turn_back(grad_PXE[:, : H + G])
        return grad_PXE, layer.new_link(), None, None
