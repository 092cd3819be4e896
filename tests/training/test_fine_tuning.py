"""Going on from trained models, on documents and on prompts and responses."""

import copy
import json
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from test_run import BACKBONE, autoencoder_recipe, calm_recipe, recipe, workspace  # noqa: F401
from transformers import AutoModelForCausalLM

from calm import CalmForCausalLM
from calm.checkpoints.reference import save_reference
from calm.data.conversations import ConversationBlocks, prepare_conversations
from calm.data.prepare import prepare
from calm.data.tokenizer import load_tokenizer
from calm.generation.prompts import align_prompt
from calm.training.loop.metrics_log import read_metrics
from calm.training.recipe.cost import recipe_cost
from calm.training.recipe.models import build_model, outline_model
from calm.training.run import train

ANSWERS = {"alpha": "gamma gamma", "beta": "delta", "gamma": "alpha alpha alpha", "delta": "beta beta"}
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer(workspace):  # noqa: F811
    return load_tokenizer(workspace / "train")


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def examples(blocks):
    """Prompt and response ids of every example, as the blocks hold them."""
    found = []
    for block in blocks:
        ids, labels = block["input_ids"], block["labels"]
        is_response = labels.ne(-100)
        assert torch.equal(ids[is_response], labels[is_response])
        edges = [0, *(is_response.int().diff().nonzero().flatten() + 1).tolist(), len(ids)]
        spans = [ids[start:end].tolist() for start, end in pairwise(edges)]
        found += list(zip(spans[::2], spans[1::2], strict=False))
    return found


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_examples_stand_in_blocks_as_generation_meets_them(tmp_path, tokenizer, patch_size):
    records = [{"prompt": "alpha " * (i % 5), "response": "beta" + " gamma" * (i % 3)} for i in range(40)]
    source = write(tmp_path / "chats.jsonl", records)
    manifest = prepare_conversations([source], tokenizer, tmp_path / "data")
    assert manifest["num_examples"] == 40
    blocks = ConversationBlocks(tmp_path / "data", 32, patch_size)
    found = examples(blocks)
    assert blocks.num_cut == 0
    assert len(found) == 40
    texts = set()
    for prompt, response in found:
        assert len(prompt) % patch_size == len(response) % patch_size == 0
        text = tokenizer.decode(prompt, skip_special_tokens=True)
        ids = torch.tensor([tokenizer(text)["input_ids"]], dtype=torch.long)
        aligned, _ = align_prompt(ids, None, patch_size, len(tokenizer), tokenizer.eos_token_id)
        assert prompt == aligned[0].tolist()
        assert response[-1] == tokenizer.eos_token_id
        texts.add((text, tokenizer.decode(response, skip_special_tokens=True)))
    assert texts == {(record["prompt"], record["response"]) for record in records}


def test_examples_longer_than_a_block_lose_the_front_of_the_prompt(tmp_path, tokenizer):
    records = [{"prompt": "alpha beta " * 20, "completion": "gamma"}, {"prompt": "a", "response": "delta " * 40}]
    prepare_conversations([write(tmp_path / "chats.jsonl", records)], tokenizer, tmp_path / "data")
    blocks = ConversationBlocks(tmp_path / "data", 16, 2)
    assert (blocks.num_cut, len(blocks)) == (2, 2)
    (first, answer), (second, long) = sorted(examples(blocks), key=lambda pair: len(pair[1]))
    assert "alpha beta alpha beta ".endswith(tokenizer.decode(first)[-8:])
    assert tokenizer.decode(answer, skip_special_tokens=True) == "gamma"
    assert (len(second), len(long)) == (2, 14)


def test_every_answer_of_a_chat_is_an_example(tmp_path, tokenizer):
    messages = [
        {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"}, {"role": "assistant", "content": "four"},
    ]  # fmt: skip
    source = write(tmp_path / "chats.jsonl", [{"messages": messages}])
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        prepare_conversations([source], tokenizer, tmp_path / "data")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    prepare_conversations([source], tokenizer, tmp_path / "data")
    texts = [
        [tokenizer.decode(ids, skip_special_tokens=True) for ids in pair]
        for pair in examples(ConversationBlocks(tmp_path / "data", 64, 2))
    ]
    assert sorted(texts) == [
        ["<user>one</><assistant>", "two</>"],
        ["<user>one</><assistant>two</><user>three</><assistant>", "four</>"],
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, r"line 2 holds neither messages nor the texts prompt and response \(found: text\)"),
        ({"prompt": "a", "response": ""}, "line 2 has an empty response"),
        ({"prompt": "a", "response": "\ud800"}, "line 2 holds half of a surrogate pair"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "line 2 holds half of a surrogate pair"),
        ({"messages": [{"role": "user"}]}, "line 2 has no message of the role assistant"),
        ({"messages": [{"role": "user", "content": "a"}]}, "line 2 has no message of the role assistant"),
    ],
)
def test_bad_examples_are_named_or_counted(tmp_path, tokenizer, record, message):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    source = write(tmp_path / "chats.jsonl", [{"prompt": "a", "response": "b"}, record])
    with pytest.raises(ValueError, match=message):
        prepare_conversations([source], tokenizer, tmp_path / "data")
    assert not (tmp_path / "data").exists()
    manifest = prepare_conversations([source], tokenizer, tmp_path / "data", on_bad="skip")
    assert manifest["num_examples"] == 1
    assert [bad["count"] for bad in manifest["skipped"].values()] == [1]
    assert prepare_conversations([source], tokenizer, tmp_path / "data", on_bad="skip") == manifest
    with pytest.raises(ValueError, match="prepared otherwise"):
        prepare_conversations([source], tokenizer, tmp_path / "data", on_bad="skip", seed=1)


