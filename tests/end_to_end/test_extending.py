"""docs/extending.md: its files are written and its commands run, both as they are printed, outside the repository."""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from commands import (
    ARITHMETIC,
    REPOSITORY,
    TINY,
    TRAIN,
    Outcome,
    predictions_of,
    read_lines,
    report_in,
    run,
    run_process,
    strict_json,
)
from documents import Command, blocks, commands, files

import simcot_latent as sl
from simcot_latent.config import LatentConfig, MethodConfig, RunConfig
from simcot_latent.curricula.base import Stage
from simcot_latent.data.sources.arithmetic import Arithmetic
from simcot_latent.data.tokenizer import default_tokenizer
from simcot_latent.interop.families import FAMILIES
from simcot_latent.interop.published_tokenizers import write_tokenizer
from simcot_latent.loops.sequential import Sequential, SequentialConfig
from simcot_latent.parts import PARTS, keys

pytestmark = pytest.mark.xdist_group("extending")  # the commands run once, one after the other

PAGE = REPOSITORY / "docs/extending.md"
FILES = files(PAGE)
COMMANDS = [command for command in commands(PAGE) if command.is_block]
SHORT = ("num_iterations=4", "eval_every=-1", "checkpoint_every=-1")
QUESTION = "Eva wins 6 marbles. She wins 3 more marbles. How many marbles does Eva have?"


@dataclass
class Reader:
    """Somebody who has typed all of the page.

    Attributes:
        folder: where.
        outcomes: what came of each command.
    """

    folder: Path
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def type(self, *words: str) -> Outcome:
        """`python -m words` in the folder, with what makes it take a second."""
        with as_in_a_new_process(self.folder):
            return run(words[0], *words[1:], *made_small(words), folder=self.folder)

    def metrics(self, out_dir: str) -> list[dict[str, float]]:
        return read_lines(self.folder / out_dir / "metrics.jsonl")

    def checkpoint(self, out_dir: str) -> sl.Checkpoint:
        return sl.load_checkpoint(self.folder / out_dir)


def made_small(words: tuple[str, ...]) -> list[str]:
    """What makes a command take a second: options that it does not give."""
    if words[0] != TRAIN:
        return ["device=cpu"] if words[0] != "simcot_latent.export" else []
    given = {word.partition("=")[0] for word in words}
    more = [*TINY, *SHORT, *(ARITHMETIC if "data" not in given else ())]
    kept = (word for word in more if not ("init_from" in given and word.startswith("model.")))
    return [word for word in kept if word.partition("=")[0] not in given]


@contextmanager
def as_in_a_new_process(folder: Path) -> Iterator[None]:
    """`python -m` finds modules in its folder; what is imported and registered is forgotten afterwards."""
    families = list(FAMILIES)
    own = {Path(name).stem for name in FILES if name.endswith(".py")}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        for group, table in PARTS.items():
            patch.setitem(PARTS, group, dict(table))
        try:
            yield
        finally:
            FAMILIES[:] = families
            for name in own:
                sys.modules.pop(name, None)


def make_olmo(folder: Path) -> None:
    """A small OLMo with random weights, as `transformers` saves it, and a tokenizer."""
    from transformers import OlmoConfig, OlmoForCausalLM

    torch.manual_seed(0)
    tokenizer = default_tokenizer()
    config = OlmoConfig(
        vocab_size=tokenizer.n_vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=tokenizer.end_id,
        pad_token_id=None,
    )
    OlmoForCausalLM(config).save_pretrained(folder)
    write_tokenizer(tokenizer, folder)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """A reader who has written all files and typed all commands, from the top of the page to its end."""
    reader = Reader(tmp_path_factory.mktemp("reader"))
    for name, text in FILES.items():
        (reader.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (reader.folder / name).write_text(text, encoding="utf-8")
    make_olmo(reader.folder / "path/to/OLMo-1B")
    for command in COMMANDS:
        assert command.words[:2] == ("python", "-m")
        reader.outcomes[command.line] = reader.type(*command.words[2:])
    return reader


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.line)
def test_commands_run_as_printed(command: Command, reader: Reader) -> None:
    reader.outcomes[command.line].ok()


