"""Byte-level BPE tokenizers: training, loading, and telling two of them apart."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from calm.data.llama3 import llama3_special_tokens, llama3_tokenizer
from calm.utils.files import write_json
from calm.utils.paths import did_you_mean, looks_local

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
    given, path = path, Path(path)
    # `Path` takes a leading ./ away, which tells a path from an id of the hub.
    if not path.exists() and (looks_local(given) or not _HUB_ID.fullmatch(str(path))):
        raise ValueError(f"no tokenizer at {path}: there is no such file or directory{did_you_mean(path)}")
    if (path / "tokenizer").is_dir():
        path = path / "tokenizer"
    if path.is_dir() and not has_tokenizer(path):
        raise ValueError(
            f"no tokenizer in {path}: expected {' or '.join(_TOKENIZER_FILES)}; `calm tokenizer train` makes one, and "
            "commands that load a model take --tokenizer."
        )
    check_regular_expressions(path if path.is_file() else path / "tokenizer.json")
    try:
        tokenizer = _load(path)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the tokenizers library raises Exception itself, and its panics are no Exception
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"the tokenizer in {path} needs code of its own to be loaded (auto_map in tokenizer_config.json), and "
                "calm runs no code of a checkpoint: take a tokenizer of a type that transformers has."
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot load a tokenizer from {path}: {reason:.300}") from error
    _check_ids(tokenizer, path)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer in {path} has no end-of-text token (eos_token): documents could not be told apart."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.add_special_tokens({"pad_token": RELEASED_PAD_TOKEN})
    tokenizer.padding_side = "left"  # prompts of a batch end together; generation needs that
    return tokenizer


def _check_ids(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Raise ValueError for a tokenizer that is not one of the tokenizers library, or that has gaps in its ids."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer in {path} has no tokenizer.json: save it with one (`tokenizer.save_pretrained`)."
        )
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= len(tokenizer):
        raise ValueError(
            f"the tokenizer in {path} is damaged: it has {len(tokenizer)} tokens, and one has the id {highest}, beyond "
            "that vocabulary."
        )


_PROBE = (
    "import sys; from tokenizers import Tokenizer; "
    "Tokenizer.from_file(sys.argv[1]).encode_batch(sys.stdin.read().splitlines(), add_special_tokens=False)"
)
_PROBE_SECONDS = 20
_REPEATED_GROUP = re.compile(r"\)[*+{]")


def check_regular_expressions(file: Path) -> None:
    """Raise ValueError for a tokenizer.json with a regular expression whose time grows without bound.

    Only an expression with a repeated group can do that, which tokenizers hardly have. Such a tokenizer is tried in a
    process of its own, because it cannot be stopped in this one.
    """
    try:
        text = file.read_text(encoding="utf-8") if file.suffix == ".json" else ""
        expressions = "".join(_regular_expressions(json.loads(text))) if _REPEATED_GROUP.search(text) else ""
    except (OSError, ValueError, RecursionError):
        return  # loading it says what is wrong
    if not _REPEATED_GROUP.search(expressions):
        return
    characters = sorted({*expressions, "a", " ", "0", "."})
    probe = "\n".join(f"{character * 40}!" for character in characters if character.isprintable())
    try:
        command = [sys.executable, "-c", _PROBE, str(file)]
        ended = subprocess.run(
            command, input=probe, text=True, encoding="utf-8", capture_output=True, timeout=_PROBE_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(
            f"the tokenizer in {file} has a regular expression that takes more than {_PROBE_SECONDS} seconds for a "
            "short text: it cannot be used."
        ) from error
    if ended.returncode != 0:
        reason = (ended.stderr.strip() or "no reason given").splitlines()[-1]
        raise ValueError(f"cannot load a tokenizer from {file}: it does not encode a short text ({reason:.200}).")


def _regular_expressions(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("Regex"), str):
            yield value["Regex"]
        for name, part in value.items():
            if name not in ("vocab", "merges"):
                yield from _regular_expressions(part)
    elif isinstance(value, list):
        for part in value:
            yield from _regular_expressions(part)


def _load(path: Path) -> PreTrainedTokenizerBase:
    file = path if path.is_file() else path / "tokenizer.model"
    if path.is_dir() and (path / "tokenizer.json").is_file():
        # A model of the paper's code has a configuration that says no model_type, and AutoTokenizer asks for one.
        config = path / "config.json"
        known = not config.is_file() or "model_type" in json.loads(config.read_text(encoding="utf-8"))
        return (AutoTokenizer if known else PreTrainedTokenizerFast).from_pretrained(path, trust_remote_code=False)
    if file.is_file() and file.suffix == ".model":
        return llama3_tokenizer(file)
    if file.is_file():
        return llama3_special_tokens(PreTrainedTokenizerFast(tokenizer_file=str(file)))
    return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def save_for_transformers_4(tokenizer: PreTrainedTokenizerBase, path: str | os.PathLike) -> None:
    """Save a tokenizer as the reference implementation's transformers (4.43) loads it.

    Transformers 5 names another class, keeps the chat template in a file of its own, and writes merges as pairs.

    Raises ValueError when a merge cannot be written as text with a space between its parts.
    """
    path = Path(path)
    tokenizer.save_pretrained(path)
    config = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.pop("backend", None)
    if (extra := config.pop("extra_special_tokens", None)) and isinstance(extra, list):
        config["additional_special_tokens"] = extra
    if isinstance(tokenizer.chat_template, dict):
        templates = tokenizer.chat_template.items()
        config["chat_template"] = [{"name": name, "template": template} for name, template in templates]
    elif tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    write_json(path / "tokenizer_config.json", config)
    state = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    merges = state["model"].get("merges")
    if merges and not isinstance(merges[0], str):
        if split := next((pair for pair in merges if any(" " in part for part in pair)), None):
            raise ValueError(
                f"this tokenizer cannot be written for the reference's transformers: its merge {split} has a space "
                "within a part. Convert without it, and give the reference the tokenizer it was trained with."
            )
        state["model"]["merges"] = [" ".join(pair) for pair in merges]
        (path / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False, indent=2), encoding="utf-8")


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A fingerprint of how text becomes ids; settings such as padding or truncation do not change it."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = {name: state.get(name) for name in ("model", "added_tokens", "normalizer", "pre_tokenizer")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
