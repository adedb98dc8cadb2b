import copy
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests import reference
from tests.strategies import CPU_BACKENDS, assert_close, dtypes, exact, layouts, map_shapes, seeds, uniform
from wsseg_layers import PAMR, PAR, PowerBackground, PseudoLabels
from wsseg_layers.functional import (
    cam_to_label,
    merge_labels,
    multi_scale_cam,
    normalise_cam,
    refine_pseudo_labels,
    threshold_pseudo_labels,
)
from wsseg_layers.kernels import BackendName
from wsseg_layers.pseudo_labels import DISCARDS

IGNORE = 255
DILATIONS = [1, 2]
Refine = PAMR | PAR | None
Labels = NDArray[np.int64]


def refinement(name: str, backend: BackendName = "auto", num_iter: int = 2) -> Refine:
    """A layer with few neighbours."""
    if name == "PAR":
        return PAR(DILATIONS, num_iter, backend=backend)
    return PAMR(num_iter, DILATIONS, backend=backend) if name == "PAMR" else None


def reference_refinement(name: str, num_iter: int = 2) -> Callable[[Any, Any], Any] | None:
    """The same layer in loops."""
    if name == "none":
        return None

    def refine(image: Any, maps: Any) -> Any:
        affinity = reference.pamr_affinity(image, DILATIONS, name.lower())
        return reference.pamr_propagate(maps, affinity, DILATIONS, num_iter)

    return refine


def some_labels(batch: int, classes: int, seed: int) -> Tensor:
    """Image-level labels [B, C] with any number of classes, also none."""
    generator = np.random.default_rng(seed)
    share = generator.random((batch, 1))
    return torch.from_numpy((generator.random((batch, classes)) < share).astype(np.float32))


def some_boxes(batch: int, height: int, width: int, seed: int) -> Tensor:
    """Boxes [B, 4] inside of an image, some of them empty."""
    generator = np.random.default_rng(seed)
    rows = np.sort(generator.integers(0, height + 1, (batch, 2)), axis=1)
    columns = np.sort(generator.integers(0, width + 1, (batch, 2)), axis=1)
    return torch.from_numpy(np.concatenate([rows, columns], axis=1))


def present(labels: Tensor, b: int) -> list[int]:
    """The classes of an image."""
    return torch.nonzero(labels[b])[:, 0].tolist()


def power(exponent: float) -> Callable[[Any], Any]:
    """The background of `PowerBackground` for CAMs [n, h, w]."""
    return lambda cams: (1 - (cams.max(axis=0) if len(cams) else np.zeros(cams.shape[1:]))) ** exponent


def backgrounds(kind: str, batch: int, seed: int) -> tuple[Any, list[list[Any]]]:
    """What `background` may be, and for every image the same one or two scores in loops."""
    generator = np.random.default_rng(seed)
    maps, values = generator.random((batch, 1, 3, 4)), generator.random(batch)
    argument, scores = {
        "score": (0.4, [[0.4]] * batch),
        "pair": ((0.6, 0.3), [[0.6, 0.3]] * batch),
        "per image": ((torch.from_numpy(values), 0.1), [[float(value), 0.1] for value in values]),
        "map": (torch.from_numpy(maps), [[own] for own in maps[:, 0]]),
        "map and score": ((torch.from_numpy(maps), 0.2), [[own, 0.2] for own in maps[:, 0]]),
        "power": (PowerBackground(1.0), [[power(1)]] * batch),
        "powers": ((PowerBackground(2.0), PowerBackground(8.0)), [[power(2), power(8)]] * batch),
        "in the masks": (None, [[None]] * batch),
    }[kind]
    return argument, list(scores)


KINDS = ["score", "pair", "per image", "map", "map and score", "power", "powers", "in the masks"]
kinds = st.sampled_from(KINDS)
refinements = st.sampled_from(["PAR", "PAMR", "none"])
sizes = st.tuples(st.integers(2, 8), st.integers(2, 8))


@given(st.integers(1, 3), st.integers(1, 4), sizes, sizes, kinds, refinements, st.booleans(), st.booleans(), seeds)
def test_reference(
    batch: int,
    classes: int,
    size: tuple[int, int],
    cam_size: tuple[int, int],
    kind: str,
    layer: str,
    softmax: bool,
    align_corners: bool,
    seed: int,
) -> None:
    down_scale = 1 + seed % 2
    channels = classes + (kind == "in the masks")
    images = uniform((batch, 3, *size), torch.float64, "contiguous", seed)
    cams = uniform((batch, channels, *cam_size), torch.float64, "contiguous", seed + 1)
    labels = some_labels(batch, classes, seed)
    background, scores = backgrounds(kind, batch, seed)
    for backend in CPU_BACKENDS:
        module = PseudoLabels(refinement(layer, backend), background, softmax, down_scale, align_corners=align_corners)
        actual, maps = module.labels_and_maps(images, cams, labels)
        assert torch.equal(module(images, cams, labels), actual)
        assert (actual.shape, actual.dtype) == ((batch, *size), torch.int64)
        for b in range(batch):
            given_classes = present(labels, b)
            expected = [
                reference.present_maps(
                    exact(images[b]),
                    exact(cams[b]),
                    given_classes,
                    score,
                    reference_refinement(layer),
                    softmax,
                    down_scale,
                    align_corners,
                )
                for score in scores[b]
            ]
            own = maps[b] if len(expected) == 2 else maps[b][None]
            for one, refined in zip(own, expected, strict=True):
                assert_close(one[[0, *(c + 1 for c in given_classes)]], refined, torch.float64, torch.float32)
                assert not one[[c + 1 for c in range(classes) if c not in given_classes]].any()
            candidates = [reference.first_highest(refined, given_classes) for refined in expected]
            merged = reference.merge(candidates[0], candidates[1], IGNORE) if len(candidates) == 2 else candidates[0]
            clear = np.min([reference.margin(refined) for refined in expected], axis=0) > 1e-4
            assert (actual[b].numpy() == merged)[clear].all()


