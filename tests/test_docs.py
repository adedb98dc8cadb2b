"""Each code block of README and docs works: Python as printed, commands on a data set of a few pictures."""

import importlib
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat
from voc.arguments import parse_arguments
from voc.dataset.images import read_mask
from voc.dataset.layout import read_split
from voc.dataset.toy import toy_voc

from benchmarks.report import README_END, README_START, read_csv, readme_text
from wsseg_layers.kernels import VARIANTS

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="Python 3.10 has no tomllib")

ROOT = Path(__file__).parents[1]
# In the order in which a reader runs them, because later commands use what earlier ones wrote.
PAGES = [ROOT / "README.md", *(ROOT / "docs" / name for name in ("index.md", "voc.md", "own_data.md"))]
PAGES += sorted({*(ROOT / "docs").rglob("*.md"), ROOT / "CONTRIBUTING.md"} - set(PAGES))

# Arguments that make a command small enough for a test. Without them, the commands run as printed.
SMALL = {
    "train_voc.py": "--epochs 2 --classification-epochs 1 --crop-size 65 --channels 8 --batch-size 4 --workers 0"
    " --device cpu --no-baseline --scales 1",
    "infer_voc.py": "--device cpu",
    "prepare_sbd.py": "--allow-other-counts",
    "ablate_voc.py": "--dry-run",
}
NO_DATA = "--data VOCdevkit/VOC2012 --preset toy"  # instead of the data set that train_voc.py would draw


