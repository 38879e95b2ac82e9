"""Promises: a verdict is given only on what can be compared, and every verdict is corrected for all that are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minillm.compare.command import compare
from minillm.compare.summary import Options, main_measures
from minillm.compare.words import describe
from minillm.measures import MEASURES, OF_TEACHER, OF_TOKENS
from tests.unit.test_compare_command import evaluation

Record = dict[str, Any]
DEPENDS = {
    "validity": "", "coverage": "", "rouge_l": "", "exact_match": "", "distinct_1": "", "distinct_2": "",
    "distinct_3": "", "distinct_4": "", "self_bleu": "", "repetition_3": "", "repeated_3": "",
    "mean_length": "tokens", "cut_share": "tokens", "gold_nll": "tokens",
    "reverse_kl": "teacher tokens", "reverse_kl_per_token": "teacher tokens", "forward_kl": "teacher tokens",
    "teacher_nll": "teacher tokens",
}  # fmt: skip
"""What each measure is a quantity of, beside the text itself: written down here once more, by hand."""


def thorough(row: Record, *, worse: float = 0.0) -> Record:
    """With all that an evaluation measures of a teacher and of the references."""
    own = row["measures"]
    more = {"forward_kl": own["reverse_kl"] + worse, "teacher_nll": 9.0, "gold_nll": own["reverse_kl"] + worse}
    return row | {"measures": own | more | {"gold_tokens": 4, "exact_match": 0, "carried": 1, "values": 2}}


def test_every_measure_says_what_it_depends_on() -> None:
    """A new measure needs a line above. Control: the table is not empty, and each word of it is used."""
    said = {
        name: " ".join(["teacher"] * measure.of_teacher + ["tokens"] * measure.of_tokens)
        for name, measure in MEASURES.items()
    }
    assert said == DEPENDS
    assert {name for name, words in DEPENDS.items() if "teacher" in words} == set(OF_TEACHER) != set()
    assert {name for name, words in DEPENDS.items() if "tokens" in words} == set(OF_TOKENS) != set()


@pytest.mark.parametrize(
    ("about", "word"),
    [({"asked": {"teacher_weights": "u"}}, "teacher"), ({"data": {"sha256": "x"}}, "tokens")],
)
def test_no_verdict_on_a_quantity_of_another_teacher_or_of_other_tokens(
    about: Record, word: str, tmp_path: Path
) -> None:
    given = {name: evaluation(tmp_path / name, change=thorough) for name in "ab"}
    given["o"] = evaluation(tmp_path / "o", change=lambda row: thorough(row, worse=0.5), **about)
    found = {
        name: compare({"a": given["a"], name: given[name]}, quiet=True, options=Options(resamples=100)) for name in "bo"
    }
    named = {name: set(of["comparisons"][0]["changes"]) for name, of in found.items()}
    assert named["b"] == set(MEASURES)  # control
    assert named["b"] - named["o"] == {name for name, words in DEPENDS.items() if word in words}
    told = "\n".join(describe(found["o"])[0][1])
    assert "forward KL" not in told and "reverse KL" not in told
    for name in named["b"] - named["o"]:  # and the note names each of them
        assert MEASURES[name].label in found["o"]["notes"][0]


def test_every_verdict_is_in_holms_family_and_nothing_else_is(tmp_path: Path) -> None:
    given = {
        name: evaluation(tmp_path / name, skill=skill, change=thorough)
        for name, skill in (("a", 0.3), ("b", 0.7), ("c", 0.5))
    }
    found = compare(given, quiet=True, options=Options(resamples=100))
    for pair in found["comparisons"]:
        assert [name for name, change in pair["changes"].items() if "holm" in change] == main_measures(pair["changes"])
    verdicts = ["validity", "coverage", "rouge_l", "exact_match", "reverse_kl", "forward_kl", "gold_nll"]
    assert main_measures(found["comparisons"][0]["changes"]) == verdicts
    assert found["corrected"] == 3 * len(verdicts)
