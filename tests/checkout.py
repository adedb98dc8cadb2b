"""A copy of the sources, so that a test builds what is tracked and no stale build folder has an influence."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
UNTRACKED = shutil.ignore_patterns(
    *(".git", ".venv*", ".*_cache", ".hypothesis", ".coverage*", "__pycache__", "*.egg-info"),
    *("build", "dist", "runs", "site", "quick"),
)


def copy_sources(target: Path) -> Path:
    """Copy the sources and return the copy."""
    return Path(shutil.copytree(ROOT, target, symlinks=True, ignore=UNTRACKED))


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command that imports from the current folder and nothing from this checkout; return what it prints."""
    variables = {**os.environ, "PYTHONPATH": "", **environment}
    finished = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout.strip()


def python(code: str, cwd: Path, **environment: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    return run(sys.executable, "-c", code, cwd=cwd, **environment)
