"""A small procedural data set in VOC's folder layout: textured objects on a textured background, drawn from a seed."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from ..files.whole import write_whole
from .images import save_mask
from .layout import SPLIT_FOLDER

Array = NDArray[np.float64]
Texture = Callable[[Array, Array], Array]  # (u, v) in units of the object's size -> tone in [0, 1]

SIZES = ((128, 160), (160, 128), (144, 144))
OBJECTS_PER_IMAGE = (1, 2, 2, 3)
MIN_VISIBLE = 0.02  # fraction of the image: a scene in which an object shows less is drawn again


def stripes(u: Array, _v: Array) -> Array:
    """Parallel bars."""
    return 0.5 + 0.5 * np.sign(np.sin(9 * u))


def checks(u: Array, v: Array) -> Array:
    """A chessboard."""
    return 0.5 + 0.5 * np.sign(np.sin(8 * u) * np.sin(8 * v))


def dots(u: Array, v: Array) -> Array:
    """Round spots on a grid."""
    return (np.cos(10 * u) + np.cos(10 * v) > 0.7).astype(np.float64)


def rings(u: Array, v: Array) -> Array:
    """Concentric circles."""
    return 0.5 + 0.5 * np.sin(18 * np.hypot(u, v))


def ripples(u: Array, v: Array) -> Array:
    """Smooth waves that bend."""
    return 0.5 + 0.5 * np.sin(9 * u + 2.5 * np.sin(5 * v))


# class -> (texture, lobes of the outline, depth of the lobes, height over width)
OBJECTS: dict[str, tuple[Texture, int, float, float]] = {
    "tiger": (stripes, 2, 0.12, 0.6),
    "flag": (checks, 4, 0.10, 0.8),
    "ladybird": (dots, 0, 0.0, 0.9),
    "shell": (rings, 5, 0.18, 1.0),
    "leaf": (ripples, 3, 0.15, 0.5),
}


def toy_voc(root: Path, num_train: int = 320, num_val: int = 80, seed: int = 0) -> Path:
    """Draw the data set into a folder below `root`, unless it is there already, and return the folder.

    The name of the folder contains the arguments. The folder appears only when it is complete.
    """
    folder = root / f"toy_voc_{num_train}_{num_val}_{seed}"
    if not folder.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        try:
            write_whole(folder, lambda partial: draw_toy_voc(partial, num_train, num_val, seed))
        except OSError:
            if not folder.is_dir():  # else another process has drawn it in the meantime
                raise
    return folder


def draw_toy_voc(folder: Path, num_train: int, num_val: int, seed: int) -> None:
    """Draw the images and masks, and write the lists of names."""
    for name in ("JPEGImages", "SegmentationClass", SPLIT_FOLDER):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "classes.txt").write_text("\n".join(OBJECTS) + "\n")
    names = [f"toy_{index:06d}" for index in range(num_train + num_val)]
    (folder / SPLIT_FOLDER / "train.txt").write_text("\n".join(names[:num_train]) + "\n")
    (folder / SPLIT_FOLDER / "val.txt").write_text("\n".join(names[num_train:]) + "\n")
    for index, name in enumerate(tqdm(names, desc="drawing the toy data set", unit="image")):
        image, mask = draw_scene(np.random.default_rng((seed, index)))
        Image.fromarray(image).save(folder / "JPEGImages" / f"{name}.jpg", quality=92)
        save_mask(folder / "SegmentationClass" / f"{name}.png", mask)


def draw_scene(rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return an image [H, W, 3] and its mask [H, W]: one to three objects of different classes, the last in front."""
    height, width = SIZES[rng.integers(len(SIZES))]
    classes = rng.permutation(len(OBJECTS))[: rng.choice(OBJECTS_PER_IMAGE)] + 1
    while True:
        image = draw_ground(rng, height, width)
        mask = np.zeros((height, width), dtype=np.uint8)
        for label in classes:
            draw_object(rng, image, mask, int(label))
        if all((mask == label).mean() >= MIN_VISIBLE for label in classes):
            break
    image += rng.normal(scale=0.02, size=image.shape)
    return (image.clip(0, 1) * 255).astype(np.uint8), mask


def draw_ground(rng: np.random.Generator, height: int, width: int) -> Array:
    """Return a background image [H, W, 3] of low-contrast clouds."""
    clouds = np.zeros((height, width))
    for cells in (3, 6, 12, 24):
        noise = Image.fromarray(rng.random((cells, cells)).astype(np.float32))
        clouds += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC)) / cells**0.5
    clouds = (clouds - clouds.min()) / (clouds.max() - clouds.min())
    light, dark = rng.uniform(0.45, 0.75, 3), rng.uniform(0.2, 0.45, 3)
    return dark + clouds[..., None] * (light - dark)


def draw_object(rng: np.random.Generator, image: Array, mask: NDArray[np.uint8], label: int) -> None:
    """Paint one object of class `label` (from 1) into image and mask, at a random place, size, angle and colour."""
    texture, lobes, depth, aspect = OBJECTS[list(OBJECTS)[label - 1]]
    height, width = mask.shape
    size = rng.uniform(0.2, 0.42) * min(height, width)
    y0, x0 = rng.uniform(0.2, 0.8) * height, rng.uniform(0.2, 0.8) * width
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:height, :width] + 0.0
    u = (np.cos(angle) * (x - x0) + np.sin(angle) * (y - y0)) / size
    v = (-np.sin(angle) * (x - x0) + np.cos(angle) * (y - y0)) / (size * aspect)
    radius = np.hypot(u, v)
    inside = radius < 1 + depth * np.cos(lobes * np.arctan2(v, u))
    base = rng.uniform(0.15, 1.0, 3)
    accent = (base + rng.uniform(0.3, 0.55) * rng.choice((-1, 1))).clip(0, 1)
    tone = texture(u, v)[..., None]
    shade = 1 - 0.25 * radius[..., None].clip(0, 1)
    image[inside] = ((base * (1 - tone) + accent * tone) * shade)[inside]
    mask[inside] = label
