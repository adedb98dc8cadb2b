"""Every row of docs/migration.md: the published call, by loops in float64, gives what the row says to write here."""

import io
import pickle
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests import reference
from tests.reference import Array
from tests.strategies import assert_close, exact
from wsseg_layers import PAMR, PAR
from wsseg_layers.kernels import Variant

PAGE = (Path(__file__).parents[1] / "docs/migration.md").read_text()
D = [1, 2, 4, 8, 12, 24]


class Copy(NamedTuple):
    """A copy of PAMR or PAR in a public repository: what it computes, with the numbers that copies change."""

    num_iter: int
    dilations: Sequence[int]
    resize: str = "mask"
    weight: float = 0.1  # PAMR
    w1: float = 0.3  # PAR
    w2: float = 0.01
    guard: float = 1e-8
    iterates: bool = True  # False: each iteration starts from the given masks

    def exponents(self, centre: float, around: Array) -> Array:
        """Return PAMR's exponents [N] of one pixel and channel."""
        samples = np.concatenate([around, np.full(len(self.dilations), centre)])
        return -np.abs(centre - around) / (self.guard + self.weight * samples.std(ddof=1))

    def position(self) -> Array | float:
        """Return the term [N] that is added to the softmax."""
        return 0.0

    def __call__(self, image: Tensor, mask: Tensor) -> Array:
        pixels, masks = exact(image), exact(mask)
        if self.resize == "image":
            pixels = reference.resize(pixels, *masks.shape[2:])
        else:
            masks = reference.resize(masks, *pixels.shape[2:])
        batch, channels, height, width = pixels.shape
        affinity = np.zeros((batch, 8 * len(self.dilations), height, width))
        for b, i, j in np.ndindex(batch, height, width):
            around = list(reference.neighbours(i, j, height, width, self.dilations))
            values = [np.array([pixels[b, k, row, column] for row, column in around]) for k in range(channels)]
            mean = sum(self.exponents(pixels[b, k, i, j], values[k]) for k in range(channels)) / channels
            affinity[b, :, i, j] = reference.softmax(mean) + self.position()
        num_iter = self.num_iter if self.iterates else 1
        return reference.pamr_propagate(masks, affinity, self.dilations, num_iter)


class CopyOfPAR(Copy):
    """The same for PAR."""

    def exponents(self, centre: float, around: Array) -> Array:
        """Return PAR's exponents [N] of one pixel and channel."""
        return -((np.abs(around - centre) / (around.std(ddof=1) + self.guard) / self.w1) ** 2)

    def position(self) -> Array | float:
        """Return the term [N] of the distances."""
        steps = [(di, dj) for d in self.dilations for di in (-d, 0, d) for dj in (-d, 0, d) if (di, dj) != (0, 0)]
        distance = np.array([np.hypot(di, dj) for di, dj in steps])
        return self.w2 * reference.softmax(-((distance / (distance.std(ddof=1) + self.guard) / self.w1) ** 2))


class PublishedPAMR:
    """The signatures of the published PAMR."""

    def __init__(self, num_iter: int = 1, dilations: Sequence[int] = (1,)) -> None:
        self.copy = Copy(num_iter, dilations)

    def __call__(self, x: Tensor, mask: Tensor) -> Array:
        return self.copy(x, mask)


class PublishedPAR:
    """The signatures of the published PAR, and of the one that resizes the images."""

    resize = "mask"

    def __init__(self, dilations: Sequence[int], num_iter: int) -> None:
        self.copy = CopyOfPAR(num_iter, dilations, self.resize)

    def __call__(self, imgs: Tensor, masks: Tensor) -> Array:
        return self.copy(imgs, masks)


class PARThatResizesImages(PublishedPAR):
    """PAR as WeCLIP and ExCEL have it."""

    resize = "image"


# The first column of the second table, and what the copy computes.
CHANGED: dict[str, Copy] = {
    "PAMR: `1e-8 + 0.2 * x_std`": Copy(10, D, weight=0.2),
    "PAMR: `1e-8 + 0.05 * x_std`": Copy(10, D, weight=0.05),
    "PAMR: other defaults, `num_iter=3, dilations=[1, 2]`": Copy(3, [1, 2]),
    "PAR: `self.w1 = 0.5`, or `par.w1 = 0.5` after construction": CopyOfPAR(10, D, w1=0.5),
    "PAR: no position term (`pos_aff`)": CopyOfPAR(10, D, w2=0),
    "PAR: no position term, and a loop that always reads the given masks": CopyOfPAR(10, D, w2=0, iterates=False),
    "PAR: `_imgs_std + 1e-5`": CopyOfPAR(10, D, guard=1e-5),
}


