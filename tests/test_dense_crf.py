import subprocess
import sys
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from tests import reference
from tests.strategies import CPU_BACKENDS, assert_close, dtypes, exact, layouts, map_shapes, seeds, uniform
from wsseg_layers import DenseCRF
from wsseg_layers.functional import dense_crf
from wsseg_layers.kernels import BackendName

few = settings(max_examples=10)
backends = st.sampled_from(CPU_BACKENDS)
# For tiny images in 0 to 1. No pixel lies between two simplices of the lattice, where rounding would choose one.
SMALL: dict[str, Any] = {
    "gaussian_sigma_xy": 0.9,
    "gaussian_weight": 1.5,
    "bilateral_sigma_xy": 2.9,
    "bilateral_sigma_rgb": 0.37,
    "bilateral_weight": 2.5,
}


def expected_marginals(logits: Tensor, image: Tensor, num_iter: int, backend: str) -> Tensor:
    weigh = reference.lattice_weights if backend == "cpp" else reference.gaussian_weights
    size = (logits.shape[2], logits.shape[3])
    results = []
    for b in range(len(logits)):
        terms = [
            (1.5, reference.normalised_weights(weigh(None, size, 0.9, 1.0))),
            (2.5, reference.normalised_weights(weigh(exact(image[b]), size, 2.9, 0.37))),
        ]
        results.append(torch.from_numpy(reference.mean_field(exact(logits[b]), terms, num_iter)))
    return torch.stack(results)


@few
@given(map_shapes(max_side=6), st.integers(0, 3), backends, dtypes, layouts, seeds)
def test_equals_the_definition(
    shape: tuple[int, ...], num_iter: int, backend: BackendName, dtype: torch.dtype, layout: str, seed: int
) -> None:
    image = uniform((shape[0], 3, *shape[2:]), torch.float32, layout, seed)
    scores = uniform(shape, dtype, layout, seed + 1)
    expected = expected_marginals(scores.double().clamp(min=1e-5).log(), image, num_iter, backend)
    actual = dense_crf(image, scores, num_iter, **SMALL, backend=backend)
    assert actual.is_contiguous()
    precision = torch.float32 if backend == "cpp" and dtype == torch.float64 else dtype
    assert_close(actual, expected.numpy(), dtype=dtype, precision=precision)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("channels", [3, 6, 12, 21, 30, 40])
def test_any_number_of_classes(channels: int, backend: BackendName) -> None:
    image, logits = torch.rand(1, 3, 5, 6), 3 * torch.randn(1, channels, 5, 6)
    expected = expected_marginals(logits, image, 3, backend)
    actual = dense_crf(image, logits, 3, **SMALL, inputs="logits", backend=backend)
    assert_close(actual, expected.numpy(), dtype=torch.float32, precision=torch.float32)


@few
@given(map_shapes(max_channels=4), backends, seeds)
def test_sums_to_1_and_one_class_is_certain(shape: tuple[int, ...], backend: BackendName, seed: int) -> None:
    image = uniform((shape[0], 3, *shape[2:]), torch.float32, "contiguous", seed)
    logits = 20 * uniform(shape, torch.float32, "contiguous", seed + 1)
    marginals = dense_crf(image, logits, 3, **SMALL, inputs="logits", backend=backend)
    torch.testing.assert_close(marginals.sum(dim=1), torch.ones(shape[0], *shape[2:]))
    one = dense_crf(image, logits[:, :1], 3, **SMALL, inputs="logits", backend=backend)
    assert torch.equal(one, torch.ones_like(one))


@few
@given(map_shapes(max_channels=6), backends, seeds)
def test_order_of_classes_does_not_matter(shape: tuple[int, ...], backend: BackendName, seed: int) -> None:
    image = uniform((shape[0], 3, *shape[2:]), torch.float32, "contiguous", seed)
    scores = uniform(shape, torch.float32, "contiguous", seed + 1)
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(seed))
    actual = dense_crf(image, scores[:, order], 3, **SMALL, backend=backend)
    torch.testing.assert_close(actual, dense_crf(image, scores, 3, **SMALL, backend=backend)[:, order])


