"""The committed parity table (docs/parity.md) has the cells that exist, and each says what is true of it now.

The numbers are of ``scripts/parity.sh``; eight of the cells are measured again by ``test_parity``. Here no cell is
trained: those that are refused must be refused by the check before a run, for the reason that the table gives.
"""

from __future__ import annotations

import pytest

from tests.dist import matrix, parity_worker

Found = dict[str, float | str]


@pytest.fixture(scope="module")
def reasons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """Of every cell, why the check before a run refuses it."""
    folder = tmp_path_factory.mktemp("matrix")
    parity_worker.write_inputs(folder)
    return {cell: matrix.reason(folder, cell) for cell in matrix.CELLS}


def faults(table: Found, reasons: dict[str, str | None]) -> set[str]:
    """Cells of which the table says something else than the check before a run, or a deviation beyond the limit."""
    missing = table.keys() ^ reasons.keys()
    wrong = {cell for cell, said in table.items() if isinstance(said, str) and reasons.get(cell) != said}
    refused = {cell for cell, said in table.items() if isinstance(said, float) and reasons.get(cell) is not None}
    far = {
        cell
        for cell, said in table.items()
        if isinstance(said, float) and not 0 < said <= matrix.TOLERANCE[matrix.precision_of(cell)]
    }
    return missing | wrong | refused | far


@pytest.fixture
def table() -> Found:
    return matrix.read(matrix.TABLE.read_text(encoding="utf-8"))


def test_the_table_says_of_every_cell_what_the_check_before_a_run_says(
    table: Found, reasons: dict[str, str | None]
) -> None:
    """Where this fails because something was built: bash scripts/parity.sh."""
    assert faults(table, reasons) == set()


def test_the_table_has_six_students_four_teachers_and_how_they_train(table: Found) -> None:
    assert list(table) == matrix.CELLS and len(table) == 6 * 4 * 4


def test_a_table_that_is_wrong_is_seen(table: Found, reasons: dict[str, str | None]) -> None:
    """Negative control: a cell left out, one invented, one that deviates, and a number and a reason in wrong places."""
    number = next(cell for cell, said in table.items() if isinstance(said, float))
    refused = next(cell for cell, said in table.items() if isinstance(said, str))
    assert faults({cell: said for cell, said in table.items() if cell != number}, reasons) == {number}
    assert faults(table | {"zero9.replicated": 1e-7}, reasons) == {"zero9.replicated"}
    assert faults(table | {number: 1e-4}, reasons) == {number}
    assert faults(table | {number: float("nan")}, reasons) == {number}
    assert faults(table | {number: "not today"}, reasons) == {number}
    assert faults(table | {refused: "not today"}, reasons) == {refused}
    assert faults(table | {refused: 1e-7}, reasons) == {refused}


def test_what_is_written_is_read_again(table: Found) -> None:
    text = matrix.TABLE.read_text(encoding="utf-8")
    assert matrix.render(table) == text
    other = table | {matrix.CELLS[0]: 0.25, matrix.CELLS[1]: "of another reason"}
    assert matrix.read(matrix.render(other)) == other


def test_the_default_run_has_eight_cells_of_the_table(table: Found) -> None:
    cells = matrix.eight()
    assert len(cells) == len(set(cells)) == 8 and all(isinstance(table[cell], float) for cell in cells)
    assert cells[0] == "zero0.replicated"
    assert {"zero2-offload", "zero3-offload"} <= {cell.split(".")[0] for cell in cells}


def test_a_deviation_is_relative_to_the_first_run_and_to_a_tenth() -> None:
    one, other = [{"a": 2.0, "b": 0.01}, {"a": 2.0, "b": 0.0}], [{"a": 2.1, "b": 0.01}, {"a": 1.8, "b": 0.02}]
    assert matrix.deviations(one, other) == pytest.approx({"a": 0.1, "b": 0.2})


