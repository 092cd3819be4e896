"""The direction of imports between the packages, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "calm"
MAY_IMPORT = {
    "functional": {"functional"},
    "models": {"functional", "models", "paths"},
    "data": {"data", "files", "paths"},
    "evaluation": {"functional", "models", "data", "evaluation", "completions", "device"},
    "training": {"functional", "models", "data", "evaluation", "training", "files", "paths"},
    "report": {"evaluation", "report"},
    "serving": {"functional", "models", "data", "serving", "device"},
}


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_imports_point_one_way():
    for room, allowed in MAY_IMPORT.items():
        for path in (SOURCE / room).rglob("*.py"):
            for module in imported_modules(path):
                if module.startswith("calm."):
                    assert module.split(".")[1] in allowed, f"{path} imports {module}"


def test_functional_imports_torch_alone():
    for path in (SOURCE / "functional").glob("*.py"):
        roots = {module.split(".")[0] for module in imported_modules(path)}
        assert roots <= {"torch", "calm", "math", "collections", "contextlib"}, path


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