@few
@given(map_shapes(max_channels=3), st.sampled_from([(2,), (3,), (2, 3)]), seeds)
def test_flips_flip_the_result(shape: tuple[int, ...], dims: tuple[int, ...], seed: int) -> None:
    # Exact sums only: the lattice has a place, and a flipped image another in it.
    image = uniform((shape[0], 3, *shape[2:]), torch.float32, "contiguous", seed)
    scores = uniform(shape, torch.float32, "contiguous", seed + 1)
    actual = dense_crf(image.flip(dims), scores.flip(dims), 3, **SMALL, backend="eager")
    torch.testing.assert_close(actual, dense_crf(image, scores, 3, **SMALL, backend="eager").flip(dims))


@pytest.mark.skipif("cpp" not in CPU_BACKENDS, reason="no C++ compiler")
def test_flips_on_the_lattice() -> None:
    differences, equal = [], []
    for seed in range(5):
        torch.manual_seed(seed)
        image = 255 * F.interpolate(torch.rand(1, 3, 6, 7), size=(50, 60), mode="bilinear")
        scores = F.interpolate(2 * torch.randn(1, 3, 5, 6), size=(50, 60), mode="bilinear").softmax(dim=1)
        expected = DenseCRF(backend="cpp")(image, scores)
        for dims in ((2,), (3,), (2, 3)):
            actual = DenseCRF(backend="cpp")(image.flip(dims), scores.flip(dims)).flip(dims)
            differences.append((actual - expected).abs().mean())
            equal.append((actual.argmax(dim=1) == expected.argmax(dim=1)).float().mean())
    assert sum(differences) / len(differences) < 0.02
    assert sum(equal) / len(equal) > 0.97


@few
@given(map_shapes(max_channels=4), st.sampled_from([0.0, 0.3, 200.0]), seeds)
def test_in_a_constant_image_only_position_counts(shape: tuple[int, ...], value: float, seed: int) -> None:
    # Exact sums only: the lattice of position and colour is another one than that of position alone.
    image = torch.full((shape[0], 3, *shape[2:]), value)
    scores = uniform(shape, torch.float32, "contiguous", seed)
    actual = dense_crf(image, scores, 3, 1.0, 0.0, 1.7, 0.1, 2.5, backend="eager")
    expected = dense_crf(torch.rand_like(image), scores, 3, 1.7, 2.5, 1.0, 1.0, 0.0, backend="eager")
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("shape", [(1, 2, 1, 700), (2, 3, 700, 1), (1, 21, 1, 1)])
def test_lines_and_pixels(shape: tuple[int, ...], backend: BackendName) -> None:
    image = 255 * torch.rand(shape[0], 3, *shape[2:])
    marginals = DenseCRF(backend=backend)(image, torch.rand(shape))
    assert marginals.shape == shape
    torch.testing.assert_close(marginals.sum(dim=1), torch.ones(shape[0], *shape[2:]))


