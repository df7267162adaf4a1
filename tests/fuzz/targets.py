"""What reads files that anybody may have written, each as a target to throw broken files at.

The property of all: such a file is read, or refused with a `UserError` of one line. Never another exception, never more
than a second and a second per megabyte.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from simcot_latent.checkpoint import (
    Checkpoint,
    TrainerState,
    load_checkpoint,
    load_trainer_state,
    progress,
    write_checkpoint,
)
from simcot_latent.curricula.base import Stage
from simcot_latent.data import problem
from simcot_latent.data.format import AnswerFormat
from simcot_latent.data.patterns import PATTERN
from simcot_latent.data.sources.gsm8k import GSM8K
from simcot_latent.data.sources.gsm8k_aug import GSM8KAug
from simcot_latent.data.tokenizer import SPECIAL_TOKENS, Tokenizer, write_ranks
from simcot_latent.errors import UserError
from simcot_latent.interop.exported import export_hf
from simcot_latent.interop.pretrained import load_pretrained
from simcot_latent.interop.published import read_tensor_file
from simcot_latent.interop.published_tokenizers import read_tokenizer, write_tokenizer
from simcot_latent.loops.sequential import Sequential, SequentialConfig
from simcot_latent.model.gpt import GPT, GPTConfig
from simcot_latent.terms.step_decoder import StepDecoder
from simcot_latent.weights import save_tensors

SAMPLE = "Tom has 3 pens,  and finds <<3+4=7>>7 more \u00e9\n\n#### 7"


@dataclass(frozen=True)
class Target:
    """A reader, and the file of it that is fuzzed.

    Attributes:
        make: writes a valid folder.
        file: the file in it whose content is exchanged.
        read: reads the folder.
    """

    make: Callable[[Path], object]
    file: str
    read: Callable[[Path], object]


def small_tokenizer() -> Tokenizer:
    """256 bytes, a few merges, the special tokens."""
    tokens = [*(bytes([b]) for b in range(256)), b"to", b"ha", b" ha", b"pen", b"<<", b">>"]
    tokens.insert(259, b"pe")
    ranks = {token: i for i, token in enumerate(tokens)}
    special = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
    return Tokenizer("small", PATTERN, ranks, special)


def small_checkpoint(thinks: bool = True, **shape: Any) -> Checkpoint:
    tokenizer = small_tokenizer()
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 8, "context_length": 64, **shape}
    model = GPT(GPTConfig(vocab_size=tokenizer.n_vocab, **shape)).eval()
    run = {
        "mode": "latent",
        "max_new_tokens": 8,
        "data": {"_target_": "simcot_latent.data.sources.gsm8k.GSM8K", "path": "somewhere"},
        "latent": {"n_latents": 2, "surplus": "merge", "missing": "mask"},
    }
    if not thinks:
        return Checkpoint(model, None, tokenizer, run, step=3)
    return Checkpoint(
        model,
        StepDecoder.from_base(model, 1, "base").eval(),
        tokenizer,
        run,
        answers=AnswerFormat(thinks=True),
        loop=Sequential(8, SequentialConfig(projector_width=4)).eval(),
        stage=Stage(2, first_written=None),
        parts={"contrast": {"weight": torch.ones(2, 3)}},
        step=3,
    )


def make_checkpoint(folder: Path) -> None:
    folder.mkdir(parents=True)
    state = TrainerState(
        {"random/cpu": torch.get_rng_state(), "optimizer/x/exp_avg": torch.zeros(2)}, {"step": 3, "num_steps": 9}
    )
    write_checkpoint(small_checkpoint(), folder, state)


def make_old_checkpoint(folder: Path) -> None:
    """As `make_checkpoint`, of format 2, in which a projector was a part of the model."""
    make_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    for key in ("answers", "stage", "groups", "parts"):
        del config[key]
    settings = config.pop("loop")["settings"]
    config["model"]["projector_width"] = settings["projector_width"]
    config["thoughts"] = {"thinks": True, "n_latents": 2, "latents_per_step": 1, "feeds_last": settings["feeds_last"]}
    config["run"]["objective"] = "simcot_latent.objectives.latent.LatentObjective"
    (folder / "config.json").write_text(json.dumps(config | {"format": 2}))
    loop = read_tensor_file(folder / "loop.safetensors")
    save_tensors(read_tensor_file(folder / "model.safetensors") | loop, folder / "new")
    (folder / "new").rename(folder / "model.safetensors")
    for file in ("loop.safetensors", "contrast.safetensors"):
        (folder / file).unlink()


def make_published(folder: Path, shards: bool = False) -> None:
    checkpoint = small_checkpoint(False, activation="swiglu", norm="rmsnorm", n_kv_head=1, tie_head=False)
    export_hf(checkpoint, folder, max_shard_gb=2e-6 if shards else 5.0)


def make_gguf(folder: Path) -> None:
    import gguf

    folder.mkdir(parents=True)
    make_published(folder / "hf")
    tokens = json.loads((folder / "hf" / "tokenizer.json").read_text())
    vocabulary = sorted(tokens["model"]["vocab"].items(), key=lambda item: item[1])
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if token in SPECIAL_TOKENS else 1 for token, _ in vocabulary])
    writer.add_token_merges(tokens["model"]["merges"])
    writer.add_eos_token_id(len(vocabulary) - 2)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
             "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}  # fmt: skip
    for name, tensor in read_tensor_file(folder / "hf" / "model.safetensors").items():
        stem, _, kind = name.rpartition(".")
        if stem.startswith("model.layers."):
            _, _, layer, part = stem.split(".", 3)
            stem = f"blk.{layer}.{parts[part]}"
        writer.add_tensor(f"{names.get(stem, stem)}.{kind}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_llama3(folder: Path) -> None:
    folder.mkdir(parents=True)
    write_ranks(folder / "tokenizer.model", small_tokenizer().ranks)


def make_gpt2(folder: Path) -> None:
    """GPT-2's own two files, of the small tokenizer."""
    folder.mkdir(parents=True)
    write_tokenizer(small_tokenizer(), folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    vocabulary = {t: i for t, i in model["vocab"].items() if t not in SPECIAL_TOKENS}
    (folder / "vocab.json").write_text(json.dumps(vocabulary | {"<|endoftext|>": len(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(model["merges"]) + "\n")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()


ROWS = [
    {"question": f"Tom has {n} pens. Half of them?", "answer": f"<<{2 * n}/2={n}>>{n}\n#### {n}"} for n in range(1, 5)
]


def make_rows(suffix: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        folder.mkdir(parents=True)
        file = folder / f"train{suffix}"
        if suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
        elif suffix == ".txt":
            file.write_text("".join(f"{r['question']}||{r['answer'].replace(chr(10), ' ')}\n" for r in ROWS))
        elif suffix == ".json":
            file.write_text(json.dumps(ROWS))
        else:
            file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    return make


def use_tokenizer(tokenizer: Tokenizer) -> None:
    ids, _ = tokenizer.encode_with_spans(SAMPLE, [(0, 3)])
    tokenizer.decode(ids)


def make_text(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "text").write_text(SAMPLE + " <<2/3=0.67>> <<(1+2)*3%=9>> -5, 1,000.5 $7. 2/5")


def read_problem(folder: Path) -> None:
    text = (folder / "text").read_bytes().decode("utf-8", errors="replace")
    steps, _ = problem.parse_steps(text)
    for step in steps:
        step.is_correct()
    for found in (problem.strict_answer(text), problem.last_number(text), text):
        if found is not None:
            problem.parse_number(found)
    try:
        problem.split_solution(text)
    except ValueError:  # its documented refusal
        pass


def make_torch(folder: Path) -> None:
    folder.mkdir(parents=True)
    torch.save({"a": torch.randn(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)}, folder / "model.pt")


def checkpoint_target(file: str, make: Callable[[Path], object] = make_checkpoint) -> Target:
    return Target(make, file, lambda folder: load_checkpoint(folder, verify=file == "manifest.json"))


def published_target(file: str, shards: bool = False) -> Target:
    return Target(lambda folder: make_published(folder, shards), file, load_pretrained)


def tokenizer_target(file: str, make: Callable[[Path], object] = make_published) -> Target:
    return Target(make, file, lambda folder: use_tokenizer(read_tokenizer(folder)))


def rows_target(suffix: str) -> Target:
    source = GSM8KAug if suffix == ".txt" else GSM8K
    return Target(make_rows(suffix), f"train{suffix}", lambda folder: source(path=str(folder)).load("train"))


TARGETS: dict[str, Target] = {
    "config": checkpoint_target("config.json"),
    "manifest": checkpoint_target("manifest.json"),
    "weights": checkpoint_target("model.safetensors"),
    "decoder": checkpoint_target("step_decoder.safetensors"),
    "loop": checkpoint_target("loop.safetensors"),
    "part": checkpoint_target("contrast.safetensors"),
    "old_config": checkpoint_target("config.json", make_old_checkpoint),
    "old_weights": checkpoint_target("model.safetensors", make_old_checkpoint),
    "trainer_state": Target(
        make_checkpoint, "trainer_state.json", lambda f: progress(load_trainer_state(f, verify=False), f)
    ),
    "trainer_tensors": Target(
        make_checkpoint, "trainer_state.safetensors", lambda f: load_trainer_state(f, verify=False)
    ),
    "tokenizer": Target(
        make_checkpoint, "tokenizer/tokenizer.json", lambda f: use_tokenizer(Tokenizer.load(f / "tokenizer"))
    ),
    "ranks": Target(
        make_checkpoint, "tokenizer/ranks.tiktoken", lambda f: use_tokenizer(Tokenizer.load(f / "tokenizer"))
    ),
    "published_config": published_target("config.json"),
    "published_weights": published_target("model.safetensors"),
    "published_index": published_target("model.safetensors.index.json", shards=True),
    "published_tokenizer": tokenizer_target("tokenizer.json"),
    "published_tokenizer_config": tokenizer_target("tokenizer_config.json"),
    "published_ranks": tokenizer_target("tokenizer.model", make_llama3),
    "published_vocab": tokenizer_target("vocab.json", make_gpt2),
    "published_merges": tokenizer_target("merges.txt", make_gpt2),
    "gguf": Target(make_gguf, "model.gguf", lambda folder: load_pretrained(folder / "model.gguf")),
    "torch": Target(make_torch, "model.pt", lambda folder: read_tensor_file(folder / "model.pt")),
    "jsonl": rows_target(".jsonl"),
    "json": rows_target(".json"),
    "txt": rows_target(".txt"),
    "parquet": rows_target(".parquet"),
    "problem": Target(make_text, "text", read_problem),
}


class Fuzzed:
    """A target with a folder of its own."""

    def __init__(self, name: str, folder: Path) -> None:
        self.target, self.folder = TARGETS[name], folder / name
        self.target.make(self.folder)
        self.file = self.folder / self.target.file
        self.seed = self.file.read_bytes()
        self.target.read(self.folder)  # what is valid is read

    def read(self, data: bytes) -> str:
        """Reads the folder with this content in the file; what came of it: "read", or the message.

        Raises:
            AssertionError: the message is more than a line, or it took too long. Any other exception is a bug found.
        """
        self.file.write_bytes(data)
        began = time.process_time()
        try:
            self.target.read(self.folder)
            outcome = "read"
        except UserError as error:
            outcome = str(error)
        seconds, most = time.process_time() - began, 1 + len(data) / 2**20
        assert seconds < most, f"{seconds:.1f} s for {len(data):,} bytes"
        assert outcome.splitlines() == [outcome], f"not one line: {outcome!r}"
        return outcome


# --- broken files ----------------------------------------------------------------------------------------------------

HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**33, 2**40, 10**7, 10**13, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, "", "x",
    "\0", "\ud800", "../x", "/dev/zero", "/etc/passwd", "${oc.env:SECRET}", "a" * 5000, "(a+)+$", "(?:a{999}){999}", [],
    [[]], [1], ["x"], {}, {"x": 1}, {"_target_": "os.system", "_args_": ["false"]}, {"rope_type": "llama3"},
]  # fmt: skip
BYTES = [b"\0", b"\xff", b"\xff" * 8, b"\0" * 8, b"\x7f\xff\xff\xff", b"{", b"[", b'"', b"<<", b">>", b"1e999",
         b"\xed\xa0\x80", b"9" * 30, b"\n", b" ", b"####", b"||", b"NaN", b"\\ud800"]  # fmt: skip


def broken(seed: bytes, random: random.Random) -> bytes:
    """A file like `seed`, but for something. JSON is mostly broken in its values, so that it gets past the parser."""
    if random.random() < 0.7:
        try:
            value = json.loads(seed)
        except (ValueError, UnicodeDecodeError):
            pass
        else:
            for _ in range(random.choice((1, 1, 1, 2, 4))):
                value = changed(value, random)
            return json.dumps(value).encode()
    data = bytearray(seed)
    for _ in range(random.choice((1, 1, 2, 4, 16))):
        start = random.randrange(len(data) + 1)
        if random.random() < 0.5:  # headers are what readers act on
            start = min(start, random.randrange(64))
        stop = min(len(data), start + random.choice((0, 1, 1, 4, 8, 64)))
        kind = random.randrange(6)
        if kind == 0:
            data[start:stop] = random.randbytes(stop - start)
        elif kind == 1:
            data[start:stop] = random.choice(BYTES)
        elif kind == 2:
            data[start:start] = random.choice(BYTES)
        elif kind == 3:
            del data[start:stop]
        elif kind == 4:
            data[start:start] = data[start:stop] * random.choice((1, 2, 50))
        elif random.random() < 0.2:
            del data[start:]
    return bytes(data)


def changed(value: Any, random: random.Random) -> Any:
    """A JSON value in which one part is another."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = random.choice(list(value))
        kind = random.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.2:
            return {
                **value,
                random.choice(["x", "_target_", "\ud800", "n_layer", *map(str, value)]): random.choice(HOSTILE),
            }
        return {**value, key: changed(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.9:
        i = random.randrange(len(value))
        kind = random.random()
        if kind < 0.1:
            return value[:i] + value[i + 1 :]
        if kind < 0.2:
            return value[: i + 1] + value[i:]
        return [*value[:i], changed(value[i], random), *value[i + 1 :]]
    if type(value) is int and random.random() < 0.3:
        return value + random.choice((-1, 1))
    return random.choice(HOSTILE)