@given(st.integers(1, 3), sizes, sizes, st.sampled_from(["pair", "map", "in the masks"]), st.booleans(), seeds)
def test_crop_is_the_call_on_the_cropped_image(
    batch: int, size: tuple[int, int], cam_size: tuple[int, int], kind: str, align_corners: bool, seed: int
) -> None:
    classes, channels = 3, 3 + (kind == "in the masks")
    images = uniform((batch, 3, *size), torch.float32, "contiguous", seed)
    cams = uniform((batch, channels, *cam_size), torch.float32, "contiguous", seed + 1)
    labels, boxes = some_labels(batch, classes, seed), some_boxes(batch, *size, seed)
    background, _ = backgrounds(kind, batch, seed)
    module = PseudoLabels(refinement("PAR", "eager"), background, False, 1, align_corners=align_corners, crop=True)
    actual, maps = module.labels_and_maps(images, cams, labels, boxes)
    assert torch.equal(module(images, cams, labels, boxes), actual)
    full = torch.nn.functional.interpolate(cams, size=size, mode="bilinear")
    for b, (top, bottom, left, right) in enumerate(boxes.tolist()):
        outside = torch.ones(size, dtype=torch.bool)
        outside[top:bottom, left:right] = False
        assert (actual[b][outside] == IGNORE).all()
        assert not maps[b][..., outside].any()
        if not (top < bottom and left < right):
            continue
        own = background
        if isinstance(own, Tensor):
            own = torch.nn.functional.interpolate(own[b : b + 1], size=size, mode="bilinear")
            own = own[..., top:bottom, left:right]
        alone = refine_pseudo_labels(
            images[b : b + 1, :, top:bottom, left:right],
            full[b : b + 1, :, top:bottom, left:right],
            labels[b : b + 1],
            module.refine,
            own,
            softmax=False,
            down_scale=1,
        )
        assert torch.equal(actual[b, top:bottom, left:right], alone[0])


def test_crop_with_resized_maps_against_loops() -> None:
    # AFA's second path: masks with their background, no softmax, corners aligned on the way down only.
    images, masks = torch.rand(2, 3, 11, 12, dtype=torch.float64), torch.rand(2, 4, 11, 12, dtype=torch.float64)
    labels, boxes = torch.tensor([[1, 0, 1], [0, 1, 0]]), torch.tensor([[0, 9, 2, 12], [3, 10, 1, 8]])
    module = PseudoLabels(refinement("PAR"), None, False, crop=True, align_corners=True)
    actual, maps = module.labels_and_maps(images, masks, labels, boxes)
    for b, (top, bottom, left, right) in enumerate(boxes.tolist()):
        area = (..., slice(top, bottom), slice(left, right))
        classes = present(labels, b)
        expected = reference.present_maps(
            exact(images[b][area]),
            exact(masks[b][area]),
            classes,
            None,
            reference_refinement("PAR"),
            softmax_first=False,
            down_scale=2,
            align_corners=True,
        )
        assert_close(maps[b, [0, *(c + 1 for c in classes)]][area], expected, torch.float64, torch.float32)
        clear = reference.margin(expected) > 1e-4
        assert (actual[b][area].numpy() == reference.first_highest(expected, classes))[clear].all()
    pair = refine_pseudo_labels(
        images,
        torch.stack([masks, masks.flip(3)], dim=1),
        labels,
        module.refine,
        None,
        softmax=False,
        boxes=boxes,
        crop=True,
        align_corners=True,
    )
    assert torch.equal(pair[:, 0], actual)
    merged = merge_labels(pair[:, 0], pair[:, 1])
    for b in range(2):
        inside = pair[b, 0].numpy() != IGNORE
        assert (merged[b].numpy() == reference.merge(pair[b, 0].numpy(), pair[b, 1].numpy(), IGNORE))[inside].all()
        assert (merged[b].numpy() == IGNORE)[~inside].all()