@pytest.mark.parametrize("given_classes", [False, True])
@pytest.mark.parametrize("inputs", ["probabilities", "logits"])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_nan_is_not_hidden(backend: BackendName, inputs: Any, given_classes: bool) -> None:
    image, scores = torch.rand(2, 3, 6, 7), torch.rand(2, 3, 6, 7)
    classes = torch.ones(2, 3, dtype=torch.bool) if given_classes else None
    crf = DenseCRF(2, **SMALL, inputs=inputs, backend=backend)
    expected = crf(image, scores, classes)
    broken = scores.clone()
    broken[1, 0, 2, 3] = torch.nan
    found = crf(image, broken, classes)
    assert found[1, :, 2, 3].isnan().all()
    assert torch.equal(found[0], expected[0])
    broken_image = image.clone()
    broken_image[1, 2, 0, 0] = torch.inf
    found = crf(broken_image, scores, classes)
    assert found[1].isnan().all()
    assert torch.equal(found[0], expected[0])


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory as Linux reports it")
@pytest.mark.skipif("cpp" not in CPU_BACKENDS, reason="no C++ compiler: exact sums of 12 million pixels take hours")
def test_12_million_pixels_need_less_than_2_gigabytes() -> None:
    # Not getrusage: a new process starts with the peak of its parent there.
    code = """import torch
from pathlib import Path
from torch.nn.functional import interpolate
from wsseg_layers import DenseCRF
def memory(name):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])
crf = DenseCRF(1)
crf(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8))
image, scores = (interpolate(torch.rand(1, 3, 60, 80), size=(3000, 4000), mode="bilinear") for _ in range(2))
image.mul_(255)
before = memory("VmRSS")
marginals = crf(image, scores)
print(memory("VmHWM") - before)
assert marginals.isfinite().all()
"""
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert 0.5e9 < int(result.stdout) < 2e9


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_constant_image_is_smoothed_by_position(backend: BackendName) -> None:
    image = torch.full((1, 3, 30, 40), 128.0)
    scores = torch.full((1, 2, 30, 40), 0.2)
    scores[:, 0, 10:20, 10:30] = scores[:, 1, :10] = scores[:, 1, 20:] = 0.8
    scores[0, :, 15, 20] = torch.tensor([0.4, 0.6])  # a hole
    marginals = DenseCRF(bilateral_weight=0, backend=backend)(image, scores)
    assert marginals[0, 0, 15, 20] > 0.8
    assert (marginals[0, 1, :8] > 0.9).all()
    constant = DenseCRF(backend=backend)(image, torch.tensor([0.7, 0.3]).view(1, 2, 1, 1).expand(1, 2, 30, 40))
    assert (constant[:, 0] > 0.99).all()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("inputs", ["probabilities", "logits"])
def test_gradient_of_the_scores(inputs: Any, backend: BackendName) -> None:
    image = torch.rand(2, 3, 4, 3)
    scores = (0.05 + torch.rand(2, 3, 4, 3, dtype=torch.float64)).requires_grad_()

    def refine(scores: Tensor) -> Tensor:
        return dense_crf(image, scores, 3, **SMALL, inputs=inputs, backend=backend)

    assert torch.autograd.gradcheck(refine, scores)
    (gradient,) = torch.autograd.grad(refine(scores).square().sum(), scores, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        gradient.sum().backward()


def test_gradient_in_single_precision_is_that_of_double() -> None:
    image, scores = torch.rand(1, 3, 9, 8), torch.rand(1, 4, 9, 8)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaf = scores.detach().to(dtype, copy=True).requires_grad_()
        DenseCRF(3, **SMALL)(image, leaf)[:, 0].sum().backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad.double())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("inputs", ["probabilities", "logits"])
