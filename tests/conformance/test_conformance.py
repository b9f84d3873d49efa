"""The whole wire corpus over real HTTP, through the command line: every case right, no cut stream taken for a success.

pytest tests/conformance -s                prints right / wrong / silent false successes
python tests/conformance/compare.py        the same for other clients
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
from replaying import corpus_server, differences, replay_by_cli, taken_for_success
from wire_corpus import API, Case, stream_cases


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Case id → result row; one run of the command line for each API."""
    folder = tmp_path_factory.mktemp("conformance")
    with corpus_server() as base:
        return {name: row for api in API for name, row in replay_by_cli(api, base, folder).items()}


@pytest.mark.parametrize("case", stream_cases(), ids=lambda case: case.id)
def test_a_case_comes_out_right_over_http(case: Case, replayed: dict[str, dict[str, Any]]) -> None:
    assert differences(case, replayed[case.id]) == []


def test_no_broken_stream_is_taken_for_a_success(
    replayed: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    cases = stream_cases()
    right = sum(not differences(case, replayed[case.id]) for case in cases)
    false = [case.id for case in cases if taken_for_success(case, replayed[case.id])]
    said = f"{len(cases)} cases, {right} right, {len(cases) - right} wrong, {len(false)} silent false successes"
    with capsys.disabled():
        sys.stdout.write(f"\nconformance: {said}\n")
    assert false == []
