"""The HTTP side: OpenAI's endpoints, health, metrics, and the page."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import Response
from prometheus_client import generate_latest

from calm.serving.errors import add_error_handlers
from calm.serving.middleware import Guard
from calm.serving.responses import respond
from calm.serving.schemas import ChatRequest, CompletionRequest
from calm.serving.service import Service
from calm.serving.telemetry import Metrics

_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}


def create_app(
    services: Sequence[Service], metrics: Metrics, api_keys: Sequence[str] = (), hosts: Sequence[str] | None = None
) -> FastAPI:
    """The application; the first service is the default model."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        # By now all requests are answered.
        await asyncio.gather(*(asyncio.to_thread(service.engine.stop) for service in services))

    app = FastAPI(title="CALM", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, metrics=metrics, api_keys=api_keys, hosts=hosts)
    add_error_handlers(app)
    by_name = {service.name: service for service in services}

    def service_of(name: str | None) -> Service:
        if name is None:
            return services[0]
        if name not in by_name:
            raise HTTPException(404, f"no model {name!r} here, but {', '.join(by_name)}.")
        return by_name[name]

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [service.describe() for service in services]}

    @app.get("/v1/models/{name:path}")  # a hub id holds a slash
    async def model(name: str) -> dict:
        return service_of(name).describe()

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        service = service_of(body.model)
        prompts = await asyncio.to_thread(service.encode_prompts, body)
        return await respond("text_completion", service, body, prompts, body.max_tokens, request)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        service = service_of(body.model)
        prompt = await asyncio.to_thread(service.encode_chat, body)
        max_tokens = body.max_completion_tokens or body.max_tokens or service.engine.room_for_new(len(prompt))
        return await respond("chat.completion", service, body, [prompt], max_tokens, request)

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics_text() -> Response:
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    for file in resources.files("calm.serving").joinpath("page").iterdir():
        path = "" if file.name == "index.html" else file.name
        app.add_api_route(
            f"/{path}", _static(file.read_bytes(), _TYPES[Path(file.name).suffix]), include_in_schema=False
        )
    return app


def _static(content: bytes, media_type: str) -> Any:
    async def page() -> Response:
        policy = {"Content-Security-Policy": "default-src 'self'; img-src data:", "X-Content-Type-Options": "nosniff"}
        return Response(content, media_type=f"{media_type}; charset=utf-8", headers=policy)

    return page
