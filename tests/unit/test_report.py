"""Promises: the combined results hold what they should, the words follow the numbers, the page is safe and whole."""

from __future__ import annotations

import copy
import io
import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from minillm import plots
from minillm.errors import ConfigError, DataError
from minillm.measures import NAMES, summarise
from minillm.report import combine, print_tables, write_report
from minillm.report_files import read_course, read_results, read_samples
from minillm.report_html import page
from minillm.report_text import clean, figure, plain, reading, safe
from minillm.report_words import describe
from minillm.text_measures import repetition_3

pytestmark = pytest.mark.pictures

PAIR = ("minillm", "sft_control")
KEY = "minillm,sft_control"
WORLDLY = [name for name in NAMES if name != "coverage"]
"""The measures of these made-up evaluations: their prompts are no dialogue acts."""
SKILL = {"teacher": 0.9, "sft": 0.7, "sft_control": 0.7, "minillm": 0.8}
VOID = frozenset({"meta", "br", "input", "path", "use", "rect"})


def evaluation(
    folder: Path,
    *,
    skill: float,
    temperatures: Sequence[float] = (1.0, 0.6),
    prompts: int = 30,
    seeds: Sequence[int] = (10, 20),
    world: bool = True,
    teacher: bool = True,
    texts: Mapping[str, str] | None = None,
) -> Path:
    """An evaluation folder of made-up responses: ``skill`` is the share that is valid at temperature 1."""
    rows = []
    for temperature in temperatures:
        for seed in seeds:
            for n in range(prompts):
                dice = random.Random(f"{n} {seed} {temperature}")  # the same luck for every model: correlated, as it is
                good = dice.random() < skill + 0.15 * (1 - temperature)
                words = dice.choices(["ann", "bob", "walks", "feeds", "north", "south", "cat"], k=dice.randint(5, 14))
                response = " ".join(words if good else [*words, "and", str(skill)])
                response = (texts or {}).get("response", response)
                own: dict[str, Any] = {"repetition_3": int(repetition_3(response)), "rouge_l": 0.6 + 0.02 * good}
                own |= {"exact_match": int(dice.random() < 0.1)}
                own |= {"validity": int(good), "reason": "" if good else "fact"} if world else {}
                kl = {"reverse_kl": 5 * (0.95 - skill) + dice.random(), "kl_tokens": len(words) + 1}
                kl |= {"forward_kl": 1.5 * kl["reverse_kl"], "teacher_nll": dice.random() * len(words)}
                own |= {"gold_nll": 9.0 - skill, "gold_tokens": 4}
                own |= kl if teacher else {}
                rows.append(
                    {
                        "uid": f"test-{n}",
                        "temperature": temperature,
                        "seed": seed,
                        "prompt": (texts or {}).get("prompt", f"describe person {n} in one sentence"),
                        "response": response,
                        "references": ["ann walks north", "bob feeds the cat"],
                        "stop": "eos",
                        "tokens": len(words),
                        "extra": {},
                        "measures": own,
                    }
                )
    measures, each = summarise(rows, temperatures=temperatures, resamples=100, seed=0)
    results = {
        "schema": 1,
        "model": {"path": "m", "parameters": 12600, "name": folder.name},
        "teacher": {"name": "teacher"} if teacher else None,
        "data": {"source": "world:test", "rows": prompts, "sha256": "abc"},
        "decoding": {"max_new_tokens": 48, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
        "seeds": list(seeds),
        "bootstrap": 100,
        "measures": measures,
        "temperatures": each,
        "seconds": {"all": 1.0},
        "versions": {},
    }
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def metrics(path: Path, *, stage: str, steps: int, seed: int = 0) -> Path:
    """metrics.jsonl of a made-up run: a falling loss, and reverse KL and validity in a minillm stage."""
    dice, lines = random.Random(seed), []
    for step in range(1, steps + 1):
        fall = math.exp(-3 * step / steps)
        row: dict[str, Any] = {"kind": "train", "stage": stage, "step": step, "update": step, "seconds": step * 0.1}
        row |= {"loss": 0.3 + fall + 0.1 * dice.random(), "lr": 1e-3}
        if stage == "minillm":
            row |= {"reverse_kl": 1.5 + fall + 0.3 * dice.random(), "mean_length": 14.5 + dice.random()}
            row |= {"repetition_3": 0.15 + 0.05 * dice.random()}
        lines.append(row)
        if step % max(1, steps // 8) == 0:
            own = {"reverse_kl": 1.6 + fall, "validity": 0.8 - 0.1 * fall, "mean_length": 14.5, "repetition_3": 0.15}
            validation = own if stage == "minillm" else {"loss": 0.35 + fall}
            lines.append({**row, "kind": "validation"} | {"loss": None} | validation)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("evaluations")
    return {name: evaluation(root / name, skill=skill) for name, skill in SKILL.items()}


@pytest.fixture(scope="module")
def whole(folders: dict[str, Path]) -> dict[str, Any]:
    seconds = {"teacher": 140.0, "sft": 60.0, "sft_control": 27.0, "minillm": 29.0}
    return combine(folders, differences=[PAIR], resamples=300, seed=0, seconds=seconds)


def words(combined: Mapping[str, Any]) -> str:
    return " ".join(describe(combined))


def printed(combined: Mapping[str, Any], *, width: int = 80) -> str:
    from rich.console import Console

    out = io.StringIO()
    print_tables(combined, Console(file=out, width=width))
    return out.getvalue()


def written(tmp_path: Path, combined: Mapping[str, Any], **changed: Any) -> str:
    given: dict[str, Any] = {"evaluations": {}, "training": {}, "title": "A report", "settings": {}} | changed
    return write_report(combined, out=tmp_path / "deep" / "report.html", **given).read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Collects tags and ids, and checks that every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


# The combined results


def test_combined_results_hold_every_model_measure_and_temperature(whole: dict[str, Any]) -> None:
    assert whole["schema"] == 1
    assert list(whole["models"]) == list(SKILL)
    assert all(set(whole["models"][name]) == set(WORLDLY) for name in SKILL)
    assert list(whole["temperatures"]) == ["1.0", "0.6"]
    assert whole["temperatures"]["1.0"]["models"] == whole["models"]
    assert set(whole["differences"][KEY]["validity"]) == {"mean", "ci95"}
    assert set(whole["temperatures"]["0.6"]["differences"][KEY]) == set(WORLDLY)
    assert whole["seconds"]["minillm"] == 29.0
    json.dumps(whole, allow_nan=False)


def test_a_difference_is_the_difference_of_the_means(whole: dict[str, Any]) -> None:
    for name in WORLDLY:
        left, right = (whole["models"][model][name]["mean"] for model in PAIR)
        assert whole["differences"][KEY][name]["mean"] == pytest.approx(left - right)


def test_a_difference_of_an_unknown_model_names_the_nearest(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="did you mean 'minillm'"):
        combine(folders, differences=[("minilm", "sft")], resamples=5, seed=0, seconds=None)


def test_other_decoding_is_refused_for_a_difference(tmp_path: Path) -> None:
    given = {name: evaluation(tmp_path / name, skill=0.7, prompts=4) for name in PAIR}
    results = read_results(given["minillm"])
    decoding = results["decoding"] | {"max_new_tokens": 9}
    (given["minillm"] / "results.json").write_text(json.dumps(results | {"decoding": decoding}), encoding="utf-8")
    combine(given, differences=[], resamples=5, seed=0, seconds=None)  # side by side is allowed
    with pytest.raises(DataError, match="max_new_tokens is 48 for sft_control and 9 for minillm"):
        combine(given, differences=[PAIR], resamples=5, seed=0, seconds=None)


def test_other_prompts_are_refused_for_a_difference(tmp_path: Path) -> None:
    given = {PAIR[0]: evaluation(tmp_path / "a", skill=0.7, prompts=4)}
    given[PAIR[1]] = evaluation(tmp_path / "b", skill=0.7, prompts=5)
    with pytest.raises(DataError, match="'test-4'"):
        combine(given, differences=[PAIR], resamples=5, seed=0, seconds=None)


def test_without_temperature_one_the_hottest_leads(tmp_path: Path) -> None:
    given = {"m": evaluation(tmp_path / "m", skill=0.7, temperatures=(0.3, 0.8), prompts=4)}
    found = combine(given, differences=[], resamples=5, seed=0, seconds=None)
    assert found["temperature"] == "0.8"
    assert found["models"] == found["temperatures"]["0.8"]["models"]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("results.json", None, "no such file"),
        ("results.json", '{"schema": 1,\n "measures": }', r"line 2, column 14: not JSON"),
        ("results.json", '{"schema": 2}', "schema 2, wanted 1"),
        ("results.json", '{"schema": 1}', "no 'measures'"),
        ("samples.jsonl", None, "no such file"),
        ("samples.jsonl", '{"uid": "a"}\n{"uid": \n{}\n', r"line 2, column 9: not JSON"),
        ("samples.jsonl", '{"uid": "a"}\n{"uid": ', r"line 2, column 9.*broken off"),
        ("samples.jsonl", "[1]\n", "line 1: got list"),
    ],
)
def test_broken_files_are_named_with_their_place(tmp_path: Path, name: str, text: str | None, told: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=told):
        (read_results if name == "results.json" else read_samples)(tmp_path)


