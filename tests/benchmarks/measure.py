"""What a client costs and how right its TTFT is: whole processes against a server that knows the truth.

    python tests/benchmarks/measure.py [W0 W1 W2 W3-256 W3-1024 W4] [--clients batchstream,aiohttp,openai] [--reps 3]

`batchstream` is the whole `batchstream run`: input, journal, retries, results, summary. `aiohttp` is the loop that
people write first, `openai` one over the SDK (`--openai PYTHON` names an interpreter that has it), `aiperf` and
`guidellm` the load generators, where they are on the PATH. Client and server get a core each. Printed are medians:
CPU of the client's processes (for each content event, and for each request of W4; start-up included), its ratio to
batchstream's, peak memory, and the error of TTFT against the server's clock, p50 / p99. That error runs from
`sent` for batchstream and from the call for the loops: two quantities, which is why both are named.
Wall times are not compared: the machine is shared, CPU time is the steadier figure. Even that swings by a third.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent


class Workload(NamedTuple):
    """`gap_ms` 0: as fast as the client reads."""

    requests: int
    concurrency: int
    tokens: int
    ttft_ms: float = 0
    gap_ms: float = 0
    per_write: int = 1


WORKLOADS = {
    "W0": Workload(1, 1, 8),
    "W1": Workload(2000, 64, 256),
    "W2": Workload(2000, 64, 256, per_write=8),
    "W3-256": Workload(768, 256, 128, 200, 20),
    "W3-1024": Workload(3072, 1024, 128, 200, 20),
    "W4": Workload(20_000, 256, 8),
}

CLIENTS = ("batchstream", "aiohttp", "openai", "aiperf", "guidellm")
SLOW = {"openai": 4, "aiperf": 4, "guidellm": 4}
"""These get a quarter of the requests of W1, W2 and W4: their cost for each does not depend on the number."""


class Measured(NamedTuple):
    """`cpu_s` and `peak_mb` of the client's processes; `errors_ms`: TTFT as measured minus as it was, sorted."""

    cpu_s: float
    peak_mb: float
    requests: int
    tokens: int
    errors_ms: list[float]
    wrong: int


class FailedError(Exception):
    """A client did not come to its end."""


def build_server(directory: Path) -> Path | None:
    """Compile the server; None where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    binary = directory / "truth"
    subprocess.run([compiler, "-O2", "-o", str(binary), str(HERE / "truth.c")], check=True)
    return binary


@contextmanager
def serving(binary: Path, directory: Path, work: Workload) -> Iterator[str]:
    """The address of a running server."""
    port = directory / "port"
    port.unlink(missing_ok=True)
    options = (work.tokens, work.ttft_ms, work.gap_ms, work.per_write)
    server = subprocess.Popen([*pinned(0), str(binary), str(port), *map(str, options)])
    try:
        while not (port.exists() and port.read_text().endswith("\n")):
            if server.poll() is not None:
                raise SystemExit("the benchmark's server did not start")
            time.sleep(0.01)
        yield f"http://127.0.0.1:{int(port.read_text())}"
    finally:
        server.kill()
        server.wait()


def pinned(core: int) -> list[str]:
    if (os.cpu_count() or 1) < 2 or shutil.which("taskset") is None:
        return []
    return ["taskset", "-c", str(core)]


def truth(address: str) -> dict[str, float]:
    """Response id → TTFT in seconds by the server's clock."""
    with urllib.request.urlopen(f"{address}/log") as log:  # noqa: S310  (our own server)
        lines = [line.split() for line in log.read().decode().splitlines()]
    return {identity: (int(first) - int(asked)) / 1e9 for identity, asked, first, _ in lines}


def expected_text(identity: str, tokens: int) -> str:
    words = [" the", " café", "\n", " of", ' "so"', " tokens", ",", " 42"]
    start = int(identity.removeprefix("truth-"))
    return "".join(words[(place + start) % 8] for place in range(tokens))


def command(
    client: str, url: str, folder: Path, work: Workload, requests: int, openai: str, tokenizer: str
) -> list[str]:
    prompts, out, size = folder / "prompts.jsonl", folder / "answers.jsonl", str(work.concurrency)
    loop = [url, str(prompts), str(out), size, str(work.tokens)]
    if client == "batchstream":
        options = ["-o", str(out), "--base-url", url, "--model", "truth", "--concurrency", size, "--no-progress"]
        options += ["--param", f"max_tokens={work.tokens}"]
        return [sys.executable, "-m", "batchstream", "run", str(prompts), *options]
    if client == "aiohttp":
        return [sys.executable, str(HERE / "loop_aiohttp.py"), *loop]
    if client == "openai":
        return [openai, str(HERE / "loop_openai.py"), *loop]
    if client == "aiperf":
        options = ["--concurrency", size, "--request-count", str(requests), "--input-file", str(prompts)]
        return ["aiperf", "profile", "--model", "truth", "--url", url.removesuffix("/v1"), "--endpoint-type", "chat",
                "--streaming", *options, "--custom-dataset-type", "single_turn", "--tokenizer", tokenizer,
                "--use-server-token-count", "--ui", "none", "--output-artifact-dir", str(folder)]  # fmt: skip
    backend = f"kind=openai_http,target={url.removesuffix('/v1')},model=truth"
    return ["guidellm", "run", "--backend", backend, "--profile", f"kind=concurrent,streams={size}", "--constraint",
            f"kind=max_requests,count={requests}", "--data", f"kind=json_file,path={prompts}",
            "--tokenizer", f"kind=hf_auto,model={tokenizer}", "--output",
            f"kind=json,path={folder / 'report.json'}", "--disable-console"]  # fmt: skip


