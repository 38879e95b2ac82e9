"""A run's folder at its start: whose it is, what it holds, and what the run goes on from."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minillm.cards import may_differ
from minillm.changed_run import Change, Effect, changes, changes_in_files, effect_of, in_files, judge, paths_of
from minillm.checkpoint_manifest import folder_name
from minillm.checkpoints import Checkpoint, Checkpoints, Resume, steps_in
from minillm.config import CheckpointsConfig, DecodingConfig, RunConfig, dump_config
from minillm.engine_settings import read_engine_settings, read_teacher_settings
from minillm.errors import CheckpointError, ConfigError, DataError, DiskError, RunExists, Stopped
from minillm.pairs import Pair
from minillm.ranks import Ranks
from minillm.results import used_by, versions
from minillm.run_lock import run_lock, says
from minillm.saving import Resumed, needs_its_ranks, read
from minillm.stage_base import BaseStage
from minillm.store import CHECKPOINTS, RunFolder, Standing, make_folder
from minillm.yaml_reader import read_yaml

Say = Callable[[str], None]
SHOWN_S = 5.0
"""Seconds in which a disk over a network has to show on every rank what one of them has written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """What a run is made from beside its configuration."""

    made_from: Mapping[str, str]
    """Hashes of weights, prompts, corpus and teacher caches, by what they are."""
    packages: tuple[str, ...]
    """Those that compute in this run beside the usual ones (``results.used_by``)."""
    files: Mapping[str, Any]
    """What cards and engine files say (``changed_run.in_files``)."""
    data_under: Callable[[DecodingConfig], Mapping[str, str]]
    """The hashes of the data where it is read with another limit of responses, to which some may not keep."""


def require_resume(resume: object) -> None:
    """``ConfigError`` for what is no ``Resume``: another value would be taken for one of them."""
    if resume != "auto" and resume is not True and not isinstance(resume, Path):
        raise ConfigError(f"resume: got {resume!r}, wanted 'auto', True or the pathlib.Path of a checkpoint")


@contextlib.contextmanager
def taken(folder: RunFolder, config: RunConfig, *, ranks: Ranks, fresh: bool) -> Iterator[Standing]:
    """Nobody else works in the folder for the time of the block; what it holds for this configuration.

    ``RunExists`` or ``RunInUse`` on all ranks, with nothing touched, where it is another's; ``ConfigError`` on all
    where one of them has another folder by its name. A run that is done is only looked at.
    """
    text = dump_config(config)

    def standing() -> Standing:
        return "new" if fresh else folder.standing(text)

    with contextlib.ExitStack() as stack:

        def take() -> Standing:
            if standing() == "done":
                return "done"
            make_folder(folder.path, setting="out or name")
            stack.enter_context(run_lock(folder.path))
            return standing()  # once more: somebody may have worked in it until now

        found = ranks.of_first(take)
        if found != "done" and ranks.size > 1:
            _require_one_folder(folder.path, ranks=ranks)
        yield found


def _require_one_folder(folder: Path, *, ranks: Ranks) -> None:
    """Every rank writes its share of a checkpoint there, and reads the students that stages hand on."""
    wanted, until = ranks.of_first(lambda: says(folder)), time.monotonic() + SHOWN_S
    while (found := says(folder)) != wanted and time.monotonic() < until:
        time.sleep(0.1)
    what = "has another folder of that name" if found else "does not see what rank 0 has in it"
    mine = [] if found == wanted else [f"rank {ranks.rank} on {socket.gethostname()} {what}"]
    if told := ranks.gather_objects(mine):
        raise ConfigError(
            f"{folder}: {'; '.join(told)}; wanted one folder for all ranks\n"
            "  set out to a folder on a disk that all nodes share"
        )


def checkpoints_of(folder: RunFolder, config: RunConfig, *, ranks: Ranks, say: Say) -> Checkpoints:
    """The checkpoints of a run; those of an earlier one also where this one makes none."""
    keep = (config.checkpoints or CheckpointsConfig()).keep
    return Checkpoints(folder.path / CHECKPOINTS, ranks=ranks, say=say, keep=keep)


