"""What `init_from` makes of a model: rows for new tokens; nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import cast

import pytest
import torch
from rich.console import Console
from torch import Tensor

from simcot_latent.checkpoint import Checkpoint, TrainerState
from simcot_latent.config import LatentConfig, MethodConfig, RunConfig
from simcot_latent.curricula.base import Stage
from simcot_latent.data.format import AnswerFormat
from simcot_latent.data.tokenizer import END, EOT, VOCABULARY_MULTIPLE, Tokenizer
from simcot_latent.distributed import Ranks
from simcot_latent.errors import UserError
from simcot_latent.interop.pretrained import OURS, grow_vocabulary, load_pretrained, with_latent_tokens
from simcot_latent.loops.base import NoSettings, ThoughtLoop
from simcot_latent.loops.pause import Pause
from simcot_latent.loops.sequential import Sequential, SequentialConfig
from simcot_latent.model.gpt import GPT
from simcot_latent.terms.steps import StepGroups
from simcot_latent.training.saving import save_checkpoint
from simcot_latent.training.setup import Job, Start, make_method
from simcot_latent.training.stopping import StopSignal

FAMILIES = ["gpt2", "llama", "nanochat"]
PLAIN = 300  # tokens of the published tokenizer: 256 bytes, pairs of letters, <|endoftext|>


@pytest.fixture
def plain_tokenizer() -> Tokenizer:
    """A tokenizer as published models have them: an end of text, and nothing about thoughts."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    pairs = [b"<<", *(bytes([97 + i % 26, 97 + i // 26]) for i in range(42))]
    ranks |= {pair: 256 + i for i, pair in enumerate(pairs)}
    return Tokenizer("plain", r"[\s\S]{1,2}", ranks, {"<|endoftext|>": PLAIN - 1}, {"end": "<|endoftext|>"})


@pytest.fixture
def published(make_model: Callable[..., GPT], plain_tokenizer: Tokenizer) -> Callable[[str], Checkpoint]:
    """A published model of a family."""
    return lambda family: Checkpoint(
        make_model(family, vocab_size=PLAIN),
        None,
        plain_tokenizer,
        {"max_new_tokens": 8},
        path=Path("x"),
    )


