"""The gateway as an ASGI application: OpenAI's endpoints in front of Triton's ``text_generation``.

A generating request is admitted (or refused with 429), checked, rendered and tokenised on a thread, and sent to Triton;
its HTTP status follows Triton's first answer, so that what fails before it has a real status. A client that goes away
cancels its gRPC calls at any moment.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import orjson

from flightline.gateway import engine_metrics, errors, forms, job, metrics, passage, responses, tokens
from flightline.gateway.errors import ApiError
from flightline.gateway.exchange import SSE, ClientGone, Exchange, Receive, Send, good_id
from flightline.gateway.forms import ChatStream, ChatWhole, CompletionStream, CompletionWhole, Stream, Whole
from flightline.gateway.job import Job
from flightline.gateway.keys import ApiKeys
from flightline.gateway.last_words import Channel
from flightline.gateway.page import html
from flightline.gateway.passage import Passage
from flightline.gateway.served import ServedModel
from flightline.gateway.settings import ProcessSettings
from flightline.gateway.tracing import Record
from flightline.gateway.upstream import Answers, Triton
from flightline.torch_engine.core.request import RequestError

THREADS = 4
READY_TIMEOUT_S = 10.0
READY_FOR_S = 1.0
"""How long one token proves that the next will come; of a server that keeps a question waiting, READY_TIMEOUT_S."""
LAST_WORDS_S = 1.0
"""Before the end of a drain, so that streams can still be told."""
_BEAT_S = 1.0
OPEN = frozenset(
    {"/", "/favicon.ico", "/health", "/ready", "/health/ready", "/v2/health/live", "/v2/health/ready"}
)
"""Paths that need no key."""
STOPPING = "the server is stopping: send the request to another one, or again in a minute"

_log = logging.getLogger("gateway")

Handler = Callable[["Gateway", Exchange], Awaitable[None]]


class Gateway:
    """One process's application."""

    def __init__(
        self, settings: ProcessSettings, model: ServedModel, keys: ApiKeys, record: Record | None = None
    ) -> None:
        """``record``: what makes a trace of each request."""
        self.settings = settings
        self._keyless = OPEN | ({"/metrics"} if settings.gateway.metrics_without_key else set())
        self._record = record
        self.limits = settings.gateway
        self.model = model
        self.keys = keys
        self.pool = ThreadPoolExecutor(THREADS, "request")
        self.triton: Triton
        self.draining = False
        self._channel = Channel(settings.last_words_fd)
        self._ends = False
        self.triton_http: Passage | None = None
        """The way to Triton's own HTTP endpoints; None: they are off."""
        self._in_flight = 0
        self._live: set[Answers] = set()
        self._exchanges: dict[Exchange, asyncio.Task] = {}
        self._ready_until = 0.0
        self._asking: asyncio.Task[bool] | None = None
        self._sweeper: asyncio.Task | None = None

    # -- ASGI ----------------------------------------------------------------------------------------

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            exchange = Exchange(scope, receive, send)
            task = asyncio.current_task()
            assert task is not None
            self._exchanges[exchange] = task
            try:
                await self._serve(exchange)
            finally:
                exchange.let_go()
                del self._exchanges[exchange]

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while (message := await receive())["type"] != "lifespan.shutdown":
            if message["type"] == "lifespan.startup":
                self._open()
                await send({"type": "lifespan.startup.complete"})
        await self._close()
        await send({"type": "lifespan.shutdown.complete"})

    def _open(self) -> None:
        upstream = self.settings.upstream
        self.triton = Triton.of(upstream)
        if upstream.http_url:
            self.triton_http = Passage(
                upstream.http_url, self.limits.max_body_bytes, self.limits.body_timeout_s
            )
        self._sweeper = asyncio.create_task(self._sweep())

    async def _close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        await self.triton.close()
        if self.triton_http is not None:
            await self.triton_http.close()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def metrics_page(self) -> bytes:
        """The gateway's and, where Triton tells of it, the engine's; called off the event loop."""
        url = self.settings.upstream.metrics_url
        state = engine_metrics.read(url) if url else None
        return metrics.page() + (
            engine_metrics.page(state, self.model.names[0]) if state is not None else b""
        )

    def refuse(self) -> None:
        """From now on it is not ready and new requests are 503; those that run know nothing of it."""
        self.draining = True

    def drain(self) -> None:
        """Streams get what is left of ``drain_s``; then each is told that the server stops."""
        self.refuse()
        if self._ends:
            return
        self._ends = True
        patience = max(0.0, self.settings.drain_s - LAST_WORDS_S)
        asyncio.get_running_loop().call_later(patience, self.end_streams)

    def end_streams(self) -> None:
        for answers in list(self._live):
            answers.abort(errors.unavailable(STOPPING))

    async def _sweep(self) -> None:
        """Says that the event loop turns, and leaves clients that take nothing of their answer."""
        while True:
            await asyncio.sleep(_BEAT_S)
            if self.settings.heartbeat:
                os.utime(self.settings.heartbeat)
            late = time.monotonic() - self.limits.write_timeout_s
            for exchange, task in list(self._exchanges.items()):
                if 0.0 < exchange.writing_since < late:
                    exchange.note["left"] = "it takes nothing of its answer"
                    task.cancel()

    # -- one request ---------------------------------------------------------------------------------

    async def _serve(self, exchange: Exchange) -> None:
        endpoint = "other"
        try:
            endpoint, handler = self._route(exchange)
            await handler(self, exchange)
        except ClientGone:
            exchange.status = exchange.status or 499
            exchange.note["left"] = "by its client"
        except Exception as error:
            await self._fail(exchange, self._told(exchange, error))
        finally:
            self._note(exchange, endpoint)

    async def _fail(self, exchange: Exchange, error: ApiError) -> None:
        if error.status == 503:
            self._ready_until = 0.0
        if self.draining:  # else a client's pool keeps asking here, whatever the Service says
            exchange.extra.append((b"connection", b"close"))
        exchange.note["error"] = error.message if error.status >= 500 else error.code or error.type
        await exchange.fail(error, enveloped(exchange, error))

    @staticmethod
    def _told(exchange: Exchange, error: Exception) -> ApiError:
        """What a client may know of an error."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, RequestError):
            return errors.of_request(error)
        if isinstance(error, RecursionError):
            return errors.invalid("the body is nested too deep: make it flatter")
        _log.error("%s failed: %s", exchange.id, "".join(traceback.format_exception(error)))
        return errors.internal(
            "the gateway has failed on this request; its log has the reason under the request id"
        )

    def _route(self, exchange: Exchange) -> tuple[str, Handler]:
        path = exchange.path
        self._allow_origin(exchange)
        if exchange.method == "OPTIONS" and self.limits.cors_origins:
            return "preflight", _preflight
        if path not in self._keyless:
            self.keys.check(exchange.headers.get(b"authorization"))
        if path.startswith("/v2"):
            return "/v2", _pass_on
        name = "/v1/models/{id}" if path.startswith("/v1/models/") else path
        route = ROUTES.get(name)
        if route is None:
            raise ApiError(404, f"{path[:200]} is not served here", code="not_found")
        method, handler = route
        if exchange.method != method and (exchange.method, method) != ("HEAD", "GET"):
            exchange.extra.append((b"allow", method.encode()))
            raise ApiError(405, f"{path[:200]} takes {method}", code="method_not_allowed")
        return name, handler

    def _allow_origin(self, exchange: Exchange) -> None:
        """CORS (https://fetch.spec.whatwg.org/#http-cors-protocol), of the origins that the settings name."""
        origin = exchange.headers.get(b"origin")
        if origin and ({"*", origin.decode("latin-1")} & set(self.limits.cors_origins)):
            exchange.extra += [(b"access-control-allow-origin", origin), (b"vary", b"origin")]
            exchange.extra.append((b"access-control-expose-headers", b"x-request-id"))

    def _note(self, exchange: Exchange, endpoint: str) -> None:
        took = time.monotonic() - exchange.began
        metrics.REQUESTS.labels(endpoint, str(exchange.status)).inc()
        metrics.REQUEST_SECONDS.labels(endpoint).observe(took)
        if exchange.first_byte_at:
            metrics.FIRST_BYTE_SECONDS.labels(endpoint).observe(exchange.first_byte_at - exchange.began)
        if self._record is not None:
            self._record(exchange, endpoint, took)
        facts = {
            "id": exchange.id,
            "client": exchange.client,
            "method": exchange.method,
            "endpoint": endpoint,
        }
        facts |= {"status": exchange.status, "seconds": round(took, 4), **exchange.note}
        _log.info("%s", orjson.dumps(facts).decode())

    # -- generating ----------------------------------------------------------------------------------

    async def generate(self, exchange: Exchange, kind: Kind) -> None:
        """Admission, preparation, Triton, and the answer in the form that ``kind`` gives it."""
        with self.admitted(exchange):
            body = await exchange.json(self.limits.max_body_bytes, self.limits.body_timeout_s)
            _adopt_id(exchange, body)
            await exchange.unless_gone(self._answer(exchange, body, kind))

    def admitted(self, exchange: Exchange) -> _Admission:
        """A place among the requests that are worked on, for a ``with`` block. Raises ApiError: 429, 503."""
        if self.draining:
            raise errors.unavailable(STOPPING)
        if self._in_flight >= self.limits.max_in_flight:
            raise errors.busy(
                f"{self.limits.max_in_flight} requests are being worked on: try again in a moment"
            )
        return _Admission(self, exchange)

    def hold(self, exchange: Exchange) -> None:
        """Somebody tells its client if this process is killed."""
        error = errors.killed()
        exchange.hold(self._channel, error, enveloped(exchange, error), last_event(exchange, error))

    async def _answer(self, exchange: Exchange, body: Any, kind: Kind) -> None:
        loop = asyncio.get_running_loop()
        made: Job = await loop.run_in_executor(self.pool, kind.prepare, body, self.model, exchange.id)
        answers = self.triton.ask(made.requests, made.n, self.limits.answer_timeout_s)
        self._live.add(answers)
        metrics.PROMPT_TOKENS.inc(made.num_prompt_tokens)
        exchange.note["prompt_tokens"] = made.num_prompt_tokens
        form = kind.stream(made, self.model, body) if made.stream else kind.whole(made, self.model, body)
        try:
            if made.stream:
                if await _stream(exchange, answers, form, made.names, self.proved) is not None:
                    self._ready_until = 0.0
            else:
                await _whole(exchange, answers, form, self.proved)
        except ApiError as error:
            raise errors.renamed(error, made.names) from None
        finally:
            self._live.discard(answers)
            answers.close()
            metrics.GENERATED_TOKENS.inc(form.counts.generated)
            exchange.note["generated_tokens"] = form.counts.generated

    async def ready(self) -> bool:
        """Whether a token comes out of the model, asked at most once a second.

        Raises:
            ApiError: 503 and why.
        """
        if self.draining:
            raise errors.unavailable(STOPPING)
        if time.monotonic() < self._ready_until:
            return True
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self.triton.answers(READY_TIMEOUT_S))
        try:
            await asyncio.shield(self._asking)
        except ApiError as error:
            if error.status == 504 and time.monotonic() < self._ready_until + READY_TIMEOUT_S:
                return True  # it is busy: others get their tokens meanwhile
            raise errors.unavailable(error.message) from None
        self.proved()
        return True

    def proved(self) -> None:
        """A token has come out of the model."""
        self._ready_until = time.monotonic() + READY_FOR_S


