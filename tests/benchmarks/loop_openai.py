"""A loop over the openai SDK. Arguments: URL INPUT OUT CONCURRENCY TOKENS."""

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI


async def serve(url: str, rows: list[Any], concurrency: int, tokens: int) -> list[Any]:
    slots = asyncio.Semaphore(concurrency)
    answers = []

    async def ask(client: AsyncOpenAI, prompt: str) -> None:
        async with slots:
            text, first, identity, began = [], None, None, time.monotonic()
            stream = await client.chat.completions.create(
                model="truth",
                messages=[{"role": "user", "content": prompt}],
                max_tokens=tokens,
                stream=True,
                stream_options={"include_usage": True},
            )
            async for chunk in stream:
                identity = chunk.id
                for choice in chunk.choices:
                    if choice.delta.content:
                        first = first or time.monotonic()
                        text.append(choice.delta.content)
            answers.append({"response_id": identity, "ttft_s": (first or began) - began, "text": "".join(text)})

    async with AsyncOpenAI(base_url=url, api_key="none", timeout=600) as client:
        await asyncio.gather(*(ask(client, row["prompt"]) for row in rows))
    return answers


def main(url: str, prompts: str, out: str, concurrency: str, tokens: str) -> None:
    rows = [json.loads(line) for line in Path(prompts).read_text().splitlines()]
    answers = asyncio.run(serve(url, rows, int(concurrency), int(tokens)))
    Path(out).write_text("".join(json.dumps(answer) + "\n" for answer in answers))


main(*sys.argv[1:])
