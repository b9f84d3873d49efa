"""Keys, plans and rate windows."""

from __future__ import annotations

import time
from email.utils import parsedate_to_datetime

import pytest

from batchstream.endpoints.sim.gate import Gate


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (bearer("shuttle-right"), 200),
        ({"authorization": "bearer shuttle-right"}, 200),
        ({"x-api-key": "shuttle-right"}, 200),
        ({}, 401),
        (bearer("shuttle-wrong"), 401),
        ({"authorization": "shuttle-right"}, 401),
        ({"authorization": "Bearer "}, 401),
        (bearer("shuttle-nofunds"), 402),
        (bearer("shuttle-plan"), 403),
        (bearer("shuttle-suspended"), 423),
    ],
)
def test_a_key_is_right_or_refused_as_shuttleai_does(simulated, headers: dict[str, str], status: int) -> None:
    sim = simulated(key="shuttle-right")
    answer = sim.chat(headers=headers)
    assert answer.status == status
    assert sim.request("GET", "/v1/models", headers=headers).status == status
    if status != 200:
        assert set(answer.json["error"]) == {"message", "type", "code"}
        assert answer.json["error"]["code"] == status
        assert "shuttle-" not in answer.body.decode(), "a key is never repeated"
    assert [(entry["key_ok"], entry["status"]) for entry in sim.ledger()] == [(status == 200, status)]


def test_without_a_key_setting_anybody_may_ask(simulated) -> None:
    sim = simulated()
    assert sim.chat().status == sim.chat(headers=bearer("any")).status == 200


def test_a_fixed_window_admits_its_limit_and_the_next_one_again(simulated) -> None:
    sim = simulated(rpm=3, speedup=60, tokens=1)  # a minute lasts a second
    client, ending = sim.client(), time.time() + 3.5
    while time.time() < ending:
        client.send("POST", "/v1/completions", {"model": "sim", "prompt": "x"})
        client.read()
        time.sleep(0.01)
    statuses = [(int(entry["received_wall"]), entry["status"]) for entry in sim.ledger()]
    admitted = [second for second, status in statuses if status == 200]
    assert {status for _, status in statuses} == {200, 429}
    middle = sorted({second for second, _ in statuses})[1:-1]
    assert middle
    assert {admitted.count(second) for second in middle} == {3}


def test_a_429_of_the_window_states_no_wait_like_shuttleai(simulated) -> None:
    sim = simulated(rpm=1, speedup=0.01)
    sim.chat()
    refused = sim.chat()
    assert refused.status == 429
    assert refused.json["error"]["code"] == 429
    assert "retry-after" not in refused.headers
    assert sim.ledger()[1]["billed_tokens"] == 0


@pytest.mark.parametrize("style", ["seconds", "ms", "date"])
def test_a_429_of_the_window_can_state_its_wait(simulated, style: str) -> None:
    sim = simulated(
        rpm=1, speedup=0.01, retry_after=style
    )  # windows of 6000 s: none ends in this test, but once in a blue moon
    sim.chat()
    before = time.time()
    headers = sim.chat().headers
    left = 6000 - before % 6000
    if style == "ms":
        stated = float(headers["retry-after-ms"]) / 1000
    elif style == "seconds":
        stated = float(headers["retry-after"])
    else:
        stated = parsedate_to_datetime(headers["retry-after"]).timestamp() - before
    assert stated == pytest.approx(left, abs=3)


def test_multipliers_plans_days_and_tokens_limit_too(simulated) -> None:
    slow = {"speedup": 0.001}
    double = simulated(rpm=4, **slow)
    assert [double.chat(model="sim/double").status for _ in range(3)] == [200, 200, 429]
    plan = simulated(plan="free", **slow)
    assert [plan.chat().status for _ in range(3)] == [200, 200, 429]
    assert plan.chat(model="shuttleai/auto").status == 403
    assert simulated(plan="basic", **slow).chat(model="shuttleai/auto").status == 200
    day = simulated(rpd=1, **slow)
    day.chat()
    assert "Daily limit exceeded" in day.chat().json["error"]["message"]
    tokens = simulated(tpm=100, **slow)
    assert [tokens.chat(max_tokens=40).status for _ in range(3)] == [200, 200, 429]


def test_a_refused_request_uses_up_neither_window_nor_fault_attempts(simulated) -> None:
    sim = simulated(rpm=2, speedup=0.001, faults="500(times=1)=1")
    assert [sim.chat().status for _ in range(4)] == [500, 200, 429, 429]
    assert [entry["attempt"] for entry in sim.ledger()] == [1, 2, 3, 4]


def test_which_fault_an_attempt_meets_does_not_depend_on_refusals_by_the_clock(simulated) -> None:
    sim = simulated(rpm=1, speedup=0.001, faults="500(times=2)=1")
    seen = []
    for _ in range(3):
        seen += [sim.chat().status, sim.chat().status]  # one is admitted, one refused
        sim.simulator._gate = Gate(sim.simulator.config)  # the next window
    assert seen == [500, 429, 500, 429, 200, 429]


def test_rate_limit_headers_count_down_when_asked_for(simulated) -> None:
    sim = simulated(rpm=5, speedup=0.001, ratelimit_headers=True)
    headers = [sim.chat().headers for _ in range(2)]
    assert [each["x-ratelimit-limit-requests"] for each in headers] == ["5", "5"]
    assert [each["x-ratelimit-remaining-requests"] for each in headers] == ["4", "3"]
    assert float(headers[0]["x-ratelimit-reset-requests"].rstrip("s")) > 0


def test_reset_opens_the_windows_and_empties_the_ledger(simulated) -> None:
    sim = simulated(rpm=1, speedup=0.001)
    assert [sim.chat().status for _ in range(2)] == [200, 429]
    assert sim.request("POST", "/sim/reset").json == {"ok": True}
    assert sim.ledger() == []
    assert sim.chat().status == 200
