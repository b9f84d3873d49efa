"""llama.cpp's server in a process of its own: run as a script by `local`, never imported.

Reads one line of JSON from stdin (model, alias, threads, parallel, context), writes the base URL as
one line to stdout when the model answers, and lives until stdin ends or the parent has gone. So it
dies with its parent however that dies; a signal tied to the parent (PR_SET_PDEATHSIG) would fire
when the *thread* that started it ends. It imports nothing of batchstream, which need not be
installed where its path is known.
"""

from __future__ import annotations

import json
import os
import select
import sys
from typing import Any

POLL_S = 0.5


def start(settings: dict[str, Any]) -> Any:
    """The running server; returns when the model is loaded and the socket listens."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = settings["model"]
    params.model_alias = {settings["alias"]}
    params.hostnames = ["127.0.0.1"]
    params.port = 0  # the system picks a free one: no race for a port found free a moment ago
    params.n_parallel = settings["parallel"]
    params.n_ctx = settings["context"] * settings["parallel"]  # llama.cpp splits it among the slots
    for pool in (params.cpuparams, params.cpuparams_batch):
        pool.n_threads = settings["threads"]
    # A cached prefix is evaluated in another batch size, which changes low bits, and with them now and
    # then a token: the same request must get the same answer.
    params.cache_prompt = False
    params.cache_ram_mib = 0
    params.ui = False
    return xllamacpp.Server(params)


def main() -> None:
    parent = os.getppid()
    settings = json.loads(sys.stdin.readline())
    report = os.dup(1)
    os.dup2(2, 1)  # whatever the library prints belongs into the log
    try:
        server = start(settings)
    except RuntimeError as error:  # what the library raises when it cannot load; its log says why
        sys.exit(f"error: {error}")
    os.write(report, (server.listening_address + "\n").encode())
    while os.getppid() == parent:
        # The pipe alone is not enough: a process the parent forked may hold its other end open.
        if select.select([0], [], [], POLL_S)[0] and not os.read(0, 4096):
            break
    os._exit(0)  # nothing to save, and the library's threads would keep the interpreter waiting


if __name__ == "__main__":
    main()
