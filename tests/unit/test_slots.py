"""Promises: the values of dialogue acts are found in replies as people write them, each in words of its own; the share
is a measure like any other; a set without such acts is refused before work begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minillm import api, distill
from minillm.config import RunConfig, dump_config
from minillm.errors import DataError, UnsupportedCombination
from minillm.measures import measure_rows, ratios_of
from minillm.report import build_report
from minillm.slots import acts_in, asked_values, coverage, missing_values, require_values
from minillm.study.config import load_study
from minillm.study.run import run_study
from minillm.templates import ALPACA_PLAIN
from minillm.yaml_reader import write_yaml
from tests import tiny
from tests.quick import undrawn

EVENT = "events: offer(event_name=Owls Vs Huskies); offer(date=March 13th); request(time); notify_success"


def missed(prompt: str, reply: str) -> list[str]:
    return [str(act) for act in missing_values(prompt, reply)]


def test_acts_are_read_whole() -> None:
    acts = acts_in("music: offer(track=Alone (live)); request(album); done(); hello")
    assert [(act.name, act.slot, act.value) for act in acts] == [
        ("offer", "track", "Alone (live)"), ("request", "album", None), ("done", "", None), ("hello", "", None),
    ]  # fmt: skip
    assert acts_in("offer(a=1); request(b)") and acts_in("flights: req_more")


@pytest.mark.parametrize(
    "text", ["", "Name a prime above ten.", "hello", "offer(a=1) and more", "Offer(a=1)", "a: b c"]
)
def test_control_other_text_is_no_acts(text: str) -> None:
    assert acts_in(text) == ()
    assert coverage(text, "anything") == {}


@pytest.mark.parametrize(
    "frame",
    [
        ALPACA_PLAIN.replace("{instruction}", "{}"),
        "Say this.\n\n{}",
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        "<s>{}</s>",
    ],
)
def test_a_template_around_the_acts_changes_nothing(frame: str) -> None:
    assert acts_in(frame.replace("{}", EVENT)) == acts_in(EVENT) != ()


@pytest.mark.parametrize(
    ("value", "reply"),
    [
        ("Owls Vs Huskies", "The OWLS  vs. Huskies!"),
        ("Mcdonald's", "How about mcdonald’s?"),
        ("$1,470.87", "You have 1,470.87 dollars."),
        ("$39", "It is $39.00."),
        ("7 pm", "At 7:00 PM.Is that fine?"),
        ("6:30 pm", "It starts at 6:30pm"),
        ("6:30 pm", "It starts at 6:30 p.m. there"),
        ("510-943-8264", "Call (510) 943-8264."),
        ("Full-size", "a full size car"),
        ("Pool, Luxury", "A luxury or a Pool ride?"),
        ("Where'd You Go, Bernadette", "Where'd You Go, Bernadette?"),
        ("Café ½", "CAFÉ ½"),
        ("東京", "「東京」です"),
    ],
)
def test_a_value_is_found_as_people_write_it(value: str, reply: str) -> None:
    assert missed(f"x: offer(a={value})", reply) == []


@pytest.mark.parametrize(
    ("value", "reply"),
    [
        ("1", "It leaves at 1:20 pm on March 11th for $1.50."),
        ("4", "It has a rating of 4.2"),
        ("2", "Two tickets"),
        ("6:30 pm", "It starts at 6:30 am"),
        ("Pool, Luxury", "A pool ride?"),
        ("New York", "York is new"),
        ("Owls", "The owl"),
        ("$1,470.87", "$1,470.88"),
        ("7 pm", "17 pm"),
    ],
)
def test_control_another_value_is_not_it(value: str, reply: str) -> None:
    assert missed(f"x: offer(a={value})", reply) == [f"a={value}"]


def test_no_word_serves_two_values() -> None:
    prompt = "hotels: confirm(hotel=11 Howard); confirm(rooms=1); confirm(days=1); confirm(city=New York)"
    assert missed(prompt, "1 room for 1 day at 11 Howard in New York") == []
    assert missed(prompt, "1 room at 11 Howard in New York") == ["days=1"]
    # The longest first, or the 1 would take the word that the place needs.
    assert missed("x: offer(n=1); offer(place=1 Hotel)", "1 at 1 Hotel") == []
    assert missed("x: offer(n=1); offer(place=1 Hotel)", "at 1 Hotel") == ["n=1"]


def test_what_replies_say_in_other_words_is_not_asked_for() -> None:
    prompt = "x: inform(wifi=True); inform(pets=false); offer(sub=None); offer(day=dontcare); offer_intent(intent=Buy)"
    assert asked_values(prompt) == [] != acts_in(prompt)
    assert coverage(prompt, "Yes.") == {"carried": 0, "values": 0}
    assert [
        str(act) for act in asked_values(prompt + "; offer(track=!!!); offer(intent=rent); offer(intent=rent)")
    ] == ["intent=rent"]


def row(uid: str, prompt: str, reply: str, *, seed: int = 1) -> dict[str, Any]:
    return {
        "uid": uid, "temperature": 1.0, "seed": seed, "prompt": prompt, "response": reply, "references": [],
        "stop": "eos", "tokens": 3, "extra": {}, "measures": {"repetition_3": 0, **coverage(prompt, reply)},
    }  # fmt: skip


def test_the_measure_is_values_carried_by_values_asked_for() -> None:
    rows = [
        row("a", EVENT, "Owls vs Huskies, on March 13th"),
        row("b", "x: offer(p=1); offer(q=two); offer(r=3); offer(s=4)", "1 and 4"),
        row("c", "x: request(time)", "When?"),
        row("d", "no acts here", "Fine."),
    ]
    assert rows[1]["measures"]["missing"] == "q=two; r=3"
    found = measure_rows(rows, resamples=100, seed=0)["coverage"]
    assert found["mean"] == pytest.approx(4 / 6)  # a mean over prompts would be (1 + 1/2) / 2
    assert "coverage" not in ratios_of(rows[2:])


def test_a_set_is_told_of() -> None:
    prompts = [EVENT, "x: inform(wifi=True)", "x: request(time)", "hello"]
    assert require_values(prompts, source="t.jsonl") == (
        "coverage: 2 values in the acts of 1 prompt; 2 prompts with acts but no value; "
        "1 prompt without acts, not measured; 1 value not asked for (truth values and the like)"
    )


@pytest.mark.parametrize(
    ("prompts", "why"), [(["hello", "you"], "no prompt holds dialogue acts"), (["x: request(a)"], "has a value to say")]
)
def test_a_set_with_nothing_to_check_is_refused(prompts: list[str], why: str) -> None:
    with pytest.raises(DataError, match=f"t.jsonl: .*{why}.*\n.*events: offer"):
        require_values(prompts, source="t.jsonl")


def save_rows(file: Path, prompts: list[str]) -> str:
    lines = [json.dumps({"id": f"r{n}", "prompt": prompt, "response": "b a"}) for n, prompt in enumerate(prompts)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models that know acts of two letters, and files of prompts with and without acts."""
    made = tmp_path_factory.mktemp("slots")
    letters = tiny.LETTERS[:8]
    pairs = [(letters[n], letters[(n * 3 + 1) % 8]) for n in range(8)]
    acts = [f"offer(x={one}); offer(y={two})" for one, two in pairs if one != two]
    words = list(dict.fromkeys([*tiny.WORDS, *" ".join(acts).split()]))
    for seed, name in enumerate(("teacher", "student"), start=1):
        tiny.save_model(made / name, "gpt2", seed=seed, words=words)
    save_rows(made / "acts.jsonl", acts)
    save_rows(made / "bare.jsonl", ["a b", "c d e"])
    return made


