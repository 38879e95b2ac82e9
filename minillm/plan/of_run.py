"""What a run's file asks, as the planner sees it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from minillm.cards import Card, load_card
from minillm.config import MinillmStage, RunConfig
from minillm.errors import ConfigError
from minillm.plan.memory import memory_of
from minillm.plan.sizes import ENGINES, PLACEMENTS, ModelSizes, Placement, Work, sizes_of


def engine_of(config: RunConfig) -> str | None:
    """The engine that is planned with; None where ``engine.student`` is a file of the user's own."""
    name = Path(config.engine.student).name.removesuffix(".json")
    return name if name in ENGINES else None


def work_of(
    config: RunConfig, stage: MinillmStage, *, student: ModelSizes, teacher: ModelSizes, card: Card, gpus: int,
    gpus_per_node: int, device: Literal["cuda", "cpu"] = "cuda",
) -> Work:  # fmt: skip
    """A stage as the planner sees it; the longest prompts and responses that the run allows. ``card`` is the teacher's.
    Raises ``ConfigError`` where the engine is a file of the user's own."""
    engine = engine_of(config)
    if engine is None:
        raise ConfigError(
            f"engine.student {config.engine.student!r}: your own file, and what DeepSpeed takes by it cannot be "
            f"planned\n  plan the nearest of {', '.join(ENGINES)}: engine.student=NAME"
        )
    prompt, new = config.data.max_prompt_tokens, config.decoding.max_new_tokens
    return Work(
        student=student, teacher=teacher, gpus=gpus, gpus_per_node=gpus_per_node, engine=engine,  # type: ignore[arg-type]
        placement=card.placement, precision=config.engine.precision,  # type: ignore[arg-type]
        teacher_precision="bf16" if card.dtype == "bfloat16" else "fp32",
        rows=max(gpus, stage.prompts * stage.samples_per_prompt), samples_per_prompt=stage.samples_per_prompt,
        micro_batch=_rows_at_once(stage, longest=prompt + new), prompt_tokens=prompt, new_tokens=new,
        inner_epochs=stage.inner_epochs, inner_batches=stage.inner_batches,
        teacher_mix=stage.teacher_mix, lora=0 if config.lora is None else config.lora.rank,
        bottleneck=0 if config.bottleneck is None else config.bottleneck.size,
        anchor=stage.anchor is not None, recompute=config.engine.activation_checkpointing,
        gather=config.engine.gather, device=device, at=config.stages.index(stage),
    )  # fmt: skip


def _rows_at_once(stage: MinillmStage, *, longest: int) -> int:
    """The most rows of full length that a micro-batch holds: by ``micro_batch``, ``micro_tokens``, or both; 0 for
    all."""
    by_tokens = max(1, stage.micro_tokens // longest) if stage.micro_tokens else 0
    return min(filter(None, (stage.micro_batch, by_tokens)), default=0)


def works_of_run(
    config: RunConfig, *, gpus: int, gpus_per_node: int, placement: Placement | None = None
) -> tuple[Work, ...]:
    """All minillm stages, with ``placement`` in place of that of the teacher's card. ``ConfigError`` without one."""
    stages = [stage for stage in config.stages if isinstance(stage, MinillmStage)]
    if not stages or config.teacher is None:
        kinds = ", ".join(stage.kind for stage in config.stages)
        raise ConfigError(f"stages: {kinds}: only a minillm stage is planned\n  name a run that has one")
    card = load_card(config.teacher, kind="teachers")
    if placement is not None:
        card = card.model_copy(update={"placement": placement})
    if card.placement not in PLACEMENTS:
        raise ConfigError(
            f"teacher {card.name}: placement {card.placement}: wanted one of {', '.join(PLACEMENTS)}\n"
            "  set placement: zero3 in its card"
        )
    student, teacher = sizes_of(load_card(config.student, kind="students")), sizes_of(card)
    return tuple(
        work_of(config, stage, student=student, teacher=teacher, card=card, gpus=gpus, gpus_per_node=gpus_per_node)
        for stage in stages
    )


def hungriest(works: Sequence[Work]) -> Work:
    """The one with the highest peak on a GPU."""
    return max(works, key=lambda work: memory_of(work).peak)
