"""A folder of masks against a small ground truth: the tables by hand, and what is said when a file is wrong."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from evaluate_voc import main
from numpy.typing import ArrayLike
from PIL import Image
from voc.dataset.images import save_mask
from voc.dataset.layout import VOC_CLASSES
from voc.evaluation.tables import load_iou_csv
from voc.files.soft import SoftFile, save_soft

TARGETS = {"a": [[0, 0, 1], [1, 255, 1]], "b": [[2, 2, 0]], "c": [[0]]}
PREDICTIONS = {"a": [[0, 1, 1], [1, 2, 2]], "b": [[2, 0, 1]], "c": [[0]]}
Evaluate = Callable[..., int]


def save_masks(folder: Path, masks: dict[str, list[list[int]]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, mask in masks.items():
        save_mask(folder / f"{name}.png", np.array(mask, dtype=np.uint8))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data set of the classes cat and dog, and predictions beside it."""
    root = tmp_path / "VOC"
    (root / "JPEGImages").mkdir(parents=True)
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/val.txt").write_text("a\nb\nc\n")
    (root / "classes.txt").write_text("cat\ndog\n")
    save_masks(root / "SegmentationClass", TARGETS)
    save_masks(tmp_path / "masks", {**PREDICTIONS, "of no image in the split": [[77]]})
    return root


@pytest.fixture
def evaluate(root: Path, tmp_path: Path) -> Evaluate:
    """Runs the command on the data set."""
    paths = [str(tmp_path / "masks"), str(root), "--output", str(tmp_path / "out")]
    return lambda *arguments: main([*paths, *map(str, arguments)])


def class_rows(folder: Path) -> list[list[float]]:
    """Return the lists of IoU, precision and recall in the written file."""
    return [values.tolist() for values in load_iou_csv(folder / "classes.csv")[1].values()]


# Pixels that count, as (true, predicted): a: 00 01 11 11 12, b: 22 20 01, c: 00
BY_HAND = """| Method | background | cat | dog | mean |
|:--|--:|--:|--:|--:|
| masks | 40.0 | 40.0 | 33.3 | 37.8 |

IoU, precision and recall (%)

| class | IoU | precision | recall |
|:--|--:|--:|--:|
| background | 40.0 | 66.7 | 50.0 |
| cat | 40.0 | 50.0 | 66.7 |
| dog | 33.3 | 50.0 | 50.0 |
| **mean of 3** | **37.8** | **55.6** | **55.6** |
"""


