"""Every experiment and every method preset, composed as a command line does, makes a method; and the experiments that
say they are published recipes have the published numbers, written down here a second time.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from documents import REPOSITORY
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, open_dict

from simcot_latent.config import MethodConfig, RunConfig, as_plain, config_dir, parse
from simcot_latent.data.problem import Problem
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.method import Method
from simcot_latent.model.gpt import GPT, GPTConfig

EXPERIMENTS = sorted(path.stem for path in (config_dir() / "experiment").glob("*.yaml"))
METHODS = sorted(path.stem for path in (config_dir() / "method").glob("*.yaml"))
RECIPES = [name for name in EXPERIMENTS if "gsm8k_aug" in name]


def composed(*overrides: str) -> Any:
    with initialize_config_dir(str(config_dir().resolve()), version_base=None):
        raw = compose("train", [*overrides])
    with open_dict(raw):
        raw.pop("use")
    return raw


@pytest.mark.parametrize(
    "choice", [f"experiment={name}" for name in EXPERIMENTS] + [f"method={name}" for name in METHODS]
)
def test_each_makes_a_method_that_learns(choice: str, tokenizer: Tokenizer, problems: list[Problem]) -> None:
    """With a small model; one step of its last stage."""
    run, config = parse(composed(choice))
    torch.manual_seed(0)
    model = GPT(GPTConfig(tokenizer.n_vocab, context_length=512, n_layer=2, n_head=2, n_embd=16))
    method = Method(model, tokenizer, run, config)
    batch = method.collate([method.encode(problem) for problem in problems], method.last_stage)
    shares = method(batch, batch.totals)
    loss = shares["loss"]
    loss.backward()
    assert shares.keys() <= described_metrics()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.grad is not None)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters())


def described_metrics() -> set[str]:
    """The keys in the first column of the tables of `docs/running.md` about metrics.jsonl."""
    section = (REPOSITORY / "docs/running.md").read_text(encoding="utf-8").split("\n## metrics.jsonl\n")[1]
    cells = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")]
    return {key for cell in cells for key in re.findall(r"`(\w+)`", cell)}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_a_few_lines(name: str) -> None:
    """What it starts from is another experiment, which its first lines name."""
    text = (config_dir() / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert 3 <= len(lines) <= 14
    start = str(composed(f"experiment={name}").init_from)
    if not start.startswith("runs/"):
        return
    (before,) = {word for word in text.split() if word.startswith("experiment=")} or {None}
    assert before is not None
    assert before.removeprefix("experiment=") in EXPERIMENTS
    assert f"out_dir={start}" in text or "give init_from=" in text


GPT2 = {"init_from": "openai-community/gpt2", "data._target_": "simcot_latent.data.sources.gsm8k_aug.GSM8KAug"}
LLAMA = GPT2 | {"init_from": "meta-llama/Llama-3.2-1B-Instruct", "lora.split": True}
FULL = {
    "optimizer": "adamw",
    "learning_rate": 1e-4,
    "weight_decay": 0.01,
    "lr_schedule": "constant",
    "warmup_ratio": 0.0,
    "max_grad_norm": None,
    "target_examples_per_step": 128,
    "dtype": "float32",
    "new_token_init": "<<",
    "lora.rank": None,
    "rationale": "equations",
    "step_weight_multiplier": 1.0,
}
LORA = {
    "optimizer": "adamw",
    "weight_decay": 0.1,
    "lr_schedule": "cosine",
    "warmup_ratio": 0.03,
    "max_grad_norm": 2.0,
    "target_examples_per_step": 128,
    "dtype": "bfloat16",
    "lora.rank": 128,
    "lora.alpha": 32.0,
    "lora.dropout": 0.1,
    "lora.targets": ["qkv", "out", "up", "down"],
    "lora.new_rows": False,
    "latent.drop_last_step": True,
    "step_weight_multiplier": 1.0,
    "curriculum": "none",
    "written": "joint",
    "loss.written_weight": 1.0,
    "loss.distill_distance": "smooth_l1",
    "loss.distill_norm": "std",
}
CODI = LORA | {
    "loop": "sequential",
    "distill": ["hidden"],
    "loss.distill_layers": "all",
    "latent.n_latents": 6,
    "latent.latents_per_step": 1,
}
PCCOT = LORA | {
    "loop": "jacobi",
    "distill": ["hidden"],
    "steps": "none",
    "loss.distill_layers": "blocks",
    "latent.n_latents": 24,
    "latent.iterations": 3,
    "latent.projector_width": None,
    "max_grad_norm": 1.0,
}
WHOLE_DECODER = {"steps": "decoder", "decoder.n_layer": None, "decoder.init": "base", "loss.step_weight": 1.0}
SIMCOT_CODI = WHOLE_DECODER | {"latent.feeds_last": False, "latent.missing": "mask", "loss.step_reduction": "codi"}
LOTUS = FULL | {
    "loop": "looped",
    "steps": "own_head",
    "curriculum": "replace",
    "max_grad_norm": 1.0,
    "latent.loops": 6,
    "latent.warmup": 0,
    "latent.stages": [{"steps": steps, "epochs": 1} for steps in range(1, 6)],
    "latent.surplus": "write",
    "latent.reset_optimizer": False,
    "loss.step_weight": 0.05,
    "loss.own_head_end": False,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "gpt2_gsm8k_aug_cot": GPT2 | FULL | {"num_epochs": 25, "loop": "none", "curriculum": "none"},
    "gpt2_gsm8k_aug_coconut": GPT2
    | FULL
    | {
        "num_epochs": 22,
        "loop": "sequential",
        "steps": "none",
        "curriculum": "replace",
        "latent.n_latents": 10,
        "latent.latents_per_step": 2,
        "latent.warmup": 0,
        "latent.stages": [{"steps": steps, "epochs": 3} for steps in range(1, 5)],
        "latent.reset_optimizer": True,
        "latent.feeds_last": True,
        "latent.projector_width": None,
        "init_from": "runs/gpt2_cot",
    },
    "gpt2_gsm8k_aug_simcot_coconut": GPT2
    | FULL
    | WHOLE_DECODER
    | {
        "num_epochs": 10,
        "target_examples_per_step": 64,
        "latent.n_latents": 10,
        "latent.latents_per_step": 2,
        "latent.warmup": 0,
        "latent.stages": 0,
        "latent.missing": "answer",
        "latent.surplus": "merge",
        "loss.step_reduction": "coconut",
        "init_from": "runs/gpt2_coconut",
    },
    "gpt2_gsm8k_aug_codi": GPT2
    | CODI
    | {
        "steps": "none",
        "learning_rate": 3e-3,
        "num_epochs": 40,
        "loss.distill_weight": 1.0,
        "latent.projector_width": 768,
    },
    "gpt2_gsm8k_aug_simcot_codi": GPT2
    | CODI
    | SIMCOT_CODI
    | {"learning_rate": 3e-3, "num_epochs": 40, "loss.distill_weight": 1.0, "latent.projector_width": 768},
    "gpt2_gsm8k_aug_pccot": GPT2
    | PCCOT
    | {"learning_rate": 3e-3, "num_epochs": 40, "loss.distill_weight": 1.0, "weight_decay": 0.01},
    "gpt2_gsm8k_aug_lotus": GPT2 | LOTUS | {"num_epochs": 30, "latent.n_latents": 78, "latent.latents_per_step": 13},
    "gpt2_gsm8k_aug_icot": GPT2
    | FULL
    | {
        "curriculum": "remove_tokens",
        "loop": "none",
        "learning_rate": 5e-5,
        "max_grad_norm": 1.0,
        "target_examples_per_step": 32,
        "latent.remove_per_epoch": 8,
        "latent.remove_side": "left",
        "latent.remove_all_at": 39,
        "latent.removal_smoothing": 4.0,
        "latent.pretrain_epochs": 0,
        "latent.reset_optimizer": True,
    },
    "llama1b_gsm8k_aug_cot": LLAMA | FULL | {"learning_rate": 1e-5, "num_epochs": 5},
    "llama1b_gsm8k_aug_coconut": LLAMA
    | FULL
    | {"learning_rate": 1e-5, "num_epochs": 5, "latent.warmup": 0, "init_from": "runs/llama1b_cot", "steps": "none"},
    "llama1b_gsm8k_aug_codi": LLAMA
    | CODI
    | {
        "steps": "none",
        "learning_rate": 8e-4,
        "num_epochs": 10,
        "loss.distill_weight": 20.0,
        "latent.projector_width": 2048,
    },
    "llama1b_gsm8k_aug_simcot_codi": LLAMA
    | CODI
    | SIMCOT_CODI
    | {"learning_rate": 8e-4, "num_epochs": 10, "loss.distill_weight": 20.0, "latent.projector_width": 2048},
    "llama1b_gsm8k_aug_pccot": LLAMA | PCCOT | {"learning_rate": 8e-4, "num_epochs": 10, "loss.distill_weight": 20.0},
    "llama1b_gsm8k_aug_lotus": LLAMA
    | LOTUS
    | {"num_epochs": 100, "latent.n_latents": 150, "latent.latents_per_step": 25},
    "llama1b_gsm8k_aug_kava": LLAMA
    | LORA
    | {
        "loop": "jacobi",
        "distill": ["hidden", "kv"],
        "learning_rate": 8e-4,
        "num_epochs": 10,
        "latent.n_latents": 24,
        "latent.iterations": 3,
        "loss.distill_weight": 10.0,
        "loss.kv_weight": 1.0,
        "loss.kv_distance": "smooth_l1",
        "loss.kv_select": "rkv",
        "loss.kv_lambda": 0.1,
    },
    "llama1b_gsm8k_aug_colar": LLAMA
    | FULL
    | {
        "loop": "compressed",
        "steps": "compressed",
        "target_examples_per_step": 256,
        "num_epochs": 50,
        "lora.rank": 128,
        "lora.alpha": 32.0,
        "latent.compressions": [1, 2, 3, 4, 5],
        "latent.merge": "sqrt",
        "latent.warmup": 0,
        "init_from": "runs/llama1b_cot",
    },
}
"""The keys of each recipe; where they are from stands in `docs/methods.md`."""


@pytest.mark.parametrize("name", RECIPES)
def test_a_published_recipe_has_the_published_numbers(name: str) -> None:
    raw = composed(f"experiment={name}")
    found = {key: OmegaConf.select(raw, key) for key in PUBLISHED[name]}
    found = {key: OmegaConf.to_container(x) if OmegaConf.is_config(x) else x for key, x in found.items()}
    assert found == PUBLISHED[name]


def test_every_recipe_is_in_the_table() -> None:
    assert sorted(PUBLISHED) == RECIPES
    wanted = {
        f"gpt2_gsm8k_aug_{name}"
        for name in ["cot", "coconut", "simcot_coconut", "codi", "simcot_codi", "pccot", "lotus", "icot"]
    }
    wanted |= {
        f"llama1b_gsm8k_aug_{name}" for name in ["coconut", "codi", "simcot_codi", "pccot", "lotus", "kava", "colar"]
    }
    assert wanted <= set(RECIPES)


def test_stages_take_the_published_epochs(tokenizer: Tokenizer) -> None:
    """Coconut: three epochs with two thoughts, three with four, .., and the rest of 22 with all ten."""
    run, config = parse(composed("experiment=gpt2_gsm8k_aug_coconut"))
    method = small(run, config, tokenizer)
    thoughts = [method.stage_at((epoch + 0.5) / run.num_epochs).thoughts for epoch in range(run.num_epochs)]
    assert thoughts == [2] * 3 + [4] * 3 + [6] * 3 + [8] * 3 + [10] * 10
    run, config = parse(composed("experiment=gpt2_gsm8k_aug_lotus"))
    method = small(run, config, tokenizer)
    thoughts = [method.stage_at((epoch + 0.5) / run.num_epochs).thoughts for epoch in range(run.num_epochs)]
    assert thoughts == [13, 26, 39, 52, 65] + [78] * 25


def small(run: RunConfig, config: MethodConfig, tokenizer: Tokenizer) -> Method:
    model = GPT(GPTConfig(tokenizer.n_vocab, context_length=512, n_layer=1, n_head=2, n_embd=16))
    return Method(model, tokenizer, run, config)


def test_the_options_of_a_recipe_may_be_changed() -> None:
    """The command line wins over an experiment, and an experiment over the recipes that it is made of."""
    raw = as_plain(composed("experiment=gpt2_gsm8k_aug_codi", "lora.rank=8", "method=simcot_codi", "data=gsm8k"))
    assert (raw["lora"]["rank"], raw["mode"], raw["steps"]) == (8, "simcot_codi", "decoder")
    assert raw["data"]["_target_"].endswith("GSM8K")
    assert raw["learning_rate"] == 3e-3
