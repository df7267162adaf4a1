"""Probing in Python: thoughts, what they decode to, and how that compares with gold steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import simcot_latent as sl
from simcot_latent.batches import ThoughtBatch
from simcot_latent.checkpoint import Checkpoint, TrainerState
from simcot_latent.config import LatentConfig, MethodConfig, RunConfig
from simcot_latent.curricula.base import Stage
from simcot_latent.data.format import AnswerFormat
from simcot_latent.data.problem import Problem
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.errors import UserError
from simcot_latent.loops.sequential import Sequential, SequentialConfig
from simcot_latent.method import Method
from simcot_latent.metrics import wilson_interval
from simcot_latent.model.gpt import GPT
from simcot_latent.probing import information, readers
from simcot_latent.probing.information import _v_information, text_entropy
from simcot_latent.probing.steps import GroupProbe, QuestionProbe, probe_problems, probe_questions, teacher_forced
from simcot_latent.probing.summary import probe_table, summarise, summary_table
from simcot_latent.probing.thoughts import decode_groups, gold_groups
from simcot_latent.terms.step_decoder import StepDecoder
from simcot_latent.terms.steps import StepGroups
from simcot_latent.training.reporting import to_be_shown
from simcot_latent.training.saving import save_checkpoint

MakeCheckpoint = Callable[..., Checkpoint]

GROUPS, PER_STEP, WIDTH = 3, 2, 32


@pytest.fixture(scope="module")
def make_checkpoint(
    make_model: Callable[..., GPT], randomise: Callable[..., None], tokenizer: Tokenizer
) -> MakeCheckpoint:
    """`make_checkpoint(family="llama", **groups)`: random weights; three groups of two thoughts."""
    # With these seeds no two tokens are likely to within rounding, which might decide otherwise on another machine.
    seeds = {"gpt2": 74, "llama": 9, "nanochat": 20}

    def make(family: str = "llama", **groups: Any) -> Checkpoint:
        model = make_model(family, seed=seeds[family], vocab_size=tokenizer.n_vocab, context_length=256)
        decoder = StepDecoder.from_base(model, 1, "random")
        randomise(decoder.transformer, seed=1)
        with torch.no_grad():  # so that the random decoder ends its steps
            model.embedding.weight[tokenizer.end_id] *= 6
        return Checkpoint(
            model,
            decoder.eval(),
            tokenizer,
            {"max_new_tokens": 8},
            answers=AnswerFormat(thinks=True),
            loop=Sequential(WIDTH, SequentialConfig()),
            stage=Stage(GROUPS * PER_STEP, first_written=None),
            groups=StepGroups(PER_STEP, **groups),
            path=Path("runs/x"),
        )

    return make


@pytest.fixture(params=["gpt2", "llama", "nanochat"])
def checkpoint(request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint) -> Checkpoint:
    return make_checkpoint(request.param)


@pytest.fixture(autouse=True)
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random decoders seldom end: the limit is reached early."""
    monkeypatch.setattr(readers, "MAX_STEP_TOKENS", 8)


@pytest.fixture(scope="module")
def questions(problems: list[Problem]) -> list[str]:
    return [problem.question for problem in problems]


# Thoughts and what they say


def test_the_public_names(checkpoint: Checkpoint, questions: list[str]) -> None:
    """The README's three lines: shapes, and one string a step group."""
    thoughts = sl.think(checkpoint, questions)
    assert thoughts.latents.shape == (len(questions), GROUPS * PER_STEP, WIDTH)
    assert not thoughts.latents.requires_grad
    steps = sl.decode_steps(checkpoint, thoughts)
    assert [len(groups) for groups in steps] == [GROUPS] * len(questions)
    assert all(isinstance(text, str) for groups in steps for text in groups)
    assert len({text for groups in steps for text in groups}) > GROUPS, "all alike: nothing would be proven"
    assert len(sl.answer(checkpoint, questions)) == len(questions)


