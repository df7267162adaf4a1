"""Linear layers and embeddings whose gradients over many passes are gathered into one.

A backward pass through a linear layer reads the whole weight, and writes and adds up a whole weight gradient, be it for
a thousand tokens or for the handful that a thought is. K thoughts would do so K times. Within `gathered_gradients`
every call only leaves its input and its output's gradient behind; when all of them have been through, their products
are taken at once: the same sum, in another order. An embedding that is also the output head has two gradients as large
as itself, one of them zero but for a few rows: these rows are added to the other.

What is frozen has no gradient: of a frozen weight neither the product is taken nor the input kept, and of a frozen
table only the rows that are trained (see `LastRows`) have one.

Shapes: P tokens, I numbers in, O numbers out, V rows of a table, N of them trained, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]

INTEL = hasattr(torch.cpu, "get_capabilities") and "Intel" in str(torch.cpu.get_capabilities().get("cpu_name"))
# Weights of so many numbers do not stay in a core's cache.
LARGE = 2**19
# Rows that are worth a product of their own: waiting for more would save little time and hold memory.
ENOUGH = 256


class Linear(nn.Linear):
    """`nn.Linear`, whose gradients can be gathered."""

    gathering: Gathering | None = None
    kept: tuple[Tensor, Tensor | None] | None = None
    """Weight and bias in another number format; see `keep_weights_in`."""

    def forward(self, input: Tensor) -> Tensor:
        """x W^T + b."""
        # Compilers do not see gathering (and must not ask for it first, which would make them compile twice).
        if not torch.compiler.is_compiling() and self.gathering is not None:
            origin = _Origin.of(input)
            source, again = (None, None) if origin is None else (origin.x, origin.again)
            return _Call.apply(  # type: ignore[no-any-return]
                input, self.gathering.anchor, self.gathering, source, again
            )
        if self.kept is not None and not torch.is_grad_enabled():
            return product(input.to(self.kept[0].dtype), *self.kept)
        if not torch.is_grad_enabled() and not torch.is_autocast_enabled(input.device.type):
            return product(input, self.weight, self.bias)
        return super().forward(input)


def product(x_PI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x W^T + b, for autograd to look away from."""
    if x_PI.device.type == "cpu" and 8 <= len(x_PI) < 64 and weight_OI.numel() >= LARGE and INTEL:
        # What takes the time is to read the weight, which MKL does up to 1.5 times as fast this way round on an Intel
        # CPU, and 1.1 to 2.8 times as slowly on an AMD one.
        x_IP = x_PI.T.contiguous()
        y_OP = weight_OI @ x_IP if bias_O is None else torch.addmm(bias_O.unsqueeze(1), weight_OI, x_IP)
        return y_OP.T.contiguous()
    return F.linear(x_PI, weight_OI, bias_O)


def activated(x: Tensor, activation: Activation, layer: nn.Module, keeps_input_alone: bool = False) -> Tensor:
    """activation(x), for `layer` to multiply by its weight.

    Where the layer gathers its gradients, x alone is kept for the way back, and the activation computed again. The
    layer still receives what it multiplies, so what hooks see, and what replaces the layer (LoRA), is as usual.

    Args:
        keeps_input_alone: whether autograd by itself keeps nothing but x on the activation's account, as for gelu.
    """
    gathers = not torch.compiler.is_compiling() and getattr(layer, "gathering", None) is not None
    if not gathers or not x.requires_grad:
        return activation(x)
    again = _Again(activation, keeps_input_alone)
    active: Tensor = activation(x) if keeps_input_alone else _Activate.apply(x, again)  # type: ignore[assignment]
    _Origin(x.detach(), again, active._version).note_on(active)
    return active


