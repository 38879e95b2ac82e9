"""The one engine: DeepSpeed, for one process on a laptop or ZeRO-3 over many nodes (design D10).

A ``Student`` trains at any ZeRO stage; a ``Teacher`` is frozen by type (no optimiser, no gradient, evaluation mode)
and is either whole on every rank or sharded over the ranks, whatever the student's stage. Every forward of a sharded
model goes through its engine, so that the hooks which gather its weights see it.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from minillm.checkpoints import Checkpoint, Write
from minillm.config import OptimiserConfig
from minillm.engine_files import Progress, engine_writers, restore_engine
from minillm.engine_settings import read_engine_settings, zero_stage
from minillm.engine_state import layout_of
from minillm.errors import ModelError, NonFinite
from minillm.models import CausalLM, ModelReader
from minillm.optimisers import build_optimiser, learning_rate_factor, set_learning_rate
from minillm.probes import probe_head, probe_packing
from minillm.ranks import Ranks
from minillm.scoring import HeadWeights


class Student:
    """The model that learns, in a DeepSpeed engine of any ZeRO stage."""

    def __init__(
        self, load: Callable[[], PreTrainedModel], *, ranks: Ranks, settings: str, precision: str,
        optimiser: OptimiserConfig, updates: int, real_ids: int | None = None,
        from_files: bool = True, dropout: bool = False, seed: int = 0, name: str = "",
    ) -> None:  # fmt: skip
        """``load`` gives the transformers model; ``settings`` names a file of ds_configs; ``updates`` is the length
        of the schedule.

        ``from_files`` says that ``load`` reads weights: under ZeRO-3 each rank then keeps only its shard while
        reading. A model that is made from nothing must be whole first, or its initialisation would not be
        transformers' own. ``dropout`` leaves the model's dropout on in training. A policy gradient needs it off: with
        it, q_new / q_old is not 1 at the start. Its masks are a function of ``seed``, ``name`` (the stage), update
        and rank.
        """
        self.ranks = ranks
        self._optimiser, self._updates = optimiser, updates
        engine_config = read_engine_settings(settings)
        self.stage = zero_stage(engine_config)
        sharded_read = self.stage == 3 and from_files
        model = _load_for(load, engine_config, precision=precision, shard=sharded_read)
        model.eval()  # the probe compares two forwards, and a model that was built begins with dropout on
        self.config = model.config
        self.root = CausalLM(model)
        if real_ids is not None:
            self.root.head.real_ids = real_ids
        if not sharded_read:
            probe_head(model, self.root)
        self.parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.root.parameters())
        self._dropout, self._seed, self._name, self._precision = dropout, seed, name, precision
        self.root.train(dropout)
        self._engine = _initialise(
            self.root, ranks=ranks, precision=precision,
            config={**engine_config, "gradient_clipping": optimiser.clip_grad},
            optimiser=build_optimiser(self.root, optimiser),
        )  # fmt: skip
        self._engine.train(dropout)
        self._twin = _meta_twin(model, real_ids=self.root.head.real_ids) if self.stage == 3 else None
        self._probe_packing()
        self.updates_done = 0
        self.learning_rate = 0.0

    def loss(self, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """(A loss with gradient, numbers per token without), ``models.CausalLM`` mode ``train``, through the engine."""
        result: tuple[Tensor, dict[str, Tensor]] = self._engine("train", **inputs)
        return result

    @contextlib.contextmanager
    def whole(self) -> Iterator[ModelReader]:
        """A reader over complete weights, in evaluation mode: gathered once for the whole block under ZeRO-3, without
        its hooks."""
        self.root.eval()
        try:
            if self._twin is None:
                yield ModelReader(self.root, device=self.ranks.device, lockstep=False)
            else:
                import deepspeed

                with deepspeed.zero.GatheredParameters(list(self.root.parameters())):
                    _adopt(self._twin, self.root)
                    yield ModelReader(self._twin, device=self.ranks.device, lockstep=False)
        finally:
            if self._twin is not None:
                _disown(self._twin)
            self.root.train(self._dropout)

    def update(self, losses: Sequence[Callable[[], Tensor]]) -> tuple[float, float]:
        """One optimiser step from micro-batches; (sum of the losses over ranks, gradient norm before clipping).

        Each callable runs one forward and returns its share of the step's loss, already divided by *global*
        denominators; all ranks must pass the same number. Raises ``NonFinite`` on every rank if a loss is not finite,
        before the step, or the gradient is not: at stage 0 before the step too, above it once the engine, which alone
        knows the norm, has passed the step over. Weights, moments and counts are then what they were, bit for bit; what
        was to be a gradient may be left, so the student is not to be updated again.
        """
        total = 0.0
        if self._dropout:  # like every other draw, keyed: neither a restart nor what ran before changes a mask
            key = f"dropout/{self._name}/{self._seed}/{self.updates_done}/{self.ranks.rank}".encode()
            torch.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big"))
        for index, loss_of in enumerate(losses):
            self._engine.set_gradient_accumulation_boundary(index == len(losses) - 1)
            loss = loss_of()
            total += float(loss.detach())
            # The engine averages gradients over ranks; our denominators are global already, so undo its division.
            self._engine.backward(loss * self.ranks.size, scale_wrt_gas=False)
        total = float(self.ranks.sum([total])[0])
        if not math.isfinite(total):
            raise NonFinite(f"loss is {total} at update {self.updates_done}; no update was made from it")
        factor = learning_rate_factor(
            self.updates_done, total=self._updates, schedule=self._optimiser.schedule,
            warmup=self._optimiser.warmup_steps, final_fraction=self._optimiser.final_fraction,
        )  # fmt: skip
        self.learning_rate = set_learning_rate(self._engine.optimizer, factor)
        # Stage 0 clips without keeping the norm; above it only the engine can know it, and only once it has stepped.
        norm = float(self._gradient_norm()) if self.stage == 0 else None
        if norm is None or math.isfinite(norm):
            self._engine.step()
        norm = float(self._engine.get_global_grad_norm()) if norm is None else norm
        if not math.isfinite(norm):
            self._tell_monitors()
            raise NonFinite(f"the gradient's norm is {norm} at update {self.updates_done}; no update was made from it")
        self.updates_done += 1
        return total, norm

    def _gradient_norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self.root.parameters() if p.grad is not None])

    def state(self) -> dict[str, Tensor]:
        """Whole weights on the CPU by root name (``backbone.…``, ``head.…``), on rank 0; an empty dict on the
        others."""
        import deepspeed

        names = dict(self.root.named_parameters(remove_duplicate=False))
        context = (
            deepspeed.zero.GatheredParameters(list(self.root.parameters()))
            if self.stage == 3
            else contextlib.nullcontext()
        )
        with context:
            if not self.ranks.first:
                return {}
            return {name: p.detach().to("cpu", copy=True) for name, p in names.items()}

    def state_files(self) -> dict[str, Write]:
        """This rank's files of a checkpoint, for ``Checkpoints.save``: weights, moments and counts as they are now.

        To be written before the next update. ``CheckpointError`` where the engine keeps its state as no checkpoint
        knows it; so a call at the start of a run, of which nothing is written, shows that it can be saved.
        """
        progress = Progress(stage=self.stage, precision=self._precision, updates_done=self.updates_done)
        return engine_writers(layout_of(self._engine), progress, self.ranks)

    def restore(self, checkpoint: Checkpoint) -> list[str]:
        """Goes on from a checkpoint of any number of ranks and any ZeRO stage; to be called on all ranks.

        What is not as it was, in words: where there is nothing, every later update is bit for bit what it would have
        been. ``CheckpointError`` on all ranks, with nothing changed, where it does not fit this student.
        """
        saved = restore_engine(checkpoint, layout_of(self._engine), self.ranks)
        self.updates_done = saved.updates_done
        self._tell_monitors()
        pairs = {
            "ranks": (self.ranks.size, checkpoint.manifest.ranks),
            "ZeRO stage": (self.stage, saved.stage),
            "precision": (self._precision, saved.precision),
        }
        return [f"{what} {now}, saved with {then}" for what, (now, then) in pairs.items() if now != then]

    def _tell_monitors(self) -> None:
        """DeepSpeed's own monitors count by these, steps that were passed over included."""
        self._engine.global_steps = self.updates_done
        self._engine.global_samples = self.updates_done * self.ranks.size

    def _probe_packing(self) -> None:
        with self.whole():  # without the hooks of ZeRO-3, whose record of the first forward is that of a training step
            probe_packing(self._twin or self.root, name="student")
        self.root.packs = (self._twin or self.root).packs

    def close(self) -> None:
        """Frees the engine; the student cannot be used afterwards."""
        self._engine.destroy()
        del self._engine, self.root, self._twin
        gc.collect()


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
        """``placement``: ``replicated`` (whole on every rank) or ``zero3`` (sharded over the ranks)."""
        self.ranks, self.placement = ranks, placement
        engine_config = read_engine_settings("teacher-zero3")
        sharded = placement == "zero3"
        model = _load_for(load, engine_config, precision=precision, shard=sharded)
        model.eval()
        self.root = CausalLM(model)
        if real_ids is not None:
            self.root.head.real_ids = real_ids
        if not sharded:
            probe_head(model, self.root)
        self.root.eval().requires_grad_(False)
        self.parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.root.parameters())
        self.whole_bytes = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in self.root.parameters())
        self.root.to(ranks.device)
        self._engine = None
        if sharded:
            self._engine = _initialise(
                self.root, ranks=ranks, precision=precision, config=engine_config, optimiser=None
            )
            self._engine.eval()
        probe_packing(self.root, call=self._engine, name="teacher")
        self.reader = ModelReader(self._engine or self.root, device=ranks.device, lockstep=sharded)

    @contextlib.contextmanager
    def head(self) -> Iterator[HeadWeights]:
        """The head's rows of real ids, gathered for the block where they are sharded."""
        if self.placement != "zero3":
            yield self.root.head.weights()
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.root.head.parameters())):
            yield self.root.head.weights()

    def check_share(self) -> list[int]:
        """Bytes of the teacher that each rank keeps between forwards; ``ModelError`` if a sharded one keeps more than
        its share."""
        kept = [int(n) for n in self.ranks.gather_rows(torch.tensor([self.resident_bytes()], device=self.ranks.device))]
        # Every tensor is padded to a multiple of the number of ranks, and a released one leaves a placeholder element.
        spare = 8 * self.ranks.size * sum(1 for _ in self.root.parameters())
        if self.placement == "zero3" and max(kept) > self.whole_bytes / self.ranks.size + spare:
            raise ModelError(
                f"the sharded teacher keeps {max(kept):,} of {self.whole_bytes:,} bytes on a rank; "
                f"wanted about 1/{self.ranks.size} of them.\n"
                "  is stage3_param_persistence_threshold 0 in the engine file?"
            )
        return kept

    def close(self) -> None:
        """Frees the weights; the teacher cannot be used afterwards."""
        if self._engine is not None:
            self._engine.destroy()
        del self._engine, self.root, self.reader
        gc.collect()

    def resident_bytes(self) -> int:
        """Bytes of the teacher's weights that stay on this rank between forwards."""
        total = 0
        for parameter in self.root.parameters():
            shard = getattr(parameter, "ds_tensor", None)
            total += parameter.numel() * parameter.element_size()
            # A released ZeRO-3 parameter keeps an empty placeholder; what stays is its shard.
            total += 0 if shard is None else shard.numel() * shard.element_size()
        return total


