"""mode=latent: thoughts in place of written steps, each decoded into its step by an auxiliary decoder (SIM-CoT).

L = answer_weight * L_ans + step_weight * L_step (https://arxiv.org/abs/2509.20317, section 4): L_ans is the
cross-entropy of what follows `<|eot|>`, L_step the decoder's over all steps, reaching the model through the thoughts.

Shapes: B rows, T question tokens with `<|bot|>`, A tokens from `<|eot|>` on, K thoughts, G step groups of C thoughts,
N groups that are taught something, L tokens of a step, M labels, D width.
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
from simcot_latent.data.batch import pad_right
from simcot_latent.data.format import Example, TaggedIds, align_steps, concatenate, join, lines, untagged
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.errors import UserError
from simcot_latent.losses import Targets, cross_entropy, share
from simcot_latent.model.gpt import GPT
from simcot_latent.model.step_decoder import StepDecoder
from simcot_latent.model.thoughts import ThoughtFormat, go_on, think
from simcot_latent.objectives.base import Objective, WrittenBatch, position_totals, target_totals


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
        question_ids_BT, question_mask_BT: questions with `<|bot|>`, padded on the right.
        answer_ids_BA, answer_mask_BA: `<|eot|>` and the text after it, without the last token.
        targets: labels over (B, A).
        n_latents: K, thoughts of every row.
        row_N: which of the B * G groups each taught group is.
        step_ids_NL: each taught group's tokens, end token included.
        step_targets: labels over (N, L).
        step_group_M: the group (0 to G - 1) of each of those labels.
        totals: see `losses`.
    """

    question_ids_BT: Tensor
    question_mask_BT: Tensor
    answer_ids_BA: Tensor
    answer_mask_BA: Tensor
    targets: Targets
    n_latents: int
    row_N: Tensor
    step_ids_NL: Tensor
    step_targets: Targets
    step_group_M: Tensor
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
        c = self.config.latent.latents_per_step
        return ThoughtFormat(thinks=True, n_latents=groups * c, latents_per_step=c)

    def begin_stage(self, thoughts: ThoughtFormat) -> None:
        first_with_thoughts = next(groups for groups in self.stage_groups if groups)
        if self.config.decoder.init == "base" and thoughts.groups == first_with_thoughts:
            # Until now the decoder was idle: start it from what the warm-up has taught the base.
            self.step_decoder.copy_base(self.model)

    @property
    def resets_optimizer(self) -> bool:
        return self.config.latent.reset_optimizer

    @property
    def extra_length(self) -> int:
        return self.config.latent.n_latents + 1

    def collate(self, examples: Sequence[Example], thoughts: ThoughtFormat) -> WrittenBatch | LatentBatch:
        tokenizer, groups = self.tokenizer, thoughts.groups
        if groups == 0:
            prompts = [[*example.question, tokenizer.eot_id] for example in examples]
            return self.collate_written(prompts, [concatenate([e.rationale, e.answer]) for e in examples])

        question_ids_BT, question_mask_BT = pad_right([example.question for example in examples], tokenizer.pad_id)
        # Steps that no thought has replaced yet follow <|eot|> as text.
        remaining = [example.steps[groups:] if groups < self.config.latent.groups else [] for example in examples]
        texts = [
            concatenate([lines(steps, self.newline), example.answer])
            for example, steps in zip(examples, remaining, strict=True)
        ]
        answer_ids_BA, answer_mask_BA = pad_right(
            [[tokenizer.eot_id, *text.ids[:-1]] for text in texts], tokenizer.pad_id
        )
        targets = Targets.from_rows([(0, text.ids, self.weigh(text), text.in_step) for text in texts], answer_ids_BA)

        taught = [
            (row * groups + group, group, [*ids, tokenizer.end_id])
            for row, example in enumerate(examples)
            for group, ids in enumerate(self.group_texts(example, groups))
            if ids is not None
        ]
        step_ids_NL, step_mask_NL = pad_right([ids for _, _, ids in taught], tokenizer.pad_id)
        step_targets = Targets.from_rows(
            [(0, ids, [1.0] * len(ids), [True] * len(ids)) for _, _, ids in taught], step_ids_NL
        )
        step_group_M = torch.tensor([group for _, group, ids in taught for _ in ids], dtype=torch.long)
        group_N = torch.tensor([group for _, group, _ in taught], dtype=torch.long)
        thought_mask_BK = torch.ones(len(examples), thoughts.n_latents, dtype=torch.bool)
        totals = target_totals(targets) | position_totals(
            question_mask_BT, thought_mask_BK, answer_mask_BA, step_mask_NL
        )
        # In this mode the steps are the decoder's to say; those still written are part of the answer loss.
        totals["step_tokens"] = torch.tensor(float(len(step_group_M)))
        totals["group_tokens_G"] = torch.bincount(step_group_M, minlength=groups).float()
        totals["group_problems_G"] = torch.bincount(group_N, minlength=groups).float()
        return LatentBatch(
            question_ids_BT=question_ids_BT,
            question_mask_BT=question_mask_BT,
            answer_ids_BA=answer_ids_BA,
            answer_mask_BA=answer_mask_BA,
            targets=targets,
            n_latents=thoughts.n_latents,
            row_N=torch.tensor([row for row, _, _ in taught], dtype=torch.long),
            step_ids_NL=step_ids_NL,
            step_targets=step_targets,
            step_group_M=step_group_M,
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

        thoughts = think(self.model, batch.question_ids_BT, batch.question_mask_BT, batch.n_latents)
        hidden_BAD = go_on(self.model, thoughts, batch.answer_ids_BA, batch.answer_mask_BA)
        answer_loss_M, _ = cross_entropy(hidden_BAD, batch.targets, self.model.logits)
        answer_loss = share(answer_loss_M * batch.targets.weight_M, totals["weights"])

        prefix = rearrange(thoughts.latents_BKD, "b (g c) d -> (b g) c d", c=self.config.latent.latents_per_step)
        hidden_NLD = self.step_decoder(prefix[batch.row_N], batch.step_ids_NL)
        step_loss_M, correct_M = cross_entropy(hidden_NLD, batch.step_targets, self.step_decoder.logits)
        step_loss = (step_loss_M * label_scale_G(self.config.loss.step_reduction, totals)[batch.step_group_M]).sum()

        shares = {
            "loss": weights.answer_weight * answer_loss + weights.step_weight * step_loss,
            "answer_loss": answer_loss.detach(),
            "step_loss": step_loss.detach(),
        }
        if self.run.track_step_accuracy:
            shares["step_accuracy"] = share(correct_M.float(), totals["step_tokens"])
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