def test_the_same_at_batch_size_one_and_n(checkpoint: Checkpoint, questions: list[str]) -> None:
    """Thoughts to float32 rounding, their texts exactly."""
    thoughts = sl.think(checkpoint, questions)
    steps = sl.decode_steps(checkpoint, thoughts)
    for row, question in enumerate(questions):
        alone = sl.think(checkpoint, [question])
        torch.testing.assert_close(alone.latents[0], thoughts.latents[row], atol=1e-4, rtol=1e-4)
        assert sl.decode_steps(checkpoint, alone) == [steps[row]]


def test_each_text_and_probability_is_its_groups(checkpoint: Checkpoint, questions: list[str]) -> None:
    """Against the decoder itself, a group at a time."""
    decoder, tokenizer = checkpoint.step_decoder, checkpoint.tokenizer
    assert decoder is not None
    latents_BKD = sl.think(checkpoint, questions).latents
    for row, groups in enumerate(decode_groups(checkpoint, latents_BKD)):
        for group, (text, probability) in enumerate(groups):
            prefix_1CD = latents_BKD[row : row + 1, group * PER_STEP : (group + 1) * PER_STEP]
            ids, expected = decoder.decode(prefix_1CD, tokenizer.end_id, max_tokens=8)
            assert text == tokenizer.decode(ids[0])
            assert probability == pytest.approx(expected[0], rel=1e-3)


def test_latents_of_ones_own_are_decoded(checkpoint: Checkpoint, questions: list[str]) -> None:
    """A tensor in place of `Thoughts`: the same text, and a text changes with its own group's thoughts only."""
    latents_BKD = sl.think(checkpoint, questions).latents
    steps = sl.decode_steps(checkpoint, latents_BKD)
    assert steps == sl.decode_steps(checkpoint, sl.think(checkpoint, questions))
    swapped = latents_BKD.clone()
    swapped[0, PER_STEP : 2 * PER_STEP] = latents_BKD[1, PER_STEP : 2 * PER_STEP]
    assert sl.decode_steps(checkpoint, swapped)[0] == [steps[0][0], steps[1][1], steps[0][2]]


def test_no_questions(make_checkpoint: MakeCheckpoint) -> None:
    """As `answer` of none is none."""
    checkpoint = make_checkpoint()
    thoughts = sl.think(checkpoint, [])
    assert thoughts.latents.shape == (0, GROUPS * PER_STEP, WIDTH)
    assert sl.decode_steps(checkpoint, thoughts) == []


def test_what_cannot_be_thought_about(checkpoint: Checkpoint) -> None:
    with pytest.raises(UserError, match="question 1 is empty"):
        sl.think(checkpoint, ["How many?", ""])
    with pytest.raises(UserError, match=r"question 0 .* has .* tokens: at most .* fit"):
        sl.think(checkpoint, ["7" * 300])


def test_a_checkpoint_without_a_decoder(checkpoint: Checkpoint, questions: list[str]) -> None:
    """It can think and answer, but its thoughts cannot be decoded: said in one line that names the folder."""
    bare = replace(checkpoint, step_decoder=None)
    thoughts = sl.think(bare, questions)
    assert torch.equal(thoughts.latents, sl.think(checkpoint, questions).latents)
    assert sl.answer(bare, questions) == sl.answer(checkpoint, questions)
    for decode in (lambda: sl.decode_steps(bare, thoughts), lambda: probe_questions(bare, questions)):
        with pytest.raises(UserError, match=r"runs/x: holds no auxiliary decoder .* probe a checkpoint"):
            decode()


def test_a_checkpoint_that_does_not_think(checkpoint: Checkpoint, questions: list[str]) -> None:
    written = replace(checkpoint, step_decoder=None, answers=AnswerFormat(), loop=None, stage=Stage())
    with pytest.raises(UserError, match="runs/x: this model writes its steps and has no thoughts"):
        sl.think(written, questions)


def test_a_saved_checkpoint_says_the_same(checkpoint: Checkpoint, questions: list[str], tmp_path: Path) -> None:
    """Saved and loaded by its run's folder: the same thoughts, bit for bit, and the same steps."""
    save_checkpoint(checkpoint, tmp_path, TrainerState({}, {}), keep=1)
    loaded = sl.load_checkpoint(tmp_path, device="cpu")
    assert torch.equal(sl.think(loaded, questions).latents, sl.think(checkpoint, questions).latents)
    assert sl.decode_steps(loaded, sl.think(loaded, questions)) == sl.decode_steps(
        checkpoint, sl.think(checkpoint, questions)
    )


