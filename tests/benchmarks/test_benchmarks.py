"""The benchmark's instrument is right; and, when asked for, the benchmark itself:

    python -m pytest -m benchmark tests/benchmarks -s

The same with more options: python tests/benchmarks/measure.py --help. Timing is printed, never asserted.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from measure import WORKLOADS, Workload, build_server, installed, measure, table


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    binary = build_server(tmp_path_factory.mktemp("server"))
    if binary is None:
        assert not os.environ.get("CI"), "the benchmark's server needs a C compiler"
        pytest.skip("needs a C compiler (cc or gcc)")
    return binary


@pytest.mark.parametrize("client", ["batchstream", "aiohttp"])
@pytest.mark.parametrize(
    "work",
    [Workload(40, 8, 24, per_write=8), Workload(12, 6, 5, ttft_ms=20, gap_ms=2)],
    ids=["as fast as they come", "paced"],
)
def test_every_answer_of_the_benchmark_is_whole_and_has_its_truth(
    server: Path, tmp_path: Path, client: str, work: Workload
) -> None:
    run = measure(server, tmp_path / "run", client, work)
    assert run.wrong == 0
    assert len(run.errors_ms) == work.requests
    assert run.cpu_s > 0


@pytest.mark.benchmark
def test_what_clients_cost(server: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clients = [name for name in ("batchstream", "aiohttp", "openai") if installed(name, sys.executable)]
    with capsys.disabled():
        for line in table(server, list(WORKLOADS), clients, 3, openai=sys.executable):
            sys.stdout.write(f"\n{line}")
            sys.stdout.flush()
