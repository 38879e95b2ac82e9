"""A name that stands in a file leads to nothing outside its folder, by itself or through a link."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minillm.errors import DataError
from minillm.inside import inside
from minillm.stage_base import is_component
from minillm.store import RunFolder

HOSTILE = (
    *("..", ".", "", "../x", "/x", "a/b", "a/../../x", "a\\b", "..\\x", "~", "~/x", "x\0", "x\n", "x" * 256),
    *("‥", "․․/x", "ａ", "a b", "%2e%2e", "x:y"),
)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_is_none_is_refused_with_the_file_it_stands_in(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"names .*wanted letters"):
        inside(tmp_path, name, source=tmp_path / "list.json")


def test_links_are_followed_before_it_is_decided(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for folder in (root, tmp_path / "root2", root / "there"):
        folder.mkdir()
    leads = {"up": "..", "beside": "../root2", "ring": "ring", "absolute": str(tmp_path), "twice": "up"}
    for name, target in {**leads, "within": "there"}.items():
        (root / name).symlink_to(target)
    for name in leads:
        assert is_component(name)  # the control: by the name alone it would pass
        with pytest.raises(DataError, match="a link that leads out"):
            inside(root, name, source=root)
    assert inside(root, "within", source=root) == root / "within"
    assert inside(root, "new", source=root) == root / "new"


def test_a_root_behind_a_link_is_a_root(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert inside(tmp_path / "link", "a.json", source=tmp_path) == tmp_path / "link" / "a.json"


def test_starting_over_removes_no_results_outside_the_run(tmp_path: Path) -> None:
    others, run = tmp_path / "others", tmp_path / "run"
    for folder in (others, run, run / "own"):
        folder.mkdir()
        (folder / "samples.jsonl").write_text("{}\n")
    (run / "linked").symlink_to(others)
    (run / "results.json").write_text(json.dumps({"sets": {"linked": {}, "../others": {}, "own": {}}}))
    RunFolder(run, writes=True).begin("seed: 1\n")
    assert (others / "samples.jsonl").is_file() and not (run / "own").exists()
