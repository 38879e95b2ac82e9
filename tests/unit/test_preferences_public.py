"""Public files of preferences are read whole, with the counts that were found by hand and every odd row reported.

HH-RLHF (MIT), the Taskmaster-4 reward pairs (CC BY 4.0) and the preferences of 'LLMs from scratch' (Apache-2.0).
"""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from minillm.config import RunConfig
from minillm.errors import DataError
from minillm.pair_records import ASSISTANT, HUMAN, SIDES
from minillm.pairs import Pair, check_alone
from minillm.preference_reading import PairSplit, read_preferences
from tests.unit.test_real_data import save_byte_model

DATA = Path(os.environ.get("MINILLM_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
FILES = {
    "hh_rlhf/train": (3926, 0, 1128),
    "hh_rlhf/test": (393, 0, 122),
    "taskmaster_reward/pairs": (220, 0, 220),
    "llms_from_scratch/preference": (1100, 6, 1100),
}
"""Rows, those with equal responses, and those with a single turn, as json alone counts them."""
TURNS = {"hh_rlhf/train": 12, "hh_rlhf/test": 2}
"""Rows of which a response goes on with turns of a dialogue that it makes up."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    model = save_byte_model(tmp_path_factory.mktemp("public") / "model", ["a b c"], width=8, seed=1)
    return check_alone(config(model, max_prompt_tokens=64, most=64), str(model))


def config(model: Path | str, *, max_prompt_tokens: int = 100_000, most: int = 100_000, **data: object) -> RunConfig:
    stage = {"kind": "sft", "steps": 1, "batch": 2, "optimiser": {"lr": 1e-3}}
    return RunConfig(
        name="run", student=str(model), data={"train": "world:train", "max_prompt_tokens": max_prompt_tokens, **data},  # type: ignore[arg-type]
        decoding={"max_new_tokens": most}, stages=(stage,),  # type: ignore[arg-type]
    )  # fmt: skip


def there(name: str) -> Path:
    file = DATA / f"{name}.jsonl.gz"
    if not file.is_file():
        pytest.skip(f"no {name} in {DATA}; set MINILLM_SHARED_DATA to a folder that has it")
    return file


def read(source: str, pair: Pair, **data: object) -> PairSplit:
    return read_preferences(
        config(str(pair.student_card.model), **data), source, pair=pair, name="preferences", limit=None
    )


@pytest.mark.parametrize("name", FILES)
def test_every_row_is_a_pair_or_is_counted(name: str, pair: Pair) -> None:
    file = str(there(name))
    rows, equal, single = FILES[name]
    found = read(file, pair)
    odd = f"; dropped {equal:,} pairs with equal responses: " if equal else ""
    assert len(found.pairs) == rows - equal
    assert found.words[-1].startswith(f"preferences: {rows:,} pairs read, {rows - equal:,} used{odd}")
    one_turn = read(file, pair, single_turn=True, preferences=file)
    assert len(one_turn.pairs) == single - equal
    several = f"dropped {rows - single:,} pairs with several turns before its responses"
    assert (several in one_turn.words[-1]) == (rows > single)


@pytest.mark.parametrize("name", TURNS)
def test_two_sided_dialogues_are_cut_where_their_prompts_end(name: str, pair: Pair, tmp_path: Path) -> None:
    """The form that was published first, put together from prompts and responses: what cannot be cut there is told, and
    is just the rows whose responses hold turns of their own."""
    with gzip.open(there(name), "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    whole = tmp_path / "whole.jsonl"
    dialogues = [{side: f"\n\n{row['prompt']} {row[side]}" for side in SIDES} for row in rows]
    whole.write_text("".join(json.dumps(each) + "\n" for each in dialogues), encoding="utf-8")
    with pytest.raises(DataError, match="differ before their last turn"):
        read(str(whole), pair)
    found = read(str(whole), pair, broken="skip", max_broken=TURNS[name])
    odd = {
        n for n, row in enumerate(rows, 1) if any(turn in row[side] for turn in (HUMAN, ASSISTANT) for side in SIDES)
    }
    of_row = {int(each.prompt.uid.removeprefix("whole-")): each for each in found.pairs}
    assert len(odd) == TURNS[name] and set(of_row) == {*range(1, len(rows) + 1)} - odd
    for number, each in of_row.items():
        row = rows[number - 1]
        assert (each.prompt.text, each.chosen, each.rejected) == (
            f"\n\n{row['prompt']}", f" {row['chosen']}", f" {row['rejected']}"
        )  # fmt: skip
