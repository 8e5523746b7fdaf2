"""Work that the processes of a `torch.distributed` group do together: agreements and sums."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

WAIT_SECONDS = 180
"""How long a process of `warp-sims train` waits for the others: longer than kernels take to compile. One that
died is found out at once, by its closed connection.
"""

Part = tuple[str, Sequence[int], torch.dtype]
"""Name, shape and dtype of a tensor that is reduced."""


class Processes:
    """The processes that train together, each with a share of every batch.

    Outside of a process group, and in a group of one, there is one process, and nothing is exchanged.
    """

    def __init__(self) -> None:
        distributed = torch.distributed
        joined = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if joined else 0
        self.count = distributed.get_world_size() if joined else 1

    @property
    def several(self) -> bool:
        """Whether there is more than one."""
        return self.count > 1

    @property
    def first(self) -> bool:
        """Whether this is the one that logs and saves."""
        return self.rank == 0

    def share(self, x0: Tensor) -> tuple[Tensor, int]:
        """Returns this process's share of the states (nworld, state_size), and how many of its worlds count.

        Shares differ by one world at most. A process whose share is empty takes one world that does not
        count, so that a user's policy or loss never sees a batch without worlds.
        """
        if not self.several:
            return x0, x0.shape[0]
        part = x0.tensor_split(self.count)[self.rank]
        return (part, part.shape[0]) if part.shape[0] else (x0[:1], 0)

    def mean(self, tensors: list[Tensor], worlds: int, total: int) -> list[Tensor]:
        """Returns the means over the worlds of all processes of what are means over this one's."""
        return reduced_mean(tensors, worlds, total) if self.several else tensors

    def from_first(self, thing: Any, device: Any) -> Any:
        """Returns what the first process gives.

        Args:
            thing: Anything that can be pickled.
            device: The device of the run, through which it goes.
        """
        if not self.several:
            return thing
        box, through = [thing], torch.device(str(device))
        torch.distributed.broadcast_object_list(
            box, src=0, device=through if through.type == "cuda" else None
        )
        return box[0]

    def in_first(self, action: Callable[[], None], device: Any) -> None:
        """Does something in the first process only. An error there is raised in all processes."""
        failure = None
        if self.first:
            try:
                action()
            except Exception as error:
                if not self.several:
                    raise
                failure = error
        failure = self.from_first(failure, device)
        if failure is not None:
            raise failure

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Overwrites the tensors by those of the first process."""
        for tensor in tensors if self.several else ():
            dense = tensor.contiguous()
            torch.distributed.broadcast(dense, src=0)
            tensor.copy_(dense)

    def gather(self, thing: Any) -> list[Any]:
        """Returns what each process gives."""
        if not self.several:
            return [thing]
        things: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(things, thing)
        return things

    def agree(self, call: str, mine: dict[str, Any], remedy: str) -> None:
        """Raises ValueError in every process unless all give the same; it names the first that differs."""
        each = self.gather(mine)
        for rank, theirs in enumerate(each):
            for name in sorted(each[0].keys() | theirs.keys()):
                ours, other = each[0].get(name), theirs.get(name)
                if ours != other:
                    raise ValueError(
                        f"{call}: process {rank} has {name}={other!r}, expected {ours!r} like process 0; "
                        f"{remedy} "
                    )


def agreed_worlds(
    call: str,
    parts: Sequence[Part],
    worlds: int,
    device: torch.device,
    group: torch.distributed.ProcessGroup | None = None,
) -> int:
    """Returns the number of worlds of all processes, which have the same parts to reduce.

    Raises:
        ValueError: In every process, where one has other names, shapes, dtypes or another order.
    """
    mine = [(name, tuple(shape), str(dtype).removeprefix("torch.")) for name, shape, dtype in parts]
    digest = hashlib.sha256(repr(mine).encode()).digest()
    numbers = [int.from_bytes(digest[i : i + 8], "little", signed=True) for i in range(0, 32, 8)]
    # of one size in every process, whatever its parameters are
    header = torch.tensor([*numbers, worlds], dtype=torch.int64, device=device)
    headers = [torch.empty_like(header) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(headers, header, group=group)
    each = torch.stack(headers).tolist()
    if all(other[:-1] == each[0][:-1] for other in each):
        return sum(other[-1] for other in each)
    everything: list[Any] = [None] * len(each)
    torch.distributed.all_gather_object(everything, mine, group=group)
    raise ValueError(f"{call}: {_difference(everything)}; give every process the same policy and dtype")


def _difference(everything: list[list[tuple[str, tuple[int, ...], str]]]) -> str:
    """Says what the first process that differs has, beside what process 0 has."""
    first = everything[0]
    rank, other = next((k, parts) for k, parts in enumerate(everything) if parts != first)
    if [p[0] for p in first] != [p[0] for p in other] and sorted(first) == sorted(other):
        names, expected = ([p[0] for p in parts[1:]] for parts in (other, first))
        return f"process {rank} has its parameters in the order {names}, expected {expected} like process 0"
    for i in range(max(len(first), len(other))):
        (ours, theirs) = (_shown(parts[i]) if i < len(parts) else "none" for parts in (first, other))
        if ours != theirs:
            return f"part {i} of process {rank} is {theirs}, expected {ours} like process 0"
    return f"process {rank} differs from process 0"


def _shown(part: tuple[str, tuple[int, ...], str]) -> str:
    name, shape, dtype = part
    return f"{name!r} of shape {shape} and {dtype}"


def reduced_mean(
    tensors: Sequence[Tensor],
    worlds: int,
    total: int,
    group: torch.distributed.ProcessGroup | None = None,
) -> list[Tensor]:
    """Returns means over `total` worlds of all processes, of what are means over the `worlds` of this one.

    It is one reduction of one flat buffer. A share without worlds is ignored, because its mean is NaN.
    """
    buffer = torch.cat([t.reshape(-1) for t in tensors])
    buffer = buffer * (worlds / total) if worlds else torch.zeros_like(buffer)
    torch.distributed.all_reduce(buffer, group=group)
    parts = buffer.split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors)]


def launched() -> bool:
    """Whether torchrun, or a program that sets the same variables, started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def join(device: str | None) -> str | None:
    """Joins the process group that torchrun set up; returns the device of this process.

    A CUDA device without a number becomes that of the process on its machine.
    """
    where = torch.device(device or "cpu")
    cuda = where.type == "cuda"
    if cuda and where.index is None:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=WAIT_SECONDS))
    return device


def leave() -> None:
    """Leaves the process group in any state, because a process that failed must not wait for the others."""
    with contextlib.suppress(Exception):
        torch.distributed.destroy_process_group()
