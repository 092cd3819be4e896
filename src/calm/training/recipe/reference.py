"""The reference of all recipe keys in Markdown: ``python -m calm.training.recipe.reference``."""

import dataclasses
import inspect
import re
from types import UnionType
from typing import Any, Union, get_args, get_origin

from calm.models.configuration_autoencoder import CalmAutoencoderConfig
from calm.models.heads import find_head, head_types
from calm.training.recipe.recipe import TRAINING_DEFAULTS, Recipe
from calm.training.recipe.sections import BaselineModel, CalmModel, CodesSection, DataSection, FineTunedModel

_TYPES: dict[Any, str] = {str: "text", int: "integer", float: "number", bool: "true or false"}
_DOCUMENTED = re.compile(r"^(\w+(?:, \w+)*): (.*)$")


def recipe_reference() -> str:
    """Return the reference as Markdown."""
    parts = [
        "# Recipe keys",
        "A recipe is a YAML file. On the command line, `dotted.key=value` overrides a key. A key without a default is "
        "required; the default `-` stands for none.",
        _section("Top level", "", Recipe),
        _section("`data`", "data.", DataSection),
        _section("`model` of stage `calm`", "model.", CalmModel),
        _section("`model.autoencoder` as a mapping: token codes", "model.autoencoder.", CodesSection),
        *(
            _config(f"`model.head` of type `{name}`", "model.head.", find_head(name).config_class)
            for name in head_types()
        ),
        _section("`model` of stage `baseline`", "model.", BaselineModel),
        _section("`model` in fine-tuning", "model.", FineTunedModel),
        _config("`model` of stage `autoencoder`", "model.", CalmAutoencoderConfig),
        "## `training`",
        "Fields of [transformers.TrainingArguments](https://huggingface.co/docs/transformers/main_classes/trainer). "
        "Defaults that differ from those of transformers:",
        _table([(f"training.{name}", "", repr(value), "") for name, value in TRAINING_DEFAULTS.items()]),
    ]
    return "\n\n".join(parts) + "\n"


def _section(title: str, prefix: str, section: Any) -> str:
    """Return the table of a dataclass whose fields have their help in their metadata."""
    rows = [
        (prefix + each.name, _type(each.type), _default(each), each.metadata["help"])
        for each in dataclasses.fields(section)
    ]
    return f"## {title}\n\n{_table(rows)}"


def _config(title: str, prefix: str, config: Any) -> str:
    """Return the table of a configuration, with the help of its docstring."""
    help_texts = documented_arguments(config)
    rows = [
        (prefix + each.name, _type(each.type), _default(each), help_texts[each.name])
        for each in dataclasses.fields(config)
        if each.name in help_texts
    ]
    return f"## {title}\n\n{_first_line(config)}\n\n{_table(rows)}"


def documented_arguments(documented: Any) -> dict[str, str]:
    """Return the text of every argument in the section Args of a docstring."""
    _, _, arguments = inspect.cleandoc(documented.__doc__ or "").partition("Args:\n")
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in arguments.splitlines():
        if line and not line.startswith("    "):
            break  # the next section
        if line.startswith("        ") and names:
            texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
        elif (found := _DOCUMENTED.match(line.strip())) is not None:
            names = found[1].split(", ")
            texts |= dict.fromkeys(names, found[2])
    return texts


def _first_line(documented: Any) -> str:
    return " ".join(inspect.cleandoc(documented.__doc__ or "").partition("\n\n")[0].split()).replace("``", "`")


def _type(annotation: Any) -> str:
    if get_origin(annotation) in (Union, UnionType):
        names = list(dict.fromkeys(_type(part) for part in get_args(annotation) if part is not type(None)))
        return "number" if set(names) == {"number", "integer"} else " or ".join(names)
    if dataclasses.is_dataclass(annotation) or get_origin(annotation) is dict:
        return "mapping"
    if args := get_args(annotation):
        return " or ".join(str(value) for value in args)
    return _TYPES.get(annotation, str(annotation))


def _default(each: Any) -> str:
    if each.default is dataclasses.MISSING:
        return ""
    return "-" if each.default is None else f"`{each.default}`"


def _table(rows: list[tuple[str, str, str, str]]) -> str:
    lines = [f"| `{name}` | {kind} | {default} | {text.replace('``', '`')} |" for name, kind, default, text in rows]
    return "\n".join(["| Key | Type | Default | Meaning |", "|---|---|---|---|", *lines])


if __name__ == "__main__":
    print(recipe_reference(), end="")
