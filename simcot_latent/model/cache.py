"""Key/value cache of one pass after another over the same rows, in training and in generation.

A row's keys and values lie in its columns in the order in which they were read, without gaps: the column of a token is
its position, and what it sees is its own column and those before it. Every pass writes its own columns in place and
copies nothing of what is there; autograd follows (see `KVCache.attend`).

What was read last can be read again as something else. Jacobi iterations (https://arxiv.org/abs/2506.18582) do:

    hidden_PD = model.transformer(thoughts_PD, packing, cache)
    for _ in range(iterations):
        cache.rewind(packing)
        thoughts_PD = ...
        hidden_PD = model.transformer(thoughts_PD, packing, cache)

Shapes: B rows, P new tokens, T new tokens of the longest row, C columns, H query heads, G key/value heads, R = H / G
query heads a key/value head, E head width, S rows of a static cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from simcot_latent.model.packing import Packing
from simcot_latent.model.rotary import Rotary


class KVCache:
    """Keys and values of everything that a batch of rows has read so far.

    Args:
        capacity: C, the sum over passes of what each one's longest row reads, but for passes that read again.

    Attributes:
        length_B: tokens that each row has read, which is the columns that it has filled.
        rewound: whether the next pass writes over columns that are filled.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.longest = 0  # an upper bound that is known without asking the device
        self.length_B: Tensor | None = None
        self.rewound = False
        self._layers: list[_Layer] = []
        # What links the passes of each layer for autograd; apart from the layers, which the graph refers to.
        self._links: list[Tensor] = []

    @property
    def is_empty(self) -> bool:
        return self.length_B is None

    def place(self, packing: Packing) -> Tensor:
        """The columns (P,) that new tokens go into.

        Raises:
            ValueError: they are more than the cache has room for.
        """
        if self.longest + packing.longest > self.capacity:
            raise ValueError(f"a cache of {self.capacity} positions cannot hold {self.longest + packing.longest}")
        return packing.offset_P if self.length_B is None else self.length_B[packing.row_P] + packing.offset_P

    def advance(self, packing: Packing) -> None:
        """Counts tokens that every layer has read."""
        self.length_B = packing.length_B if self.length_B is None else self.length_B + packing.length_B
        self.longest += packing.longest
        self.rewound = False

    def rewind(self, packing: Packing) -> None:
        """Goes back before the last tokens of each row, whose columns the next pass writes again.

        Args:
            packing: how many tokens of each row these are; the next pass must be one of the same.
        """
        assert self.length_B is not None, "nothing was read"
        self.length_B = self.length_B - packing.length_B
        self.longest -= packing.longest
        self.rewound = True

    def slots(self, packing: Packing, column_P: Tensor, kv_heads: int) -> Tensor:
        """Where the keys, and the values, of new tokens lie in a layer's (B * G * C, E): (P * G,)."""
        head_G = torch.arange(kv_heads, device=column_P.device)
        slot_PG = (packing.row_P.unsqueeze(1) * kv_heads + head_G) * self.capacity + column_P.unsqueeze(1)
        return rearrange(slot_PG, "p g -> (p g)")

    def fill(self, k_PGE: Tensor, v_PGE: Tensor, rows: int, slot_N: Tensor) -> None:
        """Takes the next layer's keys and values of a first pass; columns beyond a row's length hold nothing.

        Args:
            rows: B.
            slot_N: see `slots`.
        """
        _, G, E = k_PGE.shape
        layer = self._new_layer(k_PGE.new_zeros, (rows, G, self.capacity, E))
        self._links.append(_Fill.apply(k_PGE, v_PGE, layer, slot_N))  # type: ignore[arg-type]

    def _new_layer(self, zeros: Callable[..., Tensor], shape: tuple[int, ...]) -> _Layer:
        """Where the next layer's keys and values go."""
        layer = _Layer(zeros(2, *shape))
        self._layers.append(layer)
        return layer

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


