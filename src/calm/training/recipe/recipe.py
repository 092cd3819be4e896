"""Recipes: one YAML file says all there is to say about a training run.

```yaml
stage: calm                          # autoencoder | calm | baseline
output_dir: runs/calm
seed: 0
data:
  train: data/train                  # made by `calm prepare`
  validation: data/validation        # loss on it is logged every `eval_steps` (default: `save_steps`)
  block_size: 1024                   # tokens
model:                               # stage autoencoder: fields of CalmAutoencoderConfig
  autoencoder: runs/autoencoder      # stage calm: a trained autoencoder,
  backbone: {hidden_size: 256}       #   the backbone's fields (`model_type` if it is no Llama),
  head: {type: energy}               #   and the head's; stage baseline: the backbone alone
  token_prediction_weight: 0.0       # stage calm: of an auxiliary cross-entropy; optional
  token_prediction_type: independent #   or autoregressive: every token also from those before it in its patch
  decoded_brier_weight: 0.0          # stage calm: of the Brier score of decoded draws; optional
  backbone_weights: runs/baseline    # stage calm, optional: start from a token model's or a CALM's weights, same shape
  freeze_backbone: false             # stage calm: true trains on what was trained before only its head and what is new
  pretrained: runs/calm              # instead of all that: go on from a trained model, to fine-tune it; beside it may
                                     #   stand autoencoder, freeze_backbone, decoded_brier_weight and, where it has no
                                     #   token prediction, token_prediction_weight and token_prediction_type
tokens_per_step: 524288              # over all processes; sets gradient_accumulation_steps. Optional
precision: auto                      # auto (bfloat16 on GPUs that have it) | float32 | bfloat16 | float16
brier_blocks: 32                     # BrierLM on so many validation blocks with every evaluation. Optional
training:                            # fields of transformers.TrainingArguments
  learning_rate: 3.0e-4
```
"""

import dataclasses
import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from calm.training.recipe.checks import (
    check_keys,
    check_model,
    check_smallest,
    check_training,
    check_types,
    model_fields,
    training_fields,
    without_removed,
)
from calm.utils.paths import nearest_existing

FAMILY = "family of recipes"
STAGES = ("autoencoder", "calm", "baseline")
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
class DataRecipe:
    train: str
    block_size: int
    validation: str | None = None


@dataclass
class Recipe:
    stage: str
    output_dir: str
    data: DataRecipe
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    tokens_per_step: int | None = None
    brier_blocks: int | None = None
    precision: str = "auto"

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {self.stage!r}.")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}.")
        check_training(self.training)
        if self.precision != "auto" and {"bf16", "fp16"} & self.training.keys():
            raise ValueError("give precision or training.bf16 and training.fp16, not both.")
        check_model(self.stage, self.model)
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
            values = without_removed(values)
        check_keys(
            values,
            {each.name for each in dataclasses.fields(cls)},
            "the recipe",
            lambda: {
                "training": training_fields(),
                "data": {each.name for each in dataclasses.fields(DataRecipe)},
                "model": model_fields(str(values.get("stage"))),
            },
        )
        for name in ("stage", "output_dir", "data"):
            if name not in values:
                raise ValueError(f"the recipe lacks {name!r}.")
        data = values["data"]
        if not isinstance(data, dict):
            raise ValueError(f"data must be a mapping (train, validation, block_size), got {data!r}.")
        check_keys(data, {each.name for each in dataclasses.fields(DataRecipe)}, "data")
        for name in ("train", "block_size"):
            if name not in data:
                raise ValueError(f"data lacks {name!r}.")
        given: dict[str, Any] = {"data": DataRecipe(**data)}
        return cls(**values | given)

    @classmethod
    def load(cls, path: str | os.PathLike, overrides: Sequence[str] = ()) -> "Recipe":
        """Read a YAML file, as :func:`find_recipe` finds it, and apply ``dotted.key=value`` overrides."""
        values = read_yaml(find_recipe(path))
        if not isinstance(values, dict):
            raise ValueError(f"{path} must be a mapping of recipe keys, got {type(values).__name__}.")
        for override in overrides:
            key, separator, value = override.partition("=")
            if not separator or not key:
                raise ValueError(f"an override reads dotted.key=value, got {override!r}.")
            try:
                parsed = _parse_yaml(value)
            except (yaml.YAMLError, ValueError) as error:
                problem = error if isinstance(error, _TooMuchError) else "is not valid YAML; quote it."
                raise ValueError(f"override {override!r:.200}: {value!r:.100} {problem}") from error
            _set_dotted(values, key.split("."), parsed, override)
        return cls.from_dict(values)

    def set_vocab_size(self, vocab_size: int) -> None:
        """Of the model, where the recipe names none."""
        fields = self.model if self.stage == "autoencoder" else self.model.get("backbone")
        if fields is not None and "pretrained" not in fields:
            fields.setdefault("vocab_size", vocab_size)

    def to_yaml(self) -> str:
        """The resolved recipe, defaults included."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


def find_recipe(path: str | os.PathLike, kind: str = "recipe") -> Path:
    """Return a recipe's file; ``recipes/...`` is one of this package where the working directory has none of that name.

    Args:
        kind: what the file or directory is called in the error: recipe, plan, or family of recipes (a directory).

    Raises ValueError that names the nearest recipe or path when there is none.
    """
    path = Path(path)
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
