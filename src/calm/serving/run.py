"""Loading models and running the server until it is told to stop."""

import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Sequence
from types import FrameType

import torch
import uvicorn

from calm.data.tokenizer import load_tokenizer
from calm.device import resolve_device, resolve_dtype
from calm.functional.tiles import is_out_of_memory
from calm.models.loading import load_language_model
from calm.serving.app import create_app
from calm.serving.guard import LOOPBACK
from calm.serving.service import Limits, Service
from calm.serving.telemetry import Metrics


def run_server(
    models: dict[str, tuple[str, str]],
    limits: Limits,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_keys: Sequence[str] = (),
    insecure: bool = False,
    device: str = "auto",
    dtype: str = "auto",
) -> None:
    """Serve until SIGTERM or Ctrl-C; requests that run then are finished, new ones refused.

    Args:
        models: by name, the directory or hub id of a model and of its tokenizer; the first is the default.
        insecure: allow an address that others can reach without a key.
    """
    local = _is_loopback(host)
    if not (local or api_keys or insecure):
        raise ValueError(
            f"{host} can be reached from elsewhere: give --api-key-file, or --insecure to let everyone generate."
        )
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ValueError(
            f"cannot listen on {host}:{port} ({error.strerror or error}): choose another --port."
        ) from error
    # Every chunk goes out at once; accepted connections take this from the listener.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    target = resolve_device(device)
    if target.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # A core for the event loop: threads of a product that wait for one that is not running cost more than it gives.
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    metrics = Metrics()
    services = []
    for name, (path, tokenizer) in models.items():
        model = load_language_model(path, resolve_dtype(dtype, target))
        model.to(target)  # type: ignore[arg-type]
        try:
            services.append(Service(name, model, load_tokenizer(tokenizer), limits, metrics))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise ValueError(
                f"no memory for the cache of {limits.max_batch} slots of {limits.context} tokens: take a smaller "
                "--max-batch or --context."
            ) from error
        kind = f"CALM, {services[-1].patch_size} tokens a step" if services[-1].is_calm else "token model"
        print(f"{name}: {kind}; {services[-1].memory()}")
    # A name that leads here from another site would let that site's pages in.
    hosts = tuple(dict.fromkeys((*LOOPBACK, host.lower()))) if local else None
    app = create_app(services, metrics, api_keys, hosts)
    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{listener.getsockname()[1]}  (Ctrl-C ends it when all requests are answered)", flush=True)
    logging.basicConfig(level=logging.WARNING)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=30)
    _Server(config, services).run(sockets=[listener])


class _Server(uvicorn.Server):
    """Ends in its own time and without an error when it is told to; a second Ctrl-C ends it at once."""

    def __init__(self, config: uvicorn.Config, services: Sequence[Service]):
        super().__init__(config)
        self.engines = [service.engine for service in services]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and sig == signal.SIGINT:
            # Nothing is half-written that would have to be put in order, and a step may take long.
            os._exit(128 + sig)
        first = not self.should_exit
        self.should_exit = True  # before anything is said: the next signal may come at once
        unanswered = sum(engine.num_running + engine.num_waiting for engine in self.engines)
        if first and unanswered:
            print(f"{unanswered} sequence(s) to finish first; Ctrl-C again ends the server at once", flush=True)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
