import copy
import pickle
from typing import Literal

import pytest
import torch
from hypothesis import given
from torch import nn

from tests import reference
from tests.strategies import DTYPES, assert_close, dtypes, exact, layouts, map_shapes, normal, seeds
from wsseg_layers import GCI
from wsseg_layers.functional import global_cue_injection

Norm = Literal["batch", "instance"]
NORMS: tuple[Norm, ...] = ("batch", "instance")


def trained(module: GCI) -> GCI:
    """Give the BatchNorms statistics and affine parameters that make a difference."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            if layer.affine:
                nn.init.normal_(layer.weight)
                nn.init.normal_(layer.bias)
    return module


@pytest.mark.parametrize("norm", NORMS)
def test_smoke(device: torch.device, norm: Norm) -> None:
    module = GCI(8, norm=norm).to(device)
    augmented = module(torch.randn(2, 8, 5, 4, device=device), torch.randn(2, 8, 5, 4, device=device))
    assert augmented.device.type == device.type
    assert f"in_channels=8, shallow_channels=8, out_channels=8, norm={norm!r}" in repr(module)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("shallow_channels", "out_channels", "shallow_size", "deep_size"),
    [(None, None, (6, 9), (6, 9)), (3, None, (6, 9), (1, 1)), (None, 5, (1, 7), (2, 2)), (16, 1, (5, 5), (9, 8))],
)
def test_cardinality(
    norm: Norm,
    shallow_channels: int | None,
    out_channels: int | None,
    shallow_size: tuple[int, int],
    deep_size: tuple[int, int],
) -> None:
    module = GCI(8, shallow_channels, out_channels, norm)
    augmented = module(torch.randn(2, shallow_channels or 8, *shallow_size), torch.randn(2, 8, *deep_size))
    assert augmented.shape == (2, out_channels or 8, *shallow_size)


def test_default_is_the_released_form() -> None:
    assert GCI().norm == "batch"
    assert GCI().in_channels == GCI().shallow_channels == GCI().out_channels == 256


def test_released_keys_and_shapes() -> None:
    # The authors' network has the same three blocks, as `fc_deep`, `fc_skip` and `fc_cls`.
    shapes = {key: list(value.shape) for key, value in GCI(256, 128).state_dict().items() if value.ndim}
    assert shapes == {
        "deep.0.weight": [512, 256, 1, 1],
        **{f"deep.1.{name}": [512] for name in ("weight", "bias", "running_mean", "running_var")},
        "shallow.0.weight": [256, 128, 1, 1],
        **{f"shallow.1.{name}": [256] for name in ("running_mean", "running_var")},
        "project.0.weight": [256, 256, 1, 1],
        **{f"project.1.{name}": [256] for name in ("weight", "bias", "running_mean", "running_var")},
    }


def test_no_bias_before_a_normalisation() -> None:
    keys = GCI(4, 3, norm="instance").state_dict().keys()
    assert keys == {"deep.weight", "deep.bias", "shallow.weight", "project.weight", "project.bias"}


@given(map_shapes(), map_shapes(), dtypes, dtypes, layouts, seeds)
def test_reference_functional(
    device: torch.device,
    shape: tuple[int, ...],
    deep_shape: tuple[int, ...],
    dtype: torch.dtype,
    cues_dtype: torch.dtype,
    layout: str,
    seed: int,
) -> None:
    batch, channels = shape[:2]
    shallow = normal(shape, dtype, layout, seed)
    cues = normal((batch, 2 * channels, *deep_shape[2:]), cues_dtype, layout, seed + 1)
    # A large eps: hypothesis finds channels of nearly constant value, where 1e-5 only magnifies rounding.
    expected = reference.global_cue_injection(exact(shallow), exact(cues), eps=0.1)
    augmented = global_cue_injection(shallow.to(device), cues.to(device), eps=0.1)
    assert_close(augmented, expected, dtype=dtype, precision=torch.float32 if dtype == torch.float64 else dtype)


def test_reference_functional_default_eps() -> None:
    shallow, cues = torch.randn(2, 3, 6, 5, dtype=torch.float64), torch.randn(2, 6, 4, 4, dtype=torch.float64)
    expected = reference.global_cue_injection(exact(shallow), exact(cues), eps=1e-5)
    assert_close(global_cue_injection(shallow, cues), expected, dtype=torch.float64, precision=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reference_functional_far_from_zero(device: torch.device, dtype: torch.dtype) -> None:
    # The mean must not be rounded to half precision before it is taken off.
    shallow, cues = (100 + 3 * torch.randn(2, 3, 6, 5)).to(dtype), torch.randn(2, 6, 4, 4).to(dtype)
    expected = reference.global_cue_injection(exact(shallow), exact(cues), eps=1e-5)
    actual = global_cue_injection(shallow.to(device), cues.to(device))
    assert_close(actual, expected, dtype=dtype, precision=dtype)


@pytest.mark.parametrize("shallow_channels", [4, 3])
def test_reference_instance(shallow_channels: int) -> None:
    module = GCI(4, shallow_channels, out_channels=5, norm="instance").double()
    shallow, deep = (torch.randn(2, c, 6, 7, dtype=torch.float64) for c in (shallow_channels, 4))
    state = {key: exact(value) for key, value in module.state_dict().items()}
    features = exact(shallow)
    if shallow_channels != 4:
        features = reference.convolution_1x1(features, state["shallow.weight"][:, :, 0, 0])
    cues = reference.convolution_1x1(exact(deep), state["deep.weight"][:, :, 0, 0], state["deep.bias"])
    augmented = reference.global_cue_injection(features, cues, eps=1e-5)
    expected = reference.convolution_1x1(augmented, state["project.weight"][:, :, 0, 0], state["project.bias"])
    assert_close(module(shallow, deep), expected, dtype=torch.float64, precision=torch.float64)


@pytest.mark.parametrize("shallow_channels", [4, 3])
def test_reference_batch(shallow_channels: int) -> None:
    module = trained(GCI(4, shallow_channels, out_channels=5)).double().eval()
    shallow, deep = (torch.randn(2, c, 6, 7, dtype=torch.float64) for c in (shallow_channels, 4))
    state = {key: exact(value) for key, value in module.state_dict().items()}
    expected = reference.gci_batch(exact(shallow), exact(deep), state, eps=1e-5)
    assert_close(module(shallow, deep), expected, dtype=torch.float64, precision=torch.float64)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(device: torch.device, norm: Norm, dtype: torch.dtype) -> None:
    module = GCI(4, 3, norm=norm).to(device, dtype).eval()
    shallow, deep = (torch.randn(2, c, 6, 7, dtype=dtype, device=device) for c in (3, 4))
    expected = copy.deepcopy(module).double()(shallow.double(), deep.double())
    assert_close(module(shallow, deep), exact(expected), dtype=dtype, precision=dtype)


@pytest.mark.parametrize("norm", NORMS)
def test_autocast(device: torch.device, norm: Norm) -> None:
    module = GCI(4, 3, norm=norm).to(device).eval()
    shallow, deep = torch.randn(2, 3, 6, 7, device=device), torch.randn(2, 4, 5, 5, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        augmented = module(shallow, deep)
    assert_close(augmented.float(), exact(module(shallow, deep)), dtype=torch.float32, precision=torch.bfloat16)


@pytest.mark.parametrize("norm", NORMS)
def test_only_the_maximum_of_deep_features_matters(norm: Norm) -> None:
    module = GCI(4, norm=norm).eval()
    shallow, deep = torch.randn(2, 4, 6, 7), torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(module(shallow, deep.flip(2, 3)), module(shallow, deep))


@given(seeds)
def test_instance_ignores_affine_changes_of_shallow(seed: int) -> None:
    shallow = normal((2, 3, 6, 7), torch.float64, "contiguous", seed)
    cues = normal((2, 6, 6, 7), torch.float64, "contiguous", seed + 1)
    torch.testing.assert_close(
        global_cue_injection(3 * shallow - 2, cues, eps=0), global_cue_injection(shallow, cues, eps=0)
    )


def test_constant_channel_gives_the_shift() -> None:
    cues = torch.randn(1, 6, 4, 4)
    augmented = global_cue_injection(torch.full((1, 3, 5, 5), 7.0), cues)
    torch.testing.assert_close(augmented, cues.amax((2, 3), keepdim=True)[:, 3:].relu().expand(1, 3, 5, 5))


def test_gradcheck_functional(device: torch.device) -> None:
    shallow = torch.randn(2, 2, 3, 4, dtype=torch.float64, device=device, requires_grad=True)
    cues = torch.randn(2, 4, 2, 3, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(global_cue_injection, (shallow, cues))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(device: torch.device, norm: Norm, training: bool) -> None:
    module = GCI(2, 3, norm=norm).double().to(device).train(training)
    shallow = torch.randn(2, 3, 3, 4, dtype=torch.float64, device=device, requires_grad=True)
    deep = torch.randn(2, 2, 2, 3, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(module, (shallow, deep))


@pytest.mark.parametrize("norm", NORMS)
def test_every_parameter_learns(norm: Norm) -> None:
    module = GCI(4, 3, norm=norm)
    (module(torch.randn(2, 3, 6, 7), torch.randn(2, 4, 5, 5)) * torch.randn(2, 4, 6, 7)).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("norm", NORMS)
def test_dynamo(device: torch.device, norm: Norm) -> None:
    module = GCI(4, 3, norm=norm).to(device).eval()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    shallow, deep = torch.randn(2, 3, 6, 7, device=device), torch.randn(2, 4, 5, 5, device=device)
    torch.testing.assert_close(compiled(shallow, deep), module(shallow, deep))


def test_module_equals_functional() -> None:
    module = GCI(4, norm="instance")
    shallow, deep = torch.randn(2, 4, 6, 7), torch.randn(2, 4, 5, 5)
    assert torch.equal(module(shallow, deep), module.project(global_cue_injection(shallow, module.deep(deep))))


@pytest.mark.parametrize("norm", NORMS)
def test_copies_and_state_dict(norm: Norm) -> None:
    module = trained(GCI(4, 3, norm=norm)).eval()
    shallow, deep = torch.randn(2, 3, 6, 7), torch.randn(2, 4, 5, 5)
    restored = GCI(4, 3, norm=norm).eval()
    restored.load_state_dict(module.state_dict())
    for copied in (restored, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(shallow, deep), module(shallow, deep))


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_replica_without_parameters(norm: Norm) -> None:
    # nn.DataParallel makes such copies: their weights are plain tensors.
    module = GCI(4, norm=norm).eval()
    replica = copy.deepcopy(module)
    for part in replica.modules():
        for name in [name for name, weight in part._parameters.items() if weight is not None]:
            weight = part._parameters.pop(name)
            assert weight is not None
            part.__dict__[name] = weight.detach()
    features = torch.rand(2, 4, 5, 6)
    assert torch.equal(replica(features, features), module(features, features))


def test_exception() -> None:
    module = GCI(4, 3)
    shallow, deep = torch.randn(2, 3, 6, 7), torch.randn(2, 4, 5, 5)
    with pytest.raises(ValueError, match=r"shallow must have 3 channels, got shape \[2, 4, 5, 5\]"):
        module(deep, shallow)
    with pytest.raises(ValueError, match=r"deep must have 4 channels, got shape \[2, 3, 6, 7\]"):
        module(shallow, shallow)
    with pytest.raises(ValueError, match=r"shallow and deep must have the same batch size, got .*deep \[1, 4, 5, 5\]"):
        module(shallow, deep[:1])
    with pytest.raises(ValueError, match="deep and the module's weights must be on one device, got deep on meta"):
        module(shallow, deep.to("meta"))
    with pytest.raises(ValueError, match=r"deep must have 4 dimensions .* got shape \[4\]"):
        module(shallow, deep[0, :, 0, 0])
    with pytest.raises(TypeError, match=r"shallow must be a floating-point tensor, got torch\.int32"):
        module(shallow.int(), deep)


def test_exception_functional() -> None:
    shallow = torch.randn(2, 3, 6, 7)
    with pytest.raises(ValueError, match=r"cues must have twice the channels of shallow \[2, 3, 6, 7\]"):
        global_cue_injection(shallow, shallow)
    with pytest.raises(ValueError, match="shallow and cues must have the same batch size"):
        global_cue_injection(shallow, torch.randn(1, 6, 6, 7))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"in_channels": 0}, ValueError, "in_channels must be at least 1, got 0"),
        ({"in_channels": 2.5}, TypeError, "in_channels must be an integer, got 2.5"),
        ({"shallow_channels": -1}, ValueError, "shallow_channels must be at least 1, got -1"),
        ({"out_channels": 0}, ValueError, "out_channels must be at least 1, got 0"),
        ({"norm": "layer"}, ValueError, "norm must be one of 'batch', 'instance', got 'layer'"),
    ],
)
def test_exception_parameters(arguments: dict[str, int], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GCI(**arguments)  # type: ignore[arg-type]
