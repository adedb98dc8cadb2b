"""Claims on the outputs of an image, and the records in masks."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from voc.dataset.images import read_mask, save_mask
from voc.inference import claims
from voc.inference.claims import CLAIMS, claim_outputs
from voc.inference.records import FIELD, Record, image_key, read_record

needs_locks = pytest.mark.skipif(sys.platform == "win32", reason="claims need fcntl")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / CLAIMS).mkdir()
    return tmp_path


@needs_locks
@pytest.mark.parametrize("name", ["a", "..", "x" * 251])
def test_an_image_is_claimed_once(name: str, folder: Path) -> None:
    claim = claim_outputs(folder, name)
    assert claim is not None
    assert claim_outputs(folder, name) is None
    other = claim_outputs(folder, "b")
    assert other is not None
    for one in (claim, claim, other):  # a second release does nothing
        one.release()
    assert not list((folder / CLAIMS).iterdir())
    again = claim_outputs(folder, name)
    assert again is not None
    again.release()


@needs_locks
def test_a_killed_process_has_no_claim(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from voc.inference.claims import claim_outputs\n"
        "claim = claim_outputs(Path(sys.argv[1]), 'a'); print('claimed', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}\n{code}", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "claimed\n"
            assert claim_outputs(folder, "a") is None
        finally:
            process.kill()
        process.wait()
        claim = claim_outputs(folder, "a")
    assert claim is not None
    claim.release()
    assert not list((folder / CLAIMS).iterdir())


@needs_locks
def test_a_file_system_without_locks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(claims.NO_LOCKS[0], "No locks available")

    monkeypatch.setattr(claims.fcntl, "flock", no_locks)
    claim = claim_outputs(folder, "a")
    assert claim is not None
    claim.release()
    assert not list((folder / CLAIMS).iterdir())


def test_a_mask_keeps_its_record(tmp_path: Path) -> None:
    record = Record("key", [0.1, 1 / 3])
    mask = np.arange(6, dtype=np.uint8).reshape(2, 3)
    save_mask(tmp_path / "a.png", mask, record.text())
    assert read_record(tmp_path / "a.png") == record
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), mask)


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"key": "k"}', '{"key": "k", "probabilities": ["x"]}'])
def test_no_record(text: str | None, tmp_path: Path) -> None:
    information = PngInfo()
    if text is not None:
        information.add_text(FIELD, text)
    Image.new("P", (2, 2)).save(tmp_path / "a.png", pnginfo=information)
    assert read_record(tmp_path / "a.png") is None
    assert read_record(tmp_path / "none.png") is None
    (tmp_path / "text.png").write_text("no image")
    assert read_record(tmp_path / "text.png") is None


def test_the_key_changes_with_arguments_image_and_labels(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"1")
    keys = [image_key({"scales": scales}, path, None) for scales in ((1.0,), (1.0, 2.0), (1.0,))]
    keys += [image_key({"scales": (1.0,)}, path, labels) for labels in (frozenset(), frozenset({2, 1}))]
    path.write_bytes(b"12")
    keys.append(image_key({"scales": (1.0,)}, path, None))
    assert keys[0] == keys[2]
    assert len(set(keys)) == 5
