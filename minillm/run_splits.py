"""The splits of a run: which of them its stages and its evaluation read, and whether they hold what those need."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from minillm.config import RunConfig
from minillm.errors import DataError
from minillm.evaluation_sets import read_sets
from minillm.pairs import Pair
from minillm.preference_reading import read_preferences
from minillm.preflight import AnySplit, Split, read_split, read_teacher_text, with_checker
from minillm.prompt_table import answered
from minillm.text_stages import DistilStage


def read_splits(config: RunConfig, pair: Pair) -> dict[str, AnySplit]:
    """Every split that some stage or the evaluation reads, by name; a test set's begins with 'test'. ``DataError``
    where one of them lacks what reads it. Of pairs are 'preferences' and 'preferences_validation'."""
    data = config.data
    readers = {stage.reads for stage in config.trained}
    splits: dict[str, AnySplit] = {}
    if "train" in readers:
        splits["train"] = _read_train(config, pair)
    if "teacher_text" in readers:
        splits["teacher_text"] = read_teacher_text(config, pair=pair)
    for name, named in pair_sources(config).items():
        limit = data.preferences_limit if name == "preferences" else None
        splits[name] = read_preferences(config, named, pair=pair, name=name, limit=limit)
    if data.validation is not None and any(stage.validate_every for stage in config.trained):
        validation = read_split(
            config, data.validation, pair=pair, name="validation", need_response=False, limit=data.validation_limit
        )
        splits["validation"] = validation = with_checker(config, validation)
        _require_references(config, validation)
    if data.test is not None:
        splits.update({f"test {name}".strip(): split for name, split in read_sets(config, pair).items()})
    return splits


def evaluated_sets(splits: Mapping[str, AnySplit]) -> dict[str, Split]:
    """The test sets among the splits by name; a single source has the name ''."""
    sets = {name: split for name, split in splits.items() if name.startswith("test") and isinstance(split, Split)}
    return {name.removeprefix("test").strip(): split for name, split in sets.items()}


def pair_sources(config: RunConfig) -> dict[str, dict[str, str]]:
    """The sources of pairs that the run reads, by their names, of each setting that names some: 'preferences' where a
    stage learns from pairs, and 'preferences_validation' where such a stage validates."""
    data, learners = config.data, [stage for stage in config.trained if stage.reads == "preferences"]
    found = {"preferences": data.preference_sources} if learners else {}
    if data.preferences_validation is not None and any(stage.validate_every for stage in learners):
        found["preferences_validation"] = {"": data.preferences_validation}
    return found


def _read_train(config: RunConfig, pair: Pair) -> Split:
    data = config.data
    assert data.train is not None, "the configuration refuses a run without training rows"
    needed = {stage.name: config.responses_needed(stage) for stage in config.trained if stage.reads == "train"}
    learners = [name for name, which in needed.items() if which != "none"]
    always = all(which == "all" for which in needed.values())
    train = read_split(config, data.train, pair=pair, name="train", need_response=always, limit=data.train_limit)
    with_response = len(answered(train.prompts))
    if learners and not with_response:
        raise DataError(
            f"{data.train}: no row has a response of at most {config.decoding.max_new_tokens} tokens, and stage "
            f"{learners[0]} learns from responses\n  give the rows a 'response' field, or raise decoding.max_new_tokens"
        )
    if learners and with_response < len(train.prompts):
        of_all = f"{with_response:,} of {len(train.prompts):,} rows have a response"
        told = f"train: {of_all}; stage {', '.join(learners)} learns from those"
        train = dataclasses.replace(train, words=(*train.words, told))
    return train


def _require_references(config: RunConfig, validation: Split) -> None:
    """Raise ``DataError`` where a stage keeps by a measure that needs references and no validation row has one."""
    for stage in config.trained:
        found = any(p.response_ids if stage.keep.metric == "loss" else p.responses for p in validation.prompts)
        follows = isinstance(stage, DistilStage) and stage.plan.student_share is None
        if follows and not any(p.response_ids for p in validation.prompts):
            raise DataError(
                f"{validation.source}: no validation row has a response, and the share of the student's own text in "
                f"stage {stage.name} follows the loss on those; set its student_share"
            )
        if stage.validate_every and stage.keep.metric in {"loss", "rouge_l"} and not found:
            raise DataError(
                f"{validation.source}: no validation row has a response, and stage {stage.name} "
                f"keeps its best student by {stage.keep.metric}"
            )
