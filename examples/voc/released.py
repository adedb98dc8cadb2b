"""Load the authors' published checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .backbones import build_backbone, load_strictly, read_state_dict, unwrap_state_dict
from .checkpoints import Trained
from .dataset.layout import VOC_CLASSES
from .model import SingleStageNet
from .presets import paper_settings
from .settings import BackboneName

# Published module -> ours; all other modules are in our `backbone`, under the same name.
MODULES = {
    "aspp.aspp1.atrous_conv": "aspp.branches.0.0",
    "aspp.aspp1.bn": "aspp.branches.0.1",
    "aspp.aspp2.atrous_conv": "aspp.branches.1.0",
    "aspp.aspp2.bn": "aspp.branches.1.1",
    "aspp.aspp3.atrous_conv": "aspp.branches.2.0",
    "aspp.aspp3.bn": "aspp.branches.2.1",
    "aspp.aspp4.atrous_conv": "aspp.branches.3.0",
    "aspp.aspp4.bn": "aspp.branches.3.1",
    "aspp.global_avg_pool.1": "aspp.image_pool.1.0",
    "aspp.global_avg_pool.2": "aspp.image_pool.1.1",
    "aspp.conv1": "aspp.project.0.0",
    "aspp.bn1": "aspp.project.0.1",
    "fc8_skip": "skip",
    "fc8_x": "fuse",
    "shallow_mask.fc_deep": "gci.deep",
    "shallow_mask.fc_skip": "gci.shallow",
    "shallow_mask.fc_cls": "gci.project",
    "last_conv.0": "decoder.0.0",
    "last_conv.1": "decoder.0.1",
    "last_conv.4": "decoder.2.0",
    "last_conv.5": "decoder.2.1",
    "last_conv.8": "decoder.4",
}
PAMR_PREFIX = "_aff."  # constant buffers of the published PAMR; ours has no buffers


def load_released_checkpoint(model: SingleStageNet, checkpoint: Path | str | Mapping[str, Any]) -> None:
    """Load the published network's weights; a key that only the checkpoint or only the model has is an error.

    Args:
        model: with the backbone, the number of classes and the channels (256) of the checkpoint.
        checkpoint: a file, or its content: a state_dict, which may lie under a key such as `model`, and whose keys
            may start with `module.`.

    Raises:
        WeightsError: the file is missing or unreadable, or a key is missing, unknown or of another shape.
    """
    if isinstance(checkpoint, Mapping):
        weights = unwrap_state_dict(checkpoint, "the checkpoint")
    else:
        weights = read_state_dict(Path(checkpoint))
    renamed = {rename_key(key): value for key, value in weights.items() if not key.startswith(PAMR_PREFIX)}
    load_strictly(model, renamed, "the checkpoint does not fit the model")


def load_released(path: Path, backbone: BackboneName) -> Trained:
    """Return the published network of a backbone, in eval mode, with its classes and the authors' settings."""
    model = SingleStageNet(build_backbone(backbone), len(VOC_CLASSES))
    load_released_checkpoint(model, path)
    return Trained(model.eval(), VOC_CLASSES, paper_settings(backbone))


def rename_key(key: str) -> str:
    """Return our name of a key of the published network."""
    for published, ours in MODULES.items():
        if key.startswith(published + "."):
            return ours + key.removeprefix(published)
    return "backbone." + key