def measure(
    binary: Path,
    folder: Path,
    client: str,
    work: Workload,
    *,
    openai: str = sys.executable,
    tokenizer: str = "builtin",
) -> Measured:
    """Run a client once, from its start to its end."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    requests = work.requests
    if work.gap_ms == 0 and requests > 1:
        requests //= SLOW.get(client, 1)
    with open(folder / "prompts.jsonl", "w") as file:
        for number in range(requests):
            file.write(json.dumps({"prompt": f"Request {number}: " + "a word of a prompt " * 12}) + "\n")
    with serving(binary, folder, work) as address, open(folder / "log", "w") as log:
        call = command(client, f"{address}/v1", folder, work, requests, openai, tokenizer)
        process = subprocess.Popen([*pinned(1), *call], stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        known = truth(address)
    if process.returncode:
        raise FailedError(f"{client} failed: {(folder / 'log').read_text()[-600:]}")
    errors, wrong = _compare(folder / "answers.jsonl", known, work.tokens)
    return Measured(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, requests, work.tokens, errors, wrong)


def _compare(answers: Path, known: dict[str, float], tokens: int) -> tuple[list[float], int]:
    """Errors of TTFT in ms, sorted, and how many answers have another text than was sent."""
    if not answers.exists():
        return [], 0
    errors, wrong = [], 0
    for line in answers.read_text().splitlines():
        row = json.loads(line)
        ttft = row["timing"]["ttft_s"] if "timing" in row else row["ttft_s"]
        errors.append((ttft - known[row["response_id"]]) * 1e3)
        wrong += row["text"] != expected_text(row["response_id"], tokens)
    return sorted(errors), wrong


def installed(client: str, openai: str) -> bool:
    if client == "openai":
        probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('openai') is None)"
        return subprocess.run([openai, "-c", probe], check=False).returncode == 0
    return client in ("batchstream", "aiohttp") or shutil.which(client) is not None


def table(binary: Path, names: list[str], clients: list[str], reps: int, **others: str) -> Iterator[str]:
    """Lines of the comparison, as they are measured; the clients take turns, so that all meet the same noise."""
    yield (
        "workload   client        reps  CPU µs/event  µs/request   ratio   peak MB   "
        "TTFT error ms p50 / p99   clock from"
    )
    for name in names:
        work = WORKLOADS[name]
        runs: dict[str, list[Measured]] = {client: [] for client in clients}
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(reps):
                for client in list(runs):
                    try:
                        runs[client].append(measure(binary, Path(folder) / client, client, work, **others))
                    except FailedError as error:
                        if client == clients[0]:
                            raise
                        del runs[client]
                        yield f"{name:10} {error}"
        base = _median_cpu(runs[clients[0]])
        for client, measured in runs.items():
            yield _line(name, client, measured, base)


def _median_cpu(runs: list[Measured]) -> float:
    """Seconds for each request."""
    return statistics.median(run.cpu_s / run.requests for run in runs)


def _line(name: str, client: str, runs: list[Measured], base: float) -> str:
    cpu, tokens = _median_cpu(runs), runs[0].tokens
    error = "                –"
    if runs[0].errors_ms and name != "W0":
        middle, tail = (statistics.median(_at(run.errors_ms, share) for run in runs) for share in (0.5, 0.99))
        error = f"{middle:8.2f} / {tail:.2f}"
    wrong = sum(run.wrong for run in runs)
    figures = f"{cpu * 1e6 / tokens:13.2f} {cpu * 1e6:11.0f} {cpu / base:7.2f} {max(run.peak_mb for run in runs):9.0f}"
    start = {"batchstream": "sent", "aiohttp": "the call", "openai": "the call"}.get(client, "")
    flaw = f"   {wrong} wrong texts" if wrong else ""
    return f"{name:10} {client:12} {len(runs):5} {figures}   {error:24}  {start}{flaw}"


def _at(values: list[float], share: float) -> float:
    return values[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    parser = argparse.ArgumentParser(description="Costs of clients beside each other; see the top of this file.")
    parser.add_argument("workloads", nargs="*", default=list(WORKLOADS), help=" ".join(WORKLOADS))
    parser.add_argument("--clients", default="batchstream,aiohttp,openai", help=",".join(CLIENTS))
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--openai", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--tokenizer", default="builtin", help="of the load generators: a name or a directory")
    given = parser.parse_args()
    others = {"openai": given.openai, "tokenizer": given.tokenizer}
    clients = [client for client in given.clients.split(",") if installed(client, given.openai)]
    with tempfile.TemporaryDirectory() as folder:
        binary = build_server(Path(folder))
        if binary is None:
            raise SystemExit("the benchmark's server needs a C compiler (cc or gcc)")
        for line in table(binary, given.workloads or list(WORKLOADS), clients, given.reps, **others):
            print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
