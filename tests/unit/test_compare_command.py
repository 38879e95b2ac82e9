"""Promises of ``minillm compare``: what cannot be compared is refused with nothing written, verdicts follow the
numbers, the page is whole and safe, and what it leaves out it says.
"""

from __future__ import annotations

import copy
import json
import random
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from minillm import cli
from minillm.compare import html
from minillm.compare.command import compare
from minillm.compare.summary import Options, main_measures
from minillm.compare.words import describe, power
from minillm.errors import ConfigError, DataError
from minillm.report_files import named_folders
from minillm.text_measures import repetition_3

QUICK = Options(resamples=200, by="family", shown=3)
VOID = frozenset({"meta", "br", "input", "path", "use", "rect", "hr"})
DECODING = {"max_new_tokens": 48, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
Record = dict[str, Any]


def evaluation(
    folder: Path,
    *,
    skill: float = 0.6,
    temperatures: Sequence[float] = (1.0, 0.6),
    prompts: int = 24,
    seeds: Sequence[int] = (10, 20),
    change: Callable[[Record], Record] = lambda row: row,
    **results: Any,
) -> Path:
    """An evaluation folder of made-up responses, ``skill`` of them valid; ``change`` is done to every row."""
    rows = []
    for temperature in temperatures:
        for seed in seeds:
            for n in range(prompts):
                dice = random.Random(f"{n} {seed} {temperature}")
                good = dice.random() < skill + 0.3 * (1 - temperature)
                words = dice.choices(["ann", "bob", "cat", "dog", "north"], k=dice.randint(5, 9))
                text = " ".join(words if good or temperature < 1 else [*words, str(n), str(skill), str(seed), "and"])
                measures = {"repetition_3": int(repetition_3(text)), "rouge_l": 0.6 + 0.1 * good, "validity": int(good)}
                measures |= {"reason": "" if good else "fact", "reverse_kl": 2 - skill + dice.random(), "kl_tokens": 9}
                row = {"uid": f"t{n}", "temperature": temperature, "seed": seed, "prompt": f"describe {n}"}
                row |= {"response": text, "references": ["word " * (3 + n % 12)], "stop": "eos", "tokens": len(words)}
                rows.append(change(row | {"extra": {"family": "ab"[n % 2]}, "measures": measures}))
    told = {
        "schema": 1,
        "model": {"name": folder.name, "path": folder.name},
        "teacher": {"name": "teacher"},
        "data": {"source": "world:test", "rows": prompts, "sha256": "abc"},
        "decoding": DECODING,
        "asked": {"weights": folder.name, "teacher_weights": "t"},
        "measures": {},
    }
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(told | results), encoding="utf-8")
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("evaluations")
    return {name: evaluation(place / name, skill=skill) for name, skill in (("a", 0.3), ("b", 0.7), ("c", 0.35))}


def pair_of(folders: Mapping[str, Path], *names: str, **options: Any) -> Record:
    chosen = {name: folders[name] for name in names}
    return compare(chosen, options=Options(resamples=200, **options), quiet=True)


def row_change(field: str, value: Any, *, uid: str = "t3") -> Callable[[Record], Record]:
    return lambda row: row | {field: value} if row["uid"] == uid else row


# What is refused


BAD_ROWS: list[tuple[Callable[[Record], Record], str]] = [
    (row_change("prompt", "another"), "prompt 't3' has another text of its prompt"),
    (row_change("references", ["other"]), "prompt 't3' has another text of its references"),
    (row_change("uid", "x3"), "different data: 24 and 24 prompts, 2 of them in one only, such as 't3'"),
    (row_change("uid", "t4"), "different data|occurs twice"),
    (row_change("measures", {"rouge_l": "high"}), "a measure in samples.jsonl is no number"),
    (row_change("measures", [1]), "'measures' is"),
    (row_change("seed", "ten"), "'seed' is 'ten'"),
    (row_change("temperature", None), "'temperature' is None"),
    (row_change("temperature", -1.0), "temperature -1.0"),
    (row_change("references", "word"), "'references' is no list"),
]


