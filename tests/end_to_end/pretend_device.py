"""A device that is not there: numbers that lie on the CPU under the name of another device.

What a GPU refuses, this refuses: an operation between tensors of the CPU and tensors of the device (but for a CPU's
single numbers, and copies); it is stricter with indices, which a GPU takes from a CPU and waits for. What makes a
program wait for a GPU, this counts: reading numbers there. It knows no autocast, no ranks and no compiling.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import simcot_latent.checkpoint
import simcot_latent.distributed
import simcot_latent.evaluate

aten = torch.ops.aten

DEVICE = torch.device("meta")
"""Its name: one that torch knows on any machine, and of which it has no numbers of its own."""

READS = (
    aten._local_scalar_dense.default,
    aten.equal.default,
    # How much comes out of these depends on the numbers.
    aten.nonzero.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
)


class OnDevice(Tensor):
    """A tensor on the device; `numbers` are its numbers."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> OnDevice:
        tensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, numbers.shape, numbers.stride(), numbers.storage_offset(), dtype=numbers.dtype, device=DEVICE
        )
        tensor.numbers = numbers
        return tensor

    # Where torch's C++ would make a tensor of a list, or a list of a tensor, unseen by the device.
    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(_as_tensor(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_as_tensor(index), value)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func}: on a device that is no longer there")


def _as_tensor(index: Any) -> Any:
    return torch.tensor(index, device=DEVICE) if isinstance(index, list) else index


class PretendDevice(TorchDispatchMode):
    """The device, while it is there.

    Attributes:
        reads: the operations that read numbers on the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = [x for x in tensors if isinstance(x, OnDevice)]
        on_cpu = [x for x in tensors if x.device.type == "cpu"]
        assert len(on_device) + len(on_cpu) == len(tensors), f"{func}: a tensor of torch's own {DEVICE}"
        to = kwargs.get("device")
        if to is not None:
            to, kwargs["device"] = torch.device(to), torch.device("cpu")
        if not on_device and to != DEVICE:
            return func(*args, **kwargs)
        if func is aten._to_copy.default:
            leaves = to is not None and to != DEVICE
        elif func is aten.copy_.default:
            leaves = not isinstance(args[0], OnDevice)
        else:
            leaves = False
            if on_device and any(x.dim() for x in on_cpu):
                shapes = [f"{tuple(x.shape)} on {x.device.type}" for x in tensors]
                raise RuntimeError(f"{func}: tensors on two devices: {', '.join(shapes)}")
        chooses = func is aten.index.Tensor and any(x is not None and x.dtype == torch.bool for x in args[1])
        if (leaves and on_device) or func in READS or chooses:
            self.reads.append(str(func))
        same = {id(x.numbers): x for x in on_device}  # what is written in place stays the tensor that it is
        args, kwargs = tree_map_only(OnDevice, lambda x: x.numbers, (args, kwargs))
        out = func(*args, **kwargs)
        return out if leaves else tree_map_only(Tensor, lambda x: same[id(x)] if id(x) in same else OnDevice(x), out)


@contextmanager
def pretend_device() -> Iterator[PretendDevice]:
    """Within it `DEVICE` has numbers, and is the device that every command picks."""
    make_tensor, autocast, autocasts = torch.tensor, torch.autocast, torch.is_autocast_enabled

    def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        made = make_tensor(data, **options)
        return made if device is None else made.to(device)

    def pick_device(name: str) -> torch.device:
        return DEVICE

    device = PretendDevice()
    with pytest.MonkeyPatch.context() as patch, device:
        patch.setattr(torch, "tensor", tensor)
        # Torch's own has no autocast, no fused optimizers.
        patch.setattr(torch, "autocast", lambda on, **to: nullcontext() if on == DEVICE.type else autocast(on, **to))
        patch.setattr(torch, "is_autocast_enabled", lambda on: on != DEVICE.type and autocasts(on))
        patch.setattr(importlib.import_module("torch.optim.adam"), "_device_dtype_check_for_fused", _anything)
        for module in (simcot_latent.evaluate, simcot_latent.distributed):
            patch.setattr(module, "pick_device", pick_device)
        patch.setattr(simcot_latent.checkpoint, "ThreadPoolExecutor", SameThread)
        yield device


class SameThread(ThreadPoolExecutor):
    """Does at once what it is given: a thread of its own would know nothing of the device."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


def _anything(*_: Any, **__: Any) -> None:
    pass
