"""python -m simcot_latent.import_checkpoint: a published file becomes what evals, probe and training take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import PROBE, TRAIN, Outcome, contents, predictions_of, read_lines, report_in, run, strict_json
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import simcot_latent as sl
from simcot_latent.interop.imported import import_checkpoint

pytestmark = pytest.mark.xdist_group("import_command")  # one worker, so that the checkpoints are made once

IMPORT = "simcot_latent.import_checkpoint"
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a tiny random GPT-2."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["How many pens are 3 and 4? <<3+4=7>>\n### 7"] * 9, trainer)
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    gpt2(tokenizer.get_vocab_size()).save_pretrained(folder)
    return folder


def gpt2(vocab_size: int, seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=2, n_positions=512))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@pytest.fixture(params=["simcot_coconut", "simcot_codi"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def source(kind: str, base: Path, tmp_path: Path) -> Path:
    """A published file of that kind."""
    rows = strict_json((base / "config.json").read_text())["vocab_size"]
    model, decoder = ("codi", "decoder") if kind == "simcot_codi" else ("base_causallm", "expainable_llm")
    state: dict[str, Tensor] = {}
    for part, weights in ((model, gpt2(rows + 3, seed=1)), (decoder, gpt2(rows, seed=2))):
        state |= {f"{part}.{name}": x for name, x in weights.state_dict().items()}
    torch.save(state, tmp_path / "checkpoint_28")
    return tmp_path / "checkpoint_28"


def import_(source: Path, kind: str, base: Path, *arguments: str) -> Outcome:
    folder = source.parent
    return run(IMPORT, f"source={source}", f"kind={kind}", f"base={base}", f"out={folder / 'out'}", *arguments,
               folder=folder)  # fmt: skip


def test_evals_probe_and_training_take_it(source: Path, kind: str, base: Path, sums: Path) -> None:
    folder, out = source.parent, source.parent / "out"
    outcome = import_(source, kind, base, "data=gsm8k", f"data.path={sums}").ok()
    assert kind in outcome.out
    assert "decoder of 2 blocks" in outcome.out
    assert {path.name for path in folder.iterdir()} == {"checkpoint_28", "out"}
    checkpoint = sl.load_checkpoint(out)
    expected = import_checkpoint(source, kind, base)
    for part in ("answers", "stage", "groups"):
        assert getattr(checkpoint, part) == getattr(expected, part)
    assert checkpoint.loop is not None
    assert expected.loop is not None
    assert checkpoint.loop.config == expected.loop.config

    asked = [row["question"] for row in read_lines(sums / "test.jsonl")][:5]
    run("evals.gsm8k", f"ckpt={out}", "limit=5", "max_new_tokens=6", "device=cpu", folder=folder).ok()
    report = strict_json(report_in(out / "evals").read_text())
    assert report["n"] == 5
    assert report["data"]["path"] == str(sums), "the data that import was told"
    assert report["steps"] == (5 if kind == "simcot_codi" else 10), "CODI's decoder is taught no last steps"
    assert report.get("answer_groups") == (None if kind == "simcot_codi" else 15), "CODI's decoder is taught no answers"
    predictions = read_lines(predictions_of(report_in(out / "evals")))
    answers = sl.generate_all(expected, asked, batch_size=5, max_new_tokens=6)
    assert [line["output"] for line in predictions] == [answer.text for answer in answers]
    decoded = sl.decode_steps(expected, sl.think(expected, asked))
    for line, texts in zip(predictions, decoded, strict=True):
        golds = line["gold_steps"]
        assert any(gold is not None for gold in golds)
        expected_texts = ["" if gold is None else text for text, gold in zip(texts, golds, strict=True)]
        assert line["decoded_steps"] == expected_texts

    probed = run(PROBE, f"ckpt={out}", "data=gsm8k", "limit=2", "format=json", "device=cpu", folder=folder).ok()
    probes = strict_json(probed.out)["probes"]
    assert [[group["decoded"] for group in probe["groups"]] for probe in probes] == decoded[:2]
    table = run(PROBE, f"ckpt={out}", "question=How many pens are 3 and 4?", "device=cpu", folder=folder).ok().out
    assert "decoded step" in table

    training = ("mode=latent", f"init_from={out}", "data=gsm8k", f"data.path={sums}", "num_iterations=2", "out_dir=run")
    small = ("device=cpu", "device_batch_size=4", "target_examples_per_step=4", "eval_examples=2", "max_new_tokens=4")
    run(TRAIN, *training, *small, "latent.n_latents=2", folder=folder).ok()
    trained = sl.load_checkpoint(folder / "run")
    assert trained.tokenizer == checkpoint.tokenizer
    assert trained.model.config == checkpoint.model.config


def test_what_the_file_cannot_tell(source: Path, kind: str, base: Path) -> None:
    import_(source, kind, base, "n_latents=3", "latents_per_step=1").ok()
    checkpoint = sl.load_checkpoint(source.parent / "out")
    assert checkpoint.stage == sl.Stage(3, first_written=None)
    assert checkpoint.n_states == checkpoint.n_groups == (4 if kind == "simcot_codi" else 3)
    assert checkpoint.groups.latents_per_step == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["source=null"], "source is missing; give source="),
        (["kind=null"], "kind is missing; give kind=one of coconut, simcot_coconut, codi, simcot_codi"),
        (["base=null"], "base is missing; give base="),
        (["out=null"], "out is missing; give out="),
        (["kind=lotus"], "kind=lotus: must be one of coconut, simcot_coconut, codi, simcot_codi"),
        (["n_latents=0"], "n_latents=0: must be at least 1"),
        (["latents_per_step=0"], "latents_per_step=0: must be at least 1"),
        (["latents_per_step=3"], "latents_per_step=3"),
        (["lora_alpha=0"], "lora_alpha=0.0: must be above 0"),
        (["lora_alpha=much"], "lora_alpha"),
        (["thoughts=3"], "thoughts"),
        (["base=nowhere"], "base=nowhere"),
        (["source=nowhere"], "source=nowhere: does not exist"),
        (["kind=codi"], "kind=codi: the tensors of"),
    ],
)
@pytest.mark.parametrize("kind", ["simcot_coconut"], indirect=True)
def test_mistakes_are_one_line(arguments: list[str], says: str, source: Path, kind: str, base: Path) -> None:
    before = contents(source.parent)
    assert says in import_(source, kind, base, *arguments).error
    assert contents(source.parent) == before, "nothing is left behind"


@pytest.mark.parametrize("kind", ["simcot_coconut"], indirect=True)
def test_what_is_there_stays(source: Path, kind: str, base: Path) -> None:
    import_(source, kind, base).ok()
    before = contents(source.parent)
    message = import_(source, kind, base).error
    assert f"out={source.parent / 'out'}: is there already" in message
    assert contents(source.parent) == before
