"""The settings of a training run: every field is a command-line argument; its comment is that argument's help."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

MINIMA = {
    "channels": 1,
    "epochs": 1,
    "classification_epochs": 0,
    "batch_size": 1,
    "crop_size": 32,
    "lr": 0,
    "weight_decay": 0,
    "pamr_iterations": 0,
    "scales": 0.1,
    "min_probability": 0,
    "background_power": 0,
    "curve_images": 1,
    "workers": 0,
}


@dataclass(frozen=True)
class Settings:
    """Train the single-stage model and the CAM-GAP baseline from image-level labels, and compare their masks.

    Without --data, a small procedural data set is drawn and a preset that takes a few minutes on two CPU cores is
    used. With --data, the preset is meant for photographs. Any argument overrides its preset.
    """

    data: Path | None = None
    """Root of a data set in VOC's layout: JPEGImages, ImageSets/Segmentation/{train_aug|train,val}.txt,
    SegmentationClass or SegmentationClassAug, and optionally classes.txt (a class name a line; default: VOC's 20)."""

    labels: Path | None = None
    """File of image-level labels, lines `id class class ...`. Default: Annotations/*.xml where there are any, else the
    classes of the masks."""

    preset: Literal["auto", "toy", "photographs", "paper"] = "auto"
    """Where the other defaults come from: `toy` (small, drawn data), `photographs` (a laptop), `paper` (section 4.1, a
    GPU); `auto` is `toy` without --data and `photographs` with it."""

    output: Path = Path("runs/voc")
    """Folder for checkpoints, table, plot and overlays."""

    device: str = "auto"
    """`auto` (cuda, then mps, then cpu) or any name that torch.device takes."""

    seed: int = 0
    """Seed of weights, data order, augmentation and stochastic gate."""

    backbone: Literal["efficientnet_lite0"] = "efficientnet_lite0"
    """Pre-trained network; its ImageNet weights come with a pip package."""

    channels: int = 256
    """Width of ASPP and decoder (256 in the paper)."""

    mixing_rate: float = 0.3
    """Psi of the stochastic gate, eq. 9 (0.3 in the paper)."""

    epochs: int = 20
    """Passes over the training images (20 in the paper)."""

    classification_epochs: int = 5
    """How many of them, first, without the segmentation loss (5 in the paper)."""

    batch_size: int = 16
    """Images a step (16 in the paper)."""

    crop_size: int = 321
    """Side of the training crops in pixels (321 in the paper)."""

    lr: float = 1e-3
    """Learning rate of the backbone; new weights learn 10 times, new biases 20 times as fast."""

    weight_decay: float = 5e-4
    """Weight decay of all weights; biases have none."""

    pamr_iterations: int = 10
    """Iterations of PAMR (10 in the paper); 0 trains on unrefined masks."""

    scales: tuple[float, ...] = (1.0, 0.5, 1.5, 2.0)
    """Scales of the test images; each is also looked at mirrored."""

    min_probability: float = 0.1
    """At test time, classes with a lower probability are removed."""

    background_power: float = 3.0
    """At test time, the power to which the background's mask is raised."""

    table_classes: tuple[str, ...] = ()
    """Classes of the printed table and its mean, `background` among them. Default: all."""

    baseline: bool = True
    """Also train the CAM-GAP baseline: same backbone, data, augmentation, optimiser and epochs."""

    curve_images: int = 50
    """Test images behind the curve of mean IoU over epochs; the table is always made from all of them."""

    workers: int = 2
    """Processes that read and augment images."""

    def __post_init__(self) -> None:
        """Refuse numbers that no training could use."""
        for name, minimum in MINIMA.items():
            values = getattr(self, name)
            for value in values if isinstance(values, tuple) else (values,):
                if not value >= minimum:
                    raise ValueError(f"--{name.replace('_', '-')} must be at least {minimum}, got {value}")
        if not 0 <= self.mixing_rate < 1:
            raise ValueError(f"--mixing-rate must be in [0, 1), got {self.mixing_rate}")

    def to_json(self) -> dict[str, Any]:
        """Return the settings in types that JSON knows."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}


PAPER = Settings()

# Three thousand photographs took 55 minutes on two busy CPU cores, the baseline included.
PHOTOGRAPHS = replace(
    PAPER,
    channels=128,
    epochs=6,
    classification_epochs=2,
    crop_size=193,
    scales=(1.0,),
    background_power=2.0,
    output=Path("runs/photographs"),
)

TOY = replace(PHOTOGRAPHS, epochs=9, classification_epochs=3, crop_size=129, output=Path("runs/toy"))

PRESETS = {"toy": TOY, "photographs": PHOTOGRAPHS, "paper": PAPER}
