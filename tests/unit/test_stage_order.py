"""What a stage may start from, and what is said of it."""

from __future__ import annotations

from typing import Any

import pytest

from minillm.config import MergeStage, RunConfig
from minillm.errors import ConfigError, UnsupportedCombination
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


def test_a_stage_may_be_called_student_where_none_starts_from_the_runs_own() -> None:
    assert [stage.name for stage in config({"name": "a"}, {"name": "student"}).stages] == ["a", "student"]


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([{"name": "a"}, {"name": "b", "start": "c"}, {"name": "c"}], "'c', which is no stage before it"),
        ([{"name": "a", "start": "a"}], "starts from 'a', which is no stage before it; wanted one of student"),
        ([{"name": "first"}, {"name": "b", "start": "frist"}], "did you mean 'first'"),
        (
            [{"name": "student"}, {"name": "b", "start": "student"}],
            "is called as the run's own student is, from which stage",
        ),
        ([{"name": "b", "start": "student"}, {"name": "student"}], "stages.1 .* from which stage 'b' starts; give it"),
        ([{"name": "student", "start": "student"}], "from which stage 'student' starts; give it another name"),
        ([{"name": "a"}, {"name": "a"}], "has the name of an earlier stage"),
        ([{"name": "a"}, {"name": "b", "start": ""}], "start"),
    ],
)
def test_what_no_stage_can_start_from(stages: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(*stages)


MERGE = {"kind": "merge", "name": "both", "of": ("b", "c"), "start": "a"}
TREE: tuple[dict[str, Any], ...] = ({"name": "a"}, {"name": "b"}, {"name": "c", "start": "a"})


def merging(*stages: dict[str, Any], **changes: Any) -> RunConfig:
    plain = {"kind": "sft", "steps": 1, "batch": 1, "optimiser": {"lr": 1e-3}}
    return RunConfig(
        name="run", student="students/gpt2", data={"train": "rows.jsonl", "max_prompt_tokens": 4},
        decoding={"max_new_tokens": 4}, **changes,
        stages=tuple(each if each.get("kind") == "merge" else {**plain, **each} for each in stages),
    )  # fmt: skip


def test_a_merge_reads_its_start_and_what_it_merges() -> None:
    run = merging(*TREE, MERGE, {"name": "d"})
    *_, both, last = run.stages
    assert [each.name for each in run.reads_students_of(both)] == ["a", "b", "c"]
    assert [each.name for each in run.reads_students_of(last)] == ["both"]
    assert [each.name for each in run.trained] == ["a", "b", "c", "d"]
    assert "stage both: merges b, c by slerp, from the student of stage a on" in start_words(run.stages)
    assert isinstance(both, MergeStage) and (both.method, both.eta, both.weights) == ("slerp", 0.3, None)


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([*TREE, {**MERGE, "start": "b"}], "merges what was learnt since 'b', but stage b started from stage a"),
        ([*TREE, {**MERGE, "start": "student"}], "but stage b started from stage a; set 'start: student' there"),
        ([{"name": "a"}, {"name": "b"}, {"name": "c"}, MERGE], "but stage c started from stage b"),
        ([*TREE[:2], MERGE, TREE[2]], "merges 'c', which is no stage before it"),
        ([*TREE, {**MERGE, "of": ("b", "cc")}], "did you mean 'c'"),
        ([*TREE, {**MERGE, "of": ("b",)}], "wanted the names of two stages or more"),
        ([*TREE, {**MERGE, "of": ("b", "b")}], "wanted each stage once"),
        ([*TREE, {**MERGE, "eta": 0}], "eta 0: the merged student would be the start again"),
        ([*TREE, {**MERGE, "eta": 1.5}], "eta"),
        ([*TREE, {**MERGE, "weights": (1.0,)}], "weights: got 1, wanted one for each of the 2"),
        ([*TREE, {**MERGE, "weights": (0.0, 0.0)}], "weights: all 0"),
        ([*TREE, {**MERGE, "steps": 3}], "no setting of this name"),
        ([*TREE, {key: value for key, value in MERGE.items() if key != "start"}], "start: is missing"),
        ([{**MERGE, "start": "student"}], "merges 'b', which is no stage before it; wanted some of none"),
        ([*TREE, {**MERGE, "name": "a/b"}], "name: got 'a/b'"),
        (
            [
                {"name": "b", "start": "student"},
                {"name": "c", "start": "student"},
                {**MERGE, "name": "student", "start": "student"},
                {"name": "d"},
            ],
            "called as the run's own student is",
        ),
    ],
)
def test_what_cannot_be_merged(stages: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        merging(*stages)


def test_adapters_do_not_go_on_from_a_merge() -> None:
    assert merging(*TREE, MERGE, lora={"rank": 2}).lora is not None
    with pytest.raises(UnsupportedCombination, match="starts from stage both, which merges, with lora"):
        merging(*TREE, MERGE, {"name": "d"}, lora={"rank": 2})
