"""The client that people write first: aiohttp, a line at a time, json.loads.

Arguments: URL INPUT OUT CONCURRENCY TOKENS.
"""

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp


async def serve(url: str, rows: list[Any], concurrency: int, tokens: int) -> list[Any]:
    slots = asyncio.Semaphore(concurrency)
    answers = []

    async def ask(session: aiohttp.ClientSession, prompt: str) -> None:
        body = {
            "model": "truth",
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with slots:
            text, first, identity, began = [], None, None, time.monotonic()
            async with session.post(f"{url}/chat/completions", json=body) as response:
                async for line in response.content:
                    if not line.startswith(b"data: {"):
                        continue
                    chunk = json.loads(line[6:])
                    identity = chunk["id"]
                    for choice in chunk["choices"]:
                        if choice["delta"].get("content"):
                            first = first or time.monotonic()
                            text.append(choice["delta"]["content"])
            answers.append({"response_id": identity, "ttft_s": (first or began) - began, "text": "".join(text)})

    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        await asyncio.gather(*(ask(session, row["prompt"]) for row in rows))
    return answers


def main(url: str, prompts: str, out: str, concurrency: str, tokens: str) -> None:
    rows = [json.loads(line) for line in Path(prompts).read_text().splitlines()]
    answers = asyncio.run(serve(url, rows, int(concurrency), int(tokens)))
    Path(out).write_text("".join(json.dumps(answer) + "\n" for answer in answers))


main(*sys.argv[1:])
