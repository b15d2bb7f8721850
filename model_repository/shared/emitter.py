"""Carries an engine's output to Triton, and Triton's cancellations to the engine.

The engine's reader thread only files output; one emitter thread sends it. Sending is a round trip to
the server process, so while one response is on its way the next tokens of a request merge: one
response a token when idle, several tokens in one under load. Beginnings and ends of answers go before
what is between: somebody waits for them, with nothing to read or with a place in the engine to fill.
What is between gets half of the thread's time at the most: each response costs this process, Triton and
the client half a millisecond of a processor, which the engine's own process may want, and under load
the next one has more tokens instead. Nothing here blocks the engine.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from flightline.model_repository.shared.gate import Gate
from flightline.torch_engine.core.request import (
    Code,
    FinishReason,
    GenerationRequest,
    RequestError,
    RequestOutput,
)
from flightline.torch_engine.process.log import logger
from flightline.torch_engine.process.threads import end_process, vital

SEND_PATIENCE_S = 1.0
MIDDLE_SHARE = 0.5
"""Of the thread's time, for what is between the beginning and the end of answers."""
CHECK_SHARE = 0.02
"""Of the thread's time, for asking whether clients have gone: 40 us each."""
LONGEST_UNASKED_S = 0.5
"""Whatever that costs: a check that was kept from running, on a busy machine, says nothing of what the next will cost,
and who has gone away is to be noticed within a second."""


class Engine(Protocol):
    """What ``flightline.torch_engine.process.routing.Replicas`` offers."""

    def submit(self, request: GenerationRequest, on_output: Callable[[RequestOutput], None]) -> Any: ...

    def cancel(self, handle: Any) -> None: ...

    def stop(self, request_id: str) -> None: ...


@dataclass(eq=False)
class Reply:
    """One Triton request: where its responses go. It ends when each of its answers has."""

    sender: Any
    """``pb_utils.InferenceResponseSender``."""
    open_answers: int = 1
    cancelled: bool = False
    ended: bool = False
    """Its final response is an error: whatever its answers still produce is dropped."""


@dataclass(eq=False)
class Generation:
    """One answer on its way: of a batch row, and of several to it."""

    reply: Reply
    request: GenerationRequest
    stream: bool
    write: Callable[[RequestOutput, bool], Any]
    """(new output, is it the first) -> ``pb_utils.InferenceResponse``."""
    handle: Any = None
    """The engine's; None while it is being handed over."""
    first: bool = True
    pending: RequestOutput | None = field(default=None, init=False)
    queued_at: float = field(default=0.0, init=False)
    """When the output that waits to be sent began to wait; 0 = none waits."""


