"""Recipes: one YAML file describes a training run.

```yaml
stage: calm                          # autoencoder | calm | baseline
output_dir: runs/calm
data: {train: data/train, validation: data/validation, block_size: 1024}
model:
  autoencoder: runs/autoencoder
  backbone: {hidden_size: 256, num_hidden_layers: 4}
  head: {type: energy}
training: {learning_rate: 3.0e-4}    # fields of transformers.TrainingArguments
```

`python -m calm.training.recipe.reference` prints all keys.
"""

import dataclasses
import difflib
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from calm.training.recipe.checks import (
    check_keys,
    check_smallest,
    check_training,
    check_types,
    training_fields,
    with_current_keys,
)
from calm.training.recipe.sections import (
    STAGES,
    AutoencoderModel,
    BaselineModel,
    CalmModel,
    DataSection,
    ModelSection,
    given_keys,
    key_names,
    model_keys,
    read_model,
)
from calm.utils.deprecation import RENAMED_CALM_FIELDS, rename_deprecated
from calm.utils.paths import nearest_existing

FAMILY = "family of recipes"
_RENAMED_RECIPES = {"recipes/single_gpu/finish.yaml": "recipes/single_gpu/head_finetune.yaml"}
_MAX_CHARACTERS, _MAX_VALUES, _MAX_DEPTH = 1_000_000, 10_000, 50  # of a recipe
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
# The paper's optimiser, and habits that suit language models; a recipe may change every one of them.
TRAINING_DEFAULTS: dict[str, Any] = {
    "learning_rate": 3e-4,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 2000,
    "weight_decay": 0.1,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "max_grad_norm": 1.0,
    "logging_steps": 10,
    "save_steps": 1000,
    "save_total_limit": 2,
    "report_to": "tensorboard",
}


