"""``--import``: modules of the user's that a command imports first."""

import sys

import pytest

from calm.cli import main as cli
from calm.cli.imports import import_modules


@pytest.fixture(autouse=True)
def _own_modules(monkeypatch, tmp_path):
    """Work in a directory of its own, and forget what was imported there."""
    known, path = set(sys.modules), list(sys.path)
    monkeypatch.chdir(tmp_path)
    yield
    for name in set(sys.modules) - known:
        if str(tmp_path) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]
    sys.path[:] = path


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["calm", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    captured = capsys.readouterr()
    return stopped.value.code or 0, captured.out, captured.err


def test_a_module_of_the_current_directory_and_a_file_are_imported_once(tmp_path):
    (tmp_path / "my_first_part.py").write_text("import my_neighbour\n")
    (tmp_path / "my_neighbour.py").write_text("")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "my_second_part.py").write_text("import my_third_part\n")
    (tmp_path / "elsewhere" / "my_third_part.py").write_text("")
    names = ["my_first_part", "elsewhere/my_second_part.py"]
    import_modules(names)
    first = sys.modules["my_first_part"]
    import_modules(names)
    assert sys.modules["my_first_part"] is first
    assert "my_third_part" in sys.modules


@pytest.mark.parametrize("command", ["train", "generate", "evaluate", "serve", "study", "info", "convert", "harness"])
def test_commands_import_before_they_run(monkeypatch, capsys, tmp_path, command):
    (tmp_path / "my_part.py").write_text("raise ValueError('my_part was imported')\n")
    needed = {"evaluate": ("x", "--data", "x"), "study": ("x", "-o", "x"), "convert": ("x", "y"),
              "harness": ("x", "--tasks", "x")}  # fmt: skip
    code, _, error = run(monkeypatch, capsys, command, *needed.get(command, ("x",)), "--import", "my_part")
    assert (code, error) == (2, "calm: my_part was imported\n")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_missing_part", "--import my_missing_part: no such module"),
        ("my_missing_part.py", "--import my_missing_part.py: no such file"),
        ("my_hungry_part", "the module imports my_absent_library, which is not installed"),
        ("json.py", "--import json.py: another module is named json. Rename the file."),
    ],
)
def test_a_module_that_cannot_be_imported_is_named_in_one_line(monkeypatch, capsys, tmp_path, name, message):
    (tmp_path / "my_hungry_part.py").write_text("import my_absent_library\n")
    (tmp_path / "json.py").write_text("")
    code, _, error = run(monkeypatch, capsys, "info", "x", "--import", name)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1
