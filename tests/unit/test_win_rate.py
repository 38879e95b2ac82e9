"""Which of two responses a frozen model finds likelier, as a stand-in for a judge.

1. Scores are those of a slow twin, the end token counted where the response has one; equal texts and small gaps tie.
2. Exchanging the sides mirrors the figures; a model that is held against itself wins half.
3. What length does to a sum is told, and a mean per token undoes it.
4. What cannot be compared is refused before the model is read, or counted; other results are not overwritten.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from minillm import cli
from minillm.errors import ConfigError, DataError, PositionsExceeded
from minillm.judge import likelihood
from minillm.judge.likelihood import win_rate
from minillm.micro_batches import Limits
from tests import tiny

EOS = tiny.WORDS.index(tiny.EOS)
PROMPTS = ("a b", "c d e", "f", "g h", "i j k", "l")
LEFT = ("b c d", "e", "f g", "k l m n o p", "z", "")
RIGHT = ("b c d", "e f", "h", "q", "y x", "a b c")
CUT = (2, 3)
"""Of the left side."""


def ids_of(text: str) -> list[int]:
    return [tiny.WORDS.index(letter) for letter in text.split()]


def evaluation(
    folder: Path, texts: Sequence[str], *, cut: Sequence[int] = (), references: Sequence[str] = ("",) * 6
) -> Path:
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"schema": 1, "measures": {}}))
    rows = [
        {
            "uid": f"test-{n}", "seed": 10, "temperature": 1.0, "prompt": PROMPTS[n], "response": text,
            "references": [references[n]] if references[n] else [],
            "stop": "length" if n in cut else "eos" if text else "empty", "measures": {},
        }
        for n, text in enumerate(texts)
    ]  # fmt: skip
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("m") / "teacher", "gpt2", seed=5, positions=48)


@pytest.fixture
def left(tmp_path: Path) -> Path:
    return evaluation(tmp_path / "left", LEFT, cut=CUT, references=RIGHT)


@pytest.fixture
def right(tmp_path: Path) -> Path:
    return evaluation(tmp_path / "right", RIGHT)


@torch.no_grad()
def plainly(model: Path, texts: Sequence[str], *, cut: Sequence[int] = ()) -> list[tuple[float, int]]:
    """(Log-probability, tokens) of each response, token by token with transformers alone."""
    network, found = AutoModelForCausalLM.from_pretrained(model).eval(), []
    for n, text in enumerate(texts):
        seen, total = ids_of(PROMPTS[n]), 0.0
        response = [*ids_of(text), *([] if n in cut else [EOS])]
        for token in response:
            logits_V = network(torch.tensor([seen])).logits[0, -1].double()
            total += float(logits_V.log_softmax(-1)[token])
            seen = [*seen, token]
        found.append((total, len(response)))
    return found


def judgements(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "judgements.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("per_token", [False, True])
def test_scores_and_shares_are_those_of_plain_forwards(model: Path, left: Path, right: Path, per_token: bool) -> None:
    record = win_rate(left, right, by=model, per_token=per_token)
    ours, theirs = plainly(model, LEFT, cut=CUT), plainly(model, RIGHT)
    rows = judgements(left / "win-rate-against-right")
    assert [row["logp"] for row in rows] == [
        pytest.approx([a[0], b[0]], abs=1e-4) for a, b in zip(ours, theirs, strict=True)
    ]
    gaps = [a[0] / (a[1] ** per_token) - b[0] / (b[1] ** per_token) for a, b in zip(ours, theirs, strict=True)]
    wins, ties = sum(gap > 1e-3 for gap in gaps), sum(abs(gap) <= 1e-3 for gap in gaps)
    assert ties == 1 and 0 < wins < 5  # the first pair has equal texts; and both sides win some
    shares = [wins / 6, 1 / 6, (5 - wins) / 6, (wins + 0.5) / 6]
    assert [record[name]["mean"] for name in ("win", "tie", "lose", "win_rate")] == pytest.approx(shares)
    assert record["margin"]["mean"] == pytest.approx(sum(gaps) / 6, abs=1e-4)
    assert record["win_rate"]["ci95"][0] < record["win_rate"]["mean"] < record["win_rate"]["ci95"][1]
    assert record["same"] == 1 and record["cut"] == {"left": 2, "right": 0}
    assert record["length"]["left"] == pytest.approx(sum(n for _, n in ours) / 6)
    assert json.loads((left / "win-rate-against-right" / "judge.json").read_text()) == record


def test_control_an_end_token_on_what_was_cut_would_be_seen(model: Path, left: Path) -> None:
    without, whole = plainly(model, LEFT, cut=CUT), plainly(model, LEFT)
    assert all(abs(without[n][0] - whole[n][0]) > 0.01 for n in CUT)


def test_exchanged_sides_mirror_the_figures_and_a_model_ties_with_itself(model: Path, left: Path, right: Path) -> None:
    one, other = win_rate(left, right, by=model), win_rate(right, left, by=model)
    assert one["win_rate"]["mean"] != 0.5
    assert other["win_rate"]["mean"] == pytest.approx(1 - one["win_rate"]["mean"])
    assert other["margin"]["mean"] == pytest.approx(-one["margin"]["mean"])
    itself = win_rate(left, left, by=model)
    assert (itself["win_rate"]["mean"], itself["tie"]["mean"], itself["same"]) == (0.5, 1.0, 6)


def test_a_difference_within_the_tie_decides_nothing(model: Path, left: Path, right: Path, tmp_path: Path) -> None:
    wide = win_rate(left, right, by=model, tie=1e3, out=tmp_path / "wide")
    assert (wide["tie"]["mean"], wide["win_rate"]["mean"]) == (1.0, 0.5) and wide["length"]["shorter_wins"] is None
    assert win_rate(left, right, by=model, tie=0.0, out=tmp_path / "none")["tie"]["mean"] == pytest.approx(1 / 6)


def test_a_sum_favours_the_shorter_and_says_so(model: Path, tmp_path: Path) -> None:
    """Every letter costs nats, so one letter beats ten; the mean per token does not care for the number."""
    short = evaluation(tmp_path / "short", ["q"] * 6)
    long = evaluation(tmp_path / "long", ["q r s t u v w x y z"] * 6)
    summed = win_rate(short, long, by=model, out=tmp_path / "sum")
    assert summed["win_rate"]["mean"] == 1.0 and summed["length"] == {"left": 2.0, "right": 11.0, "shorter_wins": 1.0}
    assert win_rate(long, short, by=model)["length"]["shorter_wins"] == 1.0
    means = win_rate(short, long, by=model, per_token=True, out=tmp_path / "mean")
    assert means["win_rate"]["mean"] < 1.0 and means["length"]["shorter_wins"] < 1.0


def test_references_are_the_other_side_and_whole(model: Path, left: Path, right: Path, tmp_path: Path) -> None:
    record = win_rate(left, against="references", by=model)
    same = win_rate(left, right, by=model)  # whose responses are these references, none of them cut
    for name in ("win", "tie", "lose", "win_rate", "margin"):
        assert record[name] == same[name]
    assert {row["right"] for row in judgements(left / "win-rate-against-references")} == {"reference"}
    bare = evaluation(tmp_path / "bare", RIGHT, references=("", "", *RIGHT[2:]))
    fewer = win_rate(bare, against="references", by=model)
    assert (fewer["prompts"], fewer["without_reference"], fewer["tie"]["mean"]) == (4, 2, 1.0)


def test_limits_change_no_figure(model: Path, left: Path, right: Path, tmp_path: Path) -> None:
    one = win_rate(left, right, by=model, limits=Limits(rows=1), out=tmp_path / "1")
    all_ = win_rate(left, right, by=model, limits=Limits(), out=tmp_path / "all")
    assert one["win_rate"] == all_["win_rate"]
    assert one["margin"]["mean"] == pytest.approx(all_["margin"]["mean"], abs=1e-5)


def test_a_cut_response_without_a_token_is_unjudged_and_counted(model: Path, tmp_path: Path) -> None:
    empty = evaluation(tmp_path / "empty", LEFT, cut=(5,))
    record = win_rate(empty, evaluation(tmp_path / "other", RIGHT), by=model)
    assert (record["judged"], record["unjudged"], record["prompts"]) == (5, 1, 6)
    assert record["unanswered"] == {likelihood.NO_TOKEN: 1} and record["win_rate"]["prompts"] == 5
    assert judgements(empty / "win-rate-against-other")[5]["verdict"] is None
    none = evaluation(tmp_path / "none", [""] * 6, cut=range(6))
    with pytest.raises(DataError, match="none of 6 pairs can be compared"):
        win_rate(none, tmp_path / "other", by=model)


def test_what_cannot_be_compared_is_refused_before_the_model_is_read(
    model: Path, left: Path, right: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(likelihood, "load_teacher", lambda *_, **__: pytest.fail("the model was read"))
    with pytest.raises(ConfigError, match="nothing to compare with"):
        win_rate(left, by=model)
    with pytest.raises(ConfigError, match="leave out B"):
        win_rate(left, right, against="references", by=model)
    for tie in (-1.0, math.nan, math.inf):  # neither of the last two could stand in the record
        with pytest.raises(ConfigError, match=f"tie: got {tie:g}, wanted 0 or more nats"):
            win_rate(left, right, by=model, tie=tie)
    with pytest.raises(PositionsExceeded, match="48 positions"):
        win_rate(evaluation(tmp_path / "long", [" ".join("abcde" * 10)] * 6), right, by=model)
    samples = left / "samples.jsonl"
    samples.write_text(samples.read_text().replace('"stop": "length", ', ""))
    with pytest.raises(DataError, match="does not say how its response ended"):
        win_rate(left, right, by=model)


def test_results_of_another_question_are_not_overwritten(model: Path, left: Path, right: Path) -> None:
    win_rate(left, right, by=model)
    file = left / "win-rate-against-right" / "judge.json"
    before = file.read_bytes()
    with pytest.raises(DataError, match="differ in: score"):
        win_rate(left, right, by=model, per_token=True)
    with pytest.raises(DataError, match="of 6 prompts, this one has 2"):
        win_rate(left, right, by=model, limit=2)
    assert file.read_bytes() == before
    assert win_rate(left, right, by=model, per_token=True, fresh=True)["asked"]["score"] == "mean"


def test_the_command_says_what_it_is_and_what_length_does(
    model: Path, left: Path, right: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str) -> str:
        assert cli._guarded(lambda **options: cli.app(["win-rate", *words, "--by", str(model)], **options)) == 0
        return " ".join(capsys.readouterr().out.split())  # in whatever lines

    text = run(str(left), str(right), "--json", str(tmp_path / "w.json"))
    assert "no judge was asked" in text and "--per-token takes means" in text
    assert re.search(r"win rate of A, ties as half +\d", text) and "both orders agree" not in text
    assert "2 of A, 0 of B" in text and "1 pair of equal texts" in text
    assert json.loads((tmp_path / "w.json").read_text())["judge"]["kind"] == "log-probability"
    text = run(str(left), "--against", "references", "--per-token", "--json", str(tmp_path / "w.json"))
    assert "nats a token" in text and "--per-token" not in text and "reference wins" in text