def problem(batch: int, classes: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Images, CAMs and labels; the last class is in no image."""
    images = uniform((batch, 3, 12, 10), dtype, "contiguous", seed)
    cams = uniform((batch, classes, 5, 6), dtype, "contiguous", seed + 1)
    labels = some_labels(batch, classes, seed)
    labels[:, -1] = 0
    return images, cams, labels


many = given(
    st.integers(1, 4), st.integers(2, 6), st.sampled_from(CPU_BACKENDS), st.sampled_from(["PAR", "PAMR"]), seeds
)


@many
def test_a_batch_is_its_images_one_by_one(
    batch: int, classes: int, backend: BackendName, layer: str, seed: int
) -> None:
    images, cams, labels = problem(batch, classes, seed)
    module = PseudoLabels(refinement(layer, backend))
    together, maps = module.labels_and_maps(images, cams, labels)
    for b in range(batch):
        one = slice(b, b + 1)
        alone, own_maps = module.labels_and_maps(images[one], cams[one], labels[one])
        assert torch.equal(together[one], alone)
        torch.testing.assert_close(maps[one], own_maps)  # PyTorch's resizing depends on the number of channels


@many
def test_leaving_absent_classes_out_changes_nothing(
    batch: int, classes: int, backend: BackendName, layer: str, seed: int
) -> None:
    images, cams, labels = problem(batch, classes, seed)
    module = PseudoLabels(refinement(layer, backend), softmax=seed % 2 == 0, background=(0.5, 0.3))
    expected = module(images, cams, labels)
    kept = torch.nonzero(labels.any(dim=0))[:, 0]
    if len(kept):
        fewer = module(images, cams[:, kept], labels[:, kept])
        numbers = torch.zeros(256, dtype=torch.int64)
        numbers[1 : 1 + len(kept)] = kept + 1
        numbers[IGNORE] = IGNORE
        assert torch.equal(numbers[fewer], expected)
    for b in range(batch):
        assert set(expected[b].unique().tolist()) <= {0, IGNORE, *(c + 1 for c in present(labels, b))}
    cams = cams.masked_fill(labels[:, :, None, None] == 0, torch.nan)
    assert torch.equal(module(images, cams, labels), expected)
    assert torch.equal(cam_to_label(cams, labels), cam_to_label(cams.nan_to_num(9.0), labels))


@many
def test_permutations(batch: int, classes: int, backend: BackendName, layer: str, seed: int) -> None:
    images, cams, labels = problem(batch, classes, seed, torch.float64)
    module = PseudoLabels(refinement(layer, backend))
    result, maps = module.labels_and_maps(images, cams, labels)
    generator = np.random.default_rng(seed)
    order = torch.from_numpy(generator.permutation(batch))
    assert torch.equal(module(images[order], cams[order], labels[order]), result[order])
    order = torch.from_numpy(generator.permutation(classes))
    permuted, permuted_maps = module.labels_and_maps(images, cams[:, order], labels[:, order])
    numbers = torch.zeros(256, dtype=torch.int64)
    numbers[1 : 1 + classes] = order + 1
    numbers[IGNORE] = IGNORE
    clear = torch.ones_like(result, dtype=torch.bool)
    for b in range(batch):
        channels = [0, *(c + 1 for c in present(labels, b))]
        for score in range(2):
            clear[b] &= torch.from_numpy(reference.margin(exact(maps[b, score, channels]))) > 1e-6
    assert torch.equal(numbers[permuted][clear], result[clear])
    torch.testing.assert_close(permuted_maps[:, :, 1:], maps[:, :, 1:][:, :, order], rtol=1e-6, atol=1e-6)


@many
def test_boxes_only_ignore(batch: int, classes: int, backend: BackendName, layer: str, seed: int) -> None:
    images, cams, labels = problem(batch, classes, seed)
    boxes = some_boxes(batch, 12, 10, seed)
    refine = refinement(layer, backend)
    everywhere = refine_pseudo_labels(images, cams, labels, refine, ignore_index=-1)
    inside = refine_pseudo_labels(images, cams, labels, refine, boxes=boxes, ignore_index=-1)
    for b, (top, bottom, left, right) in enumerate(boxes.tolist()):
        expected = torch.full((12, 10), -1)
        expected[top:bottom, left:right] = everywhere[b, top:bottom, left:right]
        assert torch.equal(inside[b], expected)
    in_int32 = refine_pseudo_labels(images, cams, labels, refine, boxes=boxes.int(), ignore_index=-1)
    assert torch.equal(in_int32, inside)


@given(st.integers(1, 3), st.integers(1, 3), kinds, seeds)
def test_views_are_separate_calls_with_one_affinity(batch: int, views: int, kind: str, seed: int) -> None:
    images = uniform((batch, 3, 8, 9), torch.float64, "contiguous", seed)
    shape = (batch, views, 4 + (kind == "in the masks"), 5, 4)
    cams = torch.from_numpy(np.random.default_rng(seed).random(shape))
    labels = some_labels(batch, 4, seed)
    background, _ = backgrounds(kind, batch, seed)
    module = PseudoLabels(refinement("PAR"), background)
    together, maps = module.labels_and_maps(images, cams, labels)
    assert together.shape == (batch, views, 8, 9)
    for view in range(views):
        alone, own_maps = module.labels_and_maps(images, cams[:, view], labels)
        torch.testing.assert_close(maps[:, view], own_maps)
        assert (together[:, view] == alone).float().mean() > 0.97
    if kind != "in the masks":
        for view in range(views):
            assert torch.equal(cam_to_label(cams, labels)[:, view], cam_to_label(cams[:, view], labels))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(
    "labels",
    [[[0, 0, 0]], [[1, 1, 1]], [[0, 1, 0]], [[0, 0, 0], [0, 0, 0]], [[1, 1, 1], [0, 0, 0]], [[1, 0, 0], [0, 1, 1]]],
)
def test_cardinality(backend: BackendName, labels: list[list[int]]) -> None:
    given_labels = torch.tensor(labels)
    batch = len(labels)
    images, cams = torch.rand(batch, 3, 9, 8), torch.rand(batch, 3, 4, 4)
    for background in ((0.7, 0.25), 0.5, PowerBackground()):
        result = refine_pseudo_labels(images, cams, given_labels, PAR(DILATIONS, 1, backend=backend), background)
        for b, row in enumerate(labels):
            assert set(result[b].unique().tolist()) <= {0, IGNORE, *(c + 1 for c, there in enumerate(row) if there)}
            if not any(row):
                assert not result[b].any()
    assert not cam_to_label(cams, torch.zeros(batch, 3)).any()
    assert not cam_to_label(cams, torch.zeros(batch, 3), PowerBackground()).any()


def test_one_class_and_an_empty_batch() -> None:
    images, cams, labels = torch.rand(2, 3, 8, 8), torch.rand(2, 1, 8, 8), torch.tensor([[True], [False]])
    assert set(refine_pseudo_labels(images, cams, labels, PAR()).unique().tolist()) <= {0, 1, IGNORE}
    empty = PseudoLabels(PAR()).labels_and_maps(images[:0], cams[:0], labels[:0])
    assert [tuple(result.shape) for result in empty] == [(0, 8, 8), (0, 2, 2, 8, 8)]
    cropped = refine_pseudo_labels(images[:0], cams[:0], labels[:0], PAR(), boxes=torch.zeros(0, 4).long(), crop=True)
    assert cropped.shape == (0, 8, 8)
    assert threshold_pseudo_labels(torch.rand(0, 2, 8, 8), labels[:0]).shape == (0, 8, 8)
    assert cam_to_label(cams[:0], labels[:0]).shape == (0, 8, 8)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("num_iter", [0, 1, 10, 50])
@pytest.mark.parametrize("layer", ["PAR", "PAMR"])
def test_where_all_are_equal_the_background_wins(layer: str, num_iter: int, backend: BackendName) -> None:
    images, cams = torch.rand(1, 3, 33, 33), torch.full((1, 3, 33, 33), 0.5)
    refine = PAR(num_iter=num_iter, backend=backend) if layer == "PAR" else PAMR(num_iter, backend=backend)
    for softmax in (False, True):
        assert not refine_pseudo_labels(images, cams, torch.ones(1, 3), refine, 0.5, softmax, down_scale=1).any()


def test_power_of_cams_that_resizing_takes_beyond_1() -> None:
    module = PseudoLabels(None, PowerBackground(1.5), softmax=False, down_scale=1)
    for size in ((37, 50), (33, 29)):  # some of the resized values are 1 + 2^-23
        _, maps = module.labels_and_maps(torch.rand(1, 3, *size), torch.ones(1, 1, 7, 5), torch.ones(1, 1))
        assert not maps.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_functions_compute_in_float32(dtype: torch.dtype) -> None:
    masks, labels = torch.rand(4, 5, 20, 20).softmax(dim=1).to(dtype), torch.ones(4, 4)
    for discard in DISCARDS:
        expected = threshold_pseudo_labels(masks.float(), labels, discard=discard)
        assert torch.equal(threshold_pseudo_labels(masks, labels, discard=discard), expected)
    assert torch.equal(normalise_cam(masks), normalise_cam(masks.float()).to(dtype))
    assert not normalise_cam(torch.ones(1, 1, 2, 2, dtype=dtype), eps=1e-8).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cams_in_half_precision_are_computed_in_float32(dtype: torch.dtype) -> None:
    images, cams, labels = problem(3, 4, 0)
    cams = cams.to(dtype)
    expected, expected_maps = PseudoLabels(PAR()).labels_and_maps(images, cams.float(), labels)
    result, maps = PseudoLabels(PAR()).labels_and_maps(images, cams, labels)
    assert torch.equal(result, expected)
    assert torch.equal(maps, expected_maps.to(dtype))
    assert torch.equal(cam_to_label(cams, labels), cam_to_label(cams.float(), labels))


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced"])
def test_strides_do_not_matter(layout: str) -> None:
    images, cams, labels = problem(3, 4, 1)
    images, cams = (uniform(x.shape, x.dtype, "contiguous", seed) for seed, x in enumerate((images, cams)))
    other_images, other_cams = (uniform(x.shape, x.dtype, layout, seed) for seed, x in enumerate((images, cams)))
    expected = refine_pseudo_labels(images, cams, labels, PAR())
    assert torch.equal(refine_pseudo_labels(other_images, other_cams, labels, PAR()), expected)


def test_gradcheck_of_the_maps() -> None:
    images, labels = torch.rand(2, 3, 5, 6), torch.tensor([[1, 0, 1], [0, 0, 0]])
    cams = torch.rand(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor([[0, 4, 1, 6], [1, 5, 0, 5]])
    for background in ((0.5, 0.2), PowerBackground(2.0)):
        for crop in (False, True):
            to_maps = PseudoLabels(PAR(DILATIONS, 2), background, crop=crop).labels_and_maps
            assert torch.autograd.gradcheck(lambda x, f=to_maps: f(images, x, labels, boxes)[1], cams)
    assert not refine_pseudo_labels(images, cams, labels, PAR()).requires_grad


@pytest.mark.parametrize("kind", ["pair", "map", "powers", "in the masks"])
@pytest.mark.parametrize("views", [None, 2])
def test_dynamo(kind: str, views: int | None) -> None:
    torch._dynamo.reset()
    images, labels, boxes = torch.rand(2, 3, 8, 9), torch.tensor([[1, 0, 1], [0, 1, 0]]), some_boxes(2, 8, 9, 0)
    shape = (2, *([] if views is None else [views]), 3 + (kind == "in the masks"), 5, 4)
    cams = torch.rand(shape)
    background, _ = backgrounds(kind, 2, 0)
    module = PseudoLabels(PAR(DILATIONS, 2), background, max_classes=2)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images, cams, labels, boxes), module(images, cams, labels, boxes))
    with_maps = torch.compile(module.labels_and_maps, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(
        with_maps(images, cams, labels), module.labels_and_maps(images, cams, labels), strict=True
    ):
        torch.testing.assert_close(actual, expected)


def test_dynamo_of_the_functions() -> None:
    torch._dynamo.reset()
    masks, labels, boxes = torch.rand(2, 4, 6, 7), torch.tensor([[1, 0, 1], [0, 1, 0]]), some_boxes(2, 6, 7, 0)

    def everything(masks: Tensor, labels: Tensor, boxes: Tensor) -> list[Tensor]:
        chosen = cam_to_label(masks[:, 1:], labels, (0.6, 0.3), boxes, max_classes=2)
        confident = [threshold_pseudo_labels(masks, labels, discard=d) for d in ("classes", "all", "none")]
        return [chosen, *confident, merge_labels(chosen, confident[-1]), normalise_cam(masks)]

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(masks, labels, boxes), everything(masks, labels, boxes), strict=True):
        torch.testing.assert_close(actual, expected)


def test_no_value_is_read_where_that_would_wait_for_a_device() -> None:
    # Tensors on "meta" have no values: whoever reads one fails.
    images, cams, labels = (torch.rand(s, device="meta") for s in ((2, 3, 8, 9), (2, 3, 4, 5), (2, 3)))
    boxes = torch.zeros(2, 4, dtype=torch.int64, device="meta")
    module = PseudoLabels(PAR(DILATIONS, 2, backend="eager"))
    result, maps = module.labels_and_maps(images, cams, labels, boxes)
    assert (result.device.type, result.shape, maps.shape) == ("meta", (2, 8, 9), (2, 2, 4, 8, 9))
    assert cam_to_label(cams, labels, boxes=boxes[:, :]).shape == (2, 4, 5)
    assert threshold_pseudo_labels(torch.rand(2, 4, 5, 6, device="meta"), labels).shape == (2, 5, 6)


class LargestTensor(TorchDispatchMode):
    """Notes the number of values of the largest tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and not func.is_view:
                self.values = max(self.values, tensor.numel())
        return result


def test_no_tensor_of_the_size_of_the_images_holds_all_classes() -> None:
    images, cams, labels = torch.rand(2, 3, 64, 48), torch.rand(2, 200, 64, 48), torch.zeros(2, 200)
    labels[0, 7] = labels[1, 8] = labels[1, 150] = 1
    with LargestTensor() as largest:
        refine_pseudo_labels(images, cams, labels, PAR(DILATIONS, 1))
        cam_to_label(cams, labels)
        threshold_pseudo_labels(cams, labels[:, 1:])
    assert 0 < largest.values <= 2 * 4 * 2 * 64 * 48


def test_more_classes_than_max_classes() -> None:
    images, cams, labels = torch.rand(2, 3, 8, 9), torch.rand(2, 3, 4, 5), torch.tensor([[1, 0, 1], [0, 1, 0]])
    expected = refine_pseudo_labels(images, cams, labels, PAR())
    for bound in (2, 3, 99):
        assert torch.equal(refine_pseudo_labels(images, cams, labels, PAR(), max_classes=bound), expected)
    with pytest.raises(ValueError, match="max_classes must be at least 2, the number of classes of an image, got 1"):
        refine_pseudo_labels(images, cams, labels, PAR(), max_classes=1)
    torch._dynamo.reset()
    compiled = torch.compile(PseudoLabels(PAR(), max_classes=1), fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="max_classes is exceeded"):
        compiled(images, cams, labels)


def test_module() -> None:
    images, cams, labels = problem(2, 4, 3)
    module = PseudoLabels(PAMR(2, DILATIONS), (0.6, 0.3), softmax=False, down_scale=1, ignore_index=-100, max_classes=4)
    expected = refine_pseudo_labels(
        images, cams, labels, module.refine, (0.6, 0.3), False, 1, ignore_index=-100, max_classes=4
    )
    for twin in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.half(), module.to("meta")):
        assert torch.equal(twin(images, cams, labels), expected)
    assert module.state_dict() == {}
    assert repr(PseudoLabels(None, PowerBackground(2.0))) == (
        "PseudoLabels(background=PowerBackground(power=2.0), softmax=True, down_scale=2, crop=False,"
        " align_corners=False, ignore_index=255, max_classes=None)"
    )
    assert "(refine): PAMR(num_iter=2" in repr(module)
    for part in (module, PowerBackground(2.0)):  # private modules may move, and pickles must still load
        assert b"wsseg_layers.pseudo_labels" in pickle.dumps(part)
        assert b"wsseg_layers._" not in pickle.dumps(part)


