"""`batchstream bench`: the loads of a measurement, one stage after the other, with the engine of a run.

Each stage is a `run_shard` with a load of its own: closed (so many requests at once) or open (due at instants that are
fixed before it begins). Its rows go to the journal like any others, so a measurement can be stopped, reported from and
exported; a stage that was interrupted is measured again from its begin, for half of one is no measurement. What the
finished ones came to is kept in OUT.journal/STAGES.json.
"""

from __future__ import annotations

import asyncio
import os
import platform
import random
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import msgspec

import batchstream
from batchstream.connect import Plan, opened, plan, secrets
from batchstream.engine.client import Target
from batchstream.engine.gauges import Gauges, quiet_gc
from batchstream.engine.progress import Progress
from batchstream.engine.runner import Stop
from batchstream.errors import InputError, UsageError
from batchstream.figures.evidence import Evidence
from batchstream.figures.percentiles import quantile
from batchstream.figures.stages import SLO_METRICS, BenchSummary, Stage, fold
from batchstream.figures.summary import Run, Tally, summary
from batchstream.files import fsio
from batchstream.files.journal import JournalDir
from batchstream.files.recovery import recover
from batchstream.files.source import Source
from batchstream.intake import output_of
from batchstream.job import Job
from batchstream.launch.conclusion import EXIT_OF, now_iso
from batchstream.launch.here import Watch
from batchstream.launch.loops import loop_factory
from batchstream.launch.opening import Interrupted, Opening
from batchstream.launch.signals import listen
from batchstream.policy.arrivals import Load, next_level, offsets
from batchstream.policy.limits import Rates
from batchstream.records import InvalidRow, Request
from batchstream.shard import Control, Hooks, run_shard

OPEN_SLOTS = 100_000
"""Requests at once in an open loop: no limit of the measurement, only of this machine."""

PROMPTS_MAX = 1_000_000
"""Prompts kept in memory, to be asked over and over."""

SEARCH_MAX = 30
"""Stages of a search at most."""


class Bench(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure. Durations are seconds. Raises UsageError for what makes no sense.

    `concurrency` or `rate` (requests a second, by `arrival`), or `ramp` (from, to), or `replay` (a column with the
    instants); each number is a stage, the whole list is repeated `repeat` times. A stage ends after `duration` or
    `requests`, without either when each prompt was asked once. The first `warmup` requests of a stage are in no figure.
    `slo`: seconds by metric; `find`: look for the highest level at which a share of `attainment` meets it.
    """

    concurrency: tuple[int, ...] = ()
    rate: tuple[float, ...] = ()
    arrival: Literal["constant", "poisson", "gamma"] = "poisson"
    burstiness: float = 1.0
    ramp: tuple[float, float] | None = None
    replay: str | None = None
    duration: float | None = None
    requests: int | None = None
    warmup: int = 0
    repeat: int = 1
    slo: dict[str, float] = {}
    attainment: float = 0.95
    find: Literal["rate", "concurrency"] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        ways = [bool(self.concurrency), bool(self.rate), self.ramp is not None, self.replay is not None]
        if sum(ways) > 1:
            raise UsageError("--concurrency, --rate, --ramp and --replay are different loads; give one of them")
        for name in ("concurrency", "rate", "ramp"):
            for value in getattr(self, name) or ():
                if not value > 0:
                    raise UsageError(f"--{name}: expected numbers above 0, got {value!r}")
        for name in ("burstiness", "duration", "requests", "repeat"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"--{name}: expected a number above 0, got {value!r}")
        if not 0.0 < self.attainment <= 1.0:
            raise UsageError(f"--attainment: expected a share above 0 and up to 1, got {self.attainment!r}")
        if self.warmup < 0:
            raise UsageError(f"--warmup: expected 0 or more requests, got {self.warmup!r}")
        for name in self.slo:
            if name not in SLO_METRICS:
                raise UsageError(f"--slo: expected one of {', '.join(SLO_METRICS)}, got {name!r}")
        if self.ramp is not None and self.duration is None:
            raise UsageError("--ramp needs --duration: the seconds it takes")
        if self.find is not None and not self.slo:
            raise UsageError("--find looks for the highest load that still meets an objective; give it with --slo")
        others = {"rate": self.concurrency, "concurrency": self.rate}.get(self.find or "")
        if self.find is not None and (self.ramp or self.replay or others):
            raise UsageError(f"--find {self.find} begins at --{self.find} N; the other loads do not go with it")
        if self.burstiness != 1.0 and self.arrival != "gamma":
            raise UsageError("--burstiness is of gamma arrivals; add --arrival gamma")

    def loads(self) -> list[Load]:
        """The stages in their order, without those of a search."""
        if self.find is not None:
            return []
        if self.ramp is not None:
            once = [Load(arrival="ramp", rate=self.ramp[0], rate_to=self.ramp[1])]
        elif self.replay is not None:
            once = [Load(arrival="replay")]
        elif self.rate:
            once = [self.at(rate) for rate in self.rate]
        else:
            once = [self.at(float(number)) for number in self.concurrency or (1,)]
        return once * self.repeat

    def at(self, level: float) -> Load:
        """The load of one level of a sweep or a search."""
        if self.rate or self.find == "rate":
            burst = self.burstiness if self.arrival == "gamma" else None
            return Load(arrival=self.arrival, rate=level, burstiness=burst)
        return Load(arrival="closed", concurrency=int(level))


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a measurement ended. `message` as in `launch.conclusion.Report`."""

    exit_code: int
    message: str
    output: Path
    summary: BenchSummary | None
    stop: Stop | None = None


def run_bench(job: Job, bench: Bench, *, watch: Watch, hooks: Hooks, handle_signals: bool = False) -> Outcome:
    """Measure, to the end or to a stop. Blocking. Raises BatchstreamErrors for what keeps it from starting."""
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_Measurement(job, bench, watch, hooks).go(handle_signals))


