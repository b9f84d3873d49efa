"""Where the key comes from: a variable, a file, or systemd's credentials directory. Never an option's value."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

import msgspec

from batchstream.errors import StoppedError, UsageError

SECRET_LENGTH = 12
"""Shorter keys are placeholders for servers that want any ("x", "EMPTY", "ollama"): words that answers are made of."""


class Key(msgspec.Struct, frozen=True):
    """A key and where it was found. The key is in no repr."""

    value: str
    origin: str

    @property
    def secret(self) -> str | None:
        """What must never be written anywhere, or None for a placeholder."""
        return self.value if len(self.value) >= SECRET_LENGTH else None

    def __repr__(self) -> str:
        return f"Key(from {self.origin})"


_SAYS_SECRET = re.compile(r"authorization|(api|access)-?key|token$|secret|credential|passw|cookie", re.IGNORECASE)


def carries_secret(name: str) -> bool:
    """Whether a header of that name holds, by all that is usual, a secret (Authorization, api-key, Cookie, ...)."""
    return _SAYS_SECRET.search(name) is not None


def header_secrets(headers: Mapping[str, str]) -> tuple[str, ...]:
    """What of these headers must never be written anywhere: the values of those that carry a secret, without the scheme
    before it ("Bearer ...")."""
    values = [value.split()[-1] for name, value in headers.items() if carries_secret(name) and value.strip()]
    return tuple(value for value in values if len(value) >= SECRET_LENGTH)


def spellings(secret: str) -> tuple[str, ...]:
    """The secret as it is, and as JSON, JSON within JSON (a tool's arguments) and a JSON log of that spell it: one and
    the same unless there are quotes or backslashes in it."""
    found = [secret]
    for _ in range(3):
        found.append(msgspec.json.encode(found[-1]).decode()[1:-1])
    return tuple(dict.fromkeys(found))


def find_key(
    env: str | None, file: str | None, default_env: str | None, environ: Mapping[str, str] = os.environ
) -> Key | None:
    """The key, or None when the endpoint takes none and none was named.

    Order: `file`, the variable `env`, ``$CREDENTIALS_DIRECTORY/api_key`` (systemd's LoadCredential), the
    provider's usual variable. Raises `UsageError` for a key that cannot be used, `StoppedError` (exit 4)
    for one that is not there.
    """
    if file is not None:
        return Key(_checked(_read(Path(file)), file), f"file {file}")
    if env is not None:
        return Key(_checked(_from_environment(env, environ), env), f"variable {env}")
    directory = environ.get("CREDENTIALS_DIRECTORY")
    if directory and (Path(directory) / "api_key").is_file():
        path = Path(directory) / "api_key"
        return Key(_checked(_text(path), "$CREDENTIALS_DIRECTORY/api_key"), "$CREDENTIALS_DIRECTORY/api_key")
    if default_env is None:
        return None
    return Key(_checked(_from_environment(default_env, environ), default_env), f"variable {default_env}")


def _from_environment(name: str, environ: Mapping[str, str]) -> str:
    value = environ.get(name, "").strip()
    if not value:
        state = "empty" if name in environ else "not set"
        raise StoppedError(
            f"no API key: expected it in the environment variable {name}, which is {state};"
            " set it, or name another with --api-key-env or --api-key-file"
        )
    return value


def _read(path: Path) -> str:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise UsageError(f"{path}: cannot read the key file: {error.strerror}") from None
    if os.name == "posix" and mode & (stat.S_IRGRP | stat.S_IROTH):
        raise UsageError(
            f"{path}: others can read this key file (mode {stat.S_IMODE(mode):04o}); run: chmod 600 {path}"
        )
    return _text(path)


def _text(path: Path) -> str:
    try:
        value = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise UsageError(f"{path}: cannot read the key file: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: expected a key in plain text, got binary data") from None
    if not value:
        raise UsageError(f"{path}: expected a key, the file is empty")
    return value


def _checked(value: str, origin: str) -> str:
    """A key goes into a header: one line of visible ASCII. Never shows the key."""
    if not value.isascii() or not value.isprintable() or " " in value:
        raise UsageError(
            f"the key from {origin} holds blanks, line breaks or other characters that no header can carry"
        )
    return value
