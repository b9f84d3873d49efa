"""Signals while a job runs: the first drains, the second cuts."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

from batchstream.engine.runner import Stop
from batchstream.shard import Control


def listen(control: Control, say: Callable[[signal.Signals, bool], None]) -> Callable[[], None]:
    """SIGINT, SIGTERM and SIGHUP: the first drains, the second cuts; `say` tells of each. Returns what undoes it.

    What we were started to ignore stays ignored: `nohup` means that a closed terminal ends nothing.
    """
    loop = asyncio.get_running_loop()
    listened = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    signals = [number for number in listened if signal.getsignal(number) is not signal.SIG_IGN]

    def on_signal(number: signal.Signals) -> None:
        say(number, control.stopping)
        if control.stopping:
            control.abort()
        control.stop(Stop("signal", f"got {number.name}", int(number)))

    for number in signals:
        loop.add_signal_handler(number, on_signal, number)

    def restore() -> None:
        for number in signals:
            loop.remove_signal_handler(number)

    return restore
