"""The page of a run and of a measurement, opened from disk in a real Chromium."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import msgspec
import pytest

from batchstream.figures.stages import BenchSummary, Stage, fold
from batchstream.figures.summary import Run, Tally, summary
from batchstream.policy.arrivals import Load
from batchstream.records import Latencies, Result, Usage
from batchstream.report.html import render_html

if not os.environ.get("CI"):
    pytest.importorskip("plotly", reason="the extra `report` is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><!--"

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"), reason="no chromium on this machine to open the page in"
)


def rows(count: int) -> list[tuple[int, bytes]]:
    found = []
    for row in range(count):
        timing = Latencies(
            started_at=f"2026-01-01T00:00:{row * 0.1:09.6f}Z", queue_s=0.001, ttfb_s=0.01, ttft_s=0.1 + row % 7 * 0.01,
            ttfo_s=0.11, latency_s=0.5 + row % 11 * 0.03, total_s=0.6 + row % 11 * 0.03, tpot_s=0.02, chunks=20,
        )  # fmt: skip
        usage = Usage(prompt_tokens=5, completion_tokens=20, total_tokens=25)
        result = Result(row, HOSTILE if row == 10 else str(row), "ok", text=HOSTILE, model=HOSTILE, timing=timing,
                        usage=usage, attempts=1, finish_reason="stop")  # fmt: skip
        found.append((row, msgspec.json.encode(result)))
    return found


def page_of_a_run(**more: bool) -> str:
    stored, tally = rows(400), Tally()
    for _, data in stored:
        tally.add(data)
    return render_html(summary(tally, Run(endpoint=HOSTILE, elapsed_s=40.0)), stored, HOSTILE, **more)


def page_of_a_sweep() -> str:
    stored = rows(400)
    stages = [
        fold(
            Stage(name=f"concurrency {level}", load=Load(arrival="closed", concurrency=level), rows=span,
                  summary=summary(Tally(), Run())),
            stored, {"ttft": 0.13, "latency": 0.7}, None,
        )
        for level, span in ((1, (0, 100)), (4, (100, 200)), (16, (200, 400)))
    ]  # fmt: skip
    return render_html(BenchSummary(run=Run(endpoint="sim"), stages=stages, verdict="trusted"), stored, "a sweep")


def opened(page: Path, folder: Path, *more: str) -> str:
    """What Chromium made of the page; fails when it asked the network for anything or complained."""
    assert CHROMIUM is not None
    log = folder / "net.json"
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
         "--disable-component-update", "--no-first-run", "--disable-quic", f"--user-data-dir={folder / 'profile'}",
         "--enable-logging=stderr", f"--log-net-log={log}", "--virtual-time-budget=5000", "--window-size=1200,3000",
         *more, page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    asked = [
        event["params"]["url"] for event in json.loads(log.read_text())["events"] if "url" in event.get("params", {})
    ]
    assert not [url for url in asked if url.startswith(("http://", "https://")) and "google" not in url], asked
    return done.stdout


@needs_chromium
@pytest.mark.parametrize("what", ["run", "sweep"])
def test_the_page_opens_from_disk_without_a_request_or_a_complaint(what: str, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(page_of_a_run() if what == "run" else page_of_a_sweep(), encoding="utf-8")
    assert page.stat().st_size < 6_000_000
    dom = opened(page, tmp_path, "--dump-dom")
    plots = ["ttft", "latency", "line", *(["sweep"] if what == "sweep" else [])]
    for name in plots:
        assert (
            f'id="plot-{name}" class="plot js-plotly-plot"' in dom
            or f'class="plot js-plotly-plot" id="plot-{name}"' in dom
        )
    assert "<title>owned" not in dom
    assert "<img" not in dom
    assert dom.count("main-svg") >= len(plots)


@needs_chromium
def test_it_is_drawn_in_light_and_in_dark(tmp_path: Path) -> None:
    """Two screenshots, kept beside the test's other output."""
    page = tmp_path / "report.html"
    page.write_text(page_of_a_sweep(), encoding="utf-8")
    pictures = {}
    for name, more in (("light", []), ("dark", ["--blink-settings=preferredColorScheme=0"])):
        picture = tmp_path / f"{name}.png"
        opened(page, tmp_path, f"--screenshot={picture}", *more)
        pictures[name] = picture.read_bytes()
        assert len(pictures[name]) > 50_000
    assert pictures["light"] != pictures["dark"]


def test_answers_are_left_out_unless_they_are_asked_for() -> None:
    escaped = "&lt;/script&gt;&lt;img"
    assert page_of_a_run().count(escaped) < page_of_a_run(include_text=True).count(escaped)
    for page in (page_of_a_run(), page_of_a_run(include_text=True)):
        assert "<img" not in page.split("<script id=plots", 1)[0]
