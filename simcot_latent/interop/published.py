"""Files of published models, read into one thing whatever kind they are."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simcot_latent.config import one_line
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.errors import UserError, some
from simcot_latent.files import is_regular, read_json, require_regular
from simcot_latent.interop.gguf_file import read_gguf
from simcot_latent.interop.published_tokenizers import read_tokenizer
from simcot_latent.interop.tensor_names import plain_names, unwrapped
from simcot_latent.paths import HUB_ID, expanded
from simcot_latent.weights import read_tensors

HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt")
NO_WEIGHTS = ("*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.ot", "*.md", "*.py", "*.png", "optimizer*", "rng_state*")
"""What of a repository is not downloaded where its weights may have any name."""
FILE_NAME = re.compile(r"(?!\.)[^/\\\x00:]+")
"""A file in the same folder: no path, and no drive or stream of Windows."""
WEIGHTS, INDEX = ("model.safetensors", "pytorch_model.bin"), ".index.json"
SHARD = re.compile(r".*-[0-9]+-of-(?P<count>[0-9]+)\.\w+")
TORCH = (".bin", ".pt", ".pth", ".ckpt")
OTHER_TENSORS = ("optimizer", "scheduler", "scaler", "rng_state", "training_args")
"""How names of files begin that trainers write beside weights."""

# nanochat's names in Hugging Face's, from transformers' models/nanochat/convert_nanochat_checkpoints.py.
NANOCHAT_NAMES = (
    (r"^transformer\.wte\.", "model.embed_tokens."),
    (r"^transformer\.h\.(\d+)\.attn\.c_([qkv])\.", r"model.layers.\1.self_attn.\2_proj."),
    (r"^transformer\.h\.(\d+)\.attn\.c_proj\.", r"model.layers.\1.self_attn.o_proj."),
    (r"^transformer\.h\.(\d+)\.mlp\.c_fc\.", r"model.layers.\1.mlp.fc1."),
    (r"^transformer\.h\.(\d+)\.mlp\.c_proj\.", r"model.layers.\1.mlp.fc2."),
)
NANOCHAT_KEYS = {
    "max_position_embeddings": "sequence_len",
    "vocab_size": "vocab_size",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "hidden_size": "n_embd",
}
NANOCHAT_EPS = torch.finfo(torch.float32).eps
"""Of its norms: `torch.nn.functional.rms_norm` with none given. transformers' converter writes 1e-6."""


