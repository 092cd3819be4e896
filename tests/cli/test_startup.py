"""What the command line imports before a command runs, and the environment it sets."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

import calm
from calm.cli.environment import wait_passively

HEAVY = ("torch", "transformers", "numpy", "huggingface_hub", "datasets")


def python(code, **environment):
    """Output of a program in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment or None)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_version_usage_errors_and_completion_import_neither_torch_nor_transformers():
    code = f"""
import os, sys
from calm.cli.main import main
for arguments in (["--help"], ["--version"], ["train", "--help"], ["trian"], ["train"], ["generate", "--temprature=1"]):
    sys.argv = ["calm", *arguments]
    try:
        main()
    except SystemExit:
        pass
os.environ.update(_CALM_COMPLETE="complete_bash", COMP_WORDS="calm ge", COMP_CWORD="1")
sys.argv = ["calm"]
try:
    main()
except SystemExit:
    pass
print("imported:", [name for name in {HEAVY} if name in sys.modules])
"""
    output = python(code)
    assert "Usage: calm" in output
    assert f"calm {calm.__version__}" in output
    assert output.splitlines()[-2:] == ["generate", "imported: []"]


def test_import_calm_changes_no_environment_and_imports_nothing_heavy():
    code = f"import os; before = dict(os.environ); import calm, sys; assert before == dict(os.environ); " \
           f"print([name for name in {HEAVY} if name in sys.modules])"  # fmt: skip
    assert python(code) == "[]\n"


@pytest.mark.parametrize("first", ["import calm", "from transformers import LlamaForCausalLM"])
def test_auto_classes_know_our_classes_whatever_is_imported_first(first, tmp_path):
    tiny.calm().save_pretrained(tmp_path / "calm")
    tiny.autoencoder().save_pretrained(tmp_path / "autoencoder")
    code = f"""
{first}
import calm
from transformers import LlamaForCausalLM, AutoModel, AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained(r"{tmp_path / "calm"}")).__name__)
print(type(AutoModel.from_pretrained(r"{tmp_path / "autoencoder"}")).__name__)
"""
    assert python(code).split() == ["CalmForCausalLM", "CalmAutoencoder"]


@pytest.mark.parametrize(("make", "auto_class"), [(tiny.calm, "AutoModelForCausalLM"), (tiny.autoencoder, "AutoModel")])
def test_auto_classes_without_our_import_name_the_package_to_install(make, auto_class, tmp_path):
    make().save_pretrained(tmp_path)
    code = f"""
from transformers import {auto_class}
try:
    {auto_class}.from_pretrained(r"{tmp_path}")
except ValueError as error:
    print(error)
"""
    assert "has model type `calm-lm" in python(code)


def test_every_public_name_is_there_and_known_to_type_checkers():
    assert set(calm.__all__) <= set(dir(calm))
    assert all(getattr(calm, name) is not None for name in calm.__all__)
    tree = ast.parse(Path(calm.__file__).read_text(encoding="utf-8"))
    checked = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imported = {alias.name: node.module for node in checked.body if isinstance(node, ast.ImportFrom)
                for alias in node.names}  # fmt: skip
    assert imported == calm._MODULES
    assert {*imported, "__version__"} == set(calm.__all__)
    with pytest.raises(AttributeError, match="module 'calm' has no attribute 'Clam'"):
        _ = calm.Clam


def test_commands_let_idle_threads_sleep_unless_the_user_chose_otherwise(monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY"):
        monkeypatch.delenv(name, raising=False)
    environment = {}
    monkeypatch.setattr("os.environ", environment)
    wait_passively()
    assert environment == {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
    environment.clear()
    environment["GOMP_SPINCOUNT"] = "1000"
    wait_passively()
    assert environment == {"GOMP_SPINCOUNT": "1000"}
