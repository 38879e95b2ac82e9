"""The ``data`` section of a run: which sources its rows come from, and how they are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ValidationInfo, field_validator, model_validator

from minillm.errors import ConfigError, UnsupportedCombination, did_you_mean
from minillm.released import SCHEME, known_set
from minillm.row_sources import CORPUS_ENDINGS, FILE_ENDINGS, WORLD_SPLITS
from minillm.settings import Count, Flag, Settings, Text, Whole
from minillm.stage_base import is_component

LEAST_BLOCK = 2
"""Tokens of a block of a corpus: its first is not learnt."""
NOT_SETS = ("student", "stages", "tensorboard", "checkpoints", "bad-batches", "profile", "")
"""Folders of a run that no set may be called."""


class ChunksConfig(Settings):
    """How the pairs of ``data.preferences`` are cut into chunks, and which of them are the easy ones."""

    by: Text = "source"
    """'source' makes each source of data.preferences a chunk; any other word names a text field of the rows, and makes
    one of each of its values."""
    score: Literal["sum", "mean"] = "sum"
    """A chunk is the easier the more often the run's own student holds the chosen response for the likelier one: by the
    log-probability of whole responses, or of their mean token. The paper does not say which."""


class DataConfig(Settings):
    """Where rows come from and how they are read.

    A source is 'world:SPLIT', a .jsonl, .jsonl.gz or .parquet file, several of one kind (a folder, or a pattern such as
    'data/train-*.parquet'), 'hub:NAME@SPLIT', or 'set:NAME' for a set that MiniLLM was evaluated on; a corpus may be
    .txt files.
    """

    train: Text | None = None
    """Rows to train on; every stage needs them but seqkd."""
    teacher_text: Text | None = None
    """Responses that the teacher wrote, as 'minillm generate' left them with their manifest: what seqkd stages learn
    from."""
    validation: Text | None = None
    """Rows for choosing the best step; needed where a stage has validate_every above 0."""
    test: Text | dict[str, Text] | None = None
    """Rows for the final evaluation only: a source, or several by the names of their results, each evaluated by
    itself."""
    preferences: Text | dict[str, Text] | None = None
    """Pairs of a preferred and another response to a prompt: what stages that learn from preferences read. A source, or
    several by their names; of a folder or pattern each file is one, by its name. 'minillm pairs' makes such a file."""
    preferences_validation: Text | None = None
    """Pairs that are held out, for measuring such stages: one source."""
    chunks: ChunksConfig | None = None
    """Cuts the preferences into chunks from easy to hard, for stages with a ``chunk``; one whole where not given."""
    single_turn: Flag = False
    """Keep only pairs whose prompt is a single turn of the user; all others are counted as dropped."""
    corpus: Text | None = None
    """What the language-model loss of minillm stages learns from: rows with a 'text', plain text (blank lines part
    documents), or prompts with responses. The responses of train where not given."""
    corpus_length: Count | None = None
    """Tokens of the blocks that the corpus's text is cut into, from 2; 512 where not given, or the models' positions if
    they have fewer. 512 is official."""
    template: Literal["plain", "alpaca", "chat"] = "plain"
    """How a row becomes a prompt: its text as it is, the Alpaca frame, or the tokenizer's chat template."""
    max_prompt_tokens: Count
    """Longest prompt in tokens, template included."""
    over_long: Literal["error", "drop", "keep_right"] = "error"
    """What happens to longer ones: stop, leave the row out, or keep the prompt's last tokens; counted and printed."""
    broken: Literal["error", "skip"] = "error"
    """What happens to rows that cannot be read: stop, or leave them out; counted and printed."""
    max_broken: Whole = 0
    """Most rows that 'broken: skip' may leave out."""
    checker: Literal["slots"] | None = None
    """What else responses to validation and test prompts are checked for: 'slots' measures the coverage of the values
    in a prompt's dialogue acts. The embedded world's own checker needs no setting."""
    cache: Text | None = None
    """Folder where the prompts and tokens of large sources (over 10,000 rows or 16 MiB) are kept once they are made
    ready; $HF_HOME/minillm, $XDG_CACHE_HOME/minillm or ~/.cache/minillm where not given. It may be removed at any
    time."""
    train_limit: Count | None = None
    """Use the first N rows of the training split; all where not given."""
    train_responses: Count | None = None
    """Use the responses of the first N rows of train; all others are prompts alone. All have theirs where not given."""
    preferences_limit: Count | None = None
    """Use the first N pairs of the preferences, or of each of their sources; all where not given."""
    validation_limit: Count | None = None
    """Use the first N rows of the validation split; all where not given."""
    test_limit: Count | None = None
    """Use the first N rows of the test split, or of each of its sets; all where not given."""

    @property
    def test_sets(self) -> dict[str, str]:
        """The sources of ``test`` by name; a single source has the name ''."""
        if self.test is None:
            return {}
        return dict(self.test) if isinstance(self.test, dict) else {"": self.test}

    @property
    def preference_sources(self) -> dict[str, str]:
        """The sources of ``preferences`` by name; a single source has the name ''."""
        if self.preferences is None:
            return {}
        return dict(self.preferences) if isinstance(self.preferences, dict) else {"": self.preferences}

    def unjudged(self, metric: str) -> str:
        """Why validation rows cannot be judged by a measure that wants a checker, and a cure; "" where they can."""
        if metric == "validity" and not (self.validation or "world:").startswith("world:"):
            return (
                "'validity', which only the embedded world can judge, "
                f"but data.validation is {self.validation!r}; set data.validation: world:validation"
            )
        if metric == "coverage" and self.checker is None:
            return "'coverage', which nothing checks, for data.checker is not set; set data.checker: slots"
        return ""

    @field_validator("teacher_text")
    @classmethod
    def _generated(cls, source: str | None) -> str | None:
        if source is not None and not source.endswith(".jsonl"):
            raise ConfigError(f"got {source!r}, wanted a .jsonl file that 'minillm generate' wrote")
        return source

    @field_validator("test", "preferences", mode="before")
    @classmethod
    def _known_sets(cls, value: Any, info: ValidationInfo) -> Any:
        """Checks what a union of types would tell badly."""
        if value is None or (isinstance(value, str) and value):
            if value is not None:
                _check_source(value, FILE_ENDINGS)
            return value
        if not isinstance(value, dict):
            raise ConfigError(f"got {value!r}, wanted a source, or a mapping of names to sources")
        what = "set" if info.field_name == "test" else "source"
        if what == "set":
            _check_set_names(list(value))
        else:
            _check_source_names(list(value))
        for name, source in value.items():
            if not isinstance(source, str):
                raise ConfigError(f"{what} {name!r}: got {source!r}, wanted a source")
            try:
                _check_source(source, FILE_ENDINGS)
            except ConfigError as error:
                raise ConfigError(f"{what} {name!r}: {error}") from None
        return value

    @field_validator("train", "validation", "preferences_validation")
    @classmethod
    def _known_source(cls, source: str | None) -> str | None:
        if source is not None:
            _check_source(source, FILE_ENDINGS)
        return source

    @field_validator("corpus")
    @classmethod
    def _known_corpus(cls, source: str | None) -> str | None:
        if source is not None:
            _check_source(source, CORPUS_ENDINGS)
        return source

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.broken == "skip") != (self.max_broken > 0):
            raise UnsupportedCombination(
                f"broken '{self.broken}' with max_broken {self.max_broken}: "
                "give 'broken: skip' and the most rows it may leave out, or neither"
            )
        if self.single_turn and self.preferences is None and self.preferences_validation is None:
            raise UnsupportedCombination(
                "single_turn without preferences: no pair is read; add preferences or preferences_validation, or leave "
                "it out"
            )
        if self.chunks is not None and self.preferences is None:
            raise UnsupportedCombination("chunks without preferences: nothing is cut; add preferences, or leave it out")
        if self.corpus_length is not None and self.corpus is None:
            raise UnsupportedCombination(
                f"corpus_length {self.corpus_length} without a corpus: nothing is cut; add corpus, or leave it out"
            )
        if self.corpus_length is not None and self.corpus_length < LEAST_BLOCK:
            raise ConfigError(
                f"corpus_length {self.corpus_length}: wanted at least {LEAST_BLOCK}, since the first token "
                "of a block is not learnt"
            )
        return self


