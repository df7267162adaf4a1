"""Fixtures that several test files share: small random models, tokenizers, a few problems.

What a test has to call itself (a factory with arguments) is a fixture too, so no test file imports another.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from torch import Tensor, nn

from simcot_latent.config import RunConfig
from simcot_latent.data.problem import Problem, parse_steps
from simcot_latent.data.tokenizer import Tokenizer, default_tokenizer, gpt2_tokenizer
from simcot_latent.model.gpt import GPT, GPTConfig

SHARED = Path(__file__).resolve().parents[2] / "shared"
"""Reference data beside a checkout; tests that need them skip, and say so, where they are not there."""

REFERENCE = Path(__file__).resolve().parent / "reference"
"""Numbers of the public code of other methods, see its README.md; part of the repository."""

# Between them these use every variant that GPTConfig offers.
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"positions": "learned", "norm": "layernorm", "activation": "gelu_tanh", "bias": True},
    "llama": {"norm": "rmsnorm", "activation": "swiglu", "n_kv_head": 2, "ffn_width": 48, "tie_head": False},
    "nanochat": {
        "norm": "rmsnorm",
        "norm_scale": False,
        "activation": "relu2",
        "n_kv_head": 1,
        "qk_norm": True,
        "logit_softcap": 15.0,
    },
}


# For tests/mutation: a failure is enough, nobody reads its simplest example.
settings.register_profile("mutation", phases=[Phase.explicit, Phase.generate], database=None)


def pytest_configure() -> None:
    # The tests' models are so small that a second thread only gets in the way of the other test process.
    torch.set_num_threads(1)


def randomise_weights(module: nn.Module, seed: int = 0) -> None:
    """Random numbers in which every parameter matters: biases are not 0, scales not 1, blocks outweigh embeddings.

    With weights as training starts from them, a tied model mostly repeats the token it has just read.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.data = 0.1 * noise + (0.0 if name.endswith("bias") else 1.0)
        elif "embedding" in name or "positions" in name:
            parameter.data = 0.5 * noise
        else:
            parameter.data = 1.4 * noise * parameter.shape[1] ** -0.5


def build_model(family: str = "nanochat", *, seed: int = 0, **changes: Any) -> GPT:
    """A tiny GPT with the weights of `randomise_weights`."""
    shape: dict[str, Any] = {"vocab_size": 61, "context_length": 128, "n_layer": 2, "n_head": 4, "n_embd": 32}
    model = GPT(GPTConfig(**(shape | FAMILIES[family] | changes)))
    randomise_weights(model, seed)
    return model.eval()


@pytest.fixture(scope="session")
def randomise() -> Callable[..., None]:
    """`randomise(module, seed=0)`; see `randomise_weights`."""
    return randomise_weights


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Weights that a test leaves to torch are the same in every run, and whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., GPT]:
    """`make_model(family, seed=0, **changes)`: a tiny random GPT; see `build_model`."""
    return build_model


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> GPT:
    """A tiny random GPT of each family in turn, vocabulary 61, context 128."""
    return build_model(request.param)


