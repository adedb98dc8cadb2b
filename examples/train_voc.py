"""Train a segmentation model from image-level labels: `python examples/train_voc.py [--data VOC_ROOT]`."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
import tyro
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from voc.backbones import build_backbone
from voc.checkpoints import save_checkpoint
from voc.data import DataError, Sample, VOCDataset, load_split, load_split_with_masks, read_classes, read_split
from voc.inference import multi_scale_masks, normalise, segment
from voc.losses import classification_loss, segmentation_loss
from voc.metrics import IoUMeter, iou_table, mean_iou, save_iou_csv
from voc.model import CAMNet, SingleStageNet, freeze_norm_statistics
from voc.pseudo_labels import pseudo_labels
from voc.settings import PRESETS, Settings
from voc.toy import toy_voc
from voc.training import build_loader, build_optimizer, choose_device, freeze, seed_everything
from voc.transforms import TrainTransform
from voc.visualise import save_curves, save_overlays

from wsseg_layers import PAMR

CAM_BACKGROUNDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)

History = list[dict[str, float]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the whole job: data, baseline, model, table and pictures. Returns the exit code."""
    try:
        settings = parse_arguments(argv)
        device = choose_device(settings.device)
        train_set, val_set = load_data(settings)
        settings.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:  # DataError is a ValueError
        print(f"train_voc.py: error: {error}", file=sys.stderr)
        return 2
    (settings.output / "settings.json").write_text(json.dumps(settings.to_json(), indent=2) + "\n")
    classes = ("background", *train_set.split.classes)
    print(f"{len(train_set)} training images, {len(val_set)} test images, {len(classes) - 1} classes, on {device}")
    rows = [classes.index(name) for name in settings.table_classes] or range(len(classes))

    started = time.perf_counter()
    results: dict[str, Tensor] = {}
    histories: dict[str, History] = {}
    if settings.baseline:
        seed_everything(settings.seed)
        baseline = CAMNet(build_backbone(settings.backbone), len(classes) - 1)
        histories["CAM-GAP"] = train(baseline, train_set, val_set, settings, device)
        # The baseline is shown at the background score that suits it best, found on the test images themselves.
        candidates = evaluate(baseline, val_set, settings, device)
        best = max(candidates, key=lambda name: mean_iou(candidates[name], rows))
        results[best] = candidates[best]

    seed_everything(settings.seed)
    backbone = build_backbone(settings.backbone)
    model = SingleStageNet(backbone, len(classes) - 1, settings.channels, settings.mixing_rate)
    histories["ours"] = train(model, train_set, val_set, settings, device)
    results |= evaluate(model, val_set, settings, device)

    minutes = (time.perf_counter() - started) / 60
    table = iou_table(classes, results, rows)
    print(f"\nIoU (%) on {len(val_set)} test images, after {minutes:.1f} minutes\n\n{table}\n")
    (settings.output / "iou.md").write_text(table + "\n")
    save_iou_csv(settings.output / "iou.csv", classes, results)
    save_curves(settings.output / "curves.png", histories, settings.classification_epochs)
    draw_examples(model, val_set, settings, device)
    print(f"checkpoint, table, curves and overlays: {settings.output}")
    return 0


