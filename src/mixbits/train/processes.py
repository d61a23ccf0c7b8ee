"""Processes that train one network together, each on its part of every batch.

Every process holds the whole network and does the same; what they compute from their parts is summed. So a
batch is the same batch however many processes share it, and so is what is learned, up to the order of sums.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, distributed

from mixbits.train.checkpoint import fingerprint

Result = TypeVar("Result")
BUCKET = 1 << 24  # elements that are averaged in one message: 64 MiB of float32


class LostProcessError(ConnectionError):
    """Another process has ended, or cannot be reached."""


class Processes:
    """This process's place among those that train together; :data:`ALONE` is one that is by itself.

    All processes call the same methods in the same order; with one, every method does the plain thing.
    Each raises :class:`LostProcessError` where another process has ended.
    """

    def __init__(self, rank: int = 0, count: int = 1, device: torch.device | None = None) -> None:
        """``rank`` of ``count``; ``device`` is where tensors of this process's own are sent from."""
        self.rank, self._count = rank, count
        self.device = device or torch.device("cpu")
        self._apart = False

    @property
    def count(self) -> int:
        """How many there are; one inside :meth:`apart`."""
        return 1 if self._apart else self._count

    @property
    def main(self) -> bool:
        """Whether this is the one that writes files and tells people."""
        return self.rank == 0

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What is done inside concerns this process only: it waits for no other."""
        before, self._apart = self._apart, True
        try:
            yield
        finally:
            self._apart = before

    def once(self, do: Callable[[], Result]) -> Result:
        """What ``do()`` gives in the main process, in all of them; others wait, and get its error too."""
        if self.count == 1:
            return do()
        error: Exception | None = None
        said: list[object] = [None, ""]
        if self.main:
            try:
                with self.apart():
                    said[0] = do()
            except Exception as raised:
                error, said = raised, [None, f"in the main process: {type(raised).__name__}: {raised}"]
        with _reaching_others():
            distributed.broadcast_object_list(said, 0, device=self.device)
        if error is not None:
            raise error
        if said[1]:
            raise ValueError(said[1])
        return said[0]  # type: ignore[return-value]

    def part(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """This process's samples of a batch; parts differ by one sample at most, some may be empty."""
        if self.count == 1:
            return batch
        size = len(batch[0])
        begin, end = (place * size // self.count for place in (self.rank, self.rank + 1))
        return batch[0][begin:end], batch[1][begin:end]

    def share(self, part: Tensor, batch: tuple[Tensor, Tensor]) -> float:
        """The factor on a mean over a part with which the mean over processes is that over the batch.

        Raises ``ValueError`` if there are fewer samples than processes.
        """
        if len(batch[0]) < self.count:
            raise ValueError(
                f"a batch of {len(batch[0])} samples cannot be divided among {self.count} processes; "
                "choose a larger batch size (it is that of all processes together) or fewer processes"
            )
        return self.count * len(part) / len(batch[0])

    def sum(self, value: Tensor) -> Tensor:
        """The sum of every process's ``value``, without a gradient."""
        if self.count == 1:
            return value
        total = value.detach().clone()
        with _reaching_others():
            distributed.all_reduce(total)
        return total

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set in any process."""
        if self.count == 1:
            return list(flags)
        return [total > 0 for total in self.sum(torch.tensor(flags, device=self.device).float()).tolist()]

    def gather(self, value: Tensor) -> Tensor:
        """Every process's ``value``, of one shape, ``[processes, ...]``."""
        if self.count == 1:
            return value[None]
        values = [torch.empty_like(value) for _ in range(self.count)]
        with _reaching_others():
            distributed.all_gather(values, value.contiguous())
        return torch.stack(values)

    def average_(self, values: Iterable[Tensor | None]) -> None:
        """Replace each tensor (gradients: those that there are) by its mean over the processes."""
        if self.count == 1:
            return
        buckets: list[list[Tensor]] = []
        room: dict[torch.dtype, int] = {}
        latest: dict[torch.dtype, list[Tensor]] = {}
        for value in values:
            if value is None:
                continue
            if room.get(value.dtype, 0) < value.numel():
                latest[value.dtype], room[value.dtype] = [], BUCKET
                buckets.append(latest[value.dtype])
            latest[value.dtype].append(value)
            room[value.dtype] -= value.numel()
        for bucket in buckets:
            mean = self.sum(torch.cat([value.reshape(-1) for value in bucket])) / self.count
            for value, part in zip(bucket, mean.split([value.numel() for value in bucket]), strict=True):
                value.copy_(part.view_as(value))

    @torch.no_grad()
    def spread_(self, values: Iterable[Tensor]) -> None:
        """Replace each tensor by the main process's."""
        if self.count == 1:
            return
        with _reaching_others():
            for value in values:
                whole = value.contiguous()
                distributed.broadcast(whole, 0)
                value.copy_(whole)

    def check_same(self, values: Iterable[Tensor], complaint: str) -> None:
        """Raise ``ValueError`` with ``complaint`` unless the tensors are the same bits everywhere."""
        if self.count == 1:
            return
        marks = [""] * self.count
        with _reaching_others():
            distributed.all_gather_object(marks, fingerprint(*values))
        if len(set(marks)) > 1:
            raise ValueError(complaint)


ALONE = Processes()


def processes_here() -> Processes:
    """Those of torch's process group, where a loop of the user's has begun one, else :data:`ALONE`."""
    if not distributed.is_available() or not distributed.is_initialized():
        return ALONE
    cuda = "nccl" in distributed.get_backend()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    return Processes(distributed.get_rank(), distributed.get_world_size(), device)


def launched() -> bool:
    """Whether a launcher (``torchrun``, ``accelerate launch``) has started this process among others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join_processes(device: str = "cpu", *, bf16: bool = False) -> Processes:
    """The processes that ``torchrun`` or ``accelerate launch`` has started, joined by Accelerate.

    :data:`ALONE`, and nothing imported, if there is only this one. ``device`` is ``cpu`` or ``cuda``: each
    process of a machine gets a device of its own. Raises ``ValueError`` for what a launcher asks for and is
    not done here, and ``ImportError`` without the extra ``distributed``.
    """
    if not launched():
        return ALONE
    try:
        from accelerate import Accelerator  # noqa: PLC0415  one process needs none
    except ImportError as error:
        raise ImportError(
            "training in several processes needs Accelerate: pip install 'mixbits[distributed]'"
        ) from error
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device {device}: say cpu or cuda, each of several processes gets one of its own")
    accelerator = Accelerator(cpu=device == "cpu")
    if not accelerator.distributed_type.startswith("MULTI_"):
        raise ValueError(
            f"the launcher asks for {accelerator.distributed_type.value}: every process holds the whole "
            "network here; launch plain processes (torchrun, or accelerate launch --multi_gpu or --cpu)"
        )
    if accelerator.mixed_precision not in ("no", "bf16" if bf16 else "no"):
        raise ValueError(
            f"the launcher asks for mixed precision {accelerator.mixed_precision}: the recipe says how to "
            "train; leave it out there, and give --bf16 for bfloat16"
        )
    return Processes(accelerator.process_index, accelerator.num_processes, accelerator.device)


@contextmanager
def _reaching_others() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo and nccl raise it whatever went wrong
        said = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise LostProcessError(
            f"another process of this training has ended or cannot be reached ({said}); its own message, or "
            "the launcher's, says why"
        ) from error
