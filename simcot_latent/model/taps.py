"""What a pass shows of itself: hidden states, queries, keys and values of chosen layers at chosen tokens.

For distillation (CODI, https://arxiv.org/abs/2502.21074, pulls hidden states; KaVa, https://arxiv.org/abs/2510.02312,
keys and values) and for probing. `Taps` are handed to a pass and filled by it:

    taps = Taps(tokens=last_B, keys=True)
    model(ids_P, packing, taps=taps)
    taps.hidden_LND, taps.keys_LNGE

Hidden state 0 is what the first block reads: embeddings, with positions where these are learned. Hidden state i is what
block i reads, n_layer what comes out of the last block, and n_layer + 1 the same after the final norm, which is what
the pass returns. `transformers` counts alike, but its `hidden_states[n_layer]` is the one after the final norm: see
`transformers_layers`.

Queries, keys and values are those of block i, as attention multiplies them: after the rotation of rotary positions and
after `qk_norm`, where there are any. So the keys are those of `transformers`' `past_key_values`.

Shapes: P tokens of a pass, M of them (the last) that are read out, N that are tapped, L layers that are tapped, D
width, H query heads, G key/value heads, E head width, X = H + 2G.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from simcot_latent.model.rotary import Rotary


class Taps:
    """What is wanted of one pass, and what was found in it.

    Args:
        layers: which, in this order. None: hidden states 0 .. n_layer; queries, keys and values of all blocks.
        tokens: N indices into the P tokens of the pass, in any order. None: all. Of rows of equal length (B, T), token
            t of row b is b * T + t.
        hidden, queries, keys, values: what is wanted.
        rotated: whether queries and keys are wanted after the rotation, rather than before it.
        detach: whether what is found is cut off from the graph. It otherwise has gradients where the pass has.

    Raises:
        ValueError: by the pass, where a layer or token is not there, or not computed (see `read_out` of the
            transformer), or where the taps were filled before.
    """

    def __init__(
        self,
        layers: Sequence[int] | None = None,
        tokens: Tensor | Sequence[int] | None = None,
        *,
        hidden: bool = True,
        queries: bool = False,
        keys: bool = False,
        values: bool = False,
        rotated: bool = True,
        detach: bool = False,
    ) -> None:
        self.layers, self.tokens = layers, tokens
        self.rotated, self.detach = rotated, detach
        self._wanted = {"hidden": hidden, "queries": queries, "keys": keys, "values": values}
        self._found: dict[str, dict[int, Tensor]] = {kind: {} for kind, wanted in self._wanted.items() if wanted}
        self._layers: dict[str, list[int]] = {}
        self._index_N: Tensor | None = None
        self._left_out = 0

    @property
    def hidden_LND(self) -> Tensor:
        """Hidden states; see the module for which is which."""
        return self._stack("hidden")

    @property
    def queries_LNHE(self) -> Tensor:
        return self._stack("queries")

    @property
    def keys_LNGE(self) -> Tensor:
        return self._stack("keys")

    @property
    def values_LNGE(self) -> Tensor:
        return self._stack("values")

    def _stack(self, kind: str) -> Tensor:
        if kind not in self._found:
            raise ValueError(f"taps that were not asked for {kind}")
        if not self._layers:
            raise ValueError("taps that no pass has filled yet")
        return torch.stack([self._found[kind][layer] for layer in self._layers[kind]])

    # What the transformer calls

    def begin(self, n_layer: int, tokens: int, read_out: int | None, device: torch.device) -> None:
        """Before a pass over P `tokens`, of which the last block computes `read_out`."""
        if self._layers:
            raise ValueError("taps hold what one pass shows: make new ones for another")
        for kind in self._found:
            end = n_layer + 2 if kind == "hidden" else n_layer
            layers = range(n_layer + (kind == "hidden")) if self.layers is None else self.layers
            if outside := [layer for layer in layers if not 0 <= layer < end]:
                raise ValueError(f"taps at {kind} of layer {outside[0]}: there are 0 to {end - 1}")
            self._layers[kind] = list(layers)
        self._left_out = 0 if read_out is None else tokens - read_out
        first = self._left_out if max(self._layers.get("hidden") or [0]) >= n_layer else 0
        if self.tokens is None:
            if first > 0:
                raise ValueError(f"taps at all tokens of the last layer, where only the last {read_out} are read out")
            return
        index_N = torch.as_tensor(self.tokens, dtype=torch.long)
        if index_N.device.type == "cpu" and len(index_N) > 0:  # others are not waited for: their kernels check
            lowest, highest = index_N.min().item(), index_N.max().item()
            if lowest < first or highest >= tokens:
                raise ValueError(f"taps at tokens {lowest} to {highest}: there are {first} to {tokens - 1}")
        self._index_N = index_N.to(device, non_blocking=True)

    def add_hidden(self, layer: int, x: Tensor, left_out: bool = False) -> None:
        """Hidden states of a layer.

        Args:
            x: (P, D), or (M, D) with `left_out`.
        """
        if layer in self._layers.get("hidden", ()):
            self._add("hidden", layer, self._take(x, self._left_out if left_out else 0))

    def add_attention(self, layer: int, qkv_PXE: Tensor, heads: tuple[int, int], rotary: Rotary | None) -> None:
        """Queries, keys and values of a block.

        Args:
            qkv_PXE: not rotated yet.
            heads: H and G.
        """
        if not any(layer in self._layers.get(kind, ()) for kind in ("queries", "keys", "values")):
            return
        H, G = heads
        qk_NXE, v_NGE = self._take(qkv_PXE).split((H + G, G), dim=1)
        if self.rotated and rotary is not None:
            qk_NXE = Rotary(self._take(rotary.cos_P1E), self._take(rotary.sin_P1E))(qk_NXE)
        q_NHE, k_NGE = qk_NXE.split((H, G), dim=1)
        for kind, x in (("queries", q_NHE), ("keys", k_NGE), ("values", v_NGE)):
            if kind in self._found:
                self._add(kind, layer, x)

    def _take(self, x_PN: Tensor, left_out: int = 0) -> Tensor:
        return x_PN if self._index_N is None else x_PN.index_select(0, self._index_N - left_out)

    def _add(self, kind: str, layer: int, x: Tensor) -> None:
        self._found[kind][layer] = x.detach() if self.detach else x


class SeveralTaps(Taps):
    """Taps of several who want something of the same pass; each is filled by itself."""

    def __init__(self, *taps: Taps) -> None:
        super().__init__(hidden=False)
        self.taps = taps

    def begin(self, n_layer: int, tokens: int, read_out: int | None, device: torch.device) -> None:
        for taps in self.taps:
            taps.begin(n_layer, tokens, read_out, device)

    def add_hidden(self, layer: int, x: Tensor, left_out: bool = False) -> None:
        for taps in self.taps:
            taps.add_hidden(layer, x, left_out)

    def add_attention(self, layer: int, qkv_PXE: Tensor, heads: tuple[int, int], rotary: Rotary | None) -> None:
        for taps in self.taps:
            taps.add_attention(layer, qkv_PXE, heads, rotary)


def transformers_layers(n_layer: int) -> list[int]:
    """The layers of `transformers`' `hidden_states`: the last is the one after the final norm (as CODI takes them)."""
    return [*range(n_layer), n_layer + 1]
