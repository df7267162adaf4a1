"""python -m simcot_latent.train: the training loop and its command line."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simcot_latent.checkpoint import Checkpoint, broken_weights, load_checkpoint, remove_partial, save_checkpoint
from simcot_latent.config import RunConfig, as_plain, instantiate, parse
from simcot_latent.data.batch import BatchOrder, Prefetch, micro_batches, pin, to_device
from simcot_latent.data.format import Example
from simcot_latent.data.lazy import Lazily
from simcot_latent.data.problem import Problem
from simcot_latent.data.sources import LoadedSplit, Source, Split
from simcot_latent.data.sources.files import UNREAD
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.distributed import Ranks, autocast, pick_device, pick_dtype, ranks_on
from simcot_latent.errors import UserError, file_errors
from simcot_latent.evals import eval_names, module_of
from simcot_latent.logs import RunLog, make_console, make_progress, track, warn
from simcot_latent.losses import add_up
from simcot_latent.memory import in_units, out_of_memory
from simcot_latent.model.gpt import GPT, GPTConfig, set_block_options
from simcot_latent.model.thoughts import ThoughtFormat
from simcot_latent.nonfinite import NonFinite, save_batch
from simcot_latent.objectives.base import Objective
from simcot_latent.optimizer import make_optimizers, update
from simcot_latent.pretrained import load_pretrained, with_latent_tokens, with_projector
from simcot_latent.probe import probe_problems, probe_table
from simcot_latent.profiling import PROFILED, SKIPPED, WARMUP, StepProfile, part
from simcot_latent.resume import restore, trainer_state
from simcot_latent.run_folder import RunFolder
from simcot_latent.stopping import StopSignal
from simcot_latent.validation import HeldOut, collapse, validate, validation_table

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
    dtype: torch.dtype
    ranks: Ranks
    console: Console
    stop: StopSignal


@dataclass
class PreparedStep:
    """What an optimizer step trains on: this rank's micro-batches, and their totals."""

    batches: list[Any]
    totals: dict[str, Tensor]


def main(raw: DictConfig) -> None:
    """Trains as the composed configuration says."""
    import hydra

    run, sections = parse(raw)
    objective_class: type[Objective] = hydra.utils.get_class(run.objective)
    find_data = partial(instantiate, raw.data, "data")
    train(run, sections, as_plain(raw), find_data, objective_class, lambda job: make_model(job, raw))


def train(
    run: RunConfig,
    sections: Any,
    options: dict[str, Any],
    find_data: Callable[[], Source],
    objective_class: type[Objective],
    make: Callable[[Job], tuple[GPT, Tokenizer]],
) -> None:
    """One run from its start to its report.

    Args:
        run: what all objectives share.
        sections: an instance of the objective's own `Config`.
        options: the whole configuration as plain values, for checkpoints.
        find_data: gives the data.
        objective_class: what is to be trained for.
        make: makes the model and its tokenizer, once the seed is set.

    Raises:
        SystemExit: the run was stopped before its end; see `StopSignal`.
    """
    # oneDNN keeps a program of some 100 KB for each shape it meets, 1024 of them unless told otherwise; no two steps
    # have the same number of tokens. Few serve the layers of a step, and a step takes as long as before.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    stop = StopSignal(run.max_minutes)
    device = pick_device(run.device)

    def train_on(ranks: Ranks) -> int:
        console = make_console(ranks.is_main, stop.reader_gone)
        with RunFolder(run, console) as folder:
            out_dir, start = ranks.on_main(folder.take)
            dtype = pick_dtype(run.dtype, device)
            job = Job(run, options, out_dir, start, device, dtype, ranks, console, stop)
            trainer = make_trainer(job, sections, find_data, objective_class, make)
            with file_errors(f"out_dir={out_dir}"):
                return trainer.train()

    with ranks_on(device) as ranks:
        status = train_on(ranks)
    if status:
        raise SystemExit(status)


