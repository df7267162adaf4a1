"""python -m simcot_latent.train: the training loop and its command line."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any

import hydra
import torch
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simcot_latent import cli
from simcot_latent.checkpoint import (
    LATEST,
    STATE_TENSORS,
    Checkpoint,
    TrainerState,
    find_checkpoint,
    load_checkpoint,
    load_trainer_state,
    progress,
    save_checkpoint,
    setting,
)
from simcot_latent.config import RunConfig, as_plain, instantiate, parse
from simcot_latent.data.batch import BatchOrder, Prefetch, micro_batches, pin, to_device
from simcot_latent.data.format import Example
from simcot_latent.data.problem import Problem
from simcot_latent.data.sources import LoadedSplit, Source, Split
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.distributed import Ranks, autocast, pick_device, pick_dtype, ranks_on
from simcot_latent.errors import UserError
from simcot_latent.logs import RunLog, make_console, make_progress, track, warn
from simcot_latent.losses import add_up
from simcot_latent.model.gpt import GPT, GPTConfig, set_block_options
from simcot_latent.model.step_decoder import StepDecoder
from simcot_latent.model.thoughts import ThoughtFormat
from simcot_latent.objectives.base import Objective
from simcot_latent.optimizer import make_optimizers, update
from simcot_latent.pretrained import load_pretrained, with_latent_tokens, with_projector
from simcot_latent.probe import probe_problems, probe_table
from simcot_latent.profiling import PROFILED, SKIPPED, WARMUP, StepProfile, part
from simcot_latent.validation import HeldOut, collapse, validate, validation_table


@dataclass
class Job:
    """All that stays the same during a run."""

    run: RunConfig
    raw: dict[str, Any]
    out_dir: Path
    device: torch.device
    dtype: torch.dtype
    ranks: Ranks
    console: Console


@dataclass
class PreparedStep:
    """What an optimizer step trains on: this rank's micro-batches, and their totals."""

    batches: list[Any]
    totals: dict[str, Tensor]