def rows(columns: int, heading: str) -> list[tuple[str, ...]]:
    """Return the cells of the table below a heading."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    cells = [tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in lines[1:]]
    assert all(len(row) == columns for row in cells)
    return cells


def evaluate(cell: str, names: dict[str, Any]) -> Any:
    """Evaluate the expression of a cell."""
    return eval(cell.strip("`"), names)


def inputs(same_size: bool = False) -> dict[str, Any]:
    """Return an image, a mask, and the other names that the table uses."""
    image = torch.rand(1, 3, 8, 9)

    def resized(image: Tensor, mask: Tensor) -> Tensor:
        return torch.from_numpy(reference.resize(exact(image), *mask.shape[2:]))

    mask = torch.rand(1, 2, 8, 9) if same_size else torch.rand(1, 2, 5, 7)
    return {"image": image, "mask": mask, "D": D, "resized": resized, "Variant": Variant}


@pytest.mark.parametrize("same_size", [False, True], ids=["resized", "same size"])
@pytest.mark.parametrize(
    ("repository", "call", "write"), rows(3, "Repository by repository"), ids=lambda cell: cell.split(",")[0]
)
def test_repository(repository: str, call: str, write: str, same_size: bool) -> None:
    names = inputs(same_size)
    published_par = PARThatResizesImages if "WeCLIP" in repository else PublishedPAR
    expected = evaluate(call, {**names, "PAMR": PublishedPAMR, "PAR": published_par})
    actual = evaluate(write, {**names, "PAMR": PAMR, "PAR": PAR})
    assert_close(actual, expected, dtype=torch.float32, precision=torch.float32)


@pytest.mark.parametrize(("change", "write"), rows(2, "Copies that were changed"), ids=lambda cell: cell[:40])
def test_changed_copy(change: str, write: str) -> None:
    names = inputs()
    actual = evaluate(write, {**names, "PAMR": PAMR, "PAR": PAR})
    expected = CHANGED[change](names["image"], names["mask"])
    assert_close(actual, expected, dtype=torch.float32, precision=torch.float32)


def test_guard_matters_where_the_image_is_flat() -> None:
    image = 0.5 + 1e-5 * torch.rand(1, 3, 8, 9)
    mask = torch.rand(1, 2, 8, 9)
    expected = CopyOfPAR(1, [1, 2], guard=1e-5)(image, mask)
    assert_close(PAR([1, 2], 1, guard=1e-5)(image, mask), expected, dtype=torch.float32, precision=torch.float32)
    assert np.abs(CopyOfPAR(1, [1, 2])(image, mask) - expected).max() > 1e-2


def test_table_of_changes_is_complete() -> None:
    assert [change for change, _ in rows(2, "Copies that were changed")] == list(CHANGED)


def test_bare_calls_differ_from_the_published_ones() -> None:
    image, mask = torch.rand(1, 3, 16, 16), torch.rand(1, 4, 16, 16)
    assert np.abs(exact(PAMR()(image, mask)) - PublishedPAMR()(image, mask)).max() > 0.05
    assert np.abs(exact(PAMR(num_iter=10)(image, mask)) - PublishedPAMR(num_iter=10)(image, mask)).max() > 0.05
    with pytest.raises(TypeError, match="unexpected keyword argument 'x'"):
        PAMR()(x=image, mask=mask)


def test_attributes_that_can_be_set() -> None:
    image, mask = torch.rand(1, 3, 7, 6), torch.rand(1, 2, 7, 6)
    par = PAR(D, 10)
    par.w1, par.w2, par.num_iter, par.dilations = 0.5, 0.02, 2, (1, 3)
    expected = CopyOfPAR(2, [1, 3], w1=0.5, w2=0.02)(image, mask)
    assert_close(par(image, mask), expected, dtype=torch.float32, precision=torch.float32)
    pamr = PAMR(10, D)
    pamr.num_iter, pamr.dilations = 2, (1, 3)
    assert_close(pamr(image, mask), Copy(2, [1, 3])(image, mask), dtype=torch.float32, precision=torch.float32)


@pytest.mark.parametrize(
    ("module", "name"),
    [(PAMR, "aff_x"), (PAMR, "aff_m"), (PAMR, "aff_std"), (PAR, "kernel"), (PAR, "pos"), (PAR, "dim")],
)
def test_attributes_that_would_be_ignored(module: type[PAMR] | type[PAR], name: str) -> None:
    with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
        setattr(module(), name, torch.zeros(1))
    assert f"`{name}`" in PAGE


def test_keys_of_old_checkpoints_load() -> None:
    keys = re.findall(r"`((?:aff_\w+\.)?kernel)`", PAGE)
    assert {"aff_x.kernel", "aff_m.kernel", "aff_std.kernel", "kernel"} <= set(keys)
    model = nn.ModuleDict({"pamr": PAMR(), "par": PAR()})
    old = {f"{'par' if key == 'kernel' else 'pamr'}.{key}": torch.zeros(8, 1, 3, 3) for key in keys}
    model.load_state_dict(old, strict=True)
    assert model.state_dict() == {}


@pytest.mark.parametrize("ours", [PAMR, PAR])
def test_whole_models_cannot_be_used(ours: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    def init(self: nn.Module) -> None:
        nn.Module.__init__(self)
        self.dilations, self.num_iter = [1], 1  # type: ignore[assignment]
        self.register_buffer("kernel", torch.zeros(8, 1, 3, 3))

    copy = ModuleType("copy_of_a_layer")
    monkeypatch.setitem(sys.modules, copy.__name__, copy)
    theirs = type(ours.__name__, (nn.Module,), {"__init__": init, "__module__": copy.__name__})
    setattr(copy, ours.__name__, theirs)
    file = io.BytesIO(pickle.dumps(theirs()))
    setattr(copy, ours.__name__, ours)  # only the import is changed
    loaded = pickle.load(file)
    with pytest.raises(AttributeError):
        loaded(torch.rand(1, 3, 5, 6), torch.rand(1, 2, 5, 6))
