"""The enlarged training set from small fake trees of VOC and SBD."""

import errno
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import prepare_sbd
import pytest
from numpy.typing import NDArray
from PIL import Image
from prepare_sbd import main
from scipy.io import savemat
from voc.dataset.errors import DataError
from voc.dataset.images import read_mask, save_mask, voc_palette
from voc.dataset.layout import read_split
from voc.dataset.sbd import KNOWN_COUNTS, find_sets, read_sbd_mask
from voc.dataset.splits import load_split, load_split_with_masks

HEIGHT, WIDTH = 5, 8
VOC_TRAIN, VOC_VAL = ["v_train", "v_both"], ["v_val", "s_is_val"]
SBD_TRAIN, SBD_VAL = ["v_both", "s_train", "s_is_val"], ["s_other"]
FROM_SBD = ["s_other", "s_train"]  # in neither of VOC's lists


def mask_of(name: str) -> NDArray[np.uint8]:
    """Return a mask of classes 0 to 20 that depends on the name."""
    return np.random.default_rng(list(name.encode())).integers(0, 21, (HEIGHT, WIDTH)).astype(np.uint8)


def save_image(folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT), (90, 120, 30)).save(folder / f"{name}.jpg")


def save_sbd_mask(path: Path, mask: NDArray[np.generic], compress: bool = True) -> None:
    """Write a mask as SBD does: together with boundaries and a list of its classes."""
    boundaries = np.empty((20, 1), dtype=object)
    boundaries[:, 0] = [np.zeros((1, 1), np.uint8)] * 20
    content = {"Boundaries": boundaries, "Segmentation": mask, "CategoriesPresent": np.unique(mask)[:, None]}
    savemat(path, {"GTcls": content}, do_compression=compress)


def write_list(path: Path, names: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(names) + "\n")


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    root = tmp_path / "VOC2012"
    for name in {*VOC_TRAIN, *VOC_VAL, *SBD_TRAIN, *SBD_VAL}:
        save_image(root / "JPEGImages", name)
    (root / "SegmentationClass").mkdir()
    for name in (*VOC_TRAIN, *VOC_VAL):
        save_mask(root / f"SegmentationClass/{name}.png", mask_of("VOC's " + name))
    write_list(root / "ImageSets/Segmentation/train.txt", VOC_TRAIN)
    write_list(root / "ImageSets/Segmentation/val.txt", VOC_VAL)
    return root


@pytest.fixture
def sbd(tmp_path: Path) -> Path:
    root = tmp_path / "benchmark_RELEASE/dataset"
    (root / "cls").mkdir(parents=True)
    for name in (*SBD_TRAIN, *SBD_VAL):
        save_image(root / "img", name)
        save_sbd_mask(root / f"cls/{name}.mat", mask_of(name))
    write_list(root / "train.txt", SBD_TRAIN)
    write_list(root / "val.txt", SBD_VAL)
    return root


def prepare(voc: Path, sbd: Path, output: Path) -> int:
    return main([str(voc), str(sbd), "--output", str(output), "--allow-other-counts"])