def _initialise(
    root: nn.Module, *, ranks: Ranks, precision: str, config: dict[str, Any], optimiser: torch.optim.Optimizer | None
) -> Any:
    import deepspeed

    # Batch sizes here are nominal: what a step holds is decided by the loop, and denominators are ours.
    full = {
        **config,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": ranks.size,
        "bf16": {"enabled": precision == "bf16"},
        # Micro-batches add up in 32 bits whatever the model computes in, or their number would change the sum.
        **({"data_types": {"grad_accum_dtype": "fp32"}} if precision == "bf16" and optimiser is not None else {}),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine, *_ = deepspeed.initialize(model=root, optimizer=optimiser, config=full, dist_init_required=False)
    return engine


def _load_for(
    load: Callable[[], PreTrainedModel], engine_config: dict[str, Any], *, precision: str, shard: bool
) -> PreTrainedModel:
    """The model, each rank keeping only its shard while the files are read where it is to be sharded."""
    if not shard:
        return load()
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    # Shards are made in the precision that stands here; an engine does not convert them afterwards.
    nominal = {**engine_config, "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": precision == "bf16"}}
    marker = HfDeepSpeedConfig(nominal)  # transformers holds it weakly: sharded loading is on while it lives
    try:
        return load()
    finally:
        del marker
        gc.collect()


def _meta_twin(model: PreTrainedModel, *, real_ids: int) -> CausalLM:
    """The same architecture without weights or engine hooks, to run on weights that are gathered for a while."""
    with torch.device("meta"):
        twin = CausalLM(AutoModelForCausalLM.from_config(model.config))
    twin.head.real_ids = real_ids
    return twin.eval()


def _adopt(twin: nn.Module, owner: nn.Module) -> None:
    """Points the twin's parameters and buffers at the owner's present storage."""
    modules = dict(owner.named_modules())
    for name, module in twin.named_modules():
        source = modules[name]
        for key, value in source._parameters.items():
            module._parameters[key] = None if value is None else nn.Parameter(value.data, requires_grad=False)
        for key, buffer in source._buffers.items():
            module._buffers[key] = buffer


def _disown(twin: nn.Module) -> None:
    for module in twin.modules():
        for key, value in module._parameters.items():
            if value is not None:
                module._parameters[key] = nn.Parameter(torch.empty(0), requires_grad=False)
