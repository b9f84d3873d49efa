"""Whole runs of the command line that are killed, starved of disk and started a hundred times at once.

Here a cut of each sweep; the whole of them, and the soak, with

    pytest -m sweep tests/faults -s

which takes about an hour on two cores and prints the figures of each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOAK_S = float(os.environ.get("BATCHSTREAM_SOAK_S", "1800"))


def test_killed_at_a_disk_call_a_run_is_completed_and_asks_again_only_what_it_says(sweep):
    assert sweep("killed_everywhere", "--every", 17)["trials"] > 8


def test_killed_within_a_write_too(sweep):
    assert sweep("torn_everywhere", "--every", 37, "--first", 5)["trials"] > 3


def test_killed_again_while_it_recovers_too(sweep):
    assert sweep("killed_in_recovery", "--every", 23, "--first", 3)["trials"] > 3


def test_a_disk_call_that_fails_costs_no_answer(sweep):
    assert sweep("failing_everywhere", "--every", 59, "--first", 3)["trials"] > 8


def test_killed_at_any_moment_once_twice_or_three_times(sweep):
    assert sweep("killed_at_random", "--trials", 50)["failures"] == 0


def test_of_a_hundred_starts_at_once_one_works_and_each_other_names_it(sweep):
    assert sweep("started_at_once", "--trials", 100)["refused"] == 99


def test_a_disk_that_fills_up_in_mid_run_loses_nothing_that_was_written_or_spilled(sweep, small_disk):
    figures = sweep("disk_full", "--every", 2)["asked_twice"]
    assert figures["spill"] == figures["cured"] == 0


def test_a_signal_drains_a_second_one_cuts_and_the_next_start_says_what_was_cut(sweep):
    assert sweep("signalled", "--trials", 4)["asked_twice"] > 0


def test_answers_that_break_off_are_asked_again_and_published_whole(sweep):
    assert sweep("broken_streams")["retried"] > 16


def test_after_a_power_loss_no_row_that_counted_is_sent_again(sweep):
    assert sweep("power_losses", "--trials", 25)["promises_kept"] > 100


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["killed_everywhere", "torn_everywhere", "killed_in_recovery", "failing_everywhere"])
def test_sweep_every_disk_call(sweep, name):
    assert sweep(name, timeout=3600)["trials"] > 100


@pytest.mark.sweep
def test_sweep_a_thousand_kills(sweep):
    assert sweep("killed_at_random", "--trials", 1000, "--seed", 1, timeout=3600)["failures"] == 0


@pytest.mark.sweep
def test_sweep_a_thousand_power_losses(sweep):
    assert sweep("power_losses", "--trials", 1000, "--seed", 1000, timeout=3600)["promises_kept"] > 1000


@pytest.mark.sweep
def test_sweep_signals(sweep):
    assert sweep("signalled", "--trials", 60, timeout=900)["asked_twice"] > 0


@pytest.mark.sweep
def test_sweep_a_full_disk_with_all_its_patience(sweep, small_disk):
    assert sweep("disk_full", timeout=900)["asked_twice"]["spill"] == 0


@pytest.mark.sweep
def test_sweep_soak(tmp_path):
    """Half an hour (or $BATCHSTREAM_SOAK_S seconds) with one per cent of mixed faults: nothing grows."""
    path = os.pathsep.join(str(entry) for entry in (HERE, *sys.path) if entry)
    done = subprocess.run(
        ["nice", sys.executable, str(HERE / "soak.py"), str(tmp_path), str(SOAK_S)],
        stdout=subprocess.PIPE, text=True, check=False, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0
    print(done.stdout)  # noqa: T201
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["exit_code"] == 5
    assert set(figures["failures"]) <= {"not_sse"}, "all but a web page instead of an answer is tried again"
    assert figures["retries"] > 0
    # Failed attempts leave cycles of objects behind, which the rare garbage collections of a run take away.
    assert figures["rss_growth_mib"] < 8
    assert figures["fds"][1] - figures["fds"][0] <= 40
    assert figures["tasks"][1] <= 140
