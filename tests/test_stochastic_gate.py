import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch.utils.checkpoint import checkpoint

from tests import reference
from tests.strategies import assert_close, dtypes, exact, layouts, map_shapes, normal, seeds
from wsseg_layers import StochasticGate
from wsseg_layers.functional import stochastic_gate

rates = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9])


def test_smoke(device: torch.device) -> None:
    gate = StochasticGate().to(device)
    assert repr(gate) == "StochasticGate(mixing_rate=0.3, mode='stochastic')"
    assert gate(torch.rand(2, 3, device=device), torch.rand(2, 3, device=device)).device.type == device.type


@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (1, 1, 1, 1), (2, 256, 5, 7), (2, 3, 4, 5, 6), (0, 3, 4, 4)])
@pytest.mark.parametrize("training", [True, False])
def test_cardinality(shape: tuple[int, ...], training: bool) -> None:
    gate = StochasticGate().train(training)
    assert gate(torch.randn(shape), torch.randn(shape)).shape == shape


def test_calls_with_changing_shapes() -> None:
    gate = StochasticGate()
    for shape in [(4, 8, 9, 9), (1, 8, 9, 9), (3, 8, 5, 7)]:
        assert gate(torch.randn(shape), torch.randn(shape)).shape == shape


@given(map_shapes(), rates, dtypes, layouts, layouts, seeds)
def test_reference_training(
    device: torch.device,
    shape: tuple[int, ...],
    mixing_rate: float,
    dtype: torch.dtype,
    deep_layout: str,
    shallow_layout: str,
    seed: int,
) -> None:
    deep, shallow = normal(shape, dtype, deep_layout, seed), normal(shape, dtype, shallow_layout, seed + 1)
    mixed = stochastic_gate(deep.to(device), shallow.to(device), mixing_rate)
    chosen = (mixed.cpu() == shallow).numpy()  # the draw, seen in the result
    expected = reference.stochastic_gate_training(exact(deep), exact(shallow), mixing_rate, chosen)
    # Eq. 9 divides what it subtracts: errors grow by 1 / (1 - psi).
    assert_close(mixed * (1 - mixing_rate), expected * (1 - mixing_rate), dtype=dtype, precision=dtype)


