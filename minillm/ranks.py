"""The processes of a run, and how DeepSpeed is made ready for them."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from minillm import collectives, phases
from minillm.errors import ConfigError, DiskError, MinillmError, NonFinite, told_to_all

COLLECTIVE_LIMIT_S = 60.0 * int(os.environ.get("DEEPSPEED_TIMEOUT", "30"))
"""Seconds that a rank waits for the others in a collective. Long, since rank 0 may work alone meanwhile and rollouts
differ in length; a rank that is dead or stuck is found by the supervisor far sooner. DeepSpeed's variable sets it, in
minutes."""
Result = TypeVar("Result")


class Ranks:
    """The processes of this run and the few collectives we make ourselves."""

    def __init__(self, *, threads: int = 0, limit_s: float = COLLECTIVE_LIMIT_S) -> None:
        phases.show()
        if threads:
            torch.set_num_threads(threads)
        prepare_deepspeed()
        local = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
        if self.device.type == "cuda" and local >= (gpus := torch.cuda.device_count()):
            raise ConfigError(
                f"local rank {local} has no GPU of its own: there are {gpus}; start no more ranks than that"
            )
        if self.device.type == "cuda":  # before the group: collectives of plain objects use the current device
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            _start_process_group(limit_s)
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the one that prints and writes."""
        return self.rank == 0

    def sum(self, values: Sequence[float] | Tensor) -> Tensor:
        """Element-wise sum over ranks in float64, the same on each."""
        total = torch.as_tensor(values, dtype=torch.float64, device=self.device).clone()
        if self.size > 1:
            with collectives.counted("all_reduce", total):
                dist.all_reduce(total)
        return total

    def most(self, value: int) -> int:
        """The largest value on any rank."""
        total = torch.tensor(value, device=self.device)
        if self.size > 1:
            with collectives.counted("all_reduce", total):
                dist.all_reduce(total, op=dist.ReduceOp.MAX)
        return int(total)

    def anyone(self, mine: bool) -> bool:
        """Whether it is true on at least one rank."""
        return bool(self.most(int(mine)))

    def gather_rows(self, rows: Tensor, *, fill: float = 0) -> Tensor:
        """All ranks' rows one below the other, in rank order; two-dimensional rows are widened with ``fill`` to the
        widest."""
        if self.size == 1:
            return rows
        count = self.most(rows.shape[0])
        width = self.most(rows.shape[1]) if rows.dim() > 1 else 0
        shape = (count, width) if rows.dim() > 1 else (count,)
        padded = torch.full(shape, fill, dtype=rows.dtype, device=self.device)
        padded[tuple(slice(size) for size in rows.shape)] = rows
        everyone = [torch.empty_like(padded) for _ in range(self.size)]
        with collectives.counted("all_gather", everyone):
            dist.all_gather(everyone, padded)
        counts = [torch.zeros(1, dtype=torch.long, device=self.device) for _ in range(self.size)]
        with collectives.counted("all_gather", counts):
            dist.all_gather(counts, torch.tensor([rows.shape[0]], device=self.device))
        return torch.cat([part[: int(n)] for part, n in zip(everyone, counts, strict=True)])

    def gather_objects(self, mine: list[Any]) -> list[Any]:
        """All ranks' lists of plain records joined in rank order (for results, not for tensors)."""
        if self.size == 1:
            return mine
        everyone: list[list[Any]] = [[] for _ in range(self.size)]
        with collectives.counted("all_gather"):
            dist.all_gather_object(everyone, mine)
        return [item for part in everyone for item in part]

    def of_first(self, work: Callable[[], Result]) -> Result:
        """What ``work`` gives on the first rank, told to all: for what stands on a disk that the others need not see.

        An error of it ends all ranks: one that the user can mend, and what the disk refuses (``DiskError``), is raised
        on each of them; with any other the first rank raises that and the others ``RankLost``.
        """
        told: list[tuple[Result | None, MinillmError | None]] = []
        mine: Exception | None = None
        if self.first:
            try:
                told = [(work(), None)]
            except Exception as error:  # whatever it is, the others must hear of it or wait
                mine, told = error, [(None, told_to_all(error))]
        result, found = self.gather_objects(told)[0]
        if mine is not None and (isinstance(mine, MinillmError) or not isinstance(found, DiskError)):
            raise mine
        if found is not None:
            raise found from mine
        return cast(Result, result)

    def together(self, work: Callable[[], Result]) -> Result:
        """The result of ``work``, with ``NonFinite`` raised on every rank if it is on one: alone it would leave them
        waiting.

        For work that makes no collective calls of its own after the point where it may fail.
        """
        result, found = None, None
        try:
            result = work()
        except NonFinite as error:
            found = error
        if self.anyone(found is not None):
            mine = [] if found is None else [(self.rank, str(found), found.batch is not None)]
            rank, words, shown = self.gather_objects(mine)[0]
            raise found or NonFinite(f"on rank {rank}: {words}", batch_of=rank if shown else None)
        return cast(Result, result)

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            with collectives.counted("barrier"):
                dist.barrier()


def _start_process_group(limit_s: float) -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ:
        import deepspeed

        deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timedelta(seconds=limit_s))
        # One collective at once, while all are known to be there: ranks connect at the first one, and one that cannot
        # should not find out after an hour. (gloo's listener has also ignored its time-out there: its issue 520.)
        dist.barrier()
        return
    # One process: a store in memory needs no port and leaves no file behind.
    os.environ.setdefault("LOCAL_RANK", "0")
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


def prepare_deepspeed() -> None:
    """Settles three things before DeepSpeed's first use: the device, its chatter, and no compiling at start.

    On a CPU it would build a C++ collective with the user's compiler at the first run, and fail where there is none.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Its collectives still go by a name that torch has set aside, which every rank would report.
    warnings.filterwarnings(
        "ignore", message=r".*(all_gather_into_tensor|reduce_scatter_tensor).*", category=FutureWarning
    )
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
