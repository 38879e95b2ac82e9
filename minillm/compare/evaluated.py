"""The evaluations to be compared, as their folders hold them, and the refusals: other prompts, other decoding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm.cards import may_differ, name_only
from minillm.errors import ConfigError, DataError, MinillmError
from minillm.measures import MAIN_TEMPERATURE, MEASURES, OF_TEACHER, OF_TOKENS, ratios_of, temperature_key
from minillm.report_files import read_results, read_samples, require_folder
from minillm.statistics import Ratio

Sample = Mapping[str, Any]
AT_LEAST = 2
DECODING_BEFORE = {"no_repeat_ngram_size": 0, "repetition_penalty": 1.0}
"""What an evaluation was made with that does not say so: settings that came later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """One evaluation folder: what it says of itself, and its samples, hottest temperature first."""

    name: str
    results: Mapping[str, Any]
    rows: Mapping[str, Sequence[dict[str, Any]]]
    """Temperature, as ``measures.temperature_key`` writes it -> rows by sampling seed and then as in the first file."""

    @property
    def decoding(self) -> dict[str, Any]:
        """Without the temperature, which each sample has for itself."""
        said = {**DECODING_BEFORE, **(self.results.get("decoding") or {})}
        return {key: value for key, value in said.items() if key != "temperature"}

    @property
    def seeds(self) -> list[int]:
        return sorted({int(row["seed"]) for rows in self.rows.values() for row in rows})

    def prompts(self) -> dict[str, Sample]:
        """A row for each prompt, by uid."""
        return {str(row["uid"]): row for row in next(iter(self.rows.values()))}

    def ratios(self, temperature: str, *, uids: Sequence[str] | None = None) -> dict[str, Ratio]:
        """The measures at a temperature, of all prompts or of these. ``DataError`` where a value is no number."""
        chosen = None if uids is None else set(uids)
        rows = [row for row in self.rows[temperature] if chosen is None or str(row["uid"]) in chosen]
        try:
            return ratios_of(rows)
        except MinillmError:
            raise
        except (TypeError, ValueError) as error:
            raise DataError(f"{self.name}: a measure in samples.jsonl is no number ({error}); evaluate again") from None


def read_all(named: Mapping[str, Path]) -> list[Evaluated]:
    """Two evaluations or more in the given order; the prompts of each in the order of the first."""
    if len(named) < AT_LEAST:
        raise ConfigError(f"got {len(named)} evaluation, wanted two or more to compare; name another folder")
    return read_folders(named)


def read_folders(named: Mapping[str, Path]) -> list[Evaluated]:
    """The evaluations in the given order; the prompts of each in the order of the first."""
    found: list[Evaluated] = []
    order: dict[str, int] = {}
    for name, folder in named.items():
        require_folder(folder, name=name)
        results, rows = read_results(folder), read_samples(folder)
        for row in rows:
            _require_row(row, folder)
        order = order or {str(row["uid"]): place for place, row in reversed(list(enumerate(rows)))}
        rows.sort(key=lambda row: (int(row["seed"]), order.get(str(row["uid"]), len(order))))
        keys = sorted({temperature_key(row["temperature"]) for row in rows}, key=float, reverse=True)
        by_key = {key: [row for row in rows if temperature_key(row["temperature"]) == key] for key in keys}
        if not by_key:
            raise DataError(f"{folder / 'samples.jsonl'}: no samples, wanted at least one; evaluate the model again")
        found.append(Evaluated(name=name, results=results, rows=by_key))
    return found


def require_comparable(base: Evaluated, other: Evaluated, *, across: bool) -> tuple[list[str], frozenset[str]]:
    """What a reader has to know about this pair, and the measures that cannot be compared.

    Raises ``DataError`` for other prompts, other references, other decoding settings (unless ``across``), and without
    a common temperature.
    """
    pair = f"{base.name} and {other.name}"
    _require_same_rows(base, other)
    notes, out = [], set[str]()
    changed = [
        f"{key} is {base.decoding.get(key)!r} for {base.name} and {other.decoding.get(key)!r} for {other.name}"
        for key in {**base.decoding, **other.decoding}
        if base.decoding.get(key) != other.decoding.get(key)
    ]
    if not set(base.rows) & set(other.rows):
        changed.append(
            f"temperature is {', '.join(base.rows)} for {base.name} and {', '.join(other.rows)} for {other.name}"
        )
    if changed and not across:
        raise DataError(
            f"{pair} were sampled with different decoding: {'; '.join(changed)}; wanted the same\n"
            "  evaluate both with the same configuration, or give --across to `minillm compare`: as they are"
        )
    if changed:
        out.update(OF_TEACHER)
        notes.append(
            f"{pair} were sampled with different decoding ({'; '.join(changed)}): a difference is that of model and "
            f"decoding together. {_labels(OF_TEACHER)}: left out, another quantity under each decoding."
        )
    alone = sorted(set(base.rows) ^ set(other.rows), key=float, reverse=True)
    if alone and not changed:
        notes.append(f"{pair}: only one of them was evaluated at temperature {', '.join(alone)}.")
    if base.seeds != other.seeds:
        notes.append(
            f"{pair} have different sampling seeds ({_listed(base.seeds)} against {_listed(other.seeds)}): each "
            "prompt's mean over its seeds is compared, response by response they have nothing to do with each other."
        )
    teachers = [_teacher(one) for one in (base, other)]
    if teachers[0] != teachers[1] and None not in teachers:
        out.update(OF_TEACHER)
        notes.append(f"{pair} were measured against different teachers. Left out: {_labels(OF_TEACHER)}.")
    elif name_only(teachers[0]):
        notes.append(
            f"{pair}: their teacher is known by name only ({str(teachers[0]).partition('@')[0]}): whether it was the "
            "same revision, no file says."
        )
    if _of(base, "data", "sha256") != _of(other, "data", "sha256"):
        out.update(OF_TOKENS)
        notes.append(f"{pair} read the same text as other tokens. Left out: {_labels(OF_TOKENS)}.")
    weights = [_of(one, "asked", "weights") for one in (base, other)]
    if weights[0] is not None and not may_differ(*weights):
        notes.append(f"{pair} are evaluations of the same weights.")
    return notes, frozenset(out)


