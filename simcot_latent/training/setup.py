"""What a run needs before its first step: a model and its tokenizer, problems in token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import nn

from simcot_latent.checkpoint import load_checkpoint
from simcot_latent.config import MethodConfig, RunConfig, instantiate
from simcot_latent.data.batch import BatchOrder
from simcot_latent.data.format import Example
from simcot_latent.data.lazy import Lazily
from simcot_latent.data.problem import Problem
from simcot_latent.data.sources import LoadedSplit, Source, Split
from simcot_latent.data.sources.files import UNREAD
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.distributed import Ranks, pick_dtype
from simcot_latent.errors import UserError, file_errors
from simcot_latent.interop.pretrained import load_pretrained, with_latent_tokens
from simcot_latent.logs import track, warn
from simcot_latent.loops.base import ThoughtLoop, fits
from simcot_latent.method import Method
from simcot_latent.model.gpt import GPT, GPTConfig
from simcot_latent.training.memory import out_of_memory
from simcot_latent.training.stopping import StopSignal
from simcot_latent.training.validation import HeldOut

if TYPE_CHECKING:
    from omegaconf import DictConfig


@dataclass
class Job:
    """All that stays the same during a run."""

    run: RunConfig
    raw: dict[str, Any]
    out_dir: Path
    start: Path | None
    """The checkpoint that training goes on from."""
    device: torch.device
    ranks: Ranks
    console: Console
    stop: StopSignal

    def dtype(self, model: GPT) -> torch.dtype:
        """The number format of the model's matrix products."""
        return pick_dtype(self.run.dtype, self.device, model.config.n_embd)


@dataclass
class Start:
    """What training begins with.

    Attributes:
        model, tokenizer: the GPT that is to be trained, and its tokenizer.
        loop: a thought loop that has been trained with it; None: none.
    """

    model: GPT
    tokenizer: Tokenizer
    loop: ThoughtLoop | None = None


def make_model(job: Job, raw: DictConfig) -> Start:
    """The GPT that is to be trained and its tokenizer: new, or those of `init_from`.

    Raises:
        UserError: the shape is impossible, or the command line asks for another than that of `init_from`.
    """
    run = job.run
    if run.init_from is None:
        if run.lora.rank is not None:
            warn(
                job.console,
                f"lora.rank={run.lora.rank}: without init_from= the weights that it freezes are random ones",
            )
        tokenizer: Tokenizer = instantiate(raw.tokenizer, "tokenizer")
        try:
            return Start(GPT(GPTConfig(vocab_size=tokenizer.n_vocab, **run.model)), tokenizer)
        except TypeError as error:
            raise UserError(f"model: {error}") from error
    if job.start is not None:  # what it began from need not be there any more
        saved = load_checkpoint(job.start, key="out_dir", verify=run.verify)
        return Start(saved.model.train(), saved.tokenizer, saved.loop)
    published = load_pretrained(run.init_from, key="init_from", verify=run.verify)
    saved = with_latent_tokens(published, str(run.new_token_init))
    from simcot_latent import cli  # hydra, which training from Python does without

    asked = cli.overridden("tokenizer")
    if asked and instantiate(raw.tokenizer, "tokenizer") != saved.tokenizer:
        raise UserError(
            f"tokenizer={asked[0]}: init_from={run.init_from} brings its own, {saved.tokenizer.name}; leave it out"
        )
    config = asdict(saved.model.config)
    asked = cli.overridden("model")
    for key in run.model if "model" in asked else [name.removeprefix("model.") for name in asked]:
        if run.model.get(key) != config.get(key):
            raise UserError(
                f"model.{key}={run.model.get(key)}: init_from={run.init_from} brings its own model, in which it is "
                f"{config.get(key)}; leave it out"
            )
    return Start(saved.model.train(), saved.tokenizer, saved.loop)


