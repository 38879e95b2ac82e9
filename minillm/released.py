"""MiniLLM's evaluation as it was published: the sets by name, the forms their rows come in, and the protocol.

The released files (Hugging Face, ``MiniLLM/dolly``, ``self-inst``, ``Vicuna``, ``sinst``, ``uinst``) have
``instruction``, ``input``, ``prompt`` and ``output``, a text or a list of texts, and are read as any other file. The
sets that they were made from have other fields; these are the forms that ``unfolded`` knows, and where to see them:

    Dolly          instruction, context, response    databricks/databricks-dolly-15k
    Self-Instruct  instruction, instances            yizhongw/self-instruct, human_eval/user_oriented_instructions.jsonl
    UnNI           instruction, instances            orhonovich/unnatural-instructions, README.md
    S-NI           definition, inputs, targets       Muennighoff/natural-instructions (a row an instance)
    Vicuna         question_id and turns, or text    lm-sys/FastChat, llm_judge/data/vicuna_bench/question.jsonl
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from minillm.errors import ConfigError, did_you_mean

SCHEME = "set"


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownSet:
    """One file of a data set on the hub, by the name that a source gives it: ``set:NAME``."""

    repository: str
    file: str
    rows: int | None
    """None where they were not counted."""
    template: str
    """The frame that the published scores were made with."""
    fields: str
    about: str


_FIELDS = "instruction, input, output, prompt, topic"
KNOWN: dict[str, KnownSet] = {
    "dolly": KnownSet(
        repository="MiniLLM/dolly", file="valid.jsonl", rows=500, template="alpaca", fields=_FIELDS,
        about="DollyEval: held-out rows of databricks-dolly-15k",
    ),
    "self-inst": KnownSet(
        repository="MiniLLM/self-inst", file="valid.jsonl", rows=242, template="alpaca", fields=_FIELDS,
        about="SelfInst: user-oriented instructions of Self-Instruct; 252 before long ones were dropped",
    ),
    "vicuna": KnownSet(
        repository="MiniLLM/Vicuna", file="valid.jsonl", rows=80, template="alpaca",
        fields="instruction, output, prompt, category", about="VicunaEval: the references are a model's",
    ),
    "sinst": KnownSet(
        repository="MiniLLM/sinst", file="11_/valid.jsonl", rows=1694, template="alpaca", fields=_FIELDS,
        about="S-NI, references of 11 and more (the main table's); several references a row",
    ),
    "uinst": KnownSet(
        repository="MiniLLM/uinst", file="11_/valid.jsonl", rows=None, template="alpaca",
        fields="instruction, input, output, prompt",
        about="UnNI, references of 11 and more; the published scripts read the first 10,000",
    ),
}  # fmt: skip

PRESETS: dict[str, tuple[str, ...]] = {
    "minillm": (
        "data.template=alpaca",
        "data.max_prompt_tokens=256",
        "decoding.max_new_tokens=256",
        "decoding.temperature=1.0",
        "decoding.top_k=0",
        "decoding.top_p=1.0",
        "decoding.no_repeat_ngram_size=6",
        "decoding.repetition_penalty=1.0",
        "evaluation.seeds=[10, 20, 30, 40, 50]",
        "evaluation.temperatures=[1.0]",
    ),
}
"""Protocols of an evaluation, as the settings that they replace. ``minillm``: the published final evaluator's, whose
defaults ban every 6-gram that stands in prompt or response already; its validation in training bans none."""


def known_set(name: str) -> KnownSet:
    """The set of this name. ``ConfigError``, with the nearest, for one that is not known."""
    if name not in KNOWN:
        raise ConfigError(f"got 'set:{name}', wanted set: and one of {', '.join(KNOWN)}{did_you_mean(name, KNOWN)}")
    return KNOWN[name]


def preset(name: str) -> tuple[str, ...]:
    """The overrides of a protocol. ``ConfigError`` for one that is not known."""
    if name not in PRESETS:
        raise ConfigError(f"--preset {name!r}: wanted one of {', '.join(PRESETS)}{did_you_mean(name, PRESETS)}")
    return PRESETS[name]


def unfolded(record: Mapping[str, object]) -> list[Mapping[str, object]]:
    """The record under the names that are read here, one for each of its instances; anything else as it is.

    Nothing is renamed in a record that has a field of the wanted name already. With several instances the number of
    each is added to an ``id`` that the record has (``seed-3#0``).
    """
    given = {name: value for name, value in record.items() if value is not None}  # a Parquet column that a row lacks
    fields = set(given)
    if {"instruction", "instances"} <= fields:
        return _instances(given) or [record]
    if {"instruction", "context"} <= fields and "input" not in fields:
        return [_renamed(given, {"context": "input"})]
    if {"definition", "inputs"} <= fields and not fields & {"instruction", "input", "prompt"}:
        return [_renamed(given, {"definition": "instruction", "inputs": "input", "targets": "output"})]
    if "question_id" in fields and not fields & {"prompt", "instruction", "messages"}:
        return [_question(given) or record]
    return [record]


def _renamed(record: Mapping[str, object], names: Mapping[str, str]) -> Mapping[str, object]:
    return {names.get(name, name): value for name, value in record.items()}


def _question(record: Mapping[str, object]) -> Mapping[str, object] | None:
    turns = record.get("turns", [record["text"]] if "text" in record else None)
    # A second turn answers what was said to the first: such a row is no prompt, and stays one that is refused.
    if not (isinstance(turns, list) and len(turns) == 1):
        return None
    rest = {name: value for name, value in record.items() if name not in ("turns", "text")}
    named = {} if rest.keys() & {"id", "uid"} else {"question_id": "id"}
    return {**_renamed(rest, named), "instruction": turns[0]}


def _instances(record: Mapping[str, object]) -> list[Mapping[str, object]]:
    """Each instance with the instruction of all; [] where they are of no known form, or the row has answers of its
    own."""
    found = record["instances"]
    if isinstance(found, dict) and all(isinstance(value, list) for value in found.values()):
        # The hub's library turns a list of objects into an object of lists.
        found = [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=False)]
    own = record.keys() & {"input", "output", "response", "responses"}
    if own or not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        return []
    rest = {name: value for name, value in record.items() if name != "instances"}
    rows: list[Mapping[str, object]] = []
    for number, each in enumerate(found):
        row = {**rest, **{name: each[name] for name in ("input", "output", "constraints") if name in each}}
        for name in ("id", "uid") if len(found) > 1 else ():
            if name in rest:
                row[name] = f"{rest[name]}#{number}"
        rows.append(row)
    return rows
