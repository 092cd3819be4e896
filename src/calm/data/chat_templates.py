"""Chat templates rendered in a process with bounded time, memory and length of the text.

A chat template is a program that comes with a tokenizer. The sandbox of transformers denies it files and Python's
internals, but it does not bound loops and texts, and a template that runs in this process cannot be stopped.
"""

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

MAX_SECONDS = 10.0
MAX_CHARACTERS = 2**24
_MEMORY = 2**30  # bytes beyond what the process takes to start
_START_SECONDS = 120.0  # importing transformers on a busy machine

_WORKER = """
import json, sys
from transformers.utils.chat_template_utils import render_jinja_template
memory, characters = map(int, sys.argv[1:])
try:
    import resource
    with open("/proc/self/statm") as sizes:
        memory += int(sizes.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
except (ImportError, OSError, ValueError):
    pass  # without this limit the one on time remains
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    try:
        (text,), _ = render_jinja_template(**request)
        answer = {"text": text} if len(text) <= characters else {"limit": f"more than {characters:,} characters"}
    except (MemoryError, OverflowError):
        text, answer = "", {"limit": "more memory than a text needs"}
    except BaseException as error:
        text, answer = "", {"error": f"{type(error).__name__}: {error}"[:1000]}
    print(json.dumps(answer), flush=True)
"""


class ChatTemplateLimitError(ValueError):
    """Raised where a chat template exceeds the bounds on time, memory or length."""


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = False
) -> str:
    """Return messages in the chat template of a tokenizer, as ``tokenizer.apply_chat_template`` renders them.

    Raises:
        ChatTemplateLimitError: where the template exceeds the bounds.
        ValueError: where it does not accept the messages.
    """
    if not messages:
        raise ValueError("a chat template needs at least one message.")
    request = tokenizer.special_tokens_map | {
        "conversations": [
            [{name: value for name, value in message.items() if value is not None} for message in messages]
        ],
        "chat_template": tokenizer.get_chat_template(),
        "add_generation_prompt": add_generation_prompt,
    }
    answer = _process().ask(json.dumps(request, default=str))
    if limit := answer.get("limit"):
        raise ChatTemplateLimitError(
            f"the chat template of the tokenizer takes {limit} for {len(messages)} message(s): it cannot be used."
        )
    if "error" in answer:
        raise ValueError(answer["error"])
    return str(answer["text"])


class _TemplateProcess:
    """A process that renders one request at a time, started with the first one and again after it was killed."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._lock = threading.Lock()
        self._running: subprocess.Popen[str] | None = None

    def ask(self, request: str) -> dict[str, Any]:
        """Return the answer to a request in JSON."""
        with self._lock:
            if self._running is None or self._running.poll() is not None:
                self._running = self._start()
            line = self._exchange(self._running, request, MAX_SECONDS)
            if not line:
                self._end()
                return {"limit": f"more than {MAX_SECONDS:g} seconds, or all memory,"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _start(self) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", _WORKER, str(_MEMORY), str(MAX_CHARACTERS)]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="ascii",
            start_new_session=True,  # Ctrl-C is for the process that asks
        )
        if self._exchange(process, None, _START_SECONDS) != "ready\n":
            self._running = process
            self._end()
            raise RuntimeError("the process that renders chat templates did not start: is transformers installed?")
        return process

    @staticmethod
    def _exchange(process: "subprocess.Popen[str]", request: str | None, seconds: float) -> str:
        """Write a request and return the next line; empty where the process ended or its time was over."""
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(seconds, process.kill)
        timer.daemon = True
        timer.start()
        try:
            if request is not None:
                process.stdin.write(request + "\n")
                process.stdin.flush()
            return process.stdout.readline()
        except OSError:  # it ended meanwhile
            return ""
        finally:
            timer.cancel()

    def _end(self) -> None:
        process, self._running = self._running, None
        if process is None or os.getpid() != self.owner:
            return
        process.kill()
        with contextlib.suppress(OSError):
            process.communicate()


_one = _TemplateProcess()


def _process() -> _TemplateProcess:
    """Return the process of this one: a copy made by fork shares no pipes with its parent."""
    global _one
    if _one.owner != os.getpid():
        _one = _TemplateProcess()
    return _one


atexit.register(lambda: _one._end())
