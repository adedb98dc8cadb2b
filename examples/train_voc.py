"""Train a segmentation model from image-level labels: `python examples/train_voc.py [--data VOC_ROOT]`.

On several GPUs: `torchrun --nproc-per-node 4 examples/train_voc.py --data VOC_ROOT --preset paper
--backbone wide_resnet38 --weights FILE`.
"""

import json
import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from voc.arguments import parse_arguments, resumed_folder
from voc.backbones import normalise
from voc.checkpoints import HELD_OUT_LOSS, CheckpointError
from voc.dataset.errors import DataError
from voc.dataset.layout import class_indices
from voc.dataset.splits import Sample, VOCDataset
from voc.dataset.transforms import TrainTransform
from voc.devices import is_out_of_memory
from voc.evaluation.metrics import mean_iou
from voc.evaluation.network import cam_backgrounds, draw, evaluate, evaluate_pseudo_labels, evaluate_quickly
from voc.evaluation.report import Report
from voc.files.whole import write_text_whole
from voc.model import Network, build_model
from voc.settings import Settings
from voc.train.batches import AugmentedDataset, GlobalBatches, load_batches
from voc.train.distribution import GlobalBatchNoise, start_accelerator
from voc.train.errors import Interrupted, TrainingError
from voc.train.objective import losses_of
from voc.train.optimizer import MAX_NORM, freeze, freeze_norm_statistics
from voc.train.seeds import mix_seed
from voc.train.signals import StopRequest, quiet_threads, sigterm_interrupts
from voc.train.state import LOSSES, TrainingState, checkpoint_to_resume, set_aside_earlier_run
from voc.training_data import TrainingData, load_training_data
from voc.visualise import overlay_figure


def main(argv: Sequence[str] | None = None) -> int:
    """Run the whole job: data, baseline, model, table and pictures. Returns the exit code."""
    try:
        settings = parse_arguments(argv)
        accelerator = start_accelerator(settings)
        data = load_training_data(settings, accelerator)
        # Missing and damaged files are reported here, before training starts.
        build_model(settings, len(data.train.split.classes))
        for network_settings in settings_per_network(settings):
            checkpoint_to_resume(network_settings)
        settings.output.mkdir(parents=True, exist_ok=True)
        if accelerator.is_main_process and not goes_on_in_place(settings):
            set_aside_earlier_run(settings.output)
    except (ValueError, OSError) as error:  # the errors of data, weights and checkpoints are ValueErrors
        print(f"train_voc.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped before training", file=sys.stderr)
        return 130
    try:
        with quiet_threads(), sigterm_interrupts():
            run(settings, data, accelerator)
    except (Interrupted, KeyboardInterrupt) as stop:
        how = f"resume with: python examples/train_voc.py --resume {settings.output}"
        print(f"\n{str(stop) or 'stopped'}; {how}", file=sys.stderr)
        return 130
    except (TrainingError, DataError, CheckpointError, OSError) as error:
        where = f"{settings.output}: " if isinstance(error, OSError) and error.errno and not error.filename else ""
        print(f"\ntrain_voc.py: error: {where}{error}", file=sys.stderr)
        return 1
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        how = "try a smaller --batch-size or --crop-size, or --accumulate 2"
        print(f"\ntrain_voc.py: error: not enough memory: {how}", file=sys.stderr)
        return 1
    finally:
        accelerator.end_training()
    return 0


def run(settings: Settings, data: TrainingData, accelerator: Accelerator) -> None:
    """Train the baseline and the model, then write tables and pictures."""
    classes = ("background", *data.train.split.classes)
    rows = class_indices(settings.table_classes or classes, classes, source="--table-classes")
    device, is_main = accelerator.device, accelerator.is_main_process
    if is_main:
        write_text_whole(settings.output / "settings.json", json.dumps(settings.to_json(), indent=2) + "\n")
        sizes = f"{len(data.train)} training images, {len(data.test)} test images, {len(classes) - 1} classes"
        print(f"{sizes}, on {device}")
    started = time.perf_counter()
    report = Report(classes, rows)
    for network_settings in settings_per_network(settings):
        state = TrainingState(network_settings, data.train.split.classes, accelerator)
        train(state, data)
        state.load_best()
        backgrounds = cam_backgrounds(state.result, data.train_with_masks, rows, network_settings, device, state.group)
        found = evaluate(
            state.result,
            data.test,
            network_settings,
            device,
            state.group,
            refine=settings.refine,
            backgrounds=backgrounds,
        )
        report.add(state.name, found, state.history)
    if measures_pseudo_labels(state, data):
        quality = evaluate_pseudo_labels(state.result, data.train_with_masks, settings, device, state.group)
        report.pseudo_labels = quality
    if is_main:
        minutes = (time.perf_counter() - started) / 60
        title = f"IoU (%) on {len(data.test)} test images, after {minutes:.1f} minutes"
        epochs_before = settings.classification_epochs if settings.self_supervised else None
        print(f"\n{report.write(settings.output, title, epochs_before)}\n")
        pictures = draw(state.result, data.test, settings, device)
        overlay_figure(pictures.images, pictures.masks).savefig(settings.output / "overlays.png", dpi=110)
        print(f"checkpoints, tables, curves and overlays: {settings.output}")


