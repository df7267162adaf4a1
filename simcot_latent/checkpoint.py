"""What a checkpoint folder holds; atomic save, verified load. No pickle anywhere.

    model.safetensors           the model, usable without the rest
    step_decoder.safetensors    the auxiliary decoder (latent mode); the embedding it shares is the model's
    config.json                 all that is needed to rebuild model, decoder and tokenizer
    tokenizer/                  self-contained
    trainer_state.safetensors   optimizer moments by parameter name, random generator states
    trainer_state.json          how far training got
    manifest.json               size and SHA-256 of every file above, by which damaged and exchanged ones are found

A folder may come from a stranger: nothing in it names a class or a path, and shapes are compared with the
configuration before anything of their size is allocated. The manifest finds accidents; who changes a file on purpose
can change the manifest too.

Folders are written beside their place and renamed into it, so a folder that is there is complete; `latest` beside them
is a link to the newest. What is not ours by name and by content is neither counted nor deleted; where it has the name
of a checkpoint that is to be saved, it moves to another.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from simcot_latent.data.tokenizer import TOKENIZER_FILES, Tokenizer
from simcot_latent.errors import UserError, some
from simcot_latent.files import from_plain, read_json, require_regular
from simcot_latent.model.gpt import GPT, GPTConfig
from simcot_latent.model.step_decoder import StepDecoder
from simcot_latent.model.thoughts import ThoughtFormat
from simcot_latent.paths import check_writable, expanded, free_name, writing

MODEL, DECODER, CONFIG, TOKENIZER = "model.safetensors", "step_decoder.safetensors", "config.json", "tokenizer"
STATE_TENSORS, STATE_JSON = "trainer_state.safetensors", "trainer_state.json"
MANIFEST = "manifest.json"
LATEST = "latest"
FORMAT = 2
"""Of `config.json`. 1, which did not say so: where `feeds_last` is false, `n_latents` was one more than it is now."""
STEP_FOLDER = re.compile(r"step_(\d{7,})")

MAX_NEW_TOKENS, MAX_THOUGHTS = 65_536, 4096
"""The most that a file may have a model write or think per answer, which decides how much memory an answer takes."""

NOTES = logging.getLogger(__name__)
"""What is worth a line, but stops nothing; shown on stderr unless the program that uses this library says otherwise."""

# safetensors' names of number formats, in the order in which it sorts them.
DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
WIDTH_ORDER = list(DTYPES)

M = TypeVar("M", bound=nn.Module)


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
    def from_pretrained(
        cls, source: str | Path, device: str | torch.device = "cpu", verify: bool = True, **options: Any
    ) -> Checkpoint:
        """A checkpoint from a folder, or from the Hugging Face hub.

        Args:
            source: a folder as `load_checkpoint` takes it, or a repository (`owner/name`) that `push_to_hub` wrote.
            verify: see `load_checkpoint`.
            options: of `huggingface_hub.snapshot_download`: `revision`, `token`, `cache_dir`, ...

        Raises:
            UserError: there is none, or it is not whole.
        """
        from simcot_latent.hub import from_pretrained

        return from_pretrained(source, device, verify, **options)

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


@dataclass(frozen=True)
class SavedConfig:
    """What a checkpoint's `config.json` holds.

    Attributes:
        model, step_decoder: the shapes; None: no decoder.
        thoughts: how the model answers.
        step: optimizer steps it was trained for.
        run: the run's options. Whoever uses one asks `setting`, since it is what the file says, no more.
        format: see `FORMAT`.
    """

    model: GPTConfig
    step_decoder: GPTConfig | None
    thoughts: ThoughtFormat
    step: int
    run: dict[str, Any]
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.step < 0:
            raise UserError(f"step={self.step}: must be at least 0")
        context = self.model.context_length
        most = min(MAX_THOUGHTS, context - 1)
        if self.thoughts.n_latents > most:
            raise UserError(f"thoughts.n_latents={self.thoughts.n_latents}: must be at most {most}, to fit the context")
        decoder = self.step_decoder
        if decoder is not None:
            if decoder.n_embd != self.model.n_embd:
                raise UserError(f"step_decoder.n_embd={decoder.n_embd}: must be {self.model.n_embd} as model.n_embd")
            if decoder.context_length <= self.thoughts.latents_per_step:
                raise UserError(f"step_decoder.context_length={decoder.context_length}: too short for a step group")


def read_config(file: Path) -> SavedConfig:
    """What a checkpoint's `config.json` holds.

    Raises:
        UserError: it is missing, or not the configuration of a checkpoint.
    """
    config = read_json(file)
    written = config.get("format", 1)
    if type(written) is int and written > FORMAT:
        raise UserError(f"{file}: is of format {written}, this version reads up to {FORMAT}; update simcot_latent")
    try:
        return from_plain(SavedConfig, config if written == FORMAT else as_of_format_2(config), "config")
    except UserError as error:
        raise UserError(f"{file}: not the configuration of a checkpoint ({error})") from error


def as_of_format_2(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a checkpoint of format 1, which counted a state that is only decoded among the thoughts."""
    config = deepcopy(config)
    thoughts, run = config.get("thoughts"), config.get("run")
    counted = [thoughts, run.get("latent") if isinstance(run, dict) else None]
    if isinstance(thoughts, dict) and thoughts.get("feeds_last") is False:
        for section in counted:
            if isinstance(section, dict) and type(section.get("n_latents")) is int and section["n_latents"] > 1:
                section["n_latents"] -= 1
    return config | {"format": FORMAT}