@pytest.mark.parametrize(("change", "told"), BAD_ROWS, ids=[told[:20] for _, told in BAD_ROWS])
def test_samples_that_do_not_fit_are_refused(
    change: Callable[[Record], Record], told: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    other = evaluation(tmp_path / "other", change=change)
    with pytest.raises(DataError, match=told):
        compare({"a": folders["a"], "other": other}, out=tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_unspoilt_samples_are_compared(folders: dict[str, Path], tmp_path: Path) -> None:
    """The control of the refusals: an evaluation of the same making is taken, and files are written."""
    other = evaluation(tmp_path / "other")
    compare({"a": folders["a"], "other": other}, options=QUICK, out=tmp_path / "out", quiet=True)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["compare.html"]


REFUSED: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("{a}",), ("ConfigError", "got 1 evaluation, wanted two or more")),
    (("{a}", "{place}/empty"), ("DataError", "results.json: no such file", "minillm evaluate")),
    (("{a}", "{place}/nowhere"), ("DataError", "nowhere is not there; wanted the folder")),
    (("{a}", "{place}/a-file"), ("DataError", "a-file is a file")),
    (("{a}", "{a}"), ("ConfigError", "'a' is given twice; give each folder a name")),
    (("x={a}", "x={b}"), ("ConfigError", "'x' is given twice")),
    (("{a}", "={b}"), ("ConfigError", "wanted FOLDER or NAME=FOLDER")),
    (("{a}", "{place}/none"), ("DataError", "no samples")),
    (("{a}", "{place}/fewer"), ("DataError", "different data: 24 and 23 prompts")),
    (("{a}", "{place}/colder"), ("DataError", "temperature is 1.0, 0.6 for a and 0.5 for colder", "--across")),
    (("{a}", "{place}/top"), ("DataError", "top_k is 0 for a and 40 for top", "give --across to `minillm compare`")),
    (("{a}", "{b}", "--by", "famly"), ("ConfigError", "no sample has it; there are family", "did you mean 'family'")),
    (("{a}", "{b}", "--tolerance", "-1"), ("ConfigError", "--tolerance -1.0: wanted a number of 0 or more")),
    (("{a}", "{b}", "--json", "{place}/empty"), ("DataError", "is a folder, wanted a file")),
    (("{a}", "{b}", "--json", "{place}/no/x.json"), ("DataError", "there is no folder")),
    (("{a}", "{b}", "--out", "{place}/a-file"), ("ConfigError", "cannot be used as a folder", "--out")),
    (("{a}", "{b}", "--json", "{place}/out/compare.html"), ("ConfigError", "is the page that --out writes")),
    (("{a}", "{place}/seeds", "--resample-seeds"), ("DataError", "sampling seeds [10, 20] and [1, 2]")),
]


def test_bad_input_is_told_and_writes_nothing(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a-file").write_text("")
    evaluation(tmp_path / "none", prompts=0)
    evaluation(tmp_path / "fewer", prompts=23)
    evaluation(tmp_path / "colder", temperatures=(0.5,))
    evaluation(tmp_path / "top", decoding=DECODING | {"top_k": 40})
    evaluation(tmp_path / "seeds", seeds=(1, 2))
    names = {"{a}": str(folders["a"]), "{b}": str(folders["b"]), "{place}": str(tmp_path)}

    def run(arguments: Sequence[str]) -> tuple[int, str]:
        words = ["compare", "--resamples", "100", "--out", str(tmp_path / "out")]
        for argument in arguments:
            words.append(re.sub(r"\{\w+\}", lambda found: names[found.group()], argument))
        code = cli._guarded(lambda **options: cli.app(words, **options))
        return code, capsys.readouterr().err

    for arguments, told in REFUSED:
        code, err = run(arguments)
        assert code == 2 and 1 <= len(err.strip().splitlines()) <= 4, (arguments, err)
        assert all(word in err for word in told), (arguments, err)
        assert not (tmp_path / "out").exists(), arguments
    assert run(["{a}", "{b}", "--json", "{place}/out/x.json"])[0] == 0  # the control, and both files in a new folder
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"compare.html", "x.json"}


def test_a_folder_gives_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "k=v").mkdir()
    assert list(named_folders([str(tmp_path / "k=v"), f"n={tmp_path}"])) == ["k=v", "n"]


def test_prompts_in_another_order_are_the_same_prompts(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["b"], tmp_path / "b")
    file = tmp_path / "b" / "samples.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    random.Random(0).shuffle(lines)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    shuffled = pair_of({"a": folders["a"], "b": tmp_path / "b"}, "a", "b")
    assert shuffled["comparisons"] == pair_of(folders, "a", "b")["comparisons"]


# What is told instead


def test_different_decoding_is_compared_when_asked_for(folders: dict[str, Path], tmp_path: Path) -> None:
    given = {"a": folders["a"], "top": evaluation(tmp_path / "top", decoding=DECODING | {"top_k": 40})}
    given["colder"] = evaluation(tmp_path / "colder", temperatures=(0.5,))
    found = pair_of(given, "a", "top", across=True)
    assert "top_k is 0 for a and 40 for top" in found["notes"][0]
    assert "reverse_kl" not in found["comparisons"][0]["changes"]
    assert pair_of(given, "a", "colder", across=True)["comparisons"][0]["at"] == ["1.0", "0.5"]


