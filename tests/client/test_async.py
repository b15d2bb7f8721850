from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from flightline.client import AsyncClient, DeadlineExceeded, InvalidRequest, ServerUnavailable
from tests.client.waiting import eventually


def test_generate_and_stream_side_by_side(server):
    async def go():
        async with AsyncClient(server.url) as llm:
            await llm.check_ready()

            async def stream():
                return [chunk.text async for chunk in llm.generate_stream("hello", max_tokens=3)]

            return await asyncio.gather(llm.generate("hello", max_tokens=4), *(stream() for _ in range(20)))

    answer, *streams = asyncio.run(go())
    assert answer.text == " word" * 4
    assert streams == [[" word"] * 3] * 20


@pytest.mark.parametrize("model", ["text_generation", "ensemble"])
def test_leaving_a_stream_cancels(slow_server, model):
    async def go():
        async with AsyncClient(slow_server.url, model) as llm:
            async with aclosing(llm.generate_stream("hello", max_tokens=1000)) as stream:
                async for _ in stream:
                    break
            return await asyncio.to_thread(eventually, lambda: slow_server.log[0].outcome != "running")

    assert asyncio.run(go())
    assert len(slow_server.stop_requests) == (model == "ensemble")


def test_cancelling_the_task_cancels_the_request(slow_server):
    async def go():
        async with AsyncClient(slow_server.url) as llm:
            task = asyncio.create_task(llm.generate("hello", max_tokens=1000))
            await asyncio.to_thread(eventually, lambda: bool(slow_server.log))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return await asyncio.to_thread(eventually, lambda: slow_server.log[0].outcome == "cancelled")

    assert asyncio.run(go())


def test_errors(slow_server):
    async def go():
        async with AsyncClient(slow_server.url) as llm:
            with pytest.raises(DeadlineExceeded):
                await llm.generate("hello", max_tokens=1000, timeout_s=0.2)
            with pytest.raises(InvalidRequest, match="max_tokens is 0"):
                await llm.generate("hello", max_tokens=0)
        async with AsyncClient("127.0.0.1:9") as llm:
            with pytest.raises(ServerUnavailable, match="make serve"):
                await llm.generate("hello")

    asyncio.run(go())