# Against gold steps


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("surplus", ["merge", "drop"])
@pytest.mark.parametrize("missing", ["mask", "answer"])
def test_gold_is_what_was_taught(
    make_checkpoint: MakeCheckpoint,
    make_run: Callable[..., RunConfig],
    problems: list[Problem],
    groups: int,
    surplus: str,
    missing: str,
) -> None:
    """Read back from the method's own batch, for the last stage (3 groups) and for checkpoints of stages before."""
    whole = make_checkpoint(surplus=surplus, missing=missing)
    latent = LatentConfig(GROUPS * PER_STEP, PER_STEP, surplus, missing)
    method = Method(whole.model, whole.tokenizer, make_run(rationale="equations"), MethodConfig.simcot(latent))
    stage = Stage(groups * PER_STEP, first_written=None if groups == GROUPS else groups)
    checkpoint = replace(whole, stage=stage)
    for problem in problems:
        batch = method.collate([method.encode(problem)], stage)
        assert isinstance(batch, ThoughtBatch)
        step = batch.terms["step"]
        taught: list[str | None] = [None] * groups
        for group in range(groups):
            # The first label of every group comes before the others, so a group's are in order.
            labels = step.steps.label_M[step.group_M == group]
            if len(labels):
                taught[group] = whole.tokenizer.decode(labels.tolist())
        assert gold_groups(checkpoint, problem) == taught


def test_teacher_forcing_against_a_naive_loop(checkpoint: Checkpoint) -> None:
    """Share of gold tokens that are most likely after the ones before, and how unlikely the whole is, end token
    included, one group and one token at a time; None where there is no gold."""
    decoder, tokenizer = checkpoint.step_decoder, checkpoint.tokenizer
    assert decoder is not None
    questions = ["How many?", "2+2?"]
    latents_BKD = sl.think(checkpoint, questions).latents
    # Where the decoder's own words are gold, all tokens are right.
    own = decode_groups(checkpoint, latents_BKD)[1][0]
    gold = [["<<3*4=12>>", None, "<<12-2=10>>\n<<10*2=20>>"], [own[0], None, "#### 4"]]
    forced = teacher_forced(checkpoint, latents_BKD, gold)
    for group, text in enumerate([*gold[0], *gold[1]]):
        if text is None:
            assert forced[group] is None
            continue
        ids = [*tokenizer.encode(text), tokenizer.end_id]
        vectors = [*latents_BKD.flatten(0, 1)[group * PER_STEP : (group + 1) * PER_STEP]]
        right, probability = 0, 1.0
        for i in ids:
            with torch.no_grad():
                hidden_D = decoder.transformer(torch.stack(vectors).unsqueeze(0))[0, -1]
                probabilities_V = decoder.logits(hidden_D).softmax(-1)
            right += int(probabilities_V.argmax()) == i
            probability *= probabilities_V[i].item()
            vectors.append(decoder.embedding.weight[i].detach())
        assert forced[group] == pytest.approx((right / len(ids), -math.log(probability)), rel=1e-3)
    assert teacher_forced(checkpoint, latents_BKD, [[None] * 3] * 2) == [None] * 6


# V-information


def brute_force(checkpoint: Checkpoint, problems: list[Problem]) -> dict[tuple[int, int], tuple[float, float]]:
    """V-information and its bound with every problem as a donor, one step and one donor at a time."""
    latents_BKD = sl.think(checkpoint, [problem.question for problem in problems]).latents
    found: dict[tuple[int, int], tuple[float, float]] = {}
    for group in range(GROUPS):
        members = [row for row, problem in enumerate(problems) if len(problem.steps) > group]
        for row in members:
            text = gold_groups(checkpoint, problems[row])[group]
            gold: list[str | None] = [text if i == group else None for i in range(GROUPS)]
            probability = {}
            for donor in members:
                forced = teacher_forced(checkpoint, latents_BKD[donor : donor + 1], [gold])[group]
                assert forced is not None
                probability[donor] = math.exp(-forced.nats)
            mean = sum(probability.values()) / len(members)
            if len(members) > 1:
                found[row, group] = (math.log2(probability[row] / mean), math.log2(len(members)))
    return found