def equal_gradients(ours: Tensor, theirs: Tensor, module: nn.Module, tolerance: float = 1e-4) -> None:
    """Asserts that two scalars have the same gradient, to rounding, in every parameter that they may depend on.

    That is all of them but an output head of its own, which hidden states do not know.
    """
    named = {name: parameter for name, parameter in module.named_parameters() if not name.startswith("head.")}
    gradients = [torch.autograd.grad(scalar, list(named.values())) for scalar in (ours, theirs)]
    for name, our, their in zip(named, *gradients, strict=True):
        scale = their.abs().max().item()
        assert scale > 0, f"{name} has no gradient: the comparison would be empty"
        torch.testing.assert_close(
            our, their, atol=tolerance * scale, rtol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(scope="session")
def assert_equal_gradients() -> Callable[..., None]:
    """`assert_equal_gradients(ours, theirs, module, tolerance=1e-4)`; see `equal_gradients`."""
    return equal_gradients


def gpt2_weights_by_our_names(tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """GPT-2's weights (or gradients) under Hugging Face's names, by ours. Their linear weights are (in, out)."""
    parts = {"wte": "embedding", "wpe": "transformer.positions", "ln_f": "transformer.norm"}
    in_block = {"ln_1": "attention_norm", "ln_2": "mlp_norm", "attn.c_attn": "attention.qkv",
                "attn.c_proj": "attention.out", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}  # fmt: skip
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(rf"{re.escape(prefix)}transformer\.(?:h\.(\d+)\.)?(.+)\.(weight|bias)", name):
            layer, part, kind = match.groups()
            ours = parts[part] if layer is None else f"transformer.blocks.{layer}.{in_block[part]}"
            renamed[f"{ours}.{kind}"] = tensor.T if ".c_" in part and kind == "weight" else tensor
    return renamed


@pytest.fixture(scope="session")
def from_hf_gpt2() -> Callable[..., dict[str, Tensor]]:
    """`from_hf_gpt2(tensors, prefix="")`; see `gpt2_weights_by_our_names`."""
    return gpt2_weights_by_our_names


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The default tokenizer."""
    return default_tokenizer()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data."""
    if not SHARED.is_dir():
        pytest.skip(f"no reference data: {SHARED} is not there")
    return SHARED


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of reference numbers; see its README.md."""
    return REFERENCE


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    """tiktoken's GPT-2 encoding, without network."""
    source = SHARED / "data" / "tiktoken_cache"
    if not source.is_dir():
        pytest.skip(f"no GPT-2 files for tiktoken: {source} is not there")
    cache = tmp_path_factory.mktemp("tiktoken_cache")  # a copy: tiktoken deletes files that it finds wrong
    for file in source.iterdir():
        shutil.copyfile(file, cache / file.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        yield gpt2_tokenizer()


@pytest.fixture(params=["default", "gpt2"])
def either_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """The default tokenizer and GPT-2's in turn."""
    return request.getfixturevalue("tokenizer" if request.param == "default" else "gpt2")


def build_problem(question: str, rationale: str, answer: str) -> Problem:
    """A problem from its text, its steps found in the rationale."""
    return Problem(question, parse_steps(rationale)[0], rationale, answer)


@pytest.fixture(scope="session")
def make_problem() -> Callable[[str, str, str], Problem]:
    """`make_problem(question, rationale, answer)`; see `build_problem`."""
    return build_problem


@pytest.fixture(scope="session")
def problems() -> list[Problem]:
    """Problems of 2, 0, 1, 4 and 3 steps and of different lengths."""
    texts = [
        ("Ann has 3 bags of 4 pears and eats 2.", "She has 3*4=<<3*4=12>>12. Then 12-2=<<12-2=10>>10.", "10"),
        ("How many legs has a dog?", "A dog has four legs.", "4"),
        ("Half of 9?", "It is 9/2=<<9/2=4.5>>4.5 (half).", "4.5"),
        (
            "Joe saves $5 a day for a week, buys a $12 book, doubles the rest and gives $6 away. What is left?",
            "$5*7=$<<5*7=35>>35\n35-12=<<35-12=23>>23 dollars\n23*2=<<23*2=46>>46\nso 46-6=<<46-6=40>>40",
            "40",
        ),
        ("1+1, +1, +1?", "<<1+1=2>>2 and <<2+1=3>>3 and <<3+1=4>>4", "4"),
    ]
    return [build_problem(*text) for text in texts]


@pytest.fixture(scope="session")
def make_run() -> Callable[..., RunConfig]:
    """`make_run(**changes)`: a RunConfig for methods that are built by hand."""

    def make(**changes: Any) -> RunConfig:
        shared: dict[str, Any] = {"mode": "", "model": {}, "data": {}, "tokenizer": {}}
        return RunConfig(**(shared | changes))

    return make
