"""On how many held-out pairs a model gives the chosen response the higher implicit reward.

1. Figures are those of the definition on small cases, and rewards those of a slow twin, with a reference and without.
2. Exchanging chosen and rejected mirrors the figures; a model that is its own reference prefers nothing.
3. Pairs of one prompt are drawn together.
4. What cannot be measured is refused, and a falling chosen response is told.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from minillm import cli
from minillm.config import RunConfig, dump_config
from minillm.errors import DataError, VocabularyMismatch
from minillm.pair_accuracy import Rewards, figures, pair_accuracy, rewards_of
from minillm.pair_accuracy_command import words
from minillm.types import PreferencePair, Prompt
from tests import tiny

EOS = tiny.WORDS.index(tiny.EOS)
PAIRS = [
    ("a b", "c", "d e f"),
    ("c d e", "g h", "a"),
    ("f", "q r s t", "b"),
    ("g h", "z", "k l m"),
    ("i j k", "o p", "x"),
    ("l", "a b", "c d"),
    ("m n", "v w x", "y z"),
]


def pair_of(number: int, *, prompt: int | None = None, lengths: tuple[int, int] = (2, 3)) -> PreferencePair:
    ids = (5, 6, number if prompt is None else prompt)
    return PreferencePair(
        prompt=Prompt(uid=f"row-{number}", text="", ids=ids, responses=(), response_ids=()),
        chosen="", rejected="", chosen_ids=(7,) * lengths[0], rejected_ids=(8,) * lengths[1],
    )  # fmt: skip


def measured(margins: Sequence[float], **changes: Any) -> dict[str, Any]:
    rewards = [Rewards(chosen=margin, rejected=0.0) for margin in margins]
    pairs = changes.pop("pairs", None) or [pair_of(number) for number in range(len(margins))]
    return figures(pairs, rewards, **{"resamples": 500, "seed": 0, **changes})


def save_pairs(file: Path, rows: Sequence[tuple[str, str, str]] = PAIRS) -> Path:
    lines = [
        json.dumps({"id": f"{file.stem}-{n}", "prompt": prompt, "chosen": chosen, "rejected": rejected})
        for n, (prompt, chosen, rejected) in enumerate(rows)
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def config(**changes: Any) -> RunConfig:
    stage = {"kind": "sft", "steps": 1, "batch": 1, "optimiser": {"lr": 1e-3}}
    return RunConfig.model_validate(
        {
            "name": "measure", "student": "any", "data": {"train": "unused.jsonl", "max_prompt_tokens": 8},
            "decoding": {"max_new_tokens": 10}, "evaluation": {"bootstrap": 200}, "stages": (stage,), **changes,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("models")
    return tuple(tiny.save_model(place / f"m{seed}", "gpt2", seed=seed) for seed in (1, 2))  # type: ignore[return-value]


@functools.cache
def read(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model).eval()


@torch.no_grad()
def plainly(model: Path, prompt: str, response: str) -> float:
    """Log-probability with the end token, token by token with transformers alone."""
    network = read(model)
    seen, total = [tiny.WORDS.index(letter) for letter in prompt.split()], 0.0
    for token in [*(tiny.WORDS.index(letter) for letter in response.split()), EOS]:
        total += float(network(torch.tensor([seen])).logits[0, -1].double().log_softmax(-1)[token])
        seen = [*seen, token]
    return total


def test_figures_of_four_pairs_by_hand() -> None:
    found = measured([1.0, -2.0, 0.0, 3.0], pairs=[pair_of(n, lengths=(2, 4 - n)) for n in range(4)])
    assert found["accuracy"]["mean"] == pytest.approx(2.5 / 4) and found["margin"]["mean"] == pytest.approx(0.5)
    assert (found["chosen"]["mean"], found["rejected"]["mean"]) == (0.5, 0.0)
    assert found["higher"] == {"chosen": 2, "rejected": 1, "neither": 1} and found["p"] == pytest.approx(1.0)
    assert found["length"] == {"chosen": 2.0, "rejected": 2.5, "longer_chosen": pytest.approx(1 / 3)}


def test_the_sign_test_is_the_exact_binomial_one() -> None:
    assert measured([1.0] * 60 + [-1.0] * 40)["p"] == pytest.approx(0.056888, abs=1e-6)
    assert measured([1.0] * 61 + [-1.0] * 39)["p"] == pytest.approx(0.035200, abs=1e-6)
    assert measured([1.0] * 10 + [0.0] * 50)["p"] == pytest.approx(2 / 2**10)  # ties say nothing


def test_a_reward_is_the_log_ratio_with_the_reference() -> None:
    """The example of the specification of direct preference optimisation: h = 1.5."""
    found = rewards_of(pair_of(0), (-10.0, -12.0), (-11.0, -11.5), per_token=False)
    assert (found.chosen, found.rejected, found.margin) == (1.0, -0.5, 1.5)
    means = rewards_of(pair_of(0, lengths=(2, 5)), (-10.0, -12.0), (-11.0, -11.5), per_token=True)
    assert (means.chosen, means.rejected) == (0.5, -0.1)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("with_reference", [False, True])
def test_rewards_are_those_of_plain_forwards(
    models: tuple[Path, Path], tmp_path: Path, per_token: bool, with_reference: bool
) -> None:
    model, base = models
    found = pair_accuracy(
        model, config(), pairs=str(save_pairs(tmp_path / "pairs.jsonl")), reference=base if with_reference else None,
        per_token=per_token,
    )  # fmt: skip
    rewards = []
    for prompt, *both in PAIRS:
        sums = [
            plainly(model, prompt, text) - (plainly(base, prompt, text) if with_reference else 0.0) for text in both
        ]
        rewards.append([each / (len(text.split()) + 1) ** per_token for each, text in zip(sums, both, strict=True)])
    assert found["chosen"]["mean"] == pytest.approx(sum(chosen for chosen, _ in rewards) / 7, abs=1e-4)
    assert found["rejected"]["mean"] == pytest.approx(sum(rejected for _, rejected in rewards) / 7, abs=1e-4)
    wins = sum(chosen > rejected for chosen, rejected in rewards)
    assert found["accuracy"]["mean"] == pytest.approx(wins / 7) and 0 < wins < 7
    assert found["asked"]["reward"] == ("log-ratio" if with_reference else "log-probability")


def test_exchanged_sides_mirror_the_figures(models: tuple[Path, Path], tmp_path: Path) -> None:
    turned = [(prompt, rejected, chosen) for prompt, chosen, rejected in PAIRS]
    one = pair_accuracy(models[0], config(), pairs=str(save_pairs(tmp_path / "a.jsonl")), reference=models[1])
    other = pair_accuracy(models[0], config(), pairs=str(save_pairs(tmp_path / "b.jsonl", turned)), reference=models[1])
    assert one["accuracy"]["mean"] != 0.5
    assert other["accuracy"]["mean"] == pytest.approx(1 - one["accuracy"]["mean"])
    assert other["margin"]["mean"] == pytest.approx(-one["margin"]["mean"], abs=1e-5) and other["p"] == one["p"]


def test_a_model_that_is_its_own_reference_prefers_nothing(models: tuple[Path, Path], tmp_path: Path) -> None:
    pairs = str(save_pairs(tmp_path / "pairs.jsonl"))
    found = pair_accuracy(models[0], config(), pairs=pairs, reference=models[0])
    assert (found["accuracy"]["mean"], found["margin"]["mean"], found["p"]) == (0.5, 0.0, 1.0)
    assert found["higher"] == {"chosen": 0, "rejected": 0, "neither": 7}
    # The control: another reference makes preferences of the very same model.
    assert pair_accuracy(models[0], config(), pairs=pairs, reference=models[1])["higher"]["neither"] == 0


def test_pairs_of_one_prompt_are_drawn_together() -> None:
    """Four copies of each pair are no more prompts than one, and as pairs of other prompts they would be."""
    margins = [1.0, -1.0, 1.0, 1.0, -1.0, 1.0]
    copied = [pair_of(number, prompt=number % 6) for number in range(24)]
    once, copies = measured(margins), measured(margins * 4, pairs=copied)
    assert copies["accuracy"] == once["accuracy"] and copies["p"] == once["p"] == pytest.approx(0.6875)
    assert (copies["pairs"], copies["prompts"]) == (24, 6)
    low, high = measured(margins * 4)["accuracy"]["ci95"]
    assert high - low < 0.7 * (once["accuracy"]["ci95"][1] - once["accuracy"]["ci95"][0])


def test_sources_have_figures_of_their_own(models: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    save_pairs(folder / "one.jsonl", PAIRS[:3])
    save_pairs(folder / "two.jsonl", PAIRS[3:])
    found = pair_accuracy(models[0], config(), pairs=str(folder))
    assert {name: each["pairs"] for name, each in found["sources"].items()} == {"one": 3, "two": 4}
    whole = sum(each["accuracy"]["mean"] * each["pairs"] for each in found["sources"].values()) / 7
    assert found["accuracy"]["mean"] == pytest.approx(whole)
    alone = pair_accuracy(models[0], config(), pairs=str(folder / "two.jsonl"))
    assert alone["accuracy"]["mean"] == found["sources"]["two"]["accuracy"]["mean"] and "sources" not in alone


def test_batches_change_no_figure_and_a_limit_takes_the_first(models: tuple[Path, Path], tmp_path: Path) -> None:
    pairs = str(save_pairs(tmp_path / "pairs.jsonl"))
    one = pair_accuracy(models[0], config(evaluation={"batch": 1, "bootstrap": 50}), pairs=pairs)
    all_ = pair_accuracy(models[0], config(evaluation={"batch": 64, "bootstrap": 50}), pairs=pairs)
    assert one["accuracy"] == all_["accuracy"]
    assert one["margin"]["mean"] == pytest.approx(all_["margin"]["mean"], abs=1e-5)
    assert pair_accuracy(models[0], config(), pairs=pairs, limit=3)["pairs"] == 3


def test_what_cannot_be_measured_is_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="give --pairs FILE, or set data"):
        pair_accuracy(models[0], config())
    other = tiny.save_model(tmp_path / "other", "gpt2", seed=3, words=[*tiny.WORDS[:2], *reversed(tiny.WORDS[2:])])
    with pytest.raises(VocabularyMismatch):
        pair_accuracy(models[0], config(), pairs=str(save_pairs(tmp_path / "p.jsonl")), reference=other)


@pytest.mark.parametrize(
    ("margins", "says"),
    [
        ([1.0] * 19 + [-1.0], "That is above chance"),
        ([-1.0] * 19 + [1.0], "That is below chance"),
        ([1.0] * 4, "cannot tell that from chance"),  # though the interval is 100 to 100 %
        ([1.0] * 10 + [-1.0] * 10, "cannot tell that from chance"),
        ([1.0], "Of one prompt nothing can be said"),
    ],
)
def test_words_say_whether_it_is_more_than_chance(margins: list[float], says: str) -> None:
    record = {**measured(margins), "asked": {"reward": "log-ratio", "per_token": False}, "reference": "base"}
    assert says in next(iter(words(record)))


def test_words_tell_a_chosen_response_that_falls() -> None:
    def told(chosen: float, rejected: float) -> str:
        rewards = [Rewards(chosen=chosen, rejected=rejected)] * 9
        record = figures([pair_of(n) for n in range(9)], rewards, resamples=50, seed=0)
        return " ".join(words({**record, "asked": {"reward": "log-ratio", "per_token": False}, "reference": "base"}))

    assert "less likely than under the reference, and the rejected ones still more so" in told(-1.0, -3.0)
    assert "less likely" not in told(1.0, -1.0)
    assert "less likely" in told(-3.0, -1.0) and "still more so" not in told(-3.0, -1.0)


def test_the_command_prints_the_table_and_keeps_others_files(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, figures_file = tmp_path / "run.yaml", tmp_path / "f.json"
    run.write_text(dump_config(config()), encoding="utf-8")
    line = ["prefers", str(models[0]), "--reference", str(models[1]), "--config", str(run)]
    line += [f"data.preferences_validation={save_pairs(tmp_path / 'pairs.jsonl')}", "--json", str(figures_file)]
    for _ in range(2):  # an earlier file of its own is no trouble
        assert cli._guarded(lambda **options: cli.app(line, **options)) == 0
        text = " ".join(capsys.readouterr().out.split())  # in whatever lines
    record = json.loads(figures_file.read_text(encoding="utf-8"))
    assert re.search(rf"accuracy +{100 * record['accuracy']['mean']:.2f} %", text)
    assert "7 pairs of 7 prompts" in text and re.search(r"log-ratio of chosen", text) and "p = " in text
    figures_file.write_text("my notes", encoding="utf-8")
    assert cli._guarded(lambda **options: cli.app(line, **options)) == 2
    assert figures_file.read_text(encoding="utf-8") == "my notes"


def test_pairs_that_are_named_are_read_as_the_configuration_says(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A setting that only pairs have is no fault of a run without them where pairs are named beside it."""
    run, pairs = tmp_path / "run.yaml", tmp_path / "two words: 'ä'.jsonl"
    run.write_text(dump_config(config()), encoding="utf-8")
    several = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    save_pairs(pairs, [*PAIRS[:3], (several, "a", "b")])

    def told(*more: str) -> str:
        line = ["prefers", str(models[0]), "--config", str(run), "--pairs", str(pairs), "data.max_prompt_tokens=20"]
        assert cli._guarded(lambda **options: cli.app([*line, *more], **options)) == 0
        return " ".join(capsys.readouterr().out.split())

    assert "3 pairs of 3 prompts" in told("data.single_turn=true")
    assert "4 pairs of 4 prompts" in told()  # the control: there is one to leave out
