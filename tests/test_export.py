"""Every layer through PyTorch's compilers and exporters, with sizes that stay dynamic."""

import shutil
from collections.abc import Callable

import torch
from torch import Tensor, nn
from voc.backbones import build_backbone
from voc.inference import normalise
from voc.model import SingleStageNet

from tests.test_calls import LAYERS, each_layer

DYNAMIC = torch.export.Dim.DYNAMIC


def resized(x: Tensor, batch: int, height: int, width: int) -> Tensor:
    """Random maps of another size."""
    return torch.rand(batch, x.shape[1], height, width)


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
    others = [torch.rand_like(x) for x in inputs]
    torch.testing.assert_close(traced(*others), module(*others))


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
