"""A real model on this machine: llama.cpp's server in a child process, for as long as a run needs it.

The child and not a thread, because the model's threads must not disturb the event loop that measures.
One thread fewer than there are cores: with more, ggml's spinning threads collapse under load.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import TracebackType

from batchstream.endpoints.weights import weights
from batchstream.errors import StoppedError, UsageError

MODEL = "smollm2-135m-instruct"


class LocalServer:
    """`start` gives the base URL (ending with /v1) once the model answers, `stop` ends the child.

    model_file   GGUF weights; None = SmolLM2-135M-Instruct, fetched once (see `weights`)
    parallel     slots: requests the model works on at once; more wait in the server
    context      tokens of prompt and answer together, for each slot
    threads      None = one fewer than the cores this process may use, at least 1
    start_timeout  seconds for loading the model (not for fetching it)
    log_file     where the server's log goes; None = a temporary file, kept only when the start fails

    Also a context manager. Blocks while it starts: call it from a thread when a loop is running.
    """

    def __init__(
        self,
        model_file: str | os.PathLike[str] | None = None,
        *,
        parallel: int = 4,
        context: int = 2048,
        threads: int | None = None,
        start_timeout: float = 120.0,
        log_file: str | os.PathLike[str] | None = None,
    ) -> None:
        for name, value in (("parallel", parallel), ("context", context), ("threads", threads)):
            if value is not None and value < 1:
                raise UsageError(f"local: {name}: expected at least 1, got {value!r}")
        self._model_file = model_file
        self._parallel = parallel
        self._context = context
        self._threads = threads or max(1, _cores() - 1)
        self._start_timeout = start_timeout
        self._keep_log = log_file is not None
        self._log = Path(log_file) if log_file is not None else None
        self._child: subprocess.Popen[str] | None = None
        self.base_url = ""

    def __enter__(self) -> LocalServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """The child's process id while it runs."""
        return self._child.pid if self._child is not None else None

    def start(self) -> str:
        """Raises `UsageError` (extra not installed, no such weights), `StoppedError` (the server does
        not come up: with the end of its log)."""
        if importlib.util.find_spec("xllamacpp") is None:
            raise UsageError(
                "the provider local needs llama.cpp's server (extra 'local'); "
                f"run: {sys.executable} -m pip install 'xllamacpp>=2026.10'"
            )
        model = weights() if self._model_file is None else Path(self._model_file)
        if not model.is_file():
            raise UsageError(f"{model}: expected a GGUF file with the model's weights (--model-file), found none")
        if self._log is None:
            number, name = tempfile.mkstemp(prefix="batchstream-local-", suffix=".log")
            os.close(number)
            self._log = Path(name)
        settings = {
            "model": str(model.absolute()),
            "alias": MODEL if self._model_file is None else model.stem,
            "threads": self._threads,
            "parallel": self._parallel,
            "context": self._context,
        }
        with self._log.open("ab") as log:
            self._child = subprocess.Popen(  # noqa: S603  (our own script)
                [sys.executable, "-P", str(Path(__file__).with_name("llama_child.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C is for the run, which drains and still needs its model
            )
        assert self._child.stdin is not None and self._child.stdout is not None  # noqa: S101, PT018  (PIPE)
        # Whatever goes wrong in the child ends its stdout, also the kill at the end of our patience.
        patience = threading.Timer(self._start_timeout, self._child.kill)
        patience.start()
        try:
            self._child.stdin.write(json.dumps(settings) + "\n")
            self._child.stdin.flush()
            address = self._child.stdout.readline().strip()
        except BrokenPipeError:
            address = ""
        finally:
            in_time = patience.is_alive()
            patience.cancel()
        if not address:
            self._keep_log = True
            self.stop()
            raise StoppedError(self._why(in_time))
        self.base_url = address + "/v1"
        return self.base_url

    def stop(self) -> None:
        """End the child; harmless when there is none."""
        child, self._child = self._child, None
        if child is not None:
            assert child.stdin is not None and child.stdout is not None  # noqa: S101, PT018  (PIPE)
            child.stdin.close()
            try:
                child.wait(5)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            child.stdout.close()
        if self._log is not None and not self._keep_log:
            self._log.unlink(missing_ok=True)
            self._log = None

    def _why(self, in_time: bool) -> str:
        assert self._log is not None  # noqa: S101  (set by start)
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        tail = " | ".join(line.strip() for line in lines if line.strip())[-600:]
        how = "ended while it started" if in_time else f"was not ready after {self._start_timeout:g} s"
        return f"local: llama.cpp's server {how}; the end of its log ({self._log}): {tail or 'empty'}"


def _cores() -> int:
    """Cores this process may use, where the system says so."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
