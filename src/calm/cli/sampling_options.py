"""Options of the command line for the parameters of sampling: one for every field that SamplingParams describes."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from calm.generation.samplers import find_sampler, sampler_names
from calm.generation.sampling_params import SamplingParams, described_parameters


def with_sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command, which receives them as its keyword argument ``sampling``.

    The command has a parameter ``sampling: SamplingParams``; it is replaced by one option for every field of
    :func:`~calm.generation.sampling_params.described_parameters`.
    """
    described = described_parameters()

    @functools.wraps(command)
    def with_params(*arguments: Any, **options: Any) -> Any:
        values = {name: options.pop(name) for name in described}
        return command(*arguments, sampling=SamplingParams(**values), **options)

    signature = inspect.signature(command)
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        if parameter.name == "sampling":
            parameters += [_option(name, kind, metadata["help"]) for name, (kind, metadata) in described.items()]
        else:
            parameters.append(parameter)
    with_params.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    annotations = {name: value for name, value in command.__annotations__.items() if name != "sampling"}
    with_params.__annotations__ = annotations | {parameter.name: parameter.annotation for parameter in parameters}
    return with_params


def sampler_help() -> str:
    """Return the names of the samplers with a few words for each."""
    return "; ".join(f"{name}: {find_sampler(name).summary}" for name in sampler_names())


def _option(name: str, kind: type, help: str) -> inspect.Parameter:
    if name == "sampler":
        help = f"{help}. {sampler_help()}"
    annotation = Annotated[kind | None, typer.Option(help=help)]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
