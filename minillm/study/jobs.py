"""The same study by several processes of one machine: each takes the next model, arm or cell that is to be made.

First the models, then what tuning has to settle, then the cells, seed by seed; each of the three begins when all of the
one before is there, since it reads what that has kept. What is made does not depend on which process makes it.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from pathlib import Path
from typing import Any

from minillm.config import RunConfig
from minillm.errors import ConfigError
from minillm.ranks import Ranks
from minillm.store import make_folder
from minillm.study.cells import Asked, asked, code_digest, sort_out
from minillm.study.config import StudyConfig
from minillm.study.make import log_into, make_model, make_text
from minillm.study.run import arms_to_tune, cells_to_make, make_cell, progress_line, run_study
from minillm.study.texts import StudyText, texts_of
from minillm.study.tuning import tune

Say = Callable[[str], None]


def run_by_jobs(
    study: StudyConfig, *, jobs: int, arms: Sequence[str], seeds: Sequence[int], again: bool, say: Say
) -> None:
    """What ``run_study`` does, by this many processes at a time, each with the recipe's threads.

    Raises what that raises, once what other processes had begun is finished, and ``ConfigError`` where a launcher has
    started several ranks (they make each cell together already) or a process was ended from outside.
    """
    if jobs == 1:
        run_study(study, arms=arms, seeds=seeds, again=again, say=say)
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"--jobs {jobs}: under a launcher all ranks make each cell together; leave one of them out")
    make_folder(Path(study.results), setting="results")
    code_digest()  # of the code that runs, before anybody changes it
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            _all(pool, study, arms=arms, seeds=seeds, again=again, say=say)
        except BrokenProcessPool as error:
            raise ConfigError(
                f"--jobs {jobs}: one of the processes was ended from outside, most often for lack of memory; what is "
                "finished is kept: give the same command again, with fewer jobs"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _all(
    pool: ProcessPoolExecutor, study: StudyConfig, *, arms: Sequence[str], seeds: Sequence[int], again: bool, say: Say
) -> None:
    open_arms = arms_to_tune(study, arms, again=again, say=say)
    needed = _needed(study, open_arms, arms=arms, seeds=seeds, again=again)
    models = [model for wanted in needed for model in (wanted.teacher, wanted.student) if model is not None]
    _wait(pool.submit(_make_model, model) for model in {model.name: model for model in models}.values())
    texts = {text.file: text for wanted in needed for text in wanted.texts}
    written = [pool.submit(_make_text, text) for text in texts.values()]
    # An arm that learns from text waits for it: such arms come last, and the text is begun first.
    ordered = sorted(open_arms, key=lambda arm: bool(texts_of(study, arm, study.tuning_seed)))
    tuned = [pool.submit(_tune, study, arm, again) for arm in ordered]
    for future in as_completed([*written, *tuned]):
        for line in future.result():
            say(line)
    todo = cells_to_make(study, arms=arms, seeds=seeds, again=again, say=say)
    began = time.monotonic()
    cells = {pool.submit(_make_cell, study, wanted): wanted for wanted in todo}
    for number, done in enumerate(as_completed(cells), start=1):
        say(progress_line(cells[done], done.result(), made=number, of=len(todo), began=began))


def _needed(
    study: StudyConfig, open_arms: Sequence[str], *, arms: Sequence[str], seeds: Sequence[int], again: bool
) -> list[Asked]:
    """What is still to be made, so that the models and the text that it needs can be made first."""
    needed = [asked(study, arm, seed) for arm in open_arms for seed in (*_seeds_of_tuning(study), *seeds)]
    tuned = [arm for arm in arms if arm not in open_arms]
    if again:
        needed += [asked(study, arm, seed) for arm in tuned for seed in seeds]
    else:
        needed += [wanted for wanted, _ in sort_out(study, arms=tuned, seeds=seeds)[1]]
    return needed


def _seeds_of_tuning(study: StudyConfig) -> list[int]:
    return [] if study.search is None else [study.search.seed]


def _wait(futures: Iterable[Future[Any]]) -> None:
    """Until all are done, or one has failed."""
    for future in as_completed(list(futures)):
        future.result()


# What the processes run; a study and a cell travel to them as they are.


@lru_cache(maxsize=1)
def _ranks(threads: int) -> Ranks:
    return Ranks(threads=threads)


def _make_model(model: RunConfig) -> None:
    with log_into(Path(model.out) / f"{model.name}.log", first=True):
        make_model(model, ranks=_ranks(model.threads))


def _make_text(text: StudyText) -> list[str]:
    with log_into(text.file.with_suffix(".log"), first=True):
        make_text(text, ranks=_ranks(text.run.threads))
    return []


def _tune(study: StudyConfig, arm: str, again: bool) -> list[str]:
    said: list[str] = []
    tune(study, arm, ranks=_ranks(study.cell_config(arm, study.seeds[0]).threads), say=said.append, again=again)
    return said


def _make_cell(study: StudyConfig, wanted: Asked) -> dict[str, Any]:
    return make_cell(study, wanted, ranks=_ranks(wanted.run.threads))
