"""The direction of imports between the packages, read from the source."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "calm"
UTILS = {"utils"}
MODELS = {"functional", "models", "compat"} | UTILS
MAY_IMPORT = {
    "functional": {"functional"},
    "utils": {"utils"},
    "compat": {"compat"},
    "models": MODELS,
    "generation": MODELS | {"generation", "data"},
    "checkpoints": MODELS | {"generation", "checkpoints"},
    "data": {"data"} | UTILS,
    "evaluation": MODELS | {"generation", "checkpoints", "data", "evaluation"},
    "training": MODELS | {"generation", "checkpoints", "data", "evaluation", "training", "compat"},
    "serving": MODELS | {"generation", "checkpoints", "data", "serving"},
    "report": {"evaluation", "report"},
    "workflows": {"cli"} ^ {path.name for path in SOURCE.iterdir() if path.is_dir()},
}
# The model classes offer `generate`, `from_pretrained` and `candidate_generator` as methods, whose code is in the
# folders above them.
EXCEPTIONS = {
    ("models/modeling_calm.py", "generation"),
    ("models/modeling_calm.py", "checkpoints"),
    ("models/modeling_autoencoder.py", "checkpoints"),
    ("models/drafters/base.py", "generation"),
}


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_imports_point_one_way():
    for folder, allowed in MAY_IMPORT.items():
        for path in (SOURCE / folder).rglob("*.py"):
            for module in imported_modules(path):
                if module.startswith("calm."):
                    target = module.split(".")[1]
                    exception = (path.relative_to(SOURCE).as_posix(), target) in EXCEPTIONS
                    assert target in allowed or exception, f"{path} imports {module}"


def test_every_folder_has_its_rule():
    folders = {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {*MAY_IMPORT, "cli", "recipes"}


FORMER = {"calm.completions": "complete", "calm.evaluation.bootstrap": "brier_difference"}  # modules that moved


def test_only_the_public_api_and_the_entry_point_are_at_the_top():
    assert {path.name for path in SOURCE.glob("*.py")} == {"__init__.py", "__main__.py", "completions.py"}


def test_modules_that_moved_are_found_under_their_former_names():
    for module, name in FORMER.items():
        with pytest.warns(FutureWarning, match="is now"):
            assert callable(getattr(importlib.import_module(module), name))
        sys.modules.pop(module)


def test_functional_imports_torch_alone():
    for path in (SOURCE / "functional").glob("*.py"):
        roots = {module.split(".")[0] for module in imported_modules(path)}
        assert roots <= {"torch", "calm", "math", "collections", "contextlib", "dataclasses", "typing"}, path


def test_nothing_imports_the_command_line():
    for path in SOURCE.rglob("*.py"):
        if "cli" not in path.parts and path != SOURCE / "__main__.py":
            assert not any(module.startswith("calm.cli") for module in imported_modules(path)), path


def test_import_is_light():
    heavy = ["transformers.trainer", "fastapi", "matplotlib", "datatrove", "typer", "lm_eval"]
    code = f"import calm, sys; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_files_stay_readable():
    for path in SOURCE.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path


def test_every_loading_call_refuses_the_code_of_a_checkpoint():
    loading = ("from_pretrained", "from_config")
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            place = f"{path}:{node.lineno}"
            if name.endswith(loading):
                refused = given.get("trust_remote_code")
                assert isinstance(refused, ast.Constant), place
                assert refused.value is False, place
            assert "custom_generate" not in given, place
