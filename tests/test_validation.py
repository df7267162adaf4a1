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
from simcot_latent.config import LatentConfig, LossConfig, MethodConfig, RunConfig
from simcot_latent.curricula.base import Stage
from simcot_latent.data.problem import Problem
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.distributed import Ranks
from simcot_latent.generate import Generation, Sampling
from simcot_latent.method import Method
from simcot_latent.model.gpt import GPT
from simcot_latent.training import saving, validation
from simcot_latent.training.validation import HeldOut, collapse, validate, validation_table

# --- what is measured ------------------------------------------------------------------------------------------------

K, PER_STEP = 4, 2

MakeMethod = Callable[..., Method]


@pytest.fixture(scope="module")
def make_method(
    make_model: Callable[..., GPT],
    make_run: Callable[..., RunConfig],
    randomise: Callable[..., None],
    tokenizer: Tokenizer,
) -> MakeMethod:
    """`make_method(mode, step_weight=1.3, **run)`: random weights; two groups of two thoughts."""

    def make(mode: str, step_weight: float = 1.3, **run: object) -> Method:
        model = make_model("llama", vocab_size=tokenizer.n_vocab, context_length=256)
        if mode == "weighted":
            return Method(model, tokenizer, make_run(**run), MethodConfig())
        latent = LatentConfig(n_latents=K, latents_per_step=PER_STEP, missing="mask", warmup=0.0)
        config = MethodConfig.simcot(latent, loss=LossConfig(answer_weight=0.7, step_weight=step_weight))
        method = Method(model, tokenizer, make_run(**({"rationale": "equations"} | run)), config)
        if method.step_decoder is not None:
            randomise(method.step_decoder.transformer, seed=1)
        return method

    return make


def as_checkpoint(method: Method, stage: Stage) -> Checkpoint:
    return saving.as_checkpoint(method, stage, {"max_new_tokens": method.run.max_new_tokens}, step=0)


def held_out(method: Method, problems: Sequence[Problem]) -> HeldOut:
    return HeldOut(list(problems), [method.encode(problem) for problem in problems])


def validated(method: Method, problems: Sequence[Problem], stage: Stage) -> dict[str, float]:
    return validate(method, as_checkpoint(method, stage), held_out(method, problems), method.run, Ranks())


WRITES = Stage(0, first_written=0)
STAGES = {
    "weighted": ("weighted", WRITES),
    "warm-up": ("latent", WRITES),
    "first stage": ("latent", Stage(PER_STEP, first_written=1)),
    "last stage": ("latent", Stage(K, first_written=None)),
}


@pytest.mark.parametrize("stage", STAGES)
def test_held_out_losses_are_those_of_one_batch(make_method: MakeMethod, problems: list[Problem], stage: str) -> None:
    """Cut into batches of two, `val_*` is what the method finds for all problems at once, every share of it: its own
    tests hold that against references."""
    mode, its_stage = STAGES[stage]
    method = make_method(mode, eval_batch_size=2, max_new_tokens=2)
    metrics = validated(method, problems, its_stage)
    batch = method.collate([method.encode(problem) for problem in problems], its_stage)
    with torch.no_grad():
        expected = {f"val_{key}": value.item() for key, value in method(batch, batch.totals).items()}
    assert {key for key in metrics if key.startswith("val_")} == {*expected, "val_accuracy"}
    for key, value in expected.items():
        assert metrics[key] == pytest.approx(value, rel=1e-5), key
    with_steps = {"val_loss", "val_step_accuracy"} if mode == "weighted" else {"val_loss", "val_answer_loss"}
    assert with_steps <= expected.keys()
    assert ("val_step_loss" in expected) == bool(its_stage.thoughts)
    assert all(parameter.grad is None for parameter in method.parameters())
    assert method.training, "training goes on"


