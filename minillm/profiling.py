"""What the processor and the GPU do in a few steps, as a trace that a viewer opens (torch.profiler)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from minillm import phases
from minillm.ranks import Ranks
from minillm.run_log import note
from minillm.speed import PHASES
from minillm.store import PROFILE, make_folder

FIRST_PHASE = "rollout"
"""What every step begins with."""
_LONGEST = 5
"""How many of the operations that took longest are told."""


@contextmanager
def profiled(folder: Path, stage: str, steps: int, *, ranks: Ranks, say: Callable[[str], None]) -> Iterator[None]:
    """Records the second to the (``steps`` + 1)th step of a stage that the block makes, on every rank, into
    ``folder/profile/STAGE-rankNNNNN.json.gz``; 0 records nothing. The first is left out: it pays for what is made once.

    Phases stand in the trace as ranges of their own. Where it cannot be written that is told, and the run goes on.
    """
    if not steps:
        yield
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells of its start and end on every rank
    file = folder / PROFILE / f"{stage}-rank{ranks.rank:05d}.json.gz"
    make_folder(file.parent, setting="out or name")
    recorder = _Recorder(file, steps)
    try:
        with phases.heard(recorder.hear):
            yield
    finally:
        recorder.end()
        if recorder.recorded:
            say(
                f"profile: {recorder.recorded} steps of stage {stage} from its second on, in {file.parent}, a file a "
                "rank; open one in https://ui.perfetto.dev or chrome://tracing. Longest on rank 0: "
                f"{recorder.longest}"
            )
        else:
            say(f"profile: nothing of stage {stage}; the first step is left out, and there was no second")


class _Recorder:
    """Begins at the second step, ends with the last one that is wanted."""

    def __init__(self, file: Path, steps: int) -> None:
        self._file, self._wanted = file, steps
        self._begun = 0
        """Steps of the block that have begun."""
        self._profile: Any = None
        self._range: Any = None
        self.recorded = 0
        self.longest = ""

    def hear(self, phase: str) -> None:
        """A phase begins; the first of a step ends the step before."""
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None
        if phase == FIRST_PHASE:
            self._begun += 1
            if self._begun == self._wanted + 2:
                self.end()
            elif self._begun == 2:
                activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
                self._profile = profile(activities=activities)
                self._profile.start()
            if self._profile is not None:
                self.recorded += 1
        if self._profile is not None:
            self._range = record_function(phase)
            self._range.__enter__()

    def end(self) -> None:
        """Writes the trace, where one was begun and is not written yet."""
        if self._profile is None:
            return
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None
        ended, self._profile = self._profile, None
        ended.stop()
        try:
            ended.export_chrome_trace(str(self._file))
        except OSError as error:  # of this rank alone, and no part of the run
            note(f"{self._file}: the trace of the profiler cannot be written ({error.strerror}); the run goes on")
        kind = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        spent = {one.key: float(getattr(one, kind)) for one in ended.key_averages() if one.key not in PHASES}
        longest = sorted(spent, key=lambda name: -spent[name])[:_LONGEST]
        whole = max(sum(spent.values()), 1e-9)
        self.longest = ", ".join(f"{name} {spent[name] / whole:.0%}" for name in longest)
