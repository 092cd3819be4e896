"""What `/metrics` says, in Prometheus' format."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_DRAFT = (1, 2, 3, 4, 5, 6, 8, 12, 16)
_FILL = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The server's metrics, by model."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        of: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("calm_requests", "HTTP requests, by path and status", ["path", "status"], **of)
        self.finished = Counter("calm_sequences", "Sequences that ended, by reason", ["model", "reason"], **of)
        self.tokens = Counter("calm_tokens", "Tokens generated", ["model"], **of)
        self.chunks = Counter("calm_chunks", "Chunks generated", ["model"], **of)
        self.drafted = Counter("calm_drafted_tokens", "Drafted tokens, by result", ["model", "result"], **of)
        self.per_pass = Histogram(
            "calm_tokens_per_verification", "Tokens of a sequence per verified draft", ["model"], buckets=_DRAFT, **of
        )
        self.waiting = Gauge("calm_waiting", "Sequences that wait for a slot", ["model"], **of)
        self.running = Gauge("calm_running", "Sequences that have a slot", ["model"], **of)
        self.batch = Histogram("calm_batch_size", "Sequences in a step", ["model"], buckets=_FILL, **of)
        self.first_chunk = Histogram(
            "calm_first_chunk_seconds", "From arrival to the first chunk", ["model"], buckets=_SECONDS, **of
        )


class Telemetry:
    """The metrics of one model's engine."""

    def __init__(self, metrics: Metrics, model: str):
        self._metrics, self._model = metrics, model
        self.tokens, self.chunks = metrics.tokens.labels(model), metrics.chunks.labels(model)
        self.batch, self.first_chunk = metrics.batch.labels(model), metrics.first_chunk.labels(model)

    def finished(self, reason: str | None) -> None:
        self._metrics.finished.labels(self._model, reason).inc()

    def verified(self, num_drafted: int, num_accepted: int) -> None:
        """Count the draft of one sequence, and the token that its verification gives in any case."""
        self._metrics.drafted.labels(self._model, "accepted").inc(num_accepted)
        self._metrics.drafted.labels(self._model, "wasted").inc(num_drafted - num_accepted)
        self._metrics.per_pass.labels(self._model).observe(num_accepted + 1)

    def watch(self, engine: Any) -> None:
        """Ask an engine for its queue whenever metrics are read."""
        self._metrics.waiting.labels(self._model).set_function(lambda: engine.num_waiting)
        self._metrics.running.labels(self._model).set_function(lambda: engine.num_running)
