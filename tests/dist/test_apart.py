"""Ranks that share no disk end an evaluation together, and find a finished one together: only the first one reads
results."""

from __future__ import annotations

from pathlib import Path

from tests import tiny
from tests.dist.apart_worker import SETS
from tests.dist.ranks import start_ranks


def test_only_the_first_rank_needs_the_folder_of_the_results(tmp_path: Path) -> None:
    for seed, name in enumerate(("teacher", "student")):
        tiny.save_model(tmp_path / name, "llama", seed=seed)
    for name in SETS:
        tiny.save_prompts(tmp_path / f"{name}.jsonl", rows=4)
    told = start_ranks("tests.dist.apart_worker", str(tmp_path))
    for kind, names in (("several", " one two"), ("single", "")):
        assert told.count(f"refused {kind} they differ in: evaluation\n") == 2, told
        assert told.count(f"done {kind}{names}\n") == 2, told
        assert (tmp_path / f"{kind}-0" / "results.json").is_file()
        assert not (tmp_path / f"{kind}-1").exists()  # nothing was written there, so nothing could be read