def _check_source(source: str, endings: tuple[str, ...]) -> None:
    scheme, _, rest = source.partition(":")
    if scheme == "world":
        if rest not in WORLD_SPLITS:
            raise ConfigError(
                f"got {source!r}, wanted world: and one of {', '.join(WORLD_SPLITS)}{did_you_mean(rest, WORLD_SPLITS)}"
            )
    elif scheme == SCHEME:
        known_set(rest)
    elif scheme == "hub":
        name, at, split = rest.rpartition("@")
        if not (name and at and split):
            raise ConfigError(
                f"got {source!r}, wanted 'hub:NAME@SPLIT' such as 'hub:databricks/databricks-dolly-15k@train'"
            )
    elif not source.endswith((*endings, "/")) and not Path(source).expanduser().is_dir():
        raise ConfigError(
            f"got {source!r}, wanted 'world:SPLIT', 'hub:NAME@SPLIT', 'set:NAME', a file ending in "
            f"{', '.join(endings)} (or a pattern of such), or a folder of them"
        )


def _check_source_names(names: Sequence[Any]) -> None:
    """Raise unless each can stand before the ids of its rows."""
    if not names:
        raise ConfigError("got no source, wanted a source, or a mapping of names to sources")
    for name in names:
        if not isinstance(name, str) or not is_component(name):
            raise ConfigError(f"source {name!r}: wanted a name of letters, digits, '.', '_' and '-'")


def _check_set_names(names: Sequence[Any]) -> None:
    """Raise unless each can be a folder of its own beside what a run leaves."""
    if not names:
        raise ConfigError("got no set, wanted a source, or a mapping of names to sources")
    for place, name in enumerate(names):
        if not isinstance(name, str) or not is_component(name) or name in NOT_SETS or "." in name:
            raise ConfigError(
                f"set {name!r}: a set is a folder of results; wanted letters, digits, '_' and '-', and none of "
                f"{', '.join(filter(None, NOT_SETS))}"
            )
        # Some file systems take Dolly and dolly for one folder.
        if name.lower() in [str(earlier).lower() for earlier in names[:place]]:
            raise ConfigError(f"set {name!r}: another set has this name; give each a name of its own")
