"""What a stage may start from, and what is said of it."""

from __future__ import annotations

from typing import Any

import pytest

from minillm.config import RunConfig
from minillm.errors import ConfigError
from minillm.stage_order import start_words


def config(*stages: dict[str, Any]) -> RunConfig:
    plain = {"kind": "sft", "steps": 1, "batch": 1, "optimiser": {"lr": 1e-3}}
    return RunConfig(
        name="run", student="students/gpt2", data={"train": "rows.jsonl", "max_prompt_tokens": 4},
        decoding={"max_new_tokens": 4}, stages=tuple({**plain, **stage} for stage in stages),
    )  # fmt: skip


def test_sources() -> None:
    run = config({"name": "a"}, {"name": "b"}, {"name": "c", "start": "a"}, {"name": "d", "start": "student"})
    assert [None if (s := run.source(each)) is None else s.name for each in run.stages] == [None, "a", "a", None]
    assert start_words(run.stages) == [
        "stage c: starts from the student of stage a",
        "stage d: starts from the run's own student",
    ]


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([{"name": "a"}, {"name": "b", "start": "c"}, {"name": "c"}], "'c', which is no stage before it"),
        ([{"name": "a", "start": "a"}], "starts from 'a', which is no stage before it; wanted one of student"),
        ([{"name": "first"}, {"name": "b", "start": "frist"}], "did you mean 'first'"),
        ([{"name": "student"}, {"name": "b", "start": "student"}], "and a stage as well; give that stage another name"),
        ([{"name": "a"}, {"name": "a"}], "has the name of an earlier stage"),
        ([{"name": "a"}, {"name": "b", "start": ""}], "start"),
    ],
)
def test_what_no_stage_can_start_from(stages: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(*stages)
