"""The files and the printed tables at the end of a training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..files.whole import write_text_whole
from ..visualise import save_curves
from .network import Evaluation, PseudoLabelQuality
from .tables import iou_table, save_iou_csv


@dataclass
class Report:
    """The results of the networks of one run: a column per method.

    `rows` are the indices of the classes in the printed tables, background (0) included.
    """

    classes: Sequence[str]
    rows: Sequence[int]
    iou: dict[str, Tensor] = field(default_factory=dict)
    average_precision: dict[str, Tensor] = field(default_factory=dict)
    histories: dict[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)
    pseudo_labels: PseudoLabelQuality | None = None

    def add(self, name: str, evaluation: Evaluation, history: Sequence[Mapping[str, float]]) -> None:
        """Add the columns of a network."""
        self.iou |= evaluation.iou
        self.average_precision[name] = evaluation.average_precision
        self.histories[name] = history

    def write(self, folder: Path, title: str, classification_epochs: int | None) -> str:
        """Write tables and curves; return the tables as text.

        Args:
            folder: the folder of the files.
            title: the line above the table of IoU.
            classification_epochs: the epochs before self-supervision; None if there is no self-supervision.
        """
        table = iou_table(self.classes, self.iou, self.rows)
        write_text_whole(folder / "iou.md", table + "\n")
        save_iou_csv(folder / "iou.csv", self.classes, self.iou)
        parts = [title, table]

        foreground = self.classes[1:]
        ap_table = iou_table(foreground, self.average_precision, [row - 1 for row in self.rows if row])
        write_text_whole(folder / "average_precision.md", ap_table + "\n")
        save_iou_csv(folder / "average_precision.csv", foreground, self.average_precision)
        parts += ["Average precision (%) of the image-level classification", ap_table]

        if self.pseudo_labels is not None:
            columns = {"pseudo labels": self.pseudo_labels.iou}
            labels_title = (
                f"IoU (%) of the pseudo labels on {self.pseudo_labels.num_images} training images; "
                f"they cover {self.pseudo_labels.coverage:.1f} % of the pixels"
            )
            labels_table = f"{labels_title}\n\n{iou_table(self.classes, columns, self.rows)}"
            write_text_whole(folder / "pseudo_labels.md", labels_table + "\n")
            save_iou_csv(folder / "pseudo_labels.csv", self.classes, columns)
            parts.append(labels_table)
        save_curves(folder / "curves.png", self.histories, classification_epochs)
        return "\n\n".join(parts)
