"""What an evaluation measures on request beside its samples: exposure bias and calibration."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from minillm.calibration_run import measure_calibration, require_answers
from minillm.config import RunConfig
from minillm.evaluation import Judge
from minillm.exposure_run import measure_exposure, require_responses
from minillm.models import ModelReader
from minillm.pairs import Pair
from minillm.preflight import Split
from minillm.ranks import Ranks
from minillm.teacher_engine import Teacher
from minillm.unfinished import Keeper

EXTRAS = ("exposure", "calibration")
"""Settings of ``evaluation`` that add a key of the same name to results.json."""


def require_extras(config: RunConfig, pair: Pair, split: Split) -> None:
    """Raise ``DataError`` where the test rows cannot carry what the configuration asks for; reads no weight."""
    settings = config.evaluation
    if settings.exposure is not None:
        require_responses(split.prompts, samples=settings.exposure.samples)
    if settings.calibration:
        longest = config.decoding.max_new_tokens
        require_answers(split.prompts, tokenizer=pair.tokenizer, longest=longest, setting="evaluation.calibration")


def measure_extras(
    config: RunConfig,
    reader: ModelReader,
    judge: Judge,
    *,
    teacher: Teacher | None,
    ranks: Ranks,
    shown: str,
    keeper: Keeper,
) -> dict[str, Any]:
    """``exposure`` and ``calibration`` for results.json, those that were asked for; ``keeper`` keeps what they read."""
    settings = config.evaluation
    found: dict[str, Any] = {}
    if settings.exposure is not None:
        assert teacher is not None, "the configuration refuses exposure without a teacher"
        found["exposure"] = measure_exposure(
            reader,
            judge,
            teacher=teacher,
            samples=settings.exposure.samples,
            resamples=settings.bootstrap,
            ranks=ranks,
            title=f"exposure {shown}",
            keeper=keeper,
        )
    if settings.calibration:
        found["calibration"] = measure_calibration(
            reader, judge, resamples=settings.bootstrap, ranks=ranks, keeper=keeper
        )
    return found


def asked_extras(config: RunConfig, split: Split) -> dict[str, Any]:
    """What else an evaluation was asked: the choices, which the data's own fingerprint does not cover."""
    choices = [(prompt.uid, prompt.choices) for prompt in split.prompts if prompt.choices]
    if not (config.evaluation.calibration and choices):
        return {}
    return {"choices": hashlib.sha256(json.dumps(choices).encode()).hexdigest()}


def idle_extras(config: RunConfig) -> set[str]:
    """The extras that were not asked for: results from before there were any say nothing of them."""
    return {name for name in EXTRAS if not getattr(config.evaluation, name)}
