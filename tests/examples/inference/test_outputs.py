"""The files that inference writes."""

import os
from pathlib import Path

from voc.inference.outputs import write_scores


def test_file_name_that_is_not_valid_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    write_scores(tmp_path / "scores.csv", ["a,b", "c"], [(name, [0.25, 1e-9])])
    assert (tmp_path / "scores.csv").read_bytes() == b'image,"a,b",c\r\ncaf\xe9,0.250000,0.000000\r\n'
