import sys

import typer

HARNESS_ARGUMENTS = {"allow_extra_args": True, "ignore_unknown_options": True}


def harness(context: typer.Context) -> None:
    """lm-evaluation-harness with the model type `calm`: all arguments are lm-eval's. Needs `pip install calm-lm[eval]`.

    Generative tasks work. Tasks that ask for likelihoods need `sampler=mtp`, and a model that was trained
    with token prediction.

    Example: `calm harness run --model calm --model_args pretrained=runs/calm,temperature=0.5 --tasks gsm8k --limit 100`

    Example: `calm harness run --model calm --model_args pretrained=runs/calm,sampler=mtp --tasks piqa`
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise ValueError("lm-evaluation-harness is not installed: pip install 'calm-lm[eval]'.") from error
    import calm.evaluation.harness  # noqa: F401  registers the model

    sys.argv = ["lm_eval", *context.args]
    cli_evaluate()
