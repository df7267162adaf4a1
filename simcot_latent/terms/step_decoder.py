"""steps=decoder: the auxiliary decoder of SIM-CoT, which must turn thoughts back into written steps, and its loss.

The decoder reads the thoughts of one step group as a prefix of input vectors and must write the group's calculator
step. It is trained with the model, so that its loss L_step shapes the thoughts; inference does without it; probing
loads it again. Source: https://arxiv.org/abs/2509.20317, section 4.

Shapes: B rows, K states, G step groups, N of the B * G groups that are supervised, C thoughts per group, L input tokens
of all these (see `packing`), M = N + L tokens to predict, D width, V vocabulary, R groups that still write.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from simcot_latent.config import MethodConfig
from simcot_latent.curricula.base import Stage
from simcot_latent.data.format import Example, TaggedIds, join, newline
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.errors import UserError
from simcot_latent.model.cache import KVCache
from simcot_latent.model.gpt import GPT, GPTConfig, Transformer, output_logits
from simcot_latent.model.linear import Embedding
from simcot_latent.model.lora import plain_weights
from simcot_latent.model.losses import CrossEntropy, Labelled, cross_entropy, share
from simcot_latent.model.packing import Packing, take
from simcot_latent.profiling import part
from simcot_latent.terms.base import Collated, Rows, Term, TermLoss, Trace
from simcot_latent.terms.steps import StepGroups


@dataclass(frozen=True)
class PackedSteps:
    """What N groups are to say, as the decoder reads and predicts it.

    Attributes:
        ids_L: the tokens of each group's step, group by group; the end token is only predicted.
        packing: how they lie behind the groups' thoughts.
        label_M: what is to be predicted: the first token of every group, then the others, group by group.
        group_M: the group of each label.
    """

    ids_L: Tensor
    packing: Packing
    label_M: Tensor
    group_M: Tensor

    @classmethod
    def of(cls, groups: Sequence[Sequence[int]], end_id: int, latents_per_step: int) -> PackedSteps:
        """From the token ids of each group's step, without end token."""
        first = [[*ids, end_id][0] for ids in groups]
        others = [[*ids, end_id][1:] for ids in groups]
        lengths = torch.tensor(list(map(len, groups)), dtype=torch.long)
        group_N = torch.arange(len(groups))
        return cls(
            ids_L=torch.tensor(list(chain.from_iterable(groups)), dtype=torch.long),
            # Every group's first thought, every group's second, .., then the tokens.
            packing=Packing.of(*[[1] * len(groups)] * latents_per_step, lengths.tolist(), tight=True),
            label_M=torch.tensor([*first, *chain.from_iterable(others)], dtype=torch.long),
            group_M=torch.cat((group_N, group_N.repeat_interleave(lengths))),
        )


