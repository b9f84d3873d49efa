"""Results as a table: Parquet written from result rows and read back to the same rows.

Named columns have a fixed schema (nested objects are structs). What has no fixed shape (`logprobs`, `extra`) is JSON
text in a string column whose field metadata say so: `{"batchstream": "json"}`. The `input` column is a struct over the
kept columns: each has the one type that holds all its values without loss, else JSON text. So reading back gives the
values that the JSONL file has (a member that a row lacks reads as null).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from batchstream.files import fsio

if TYPE_CHECKING:
    import pyarrow

_GROUP_ROWS = 16_384
_GROUP_BYTES = 64 << 20
_JSON = {b"batchstream": b"json"}
_EXACT_FLOAT = 1 << 53


class _Input(msgspec.Struct):
    input: dict[str, Any] | None = None


def _text_field(name: str) -> pyarrow.Field:
    import pyarrow as pa

    return pa.field(name, pa.string(), metadata=_JSON)


def result_schema(input_type: pyarrow.DataType) -> pyarrow.Schema:
    """The columns of a results file: records.Result, field by field."""
    import pyarrow as pa

    text, integer, real = pa.string(), pa.int64(), pa.float64()
    function = pa.struct([("name", text), ("arguments", text)])
    calls = pa.list_(pa.struct([("id", text), ("type", text), ("function", function)]))
    usage_names = ("prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens", "reasoning_tokens")
    usage = pa.struct([(name, integer) for name in usage_names])
    choice = pa.struct([
        ("index", integer), ("text", text), ("reasoning", text), ("refusal", text), ("tool_calls", calls),
        ("finish_reason", text), _text_field("logprobs"), _text_field("extra"),
    ])  # fmt: skip
    seconds = ("queue_s", "ttfb_s", "ttfc_s", "ttft_s", "ttfo_s", "latency_s", "total_s", "tpot_s")
    timing = pa.struct(
        [("started_at", text), *((name, real) for name in seconds), ("chunks", integer), ("gap_max_s", real)]
    )
    retry = pa.struct([
        ("kind", text), ("status", integer), ("message", text), ("waited_s", real), ("latency_s", real),
        ("usage", usage), ("text", text),
    ])  # fmt: skip
    error = pa.struct([("kind", text), ("status", integer), ("message", text), ("retryable", pa.bool_())])
    return pa.schema([
        ("row", integer), ("id", text), ("status", text), ("text", text), ("reasoning", text), ("refusal", text),
        ("tool_calls", calls), ("finish_reason", text), ("choices", pa.list_(choice)), _text_field("logprobs"),
        ("model", text), ("response_id", text), ("request_id", text), ("usage", usage), ("timing", timing),
        ("attempts", integer), ("retries", pa.list_(retry)), ("error", error), ("input", input_type),
        _text_field("extra"),
    ])  # fmt: skip


def write_parquet(disk: fsio.Disk, path: Path, lines: Iterable[bytes], again: Callable[[], Iterable[bytes]]) -> None:
    """Write result rows to a new Parquet file and sync it. `again()` gives the same rows once more, for the types."""
    import pyarrow as pa
    from pyarrow import parquet

    schema = result_schema(infer_input(again()))
    fd = disk.open(str(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        sink = pa.PythonFile(_Sink(disk, fd), "w")
        with parquet.ParquetWriter(sink, schema, compression="zstd") as writer:
            for group in _groups(lines):
                rows = [_to_arrow(msgspec.json.decode(line), schema) for line in group]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        disk.sync(fd)
    finally:
        disk.close(fd)


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet results file, as the JSONL file has them."""
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
        if file.num_row_groups == 0:
            return  # pyarrow 18 cannot iterate over none
        for batch in file.iter_batches(batch_size=1024, use_threads=False):
            for row in batch.to_pylist():
                yield {field.name: _from_arrow(row[field.name], field) for field in schema}