# The words


def test_words_say_that_an_interval_excludes_zero_only_when_it_does(whole: dict[str, Any]) -> None:
    changed = copy.deepcopy(whole)
    changed["differences"][KEY]["validity"] = {"mean": 0.05, "ci95": [0.02, 0.08]}
    text = words(changed)
    assert "+0.050, 95 % interval +0.020 to +0.080, which excludes zero: minillm is better" in text
    changed["differences"][KEY]["validity"] = {"mean": -0.05, "ci95": [-0.08, -0.02]}
    assert "which excludes zero: minillm is worse" in words(changed)
    changed["differences"][KEY]["validity"] = {"mean": 0.05, "ci95": [-0.01, 0.1]}
    text = words(changed)
    assert "which includes zero: these prompts do not tell the two apart" in text
    assert "minillm is better, and" not in text


def test_lower_reverse_kl_is_better(whole: dict[str, Any]) -> None:
    changed = copy.deepcopy(whole)
    changed["differences"][KEY] = {"reverse_kl": {"mean": -0.8, "ci95": [-0.9, -0.7]}}
    assert "nats per response" in words(changed)
    assert "minillm is closer to its teacher" in words(changed)
    changed["differences"][KEY] = {"reverse_kl": {"mean": 0.8, "ci95": [0.7, 0.9]}}
    assert "minillm is further from its teacher" in words(changed)


