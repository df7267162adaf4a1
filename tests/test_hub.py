"""Checkpoints on the hub: what goes up, what comes down, and what is said when the hub does not answer."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml

import simcot_latent as sl
from simcot_latent.checkpoint import Checkpoint, TrainerState
from simcot_latent.curricula.base import Stage
from simcot_latent.data.format import AnswerFormat
from simcot_latent.data.sources.arithmetic import Arithmetic
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.data.word_problems.situations import MEN, WOMEN
from simcot_latent.errors import UserError
from simcot_latent.hub import CARD
from simcot_latent.loops.sequential import Sequential, SequentialConfig
from simcot_latent.model.gpt import GPT
from simcot_latent.terms.step_decoder import StepDecoder
from simcot_latent.terms.steps import StepGroups
from simcot_latent.training.saving import save_checkpoint

REPOSITORY = Path(__file__).parents[1]
QUESTIONS = ["Ann has 3 pens and finds 4 more. How many is that?", "What is 12 * 3?"]
FILES = {
    "README.md",
    "config.json",
    "manifest.json",
    "model.safetensors",
    "tokenizer/ranks.tiktoken",
    "tokenizer/tokenizer.json",
}
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def checkpoint(make_model: Callable[..., GPT], tokenizer: Tokenizer) -> Checkpoint:
    """A small random model that thinks, with an auxiliary decoder."""
    model = make_model("llama", vocab_size=tokenizer.n_vocab)
    decoder = StepDecoder.from_base(model, 1, "base").eval()
    return Checkpoint(
        model,
        decoder,
        tokenizer,
        {"mode": "latent", "max_new_tokens": 8},
        answers=AnswerFormat(thinks=True),
        loop=Sequential(32, SequentialConfig()).eval(),
        stage=Stage(4, first_written=None),
        groups=StepGroups(latents_per_step=2),
        step=7,
    )


@pytest.fixture
def hub_cache(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """The hub's local cache, as a download of `me/name` leaves it."""
    repository = tmp_path / "cache" / "models--me--name"
    snapshot = repository / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    checkpoint.save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    (repository / "blobs").mkdir()
    for file in [path for path in snapshot.rglob("*") if path.is_file()]:  # files are links to what they hold
        blob = repository / "blobs" / file.relative_to(snapshot).as_posix().replace("/", "-")
        shutil.move(file, blob)
        file.symlink_to(blob)
    return tmp_path / "cache"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with HF_HUB_OFFLINE=1, which is read when `huggingface_hub` is imported."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def assert_same(loaded: Checkpoint, checkpoint: Checkpoint) -> None:
    """Both think, say and decode the same."""
    ours, theirs = (sl.think(c, QUESTIONS) for c in (loaded, checkpoint))
    assert torch.equal(ours.latents, theirs.latents)
    assert sl.decode_steps(loaded, ours) == sl.decode_steps(checkpoint, theirs)
    assert sl.answer(loaded, QUESTIONS) == sl.answer(checkpoint, QUESTIONS)
    assert loaded.tokenizer == checkpoint.tokenizer
    for name in ("answers", "stage", "groups", "config", "step"):
        assert getattr(loaded, name) == getattr(checkpoint, name)


def test_what_is_saved_comes_back(checkpoint: Checkpoint, tmp_path: Path) -> None:
    checkpoint.save_pretrained(tmp_path / "saved")
    assert files_of(tmp_path / "saved") == FILES | {"step_decoder.safetensors"}
    assert_same(Checkpoint.from_pretrained(tmp_path / "saved"), checkpoint)
    assert_same(sl.load_checkpoint(tmp_path / "saved"), checkpoint)