def test_tables_by_hand(evaluate: Evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate() == 0
    text = (tmp_path / "out/evaluation.md").read_text()
    assert text == f"IoU (%), 3 images of val\n\n{BY_HAND}"
    assert text in capsys.readouterr().out
    assert (tmp_path / "out/methods.csv").read_text().splitlines() == [
        "Method,background,cat,dog,mean",
        "masks,40.0000,40.0000,33.3333,37.7778",
    ]
    assert class_rows(tmp_path / "out")[2] == pytest.approx([50, 200 / 3, 50], abs=1e-4)


def test_grey_masks_are_read_like_those_with_a_palette(evaluate: Evaluate, tmp_path: Path) -> None:
    for name, mask in PREDICTIONS.items():
        Image.fromarray(np.array(mask, dtype=np.uint8)).save(tmp_path / f"masks/{name}.png")
    assert evaluate("--workers", 1) == 0
    assert BY_HAND in (tmp_path / "out/evaluation.md").read_text()


def save_soft_masks(folder: Path) -> None:
    """Write soft masks whose highest class is that of `PREDICTIONS`, and the second best cat, else dog."""
    for name, mask in PREDICTIONS.items():
        indices = np.array(mask)
        masks = np.stack([np.full(indices.shape, value) for value in (0.1, 0.3, 0.2)])
        for index in range(3):
            masks[index][indices == index] = 0.9
        save_soft(folder / f"{name}.npz", SoftFile(masks.astype(np.float32), np.array([True, True])))


def annotate(root: Path, labels: dict[str, list[str]]) -> None:
    (root / "Annotations").mkdir()
    for name, present in labels.items():
        objects = "".join(f"<object><name>{label}</name></object>" for label in present)
        (root / f"Annotations/{name}.xml").write_text(f"<annotation>{objects}</annotation>")


def test_clean_takes_labels_from_the_ground_truth(evaluate: Evaluate, tmp_path: Path) -> None:
    save_soft_masks(tmp_path / "masks")
    assert evaluate("--clean") == 0
    # a has no dog: 00 01 11 11 11; b has no cat: 22 20 02; c: 00
    assert class_rows(tmp_path / "out")[0] == pytest.approx([100 * 2 / 5, 75, 100 / 3], abs=1e-4)
    assert "classes removed that are not among an image's labels" in (tmp_path / "out/evaluation.md").read_text()


def test_clean_takes_labels_from_annotations_or_a_file(evaluate: Evaluate, root: Path, tmp_path: Path) -> None:
    save_soft_masks(tmp_path / "masks")
    annotate(root, {"a": ["cat"], "b": ["cat", "dog"], "c": []})
    assert evaluate("--clean") == 0
    # a: 00 01 11 11 11, b: 22 20 01, c: 00
    assert class_rows(tmp_path / "out")[0] == pytest.approx([40, 60, 50], abs=1e-4)
    (root / "labels.txt").write_text("a dog\nb\nc cat\n")
    assert evaluate("--clean", "--labels", root / "labels.txt") == 0
    # a: 00 02 12 12 12, b: 20 20 00, c: 00. No cat is predicted: it has no precision, and an IoU of 0.
    iou, precision, recall = class_rows(tmp_path / "out")
    assert iou == pytest.approx([50, 0, 0], abs=1e-4)
    assert precision == pytest.approx([60, float("nan"), 0], abs=1e-4, nan_ok=True)
    assert recall == pytest.approx([75, 0, 0], abs=1e-4)


def test_average_precision_of_scores(
    evaluate: Evaluate, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = tmp_path / "scores.csv"
    scores.write_text("image,cat,dog\nc,0.7,0.2\na,0.6,0.9\nb,0.1,0.3\nother,0,0\n")
    assert evaluate("--scores", scores) == 0
    # Masks: a has a cat, b a dog, c nothing. Cat is found at rank 2, dog at rank 2.
    assert "| cat | 50.0 |\n| dog | 50.0 |\n| **mean of 2** | **50.0** |" in capsys.readouterr().out
    (root / "labels.txt").write_text("a dog\nb dog\nc cat\n")
    assert evaluate("--scores", scores, "--labels", root / "labels.txt") == 0
    assert (tmp_path / "out/average_precision.csv").read_text().splitlines() == [
        "class,AP",
        "cat,100.0000",
        "dog,100.0000",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read scores {path}"),
        ("", "cannot read scores {path}"),
        ("image,cat,dog\na,x,1\n", "cannot read scores {path}: could not convert"),
        ("image,cat\na,1\n", "{path}: expected the columns image, cat, dog"),
        ("image,cat,dog\na,1\n", "{path}: expected the columns image, cat, dog"),
        ("image,cat,dog\na,1,0\n", "{path}: no line for image 'b' (2 such images)"),
        ("image,cat,dog\na,1,nan\nb,1,0\nc,1,0\n", "{path} holds probabilities that are not finite"),
        (f"image,cat,dog\n{'a' * 200_000},1,0\n", "cannot read scores {path}: field larger than"),
    ],
)
def test_wrong_scores(
    content: str | None, message: str, evaluate: Evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "scores.csv"
    if content is not None:
        path.write_text(content)
    assert evaluate("--scores", path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"evaluate_voc.py: error: {message.format(path=path)}")


def test_soft_masks_stand_in_for_masks(evaluate: Evaluate, tmp_path: Path) -> None:
    save_soft_masks(tmp_path / "masks")
    for name in PREDICTIONS:
        (tmp_path / f"masks/{name}.png").unlink()
    assert evaluate() == 0
    assert BY_HAND in (tmp_path / "out/evaluation.md").read_text()


WRONG_SOFT_MASKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "soft masks not found: looked for {path} (infer_voc.py --soft writes them)"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-30]), "cannot read soft masks {path}"),
    "text": (lambda path: path.write_text("no archive"), "cannot read soft masks {path}"),
    "other arrays": (lambda path: np.savez(path, masks=np.ones(3)), "cannot read soft masks {path}"),
    "one dimension": (
        lambda path: np.savez(path, masks=np.ones(3, np.float32), kept=np.ones(2, np.bool_)),
        "{path} is not a file of soft masks",
    ),
    "other classes": (
        lambda path: save_soft(path, SoftFile(np.ones((2, 1, 3), np.float32), np.ones(1, np.bool_))),
        "{path} has 1 classes, expected 2",
    ),
    "not finite": (
        lambda path: save_soft(path, SoftFile(np.full((3, 1, 3), np.nan, np.float32), np.ones(2, np.bool_))),
        "{path} holds masks that are not finite",
    ),
}


