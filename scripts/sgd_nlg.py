"""Dialogue acts and the assistant's replies that say them, from Schema-Guided Dialogue: three files a run can read, and
a tokenizer for models from scratch.

    python scripts/sgd_nlg.py dstc8-schema-guided-dialogue --out data/sgd_nlg
    python scripts/sgd_nlg.py --from-jsonl train.jsonl.gz eval.jsonl.gz --out data/sgd_nlg

The first form reads the public repository (google-research-datasets/dstc8-schema-guided-dialogue, CC BY-SA 4.0): its
folders train and dev become training rows, its folder test the test. The second reads pairs that are prepared already:
rows of {instruction, input, output}, whose input is the acts and whose output is one reply or a list of them.

Out come train.jsonl (a reply a row), validation.jsonl and test.jsonl (a prompt a row, with all its replies). A prompt
is the acts alone: ``events: offer(date=March 13th); request(time)``. Which prompts are validated on is a function of
their text, not of their place, and no prompt is in two of the files. The folder ``tokenizer`` has 1,024 pieces of bytes
learnt from train.jsonl: a reply is 29 tokens long, a prompt 34.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minillm.byte_pieces import write_byte_pieces
from minillm.errors import DataError, MinillmError
from minillm.rows import counted, read_rows
from minillm.slots import acts_in
from minillm.store import write_jsonl

VALIDATION = 300
"""Prompts that are taken out of training."""
TEST = 400
"""Prompts of the public test folder that are kept, of those with several replies."""
MOST_REPLIES = 4
"""Replies to one prompt that are kept of the public training folders: 'anything else?' is said thousands of times."""
PIECES = 1024
"""Ids of the tokenizer, the end of text among them."""
SPLITS = {"train": "train", "dev": "train", "test": "test"}
FILES = "dialogues_*.json"


@dataclass
class Found:
    """Replies by prompt, both in the order in which they were met, and what was met."""

    train: dict[str, list[str]] = field(default_factory=dict)
    test: dict[str, list[str]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    """Sentences of the report with how often each is true."""

    def add(self, split: str, prompt: str, reply: str) -> None:
        """One pair, unless it is broken or was there before."""
        prompt, reply = prompt.strip(), reply.strip()
        replies = (self.train if split == "train" else self.test).setdefault(prompt, [])
        self.counts[f"{split}: pairs met"] += 1
        if not reply:
            self.counts[f"{split}: pairs dropped, the reply is blank"] += 1
        elif not acts_in(prompt):
            self.counts[f"{split}: pairs dropped, the prompt is not dialogue acts"] += 1
        elif reply in replies:
            self.counts[f"{split}: pairs dropped, met before"] += 1
        else:
            replies.append(reply)

    def settle(self) -> None:
        """Forgets prompts without a reply, and prompts of training that are tested on."""
        self.test = {prompt: replies for prompt, replies in self.test.items() if replies}
        tested = {prompt: replies for prompt, replies in self.train.items() if prompt in self.test}
        self.counts["train: pairs dropped, their prompt is in the test"] += sum(map(len, tested.values()))
        self.train = {prompt: of for prompt, of in self.train.items() if of and prompt not in tested}


def prepared(train: str, test: str) -> Found:
    """The pairs of two files of rows."""
    found = Found()
    for split, source in (("train", train), ("test", test)):
        for row in read_rows(source)[0]:
            found.counts[f"{split}: rows read"] += 1
            if not row.responses:
                found.counts[f"{split}: rows dropped, no reply"] += 1
            for reply in row.responses:
                found.add(split, row.input or row.prompt or "", reply)
    return found


def public(folder: Path) -> Found:
    """The pairs of the public repository: what the assistant's turns do, and how they say it."""
    missing = [name for name in SPLITS if not any((folder / name).glob(FILES))]
    if missing:
        raise DataError(
            f"{folder} has no {', '.join(f'{name}/{FILES}' for name in missing)}\n"
            "  wanted a copy of the repository google-research-datasets/dstc8-schema-guided-dialogue"
        )
    found = Found()
    for name, split in SPLITS.items():
        for file in sorted((folder / name).glob(FILES)):
            for turn in _system_turns(file):
                found.counts[f"{split}: turns of the assistant read"] += 1
                try:
                    fault, prompt = _acts(turn)
                    reply = str(turn["utterance"])
                except (KeyError, TypeError, AttributeError) as error:
                    raise _not_dialogues(file, f"a turn of the assistant lacks {error}") from error
                if fault:
                    found.counts[f"{split}: turns dropped, {fault}"] += 1
                else:
                    found.add(split, prompt, reply)
    found.train = {prompt: _fewest(replies, MOST_REPLIES) for prompt, replies in found.train.items()}
    several = [prompt for prompt, replies in found.test.items() if len(replies) > 1]
    found.test = {prompt: found.test[prompt] for prompt in _fewest(several, TEST)}
    return found


