"""The option ``--import`` of the commands: import a module that registers heads, samplers or metrics of your own."""

import functools
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="MODULE",
        help="Python module, or .py file, to import first: it registers heads, samplers or metrics of your own. May "
        "be given several times",
    ),
]


def with_imports(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the option ``--import`` to a command: the modules are imported before the command runs."""

    @functools.wraps(command)
    def importing(*arguments: Any, imports: list[str] | None = None, **options: Any) -> Any:
        import_modules(imports or [])
        return command(*arguments, **options)

    signature = inspect.signature(command)
    parameter = inspect.Parameter("imports", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Imports)
    importing.__signature__ = signature.replace(parameters=[*signature.parameters.values(), parameter])  # type: ignore[attr-defined]
    importing.__annotations__ = {**command.__annotations__, "imports": Imports}
    return importing


def import_modules(names: list[str]) -> None:
    """Import modules by their names, or from the paths of their files; a module is imported once.

    Modules of the current directory are found, as with ``python -m``.

    Raises:
        ValueError: when a module or file does not exist.
    """
    for name in names:
        if name.endswith(".py"):
            _import_file(Path(name))
        else:
            _import_name(name)


def _import_name(name: str) -> None:
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise ValueError(f"--import {name}: the module imports {error.name}, which is not installed.") from error
        raise ValueError(
            f"--import {name}: no such module. Name a module of the current directory or of an installed package, or a "
            "file that ends in .py."
        ) from error


def _import_file(path: Path) -> None:
    if not path.is_file():
        from calm.utils.paths import did_you_mean

        raise ValueError(f"--import {path}: no such file{did_you_mean(path)}")
    name = path.stem
    if (loaded := sys.modules.get(name)) is not None:
        if Path(getattr(loaded, "__file__", None) or "").resolve() != path.resolve():
            raise ValueError(f"--import {path}: another module is named {name}. Rename the file.")
        return
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.insert(0, folder)  # the module finds its neighbours, and can be pickled for worker processes
    importlib.import_module(name)
