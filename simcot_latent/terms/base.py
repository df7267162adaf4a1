"""What a term is: a named part of the loss, L = sum over terms of weight * L_term.

Every number is a *share of an optimizer step*, see `model.losses`.

Shapes: B rows, A tokens of all texts from `<|eot|>` on, K states that the thoughts come to, L tokens that a term reads,
M labels, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from simcot_latent.config import MethodConfig, NoSettings
from simcot_latent.curricula.base import Stage
from simcot_latent.data.format import Example
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.loops.base import Thoughts
from simcot_latent.model.gpt import GPT
from simcot_latent.model.losses import Labelled
from simcot_latent.model.packing import Packing


@dataclass(frozen=True)
class Rows:
    """What a batch is made of.

    Attributes:
        examples: the problems, one per row.
        stages: how each is put to the model.
        counts: the states of each row.
        mixed: whether rows of one optimizer step may be of different stages.
    """

    examples: Sequence[Example]
    stages: Sequence[Stage]
    counts: Sequence[int]
    mixed: bool = False


@dataclass
class Collated:
    """A term's part of a batch.

    Attributes:
        batch: a dataclass of CPU tensors; None: the term needs none.
        totals: what its shares are divided by, once summed over the whole optimizer step.
        packings: the passes that it adds, for counting tokens.
    """

    batch: Any = None
    totals: dict[str, Tensor] = field(default_factory=dict)
    packings: Sequence[Packing] = ()


@dataclass
class Trace:
    """What a pass over a batch shows to the terms.

    Attributes:
        thoughts: of all rows; `thoughts.latents` is (B, K, D), zeros beyond those of a row that has fewer.
        counts: the states of each row.
        hidden_AD: the hidden states that predict the text.
    """

    thoughts: Thoughts
    counts: Sequence[int]
    hidden_AD: Tensor


@dataclass
class TermLoss:
    """What a term comes to in a micro-batch: labels, a number, or both.

    Attributes:
        labelled: labels whose `scale_M` makes the sum of scaled cross-entropies the term's share. All terms' labels go
            through one fused cross-entropy.
        value: a share that is worked out already, a scalar.
        metrics: from the cross-entropy (M,) of each label and whether it is the most likely token (M,) to further
            shares, by the name that they are logged under.
    """

    labelled: Labelled | None = None
    value: Tensor | None = None
    metrics: Callable[[Tensor, Tensor], dict[str, Tensor]] | None = None


class Term:
    """A part of the loss on what was thought. It is not asked about batches in which nothing is thought.

    Args:
        model: the model that is trained.
        tokenizer: its tokenizer.
        method: the settings of all parts.
    """

    Config: ClassVar[type] = NoSettings
    """A dataclass of its settings. Those of the command line are the keys of the same name under `loss`."""

    name: str = ""
    """Its loss is logged as `<name>_loss`. Empty: its key in the table of parts."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, method: MethodConfig) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.config: Any = method.settings(self.Config)
        self.modules: dict[str, nn.Module] = {}
        """What it learns besides the model: each is trained, and kept as `<name>.safetensors` of a checkpoint."""

    @property
    def weight(self) -> float:
        """What the loss counts; a term of weight 0 is not computed."""
        return 1.0

    def collate(self, rows: Rows) -> Collated:
        """Its part of a batch."""
        return Collated()

    def reads(self, batch: Any) -> Tensor | None:
        """Token ids (L,) whose embeddings the term needs."""
        return None

    def loss(self, trace: Trace, batch: Any, read_LD: Tensor | None, totals: dict[str, Tensor]) -> TermLoss:
        """The term's share.

        Args:
            batch: of `collate`, on the model's device.
            read_LD: embeddings of `reads`.
            totals: of the whole optimizer step: those of all terms, and `problems`, the rows that have thoughts.
        """
        raise NotImplementedError

    def begin_stage(self, before: Stage, stage: Stage) -> None:
        """Called before the first step of each stage but the first."""
