"""Code in a process and in a child that it forks."""

import subprocess
import sys
from textwrap import indent


def run_and_fork(before: str, in_child: str) -> None:
    """Run code in a new process, which then forks: the child runs the other code. It is an error if either fails."""
    code = f"""{before}
import os, sys
child = os.fork()
if child == 0:
{indent(in_child, "    ")}
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
