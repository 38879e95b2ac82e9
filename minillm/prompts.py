"""Prompts ready for a model: rows through a template and a tokenizer, with every drop counted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Literal

from minillm.errors import DataError
from minillm.records import SHOWN, Row, listed, plain_name, shown
from minillm.rows import ReadReport, counted, read_rows
from minillm.templates import Template, is_blank, render
from minillm.types import Example, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["OverLong", "PrepareReport", "ReadReport", "Row", "data_hash", "encode", "prepare", "read_rows"]

OverLong = Literal["error", "drop", "keep_right"]
ENCODE_ROWS = 1000
"""Texts per tokenizer call: enough to keep it busy, few enough to keep memory flat."""


class Fate(StrEnum):
    """What can happen to a row on its way to the model, as the noun of its sentence."""

    BLANK = "blank prompt"
    LONG_PROMPT = "over-long prompt"
    NO_RESPONSE = "prompt without a response"
    BLANK_RESPONSE = "blank response"
    LONG_RESPONSE = "over-long response"
    EARLY_EOS = "response with the end-of-text token inside"
    EQUAL = "pair with equal responses"
    SEVERAL_TURNS = "pair with several turns before its responses"
    BLANK_DOCUMENT = "blank document"
    ENDED_DOCUMENT = "document with an end token inside"


_SETTING = {Fate.LONG_PROMPT: "data.max_prompt_tokens", Fate.LONG_RESPONSE: "decoding.max_new_tokens"}
_CHOICE = {
    Fate.LONG_PROMPT: "data.over_long: drop (leave such rows out) or keep_right (keep the end of each prompt)",
    Fate.LONG_RESPONSE: "data.over_long: drop (leave such rows out, counted)",
}
_CHANGE = {
    Fate.LONG_PROMPT: "kept the right end of",
    Fate.LONG_RESPONSE: "kept as text, not as token ids,",
    Fate.EARLY_EOS: "kept as text, not as token ids,",
}
_REMEDY = {
    Fate.BLANK: "write something into the rows' prompt or instruction",
    Fate.LONG_PROMPT: "raise data.max_prompt_tokens",
    Fate.NO_RESPONSE: "this stage learns from reference responses: give the rows a 'response' field",
    Fate.BLANK_RESPONSE: "this stage learns from reference responses: fill the rows' response field",
    Fate.LONG_RESPONSE: "raise decoding.max_new_tokens",
    Fate.EARLY_EOS: "take the end-of-text token out of the responses; it is added by itself",
    Fate.EQUAL: "give two responses that differ",
    Fate.SEVERAL_TURNS: "set data.single_turn: false",
    Fate.BLANK_DOCUMENT: "write something into the rows' 'text'",
    Fate.ENDED_DOCUMENT: "take the end tokens out of the text and make a document of each part; they are added then",
}
_NO_ROWS = "give at least one row"


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Rows of one fate, in their order."""

    fate: Fate
    detail: str
    """The limit in brackets, such as ' (> 256 tokens)', or ''."""
    count: int
    uids: tuple[str, ...]
    """The first few of them, one more than a message names."""

    def __str__(self) -> str:
        # 'responses with …', not 'response with …s': the plural belongs to the first noun for the 'with' fates.
        head, joint, tail = self.fate.value.partition(" with")
        return f"{counted(self.count, head)}{joint}{tail}{self.detail}: {listed(list(map(plain_name, self.uids)))}"


