"""Whole evaluation folders judged: questions in both orders, asked side by side, and the record of what came back."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm.errors import ConfigError, DataError
from minillm.judge import figures
from minillm.judge.ask import NOT_ASKED, Answer, Asker, Messages
from minillm.judge.cache import Cache
from minillm.judge.client import ChatClient, http_library
from minillm.judge.cost import Meter
from minillm.judge.prompts import FORMS, question, read_template
from minillm.judge.samples import Side, asked_of_sides, comparable, read_sides
from minillm.judge.settings import EndpointError, JudgeSettings, read_key
from minillm.manifests import parsed
from minillm.progress import Progress
from minillm.report_text import plain
from minillm.store import Clock, make_folder, write_jsonl, write_text

SCHEMA = 1
REFERENCES = "references"
"""What ``against`` may name: the answers that the evaluation's own prompts came with."""
ORDERS = ("left first", "right first")
SHOWN_LINES = 3
"""Broken lines of the cache that are named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One request to be made: a prompt, a pair of answers, an order."""

    side: int
    """Whose response is the left answer."""
    place: int
    order: int
    uid: str
    messages: Messages
    defused: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """All that is to be asked. ``uids`` are those of the prompts that can be judged."""

    mode: str
    right: str
    """Whose the right answers are: ``B``, or ``reference``."""
    sides: Sequence[Side]
    uids: tuple[str, ...]
    without_reference: int
    questions: tuple[Question, ...]
    asked: dict[str, Any]