class _Again:
    """An activation whose output is computed again on the way back: once for both who need it there."""

    def __init__(self, activation: Activation, keeps_input_alone: bool) -> None:
        self.activation, self.keeps_input_alone = activation, keeps_input_alone
        self._found: tuple[Tensor, Tensor] | None = None

    def output(self, x: Tensor) -> Tensor:
        """The activation of x, without a graph."""
        return self.activation(x) if self.keeps_input_alone else self.compute(x)[1].detach()

    def compute(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x as a leaf, and its activation, from which autograd finds the way back to it."""
        if self._found is None:
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                self._found = leaf, self.activation(leaf)
        return self._found

    def take(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same, for the last who needs it."""
        found, self._found = self.compute(x), None
        return found


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, again: _Again) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.again = again
        ctx.save_for_backward(x)
        return again.activation(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:  # type: ignore[override]
        if grad is None:
            return None, None
        leaf, active = ctx.again.take(*ctx.saved_tensors)
        return torch.autograd.grad(active, leaf, grad)[0], None


@dataclass(frozen=True)
class _Origin:
    """What a tensor was made of, noted on it for the layer that it goes into.

    Attributes:
        x: what it is the activation of.
        version: the tensor's own, by which one that a hook has changed in place is known.
    """

    x: Tensor
    again: _Again
    version: int

    def note_on(self, active: Tensor) -> None:
        active._origin = self  # type: ignore[attr-defined]

    @staticmethod
    def of(input: Tensor) -> _Origin | None:
        """None for a tensor without, or one that is not what it was."""
        origin: _Origin | None = getattr(input, "_origin", None)
        return None if origin is None or input._version != origin.version else origin


class LastRows:
    """Of a table that is frozen, the last rows may be trained: those of tokens that were added to a vocabulary.

    They are a parameter of their own, `rows`, so that optimizers, gradients and moments are of their size. The table
    holds them too, brought up to date whenever it is asked for.
    """

    weight: Tensor
    rows: nn.Parameter | None

    def train_last_rows(self, count: int) -> None:
        """From now on the table is frozen but for its last rows; 0: whole."""
        self.weight.requires_grad_(False)
        self.rows = nn.Parameter(self.weight.detach()[-count:].clone()) if count else None

    def current(self) -> Tensor:
        """The table (V, D), its trained rows as they are now; without a graph."""
        if self.rows is not None:
            # Unseen by autograd, which may have kept the table for the way back: rows change between steps only.
            self.weight.data[-len(self.rows) :] = self.rows.data
        return self.weight

    def differentiable(self) -> Tensor:
        """The same, for gradients of what is trained of it."""
        table_VD = self.current()
        if self.rows is None or not torch.is_grad_enabled():
            return table_VD
        table_VD = _LastRows.apply(self.rows, table_VD)  # type: ignore[assignment]
        table_VD.trained_rows = len(self.rows)  # type: ignore[attr-defined]
        return table_VD


def trained_rows(table_VD: Tensor) -> int | None:
    """How many of a table's last rows are all that its gradient is asked for of; None: the whole gradient is."""
    return getattr(table_VD, "trained_rows", None)


class _LastRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.count = len(rows_ND)
        return weight_VD.view_as(weight_VD)

    @staticmethod
    def backward(ctx: Any, grad_VD: Tensor | None) -> tuple[Tensor | None, None]:  # type: ignore[override]
        if grad_VD is None:
            return None, None
        # `cross_entropy` gives those rows and no others, as a sparse tensor.
        return grad_VD.coalesce().values() if grad_VD.is_sparse else grad_VD[-ctx.count :], None


class Head(LastRows, nn.Linear):
    """An output head that is not the embedding table."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__(width, vocab_size, bias=False)
        self.register_parameter("rows", None)

    @property
    def table(self) -> Tensor:
        """The weight (V, D)."""
        return self.differentiable()


class Embedding(LastRows, nn.Embedding):
    """`nn.Embedding`, whose gradients can be gathered."""

    gathered: GatheredTable | None = None

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__(vocab_size, width)
        self.register_parameter("rows", None)

    @property
    def table(self) -> Tensor:
        """The weight (V, D), to be used as output head."""
        return self.differentiable() if self.gathered is None else self.gathered.anchor

    def forward(self, input: Tensor) -> Tensor:
        if self.rows is not None:
            first = len(self.weight) - len(self.rows)
            new = F.embedding((input - first).clamp(min=0), self.rows)
            return torch.where((input >= first).unsqueeze(-1), new, F.embedding(input, self.weight))
        if self.gathered is None:
            return super().forward(input)
        return _Lookup.apply(input, self.gathered.anchor, self.gathered)  # type: ignore[no-any-return]

    def scores(self, x: Tensor) -> Tensor:
        """Products of vectors (..., D) with every row of the table, (..., V)."""
        if self.gathered is None or not self.weight.requires_grad:
            return F.linear(x, self.table)
        return _Scores.apply(x, self.gathered.anchor, self.gathered)  # type: ignore[no-any-return]

    def mixtures(self, weight: Tensor) -> Tensor:
        """Sums of the rows of the table, weighted by (..., V): (..., D)."""
        if self.gathered is None or not self.weight.requires_grad:
            return weight @ self.table
        return _Mixtures.apply(weight, self.gathered.anchor, self.gathered)  # type: ignore[no-any-return]


def keep_weights_in(module: nn.Module, dtype: torch.dtype | None) -> None:
    """From now on passes without gradients multiply by copies of the present weights in `dtype`; None: no more.

    For CUDA graphs (see `StaticCache`), in each of which autocast would make its copies anew.
    """
    for layer in (part for part in module.modules() if isinstance(part, Linear)):
        if dtype is None:
            layer.kept = None
        else:
            bias = None if layer.bias is None else layer.bias.detach().to(dtype)
            layer.kept = layer.weight.detach().to(dtype), bias


@contextmanager
def gathered_gradients(*modules: nn.Module) -> Iterator[None]:
    """Within it every `Linear` and `Embedding` of these modules gathers its gradients; without gradients, nothing.

    Autocast, where there is any, is to be entered before it. Inputs are (P, I). Within another, what gathers already
    goes on as it did.
    """
    parts = list(dict.fromkeys(part for module in modules for part in module.modules()))
    if not torch.is_grad_enabled():
        parts = []
    layers = [part for part in parts if isinstance(part, Linear) and part.gathering is None]
    tables = [part for part in parts if isinstance(part, Embedding) and part.gathered is None]
    try:
        for layer in layers:
            layer.gathering = Gathering(layer)
        for table in tables:
            table.gathered = GatheredTable(table)
        yield
    finally:
        for layer in layers:
            layer.gathering = None
        for table in tables:
            table.gathered = None


def gathered_again(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts for `torch.utils.checkpoint`: what is computed again gathers where the first computation did."""
    layers = [part for part in module.modules() if isinstance(part, Linear)]
    gatherings = [layer.gathering for layer in layers]

    @contextmanager
    def again() -> Iterator[None]:
        now = [layer.gathering for layer in layers]
        _set_gatherings(layers, gatherings)
        try:
            yield
        finally:
            _set_gatherings(layers, now)

    return nullcontext(), again()


def _set_gatherings(layers: Sequence[Linear], gatherings: Sequence[Gathering | None]) -> None:
    for layer, gathering in zip(layers, gatherings, strict=True):
        layer.gathering = gathering


class Gathering:
    """A weight in use: the weight in the number format of its products, and what calls have left behind.

    Autograd runs a node when all that depends on it has run. Every call depends on the anchor, so the anchor's backward
    is the one that finds all of them done.
    """

    def __init__(self, layer: Linear) -> None:
        device = layer.weight.device.type
        self.weight, self.bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            self.weight, self.bias = self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)
        self.left = _LeftBehind(has_bias=layer.bias is not None)
        self.anchor: Tensor = _Anchor.apply(layer.weight, layer.bias, self.left)  # type: ignore[assignment]
        self.learns: bool = self.anchor.requires_grad
        """Whether weight or bias is trained; calls of a frozen layer leave nothing behind."""


