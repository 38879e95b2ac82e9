"""The rows: splits that do not overlap, shares as promised, the same on every machine and in every process."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from itertools import combinations

import pytest

from minillm.errors import DataError
from minillm.world import (
    DEFAULT_COUNTS,
    MAX_PROMPT_TOKENS,
    MAX_RESPONSE_TOKENS,
    PROMPT_FORMAT,
    WorldRow,
    check,
    parse_prompt,
    rows,
)
from minillm.world import prompts as prompts_module
from minillm.world.facts import SeededDraw
from minillm.world.prompts import FAMILY_PERCENT, SPLIT_SHARES, draw_prompt, split_of

SPLITS = tuple(SPLIT_SHARES)


@pytest.fixture(scope="module")
def world() -> dict[str, list[WorldRow]]:
    return {split: rows(split) for split in SPLITS}


def bare(row: WorldRow) -> str:
    prompt = row["prompt"]
    assert isinstance(prompt, str)
    before, after = PROMPT_FORMAT.split("{prompt}")
    assert prompt.startswith(before)
    assert prompt.endswith(after)
    return prompt.removeprefix(before).removesuffix(after)


def keys(split_rows: list[WorldRow]) -> set[tuple[str, tuple[str, ...]]]:
    specs = [parse_prompt(bare(row)) for row in split_rows]
    return {(spec.family, spec.key()) for spec in specs}


def digest(split: str) -> str:
    return hashlib.sha256(json.dumps(rows(split, count=500)).encode()).hexdigest()


def test_a_split_has_its_number_of_rows_and_their_names(world: dict[str, list[WorldRow]]) -> None:
    assert {split: len(found) for split, found in world.items()} == DEFAULT_COUNTS
    assert world["test"][42]["id"] == "test-00042"
    for found in world.values():
        assert len({str(row["id"]) for row in found}) == len(found)


def test_every_response_of_every_row_is_right(world: dict[str, list[WorldRow]]) -> None:
    for row in (row for found in world.values() for row in found):
        assert all(check(str(row["prompt"]), response).valid for response in row["responses"])


def test_training_has_one_response_and_the_others_up_to_eight_distinct(world: dict[str, list[WorldRow]]) -> None:
    assert {len(row["responses"]) for row in world["train"]} == {1}
    for row in world["validation"] + world["test"]:
        assert 1 < len(row["responses"]) <= 8
        assert len(set(row["responses"])) == len(row["responses"])
    assert Counter(len(row["responses"]) for row in world["test"]).most_common(1)[0][0] == 8


def test_a_short_list_of_references_is_the_whole_list(world: dict[str, list[WorldRow]]) -> None:
    facts = [row for row in world["test"] if row["family"] == "fact"]
    assert facts
    assert {len(row["responses"]) for row in facts} == {5}


def test_no_combination_appears_in_two_splits(world: dict[str, list[WorldRow]]) -> None:
    found = {split: keys(split_rows) for split, split_rows in world.items()}
    for one, other in combinations(SPLITS, 2):
        assert not found[one] & found[other]


def test_splits_would_overlap_if_rows_did_not_ask_the_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: with a split that looks at the order of the two people, pairs leak."""
    by_pair = prompts_module.Compare.key
    monkeypatch.setattr(prompts_module.Compare, "key", lambda spec: (spec.attribute, spec.first, spec.second))
    leaky = {split: [row for row in rows(split, count=3000) if row["family"] == "compare"] for split in SPLITS}
    monkeypatch.setattr(prompts_module.Compare, "key", by_pair)
    assert keys(leaky["train"]) & keys(leaky["test"])


def test_each_family_keeps_its_share_in_every_split(world: dict[str, list[WorldRow]]) -> None:
    for split, split_rows in world.items():
        found = Counter(str(row["family"]) for row in split_rows)
        assert set(found) == set(FAMILY_PERCENT)
        for family, percent in FAMILY_PERCENT.items():
            share = percent / 100
            spread = (share * (1 - share) / len(split_rows)) ** 0.5
            assert abs(found[family] / len(split_rows) - share) < 4 * spread, (split, family)


def test_the_hash_splits_combinations_about_as_promised() -> None:
    draw = SeededDraw("combinations")
    specs = [draw_prompt(family, draw) for family in FAMILY_PERCENT for _ in range(3000)]
    found = Counter({(spec.family, spec.key()): split_of(spec) for spec in specs}.values())
    for split, share in SPLIT_SHARES.items():
        assert abs(found[split] / found.total() - share) < 0.02


def test_the_three_lengths_are_mixed_as_promised(world: dict[str, list[WorldRow]]) -> None:
    lengths = [len(row["responses"][0].split()) for row in world["train"]]
    shares = [sum(low <= n <= high for n in lengths) / len(lengths) for low, high in ((1, 5), (6, 10), (11, 99))]
    assert shares == pytest.approx([0.17, 0.45, 0.38], abs=0.02)


def test_rows_fit_into_a_small_model(world: dict[str, list[WorldRow]]) -> None:
    for row in (row for found in world.values() for row in found):
        assert len(str(row["prompt"]).split()) <= MAX_PROMPT_TOKENS
        assert max(len(response.split()) for response in row["responses"]) + 1 <= MAX_RESPONSE_TOKENS


def test_prompts_may_repeat(world: dict[str, list[WorldRow]]) -> None:
    for found in world.values():
        assert len({str(row["prompt"]) for row in found}) < len(found)


def test_held_out_prompts_belong_to_their_split(world: dict[str, list[WorldRow]]) -> None:
    for split, found in world.items():
        assert {split_of(parse_prompt(bare(row))) for row in found} == {split}


@pytest.mark.parametrize("hash_seed", ["0", "12345"])
def test_rows_are_the_same_in_another_process(hash_seed: str) -> None:
    code = "import test_world_rows as t; print(*[t.digest(split) for split in t.SPLITS])"
    paths = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [digest(split) for split in SPLITS]


def test_the_world_has_not_changed() -> None:
    """Golden: trained models know these facts, so a change here is a new world and needs a new release note."""
    assert digest("train")[:16] == "b3bf8097b7f09776"


def test_a_longer_split_begins_with_the_shorter() -> None:
    assert rows("test", count=60)[:20] == rows("test", count=20)


def test_another_seed_gives_other_rows_of_the_same_world() -> None:
    one, other = rows("validation", count=50, seed=1), rows("validation", count=50, seed=2)
    assert [row["prompt"] for row in one] != [row["prompt"] for row in other]
    assert all(check(str(row["prompt"]), row["responses"][0]).valid for row in other)


def test_a_misspelt_split_is_named_with_the_right_one() -> None:
    with pytest.raises(DataError, match="did you mean 'validation'"):
        rows("validaton")
    with pytest.raises(DataError, match="wanted at least 1 row"):
        rows("train", count=0)


def test_the_world_needs_no_torch() -> None:
    code = "import sys, minillm.world as w; w.rows('test', count=3); assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
