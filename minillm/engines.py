"""The one engine: DeepSpeed, for one process on a laptop or ZeRO-3 over many nodes (design D10).

A ``Student`` trains at any ZeRO stage; a ``Teacher`` is frozen by type (no optimiser, no gradient, evaluation mode)
and is either whole on every rank or sharded over the ranks, whatever the student's stage. Every forward of a sharded
model goes through its engine, so that the hooks which gather its weights see it.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from minillm.cards import find_file, known_names
from minillm.config import OptimiserConfig
from minillm.errors import ConfigError, ModelError, NonFinite, UnsupportedCombination, did_you_mean
from minillm.models import CausalLM, ModelReader, probe_head
from minillm.optimisers import build_optimiser, learning_rate_factor, set_learning_rate
from minillm.scoring import HeadWeights

DECIDED_BY_THE_RUN = {
    *("optimizer", "scheduler", "gradient_clipping", "fp16", "bf16", "bfloat16", "amp", "torch_autocast"),
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
}
ENGINE_SETTINGS = {
    *("zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "communication_data_type"),
    *("prescale_gradients", "gradient_predivide_factor", "sparse_gradients", "disable_allgather", "data_types"),
    *("activation_checkpointing", "aio", "compile", "comms_logger", "flops_profiler", "memory_breakdown", "dump_state"),
    *("steps_per_print", "wall_clock_breakdown", "timers", "tensorboard", "wandb", "csv_monitor", "nebula"),
}
"""Sections of DeepSpeed's JSON file that a run may set; others are the run's own or of training that we do not do."""


class Ranks:
    """The processes of this run and the few collectives we make ourselves."""

    def __init__(self, *, threads: int = 0) -> None:
        if threads:
            torch.set_num_threads(threads)
        _prepare_deepspeed()
        if not dist.is_initialized():
            _start_process_group()
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        local = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the one that prints and writes."""
        return self.rank == 0

    def sum(self, values: Sequence[float] | Tensor) -> Tensor:
        """Element-wise sum over ranks in float64, the same on each."""
        total = torch.as_tensor(values, dtype=torch.float64, device=self.device).clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def most(self, value: int) -> int:
        """The largest value on any rank."""
        total = torch.tensor(value, device=self.device)
        if self.size > 1:
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
        dist.all_gather(everyone, padded)
        counts = [torch.zeros(1, dtype=torch.long, device=self.device) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor([rows.shape[0]], device=self.device))
        return torch.cat([part[: int(n)] for part, n in zip(everyone, counts, strict=True)])

    def gather_objects(self, mine: list[Any]) -> list[Any]:
        """All ranks' lists of plain records joined in rank order (for results, not for tensors)."""
        if self.size == 1:
            return mine
        everyone: list[list[Any]] = [[] for _ in range(self.size)]
        dist.all_gather_object(everyone, mine)
        return [item for part in everyone for item in part]

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            dist.barrier()


class Student:
    """The model that learns, in a DeepSpeed engine of any ZeRO stage."""

    def __init__(
        self, load: Callable[[], PreTrainedModel], *, ranks: Ranks, settings: str, precision: str,
        optimiser: OptimiserConfig, updates: int, real_ids: int | None = None,
        from_files: bool = True, dropout: bool = False, seed: int = 0,
    ) -> None:  # fmt: skip
        """``load`` gives the transformers model; ``settings`` names a file of ds_configs; ``updates`` is the length
        of the schedule.

        ``from_files`` says that ``load`` reads weights: under ZeRO-3 each rank then keeps only its shard while
        reading. A model that is made from nothing must be whole first, or its initialisation would not be
        transformers' own. ``dropout`` leaves the model's dropout on in training. A policy gradient needs it off: with
        it, q_new / q_old is not 1 at the start. Its masks are a function of ``seed``, update and rank.
        """
        self.ranks = ranks
        self._optimiser, self._updates = optimiser, updates
        engine_config = read_engine_settings(settings)
        self.stage = int(engine_config.get("zero_optimization", {}).get("stage", 0))
        sharded_read = self.stage == 3 and from_files
        model = _load_for(load, engine_config, precision=precision, shard=sharded_read)
        self.config = model.config
        self.root = CausalLM(model)
        if real_ids is not None:
            self.root.head.real_ids = real_ids
        if not sharded_read:
            probe_head(model, self.root)
        self.parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.root.parameters())
        self._dropout, self._seed = dropout, seed
        self.root.train(dropout)
        self._engine = _initialise(
            self.root, ranks=ranks, precision=precision,
            config={**engine_config, "gradient_clipping": optimiser.clip_grad},
            optimiser=build_optimiser(self.root, optimiser),
        )  # fmt: skip
        self._engine.train(dropout)
        self._twin = _meta_twin(model, real_ids=self.root.head.real_ids) if self.stage == 3 else None
        self.updates_done = 0
        self.learning_rate = 0.0

    def statistics(self, **inputs: Any) -> dict[str, Tensor]:
        """Per-token numbers with gradient (``models.CausalLM`` mode ``train``), through the engine."""
        values: dict[str, Tensor] = self._engine("train", **inputs)
        return values

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
                _disown(self._twin)
        finally:
            self.root.train(self._dropout)

    def update(self, losses: Sequence[Callable[[], Tensor]]) -> tuple[float, float]:
        """One optimiser step from micro-batches; (sum of the losses over ranks, gradient norm before clipping).

        Each callable runs one forward and returns its share of the step's loss, already divided by *global*
        denominators; all ranks must pass the same number. Raises ``NonFinite`` on every rank, before the step, if any
        loss is not finite.
        """
        total = 0.0
        if self._dropout:  # like every other draw, keyed: neither a restart nor what ran before changes a mask
            key = f"dropout/{self._seed}/{self.updates_done}/{self.ranks.rank}".encode()
            torch.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big"))
        for index, loss_of in enumerate(losses):
            self._engine.set_gradient_accumulation_boundary(index == len(losses) - 1)
            loss = loss_of()
            total += float(loss.detach())
            # The engine averages gradients over ranks; our denominators are global already, so undo its division.
            self._engine.backward(loss * self.ranks.size, scale_wrt_gas=False)
        total = float(self.ranks.sum([total])[0])
        if not torch.isfinite(torch.tensor(total)):
            raise NonFinite(f"loss is {total} at update {self.updates_done}; no update was made from it")
        factor = learning_rate_factor(
            self.updates_done, total=self._updates, schedule=self._optimiser.schedule,
            warmup=self._optimiser.warmup_steps, final_fraction=self._optimiser.final_fraction,
        )  # fmt: skip
        self.learning_rate = set_learning_rate(self._engine.optimizer, factor)
        # Stage 0 clips without keeping the norm; above it only the engine can know it, and only once it has stepped.
        norm = self._gradient_norm() if self.stage == 0 else None
        self._engine.step()
        self.updates_done += 1
        return total, float(self._engine.get_global_grad_norm() if norm is None else norm)

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
        self.root = CausalLM(model)
        if real_ids is not None:
            self.root.head.real_ids = real_ids
        if not sharded:
            probe_head(model, self.root)
        self.root.eval().requires_grad_(False)
        self.parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.root.parameters())
        self.whole_bytes = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in self.root.parameters())
        call: Any = self.root.to(ranks.device)
        if sharded:
            call = _initialise(self.root, ranks=ranks, precision=precision, config=engine_config, optimiser=None)
            call.eval()
        self.reader = ModelReader(call, device=ranks.device, lockstep=sharded)

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

    def resident_bytes(self) -> int:
        """Bytes of the teacher's weights that stay on this rank between forwards."""
        total = 0
        for parameter in self.root.parameters():
            shard = getattr(parameter, "ds_tensor", None)
            total += parameter.numel() * parameter.element_size()
            # A released ZeRO-3 parameter keeps an empty placeholder; what stays is its shard.
            total += 0 if shard is None else shard.numel() * shard.element_size()
        return total


