"""The `calm` command. It imports the command line alone; a command imports what it needs when it runs."""

import os
import signal
import sys
import threading
from typing import Annotated

import typer

from calm.cli.bandwidth import bandwidth
from calm.cli.convert import convert
from calm.cli.corpus import corpus
from calm.cli.drafter import drafter
from calm.cli.environment import quieten_libraries, wait_passively
from calm.cli.evaluate import evaluate
from calm.cli.generate import generate
from calm.cli.harness import HARNESS_ARGUMENTS, harness
from calm.cli.imports import with_imports
from calm.cli.info import info
from calm.cli.prepare import prepare
from calm.cli.quickstart import quickstart
from calm.cli.serve import serve
from calm.cli.study import report, study
from calm.cli.tokenizer import tokenizer_app
from calm.cli.train import train

app = typer.Typer(
    help="Continuous autoregressive language models: text in, trained models, a score, text out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from calm import __version__

        print(f"calm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


app.command()(quickstart)
app.command()(corpus)
app.add_typer(tokenizer_app, name="tokenizer")
app.command()(prepare)
app.command()(with_imports(train))
app.command()(with_imports(evaluate))
app.command()(with_imports(bandwidth))
app.command()(with_imports(study))
app.command()(with_imports(report))
app.command()(drafter)
app.command()(with_imports(generate))
app.command(context_settings=HARNESS_ARGUMENTS)(with_imports(harness))
app.command()(with_imports(serve))
app.command()(with_imports(convert))
app.command()(with_imports(info))

_MAX_MESSAGE = 1500  # characters; an error may name a value of any length
_CTRL_C = 128 + signal.SIGINT


def main() -> None:
    """Run the command; a user's mistake ends in one line and exit code 2, Ctrl-C in exit code 130."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminate) if is_main else None
    try:
        wait_passively()
        quieten_libraries()
        app(prog_name="calm")
    except KeyboardInterrupt:
        _say_interrupted()
        sys.exit(_CTRL_C)
    except SystemExit as end:
        if end.code == _CTRL_C:  # Typer's word for it
            _say_interrupted()
        raise
    except InterruptedError as error:  # a training run that was asked to stop, and did
        print(f"calm: {error}", file=sys.stderr)
        sys.exit(128 + getattr(error, "signal", signal.SIGINT))
    except Exception as error:
        if not is_user_error(error) or os.environ.get("CALM_DEBUG"):
            raise
        message = " ".join(str(error).split())
        if len(message) > _MAX_MESSAGE:
            message = f"{message[: _MAX_MESSAGE // 2]} ... {message[-_MAX_MESSAGE // 2 :]}"
        print(f"calm: {message}", file=sys.stderr)
        sys.exit(2)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame) -> None:
    """SIGTERM ends a command as an error would: workers are stopped, drafts removed."""
    sys.exit(128 + number)


def _say_interrupted() -> None:
    print(
        "interrupted; training, studies and files of prompts go on where they were with the same command.",
        file=sys.stderr,
    )


def is_user_error(error: Exception) -> bool:
    """Whether an error is about what the user gave, so that its message says all there is to say."""
    kinds: tuple[type[Exception], ...] = (ValueError, OSError)
    if (hub := sys.modules.get("huggingface_hub.errors")) is not None:
        kinds += (hub.StrictDataclassError,)
    return isinstance(error, kinds)


if __name__ == "__main__":
    main()
