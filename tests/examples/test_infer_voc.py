"""Masks of images from the command line: what is written, what is skipped, and what the exit code says."""

import csv
import shutil
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import evaluate_voc
import numpy as np
import pytest
import torch
import voc.inference.outputs
import voc.inference.pipeline
import voc.inference.refine
import voc.inference.segmenter
from infer_voc import Arguments, main
from numpy.typing import NDArray
from PIL import Image
from voc.checkpoints import load_trained, save_checkpoint
from voc.crf import crf_marginals
from voc.dataset.images import read_image, read_mask, voc_palette
from voc.dataset.layout import read_split
from voc.dataset.splits import load_split_with_masks
from voc.dataset.toy import OBJECTS
from voc.inference.masks import multi_scale_masks, segment
from voc.inference.pictures import read_picture
from voc.inference.refine import Refinement, refine_masks
from voc.model import build_model
from voc.presets import PRESETS
from voc.settings import Settings

SETTINGS = replace(PRESETS["toy"], channels=8, scales=(1.0,), background_power=2.0, min_probability=0.2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that saves a network with ImageNet weights in its backbone and random weights elsewhere."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def path_of(name: str) -> Path:
        path = folder / f"{name}.pt"
        if not path.exists():
            torch.manual_seed(1)
            settings = replace(SETTINGS, model="cam" if name == "cam" else "single_stage")
            save_checkpoint(path, build_model(settings, len(OBJECTS)), settings, list(OBJECTS), {})
        return path

    return path_of


@pytest.fixture
def trained(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("single_stage")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three images: b.jpg (48 x 32), a.png (33 x 40), c.JPG (20 x 20)."""
    folder = tmp_path / "images"
    folder.mkdir()
    random = np.random.default_rng(3)
    for name, size in {"b.jpg": (48, 32), "a.png": (33, 40), "c.JPG": (20, 20)}.items():
        coarse = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize(size).save(folder / name)
    return folder


def infer(checkpoint: Path, source: Path, output: Path, *arguments: str) -> int:
    """Run infer_voc.py, without a refinement if the arguments do not ask for one."""
    refine = [] if "--refine" in arguments else ["--refine", "none"]
    return main([str(checkpoint), str(source), "--output", str(output), "--device", "cpu", *refine, *arguments])


def expected_mask(
    checkpoint: Path,
    image: torch.Tensor,
    settings: Settings = SETTINGS,
    flip: bool = True,
    labels: Collection[str] | None = None,
) -> NDArray[np.int64]:
    """The mask by `segment`, called directly."""
    model, classes, _ = load_trained(checkpoint)
    masks, probabilities = multi_scale_masks(model, image, settings.scales, flip)
    masks[0] = masks[0] ** settings.background_power
    if labels is not None:
        present = torch.tensor([float(name in labels) for name in classes])
        return segment(masks, present, 0.5).numpy()
    return segment(masks, probabilities, settings.min_probability).numpy()


def written(output: Path) -> set[str]:
    """The files of a folder; empty folders do not count."""
    return {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}


def skipped_lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of stderr without those of the progress bar."""
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    return [line.strip() for line in lines if line.strip() and "segmenting:" not in line]


def test_masks_are_those_of_segment(trained: Path, images: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert infer(trained, images, output) == 0
    assert written(output) == {"masks/a.png", "masks/b.png", "masks/c.png"}
    classes = set()
    for path in images.iterdir():
        image = read_image(path)
        mask = read_mask(output / f"masks/{path.stem}.png")
        np.testing.assert_array_equal(mask, expected_mask(trained, image))
        classes |= set(np.unique(mask).tolist())
    assert len(classes) > 2
    with Image.open(output / "masks/a.png") as saved:
        assert saved.mode == "P"
        assert saved.size == (33, 40)
        assert saved.getpalette() == voc_palette().flatten().tolist()


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        (["--scales", "0.5", "1.5", "--no-flip"], replace(SETTINGS, scales=(0.5, 1.5))),
        (["--min-probability", "1", "--no-flip"], replace(SETTINGS, min_probability=1.0)),
        (["--background-power", "0", "--no-flip"], replace(SETTINGS, background_power=0.0)),
    ],
)
def test_arguments_override_the_checkpoint(
    arguments: list[str], settings: Settings, trained: Path, images: Path, tmp_path: Path
) -> None:
    image = read_image(images / "b.jpg")
    assert infer(trained, images / "b.jpg", tmp_path, *arguments) == 0
    mask = read_mask(tmp_path / "masks/b.png")
    np.testing.assert_array_equal(mask, expected_mask(trained, image, settings, flip=False))
    assert (mask != expected_mask(trained, image)).any()


@pytest.mark.parametrize(("arguments", "background"), [([], 0.1), (["--cam-background", "0.4"], 0.4)])
def test_cam_gap(
    arguments: list[str], background: float, checkpoint: Callable[[str], Path], images: Path, tmp_path: Path
) -> None:
    path = checkpoint("cam")
    assert infer(path, images / "b.jpg", tmp_path, *arguments) == 0
    masks, probabilities = multi_scale_masks(load_trained(path).model, read_image(images / "b.jpg"), SETTINGS.scales)
    masks[0] = background
    mask = read_mask(tmp_path / "masks/b.png")
    np.testing.assert_array_equal(mask, segment(masks, probabilities, SETTINGS.min_probability).numpy())
    assert len(np.unique(mask)) > 1


def test_other_images_are_still_segmented(
    trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (images / "b.jpg").read_bytes()
    (images / "truncated.jpg").write_bytes(content[: len(content) // 2])
    (images / "empty.jpg").touch()
    (images / "text.jpg").write_text("this is no picture\n")
    (images / "folder.jpg").mkdir()
    (images / "two\nlines.png").touch()
    good = {
        "tiny.png": ("RGB", (1, 1)),
        "grey.png": ("L", (9, 7)),
        "rgba.png": ("RGBA", (7, 9)),
        "bw.bmp": ("1", (8, 3)),
    }
    for name, (mode, size) in good.items():
        Image.new(mode, size, 1).save(images / name)
    output = tmp_path / "out"
    assert infer(trained, images, output, "--overlays", "--scores") == 1
    names = ("a", "b", "bw", "c", "grey", "rgba", "tiny")
    masks, overlays = {f"masks/{name}.png" for name in names}, {f"overlays/{name}.jpg" for name in names}
    assert written(output) == masks | overlays | {"scores.csv"}
    for name, (_, size) in good.items():
        assert read_mask(output / f"masks/{Path(name).stem}.png").shape == size[::-1]
    lines = skipped_lines(capsys)
    assert [line.split(": ")[1] for line in lines] == [
        f"skipped {images}/{name}" for name in ("empty.jpg", "folder.jpg", "text.jpg", "truncated.jpg", "two lines.png")
    ]
    assert all(line.startswith("infer_voc.py: ") for line in lines)


@pytest.mark.parametrize("method", ["crf", "par", "pamr"])
def test_masks_are_refined(method: Refinement, trained: Path, images: Path, tmp_path: Path) -> None:
    """The CRF is the default. The raw masks are written too, and the picture shows both."""
    output = tmp_path / "out"
    arguments = [str(trained), str(images), "--output", str(output), "--device", "cpu", "--overlays"]
    assert main([*arguments, *(["--refine", method] if method != "crf" else [])]) == 0
    names = ("a", "b", "c")
    expected = {f"{folder}/{name}.png" for folder in ("masks", method) for name in names}
    assert written(output) == expected | {f"overlays/{name}.jpg" for name in names}
    model, _, _ = load_trained(trained)
    changed = 0
    for path in images.iterdir():
        image = read_image(path)
        masks, probabilities = multi_scale_masks(model, image, SETTINGS.scales)
        masks[0] = masks[0] ** SETTINGS.background_power
        masks[1:][probabilities < SETTINGS.min_probability] = 0
        refined = refine_masks(image, masks, probabilities >= SETTINGS.min_probability, method).argmax(dim=0).numpy()
        np.testing.assert_array_equal(read_mask(output / f"{method}/{path.stem}.png"), refined)
        raw = read_mask(output / f"masks/{path.stem}.png")
        np.testing.assert_array_equal(raw, masks.argmax(dim=0).numpy())
        changed += (raw != refined).sum()
    assert changed > 0
    assert read_image(output / "overlays/b.jpg").shape == (3, 64, 48)  # one below the other
    assert read_image(output / "overlays/a.jpg").shape == (3, 40, 66)  # one beside the other


def test_an_overlay_longer_than_a_jpeg_can_be(trained: Path, images: Path, tmp_path: Path) -> None:
    Image.new("RGB", (70_000, 2), (90, 20, 200)).save(images / "wide.png")
    assert infer(trained, images / "wide.png", tmp_path, "--overlays", "--scales", "0.1", "--no-flip") == 0
    assert read_mask(tmp_path / "masks/wide.png").shape == (2, 70_000)
    assert read_image(tmp_path / "overlays/wide.jpg").shape[-1] == 65_500


def test_too_little_memory_for_the_refinement(
    trained: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(image: torch.Tensor, *arguments: object) -> torch.Tensor:
        if image.shape[-1] == 48:
            raise MemoryError
        return refine_masks(image, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(voc.inference.refine, "refine_masks", too_large)
    assert infer(trained, images, tmp_path, "--refine", "par") == 1
    (line,) = skipped_lines(capsys)
    assert line.startswith(f"infer_voc.py: skipped {images}/b.jpg: not enough memory: try a lower --max-pixels")
    assert {path.name for path in (tmp_path / "masks").iterdir()} == {"a.png", "c.png"}


def test_images_of_one_row_or_column(trained: Path, images: Path, tmp_path: Path) -> None:
    Image.new("RGB", (500, 1), (90, 20, 200)).save(images / "wide.png")
    Image.new("RGB", (1, 500), (90, 20, 200)).save(images / "high.png")
    assert infer(trained, images, tmp_path / "out", "--max-pixels", "300", "--scales", "0.5", "1") == 0
    assert read_mask(tmp_path / "out/masks/wide.png").shape == (1, 500)
    assert read_mask(tmp_path / "out/masks/high.png").shape == (500, 1)
    assert read_mask(tmp_path / "out/masks/b.png").shape == (32, 48)


def test_overlays_and_scores(trained: Path, images: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the stored image is turned by 90 degrees
    with Image.open(images / "b.jpg") as image:
        image.save(images / "b.jpg", exif=exif)
    assert infer(trained, images, tmp_path, "--overlays", "--scores") == 0
    assert read_mask(tmp_path / "masks/b.png").shape == (32, 48)
    assert read_image(tmp_path / "overlays/b.jpg").shape == (3, 48, 32)
    assert read_image(tmp_path / "overlays/a.jpg").std() > 0.05
    with (tmp_path / "scores.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["image", *OBJECTS]
    assert [row[0] for row in rows] == ["a", "b", "c"]
    for row, name in zip(rows, ("a.png", "b.jpg", "c.JPG"), strict=True):
        picture = read_picture(images / name, 10**6)
        _, probabilities = multi_scale_masks(load_trained(trained).model, picture.tensor(), SETTINGS.scales)
        np.testing.assert_allclose(np.array(row[1:], float), probabilities.numpy(), atol=1e-6)


def test_clean_masks_of_a_split_can_be_trained_on(trained: Path, toy_root: Path, tmp_path: Path) -> None:
    assert infer(trained, toy_root, tmp_path, "--split", "train", "--clean") == 0
    names = read_split(toy_root, "train")
    assert written(tmp_path) == {f"masks/{name}.png" for name in names}
    truth = load_split_with_masks(toy_root, names, list(OBJECTS))
    found = load_split_with_masks(toy_root, names, list(OBJECTS), tmp_path / "masks")
    assert all(ours <= theirs for ours, theirs in zip(found.labels, truth.labels, strict=True))
    assert any(found.labels)
    present = [tuple(OBJECTS)[index] for index in truth.labels[0]]
    expected = expected_mask(trained, read_image(truth.images[0]), labels=present)
    np.testing.assert_array_equal(read_mask(tmp_path / f"masks/{names[0]}.png"), expected)


def test_clean_with_a_labels_file(trained: Path, images: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("a tiger\nb\nc shell leaf\n")
    assert infer(trained, images, tmp_path / "out", "--clean", "--labels", str(labels)) == 0
    for path, present in {"a.png": ["tiger"], "b.jpg": [], "c.JPG": ["shell", "leaf"]}.items():
        expected = expected_mask(trained, read_image(images / path), labels=present)
        np.testing.assert_array_equal(read_mask(tmp_path / f"out/masks/{path[0]}.png"), expected)


def test_soft_masks_are_evaluated_clean(trained: Path, toy_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(toy_root, root)
    name, *_ = read_split(root, "val")
    exif = Image.Exif()
    exif[0x0112] = 6  # the stored image is turned by 90 degrees
    with Image.open(root / f"JPEGImages/{name}.jpg") as image:
        image.save(root / f"JPEGImages/{name}.jpg", exif=exif)
    maximum = ["--max-pixels", "4000"]
    assert infer(trained, root, tmp_path / "raw", "--split", "val", "--soft", *maximum) == 0
    assert infer(trained, root, tmp_path / "clean", "--split", "val", "--clean", *maximum) == 0
    tables = []
    for folder, options in (("raw/masks", []), ("raw/soft", []), ("clean/masks", []), ("raw/soft", ["--clean"])):
        output = tmp_path / "tables"
        arguments = [str(tmp_path / folder), str(root), "--name", "ours", "--output", str(output), *options]
        assert evaluate_voc.main(arguments) == 0
        tables.append((output / "classes.csv").read_text())
    assert tables[0] == tables[1] != tables[2] == tables[3]


def test_a_split_with_broken_images(
    trained: Path, toy_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    shutil.copytree(toy_root, root)
    first, second, *rest = read_split(root, "val")
    (root / f"JPEGImages/{first}.jpg").unlink()
    (root / f"JPEGImages/{second}.jpg").write_bytes(b"\xff\xd8\xff")
    assert infer(trained, root, tmp_path / "out", "--split", "val", "--clean") == 1
    assert written(tmp_path / "out") == {f"masks/{name}.png" for name in rest}
    missing, broken = skipped_lines(capsys)
    assert missing == f"infer_voc.py: skipped {root}/JPEGImages/{first}.jpg: not found"
    assert broken.startswith(f"infer_voc.py: skipped {root}/JPEGImages/{second}.jpg: ")


@pytest.mark.parametrize("other", ["b.png", "B.png"])
def test_names_do_not_clash(
    other: str, trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (5, 6)).save(images / other)
    assert infer(trained, images, tmp_path / "out") == 1
    first, second = sorted([images / "b.jpg", images / other])
    assert skipped_lines(capsys) == [f"infer_voc.py: skipped {second}: its mask would overwrite that of {first}"]
    with Image.open(first) as image:
        assert read_mask(tmp_path / f"out/masks/{first.stem}.png").shape == image.size[::-1]
    assert len(written(tmp_path / "out")) == 3


def test_no_image_segmented(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.jpg").write_text("this is no picture")
    assert infer(trained, tmp_path / "text.jpg", tmp_path / "out", "--scores") == 2
    assert skipped_lines(capsys)[0].startswith(f"infer_voc.py: skipped {tmp_path}/text.jpg: ")
    assert not written(tmp_path / "out")


def test_a_full_disk(
    trained: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    (output / "masks").mkdir(parents=True)
    (output / "masks/a.png").write_text("older")

    def disk_full(path: Path, *_: object) -> None:
        path.write_text("half a m")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(voc.inference.outputs, "save_mask", disk_full)
    assert infer(trained, images, output) == 2
    assert skipped_lines(capsys) == [f"infer_voc.py: error: cannot write {output}/masks/a.png: No space left on device"]
    assert (output / "masks/a.png").read_text() == "older"
    assert written(output) == {"masks/a.png"}


def test_ctrl_c_leaves_whole_masks(
    trained: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(path: Path, max_pixels: int) -> object:
        if path.name == "c.JPG":
            raise KeyboardInterrupt
        return read_picture(path, max_pixels)

    monkeypatch.setattr(voc.inference.pipeline, "read_picture", interrupted)
    assert infer(trained, images, tmp_path / "out", "--scores") == 130
    assert "infer_voc.py: stopped" in skipped_lines(capsys)
    assert written(tmp_path / "out") == {"masks/a.png", "masks/b.png"}
    assert read_mask(tmp_path / "out/masks/b.png").shape == (32, 48)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.cuda.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_too_little_memory(
    error: Exception,
    trained: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def too_large(model: object, image: torch.Tensor, *arguments: object) -> object:
        if image.shape[-1] == 48:
            raise error
        return multi_scale_masks(model, image, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(voc.inference.segmenter, "multi_scale_masks", too_large)
    assert infer(trained, images, tmp_path) == 1
    (line,) = skipped_lines(capsys)
    assert line.startswith(f"infer_voc.py: skipped {images}/b.jpg: not enough memory: try a lower --max-pixels")


def test_padding(trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--scales", "1", "0.5", "--pad-to", "40"]
    assert infer(trained, images, tmp_path, *arguments) == 1
    (line,) = skipped_lines(capsys)
    assert line.endswith("b.jpg: scaled to 48x32 pixels, it does not fit into --pad-to 40")
    model = load_trained(trained).model
    masks, probabilities = multi_scale_masks(model, read_image(images / "a.png"), (1.0, 0.5), pad_to=40)
    masks[0] = masks[0] ** SETTINGS.background_power
    expected = segment(masks, probabilities, SETTINGS.min_probability)
    np.testing.assert_array_equal(read_mask(tmp_path / "masks/a.png"), expected.numpy())


def test_a_network_that_is_not_finite(
    trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, classes, settings = load_trained(trained)
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    save_checkpoint(tmp_path / "nan.pt", model, settings, classes, {})
    assert infer(tmp_path / "nan.pt", images / "b.jpg", tmp_path / "out") == 2
    assert skipped_lines(capsys)[0].endswith("the network's masks are not finite")


def test_crf(trained: Path, images: Path, tmp_path: Path) -> None:
    Image.new("RGB", (1, 1)).save(images / "d.png")
    arguments = ["--refine", "crf", "--workers", "1", "--clean", "--labels", str(tmp_path / "labels.txt")]
    (tmp_path / "labels.txt").write_text("a flag shell\nb tiger\nc\nd leaf tiger\n")
    assert infer(trained, images, tmp_path / "out", "--scores", *arguments) == 0
    lines = (tmp_path / "out/scores.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["image", "a", "b", "c", "d"]
    model = load_trained(trained).model
    for name, kept in {"a.png": [0, 2, 4], "b.jpg": [0, 1], "c.JPG": [0], "d.png": [0, 1, 5]}.items():
        picture = read_picture(images / name, 10**6)
        masks, _ = multi_scale_masks(model, picture.tensor(), SETTINGS.scales)
        masks[0] = masks[0] ** SETTINGS.background_power
        classes = torch.zeros(6, dtype=torch.bool).index_fill(0, torch.tensor(kept), True)
        expected = crf_marginals(picture.tensor()[None], masks[None], classes[None])[0].argmax(dim=0).numpy()
        np.testing.assert_array_equal(read_mask(tmp_path / f"out/crf/{name[0]}.png"), expected)
        raw = torch.zeros_like(masks).index_copy(0, torch.tensor(kept), masks[kept]).argmax(dim=0)
        np.testing.assert_array_equal(read_mask(tmp_path / f"out/masks/{name[0]}.png"), raw)
    assert infer(trained, images / "a.png", tmp_path / "all", "--refine", "crf", "--overlays", "--soft") == 0
    folders = ("masks/a.png", "crf/a.png", "overlays/a.jpg", "soft/a.npz")
    assert written(tmp_path / "all") == set(folders)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{root}/none.pt", "{images}"], "checkpoint not found: {root}/none.pt"),
        (["{images}/b.jpg", "{images}"], "cannot read checkpoint {images}/b.jpg"),
        (["{trained}", "{root}/none"], "input not found: {root}/none"),
        (["{trained}", "{root}/ImageSets"], "no image in {root}/ImageSets: looked for .jpg"),
        (["{trained}", "{root}"], "for a data set in VOC's layout give --split"),
        (["{trained}", "{images}", "--split", "val"], "no folder JPEGImages in {images}"),
        (["{trained}", "{root}", "--split", "none"], "split not found: looked for {root}"),
        (["{trained}", "{images}", "--clean"], "--clean needs image-level labels: give --labels FILE"),
        (["{trained}", "{images}", "--clean", "--labels", "none"], "labels file not found: none"),
        (["{trained}", "{images}", "--device", "abacus"], "--device: cannot use 'abacus'"),
        (["{trained}", "{images}", "--device", "meta"], "--device: cannot use 'meta'"),
        (["{trained}", "{images}", "--scales", "0"], "--scales must be at least 0.1, got 0.0"),
        (["{trained}", "{images}", "--background-power", "nan"], "--background-power must be at least 0, got nan"),
        (["{trained}", "{images}", "--cam-background", "0.1"], "--cam-background is for a CAM-GAP checkpoint"),
        (["{cam}", "{images}", "--background-power", "3"], "--background-power is not for a CAM-GAP checkpoint"),
        (["{trained}", "{images}", "--output", "{images}/b.jpg"], "Not a directory"),
        (["--released", "{root}/none.pth", "--backbone", "vgg16", "{images}"], "weights not found: {root}/none.pth"),
        (["--released", "{trained}", "--backbone", "vgg16", "{images}"], "the checkpoint does not fit the model"),
    ],
)
def test_errors_are_one_line_with_exit_code_2(
    arguments: list[str],
    message: str,
    checkpoint: Callable[[str], Path],
    toy_root: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = {"trained": checkpoint("single_stage"), "cam": checkpoint("cam"), "root": toy_root, "images": images}
    output = ["--output", str(tmp_path / "out")] * ("--output" not in arguments)
    before = written(images)
    assert main([*(argument.format(**paths) for argument in arguments), *output]) == 2
    (line,) = skipped_lines(capsys)
    assert line.startswith("infer_voc.py: error: ")
    assert message.format(**paths) in line
    assert not (tmp_path / "out").exists()
    assert written(images) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "x"], "--labels is for --clean"),
        (["--clean", "--min-probability", "0.1"], "exclude each other"),
        (["--min-probability", "1.5"], "--min-probability must be in [0, 1], got 1.5"),
        (["--scales"], "--scales: expected one or more finite numbers"),
        (["--scales", "inf"], "--scales: expected one or more finite numbers"),
        (["--cam-background", "nan"], "--cam-background must be at least 0, got nan"),
        (["--released"], "--released needs --backbone"),
        (["--backbone", "vgg16"], "--backbone is for --released, which is not given"),
        (["--pad-to", "0"], "--pad-to must be at least 1, got 0"),
        (["--max-pixels", "0"], "--max-pixels must be at least 1, got 0"),
        (["--workers", "0"], "--workers must be at least 1, got 0"),
        (["--no-such-argument"], "--no-such-argument"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["checkpoint.pt", "images", *arguments])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_masks_do_not_overwrite_the_images(
    trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images.rename(tmp_path / "masks")
    before = (tmp_path / "masks/a.png").read_bytes()
    assert infer(trained, tmp_path / "masks", tmp_path) == 2
    assert "would be overwritten: choose another --output" in skipped_lines(capsys)[0]
    assert (tmp_path / "masks/a.png").read_bytes() == before


def test_help_describes_every_argument(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for field in list(Arguments.__dataclass_fields__)[2:]:
        assert f"--{field.replace('_', '-')}" in shown
