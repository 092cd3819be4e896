"""A drafter from prompts to text, on a tiny token model, through Python and the command line."""

import json
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from calm import load_drafter
from calm.cli.main import main
from calm.data.tokenizer import train_tokenizer
from calm.generation.drafting import generate_with_drafter
from calm.training.drafting.train import DraftTraining
from calm.workflows.drafter import DrafterPlan, make_drafter

TEXTS = ["the quick brown fox jumps over the lazy dog", "a long day by the river", "words and more words"] * 10


@pytest.fixture(scope="module")
def target_directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("target")
    tokenizer = train_tokenizer(TEXTS, 300)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=0.1,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            pad_token_id=tokenizer.eos_token_id,
        )
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def prompts(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 290, (48, 4), generator=generator).tolist()


def plan(kind="mtp", epochs=12):
    training = DraftTraining(num_epochs=epochs, tokens_per_step=400, save_steps=3)
    return DrafterPlan(kind, num_tokens=3, shortlist_size=200, continuation_tokens=20, training=training)


def ignore(stage, done, total, note):
    pass


def test_a_trained_drafter_saves_passes_and_leaves_the_text_alone(target_directory, tmp_path):
    target = LlamaForCausalLM.from_pretrained(target_directory).eval()
    stages = []
    make_drafter(target, prompts(), plan(epochs=40), tmp_path / "drafter", lambda stage, *_: stages.append(stage))
    assert list(dict.fromkeys(stages)) == ["continuations", "features", "train drafter"]
    drafter = load_drafter(tmp_path / "drafter").attach(target)
    ids = torch.tensor(prompts()[:8])
    mask = torch.ones_like(ids)
    expected = target.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    result = generate_with_drafter(target, drafter, ids, max_new_tokens=20)
    assert result.sequences.tolist() == expected.tolist()
    assert result.statistics.tokens_per_verification > 1.2  # 1 without a drafter; these prompts were trained on


@pytest.mark.parametrize("stop_in", ["continuations", "train drafter"])
def test_an_interrupted_run_resumes_bit_for_bit(target_directory, tmp_path, stop_in):
    target = LlamaForCausalLM.from_pretrained(target_directory).eval()
    torch.manual_seed(0)
    whole = make_drafter(target, prompts(), plan(epochs=2), tmp_path / "whole", ignore)
    seen = []

    def interrupt(stage, done, total, note):
        seen.append(stage)
        if seen.count(stop_in) == (1 if stop_in == "continuations" else 5):
            raise KeyboardInterrupt

    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        make_drafter(target, prompts(), plan(epochs=2), tmp_path / "cut", interrupt)
    if stop_in == "continuations":
        # The second batch is sampled: the same numbers, so that the runs can be compared.
        (tmp_path / "cut" / "continuations.jsonl").write_text((tmp_path / "whole" / "continuations.jsonl").read_text())
    torch.manual_seed(0)
    resumed = make_drafter(target, prompts(), plan(epochs=2), tmp_path / "cut", ignore)
    if stop_in == "train drafter":
        for name, tensor in whole.state_dict().items():
            assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert not (tmp_path / "cut" / "trainer_state.pt").exists()


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["calm", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    return ended.value.code or 0, said.out, said.err


def test_the_commands_train_and_use_a_drafter(target_directory, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS[:6]) + "\n", encoding="utf-8")
    code, out, err = run(
        monkeypatch, capsys, "drafter", target_directory, "--prompts", tmp_path / "prompts.txt", "-o",
        tmp_path / "drafter", "--type", "categorical_flow", "--continuation-tokens", 8, "--epochs", 2,
    )  # fmt: skip
    assert code == 0, err
    assert "next: calm generate" in out
    lines = (tmp_path / "drafter" / "continuations.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(json.loads(line)["continuation"] for line in lines)
    assert len(lines) == 6
    base = ("generate", target_directory, "--prompt", "the quick", "--max-new-tokens", 12, "--temperature", 0)
    _, plain, _ = run(monkeypatch, capsys, *base)
    code, drafted, err = run(monkeypatch, capsys, *base, "--drafter", tmp_path / "drafter")
    assert code == 0, err
    assert drafted.startswith(plain.rstrip("\n"))
    assert "tokens per pass of the model" in drafted


def test_mistakes_are_one_line(target_directory, tmp_path, monkeypatch, capsys):
    generate = ("generate", target_directory, "--prompt", "a", "--drafter")
    train = ("drafter", target_directory, "-o", tmp_path / "drafter", "--prompts")
    (tmp_path / "empty.txt").write_text("\n", encoding="utf-8")
    for arguments, message in [
        ((*generate, tmp_path / "nothing"), "is not the directory of a drafter"),
        ((*train, tmp_path / "none.txt"), "no such file"),
        ((*train, tmp_path / "empty.txt"), "there is no prompt to train on"),
        ((*train, tmp_path / "empty.txt", "--type", "medusa"), "--type must be one of"),
    ]:
        code, _, err = run(monkeypatch, capsys, *arguments)
        assert code == 2, arguments
        assert message in err
        assert err.strip().count("\n") == 0
