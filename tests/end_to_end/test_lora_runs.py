"""Training with LoRA, run as a user would: what is trained, kept, gone on with, spread over ranks and exported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from commands import TINY, TRAIN, contents, predictions_of, read_lines, report_in, run, run_process, without_command
from safetensors.torch import load_file, save_file
from torch import Tensor

import simcot_latent as sl
from simcot_latent.interop.exported import export_hf
from simcot_latent.model.gpt import GPT

pytestmark = pytest.mark.xdist_group("lora_runs")  # one worker, so that the runs are made once

EXPORT = "simcot_latent.export"
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")

# What is left of TINY where the model comes from elsewhere; all that CODI has; a decoder that copies the base twice.
RUN = (
    *(argument for argument in TINY if not argument.startswith("model.")),
    "data=gsm8k",
    "method=simcot_codi",
    "latent.n_latents=2",
    "latent.projector_width=16",
    "decoder.init=base",
    "num_iterations=20",
    "eval_every=10",
    "checkpoint_every=10",
)
STAGES = ("curriculum=replace", "latent.warmup=0.4", "latent.stages=[{steps: 2, share: 0.2}]")
LORA = ("lora.rank=4", "lora.alpha=8")
DROPOUT = "lora.dropout=0.2"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
        vocab_size=tokenizer.get_vocab_size(),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=256,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.2,  # with 0.02 no hidden state of this width is near any row of the head, which is frozen
    )
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def arguments(base: Path, sums: Path) -> tuple[str, ...]:
    """A run of twenty steps but for `out_dir`."""
    return (*RUN, f"data.path={sums}", f"init_from={base}")


@pytest.fixture(scope="module")
def runs(arguments: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same run in `merged` and in `apart`."""
    folder = tmp_path_factory.mktemp("runs")
    for name, merge in (("merged", "true"), ("apart", "false")):
        out = run(TRAIN, *arguments, *STAGES, *LORA, DROPOUT, f"lora.merge={merge}", f"out_dir={name}",
                  folder=folder).ok().out  # fmt: skip
        assert "are trained (LoRA)" in out
    return folder


def cut_back(run_folder: Path, to: Path) -> None:
    """A run as it would lie there had it been killed just after its checkpoint of step 10."""
    shutil.copytree(run_folder, to, symlinks=True)
    shutil.rmtree(to / "step_0000020")
    (to / "latest").unlink()
    (to / "latest").symlink_to("step_0000010")


def losses(out_dir: Path) -> list[dict[str, float]]:
    """The logged lines, without the numbers that depend on the clock."""
    return [
        {key: value for key, value in line.items() if key not in ("tokens_per_s", "data_wait")}
        for line in read_lines(out_dir / "metrics.jsonl")
    ]


def base_weights(base: Path) -> dict[str, Tensor]:
    return sl.load_pretrained(base).model.state_dict()


def factors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in tensors.items() if ".lora_" in name}


# What a checkpoint holds


def test_files_of_a_checkpoint(runs: Path, base: Path) -> None:
    merged, apart = (load_file(runs / name / "latest/model.safetensors") for name in ("merged", "apart"))
    ours, theirs = load_file(runs / "apart/latest/lora.safetensors"), base_weights(base)
    assert not (runs / "merged/latest/lora.safetensors").exists()
    assert merged.keys() == apart.keys() == theirs.keys()
    table = theirs.pop("embedding.weight")
    V = len(table)
    for name, weight in theirs.items():
        assert torch.equal(apart[name], weight), f"{name} is frozen"
        is_target = ".attention." in name or ".mlp." in name
        assert torch.equal(merged[name], weight) != (is_target and name.endswith("weight")), name
    for weights in (merged, apart):
        assert torch.equal(weights["embedding.weight"][:V], table)
        assert (weights["embedding.weight"][V:] != table.mean(0)).all(), "rows of new tokens are trained"
    assert torch.equal(ours.pop("embedding.rows"), apart["embedding.weight"][V:])
    assert len(ours) == len(factors(ours)) == 2 * 4 * 2
    for name in theirs:
        if f"{name.removesuffix('weight')}lora_A.weight" in ours:
            a_RI, b_OR = (ours[name.removesuffix("weight") + part] for part in ("lora_A.weight", "lora_B.0.weight"))
            torch.testing.assert_close(merged[name], theirs[name] + 8 / 4 * b_OR @ a_RI)


