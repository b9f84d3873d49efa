"""What a job takes in and where its results go: the source, the output's place, and the identity of both.

Shared by whatever runs a job and by `check`, which only looks.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import batchstream
from batchstream.connect import Plan
from batchstream.errors import UsageError
from batchstream.files.source import Source, SourceSpec, open_source
from batchstream.job import Job
from batchstream.policy.sharding import Shard, parse_shard, shard_from
from batchstream.records import Api
from batchstream.wire.body import build_body


def identity(job: Job, plan: Plan) -> dict[str, Any]:
    """What changes results, as plain data: the job's fingerprint. Tuning (concurrency, retries, key) is not in it."""
    return {
        "endpoint": urlsplit(plan.label).netloc or plan.label,
        "api": plan.api,
        "model": plan.model,
        "params": job.param,
        "system": job.system,
        "template": job.template,
        "prompt_column": job.prompt_column,
        "id_column": job.id_column,
        "keep": list(job.keep),
        "limit": job.limit,
        "sample": None if job.sample is None else [job.sample, job.seed],
        "invalid": "skip" if job.invalid == "skip" else "record",
        "sim_seed": job.sim.get("seed"),
        "major": batchstream.__version__.split(".")[0],
    }


def output_of(job: Job) -> Path:
    """Where the results go: as said, or beside the input (prompts.jsonl → prompts.results.jsonl).

    Raises UsageError for an output whose format cannot be told, or that is the input itself.
    """
    if job.output is not None:
        out = Path(job.output)
    elif job.input == "-" or "://" in job.input or any(c in job.input for c in "*?["):
        raise UsageError(f"name the results file with -o; there is no obvious place beside {job.input!r}")
    else:
        source = Path(job.input)
        stem = source.name
        for suffix in (".gz", ".zst", ".jsonl", ".ndjson", ".json", ".parquet"):
            stem = stem.removesuffix(suffix)
        out = source.with_name(f"{stem}.results{'.parquet' if source.suffix == '.parquet' else '.jsonl'}")
    if out.suffix not in (".jsonl", ".parquet"):
        raise UsageError(f"-o {out}: expected .jsonl or .parquet at its end (other formats: batchstream export)")
    if job.input != "-" and out.exists() and out.resolve() == Path(job.input).resolve():
        raise UsageError(f"-o {out}: the results would replace the prompts; choose another name")
    return out


def shard_of(job: Job) -> Shard | None:
    """The shard that `job` asks for, None for the whole. Raises UsageError where auto finds none."""
    if job.shard is None:
        return None
    try:
        return parse_shard(job.shard) or shard_from(os.environ)
    except ValueError as error:
        raise UsageError(f"shard: {error}") from None


def open_job_source(job: Job, plan: Plan, spool: str | None = None, shard: Shard | None = None) -> Source:
    """The job's prompts as requests; `spool` is the file that stdin was copied to, `shard` leaves out
    the rows of the others.
    Raises InputError and UsageError before the first row."""
    defaults = {**({"model": plan.model} if plan.model else {}), **job.param}

    def build(api: Api, common: dict[str, Any]) -> dict[str, Any]:
        return build_body(api, common, include_usage=job.include_usage)

    return open_source(
        SourceSpec(
            paths=(job.input,),
            api=plan.api,
            defaults=defaults,
            system=job.system,
            template=job.template,
            prompt_column=job.prompt_column,
            id_column=job.id_column,
            keep="all" if job.keep == ("all",) else job.keep or None,
            limit=job.limit,
            sample=job.sample,
            seed=job.seed,
            include_usage=job.include_usage,
            spool=spool,
            shard=shard,
        ),
        build,
    )
