"""The arithmetic that the terms of a loss share: what labels weigh, their cross-entropy, and what a share of a loss is.

Every number here is a *share of an optimizer step*: a sum over the labels of one micro-batch on one rank, divided by a
total over all micro-batches and all ranks. Shares therefore add up to the step's value, whatever way a step is cut.

Shapes: M labelled tokens, V vocabulary, N trained rows of a table (all of them or, of a frozen one, the last), D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from simcot_latent.model.linear import trained_rows

# Logits are held for as many labels at once as keep them under so many bytes: enough that a product with the table is
# worth adding to the table's gradient, which is as large as the table itself.
CHUNK_BYTES = 2**26
# Softmax and gradient, in float32, are worked out a piece of that at a time (8 MB), which a CPU's cache holds.
PIECE_NUMBERS = 2**21


@dataclass
class Targets:
    """Labels, in the order of the hidden states that predict them. Logits are computed for nothing else.

    Attributes:
        label_M: the token to predict.
        weight_M: what the label weighs in the loss.
        step_M: True where the label is a token of a calculator step.
    """

    label_M: Tensor
    weight_M: Tensor
    step_M: Tensor

    @classmethod
    def of(cls, labels: Sequence[int], weights: Sequence[float], in_step: Sequence[bool]) -> Targets:
        """From lists of one number a label."""
        return cls(
            torch.tensor(labels, dtype=torch.long),
            torch.tensor(weights, dtype=torch.float32),
            torch.tensor(in_step, dtype=torch.bool),
        )

    def __len__(self) -> int:
        return len(self.label_M)


class Labelled(NamedTuple):
    """Labels and what predicts them.

    Attributes:
        hidden_MD: the hidden states that predict the labels.
        table_VD: weight of the output head.
        label_M: the labels.
        scale_M: what each label's cross-entropy counts in the loss.
    """

    hidden_MD: Tensor
    table_VD: Tensor
    label_M: Tensor
    scale_M: Tensor


class CrossEntropy(NamedTuple):
    """The weighted sum of cross-entropies, and what it is the sum of.

    Attributes:
        loss: sum(scale * nll), the only part with a gradient.
        nll_M: cross-entropy of each label in nats, float32.
        correct_M: whether no token is likelier than the label.
    """

    loss: Tensor
    nll_M: Tensor
    correct_M: Tensor


def cross_entropy(*parts: Labelled, softcap: float | None = None) -> CrossEntropy:
    """Output head and loss in one, a chunk of labels at a time: full logits are never held.

    Args:
        parts: their labels follow each other in the result. Parts of the same table go through it together.
        softcap: see `GPTConfig.logit_softcap`.
    """
    if all(part.table_VD is parts[0].table_VD for part in parts):
        hidden, tables, labels, scales = zip(*parts, strict=True)
        parts = (Labelled(torch.cat(hidden), tables[0], torch.cat(labels), torch.cat(scales)),)
    learns = torch.is_grad_enabled()  # within the function it never is
    found = [
        CrossEntropy(*_CrossEntropy.apply(*part, softcap, learns, trained_rows(part.table_VD)))  # type: ignore[misc]
        for part in parts
    ]
    return CrossEntropy(
        torch.stack([each.loss for each in found]).sum(),
        torch.cat([each.nll_M for each in found]),
        torch.cat([each.correct_M for each in found]),
    )


class _CrossEntropy(torch.autograd.Function):
    """Takes the gradients along the way, while a chunk's logits are there: (softmax - onehot) * scale a label."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        table_VD: Tensor,
        label_M: Tensor,
        scale_M: Tensor,
        softcap: float | None,
        learns: bool,
        trained: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = table_VD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else table_VD.dtype
        hidden, table = hidden_MD.to(dtype), table_VD.to(dtype)
        wants_hidden, wants_table = (learns and needed for needed in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        # Float32 whatever the products are in: chunks add up.
        rows_N = slice(None) if trained is None else slice(len(table) - trained, None)
        grad_table = torch.empty_like(table[rows_N], dtype=torch.float32) if wants_table else None
        nll_M = torch.empty_like(scale_M)
        correct_M = torch.empty_like(label_M, dtype=torch.bool)
        n_chunk = max(1, CHUNK_BYTES // (len(table) * table.element_size()))
        n_piece = max(1, PIECE_NUMBERS // len(table)) if device == "cpu" else n_chunk
        with torch.autocast(device, enabled=False):
            for chunk in _slices(len(label_M), n_chunk):
                logits_CV = hidden[chunk] @ table.T
                for piece in _slices(len(logits_CV), n_piece):
                    labels = slice(chunk.start + piece.start, chunk.start + piece.stop)
                    label_P1 = label_M[labels].unsqueeze(1)
                    logits_PV = logits_CV[piece].float()
                    if softcap is not None:
                        logits_PV = torch.tanh(logits_PV / softcap)
                        slope_PV = 1 - logits_PV.square() if wants_hidden or wants_table else None
                        logits_PV = logits_PV * softcap
                    else:
                        slope_PV = None
                    log_probs_PV = logits_PV.log_softmax(-1)
                    label_log_prob_P = log_probs_PV.gather(1, label_P1).squeeze(1)
                    nll_M[labels] = -label_log_prob_P
                    correct_M[labels] = label_log_prob_P >= log_probs_PV.amax(-1)  # far cheaper than argmax
                    if not (wants_hidden or wants_table):
                        continue
                    grad_PV = log_probs_PV.exp_()
                    grad_PV.scatter_add_(1, label_P1, -torch.ones_like(label_P1, dtype=grad_PV.dtype))
                    grad_PV *= scale_M[labels].unsqueeze(1)
                    if slope_PV is not None:
                        grad_PV *= slope_PV
                    logits_CV[piece] = grad_PV  # nobody needs the logits any more
                grad_CV = logits_CV
                if grad_hidden is not None:
                    torch.mm(grad_CV, table, out=grad_hidden[chunk])
                if grad_table is not None:
                    _add_product(grad_table, grad_CV[:, rows_N].T, hidden[chunk], first=chunk.start == 0)
        ctx.mark_non_differentiable(nll_M, correct_M)
        ctx.dtypes = hidden_MD.dtype, table_VD.dtype
        if grad_table is not None and len(label_M) == 0:
            grad_table.zero_()
        ctx.grads = grad_hidden, grad_table
        ctx.sparse = None if trained is None else table_VD.shape
        return (nll_M * scale_M).sum(), nll_M, correct_M

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.grads is None:
            raise RuntimeError("the gradients of a cross_entropy have been handed out already: backward only once")
        grads, ctx.grads = ctx.grads, None  # scaled in place, as they are as large as the table
        hidden, table = (
            None if grad is None else grad.mul_(grad_loss).to(dtype)
            for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        )
        if table is not None and ctx.sparse is not None:
            V, D = ctx.sparse
            index_1N = torch.arange(V - len(table), V, device=table.device).unsqueeze(0)
            table = torch.sparse_coo_tensor(index_1N, table, (V, D), check_invariants=False, is_coalesced=True)
        return hidden, table, None, None, None, None, None


def _slices(length: int, size: int) -> list[slice]:
    """The slices of at most `size` that cover `length`."""
    return [slice(begin, min(begin + size, length)) for begin in range(0, length, size)]


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total = a b for the first product, total += a b for those that follow; the total is in float32."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=0.0 if first else 1.0, out=total)
    elif first:
        total.copy_(a @ b)
    else:
        total += a @ b


def at_least_tiny(total: Tensor) -> Tensor:
    """A total to divide by: one of zero (nothing of that kind in the whole step) makes shares of zero."""
    return total.clamp(min=torch.finfo(torch.float32).tiny)


def share(values_M: Tensor, total: Tensor) -> Tensor:
    """sum(values) / total."""
    return values_M.sum() / at_least_tiny(total)


def add_up(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Key-wise sum of shares, or of totals."""
    return {key: torch.stack([part[key] for part in parts]).sum(0) for key in parts[0]}
