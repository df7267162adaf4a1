"""Gathered weight gradients are the ordinary ones, whatever is called how often; the other way round, the same product.

"Ordinary" are those of `torch.nn.Linear`, which a `Linear` is outside of `gathered_gradients`.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from simcot_latent.model import linear
from simcot_latent.model.linear import Embedding, Linear, activated, gathered_gradients, product

IN, OUT = 6, 5


def random_numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(sizes: Sequence[int], seed: int = 0) -> list[Tensor]:
    return [random_numbers(size, IN, seed=seed + i) for i, size in enumerate(sizes)]


class Recurrent(nn.Module):
    """Two layers that are called again and again, each time upon what came of the time before, as thoughts are."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.there, self.back = Linear(IN, OUT, bias=bias), Linear(OUT, IN, bias=bias)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = 0.7 * torch.randn(parameter.shape, generator=generator)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """A scalar in which the last call's output is not used."""
        state, total = torch.zeros(IN), torch.zeros(())
        for x_PI in inputs:
            total = total + state.sin().sum()
            state = self.back(torch.tanh(self.there(x_PI + state))).sum(0) / (len(x_PI) + 1)
        self.back(self.there(state.unsqueeze(0)))
        return total + state.sin().sum()


def gradients(scalar: Tensor, *wanted: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(scalar, wanted)


def assert_near(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == their.dtype
        scale = max([1e-6, *their.abs().flatten().tolist()])
        torch.testing.assert_close(our, their, atol=tolerance * scale, rtol=tolerance)


@pytest.fixture(params=[False, True], ids=["no bias", "bias"])
def layers(request: pytest.FixtureRequest) -> Recurrent:
    """Two layers with and without bias."""
    return Recurrent(request.param)


# Gathered gradients


@pytest.mark.parametrize("bias", [False, True])
@given(sizes=st.lists(st.integers(0, 90), min_size=1, max_size=7), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_gathered_equal_ordinary_gradients(bias: bool, sizes: list[int], seed: int) -> None:
    """Many calls of any sizes, one upon the other: values, gradients of weights, biases and inputs."""
    layers = Recurrent(bias)
    inputs = [x_PI.requires_grad_() for x_PI in inputs_of(sizes, seed)]
    with gathered_gradients(layers):
        gathered = layers(inputs)
    ordinary = layers(inputs)
    torch.testing.assert_close(gathered, ordinary, atol=1e-4, rtol=1e-4)
    wanted = (*layers.parameters(), *inputs)
    assert_near(gradients(gathered, *wanted), gradients(ordinary, *wanted), 1e-4)


ACTIVATIONS = {
    "gelu": (F.gelu, True),
    "gelu, left to us": (F.gelu, False),
    "gated": (lambda x: F.silu(x[:, :4]) * x[:, 4:], False),
    "relu2": (lambda x: F.relu(x).square(), False),
}
activations = pytest.mark.parametrize(("activation", "keeps_input_alone"), ACTIVATIONS.values(), ids=ACTIVATIONS)


def layer_and_input(activation: Callable[[Tensor], Tensor]) -> tuple[Linear, Tensor]:
    (x_PI,) = inputs_of([9])
    wide_PI = torch.cat((x_PI, 2 * x_PI), dim=1)[:, :8].requires_grad_()
    torch.manual_seed(0)
    return Linear(activation(wide_PI).shape[1], 3), wide_PI


@activations
@pytest.mark.parametrize("asks", ["all", "weight", "input"])
def test_an_activation_on_the_way_in(
    activation: Callable[[Tensor], Tensor], keeps_input_alone: bool, asks: str
) -> None:
    """Values and gradients are those of the two after each other, whichever are asked for, and asked for again."""
    layer, x_PI = layer_and_input(activation)
    expected = layer(activation(x_PI))
    assert torch.equal(layer(activated(x_PI, activation, layer, keeps_input_alone)), expected)
    with gathered_gradients(layer):
        found = layer(activated(x_PI, activation, layer, keeps_input_alone))
    assert torch.equal(found, expected)
    wanted = {"all": (layer.weight, layer.bias, x_PI), "weight": (layer.weight,), "input": (x_PI,)}
    for order in (asks, "all"):
        theirs = torch.autograd.grad(expected.sin().sum(), wanted[order], retain_graph=True)
        assert_near(torch.autograd.grad(found.sin().sum(), wanted[order], retain_graph=True), theirs)


@activations
def test_of_an_activation_only_the_input_is_kept(
    activation: Callable[[Tensor], Tensor], keeps_input_alone: bool
) -> None:
    layer, x_PI = layer_and_input(activation)
    kept = set[int]()
    keep = torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.add(x.data_ptr()), x)[1], lambda x: x)
    with gathered_gradients(layer), keep:
        found = layer(activated(x_PI, activation, layer, keeps_input_alone))
    assert kept == {x_PI.data_ptr()}
    calls = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return activation(x)

    with gathered_gradients(layer):
        found = layer(activated(x_PI, counted, layer, keeps_input_alone))
    found.sum().backward()
    assert calls == 2, "once on the way there, once on the way back"


@pytest.mark.parametrize("keeps_input_alone", [False, True])
@pytest.mark.parametrize("change", ["in place", "in place, unseen by autograd", "another tensor"])
def test_an_activation_that_is_changed_before_it_goes_in(change: str, keeps_input_alone: bool) -> None:
    """As a hook may do: the layer counts with what it has received."""
    layer, x_PI = layer_and_input(F.gelu)

    def output() -> Tensor:
        active = activated(x_PI, F.gelu, layer, keeps_input_alone)
        if change == "in place":
            active[:, 2] = 7.0
        elif change == "another tensor":
            active = torch.cat((active[:, :2], torch.full_like(active[:, 2:3], 7.0), active[:, 3:]), dim=1)
        else:
            with torch.no_grad():
                active[:, 2] = 7.0
        return layer(active)

    with gathered_gradients(layer):
        found = output()
    expected = output()
    wanted = (layer.weight, layer.bias, x_PI)
    assert_near(gradients(found.sin().sum(), *wanted), gradients(expected.sin().sum(), *wanted))


@pytest.mark.parametrize("enough", [1, 3, 10**6])
def test_taken_whenever_there_is_enough(monkeypatch: pytest.MonkeyPatch, layers: Recurrent, enough: int) -> None:
    """When products are taken is a matter of memory, not of numbers."""
    inputs = inputs_of([4, 1, 1, 7, 2])
    expected = gradients(layers(inputs), *layers.parameters())
    monkeypatch.setattr(linear, "ENOUGH", enough)
    held: list[int] = []
    add = linear._LeftBehind.add
    monkeypatch.setattr(
        linear._LeftBehind, "add", lambda self, x, grad: (add(self, x, grad), held.append(self.rows))[0]
    )
    with gathered_gradients(layers):
        gathered = layers(inputs)
    assert_near(gradients(gathered, *layers.parameters()), expected)
    assert held
    assert max(held) < enough
    assert (min(held) == 0) == (enough < 100), "nothing is left once there is enough"


def test_backward_within_the_context(layers: Recurrent) -> None:
    """It may go back before or after the context ends."""
    with gathered_gradients(layers):
        gathered = gradients(layers(inputs_of([4, 1, 1])), *layers.parameters())
    assert_near(gathered, gradients(layers(inputs_of([4, 1, 1])), *layers.parameters()))


def test_several_backward_passes(layers: Recurrent) -> None:
    """Each over a part of what was called within one context, and one of them twice: every gradient is its own."""
    parameters = list(layers.parameters())
    first, second = inputs_of([3, 2, 1]), inputs_of([1, 70], seed=9)
    expected = [gradients(layers(inputs), *parameters) for inputs in (first, second)]
    with gathered_gradients(layers):
        scalars = [layers(inputs) for inputs in (first, second)]
        for which in (1, 0, 1):
            found = torch.autograd.grad(scalars[which], parameters, retain_graph=True)
            assert_near(found, expected[which])


def test_gradients_of_inputs_alone(layers: Recurrent) -> None:
    """A backward pass that the weights are no part of leaves nothing behind for one that they are."""
    inputs = [x_PI.requires_grad_() for x_PI in inputs_of([3, 2, 1])]
    with gathered_gradients(layers):
        gathered = layers(inputs)
    ordinary = layers(inputs)
    for wanted in (inputs, list(layers.parameters())):
        found, expected = (torch.autograd.grad(x, wanted, retain_graph=True) for x in (gathered, ordinary))
        assert_near(found, expected)


def test_several_contexts_in_one_graph(layers: Recurrent) -> None:
    """Two micro batches, and calls outside of any context, add up in one backward pass and over several."""
    first, second, third = inputs_of([3, 1, 1]), inputs_of([8, 1, 1, 1], seed=5), inputs_of([2], seed=20)
    (layers(first) + layers(second) + 2 * layers(third)).backward()
    expected = [parameter.grad for parameter in layers.parameters()]
    layers.zero_grad()
    with gathered_gradients(layers):
        scalar = layers(first)
    with gathered_gradients(layers):
        scalar = scalar + layers(second)
    (scalar + layers(third)).backward()
    with gathered_gradients(layers):
        layers(third).backward()
    found = [parameter.grad for parameter in layers.parameters()]
    assert_near([g for g in found if g is not None], [g for g in expected if g is not None])


def test_a_call_without_gradient_counts_nothing(layers: Recurrent) -> None:
    """Neither what is cut off from the scalar, nor what is taken out of autograd's sight within the context."""
    x_PI = random_numbers(3, IN)
    with gathered_gradients(layers):
        with torch.no_grad():
            silent = layers.there(x_PI)
        cut_off = layers.there(x_PI).detach()
        used = layers.there(2 * x_PI)
    assert not silent.requires_grad
    torch.testing.assert_close(silent, cut_off)
    weight = layers.there.weight
    expected = gradients((layers.there(2 * x_PI) * cut_off).sum(), weight)
    assert_near(gradients((used * cut_off).sum(), weight), expected)


@pytest.mark.parametrize("frozen", ["weight", "bias", "both"])
def test_frozen_parameters(frozen: str) -> None:
    """What is not to be trained gets no gradient, and hinders none."""
    layers = Recurrent(bias=True)
    for name, parameter in layers.named_parameters():
        parameter.requires_grad = not (frozen == "both" or name.endswith(frozen))
    inputs = [x_PI.requires_grad_() for x_PI in inputs_of([3, 1, 1])]
    wanted = [parameter for parameter in layers.parameters() if parameter.requires_grad] + inputs
    with gathered_gradients(layers):
        gathered = layers(inputs)
    assert_near(gradients(gathered, *wanted), gradients(layers(inputs), *wanted))


@contextmanager
def bfloat16() -> Iterator[None]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield


def test_bfloat16_autocast(layers: Recurrent) -> None:
    """The same products in the same format: near the ordinary gradients under autocast, and as near to the exact."""
    parameters, inputs = list(layers.parameters()), inputs_of([40, 1, 1, 5])
    found = {}
    for name, autocast, gathers in (("exact", False, False), ("ordinary", True, False), ("gathered", True, True)):
        with bfloat16() if autocast else nullcontext(), gathered_gradients(layers) if gathers else nullcontext():
            output = layers.there(inputs[0])
            scalar = layers(inputs)
        assert output.dtype == (torch.bfloat16 if autocast else torch.float32)
        found[name] = torch.cat([gradient.flatten() for gradient in gradients(scalar, *parameters)])
    assert found["gathered"].dtype == torch.float32, "gradients are in the format of the parameters"
    assert not torch.equal(found["gathered"], found["exact"]), "autocast was not at work"
    error = {name: (found[name] - found["exact"]).norm() / found["exact"].norm() for name in found}
    assert error["ordinary"] < 0.05
    assert error["gathered"] < 1.5 * error["ordinary"], error


# Contexts within one another


def test_a_context_within_another_goes_on_with_its_gatherings(layers: Recurrent) -> None:
    """And leaves them to it: a part of a method may gather by itself or as a part of the whole."""
    before, within, after = inputs_of([3, 1, 1]), inputs_of([8, 1], seed=5), inputs_of([2, 1], seed=20)
    parts = [layers.there, layers.back]
    with gathered_gradients(layers):
        outer = [layer.gathering for layer in parts]
        scalar = layers(before)
        with gathered_gradients(layers):
            assert [layer.gathering for layer in parts] == outer
            scalar = scalar + layers(within)
        assert [layer.gathering for layer in parts] == outer
        scalar = scalar + layers(after)
        with pytest.raises(RuntimeError, match="size"), gathered_gradients(layers.there):
            layers([torch.zeros(2, IN + 1)])
        assert [layer.gathering for layer in parts] == outer
    assert [layer.gathering for layer in parts] == [None, None]
    assert None not in outer
    expected = layers(before) + layers(within) + layers(after)
    torch.testing.assert_close(scalar, expected)
    assert_near(gradients(scalar, *layers.parameters()), gradients(expected, *layers.parameters()))


def test_a_context_within_another_gathers_what_the_other_does_not(layers: Recurrent) -> None:
    """Until its own end."""
    first, second, third = inputs_of([3, 1, 1]), inputs_of([8, 1], seed=5), inputs_of([2, 1], seed=20)
    with gathered_gradients(layers.there):
        outer = layers.there.gathering
        scalar = layers(first)
        with gathered_gradients(layers):
            assert layers.there.gathering is outer
            assert layers.back.gathering is not None
            scalar = scalar + layers(second)
        assert layers.there.gathering is outer
        assert layers.back.gathering is None
        scalar = scalar + layers(third)
    assert layers.there.gathering is None
    expected = layers(first) + layers(second) + layers(third)
    assert_near(gradients(scalar, *layers.parameters()), gradients(expected, *layers.parameters()))


def test_embeddings_in_contexts_within_one_another() -> None:
    """One table, looked up and used as output head inside and outside of the inner context."""
    table = Embedding(9, IN)
    ids = torch.tensor([1, 3, 3, 8])

    def scalar() -> Tensor:
        return (table(ids) @ table.table.T).sin().sum()

    with gathered_gradients(table):
        outer = table.gathered
        total = scalar()
        with gathered_gradients(table):
            assert table.gathered is outer
            total = total + scalar()
        assert table.gathered is outer is not None
        total = total + scalar()
    assert table.gathered is None
    assert_near(gradients(total, table.weight), gradients(3 * scalar(), table.weight))


# What a context leaves behind


def test_nothing_is_left_on_the_layers(layers: Recurrent) -> None:
    parts = [layers.there, layers.back]
    with gathered_gradients(layers):
        assert all(layer.gathering is not None for layer in parts)
    assert all(layer.gathering is None for layer in parts)
    with pytest.raises(RuntimeError, match="size"), gathered_gradients(layers):
        layers([*inputs_of([2, 1]), torch.zeros(2, IN + 1)])
    assert all(layer.gathering is None for layer in parts)
    assert list(layers.state_dict()) == [name for name, _ in layers.named_parameters()]


@torch.no_grad()
def test_without_gradients_nothing_is_gathered(layers: Recurrent) -> None:
    inputs = inputs_of([4, 1])
    expected = layers(inputs)
    with gathered_gradients(layers):
        assert layers.there.gathering is None
        assert torch.equal(layers(inputs), expected)


def test_only_the_layers_of_the_given_modules() -> None:
    ours, others, plain = Recurrent(bias=True), Recurrent(bias=True), nn.Linear(IN, OUT)
    with gathered_gradients(ours.there, nn.ModuleList([plain])):
        assert ours.there.gathering is not None
        assert ours.back.gathering is None
        assert others.there.gathering is None
        assert not hasattr(plain, "gathering")


@pytest.mark.parametrize("goes_back", [False, True])
def test_a_gathering_goes_with_the_graph(layers: Recurrent, goes_back: bool) -> None:
    """It holds copies of weights under autocast, and inputs: nothing may hold on to it, not even a cycle."""
    gc.collect()
    gc.disable()
    try:
        with gathered_gradients(layers):
            scalar = layers(inputs_of([4, 1, 1]))
            assert layers.there.gathering is not None
            held = weakref.ref(layers.there.gathering)
        if goes_back:
            scalar.backward()
        del scalar
        assert held() is None
    finally:
        gc.enable()


# The product for few tokens


@pytest.mark.parametrize("intel", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_product_equals_linear(bias: bool, intel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On either side of the number of tokens at which it is taken the other way round; only an Intel CPU does so."""
    monkeypatch.setattr(linear, "INTEL", intel)
    monkeypatch.setattr(linear, "LARGE", OUT * IN)
    weight_OI, bias_O = random_numbers(OUT, IN), random_numbers(OUT, seed=1) if bias else None
    other_way = []
    for tokens in range(0, 101):
        x_PI = random_numbers(tokens, IN, seed=tokens)
        expected_PO = F.linear(x_PI, weight_OI, bias_O)
        with monkeypatch.context() as patch:
            ordinary = Mock(wraps=F.linear)
            patch.setattr(F, "linear", ordinary)
            y_PO = product(x_PI, weight_OI, bias_O)
        torch.testing.assert_close(y_PO, expected_PO)
        assert y_PO.is_contiguous()
        if not ordinary.called:
            other_way.append(tokens)
    assert other_way == (list(range(8, 64)) if intel else [])


@pytest.mark.parametrize("tokens", [1, 2, 64, 65])
def test_without_gradients_the_output_is_the_same(layers: Recurrent, tokens: int) -> None:
    """The way without autograd, with and without autocast."""
    x_PI = random_numbers(tokens, IN)
    for autocast in (False, True):
        with bfloat16() if autocast else nullcontext():
            expected = layers.there(x_PI)
            with torch.no_grad():
                found = layers.there(x_PI)
        assert found.dtype == expected.dtype
        assert not found.requires_grad
        torch.testing.assert_close(found, expected)


# Embeddings


@pytest.mark.parametrize("uses_head", [True, False], ids=["lookups and head", "lookups alone"])
@pytest.mark.parametrize("lookups", [0, 1, 3])
def test_gathered_embeddings(lookups: int, uses_head: bool) -> None:
    """Rows looked up several times, in several calls of any shape, and the whole table as an output head."""
    generator = torch.Generator().manual_seed(0)
    embedding = Embedding(9, 4)
    ids = [torch.randint(9, shape, generator=generator) for shape in ((5,), (2, 3), (7,))][:lookups]
    weights = [torch.randn(*x.shape, 4, generator=generator) for x in ids]
    hidden_MD, grad_MV = torch.randn(6, 4, generator=generator), torch.randn(6, 9, generator=generator)
    found: list[torch.Tensor] = []
    for gathers in (False, True, True):  # twice: nothing is left from the first time
        embedding.weight.grad = None
        with gathered_gradients(embedding) if gathers else nullcontext():
            loss = 0 * embedding.weight.sum()
            for x, weight in zip(ids, weights, strict=True):
                loss = loss + (embedding(x) * weight).sum()
            if uses_head:
                loss = loss + ((hidden_MD @ embedding.table.T) * grad_MV).sum()
        assert embedding.gathered is None
        loss.backward()
        assert embedding.weight.grad is not None
        found.append(embedding.weight.grad)
    for gathered in found[1:]:
        torch.testing.assert_close(gathered, found[0], atol=1e-5, rtol=1e-5)


def test_going_back_through_an_embedding_again() -> None:
    """The same gradient as the first time: what lookups have left behind is used up."""
    embedding = Embedding(9, 4)
    with gathered_gradients(embedding):
        loss = embedding(torch.tensor([1, 3, 1])).sin().sum() + (embedding.table @ torch.ones(4)).cos().sum()
    first, second = (torch.autograd.grad(loss, embedding.weight, retain_graph=True)[0].clone() for _ in range(2))
    expected = torch.autograd.grad(
        embedding(torch.tensor([1, 3, 1])).sin().sum() + (embedding.weight @ torch.ones(4)).cos().sum(),
        embedding.weight,
    )[0]
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, expected)


def test_embeddings_of_which_only_the_inputs_are_asked() -> None:
    """What a backward pass leaves behind that asks for other gradients alone is not counted in the next one."""
    embedding, scale = Embedding(5, 3), torch.ones(3, requires_grad=True)
    with gathered_gradients(embedding):
        loss = (embedding(torch.tensor([1, 1, 4])) * scale).sum()
    torch.autograd.grad(loss, scale, retain_graph=True)
    loss.backward()
    assert embedding.weight.grad is not None
    assert embedding.weight.grad.sum(1).tolist() == [0, 6, 0, 0, 3]


@pytest.mark.parametrize("asks", ["table", "input", "both"])
@pytest.mark.parametrize("enough", [4, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_with_a_table(monkeypatch: pytest.MonkeyPatch, asks: str, enough: int, dtype: torch.dtype) -> None:
    """Scores and mixtures, several times over and beside lookups, as without gathering; going back twice as well."""
    monkeypatch.setattr(linear, "ENOUGH", enough)
    generator = torch.Generator().manual_seed(0)
    embedding, start_PD = Embedding(9, 4), torch.randn(3, 4, generator=generator, requires_grad=True)
    weight_PD = torch.randn(3, 4, generator=generator)
    wanted = {"table": (embedding.weight,), "input": (start_PD,), "both": (embedding.weight, start_PD)}[asks]

    def loss(gathers: bool) -> torch.Tensor:
        autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
        with autocast, gathered_gradients(embedding) if gathers else nullcontext():
            x_PD, ids = start_PD, torch.tensor([1, 3, 1])
            for _ in range(3):
                x_PD = embedding.mixtures(embedding.scores(x_PD).float().softmax(-1)) + embedding(ids)
            return (x_PD.float() * weight_PD).sum()

    expected = torch.autograd.grad(loss(gathers=False), wanted)
    ours, tolerance = loss(gathers=True), 1e-5 if dtype == torch.float32 else 0.02
    for _ in range(2):
        for found, right in zip(torch.autograd.grad(ours, wanted, retain_graph=True), expected, strict=True):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, right, atol=tolerance, rtol=tolerance)
