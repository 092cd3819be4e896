"""Byte-level BPE tokenizers: training, loading, and telling two of them apart."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from calm.data.llama3 import llama3_special_tokens, llama3_tokenizer

PAD_TOKEN = "<|pad|>"  # id 0, which also stands in for dropped tokens while an autoencoder trains
END_TOKEN = "<|end_of_text|>"  # id 1, between documents
MIN_VOCAB_SIZE = 258  # every byte and the two tokens above
RELEASED_PAD_TOKEN = "[PAD]"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
MAX_WORD_CHARACTERS = 1000  # of what a tokenizer is trained on
_RUNS, _LONG_SPACE = re.compile(r"\S++|\s++"), re.compile(rf"\s{{{MAX_WORD_CHARACTERS + 1}}}")
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
    tokenizer.train_from_iterator((part for text in texts for part in _without_long_words(text)), trainer)
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


def _without_long_words(text: str) -> Iterator[str]:
    """Yield a text, divided within runs of letters and signs, or of white space, of more than MAX_WORD_CHARACTERS.

    Time and memory of training grow with the square of the longest word.
    """
    start = 0
    if max(map(len, text.split()), default=0) > MAX_WORD_CHARACTERS or _LONG_SPACE.search(text):
        for run in _RUNS.finditer(text):
            for cut in range(run.start() + MAX_WORD_CHARACTERS, run.end(), MAX_WORD_CHARACTERS):
                yield text[start:cut]
                start = cut
    yield text[start:]


def has_tokenizer(path: str | os.PathLike) -> bool:
    """Whether a directory holds a tokenizer."""
    return any((Path(path) / name).is_file() for name in _TOKENIZER_FILES)


def load_tokenizer(path: str | os.PathLike) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a directory (a tokenizer's, a model's or prepared data's), a file or a hub id.

    A file is a ``tokenizer.json``, or a ``tokenizer.model`` of Llama 3 as Meta distributes it (see
    :mod:`calm.data.llama3`). A tokenizer without padding token gets ``[PAD]`` behind its last token, as the released
    models have it (128256 tokens and one).

    Raises ValueError when it is missing, or does not know an end-of-text token.
    """
    path = Path(path)
    if not path.exists() and not _HUB_ID.fullmatch(str(path)):
        raise ValueError(f"no tokenizer at {path}: there is no such file or directory.")
    if (path / "tokenizer").is_dir():
        path = path / "tokenizer"
    if path.is_dir() and not has_tokenizer(path):
        raise ValueError(
            f"no tokenizer in {path}: expected {' or '.join(_TOKENIZER_FILES)}; `calm tokenizer train` makes one, and "
            "commands that load a model take --tokenizer."
        )
    try:
        tokenizer = _load(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load a tokenizer from {path}: {str(error).splitlines()[0]}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer in {path} has no end-of-text token (eos_token): documents could not be told apart."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.add_special_tokens({"pad_token": RELEASED_PAD_TOKEN})
    tokenizer.padding_side = "left"  # prompts of a batch end together; generation needs that
    return tokenizer


def _load(path: Path) -> PreTrainedTokenizerBase:
    file = path if path.is_file() else path / "tokenizer.model"
    if path.is_dir() and (path / "tokenizer.json").is_file():
        # A model of the paper's code has a configuration that says no model_type, and AutoTokenizer asks for one.
        config = path / "config.json"
        known = not config.is_file() or "model_type" in json.loads(config.read_text(encoding="utf-8"))
        return (AutoTokenizer if known else PreTrainedTokenizerFast).from_pretrained(path)
    if file.is_file() and file.suffix == ".model":
        return llama3_tokenizer(file)
    if file.is_file():
        return llama3_special_tokens(PreTrainedTokenizerFast(tokenizer_file=str(file)))
    return AutoTokenizer.from_pretrained(path)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A fingerprint of how text becomes ids; settings such as padding or truncation do not change it."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = {name: state.get(name) for name in ("model", "added_tokens", "normalizer", "pre_tokenizer")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
