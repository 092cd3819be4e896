"""Text to token ids and back: text never becomes a control token, and new tokens are decoded as they follow text."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer

if TYPE_CHECKING:  # readers of documents are imported without transformers
    from transformers import PreTrainedTokenizerBase

# A prefix that no text can guess (U+FDD0 is a noncharacter, which Unicode reserves for uses like this one).
_MARK = f"\ufdd0{secrets.token_hex(8)}"
_CONTEXT_TOKENS = 16  # tokens of a prompt that are decoded together with its continuation


def half_character(text: str) -> int | None:
    """Return the index of the first half of a surrogate pair, which JSON allows and tokenizers reject; else None."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def encode_plain_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a text, without control tokens.

    Text that spells a control token, such as ``<|end_of_text|>``, is encoded as the characters it consists of.
    No begin-of-text or end-of-text token is added.
    """
    return encode_plain_texts(tokenizer, [text])[0]


def encode_plain_texts(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[list[int]]:
    """Return :func:`encode_plain_text` of several texts."""
    texts = list(texts)
    control = _control_tokens(tokenizer)
    rows = _encode(tokenizer, texts)
    return [
        row if control.ids.isdisjoint(row) else control.plain.encode(text, add_special_tokens=False).ids
        for text, row in zip(texts, rows, strict=True)
    ]


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = False
) -> list[int]:
    """Return the token ids of messages in the tokenizer's chat template.

    Only the template writes control tokens: text in the messages that spells one is encoded as text.

    Raises ValueError where the template does not accept the messages, or exceeds its bounds.
    """
    return encode_rendered(tokenizer, [render_chat(tokenizer, messages, add_generation_prompt)])[0]


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = False
) -> str:
    """Return messages in the tokenizer's chat template, for :func:`encode_rendered`.

    In this text the spelling of a control token that comes from a message is replaced by a stand-in.
    """
    from calm.data.chat_templates import render

    return render(tokenizer, _escape_all(tokenizer, list(messages)), add_generation_prompt)


def escape_control_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Return a text for :func:`encode_rendered` that is encoded as :func:`encode_plain_text` encodes it."""
    control = _control_tokens(tokenizer)
    return control.pattern.sub(lambda match: control.stand_ins[match.group()], text)


def encode_rendered(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[list[int]]:
    """Return the token ids of texts of :func:`render_chat` and :func:`escape_control_tokens`."""
    texts = list(texts)
    return [
        row if _MARK not in text else _encode_with_stand_ins(_control_tokens(tokenizer), text)
        for text, row in zip(texts, _encode(tokenizer, texts), strict=True)
    ]


def _encode_with_stand_ins(control: _ControlTokens, text: str) -> list[int]:
    # Control tokens of the template get the names that they have in the plain tokenizer; those of users, their own.
    text = control.pattern.sub(lambda match: plain_name(match.group()), text)
    for name, stand_in in control.stand_ins.items():
        text = text.replace(stand_in, name)
    return list(control.plain.encode(text, add_special_tokens=False).ids)


def _escape_all(tokenizer: PreTrainedTokenizerBase, value: Any) -> Any:
    if isinstance(value, str):
        return escape_control_tokens(tokenizer, value)
    if isinstance(value, dict):
        return {key: _escape_all(tokenizer, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_escape_all(tokenizer, item) for item in value]
    return value


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    return [list(row) for row in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def plain_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return a copy of a tokenizer that gives the same ids, but whose control tokens cannot be spelled in a text.

    The copy has the control tokens under names that begin with a random prefix, see :func:`plain_name`. In this way
    they disappear from added tokens and from the vocabulary alike, for every type of tokenizer model.
    """
    return _control_tokens(tokenizer).plain


def plain_name(token: str) -> str:
    """Return the name of a control token in :func:`plain_tokenizer`."""
    return _MARK + token


class _ControlTokens:
    """The tokens of a tokenizer that are no text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        # Not the tokenizer itself: the cache keeps these as long as that.
        self.backend = tokenizer.backend_tokenizer
        tokens = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        names = sorted(tokens, key=len, reverse=True)  # a name may begin with another one
        self.ids = frozenset(tokens.values())
        self.pattern = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self.stand_ins = {name: f"{_MARK}{index:x}\ufdd1" for index, name in enumerate(names)}

    @cached_property
    def plain(self) -> Tokenizer:
        state = json.loads(self.backend.to_str())
        name = lambda token: plain_name(token) if token in self.stand_ins else token  # noqa: E731
        for token in state["added_tokens"]:
            token["content"] = name(token["content"])
        model = state["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {name(token): index for token, index in model["vocab"].items()}
        else:  # Unigram
            model["vocab"] = [[name(token), score] for token, score in model["vocab"]]
        if model.get("unk_token") is not None:
            model["unk_token"] = name(model["unk_token"])
        if "merges" in model:
            model["merges"] = [merge for merge in model["merges"] if self.stand_ins.keys().isdisjoint(_parts(merge))]
        state["post_processor"] = state["truncation"] = state["padding"] = None
        return Tokenizer.from_str(json.dumps(state))


def _parts(merge: str | list[str]) -> tuple[str, str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second, first + second


_known: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, _ControlTokens]] = WeakKeyDictionary()


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> _ControlTokens:
    size, control = _known.get(tokenizer, (-1, None))
    if control is None or size != len(tokenizer):  # tokens were added
        control = _ControlTokens(tokenizer)
        _known[tokenizer] = len(tokenizer), control
    return control


def decode_continuation(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> str:
    """Return the text of new tokens as it follows the text of a prompt, without control tokens.

    Tokenizers of the SentencePiece type drop the space before the first word of what they decode, so that new tokens
    cannot be decoded on their own.
    """
    return ContinuationDecoder(tokenizer, prompt_ids).add(new_ids, last=True)


class ContinuationDecoder:
    """Decode the new tokens of one sequence piece by piece, as they follow the text of a prompt.

    Args:
        tokenizer: tokenizer of the sequence.
        prompt_ids: token ids before the new ones. Empty where a text begins.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self._ids = list(prompt_ids)[-_CONTEXT_TOKENS:]
        # Tokens from `_start` on are decoded together: the text of a token may depend on the tokens before it.
        self._start, self._read = 0, len(self._ids)

    def add(self, ids: Sequence[int], last: bool = False) -> str:
        """Return the text that these ids complete.

        Args:
            ids: the next token ids.
            last: return also a character whose bytes are not all there.
        """
        self._ids += ids
        before = self._decode(self._ids[self._start : self._read])
        text = self._decode(self._ids[self._start :])
        if text.endswith("\ufffd") and not last:  # a character that is not whole
            return ""
        # A prompt may end in the middle of a character; then the texts agree up to that character.
        same = next((place for place, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), len(before))
        new = text[same:]
        if new:  # control tokens have no text, and are no context for the next token
            self._start = self._read
        self._read = len(self._ids)
        return new

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))
