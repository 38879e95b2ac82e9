"""The model that learns, in a DeepSpeed engine of any ZeRO stage."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from minillm.adaptation import Adaptation
from minillm.adapter_files import KeptAdapter
from minillm.checkpoints import Checkpoint, Write
from minillm.config import OptimiserConfig
from minillm.engine_files import Progress, engine_writers, restore_engine
from minillm.engine_settings import read_engine_settings, with_torch_optimiser, zero_stage
from minillm.engine_state import layout_of, whole_weights
from minillm.engines import initialise, load_for
from minillm.errors import NonFinite
from minillm.meta_models import count_parameters, meta_model
from minillm.models import CausalLM, ModelReader
from minillm.optimisers import build_optimiser, learning_rate_factor, set_learning_rate
from minillm.probes import probe_head, probe_packing
from minillm.ranks import Ranks
from minillm.recompute import recompute_layers
from minillm.twins import adopt, disown, meta_twin


class Student:
    """The model that learns, in a DeepSpeed engine of any ZeRO stage."""

    def __init__(
        self, load: Callable[[], PreTrainedModel], *, ranks: Ranks, settings: str, precision: str,
        optimiser: OptimiserConfig, updates: int, real_ids: int | None = None,
        from_files: bool = True, dropout: bool = False, seed: int = 0, name: str = "", recompute: bool = False,
        adaptation: Adaptation | None = None, gather: Literal["rollout", "forward"] = "rollout",
    ) -> None:  # fmt: skip
        """``load`` gives the transformers model; ``settings`` names a file of ds_configs; ``updates`` is the length
        of the schedule.

        ``from_files`` says that ``load`` reads weights: under ZeRO-3 each rank then keeps only its shard while
        reading. A model that is made from nothing must be whole first, or its initialisation would not be
        transformers' own. ``dropout`` leaves the model's dropout on in training. A policy gradient needs it off: with
        it, q_new / q_old is not 1 at the start. Its masks are a function of ``seed``, ``name`` (the stage), update
        and rank. ``recompute`` is activation checkpointing (``recompute.recompute_layers``). ``adaptation`` freezes
        the model and trains an adapter on it. ``gather`` is what ``whole`` does under ZeRO-3.
        """
        self.ranks = ranks
        self._optimiser, self._updates = optimiser, updates
        engine_config = with_torch_optimiser(read_engine_settings(settings), pinned=ranks.device.type == "cuda")
        self.stage = zero_stage(engine_config)
        sharded_read = self.stage == 3 and from_files
        model = load_for(load, engine_config, precision=precision, shard=sharded_read)
        self._adaptation = adaptation
        if adaptation is not None:
            adaptation.put_on(model)
        model.eval()  # the probe compares two forwards, and a model that was built begins with dropout on
        self._config, self._prefix = model.config, model.base_model_prefix
        self.root = CausalLM(model)
        if real_ids is not None:
            self.root.head.real_ids = real_ids
        if not sharded_read:
            probe_head(model, self.root)
        sizes = {name: (getattr(p, "ds_numel", p.numel()), p.requires_grad) for name, p in self.root.named_parameters()}
        self.parameters = sum(size for name, (size, _) in sizes.items() if not self._is_adapter(name))
        self.trained = sum(size for size, trains in sizes.values() if trains)
        self._dropout, self._seed, self._name, self._precision = dropout, seed, name, precision
        self.root.train(dropout)
        if recompute:
            recompute_layers(self.root.backbone)
        self.root.count_work()
        self._engine = initialise(
            self.root, ranks=ranks, precision=precision,
            config={**engine_config, "gradient_clipping": optimiser.clip_grad},
            optimiser=build_optimiser(self.root, optimiser),
        )  # fmt: skip
        self._engine.train(dropout)
        twinned = self.stage == 3 and gather == "rollout"
        self._twin = None
        if twinned:
            self._twin = meta_twin(model.config, real_ids=self.root.head.real_ids, adaptation=adaptation)
        if self._twin is not None:
            self._twin.weights = self.root.weights
        self._by_forward = self.stage == 3 and gather == "forward"
        self._probe_packing()
        self.updates_done = 0
        self.learning_rate = 0.0

    @property
    def config(self) -> PreTrainedConfig:
        """Of the model that ``state`` gives the weights of."""
        return self._config if self._adaptation is None else self._adaptation.merged_config(self._config)

    @property
    def handed_on(self) -> int:
        """Parameters of the model that ``state`` gives the weights of."""
        return self.parameters if self._adaptation is None else count_parameters(meta_model(self.config))

    @property
    def adapter_words(self) -> str:
        """What a card says of the adapter that is merged into what is handed on; "" of a student without one."""
        return "" if self._adaptation is None else self._adaptation.words(self._config)

    def loss(self, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """(A loss with gradient, numbers per token without), ``models.CausalLM`` mode ``train``, through the engine."""
        result: tuple[Tensor, dict[str, Tensor]] = self._engine("train", **inputs)
        return result

    @contextlib.contextmanager
    def whole(self) -> Iterator[ModelReader]:
        """A reader over complete weights, in evaluation mode: gathered once for the whole block under ZeRO-3, without
        its hooks; or a reader in lockstep, for which the engine gathers layer by layer in every forward."""
        self._engine.eval()
        try:
            if self._by_forward:
                yield ModelReader(self._engine, device=self.ranks.device, lockstep=True)
            elif self._twin is None:
                yield ModelReader(self.root, device=self.ranks.device, lockstep=False)
            else:
                import deepspeed

                with deepspeed.zero.GatheredParameters(list(self.root.parameters())):
                    adopt(self._twin, self.root)
                    yield ModelReader(self._twin, device=self.ranks.device, lockstep=False)
        finally:
            if self._twin is not None:
                disown(self._twin)
            self._engine.train(self._dropout)

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
        """Whole weights on the CPU by root name (``backbone.…``, ``head.…``), on rank 0; an empty dict on the others.
        An adapter is merged into them."""
        found = self._gathered(dict(self.root.named_parameters(remove_duplicate=False)))
        return found if self._adaptation is None else self._adaptation.merged(found, self.root)

    def adapter(self) -> KeptAdapter | None:
        """The adapter as it stands, with layers named as in the model, on rank 0; None on the others, and of a student
        without one. Called on all ranks."""
        if self._adaptation is None:
            return None
        own = {name: p for name, p in self.root.named_parameters() if self._is_adapter(name)}
        found = self._gathered(own)
        return self._adaptation.adapter(found, prefix=self._prefix, config=self._config) if found else None

    def _is_adapter(self, parameter: str) -> bool:
        return self._adaptation is not None and self._adaptation.is_adapter(parameter)

    def _gathered(self, names: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
        """Copies on the CPU, on rank 0; nothing on the others."""
        import deepspeed

        found: dict[str, Tensor] = {}
        for name, parameter in names.items():
            # One at a time: a rank may have no room for all of them.
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
                if self.ranks.first:
                    found[name] = parameter.detach().to("cpu", copy=True)
        return found

    def master_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight that trains by root name, in whole and in the optimiser's 32 bits, on every rank, one after the
        other; for reading. All ranks must take all of them. ``CheckpointError`` where the engine keeps them as nobody
        knows."""
        return whole_weights(layout_of(self._engine), device=self.ranks.device)

    def stand_in(self) -> CausalLM:
        """The same model without weights, for others of its kind to be read with; it packs rows as the student does."""
        twin = meta_twin(self.config, real_ids=self.root.head.real_ids)
        twin.packs, twin.weights = self.root.packs, self.root.weights
        return twin

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
        with self.whole():  # where there is a twin, without ZeRO-3's hooks: their first record is of a training step
            call = self._engine if self._by_forward else None
            probe_packing(self._twin or self.root, call=call, name="student")
        self.root.packs = (self._twin or self.root).packs

    def close(self) -> None:
        """Frees the engine; the student cannot be used afterwards."""
        self._engine.destroy()
        del self._engine, self.root, self._twin
        gc.collect()