def common_temperatures(base: Evaluated, other: Evaluated) -> list[tuple[str, str]]:
    """Pairs of temperatures to compare, hottest first; where none is common, the main one of each."""
    both = [(key, key) for key in base.rows if key in other.rows]
    return both or [(_main(base.rows), _main(other.rows))]


def headline(pairs: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """The pair of temperatures that the verdict is about: 1 where it is there, else the first."""
    main = temperature_key(MAIN_TEMPERATURE)
    return (main, main) if (main, main) in pairs else pairs[0]


def _main(keys: Mapping[str, Any]) -> str:
    main = temperature_key(MAIN_TEMPERATURE)
    return main if main in keys else next(iter(keys))


def _require_same_rows(base: Evaluated, other: Evaluated) -> None:
    """The same prompts with the same references, at every temperature of both."""
    ours = base.prompts()
    remedy = "wanted the same; evaluate both with the same configuration"
    for one in (base, other):
        for key, rows in one.rows.items():
            theirs = {str(row["uid"]): row for row in rows}
            odd = [*(uid for uid in ours if uid not in theirs), *(uid for uid in theirs if uid not in ours)]
            if odd:
                raise DataError(
                    f"{base.name} and {one.name} (temperature {key}) are evaluations of different data: {len(ours)} "
                    f"and {len(theirs)} prompts, {len(odd)} of them in one only, such as {odd[0]!r}; {remedy}"
                )
            for uid, row in theirs.items():
                for field, word in (("prompt", "prompt"), ("references", "references")):
                    if (ours[uid].get(field) or "") != (row.get(field) or ""):
                        raise DataError(
                            f"{base.name} and {one.name}: prompt {uid!r} has another text of its {word}; {remedy}"
                        )


def _require_row(row: Mapping[str, Any], folder: Path) -> None:
    """Raise ``DataError`` for a row whose fields are of another kind than an evaluation writes."""
    wanted = {
        "uid": (str, int),
        "seed": (int,),
        "temperature": (int, float),
        "prompt": (str,),
        "response": (str,),
        "measures": (dict,),
    }
    for field, kinds in wanted.items():
        if not isinstance(row[field], kinds) or isinstance(row[field], bool):
            raise DataError(
                f"{folder / 'samples.jsonl'}, prompt {row['uid']!r}: {field!r} is {row[field]!r}; evaluate again"
            )
    counts = [row["measures"].get(name) or 0 for name in ("kl_tokens", "gold_tokens")]
    if any(isinstance(count, int | float) and count < 0 for count in counts):
        raise DataError(f"{folder / 'samples.jsonl'}, prompt {row['uid']!r}: fewer than 0 tokens; evaluate again")
    references = row.get("references") or []
    if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
        raise DataError(f"{folder / 'samples.jsonl'}, prompt {row['uid']!r}: 'references' is no list of texts")
    if not math.isfinite(row["temperature"]) or row["temperature"] <= 0:
        raise DataError(f"{folder / 'samples.jsonl'}, prompt {row['uid']!r}: temperature {row['temperature']!r}")


def _teacher(one: Evaluated) -> Any:
    """What tells one teacher from another; None without one."""
    return _of(one, "asked", "teacher_weights") or _of(one, "teacher", "name")


def _of(one: Evaluated, part: str, key: str) -> Any:
    inside = one.results.get(part)
    return inside.get(key) if isinstance(inside, dict) else None


def _labels(names: Sequence[str]) -> str:
    return ", ".join(MEASURES[name].label for name in names)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
