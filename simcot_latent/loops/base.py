"""What a thought loop is: a question becomes thoughts, and a state to go on from.

    [q_1 .. q_n, <|bot|>, z_1 .. z_K, <|eot|>, answer ..]

Loops differ in how the thoughts z come about. Training, generation, evals and probing call the same loop; a checkpoint
holds it, with what it has learned.

Rows of a batch may have different numbers of thoughts. Positions keep counting; nothing is sampled.

Shapes: B rows, P tokens of all questions with `<|bot|>`, A of all texts from `<|eot|>` on (see `packing`), K states
that the loop comes to (of the row that has most), D width, R thoughts that are still to be read, L blocks, G key/value
heads, E head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from simcot_latent.config import MethodConfig, NoSettings
from simcot_latent.errors import UserError
from simcot_latent.files import from_plain
from simcot_latent.model.cache import KVCache, StaticCaches
from simcot_latent.model.gpt import GPT
from simcot_latent.model.packing import Packing
from simcot_latent.model.taps import Taps
from simcot_latent.parts import NONE, find, key_of


@dataclass
class Thoughts:
    """What a batch of questions was thought into.

    Attributes:
        latents_BKD: the thoughts z_1 .. z_K; zeros beyond those of a row that has fewer.
        cache: everything read so far: question, `<|bot|>` and the thoughts but `unread_RD`.
        unread_RD: the thoughts that `go_on` feeds together with what follows, which saves a pass; None: none.
        hidden_BKD: the hidden states, after the final norm, at the positions of the thoughts; None: of a loop that does
            not know all of them.
        bot_BD: the same at `<|bot|>`.
        keys_LBKGE, values_LBKGE: those that the text attends to at the thoughts, by block, where they were asked for.
        counts: the thoughts of each row, of a loop that decides on their number itself.
    """

    latents_BKD: Tensor
    cache: KVCache
    unread_RD: Tensor | None = None
    hidden_BKD: Tensor | None = None
    bot_BD: Tensor | None = None
    keys_LBKGE: Tensor | None = None
    values_LBKGE: Tensor | None = None
    counts: tuple[int, ...] | None = None

    @property
    def latents(self) -> Tensor:
        """The thoughts, (B, K, D)."""
        return self.latents_BKD

    @property
    def before_BKD(self) -> Tensor | None:
        """The hidden states before each thought, that at `<|bot|>` first; None where a loop does not know them."""
        if self.bot_BD is None or self.hidden_BKD is None:
            return None
        return torch.cat((self.bot_BD.unsqueeze(1), self.hidden_BKD[:, :-1]), dim=1)


class ThoughtLoop(nn.Module, ABC):
    """How thoughts come about. What it learns are its own parameters.

    A subclass gives `think`; one whose passes are other than the default's says so in the methods below it, by which
    batches are laid out before anything is computed.

    Args:
        width: D, of the model.
        config: an instance of `Config`.
    """

    Config: ClassVar[type] = NoSettings
    """A frozen dataclass of its settings. Those of the command line are the keys of the same name under `latent`;
    `config.json` keeps them."""

    def __init__(self, width: int, config: Any) -> None:
        super().__init__()
        self.width, self.config = width, config

    gives_hidden: ClassVar[bool] = False
    """Whether it knows the hidden states at all of its thoughts when it has thought them."""

    gives_keys: ClassVar[bool] = False
    """Whether it can give the keys and values of its thoughts."""

    gives_predictions: ClassVar[bool] = False
    """Whether it is given its thoughts in training, and predicts them afterwards: a term must train that. See
    `loops.given`."""

    free: ClassVar[tuple[str, ...]] = ()
    """Those of its settings that may be others afterwards than in training; see `with_settings`."""

    @property
    def key(self) -> str:
        """What the table of parts calls it."""
        return key_of("loop", type(self))

    @abstractmethod
    def think(
        self,
        model: GPT,
        questions_PD: Tensor,
        packing: Packing,
        counts: Sequence[int],
        room: int,
        caches: StaticCaches | None = None,
        keys: bool = False,
    ) -> Thoughts:
        """Reads questions and thinks about each.

        Args:
            questions_PD: their embeddings; the last B tokens are the rows' `<|bot|>`, in the order of the rows.
            packing: of `pack_questions`.
            counts: the states of each row, see `states`.
            room: positions to reserve for what a row reads after its thoughts, `<|eot|>` included.
            caches: where to take the cache from; None: a new one.
            keys: whether keys and values of the thoughts are wanted; only of a loop that `gives_keys`.
        """

    def states(self, thoughts: int) -> int:
        """The states that the loop comes to, where the model reads so many thoughts per question."""
        return thoughts

    def positions(self, thoughts: int) -> int:
        """The positions that so many thoughts take, with whatever the loop itself reads before them."""
        return thoughts

    def n_passes(self, thoughts: int) -> int:
        """The passes, one after the other, up to the last thought of a row; that over the question is one of them."""
        return 1 + len(self.passes([self.states(thoughts)]))

    def pack_questions(self, lengths: Sequence[int], counts: Sequence[int], tight: bool = False) -> Packing:
        """How the first pass is laid out.

        Args:
            lengths: tokens of each question before its `<|bot|>`.
            counts: the states of each row.
            tight: see `Packing.of`.
        """
        return Packing.of(lengths, [1] * len(lengths), tight=tight)

    def passes(self, counts: Sequence[int]) -> list[Packing]:
        """How the passes between the question's and the text's are laid out, for counting tokens."""
        return []

    def unread(self, counts: Sequence[int]) -> list[int]:
        """How many thoughts of each row the pass over the text still feeds."""
        return [0] * len(counts)

    def pack_texts(self, lengths: Sequence[int], counts: Sequence[int]) -> Packing:
        """How what follows the thoughts is laid out: what is unread of all rows first, then the texts."""
        unread = self.unread(counts)
        return Packing.of(unread, lengths) if any(unread) else Packing.of(lengths)


def make_loop(key: str, width: int, method: MethodConfig) -> ThoughtLoop | None:
    """The loop of a method, new; None where it has no thoughts."""
    if key == NONE:
        return None
    cls = find("loop", key)
    return cls(width, method.settings(cls.Config))


def is_like(loop: ThoughtLoop | None, other: ThoughtLoop) -> bool:
    """Whether two loops are of one kind, width and settings."""
    return loop is not None and type(loop) is type(other) and (loop.width, loop.config) == (other.width, other.config)


def fits(loop: ThoughtLoop, other: ThoughtLoop) -> bool:
    """Whether two loops are of one kind, with weights of the same names and shapes."""
    shapes = [{name: weight.shape for name, weight in each.state_dict().items()} for each in (loop, other)]
    return type(loop) is type(other) and shapes[0] == shapes[1]


def with_settings(loop: ThoughtLoop | None, values: Mapping[str, Any]) -> ThoughtLoop | None:
    """A trained loop, some of whose settings are others now.

    Raises:
        UserError: there is no loop, or these are none of its `free` settings, or of another type, or impossible.
    """
    for key in values:
        if loop is None or key not in loop.free:
            name, free = NONE if loop is None else loop.key, () if loop is None else loop.free
            right = f"one of {', '.join(free)}" if free else "left out"
            raise UserError(f"loop_settings.{key}: may not change after training with loop={name}; must be {right}")
    if loop is not None and values:
        loop.config = from_plain(loop.Config, asdict(loop.config) | dict(values), "loop_settings")
    return loop


def go_on(model: GPT, thoughts: Thoughts, texts_AD: Tensor, packing: Packing, taps: Taps | None = None) -> Tensor:
    """Feeds the thoughts that are unread and what follows; returns the hidden states there (A, D).

    Args:
        texts_AD: embeddings of the tokens from `<|eot|>` on.
        packing: of `ThoughtLoop.pack_texts`.
        taps: to be filled in this pass, in which the A tokens of the texts are the last.
    """
    x = texts_AD if thoughts.unread_RD is None else torch.cat((thoughts.unread_RD, texts_AD))
    return model.transformer(x, packing, thoughts.cache, read_out=len(texts_AD), taps=taps)


def by_row(x_ND: Tensor, counts: Sequence[int]) -> Tensor:
    """What stands at the thoughts of all rows, row by row, as (B, K, D) with zeros beyond those of a row."""
    B, K = len(counts), max(counts)
    if min(counts) == K:
        return x_ND.unflatten(0, (B, K))
    index = [row * K + k for row, count in enumerate(counts) for k in range(count)]
    index_N = torch.tensor(index, dtype=torch.long, device=x_ND.device)
    return x_ND.new_zeros(B * K, *x_ND.shape[1:]).index_copy(0, index_N, x_ND).unflatten(0, (B, K))


def taps_at_last(packing: Packing, n: int) -> Taps:
    """Taps for the keys and values of the last tokens of a pass."""
    return Taps(tokens=range(len(packing) - n, len(packing)), hidden=False, keys=True, values=True)


def keys_and_values(taps: Taps | None, counts: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
    """Keys and values (L, B, K, G, E) of thoughts, from the taps of a pass that read those of all rows; None: none."""
    if taps is None:
        return None, None
    keys, values = (torch.stack([by_row(x_NGE, counts) for x_NGE in x]) for x in (taps.keys_LNGE, taps.values_LNGE))
    return keys, values
