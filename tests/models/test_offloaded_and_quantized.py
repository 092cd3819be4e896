"""Models whose weights are on another device, or are quantised: what a layer computes is asked of the layer."""

import importlib.util

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from calm import CalmForCausalLM
from calm.data.tokenizer import train_tokenizer
from calm.evaluation.brier_lm import evaluate_brier
from calm.evaluation.likelihood import log_likelihoods
from calm.evaluation.reconstruction import evaluate_reconstruction
from calm.generation.completions import complete
from calm.generation.model_runner import model_runner
from calm.generation.sampling_params import SamplingParams
from calm.models.layer_access import embedding_matrix

# Offloading everything is legal, and accelerate and transformers remark on it; torch replaces its quantisation.
pytestmark = pytest.mark.filterwarnings("ignore")

HEADS = ["energy", "diffusion", "flow", "categorical_flow"]
DEVICE_MAPS = {
    "auto": "auto",
    "disk": {"": "disk"},
    "mixed": {
        "backbone": "cpu",
        "patch_embedding": "disk",
        "mtp_head": "cpu",
        "head": "disk",
        "autoencoder": "disk",
    },
}


class Blocks:
    """Blocks of given tokens, with what the evaluation asks of prepared data."""

    block_size, manifest = 16, {"vocab_size": tiny.VOCAB_SIZE}

    def __init__(self):
        self.ids = torch.randint(2, tiny.VOCAB_SIZE, (2, 16), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index]}

    def documents(self, num_blocks=None):
        return list(range(len(self.ids[:num_blocks])))

    def batches(self, num_blocks, batch_size, shuffle_seed=None):
        yield from self.ids.split(batch_size)


def use(model):
    """Text, scores and steps of a server: what each gives."""
    prompt = Blocks().ids[:1, :6]
    results = [
        model.generate(
            prompt, max_new_tokens=9, temperature=temperature, sampler=sampler, num_candidates=8, eos_token_id=[],
            generator=[torch.Generator().manual_seed(3)],
        )
        for temperature, sampler in ((1.0, "batch"), (0.5, "batch"), (0.7, "mtp"))
    ]  # fmt: skip
    results.append(torch.tensor(evaluate_brier(model, Blocks(), 4, num_samples=2, batch_size=2).brier))
    results.append(torch.tensor([row[0] for row in log_likelihoods(model, [prompt[0].tolist()], [[5, 6, 7]])]))
    runner = model_runner(model)
    hidden, cache, positions = runner.prefill([runner.whole_patches(prompt[0].tolist())])
    chunk = runner.sample(hidden, SamplingParams(0.5, "batch", 8).with_defaults(), [torch.Generator().manual_seed(5)])
    next_hidden = runner.step(chunk.tokens, torch.tensor(positions), None, cache)
    return [*results, chunk.tokens, next_hidden]


@pytest.fixture(scope="module", params=HEADS)
def saved(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    model = tiny.calm(type=request.param, token_prediction="autoregressive")
    model.save_pretrained(path)
    return path, use(model)


@pytest.mark.parametrize("device_map", DEVICE_MAPS)
def test_a_model_spread_over_devices_and_disk_gives_the_same(saved, device_map, tmp_path):
    path, expected = saved
    model = AutoModelForCausalLM.from_pretrained(path, device_map=DEVICE_MAPS[device_map], offload_folder=tmp_path)
    for result, wanted in zip(use(model), expected, strict=True):
        torch.testing.assert_close(result, wanted)


def test_an_offloaded_model_has_the_same_loss(tmp_path):
    model = tiny.calm(token_prediction="autoregressive")
    model.save_pretrained(tmp_path / "model")
    offloaded = CalmForCausalLM.from_pretrained(tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path)
    ids = tiny.tokens(2, 16)
    with torch.no_grad():
        losses = [each(ids, labels=ids, generator=torch.Generator().manual_seed(0)).loss for each in (model, offloaded)]
    torch.testing.assert_close(*losses)
    reconstructed = [evaluate_reconstruction(each.autoencoder, Blocks(), None, 2, 0) for each in (model, offloaded)]
    first, second = (each.to_dict() for each in reconstructed)
    assert first.pop("token_accuracy_with_noise") == pytest.approx(second.pop("token_accuracy_with_noise"))
    assert first == pytest.approx(second)


def test_an_offloaded_token_model_completes_prompts(tmp_path):
    tokenizer = train_tokenizer(["a text of a few words"] * 20, 262)
    torch.manual_seed(0)
    ids = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(**tiny.backbone(vocab_size=len(tokenizer)), **ids)).eval()
    model.save_pretrained(tmp_path / "model")
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path
    )
    settings = SamplingParams(max_new_tokens=4)
    texts = [complete(each, tokenizer, ["a text"], settings)[0]["text"] for each in (model, offloaded)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("head_type", HEADS)
def test_dynamically_quantised_layers_work(head_type):
    plain = tiny.calm(type=head_type, token_prediction="autoregressive")
    expected = use(plain)
    model = torch.ao.quantization.quantize_dynamic(plain, {torch.nn.Linear}, dtype=torch.qint8)
    results = use(model)
    assert [result.shape for result in results] == [wanted.shape for wanted in expected]
    assert all(result.isfinite().all() for result in results)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
@pytest.mark.parametrize("head_type", HEADS)
def test_weights_in_8_bits_work(head_type):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = tiny.calm(type=head_type, token_prediction="autoregressive")
    ids = tiny.tokens(2, 16)
    loss = model(ids, labels=ids, generator=torch.Generator().manual_seed(0)).loss.item()
    expected = use(model)
    quantize_(model, Int8WeightOnlyConfig())
    results = use(model)
    assert [result.shape for result in results] == [wanted.shape for wanted in expected]
    torch.testing.assert_close(results[-1], expected[-1], rtol=0.1, atol=0.1)
    assert model(ids, labels=ids, generator=torch.Generator().manual_seed(0)).loss == pytest.approx(loss, rel=0.1)


def test_an_adapted_embedding_is_the_output_layer_too():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(torch.nn.Sequential(torch.nn.Embedding(6, 4)), LoraConfig(r=2, target_modules=["0"]))
    embedding = model.base_model.model[0]
    torch.nn.init.normal_(embedding.lora_embedding_A["default"])
    torch.nn.init.normal_(embedding.lora_embedding_B["default"])
    matrix = embedding_matrix(embedding, 6, torch.device("cpu"))
    assert torch.equal(matrix, embedding(torch.arange(6)))
    assert not torch.equal(matrix, embedding.weight)
