"""Draw the pictures of the documentation, docs/images/*.png: `python docs/figures.py`."""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from voc.dataset.toy import OBJECTS, draw_scene  # noqa: E402
from voc.visualise import overlay  # noqa: E402

from wsseg_layers import PAMR, PAR, DenseCRF, PseudoLabels  # noqa: E402
from wsseg_layers.functional import (  # noqa: E402
    cam_to_label,
    dense_energy_loss,
    focal_size_penalty,
    global_cue_injection,
    ngwp_pool,
    normalise_cam,
    pamr,
    stochastic_gate,
    threshold_pseudo_labels,
)

IMAGES = ROOT / "docs/images"


def main() -> None:
    """Draw every picture."""
    figures = {
        "pamr": draw_pamr,
        "par": draw_par,
        "ngwp": draw_ngwp,
        "size_penalty": draw_size_penalty,
        "stochastic_gate": draw_stochastic_gate,
        "gci": draw_gci,
        "dense_crf": draw_dense_crf,
        "dense_energy_loss": draw_dense_energy_loss,
        "pseudo_labels": draw_pseudo_labels,
        "pseudo_labels_thresholds": draw_thresholds,
    }
    for name, draw in figures.items():
        torch.manual_seed(0)
        draw().savefig(IMAGES / f"{name}.png", dpi=110)


def scene() -> tuple[Tensor, Tensor]:
    """Return an image [1, 3, H, W] and the mask of one of its objects, as coarse as a network's, [1, 1, H, W]."""
    picture, label = draw_scene(np.random.default_rng((3, 5)))
    image = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    masks = torch.stack([torch.from_numpy(label == index).float() for index in range(1, len(OBJECTS) + 1)])
    largest = masks[masks.sum(dim=(1, 2)).argmax()][None, None]
    coarse = F.avg_pool2d(largest, 16, ceil_mode=True)
    return image, F.interpolate(coarse, image.shape[2:], mode="bilinear", align_corners=True)


def row_of_pictures(
    pictures: dict[str, Tensor],
    width: float = 2.2,
    value_range: tuple[float | None, float | None] = (0, 1),
    rows: int = 1,
    height: float = 2.09,
) -> Figure:
    """Draw images [1, 3, H, W] and maps [1, 1, H, W] side by side under their titles, in one row or several."""
    columns = len(pictures) // rows
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    every_axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (title, picture) in zip(every_axes, pictures.items(), strict=True):
        if picture.shape[1] == 3:
            axes.imshow(picture[0].permute(1, 2, 0).numpy())
        else:
            axes.imshow(picture[0, 0].numpy(), cmap="viridis", vmin=value_range[0], vmax=value_range[1])
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
    return figure


def draw_pamr() -> Figure:
    """Image, coarse mask, and the mask after some iterations."""
    image, mask = scene()
    pictures = {"image": image, "mask": mask}
    for num_iter in (1, 3, 10):
        pictures[f"{num_iter} iteration{'s' * (num_iter > 1)}"] = pamr(image, mask, num_iter)
    return row_of_pictures(pictures)


def draw_par() -> Figure:
    """The same mask refined by PAMR and by PAR, which sees colour differences squared."""
    image, mask = scene()
    refined = PAR()(image, mask)
    pictures = {
        "image": image,
        "mask": mask,
        "PAMR": PAMR()(image, mask),
        f"PAR, up to {refined.max():.2f}": refined,
        "PAR, renormalised": PAR(renormalise=True)(image, mask),
    }
    return row_of_pictures(pictures, value_range=(0, 1.1))


def draw_ngwp() -> Figure:
    """The score of a square object over its size: nGWP against global average pooling."""
    sides = np.arange(42)
    pooled, average = [], []
    for side in sides:
        masks = torch.zeros(1, 1, 41, 41)
        masks[:, :, :side, :side] = 1
        scores = 5 * masks - 1  # 4 on the object, -1 around it
        pooled.append(ngwp_pool(scores, masks).item())
        average.append(scores.mean().item())
    figure = Figure(figsize=(5.5, 3), layout="constrained")
    axes = figure.subplots()
    share = sides**2 / 41**2
    axes.plot(share, pooled, label="nGWP, eq. 3")
    axes.plot(share, average, label="average pooling (CAM-GAP), eq. 1")
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="share of the image that the object covers", ylabel="class score")
    axes.legend()
    return figure


def draw_size_penalty() -> Figure:
    """The penalty over the mask's mean for several powers and lambdas."""
    sizes = torch.linspace(0, 1, 200)
    masks = sizes.view(1, -1, 1, 1)
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for p in (0, 1, 3, 5):
        left.plot(sizes.numpy(), focal_size_penalty(masks, p=p)[0].numpy(), label=f"p = {p}")
    for lam in (0.1, 0.01, 0.001):
        right.plot(sizes.numpy(), focal_size_penalty(masks, lam=lam)[0].numpy(), label=rf"$\lambda$ = {lam}")
    left.set(xlabel=r"mean of the mask, $\bar m_c$", ylabel="penalty", title=r"$\lambda$ = 0.01")
    right.set(xlabel=r"mean of the mask, $\bar m_c$", title="p = 3")
    left.legend()
    right.legend()
    return figure


