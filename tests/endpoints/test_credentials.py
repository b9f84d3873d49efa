"""Where a key is found, and that one that is not there is missed in a line that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchstream.endpoints.credentials import find_key
from batchstream.errors import StoppedError, UsageError

KEY = "sk-0123456789abcdef"


def credential(folder: Path, data: bytes) -> dict[str, str]:
    (folder / "api_key").write_bytes(data)
    return {"CREDENTIALS_DIRECTORY": str(folder)}


def test_the_credentials_directory_comes_before_the_providers_variable(tmp_path: Path) -> None:
    environ = {**credential(tmp_path, KEY.encode() + b"\n"), "SOME_KEY": "sk-another-9876543210"}
    found = find_key(None, None, "SOME_KEY", environ)
    assert found is not None
    assert (found.value, found.origin) == (KEY, "$CREDENTIALS_DIRECTORY/api_key")
    assert KEY not in repr(found)
    named = find_key("SOME_KEY", None, "SOME_KEY", environ)
    assert named is not None
    assert named.value == "sk-another-9876543210"


@pytest.mark.parametrize(("data", "said"), [(b" \n", "is empty"), (b"\xff\xfe\x00", "plain text"), (b"a b", "blanks")])
def test_a_credential_that_is_no_key_is_a_usage_error(tmp_path: Path, data: bytes, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        find_key(None, None, None, credential(tmp_path, data))


def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(KEY)
    path.chmod(0o644)
    with pytest.raises(UsageError, match="chmod 600"):
        find_key(None, str(path), None, {})
    path.chmod(0o600)
    found = find_key(None, str(path), None, {})
    assert found is not None
    assert found.value == KEY


@pytest.mark.parametrize(("environ", "said"), [({}, "not set"), ({"MY_KEY": " "}, "empty")])
def test_a_missing_variable_is_named(environ: dict[str, str], said: str) -> None:
    with pytest.raises(StoppedError, match=f"MY_KEY, which is {said}"):
        find_key("MY_KEY", None, None, environ)
