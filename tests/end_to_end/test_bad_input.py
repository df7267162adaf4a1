"""A mistake ends in one line that names it, exit status 2, no traceback, and nothing written or changed."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from commands import (
    ARITHMETIC,
    OFFLINE,
    PROBE,
    REPOSITORY,
    TINY,
    TRAIN,
    Trained,
    contents,
    run,
    run_process,
    strict_json,
    write_jsonl,
)

GSM8K = "evals.gsm8k"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with a few files that are not what they should be."""
    good = {"question": "What is 3 and 4?", "answer": "<<3+4=7>>7\n#### 7"}
    write_jsonl(tmp_path / "good/train.jsonl", [good, good | {"question": "And 4 and 3?"}])
    write_jsonl(tmp_path / "broken/train.jsonl", [good, good])
    with (tmp_path / "broken/train.jsonl").open("a") as file:
        file.write('{"question": "What is\n')
    write_jsonl(tmp_path / "keyless/train.jsonl", [good, {"question": "What?"}])
    write_jsonl(tmp_path / "unanswered/train.jsonl", [good, good | {"answer": "It is 7."}])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/train.jsonl").touch()
    long = {"question": "What is 3" + " and 4" * 1200 + "?", "answer": "<<3+4=7>>7\n#### 7"}
    write_jsonl(tmp_path / "long/train.jsonl", [good, good | {"question": "And 4 and 3?"}, long])
    (tmp_path / "a_file").write_text("a file, no folder")
    return tmp_path


# What is typed after `python -m simcot_latent.train`, and what the message must name.
TRAINING = {
    "unknown mode": ("mode=lattent", ("mode", "lattent", "latent", "weighted")),
    "unknown data source": ("data=gsm9k", ("data", "gsm9k", "arithmetic", "gsm8k")),
    "unknown model": ("model=huge", ("model", "huge", "tiny", "small", "gpt2")),
    "unknown tokenizer": ("tokenizer=bert", ("tokenizer", "bert", "default", "gpt2")),
    "negative weight": ("mode=latent step_weight_multiplier=-1", ("step_weight_multiplier", "at least 0")),
    "negative weight too": ("mode=weighted step_weight_multiplier=-1", ("step_weight_multiplier", "at least 0")),
    "no thoughts": ("latent.n_latents=0", ("latent.n_latents", "at least 1")),
    "thoughts that are no number": ("latent.n_latents=abc", ("latent.n_latents", "abc", "Integer")),
    "thoughts that fill no group": ("latent.n_latents=5 latent.latents_per_step=2", ("latent.n_latents", "multiple")),
    "unknown key": ("learning_rat=1", ("learning_rat",)),
    "unknown key, added": ("+learning_rat=1", ("learning_rat", "mode=latent")),
    "unknown latent key": ("latent.n_latent=3", ("latent.n_latent",)),
    "unknown latent key, added": ("+latent.n_latent=3", ("latent.n_latent",)),
    "a key of the other mode": ("mode=weighted +latent.n_latents=3", ("latent", "mode=weighted")),
    "unknown data key": ("data.pth=x", ("data.pth",)),
    "unknown data key, added": ("+data.pth=x", ("data", "pth")),
    "unknown model key": ("+model.n_head_kv=x", ("model", "n_head_kv")),
    "heads that do not fit": ("model.n_head=3", ("model.n_embd=32", "n_head=3")),
    "a width that is no number": ("model.n_embd=wide", ("model.n_embd", "wide")),
    "decoder deeper than its base": ("decoder.init=base decoder.n_layer=3", ("decoder.n_layer", "model.n_layer")),
    "no folder of data": ("data=gsm8k data.path=nowhere", ("nowhere", "does not exist")),
    "broken line": ("data=gsm8k data.path=broken", ("broken/train.jsonl:3", "JSON", "question")),
    "missing key in a line": ("data=gsm8k data.path=keyless", ("keyless/train.jsonl:2", '"answer"')),
    "no answer in a line": ("data=gsm8k data.path=unanswered", ("unanswered/train.jsonl:2", "####")),
    "empty file": ("data=gsm8k data.path=empty", ("empty/train.jsonl", "empty")),
    "a folder without data": ("data=gsm8k data.path=.", ("no data", "train")),
    "a file of another kind": ("data=gsm8k data.path=a_file", ("a_file", ".jsonl")),
    "data too long for the context": ("data=gsm8k data.path=long", ("problem", "tokens", "model.context_length")),
    "thoughts too many for the context": ("model.context_length=16", ("context_length", "tokens")),
    "no such device": ("device=gpu", ("device=gpu", "cuda", "cpu")),
    "number format": ("dtype=float16", ("dtype=float16", "bfloat16")),
    "no steps to train": ("num_iterations=0", ("num_iterations", "-1")),
    "too few examples": ("target_examples_per_step=0", ("target_examples_per_step", "at least 1")),
    "infinite learning rate": ("learning_rate=inf", ("learning_rate",)),
    "infinite weight": ("step_weight_multiplier=inf", ("step_weight_multiplier",)),
    "nothing to resume": ("resume=true out_dir=nowhere", ("nowhere", "out_dir")),
    "resume what": ("resume=true", ("resume", "out_dir")),
    "nothing to start from": ("init_from=nowhere", ("nowhere", "init_from")),
    "out_dir is a file": ("out_dir=a_file", ("out_dir", "a_file")),
    "no value": ("seed", ("seed",)),
    "nothing for a section": ("latent=null", ("latent",)),
    "no data source": ("data=null", ()),
    "no ranks file": ("tokenizer.ranks=nowhere", ("nowhere",)),
    "stages without end": ("latent.stages=[{steps:1,share:0.9}]", ("latent.stages", "below 1")),
    "a stage of too many steps": ("latent.stages=[{steps:9,share:0.1}]", ("latent.stages[0]", "steps")),
}  # fmt: skip