def setting(checkpoint: Checkpoint, key: str) -> Any:
    """An option of the run that a checkpoint is of.

    Raises:
        UserError: its configuration lacks the option, or holds an impossible value for it.
    """
    value = checkpoint.config.get(key)
    fits, right = {
        "max_new_tokens": (_is_whole(value, 1, MAX_NEW_TOKENS), f"a whole number from 1 to {MAX_NEW_TOKENS:,}"),
        "latent": (_is_latent(value), "an object with n_latents (a whole number), surplus and missing (texts)"),
        "data": (isinstance(value, dict) and isinstance(value.get("_target_"), str), "an object with a _target_"),
    }.get(key, (isinstance(value, str), "a text"))
    if not fits:
        is_there = "" if key in checkpoint.config else ", and is not there"
        raise UserError(f"{checkpoint.path}/{CONFIG}: run.{key} must be {right}{is_there}")
    return value


def _is_whole(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _is_latent(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    texts = all(isinstance(value.get(key), str) for key in ("surplus", "missing"))
    return texts and _is_whole(value.get("n_latents"), 1, MAX_THOUGHTS)


def load_checkpoint(
    path: str | Path, device: str | torch.device = "cpu", key: str = "ckpt", verify: bool = True
) -> Checkpoint:
    """Rebuilds a checkpoint from its folder, or from a run's `out_dir`. Needs no network, runs nothing in the folder.

    A decoder whose file has been removed is left out: the model is usable without it.

    Args:
        key: the config key that the path came from, for the error.
        verify: whether files are compared with the checkpoint's manifest first.

    Raises:
        UserError: there is no checkpoint, or one of its files is missing, broken, or not the one that was saved; the
            message names it.
    """
    folder = find_checkpoint(path, key)
    has_decoder = (folder / DECODER).exists()
    if verify:
        tokenizer_files = [f"{TOKENIZER}/{name}" for name in TOKENIZER_FILES]
        verify_files(folder, [CONFIG, MODEL, *([DECODER] if has_decoder else []), *tokenizer_files])
    config = read_config(folder / CONFIG)
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    if tokenizer.n_vocab != config.model.vocab_size:
        raise UserError(
            f"{folder / TOKENIZER}: has {tokenizer.n_vocab} tokens, but {CONFIG} says "
            f"model.vocab_size={config.model.vocab_size}; they are not of one checkpoint"
        )
    model = load_module(GPT, config.model, folder / MODEL)
    decoder = None
    if config.step_decoder is not None and has_decoder:
        decoder = load_module(
            lambda shape: StepDecoder(shape, model.embedding),
            config.step_decoder,
            folder / DECODER,
            shared="embedding.",
        )
        decoder.to(device).eval()
    return Checkpoint(
        model=model.to(device).eval(),
        step_decoder=decoder,
        tokenizer=tokenizer,
        thoughts=config.thoughts,
        config=config.run,
        step=config.step,
        path=folder,
    )


def checkpoints_of_training(out_dir: Path) -> list[Path]:
    """The complete checkpoints that training wrote into its folder, oldest first."""
    if not out_dir.is_dir():
        return []
    numbered = [(int(m[1]), f) for f in out_dir.iterdir() if (m := STEP_FOLDER.fullmatch(f.name))]
    return [folder for step, folder in sorted(numbered) if _is_complete(folder, step)]


def _is_checkpoint_of_training(folder: Path) -> bool:
    """Whether a folder is, by name and content, one of `checkpoints_of_training`."""
    number = STEP_FOLDER.fullmatch(folder.name)
    return number is not None and _is_complete(folder, int(number[1]))


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
    """Writes `out_dir/step_NNNNNNN`, points `out_dir/latest` at it and deletes all but the newest `keep` checkpoints.

    Whatever else has one of these names moves aside, with a line that says so, and the save goes on. Killed at any
    moment, it leaves `latest` at a complete checkpoint. Later steps than this one, which a run that went back left
    behind, are not counted: they are replaced when training gets there.
    """
    name = f"step_{checkpoint.step:07d}"
    folder, latest = out_dir / name, out_dir / LATEST
    if _is_checkpoint_of_training(folder) and latest.resolve() == folder.resolve():
        return folder  # the same step of the same run: replacing it would leave `latest` at nothing for a moment
    with written_beside(folder) as partial:
        write_checkpoint(checkpoint, partial, state)
    sync_folder(out_dir)
    if aside := place_of_real_latest(out_dir):
        latest.rename(aside)
    link = out_dir / f".{LATEST}.partial"
    _remove_link(link)
    link.symlink_to(name)
    link.replace(latest)
    sync_folder(out_dir)
    earlier = [old for old in checkpoints_of_training(out_dir) if int(old.name[5:]) <= checkpoint.step]
    for old in earlier[:-keep]:
        remove_checkpoint(old)
    return folder


def remove_checkpoint(folder: Path) -> None:
    """Deletes what `write_checkpoint` wrote into a folder, and the folder if nothing else is in it: evals stay."""
    tokenizer = folder / TOKENIZER
    inside = [] if tokenizer.is_symlink() else [tokenizer / name for name in TOKENIZER_FILES]
    others = [folder / name for name in (MODEL, DECODER, STATE_TENSORS, STATE_JSON, MANIFEST)]
    for file in (folder / CONFIG, *others, *inside):  # without the first of them it is no checkpoint any more
        if file.is_file() or file.is_symlink():
            file.unlink()
    for empty in (tokenizer, folder):
        with suppress(OSError):  # it is not empty
            empty.rmdir()


def move_aside(path: Path) -> None:
    """Gives what has a name that is needed another one, and says so; of a link, the link itself."""
    path.rename(aside := free_name(path))
    NOTES.warning("warning: %s was there and is no checkpoint of this run; it is now %s", path, aside.name)


def _make_room(folder: Path) -> None:
    """Frees the name of a folder that is to be renamed to it; only checkpoints of ours, and what is empty, go."""
    if _is_checkpoint_of_training(folder):
        remove_checkpoint(folder)
    elif folder.is_dir() and not folder.is_symlink():
        with suppress(OSError):  # it is not empty
            folder.rmdir()
    if os.path.lexists(folder):
        move_aside(folder)


def _remove_partial_folder(partial: Path) -> None:
    """Removes a half-written folder; of a link, the link alone."""
    if partial.is_symlink() or partial.is_file():
        partial.unlink()
    else:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_link(link: Path) -> None:
    """Removes a link that was not yet renamed to `latest`; what else has its name moves aside."""
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        move_aside(link)


def place_of_real_latest(out_dir: Path) -> Path | None:
    """Where a `latest` that is no link (copied with `cp -L`, say) moves to make room for one; None where it is a link.

    A checkpoint takes the name of its step if that is free, anything else the first free of latest-1, latest-2, ...
    """
    latest = out_dir / LATEST
    if latest.is_symlink() or not latest.exists():
        return None
    with suppress(UserError, OSError, TypeError, ValueError):
        step = int(read_json(latest / CONFIG)["step"])
        if _is_complete(latest, step) and not os.path.lexists(place := out_dir / f"step_{step:07d}"):
            return place
    return free_name(latest)


def remove_partial(out_dir: Path) -> None:
    """Removes what saves that were killed left half-written."""
    for path in out_dir.glob(".step_*.partial"):
        if STEP_FOLDER.fullmatch(path.name[1 : -len(".partial")]):
            _remove_partial_folder(path)
    _remove_link(out_dir / f".{LATEST}.partial")


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk: after a loss of power they are there."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_checkpoint(checkpoint: Checkpoint, folder: Path, state: TrainerState | None = None) -> None:
    """Writes into a folder all that `load_checkpoint` reads, the state of training if it is given, and last the
    manifest of what was written.
    """
    decoder = checkpoint.step_decoder
    config = {
        "format": FORMAT,
        "model": asdict(checkpoint.model.config),
        "step_decoder": None if decoder is None else asdict(decoder.config),
        "thoughts": asdict(checkpoint.thoughts),
        "step": checkpoint.step,
        "run": checkpoint.config,
    }
    small = [CONFIG, *(f"{TOKENIZER}/{name}" for name in TOKENIZER_FILES)]
    jobs: dict[str, Future[Fingerprint]] = {}
    with ThreadPoolExecutor() as pool:
        if state is not None:
            jobs[STATE_TENSORS] = pool.submit(save_tensors, state.tensors, folder / STATE_TENSORS)
        jobs[MODEL] = pool.submit(save_weights, checkpoint.model, folder / MODEL)
        if decoder is not None:
            jobs[DECODER] = pool.submit(save_weights, decoder, folder / DECODER, shared="embedding.")
        checkpoint.tokenizer.save(folder / TOKENIZER)
        write_json(folder / CONFIG, config)
        if state is not None:
            write_json(folder / STATE_JSON, state.values)
            small.append(STATE_JSON)
        found = {name: job.result() for name, job in jobs.items()}
    found |= {name: fingerprint(folder / name) for name in small}
    write_json(folder / MANIFEST, {"files": {name: asdict(found[name]) for name in sorted(found)}})


@dataclass(frozen=True)
class Fingerprint:
    """What tells a file from others: its size in bytes, and the SHA-256 of its content in hexadecimal."""

    size: int
    sha256: str


def fingerprint(file: Path) -> Fingerprint:
    """What a file is. Other threads go on meanwhile.

    Raises:
        UserError: it is no regular file, or cannot be read.
    """
    size, digest, buffer = require_regular(file), hashlib.sha256(), bytearray(2**22)
    try:
        with file.open("rb", buffering=0) as handle:
            left = size
            while left > 0 and (n := handle.readinto(buffer)):
                digest.update(memoryview(buffer)[: min(n, left)])
                left -= n
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    return Fingerprint(size, digest.hexdigest())


def verify_files(folder: Path, names: Sequence[str]) -> None:
    """Compares files of a checkpoint with its manifest; those that are not there are left to whoever needs them.

    A checkpoint that was saved without a manifest is taken as it is, with a note.

    Raises:
        UserError: a file is not the one that was saved; the message names it.
    """
    manifest = folder / MANIFEST
    if not os.path.lexists(manifest):  # a link that leads nowhere is a manifest that was lost
        NOTES.warning("note: %s holds no %s, so its files are not verified", folder, MANIFEST)
        return
    try:
        saved = read_json(manifest).get("files")
        if not isinstance(saved, dict):
            raise UserError(f"{manifest}: lacks files, a mapping from names to sizes and hashes")
    except UserError as error:
        raise UserError(f"{error}; verify=false loads the checkpoint all the same") from error
    found = [name for name in names if (folder / name).exists()]

    def verify(name: str) -> None:
        file, right = folder / name, saved.get(name)
        wrong = "it is not in the manifest" if right is None else None
        if wrong is None:  # the size first, which costs nothing
            size = require_regular(file)
            if not isinstance(right, dict) or right.get("size") != size:
                wrong = "size differs"
            elif right.get("sha256") != fingerprint(file).sha256:
                wrong = "SHA-256 differs"
        if wrong is not None:
            raise UserError(
                f"{file}: is not the file that this checkpoint was saved with ({wrong}); verify=false loads it all "
                "the same"
            )

    with ThreadPoolExecutor() as pool:
        list(pool.map(verify, found))


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
    with writing(folder):
        _remove_partial_folder(partial)
        partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        _make_room(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_trainer_state(folder: Path, verify: bool = True) -> TrainerState:
    """What training needs to go on from a checkpoint.

    Args:
        verify: see `load_checkpoint`.

    Raises:
        UserError: a file of it is missing, broken, or not the one that was saved.
    """
    if verify:
        verify_files(folder, [STATE_TENSORS, STATE_JSON])
    return TrainerState(read_tensors(folder / STATE_TENSORS), read_json(folder / STATE_JSON))


def progress(state: TrainerState, folder: Path) -> tuple[int, int]:
    """How many steps were trained, and of how many.

    Raises:
        UserError: the state does not say so, or what else it says of the run so far is impossible.
    """
    step, num_steps = state.values.get("step"), state.values.get("num_steps")
    if type(step) is not int or type(num_steps) is not int or not 0 <= step <= num_steps:
        raise UserError(f"{folder / STATE_JSON}: step and num_steps must be whole numbers, step from 0 to num_steps")
    bad, in_a_row = state.values.get("nonfinite", 0), state.values.get("nonfinite_in_a_row", 0)
    if type(bad) is not int or type(in_a_row) is not int or not 0 <= in_a_row <= bad:
        raise UserError(
            f"{folder / STATE_JSON}: nonfinite and nonfinite_in_a_row must be whole numbers, at least 0, and the "
            "second at most the first"
        )
    if type(state.values.get("owes_validation", False)) is not bool:
        raise UserError(f"{folder / STATE_JSON}: owes_validation must be true or false")
    return step, num_steps


def save_weights(module: nn.Module, file: Path, shared: str | None = None) -> Fingerprint:
    """A module's weights, but for those under the prefix `shared`, which another file holds."""
    weights = module.state_dict()
    return save_tensors({n: v for n, v in weights.items() if not (shared and n.startswith(shared))}, file)


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> Fingerprint:
    """Writes a safetensors file to the disk, and hashes in the same pass what it writes.

    The format: https://github.com/huggingface/safetensors#format. Tensors lie in the library's own order (wide numbers
    first, then by name), so the file is byte for byte the one that `safetensors.torch.save_file` writes.

    Raises:
        UserError: it cannot be written.
    """
    order = sorted(tensors.items(), key=lambda item: (-WIDTH_ORDER.index(item[1].dtype), item[0]))
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in order:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    pieces: list[bytes | Tensor] = [len(text).to_bytes(8, "little") + text, *(tensor for _, tensor in order)]
    digest, size = hashlib.sha256(), 0
    with writing(file), ThreadPoolExecutor(1) as hasher, file.open("wb", buffering=0) as handle:
        for piece in pieces:
            data = memoryview(piece if isinstance(piece, bytes) else raw_bytes(piece))
            size += len(data)
            hasher.submit(digest.update, data)
            while data:
                data = data[handle.write(data) :]
        os.fsync(handle.fileno())  # here, where the hashing goes on meanwhile
    return Fingerprint(size, digest.hexdigest())


def raw_bytes(tensor: Tensor) -> Any:
    """A tensor's numbers as they lie in memory, row by row."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def load_module(make: Callable[[GPTConfig], M], config: GPTConfig, file: Path, shared: str | None = None) -> M:
    """A module with the weights of a file, on the CPU.

    The shapes that the file names are compared with those of the configuration before anything of their size is made:
    of as many blocks as the configuration says only the first is built for that, since all are alike.

    Args:
        make: makes the module of a configuration.
        shared: see `load_weights`.

    Raises:
        UserError: see `load_weights`.
    """
    found = read_shapes(file)
    if config.n_layer > len(found):
        raise UserError(
            f"{file}: does not fit the model: it holds {len(found)} tensors, {CONFIG} says n_layer={config.n_layer}"
        )
    try:
        with torch.device("meta"):
            first = weight_shapes(make(replace(config, n_layer=1)), shared)
    except RuntimeError as error:  # more numbers than a tensor can count
        raise UserError(f"{file}: {CONFIG} says a model larger than any") from error
    wanted: dict[str, torch.Size] = {}
    for name, shape in first.items():
        before, block, after = name.partition(".blocks.0.")
        wanted |= {f"{before}.blocks.{n}.{after}": shape for n in range(config.n_layer)} if block else {name: shape}
    require_shapes(found, wanted, file)
    with torch.device("meta"):
        module = make(config)
    load_weights(module, file, shared)
    return module


def load_weights(module: nn.Module, file: Path, shared: str | None = None) -> None:
    """Gives a module the weights of a file, in the number formats that it has; `shared` is a prefix that the file
    leaves out. Where the module is on the `meta` device they become its own.

    Raises:
        UserError: the file is missing or broken, or a weight is missing, left over, of another shape or not finite.
    """
    require_shapes(read_shapes(file), weight_shapes(module, shared), file)
    ours = module.state_dict()
    # Copies: what was read may be the file itself, mapped into memory.
    state = {name: weight.to(ours[name].dtype, copy=True) for name, weight in read_tensors(file).items()}
    require_finite(state, file)
    module.load_state_dict(state, strict=False, assign=True)


@torch.no_grad()
def broken_weights(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of weights that hold what is no number, or one so large (over 1e19) that no model computes with it."""
    names, weights = zip(*named, strict=True)
    # One read for all of them; a norm squares, so it is infinite long before the numbers are.
    finite = torch.stack([weight.float().norm() for weight in weights]).isfinite().tolist()
    return [name for name, ok in zip(names, finite, strict=True) if not ok]


def require_finite(weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Refuses the weights of a model that would answer nothing but nonsense.

    Args:
        source: what they are from, for the error.

    Raises:
        UserError: some are not finite; the message names the first.
    """
    if broken := broken_weights(weights.items()):
        more = f" and {len(broken) - 1} more weights hold" if len(broken) > 1 else " holds"
        raise UserError(f"{source}: {broken[0]}{more} numbers that are not finite, or over 1e19")


def weight_shapes(module: nn.Module, shared: str | None = None) -> dict[str, torch.Size]:
    """The shapes of a module's weights, but for those under the prefix `shared`."""
    return {n: v.shape for n, v in module.state_dict().items() if not (shared and n.startswith(shared))}


def require_shapes(found: Mapping[str, torch.Size], wanted: Mapping[str, torch.Size], file: Path) -> None:
    """Refuses a file whose tensors are not those that are wanted; the message names the first three.

    Raises:
        UserError: a weight is missing, left over or of another shape.
    """
    lacking = [name for name in wanted if name not in found]
    left_over = [name for name in found if name not in wanted]
    misshapen = [
        f"{name} of shape {tuple(found[name])}, not {tuple(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    problems = [f"lacks {some(lacking)}"] if lacking else []
    problems += [f"has {some(left_over)}, which the model has not"] if left_over else []
    problems += [f"has {some(misshapen)}"] if misshapen else []
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{file}: does not fit the model: it {'; it '.join(problems[:3])}{more}")


def read_shapes(file: Path) -> dict[str, torch.Size]:
    """The names and shapes of a safetensors file's tensors, from its header alone.

    Raises:
        UserError: it is missing or broken.
    """
    with safetensors_errors(file), safe_open(file, framework="pt") as tensors:
        return {name: torch.Size(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        UserError: it is missing or broken.
    """
    with safetensors_errors(file):
        return load_file(file)


@contextmanager
def safetensors_errors(file: Path) -> Iterator[None]:
    """Turns whatever goes wrong while a safetensors file is read into a `UserError` that names it."""
    if not file.exists():
        raise UserError(f"{file}: no such file; the checkpoint is incomplete")
    require_regular(file)
    try:
        yield
    except Exception as error:  # broken bytes end in whatever they happen to mean to the library
        raise UserError(f"{file}: not a whole safetensors file ({' '.join(str(error).split())[:200]})") from error


def write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
