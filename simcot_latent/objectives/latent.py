"""mode=latent: thoughts in place of written steps, each decoded into its step by an auxiliary decoder (SIM-CoT).

L = answer_weight * L_ans + step_weight * L_step (https://arxiv.org/abs/2509.20317, section 4): L_ans is the
cross-entropy of what follows `<|eot|>`, L_step the decoder's over all steps, reaching the model through the thoughts.

Shapes: B rows, P tokens of all questions with `<|bot|>`, A of all texts from `<|eot|>` on, K states that the thoughts
come to, G step groups of C of them, N groups that are taught something, L tokens of all steps that the decoder reads, M
labels, D width.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from einops import rearrange
from torch import Tensor

from simcot_latent.config import DecoderConfig, LatentConfig, LossConfig, RunConfig
from simcot_latent.data.format import Example, TaggedIds, align_steps, concatenate, join, lines, untagged
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.errors import UserError
from simcot_latent.model.gpt import GPT
from simcot_latent.model.linear import gathered_gradients
from simcot_latent.model.losses import Labelled, Targets, at_least_tiny, cross_entropy, share
from simcot_latent.model.packing import Packing, take
from simcot_latent.model.step_decoder import PackedSteps, StepDecoder
from simcot_latent.model.thoughts import ThoughtFormat, go_on, pack_texts, passes, think
from simcot_latent.objectives.base import Objective, WrittenBatch, flat_ids, position_totals, target_totals
from simcot_latent.profiling import part


@dataclass
class LatentObjectiveConfig:
    """Config sections of mode=latent."""

    latent: LatentConfig = field(default_factory=LatentConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    loss: LossConfig = field(default_factory=LossConfig)


@dataclass
class LatentBatch:
    """Questions to think about, what follows the thoughts, and what each thought group must say.

    Attributes:
        question_ids_P, questions: questions, `<|bot|>` of all rows last; how they lie.
        text_ids_A, texts: `<|eot|>` and the text after it, without the last token; how they lie behind a thought.
        targets: the text after `<|eot|>`.
        counts: the states of each row; see `think`.
        feeds_last: see `ThoughtFormat`.
        row_N: which of the B * G groups each taught group is.
        steps: what these are taught.
        step_group_M: the group (0 to G - 1) of each of its labels.
        is_step_M: whether each is of a step, not of the answer that a group without a step is taught.
        totals: see `losses`.
    """

    question_ids_P: Tensor
    questions: Packing
    text_ids_A: Tensor
    texts: Packing
    targets: Targets
    counts: tuple[int, ...]
    feeds_last: bool
    row_N: Tensor
    steps: PackedSteps
    step_group_M: Tensor
    is_step_M: Tensor
    totals: dict[str, Tensor]


class LatentObjective(Objective):
    """Latent thoughts with step supervision."""

    Config = LatentObjectiveConfig
    step_decoder: StepDecoder
    config: LatentObjectiveConfig

    def __init__(self, model: GPT, tokenizer: Tokenizer, run: RunConfig, config: LatentObjectiveConfig) -> None:
        super().__init__(model, tokenizer, run, config)
        if run.rationale != "equations":
            raise UserError(f"rationale={run.rationale}: must be equations in mode=latent, whose steps become thoughts")
        self.step_decoder = StepDecoder.from_base(model, config.decoder.n_layer, config.decoder.init)  # type: ignore[arg-type]
        latent = config.latent
        self.newline = untagged(tokenizer.encode("\n"))
        # How many steps thoughts replace in each stage, and at what share of training it ends.
        self.stage_groups = [0, *(steps for steps, _ in latent.schedule), latent.groups]
        self.stage_ends = list(accumulate([latent.warmup, *(share for _, share in latent.schedule)]))

    def thoughts_at(self, progress: float) -> ThoughtFormat:
        groups = self.stage_groups[bisect_right(self.stage_ends, progress + 1e-9)]  # shares are sums of decimals
        c, feeds_last = self.config.latent.latents_per_step, self.config.latent.feeds_last
        n_latents = max(0, groups * c - (not feeds_last))
        return ThoughtFormat(thinks=True, n_latents=n_latents, latents_per_step=c, feeds_last=feeds_last)

    def begin_stage(self, before: ThoughtFormat, thoughts: ThoughtFormat) -> None:
        if self.config.decoder.init == "base" and before.groups == 0:
            # Until now the decoder was idle: start it from what the warm-up has taught the base. Once, since no later
            # stage is without thoughts.
            self.step_decoder.copy_base(self.model)

    @property
    def resets_optimizer(self) -> bool:
        return self.config.latent.reset_optimizer

    @property
    def extra_length(self) -> int:
        return self.config.latent.n_latents + 1

    def collate(
        self, examples: Sequence[Example], thoughts: ThoughtFormat, groups_of_rows: Sequence[int] | None = None
    ) -> WrittenBatch | LatentBatch:
        """See `Objective.collate`.

        Args:
            groups_of_rows: how many steps thoughts replace in each row, where rows are of different stages (as in
                Coconut's published code). None: as many as `thoughts` has in every row.

        Raises:
            UserError: `groups_of_rows` is not a possible number for each row.
        """
        tokenizer = self.tokenizer
        most = self.config.latent.groups
        rows_G = [thoughts.groups] * len(examples) if groups_of_rows is None else list(groups_of_rows)
        if len(rows_G) != len(examples) or not all(0 <= groups <= most for groups in rows_G):
            right = f"one number from 0 to {most} for each of {len(examples)} rows"
            raise UserError(f"groups_of_rows={rows_G}: must be {right}")
        groups = max(rows_G, default=0)
        if groups == 0 and groups_of_rows is None:
            prompts = [[*example.question, tokenizer.eot_id] for example in examples]
            return self.collate_written(prompts, [concatenate([e.rationale, e.answer]) for e in examples])

        B = len(examples)
        silent, bots = [e.question[:-1] for e in examples], [e.question[-1:] for e in examples]
        questions = Packing.of(list(map(len, silent)), [1] * B, tight=True)
        counts = [its_groups * thoughts.latents_per_step for its_groups in rows_G]
        # Steps that no thought has replaced yet follow <|eot|> as text.
        remaining = [
            example.steps[its_groups:] if its_groups < self.config.latent.groups else []
            for example, its_groups in zip(examples, rows_G, strict=True)
        ]
        texts = [
            concatenate([lines(steps, self.newline), example.answer])
            for example, steps in zip(examples, remaining, strict=True)
        ]
        packed_texts = pack_texts(list(map(len, texts)), thoughts.feeds_last, counts)
        targets = self.text_targets(texts)

        taught = [
            (row * groups + group, group, ids)
            for row, (example, its_groups) in enumerate(zip(examples, rows_G, strict=True))
            for group, ids in enumerate(self.group_texts(example, its_groups))
            if ids is not None
        ]
        steps = PackedSteps.of([ids for _, _, ids in taught], tokenizer.end_id, thoughts.latents_per_step)
        group_N = torch.tensor([group for _, group, _ in taught], dtype=torch.long)
        step_group_M = group_N[steps.group_M]
        holds_step = [group < len(examples[row // groups].steps) for row, group, _ in taught]
        is_step_M = torch.tensor(holds_step, dtype=torch.bool)[steps.group_M]
        totals = target_totals(targets) | position_totals(questions, *passes(counts), packed_texts, steps.packing)
        # In this mode the steps are the decoder's to say; those still written are part of the answer loss.
        totals["step_tokens"] = is_step_M.sum(dtype=torch.float32)
        # Batches of an optimizer step add up, so those of rows of different stages are as long as the last stage's.
        G = groups if groups_of_rows is None else most
        totals["group_tokens_G"] = torch.bincount(step_group_M, minlength=G).float()
        totals["group_problems_G"] = torch.bincount(group_N, minlength=G).float()
        return LatentBatch(
            question_ids_P=flat_ids(silent, bots),
            questions=questions,
            text_ids_A=flat_ids([tokenizer.eot_id, *text.ids[:-1]] for text in texts),
            texts=packed_texts,
            targets=targets,
            counts=tuple(counts),
            feeds_last=thoughts.feeds_last,
            row_N=torch.tensor([row for row, _, _ in taught], dtype=torch.long),
            steps=steps,
            step_group_M=step_group_M,
            is_step_M=is_step_M,
            totals=totals,
        )

    def group_texts(self, example: Example, groups: int) -> list[list[int] | None]:
        """The token ids that each of the first `groups` groups must be decoded into, without the end token."""
        latent = self.config.latent
        steps = example.steps if groups == latent.groups else example.steps[:groups]
        answer = TaggedIds(example.answer.ids[:-1], example.answer.in_step[:-1])
        aligned = align_steps(steps, answer, groups, surplus=latent.surplus, missing=latent.missing)
        return [None if group is None else join(group, self.newline).ids for group in aligned]

    def forward(self, batch: WrittenBatch | LatentBatch, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        weights = self.config.loss
        if isinstance(batch, WrittenBatch):
            shares = self.written_shares(batch, totals)
            return shares | {"loss": weights.answer_weight * shares["loss"], "answer_loss": shares["loss"].detach()}

        model, decoder, c = self.model, self.step_decoder, self.config.latent.latents_per_step
        ids = (batch.question_ids_P, batch.text_ids_A, batch.steps.ids_L)
        answer_scale_M = batch.targets.weight_M / at_least_tiny(totals["weights"])
        step_scale_M = label_scale_G(weights.step_reduction, totals)[batch.step_group_M]
        with gathered_gradients(model, decoder):
            questions_PD, texts_AD, steps_LD = model.embedding(torch.cat(ids)).split([len(part) for part in ids])
            with part("think"):
                thoughts = think(
                    model, questions_PD, batch.questions, batch.counts, batch.texts.longest, batch.feeds_last
                )
            with part("go on"):
                hidden_AD = go_on(model, thoughts, texts_AD, batch.texts)
            with part("decode steps"):
                if any(batch.counts):
                    groups_NCD = rearrange(thoughts.latents_BKD, "b (g c) d -> (b g) c d", c=c)
                else:  # rows of the first stage alone, among others
                    groups_NCD = thoughts.latents_BKD.expand(-1, c, -1)
                hidden_MD = decoder(take(groups_NCD, batch.row_N), steps_LD, batch.steps.packing)
            with part("head and loss"):
                found = cross_entropy(
                    Labelled(
                        hidden_AD, model.output_table, batch.targets.label_M, weights.answer_weight * answer_scale_M
                    ),
                    Labelled(hidden_MD, decoder.output_table, batch.steps.label_M, weights.step_weight * step_scale_M),
                    softcap=model.config.logit_softcap,
                )
        answer_nll_M, step_nll_M = found.nll_M.split((len(batch.targets), len(step_scale_M)))
        shares = {
            "loss": found.loss,
            "answer_loss": (answer_nll_M * answer_scale_M).sum(),
            "step_loss": (step_nll_M * step_scale_M).sum(),
        }
        if self.run.track_step_accuracy:
            correct_M = found.correct_M[len(batch.targets) :]
            shares["step_accuracy"] = share((correct_M & batch.is_step_M).float(), totals["step_tokens"])
        return shares


def label_scale_G(reduction: str, totals: dict[str, Tensor]) -> Tensor:
    """What each label of group g counts in L_step, (G,), so that L_step is the sum over all labels.

    `token`: 1 / all labels. `coconut`: 1 / (G * problems with a label in g). `codi`: 1 / (groups with labels * labels
    in g). The latter two are the two flavours of the published code (https://arxiv.org/abs/2509.20317).
    """
    tokens_G, problems_G = totals["group_tokens_G"], totals["group_problems_G"]
    if reduction == "coconut":
        return 1 / (len(problems_G) * problems_G.clamp(min=1))
    if reduction == "codi":
        return 1 / ((tokens_G > 0).sum().clamp(min=1) * tokens_G.clamp(min=1))
    return 1 / tokens_G.sum().clamp(min=1).expand(len(tokens_G))