def make_method(job: Job, config: MethodConfig, start: Start) -> Method:
    """What is trained, on its device. A loop that `init_from` brings goes on if its weights fit this method's; a
    projector does unless another is asked for.
    """
    before = start.loop
    brought = getattr(before.config, "projector_width", None) if before is not None else None
    if (
        brought is not None
        and before is not None
        and before.key == config.loop
        and config.latent.projector_width is None
    ):
        config = replace(config, latent=replace(config.latent, projector_width=brought))
    method = Method(start.model, start.tokenizer, job.run, config, before)
    if before is not None and before.state_dict() and (method.loop is None or not fits(before, method.loop)):
        now = "loop=none" if method.loop is None else f"loop={method.loop.key} of other settings"
        warn(job.console, f"init_from={job.run.init_from}: what its loop={before.key} has learned is left out, since "
             f"this run has {now}")  # fmt: skip
    return method.train().to(job.device)


@dataclass
class Material:
    """What a run trains, and on what.

    Attributes:
        method: what is trained, on its device.
        problems: training problems.
        examples: the same in token ids.
        held_out: what it is validated on.
    """

    method: Method
    problems: Sequence[Problem]
    examples: Sequence[Example]
    held_out: HeldOut


def prepare(job: Job, config: MethodConfig, find_data: Callable[[], Source], make: Callable[[Job], Start]) -> Material:
    """Loads what a run needs; see `train.train`."""
    run, console = job.run, job.console
    torch.manual_seed(run.seed)
    with file_errors("data"):
        source = find_data()
        train_split = load_split(source, "train", console)
        validation_split = load_split(source, "validation", console)
    with file_errors("init_from"), out_of_memory("making the model", job.device, "take a smaller model"):
        start = make(job)
        job.raw["model"] = {key: value for key, value in asdict(start.model.config).items() if key != "vocab_size"}
        method = make_method(job, config, start)
    problems, examples = encode_all(method, train_split.problems, "train", job)
    validation = encode_all(method, validation_split.problems[: run.eval_examples], "validation", job)
    return Material(method, problems, examples, HeldOut(*validation, getattr(source, "tolerance", 0.0)))


def load_split(source: Source, split: Split, console: Console) -> LoadedSplit:
    """A split of the data, and what was noticed while reading it."""
    loaded = source.load(split)
    for note, count in sorted(loaded.notes.items()):
        if split == "train" or not note.startswith(UNREAD):  # which is the same for all splits of a folder
            console.print(f"{split}: {count} x {note}")
    return loaded


def encode_all(
    method: Method, problems: Sequence[Problem], split: str, job: Job
) -> tuple[Sequence[Problem], Sequence[Example]]:
    """Problems in token ids; those beyond the model's context end the run, or are dropped, counted and reported.

    Of train, only those that the run comes to are encoded (and made, where a source makes them), unless which ones are
    left depends on the length of all.

    Raises:
        UserError: a problem is too long (on_too_long=error), or none is left.
    """
    run = job.run
    limit = method.model.config.context_length - method.extra_length

    def encode(index: int) -> Example:
        example = method.encode(problems[index])
        if example.length > limit and run.on_too_long == "error":
            raise UserError(
                f"{split} problem {index + 1} ({problems[index].question[:40]!r}...) has {example.length} tokens: "
                f"at most {limit} fit; "
                "raise model.context_length, or set on_too_long=drop"
            )
        return example

    if not problems:
        raise UserError(f"{split}: the data hold no problem")
    examples = Lazily(len(problems), encode)
    indices: Sequence[int] = range(len(problems))
    if split == "train" and run.num_iterations != -1 and run.on_too_long == "error":
        indices = BatchOrder(indices, run.target_examples_per_step, run.seed).read_by(run.num_iterations)
    for index in track(indices, f"encoding {split}", job.console):
        examples[index]
    if run.on_too_long == "error":
        return problems, examples
    kept = [i for i, example in enumerate(examples) if example.length <= limit]
    if dropped := len(problems) - len(kept):
        warn(job.console, f"{split}: dropped {dropped} of {len(problems)} problems of more than {limit} tokens")
    if not kept:
        raise UserError(f"{split}: no problem of at most {limit} tokens; raise model.context_length")
    return [problems[i] for i in kept], [examples[i] for i in kept]


def source_name(raw: dict[str, Any]) -> str:
    """The name of the run's data source, that of its module; its eval, if there is one, has the same."""
    return raw["data"]["_target_"].split(".")[-2]


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
