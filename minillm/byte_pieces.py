"""A tokenizer for models from scratch: byte pairs learnt from the text that they are to read and write."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

END = "<|endoftext|>"
"""Ends a text; an id of its own."""


def write_byte_pieces(texts: Iterable[str], out: Path, *, pieces: int) -> int:
    """Learns byte pairs from texts and writes the tokenizer as a folder that ``AutoTokenizer`` reads; how many ids it
    has, at most ``pieces``. No text is outside them, and nothing is added to a text."""
    # Late: both are slow to import.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=pieces, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, clean_up_tokenization_spaces=False
    ).save_pretrained(out)
    return int(tokenizer.get_vocab_size())