@pytest.mark.parametrize("kind", WRONG_SOFT_MASKS)
def test_wrong_soft_masks_end_in_one_line(
    kind: str, evaluate: Evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_soft_masks(tmp_path / "masks")
    path = tmp_path / "masks/b.npz"
    make, message = WRONG_SOFT_MASKS[kind]
    make(path)
    assert evaluate("--clean") == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert line.startswith(f"evaluate_voc.py: error: {message.format(path=path)}")


def test_other_ground_truth_split_name_and_classes(
    evaluate: Evaluate, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "ImageSets/Segmentation/one.txt").write_text("b\n")
    save_masks(tmp_path / "truth", {"b": [[2, 0, 2]]})
    options = ["--masks", tmp_path / "truth", "--split", "one", "--name", "ours", "--table-classes", "dog", "cat"]
    assert evaluate(*options) == 0
    table = "| Method | dog | cat | mean |\n|:--|--:|--:|--:|\n| ours | 50.0 | 0.0 | 25.0 |"
    assert f"IoU (%), 1 images of one\n\n{table}\n" in capsys.readouterr().out


def test_a_class_without_a_pixel_does_not_count(evaluate: Evaluate, root: Path, tmp_path: Path) -> None:
    (root / "classes.txt").write_text("cat\ndog\nunicorn\n")
    assert evaluate() == 0
    assert "| masks | 40.0 | 40.0 | 33.3 | nan | 37.8 |" in (tmp_path / "out/evaluation.md").read_text()


def test_voc_has_the_columns_of_the_paper(evaluate: Evaluate, root: Path, tmp_path: Path) -> None:
    (root / "classes.txt").unlink()
    assert evaluate() == 0
    header = (tmp_path / "out/methods.csv").read_text().splitlines()[0]
    assert header.startswith("Method,bg,aero,bike,")
    assert header.endswith(",train,tv,mean")
    assert load_iou_csv(tmp_path / "out/classes.csv")[0] == ("background", *VOC_CLASSES)


def write_png(path: Path, pixels: ArrayLike, dtype: type = np.uint8) -> None:
    Image.fromarray(np.array(pixels, dtype=dtype)).save(path)


def cut_short(path: Path) -> None:
    write_png(path, np.random.default_rng(0).integers(0, 3, (64, 64)))
    path.write_bytes(path.read_bytes()[:-300])


def broken_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8:12] = (5).to_bytes(4, "big")  # the length of the first chunk
    path.write_bytes(content)


WRONG_PREDICTIONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "mask not found: looked for {path}"),
    "size": (lambda path: write_png(path, [[0, 0]]), "prediction {path} is 2x1, but its ground truth {target} is 3x1"),
    "void": (lambda path: write_png(path, [[0, 255, 0]]), "mask {path} holds 255: expected a class, 0 to 2, at every"),
    "no class": (lambda path: write_png(path, [[0, 3, 0]]), "mask {path} holds 3: expected a class, 0 to 2, at every"),
    "colour": (lambda path: write_png(path, np.zeros((1, 3, 3))), "mask {path} has mode RGB"),
    "16 bit": (lambda path: write_png(path, [[0, 1, 2]], np.uint16), "mask {path} has mode I;16"),
    "text": (lambda path: path.write_text("no image"), "cannot read mask {path}"),
    "empty": (lambda path: path.write_bytes(b""), "cannot read mask {path}"),
    "cut short": (cut_short, "cannot read mask {path}"),
    "header": (broken_header, "cannot read mask {path}"),
}


@pytest.mark.parametrize("kind", WRONG_PREDICTIONS)
def test_a_wrong_prediction_ends_in_one_line(
    kind: str, evaluate: Evaluate, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "masks/b.png"
    make, message = WRONG_PREDICTIONS[kind]
    make(path)
    assert evaluate() == 2
    printed = capsys.readouterr()
    assert "|" not in printed.out
    (line,) = (line for line in printed.err.splitlines() if "error" in line)
    expected = message.format(path=path, target=root / "SegmentationClass/b.png")
    assert line.startswith(f"evaluate_voc.py: error: {expected}")
    assert not list((tmp_path / "out").iterdir())


def test_all_wrong_files_are_named(
    evaluate: Evaluate, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "masks/a.png").unlink()
    write_png(root / "SegmentationClass/b.png", [[0, 7, 255]])
    assert evaluate() == 2
    error = capsys.readouterr().err
    assert f"error: mask not found: looked for {tmp_path / 'masks/a.png'}\n" in error
    assert f"error: mask {root / 'SegmentationClass/b.png'} holds 7: expected 0 to 2, or 255 (void)\n" in error

    names = [f"image{index}" for index in range(13)]
    (root / "ImageSets/Segmentation/val.txt").write_text("\n".join(names))
    save_masks(root / "SegmentationClass", {name: [[0]] for name in names})
    assert evaluate() == 2
    error = capsys.readouterr().err
    assert error.count("mask not found") == 10
    assert "evaluate_voc.py: error: ... and 3 more such files\n" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split", "test"], "split not found"),
        (["--masks", "nowhere"], "no masks: looked for a folder nowhere"),
        (["--labels", "labels.txt"], "--labels is for --clean and --scores, which are not given"),
        (["--clean", "--labels", "nowhere.txt"], "labels file not found: nowhere.txt"),
        (["--table-classes", "cow"], "--table-classes: unknown class 'cow'; known: background, cat, dog"),
        (["--workers", "0"], "--workers must be at least 1, got 0"),
    ],
)
def test_wrong_arguments(
    options: list[str], message: str, evaluate: Evaluate, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(*options) == 2
    assert capsys.readouterr().err.startswith(f"evaluate_voc.py: error: {message}")


def test_missing_folders(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere"), str(root)]) == 2
    assert f"error: folder of predictions not found: {tmp_path / 'nowhere'}\n" in capsys.readouterr().err
    assert main([str(tmp_path / "masks"), str(tmp_path / "nowhere")]) == 2
    assert f"error: data folder not found: {tmp_path / 'nowhere'}\n" in capsys.readouterr().err
