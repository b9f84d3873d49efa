"""Results out: placed whole, the same in every format, the same twice."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import minijob
import msgspec
import pyarrow as pa
import pytest
from disks import LazyDisk
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from batchstream.errors import DamagedError, InputError, UsageError
from batchstream.files.export import export
from batchstream.files.journal import JournalDir, journal_path
from batchstream.files.results import read_results
from batchstream.files.table import infer_input, read_parquet, result_schema, write_parquet
from batchstream.records import (
    Choice,
    FunctionCall,
    Latencies,
    Result,
    Retry,
    RowError,
    ToolCall,
    Usage,
)

CALL = ToolCall(id="c1", type="function", function=FunctionCall(name="f", arguments='{"a": 1'))
FULL = [
    Result(
        row=0, id="a", status="ok", text="zwölf \u0000 🙂", reasoning="hm", tool_calls=[CALL], finish_reason="stop",
        choices=[Choice(0, logprobs=[{"token": "x", "logprob": -0.5}]), Choice(1, tool_calls=[CALL], extra={"k": []})],
        logprobs=[{"token": "x", "bytes": [120], "top_logprobs": []}], model="m", response_id="r", request_id="q",
        usage=Usage(3, 4, 7, 0, None), timing=Latencies(started_at="2026-01-01T00:00:00Z", ttft_s=0.1, chunks=4),
        attempts=2, extra={"citations": [1]},
        retries=[Retry("rate_limit", 429, "slow", 1.5, None, None), Retry("cut", None, "x", None, 2.0, Usage(1))],
        input={"label": 1, "tags": ["a", None], "deep": {"b": 1.5}, "mixed": 1, "long": 2**60},
    ),
    Result(
        row=1, id="b", status="failed", error=RowError("auth", 401, "no, \"key\"\n", False), tool_calls=[], retries=[],
        input={"label": None, "tags": [], "deep": {"b": None}, "mixed": "x", "long": 5}, attempts=1,
    ),
    Result(row=2, id="c", status="failed", error=RowError("invalid", None, "bad", False), input=None),
]  # fmt: skip
LINES = [msgspec.json.encode(result) for result in FULL]


def parquet_of(path: Path, lines: list[bytes]) -> Path:
    write_parquet(LazyDisk(), path, lines, lambda: lines)
    return path


def body(result):
    return {"object": "chat.completion", "text": result["text"]}


@pytest.fixture
def finished(tmp_path):
    source = minijob.source_of(minijob.write_input(tmp_path / "in.jsonl"))
    out = tmp_path / "out.jsonl"
    assert minijob.run(source, out, LazyDisk(), tmp_path / "ledger").code == 0
    return source, out


# --- publishing


def test_a_second_build_is_byte_identical_and_a_deleted_file_is_built_again_without_a_request(finished, tmp_path):
    source, out = finished
    first = out.read_bytes()
    out.unlink()
    told = minijob.run(source, out, LazyDisk(), tmp_path / "ledger")
    assert (told.code, out.read_bytes()) == (0, first)
    assert minijob.asked_twice(tmp_path / "ledger") == 0


def test_a_results_file_that_somebody_changed_is_not_replaced(finished):
    source, out = finished
    out.write_text("edited\n")
    journal = JournalDir.acquire(out, minijob.manifest_of(source), disk=LazyDisk())
    with pytest.raises(UsageError, match=r"changed since.*--overwrite"):
        journal.publish(rows=minijob.ROWS, exit_code=0, finished="now")
    journal.close()
    assert out.read_text() == "edited\n"
    journal = JournalDir.acquire(out, minijob.manifest_of(source), disk=LazyDisk(), overwrite=True)
    journal.publish(rows=minijob.ROWS, exit_code=0, finished="now")
    journal.close()
    assert out.read_bytes() == minijob.expected()


def test_a_crash_between_rename_and_final_is_repaired_by_the_next_start(finished, tmp_path):
    source, out = finished
    (journal_path(out) / "FINAL.json").unlink()
    told = minijob.run(source, out, LazyDisk(), tmp_path / "ledger")
    assert told.code == 0
    assert minijob.asked_twice(tmp_path / "ledger") == 0
    assert (journal_path(out) / "FINAL.json").exists()


def test_a_row_too_few_or_a_row_under_another_number_is_never_published(tmp_path):
    source = minijob.source_of(minijob.write_input(tmp_path / "in.jsonl"))
    out = tmp_path / "out.jsonl"
    journal = JournalDir.acquire(out, minijob.manifest_of(source), disk=LazyDisk())
    segment = journal.segment()
    segment.append(0, 1, True, b'{"row":0,"status":"ok"}')
    segment.append(1, 1, True, b'{"row":5,"status":"ok"}')
    segment.close(clean=True)
    with pytest.raises(DamagedError, match="row 1: the stored result names another row"):
        journal.publish(rows=2, exit_code=0, finished="now")
    with pytest.raises(DamagedError):
        journal.publish(rows=24, exit_code=0, finished="now")
    journal.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl.journal"]


def test_the_final_document_counts_rows_and_tokens(finished):
    source, out = finished
    journal = JournalDir.acquire(out, minijob.manifest_of(source), disk=LazyDisk())
    final = journal.final
    journal.close()
    assert (final.rows, final.ok, final.failed, final.duplicates) == (24, 23, 1, 0)
    assert final.usage == {"prompt_tokens": 46, "completion_tokens": sum(range(24)) - 3}


def test_the_same_job_as_parquet_has_the_same_rows(tmp_path):
    source = minijob.source_of(minijob.write_input(tmp_path / "in.jsonl"))
    out = tmp_path / "out.parquet"
    journal = JournalDir.acquire(out, minijob.manifest_of(source), disk=LazyDisk())
    segment = journal.segment()
    for line in reversed(LINES):
        segment.append(msgspec.json.decode(line)["row"], 1, True, line)
    segment.close(clean=True)
    journal.publish(rows=3, exit_code=0, finished="now")
    first = out.read_bytes()
    out.unlink()
    journal.publish(rows=3, exit_code=0, finished="now")
    journal.close()
    assert out.read_bytes() == first
    assert [json.loads(line) for line in read_results(out)] == [json.loads(line) for line in LINES]


# --- Parquet


def test_the_columns_are_the_fields_of_a_result():
    assert tuple(result_schema(pa.null()).names) == Result.__struct_fields__
    for name, kind in (("usage", Usage), ("timing", Latencies), ("error", RowError)):
        column = result_schema(pa.null()).field(name).type
        assert tuple(field.name for field in column) == kind.__struct_fields__
    for name, kind in (("choices", Choice), ("retries", Retry), ("tool_calls", ToolCall)):
        column = result_schema(pa.null()).field(name).type.value_type
        assert tuple(field.name for field in column) == kind.__struct_fields__


def test_a_parquet_file_reads_back_as_the_rows_it_was_made_of(tmp_path):
    path = parquet_of(tmp_path / "r.parquet", LINES)
    assert list(read_parquet(path)) == [json.loads(line) for line in LINES]
    table = parquet.read_table(path)
    assert table.column("usage").combine_chunks().field("completion_tokens").to_pylist() == [4, None, None]
    assert table.schema.field("input").type.field("tags").type.value_type == pa.string()
    assert table.schema.field("input").type.field("mixed").type == pa.string()


def test_no_rows_and_no_kept_columns_make_a_readable_file(tmp_path):
    assert list(read_parquet(parquet_of(tmp_path / "0.parquet", []))) == []
    assert list(read_parquet(parquet_of(tmp_path / "1.parquet", LINES[2:]))) == [json.loads(LINES[2])]


kept_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
    max_leaves=5,
)


def exactly(value):
    """A value with its types: 1 and true are told apart; a whole float may come back for an integer."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value, type(value).__name__
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, list):
        return [exactly(item) for item in value]
    return {key: exactly(item) for key, item in value.items()}


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(kept_values, kept_values), min_size=1, max_size=4))
def test_any_kept_values_read_back_equal(tmp_path_factory, pairs):
    results = [Result(row=i, id="", status="ok", input={"x": x, "y": y}) for i, (x, y) in enumerate(pairs)]
    lines = [msgspec.json.encode(result) for result in results]
    path = parquet_of(tmp_path_factory.mktemp("kept") / "r.parquet", lines)
    found = [row["input"] for row in read_parquet(path)]
    assert [exactly(row) for row in found] == [exactly(json.loads(line)["input"]) for line in lines]