class _LeftBehind:
    """Inputs and output gradients of calls, and the weight's gradient of those already taken."""

    def __init__(self, has_bias: bool) -> None:
        self.has_bias = has_bias
        self.calls: list[tuple[Tensor, Tensor]] = []
        self.rows = 0
        self.grad_OI: Tensor | None = None
        self.grad_O: Tensor | None = None

    def add(self, x_PI: Tensor, grad_PO: Tensor) -> None:
        self.calls.append((x_PI, grad_PO))
        self.rows += len(x_PI)
        if self.rows >= ENOUGH:
            self.take()

    def take(self) -> None:
        """Adds the products of all calls to the gradient, and forgets the calls."""
        # The large call as it is, the many small ones as one: joining copies them.
        large, *small = sorted(self.calls, key=lambda call: len(call[0]), reverse=True)
        self.calls, self.rows = [], 0
        self._add_product(*large)
        if small:
            self._add_product(*(torch.cat(parts) for parts in zip(*small, strict=True)))

    def _add_product(self, x_PI: Tensor, grad_PO: Tensor) -> None:
        if self.grad_OI is None:
            self.grad_OI = torch.mm(grad_PO.T, x_PI)
            self.grad_O = grad_PO.sum(0) if self.has_bias else None
            return
        self.grad_OI.addmm_(grad_PO.T, x_PI)
        if self.grad_O is not None:
            self.grad_O += grad_PO.sum(0)