class StaticCache(KVCache):
    """A cache whose memory and shapes stay the same, batch after batch, so that a pass can be replayed.

    A pass of a token per row, that is. On a GPU all its kernels are captured once as a CUDA graph
    (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs) and started by one call from then on: what a pass
    over few tokens spends its time on otherwise is the starting of kernels. Elsewhere the pass is simply run, in the
    same shapes. For generation alone: there are no gradients.

    Args:
        rows: S, at least as many as any batch has. A batch of fewer leaves the last ones unused.
        capacity: C.
        context_length: positions of the model. Rows that have stopped are read on with the others, without effect, and
            stay at the last position.
    """

    def __init__(self, rows: int, capacity: int, context_length: int) -> None:
        super().__init__(capacity)
        self.rows, self.context_length = rows, context_length
        self.replays = True
        """Whether passes of a token per row are replayed; a model with hooks has it off, for a graph runs no Python."""
        self._length_S: Tensor | None = None
        self._x_SD: Tensor | None = None
        self._hidden_SD: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._filled = 0
        self._running = False

    def begin(self) -> None:
        """Forgets what was read, to be used for another batch."""
        self.length_B, self.longest, self.rewound, self._filled, self._links = None, 0, False, 0, []

    def place(self, packing: Packing) -> Tensor:
        return super().place(packing).clamp(max=min(self.capacity, self.context_length) - 1)

    # What a replayed pass reads and writes stays where it is.

    def advance(self, packing: Packing) -> None:
        if self._length_S is None:
            self._length_S = packing.length_B.new_zeros(self.rows)
        if self.length_B is None:
            self._length_S.zero_()
        self._length_S[: packing.rows] += packing.length_B
        self.length_B = self._length_S
        self.longest += packing.longest
        self.rewound = False

    def rewind(self, packing: Packing) -> None:
        assert self._length_S is not None, "nothing was read"
        self._length_S[: packing.rows] -= packing.length_B
        self.longest -= packing.longest
        self.rewound = True

    def _new_layer(self, zeros: Callable[..., Tensor], shape: tuple[int, ...]) -> _Layer:
        if self._filled == len(self._layers):
            self._layers.append(_Layer(zeros(2, self.rows, *shape[1:])))
        self._filled += 1
        return self._layers[self._filled - 1]

    def keep(self, rows_N: Tensor) -> None:
        raise NotImplementedError("a static cache keeps all its rows")

    def can_replay(self, packing: Packing) -> bool:
        """Whether a pass is one that `replay` runs: a token of every row, after the first pass, without gradients."""
        one_each = packing.is_grid and packing.longest == 1 and self.replays
        return one_each and not (self._running or self.is_empty or torch.is_grad_enabled())

    def replay(self, run: Callable[[Tensor, Packing], Tensor], x_BD: Tensor) -> Tensor:
        """The hidden states (B, D) of a pass over one token per row.

        Args:
            run: the pass itself, over (S, D) and how they lie; called again only where there is no graph of it.
            x_BD: input embeddings.

        Raises:
            ValueError: the cache is full.
        """
        if self.longest + 1 > self.capacity:
            raise ValueError(f"a cache of {self.capacity} positions cannot hold {self.longest + 1}")
        if self._x_SD is None:
            self._x_SD = x_BD.new_zeros(self.rows, x_BD.shape[1])
        self._x_SD[: len(x_BD)] = x_BD
        if x_BD.is_cuda:
            if self._graph is None:
                self._graph = self._capture(run)
            self._graph.replay()
        else:  # into the same memory every time, as a graph does
            hidden_SD = self._run(run)
            self._hidden_SD = hidden_SD if self._hidden_SD is None else self._hidden_SD.copy_(hidden_SD)
        self.longest += 1
        assert self._hidden_SD is not None
        return self._hidden_SD[: len(x_BD)].clone()

    def _run(self, run: Callable[[Tensor, Packing], Tensor]) -> Tensor:
        assert self._x_SD is not None
        longest, self._running = self.longest, True
        try:
            return run(self._x_SD, Packing.grid(self.rows, 1, self._x_SD.device))
        finally:
            self.longest, self._running = longest, False

    def _capture(self, run: Callable[[Tensor, Packing], Tensor]) -> torch.cuda.CUDAGraph:
        assert self._length_S is not None
        before_S = self._length_S.clone()
        # Libraries allocate at their first calls, which a graph must not see; what these passes write is overwritten.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._run(run)
                self._length_S.copy_(before_S)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # What autocast keeps of a weight it would keep inside the graph, where others must not look.
        uncached = torch.autocast(
            "cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"), cache_enabled=False
        )
        with uncached, torch.cuda.graph(graph):
            self._hidden_SD = self._run(run)
        return graph