class StopSignal:
    """Ctrl-C and SIGTERM, kept until the step is done; a second one kills at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, signal.SIG_DFL)


def main(raw: DictConfig) -> None:
    """Trains as the composed configuration says."""
    run, sections = parse(raw)
    device = pick_device(run.device)
    with ranks_on(device) as ranks:
        console = make_console(ranks.is_main)
        out_dir = Path(ranks.from_main(str(choose_out_dir(run))))
        job = Job(run, as_plain(raw), out_dir, device, pick_dtype(run.dtype, device), ranks, console)
        torch.manual_seed(run.seed)

        source: Source = instantiate(raw.data, "data")
        train_split = load_split(source, "train", console)
        validation_split = load_split(source, "validation", console)
        model, tokenizer = make_model(run, raw)
        job.raw["model"] = {key: value for key, value in asdict(model.config).items() if key != "vocab_size"}
        objective: Objective = hydra.utils.get_class(run.objective)(model, tokenizer, run, sections)
        objective.to(device)
        _, examples = encode_all(objective, train_split.problems, "train", job)
        held_out = HeldOut(*encode_all(objective, validation_split.problems[: run.eval_examples], "validation", job))
        Trainer(job, objective, examples, held_out).train()


class Trainer:
    """One run: steps, evaluations, checkpoints.

    Args:
        job: what stays the same.
        objective: what is trained, on its device.
        examples: training examples.
        held_out: what it is validated on.
    """

    def __init__(self, job: Job, objective: Objective, examples: list[Example], held_out: HeldOut) -> None:
        run = self.run = job.run
        self.job, self.ranks, self.console = job, job.ranks, job.console
        self.objective, self.examples, self.held_out = objective, examples, held_out
        if len(held_out.examples) < job.ranks.world:
            raise UserError(
                f"eval_examples: {len(held_out.examples)} held-out problems are fewer than the {job.ranks.world} ranks"
            )
        if run.target_examples_per_step < job.ranks.world:
            raise UserError(
                f"target_examples_per_step={run.target_examples_per_step}: must be at least the {job.ranks.world} ranks"
            )
        self.order = BatchOrder([e.length for e in examples], run.target_examples_per_step, run.seed)
        steps_of_epochs = math.ceil(run.num_epochs * len(examples) / run.target_examples_per_step)
        self.num_steps = steps_of_epochs if run.num_iterations == -1 else run.num_iterations
        needed = SKIPPED + WARMUP + PROFILED
        if run.profile and self.num_steps < needed:
            raise UserError(f"profile=true: takes {needed} steps, this run has {self.num_steps}; raise num_iterations")
        self.optimizers = make_optimizers(objective, run)
        self.step = 0
        if run.resume:
            self.restore()
        set_block_options(objective, run.compile, run.activation_checkpointing)
        self.module = self.wrap(self.thoughts_now())
        self.warned_weights = False

    def wrap(self, thoughts: ThoughtFormat) -> nn.Module:
        """The objective as it is called in a stage: under DDP where there are ranks."""
        if self.ranks.world == 1:
            return self.objective
        # Decoder and projector take no part while there are no thoughts; looking for unused parameters later would only
        # cost.
        idle = thoughts.n_latents == 0 and (
            self.objective.step_decoder is not None or self.objective.model.projector is not None
        )
        return DistributedDataParallel(self.objective, find_unused_parameters=idle)

    def thoughts_now(self) -> ThoughtFormat:
        """How the model was trained to answer in the last step (before the first: in the first)."""
        return self.objective.thoughts_at(max(0, self.step - 1) / self.num_steps)

    def train(self) -> None:
        """Trains to the end, or to a signal; either way the last thing is a checkpoint."""
        run, job = self.run, self.job
        if self.step == self.num_steps:
            self.console.print(f"{job.out_dir} is trained to its end, {self.num_steps} steps")
            return
        if self.ranks.is_main:
            job.out_dir.mkdir(parents=True, exist_ok=True)
        log = RunLog(job.out_dir, self.ranks.is_main, self.step, run.run, run.wandb_project, job.raw)
        stop = StopSignal()
        self.announce()
        began, began_step = time.perf_counter(), self.step
        prefetch = Prefetch(self.prepare, self.num_steps)
        profiler = StepProfile(job.out_dir / "profile", self.console) if run.profile and self.ranks.is_main else None
        interval = Interval()
        metrics: dict[str, float] = {}
        with make_progress(self.console) as progress:
            bar = progress.add_task(run.mode, total=self.num_steps, completed=self.step)
            while self.step < self.num_steps:
                with part("data"):
                    prepared = prefetch.get(self.step)
                shares, totals, grad_norm, stopping = self.train_step(prepared, stop)
                self.step += 1
                if profiler is not None:
                    profiler.step()
                interval.add(totals, prefetch)
                progress.update(bar, completed=self.step)
                last = self.step == self.num_steps
                if self.step % run.log_every == 0 or last or self.step == 1:
                    self.log_step(log, shares, totals, grad_norm, interval)
                    interval = Interval()
                if stopping and not last:
                    break
                if last or (run.eval_every != -1 and self.step % run.eval_every == 0):
                    metrics = self.validate(log, show=not last)
                    interval = Interval()
                if not last and run.checkpoint_every != -1 and self.step % run.checkpoint_every == 0:
                    self.save()
                    interval = Interval()
        seconds = time.perf_counter() - began
        prefetch.close()
        if profiler is not None:
            profiler.close()
        folder = self.save()
        log.close()
        if self.step < self.num_steps:
            self.console.print(f"stopped by a signal at step {self.step}; go on with resume=true out_dir={job.out_dir}")
            raise SystemExit(128 + (stop.received or signal.SIGTERM))
        if self.ranks.is_main:
            self.console.print(f"{self.step - began_step} steps in {seconds:.0f} s; checkpoint {folder}")
            self.report(metrics)
        self.ranks.barrier()

    def prepare(self, step: int) -> PreparedStep:
        """The batches of a step; a function of nothing but its number."""
        run, ranks = self.run, self.ranks
        thoughts = self.objective.thoughts_at(step / self.num_steps)
        indices = micro_batches(self.order.batch(step), run.device_batch_size, ranks.rank, ranks.world)
        batches = [self.objective.collate([self.examples[i] for i in piece], thoughts) for piece in indices]
        totals = add_up([batch.totals for batch in batches])
        return PreparedStep([pin(b) for b in batches] if self.job.device.type == "cuda" else batches, totals)

    def train_step(
        self, prepared: PreparedStep, stop: StopSignal
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, bool]:
        """One optimizer step: its shares and totals, the gradient norm, and whether any rank was told to stop."""
        run, job, ranks = self.run, self.job, self.ranks
        thoughts = self.objective.thoughts_at(self.step / self.num_steps)
        if thoughts != self.thoughts_now():
            self.begin_stage(thoughts)
        totals = ranks.sum(prepared.totals | {"stop": torch.tensor(float(stop.received is not None))})
        stopping = bool(totals.pop("stop") > 0)
        device_totals = {key: value.to(job.device, non_blocking=True) for key, value in totals.items()}
        lrm = lr_multiplier(run, self.step, self.num_steps)
        for group in chain.from_iterable(optimizer.param_groups for optimizer in self.optimizers):
            group["lr"] = group["peak_lr"] * lrm

        pieces: list[dict[str, Tensor]] = []
        for i, batch in enumerate(prepared.batches):
            synchronise = i == len(prepared.batches) - 1 or not isinstance(self.module, DistributedDataParallel)
            with nullcontext() if synchronise else self.module.no_sync():  # type: ignore[union-attr, operator]
                with part("forward"), autocast(job.device, job.dtype):
                    shares = self.module(to_device(batch, job.device), device_totals)
                with part("backward"):
                    # DDP averages gradients over ranks; shares add up.
                    (shares["loss"] * ranks.world).backward()
            pieces.append({key: value.detach() for key, value in shares.items()})
        with part("update"):
            grad_norm = update(self.objective.parameters(), self.optimizers, run.max_grad_norm or math.inf)
        return add_up(pieces), totals, grad_norm, stopping

    def begin_stage(self, thoughts: ThoughtFormat) -> None:
        """A step before the first of a stage."""
        self.console.print(f"step {self.step:05d} | stage: {thoughts.n_latents} thoughts")
        self.objective.begin_stage(thoughts)
        self.module = self.wrap(thoughts)
        if self.objective.resets_optimizer:
            self.optimizers = make_optimizers(self.objective, self.run)

    def log_step(
        self, log: RunLog, shares: dict[str, Tensor], totals: dict[str, Tensor], grad_norm: Tensor, interval: Interval
    ) -> None:
        """Writes a step's metrics, over all ranks, and its line on the console."""
        run = self.run
        values = {key: value.item() for key, value in self.ranks.sum(shares).items()}
        if not math.isfinite(values["loss"]):
            raise UserError(
                f"loss is {values['loss']} at step {self.step}: training is unstable; lower learning_rate "
                f"(now {run.learning_rate:g}) or max_grad_norm (now {run.max_grad_norm}), or raise warmup_ratio"
            )
        lrm = lr_multiplier(run, self.step - 1, self.num_steps)
        metrics = values | {
            "num_tokens": totals["tokens"].item(),
            "weighted_tokens": totals["weights"].item(),
            "lrm": lrm,
            "lr": run.learning_rate * lrm,
            "grad_norm": grad_norm.item(),
            "tokens_per_s": interval.tokens_per_s(),
            "data_wait": interval.data_wait(),
            "padding": 1 - (totals["positions"] / totals["slots"]).item(),
            "n_latents": self.thoughts_now().n_latents,
        }
        log.write(self.step, metrics)
        parts = [f"step {self.step:05d}/{self.num_steps:05d}", f"loss {values['loss']:.3f}"]
        parts += [
            f"{name.removesuffix('_loss')} {values[name]:.3f}" for name in sorted(values) if name.endswith("_loss")
        ]
        parts += [f"lrm {lrm:.2f}", f"tokens {metrics['num_tokens']:.0f}", f"weighted {metrics['weighted_tokens']:.1f}"]
        if "step_accuracy" in values:
            parts.append(f"step_acc {values['step_accuracy']:.2f}")
        parts += [f"grad {metrics['grad_norm']:.2f}", f"tok/s {metrics['tokens_per_s']:.0f}"]
        self.console.print(" | ".join(parts))
        same = metrics["num_tokens"] == metrics["weighted_tokens"]
        written = self.thoughts_now().n_latents == 0 and run.rationale != "none"
        if written and same and run.step_weight_multiplier != 1.0 and not self.warned_weights:
            self.warned_weights = True
            warn(self.console, f"step_weight_multiplier={run.step_weight_multiplier} but no token of this step was "
                 "weighed: the solutions hold no <<..>> steps, so this is plain fine-tuning")  # fmt: skip

    def validate(self, log: RunLog, show: bool) -> dict[str, float]:
        """Evaluates the stage that training is in; `show` prints it."""
        with autocast(self.job.device, self.job.dtype):
            metrics = validate(self.objective, self.as_checkpoint(), self.held_out, self.run, self.ranks)
        log.write(self.step, metrics)
        if (collapsed := collapse(metrics)) is not None:
            warn(self.console, collapsed)
        if show:
            text = " | ".join(f"{key} {value:.3f}" for key, value in metrics.items())
            self.console.print(f"step {self.step:05d}/{self.num_steps:05d} | {text}")
        return metrics

    def announce(self) -> None:
        """What is about to be trained, on what."""
        run, job = self.run, self.job
        model, decoder = self.objective.model, self.objective.step_decoder
        size = f"{count_parameters(model):,} parameters"
        if decoder is not None:
            size += f" + decoder {count_parameters(decoder) - model.embedding.weight.numel():,}"
        self.console.print(
            f"mode={run.mode} | {size} | {len(self.examples)} problems, {len(self.held_out.examples)} held out | "
            f"{self.num_steps} steps of {run.target_examples_per_step} | {job.device}, {job.dtype}, "
            f"{job.ranks.world} rank(s), {torch.get_num_threads()} threads | {job.out_dir}".replace("torch.", "")
        )
        if not any(example.steps for example in self.examples):
            warn(self.console, "no <<expression=result>> step in the training data: step losses, weights and "
                 "accuracies will be empty")  # fmt: skip

    def as_checkpoint(self) -> Checkpoint:
        """The run as it stands."""
        objective = self.objective
        return Checkpoint(
            model=objective.model,
            step_decoder=objective.step_decoder,
            tokenizer=objective.tokenizer,
            thoughts=self.thoughts_now(),
            config=self.job.raw,
            step=self.step,
        )

    def save(self) -> Path | None:
        """Writes a checkpoint; rank 0's moments and weights are everybody's."""
        folder = None
        if self.ranks.is_main:
            names: dict[Tensor, str] = {p: name for name, p in self.objective.named_parameters()}
            tensors = {
                f"optimizer/{names[parameter]}/{key}": value
                for optimizer in self.optimizers
                for parameter, moments in optimizer.state.items()
                for key, value in moments.items()
            }
            tensors["random/cpu"] = torch.get_rng_state()
            values = {"step": self.step, "num_steps": self.num_steps}
            folder = save_checkpoint(
                self.as_checkpoint(), self.job.out_dir, TrainerState(tensors, values), self.run.keep_checkpoints
            )
        self.ranks.barrier()
        return folder

    def restore(self) -> None:
        """Goes on from the newest checkpoint of `out_dir`.

        Raises:
            UserError: there is none, it is of another shape, it was to train for another number of steps, or with
                another optimizer.
        """
        folder = find_checkpoint(self.job.out_dir, key="out_dir")
        saved = load_checkpoint(folder, self.job.device, verify=self.run.verify)
        state = load_trainer_state(folder, self.run.verify)
        step, num_steps = progress(state, folder)
        if num_steps != self.num_steps:
            raise UserError(
                f"resume: {folder} was training for {num_steps} steps, this run is for "
                f"{self.num_steps}; "
                "give the same num_iterations, num_epochs, data and target_examples_per_step"
            )
        if (before := setting(saved, "optimizer")) != self.run.optimizer:
            raise UserError(
                f"resume: {folder} was trained with optimizer={before}, whose moments are of no use "
                f"to optimizer={self.run.optimizer}; give the same"
            )
        copy_weights(saved, self.objective)
        if changes := changed_options(saved.config, self.job.raw):
            warn(self.console, f"resume: from here on other options than before: {', '.join(changes)}")
        owner = {p: o for o in self.optimizers for group in o.param_groups for p in group["params"]}
        for name, parameter in self.objective.named_parameters():
            prefix = f"optimizer/{name}/"
            moments = {k.removeprefix(prefix): v for k, v in state.tensors.items() if k.startswith(prefix)}
            if wrong := [k for k, v in moments.items() if v.dim() and v.shape != parameter.shape]:
                raise UserError(f"{folder / STATE_TENSORS}: {prefix}{wrong[0]} is not of the shape of its parameter")
            if moments:
                # Step counts stay on the CPU where the optimizer put them there.
                owner[parameter].state[parameter] = {
                    key: value if key == "step" and self.job.device.type == "cpu" else value.to(parameter.device)
                    for key, value in moments.items()
                }
        try:
            torch.set_rng_state(state.tensors["random/cpu"])
        except (KeyError, RuntimeError, TypeError) as error:
            raise UserError(f"{folder / STATE_TENSORS}: random/cpu is not the state of a random generator") from error
        self.step = step
        self.console.print(f"going on from {folder}")

    def report(self, metrics: dict[str, float]) -> None:
        """The last validation, and what the thoughts say about five of its problems."""
        checkpoint = self.as_checkpoint()
        self.console.print(validation_table(metrics, len(self.held_out.problems)))
        probes = checkpoint.step_decoder is not None and checkpoint.thoughts.n_latents > 0
        if probes:
            self.objective.eval()
            with torch.no_grad(), autocast(self.job.device, self.job.dtype):
                self.console.print(probe_table(probe_problems(checkpoint, self.held_out.problems[:5])))
        next_steps: list[str] = []
        if find_spec(f"evals.{source_name(self.job.raw)}") is not None:
            next_steps.append(f"python -m evals.{source_name(self.job.raw)} ckpt={self.job.out_dir}")
        if probes:
            next_steps.append(f'python -m simcot_latent.probe ckpt={self.job.out_dir} question="..."')
        for command in next_steps:
            self.console.print(f"next: {command}")