def make_trainer(
    job: Job,
    sections: Any,
    find_data: Callable[[], Source],
    objective_class: type[Objective],
    make: Callable[[Job], tuple[GPT, Tokenizer]],
) -> Trainer:
    """Loads what a run needs; see `train`."""
    run, console = job.run, job.console
    torch.manual_seed(run.seed)
    with file_errors("data"):
        source = find_data()
        train_split = load_split(source, "train", console)
        validation_split = load_split(source, "validation", console)
    with file_errors("init_from"), out_of_memory("making the model", job.device, "take a smaller model"):
        model, tokenizer = make(job)
        job.raw["model"] = {key: value for key, value in asdict(model.config).items() if key != "vocab_size"}
        objective = objective_class(model, tokenizer, run, sections)
        objective.to(job.device)
    problems, examples = encode_all(objective, train_split.problems, "train", job)
    validation = encode_all(objective, validation_split.problems[: run.eval_examples], "validation", job)
    held_out = HeldOut(*validation, getattr(source, "tolerance", 0.0))
    with file_errors(f"out_dir={job.out_dir}"):
        return Trainer(job, objective, problems, examples, held_out)


class Trainer:
    """One run: steps, evaluations, checkpoints.

    Args:
        job: what stays the same.
        objective: what is trained, on its device.
        problems: training problems.
        examples: the same in token ids.
        held_out: what it is validated on.
    """

    def __init__(
        self,
        job: Job,
        objective: Objective,
        problems: Sequence[Problem],
        examples: Sequence[Example],
        held_out: HeldOut,
    ) -> None:
        run = self.run = job.run
        self.job, self.ranks, self.console = job, job.ranks, job.console
        self.objective, self.problems, self.examples, self.held_out = objective, problems, examples, held_out
        if len(held_out.examples) < job.ranks.world:
            raise UserError(
                f"eval_examples: {len(held_out.examples)} held-out problems are fewer than the {job.ranks.world} ranks"
            )
        if run.target_examples_per_step < job.ranks.world:
            raise UserError(
                f"target_examples_per_step={run.target_examples_per_step}: must be at least the {job.ranks.world} ranks"
            )
        lengths = Lazily(len(examples), lambda index: examples[index].length)
        self.order = BatchOrder(lengths, run.target_examples_per_step, run.seed)
        steps_of_epochs = math.ceil(run.num_epochs * len(examples) / run.target_examples_per_step)
        self.num_steps = steps_of_epochs if run.num_iterations == -1 else run.num_iterations
        needed = SKIPPED + WARMUP + PROFILED
        if run.profile and self.num_steps < needed:
            raise UserError(f"profile=true: takes {needed} steps, this run has {self.num_steps}; raise num_iterations")
        self.optimizers = make_optimizers(objective, run)
        self.step = 0
        state: dict[str, Any] = {}
        if job.start is not None:
            state = restore(job.start, self.num_steps, objective, self.optimizers, job)
            self.step = state["step"]
        self.nonfinite = NonFinite(job.ranks, (state.get("nonfinite", 0), state.get("nonfinite_in_a_row", 0)))
        self.owes_validation = state.get("owes_validation", False)
        set_block_options(
            objective, run.compile, run.activation_checkpointing, run.compile_thoughts, run.later_attention
        )
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

    def train(self) -> int:
        """Trains to the end, or until it is asked to stop; either way the last thing is a checkpoint.

        Returns:
            The exit status.
        """
        run, job, stop = self.run, self.job, self.job.stop
        if self.step == self.num_steps:
            self.console.print(f"{job.out_dir} is trained to its end, {self.num_steps} steps")
            return 0
        self.ranks.on_main(self.make_room)
        log = RunLog(job.out_dir, self.ranks.is_main, self.step, run.run, run.wandb_project, job.raw, self.console)
        stop.listen()
        self.announce()
        began, began_step = time.perf_counter(), self.step
        prefetch = Prefetch(self.prepare, self.num_steps)
        profiler = StepProfile(job.out_dir / "profile", self.console) if run.profile and self.ranks.is_main else None
        interval = Interval()
        metrics: dict[str, float] = {}
        with make_progress(self.console) as progress:
            bar = progress.add_task(run.mode, total=self.num_steps, completed=self.step)
            if self.owes_validation:
                self.validate(log, show=True)
                self.owes_validation = False
            while self.step < self.num_steps:
                with part("data"):
                    prepared = prefetch.get(self.step)
                with out_of_memory(partial(self.sizes, prepared), job.device, self.less_memory()):
                    shares, totals, grad_norm, stopping = self.train_step(prepared)
                self.step += 1
                if profiler is not None:
                    profiler.step()
                interval.add(totals, prefetch)
                progress.update(bar, completed=self.step)
                last = self.step == self.num_steps
                validating = last or (run.eval_every != -1 and self.step % run.eval_every == 0)
                saving = not last and run.checkpoint_every != -1 and self.step % run.checkpoint_every == 0
                logging = self.step % run.log_every == 0 or last or self.step == 1
                if logging or validating or saving or stopping or self.nonfinite.is_due:
                    self.look_for_nonfinite()
                if logging:
                    self.log_step(log, shares, totals, grad_norm, interval)
                    interval = Interval()
                if stopping and not last:
                    self.owes_validation = validating
                    break
                if validating:
                    metrics = self.validate(log, show=not last)
                    interval = Interval()
                if saving:
                    self.save(log)
                    interval = Interval()
        seconds = time.perf_counter() - began
        prefetch.close()
        if profiler is not None:
            profiler.close()
        folder = self.save(log)
        log.close()
        if self.step < self.num_steps:
            why, status = stop.status(self.ranks)
            self.console.print(f"stopped {why} at step {self.step}; go on with resume=true out_dir={job.out_dir}")
            return status
        if self.ranks.is_main:
            self.console.print(f"{self.step - began_step} steps in {seconds:.0f} s; checkpoint {folder}")
            self.report(metrics)
        self.ranks.barrier()
        return 0

    def sizes(self, prepared: PreparedStep) -> str:
        """What a step computes with, for who has not the memory for it."""
        tokens = prepared.totals["positions"].item() / len(prepared.batches)
        rows = min(self.run.device_batch_size, math.ceil(self.run.target_examples_per_step / self.ranks.world))
        return (
            f"at step {self.step + 1}, in passes over {rows} problems, about {tokens:,.0f} tokens, of a model of "
            f"{count_parameters(self.objective):,} parameters"
        )

    def less_memory(self) -> str:
        """The two settings that take less memory for the same training."""
        checkpointing = "" if self.run.activation_checkpointing else " or set activation_checkpointing=true"
        return f"lower device_batch_size (now {self.run.device_batch_size}){checkpointing}"

    def make_room(self) -> None:
        """Removes what killed saves left behind.

        Raises:
            UserError: the disk has no room for a checkpoint, which would only show at the first one.
        """
        remove_partial(self.job.out_dir)
        moments = 2 if self.run.optimizer == "adamw" else 1  # at least; Muon has one per matrix
        needed = 4 * count_parameters(self.objective) * (1 + moments)
        free = shutil.disk_usage(self.job.out_dir).free
        if free < needed:
            raise UserError(
                f"out_dir={self.job.out_dir}: {in_units(free)} are free there, a checkpoint takes "
                f"{in_units(needed)}; make room, or give another folder"
            )

    def prepare(self, step: int) -> PreparedStep:
        """The batches of a step; a function of nothing but its number."""
        run, ranks = self.run, self.ranks
        thoughts = self.objective.thoughts_at(step / self.num_steps)
        indices = micro_batches(self.order.batch(step), run.device_batch_size, ranks.rank, ranks.world)
        batches = [self.objective.collate([self.examples[i] for i in piece], thoughts) for piece in indices]
        totals = add_up([batch.totals for batch in batches])
        return PreparedStep([pin(b) for b in batches] if self.job.device.type == "cuda" else batches, totals)

    def train_step(self, prepared: PreparedStep) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, bool]:
        """One optimizer step: its shares and totals, the gradient norm, and whether any rank was told to stop."""
        run, job, ranks = self.run, self.job, self.ranks
        thoughts = self.objective.thoughts_at(self.step / self.num_steps)
        if thoughts != self.thoughts_now():
            self.begin_stage(thoughts)
        totals = ranks.sum(prepared.totals | {"stop": torch.tensor(float(job.stop.asked))})
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
        shares = add_up(pieces)

        def skips(grad_norm: Tensor) -> bool:
            self.nonfinite.add(self.step + 1, shares["loss"], grad_norm)
            return run.on_nonfinite == "skip" and self.look_for_nonfinite()

        with part("update"):
            grad_norm = update(self.objective.parameters(), self.optimizers, run.max_grad_norm or math.inf, skips)
        return shares, totals, grad_norm, stopping

    def look_for_nonfinite(self) -> bool:
        """Whether a step since the last look had a loss or gradient that is no number; its batch is saved.

        Raises:
            UserError: one had, and on_nonfinite=error, or it is one too many in a row.
        """
        run, found = self.run, self.nonfinite.look()
        if not found:
            return False
        step, loss, norm = found[0]
        indices = self.order.batch(step - 1)
        file = self.ranks.on_main(lambda: save_batch(self.job.out_dir, step, loss, norm, indices, self.problems))
        what = f"loss is {loss:g}, gradient norm {norm:g} at step {step}" + (f" (its batch: {file})" if file else "")
        if run.on_nonfinite == "error" or self.nonfinite.in_a_row > run.max_nonfinite:
            skipped = "on_nonfinite=skip skips such steps" if run.on_nonfinite == "error" else (
                f"these are more than max_nonfinite={run.max_nonfinite} steps in a row")  # fmt: skip
            raise UserError(f"{what}: {self.unstable()}; {skipped}")
        warn(self.console, f"{what}: no update ({self.nonfinite.total} such steps so far)")
        return True

    def unstable(self) -> str:
        """What helps against diverging."""
        run = self.run
        return (
            f"training is unstable; lower learning_rate (now {run.learning_rate:g}) or max_grad_norm (now "
            f"{run.max_grad_norm}), or raise warmup_ratio"
        )

    def begin_stage(self, thoughts: ThoughtFormat) -> None:
        """A step before the first of a stage."""
        self.console.print(f"step {self.step:05d} | stage: {thoughts.n_latents} thoughts")
        self.objective.begin_stage(self.thoughts_now(), thoughts)
        self.module = self.wrap(thoughts)
        if self.objective.resets_optimizer:
            self.optimizers = make_optimizers(self.objective, self.run)

    def log_step(
        self, log: RunLog, shares: dict[str, Tensor], totals: dict[str, Tensor], grad_norm: Tensor, interval: Interval
    ) -> None:
        """Writes a step's metrics, over all ranks, and its line on the console."""
        run = self.run
        values = {key: value.item() for key, value in self.ranks.sum(shares).items()}
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
        if run.on_nonfinite == "skip":
            metrics["nonfinite_steps"] = self.nonfinite.total
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
        n = min(self.run.eval_batch_size, len(self.held_out.examples))
        helps = f"lower eval_batch_size (now {self.run.eval_batch_size}) or max_new_tokens"
        with (
            out_of_memory(f"validating {n} problems at a time", self.job.device, helps),
            autocast(self.job.device, self.job.dtype),
        ):
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
        encoded = self.examples.made() if isinstance(self.examples, Lazily) else self.examples
        if not any(example.steps for example in encoded):
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

    def save(self, log: RunLog) -> Path:
        """Writes a checkpoint; rank 0's moments and weights are everybody's."""
        log.sync()
        return self.ranks.on_main(self.write_checkpoint)

    def write_checkpoint(self) -> Path:
        """Rank 0's part of `save`.

        Raises:
            UserError: the disk refuses it, or the model is none any more.
        """
        if broken := broken_weights(self.objective.named_parameters()):
            raise UserError(
                f"not saved at step {self.step}: {broken[0]} and {len(broken) - 1} more weights hold numbers that are "
                f"not finite, or over 1e19; checkpoints before it are as they were; {self.unstable()}"
            )
        total, in_a_row = self.nonfinite.state
        state = trainer_state(
            self.objective,
            self.optimizers,
            step=self.step,
            num_steps=self.num_steps,
            nonfinite=total,
            nonfinite_in_a_row=in_a_row,
            owes_validation=self.owes_validation,
        )
        with file_errors(f"out_dir={self.job.out_dir}"):
            return save_checkpoint(self.as_checkpoint(), self.job.out_dir, state, self.run.keep_checkpoints)

    def report(self, metrics: dict[str, float]) -> None:
        """The last validation, and what the thoughts say about five of its problems."""
        checkpoint = self.as_checkpoint()
        self.console.print(validation_table(metrics, len(self.held_out.problems)))
        has_thoughts = checkpoint.step_decoder is not None and checkpoint.thoughts.n_latents > 0
        if has_thoughts:
            self.objective.eval()
            with torch.no_grad(), autocast(self.job.device, self.job.dtype):
                probes = probe_problems(checkpoint, self.held_out.problems[:5])
            self.console.print(probe_table(probes, self.held_out.tolerance))
        source, ckpt = source_name(self.job.raw), shlex.quote(f"ckpt={self.job.out_dir}")
        next_steps: list[str] = []
        if source in eval_names():
            next_steps.append(f"python -m {module_of(source)} {ckpt}")
        if has_thoughts:
            next_steps.append(f'python -m simcot_latent.probe {ckpt} question="..."')
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


