"""Every layer through PyTorch's compilers and exporters, with sizes that stay dynamic."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from voc.backbones import build_backbone
from voc.backbones.base import normalise
from voc.model import SingleStageNet

from tests.test_calls import LAYERS, each_layer
from wsseg_layers import PAMR, PAR, DenseCRF, DenseEnergyLoss, PseudoLabels
from wsseg_layers.functional import cam_to_label

DYNAMIC = getattr(torch.export.Dim, "DYNAMIC", None)
needs_dynamic_sizes = pytest.mark.skipif(DYNAMIC is None, reason="this PyTorch has no Dim.DYNAMIC")


def resized(x: Tensor, batch: int, height: int, width: int) -> Tensor:
    """Random maps of another size."""
    return torch.rand(batch, x.shape[1], height, width)


@needs_dynamic_sizes
@each_layer
def test_export_with_dynamic_sizes(layer: str) -> None:
    module, inputs = LAYERS[layer]
    sizes = tuple({0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC} for _ in inputs)
    exported = torch.export.export(module, inputs, dynamic_shapes=sizes).module()
    for size in ((2, 8, 9), (3, 17, 12)):
        others = [resized(x, *size) for x in inputs]
        torch.testing.assert_close(exported(*others), module(*others))


@each_layer
def test_trace(layer: str) -> None:
    module, inputs = LAYERS[layer]
    traced = torch.jit.trace(module, inputs)
    for batch in (2, 3):
        others = [resized(x, batch, *x.shape[2:]) for x in inputs]
        torch.testing.assert_close(traced(*others), module(*others))


def energy_inputs(batch: int) -> tuple[Tensor, ...]:
    """Return images, probabilities, regions and labels."""
    maps = torch.rand(batch, 4, 10, 12).softmax(dim=1)
    return 255 * torch.rand(batch, 3, 10, 12), maps, torch.ones(batch, 10, 12), torch.full((batch, 1, 10, 12), 255)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of the checks
@pytest.mark.parametrize("traced_batch", [1, 2])
def test_trace_of_other_layers_with_another_batch(traced_batch: int) -> None:
    def background(cams: Tensor) -> Tensor:
        return cam_to_label(cams, torch.ones(cams.shape[:2]), cams.amax(dim=(1, 2, 3)) - 0.2)

    energy = DenseEnergyLoss(1.0, 15, 100, 0.5)
    for function, make in (
        (energy, energy_inputs),
        (DenseCRF(2), lambda batch: energy_inputs(batch)[:2]),
        (background, lambda batch: (torch.rand(batch, 3, 6, 7),)),
    ):
        traced = torch.jit.trace(function, make(traced_batch), check_trace=False)
        for batch in (1, 2, 5):
            inputs = make(batch)
            torch.testing.assert_close(traced(*inputs), function(*inputs))


@needs_dynamic_sizes
def test_export_of_the_energy_loss_with_a_dynamic_batch() -> None:
    module = DenseEnergyLoss(1.0, 15, 100, 0.5)
    sizes = tuple({0: DYNAMIC} for _ in range(4))
    exported = torch.export.export(module, energy_inputs(2), dynamic_shapes=sizes).module()
    for batch in (3, 5):
        inputs = energy_inputs(batch)
        torch.testing.assert_close(exported(*inputs), module(*inputs))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of the checks
def test_trace_of_pseudo_labels() -> None:
    module = PseudoLabels(PAR([1, 2], 2), (0.6, 0.3))
    images, cams, labels = torch.rand(2, 3, 8, 10), torch.rand(2, 4, 5, 6), torch.tensor([[1, 0, 1, 1], [0, 0, 0, 1]])
    traced = torch.jit.trace(module, (images, cams, labels))
    for some in (labels, 1 - labels):
        assert torch.equal(traced(images, cams, some), module(images, cams, some))


@each_layer
@torch.no_grad()  # with gradients, inductor fixes the sizes of a plain 1x1 convolution too
def test_compile_with_dynamic_sizes(layer: str) -> None:
    module, inputs = LAYERS[layer]
    # Inductor takes seconds a layer, and a C++ compiler: one with operators of ours, one with convolutions.
    backend = "inductor" if layer in ("PAMR", "GCI, batch") and shutil.which("g++") else "aot_eager"
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    torch.testing.assert_close(compiled(*inputs), module(*inputs))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((3, 17, 12), (4, 11, 30)):
            others = [resized(x, *size) for x in inputs]
            torch.testing.assert_close(compiled(*others), module(*others))


REFINEMENTS: dict[str, Callable[..., nn.Module]] = {
    "PAMR": PAMR,
    "PAMR, eager": partial(PAMR, backend="eager"),
    "PAMR, eq. 8": partial(PAMR, variant="paper"),
    "PAR": PAR,
}


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("name", REFINEMENTS)
@pytest.mark.filterwarnings("ignore")  # the exporters warn about themselves
def test_onnx(name: str, dynamo: bool, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    module = REFINEMENTS[name](num_iter=2, dilations=[1, 2, 12])
    inputs = torch.rand(2, 3, 9, 11), torch.rand(2, 4, 5, 6)
    names, sizes = ["image", "masks"], ({0: "b", 2: "h", 3: "w"}, {0: "b", 2: "u", 3: "v"})
    dynamic: dict[str, Any] = (
        {"dynamic_shapes": sizes} if dynamo else {"dynamic_axes": dict(zip(names, sizes, strict=True))}
    )
    path = tmp_path / "refinement.onnx"
    torch.onnx.export(module, inputs, path, dynamo=dynamo, input_names=names, verbose=False, **dynamic)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for image, masks in (inputs, (torch.rand(1, 3, 13, 10), torch.rand(1, 4, 7, 7))):
        feeds = [x.name for x in session.get_inputs()]
        (actual,) = session.run(None, dict(zip(feeds, (image.numpy(), masks.numpy()), strict=True)))
        torch.testing.assert_close(torch.from_numpy(actual), module(image, masks), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="this PyTorch does not say that it exports")
def test_the_eager_backend_exports_plain_operations() -> None:
    module = PAMR(2, [1, 2], backend="eager")
    inputs = torch.rand(1, 3, 6, 7), torch.rand(1, 2, 6, 7)
    exported = torch.export.export(module, inputs).run_decompositions()
    targets = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert targets
    assert not [target for target in targets if "wsseg_layers" in target]
    torch.testing.assert_close(exported.module()(*inputs), module(*inputs))


class Inference(nn.Module):
    """What a deployed model does: masks of an image."""

    def __init__(self, network: SingleStageNet, prepare: Callable[..., Tensor]) -> None:
        super().__init__()
        self.network = network
        self.prepare = prepare

    def forward(self, image: Tensor) -> Tensor:
        return self.network(self.prepare(image, self.network.backbone)).masks


def test_export_of_the_inference_model() -> None:
    torch.manual_seed(0)
    network = SingleStageNet(build_backbone("efficientnet_lite0"), num_classes=3, channels=8).eval()
    model = Inference(network, normalise).eval()
    image = torch.rand(2, 3, 97, 113)
    exported = torch.export.export(model, (image,)).module()
    other = torch.rand_like(image)
    with torch.no_grad():
        torch.testing.assert_close(exported(other), model(other), rtol=1e-4, atol=1e-4)