def test_rouge_is_said_to_hardly_move_only_when_it_does(whole: dict[str, Any]) -> None:
    changed = copy.deepcopy(whole)
    changed["differences"][KEY]["rouge_l"] = {"mean": 0.005, "ci95": [0.001, 0.009]}
    assert "ROUGE-L hardly moves: +0.005" in words(changed)
    changed["differences"][KEY]["rouge_l"] = {"mean": 0.2, "ci95": [0.1, 0.3]}
    assert "ROUGE-L moves by +0.200" in words(changed)


def test_sharpening_is_measured_on_the_control_at_lower_temperatures(whole: dict[str, Any]) -> None:
    changed = copy.deepcopy(whole)

    def put(temperature: str, model: str, value: float) -> None:
        changed["temperatures"][temperature]["models"][model]["validity"]["mean"] = value
        if temperature == "1.0":
            changed["models"][model]["validity"]["mean"] = value

    changed["differences"][KEY]["validity"] = {"mean": 0.1, "ci95": [0.05, 0.15]}
    put("1.0", "minillm", 0.80)
    put("1.0", "sft_control", 0.70)
    put("0.6", "sft_control", 0.75)
    assert "has validity 0.750 when sampled at 0.6 instead of 1.0, which is 50% of the gain" in words(changed)
    put("0.6", "sft_control", 0.82)
    assert "which is all of the gain" in words(changed)
    put("0.6", "sft_control", 0.69)
    assert "sharpening gives none of the gain" in words(changed)
    put("1.0", "minillm", 0.60)
    assert "sharpening" not in words(changed)


