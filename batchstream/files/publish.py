"""The results file: built from the journal in input order, and put in place whole.

OUT.tmp-file written and synced, every ordinal counted once, then renamed over OUT, the directory synced, and FINAL.json
written last. A crash anywhere repeats it at the next start, without a request; nothing but the journal goes in, so a
second build is byte-identical. That is also how a results file left by a crash between rename and FINAL.json is
known for our own: it equals what we have just built.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec

from batchstream.errors import DamagedError, UsageError
from batchstream.files import fsio
from batchstream.files.manifest import Final, Manifest, Published, load_final
from batchstream.files.recovery import Recovered, recover
from batchstream.records import Usage

_CHUNK = 1 << 20


class _Counts(msgspec.Struct):
    usage: Usage | None = None


def describe(path: Path) -> Published:
    """Size and BLAKE2b of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32))
    return Published(path.stat().st_size, digest.hexdigest())


def publish(out: Path, directory: Path, manifest: Manifest, disk: fsio.Disk, *,
            overwrite: bool, rows: int, exit_code: int, finished: str,
            observe: Callable[[bytes], Usage | None] | None = None) -> Final:  # fmt: skip
    """See JournalDir.publish; `directory` is the journal."""
    recovered = recover(directory, manifest.salt)
    usage: dict[str, int] = {}
    if observe is None:
        decode = msgspec.json.Decoder(_Counts).decode

        def observe(line: bytes) -> Usage | None:
            return decode(line).usage

    tmp = out.with_name(f".{out.name}.tmp-{manifest.job_id}")
    with fsio.storage_errors(out):
        try:
            results = _counted(recovered, rows, usage, observe)
            if out.suffix == ".parquet":
                from batchstream.files.table import write_parquet

                write_parquet(disk, tmp, results, lambda: (line for _, line in recovered.results()))
            else:
                write_lines(disk, tmp, results)
            built = describe(tmp)
            _check_replaceable(out, [built, *_published_before(directory)], overwrite=overwrite)
            disk.replace(str(tmp), str(out))
            disk.sync_dir(str(out.parent))
        except BaseException:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                disk.unlink(str(tmp))
            raise
    final = Final(
        job_id=manifest.job_id,
        rows=rows,
        ok=recovered.ok,
        failed=recovered.failed,
        duplicates=recovered.duplicates,
        exit_code=exit_code,
        usage=usage,
        results=built,
        finished=finished,
    )
    # The input is proven by now: its present name and size are the ones to compare with.
    fsio.replace_file(disk, directory / "MANIFEST.json", msgspec.json.encode(manifest))
    fsio.replace_file(disk, directory / "FINAL.json", msgspec.json.encode(final))
    return final


def _counted(
    recovered: Recovered, rows: int, usage: dict[str, int], usage_of: Callable[[bytes], Usage | None]
) -> Iterator[bytes]:
    """The results in order; at the end each of `rows` ordinals must have come once."""
    names = Usage.__struct_fields__
    last, count = -1, 0
    for row, line in recovered.results():
        if row <= last or not line.startswith((b'{"row":%d,' % row, b'{"row":%d}' % row)):
            raise DamagedError(f"row {row}: the stored result names another row; nothing was published")
        last, count = row, count + 1
        counts = usage_of(line)
        if counts is not None:
            for name, tokens in zip(names, msgspec.structs.astuple(counts), strict=True):
                if tokens is not None:
                    usage[name] = usage.get(name, 0) + tokens
        yield line
    if count != rows:
        raise DamagedError(
            f"expected {rows} rows in the journal, got {count}; nothing was published. Run the same command again"
        )


def write_lines(disk: fsio.Disk, path: Path, lines: Iterable[bytes]) -> None:
    """Write lines to a new file and sync it."""
    fd = disk.open(str(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        buffer = bytearray()
        for line in lines:
            buffer += line
            buffer += b"\n"
            if len(buffer) >= _CHUNK:
                fsio.write_all(disk, fd, bytes(buffer))
                buffer.clear()
        fsio.write_all(disk, fd, bytes(buffer))
        disk.sync(fd)
    finally:
        disk.close(fd)


def _published_before(directory: Path) -> list[Published]:
    """What this journal's job, or one that --new-job has put aside, has put in place of OUT earlier."""
    finals = [load_final(place) for place in (directory, *directory.glob("before-*"))]
    return [final.results for final in finals if final is not None and final.results is not None]


def _check_replaceable(out: Path, ours: list[Published], *, overwrite: bool) -> None:
    if overwrite or not out.exists():
        return
    if not out.is_file() or describe(out) not in ours:
        raise UsageError(
            f"{out}: exists and was not made by this job (or was changed since); all results are safe in the journal: "
            "move the file away, or give --overwrite, and run the same command again"
        )