def draw_stochastic_gate() -> Figure:
    """Smooth deep and fine shallow features, one draw of eq. 9, the mean of many, and eq. 10."""
    image, mask = scene()
    deep = mask[:, :, ::3, ::3]
    shallow = image.mean(dim=1, keepdim=True)[:, :, ::3, ::3]
    draws = torch.stack([stochastic_gate(deep, shallow, 0.3) for _ in range(500)])
    pictures = {
        "deep": deep,
        "shallow": shallow,
        "training, one draw": draws[0],
        "mean of 500 draws": draws.mean(dim=0),
        "evaluation": stochastic_gate(deep, shallow, 0.3, training=False),
    }
    return row_of_pictures(pictures, value_range=(-0.3, 1.3))


def draw_gci() -> Figure:
    """One shallow feature, normalised, and after eq. 11 for two pairs of cues."""
    image, _ = scene()
    grey = image.mean(dim=1, keepdim=True)
    edges = (grey - F.avg_pool2d(grey, 5, stride=1, padding=2)) * 4
    pictures = {"image": image, "shallow feature": edges}
    for scale, shift in ((1.0, 0.0), (0.3, 1.0), (0.0, 0.5)):
        cues = torch.tensor([scale, shift]).view(1, 2, 1, 1)
        pictures[f"z = {scale}, b = {shift}"] = global_cue_injection(edges, cues)
    return row_of_pictures(pictures, value_range=(-1, 2))


def draw_dense_crf() -> Figure:
    """Image, coarse mask, and the mask after PAMR and after the dense CRF."""
    image, mask = scene()
    scores = torch.cat([1 - mask, mask], dim=1)
    pictures = {"image": image, "coarse mask": mask, "PAMR, 10 iterations": PAMR(10)(image, mask)}
    for num_iter in (1, 10):
        steps = f"{num_iter} step{'s' if num_iter > 1 else ''}"
        pictures[f"dense CRF, {steps}"] = DenseCRF(num_iter)(255 * image, scores)[:, 1:]
    return row_of_pictures(pictures)


def draw_dense_energy_loss() -> Figure:
    """Image, coarse mask, and where a step against the gradient raises and lowers the mask."""
    image, mask = scene()
    scores = torch.cat([1 - mask, mask], dim=1).requires_grad_()
    everywhere = torch.ones_like(mask[:, 0])
    dense_energy_loss(255 * image, scores, everywhere, everywhere.bool(), sigma_rgb=15, sigma_xy=50).backward()
    assert scores.grad is not None
    step = scores.grad[:, :1] - scores.grad[:, 1:]
    change = 0.5 + 0.5 * step / step.abs().max()
    pictures = {"image": image, "coarse mask": mask, "change that the loss asks for": change}
    return row_of_pictures(pictures, width=2.8)


def scene_of_two() -> tuple[Tensor, Tensor, Tensor]:
    """Return an image [1, 3, H, W] of two objects, CAMs [1, C, H, W] of all classes, and image-level labels [1, C]."""
    picture, label = draw_scene(np.random.default_rng((3, 7)))
    image = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    masks = torch.stack([torch.from_numpy(label == index).float() for index in range(1, len(OBJECTS) + 1)])
    # What a classifier sees: the middle of an object more than its ends, 16 pixels at a time.
    coarse = F.avg_pool2d(masks[None], 16)
    coarse = F.avg_pool2d(coarse, 3, stride=1, padding=1, count_include_pad=False) * (0.3 + coarse)
    cams = F.interpolate(normalise_cam(coarse), image.shape[2:], mode="bilinear", align_corners=False)
    return image, cams, masks.any(dim=2).any(dim=1)[None]


def painted(image: Tensor, labels: Tensor) -> Tensor:
    """Return an image [1, 3, H, W] with labels [1, H, W] painted over it."""
    return torch.from_numpy(overlay(image[0], labels[0])).permute(2, 0, 1)[None]


def draw_pseudo_labels() -> Figure:
    """The steps of `refine_pseudo_labels`: two background scores, refined, to labels, merged, within a box."""
    image, cams, labels = scene_of_two()
    height, width = image.shape[2:]
    box = torch.tensor([[8, height - 4, 4, width - 12]])
    first, second = torch.nonzero(labels[0])[:, 0].tolist()
    arguments = (image, cams, labels)
    _, before = PseudoLabels(None).labels_and_maps(*arguments)
    merged, maps = PseudoLabels(PAR()).labels_and_maps(*arguments)
    high, low = (PseudoLabels(PAR(), score)(*arguments) for score in (0.7, 0.25))
    pictures = {
        "image": image,
        "CAM of one class": cams[:, first, None],
        "CAM of the other": cams[:, second, None],
        "background, high score": before[:, 0, :1],
        "background, low score": before[:, 1, :1],
        "high score, refined": maps[:, 0, :1],
        "argmax, high score": painted(image, high),
        "argmax, low score": painted(image, low),
        "merged": painted(image, merged),
        "within a box": painted(image, PseudoLabels(PAR())(*arguments, box)),
    }
    return row_of_pictures(pictures, value_range=(None, None), rows=2, height=2.6)


def draw_thresholds() -> Figure:
    """`cam_to_label`, and the paper's rule before and after PAMR."""
    image, cams, labels = scene_of_two()
    masks = torch.cat([1 - cams.amax(dim=1, keepdim=True), cams], dim=1)
    refined = pamr(image, masks)
    pictures = {
        "image": image,
        "cam_to_label": painted(image, cam_to_label(cams, labels)),
        "threshold_pseudo_labels": painted(image, threshold_pseudo_labels(masks, labels)),
        "after PAMR": painted(image, threshold_pseudo_labels(refined, labels)),
    }
    return row_of_pictures(pictures)


if __name__ == "__main__":
    main()
