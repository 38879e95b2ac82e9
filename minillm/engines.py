"""The one engine: DeepSpeed, for one process on a laptop or ZeRO-3 over many nodes (design D10).

``student_engine`` trains at any ZeRO stage; ``teacher_engine`` is frozen by type (no optimiser, no gradient, evaluation
mode), wherever its weights are. Every forward of a sharded model goes through its engine, so that the hooks which
gather its weights see it.
"""

from __future__ import annotations

import contextlib
import gc
import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from minillm import collectives
from minillm.ranks import Ranks


def initialise(
    root: nn.Module, *, ranks: Ranks, precision: str, config: dict[str, Any], optimiser: torch.optim.Optimizer | None
) -> Any:
    """A DeepSpeed engine around a root module; without an optimiser it only runs forwards."""
    import deepspeed

    # Batch sizes here are nominal: what a step holds is decided by the loop, and denominators are ours.
    full = {
        **plain_linear(config),
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": ranks.size,
        "bf16": {"enabled": precision == "bf16"},
        # Micro-batches add up in 32 bits whatever the model computes in, or their number would change the sum.
        **({"data_types": {"grad_accum_dtype": "fp32"}} if precision == "bf16" and optimiser is not None else {}),
    }
    # One of its optimisers prints how much memory is used, on every run.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        engine, *_ = deepspeed.initialize(model=root, optimizer=optimiser, config=full, dist_init_required=False)
    collectives.watch()
    return engine


def plain_linear(config: dict[str, Any]) -> dict[str, Any]:
    """The same settings, without DeepSpeed's own linear function unless they ask for it: under ZeRO-3 it takes the
    place of torch's for the rest of the process, and has no forward-mode derivative."""
    zero = {"memory_efficient_linear": False, **config.get("zero_optimization", {})}
    return {**config, "zero_optimization": zero}


def load_for(
    load: Callable[[], PreTrainedModel], engine_config: dict[str, Any], *, precision: str, shard: bool
) -> PreTrainedModel:
    """The model, each rank keeping only its shard while the files are read where it is to be sharded."""
    if not shard:
        return load()
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    # Shards are made in the precision that stands here; an engine does not convert them afterwards.
    nominal = {
        **plain_linear(engine_config),
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": precision == "bf16"},
    }
    marker = HfDeepSpeedConfig(nominal)  # transformers holds it weakly: sharded loading is on while it lives
    try:
        return load()
    finally:
        del marker
        gc.collect()