def expected_mask(name: str) -> NDArray[np.uint8]:
    return mask_of(name if name in FROM_SBD else "VOC's " + name)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_into_the_root_of_voc(level: int, voc: Path, sbd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [sbd, sbd.parent, sbd.parent.parent][level]
    before = {path: path.read_bytes() for path in voc.rglob("*") if path.is_file()}
    assert prepare(voc, given, voc) == 0
    printed = capsys.readouterr().out
    assert "VOC train 2 (expected 1464), VOC val 2 (expected 1449), SBD train 3 (expected 8498)" in printed
    assert "image files: 6 in VOC's JPEGImages, 0 only in SBD's img" in printed
    assert f"4 images for training: {voc}" in printed

    assert read_split(voc, "train_aug") == ("s_other", "s_train", "v_both", "v_train")
    masks = {path.stem: read_mask(path) for path in (voc / "SegmentationClassAug").iterdir()}
    assert sorted(masks) == sorted([*VOC_TRAIN, *VOC_VAL, *FROM_SBD])
    for name, mask in masks.items():
        np.testing.assert_array_equal(mask, expected_mask(name))
    with Image.open(voc / "SegmentationClassAug/s_train.png") as image:
        assert image.mode == "P"
        assert image.getpalette() == voc_palette().ravel().tolist()
    assert all(path.read_bytes() == content for path, content in before.items())


def test_into_a_folder_of_its_own(voc: Path, sbd: Path, tmp_path: Path) -> None:
    output = tmp_path / "a/new/root"
    before = sorted(voc.rglob("*"))
    assert prepare(voc, sbd, output) == 0
    assert prepare(voc, sbd, output) == 0  # a second time, into the same folder
    assert sorted(voc.rglob("*")) == before
    classes = [f"class{index}" for index in range(20)]
    train = load_split_with_masks(output, read_split(output, "train_aug"), classes)
    val = load_split_with_masks(output, read_split(output, "val"), classes)
    assert (len(train), val.names, read_split(output, "train")) == (4, tuple(VOC_VAL), tuple(VOC_TRAIN))
    for name, path in zip(train.names + val.names, train.masks + val.masks, strict=True):
        np.testing.assert_array_equal(read_mask(path), expected_mask(name))


def test_images_that_only_sbd_has(voc: Path, sbd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (voc / "JPEGImages/s_other.jpg").unlink()
    assert prepare(voc, sbd, voc) == 0
    assert "image files: 5 in VOC's JPEGImages, 1 only in SBD's img" in capsys.readouterr().out
    assert load_split(voc, read_split(voc, "train_aug"), [f"class{index}" for index in range(20)]).names[0] == "s_other"


def test_links_or_else_copies(voc: Path, sbd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise OSError("a privilege is missing")

    assert prepare(voc, sbd, tmp_path / "links") == 0
    monkeypatch.setattr(Path, "symlink_to", forbidden)
    assert prepare(voc, sbd, tmp_path / "copies") == 0
    links, copies = (sorted((tmp_path / name / "JPEGImages").iterdir()) for name in ("links", "copies"))
    assert all(path.is_symlink() for path in links)
    assert not any(path.is_symlink() for path in copies)
    assert [path.read_bytes() for path in links] == [path.read_bytes() for path in copies]


def test_an_incomplete_list_is_never_kept(
    voc: Path, sbd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(path: Path, text: str, **_: object) -> int:
        path.write_bytes(text[:3].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full_disk)
        assert prepare(voc, sbd, tmp_path / "out") != 0
    assert not list((tmp_path / "out/ImageSets/Segmentation").iterdir())
    assert prepare(voc, sbd, tmp_path / "out") == 0
    assert read_split(tmp_path / "out", "train") == tuple(VOC_TRAIN)


def test_broken_links_are_replaced(voc: Path, sbd: Path, tmp_path: Path) -> None:
    assert prepare(voc, sbd, tmp_path / "out") == 0
    moved = voc.rename(tmp_path / "moved")
    assert prepare(moved, sbd, tmp_path / "out") == 0
    assert {path.resolve().parent for path in (tmp_path / "out/JPEGImages").iterdir()} == {moved / "JPEGImages"}


def test_unexpected_counts_are_reported(
    voc: Path, sbd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(voc), str(sbd), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error == (
        "prepare_sbd.py: error: not the known counts: VOC train 2 (expected 1464), VOC val 2 (expected 1449), "
        "SBD train 3 (expected 8498), SBD val 1 (expected 2857), train_aug 4 (expected 10582); "
        "--allow-other-counts continues with these\n"
    )
    assert not (tmp_path / "out").exists()


def test_known_counts_are_accepted(
    voc: Path, sbd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare_sbd, "KNOWN_COUNTS", find_sets(voc, sbd).counts())
    assert main([str(voc), str(sbd), "--output", str(voc)]) == 0
    assert "images: VOC train 2, VOC val 2, SBD train 3, SBD val 1, train_aug 4\n" in capsys.readouterr().out


def test_the_lists_of_the_full_sets_give_the_known_number(voc: Path, sbd: Path) -> None:
    """The number of training images follows from 12,031 images, of which SBD has 11,355 and VOC's lists 2,913."""
    names = [f"{index:05d}" for index in range(8498 + 2857 + 676)]
    extra, train, val = names[:9118], names[9118 : 9118 + 1464], names[9118 + 1464 :]
    in_sbd = [*extra, *train[300:], *val[376:]]
    write_list(voc / "ImageSets/Segmentation/train.txt", train)
    write_list(voc / "ImageSets/Segmentation/val.txt", val)
    write_list(sbd / "train.txt", in_sbd[:8498])
    write_list(sbd / "val.txt", in_sbd[8498:])
    assert find_sets(voc, sbd).counts() == KNOWN_COUNTS


def unknown_type(path: Path) -> None:
    """Give the pixels a reserved data type of MATLAB's format, on which SciPy 1.17 crashes."""
    save_sbd_mask(path, mask_of("s_train"), compress=False)
    content = path.read_bytes()
    tag = struct.pack("=II", 2, HEIGHT * WIDTH)
    assert content.count(tag) == 1
    path.write_bytes(content.replace(tag, struct.pack("=II", 10, HEIGHT * WIDTH)))


WRONG_MASKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "mask not found: looked for {path} (1 such masks)"),
    "empty": (lambda path: path.write_bytes(b""), "cannot read {path}"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-40]), "cannot read {path}"),
    "header alone": (lambda path: path.write_bytes(path.read_bytes()[:128]), "cannot read {path}"),
    "text": (lambda path: path.write_text("no MATLAB file\n" * 20), "cannot read {path}"),
    "HDF5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(600)), "cannot read {path}"),
    "damaged": (lambda path: path.write_bytes(path.read_bytes()[:150] + b"\xff" * 300), "cannot read {path}"),
    "crash": (unknown_type, "cannot read {path}"),
    "other content": (lambda path: savemat(path, {"a": 1}), "cannot read {path}"),
    "no struct": (lambda path: savemat(path, {"GTcls": np.eye(3)}), "cannot read {path}"),
    "no mask": (lambda path: savemat(path, {"GTcls": {"Boundaries": 1}}), "cannot read {path}"),
    "double": (lambda path: save_sbd_mask(path, np.zeros((HEIGHT, WIDTH))), "{path}: expected a matrix of uint8"),
    "3-D": (lambda path: save_sbd_mask(path, np.zeros((2, 2, 2), np.uint8)), "{path}: expected a matrix of uint8"),
    "no class": (lambda path: save_sbd_mask(path, mask_of("a") + 9), "{path}: unknown class index 2"),
    "turned": (lambda path: save_sbd_mask(path, mask_of("a").T), "{path} is 5x8, but its image {image} is 8x5"),
}


@pytest.mark.parametrize("kind", [kind for kind in WRONG_MASKS if kind not in ("missing", "crash")])
def test_a_wrong_mask_is_refused(kind: str, voc: Path, sbd: Path) -> None:
    path, image = sbd / "cls/s_train.mat", voc / "JPEGImages/s_train.jpg"
    np.testing.assert_array_equal(read_sbd_mask(path, image), mask_of("s_train"))
    make, message = WRONG_MASKS[kind]
    make(path)
    with pytest.raises(DataError) as error:
        read_sbd_mask(path, image)
    assert str(error.value).startswith(message.format(path=path, image=image))


@pytest.mark.parametrize("kind", ["missing", "cut short", "crash"])
def test_a_wrong_mask_ends_in_one_line(
    kind: str, voc: Path, sbd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sbd / "cls/s_train.mat"
    make, message = WRONG_MASKS[kind]
    make(path)
    assert prepare(voc, sbd, tmp_path / "out") == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert line.startswith(f"prepare_sbd.py: error: {message.format(path=path)}")
    assert not (tmp_path / "out/ImageSets/Segmentation/train_aug.txt").exists()


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("benchmark_RELEASE/dataset/val.txt", None, "cannot read {path}"),
        ("benchmark_RELEASE/dataset/val.txt", "a\nb\na\n", "{path} lists 'a' more than once"),
        ("VOC2012/ImageSets/Segmentation/val.txt", None, "split not found: looked for {path}"),
        ("VOC2012/SegmentationClass/v_val.png", None, "mask not found: looked for {path}"),
        ("VOC2012/JPEGImages/v_val.jpg", None, "image not found: looked for {path}"),
        ("VOC2012/JPEGImages/s_train.jpg", "no image", "cannot read image {path}"),
    ],
)
def test_incomplete_folders(
    path: str,
    content: str | None,
    message: str,
    voc: Path,
    sbd: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damaged = tmp_path / path
    if content is None:
        damaged.unlink()
    else:
        damaged.write_text(content)
    assert prepare(voc, sbd, tmp_path / "out") == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert line.startswith(f"prepare_sbd.py: error: {message.format(path=damaged)}")
    assert not (tmp_path / "out/ImageSets/Segmentation/train_aug.txt").exists()


def test_a_folder_that_is_not_sbd(voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(voc, voc, tmp_path / "out") == 2
    assert capsys.readouterr().err.startswith(f"prepare_sbd.py: error: no folder cls in {voc}: is it the root of SBD")