def test_equal_temperatures_are_listed_with_their_readings(whole: dict[str, Any]) -> None:
    changed = copy.deepcopy(whole)
    changed["temperatures"]["1.0"]["differences"][KEY]["validity"] = {"mean": 0.05, "ci95": [0.02, 0.08]}
    changed["temperatures"]["0.6"]["differences"][KEY]["validity"] = {"mean": -0.01, "ci95": [-0.03, 0.01]}
    text = words(changed)
    assert "+0.050 at 1.0, −0.010 at 0.6; the interval excludes zero at 1.0 and includes it at 0.6" in text
    del changed["temperatures"]["0.6"]
    assert "No lower temperature of sft_control was evaluated" in words(changed)


def test_seconds_are_called_equal_only_within_a_fifth(whole: dict[str, Any]) -> None:
    assert "minillm took 29.0 s and sft_control 27.0 s, the same time within 20 %" in words(whole)
    slower = {**whole, "seconds": {"minillm": 40.0, "sft_control": 20.0}}
    assert "not the same time: 50% apart" in words(slower)


def test_words_always_say_what_the_intervals_do_not_cover(whole: dict[str, Any]) -> None:
    assert any("not with another training seed" in text for text in describe(whole))


def test_reading_counts_touching_zero_as_including_it() -> None:
    assert reading({"mean": 1, "ci95": [0.0, 2.0]}) == "includes zero"
    assert reading({"mean": 1, "ci95": [0.1, 2.0]}) == reading({"mean": -1, "ci95": [-2, -0.1]}) == "excludes zero"
    assert reading({"mean": 1, "ci95": None}) == reading(None) == "no interval"


def test_figures_have_the_digits_of_their_measure_and_zero_has_no_sign() -> None:
    assert figure(-0.5, "validity", signed=True) == "−0.500"
    assert figure(0.5, "validity", signed=True) == "+0.500"
    assert figure(-0.0001, "validity", signed=True) == figure(0.0001, "validity", signed=True) == "0.000"
    assert figure(None, "validity") == "–"


# The terminal


def test_tables_fit_eighty_columns_and_hold_the_figures(whole: dict[str, Any]) -> None:
    text = printed(whole)
    assert max(len(line) for line in text.splitlines()) <= 80
    for name in SKILL:
        assert name in text
        assert figure(whole["models"][name]["reverse_kl"]["mean"], "reverse_kl") in text
    assert "…" not in text  # nothing was cut short
    assert "minillm − sft_control, paired" in text


def test_a_stranger_s_name_cannot_steer_the_terminal(whole: dict[str, Any]) -> None:
    models = {"\x1b[31m[bold]evil\x07": whole["models"]["sft"]}
    text = printed({**whole, "models": models, "pairs": {}, "differences": {}, "temperatures": {}})
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[bold]evil" in text


# The page