@given(st.integers(1, 3), st.integers(1, 4), sizes, st.sampled_from(["pair", "score", "per image", "map"]), seeds)
def test_cam_to_label(batch: int, classes: int, size: tuple[int, int], kind: str, seed: int) -> None:
    # Few values: many CAMs are equal to each other and to the thresholds.
    generator = np.random.default_rng(seed)
    cams = torch.from_numpy(generator.integers(0, 5, (batch, classes, *size)) / 4)
    labels, boxes = some_labels(batch, classes, seed), some_boxes(batch, *size, seed)
    thresholds = torch.from_numpy(generator.integers(0, 5, (batch, 1, *size)) / 4)
    per_image = thresholds[:, 0, 0, 0] + 0.25
    cases: dict[str, tuple[Any, list[Any]]] = {
        "score": (0.5, [(0.5, 0.5)] * batch),
        "pair": ((0.75, 0.25), [(0.75, 0.25)] * batch),
        "per image": ((per_image, 0.0), [(float(value), 0.0) for value in per_image]),
        "map": ((thresholds, 0.0), [(own, 0.0) for own in thresholds[:, 0].numpy()]),
    }
    background, scores = cases[kind]
    actual = cam_to_label(cams, labels, background, boxes, ignore_index=99)
    for b, (top, bottom, left, right) in enumerate(boxes.tolist()):
        expected = np.full(size, 99)
        inside = reference.cam_labels(exact(cams[b]), present(labels, b), scores[b][0], scores[b][1], ignore=99)
        expected[top:bottom, left:right] = inside[top:bottom, left:right]
        assert (actual[b].numpy() == expected).all()