def bench_output(job: Job) -> Path:
    """Where the results go: as said, or PROMPTS.bench.jsonl."""
    if job.output is not None:
        return output_of(job)
    beside = output_of(job)
    return beside.with_name(beside.name.replace(".results.", ".bench."))


class _Measurement:
    def __init__(self, job: Job, bench: Bench, watch: Watch, hooks: Hooks) -> None:
        self._job = job
        self._bench = bench
        self._plan: Plan = plan(job)
        self._watch = watch
        self._hooks = hooks
        self._control = Control()
        self._progress = Progress(time.monotonic())
        self._out = bench_output(job)
        self._started_at = now_iso()
        self._stages: list[Stage] = []
        self._next_row = 0

    async def go(self, handle_signals: bool) -> Outcome:
        restore = listen(self._control, self._say_signal) if handle_signals else None
        more = {"bench": msgspec.json.decode(msgspec.json.encode(self._bench))}  # as the manifest will give it back
        try:
            opening = Opening(self._job, self._plan, self._out, self._control, self._started_at, more)
            source, journal = await opening.open()
            try:
                return await self._measure(source, journal)
            finally:
                await asyncio.to_thread(journal.close)
        except Interrupted:
            stop = await self._control.stopped()
            return Outcome(exit_code=128 + stop.signal, message="stopped; nothing was sent", output=self._out,
                           summary=None, stop=stop)  # fmt: skip
        finally:
            if restore is not None:
                restore()

    async def _measure(self, source: Source, journal: JournalDir) -> Outcome:
        self._stages = _kept(journal)
        self._next_row = journal.recovered.highest + 1
        if journal.final is not None:
            return self._outcome(0, f"measured before ({len(self._stages)} stages); nothing was sent")
        prompts = await asyncio.to_thread(_prompts, source)
        stop = None
        async with opened(self._job, self._plan) as target:
            with quiet_gc(), self._watch(self._progress):
                for number, load in enumerate(self._loads()):
                    if number < len(self._stages):
                        continue  # measured before an interruption
                    stop = await self._stage(load, prompts, target, journal)
                    if stop is not None:
                        break
        if stop is not None:
            code = 128 + stop.signal if stop.cause == "signal" else EXIT_OF[stop.cause]
            done = f"stopped: {stop.message}; {len(self._stages)} stages are measured, the others are not"
            return self._outcome(code, done, stop)
        stored = await asyncio.to_thread(recover, journal.path, journal.manifest.salt)
        rows = stored.ok + stored.failed
        await asyncio.to_thread(lambda: journal.publish(rows=rows, exit_code=0, finished=now_iso()))
        return self._outcome(0, "finished")

    def _loads(self) -> Iterator[Load]:
        """The loads, those of a search as the stages so far decide."""
        bench = self._bench
        if bench.find is None:
            yield from bench.loads()
            return
        first = float((bench.rate or bench.concurrency or (1,))[0])
        yield from (stage.load for stage in self._stages[:])  # of an earlier start: where it had come to
        while len(self._stages) < SEARCH_MAX:
            level = next_level(self._tried(), first=first, whole=bench.find == "concurrency")
            if level is None:
                return
            yield bench.at(level)

    def _tried(self) -> list[tuple[float, bool]]:
        good = self._bench.attainment
        return [(s.load.level, s.goodput is not None and s.goodput.attainment >= good) for s in self._stages]

    async def _stage(self, load: Load, prompts: list[Request], target: Target, journal: JournalDir) -> Stop | None:
        """Measure one load. Returns why the measurement must end, or None."""
        job, number = self._job, len(self._stages)
        count, seconds = self._extent(load, prompts)
        schedule = self._schedule(load, prompts, count, seconds, number)
        first = self._next_row
        # Each request counts as it came: what a retry would hide is part of the measurement. And all are waited for:
        # those cut off at the end would be the slow ones.
        limits: dict[str, Any] = {"max_attempts": 1, "breaker": "off", "drain_timeout": max(job.drain_timeout, 3600.0)}
        if load.arrival == "closed" and seconds is not None:
            limits["max_time"] = seconds
        self._hooks_note(f"stage {number + 1}: {load}")
        gauges, progress = Gauges(), self._progress
        slips = len(progress.slips)
        began_at = now_iso()
        gauges.start()
        try:
            stop = await run_shard(
                msgspec.structs.replace(job, **limits), target, journal, _asked(prompts, first, count), list,
                progress, self._control, self._hooks,
                rates=Rates(measured=True),
                slots=load.concurrency or OPEN_SLOTS, secrets=secrets(job, self._plan),
                schedule=iter(schedule) if schedule is not None else None,
            )  # fmt: skip
        finally:
            gauges.stop()
        if stop is not None and not (stop.cause == "budget" and "max_time" in limits and job.max_time is None):
            return stop
        slip = quantile(sorted(progress.slips[slips:]), 0.99) if len(progress.slips) > slips else None
        evidence = msgspec.structs.replace(gauges.evidence(progress.traffic), schedule_slip_p99_s=slip)
        await asyncio.to_thread(self._keep, journal, load, first, began_at, schedule, slip, evidence)
        return None

    def _extent(self, load: Load, prompts: list[Request]) -> tuple[int | None, float | None]:
        """How many requests, for how long; None is no limit."""
        count, seconds = self._bench.requests, self._bench.duration
        if count is None and (seconds is None or load.arrival == "replay"):
            count = len(prompts)
        if count is not None:
            count += self._bench.warmup
        return count, seconds

    def _schedule(
        self, load: Load, prompts: list[Request], count: int | None, seconds: float | None, number: int
    ) -> list[float] | None:
        if load.arrival == "closed":
            return None
        if load.arrival == "replay":
            return _instants(prompts, str(self._bench.replay))[:count]
        # Each stage has a chance of its own, so that a sweep's last stage does not depend on how long the first was.
        chance = random.Random(f"{self._bench.seed}/{number}/{load}")  # noqa: S311  (to be repeatable, not secret)
        return list(offsets(load, chance, seconds=seconds, count=count))

    def _keep(
        self, journal: JournalDir, load: Load, first: int, began_at: str, schedule: list[float] | None,
        slip: float | None, evidence: Evidence,
    ) -> None:  # fmt: skip
        """Fold the stage's rows and store what they came to."""
        stored = recover(journal.path, journal.manifest.salt)
        self._next_row = stored.highest + 1
        stage = Stage(
            name=str(load),
            load=load,
            repeat=sum(other.load == load for other in self._stages),
            endpoint=self._plan.label,
            model=self._plan.model,
            rows=(first, self._next_row),
            warmup=self._bench.warmup,
            started_at=began_at,
            scheduled=None if schedule is None else len(schedule),
            slip_p99_s=slip,
            summary=summary(Tally(), self._facts(None)),
        )
        self._stages.append(fold(stage, stored.results(), self._bench.slo, evidence))
        fsio.replace_file(fsio.disk, journal.path / "STAGES.json", msgspec.json.encode(self._stages))

    def _facts(self, exit_code: int | None, stop: str | None = None) -> Run:
        return Run(started_at=self._started_at, ended_at=now_iso(), exit_code=exit_code, stop=stop,
                   endpoint=self._plan.label, model=self._plan.model, output=str(self._out))  # fmt: skip

    def _outcome(self, code: int, message: str, stop: Stop | None = None) -> Outcome:
        judged = [stage.summary for stage in self._stages if stage.summary.verdict is not None]
        reasons = [f"{stage.name}: {why}" for stage in self._stages for why in stage.summary.verdict_reasons]
        found = None
        if self._bench.find is not None:
            found = max((level for level, good in self._tried() if good), default=None)
        figures = BenchSummary(
            run=self._facts(code, stop.message if stop is not None else None),
            stages=self._stages,
            verdict=None if not judged else "degraded" if reasons else "trusted",
            verdict_reasons=reasons,
            found=found,
            environment=environment(),
        )
        return Outcome(exit_code=code, message=message, output=self._out, summary=figures, stop=stop)

    def _hooks_note(self, text: str) -> None:
        if self._hooks.on_note is not None:
            self._hooks.on_note(text)

    def _say_signal(self, number: Any, again: bool) -> None:
        self._hooks_note(f"{number.name}: " + ("cutting" if again else "this stage is given up; once more cuts"))


