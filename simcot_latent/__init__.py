"""simcot_latent: latent reasoning with step supervision (SIM-CoT, https://arxiv.org/abs/2509.20317)."""

from simcot_latent.checkpoint import Checkpoint, load_checkpoint
from simcot_latent.errors import UserError
from simcot_latent.generate import Generation, Sampling, answer, generate_all
from simcot_latent.model.gpt import GPT, GPTConfig
from simcot_latent.model.step_decoder import StepDecoder
from simcot_latent.model.thoughts import ThoughtFormat, Thoughts
from simcot_latent.probe import decode_steps, probe_problems, probe_questions, think

__all__ = [
    "GPT",
    "Checkpoint",
    "GPTConfig",
    "Generation",
    "Sampling",
    "StepDecoder",
    "ThoughtFormat",
    "Thoughts",
    "UserError",
    "answer",
    "decode_steps",
    "generate_all",
    "load_checkpoint",
    "probe_problems",
    "probe_questions",
    "think",
]