@dataclass(frozen=True)
class Published:
    """A published model as Hugging Face's layout has it, wherever it was read from.

    Attributes:
        path: the folder or file, for errors.
        config: the content of `config.json`; of other sources, what would stand in it.
        tensors: all weights by their Hugging Face names, as stored.
        tokenizer: makes the tokenizer; the ids of the original, roles `end`, `pad` and `bos` where it has them.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    tokenizer: Callable[[], Tokenizer]


def read_published(source: str | Path, key: str = "source") -> Published:
    """A published model from a folder in Hugging Face's layout, a nanochat checkpoint folder, a GGUF file or the hub.

    Args:
        key: what `source` came from, for errors.

    Raises:
        UserError: there is nothing there, or a file of it is missing or broken.
    """
    path = expanded(source, key)
    if path.is_file() and path.suffix == ".gguf":
        return Published(path, *read_gguf(path))
    if path.is_dir():
        if steps := nanochat_steps(path):
            return read_nanochat(path, steps[-1])
        if is_regular(path / "config.json"):
            return read_folder(path)
        raise UserError(f"{key}={path}: holds no model; it needs config.json and safetensors, or nanochat's model_*.pt")
    if not path.exists() and path.suffix != ".gguf" and HUB_ID.fullmatch(str(source)):
        return read_folder(download(str(source), key))
    raise UserError(
        f"{key}={source}: must be a folder in Hugging Face's layout, a hub id (owner/name), a .gguf file, a nanochat "
        f"checkpoint folder, or a checkpoint of ours{'' if path.exists() else '; there is no such file or folder'}"
    )


def read_folder(folder: Path) -> Published:
    """A model from a folder in Hugging Face's layout.

    Raises:
        UserError: a file is missing or broken.
    """
    file = folder / "config.json"
    if file.is_file() and not file.read_bytes().strip():
        raise UserError(
            f"{file}: is empty, so nothing tells the model's shape; what SIM-CoT's authors have published is read by "
            "python -m simcot_latent.import_checkpoint"
        )
    config = read_json(file)
    not_quantised(config, file)
    return Published(folder, config, read_weights(folder), lambda: read_tokenizer(folder))


def not_quantised(config: dict[str, Any], file: Path) -> None:
    """Raises a `UserError` about the configuration of a model whose weights are packed in a few bits each."""
    if quantised := config.get("quantization_config"):
        how = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise UserError(
            f"{file}: the model is quantised ({how or 'quantization_config'}), which is not read; give the weights it "
            "was made from"
        )


def download(hub_id: str, key: str, files: Sequence[str] | None = HUB_FILES) -> Path:
    """The folder of a repository on the hub, as the hub's client keeps it.

    Args:
        files: patterns of the names of what is needed; None: all but what is known to be no weights.

    Raises:
        UserError: it cannot be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    try:
        folder = Path(
            snapshot_download(
                hub_id,
                allow_patterns=None if files is None else list(files),
                ignore_patterns=["*/*", *(NO_WEIGHTS if files is None else ())],
            )
        )
        if files == HUB_FILES and not any(folder.glob("*.safetensors")):  # of before safetensors
            return download(hub_id, key, (*HUB_FILES, "pytorch_model*"))
        return folder
    except GatedRepoError as error:
        raise UserError(
            f"{key}={hub_id}: its licence must be accepted on the model's page at the hub first, and `hf auth login` "
            "say by whom; or give a folder that holds the repository's files"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: no id that the hub could have
        raise UserError(
            f"{key}={hub_id}: is no file or folder here, and as a hub id cannot be downloaded, nor is it in the hub's "
            f"cache; without a network give a folder that holds the repository's files ({one_line(str(error))[:120]})"
        ) from error


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder: of one file, which may have any name if no other file is like it, or of shards.

    Raises:
        UserError: there is none, a shard or a tensor in it is missing, a file holds anything but tensors, or they are
            quantised.
    """
    for name in WEIGHTS:
        index = folder / (name + INDEX)
        if is_regular(index):
            return plain_names(read_shards(index), folder)
        if is_regular(folder / name):
            return plain_names(read_tensor_file(folder / name), folder / name)
    files = [file for file in sorted(folder.iterdir()) if is_regular(file) and holds_tensors(file)]
    files = [file for file in files if not file.name.startswith(OTHER_TENSORS)]
    shards = [SHARD.fullmatch(file.name) for file in files]
    if files and all(shards):  # without an index
        counts = {int(match["count"]) for match in shards if match}
        if counts != {len(files)}:
            raise UserError(f"{folder}: {len(files)} shards of {max(counts)} are there; all are needed")
        return plain_names({n: x for file in files for n, x in read_tensor_file(file).items()}, folder)
    if len(files) > 1:
        raise UserError(f"{folder}: holds several files of tensors: {some(f.name for f in files)}; give one of them")
    if not files:
        raise UserError(f"{folder}: holds no weights; it needs {WEIGHTS[0]}, or {WEIGHTS[0]}{INDEX} and its shards")
    return plain_names(read_tensor_file(files[0]), files[0])


def holds_tensors(file: Path) -> bool:
    """Whether a file, by its first bytes, is of safetensors or of `torch.save`."""
    with file.open("rb") as handle:
        start = handle.read(9)
    return start.startswith(b"PK\x03\x04") or start[8:] == b"{" or (start[:1] == b"\x80" and file.suffix in TORCH)


def read_shards(index: Path) -> dict[str, Tensor]:
    """All tensors of the shards that an index names.

    Raises:
        UserError: a shard is missing or broken, or lacks a tensor.
    """
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise UserError(f"{index}: lacks weight_map, a mapping from tensors to shards")
    shards = sorted(set(shard_of.values()))
    if outside := [shard for shard in shards if not FILE_NAME.fullmatch(shard)]:
        raise UserError(f"{index}: names the shard {outside[0][:100]!r}, which is no file beside it")
    if missing := [shard for shard in shards if not is_regular(index.parent / shard)]:
        raise UserError(f"{index}: names shards that are not there: {some(missing)}")
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        found = read_tensor_file(index.parent / shard)
        if lacking := [name for name, file in shard_of.items() if file == shard and name not in found]:
            raise UserError(f"{index.parent / shard}: lacks {some(lacking)}, which {index.name} says it holds")
        tensors |= found
    return tensors


def read_tensor_file(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, by its suffix: safetensors, or what `torch.save` wrote.

    Raises:
        UserError: it is missing or broken, or holds anything but tensors.
    """
    size = require_regular(file)
    try:
        with file.open("rb") as handle:
            is_safetensors = file.suffix == ".safetensors" or handle.read(9)[8:] == b"{"
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); the checkpoint is incomplete") from error
    if is_safetensors:
        return read_tensors(file)
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:  # torch.save does not compress
                if sum(member.file_size for member in archive.infolist()) > size:
                    raise ValueError("compressed")
        tensors = unwrapped(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # broken bytes end in whatever they happen to mean to the unpickler
        raise UserError(f"{file}: not plain tensors as torch.save writes them, and nothing else is read") from error
    state = isinstance(tensors, dict) and all(isinstance(n, str) and isinstance(x, Tensor) for n, x in tensors.items())
    if not state or not tensors:
        raise UserError(f"{file}: not a state dict, names to plain tensors; nothing else is read")
    for name, tensor in tensors.items():
        if not is_plain_tensor(tensor):  # one stored number may claim to be a large tensor
            raise UserError(f"{file}: {name} is sparse, quantised or only a view; only plain tensors are read")
    return tensors


def is_plain_tensor(tensor: Tensor) -> bool:
    """Whether a tensor is all there: on the CPU, dense, as many numbers as its shape says."""
    dense = tensor.layout == torch.strided and not tensor.is_quantized and tensor.device.type == "cpu"
    return dense and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def nanochat_steps(folder: Path) -> list[str]:
    """The steps of which nanochat has saved a model, as file names have them, the last one last."""
    matches = (re.fullmatch(r"model_(\d+)\.pt", file.name) for file in folder.iterdir())
    return sorted((match[1] for match in matches if match), key=int)


def read_nanochat(folder: Path, step: str) -> Published:
    """A model of an original nanochat checkpoint folder (https://github.com/karpathy/nanochat).

    Raises:
        UserError: its `meta_*.json` is missing or lacks the model's shape, or a later version of nanochat wrote it.
    """
    weights, meta = folder / f"model_{step}.pt", folder / f"meta_{step}.json"
    shape = read_json(meta).get("model_config")
    if not isinstance(shape, dict) or not shape.keys() >= set(NANOCHAT_KEYS.values()):
        raise UserError(f"{meta}: model_config must hold {', '.join(NANOCHAT_KEYS.values())}")
    if wrong := [key for key in NANOCHAT_KEYS.values() if type(shape[key]) is not int]:
        raise UserError(f"{meta}: model_config.{wrong[0]} must be a whole number")
    if later := shape.keys() - set(NANOCHAT_KEYS.values()):
        raise UserError(
            f"{meta}: model_config has {', '.join(sorted(later))}: later versions of nanochat are other models; only "
            "the first published one is read"
        )
    tensors: dict[str, Tensor] = {}
    for name, tensor in plain_names(read_tensor_file(weights), weights).items():
        for pattern, replacement in NANOCHAT_NAMES:
            name = re.sub(pattern, replacement, name)
        tensors[name] = tensor
    config = {key: shape[theirs] for key, theirs in NANOCHAT_KEYS.items()}
    config |= {
        "model_type": "nanochat",
        "intermediate_size": 4 * config["hidden_size"],
        "rms_norm_eps": NANOCHAT_EPS,
        "tie_word_embeddings": False,
    }
    return Published(weights, config, tensors, lambda: nanochat_tokenizer(folder))


def nanochat_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a nanochat checkpoint: beside it, or where nanochat keeps it, if it can be read safely.

    nanochat's own places are BASE/base_checkpoints/d20/ and BASE/tokenizer/.

    Raises:
        UserError: it is not there, or only as a pickle.
    """
    for place in (folder, folder.parent / "tokenizer", folder.parent.parent / "tokenizer"):
        if is_regular(place / "tokenizer.json"):
            return read_tokenizer(place)
    raise UserError(
        f"{folder}: holds no tokenizer.json; nanochat keeps its tokenizer as a pickle, which is not read: put the "
        "tokenizer.json of its Hugging Face export beside the checkpoint"
    )
