"""The recipe of WARP, run small: two students from one start, merged, twice over."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from minillm import distill
from minillm.config import load_config
from tests import tiny

RECIPE = Path(__file__).parents[2] / "recipes" / "warp" / "micro-world.yaml"
TRAINED = {0: "sft", 1: "one-a", 2: "one-b", 4: "two-a", 5: "two-b"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe as it stands, with another pair of models, fewer steps and fewer rows."""
    folder = tmp_path_factory.mktemp("warp")
    tiny.save_model(folder / "teacher", "llama", seed=1)
    tiny.save_model(folder / "student", "llama", seed=2)
    rows = tiny.save_prompts(folder / "prompts.jsonl")
    short = [f"stages.{at}.steps=2" for at in TRAINED]
    short += ["stages.0.batch=4", "stages.0.validate_every=0"]
    short += [f"stages.{at}.prompts=8" for at, name in TRAINED.items() if name != "sft"]
    return distill(
        load_config(
            RECIPE,
            [
                f"out={folder / 'runs'}",
                f"student={folder / 'student'}",
                f"teacher={folder / 'teacher'}",
                f"data={{train: {rows}, test: {rows}, test_limit: 3, max_prompt_tokens: 8}}",
                "decoding.max_new_tokens=10",
                "evaluation={seeds: [1], bootstrap: 10}",
                *short,
            ],
        )
    )


def test_it_is_two_iterations(run: Path) -> None:
    found = [(line["stage"], line["method"], line["eta"]) for line in tiny.logged(run, "merge")]
    assert found == [("one", "slerp", 0.3), ("two", "slerp", 0.3)]
    assert [line["stage"] for line in tiny.logged(run)] == [name for name in TRAINED.values() for _ in range(2)]
    held = [line for line in tiny.logged(run) if line["stage"] != "sft"]
    assert all("anchor_kl" in line and line["anchor_drift"] > 0 for line in held)
    assert (run / "results.json").is_file() and (run / "report.html").is_file()


def test_each_iteration_starts_where_the_one_before_ended(run: Path) -> None:
    """A step back towards its start: the merged student is nearer to it than to either that was merged."""

    def weights(name: str) -> dict[str, object]:
        folder = run / "student" if name == "two" else run / f"stages/{name}/student"
        return dict(load_file(folder / "model.safetensors"))

    def apart(one: str, other: str) -> float:
        left, right = weights(one), weights(other)
        return sum(float((left[name] - right[name]).square().sum()) for name in left) ** 0.5  # type: ignore[operator]

    for start, runs, merged in (("sft", ("one-a", "one-b"), "one"), ("one", ("two-a", "two-b"), "two")):
        assert 0 < apart(start, merged) < min(apart(each, merged) for each in runs)
        assert apart(*runs) > 0.5 * apart(start, runs[0]), "other prompts and draws"
