"""Weights that others have trained, as a checkpoint of ours: `init_from=` of training, `sl.load_pretrained`.

What a source is, its name tells: a folder of ours, a folder in Hugging Face's layout, a nanochat checkpoint folder, a
GGUF file, or a hub id. Each kind of file is read in one place into the same thing (`Published`); `families.py` knows
what the names in it mean, `published_tokenizers.py` what its tokenizer is.

Shapes: V rows of an embedding table, D width.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from simcot_latent.checkpoint import Checkpoint, load_checkpoint
from simcot_latent.checkpoint_folders import is_checkpoint, is_ours
from simcot_latent.data.tokenizer import BOT, END, EOT, PAD, VOCABULARY_MULTIPLE, Tokenizer
from simcot_latent.errors import UserError
from simcot_latent.interop.conversion import build
from simcot_latent.interop.published import Published, read_published
from simcot_latent.model.gpt import GPT
from simcot_latent.weights import require_finite

OURS = {"bot": BOT, "eot": EOT, "end": END, "pad": PAD}


def load_pretrained(
    source: str | Path, device: str | torch.device = "cpu", key: str = "source", verify: bool = True
) -> Checkpoint:
    """A published model, exactly as published, and its tokenizer.

    Args:
        source: a folder in Hugging Face's layout, a hub id (`owner/name`), a GGUF file, a nanochat checkpoint folder,
            or a checkpoint of ours (a folder, an `out_dir`, or what `push_to_hub` made of it).
        key: what `source` came from, for errors.
        verify: of a checkpoint of ours, see `load_checkpoint`.

    Returns:
        A checkpoint that writes (`answers.thinks` is False); of our own checkpoints, what they are.

    Raises:
        UserError: there is nothing, it is of a family that we do not know, or a file of it is missing or broken,
            or holds weights that are not finite.
    """
    if is_checkpoint(source):
        return load_checkpoint(source, device, key, verify)
    published = read_published(source, key)
    if is_ours(published.config):  # on the hub, where the rest of it lies in a folder of its own
        return Checkpoint.from_pretrained(source, device, verify=verify)
    model = build(published)
    require_finite(model.state_dict(), published.path)
    tokenizer = fitting_tokenizer(published, model.config.vocab_size)
    return Checkpoint(
        model=model.to(device).eval(),
        step_decoder=None,
        tokenizer=tokenizer,
        config={"max_new_tokens": 256},
        path=published.path,
    )


def fitting_tokenizer(published: Published, vocab_size: int) -> Tokenizer:
    """The source's tokenizer, with an id for every row of the embedding table.

    Raises:
        UserError: it has more ids than the table has rows.
    """
    tokenizer = published.tokenizer()
    if tokenizer.n_vocab > vocab_size:
        raise UserError(
            f"{published.path}: its tokenizer has {tokenizer.n_vocab} tokens, its embedding table {vocab_size} rows; "
            "they are not of one model"
        )
    return tokenizer.filled_up_to(vocab_size)


def with_latent_tokens(checkpoint: Checkpoint, init: str = "mean") -> Checkpoint:
    """A checkpoint whose tokenizer can say where thoughts begin and end, and its model with rows for what was added.

    Args:
        init: what new rows are: the `mean` of the old ones, or the row of a token given by its text (published Coconut
            code takes `<<`).

    Raises:
        UserError: there is no such token.
    """
    tokenizer = checkpoint.tokenizer.with_roles(OURS, VOCABULARY_MULTIPLE)
    if tokenizer.n_vocab == checkpoint.tokenizer.n_vocab:
        return replace(checkpoint, tokenizer=tokenizer)
    row = None
    if init != "mean":
        row = checkpoint.tokenizer.token_id(init)
        if row is None:
            raise UserError(f"new_token_init={init}: is no token of {checkpoint.path}; give one, or mean")
    return replace(checkpoint, model=grow_vocabulary(checkpoint.model, tokenizer.n_vocab, row), tokenizer=tokenizer)


def grow_vocabulary(model: GPT, vocab_size: int, row: int | None = None) -> GPT:
    """The model with further rows in its embedding table, and in its output head if that is another.

    Args:
        row: which old row the new ones are; None: the mean of the old ones. The logit of such a row is the mean of the
            others', so it is never the most likely one before it is trained.
    """
    grown = GPT(replace(model.config, vocab_size=vocab_size))
    state = model.state_dict()
    for name in ("embedding.weight", "head.weight"):
        if name in state:
            state[name] = with_rows(state[name], vocab_size, row)
    grown.load_state_dict(state)
    return grown.to(model.embedding.weight.device).train(model.training)


def with_rows(table_VD: Tensor, rows: int, row: int | None) -> Tensor:
    """A table of `rows` rows, the new ones as in `grow_vocabulary`."""
    new_D = table_VD.mean(0) if row is None else table_VD[row]
    return torch.cat((table_VD, new_D.expand(rows - len(table_VD), -1)))
