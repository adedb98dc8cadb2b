"""The files that inference writes."""

import os
from pathlib import Path

from voc.inference.outputs import write_scores


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    write_scores(tmp_path / "scores.csv", ["a,b", "c"], [(name, [0.25, 1e-9])])
    assert (tmp_path / "scores.csv").read_bytes() == b'image,"a,b",c\r\ncaf\xe9,0.250000,0.000000\r\n'
