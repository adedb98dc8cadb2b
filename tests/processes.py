"""Scripts in processes of their own."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def started(script: str, arguments: list[str], launcher: tuple[str, ...] = ()) -> Iterator["subprocess.Popen[str]"]:
    """Start a script in a process of its own, which ends with the block. There is no time limit to miss."""
    command = [sys.executable, *launcher, script, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # a launcher ends its own processes
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=30)
            process.kill()
            process.communicate()