@pytest.mark.parametrize("start", ["me/base", "runs/weighted", "/home/me/base.gguf", None])
def test_no_path_of_this_machine_is_published(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str | None
) -> None:
    """Data are then looked for where anyone finds them; what a run started from is kept where it is on the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "weighted").mkdir(parents=True)
    local = {
        "data": {"path": "/home/me/gsm8k", "hub_id": "openai/gsm8k"},
        "tokenizer": {"ranks": "mine.tiktoken"},
        "out_dir": "/home/me/runs/latent",
        "init_from": start,
        "seed": 3,
    }
    checkpoint.config |= local
    before = deepcopy(checkpoint.config)
    checkpoint.save_pretrained(tmp_path / "saved")
    saved = sl.load_checkpoint(tmp_path / "saved").config
    assert saved["data"] == {"path": None, "hub_id": "openai/gsm8k"}
    assert (saved["tokenizer"], saved["seed"], saved["mode"]) == ({"ranks": None}, 3, "latent")
    assert saved.get("init_from") == ("me/base" if start == "me/base" else None)
    assert "/home" not in (tmp_path / "saved" / "config.json").read_text()
    assert checkpoint.config == before, "the checkpoint itself is another matter"


def test_a_run_is_a_source_too(checkpoint: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(checkpoint, tmp_path / "run", TrainerState({}, {}), keep=1)
    assert_same(Checkpoint.from_pretrained(str(tmp_path / "run")), checkpoint)


def test_a_repository_is_loaded_from_the_cache(
    checkpoint: Checkpoint, hub_cache: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_same(Checkpoint.from_pretrained("me/name", cache_dir=hub_cache), checkpoint)
    assert_same(Checkpoint.from_pretrained("me/name", cache_dir=hub_cache, revision=REVISION), checkpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub_cache))
    assert_same(Checkpoint.from_pretrained("me/name"), checkpoint)


def test_what_is_downloaded(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The options arrive, and so does all that a method has learned, and no file that loading does not need."""
    checkpoint.loop = Sequential(32, SequentialConfig(projector_width=8)).eval()
    checkpoint.parts = {"judge": {"w": torch.arange(3.0)}}
    checkpoint.save_pretrained(tmp_path / "saved")
    asked: dict[str, Any] = {}

    def download(repo_id: str, allow_patterns: list[str], ignore_patterns: list[str], **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        everything = [*files_of(tmp_path / "saved"), "trainer_state.safetensors", "onnx/model.safetensors", "image.png"]
        for file in huggingface_hub.utils.filter_repo_objects(
            everything, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (tmp_path / "got" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / "saved" / file, tmp_path / "got" / file)  # fails for what was not pushed
        return str(tmp_path / "got")

    monkeypatch.setattr("simcot_latent.hub.snapshot_download", download)
    loaded = Checkpoint.from_pretrained("me/name", revision="v2", token="t")
    assert_same(loaded, checkpoint)
    assert loaded.parts["judge"]["w"].tolist() == [0.0, 1.0, 2.0]
    assert (asked["repo_id"], asked["revision"], asked["token"]) == ("me/name", "v2", "t")
    assert files_of(tmp_path / "got") == FILES - {"README.md"} | {
        "step_decoder.safetensors", "loop.safetensors", "judge.safetensors"
    }  # fmt: skip


@pytest.mark.parametrize("decoder", [True, False])
def test_what_is_pushed(decoder: bool, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that training wrote goes up without its state of training."""
    if not decoder:
        checkpoint.step_decoder, checkpoint.loop = None, None
        checkpoint.answers, checkpoint.stage = AnswerFormat(), Stage()
    folder = save_checkpoint(checkpoint, tmp_path / "run", TrainerState({"x": torch.ones(1)}, {"step": 7}), keep=1)
    pushed: dict[str, Any] = {}

    def create(api: Any, repo_id: str, private: bool | None, exist_ok: bool) -> Any:
        pushed.update(private=private, token=api.token)
        return SimpleNamespace(repo_id=repo_id)

    def upload(api: Any, *, repo_id: str, folder_path: Path, commit_message: str, **_: Any) -> str:
        shutil.copytree(folder_path, tmp_path / "pushed")
        return f"https://hub/{repo_id}/{commit_message}"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    address = sl.load_checkpoint(folder).push_to_hub("me/name", private=True, token="t", commit_message="first")
    assert address == "https://hub/me/name/first"
    assert pushed == {"private": True, "token": "t"}
    assert files_of(tmp_path / "pushed") == FILES | ({"step_decoder.safetensors"} if decoder else set())
    for name in files_of(folder) & FILES - {"manifest.json"}:  # as training wrote them
        assert (tmp_path / "pushed" / name).read_bytes() == (folder / name).read_bytes()

    card = (tmp_path / "pushed" / "README.md").read_text(encoding="utf-8")
    _, front_matter, text = card.split("---\n", 2)
    assert yaml.safe_load(front_matter)["library_name"] == "simcot_latent"
    n_parameters = sum(parameter.numel() for parameter in checkpoint.model.parameters())
    assert f"{n_parameters:,} parameters" in text
    assert 'from_pretrained("me/name")' in text
    assert ("4 latent thoughts" in text, "auxiliary decoder" in text) == (decoder, decoder)


def test_the_cards_question_is_of_the_kind_that_the_quick_start_trains_on() -> None:
    """It is the README's, its sentences are some of the training data's, and its numbers no larger."""
    (program,) = re.findall(r"```python\n(.*?)```", CARD, re.DOTALL)
    texts = [node.value for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Constant)]
    (question,) = [text for text in texts if isinstance(text, str) and text.endswith("?")]
    assert question in (REPOSITORY / "README.md").read_text(encoding="utf-8")

    names = "|".join(person["name"] for person in (*WOMEN, *MEN))

    def sentences(text: str) -> set[str]:
        """Without what differs: who, and how many."""
        text = re.sub(r"\d+", "N", re.sub(rf"\b({names})\b", "NAME", text))
        return set(re.split(r"(?<=[.?]) ", re.sub(r"\bHe\b", "She", re.sub(r"\bhe\b", "she", text))))

    settings = yaml.safe_load((REPOSITORY / "configs/data/arithmetic.yaml").read_text(encoding="utf-8"))
    del settings["_target_"]
    source = Arithmetic(**settings)
    assert sentences(question) <= set().union(*(sentences(source.problem("train", i).question) for i in range(3000)))
    assert max(map(int, re.findall(r"\d+", question))) <= source.max_number


@pytest.mark.parametrize("source", ["me/unknown", "./runs/unknown", "no name"])
def test_an_unknown_source(source: str, hub_cache: Path, offline: None) -> None:
    with pytest.raises(UserError, match=f"source={source}: neither a checkpoint folder nor") as error:
        Checkpoint.from_pretrained(source, cache_dir=hub_cache)
    assert "\n" not in str(error.value)


def test_a_repository_that_holds_something_else(hub_cache: Path, offline: None) -> None:
    snapshot = hub_cache / "models--me--name" / "snapshots" / REVISION
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").write_text('{"model_type": "gpt2"}')
    (snapshot / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"models--me--name.*config\.json: not the configuration of a checkpoint"):
        Checkpoint.from_pretrained("me/name", cache_dir=hub_cache)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"source={tmp_path}: holds no checkpoint"):
        Checkpoint.from_pretrained(tmp_path)


def test_a_push_without_network(checkpoint: Checkpoint, offline: None) -> None:
    with pytest.raises(UserError, match="repo_id=me/name: cannot be pushed to the hub") as error:
        checkpoint.push_to_hub("me/name", token="t")
    assert "\n" not in str(error.value)


def test_a_hub_that_refuses(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise huggingface_hub.errors.HTTPError("403 Forbidden\n\nYou have no right to\n  write there.")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(UserError, match=r"\(403 Forbidden You have no right to write there\.\)$"):
        checkpoint.push_to_hub("me/name", token="t")


def test_the_package_loads_without_the_hub() -> None:
    code = "import sys, simcot_latent as sl; sl.load_checkpoint; print('huggingface_hub' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
