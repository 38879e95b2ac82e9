"""Pairs ready for a model: rows through a template and a tokenizer, with every drop counted. As ``prompts``, for two
responses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from minillm.pair_records import PairRow
from minillm.prompts import (
    ENCODE_ROWS,
    EncodedRow,
    Fate,
    Fates,
    PrepareReport,
    RowLimits,
    as_prompt,
    encode,
    encoded,
    enforce,
    fate_of_prompt,
    fate_of_response,
)
from minillm.templates import Template
from minillm.types import PreferencePair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PreparingPairs:
    """Makes pairs of rows that come some at a time.

    Prompt and responses are tokenised apart, so that no token spans a border, and each response is closed with the
    first of ``ends``. A prompt that is too long has the fate that ``limits.over_long`` says; a response is never cut:
    a pair with one that is too long is an error, or it is dropped. Dropped and counted in every case: pairs with a
    blank prompt or response, with an end token inside a response, with responses that are equal (as text or as ids),
    and under ``single_turn`` those of prompts with several turns.
    """

    def __init__(
        self, *, tokenizer: PreTrainedTokenizerBase, template: Template, limits: RowLimits, ends: Sequence[int],
        single_turn: bool, name: str,
    ) -> None:  # fmt: skip
        assert limits.need_response, "both responses are learnt from"
        self._tokenizer, self._template, self._limits, self._ends = tokenizer, template, limits, ends
        self._single_turn, self._name = single_turn, name
        self._dropped, self._changed, self._longest = Fates(), Fates(), dict[Fate, int]()
        self._rows = self._used = 0

    def take(self, rows: Sequence[PairRow], *, source: str = "") -> Iterator[PreferencePair]:
        """The next rows as pairs of a source, those that are dropped left out."""
        for start in range(0, len(rows), ENCODE_ROWS):
            yield from self._take(rows[start : start + ENCODE_ROWS], source)

    def _take(self, rows: Sequence[PairRow], source: str) -> Iterator[PreferencePair]:
        pairs = [pair.as_chat() if self._template == "chat" else pair for pair in rows]
        end, uids = self._ends[0], [pair.uid for pair in pairs]
        answered = [dataclasses.replace(pair.row, responses=(pair.chosen,)) for pair in pairs]
        rejected = encode([pair.rejected for pair in pairs], self._tokenizer, uids=uids)
        preferred = encoded(answered, self._tokenizer, self._template, end)
        for pair, item, rejected_ids in zip(pairs, preferred, rejected, strict=True):
            row = dataclasses.replace(item.row, responses=(pair.rejected,))
            other = dataclasses.replace(item, row=row, response_ids=(*rejected_ids, end))
            self._rows += 1
            prompt_fate = fate_of_prompt(item, self._limits)
            lost = self._lost(pair, item, other, prompt_fate)
            if lost is not None:
                self._dropped.add(lost, pair.uid)
                continue
            if prompt_fate is not None:
                self._changed.add(prompt_fate, pair.uid)
            self._used += 1
            prompt = as_prompt(item, self._tokenizer, cut_to=self._limits.prompt, keep_response=False)
            yield PreferencePair(
                prompt=dataclasses.replace(prompt, responses=()),
                chosen=pair.chosen,
                rejected=pair.rejected,
                chosen_ids=item.response_ids,
                rejected_ids=other.response_ids,
                source=source,
                teacher_logps=pair.teacher_logps,
            )

    def _lost(self, pair: PairRow, chosen: EncodedRow, rejected: EncodedRow, prompt_fate: Fate | None) -> Fate | None:
        """The fate for which a pair is dropped, or None where it stays."""
        if self._single_turn and not pair.single_turn:
            return Fate.SEVERAL_TURNS
        fates = [fate_of_response(side, self._limits, ends=self._ends) for side in (chosen, rejected)]
        sizes = (len(chosen.ids), len(chosen.response_ids), len(rejected.response_ids))
        for fate, size in zip((prompt_fate, *fates), sizes, strict=True):
            if fate is not None:
                self._longest[fate] = max(self._longest.get(fate, 0), size)
        if prompt_fate is not None and (prompt_fate is Fate.BLANK or self._limits.over_long != "keep_right"):
            return prompt_fate
        if pair.chosen == pair.rejected or chosen.response_ids == rejected.response_ids:
            return Fate.BLANK_RESPONSE if Fate.BLANK_RESPONSE in fates else Fate.EQUAL
        return fates[0] or fates[1]

    def report(self) -> PrepareReport:
        """What became of all of them; ``DataError`` for what the policy forbids, and where no pair is left."""
        detail = self._limits.detail
        report = PrepareReport(
            name=self._name, rows=self._rows, used=self._used, dropped=self._dropped.groups(detail),
            changed=self._changed.groups(detail), noun="pair",
        )  # fmt: skip
        enforce(report, self._limits, self._longest, what="pair")
        return report
