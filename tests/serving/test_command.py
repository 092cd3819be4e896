"""`calm serve` as a process."""

import json
import signal
import socket
import subprocess
import sys
import threading

import httpx2 as httpx
import pytest
from typer.testing import CliRunner

from calm.cli.main import app
from calm.cli.serve import _read_keys


@pytest.fixture(scope="module")
def model(calm, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    calm.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def process(model):
    started = subprocess.Popen(
        [sys.executable, "-m", "calm.cli.main", "serve", str(model), "--port", "0", "--max-batch", "2",
         "--shutdown-timeout", "600"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    yield started
    started.kill()
    started.communicate()


def address_of(process):
    first = process.stdout.readline()
    assert "tiny: CALM, 3 tokens a step; key/value cache" in first
    assert "2 slots of 768 tokens (256 positions), float32" in first
    return process.stdout.readline().split()[0]


def test_a_server_that_is_told_to_end_answers_what_it_was_asked(process):
    address = address_of(process)
    texts, asked = {}, threading.Barrier(5)

    def ask(number):
        body = {"prompt": "a", "max_tokens": 600, "seed": number, "stream": True}
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as answer:
            asked.wait(timeout=60)
            texts[number] = [line for line in answer.iter_lines() if line]

    clients = [threading.Thread(target=ask, args=(number,)) for number in range(4)]  # two run, two wait
    for client in clients:
        client.start()
    asked.wait(timeout=60)
    process.send_signal(signal.SIGTERM)
    for client in clients:
        client.join()
    for lines in texts.values():
        assert lines[-1] == "data: [DONE]"
        assert json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"] in ("length", "stop")
    assert len(texts) == 4
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == ""
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/health")


@pytest.mark.parametrize("again", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_server_at_once(process, again):
    body = {"prompt": "a", "max_tokens": 700, "n": 100, "seed": 0, "stream": True}  # two run, the others wait
    address = address_of(process)
    with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()  # kept: a discarded iterator closes the connection, which ends the request
        next(lines)
        process.send_signal(signal.SIGINT)
        assert "sequence(s) to finish first; Ctrl-C again ends" in process.stdout.readline()
        process.send_signal(again)
        assert process.wait(timeout=60) == 128 + again
    assert process.stderr.read() == ""


def test_a_stream_that_is_never_read_does_not_keep_the_server_from_ending(model):
    command = [sys.executable, "-m", "calm.cli.main", "serve", str(model), "--port", "0", "--max-batch", "2"]
    process = subprocess.Popen(
        [*command, "--shutdown-timeout", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        host, port = address_of(process).removeprefix("http://").split(":")
        body = json.dumps({"prompt": "a", "max_tokens": 700, "n": 100, "seed": 0, "stream": True})
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # little is stored on the way
        client.connect((host, int(port)))
        client.sendall(
            f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n{body}".encode()
        )
        assert client.recv(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        client.close()
    finally:
        process.kill()
        process.communicate()


def test_a_missing_extra_is_named(model, monkeypatch):
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            result = CliRunner().invoke(app, ["serve", str(model)])
        assert isinstance(result.exception, ValueError)
        assert str(result.exception).endswith("which is not installed: pip install 'calm-lm[serve]'.")


def test_comments_in_a_file_of_keys_are_no_keys(tmp_path):
    path = tmp_path / "keys.txt"
    path.write_text("# of the team\nsecret\n\n")
    assert _read_keys(path) == ["secret"]
    path.write_text("# nothing else\n")
    with pytest.raises(ValueError, match=r"has no API key: write one per line"):
        _read_keys(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "0.0.0.0 can be reached from elsewhere: give --api-key-file, or --insecure"),
        (["--api-key-file", "nowhere.txt"], "no file of API keys at nowhere.txt"),
        (["--max-batch", "0"], "max_batch must be at least 1, got 0"),
        (["--host", "not a host", "--insecure"], "cannot listen on not a host"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(model, options, message):
    result = CliRunner().invoke(app, ["serve", str(model), *options])
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)


def test_a_port_that_is_taken_is_named(model, process):
    port = address_of(process).rsplit(":", 1)[1]
    result = CliRunner().invoke(app, ["serve", str(model), "--port", port])
    assert f"cannot listen on 127.0.0.1:{port}" in str(result.exception)
