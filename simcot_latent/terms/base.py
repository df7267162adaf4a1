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
from simcot_latent.data.batch import Seeds
from simcot_latent.data.format import Example, TaggedIds
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.loops.base import ThoughtLoop, Thoughts
from simcot_latent.loops.given import Given
from simcot_latent.model.gpt import GPT
from simcot_latent.model.losses import Labelled, Targets
from simcot_latent.model.packing import Packing
from simcot_latent.model.taps import SeveralTaps, Taps


@dataclass(frozen=True)
class Rows:
    """What a batch is made of.

    Attributes:
        examples: the problems, one per row.
        stages: how each is put to the model.
        counts: the states of each row.
        texts: what is written after the thoughts of each.
        solutions: the whole written solution of each, which the written pass reads, if a term needs one.
        mixed: whether rows of one optimizer step may be of different stages.
        seeds: of whatever is drawn for the batch; None: nothing is, as in validation.
        given: the thoughts, of a loop that is given them in training.
    """

    examples: Sequence[Example]
    stages: Sequence[Stage]
    counts: Sequence[int]
    texts: Sequence[TaggedIds]
    solutions: Sequence[TaggedIds] = ()
    mixed: bool = False
    seeds: Seeds | None = None
    given: Given | None = None

    def in_text(self, row: int, token: int) -> int:
        """Which of the A tokens of all texts predicts a token of a row's text; it is the one before it."""
        return sum(len(text) for text in self.texts[:row]) + token

    def in_written(self, row: int, token: int) -> int:
        """The same of the tokens of the written pass, where prompts come first."""
        silent = sum(len(example.question) - 2 for example in self.examples)
        return silent + sum(len(solution) for solution in self.solutions[:row]) + token

    def number_in(self, texts: Sequence[TaggedIds], row: int) -> int:
        """Which token of a row's text the number of the answer begins in."""
        answer = self.examples[row].answer
        return len(texts[row]) - len(answer) + self.examples[row].number_at


@dataclass
class Collated:
    """A term's part of a batch.

    Attributes:
        batch: a dataclass of CPU tensors; None: the term needs none.
        totals: what its shares are divided by, once summed over the whole optimizer step.
        packings: the passes that it adds, for counting tokens.
        weights: the weight of those of its labels that the answer loss averages its own together with; their share of
            that mean is the term's.
    """

    batch: Any = None
    totals: dict[str, Tensor] = field(default_factory=dict)
    packings: Sequence[Packing] = ()
    weights: Tensor | None = None


@dataclass(frozen=True)
class Wanted:
    """What a term wants to see of a pass; see `Taps`.

    Attributes:
        token_N: which tokens: of the text's pass (see `Rows.in_text`), or of the written one (`Rows.in_written`).
    """

    token_N: Tensor
    layers: Sequence[int] | None = None
    hidden: bool = False
    queries: bool = False
    keys: bool = False
    values: bool = False
    detach: bool = False

    def taps(self, before: int = 0) -> Taps:
        """Taps for a pass with so many tokens before those that are counted."""
        return Taps(
            self.layers,
            self.token_N + before,
            hidden=self.hidden,
            queries=self.queries,
            keys=self.keys,
            values=self.values,
            detach=self.detach,
        )


@dataclass
class Trace:
    """What the passes over a batch show to a term.

    Attributes:
        loop: what came to them.
        thoughts: of all rows; `thoughts.latents` is (B, K, D), zeros beyond those of a row that has fewer.
        counts: the states of each row.
        hidden_AD: the hidden states that predict the text.
        text_taps: what the term wanted of the pass over the text.
        written_MD: the hidden states that predict the written solutions; None without a written pass.
        written_targets: these solutions.
        written_taps: what the term wanted of the written pass.
    """

    loop: ThoughtLoop
    thoughts: Thoughts
    counts: Sequence[int]
    hidden_AD: Tensor
    text_taps: Taps | None = None
    written_MD: Tensor | None = None
    written_targets: Targets | None = None
    written_taps: Taps | None = None


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

    needs_written: bool = False
    """Whether it needs a pass over question and written solution beside the one with thoughts."""

    needs_hidden: bool = False
    """Whether it needs the hidden states at `<|bot|>` and at all thoughts."""

    needs_keys: bool = False
    """Whether it needs the keys and values of the thoughts, see `Thoughts.keys_LBKGE`."""

    needs_predictions: bool = False
    """Whether it needs a loop that predicts its thoughts, which it trains; see `loops.given`."""

    is_read: ClassVar[bool] = False
    """Whether steps can be read out of the thoughts that it trains, by a reader of `probing.readers`."""

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

    def wants_of_text(self, batch: Any) -> Wanted | None:
        """What it wants to see of the pass over the text."""
        return None

    def wants_of_written(self, batch: Any) -> Wanted | None:
        """What it wants to see of the written pass."""
        return None

    def reads(self, batch: Any) -> Tensor | None:
        """Token ids (L,) whose embeddings the term needs."""
        return None

    def loss(self, trace: Trace, batch: Any, read_LD: Tensor | None, totals: dict[str, Tensor]) -> TermLoss:
        """The term's share.

        Args:
            batch: of `collate`, on the model's device.
            read_LD: embeddings of `reads`.
            totals: of the whole optimizer step: those of all terms, `problems` (the rows that have thoughts) and
                `rows` (all of a batch with thoughts).
        """
        raise NotImplementedError

    def begin_stage(self, before: Stage, stage: Stage) -> None:
        """Called before the first step of each stage but the first."""


def tap(wanted: dict[str, Wanted | None], before: int = 0) -> dict[str, Taps]:
    """The taps of one pass, by term."""
    return {name: each.taps(before) for name, each in wanted.items() if each is not None}


def together(taps: dict[str, Taps]) -> Taps | None:
    """The taps of all terms, to be handed to a pass."""
    return SeveralTaps(*taps.values()) if taps else None