def take_up(
    folder: RunFolder, config: RunConfig, checkpoints: Checkpoints, *, standing: Standing, resume: Resume | None,
    accepted: Sequence[str], sources: Sources, ranks: Ranks, say: Say,
) -> Resumed | None:  # fmt: skip
    """Makes the folder ready; where the run goes on, None for one that begins. ``resume`` None begins in any case.

    Raises ``CheckpointError`` where there is nothing to go on from though there must be, ``RunExists`` where what there
    is comes from other models, data or settings; nothing is touched then.
    """
    text = dump_config(config)
    chosen = None
    if resume is not None and (standing == "unfinished" or resume != "auto"):
        chosen = _chosen(checkpoints, resume, ranks=ranks)
    if chosen is None:
        if accepted:
            raise ConfigError(
                f"--accept-change {accepted[0]}: {folder.path} has nothing to go on from, so nothing has changed\n"
                "  leave it out"
            )
        if resume is not None:
            ranks.of_first(lambda: folder.require_own(text))
        ranks.of_first(lambda: folder.begin(text))
        return None
    resumed = _read(chosen, ranks=ranks)
    words = _judged(resumed, config, accepted=accepted, sources=sources, ranks=ranks)
    checkpoints.clean()
    checkpoints.set_aside_after(chosen.manifest.step)  # before the log is cut, which the newer ones need whole
    ranks.of_first(lambda: folder.go_on(text, log_bytes=resumed.log_bytes))
    say(f"{folder.path}: goes on from step {resumed.progressed.step:,} of stage {resumed.stage} ({chosen.path.name})")
    for line in words:
        say(f"note: {line}")
    return resumed


def sources_of(
    config: RunConfig,
    pair: Pair,
    made_from: Mapping[str, str],
    *,
    data_of: Callable[[RunConfig], Mapping[str, str]],
) -> Sources:
    """Them, with what the run's cards and its engine files say now; ``data_of`` reads the data of a configuration."""
    engine = read_engine_settings(config.engine.student)
    taught = {} if pair.teacher_card is None else read_teacher_settings(pair.teacher_card.placement)
    files = in_files(student=pair.student_card, teacher=pair.teacher_card, engine=engine, teacher_engine=taught)
    return Sources(
        made_from=made_from,
        packages=used_by(config, pair),
        files=files,
        data_under=lambda decoding: data_of(config.model_copy(update={"decoding": decoding})),
    )


def fingerprints(config: RunConfig, sources: Sources, *, ranks: Ranks) -> dict[str, Any]:
    """What must be equal for a run to go on as if it had not stopped."""
    return {
        "config": dump_config(config), "made_from": dict(sources.made_from), "files": dict(sources.files),
        "around": _around(ranks, sources.packages),
    }  # fmt: skip


def told(resumed: Resumed | None) -> dict[str, Any]:
    """What run.json says of the stages that are over."""
    return {"seconds": {}, "stages": {}} if resumed is None else {
        "seconds": resumed.behind.seconds, "stages": resumed.behind.stages,
    }  # fmt: skip


def steps_behind(resumed: Resumed | None) -> int:
    """Steps of the stages that are over, as trackers count them."""
    if resumed is None:
        return 0
    own = resumed.progressed.step if resumed.over else 0
    return own + sum(int(stage["step"]) for stage in resumed.behind.stages.values())


@contextlib.contextmanager
def told_as_ended(folder: RunFolder) -> Iterator[None]:
    """How a run ended before its end, in run.json; where the disk ended it, the error says also where it goes on."""
    try:
        yield
    except Exception as error:
        state, reason = "stopped", str(error)
        if not isinstance(error, Stopped):
            state, reason = "failed", f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError, DataError):  # what happened first says more
            folder.set_status(state=state, reason=reason.splitlines()[0])
        if isinstance(error, DiskError):
            raise type(error)(f"{error}\n  {_way_on(folder)}") from error
        raise


def _way_on(folder: RunFolder) -> str:
    try:
        newest = steps_in(folder.path / CHECKPOINTS)[:1]
    except (OSError, DataError):
        return f"what {folder.path} holds cannot be read now"
    if not newest:
        return "no checkpoint is there: the same command starts over"
    return f"the same command goes on from {folder_name(newest[0])}"