class _Admission:
    """A place among the requests that are worked on."""

    def __init__(self, gateway: Gateway, exchange: Exchange) -> None:
        self._gateway = gateway
        self._exchange = exchange

    def __enter__(self) -> None:
        self._gateway.hold(self._exchange)
        self._gateway._in_flight += 1
        metrics.IN_FLIGHT.inc()

    def __exit__(self, *_: object) -> None:
        self._gateway._in_flight -= 1
        metrics.IN_FLIGHT.dec()


def enveloped(exchange: Exchange, error: ApiError) -> bytes:
    """As the endpoint's clients know it."""
    return passage.envelope(error) if exchange.path.startswith("/v2") else error.body()


def last_event(exchange: Exchange, error: ApiError) -> bytes:
    """What ends a stream of the endpoint, whoever writes it."""
    if exchange.path.startswith("/v2"):
        return b"data: " + passage.envelope(error) + b"\n\n"
    return responses.last_event(error) if exchange.path == "/v1/responses" else forms.last_event(error)


async def _stream(
    exchange: Exchange, answers: Answers, form: Stream, names: Mapping[str, str], proved: Callable[[], None]
) -> ApiError | None:
    """What Triton has said at once is one write; nothing is waited for. Returns what the stream has failed of."""
    pieces = await answers.next()
    await exchange.start(200, SSE)
    await exchange.write(form.open() + form.feed(pieces))
    try:
        while pieces := await answers.next():
            proved()
            if data := form.feed(pieces):
                await exchange.write(data)
    except ApiError as failure:
        error = errors.renamed(failure, names)
        exchange.note["error"] = error.message
        await exchange.write(form.fail(error), more=False)
        return error
    await exchange.write(form.close(), more=False)
    return None


