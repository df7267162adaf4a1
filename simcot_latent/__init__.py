"""simcot_latent: latent reasoning with step supervision (SIM-CoT, https://arxiv.org/abs/2509.20317).

The public names are imported when they are first used, so that `import simcot_latent` and `python -m simcot_latent.<x>`
load no more than they need.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from simcot_latent.checkpoint import Checkpoint, load_checkpoint
    from simcot_latent.curricula.base import Stage
    from simcot_latent.data.format import AnswerFormat
    from simcot_latent.errors import UserError
    from simcot_latent.generate import Generation, Sampling, answer, generate_all
    from simcot_latent.interop.pretrained import load_pretrained
    from simcot_latent.loops.base import ThoughtLoop, Thoughts
    from simcot_latent.model.gpt import GPT, GPTConfig
    from simcot_latent.parts import register
    from simcot_latent.probing.steps import probe_problems, probe_questions
    from simcot_latent.probing.thoughts import decode_steps, think
    from simcot_latent.terms.step_decoder import StepDecoder
    from simcot_latent.terms.steps import StepGroups

_MODULE_OF = {
    "Checkpoint": "checkpoint",
    "load_checkpoint": "checkpoint",
    "UserError": "errors",
    "Generation": "generate",
    "Sampling": "generate",
    "answer": "generate",
    "generate_all": "generate",
    "GPT": "model.gpt",
    "GPTConfig": "model.gpt",
    "AnswerFormat": "data.format",
    "Stage": "curricula.base",
    "StepDecoder": "terms.step_decoder",
    "StepGroups": "terms.steps",
    "ThoughtLoop": "loops.base",
    "Thoughts": "loops.base",
    "register": "parts",
    "decode_steps": "probing.thoughts",
    "load_pretrained": "interop.pretrained",
    "probe_problems": "probing.steps",
    "probe_questions": "probing.steps",
    "think": "probing.thoughts",
}

_SUCCESSORS = {
    "ThoughtFormat": "is AnswerFormat (texts), Stage (how many thoughts) and StepGroups (thoughts per step) now",
}
"""Names of earlier versions, and what became of them."""

__all__ = [
    "GPT",
    "AnswerFormat",
    "Checkpoint",
    "GPTConfig",
    "Generation",
    "Sampling",
    "Stage",
    "StepDecoder",
    "StepGroups",
    "ThoughtLoop",
    "Thoughts",
    "UserError",
    "answer",
    "decode_steps",
    "generate_all",
    "load_checkpoint",
    "load_pretrained",
    "probe_problems",
    "probe_questions",
    "register",
    "think",
]


if not TYPE_CHECKING:  # so that a type checker knows what there is, and what not

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            try:
                return version("simcot-latent")
            except PackageNotFoundError:  # a checkout that is not installed
                return "0+unknown"
        if name in _SUCCESSORS:
            raise AttributeError(f"{__name__}.{name} {_SUCCESSORS[name]}")
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
