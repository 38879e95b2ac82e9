"""What a file of distilled pairs says of itself: which teacher and which student answered which prompts, and that it is
whole.

``FILE.jsonl.manifest.json`` stands beside ``FILE.jsonl`` and holds the SHA-256 of every byte of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from minillm.errors import ManifestError
from minillm.generated import Question, differences, manifest_of
from minillm.manifests import read_record, sha256_of
from minillm.settings import Count, Settings, Text, Whole

AGAIN = "make the pairs again (minillm pairs … --fresh)"


class PairCounts(Settings):
    """What became of the prompts."""

    asked: Count
    """Prompts that either model answered."""
    written: Whole
    """Pairs in the file."""
    unanswered: Whole
    """Prompts of which an answer was cut or empty, or that one of the two models does not read."""
    equal: Whole
    """Pairs of equal answers."""
    unread: Whole
    """Other pairs that no training would read: an answer that is over-long as it is read back, say."""


class PairManifest(Settings):
    """The record beside a file of distilled pairs."""

    format: Literal["minillm preference pairs 1"] = "minillm preference pairs 1"
    """Which form of record this is."""
    teacher: Text
    """How the teacher was called, whose answers are preferred."""
    student: Text
    """How the student was called."""
    chosen: Question
    """What the teacher was asked."""
    rejected: Question
    """What the student was asked: the same, drawn with other random numbers."""
    counts: PairCounts
    """What became of the prompts."""
    sha256: Text
    """Of the file."""
    versions: dict[str, str]
    """Packages that it was made with."""
    date: Text
    """Day on which it was made."""

    @property
    def teacher_weights(self) -> str:
        """Fingerprint of the teacher's weights."""
        return self.chosen.weights

    @property
    def tokenizer(self) -> str:
        """Of what the student's tokenizer reads: that of the ids that were measured."""
        return self.rejected.tokenizer

    @property
    def template(self) -> str:
        """How a row became a prompt."""
        return self.rejected.template


def read_pair_manifest(path: Path) -> PairManifest | None:
    """The manifest of a file of pairs, which is as it was written; None where none stands beside it.

    ``ManifestError`` where the manifest cannot be read, or is one of another file: that was edited, cut or mixed up.
    """
    found = pair_manifest_beside(path)
    if found is not None and (sha256 := sha256_of(path)) != found.sha256:
        raise ManifestError(
            f"{path} is not the file that its manifest was written with: SHA-256 {sha256[:12]}…, wanted "
            f"{found.sha256[:12]}….\n  it was edited, cut or mixed up; {AGAIN}"
        )
    return found


def pair_manifest_beside(path: Path) -> PairManifest | None:
    """What stands beside a file, be the file there or not; ``ManifestError`` where it cannot be read."""
    return read_record(manifest_of(path), PairManifest, fault=ManifestError, again=AGAIN)


def pair_differences(found: PairManifest, *, chosen: Question, rejected: Question) -> list[str]:
    """Names of what a manifest's questions differ in from others, such as 'teacher weights'."""
    both = {"teacher": (found.chosen, chosen), "student": (found.rejected, rejected)}
    return [f"{role} {name}" for role, (one, other) in both.items() for name in differences(one, other)]
