"""The comparison on VOC animals: what is chosen on which images, what is computed when, and the table."""

import inspect
import itertools
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from voc.arguments import parse_arguments, run_settings
from voc.backbones import Backbone
from voc.crf import crf_marginals
from voc.dataset.images import IGNORE, save_mask
from voc.dataset.layout import SPLIT_FOLDER, read_classes, read_split
from voc.dataset.splits import Sample, VOCDataset, load_split_with_masks
from voc.dataset.toy import toy_voc
from voc.model import CAMNet, Output, SingleStageNet

from benchmarks import voc_animals, voc_page, voc_protocol, voc_runs
from benchmarks.processor import cpu_model
from benchmarks.voc_protocol import Choice, ColumnName, Cut, Grid, ProtocolName, Refinement, choose, measure
from benchmarks.voc_runs import Measured
from tests import reference
from tests.no_backbone import NoBackbone


def pixelwise(image: Tensor) -> Output:
    """Return masks that are functions of the colours, and probabilities that do not depend on the image."""
    red, green, blue = image.unbind(dim=1)
    logits = torch.stack([0 * red + 2, 4 * red, 4 * green, 4 * blue, 3 * red - blue, 2 * green], dim=1)
    scores = torch.tensor([[-2.0, -1.0, 0.2, -1.8, 3.0]])  # probabilities 0.12, 0.27, 0.55, 0.14, 0.95
    return Output(scores, logits, logits.softmax(dim=1))


class Pixelwise(nn.Module):
    """A network of our kind."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.offset = nn.Parameter(torch.zeros(()))  # tells the device
        self.backbone: Backbone = NoBackbone()

    def forward(self, image: Tensor) -> Output:
        return pixelwise(image)


class PixelwiseCAM(Pixelwise, CAMNet):
    """A network of the kind of CAM-GAP."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> VOCDataset:
    """Three images of 18 x 14 pixels, with masks that agree in part with the network's, and void pixels."""
    root = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClass", SPLIT_FOLDER):
        (root / folder).mkdir(parents=True)
    names = ["first", "second", "third"]
    (root / SPLIT_FOLDER / "train.txt").write_text("\n".join(names))
    (root / "classes.txt").write_text("\n".join("abcde"))
    for name in names:
        small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        image = small.resize((18, 14), Image.Resampling.BICUBIC)
        image.save(root / f"JPEGImages/{name}.png")
        masks = pixelwise(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255).masks[0]
        masks[0] = masks[0] ** 1.7
        mask = masks[[0, 2, 3, 5]].argmax(dim=0).numpy().astype(np.uint8)
        mask = np.array([0, 2, 3, 5], dtype=np.uint8)[mask]
        mask[rng.random(mask.shape) < 0.1] = 4
        mask[0, :3] = IGNORE
        save_mask(root / f"SegmentationClass/{name}.png", mask)
    split = load_split_with_masks(root, names, read_classes(root))
    return VOCDataset(replace(split, labels=(frozenset({1, 2}), frozenset({2, 4}), frozenset({1, 2, 3}))))


def iou(pairs: Sequence[tuple[Tensor, Tensor]], rows: Sequence[int]) -> Tensor:
    """Return the IoU per class in percent, counted pixel set by pixel set."""
    values = []
    for index in rows:
        both = sum(int(((predicted == index) & (target == index)).sum()) for predicted, target in pairs)
        either = sum(
            int((((predicted == index) & (target != IGNORE)) | (target == index)).sum()) for predicted, target in pairs
        )
        values.append(100 * both / either if either else float("nan"))
    return torch.tensor(values, dtype=torch.float64)


def masks_by_hand(image: Tensor, labels: Tensor, is_cam: bool, cut: Cut, given: bool) -> Tensor:
    """Return masks [6, H, W] with zeros in the removed classes."""
    output = pixelwise(image[None])
    masks = output.masks[0].double()
    masks[0] = cut.background if is_cam else masks[0] ** cut.background
    probable = labels.bool() if given else output.class_scores[0].sigmoid() >= cut.min_probability
    masks[1:][~probable] = 0
    return masks