def python_blocks() -> Iterator[tuple[str, str]]:
    """Yield (page, code) of every block of Python."""
    for page in PAGES:
        for indent, code in re.findall(r"^( *)```python\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE):
            yield str(page.relative_to(ROOT)), re.sub(f"^{indent}", "", code, flags=re.MULTILINE)


def printed_commands(page: Path) -> list[str]:
    """Return a page's blocks of commands, and commands inside a line, in their order, each command on one line."""
    text = page.read_text().replace(" \\\n ", " ")
    return [max(found) for found in re.findall(r"```bash\n(.*?)```|`(python examples/[^`\n]+)`", text, re.DOTALL)]


def commands() -> list[str]:
    """Return every command once, the pieces of `a && b` one by one."""
    lines = [line for page in PAGES for code in printed_commands(page) for line in code.splitlines() if line[:1] != "#"]
    pieces = [piece.split(" #")[0].strip().removeprefix(".venv/bin/") for line in lines for piece in line.split("&&")]
    return [piece for piece in dict.fromkeys(pieces) if piece]


def test_every_block_has_a_language_that_is_tested() -> None:
    for page in PAGES:
        fences = re.findall(r"^ *```(\S*)", page.read_text(), re.MULTILINE)[::2]
        assert set(fences) <= {"python", "bash", "text", "{eval-rst}", "{toctree}", "{include}"}, page


@pytest.mark.parametrize(("page", "code"), [pytest.param(*block, id=block[0]) for block in python_blocks()])
def test_python(page: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(VARIANTS, "soft", VARIANTS["pamr"])  # removed again, as the page adds it to the table
    exec(compile(code, page, "exec"), {})


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands read: VOC, SBD, photographs of one's own.

    Two of the images of SBD are not in `train.txt` of VOC, so that `train_aug.txt` is another list.
    """
    folder = tmp_path_factory.mktemp("docs")
    voc = folder / "VOCdevkit/VOC2012"
    voc.parent.mkdir()
    shutil.copytree(toy_voc(tmp_path_factory.mktemp("toy"), num_train=8, num_val=3, seed=2), voc)
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "photos").mkdir()
    shutil.copytree(voc, folder / "photos", dirs_exist_ok=True)
    for image in (voc / "JPEGImages").iterdir():
        shutil.copy(image, folder / "photos")

    sbd = folder / "benchmark_RELEASE/dataset"
    (sbd / "cls").mkdir(parents=True)
    shutil.copytree(voc / "JPEGImages", sbd / "img")
    names = read_split(voc, "train")
    classes = (voc / "classes.txt").read_text().split()
    labels = []
    for name in names:
        mask = read_mask(voc / f"SegmentationClass/{name}.png")
        labels.append(" ".join([name, *(classes[index - 1] for index in np.unique(mask) if index)]))
        savemat(sbd / f"cls/{name}.mat", {"GTcls": {"Segmentation": mask.astype(np.uint8)}})
    (folder / "photos/labels.txt").write_text("\n".join(labels) + "\n")
    (sbd / "train.txt").write_text("\n".join(names[:6]) + "\n")
    (sbd / "val.txt").write_text("\n".join(names[6:]) + "\n")
    (voc / "ImageSets/Segmentation/train.txt").write_text("\n".join(names[:-2]) + "\n")
    return folder


@pytest.mark.slow
def test_commands(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    for command in commands():
        command = command.replace("torchrun --nproc-per-node 2 examples/infer", "python examples/infer")
        if not command.startswith("python examples/"):
            continue
        _, script, *arguments = shlex.split(command)
        name = Path(script).name
        if name == "train_voc.py" and not arguments:
            arguments = shlex.split(NO_DATA)
        if "--resume" not in arguments:  # --resume takes the settings of the checkpoint
            arguments += shlex.split(SMALL.get(name, ""))
        assert importlib.import_module(Path(script).stem).main(arguments) == 0, command


def test_other_commands() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for command in commands():
        words = shlex.split(command)
        match words:
            case (
                ["python", *_]
                | ["python3", "-m", "venv", ".venv"]
                | ["pre-commit", "install"]
                | ["pip", "install", "."]
            ):
                pass
            case (
                ["pip", "install", "torch==2.13.0", "-e", target]
                | ["pip", "install", "-e", target]
                | ["pip", "install", target]
            ) if target.startswith("."):
                assert set(target[2:-1].split(",")) <= set(extras), command
            case ["pip", "install", package]:
                assert package == "torch==2.13.0"
            case ["torchrun", "--nproc-per-node", "4", "examples/train_voc.py", *arguments]:
                assert parse_arguments(arguments).preset == "paper"
            case ["torchrun", "--nproc-per-node", "2", "examples/infer_voc.py", *_]:
                pass  # above, with one process
            case ["pytest", "-n", "auto", "--dist", "worksteal"] | ["pytest", "-m", "slow"]:
                pass
            case ["pytest", *arguments]:
                known = ("--benchmark", "--benchmark-quick")
                assert all((ROOT / a).exists() or a in known for a in arguments), command
            case ["sphinx-build", "-W", "docs", "build/docs"]:
                pass  # run by .ci/run
            case _:
                pytest.fail(f"no test for {command}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pictures_and_links(page: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_speed_in_the_readme_is_that_of_the_results() -> None:
    part = (ROOT / "README.md").read_text().split(README_START)[1].split(README_END)[0]
    rows = read_csv(ROOT / "benchmarks/results/cpu.csv")
    assert part.strip() == readme_text(rows)
    tables = (ROOT / "benchmarks/results/cpu.md").read_text()
    for row in rows:
        assert re.search(rf"^\| {re.escape(row.size)} \| {re.escape(row.competitor)} \| .*\|$", tables, re.MULTILINE), (
            row
        )


def test_masks_in_the_readme_are_those_of_the_results() -> None:
    readme = (ROOT / "README.md").read_text().splitlines()
    results = (ROOT / "benchmarks/results/voc_animals.md").read_text().splitlines()
    for name, title in (("CAM-GAP", "CAM-GAP"), ("ours", "ours"), ("ceiling", "full supervision (ceiling)")):
        own = next(line for line in results if line.startswith(f"| {name} |"))  # image labels given come later
        assert own.replace(f"| {name} |", f"| {title} |") in readme


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_are_short(page: Path) -> None:
    assert [line for line in page.read_text().splitlines() if len(line) > 120] == []


def test_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    figures = importlib.import_module("figures")
    monkeypatch.setattr(figures, "IMAGES", tmp_path)
    figures.main()
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (ROOT / "docs/images").iterdir()} - {"toy_overlays.png"}
