"""GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): Llama and Qwen2 models, dequantised.

Shapes: D width, H heads, E head width, F frequencies (E / 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from simcot_latent.data.patterns import DIGITS_PATTERN, GPT2_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.errors import UserError
from simcot_latent.files import require_regular
from simcot_latent.interop.bpe import tokenizer_of_tokens
from simcot_latent.model.rotary import RopeScaling

# Keys of Hugging Face's configuration, and GGUF's without the architecture that they begin with.
KEYS = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
PATTERNS = {
    "gpt-2": GPT2_PATTERN,
    "smollm": DIGITS_PATTERN,
    "llama-bpe": LLAMA3_PATTERN,
    "qwen2": QWEN2_PATTERN,
}
"""What `tokenizer.ggml.pre` stands for."""

ARCHITECTURES = ("llama", "qwen2")
TOKENIZER_KEYS = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges")
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
"""Token types that are special."""


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], Callable[[], Tokenizer]]:
    """The configuration, weights and tokenizer of a model from a GGUF file, as `Published` has them.

    Raises:
        UserError: the `gguf` package is not installed, the file is broken, or it is of another architecture.
    """
    try:
        from gguf.quants import dequantize
    except ImportError as error:
        raise UserError(f"{path}: reading GGUF takes the gguf package; pip install 'simcot-latent[gguf]'") from error
    require_regular(path)
    try:
        reader = _reader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:  # broken bytes end in whatever they happen to mean to the library
        raise UserError(f"{path}: not a whole GGUF file ({' '.join(str(error).split())[:200]})") from error
    architecture = fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UserError(f"{path}: general.architecture={architecture}: must be one of {', '.join(ARCHITECTURES)}")
    if fields.get(f"{architecture}.rope.scaling.type", "none") != "none":
        raise UserError(
            f"{path}: {architecture}.rope.scaling.type={fields[f'{architecture}.rope.scaling.type']}: not supported"
        )
    if (parts := fields.get("split.count", 1)) != 1:
        raise UserError(f"{path}: is one of {parts} parts; join them with llama.cpp's `llama-gguf-split --merge`")
    config = config_of(fields, architecture, path)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}

    tensors: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        try:
            weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        except NotImplementedError as error:
            raise UserError(f"{path}: {tensor.name} is {tensor.tensor_type.name}, which gguf does not read") from error
        except Exception as error:  # as above
            raise UserError(f"{path}: {tensor.name}: not a whole tensor") from error
        name, part = hf_name(tensor.name)
        if architecture == "llama" and part in heads and weight.dim() and len(weight) % (2 * heads[part]) == 0:
            weight = half_split(weight, heads[part])
        tensors[name] = weight
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    if "rope_freqs.weight" in tensors:
        config["rope_scaling"] = llama3_scaling(tensors.pop("rope_freqs.weight"), config["rope_theta"], path)
    return config, tensors, lambda: tokenizer_of(fields, path)


def _reader(path: Path) -> Any:
    """The file in the hands of the `gguf` package.

    The package reads beyond the end of a file without noticing, so an array that says it has 2**60 elements would be
    read for ever; and it reads numbers one by one. Both are mended here.
    """
    import numpy as np
    from gguf import GGUFReader, GGUFValueType

    class Reader(GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, *order: Any, **options: Any) -> Any:
            found = super()._get(offset, dtype, count, *order, **options)
            if len(found) != count:
                raise ValueError("it ends before what it says it holds")
            return found

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            kinds = self.gguf_scalar_to_np
            if raw_type == GGUFValueType.ARRAY and (number := kinds.get(self._get(orig_offs, np.uint32)[0])):
                kind, length = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
                array = self._get(orig_offs + 12, number, int(length[0]))
                types = [GGUFValueType.ARRAY, GGUFValueType(kind[0])]
                return 12 + array.nbytes, [kind, length, array], [2], types
            return super()._get_field_parts(orig_offs, raw_type)

    return Reader(path)


def hf_name(name: str) -> tuple[str, str]:
    """Hugging Face's name of a tensor, and the part of GGUF's that says what it is; unknown names stay."""
    stem, _, kind = name.rpartition(".")
    if stem.startswith("blk."):
        _, layer, part = (*stem.split(".", 2), "")[:3]
        if part in BLOCK_NAMES:
            return f"model.layers.{layer}.{BLOCK_NAMES[part]}.{kind}", part
    return (f"{NAMES[stem]}.{kind}" if stem in NAMES else name), stem


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys from llama.cpp's order (pairs that rotate lie side by side) to that of halves.

    The inverse of `permute` in https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py.
    """
    return rearrange(weight, "(h e two) ... -> (h two e) ...", h=heads, two=2)