def test_both_kinds_load_as_the_same_model(runs: Path) -> None:
    merged, apart = (sl.load_checkpoint(runs / name) for name in ("merged", "apart"))
    for (name, ours), theirs in zip(merged.model.state_dict().items(), apart.model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6, msg=name)
    assert merged.lora is not None
    assert merged.lora == apart.lora
    assert merged.lora.merged
    assert type(apart.model) is GPT
    assert not any("lora" in name for name in apart.model.state_dict())
    questions = ["Ann has 3 pens and finds 4 more. Then the number of pens doubles. How many pens does Ann have?"] * 2
    assert sl.answer(merged, questions) == sl.answer(apart, questions)
    unmerged = sl.load_checkpoint(runs / "apart", merge_lora=False)
    assert len(factors(unmerged.model.state_dict())) == 16
    found, expected = (sl.think(each, questions).latents for each in (unmerged, merged))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert losses(runs / "merged") == losses(runs / "apart")


def test_a_loaded_checkpoint_is_saved_merged(runs: Path, tmp_path: Path) -> None:
    sl.load_checkpoint(runs / "apart").save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved/lora.safetensors").exists()
    expected = load_file(runs / "merged/latest/model.safetensors")
    for name, weight in load_file(tmp_path / "saved/model.safetensors").items():
        torch.testing.assert_close(weight, expected[name], msg=name)
    sl.load_checkpoint(runs / "apart", merge_lora=False).save_pretrained(tmp_path / "apart")
    for name in ("model.safetensors", "lora.safetensors"):
        assert (tmp_path / "apart" / name).read_bytes() == (runs / "apart/latest" / name).read_bytes()


