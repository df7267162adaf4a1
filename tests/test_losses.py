"""Head and loss in one, in chunks: against PyTorch's own cross-entropy of full logits; and shares, added up again."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from simcot_latent.model import losses
from simcot_latent.model.losses import CrossEntropy, Labelled, Targets, add_up, cross_entropy, share

WIDTH, VOCAB = 8, 11


def random_part(n_labels: int, table_VD: Tensor | None = None, seed: int = 0) -> Labelled:
    """Random labels with random scales, one of which is 0; all floating-point leaves want a gradient."""
    generator = torch.Generator().manual_seed(seed)
    hidden_MD = torch.randn(n_labels, WIDTH, generator=generator).requires_grad_()
    if table_VD is None:
        table_VD = torch.randn(VOCAB, WIDTH, generator=generator).requires_grad_()
    scale_M = torch.rand(n_labels, generator=generator)
    scale_M[n_labels // 2 : n_labels // 2 + 1] = 0.0
    return Labelled(hidden_MD, table_VD, torch.randint(VOCAB, (n_labels,), generator=generator), scale_M)


def one_part() -> list[Labelled]:
    return [random_part(8)]


def two_parts_of_one_table() -> list[Labelled]:
    """As answers and steps of a tied model are: 5 labels and 9."""
    first = random_part(5)
    return [first, random_part(9, first.table_VD, seed=1)]


def two_parts_of_two_tables() -> list[Labelled]:
    """As of a model with an output head of its own."""
    return [random_part(5), random_part(9, seed=1)]


def leaves(parts: Sequence[Labelled]) -> list[Tensor]:
    """What is to get a gradient, each once."""
    tensors = [part.hidden_MD for part in parts] + [part.table_VD for part in parts]
    return list({id(tensor): tensor for tensor in tensors}.values())


def textbook(parts: Sequence[Labelled], softcap: float | None = None) -> CrossEntropy:
    """Full logits, PyTorch's cross-entropy, autograd."""
    nll: list[Tensor] = []
    correct: list[Tensor] = []
    for part in parts:
        logits_MV = F.linear(part.hidden_MD, part.table_VD).float()
        if softcap is not None:
            logits_MV = softcap * torch.tanh(logits_MV / softcap)
        nll.append(F.cross_entropy(logits_MV, part.label_M, reduction="none"))
        correct.append(logits_MV.argmax(-1) == part.label_M)
    nll_M = torch.cat(nll)
    return CrossEntropy((nll_M * torch.cat([part.scale_M for part in parts])).sum(), nll_M, torch.cat(correct))


@dataclass
class Recorder(TorchDispatchMode):
    """While it is entered, counts operations and notes how large their results get, in numbers."""

    largest: int = 0
    calls: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def cut(monkeypatch: pytest.MonkeyPatch, per_chunk: int, per_piece: int, vocab: int = VOCAB) -> None:
    """Makes `cross_entropy` go in chunks and pieces of so many labels, at float32; a few bytes more, as in life."""
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * (per_chunk * vocab + 2))
    monkeypatch.setattr(losses, "PIECE_NUMBERS", per_piece * vocab + 2)


# Where labels are


def test_targets_from_lists() -> None:
    targets = Targets.of([4, 5, 6], [1.0, 2.0, 0.5], [False, True, True])
    assert len(targets) == 3
    assert (targets.label_M.tolist(), targets.label_M.dtype) == ([4, 5, 6], torch.long)
    assert (targets.weight_M.tolist(), targets.weight_M.dtype) == ([1, 2, 0.5], torch.float32)
    assert (targets.step_M.tolist(), targets.step_M.dtype) == ([False, True, True], torch.bool)


def test_targets_of_nothing_have_their_types_too() -> None:
    nothing = Targets.of([], [], [])
    assert len(nothing) == 0
    assert [t.dtype for t in (nothing.label_M, nothing.weight_M, nothing.step_M)] == [
        torch.long,
        torch.float32,
        torch.bool,
    ]


