"""What a run says before it begins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from minillm.config import RunConfig
from minillm.evaluation_sets import shared_words
from minillm.pairs import Pair
from minillm.preference_chunks import chunk_words
from minillm.preference_reading import pairs_in
from minillm.preflight import Anchor, AnySplit
from minillm.ranks import Ranks
from minillm.run_splits import evaluated_sets
from minillm.stage_order import start_words
from minillm.stages import idle_words, unbiased_words
from minillm.teacher_cache import TeacherCache

USES = {
    **dict.fromkeys(("train", "teacher_text", "preferences"), "learns from it"),
    "validation": "validates (validate_every 0)",
    "preferences_validation": "that learns from pairs validates (validate_every 0)",
}
"""What a stage would do with each split that a run may name and not read."""


def introduction(
    config: RunConfig, pair: Pair, splits: Mapping[str, AnySplit], anchor: Anchor | None, *,
    caches: Mapping[str, TeacherCache], ranks: Ranks,
) -> Iterator[str]:  # fmt: skip
    """A line for each thing that was read, left out or left unread, and for what the settings make of the gradient."""
    yield f"{config.name}: {ranks.size} process{'es' if ranks.size > 1 else ''} on {ranks.device.type}"
    for split in splits.values():
        yield from split.words
    yield from shared_words(evaluated_sets(splits))
    yield from anchor.words if anchor is not None else ()
    for name, cache in caches.items():
        yield f"stage {name}: learns from {cache}"
    if anchor is None and config.data.corpus is not None:
        yield f"corpus: {config.data.corpus} is not read; no stage has an lm_coefficient above 0"
    for name, use in USES.items():
        if getattr(config.data, name) is not None and name not in splits:
            yield f"data.{name} is not read; no stage {use}"
    if "preferences" in splits:
        yield from chunk_words(config, pairs_in(splits["preferences"]))
    yield from start_words(config.stages)
    for stage in config.trained:
        if words := unbiased_words(config, stage):
            yield f"stage {stage.name}: gradient unbiased: {words}"
        for line in idle_words(config, stage):
            yield f"stage {stage.name}: {line}"
    for card in (pair.teacher_card, pair.student_card):
        if card is not None and card.template not in {None, config.data.template}:
            own = config.data.template
            yield f"note: {card.name} was made for template '{card.template}'; data.template is '{own}'"
