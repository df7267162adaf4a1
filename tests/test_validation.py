"""What `validate` measures, recomputed problem by problem; and whether a collapse of thoughts is noticed."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor

from simcot_latent.checkpoint import Checkpoint
from simcot_latent.config import DecoderConfig, LatentConfig, LossConfig, RunConfig
from simcot_latent.data.problem import Problem
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.distributed import Ranks
from simcot_latent.generate import Generation, Sampling
from simcot_latent.model.gpt import GPT
from simcot_latent.model.thoughts import ThoughtFormat
from simcot_latent.objectives.base import Objective
from simcot_latent.objectives.latent import LatentObjective, LatentObjectiveConfig
from simcot_latent.objectives.weighted import WeightedConfig, WeightedObjective
from simcot_latent.training import validation
from simcot_latent.training.validation import HeldOut, collapse, validate, validation_table

# --- what is measured ------------------------------------------------------------------------------------------------

K, PER_STEP = 4, 2

MakeObjective = Callable[..., Objective]


@pytest.fixture(scope="module")
def make_objective(
    make_model: Callable[..., GPT],
    make_run: Callable[..., RunConfig],
    randomise: Callable[..., None],
    tokenizer: Tokenizer,
) -> MakeObjective:
    """`make_objective(mode, **run)`: random weights; two groups of two thoughts."""

    def make(mode: str, **run: object) -> Objective:
        model = make_model("llama", vocab_size=tokenizer.n_vocab, context_length=256)
        if mode == "weighted":
            return WeightedObjective(model, tokenizer, make_run(**run), WeightedConfig())
        latent = LatentConfig(n_latents=K, latents_per_step=PER_STEP, warmup=0.0)
        config = LatentObjectiveConfig(latent, DecoderConfig(), LossConfig(answer_weight=0.7, step_weight=1.3))
        objective = LatentObjective(model, tokenizer, make_run(**({"rationale": "equations"} | run)), config)
        randomise(objective.step_decoder.transformer, seed=1)
        return objective

    return make


def as_checkpoint(objective: Objective, thoughts: ThoughtFormat) -> Checkpoint:
    latent = objective.config.latent.__dict__ if isinstance(objective, LatentObjective) else {}
    config = {"latent": dict(latent), "max_new_tokens": objective.run.max_new_tokens}
    return Checkpoint(objective.model, objective.step_decoder, objective.tokenizer, thoughts, config)


def held_out(objective: Objective, problems: Sequence[Problem]) -> HeldOut:
    return HeldOut(list(problems), [objective.encode(problem) for problem in problems])


def validated(objective: Objective, problems: Sequence[Problem], thoughts: ThoughtFormat) -> dict[str, float]:
    return validate(
        objective, as_checkpoint(objective, thoughts), held_out(objective, problems), objective.run, Ranks()
    )


STAGES = {
    "weighted": ("weighted", ThoughtFormat()),
    "warm-up": ("latent", ThoughtFormat(True, 0, PER_STEP)),
    "first stage": ("latent", ThoughtFormat(True, PER_STEP, PER_STEP)),
    "last stage": ("latent", ThoughtFormat(True, K, PER_STEP)),
}


@pytest.mark.parametrize("stage", STAGES)
def test_held_out_losses_are_those_of_one_batch(
    make_objective: MakeObjective, problems: list[Problem], stage: str
) -> None:
    """Cut into batches of two, `val_*` is what the objective finds for all problems at once, every share of it: its own
    tests hold that against references."""
    mode, thoughts = STAGES[stage]
    objective = make_objective(mode, eval_batch_size=2, max_new_tokens=2)
    metrics = validated(objective, problems, thoughts)
    batch = objective.collate([objective.encode(problem) for problem in problems], thoughts)
    with torch.no_grad():
        expected = {f"val_{key}": value.item() for key, value in objective(batch, batch.totals).items()}
    assert {key for key in metrics if key.startswith("val_")} == {*expected, "val_accuracy"}
    for key, value in expected.items():
        assert metrics[key] == pytest.approx(value, rel=1e-5), key
    with_steps = {"val_loss", "val_step_accuracy"} if mode == "weighted" else {"val_loss", "val_answer_loss"}
    assert with_steps <= expected.keys()
    assert ("val_step_loss" in expected) == bool(thoughts.n_latents)
    assert all(parameter.grad is None for parameter in objective.parameters())
    assert objective.training, "training goes on"


def test_the_stage_is_the_checkpoints(make_objective: MakeObjective, problems: list[Problem]) -> None:
    """Else the test above might compare what does not depend on it."""
    losses = [
        validated(make_objective("latent", max_new_tokens=2), problems, thoughts)["val_loss"]
        for mode, thoughts in STAGES.values()
        if mode == "latent"
    ]
    assert all(abs(a - b) > 1e-3 for a, b in combinations(losses, 2))


def written_for(outputs: dict[str, str]) -> Callable[..., list[Generation]]:
    """In place of `generate`: what a model writes after each question, however questions are batched."""

    def generate(
        model: GPT,
        tokenizer: Tokenizer,
        thoughts: ThoughtFormat,
        questions: Sequence[str],
        max_new_tokens: int,
        sampling: Sampling | None = None,
    ) -> list[Generation]:
        assert sampling is None or sampling.temperature == 0, "validation is greedy"
        latents_KD = torch.zeros(thoughts.n_latents, model.config.n_embd) if thoughts.n_latents else None
        return [Generation(outputs[question], 1, True, latents_KD=latents_KD) for question in questions]

    return generate


GOLD = ("10", "4", "4.5", "40", "7")
# Per problem what is written, and whether that is right: by the number after the mark, against the problem's own gold.
WRITTEN = {
    "all right": (("#### 10", "<<2+2=4>>\n#### 4", "#### 4.50", "#### 40", "#### 7"), 5),
    "another problem's gold": (("#### 4", "#### 4.5", "#### 40", "#### 7", "#### 10"), 0),
    "right as the last number only": (("10", "#### 3, no: 4", "it is 4.5", "#### 41\n40", "so 7"), 0),
    "right as the first answer, not as the last number": (("#### 10\n3", "#### 4\n#### 5", "1", "2", "3"), 2),
    "some": (("#### 10", "#### 5", "#### 4.5", "", "#### 70"), 2),
    "none": (("", "", "", "", ""), 0),
}


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("case", WRITTEN)
@pytest.mark.parametrize("stage", ["weighted", "last stage"])
def test_accuracy_is_strict_and_against_each_problems_own_gold(
    make_objective: MakeObjective,
    problems: list[Problem],
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    case: str,
    batch_size: int,
) -> None:
    """All golds differ, and so do the lengths of the problems: batches are in another order than the problems."""
    mode, thoughts = STAGES[stage]
    own = [Problem(p.question, p.steps, p.rationale, gold) for p, gold in zip(problems, GOLD, strict=True)]
    outputs, right = WRITTEN[case]
    monkeypatch.setattr(validation, "generate", written_for(dict(zip((p.question for p in own), outputs, strict=True))))
    objective = make_objective(mode, eval_batch_size=batch_size)
    assert validated(objective, own, thoughts)["val_accuracy"] == right / 5


@pytest.mark.parametrize(("tolerance", "right"), [(0.0, 2), (0.01, 3), (0.2, 5)])
def test_accuracy_within_the_tolerance_that_the_data_state(
    tolerance: float, right: int, make_objective: MakeObjective, problems: list[Problem],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    own = [Problem(p.question, p.steps, p.rationale, gold) for p, gold in zip(problems, GOLD, strict=True)]
    outputs = ("#### 10", "#### 4", "#### 4.51", "#### 44", "#### 6")
    monkeypatch.setattr(validation, "generate", written_for(dict(zip((p.question for p in own), outputs, strict=True))))
    objective = make_objective("weighted")
    stated = replace(held_out(objective, own), tolerance=tolerance)
    metrics = validate(objective, as_checkpoint(objective, ThoughtFormat()), stated, objective.run, Ranks())
    assert metrics["val_accuracy"] == right / 5


def test_accuracy_of_what_the_model_itself_writes(
    make_objective: MakeObjective, problems: list[Problem], tokenizer: Tokenizer
) -> None:
    """Trained for a moment to write `#### 40` whatever the question: right about the problem whose gold that is."""
    objective = make_objective("weighted", rationale="none", max_new_tokens=8, eval_batch_size=2)
    forty = [Problem(p.question, p.steps, p.rationale, "40") for p in problems]
    batch = objective.collate([objective.encode(problem) for problem in forty], ThoughtFormat())
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        objective(batch, batch.totals)["loss"].backward()
        optimizer.step()
    for gold, right in ((("40",) * 5, 5), (("40", "4", "4.5", "40", "7"), 2), (("1", "2", "3", "4", "40"), 1)):
        own = [Problem(p.question, p.steps, p.rationale, answer) for p, answer in zip(problems, gold, strict=True)]
        assert validated(objective, own, ThoughtFormat())["val_accuracy"] == right / 5


class InThreads(Ranks):
    """Ranks that are threads of this process: what `sum` exchanges goes through a list in place of a network."""

    meeting: threading.Barrier
    table: list[dict[str, Tensor]]

    def __init__(self, rank: int, world: int, meeting: threading.Barrier, table: list[dict[str, Tensor]]) -> None:
        super().__init__(rank, world)
        self.__dict__.update(meeting=meeting, table=table)  # it is frozen

    def sum(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        self.table[self.rank] = values
        self.meeting.wait(timeout=60)
        total = {key: torch.stack([part[key] for part in self.table]).sum(0) for key in values}
        self.meeting.wait(timeout=60)
        return total


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("stage", ["weighted", "last stage"])
def test_ranks_find_together_what_one_finds_alone(
    make_objective: MakeObjective, problems: list[Problem], monkeypatch: pytest.MonkeyPatch, stage: str, world: int
) -> None:
    """Five problems over two and three ranks, some of them answered rightly: every rank returns the numbers of all."""
    mode, thoughts = STAGES[stage]
    own = [Problem(p.question, p.steps, p.rationale, gold) for p, gold in zip(problems, GOLD, strict=True)]
    if mode == "weighted":  # the other stage thinks
        write = written_for(dict(zip((p.question for p in own), WRITTEN["some"][0], strict=True)))
        monkeypatch.setattr(validation, "generate", write)
    objectives = [make_objective(mode, eval_batch_size=2, max_new_tokens=2) for _ in range(world)]
    alone = validated(objectives[0], own, thoughts)
    assert alone["val_accuracy"] == (0.4 if mode == "weighted" else 0.0)
    meeting, table = threading.Barrier(world), [{} for _ in range(world)]

    def one(rank: int) -> dict[str, float]:
        objective, ranks = objectives[rank], InThreads(rank, world, meeting, table)
        return validate(objective, as_checkpoint(objective, thoughts), held_out(objective, own), objective.run, ranks)

    with ThreadPoolExecutor(world) as threads:
        for found in threads.map(one, range(world)):
            assert found == pytest.approx(alone, rel=1e-4, abs=1e-4)


def test_answers_are_as_long_and_batches_as_large_as_the_run_says(
    make_objective: MakeObjective, problems: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    write = written_for(dict.fromkeys((p.question for p in problems), "#### 1"))

    def spy(model: GPT, tokenizer: Tokenizer, thoughts: ThoughtFormat, questions: Sequence[str], limit: int,
            *rest: Sampling) -> list[Generation]:  # fmt: skip
        asked.append((len(questions), limit))
        return write(model, tokenizer, thoughts, questions, limit, *rest)

    monkeypatch.setattr(validation, "generate", spy)
    validated(make_objective("weighted", eval_batch_size=2, max_new_tokens=17), problems, ThoughtFormat())
    assert asked == [(2, 17), (2, 17), (1, 17)]


@torch.no_grad()
def naive_thoughts(objective: Objective, question: str, n: int) -> list[Tensor]:
    """One question, a whole new pass for every thought."""
    model, tokenizer = objective.model, objective.tokenizer
    vectors = [model.embedding.weight[i] for i in [*tokenizer.encode(question), tokenizer.bot_id]]
    thoughts: list[Tensor] = []
    for _ in range(n):
        thoughts.append(model.transformer(torch.stack(vectors).unsqueeze(0))[0, -1])
        vectors.append(thoughts[-1])
    return thoughts


def mean(values: Sequence[Tensor]) -> float:
    assert len(values) > 0
    return torch.stack(list(values)).mean().item()


def test_the_geometry_is_of_the_problems_thoughts(make_objective: MakeObjective, problems: list[Problem]) -> None:
    """All four distances by hand, over thoughts from one naive loop per problem."""
    objective = make_objective("latent", eval_batch_size=2, max_new_tokens=2)
    metrics = validated(objective, problems, objective.thoughts)
    latents = [naive_thoughts(objective, problem.question, K) for problem in problems]
    word = objective.model.embedding.weight.detach().mean(0)
    everything = [z for thoughts in latents for z in thoughts]
    expected = {
        "thought_distance": mean([(a - b).norm() for thoughts in latents for a, b in combinations(thoughts, 2)]),
        "thought_spread": mean([(a[k] - b[k]).norm() for a, b in combinations(latents, 2) for k in range(K)]),
        "thought_to_embedding": mean([(z - word).norm() for z in everything]),
        "thought_norm": mean([z.norm() for z in everything]),
    }
    for key, value in expected.items():
        assert metrics[key] == pytest.approx(value, rel=1e-5), key
    assert all(abs(a - b) > 1e-3 for a, b in combinations(expected.values(), 2)), "no two are alike by chance"


def test_who_does_not_think_has_no_geometry(make_objective: MakeObjective, problems: list[Problem]) -> None:
    for stage in ("weighted", "warm-up"):
        mode, thoughts = STAGES[stage]
        metrics = validated(make_objective(mode, max_new_tokens=2), problems, thoughts)
        assert not [key for key in metrics if key.startswith("thought_")]


def test_the_table_for_people() -> None:
    """Every metric with its value; the accuracy with the interval of that many problems (Newcombe 1998, 81 of 263)."""
    metrics = {"val_loss": 1.2345, "val_accuracy": 81 / 263, "val_step_accuracy": 0.5, "thought_norm": 9.8765}
    table = validation_table(metrics, 263)
    names, values = (list(column.cells) for column in table.columns)
    assert dict(zip(names, values, strict=True)) == {
        "strict accuracy": "30.8% (n=263, 95% interval 25.5% to 36.6%)",
        "loss": "1.234",
        "step accuracy": "0.500",
        "thought norm": "9.877",
    }


# --- a collapse ------------------------------------------------------------------------------------------------------

HEALTHY = {"val_accuracy": 0.5, "thought_distance": 5.0, "thought_spread": 4.0, "thought_norm": 10.0}


def test_healthy_thoughts_and_none_at_all() -> None:
    assert collapse(HEALTHY) is None
    assert collapse({"val_accuracy": 0.5}) is None
    assert collapse(HEALTHY | {"thought_distance": math.nan, "thought_spread": math.nan}) is None, "no pair to measure"


@pytest.mark.parametrize(
    ("key", "words"), [("thought_distance", "between thoughts of a problem"), ("thought_spread", "between problems")]
)
def test_collapsed_thoughts(key: str, words: str) -> None:
    assert collapse(HEALTHY | {key: 1.001}) is None
    found = collapse(HEALTHY | {key: 0.999})
    assert found is not None
    for part in (words, "1.00", "10.00", "loss.step_weight"):
        assert part in found
