"""Model families as data: how a published configuration and its weights' names become ours, and back.

One `Family` is one row of `FAMILIES`; all of them are the same `GPT`. Names and configurations are those of
https://github.com/huggingface/transformers (models/<model_type>/).

Shapes: D width, H heads, E head width, O outputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from simcot_latent.errors import UserError
from simcot_latent.files import from_plain
from simcot_latent.model.gpt import GPTConfig


@dataclass(frozen=True)
class Family:
    """What makes one family's files another's.

    Attributes:
        model_type, architecture: what `config.json` calls it.
        keys: fields of `GPTConfig` to keys of `config.json`.
        defaults: values of keys that older files leave out.
        activation_key, activations: the key of the activation; its values to ours.
        fixed: fields of `GPTConfig` that are the same in the whole family.
        required: keys that change what is computed, with the one value that is ours; where absent, it is that.
        body: what names of all but the output head begin with; some files leave it out.
        layer: what the names of a block begin with.
        modules: our modules to theirs, of which several are joined along the first dimension. Those of blocks begin
            with `blocks.`.
        ignored: endings of names that hold no weights.
        transposed: whether linear layers are stored as (in, out).
        norm_biases: whether norms have biases even where linear layers have none. Ours have none then: those that are
            zero are left out, and written as zero.
        reorder: modules of theirs whose rows are in another order; each function undoes itself.
    """

    model_type: str
    architecture: str
    keys: Mapping[str, str]
    defaults: Mapping[str, Any]
    activation_key: str
    activations: Mapping[str, str]
    fixed: Mapping[str, Any]
    required: Mapping[str, Any]
    body: str
    layer: str
    modules: Mapping[str, tuple[str, ...]]
    ignored: tuple[str, ...] = ()
    transposed: bool = False
    norm_biases: bool = False
    reorder: Mapping[str, Callable[[Tensor, GPTConfig], Tensor]] = field(default_factory=dict)

    @property
    def has_rotary(self) -> bool:
        return self.fixed["positions"] == "rotary"

    def config_of(self, theirs: Mapping[str, Any], file: Path) -> GPTConfig:
        """Their configuration as ours.

        Raises:
            UserError: a key is missing, or has a value that we do not compute.
        """
        values: dict[str, Any] = dict(self.fixed)
        for ours, key in self.keys.items():
            if key not in theirs and key not in self.defaults:
                raise UserError(f"{file}: lacks {key}, which a {self.model_type} has")
            values[ours] = theirs.get(key, self.defaults.get(key))
        for key, right in self.required.items():
            if theirs.get(key, right) != right:
                raise UserError(f"{file}: {key}={theirs[key]} of a {self.model_type} is not supported, only {right}")
        activation = theirs.get(self.activation_key, next(iter(self.activations)))
        if not isinstance(activation, str) or activation not in self.activations:
            raise UserError(
                f"{file}: {self.activation_key}={activation} of a {self.model_type} is not supported, only "
                f"{', '.join(self.activations)}"
            )
        values["activation"] = self.activations[activation]
        if self.has_rotary:
            values |= rotary_of(theirs, file)
        try:
            config = from_plain(GPTConfig, values, "model")
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
        head_width = theirs.get("head_dim")
        if head_width not in (None, config.head_width):
            raise UserError(f"{file}: head_dim={head_width} is not supported, only hidden_size / num_attention_heads")
        return config

    def describe(self, config: GPTConfig) -> dict[str, Any]:
        """Our configuration as theirs, the content of `config.json`."""
        values = {"model_type": self.model_type, "architectures": [self.architecture], **self.required}
        values |= {key: getattr(config, ours) for ours, key in self.keys.items()}
        values[self.activation_key] = next(a for a, ours in self.activations.items() if ours == config.activation)
        if "n_kv_head" in self.keys:
            values[self.keys["n_kv_head"]] = config.kv_heads
            values[self.keys["ffn_width"]] = config.ffn_width or 4 * config.n_embd
            values["head_dim"] = config.head_width
        if self.has_rotary:
            values |= rotary_keys(config)
        return values

    def differences(self, config: GPTConfig) -> list[str]:
        """The fields in which a configuration is none of this family."""
        config = effective(config)
        found = [f"{key}={getattr(config, key)}" for key, value in self.fixed.items() if getattr(config, key) != value]
        if config.activation not in self.activations.values():
            found.append(f"activation={config.activation}")
        if "qkv_bias" not in self.fixed and config.qkv_bias != config.bias:
            found.append(f"qkv_bias={config.qkv_bias}")
        if "n_kv_head" not in self.keys and config.kv_heads != config.n_head:
            found.append(f"n_kv_head={config.n_kv_head}")
        return found

    def names(self, shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """Each of our parameters with the names of theirs that it is joined from, and their modules."""
        for ours in shapes:
            module, _, kind = ours.removeprefix("transformer.").rpartition(".")
            prefix = "" if module == "head" else self.body
            if module.startswith("blocks."):
                _, number, module = module.split(".", 2)
                prefix += self.layer.format(number)
                module = f"blocks.{module}"
            yield ours, [(f"{prefix}{their}.{kind}", their) for their in self.modules[module]]

    def turned(self, weight: Tensor, ours: str) -> Tensor:
        """A weight as the other side stores it; the same both ways."""
        return weight.T if self.transposed and weight.dim() == 2 and ".blocks." in ours else weight


def effective(config: GPTConfig) -> GPTConfig:
    """The same model, every default written out."""
    qkv_bias = config.bias if config.qkv_bias is None else config.qkv_bias
    return replace(config, qkv_bias=qkv_bias)


def rotary_of(theirs: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Rotary positions, in the old keys (`rope_theta`, `rope_scaling`) or the new one (`rope_parameters`).

    Raises:
        UserError: they are scaled in a way that we do not know.
    """
    given = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}  # in the order of `transformers`
    if not isinstance(given, Mapping):
        raise UserError(f"{file}: rope_scaling and rope_parameters must be objects, or null")
    base = given.get("rope_theta", theirs.get("rope_theta", 10_000.0))
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return {"rope_base": base}
    if kind != "llama3":
        raise UserError(f"{file}: rotary positions of type {kind} are not supported, only default and llama3")
    keys = {name: name for name in ("factor", "low_freq_factor", "high_freq_factor")}
    keys["original_context"] = "original_max_position_embeddings"
    if missing := [key for key in keys.values() if key not in given]:
        raise UserError(f"{file}: rotary positions of type llama3 lack {', '.join(missing)}")
    return {"rope_base": base, "rope_scaling": {ours: given[key] for ours, key in keys.items()}}


