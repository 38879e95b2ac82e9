"""The metadata fits the tree: what setup.cfg promises to ship is there, and what is there is shipped."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = ("teachers", "students", "ds_configs", "recipes")


def metadata() -> ConfigParser:
    """setup.cfg as setuptools reads it."""
    parser = ConfigParser()
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # requirement names keep their case
    parser.read_string((ROOT / "setup.cfg").read_text("utf-8"))
    return parser


def lines(section: str, option: str) -> list[str]:
    """The entries of a list in setup.cfg, one a line."""
    return metadata().get(section, option).strip().splitlines()


def requirement_name(text: str) -> str:
    """The bare, normalised name of a requirement line: "types-pyyaml" for "types_PyYAML>=6"."""
    return re.sub(r"[-_.]+", "-", re.split(r"[<>=!~\[; ]", text, maxsplit=1)[0]).lower()


def locked() -> dict[str, str]:
    """Name -> version, from the lock."""
    rows = [row for row in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if row and row[0] != "#"]
    return {requirement_name(row): row.partition("==")[2] for row in rows}


def data_files(folder: Path) -> set[Path]:
    """Every file of a data folder, in its subfolders too."""
    return {path for path in folder.rglob("*") if path.is_file()}


def unshipped(folder: Path, patterns: list[str]) -> set[Path]:
    """Files of a data folder that no package-data pattern takes."""
    return data_files(folder) - {path for pattern in patterns for path in folder.glob(pattern)}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a wheel of this tree installs, built from a copy by the setuptools that is there."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("minillm", *DATA):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "README.md").write_text("minillm", "utf-8")
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(source)], cwd=source, check=True, capture_output=True)
    (wheel,) = source.glob("*.whl")
    with ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_every_package_of_the_library_is_listed() -> None:
    inside = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in (ROOT / "minillm").rglob("*.py")}
    assert set(lines("options", "packages")) == inside | {f"minillm.{name}" for name in DATA}


@pytest.mark.parametrize("name", DATA)
def test_every_data_file_is_shipped(name: str) -> None:
    assert data_files(ROOT / name), "an empty data folder"
    assert unshipped(ROOT / name, metadata().get("options.package_data", f"minillm.{name}").split()) == set()


def test_control_a_file_of_another_kind_is_seen(tmp_path: Path) -> None:
    (tmp_path / "card.yml").touch()
    (tmp_path / "card.yaml").touch()
    assert unshipped(tmp_path, ["*.yaml"]) == {tmp_path / "card.yml"}


def test_the_version_stands_in_both_places() -> None:
    import minillm

    assert minillm.__version__ == metadata().get("metadata", "version")


def test_the_lock_pins_every_requirement() -> None:
    asked = lines("options", "install_requires") + lines("options.extras_require", "dev")
    assert {requirement_name(row) for row in asked} - locked().keys() == set()


def test_the_lock_pins_each_to_one_version_without_a_build_suffix() -> None:
    assert {name: version for name, version in locked().items() if not re.fullmatch(r"\d[\w.]*", version)} == {}


def test_a_wheel_holds_every_file_of_the_library_and_its_data(unpacked: Path) -> None:
    library = {path for path in (ROOT / "minillm").rglob("*.py")}
    wanted = {path.relative_to(ROOT) for path in library}
    wanted |= {Path("minillm") / path.relative_to(ROOT) for name in DATA for path in data_files(ROOT / name)}
    held = {path.relative_to(unpacked) for path in unpacked.rglob("*") if path.is_file()}
    assert wanted - held == set()
    assert len(wanted) > len(library) > 0


def test_an_installed_wheel_finds_its_cards_from_any_folder(unpacked: Path, tmp_path: Path) -> None:
    card = min((ROOT / "teachers").glob("*.yaml")).stem

    def find(name: str) -> list[str]:
        program = (
            f"import sys; sys.path.insert(0, {str(unpacked)!r})\n"
            "from minillm import cards\n"
            f"print(cards.__file__); print(cards.load_card({name!r}, kind='teachers').name)"
        )
        command = [sys.executable, "-c", program]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout.split("\n")

    assert find(card)[:2] == [str(unpacked / "minillm" / "cards.py"), card]
    assert find("no-such-card")[1:] == [""]
