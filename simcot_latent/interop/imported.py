"""Checkpoints that the field has published, as checkpoints of ours: Coconut, CODI, and SIM-CoT on either of them.

What their state dicts hold, by the first part of a tensor's name:

    kind             the model        the auxiliary decoder   besides
    coconut          base_causallm                            embedding: the model's table once more
                     (its stage 0: the model by itself)
    simcot_coconut   base_causallm    expainable_llm          the same
    codi             codi                                     prj: the projector of thoughts, if there is one
    simcot_codi      codi             decoder                 the same

Models go by Hugging Face's names. The table of each has three rows behind the base model's; CODI's is wrapped by PEFT
(https://github.com/huggingface/peft), its LoRA factors not merged yet. Decoders read the model's table and have an
output head of their own, of as many rows as the base model's. Sources: https://github.com/facebookresearch/coconut
(coconut.py, dataset.py), https://github.com/zhenyi4/codi (src/model.py, test.py), https://github.com/InternLM/SIM-CoT.

"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from simcot_latent.checkpoint import Checkpoint, read_json
from simcot_latent.curricula.base import Stage
from simcot_latent.data.format import AnswerFormat
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.errors import UserError, require_choice, some
from simcot_latent.interop.conversion import build
from simcot_latent.interop.families import FAMILIES, Family, family_of
from simcot_latent.interop.peft import without_peft
from simcot_latent.interop.published import (
    Published,
    download,
    not_quantised,
    read_published,
    read_tensor_file,
    read_weights,
)
from simcot_latent.interop.tensor_names import plain_names
from simcot_latent.loops.sequential import Sequential, SequentialConfig
from simcot_latent.model.gpt import GPT
from simcot_latent.parts import NONE
from simcot_latent.paths import HUB_ID, expanded
from simcot_latent.terms.step_decoder import StepDecoder
from simcot_latent.terms.steps import StepGroups
from simcot_latent.weights import require_finite


@dataclass(frozen=True)
class Kind:
    """One flavour of published checkpoint, and how its model thinks.

    Attributes:
        model, decoder, besides: first parts of names, see the module.
        added: what the three rows behind the base model's vocabulary stand for.
        roles: those of them that our prompts need.
        answers: what stands around its answers.
        n_latents: thoughts, as published.
        feeds_last: see `SequentialConfig`.
        groups: how they stand for steps.
        first_position: of the decoder.
        max_new_tokens: of an answer, in the published evaluation.
    """

    model: str
    decoder: str | None
    besides: str
    added: tuple[str, str, str]
    roles: Mapping[str, str]
    answers: AnswerFormat
    n_latents: int
    feeds_last: bool
    groups: StepGroups
    first_position: int
    max_new_tokens: int

    @property
    def models(self) -> set[str]:
        return {self.model} if self.decoder is None else {self.model, self.decoder}


COCONUT = Kind(
    model="base_causallm",
    decoder=None,
    besides="embedding",
    added=("<|start-latent|>", "<|end-latent|>", "<|latent|>"),
    roles={"bot": "<|start-latent|>", "eot": "<|end-latent|>"},
    answers=AnswerFormat(thinks=True, question_end="\n", answer_mark="###"),
    n_latents=10,
    feeds_last=True,
    groups=StepGroups(latents_per_step=2, missing="answer"),
    first_position=1,
    max_new_tokens=64,
)


CODI = Kind(
    model="codi",
    decoder=None,
    besides="prj",
    added=("<|pad|>", "<|bot|>", "<|eot|>"),  # they have no names there
    roles={"bot": "<|bot|>", "eot": "<|eot|>"},
    answers=AnswerFormat(thinks=True, answer_mark="The answer is:"),
    n_latents=6,
    feeds_last=False,  # what the sixth thought comes to is only decoded
    # Their scripts leave the last step out (`include_last_cot` is off): no decoder has been taught one.
    groups=StepGroups(latents_per_step=1, missing="mask", drop_last=True),
    first_position=0,
    max_new_tokens=256,
)


KINDS = {
    "coconut": COCONUT,
    "simcot_coconut": replace(COCONUT, decoder="expainable_llm"),
    "codi": CODI,
    "simcot_codi": replace(CODI, decoder="decoder"),
}


PARTS = {part for kind in KINDS.values() for part in (*kind.models, kind.besides)}
"""All first parts of names."""


BARE = ""
"""In place of a first part: of Coconut's stage 0, before there is any thought, the model is saved by itself."""


WRITTEN = AnswerFormat(answer_mark="###")
"""How that model answers: the steps, a line each, then the answer."""


PROJECTOR = {"1": "up", "3": "down", "ln": "norm"}


