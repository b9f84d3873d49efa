"""A long run with one per cent of mixed faults, watched from inside: `python soak.py DIR SECONDS`.

Prints a line of JSON every so often (memory, file descriptors, tasks, rows) and a last one with the verdict's figures.
Memory has to be flat once every buffer has been used, as do descriptors and tasks.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from batchstream.job import Job
from batchstream.launch.here import run

FAULTS = (
    "429(retry-after-ms=200)=0.0015", "500=0.0015", "503(retry-after=1)=0.0005", "reset-early=0.0005",
    "html=0.0005", "json-error=0.0005", "slow-headers(s=2)=0.0005", "reset=0.001", "close=0.001", "truncate=0.001",
    "truncate-utf8=0.0005", "stall=0.0002", "comments(every=0.1)=0.0003", "error=0.0005", "garbage=0.0005",
    "drip=0.0005",
)  # fmt: skip
CONCURRENCY = 32


def sample(started: float, rows: int) -> dict[str, float]:
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {
        "at_s": round(time.monotonic() - started, 1),
        "rows": rows,
        "rss_mib": round(resident / 2**20, 2),
        "fds": len(os.listdir("/proc/self/fd")),
        "tasks": len(asyncio.all_tasks()),
    }


def soak(directory: Path, seconds: float, interval: float) -> tuple[list[dict[str, float]], object]:
    """Run for so long. Returns the samples and the run's report."""
    source = directory / "prompts.jsonl"
    with open(source, "w", encoding="utf-8") as file:
        for row in range(int(seconds * 400)):  # more than can be asked in the time
            file.write(f'{{"id": "s{row}", "prompt": "Soak question {row}: and then?"}}\n')
    command = [sys.executable, "-m", "batchstream", "simulate", "--port", "0", "--ledger-limit", "1000"]
    command += ["--ttft", "0.1", "--gap", "0.01", "--tokens", "8..40"]
    command += [part for fault in FAULTS for part in ("--fault", fault)]
    samples: list[dict[str, float]] = []
    started = time.monotonic()

    @contextmanager
    def watch(progress) -> Iterator[None]:
        async def look() -> None:
            while True:
                await asyncio.sleep(interval)
                samples.append(sample(started, progress.done))
                print(json.dumps(samples[-1]), flush=True)  # noqa: T201

        looking = asyncio.get_running_loop().create_task(look())
        try:
            yield
        finally:
            looking.cancel()

    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as simulator:
        base_url = simulator.stdout.readline().strip()
        job = Job(
            input=str(source), output=str(directory / "out.jsonl"), base_url=base_url, model="sim",
            concurrency=CONCURRENCY, max_time=seconds, idle_timeout=3.0, first_token_timeout=10.0,
        )  # fmt: skip
        try:
            report = run(job, watch=watch)
        finally:
            simulator.terminate()
    return samples, report


def main() -> None:
    directory, seconds = Path(sys.argv[1]), float(sys.argv[2])
    samples, report = soak(directory, seconds, max(0.5, seconds / 60))
    warm = samples[len(samples) // 5 :]
    summary = report.summary
    figures = {
        "exit_code": report.exit_code,
        "rows": summary.rows.total,
        "failures": summary.failures,
        "retries": summary.attempts.retries,
        "samples_after_warm_up": len(warm),
        "rss_mib": [min(s["rss_mib"] for s in warm), max(s["rss_mib"] for s in warm)],
        "rss_growth_mib": round(warm[-1]["rss_mib"] - warm[0]["rss_mib"], 2),
        "fds": [min(s["fds"] for s in warm), max(s["fds"] for s in warm)],
        "tasks": [min(s["tasks"] for s in warm), max(s["tasks"] for s in warm)],
    }
    print(json.dumps(figures), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