class Fates:
    """How many rows had each fate, and the first few of each: of millions that are left out none is kept."""

    def __init__(self) -> None:
        self._counts: dict[Fate, int] = {}
        self._uids: dict[Fate, list[str]] = {}

    def add(self, fate: Fate, uid: str) -> None:
        """One more row."""
        self._counts[fate] = self._counts.get(fate, 0) + 1
        if len(first := self._uids.setdefault(fate, [])) <= SHOWN:
            first.append(uid)

    def groups(self, detail: Callable[[Fate], str] = lambda fate: "") -> tuple[Group, ...]:
        """The rows of each fate together; ``detail`` is a limit in brackets, or ''."""
        return tuple(
            Group(fate=fate, detail=detail(fate), count=self._counts[fate], uids=tuple(self._uids[fate]))
            for fate in Fate
            if fate in self._counts
        )

    @property
    def count(self) -> int:
        """Of all fates."""
        return sum(self._counts.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareReport:
    """What became of the rows. ``str()`` is the counted sentence for the terminal.

    Example: ``train: 7,473 rows read, 7,470 used; dropped 3 over-long prompts (> 256 tokens): gsm8k-12, …``
    """

    name: str
    rows: int
    used: int
    dropped: tuple[Group, ...] = ()
    changed: tuple[Group, ...] = ()
    """Rows used, but not whole: a prompt cut at its left, a response kept as text and not as ids."""
    noun: str = "row"

    def __str__(self) -> str:
        parts = [f"{self.name}: {counted(self.rows, self.noun)} read, {self.used:,} used"]
        parts += [f"dropped {group}" for group in self.dropped]
        parts += [f"{_CHANGE[group.fate]} {group}" for group in self.changed]
        return "; ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLimits:
    """What a row may be to be used."""

    prompt: int
    response: int
    over_long: OverLong
    need_response: bool

    def detail(self, fate: Fate) -> str:
        """The limit that a fate is about, in brackets, or ''."""
        tokens = {Fate.LONG_PROMPT: self.prompt, Fate.LONG_RESPONSE: self.response}.get(fate)
        return "" if tokens is None else f" (> {tokens:,} tokens)"


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedRow:
    """A row after template and tokenizer."""

    row: Row
    text: str
    ids: tuple[int, ...]
    """() where the user wrote nothing but white space."""
    response_ids: tuple[int, ...]
    """With the closing EOS; () where the row has no response."""


def prepare(
    rows: Sequence[Row],
    *,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    max_prompt_tokens: int,
    over_long: OverLong,
    max_response_tokens: int,
    eos_id: int,
    need_response: bool,
    name: str = "prompts",
) -> tuple[list[Prompt], PrepareReport]:
    """Rows as token ids, in the rows' order, and the report of what was dropped or cut.

    The response is tokenised apart from the prompt, so that no token spans the border, and closed
    with ``eos_id``; ``max_response_tokens`` counts that EOS. ``over_long`` decides about prompts:
    'error' raises, 'drop' drops, 'keep_right' keeps the last ``max_prompt_tokens`` ids, and ``text``
    is then what those ids spell. Over-long responses are never cut: with ``need_response`` they are
    an error ('error') or the row is dropped; without it the row stays and ``response_ids`` is ().
    Blank prompts are always dropped, blank or missing responses where ``need_response``.

    Raises ``DataError`` for what the policy forbids, for a template that does not fit, and where
    no row is left.
    """
    preparing = Preparing(
        tokenizer=tokenizer, template=template, max_prompt_tokens=max_prompt_tokens, over_long=over_long,
        max_response_tokens=max_response_tokens, eos_id=eos_id, need_response=need_response, name=name,
    )  # fmt: skip
    some = (rows[start : start + ENCODE_ROWS] for start in range(0, len(rows), ENCODE_ROWS))
    prompts = [prompt for each in some for prompt in preparing.take(each)]
    return prompts, preparing.report()


class Preparing:
    """``prepare`` for rows that come some at a time; what was dropped and cut is counted over all of them."""

    def __init__(
        self, *, tokenizer: PreTrainedTokenizerBase, template: Template, max_prompt_tokens: int, over_long: OverLong,
        max_response_tokens: int, eos_id: int, need_response: bool, name: str,
    ) -> None:  # fmt: skip
        self._tokenizer, self._template, self._eos_id, self._name = tokenizer, template, eos_id, name
        self._limits = RowLimits(
            prompt=max_prompt_tokens, response=max_response_tokens, over_long=over_long, need_response=need_response
        )
        self._dropped, self._changed, self._longest = Fates(), Fates(), dict[Fate, int]()
        self._rows = self._used = 0

    def take(self, rows: Sequence[Row]) -> Iterator[Prompt]:
        """The next rows as prompts, those that are dropped left out."""
        limits, longest = self._limits, self._longest
        for item in encoded(rows, self._tokenizer, self._template, self._eos_id):
            self._rows += 1
            prompt_fate = fate_of_prompt(item, limits)
            response_fate = fate_of_response(item, limits, ends=(self._eos_id,))
            for fate, size in ((prompt_fate, len(item.ids)), (response_fate, len(item.response_ids))):
                if fate is not None:
                    longest[fate] = max(longest.get(fate, 0), size)
            lost = _loss(prompt_fate, response_fate, limits)
            if lost is not None:
                self._dropped.add(lost, item.row.uid)
                continue
            for fate in (prompt_fate, response_fate):
                if fate is not None:
                    self._changed.add(fate, item.row.uid)
            self._used += 1
            yield as_prompt(item, self._tokenizer, cut_to=limits.prompt, keep_response=response_fate is None)

    def report(self) -> PrepareReport:
        """What became of all of them; ``DataError`` for what the policy forbids, and where no row is left."""
        report = PrepareReport(
            name=self._name,
            rows=self._rows,
            used=self._used,
            dropped=self._dropped.groups(self._limits.detail),
            changed=self._changed.groups(self._limits.detail),
        )
        enforce(report, self._limits, self._longest)
        return report


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, uids: Sequence[str]) -> list[tuple[int, ...]]:
    """Token ids of each text, with nothing added: no BOS, no EOS, no cut.

    Raises ``DataError`` that names the row where the tokenizer cannot read a text: one with a closed
    vocabulary and no token for unknown words refuses a word it does not know.
    """
    ids: list[tuple[int, ...]] = []
    for start in range(0, len(texts), ENCODE_ROWS):
        batch = list(texts[start : start + ENCODE_ROWS])
        try:
            ids += _ids_of(batch, tokenizer)
        # The tokenizers library raises bare Exception; and of a whole batch it does not say which text it was.
        except Exception as error:
            raise _unreadable(batch, uids[start:], tokenizer) from error
    return ids