def goes_on_in_place(settings: Settings) -> bool:
    """Return whether the run is resumed in its own folder."""
    return settings.resume is not None and resumed_folder(settings.resume).resolve() == settings.output.resolve()


def settings_per_network(settings: Settings) -> list[Settings]:
    """Return the settings of each network to train: of the baseline, if it is requested, and of the model."""
    if settings.baseline and settings.self_supervised:
        lr = settings.lr if settings.baseline_lr is None else settings.baseline_lr
        return [replace(settings, model="cam", lr=lr), settings]
    return [settings]


def train(state: TrainingState, data: TrainingData) -> None:
    """Train one network for the remaining epochs.

    With image-level labels, the first epochs use the classification loss alone. After them, the single-stage model also
    uses the self-supervised segmentation loss.
    """
    settings, accelerator = state.settings, state.accelerator
    accelerator.free_memory()  # of the network that was trained before
    model, optimizer = accelerator.prepare(state.network, state.optimizer)
    curve_set = VOCDataset(data.test.split.first(settings.curve_images))
    writer = SummaryWriter(str(settings.output / "tensorboard" / settings.model)) if state.group.rank == 0 else None
    while state.epoch <= settings.epochs:
        epoch = state.epoch
        augmented = AugmentedDataset(data.train, TrainTransform(crop_size(settings, epoch)))
        freeze(state.network, whole_backbone=freezes_backbone(settings, epoch))
        train_epoch(state, model, optimizer, augmented, writer)
        figures, per_class = measure(state, data, curve_set)
        state.end_epoch(figures)
        if writer is not None:
            print(
                f"{state.name} {epoch}/{settings.epochs}: loss {state.history[-1]['loss']:.3f}, "
                f"mean IoU {figures['miou']:.1f} % on {len(curve_set)} images"
            )
            for name, figure in figures.items():
                writer.add_scalar(name, figure, epoch)
            for name, values in per_class.items():
                for class_name, value in zip(state.classes, values.tolist(), strict=True):
                    writer.add_scalar(f"{name}/{class_name}", value, epoch)
            pictures = draw(state.result, curve_set, replace(settings, scales=(1.0,)), accelerator.device, count=4)
            writer.add_figure("masks", overlay_figure(pictures.images, pictures.masks), epoch)
            writer.flush()
    if writer is not None:
        writer.close()


def crop_size(settings: Settings, epoch: int) -> int:
    """Return the side of the training crops in an epoch."""
    if settings.only_classifies(epoch) and settings.classification_crop_size is not None:
        return settings.classification_crop_size
    return settings.crop_size


def freezes_backbone(settings: Settings, epoch: int) -> bool:
    """Return whether only the weights that start at random are trained in an epoch."""
    return settings.freeze_backbone and settings.supervision == "labels" and settings.only_classifies(epoch)


