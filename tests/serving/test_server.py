"""The server over HTTP: OpenAI's own client, and requests as no client sends them."""

import asyncio
import copy
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import openai
import pytest
import torch
from conftest import TEMPLATE, serving
from prometheus_client.parser import text_string_to_metric_families

from calm.serving.jobs import Delta
from calm.serving.middleware import Guard
from calm.serving.responses import Unread
from calm.serving.service import Limits
from calm.serving.telemetry import Metrics


@pytest.fixture(scope="module")
def server(calm, baseline, tokenizer):
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = TEMPLATE
    models = [("calm", (calm, tokenizer)), ("baseline", (baseline, tokenizer)), ("chat", (calm, chatting))]
    with serving(models) as (address, services):
        yield address, services


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


def alone(calm, tokenizer, prompt, seed, max_tokens, **settings):
    """The text that `generate` gives."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], dtype=torch.long)
    generator = [torch.Generator().manual_seed(seed)]
    out = calm.generate(ids, max_new_tokens=max_tokens, generator=generator, **settings)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_client_of_openai_completes(client, calm, tokenizer):
    assert [model.id for model in client.models.list()] == ["calm", "baseline", "chat"]
    answer = client.completions.create(model="calm", prompt=["the quick", "a"], max_tokens=20, seed=5, n=2)
    texts = [choice.text for choice in answer.choices]
    assert texts == [
        alone(calm, tokenizer, prompt, 5 + i, 20) for i, prompt in enumerate(["the quick"] * 2 + ["a"] * 2)
    ]
    assert {choice.finish_reason for choice in answer.choices} <= {"length", "stop"}
    counts = [len(tokenizer(text)["input_ids"]) for text in ("the quick", "a")]
    assert answer.usage.prompt_tokens == sum(counts)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert 0 < answer.usage.completion_tokens <= 80


def test_the_client_of_openai_streams_the_same_text(client, calm, tokenizer):
    settings = {"model": "calm", "prompt": "the quick", "max_tokens": 20, "seed": 9, "temperature": 0.5}
    body = {"num_candidates": 32}
    whole = client.completions.create(**settings, extra_body=body).choices[0].text
    assert whole == alone(calm, tokenizer, "the quick", 9, 20, temperature=0.5, num_candidates=32)
    *chunks, usage = client.completions.create(
        **settings, extra_body=body, stream=True, stream_options={"include_usage": True}
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole
    assert [chunk.choices[0].finish_reason is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert usage.choices == []
    assert usage.usage.completion_tokens == sum(chunk.model_extra["calm"]["tokens"] for chunk in chunks) <= 20
    assert all(chunk.model_extra["calm"]["samples"] >= 2 for chunk in chunks)


def test_the_client_of_openai_chats_where_there_is_a_template(client, calm, tokenizer):
    messages = [{"role": "user", "content": "the quick"}]
    answer = client.chat.completions.create(model="chat", messages=messages, max_tokens=20, seed=2)
    expected = alone(calm, tokenizer, "<user>the quick</><assistant>", 2, 20)
    assert answer.choices[0].message.content == expected
    parts = [{"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "quick"}]}]
    chunks = client.chat.completions.create(model="chat", messages=parts, max_tokens=20, seed=2, stream=True)
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == expected
    with pytest.raises(openai.BadRequestError, match="1 prompts with 100 texts each were requested; 1 to 68"):
        client.chat.completions.create(model="chat", messages=messages, n=100)
    with pytest.raises(openai.BadRequestError, match="calm has no chat template"):
        client.chat.completions.create(model="calm", messages=messages)


def test_a_baseline_is_served_beside_it(client):
    first, again = (
        client.completions.create(model="baseline", prompt="fox", max_tokens=12, seed=1).choices[0].text
        for _ in range(2)
    )
    assert first == again != ""
    with pytest.raises(openai.BadRequestError, match="settings of a CALM"):
        client.completions.create(model="baseline", prompt="fox", extra_body={"sampler": "exact"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"top_p": 0.9, "extra_body": {"sampler": "batch"}}, "top_p=0.9 needs token probabilities, and sampler batch"),
        ({"logprobs": 3, "extra_body": {"sampler": "batch"}}, "logprobs=3 needs token probabilities"),
        ({"logit_bias": {"5": 1}}, "logit_bias is not supported"),
        ({"temperature": 0}, r"temperature must be in \(0, 1\], got 0.0: comparing samples can sharpen"),
        ({"temperature": 1.5}, r"temperature must be in \(0, 1\]"),
        ({"max_tokens": 5000}, "exceed the context of 399 tokens: shorten the prompt, or request at most 39"),
        ({"prompt": [1, 999]}, "token ids outside 0 to 299"),
        ({"prompt": []}, None),
        ({"stop": [""]}, "stop must be at most 16 texts"),
        ({"n": 0}, "n: Input should be greater than or equal to 1"),
        ({"prompt": ["a"] * 300}, "300 prompts with 1 texts each were requested"),
        ({"extra_body": {"mystery": 1}}, "mystery: this parameter is not known"),
        ({"extra_body": {"num_candidates": 2}, "temperature": 0.1}, "num_candidates must be at least 10"),
        ({"extra_body": {"num_candidates": 1001}}, "num_candidates: this server allows at most 1000, got 1001"),
    ],
)
def test_what_a_model_cannot_follow_is_refused_with_the_reason(client, given, message):
    request = {"model": "calm", "prompt": "a", "max_tokens": 6} | given
    if message is None:
        assert client.completions.create(**request).choices
        return
    with pytest.raises(openai.BadRequestError, match=message):
        client.completions.create(**request)


def test_neutral_values_of_the_same_parameters_are_fine(client):
    client.completions.create(
        model="calm", prompt="a", max_tokens=3, top_p=1, presence_penalty=0, frequency_penalty=0, logit_bias={},
        best_of=1, echo=False, user="me", stop=None, n=None, stream=None,
    )  # fmt: skip


def test_a_stream_names_the_role_once(client):
    """The official client adds up the fields of all deltas."""
    settings = {"model": "chat", "messages": [{"role": "user", "content": "fox"}], "max_tokens": 30, "seed": 2, "n": 2}
    events = list(client.chat.completions.create(**settings, stream=True))
    roles = [[e.choices[0].delta.role for e in events if e.choices[0].index == index] for index in range(2)]
    assert all(of_text[0] == "assistant" and set(of_text[1:]) == {None} for of_text in roles)
    with client.chat.completions.stream(**settings) as stream:
        try:
            message = stream.get_final_completion().choices[0].message
        except openai.LengthFinishReasonError as error:
            message = error.completion.choices[0].message
    assert message.role == "assistant"


def test_fields_that_ask_for_nothing_are_accepted_wherever_they_stand(client):
    user = {"role": "user", "content": "fox"}
    answer = client.chat.completions.create(model="chat", messages=[user], max_tokens=4, seed=1).choices[0].message
    histories = [
        [user, answer.model_dump(), user],
        [user, {"role": "assistant", "content": "x", "tool_calls": [], "annotations": []}, user],
        [user, {"role": "assistant", "content": None, "refusal": None}, user],
        [{"role": "user", "content": [{"type": "text", "text": "fox"}], "name": None}],
    ]
    nothing = dict.fromkeys(
        ["reasoning_effort", "verbosity", "audio", "prediction", "web_search_options", "unheard_of"]
    )  # fmt: skip
    for messages in histories:
        for parallel in (None, True, False):
            extra = nothing | {"parallel_tool_calls": parallel}
            assert client.chat.completions.create(
                model="chat", messages=messages, max_tokens=4, extra_body=extra
            ).choices
    options = {"stream_options": {"include_usage": None}}
    assert list(
        client.chat.completions.create(model="chat", messages=[user], max_tokens=4, stream=True, extra_body=options)
    )
    for extra, message in (
        ({"reasoning_effort": "high"}, "reasoning_effort is not supported: the model does not reason"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction is not supported"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage: Input should be a valid boolean"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            client.chat.completions.create(model="chat", messages=[user], max_tokens=4, extra_body=extra)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    with pytest.raises(openai.BadRequestError, match="tool_calls of a message is not supported"):
        client.chat.completions.create(
            model="chat", messages=[user, {"role": "assistant", "content": "", "tool_calls": [call]}]
        )


def test_text_that_spells_a_control_token_is_text(client, tokenizer):
    end = tokenizer.eos_token
    answer = client.completions.create(model="calm", prompt=f"fox{end}", max_tokens=3)
    assert answer.usage.prompt_tokens > len(tokenizer("fox")["input_ids"]) + 1
    counts = [
        client.chat.completions.create(
            model="chat", messages=[{"role": "user", "content": text}], max_tokens=3
        ).usage.prompt_tokens
        for text in ("", end)
    ]
    assert counts[1] > counts[0] + 1


def test_a_body_that_never_arrives_is_given_up():
    sent = []

    async def call():
        first = iter([{"type": "http.request", "body": b"{", "more_body": True}])

        async def receive():
            return next(first, None) or await asyncio.sleep(60)

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "path": "/v1/completions", "headers": []}
        await Guard(None, Metrics(), body_timeout=0.05)(scope, receive, send)

    asyncio.run(call())
    assert sent[0]["status"] == 408
    assert "did not arrive within 0.05 seconds" in json.loads(sent[1]["body"])["error"]["message"]


def test_other_requests_get_a_json_error_too(server):
    address, _ = server
    as_json = {"content-type": "application/json"}
    half = b'{"prompt": "\\ud800"}'
    half_of_a_name = b'{"\\ud800": 1}'
    with httpx.Client(base_url=address) as http:
        cases = [
            (http.post("/v1/completions", content="{", headers=as_json), 400, "valid JSON"),
            (http.post("/v1/completions", json=[1]), 400, "must be a JSON object"),
            (http.post("/v1/completions", content='{"prompt": "a"}'), 400, "sent as application/json"),
            (http.post("/v1/completions", json={"prompt": "a", "model": "gpt"}), 404, "no model 'gpt' here, but calm"),
            (http.post("/v1/completions", content=half, headers=as_json), 400, "half of a surrogate pair"),
            (http.post("/v1/completions", content=half_of_a_name, headers=as_json), 400, "raw data as a unicode"),
            (http.post("/v1/completions", content=b" " * (2**20 + 1)), 413, "larger than 1,048,576 bytes"),
            (http.post("/v1/completions", content=iter([b" " * 2**19] * 3)), 413, "larger than 1,048,576 bytes"),
            (http.get("/v1/completions"), 405, "Method Not Allowed"),
            (http.get("/etc/passwd"), 404, "Not Found"),
            (http.get("/health", headers={"host": "evil.example"}), 200, None),
            (http.head("/health"), 200, None),
            (http.head("/v1/completions"), 405, None),
        ]  # fmt: skip
    assert cases[-1][0].headers["allow"] == "POST"
    assert cases[-2][0].content == b""
    for answer, status, message in cases:
        assert answer.status_code == status, answer.text
        if message:
            assert message in answer.json()["error"]["message"]


def test_many_clients_get_their_own_answers(server, calm, tokenizer):
    """64 requests of 16 clients, four settings: each is the answer of its seed, and none waits for ever."""
    address, services = server
    settings = [{}, {"temperature": 0.5, "num_candidates": 16}, {"temperature": 0.7, "num_candidates": 16}, {}]

    def ask(number):
        body = {"prompt": f"fox {number}", "max_tokens": 6 + number % 9, "seed": number} | settings[number % 4]
        with httpx.Client(base_url=address, timeout=60) as http:
            return http.post("/v1/completions", json=body).json()["choices"][0]["text"]

    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(ask, range(64)))
    for number, text in enumerate(texts):
        assert text == alone(calm, tokenizer, f"fox {number}", number, 6 + number % 9, **settings[number % 4]), number
    assert services[0].engine.num_running == services[0].engine.num_waiting == 0


def test_what_a_client_does_not_take_is_joined_and_not_lost():
    async def take():
        unread = Unread(most=4)
        for step in range(1000):
            for index in range(2):
                unread.put(index, Delta(f"{index}{step},", 1, 2, 3, 0.5, "length" if step == 999 else None))
        assert len(unread) <= 4
        texts, tokens, reasons = ["", ""], [0, 0], [None, None]
        while not all(reasons):
            index, chunk = await unread.get()
            texts[index] += chunk.text
            tokens[index] += chunk.num_tokens
            reasons[index] = chunk.finish_reason
        return texts, tokens

    texts, tokens = asyncio.run(take())
    assert texts == ["".join(f"{index}{step}," for step in range(1000)) for index in range(2)]
    assert tokens == [1000, 1000]


def metric(address, name, **labels):
    text = httpx.get(f"{address}/metrics").text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def wait_for(condition):
    for _ in range(2000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it never came")


def test_a_full_queue_is_said_and_a_client_that_leaves_frees_its_slot(calm, tokenizer):
    limits = Limits(max_batch=1, max_queue=1, context=700)
    with serving([("calm", (calm, tokenizer))], limits) as (address, services):
        engine = services[0].engine
        engine.runner.end_ids = set()
        draw = engine.runner.sample

        def slow(*arguments):
            time.sleep(0.01)  # a request that lasts
            return draw(*arguments)

        engine.runner.sample = slow
        body = {"prompt": "a", "max_tokens": 690, "stream": True}
        with httpx.Client(base_url=address, timeout=60) as http:
            with http.stream("POST", "/v1/completions", json=body) as running:
                lines = running.iter_lines()
                next(lines)
                with http.stream("POST", "/v1/completions", json=body) as waiting:
                    wait_for(lambda: engine.num_waiting == 1)
                    refused = http.post("/v1/completions", json={"prompt": "a"})
                    assert refused.status_code == 503
                    assert refused.headers["retry-after"] == "1"
                    assert "too many requests" in refused.json()["error"]["message"]
                    running.close()
                    others = waiting.iter_lines()
                    assert next(others).startswith("data: ")  # the slot went to the next one
                    assert metric(address, "calm_sequences_total", reason="cancelled") == 1
            wait_for(lambda: engine.num_running == 0)
            # The same where nothing was streamed.
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/completions", json=body | {"stream": False}, timeout=0.3)
            wait_for(lambda: engine.num_running == 0)
            assert metric(address, "calm_sequences_total", reason="cancelled") == 3
            assert http.post("/v1/completions", json={"prompt": "a", "max_tokens": 6}).status_code == 200


def test_metrics_count_what_happened(server):
    address, _ = server
    before = [metric(address, name, model="calm") for name in ("calm_tokens_total", "calm_first_chunk_seconds_count")]
    answer = httpx.post(f"{address}/v1/completions", json={"prompt": "a", "max_tokens": 9, "seed": 1}).json()
    after = [metric(address, name, model="calm") for name in ("calm_tokens_total", "calm_first_chunk_seconds_count")]
    assert after[0] - before[0] == answer["usage"]["completion_tokens"]
    assert after[1] - before[1] == 1
    assert metric(address, "calm_requests_total", path="/v1/completions", status="200") > 0
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}


def test_keys_and_hosts_are_checked(calm, tokenizer):
    models = [("calm", (calm, tokenizer))]
    with serving(models, api_keys=["secret", "other"], hosts=["127.0.0.1"]) as (address, _):
        body = {"prompt": "a", "max_tokens": 3}
        with httpx.Client(base_url=address) as http:
            assert http.post("/v1/completions", json=body).status_code == 401
            for key, status in (("wrong", 401), ("secre", 401), ("secrets", 401), ("secret", 200), ("other", 200)):
                headers = {"Authorization": f"Bearer {key}"}
                assert http.post("/v1/completions", json=body, headers=headers).status_code == status, key
            assert http.get("/metrics").status_code == 401
            assert http.get("/health").status_code == http.get("/").status_code == 200
            assert http.get("/health", headers={"host": "evil.example"}).status_code == 421
            assert http.get("/health", headers={"host": "127.0.0.1"}).status_code == 200
            assert "access-control-allow-origin" not in http.get("/health", headers={"origin": "http://evil"}).headers
        with pytest.raises(openai.AuthenticationError, match="a valid API key is needed"):
            openai.OpenAI(base_url=f"{address}/v1", api_key="wrong").models.list()
        assert openai.OpenAI(base_url=f"{address}/v1", api_key="other").models.list().data[0].id == "calm"


def test_a_fault_of_the_server_says_nothing_about_it(calm, tokenizer, monkeypatch, caplog):
    with serving([("calm", (calm, tokenizer))]) as (address, services):
        monkeypatch.setattr(services[0].engine.runner, "prefill", None)
        answer = httpx.post(f"{address}/v1/completions", json={"prompt": "a"})
        assert answer.status_code == 500
        assert answer.json()["error"]["message"] == "the server failed at this request"
        assert metric(address, "calm_requests_total", status="500") == 1
        with httpx.stream("POST", f"{address}/v1/completions", json={"prompt": "a", "stream": True}) as stream:
            events = [line for line in stream.iter_lines() if line]
        assert json.loads(events[0].removeprefix("data: "))["error"]["code"] == "internal_error"
        assert "Traceback" not in answer.text
    assert "TypeError" in caplog.text  # in the log