# Cross-entropy


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("make_parts", [one_part, two_parts_of_one_table, two_parts_of_two_tables])
@pytest.mark.parametrize("sizes", [(0, 0), (3, 2), (6, 4), (6, 100), None])
def test_cross_entropy_equals_pytorch_with_full_logits(
    make_parts: Callable[[], list[Labelled]],
    softcap: float | None,
    sizes: tuple[int, int] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Loss, each label's part of it, correctness and the gradients of all hidden states and tables: of one label at a
    time, of chunks of 3 or of 6 in pieces of 2, of 4 or whole, the last ones smaller, and of all labels at once."""
    if sizes is not None:
        cut(monkeypatch, *sizes)
    parts = make_parts()
    found, expected = cross_entropy(*parts, softcap=softcap), textbook(parts, softcap)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(found.nll_M, expected.nll_M.detach(), atol=1e-5, rtol=1e-6)
    assert torch.equal(found.correct_M, expected.correct_M)
    assert not found.nll_M.requires_grad
    assert not found.correct_M.requires_grad
    tensors = leaves(parts)
    ours = torch.autograd.grad(found.loss, tensors)
    theirs = torch.autograd.grad(expected.loss, tensors)
    for our, their in zip(ours, theirs, strict=True):
        assert their.abs().max() > 0.01
        torch.testing.assert_close(our, their, atol=1e-6, rtol=1e-5)


def test_the_softcap_matters() -> None:
    """Else the test above would not notice its loss."""
    part = random_part(8)
    assert abs(cross_entropy(part).loss - cross_entropy(part, softcap=1.5).loss) > 0.1


def test_the_weighted_loss_in_closed_form() -> None:
    """sum(w * ce) / sum(w), and its gradient w * (softmax - onehot) / sum(w): with the identity for a table, hidden
    states are logits."""
    labels, weights = [4, 5, 6, 7, 8, 9, 10, 0], [1.0, 2.0, 2.0, 1.0, 2.0, 0.5, 1.0, 1.0]
    logits_MV = torch.randn(8, VOCAB, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weight_M = torch.tensor(weights)
    loss = cross_entropy(Labelled(logits_MV, torch.eye(VOCAB), torch.tensor(labels), weight_M / weight_M.sum())).loss
    total = 0.0
    expected_MV = torch.zeros(8, VOCAB)
    for at, (label, weight) in enumerate(zip(labels, weights, strict=True)):
        scores = logits_MV[at].tolist()
        exponentials = [math.exp(score) for score in scores]
        total += weight * (math.log(sum(exponentials)) - scores[label])
        probabilities_V = torch.tensor([e / sum(exponentials) for e in exponentials])
        expected_MV[at] = weight * (probabilities_V - F.one_hot(torch.tensor(label), VOCAB)) / 10.5
    assert loss.item() == pytest.approx(total / 10.5, rel=1e-6)
    (gradient_MV,) = torch.autograd.grad(loss, logits_MV)
    torch.testing.assert_close(gradient_MV, expected_MV, atol=1e-6, rtol=1e-5)


def test_a_tie_is_correct_for_either() -> None:
    """Correct is a label than which nothing is likelier."""
    hidden_MD = torch.tensor([[1.0, 1.0, 0.0]]).expand(3, -1)
    found = cross_entropy(Labelled(hidden_MD, torch.eye(3), torch.arange(3), torch.ones(3)))
    assert found.correct_M.tolist() == [True, True, False]


@pytest.mark.parametrize("make_parts", [one_part, two_parts_of_two_tables])
def test_the_gradient_is_scaled_by_what_becomes_of_the_loss(make_parts: Callable[[], list[Labelled]]) -> None:
    """As DDP needs it: 3 * loss + loss ** 2, whose derivative is 3 + 2 * loss."""
    parts = make_parts()
    tensors = leaves(parts)
    plain = torch.autograd.grad(cross_entropy(*parts).loss, tensors)
    loss = cross_entropy(*parts).loss
    for our, gradient in zip(torch.autograd.grad(3 * loss + loss**2, tensors), plain, strict=True):
        torch.testing.assert_close(our, (3 + 2 * loss.detach()) * gradient)


def test_gradients_are_handed_out_once() -> None:
    """They are scaled in place: a second time they would be wrong, so there is none."""
    part = random_part(8)
    loss = cross_entropy(part).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed out already: backward only once"):
        loss.backward()


@pytest.mark.parametrize("wanted", ["hidden_MD", "table_VD"])
def test_only_gradients_that_are_wanted(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states of a frozen model, or a frozen table: the other's gradient is the same, its product is saved."""
    cut(monkeypatch, 3, 2)
    part = random_part(8)
    expected = torch.autograd.grad(cross_entropy(part).loss, getattr(part, wanted))[0]
    alone = Labelled(part.hidden_MD.detach(), part.table_VD.detach(), part.label_M, part.scale_M)
    getattr(alone, wanted).requires_grad_()
    with Recorder() as recorder:
        loss = cross_entropy(alone).loss
    assert recorder.calls["mm"] + recorder.calls["addmm"] == 2 * 3, "a chunk: its logits, and one gradient"
    assert torch.equal(torch.autograd.grad(loss, getattr(alone, wanted))[0], expected)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_without_gradients_none_is_computed(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation: the same numbers, from one product a chunk."""
    cut(monkeypatch, 3, 2)
    part = random_part(8)
    with_gradients = cross_entropy(part, softcap=softcap)
    with torch.no_grad(), Recorder() as recorder:
        found = cross_entropy(part, softcap=softcap)
    assert recorder.calls["mm"] == 3
    assert not {"addmm", "scatter_add_", "exp_"} & set(recorder.calls)
    assert not found.loss.requires_grad
    for ours, theirs in zip(found, with_gradients, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_full_logits_are_never_held(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, no result of any operation is larger than a chunk, whatever the number of labels."""
    n_labels, per_chunk = 500, 10
    cut(monkeypatch, per_chunk, 3, vocab=1000)
    generator = torch.Generator().manual_seed(0)
    hidden_MD = torch.randn(n_labels, WIDTH, generator=generator).requires_grad_()
    table_VD = torch.randn(1000, WIDTH, generator=generator).requires_grad_()
    label_M = torch.randint(1000, (n_labels,), generator=generator)
    part = Labelled(hidden_MD, table_VD, label_M, torch.ones(n_labels))
    with Recorder() as recorder:
        cross_entropy(part, softcap=softcap).loss.backward()
    assert recorder.largest == per_chunk * 1000
    with Recorder() as recorder:
        textbook([part], softcap).loss.backward()
    assert recorder.largest == n_labels * 1000, "the recorder would have seen them"


@pytest.mark.parametrize("make_parts", [two_parts_of_one_table, two_parts_of_two_tables])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_in_bfloat16_autocast(
    make_parts: Callable[[], list[Labelled]], softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very losses of ordinary autocast (a product of rounded numbers), near those in float32, as are the gradients,
    which come in the parameters' own format."""
    cut(monkeypatch, 2, 3)
    parts = make_parts()
    tensors = leaves(parts)
    full = cross_entropy(*parts, softcap=softcap)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, ordinary = cross_entropy(*parts, softcap=softcap), textbook(parts, softcap)
    assert found.loss.dtype == found.nll_M.dtype == torch.float32
    torch.testing.assert_close(found.nll_M, ordinary.nll_M.detach(), atol=1e-5, rtol=1e-5)
    assert (found.nll_M - full.nll_M).abs().max() > 1e-4, "autocast must have had an effect"
    torch.testing.assert_close(found.loss, full.loss, atol=0.0, rtol=0.02)
    ours, theirs = torch.autograd.grad(found.loss, tensors), torch.autograd.grad(full.loss, tensors)
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == torch.float32
        assert (our - their).norm() < 0.02 * their.norm()


@given(
    st.integers(0, 12),
    st.lists(st.integers(0, 12), max_size=3).map(sorted),
    st.integers(1, 14),
    st.integers(1, 14),
    st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=50)
def test_any_cut_of_the_labels(n_labels: int, cuts: list[int], per_chunk: int, per_piece: int, seed: int) -> None:
    """Parts, chunks and pieces of any size, empty ones among them, give loss and gradients of all labels at once."""
    whole = random_part(n_labels, seed=seed)
    expected = cross_entropy(whole)
    pieces = [slice(a, b) for a, b in pairwise([0, *cuts, max([n_labels, *cuts])])]
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, per_chunk, per_piece)
        found = cross_entropy(*[
            Labelled(whole.hidden_MD[piece], whole.table_VD, whole.label_M[piece], whole.scale_M[piece])
            for piece in pieces
        ])  # fmt: skip
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    tensors = leaves([whole])
    for our, their in zip(
        torch.autograd.grad(found.loss, tensors), torch.autograd.grad(expected.loss, tensors), strict=True
    ):
        torch.testing.assert_close(our, their, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_no_labels_lose_nothing_with_a_zero_gradient(softcap: float | None) -> None:
    """No label of a kind in a whole step, alone and beside others: nothing is lost, and no nan gets into the model."""
    part, other = random_part(0), random_part(4, seed=1)
    found = cross_entropy(part, softcap=softcap)
    assert found.loss.item() == 0
    assert found.nll_M.shape == found.correct_M.shape == (0,)
    for gradient, leaf in zip(torch.autograd.grad(found.loss, leaves([part])), leaves([part]), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))
    assert torch.equal(cross_entropy(part, other).loss, cross_entropy(other).loss)


# Shares


@given(st.lists(st.floats(-5, 5, width=32), max_size=30), st.lists(st.integers(0, 30), max_size=5))
@settings(deadline=None)
def test_shares_add_up(values: list[float], cuts: list[int]) -> None:
    """Any cut of the labels of a step gives pieces whose shares add up to the whole's."""
    values_M, total = torch.tensor(values), torch.tensor(7.5)
    pieces = torch.tensor_split(values_M, sorted(cuts))
    added = add_up([{"loss": share(piece, total)} for piece in pieces])["loss"]
    assert added.item() == pytest.approx(math.fsum(values) / 7.5, abs=1e-5)


def test_an_empty_share_is_zero_with_a_zero_gradient() -> None:
    nothing_M = torch.zeros(0, requires_grad=True)
    loss = share(nothing_M, nothing_M.detach().sum())
    assert loss.item() == 0
    assert torch.autograd.grad(loss, nothing_M)[0].shape == (0,)


def test_labels_that_all_weigh_nothing_are_zero_too() -> None:
    """step_weight_multiplier=0 on nothing but steps: 0 / 0 is no loss, not nan."""
    values_M = torch.tensor([1.5, 2.5], requires_grad=True)
    loss = share(values_M * 0, torch.tensor(0.0))
    assert loss.item() == 0
    assert torch.autograd.grad(loss, values_M)[0].tolist() == [0, 0]


def test_add_up_by_key() -> None:
    parts = [{"a": torch.tensor(1.0), "b": torch.tensor([1.0, 2.0])}, {"a": torch.tensor(0.5), "b": torch.ones(2)}]
    added = add_up(parts)
    assert added["a"].item() == 1.5
    assert added["b"].tolist() == [2, 3]
