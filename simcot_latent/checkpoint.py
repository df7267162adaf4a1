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

from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from simcot_latent.checkpoint_folders import (
    CONFIG,
    DECODER,
    MODEL,
    STATE_JSON,
    STATE_TENSORS,
    TOKENIZER,
    find_checkpoint,
)
from simcot_latent.data.tokenizer import TOKENIZER_FILES, Tokenizer
from simcot_latent.errors import UserError
from simcot_latent.files import from_plain, read_json, write_json
from simcot_latent.folders import MANIFEST, Fingerprint, fingerprint, verify_files
from simcot_latent.model.gpt import GPT, GPTConfig
from simcot_latent.model.step_decoder import StepDecoder
from simcot_latent.model.thoughts import ThoughtFormat
from simcot_latent.paths import HUB_ID, expanded
from simcot_latent.weights import load_module, read_tensors, save_tensors, save_weights

if TYPE_CHECKING:
    from simcot_latent.hub import HubFolder

FORMAT = 2
"""Of `config.json`. 1, which did not say so: where `feeds_last` is false, `n_latents` was one more than it is now."""


ON_HUB = [CONFIG, MODEL, DECODER, MANIFEST, f"{TOKENIZER}/*"]
"""What of a repository on the hub is downloaded: a checkpoint but for the state of training."""

MAX_NEW_TOKENS, MAX_THOUGHTS = 65_536, 4096
"""The most that a file may have a model write or think per answer, which decides how much memory an answer takes."""


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
        if expanded(source, "source").is_dir():
            return load_checkpoint(source, device, "source", verify)
        from simcot_latent.hub import download  # and with it huggingface_hub, which few need

        # The mixin's own `from_pretrained` would hand values of the repository's `config.json` on as arguments.
        checkpoint = load_checkpoint(download(str(source), ON_HUB, **options), device, "source", verify)
        return replace(checkpoint, config=without_local_paths(checkpoint.config))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes what `push_to_hub` uploads, a model card among it, into a folder."""
        self._hub_folder().save(folder)

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
        return self._hub_folder().push(repo_id, **options)

    def _hub_folder(self) -> HubFolder:
        from simcot_latent.hub import HubFolder

        shared = replace(self, config=without_local_paths(self.config))
        return HubFolder(partial(write_checkpoint, shared), summary(self))


def without_local_paths(config: dict[str, Any]) -> dict[str, Any]:
    """A run's configuration without what only holds on the machine that it ran on, where others would look in vain.

    So an eval of the source that it was trained on takes the hub's copy of the data.
    """
    config = deepcopy(config)
    start = str(config.get("init_from"))
    if Path(start).expanduser().exists() or not HUB_ID.fullmatch(start):
        config.pop("init_from", None)
    config.pop("out_dir", None)
    for section, key in (("data", "path"), ("tokenizer", "ranks")):
        if isinstance(config.get(section), dict) and key in config[section]:
            config[section][key] = None
    return config


def summary(checkpoint: Checkpoint) -> str:
    """What a model card says of a checkpoint."""
    thoughts, decoder = checkpoint.thoughts, checkpoint.step_decoder
    n_parameters = sum(parameter.numel() for parameter in checkpoint.model.parameters())
    lines = [f"A language model of {n_parameters:,} parameters, trained with `simcot_latent`."]
    if thoughts.n_latents:
        lines.append(
            f"Before it answers it thinks {thoughts.n_latents} latent thoughts, {thoughts.latents_per_step} per step."
        )
    if decoder is not None:
        lines.append(
            "An auxiliary decoder, which is not needed to answer, turns thoughts into the steps that they stand for "
            "(SIM-CoT, https://arxiv.org/abs/2509.20317)."
        )
    return "\n".join(lines)


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
