"""Reads a maze from pixels, in any colours, with the blur and noise of a generator on them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from examples.maze.world import CELL, Cell, Colour, Look, Place, distance

BLEND = 3  # pixels that blur reaches to either side of a border


@dataclass(frozen=True)
class Reading:
    """What a picture shows."""

    corridors: np.ndarray  # bool (n, n)
    circle: Place | None  # its centre; None if it cannot be seen
    circles: int  # how many separate blobs have the circle's colour
    goal: Cell
    look: Look  # its colours only


def read(image: np.ndarray, like: Reading | None = None) -> Reading:
    """Reads uint8 (16 n, 16 n, 3), n from 3 to 16. Raises ValueError if it is no maze.

    like: the reading of the task's first picture. Its colours and goal are kept, so that the
    circle may hide the goal. The picture may then be larger than the first by a whole factor,
    as those of a small MP4 are; it counts by the means of its blocks.
    """
    if like:
        image = shrunk(image, CELL * len(like.corridors))
    check_size(image, like)
    pixels = image.astype(np.float32)
    goal, look = (like.goal, like.look) if like else learn(pixels)
    # of each pixel: 0 wall, 1 floor, 2 circle, 3 goal
    kinds = distances(pixels, [look.wall, look.floor, look.circle, look.goal]).argmin(-1)
    corridors = floor_cells(pixels, look.wall, look.floor)
    corridors[goal] = True  # its corners may be hidden
    if not like:
        fits = (kinds == 1) == enlarged(corridors)
        if fits[kinds < 2].mean() < 0.93:
            raise ValueError(f"the picture shows no grid of {CELL}-pixel cells")
    circles = blobs((kinds == 2) & is_thing(pixels, look.wall, look.floor))
    if circles:  # the others are smears
        least = max(14, 0.3 * len(circles[0]))
        circles = [blob for blob in circles if len(blob) >= least]
    return Reading(corridors, centre(circles[0]) if circles else None, len(circles), goal, look)


def check_size(image: np.ndarray, like: Reading | None) -> None:
    n = len(image) // CELL
    side = n * CELL
    if image.dtype != np.uint8 or image.shape != (side, side, 3) or not 3 <= n <= 16:
        raise ValueError(f"a maze picture is uint8, square, 3 to 16 cells of {CELL} pixels a side, "
                         f"not {image.dtype} {image.shape}")
    if like and len(like.corridors) != n:
        raise ValueError(f"the picture is {n} cells wide, but the task's first picture is "
                         f"{len(like.corridors)}")


def shrunk(image: np.ndarray, side: int) -> np.ndarray:
    """A picture that is larger than `side` pixels by a whole factor, in its first size."""
    factor = len(image) // side
    if factor < 2 or image.shape != (side * factor, side * factor, 3):
        return image
    blocks = image.reshape(side, factor, side, factor, 3)
    return blocks.mean((1, 3)).round().astype(image.dtype)


def enlarged(cells: np.ndarray) -> np.ndarray:
    """From a value a cell to one a pixel."""
    return cells.repeat(CELL, 0).repeat(CELL, 1)


# ------------------------------------------------------------------------------
# A picture of which nothing is known


def learn(pixels: np.ndarray) -> tuple[Cell, Look]:
    """The goal's cell, and the colours."""
    backgrounds = two_colours(corners(pixels).reshape(-1, 3))
    if distance(*backgrounds) < 30:
        raise ValueError("the picture does not show two backgrounds, wall and corridor")
    backgrounds = settle(pixels, backgrounds)  # blur reaches the corners, hardly the rest
    things = thing_colours(pixels, backgrounds)
    is_floor = floor_cells(pixels, *backgrounds)
    kinds = distances(pixels, [*backgrounds, *things]).argmin(-1)
    kinds = np.where(is_thing(pixels, *backgrounds), kinds, 0)
    shapes = []
    for kind, colour in zip((2, 3), things, strict=True):
        for blob in blobs(kinds == kind)[:1]:
            beneath = backgrounds[int(is_floor[cell_of(centre(blob))])]
            square = squareness(pixels, beneath, colour, blob)
            shapes.append((square, centre(blob), colour))
    shapes.sort(key=lambda shape: shape[0])
    if len(shapes) < 2 or shapes[0][0] > 0.9:
        raise ValueError("the picture does not show one circle and one goal square")
    (_, circle, circle_colour), (_, goal, goal_colour) = shapes
    wall, floor = backgrounds
    if not is_floor[cell_of(circle)]:  # a circle stands on floor
        wall, floor = floor, wall
    return cell_of(goal), Look(
        tuple(wall), tuple(floor), tuple(circle_colour), tuple(goal_colour))


def thing_colours(pixels: np.ndarray, backgrounds: np.ndarray) -> np.ndarray:
    """The colours of circle and goal (2, 3), in no order."""
    pieces = blobs(solid(is_thing(pixels, *backgrounds)))
    if not pieces:
        raise ValueError("the picture shows no circle and no goal square")
    # of several pieces the middles, so that a large thing does not outvote
    most = 16 if len(pieces) > 1 else None
    samples = []
    for piece in pieces:
        from_middle = np.square(piece - piece.mean(0)).sum(1)
        rows, columns = piece[from_middle.argsort()][:most].T
        samples.append(pixels[rows, columns])
    return two_colours(np.concatenate(samples))


def cell_of(place: Place) -> Cell:
    return round(place[0]), round(place[1])