def test_a_setting_that_came_later_counts_as_its_default(folders: dict[str, Path], tmp_path: Path) -> None:
    later = DECODING | {"no_repeat_ngram_size": 0, "repetition_penalty": 1.0}
    evaluation(tmp_path / "later", decoding=later)
    assert pair_of({"a": folders["a"], "later": tmp_path / "later"}, "a", "later")["notes"] == []
    evaluation(tmp_path / "other", decoding=later | {"repetition_penalty": 1.2})
    with pytest.raises(DataError, match=r"repetition_penalty is 1\.0 for a and 1.2 for other"):
        pair_of({"a": folders["a"], "other": tmp_path / "other"}, "a", "other")


@pytest.mark.parametrize(
    ("about", "told", "gone"),
    [
        ({"asked": {"teacher_weights": "u"}}, "different teachers", {"reverse_kl", "reverse_kl_per_token"}),
        (
            {"data": {"sha256": "x"}},
            "as other tokens",
            {"reverse_kl", "reverse_kl_per_token", "mean_length", "cut_share"},
        ),
        ({"asked": {"weights": "a", "teacher_weights": "t"}}, "of the same weights", set[str]()),
    ],
)
def test_what_cannot_be_compared_is_left_out_and_told(
    about: Record, told: str, gone: set[str], folders: dict[str, Path], tmp_path: Path
) -> None:
    found = pair_of({"a": folders["a"], "o": evaluation(tmp_path / "o", **about)}, "a", "o")
    assert told in found["notes"][0]
    everything = set(pair_of(folders, "a", "b")["comparisons"][0]["changes"])
    assert everything - set(found["comparisons"][0]["changes"]) == gone


def test_other_sampling_seeds_are_compared_by_their_means(folders: dict[str, Path], tmp_path: Path) -> None:
    found = pair_of({"a": folders["a"], "o": evaluation(tmp_path / "o", seeds=(1, 2, 3))}, "a", "o")
    assert "different sampling seeds (10, 20 against 1, 2, 3)" in found["notes"][0]
    assert pair_of(folders, "a", "b")["notes"] == []  # control


# What is found


def test_a_model_against_itself(folders: dict[str, Path]) -> None:
    found = pair_of({"a": folders["a"], "again": folders["a"]}, "a", "again")
    pair = found["comparisons"][0]
    assert all(change["mean"] == 0 and change["ci95"] == [0, 0] for change in pair["changes"].values())
    assert all(of["wins"] == of["losses"] == 0 for of in pair["wins"].values())
    assert pair["extremes"] == {"other": [], "base": []}
    assert pair["equal_diversity"]["validity"]["mean"] == 0
    assert "validity: no difference at all" in describe(found)[0][1][0]
    assert pair_of(folders, "a", "b")["comparisons"][0]["wins"]["validity"]["wins"] > 0  # control


def test_first_against_each_and_all_pairs_of_few(folders: dict[str, Path]) -> None:
    three = compare(folders, options=QUICK, quiet=True)
    assert [(p["base"], p["other"]) for p in three["comparisons"]] == [("a", "b"), ("a", "c"), ("b", "c")]
    many = {str(n): folders["abc"[n % 3]] for n in range(5)}
    five = compare(many, options=QUICK, quiet=True)
    assert [(p["base"], p["other"]) for p in five["comparisons"]] == [("0", str(n)) for n in range(1, 5)]
    corrected = [name for pair in five["comparisons"] for name, change in pair["changes"].items() if "holm" in change]
    main = main_measures(five["comparisons"][0]["changes"])
    assert corrected == 4 * main and five["corrected"] == 4 * len(main)
    assert len(main) < len(five["comparisons"][0]["changes"])


