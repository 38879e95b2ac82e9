"""What an evaluation costs beside its bare parts: decoding, one forward of the teacher, rouge-score by itself.

Legend: B rows of a batch, P prompt positions, T response positions, L = P + T, N response tokens, H hidden width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minillm.batches import prompt_batch
from minillm.bench.pairs import Spread, in_turns, ratio, spread_of, threads
from minillm.config import RunConfig
from minillm.decode import roll_out
from minillm.errors import ConfigError
from minillm.evaluation import Record, batches_of_rank, sample_and_judge
from minillm.evaluation_sets import read_sets
from minillm.gold import read_gold
from minillm.length_buckets import by_length
from minillm.measures import summarise
from minillm.pairs import Pair, check_pair
from minillm.preflight import Split
from minillm.ranks import Ranks
from minillm.results import evaluate_into, judge_of, opened
from minillm.scoring import token_statistics
from minillm.stages import Start, load_teacher
from minillm.text_measures import forget_scores
from minillm.types import Decoding, DrawKey, PromptBatch, Purpose, Rollout

PARTS = ("decode", "teacher", "rouge_score")
"""What the whole is held against, each once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateFigures:
    """Seconds of everything, and the two ratios."""

    prompts: int
    responses: int
    tokens: int
    """Drawn, end tokens included."""
    pairs: int
    """Of a response and one of its references."""
    clock: str
    seconds: dict[str, Spread]
    generation_over_decode: Spread
    whole_over_parts: Spread


def measure_evaluate(model: str, config: RunConfig, *, repeats: int, thread_count: int) -> EvaluateFigures:
    """Everything in turns, after one turn that is not counted.

    On a CPU the clock counts the seconds of this process's threads, which other processes change little; on a GPU it is
    a wall clock.
    """
    with threads(thread_count):
        work = Work(model, config)
        on_cpu = work.ranks.device.type == "cpu"
        variants = work.variants()
        seconds = in_turns(
            variants, repeats=repeats, device=work.ranks.device,
            clock=time.process_time if on_cpu else time.perf_counter,
        )  # fmt: skip
        work.close()
    sums = [sum(turn) for turn in zip(*(seconds[name] for name in PARTS if name in seconds), strict=True)]
    return EvaluateFigures(
        prompts=len(work.judge.prompts),
        responses=len(work.samples),
        tokens=sum(int(rollout.mask_BT.sum()) for rollout in work.rollouts),
        pairs=sum(len(row["references"]) for row in work.samples),
        clock="CPU" if on_cpu else "wall",
        seconds={name: spread_of(values) for name, values in seconds.items()},
        generation_over_decode=ratio(seconds["generation"], seconds["decode"]),
        whole_over_parts=ratio(seconds["whole"], sums),
    )