def test_the_stage_is_the_checkpoints(make_method: MakeMethod, problems: list[Problem]) -> None:
    """Else the test above might compare what does not depend on it."""
    losses = [
        validated(make_method("latent", max_new_tokens=2), problems, stage)["val_loss"]
        for mode, stage in STAGES.values()
        if mode == "latent"
    ]
    assert all(abs(a - b) > 1e-3 for a, b in combinations(losses, 2))


@pytest.mark.parametrize("stage", ["first stage", "last stage"])
def test_without_step_supervision_nothing_is_decoded(
    make_method: MakeMethod, problems: list[Problem], stage: str
) -> None:
    """The answer loss and the geometry of thoughts are as with a decoder; what a decoder would say is not asked."""
    found = validated(make_method("latent", step_weight=0, max_new_tokens=2), problems, STAGES[stage][1])
    decoded = validated(make_method("latent", max_new_tokens=2), problems, STAGES[stage][1])
    left_out = {"val_step_loss", "val_step_accuracy", "thought_v_information", "thought_v_information_bound"}
    assert decoded.keys() - found.keys() == left_out
    for key in found.keys() - {"val_loss"}:
        assert found[key] == pytest.approx(decoded[key], rel=1e-5), key
    assert found["val_loss"] == pytest.approx(0.7 * found["val_answer_loss"], rel=1e-5)


def written_for(outputs: dict[str, str]) -> Callable[..., list[Generation]]:
    """In place of `generate`: what a model writes after each question, however questions are batched."""

    def generate(
        checkpoint: Checkpoint, questions: Sequence[str], max_new_tokens: int, sampling: Sampling | None = None
    ) -> list[Generation]:
        assert sampling is None or sampling.temperature == 0, "validation is greedy"
        K, D = checkpoint.n_states, checkpoint.model.config.n_embd
        latents_KD = torch.zeros(K, D) if K else None
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
    make_method: MakeMethod,
    problems: list[Problem],
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    case: str,
    batch_size: int,
) -> None:
    """All golds differ, and so do the lengths of the problems: batches are in another order than the problems."""
    mode, its_stage = STAGES[stage]
    own = [Problem(p.question, p.steps, p.rationale, gold) for p, gold in zip(problems, GOLD, strict=True)]
    outputs, right = WRITTEN[case]
    monkeypatch.setattr(validation, "generate", written_for(dict(zip((p.question for p in own), outputs, strict=True))))
    method = make_method(mode, eval_batch_size=batch_size)
    assert validated(method, own, its_stage)["val_accuracy"] == right / 5