def run_config(place: Path, name: str, **data: str) -> RunConfig:
    files = {split: str(place / f"{data.get(split, 'acts')}.jsonl") for split in ("train", "validation", "test")}
    return tiny.minillm_config(
        place / "runs", teacher=place / "teacher", student=place / "student", prompts=place / "acts.jsonl", name=name,
        validate_every=1, keep={"metric": "coverage", "mode": "max"},
        run_data={**files, "max_prompt_tokens": 8, "checker": data.get("checker", "slots")},
        run_evaluation={"seeds": (1, 2), "bootstrap": 50, "temperatures": (1.0, 0.5)},
    )  # fmt: skip


def test_a_run_keeps_by_it_evaluates_it_and_reports_it(place: Path) -> None:
    config = run_config(place, "run")
    with undrawn():
        folder = distill(config)
    assert all(0 <= line["coverage"] <= 1 for line in tiny.logged(folder, "validation"))
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    at_one = [row["measures"] for row in rows if row["temperature"] == 1.0]
    share = sum(own["carried"] for own in at_one) / sum(own["values"] for own in at_one)
    assert 0 < share < 1
    assert results["measures"]["coverage"]["mean"] == pytest.approx(share)  # as many values under each seed
    assert results["asked"]["checker"] == "slots"
    plain = config.model_copy(update={"data": config.data.model_copy(update={"checker": None})})
    with pytest.raises(DataError, match="differ in: references, checker"):
        api.evaluate(folder / "student", plain, out=folder)
    bare = place / "plain"
    api.evaluate(folder / "student", plain, out=bare)
    with undrawn():
        for name, source, told in (("with", folder, True), ("without", bare, False)):
            page = build_report({name: source}, differences=[], training={}, out=place / name) or ""
            text = (place / name / "report.html").read_text(encoding="utf-8")
            assert (">coverage<" in text) is told, page


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_run_on_prompts_without_acts_is_refused_before_it_begins(place: Path, split: str) -> None:
    name = f"refused-{split}"
    with pytest.raises(DataError, match=r"bare.jsonl: no prompt holds dialogue acts"):
        distill(run_config(place, name, **{split: "bare"}))
    assert not (place / "runs" / name).exists()


def study_file(place: Path, config: RunConfig, **search: Any) -> Path:
    (place / "recipe.yaml").write_text(dump_config(config), encoding="utf-8")
    values = {
        "name": "slots", "recipe": str(place / "recipe.yaml"), "seeds": [1], "arms": {"plain": {}},
        "compare_with": "plain", "results": str(place / "cells"), **search,
    }  # fmt: skip
    (place / "study.yaml").write_text(write_yaml(values), encoding="utf-8")
    return place / "study.yaml"


def test_a_study_reads_its_test_set_before_it_trains(place: Path) -> None:
    chosen = load_study(study_file(place, run_config(place, "recipe", test="bare")))
    said: list[str] = []
    with pytest.raises(DataError, match=r"bare.jsonl: no prompt holds dialogue acts"):
        run_study(chosen, arms=["plain"], seeds=[1], again=False, say=said.append)
    assert said == []


def test_a_search_by_coverage_needs_the_checker(place: Path) -> None:
    search = {"search": {"values": [1e-3, 1e-2], "metric": "coverage"}}
    config = run_config(place, "recipe")
    assert load_study(study_file(place, config, **search)).search is not None  # control
    plain = {**search, "settings": {"data.checker": None, "stages.0.keep": {"metric": "reverse_kl", "mode": "min"}}}
    with pytest.raises(UnsupportedCombination, match=r"search.metric is 'coverage'.*data.checker: slots"):
        load_study(study_file(place, config, **plain))
