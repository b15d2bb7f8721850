"""32 prompts at the same time with asyncio; they share the engine's batches."""

import asyncio
import time

from flightline.client import AsyncClient, ClientError


async def main() -> None:
    prompts = [f"Write one sentence about the number {number}." for number in range(32)]
    begun = time.perf_counter()
    async with AsyncClient(timeout_s=300) as llm:
        answers = await asyncio.gather(
            *(llm.generate(prompt, max_tokens=24) for prompt in prompts), return_exceptions=True
        )
    seconds = time.perf_counter() - begun
    good = [answer for answer in answers if not isinstance(answer, BaseException)]
    for answer in answers:
        if isinstance(answer, BaseException) and not isinstance(answer, ClientError):
            raise answer
    tokens = sum(answer.num_output_tokens or 0 for answer in good)
    print(f"{len(good)} of {len(prompts)} answered: {tokens} tokens in {seconds:.1f} s")
    print(good[0].text.strip() if good else next(str(error) for error in answers))


asyncio.run(main())