def import_checkpoint(
    source: str | Path,
    kind: str,
    base: str | Path,
    n_latents: int | None = None,
    latents_per_step: int | None = None,
    lora_alpha: float = 32.0,
) -> Checkpoint:
    """A published checkpoint as one of ours.

    Args:
        source: a file of tensors, a folder with one or sharded ones, or a hub id.
        kind: one of `KINDS`.
        base: the model that it was made from, see `read_published`; its configuration and its tokenizer are taken.
        n_latents: thoughts. None: as published.
        latents_per_step: thoughts a step group. None: as published.
        lora_alpha: LoRA's change of a weight counts lora_alpha / rank.

    Raises:
        UserError: there is no such kind, a file is missing or broken, `source` is of another kind or not made from
            `base`, or a tensor is missing, left over, of another shape or not finite.
    """
    require_choice("kind", kind, tuple(KINDS))
    flavour = KINDS[kind]
    answers, stage, groups = how_it_answers(flavour, n_latents, latents_per_step)
    parts = split(read_source(source), source, kind)
    stage_0 = BARE in parts
    if stage_0:
        if n_latents is not None or latents_per_step is not None:
            raise UserError(f"source={source}: is of stage 0, whose model writes its steps; leave n_latents out")
        parts[flavour.model], answers, stage = parts.pop(BARE), WRITTEN, Stage()
    published = read_published(base, "base")
    family = family_of(published.config, published.path)
    if "embedding" in parts and not tables(parts[flavour.model], family):  # safetensors keeps one name of what is tied
        parts[flavour.model][f"{family.body}{family.modules['embedding'][0]}.weight"] = parts["embedding"]["weight"]
    model = model_like(published, without_peft(parts[flavour.model], lora_alpha, family, source), source)
    loop = None if stage_0 else make_loop(flavour, parts.get("prj"), model.config.n_embd, source)
    decoder = None
    if flavour.decoder is not None:
        weights = parts[flavour.decoder]
        theirs = model_like(published, weights, f"{source} ({flavour.decoder}.*)", count_blocks(weights, family))
        decoder = step_decoder(theirs, model, flavour.first_position)
    for module in (model, loop, decoder):
        if module is not None:
            require_finite(module.state_dict(), f"source={source}")
    return Checkpoint(
        model=model.eval(),
        step_decoder=None if decoder is None else decoder.eval(),
        tokenizer=extended_tokenizer(published, flavour, model.config.vocab_size, stage_0),
        answers=answers,
        loop=None if loop is None else loop.eval(),
        stage=stage,
        groups=groups,
        steps=NONE if decoder is None else "decoder",
        config={
            "mode": "weighted" if stage_0 else "latent",
            "rationale": "equations",
            "max_new_tokens": 256 if stage_0 else flavour.max_new_tokens,
            "imported": {"kind": kind, "source": str(source), "base": str(base)},
        },
    )


def how_it_answers(
    kind: Kind, n_latents: int | None, latents_per_step: int | None
) -> tuple[AnswerFormat, Stage, StepGroups]:
    """How a model answers, with `n_latents` thoughts.

    Raises:
        UserError: thoughts do not make whole step groups.
    """
    c = latents_per_step or kind.groups.latents_per_step
    n_latents = n_latents or kind.n_latents
    if (n_latents + (not kind.feeds_last)) % c:
        also = "" if kind.feeds_last else " and one state that is not fed"
        raise UserError(f"n_latents={n_latents}{also}: must make whole groups of latents_per_step={c}")
    return kind.answers, Stage(n_latents, first_written=None), replace(kind.groups, latents_per_step=c)


def read_source(source: str | Path) -> dict[str, Tensor]:
    """The tensors of a file, or of the one file or all shards in a folder or a repository on the hub.

    Raises:
        UserError: there is nothing, a shard is missing, or a file holds anything but tensors.
    """
    path = expanded(source, "source")
    if not path.exists() and "/" in str(source) and HUB_ID.fullmatch(str(source)):
        path = download(str(source), "source", None)
    if path.is_dir():
        if (path / "config.json").is_file() and (path / "config.json").read_bytes().strip():  # published ones are empty
            not_quantised(read_json(path / "config.json"), path / "config.json")
        return read_weights(path)
    if path.is_file():
        return plain_names(read_tensor_file(path), path)
    raise UserError(
        f"source={path}: does not exist; give a file of tensors, a folder that holds one or its shards, or a hub id "
        "(owner/name)"
    )


def split(weights: Mapping[str, Tensor], source: str | Path, kind: str) -> dict[str, dict[str, Tensor]]:
    """Tensors by the first part of their names, which is cut off.

    Raises:
        UserError: they are of another kind, or some belong nowhere.
    """
    weights = without_prefix(weights)
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in weights.items():
        first, _, rest = name.partition(".")
        parts[first][rest] = tensor
    models = parts.keys() & set[str]().union(*(kind.models for kind in KINDS.values()))
    looks = next((name for name, kind in KINDS.items() if kind.models == models), None)
    if not models and any(f"{part}." == family.body for part in parts for family in FAMILIES):
        if kind == "coconut":
            return {BARE: dict(weights)}
        looks = "coconut, of its stage 0"
    if looks != kind:
        hint = "no such kind is known" if looks is None else f"that is kind={looks}"
        raise UserError(f"kind={kind}: the tensors of source={source} begin with {some(sorted(parts))}; {hint}")
    if "pj_in" in parts or "pj_out" in parts:
        raise UserError(
            f"source={source}: its decoder is of another width or vocabulary than its model (pj_in, pj_out), which is "
            "not supported; only a decoder made from the same base model is"
        )
    known = KINDS[kind]
    if unknown := [name for name in weights if name.partition(".")[0] not in {*known.models, known.besides}]:
        raise UserError(f"source={source}: has {some(unknown)}, which kind={kind} has not")
    return dict(parts)


