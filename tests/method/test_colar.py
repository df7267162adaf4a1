"""CoLaR as a method: training, answers with a number of thoughts of each row's own, validation, checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from simcot_latent.batches import ThoughtBatch, WrittenBatch
from simcot_latent.checkpoint import Checkpoint, load_checkpoint, summary, write_checkpoint
from simcot_latent.config import LatentConfig, LossConfig, MethodConfig, RunConfig
from simcot_latent.curricula.base import Stage
from simcot_latent.data.batch import Seeds
from simcot_latent.data.problem import Problem
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.distributed import Ranks
from simcot_latent.errors import UserError
from simcot_latent.generate import Sampling, generate
from simcot_latent.interop.exported import notes
from simcot_latent.loops.compressed import Compressed
from simcot_latent.method import Method
from simcot_latent.metrics import wilson_interval
from simcot_latent.model.cache import StaticCaches
from simcot_latent.model.gpt import GPT
from simcot_latent.model.losses import add_up
from simcot_latent.probing.geometry import geometry
from simcot_latent.probing.thoughts import decode_steps, latents_of, think
from simcot_latent.reports import ReportFiles
from simcot_latent.training.saving import as_checkpoint
from simcot_latent.training.validation import HeldOut, validate

REPOSITORY = Path(__file__).parents[2]
MOST = 9
QUESTIONS = [
    "How many?",
    "Ann has 3 pears and eats 2 of them. How many are left?",
    "2+2?",
    "Joe saves $5 a day for a week, then buys a book for $12. How much has he got now?",
    "A dog and a cat: how many legs?",
    "Bo?",
    "Half of 30?",
    "What is left of $20 after 4 pens at $3?",
]


def config_of(**changes: Any) -> MethodConfig:
    parts: dict[str, Any] = {"loop": "compressed", "steps": "compressed", "latent": LatentConfig(n_latents=MOST)}
    parts |= {"loss": LossConfig(step_weight=1.0)}
    return MethodConfig(**(parts | changes))


@pytest.fixture
def make_method(
    make_model: Callable[..., GPT],
    make_run: Callable[..., RunConfig],
    tokenizer: Tokenizer,
    randomise: Callable[..., None],
) -> Callable[..., Method]:
    """`make_method(family, run={}, **parts)`: CoLaR with random weights."""

    def make(family: str = "llama", run: dict[str, Any] | None = None, **parts: Any) -> Method:
        model = make_model(family, vocab_size=tokenizer.n_vocab, context_length=160)
        settings = {"rationale": "equations", "max_new_tokens": 12, "eval_batch_size": 3} | (run or {})
        method = Method(model, tokenizer, make_run(**settings), config_of(**parts))
        assert isinstance(method.loop, Compressed)
        randomise(method.loop, seed=3)
        return method

    return make


@pytest.fixture(params=["gpt2", "llama", "nanochat"])
def checkpoint(request: pytest.FixtureRequest, make_method: Callable[..., Method]) -> Checkpoint:
    """A model whose rows think now less, now more, and do not all come to the most that there may be."""
    method = make_method(request.param).eval()
    table = method.model.output_table
    with torch.no_grad():
        table[method.tokenizer.eot_id] *= {"gpt2": 6.0, "llama": 3.5, "nanochat": 16.0}[request.param]
    return as_checkpoint(method, method.last_stage, {}, 0)


# Training


@pytest.mark.parametrize("family", ["gpt2", "llama", "nanochat"])
def test_a_batch_equals_its_rows(make_method: Callable[..., Method], problems: list[Problem], family: str) -> None:
    """Shares and gradients of one batch, and of a batch per problem: the same draws, whatever the company."""
    method = make_method(family)
    examples = [method.encode(problem) for problem in problems]
    seeds = Seeds(1, list(range(10, 10 + len(examples))))
    whole = method.collate(examples, method.last_stage, seeds)
    pieces = [
        method.collate([example], method.last_stage, Seeds(1, [seed]))
        for example, seed in zip(examples, seeds.rows, strict=True)
    ]
    assert isinstance(whole, ThoughtBatch)
    assert len(set(whole.counts)) > 2
    assert 0 in whole.counts
    totals = add_up([piece.totals for piece in pieces])
    for key in ("predictions", "weights", "tokens", "positions", "rows"):
        assert totals[key] == whole.totals[key], key

    def found(batches: Sequence[ThoughtBatch | WrittenBatch]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        method.zero_grad()
        shares = []
        for batch in batches:
            shares.append(method(batch, totals))
            shares[-1]["loss"].backward()
        gradients = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
        return add_up([{key: value.detach() for key, value in each.items()} for each in shares]), gradients

    (ours, our_gradients), (theirs, their_gradients) = found([whole]), found(pieces)
    assert ours.keys() == theirs.keys() >= {"loss", "answer_loss", "step_loss", "embedding_loss", "token_loss"}
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], atol=1e-5, rtol=1e-5, msg=key)
    assert our_gradients.keys() == their_gradients.keys() == dict(method.named_parameters()).keys()
    for name, gradient in our_gradients.items():
        scale = gradient.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(gradient, their_gradients[name], atol=1e-4 * scale, rtol=1e-4, msg=name)


def test_written_steps_first(make_method: Callable[..., Method], problems: list[Problem]) -> None:
    """In the warm-up of curriculum=replace nothing is thought, and nothing of the loop is trained."""
    method = make_method(curriculum="replace", latent=LatentConfig(n_latents=MOST, warmup=0.25, stages=0))
    examples = [method.encode(problem) for problem in problems]
    batch = method.collate(examples, method.stage_at(0.1), Seeds(0, range(len(examples))))
    assert isinstance(batch, WrittenBatch)
    batch = method.collate(examples, method.stage_at(0.3), Seeds(0, range(len(examples))))
    assert isinstance(batch, ThoughtBatch)


def test_the_written_solution_is_compressed(make_method: Callable[..., Method], problems: list[Problem]) -> None:
    """The tokens of a written stage, in the thoughts."""
    method = make_method()
    examples = [method.encode(problem) for problem in problems]
    batch = method.collate(examples, method.last_stage)
    assert isinstance(batch, ThoughtBatch)
    assert batch.given is not None
    text = method.tokenizer.decode(batch.given.ids_L.tolist())
    assert text == "".join("".join(f"{step.text}\n" for step in problem.steps) for problem in problems)
    assert batch.counts == tuple(-(-len(example.rationale) // 2) for example in examples)


def test_stages_with_and_without_thoughts_in_one_batch(
    make_method: Callable[..., Method], problems: list[Problem]
) -> None:
    method = make_method()
    examples = [method.encode(problem) for problem in problems[:2]]
    with pytest.raises(UserError, match="must all have thoughts with loop=compressed, or none"):
        method.collate(examples, [Stage(0, 0), Stage(4, 1)])


@pytest.mark.parametrize(
    ("run", "parts", "says"),
    [
        ({}, {"steps": "none"}, "loop=compressed: needs a term that trains what it predicts; take steps=compressed"),
        ({}, {"steps": "decoder"}, "loop=compressed: needs a term that trains what it predicts"),
        ({}, {"steps": "own_head"}, "steps=own_head: needs the hidden states of thoughts, which loop=compressed"),
        ({}, {"loop": "sequential"}, "steps=compressed: needs the predictions of thoughts, which loop=sequential"),
        ({}, {"loop": "none"}, "steps=compressed: needs thoughts, which loop=none has not"),
        ({}, {"loss": LossConfig(step_weight=0.0)}, "loss.step_weight=0.0: must be above 0 with loop=compressed"),
        ({"rationale": "none"}, {}, "rationale=none: loop=compressed makes its thoughts of the written solution"),
        ({}, {"latent": LatentConfig(n_latents=4, feeds_last=False)}, "latent.feeds_last=false: must be true"),
    ],
)
def test_parts_that_make_no_method(
    make_method: Callable[..., Method], run: dict[str, Any], parts: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError) as error:
        make_method(run=run, **parts)
    assert str(error.value).startswith(says)


# Answers


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True], ids=["", "static caches"])
def test_the_same_answer_at_any_batch_size(checkpoint: Checkpoint, static: bool) -> None:
    """Texts, thoughts and all counts; and against a naive loop without cache or batch."""
    caches = StaticCaches(checkpoint.model.config.context_length) if static else None
    together = generate(checkpoint, QUESTIONS, 8, caches=caches)
    counts = [generation.n_thoughts for generation in together]
    assert len(set(counts)) > 2
    assert max(counts) <= MOST
    for question, generation in zip(QUESTIONS, together, strict=True):
        (alone,) = generate(checkpoint, [question], 8)
        assert alone == generation
        ids, latents_KD = naive(checkpoint, question, 8)
        assert checkpoint.tokenizer.decode(ids) == generation.text
        n = generation.n_thoughts
        assert generation.latents_KD is not None
        assert generation.latents_KD.shape == latents_KD.shape == (n, 32)
        torch.testing.assert_close(generation.latents_KD, latents_KD, atol=1e-4, rtol=1e-4)
        assert generation.n_tokens == n + len(ids)
        assert generation.n_passes == 1 + n + len(ids), "what its last thought led to ends the thinking"


def naive(checkpoint: Checkpoint, question: str, max_new_tokens: int) -> tuple[list[int], Tensor]:
    """What is written about one question, greedily, and its thoughts; everything is computed anew for every token."""
    model, loop, tokenizer = checkpoint.model, checkpoint.loop, checkpoint.tokenizer
    assert isinstance(loop, Compressed)
    table_VD = model.embedding.weight

    def last() -> Tensor:
        return model.transformer(torch.stack(vectors).unsqueeze(0))[0, -1:]

    vectors = [*table_VD[tokenizer.encode(question)], loop.speeds.weight[1], table_VD[tokenizer.bot_id]]
    thoughts: list[Tensor] = []
    while len(thoughts) < MOST and int(model.logits(last()).argmax()) != tokenizer.eot_id:
        thoughts.append(loop.head(last())[0][0] * table_VD.std())
        vectors.append(thoughts[-1])
    vectors.append(table_VD[tokenizer.eot_id])
    ids: list[int] = []
    while tokenizer.end_id not in ids and len(ids) < max_new_tokens:
        ids.append(int(model.logits(last()).argmax()))
        vectors.append(table_VD[ids[-1]])
    return ids, torch.stack(thoughts) if thoughts else torch.empty(0, 32)


@torch.no_grad()
def test_thoughts_are_drawn_at_a_temperature(checkpoint: Checkpoint) -> None:
    def drawn(seed: int) -> Tensor:
        sampling = Sampling(1.0, generator=torch.Generator().manual_seed(seed))
        return latents_of(generate(checkpoint, QUESTIONS[:1] * 3, 2, sampling))

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


@torch.no_grad()
def test_thoughts_by_themselves(checkpoint: Checkpoint) -> None:
    thoughts = think(checkpoint, QUESTIONS)
    generations = generate(checkpoint, QUESTIONS, 2)
    assert thoughts.counts == tuple(generation.n_thoughts for generation in generations)
    torch.testing.assert_close(thoughts.latents, latents_of(generations), atol=1e-5, rtol=1e-5)


def test_the_longest_question_that_fits(checkpoint: Checkpoint) -> None:
    """The context holds the question, the speed, all thoughts that there may be, `<|eot|>` and a token."""
    tokenizer = checkpoint.tokenizer
    fits = checkpoint.model.config.context_length - (MOST + 1 + 1) - 1
    question = tokenizer.decode(tokenizer.encode("a cat " * 200)[: fits - 1])
    n = len(tokenizer.encode(question))
    assert n == fits - 1  # and <|bot|>
    (generation,) = generate(checkpoint, [question], 50)
    assert generation.n_tokens - generation.n_thoughts == 1
    with pytest.raises(UserError, match=f"at most {fits} fit"):
        generate(checkpoint, [question + " cat"], 50)


def test_steps_cannot_be_read(checkpoint: Checkpoint) -> None:
    assert not checkpoint.reads_steps
    with pytest.raises(UserError, match="steps=compressed leaves nothing that steps could be read"):
        decode_steps(checkpoint, think(checkpoint, QUESTIONS[:1]))


def test_a_checkpoint_keeps_it(checkpoint: Checkpoint, tmp_path: Path) -> None:
    run = {"rationale": "equations", "max_new_tokens": 8}
    (tmp_path / "saved").mkdir()
    write_checkpoint(replace(checkpoint, config=run), tmp_path / "saved")
    loaded = load_checkpoint(tmp_path / "saved")
    assert isinstance(loaded.loop, Compressed)
    assert loaded.steps == "compressed"
    assert generate(loaded, QUESTIONS, 8) == generate(checkpoint, QUESTIONS, 8)


def test_what_is_said_of_a_checkpoint(checkpoint: Checkpoint) -> None:
    assert "as many latent thoughts as it takes, 9 at most" in summary(checkpoint)
    (line,) = notes(checkpoint, "LlamaForCausalLM")
    assert "the loop of up to 9 thoughts before an answer, and the head that says them;" in line


# Validation


def test_validation_of_rows_with_different_numbers_of_thoughts(
    checkpoint: Checkpoint, make_method: Callable[..., Method], problems: list[Problem]
) -> None:
    method = make_method()
    method.model, method.loop = checkpoint.model, checkpoint.loop
    method.terms["step"].model = checkpoint.model
    held_out = HeldOut(problems, [method.encode(problem) for problem in problems])
    metrics = validate(method, checkpoint, held_out, method.run, Ranks(0, 1))
    with torch.no_grad():
        thoughts = [generate(checkpoint, [p.question], 12)[0].latents_KD for p in problems]
    counts = [0 if x is None else len(x) for x in thoughts]
    assert len(set(counts)) > 1
    assert metrics["thoughts_per_problem"] == pytest.approx(sum(counts) / len(counts))
    own = [x for x in thoughts if x is not None]
    pairs = [(a - b).norm().item() for x in own for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
    assert metrics["thought_distance"] == pytest.approx(sum(pairs) / len(pairs), rel=1e-3)
    pairs = [
        (x[k] - y[k]).norm().item()
        for i, x in enumerate(own)
        for j, y in enumerate(own)
        for k in range(min(len(x), len(y)))
        if i != j
    ]
    assert metrics["thought_spread"] == pytest.approx(sum(pairs) / len(pairs), rel=1e-3)
    norms = torch.cat(own).norm(dim=-1)
    assert metrics["thought_norm"] == pytest.approx(norms.mean().item(), rel=1e-4)
    assert metrics["val_embedding_loss"] > 0
    again = validate(method, checkpoint, held_out, method.run, Ranks(0, 1))
    assert again == metrics  # nothing is drawn


def test_geometry_of_thoughts_that_are_not_all_there() -> None:
    latents_BKD = torch.tensor([[[0.0, 0], [3, 4], [9, 9]], [[0, 1], [9, 9], [9, 9]]])
    is_there_BK = torch.tensor([[True, True, False], [True, False, False]])
    found = geometry(latents_BKD, torch.zeros(4, 2), is_there_BK)
    assert found["thought_distance"] == pytest.approx(5)
    assert found["thought_spread"] == pytest.approx(1)
    assert found["thought_norm"] == pytest.approx((0 + 5 + 1) / 3)
    none = geometry(latents_BKD, torch.zeros(4, 2), torch.zeros_like(is_there_BK))
    assert all(value != value for value in none.values())  # nan


# Commands


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


TINY = (
    "method=colar",
    "model.n_layer=1",
    "model.n_embd=32",
    "model.n_head=2",
    "device=cpu",
    "dtype=float32",
    "data.train_size=64",
    "data.validation_size=8",
    "data.test_size=8",
    "target_examples_per_step=8",
    "num_iterations=8",
    "eval_examples=4",
    "max_new_tokens=12",
    "latent.n_latents=12",
    "log_every=1",
)


def losses(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "loss", "answer_loss", "step_loss", "token_loss", "embedding_loss")
    return [{key: row[key] for key in keys if key in row} for row in rows if "loss" in row]


@pytest.mark.slow
def test_commands(tmp_path: Path) -> None:
    """A run, cut into micro-batches otherwise, interrupted and resumed: the same losses; then an eval and a probe."""
    trained = run("simcot_latent.train", *TINY, "device_batch_size=8", "out_dir=one", folder=tmp_path)
    assert trained.returncode == 0, trained.stderr
    one = losses(tmp_path / "one")
    assert len(one) == 8
    assert "embedding_loss" not in one[0]  # the warm-up
    assert "embedding_loss" in one[-1]
    more = ("device_batch_size=3", "out_dir=two", "checkpoint_every=5", "max_minutes=null")
    assert run("simcot_latent.train", *TINY, *more, folder=tmp_path).returncode == 0
    for ours, theirs in zip(losses(tmp_path / "two"), one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    (tmp_path / "two" / "latest").unlink()
    (tmp_path / "two" / "latest").symlink_to("step_0000005")
    resumed = run("simcot_latent.train", *TINY, *more, "resume=true", folder=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    for ours, theirs in zip(losses(tmp_path / "two"), one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)

    evaluated = run("evals.arithmetic", "ckpt=one", "loop_settings={compression: 4}", "out=report", folder=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    files = ReportFiles(tmp_path / "report" / "a.json", tmp_path / "report" / "a.predictions.jsonl")
    report = json.loads(files[0].read_text())
    rows = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert report["loop_settings"] == {"compression": 4}
    for key in ("tokens", "thoughts", "passes"):
        assert report[f"{key}_per_answer"] == pytest.approx(sum(row[f"n_{key}"] for row in rows) / 8)
    assert report["ci95"] == list(wilson_interval(report["correct"], 8))

    probed = run("simcot_latent.probe", "ckpt=one", "question=1+1?", folder=tmp_path)
    assert probed.returncode == 2
    assert probed.stderr.count("\n") == 1
    assert "steps=compressed leaves nothing" in probed.stderr
    exported = run("simcot_latent.export", "ckpt=one", "out=hf", folder=tmp_path)
    assert exported.returncode == 0, exported.stderr
