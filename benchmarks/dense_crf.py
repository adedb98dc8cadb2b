"""Write results/dense_crf.md: the dense CRF beside pydensecrf2, and the lattice beside the exact sum.

    python -m benchmarks.dense_crf FOLDER_OF_PHOTOGRAPHS

needs `pip install pydensecrf2`. The scores are smooth random numbers, so that most pixels are undecided: no training is
needed, and the CRF decides.
"""

import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from wsseg_layers import DenseCRF, DenseEnergyLoss
from wsseg_layers.functional import bilateral_filter

RESULT = Path(__file__).resolve().parent / "results/dense_crf.md"
PHOTOGRAPHS, ROUNDS = 10, 5
SIZES = ((240, 320, 3), (375, 500, 21))
SIGMAS = ((3.0, None), (80.0, 13.0), (50.0, 15.0), (20.0, 13.0), (10.0, 30.0))


def main() -> int:
    """Measure, and write the tables. Returns the exit code."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    torch.manual_seed(0)
    files = sorted(Path(sys.argv[1]).glob("*.jpg"))[:PHOTOGRAPHS]
    parts = [
        f"`python -m benchmarks.dense_crf` on {processor()}, PyTorch {torch.__version__}, {len(files)} photographs.",
        "## Beside pydensecrf2",
        beside_pydensecrf(files),
        "## The lattice beside the exact sum",
        lattice_errors(files),
    ]
    RESULT.write_text("\n\n".join(parts) + "\n")
    print(RESULT.read_text())
    return 0


def processor() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def photograph(file: Path, height: int, width: int) -> Tensor:
    """Return a photograph [1, 3, H, W] in 0 to 255."""
    with Image.open(file) as image:
        pixels = np.array(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float()


def smooth_scores(channels: int, height: int, width: int) -> Tensor:
    """Return probabilities [1, C, H, W] of blobs of about 32 pixels."""
    coarse = torch.randn(1, channels, 2 + height // 32, 2 + width // 32)
    return F.interpolate(3 * coarse, size=(height, width), mode="bilinear").softmax(dim=1)


def pydensecrf(image: Tensor, scores: Tensor) -> Tensor:
    """Return what pydensecrf2 makes of one image, with its wrapper's conversions."""
    from pydensecrf.densecrf import DenseCRF2D

    _, channels, height, width = scores.shape
    crf = DenseCRF2D(width, height, channels)
    crf.setUnaryEnergy(np.ascontiguousarray(-scores[0].clamp(min=1e-5).log().reshape(channels, -1).numpy()))
    crf.addPairwiseGaussian(sxy=3, compat=3)
    rgb = np.ascontiguousarray(image[0].permute(1, 2, 0).byte().numpy())
    crf.addPairwiseBilateral(sxy=80, srgb=13, rgbim=rgb, compat=10)
    return torch.from_numpy(np.array(crf.inference(10))).view(1, channels, height, width)


