"""A LiteLLM proxy with rate limits in front of the simulated endpoint: its 429s are lived with.

Opt-in, for it brings a hundred packages: name its command in $LITELLM (`pip install 'litellm[proxy]'` in an environment
of its own), and run with `-m sweep`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli import batchstream, environment, rows_of

from batchstream.endpoints.simulate import SimulateConfig, running

LITELLM = os.environ.get("LITELLM", "")
RPM = 30

pytestmark = [
    pytest.mark.sweep,
    pytest.mark.skipif(not LITELLM, reason="$LITELLM names no command of a LiteLLM proxy"),
]


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[str]:
    """Its address; one deployment, `RPM` requests a minute."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with running(SimulateConfig(tokens=5)) as simulator:
        config = {
            "model_list": [
                {
                    "model_name": "m",
                    "litellm_params": {
                        "model": "openai/sim", "api_base": simulator.base_url, "api_key": "none", "rpm": RPM,
                    },
                }
            ],
            "general_settings": {"dangerously_permit_weak_or_unset_master_key": True},
            "router_settings": {"routing_strategy": "usage-based-routing-v2", "enable_pre_call_checks": True,
                                "num_retries": 0},
        }  # fmt: skip
        (tmp_path / "litellm.yaml").write_text(json.dumps(config))  # JSON is YAML
        with (tmp_path / "litellm.log").open("wb") as log:
            command = [LITELLM, "--config", "litellm.yaml", "--host", "127.0.0.1", "--port", str(port)]
            server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment(), cwd=tmp_path)
        try:
            wait_for(server, f"http://127.0.0.1:{port}/health/liveliness", tmp_path / "litellm.log")
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.kill()
            server.wait()


def wait_for(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, log.read_text(errors="replace")
        try:
            urllib.request.urlopen(url, timeout=5).close()  # noqa: S310
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
        else:
            return
    pytest.fail(f"the proxy did not start: {log.read_text(errors='replace')}")


@pytest.mark.parametrize("flags", [("--rpm", RPM, "--window", "fixed"), ()], ids=["rpm known", "rpm unknown"])
def test_its_rate_limits_are_lived_with(proxy: str, flags: tuple[object, ...], tmp_path: Path) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(2 * RPM + 5)))
    done = batchstream("run", source, "-o", "out.jsonl", "--base-url", proxy, "--model", "m", "--no-progress", "-v",
                       *flags, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {row["status"] for row in rows_of(tmp_path / "out.jsonl")} == {"ok"}
    summary = json.loads((tmp_path / "out.jsonl.summary.json").read_text())
    print(f"{flags}: {summary['limits']['refused']} refused, {summary['run']['elapsed_s']} s")  # noqa: T201
    print("\n".join(done.stderr.splitlines()[:5]))  # noqa: T201