def _chosen(checkpoints: Checkpoints, resume: Resume, *, ranks: Ranks) -> Checkpoint | None:
    if isinstance(resume, Path) and resume.absolute().parent != checkpoints.root.absolute():
        raise CheckpointError(
            f"{resume}: wanted a checkpoint of this run, in {checkpoints.root}\n"
            "  name one of them ('minillm runs verify' lists them), or copy the whole folder of the other run"
        )
    return checkpoints.choose(resume, refuse=needs_its_ranks(ranks.size))


def _judged(
    resumed: Resumed, config: RunConfig, *, accepted: Sequence[str], sources: Sources, ranks: Ranks
) -> list[str]:
    """What is to be said of what differs between the run that was saved and the one that goes on."""
    chosen = resumed.checkpoint
    saved = chosen.manifest.fingerprints
    try:
        before = RunConfig(**read_yaml(str(saved["config"]), source=str(chosen.path)))
        made, around = dict(saved["made_from"]), dict(saved["around"])
        files = dict(saved["files"]) if "files" in saved else None
        for path in files or ():
            effect_of(path)
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{chosen.path}: not the checkpoint of a run that this version can go on with ({error})\n"
            "  go on with the version that made it, or start over with --fresh"
        ) from error
    found = changes(before, config)
    if files is not None:
        found += changes_in_files(files, sources.files, named=found)
    values = (before.model_dump(mode="json"), config.model_dump(mode="json"), sources.files)
    known = {path for each in values for path in paths_of(each)}
    words = judge(found, accepted=accepted, source=str(chosen.path), known=known)
    if files is None:
        words.append("saved by a version that did not look into cards and engine files: these may have changed")
    _require_of_use(found, config, resumed)
    differs = _differing(made, sources.made_from)
    if differs and any(change.path == "decoding.max_new_tokens" for change in found):  # accepted by now
        # Responses that the new limit takes out were there under the old one, if the files are as they were.
        with contextlib.suppress(DataError):
            differs = _differing(made, {**sources.made_from, **sources.data_under(before.decoding)})
    if differs:
        raise RunExists(
            f"{chosen.path} was made from another {', '.join(differs)}; nothing was touched.\n"
            "  put back what it was made from, give this run another name (name=NAME), or start over with --fresh"
        )
    here = _around(ranks, sources.packages)
    if any(change.path == "threads" for change in found):
        del here["threads"]  # told already, as the setting
    if moved := [f"{name} {here[name]}, was {around.get(name)}" for name in here if here[name] != around.get(name)]:
        words.append(f"{'; '.join(moved)}: sums may differ in their last bits from those of the unbroken run")
    return words


def _differing(made: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What a run was made from and is not made from now; its test sets may change."""
    return [name for name in now if not name.startswith("test") and may_differ(made.get(name), now[name])]


def _require_of_use(found: Sequence[Change], config: RunConfig, resumed: Resumed) -> None:
    """``RunExists`` for a change of training that would do nothing, or that what was saved does not allow."""
    back = "set it back, go back to an older checkpoint by --resume FOLDER, or start over with --fresh"
    over = {*resumed.behind.stages, *([resumed.stage] if resumed.over else [])}
    for change in (change for change in found if change.effect is Effect.TRAINING):
        number = next((int(part) for part in change.path.split(".") if part.isdigit()), None)
        stage = None if number is None else config.stages[number]
        if stage is not None and stage.name in over:
            raise RunExists(f"{change}, but stage {stage.name} is over: it would change nothing\n  {back}")
        if resumed.checkpoint.manifest.fingerprints.get("inside"):
            raise RunExists(f"{change}, but the run was stopped between two updates of one step\n  {back}")
        ends = isinstance(stage, BaseStage) and stage.name == resumed.stage and stage.steps <= resumed.progressed.step
        if ends:
            raise RunExists(f"{change}, but {resumed.progressed.step:,} steps of {resumed.stage} are done\n  {back}")


def _around(ranks: Ranks, packages: Sequence[str]) -> dict[str, Any]:
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else ranks.device.type
    return {**versions(*packages), "device": device, "threads": torch.get_num_threads()}


def _read(chosen: Checkpoint, *, ranks: Ranks) -> Resumed:
    """Raises on all ranks where one of them cannot read its share."""
    found, reason = None, ""
    try:
        found = read(chosen, rank=ranks.rank)
    except DataError as error:
        reason = str(error)
    if reasons := [told for told in ranks.gather_objects([reason]) if told]:
        raise CheckpointError(reasons[0])
    assert found is not None
    return found
