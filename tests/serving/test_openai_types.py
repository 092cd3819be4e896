"""Requests derived from the types of OpenAI's official client: as it sends them, with null, and malformed."""

import collections.abc
import copy
import json
import random
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

import httpx2 as httpx
import pytest
from conftest import TEMPLATE, serving
from openai.types.chat import completion_create_params as chat_params
from openai.types.chat.chat_completion_assistant_message_param import ChatCompletionAssistantMessageParam
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming

CHAT = chat_params.CompletionCreateParamsNonStreaming
MALFORMED = [
    "", "x", -1, 0, 1, 2**31, 2**63, 2**70, 0.5, 1e308, True, False, [], [[]], [None], {}, {"a": None},
    {"type": "text"}, [{"type": "text"}], "\ud800", "\x00", ["\ud800"], "é" * 1000, [1, "a"], [{}],
]  # fmt: skip


@pytest.fixture(scope="module")
def send(calm, tokenizer):
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = TEMPLATE
    with serving([("chat", (calm, chatting))]) as (address, _), httpx.Client(base_url=address, timeout=60) as http:
        yield lambda path, body: http.post(path, content=dumps(body), headers={"content-type": "application/json"})


def dumps(body):
    return json.dumps(body).encode()  # halves of surrogate pairs as escapes


def fields_of(typed_dict):
    return get_type_hints(typed_dict)


def example(hint, rng, depth=0):
    """A value of a type, by chance."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is type(None):
        return None
    if is_typeddict(hint):
        required = hint.__required_keys__
        return {
            name: example(of, rng, depth + 1)
            for name, of in fields_of(hint).items()
            if name in required or (depth < 3 and rng.random() < 0.3)
        }
    if origin in (Union, types.UnionType):
        return example(rng.choice(arguments), rng, depth)
    if origin is Literal:
        return rng.choice(arguments)
    if origin is dict or hint is dict:
        return {"a": example(arguments[1], rng, depth + 1)} if arguments and rng.random() < 0.5 else {}
    if isinstance(origin, type) and issubclass(origin, collections.abc.Iterable):
        return [example(arguments[0], rng, depth + 1) for _ in range(rng.randrange(3))]
    simple: dict[Any, list] = {
        str: ["", "fox", "<|end_of_text|>"],
        int: [0, 1, 2], float: [0.0, 0.5, 1.0], bool: [True, False],
    }  # fmt: skip
    if arguments:  # of Annotated, Required and the client's own generic types
        return [example(arguments[0], rng, depth + 1)]
    return rng.choice(simple.get(hint, ["x", 1, None]))


def requests(count):
    """Bodies with some fields as their type says, null, or malformed."""
    rng = random.Random(0)
    kinds = [
        ("/v1/chat/completions", CHAT, {"messages": [{"role": "user", "content": "fox"}]}),
        ("/v1/completions", CompletionCreateParamsNonStreaming, {"prompt": "fox"}),
    ]
    for number in range(count):
        path, params, least = kinds[number % 2]
        fields = {name: hint for name, hint in fields_of(params).items() if name != "model"}
        body = least | {"max_tokens": 2}
        for name in rng.sample(sorted(fields), rng.choice([1, 1, 2, 3])):
            kind = rng.random()
            value = example(fields[name], rng) if kind < 0.5 else None if kind < 0.65 else rng.choice(MALFORMED)
            body[name] = value
        if rng.random() < 0.2:
            body["stream"] = True
        if body.get("max_tokens") is None or (isinstance(body["max_tokens"], int) and body["max_tokens"] > 2):
            body["max_completion_tokens" if "messages" in body else "max_tokens"] = 2
        yield path, body


def check(send, count):
    statuses: dict[int, int] = {}
    for path, body in requests(count):
        answer = send(path, body)
        assert answer.status_code < 500, (body, answer.text)
        if answer.status_code != 200:
            message = answer.json()["error"]["message"]
            assert message
            assert not any(word in message for word in ("Traceback", ".py", "site-packages"))
        else:
            assert '"internal_error"' not in answer.text
        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
    assert statuses.keys() <= {200, 400}
    assert min(statuses.values()) > count / 10  # both are tried


def test_requests_of_the_official_clients_types_never_fail_the_server(send):
    check(send, 100)


@pytest.mark.slow
def test_a_thousand_requests_of_the_official_clients_types_never_fail_the_server(send):
    check(send, 1000)


def test_null_is_accepted_for_every_optional_parameter(send):
    user = {"role": "user", "content": "fox"}
    for path, params, least in (
        ("/v1/chat/completions", CHAT, {"messages": [user]}),
        ("/v1/completions", CompletionCreateParamsNonStreaming, {"prompt": "fox"}),
    ):
        nothing = dict.fromkeys(fields_of(params).keys() - {"messages", "prompt", "max_tokens"})
        answer = send(path, nothing | least | {"max_tokens": 2})
        assert answer.status_code == 200, answer.text
    empty = dict.fromkeys(fields_of(ChatCompletionAssistantMessageParam)) | {"role": "assistant", "content": "x"}
    answer = send("/v1/chat/completions", {"messages": [user, empty, user], "max_tokens": 2})
    assert answer.status_code == 200, answer.text
