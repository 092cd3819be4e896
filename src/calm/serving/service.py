"""A model that is served: its engine, its tokenizer, and how requests become jobs."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calm.data.text import encode_chat, encode_plain_text
from calm.models.context import context_of
from calm.models.modeling_calm import CalmForCausalLM
from calm.serving.batch_invariance import check_batch_invariance
from calm.serving.engine import Engine
from calm.serving.jobs import Chunk, Job
from calm.serving.model_runner import Sampling, stepper_of
from calm.serving.schemas import ChatRequest, CompletionRequest, SamplingRequest
from calm.serving.telemetry import Metrics, Telemetry


@dataclass
class Limits:
    """
    Args:
        max_batch: sequences that run at a time.
        max_queue: sequences that may wait.
        context: tokens of prompt and continuation together; at most what the model was made for.
        max_candidates: draws a request may have the batch sampler choose from; a step of all waits for them.
        batch_invariant: whether the text of a request must not depend on the requests beside it, not even by rounding.
    """

    max_batch: int = 16
    max_queue: int = 256
    context: int = 4096
    max_candidates: int = 1000
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_queue", "context", "max_candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


class Service:
    """One model under a name."""

    def __init__(
        self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, limits: Limits, metrics: Metrics
    ):
        self.name, self.tokenizer = name, tokenizer
        self.is_calm = isinstance(model, CalmForCausalLM)
        self.samplers = model.samplers if isinstance(model, CalmForCausalLM) else []
        self.saved: Any = model.generation_config
        stepper = stepper_of(model.eval())
        stepper.check(self.default_sampling())  # what the model's files say must fit it
        self.patch_size = stepper.patch_size
        positions = context_of(stepper.backbone_config) or limits.context
        context = min(limits.context, positions * stepper.patch_size)
        if context < 2 * stepper.patch_size:
            raise ValueError(f"context must be at least {2 * stepper.patch_size} tokens for {name}, got {context}.")
        self.max_candidates = limits.max_candidates
        if limits.batch_invariant:
            check_batch_invariance(stepper.backbone_config, name)
        telemetry = Telemetry(metrics, name)
        self.engine = Engine(
            stepper, tokenizer, limits.max_batch, context, limits.max_queue, telemetry, limits.batch_invariant
        )

    def describe(self) -> dict[str, Any]:
        """An entry of `/v1/models`."""
        return {
            "id": self.name,
            "object": "model",
            "created": 0,
            "owned_by": "calm",
            "kind": "calm" if self.is_calm else "token model",
            "patch_size": self.patch_size,
            "context": self.engine.context,
            "samplers": self.samplers,
            "sampler": self.default_sampling().sampler if self.is_calm else None,
            "temperature": self.default("temperature", 1.0),
            "chat": self.tokenizer.chat_template is not None,
        }

    def default(self, name: str, otherwise: Any) -> Any:
        value = getattr(self.saved, name, None)
        return otherwise if value is None else value

    def default_sampling(self) -> Sampling:
        """What the model's files say."""
        temperature = float(self.default("temperature", 1.0))
        if not self.is_calm:
            return Sampling(temperature)
        return Sampling(temperature, self.default("sampler", "batch"), self.default("num_candidates", 200))

    def sampling(self, request: SamplingRequest) -> Sampling:
        """What a request asks for; ValueError for settings of a CALM where this is none."""
        names = ("temperature", "sampler", "num_candidates")
        given = {name: value for name in names if (value := getattr(request, name)) is not None}
        if not self.is_calm and given.keys() - {"temperature"}:
            raise ValueError(f"sampler and num_candidates are settings of a CALM, and {self.name} is a token model")
        if given.get("num_candidates", 0) > self.max_candidates:
            raise ValueError(
                f"num_candidates: this server takes at most {self.max_candidates}, got {given['num_candidates']}"
            )
        return replace(self.default_sampling(), **given)

    def encode_prompts(self, request: CompletionRequest) -> list[list[int]]:
        """Token ids of all prompts; ValueError where there are none, or more texts than can run and wait."""
        prompts = request.prompts
        self._check_count(len(prompts), request.n)
        return [prompt if isinstance(prompt, list) else encode_plain_text(self.tokenizer, prompt) for prompt in prompts]

    def _check_count(self, num_prompts: int, num_texts: int) -> None:
        most = self.engine.max_batch + self.engine.max_queue
        if not 0 < num_prompts * num_texts <= most:
            raise ValueError(
                f"{num_prompts} prompts with {num_texts} texts each were asked for; 1 to {most} texts are possible at "
                "once"
            )

    def encode_chat(self, request: ChatRequest) -> list[int]:
        """ValueError when the tokenizer has no chat template, or it does not take the messages."""
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"{self.name} has no chat template: it continues texts and was not taught to answer. Use "
                "/v1/completions, or fine-tune it on messages."
            )
        self._check_count(1, request.n)
        messages = [{"role": message.role, "content": message.text} for message in request.messages]
        try:
            return encode_chat(self.tokenizer, messages, add_generation_prompt=True)
        except Exception as error:  # templates raise what they like
            raise ValueError(f"the chat template does not accept these messages: {error}") from error

    def jobs(
        self, request: SamplingRequest, prompts: list[list[int]], max_tokens: int, emit: Callable[[int, Chunk], None]
    ) -> list[Job]:
        """A job for every text of every prompt, checked; text i has the seed of the request plus i."""
        seed = request.seed if request.seed is not None else secrets.randbits(32)
        sampling = self.sampling(request)
        jobs = []
        for index, prompt in enumerate(prompt for prompt in prompts for _ in range(request.n)):
            emit_one = lambda chunk, index=index: emit(index, chunk)  # noqa: E731
            jobs.append(Job(prompt, max_tokens, sampling, (seed + index) % 2**63, emit_one, request.stop_texts))
            self.engine.check(jobs[-1])
        return jobs

    def memory(self) -> str:
        """What the cache takes, for the line at the start."""
        cache = self.engine.cache
        size = f"{cache.num_bytes / 2**20:,.0f} MiB"
        positions = f"{cache.num_slots} slots of {self.engine.context} tokens ({cache.num_positions} positions)"
        return f"key/value cache {size}: {positions}, {str(self.engine.stepper.dtype).removeprefix('torch.')}"
