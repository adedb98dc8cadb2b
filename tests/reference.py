"""The layers once more: plain float64 loops, written from the equations and sharing nothing with the library.

Slow and meant to be read. Arrays in, arrays out; a batch is a loop like any other.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def ngwp(scores: Array, masks: Array, eps: float) -> Array:
    """Eq. 3, [B, C]."""
    batch, classes, height, width = scores.shape
    pooled = np.zeros((batch, classes))
    for b in range(batch):
        for c in range(classes):
            weighted = total = 0.0
            for i in range(height):
                for j in range(width):
                    weighted += masks[b, c, i, j] * scores[b, c, i, j]
                    total += masks[b, c, i, j]
            pooled[b, c] = weighted / (eps + total)
    return pooled


def focal_size_penalty(masks: Array, p: float, lam: float) -> Array:
    """Eq. 5, [B, C]."""
    batch, classes, height, width = masks.shape
    penalty = np.zeros((batch, classes))
    for b in range(batch):
        for c in range(classes):
            mean = 0.0
            for i in range(height):
                for j in range(width):
                    mean += masks[b, c, i, j] / (height * width)
            penalty[b, c] = max(0.0, 1 - mean) ** p * np.log(lam + mean)
    return penalty


def stochastic_gate_training(deep: Array, shallow: Array, mixing_rate: float, chosen: NDArray[np.bool_]) -> Array:
    """Eq. 9 for a given draw r = `chosen`."""
    mixed = np.zeros(deep.shape)
    for index in np.ndindex(deep.shape):
        r = float(chosen[index])
        compensated = (deep[index] - mixing_rate * shallow[index]) / (1 - mixing_rate)
        mixed[index] = (1 - r) * compensated + r * shallow[index]
    return mixed


def stochastic_gate_evaluation(deep: Array, shallow: Array, mixing_rate: float) -> Array:
    """Eq. 10."""
    mixed = np.zeros(deep.shape)
    for index in np.ndindex(deep.shape):
        mixed[index] = (1 - mixing_rate) * deep[index] + mixing_rate * shallow[index]
    return mixed


def convolution_1x1(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """Every pixel's channels times `weight` [out, in], plus `bias` [out]."""
    batch, _, height, width = x.shape
    y = np.zeros((batch, len(weight), height, width))
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                y[b, :, i, j] = weight @ x[b, :, i, j] + (0 if bias is None else bias)
    return y


def normalise(x: Array, mean: Array, variance: Array, eps: float) -> Array:
    """Channel by channel; `mean` and `variance` are [C]."""
    y = np.zeros(x.shape)
    for c in range(x.shape[1]):
        y[:, c] = (x[:, c] - mean[c]) / np.sqrt(variance[c] + eps)
    return y


def global_cue_injection(shallow: Array, cues: Array, eps: float) -> Array:
    """Eq. 11, the cues being the deep features after the convolution that doubles their channels."""
    batch, channels, _, _ = shallow.shape
    augmented = np.zeros(shallow.shape)
    for b in range(batch):
        for c in range(channels):
            z = cues[b, c].max()
            shift = cues[b, channels + c].max()
            x = shallow[b, c]
            augmented[b, c] = np.maximum(0, z * (x - x.mean()) / np.sqrt(x.var() + eps) + shift)
    return augmented


def gci_batch(shallow: Array, deep: Array, state: dict[str, Array], eps: float) -> Array:
    """The authors' published form in evaluation mode, from the module's state_dict."""

    def convolution(x: Array, name: str) -> Array:
        return convolution_1x1(x, state[f"{name}.0.weight"][:, :, 0, 0])

    def batch_norm(x: Array, name: str, affine: bool) -> Array:
        y = normalise(x, state[f"{name}.1.running_mean"], state[f"{name}.1.running_var"], eps)
        if affine:
            for c in range(y.shape[1]):
                y[:, c] = y[:, c] * state[f"{name}.1.weight"][c] + state[f"{name}.1.bias"][c]
        return y

    cues = np.maximum(0, batch_norm(convolution(deep, "deep"), "deep", affine=True))
    x = batch_norm(convolution(shallow, "shallow"), "shallow", affine=False)
    batch, channels = x.shape[:2]
    for b in range(batch):
        for c in range(channels):
            gamma = cues[b, c].max()
            beta = cues[b, channels + c].max()
            x[b, c] = np.maximum(0, x[b, c] * (gamma + 1) + beta)
    return np.maximum(0, batch_norm(convolution(x, "project"), "project", affine=True))


