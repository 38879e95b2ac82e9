"""Promises: a report shows the measures by the length of the reference, as bars with intervals and as figures, with the
unit and the number of prompts of each bucket; the page of one set as well as that of several; nothing where no
evaluation says it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from minillm import plots
from minillm.length_buckets import UNIT, by_length
from minillm.report import combine, write_report
from minillm.report_files import read_samples
from minillm.report_lengths import lengths
from minillm.report_sets import overview
from tests.unit.test_report import Tags, evaluation

pytestmark = pytest.mark.pictures

HEADING = "By the length of the reference"
WORDS = {"0-5": 3, "6-10": 7, "11+": 12}
"""A number of words in each bucket."""
PROMPTS = {"0-5": 5, "6-10": 3, "11+": 1}
HOSTILE = "<img src=x onerror=alert(1)>"
Spoil = Callable[[dict[str, Any]], None]


def measured(path: Path, *, skill: float, spoil: Spoil | None = None) -> Path:
    """An evaluation whose references have the lengths of ``PROMPTS``, ``by_length`` as an evaluation writes it."""
    evaluation(path, skill=skill, prompts=sum(PROMPTS.values()), temperatures=(1.0,))
    kinds = [name for name, count in PROMPTS.items() for _ in range(count)]
    rows = read_samples(path)
    for row in rows:
        number = int(row["uid"].removeprefix("test-"))
        row["references"] = ["word " * WORDS[kinds[number]]]
        row["measures"]["rouge_l"] = skill * (0.3 + 0.07 * number)  # every bucket has a figure of its own
    (path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    results = json.loads((path / "results.json").read_text(encoding="utf-8"))
    found = by_length(rows, resamples=100, seed=0)
    if spoil is not None:
        spoil(found["by_length"])
    (path / "results.json").write_text(json.dumps(results | found), encoding="utf-8")
    return path


def page_of(tmp_path: Path, **folders: Path) -> str:
    combined = combine(folders, differences=[], resamples=5, seed=0, seconds=None)
    out = write_report(combined, evaluations=folders, training={}, out=tmp_path / "r.html", title="r", settings={})
    return out.read_text(encoding="utf-8")


def part(text: str) -> str:
    """The section by lengths; "" where there is none."""
    found = re.search(rf"<h2>{HEADING}</h2>.*?</section>", text, flags=re.DOTALL)
    return found[0] if found else ""


def figures(text: str) -> dict[str, dict[str, list[str]]]:
    """{bucket: {model: its cells}} of the section's table, tags taken out."""
    found: dict[str, dict[str, list[str]]] = {}
    bucket = ""
    for row in re.findall(r"<tr.*?</tr>", re.sub(r"<thead.*?</thead>", "", part(text)), flags=re.DOTALL):
        cells = [re.sub("<[^>]+>", " ", cell).strip() for cell in re.findall(r"<t[hd].*?</t[hd]>", row)]
        if len(cells) == 1:
            bucket = cells[0]
        else:
            found.setdefault(bucket, {})[cells[0]] = cells[1:]
    return found


def slow_mean(folder: Path, bucket: str) -> float:
    """The mean ROUGE-L of a bucket, straight from the samples."""
    rows = [row for row in read_samples(folder) if len(row["references"][0].split()) == WORDS[bucket]]
    return sum(row["measures"]["rouge_l"] for row in rows) / len(rows)


def swapped(found: dict[str, Any]) -> None:
    buckets = found["buckets"]
    buckets["0-5"], buckets["6-10"] = buckets["6-10"], buckets["0-5"]


@pytest.mark.parametrize("spoil", [None, swapped])
def test_the_page_of_one_set_has_the_figures_of_each_bucket(tmp_path: Path, spoil: Spoil | None) -> None:
    """Against the samples themselves. The control: results whose buckets are exchanged."""
    folders = {"a": measured(tmp_path / "a", skill=0.9, spoil=spoil), "b": measured(tmp_path / "b", skill=0.6)}
    text = page_of(tmp_path, **folders)
    found = figures(text)
    wanted = {
        f"{bucket} words": {
            name: [str(PROMPTS[bucket]), f"{slow_mean(folder, bucket):.3f}"] for name, folder in folders.items()
        }
        for bucket in WORDS
    }
    head = re.findall(r"<th scope=\"col\".*?</th>", part(text))
    column = next(n for n, cell in enumerate(head) if "ROUGE-L" in cell) - 1
    got = {
        bucket: {name: [cells[0], cells[column].split()[0]] for name, cells in models.items()}
        for bucket, models in found.items()
    }
    assert (got == wanted) is (spoil is None), got
    tags = Tags(text)
    assert len(set(tags.ids)) == len(tags.ids)


