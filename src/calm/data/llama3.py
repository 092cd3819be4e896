"""Llama 3's tokenizer from the file Meta distributes: ``tokenizer.model``, ranked byte pairs in tiktoken's format."""

import base64
import binascii
from pathlib import Path

from tokenizers import processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

BEGIN_TOKEN, END_TOKEN = "<|begin_of_text|>", "<|end_of_text|>"
_NUM_SPECIAL_TOKENS = 256


def llama3_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """Llama 3's tokenizer: 128000 byte pairs and 256 special tokens; text gets its begin token in front.

    Raises ValueError when the file is in another format.
    """
    tokenizer = _Converter(str(file), extra_special_tokens=_special_tokens()).converted()
    begin = tokenizer.token_to_id(BEGIN_TOKEN)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BEGIN_TOKEN} $A",
                pair=f"{BEGIN_TOKEN} $A {BEGIN_TOKEN}:1 $B:1",
                special_tokens=[(BEGIN_TOKEN, begin)],
            ),
        ]
    )
    return llama3_special_tokens(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def llama3_special_tokens(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Tell a tokenizer read from a bare file which of its tokens begin and end a text, if it has Llama 3's."""
    tokenizer.clean_up_tokenization_spaces = False
    vocabulary = tokenizer.get_added_vocab()
    if BEGIN_TOKEN in vocabulary and END_TOKEN in vocabulary:
        tokenizer.bos_token, tokenizer.eos_token = BEGIN_TOKEN, END_TOKEN
    return tokenizer


class _Converter(TikTokenConverter):
    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        """Byte pair -> rank. The file is two columns; reading it does not need the tiktoken package."""
        try:
            lines = [line.split() for line in Path(tiktoken_url).read_bytes().splitlines() if line]
            return {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        except (ValueError, binascii.Error) as error:
            raise ValueError(
                f"{tiktoken_url} is no tiktoken file (byte pairs in base64 with their ranks); SentencePiece models "
                "are not supported: use the tokenizer.json."
            ) from error


def _special_tokens() -> list[str]:
    """The special tokens in the order of their ids."""
    named = {4: "<|start_header_id|>", 5: "<|end_header_id|>", 7: "<|eot_id|>"}
    tokens, reserved = [BEGIN_TOKEN, END_TOKEN], 0
    for index in range(_NUM_SPECIAL_TOKENS - 2):
        if index in named:
            tokens.append(named[index])
        else:
            tokens.append(f"<|reserved_special_token_{reserved}|>")
            reserved += 1
    return tokens