async def _whole(exchange: Exchange, answers: Answers, form: Whole, proved: Callable[[], None]) -> None:
    while pieces := await answers.next():
        proved()
        form.feed(pieces)
    await exchange.respond(form.body())


class Kind:
    """What differs between the endpoints that generate."""

    def __init__(
        self,
        prepare: Callable[[Any, ServedModel, str], Job],
        stream: Callable[[Job, ServedModel, Any], Any],
        whole: Callable[[Job, ServedModel, Any], Any],
    ) -> None:
        self.prepare = prepare
        self.stream = stream
        self.whole = whole

    async def __call__(self, gateway: Gateway, exchange: Exchange) -> None:
        await gateway.generate(exchange, self)


def _adopt_id(exchange: Exchange, body: Any) -> None:
    """The id that vLLM's clients send in the body, where the header has none."""
    given = body.get("request_id") if isinstance(body, dict) else None
    if isinstance(given, str) and good_id(given) and b"x-request-id" not in exchange.headers:
        exchange.id = given


# -- the other endpoints -----------------------------------------------------------------------------


async def _page(gateway: Gateway, exchange: Exchange) -> None:
    await exchange.respond(
        html(),
        headers=[
            (b"content-type", b"text/html; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-frame-options", b"DENY"),  # the page's own policy cannot forbid it
        ],
    )


