"""What a checkpoint folder holds; atomic save, verified load. No pickle anywhere.

    model.safetensors           the model, usable without the rest
    loop.safetensors            what the thought loop has learned, if anything: a projector, a pause vector
    step_decoder.safetensors    the auxiliary decoder, if there is one; the embedding it shares is the model's
    lora.safetensors            what the model has learned beside its frozen layers, unless it is merged (lora.merge)
    <part>.safetensors          any further part of a method that learns
    config.json                 all that is needed to rebuild these and the tokenizer
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
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from simcot_latent.checkpoint_config import FORMAT, read_config
from simcot_latent.checkpoint_folders import (
    CONFIG,
    DECODER,
    LOOP,
    LORA,
    MODEL,
    STATE_JSON,
    STATE_TENSORS,
    TOKENIZER,
    find_checkpoint,
)
from simcot_latent.checkpoint_parts import load_lora, load_model_and_loop, new_loop, read_part
from simcot_latent.curricula.base import Stage
from simcot_latent.data.format import AnswerFormat
from simcot_latent.data.tokenizer import TOKENIZER_FILES, Tokenizer
from simcot_latent.errors import UserError
from simcot_latent.files import read_json, write_json
from simcot_latent.folders import MANIFEST, Fingerprint, fingerprint, verify_files
from simcot_latent.loops.base import ThoughtLoop
from simcot_latent.loops.given import GivenLoop
from simcot_latent.model.gpt import GPT
from simcot_latent.model.lora import LoRA, added_weights, merge, plain_weights
from simcot_latent.parts import NONE, find
from simcot_latent.paths import HUB_ID, expanded
from simcot_latent.terms.step_decoder import StepDecoder
from simcot_latent.terms.steps import StepGroups
from simcot_latent.weights import (
    load_module,
    read_tensors,
    save_tensors,
    save_weights,
)

if TYPE_CHECKING:
    from simcot_latent.hub import HubFolder

ON_HUB = [CONFIG, "*.safetensors", MANIFEST, f"{TOKENIZER}/*"]
"""What of a repository on the hub is downloaded, but for `LEFT_ON_HUB`: a checkpoint."""

LEFT_ON_HUB = [STATE_TENSORS, "*/*.safetensors"]
"""The state of training, and weights in folders that are not ours."""


@dataclass
class Checkpoint:
    """A trained model and all it takes to use it.

    Attributes:
        model: the GPT, in evaluation mode.
        step_decoder: the auxiliary decoder; None for a model trained without.
        tokenizer: its tokenizer.
        config: the run's configuration, as plain values.
        answers: what stands around its answers.
        loop: how it thinks, in evaluation mode; None for a model that writes its steps.
        stage: how problems are put to it: how many thoughts it has, which steps it writes.
        groups: how thoughts stand for steps.
        steps: who was to say them, by its key in the table of parts; `none`: the step decoder, if there is one.
        parts: the weights of whatever else was trained, by name.
        lora: how the model was trained, where it was not as a whole. Its layers have factors still, or are merged.
        step: optimizer steps it was trained for.
        path: its folder.
    """

    model: GPT
    step_decoder: StepDecoder | None
    tokenizer: Tokenizer
    config: dict[str, Any]
    answers: AnswerFormat = field(default_factory=AnswerFormat)
    loop: ThoughtLoop | None = None
    stage: Stage = field(default_factory=Stage)
    groups: StepGroups = field(default_factory=StepGroups)
    steps: str = NONE
    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    lora: LoRA | None = None
    step: int = 0
    path: Path | None = None

    def __post_init__(self) -> None:
        if self.steps == NONE and self.step_decoder is not None:
            self.steps = "decoder"

    @property
    def n_states(self) -> int:
        """K, the states that the loop comes to for each question: the thoughts, and those that are only decoded. Of a
        loop that stops by itself, the most.
        """
        return 0 if self.loop is None else self.loop.states(self.stage.thoughts)

    @property
    def reads_steps(self) -> bool:
        """Whether there are thoughts, and steps to be read out of them."""
        says = self.step_decoder is not None if self.steps == "decoder" else self.steps != NONE
        return says and self.stage.thoughts > 0 and find("steps", self.steps).is_read

    @property
    def n_groups(self) -> int:
        """Step groups of a question."""
        return self.groups.count(self.n_states)

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
        options = {"ignore_patterns": LEFT_ON_HUB} | options
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
    thoughts, decoder = checkpoint.stage.thoughts, checkpoint.step_decoder
    n_parameters = sum(parameter.numel() for parameter in checkpoint.model.parameters())
    lines = [f"A language model of {n_parameters:,} parameters, trained with `simcot_latent`."]
    if thoughts:
        c = checkpoint.groups.latents_per_step
        how_many = f"{thoughts} latent thoughts, {c} per step"
        if isinstance(checkpoint.loop, GivenLoop):
            how_many = f"as many latent thoughts as it takes, {thoughts} at most"
        lines.append(f"Before it answers it thinks {how_many}.")
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
            "probe a checkpoint of mode=latent with steps=decoder and loss.step_weight above 0"
        )
    return checkpoint.step_decoder


def load_checkpoint(
    path: str | Path,
    device: str | torch.device = "cpu",
    key: str = "ckpt",
    verify: bool = True,
    merge_lora: bool = True,
) -> Checkpoint:
    """Rebuilds a checkpoint from its folder, or from a run's `out_dir`. Needs no network, runs nothing in the folder.

    A decoder whose file has been removed is left out: the model is usable without it.

    Args:
        key: the config key that the path came from, for the error.
        verify: whether files are compared with the checkpoint's manifest first.
        merge_lora: whether what is kept in `lora.safetensors` is merged into the model's weights.

    Raises:
        UserError: there is no checkpoint, or one of its files is missing, broken, or not the one that was saved; the
            message names it.
    """
    folder = find_checkpoint(path, key)
    has_decoder = (folder / DECODER).exists()
    if verify:
        verify_files(folder, [CONFIG, MODEL, *(f"{TOKENIZER}/{name}" for name in TOKENIZER_FILES)])
    config = read_config(folder / CONFIG)
    is_apart = config.lora is not None and not config.lora.merged
    loop = None if config.loop is None else new_loop(config.loop, config.model.n_embd, folder)
    if verify and (folder / MANIFEST).exists():  # without, the note has been given
        further = [DECODER] * has_decoder + [LOOP] * (folder / LOOP).exists() + [LORA] * is_apart
        verify_files(folder, further + [f"{name}.safetensors" for name in config.parts])
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    if tokenizer.n_vocab != config.model.vocab_size:
        raise UserError(
            f"{folder / TOKENIZER}: has {tokenizer.n_vocab} tokens, but {CONFIG} says "
            f"model.vocab_size={config.model.vocab_size}; they are not of one checkpoint"
        )
    model, lora = load_model_and_loop(config, loop, folder), config.lora
    if lora is not None and is_apart:
        load_lora(model, lora, folder / LORA)
        if merge_lora:
            merge(model)
            lora = replace(lora, merged=True)
    n_states = 0 if loop is None else loop.states(config.stage.thoughts)
    if n_states % config.groups.latents_per_step:
        raise UserError(
            f"{folder / CONFIG}: stage.thoughts={config.stage.thoughts} must make whole groups of "
            f"groups.latents_per_step={config.groups.latents_per_step}"
        )
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
        config=config.run,
        answers=config.answers,
        loop=None if loop is None else loop.to(device).eval(),
        stage=config.stage,
        groups=config.groups,
        steps=config.steps,
        parts={name: read_part(folder / f"{name}.safetensors") for name in config.parts},
        lora=lora,
        step=config.step,
        path=folder,
    )


def write_checkpoint(checkpoint: Checkpoint, folder: Path, state: TrainerState | None = None) -> None:
    """Writes into a folder all that `load_checkpoint` reads, the state of training if it is given, and last the
    manifest of what was written.
    """
    decoder, loop = checkpoint.step_decoder, checkpoint.loop
    config = {
        "format": FORMAT,
        "model": asdict(checkpoint.model.config),
        "step_decoder": None if decoder is None else asdict(decoder.config),
        "loop": None if loop is None else {"key": loop.key, "settings": asdict(loop.config)},
        "answers": asdict(checkpoint.answers),
        "stage": asdict(checkpoint.stage),
        "groups": asdict(checkpoint.groups),
        "steps": checkpoint.steps,
        "parts": sorted(checkpoint.parts),
        "step": checkpoint.step,
        "run": checkpoint.config,
    }
    lora, model = checkpoint.lora, checkpoint.model
    if lora is not None:  # which earlier versions do not know
        config["lora"] = asdict(lora)
    small = [CONFIG, *(f"{TOKENIZER}/{name}" for name in TOKENIZER_FILES)]
    jobs: dict[str, Future[Fingerprint]] = {}
    with ThreadPoolExecutor() as pool:
        if state is not None:
            jobs[STATE_TENSORS] = pool.submit(save_tensors, state.tensors, folder / STATE_TENSORS)
        weights = plain_weights(model, merged=lora is None or lora.merged)
        jobs[MODEL] = pool.submit(save_tensors, weights, folder / MODEL)
        if lora is not None and not lora.merged:
            jobs[LORA] = pool.submit(save_tensors, added_weights(model), folder / LORA)
        if decoder is not None:
            jobs[DECODER] = pool.submit(save_weights, decoder, folder / DECODER, shared="embedding.")
        if loop is not None and loop.state_dict():
            jobs[LOOP] = pool.submit(save_weights, loop, folder / LOOP)
        for name, tensors in checkpoint.parts.items():
            jobs[f"{name}.safetensors"] = pool.submit(save_tensors, tensors, folder / f"{name}.safetensors")
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
    tensors = read_tensors(folder / STATE_TENSORS)
    renamed = {name.replace("/model.projector.", "/loop.projector."): tensor for name, tensor in tensors.items()}
    return TrainerState(renamed, read_json(folder / STATE_JSON))  # the projector was the model's up to format 2


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