@pytest.mark.parametrize("out_dir", ["runs/mine", "runs/tide", "runs/contrast", "runs/noisy", "runs/olmo"])
def test_each_is_trained_evaluated_and_probed(out_dir: str, reader: Reader) -> None:
    modules = [
        c.module
        for c in COMMANDS
        if out_dir in c.line or (c.module == TRAIN and {f"mode={out_dir[5:]}", f"method={out_dir[5:]}"} & {*c.words})
    ]
    assert {TRAIN, "simcot_latent.probe"} < set(modules)
    name = "mine" if out_dir == "runs/mine" else "arithmetic"
    report = strict_json(report_in(reader.folder / out_dir / "evals", f"{name}.test").read_text(encoding="utf-8"))
    assert report["n"] == (1 if name == "mine" else 12)
    assert report["steps"] > 0


def test_all_files_are_listed() -> None:
    listed = next(block for block in blocks(PAGE, "text") if "eval_mine.py" in block)
    assert sorted(listed.split()) == sorted(FILES)
    assert len([line for line in FILES["contrast.py"].splitlines() if line]) <= 25


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.module == TRAIN], ids=lambda command: command.line)
def test_what_training_prints_next_works(command: Command, reader: Reader) -> None:
    out = reader.outcomes[command.line].out
    lines = re.findall(r"^next: python -m (.+)$", out, re.MULTILINE)
    assert len(lines) == (1 if "data=mine" in command.words else 2)
    for line in lines:
        done = reader.type(*shlex.split(line)).ok()
        if line.startswith("simcot_latent.probe"):
            question = shlex.split(line)[-1].removeprefix("question=")
            assert question.split()[0] in done.out, "a problem that was held out"


# --- the data source, and its eval -----------------------------------------------------------------------------------


def test_problems_are_those_of_the_files(reader: Reader) -> None:
    with as_in_a_new_process(reader.folder):
        from mine import Mine  # type: ignore[import-not-found]

        source = Mine(str(reader.folder / "problems"))
        splits = {split: source.load(split).problems for split in ("train", "validation", "test")}
    assert {split: len(problems) for split, problems in splits.items()} == {"train": 2, "validation": 1, "test": 1}
    (problem,) = splits["test"]
    assert problem.question.startswith("Dan has 4 boxes")
    assert ([step.text for step in problem.steps], problem.answer) == (["<<4*6=24>>", "<<24-5=19>>"], "19")
    lines = read_lines(predictions_of(report_in(reader.folder / "runs/mine/evals", "mine.test")))
    assert [(line["question"], line["gold"]) for line in lines] == [(problem.question, "19")]
    assert lines[0]["gold_steps"][:2] == ["<<4*6=24>>", "<<24-5=19>>"]