def read_engine_settings(name: str) -> dict[str, Any]:
    """The engine settings in ``ds_configs/NAME.json`` or in a JSON file by its path.

    ``ConfigError`` where there are none, where DeepSpeed would not take them or would pass over one of them, and where
    one is the run configuration's to decide.
    """
    file = Path(name) if name.endswith(".json") else find_file(name, folder="ds_configs", suffix=".json")
    if file is None or not file.is_file():
        known = known_names("ds_configs", suffix=".json")
        raise ConfigError(
            f"engine settings {name!r}: no such file; wanted one of {', '.join(known)}, or a path ending in .json"
            f"{did_you_mean(name, known)}"
        )
    try:
        settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{file}: holds a {type(settings).__name__}; wanted a JSON object of DeepSpeed settings")
    if taken := sorted(DECIDED_BY_THE_RUN & settings.keys()):
        raise ConfigError(
            f"{file}: {', '.join(taken)} is decided by the run's configuration, not by an engine file; take it out"
        )
    # DeepSpeed passes over a name that it does not know: a misspelt zero_optimization would be stage 0, silently.
    if unknown := sorted(settings.keys() - ENGINE_SETTINGS):
        raise ConfigError(
            f"{file}: {unknown[0]}: no engine setting of this name"
            f"{did_you_mean(unknown[0], ENGINE_SETTINGS) or '; known here: ' + ', '.join(sorted(ENGINE_SETTINGS))}"
        )
    _check_zero(settings.get("zero_optimization", {}), file=str(file))
    return settings


def _check_zero(section: Any, *, file: str) -> None:
    """Asks DeepSpeed's own record of the section, before a model is loaded."""
    _prepare_deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    if not isinstance(section, dict):
        raise ConfigError(f'{file}: zero_optimization: got {section!r}; wanted an object such as {{"stage": 2}}')
    try:
        zero = DeepSpeedZeroConfig(**section)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        at = ".".join(str(part) for part in ("zero_optimization", *first["loc"]))
        near = did_you_mean(str(first["loc"][-1]), DeepSpeedZeroConfig.model_fields) if first["loc"] else ""
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"{file}: {at}: no setting of this name in DeepSpeed{near}") from error
        raise ConfigError(f"{file}: {at}: got {first['input']!r}: {first['msg'].lower()}") from error
    for part in ("offload_optimizer", "offload_param"):
        if (device := getattr(getattr(zero, part), "device", "none")) != "none":
            raise UnsupportedCombination(
                f"{file}: zero_optimization.{part}: offloading (to {device}) is not built yet; take it out"
            )


def _start_process_group() -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ:
        import deepspeed

        deepspeed.init_distributed(dist_backend=backend, verbose=False)
        return
    # One process: a rendezvous file needs no free port and cannot collide with another run.
    os.environ.setdefault("LOCAL_RANK", "0")
    meeting = Path(tempfile.mkdtemp(prefix="minillm-")) / "rendezvous"
    dist.init_process_group(backend, init_method=meeting.as_uri(), rank=0, world_size=1)


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


def _prepare_deepspeed() -> None:
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
