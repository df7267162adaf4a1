"""A method: a model, a curriculum, a thought loop and the terms of a loss, put together.

`Method.collate` makes a batch of problems as a stage of training has them; `Method.forward` turns it into a loss with
named parts. A problem is put to the model in one of two forms:

    written:  question, [<|eot|>,] steps and answer, in one pass
    thought:  question and <|bot|>, thoughts, then <|eot|>, the steps that are still written, and the answer

Shapes: B rows, P tokens of all questions with `<|bot|>`, A of all texts from `<|eot|>` on, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from simcot_latent.config import MethodConfig, RunConfig
from simcot_latent.curricula.base import Curriculum, Stage
from simcot_latent.data.format import AnswerFormat, Example, TaggedIds, encode_problem, newline
from simcot_latent.data.problem import Problem
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.errors import UserError
from simcot_latent.loops.base import ThoughtLoop, go_on
from simcot_latent.model.gpt import GPT
from simcot_latent.model.linear import gathered_gradients
from simcot_latent.model.losses import Targets, cross_entropy
from simcot_latent.model.packing import Packing
from simcot_latent.parts import FILE_NAME, NONE, RESERVED, find
from simcot_latent.profiling import part
from simcot_latent.terms.base import Rows, Term, Trace
from simcot_latent.terms.step_decoder import StepDecoder
from simcot_latent.terms.steps import StepGroups
from simcot_latent.terms.text import target_totals, text_labels, text_targets, written_step_accuracy, written_text


@dataclass
class WrittenBatch:
    """Rows `prompt + text`, every token of the text a label.

    Attributes:
        ids_P: token ids of all rows but each one's last: first the tokens that predict nothing (prompts without their
            last token), then those that predict a text.
        packing: how they lie.
        targets: the labels, in the order of the latter.
        totals: what the shares of this batch are divided by, once summed over the whole optimizer step.
    """

    ids_P: Tensor
    packing: Packing
    targets: Targets
    totals: dict[str, Tensor]


@dataclass
class ThoughtBatch:
    """Questions to think about, what follows the thoughts, and what the terms need.

    Attributes:
        question_ids_P, questions: questions, `<|bot|>` of all rows last; how the first pass lies.
        text_ids_A, texts: `<|eot|>` and the text after it, without the last token; how the last pass lies.
        targets: the text after `<|eot|>`.
        counts: the states of each row; see `ThoughtLoop.states`.
        terms: each term's own batch, by name.
        totals: see `WrittenBatch`.
    """

    question_ids_P: Tensor
    questions: Packing
    text_ids_A: Tensor
    texts: Packing
    targets: Targets
    counts: tuple[int, ...]
    terms: dict[str, Any]
    totals: dict[str, Tensor]


def make_loop(key: str, width: int, method: MethodConfig) -> ThoughtLoop | None:
    """The loop of a method, new; None where it has no thoughts."""
    if key == NONE:
        return None
    cls = find("loop", key)
    return cls(width, method.settings(cls.Config))


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
        self, model: GPT, tokenizer: Tokenizer, run: RunConfig, config: MethodConfig, loop: ThoughtLoop | None = None
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.run, self.config = model, tokenizer, run, config
        new = make_loop(config.loop, model.config.n_embd, config)
        self.loop = loop if new is not None and is_like(loop, new) else new
        if loop is not None and new is not None and self.loop is new and fits(loop, new):
            new.load_state_dict(loop.state_dict())  # of other settings, such as what is fed, but the same weights
        curriculum = find("curriculum", config.curriculum)
        self.curriculum: Curriculum = curriculum(config.latent, config.loop)
        self.curriculum.config = config.settings(curriculum.Config)
        self.check_parts()
        self.answers = AnswerFormat(thinks=self.loop is not None)
        self.groups = StepGroups(config.latent.latents_per_step, config.latent.surplus, config.latent.missing)
        self.newline = newline(tokenizer)
        self.step_decoder: StepDecoder | None
        self.register_module("step_decoder", None)
        self.terms: dict[str, Term] = {}
        for group, key in config.parts:
            if group not in ("steps", "term") or (group == "steps" and config.loss.step_weight == 0):
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

    def check_parts(self) -> None:
        """Refuses parts that make no method together, in one line that says which needs what."""
        run, config, latent = self.run, self.config, self.config.latent
        if self.loop is None:
            for group, key in config.parts:
                if group in ("steps", "term"):
                    named = f"terms=[{key}]" if group == "term" else f"{group}={key}"
                    raise UserError(f"{named}: needs thoughts, which loop=none has not; take a loop")
            return
        if run.rationale != "equations":
            mode = f"mode={run.mode or 'latent'}"
            raise UserError(f"rationale={run.rationale}: must be equations in {mode}, whose steps become thoughts")
        if latent.projector_width is not None and not hasattr(self.loop.config, "projector_width"):
            raise UserError(f"latent.projector_width={latent.projector_width}: loop={config.loop} has no projector")
        if self.loop.states(latent.n_latents) != latent.n_states:
            raise UserError(
                f"latent.feeds_last={str(latent.feeds_last).lower()}: loop={config.loop} comes to "
                f"{self.loop.states(latent.n_latents)} states with {latent.n_latents} thoughts, not {latent.n_states}"
            )

    # What it trains on

    def stage_at(self, progress: float) -> Stage:
        """How problems are put to the model at a share of training (0: start, 1: end)."""
        return self.curriculum.stage_at(progress)

    @property
    def last_stage(self) -> Stage:
        """How the trained model answers."""
        return self.stage_at(1.0)

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
        return 0 if self.loop is None else self.config.latent.n_latents + 1

    def encode(self, problem: Problem) -> Example:
        """A problem in token ids."""
        return encode_problem(self.tokenizer, problem, self.answers, self.run.rationale)  # type: ignore[arg-type]

    def collate(self, examples: Sequence[Example], stages: Stage | Sequence[Stage]) -> WrittenBatch | ThoughtBatch:
        """A batch of CPU tensors.

        Args:
            examples: the problems, one per row.
            stages: the stage of all rows, or that of each (as in Coconut's published code).

        Raises:
            UserError: there is not one stage per row, or one has more thoughts than `latent.n_latents`, or thoughts
                that make no whole step groups.
        """
        mixed = not isinstance(stages, Stage)
        if isinstance(stages, Stage):
            if stages.thoughts == 0:
                return self.collate_written(examples, stages)
            stages = [stages] * len(examples)
        counts = self.check_stages(stages, len(examples))
        assert self.loop is not None
        texts = [written_text(e, stage, self.newline) for e, stage in zip(examples, stages, strict=True)]
        silent, bots = [e.question[:-1] for e in examples], [e.question[-1:] for e in examples]
        questions = self.loop.pack_questions(list(map(len, silent)), counts, tight=True)
        packed_texts = self.loop.pack_texts(list(map(len, texts)), counts)
        targets = text_targets(texts, self.run.step_weight_multiplier)
        rows = Rows(examples, stages, counts, mixed)
        collated = {name: term.collate(rows) for name, term in self.terms.items()}
        added = chain.from_iterable(each.packings for each in collated.values())
        totals = target_totals(targets) | {"problems": torch.tensor(float(sum(count > 0 for count in counts)))}
        totals |= position_totals(questions, *self.loop.passes(counts), packed_texts, *added)
        for each in collated.values():
            totals |= each.totals
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
        )

    def check_stages(self, stages: Sequence[Stage], rows: int) -> list[int]:
        """The states of each row; see `collate`."""
        most, c = self.config.latent.n_latents, self.groups.latents_per_step
        if len(stages) != rows or self.loop is None or not all(stage.thoughts <= most for stage in stages):
            raise UserError(
                f"stages={list(stages)}: must be one for each of {rows} rows, of at most {most} thoughts each"
            )
        counts = [self.loop.states(stage.thoughts) for stage in stages]
        if any(count % c for count in counts):
            raise UserError(f"stages={list(stages)}: thoughts must make whole groups of latents_per_step={c}")
        return counts

    def collate_written(self, examples: Sequence[Example], stage: Stage) -> WrittenBatch:
        """Prompts without loss, then texts."""
        prompts = [[*example.question, *self.answers.opening(self.tokenizer)] for example in examples]
        texts = [written_text(example, stage, self.newline) for example in examples]
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
            labels = text_labels(hidden_MD, model.output_table, batch.targets, totals)
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
        with gathered_gradients(*self.children()):
            questions_PD, texts_AD, *rest = model.embedding(torch.cat(ids)).split([len(each) for each in ids])
            read = {name: None if x is None else rest.pop(0) for name, x in reads.items()}
            with part("think"):
                thoughts = loop.think(model, questions_PD, batch.questions, batch.counts, batch.texts.longest)
            with part("go on"):
                hidden_AD = go_on(model, thoughts, texts_AD, batch.texts)
            trace = Trace(thoughts, batch.counts, hidden_AD)
            losses = {name: term.loss(trace, batch.terms[name], read[name], totals) for name, term in terms.items()}
            labelled = {"answer": text_labels(hidden_AD, model.output_table, batch.targets, totals)}
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


def is_like(loop: ThoughtLoop | None, other: ThoughtLoop) -> bool:
    """Whether two loops are of one kind, width and settings."""
    return loop is not None and type(loop) is type(other) and (loop.width, loop.config) == (other.width, other.config)


def fits(loop: ThoughtLoop, other: ThoughtLoop) -> bool:
    """Whether two loops are of one kind, with weights of the same names and shapes."""
    shapes = [{name: weight.shape for name, weight in each.state_dict().items()} for each in (loop, other)]
    return type(loop) is type(other) and shapes[0] == shapes[1]


def flat_ids(*parts: Iterable[Sequence[int]]) -> Tensor:
    """Token ids of rows, one after the other."""
    return torch.tensor(list(chain.from_iterable(chain.from_iterable(parts))), dtype=torch.long)


def position_totals(*packings: Packing) -> dict[str, Tensor]:
    """Tokens that are read, and the slots of the rectangles in which attention lays them out."""
    return {
        "positions": torch.tensor(float(sum(map(len, packings)))),
        "slots": torch.tensor(float(sum(packing.slots for packing in packings))),
    }
