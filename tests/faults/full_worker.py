"""Runs on a disk that becomes full on their way, and once more when there is room; each tells how it ended.

Given a folder on a small disk of its own (``small``), a file takes all that is free there. On any other the kernel
refuses to let files grow.
"""

from __future__ import annotations

import contextlib
import io
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minillm import cli, results, stages
from minillm.config import dump_config
from minillm.errors import DiskError
from minillm.models import CausalLM
from minillm.publish import publish_student, weights_sha256
from minillm.ranks import prepare_deepspeed
from minillm.store import RunFolder
from minillm.types import Decoding
from tests import quick, tiny
from tests.resume.broken_off import outcome
from tests.resume.test_going_on import KEEP, config

PAGE = 4096
Call = tuple[Any, str, int]
"""Of a function of a class or module the call of this number, counted from 1."""
LINE, STAGE_ENDS = (RunFolder, "log"), (RunFolder, "tell_status", 1)
"""A run logs seven lines: three of its first stage, four of its second."""


class SmallDisk:
    """One that a file fills to the last byte."""

    def __init__(self, folder: Path) -> None:
        self._ballast = folder / "ballast"

    def fill(self, *, but: int = 0) -> None:
        """Leaves so many bytes."""
        with self._ballast.open("wb", buffering=0) as file:
            with contextlib.suppress(OSError):
                while file.write(bytes(PAGE)):
                    pass
            file.truncate(max(0, file.tell() - but))

    def empty(self) -> None:
        """Makes room again."""
        self._ballast.unlink(missing_ok=True)


class Limit:
    """Any disk, on which no file may become larger than it is by more than a few bytes."""

    def __init__(self, folder: Path) -> None:
        self._before = resource.getrlimit(resource.RLIMIT_FSIZE)
        self._folder = folder

    def fill(self, *, but: int = 0) -> None:
        """Logs may still take half a line."""
        sizes = [path.stat().st_size for path in self._folder.glob("runs/*/metrics.jsonl")]
        resource.setrlimit(resource.RLIMIT_FSIZE, (max([0, *sizes]) + 30, self._before[1]))

    def empty(self) -> None:
        """Lifts the limit."""
        resource.setrlimit(resource.RLIMIT_FSIZE, self._before)


Filled = SmallDisk | Limit


def recipe(place: Path, name: str, **changes: Any) -> Path:
    """Two stages of two steps, saved at each; a student is published after the first stage, then at each step; a short
    evaluation."""
    prompts = str(place / "prompts.jsonl")
    stage = {"kind": "sft", "steps": 2, "batch": 4, "optimiser": {"lr": 1e-2, "schedule": "constant"}}
    settings = config(
        place, name, evaluation={"seeds": [1], "bootstrap": 5},
        stages=({**stage, "name": "one", "validate_every": 2}, {**stage, "name": "two", "validate_every": 1}),
        data={"train": prompts, "validation": prompts, "test": prompts, "test_limit": 2, "max_prompt_tokens": 8},
        **changes,
    )  # fmt: skip
    file = place / f"{name}.yaml"
    file.write_text(dump_config(settings), encoding="utf-8")
    return file


def run(file: Path) -> tuple[int, str]:
    """A run by the command line: its exit code, and all that it said."""
    said = io.StringIO()
    before, sys.argv = sys.argv, ["minillm", "distill", "--config", str(file)]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = cli._guarded(cli.app)
    finally:
        sys.argv = before
    return code, said.getvalue()


@contextlib.contextmanager
def before_call(owner: Any, name: str, acts: Mapping[int, Callable[[], object]]) -> Iterator[None]:
    """Does something before the calls of these numbers, counted from 1."""
    whole, made = getattr(owner, name), [0]

    def counted(*arguments: Any, **options: Any) -> Any:
        made[0] += 1
        if made[0] in acts:
            acts[made[0]]()
        return whole(*arguments, **options)

    setattr(owner, name, counted)
    try:
        yield
    finally:
        setattr(owner, name, whole)
    assert made[0] >= max(acts), f"{name} was called {made[0]} times"


def left(place: Path, name: str) -> dict[str, Any]:
    """What a run left, with its page and its status but for times."""
    folder = place / "runs" / name
    found = outcome(folder)
    status = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    for stage in status["stages"].values():
        del stage["seconds"]
    return {**found, "stages": status["stages"], "there": sorted(path.name for path in folder.iterdir())}


