"""Training from published weights, and going on when they are gone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from commands import PROBE, TINY, TRAIN, Trained, contents, run, without_command
from safetensors.torch import load_file

pytestmark = pytest.mark.xdist_group("init_from")  # one worker, so that the runs are made once

# What is left of TINY where the model comes from elsewhere.
RUN = tuple(argument for argument in TINY if not argument.startswith("model."))
FROZEN = ("num_iterations=2", "learning_rate=1e-30", "matrix_lr=1e-30", "weight_decay=0", "eval_every=-1")
THINKS = ("mode=latent", "latent.n_latents=2", "latent.warmup=0", "latent.stages=0")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random GPT-2 with its tokenizer, as `transformers` and `tokenizers` write them."""
    folder = tmp_path_factory.mktemp("published") / "small-gpt2"
    folder.mkdir()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Ann has 3+4=<<3+4=7>>7 pens."] * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = transformers.GPT2Config(
        vocab_size=tokenizer.get_vocab_size(), n_embd=32, n_layer=1, n_head=2, n_positions=256, eos_token_id=0
    )
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_training_starts_with_published_weights(gpt2: Path, sums: Path, tmp_path: Path) -> None:
    data = ("data=gsm8k", f"data.path={sums}")
    out = run(TRAIN, *RUN, *FROZEN, *THINKS, *data, f"init_from={gpt2}", "out_dir=run", folder=tmp_path).ok().out
    assert "step 00002/00002" in out
    theirs, ours = load_file(gpt2 / "model.safetensors"), load_file(tmp_path / "run/latest/model.safetensors")
    table = theirs["transformer.wte.weight"]
    assert ours["embedding.weight"].shape == (320, 32)  # bot, eot, filled up to a multiple of 64
    assert torch.equal(ours["embedding.weight"][: len(table)], table)
    torch.testing.assert_close(ours["embedding.weight"][len(table) :], table.mean(0).expand(320 - len(table), -1))
    qkv = ours["transformer.blocks.0.attention.qkv.weight"]
    assert torch.equal(qkv, theirs["transformer.h.0.attn.c_attn.weight"].T)

    config = json.loads((tmp_path / "run/latest/config.json").read_text())
    assert config["run"]["model"]["n_embd"] == 32
    assert config["run"]["model"]["positions"] == "learned"
    outcome = run(PROBE, "ckpt=run", "question=Ann has 3 pens.", "format=json", folder=tmp_path).ok()
    assert len(json.loads(outcome.out)["probes"][0]["groups"]) == 2


def test_new_rows_as_a_token(gpt2: Path, sums: Path, tmp_path: Path) -> None:
    data = ("data=gsm8k", f"data.path={sums}")
    arguments = (f"init_from={gpt2}", 'new_token_init="<<"', "out_dir=run")
    run(TRAIN, *RUN, *FROZEN, *THINKS, *data, *arguments, folder=tmp_path).ok()
    row = tokenizers.Tokenizer.from_file(str(gpt2 / "tokenizer.json")).token_to_id("<<")
    table = load_file(tmp_path / "run/latest/model.safetensors")["embedding.weight"]
    assert torch.equal(table[-40:], table[row].expand(40, -1))


@pytest.mark.parametrize("key", ["latent.projector_width", "model.projector_width"])  # the latter of old
def test_a_projector_can_be_added(key: str, gpt2: Path, sums: Path, tmp_path: Path) -> None:
    arguments = ("data=gsm8k", f"data.path={sums}", f"init_from={gpt2}", f"{key}=24", "out_dir=run")
    run(TRAIN, *RUN, "num_iterations=2", "eval_every=-1", *THINKS, *arguments, folder=tmp_path).ok()
    assert load_file(tmp_path / "run/latest/loop.safetensors")["projector.up.weight"].shape == (24, 32)


def test_resuming_needs_the_weights_no_more(gpt2: Path, sums: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(gpt2, tmp_path / "source"))
    arguments = (*RUN, *THINKS, "data=gsm8k", f"data.path={sums}", f"init_from={source}", "num_iterations=4",
                 "checkpoint_every=2", "eval_every=-1")  # fmt: skip
    run(TRAIN, *arguments, "out_dir=once", folder=tmp_path).ok()
    shutil.copytree(tmp_path / "once", tmp_path / "twice", symlinks=True)
    shutil.rmtree(tmp_path / "twice" / "step_0000004")
    (tmp_path / "twice" / "latest").unlink()
    (tmp_path / "twice" / "latest").symlink_to("step_0000002")
    shutil.rmtree(source)
    run(TRAIN, *arguments, "out_dir=twice", "resume=true", folder=tmp_path).ok()
    once, twice = (without_command(contents(tmp_path / name / "latest")) for name in ("once", "twice"))
    assert once == twice


def test_weighted_then_latent(gpt2: Path, sums: Path, tmp_path: Path) -> None:
    """A run of one mode is where the other starts; tokens are added once."""
    data = ("data=gsm8k", f"data.path={sums}", "eval_every=-1", "num_iterations=2")
    run(TRAIN, *RUN, "mode=weighted", *data, f"init_from={gpt2}", "out_dir=written", folder=tmp_path).ok()
    run(TRAIN, *RUN, *FROZEN, *THINKS, *data, "init_from=written", "out_dir=thinks", folder=tmp_path).ok()
    written, thinks = (load_file(tmp_path / run / "latest/model.safetensors") for run in ("written", "thinks"))
    assert all(torch.equal(written[name], thinks[name]) for name in written)


WRONG = {
    "another width": ("model.n_embd=64", ("model.n_embd=64", "it is 32", "leave it out")),
    "another preset": ("model=small", ("model.", "init_from=", "leave it out")),
    "another tokenizer": ("tokenizer=default", ("tokenizer", "brings its own", "leave it out")),
    "no such token": ('new_token_init="<bot>"', ("new_token_init=<bot>", "no token")),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_go_together(case: str, gpt2: Path, sums: Path, tmp_path: Path) -> None:
    typed, named = WRONG[case]
    arguments = ("data=gsm8k", f"data.path={sums}", f"init_from={gpt2}", "num_iterations=1", typed)
    message = run(TRAIN, *RUN, *arguments, folder=tmp_path).error
    for word in named:
        assert word in message
    assert contents(tmp_path) == {}


def test_the_model_of_a_run_of_ours_comes_along(latent_run: Trained, sums: Path, tmp_path: Path) -> None:
    """Its shape need not be said again; said otherwise, it is an error."""
    data = ("data=gsm8k", f"data.path={sums}", f"init_from={latent_run.out_dir}")
    run(TRAIN, *RUN, *FROZEN, *THINKS, *data, "out_dir=run", folder=tmp_path).ok()
    warm, cold = (load_file(f / "latest/model.safetensors") for f in (tmp_path / "run", latent_run.out_dir))
    assert all(torch.equal(warm[name], cold[name]) for name in cold)
    assert "model.n_layer=2" in run(TRAIN, *RUN, *data, "model.n_layer=2", folder=tmp_path).error