class _Anchor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, bias_O: Tensor | None, left: _LeftBehind) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.left = left
        return weight_OI.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: None) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        left = ctx.left
        if left.calls:
            left.take()
        grads = left.grad_OI, left.grad_O
        left.grad_OI = left.grad_O = None
        return *grads, None  # in the weight's format: autograd sees to it


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, anchor: Tensor, gathering: Gathering, source: Tensor | None, again: _Again | None
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.gathering, ctx.again = gathering, again
        if input.dtype != gathering.weight.dtype:
            input = input.to(gathering.weight.dtype)
        if gathering.learns:
            ctx.save_for_backward(input if source is None else source)
        return product(input, gathering.weight, gathering.bias)

    @staticmethod
    def backward(ctx: Any, grad_PO: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grad_PO is None:
            return None, None, None, None, None
        gathering = ctx.gathering
        anchor = gathering.anchor.grad_fn
        if anchor is not None and torch._C._will_engine_execute_node(anchor):  # somebody asks for the weight's gradient
            (x_PI,) = ctx.saved_tensors
            if ctx.again is not None:
                x_PI = ctx.again.output(x_PI).to(gathering.weight.dtype)
            gathering.left.add(x_PI, grad_PO)
        return torch.mm(grad_PO, gathering.weight), None, None, None, None  # autograd sees to the input's format


class GatheredTable:
    """An embedding in use: the weight as its users see it, and what lookups and products have left behind."""

    def __init__(self, table: Embedding) -> None:
        self.calls: list[tuple[Tensor, Tensor]] = []
        self.products = _LeftBehind(has_bias=False)
        self.anchor: Tensor
        if table.weight.requires_grad:
            self.anchor = _TableAnchor.apply(table.weight, self)  # type: ignore[assignment]
        else:
            self.anchor = table.differentiable()
        self._cast: Tensor | None = None

    @property
    def is_asked_for(self) -> bool:
        """Whether the backward pass that is running wants the table's gradient."""
        anchor = self.anchor.grad_fn
        return anchor is not None and torch._C._will_engine_execute_node(anchor)

    @property
    def weight(self) -> Tensor:
        """The table (V, D) in the number format of products, without a graph."""
        if self._cast is None:
            weight, device = self.anchor.detach(), self.anchor.device.type
            self._cast = weight.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else weight
        return self._cast


class _TableAnchor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VD: Tensor, gathered: GatheredTable) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.calls, ctx.products, ctx.like = gathered.calls, gathered.products, weight_VD.detach()
        return weight_VD.view_as(weight_VD)

    @staticmethod
    def backward(ctx: Any, grad_VD: Tensor | None) -> tuple[Tensor | None, None]:  # type: ignore[override]
        if ctx.products.calls:
            ctx.products.take()
        summed_VD, ctx.products.grad_OI = ctx.products.grad_OI, None
        if grad_VD is None and (ctx.calls or summed_VD is not None):
            grad_VD = torch.zeros_like(ctx.like)
        # In place: it is as large as the table, and comes from an output head, which has no more use for it.
        if grad_VD is not None and summed_VD is not None:
            grad_VD += summed_VD
        for ids, grad in ctx.calls:
            assert grad_VD is not None
            grad_VD.index_add_(0, ids.flatten(), grad.flatten(0, -2).to(grad_VD.dtype))
        ctx.calls.clear()
        return grad_VD, None


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table_VD: Tensor, gathered: GatheredTable) -> Tensor:
        x = x.to(gathered.weight.dtype)
        ctx.save_for_backward(x)
        ctx.gathered = gathered
        return x @ gathered.weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        if ctx.gathered.is_asked_for:
            ctx.gathered.products.add(ctx.saved_tensors[0].flatten(0, -2), grad.flatten(0, -2))
        return grad @ ctx.gathered.weight, None, None  # autograd sees to the input's format


class _Mixtures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, table_VD: Tensor, gathered: GatheredTable) -> Tensor:
        weight = weight.to(gathered.weight.dtype)
        ctx.save_for_backward(weight)
        ctx.gathered = gathered
        return weight @ gathered.weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        if ctx.gathered.is_asked_for:
            ctx.gathered.products.add(grad.flatten(0, -2), ctx.saved_tensors[0].flatten(0, -2))
        return grad @ ctx.gathered.weight.T, None, None


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, table_VD: Tensor, gathered: GatheredTable) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.gathered = gathered
        return F.embedding(ids, table_VD)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        if ctx.gathered.is_asked_for:
            ctx.gathered.calls.append((ctx.saved_tensors[0], grad))
        return None, None, None
