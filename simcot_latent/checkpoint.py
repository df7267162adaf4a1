"""What a checkpoint folder holds; atomic save, verified load. No pickle anywhere.

    model.safetensors           the model, usable without the rest
    step_decoder.safetensors    the auxiliary decoder (latent mode); the embedding it shares is the model's
    config.json                 all that is needed to rebuild model, decoder and tokenizer
    tokenizer/                  self-contained
    trainer_state.safetensors   optimizer moments by parameter name, random generator states
    trainer_state.json          how far training got

Folders are written beside their place and renamed into it, so a folder that is there is complete; `latest` beside them
is a link to the newest. What is not ours by name and by content is neither counted nor deleted.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.errors import UserError, some
from simcot_latent.model.gpt import GPT, GPTConfig
from simcot_latent.model.step_decoder import StepDecoder
from simcot_latent.model.thoughts import ThoughtFormat
from simcot_latent.paths import check_writable, expanded, give_usual_permissions, writing

MODEL, DECODER, CONFIG, TOKENIZER = "model.safetensors", "step_decoder.safetensors", "config.json", "tokenizer"
STATE_TENSORS, STATE_JSON = "trainer_state.safetensors", "trainer_state.json"
LATEST = "latest"
STEP_FOLDER = re.compile(r"step_(\d{7,})")


@dataclass
class Checkpoint:
    """A trained model and all it takes to use it.

    Attributes:
        model: the GPT, in evaluation mode.
        step_decoder: the auxiliary decoder; None for a model trained without.
        tokenizer: its tokenizer.
        thoughts: how the model answers.
        config: the run's configuration, as plain values.
        step: optimizer steps it was trained for.
        path: its folder.
    """

    model: GPT
    step_decoder: StepDecoder | None
    tokenizer: Tokenizer
    thoughts: ThoughtFormat
    config: dict[str, Any]
    step: int = 0
    path: Path | None = None

    @property
    def device(self) -> torch.device:
        return self.model.embedding.weight.device

    @classmethod
    def from_pretrained(cls, source: str | Path, device: str | torch.device = "cpu", **options: Any) -> Checkpoint:
        """A checkpoint from a folder, or from the Hugging Face hub.

        Args:
            source: a folder as `load_checkpoint` takes it, or a repository (`owner/name`) that `push_to_hub` wrote.
            options: of `huggingface_hub.ModelHubMixin.from_pretrained`: `revision`, `token`, `cache_dir`, ...

        Raises:
            UserError: there is none, or it is not whole.
        """
        from simcot_latent.hub import from_pretrained

        return from_pretrained(source, device, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes what `push_to_hub` uploads, a model card among it, into a folder."""
        from simcot_latent.hub import save_pretrained

        save_pretrained(self, folder)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads the checkpoint, without its state of training, to a repository of the Hugging Face hub.

        Args:
            repo_id: the repository (`owner/name`), made if it is new.
            options: of `huggingface_hub.ModelHubMixin.push_to_hub`: `private`, `token`, `commit_message`, ...

        Returns:
            The address of the commit.

        Raises:
            UserError: the hub cannot be reached, or refuses.
        """
        from simcot_latent.hub import push_to_hub

        return push_to_hub(self, repo_id, **options)


@dataclass
class TrainerState:
    """What it takes to go on training: named tensors, and plain values."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


def require_decoder(checkpoint: Checkpoint) -> StepDecoder:
    """The checkpoint's auxiliary decoder.

    Raises:
        UserError: it has none.
    """
    if checkpoint.step_decoder is None:
        raise UserError(
            f"{checkpoint.path}: holds no auxiliary decoder ({DECODER}), so its thoughts cannot be decoded; "
            "probe a checkpoint of mode=latent"
        )
    return checkpoint.step_decoder


def find_checkpoint(path: str | Path, key: str = "ckpt") -> Path:
    """The checkpoint folder that `path` means: itself, or the `latest` of a run's `out_dir`.

    Args:
        key: the config key that the path came from, for the error.

    Raises:
        UserError: there is none.
    """
    path = expanded(path, key)
    for folder in (path, path / LATEST):
        if (folder / CONFIG).is_file() and (folder / MODEL).is_file():
            return folder.resolve()
    if (path / LATEST).is_symlink() and (found := checkpoints_of_training(path)):
        warnings.warn(f"{path / LATEST} leads to no checkpoint; taking the newest, {found[-1].name}", stacklevel=2)
        return found[-1].resolve()
    what = "holds no checkpoint" if path.is_dir() else "is no folder"
    raise UserError(f"{key}={path}: {what}; give a folder that training wrote, such as runs/latent/latest")