class StaticCaches:
    """Static caches by the size of a batch, each with its graph: what `cuda_graphs=true` of the evals keeps.

    Rows are rounded up to a power of two and columns to a multiple of 64, so that few are needed. The least recently
    used one beyond `most` is dropped. They hold for one model with its present weights, in one number format.
    """

    def __init__(self, context_length: int, most: int = 4) -> None:
        self.context_length, self.most = context_length, most
        self._caches: dict[tuple[int, int], StaticCache] = {}

    def take(self, rows: int, capacity: int) -> StaticCache:
        """An empty cache for a batch of `rows`, with room for `capacity` positions."""
        size = (1 << max(0, rows - 1).bit_length(), -(-capacity // 64) * 64)
        cache = self._caches.pop(size, None) or StaticCache(*size, self.context_length)
        self._caches[size] = cache  # now the newest
        if len(self._caches) > self.most:
            del self._caches[next(iter(self._caches))]
        cache.begin()
        return cache


def make_cache(rows: int, capacity: int, caches: StaticCaches | None) -> KVCache:
    """A cache with room for `capacity` positions: one of `caches`, or where there are none a new one."""
    return KVCache(capacity) if caches is None else caches.take(rows, capacity)


class _Layer:
    """One layer's keys and values (2, B, G, C, E), and views of them; what passes going back have left behind."""

    def __init__(self, kv: Tensor) -> None:
        self.kv = kv
        self.k, self.v = (rearrange(half, "b g c e -> (b g) c e") for half in kv)
        self.k_rows, self.v_rows = (rearrange(half, "b g c e -> (b g c) e") for half in kv)
        self.queries = 0  # R * T of all later passes so far
        self.left: _LeftBehind | None = None
        # What was written over, for the way back: the slots, and what they held, of which `time` writes are done.
        self.overwritten: list[tuple[Tensor, Tensor, Tensor]] = []
        self.time = 0

    def write(self, k_NE: Tensor, v_NE: Tensor, slot_N: Tensor, keeps: bool) -> None:
        """Writes keys and values.

        Args:
            keeps: whether what the slots held will be needed again.
        """
        if keeps:
            self.overwritten.append((slot_N, self.k_rows[slot_N], self.v_rows[slot_N]))
            self.time += 1
        self.k_rows.index_copy_(0, slot_N, k_NE)
        self.v_rows.index_copy_(0, slot_N, v_NE)

    def go_to(self, time: int) -> None:
        """Makes keys and values what they were when so many writes over others were done."""
        while self.time != time:
            number = self.time - (time < self.time)
            slot_N, k_NE, v_NE = self.overwritten[number]
            self.overwritten[number] = slot_N, self.k_rows[slot_N], self.v_rows[slot_N]
            self.k_rows.index_copy_(0, slot_N, k_NE)
            self.v_rows.index_copy_(0, slot_N, v_NE)
            self.time += 1 if time > self.time else -1

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

    def clear(self, slot_N: Tensor) -> None:
        """Takes slots out of what earlier passes find: before this one they held other keys and values."""
        _, heads, _, C = self.scores.shape
        stays = self.scores.new_ones(heads * C).index_fill_(0, slot_N, 0).view(heads, 1, C)
        self.scores[:, :, self.begin :] *= stays

    def _so_far(self) -> tuple[Tensor, Tensor]:
        return self.scores[:, :, self.begin :].flatten(0, 1), self.others[:, :, self.begin :].flatten(0, 1)


class CacheView:
    """Where a later pass writes and what it sees: worked out once for all layers.

    Args:
        cache: not empty.
        packing: the new tokens.
        column_P: the columns that they go into.
        rotary: their angles; None: no rotation.
        heads: H and G.
        fused: whether a fused kernel attends, rather than products and a softmax of our own.
    """

    def __init__(
        self,
        cache: KVCache,
        packing: Packing,
        column_P: Tensor,
        rotary: Rotary | None,
        heads: tuple[int, int],
        fused: bool = False,
    ) -> None:
        self.packing, self.rotary, self.heads, self.fused = packing, rotary, heads, fused
        # Whether what the columns held is needed on the way back.
        self.overwrites = cache.rewound and torch.is_grad_enabled()
        self.sizes = {"b": packing.rows, "t": packing.longest, "r": heads[0] // heads[1]}  # none is told by a size of 0
        (H, G), C, device = heads, cache.capacity, column_P.device
        # Columns that nobody has reached yet are left out; in training the whole buffer is used, whose gradient
        # products want it contiguous.
        whole = torch.is_grad_enabled() or isinstance(cache, StaticCache)
        self.end = C if whole else cache.longest + packing.longest
        self.slot_N = cache.slots(packing, column_P, G)
        column_BT = packing.pad(column_P)
        self.column = repeat(column_BT, "b t -> (half b g) 1 t", half=2, g=G)
        later_BTC = torch.arange(self.end, device=device) > column_BT.unsqueeze(2)
        bias_BTC = torch.zeros(later_BTC.shape, device=device).masked_fill_(later_BTC, -math.inf)
        self.bias = repeat(bias_BTC, "b t c -> (b g) (r t) c", g=G, r=H // G)


class _Fill(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k_PGE: Tensor, v_PGE: Tensor, layer: _Layer, slot_N: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.layer, ctx.slot_N = layer, slot_N
        layer.write(k_PGE.flatten(0, 1), v_PGE.flatten(0, 1), slot_N, keeps=False)
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
        layer.write(qk_PXE[:, H:].flatten(0, 1), v_PGE.flatten(0, 1), view.slot_N, keeps=view.overwrites)
        # Query heads beside the key/value head that they share.
        q = rearrange(view.packing.pad(qk_PXE[:, :H]), "b t (g r) e -> (b g) (r t) e", g=G, **view.sizes)
        # A static cache may have more rows than the batch.
        k, v = layer.k[: len(q), : view.end], layer.v[: len(q), : view.end]
        weights = None if view.fused else _weights(q, k, view)
        out = _fused(q, k, v, view) if weights is None else torch.bmm(weights, v)
        out_BTD = rearrange(out, "(b g) (r t) e -> b t (g r e)", g=G, **view.sizes)
        ctx.save_for_backward(q, weights)  # those of a fused kernel are worked out again
        layer.queries += q.shape[1]
        ctx.layer, ctx.view, ctx.queries, ctx.time = layer, view, layer.queries, layer.time
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
            layer.go_to(ctx.time)
            if weights is None:  # columns that later passes have written since are not seen
                weights = _weights(q, layer.k, view)
            grad_out = rearrange(view.packing.pad(grad_PD), "b t (g r e) -> (b g) (r t) e", g=G, e=E, **view.sizes)
            grad_weights = torch.bmm(grad_out, layer.v.transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            torch.mul(grad_scores, _scale(q), out=scores[0])
            scores[1].copy_(weights)
            others[0].copy_(q)
            others[1].copy_(grad_out)
            grad_q = rearrange(torch.bmm(scores[0], layer.k), "(b g) (r t) e -> b t (g r) e", g=G, **view.sizes)
            grad_q_PHE = view.packing.unpad(grad_q)
        grad_kv = rearrange(layer.left.grad_columns(view.column), "half (b g) t e -> b t half g e", g=G)
        if view.overwrites:
            layer.left.clear(view.slot_N)
        grad_k_PGE, grad_v_PGE = view.packing.unpad(grad_kv).unbind(1)
        grad_PXE = torch.cat((grad_q_PHE, grad_k_PGE, grad_v_PGE), dim=1)
        if view.rotary is not None:
            grad_PXE[:, : H + G] = view.rotary.turn_back(grad_PXE[:, : H + G])
        return grad_PXE, layer.new_link(), None, None


def _scale(q: Tensor) -> float:
    return q.shape[-1] ** -0.5


def _weights(q: Tensor, k: Tensor, view: CacheView) -> Tensor:
    """What every query (B * G, R * T, E) makes of every column, (B * G, R * T, C)."""
    scores = torch.baddbmm(view.bias.to(q.dtype), q, k.transpose(1, 2), alpha=_scale(q))
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype)


def _fused(q: Tensor, k: Tensor, v: Tensor, view: CacheView) -> Tensor:
    """The same weights times the values, by PyTorch's fused kernel, which wants batch and heads apart."""
    q_BGSE, k_BGCE, v_BGCE, bias = (x.unflatten(0, (-1, view.heads[1])) for x in (q, k, v, view.bias.to(q.dtype)))
    return F.scaled_dot_product_attention(q_BGSE, k_BGCE, v_BGCE, bias, scale=_scale(q)).flatten(0, 1)