def test_page_is_whole_and_loads_nothing(tmp_path: Path, whole: dict[str, Any], folders: dict[str, Path]) -> None:
    runs = {"sft": metrics(tmp_path / "sft" / "metrics.jsonl", stage="sft", steps=600)}
    runs["minillm"] = metrics(tmp_path / "m" / "metrics.jsonl", stage="minillm", steps=40).parent
    text = written(tmp_path, whole, evaluations=folders, training=runs, settings={"student": {"lr": 0.008}})
    found = Tags(text)
    assert len(found.ids) == len(set(found.ids)) > 50
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(found.tags)
    assert not re.search(r"https?:|//|@import|url\((?!#)", text)
    assert all(value.startswith("#") for name, value in found.attributes if name == "href" and value)
    referred = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    assert referred
    assert referred <= set(found.ids)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert found.tags.count("svg") == 7 + 5 + 6  # bars; temperatures and variety; reverse KL … and two loss stages
    assert found.tags.count("article") == 24  # 12 prompts at two temperatures
    assert "drawn as means of 3 steps" in text
    assert "&quot;lr&quot;: 0.008" in text
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["report.html"]


def test_model_text_is_escaped_and_its_control_characters_are_gone(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\x1b[31mred\x1b[0m \x00\x07\x9b \x1b]0;owned\x07 "
    evil += "\u202eflip \ud800 <b onclick='x'>&amp;"
    name = "<img src=x onerror=y>$a_b$"
    texts = {"response": evil, "prompt": evil}
    given = {name: evaluation(tmp_path / "e", skill=0.5, prompts=3, texts=texts)}
    combined = combine(given, differences=[], resamples=5, seed=0, seconds={"<i>stage</i>": 1.0})
    text = written(tmp_path, combined, evaluations=given, title="<script>title</script>", settings={"<u>": "</pre>"})
    found = Tags(text)
    assert not {"script", "img", "u"} & set(found.tags)
    assert "onclick" not in {key for key, _ in found.attributes}
    assert "&lt;script&gt;alert(1)&lt;/script&gt;red" in text
    assert "$a_b$" in text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800]", text)
    assert "owned" not in text


def test_without_escaping_the_page_would_hold_the_script(
    tmp_path: Path, folders: dict[str, Path], whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minillm.report_parts.safe", str)
    assert "script" in Tags(written(tmp_path, whole, title="<script>title</script>")).tags


def test_cleaning_keeps_ordinary_text_of_any_script() -> None:
    text = "Größe\n\t鱼 שלום 🙂 [31m a < b"
    assert clean(text) == text
    assert safe("a < b & 'c' \"d\"") == "a &lt; b &amp; &#x27;c&#x27; &quot;d&quot;"
    assert clean("\x1b[1;31mANSI\x1b[0m\r\n") == "ANSI\n"
    assert plain("two\n lines\x1b[2J") == "two lines"


def test_one_model_without_teacher_shows_dashes_and_says_why(tmp_path: Path) -> None:
    given = {"solo": evaluation(tmp_path / "e", skill=0.5, world=False, teacher=False, temperatures=(1.0,))}
    combined = combine(given, differences=[], resamples=20, seed=0, seconds=None)
    text = written(tmp_path, combined, evaluations=given)
    for shown in (text, " ".join(printed(combined).split())):
        assert "–" in shown
        assert "validity (needs the checker of the micro-world)" in shown
        assert "reverse KL (needs a teacher)" in shown
        assert "there is none to compare it with" in shown
    assert "At several temperatures" not in text
    assert "<h2>Training" not in text


def test_the_first_table_has_the_main_measures_and_a_second_one_the_others(
    tmp_path: Path, whole: dict[str, Any]
) -> None:
    text, told = written(tmp_path, whole), printed(whole)
    main, _, more = text.partition("<h3>More measures</h3>")
    first, _, second = told.partition("More measures at temperature 1.0")
    for label, rows in (("exact match", (1, 0)), ("self-BLEU", (0, 1)), ("cut", (0, 1)), ("length", (1, 0))):
        found = tuple(int(f'<th scope="row">{label}<small>' in part) for part in (main, more))
        assert found == rows, label
        assert tuple(int(f"\n  {label} " in part) for part in (first, second)) == rows, label
    bare = {**whole, "models": {"old": {"rouge_l": {"mean": 0.5, "ci95": None}}}, "pairs": {}, "temperatures": {}}
    assert "More measures" not in written(tmp_path, bare) + printed(bare)
    assert "exact match" not in written(tmp_path, bare) + printed(bare)


def test_variety_is_plotted_against_rouge_where_there_is_no_checker(tmp_path: Path) -> None:
    given = {"solo": evaluation(tmp_path / "e", skill=0.5, world=False)}
    combined = combine(given, differences=[], resamples=20, seed=0, seconds=None)
    assert "ROUGE-L against variety" in written(tmp_path, combined)


def test_a_run_without_evaluation_has_its_curves(tmp_path: Path) -> None:
    combined = combine({}, differences=[], resamples=5, seed=0, seconds=None)
    course = metrics(tmp_path / "metrics.jsonl", stage="sft", steps=20)
    text = written(tmp_path, combined, training={"run": course})
    assert "No evaluated model is in this report" in text
    assert Tags(text).tags.count("svg") == 1
    assert "No evaluated model" in printed(combined)


def test_an_unfinished_last_line_and_repeated_steps_are_told(tmp_path: Path) -> None:
    rows = [
        {"kind": "train", "stage": "s", "step": s, "update": s, "loss": loss} for s, loss in ((1, 5), (2, 4), (2, 3))
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "tr', encoding="utf-8")
    course = read_course(tmp_path)
    assert [row["loss"] for row in course.rows] == [5, 3]
    assert ["left out" in note or "written twice" in note for note in course.notes] == [True, True]
    path.write_text('{"kind": "tr\n{}\n', encoding="utf-8")
    with pytest.raises(DataError, match="line 1, column"):
        read_course(tmp_path)


def test_values_that_are_not_finite_are_left_out_of_curves_and_counted(tmp_path: Path) -> None:
    lines = [
        {"kind": "train", "stage": "s", "step": s, "update": s, "loss": loss} for s, loss in ((1, 1.0), (2, math.nan))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    combined = combine({}, differences=[], resamples=5, seed=0, seconds=None)
    text = page(combined, samples={}, courses={"r": read_course(tmp_path)}, title="t", settings={})
    assert "1 values are not finite numbers and are not drawn" in text


def test_samples_show_the_same_prompt_for_each_model(tmp_path: Path, whole: dict[str, Any]) -> None:
    rows = {"uid": "u", "temperature": 1.0, "references": ["r1", "r2"], "stop": "length", "prompt": "the prompt"}
    bad = {**rows, "seed": 10, "response": "", "measures": {"validity": 0, "reason": "dup", "reverse_kl": 1.234}}
    good = {**rows, "seed": 10, "response": "fine", "measures": {"validity": 1, "reason": ""}}
    other_seed = {**good, "seed": 20, "response": "of another seed"}
    text = page(whole, samples={"sft": [bad], "minillm": [good, other_seed]}, courses={}, title="t", settings={})
    card = text[text.index("<article") : text.index("</article>")]
    for wanted in (
        "the prompt",
        "r1",
        "and 1 more",
        "(empty)",
        "not valid: dup",
        "reverse KL 1.23",
        "fine",
        "cut at the",
    ):
        assert wanted in card
    assert "of another seed" not in text


def test_drawing_touches_no_global_setting() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    svg = plots.bars([("m", 0, 0.5, (0.6, 0.7))], key="k", title="a < b", digits=2)  # the mean beside its interval
    assert dict(matplotlib.rcParams) == before
    assert "a &lt; b" in svg
    assert "var(--c0)" in svg
    assert not re.search("#010[ab]", svg)


def test_long_curves_are_averaged_in_blocks() -> None:
    x, y, block = plots.block_means(range(1000), [float(n % 2) for n in range(1000)])
    assert block == 5
    assert len(x) == len(y) == 200
    assert x[0] == 2.0
    assert sum(y) / len(y) == pytest.approx(0.5)
    assert plots.block_means([1.0], [2.0]) == ((1.0,), (2.0,), 1)