@pytest.mark.parametrize("case", TRAINING)
def test_training(case: str, folder: Path) -> None:
    typed, named = TRAINING[case]
    before = contents(folder)
    given = typed.split()
    data = () if "data=gsm8k" in given or "data=null" in given or "data=gsm9k" in given else ARITHMETIC
    defaults = [argument for argument in TINY if argument.partition("=")[0] not in typed]
    message = run(TRAIN, *defaults, *data, "num_iterations=1", *given, folder=folder).error
    for word in named:
        assert word in message
    assert contents(folder) == before


# What is typed after the command, `CKPT` standing for a checkpoint of mode=latent, and what the message must name.
USING = {
    (GSM8K, "nothing given"): ((), ("ckpt",)),
    (PROBE, "nothing given"): ((), ("ckpt",)),
    (GSM8K, "no such folder"): (("ckpt=nowhere",), ("nowhere",)),
    (PROBE, "no such folder"): (("ckpt=nowhere", "question=How many?"), ("nowhere",)),
    (GSM8K, "no checkpoint in it"): (("ckpt=good",), ("good", "no checkpoint")),
    (PROBE, "no checkpoint in it"): (("ckpt=good", "question=How many?"), ("good", "no checkpoint")),
    (GSM8K, "unknown split"): (("ckpt=CKPT", "split=tset"), ("split=tset", "test", "validation")),
    (GSM8K, "no limit"): (("ckpt=CKPT", "limit=0"), ("limit=0", "at least 1")),
    (GSM8K, "unknown key"): (("ckpt=CKPT", "limits=3"), ("limits",)),
    (GSM8K, "no batch"): (("ckpt=CKPT", "batch_size=0"), ("batch_size=0", "at least 1")),
    (GSM8K, "no such data"): (("ckpt=CKPT", "data.path=nowhere"), ("nowhere", "does not exist")),
    (GSM8K, "no test set"): (("ckpt=CKPT", "data.path=good"), ("good", "no test split")),
    (GSM8K, "broken line"): (("ckpt=CKPT", "data.path=broken/train.jsonl"), ("broken/train.jsonl:3",)),
    (GSM8K, "question too long"): (("ckpt=CKPT", "data.path=long/train.jsonl"), ("question", "tokens", "context")),
    (GSM8K, "cold"): (("ckpt=CKPT", "temperature=-1"), ("temperature", "at least 0")),
    (PROBE, "no question"): (("ckpt=CKPT",), ("question", "data")),
    (PROBE, "question and data"): (("ckpt=CKPT", "question=How many?", "data=arithmetic"), ("question", "data")),
    (PROBE, "empty question"): (("ckpt=CKPT", "question= "), ("question", "empty")),
    (PROBE, "question too long"): (
        ("ckpt=CKPT", "question=What is 3" + " and 4" * 1200), ("question", "tokens", "context")),
    (PROBE, "unknown format"): (("ckpt=CKPT", "question=How many?", "format=yaml"), ("format=yaml", "table", "json")),
    (PROBE, "no such data"): (("ckpt=CKPT", "data=gsm8k", "data.path=nowhere"), ("nowhere", "does not exist")),
    (PROBE, "unknown device"): (("ckpt=CKPT", "question=How many?", "device=tpu"), ("device=tpu", "cpu")),
}  # fmt: skip


@pytest.mark.parametrize(("module", "case"), USING)
def test_using_a_checkpoint(module: str, case: str, folder: Path, latent_run: Trained) -> None:
    typed, named = USING[module, case]
    before = contents(folder), contents(latent_run.out_dir)
    arguments = [argument.replace("CKPT", str(latent_run.latest)) for argument in typed]
    device = () if "unknown device" in case else ("device=cpu",)
    message = run(module, *device, *arguments, folder=folder).error
    for word in named:
        assert word in message
    assert (contents(folder), contents(latent_run.out_dir)) == before


def damage(checkpoint: Path, file: str, how: str) -> None:
    path = checkpoint / file
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "cut in its header":
        path.write_bytes(path.read_bytes()[:20])
    elif how == "of another shape":
        config = strict_json(path.read_text())
        config["model"]["n_embd"] = 64
        path.write_text(str(config).replace("'", '"').replace("None", "null").replace("True", "true")
                        .replace("False", "false"))  # fmt: skip


