"""From examples to batches: which examples make a step."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

# Length buckets are cut from this many batches' worth of shuffled examples: enough for rows of much the same length
# (attention alone pays for the difference), few enough for each stretch of training to see every length.
POOL_BATCHES = 16

DataclassT = TypeVar("DataclassT")
T = TypeVar("T")


class BatchOrder:
    """Which examples every optimizer step trains on: shuffled by epochs, bucketed by length.

    A pure function of (lengths, batch size, seed) that can be asked for any step: training resumes anywhere, and
    any number of ranks sees the same global batches. Epochs follow each other without a gap, so every batch is full.

    Args:
        lengths: length of each example, in tokens.
        batch_size: examples an optimizer step, over all ranks.
        seed: of the shuffling.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self._epoch = lru_cache(maxsize=2)(self._shuffled_epoch)
        self._pool = lru_cache(maxsize=2)(self._bucketed_pool)

    def batch(self, step: int) -> list[int]:
        """Indices of the examples of an optimizer step (0-based), shortest first."""
        return self._pool(step // POOL_BATCHES)[step % POOL_BATCHES]

    def read_by(self, num_steps: int) -> list[int]:
        """The examples whose lengths the first `num_steps` steps depend on, in the order of their indices.

        They do not depend on lengths themselves: a pool is drawn first, and only then sorted.
        """
        end = math.ceil(num_steps / POOL_BATCHES) * POOL_BATCHES * self.batch_size
        epochs = math.ceil(end / len(self.lengths))
        if epochs > 1:
            return list(range(len(self.lengths)))
        return sorted(self._epoch(0)[:end])

    def _shuffled_epoch(self, epoch: int) -> list[int]:
        return torch.randperm(len(self.lengths), generator=self._generator(2 * epoch)).tolist()

    def _bucketed_pool(self, pool: int) -> list[list[int]]:
        size = POOL_BATCHES * self.batch_size
        indices: list[int] = []
        for position in range(pool * size, (pool + 1) * size):
            epoch, offset = divmod(position, len(self.lengths))
            indices.append(self._epoch(epoch)[offset])
        indices.sort(key=self.lengths.__getitem__)
        batches = [indices[i : i + self.batch_size] for i in range(0, size, self.batch_size)]
        order = torch.randperm(POOL_BATCHES, generator=self._generator(2 * pool + 1)).tolist()
        return [batches[i] for i in order]

    def _generator(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(self.seed, stream))


def seed_of(*numbers: int) -> int:
    """A seed that depends on each of some numbers.

    Torch's generator reads 32 bits of its seed, so they go through a hash, not into separate bits.
    """
    digest = hashlib.blake2b("/".join(map(str, numbers)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")


@dataclass(frozen=True)
class Seeds:
    """Of whatever is drawn for a batch: the same however an optimizer step is cut into micro-batches and ranks.

    Attributes:
        step: for what is drawn once for all rows of an optimizer step.
        rows: for what is drawn for each row of the batch.
    """

    step: int
    rows: Sequence[int]

    @classmethod
    def of(cls, seed: int, step: int, positions: Sequence[int]) -> Seeds:
        """The seeds of a batch.

        Args:
            seed: of the run.
            step: the optimizer step.
            positions: where each row stands in the global batch of that step.
        """
        return cls(seed_of(seed, step), [seed_of(seed, step, position) for position in positions])


def micro_batches(indices: Sequence[int], device_batch_size: int, rank: int, world: int) -> list[list[int]]:
    """A rank's part of a global batch, cut into pieces that fit its device. Every index goes to exactly one piece."""
    mine = list(indices[rank::world])
    return [mine[i : i + device_batch_size] for i in range(0, len(mine), device_batch_size)]


def by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """All indices in batches of similar length, longest first: running out of memory shows at once, not at the end."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def to_device(value: DataclassT, device: torch.device) -> DataclassT:
    """A dataclass of tensors, dataclasses and dicts of these on another device; what else it holds stays as it is."""
    return _map_tensors(value, lambda tensor: tensor.to(device, non_blocking=True))


def pin(value: DataclassT) -> DataclassT:
    """The same in page-locked memory, from which a copy to a GPU makes nobody wait."""
    return _map_tensors(value, Tensor.pin_memory)


def _map_tensors(value: DataclassT, change: Callable[[Tensor], Tensor]) -> DataclassT:
    if not is_dataclass(value):
        raise TypeError(f"{type(value).__name__} is no dataclass")
    changed = {field.name: _changed(getattr(value, field.name), change) for field in fields(value)}
    return type(value)(**changed)  # type: ignore[return-value]


def _changed(item: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(item, Tensor):
        return change(item)
    if isinstance(item, dict):
        return {key: _changed(value, change) for key, value in item.items()}
    return _map_tensors(item, change) if is_dataclass(item) and not isinstance(item, type) else item


class Prefetch(Generic[T]):
    """Makes what a step needs in a thread of its own, while the step before it is still running.

    Args:
        make: from a step's number to what it needs; it must not depend on when it is called.
        end: the step after the last.
    """

    def __init__(self, make: Callable[[int], T], end: int) -> None:
        self.make, self.end = make, end
        self.waited = 0.0
        """Seconds that `get` has spent waiting, in all."""
        # One thread for its operations: a team of its own would fight with the step for the cores.
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="prefetch", initializer=torch.set_num_threads, initargs=(1,)
        )
        self._ahead: tuple[int, Future[T]] | None = None

    def get(self, step: int) -> T:
        """What a step needs; the next one's is begun."""
        began = time.perf_counter()
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = step, self._thread.submit(self.make, step)
        made = self._ahead[1].result()
        self._ahead = (step + 1, self._thread.submit(self.make, step + 1)) if step + 1 < self.end else None
        self.waited += time.perf_counter() - began
        return made

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(cancel_futures=True)