def test_the_type_of_a_kept_column_holds_all_its_values():
    def kind(*values):
        lines = [msgspec.json.encode({"input": {"x": value}}) for value in values]
        return infer_input(lines).field("x")

    assert kind(1, None, 2).type == pa.int64()
    assert kind(1, 2.5).type == pa.float64()
    assert kind(2**60, 2.5).metadata == {b"batchstream": b"json"}
    assert kind([1], []).type == pa.list_(pa.int64())
    assert kind({"a": 1}, {"b": 1}).metadata == {b"batchstream": b"json"}
    assert kind({"a": 1}, {"a": None}).type == pa.struct([("a", pa.int64())])
    assert kind(True, 1).metadata == {b"batchstream": b"json"}


# --- export


def written(path: Path, lines=LINES) -> Path:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_results_are_exported_from_either_file(tmp_path, kind):
    out = written(tmp_path / "r.jsonl") if kind == "jsonl" else parquet_of(tmp_path / "r.parquet", LINES)
    stream = io.BytesIO()
    export(out, "jsonl", stream, response_body=body)
    assert [json.loads(line) for line in stream.getvalue().splitlines()] == [json.loads(line) for line in LINES]
    export(out, "parquet", tmp_path / "copy.parquet", response_body=body)
    assert list(read_parquet(tmp_path / "copy.parquet")) == [json.loads(line) for line in LINES]