def make_model(job: Job, raw: DictConfig) -> tuple[GPT, Tokenizer]:
    """The GPT that is to be trained and its tokenizer: new, or those of `init_from`.

    Raises:
        UserError: the shape is impossible, or the command line asks for another than that of `init_from`.
    """
    run = job.run
    if run.init_from is None:
        tokenizer: Tokenizer = instantiate(raw.tokenizer, "tokenizer")
        try:
            return GPT(GPTConfig(vocab_size=tokenizer.n_vocab, **run.model)), tokenizer
        except TypeError as error:
            raise UserError(f"model: {error}") from error
    if job.start is not None:  # what it began from need not be there any more
        saved = load_checkpoint(job.start, key="out_dir", verify=run.verify)
        return saved.model.train(), saved.tokenizer
    published = load_pretrained(run.init_from, key="init_from", verify=run.verify)
    saved = with_latent_tokens(published, str(run.new_token_init))
    from simcot_latent import cli  # hydra, which training from Python does without

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


def load_split(source: Source, split: Split, console: Console) -> LoadedSplit:
    """A split of the data, and what was noticed while reading it."""
    loaded = source.load(split)
    for note, count in sorted(loaded.notes.items()):
        if split == "train" or not note.startswith(UNREAD):  # which is the same for all splits of a folder
            console.print(f"{split}: {count} x {note}")
    return loaded


def encode_all(
    objective: Objective, problems: Sequence[Problem], split: str, job: Job
) -> tuple[Sequence[Problem], Sequence[Example]]:
    """Problems in token ids; those beyond the model's context end the run, or are dropped, counted and reported.

    Of train, only those that the run comes to are encoded (and made, where a source makes them), unless which ones are
    left depends on the length of all.

    Raises:
        UserError: a problem is too long (on_too_long=error), or none is left.
    """
    run = job.run
    limit = objective.model.config.context_length - objective.extra_length

    def encode(index: int) -> Example:
        example = objective.encode(problems[index])
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


if __name__ == "__main__":
    from simcot_latent import cli

    cli.run(main, "train")
