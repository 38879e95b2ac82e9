"""Whether teacher and student read the same token ids, checked id by id before anything is trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from minillm.errors import ModelError, VocabularyMismatch

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

SHOWN = 3
"""How many differing ids a message lists."""
PROBES = (
    "The quick brown fox, it's 12,345.67!",
    "MiXeD CaSe ÀÉÎÕÜ straße",
    "  two  spaces\tand a tab\n\na blank line \r\n",
    "caf\u00e9 cafe\u0301 \ufb01 \uff21\uff22 \u2460",  # composed, decomposed, ligature, full width, circled
    "def f(x):\n    return x**2  # 3 != 4",
    "漢字 かな 한국어 العربية עברית हिन्दी",
    "🙂👩‍👩‍👧 ½ € — “quotes” … \u00a0\u200b",
    "0 00 000 1234567890",
)
"""Texts on which normalisers and pre-tokenisers are known to part ways: case, spaces, accents, digits, scripts."""
CONVERSATIONS = (
    (("user", "Hello, it's 5."),),
    (("user", " Hello "), ("assistant", "Hi!\n"), ("user", "And now?")),
    (("system", "Be brief."), ("user", "Hello")),
)
"""(role, content) of turns that show how a chat template wraps them."""
OWN_WORDS = 200
"""How many of the vocabulary's own tokens make up one more probe."""
_BRACKETS = set("<>[]|")
"""In which special tokens are written."""
_REMEDY = "both models must read the same ids: load the student with the teacher's tokenizer, or pick another pair"


def agree(teacher_tokenizer: PreTrainedTokenizerBase, student_tokenizer: PreTrainedTokenizerBase) -> int:
    """How many real token ids teacher and student share: all of them, 0 .. n-1.

    Compares the token of every id, the special tokens, and the ids of a set of probe texts (two equal
    vocabularies can still split text differently). Equal sizes prove nothing, so sizes are not what is compared.

    Raises ``VocabularyMismatch`` with the number of differing ids and the first few of them.
    """
    pair = _pair(teacher_tokenizer, student_tokenizer)
    teacher_tokens, student_tokens = _tokens(teacher_tokenizer), _tokens(student_tokenizer)
    differing = [
        token_id
        for token_id in sorted(teacher_tokens.keys() | student_tokens.keys())
        if teacher_tokens.get(token_id) != student_tokens.get(token_id)
    ]
    count = max((*teacher_tokens, *student_tokens), default=-1) + 1
    if differing:
        lines = [
            f"id {token_id} is {_token(teacher_tokens.get(token_id))} for the teacher "
            f"and {_token(student_tokens.get(token_id))} for the student"
            for token_id in differing[:SHOWN]
        ]
        more = [f"and {len(differing) - SHOWN:,} more"] if len(differing) > SHOWN else []
        raise _mismatch(f"{pair} disagree on {len(differing):,} of {count:,} token ids", [*lines, *more])
    _agree_on_specials(pair, teacher_tokenizer, student_tokenizer)
    _agree_on_probes(pair, teacher_tokenizer, student_tokenizer)
    return count


def agree_on_chat(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    """Raise ``VocabularyMismatch`` where the two wrap a conversation in other text.

    Prompts are wrapped by the student's template, and the teacher would be asked in a form that it was not made for. A
    tokenizer without a template says nothing.
    """
    for turns in CONVERSATIONS:
        texts = [_chat(tokenizer, turns) for tokenizer in (teacher, student)]
        if None not in texts and texts[0] != texts[1]:
            lines = [f"{whose}: {_short(str(text))}" for whose, text in zip(("teacher", "student"), texts, strict=True)]
            head = f"{_pair(teacher, student)} have other chat templates"
            raise VocabularyMismatch(
                "\n  ".join([f"{head}.", *lines, "set data.template: plain or alpaca, or give both the same template"])
            )


def _chat(tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]]) -> str | None:
    """A conversation in the tokenizer's own template; None where it has none, or refuses these turns."""
    if not tokenizer.chat_template:
        return None
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception:  # a program of the model's folder, see templates.render
        return None


def identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what ``agree`` compares: tokenizers that agree have the same, in whatever files they stand.

    The pad is left out, which one of two that agree may lack.
    """
    tokens = _tokens(tokenizer)
    ends = (tokenizer.eos_token_id, tokenizer.bos_token_id)
    # Nothing in brackets: that may be the pad of one, and plain text for the other.
    own = [token for _, token in sorted(tokens.items()) if not _BRACKETS & set(token)][:OWN_WORDS]
    read = [_probe(tokenizer, text) for text in (*PROBES, " ".join(own))]
    return hashlib.sha256(json.dumps([sorted(tokens.items()), ends, read]).encode()).hexdigest()


def real_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id of a tokenizer: how many rows of a head mean something.

    Not ``len(tokenizer)``, which is smaller where ids have gaps; an id in a gap has a row and stays in the softmax.
    """
    return max(_tokens(tokenizer), default=-1) + 1