def without_prefix(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors by names that begin with one of `PARTS`, where all that hold one have the same before it.

    Trainers that keep the model as an attribute put that attribute's name there, Lightning's usual one is `model.`.
    """
    first_known = re.compile(rf"(.*?\.)??(?:{'|'.join(sorted(PARTS))})\.")
    before = {name: match[1] or "" for name in weights if (match := first_known.match(name))}
    if len(set(before.values())) != 1:
        return weights
    return {name.removeprefix(before.get(name, "")): tensor for name, tensor in weights.items()}


def model_like(base: Published, tensors: dict[str, Tensor], path: str | Path, n_layer: int | None = None) -> GPT:
    """A model of the base's shape, but for the rows of its table, and for `n_layer` blocks if that is given.

    Args:
        path: where the tensors are from, for errors.

    Raises:
        UserError: see `build`.
    """
    config, family = dict(base.config), family_of(base.config, base.path)
    for name in tables(tensors, family):
        if tensors[name].dim() == 2:
            config[family.keys["vocab_size"]] = len(tensors[name])
    if n_layer is not None:
        config[family.keys["n_layer"]] = n_layer
    return build(replace(base, path=Path(path), config=config, tensors=tensors))


def tables(tensors: Mapping[str, Tensor], family: Family) -> list[str]:
    """The names of a model's output head and embedding table, as far as they are there: of tied ones, one may be."""
    ends = tuple(f"{family.modules[part][0]}.weight" for part in ("head", "embedding"))
    return sorted((name for name in tensors if name.endswith(ends)), key=lambda name: not name.endswith(ends[0]))


def count_blocks(names: Iterable[str], family: Family) -> int:
    """How many blocks tensors are of, by their names."""
    block = re.compile(r"(?:^|\.)" + r"([0-9]+)".join(map(re.escape, family.layer.split("{}"))))
    return 1 + max((int(match[1]) for match in map(block.search, names) if match), default=-1)


def make_loop(kind: Kind, projector: Mapping[str, Tensor] | None, width: int, source: str | Path) -> Sequential:
    """The thought loop, with a published projector if there is one.

    Raises:
        UserError: it is another than Linear, GELU, Linear, LayerNorm.
    """
    if projector is None:
        return Sequential(width, SequentialConfig(kind.feeds_last))
    names = {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in PROJECTOR.items() for kind in ("weight", "bias")}
    if projector.keys() != names.keys():
        raise UserError(
            f"source={source}: its projector holds prj.{', prj.'.join(projector)}; Linear, GELU, Linear, LayerNorm "
            f"hold prj.{', prj.'.join(names)}"
        )
    loop = Sequential(width, SequentialConfig(kind.feeds_last, projector["1.bias"].numel()))
    weights = {f"projector.{ours}": projector[theirs] for theirs, ours in names.items()}
    for name, weight in weights.items():
        if weight.shape != loop.get_parameter(name).shape:
            raise UserError(f"source={source}: its projector (prj.*) is not of a model of width {width}")
    loop.load_state_dict(weights)
    return loop


def step_decoder(theirs: GPT, model: GPT, first_position: int) -> StepDecoder:
    """A published decoder: it reads the model's table, its own is its output head.

    Args:
        first_position: what its positions start at. Rotary ones only know distances.
    """
    state = {f"transformer.{name}": weight for name, weight in theirs.transformer.state_dict().items()}
    config = replace(theirs.config, tie_head=False)
    if config.positions == "learned":
        state["transformer.positions.weight"] = state["transformer.positions.weight"][first_position:]
        config = replace(config, context_length=config.context_length - first_position)
    decoder = StepDecoder(config, model.embedding)
    decoder.load_state_dict(state | {"head.weight": theirs.output_table, "embedding.weight": model.embedding.weight})
    return decoder


def extended_tokenizer(base: Published, kind: Kind, n_vocab: int, stage_0: bool = False) -> Tokenizer:
    """The base model's tokenizer with the three added tokens, which have the last ids.

    Args:
        stage_0: whether they may be missing, as from models that write their steps.

    Raises:
        UserError: the imported model's vocabulary is another, or the base's has no token that texts end with.
    """
    tokenizer, before = base.tokenizer(), n_vocab - len(kind.added)
    tokenizer.id_of("end")
    if stage_0 and n_vocab == base.config["vocab_size"]:
        return tokenizer.filled_up_to(n_vocab)
    # CODI adds rows to the table, Coconut to the tokens, of which there may be fewer.
    if tokenizer.n_vocab > before or before not in (tokenizer.n_vocab, base.config["vocab_size"]):
        raise UserError(
            f"base={base.path}: has {tokenizer.n_vocab} tokens and {base.config['vocab_size']} rows, the imported "
            f"model {before} before {', '.join(kind.added)}; give the model that it was made from"
        )
    return tokenizer.filled_up_to(before).with_tokens(kind.added).with_roles(kind.roles)
