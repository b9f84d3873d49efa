"""Rows in: the shapes, the formats, hostile input."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from batchstream.errors import IdentityError, InputError, UsageError
from batchstream.files.ids import RepeatedIds
from batchstream.files.rows import URLS
from batchstream.files.source import BATCH_ROWS, BLOCK_ROWS, SourceSpec, open_source
from batchstream.files.spool import spool_stdin
from batchstream.records import InvalidRow, Request


def build(api, common):
    """A stand-in for the wire's own: it shows what it was given."""
    return {"api": api, **common}


def rows_of(*paths, **options):
    source = open_source(SourceSpec(paths=tuple(map(str, paths)), **options), build)
    return [row for batch in source.batches() for row in batch]


def lines(path: Path, *rows) -> Path:
    path.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
    return path


# --- shapes


def test_a_prompt_row_takes_its_own_parameters_before_the_jobs(tmp_path):
    path = lines(tmp_path / "p.jsonl", {"prompt": "hi", "temperature": 0.5, "max_tokens": None, "label": "x"})
    (row,) = rows_of(path, defaults={"temperature": 1, "max_tokens": 9, "model": "m"}, system="be brief")
    assert row.body == {
        "api": "chat",
        "prompt": "hi",
        "temperature": 0.5,
        "max_tokens": 9,
        "model": "m",
        "system": "be brief",
    }


def test_a_column_that_is_no_parameter_is_never_sent(tmp_path):
    path = lines(tmp_path / "p.jsonl", {"prompt": "hi", "host": "evil", "headers": {}, "base_url": "u", "label": 1})
    assert rows_of(path)[0].body == {"api": "chat", "prompt": "hi"}


def test_messages_and_system(tmp_path):
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    (row,) = rows_of(lines(tmp_path / "p.jsonl", {"messages": messages, "id": 7}))
    assert row.id == "7"
    assert row.body["messages"] == messages


