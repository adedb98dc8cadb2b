"""Files appear whole or not at all."""

from pathlib import Path

import pytest
from voc.files.whole import write_whole


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_incomplete_file_is_never_visible(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    path.write_text("older")

    def write_half(partial: Path) -> None:
        partial.write_text("new and not comp")
        raise error

    with pytest.raises(type(error)) as raised:
        write_whole(path, write_half)
    if isinstance(error, OSError):
        assert str(raised.value) == f"cannot write {path}: No space left on device"
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_replaced_not_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    path.write_text("older")
    with path.open() as reader:
        write_whole(path, lambda partial: partial.write_bytes(b"new"))
        assert reader.read() == "older"
    assert path.read_text() == "new"