def found_in(probes: Sequence[QuestionProbe]) -> dict[tuple[int, int], tuple[float, float]]:
    """What `probe_problems` says, in the form of `brute_force`."""
    return {
        (row, group): (g.v_information, g.v_information_bound or 0.0)
        for row, probe in enumerate(probes)
        for group, g in enumerate(probe.groups)
        if g.v_information is not None
    }


def test_v_information_against_brute_force(checkpoint: Checkpoint, problems: list[Problem]) -> None:
    """Steps of 4 problems in the first group, 3 in the second, 2 in the third; none where one problem is alone."""
    expected = brute_force(checkpoint, problems)
    assert len(expected) == 4 + 3 + 2
    found = found_in(probe_problems(checkpoint, problems, batch_size=2))
    assert found.keys() == expected.keys()
    for key, (value, bound) in expected.items():
        assert found[key] == (pytest.approx(value, rel=1e-3, abs=1e-4), pytest.approx(bound)), key
        assert value <= bound
    assert max(abs(value) for value, _ in expected.values()) > 0.01, "nothing is proven"
    alone = next(problem for problem in problems if problem.steps)
    assert found_in(probe_problems(checkpoint, [alone])) == {}


def test_a_decoder_that_ignores_the_thoughts(make_checkpoint: MakeCheckpoint, problems: list[Problem]) -> None:
    """No V-information, however surprising the steps are to it: what it knows it knows without the thoughts."""
    checkpoint = make_checkpoint()
    decoder = checkpoint.step_decoder
    assert decoder is not None
    forward = decoder.forward
    decoder.forward = lambda thoughts, *rest: forward(torch.zeros_like(thoughts), *rest)  # type: ignore[method-assign]
    probes = probe_problems(checkpoint, problems)
    values = [value for value, _ in found_in(probes).values()]
    assert values == pytest.approx([0.0] * 9, abs=1e-5)
    probabilities = [g.gold_probability for probe in probes for g in probe.groups if g.gold_probability is not None]
    assert len(set(probabilities)) > 5


@pytest.mark.parametrize(
    ("probabilities", "bits"),
    [
        ([1 / 2, 1 / 4, 1 / 4], math.log2(3 / 2)),
        ([1 / 8, 1 / 8, 1 / 8, 1 / 8], 0.0),
        ([1e-3, 1e-9], math.log2(2 / (1 + 1e-6))),  # far apart is no more than one bit among two
        ([1e-9, 1e-3], -math.log2((1 + 1e6) / 2)),  # the own thoughts mislead
    ],
)
def test_v_information_in_closed_form(probabilities: list[float], bits: float) -> None:
    found = _v_information([-math.log(p) for p in probabilities])
    assert found.v_information == pytest.approx(bits, abs=1e-9)
    assert found.v_information_bound == math.log2(len(probabilities))


@settings(deadline=None)
@given(st.lists(st.floats(0, 2000), min_size=1, max_size=64))
def test_v_information_keeps_its_bound(nats: list[float]) -> None:
    found = _v_information(nats)
    assert math.isfinite(found.v_information)
    assert found.v_information <= found.v_information_bound + 1e-9 <= 6 + 1e-9
    assert found.v_information >= -(nats[0] - min(nats)) / math.log(2) - 1e-9  # lost at most against the best one