def fine_tune(root, output, pretrained, data, stage="calm", **training):
    values = recipe(root, stage, output, {"pretrained": str(pretrained)}, **training)
    values.data.train, values.data.validation = str(data), None
    return values


@pytest.fixture(scope="module")
def chats(workspace):  # noqa: F811
    records = [{"prompt": f"{name} " * (1 + i % 3), "response": ANSWERS[name]} for i in range(60) for name in ANSWERS]
    path = workspace / "chats"
    prepare_conversations([write(workspace / "chats.jsonl", records)], load_tokenizer(workspace / "train"), path)
    return path


def test_a_fine_tuned_model_answers(workspace, chats):  # noqa: F811
    """Also where to end: the autoencoder saw documents end at every place of a patch."""
    documents = write(workspace / "short.jsonl", [{"text": f"{text}"} for text in ANSWERS.values()] * 100)
    prepare([documents], load_tokenizer(workspace / "train"), workspace / "short")
    autoencoder = autoencoder_recipe(workspace, "short_autoencoder")
    pretrain = calm_recipe(workspace, "short_calm", max_steps=6)
    autoencoder.data.train = pretrain.data.train = str(workspace / "short")
    pretrain.model.autoencoder = str(train(autoencoder))
    steps = {"max_steps": 600, "per_device_train_batch_size": 16, "learning_rate": 1e-2, "save_steps": 600}
    output = train(fine_tune(workspace, "tuned", train(pretrain), chats, **steps))
    model, tokenizer = CalmForCausalLM.from_pretrained(output).eval(), load_tokenizer(output)
    right = 0
    for name, answer in ANSWERS.items():
        ids = torch.tensor([tokenizer(f"{name} ")["input_ids"]])
        out = model.generate(
            ids, max_new_tokens=24, temperature=0.25, num_candidates=64, generator=torch.Generator().manual_seed(0)
        )
        right += tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == answer
    assert right >= 3, right


def test_a_run_says_that_examples_are_cut(workspace, chats, capsys):  # noqa: F811
    values = fine_tune(workspace, "cut", train(calm_recipe(workspace, "uncut", max_steps=2)), chats, max_steps=1)
    values.data.block_size = 8
    train(values)
    assert "examples are longer than a block of 8 tokens" in capsys.readouterr().err


def test_only_responses_have_a_loss(workspace, chats):  # noqa: F811
    model = CalmForCausalLM.from_pretrained(train(calm_recipe(workspace, "to_tune", max_steps=6)))
    block = {name: value[None] for name, value in ConversationBlocks(chats, 32, 2)[0].items()}
    other = block["labels"].ne(-100).unflatten(1, (-1, 2)).all(-1)

    def loss(labels):
        return model(block["input_ids"], labels=labels, generator=torch.Generator().manual_seed(0)).loss

    free = block["labels"].clone()
    free[:, :2] = 5  # the first patch has nothing to be predicted from
    assert torch.equal(loss(block["labels"]), loss(free))
    assert not torch.equal(loss(block["labels"]), loss(block["input_ids"]))
    assert 0 < other.sum() < other.numel()


