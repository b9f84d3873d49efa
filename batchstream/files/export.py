"""Results in other formats: a fold over result rows, whatever they were read from.

jsonl          the result rows
parquet        the same rows as a table
csv            one flat row each: nested values as JSON text
openai-batch   the output lines of the OpenAI Batch API: {"id", "custom_id", "response", "error"}
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

import msgspec

from batchstream.errors import UsageError
from batchstream.files import fsio
from batchstream.files.publish import write_lines
from batchstream.files.results import read_results

Format = Literal["jsonl", "parquet", "csv", "openai-batch"]
FORMATS: tuple[Format, ...] = ("jsonl", "parquet", "csv", "openai-batch")

ResponseBody = Callable[[dict[str, Any]], dict[str, Any]]
"""From a result row (as plain data) to the response body that a request without streaming would have had."""

_COLUMNS = (
    "row", "id", "status", "text", "reasoning", "refusal", "tool_calls", "finish_reason", "choices", "model",
    "response_id", "request_id", "prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens",
    "reasoning_tokens", "started_at", "ttft_s", "latency_s", "total_s", "attempts",
    "error_kind", "error_status", "error_message", "input",
)  # fmt: skip


def export(
    out: Path,
    format: Format,  # noqa: A002  (the flag's name)
    target: Path | BinaryIO,
    *,
    response_body: ResponseBody,
    disk: fsio.Disk | None = None,
) -> None:
    """Write the results of `out` (see results.read_results) to `target` in `format`.

    A path appears whole or not at all and must be new; a stream (stdout) is written as it goes, Parquet cannot.
    Raises InputError, StorageError, UsageError.
    """
    disk = disk or fsio.disk
    if isinstance(target, Path):
        if target.exists():
            raise UsageError(f"{target}: exists; choose another name")
        tmp = target.with_name(f".{target.name}.tmp-export")
        with fsio.storage_errors(target):
            if format == "parquet":
                from batchstream.files.table import write_parquet

                write_parquet(disk, tmp, read_results(out), lambda: read_results(out))
            else:
                write_lines(disk, tmp, export_lines(read_results(out), format, response_body))
            disk.replace(str(tmp), str(target))
            disk.sync_dir(str(target.parent))
        return
    if format == "parquet":
        raise UsageError("parquet needs a file: name one with -o")
    for line in export_lines(read_results(out), format, response_body):
        target.write(line + b"\n")


def export_lines(rows: Iterable[bytes], format: Format, response_body: ResponseBody) -> Iterator[bytes]:  # noqa: A002
    """The lines of a text format, without their newline (CSV cells may hold some)."""
    if format == "csv":
        return _csv(rows)
    if format == "openai-batch":
        return (msgspec.json.encode(batch_line(msgspec.json.decode(row), response_body)) for row in rows)
    return iter(rows)


def batch_line(result: dict[str, Any], response_body: ResponseBody) -> dict[str, Any]:
    """One output line of the Batch API. A failed row has `error`, and `response` when the server gave a status."""
    error = result["error"]
    line: dict[str, Any] = {
        "id": f"batch_req_{result['row']}",
        "custom_id": result["id"],
        "response": None,
        "error": None,
    }
    if error is None:
        line["response"] = {"status_code": 200, "request_id": result["request_id"], "body": response_body(result)}
        return line
    if error["status"] is not None and error["status"] != 200:
        body = {"error": {"message": error["message"], "type": error["kind"], "param": None, "code": None}}
        line["response"] = {"status_code": error["status"], "request_id": result["request_id"], "body": body}
    line["error"] = {"code": error["kind"], "message": error["message"]}
    return line


def _csv(rows: Iterable[bytes]) -> Iterator[bytes]:
    buffer = io.StringIO()
    # Before Python 3.13 the writer quotes a line break in a cell only where it is part of this.
    writer = csv.writer(buffer, lineterminator="\r\n")

    def cells(values: Iterable[Any]) -> bytes:
        buffer.seek(0)
        buffer.truncate()
        writer.writerow([_cell(value) for value in values])
        return buffer.getvalue().removesuffix("\r\n").encode()

    yield cells(_COLUMNS)
    for row in rows:
        result = msgspec.json.decode(row)
        error = {f"error_{name}": value for name, value in (result["error"] or {}).items()}
        flat = {**result, **(result["usage"] or {}), **result["timing"], **error}
        yield cells(flat.get(name) for name in _COLUMNS)


def _cell(value: Any) -> Any:
    return msgspec.json.encode(value).decode() if isinstance(value, (dict, list)) else value
