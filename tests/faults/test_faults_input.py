"""Hostile prompt files through the command line: one outcome for each row or one clear refusal, and by the endpoint's
ledger nothing is sent that is not a request."""

from __future__ import annotations

import gzip
import json
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli import batchstream, rows_of

from batchstream.endpoints.simulate import SimulateConfig, Simulator, running

INVALID: tuple[Callable[[random.Random], bytes], ...] = (
    lambda c: b'{"prompt": "x", "temperature": %b}' % c.choice((b"NaN", b"Infinity", b"-Infinity", b"1e999", b"true")),
    lambda c: b'{"prompt": "x", "seed": ' + b"9" * c.choice((4301, 5000, 100_000)) + b"}",
    lambda c: (
        b'{"prompt": "%b"}' % c.choice((b"\\ud800", b"a\\udc00b", b"\xed\xa0\x80", b"\xff\xfe", b"a\x00b", b"\xc3"))
    ),
    lambda c: b'{"prompt": "x", "metadata": ' + b'{"a":' * (n := c.randrange(150, 5000)) + b"1" + b"}" * n + b"}",
    lambda c: b"[" * c.randrange(1, 300_000),
    lambda c: c.choice(
        (b"17", b"null", b'"prompt"', b"[]", b"{}", b"{nope}", b'{"prompt": "x"', b"\xef\xbb\xbf{", b"}{", b"\x00")
    ),
    lambda c: json.dumps({"prompt": c.choice((None, 1, 1.5, True, [1], {"a": 1}))}).encode(),
    lambda c: json.dumps(
        {"prompt": "x", c.choice(("max_tokens", "temperature", "n")): c.choice(("many", [], {}))}
    ).encode(),
    lambda c: json.dumps({"prompt": "x", "messages": [{"role": "user", "content": "x"}]}).encode(),
    lambda c: json.dumps({"messages": c.choice(("hi", {}, [1], [[]], None))}).encode(),
    lambda c: batch_line(
        c,
        url=c.choice(
            (
                "http://127.0.0.1:1/v1/chat/completions",
                "//evil.invalid/v1",
                "/v1/../admin",
                "/v1/embeddings",
                "file:///etc/passwd",
                "",
                7,
                None,
                "/v1/chat/completions?x=1",
                "/v1/chat/completions\r\nX: y",
            )
        ),
    ),
    lambda c: batch_line(c, method=c.choice(("GET", "DELETE", "post ", 1, None))),
    lambda c: batch_line(c, body=c.choice((None, "x", [], 3))),
)
"""Each gives a line that is no request."""

ODD: tuple[Callable[[random.Random], bytes], ...] = (
    lambda c: b'{"prompt": "first", "prompt": "two equal keys %d"}' % c.randrange(10**9),
    lambda c: b'{"prompt": "escaped \\u0000 %d"}' % c.randrange(10**9),
    lambda c: b'{"prompt": "huge %d", "seed": 123456789012345678901234567890}' % c.randrange(10**9),
    lambda c: b'  {"prompt": "blanks around %d"} \r' % c.randrange(10**9),
    lambda c: f'{{"prompt": "line \u2028 \u0085 separators {c.randrange(10**9)}"}}'.encode(),
    lambda c: json.dumps(
        {"id": c.choice(("same", "../../x", "a\r\nb", "\u202e", 7)), "prompt": f"id {c.random()}"}
    ).encode(),
    lambda c: json.dumps({"prompt": "[" * c.randrange(1, 9999) + str(c.random())}).encode(),
    lambda c: json.dumps(
        {"prompt": str(c.random()), "unknown": {"deep": [[[[1]]]]}, "base_url": "http://evil.invalid"}
    ).encode(),
    lambda c: batch_line(c),
)
"""Each gives a line that looks odd and is a request."""


def batch_line(chance: random.Random, **changed: Any) -> bytes:
    body = {"messages": [{"role": "user", "content": f"batch {chance.random()}"}]}
    line = {"custom_id": "same", "method": "POST", "url": "/v1/chat/completions", "body": body, **changed}
    return json.dumps(line).encode()


def ask(simulator: Simulator, name: str, folder: Path, *more: object):
    args = ("run", name, "-o", "out.jsonl", "--base-url", simulator.base_url, "--model", "sim", "-q", *more)
    return batchstream(*args, cwd=folder)


