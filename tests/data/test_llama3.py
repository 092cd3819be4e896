import base64
from pathlib import Path

import pytest

from calm.data.tokenizer import load_tokenizer, tokenizer_hash

REAL = Path(__file__).parents[3] / "shared" / "corpus" / "llama3_tokenizer.model"


@pytest.fixture
def model_file(tmp_path):
    """A file of the same format: every byte, then three merges."""
    pairs = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" a"]
    lines = [base64.b64encode(pair) + b" " + str(rank).encode() for rank, pair in enumerate(pairs)]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\n".join(lines))
    return path


def test_byte_pairs_come_first_then_256_special_tokens_then_padding(model_file):
    tokenizer = load_tokenizer(model_file)
    assert len(tokenizer) == 259 + 256 + 1
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (259, 260, 515)
    assert tokenizer.convert_tokens_to_ids(["<|start_header_id|>", "<|eot_id|>"]) == [265, 268]
    assert tokenizer("the a")["input_ids"] == [259, 257, 258]
    assert tokenizer("the a", add_special_tokens=False)["input_ids"] == [257, 258]
    assert tokenizer.padding_side == "left"


def test_any_text_comes_back(model_file):
    tokenizer = load_tokenizer(model_file)
    for text in ("It's the 1st  test .\n\n", "naïve 你好 😀"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_saved_as_tokenizer_json_it_is_the_same(model_file, tmp_path):
    tokenizer = load_tokenizer(model_file)
    tokenizer.save_pretrained(tmp_path / "saved")
    for path in (tmp_path / "saved", tmp_path / "saved" / "tokenizer.json", model_file.parent):
        again = load_tokenizer(path)
        assert tokenizer_hash(again) == tokenizer_hash(tokenizer)
        assert (again.eos_token_id, again.pad_token_id) == (260, 515)


def test_another_format_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0d\x00sentencepiece")
    with pytest.raises(ValueError, match="no tiktoken file"):
        load_tokenizer(tmp_path)


@pytest.mark.skipif(not REAL.exists(), reason="Llama 3's tokenizer.model is not ours to ship")
def test_the_real_file_has_the_released_vocabulary():
    tokenizer = load_tokenizer(REAL)
    assert len(tokenizer) == 128257
    assert tokenizer.pad_token_id == 128256
    assert tokenizer("Hello world")["input_ids"] == [128000, 9906, 1917]
    assert tokenizer.convert_tokens_to_ids("<|eot_id|>") == 128009