def fastest(functions: dict[str, Callable[[], object]], clock: Callable[[], float]) -> dict[str, float]:
    """Return the shortest time of each function in milliseconds, of alternating calls."""
    times = {name: float("inf") for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            start = clock()
            function()
            times[name] = min(times[name], 1000 * (clock() - start))
    return times


def beside_pydensecrf(files: list[Path]) -> str:
    """Return the table of agreement and time."""
    crf = DenseCRF()

    def threads(count: int, image: Tensor, scores: Tensor) -> Callable[[], object]:
        def call() -> None:
            torch.set_num_threads(count)
            crf(image, scores)

        return call

    lines = [
        "| size, classes | equal labels | mean difference | largest | pydensecrf2, CPU ms | one thread, CPU ms |"
        " pydensecrf2, ms | one thread, ms | two threads, ms |",
        "|:--|" + "--:|" * 8,
    ]
    for height, width, channels in SIZES:
        equal, mean, largest = [], [], []
        for file in files:
            image, scores = photograph(file, height, width), smooth_scores(channels, height, width)
            theirs, ours = pydensecrf(image, scores), crf(image, scores)
            equal.append((theirs.argmax(dim=1) == ours.argmax(dim=1)).float().mean())
            mean.append((theirs - ours).abs().mean())
            largest.append((theirs - ours).abs().max())
        image, scores = photograph(files[0], height, width), smooth_scores(channels, height, width)
        compared = {"theirs": lambda: pydensecrf(image, scores), "one": threads(1, image, scores)}  # noqa: B023
        cpu = fastest(compared, time.process_time)
        wall = fastest({**compared, "two": threads(2, image, scores)}, time.perf_counter)
        lines.append(
            f"| {width} x {height}, {channels} | {100 * torch.stack(equal).min():.3f} % | {max(mean):.1e} |"
            f" {max(largest):.1e} | {cpu['theirs']:.0f} | {cpu['one']:.0f} | {wall['theirs']:.0f} | {wall['one']:.0f} |"
            f" {wall['two']:.0f} |"
        )
    images = torch.cat([photograph(file, 193, 193) for file in files * 2])[:16]
    scores = torch.cat([smooth_scores(3, 193, 193) for _ in images])
    batch = fastest({str(count): threads(count, images, scores) for count in (1, 2)}, time.perf_counter)
    cpu = fastest({"1": threads(1, images, scores)}, time.process_time)
    return "\n".join(lines) + (
        f"\n\nA batch of {len(images)} crops of 193 x 193 with 3 classes: {batch['1']:.0f} ms on one thread"
        f" (CPU time {cpu['1']:.0f} ms), {batch['2']:.0f} ms on two."
    )


def lattice_errors(files: list[Path]) -> str:
    """Return the table of errors on photographs of 128 x 96."""
    torch.set_num_threads(1)
    height, width = 96, 128
    lines = [
        "| sigma of position | of colour | normalised: relative RMS error | not normalised: sum / exact sum |",
        "|--:|--:|--:|--:|",
    ]
    for sigma_xy, sigma_rgb in SIGMAS:
        errors, ratios = [], []
        for file in files:
            image = None if sigma_rgb is None else photograph(file, height, width)
            values = smooth_scores(3, height, width)
            sigmas = (sigma_xy, sigma_rgb or 1.0)
            ours, exact = (bilateral_filter(values, image, *sigmas, True, name) for name in ("cpp", "eager"))
            errors.append(float((ours - exact).norm() / exact.norm()))
            ours, exact = (bilateral_filter(values, image, *sigmas, False, name) for name in ("cpp", "eager"))
            ratios.append(float(ours.sum() / exact.sum()))
        lines.append(
            f"| {sigma_xy:g} | {'-' if sigma_rgb is None else f'{sigma_rgb:g}'} | {100 * np.mean(errors):.1f} % |"
            f" {min(ratios):.2f} to {max(ratios):.2f} |"
        )
    equal, mean, energies = [], [], []
    for file in files:
        image, scores = photograph(file, height, width), smooth_scores(5, height, width)
        ours, exact = (DenseCRF(backend=name)(image, scores) for name in ("cpp", "eager"))
        equal.append(float((ours.argmax(dim=1) == exact.argmax(dim=1)).float().mean()))
        mean.append(float((ours - exact).abs().mean()))
        rois, labels = torch.ones(1, height, width), torch.full((1, 1, height, width), 255)
        one, other = (
            DenseEnergyLoss(1e-7, 15, 100, 0.5, name)(image, scores, rois, labels) for name in ("cpp", "eager")
        )
        energies.append(float(one / other))
    return "\n".join(lines) + (
        f"\n\n`DenseCRF` with the lattice and with exact sums, 5 classes: {100 * np.mean(equal):.1f} % equal labels,"
        f" mean difference of the marginals {np.mean(mean):.1e}. `DenseEnergyLoss`: {min(energies):.2f} to"
        f" {max(energies):.2f} times the exact value."
    )


if __name__ == "__main__":
    sys.exit(main())
