"""Promises: text measures have their known values; rows of samples.jsonl become the measures by definition."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest

from minillm.errors import DataError
from minillm.measures import (
    MAIN,
    MEASURES,
    NAMES,
    measure_rows,
    ratios_of,
    shown,
    summarise,
    temperature_key,
)
from minillm.text_measures import (
    distinct_contributions,
    exact_match,
    ngrams,
    numbered,
    repeated,
    repetition_3,
    rouge_l,
)


def row(uid: str, *, seed: int = 10, response: str = "a b c d", temperature: float = 1.0, **own: Any) -> dict[str, Any]:
    return {
        "uid": uid,
        "temperature": temperature,
        "seed": seed,
        "prompt": f"prompt of {uid}",
        "response": response,
        "references": [],
        "stop": "eos",
        "tokens": len(response.split()),
        "extra": {},
        "measures": {"repetition_3": int(repetition_3(response)), **own},
    }


def teacher(kl: float, tokens: int) -> dict[str, float]:
    """What a teacher says about a row: its divergence, a forward one that is larger by 1, and twice the nats."""
    return {"reverse_kl": kl, "forward_kl": kl + 1.0, "teacher_nll": 2.0 * kl, "kl_tokens": tokens}


def test_rouge_l_golden_values() -> None:
    assert rouge_l("the cat sat", ["the cat is on the mat"]) == pytest.approx(0.4444, abs=5e-5)  # 2PR/(P+R), 2/3, 2/6
    assert rouge_l("the cat sat", ["the cat sat"]) == 1.0
    assert rouge_l("running", ["runs"]) == 1.0  # both stem to "run"


def test_rouge_l_equals_the_library_called_plainly() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    plain = RougeScorer(["rougeL"], use_stemmer=True)
    texts = ["He walks to Kolm, then north.", "he walked north", "", "walking; then — north 7", "Größe zählt"]
    for reference in texts:
        for response in texts:
            assert rouge_l(response, [reference]) == plain.score(reference, response)["rougeL"].fmeasure


def test_rouge_l_takes_the_best_reference() -> None:
    worse, better = "something else entirely", "the cat sat there"
    assert rouge_l("the cat sat", [worse, better]) == rouge_l("the cat sat", [better]) > rouge_l("the cat sat", [worse])


def test_rouge_l_of_text_without_tokens_is_zero() -> None:
    assert rouge_l("", ["the cat"]) == rouge_l("the cat", [""]) == rouge_l("", [""]) == 0.0
    assert rouge_l("鱼", ["鱼"]) == 0.0  # the library's tokenizer is ASCII only, as documented


def test_rouge_l_without_references_is_an_error_and_not_zero() -> None:
    with pytest.raises(DataError, match="no reference"):
        rouge_l("the cat", [])


def test_exact_match_sees_words_only_and_keeps_articles() -> None:
    assert exact_match("  The cat,\n sat! ", ["a dog", "the CAT sat"])
    assert exact_match("U.S.", ["us"])  # punctuation goes, and nothing takes its place
    assert not exact_match("cat sat", ["the cat sat"])  # SQuAD's own would drop the article
    assert not exact_match("the cat", ["the cat sat"])
    assert not exact_match("", ["the cat"]) and exact_match("...", [""])
    with pytest.raises(DataError, match="no reference"):
        exact_match("the cat", [])


def test_repeated_runs_are_those_that_stood_earlier() -> None:
    assert repeated("a b c a b c", 3) == (1, 4)  # abc, bca, cab, abc
    assert repeated("a a a a a", 3) == (2, 3)
    assert repeated("a b", 3) == (0, 0)


def test_ngrams_of_short_text_are_none() -> None:
    assert ngrams("a b", 3) == []
    assert ngrams("a b c d", 3) == [("a", "b", "c"), ("b", "c", "d")]
    *_, (runs, counts) = numbered(["a b c", "b c", "c", "c a"], 2)
    assert counts.tolist() == [2, 1, 0, 1] and len(runs) == 4, "a b, b c; b c; nothing; c a"
    assert runs[1] == runs[2] and len(set(runs.tolist())) == 3


def test_repetition_is_a_run_of_three_words_that_returns() -> None:
    assert repetition_3("go north go north go north")
    assert repetition_3("a a a a")  # the two runs overlap
    assert not repetition_3("a b c d a b d")  # a pair that returns is not enough
    assert not repetition_3("")


def test_distinct_contributions_add_up_to_the_distinct_share() -> None:
    texts = ["a b c d e", "a b c d", "x", "b c d e b c d e"]
    found = distinct_contributions(texts, 4)
    runs = [run for text in texts for run in ngrams(text, 4)]
    assert sum(d for d, _ in found) == pytest.approx(len(set(runs)))
    assert sum(n for _, n in found) == len(runs)
    alone = sum(distinct_contributions([text], 4)[0][0] for text in texts)
    assert alone > len(set(runs))  # counted text by text, shared runs would count again


def test_measures_follow_their_definitions() -> None:
    samples = [
        row("a", response="a b c d e", validity=1, rouge_l=0.5, exact_match=1, **teacher(2.0, 6)),
        row("b", response="a b c d", validity=0, rouge_l=0.7, exact_match=0, **teacher(4.0, 4)),
        row("a", seed=20, response="a b a b a", validity=1, rouge_l=0.1, exact_match=0, **teacher(1.0, 6)),
        row("b", seed=20, response="", validity=1, rouge_l=0.3, exact_match=0, **teacher(0.0, 1)),
    ]
    samples[1]["stop"] = "length"
    for sample in samples:
        own = {"a": (3.0, 2), "b": (6.0, 3)}[sample["uid"]]
        sample["measures"].update(gold_nll=own[0], gold_tokens=own[1])
        sample["measures"].update(carried=own[1] - sample["measures"]["validity"], values=own[1])
    found = measure_rows(samples, resamples=20, seed=0)
    assert tuple(found) == NAMES
    want = {
        "validity": [0.5, 1.0],
        "coverage": [4 / 5, 3 / 5],
        "rouge_l": [0.6, 0.2],
        "exact_match": [0.5, 0.0],
        "reverse_kl": [3.0, 0.5],
        "reverse_kl_per_token": [6 / 10, 1 / 7],
        "forward_kl": [4.0, 1.5],
        "teacher_nll": [12 / 10, 2 / 7],
        "gold_nll": [9 / 5, 9 / 5],
        "distinct_1": [5 / 9, 2 / 5],
        "distinct_2": [4 / 7, 2 / 4],
        "distinct_3": [3 / 5, 2 / 3],
        "distinct_4": [2 / 3, 1.0],
        "repetition_3": [0.0, 0.5],
        "repeated_3": [0.0, 1 / 3],
        "mean_length": [4.5, 2.5],
        "cut_share": [0.5, 0.0],
    }
    assert want.keys() == set(NAMES) - {"self_bleu"}
    for name, per_seed in want.items():
        assert found[name]["per_seed"] == pytest.approx(per_seed), name
        assert found[name]["mean"] == pytest.approx(sum(per_seed) / 2), name
        low, high = found[name]["ci95"]
        assert low <= high
    # Precisions 4/5, 3/4, 2/3, 1/2 of "a b c d e"; all of "a b c d", which is shorter than its reference.
    longer, shorter = (0.8 * 0.75 * (2 / 3) * 0.5) ** 0.25, math.exp(1 - 5 / 4)
    assert found["self_bleu"]["per_seed"] == [pytest.approx((longer + shorter) / 2), None]


def test_absent_measures_are_left_out() -> None:
    found = measure_rows([row("a"), row("b")], resamples=5, seed=0)
    of_text = {f"distinct_{n}" for n in (1, 2, 3, 4)} | {"self_bleu", "repetition_3", "repeated_3"}
    assert set(found) == of_text | {"mean_length", "cut_share"}


def test_two_tables_hold_what_there_is() -> None:
    found = measure_rows([row("a"), row("b")], resamples=5, seed=0)
    first, second = shown({"one": found, "two": {}})
    assert first == [name for name in MAIN if name not in {"coverage", "exact_match"}]
    assert second == [name for name in NAMES if name in found and name not in MAIN]
    matched = measure_rows([row("a", exact_match=1, carried=1, values=2)], resamples=5, seed=0)
    assert shown({"one": found, "two": matched})[0] == list(MAIN)
    assert shown({})[1] == []


def test_a_measure_of_some_rows_counts_those_rows_and_says_so() -> None:
    found = measure_rows([row("a", rouge_l=0.5), row("b"), row("c", rouge_l=1.0)], resamples=5, seed=0)
    assert found["rouge_l"]["mean"] == 0.75
    assert found["rouge_l"]["prompts"] == 2
    assert "prompts" not in found["mean_length"]


@pytest.mark.parametrize("name", ["forward_kl", "gold_nll"])
def test_a_measure_that_is_infinite_in_a_row_is_absent(name: str) -> None:
    """And not the mean of the others, which the control is."""
    own = {**teacher(1.0, 2), "gold_nll": 1.0, "gold_tokens": 2}
    samples = [row("a", **own), row("b", **own)]
    assert name in ratios_of(samples)
    samples[1]["measures"][name] = None
    assert name not in ratios_of(samples) and "reverse_kl" in ratios_of(samples)
    del samples[1]["measures"][name]
    assert ratios_of(samples)[name].denominator_SN.tolist() in ([[1.0, 0.0]], [[2.0, 0.0]])


def test_seeds_may_list_their_prompts_in_another_order() -> None:
    samples = [row("a", validity=1), row("b", validity=0), row("b", seed=20, validity=0), row("a", seed=20, validity=1)]
    one = ratios_of(samples)["validity"]
    assert one.uids == ("a", "b")
    assert one.numerator_SN.tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize(
    ("samples", "told"),
    [
        ([], "no samples"),
        ([row("a"), row("a")], "'a' occurs twice under sampling seed 10"),
        ([row("a"), row("b"), row("a", seed=20)], "do not share prompt 'b'"),
        ([row("a"), row("b", temperature=0.8)], r"temperatures \[0.8, 1.0\]"),
        ([{key: value for key, value in row("a").items() if key != "tokens"}], "no field 'tokens'"),
        ([row("a", reverse_kl=1.0)], "'reverse_kl' and no 'kl_tokens'"),
        ([row("a", gold_nll=1.0)], "'gold_nll' and no 'gold_tokens'"),
    ],
)
def test_samples_that_are_no_full_grid_are_refused(samples: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(DataError, match=told):
        measure_rows(samples, resamples=5, seed=0)


def test_summary_holds_every_temperature_and_leads_with_one() -> None:
    samples = [row(uid, temperature=t, validity=int(t < 1)) for t in (0.8, 1.0) for uid in "ab"]
    main, each = summarise(samples, temperatures=(0.8, 1.0), resamples=5, seed=0)
    assert list(each) == ["0.8", "1.0"]
    assert main == each["1.0"]
    assert (main["validity"]["mean"], each["0.8"]["validity"]["mean"]) == (0.0, 1.0)
    main, each = summarise(samples[:2], temperatures=(0.8,), resamples=5, seed=0)
    assert main == each["0.8"]
    assert temperature_key(1) == "1.0"


def test_summary_refuses_missing_and_unasked_temperatures() -> None:
    with pytest.raises(DataError, match=r"no sample at temperature 0\.6"):
        summarise([row("a")], temperatures=(1.0, 0.6), resamples=5, seed=0)
    with pytest.raises(DataError, match=r"temperature 1\.0, wanted one of 0\.8"):
        summarise([row("a")], temperatures=(0.8,), resamples=5, seed=0)


def test_each_measure_says_what_it_means() -> None:
    assert all(measure.label and measure.meaning for measure in MEASURES.values())


def test_importing_the_measures_imports_nothing_heavy() -> None:
    code = "import sys, minillm.measures, minillm.report; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "minillm.report" in loaded
    assert not {"matplotlib", "rich", "rouge_score", "nltk", "torch", "transformers"} & set(loaded)