@pytest.mark.parametrize("seed", range(3))
def test_every_line_has_one_outcome_and_only_requests_are_sent(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    lines, valid = [b'{"prompt": "good"}'], [True]
    for _ in range(300):
        good = chance.random() < 0.4
        lines.append(chance.choice(ODD if good else INVALID)(chance))
        valid.append(good)
        assert b"\n" not in lines[-1]
        if chance.random() < 0.1:
            lines.append(chance.choice((b"", b"   ", b"\r", b"\t")))  # blank lines are no rows
    (tmp_path / "p.jsonl").write_bytes(b"\n".join(lines))
    numbers = [number for number, line in enumerate(lines, start=1) if line.strip()]
    with running(SimulateConfig(tokens=3)) as simulator:
        done = ask(simulator, "p.jsonl", tmp_path)
        assert done.returncode == 3, done.stderr
        assert "Traceback" not in done.stderr
        rows = rows_of(tmp_path / "out.jsonl")
        assert [row["row"] for row in rows] == list(range(len(valid)))
        for row, good, number in zip(rows, valid, numbers, strict=True):
            line = lines[number - 1][:80]
            assert (row["status"] == "ok") == good, f"{line!r}: {row['error']}"
            if not good:
                assert (row["error"]["kind"], row["attempts"]) == ("invalid_row", 0)
                assert row["error"]["message"].startswith(f"p.jsonl:{number}: "), row["error"]
                assert len(row["error"]["message"]) < 400
        assert simulator.ledger.requests == sum(valid)
        again = ask(simulator, "p.jsonl", tmp_path)
        assert (again.returncode, simulator.ledger.requests) == (3, sum(valid))
        # With --invalid fail, a file with one such line is refused before anything is sent.
        refused = ask(simulator, "p.jsonl", tmp_path, "--invalid", "fail", "-o", "other.jsonl")
        assert refused.returncode == 10
        assert "p.jsonl:" in refused.stderr
        assert simulator.ledger.requests == sum(valid)


def gzipped(rows: bytes) -> bytes:
    return gzip.compress(rows)


def parquet(rows: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"prompt": [json.loads(row)["prompt"] for row in rows.splitlines()]}), sink)
    return sink.getvalue().to_pybytes()


GOOD = b"".join(b'{"prompt": "row %d"}\n' % (i * i * i) for i in range(3000))
REFUSED = {
    "utf16.jsonl": (GOOD.decode().encode("utf-16"), "UTF-8"),
    "cut.parquet": (parquet(GOOD)[:-7], "cut off"),
    "no.parquet": (b"PAR1 but not really PAR1", ""),
    "empty.parquet": (b"", "got an empty one"),
    "empty.jsonl.gz": (b"", "got an empty one"),
    "empty.jsonl.zst": (b"", "got an empty one"),
    "columns.parquet": (parquet(GOOD).replace(b"prompt", b"pr\xc3\xb6mp"), ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_not_what_it_says_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    data, says = REFUSED[name]
    (tmp_path / name).write_bytes(data)
    with running(SimulateConfig(tokens=3)) as simulator:
        done = ask(simulator, name, tmp_path)
        assert done.returncode in (2, 10), done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert name in done.stderr
        assert says in done.stderr
        assert simulator.ledger.requests == 0
        assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("name", ["no.jsonl.gz", "no.jsonl.zst", "no.csv", "no.jsonl"])
def test_what_a_file_is_decides_its_content_and_what_is_no_request_is_not_sent(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"neither gzip\nnor JSON\n")
    with running(SimulateConfig(tokens=3)) as simulator:
        done = ask(simulator, name, tmp_path)
        assert (done.returncode, simulator.ledger.requests) == (3, 0), done.stderr
    assert [row["error"]["kind"] for row in rows_of(tmp_path / "out.jsonl")] == ["invalid_row"] * 2


def test_a_gzip_file_that_was_cut_gives_no_results_file_and_keeps_what_it_gave(tmp_path: Path) -> None:
    """The rows before the cut are whole rows. When the file has been mended they are not asked again."""
    (tmp_path / "p.jsonl.gz").write_bytes(gzipped(GOOD)[:-3000])
    with running(SimulateConfig(tokens=3)) as simulator:
        done = ask(simulator, "p.jsonl.gz", tmp_path)
        assert done.returncode == 10, done.stderr
        assert "cut off" in done.stderr
        assert not (tmp_path / "out.jsonl").exists()
        sent = simulator.ledger.requests
        (tmp_path / "p.jsonl.gz").write_bytes(gzipped(GOOD))
        mended = ask(simulator, "p.jsonl.gz", tmp_path, "--allow-append")
        assert mended.returncode == 0, mended.stderr
        assert 3000 <= simulator.ledger.requests <= 3000 + 16, f"{sent} had been sent before"
    assert len(rows_of(tmp_path / "out.jsonl")) == 3000


def test_a_line_of_a_hundred_megabytes_is_one_failed_row_in_bounded_memory(tmp_path: Path) -> None:
    with open(tmp_path / "p.jsonl", "wb") as file:
        file.write(b'{"prompt": "before"}\n{"prompt": "')
        for _ in range(100):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n{"prompt": "after"}\n')
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    with running(SimulateConfig(tokens=3)) as simulator:
        done = ask(simulator, "p.jsonl", tmp_path)
        assert done.returncode == 3, done.stderr
        assert simulator.ledger.requests == 2
    assert [row["status"] for row in rows_of(tmp_path / "out.jsonl")] == ["ok", "failed", "ok"]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert peak == before or peak < 300 << 10, f"{peak >> 10} MiB"