def is_checkpoint(path: str | Path) -> bool:
    """Whether `find_checkpoint` finds one; a `config.json` alone may be anybody's."""
    try:
        folder = find_checkpoint(path)
    except UserError:
        return False
    return (folder / TOKENIZER).is_dir() and is_ours(read_json(folder / CONFIG))


def is_ours(config: dict[str, Any]) -> bool:
    """Whether a `config.json` is of a checkpoint of ours, not of a published model."""
    return "thoughts" in config


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu", key: str = "ckpt") -> Checkpoint:
    """Rebuilds a checkpoint from its folder, or from a run's `out_dir`. Needs no network.

    A decoder whose file has been removed is left out: the model is usable without it.

    Raises:
        UserError: there is no checkpoint, or one of its files is missing or broken; the message names it.
    """
    folder = find_checkpoint(path, key)
    config = read_json(folder / CONFIG)
    try:
        model_config = GPTConfig(**config["model"])
        decoder_config = None if config["step_decoder"] is None else GPTConfig(**config["step_decoder"])
        thoughts = ThoughtFormat(**config["thoughts"])
        run, step = config["run"], config["step"]
    except (KeyError, TypeError, UserError) as error:
        raise UserError(f"{folder / CONFIG}: not the configuration of a checkpoint ({error})") from error
    model = GPT(model_config)
    load_weights(model, folder / MODEL)
    decoder = None
    if decoder_config is not None and (folder / DECODER).exists():  # the model is usable without it
        decoder = StepDecoder(decoder_config, model.embedding)
        load_weights(decoder, folder / DECODER, shared="embedding.")
        decoder.to(device).eval()
    return Checkpoint(
        model=model.to(device).eval(),
        step_decoder=decoder,
        tokenizer=Tokenizer.load(folder / TOKENIZER),
        thoughts=thoughts,
        config=run,
        step=step,
        path=folder,
    )


def checkpoints_of_training(out_dir: Path) -> list[Path]:
    """The complete checkpoints that training wrote into its folder, oldest first."""
    if not out_dir.is_dir():
        return []
    numbered = [(int(m[1]), f) for f in out_dir.iterdir() if (m := STEP_FOLDER.fullmatch(f.name))]
    return [folder for step, folder in sorted(numbered) if _is_complete(folder, step)]


def _is_complete(folder: Path, step: int) -> bool:
    """Whether a folder is, by its content, the checkpoint of a step with all that training goes on from."""
    files = (MODEL, STATE_TENSORS, STATE_JSON)
    if folder.is_symlink() or not all((folder / name).is_file() for name in files) or not (folder / TOKENIZER).is_dir():
        return False
    try:
        config = read_json(folder / CONFIG)
    except (UserError, OSError):
        return False
    return is_ours(config) and config.get("step") == step


def save_checkpoint(checkpoint: Checkpoint, out_dir: Path, state: TrainerState, keep: int) -> Path:
    """Writes `out_dir/step_NNNNNNN`, points `out_dir/latest` at it and deletes all but the newest `keep` folders.

    Killed at any moment, it leaves `latest` at a complete checkpoint. Later steps than this one, which a run that went
    back left behind, are not counted: they are replaced when training gets there.
    """
    name = f"step_{checkpoint.step:07d}"
    folder, latest = out_dir / name, out_dir / LATEST
    if folder.exists() and latest.resolve() == folder.resolve():
        return folder  # the same step of the same run: replacing it would leave `latest` at nothing for a moment
    with written_beside(folder) as partial:
        write_checkpoint(checkpoint, partial)
        save_tensors(state.tensors, partial / STATE_TENSORS)
        write_json(partial / STATE_JSON, state.values)
    sync_folder(out_dir)
    if aside := place_of_real_latest(out_dir):
        latest.rename(aside)
    link = out_dir / f".{LATEST}.partial"
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    link.replace(latest)
    sync_folder(out_dir)
    earlier = [old for old in checkpoints_of_training(out_dir) if int(old.name[5:]) <= checkpoint.step]
    for old in earlier[:-keep]:
        shutil.rmtree(old)
    return folder


def place_of_real_latest(out_dir: Path) -> Path | None:
    """Where a `latest` that is no link (copied with `cp -L`, say) moves to make room for one; None where it is a link.

    A checkpoint takes the name of its step if that is free, anything else the first free of latest-1, latest-2, ...
    """
    latest = out_dir / LATEST
    if latest.is_symlink() or not latest.exists():
        return None
    with suppress(UserError, OSError, TypeError, ValueError):
        step = int(read_json(latest / CONFIG)["step"])
        if _is_complete(latest, step) and not (place := out_dir / f"step_{step:07d}").exists():
            return place
    number = 1
    while (place := out_dir / f"{LATEST}-{number}").exists():
        number += 1
    return place