@pytest.mark.parametrize(("url", "api"), URLS.items())
def test_a_batch_line_picks_its_api_by_url(tmp_path, url, api):
    body = {"messages": [{"role": "user", "content": "x"}], "prompt": "x", "input": "x", "stream": False}
    line = {"custom_id": "c1", "method": "POST", "url": url, "body": body}
    (row,) = rows_of(lines(tmp_path / "b.jsonl", line), defaults={"model": "m"})
    assert (row.id, row.api, row.body["stream"], row.body["model"]) == ("c1", api, True, "m")
    assert row.body.get("stream_options") == ({"include_usage": True} if api in ("chat", "completions") else None)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"url": "https://evil.example/v1/chat/completions"}, "url: expected one of"),
        ({"url": "/v1/files"}, "url: expected one of"),
        ({"url": "//evil.example/v1/chat/completions"}, "url: expected one of"),
        ({"url": None}, "url: expected one of"),
        ({"method": "GET"}, "method: expected 'POST', got 'GET'"),
        ({"body": []}, "body: expected an object"),
        ({"body": {"messages": []}}, "body.messages: expected a non-empty array"),
        ({"body": {"messages": [{"content": "x"}]}}, "body.messages[0].role: expected a string"),
        ({"body": {"messages": [{"role": "user", "content": 1}]}}, "body.messages[0].content"),
        ({"body": {"messages": [{"role": "user"}], "temperature": "hot"}}, "body.temperature: expected a number"),
        ({"body": {"messages": [{"role": "user"}], "n": True}}, "body.n: expected an integer"),
        ({"body": {"messages": [{"role": "user"}], "stream_options": 1}}, "body.stream_options: expected an object"),
        ({"custom_id": 1.5}, "custom_id: expected a string or an integer"),
    ],
)
def test_a_bad_batch_line_names_its_field(tmp_path, change, says):
    good = {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user"}]}}
    _, bad = rows_of(lines(tmp_path / "b.jsonl", good, {**good, **change}))
    assert isinstance(bad, InvalidRow)
    assert bad.message.startswith(f"{tmp_path / 'b.jsonl'}:2: ")
    assert says in bad.message


def test_a_template_takes_named_columns_only(tmp_path):
    path = lines(tmp_path / "p.jsonl", {"text": "T", "n": 3, "obj": {"a": 1}, "temperature": 0})
    (row,) = rows_of(path, template="Say {{x}}: {text} {n} {obj}")
    assert row.body["prompt"] == 'Say {x}: T 3 {"a":1}'
    assert row.body["temperature"] == 0
    assert "n" not in row.body, "a column that the prompt is made of is data"


@pytest.mark.parametrize("template", ["{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "{}", "{0.x}", "{", "no field"])
def test_a_template_with_more_than_names_is_refused(tmp_path, template):
    with pytest.raises(UsageError, match="template: "):
        rows_of(lines(tmp_path / "p.jsonl", {"a": 1}), template=template)


def test_prompt_column_and_id_column(tmp_path):
    path = lines(tmp_path / "p.jsonl", {"q": "hi", "key": 5, "id": "no"}, {"q": None, "key": 6}, {"q": "x"})
    good, null, no_id = rows_of(path, prompt_column="q", id_column="key")
    assert (good.body["prompt"], good.id) == ("hi", "5")
    assert "p.jsonl:2: q: expected a string, got nothing" in null.message
    assert "p.jsonl:3: key: expected the row's id, got no such column" in no_id.message


def test_kept_columns_come_along_and_a_misspelt_one_is_refused(tmp_path):
    path = lines(tmp_path / "p.jsonl", {"prompt": "a", "label": 1}, {"prompt": "b"})
    assert [row.keep for row in rows_of(path, keep=("label",))] == [{"label": 1}, {"label": None}]
    assert rows_of(path, keep="all")[0].keep == {"prompt": "a", "label": 1}
    with pytest.raises(InputError, match="did you mean 'label'"):
        rows_of(path, keep=("lable",))


def test_a_file_without_any_request_is_refused_as_a_whole(tmp_path):
    with pytest.raises(InputError, match=r"p.jsonl:1: expected 'prompt'.*got the columns answer, question"):
        rows_of(lines(tmp_path / "p.jsonl", {"question": "a", "answer": "b"}))


def test_equal_requests_have_equal_digests_whatever_the_order_of_keys(tmp_path):
    one = b'{"prompt": "a", "temperature": 0, "seed": 1}\n'
    two = b'{"seed": 1,"temperature":0,   "prompt":"\\u0061"}\n'
    a, b, c = rows_of(lines(tmp_path / "p.jsonl", one, two, {"prompt": "b"}))
    assert a.digest == b.digest != c.digest


# --- formats


def test_gzip_zstd_and_parquet_give_the_rows_of_the_plain_file(tmp_path):
    wanted = [{"prompt": f"p{i}", "id": str(i), "temperature": i / 2} for i in range(100)]
    plain = lines(tmp_path / "p.jsonl", *wanted)
    (tmp_path / "p.jsonl.gz").write_bytes(
        gzip.compress(plain.read_bytes()[:500]) + gzip.compress(plain.read_bytes()[500:])
    )
    with pa.CompressedOutputStream(str(tmp_path / "p.jsonl.zst"), "zstd") as out:
        out.write(plain.read_bytes())
    parquet.write_table(pa.Table.from_pylist(wanted), tmp_path / "p.parquet", row_group_size=7)
    expected = rows_of(plain)
    assert len(expected) == 100
    for name in ("p.jsonl.gz", "p.jsonl.zst", "p.parquet"):
        assert rows_of(tmp_path / name) == expected, name
        assert open_source(SourceSpec(paths=(str(tmp_path / name),)), build).count() == 100


def test_parquet_structs_are_messages_and_their_nulls_are_not_given(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "a", "name": None}], "seed": 1, "tools": None},
        {"messages": [{"role": "user", "content": "b", "name": "n"}], "seed": None, "tools": '[{"type": "function"}]'},
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    a, b = rows_of(tmp_path / "p.parquet")
    assert a.body == {"api": "chat", "messages": [{"role": "user", "content": "a"}], "seed": 1}
    assert b.body["tools"] == [{"type": "function"}]


def test_a_parquet_row_is_named_by_its_number_and_a_missing_column_at_once(tmp_path):
    parquet.write_table(pa.table({"prompt": ["a", None], "t": [1.0, float("nan")]}), tmp_path / "p.parquet")
    assert "p.parquet:row 1: " in rows_of(tmp_path / "p.parquet")[1].message
    with pytest.raises(InputError, match="expected a column 'nope', got prompt, t"):
        open_source(SourceSpec(paths=(str(tmp_path / "p.parquet"),), keep=("nope",)), build)
    parquet.write_table(pa.table({"question": ["a"], "id": [1]}), tmp_path / "q.parquet")
    with pytest.raises(InputError, match=r"expected a column 'prompt'.*--prompt-column; got question, id"):
        open_source(SourceSpec(paths=(str(tmp_path / "q.parquet"),)), build)


def test_parquet_columns_that_do_not_matter_are_not_read_and_dates_are_kept_as_text(tmp_path):
    odd = pa.array([1, 2], pa.timestamp("ns"))  # nanoseconds have no Python type
    dates = pa.array([0, 1], pa.timestamp("s"))
    parquet.write_table(pa.table({"prompt": ["a", "b"], "odd": odd, "date": dates}), tmp_path / "p.parquet")
    found = rows_of(tmp_path / "p.parquet", keep=("date",))
    assert [row.keep for row in found] == [{"date": "1970-01-01T00:00:00"}, {"date": "1970-01-01T00:00:01"}]
    with pytest.raises(InputError, match=r"p\.parquet:row 0: cannot read on"):
        rows_of(tmp_path / "p.parquet", keep=("odd",))


def test_a_directory_and_a_glob_are_read_in_order_of_names_and_ordinals_run_on(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        lines(tmp_path / name, {"prompt": name})
    lines(tmp_path / "ignored.txt", {"prompt": "no"})
    (tmp_path / "a.results.jsonl.journal").mkdir()
    lines(tmp_path / "a.results.jsonl.journal" / "input.jsonl", {"prompt": "no"})
    lines(tmp_path / "_a.results.jsonl", {"prompt": "no"})
    for path in (tmp_path, tmp_path / "[ab].jsonl", tmp_path.as_uri()):
        found = [(row.row, row.id, row.body["prompt"]) for row in rows_of(path)]
        assert found == [(0, "0", "a.jsonl"), (1, "1", "b.jsonl")], path


@pytest.mark.parametrize("name", ["missing.jsonl", "missing-*.jsonl", "empty"])
def test_what_is_not_there_is_named(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=name.replace("*", r"\*")):
        rows_of(tmp_path / name)


def test_limit_cuts_and_sample_draws_the_same_rows_for_a_seed(tmp_path):
    path = lines(tmp_path / "p.jsonl", *({"prompt": str(i)} for i in range(200)))
    assert [row.row for row in rows_of(path, limit=5)] == [0, 1, 2, 3, 4]
    drawn = [row.row for row in rows_of(path, sample=20, seed=1)]
    assert drawn == sorted(set(drawn)) == [row.row for row in rows_of(path, sample=20, seed=1)]
    assert len(drawn) == 20
    assert drawn != [row.row for row in rows_of(path, sample=20, seed=2)]
    assert max(row.row for row in rows_of(path, sample=20, seed=1, limit=50)) < 50


def test_batches_are_small_start_where_asked_and_never_cross_a_block(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt":"x"}\n' * (BLOCK_ROWS + 40))
    source = open_source(SourceSpec(paths=(str(path),)), build)
    batches = list(source.batches(BLOCK_ROWS - 40))
    assert [row.row for batch in batches for row in batch] == list(range(BLOCK_ROWS - 40, BLOCK_ROWS + 40))
    assert all(len(batch) <= BATCH_ROWS for batch in batches)
    assert all(batch[0].row // BLOCK_ROWS == batch[-1].row // BLOCK_ROWS for batch in batches)


# --- hostile input


GOOD = b'{"prompt": "good"}\n'
HOSTILE = {
    "not JSON": b"{nope}\n",
    "NaN": b'{"prompt": "x", "temperature": NaN}\n',
    "an infinite number": b'{"prompt": "x", "temperature": 1e999}\n',
    "5000 digits": b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}\n",
    "a lone surrogate": b'{"prompt": "\\ud800"}\n',
    "a surrogate in UTF-8": b'{"prompt": "\xed\xa0\x80"}\n',
    "not UTF-8": b'{"prompt": "\xff"}\n',
    "a raw NUL": b'{"prompt": "a\x00b"}\n',
    "a number": b"17\n",
    "an array": b'["prompt"]\n',
    "deep nesting": b'{"prompt": "x", "metadata": ' + b'{"a":' * 200 + b"1" + b"}" * 200 + b"}\n",
    "very deep nesting": b"[" * 200_000 + b"\n",
    "a prompt of a wrong type": b'{"prompt": {"a": 1}}\n',
    "both": b'{"prompt": "x", "messages": [{"role": "user", "content": "x"}]}\n',
    "a parameter of a wrong type": b'{"prompt": "x", "max_tokens": "many"}\n',
    "a boolean for a number": b'{"prompt": "x", "temperature": true}\n',
    "nothing": b"{}\n",
    "a line cut off": b'{"prompt": "x"',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_line_is_one_invalid_row_named_by_its_line(tmp_path, name):
    path = lines(tmp_path / "p.jsonl", GOOD, b"\n  \r\n", HOSTILE[name])
    good, bad = rows_of(path)
    assert isinstance(good, Request)
    assert isinstance(bad, InvalidRow)
    assert bad.row == 1, "blank lines are not rows"
    assert bad.where == f"{path}:4"
    assert bad.message.startswith(bad.where + ": ")
    assert len(bad.message) < len(str(path)) + 300
    assert "\n" not in bad.message


def test_what_looks_odd_but_is_json_is_accepted(tmp_path):
    odd = [
        b'\xef\xbb\xbf{"prompt": "byte order mark"}\r\n',
        b'{"prompt": "first", "prompt": "last of two equal keys"}\n',
        b'{"prompt": "escaped NUL \\u0000"}\n',
        b'{"prompt": "' + b"[" * 500 + b'"}\n',
        b'{"prompt": "big", "seed": 123456789012345678901234567890}\n',
        b'{"prompt": "no newline at the end"}',
    ]
    found = rows_of(lines(tmp_path / "p.jsonl", *odd))
    assert [type(row) for row in found] == [Request] * len(odd)
    assert found[1].body["prompt"] == "last of two equal keys"
    assert found[4].body["seed"] == 123456789012345678901234567890


def test_a_line_over_the_cap_is_skipped_and_the_next_is_read(tmp_path):
    path = lines(tmp_path / "p.jsonl", GOOD, b'{"prompt": "' + b"x" * 100_000 + b'"}\n', GOOD)
    first, long, last = rows_of(path, max_line_bytes=1000)
    assert "p.jsonl:2: expected a line of at most 1,000 bytes" in long.message
    assert isinstance(first, Request)
    assert (last.row, last.body["prompt"]) == (2, "good")


def test_a_compressed_or_parquet_file_that_is_cut_is_refused(tmp_path):
    plain = b"".join(b'{"prompt": "%d"}\n' % (i * i) for i in range(5000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain)[:-2000])
    whole = tmp_path / "whole.zst"
    with pa.CompressedOutputStream(str(whole), "zstd") as out:
        out.write(plain)
    (tmp_path / "b.jsonl.zst").write_bytes(whole.read_bytes()[:-2000])
    parquet.write_table(pa.table({"prompt": ["a"] * 100}), tmp_path / "whole.parquet")
    (tmp_path / "c.parquet").write_bytes((tmp_path / "whole.parquet").read_bytes()[:-10])
    for name in ("a.jsonl.gz", "b.jsonl.zst", "c.parquet"):
        with pytest.raises(InputError, match=r"(?i)" + name + ".*cut off"):
            rows_of(tmp_path / name)


def test_utf16_and_a_json_array_are_told_apart_from_json_lines(tmp_path):
    (tmp_path / "u.jsonl").write_text('{"prompt": "x"}\n', encoding="utf-16")
    with pytest.raises(InputError, match="expected UTF-8, got UTF-16"):
        rows_of(tmp_path / "u.jsonl")
    (row,) = rows_of(lines(tmp_path / "a.jsonl", b'[{"prompt": "x"}]\n'))
    assert "a JSON array is not JSON Lines" in row.message


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=60).map(lambda line: line.replace(b"\n", b"")), max_size=40))
def test_any_bytes_give_one_row_a_line_or_one_refusal(tmp_path_factory, junk):
    path = lines(tmp_path_factory.mktemp("any") / "p.jsonl", GOOD, *(line + b"\n" for line in junk))
    found = rows_of(path)
    assert len(found) == 1 + sum(1 for line in junk if line.strip())
    assert [row.row for row in found] == list(range(len(found)))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(
    ["prompt", "messages", "body", "url", "method", "custom_id", "id", "system", "temperature", "tools"]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.dictionaries(KEYS, json_values, max_size=5), max_size=10))
def test_any_objects_give_one_outcome_each(tmp_path_factory, objects):
    path = lines(tmp_path_factory.mktemp("any") / "p.jsonl", GOOD, *objects)
    assert [row.row for row in rows_of(path)] == list(range(len(objects) + 1))


# --- stdin


def test_stdin_is_spooled_and_compared_on_the_next_start(tmp_path):
    import io

    data = GOOD * 3
    path = spool_stdin(io.BytesIO(data), tmp_path)
    assert len(rows_of("-", spool=str(path))) == 3
    assert spool_stdin(io.BytesIO(data), tmp_path) == path
    assert spool_stdin(io.BytesIO(b""), tmp_path).read_bytes() == data, "an empty stdin resumes with what was spooled"
    for other in (b"x" + data[1:], data[:-1], data + GOOD):
        with pytest.raises(IdentityError, match="stdin differs"):
            spool_stdin(io.BytesIO(other), tmp_path)
    assert path.read_bytes() == data
    spool_stdin(io.BytesIO(data + GOOD), tmp_path, allow_append=True)
    assert path.read_bytes() == data + GOOD
    spool_stdin(io.BytesIO(b"other"), tmp_path, new_job=True)
    assert path.read_bytes() == b"other"
    assert os.listdir(tmp_path) == ["input.jsonl"]


# --- ids


def test_repeated_ids_are_noticed_in_constant_memory():
    ids = RepeatedIds(bits=1 << 20)
    assert [ids.seen(name) for name in ("a", "b", "a", "c", "a")] == [False, False, True, False, True]
    assert ids.count == 2
    assert ids.examples == ["a", "a"]
    assert not any(ids.seen(f"row-{row}") for row in range(5000))


# --- size


def test_a_million_rows_are_read_in_constant_memory_without_pyarrow(tmp_path):
    path = tmp_path / "p.jsonl"
    with open(path, "w") as file:
        for start in range(0, 1_000_000, 10_000):
            file.writelines(f'{{"prompt":"question {row}"}}\n' for row in range(start, start + 10_000))
    program = (
        "import resource, sys\n"
        "from batchstream.files.source import SourceSpec, open_source\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "source = open_source(SourceSpec(paths=(sys.argv[1],)), lambda api, common: common)\n"
        "rows = 0\n"
        "for batch in source.batches():\n"
        "    rows += len(batch)\n"
        "    if rows == 3200: early = peak()\n"
        "print(rows, peak() - early, 'pyarrow' in sys.modules)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    command = [sys.executable, "-c", program, str(path)]
    rows, growth, arrow = subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout.split()
    assert (rows, arrow) == ("1000000", "False")
    assert int(growth) < 8, f"{growth} MiB more after a million rows"
