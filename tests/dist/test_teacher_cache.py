"""Two ranks write the cache that one process writes, with the teacher on each of them or sharded over both, and train
from it as one process does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from minillm import distill
from minillm.teacher_cache import IDS, LOGP, ROWS, read_cache
from tests import tiny
from tests.dist.cache_worker import PLACEMENTS, TOP_K, config, write, write_inputs
from tests.dist.ranks import start_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    write_inputs(folder)
    write(folder, "replicated", "one", batch=256)
    printed = start_ranks("tests.dist.cache_worker", str(folder))
    assert printed.count("bytes a token") == len(PLACEMENTS)  # one rank speaks
    return folder


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_two_ranks_write_what_one_process_writes(folder: Path, placement: str) -> None:
    one, two = read_cache(folder / "one"), read_cache(folder / f"{placement}-two")
    assert one.places == two.places and one.manifest.sha256[ROWS] == two.manifest.sha256[ROWS]
    assert one.manifest.sha256[IDS] == two.manifest.sha256[IDS] and one.ids.shape == (one.manifest.tokens, TOP_K)
    np.testing.assert_allclose(two.logp, one.logp, rtol=1e-4, atol=1e-5)
    # Negative control: rows in another order would be seen.
    assert float(np.abs(one.logp - np.roll(two.logp, 1, axis=0)).max()) > 0.1
    assert not list(folder.glob(".*")) and (folder / "one" / LOGP).is_file()


def test_two_ranks_train_from_it_as_one_process_does(folder: Path) -> None:
    distill(config(folder, "trained-one", batch=2, cache="one"))
    one, two = (tiny.logged(folder / f"trained-{ranks}") for ranks in ("one", "two"))
    for left, right in zip(one, two, strict=True):
        for name in ("loss", "grad_norm"):
            assert left[name] == pytest.approx(right[name], rel=1e-5), name