def two_colours(samples: np.ndarray) -> np.ndarray:
    """The two colours (2, 3) that explain most of the samples (k, 3), RGB in whole numbers.

    Outliers hardly count.
    """
    picks = samples[:1]
    for _ in range(7):  # the sample farthest from all others so far: every colour gets its turn
        farthest = distances(samples, picks).min(-1).argmax()
        picks = np.r_[picks, samples[farthest][None]]
    for _ in range(3):  # to the middle of the samples near it
        near = distances(samples, picks) <= 30
        picks = np.stack([np.median(samples[mask], 0) for mask in near.T if mask.any()])
    costs = np.minimum(distances(samples, picks), 60)
    pairs = map(list, combinations(range(len(picks)), 2))
    best = min(pairs, key=lambda pair: costs[:, pair].min(-1).sum())
    return settle(samples, picks[best])


def settle(samples: np.ndarray, pair: np.ndarray) -> np.ndarray:
    """Two colours moved to the medians of the samples near them, RGB in whole numbers (2, 3)."""
    for _ in range(3):
        far = distances(samples, pair)
        moved = []
        for i, colour in enumerate(pair):
            group = samples[(far.argmin(-1) == i) & (far[..., i] < 60)]
            moved.append(np.median(group, 0) if len(group) else colour)
        pair = np.stack(moved)
    return pair.round().astype(int)


def squareness(pixels: np.ndarray, floor: Colour, colour: Colour, blob: np.ndarray) -> float:
    """E[x^2 y^2] / E[x^2] E[y^2] of a blob: 1 for an upright square of any size, 2/3 for a disc.

    Its pixels count by how much of its colour is in them, since so few that those on the rim
    decide.
    """
    top, left = np.maximum(blob.min(0) - 1, 0)
    bottom, right = blob.max(0) + 2
    way = np.subtract(colour, floor, dtype=float)
    share = (pixels[top:bottom, left:right] - floor) @ way / (way @ way)
    weights = np.clip(2 * share - 0.5, 0, 1)

    def mean(values):
        return np.average(values, weights=weights)

    y, x = np.indices(weights.shape)
    yy = np.square(y - mean(y))
    xx = np.square(x - mean(x))
    return float(mean(yy * xx) / (mean(yy) * mean(xx)))


# ------------------------------------------------------------------------------
# Pixels and cells


def distances(pixels: np.ndarray, colours) -> np.ndarray:
    """How far pixels (.., 3) are from each of k colours, (.., k)."""
    far = [np.sqrt(np.square(pixels - np.float32(colour)).sum(-1)) for colour in colours]
    return np.stack(far, -1)


def corners(pixels: np.ndarray) -> np.ndarray:
    """Mean colours (n, n, 4, 3) near the four corners of each cell, where its background shows.

    A circle that is centred in the cell hides none of them, one between two cells at most two.
    The outermost pixels are left out because of blur.
    """
    n = len(pixels) // CELL
    cells = pixels.reshape(n, CELL, n, CELL, 3).swapaxes(1, 2)
    ends = slice(1, 3), slice(CELL - 3, CELL - 1)
    means = [cells[:, :, rows, columns].mean((2, 3)) for rows in ends for columns in ends]
    return np.stack(means, 2)


def floor_cells(pixels: np.ndarray, wall: Colour, floor: Colour) -> np.ndarray:
    """Which cells have floor in their corners, bool (n, n)."""
    far = distances(corners(pixels), [wall, floor])
    cost = np.minimum(far, distance(wall, floor) / 2).sum(2)  # hidden corners abstain
    return cost[..., 1] < cost[..., 0]


def is_thing(pixels: np.ndarray, wall: Colour, floor: Colour) -> np.ndarray:
    """Which pixels, bool (16 n, 16 n), are neither wall nor floor nor, near a border, a blend."""
    is_floor = enlarged(floor_cells(pixels, wall, floor))
    i = np.arange(len(pixels))
    ends = np.maximum(i - BLEND, 0), np.minimum(i + BLEND, len(pixels) - 1)
    differs = [is_floor[np.ix_(rows, columns)] != is_floor for rows in ends for columns in ends]
    border = np.any(differs, 0)
    base = np.float32(wall)
    way = np.subtract(floor, base, dtype=np.float32)
    share = np.clip((pixels - base) @ way / (way @ way), 0, 1)
    share = np.where(border, share, share.round())
    return np.linalg.norm(pixels - base - share[..., None] * way, axis=-1) > 35


def solid(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask that have at most one of their eight neighbours outside.

    That drops the thin blends along edges.
    """
    padded = np.pad(mask.astype(int), 1)
    height, width = mask.shape
    around = [padded[i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return mask & (sum(around) >= 8)


def blobs(mask: np.ndarray) -> list[np.ndarray]:
    """The connected pieces of a mask, as (row, column) arrays (k, 2) in pixels, largest first.

    What is not solid separates them, but counts as their rim.
    """
    whole = {tuple(pixel) for pixel in np.argwhere(mask).tolist()}
    left = {tuple(pixel) for pixel in np.argwhere(solid(mask)).tolist()}
    found = []
    while left:
        todo = [left.pop()]
        blob: set = set()
        while todo:
            r, c = todo.pop()
            around = {(r + i, c + j) for i in (-1, 0, 1) for j in (-1, 0, 1)}
            blob |= around & whole
            todo.extend(around & left)
            left -= around
        found.append(np.array(sorted(blob)))
    return sorted(found, key=len, reverse=True)


def centre(blob: np.ndarray) -> Place:
    row, column = ((blob.mean(0) + 0.5) / CELL - 0.5).tolist()
    return row, column
