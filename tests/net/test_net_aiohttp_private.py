from __future__ import annotations

import aiohttp

from batchstream.net import aiohttp_private


def test_the_installed_aiohttp_still_has_what_the_fast_path_relies_on() -> None:
    gone = aiohttp_private.missing()
    assert not gone, f"aiohttp {aiohttp.__version__} changed {', '.join(gone)}: mend batchstream/net/aiohttp_private.py"


def test_nothing_else_in_the_package_reaches_into_aiohttp() -> None:
    from pathlib import Path

    import batchstream

    root = Path(batchstream.__file__).parent
    private = ("aiohttp.client_proto", "aiohttp.connector", "aiohttp.helpers", "._factory", "._parser")
    users = {
        path.name
        for path in root.rglob("*.py")
        for name in private
        if name in path.read_text() and "/wire/" not in str(path)
    }
    assert users == {"aiohttp_private.py"}
