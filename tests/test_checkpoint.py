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
from simcot_latent.checkpoint_config import SavedConfig, as_of_format_2, as_of_format_3, read_config
from simcot_latent.checkpoint_folders import checkpoints_of_training, find_checkpoint
from simcot_latent.curricula.base import Stage
from simcot_latent.data.format import AnswerFormat
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.errors import UserError
from simcot_latent.files import write_json
from simcot_latent.folders import fingerprint
from simcot_latent.generate import generate_all
from simcot_latent.loops.base import NoSettings, ThoughtLoop
from simcot_latent.loops.pause import Pause
from simcot_latent.loops.sequential import Sequential, SequentialConfig
from simcot_latent.model.gpt import GPT
from simcot_latent.parts import PARTS
from simcot_latent.probing.thoughts import decode_steps, think
from simcot_latent.terms.step_decoder import StepDecoder
from simcot_latent.terms.steps import StepGroups
from simcot_latent.training.saving import save_checkpoint
from simcot_latent.weights import read_tensors

QUESTIONS = ["Ann has 3 pens and finds 4 more. How many is that?", "What is 12 * 3?"]


@pytest.fixture
def make_checkpoint(make_model: Callable[..., GPT], tokenizer: Tokenizer) -> Callable[..., Checkpoint]:
    def make(
        family: str = "nanochat",
        step: int = 7,
        seed: int = 0,
        decoder: bool = True,
        loop: ThoughtLoop | None = None,
        **changes: Any,
    ) -> Checkpoint:
        model = make_model(family, seed=seed, vocab_size=tokenizer.n_vocab, **changes)
        config = {
            "mode": "latent" if decoder else "weighted",
            "max_new_tokens": 8,
            "a": [None, 1, 0.1, "é", {"b": True}],
        }
        if not decoder:
            return Checkpoint(model, None, tokenizer, config, step=step)
        loop = Sequential(32, SequentialConfig()) if loop is None else loop
        return Checkpoint(
            model,
            StepDecoder.from_base(model, 1, "base").eval(),
            tokenizer,
            config,
            answers=AnswerFormat(thinks=True),
            loop=loop.eval(),
            stage=Stage(4, first_written=None),
            groups=StepGroups(latents_per_step=2),
            step=step,
        )

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
    assert (loaded.config, loaded.step) == (saved.config, 7)
    assert (loaded.answers, loaded.stage, loaded.groups) == (saved.answers, saved.stage, saved.groups)
    assert (loaded.n_states, loaded.n_groups) == ((4, 2) if decoder else (0, 0))
    assert type(loaded.loop) is type(saved.loop)
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


class Named(nn.Module):
    """A module of nothing but named weights."""

    def __init__(self, named: list[Tensor]) -> None:
        super().__init__()
        self.parts = nn.ParameterList([nn.Parameter(value, requires_grad=False) for value in named])


@settings(deadline=None, max_examples=30)
@given(st.lists(tensors().map(finite), min_size=1, max_size=4))
def test_weights_survive(tmp_path_factory: pytest.TempPathFactory, named: list[Tensor]) -> None:
    """Whatever their type and shape, those that lie otherwise in memory among them."""
    file = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    weights.save_weights(Named(named), file)
    loaded = Named([torch.zeros_like(tensor) for tensor in named])
    weights.load_weights(loaded, file)
    for ours, theirs in zip(loaded.parts, named, strict=True):
        assert torch.equal(bits(ours), bits(theirs))


# --- the parts of a method -------------------------------------------------------------------------------------------


def make_sequential(feeds_last: bool, projector_width: int | None) -> Sequential:
    torch.manual_seed(3)
    loop = Sequential(32, SequentialConfig(feeds_last, projector_width))
    for parameter in loop.parameters():  # so that each of them matters
        parameter.data += 0.3 * torch.randn_like(parameter)
    return loop


def make_pause() -> Pause:
    torch.manual_seed(4)
    return Pause(32, NoSettings())