class Emitter:
    """One thread that sends the responses of one model."""

    def __init__(
        self,
        pb_utils: Any,
        engine: Engine,
        check_period_s: float = 0.1,
        abandon_after_s: float = 30.0,
        on_tick: Callable[[], None] = lambda: None,
        on_finish: Callable[[RequestOutput], None] = lambda output: None,
    ) -> None:
        """
        Args:
            check_period_s: how often, at the most, clients are asked whether they have gone, and ``on_tick`` runs.
            abandon_after_s: output that could not be sent for this long cancels its request.
            on_finish: called with the last output of each generation.
        """
        self.gate = Gate.of_server()
        self._pb = pb_utils
        self._engine = engine
        self._check_period_s = check_period_s
        self._abandon_after_s = abandon_after_s
        self._on_tick = on_tick
        self._on_finish = on_finish
        self._final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        self._changed = threading.Condition()
        self._ready: deque[Generation] = deque()
        self._first: deque[Generation] = deque()
        """Of the ready ones, those whose output begins or ends their answer; these may stand in ``_ready``, too."""
        self._rests_until = 0.0
        """When the next output that neither begins nor ends an answer may be sent (monotonic seconds)."""
        self._active: set[Generation] = set()
        self._closed = False
        self._thread = vital(self._run, "emitter")

    def start(self, generation: Generation) -> None:
        """Hands a generation to the engine; from here on its reply is answered, come what may."""
        self.gate.enter()
        with self._changed:
            self._active.add(generation)
        try:
            generation.handle = self._engine.submit(
                generation.request, lambda output: self._file(generation, output)
            )
        except RequestError as error:
            self._file(generation, RequestOutput(finish_reason=FinishReason.ERROR, error=error))
            return
        if generation.reply.cancelled:  # while it was being handed over
            self._cancel(generation)

    def stop_request(self, request_id: str) -> None:
        """Cancels the requests with this id, of whichever instance of the model; they end with what they have."""
        self._engine.stop(request_id)

    def _cancel(self, generation: Generation) -> None:
        """Nothing for one that is being handed over: whoever does that looks once more."""
        if generation.handle is not None:
            self._engine.cancel(generation.handle)

    def refuse(self, reply: Reply, error: RequestError) -> None:
        """Answers a whole request with an error.

        This must not fail: a client without an answer waits for ever, and only Triton can give it one when this
        process ends. Where there was no room for a response, there may be some in a moment.
        """
        deadline = time.monotonic() + SEND_PATIENCE_S
        reply.ended = True
        while True:
            try:
                reply.sender.send(self._error_response(error), flags=self._final)
                return
            except Exception as failure:
                if time.monotonic() > deadline:
                    end_process(f"a response cannot be sent ({failure}), and its client would wait for ever")
            time.sleep(SEND_PATIENCE_S / 20)

    def acknowledge(self, reply: Reply, decoupled: bool) -> None:
        """Answers a request that has no output; only a decoupled model may do so without a response."""
        response = () if decoupled else (self._pb.InferenceResponse([]),)
        reply.sender.send(*response, flags=self._final)

    def close(self) -> None:
        """Answers what is in flight and ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout=5)

    def _file(self, generation: Generation, output: RequestOutput) -> None:
        """Runs on the engine's reader thread."""
        abandoned = False
        with self._changed:
            if generation.pending is None:
                generation.pending = output
            else:
                generation.pending.extend(output)
            ends = output.finish_reason is not None
            if generation.stream or ends:
                waits = generation.queued_at > 0
                queue = self._first if ends or generation.first else self._ready
                if ends or not waits:
                    queue.append(generation)
                    # A thread that rests has something ready; only what may go at once shall wake it.
                    if queue is self._first or len(queue) == 1:
                        self._changed.notify()
                if not waits:
                    generation.queued_at = time.monotonic()
                elif time.monotonic() - generation.queued_at > self._abandon_after_s:
                    abandoned = True
        if abandoned:
            self._cancel(generation)

    def _run(self) -> None:
        next_check = time.monotonic() + self._check_period_s
        while True:
            with self._changed:
                if not (self._first or self._closed):
                    until = min(next_check, self._rests_until) if self._ready else next_check
                    if (seconds := until - time.monotonic()) > 0:
                        self._changed.wait(seconds)
                if self._closed:
                    break
                taken = self._take()
            began = time.monotonic()
            if taken is not None:
                generation, output = taken
                between = not (generation.first or output.finish_reason)
                self._send(generation, output)
                now = time.monotonic()
                if between:
                    self._rests_until = now + (now - began) * (1 / MIDDLE_SHARE - 1)
                began = now
            if began >= next_check:
                self._check()
                now = time.monotonic()
                next_check = now + self._unasked(now - began)
        closing = RequestError(Code.UNAVAILABLE, "the server is stopping")
        for generation in list(self._active):
            self._send(generation, RequestOutput(finish_reason=FinishReason.ERROR, error=closing))

    def _unasked(self, took_s: float) -> float:
        """Seconds until the next check, after one that took ``took_s``."""
        return max(self._check_period_s, min(took_s / CHECK_SHARE, LONGEST_UNASKED_S))

    def _take(self) -> tuple[Generation, RequestOutput] | None:
        """The next generation with output that may go, and all the output that waits for it; under the lock."""
        for queue in (self._first, self._ready):
            while queue and (queue is self._first or time.monotonic() >= self._rests_until):
                generation = queue.popleft()
                output = generation.pending
                if output is not None:  # else it went with its end
                    generation.pending, generation.queued_at = None, 0.0
                    return generation, output
        return None

    def _check(self) -> None:
        try:
            self._on_tick()
            self._cancel_abandoned()
        except Exception:  # the next check is soon
            traceback.print_exc()

    def _cancel_abandoned(self) -> None:
        replies: dict[Reply, list[Generation]] = {}
        with self._changed:
            for generation in self._active:
                replies.setdefault(generation.reply, []).append(generation)
        for reply, generations in replies.items():
            if not reply.cancelled and reply.sender.is_cancelled():
                reply.cancelled = True
                for generation in generations:
                    self._cancel(generation)

    def _send(self, generation: Generation, output: RequestOutput) -> None:
        reply, ended = generation.reply, output.finish_reason is not None
        if ended:
            with self._changed:
                self._active.discard(generation)
            reply.open_answers -= 1
            self._note_end(output)
        if reply.ended:
            if ended:
                self.gate.leave()
            return
        flags = self._final if ended and not reply.open_answers else 0
        try:
            response = (
                self._error_response(_of_sequence(generation.request, output.error))
                if output.error
                else generation.write(output, generation.first)
            )
        except Exception as error:  # a bug of ours must not take the emitter, and so every client, with it
            response = self._error_response(RequestError(Code.INTERNAL, f"response not written: {error!r}"))
        generation.first = False
        try:
            reply.sender.send(response, flags=flags)
        except Exception as error:
            self._give_up(reply, error)
        if ended:
            self.gate.leave()

    def _note_end(self, output: RequestOutput) -> None:
        try:
            self._on_finish(output)
        except Exception:  # its metrics; the client has its answer all the same
            traceback.print_exc()

    def _give_up(self, reply: Reply, error: Exception) -> None:
        """A response could not be sent, with /dev/shm full for instance: the request ends here, with an error."""
        logger("stub").error("a response could not be sent: %s", error)
        with self._changed:
            rest = [generation for generation in self._active if generation.reply is reply]
        for generation in rest:
            self._cancel(generation)
        self.refuse(reply, RequestError(Code.UNAVAILABLE, f"a response could not be sent: {error}"))

    def _error_response(self, error: RequestError) -> Any:
        code = getattr(self._pb.TritonError, error.code.value)
        return self._pb.InferenceResponse(error=self._pb.TritonError(error.message, code))


def _of_sequence(request: GenerationRequest, error: RequestError) -> RequestError:
    """An error has no tensors: which of several answers has failed stands in its text, and the others go on."""
    if not request.group:
        return error
    return RequestError(error.code, f"sequence_index {request.sequence_index}: {error.message}")
