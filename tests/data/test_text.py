import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from calm.data.text import ContinuationDecoder, decode_continuation, encode_chat, encode_plain_text
from calm.data.tokenizer import END_TOKEN, train_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|pad|>{{ m['role'] }}: {{ m['content'] | trim }}<|end_of_text|>{% endfor %}"
    "{% if add_generation_prompt %}<|pad|>assistant: {% endif %}"
)
TEXT = "the token <|end_of_text|>, written <|pad|> or </s>; the end"


def byte_level():
    tokenizer = train_tokenizer([TEXT] * 3, 280)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def metaspace(model, trainer, prepend="first"):
    """A tokenizer of the SentencePiece type, whose control tokens are in the vocabulary."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=prepend)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.train_from_iterator([TEXT, "the quick brown fox\n    jumps"] * 9, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in CONTROL]
    tokenizer = Tokenizer.from_str(json.dumps(state))  # bytes are tokens like others
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


CONTROL = ["<unk>", "<s>", "</s>"]


def sentencepiece():
    tokens = [*CONTROL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, special_tokens=tokens)
    return metaspace(models.BPE(byte_fallback=True, unk_token="<unk>"), trainer)


def unigram():
    trainer = trainers.UnigramTrainer(vocab_size=60, show_progress=False, special_tokens=CONTROL, unk_token="<unk>")
    return metaspace(models.Unigram(), trainer)


@pytest.mark.parametrize("make", [byte_level, sentencepiece, unigram])
def test_text_that_spells_a_control_token_stays_text(make):
    tokenizer = make()
    for token in tokenizer.all_special_tokens:
        text = f"the {token} and{token}{token}the"
        ids = encode_plain_text(tokenizer, text)
        unknown = {tokenizer.unk_token_id} if make is unigram else set()
        assert not (set(tokenizer.all_special_ids) - unknown) & set(ids), token
        if make is not unigram:  # which has no piece for every character
            assert tokenizer.decode(ids) == text
    plain = "the quick fox"
    assert encode_plain_text(tokenizer, plain) == tokenizer(plain, add_special_tokens=False)["input_ids"]
    assert encode_plain_text(tokenizer, "") == []


def test_only_the_template_writes_control_tokens_in_a_chat():
    tokenizer = byte_level()
    messages = [{"role": "user", "content": f"say {END_TOKEN} twice"}, {"role": "assistant", "content": "no"}]
    ids = encode_chat(tokenizer, messages, add_generation_prompt=True)
    assert (ids.count(tokenizer.pad_token_id), ids.count(tokenizer.eos_token_id)) == (3, 2)
    text = f"<|pad|>user: say {END_TOKEN} twice{END_TOKEN}<|pad|>assistant: no{END_TOKEN}<|pad|>assistant: "
    assert tokenizer.decode(ids) == text
    harmless = [{"role": "user", "content": "the token"}]
    wanted = tokenizer(tokenizer.apply_chat_template(harmless, tokenize=False), add_special_tokens=False)["input_ids"]
    assert encode_chat(tokenizer, harmless) == wanted


def test_a_chat_in_two_control_tokens_and_a_spelling_is_encoded_as_one_text():
    tokenizer = sentencepiece()
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    spelled = encode_chat(tokenizer, [{"role": "user", "content": "the </s> end"}])
    plain = encode_chat(tokenizer, [{"role": "user", "content": "the end"}])
    assert spelled.count(tokenizer.eos_token_id) == plain.count(tokenizer.eos_token_id) == 1
    assert spelled[0] == plain[0] == tokenizer.bos_token_id
    assert tokenizer.decode(spelled) == "<s>the </s> end</s>"


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@pytest.mark.parametrize(
    ("prompt", "text"), [("the quick", " brown fox"), ("", "the fox"), ("the\n", "    jumps 漢字")]
)
def test_a_continuation_keeps_the_space_before_its_first_word(make, prompt, text):
    tokenizer = make()
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    whole = tokenizer(prompt + text, add_special_tokens=False)["input_ids"]
    assert whole[: len(prompt_ids)] == prompt_ids
    new_ids = whole[len(prompt_ids) :]
    assert decode_continuation(tokenizer, prompt_ids, new_ids) == text
    assert decode_continuation(tokenizer, prompt_ids, [*new_ids, tokenizer.eos_token_id]) == text
    decoder = ContinuationDecoder(tokenizer, prompt_ids)
    pieces = [decoder.add([token]) for token in new_ids] + [decoder.add([], last=True)]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