class StepDecoder(nn.Module):
    """A small transformer over the base model's token embedding.

    Args:
        config: the decoder's own transformer; its width is the base's. With `tie_head` the embedding serves as output
            head too; without, the decoder has a head of its own, as in the published code, which may know fewer tokens.
        embedding: the base model's token embedding, shared: the step loss trains it too.
    """

    def __init__(self, config: GPTConfig, embedding: Embedding) -> None:
        super().__init__()
        self.config = config
        self.embedding = embedding
        self.transformer = Transformer(config)
        self.head = None if config.tie_head else nn.Linear(config.n_embd, config.vocab_size, bias=False)

    @classmethod
    def from_base(cls, base: GPT, n_layer: int | None, init: Literal["random", "base"]) -> StepDecoder:
        """A decoder of `n_layer` blocks shaped like the base's (None: as many as it has), with random weights or the
        base's first blocks.
        """
        n_layer = base.config.n_layer if n_layer is None else n_layer
        decoder = cls(replace(base.config, n_layer=n_layer, tie_head=True), base.embedding)
        if init == "base":
            if n_layer > base.config.n_layer:
                raise UserError(
                    f"decoder.n_layer={n_layer}: must be at most model.n_layer={base.config.n_layer} with "
                    "decoder.init=base, which copies the base's first blocks"
                )
            decoder.copy_base(base)
        return decoder

    def copy_base(self, base: GPT) -> None:
        """Takes over the base's positions, norm and first blocks, as they compute: LoRA merged."""
        source = plain_weights(base.transformer)
        self.transformer.load_state_dict({name: source[name] for name in self.transformer.state_dict()})

    @classmethod
    def from_checkpoint(cls, path: str | Path, device: str = "cpu") -> StepDecoder:
        """The decoder of a checkpoint folder, ready to `decode` its thoughts.

        Raises:
            UserError: the folder is no checkpoint, or holds no decoder.
        """
        from simcot_latent.checkpoint import load_checkpoint, require_decoder

        return require_decoder(load_checkpoint(path, device=device))

    def forward(self, thoughts_NCD: Tensor, steps_LD: Tensor, packing: Packing) -> Tensor:
        """Teacher forcing: the hidden states (M, D) from which the labels of `PackedSteps` are to be predicted.

        Args:
            thoughts_NCD: the thoughts of each group.
            steps_LD: embeddings of the groups' tokens.
            packing: of `PackedSteps`.
        """
        N = len(thoughts_NCD)
        x = torch.cat((rearrange(thoughts_NCD, "n c d -> (c n) d"), steps_LD))
        return self.transformer(x, packing, read_out=N + len(steps_LD))

    @property
    def output_table(self) -> Tensor:
        """The weight (V, D) of the output head."""
        return self.embedding.table if self.head is None else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits (..., V) of hidden states (..., D)."""
        return output_logits(hidden, self.output_table, self.config.logit_softcap)

    @torch.no_grad()
    def score(self, thoughts_NCD: Tensor, steps: PackedSteps) -> CrossEntropy:
        """How likely every label of `steps` is after the ones before it, were these the groups' thoughts."""
        hidden_MD = self(thoughts_NCD, self.embedding(steps.ids_L), steps.packing)
        one_M = torch.ones_like(steps.label_M, dtype=torch.float32)
        labelled = Labelled(hidden_MD, self.output_table, steps.label_M, one_M)
        return cross_entropy(labelled, softcap=self.config.logit_softcap)

    @torch.no_grad()
    def decode(self, thoughts_NCD: Tensor, end_id: int, max_tokens: int = 64) -> tuple[list[list[int]], list[float]]:
        """Free-running greedy decoding of every group at once.

        Returns:
            For each group the token ids before the end token (or the first `max_tokens`, where none comes), and the
            probability that the decoder gives to the whole of what it wrote, end token included.
        """
        N, C, _ = thoughts_NCD.shape
        max_tokens = min(max_tokens, self.config.context_length - C)
        cache = KVCache(capacity=C + max_tokens)
        hidden_RD = self.transformer(thoughts_NCD, cache=cache)[:, -1]
        written: list[list[int]] = [[] for _ in range(N)]
        log_prob_N = torch.zeros(N, device=thoughts_NCD.device)
        going_R = torch.arange(N, device=thoughts_NCD.device)  # groups that still write; the cache holds theirs alone
        for _ in range(max_tokens):
            best_R, ids_R = self.logits(hidden_RD).log_softmax(-1).max(-1)
            log_prob_N[going_R] += best_R
            kept_R = (ids_R != end_id).nonzero().squeeze(1)
            if len(kept_R) < len(going_R):
                going_R, ids_R = going_R[kept_R], ids_R[kept_R]
                cache.keep(kept_R)
            if len(going_R) == 0:
                break
            for group, token in zip(going_R.tolist(), ids_R.tolist(), strict=True):
                written[group].append(token)
            one_each = Packing.grid(len(going_R), 1, thoughts_NCD.device)
            hidden_RD = self.transformer(self.embedding(ids_R), one_each, cache)
        return written, log_prob_N.exp().tolist()


@dataclass
class StepBatch:
    """What the groups of a batch are to say.

    Attributes:
        row_N: which of the B * G groups each supervised group is.
        steps: what these are to say.
        group_M: the group (0 to G - 1) of each of its labels.
        is_step_M: whether each is of a step, not of the answer that a group without a step is to say.
    """

    row_N: Tensor
    steps: PackedSteps
    group_M: Tensor
    is_step_M: Tensor