def llama3_scaling(divisor_F: Tensor, base: float, path: Path) -> dict[str, Any]:
    """Llama 3's `rope_scaling` from what each rotary frequency is divided by, which is all that a GGUF file tells.

    Of its four settings all published models (Llama 3.1 to 3.3) share three; the factor is the largest divisor.

    Raises:
        UserError: these settings do not give the divisors.
    """
    if divisor_F.dim() != 1 or len(divisor_F) == 0 or not (divisor_F > 0).all():
        raise UserError(f"{path}: rope_freqs.weight must be a list of numbers above 0")
    scaling = RopeScaling(divisor_F.max().item(), low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
    frequency_F = base ** -(torch.arange(len(divisor_F)) / len(divisor_F))
    if not torch.allclose(frequency_F / scaling(frequency_F), divisor_F, rtol=1e-3):
        raise UserError(f"{path}: rope_freqs.weight is not the scaling of Llama 3; give the original folder")
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_context,
    }


def config_of(fields: Mapping[str, Any], architecture: str, path: Path) -> dict[str, Any]:
    """Hugging Face's configuration.

    Raises:
        UserError: a field is missing.
    """
    heads = f"{architecture}.attention.head_count"
    fields = {f"{heads}_kv": fields.get(heads), **fields}
    needed = (*(f"{architecture}.{key}" for key in KEYS.values()), *TOKENIZER_KEYS)
    if missing := [key for key in needed if key not in fields]:
        raise UserError(f"{path}: lacks {', '.join(missing)}")
    for key, theirs in KEYS.items():
        value, wanted = fields[f"{architecture}.{theirs}"], (float, int) if key == "rms_norm_eps" else int
        if not isinstance(value, wanted) or isinstance(value, bool) or value < 1 * (wanted is int):
            raise UserError(f"{path}: {architecture}.{theirs} must be a number above 0")
    base = fields.get(f"{architecture}.rope.freq_base", 10_000.0)
    if not isinstance(base, float | int) or not 0 < base < math.inf:
        raise UserError(f"{path}: {architecture}.rope.freq_base must be a number above 0")
    for key, kind in zip(TOKENIZER_KEYS, (str, int, str), strict=True):
        if not isinstance(fields[key], list) or not all(isinstance(item, kind) for item in fields[key]):
            raise UserError(f"{path}: {key} must be a list of {'texts' if kind is str else 'whole numbers'}")
    return {
        "model_type": architecture,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "rope_theta": base,
        **{key: fields[f"{architecture}.{theirs}"] for key, theirs in KEYS.items()},
    }


def tokenizer_of(fields: Mapping[str, Any], path: Path) -> Tokenizer:
    """The tokenizer that is in the file.

    Raises:
        UserError: it is no byte-level BPE, or cuts text in a way that we do not know.
    """
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise UserError(f"{path}: tokenizer.ggml.model={kind}: must be gpt2, a byte-level BPE")
    if not isinstance(pre, str) or pre not in PATTERNS:
        raise UserError(f"{path}: tokenizer.ggml.pre={pre}: must be one of {', '.join(PATTERNS)}")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    if len(fields["tokenizer.ggml.token_type"]) > len(tokens):
        raise UserError(f"{path}: tokenizer.ggml.token_type is longer than tokenizer.ggml.tokens")
    special = [i for i, t in enumerate(fields["tokenizer.ggml.token_type"]) if t in (CONTROL, USER_DEFINED, UNUSED)]
    end = fields.get("tokenizer.ggml.eos_token_id")
    ids = {"end": end, "pad": fields.get("tokenizer.ggml.padding_token_id", end)}
    if fields.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        ids["bos"] = fields.get("tokenizer.ggml.bos_token_id")
    for role, i in ids.items():
        if i is not None and not (isinstance(i, int) and 0 <= i < len(tokens)):
            raise UserError(f"{path}: the id of the {role} token, {i}, is none of its {len(tokens)} tokens'")
    roles = {role: tokens[i] for role, i in ids.items() if i is not None}
    try:
        return tokenizer_of_tokens(
            path.stem,
            tokens,
            fields["tokenizer.ggml.merges"],
            PATTERNS[pre],
            special,
            roles,
            normal_form="NFC" if pre == "qwen2" else None,
            ignore_merges=pre == "llama-bpe",
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
