"""The README's Python runs as printed, and its pictures are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
def test_python_blocks(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("path", re.findall(r"!\[.*?\]\((?!http)(.*?)\)", README))
def test_pictures(path: str) -> None:
    assert (ROOT / path).is_file()