def test_the_bars_have_figures_intervals_and_how_many_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}

    def keep(groups: Any, *, key: str, title: str, digits: int) -> str:
        if key.startswith("length-"):
            drawn[title] = groups
        return ""

    monkeypatch.setattr(plots, "bar_groups", keep)
    folders = {"a": measured(tmp_path / "a", skill=0.9), "b": measured(tmp_path / "b", skill=0.6)}
    page_of(tmp_path, **folders)
    groups = drawn["ROUGE-L"]
    assert [heading for heading, _ in groups] == [
        "0-5 words, 5 prompts",
        "6-10 words, 3 prompts",
        "11+ words, 1 prompt",
    ]
    for bucket, (_, rows) in zip(WORDS, groups, strict=True):
        assert [name for name, *_ in rows] == ["a", "b"] and [colour for _, colour, *_ in rows] == [0, 1]
        for name, _, value, ends in rows:
            assert value == pytest.approx(slow_mean(folders[name], bucket))
            # One prompt has no spread over prompts.
            assert ends is None if PROMPTS[bucket] == 1 else ends[0] <= value <= ends[1]
    assert list(drawn) == ["validity", "ROUGE-L", "exact match", "reverse KL"], "the checker's verdict first"


def test_a_bucket_without_a_prompt_is_there_and_says_so(tmp_path: Path) -> None:
    def empty(found: dict[str, Any]) -> None:
        found["buckets"]["6-10"] |= {"prompts": 0, "measures": {}}

    text = page_of(tmp_path, a=measured(tmp_path / "a", skill=0.9, spoil=empty))
    assert ">6-10 words, no prompt<" in text
    assert set(figures(text)["6-10 words"]["a"][1:]) == {"–"}


def test_the_unit_and_what_is_in_no_bucket_are_said(tmp_path: Path) -> None:
    text = part(page_of(tmp_path, a=measured(tmp_path / "a", skill=0.9), b=evaluation(tmp_path / "b", skill=0.5)))
    assert f"Length: {UNIT}, at temperature 1.0." in text
    assert "b is not here: its results do not say it" in text and "no bucket" not in text

    def two_without(found: dict[str, Any]) -> None:
        found["without_reference"] = 2

    text = part(page_of(tmp_path, c=measured(tmp_path / "c", skill=0.9, spoil=two_without)))
    assert "In no bucket, without a reference: 2 prompts of c." in text


def test_words_are_never_drawn_beside_tokens(tmp_path: Path) -> None:
    """Buckets of one name in two units: drawings and tables of their own."""

    def in_tokens(found: dict[str, Any]) -> None:
        found["unit"] = "tokens of the first reference"

    folders = {"a": measured(tmp_path / "a", skill=0.9), "b": measured(tmp_path / "b", skill=0.6, spoil=in_tokens)}
    text = page_of(tmp_path, **folders)
    found = figures(text)
    assert set(found["0-5 words"]) == {"a"} and set(found["0-5 tokens"]) == {"b"}
    assert f"Length: {UNIT}" in text and "Length: tokens of the first reference" in text
    assert part(text).count("<title") == 2 * part(page_of(tmp_path, a=folders["a"])).count("<title")


def test_the_page_of_several_sets_has_the_same_by_set(tmp_path: Path) -> None:
    reports = {
        name: combine({"m": measured(tmp_path / name, skill=skill)}, differences=[], resamples=5, seed=0, seconds=None)
        for name, skill in (("one", 0.9), ("two", 0.6))
    }
    text = overview(reports, title="t")
    found = figures(text)
    for name in reports:
        for bucket in WORDS:
            assert f"{slow_mean(tmp_path / name, bucket):.3f}" in " ".join(found[f"{name}: {bucket} words"]["m"])
    assert ">ROUGE-L, one</title>" in text and ">ROUGE-L, two</title>" in text
    assert UNIT in text
    tags = Tags(text)
    assert len(set(tags.ids)) == len(tags.ids)


def test_where_nothing_is_said_nothing_is_shown(tmp_path: Path) -> None:
    assert HEADING not in page_of(tmp_path, a=evaluation(tmp_path / "a", skill=0.9, prompts=4))
    assert lengths({}, {}) == ""


def test_names_buckets_and_units_are_escaped(tmp_path: Path) -> None:
    def hostile(found: dict[str, Any]) -> None:
        found["unit"] = f"{HOSTILE} words"
        found["temperature"] = HOSTILE
        found["buckets"][HOSTILE] = found["buckets"].pop("0-5")

    folder = measured(tmp_path / "a", skill=0.9, spoil=hostile)
    text = page_of(tmp_path, **{HOSTILE: folder})
    assert "<img" not in text and "&lt;img" in part(text)
    Tags(text)


def test_the_file_s_record_is_not_repeated_below(tmp_path: Path) -> None:
    """It has a section of its own, as exposure and calibration have."""
    text = page_of(tmp_path, a=measured(tmp_path / "a", skill=0.9))
    assert "without_reference" not in text


def test_grouped_bars_have_a_heading_above_each_group() -> None:
    groups = [("0-5 words", [("m", 0, 0.5, (0.4, 0.6)), ("n", 1, 0.25, None)]), ("11+ words", [("m", 0, 0.75, None)])]
    drawn = plots.bar_groups(groups, key="k", title="t", digits=3)
    order = [drawn.index(f">{text}<") for text in ("0-5 words", "11+ words")]
    assert order == sorted(order) and drawn.count(">m<") == 2 and drawn.count(">n<") == 1
    assert all(f">{value}<" in drawn for value in ("0.500", "0.250", "0.750"))
    bare: Mapping[str, Any] = {"key": "k", "title": "t", "digits": 3}
    assert len(drawn) > len(plots.bar_groups([(h, [(*r[:3], None) for r in rows]) for h, rows in groups], **bare))