def _system_turns(file: Path) -> Iterator[dict[str, Any]]:
    try:
        dialogues = json.loads(file.read_text(encoding="utf-8"))
        for dialogue in dialogues:
            for turn in dialogue["turns"]:
                if turn["speaker"] == "SYSTEM":
                    yield turn
    except ValueError as error:
        raise _not_dialogues(file, f"not JSON: {error}") from error
    except (KeyError, TypeError) as error:
        raise _not_dialogues(file, f"wanted a list of dialogues with turns and speakers: {error}") from error


def _not_dialogues(file: Path, what: str) -> DataError:
    return DataError(f"{file}: {what}\n  wanted the files of the public repository as they are; fetch this one again")


def _acts(turn: dict[str, Any]) -> tuple[str, str]:
    """Why a turn cannot be used, or '', and its acts as a prompt."""
    if len(turn["frames"]) != 1:
        return "not of one service", ""
    (frame,) = turn["frames"]
    acts = [_act(action["act"], action["slot"], action["values"]) for action in frame["actions"]]
    if any("; " in act or "\n" in act for act in acts):
        return "a value holds the separator of acts", ""
    return "", f"{frame['service'].rpartition('_')[0].lower()}: {'; '.join(acts)}"


def _act(name: str, slot: str, values: list[str]) -> str:
    if not slot:
        return name.lower()
    return f"{name.lower()}({slot}{'=' if values else ''}{', '.join(values)})"


def _key(text: str) -> str:
    """A text's place in an order of its own."""
    return hashlib.sha256(f"sgd_nlg\0{text}".encode()).hexdigest()


def _fewest(texts: Iterable[str], most: int) -> list[str]:
    """The first few in that order, as they stood."""
    texts = list(texts)
    chosen = set(sorted(texts, key=_key)[:most])
    return [text for text in texts if text in chosen]


def _row(prompt: str, key: str, replies: list[str]) -> dict[str, Any]:
    return {
        "id": f"sgd-{_key(key)[:12]}", "topic": prompt.partition(":")[0], "prompt": prompt,
        **({"response": replies[0]} if len(replies) == 1 else {"responses": replies}),
    }  # fmt: skip


def write(found: Found, out: Path, *, validation: int) -> dict[str, list[dict[str, Any]]]:
    """The three files; their rows."""
    found.settle()
    if len(found.train) <= validation or not found.test:
        raise DataError(
            f"{counted(len(found.train), 'prompt')} to train on and {len(found.test):,} to test on are left\n"
            f"  wanted more than {validation} and at least one; validation takes {validation} out of training"
        )
    held = set(_fewest(found.train, validation))
    files = {
        "train": [
            _row(prompt, f"{prompt}\0{reply}", [reply])
            for prompt, replies in found.train.items() if prompt not in held for reply in replies
        ],
        "validation": [_row(prompt, prompt, replies) for prompt, replies in found.train.items() if prompt in held],
        "test": [_row(prompt, prompt, replies) for prompt, replies in found.test.items()],
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        write_jsonl(out / f"{name}.jsonl", rows)
    return files


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", nargs="?", help="folder of the public repository")
    parser.add_argument("--from-jsonl", nargs=2, metavar=("TRAIN", "EVAL"), help="two files of prepared pairs")
    parser.add_argument("--out", required=True, type=Path, help="folder for the files and the tokenizer")
    asked = parser.parse_args(arguments)
    if (asked.source is None) == (asked.from_jsonl is None):
        parser.error("name the folder of the public repository, or two files after --from-jsonl")
    try:
        found = prepared(*asked.from_jsonl) if asked.from_jsonl else public(Path(asked.source))
        files = write(found, asked.out, validation=VALIDATION)
        texts = (text for row in files["train"] for text in (row["prompt"], row["response"]))
        ids = write_byte_pieces(texts, asked.out / "tokenizer", pieces=PIECES)
    except MinillmError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"{error.filename}: {error.strerror}\n  name another folder or file", file=sys.stderr)
        return MinillmError.exit_code
    for sentence, count in sorted(found.counts.items()):
        print(f"{sentence}: {count:,}")
    for name, rows in files.items():
        replies = sum(len(row.get("responses", [""])) for row in rows)
        prompts = len({row["prompt"] for row in rows})
        print(f"{asked.out / name}.jsonl: {counted(len(rows), 'row')}, {prompts:,} prompts, {replies:,} replies")
    print(f"{asked.out / 'tokenizer'}: {ids:,} ids")
    return 0


if __name__ == "__main__":
    sys.exit(main())
