"""iCoT: which tokens go, when, and of which rows; against numbers of its public code (`tests/reference`, README.md)."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from simcot_latent.batches import WrittenBatch
from simcot_latent.config import LatentConfig, MethodConfig, RunConfig
from simcot_latent.curricula.base import Stage
from simcot_latent.curricula.remove_tokens import MOST_OFFSET, RemoveTokens, offset_probabilities
from simcot_latent.data.batch import seed_of
from simcot_latent.data.problem import Problem
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.distributed import Ranks
from simcot_latent.errors import UserError
from simcot_latent.method import Method
from simcot_latent.model.gpt import GPT
from simcot_latent.terms.text import kept
from simcot_latent.training.batches import Batches

MakeRun = Callable[..., RunConfig]

IGNORED = -100


@pytest.fixture(scope="module")
def facts(reference: Path) -> dict[str, Any]:
    return json.loads((reference / "fixtures2.json").read_text(encoding="utf-8"))["files"]["icot.safetensors"]


@pytest.fixture(scope="module")
def tensors(reference: Path) -> dict[str, Tensor]:
    return load_file(reference / "icot.safetensors")


def make_curriculum(run: RunConfig, reset_optimizer: bool = False, **settings: Any) -> RemoveTokens:
    latent = LatentConfig(reset_optimizer=reset_optimizer)
    return RemoveTokens(MethodConfig(curriculum="remove_tokens", latent=latent, own=settings), run)


# Against the public code


def removed_and_side(case: dict[str, Any], row: int) -> tuple[int | None, str]:
    if case["scheduled"] == "all":
        return None, case["side"]
    return case["scheduled"] + case["offset"][row % len(case["offset"])], case["side"]


@pytest.mark.parametrize("number", range(9))
def test_which_tokens_go(number: int, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Rows of the public layout, [question, eos, steps, eos, answer, eos], of which `kept` says what is left."""
    case, eos = facts["cases"][number], facts["eos"]
    ids_BT, labels_BT = tensors[f"case{number}.input_ids"], tensors[f"case{number}.labels"]
    for row, sample in enumerate(facts["samples"]):
        question, answer = sample["question_tokenized"], sample["answer_tokenized"]
        steps = [token for step in sample["steps_tokenized"] for token in step]
        # The fixture's answers end in eos already.
        full = [*question, eos, *steps, eos, *answer]
        assert tensors["input_ids"][row, : tensors["lengths"][row]].tolist() == full
        part = kept(len(steps), *removed_and_side(case, row))
        assert len(steps) - len(steps[part]) == tensors[f"case{number}.n_removed"][row]
        ids = [*question, eos, *steps[part], eos, *answer]
        padding = ids_BT.shape[1] - len(ids)
        assert ids_BT[row].tolist() == ids + [eos] * padding
        labels = [IGNORED] * (len(question) + 1) + ids[len(question) + 1 :] + [IGNORED] * padding
        assert labels_BT[row].tolist() == labels