def neighbours(i: int, j: int, height: int, width: int, dilations: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Row and column of the 8 neighbours of (i, j) for every dilation, clamped to the map (replicate padding)."""
    for d in dilations:
        for di in (-d, 0, d):
            for dj in (-d, 0, d):
                if (di, dj) != (0, 0):
                    yield min(max(i + di, 0), height - 1), min(max(j + dj, 0), width - 1)


def softmax(x: Array) -> Array:
    """Softmax of a vector."""
    e = np.exp(x - x.max())
    return e / e.sum()


def position_affinity(dilations: Sequence[int], w1: float = 0.3, guard: float = 1e-8) -> Array:
    """PAR's term of position, [N]: the same for every pixel."""
    distance = []
    for d in dilations:
        for di in (-d, 0, d):
            for dj in (-d, 0, d):
                if (di, dj) != (0, 0):
                    distance.append(np.sqrt(2) * d if di and dj else float(d))
    position = np.array(distance)
    return softmax(-((position / (position.std(ddof=1) + guard) / w1) ** 2))


def pamr_affinity(image: Array, dilations: Sequence[int], variant: str = "pamr") -> Array:
    """[B, 8 x number of dilations, H, W]; `variant` is "pamr" (released), "paper" (eq. 8) or "par"."""
    batch, channels, height, width = image.shape
    affinity = np.zeros((batch, 8 * len(dilations), height, width))
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                around = list(neighbours(i, j, height, width, dilations))
                similarity = np.zeros(len(around))  # k, averaged over the channels
                for k in range(channels):
                    centre = image[b, k, i, j]
                    values = np.array([image[b, k, row, column] for row, column in around])
                    difference = np.abs(centre - values)
                    # The centre is one of the 9 samples of every dilation.
                    samples = np.concatenate([values, np.full(len(dilations), centre)])
                    if variant == "pamr":
                        similarity -= difference / (1e-8 + 0.1 * samples.std(ddof=1)) / channels
                    elif variant == "paper":
                        similarity -= difference / (1e-8 + samples.var(ddof=1)) / channels
                    else:
                        similarity -= (difference / (values.std(ddof=1) + 1e-8) / 0.3) ** 2 / channels
                affinity[b, :, i, j] = softmax(similarity)
    if variant == "par":
        affinity += 0.01 * position_affinity(dilations)[:, None, None]
    return affinity


def scaled_pamr_affinity(image: Array, dilations: Sequence[int], weight: float) -> Array:
    """The published PAMR with another number than 0.1: softmax of -|I_i - I_n| / (1e-8 + weight sigma)."""

    def similarity(values: Array, centre: float) -> Array:
        samples = np.concatenate([values, np.full(len(dilations), centre)])
        return -np.abs(values - centre) / (1e-8 + weight * samples.std(ddof=1))

    return affinity_of(similarity, image, dilations)


def neighbour_affinity(image: Array, dilations: Sequence[int], weight: float) -> Array:
    """Softmax of -|I_i - I_n| / (1e-8 + weight sigma), with sigma of the neighbours alone."""

    def similarity(values: Array, centre: float) -> Array:
        return -np.abs(values - centre) / (1e-8 + weight * values.std(ddof=1))

    return affinity_of(similarity, image, dilations)


def par_affinity(image: Array, dilations: Sequence[int], w1: float, w2: float, guard: float) -> Array:
    """The published PAR with its three numbers: colour, plus w2 times position."""

    def similarity(values: Array, centre: float) -> Array:
        return -((np.abs(values - centre) / (values.std(ddof=1) + guard) / w1) ** 2)

    return affinity_of(similarity, image, dilations) + w2 * position_affinity(dilations, w1, guard)[:, None, None]


def constant_affinity(image: Array, dilations: Sequence[int], scale: float, power: int) -> Array:
    """Without sigma: softmax of -(|I_i - I_n| / scale)^power."""
    return affinity_of(lambda values, centre: -((np.abs(values - centre) / scale) ** power), image, dilations)


def affinity_of(similarity: Callable[[Array, float], Array], image: Array, dilations: Sequence[int]) -> Array:
    """The softmax over the neighbours of the mean over the channels of similarity(neighbours [N], pixel)."""
    batch, channels, height, width = image.shape
    affinity = np.zeros((batch, 8 * len(dilations), height, width))
    for b, i, j in np.ndindex(batch, height, width):
        around = list(neighbours(i, j, height, width, dilations))
        mean = np.zeros(len(around))
        for k in range(channels):
            values = np.array([image[b, k, row, column] for row, column in around])
            mean += similarity(values, image[b, k, i, j]) / channels
        affinity[b, :, i, j] = softmax(mean)
    return affinity


def squared_affinity(
    image: Array, dilations: Sequence[int], guard: float, weight: float, position_weight: float
) -> Array:
    """A form that no layer uses: softmax of -(|I_i - I_n| / (guard + weight var))^2, plus as much of the distances."""
    batch, channels, height, width = image.shape
    steps = [(di, dj) for d in dilations for di in (-d, 0, d) for dj in (-d, 0, d) if (di, dj) != (0, 0)]
    distance = np.array([np.hypot(di, dj) for di, dj in steps])
    position = softmax(-((distance / (guard + weight * distance.var(ddof=1))) ** 2))
    affinity = np.zeros((batch, 8 * len(dilations), height, width))
    for b, i, j in np.ndindex(batch, height, width):
        similarity = np.zeros(8 * len(dilations))
        for k in range(channels):
            values = np.array([image[b, k, row, column] for row, column in neighbours(i, j, height, width, dilations)])
            similarity -= ((values - image[b, k, i, j]) / (guard + weight * values.var(ddof=1))) ** 2 / channels
        affinity[b, :, i, j] = softmax(similarity) + position_weight * position
    return affinity


def pamr_propagate(mask: Array, affinity: Array, dilations: Sequence[int], num_iter: int) -> Array:
    """Eq. 7, `num_iter` times."""
    batch, _, height, width = mask.shape
    for _ in range(num_iter):
        propagated = np.zeros(mask.shape)
        for b in range(batch):
            for i in range(height):
                for j in range(width):
                    for n, (row, column) in enumerate(neighbours(i, j, height, width, dilations)):
                        propagated[b, :, i, j] += affinity[b, n, i, j] * mask[b, :, row, column]
        mask = propagated
    return mask


def gaussian_weights(image: Array | None, size: tuple[int, int], sigma_xy: float, sigma_rgb: float) -> Array:
    """Weights [H * W, H * W] of one image [3, H, W], or of position alone."""
    height, width = size
    weights = np.zeros((height * width, height * width))
    pixels = list(np.ndindex(height, width))
    for i, (y, x) in enumerate(pixels):
        for j, (v, u) in enumerate(pixels):
            exponent = ((y - v) ** 2 + (x - u) ** 2) / (2 * sigma_xy**2)
            if image is not None:
                exponent += ((image[:, y, x] - image[:, v, u]) ** 2).sum() / (2 * sigma_rgb**2)
            weights[i, j] = np.exp(-exponent)
    return weights


def simplex(feature: Array) -> tuple[list[tuple[int, ...]], Array]:
    """The corners of the simplex of the permutohedral lattice that holds a point of D features, and their weights."""
    d = len(feature)
    # Features are scaled so that splat, blur and slice together have a standard deviation of 1, and are placed in the
    # plane of D + 1 coordinates that sum to 0. Its vertices have integer coordinates of equal remainder by D + 1.
    position = np.zeros(d + 1)
    for i in range(1, d + 1):
        direction = np.array([1.0] * i + [-float(i)] + [0.0] * (d - i))
        position += direction / np.sqrt(i * (i + 1)) * feature[i - 1] * np.sqrt(2 / 3) * (d + 1)
    position = position.round(9)  # a pixel of column 0 lies on a face: rounding must not choose the side
    origin = np.rint(position / (d + 1)).astype(int) * (d + 1)
    order = list(np.argsort(-(position - origin), kind="stable"))
    excess = origin.sum() // (d + 1)
    # Too large a sum: the coordinates that were rounded up the most step back. Too small: the others step forward.
    for i in order[d + 1 - excess :] if excess > 0 else []:
        origin[i] -= d + 1
    for i in order[:-excess] if excess < 0 else []:
        origin[i] += d + 1
    rest = (position - origin) / (d + 1)
    order = list(np.argsort(-rest, kind="stable"))
    corners, weights = [tuple(int(x) for x in origin)], [1 - rest[order[0]] + rest[order[-1]]]
    for r in range(1, d + 1):
        corner = origin + r
        corner[order[d + 1 - r :]] -= d + 1
        corners.append(tuple(int(x) for x in corner))
        weights.append(rest[order[d - r]] - rest[order[d + 1 - r]])
    return corners, np.array(weights)


def lattice_weights(image: Array | None, size: tuple[int, int], sigma_xy: float, sigma_rgb: float) -> Array:
    """What the permutohedral lattice has for `gaussian_weights`."""
    height, width = size
    vertices: dict[tuple[int, ...], int] = {}
    splat: list[dict[int, float]] = []
    d = 2 if image is None else 5
    for y, x in np.ndindex(height, width):
        colour = [] if image is None else list(image[:, y, x] / sigma_rgb)
        corners, weights = simplex(np.array([x / sigma_xy, y / sigma_xy, *colour]))
        splat.append({vertices.setdefault(c, len(vertices)): w for c, w in zip(corners, weights, strict=True)})
    matrix = np.zeros((height * width, len(vertices)))
    for i, entries in enumerate(splat):
        for v, weight in entries.items():
            matrix[i, v] = weight
    blurred = matrix
    for axis in range(d + 1):
        step = np.ones(d + 1, dtype=int)
        step[axis] -= d + 1
        previous, blurred = blurred, blurred.copy()
        for corner, v in vertices.items():
            for neighbour in (tuple(np.array(corner) + step), tuple(np.array(corner) - step)):
                if neighbour in vertices:
                    blurred[:, v] += previous[:, vertices[neighbour]] / 2
    scale = (4 * np.pi / 3) ** (d / 2) * np.sqrt(d + 1) / 2 ** (d + 1)
    return (matrix @ blurred.T) * scale  # [reader, pixel that is read]


def normalised_weights(weights: Array) -> Array:
    """Divided by the square roots of the sums of the rows, on both sides."""
    root = np.sqrt(weights.sum(axis=1))
    return weights / root[:, None] / root[None, :]


def filter_values(values: Array, weights: Array) -> Array:
    """Weighted sums of one image's values [C, H, W]."""
    channels, height, width = values.shape
    result = np.zeros(values.shape)
    for c in range(channels):
        result[c] = (weights @ values[c].reshape(-1)).reshape(height, width)
    return result


def mean_field(logits: Array, weights: Sequence[tuple[float, Array]], num_iter: int) -> Array:
    """Krähenbühl and Koltun's algorithm 1 for one image [C, H, W], with filters of given strengths."""
    _, height, width = logits.shape
    marginals = np.zeros(logits.shape)
    for step in range(num_iter + 1):
        total = logits.copy()
        if step > 0:
            for strength, one in weights:
                total += strength * filter_values(marginals, one)
        for i in range(height):
            for j in range(width):
                marginals[:, i, j] = softmax(total[:, i, j])
    return marginals


def dense_energy(segmentation: Array, roi: Array, unlabelled: NDArray[np.bool_], weights: Array) -> tuple[float, Array]:
    """The dense energy of one image [C, H, W] and its gradient, for weights of the scale of the published filter."""
    channels, height, width = segmentation.shape
    similar = filter_values(segmentation * roi, weights)
    energy, gradient = 0.0, np.zeros(segmentation.shape)
    for i in range(height):
        for j in range(width):
            gate = 1.0 if unlabelled[i, j] else max(0.0, roi[i, j] - segmentation[:, i, j].max())
            for c in range(channels):
                energy -= roi[i, j] * segmentation[c, i, j] * gate * similar[c, i, j]
                gradient[c, i, j] = -2 * gate * similar[c, i, j] * roi[i, j]
    return energy, gradient


def resize(x: Array, height: int, width: int, align_corners: bool = True) -> Array:
    """Bilinear: the corners of both grids aligned, or those of their outermost pixels."""
    old_height, old_width = x.shape[2:]

    def source(i: int, old: int, new: int) -> float:
        if align_corners:
            return i * (old - 1) / (new - 1) if new > 1 else 0.0
        return max(0.0, (i + 0.5) * old / new - 0.5)

    y = np.zeros((*x.shape[:2], height, width))
    for i in range(height):
        for j in range(width):
            u, v = source(i, old_height, height), source(j, old_width, width)
            top, left = min(int(u), old_height - 1), min(int(v), old_width - 1)
            bottom, right = min(top + 1, old_height - 1), min(left + 1, old_width - 1)
            a, b = u - top, v - left
            y[:, :, i, j] = (1 - a) * ((1 - b) * x[:, :, top, left] + b * x[:, :, top, right]) + a * (
                (1 - b) * x[:, :, bottom, left] + b * x[:, :, bottom, right]
            )
    return y


def present_maps(
    image: Array,
    cams: Array,
    present: Sequence[int],
    background: float | Array | Callable[[Array], Array] | None,
    refine: Callable[[Array, Array], Array] | None,
    softmax_first: bool,
    down_scale: int,
    align_corners: bool,
) -> Array:
    """The refined maps [1 + n, H, W] of the n present classes of one image, the background first.

    Args:
        image: [K, H, W].
        cams: [C, h, w]; [1 + C, h, w] with the background first if `background` is None.
        present: the classes, in their order.
        background: a score, one per pixel [h, w], a function of the resized CAMs [n, h, w], or None.
        refine: a function of an image [1, K, h, w] and maps [1, 1 + n, h, w], or None.
        softmax_first: whether the softmax over the channels precedes the refinement.
        down_scale: divisor of the size.
        align_corners: of the resizing of the CAMs to that size.
    """
    height, width = image.shape[1:]
    small = (height // down_scale, width // down_scale)
    if background is None:
        channels = resize(cams[None, [0, *(c + 1 for c in present)]], *small, align_corners)[0]
    else:
        classes = np.zeros((0, *small))
        if present:
            classes = resize(cams[None, list(present)], *small, align_corners)[0]
        if callable(background):
            score = background(classes)
        elif isinstance(background, float):
            score = np.full(small, background)
        else:
            score = resize(background[None, None], *small, align_corners)[0, 0]
        channels = np.concatenate([score[None], classes])
    if softmax_first:
        for i, j in np.ndindex(*small):
            channels[:, i, j] = softmax(channels[:, i, j])
    if refine is not None:
        channels = refine(resize(image[None], *small, align_corners=False), channels[None])[0]
    return resize(channels[None], height, width, align_corners=False)[0]


def first_highest(maps: Array, present: Sequence[int]) -> NDArray[np.int64]:
    """The label [H, W] of the highest of the maps [1 + n, H, W], the first one of equals: 0, or 1 + class."""
    labels = np.zeros(maps.shape[1:], np.int64)
    for i, j in np.ndindex(*labels.shape):
        best = maps[0, i, j]
        for number, c in enumerate(present):
            if maps[1 + number, i, j] > best:
                best, labels[i, j] = maps[1 + number, i, j], 1 + c
    return labels


def margin(maps: Array) -> Array:
    """By how much the highest of the maps [1 + n, H, W] exceeds the second, [H, W]."""
    if len(maps) == 1:
        return np.full(maps.shape[1:], np.inf)
    ordered = np.sort(maps, axis=0)
    return np.asarray(ordered[-1] - ordered[-2])


def merge(high: NDArray[np.int64], low: NDArray[np.int64], ignore: int) -> NDArray[np.int64]:
    """A class in `high` stays, background in both stays, and all else is ignored."""
    merged = np.full(high.shape, ignore)
    for index in np.ndindex(high.shape):
        if high[index] > 0:
            merged[index] = high[index]
        elif low[index] == 0:
            merged[index] = 0
    return merged


def cam_labels(
    cams: Array, present: Sequence[int], high: float | Array, low: float | Array, ignore: int
) -> NDArray[np.int64]:
    """One image [C, h, w]: the class of the highest CAM above `high`, 0 where it is at most `low`, else ignored."""
    labels = np.zeros(cams.shape[1:], np.int64)
    high, low = np.broadcast_to(high, labels.shape), np.broadcast_to(low, labels.shape)
    for i, j in np.ndindex(*labels.shape):
        best, label = -np.inf, 0
        for c in present:
            if cams[c, i, j] > best:
                best, label = cams[c, i, j], 1 + c
        labels[i, j] = label if best > high[i, j] else 0 if best <= low[i, j] else ignore
    return labels


def confident_labels(
    masks: Array,
    present: Sequence[int],
    foreground: float,
    background: float,
    floor: float,
    discard: str,
    ignore: int,
) -> NDArray[np.int64]:
    """One image [1 + C, h, w], background first: what the paper's section 3.3 takes as ground truth."""
    channels = [0, *(1 + c for c in present)]
    claims = {}
    for channel in channels:
        threshold = max(floor, (background if channel == 0 else foreground) * masks[channel].max())
        claims[channel] = masks[channel] > threshold
    labels = np.full(masks.shape[1:], ignore)
    for i, j in np.ndindex(*labels.shape):
        claiming = [channel for channel in channels if claims[channel][i, j]]
        if len(claiming) == 1:
            labels[i, j] = claiming[0]
    needed = {"none": [], "classes": channels[1:], "all": channels}[discard]
    if any(channel not in labels for channel in needed):
        labels[:] = ignore
    return labels