class Work:
    """One evaluation, whole and in parts; what every part needs is there before it is timed."""

    def __init__(self, model: str, config: RunConfig) -> None:
        self._config, self._pair, self._split = config, *_asked(model, config)
        self.ranks = Ranks()
        self._start = Start(card=self._pair.student_card, facts=self._pair.student)
        self._teacher = None
        if self._pair.teacher is not None:
            self._teacher = load_teacher(self._pair, ranks=self.ranks, say=lambda _: None)
        self._opened = opened(config, self._pair, start=self._start, ranks=self.ranks)
        self.judge = judge_of(config, self._pair, self._split, teacher=self._teacher, purpose=Purpose.EVALUATION)
        self._batches = self._prompt_batches()
        self.rollouts: list[Rollout] = []
        self.decode()
        self.samples: list[Record] = self.generation(whole=True)

    def variants(self) -> dict[str, Callable[[], object]]:
        """What is timed, by name."""
        found: dict[str, Callable[[], object]] = {
            "whole": self.whole, "generation": self.generation, "decode": self.decode,
        }  # fmt: skip
        if self.judge.teacher is not None:
            found["teacher"] = self.teacher
        if any(row["references"] for row in self.samples):
            found |= {"rouge_score": self.rouge_score, "references": self.references}
        return {**found, "summary": self.summary}

    def close(self) -> None:
        """Gives the teacher back."""
        if self._teacher is not None:
            self._teacher.close()

    def whole(self) -> dict[str, Any]:
        """What ``minillm evaluate`` does with models that are in memory, files included."""
        forget_scores()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            return evaluate_into(
                self._config, self._pair, self._split, start=self._start, teacher=self._teacher, ranks=self.ranks,
                out=Path(folder), shown="", model=self._opened,
            )  # fmt: skip

    def generation(self, *, whole: bool = False) -> list[Record]:
        """The rows of samples.jsonl; unless ``whole``, without what needs a teacher, references or the world."""
        judge = self.judge
        if not whole:
            bare = [dataclasses.replace(prompt, responses=(), response_ids=()) for prompt in judge.prompts]
            judge = dataclasses.replace(judge, prompts=bare, teacher=None, check=None, thorough=False)
        settings = self._config.evaluation
        return sample_and_judge(
            self._opened[1], judge, seeds=settings.seeds, temperatures=settings.temperatures, ranks=self.ranks
        )

    def decode(self) -> None:
        """The same tokens from the same batches by the decode loop alone: no states are kept and no text is made."""
        judge = self.judge
        self.rollouts = [
            roll_out(
                batch, student=self._opened[1], decoding=decoding, eos_ids=judge.ids.eos, pad_id=judge.ids.pad,
                key=DrawKey(seed=judge.seed, stage="", purpose=judge.purpose, rollout=0),
            )
            for decoding, batch in self._batches
        ]  # fmt: skip

    @torch.no_grad()
    def teacher(self) -> list[Any]:
        """One forward over prompts and responses, batch by batch, with the log-probs of the response tokens."""
        teacher = self.judge.teacher
        assert teacher is not None
        found = []
        for (decoding, prompts), rollout in zip(self._batches, self.rollouts, strict=True):
            ids_BL = torch.cat([prompts.ids_BP, rollout.response_BT], dim=1)
            mask_BL = torch.cat([prompts.mask_BP, rollout.mask_BT], dim=1)
            hidden_BLH = teacher.reader.read(ids_BL, mask_BL)
            hidden_NH = hidden_BLH[:, prompts.ids_BP.shape[1] - 1 : -1][rollout.mask_BT]
            with teacher.head() as head:
                taken_N = rollout.response_BT[rollout.mask_BT]
                found.append(
                    token_statistics(
                        hidden_NH, head=head, taken_N=taken_N, wanted=("logq",), temperature=decoding.temperature
                    )
                )
        return found

    def rouge_score(self) -> list[float]:
        """The best reference's ROUGE-L of every response by the package itself, as its users call it."""
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(["rougeL"], use_stemmer=True)
        return [
            scorer.score_multi(row["references"], row["response"])["rougeL"].fmeasure
            for row in self.samples
            if row["references"]
        ]

    def references(self) -> Sequence[Any]:
        """The model's forward over the references: no part of the sum, since not every evaluation has it."""
        return read_gold(
            self._opened[1], self.judge.prompts, pad_id=self.judge.ids.pad, limits=self.judge.limits, ranks=self.ranks
        )

    def summary(self) -> None:
        """Measures and their intervals from the rows: no part of the sum either."""
        settings = self._config.evaluation
        options: dict[str, Any] = {"resamples": settings.bootstrap, "seed": self._config.seed}
        summarise(self.samples, temperatures=settings.temperatures, **options)
        by_length(self.samples, **options)

    def _prompt_batches(self) -> list[tuple[Decoding, PromptBatch]]:
        judge, settings = self.judge, self._config.evaluation
        found = []
        for temperature in settings.temperatures:
            for cells in batches_of_rank(judge, numbers=settings.seeds, ranks=self.ranks):
                rows = [judge.prompts[place] for place, _ in cells]
                batch = prompt_batch(rows, [seed for _, seed in cells], pad_id=judge.ids.pad, device=self.ranks.device)
                found.append((dataclasses.replace(judge.decoding, temperature=temperature), batch))
        return found


def _asked(model: str, config: RunConfig) -> tuple[Pair, Split]:
    if config.data.test is None or isinstance(config.data.test, dict):
        raise ConfigError("data.test: wanted one set of prompts to measure with, such as data.test=world:test")
    pair = check_pair(config, student=model)
    return pair, read_sets(config, pair)[""]