def test_mistakes_in_the_data_end_in_a_line(reader: Reader, tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text('{"problem": "How many?", "solution": "", "answer": "1"}\n')
    train = (TRAIN, "data=mine", "--config-dir", "conf")
    broken = reader.type(*train, f"data.path={tmp_path}").error
    assert 'train.jsonl:1: no "result"; every row must be an object with "problem", "solution" and "result"' in broken
    assert reader.type(*train, "data.path=null").error == (
        "error: data.path=null: must be a folder or a file, as these data are not on the hub"
    )


# --- the method ------------------------------------------------------------------------------------------------------


def test_the_stages_come_in_waves(reader: Reader) -> None:
    run = RunConfig(mode="", model={}, data={}, tokenizer={}, rationale="equations")
    config = MethodConfig.simcot(LatentConfig(n_latents=8, latents_per_step=2, warmup=0.2), own={"waves": 2})
    with as_in_a_new_process(reader.folder):
        from tide import Waves  # type: ignore[import-not-found]

        curriculum = Waves(config, run)
    wave = [Stage(2, 1), Stage(4, 2), Stage(6, 3), Stage(8, None)]
    assert [curriculum.stage_at((tenth + 0.5) / 10) for tenth in range(10)] == [Stage(), Stage(), *wave, *wave]
    assert curriculum.stage_at(1.0) == Stage(8, None)


def test_thoughts_stay_near_the_norm_of_embeddings(reader: Reader) -> None:
    lines, checkpoint = reader.metrics("runs/tide"), reader.checkpoint("runs/tide")
    for line in (line for line in lines if line.get("n_latents")):
        total = line["answer_loss"] + 2 * line["step_loss"] + 0.01 * line["calm_loss"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)
    rows = checkpoint.model.embedding.weight.detach()
    wanted = sum(float(row.norm()) for row in rows) / len(rows)
    thoughts = [latents for problem in validation_problems() for latents in sl.think(checkpoint, [problem]).latents[0]]
    calm = sum((float(thought.norm()) / wanted - 1) ** 2 for thought in thoughts) / len(thoughts)
    assert lines[-1]["val_calm_loss"] == pytest.approx(calm, rel=1e-3)


def test_mistakes_in_the_settings_of_the_method_end_in_a_line(reader: Reader) -> None:
    train = (TRAIN, "method=tide", "use=[tide]", "--config-dir", "conf", "out_dir=runs/wrong")
    assert reader.type(*train, "latent.waves=0").error == "error: latent.waves=0: must be at least 1"
    nothing = ("loop=none", "steps=none", "terms=[]", "~loss.calm_weight")
    assert "curriculum=waves: needs thoughts, which loop=none has not" in reader.type(*train, *nothing).error
    assert "rationale=natural: must be equations" in reader.type(*train, "rationale=natural").error
    assert reader.type(TRAIN, "method=tide", "--config-dir", "conf", "out_dir=runs/wrong").error.startswith(
        "error: curriculum=waves: must be one of fixed_k, none, remove_tokens, replace; a part of your own"
    )


# --- the term --------------------------------------------------------------------------------------------------------


def contrast(thoughts: torch.Tensor, temperature: float) -> float:
    """The loss of the page of one problem's thoughts (K, D), a number at a time."""
    total = 0.0
    for i, own in enumerate(thoughts):
        similar = [float(own @ other / (own.norm() * other.norm())) / temperature for other in thoughts]
        total += math.log(sum(math.exp(x) for x in similar)) - similar[i]
    return total / len(thoughts)


def validation_problems() -> list[str]:
    """The questions that the runs are validated on."""
    problems = Arithmetic(train_size=64, validation_size=8, test_size=12, version=2).load("validation").problems[:4]
    return [problem.question for problem in problems]


def mean_contrast(checkpoint: sl.Checkpoint) -> float:
    """The same over the problems that the runs are validated on."""
    thoughts = sl.think(checkpoint, validation_problems())
    return sum(contrast(latents, 0.1) for latents in thoughts.latents) / 4


def test_the_term_is_the_loss_that_it_is_said_to_be(reader: Reader) -> None:
    lines = reader.metrics("runs/contrast")
    thinking = [line for line in lines if line.get("n_latents")]
    assert len(thinking) == 3
    for line in thinking:
        total = line["answer_loss"] + 2 * line["step_loss"] + 0.3 * line["contrast_loss"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)
    expected = mean_contrast(reader.checkpoint("runs/contrast"))
    assert expected > 0.1
    assert lines[-1]["val_contrast_loss"] == pytest.approx(expected, rel=1e-4)


def test_its_weight_works_and_pieces_of_a_step_add_up(reader: Reader) -> None:
    train = (TRAIN, "mode=contrast", "use=[contrast]", "--config-dir", "conf")
    for name, *words in (
        ("whole", "loss.contrast_weight=0.3", "device_batch_size=8"),
        ("off", "loss.contrast_weight=0"),
    ):
        reader.type(*train, *words, f"out_dir=runs/{name}").ok()
    reader.type(TRAIN, "mode=latent", "out_dir=runs/plain").ok()
    off, plain = reader.metrics("runs/off"), reader.metrics("runs/plain")
    assert [line["loss"] for line in off if "loss" in line] == [line["loss"] for line in plain if "loss" in line]
    assert all("contrast_loss" not in line for line in off)
    whole, pieces = (
        [line["contrast_loss"] for line in reader.metrics(f"runs/{name}") if "contrast_loss" in line]
        for name in ("whole", "contrast")
    )
    assert len(whole) == 3
    assert whole == pytest.approx(pieces, rel=1e-3)
    assert mean_contrast(reader.checkpoint("runs/contrast")) < mean_contrast(reader.checkpoint("runs/plain"))


# --- the loop --------------------------------------------------------------------------------------------------------


def test_noise_is_there_in_training_alone(reader: Reader) -> None:
    train = (TRAIN, "loop=noisy", "use=[noisy]", "--config-dir", "conf")
    reader.type(*train, "latent.noise=0", "out_dir=runs/silent").ok()
    reader.type(TRAIN, "out_dir=runs/sequential").ok()
    noisy, silent, plain = (
        [line["loss"] for line in reader.metrics(f"runs/{name}") if "loss" in line]
        for name in ("noisy", "silent", "sequential")
    )
    assert silent == plain
    assert [a == b for a, b in zip(noisy, plain, strict=True)] == [True, False, False, False]  # first without thoughts
    with as_in_a_new_process(reader.folder):
        import noisy as module  # type: ignore[import-not-found]

        ckpt = reader.checkpoint("runs/noisy")
        assert ckpt.loop is not None
        assert type(ckpt.loop) is module.Noisy
        assert ckpt.loop.config == module.NoisyConfig(noise=0.2)
        latents = sl.think(ckpt, [QUESTION]).latents
        assert torch.equal(latents, sl.think(ckpt, [QUESTION]).latents)
        ckpt.loop = Sequential(32, SequentialConfig())
        assert torch.equal(latents, sl.think(ckpt, [QUESTION]).latents)
    config = strict_json((reader.folder / "runs/noisy/latest/config.json").read_text(encoding="utf-8"))
    assert config["loop"] == {
        "key": "noisy",
        "settings": {"feeds_last": True, "projector_width": None, "noise": 0.2},
    }


def test_a_loop_that_nobody_registered(reader: Reader) -> None:
    error = reader.type("evals.arithmetic", "ckpt=runs/noisy").error
    there = ", ".join(keys("loop"))
    assert f"loop.key=noisy: must be one of {there}; a part of your own is registered by" in error
    assert "use=[module]" in error
    error = reader.type(TRAIN, "loop=noisy", "--config-dir", "conf", "out_dir=runs/nobody").error
    assert error.startswith(f"error: loop=noisy: must be one of {there}")
    assert reader.type(TRAIN, "use=[nosy]").error.startswith("error: use=[nosy]: cannot be imported")


def test_the_program(reader: Reader) -> None:
    """In a process of its own, where the current folder is found as Python finds it."""
    (program,) = (block for block in blocks(PAGE, "python") if block not in FILES.values())
    loop, answers = run_process("-c", program, folder=reader.folder).ok().out.splitlines()
    assert loop == "Noisy()"
    assert answers.startswith("[")


# --- the family ------------------------------------------------------------------------------------------------------


def test_the_family_is_that_of_transformers(reader: Reader) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.randint(0, 2000, (3, 17), generator=torch.Generator().manual_seed(0))
    with as_in_a_new_process(reader.folder):
        import olmo  # type: ignore[import-not-found]  # noqa: F401

        published = sl.load_pretrained(reader.folder / "path/to/OLMo-1B").model
    ours = {"path/to/OLMo-1B": published, "exported_olmo": reader.checkpoint("runs/olmo").model}
    for folder, model in ours.items():
        with torch.no_grad():
            theirs = AutoModelForCausalLM.from_pretrained(reader.folder / folder)(ids).logits
            logits = model.logits(model(ids)).view(*theirs.shape[:2], -1)
        assert theirs.std() > 0.1
        torch.testing.assert_close(logits, theirs, atol=1e-4, rtol=1e-4)


def test_without_its_row_the_family_is_refused(reader: Reader) -> None:
    start = f"init_from={reader.folder / 'path/to/OLMo-1B'}"
    assert "model_type=olmo: must be one of gpt2, llama" in reader.type(TRAIN, start, "out_dir=runs/unknown").error
    assert "no published family is like this model" in (
        reader.type("simcot_latent.export", "ckpt=runs/olmo", "out=elsewhere").error
    )
    config = reader.folder / "path/to/clipped/config.json"
    config.parent.mkdir()
    config.write_text(
        (reader.folder / "path/to/OLMo-1B/config.json").read_text().replace('"clip_qkv": null', '"clip_qkv": 8.0')
    )
    (config.parent / "model.safetensors").symlink_to(reader.folder / "path/to/OLMo-1B/model.safetensors")
    error = reader.type(TRAIN, "use=[olmo]", "init_from=path/to/clipped", "out_dir=runs/clipped").error
    assert "clip_qkv=8.0 of a olmo is not supported, only None" in error