def _ids_of(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, ...]]:
    if not tokenizer.is_fast:
        return map(tuple, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
    # Without the masks, types and offsets that transformers would build and nobody reads: a third of the time.
    core = tokenizer.backend_tokenizer
    core.no_truncation()  # as transformers does at each call; a tokenizer.json may ask for either
    core.no_padding()
    return (tuple(encoding.ids) for encoding in core.encode_batch_fast(texts, add_special_tokens=False))


def _unreadable(texts: Sequence[str], uids: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> DataError:
    for text, uid in zip(texts, uids, strict=False):
        try:
            tokenizer(text, add_special_tokens=False, verbose=False)
        except Exception as error:
            words = [word for word in text.split() if word not in tokenizer.get_vocab()]
            unknown = f" (not in its vocabulary: {listed([shown(word) for word in words])})" if words else ""
            return DataError(
                f"row {shown(uid)}: the tokenizer cannot read the text{unknown}: {error}\n"
                "  use a model whose vocabulary covers these prompts, or prompts made for this model"
            )
    raise AssertionError("a batch failed to encode and each of its texts alone did not")


class DataHash:
    """SHA-256 in hex over uid, ids and response ids of every row, in order: what a resumed run compares."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, row: Example) -> None:
        """The next row."""
        # JSON closes every list, so no two different sequences of rows give the same bytes.
        self._digest.update(json.dumps([row.uid, row.ids, row.response_ids]).encode() + b"\n")

    def __str__(self) -> str:
        return self._digest.hexdigest()


def data_hash(rows: Iterable[Example]) -> str:
    """The ``DataHash`` of all rows."""
    digest = DataHash()
    for row in rows:
        digest.add(row)
    return str(digest)


def encoded(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, template: Template, eos_id: int
) -> Iterator[EncodedRow]:
    """Each row with the ids of its prompt and, apart from those, of its first response."""
    texts = ["" if is_blank(row) else render(row, template=template, tokenizer=tokenizer) for row in rows]
    answers = [row.responses[0] if row.responses else "" for row in rows]
    uids = [row.uid for row in rows]
    for row, text, ids, answer_ids in zip(
        rows, texts, encode(texts, tokenizer, uids=uids), encode(answers, tokenizer, uids=uids), strict=True
    ):
        response_ids = (*answer_ids, eos_id) if row.responses else ()
        yield EncodedRow(row=row, text=text, ids=ids if text else (), response_ids=response_ids)


def fate_of_prompt(item: EncodedRow, limits: RowLimits) -> Fate | None:
    """Why the prompt cannot be read as it is, or None."""
    if not item.ids:
        return Fate.BLANK
    return Fate.LONG_PROMPT if len(item.ids) > limits.prompt else None


def fate_of_response(item: EncodedRow, limits: RowLimits, *, ends: Collection[int]) -> Fate | None:
    """Why the first response cannot be learnt from, or None. A missing one matters only where it is needed."""
    if not item.row.responses or not item.row.responses[0].strip():
        blank = Fate.BLANK_RESPONSE if item.row.responses else Fate.NO_RESPONSE
        return blank if limits.need_response else None
    if len(item.response_ids) > limits.response:
        return Fate.LONG_RESPONSE
    # Decoding ends at the first EOS, so no student could ever write what stands behind one.
    return Fate.EARLY_EOS if set(ends) & {*item.response_ids[:-1]} else None


def _loss(prompt_fate: Fate | None, response_fate: Fate | None, limits: RowLimits) -> Fate | None:
    """The fate for which the row is dropped, or None where it stays."""
    kept_right = prompt_fate is Fate.LONG_PROMPT and limits.over_long == "keep_right"
    if prompt_fate is not None and not kept_right:
        return prompt_fate
    return response_fate if limits.need_response else None


def as_prompt(item: EncodedRow, tokenizer: PreTrainedTokenizerBase, *, cut_to: int, keep_response: bool) -> Prompt:
    """The record that goes on; of a longer prompt the last ``cut_to`` ids, and the text that they spell."""
    ids, text = item.ids, item.text
    if len(ids) > cut_to:
        ids = ids[-cut_to:]
        text = str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
    return Prompt(
        uid=item.row.uid,
        text=text,
        ids=ids,
        responses=item.row.responses,
        response_ids=item.response_ids if keep_response else (),
        choices=item.row.choices,
        extra=item.row.extra,
    )


def enforce(report: PrepareReport, limits: RowLimits, longest: Mapping[Fate, int], *, what: str = "prompt") -> None:
    """Raise ``DataError`` for over-long rows under 'error', and where nothing is left."""
    for group in report.dropped if limits.over_long == "error" else ():
        setting = _SETTING.get(group.fate)
        if setting is not None:
            raise DataError(
                f"{report.name}: {group}\n  the longest has {longest[group.fate]:,} tokens; raise {setting}, "
                f"or choose {_CHOICE[group.fate]}"
            )
    require_used(report, what=what)


def require_used(report: PrepareReport, *, what: str) -> None:
    """Raise ``DataError`` where no row is left."""
    if not report.used:
        remedy = _REMEDY[report.dropped[0].fate] if report.dropped else _NO_ROWS
        raise DataError(f"{report}\n  no {what} is left; {remedy}")