def logits(model: GPT, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.logits(model(ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_old_tokens_keep_their_logits(published: Callable[[str], Checkpoint], family: str) -> None:
    before = published(family)
    after = with_latent_tokens(before)
    assert after.model.config.vocab_size == after.tokenizer.n_vocab == 320
    assert after.tokenizer.n_vocab % VOCABULARY_MULTIPLE == 0
    ids = torch.arange(60).reshape(3, 20)
    assert torch.equal(logits(after.model, ids)[..., :PLAIN], logits(before.model, ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_new_rows_are_the_mean_and_never_the_likeliest(published: Callable[[str], Checkpoint], family: str) -> None:
    model = with_latent_tokens(published(family)).model
    for table in (model.embedding.weight, model.output_table):
        torch.testing.assert_close(table[PLAIN:], table[:PLAIN].mean(0).expand(20, -1))
    found = logits(model, torch.arange(60).reshape(3, 20))
    assert (found.argmax(-1) < PLAIN).all()
    if model.config.logit_softcap is None:
        torch.testing.assert_close(found[..., PLAIN:], found[..., :PLAIN].mean(-1, keepdim=True).expand(-1, -1, 20))


def test_new_rows_can_be_those_of_a_token(published: Callable[[str], Checkpoint]) -> None:
    checkpoint = with_latent_tokens(published("llama"), init="<<")
    for table in (checkpoint.model.embedding.weight, checkpoint.model.output_table):
        assert torch.equal(table[PLAIN:], table[256].expand(20, -1))
    with pytest.raises(UserError, match=r"new_token_init=>>>: is no token of x"):
        with_latent_tokens(published("llama"), init=">>>")


def test_roles_that_there_are_stay(published: Callable[[str], Checkpoint]) -> None:
    tokenizer = with_latent_tokens(published("llama")).tokenizer
    assert tokenizer.end_id == PLAIN - 1
    assert sorted((tokenizer.bot_id, tokenizer.eot_id, tokenizer.pad_id)) == [PLAIN, PLAIN + 1, PLAIN + 2]
    assert tokenizer.token_id(END) is None
    assert tokenizer.token_id(EOT) == tokenizer.eot_id
    assert tokenizer.decode([104, tokenizer.n_vocab - 1, 105]) == "hi"  # what fills the table up says nothing


def test_nothing_is_added_twice(published: Callable[[str], Checkpoint]) -> None:
    once = with_latent_tokens(published("gpt2"))
    twice = with_latent_tokens(once)
    assert twice.tokenizer == once.tokenizer
    assert twice.model is once.model


def test_a_tokenizer_without_thoughts_says_so(plain_tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="tokenizer plain has no bot token"):
        _ = plain_tokenizer.bot_id
    assert plain_tokenizer.bos_id is None


def test_roles_survive_saving(plain_tokenizer: Tokenizer, tmp_path: Path) -> None:
    grown = plain_tokenizer.with_roles(OURS, 64)
    grown.save(tmp_path)
    assert Tokenizer.load(tmp_path) == grown
    config = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(config | {"roles": {"bot": 3}}))
    with pytest.raises(UserError, match="roles must be a mapping"):
        Tokenizer.load(tmp_path)


# The loop that comes with a model, that which the run asks for, and what is said where they are not alike.
PROJECTS = SequentialConfig(projector_width=24)
LOOPS: dict[str, tuple[ThoughtLoop | None, MethodConfig, str | None]] = {
    "new": (None, MethodConfig.simcot(LatentConfig(projector_width=24)), None),
    "the same": (Sequential(32, PROJECTS), MethodConfig.simcot(LatentConfig(projector_width=24)), None),
    "another width": (
        Sequential(32, PROJECTS), MethodConfig.simcot(LatentConfig(projector_width=8)),
        "loop=sequential has learned is left out, since this run has loop=sequential of other settings",
    ),
    "the same where none is asked for": (Sequential(32, PROJECTS), MethodConfig.simcot(), None),
    "fits, another last state": (
        Sequential(32, PROJECTS), MethodConfig.simcot(LatentConfig(3, 2, feeds_last=False)), None
    ),
    "another loop": (
        Sequential(32, PROJECTS), MethodConfig.simcot(loop="pause"),
        "loop=sequential has learned is left out, since this run has loop=pause of other settings",
    ),
    "no loop": (
        Pause(32, NoSettings()), MethodConfig(),
        "loop=pause has learned is left out, since this run has loop=none",
    ),
    "a loop that has learned nothing": (Sequential(32, SequentialConfig()), MethodConfig.simcot(loop="pause"), None),
    "the same pause": (Pause(32, NoSettings()), MethodConfig.simcot(loop="pause"), None),
}  # fmt: skip


@pytest.mark.parametrize("case", LOOPS)
def test_a_loop_goes_on_where_it_is_the_runs_and_else_is_new(
    case: str, make_model: Callable[..., GPT], make_run: Callable[..., RunConfig], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """What is left out is said in a line. All else stays, whatever becomes of the loop."""
    before, config, words = LOOPS[case]
    model = make_model("gpt2", vocab_size=tokenizer.n_vocab)
    ids = torch.arange(20).reshape(2, 10)
    wanted = logits(model, ids)
    console = Console(file=StringIO(), width=300)
    run = make_run(rationale="equations", init_from="x")
    cpu = torch.device("cpu")
    job = Job(run, {}, tmp_path, None, cpu, Ranks(), console, cast(StopSignal, None))
    method = make_method(job, config, Start(model, tokenizer, before))
    assert method.model is model
    assert torch.equal(logits(method.model, ids), wanted)
    assert (method.loop is before) == case.startswith("the same")
    if case.startswith(("the same", "fits")) and before is not None:
        assert method.loop is not None
        weights = method.loop.state_dict()
        assert weights
        assert all(torch.equal(weight, weights[name]) for name, weight in before.state_dict().items())
    if case == "new":
        assert isinstance(method.loop, Sequential)
        assert method.loop.projector is not None
        assert method.loop.projector.up.weight.shape == (24, 32)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert said == ("" if words is None else f"warning: init_from=x: what its {words}\n")


def test_training_mode_and_vocabulary_of_a_grown_model(make_model: Callable[..., GPT]) -> None:
    model = make_model("llama").train()
    grown = grow_vocabulary(model, 64)
    assert grown.training
    assert grown.config == replace(model.config, vocab_size=64)


def test_our_own_checkpoints_come_as_they_are(published: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    checkpoint = with_latent_tokens(published("llama"))
    checkpoint.answers = AnswerFormat(thinks=True, question_end="\n", answer_mark="###")
    checkpoint.loop = Sequential(32, SequentialConfig(feeds_last=False))
    checkpoint.stage, checkpoint.groups = Stage(3, first_written=None), StepGroups(2)
    save_checkpoint(checkpoint, tmp_path, TrainerState({}, {}), keep=1)
    for source in (tmp_path, tmp_path / "latest"):
        loaded = load_pretrained(source)
        for name in ("answers", "stage", "groups"):
            assert getattr(loaded, name) == getattr(checkpoint, name)
        assert isinstance(loaded.loop, Sequential)
        assert loaded.loop.config == SequentialConfig(feeds_last=False)
        assert loaded.tokenizer == checkpoint.tokenizer
        assert torch.equal(loaded.model.embedding.weight, checkpoint.model.embedding.weight)
