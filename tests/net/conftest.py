from __future__ import annotations

import pytest


@pytest.fixture(params=["fast", "public"])
def path(request: pytest.FixtureRequest) -> str:
    """Both ways through aiohttp must behave alike."""
    return str(request.param)