def refined_by_hand(image: Tensor, masks: Tensor, name: str, refinement: Refinement) -> Tensor:
    affinity = reference.pamr_affinity(image[None].double().numpy(), refinement.dilations, name)
    refined = reference.pamr_propagate(masks[None].numpy(), affinity, refinement.dilations, refinement.num_iter)
    return torch.from_numpy(refined[0])


def crf_by_hand(image: Tensor, masks: Tensor) -> Tensor:
    kept = masks.sum(dim=(1, 2)) > 0
    return crf_marginals(image[None], masks[None], kept[None])[0]


def samples_of(dataset: VOCDataset) -> list[Sample]:
    return [dataset[index] for index in range(len(dataset))]


@pytest.mark.parametrize("is_cam", [False, True])
def test_choices_have_the_highest_mean_iou_of_the_grid(
    dataset: VOCDataset, is_cam: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    refinements = (Refinement(1, (1, 2)), Refinement(3, (1, 4)))
    monkeypatch.setattr(voc_protocol, "REFINEMENTS", refinements)
    grid = Grid((0.1, 0.3, 0.6), (0.1, 0.2)) if is_cam else Grid((1.0, 1.7, 2.5), (0.1, 0.2))
    network: Any = PixelwiseCAM() if is_cam else Pixelwise()
    rows = [0, 2, 3, 5]
    found = choose(network, dataset, (1.0,), grid, ["pamr", "crf"], rows)

    def mean(cut: Cut, given: bool, refinement: Refinement | Literal["crf"] | None = None) -> float:
        pairs = []
        for sample in samples_of(dataset):
            masks = masks_by_hand(sample.image, sample.labels, is_cam, cut, given)
            if refinement == "crf":
                masks = crf_by_hand(sample.image, masks)
            elif refinement is not None:
                masks = refined_by_hand(sample.image, masks, "pamr", refinement)
            pairs.append((masks.argmax(dim=0), sample.mask))
        return iou(pairs, rows).nanmean().item()

    for protocol, given in (("own", False), ("given", True)):
        cut, chosen, backgrounds = found[protocol]  # type: ignore[index]
        means = {one: mean(one, given) for one in (Cut(*values) for values in itertools.product(*grid))}
        assert len({round(value, 3) for value in means.values()}) > 2  # the choice matters
        assert mean(cut, given) == pytest.approx(max(means.values()), abs=1e-9)
        refined = {one: mean(cut, given, one) for one in refinements}
        by_column: dict[ColumnName, Refinement | Literal["crf"]] = {"pamr": chosen["pamr"], "crf": "crf"}
        assert refined[chosen["pamr"]] == pytest.approx(max(refined.values()), abs=1e-9)
        for column, refinement in by_column.items():
            means_of_column = {one: mean(cut._replace(background=one), given, refinement) for one in grid.backgrounds}
            assert len({round(value, 3) for value in means_of_column.values()}) > 1
            found_background = means_of_column[backgrounds[column]]
            assert found_background == pytest.approx(max(means_of_column.values()), abs=1e-9)


@pytest.mark.parametrize("max_stored", [0, 14 * 18 * 4 * 5, 2**30])
def test_stored_masks_do_not_change_the_choice(
    dataset: VOCDataset, max_stored: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counting(Pixelwise):
        calls = 0

        def forward(self, image: Tensor) -> Output:
            self.calls += 1
            return super().forward(image)

    network: Any = Counting()
    grid, columns, rows = Grid((1.0, 1.7, 2.5), (0.13, 0.2)), ["pamr", "crf"], [0, 2, 3, 5]
    expected = choose(network, dataset, (1.0,), grid, columns, rows)  # type: ignore[arg-type]
    passes = 2 * len(dataset)  # every image and its mirror image
    assert network.calls == passes
    network.calls = 0
    monkeypatch.setattr(voc_protocol, "MAX_STORED", max_stored)
    assert choose(network, dataset, (1.0,), grid, columns, rows) == expected  # type: ignore[arg-type]
    # The limit in the middle is that of five masks: the second image has five, the others have one more label.
    seen_again = {0: 3 * passes, 2**30: passes}.get(max_stored, 2 + 3 * (passes - 2))
    assert network.calls == seen_again
    network.calls = 0
    choose(network, dataset, (1.0,), Grid((1.0,), (0.0,)), ["pamr"], rows)
    assert network.calls == passes  # only the refinement has a choice


@pytest.mark.parametrize("column", ["pamr", "par"])
def test_masks_that_cannot_be_the_highest_are_left_out(dataset: VOCDataset, column: ColumnName) -> None:
    sample = dataset[0]
    size = sample.mask.shape
    generator = torch.Generator().manual_seed(0)
    noise = 3 * torch.rand(8, *size, generator=generator, dtype=torch.float64)
    masks = (noise + torch.tensor([4.0, -2, 5, -2, -2, -2, 4, 3])[:, None, None]).softmax(dim=0)
    levels = torch.stack([masks[0], masks[0] ** 3])
    assert voc_protocol.contenders(levels, masks[1:]) == [1, 5, 6]  # the 2nd, 6th and 7th class
    network: Any = Pixelwise()
    seen = voc_protocol.Seen(network, sample, masks.float(), torch.ones(7), [1.0, 3.0])
    refinement = Refinement(3, (1, 4))
    for background in (1.0, 3.0):
        found = seen.classify(voc_protocol.Setting("own", Cut(background, 0.1), column, refinement))
        expected = torch.cat([masks[:1] ** background, masks[1:]])
        refined = refined_by_hand(sample.image, expected, column, refinement)
        torch.testing.assert_close(refined.gather(0, found[None])[0], refined.amax(dim=0), rtol=1e-5, atol=0)
        assert len(found.unique()) > 1


def test_measured_columns(dataset: VOCDataset) -> None:
    choices: dict[ProtocolName, Choice] = {
        "own": Choice(
            Cut(2.0, 0.2), {"pamr": Refinement(2, (1, 3)), "par": Refinement(1, (2,))}, {"pamr": 1.0, "par": 2.5}
        ),
        "given": Choice(
            Cut(1.0, 0.5), {"pamr": Refinement(1, (1,)), "par": Refinement(2, (1, 2))}, {"pamr": 2.0, "par": 1.0}
        ),
    }
    network: Any = Pixelwise()
    found = measure(network, dataset, (1.0,), choices, ["pamr", "par"])
    for protocol, (cut, refinements, backgrounds) in choices.items():
        pairs: dict[str, list[tuple[Tensor, Tensor]]] = {"raw": [], "pamr": [], "par": []}
        for sample in samples_of(dataset):
            masks = masks_by_hand(sample.image, sample.labels, False, cut, given=protocol == "given")
            pairs["raw"].append((masks.argmax(dim=0), sample.mask))
            for name, refinement in refinements.items():
                background = cut._replace(background=backgrounds[name])
                masks = masks_by_hand(sample.image, sample.labels, False, background, given=protocol == "given")
                refined = refined_by_hand(sample.image, masks, name, refinement)
                pairs[name].append((refined.argmax(dim=0), sample.mask))
        assert list(found[protocol]) == list(pairs)
        for title, column in found[protocol].items():
            torch.testing.assert_close(column, iou(pairs[title], range(6)), equal_nan=True)


def test_column_of_the_crf(dataset: VOCDataset) -> None:
    choices: dict[ProtocolName, Choice] = {
        "own": Choice(Cut(2.0, 0.2), {}, {"crf": 1.3}),
        "given": Choice(Cut(1.0, 0.5), {}, {"crf": 0.6}),
    }
    network: Any = Pixelwise()
    found = measure(network, dataset, (1.0,), choices, ["crf"])
    for protocol, (cut, _, backgrounds) in choices.items():
        cut = cut._replace(background=backgrounds["crf"])
        pairs = []
        for sample in samples_of(dataset):
            masks = masks_by_hand(sample.image, sample.labels, False, cut, given=protocol == "given")
            pairs.append((crf_by_hand(sample.image, masks).argmax(dim=0), sample.mask))
        torch.testing.assert_close(found[protocol]["crf"], iou(pairs, range(6)), equal_nan=True)


def test_cam_gap_and_ours_have_as_many_choices() -> None:
    cam, ours = (voc_animals.METHODS[name].grid for name in ("CAM-GAP", "ours"))
    assert len(cam.backgrounds) == len(ours.backgrounds)
    assert cam.min_probabilities == ours.min_probabilities


def measured(own: Sequence[float], given: Sequence[float]) -> Measured:
    """Return results of two classes whose IoU is the same."""
    choice = Choice(Cut(2.0, 0.3), {"pamr": Refinement(10, (1, 24))}, {"pamr": 3.0})
    columns = ("raw", "pamr")
    iou_of = {
        protocol: {column: torch.full((2,), float(value)) for column, value in zip(columns, values, strict=True)}
        for protocol, values in (("own", own), ("given", given))
    }
    return Measured({"own": choice, "given": choice}, iou_of, 1800.0, 900.0, "a machine")  # type: ignore[arg-type]


def test_the_table_has_mean_and_spread_over_seeds() -> None:
    results: dict[str, list[Measured]] = {
        "CAM-GAP": [measured([30, 31], [40, 41]), measured([34, 35], [40, 41])],
        "ours": [measured([45, 48], [50, 51]), measured([51, 54], [50, 51])],
        "ceiling": [measured([60, 60], [80, 80]), measured([60, 60], [100, 100])],
    }
    table = voc_animals.headline_table(["raw", "pamr"], [0, 1], results)
    root2 = 2**0.5  # the sample standard deviation of two values is their distance / sqrt(2)
    assert table.splitlines()[2:8] == [
        "| *classes chosen by the network* |  |  |",
        f"| CAM-GAP | 32.0 ± {4 / root2:.1f} | 33.0 ± {4 / root2:.1f} |",
        f"| ours | 48.0 ± {6 / root2:.1f} | 51.0 ± {6 / root2:.1f} |",
        "| ceiling | 60.0 ± 0.0 | 60.0 ± 0.0 |",
        f"| **ours / ceiling** | **0.80 ± {0.1 / root2:.2f}** | **0.85 ± {0.1 / root2:.2f}** |",
        f"| **ours - CAM-GAP** | **16.0 ± {2 / root2:.1f}** | **18.0 ± {2 / root2:.1f}** |",
    ]
    assert f"| **ours / ceiling** | **{(50 / 80 + 50 / 100) / 2:.2f} ± 0.09** |" in table
    one_seed = voc_animals.headline_table(["raw"], [0, 1], {name: runs[:1] for name, runs in results.items()})
    assert "| **ours / ceiling** | **0.75** |" in one_seed


QUICK = shlex.split(
    "--smoke --seeds 3 --columns pamr --device cpu --workers 0 --epochs 1 --classification-epochs 0 --scales 1"
)


@pytest.fixture(autouse=True, scope="module")
def _few_choices() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(voc_protocol, "REFINEMENTS", (Refinement(1, (1, 2)), Refinement(2, (1, 2))))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole comparison on the toy data set."""
    output = tmp_path_factory.mktemp("comparison")
    assert voc_animals.main([*QUICK, "--output", str(output)]) == 0
    return output


def test_the_whole_comparison(finished: Path) -> None:
    text = (finished / "voc_animals.md").read_text()
    command = text.split("\n\n")[1].replace("\\\n", " ")
    assert shlex.split(command) == ["python", "benchmarks/voc_animals.py", *QUICK, "--output", str(finished)]
    unwrapped = " ".join(text.split())  # lines break where names of processors and versions are long
    for expected in (
        cpu_model(),
        f"torch {torch.__version__}",
        date.today().strftime("%Y-"),
        "on 2 validation images, over seeds 3",
        "the 8 images of the split `train`",
        "|  | raw | + PAMR |",
        "| **mean of 6** |",
    ):
        assert expected in text or expected in unwrapped
    assert max(len(line) for line in text.splitlines() if str(finished) not in line) <= 120
    settings = {name: run_settings(finished / f"{name}_3") for name in ("cam-gap", "ours", "ceiling")}
    assert {one.seed for one in settings.values()} == {3}
    cam, ours, ceiling = settings.values()
    assert (cam.model, ours.model, ceiling.model) == ("cam", "single_stage", "single_stage")
    assert (ours.supervision, ceiling.supervision) == ("labels", "masks")
    assert (ceiling.background_power, ceiling.min_probability) == (1, 0)
    schedule = ("epochs", "crop_size", "channels", "backbone", "lr", "batch_size", "scales", "labels", "data")
    assert all(getattr(one, key) == getattr(ours, key) for one in settings.values() for key in schedule)


def test_finished_runs_are_not_repeated(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*_: Any) -> None:
        pytest.fail("computed again")

    before = (finished / "voc_animals.md").read_text()
    for module, name in ((voc_runs, "train_main"), (voc_protocol, "choose"), (voc_protocol, "measure")):
        monkeypatch.setattr(module, name, unexpected)
    assert voc_animals.main([*QUICK, "--output", str(finished)]) == 0
    tables = [text[text.index("Mean IoU") :] for text in (before, (finished / "voc_animals.md").read_text())]
    assert tables[0] == tables[1]


def test_a_table_of_some_methods(finished: Path, tmp_path: Path) -> None:
    records = ["--records", str(finished / "records")]
    assert voc_animals.main([*QUICK, "--output", str(tmp_path), *records, "--methods", "ours", "CAM-GAP"]) == 0
    lines = (tmp_path / "voc_animals.md").read_text().splitlines()
    whole = (finished / "voc_animals.md").read_text().splitlines()
    rows = {name: [line for line in lines if line.startswith(f"| {name} |")] for name in ("CAM-GAP", "ours", "ceiling")}
    assert not rows["ceiling"]
    assert all(len(rows[name]) >= 4 and set(rows[name]) <= set(whole) for name in ("CAM-GAP", "ours"))
    assert not any("ours / ceiling" in line for line in lines)
    assert "Not in this table, because `--methods` left it out: ceiling." in lines
    assert not any("Not in this table" in line for line in whole)
    assert [line for line in lines if "ours - CAM-GAP" in line] == [line for line in whole if "ours - CAM-GAP" in line]


def test_runs_of_another_machine_are_not_repeated(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = finished / "records"
    assert sorted(path.name for path in records.iterdir()) == ["cam-gap_3.json", "ceiling_3.json", "ours_3.json"]
    trained: list[Any] = []

    def interrupted(arguments: Sequence[str]) -> int:
        trained.append(arguments)
        return 130

    monkeypatch.setattr(voc_runs, "train_main", interrupted)
    arguments = [*QUICK, "--output", str(tmp_path), "--records", str(records)]
    assert voc_animals.main(arguments) == 0
    assert not trained
    tables = [(folder / "voc_animals.md").read_text() for folder in (finished, tmp_path)]
    assert tables[0][tables[0].index("Mean IoU") :] == tables[1][tables[1].index("Mean IoU") :]
    for change in (["--lr", "0.5"], ["--seeds", "4"]):  # another question
        assert voc_animals.main([*arguments, *change]) == 130
        assert trained.pop()
    assert voc_animals.main([*arguments, "--aspp-dilations", "1", "2", "3"]) == 130
    (of_ours,) = trained  # CAM-GAP, whose row is the first, has no ASPP
    assert "cam" not in of_ours


def test_cam_gap_has_no_settings_of_the_decoder() -> None:
    parameters = set(inspect.signature(SingleStageNet).parameters)
    assert parameters - set(inspect.signature(CAMNet).parameters) == set(voc_runs.DECODER_SETTINGS)


def test_long_commands_are_folded_between_words() -> None:
    words = ["python", "benchmarks/x.py", "--rows", *(f"a row of number {index}" for index in range(12))]
    folded = voc_page.code_block(words)
    assert max(map(len, folded.splitlines())) <= 120
    assert len(folded.splitlines()) == 3
    assert shlex.split(folded.replace("\\\n", " ")) == words


def test_the_fingerprint_is_that_of_all_images_and_labels(finished: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    (images,) = (finished / "data").rglob("JPEGImages")
    shutil.copytree(images.parent, root)
    labels = tmp_path / "labels.txt"
    labels.write_text("a cat")
    names = (root / "ImageSets/Segmentation/train.txt").read_text()
    found = {voc_runs.fingerprint(root, None), voc_runs.fingerprint(root, labels)}
    (root / "ImageSets/Segmentation/train_aug.txt").write_text(names + "0001_more\n")
    found |= {voc_runs.fingerprint(root, None)}
    labels.write_text("a dog")
    found |= {voc_runs.fingerprint(root, labels)}
    assert len(found) == 4


def test_a_run_on_other_images_is_an_error(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "comparison"
    shutil.copytree(finished, output)
    (output / "records/cam-gap_3.json").unlink()
    (output / "cam-gap_3/data.txt").write_text("another")
    for path in output.glob("*/settings.json"):  # the copied runs are those of the copied folder
        path.write_text(path.read_text().replace(str(finished), str(output)))
    assert voc_animals.main([*QUICK, "--output", str(output)]) == 2
    assert "was trained on other images or labels: give another --output" in capsys.readouterr().err


def test_missing_labels_are_found_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(voc_runs, "train_main", lambda _: pytest.fail("training started"))
    root = toy_voc(tmp_path / "data", num_train=2, num_val=1)
    names = read_split(root, "train")
    (root / "image_labels.txt").write_text("".join(f"{name}\n" for name in names))  # without those of val
    assert voc_animals.main([str(root), "--output", str(tmp_path / "out")]) == 2
    assert "no line for image" in capsys.readouterr().err


def test_answers_are_remembered_per_question(tmp_path: Path) -> None:
    answers = iter([{"a": 1}, {"a": 2}])
    path = tmp_path / "answer.json"
    for question, expected in (({"grid": (1, 2)}, 1), ({"grid": (1, 2)}, 1), ({"grid": (1, 3)}, 2)):
        assert voc_runs.remembered(path, question, lambda: next(answers)) == {"a": expected}


def test_an_interrupted_training_goes_on(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "comparison"
    shutil.copytree(finished, output)
    (output / "ours_3/iou.csv").unlink()
    (output / "records/ours_3.json").unlink()
    for path in output.glob("*/settings.json"):  # the copied runs are those of the copied folder
        path.write_text(path.read_text().replace(str(finished), str(output)))
    calls = []

    def interrupted(arguments: Sequence[str]) -> int:
        calls.append(parse_arguments(arguments))
        return 130

    monkeypatch.setattr(voc_runs, "train_main", interrupted)
    assert voc_animals.main([*QUICK, "--output", str(output)]) == 130
    (settings,) = calls
    assert settings.resume == settings.output == output / "ours_3"
    monkeypatch.undo()
    (output / "ours_3/choices.json").write_text("of other weights")
    assert voc_animals.main([*QUICK, "--output", str(output)]) == 0
    for name in ("iou.csv", "choices.json"):
        assert (output / "ours_3" / name).read_text() == (finished / "ours_3" / name).read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "VOC_ROOT is missing: give the root of the data set first, or --smoke"),
        (["{missing}"], "data folder not found: {missing}"),
        (["--smoke", "--checkpoint", "best"], "--checkpoint best chooses an epoch on validation images"),
        ([*QUICK, "--output", "{finished}", "--lr", "0.5"], "has --lr 0.008, not 0.5: give another --output"),
        (["--smoke", "--resume", "{finished}/ours_3"], "--resume is not for this command, which resumes by itself"),
        (["--smoke", "--output", "{new}", "--seeds"], "--seeds needs at least one value"),
        (["--smoke", "--output", "{new}", "--methods"], "--methods needs at least one value"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"missing": tmp_path / "missing", "finished": finished, "new": tmp_path / "new"}
    arguments = [argument.format(**places) for argument in arguments]
    if "--output" not in arguments:
        arguments += ["--output", str(tmp_path / "new")]
    assert voc_animals.main([*arguments, "--columns", "pamr"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("voc_animals.py: error: ")
    assert message.format(**places) in error