@dataclass
class Recipe:
    """A training run, checked; the keys of the YAML file are its fields."""

    stage: str = field(metadata={"help": "autoencoder, calm or baseline"})
    output_dir: str = field(metadata={"help": "directory of the run: model, tokenizer, recipe, logs and checkpoints"})
    data: DataSection = field(metadata={"help": "prepared data"})
    model: ModelSection = field(
        default_factory=lambda: AutoencoderModel({}), metadata={"help": "the model; its keys depend on the stage"}
    )
    training: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "fields of transformers.TrainingArguments"}
    )
    seed: int = field(default=0, metadata={"help": "seed of the initial weights, the order of the data, and noise"})
    tokens_per_step: int | None = field(
        default=None,
        metadata={"help": "tokens per optimiser step over all processes; sets training.gradient_accumulation_steps"},
    )
    brier_blocks: int | None = field(
        default=None,
        metadata={"help": "validation blocks on which BrierLM is computed at every evaluation; language models only"},
    )
    precision: str = field(
        default="auto", metadata={"help": "auto (bfloat16 on GPUs that support it), float32, bfloat16 or float16"}
    )

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {self.stage!r}.")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}.")
        check_training(self.training)
        if self.precision != "auto" and {"bf16", "fp16"} & self.training.keys():
            raise ValueError("give precision or training.bf16 and training.fp16, not both.")
        if not isinstance(self.model, ModelSection):
            self.model = read_model(self.stage, self.model)
        check_types(self, {"output_dir": str, "seed": int}, "the recipe")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in 0 to {2**32 - 1}, got {self.seed}.")
        check_types(self.data, {"train": str, "block_size": int}, "data")
        if self.data.validation is not None:
            check_types(self.data, {"validation": str}, "data")
        if self.brier_blocks is not None:
            check_types(self, {"brier_blocks": int}, "the recipe")
            if self.stage == "autoencoder" or self.data.validation is None or self.brier_blocks < 1:
                raise ValueError("brier_blocks, at least 1, is for language models with data.validation.")
        if self.tokens_per_step is not None:
            check_types(self, {"tokens_per_step": int}, "the recipe")
            check_smallest("tokens_per_step", self.tokens_per_step, 1)
            if "gradient_accumulation_steps" in self.training:
                raise ValueError("give tokens_per_step or training.gradient_accumulation_steps, not both.")
        # YAML reads a bare `no` as false; every strategy has "no" among its values.
        given = {
            name: "no" if value is False and name.endswith("_strategy") else value
            for name, value in self.training.items()
        }
        self.training = TRAINING_DEFAULTS | given

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """Build and check a recipe; ValueError names an unknown or missing key."""
        if isinstance(values, dict):
            values = with_current_keys(values)
        check_keys(
            values,
            key_names(cls),
            "the recipe",
            lambda: {
                "training": training_fields(),
                "data": key_names(DataSection),
                "model": model_keys(str(values.get("stage"))),
            },
        )
        for name in ("stage", "output_dir", "data"):
            if name not in values:
                raise ValueError(f"the recipe lacks {name!r}.")
        data = values["data"]
        if not isinstance(data, dict):
            raise ValueError(f"data must be a mapping (train, validation, block_size), got {data!r}.")
        check_keys(data, key_names(DataSection), "data")
        for name in ("train", "block_size"):
            if name not in data:
                raise ValueError(f"data lacks {name!r}.")
        given = {"data": DataSection(**data), "model": {} if values.get("model") is None else values["model"]}
        return cls(**values | given)

    @classmethod
    def load(cls, path: str | os.PathLike, overrides: Sequence[str] = ()) -> "Recipe":
        """Read a YAML file, as :func:`find_recipe` finds it, and apply ``dotted.key=value`` overrides."""
        values = read_yaml(find_recipe(path))
        if not isinstance(values, dict):
            raise ValueError(f"{path} must be a mapping of recipe keys, got {type(values).__name__}.")
        values = with_current_keys(values)
        for override in overrides:
            key, separator, value = override.partition("=")
            if not separator or not key:
                raise ValueError(f"an override reads dotted.key=value, got {override!r}.")
            try:
                parsed = _parse_yaml(value)
            except (yaml.YAMLError, ValueError) as error:
                problem = error if isinstance(error, _TooMuchError) else "is not valid YAML; quote it."
                raise ValueError(f"override {override!r:.200}: {value!r:.100} {problem}") from error
            section, _, name = key.rpartition(".")
            if section == "model" and name in RENAMED_CALM_FIELDS:
                renamed = {name: parsed}
                rename_deprecated(renamed, RENAMED_CALM_FIELDS, "model")
                key = f"model.{next(iter(renamed))}"
            _set_dotted(values, key.split("."), parsed, override)
        return cls.from_dict(values)

    def set_vocab_size(self, vocab_size: int) -> None:
        """Set the vocabulary of the model, if the recipe has none."""
        if isinstance(self.model, AutoencoderModel):
            self.model.config.setdefault("vocab_size", vocab_size)
        elif isinstance(self.model, BaselineModel | CalmModel):
            self.model.backbone.setdefault("vocab_size", vocab_size)

    def to_dict(self) -> dict[str, Any]:
        """Return the resolved recipe as a mapping: defaults of the training included, keys of the model as given."""
        values = dataclasses.asdict(self)
        is_flat = isinstance(self.model, AutoencoderModel)
        values["model"] = values["model"]["config"] if is_flat else given_keys(self.model)
        if isinstance(values["model"].get("autoencoder"), dict):
            values["model"]["autoencoder"] = given_keys(self.model.autoencoder)  # type: ignore[union-attr]
        return values

    def to_yaml(self) -> str:
        """Return the resolved recipe as YAML."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def find_recipe(path: str | os.PathLike, kind: str = "recipe") -> Path:
    """Return a recipe's file; ``recipes/...`` is one of this package where the working directory has none of that name.

    Args:
        kind: what the file or directory is called in the error: recipe, plan, or family of recipes (a directory).

    Raises ValueError that names the nearest recipe or path when there is none.
    """
    path = Path(path)
    if path.as_posix() in _RENAMED_RECIPES:
        path = Path(_RENAMED_RECIPES[path.as_posix()])
        warnings.warn(f"the recipe is now called {path}; its former name will be removed.", FutureWarning, stacklevel=2)
    package = Path(str(resources.files("calm")))
    places = [path, package / path] if path.parts[:1] == ("recipes",) else [path]
    is_directory = kind == FAMILY
    for place in places:
        if place.is_dir() if is_directory else place.is_file():
            return place
    found = (package / "recipes").rglob("*" if is_directory else "*.yaml")
    names = [each.relative_to(package).as_posix() for each in found if each.is_dir() == is_directory]
    near = nearest_existing(path) or next(iter(difflib.get_close_matches(path.as_posix(), names, n=1)), None)
    raise ValueError(f"no {kind} at {path}" + ("." if near is None else f"; did you mean {near}?"))


def read_yaml(path: str | os.PathLike) -> Any:
    """The content of a YAML file, with numbers as people write them; ValueError where it is none."""
    try:
        return _parse_yaml(Path(path).read_text(encoding="utf-8"))
    except _TooMuchError as error:
        raise ValueError(f"{path} {error}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or a number that does not exist
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


class _TooMuchError(ValueError):
    """A YAML text that no recipe needs."""


def _parse_yaml(text: str) -> Any:
    """Return the content of a YAML text; the time is bounded, whatever its aliases and brackets would expand to."""
    if len(text) > _MAX_CHARACTERS:
        raise _TooMuchError(f"has {len(text):,} characters, and at most {_MAX_CHARACTERS:,} are read.")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _num_values(node, {}, ()) > _MAX_VALUES:
            raise _TooMuchError(f"has aliases that expand to more than {_MAX_VALUES:,} values: write it without them.")
        return loader.construct_document(node)
    except RecursionError as error:
        raise _TooMuchError("is nested too deeply.") from error
    finally:
        loader.dispose()


def _num_values(node: yaml.Node, known: dict[int, int], inside: tuple[int, ...]) -> int:
    """Return how many values a node holds when its aliases are written out."""
    if id(node) in known:
        return known[id(node)]
    if id(node) in inside:
        raise _TooMuchError("has an alias of a value within that value.")
    inside = (*inside, id(node))
    if len(inside) > _MAX_DEPTH:
        raise _TooMuchError(f"is nested more than {_MAX_DEPTH} levels deep.")
    count = 1
    if isinstance(node, yaml.MappingNode):
        count += sum(_num_values(part, known, inside) for pair in node.value for part in pair)
    elif isinstance(node, yaml.SequenceNode):
        count += sum(_num_values(part, known, inside) for part in node.value)
    known[id(node)] = count
    return count


def _set_dotted(values: dict[str, Any], path: list[str], value: Any, override: str) -> None:
    for name in path[:-1]:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise ValueError(f"override {override!r}: {name!r} is a value, not a group of keys.")
    values[path[-1]] = value


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as a string; everyone who writes a learning rate means the number."""


_Loader.yaml_implicit_resolvers = {
    first: [rule for rule in rules if rule[0] != "tag:yaml.org,2002:float"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*([eE][-+]?\d+)?|\.\d[\d_]*([eE][-+]?\d+)?|\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+0123456789."),
)