def measure(
    state: TrainingState, data: TrainingData, curve_set: VOCDataset
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return the figures of an epoch for masks, classification and pseudo labels, and the figures per class [C]."""
    settings, device = state.settings, state.accelerator.device
    found = evaluate_quickly(state.result, curve_set, data.train_with_masks, settings, device, state.group)
    (iou,) = found.iou.values()
    per_class = {"average precision": found.average_precision}
    figures = {"miou": mean_iou(iou), "map": mean_iou(found.average_precision)}
    if measures_pseudo_labels(state, data) and state.epoch >= settings.classification_epochs:
        quality = evaluate_pseudo_labels(state.result, data.train_with_masks, settings, device, state.group)
        per_class["pseudo label iou"] = quality.iou[1:]
        figures |= {"pseudo label miou": mean_iou(quality.iou), "pseudo label coverage": quality.coverage}
    if settings.checkpoint == "best" and settings.may_be_best(state.epoch):
        figures[HELD_OUT_LOSS] = held_out_loss(state, data.test)
    return {name: figure for name, figure in figures.items() if math.isfinite(figure)}, per_class


def measures_pseudo_labels(state: TrainingState, data: TrainingData) -> bool:
    """Return whether the network makes pseudo labels of training images that have masks to compare with."""
    return state.settings.self_supervised and len(data.train_with_masks) > 0


@torch.no_grad()
def held_out_loss(state: TrainingState, test_set: VOCDataset) -> float:
    """Return the mean training loss of the network in eval mode on crops of the test images."""
    settings, accelerator = state.settings, state.accelerator
    dataset = AugmentedDataset(test_set, TrainTransform(settings.crop_size))
    batches = GlobalBatches(len(dataset), settings.batch_size, settings.seed, epoch=0, group=state.group)
    state.result.eval()
    total = torch.zeros((), device=accelerator.device)
    for batch in load_batches(dataset, batches, settings.workers):
        image, labels, mask = (part.to(accelerator.device) for part in batch[1:])
        output = state.result(normalise(image, state.result.backbone))
        total += sum(losses_of(state, output, image, labels, mask))
    return accelerator.reduce(total / len(batches), reduction="mean").item()


def train_epoch(
    state: TrainingState,
    model: Network,
    optimizer: torch.optim.Optimizer,
    dataset: AugmentedDataset,
    writer: SummaryWriter | None,
) -> None:
    """Train for the remaining steps of one epoch. Ctrl-C ends it after a step, with the state saved."""
    settings, accelerator, epoch = state.settings, state.accelerator, state.epoch
    batches = GlobalBatches(len(dataset), settings.batch_size, settings.seed, epoch, state.step, state.group)
    stopped = 0.0
    model.train()
    freeze_norm_statistics(state.network)
    bar = tqdm(
        desc=f"{state.name} {epoch}/{settings.epochs}",
        total=settings.batch_size * batches.steps.stop,
        initial=settings.batch_size * state.step,
        unit="img",
        disable=writer is None,
    )
    with bar, StopRequest() as stop:
        for batch in load_batches(dataset, batches, settings.workers):
            torch.manual_seed(mix_seed(settings.seed, epoch, state.step))
            state.begin_step(batches.steps.stop)
            losses = train_step(state, model, optimizer, batch)
            state.end_step(batches.steps.stop)
            # One reduction gives all processes the same mean losses and the same decision to stop.
            request = losses.new_tensor([float(stop.requested)])
            *means, stopped = accelerator.reduce(torch.cat([losses, request]), reduction="mean").tolist()
            check_finite(means, batch, state)
            state.sums = [total + mean for total, mean in zip(state.sums, means, strict=True)]
            bar.update(settings.batch_size)
            bar.set_postfix(cls=f"{means[1]:.3f}", seg=f"{means[2]:.3f}")
            if writer is not None:
                for name, mean in zip(LOSSES, means, strict=True):
                    writer.add_scalar(name, mean, (epoch - 1) * batches.steps.stop + state.step)
            if stopped:
                break
    state.save()
    if stopped:
        raise Interrupted(f"stopped in epoch {epoch} after step {state.step}")


def train_step(state: TrainingState, model: Network, optimizer: torch.optim.Optimizer, batch: Sample) -> Tensor:
    """Train on this process's share of a batch, in `accumulate` passes; return its mean losses, as in LOSSES."""
    settings, accelerator = state.settings, state.accelerator
    noise = GlobalBatchNoise(state.group)
    passes = list(zip(*(part.to(accelerator.device).chunk(settings.accumulate) for part in batch[1:]), strict=True))
    sums = torch.zeros(len(LOSSES), device=accelerator.device)
    optimizer.zero_grad()
    for index, (image, labels, mask) in enumerate(passes, start=1):
        with nullcontext() if index == len(passes) else accelerator.no_sync(model):
            with noise:
                output = model(normalise(image, state.network.backbone))
            parts = torch.stack(losses_of(state, output, image, labels, mask))
            loss = parts.sum() / len(passes)
            accelerator.backward(loss)
        sums += torch.cat([loss[None], parts / len(passes)]).detach()
    if settings.optimizer == "adamw":
        accelerator.clip_grad_norm_(state.network.parameters(), MAX_NORM)
    optimizer.step()
    return sums


def check_finite(means: Sequence[float], batch: Sample, state: TrainingState) -> None:
    """Raise an error if a loss is NaN or infinite, and write the names of the batch's images beside the checkpoints."""
    if all(map(math.isfinite, means)):
        return
    path = state.settings.output / f"not_finite_{state.accelerator.process_index}.json"
    path.write_text(json.dumps({"epoch": state.epoch, "step": state.step, "images": list(batch.name)}, indent=2))
    raise TrainingError(f"the loss is {means[0]} in epoch {state.epoch}, step {state.step}; its images: {path}")


if __name__ == "__main__":
    sys.exit(main())