@pytest.mark.parametrize(
    ("file", "how"),
    [
        ("model.safetensors", "cut"),
        ("model.safetensors", "cut in its header"),
        ("model.safetensors", "empty"),
        ("step_decoder.safetensors", "cut"),
        ("config.json", "cut"),
        ("config.json", "of another shape"),
        ("tokenizer/ranks.tiktoken", "missing"),
        ("tokenizer/ranks.tiktoken", "cut"),
        ("tokenizer/tokenizer.json", "cut"),
    ],
)
def test_a_damaged_checkpoint_is_named(file: str, how: str, latent_run: Trained, folder: Path) -> None:
    checkpoint = latent_run.copy_to(folder / "damaged")
    damage(checkpoint, file, how)
    before = contents(folder)
    for module, question in ((GSM8K, "limit=1"), (PROBE, "question=How many?")):
        arguments = (f"ckpt={checkpoint}", "device=cpu", question)
        for verify in ("true", "false"):  # what the manifest does not find out, reading does
            assert f"damaged/{file}" in run(module, *arguments, f"verify={verify}", folder=folder).error
    assert contents(folder) == before


@pytest.mark.parametrize("how", ["missing", "cut"])
@pytest.mark.parametrize("file", ["trainer_state.safetensors", "trainer_state.json"])
def test_a_damaged_trainer_state_is_named(file: str, how: str, latent_run: Trained, sums: Path, folder: Path) -> None:
    """Going on needs what using the model does not."""
    (folder / "run").mkdir()
    damage(latent_run.copy_to(folder / "run" / "latest"), file, how)
    before = contents(folder)
    arguments = ("data=gsm8k", f"data.path={sums}", "latent.n_latents=3", "num_iterations=60")
    arguments += ("latent.latents_per_step=1", "max_new_tokens=64")
    message = run(TRAIN, *TINY, *arguments, "resume=true", "out_dir=run", folder=folder).error
    assert f"latest/{file}" in message
    assert contents(folder) == before


def test_a_folder_that_holds_a_run_is_not_written_over(latent_run: Trained, folder: Path) -> None:
    before = contents(latent_run.out_dir)
    message = run(TRAIN, *TINY, *ARITHMETIC, "num_iterations=1", f"out_dir={latent_run.out_dir}", folder=folder).error
    for word in (str(latent_run.out_dir), "out_dir", "resume=true"):
        assert word in message
    assert contents(latent_run.out_dir) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_no_gpu(device: str, latent_run: Trained, folder: Path) -> None:
    before = contents(folder), contents(latent_run.out_dir)
    tiny = [argument for argument in TINY if not argument.startswith("device=")]
    checkpoint = f"ckpt={latent_run.latest}"
    for module, arguments in (
        (TRAIN, (*tiny, *ARITHMETIC, "num_iterations=1")),
        (GSM8K, (checkpoint, "limit=1")),
        (PROBE, (checkpoint, "question=How many?")),
    ):
        message = run(module, *arguments, f"device={device}", folder=folder).error
        assert f"device={device}" in message
        assert "cpu" in message
    assert (contents(folder), contents(latent_run.out_dir)) == before


# --- processes of their own: what a shell sees -----------------------------------------------------------------------


def test_a_shell_sees_one_line_and_exit_status_2(folder: Path) -> None:
    before = contents(folder)
    typed = {
        "lattent": (TRAIN, "mode=lattent"),
        "nowhere": (GSM8K, "ckpt=nowhere"),
        "good": (PROBE, "ckpt=good", "question=John's, 3?"),
    }
    with ThreadPoolExecutor() as pool:
        outcomes = pool.map(lambda arguments: run_process("-m", *arguments, folder=folder), typed.values())
    for named, outcome in zip(typed, outcomes, strict=True):
        assert named in outcome.error
        assert outcome.out == ""
    assert contents(folder) == before


def test_gpt2_without_its_files(folder: Path) -> None:
    before = contents(folder)
    env = {**OFFLINE, "TIKTOKEN_CACHE_DIR": str(folder / "no_cache")}
    message = run_process("-m", TRAIN, *TINY, *ARITHMETIC, "tokenizer=gpt2", folder=folder, env=env).error
    for word in ("tokenizer=gpt2", "TIKTOKEN_CACHE_DIR", "tokenizer=default"):
        assert word in message
    shutil.rmtree(folder / "no_cache", ignore_errors=True)  # tiktoken's own
    assert contents(folder) == before


def test_gsm8k_without_a_path_or_a_network(folder: Path) -> None:
    before = contents(folder)
    env = {**OFFLINE, "HF_HOME": str(folder / "no_cache")}
    message = run_process("-m", TRAIN, *TINY, "data=gsm8k", folder=folder, env=env).error
    for word in ("openai/gsm8k", "hub", "data.path="):
        assert word in message
    shutil.rmtree(folder / "no_cache", ignore_errors=True)  # the hub client's own
    assert contents(folder) == before


def test_nothing_here_runs_in_the_checkout() -> None:
    """A guard for the tests themselves: their runs leave no folder in the repository."""
    assert not (REPOSITORY / "tests" / "runs").exists()
