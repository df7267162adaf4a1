"""Checkpoint folders: what goes in comes out, a save that is cut short hurts nothing, what is broken is named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simcot_latent import checkpoint as module
from simcot_latent import checkpoint_folders, weights
from simcot_latent.checkpoint import (
    Checkpoint,
    TrainerState,
    load_checkpoint,
    load_trainer_state,
    read_json,
    require_decoder,
)
from simcot_latent.checkpoint_folders import checkpoints_of_training, find_checkpoint
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.errors import UserError
from simcot_latent.files import write_json
from simcot_latent.generate import generate_all
from simcot_latent.model.gpt import GPT
from simcot_latent.model.step_decoder import StepDecoder
from simcot_latent.model.thoughts import ThoughtFormat
from simcot_latent.probing.thoughts import decode_steps, think
from simcot_latent.training.saving import save_checkpoint
from simcot_latent.weights import read_tensors

QUESTIONS = ["Ann has 3 pens and finds 4 more. How many is that?", "What is 12 * 3?"]


@pytest.fixture
def make_checkpoint(make_model: Callable[..., GPT], tokenizer: Tokenizer) -> Callable[..., Checkpoint]:
    def make(
        family: str = "nanochat", step: int = 7, seed: int = 0, decoder: bool = True, **changes: Any
    ) -> Checkpoint:
        model = make_model(family, seed=seed, vocab_size=tokenizer.n_vocab, **changes)
        thoughts = ThoughtFormat(thinks=True, n_latents=4, latents_per_step=2) if decoder else ThoughtFormat()
        step_decoder = StepDecoder.from_base(model, 1, "base").eval() if decoder else None
        config = {
            "mode": "latent" if decoder else "weighted",
            "max_new_tokens": 8,
            "a": [None, 1, 0.1, "é", {"b": True}],
        }
        return Checkpoint(model, step_decoder, tokenizer, thoughts, config, step)

    return make


STATE = TrainerState({"random/cpu": torch.arange(5, dtype=torch.uint8)}, {"step": 7, "num_steps": 9})


def outputs(checkpoint: Checkpoint) -> tuple[Any, ...]:
    """All that a checkpoint can be asked for."""
    answers = generate_all(checkpoint, QUESTIONS, batch_size=2)
    if checkpoint.step_decoder is None:
        return answers, []
    thoughts = think(checkpoint, QUESTIONS)
    return answers, decode_steps(checkpoint, thoughts), thoughts.latents.tolist()


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "nanochat"])
@pytest.mark.parametrize("decoder", [True, False])
def test_a_loaded_model_says_what_the_saved_one_said(
    family: str, decoder: bool, make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    saved = make_checkpoint(family, decoder=decoder)
    folder = save_checkpoint(saved, tmp_path, STATE, keep=2)
    for path in (folder, tmp_path, tmp_path / "latest", str(tmp_path)):
        loaded = load_checkpoint(path)
        assert loaded.path == folder.resolve()
    assert (loaded.config, loaded.step, loaded.thoughts) == (saved.config, 7, saved.thoughts)
    assert loaded.model.config == saved.model.config
    assert not loaded.model.training
    ours, theirs = loaded.model.state_dict(), saved.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert outputs(loaded) == outputs(saved)
    assert loaded.tokenizer.encode("3 + 4 = <<3+4=7>>") == saved.tokenizer.encode("3 + 4 = <<3+4=7>>")
    if decoder:
        assert loaded.step_decoder is not None
        assert loaded.step_decoder.embedding is loaded.model.embedding  # shared, and saved once
        assert not [name for name in load_file(folder / "step_decoder.safetensors") if "embedding" in name]
        assert not loaded.step_decoder.training
        alone = StepDecoder.from_checkpoint(folder)
        assert all(map(torch.equal, alone.parameters(), loaded.step_decoder.parameters()))


def test_the_files_are_those_that_are_promised(make_checkpoint: Callable[..., Checkpoint], tmp_path: Path) -> None:
    folder = save_checkpoint(make_checkpoint(), tmp_path / "new" / "run", STATE, keep=2)
    assert folder == tmp_path / "new" / "run" / "step_0000007"
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == {
        "model.safetensors", "step_decoder.safetensors", "config.json", "tokenizer/ranks.tiktoken",
        "tokenizer/tokenizer.json", "trainer_state.safetensors", "trainer_state.json", "manifest.json",
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert config["model"]["n_embd"] == 32
    assert (tmp_path / "new" / "run" / "latest").readlink() == Path("step_0000007")
    bare = save_checkpoint(make_checkpoint(decoder=False), tmp_path / "bare", STATE, keep=2)
    assert not (bare / "step_decoder.safetensors").exists()


def test_a_model_with_a_tied_head_is_saved_once(make_checkpoint: Callable[..., Checkpoint], tmp_path: Path) -> None:
    """safetensors refuses tensors that share memory, and so a checkpoint holds no weight twice."""
    for tie_head in (True, False):
        saved = make_checkpoint(tie_head=tie_head)
        folder = save_checkpoint(saved, tmp_path / str(tie_head), STATE, keep=1)
        count = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
        assert count == sum(parameter.numel() for parameter in saved.model.parameters())


DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
NAMES = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"  # the one name that the format keeps for itself
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = 1000 * torch.randn(shape, generator=generator)
    values = draw(st.sampled_from([values, values / 0, values * 0 / 0]))  # infinities and nan survive too
    values = values.to(draw(st.sampled_from(DTYPES)))
    return values.t() if values.dim() == 2 and draw(st.booleans()) else values


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs",))),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(st.dictionaries(NAMES, tensors(), max_size=5), st.dictionaries(st.text(max_size=8), VALUES, max_size=5))
def test_trainer_states_survive(
    tmp_path_factory: pytest.TempPathFactory, named: dict[str, Tensor], values: Any
) -> None:
    folder = tmp_path_factory.mktemp("state")
    save_file({name: tensor.contiguous() for name, tensor in named.items()}, folder / checkpoint_folders.STATE_TENSORS)
    write_json(folder / checkpoint_folders.STATE_JSON, values)
    state = load_trainer_state(folder)
    assert state.values == values
    assert state.tensors.keys() == named.keys()
    for name, tensor in named.items():
        assert (state.tensors[name].dtype, state.tensors[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(bits(state.tensors[name]), bits(tensor))


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: nan equals nan, and -0 is not 0."""
    return tensor.contiguous().flatten().view(torch.uint8)


