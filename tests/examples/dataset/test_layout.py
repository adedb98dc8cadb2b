"""Reading VOC: splits, labels in the order of their sources, and one clear line for everything that is missing."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from voc.dataset.errors import DataError
from voc.dataset.images import read_mask, save_mask, voc_palette
from voc.dataset.layout import VOC_CLASSES, read_classes, read_split
from voc.dataset.splits import VOCDataset, load_split, load_split_with_masks
from voc.dataset.transforms import TrainTransform
from voc.inference.sources import split_sources


def annotation(*names: str) -> str:
    return f"<annotation>{''.join(f'<object><name>{name}</name></object>' for name in names)}</annotation>"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three images: `a` with cat and dog, `b` with a person, `c` with nothing; masks for all, annotations for none."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    for name, indices in {"a": (8, 12), "b": (15,), "c": ()}.items():
        Image.new("RGB", (6, 4), (10, 200, 30)).save(tmp_path / "JPEGImages" / f"{name}.jpg")
        mask = np.zeros((4, 6), np.uint8)
        mask[0, 0] = 255
        for column, index in enumerate(indices):
            mask[2, column] = index
        save_mask(tmp_path / "SegmentationClass" / f"{name}.png", mask)
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("a\nb\n\n")
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("c\n")
    return tmp_path


def class_names(root: Path, labels_file: Path | None = None) -> list[set[str]]:
    split = load_split(root, read_split(root, "train"), VOC_CLASSES, labels_file)
    return [{VOC_CLASSES[index] for index in labels} for labels in split.labels]


def test_sample(root: Path) -> None:
    sample = VOCDataset(load_split_with_masks(root, ["a"], VOC_CLASSES))[0]
    assert sample.name == "a"
    assert sample.image.shape == (3, 4, 6)
    assert torch.allclose(sample.image[:, 0, 0], torch.tensor([10, 200, 30]) / 255, atol=0.03)
    assert sample.labels.nonzero().flatten().tolist() == [7, 11]
    assert sample.mask[2].tolist() == [8, 12, 0, 0, 0, 0]
    assert sample.mask[0, 0] == 255


def test_a_sample_without_a_mask(root: Path) -> None:
    assert VOCDataset(load_split(root, ["b"], VOC_CLASSES))[0].mask.numel() == 0


def test_image_and_mask_are_augmented_alike() -> None:
    mask = torch.zeros(40, 60, dtype=torch.long)
    mask[10:30, 20:50] = 7
    mask[:, :15] = 255
    image = (mask == 7).float().expand(3, -1, -1)
    torch.manual_seed(0)
    flips = set()
    for _ in range(8):
        seen, cut = TrainTransform(33)(image, mask)
        assert seen.shape == (3, 33, 33)
        assert set(cut.unique().tolist()) == {0, 7, 255}
        inside = (cut == 7).float()
        # The jitter changes the tones, but does not move the bright area.
        correlation = torch.corrcoef(torch.stack([seen.mean(0).flatten(), inside.flatten()]))[0, 1]
        assert correlation > 0.9
        flips.add(bool((cut[:, 0] == 255).all()))
    assert flips == {True, False}


def test_images_are_antialiased() -> None:
    stripes = (torch.arange(330) % 2).float().expand(3, 330, -1)  # one pixel wide; the crops are a tenth as wide
    for _ in range(4):
        seen, _ = TrainTransform(33)(stripes, torch.zeros(0))
        assert seen.std() < 0.05


def test_labels_from_masks(root: Path) -> None:
    assert class_names(root) == [{"cat", "dog"}, {"person"}]


def test_annotations_come_before_masks(root: Path) -> None:
    (root / "Annotations").mkdir()
    (root / "Annotations/a.xml").write_text(annotation("sheep", "sheep", "cow"))
    (root / "Annotations/b.xml").write_text(annotation("horse"))
    assert class_names(root) == [{"sheep", "cow"}, {"horse"}]


def test_a_labels_file_comes_before_annotations(root: Path) -> None:
    (root / "Annotations").mkdir()
    labels = root / "labels.txt"
    labels.write_text("b train\nz bus\na bird boat\n")
    assert class_names(root, labels) == [{"bird", "boat"}, {"train"}]


def test_the_augmented_split_comes_first(root: Path) -> None:
    assert read_split(root, "train_aug", "train") == ("a", "b")
    (root / "ImageSets/Segmentation/train_aug.txt").write_text("/JPEGImages/c.jpg /SegmentationClassAug/c.png\n")
    assert read_split(root, "train_aug", "train") == ("c",)


def test_masks_of_the_augmented_set(root: Path) -> None:
    (root / "SegmentationClass").rename(root / "SegmentationClassAug")
    assert load_split_with_masks(root, ["a"], VOC_CLASSES).masks == (root / "SegmentationClassAug/a.png",)


def test_own_classes(root: Path) -> None:
    assert read_classes(root) == VOC_CLASSES
    (root / "classes.txt").write_text("fork\nspoon\n")
    assert read_classes(root) == ("fork", "spoon")


def test_palette() -> None:
    palette = voc_palette()
    assert palette.shape == (256, 3)
    # colours of background, aeroplane, bicycle, cat, tvmonitor and void as VOC publishes them
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 8: (64, 0, 0), 20: (0, 64, 128), 255: (224, 224, 192)}
    for index, colour in known.items():
        assert tuple(palette[index]) == colour


def test_a_mask_survives_the_disk(tmp_path: Path) -> None:
    mask = np.arange(256, dtype=np.uint8).reshape(16, 16)
    save_mask(tmp_path / "m.png", mask)
    assert (read_mask(tmp_path / "m.png") == mask).all()
    with Image.open(tmp_path / "m.png") as image:
        assert image.convert("RGB").getpixel((1, 0)) == (128, 0, 0)


def check_everything(root: Path, labels_file: Path | None = None) -> None:
    classes = read_classes(root)
    load_split(root, read_split(root, "train_aug", "train"), classes, labels_file)
    load_split_with_masks(root, read_split(root, "val"), classes)


def test_the_fixture_has_no_error(root: Path) -> None:
    check_everything(root)


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("", "data folder not found: {root}"),
        ("JPEGImages", "no folder JPEGImages in {root}"),
        ("JPEGImages/a.jpg", "image not found: looked for {root}/JPEGImages/a.jpg"),
        ("JPEGImages/c.jpg", "image not found: looked for {root}/JPEGImages/c.jpg"),
        ("ImageSets/Segmentation/train.txt", "looked for {root}/ImageSets/Segmentation/train_aug.txt and {root}"),
        ("ImageSets/Segmentation/val.txt", "split not found: looked for {root}/ImageSets/Segmentation/val.txt"),
        ("SegmentationClass", "looked for a folder {root}/SegmentationClass or {root}/SegmentationClassAug"),
        ("SegmentationClass/c.png", "mask not found: looked for {root}/SegmentationClass/c.png"),
    ],
)
def test_missing(root: Path, removed: str, message: str) -> None:
    path = root / removed
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(DataError) as error:
        check_everything(root)
    assert message.format(root=root) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("ImageSets/Segmentation/train.txt", b"a\nb\na\n", "lists 'a' more than once"),
        ("ImageSets/Segmentation/train.txt", b"\n \n", "train.txt is empty"),
        ("ImageSets/Segmentation/val.txt", b"\xff\xfe\x00", "cannot read"),
        ("JPEGImages/b.jpg", b"this is no picture", "cannot read image"),
        ("SegmentationClass/b.png", b"this is no picture", "cannot read mask"),
        ("classes.txt", b"cat\ncat\n", "must be unique"),
        ("classes.txt", b"background\ncat\n", "must not be listed"),
        ("classes.txt", b"cat\ndog\n", "unknown class index 8"),
        ("Annotations/a.xml", b"<annotation>", "cannot read annotation"),
        ("Annotations/a.xml", annotation("unicorn").encode(), "unknown class 'unicorn'"),
        ("Annotations/a.xml", b"<?xml version='1.0' encoding='foo'?><annotation/>", "cannot read annotation .*a.xml"),
        ("Annotations/a.xml", b"<?xml version='1.0' encoding='shift_jis'?><a/>", "cannot read annotation .*a.xml"),
        ("JPEGImages/b.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify image file"),
        ("Annotations/b.xml", annotation("cat").encode(), "annotation not found: looked for"),
    ],
)
def test_broken(root: Path, file: str, content: bytes, message: str) -> None:
    path = root / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        check_everything(root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "labels file not found"),
        ("a cat\nb unicorn\n", "entry 2: unknown class 'unicorn'"),
        ("a cat\n", r"no line for image 'b' \(1 such images\)"),
        ("a cat\nb cat\na cat\n", "has two lines for image 'a': expected one line with all of its classes"),
    ],
)
def test_broken_labels_file(root: Path, content: str | None, message: str) -> None:
    labels = root / "labels.txt"
    if content is not None:
        labels.write_text(content)
    with pytest.raises(DataError, match=message):
        check_everything(root, labels)


def test_mask_of_another_size(root: Path) -> None:
    save_mask(root / "SegmentationClass/c.png", np.zeros((4, 7), np.uint8))
    with pytest.raises(DataError, match="is 7x4, but its image"):
        check_everything(root)


def test_mask_of_a_turned_image_that_is_drawn_upright(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(root / "JPEGImages/c.jpg", exif=exif)
    save_mask(root / "SegmentationClass/c.png", np.zeros((6, 4), np.uint8))
    with pytest.raises(DataError, match=r"c.jpg is 6x4 as stored, before its EXIF orientation"):
        check_everything(root)


def test_suffixes_in_capitals(root: Path) -> None:
    (root / "JPEGImages/a.jpg").rename(root / "JPEGImages/a.JPG")
    images = load_split(root, ["a", "b"], VOC_CLASSES).images
    sources = split_sources(root, "train")
    for found in (images[0], sources[0].path):  # a file system that ignores case finds it as a.jpg
        assert found.samefile(root / "JPEGImages/a.JPG")
    assert images[1] == sources[1].path == root / "JPEGImages/b.jpg"


def test_neither_labels_nor_masks(root: Path) -> None:
    (root / "SegmentationClass/b.png").unlink()
    with pytest.raises(DataError, match=r"no image-level labels: mask not found: .*b.png \(or give --labels FILE\)"):
        load_split(root, ["a", "b"], VOC_CLASSES)


def test_mask_in_colour(root: Path) -> None:
    Image.new("RGB", (6, 4)).save(root / "SegmentationClass/c.png")
    with pytest.raises(DataError, match="has mode RGB"):
        check_everything(root)


# The turn from the upright image to the stored one, by EXIF orientation.
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", STORED)
def test_images_are_turned_upright_with_their_masks(orientation: int, root: Path) -> None:
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    mask = np.arange(4 * 6, dtype=np.uint8).reshape(4, 6) % 20
    exif = Image.Exif()
    exif[0x0112] = orientation
    (root / "JPEGImages/a.jpg").unlink()
    Image.fromarray(pixels).transpose(STORED[orientation]).save(root / "JPEGImages/a.png", exif=exif)
    save_mask(root / "SegmentationClass/a.png", np.array(Image.fromarray(mask).transpose(STORED[orientation])))
    sample = VOCDataset(load_split_with_masks(root, ["a"], VOC_CLASSES))[0]
    np.testing.assert_array_equal((sample.image * 255).permute(1, 2, 0).numpy(), pixels)
    np.testing.assert_array_equal(sample.mask.numpy(), mask)