def rotary_keys(config: GPTConfig) -> dict[str, Any]:
    """The inverse of `rotary_of`, in the keys that old and new versions read."""
    if config.rope_scaling is None:
        scaling: dict[str, Any] = {"rope_type": "default"}
    else:
        scaling = {"rope_type": "llama3", **asdict(config.rope_scaling)}
        scaling["original_max_position_embeddings"] = scaling.pop("original_context")
    old = {} if config.rope_scaling is None else {"rope_scaling": scaling}
    return {"rope_theta": config.rope_base, "rope_parameters": {"rope_theta": config.rope_base, **scaling}, **old}


def swap_halves(weight_OD: Tensor, config: GPTConfig) -> Tensor:
    """Exchanges the halves of every head: nanochat rotates by the negative angle, which is ours with halves swapped."""
    return rearrange(
        rearrange(weight_OD, "(h two e) d -> h two e d", two=2, e=config.head_width // 2).flip(1),
        "h two e d -> (h two e) d",
    )


_LLAMA_KEYS = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size",
    "ffn_width": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tie_head": "tie_word_embeddings",
}
_LLAMA_DEFAULTS = {
    "max_position_embeddings": 2048,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_LLAMA_FIXED = {
    "positions": "rotary",
    "embedding_norm": False,
    "norm": "rmsnorm",
    "norm_scale": True,
    "bias": False,
    "qkv_bias": False,
    "qk_norm": False,
    "logit_softcap": None,
}
_LLAMA_MODULES = {
    "embedding": ("embed_tokens",),
    "norm": ("norm",),
    "head": ("lm_head",),
    "blocks.attention_norm": ("input_layernorm",),
    "blocks.attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "blocks.attention.out": ("self_attn.o_proj",),
    "blocks.mlp_norm": ("post_attention_layernorm",),
    "blocks.mlp.up": ("mlp.gate_proj", "mlp.up_proj"),
    "blocks.mlp.down": ("mlp.down_proj",),
}

FAMILIES: list[Family] = [
    Family(
        model_type="gpt2",
        architecture="GPT2LMHeadModel",
        keys={
            "vocab_size": "vocab_size",
            "context_length": "n_positions",
            "n_layer": "n_layer",
            "n_head": "n_head",
            "n_embd": "n_embd",
            "ffn_width": "n_inner",
            "norm_eps": "layer_norm_epsilon",
            "tie_head": "tie_word_embeddings",
        },
        defaults={"n_positions": 1024, "n_inner": None, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
        activation_key="activation_function",
        activations={"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"},
        fixed={
            "positions": "learned",
            "embedding_norm": False,
            "norm": "layernorm",
            "norm_scale": True,
            "bias": True,
            "qkv_bias": True,
            "qk_norm": False,
            "logit_softcap": None,
        },
        required={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        body="transformer.",
        layer="h.{}.",
        modules={
            "embedding": ("wte",),
            "positions": ("wpe",),
            "norm": ("ln_f",),
            "head": ("lm_head",),
            "blocks.attention_norm": ("ln_1",),
            "blocks.attention.qkv": ("attn.c_attn",),
            "blocks.attention.out": ("attn.c_proj",),
            "blocks.mlp_norm": ("ln_2",),
            "blocks.mlp.up": ("mlp.c_fc",),
            "blocks.mlp.down": ("mlp.c_proj",),
        },
        ignored=(".attn.bias", ".attn.masked_bias"),
        transposed=True,
    ),
    Family(
        model_type="llama",
        architecture="LlamaForCausalLM",
        keys=_LLAMA_KEYS,
        defaults=_LLAMA_DEFAULTS,
        activation_key="hidden_act",
        activations={"silu": "swiglu"},
        fixed=_LLAMA_FIXED,
        required={"attention_bias": False, "mlp_bias": False},
        body="model.",
        layer="layers.{}.",
        modules=_LLAMA_MODULES,
        ignored=(".rotary_emb.inv_freq",),
    ),
    Family(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        keys=_LLAMA_KEYS,
        defaults={**_LLAMA_DEFAULTS, "max_position_embeddings": 32768},
        activation_key="hidden_act",
        activations={"silu": "swiglu"},
        fixed={**_LLAMA_FIXED, "qkv_bias": True},
        required={"use_sliding_window": False},
        body="model.",
        layer="layers.{}.",
        modules=_LLAMA_MODULES,
        ignored=(".rotary_emb.inv_freq",),
    ),
    Family(
        model_type="nanochat",
        architecture="NanoChatForCausalLM",
        keys={**_LLAMA_KEYS, "logit_softcap": "final_logit_softcapping"},
        defaults={**_LLAMA_DEFAULTS, "final_logit_softcapping": 15.0},
        activation_key="hidden_act",
        activations={"relu2": "relu2"},
        fixed={key: value for key, value in _LLAMA_FIXED.items() if key != "logit_softcap"}
        | {"embedding_norm": True, "norm_scale": False, "qk_norm": True},
        required={"attention_bias": False},
        body="model.",
        layer="layers.{}.",
        modules={**_LLAMA_MODULES, "blocks.mlp.up": ("mlp.fc1",), "blocks.mlp.down": ("mlp.fc2",)},
        reorder={"self_attn.q_proj": swap_halves, "self_attn.k_proj": swap_halves},
    ),
    Family(  # of our presets, model=tiny is one
        model_type="starcoder2",
        architecture="Starcoder2ForCausalLM",
        keys={**_LLAMA_KEYS, "norm_eps": "norm_epsilon", "bias": "use_bias"},
        defaults={
            "max_position_embeddings": 4096,
            "num_key_value_heads": 2,
            "norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "use_bias": True,
        },
        activation_key="hidden_act",
        activations={"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu"},
        fixed={key: value for key, value in _LLAMA_FIXED.items() if key not in ("bias", "qkv_bias")}
        | {"norm": "layernorm"},
        required={"sliding_window": None},
        body="model.",
        layer="layers.{}.",
        modules={**_LLAMA_MODULES, "blocks.mlp.up": ("mlp.c_fc",), "blocks.mlp.down": ("mlp.c_proj",)},
        norm_biases=True,
    ),
]
"""The families that there are; a module of your own may append one, see docs/extending.md."""


def family_of(config: Mapping[str, Any], file: Path) -> Family:
    """The family that a configuration names.

    Raises:
        UserError: we do not know it.
    """
    for family in FAMILIES:
        if config.get("model_type") == family.model_type or config.get("architectures") == [family.architecture]:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise UserError(f"{file}: model_type={config.get('model_type')}: must be one of {known}")