@given(st.integers(1, 3), st.integers(1, 4), sizes, st.sampled_from(["classes", "all", "none"]), st.booleans(), seeds)
def test_threshold(batch: int, classes: int, size: tuple[int, int], discard: Any, bound: bool, seed: int) -> None:
    generator = np.random.default_rng(seed)
    masks = torch.from_numpy(generator.random((batch, 1 + classes, *size)))
    masks[generator.integers(batch)] *= 0.3  # an image that is nowhere confident
    labels = some_labels(batch, classes, seed)
    actual = threshold_pseudo_labels(masks, labels, 0.6, 0.7, 0.2, discard, max_classes=classes if bound else None)
    for b in range(batch):
        expected = reference.confident_labels(exact(masks[b]), present(labels, b), 0.6, 0.7, 0.2, discard, IGNORE)
        assert (actual[b].numpy() == expected).all()
    assert torch.equal(
        threshold_pseudo_labels(masks.masked_fill(of_absent(labels), torch.nan), labels, discard=discard), actual
    )


def of_absent(labels: Tensor) -> Tensor:
    """Where the masks [B, 1 + C, h, w] are those of absent classes."""
    return torch.nn.functional.pad(labels == 0, (1, 0))[:, :, None, None]


def test_threshold_by_hand() -> None:
    masks = torch.tensor([[[[0.8, 0.5, 0.9, 0.1]], [[0.2, 0.4, 0.8, 0.9]], [[0.9, 0.9, 0.9, 0.9]]]])
    assert threshold_pseudo_labels(masks, torch.tensor([[1, 0]])).tolist() == [[[0, 255, 255, 1]]]
    assert threshold_pseudo_labels(masks, torch.tensor([[1, 1]])).tolist() == [[[255, 255, 255, 255]]]
    assert threshold_pseudo_labels(masks, torch.tensor([[1, 1]]), discard="none").tolist() == [[[255, 2, 255, 255]]]
    only_classes = torch.tensor([[[[0.1, 0.1]], [[0.2, 0.9]]]])
    assert threshold_pseudo_labels(only_classes, torch.tensor([[1]])).tolist() == [[[255, 1]]]
    assert threshold_pseudo_labels(only_classes, torch.tensor([[1]]), discard="all").tolist() == [[[255, 255]]]