# The loop, the thoughts that make two groups of two states, and what `config.json` says of it.
LOOPS: dict[str, tuple[Callable[[], ThoughtLoop], int, dict[str, Any]]] = {
    "projector": (
        lambda: make_sequential(True, 24), 4,
        {"key": "sequential", "settings": {"feeds_last": True, "projector_width": 24}},
    ),
    "last is only decoded": (
        lambda: make_sequential(False, None), 3,
        {"key": "sequential", "settings": {"feeds_last": False, "projector_width": None}},
    ),
    "pause": (make_pause, 4, {"key": "pause", "settings": {}}),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_is_kept_with_its_settings_and_what_it_has_learned(
    name: str, make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    make, thoughts, said = LOOPS[name]
    saved = make_checkpoint(loop=make())
    saved.stage = Stage(thoughts, first_written=None)
    saved.groups = StepGroups(2, surplus="drop", missing="answer")
    saved.answers = AnswerFormat(thinks=True, question_end="\n", answer_mark="###")
    folder = save_checkpoint(saved, tmp_path, STATE, keep=1)
    config = json.loads((folder / "config.json").read_text())
    assert (config["format"], config["loop"]) == (3, said)
    loaded = load_checkpoint(folder)
    assert loaded.loop is not None
    assert saved.loop is not None
    assert (type(loaded.loop), loaded.loop.config) == (type(saved.loop), saved.loop.config)
    assert not loaded.loop.training
    learned = saved.loop.state_dict()
    assert (folder / "loop.safetensors").exists() == bool(learned)
    assert loaded.loop.state_dict().keys() == learned.keys()
    assert all(torch.equal(loaded.loop.state_dict()[name], learned[name]) for name in learned)
    assert (loaded.answers, loaded.stage, loaded.groups) == (saved.answers, saved.stage, saved.groups)
    assert (loaded.n_states, loaded.n_groups) == (4, 2)
    assert outputs(loaded) == outputs(saved)
    if learned:  # it is not the loop's start that answers
        saved.loop = type(saved.loop)(32, saved.loop.config).eval()
        assert outputs(loaded) != outputs(saved)


def test_a_loops_file_is_verified_and_goes_with_its_checkpoint(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    folder = save_checkpoint(make_checkpoint(loop=make_pause(), step=5), tmp_path, STATE, keep=1)
    learned = (folder / "loop.safetensors").read_bytes()
    (folder / "loop.safetensors").write_bytes(learned[:-1] + bytes([learned[-1] ^ 1]))
    assert "loop.safetensors: is not the file that" in message(lambda: load_checkpoint(folder))
    (folder / "loop.safetensors").unlink()
    assert "loop.safetensors: no such file" in message(lambda: load_checkpoint(folder))
    (folder / "loop.safetensors").write_bytes(learned)
    save_checkpoint(make_checkpoint(step=10), tmp_path, STATE, keep=1)
    assert not folder.exists()


def test_further_parts_are_kept_by_name(make_checkpoint: Callable[..., Checkpoint], tmp_path: Path) -> None:
    """What a term of somebody's own has learned: a file each, verified, and deleted with its checkpoint."""
    saved = make_checkpoint(step=5)
    saved.parts = {"judge": {"w": torch.arange(3.0)}, "k2_head": {"a.b": torch.ones(2, 2), "c": torch.zeros(1)}}
    folder = save_checkpoint(saved, tmp_path, STATE, keep=1)
    assert json.loads((folder / "config.json").read_text())["parts"] == ["judge", "k2_head"]
    loaded = load_checkpoint(folder).parts
    assert {name: sorted(part) for name, part in loaded.items()} == {"judge": ["w"], "k2_head": ["a.b", "c"]}
    assert all(torch.equal(loaded[part][key], value) for part, named in saved.parts.items()
               for key, value in named.items())  # fmt: skip
    save_file({"w": torch.zeros(3)}, folder / "judge.safetensors")
    assert "judge.safetensors: is not the file that" in message(lambda: load_checkpoint(folder))
    save_file({"w": torch.tensor([0.0, torch.nan])}, folder / "judge.safetensors")
    assert "judge.safetensors: w holds numbers that are not finite" in message(
        lambda: load_checkpoint(folder, verify=False)
    )
    (folder / "judge.safetensors").unlink()
    assert "judge.safetensors: no such file" in message(lambda: load_checkpoint(folder))
    save_checkpoint(make_checkpoint(step=10), tmp_path, STATE, keep=1)
    assert not folder.exists()


def test_only_files_of_a_checkpoint_are_deleted_with_it(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    """Whatever its configuration names as its parts."""
    folder = save_checkpoint(make_checkpoint(step=5), tmp_path, STATE, keep=1)
    mine = [tmp_path / "mine.safetensors", folder / "Mine.safetensors"]
    for file in mine:
        file.write_text("mine")
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"parts": ["../mine", str(tmp_path / "mine"), "Mine", 3, None]})
    save_checkpoint(make_checkpoint(step=10), tmp_path, STATE, keep=1)
    assert [path.name for path in folder.iterdir()] == ["Mine.safetensors"]
    assert all(file.exists() for file in mine)


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
    "no loop": lambda config: config.pop("loop"),
    "no answers": lambda config: config.pop("answers"),
    "no stage": lambda config: config.pop("stage"),
    "no groups": lambda config: config.pop("groups"),
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


def refusal(folder: Path, change: Callable[[dict[str, Any]], object]) -> str:
    """The error of a checkpoint whose `config.json` was changed by hand, which must name the file."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    text = message(lambda: load_checkpoint(folder, verify=False))
    assert text.startswith(f"{folder}/config.json: ")
    return text.removeprefix(f"{folder}/config.json: ")


# What is changed in the configuration of a loop of 4 thoughts, and what the line that refuses it says.
REFUSED: dict[str, tuple[Callable[[dict[str, Any]], object], list[str]]] = {
    "unknown loop": (
        lambda config: config["loop"].update(key="sequentiel"),
        ["loop.key=sequentiel: must be one of", "sequential, soft", "did you mean sequential?", "use=[module]"],
    ),
    "loop of no loop": (
        lambda config: config["loop"].update(key="none"),
        ["loop.key=none: must be one of compressed, jacobi, looped, pause", "use=[module]"],
    ),
    "loop that is a class path": (
        lambda config: config["loop"].update(key="simcot_latent.loops.pause.Pause"),
        ["loop.key=simcot_latent.loops.pause.Pause: must be one of"],
    ),
    "loop that is a number": (lambda config: config["loop"].update(key=3), ["config.loop.key=3: must be a text"]),
    "unknown setting of the loop": (
        lambda config: config["loop"]["settings"].update(width=3), ["loop.settings: unknown key 'width'"]
    ),
    "setting of another loop": (
        lambda config: config["loop"].update(key="pause"), ["loop.settings: unknown key 'feeds_last'"]
    ),
    "setting of another type": (
        lambda config: config["loop"]["settings"].update(feeds_last="no"),
        ["loop.settings.feeds_last='no': must be true or false"],
    ),
    "impossible setting": (
        lambda config: config["loop"]["settings"].update(projector_width=0), ["projector_width=0: must be at least 1"]
    ),
    "no whole groups": (
        lambda config: config["stage"].update(thoughts=3),
        ["stage.thoughts=3 must make whole groups of groups.latents_per_step=2"],
    ),
    "no whole groups with the last state": (
        lambda config: config["loop"]["settings"].update(feeds_last=False),
        ["stage.thoughts=4 must make whole groups of groups.latents_per_step=2"],
    ),
    "more thoughts than fit": (
        lambda config: config["stage"].update(thoughts=128),
        ["stage.thoughts=128: must be at most 127, to fit the context"],
    ),
    "thoughts below zero": (lambda config: config["stage"].update(thoughts=-2), ["stage.thoughts=-2", "at least 0"]),
    "steps below zero": (
        lambda config: config["stage"].update(first_written=-1), ["stage.first_written=-1: must be at least 0, or null"]
    ),
    "thoughts without a loop": (
        lambda config: config.update(loop=None), ["stage.thoughts=4: must be 0 without a loop"]
    ),
    "thoughts of a model that does not think": (
        lambda config: config["answers"].update(thinks=False), ["stage.thoughts=4: must be 0", "answers.thinks=false"]
    ),
    "groups of no thought": (
        lambda config: config["groups"].update(latents_per_step=0), ["groups.latents_per_step=0: must be at least 1"]
    ),
    "unknown surplus": (
        lambda config: config["groups"].update(surplus="keep"), ["groups.surplus=keep: must be one of merge, drop"]
    ),
    "unknown missing": (
        lambda config: config["groups"].update(missing=""), ["groups.missing=: must be one of mask, answer"]
    ),
    "a mark without end": (
        lambda config: config["answers"].update(answer_mark="#" * 1001), ["answers.answer_mark=(1,001 characters)"]
    ),
    "a step below zero": (lambda config: config.update(step=-1), ["step=-1: must be at least 0"]),
    "a later format": (lambda config: config.update(format=4), ["is of format 4, this version reads up to 3"]),
    "format 0": (lambda config: config.update(format=0), ["format=0: must be a whole number from 1 to 3"]),
    "a part of a name that is taken": (
        lambda config: config.update(parts=["trainer_state"]), ["parts: 'trainer_state' must be the name of one part"]
    ),
    "a part twice": (
        lambda config: config.update(parts=["judge", "judge"]), ["parts: 'judge' must be the name of one part"]
    ),
    "parts that are an object": (lambda config: config.update(parts={"judge": 1}), ["config.parts", "must be"]),
} | {
    f"part {name!r}": (
        lambda config, name=name: config.update(parts=["judge", name]), [f"parts: {str(name)!r} is no name of a part"]
    )
    for name in ("../model", "/etc/passwd", "Judge", "", "a.b", "2nd", "a b", 3, None)
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_that_makes_no_method_is_refused_in_a_line(
    case: str, make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    change, words = REFUSED[case]
    folder = save_checkpoint(make_checkpoint(), tmp_path, STATE, keep=1)
    text = refusal(folder, change)
    for word in words:
        assert word in text


class WithBuffer(Sequential):
    def __init__(self, width: int, config: SequentialConfig) -> None:
        super().__init__(width, config)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, width), persistent=False)

    def thought(self, hidden: Tensor) -> Tensor:
        return hidden * self.get_buffer("scale")


class WithTensor(Sequential):
    def __init__(self, width: int, config: SequentialConfig) -> None:
        super().__init__(width, config)
        self.scale = torch.linspace(0.5, 1.5, width)

    def thought(self, hidden: Tensor) -> Tensor:
        return hidden * self.scale


class WithNumber(Sequential):
    def __init__(self, width: int, config: SequentialConfig) -> None:
        super().__init__(width, config)
        self.scale = torch.full((3,), 0.5).sum().item()
        self.shift = nn.Parameter(torch.zeros(width))

    def thought(self, hidden: Tensor) -> Tensor:
        return hidden * self.scale + self.shift


@pytest.mark.parametrize("cls", [WithBuffer, WithTensor, WithNumber])
def test_what_a_loop_makes_besides_its_weights_is_there_after_loading(
    cls: type[Sequential], make_checkpoint: Callable[..., Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PARTS["loop"], "mine", cls)
    checkpoint = make_checkpoint()
    checkpoint.loop = cls(checkpoint.model.config.n_embd, SequentialConfig())
    if isinstance(checkpoint.loop, WithNumber):
        checkpoint.loop.shift.data += 0.25
    loaded = load_checkpoint(save_checkpoint(checkpoint, tmp_path, STATE, keep=1))
    questions = ["Ann has 3 bags of 4 pears.", "Half of 9?"]
    assert torch.equal(think(loaded, questions).latents, think(checkpoint, questions).latents)


def test_a_loop_of_ones_own_is_found_once_it_is_registered(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_checkpoint(make_checkpoint(), tmp_path, STATE, keep=1)
    text = refusal(folder, lambda config: config["loop"].update(key="noisy"))
    assert text.startswith("loop.key=noisy: must be one of ")
    assert text.endswith("; a part of your own is registered by the module that use=[module] names")

    class Noisy(Sequential):
        """A loop of somebody's own."""

    monkeypatch.setitem(PARTS["loop"], "noisy", Noisy)
    loaded = load_checkpoint(folder, verify=False)
    assert type(loaded.loop) is Noisy
    assert outputs(loaded) == outputs(make_checkpoint())


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


# --- earlier formats -------------------------------------------------------------------------------------------------

MODEL: dict[str, Any] = {"vocab_size": 61, "context_length": 128, "n_layer": 2, "n_head": 4, "n_embd": 32}
OLD_OBJECTIVES = {
    "latent": "simcot_latent.objectives.latent.LatentObjective",
    "weighted": "simcot_latent.objectives.weighted.WeightedObjective",
}
OLD_LATENT: dict[str, Any] = {"n_latents": 4, "latents_per_step": 2, "surplus": "merge", "missing": "mask",
                              "warmup": 0.25, "stages": 0.3, "reset_optimizer": False, "feeds_last": True}  # fmt: skip


def old_config(mode: str = "latent", format: int | None = 2, **thoughts: Any) -> dict[str, Any]:
    """What the `config.json` of an earlier format said of a run whose thoughts were as `OLD_LATENT` has them."""
    thinks = mode == "latent"
    said = {"thinks": thinks, "n_latents": 4 if thinks else 0, "latents_per_step": 2 if thinks else 1,
            "feeds_last": True, "question_end": "", "answer_mark": "####"}  # fmt: skip
    run: dict[str, Any] = {
        "mode": mode, "objective": OLD_OBJECTIVES[mode], "model": MODEL | {"projector_width": None},
        "max_new_tokens": 8,
    }  # fmt: skip
    if thinks:
        run |= {"latent": dict(OLD_LATENT), "decoder": {"n_layer": 1}, "loss": {"step_weight": 2.0}}
    config = {
        "format": format, "model": MODEL | {"projector_width": None}, "step_decoder": None,
        "thoughts": said | thoughts, "step": 7, "run": run,
    }  # fmt: skip
    if format is None:
        del config["format"]
    return config


def as_read(config: dict[str, Any], tmp_path: Path) -> SavedConfig:
    write_json(tmp_path / "config.json", config)
    return read_config(tmp_path / "config.json")


# What `thoughts` said, and the stage that it was. The last stage has the run's own number of thoughts.
OLD_STAGES = {
    "last stage": ({}, 4, Stage(4, None)),
    "first stage": ({"n_latents": 2}, 4, Stage(2, 1)),
    "second of three": ({"n_latents": 4}, 6, Stage(4, 2)),
    "warm-up": ({"n_latents": 0}, 4, Stage(0, 0)),
    "last state only decoded": ({"n_latents": 5, "feeds_last": False}, 5, Stage(5, None)),
    "last state only decoded, first stage": ({"n_latents": 1, "feeds_last": False}, 5, Stage(1, 1)),
    "last state only decoded, warm-up": ({"n_latents": 0, "feeds_last": False}, 5, Stage(0, 0)),
    "a thought a step": ({"n_latents": 3, "latents_per_step": 1}, 5, Stage(3, 3)),
    "imported": ({"n_latents": 10}, None, Stage(10, None)),
}


@pytest.mark.parametrize("case", OLD_STAGES)
def test_how_a_model_of_format_2_thought(case: str, tmp_path: Path) -> None:
    thoughts, in_the_end, stage = OLD_STAGES[case]
    config = old_config(**thoughts)
    if in_the_end is None:
        config["run"] = {"mode": "latent", "max_new_tokens": 8, "imported": {"kind": "coconut"}}
    else:
        config["run"]["latent"]["n_latents"] = in_the_end
    found = as_read(config, tmp_path)
    assert found.stage == stage
    assert found.format == 3
    assert found.loop is not None
    assert (found.loop.key, found.loop.settings) == (
        "sequential", {"feeds_last": thoughts.get("feeds_last", True), "projector_width": None}
    )  # fmt: skip
    assert found.answers == AnswerFormat(thinks=True)
    assert found.groups == StepGroups(thoughts.get("latents_per_step", 2))
    assert (found.parts, found.step) == ([], 7)


def test_a_model_of_format_2_that_wrote_its_steps(tmp_path: Path) -> None:
    found = as_read(old_config("weighted", question_end="\n", answer_mark="###"), tmp_path)
    assert (found.loop, found.stage, found.groups) == (None, Stage(0, 0), StepGroups())
    assert found.answers == AnswerFormat(thinks=False, question_end="\n", answer_mark="###")


def test_the_run_of_format_2_in_the_words_of_format_3(tmp_path: Path) -> None:
    """So that a run that is gone on with is compared with what its options are called now."""
    config = old_config()
    config["run"]["latent"] |= {"surplus": "drop", "missing": "answer"}
    config["run"]["model"]["projector_width"] = 24
    before = json.dumps(config)
    as_of_format_3(config)
    assert json.dumps(config) == before, "it is left as it was"
    found = as_read(config, tmp_path)
    assert found.groups == StepGroups(2, "drop", "answer")
    assert found.run == {
        "mode": "latent", "curriculum": "replace", "loop": "sequential", "steps": "decoder", "terms": [],
        "model": MODEL, "max_new_tokens": 8, "decoder": {"n_layer": 1}, "loss": {"step_weight": 2.0},
        "latent": OLD_LATENT | {"surplus": "drop", "missing": "answer", "projector_width": 24},
    }  # fmt: skip
    assert as_read(old_config("weighted"), tmp_path).run == {
        "mode": "weighted", "curriculum": "none", "loop": "none", "steps": "none", "terms": [], "model": MODEL,
        "max_new_tokens": 8,
    }  # fmt: skip
    mine = old_config()
    mine["run"]["objective"] = "my.own.Objective"
    assert as_read(mine, tmp_path).run["objective"] == "my.own.Objective"


@pytest.mark.parametrize("format", [None, 1])
def test_format_1_counted_a_state_that_is_only_decoded(format: int | None, tmp_path: Path) -> None:
    config = old_config(format=format, n_latents=6, feeds_last=False)
    config["run"]["latent"] |= {"n_latents": 6, "feeds_last": False}
    before = json.dumps(config)
    as_of_format_2(config)
    assert json.dumps(config) == before, "it is left as it was"
    found = as_read(config, tmp_path)
    assert (found.stage, found.run["latent"]["n_latents"]) == (Stage(5, None), 5)
    # Where the model read it, it was a thought then as it is now.
    found = as_read(old_config(format=format), tmp_path)
    assert (found.stage, found.run["latent"]["n_latents"]) == (Stage(4, None), 4)
    # And in format 2 it was none.
    assert "n_latents=6: must be of whole groups" in message(
        lambda: as_read(old_config(n_latents=6, feeds_last=False), tmp_path)
    )


OLD_CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no thoughts": (lambda config: config.pop("thoughts"), "config.thoughts must be an object"),
    "thoughts that are a number": (lambda config: config.update(thoughts=3), "config.thoughts must be an object"),
    "unknown key": (lambda config: config["thoughts"].update(wings=2), "config.thoughts: unknown key 'wings'"),
    "another type": (lambda config: config["thoughts"].update(thinks="yes"), "config.thoughts.thinks='yes'"),
    "no whole groups": (lambda config: config["thoughts"].update(n_latents=3), "thoughts.n_latents=3"),
    "groups of no thought": (lambda config: config["thoughts"].update(latents_per_step=0), "thoughts.n_latents=4"),
    "thoughts below zero": (lambda config: config["thoughts"].update(n_latents=-4), "stage.thoughts=-4"),
    "too many": (lambda config: config["thoughts"].update(n_latents=256), "stage.thoughts=256: must be at most 127"),
    "no run": (lambda config: config.pop("run"), "run"),
    "run that is a number": (lambda config: config.update(run=3), "config.run=3"),
    "unknown model key": (lambda config: config["model"].update(n_wings=2), "config.model: unknown key 'n_wings'"),
    "a key of format 3": (lambda config: config.update(wings=2), "config: unknown key 'wings'"),
}


@pytest.mark.parametrize("format", [1, 2])
@pytest.mark.parametrize("case", OLD_CHANGES)
def test_an_earlier_format_that_is_broken_is_named(case: str, format: int, tmp_path: Path) -> None:
    change, words = OLD_CHANGES[case]
    config = old_config(format=format)
    change(config)
    text = message(lambda: as_read(config, tmp_path))
    assert text.startswith(f"{tmp_path}/config.json: not the configuration of a checkpoint (")
    assert words in text


def write_as_format_2(folder: Path) -> None:
    """Makes of a checkpoint of ours one as the version before wrote it: the projector was the model's."""
    config = json.loads((folder / "config.json").read_text())
    loop, answers, stage, groups = (config.pop(key) for key in ("loop", "answers", "stage", "groups"))
    del config["parts"]
    config["format"] = 2
    config["thoughts"] = answers | {
        "n_latents": stage["thoughts"], "latents_per_step": groups["latents_per_step"],
        "feeds_last": loop["settings"]["feeds_last"],
    }  # fmt: skip
    width = loop["settings"]["projector_width"]
    config["model"]["projector_width"] = width
    if config["step_decoder"] is not None:
        config["step_decoder"]["projector_width"] = None
    config["run"]["model"] = {"projector_width": width}
    config["run"]["latent"] = OLD_LATENT | {"n_latents": stage["thoughts"]}
    write_json(folder / "config.json", config)
    if (folder / "loop.safetensors").exists():
        projector = load_file(folder / "loop.safetensors")
        save_file(load_file(folder / "model.safetensors") | projector, folder / "model.safetensors")
        (folder / "loop.safetensors").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())["files"]
    manifest.pop("loop.safetensors", None)
    now = {name: vars(fingerprint(folder / name)) for name in manifest}
    write_json(folder / "manifest.json", {"files": now})


