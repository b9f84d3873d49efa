"""`check`: everything a run would refuse, found without sending a prompt."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli import BAD_KEY, GOOD_KEY, batchstream, command, environment

from batchstream.cli.survey import survey
from batchstream.endpoints.simulate import Simulator
from batchstream.files.source import SourceSpec, open_source

At = Callable[[Simulator], list[str]]


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def labelled(out: str, label: str) -> list[str]:
    return [line[10:] for line in out.splitlines() if line[:10].strip() == label]


def test_a_good_job_is_told_on_stdout_and_leaves_nothing_behind(
    prompts: Path, endpoint: Simulator, at: At, tmp_path: Path
) -> None:
    done = batchstream("check", prompts, *at(endpoint), "--rpm", "6", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert labelled(done.stdout, "Rows") == ["12"]
    assert labelled(done.stdout, "Output") == [f"{tmp_path}/prompts.results.jsonl (free)"]
    assert "at least 2 min 00 s at 6 requests a minute" in labelled(done.stdout, "Time")[0]
    assert endpoint.ledger.requests == 0
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_bad_rows_are_named_by_line_the_first_twenty_and_a_count(tmp_path: Path) -> None:
    rows: list[object] = [{"prompt": f"Say {i}."} for i in range(1, 41)]
    rows[16] = '{"prompt": '
    write(tmp_path / "one.jsonl", rows)
    one = batchstream("check", "one.jsonl", "--provider", "sim", cwd=tmp_path)
    assert one.returncode == 10
    assert ["one.jsonl:17:" in line for line in labelled(one.stdout, "Bad row")] == [True]
    assert "one.jsonl:17:" in one.stderr.splitlines()[-1]
    assert batchstream("check", "one.jsonl", "--provider", "sim", "--max-failures", "1", cwd=tmp_path).returncode == 0
    assert batchstream("check", "one.jsonl", "--provider", "sim", "--invalid", "skip", cwd=tmp_path).returncode == 0

    write(tmp_path / "many.jsonl", [{"prompt": "ok"}, *([{"prompt": 5}] * 30)])
    many = batchstream("check", "many.jsonl", "--provider", "sim", cwd=tmp_path)
    assert len(labelled(many.stdout, "Bad row")) == 20
    assert "… and 10 more" in many.stdout


def test_ids_that_come_twice_are_named_with_their_rows(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [{"id": name, "prompt": "x"} for name in ("a", "b", "a", "c", "a")])
    done = batchstream("check", "in.jsonl", "--provider", "sim", cwd=tmp_path)
    assert done.returncode == 0
    assert labelled(done.stdout, "Ids")[0].startswith("2 rows have the id of an earlier one: 'a' (rows 0 and 2)")


def test_tokens_are_estimated_from_the_text_of_all_shapes(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", [
        {"prompt": "x" * 400, "system": "y" * 40, "max_tokens": 10},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "z" * 80},
                                                   {"type": "image_url", "image_url": {"url": "u" * 9999}}]}]},
        {"custom_id": "c", "method": "POST", "url": "/v1/responses", "body": {"input": "i" * 120, "model": "m"}},
    ])  # fmt: skip

    def build(api: str, common: dict[str, object]) -> dict[str, object]:
        return dict(common)

    found = survey(open_source(SourceSpec(paths=(str(path),)), build))
    assert (found.rows, found.valid, found.characters, found.tokens) == (3, 3, 640, 160)
    assert (found.limited, found.answer_tokens, found.without_model) == (1, 10, 2)


def test_a_key_is_said_to_be_there_and_from_where_but_never_shown(prompts: Path, tmp_path: Path) -> None:
    found = batchstream("check", prompts, cwd=tmp_path, SHUTTLEAI_API_KEY=GOOD_KEY)
    assert labelled(found.stdout, "Key") == ["there, from variable SHUTTLEAI_API_KEY"]
    assert GOOD_KEY not in found.stdout + found.stderr
    missing = batchstream("check", prompts, cwd=tmp_path)
    assert missing.returncode == 4
    assert "SHUTTLEAI_API_KEY" in missing.stderr
    assert labelled(missing.stdout, "Rows") == ["12"]  # the rest is checked all the same


def test_ping_asks_for_the_models_and_nothing_else(prompts: Path, guarded: Simulator, tmp_path: Path) -> None:
    args = ["check", prompts, "--provider", "shuttleai", "--base-url", guarded.base_url, "--ping"]
    known = batchstream(*args, "--model", "sim", cwd=tmp_path, SHUTTLEAI_API_KEY=GOOD_KEY)
    assert (known.returncode, labelled(known.stdout, "Ping")) == (0, ["answers, 3 models; it has sim"])
    unknown = batchstream(*args, "--model", "nix", cwd=tmp_path, SHUTTLEAI_API_KEY=GOOD_KEY)
    assert labelled(unknown.stdout, "Ping") == ["answers, 3 models; but does not list nix"]
    refused = batchstream(*args, cwd=tmp_path, SHUTTLEAI_API_KEY=BAD_KEY)
    assert refused.returncode == 4
    assert "the key is from variable SHUTTLEAI_API_KEY" in refused.stderr.splitlines()[-1]
    assert BAD_KEY not in refused.stdout + refused.stderr
    assert guarded.ledger.requests == 0


def test_ping_tells_when_nobody_is_there(prompts: Path, endpoint: Simulator, tmp_path: Path) -> None:
    gone = "http://127.0.0.1:1/v1"
    done = batchstream("check", prompts, "--base-url", gone, "--model", "sim", "--ping", cwd=tmp_path)
    assert done.returncode == 4
    assert f"GET {gone}/models" in done.stderr


def test_rows_without_a_model_are_found(prompts: Path, tmp_path: Path) -> None:
    done = batchstream("check", prompts, "--base-url", "http://127.0.0.1:1/v1", cwd=tmp_path)
    assert done.returncode == 2
    assert "12 rows name no model" in done.stderr


@pytest.mark.parametrize(("out", "code"), [("no/dir/out.jsonl", 14), ("out.csv", 2), ("there.jsonl", 2)])
def test_an_output_that_cannot_be_is_found(out: str, code: int, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "there.jsonl").write_text("precious\n")
    done = batchstream("check", prompts, "--provider", "sim", "-o", out, cwd=tmp_path)
    assert done.returncode == code
    assert out in done.stderr


def test_the_state_of_a_job_is_told(prompts: Path, tmp_path: Path) -> None:
    args = [prompts, "--provider", "sim"]
    batchstream("run", *args, "--concurrency", "1", "--max-requests", "5", cwd=tmp_path)
    assert "a run resumes: 5 ok and 0 failed" in batchstream("check", *args, cwd=tmp_path).stdout
    batchstream("run", *args, cwd=tmp_path)
    assert "a run would send nothing" in batchstream("check", *args, cwd=tmp_path).stdout
    assert "starts over" in batchstream("check", *args, "--new-job", cwd=tmp_path).stdout


def test_stdin_can_be_checked(prompts: Path, tmp_path: Path) -> None:
    with prompts.open() as rows:
        done = subprocess.run(
            command("check", "-", "--provider", "sim", "-o", "out.jsonl"), cwd=tmp_path, env=environment(),
            stdin=rows, capture_output=True, text=True,
        )  # fmt: skip
    assert (done.returncode, labelled(done.stdout, "Rows")) == (0, ["12"])


def test_a_missing_input_is_exit_10(tmp_path: Path) -> None:
    done = batchstream("check", "nix.jsonl", "--provider", "sim", cwd=tmp_path)
    assert done.returncode == 10
    assert "nix.jsonl" in done.stderr


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    def peak(rows: int) -> int:
        """MiB at the peak of checking so many rows with ids."""
        with (tmp_path / "in.jsonl").open("w") as file:
            for i in range(rows):
                file.write(f'{{"id": "row-{i}", "prompt": "Say {i}."}}\n')
        program = (
            "import resource, sys\n"
            "from batchstream.cli.main import invoke\n"
            "from batchstream.cli.voice import Voice\n"
            "assert invoke(['check', 'in.jsonl', '--provider', 'sim'], Voice(None)) == 0\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, file=sys.stderr)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True
        )
        return int(done.stderr)

    assert peak(120_000) - peak(2_000) < 8


def test_check_and_run_agree_on_what_may_go_on(tmp_path: Path) -> None:
    """One comparison decides for both: what a run takes, `check` finds in order."""
    source = tmp_path / "prompts.jsonl"
    lines = ['{"prompt": "one"}', '{"prompt": "two"}', '{"prompt": "three"}']
    args = (source, "--provider", "sim", "-o", tmp_path / "out.jsonl")
    source.write_text("\n".join([lines[0], "{broken", lines[2]]) + "\n")
    assert batchstream("run", *args, cwd=tmp_path).returncode == 3
    source.write_text("\n".join(lines) + "\n")
    assert batchstream("check", *args, cwd=tmp_path).returncode == 12
    mended = batchstream("check", *args, "--retry-failed", cwd=tmp_path)
    assert mended.returncode == 0, mended.stderr
    assert batchstream("run", *args, "--retry-failed", cwd=tmp_path).returncode == 0