@dataclass(frozen=True)
class StepSettings:
    """The settings that the step loss has from `latent`, `decoder` and `loss`; see there."""

    n_layer: int | None = 1
    init: str = "random"
    step_weight: float = 1.0
    step_reduction: str = "token"
    latents_per_step: int = 1
    surplus: str = "merge"
    missing: str = "mask"


class StepDecoderTerm(Term):
    """L_step, the decoder's cross-entropy over the tokens of all steps."""

    Config = StepSettings
    config: StepSettings
    name = "step"
    is_read = True

    def __init__(self, model: GPT, tokenizer: Tokenizer, method: MethodConfig) -> None:
        super().__init__(model, tokenizer, method)
        config = self.config
        self.decoder = StepDecoder.from_base(model, config.n_layer, config.init)  # type: ignore[arg-type]
        self.modules = {"step_decoder": self.decoder}
        self.groups = StepGroups(config.latents_per_step, config.surplus, config.missing)
        self.most_groups = method.latent.groups
        self.newline = newline(tokenizer)

    @property
    def weight(self) -> float:
        return self.config.step_weight

    def collate(self, rows: Rows) -> Collated:
        c, examples = self.groups.latents_per_step, rows.examples
        groups = self.groups.count(max(rows.counts))
        taught = [
            (row * groups + group, group, ids)
            for row, (example, stage, count) in enumerate(zip(examples, rows.stages, rows.counts, strict=True))
            for group, ids in enumerate(self.group_ids(example, stage, self.groups.count(count)))
            if ids is not None
        ]
        steps = PackedSteps.of([ids for _, _, ids in taught], self.tokenizer.end_id, c)
        group_N = torch.tensor([group for _, group, _ in taught], dtype=torch.long)
        group_M = group_N[steps.group_M]
        holds_step = [group < len(examples[row // groups].steps) for row, group, _ in taught]
        is_step_M = torch.tensor(holds_step, dtype=torch.bool)[steps.group_M]
        # Batches of an optimizer step add up, so those of rows of different stages are as long as the last stage's.
        G = self.most_groups if rows.mixed else groups
        totals = {
            # Where thoughts stand for steps, the steps are the decoder's to say; those still written are the answer's.
            "step_tokens": is_step_M.sum(dtype=torch.float32),
            "group_tokens_G": torch.bincount(group_M, minlength=G).float(),
            "group_problems_G": torch.bincount(group_N, minlength=G).float(),
        }
        row_N = torch.tensor([row for row, _, _ in taught], dtype=torch.long)
        return Collated(StepBatch(row_N, steps, group_M, is_step_M), totals, [steps.packing])

    def group_ids(self, example: Example, stage: Stage, groups: int) -> list[list[int] | None]:
        """The token ids that each group is to say, without the end token; None: it is not supervised."""
        answer = TaggedIds(example.answer.ids[:-1], example.answer.in_step[:-1])
        targets = self.groups.targets(example.steps, answer, groups, stage)
        return [None if group is None else join(group, self.newline).ids for group in targets]

    def reads(self, batch: StepBatch) -> Tensor:
        return batch.steps.ids_L

    def loss(self, trace: Trace, batch: StepBatch, read_LD: Tensor | None, totals: dict[str, Tensor]) -> TermLoss:
        assert read_LD is not None
        with part("decode steps"):
            groups_NCD = rearrange(trace.thoughts.latents_BKD, "b (g c) d -> (b g) c d", c=self.groups.latents_per_step)
            hidden_MD = self.decoder(take(groups_NCD, batch.row_N), read_LD, batch.steps.packing)
        scale_M = label_scale_G(self.config.step_reduction, totals)[batch.group_M]

        def metrics(nll_M: Tensor, correct_M: Tensor) -> dict[str, Tensor]:
            return {"step_accuracy": share((correct_M & batch.is_step_M).float(), totals["step_tokens"])}

        return TermLoss(Labelled(hidden_MD, self.decoder.output_table, batch.steps.label_M, scale_M), metrics=metrics)

    def begin_stage(self, before: Stage, stage: Stage) -> None:
        if self.config.init == "base" and before.thoughts == 0:
            # Until now the decoder was idle: start it from what the warm-up has taught the base. Once, since no later
            # stage is without thoughts.
            self.decoder.copy_base(self.model)


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
