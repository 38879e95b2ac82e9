"""The frozen model that is imitated, where its card puts it (docs/placement.md)."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from minillm.cards import SHARDED
from minillm.engine_settings import read_teacher_settings
from minillm.engines import initialise, load_for
from minillm.errors import ModelError
from minillm.gathers import Gathers
from minillm.models import CausalLM, ModelReader
from minillm.probes import probe_head, probe_packing
from minillm.ranks import Ranks
from minillm.scoring import HeadWeights


class Kept(NamedTuple):
    """Bytes of a teacher's weights that stay on a rank between forwards."""

    device: int
    """In the memory of the device that computes."""
    host: int
    """In host memory, from which they are fetched while a forward needs them. On a CPU both are the same memory."""

    @property
    def bytes(self) -> int:
        """Both together."""
        return self.device + self.host


class Teacher:
    """The frozen model that is imitated: never in training mode, never with a gradient."""

    def __init__(
        self,
        load: Callable[[], PreTrainedModel],
        *,
        ranks: Ranks,
        placement: str,
        precision: str,
        real_ids: int | None = None,
    ) -> None:
        """``placement``: ``replicated`` (whole on every rank), ``zero3`` (sharded over the ranks) or ``offload``
        (sharded, and the shards in host memory)."""
        self.ranks, self.placement = ranks, placement
        self.sharded = placement in SHARDED
        assert self.sharded or placement == "replicated", placement
        engine_config = read_teacher_settings(placement)
        model = load_for(load, engine_config, precision=precision, shard=self.sharded)
        model.eval()
        self.root = CausalLM(model)
        if real_ids is not None:
            self.root.head.real_ids = real_ids
        if not self.sharded:
            probe_head(model, self.root)
        self.root.eval().requires_grad_(False)
        self.root.count_work()
        self.parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.root.parameters())
        self.whole_bytes = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in self.root.parameters())
        self.root.to(ranks.device)
        self._engine = None
        self._gathers: Gathers | None = None
        if self.sharded:
            self._engine = initialise(self.root, ranks=ranks, precision=precision, config=engine_config, optimiser=None)
            self._engine.eval()
            self._gathers = Gathers(self.root.parameters(), ranks=ranks.size, from_host=placement == "offload")
        probe_packing(self.root, call=self._engine, name="teacher")
        self.reader = ModelReader(self._engine or self.root, device=ranks.device, lockstep=self.sharded)

    @contextlib.contextmanager
    def head(self) -> Iterator[HeadWeights]:
        """The head's rows of real ids, gathered for the block where they are sharded."""
        if not self.sharded:
            yield self.root.head.weights()
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.root.head.parameters())):
            yield self.root.head.weights()

    def check_share(self) -> list[Kept]:
        """What each rank keeps of the teacher between forwards; ``ModelError`` if a sharded one keeps more than its
        share, or on the device what belongs on the host."""
        mine = torch.tensor([self.resident_bytes()], device=self.ranks.device)
        kept = [Kept(*row) for row in self.ranks.gather_rows(mine).tolist()]
        # Every tensor is padded to a multiple of the number of ranks, and a released one leaves a placeholder element.
        spare = 8 * self.ranks.size * sum(1 for _ in self.root.parameters())
        most = max(one.bytes for one in kept)
        if self.sharded and most > self.whole_bytes / self.ranks.size + spare:
            raise ModelError(
                f"the sharded teacher keeps {most:,} of {self.whole_bytes:,} bytes on a rank; "
                f"wanted about 1/{self.ranks.size} of them.\n"
                "  is stage3_param_persistence_threshold 0 in the engine file?"
            )
        on_device = max(one.device for one in kept)
        if self.placement == "offload" and on_device > spare:
            raise ModelError(
                f"the offloaded teacher keeps {on_device:,} of {self.whole_bytes:,} bytes on a device; wanted none.\n"
                '  is offload_param {"device": "cpu"} in ds_configs/teacher-offload.json?'
            )
        return kept

    def kept_record(self) -> dict[str, Any]:
        """What ``check_share`` finds, for a run's ``run.json``: bytes of the whole, and by rank in device and host
        memory. Called on every rank."""
        kept = self.check_share()
        return {"whole": self.whole_bytes, "ranks": {str(rank): one._asdict() for rank, one in enumerate(kept)}}

    def traffic(self) -> dict[str, float]:
        """Gathers of the weights since the last time, for the log: how many, and bytes that came to this rank's device.
        Empty where nothing is gathered. The same on every rank, since all make the same calls."""
        if self._gathers is None:
            return {}
        calls, received_bytes = self._gathers.take()
        return {"teacher_gathers": float(calls), "teacher_gathered_bytes": float(received_bytes)}

    def close(self) -> None:
        """Frees the weights; the teacher cannot be used afterwards."""
        if self._engine is not None:
            self._engine.destroy()
        del self._engine, self._gathers, self.root, self.reader
        gc.collect()

    def resident_bytes(self) -> Kept:
        """Bytes of the teacher's weights that stay on this rank between forwards."""
        device = host = 0
        for parameter in self.root.parameters():
            device += parameter.numel() * parameter.element_size()
            # A released ZeRO-3 parameter keeps an empty placeholder; what stays is its shard.
            shard = getattr(parameter, "ds_tensor", None)
            if shard is None:
                continue
            size = shard.numel() * shard.element_size()
            # A GPU's shards say where they are. On a CPU there is one memory, and the placement says which part it is.
            elsewhere = shard.device.type != self.ranks.device.type
            if elsewhere or (self.ranks.device.type == "cpu" and self.placement == "offload"):
                host += size
            else:
                device += size
        return Kept(device, host)