class Interval:
    """What the steps since it was made came to."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.tokens = 0.0
        self.waited = 0.0

    def add(self, totals: dict[str, Tensor], prefetch: Prefetch[PreparedStep]) -> None:
        """Counts a step."""
        self.tokens += totals["positions"].item()
        self.waited += prefetch.waited
        prefetch.waited = 0.0

    def tokens_per_s(self) -> float:
        """Tokens a second, those of all ranks."""
        return self.tokens / (time.perf_counter() - self.began)

    def data_wait(self) -> float:
        """Share of the time in which this rank waited for its data."""
        return self.waited / (time.perf_counter() - self.began)


def lr_multiplier(run: RunConfig, step: int, num_steps: int) -> float:
    """What the learning rate is multiplied by at a step (0-based): linear warm-up, then decay to `final_lr_ratio`."""
    warmup = round(run.warmup_ratio * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    left = (num_steps - step) / max(1, num_steps - warmup)
    if run.lr_schedule == "constant":
        left = 1.0
    elif run.lr_schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * (1 - left)))
    return run.final_lr_ratio + (1 - run.final_lr_ratio) * left


def make_model(run: RunConfig, raw: DictConfig) -> tuple[GPT, Tokenizer]:
    """The GPT that is to be trained and its tokenizer: new, or those of `init_from`.

    Raises:
        UserError: the shape is impossible, or the command line asks for another than that of `init_from`.
    """
    if run.init_from is None:
        tokenizer: Tokenizer = instantiate(raw.tokenizer, "tokenizer")
        try:
            return GPT(GPTConfig(vocab_size=tokenizer.n_vocab, **run.model)), tokenizer
        except TypeError as error:
            raise UserError(f"model: {error}") from error
    if run.resume:  # what it began from need not be there any more
        saved = load_checkpoint(run.out_dir or "", key="out_dir", verify=run.verify)
        return saved.model.train(), saved.tokenizer
    saved = with_latent_tokens(load_pretrained(run.init_from, key="init_from", verify=run.verify), run.new_token_init)
    asked = cli.overridden("tokenizer")
    if asked and instantiate(raw.tokenizer, "tokenizer") != saved.tokenizer:
        raise UserError(
            f"tokenizer={asked[0]}: init_from={run.init_from} brings its own, {saved.tokenizer.name}; leave it out"
        )
    model, config = saved.model, asdict(saved.model.config)
    asked = cli.overridden("model")
    for key in run.model if "model" in asked else [name.removeprefix("model.") for name in asked]:
        if key == "projector_width" and config[key] is None:
            model = with_projector(model, run.model[key])
        elif run.model.get(key) != config.get(key):
            raise UserError(
                f"model.{key}={run.model.get(key)}: init_from={run.init_from} brings its own model, in which it is "
                f"{config.get(key)}; leave it out"
            )
    return model.train(), saved.tokenizer


def copy_weights(saved: Checkpoint, objective: Objective) -> None:
    """A checkpoint's weights into the model, and the decoder, that are to be trained."""
    pairs: tuple[tuple[GPT | StepDecoder | None, GPT | StepDecoder | None], ...] = (
        (objective.model, saved.model),
        (objective.step_decoder, saved.step_decoder),
    )
    for ours, theirs in pairs:
        if (ours and ours.config) != (theirs and theirs.config):
            raise UserError(f"{saved.path}: its model or decoder is not the one that this run is configured for")
        if ours is not None and theirs is not None:
            ours.load_state_dict(theirs.state_dict())


