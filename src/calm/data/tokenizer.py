"""Byte-level BPE tokenizers: training, loading, and telling two of them apart."""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD_TOKEN = "<|pad|>"  # id 0, which also stands in for dropped tokens while an autoencoder trains
END_TOKEN = "<|end_of_text|>"  # id 1, between documents
MIN_VOCAB_SIZE = 258  # every byte and the two tokens above
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def train_tokenizer(texts: Iterable[str], vocab_size: int, progress: bool = False) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with an end-of-text and a padding token.

    Any text can be encoded: every byte has a token. Raises ValueError when the text is too little for a vocabulary of
    this size.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size must be at least {MIN_VOCAB_SIZE} (256 bytes, 2 special tokens), got {vocab_size}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD_TOKEN, END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise ValueError(
            f"the text gives only {tokenizer.get_vocab_size()} tokens, not the {vocab_size} of vocab_size: add text or "
            "ask for fewer."
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        padding_side="left",  # prompts of a batch end together; generation needs that
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(path: str | os.PathLike) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a directory (a tokenizer's, a model's or prepared data's) or a hub id.

    Raises ValueError when it is missing, or does not know an end-of-text token.
    """
    path = Path(path)
    if not path.exists() and not _HUB_ID.fullmatch(str(path)):
        raise ValueError(f"no tokenizer at {path}: there is no such directory.")
    if path.is_dir() and (path / "tokenizer").is_dir():
        path = path / "tokenizer"
    if path.is_dir() and not any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        raise ValueError(f"no tokenizer in {path}: expected tokenizer.json; `calm tokenizer train` makes one.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load a tokenizer from {path}: {str(error).splitlines()[0]}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer in {path} has no end-of-text token (eos_token): documents could not be told apart."
        )
    return tokenizer


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A fingerprint of how text becomes ids; settings such as padding or truncation do not change it."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = {name: state.get(name) for name in ("model", "added_tokens", "normalizer", "pre_tokenizer")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
