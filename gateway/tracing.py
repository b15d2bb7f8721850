"""Each request as an OpenTelemetry span, if ``OTEL_EXPORTER_OTLP_ENDPOINT`` says where to send it.

The SDK is an extra (``pip install flightline[tracing]``) and reads its own variables. A client's ``traceparent``
(https://www.w3.org/TR/trace-context/) becomes the parent. Names of attributes are those of
https://opentelemetry.io/docs/specs/semconv/gen-ai/ and /http/; prompts and answers are in none.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from flightline.gateway.exchange import Exchange
from flightline.gateway.settings import SettingsError

VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"
Record = Callable[[Exchange, str, float], None]
"""(a request that has ended, its endpoint, seconds that it took)"""


def recorder(version: str) -> Record | None:
    """None: nobody wants traces. Batches are sent by a thread of the SDK, the last one when the process ends.

    Raises:
        SettingsError: somebody does, and the SDK is not installed.
    """
    if not os.environ.get(VARIABLE):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    except ImportError as error:
        raise SettingsError(
            f"{VARIABLE} is set and {error.name} is not installed: pip install 'flightline[tracing]', or unset it"
        ) from None

    provider = TracerProvider(
        resource=Resource.create({"service.name": "flightline", "service.version": version})
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    tracer, parents = provider.get_tracer("flightline.gateway", version), TraceContextTextMapPropagator()

    def record(exchange: Exchange, endpoint: str, took_s: float) -> None:
        now = time.time_ns()
        carrier = {"traceparent": exchange.headers.get(b"traceparent", b"").decode("latin-1")}
        attributes: dict[str, str | int | float] = {
            "http.request.method": exchange.method,
            "http.route": endpoint,
            "http.response.status_code": exchange.status,
            "flightline.request_id": exchange.id,
        }
        for fact, name in (("prompt_tokens", "input"), ("generated_tokens", "output")):
            if fact in exchange.note:
                attributes[f"gen_ai.usage.{name}_tokens"] = exchange.note[fact]
        if exchange.first_byte_at:
            attributes["flightline.first_byte_seconds"] = exchange.first_byte_at - exchange.began
        span = tracer.start_span(
            f"{exchange.method} {endpoint}",
            context=parents.extract(carrier),
            kind=SpanKind.SERVER,
            start_time=now - int(took_s * 1e9),
            attributes=attributes,
        )
        if exchange.status >= 500 or "error" in exchange.note:
            span.set_status(Status(StatusCode.ERROR, exchange.note.get("error")))
        span.end(now)

    return record