def judge(
    left: str | Path,
    right: str | Path | None = None,
    *,
    settings: JudgeSettings,
    against: str | None = None,
    single: bool = False,
    seed: int | None = None,
    temperature: float | None = None,
    limit: int | None = None,
    template: str | Path | None = None,
    out: str | Path | None = None,
    fresh: bool = False,
    resamples: int = 2000,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Judges the responses of one or two evaluation folders; the record, as it is written to ``out/judge.json``.

    One folder, or ``single``: each response is scored beside its reference. Two folders: their responses are
    compared. One folder ``against="references"``: its responses are compared with those. The key comes from the
    environment. ``say`` hears notes, and None keeps silent, the progress too. Raises ``EndpointError`` where the
    endpoint is of no use, and leaves what ``out`` held before; answers that came are kept in ``out/cache.jsonl``.
    """
    clock, told = Clock(), say or (lambda _: None)
    http_library()
    key = read_key(settings)
    folders = [Path(left)] if right is None else [Path(left), Path(right)]
    require_opponent(right, against=against, single=single)
    sides = read_sides(folders, seed=seed, temperature=temperature)
    text = read_template(None if template is None else Path(template))
    single = single or (right is None and against is None)
    work = _work(sides, single=single, against=against, template=text, limit=limit, settings=settings)
    out = default_out(*folders, single=single, against=against) if out is None else Path(out)
    stored = None if fresh else stored_judging(out, work.asked, prompts=len(work.uids))
    make_folder(out, setting="--out")
    cache, meter = Cache(out / "cache.jsonl"), Meter(settings)
    for line in _first_words(work, cache, settings, key):
        told(line)
    with ChatClient(settings, key=key) as client:
        answers = _ask_all(work, Asker(client, cache, meter, settings=settings, form=FORMS[work.mode]), shown=say)
        notes = list(client.notes)
    _require_some(work, answers, settings)
    record = {
        "schema": SCHEMA,
        "mode": work.mode,
        "asked": work.asked,
        **_figures(work, answers, resamples=resamples),
        **_counts(work, answers),
        "endpoint": {"url": settings.shown, "model": settings.model, "returned": _returned(answers)},
        "cost": {**meter.record(), "cached": sum(answer.cached for answer in answers)},
        "notes": notes + ([f"{len(cache.broken)} broken lines of the cache were passed over"] if cache.broken else []),
        "bootstrap": {"resamples": resamples, "seed": 0},
        "seconds": round(clock(), 2),
        "date": time.strftime("%Y-%m-%d"),
    }
    if stored is not None:
        _require_as_many(out, record, stored)
    write_jsonl(out / "judgements.jsonl", _rows(work, answers))
    write_text(out / "judge.json", json.dumps(record, indent=2, allow_nan=False) + "\n")
    return record


def require_opponent(right: str | Path | None, *, against: str | None, single: bool) -> None:
    """Raise ``ConfigError`` where a judging is told two kinds of answers to hold responses against, or an unknown
    one."""
    if against is None:
        return
    if against != REFERENCES:
        raise ConfigError(f"against: got {against!r}, wanted {REFERENCES!r}; another evaluation is named as B")
    if right is not None or single:
        other = "--single" if single else f"B ({right})"
        raise ConfigError(f"--against {REFERENCES} compares A with those; leave out {other}")


def default_out(
    left: Path, right: Path | None = None, *, single: bool = False, against: str | None = None, what: str = "judge"
) -> Path:
    """Where results go without --out: into the (left) evaluation's folder, named after what sets the other one apart:
    RUN of RUN/dolly, where both are called dolly."""
    if against is not None:
        return left / f"{what}-against-{against}"
    if right is None:
        return left / what
    pairs = zip(reversed(left.resolve().parts), reversed(right.resolve().parts), strict=False)
    other = next((theirs for own, theirs in pairs if own != theirs), right.resolve().name)
    return left / (f"{what}-beside-{other}" if single else f"{what}-against-{other}")


def _work(
    sides: Sequence[Side], *, single: bool, against: str | None, template: str, limit: int | None,
    settings: JudgeSettings,
) -> Work:  # fmt: skip
    mode = "single" if single else "pairwise"
    references = single or against is not None
    places = comparable(sides, references=references)
    without, places = len(sides[0].samples) - len(places), places[:limit]
    questions = []
    # Prompt by prompt: what a cost limit leaves over is whole prompts.
    for place, n in enumerate(places):
        for number, side in enumerate(sides if single else sides[:1]):
            ours = side.samples[n]
            theirs = ours.reference if references else sides[1].samples[n].response
            for order in range(len(ORDERS)):
                first, second = (ours.response, theirs) if order == 0 else (theirs, ours.response)
                messages, defused = question(template, FORMS[mode], prompt=ours.prompt, first=first, second=second)
                questions.append(
                    Question(side=number, place=place, order=order, uid=ours.uid, messages=messages, defused=defused)
                )
    asked = {
        **asked_of_sides(sides, mode=mode, against=against),
        "endpoint": settings.shown,
        # A query may choose the deployment; it is not shown, since it may hold what nobody else should read.
        "address": hashlib.sha256(settings.completions.encode()).hexdigest(),
        "model": settings.model,
        "template": hashlib.sha256(template.encode()).hexdigest(),
    }
    return Work(
        mode=mode,
        right="reference" if references else "B",
        sides=sides,
        uids=tuple(sides[0].samples[n].uid for n in places),
        without_reference=without,
        questions=tuple(questions),
        asked=asked,
    )


def stored_judging(out: Path, asked: Mapping[str, Any], *, prompts: int) -> dict[str, Any] | None:
    """The results that are to be replaced, None without any. ``DataError`` for those of another judging, or of more
    prompts."""
    file = out / "judge.json"
    if not file.exists():
        return None
    try:
        stored: dict[str, Any] = parsed(file.read_text(encoding="utf-8"))
        differing = [name for name in asked if stored["asked"].get(name) != asked[name]]
        before, _ = int(stored["prompts"]), _judged(stored)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{file}: not the results of a judging; move it away or give --fresh") from None
    if differing:
        raise DataError(
            f"{file} holds another judging, they differ in: {', '.join(differing)}\n"
            "  name another --out, or replace it with --fresh"
        )
    if before > prompts:
        raise DataError(
            f"{file} holds a judging of {before} prompts, this one has {prompts}; nothing was asked\n"
            "  raise --limit or leave it out, name another --out, or replace it with --fresh"
        )
    return stored


def _require_as_many(out: Path, record: dict[str, Any], stored: dict[str, Any]) -> None:
    """Raises ``DataError`` where fewer prompts were judged than in the results that would be replaced."""
    before, now = _judged(stored), _judged(record)
    if any(mine < theirs for mine, theirs in zip(now, before, strict=True)):
        told = plain(", ".join(f"{reason} ({count})" for reason, count in record["unanswered"].items()))
        raise DataError(
            f"{out / 'judge.json'} holds {_listed(before)} judged prompts, this judging has {_listed(now)}: {told}\n"
            "  the results stay as they were, and the answers that came are in the cache; the same command with a\n"
            "  higher --max-cost goes on from there, and --fresh replaces the results"
        )


def _judged(record: dict[str, Any]) -> list[int]:
    """Prompts with a whole verdict, for each evaluation that has figures of its own."""
    return [int(side["judged"]) for side in record.get("sides", [record])]


def _listed(counts: Sequence[int]) -> str:
    return " and ".join(map(str, counts))


def _first_words(work: Work, cache: Cache, settings: JudgeSettings, key: str) -> list[str]:
    side = work.sides[0]
    lines = [
        f"{len(work.uids)} prompts, seed {side.seed}, temperature {side.temperature:g}: {len(work.questions)} "
        f"questions to {settings.model} at {settings.shown}, each pair in both orders"
    ]
    if work.without_reference:
        lines.append(f"note: {work.without_reference} prompts without a reference are left out")
    if cache.broken:
        named = ", ".join(map(str, cache.broken[:SHOWN_LINES]))
        lines.append(f"note: {len(cache.broken)} broken lines of cache.jsonl are passed over (line {named})")
    if key and settings.bare:
        lines.append("note: the key travels unencrypted, as --unencrypted-key allows")
    return [plain(line) for line in lines]


def _ask_all(work: Work, asker: Asker, *, shown: Callable[[str], None] | None) -> list[Answer]:
    """The answers in the order of the questions. What ends it early leaves the answers that came in the cache."""
    answers: dict[int, Answer] = {}
    bar = Progress("judge", total=len(work.questions), unit="answers", shown=shown is not None)
    with ThreadPoolExecutor(max_workers=asker.workers, thread_name_prefix="judge") as pool:
        try:
            futures: dict[Future[Answer], int] = {
                pool.submit(asker.ask, question.messages): n for n, question in enumerate(work.questions)
            }
            for done, future in enumerate(as_completed(futures), start=1):
                answers[futures[future]] = future.result()
                bar.advance(done, {})
        except BaseException:
            asker.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            bar.close()
    return [answers[n] for n in range(len(work.questions))]


def _require_some(work: Work, answers: Sequence[Answer], settings: JudgeSettings) -> None:
    """Raises unless some prompt has been judged: results of nothing replace nothing."""
    if any(None not in pair for pairs in _pairs(work, answers) for pair in pairs):
        return
    reasons = Counter(answer.reason for answer in answers if answer.reason)
    if set(reasons) == {NOT_ASKED}:
        raise ConfigError(
            f"max_cost: got {settings.max_cost:g}, less than judging one prompt may cost\n"
            "  raise --max-cost, or lower --max-tokens"
        )
    told = plain(", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(SHOWN_LINES)))
    raise EndpointError(f"{settings.shown}: no prompt could be judged: {told}\n  nothing was written but the cache")


def _pairs(work: Work, answers: Sequence[Answer]) -> list[list[figures.Pair]]:
    """Verdicts by side and prompt."""
    sides = len(work.sides) if work.mode == "single" else 1
    found = {(q.side, q.place, q.order): a.verdict for q, a in zip(work.questions, answers, strict=True)}
    return [[(found[s, n, 0], found[s, n, 1]) for n in range(len(work.uids))] for s in range(sides)]


def _figures(work: Work, answers: Sequence[Answer], *, resamples: int) -> dict[str, Any]:
    pairs = _pairs(work, answers)
    if work.mode == "pairwise":
        return figures.pairwise(work.uids, pairs[0], resamples=resamples, seed=0)
    found = [figures.single(work.uids, each, resamples=resamples, seed=0) for each in pairs]
    if len(found) == 1:
        return found[0]
    both = figures.single_difference(work.uids, *pairs, resamples=resamples, seed=0)
    return {"sides": found, "difference": both}


def _counts(work: Work, answers: Sequence[Answer]) -> dict[str, Any]:
    reasons = Counter(answer.reason for answer in answers if answer.verdict is None)
    return {
        "prompts": len(work.uids),
        "without_reference": work.without_reference,
        "unanswered": dict(reasons.most_common()),
        "defused": sum(question.defused > 0 for question in work.questions),
    }


def _returned(answers: Sequence[Answer]) -> list[str]:
    """The model's names as the endpoint gave them: an alias may mean another model next month."""
    return sorted({answer.model for answer in answers if answer.model})


def _rows(work: Work, answers: Sequence[Answer]) -> list[dict[str, Any]]:
    return [
        {
            "uid": question.uid,
            "left": "AB"[question.side],
            "right": work.right,
            "order": ORDERS[question.order],
            "verdict": answer.verdict,
            "reason": answer.reason,
            "model": answer.model,
            "cached": answer.cached,
            "defused": question.defused,
            "reply": answer.reply,
        }
        for question, answer in zip(work.questions, answers, strict=True)
    ]
