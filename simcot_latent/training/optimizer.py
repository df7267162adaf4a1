"""What turns gradients into updates: AdamW, or Muon for the matrices with AdamW for the rest.

Muon learns the embedded problems in far fewer steps than AdamW: 88% against 68% right after the same 2250
(`results/LOG.md`, 2026-11-25). It is our own because PyTorch's computes in bfloat16, which is slow on CPUs that
lack it, and one matrix at a time.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from simcot_latent.config import RunConfig
from simcot_latent.model.gpt import GPT
from simcot_latent.model.linear import LastRows

# A quintic that drives every singular value towards 1 within five steps (https://kellerjordan.github.io/posts/muon/).
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ_ON_GPU = torch.bfloat16
"""The iteration's number format on GPUs; it tolerates bfloat16."""


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for the matrices of hidden layers (https://kellerjordan.github.io/posts/muon/).

    w <- (1 - lr * weight_decay) w - lr * sqrt(max(1, rows / columns)) * orthogonalise(nesterov momentum)

    Args:
        parameters: matrices; for embeddings, output heads and vectors use AdamW.
        lr: learning rate. An update's spectral norm is about this.
        momentum: of the gradient's moving average.
        weight_decay: decoupled, as AdamW's.
    """

    def __init__(
        self, parameters: Iterable[Tensor], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every matrix that has a gradient; returns what `closure`, if given, does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # Matrices of one shape go through the iteration as one batch: few large products in place of many small.
            alike: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[tuple(parameter.shape)].append(parameter)
            for (rows, columns), parameters in alike.items():
                directions = orthogonalise(torch.stack([self._nesterov(p, group["momentum"]) for p in parameters]))
                scale = group["lr"] * max(1.0, rows / columns) ** 0.5
                for parameter, direction in zip(parameters, directions.unbind(), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-scale)
        return loss

    def _nesterov(self, parameter: Tensor, momentum: float) -> Tensor:
        """The gradient's moving average, one step ahead."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        average = state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(average, momentum)


def orthogonalise(x_NRC: Tensor) -> Tensor:
    """The matrices (N, R, C) with their singular values brought near 1 (to about 0.7 to 1.2), by Newton-Schulz.

    Source: https://kellerjordan.github.io/posts/muon/; a, b, c are its coefficients. A zero matrix stays zero.
    """
    a, b, c = _NEWTON_SCHULZ
    tall = x_NRC.shape[1] > x_NRC.shape[2]
    x = rearrange(x_NRC, "n r c -> n c r") if tall else x_NRC
    if x.is_cuda:
        x = x.to(NEWTON_SCHULZ_ON_GPU)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (rearrange(x, "n c r -> n r c") if tall else x).to(x_NRC.dtype)


def make_optimizers(module: nn.Module, run: RunConfig) -> list[torch.optim.Optimizer]:
    """The optimizers of all parameters of a module that are trained; each group keeps its peak rate as `peak_lr`.

    Norms' scales and biases do not decay. With `optimizer=muon`, AdamW has embeddings, output head, scales and biases.
    """
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    tables |= {id(m.head.weight) for m in module.modules() if isinstance(m, GPT) and m.head is not None}
    tables |= {id(m.rows) for m in module.modules() if isinstance(m, LastRows)}
    parameters = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.dim() == 2 and id(p) not in tables and run.optimizer == "muon"]
    taken = {id(p) for p in matrices}
    rest = [p for p in parameters if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": run.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    beta1, beta2 = run.betas
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=run.learning_rate, betas=(beta1, beta2), fused=True)
    ]
    if matrices:
        optimizers.append(Muon(matrices, lr=run.matrix_lr, weight_decay=run.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def update(
    parameters: Iterable[nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer],
    max_norm: float,
    skips: Callable[[Tensor], bool] | None = None,
) -> Tensor:
    """Clips the gradients to a norm, takes every optimizer's step and drops the gradients; their norm before.

    Args:
        skips: from the norm to whether this step is left out; weights and moments then stay as they are.
    """
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    skipped = skips is not None and skips(norm)
    for optimizer in optimizers:
        if not skipped:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm


def lr_multiplier(run: RunConfig, step: int, num_steps: int) -> float:
    """What the learning rate is multiplied by at a step (0-based): linear warm-up, then decay to `final_lr_ratio`."""
    warmup = round(run.warmup_ratio * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    left = (num_steps - step) / max(1, num_steps - warmup)
    if run.lr_schedule == "constant":
        left = 1.0
    elif run.lr_schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * (1 - left)))
    return run.final_lr_ratio + (1 - run.final_lr_ratio) * left