def test_kinds_of_prompts_and_the_prompts_that_differ_most(folders: dict[str, Path]) -> None:
    found = compare({n: folders[n] for n in "ab"}, options=QUICK, quiet=True)
    pair = found["comparisons"][0]
    assert {k: v["prompts"] for k, v in pair["groups"].items()} == {
        "0-5 words": 6, "6-10 words": 10, "11+ words": 8, "family a": 12, "family b": 12,
    }  # fmt: skip
    weighted = sum(v["prompts"] * v["changes"]["validity"]["mean"] for k, v in pair["groups"].items() if "fam" in k)
    assert weighted / 24 == pytest.approx(pair["changes"]["validity"]["mean"])
    ahead = pair["extremes"]["other"]
    assert len(ahead) == 3 and [one["gain"] for one in ahead] == sorted((o["gain"] for o in ahead), reverse=True)
    for one in ahead:
        base, other = one["rows"]
        assert base["uid"] == other["uid"] == one["uid"] and base["seed"] == other["seed"]
        assert other["measures"]["validity"] > base["measures"]["validity"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_most_different_prompts_by_hand(tmp_path: Path) -> None:
    """ROUGE-L of t0 … t4: level, other ahead by 0.1, by 0.3, base ahead by 0.2, by 0.4; nothing of it in the order."""
    gains = {"t0": 0.0, "t1": 0.1, "t2": 0.3, "t3": -0.2, "t4": -0.4}

    def set_rouge(row: Record, gain: float) -> Record:
        return row | {"measures": {"rouge_l": 0.5 + gain * (2 if row["seed"] == 20 else 0)}}

    given = {
        "base": evaluation(tmp_path / "base", prompts=5, change=lambda row: set_rouge(row, 0.0)),
        "other": evaluation(tmp_path / "other", prompts=5, change=lambda row: set_rouge(row, gains[row["uid"]])),
    }
    found = pair_of(given, "base", "other")["comparisons"][0]["extremes"]
    assert [(one["uid"], round(one["gain"], 9)) for one in found["other"]] == [("t2", 0.3), ("t1", 0.1)]
    assert [(one["uid"], round(one["gain"], 9)) for one in found["base"]] == [("t4", -0.4), ("t3", -0.2)]
    assert {row["seed"] for side in found.values() for one in side for row in one["rows"]} == {20}  # where they differ
    assert [one["uid"] for one in pair_of(given, "base", "other", shown=1)["comparisons"][0]["extremes"]["base"]] == [
        "t4"
    ]


# The words


def lines(found: Record) -> str:
    return "\n".join(text for _, sentences in describe(found) for text in sentences)


def test_the_verdict_follows_the_interval(folders: dict[str, Path]) -> None:
    found = copy.deepcopy(pair_of(folders, "a", "b"))
    change = found["comparisons"][0]["changes"]["validity"]
    change.update(mean=0.12, ci95=[0.1, 0.14], base=0.4, other=0.52)
    assert "validity: b is better: +0.120 (+0.100 to +0.140); 0.520 against 0.400 of a." in lines(found)
    change.update(mean=-0.12, ci95=[-0.14, -0.1], base=0.52, other=0.4)
    assert "validity: a is better: +0.120 (+0.100 to +0.140); 0.520 against 0.400 of b." in lines(found)
    change.update(mean=0.02, ci95=[-0.1, 0.14], error=0.06, detectable=0.168, needs=1696)
    told = (
        "validity: the data cannot tell: +0.020 (−0.100 to +0.140); the interval holds 0. With this spread about 1,700"
    )
    assert told in lines(found)
    kl = found["comparisons"][0]["changes"]["reverse_kl"]
    kl.update(mean=-0.5, ci95=[-0.6, -0.4], base=2.0, other=1.5)
    assert "reverse KL: b is better: −0.500 (−0.600 to −0.400); 1.500 against 2.000 of a." in lines(found)


def test_among_several_the_correction_has_the_last_word(folders: dict[str, Path]) -> None:
    found = copy.deepcopy(compare(folders, options=QUICK, quiet=True))
    change = found["comparisons"][0]["changes"]["validity"]
    change.update(mean=0.12, ci95=[0.1, 0.14], base=0.4, other=0.52, holm=0.2)
    assert "validity: b looks better: +0.120 (+0.100 to +0.140), but among all" in lines(found)
    change["holm"] = 0.01
    assert "validity: b is better" in lines(found) and "corrected for all" not in lines(found).lower().split("b is")[0]
    assert f"Holm's correction over the {found['corrected']} comparisons that get a verdict" in lines(found)
    assert found["corrected"] % 3 == 0
    assert "too coarse for so many comparisons" in lines(found)  # 200 resamples
    assert "Holm" not in lines(pair_of(folders, "a", "b"))


def test_a_difference_too_near_zero_asks_for_no_number_of_prompts() -> None:
    change = {"needs": 12_345_678, "prompts": 400, "detectable": 0.02}
    assert "more than a million prompts" in power(change, "validity")
    assert "about 1,200 prompts" in power(change | {"needs": 1234}, "validity")


def test_equal_diversity_in_words(folders: dict[str, Path], tmp_path: Path) -> None:
    found = copy.deepcopy(pair_of(folders, "a", "b"))
    at = found["comparisons"][0]["equal_diversity"]
    at["validity"] |= {"mean": 0.05, "ci95": [0.02, 0.08], "range": [0.4, 0.6]}
    assert "At equal diversity (distinct-4 0.400 to 0.600" in lines(found) and "b is better there" in lines(found)
    at["validity"] |= {"ci95": [-0.02, 0.08], "apart": 0.3}
    assert "cannot be told from 0" in lines(found) and "In 30% of the resamples" in lines(found)
    at["validity"] |= {"mean": None, "ci95": None, "range": None}
    assert "which do not overlap" in lines(found)
    alone = {"a": folders["a"], "one": evaluation(tmp_path / "one", temperatures=(1.0,))}
    told = pair_of(alone, "a", "one")
    assert "one has one temperature only" in lines(told) and "at temperature 0.6" in told["notes"][0]


# The page


class Tags(HTMLParser):
    """Every tag, id and attribute of a page; fails where tags are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def of(self, name: str) -> list[str]:
        return [value for attribute, value in self.attributes if attribute == name]


EVIL = "<script>alert(1)</script>\x1b[31m</pre><img src=x>"


def evil_page(tmp_path: Path) -> str:
    spoil: Callable[[Record], Record] = lambda row: row | {"response": row["response"] + EVIL, "prompt": EVIL}  # noqa: E731
    given = {EVIL: evaluation(tmp_path / "a", skill=0.3, change=spoil), "b": evaluation(tmp_path / "b", change=spoil)}
    compare(given, options=QUICK, out=tmp_path / "out", quiet=True, title=EVIL)
    return (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")


def test_the_page_is_whole_and_its_filters_point_at_what_is_there(folders: dict[str, Path], tmp_path: Path) -> None:
    compare(folders, options=QUICK, out=tmp_path, quiet=True)
    text = (tmp_path / "compare.html").read_text(encoding="utf-8")
    found = Tags(text)
    ids = found.of("id")
    assert len(ids) == len(set(ids)) and set(found.of("for")) <= set(ids)
    shown = {word for value in found.of("class") for word in value.split() if word.startswith("show-")}
    assert shown >= {"show-all", "show-other", "show-base", "show-any", "show-l1", "show-l2"}
    for word in shown - {"show-all", "show-any"}:
        assert f".{word}:checked" in html.STYLE
    assert "script" not in found.tags and "default-src 'none'" in text and "://" not in text
    assert "prefers-color-scheme: dark" in text and "@media print" in text and "width=device-width" in text
    assert found.tags.count("article") == sum(
        len(p["extremes"][side])
        for p in compare(folders, options=QUICK, quiet=True)["comparisons"]
        for side in ("other", "base")
    )
    assert "<svg" in text and 'class="reach' in text


def test_what_a_stranger_wrote_is_escaped(tmp_path: Path) -> None:
    text = evil_page(tmp_path)
    assert not {"script", "img"} & set(Tags(text).tags)
    assert "\x1b" not in text and "&lt;script&gt;alert(1)" in text


def test_control_without_escaping_the_page_would_hold_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(html, "safe", str)
    assert "<script>" in evil_page(tmp_path)


def test_a_bar_lies_where_its_interval_does() -> None:
    drawn = html.bar({"mean": 0.5, "ci95": [0.0, 1.0]}, reach=1.0, label="x")
    assert 'd="M110.0 9.0H214.0"' in drawn and 'class="reach no"' in drawn
    assert 'd="M162.0 9.0H214.0"' in html.bar({"mean": 0.7, "ci95": [0.5, 1.0]}, reach=1.0, label="x")
    assert html.bar({"mean": 0.5, "ci95": None}, reach=1.0, label="x") == ""
    assert "NaN" not in html.bar({"mean": 0.0, "ci95": [0.0, 0.0]}, reach=0.0, label="x")


def test_the_terminal_shows_names_as_they_are(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    compare({"[red]a[/red]": folders["a"], "b\x1b[31m": folders["b"]}, options=QUICK)
    shown = capsys.readouterr().out
    assert "[red]a[/red]" in shown and "\x1b[31m" not in shown
    for word in ("validity", "95 % interval", "Where b is most ahead", "At equal diversity", "By kind of prompt"):
        assert word in shown


def test_options_out_of_range_are_refused() -> None:
    for wrong in ({"resamples": 10}, {"shown": -1}, {"tolerance": float("nan")}):
        with pytest.raises(ConfigError):
            Options(**wrong)
    assert Options(tolerance=0.0).tolerance == 0