def changed_options(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """`key (was .., is ..)` of each option that a resumed run was given another value for."""
    changes: list[str] = []
    for key in sorted((before.keys() | now.keys()) - (set() if prefix else {"resume", "out_dir", "verify"})):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += changed_options(old, new, f"{prefix}{key}.")
        elif old != new:
            changes.append(f"{prefix}{key} (was {old}, is {new})")
    return changes


def load_split(source: Source, split: Split, console: Console) -> LoadedSplit:
    """A split of the data, and what was noticed while reading it."""
    loaded = source.load(split)
    for note, count in sorted(loaded.notes.items()):
        console.print(f"{split}: {count} x {note}")
    return loaded


def encode_all(
    objective: Objective, problems: Sequence[Problem], split: str, job: Job
) -> tuple[list[Problem], list[Example]]:
    """Problems in token ids; those beyond the model's context end the run, or are dropped, counted and reported.

    Raises:
        UserError: a problem is too long (on_too_long=error), or none is left.
    """
    limit = objective.model.config.context_length - objective.extra_length
    kept: list[Problem] = []
    examples: list[Example] = []
    for number, problem in enumerate(track(problems, f"encoding {split}", job.console), start=1):
        example = objective.encode(problem)
        if example.length <= limit:
            kept.append(problem)
            examples.append(example)
        elif job.run.on_too_long == "error":
            raise UserError(
                f"{split} problem {number} ({problem.question[:40]!r}...) has {example.length} tokens: "
                f"at most {limit} fit; "
                "raise model.context_length, or set on_too_long=drop"
            )
    if dropped := len(problems) - len(examples):
        warn(job.console, f"{split}: dropped {dropped} of {len(problems)} problems of more than {limit} tokens")
    if not examples:
        raise UserError(f"{split}: no problem of at most {limit} tokens; raise model.context_length")
    return kept, examples


def source_name(raw: dict[str, Any]) -> str:
    """The name of the run's data source, that of its module; its eval, if there is one, has the same."""
    return raw["data"]["_target_"].split(".")[-2]


def choose_out_dir(run: RunConfig) -> Path:
    """The run's folder: `out_dir`, or the first of runs/<mode>, runs/<mode>-2, ... that does not exist.

    Raises:
        UserError: `out_dir` already holds a run that is not to be resumed.
    """
    if run.out_dir is None:
        number = 1
        while (folder := Path("runs") / (run.mode if number == 1 else f"{run.mode}-{number}")).exists():
            number += 1
        return folder
    folder = Path(run.out_dir)
    if run.resume:
        find_checkpoint(folder, key="out_dir")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out_dir={folder}: is a file; give a folder")
    if not run.resume and (folder / LATEST).exists():
        raise UserError(f"out_dir={folder}: holds a run already; give another folder, or resume=true to go on with it")
    return folder


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


if __name__ == "__main__":
    cli.run(main, "train")
