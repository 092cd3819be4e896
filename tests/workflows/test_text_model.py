"""``calm.load`` and ``calm.train``: the public API from Python."""

import json
import warnings

import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import calm
from calm import CalmConfig, CalmForCausalLM
from calm.checkpoints.reference import save_reference
from calm.data.prepare import prepare
from calm.data.tokenizer import train_tokenizer

DOCUMENTS = ["alpha beta gamma delta " * 12] * 8


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of a CALM, a token model, and a CALM in the layout of the reference implementation."""
    root, tokenizer = tmp_path_factory.mktemp("models"), train_tokenizer(DOCUMENTS, 270)
    size = len(tokenizer)
    model = tiny.calm(2, vocab_size=size)
    torch.manual_seed(0)
    token_model = LlamaForCausalLM(LlamaConfig(**tiny.backbone(vocab_size=size)))
    for path, save in {
        "calm": lambda path: model.save_pretrained(path),
        "token_model": lambda path: token_model.save_pretrained(path),
        "released": lambda path: save_reference(model, path),
    }.items():
        save(root / path)
        tokenizer.save_pretrained(root / path)
    return root


@pytest.mark.parametrize("name", ["calm", "token_model", "released"])
@pytest.mark.filterwarnings("ignore:the reference trains and samples in its own way")
def test_a_loaded_model_continues_text_whole_or_piece_by_piece(models, name):
    loaded = calm.load(models / name, device="cpu")
    assert isinstance(loaded.model, LlamaForCausalLM if name == "token_model" else CalmForCausalLM)
    settings = {"max_new_tokens": 12, "seed": 3}
    text = loaded.generate("alpha beta", **settings)
    assert text
    assert text == loaded.generate("alpha beta", calm.SamplingParams(max_new_tokens=12), seed=3)
    assert text != loaded.generate("alpha beta", max_new_tokens=12, seed=4)
    pieces = list(loaded.stream("alpha beta", **settings))
    assert len(pieces) > 1
    assert "".join(pieces) == text
    with pytest.raises(ValueError, match="top_k is no sampling parameter; the parameters are temperature"):
        loaded.stream("alpha", top_k=3)
    with pytest.raises(ValueError, match="temperature"):
        list(loaded.stream("alpha", temperature=-1.0))


def test_a_closed_stream_stops_the_generation(models):
    loaded, steps = calm.load(models / "calm", device="cpu"), []
    loaded.model.register_forward_hook(lambda *_: steps.append(1))
    loaded.model.backbone.register_forward_hook(lambda *_: steps.append(1))
    stream = loaded.stream("alpha", max_new_tokens=100)
    next(stream)
    stream.close()
    assert 0 < len(steps) < 40


def test_what_is_no_language_model_is_refused(models, tmp_path):
    tiny.autoencoder().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds an autoencoder; a language model is needed"):
        calm.load(tmp_path)
    with pytest.raises(ValueError, match="no model at"):
        calm.load(models / "cal")


def test_a_recipe_is_trained_from_python(tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    prepare([tmp_path / "text.jsonl"], train_tokenizer(DOCUMENTS, 270), tmp_path / "train")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"stage: baseline\noutput_dir: {tmp_path / 'run'}\n"
        f"data: {{train: {tmp_path / 'train'}, block_size: 16}}\n"
        "model: {backbone: {hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2}}\n"
        "training: {max_steps: 5, per_device_train_batch_size: 2, use_cpu: true, warmup_steps: 0}\n"
    )
    output = calm.train(recipe, "training.max_steps=1")
    assert calm.load(output, device="cpu").generate("alpha", max_new_tokens=2) is not None
    assert calm.train(recipe, "training.max_steps=1") == output
    from calm.training.recipe import Recipe

    with pytest.raises(ValueError, match="overrides are for the path of a recipe"):
        calm.train(Recipe.load(recipe), "training.max_steps=1")


def test_the_public_names_are_complete():
    assert sorted(calm.__all__, key=str) == list(calm.__all__)
    assert set(calm.__all__) <= set(dir(calm))
    for name in calm.__all__:
        assert getattr(calm, name) is not None, name
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        calm.lode  # noqa: B018


def test_a_model_from_a_configuration_alone_names_its_random_autoencoder(tmp_path):
    fields = {"autoencoder_config": tiny.autoencoder_config(), "backbone_config": tiny.backbone()}
    with pytest.warns(UserWarning, match="the autoencoder of this CALM has random weights.*from_autoencoder"):
        model = CalmForCausalLM(CalmConfig(**fields))
    model.save_pretrained(tmp_path)
    codes = fields | {"autoencoder_config": tiny.codes_config(), "head_config": {"type": "categorical_flow"}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CalmForCausalLM.from_pretrained(tmp_path)
        CalmForCausalLM.from_autoencoder(tiny.autoencoder(), tiny.backbone())
        CalmForCausalLM(CalmConfig(**codes))
