"""The command line in a real terminal: a pseudo-terminal of a given size on all three streams."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import struct
import subprocess
import termios
from pathlib import Path

from cli import command, environment


def in_terminal(*args: object, cwd: Path, columns: int = 80, **env: str) -> tuple[int, str]:
    """Run to the end; exit code and everything that was written to the terminal."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen(
        command(*args), cwd=cwd, env=environment(TERM="xterm-256color", **env), stdin=terminal, stdout=terminal,
        stderr=terminal, start_new_session=True,
    )  # fmt: skip
    os.close(terminal)
    shown = b""
    while True:
        try:
            piece = os.read(controller, 1 << 16)
        except OSError as error:
            if error.errno != errno.EIO:  # Linux says so when the last holder of the terminal has gone
                raise
            break
        if not piece:
            break
        shown += piece
    os.close(controller)
    return process.wait(60), shown.decode()