def parse_arguments(argv: Sequence[str] | None) -> Settings:
    """Read the command line; `--preset` and `--data` decide which defaults the other arguments have."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--preset", choices=PRESETS)
    peek.add_argument("--data")
    chosen, _ = peek.parse_known_args(argv)
    preset = chosen.preset or ("toy" if chosen.data is None else "photographs")
    return tyro.cli(Settings, default=PRESETS[preset], args=argv)


def load_data(settings: Settings) -> tuple[VOCDataset, VOCDataset]:
    """Return the training set (images and labels) and the test set (images and masks)."""
    root = toy_voc(settings.output / "data", seed=settings.seed) if settings.data is None else settings.data
    classes = read_classes(root)
    unknown = [name for name in settings.table_classes if name not in ("background", *classes)]
    if unknown:
        raise DataError(f"--table-classes: unknown class {unknown[0]!r}; known: background, {', '.join(classes)}")
    train_split = load_split(root, read_split(root, "train_aug", "train"), classes, settings.labels)
    val_split = load_split_with_masks(root, read_split(root, "val"), classes)
    return VOCDataset(train_split, TrainTransform(settings.crop_size)), VOCDataset(val_split)


def train(
    model: SingleStageNet | CAMNet, train_set: VOCDataset, val_set: VOCDataset, settings: Settings, device: torch.device
) -> History:
    """Train for all epochs: classification first, then, for the single-stage model, with self-supervision."""
    model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in the stubs
    freeze(model)
    optimizer = build_optimizer(model, settings.lr, settings.weight_decay)
    loader = build_loader(train_set, settings.batch_size, settings.workers, settings.seed)
    is_ours = isinstance(model, SingleStageNet)
    pamr = PAMR(num_iter=settings.pamr_iterations, resize="image").to(device)
    curve_set = VOCDataset(val_set.split.first(settings.curve_images))
    history = []
    for epoch in range(1, settings.epochs + 1):
        self_supervised = is_ours and epoch > settings.classification_epochs
        name = f"{'ours' if is_ours else 'CAM-GAP'} {epoch}/{settings.epochs}"
        losses = train_epoch(model, loader, optimizer, pamr if self_supervised else None, device, name)
        if isinstance(model, SingleStageNet):
            save_checkpoint(settings.output / "last.pt", model, settings, train_set.split.classes, epoch)
        ious = evaluate(model, curve_set, replace(settings, scales=(1.0,)), device, flip=False)
        history.append({**losses, "miou": max(mean_iou(iou) for iou in ious.values())})
        print(f"{name}: loss {losses['loss']:.3f}, mean IoU {history[-1]['miou']:.1f} % on {len(curve_set)} images")
    return history


def train_epoch(
    model: SingleStageNet | CAMNet,
    loader: DataLoader[Sample],
    optimizer: torch.optim.Optimizer,
    pamr: PAMR | None,
    device: torch.device,
    name: str,
) -> dict[str, float]:
    """Train one epoch, with the segmentation loss where `pamr` is given; return the mean losses."""
    model.train()
    freeze_norm_statistics(model)
    sums = {"loss": 0.0, "classification": 0.0, "segmentation": 0.0}
    images = min(len(loader) * (loader.batch_size or 1), len(loader.dataset))  # type: ignore[arg-type]  # VOCDataset is Sized
    with tqdm(total=images, desc=name, unit="img") as progress:
        for batch in loader:
            image, labels = batch.image.to(device), batch.labels.to(device)
            prediction = model(normalise(image, model.backbone))
            classification = classification_loss(prediction.class_scores, labels)
            segmentation = torch.zeros_like(classification)
            if pamr is not None:
                refined = pamr(image, prediction.masks.detach())
                target = pseudo_labels(refined, labels)
                segmentation = segmentation_loss(prediction.logits, target)
            loss = classification + segmentation
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for key, value in zip(sums, (loss, classification, segmentation), strict=True):
                sums[key] += value.item() / len(loader)
            progress.update(len(image))
            progress.set_postfix(cls=f"{classification.item():.3f}", seg=f"{segmentation.item():.3f}")
    return sums


def evaluate(
    model: SingleStageNet | CAMNet, dataset: VOCDataset, settings: Settings, device: torch.device, flip: bool = True
) -> dict[str, Tensor]:
    """Return the IoU per class in percent: of the single-stage model, or of CAM-GAP for each of several backgrounds."""
    model.eval()
    is_ours = isinstance(model, SingleStageNet)
    names = ["ours"] if is_ours else [f"CAM-GAP (background {score})" for score in CAM_BACKGROUNDS]
    meters = {name: IoUMeter(1 + len(dataset.split.classes)) for name in names}
    for sample in tqdm(map(dataset.__getitem__, range(len(dataset))), "evaluating", len(dataset), leave=False):
        masks, probabilities = multi_scale_masks(model, sample.image.to(device), settings.scales, flip)
        backgrounds = [masks[0] ** settings.background_power] if is_ours else masks.new_tensor(CAM_BACKGROUNDS)
        for meter, background in zip(meters.values(), backgrounds, strict=True):
            masks[0] = background
            meter.update(segment(masks, probabilities, settings.min_probability).cpu(), sample.mask)
    return {name: meter.iou() for name, meter in meters.items()}


def draw_examples(
    model: SingleStageNet, dataset: VOCDataset, settings: Settings, device: torch.device, count: int = 6
) -> None:
    """Save the first images with their predicted mask, pseudo label and ground truth side by side."""
    model.eval()
    pamr = PAMR(num_iter=settings.pamr_iterations).to(device)
    samples = [dataset[index] for index in range(min(count, len(dataset)))]
    columns: dict[str, list[Tensor]] = {"mask": [], "pseudo label": [], "ground truth": []}
    for sample in samples:
        masks, probabilities = multi_scale_masks(model, sample.image.to(device), settings.scales)
        refined = pamr(sample.image[None].to(device), masks[None])
        masks[0] **= settings.background_power
        columns["mask"].append(segment(masks, probabilities, settings.min_probability).cpu())
        columns["pseudo label"].append(pseudo_labels(refined, sample.labels[None].to(device))[0].cpu())
        columns["ground truth"].append(sample.mask)
    save_overlays(settings.output / "overlays.png", [sample.image for sample in samples], columns)


if __name__ == "__main__":
    sys.exit(main())
