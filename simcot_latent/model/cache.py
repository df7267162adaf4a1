"""Key/value cache of one forward pass after another over the same rows.

Shapes: B rows, G key/value heads, T new positions, S positions so far (cached + new), E head width.
"""

import torch
from torch import Tensor


class KVCache:
    """Keys, values and padding of everything a batch of rows has read so far.

    It also knows which of its positions are real, so that callers hand over the padding of *new* positions only, and
    every later query is kept from seeing padding wherever it lies.

    Args:
        capacity: positions to reserve. `None`: every pass appends by concatenation, which autograd can follow
            (training). A number: keys and values are written in place into one buffer, with no copy of what is
            already there (generation; only under `torch.no_grad`).
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.mask_BS: Tensor | None = None
        self._layers: list[tuple[Tensor, Tensor]] = []

    @property
    def length(self) -> int:
        """Positions held, padding included."""
        return 0 if self.mask_BS is None else self.mask_BS.shape[1]

    def extend_mask(self, mask_BT: Tensor) -> Tensor:
        """Appends the padding mask of the new positions (True: real) and returns the mask over all of them (B, S)."""
        self.mask_BS = mask_BT if self.mask_BS is None else torch.cat((self.mask_BS, mask_BT), dim=1)
        return self.mask_BS

    def append(self, layer: int, k_BGTE: Tensor, v_BGTE: Tensor) -> tuple[Tensor, Tensor]:
        """Appends one layer's new keys and values; returns all of that layer's, (B, G, S, E) each.

        `extend_mask` has been called for these positions before.
        """
        is_new = layer == len(self._layers)
        if self.capacity is None:
            if is_new:
                self._layers.append((k_BGTE, v_BGTE))
            else:
                k_BGSE, v_BGSE = self._layers[layer]
                self._layers[layer] = torch.cat((k_BGSE, k_BGTE), dim=2), torch.cat((v_BGSE, v_BGTE), dim=2)
            return self._layers[layer]
        if is_new:
            B, G, _, E = k_BGTE.shape
            self._layers.append((k_BGTE.new_empty(B, G, self.capacity, E), v_BGTE.new_empty(B, G, self.capacity, E)))
        k_BGCE, v_BGCE = self._layers[layer]
        end = self.length
        start = end - k_BGTE.shape[2]
        k_BGCE[:, :, start:end] = k_BGTE
        v_BGCE[:, :, start:end] = v_BGTE
        return k_BGCE[:, :, :end], v_BGCE[:, :, :end]

    def keep(self, rows_N: Tensor) -> None:
        """Keeps only the rows with these indices (N,), in their order."""
        if self.mask_BS is not None:
            self.mask_BS = self.mask_BS[rows_N]
        self._layers = [(k[rows_N], v[rows_N]) for k, v in self._layers]