def test_export_merges(runs: Path, tmp_path: Path) -> None:
    run(EXPORT, "ckpt=apart", f"out={tmp_path / 'command'}", folder=runs).ok()
    export_hf(sl.load_checkpoint(runs / "apart", merge_lora=False), tmp_path / "python")
    ids = torch.arange(40).view(2, 20)
    ours = sl.load_checkpoint(runs / "merged").model
    with torch.no_grad():
        expected = ours.logits(ours(ids))
        for name in ("command", "python"):
            theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
            torch.testing.assert_close(theirs(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_checkpoint_is_the_start_of_another_run(runs: Path, sums: Path, tmp_path: Path) -> None:
    """Merged, be it trained as a whole then or with LoRA anew: with a rate of nothing, it stays what it was."""
    frozen = ("num_iterations=1", "learning_rate=1e-30", "matrix_lr=1e-30", "weight_decay=0", "eval_every=-1")
    start = (*RUN, *frozen, f"data.path={sums}", f"init_from={runs / 'apart'}")
    expected = sl.load_checkpoint(runs / "apart").model.state_dict()
    for name, lora in (("whole", ()), ("again", ("lora.rank=2",))):
        out = run(TRAIN, *start, *lora, f"out_dir={name}", folder=tmp_path).ok().out
        assert ("are trained (LoRA)" in out) == bool(lora)
        for key, weight in load_file(tmp_path / name / "latest/model.safetensors").items():
            torch.testing.assert_close(weight, expected[key], atol=1e-7, rtol=1e-6, msg=key)


def test_rows_that_an_earlier_stage_added_are_trained(base: Path, sums: Path, tmp_path: Path) -> None:
    """A model that has only written its steps knows `<|bot|>` and `<|eot|>`, but as one and the same."""
    written = [a for a in RUN if not a.startswith(("method=", "latent.", "decoder.", "num_iter", "eval_every"))]
    short = (f"data.path={sums}", "num_iterations=2", "eval_every=-1")
    run(TRAIN, *written, *short, "mode=weighted", f"init_from={base}", "out_dir=written", folder=tmp_path).ok()
    before = load_file(tmp_path / "written/latest/model.safetensors")["embedding.weight"]
    tokenizer = sl.load_checkpoint(tmp_path / "written").tokenizer
    torch.testing.assert_close(before[tokenizer.bot_id], before[tokenizer.eot_id])
    run(TRAIN, *RUN, *short, *LORA, "init_from=written", "out_dir=thoughts", folder=tmp_path).ok()
    after = load_file(tmp_path / "thoughts/latest/model.safetensors")["embedding.weight"]
    assert torch.equal(after[: tokenizer.bot_id], before[: tokenizer.bot_id])
    assert (after[tokenizer.bot_id] - after[tokenizer.eot_id]).norm() > 1e-4


@pytest.mark.parametrize("name", ["merged", "apart"])
def test_commands_read_both_kinds(name: str, runs: Path, sums: Path, tmp_path: Path) -> None:
    """Evals and probe; what they say is what they say of the same model saved without a trace of LoRA."""
    shutil.copytree(runs / name / "latest", tmp_path / "ckpt")
    plain = sl.load_checkpoint(tmp_path / "ckpt")
    plain.lora = None
    plain.save_pretrained(tmp_path / "plain")
    found: list[list[str]] = []
    for folder in ("ckpt", "plain"):
        out = f"out={folder}-results"
        run("evals.gsm8k", f"ckpt={folder}", f"data.path={sums}", "limit=4", out, folder=tmp_path).ok()
        lines = read_lines(predictions_of(report_in(tmp_path / f"{folder}-results")))
        question = "question=Ann has 3 pens and finds 4 more. How many pens does Ann have?"
        probed = run("simcot_latent.probe", f"ckpt={folder}", question, folder=tmp_path).ok().out
        found.append([json.dumps(lines), probed.replace(folder, "")])
    assert found[0] == found[1]
    assert "lora" not in json.loads((tmp_path / "plain/config.json").read_text())


# Going on


LOOPS: dict[str, tuple[str, ...]] = {
    "pccot": ("latent.n_latents=4",),
    "lotus": ("latent.n_latents=4", "latent.latents_per_step=2", "loss.step_weight=1"),
    "colar": ("latent.n_latents=8", "latent.warmup=0"),
    "soft": ("latent.n_latents=2", "latent.top_k=5"),
    "pause": ("latent.n_latents=2",),
    "coconut": ("latent.n_latents=2",),
}


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", LOOPS)
def test_every_loop(method: str, optimizer: str, base: Path, sums: Path, tmp_path: Path) -> None:
    """With dropout, and computed again on the way back: resumed as uninterrupted, then loaded and asked."""
    arguments = [a for a in RUN if not a.startswith(("method=", "latent.", "decoder.", "num_iter", "eval_", "check"))]
    arguments += [f"data.path={sums}", f"init_from={base}", f"method={method}", *LOOPS[method], *LORA, DROPOUT]
    arguments += [f"optimizer={optimizer}", "activation_checkpointing=true", "lora.merge=false", "num_iterations=4"]
    arguments += ["checkpoint_every=2", "eval_every=-1", "eval_examples=4"]
    run(TRAIN, *arguments, "out_dir=once", folder=tmp_path).ok()
    shutil.copytree(tmp_path / "once", tmp_path / "twice", symlinks=True)
    shutil.rmtree(tmp_path / "twice/step_0000004")
    (tmp_path / "twice/latest").unlink()
    (tmp_path / "twice/latest").symlink_to("step_0000002")
    run(TRAIN, *arguments, "resume=true", "out_dir=twice", folder=tmp_path).ok()
    ours, theirs = (contents(tmp_path / name / "step_0000004") for name in ("twice", "once"))
    assert without_command(ours) == without_command(theirs)
    assert losses(tmp_path / "twice") == losses(tmp_path / "once")
    moved = factors(load_file(tmp_path / "once/latest/lora.safetensors"))
    assert all(x.abs().max() > 0 for x in moved.values()), "every B has left zero"
    question = ["Ann has 3 pens and finds 4 more. How many pens does Ann have?"]
    apart = sl.load_checkpoint(tmp_path / "once", merge_lora=False)
    assert sl.answer(apart, question, max_new_tokens=4) == sl.answer(
        sl.load_checkpoint(tmp_path / "once"), question, max_new_tokens=4
    )


@pytest.mark.parametrize("name", ["merged", "apart"])
def test_resumed_equals_uninterrupted(name: str, runs: Path, arguments: tuple[str, ...], tmp_path: Path) -> None:
    """To the last bit, dropout included; in between thoughts begin, and the decoder starts as the base once more."""
    cut_back(runs / name, tmp_path / "twice")
    merge = f"lora.merge={str(name == 'merged').lower()}"
    out = (
        run(TRAIN, *arguments, *STAGES, *LORA, DROPOUT, merge, "resume=auto", "out_dir=twice", folder=tmp_path).ok().out
    )
    assert "step 00010/00020 | loss" not in out
    assert "step 00011/00020 | loss" in out
    assert without_command(contents(tmp_path / "twice/step_0000020")) == without_command(
        contents(runs / name / "step_0000020")
    )
    assert losses(tmp_path / "twice") == losses(runs / name)


def test_what_is_kept_may_change_on_the_way(runs: Path, arguments: tuple[str, ...], tmp_path: Path) -> None:
    """From merged checkpoints to ones with factors, and back: the same training."""
    for name, other in (("merged", "apart"), ("apart", "merged")):
        cut_back(runs / name, tmp_path / name)
        merge = f"lora.merge={str(other == 'merged').lower()}"
        run(TRAIN, *arguments, *STAGES, *LORA, DROPOUT, merge, "resume=true", f"out_dir={name}", folder=tmp_path).ok()
        ours, theirs = (contents(folder / "step_0000020") for folder in (tmp_path / name, runs / other))
        assert ours.keys() == theirs.keys()
        for file in ours:
            if file.endswith(".safetensors"):
                assert ours[file] == theirs[file], file


@pytest.mark.slow
def test_two_ranks_are_gone_on_with(base: Path, sums: Path, tmp_path: Path) -> None:
    """To the last bit: the masks of each rank are those of the step, though random states are kept of one rank only."""
    arguments = [a for a in RUN if not a.startswith(("num_iter", "eval_every", "check"))]
    arguments += [f"data.path={sums}", f"init_from={base}", *LORA, DROPOUT, "num_iterations=4", "eval_every=-1"]
    arguments += ["checkpoint_every=2", "target_examples_per_step=7", "device_batch_size=2"]
    run_process(*LAUNCHER, "-m", TRAIN, *arguments, "out_dir=once", folder=tmp_path).ok()
    shutil.copytree(tmp_path / "once", tmp_path / "twice", symlinks=True)
    shutil.rmtree(tmp_path / "twice/step_0000004")
    (tmp_path / "twice/latest").unlink()
    (tmp_path / "twice/latest").symlink_to("step_0000002")
    run_process(*LAUNCHER, "-m", TRAIN, *arguments, "resume=true", "out_dir=twice", folder=tmp_path).ok()
    ours, theirs = (contents(tmp_path / name / "step_0000004") for name in ("twice", "once"))
    assert without_command(ours) == without_command(theirs)


KILLED = """
import os, signal
from simcot_latent import cli, train
from simcot_latent.train import Trainer

train_step = Trainer.train_step

def killed(self, prepared):
    if self.step == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(self, prepared)

Trainer.train_step = killed
cli.run(train.main, "train")
"""


def test_killed_and_gone_on_with(runs: Path, arguments: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    lora = (*STAGES, *LORA, DROPOUT, "out_dir=run", "resume=auto")
    died = run_process("killed.py", *arguments, *lora, folder=tmp_path)
    assert died.status == -9
    run(TRAIN, *arguments, *lora, folder=tmp_path).ok()
    assert without_command(contents(tmp_path / "run/step_0000020")) == without_command(
        contents(runs / "merged/step_0000020")
    )


def test_what_may_not_change(runs: Path, arguments: tuple[str, ...], tmp_path: Path) -> None:
    cut_back(runs / "apart", tmp_path / "run")
    again = (*arguments, *STAGES, DROPOUT, "lora.merge=false", "resume=true", "out_dir=run")
    before = contents(tmp_path / "run")
    for change, words in (
        (("lora.rank=5", "lora.alpha=8"), "lora.rank (was 4, is 5) may not change in a run"),
        (("lora.rank=4", "lora.alpha=9"), "lora.alpha (was 8.0, is 9.0) may not change"),
        ((*LORA, "lora.targets=[qkv]"), "lora.targets (was ['qkv', 'out', 'up', 'down'], is ['qkv']) may not change"),
        ((*LORA, "lora.new_rows=false"), "lora.rows (was 50, is 0) may not change"),
        (("lora=none",), "lora (there was one) may not change"),
    ):
        refused = run(TRAIN, *again, *change, folder=tmp_path).error
        assert words in refused
        assert contents(tmp_path / "run") == before


def test_a_run_without_is_gone_on_with_without(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """Also one that was begun when there was no LoRA yet."""
    short = (*arguments, "num_iterations=4", "checkpoint_every=2", "eval_every=-1")
    run(TRAIN, *short, "out_dir=once", folder=tmp_path).ok()
    shutil.copytree(tmp_path / "once", tmp_path / "twice", symlinks=True)
    shutil.rmtree(tmp_path / "twice/step_0000004")
    (tmp_path / "twice/latest").unlink()
    (tmp_path / "twice/latest").symlink_to("step_0000002")
    file = tmp_path / "twice/step_0000002/config.json"
    config = json.loads(file.read_text())
    assert "lora" not in config
    assert config["run"].pop("lora")["rank"] is None
    file.write_text(json.dumps(config))
    (file.parent / "manifest.json").unlink()
    refused = run(TRAIN, *short, *LORA, "resume=true", "out_dir=twice", folder=tmp_path).error
    assert "lora (there was none) may not change in a run" in refused
    out = run(TRAIN, *short, "resume=auto", "out_dir=twice", folder=tmp_path).ok().out
    assert "other options" not in out
    ours, theirs = (load_file(tmp_path / name / "latest/model.safetensors") for name in ("once", "twice"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# Ranks, optimizers, modes


@pytest.mark.parametrize("mode", ["latent", pytest.param("weighted", marks=pytest.mark.slow)])
def test_two_ranks_equal_one(mode: str, base: Path, sums: Path, tmp_path: Path) -> None:
    """Seven examples per step: the ranks have four and three, so two micro-batches each, where one process has four.

    Without what CODI divides by, which is of a micro-batch. The bias of keys has no gradient but rounding, of which
    AdamW makes steps of full length: it adds the same to all that a query is compared with. So `qkv.bias` is left out.
    """
    arguments = [*RUN, f"data.path={sums}", f"init_from={base}", *LORA, "num_iterations=5", "eval_every=-1"]
    arguments += ["target_examples_per_step=7", "device_batch_size=2", "lora.merge=false"]
    if mode == "latent":
        arguments += [*STAGES, "loss.distill_norm=none"]
    else:
        arguments = [a for a in arguments if not a.startswith(("method=", "latent.", "decoder."))] + ["mode=weighted"]
    two = run_process(*LAUNCHER, "-m", TRAIN, *arguments, "out_dir=together", folder=tmp_path).ok()
    assert "2 rank(s)" in two.out
    run(TRAIN, *arguments, "out_dir=alone", folder=tmp_path).ok()
    for name in sorted(file.name for file in (tmp_path / "alone/latest").glob("*.safetensors")):
        if name != "trainer_state.safetensors":
            ours, theirs = (load_file(tmp_path / run / "latest" / name) for run in ("together", "alone"))
            assert ours.keys() == theirs.keys()
            for key, value in theirs.items():
                if not key.endswith("qkv.bias"):
                    assert (ours[key] - value).norm() <= 1e-5 * value.norm(), f"{name}: {key}"
    ours, theirs = (losses(tmp_path / name) for name in ("together", "alone"))
    for our, their in zip(ours, theirs, strict=True):
        assert our.get("loss", 0) == pytest.approx(their.get("loss", 0), rel=1e-5)


@pytest.mark.slow
def test_dropout_is_in_training_only_and_of_the_seed(runs: Path, arguments: tuple[str, ...], tmp_path: Path) -> None:
    def first(*more: str) -> dict[str, float]:
        changes = ("num_iterations=2", "eval_every=1", "learning_rate=1e-30", "matrix_lr=1e-30", "weight_decay=0")
        run(TRAIN, *arguments, *changes, *more, "out_dir=run", folder=tmp_path).ok()
        found = {key: value for line in losses(tmp_path / "run")[:3] for key, value in line.items()}
        shutil.rmtree(tmp_path / "run")
        return found

    # B is zero at the start: what A sees does not matter yet.
    assert first(*LORA)["loss"] == pytest.approx(first(*LORA, "lora.dropout=0.5")["loss"])
    # So a run is gone on with, at a rate of nothing: started from, a checkpoint would be merged.
    found = {}
    for name, more in (("without", ()), ("with", (DROPOUT,)), ("again", (DROPOUT,)), ("other", (DROPOUT, "seed=3"))):
        cut_back(runs / "apart", tmp_path / name)
        changes = ("learning_rate=1e-30", "matrix_lr=1e-30", "weight_decay=0", "lora.merge=false", "resume=true")
        run(TRAIN, *arguments, *STAGES, *LORA, *more, *changes, f"out_dir={name}", folder=tmp_path).ok()
        lines = losses(tmp_path / name)
        found[name] = [line["loss"] for line in lines if "loss" in line and line["step"] > 10]
        found[f"{name} validated"] = [line["val_loss"] for line in lines if "val_loss" in line][-1:]
    assert found["with"] == found["again"]
    assert all(abs(ours - theirs) > 1e-6 for ours, theirs in zip(found["with"], found["without"], strict=True))
    assert found["with validated"] == pytest.approx(found["without validated"], rel=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "options",
    [pytest.param(["compile=true"], marks=pytest.mark.slow), ["activation_checkpointing=true"], ["dtype=bfloat16"]],
)
def test_it_learns(optimizer: str, options: list[str], base: Path, sums: Path, tmp_path: Path) -> None:
    """`lora=codi`, as published, brings the loss down, however it is computed."""
    arguments = [argument for argument in RUN if not argument.startswith(("num_iterations", "eval_every", "dtype"))]
    arguments += [f"data.path={sums}", f"init_from={base}", "lora=codi", "num_iterations=30", "eval_every=-1"]
    arguments += [
        f"optimizer={optimizer}",
        "learning_rate=1e-2",
        "warmup_ratio=0",
        "dtype=float32",
        "out_dir=run",
        *options,
    ]
    run(TRAIN, *arguments, folder=tmp_path).ok()
    found = [line["loss"] for line in losses(tmp_path / "run") if "loss" in line]
    assert sum(found[-5:]) < 0.7 * sum(found[:5])
    table = load_file(tmp_path / "run/latest/model.safetensors")["embedding.weight"]
    theirs = base_weights(base)["embedding.weight"]
    assert torch.equal(table[: len(theirs)], theirs)
    assert (table[len(theirs) :] == table[-1]).all(), "as published, rows of new tokens stay as they start"


# Mistakes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["lora.rank=0"], "lora.rank=0: must be at least 1, or null for no LoRA"),
        (["lora.rank=2", "lora.alpha=0"], "lora.alpha=0.0: must be above 0, finite"),
        (["lora.rank=2", "lora.dropout=1"], "lora.dropout=1.0: must be a share, from 0 to below 1"),
        (
            ["lora.rank=2", "lora.targets=[q_proj]"],
            "lora.targets=[q_proj]: must be some of qkv, out, up, down, each once",
        ),
        (["lora.rank=2", "lora.targets=[]"], "lora.targets=[]: must be some of qkv, out, up, down, each once"),
        (["lora.rank=two"], "lora.rank: Value 'two' of type 'str' could not be converted to Integer"),
        (["lora.ranks=2"], "lora.ranks"),
        (["lora=cody"], "lora=cody: must be one of codi, none"),
        (["lora=null"], "lora=null"),
    ],
)
def test_mistakes_end_in_one_line(options: list[str], words: str, arguments: tuple[str, ...], tmp_path: Path) -> None:
    assert words in run(TRAIN, *arguments, *options, folder=tmp_path).error


def test_random_weights_that_are_frozen_are_warned_of(sums: Path, tmp_path: Path) -> None:
    out = run(TRAIN, *TINY, "data=gsm8k", f"data.path={sums}", "num_iterations=1", *LORA, "out_dir=run",
              folder=tmp_path).ok().out  # fmt: skip
    assert "warning: lora.rank=4: without init_from=" in " ".join(out.split())


def test_broken_factors(runs: Path, tmp_path: Path) -> None:
    """A file that is missing, not finite, of other shapes, or of a configuration that asks for too much."""
    shutil.copytree(runs / "apart/latest", tmp_path / "ckpt")
    file, config_file = tmp_path / "ckpt/lora.safetensors", tmp_path / "ckpt/config.json"
    tensors, config = load_file(file), json.loads(config_file.read_text())

    def error() -> str:
        with pytest.raises(sl.UserError) as found:
            sl.load_checkpoint(tmp_path / "ckpt", verify=False)
        return str(found.value)

    name = "transformer.blocks.1.mlp.up.lora_A.weight"
    for change, words in (
        ({"rank": 5}, "lora.safetensors: does not fit the model: it has"),
        ({"rank": 2**31 - 1}, "lora.safetensors: does not fit the model: it has"),
        ({"rank": 0}, "lora.rank=0: must be at least 1"),
        ({"rows": 10_000}, "lora.rows=10000: must be at most 320, the rows of the table"),
        ({"targets": ["up", ["qkv"]]}, "config.lora"),
        ({"split": True}, "lora.safetensors: does not fit the model: it lacks"),
    ):
        config_file.write_text(json.dumps(config | {"lora": config["lora"] | change}))
        assert words in error()
    config_file.write_text(json.dumps(config))
    save_file(tensors | {name: torch.full_like(tensors[name], float("nan"))}, file)
    assert f"lora.safetensors: {name} holds numbers that are not finite" in error()
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    assert f"lora.safetensors: does not fit the model: it lacks {name}" in error()
    file.unlink()
    assert "lora.safetensors: no such file" in error()
