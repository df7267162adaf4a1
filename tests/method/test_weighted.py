"""mode=weighted: the loss against formulas, plain fine-tuning at multiplier 1, the same whatever way a step is cut.

Problems of a batch are packed: it is proven here that none of them sees another.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from simcot_latent import method as method_module
from simcot_latent.batches import WrittenBatch
from simcot_latent.config import MethodConfig, RunConfig
from simcot_latent.curricula.base import Stage
from simcot_latent.data.format import AnswerFormat, Example
from simcot_latent.data.problem import Problem
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.method import Method
from simcot_latent.model.gpt import GPT
from simcot_latent.model.losses import CrossEntropy, Labelled, add_up, cross_entropy
from simcot_latent.model.packing import Packing, tight_rectangles

WRITES = Stage()

MakeMethod = Callable[..., Method]


@pytest.fixture(scope="module")
def make_method(make_model: Callable[..., GPT], make_run: Callable[..., RunConfig], tokenizer: Tokenizer) -> MakeMethod:
    """`make_method(family="llama", tokenizer=..., **run)`: the same random model each time."""

    def make(family: str = "llama", tokenizer: Tokenizer = tokenizer, **run: object) -> Method:
        model = make_model(family, vocab_size=tokenizer.n_vocab, context_length=256)
        return Method(model, tokenizer, make_run(**run), MethodConfig())

    return make


def collate(method: Method, examples: Sequence[Example]) -> WrittenBatch:
    batch = method.collate(examples, WRITES)
    assert isinstance(batch, WrittenBatch)
    return batch


def run_step(
    method: Method, examples: Sequence[Example], cuts: Sequence[int] = ()
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Shares and gradients of an optimizer step whose examples are cut into micro-batches."""
    pieces = [examples[a:b] for a, b in pairwise([0, *cuts, len(examples)]) if a < b]
    batches = [collate(method, piece) for piece in pieces]
    totals = add_up([batch.totals for batch in batches])
    method.zero_grad()
    shares = []
    for batch in batches:
        shares.append(method(batch, totals))
        shares[-1]["loss"].backward()
    gradients = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    return {key: value.detach() for key, value in add_up(shares).items()}, gradients


