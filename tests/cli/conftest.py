"""What the tests of the command line share: prompt files, and an endpoint that keeps a ledger."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli import GOOD_KEY

from batchstream.endpoints.simulate import SimulateConfig, Simulator, running


@pytest.fixture(autouse=True, scope="session")
def ctrl_c_works() -> None:
    """Started in the background by a shell, the tests would hand an ignored SIGINT on to the commands they start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Twelve short prompts."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": f"p{i}", "prompt": f"Say {i}."}) + "\n" for i in range(12)))
    return path


@pytest.fixture
def endpoint() -> Iterator[Simulator]:
    """A simulated endpoint in this process: its ledger tells what was really sent."""
    with running(SimulateConfig(tokens=8)) as simulator:
        yield simulator


@pytest.fixture
def guarded() -> Iterator[Simulator]:
    """One that takes no key but GOOD_KEY."""
    with running(SimulateConfig(tokens=8, key=GOOD_KEY)) as simulator:
        yield simulator


@pytest.fixture
def at() -> Callable[[Simulator], list[str]]:
    return lambda simulator: ["--base-url", simulator.base_url, "--model", "sim"]