def check_heads(*, real_ids: int, teacher_rows: int, student_rows: int) -> None:
    """Raise ``VocabularyMismatch`` where a head has fewer rows than there are real ids.

    More rows are padding: they are masked on both sides and the rest renormalised, so they are no fault.
    """
    for whose, rows in (("teacher", teacher_rows), ("student", student_rows)):
        if rows < real_ids:
            raise VocabularyMismatch(
                f"the {whose}'s head has {rows:,} rows and its tokenizer {real_ids:,} ids: "
                f"ids {rows} to {real_ids - 1} have no row\n"
                f"  the tokenizer got tokens that the {whose} was never given; use the tokenizer it was trained with, "
                f"or resize the {whose} (resize_token_embeddings), train it again and save both together"
            )


def eos_ids(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None) -> tuple[int, ...]:
    """Ids that end a response, the tokenizer's own first, then those of the generation config, each once.

    Raises ``ModelError`` where there is none, or where one is no number or no id of the tokenizer.
    """
    configured = None if generation_config is None else generation_config.eos_token_id
    listed = list(configured) if isinstance(configured, Sequence) else [configured]
    given = [item for item in (tokenizer.eos_token_id, *listed) if item is not None]
    name = repr(tokenizer.name_or_path or "without a name")
    if strange := [type(item).__name__ for item in given if type(item) is not int]:
        raise ModelError(
            f"an end-of-text id of tokenizer {name} is a {strange[0]}, wanted a whole number\n"
            "  mend eos_token_id in generation_config.json"
        )
    found = tuple(dict.fromkeys(given))
    if not found:
        raise ModelError(
            f"tokenizer {name} has no end-of-text token and the generation config names none: no response would end\n"
            "  set eos_token in tokenizer_config.json, or eos_token_id in generation_config.json"
        )
    known = _tokens(tokenizer)
    for item in found:
        if item not in known:
            raise ModelError(
                f"end-of-text id {item} is none of the {len(known):,} ids of tokenizer {name}\n"
                "  mend eos_token_id in generation_config.json, or use the tokenizer the model was trained with"
            )
    return found


def _tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {token_id: token for token, token_id in tokenizer.get_vocab().items()}


def _token(token: str | None) -> str:
    return "missing" if token is None else repr(token)


def _pair(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> str:
    names = [f" {tokenizer.name_or_path}" if tokenizer.name_or_path else "" for tokenizer in (teacher, student)]
    return f"teacher{names[0]} and student{names[1]}"


def _mismatch(head: str, lines: Sequence[str]) -> VocabularyMismatch:
    return VocabularyMismatch("\n  ".join([f"{head}.", *lines, _REMEDY]))


def _agree_on_specials(pair: str, teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    kinds = [
        ("end-of-text", teacher.eos_token_id, student.eos_token_id),
        ("begin", teacher.bos_token_id, student.bos_token_id),
    ]
    # A pad is only filling, and many tokenizers have none; two different ones are still a sign of two tokenizers.
    if teacher.pad_token_id is not None and student.pad_token_id is not None:
        kinds.append(("pad", teacher.pad_token_id, student.pad_token_id))
    lines = [
        f"the {kind} token is {_special(teacher, left)} for the teacher and {_special(student, right)} for the student"
        for kind, left, right in kinds
        if left != right
    ]
    if lines:
        raise _mismatch(f"{pair} have the same token ids but other special tokens", lines)


def _special(tokenizer: PreTrainedTokenizerBase, token_id: int | None) -> str:
    return "missing" if token_id is None else f"{tokenizer.convert_ids_to_tokens(token_id)!r} (id {token_id})"


def _agree_on_probes(pair: str, teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    for probe in (*PROBES, _own_words(teacher, student)):
        teacher_ids, student_ids = _probe(teacher, probe), _probe(student, probe)
        if teacher_ids is None and student_ids is None:
            continue
        if teacher_ids is None or student_ids is None:
            whose, other = ("teacher", "student") if teacher_ids is None else ("student", "teacher")
            line = f"the {whose}'s tokenizer cannot read {_short(probe)}, the {other}'s can"
            raise _mismatch(f"{pair} have the same token ids but split text differently", [line])
        if teacher_ids != student_ids:
            first = _first_difference(teacher_ids, student_ids)
            around = slice(first, first + 8)
            lines = [
                f"{_short(probe)} differs from token {first} on (counted from 0):",
                f"  teacher {teacher.convert_ids_to_tokens(teacher_ids[around])}",
                f"  student {student.convert_ids_to_tokens(student_ids[around])}",
            ]
            raise _mismatch(f"{pair} have the same token ids but split text differently", lines)


def _own_words(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> str:
    """A text of the vocabulary's first own tokens: what even a closed vocabulary can read."""
    # Without special tokens: those are compared by name, and one side may rightly lack a pad.
    special = {*teacher.all_special_tokens, *student.all_special_tokens}
    words = [token for _, token in sorted(_tokens(teacher).items()) if token not in special]
    return " ".join(words[:OWN_WORDS])


def _short(probe: str) -> str:
    return repr(probe if len(probe) <= 60 else probe[:59] + "…")


def _probe(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int] | None:
    """Ids of the text, or None where the tokenizer refuses it."""
    try:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    # The tokenizers library raises bare Exception for a word outside a vocabulary without an unknown token.
    except Exception:
        return None


def _first_difference(left: Sequence[int], right: Sequence[int]) -> int:
    pairs = zip(left, right, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(left), len(right)))