def assert_gradients_of(method: Method, gradients: dict[str, Tensor]) -> None:
    """That the parameters hold these very gradients, to rounding, and that none of them is zero."""
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None
        scale = parameter.grad.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(
            gradients[name],
            parameter.grad,
            atol=1e-4 * scale,
            rtol=1e-4,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def written_ids(example: Example) -> list[int]:
    """A problem as it is written, from its question to the end token."""
    return example.question + example.rationale.ids + example.answer.ids


def label_rows(batch: WrittenBatch) -> Tensor:
    """The row of every label: that of the token which is to predict it, the last tokens of the batch."""
    return batch.packing.row_P[-len(batch.targets) :]


def naive_labels(method: Method, example: Example) -> list[tuple[float, float, bool, bool]]:
    """(weight, cross-entropy, in a step, correct) of every label of one example alone, in plain Python."""
    ids = written_ids(example)
    in_step = example.rationale.in_step + example.answer.in_step
    with torch.no_grad():
        logits_TV = method.model.logits(method.model(torch.tensor([ids])))[0].double()
    labels = []
    for offset, inside in enumerate(in_step):
        at = len(example.question) + offset
        scores_V = logits_TV[at - 1]  # the state before a token predicts it
        loss = (scores_V.exp().sum().log() - scores_V[ids[at]]).item()
        weight = method.run.step_weight_multiplier if inside else 1.0
        labels.append((weight, loss, inside, int(scores_V.argmax()) == ids[at]))
    return labels


@pytest.mark.parametrize("family", ["gpt2", "llama", "nanochat"])
@pytest.mark.parametrize("multiplier", [2.0, 1.0, 0.0, 3.5])
def test_the_loss_in_closed_form(
    make_method: MakeMethod, problems: list[Problem], family: str, multiplier: float
) -> None:
    """sum(w * ce) / sum(w) over solutions and answers, none on questions, each row as if it were alone."""
    method = make_method(family, step_weight_multiplier=multiplier)
    examples = [method.encode(problem) for problem in problems]
    shares, _ = run_step(method, examples)
    labels = [label for example in examples for label in naive_labels(method, example)]
    weights = math.fsum(weight for weight, *_ in labels)
    assert shares["loss"].item() == pytest.approx(
        math.fsum(weight * loss for weight, loss, *_ in labels) / weights, rel=1e-5
    )
    totals = collate(method, examples).totals
    assert totals["weights"].item() == pytest.approx(weights)
    assert totals["tokens"].item() == len(labels)
    assert totals["step_tokens"].item() == sum(inside for _, _, inside, _ in labels)


def test_step_accuracy_counts_step_tokens_only(make_method: MakeMethod, problems: list[Problem]) -> None:
    """Teacher-forced: of a model that always finds the digit 2 most likely, the share of twos among step tokens."""
    method = make_method("gpt2")
    examples = [method.encode(problem) for problem in problems]
    (two,) = method.tokenizer.encode("2")
    norm = method.model.transformer.norm
    assert isinstance(norm, nn.LayerNorm)
    with torch.no_grad():  # every hidden state is the last norm's bias, and that is nearest to the digit
        norm.weight.zero_()
        norm.bias.fill_(1.0)
        method.model.output_table[two] = 10.0
    shares, _ = run_step(method, examples)
    step_tokens = [i for example in examples for step in example.steps for i in step.ids]
    assert 0 < step_tokens.count(two) < len(step_tokens)
    assert shares["step_accuracy"].item() == pytest.approx(step_tokens.count(two) / len(step_tokens))


def test_multiplier_one_is_plain_fine_tuning_to_the_last_bit(make_method: MakeMethod, problems: list[Problem]) -> None:
    """The same loss and the same gradients, bit for bit, as code that knows of no weights."""
    method = make_method(step_weight_multiplier=1.0)
    examples = [method.encode(problem) for problem in problems]
    shares, gradients = run_step(method, examples)

    plain = make_method(step_weight_multiplier=1.0).model
    rows = [written_ids(example) for example in examples]
    # Up to the last token of its question a row predicts nothing.
    silent = [row[: len(e.question) - 1] for row, e in zip(rows, examples, strict=True)]
    predicting = [row[len(e.question) - 1 : -1] for row, e in zip(rows, examples, strict=True)]
    labels = [i for row, e in zip(rows, examples, strict=True) for i in row[len(e.question) :]]
    ids_P = torch.tensor([i for part in (silent, predicting) for row in part for i in row])
    packing = Packing.of([len(row) for row in silent], [len(row) for row in predicting], tight=True)
    hidden_MD = plain(ids_P, packing, read_out=len(labels))
    mean_M = torch.full((len(labels),), 1.0) / len(labels)
    loss = cross_entropy(Labelled(hidden_MD, plain.output_table, torch.tensor(labels), mean_M)).loss
    loss.backward()
    assert torch.equal(shares["loss"], loss.detach())
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(gradients[f"model.{name}"], parameter.grad), name


@pytest.mark.parametrize("family", ["gpt2", "llama", "nanochat"])
def test_multiplier_one_is_the_textbook_loss(make_method: MakeMethod, problems: list[Problem], family: str) -> None:
    """PyTorch's own mean over a padded batch, questions and padding ignored: loss and gradients, to rounding."""
    method = make_method(family, step_weight_multiplier=1.0)
    examples = [method.encode(problem) for problem in problems]
    shares, gradients = run_step(method, examples)
    rows = [written_ids(example) for example in examples]
    length = max(map(len, rows))
    ids_BT = torch.tensor([row + [method.tokenizer.pad_id] * (length - len(row)) for row in rows])
    labels_BT = torch.full_like(ids_BT, -100)
    for row, example in enumerate(examples):
        labelled = slice(len(example.question), len(rows[row]))
        labels_BT[row, labelled] = ids_BT[row, labelled]
    method.zero_grad()
    logits_BTV = method.model.logits(method.model(ids_BT))
    textbook = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten())
    textbook.backward()
    torch.testing.assert_close(shares["loss"], textbook.detach(), atol=1e-6, rtol=1e-6)
    assert_gradients_of(method, gradients)


def test_the_multiplier_matters(make_method: MakeMethod, problems: list[Problem]) -> None:
    losses = []
    for multiplier in (1.0, 2.0):
        method = make_method(step_weight_multiplier=multiplier)
        losses.append(run_step(method, [method.encode(problem) for problem in problems])[0]["loss"].item())
    assert abs(losses[0] - losses[1]) > 1e-4


