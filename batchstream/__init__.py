"""Stream prompt files through OpenAI-compatible endpoints and keep every answer.

The Python API does what the command line does: `Job` (every option, once), `run` (a job to its end), `stream_results`
(results as they end), `stream` (the deltas of one request as they come), `read_results` (what is stored).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchstream.api import read_results, stream, stream_results
    from batchstream.job import Job, load_job
    from batchstream.launch.conclusion import Report
    from batchstream.launch.here import run

__version__ = "0.1.0"

__all__ = ["Job", "Report", "load_job", "read_results", "run", "stream", "stream_results"]

_HOMES = {
    "Job": "batchstream.job",
    "load_job": "batchstream.job",
    "Report": "batchstream.launch.conclusion",
    "run": "batchstream.launch.here",
    "read_results": "batchstream.api",
    "stream": "batchstream.api",
    "stream_results": "batchstream.api",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the command line's help needs none of it."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'batchstream' has no attribute {name!r}")
