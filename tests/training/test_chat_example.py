"""The chat example answers what it was taught."""

import runpy
from pathlib import Path

from calm.checkpoints.loading import load_model
from calm.data.conversations import prepare_conversations
from calm.data.prepare import prepare
from calm.data.text import render_chat
from calm.data.tokenizer import load_tokenizer, train_tokenizer
from calm.training.recipe.recipe import Recipe
from calm.training.run import train

EXAMPLE = Path(__file__).parents[2] / "examples" / "chat"
BACKBONE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "initializer_range": 0.06}  # fmt: skip


def test_the_template_separates_prompts_from_answers():
    tokenizer = train_tokenizer(["User: Assistant: Paris. Rome."] * 10, 270)
    tokenizer.chat_template = (EXAMPLE / "template.jinja").read_text()
    messages = [{"role": "user", "content": "France?"}, {"role": "assistant", "content": "Paris."}]
    assert render_chat(tokenizer, messages[:1], add_generation_prompt=True) == "User: France?\nAssistant:"
    assert render_chat(tokenizer, messages) == "User: France?\nAssistant: Paris."
    assert render_chat(tokenizer, [*messages, messages[0]], True).endswith("Paris.\nUser: France?\nAssistant:")


def test_a_tiny_model_that_the_recipe_trained_answers_its_questions(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    make_chats = runpy.run_path(str(EXAMPLE / "make_chats.py"))
    answers = runpy.run_path(str(EXAMPLE / "answers.py"))
    pairs = make_chats["questions"]()[::16]
    texts = [f"User: {question}\nAssistant: {answer}" for question, answer in make_chats["questions"]()]
    train_tokenizer(texts, 512).save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text("\n".join(texts) * 4)
    prepare([tmp_path / "text.txt"], load_tokenizer(tmp_path / "base"), tmp_path / "text")
    base = Recipe.from_dict(
        {
            "stage": "calm",
            "output_dir": str(tmp_path / "calm"),
            "data": {"train": str(tmp_path / "text"), "block_size": 256},
            "model": {
                "autoencoder": {"type": "codes", "patch_size": 2, "code_size": 16},
                "backbone": BACKBONE,
                "head": {"type": "categorical_flow", "hidden_size": 64},
            },
            "training": {"max_steps": 2, "use_cpu": True, "warmup_steps": 0, "report_to": "none",
                         "per_device_train_batch_size": 4},
        }
    )  # fmt: skip
    make_chats["write"](str(train(base)), tmp_path / "chats")
    tokenizer = load_tokenizer(tmp_path / "chats" / "tokenizer")
    records = tmp_path / "few.jsonl"
    lines = (tmp_path / "chats" / "chats.jsonl").read_text().splitlines(keepends=True)
    records.write_text("".join(lines[: len(make_chats["questions"]())][::16] * 4))
    prepare_conversations([records], tokenizer, tmp_path / "tokens")
    recipe = Recipe.load(
        "recipes/fine_tuning/chat.yaml",
        [
            f"model.pretrained={tmp_path / 'calm'}",
            f"data.train={tmp_path / 'tokens'}",
            f"output_dir={tmp_path / 'chat'}",
            "training.num_train_epochs=80",
            "training.per_device_train_batch_size=4",
            "training.use_cpu=true",
            "training.report_to=none",
        ],
    )
    output = train(recipe)
    wrong = answers["wrong_answers"](load_model(output), load_tokenizer(output), pairs)
    assert len(wrong) <= 1, wrong