def test_micro_batches_weigh_as_much_as_they_have_targets(workspace, chats):  # noqa: F811
    trained = train(calm_recipe(workspace, "to_tune", max_steps=6))
    whole = train(fine_tune(workspace, "tune_4x1", trained, chats, max_steps=4, per_device_train_batch_size=4))
    steps = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    pieces = train(fine_tune(workspace, "tune_1x4", trained, chats, max_steps=4, **steps))
    losses = [[record["loss"] for record in read_metrics(run) if "loss" in record] for run in (whole, pieces)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    counts = [block["labels"].ne(-100).sum() for block in ConversationBlocks(chats, 32, 2)]
    assert min(counts) < max(counts)


def test_a_released_checkpoint_is_fine_tuned(workspace, chats, tmp_path):  # noqa: F811
    model = CalmForCausalLM.from_pretrained(train(calm_recipe(workspace, "to_tune", max_steps=6)))
    with (
        pytest.warns(UserWarning, match="the reference has one dropout rate"),
        pytest.warns(UserWarning, match="trains and samples in its own way: head_config.num_target_samples 100 there"),
    ):
        save_reference(model, tmp_path / "released")
    load_tokenizer(workspace / "train").save_pretrained(tmp_path / "released")
    built = build_model(fine_tune(workspace, "from_released", tmp_path / "released", chats))
    assert built.training
    assert not any(parameter.requires_grad for parameter in built.autoencoder.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(built.state_dict()[name], value), name
    output = train(fine_tune(workspace, "from_released", tmp_path / "released", chats, max_steps=2))
    assert CalmForCausalLM.from_pretrained(output).config.patch_size == 2


def test_a_baseline_is_fine_tuned_on_the_same_data(workspace, chats):  # noqa: F811
    trained = train(recipe(workspace, "baseline", "baseline_to_tune", {"backbone": BACKBONE}, max_steps=4))
    output = train(fine_tune(workspace, "baseline_tuned", trained, chats, "baseline", max_steps=40))
    records = [record["loss"] for record in read_metrics(output) if "loss" in record]
    assert records[-1] < records[0]


def test_the_backbone_starts_from_a_token_model(workspace):  # noqa: F811
    source = train(recipe(workspace, "baseline", "warm_source", {"backbone": BACKBONE}, max_steps=4))
    values = calm_recipe(workspace, "warm", max_steps=2)
    values.model.backbone_weights = str(source)
    built = build_model(values)
    for name, value in AutoModelForCausalLM.from_pretrained(source).model.state_dict().items():
        assert torch.equal(built.backbone.state_dict()[name], value), name
    train(values)
    values.model.backbone = BACKBONE | {"intermediate_size": 64}
    with pytest.raises(ValueError, match=r"has another shape than model\.backbone \(layers\.0\.mlp\."):
        build_model(values)
    values.model.backbone = BACKBONE | {"rope_theta": 123.0}
    with pytest.raises(ValueError, match="has rope_parameters"):
        build_model(values)
    values.model.backbone, values.model.freeze_backbone = BACKBONE, True
    with pytest.raises(ValueError, match="holds a token model, whose backbone has yet to learn to read patches"):
        build_model(values)


def with_token_prediction(workspace, output, **training):  # noqa: F811
    values = calm_recipe(workspace, output, **training)
    values.model.mtp_weight = 1.0
    return values


def test_a_new_head_learns_on_a_frozen_backbone(workspace):  # noqa: F811
    source = train(with_token_prediction(workspace, "read", max_steps=6))
    values = with_token_prediction(workspace, "new_head", max_steps=12)
    values.model.backbone_weights, values.model.freeze_backbone = str(source), True
    values.model.head = {"type": "flow", "num_samples": 4}
    output = train(values)
    before, after = (CalmForCausalLM.from_pretrained(path) for path in (source, output))
    for name, value in before.state_dict().items():
        if name.startswith(("backbone.", "patch_embedding.", "mtp_head.", "autoencoder.")):
            assert torch.equal(value, after.state_dict()[name]), name
    records = [record for record in read_metrics(output) if "loss" in record]
    assert records[-1]["loss"] < records[0]["loss"]
    assert "token_cross_entropy" not in records[0]
    # Cheaper: the backbone is gone through forwards only, and no token is predicted.
    cheap, whole = (
        recipe_cost(each, after, 12)["training_flops"] for each in (values, with_token_prediction(workspace, "x"))
    )
    assert cheap < whole
    # Its own head goes on learning, in one piece or several.
    of_source = {"pretrained": str(source), "freeze_backbone": True}
    whole, parts = (
        recipe(workspace, "calm", name, of_source, max_steps=8, lr_scheduler_type="constant")
        for name in ("head_whole", "head_parts")
    )
    train(whole)
    parts.training["max_steps"] = 4
    train(parts)
    parts.training["max_steps"] = 8
    train(parts, allow_recipe_change=True)
    one, other = (load_file(workspace / name / "model.safetensors") for name in ("head_whole", "head_parts"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    changed = {
        name for name, tensor in load_file(source / "model.safetensors").items() if not torch.equal(tensor, one[name])
    }
    assert changed
    assert all(name.startswith("head.") for name in changed)


def test_decoded_draws_are_scored_where_a_trained_model_goes_on(workspace):  # noqa: F811
    source = train(with_token_prediction(workspace, "read", max_steps=6))
    model = {"pretrained": str(source), "freeze_backbone": True, "decoded_brier_weight": 5.0}
    values = recipe(workspace, "calm", "scored", model, max_steps=4)
    output = train(values)
    assert "decoded_brier" in next(record for record in read_metrics(output) if "loss" in record)
    assert CalmForCausalLM.from_pretrained(output).config.decoded_brier_weight == 5.0
    without = recipe(workspace, "calm", "x", {"pretrained": str(source), "freeze_backbone": True}, max_steps=4)
    costs = [recipe_cost(each, outline_model(each), 4)["training_flops"] for each in (values, without)]
    assert costs[0] > costs[1]
    values.model.decoded_brier_weight = -1.0
    with pytest.raises(ValueError, match="decoded_brier_weight must be at least 0, got -1"):
        build_model(values)


def test_token_prediction_is_added_to_a_trained_model(workspace):  # noqa: F811
    source = train(calm_recipe(workspace, "without_tokens", max_steps=6))
    with pytest.raises(ValueError, match="trained without it"):
        CalmForCausalLM.from_pretrained(source).generate(sampler="mtp")
    added = {"mtp_weight": 1.0, "mtp_type": "autoregressive"}
    model = added | {"pretrained": str(source), "freeze_backbone": True}
    values = recipe(workspace, "calm", "with_tokens", model, max_steps=30, learning_rate=1e-2)
    output = train(values)
    records = [record for record in read_metrics(output) if "token_cross_entropy" in record]
    assert records[-1]["token_cross_entropy"] < records[0]["token_cross_entropy"] - 0.1
    before, after = (load_file(path / "model.safetensors") for path in (source, output))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head"}
    assert {name.split(".")[0] for name in after.keys() - before.keys()} == {"mtp_head"}
    CalmForCausalLM.from_pretrained(output).generate(sampler="mtp", max_new_tokens=4)
    # What learns counts: more than a head alone, less than everything.
    alone, all_of_it = (
        recipe(workspace, "calm", "x", each, max_steps=30)
        for each in ({"pretrained": str(source), "freeze_backbone": True}, added | {"pretrained": str(source)})
    )
    costs = [recipe_cost(each, outline_model(each), 30)["training_flops"] for each in (alone, values, all_of_it)]
    assert costs == sorted(costs)
    assert costs[0] < costs[1] < costs[2]
    values.model.pretrained = str(output)
    with pytest.raises(ValueError, match=r"has an MTP head already \(mtp_type autoregressive\)"):
        build_model(values)
    with pytest.raises(ValueError, match=r"mtp_type needs a model\.mtp_weight beside it"):
        recipe(workspace, "calm", "x", {"pretrained": str(source), "mtp_type": "independent"})


def test_a_frozen_backbone_must_be_a_trained_one_that_fits(workspace, tmp_path):  # noqa: F811
    model = {"autoencoder": str(workspace / "autoencoder"), "backbone": BACKBONE, "freeze_backbone": True}
    with pytest.raises(ValueError, match=r"model.freeze_backbone is for a backbone that was trained"):
        recipe(workspace, "calm", "refused", model)
    with pytest.raises(ValueError, match=r"model.freeze_backbone must be true or false, got 'yes'"):
        recipe(workspace, "calm", "refused", model | {"freeze_backbone": "yes"})
    autoencoder = autoencoder_recipe(workspace, "other_patches", max_steps=2)
    autoencoder.model.config["patch_size"] = 4
    other = calm_recipe(workspace, "of_other_patches", max_steps=2)
    other.model.autoencoder = str(train(autoencoder))
    values = calm_recipe(workspace, "refused")
    values.model.backbone_weights = str(train(other))
    with pytest.raises(ValueError, match="has patches of 4 tokens, not 2"):
        build_model(values)
    values = with_token_prediction(workspace, "of_other_tokens", max_steps=2)
    values.model.mtp_type = "autoregressive"
    values.model.backbone_weights = str(train(with_token_prediction(workspace, "of_tokens", max_steps=2)))
    with pytest.raises(ValueError, match="has mtp_type independent, not autoregressive"):
        build_model(values)


def test_what_does_not_fit_is_refused(workspace, chats):  # noqa: F811
    autoencoder = workspace / "autoencoder"
    with pytest.raises(ValueError, match="holds a CalmAutoencoder, which is of stage autoencoder"):
        train(fine_tune(workspace, "refused", autoencoder, chats))
    with pytest.raises(ValueError, match="an autoencoder is trained on documents"):
        train(fine_tune(workspace, "refused", autoencoder, chats, "autoencoder"))
    with pytest.raises(ValueError, match="says all there is to say about the model; leave out backbone"):
        recipe(workspace, "calm", "refused", {"pretrained": "x", "backbone": BACKBONE})
    with pytest.raises(ValueError, match=r"^model\.pretrained: no model at nowhere/at/all"):
        train(fine_tune(workspace, "refused", "nowhere/at/all", chats))
    assert not (workspace / "refused").exists()