@given(map_shapes(), rates, dtypes, layouts, layouts, seeds)
def test_reference_evaluation(
    device: torch.device,
    shape: tuple[int, ...],
    mixing_rate: float,
    dtype: torch.dtype,
    deep_layout: str,
    shallow_layout: str,
    seed: int,
) -> None:
    deep, shallow = normal(shape, dtype, deep_layout, seed), normal(shape, dtype, shallow_layout, seed + 1)
    expected = reference.stochastic_gate_evaluation(exact(deep), exact(shallow), mixing_rate)
    mixed = stochastic_gate(deep.to(device), shallow.to(device), mixing_rate, training=False)
    assert_close(mixed, expected, dtype=dtype, precision=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mixing_rate", [0.1, 0.3, 0.5])
def test_draws_shallow_at_the_mixing_rate(device: torch.device, mixing_rate: float, dtype: torch.dtype) -> None:
    n = 2_000_000  # enough to tell 0.1 from 26 / 256, the share of bfloat16's random numbers below 0.1
    deep, shallow = torch.ones(n, dtype=dtype, device=device), torch.zeros(n, dtype=dtype, device=device)
    share = (stochastic_gate(deep, shallow, mixing_rate) == 0).double().mean().item()
    assert abs(share - mixing_rate) < 5 * (mixing_rate * (1 - mixing_rate) / n) ** 0.5  # five standard errors


@pytest.mark.parametrize("mixing_rate", [0.3, 0.5])
def test_mean_over_draws_is_deep(mixing_rate: float) -> None:
    draws = 20_000
    deep, shallow = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    mixed = stochastic_gate(deep.expand(draws, 8), shallow.expand(draws, 8), mixing_rate)
    error = (mixed.mean(dim=0) - deep).abs()
    assert (error < 5 * mixed.std(dim=0) / draws**0.5).all()


def test_elements_are_drawn_one_by_one() -> None:
    # Neither rows, nor columns, nor channels, nor images share a draw.
    chosen = stochastic_gate(torch.ones(16, 16, 16, 16), torch.zeros(16, 16, 16, 16), 0.5) == 0
    for dim in range(4):
        assert 0.4 < (chosen == chosen.roll(1, dims=dim)).float().mean() < 0.6


def test_reproducible_under_a_seed(device: torch.device) -> None:
    deep, shallow = torch.randn(2, 8, 5, 7, device=device), torch.randn(2, 8, 5, 7, device=device)

    def draw(seed: int, memory_format: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
        torch.manual_seed(seed)
        return stochastic_gate(deep.contiguous(memory_format=memory_format), shallow)

    assert torch.equal(draw(1), draw(1))
    assert torch.equal(draw(1), draw(1, torch.channels_last))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(device: torch.device, use_reentrant: bool) -> None:
    gate = StochasticGate(0.4)
    values = [torch.randn(2, 3, 4, 5, device=device) for _ in range(2)]

    def gradients(checkpointed: bool) -> list[torch.Tensor]:
        deep, shallow = (value.clone().requires_grad_() for value in values)
        torch.manual_seed(5)
        mixed = checkpoint(gate, deep, shallow, use_reentrant=use_reentrant) if checkpointed else gate(deep, shallow)
        mixed.square().sum().backward()
        assert deep.grad is not None
        assert shallow.grad is not None
        return [deep.grad, shallow.grad]

    for actual, expected in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("training", [True, False])
def test_rate_zero_returns_deep(training: bool) -> None:
    deep, shallow = torch.randn(2, 3, 4, 5), torch.full((2, 3, 4, 5), torch.inf)
    assert torch.equal(StochasticGate(0.0).train(training)(deep, shallow), deep)


@pytest.mark.parametrize("training", [True, False])
def test_deterministic_mode_is_the_weighted_sum(training: bool) -> None:
    deep, shallow = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    gate = StochasticGate(0.5, mode="deterministic").train(training)
    torch.testing.assert_close(gate(deep, shallow), 0.5 * deep + 0.5 * shallow)


def test_rate_one_out_of_training_returns_shallow() -> None:
    deep, shallow = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(stochastic_gate(deep, shallow, 1.0, training=False), shallow)
    assert torch.equal(StochasticGate(1.0, mode="deterministic")(deep, shallow), shallow)


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(device: torch.device, training: bool) -> None:
    def repeated(deep: torch.Tensor, shallow: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return stochastic_gate(deep, shallow, 0.3, training)

    deep, shallow = (torch.randn(2, 3, 2, 3, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(repeated, (deep, shallow))


@pytest.mark.parametrize("training", [True, False])
def test_dynamo(device: torch.device, training: bool) -> None:
    gate = StochasticGate().train(training)
    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager")
    deep, shallow = torch.randn(2, 3, 4, 5, device=device), torch.randn(2, 3, 4, 5, device=device)
    torch.manual_seed(0)
    mixed = compiled(deep, shallow)
    torch.manual_seed(0)
    torch.testing.assert_close(mixed, gate(deep, shallow))


@pytest.mark.parametrize("training", [True, False])
def test_module_equals_functional(training: bool) -> None:
    deep, shallow = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    torch.manual_seed(0)
    mixed = StochasticGate(0.4).train(training)(deep, shallow)
    torch.manual_seed(0)
    assert torch.equal(mixed, stochastic_gate(deep, shallow, 0.4, training))


def test_module_has_no_state() -> None:
    gate = StochasticGate()
    gate(torch.rand(1, 2, 3, 4), torch.rand(1, 2, 3, 4))
    assert gate.state_dict() == {}


def test_mixed_dtypes_are_promoted() -> None:
    assert stochastic_gate(torch.rand(2, 3).half(), torch.rand(2, 3)).dtype == torch.float32


def test_exception() -> None:
    features = torch.rand(2, 3, 4, 5)
    with pytest.raises(ValueError, match=r"shallow must have the shape of deep \[2, 3, 4, 5\], got \[2, 3, 4, 1\]"):
        stochastic_gate(features, features[..., :1])
    with pytest.raises(TypeError, match=r"deep must be a floating-point tensor, got torch\.int64"):
        stochastic_gate(features.long(), features)
    with pytest.raises(ValueError, match="deep and shallow must be on one device, got deep on cpu, shallow on meta"):
        stochastic_gate(features, features.to("meta"))
    with pytest.raises(ValueError, match="mode must be one of 'stochastic', 'deterministic', got 'random'"):
        StochasticGate(mode="random")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mixing_rate", "error", "message"),
    [
        (1, ValueError, r"mixing_rate must be in \[0, 1\), got 1"),
        (-0.1, ValueError, r"mixing_rate must be in \[0, 1\), got -0.1"),
        (float("nan"), ValueError, "mixing_rate must be finite, got nan"),
        ("half", TypeError, "mixing_rate must be a number, got str"),
    ],
)
def test_exception_mixing_rate(mixing_rate: float, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        StochasticGate(mixing_rate)
    with pytest.raises(error, match=message):
        stochastic_gate(torch.rand(2), torch.rand(2), mixing_rate)


def test_exception_mixing_rate_out_of_training() -> None:
    with pytest.raises(ValueError, match=r"mixing_rate must be in \[0, 1\], got 1.5"):
        stochastic_gate(torch.rand(2), torch.rand(2), 1.5, training=False)