def finite(tensor: Tensor) -> Tensor:
    """The same without what no weight may be."""
    return torch.nan_to_num(tensor.float(), nan=0.0, posinf=1.0, neginf=-1.0).clamp(-1e4, 1e4).to(tensor.dtype)


class Parts(nn.Module):
    """A module of nothing but named weights."""

    def __init__(self, named: list[Tensor]) -> None:
        super().__init__()
        self.parts = nn.ParameterList([nn.Parameter(value, requires_grad=False) for value in named])


@settings(deadline=None, max_examples=30)
@given(st.lists(tensors().map(finite), min_size=1, max_size=4))
def test_weights_survive(tmp_path_factory: pytest.TempPathFactory, named: list[Tensor]) -> None:
    """Whatever their type and shape, those that lie otherwise in memory among them."""
    file = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    weights.save_weights(Parts(named), file)
    loaded = Parts([torch.zeros_like(tensor) for tensor in named])
    weights.load_weights(loaded, file)
    for ours, theirs in zip(loaded.parts, named, strict=True):
        assert torch.equal(bits(ours), bits(theirs))


# --- saves that are cut short ----------------------------------------------------------------------------------------


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.fixture(params=["save_weights", "save_tensors", "write_json", "rename", "symlink_to", "replace"])
def killed_at(request: pytest.FixtureRequest) -> str:
    """The operation during which a save is cut short."""
    return request.param