@pytest.mark.parametrize("family", ["gpt2", "nanochat"])
@pytest.mark.parametrize("width", [None, 24])
def test_a_checkpoint_of_format_2_says_what_it_said(
    family: str, width: int | None, make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    """Its projector is the loop's now, and saved again it is a checkpoint like any other."""
    saved = make_checkpoint(family, loop=make_sequential(True, width))
    folder = save_checkpoint(saved, tmp_path / "old", STATE, keep=1)
    write_as_format_2(folder)
    names = set(load_file(folder / "model.safetensors"))
    parts = ("up.weight", "up.bias", "down.weight", "down.bias", "norm.weight", "norm.bias")
    assert {name for name in names if name.startswith("projector.")} == (
        {f"projector.{part}" for part in parts} if width else set()
    )
    loaded = load_checkpoint(folder)
    assert isinstance(loaded.loop, Sequential)
    assert loaded.loop.config == SequentialConfig(True, width)
    assert loaded.model.state_dict().keys() == saved.model.state_dict().keys()
    assert not [name for name, _ in loaded.model.named_modules() if "projector" in name]
    assert outputs(loaded) == outputs(saved)
    again = save_checkpoint(loaded, tmp_path / "new", STATE, keep=1)
    assert (again / "loop.safetensors").exists() == (width is not None)
    assert outputs(load_checkpoint(again)) == outputs(saved)


def test_a_projector_of_format_2_must_fit(make_checkpoint: Callable[..., Checkpoint], tmp_path: Path) -> None:
    folder = save_checkpoint(make_checkpoint(loop=make_sequential(True, 24)), tmp_path, STATE, keep=1)
    write_as_format_2(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"projector.down.weight": torch.zeros(32, 23)}, folder / "model.safetensors")
    text = message(lambda: load_checkpoint(folder, verify=False))
    assert "model.safetensors: does not fit the model" in text
    assert "projector.down.weight of shape (32, 23), not (32, 24)" in text
    tensors["projector.norm.bias"][3] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    assert "projector.norm.bias holds numbers that are not finite" in message(
        lambda: load_checkpoint(folder, verify=False)
    )


def test_the_moments_of_a_projector_of_format_2_are_the_loops(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    names = ("model.projector.up.weight/exp_avg", "model.projector.norm.bias/step", "model.embedding.weight/exp_avg",
             "step_decoder.transformer.norm.weight/step")  # fmt: skip
    tensors = {f"optimizer/{name}": torch.full((2,), float(i)) for i, name in enumerate(names)}
    state = TrainerState(tensors | {"random/cpu": torch.arange(5, dtype=torch.uint8)}, STATE.values)
    folder = save_checkpoint(make_checkpoint(loop=make_sequential(True, 24)), tmp_path, state, keep=1)
    write_as_format_2(folder)
    found = load_trainer_state(folder)
    assert found.tensors.keys() == {
        "optimizer/loop.projector.up.weight/exp_avg", "optimizer/loop.projector.norm.bias/step",
        "optimizer/model.embedding.weight/exp_avg", "optimizer/step_decoder.transformer.norm.weight/step", "random/cpu",
    }  # fmt: skip
    assert found.tensors["optimizer/loop.projector.norm.bias/step"].tolist() == [1.0, 1.0]