@given(map_shapes(), dtypes, layouts, seeds)
def test_normalise_cam(shape: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int) -> None:
    cams = uniform(shape, dtype, layout, seed)
    values = exact(cams)
    expected = np.zeros(shape)
    for b, c in np.ndindex(shape[:2]):
        shifted = values[b, c] - values[b, c].min()
        expected[b, c] = shifted / (shifted.max() + 1e-5)
    if dtype in (torch.float32, torch.float64):
        assert_close(normalise_cam(cams), expected, dtype, dtype)
    assert ((normalise_cam(cams) >= 0) & (normalise_cam(cams) <= 1)).all()


@pytest.mark.parametrize("flip", [False, True])
def test_multi_scale_cam(flip: bool) -> None:
    images = torch.rand(2, 3, 8, 12, dtype=torch.float64)
    kernel = torch.rand(4, 3, 2, 2, dtype=torch.float64) - 0.5

    def model(x: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x, kernel, stride=2)

    total = np.zeros((2, 4, 8, 12))
    for scale in (1.0, 0.5, 1.5):
        scaled = reference.resize(exact(images), int(8 * scale), int(12 * scale), align_corners=False)
        cams = [exact(model(torch.from_numpy(x.copy()))) for x in (scaled, scaled[..., ::-1])]
        straight, mirrored = (reference.resize(x, 8, 12, align_corners=False) for x in cams)
        total += np.maximum(0, np.maximum(straight, mirrored[..., ::-1]) if flip else straight)
    shifted = total - total.min(axis=(2, 3), keepdims=True)
    expected = shifted / (shifted.max(axis=(2, 3), keepdims=True) + 1e-5)
    actual = multi_scale_cam(model, images.requires_grad_(), flip=flip)
    assert not actual.requires_grad
    assert_close(actual, expected, torch.float64, torch.float64)
    with pytest.raises(ValueError, match="scales must hold at least one scale"):
        multi_scale_cam(model, images, [])
    with pytest.raises(ValueError, match=r"scales\[1\] must be positive, got 0"):
        multi_scale_cam(model, images, [1.0, 0])


RELEASED = os.environ.get("WSSEG_RELEASED")


@pytest.mark.skipif(RELEASED is None, reason="WSSEG_RELEASED does not name the folder of labels_toco.npz")
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_published_labels(backend: BackendName) -> None:
    with np.load(Path(str(RELEASED)) / "labels_toco.npz") as file:
        image, labels, boxes = (torch.from_numpy(file[name]) for name in ("image", "labels", "boxes"))
        cams_present, chosen, refined = (torch.from_numpy(file[n]) for n in ("cams_present", "cam_to_label", "refined"))
    cams = torch.zeros(*labels.shape, *image.shape[2:])
    cams[labels.bool()] = cams_present
    assert torch.equal(cam_to_label(cams, labels, (0.7, 0.25), boxes), chosen.long())
    actual = refine_pseudo_labels(image, cams, labels, PAR(backend=backend), (0.7, 0.25), boxes=boxes)
    assert (actual == refined).double().mean() >= 0.9999