async def _no_icon(gateway: Gateway, exchange: Exchange) -> None:
    await exchange.respond(b"", 204)


async def _health(gateway: Gateway, exchange: Exchange) -> None:
    """This process lives, whatever the engine does."""
    await exchange.respond(b"", headers=[])


async def _ready(gateway: Gateway, exchange: Exchange) -> None:
    await gateway.ready()
    await exchange.respond(b"", headers=[])


async def _version(gateway: Gateway, exchange: Exchange) -> None:
    await exchange.respond(orjson.dumps({"version": gateway.settings.upstream.version}))


async def _metrics(gateway: Gateway, exchange: Exchange) -> None:
    loop = asyncio.get_running_loop()
    text = await loop.run_in_executor(gateway.pool, gateway.metrics_page)
    await exchange.respond(text, headers=[(b"content-type", metrics.CONTENT_TYPE)])


async def _models(gateway: Gateway, exchange: Exchange) -> None:
    cards = [gateway.model.card(name) for name in gateway.model.names]
    await exchange.respond(orjson.dumps({"object": "list", "data": cards}))


async def _model(gateway: Gateway, exchange: Exchange) -> None:
    name = gateway.model.check_name(exchange.path.removeprefix("/v1/models/"))
    await exchange.respond(orjson.dumps(gateway.model.card(name)))


async def _tokenize(gateway: Gateway, exchange: Exchange) -> None:
    await _computed(gateway, exchange, tokens.tokenize)


async def _detokenize(gateway: Gateway, exchange: Exchange) -> None:
    await _computed(gateway, exchange, tokens.detokenize)


async def _computed(
    gateway: Gateway, exchange: Exchange, work: Callable[[Any, ServedModel], Mapping[str, Any]]
) -> None:
    """Answered by a thread of the gateway alone."""
    with gateway.admitted(exchange):
        body = await exchange.json(gateway.limits.max_body_bytes, gateway.limits.body_timeout_s)
        loop = asyncio.get_running_loop()
        made = await exchange.unless_gone(
            _of_future(loop.run_in_executor(gateway.pool, work, body, gateway.model))
        )
        await exchange.respond(orjson.dumps(made))


async def _of_future(future: Awaitable[Any]) -> Any:
    return await future


async def _pass_on(gateway: Gateway, exchange: Exchange) -> None:
    if gateway.triton_http is None:
        raise ApiError(404, "Triton's HTTP endpoints are off", code="not_found")
    if exchange.path == "/v2/health/ready":
        await gateway.ready()
    if passage.ANSWERS.fullmatch(exchange.path):
        with gateway.admitted(exchange):
            await gateway.triton_http.serve(exchange)
    else:
        await gateway.triton_http.serve(exchange)


async def _preflight(gateway: Gateway, exchange: Exchange) -> None:
    exchange.extra += [
        (b"access-control-allow-methods", b"GET, POST"),
        (b"access-control-allow-headers", b"authorization, content-type, x-request-id"),
        (b"access-control-max-age", b"600"),
    ]
    await exchange.respond(b"", 204, headers=[])


ROUTES: dict[str, tuple[str, Handler]] = {
    "/": ("GET", _page),
    "/favicon.ico": ("GET", _no_icon),
    "/health": ("GET", _health),
    "/ready": ("GET", _ready),
    "/health/ready": ("GET", _ready),
    "/version": ("GET", _version),
    "/metrics": ("GET", _metrics),
    "/v1/models": ("GET", _models),
    "/v1/models/{id}": ("GET", _model),
    "/tokenize": ("POST", _tokenize),
    "/detokenize": ("POST", _detokenize),
    "/v1/completions": (
        "POST",
        Kind(
            job.of_completions,
            lambda made, model, body: CompletionStream(made, model),
            lambda made, model, body: CompletionWhole(made, model),
        ),
    ),
    "/v1/chat/completions": (
        "POST",
        Kind(
            job.of_chat,
            lambda made, model, body: ChatStream(made, model),
            lambda made, model, body: ChatWhole(made, model),
        ),
    ),
    "/v1/responses": ("POST", Kind(responses.prepare, responses.EventStream, responses.WholeResponse)),
}