class _Sink:
    """The file object that pyarrow writes to: every byte goes through the one door to the disk."""

    closed = False

    def __init__(self, disk: fsio.Disk, fd: int) -> None:
        self._disk = disk
        self._fd = fd
        self._at = 0

    def write(self, data: Any) -> int:
        piece = bytes(data)
        fsio.write_all(self._disk, self._fd, piece)
        self._at += len(piece)
        return len(piece)

    def tell(self) -> int:
        return self._at

    def flush(self) -> None:
        """Nothing is buffered here."""

    def close(self) -> None:
        self.closed = True

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False


def _groups(lines: Iterable[bytes]) -> Iterator[list[bytes]]:
    group: list[bytes] = []
    size = 0
    for line in lines:
        group.append(line)
        size += len(line)
        if len(group) == _GROUP_ROWS or size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def infer_input(lines: Iterable[bytes]) -> pyarrow.DataType:
    """The struct type that holds the `input` of every row; pyarrow's null type when no row keeps anything."""
    import pyarrow as pa

    decoder = msgspec.json.Decoder(_Input)
    columns: dict[str, Any] = {}
    for line in lines:
        kept = decoder.decode(line).input
        if kept:
            for name, value in kept.items():
                columns[name] = _merge(columns.get(name, "null"), _shape(value))
    return pa.struct([_field(name, shape) for name, shape in columns.items()]) if columns else pa.null()


# A shape is "null", "bool", "int" (a double holds it exactly), "long" (other 64-bit integers), "real", "text",
# "json" (no common type), ("list", shape) or ("object", {name: shape}).
def _shape(value: Any) -> Any:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return ("int" if abs(value) <= _EXACT_FLOAT else "long") if -(2**63) <= value < 2**63 else "json"
    if isinstance(value, float):
        return "real"
    if isinstance(value, str):
        return "text"
    if isinstance(value, dict):
        return ("object", {name: _shape(item) for name, item in value.items()}) if value else "json"
    inner: Any = "null"
    for item in value:
        inner = _merge(inner, _shape(item))
    return ("list", inner)


def _merge(a: Any, b: Any) -> Any:
    if a == b or b == "null":
        return a
    if a == "null":
        return b
    if isinstance(a, str) and isinstance(b, str):
        return {frozenset(("int", "long")): "long", frozenset(("int", "real")): "real"}.get(frozenset((a, b)), "json")
    if isinstance(a, tuple) and isinstance(b, tuple) and a[0] == b[0]:
        if a[0] == "list":
            return ("list", _merge(a[1], b[1]))
        if a[1].keys() == b[1].keys():
            return ("object", {name: _merge(a[1][name], b[1][name]) for name in a[1]})
    return "json"


def _field(name: str, shape: Any) -> pyarrow.Field:
    import pyarrow as pa

    if shape == "json":
        return _text_field(name)
    if isinstance(shape, tuple):
        if shape[0] == "list":
            return pa.field(name, pa.list_(_field("item", shape[1])))
        return pa.field(name, pa.struct([_field(key, inner) for key, inner in shape[1].items()]))
    plain = {"null": pa.null(), "bool": pa.bool_(), "int": pa.int64(), "long": pa.int64(), "real": pa.float64()}
    return pa.field(name, plain.get(shape, pa.string()))


def _to_arrow(row: dict[str, Any], schema: pyarrow.Schema) -> dict[str, Any]:
    return {field.name: _outward(row.get(field.name), field) for field in schema}


def _outward(value: Any, field: pyarrow.Field) -> Any:
    """Put JSON text where the field asks for it."""
    import pyarrow as pa

    if value is None:
        return None
    if field.metadata == _JSON:
        return msgspec.json.encode(value).decode()
    if pa.types.is_struct(field.type):
        return {inner.name: _outward(value.get(inner.name), inner) for inner in field.type}
    if pa.types.is_list(field.type):
        return [_outward(item, field.type.value_field) for item in value]
    return value


def _from_arrow(value: Any, field: pyarrow.Field) -> Any:
    """The reverse of `_outward`."""
    import pyarrow as pa

    if value is None:
        return None
    if (field.metadata or {}).get(b"batchstream") == b"json":
        return msgspec.json.decode(value)
    if pa.types.is_struct(field.type):
        return {inner.name: _from_arrow(value[inner.name], inner) for inner in field.type}
    if pa.types.is_list(field.type):
        return [_from_arrow(item, field.type.value_field) for item in value]
    return value