def cut_short(operation: str, *arguments: Any) -> None:
    """`save_checkpoint`, ended just before its first call of `operation`."""

    def die(*_: object, **__: object) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        owner = Path if operation in ("rename", "symlink_to", "replace") else module
        patch.setattr(owner, operation, die)
        with suppress(Killed):  # not raised where a save does without the operation
            save_checkpoint(*arguments)


def test_a_save_that_is_cut_short_leaves_the_one_before(
    killed_at: str, make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    first, second = make_checkpoint(step=5, seed=1), make_checkpoint(step=10, seed=2)
    save_checkpoint(first, tmp_path, STATE, keep=1)
    cut_short(killed_at, second, tmp_path, STATE, 1)
    assert outputs(load_checkpoint(tmp_path)) == outputs(first)
    # And the next save is not in its way.
    save_checkpoint(second, tmp_path, STATE, keep=1)
    assert outputs(load_checkpoint(tmp_path)) == outputs(second)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_0000010"]


def test_the_first_save_cut_short_leaves_no_checkpoint(
    killed_at: str, make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    cut_short(killed_at, make_checkpoint(), tmp_path, STATE, 1)
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "latest").exists()


def test_saving_a_step_again_cut_short_leaves_one_of_the_two(
    killed_at: str, make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    """`latest` is a whole checkpoint at every moment, also while its own folder is written anew."""
    first, second = make_checkpoint(seed=1), make_checkpoint(seed=2)
    save_checkpoint(first, tmp_path, STATE, keep=2)
    cut_short(killed_at, second, tmp_path, STATE, 2)
    assert outputs(load_checkpoint(tmp_path)) in (outputs(first), outputs(second))


def test_only_the_newest_are_kept(make_checkpoint: Callable[..., Checkpoint], tmp_path: Path) -> None:
    for step in (2, 4, 10, 11):
        save_checkpoint(make_checkpoint(step=step), tmp_path, STATE, keep=2)
    (tmp_path / "notes.txt").write_text("mine")
    save_checkpoint(make_checkpoint(step=100), tmp_path, STATE, keep=3)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["latest", "notes.txt", "step_0000010", "step_0000011", "step_0000100"]
    assert load_checkpoint(tmp_path).step == 100


def test_going_back_keeps_what_was_just_written(make_checkpoint: Callable[..., Checkpoint], tmp_path: Path) -> None:
    """Resumed from an older checkpoint, with a newer one still there."""
    save_checkpoint(make_checkpoint(step=20), tmp_path, STATE, keep=1)
    save_checkpoint(make_checkpoint(step=10), tmp_path, STATE, keep=1)
    assert load_checkpoint(tmp_path).step == 10


@pytest.mark.parametrize("kind", ["folder", "file", "link", "dangling", "link to a checkpoint", "incomplete"])
@pytest.mark.parametrize("name", ["step_0000007", ".step_0000007.partial", ".latest.partial"])
def test_what_has_the_name_of_a_checkpoint_moves_aside(
    kind: str,
    name: str,
    make_checkpoint: Callable[..., Checkpoint],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out_dir, elsewhere, place = tmp_path / "run", tmp_path / "elsewhere", tmp_path / "run" / name
    out_dir.mkdir()
    saved = save_checkpoint(make_checkpoint(seed=3), elsewhere, STATE, keep=1)
    if kind == "folder":
        place.mkdir()
        (place / "notes.txt").write_text("mine")
    elif kind == "incomplete":
        shutil.copytree(saved, place)
        (place / "trainer_state.json").unlink()
    elif kind == "file":
        place.write_text("mine")
    else:
        place.symlink_to({"link": tmp_path, "dangling": "nowhere", "link to a checkpoint": saved}[kind])
    save_checkpoint(make_checkpoint(seed=1), out_dir, STATE, keep=1)
    assert outputs(load_checkpoint(out_dir)) == outputs(make_checkpoint(seed=1))
    assert not (out_dir / "step_0000007").is_symlink()
    assert outputs(load_checkpoint(elsewhere)) == outputs(make_checkpoint(seed=3))
    # A half-written folder and a link that was to be `latest` are what a killed save leaves, and go.
    is_link = "link" in kind or kind == "dangling"
    if name == "step_0000007" or (name == ".latest.partial" and not is_link):
        aside = place.with_name(f"{place.stem}-1{place.suffix}")
        assert os.path.lexists(aside)
        assert f"{name} was there and is no checkpoint of this run; it is now {aside.name}" in caplog.text
        assert aside.is_symlink() == is_link
        if kind == "folder":
            assert (aside / "notes.txt").read_text() == "mine"
    else:
        assert sorted(path.name for path in out_dir.iterdir()) == ["latest", "step_0000007"]


def test_names_aside_are_free(make_checkpoint: Callable[..., Checkpoint], tmp_path: Path) -> None:
    (tmp_path / "step_0000007").write_text("mine")
    (tmp_path / "step_0000007-1").symlink_to("nowhere")
    save_checkpoint(make_checkpoint(), tmp_path, STATE, keep=1)
    assert (tmp_path / "step_0000007-1").is_symlink()
    assert (tmp_path / "step_0000007-2").read_text() == "mine"


def test_what_others_put_into_a_checkpoint_stays(make_checkpoint: Callable[..., Checkpoint], tmp_path: Path) -> None:
    """Evals above all: deleting an old checkpoint, or writing its step anew, deletes only what was written with it."""
    old = save_checkpoint(make_checkpoint(step=5), tmp_path, STATE, keep=1)
    (old / "evals").mkdir()
    (old / "evals/gsm8k.json").write_text("{}")
    (old / "tokenizer/notes.txt").write_text("mine")
    save_checkpoint(make_checkpoint(step=10), tmp_path, STATE, keep=1)
    left = sorted(str(path.relative_to(old)) for path in old.rglob("*") if path.is_file())
    assert left == ["evals/gsm8k.json", "tokenizer/notes.txt"]
    assert [path.name for path in checkpoints_of_training(tmp_path)] == ["step_0000010"]
    # The run goes back: what is left of step 5 is in nobody's way.
    save_checkpoint(make_checkpoint(step=5), tmp_path, STATE, keep=2)
    assert [path.name for path in checkpoints_of_training(tmp_path)] == ["step_0000005", "step_0000010"]
    assert (tmp_path / "step_0000005-1/evals/gsm8k.json").exists()
    # And forward again, over a checkpoint that was evaluated.
    (tmp_path / "step_0000010/mine.txt").write_text("mine")
    save_checkpoint(make_checkpoint(step=10, seed=1), tmp_path, STATE, keep=2)
    assert [path.name for path in (tmp_path / "step_0000010-1").iterdir()] == ["mine.txt"]
    assert outputs(load_checkpoint(tmp_path)) == outputs(make_checkpoint(step=10, seed=1))


# --- what is broken is named -----------------------------------------------------------------------------------------


def message(call: Callable[[], object]) -> str:
    """The error of a call, which must be one line."""
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_there_must_be_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    assert "is no folder" in message(lambda: find_checkpoint(tmp_path / "nowhere"))
    assert "holds no checkpoint" in message(lambda: load_checkpoint(tmp_path / "runs"))
    (tmp_path / "runs" / "latest").symlink_to("step_0000003")  # which is not there
    assert "holds no checkpoint" in message(lambda: load_checkpoint(tmp_path / "runs"))
    assert "is no folder" in message(lambda: load_checkpoint(tmp_path / "runs" / "latest"))


def test_a_decoder_is_asked_for_only_where_there_is_one(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    save_checkpoint(make_checkpoint(decoder=False), tmp_path, STATE, keep=1)
    text = message(lambda: require_decoder(load_checkpoint(tmp_path)))
    assert "no auxiliary decoder" in text
    assert str(tmp_path) in text
    assert "no auxiliary decoder" in message(lambda: StepDecoder.from_checkpoint(tmp_path))


@pytest.mark.parametrize("file", ["model.safetensors", "step_decoder.safetensors", "config.json",
                                  "tokenizer/ranks.tiktoken", "tokenizer/tokenizer.json"])  # fmt: skip
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_files_that_are_cut_short(
    file: str, keep: float, make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    folder = save_checkpoint(make_checkpoint(), tmp_path, STATE, keep=1)
    data = (folder / file).read_bytes().rstrip()
    (folder / file).write_bytes(data[: int(keep * len(data))])
    text = message(lambda: load_checkpoint(tmp_path))
    assert file.rpartition("/")[2] in text


@pytest.mark.parametrize("file", ["trainer_state.safetensors", "trainer_state.json"])
def test_trainer_states_that_are_broken_or_missing(
    file: str, make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    folder = save_checkpoint(make_checkpoint(), tmp_path, STATE, keep=1)
    (folder / file).write_bytes(b"{")
    assert file in message(lambda: load_trainer_state(folder))
    (folder / file).unlink()
    assert file in message(lambda: load_trainer_state(folder))
    load_checkpoint(tmp_path)  # using the model does not take it


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda weights: weights.pop("embedding.weight"), "lacks embedding.weight"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "has extra"),
        (lambda weights: weights.update({"embedding.weight": torch.zeros(3, 4)}), "(3, 4)"),
    ],
)
def test_weights_that_do_not_fit(
    change: Callable[[dict[str, Tensor]], object],
    named: str,
    make_checkpoint: Callable[..., Checkpoint],
    tmp_path: Path,
) -> None:
    folder = save_checkpoint(make_checkpoint(), tmp_path, STATE, keep=1)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    text = message(lambda: load_checkpoint(folder, verify=False))
    assert named in text
    assert "model.safetensors" in text


CONFIG_CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no model": lambda config: config.pop("model"),
    "no thoughts": lambda config: config.pop("thoughts"),
    "no run": lambda config: config.pop("run"),
    "model that is a number": lambda config: config.update(model=3),
    "unknown model key": lambda config: config["model"].update(n_wings=2),
    "impossible model": lambda config: config["model"].update(n_head=5),
    "unknown activation": lambda config: config["model"].update(activation="tanh"),
}


@pytest.mark.parametrize("change", CONFIG_CHANGES)
def test_a_config_that_is_not_one(change: str, make_checkpoint: Callable[..., Checkpoint], tmp_path: Path) -> None:
    folder = save_checkpoint(make_checkpoint(), tmp_path, STATE, keep=1)
    config = json.loads((folder / "config.json").read_text())
    CONFIG_CHANGES[change](config)
    (folder / "config.json").write_text(json.dumps(config))
    assert "config.json: not the configuration" in message(lambda: load_checkpoint(folder, verify=False))


def test_json_must_hold_an_object(tmp_path: Path) -> None:
    file = tmp_path / "some.json"
    for text in ("[1]", "3", "null", "{", ""):
        file.write_text(text)
        assert "some.json" in message(lambda: read_json(file))
    file.write_bytes(b'{"a": "\xff"}')
    assert "some.json" in message(lambda: read_json(file))
    assert "some.safetensors" in message(lambda: read_tensors(tmp_path / "some.safetensors"))


def test_a_checkpoint_is_the_folder_and_nothing_else(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    """It can be copied anywhere; what lies beside it does not matter."""
    folder = save_checkpoint(make_checkpoint(), tmp_path / "run", STATE, keep=1)
    before = outputs(load_checkpoint(folder))
    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(tmp_path / "run")
    assert outputs(load_checkpoint(tmp_path / "copy")) == before
