"""What a user can get wrong, one type each.

Every message says what was got, what was wanted and how to mend it, and the command line prints it
without a traceback and ends with ``exit_code``. Our own mistakes are ``assert``s, not these.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

from minillm import exits

_OF_RUST = re.compile(r"\(os error (\d+)\)")
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)  # newline and tab stay


def visible(text: str) -> str:
    """The same text with control characters, marks of direction and halves of characters spelt out, ``\\x1b`` for one:
    names out of files stand in messages, and must not steer the terminal that shows them."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class MinillmError(Exception):
    """Root of the errors that a user can mend."""

    exit_code = exits.MENDABLE

    def __str__(self) -> str:
        return visible(super().__str__())


class ConfigError(MinillmError, ValueError):
    """A configuration, card or override is unknown, misspelt, of the wrong type or out of range."""


class DataError(MinillmError, ValueError):
    """A prompt file is missing, broken or holds nothing that can be used."""


class ManifestError(DataError):
    """Generated text has no manifest, a broken one, or one that was written with other text."""


class CacheError(DataError):
    """A teacher cache is broken, incomplete, or of another teacher, tokenizer, template or data than the run's."""


class CheckpointError(DataError):
    """A checkpoint is not as it was written, or there is none to resume from."""


class DiskError(MinillmError, OSError):
    """The disk refuses something in the middle of the work: it is full, read-only, broken or gone. Checkpoints and
    published students are as they were."""

    exit_code = exits.SAVE_FAILED


class SaveFailed(DiskError):
    """A checkpoint could not be written, on any rank; those before it are untouched."""


class ModelError(MinillmError, ValueError):
    """A model folder cannot be read safely, or its model cannot do what the run asks of it."""


class VocabularyMismatch(MinillmError, ValueError):
    """Teacher and student do not read the same token ids."""


class PositionsExceeded(ModelError):
    """Prompt and response together are longer than a model has positions."""


class UnsupportedCombination(ConfigError):
    """Two settings, each right by itself, cannot be used together."""


class ShapeMismatch(MinillmError, ValueError):
    """Two tensors that must agree in shape do not."""

    def __init__(self, what: str, got: tuple[int, ...] | None = None, wanted: tuple[int, ...] | None = None) -> None:
        # Alone, the text is the whole message: that is how an error is built again in another process.
        super().__init__(what if got is None else f"{what}: got shape {got}, wanted {wanted}")


class NonFinite(MinillmError, ArithmeticError):
    """A loss, a gradient or a teacher score is not a finite number; no update was made from it."""

    exit_code = exits.NON_FINITE

    def __init__(self, words: str, *, rows: Sequence[int] = (), batch: Any = None, batch_of: int | None = None) -> None:
        """``rows`` are those of a batch in which it was found; ``batch`` is what a person may want to look at, a
        ``state.State``; ``batch_of`` is the other rank that has one."""
        super().__init__(words)
        self.rows, self.batch, self.batch_of = tuple(rows), batch, batch_of


class Alarmed(MinillmError):
    """An alarm whose action is to stop the run has rung; the student of the last update is not handed on."""

    exit_code = exits.ALARMED


class Stopped(MinillmError):
    """A signal asked the run to stop, and all that is needed to go on is saved: the same command goes on."""

    exit_code = exits.STOPPED


class RankLost(MinillmError, RuntimeError):
    """Another rank has died, or did not come to a collective in time."""

    exit_code = exits.RANK_LOST


class TrackerError(MinillmError, RuntimeError):
    """A tracker that the run asks for is not installed or does not start."""


class RunExists(MinillmError, FileExistsError):
    """The run folder holds another run, and nothing in it was touched."""


class RunInUse(MinillmError, BlockingIOError):
    """Another process works in the run folder."""


def as_disk_error(error: BaseException, *, what: str = "") -> DiskError | None:
    """What the system refuses, in words for the user; None where the error is another one. ``what`` says what it was
    wanted for.

    Libraries that are written in Rust (safetensors, tokenizers) raise no ``OSError``: the system's number stands in
    their text.
    """
    of_rust = _OF_RUST.search(str(error))
    if isinstance(error, OSError):
        named, reason = error.filename, error.strerror or str(error)
    elif of_rust is not None:
        named, reason = None, os.strerror(int(of_rust[1]))
    else:
        return None
    where = ": ".join(str(one) for one in (what, named) if one)
    return DiskError(
        f"{f'{where}: ' if where else ''}{reason}\n"
        "  make room there, or mend what is named; what was saved or published before is untouched"
    )


def told_to_all(error: Exception) -> MinillmError:
    """What ranks raise, of which another one failed alone, so that none waits for it: its own error where the user can
    mend that, and otherwise that it is lost, since it tells its error itself."""
    if isinstance(error, MinillmError):
        return error
    refused = None if isinstance(error, ConnectionError) else as_disk_error(error)
    words = f"rank 0 failed ({type(error).__name__}: {error})".partition("\n")[0]
    return refused or RankLost(f"{words}\n  see what it said last")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'X'?"`` for the nearest known word, or ``""`` where none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
