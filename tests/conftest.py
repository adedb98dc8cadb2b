import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# Reproducible and without a clock, so that no test fails because the machine is busy.
settings.register_profile("default", deadline=None, derandomize=True, max_examples=30)
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=150)
settings.register_profile("thorough", deadline=None, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_configure(config: pytest.Config) -> None:
    """Use one thread, here and in the processes that tests start; benchmarks use all.

    The tensors of the tests are small. On a busy machine, threads spend minutes waiting for each other.
    """
    if not (config.getoption("--benchmark", False) or config.getoption("--benchmark-quick", False)):
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


@pytest.fixture(scope="session", params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device there is."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        torch.backends.cudnn.allow_tf32 = False  # convolutions of float32 are compared as such
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Seed what a module draws while it is imported: PyTorch's first seed differs from process to process."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


@pytest.fixture
def _threads() -> Iterator[None]:
    """Restore the number of threads, also after a failure."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
