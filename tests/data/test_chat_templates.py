"""Chat templates of checkpoints are rendered within bounds, and as transformers renders them."""

import os

import pytest

from calm.data import chat_templates
from calm.data.chat_templates import ChatTemplateLimitError, render
from calm.data.conversations import prepare_conversations
from calm.data.tokenizer import train_tokenizer

CHAT = [{"role": "user", "content": "a 漢字", "name": None}, {"role": "assistant", "content": 'b\n"c"', "more": [1]}]
ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "power": "{{ 7 % (9 ** (9 ** 9)) }}",
    "memory": "{{ 'a' * 10 ** 11 }}",
    "format": "{{ '%10000000000d' % 1 }}",
    "doubling": "{% set ns = namespace(s='ab') %}{% for a in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "long text": "{{ 'a' * 2 ** 25 }}",
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a text of a few words"] * 20, 262)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role }}: {{ m['content'] }}{{ m.name is defined }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
        "{{ messages | tojson }}{% for m in messages %}{% if loop.last %}{% continue %}{% endif %}{{ m }}{% endfor %}",
    ],
)
def test_text_is_what_transformers_renders(tokenizer, template):
    tokenizer.chat_template = template
    for prompt in (False, True):
        wanted = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
        assert render(tokenizer, CHAT, prompt) == wanted


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_end_or_with_a_huge_text_is_one_error(tokenizer, name, monkeypatch):
    monkeypatch.setattr(chat_templates, "MAX_SECONDS", 1.0)
    tokenizer.chat_template = ENDLESS[name]
    with pytest.raises(
        ChatTemplateLimitError, match=r"the chat template of the tokenizer takes more .* cannot be used"
    ):
        render(tokenizer, CHAT)
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert render(tokenizer, CHAT) == "a 漢字"  # the next one is rendered


def test_messages_that_a_template_refuses_are_an_error_with_its_reason(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="TemplateError: roles must alternate"):
        render(tokenizer, CHAT)
    tokenizer.chat_template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(ValueError, match=r"SecurityError: access to attribute '__class__'.* is unsafe"):
        render(tokenizer, CHAT)


def test_a_template_without_end_ends_a_preparation_at_the_first_record(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(chat_templates, "MAX_SECONDS", 1.0)
    tokenizer.chat_template = ENDLESS["loops"]
    line = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    (tmp_path / "chats.jsonl").write_text(line * 100)
    with pytest.raises(ValueError, match=r"chats.jsonl.*the chat template of the tokenizer takes more than 1 seconds"):
        prepare_conversations([tmp_path / "chats.jsonl"], tokenizer, tmp_path / "data", on_bad="skip")


def test_a_forked_process_has_a_template_process_of_its_own(tokenizer):
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert render(tokenizer, CHAT) == "a 漢字"
    owner = chat_templates._process().owner
    child = os.fork() if hasattr(os, "fork") else None
    if child == 0:
        os._exit(0 if chat_templates._process().owner == os.getpid() != owner else 1)
    assert child is None or os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
