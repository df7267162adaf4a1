"""A checkpoint of ours as a folder that everybody's tools read.

The folder is in Hugging Face's layout (https://huggingface.co/docs/transformers/models): `config.json`,
`generation_config.json`, `model.safetensors` (or shards with an index) and the tokenizer's files.
"""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict

from simcot_latent.checkpoint import Checkpoint
from simcot_latent.checkpoint_folders import CONFIG
from simcot_latent.data.patterns import QWEN2_PATTERN
from simcot_latent.files import write_json
from simcot_latent.folders import new_folder
from simcot_latent.interop.conversion import describe
from simcot_latent.interop.published_tokenizers import write_tokenizer
from simcot_latent.loops.given import GivenLoop
from simcot_latent.paths import give_usual_permissions, writing

GENERATION_CONFIG = "generation_config.json"


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_hf(
    checkpoint: Checkpoint, out: str | Path, dtype: torch.dtype = torch.float32, max_shard_gb: float = 5.0
) -> str:
    """Writes a folder that `AutoModelForCausalLM` and `AutoTokenizer` load: the same logits, the same ids.

    What their classes have no place for stays behind, see `notes`.

    Args:
        out: the folder; new, or empty. It is written beside its place and renamed into it.
        dtype: of the weights.
        max_shard_gb: weights beyond it (10^9 bytes) go into further files.

    Returns:
        The class that the folder is for.

    Raises:
        UserError: there is something at `out`, or no family has the model's shape.
    """
    config, tensors = describe(checkpoint.model)
    # Copies: parts of one weight of ours share their memory, which would count once in the size of a file.
    tensors = {name: x.to(dtype, copy=True, memory_format=torch.contiguous_format) for name, x in tensors.items()}
    tokenizer = checkpoint.tokenizer
    # Roles that the tokenizer lacks are null: the classes' own defaults are ids of the original vocabularies.
    special = {f"{theirs}_token_id": tokenizer.id_of(ours) if ours in tokenizer.roles else None
               for theirs, ours in (("bos", "bos"), ("eos", "end"), ("pad", "pad"))}  # fmt: skip
    with new_folder(out) as folder:
        write_tokenizer(tokenizer, folder)
        write_json(folder / CONFIG, config | special | {"torch_dtype": str(dtype).removeprefix("torch.")})
        write_json(folder / GENERATION_CONFIG, special)
        with writing(folder):
            save_torch_state_dict(tensors, folder, max_shard_size=int(max_shard_gb * 1e9))
        for file in folder.glob("*.safetensors"):
            give_usual_permissions(file)
    return config["architectures"][0]


def notes(checkpoint: Checkpoint, family: str) -> list[str]:
    """What one should know of an exported checkpoint, a line each.

    Args:
        family: what `export_hf` returned.
    """
    thoughts, tokenizer, loop = checkpoint.stage.thoughts, checkpoint.tokenizer, checkpoint.loop
    parts = {
        "the auxiliary decoder": checkpoint.step_decoder is not None,
        "the projector of thoughts": getattr(loop, "projector", None) is not None,
        f"the loop of {thoughts} thoughts before an answer": thoughts > 0 and not isinstance(loop, GivenLoop),
        f"the loop of up to {thoughts} thoughts before an answer, and the head that says them": (
            thoughts > 0 and isinstance(loop, GivenLoop)
        ),
    }
    left_out = ", ".join(name for name, is_there in parts.items() if is_there)
    lines = [f"left out, since {family} has no place for it: {left_out}; see {checkpoint.path}"] if left_out else []
    # From transformers 5 on (`MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS` in models/auto/tokenization_auto.py).
    if family == "Qwen2ForCausalLM" and (tokenizer.pattern, tokenizer.normal_form) != (QWEN2_PATTERN, "NFC"):
        lines.append(
            "AutoTokenizer cuts the text for every qwen2 as Qwen's tokenizers do, which this one does not: load it "
            "with transformers.PreTrainedTokenizerFast.from_pretrained"
        )
    return lines