@pytest.mark.parametrize("number", [7, 8])
def test_what_kept_positions_would_be(number: int, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Where each token stood before, as `kept` says: what follows the gap moves, and nothing else. The public code
    moves the token before the gap, too. Nothing here keeps positions: see the docstring of `remove_tokens`."""
    case = facts["cases"][number]
    for row, sample in enumerate(facts["samples"]):
        length, first = int(tensors["lengths"][row]), len(sample["question_tokenized"]) + 1
        n_steps = sum(map(len, sample["steps_tokenized"]))
        part = kept(n_steps, *removed_and_side(case, row))
        steps = list(range(first, first + n_steps))[part]
        ours = [*range(first), *steps, *range(first + n_steps, length)]
        theirs = tensors[f"case{number}.position_ids_upstream"][row, : len(ours)].tolist()
        before_gap = (first if case["side"] == "left" else first + len(steps)) - 1
        removed = n_steps - len(steps)
        assert theirs == [place + removed * (i == before_gap) for i, place in enumerate(ours)]
        assert removed > 0


@pytest.mark.parametrize("number", [0, 1])
def test_the_schedule(number: int, facts: dict[str, Any], tensors: dict[str, Tensor], make_run: MakeRun) -> None:
    said = facts["schedules"][number]
    curriculum = make_curriculum(
        make_run(),
        remove_per_epoch=said["remove_per_epoch"],
        remove_start=said["remove_start_from"],
        remove_all_at=said["remove_all_when_remove_beyond"],
        pretrain_epochs=said["pretrain_epochs"],
    )
    num_steps = said["steps_per_epoch"] * said["epochs"]
    curriculum.begin(said["steps_per_epoch"], num_steps)
    found = [curriculum.stage_at(step / num_steps) for step in range(num_steps)]
    removed = [-1 if stage.removed is None else stage.removed for stage in found]
    assert removed == tensors[f"schedule{number}.scheduled"].tolist()
    assert removed == tensors[f"schedule{number}.to_remove_offset0"].tolist()
    assert {(stage.thoughts, stage.first_written, stage.removed_side) for stage in found} == {(0, 0, "left")}
    assert curriculum.stage_at(1.0) == found[-1]


@pytest.mark.parametrize("name", ["lambda_4", "lambda_1", "lambda_0.5", "lambda_inf"])
def test_how_likely_offsets_are(name: str, tensors: dict[str, Tensor]) -> None:
    ours = offset_probabilities(float(name.removeprefix("lambda_")))
    torch.testing.assert_close(torch.tensor(ours), tensors[name], atol=1e-6, rtol=1e-5)
    assert sum(ours) == pytest.approx(1, abs=1e-12)
    assert min(ours) >= 0


# The schedule


def test_steps_per_epoch_need_not_be_whole(make_run: MakeRun) -> None:
    """100 problems in steps of 8: 12.5 an epoch, so a token every round(12.5 / 4) = 3 steps; pretraining ends with the
    first step that begins after it."""
    curriculum = make_curriculum(make_run(), remove_per_epoch=4, remove_all_at=3, pretrain_epochs=1)
    curriculum.begin(12.5, 25)
    removed = [curriculum.stage_at(step / 25).removed for step in range(25)]
    assert removed == [0] * 13 + [0] * 3 + [1] * 3 + [2] * 3 + [None] * 3


def test_nothing_is_counted_in_pretraining(make_run: MakeRun) -> None:
    """Not where a token goes in every step, either, and whatever the limit is. (The public code counts there in the
    first case, so that removal starts with a jump.)"""
    for limit in (9, 1):
        curriculum = make_curriculum(
            make_run(), remove_per_epoch=8, remove_start=2, remove_all_at=limit, pretrain_epochs=2
        )
        curriculum.begin(2, 8)
        removed = [curriculum.stage_at(step / 8).removed for step in range(8)]
        assert removed == [2] * 4 + ([3, 4, 5, 6] if limit == 9 else [None] * 4)


@pytest.mark.parametrize("num_steps", [1, 3, 7, 49, 1000, 3001])
def test_a_share_of_training_is_a_step_again(num_steps: int, make_run: MakeRun) -> None:
    curriculum = make_curriculum(make_run(), remove_per_epoch=1000, remove_all_at=None)
    curriculum.begin(1000, num_steps)
    assert [curriculum.stage_at(step / num_steps).removed for step in range(num_steps)] == list(range(num_steps))
    assert curriculum.stage_at(1.0).removed == num_steps - 1


def test_without_steps_it_goes_by_shares(make_run: MakeRun) -> None:
    """Who asks without training gets what a long training would have."""
    curriculum = make_curriculum(make_run(num_epochs=10), remove_per_epoch=8, remove_all_at=39)
    assert [curriculum.stage_at(share).removed for share in (0.0, 0.101, 0.301, 0.49, 1.0)] == [0, 8, 24, None, None]


@pytest.mark.parametrize(
    ("settings", "begun", "said"),
    [
        (
            {},
            (100, 400),
            "33 tokens are removed in the last step, not all; raise num_epochs, or latent.remove_per_epoch",
        ),
        ({}, (100, 469), None),
        ({"remove_all_at": None}, (100, 400), None),  # whoever asks for no end
    ],
)
def test_a_schedule_that_does_not_come_to_its_end_is_told(
    settings: dict[str, Any], begun: tuple[int, int], said: str | None, make_run: MakeRun
) -> None:
    curriculum = make_curriculum(make_run(), **settings)
    curriculum.begin(*begun)
    if said is None:
        assert curriculum.warning is None
    else:
        assert said in str(curriculum.warning)


def test_resetting_the_optimizer_is_an_option(make_run: MakeRun) -> None:
    assert make_curriculum(make_run(), reset_optimizer=True).resets_optimizer
    assert not make_curriculum(make_run()).resets_optimizer


# Offsets


def begun(run: RunConfig, **settings: Any) -> RemoveTokens:
    """A curriculum of 4 epochs of 10 steps, of which it pretrains in the first, and removes all in the last."""
    curriculum = make_curriculum(run, pretrain_epochs=1, remove_per_epoch=5, remove_all_at=10, **settings)
    curriculum.begin(10, 40)
    return curriculum


@pytest.mark.parametrize("smoothing", [4.0, 0.5])
def test_offsets_are_as_likely_as_they_should_be(smoothing: float, make_run: MakeRun) -> None:
    curriculum, n = begun(make_run(), removal_smoothing=smoothing), 20_000
    found = Counter(curriculum.draw_offset(seed_of(0, 1, position)) for position in range(n))
    for k, p in enumerate(offset_probabilities(smoothing)):
        assert abs(found[k] - n * p) <= 5 * math.sqrt(n * p * (1 - p)) + 1


def test_no_offset_is_larger_than_the_largest(make_run: MakeRun) -> None:
    """At so small a lambda most draws would be."""
    curriculum = begun(make_run(), removal_smoothing=1e-4)
    offsets = [curriculum.draw_offset(seed) for seed in range(500)]
    assert max(offsets) == MOST_OFFSET
    assert offsets.count(MOST_OFFSET) > 450


def test_offsets_add_to_the_schedule(make_run: MakeRun) -> None:
    """But in pretraining, where all is removed, and where there are none."""
    curriculum = begun(make_run(), removal_smoothing=0.5)
    seeds = list(range(40))
    offsets = [curriculum.draw_offset(seed) for seed in seeds]
    assert len(set(offsets)) > 3
    for step, expected in ((3, 0), (10, 0), (14, 2), (29, 9), (35, None)):
        stages = [curriculum.draw_stage(step / 40, seed) for seed in seeds]
        assert curriculum.stage_at(step / 40) == Stage(removed=expected)
        if expected is None or step < 10:
            assert set(stages) == {Stage(removed=expected)}
        else:
            assert stages == [Stage(removed=expected + offset) for offset in offsets]
    without = begun(make_run(), removal_smoothing=None)
    assert {without.draw_stage(14 / 40, seed) for seed in seeds} == {Stage(removed=2)}


def test_the_side_is_that_of_the_settings(make_run: MakeRun) -> None:
    curriculum = begun(make_run(), remove_side="right")
    assert curriculum.stage_at(0.5).removed_side == curriculum.draw_stage(0.5, 1).removed_side == "right"


def test_offsets_stay_what_they_are(make_run: MakeRun) -> None:
    """A run that is resumed by a later version draws what it would have drawn."""
    curriculum = begun(make_run(), removal_smoothing=0.5)
    assert [curriculum.draw_offset(seed) for seed in range(8)] == [3, 0, 6, 0, 0, 1, 3, 0]


# What is trained


@pytest.fixture
def make_method(make_model: Callable[..., GPT], tokenizer: Tokenizer, make_run: MakeRun) -> Callable[..., Method]:
    def make(rationale: str = "equations", **settings: Any) -> Method:
        config = MethodConfig(curriculum="remove_tokens", own=settings)
        model = make_model(vocab_size=tokenizer.n_vocab)
        return Method(model.train(), tokenizer, make_run(rationale=rationale, **RUN), config)

    return make


RUN = {"target_examples_per_step": 4, "device_batch_size": 4, "num_epochs": 20}


def texts_of(batch: Any, method: Method) -> list[str]:
    """What each row of a batch is to write, up to its end token."""
    assert isinstance(batch, WrittenBatch)
    texts: list[list[int]] = [[]]
    for token in batch.targets.label_M.tolist():
        if token == method.tokenizer.end_id:
            texts.append([])
        else:
            texts[-1].append(token)
    assert texts.pop() == []
    return [method.tokenizer.decode(text) for text in texts]


@pytest.mark.parametrize(
    ("stage", "written"),
    [
        (Stage(), "<<3*4=12>>\n<<12-2=10>>\n#### 10"),
        (Stage(removed=3), "4=12>>\n<<12-2=10>>\n#### 10"),  # the default tokenizer has a token for << and >>
        (Stage(removed=9), "<<12-2=10>>\n#### 10"),
        (Stage(removed=18), "\n#### 10"),
        (Stage(removed=19), "#### 10"),
        (Stage(removed=1000), "#### 10"),
        (Stage(removed=None), "#### 10"),
        (Stage(removed=3, removed_side="right"), "<<3*4=12>>\n<<12-2=1#### 10"),
        (Stage(removed=19, removed_side="right"), "#### 10"),
        (Stage(removed=25, removed_side="right"), "#### 10"),
        (Stage(removed=None, removed_side="right"), "#### 10"),
    ],
)
def test_what_is_written(
    stage: Stage, written: str, make_method: Callable[..., Method], problems: list[Problem]
) -> None:
    """The end token of the answer, the newline before the solution and the answer line always stay. What stands in a
    step still counts as a step's."""
    method = make_method()
    example = method.encode(problems[0])
    batch = method.collate([example], stage)
    assert texts_of(batch, method) == [written]
    assert isinstance(batch, WrittenBatch)
    prompt, n = example.question, len(batch.targets)
    assert sorted(batch.packing.offset_P.tolist()) == list(range(len(prompt) + n - 1))  # positions have no gap
    assert len(batch.ids_P) == len(prompt) + n - 1
    inside = {written.index(c, i) for c in "<>=*-" for i in range(len(written)) if c in written[i:]}
    assert bool(batch.targets.step_M.any()) == bool(inside)


def test_natural_solutions_lose_tokens_too(make_method: Callable[..., Method], problems: list[Problem]) -> None:
    method = make_method(rationale="natural")
    example = method.encode(problems[1])
    solution = method.tokenizer.encode("A dog has four legs.\n")
    for removed in (0, 2, len(solution)):
        left = method.tokenizer.decode(solution[removed:])
        assert texts_of(method.collate([example], Stage(removed=removed)), method) == [f"{left}#### 4"]


def test_each_row_has_its_own_stage(make_method: Callable[..., Method], problems: list[Problem]) -> None:
    """A batch of rows that lose different numbers of tokens: each as it is alone, its loss and gradients those of the
    rows one by one."""
    method = make_method()
    examples = [method.encode(problem) for problem in problems]
    stages = [Stage(removed=n) for n in (5, 0, 1, 20)] + [Stage(removed=None)]
    batch = method.collate(examples, stages)
    alone = [method.collate([example], stage) for example, stage in zip(examples, stages, strict=True)]
    assert texts_of(batch, method) == [text for one in alone for text in texts_of(one, method)]
    totals = {key: sum(one.totals[key] for one in alone) for key in ("tokens", "weights", "step_tokens")}
    assert {key: batch.totals[key] for key in totals} == totals
    method(batch, batch.totals)["loss"].backward()
    together = {name: parameter.grad for name, parameter in method.named_parameters()}
    method.zero_grad()
    loss = torch.zeros(())
    for one in alone:
        share = method(one, batch.totals)["loss"]
        share.backward()
        loss += share.detach()
    torch.testing.assert_close(method(batch, batch.totals)["loss"].detach(), loss)
    for name, parameter in method.named_parameters():
        torch.testing.assert_close(parameter.grad, together[name], atol=1e-5, rtol=1e-4)


def test_all_removed_is_no_solution(make_method: Callable[..., Method], problems: list[Problem]) -> None:
    """To the last bit what is trained with rationale=none, the method without steps."""
    method = make_method()
    ours = method.collate([method.encode(problem) for problem in problems], Stage(removed=None))
    run = replace(method.run, rationale="none")
    plain = Method(method.model, method.tokenizer, run, MethodConfig())
    theirs = plain.collate([plain.encode(problem) for problem in problems], plain.last_stage)
    assert isinstance(ours, WrittenBatch)
    assert isinstance(theirs, WrittenBatch)
    assert torch.equal(ours.ids_P, theirs.ids_P)
    assert torch.equal(ours.targets.label_M, theirs.targets.label_M)
    assert torch.equal(method(ours, ours.totals)["loss"], plain(theirs, theirs.totals)["loss"])


def texts_of_step(method: Method, problems: list[Problem], step: int, world: int = 1, size: int = 4) -> Counter[str]:
    """What all rows of an optimizer step are to write."""
    run = replace(method.run, device_batch_size=size)
    found: Counter[str] = Counter()
    for rank in range(world):
        job = SimpleNamespace(run=run, ranks=Ranks(rank, world), device=torch.device("cpu"))
        batches = Batches(method, [method.encode(problem) for problem in problems], job)  # type: ignore[arg-type]
        for batch in batches.prepare(step).batches:
            found.update(texts_of(batch, method))
    assert found.total() == 4
    return found


def test_training_tells_how_long_it_is(make_method: Callable[..., Method], problems: list[Problem]) -> None:
    """5 problems in steps of 4: 1.25 steps an epoch, so pretraining takes 2; then a token goes in each."""
    method = make_method(remove_per_epoch=1, pretrain_epochs=1, remove_all_at=4)
    job = SimpleNamespace(run=method.run, ranks=Ranks(0, 1), device=torch.device("cpu"))
    batches = Batches(method, [method.encode(problem) for problem in problems], job)  # type: ignore[arg-type]
    assert [batches.stage(step).removed for step in range(25)] == [0, 0, 0, 1, 2, 3] + [None] * 19


@pytest.mark.parametrize(("world", "size"), [(1, 1), (1, 3), (2, 2), (4, 1)])
def test_rows_lose_the_same_however_a_step_is_cut(
    world: int, size: int, make_method: Callable[..., Method], problems: list[Problem]
) -> None:
    """5 problems in steps of 4, a token a step: 1.25 steps an epoch. Also when a step is asked for once more, as after
    a resume."""
    settings = {"remove_per_epoch": 1.25, "remove_all_at": None, "removal_smoothing": 0.3, "pretrain_epochs": 4}
    whole = [texts_of_step(make_method(**settings), problems, step) for step in range(25)]
    for step in (24, 3, 7, 7):
        assert texts_of_step(make_method(**settings), problems, step, world, size) == whole[step]
    # In the 5 steps of pretraining whole solutions are written; and each step draws anew.
    method = make_method()
    full = {texts_of(method.collate([method.encode(problem)], Stage()), method)[0] for problem in problems}
    assert all(set(texts) <= full for texts in whole[:5])
    assert any(set(texts) - full for texts in whole[5:])
    plain = [texts_of_step(make_method(**settings | {"removal_smoothing": None}), problems, step) for step in range(25)]
    assert plain[:5] == whole[:5]
    assert sum(a != b for a, b in zip(plain[5:], whole[5:], strict=True)) > 10


# What is refused


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"remove_per_epoch": 0.0}, "latent.remove_per_epoch=0.0: must be above 0"),
        ({"remove_per_epoch": math.inf}, "latent.remove_per_epoch=inf: must be above 0, finite"),
        ({"remove_side": "lfet"}, "latent.remove_side=lfet: must be one of left, right; did you mean left?"),
        ({"remove_start": -1}, "latent.remove_start=-1: must be at least 0"),
        ({"remove_all_at": 0}, "latent.remove_all_at=0: must be at least 1, or null"),
        ({"removal_smoothing": 0.0}, "latent.removal_smoothing=0.0: must be above 0, or null for no random offsets"),
        ({"pretrain_epochs": -1}, "latent.pretrain_epochs=-1: must be at least 0"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], named: str, make_run: MakeRun) -> None:
    with pytest.raises(UserError) as error:
        make_curriculum(make_run(), **settings)
    assert str(error.value).startswith(named)


def test_it_needs_written_solutions_and_no_thoughts(make_run: MakeRun) -> None:
    with pytest.raises(UserError, match="rationale=none: must be equations or natural with curriculum=remove_tokens"):
        make_curriculum(make_run(rationale="none"))
    config = MethodConfig(curriculum="remove_tokens", loop="pause")
    with pytest.raises(UserError, match="loop=pause: must be none with curriculum=remove_tokens"):
        RemoveTokens(config, make_run(rationale="equations"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"removed": -1}, "stage.removed=-1"), ({"removed_side": "top"}, "stage.removed_side=top")],
)
def test_stages_that_cannot_be(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        Stage(**changes)


def test_one_stage_per_row(make_method: Callable[..., Method], problems: list[Problem]) -> None:
    method = make_method()
    examples = [method.encode(problem) for problem in problems]
    with pytest.raises(UserError, match="must be one for each of 5 rows, of at most 0 thoughts"):
        method.collate(examples, [Stage(removed=1)] * 4)
    with pytest.raises(UserError, match="must be one for each of 5 rows, of at most 0 thoughts"):
        method.collate(examples, Stage(thoughts=1))