CAMS = torch.rand(2, 3, 4, 5)
ARGUMENTS: dict[str, Any] = {
    "images": torch.rand(2, 3, 8, 9),
    "cams": torch.rand(2, 4, 5, 6),
    "labels": torch.ones(2, 4),
    "refine": PAR(DILATIONS, 1),
    "boxes": torch.tensor([[0, 8, 0, 9], [1, 2, 3, 4]]),
}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"images": torch.rand(3, 8, 9)}, ValueError, r"images must have 4 dimensions .* got shape \[3, 8, 9\]"),
        (
            {"images": torch.ones(2, 3, 8, 9).byte()},
            TypeError,
            r"images must be a floating-point tensor, got torch.uint8",
        ),
        ({"images": torch.rand(1, 3, 8, 9)}, ValueError, r"images and cams must have the same batch size"),
        ({"cams": torch.rand(4, 5, 6)}, ValueError, r"cams must have 4 dimensions .* or 5 .* got shape \[4, 5, 6\]"),
        ({"cams": torch.ones(2, 4, 5, 6).long()}, TypeError, r"cams must be a floating-point tensor, got torch.int64"),
        ({"cams": torch.rand(2, 4, 0, 6)}, ValueError, r"cams must have at least one channel and one pixel"),
        ({"cams": torch.rand(2, 4, 5, 6, device="meta")}, ValueError, r"must be on one device, got .*cams on meta"),
        ({"labels": [[1, 0, 0, 1]] * 2}, TypeError, r"labels must be a tensor of numbers or torch.bool, got list"),
        (
            {"labels": torch.ones(2, 5)},
            ValueError,
            r"labels must be \[B, C\] = \[2, 4\] for cams .* got shape \[2, 5\]",
        ),
        ({"labels": torch.ones(2, 4).to(torch.complex64)}, TypeError, r"labels must be .* got torch.complex64"),
        ({"labels": torch.ones(2, 4).to_sparse()}, TypeError, r"labels must be a dense tensor, got layout"),
        ({"background": None}, ValueError, r"labels must be \[B, C\] = \[2, 3\] for cams"),
        ({"background": None, "cams": torch.rand(2, 1, 5, 6)}, ValueError, r"cams must have a channel for the backgr"),
        ({"refine": "PAR"}, TypeError, r"refine must be a PAMR, a PAR or None, got str"),
        ({"background": (0.2, 0.7)}, ValueError, r"background must be a pair \(high, low\), got \[0.2, 0.7\]"),
        (
            {"background": (PowerBackground(4), PowerBackground(1))},
            ValueError,
            r"background must be a pair \(high, low\) of scores, whose powers are \(low, high\), got \[4, 1\]",
        ),
        ({"background": (0.2, 0.1, 0.0)}, ValueError, r"background must be a score or a pair .*, got 3 scores"),
        ({"background": "0.5"}, TypeError, r"background must be a number, a tensor, a PowerBackground or .*, got str"),
        ({"background": [0.7, 0.25]}, TypeError, r"background must be .* or a tuple \(high, low\) of two.*, got list"),
        ({"background": True}, TypeError, r"background must be a number, got bool"),
        ({"background": float("nan")}, ValueError, r"background must be finite"),
        ({"background": torch.rand(3)}, ValueError, r"background must be \[B\] or \[B, 1, h, w\] .*, got \[3\]"),
        ({"background": torch.rand(2, 4, 5, 6)}, ValueError, r"background must be \[B\] or .*, got \[2, 4, 5, 6\]"),
        ({"background": torch.ones(2).long()}, TypeError, r"background must be a floating-point tensor"),
        ({"background": torch.rand(2, device="meta")}, ValueError, r"cams and background must be on one device"),
        ({"softmax": 1}, TypeError, r"softmax must be True or False, got 1"),
        ({"down_scale": 0}, ValueError, r"down_scale must be at least 1, got 0"),
        ({"down_scale": 9}, ValueError, r"down_scale must be at most the height and width .*, got 9 for 8 x 9"),
        ({"down_scale": 0.5}, TypeError, r"down_scale must be an integer, got 0.5"),
        ({"boxes": [[0, 1, 0, 1]]}, TypeError, r"boxes must be an integer tensor .*, got list"),
        ({"boxes": torch.rand(2, 4)}, TypeError, r"boxes must be an integer tensor .*, got torch.float32"),
        (
            {"boxes": torch.ones(2, 4).to(torch.complex128)},
            TypeError,
            r"boxes must be an integer tensor .*, got torch.complex128",
        ),
        ({"boxes": torch.ones(2, 4).to(torch.uint16)}, TypeError, r"boxes must be an integer tensor .* torch.uint16"),
        ({"boxes": torch.ones(2, 4).long().to_sparse()}, TypeError, r"boxes must be a dense tensor, got layout"),
        ({"boxes": torch.zeros(2, 3).long()}, ValueError, r"boxes must be \[B, 4\] for images .* got shape \[2, 3\]"),
        ({"boxes": torch.tensor([[0, 9, 0, 9]] * 2)}, ValueError, r"boxes must hold 0 <= top .* got \[0, 9, 0, 9\]"),
        ({"boxes": torch.tensor([[5, 4, 0, 9]] * 2)}, ValueError, r"boxes must hold 0 <= top .* got \[5, 4, 0, 9\]"),
        ({"boxes": torch.zeros(2, 4, device="meta").long()}, ValueError, r"images and boxes must be on one device"),
        ({"boxes": None, "crop": True}, ValueError, r"boxes must be given with crop=True, got None"),
        (
            {"boxes": torch.zeros(2, 4, device="meta").long(), "crop": True},
            ValueError,
            r"boxes must be on the CPU with crop=True, got boxes on meta",
        ),
        ({"crop": "yes"}, TypeError, r"crop must be True or False, got 'yes'"),
        ({"align_corners": None}, TypeError, r"align_corners must be True or False, got None"),
        ({"ignore_index": 3}, ValueError, r"ignore_index must not be a label \(0 to 4\), got 3"),
        ({"ignore_index": 255.0}, TypeError, r"ignore_index must be an integer, got 255.0"),
        ({"ignore_index": 2**64}, ValueError, r"ignore_index must be in -9\d+ to 9\d+, the range of torch.int64, got"),
        ({"max_classes": 0}, ValueError, r"max_classes must be at least 1, got 0"),
    ],
)
def test_exception(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        refine_pseudo_labels(**{**ARGUMENTS, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"refine": torch.nn.Identity()}, TypeError, "refine must be a PAMR, a PAR or None, got Identity"),
        ({"background": (0.2, 0.7)}, ValueError, r"background must be a pair \(high, low\), got \[0.2, 0.7\]"),
        (
            {"background": (PowerBackground(4), PowerBackground(1))},
            ValueError,
            r"background must be a pair \(high, low\) of scores, whose powers are \(low, high\), got \[4, 1\]",
        ),
        ({"softmax": None}, TypeError, "softmax must be True or False, got None"),
        ({"down_scale": 0}, ValueError, "down_scale must be at least 1, got 0"),
        ({"crop": 1}, TypeError, "crop must be True or False, got 1"),
        ({"align_corners": "no"}, TypeError, "align_corners must be True or False, got 'no'"),
        ({"ignore_index": None}, TypeError, "ignore_index must be an integer, got None"),
        ({"max_classes": 0}, ValueError, "max_classes must be at least 1, got 0"),
    ],
)
def test_exception_of_the_constructor(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PseudoLabels(**{"refine": None, **arguments})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: PowerBackground(0), ValueError, "power must be positive, got 0"),
        (lambda: cam_to_label(torch.rand(2, 3, 4, 5), torch.ones(2, 4)), ValueError, r"labels must be \[B, C\] = "),
        (lambda: threshold_pseudo_labels(torch.rand(2, 3, 4, 5), torch.ones(2, 3)), ValueError, "labels must be"),
        (lambda: threshold_pseudo_labels(torch.rand(2, 1, 4, 5), torch.ones(2, 0)), ValueError, "masks must have a ch"),
        (
            lambda: threshold_pseudo_labels(torch.rand(2, 3, 4, 5), torch.ones(2, 2), floor=-1),
            ValueError,
            "floor must be at least 0, got -1",
        ),
        (
            lambda: threshold_pseudo_labels(torch.rand(2, 3, 4, 5), torch.ones(2, 2), discard="some"),  # type: ignore[arg-type]
            ValueError,
            "discard must be one of 'classes', 'all', 'none', got 'some'",
        ),
        (lambda: merge_labels(torch.rand(2), torch.ones(2).long()), TypeError, "high must be an integer tensor"),
        (
            lambda: merge_labels(torch.ones(2).to(torch.complex128), torch.ones(2).to(torch.complex128)),
            TypeError,
            "got torch.complex128",
        ),
        (
            lambda: merge_labels(torch.ones(2).byte(), torch.ones(2).byte(), -1),
            ValueError,
            "ignore_index must be in 0 to 255, the range of torch.uint8, got -1",
        ),
        (lambda: merge_labels(torch.ones(2).char(), torch.ones(2).char()), ValueError, "in -128 to 127, the range of"),
        (lambda: merge_labels(torch.ones(2).long(), torch.ones(2).long(), 0), ValueError, "ignore_index must not be 0"),
        (lambda: merge_labels(torch.ones(2).long(), torch.ones(3).long()), ValueError, "must have the same shape"),
        (lambda: normalise_cam(torch.rand(2, 3)), ValueError, "cams must have 4 dimensions"),
        (lambda: normalise_cam(torch.rand(1, 1, 2, 3), 0), ValueError, "eps must be positive, got 0"),
        (lambda: multi_scale_cam(CAMS.mul, CAMS, 1.0), TypeError, "scales must be a sequence of numbers, got float"),  # type: ignore[arg-type]
        (lambda: multi_scale_cam(lambda _: None, CAMS), TypeError, "the result of model must be a torch.Tensor"),  # type: ignore[arg-type,return-value]
        (lambda: multi_scale_cam(lambda x: x[0], CAMS), ValueError, "the result of model must have 4 dimensions"),
        (
            lambda: multi_scale_cam(lambda x: x[:2], CAMS),
            ValueError,
            r"model must return CAMs for 4 images, half of them mirrored, got shape \[2, 3, 4, 5\]",
        ),
        (
            lambda: multi_scale_cam(lambda x: x[:, :, :0], CAMS),
            ValueError,
            r"the result of model must have at least one channel and one pixel, got shape \[4, 3, 0, 5\]",
        ),
        (
            lambda: multi_scale_cam(lambda x: x[:, : x.shape[-1] // 2], CAMS),
            ValueError,
            "model must return as many channels at every scale, got 2 and 1",
        ),
    ],
)
def test_exception_of_the_small_functions(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("max_classes", [None, 3])
def test_labels_under_vmap(max_classes: int | None) -> None:
    masks = torch.rand(3, 2, 5, 6, 7)
    labels = (torch.rand(3, 2, 4) > 0.5).long()

    def rule(one: Tensor, present: Tensor) -> Tensor:
        return threshold_pseudo_labels(one, present, discard="none", max_classes=max_classes)

    labels[..., 0] = 0  # no image has more than three classes
    expected = torch.stack([rule(one, present) for one, present in zip(masks, labels, strict=True)])
    assert torch.equal(torch.vmap(rule)(masks, labels), expected)
