"""Where this process runs: rank and world under torchrun, device, number format."""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from simcot_latent.errors import UserError

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)
"""How long ranks wait for one that hangs. One that dies is noticed at once."""


@dataclass(frozen=True)
class Ranks:
    """This process among all: rank 0 is the one that reports and writes."""

    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums of float32 tensors over all ranks, in one message; every rank has the same keys.

        All of them are on the CPU, or all on the device.
        """
        if self.world == 1 or not values:
            return values
        flat = torch.cat([value.reshape(-1) for value in values.values()])
        dist.all_reduce(flat)
        parts = flat.split([value.numel() for value in values.values()])
        return {key: part.view(value.shape) for (key, value), part in zip(values.items(), parts, strict=True)}

    def from_main(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_main(self, action: Callable[[], T]) -> T:
        """What rank 0 does alone while the others wait; its result, or its `UserError`, on every rank."""
        if self.world == 1:
            return action()
        done: tuple[T | None, str | None] = None, None
        if self.is_main:
            try:
                done = action(), None
            except UserError as error:
                done = None, str(error)
        result, refused = self.from_main(done)
        if refused is not None:
            raise UserError(refused)
        return result  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        if self.world == 1:
            return [value]
        values: list[T] = [value] * self.world
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def ranks_on(device: torch.device) -> Iterator[Ranks]:
    """Joins the other ranks of a torchrun (gloo on CPUs, NCCL on GPUs); alone where there is none.

    A rank that fails leaves its connections to the end of its process: the others notice only once it has printed what
    was the matter, so that stands before what they then print.

    At the end gloo's threads must have ended: one that lets go of a tensor while Python shuts down aborts the process
    (https://github.com/pytorch/pytorch/issues/190489). They end once nobody holds the process group any more, so who
    enters this context must have let go of whatever uses the ranks when it is left.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks()
        return
    # DistributedDataParallel imports it, and it keeps the process group of that moment as a default argument for ever.
    import torch.distributed.nn.functional

    options: dict[str, Any] = {"timeout": TIMEOUT}
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world) and (store := torchrun_store()) is not None:
        options |= {"store": store, "rank": int(os.environ["RANK"]), "world_size": world}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Both: what is known on the CPU is summed there, so that no step waits for its device.
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, **options)
    else:
        dist.init_process_group("gloo", **options)
    yield Ranks(dist.get_rank(), world)
    gc.collect()  # a trainer and its parts refer to each other
    dist.destroy_process_group()


def torchrun_store() -> dist.Store | None:  # type: ignore[name-defined]
    """The store that torchrun keeps for its ranks, under a prefix of this attempt; None without one.

    A restart finds in it what the ranks before it wrote, addresses at which nobody listens any more among it
    (https://github.com/pytorch/pytorch/issues/135712). The count of attempts is the same for all ranks of one machine.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=TIMEOUT)  # type: ignore[attr-defined]
    return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)  # type: ignore[attr-defined]


def first_to_say(text: str) -> bool:
    """Whether no other rank of this torchrun has asked for the same text before; True where it cannot be known."""
    try:
        store = torchrun_store()
        return store is None or store.add(hashlib.sha256(text.encode(errors="replace")).hexdigest(), 1) == 1
    except RuntimeError:  # it is gone
        return True


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one; under torchrun every rank takes the GPU of its local rank.

    Raises:
        UserError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device={name}: must be auto, cpu, cuda, cuda:N or mps") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
        if index >= count:
            raise UserError(f"device={name}: this machine has {count} CUDA devices; use device=cpu or device=auto")
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps: this machine has none; use device=cpu or device=auto")
    if device.type not in ("cpu", "mps"):
        raise UserError(f"device={name}: must be auto, cpu, cuda, cuda:N or mps")
    return device


NARROW = 256
"""On a CPU, models narrower than this train faster in float32: a product takes less time there than oneDNN takes to
write the program for its shape in bfloat16, and no two steps have the same number of tokens (`results/LOG.md`)."""


def pick_dtype(name: str, device: torch.device, width: int) -> torch.dtype:
    """Number format of matrix products: `auto` is bfloat16 where the hardware has it and gains by it, else float32.

    Weights, their updates, norms, softmax and losses stay in float32 either way (autocast).

    Args:
        width: D, of the model.
    """
    if name != "auto":
        return getattr(torch, name)
    gains = device.type != "cpu" or width >= NARROW
    return torch.bfloat16 if gains and _has_bfloat16(device) else torch.float32


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return False


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The context in which a model of float32 weights computes in `dtype`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
