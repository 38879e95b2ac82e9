"""One id for each word of the world."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from minillm.world.checker import BOS, SEP
from minillm.world.phrases import vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"
SPECIAL_TOKENS = (PAD, BOS, SEP, EOS)
"""The first ids, in this order."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The world's word-level tokenizer: words between single spaces, both ways.

    It adds no special tokens of its own (prompts carry theirs as words), and there is no unknown token: text
    from outside the world raises instead of turning into something else. ``save_pretrained`` writes a folder that
    ``AutoTokenizer`` reads.
    """
    # Late, because the grammar and the checker are of use without it, and it is slow to import.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *vocabulary()))}
    # The unknown token is no word of the vocabulary, which is how an unknown word comes to raise.
    tokenizer = Tokenizer(models.WordLevel(vocab=ids, unk_token="<no unknown words>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # Of the stock decoders the one that only joins with spaces; no word of the world begins with its prefix.
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    make: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast  # its constructor is not annotated
    return make(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        sep_token=SEP,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
