"""Streams nobody would send: corpus bodies mutated, spliced and cut by a seeded generator."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from itertools import pairwise

from wire_corpus import Case, stream_cases

TOKENS = [
    b"\n\n",
    b"\r\n",
    b"\r",
    b"\n",
    b"data: ",
    b"data:",
    b"event: error\n",
    b"event: ",
    b"id: 1\n",
    b": ping\n\n",
    b"data: [DONE]\n\n",
    b'data: "[DONE]"\n\n',
    b"[DONE]",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b"\\",
    b"\\ud83d",
    b"\\ude00",
    b"null",
    b"true",
    b"0",
    b"-1",
    b"1e999",
    b"NaN",
    b"-Infinity",
    b"9" * 40,
    b"1" * 5000,
    b"\xff",
    b"\xe2\x82",
    b"\xef\xbb\xbf",
    b"\x00",
    b"\xe2\x80\xa8",
    b'{"error":{"code":503,"message":"m"}}\n',
    b'error: {"code":"x"}\n',
    b'{"error":null}\n',
    b'"index":null,',
    b'"index":"1",',
    b'"index":99999999999999999999,',
    b'"delta":null',
    b'"choices":null,',
    b'"choices":{},',
    b'"content":["x",{"text":"y"},{"thinking":"z"},7]',
    b'"content":{"text":"q"}',
    b'"tool_calls":[{"id":"i","function":{"name":"f"}}]',
    b'"tool_calls":[{"index":0,"function":{"arguments":{"a":[1]}}},null,5]',
    b'"usage":{"prompt_tokens":-1,"x":{"y":null}}',
    b'"finish_reason":"error"',
    b'"finish_reason":7',
    b'"logprobs":{"content":[1,null]}',
    b'"logprobs":[[]]',
    b"[" * 300,
    b'"reasoning":"r","reasoning_content":"r"',
    b'"reasoning_details":[{"text":"t"},3]',
    b'"audio":{"data":"A","id":[]}',
    b'"type":"error"',
    b'"type":"response.completed"',
    b'"type":"message_stop"',
    b'"type":"content_block_delta"',
    b'"message":{"content":"m","tool_calls":{"id":3}}',
    b'"text":"t",',
    b'"response":[]',
    b'"item":{"type":"function_call"}',
]

STATUSES = [200] * 12 + [201, 204, 400, 401, 404, 429, 500, 503, 599, 999, 100]
HEADERS = [
    ("content-encoding", "gzip"),
    ("content-encoding", "deflate"),
    ("content-encoding", "br"),
    ("content-encoding", "gzip, deflate"),
    ("retry-after", "1e400"),
    ("retry-after", "Sun, 99 Nov 2025 10:00:00 GMT"),
    ("retry-after-ms", "-1"),
    ("date", "nonsense"),
    ("x-ratelimit-remaining-requests", "0"),
    ("x-ratelimit-reset-requests", "1e308h"),
    ("x-should-retry", "TRUE"),
]


def mutated(body: bytes, others: list[Case], chance: random.Random) -> bytes:
    """`body` after one to four mutations, short enough to be quick."""
    for _ in range(chance.randint(1, 4)):
        body = body[:6000]
        at = chance.randrange(len(body) + 1)
        to = min(len(body), at + chance.choice((1, 1, 3, 20, 200)))
        match chance.randrange(8):
            case 0:
                body = body[:at] + body[to:]
            case 1:
                body = body[:at] + body[at:to] * 2 + body[to:]
            case 2 | 3 | 4:
                body = body[:at] + chance.choice(TOKENS) + body[to if chance.random() < 0.3 else at :]
            case 5:
                body = body[:at] + bytes([chance.randrange(256)]) + body[at + 1 :]
            case 6:
                other = chance.choice(others).body[:4000]
                body = body[:at] + other[chance.randrange(len(other) + 1) :]
            case _:
                body = body[:at]
    return body


def cut(body: bytes, chance: random.Random) -> list[bytes]:
    places = sorted(chance.randrange(len(body) + 1) for _ in range(chance.choice((0, 1, 2, 8))))
    bounds = [0, *places, len(body)]
    return [body[a:b] for a, b in pairwise(bounds)]


def streams(seed: int) -> Iterator[tuple[Case, list[bytes]]]:
    """Endless cases with their segments; the same for the same seed."""
    chance = random.Random(seed)
    cases = [case for case in stream_cases() if len(case.body) < 20_000]
    while True:
        case = chance.choice(cases)
        body = case.body
        if chance.random() < 0.95:
            body = mutated(body, cases, chance)
        headers = list(case.headers)
        if chance.random() < 0.15:
            headers.insert(0, chance.choice(HEADERS))
            if chance.random() < 0.5:
                body = zlib.compress(body, 1)
        yield (
            Case(
                case.id,
                chance.choice((case.api, case.api, case.api, "chat", "completions", "responses", "anthropic")),
                chance.choice((None, None, 1, 2)),
                chance.choice(STATUSES) if chance.random() < 0.2 else case.status,
                headers,
                [],
                chance.choice(("close", "reset")),
                {},
            ),
            cut(body, chance),
        )
