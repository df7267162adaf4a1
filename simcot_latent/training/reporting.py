"""What a run tells people: before it begins, of each step, at its end."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from simcot_latent.checkpoint import Checkpoint
from simcot_latent.curricula.base import Stage
from simcot_latent.data.batch import Prefetch
from simcot_latent.data.format import Example
from simcot_latent.data.lazy import Lazily
from simcot_latent.data.problem import same_number
from simcot_latent.distributed import autocast
from simcot_latent.evals import eval_names, module_of
from simcot_latent.logs import RunLog, warn
from simcot_latent.method import Method
from simcot_latent.probing.steps import QuestionProbe, probe_problems
from simcot_latent.probing.summary import probe_table
from simcot_latent.training.optimizer import lr_multiplier
from simcot_latent.training.setup import Job, count_parameters, source_name
from simcot_latent.training.validation import HeldOut, validation_table

if TYPE_CHECKING:
    from simcot_latent.training.batches import PreparedStep


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
        """Tokens per second, those of all ranks."""
        return self.tokens / (time.perf_counter() - self.began)

    def data_wait(self) -> float:
        """Share of the time in which this rank waited for its data."""
        return self.waited / (time.perf_counter() - self.began)


class Reporter:
    """Lines on the console and in the logs, about one run.

    Args:
        job: what stays the same.
        method: what is trained.
        num_steps: of the whole run.
    """

    def __init__(self, job: Job, method: Method, num_steps: int) -> None:
        self.job, self.method, self.num_steps = job, method, num_steps
        self.console = job.console
        self.warned_weights = False

    def announce(self, examples: Sequence[Example], held_out: int) -> None:
        """What is about to be trained, on what.

        Args:
            examples: training problems.
            held_out: the number of validation problems.
        """
        run, job = self.job.run, self.job
        model, loop, decoder = self.method.model, self.method.loop, self.method.step_decoder
        size = f"{count_parameters(model) + (0 if loop is None else count_parameters(loop)):,} parameters"
        if decoder is not None:
            size += f" + decoder {count_parameters(decoder) - count_parameters(model.embedding):,}"
        if self.method.lora is not None:
            learned = sum(p.numel() for p in self.method.parameters() if p.requires_grad)
            size += f", of which {learned:,} are trained (LoRA)"
        self.console.print(
            f"mode={run.mode} | {size} | {len(examples)} problems, {held_out} held out | "
            f"{self.num_steps} steps of {run.target_examples_per_step} | {job.device}, {job.dtype(model)}, "
            f"{job.ranks.world} rank(s), {torch.get_num_threads()} threads | {job.out_dir}".replace("torch.", "")
        )
        encoded = examples.made() if isinstance(examples, Lazily) else examples
        if not any(example.steps for example in encoded):
            warn(self.console, "no <<expression=result>> step in the training data: step losses, weights and "
                 "accuracies will be empty")  # fmt: skip
        if self.method.curriculum.warning is not None:
            warn(self.console, self.method.curriculum.warning)

    def step(
        self,
        log: RunLog,
        step: int,
        shares: dict[str, Tensor],
        totals: dict[str, Tensor],
        grad_norm: Tensor,
        interval: Interval,
        stage: Stage,
        nonfinite: int,
    ) -> None:
        """Writes a step's metrics, over all ranks, and its line on the console.

        Args:
            stage: how problems were put to the model.
            nonfinite: steps so far whose loss or gradient was not a number.
        """
        run = self.job.run
        values = {key: value.item() for key, value in self.job.ranks.sum(shares).items()}
        lrm = lr_multiplier(run, step - 1, self.num_steps)
        metrics = values | {
            "num_tokens": totals["tokens"].item(),
            "weighted_tokens": totals["weights"].item(),
            "lrm": lrm,
            "lr": run.learning_rate * lrm,
            "grad_norm": grad_norm.item(),
            "tokens_per_s": interval.tokens_per_s(),
            "data_wait": interval.data_wait(),
            "padding": 1 - (totals["positions"] / totals["slots"]).item(),
            "n_latents": stage.thoughts,
        }
        if stage.removed:
            metrics["tokens_removed"] = stage.removed
        if run.on_nonfinite == "skip":
            metrics["nonfinite_steps"] = nonfinite
        log.write(step, metrics)
        parts = [f"step {step:05d}/{self.num_steps:05d}", f"loss {values['loss']:.3f}"]
        parts += [
            f"{name.removesuffix('_loss')} {values[name]:.3f}" for name in sorted(values) if name.endswith("_loss")
        ]
        parts += [f"lrm {lrm:.2f}", f"tokens {metrics['num_tokens']:.0f}", f"weighted {metrics['weighted_tokens']:.1f}"]
        if "step_accuracy" in values:
            parts.append(f"step_acc {values['step_accuracy']:.2f}")
        parts += [f"grad {metrics['grad_norm']:.2f}", f"tok/s {metrics['tokens_per_s']:.0f}"]
        self.console.print(" | ".join(parts))
        same = metrics["num_tokens"] == metrics["weighted_tokens"]
        written = stage.thoughts == 0 and stage.removed == 0 and run.rationale != "none"
        if written and same and run.step_weight_multiplier != 1.0 and not self.warned_weights:
            self.warned_weights = True
            warn(self.console, f"step_weight_multiplier={run.step_weight_multiplier} but no token of this step was "
                 "weighed: the solutions hold no <<..>> steps, so this is plain fine-tuning")  # fmt: skip

    def validated(self, step: int, metrics: dict[str, float]) -> None:
        """The line of an evaluation along the way."""
        text = " | ".join(f"{key} {value:.3f}" for key, value in metrics.items())
        self.console.print(f"step {step:05d}/{self.num_steps:05d} | {text}")

    def finished(self, checkpoint: Checkpoint, metrics: dict[str, float], held_out: HeldOut) -> None:
        """The last validation, what the thoughts about five of its problems decode to, and what to type next.

        Args:
            held_out: what it was validated on.
        """
        self.console.print(validation_table(metrics, len(held_out.problems)))
        probes: list[QuestionProbe] = []
        if checkpoint.reads_steps:
            self.method.eval()
            with torch.no_grad(), autocast(self.job.device, self.job.dtype(self.method.model)):
                probes = probe_problems(checkpoint, held_out.problems[:5])
            self.console.print(probe_table(probes, held_out.tolerance))
        source, words = source_name(self.job.raw), [f"ckpt={self.job.out_dir}"]
        where = type(checkpoint.loop).__module__
        if checkpoint.loop is not None and not where.startswith("simcot_latent."):  # a loop of the user's own
            words.append(f"use=[{where}]")
        ckpt = shlex.join(words)
        next_steps: list[str] = []
        if source in eval_names():
            next_steps.append(f"python -m {module_of(source)} {ckpt}")
        if probes:
            shown = shlex.quote(f"question={' '.join(to_be_shown(probes, held_out.tolerance).split())}")
            next_steps.append(f"python -m simcot_latent.probe {ckpt} {shown}")
        for command in next_steps:
            self.console.print(f"next: {command}")

    def sizes(self, step: int, prepared: PreparedStep) -> str:
        """What a step computes with, for who has not the memory for it."""
        run = self.job.run
        tokens = prepared.totals["positions"].item() / len(prepared.batches)
        rows = min(run.device_batch_size, math.ceil(run.target_examples_per_step / self.job.ranks.world))
        return (
            f"at step {step}, in passes over {rows} problems, about {tokens:,.0f} tokens, of a model of "
            f"{count_parameters(self.method):,} parameters"
        )

    def less_memory(self) -> str:
        """The two settings that take less memory for the same training."""
        run = self.job.run
        checkpointing = "" if run.activation_checkpointing else " or set activation_checkpointing=true"
        return f"lower device_batch_size (now {run.device_batch_size}){checkpointing}"

    def unstable(self) -> str:
        """What helps against diverging."""
        run = self.job.run
        return (
            f"training is unstable; lower learning_rate (now {run.learning_rate:g}) or max_grad_norm (now "
            f"{run.max_grad_norm}), or raise warmup_ratio"
        )


def to_be_shown(probes: Sequence[QuestionProbe], tolerance: float) -> str:
    """The question that a user may try first: the shortest of those that are read and answered right, if any is."""

    def is_wrong(probe: QuestionProbe) -> bool:
        read = all(group.exact is not False for group in probe.groups)
        return not (read and same_number(probe.answer, probe.gold_answer, tolerance))

    return min(probes, key=lambda probe: (is_wrong(probe), len(probe.question))).question
