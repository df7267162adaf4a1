"""mode=latent: the dual loss against a literal reference, and proof that the step loss reaches the thoughts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from simcot_latent import method as method_module
from simcot_latent.batches import ThoughtBatch, WrittenBatch
from simcot_latent.config import DecoderConfig, LatentConfig, LossConfig, MethodConfig, RunConfig
from simcot_latent.curricula.base import Stage
from simcot_latent.curricula.replace import Replace
from simcot_latent.data.format import AnswerFormat, Example
from simcot_latent.data.problem import Problem
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.errors import UserError
from simcot_latent.loops.base import Thoughts
from simcot_latent.loops.pause import Pause
from simcot_latent.loops.sequential import Sequential, SequentialConfig, last_of_each
from simcot_latent.method import Method
from simcot_latent.model.gpt import GPT
from simcot_latent.model.losses import CrossEntropy, Labelled, add_up, cross_entropy
from simcot_latent.model.packing import Packing, tight_rectangles
from simcot_latent.terms.step_decoder import StepBatch, StepDecoder, StepDecoderTerm

GROUPS = 3
STEPS = [2, 0, 1, 4, 3]  # of the five problems: fewer than the groups, none, more, as many

REDUCTIONS = ["token", "coconut", "codi"]

MakeMethod = Callable[..., Method]


@pytest.fixture(scope="module")
def make_method(
    make_model: Callable[..., GPT],
    make_run: Callable[..., RunConfig],
    randomise: Callable[..., None],
    tokenizer: Tokenizer,
) -> MakeMethod:
    """`make_method(latent={...}, loss={...}, decoder={...}, parts={...}, family=..., **run)`: the same random weights
    each time.

    Three groups of one thought, unless `latent` says otherwise.
    """

    def make(
        latent: dict[str, Any] | None = None,
        loss: dict[str, Any] | None = None,
        decoder: dict[str, Any] | None = None,
        parts: dict[str, Any] | None = None,
        family: str = "llama",
        **run: Any,
    ) -> Method:
        weights: dict[str, Any] = {"step_weight": 1.0} | (loss or {})
        latent = {"n_latents": GROUPS, "latents_per_step": 1, "missing": "mask", "warmup": 0.0} | (latent or {})
        config = MethodConfig.simcot(
            LatentConfig(**latent),
            DecoderConfig(**(decoder or {})),
            LossConfig(**weights),
            **(parts or {}),
        )
        model = make_model(family, vocab_size=tokenizer.n_vocab, context_length=256)
        method = Method(model, tokenizer, make_run(**({"rationale": "equations"} | run)), config)
        if config.decoder.init == "random" and method.step_decoder is not None:
            randomise(method.step_decoder.transformer, seed=1)
        return method

    return make


def decoder_of(method: Method) -> StepDecoder:
    assert method.step_decoder is not None
    return method.step_decoder


def steps_of(batch: ThoughtBatch) -> StepBatch:
    """What the decoder is to say."""
    steps = batch.terms["step"]
    assert isinstance(steps, StepBatch)
    return steps


def stages_of(method: Method, groups_of_rows: Iterable[int]) -> list[Stage]:
    """The stage of each row, by how many steps thoughts replace in it."""
    assert isinstance(method.curriculum, Replace)
    return [method.curriculum.stage_of(groups) for groups in groups_of_rows]


def encode(method: Method, problems: Iterable[Problem]) -> list[Example]:
    return [method.encode(problem) for problem in problems]


def collate(method: Method, problems: Iterable[Problem]) -> ThoughtBatch:
    """A batch of the last stage."""
    batch = method.collate(encode(method, problems), method.last_stage)
    assert isinstance(batch, ThoughtBatch)
    return batch


def run_step(
    method: Method, batches: Sequence[WrittenBatch | ThoughtBatch]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Shares and gradients of an optimizer step of these micro-batches; no gradient counts as zero."""
    totals = add_up([batch.totals for batch in batches])
    method.zero_grad()
    shares = []
    for batch in batches:
        shares.append(method(batch, totals))
        shares[-1]["loss"].backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in method.named_parameters()
    }
    return {key: value.detach() for key, value in add_up(shares).items()}, gradients


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        scale = max(expected.abs().max().item(), 1e-3)
        torch.testing.assert_close(
            ours[name], expected, atol=2e-4 * scale, rtol=2e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


# The reference: one problem at a time, one vector at a time, formulas to the letter


def group_text(problem: Problem, group: int, surplus: str, missing: str) -> str | None:
    """What a group of the last stage is to say."""
    steps = [step.text for step in problem.steps]
    if group < len(steps):
        return "\n".join(steps[group:]) if group == GROUPS - 1 and surplus == "merge" else steps[group]
    return f"#### {problem.answer}" if missing == "answer" else None


@dataclass
class Reference:
    """Cross-entropies of a batch: of the answers' tokens, and of every row's every group's step tokens."""

    answers: list[Tensor]
    steps: list[list[list[Tensor]]]  # [row][group][token]; no tokens where nothing is taught

    def answer_loss(self) -> Tensor:
        return torch.stack(self.answers).mean()

    def step_loss(self, reduction: str) -> Tensor:
        """As the notes on the published code put it: "Coconut flavour: 1/groups * sum_g [ sum of token CE / samples
        with a label in g ]; CODI flavour: token mean a group, mean over the non-empty groups"."""
        by_group = [[row[group] for row in self.steps if row[group]] for group in range(GROUPS)]
        tokens = [[token for row in group for token in row] for group in by_group]
        if reduction == "coconut":
            return sum_of(sum_of(t) / len(rows) for t, rows in zip(tokens, by_group, strict=True) if rows) / GROUPS
        if reduction == "codi":
            filled = [group for group in tokens if group]
            return sum_of(sum_of(group) / len(group) for group in filled) / len(filled)
        return sum_of(token for group in tokens for token in group) / sum(map(len, tokens))


def sum_of(values: Iterable[Tensor]) -> Tensor:
    return sum(values, start=torch.zeros(()))


def reference(method: Method, problems: Sequence[Problem]) -> Reference:
    """Recomputes everything from scratch for each problem, without cache, packing or batches; of a method without a
    decoder, the answers alone."""
    model, decoder, tokenizer = method.model, method.step_decoder, method.tokenizer
    latent = method.config.latent
    table = model.embedding.weight
    found = Reference([], [])
    for problem in problems:
        vectors = [table[i] for i in [*tokenizer.encode(problem.question), tokenizer.bot_id]]
        thoughts = []
        for _ in range(latent.n_latents + (not latent.feeds_last)):
            if isinstance(method.loop, Pause):
                vectors.append(method.loop.pause_D)
            thoughts.append(model.transformer(torch.stack(vectors).unsqueeze(0))[0, -1])
            if isinstance(method.loop, Sequential):
                if (projector := method.loop.projector) is not None:
                    thoughts[-1] = projector(thoughts[-1])
                vectors.append(thoughts[-1])
        if not latent.feeds_last:
            vectors.pop()
        after = [tokenizer.eot_id, *tokenizer.encode(f"#### {problem.answer}"), tokenizer.end_id]
        vectors += [table[i] for i in after[:-1]]
        logits_TV = model.logits(model.transformer(torch.stack(vectors).unsqueeze(0))[0])
        first = len(vectors) - len(after) + 1
        found.answers += [F.cross_entropy(logits_TV[first + i], torch.tensor(t)) for i, t in enumerate(after[1:])]
        row: list[list[Tensor]] = []
        for group in range(GROUPS if decoder is not None else 0):
            assert decoder is not None
            text = group_text(problem, group, latent.surplus, latent.missing)
            ids = [] if text is None else [*tokenizer.encode(text), tokenizer.end_id]
            c = latent.latents_per_step
            prefix = [*thoughts[group * c : (group + 1) * c], *(table[i] for i in ids[:-1])]
            logits_LV = decoder.logits(decoder.transformer(torch.stack(prefix).unsqueeze(0))[0])
            row.append([F.cross_entropy(logits_LV[c - 1 + i], torch.tensor(t)) for i, t in enumerate(ids)])
        found.steps.append(row)
    return found


@pytest.mark.parametrize("per_step", [1, 2])
@pytest.mark.parametrize(("surplus", "missing"), product(["merge", "drop"], ["mask", "answer"]))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_loss_equals_the_reference(
    make_method: MakeMethod, problems: list[Problem], reduction: str, surplus: str, missing: str, per_step: int
) -> None:
    """Both losses, their weighted sum and its gradient, for every alignment and every way to average."""
    latent = {"n_latents": GROUPS * per_step, "latents_per_step": per_step, "surplus": surplus, "missing": missing}
    loss = {"answer_weight": 0.7, "step_weight": 1.3, "step_reduction": reduction}
    method = make_method(latent=latent, loss=loss)
    assert [len(problem.steps) for problem in problems] == STEPS
    shares, gradients = run_step(method, [collate(method, problems)])
    expected = reference(method, problems)
    torch.testing.assert_close(shares["answer_loss"], expected.answer_loss().detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shares["step_loss"], expected.step_loss(reduction).detach(), atol=1e-5, rtol=1e-5)
    total = 0.7 * expected.answer_loss() + 1.3 * expected.step_loss(reduction)
    torch.testing.assert_close(shares["loss"], total.detach(), atol=1e-5, rtol=1e-5)
    method.zero_grad()
    total.backward()
    assert_same_gradients(gradients, {name: p.grad for name, p in method.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("family", ["gpt2", "nanochat"])
def test_the_loss_equals_the_reference_in_other_families(
    make_method: MakeMethod, problems: list[Problem], family: str
) -> None:
    """Where answers and steps share one output table, with biases and learned positions, or with soft-capped logits."""
    latent = {"n_latents": 2 * GROUPS, "latents_per_step": 2}
    method = make_method(latent=latent, loss={"answer_weight": 0.7, "step_weight": 1.3}, family=family)
    shares, gradients = run_step(method, [collate(method, problems)])
    expected = reference(method, problems)
    total = 0.7 * expected.answer_loss() + 1.3 * expected.step_loss("token")
    torch.testing.assert_close(shares["loss"], total.detach(), atol=1e-5, rtol=1e-5)
    method.zero_grad()
    total.backward()
    assert_same_gradients(gradients, {name: p.grad for name, p in method.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("family", ["gpt2", "llama", "nanochat"])
def test_the_loss_of_pauses_equals_the_reference(make_method: MakeMethod, problems: list[Problem], family: str) -> None:
    """loop=pause, the control: both losses and the gradient, that of the vector among them."""
    latent = {"n_latents": 2 * GROUPS, "latents_per_step": 2}
    loss = {"answer_weight": 0.7, "step_weight": 1.3}
    method = make_method(latent=latent, loss=loss, family=family, parts={"loop": "pause"})
    batch = collate(method, problems)
    shares, gradients = run_step(method, [batch])
    expected = reference(method, problems)
    torch.testing.assert_close(shares["answer_loss"], expected.answer_loss().detach(), atol=1e-5, rtol=1e-5)
    total = 0.7 * expected.answer_loss() + 1.3 * expected.step_loss("token")
    torch.testing.assert_close(shares["loss"], total.detach(), atol=1e-5, rtol=1e-5)
    method.zero_grad()
    total.backward()
    assert gradients["loop.pause_D"].abs().max() > 1e-3
    assert_same_gradients(gradients, {name: p.grad for name, p in method.named_parameters() if p.grad is not None})
    read = sum(map(len, (batch.questions, batch.texts, steps_of(batch).steps.packing)))
    assert batch.totals["positions"].item() == read, "thoughts are read with the questions"


@pytest.mark.parametrize("projector_width", [None, 24])
@pytest.mark.parametrize("feeds_last", [True, False])
def test_the_last_thought_is_read_or_only_decoded(
    make_method: MakeMethod, problems: list[Problem], feeds_last: bool, projector_width: int | None
) -> None:
    """latent.feeds_last: both losses and the gradient are the reference's, which feeds the last thought or does not;
    latent.projector_width: a projector is trained with the rest.
    """
    # As many states for the decoder either way.
    latent: dict[str, Any] = {"n_latents": 2 * GROUPS - (not feeds_last), "latents_per_step": 2}
    latent |= {"feeds_last": feeds_last, "projector_width": projector_width}
    method = make_method(latent=latent, loss={"answer_weight": 0.7, "step_weight": 1.3})
    assert isinstance(method.loop, Sequential)
    assert method.loop.config == SequentialConfig(feeds_last, projector_width)
    shares, gradients = run_step(method, [collate(method, problems)])
    expected = reference(method, problems)
    torch.testing.assert_close(shares["answer_loss"], expected.answer_loss().detach(), atol=1e-5, rtol=1e-5)
    total = 0.7 * expected.answer_loss() + 1.3 * expected.step_loss("token")
    torch.testing.assert_close(shares["loss"], total.detach(), atol=1e-5, rtol=1e-5)
    method.zero_grad()
    total.backward()
    assert_same_gradients(gradients, {name: p.grad for name, p in method.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_groups_that_no_problem_teaches(make_method: MakeMethod, problems: list[Problem], reduction: str) -> None:
    """Groups without any label count among the groups in the Coconut flavour, not in the CODI flavour."""
    method = make_method(loss={"step_reduction": reduction})
    few = [problem for problem in problems if len(problem.steps) < GROUPS]
    assert max(len(problem.steps) for problem in few) == 2, "the third group must be empty"
    shares, _ = run_step(method, [collate(method, few)])
    expected = reference(method, few).step_loss(reduction)
    torch.testing.assert_close(shares["step_loss"], expected.detach(), atol=1e-5, rtol=1e-5)


def test_the_reductions_differ(make_method: MakeMethod, problems: list[Problem]) -> None:
    """Else the test above could not tell them apart."""
    losses = [
        run_step(method, [collate(method, problems)])[0]["step_loss"].item()
        for method in (make_method(loss={"step_reduction": reduction}) for reduction in REDUCTIONS)
    ]
    assert min(abs(a - b) for a, b in ((losses[0], losses[1]), (losses[0], losses[2]), (losses[1], losses[2]))) > 1e-3


@pytest.mark.parametrize("reduction", REDUCTIONS)
@given(cuts=st.lists(st.integers(0, 5), max_size=4).map(sorted), order=st.permutations(range(5)))
@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.too_slow])
def test_any_cut_into_micro_batches_is_the_same_step(
    make_method: MakeMethod, problems: list[Problem], reduction: str, cuts: list[int], order: list[int]
) -> None:
    """Pieces of unequal size, one of them perhaps without a step, add up to the whole: shares and gradients."""
    method = make_method(loss={"step_reduction": reduction})
    shares, gradients = run_step(method, [collate(method, problems)])
    pieces = [[problems[i] for i in order[a:b]] for a, b in pairwise([0, *cuts, 5]) if a < b]
    cut_shares, cut_gradients = run_step(method, [collate(method, piece) for piece in pieces])
    assert shares.keys() == cut_shares.keys() == {"loss", "answer_loss", "step_loss", "step_accuracy"}
    for key, value in shares.items():
        torch.testing.assert_close(cut_shares[key], value, atol=1e-5, rtol=1e-5)
    assert_same_gradients(cut_gradients, gradients)


# Label by label


@dataclass
class SeenLabels:
    """What one batch asks of `cross_entropy`, and what it finds."""

    answers: Labelled
    steps: Labelled
    found: CrossEntropy


def watch_labels(monkeypatch: pytest.MonkeyPatch) -> list[SeenLabels]:
    """From now on keeps the labels of every batch in the list it returns."""
    seen: list[SeenLabels] = []

    def spy(answers: Labelled, steps: Labelled, softcap: float | None) -> CrossEntropy:
        found = cross_entropy(answers, steps, softcap=softcap)
        seen.append(SeenLabels(answers, steps, found))
        return found

    monkeypatch.setattr(method_module, "cross_entropy", spy)
    return seen


@pytest.mark.parametrize("missing", ["mask", "answer"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_what_each_label_counts(
    make_method: MakeMethod,
    problems: list[Problem],
    monkeypatch: pytest.MonkeyPatch,
    reduction: str,
    missing: str,
) -> None:
    """In a stage in which steps are still written: answer_weight * w / sum(w) and step_weight * what `step_reduction`
    says, over the labels of the whole optimizer step, here of two batches."""
    seen = watch_labels(monkeypatch)
    method = make_method(
        latent={"missing": missing},
        loss={"answer_weight": 0.7, "step_weight": 1.3, "step_reduction": reduction},
        step_weight_multiplier=2.0,
    )
    encoder, stage = method.tokenizer, 2
    batches = [
        method.collate(encode(method, piece), Stage(stage, first_written=stage))
        for piece in (problems[:2], problems[2:])
    ]
    run_step(method, batches)

    # Of every text token, and of every group's step token.
    weights = [
        [w for step in p.steps[stage:] for w in [2.0] * len(encoder.encode(step.text)) + [1.0]]
        + [1.0] * (len(encoder.encode(f"#### {p.answer}")) + 1)
        for p in problems
    ]
    lengths = [
        [
            0 if text is None else len(encoder.encode(text)) + 1
            for text in (group_text(p, g, "merge", missing) for g in range(stage))
        ]
        for p in problems
    ]
    by_group = [[row[group] for row in lengths if row[group]] for group in range(stage)]
    of_group = {
        "token": [1 / sum(map(sum, by_group))] * stage,
        "coconut": [1 / (stage * len(filled)) for filled in by_group],
        "codi": [1 / (stage * sum(filled)) for filled in by_group],
    }[reduction]
    for rows, batch in zip((range(2), range(2, 5)), seen, strict=True):
        expected = [0.7 * w / sum(map(sum, weights)) for row in rows for w in weights[row]]
        torch.testing.assert_close(batch.answers.scale_M, torch.tensor(expected))
        taught = [(lengths[row][g], 1.3 * of_group[g]) for row in rows for g in range(stage) if lengths[row][g]]
        # The first label of every group comes before the others.
        expected = [scale for _, scale in taught] + [scale for n, scale in taught for _ in range(n - 1)]
        torch.testing.assert_close(batch.steps.scale_M, torch.tensor(expected))


@pytest.mark.parametrize("family", ["gpt2", "llama", "nanochat"])
def test_no_problem_sees_another(
    make_method: MakeMethod, problems: list[Problem], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Another question in one place, of the same length or longer than all others: every label of that problem, of its
    answer and its steps, loses something else, those of all others what they lost before."""
    seen = watch_labels(monkeypatch)
    method = make_method(family=family)

    def losses_of(problems: Sequence[Problem]) -> tuple[Tensor, Tensor]:
        """Of every label; and which problem it belongs to."""
        batch = collate(method, problems)
        with torch.no_grad():
            method(batch, batch.totals)
        steps = steps_of(batch)
        step_rows_M = steps.row_N[steps.steps.group_M].div(GROUPS, rounding_mode="floor")
        return seen[-1].found.nll_M, torch.cat((batch.texts.row_P[-len(batch.targets) :], step_rows_M))

    before_M, row_M = losses_of(problems)
    longest = max(len(method.tokenizer.encode(problem.question)) for problem in problems)
    for changed, problem in enumerate(problems):
        for question in (problem.question[::-1], "7" * (longest + 20)):
            others = [replace(p, question=question) if i == changed else p for i, p in enumerate(problems)]
            after_M, same_row_M = losses_of(others)
            assert torch.equal(row_M, same_row_M)
            is_other_M = row_M != changed
            torch.testing.assert_close(after_M[is_other_M], before_M[is_other_M], atol=1e-4, rtol=1e-4)
            assert ((after_M - before_M)[~is_other_M].abs() > 1e-3).float().mean() > 0.9


# The step loss reaches the thoughts


def watch_thoughts(monkeypatch: pytest.MonkeyPatch, kept: tuple[int, int] | None = None) -> list[Tensor]:
    """From now on keeps the method's thoughts, with their gradients, in the list it returns.

    Args:
        kept: the one thought (row, index) to leave in the graph when it is handed on; all others are cut off.
    """
    seen: list[Tensor] = []
    think = Sequential.think

    def spy(
        loop: Sequential, model: GPT, x_PD: Tensor, packing: Packing, counts: Sequence[int], room: int, *, keys: bool
    ) -> Thoughts:
        thoughts = think(loop, model, x_PD, packing, counts, room, keys=keys)
        latents_BKD = thoughts.latents_BKD
        assert thoughts.unread_RD is not None
        assert torch.equal(thoughts.unread_RD, last_of_each(latents_BKD, counts))
        if kept is not None:
            is_kept = torch.zeros(*latents_BKD.shape[:2], 1, dtype=torch.bool)
            is_kept[kept] = True
            latents_BKD = torch.where(is_kept, latents_BKD, latents_BKD.detach())
        latents_BKD.retain_grad()
        seen.append(latents_BKD)
        return replace(thoughts, latents_BKD=latents_BKD, unread_RD=last_of_each(latents_BKD, counts))

    monkeypatch.setattr(Sequential, "think", spy)
    return seen


def only_group(method: Method, problems: Sequence[Problem], group: int) -> ThoughtBatch:
    """The batch with the step labels of one group alone: its step loss is that group's part, L_step,k."""

    term = method.terms["step"]
    assert isinstance(term, StepDecoderTerm)

    def group_ids(example: Example, stage: Stage, groups: int) -> list[list[int] | None]:
        found = StepDecoderTerm.group_ids(term, example, stage, groups)
        return [ids if i == group else None for i, ids in enumerate(found)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(term, "group_ids", group_ids)
        batch = collate(method, problems)
    return replace(batch, totals=collate(method, problems).totals)


def is_taught(row: int, group: int) -> bool:
    """With missing=mask."""
    return group < STEPS[row]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("group", range(GROUPS))
def test_each_groups_step_loss_reaches_its_own_thoughts(
    make_method: MakeMethod,
    problems: list[Problem],
    monkeypatch: pytest.MonkeyPatch,
    group: int,
    reduction: str,
) -> None:
    """d L_step,k / d z is not zero for every thought of group k where that group is taught, and exactly zero for the
    thoughts of other groups (a decoder reads its own group only) and where the group is masked."""
    per_step = 2
    latent = {"n_latents": GROUPS * per_step, "latents_per_step": per_step}
    method = make_method(latent=latent, loss={"answer_weight": 0.0, "step_reduction": reduction})
    seen = watch_thoughts(monkeypatch)
    run_step(method, [only_group(method, problems, group)])
    gradient_BKD = seen[0].grad
    assert gradient_BKD is not None
    for row in range(len(problems)):
        for k in range(GROUPS * per_step):
            size = gradient_BKD[row, k].norm().item()
            if k // per_step == group and is_taught(row, group):
                assert size > 1e-5
            else:
                assert size == 0


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_groups_parts_add_up_to_the_step_loss(
    make_method: MakeMethod, problems: list[Problem], reduction: str
) -> None:
    """L_step = sum of L_step,k, each from a batch with its own labels alone: no group sees another in the decoder."""
    method = make_method(loss={"step_reduction": reduction})
    whole, _ = run_step(method, [collate(method, problems)])
    parts = [run_step(method, [only_group(method, problems, group)])[0] for group in range(GROUPS)]
    torch.testing.assert_close(sum_of(part["step_loss"] for part in parts), whole["step_loss"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("row", "k"), product(range(len(STEPS)), range(GROUPS)))
def test_through_each_thought_it_goes_on_into_the_model(
    make_method: MakeMethod, problems: list[Problem], monkeypatch: pytest.MonkeyPatch, row: int, k: int
) -> None:
    """L_step alone, all thoughts but one cut off: that one carries a gradient into every block of the base model if
    it is supervised, and none at all if its group is masked."""
    method = make_method(loss={"answer_weight": 0.0})
    watch_thoughts(monkeypatch, kept=(row, k))
    shares, gradients = run_step(method, [collate(method, problems)])
    assert shares["loss"] == shares["step_loss"] > 0
    base = {name: g for name, g in gradients.items() if name.startswith("model.transformer.")}
    assert any(name.startswith("model.transformer.blocks.0.") for name in base)
    for name, gradient in base.items():
        assert gradient.isfinite().all()
        assert (gradient.abs().max() > 0) == is_taught(row, k), name


def test_without_step_weight_it_is_answer_training_only(
    make_method: MakeMethod, problems: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    """loss.step_weight=0: there is no decoder and nothing of it in batch or log; the gradient is the answer loss's,
    written out anew, and thoughts get one by being read alone: the last one directly, earlier ones through the model.
    """
    with monkeypatch.context() as patch:
        patch.setattr(StepDecoder, "from_base", None)  # none is made, not even to be thrown away
        method = make_method(loss={"step_weight": 0.0})
    seen = watch_thoughts(monkeypatch)
    shares, gradients = run_step(method, [collate(method, problems)])
    assert method.step_decoder is None
    assert method.terms == collate(method, problems).terms == {}
    assert shares["loss"] == shares["answer_loss"]
    assert shares.keys() == {"loss", "answer_loss"}
    assert not any(name.startswith("step_decoder.") for name in gradients)
    assert seen[0].grad is not None
    assert seen[0].grad[:, :-1].abs().max() == 0
    assert seen[0].grad[:, -1].abs().max() > 0
    method.zero_grad()
    reference(method, problems).answer_loss().backward()
    expected = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    assert_same_gradients(gradients, expected)


def test_the_loss_is_linear_in_its_weights(make_method: MakeMethod, problems: list[Problem]) -> None:
    """L = answer_weight * L_ans + step_weight * L_step, in its gradient too."""

    def gradients_with(answer_weight: float, step_weight: float) -> dict[str, Tensor]:
        method = make_method(loss={"answer_weight": answer_weight, "step_weight": step_weight})
        return run_step(method, [collate(method, problems)])[1]

    answer, step, both = gradients_with(1, 0), gradients_with(0, 1), gradients_with(0.5, 2)
    of_decoder = both.keys() - answer.keys()  # which is not made where its loss weighs nothing
    assert of_decoder == {name for name in step if name.startswith("step_decoder.")} != set()
    assert_same_gradients(both, {name: 0.5 * answer.get(name, torch.zeros(())) + 2 * step[name] for name in both})


def test_step_accuracy_is_tracked_only_where_asked(make_method: MakeMethod, problems: list[Problem]) -> None:
    method = make_method(track_step_accuracy=False)
    shares, _ = run_step(method, [collate(method, problems)])
    assert shares.keys() == {"loss", "answer_loss", "step_loss"}
    shares, _ = run_step(method, [method.collate(encode(method, problems), Stage())])
    assert shares.keys() == {"loss", "answer_loss"}


def test_a_step_without_any_step_loses_nothing(make_method: MakeMethod, problems: list[Problem]) -> None:
    """No problem has a step and missing=mask: L_step is 0, and so is its gradient; nothing is nan."""
    for reduction in REDUCTIONS:
        method = make_method(loss={"step_reduction": reduction})
        batch = collate(method, [replace(problem, steps=()) for problem in problems])
        assert steps_of(batch).row_N.numel() == 0
        shares, gradients = run_step(method, [batch])
        assert shares["step_loss"] == 0
        assert shares["step_accuracy"] == 0
        assert shares["loss"] == shares["answer_loss"] > 0
        for name, gradient in gradients.items():
            assert gradient.isfinite().all()
            assert not name.startswith("step_decoder.") or gradient.abs().max() == 0


@pytest.mark.parametrize("missing", ["mask", "answer"])
def test_step_accuracy_is_the_decoders(make_method: MakeMethod, problems: list[Problem], missing: str) -> None:
    """Of a decoder that always finds the digit 4 most likely, the share of fours in the steps that it is taught:
    answers that are taught to groups without a step are no steps.
    """
    method = make_method({"missing": missing}, family="gpt2")
    (four,) = method.tokenizer.encode("4")
    norm = decoder_of(method).transformer.norm
    assert isinstance(norm, nn.LayerNorm)
    with torch.no_grad():  # every hidden state of the decoder is its last norm's bias, which is nearest to the digit
        norm.weight.zero_()
        norm.bias.fill_(1.0)
        decoder_of(method).embedding.weight[four] = 10.0
    shares, _ = run_step(method, [collate(method, problems)])
    texts = [group_text(p, g, "merge", "mask") for p, g in product(problems, range(GROUPS))]
    taught = [i for text in texts if text for i in [*method.tokenizer.encode(text), method.tokenizer.end_id]]
    assert shares["step_accuracy"].item() == pytest.approx(taught.count(four) / len(taught))


# What a batch holds, and the stages of training


def words(method: Method, ids: Tensor) -> str:
    return method.tokenizer.decode(ids.tolist())


def rows_read(packing: Packing, tokens: Sequence[int | None]) -> list[list[int | None]]:
    """The tokens of each row, in order; None stands for a thought."""
    rows: list[dict[int, int | None]] = [{} for _ in range(packing.rows)]
    for row, offset, token in zip(packing.row_P.tolist(), packing.offset_P.tolist(), tokens, strict=True):
        assert offset not in rows[row]
        rows[row][offset] = token
    assert [sorted(row) for row in rows] == [list(range(n)) for n in packing.length_B.tolist()]
    return [[row[offset] for offset in range(len(row))] for row in rows]


def rows_predicted(packing: Packing, labels: Tensor) -> list[list[int | None]]:
    """What is to be predicted at each token of each row, None where nothing is: the last tokens of a pass predict its
    labels, in their order."""
    silent = len(packing) - len(labels)
    return rows_read(packing, [*[None] * silent, *labels.tolist()])


def written_after_thoughts(method: Method, batch: ThoughtBatch) -> list[str]:
    """The labels of each row. The model reads its last thought, at which nothing is to be predicted, then `<|eot|>` and
    the labels but the last: each of these predicts the label after it."""
    B = batch.questions.rows
    read = rows_read(batch.texts, [*[None] * B, *batch.text_ids_A.tolist()])
    predicted = rows_predicted(batch.texts, batch.targets.label_M)
    texts = []
    for (thought, *ids), (nothing, *labels) in zip(read, predicted, strict=True):
        assert thought is nothing is None
        assert None not in labels
        assert ids == [method.tokenizer.eot_id, *labels[:-1]]
        assert labels[-1] == method.tokenizer.end_id
        texts.append(method.tokenizer.decode([i for i in labels if i is not None]))
    return texts


def taught(method: Method, batch: ThoughtBatch, groups: int) -> list[list[str | None]]:
    """What each row's each group is to be decoded into. The decoder reads the group's thoughts and the labels but the
    last; the last thought predicts the first label."""
    part, c = steps_of(batch), method.config.latent.latents_per_step
    steps, N = part.steps, len(part.row_N)
    read = rows_read(steps.packing, [*[None] * (c * N), *steps.ids_L.tolist()])
    predicted = rows_predicted(steps.packing, steps.label_M)
    of_group = rows_predicted(steps.packing, part.group_M)
    found: list[list[str | None]] = [[None] * groups for _ in range(batch.questions.rows)]
    for n, at in enumerate(part.row_N.tolist()):
        labels = [i for i in predicted[n][c - 1 :] if i is not None]
        assert predicted[n] == [None] * (c - 1) + labels
        assert read[n] == [None] * c + labels[:-1]
        assert labels[-1] == method.tokenizer.end_id
        assert of_group[n] == [None] * (c - 1) + [at % groups] * len(labels)
        assert set(steps.label_M[steps.group_M == n].tolist()) == set(labels)
        found[at // groups][at % groups] = method.tokenizer.decode(labels)
    return found


def test_the_batch_of_the_last_stage(make_method: MakeMethod, problems: list[Problem]) -> None:
    """Questions with `<|bot|>`, answers after `<|eot|>`, every step with the group that stands for it."""
    method = make_method()
    batch = collate(method, problems)
    assert batch.counts == (GROUPS,) * len(problems)
    bot_id = method.tokenizer.bot_id
    assert rows_read(batch.questions, batch.question_ids_P.tolist()) == [
        [*method.tokenizer.encode(problem.question), bot_id] for problem in problems
    ]
    # Thoughts are read out of the last tokens, in the order of the rows.
    assert batch.question_ids_P[-len(problems) :].tolist() == [bot_id] * len(problems)
    assert batch.questions.row_P[-len(problems) :].tolist() == list(range(len(problems)))
    assert written_after_thoughts(method, batch) == [f"#### {problem.answer}" for problem in problems]
    assert taught(method, batch, GROUPS) == [
        [group_text(problem, group, "merge", "mask") for group in range(GROUPS)] for problem in problems
    ]


def test_totals_count_positions(make_method: MakeMethod, problems: list[Problem]) -> None:
    """Everything that a transformer reads: questions with `<|bot|>`, the thoughts (the last one with the text), texts,
    and the decoder's thoughts and tokens; and the rectangles that attention lays them out in."""
    per_step = 2
    method = make_method(latent={"n_latents": GROUPS * per_step, "latents_per_step": per_step})
    encoder = method.tokenizer
    batch = collate(method, problems)
    questions = [len(encoder.encode(problem.question)) + 1 for problem in problems]
    texts = [1 + 1 + len(encoder.encode(f"#### {problem.answer}")) for problem in problems]  # less the end token
    groups = [group_text(problem, group, "merge", "mask") for problem in problems for group in range(GROUPS)]
    steps = [per_step + len(encoder.encode(text)) for text in groups if text is not None]
    thoughts = len(problems) * (GROUPS * per_step - 1)
    assert batch.totals["positions"].item() == sum(questions) + thoughts + sum(texts) + sum(steps)
    rectangles = [
        (len(texts), max(texts)),
        *(shape for lengths in (questions, steps) for shape in tight_rectangles(sorted(lengths, reverse=True))),
    ]
    assert len(rectangles) > 3
    assert batch.totals["slots"].item() == thoughts + sum(rows * width for rows, width in rectangles)
    assert batch.totals["tokens"].item() == len(batch.targets)
    n_labels = len(steps_of(batch).group_M)
    assert batch.totals["step_tokens"].item() == batch.totals["group_tokens_G"].sum().item() == n_labels
    assert batch.totals["problems"].item() == len(problems)


@pytest.mark.parametrize("missing", ["mask", "answer"])
@pytest.mark.parametrize("surplus", ["merge", "drop"])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_stage_writes_what_thoughts_do_not_replace_yet(
    make_method: MakeMethod, problems: list[Problem], stage: int, surplus: str, missing: str
) -> None:
    """Stage s: the first s steps are the thoughts', the others follow `<|eot|>` as text, whatever `surplus` says."""
    latent = {"latents_per_step": 2, "n_latents": 2 * GROUPS, "surplus": surplus, "missing": missing}
    method = make_method(latent=latent, step_weight_multiplier=2.0)
    batch = method.collate(encode(method, problems), Stage(2 * stage, first_written=stage))
    assert isinstance(batch, ThoughtBatch)
    assert set(batch.counts) == {2 * stage}
    assert written_after_thoughts(method, batch) == [
        "".join(step.text + "\n" for step in problem.steps[stage:]) + f"#### {problem.answer}" for problem in problems
    ]
    without = {"mask": lambda p: None, "answer": lambda p: f"#### {p.answer}"}[missing]
    assert taught(method, batch, stage) == [
        [p.steps[g].text if g < len(p.steps) else without(p) for g in range(stage)] for p in problems
    ]
    heavy = words(method, batch.targets.label_M[batch.targets.weight_M == 2.0])
    assert heavy == "".join(step.text for problem in problems for step in problem.steps[stage:])
    shares, gradients = run_step(method, [batch])
    assert shares["loss"].isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_a_stage_that_replaces_all_steps_is_the_last_stage(make_method: MakeMethod, problems: list[Problem]) -> None:
    """`steps` of a stage may be all of them: surplus steps are then merged, not written."""
    method = make_method(latent={"stages": [{"steps": GROUPS, "share": 0.5}]})
    assert method.stage_at(0.0) == method.stage_at(1.0)
    assert taught(method, collate(method, problems), GROUPS)[3][-1] == "<<23*2=46>>\n<<46-6=40>>"


def test_the_warm_up_writes_all_steps_between_bot_eot_and_the_answer(
    make_method: MakeMethod, problems: list[Problem]
) -> None:
    """No thoughts yet: the loss is the weighted one, times its weight; the decoder waits."""
    method = make_method(loss={"answer_weight": 0.5}, step_weight_multiplier=3.0)
    tokenizer = method.tokenizer
    batch = method.collate(encode(method, problems), Stage())
    assert isinstance(batch, WrittenBatch)
    weighted, weights = torch.zeros(()), 0.0
    for problem, read in zip(problems, rows_read(batch.packing, batch.ids_P.tolist()), strict=True):
        prompt = [*tokenizer.encode(problem.question), tokenizer.bot_id, tokenizer.eot_id]
        text = "".join(step.text + "\n" for step in problem.steps) + f"#### {problem.answer}"
        ids = [*prompt, *tokenizer.encode(text), tokenizer.end_id]
        assert read == ids[:-1]
        loss_T = F.cross_entropy(method.model.logits(method.model(torch.tensor([ids[:-1]])))[0],
                                 torch.tensor(ids[1:]), reduction="none")[len(prompt) - 1 :]  # fmt: skip
        lines = [w for step in problem.steps for w in [3.0] * len(tokenizer.encode(step.text)) + [1.0]]
        weight_T = torch.tensor(lines + [1.0] * (len(loss_T) - len(lines)))
        weighted = weighted + (weight_T * loss_T).sum()
        weights += weight_T.sum().item()
    shares, gradients = run_step(method, [batch])
    assert shares["answer_loss"].item() == pytest.approx((weighted / weights).item(), rel=1e-5)
    assert shares["loss"].item() == pytest.approx(0.5 * (weighted / weights).item(), rel=1e-5)
    assert "step_loss" not in shares
    assert all(g.abs().max() == 0 for name, g in gradients.items() if name.startswith("step_decoder.transformer."))


STAGES = [{"steps": 1, "share": 0.2}, {"steps": 2, "share": 0.3}]


@pytest.mark.parametrize(
    ("latent", "thoughts_by_progress"),
    [
        ({"stages": 0}, {0.0: 8, 0.5: 8, 1.0: 8}),
        ({"stages": 0.3}, {0.0: 2, 0.099: 2, 0.101: 4, 0.199: 4, 0.201: 6, 0.299: 6, 0.301: 8, 1.0: 8}),
        ({"warmup": 0.25, "stages": 0}, {0.0: 0, 0.2499: 0, 0.25: 8, 1.0: 8}),
        ({"stages": STAGES}, {0.0: 2, 0.1999: 2, 0.2: 4, 0.4999: 4, 0.5: 8, 1.0: 8}),
        (
            {"warmup": 0.25, "stages": STAGES},
            {0.0: 0, 0.2499: 0, 0.2501: 2, 0.4499: 2, 0.4501: 4, 0.7499: 4, 0.7501: 8, 0.9999: 8, 1.0: 8},
        ),
    ],
    ids=["no stages", "a step more at a time", "warm-up", "stages", "warm-up and stages"],
)
def test_the_schedule(make_method: MakeMethod, latent: dict[str, Any], thoughts_by_progress: dict[float, int]) -> None:
    """Warm-up, stages for their shares of training, all steps replaced to the end; two thoughts a step, four steps."""
    method = make_method(latent={"n_latents": 8, "latents_per_step": 2} | latent)
    for progress, thoughts in thoughts_by_progress.items():
        assert method.stage_at(progress) == Stage(thoughts, first_written=None if thoughts == 8 else thoughts // 2)
    assert method.last_stage == Stage(8, first_written=None)
    assert method.answers == AnswerFormat(thinks=True)
    assert method.groups.latents_per_step == 2


def test_room_is_kept_for_every_form_of_a_problem(make_method: MakeMethod, problems: list[Problem]) -> None:
    """`length + extra_length`, by which problems are found too long, bounds what any stage feeds the model."""
    method = make_method(latent={"n_latents": 4 * 2, "latents_per_step": 2})
    for problem in problems:
        example = method.encode(problem)
        bound = example.length + method.extra_length
        for groups in range(1, 5):
            batch = method.collate([example], stages_of(method, [groups])[0])
            assert isinstance(batch, ThoughtBatch)
            # The last thought is read with the text.
            assert batch.questions.longest + max(batch.counts) - 1 + batch.texts.longest <= bound
            assert steps_of(batch).steps.packing.longest <= bound
        written = method.collate([example], Stage())
        assert isinstance(written, WrittenBatch)
        assert written.packing.longest <= bound


@pytest.mark.parametrize(("n_layer", "blocks"), [(None, 2), (1, 1), (2, 2)])
@pytest.mark.parametrize("init", ["base", "random"])
def test_the_decoder_is_made_as_asked(make_method: MakeMethod, init: str, n_layer: int | None, blocks: int) -> None:
    """As many blocks as asked (null: the base's two); with decoder.init=base its first ones from the beginning, for
    without a warm-up no stage begins later."""
    decoder = {"n_layer": n_layer, "init": init}
    method = make_method(latent={"warmup": 0.0, "stages": 0}, decoder=decoder)
    assert len(decoder_of(method).transformer.blocks) == blocks
    source = method.model.transformer.state_dict()
    found = decoder_of(method).transformer.state_dict()
    assert all(torch.equal(weight, source[name]) for name, weight in found.items()) == (init == "base")


def test_the_decoder_starts_as_the_base_that_the_warm_up_left(make_method: MakeMethod) -> None:
    """decoder.init=base: copied again when thoughts begin, for only then has the base learned something; not later."""
    method = make_method(latent={"warmup": 0.3, "stages": [{"steps": 1, "share": 0.3}]}, decoder={"init": "base"})
    base, decoder = method.model.transformer, decoder_of(method).transformer

    def is_copy() -> bool:
        source = base.state_dict()
        return all(torch.equal(weight, source[name]) for name, weight in decoder.state_dict().items())

    before = method.stage_at(0.0)
    for progress, copied in ((0.3, True), (0.6, False)):
        with torch.no_grad():
            for parameter in base.parameters():
                parameter += 0.1
        assert not is_copy()
        method.begin_stage(before, before := method.stage_at(progress))
        assert is_copy() == copied


@pytest.mark.parametrize(("warmup", "copied_at"), [(0.2, [2]), (0.0, [])])
def test_a_schedule_that_returns_to_fewer_thoughts_keeps_its_decoder(
    make_method: MakeMethod, monkeypatch: pytest.MonkeyPatch, warmup: float, copied_at: list[int]
) -> None:
    """Stages of 3, 1 and again 3 steps: a copy of the base is made once, after the warm-up, and where a run is resumed
    makes no difference. Without a warm-up it is the one that the decoder began as.
    """
    stages = [{"steps": 3, "share": 0.2}, {"steps": 1, "share": 0.2}]
    method = make_method(latent={"warmup": warmup, "stages": stages}, decoder={"init": "base"})
    copies: list[int] = []
    monkeypatch.setattr(decoder_of(method), "copy_base", lambda base: copies.append(step))
    began: list[int] = []
    for step in range(10):  # as the trainer goes through its steps, every one of them perhaps after resuming
        before, thoughts = method.stage_at(max(0, step - 1) / 10), method.stage_at(step / 10)
        if before != thoughts:
            began.append(step)
            method.begin_stage(before, thoughts)
    assert began == ([2, 4, 6] if warmup else [2, 4])
    assert copies == copied_at


def test_a_random_decoder_stays_as_it_is(make_method: MakeMethod) -> None:
    method = make_method(latent={"warmup": 0.3})
    before = {name: weight.clone() for name, weight in decoder_of(method).state_dict().items()}
    method.begin_stage(method.stage_at(0.0), method.stage_at(0.3))
    assert all(torch.equal(weight, before[name]) for name, weight in decoder_of(method).state_dict().items())


# Rows of different stages in one batch

GROUPS_OF_ROWS = [2, 0, 3, 1, 3]

MIXED: dict[str, dict[str, Any]] = {
    "plain": {},
    "two per step": {"latent": {"n_latents": 6, "latents_per_step": 2}},
    "answers": {"latent": {"missing": "answer"}},
    "last not fed": {"latent": {"n_latents": 5, "latents_per_step": 2, "feeds_last": False}},
    "pauses": {"latent": {"n_latents": 6, "latents_per_step": 2}, "parts": {"loop": "pause"}},
}


@pytest.mark.parametrize("made_with", MIXED.values(), ids=MIXED)
@pytest.mark.parametrize("family", ["gpt2", "llama", "nanochat"])
def test_rows_of_different_stages_are_what_each_is_alone(
    make_method: MakeMethod, problems: list[Problem], made_with: dict[str, Any], family: str
) -> None:
    """Losses and every gradient; a row without thoughts goes on from `<|bot|>` at once."""
    method = make_method(**made_with, family=family)
    examples = encode(method, problems)
    mixed = method.collate(examples, stages_of(method, GROUPS_OF_ROWS))
    assert isinstance(mixed, ThoughtBatch)
    c = method.config.latent.latents_per_step
    assert mixed.counts == tuple(c * groups for groups in GROUPS_OF_ROWS)
    shares, gradients = run_step(method, [mixed])
    # Alone, all rows of a batch are of one stage: the same packing as ever. The row without thoughts is written.
    totals = mixed.totals
    method.zero_grad()
    alone: list[dict[str, Tensor]] = []
    for example, groups in zip(examples, GROUPS_OF_ROWS, strict=True):
        batch = method.collate([example], stages_of(method, [groups]))
        found = method(batch, totals)
        found["loss"].backward()
        alone.append({key: value.detach() for key, value in found.items() if key in ("loss", "answer_loss")})
    for key, value in add_up(alone).items():
        torch.testing.assert_close(shares[key], value, atol=1e-5, rtol=1e-5)
    expected = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in method.named_parameters()}
    assert_same_gradients(gradients, expected)


def test_rows_of_one_stage_are_counted_as_ever(make_method: MakeMethod, problems: list[Problem]) -> None:
    method = make_method()
    examples = encode(method, problems)
    uniform = method.collate(examples, method.last_stage)
    named = method.collate(examples, stages_of(method, [GROUPS] * len(problems)))
    assert uniform.totals.keys() == named.totals.keys()
    assert all(torch.equal(uniform.totals[key], named.totals[key]) for key in uniform.totals)
    mixed = method.collate(examples, stages_of(method, GROUPS_OF_ROWS))
    assert isinstance(mixed, ThoughtBatch)
    fed = sum(max(0, groups - 1) for groups in GROUPS_OF_ROWS)  # by `think`; the last one goes with the text
    others = sum(map(len, (mixed.questions, mixed.texts, steps_of(mixed).steps.packing)))
    assert mixed.totals["positions"].item() == fed + others
    assert mixed.totals["problems"].item() == sum(groups > 0 for groups in GROUPS_OF_ROWS)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_micro_batches_of_different_stages_add_up(
    make_method: MakeMethod, problems: list[Problem], reduction: str
) -> None:
    """Also one whose rows are all of the stage without thoughts."""
    method = make_method(latent={"n_latents": 6, "latents_per_step": 2}, loss={"step_reduction": reduction})
    examples, stages = encode(method, problems), stages_of(method, GROUPS_OF_ROWS)
    whole = run_step(method, [method.collate(examples, stages)])
    cuts = ([1], [0, 3], [2, 4])
    pieces = [method.collate([examples[i] for i in cut], [stages[i] for i in cut]) for cut in cuts]
    assert isinstance(pieces[0], ThoughtBatch)
    assert pieces[0].counts == (0,)
    shares, gradients = run_step(method, pieces)
    for key, value in whole[0].items():
        torch.testing.assert_close(shares[key], value, atol=1e-5, rtol=1e-5)
    assert_same_gradients(gradients, whole[1])


@pytest.mark.parametrize("groups", [[GROUPS + 1] * 5, [1, 2], []], ids=str)
def test_impossible_stages_of_rows_are_refused(
    make_method: MakeMethod, problems: list[Problem], groups: list[int]
) -> None:
    method = make_method()
    with pytest.raises(UserError, match=r"stages=.*must be one for each of 5 rows, of at most 3 thoughts each"):
        method.collate(encode(method, problems), stages_of(method, groups))


def test_a_stage_of_too_many_thoughts_is_refused_for_all_rows_too(
    make_method: MakeMethod, problems: list[Problem]
) -> None:
    method = make_method()
    with pytest.raises(UserError, match=r"stages=.*must be one for each of 5 rows, of at most 3 thoughts each"):
        method.collate(encode(method, problems), Stage(GROUPS + 1, first_written=None))


def test_thoughts_of_a_stage_make_whole_groups(make_method: MakeMethod, problems: list[Problem]) -> None:
    """With or without a term that cuts them into groups: a checkpoint keeps how many make one."""
    latent, stage = {"n_latents": 6, "latents_per_step": 2}, Stage(3, first_written=1)
    for loss in ({}, {"step_weight": 0.0}):
        method = make_method(latent=latent, loss=loss)
        with pytest.raises(UserError, match=r"stages=.*: thoughts must make whole groups of latents_per_step=2"):
            method.collate(encode(method, problems), stage)


@pytest.mark.parametrize(
    ("stage", "key"),
    [
        (lambda: Stage(thoughts=-1), "thoughts"),
        (lambda: Stage(first_written=-1), "first_written"),
        (lambda: Stage(removed=-1), "removed"),
    ],
)
def test_no_stage_is_of_less_than_nothing(stage: Callable[[], Stage], key: str) -> None:
    with pytest.raises(UserError, match=rf"stage\.{key}=-1: must be at least 0"):
        stage()
