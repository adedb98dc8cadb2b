"""Train on a subset of Pascal VOC that is mostly animals, and write the table of the seven classes it is made of.

    python benchmarks/voc_animals.py VOC_ROOT --labels VOC_ROOT/image_labels.txt

Any other argument goes to examples/train_voc.py. There are two trainings, one with PAMR and the baseline, one without
either; what is finished is not trained again. The mean is over background and six animals' classes, on images that were
picked for them: it cannot be compared with a figure of 21 classes.
"""

import platform
import sys
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from train_voc import main as train_main  # noqa: E402
from voc.arguments import parse_arguments  # noqa: E402
from voc.evaluation.tables import iou_table, load_iou_csv  # noqa: E402

ANIMALS = ("background", "cat", "cow", "dog", "horse", "person", "sheep")


def main() -> int:
    """Train what has not been trained yet, then write benchmarks/results/voc_animals.md. Returns the exit code."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    data, *others = sys.argv[1:]
    arguments = ["--data", data, *others, "--table-classes", *ANIMALS]
    output = parse_arguments(arguments).output
    without = output.with_name(f"{output.name}_without_pamr")
    runs = {output: [], without: ["--pamr-iterations", "0", "--no-baseline", "--output", str(without)]}
    columns: dict[str, Tensor] = {}
    for folder, changes in runs.items():
        if not (folder / "iou.csv").is_file():
            code = train_main([*arguments, *changes])
            if code:
                return code
        classes, found = load_iou_csv(folder / "iou.csv")
        columns |= found if folder == output else {"ours without PAMR": found["ours"]}
    shown = [argument.replace(data, "VOC_ROOT") for argument in others]
    text = f"""# VOC animals

IoU in percent on the test images. {date.today()}, {device_name()}, PyTorch {torch.__version__}:

    python benchmarks/voc_animals.py VOC_ROOT {" ".join(shown)}

{iou_table(classes, columns, [classes.index(name) for name in ANIMALS])}

The data are a subset of Pascal VOC 2012 chosen for these classes, at reduced size: this mean is not VOC's.
CAM-GAP has the same backbone, images, augmentation, optimiser and epochs. Its background score is a free number: shown
are the authors' 0.1, and of 0.1, 0.2, ... 0.6 the one that suits it best on the test images themselves.
"""
    (ROOT / "benchmarks/results/voc_animals.md").write_text(text)
    return 0


def device_name() -> str:
    """Return the GPU's name, or the number of CPU threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads ({platform.machine()})"


if __name__ == "__main__":
    sys.exit(main())
