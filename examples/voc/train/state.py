"""The state of a training that is saved and resumed: network, optimizer, and progress."""

import copy
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from accelerate import Accelerator

from ..arguments import resumed_folder
from ..checkpoints import HELD_OUT_LOSS, CheckpointError, best_checkpoint, best_epoch, read_checkpoint, save_checkpoint
from ..model import Network, build_model
from ..settings import Settings
from .distribution import Group, share_batch_statistics
from .optimizer import build_optimizer, decay_factor, freeze, update_average, warm_up_factor
from .seeds import seed_everything

LOSSES = ("loss", "classification", "segmentation", "energy")


class TrainingState:
    """A network in training: `step` steps of `epoch` are done, and `sums` are the sums of their losses."""

    def __init__(self, settings: Settings, classes: Sequence[str], accelerator: Accelerator) -> None:
        """Start from ImageNet weights, or resume the run of `settings.resume`."""
        seed_everything(settings.seed)
        self.settings = settings
        self.classes = tuple(classes)
        self.accelerator = accelerator
        self.group = Group(accelerator.process_index, accelerator.num_processes)
        self.network = build_model(settings, len(classes))
        self.network.to(accelerator.device)
        memory_format = self.network.backbone.memory_format(accelerator.device)
        self.network.to(memory_format=memory_format)  # type: ignore[call-overload]  # not in the stubs
        freeze(self.network)
        if self.group.size > 1:
            share_batch_statistics(self.network)
        self.optimizer = build_optimizer(self.network, settings.lr, settings.weight_decay, settings.optimizer)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.average = copy.deepcopy(self.network).eval().requires_grad_(False) if settings.ema_decay > 0 else None
        self.epoch, self.step = 1, 0
        self.sums = [0.0] * len(LOSSES)
        self.history: list[dict[str, float]] = []
        checkpoint = checkpoint_to_resume(settings)
        if checkpoint is not None:
            self._restore(checkpoint)

    @property
    def name(self) -> str:
        """Return the name of the method."""
        return "CAM-GAP" if self.settings.model == "cam" else "ours"

    @property
    def result(self) -> Network:
        """Return the network that is evaluated and saved for inference: the average, if there is one."""
        return self.network if self.average is None else self.average

    def begin_step(self, steps_per_epoch: int) -> None:
        """Set the learning rates of the next step."""
        settings, epochs = self.settings, self._decay_epochs()
        done = epochs.index(self.epoch) * steps_per_epoch + self.step
        if done == 0 and self.epoch > 1:  # AdamW divides by an average of earlier, small gradients
            self.optimizer.state.clear()
        factor = decay_factor(done, len(epochs) * steps_per_epoch, settings.lr_decay)
        if settings.optimizer == "adamw":
            factor *= warm_up_factor(done)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def _decay_epochs(self) -> range:
        """Return the epochs that share one decay of the learning rates with this epoch."""
        settings = self.settings
        epochs = range(1, settings.epochs + 1)
        if not settings.lr_restart or settings.supervision == "masks":
            return epochs
        restart = settings.classification_epochs
        return epochs[:restart] if settings.only_classifies(self.epoch) else epochs[restart:]

    def end_step(self, steps_per_epoch: int) -> None:
        """Count the step, and average the weights."""
        if self.average is not None:
            updates = (self.epoch - 1) * steps_per_epoch + self.step
            update_average(self.average, self.network, self.settings.ema_decay, updates)
        self.step += 1

    def end_epoch(self, figures: Mapping[str, float]) -> None:
        """Record the mean losses and other figures of the epoch, save, and move on to the next epoch.

        The epoch with the lowest `HELD_OUT_LOSS`, if that is among the figures, is saved as `_best`.
        """
        means = [total / self.step for total in self.sums]
        self.history.append({**dict(zip(LOSSES, means, strict=True)), **figures})
        done = self.epoch
        self.epoch, self.step, self.sums = done + 1, 0, [0.0] * len(LOSSES)
        # The copies come first: if the process is killed between two files, the resumed run writes all of them again.
        if self.settings.keep_checkpoints:
            self.save(f"_{done:03d}")
        if HELD_OUT_LOSS in figures and done == best_epoch(self.history):
            self.save("_best")
        self.save()

    def load_best(self) -> None:
        """Load the weights of the best epoch into the network, if there is one."""
        if self.settings.checkpoint != "best":
            return
        self.accelerator.wait_for_everyone()
        best = best_checkpoint(self.settings.output / f"{self.settings.model}.pt", self.history)
        if best is not None:
            self.result.load_state_dict(read_checkpoint(best)["model"])

    def save(self, suffix: str = "") -> None:
        """Write a checkpoint into the output folder."""
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        progress = {
            "epoch": self.epoch,
            "step": self.step,
            "sums": self.sums,
            "history": self.history,
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        if self.average is not None:
            progress["weights"] = self.network.state_dict()
        path = self.settings.output / f"{self.settings.model}{suffix}.pt"
        save_checkpoint(path, self.result, self.settings, self.classes, progress)

    def _restore(self, path: Path) -> None:
        checkpoint = read_checkpoint(path)
        progress = checkpoint["progress"]
        try:
            self.result.load_state_dict(checkpoint["model"])
            # Without an average, the weights in training are those of the model.
            self.network.load_state_dict(progress.get("weights", checkpoint["model"]))
            self.optimizer.load_state_dict(progress["optimizer"])
            self.epoch, self.step = progress["epoch"], progress["step"]
            self.sums = [*progress["sums"], 0.0][: len(LOSSES)]  # older checkpoints have no energy
            self.history = progress["history"]
            if self.accelerator.scaler is not None and progress["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(progress["scaler"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"--resume: {path} does not fit: {str(error).splitlines()[0]}") from error


def set_aside_earlier_run(folder: Path) -> None:
    """Rename the checkpoints, the table and the curves of an earlier run, so that they are not taken for this one's."""
    shutil.rmtree(folder / "tensorboard.old", ignore_errors=True)  # a folder does not replace another one
    for pattern in ("cam*.pt", "single_stage*.pt", "iou.csv", "tensorboard"):
        for path in folder.glob(pattern):
            path.replace(path.with_name(f"{path.name}.old"))


def checkpoint_to_resume(settings: Settings) -> Path | None:
    """Return the checkpoint that this network resumes from, or None. The file is read once, to check it.

    It is the file `resume` if that is a checkpoint of this network, else the last checkpoint of the network in that
    folder.
    """
    resume = settings.resume
    if resume is None:
        return None
    if resume.is_file() and read_checkpoint(resume)["settings"].get("model") == settings.model:
        return resume
    last = resumed_folder(resume) / f"{settings.model}.pt"
    if not last.is_file():
        return None
    read_checkpoint(last)
    return last
