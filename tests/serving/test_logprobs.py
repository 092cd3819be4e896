"""Log-probabilities and ``top_p`` over HTTP, and the defaults of common clients."""

import copy

import openai
import pytest
import torch
from conftest import TEMPLATE, serving

from calm.generation.model_runner import model_runner


@pytest.fixture(scope="module")
def client(calm, baseline, tokenizer):
    chatting, writing = copy.deepcopy(tokenizer), copy.deepcopy(calm)
    chatting.chat_template = TEMPLATE
    writing.generation_config.sampler = "mtp"
    models = [("calm", (writing, chatting)), ("baseline", (baseline, chatting))]
    with serving(models) as (address, _), openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0) as client:
        yield client


@torch.no_grad()
def test_completions_return_the_log_probabilities_of_a_forward_pass(client, baseline, tokenizer):
    settings = {"model": "baseline", "prompt": "the quick", "max_tokens": 8, "seed": 1, "logprobs": 2}
    choice = client.completions.create(**settings, temperature=0, top_p=0.9).choices[0]
    found = choice.logprobs
    ids = tokenizer("the quick")["input_ids"]
    for index, (text, logprob) in enumerate(zip(found.tokens, found.token_logprobs, strict=True)):
        law = baseline(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        token = int(law.argmax())
        assert text == tokenizer.decode([token])
        assert logprob == pytest.approx(law[token].item(), abs=1e-4)
        assert found.text_offset[index] == sum(map(len, found.tokens[:index]))
        likely = [tokenizer.decode([token]) for token in law.topk(2).indices.tolist()]
        assert set(found.top_logprobs[index]) == {*likely, text}
        ids.append(token)
    events = list(client.completions.create(**settings, temperature=0, top_p=0.9, stream=True))
    assert [token for event in events for token in event.choices[0].logprobs.tokens] == found.tokens
    assert [offset for event in events for offset in event.choices[0].logprobs.text_offset] == found.text_offset
    streamed = [value for event in events for value in event.choices[0].logprobs.token_logprobs]
    assert streamed == pytest.approx(found.token_logprobs, abs=1e-4)


@torch.no_grad()
def test_chats_return_the_log_probabilities_of_a_forward_pass(client, calm, tokenizer):
    settings = {
        "model": "calm", "messages": [{"role": "user", "content": "fox"}], "max_tokens": 7, "seed": 3,
        "logprobs": True, "top_logprobs": 2,
    }  # fmt: skip
    choice = client.chat.completions.create(**settings).choices[0]
    content = choice.logprobs.content
    prompt = tokenizer("<user>fox</><assistant>")["input_ids"]
    runner = model_runner(calm)
    out = runner.generate(
        torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.long),
        runner.resolve(settings_of(seed=3, max_new_tokens=7)), tokenizer,
    )  # fmt: skip
    tokens = out.tokens[0, : len(content)].tolist()
    assert [entry.token for entry in content] == [tokenizer.decode([token]) for token in tokens]
    for count in range(1, len(tokens) + 1):
        (log_likelihood, _), *_ = runner.score([prompt], [tokens[:count]], "mtp")
        assert sum(entry.logprob for entry in content[:count]) == pytest.approx(log_likelihood, abs=1e-3)
    assert all(len(entry.top_logprobs) == 2 for entry in content)
    assert all(entry.top_logprobs[0].logprob >= entry.logprob - 1e-5 for entry in content)
    events = list(client.chat.completions.create(**settings, stream=True))
    streamed = [entry for event in events for entry in event.choices[0].logprobs.content]
    assert [entry.token for entry in streamed] == [entry.token for entry in content]
    with pytest.raises(openai.BadRequestError, match="top_logprobs needs logprobs: true"):
        client.chat.completions.create(**settings | {"logprobs": False})


def settings_of(**fields):
    from calm import SamplingParams

    return SamplingParams(sampler="mtp", **fields)


@pytest.mark.parametrize("model", ["calm", "baseline"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0}, {"temperature": 0.7, "top_p": 0.9}, {"top_p": 1}])
def test_common_front_ends_work_with_their_own_settings(client, model, settings):
    messages = [{"role": "user", "content": "fox"}]
    several = [
        client.chat.completions.create(model=model, messages=messages, max_tokens=9, seed=seed, **settings)
        for seed in (1, 2)
    ]
    texts = {answer.choices[0].message.content for answer in several}
    assert len(texts) == 1 if settings.get("temperature") == 0 else len(texts) == 2


def test_the_former_name_of_a_sampler_is_accepted(client):
    body = {"model": "calm", "prompt": "fox", "max_tokens": 6, "seed": 1}
    now = client.completions.create(**body, extra_body={"sampler": "mtp"})
    with pytest.warns(FutureWarning, match="sampler 'token_prediction' is named 'mtp' now"):
        before = client.completions.create(**body, extra_body={"sampler": "token_prediction"})
    assert before.choices[0].text == now.choices[0].text