def test_only_present_classes_compete(inputs: Any, backend: BackendName) -> None:
    image, scores = torch.rand(3, 3, 7, 8), torch.rand(3, 6, 7, 8, requires_grad=True)
    classes = torch.tensor([[1, 0, 1, 0, 0, 1], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    actual = DenseCRF(3, **SMALL, inputs=inputs, backend=backend)(image, scores, classes)
    for b in range(2):
        kept = classes[b].nonzero().flatten()
        alone = dense_crf(image[b : b + 1], scores[b : b + 1, kept], 3, **SMALL, inputs=inputs, backend=backend)
        torch.testing.assert_close(actual[b : b + 1, kept], alone)
    assert (actual[~classes] == 0).all()
    (gradient,) = torch.autograd.grad(actual.square().sum(), scores)
    assert gradient.isfinite().all()
    assert (gradient[~classes] == 0).all()
    assert gradient[0, 0].abs().max() > 0


@pytest.mark.parametrize("given_classes", [False, True])
def test_compiles_without_a_graph_break(given_classes: bool) -> None:
    module = DenseCRF(2, **SMALL)
    classes = torch.tensor([[True, False, True], [True, True, True]]) if given_classes else None
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    image, scores = torch.rand(2, 3, 6, 7), torch.rand(2, 3, 6, 7, requires_grad=True)
    torch.testing.assert_close(compiled(image, scores, classes), module(image, scores, classes))
    expected = torch.autograd.grad(module(image, scores, classes).square().sum(), scores)
    torch.testing.assert_close(torch.autograd.grad(compiled(image, scores, classes).square().sum(), scores), expected)


@pytest.mark.parametrize("off", ["gaussian_weight", "bilateral_weight"])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_term_of_weight_0_is_left_out(off: str, backend: BackendName) -> None:
    image, scores = torch.rand(1, 3, 6, 7), torch.rand(1, 3, 6, 7)
    none = dense_crf(image, scores, 2, **{**SMALL, "gaussian_weight": 0, "bilateral_weight": 0}, backend=backend)
    torch.testing.assert_close(none, scores / scores.sum(dim=1, keepdim=True))
    one = dense_crf(image, scores, 2, **{**SMALL, off: 0}, backend=backend)
    little = dense_crf(image, scores, 2, **{**SMALL, off: 1e-7}, backend=backend)
    torch.testing.assert_close(one, little, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(one, none, atol=1e-3)


def test_an_empty_batch() -> None:
    result = DenseCRF()(torch.rand(0, 3, 6, 7), torch.rand(0, 3, 6, 7))
    assert result.shape == (0, 3, 6, 7)


def test_the_module_is_its_arguments() -> None:
    module = DenseCRF(3, **SMALL, inputs="logits", floor=1e-3, backend="eager")
    assert not module.state_dict()
    assert "num_iter=3, gaussian_sigma_xy=0.9" in repr(module)
    image, scores = torch.rand(1, 3, 6, 7), torch.rand(1, 3, 6, 7)
    expected = dense_crf(image, scores, 3, **SMALL, inputs="logits", floor=1e-3, backend="eager")
    assert torch.equal(module(image, scores), expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_iter": -1}, ValueError, "num_iter must be at least 0, got -1"),
        ({"num_iter": 2.0}, TypeError, "num_iter must be an integer"),
        ({"gaussian_sigma_xy": 0}, ValueError, "gaussian_sigma_xy must be positive, got 0"),
        ({"bilateral_sigma_xy": -1}, ValueError, "bilateral_sigma_xy must be positive"),
        ({"bilateral_sigma_rgb": None}, TypeError, "bilateral_sigma_rgb must be a number"),
        ({"gaussian_weight": -1}, ValueError, "gaussian_weight must be at least 0"),
        ({"bilateral_weight": float("inf")}, ValueError, "bilateral_weight must be finite"),
        ({"inputs": "energies"}, ValueError, "inputs must be one of 'probabilities', 'logits', got 'energies'"),
        ({"floor": 0.0}, ValueError, "floor must be positive, got 0.0"),
        ({"floor": 1.0}, ValueError, "floor must be below 1, got 1.0"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ],
)
def test_wrong_settings(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DenseCRF(**arguments)
    with pytest.raises(error, match=message):
        dense_crf(torch.rand(1, 3, 4, 5), torch.rand(1, 2, 4, 5), **arguments)


@pytest.mark.parametrize(
    ("image", "scores", "classes", "error", "message"),
    [
        ((1, 3, 4, 5), (1, 2, 4, 6), None, ValueError, "image and scores must have the same height and width"),
        ((2, 3, 4, 5), (1, 2, 4, 5), None, ValueError, "image and scores must have the same batch size"),
        ((1, 1, 4, 5), (1, 2, 4, 5), None, ValueError, "image must have 3 channels"),
        ((1, 3, 4, 5), (2, 4, 5), None, ValueError, "scores must have 4 dimensions"),
        ((1, 3, 4, 5), (1, 0, 4, 5), None, ValueError, "scores must have at least one channel"),
        ((1, 3, 4, 5), (1, 2, 4, 5), torch.ones(1, 3).bool(), ValueError, r"classes must be \[B, C\]"),
        ((1, 3, 4, 5), (1, 2, 4, 5), torch.ones(1, 2), TypeError, "classes must be a torch.bool tensor"),
    ],
)
def test_wrong_tensors(
    image: tuple[int, ...], scores: tuple[int, ...], classes: Tensor | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        DenseCRF()(torch.rand(image), torch.rand(scores), classes)