@pytest.mark.parametrize(("tolerance", "right"), [(0.0, 2), (0.01, 3), (0.2, 5)])
def test_accuracy_within_the_tolerance_that_the_data_state(
    tolerance: float, right: int, make_method: MakeMethod, problems: list[Problem],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    own = [Problem(p.question, p.steps, p.rationale, gold) for p, gold in zip(problems, GOLD, strict=True)]
    outputs = ("#### 10", "#### 4", "#### 4.51", "#### 44", "#### 6")
    monkeypatch.setattr(validation, "generate", written_for(dict(zip((p.question for p in own), outputs, strict=True))))
    method = make_method("weighted")
    stated = replace(held_out(method, own), tolerance=tolerance)
    metrics = validate(method, as_checkpoint(method, WRITES), stated, method.run, Ranks())
    assert metrics["val_accuracy"] == right / 5


def test_accuracy_of_what_the_model_itself_writes(
    make_method: MakeMethod, problems: list[Problem], tokenizer: Tokenizer
) -> None:
    """Trained for a moment to write `#### 40` whatever the question: right about the problem whose gold that is."""
    method = make_method("weighted", rationale="none", max_new_tokens=8, eval_batch_size=2)
    forty = [Problem(p.question, p.steps, p.rationale, "40") for p in problems]
    batch = method.collate([method.encode(problem) for problem in forty], WRITES)
    optimizer = torch.optim.Adam(method.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        method(batch, batch.totals)["loss"].backward()
        optimizer.step()
    for gold, right in ((("40",) * 5, 5), (("40", "4", "4.5", "40", "7"), 2), (("1", "2", "3", "4", "40"), 1)):
        own = [Problem(p.question, p.steps, p.rationale, answer) for p, answer in zip(problems, gold, strict=True)]
        assert validated(method, own, WRITES)["val_accuracy"] == right / 5


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
    make_method: MakeMethod, problems: list[Problem], monkeypatch: pytest.MonkeyPatch, stage: str, world: int
) -> None:
    """Five problems over two and three ranks, some of them answered rightly: every rank returns the numbers of all."""
    mode, its_stage = STAGES[stage]
    own = [Problem(p.question, p.steps, p.rationale, gold) for p, gold in zip(problems, GOLD, strict=True)]
    if mode == "weighted":  # the other stage thinks
        write = written_for(dict(zip((p.question for p in own), WRITTEN["some"][0], strict=True)))
        monkeypatch.setattr(validation, "generate", write)
    methods = [make_method(mode, eval_batch_size=2, max_new_tokens=2) for _ in range(world)]
    alone = validated(methods[0], own, its_stage)
    assert alone["val_accuracy"] == (0.4 if mode == "weighted" else 0.0)
    meeting, table = threading.Barrier(world), [{} for _ in range(world)]

    def one(rank: int) -> dict[str, float]:
        method, ranks = methods[rank], InThreads(rank, world, meeting, table)
        return validate(method, as_checkpoint(method, its_stage), held_out(method, own), method.run, ranks)

    with ThreadPoolExecutor(world) as threads:
        for found in threads.map(one, range(world)):
            assert found == pytest.approx(alone, rel=1e-4, abs=1e-4)


def test_answers_are_as_long_and_batches_as_large_as_the_run_says(
    make_method: MakeMethod, problems: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    write = written_for(dict.fromkeys((p.question for p in problems), "#### 1"))

    def spy(checkpoint: Checkpoint, questions: Sequence[str], limit: int, *rest: Sampling) -> list[Generation]:
        asked.append((len(questions), limit))
        return write(checkpoint, questions, limit, *rest)

    monkeypatch.setattr(validation, "generate", spy)
    validated(make_method("weighted", eval_batch_size=2, max_new_tokens=17), problems, WRITES)
    assert asked == [(2, 17), (2, 17), (1, 17)]


@torch.no_grad()
def naive_thoughts(method: Method, question: str, n: int) -> list[Tensor]:
    """One question, a whole new pass for every thought."""
    model, tokenizer = method.model, method.tokenizer
    vectors = [model.embedding.weight[i] for i in [*tokenizer.encode(question), tokenizer.bot_id]]
    thoughts: list[Tensor] = []
    for _ in range(n):
        thoughts.append(model.transformer(torch.stack(vectors).unsqueeze(0))[0, -1])
        vectors.append(thoughts[-1])
    return thoughts


def mean(values: Sequence[Tensor]) -> float:
    assert len(values) > 0
    return torch.stack(list(values)).mean().item()


def test_the_geometry_is_of_the_problems_thoughts(make_method: MakeMethod, problems: list[Problem]) -> None:
    """All four distances by hand, over thoughts from one naive loop per problem."""
    method = make_method("latent", eval_batch_size=2, max_new_tokens=2)
    metrics = validated(method, problems, method.last_stage)
    latents = [naive_thoughts(method, problem.question, K) for problem in problems]
    word = method.model.embedding.weight.detach().mean(0)
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


def test_who_does_not_think_has_no_geometry(make_method: MakeMethod, problems: list[Problem]) -> None:
    for stage in ("weighted", "warm-up"):
        mode, its_stage = STAGES[stage]
        metrics = validated(make_method(mode, max_new_tokens=2), problems, its_stage)
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