@given(cuts=st.lists(st.integers(0, 5), max_size=4).map(sorted), order=st.permutations(range(5)))
@settings(deadline=None, max_examples=15)
def test_any_cut_into_micro_batches_is_the_same_step(
    make_method: MakeMethod, problems: list[Problem], cuts: list[int], order: list[int]
) -> None:
    """Normalised over the whole optimizer step: pieces of unequal size, length and share of steps add up to it."""
    method = make_method()
    examples = [method.encode(problem) for problem in problems]
    shares, gradients = run_step(method, examples)
    cut_shares, cut_gradients = run_step(method, [examples[i] for i in order], cuts)
    assert shares.keys() == cut_shares.keys() == {"loss", "step_accuracy"}
    for key, value in shares.items():
        torch.testing.assert_close(cut_shares[key], value, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(cut_gradients[name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "nanochat"])
def test_a_batch_equals_its_problems_one_by_one(make_method: MakeMethod, problems: list[Problem], family: str) -> None:
    """Loss and gradients of the packed batch: those of a pass over each problem alone, its weighted cross-entropies
    taken from ordinary logits and divided by the weights of all."""
    method = make_method(family, step_weight_multiplier=2.0)
    examples = [method.encode(problem) for problem in problems]
    shares, gradients = run_step(method, examples)
    method.zero_grad()
    in_steps = [[*example.rationale.in_step, *example.answer.in_step] for example in examples]
    weight = sum(2.0 if inside else 1.0 for in_step in in_steps for inside in in_step)
    total = 0.0
    for example, in_step in zip(examples, in_steps, strict=True):
        ids_1T = torch.tensor([written_ids(example)])
        logits_TV = method.model.logits(method.model(ids_1T[:, :-1]))[0]
        loss_T = F.cross_entropy(logits_TV, ids_1T[0, 1:], reduction="none")[-len(in_step) :]
        loss = (torch.tensor([2.0 if inside else 1.0 for inside in in_step]) * loss_T).sum() / weight
        loss.backward()
        total += loss.item()
    assert shares["loss"].item() == pytest.approx(total, rel=1e-5)
    assert_gradients_of(method, gradients)


@pytest.mark.parametrize("family", ["gpt2", "llama", "nanochat"])
def test_no_problem_sees_another(
    make_method: MakeMethod, problems: list[Problem], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Another question in one place, of the same length or longer than all others: every label of that problem loses
    something else, those of all others what they lost before."""
    method = make_method(family)
    found: list[CrossEntropy] = []

    def spy(*parts: Labelled, softcap: float | None) -> CrossEntropy:
        found.append(cross_entropy(*parts, softcap=softcap))
        return found[-1]

    monkeypatch.setattr(method_module, "cross_entropy", spy)

    def losses_of(problems: Sequence[Problem]) -> tuple[Tensor, Tensor]:
        """Of every label; and which problem it belongs to."""
        batch = collate(method, [method.encode(problem) for problem in problems])
        with torch.no_grad():
            method(batch, batch.totals)
        return found[-1].nll_M, label_rows(batch)

    before_M, row_M = losses_of(problems)
    longest = max(len(method.tokenizer.encode(problem.question)) for problem in problems)
    for changed, problem in enumerate(problems):
        for question in (problem.question[::-1], "7" * (longest + 20)):
            others = [replace(p, question=question) if i == changed else p for i, p in enumerate(problems)]
            after_M, same_row_M = losses_of(others)
            assert torch.equal(row_M, same_row_M)
            is_other_M = row_M != changed
            torch.testing.assert_close(after_M[is_other_M], before_M[is_other_M], atol=1e-5, rtol=1e-5)
            assert ((after_M - before_M)[~is_other_M].abs() > 1e-4).all()


def test_the_last_tokens_of_a_batch_predict_its_labels(make_method: MakeMethod, problems: list[Problem]) -> None:
    """In the order of the labels: the label is the token after the one that predicts it. And the tokens of each row,
    put in order, are its problem, of which only the end token is not read."""
    method = make_method()
    examples = [method.encode(problem) for problem in problems]
    batch = collate(method, examples)
    packing, n_labels = batch.packing, len(batch.targets)
    places = zip(packing.row_P.tolist(), packing.offset_P.tolist(), strict=True)
    at = {place: i for i, place in enumerate(places)}
    assert len(at) == len(batch.ids_P) == len(packing)
    for row, example in enumerate(examples):
        ids = written_ids(example)
        assert batch.ids_P[[at[row, offset] for offset in range(len(ids) - 1)]].tolist() == ids[:-1]
        predicting = [at[row, offset] for offset in range(len(example.question) - 1, len(ids) - 1)]
        labels = [i - (len(batch.ids_P) - n_labels) for i in predicting]
        assert batch.targets.label_M[labels].tolist() == ids[len(example.question) :]
    assert n_labels == sum(len(example.rationale) + len(example.answer) for example in examples)


@pytest.mark.parametrize("rationale", ["natural", "equations"])
def test_the_weights_lie_on_the_steps(
    make_method: MakeMethod, either_tokenizer: Tokenizer, problems: list[Problem], rationale: str
) -> None:
    """Read back from the batch: labels that touch a step weigh 2, all others 1; together they spell the solution."""
    tokenizer = either_tokenizer
    method = make_method(tokenizer=tokenizer, rationale=rationale, step_weight_multiplier=2.0)
    batch = collate(method, [method.encode(problem) for problem in problems])
    assert set(batch.targets.weight_M.tolist()) == {1.0, 2.0}
    assert torch.equal(batch.targets.weight_M == 2.0, batch.targets.step_M)
    rows = label_rows(batch)
    for row, problem in enumerate(problems):
        labels = batch.targets.label_M[rows == row].tolist()
        solution = problem.rationale if rationale == "natural" else "\n".join(step.text for step in problem.steps)
        text = solution + ("\n" if solution else "") + f"#### {problem.answer}"
        assert tokenizer.decode(labels) == text
        # Character by character; some of GPT-2's tokens reach over a step's end (">>." or " <<"), and those count.
        steps = [match.span() for match in re.finditer(r"<<[^<>]*>>", text)]
        assert len(steps) == len(problem.steps)
        ends = accumulate((len(tokenizer.decode([i])) for i in labels), initial=0)
        touches = [any(a < end and start < b for start, end in steps) for a, b in pairwise(ends)]
        assert batch.targets.step_M[rows == row].tolist() == touches


def test_data_without_steps(make_method: MakeMethod, problems: list[Problem]) -> None:
    """Weights equal counts, step accuracy is 0 and not nan."""
    method = make_method()
    examples = [method.encode(replace(problem, steps=())) for problem in problems]
    totals = collate(method, examples).totals
    assert totals["weights"] == totals["tokens"]
    assert totals["step_tokens"] == 0
    shares, gradients = run_step(method, examples)
    assert shares["step_accuracy"].item() == 0
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_step_accuracy_is_tracked_only_where_asked(make_method: MakeMethod, problems: list[Problem]) -> None:
    method = make_method(track_step_accuracy=False)
    shares, _ = run_step(method, [method.encode(problem) for problem in problems])
    assert shares.keys() == {"loss"}


def test_it_writes_at_every_stage(make_method: MakeMethod) -> None:
    """The baseline has no thoughts, no decoder and no stages."""
    method = make_method()
    assert {method.stage_at(progress) for progress in (0.0, 0.5, 1.0)} == {WRITES}
    assert method.step_decoder is method.loop is None
    assert method.terms == {}
    assert method.answers == AnswerFormat()
    assert not method.parts_idle_without_thoughts
    assert method.extra_length == 0


def test_totals_count_positions(make_method: MakeMethod, problems: list[Problem]) -> None:
    """Tokens that are read, which is all but each row's last, and the rectangles that attention lays them out in: what
    padding costs is read from these."""
    method = make_method()
    examples = [method.encode(problem) for problem in problems]
    batch = collate(method, examples)
    lengths = [example.length - 1 for example in examples]
    assert batch.totals["positions"].item() == len(batch.ids_P) == sum(lengths)
    rectangles = tight_rectangles(sorted(lengths, reverse=True))
    assert batch.totals["slots"].item() == sum(rows * width for rows, width in rectangles) < len(lengths) * max(lengths)
