"""OpenTelemetry: vLLM's span of a request says which adapter and which revision answered.

vLLM makes the span `llm_request` in the server when a request has ended. It knows the request's adapter there and
leaves it out. Its output processor is told here to name it, and OpenTelemetry to write the name into the span.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.trace import SpanProcessor
from vllm.v1.engine.output_processor import OutputProcessor
from vllm_qaa import port

from qaa_serve.registry import public_form

#: What goes into the spans that start now.
_attributes: ContextVar[Mapping[str, str] | None] = ContextVar("span_attributes", default=None)


def attributes_of(lora_name: str | None, base_name: str) -> dict[str, str]:
    """What a span says of the model that was asked for and the one that answered.

    Args:
        lora_name: the adapter's name in vLLM, which has the whole digest; None for the base model.
        base_name: the base model's name.
    """
    if lora_name is None:
        return {"gen_ai.request.model": base_name, "gen_ai.response.model": base_name}
    name, revision = lora_name.partition("@")[0], public_form(lora_name)
    return {
        "gen_ai.request.model": name,
        "gen_ai.response.model": revision,
        "qaa.adapter": name,
        "qaa.revision": revision,
    }


class NamedSpans(SpanProcessor):
    """Writes into every span what is to be said while it starts."""

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        """A span has started and can still be written to."""
        if (attributes := _attributes.get()) is not None:
            span.set_attributes(attributes)


class NamingOutputProcessor(OutputProcessor):
    """vLLM's output processor, which says whose span it makes."""

    def __init__(self, base_name: str, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._base_name = base_name

    def do_tracing(self, engine_core_output: Any, req_state: Any, iteration_stats: Any) -> None:
        """As vLLM's: makes the span of a request, or of one of its choices, that has ended."""
        token = _attributes.set(attributes_of(req_state.lora_name, self._base_name))
        try:
            super().do_tracing(engine_core_output, req_state, iteration_stats)
        finally:
            _attributes.reset(token)


@contextmanager
def spans_name_adapters(base_name: str) -> Iterator[None]:
    """Let the engine that vLLM makes meanwhile, and that sends traces, name adapters in them."""
    with port.replaced("OutputProcessor", partial(NamingOutputProcessor, base_name)):
        yield
    provider: Any = trace.get_tracer_provider()  # OpenTelemetry's own, which the engine has set up
    provider.add_span_processor(NamedSpans())
