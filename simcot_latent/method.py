"""A method: a model, a curriculum, a thought loop and the terms of a loss, put together.

`Method.collate` makes a batch of problems as a stage of training has them; `Method.forward` turns it into a loss with
named parts. A problem is put to the model in one of two forms:

    written:  question, [<|eot|>,] steps and answer, in one pass
    thought:  question and <|bot|>, thoughts, then <|eot|>, the steps that are still written, and the answer

Shapes: B rows, P tokens of all questions with `<|bot|>`, A of all texts from `<|eot|>` on, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, nn

from simcot_latent.batches import ThoughtBatch, WrittenBatch, flat_ids, position_totals
from simcot_latent.config import LoRAConfig, MethodConfig, RunConfig, check_parts
from simcot_latent.curricula.base import Curriculum, Stage
from simcot_latent.data.batch import Seeds, seed_of
from simcot_latent.data.format import AnswerFormat, Example, TaggedIds, encode_problem, newline
from simcot_latent.data.problem import Problem
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.errors import UserError
from simcot_latent.loops.base import ThoughtLoop, fits, go_on, is_like, make_loop
from simcot_latent.loops.given import GivenLoop
from simcot_latent.model.gpt import GPT
from simcot_latent.model.linear import gathered_gradients
from simcot_latent.model.lora import LoRA, add_lora
from simcot_latent.model.losses import cross_entropy
from simcot_latent.model.packing import Packing
from simcot_latent.model.taps import Taps
from simcot_latent.parts import FILE_NAME, RESERVED, find
from simcot_latent.profiling import part
from simcot_latent.terms.base import Rows, Term, Trace, tap, together
from simcot_latent.terms.step_decoder import StepDecoder
from simcot_latent.terms.steps import StepGroups
from simcot_latent.terms.text import (
    target_totals,
    text_labels,
    text_targets,
    thought_text,
    written_step_accuracy,
    written_text,
)


def make_lora(config: LoRAConfig, tokenizer: Tokenizer) -> LoRA | None:
    """What is beside the layers of a model; None: nothing, and the model is trained itself.

    The rows of `<|bot|>` and `<|eot|>` and all after them are the ones that a published vocabulary lacks, see
    `with_latent_tokens`. They are trained whoever added them: a model that has only written its steps before (the first
    stage of a recipe) knows both tokens and has not used either.
    """
    if config.rank is None:
        return None
    rows = tokenizer.n_vocab - min(tokenizer.bot_id, tokenizer.eot_id) if config.new_rows else 0
    return LoRA(config.rank, config.alpha, list(config.targets), config.split, rows, config.merge)


class Method(nn.Module):
    """All that is trained, so that one DDP wrapper sees every parameter.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        run: what all methods share.
        config: the parts and their settings.
        loop: a loop that has been trained, which goes on if its weights fit; None: a new one.

    Raises:
        UserError: the parts do not make a method together.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        run: RunConfig,
        config: MethodConfig,
        loop: ThoughtLoop | None = None,
    ) -> None:
        super().__init__()
        check_parts(config, run)
        self.model, self.tokenizer, self.run, self.config = model, tokenizer, run, config
        self.lora = make_lora(run.lora, tokenizer)
        if self.lora is not None:
            add_lora(model, self.lora, run.lora.dropout)
        new = make_loop(config.loop, model.config.n_embd, config)
        self.loop = loop if new is not None and is_like(loop, new) else new
        if loop is not None and new is not None and self.loop is new and fits(loop, new):
            new.load_state_dict(loop.state_dict())  # of other settings, such as what is fed, but the same weights
        self.curriculum: Curriculum = find("curriculum", config.curriculum)(config, run)
        if self.loop is not None and self.loop.states(config.latent.n_latents) != config.latent.n_states:
            raise UserError(
                f"latent.feeds_last={str(config.latent.feeds_last).lower()}: loop={config.loop} comes to "
                f"{self.loop.states(config.latent.n_latents)} states with {config.latent.n_latents} thoughts, not "
                f"{config.latent.n_states}"
            )
        self.answers = AnswerFormat(thinks=self.loop is not None)
        latent = config.latent
        self.groups = StepGroups(latent.latents_per_step, latent.surplus, latent.missing, latent.drop_last_step)
        self.newline = newline(tokenizer)
        self.step_decoder: StepDecoder | None
        self.register_module("step_decoder", None)
        self.terms: dict[str, Term] = {}
        for group, key in config.parts:
            if group in ("curriculum", "loop") or (group == "steps" and config.loss.step_weight == 0):
                continue
            term: Term = find(group, key)(model, tokenizer, config)
            if term.weight != 0:
                self.add_term(term, term.name or key)
        if config.loss.answer_weight == 0 and not self.terms:
            raise UserError("loss.answer_weight=0: must be above 0 where no other term of the loss is left")

    def add_term(self, term: Term, name: str) -> None:
        """Adds a term, whose loss is logged as `<name>_loss`.

        Raises:
            UserError: there is one of that name, or a module of the name of one of its modules, or that is no name of a
                part of a checkpoint.
        """
        if name in {"answer", *self.terms}:
            raise UserError(f"terms: there are two of the name {name}")
        self.terms[name] = term
        for module_name, module in term.modules.items():
            if getattr(self, module_name, None) is not None:
                raise UserError(f"terms: {name} has a module of the name {module_name}, which there is already")
            reserved = module_name in RESERVED and not isinstance(module, StepDecoder)
            if reserved or not FILE_NAME.fullmatch(module_name):  # see `Checkpoint`
                right = f"small letters, digits and _, and not {', '.join(RESERVED)}, of which a checkpoint has a file"
                raise UserError(f"terms: {name} has a module of the name {module_name!r}: must be {right}")
            self.register_module(module_name, module)

    # What it trains on

    def stage_at(self, progress: float) -> Stage:
        """How problems are put to the model at a share of training (0: start, 1: end)."""
        return self.curriculum.stage_at(progress)

    def stages_of(self, progress: float, seeds: Seeds) -> Stage | list[Stage]:
        """The stage of all rows of a batch at a share of training, or that of each."""
        if not self.curriculum.mixes_stages:
            return self.stage_at(progress)
        return [self.curriculum.draw_stage(progress, seed) for seed in seeds.rows]

    @property
    def last_stage(self) -> Stage:
        """How the trained model answers."""
        return self.stage_at(1.0)

    def begin_step(self, step: int, rank: int) -> None:
        """To be called before an optimizer step (0-based): from here on its random numbers are drawn.

        They are the step's own, so that a resumed run draws what an uninterrupted one does.
        """
        if self.lora is not None and self.run.lora.dropout > 0:
            torch.manual_seed(seed_of(self.run.seed, step, rank, 0))  # none of `Seeds`, which are of fewer numbers

    def begin_stage(self, before: Stage, stage: Stage) -> None:
        """To be called before the first step of each stage but the first."""
        for term in self.terms.values():
            term.begin_stage(before, stage)

    def further_parts(self) -> dict[str, dict[str, Tensor]]:
        """The weights of what is trained besides model, loop and step decoder, by name."""
        known = {"model", "loop", "step_decoder"}
        return {name: module.state_dict() for name, module in self.named_children() if name not in known}

    @property
    def parts_idle_without_thoughts(self) -> bool:
        """Whether some parameters take no part while nothing is thought."""
        own = [] if self.loop is None else list(self.loop.parameters())
        return bool(own) or any(term.modules for term in self.terms.values())

    @property
    def extra_length(self) -> int:
        """Positions that this method needs beyond the written form of a problem."""
        return 0 if self.loop is None else self.loop.positions(self.config.latent.n_latents) + 1

    def encode(self, problem: Problem) -> Example:
        """A problem in token ids."""
        if self.groups.drop_last:
            problem = replace(problem, steps=problem.steps[:-1])
        return encode_problem(self.tokenizer, problem, self.answers, self.run.rationale)  # type: ignore[arg-type]

    def collate(
        self, examples: Sequence[Example], stages: Stage | Sequence[Stage], seeds: Seeds | None = None
    ) -> WrittenBatch | ThoughtBatch:
        """A batch of CPU tensors.

        Args:
            examples: the problems, one per row.
            stages: the stage of all rows, or that of each (as in Coconut's published code).
            seeds: of whatever is drawn for the batch; None: nothing is, as in validation.

        Raises:
            UserError: there is not one stage per row, or one has more thoughts than `latent.n_latents`, or thoughts
                that make no whole step groups.
        """
        mixed, written_only = not isinstance(stages, Stage), self.loop is None
        if isinstance(stages, Stage):
            written_only = written_only or stages.thoughts == 0
            stages = [stages] * len(examples)
        counts, given, loop = self.check_stages(stages, len(examples)), None, self.loop
        if written_only or (isinstance(loop, GivenLoop) and not any(counts)):
            return self.collate_written(examples, stages)
        assert loop is not None
        texts = [written_text(e, stage, self.newline) for e, stage in zip(examples, stages, strict=True)]
        silent, bots = [e.question[:-1] for e in examples], [e.question[-1:] for e in examples]
        lengths, text_lengths = list(map(len, silent)), list(map(len, texts))
        if isinstance(loop, GivenLoop):
            steps = [thought_text(e, stage, self.newline).ids for e, stage in zip(examples, stages, strict=True)]
            given = loop.give(steps, seeds)
            counts = list(given.counts)
            questions, packed_texts = Packing.of([0] * len(counts)), loop.pack_given(lengths, given, text_lengths)
        else:
            questions = loop.pack_questions(lengths, counts, tight=True)
            packed_texts = loop.pack_texts(text_lengths, counts)
        targets = text_targets(texts, self.run.step_weight_multiplier)
        written = None
        rows = Rows(examples, stages, counts, texts, mixed=mixed, seeds=seeds, given=given)
        if any(term.needs_written for term in self.terms.values()):
            solutions = [written_text(example, Stage(), self.newline) for example in examples]
            written = self.written_batch([example.question[:-1] for example in examples], solutions)
            rows = replace(rows, solutions=solutions)
        collated = {name: term.collate(rows) for name, term in self.terms.items()}
        added = chain.from_iterable(each.packings for each in collated.values())
        thinking = sum(count > 0 for count in counts)
        totals = target_totals(targets)
        totals |= {"problems": torch.tensor(float(thinking)), "rows": torch.tensor(float(len(examples)))}
        passes = [questions, *loop.passes(counts), packed_texts, *added]
        totals |= position_totals(*passes, *([] if written is None else [written.packing]))
        if written is not None:
            totals |= {f"written_{key}": value for key, value in target_totals(written.targets).items()}
        for each in collated.values():
            totals |= each.totals
            if each.weights is not None:
                totals["weights"] = totals["weights"] + each.weights
        opening = self.answers.opening(self.tokenizer)
        return ThoughtBatch(
            question_ids_P=flat_ids(silent, bots),
            questions=questions,
            text_ids_A=flat_ids([*opening, *text.ids[:-1]] for text in texts),
            texts=packed_texts,
            targets=targets,
            counts=tuple(counts),
            terms={name: each.batch for name, each in collated.items()},
            totals=totals,
            given=given,
            written=written,
        )

    def check_stages(self, stages: Sequence[Stage], rows: int) -> list[int]:
        """The states of each row; see `collate`."""
        loop, c = self.loop, self.groups.latents_per_step
        most = 0 if loop is None else self.config.latent.n_latents
        if len(stages) != rows or not all(stage.thoughts <= most for stage in stages):
            raise UserError(
                f"stages={list(stages)}: must be one for each of {rows} rows, of at most {most} thoughts each"
            )
        counts = [0 if loop is None else loop.states(stage.thoughts) for stage in stages]
        if isinstance(loop, GivenLoop):
            if 0 in counts and any(counts):
                raise UserError(f"stages={list(stages)}: must all have thoughts with loop={self.config.loop}, or none")
            return counts  # the most that it comes to by itself
        if any(count % c for count in counts):
            raise UserError(f"stages={list(stages)}: thoughts must make whole groups of latents_per_step={c}")
        return counts

    def collate_written(self, examples: Sequence[Example], stages: Sequence[Stage]) -> WrittenBatch:
        """Prompts without loss, then texts."""
        prompts = [[*example.question, *self.answers.opening(self.tokenizer)] for example in examples]
        texts = [written_text(example, stage, self.newline) for example, stage in zip(examples, stages, strict=True)]
        return self.written_batch(prompts, texts)

    def written_batch(self, prompts: Sequence[list[int]], texts: Sequence[TaggedIds]) -> WrittenBatch:
        """A batch of prompts in token ids, and texts."""
        silent = [prompt[:-1] for prompt in prompts]
        predicting = [[prompt[-1], *text.ids[:-1]] for prompt, text in zip(prompts, texts, strict=True)]
        packing = Packing.of(list(map(len, silent)), list(map(len, predicting)), tight=True)
        targets = text_targets(texts, self.run.step_weight_multiplier)
        totals = target_totals(targets) | position_totals(packing)
        return WrittenBatch(flat_ids(silent, predicting), packing, targets, totals)

    # What it loses

    def forward(self, batch: WrittenBatch | ThoughtBatch, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """Shares of the optimizer step: `loss`, which is minimised, and what else is to be logged."""
        return self.lose_written(batch, totals) if isinstance(batch, WrittenBatch) else self.lose(batch, totals)

    def lose_written(self, batch: WrittenBatch, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """The answer loss of a written batch, and the accuracy on its step tokens."""
        model, weight = self.model, self.config.loss.answer_weight
        with gathered_gradients(model):
            hidden_MD = model(batch.ids_P, batch.packing, read_out=len(batch.targets))
            labels = text_labels(hidden_MD, model.output_table, batch.targets, totals["weights"])
            found = cross_entropy(labels, softcap=model.config.logit_softcap)
        shares = {"loss": weight * found.loss}
        if self.run.track_step_accuracy:
            shares["step_accuracy"] = written_step_accuracy(found.correct_M, batch.targets, totals)
        return shares if self.loop is None else shares | {"answer_loss": found.loss.detach()}

    def lose(self, batch: ThoughtBatch, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """The answer loss after thoughts, and the other terms; all labels go through one cross-entropy."""
        model, loop, terms = self.model, self.loop, self.terms
        assert loop is not None
        reads = {name: term.reads(batch.terms[name]) for name, term in terms.items()}
        ids = [batch.question_ids_P, batch.text_ids_A, *(x for x in reads.values() if x is not None)]
        ids += [] if batch.given is None else [batch.given.ids_L]
        with gathered_gradients(*self.children()):
            questions_PD, texts_AD, *rest = model.embedding(torch.cat(ids)).split([len(each) for each in ids])
            read = {name: None if x is None else rest.pop(0) for name, x in reads.items()}
            keys = any(term.needs_keys for term in terms.values())
            before = len(batch.texts) - len(texts_AD)  # what is read with the texts
            text_taps = tap({name: term.wants_of_text(batch.terms[name]) for name, term in terms.items()}, before)
            if isinstance(loop, GivenLoop):
                assert batch.given is not None
                with part("think"):
                    thoughts, hidden_AD = loop.read_given(
                        model, questions_PD, batch.given, rest[0], texts_AD, batch.texts, together(text_taps)
                    )
            else:
                with part("think"):
                    thoughts = loop.think(
                        model, questions_PD, batch.questions, batch.counts, batch.texts.longest, keys=keys
                    )
                with part("go on"):
                    hidden_AD = go_on(model, thoughts, texts_AD, batch.texts, together(text_taps))
            trace = Trace(loop, thoughts, batch.counts, hidden_AD)
            written_taps: dict[str, Taps] = {}
            if (written := batch.written) is not None:
                written_taps = tap({name: term.wants_of_written(batch.terms[name]) for name, term in terms.items()})
                with part("written"):
                    trace.written_MD = model(
                        written.ids_P, written.packing, read_out=len(written.targets), taps=together(written_taps)
                    )
                trace.written_targets = written.targets
            losses = {
                name: term.loss(
                    replace(trace, text_taps=text_taps.get(name), written_taps=written_taps.get(name)),
                    batch.terms[name],
                    read[name],
                    totals,
                )
                for name, term in terms.items()
            }
            labelled = {"answer": text_labels(hidden_AD, model.output_table, batch.targets, totals["weights"])}
            labelled |= {name: each.labelled for name, each in losses.items() if each.labelled is not None}
            weights = {"answer": self.config.loss.answer_weight, **{name: term.weight for name, term in terms.items()}}
            with part("head and loss"):
                found = cross_entropy(
                    *(x._replace(scale_M=weights[name] * x.scale_M) for name, x in labelled.items()),
                    softcap=model.config.logit_softcap,
                )
        lengths = [len(x.label_M) for x in labelled.values()]
        nll = dict(zip(labelled, found.nll_M.split(lengths), strict=True))
        correct = dict(zip(labelled, found.correct_M.split(lengths), strict=True))
        shares = {"loss": found.loss, "answer_loss": (nll["answer"] * labelled["answer"].scale_M).sum()}
        for name, each in losses.items():
            value = torch.zeros_like(found.loss)
            if each.labelled is not None:
                value = (nll[name] * each.labelled.scale_M).sum()
            if each.value is not None:
                shares["loss"] = shares["loss"] + weights[name] * each.value
                value = value + each.value.detach()
            shares[f"{name}_loss"] = value
            if each.metrics is not None:
                shares |= each.metrics(nll.get(name, value), correct.get(name, value))
        if not self.run.track_step_accuracy:
            shares.pop("step_accuracy", None)
        return shares