def test_openai_batch_lines(tmp_path):
    stream = io.BytesIO()
    export(written(tmp_path / "r.jsonl"), "openai-batch", stream, response_body=body)
    ok, refused, unsent = (json.loads(line) for line in stream.getvalue().splitlines())
    assert ok["custom_id"] == "a"
    assert ok["response"] == {"status_code": 200, "request_id": "q", "body": body(json.loads(LINES[0]))}
    assert ok["error"] is None
    assert refused["response"]["status_code"] == 401
    assert refused["error"]["code"] == "auth"
    assert unsent["response"] is None
    assert unsent["error"] == {"code": "invalid", "message": "bad"}
    assert len({line["id"] for line in (ok, refused, unsent)}) == 3


def test_csv_has_one_flat_row_each(tmp_path):
    stream = io.BytesIO()
    export(written(tmp_path / "r.jsonl"), "csv", stream, response_body=body)
    rows = list(csv.DictReader(io.StringIO(stream.getvalue().decode(), newline="")))
    assert [row["id"] for row in rows] == ["a", "b", "c"]
    assert rows[0]["completion_tokens"] == "4"
    assert json.loads(rows[0]["tool_calls"])[0]["function"]["arguments"] == '{"a": 1'
    assert rows[1]["error_message"] == 'no, "key"\n'
    assert rows[2]["prompt_tokens"] == ""


def test_an_export_never_replaces_a_file_and_parquet_needs_one(tmp_path):
    out = written(tmp_path / "r.jsonl")
    with pytest.raises(UsageError, match="exists"):
        export(out, "csv", out, response_body=body)
    with pytest.raises(UsageError, match="parquet needs a file"):
        export(out, "parquet", io.BytesIO(), response_body=body)
    with pytest.raises(InputError, match="found neither"):
        list(read_results(tmp_path / "nothing.jsonl"))
    (tmp_path / "cut.jsonl").write_bytes(LINES[0] + b"\n" + LINES[1][:-5])
    with pytest.raises(InputError, match=r"cut\.jsonl:2: the last line is cut off"):
        list(read_results(tmp_path / "cut.jsonl"))


def test_prompts_given_where_results_belong_are_told_apart(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "why?"}\n')
    with pytest.raises(InputError, match=r"prompts.jsonl:1: expected a result row"):
        list(read_results(path))