def environment() -> dict[str, str]:
    """What a reader of the figures wants to know of this machine."""
    return {
        "batchstream": batchstream.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": str(len(os.sched_getaffinity(0))),
    }


def _kept(journal: JournalDir) -> list[Stage]:
    """The stages that earlier starts of this measurement have finished."""
    try:
        data = (journal.path / "STAGES.json").read_bytes()
    except FileNotFoundError:
        return []
    stages = msgspec.json.decode(data, type=list[Stage])
    # After --new-job the file is the earlier measurement's: its rows are not in this journal.
    return [stage for stage in stages if stage.rows[1] <= journal.recovered.highest + 1]


def _prompts(source: Source) -> list[Request]:
    found: list[Request] = []
    for batch in source.batches():
        for row in batch:
            if isinstance(row, InvalidRow):
                raise InputError(f"{row.message} (a measurement wants every prompt to be good)")
            found.append(row)
        if len(found) > PROMPTS_MAX:
            raise InputError(
                f"expected at most {PROMPTS_MAX:,} prompts to measure with; choose some with --limit or --sample"
            )
    if not found:
        raise InputError("expected at least one prompt to measure with, got none")
    return found


def _asked(prompts: list[Request], first: int, count: int | None) -> Iterator[list[Request | InvalidRow]]:
    """The prompts over and over, as rows of the measurement from the ordinal `first` on."""
    number = 0
    while count is None or number < count:
        end = number + 32 if count is None else min(number + 32, count)
        yield [
            msgspec.structs.replace(prompts[place % len(prompts)], row=first + place) for place in range(number, end)
        ]
        number = end


def _instants(prompts: list[Request], column: str) -> list[float]:
    """The column's instants as seconds from the first. Raises InputError."""
    found: list[float] = []
    for prompt in prompts:
        value = (prompt.keep or {}).get(column)
        try:
            at = float(value) if isinstance(value, int | float) else datetime.fromisoformat(str(value)).timestamp()
        except ValueError:
            raise InputError(
                f"row {prompt.row}, column {column!r}: expected seconds or an ISO time to replay, got {value!r}"
            ) from None
        found.append(at)
    start = min(found)
    if sorted(found) != found:
        raise InputError(f"column {column!r}: expected instants in ascending order to replay; sort the prompts by it")
    return [at - start for at in found]