def broken(
    place: Path, name: str, *acts: tuple[Call, Callable[[], object]], mend: Callable[[], object], **changes: Any
) -> dict[str, Any]:
    """How a run ends in which something is done before some calls; and, once that is mended, how the same command
    does."""
    file, folder = recipe(place, name, **changes), place / "runs" / name
    with contextlib.ExitStack() as stack:
        for owner, function in {call[:2]: None for call, _ in acts}:
            mine = {call[2]: act for call, act in acts if call[:2] == (owner, function)}
            stack.enter_context(before_call(owner, function, mine))
        code, said = run(file)
    mend()
    hidden = [path.name for path in folder.rglob(".*") if path.name != ".lock"]
    handed_on = {str(path.relative_to(folder)): weights_sha256(path) for path in folder.glob("**/student")}
    again, said_again = run(file)
    found = {
        "code": code, "said": said, "students": handed_on, "hidden": hidden, "again": again, "said again": said_again,
        "left": left(place, name),
    }  # fmt: skip
    shutil.rmtree(folder)
    return found


def publishing(place: Path, disk: SmallDisk) -> dict[str, Any]:
    """A student is published over another with each number of free pages: how often that failed, and of what it said
    the first line."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(place / "student"),
        AutoTokenizer.from_pretrained(place / "student"),
    )
    root, target, failed = CausalLM(model), place / "published", list[str]()

    def publish(card: str) -> None:
        publish_student(
            target, state=dict(root.named_parameters(remove_duplicate=False)), config=model.config, tokenizer=tokenizer,
            real_ids=len(tiny.WORDS), decoding=Decoding(max_new_tokens=4), eos_ids=(1,), pad_id=0, card=card,
        )  # fmt: skip

    publish("old")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    for pages in range(60):
        disk.fill(but=pages * PAGE)
        try:
            publish("new")
        except DiskError as error:
            failed.append(str(error).replace(str(place), "").splitlines()[0])
            assert {path.name: path.read_bytes() for path in target.iterdir()} == before, f"{pages} pages"
            assert not list(place.glob(".staging-*")) and not list(place.glob(".old-*"))
        else:
            assert (target / "README.md").read_text() == "new"
            break
    disk.empty()
    return {"failed": failed, "pages": pages}


def beginning(place: Path, disk: SmallDisk) -> dict[str, Any]:
    """How a run ends that finds its disk full, or read-only, when it begins."""
    file, found = recipe(place, "begun"), {}
    disk.fill()
    found["full"] = run(file)
    disk.empty()
    for how in ("ro", "rw"):
        subprocess.run(["mount", "-o", f"remount,{how}", str(place)], check=True)
        if how == "ro":
            found["read-only"] = run(file)
    found["left"] = sorted(path.name for path in (place / "runs" / "begun").glob("[!.]*"))
    return found


def main(place: Path, small: bool) -> None:
    """Everything there is to be tried; a line each."""
    torch.set_num_threads(1)
    prepare_deepspeed()
    tiny.save_model(place / "student", "llama", seed=2)
    tiny.save_prompts(place / "prompts.jsonl", rows=8)
    limit = Limit(place)
    disk = SmallDisk(place) if small else limit

    def tell(what: str, found: Mapping[str, Any]) -> None:
        print(json.dumps({"what": what, **found}), flush=True)

    def filled(what: str, call: Call, on: Filled = disk, **changes: Any) -> None:
        tell(what, broken(place, what.replace(" ", "-"), (call, on.fill), mend=on.empty, **changes))

    code, said = run(recipe(place, "whole"))
    tell("whole", {"code": code, "said": said, "left": left(place, "whole")})
    shutil.rmtree(place / "runs" / "whole")
    if isinstance(disk, SmallDisk):
        tell("publishing", publishing(place, disk))
        tell("beginning", beginning(place, disk))
    filled("a better student", (stages, "publish_student", 3))
    filled("results", (results, "write_jsonl", 1))
    filled("done", (RunFolder, "set_status", 4))
    filled("no save may fail", (*LINE, 1), limit, checkpoints={**KEEP, "max_failed": 0})
    windows = [((*LINE, 1), limit.fill), ((*LINE, 2), limit.empty), (STAGE_ENDS, limit.fill), ((*LINE, 4), limit.empty)]
    tell("for a while", broken(place, "for-a-while", *windows, mend=limit.empty))

    away, gone = place / "away", place / "runs" / "gone"

    def bring_back() -> None:
        shutil.rmtree(gone)
        away.rename(gone)

    tell("gone", broken(place, "gone", ((*LINE, 4), lambda: gone.rename(away)), mend=bring_back))


if __name__ == "__main__":
    quick.short_collections()
    with quick.undrawn():
        main(Path(sys.argv[1]), sys.argv[2] == "small")