def test_donors_are_few_and_the_same_in_any_order(
    make_checkpoint: MakeCheckpoint, problems: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two donors: the own problem and one other, which depends on neither the order nor the batches."""
    checkpoint = make_checkpoint()
    monkeypatch.setattr(information, "DONORS", 2)
    forwards = probe_problems(checkpoint, problems)
    assert {bound for _, bound in found_in(forwards).values()} == {1.0}
    backwards = probe_problems(checkpoint, problems[::-1], batch_size=3)[::-1]
    for key, (value, _) in found_in(forwards).items():
        assert found_in(backwards)[key][0] == pytest.approx(value, rel=1e-3, abs=1e-4)
    # Each is one of the others, or the own one would be its own baseline.
    latents_BKD = sl.think(checkpoint, [problem.question for problem in problems]).latents
    members = [row for row, problem in enumerate(problems) if problem.steps]
    donors: list[int] = []
    for row in members:
        gold: list[str | None] = [gold_groups(checkpoint, problems[row])[0], None, None]
        scored = [teacher_forced(checkpoint, latents_BKD[j : j + 1], [gold])[0] for j in range(len(problems))]
        nats = [forced.nats for forced in scored if forced is not None]
        bits = {j: -math.log2((1 + math.exp(nats[row] - nats[j])) / 2) for j in members if j != row}
        donor = min(bits, key=lambda j: abs(bits[j] - found_in(forwards)[row, 0][0]))
        assert bits[donor] == pytest.approx(found_in(forwards)[row, 0][0], rel=1e-3, abs=1e-4)
        donors.append(donor)
    assert sorted(donors) == members, "each is a donor once: they stand in a circle"


def test_groups_that_are_taught_the_answer_are_no_steps(
    make_checkpoint: MakeCheckpoint, problems: list[Problem]
) -> None:
    """missing=answer: they say so, have no V-information and give none, and a summary has them apart."""
    masked, taught = make_checkpoint(missing="mask"), make_checkpoint(missing="answer")
    steps_only, probes = probe_problems(masked, problems), probe_problems(taught, problems)
    for probe, expected, problem in zip(probes, steps_only, problems, strict=True):
        for i, (group, step) in enumerate(zip(probe.groups, expected.groups, strict=True)):
            assert group.taught_answer == (i >= len(problem.steps))
            if group.taught_answer:
                assert group.gold == f"#### {problem.answer}"
                assert group.v_information is None
                assert group.exact is not None
            else:
                assert group == step
    found, expected = summarise(probes), summarise(steps_only)
    answers = found.pop("answer_groups")
    assert answers["n"] == sum(GROUPS - min(GROUPS, len(problem.steps)) for problem in problems) == 6
    assert answers.keys() == {
        "n", "exact", "exact_ci95", "probability", "forced_token_accuracy", "gold_probability"
    }  # fmt: skip
    assert expected.pop("answer_groups") == {"n": 0}
    assert found == expected
    assert lines_with(printed(summary_table(summarise(probes))), "step 1", "all steps", "answers")
    assert not lines_with(printed(summary_table(summarise(steps_only))), "answers")


def test_the_entropy_of_texts() -> None:
    assert text_entropy(["a", "b", "c", "d"]) == 2.0
    assert text_entropy(["a", "a", "b", "b"]) == 1.0
    assert text_entropy(["a", "a", "a", "b"]) == pytest.approx(0.75 * math.log2(4 / 3) + 0.25 * 2)
    assert text_entropy(["a", "a"]) == 0.0


def test_what_the_decoder_gives_to_gold(checkpoint: Checkpoint, problems: list[Problem]) -> None:
    """Each group's share of likeliest tokens and its probability of the whole, as teacher forcing finds them."""
    latents_BKD = sl.think(checkpoint, [problem.question for problem in problems]).latents
    forced = teacher_forced(checkpoint, latents_BKD, [gold_groups(checkpoint, problem) for problem in problems])
    groups = [group for probe in probe_problems(checkpoint, problems) for group in probe.groups]
    for group, expected in zip(groups, forced, strict=True):
        assert (group.gold is None) == (expected is None) == (group.gold_probability is None)
        if expected is not None:
            assert group.forced_token_accuracy == pytest.approx(expected.token_accuracy)
            assert group.gold_probability == pytest.approx(math.exp(-expected.nats), rel=1e-3)
    assert any(group.gold is not None for group in groups)


def test_probing_does_not_depend_on_batches(checkpoint: Checkpoint, problems: list[Problem]) -> None:
    """Texts exactly, numbers to float32 rounding; also which problem's thoughts are the others'."""
    whole = probe_problems(checkpoint, problems)
    for size in (1, len(problems) - 1):
        for probe, expected in zip(probe_problems(checkpoint, problems, size), whole, strict=True):
            assert probe.answer == expected.answer
            for group, its_expected in zip(probe.groups, expected.groups, strict=True):
                for key, value in asdict(its_expected).items():
                    close = pytest.approx(value, rel=1e-3, abs=1e-3) if isinstance(value, float) else value
                    assert getattr(group, key) == close, key
    assert probe_problems(checkpoint, []) == []


def test_probing_problems(
    make_checkpoint: MakeCheckpoint, problems: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is decoded and answered is put beside gold, group by group; groups that are taught nothing are not scored.

    The decoder is replaced by one that says `<<3*4=12>>` and nothing else, so scores are known.
    """

    def always(reader: readers.DecoderReader, groups_NCD: torch.Tensor) -> list[tuple[str, float]]:
        return [("<<3*4=12>>", 0.5) for _ in groups_NCD]

    monkeypatch.setattr(readers.DecoderReader, "read", always)
    checkpoint = make_checkpoint(surplus="merge", missing="mask")
    probes = probe_problems(checkpoint, problems)
    answers = sl.answer(checkpoint, [problem.question for problem in problems])
    for probe, problem, answer in zip(probes, problems, answers, strict=True):
        assert (probe.question, probe.answer, probe.gold_answer) == (problem.question, answer, problem.answer)
        assert [group.gold for group in probe.groups] == gold_groups(checkpoint, problem)
        for group in probe.groups:
            assert (group.decoded, group.probability, group.right) == ("<<3*4=12>>", 0.5, True)
            assert (group.forced_token_accuracy is None) == (group.exact is None) == (group.gold is None)
    first = probes[0].groups[0]
    assert (first.gold, first.exact, first.operators, first.operands, first.result) == ("<<3*4=12>>", *[True] * 4)
    second = probes[0].groups[1]
    assert (second.gold, second.exact, second.operators, second.result) == ("<<12-2=10>>", False, False, False)


def test_probing_questions(checkpoint: Checkpoint, questions: list[str]) -> None:
    """Without gold: texts, whether they are right, probabilities, answers."""
    probes = probe_questions(checkpoint, questions)
    assert [probe.answer for probe in probes] == sl.answer(checkpoint, questions)
    decoded = decode_groups(checkpoint, sl.think(checkpoint, questions))
    assert [[(g.decoded, g.probability) for g in probe.groups] for probe in probes] == decoded
    assert all(0 < g.probability <= 1 and g.gold is None for probe in probes for g in probe.groups)


def scored(exact: bool, result: bool, probability: float, right: bool | None = True, gold: str = "gold") -> GroupProbe:
    return GroupProbe(
        "x", right, probability, gold, exact=exact, operators=exact, operands=result, result=result,
        forced_token_accuracy=0.75, gold_probability=probability / 2,
        v_information=None if right is None else 4 * probability,
        v_information_bound=None if right is None else 5.0,
    )  # fmt: skip


def test_a_summary_in_closed_form() -> None:
    """Means over groups with gold, by step index and over all; answers with their interval."""
    probes = [
        QuestionProbe("a", [scored(True, True, 1.0), scored(False, True, 0.5)], "10", "10"),
        QuestionProbe("b", [scored(False, False, 0.2, right=None, gold="other"), GroupProbe("x", None, 0.9)], "", "7"),
        QuestionProbe("c", [GroupProbe("x", True, 0.9), GroupProbe("x", True, 0.9)], "3.0", "3"),
    ]
    summary = summarise(probes)
    assert summary["n"] == 3
    assert summary["accuracy"] == pytest.approx(2 / 3)
    assert summary["ci95"] == list(wilson_interval(2, 3))
    assert set(summary["by_step"]) == {"1", "2"}
    assert summary["answer_groups"] == {"n": 0}
    expected: dict[str, dict[str, float]] = {
        "all": {"n": 3, "exact": 1 / 3, "operators": 1 / 3, "operands": 2 / 3, "result": 2 / 3, "right": 2 / 3,
                "probability": 1.7 / 3, "forced_token_accuracy": 0.75, "gold_probability": 0.85 / 3,
                "v_information": 3.0, "v_information_bound": 5.0, "text_entropy": 2 / 3},
        "1": {"n": 2, "exact": 0.5, "operators": 0.5, "operands": 0.5, "result": 0.5, "right": 0.5,
              "probability": 0.6, "forced_token_accuracy": 0.75, "gold_probability": 0.3,
              "v_information": 4.0, "v_information_bound": 5.0, "text_entropy": 1.0},
        "2": {"n": 1, "exact": 0.0, "operators": 0.0, "operands": 1.0, "result": 1.0, "right": 1.0,
              "probability": 0.5, "forced_token_accuracy": 0.75, "gold_probability": 0.25,
              "v_information": 2.0, "v_information_bound": 5.0, "text_entropy": 0.0},
    }  # fmt: skip
    for step, scores in expected.items():
        found = summary["all"] if step == "all" else summary["by_step"][step]
        assert found.pop("exact_ci95") == list(wilson_interval(round(scores["exact"] * scores["n"]), int(scores["n"])))
        assert found == pytest.approx(scores)


def test_a_summary_without_gold_steps() -> None:
    summary = summarise([QuestionProbe("a", [GroupProbe("x", None, 0.9)], "1", "2")])
    assert (summary["all"], summary["by_step"], summary["accuracy"]) == ({"n": 0}, {}, 0.0)
    assert not any(math.isnan(value) for value in summary["ci95"])
    assert printed(summary_table(summary))


def printed(table: Any) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def lines_with(text: str, *pieces: str) -> Sequence[str]:
    return [line for line in text.splitlines() if all(piece in line for piece in pieces)]


def test_the_table_for_people() -> None:
    """A row a group with what it says, whether that is right and how sure the decoder is; then the answer."""
    groups = [
        GroupProbe("<<3*4=12>>", True, 0.9234, "<<3*4=12>>"),
        GroupProbe("<<12-2=11>>", False, 0.5),
        GroupProbe("#### 11", None, 0.1),
    ]
    table = printed(probe_table([QuestionProbe("How many pears?", groups, "11", "10")]))
    assert lines_with(table, "How many pears?", "1", "<<3*4=12>>", "yes", "0.923")
    assert lines_with(table, "2", "<<12-2=11>>", "no", "0.500")
    assert lines_with(table, "answer", "11", "no", "#### 10")
    assert lines_with(table, "3", "#### 11", "-", "0.100")
    without_gold = printed(probe_table([QuestionProbe("How many?", groups[:1], "")]))
    assert lines_with(without_gold, "answer", "(none)")
    assert "gold" not in without_gold


def test_text_in_the_table_is_never_markup() -> None:
    """Brackets in a question, or in what a half-trained decoder says, are printed as they are and break nothing."""
    groups = [GroupProbe("[b]<<3*4=12>>", False, 0.5, "[i]gold")]
    table = printed(probe_table([QuestionProbe("What is [/b] in [red]?", groups, "[u]7", "[s]8")]))
    for text in ("What is [/b] in [red]?", "[b]<<3*4=12>>", "[i]gold", "[u]7", "[s]8"):
        assert text in table


def probe_of(question: str, answer: str, *exact: bool | None) -> QuestionProbe:
    return QuestionProbe(question, [GroupProbe("<<1+1=2>>", True, 0.5, exact=each) for each in exact], answer, "12")


@pytest.mark.parametrize(
    ("probes", "shown"),
    [
        ([probe_of("long enough", "12", True, None), probe_of("longest of all", "12", True)], "long enough"),
        (
            [probe_of("wrong", "13", True), probe_of("misread", "12", True, False), probe_of("longest", "12.0")],
            "longest",
        ),
        ([probe_of("wrong too", "13", True), probe_of("wrong", "", False)], "wrong"),
    ],
    ids=["the shorter", "the one that is right", "none is right"],
)
def test_what_a_user_may_try_first(probes: list[QuestionProbe], shown: str) -> None:
    """Of the held-out problems that training ends with, one that the model can read."""
    assert to_be_shown(probes, tolerance=0.0) == shown
