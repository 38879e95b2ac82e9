"""What every run looks at before it begins: the checks that need no weights and next to no time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from minillm.config import RunConfig
from minillm.doctor import data, folders, machine, tokens
from minillm.doctor.findings import Finding, in_a_line
from minillm.doctor.patient import Check, made, of_pair
from minillm.pairs import Pair
from minillm.preflight import AnySplit

# Not those of ``check_pair`` and of reading the rows, which have raised by then what is wrong.
CHECKS = (
    Check(id="end-tokens", run=tokens.end_tokens),
    Check(id="turn-end", run=tokens.turn_end),
    Check(id="begin-token", run=tokens.begin_token, needs=("rows",)),
    Check(id="stored-precision", run=folders.stored_precision),
    Check(id="precision", run=folders.precision),
    Check(id="threads", run=machine.threads),
    Check(id="shared-memory", run=machine.shared_memory),
    Check(id="disk", run=machine.disk),
    Check(id="open-files", run=machine.open_files),
)
COMPARED = 5_000
"""Rows of each split whose text is compared with that of others."""


def words_at_start(config: RunConfig, pair: Pair, splits: Mapping[str, AnySplit], *, ranks: int) -> Iterator[str]:
    """A line for each warning or error, and one that says where there is more; nothing where all is well."""
    patient = of_pair(config, pair, splits=splits, ranks=ranks)
    compared = Check(id="held-out", run=lambda whole: data.held_out_of(whole.splits, most=COMPARED))
    found = [finding for check in (*CHECKS, compared) for finding in made(check, patient) if _matters(finding)]
    yield from (f"doctor: {in_a_line(finding)}" for finding in found)
    if found:
        yield "doctor: minillm doctor --config with this run's file and settings says why"


def _matters(finding: Finding) -> bool:
    return finding.level in {"warning", "error"}
