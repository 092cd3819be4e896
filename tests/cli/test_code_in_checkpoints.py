"""Nothing of a checkpoint is run, whatever the user's own text on standard input begins with."""

import io
import json
import shutil
import sys

import pytest
import tiny

from calm.cli import main as cli
from calm.data.tokenizer import train_tokenizer

CODE = """
open({flag!r}, "w").close()
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
class Config(PretrainedConfig):
    model_type = "own_code"
class Model(PreTrainedModel):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
def generate(model, *arguments, **others):
    return None
"""
OWN_CLASSES = {
    "AutoConfig": "own_code.Config",
    "AutoModel": "own_code.Model",
    "AutoModelForCausalLM": "own_code.Model",
    "AutoTokenizer": ["own_code.Tokenizer", "own_code.Tokenizer"],
}


class StandardInput(io.StringIO):
    """Text that would be consent to transformers' question, and how often it was read line by line."""

    questions = 0

    def readline(self, *arguments):
        self.questions += 1
        return super().readline(*arguments)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny CALM with its tokenizer, and text."""
    directory = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(["a text of a few words"] * 20, 262)
    tiny.calm(vocab_size=len(tokenizer)).save_pretrained(directory / "calm")
    tokenizer.save_pretrained(directory / "calm")
    (directory / "text").mkdir()
    (directory / "text" / "a.txt").write_text("a text of a few words " * 100)
    return directory


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def unknown_model_type(model):
    edit(model / "config.json", model_type="own_code", auto_map=OWN_CLASSES)


def tokenizer_class(model):
    edit(model / "tokenizer_config.json", tokenizer_class="Tokenizer", auto_map=OWN_CLASSES)


def kernels(model):
    config = json.loads((model / "config.json").read_text())
    edit(model / "config.json", backbone_config=config["backbone_config"] | {"attn_implementation": "own/code"})


def known_model_type(model):
    edit(model / "config.json", auto_map=OWN_CLASSES)
    edit(model / "tokenizer_config.json", auto_map=OWN_CLASSES)


def custom_generate(model):
    (model / "custom_generate").mkdir()
    shutil.copy(model / "own_code.py", model / "custom_generate" / "generate.py")


COMMANDS = {
    "generate": ["generate", "MODEL", "--prompt", "-", "--max-new-tokens", "4"],
    "prepare": ["prepare", "TEXT", "--tokenizer", "MODEL", "-o", "OUTPUT"],
    "evaluate": ["evaluate", "MODEL", "--data", "DATA", "--blocks", "1", "--block-size", "16"],
    "info": ["info", "MODEL"],
    "convert": ["convert", "MODEL", "OUTPUT"],
    "serve": ["serve", "MODEL", "--port", "0"],
    "train": ["train", "RECIPE", "model.pretrained=MODEL", "output_dir=OUTPUT"],
}


# `calm serve` leaves its open port to the end of the process when a model cannot be loaded.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("attack", [unknown_model_type, tokenizer_class, kernels, known_model_type, custom_generate])
def test_no_command_runs_code_of_a_checkpoint_or_asks_for_consent(directory, tmp_path, monkeypatch, capsys, attack):
    model, flag = tmp_path / "model", tmp_path / "code_ran"
    shutil.copytree(directory / "calm", model)
    (model / "own_code.py").write_text(CODE.format(flag=str(flag)))
    attack(model)
    data, recipe = tmp_path / "data", tmp_path / "recipe.yaml"
    assert (
        run(monkeypatch, capsys, "prepare", directory / "text", "--tokenizer", directory / "calm", "-o", data)[0] == 0
    )
    recipe.write_text(
        f"stage: calm\ndata: {{train: {data}, block_size: 16}}\nmodel: {{pretrained: x}}\n"
        "training: {max_steps: 1, per_device_train_batch_size: 1, eval_strategy: 'no', use_cpu: true}\n"
    )
    for name, words in COMMANDS.items():
        if name == "serve" and attack in (known_model_type, custom_generate):
            continue  # it would serve
        places = {"MODEL": model, "TEXT": directory / "text", "DATA": data, "RECIPE": recipe, "OUTPUT": tmp_path / name}
        words = [word.replace("MODEL", str(model)) if "=" in word else str(places.get(word, word)) for word in words]
        words = [word.replace("OUTPUT", str(tmp_path / name)) for word in words]
        code, questions, error = run(monkeypatch, capsys, *words)
        assert not flag.exists(), name
        assert questions == 0, name
        assert code in (0, 2), name
        # Without a terminal, progress is printed in lines; a refusal is one line.
        assert code == 0 or len(error.splitlines()) == 1, name
        assert "trust_remote_code" not in error, name
    if attack in (unknown_model_type, kernels):
        assert "calm runs no code of a checkpoint" in run(monkeypatch, capsys, "info", model)[2]


def test_the_harness_runs_no_code_of_a_checkpoint(directory, tmp_path, monkeypatch):
    from calm.evaluation.harness import CalmHarness

    model, flag = tmp_path / "model", tmp_path / "code_ran"
    shutil.copytree(directory / "calm", model)
    (model / "own_code.py").write_text(CODE.format(flag=str(flag)))
    monkeypatch.setattr(sys, "stdin", StandardInput("1\n"))
    for attack in (tokenizer_class, unknown_model_type):
        attack(model)
        with pytest.raises(ValueError, match="calm runs no code of a checkpoint"):
            CalmHarness(str(model))
    with pytest.raises(ValueError, match="leave trust_remote_code out"):
        CalmHarness(str(directory / "calm"), trust_remote_code=True)
    assert not flag.exists()


def test_templates_of_a_checkpoint_run_in_a_sandbox(directory):
    from calm.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(directory / "calm")
    tokenizer.chat_template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(Exception, match="unsafe"):
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)


def run(monkeypatch, capsys, *words):
    """Exit code, questions on standard input, and error output of a command."""
    standard_input = StandardInput("1\ny\nyes\nChapter one\n")
    monkeypatch.setattr(sys, "stdin", standard_input)
    monkeypatch.setattr(sys, "argv", ["calm", *map(str, words)])
    code = 0
    try:
        cli.main()
    except SystemExit as stopped:
        code = stopped.code or 0
    return code, standard_input.questions, capsys.readouterr().err
