"""Answers on disk while more are being drawn: FILE.jsonl.partial, a header with the question and a line an answer."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minillm.errors import ConfigError, DataError
from minillm.generated import Question, differences
from minillm.manifests import parsed
from minillm.store import write_text
from minillm.types import Stop

Cell = tuple[int, int]
"""Place of a prompt in its split, and which of its samples."""
_FORMAT = "minillm partial answers 1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One response."""

    cell: Cell
    text: str
    """Decoded without special tokens, white space at its ends kept."""
    stop: str
    """Why it ended: a value of ``types.Stop``."""
    tokens: int
    """Ids that were drawn, the end token left out."""
    respelt: bool
    """Whether the tokenizer reads the text as other ids than were drawn."""

    @property
    def bare(self) -> bool:
        """Whether it ended by itself and there is nothing to read."""
        return self.stop != Stop.LENGTH and not self.text.strip()


class Parts:
    """The answers so far. Only rank 0 writes; the others hold the same object and their calls do nothing."""

    def __init__(self, out: Path, *, writes: bool) -> None:
        self.path = out.with_name(f"{out.name}.partial")
        self._writes = writes
        self._whole = 0
        """Bytes up to the last whole line; a killed process may leave half a line behind them."""

    def read(self, asked: Question) -> dict[Cell, Answer]:
        """What an earlier call left, {} where there was none; ``DataError`` where it was asked something else."""
        if not self.path.is_file():
            return {}
        lines = self.path.read_bytes().split(b"\n")[:-1]
        self._whole = sum(len(line) + 1 for line in lines)
        remedy = "nothing was touched.\n  give another --out, or --fresh to start over"
        try:
            header, *records = [parsed(line) for line in lines]
            if header["format"] != _FORMAT:
                raise KeyError("format")
            before = Question(**header["asked"])
            answers = [_answer(record) for record in records]
        except (ValueError, KeyError, TypeError, ConfigError) as error:
            raise DataError(f"{self.path}: not the answers of an interrupted 'minillm generate'; {remedy}") from error
        if differs := differences(before, asked):
            raise DataError(
                f"{self.path} holds answers to another question (it differs in: {', '.join(differs)}); {remedy}"
            )
        return {answer.cell: answer for answer in answers}

    def open(self, asked: Question, *, keep: bool) -> None:
        """Makes the file ready for more answers, with those that were read (``keep``) or without."""
        if not self._writes:
            return
        if keep:
            os.truncate(self.path, self._whole)
            return
        header = {"format": _FORMAT, "asked": asked.model_dump(mode="json")}
        write_text(self.path, json.dumps(header) + "\n")

    def append(self, answers: Sequence[Answer]) -> None:
        """Brings these answers to the disk."""
        if self._writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(answer)) + "\n" for answer in answers)
                file.flush()
                os.fsync(file.fileno())

    def remove(self) -> None:
        """Called once the answers stand in the file itself."""
        if self._writes:
            self.path.unlink(missing_ok=True)


def _answer(record: dict[str, Any]) -> Answer:
    place, sample = record.pop("cell")
    return Answer(cell=(int(place), int(sample)), **record)