def remove_partial(out_dir: Path) -> None:
    """Removes what saves that were killed left half-written."""
    for path in out_dir.glob(".step_*.partial"):
        if STEP_FOLDER.fullmatch(path.name[1 : -len(".partial")]):
            shutil.rmtree(path)
    (out_dir / f".{LATEST}.partial").unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk: after a loss of power they are there."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes into a folder all that `load_checkpoint` reads; not the state of training."""
    save_weights(checkpoint.model, folder / MODEL)
    decoder = checkpoint.step_decoder
    if decoder is not None:
        save_weights(decoder, folder / DECODER, shared="embedding.")
    checkpoint.tokenizer.save(folder / TOKENIZER)
    config = {
        "model": asdict(checkpoint.model.config),
        "step_decoder": None if decoder is None else asdict(decoder.config),
        "thoughts": asdict(checkpoint.thoughts),
        "step": checkpoint.step,
        "run": checkpoint.config,
    }
    write_json(folder / CONFIG, config)


@contextmanager
def new_folder(out: str | Path, key: str = "out") -> Iterator[Path]:
    """A folder to write into, which takes its place at `out` once all is written.

    Raises:
        UserError: there is something at `out`.
    """
    with written_beside(check_new_folder(out, key)) as partial:
        yield partial


def check_new_folder(out: str | Path, key: str = "out") -> Path:
    """The place of a folder that is to be written, made sure of before work begins.

    Raises:
        UserError: there is something at `out`, or nothing can be written there.
    """
    out = expanded(out, key).resolve()
    try:
        taken = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    except OSError as error:  # a name that is too long, a folder that must not be looked into
        raise UserError(f"{key}={out}: cannot be written ({error.strerror})") from error
    if taken:
        raise UserError(f"{key}={out}: is there already; give a new folder, or an empty one")
    check_writable([out / CONFIG])
    return out


@contextmanager
def written_beside(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` once all is written, and on the disk."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with writing(folder):
        partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_trainer_state(folder: Path) -> TrainerState:
    """What training needs to go on from a checkpoint.

    Raises:
        UserError: a file of it is missing or broken.
    """
    return TrainerState(read_tensors(folder / STATE_TENSORS), read_json(folder / STATE_JSON))


def save_weights(module: nn.Module, file: Path, shared: str | None = None) -> None:
    """A module's weights, but for those under the prefix `shared`, which another file holds."""
    weights = {name: value.detach().contiguous() for name, value in module.state_dict().items()}
    save_tensors({name: value for name, value in weights.items() if not (shared and name.startswith(shared))}, file)


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Writes a safetensors file that others may read, as far as the umask lets them.

    Raises:
        UserError: it cannot be written.
    """
    with writing(file):
        save_file(tensors, file)
        give_usual_permissions(file)


def load_weights(module: nn.Module, file: Path, shared: str | None = None) -> None:
    """Fills a module with the weights of a file; `shared` is a prefix that the file leaves out.

    Raises:
        UserError: the file is missing or broken, or a weight is missing, left over or of another shape.
    """
    weights = read_tensors(file)
    wanted = {n: v.shape for n, v in module.state_dict().items() if not (shared and n.startswith(shared))}
    lacking = [name for name in wanted if name not in weights]
    left_over = [name for name in weights if name not in wanted]
    misshapen = [
        f"{name} of shape {tuple(weights[name].shape)}, not {tuple(shape)}"
        for name, shape in wanted.items()
        if name in weights and weights[name].shape != shape
    ]
    problems = [f"lacks {some(lacking)}"] if lacking else []
    problems += [f"has {some(left_over)}, which the model has not"] if left_over else []
    problems += [f"has {some(misshapen)}"] if misshapen else []
    if problems:
        raise UserError(f"{file}: does not fit the model: it {'; it '.join(problems)}")
    module.load_state_dict(weights, strict=False)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        UserError: it is missing or broken.
    """
    try:
        with file.open("rb"):  # what may not be read is missing in the eyes of safetensors
            return load_file(file)
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file; the checkpoint is incomplete") from error
    except PermissionError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({' '.join(str(error).split())})") from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: it is missing, not JSON, or no object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: must hold a JSON object")
    return value


def write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
