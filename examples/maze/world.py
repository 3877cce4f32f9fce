"""Grid mazes as in the paper's Figure 3: make them, draw them, read them back from pixels, score a
video by rule.

A maze is a square board of 4 to 8 cells, 16 pixels each. A cell is wall or corridor; a circle
stands in a corridor cell and has to reach the goal square. Cells are (row, column) counted from
the top left; a place between two cells is a pair of floats on the same scale, so (1.0, 2.5) lies
half-way between two corridor cells of row 1.
Only numpy is used, and nothing of collabvr.py.
"""
from __future__ import annotations

import colorsys
from collections import deque
from dataclasses import dataclass, field
from itertools import combinations, pairwise

import numpy as np

from examples.maze import moves

Cell = tuple[int, int]  # row and column
CELL = 16  # pixels a cell
MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}

# (wall, floor) as RGB: dark walls, light walls, coloured walls.
THEMES = [
    ((25, 25, 30), (245, 245, 245)), ((0, 0, 0), (255, 255, 255)),
    ((70, 85, 100), (205, 212, 220)), ((40, 80, 140), (225, 235, 245)),
    ((150, 70, 60), (240, 225, 205)), ((40, 90, 60), (230, 240, 220)),
    ((90, 50, 110), (240, 230, 245)), ((30, 110, 115), (220, 240, 238)),
    ((190, 160, 110), (255, 250, 235)), ((125, 125, 130), (250, 250, 245)),
    ((170, 175, 182), (255, 255, 255)), ((140, 150, 190), (20, 22, 40)),
    ((240, 240, 240), (62, 62, 72)), ((225, 215, 195), (80, 55, 45)),
]
CIRCLES = {"red": (220, 40, 40), "blue": (40, 90, 220), "orange": (245, 140, 30),
           "pink": (240, 110, 180)}
GOALS = {"green": (50, 170, 80), "red": (215, 50, 45), "yellow": (245, 205, 50)}


@dataclass(frozen=True)
class Look:
    """The colours (RGB, 0..255) and the sizes (in cells) in which a maze is drawn."""

    wall: tuple = THEMES[0][0]
    floor: tuple = THEMES[0][1]
    circle: tuple = CIRCLES["red"]
    goal: tuple = GOALS["green"]
    radius: float = 0.33  # of the circle
    half: float = 0.33  # half a side of the goal square


@dataclass(frozen=True)
class Maze:
    """open: bool (n, n), True for corridor; start and goal: corridor cells."""

    open: np.ndarray
    start: tuple
    goal: tuple
    look: Look = field(default_factory=Look)


# --------------------------------------------------------------------------------------------- make


def contrast(a, b) -> float:
    """Distance of two RGB colours, 0..441."""
    return float(np.linalg.norm(np.subtract(a, b, dtype=float)))


def make_look(rng: np.random.Generator, free: float = 0.0) -> Look:
    """A random look: a listed palette, slightly jittered; with probability `free` a circle and a
    goal of any colour, half of them between a wall and a floor of any colour."""
    while True:
        wall, floor = THEMES[rng.integers(len(THEMES))]
        circle = CIRCLES[rng.choice(list(CIRCLES))]
        goal = GOALS[rng.choice(list(GOALS))]
        if rng.random() < free:
            circle, goal = (255 * np.array(colorsys.hsv_to_rgb(*rng.random(3))) for _ in range(2))
            if rng.random() < 0.5:
                wall, floor = rng.integers(0, 256, (2, 3))
        colours = [tuple(int(x) for x in np.clip(np.add(c, rng.integers(-12, 13, 3)), 0, 255))
                   for c in (wall, floor, circle, goal)]
        pairs = [contrast(colours[i], colours[j]) for i in range(4) for j in range(i)]
        if min(pairs) > 75:
            radius = rng.uniform(0.27, 0.38)
            half = rng.choice([rng.uniform(0.27, 0.4), 0.5], p=[0.85, 0.15])
            return Look(*colours, radius=radius, half=half)


def carve(n: int, rng: np.random.Generator) -> np.ndarray:
    """Corridors one cell wide without loops, as a bool (n, n): a random tree in which each cell
    touches its parent only."""
    open = np.zeros((n, n), bool)
    # 2: the classic lattice with straight corridors of odd length
    step = 2 if rng.random() < 0.35 else 1
    edge = 1 if step == 2 and n % 2 else 0
    stack = [(edge, edge) if step == 2 else tuple(rng.integers(0, n, 2))]
    open[stack[0]] = True
    while stack:
        # depth first, with some branching
        i = -1 if rng.random() < 0.75 else rng.integers(len(stack))
        r, c = stack[i]
        for dr, dc in rng.permutation(list(MOVES.values())):
            far, near = (r + step * dr, c + step * dc), (r + dr, c + dc)
            inside = all(edge <= x < n - edge for x in far)
            if inside and not open[far] and (step == 2 or touching(open, far) == 1):
                open[near] = open[far] = True
                stack.append(far)
                break
        else:
            stack.pop(i)
    return open


def touching(open: np.ndarray, cell) -> int:
    """How many of a cell's four neighbours are open."""
    return sum(is_open(open, (cell[0] + dr, cell[1] + dc)) for dr, dc in MOVES.values())


def is_open(open: np.ndarray, cell) -> bool:
    """Whether a cell lies on the board and is corridor."""
    return all(0 <= x < n for x, n in zip(cell, open.shape)) and bool(open[tuple(cell)])


def shortest_path(open: np.ndarray, start, goal) -> list:
    """The cells of the shortest path, both ends included; [] if there is none."""
    before, queue = {tuple(start): None}, deque([tuple(start)])
    while queue:
        cell = queue.popleft()
        if cell == tuple(goal):
            path = [cell]
            while before[path[-1]] is not None:
                path.append(before[path[-1]])
            return path[::-1]
        for dr, dc in MOVES.values():
            step = (cell[0] + dr, cell[1] + dc)
            if is_open(open, step) and step not in before:
                before[step] = cell
                queue.append(step)
    return []


def segments(path) -> list:
    """A path as straight pieces: [(direction, cells), ..]."""
    names, out = {v: k for k, v in MOVES.items()}, []
    for a, b in pairwise(path):
        name = names[b[0] - a[0], b[1] - a[1]]
        if out and out[-1][0] == name:
            out[-1] = (name, out[-1][1] + 1)
        else:
            out.append((name, 1))
    return out


def make(n: int, pieces: int | None, rng: np.random.Generator, look: Look | None = None) -> Maze:
    """A random n x n maze whose shortest path has that many straight segments (None: any)."""
    while True:
        open = carve(n, rng)
        cells = [tuple(map(int, c)) for c in np.argwhere(open)]
        for _ in range(30 if len(cells) > 1 else 0):
            start, goal = (cells[i] for i in rng.choice(len(cells), 2, replace=False))
            if pieces in (None, len(segments(shortest_path(open, start, goal)))):
                return Maze(open, start, goal, look or make_look(rng))


# --------------------------------------------------------------------------------------------- draw


def draw(maze: Maze, at=None) -> np.ndarray:
    """The maze with its circle at a place (default: the start), as uint8 RGB of shape
    (16 n, 16 n, 3), edges smoothed."""
    look, n = maze.look, len(maze.open)
    image = np.where(maze.open[..., None], np.float32(look.floor), np.float32(look.wall))
    image = image.repeat(CELL, 0).repeat(CELL, 1)
    y, x = np.mgrid[: n * CELL, : n * CELL].astype(np.float32)

    def offset(cell):
        return y - (cell[0] + 0.5) * CELL + 0.5, x - (cell[1] + 0.5) * CELL + 0.5

    dy, dx = offset(maze.goal)
    square = np.clip(look.half * CELL + 0.5 - np.maximum(abs(dy), abs(dx)), 0, 1)
    dy, dx = offset(maze.start if at is None else at)
    disc = np.clip(look.radius * CELL + 0.5 - np.hypot(dy, dx), 0, 1)
    for shape, colour in (square, look.goal), (disc, look.circle):
        image += shape[..., None] * (np.float32(colour) - image)
    return image.round().astype(np.uint8)


def walk(path, num_frames: int, arrive: float = 0.9) -> list:
    """Places of a circle that goes along a path at constant speed and stands still after `arrive`
    of the frames."""
    path = np.asarray(path, float)
    lengths = np.r_[0, np.abs(np.diff(path, axis=0)).sum(1).cumsum()]
    s = np.clip(np.arange(num_frames) / (arrive * (num_frames - 1)), 0, 1) * lengths[-1]
    return list(zip(np.interp(s, lengths, path[:, 0]), np.interp(s, lengths, path[:, 1])))


def film(maze: Maze, path, num_frames: int = 17) -> np.ndarray:
    """A video of that walk, uint8 (num_frames, 16 n, 16 n, 3)."""
    return np.stack([draw(maze, at) for at in walk(path, num_frames)])


# --------------------------------------------------------------------------------------------- read


BLEND = 3  # pixels that blur reaches to either side of a border


@dataclass(frozen=True)
class Reading:
    """What a picture shows: a grid, things on it, and their colours as RGB."""

    open: np.ndarray  # bool (n, n), True for corridor
    circle: tuple | None  # (row, col) of its centre in cells; None if it cannot be seen
    circles: int  # how many separate blobs have the circle's colour
    goal: tuple | None
    wall: tuple
    floor: tuple
    circle_colour: tuple
    goal_colour: tuple


def read(image: np.ndarray, like: Reading | None = None) -> Reading:
    """Read a maze drawn in any colours from uint8 (16 n, 16 n, 3), n from 3 to 16; the blur and
    noise of a generator may be on it.

    like: the reading of the task's first picture. Its colours and goal are kept, so that the circle
    may hide the goal. The picture may be larger than the first by a whole factor, as those of a
    small MP4 are; it counts by the means of its blocks.
    """
    if like:
        side = CELL * len(like.open)
        factor = len(image) // side
        if factor > 1 and image.shape == (side * factor, side * factor, 3):
            blocks = image.reshape(side, factor, side, factor, 3)
            image = blocks.mean((1, 3)).round().astype(image.dtype)
    n = len(image) // CELL
    if image.dtype != np.uint8 or image.shape != (n * CELL, n * CELL, 3) or not 3 <= n <= 16:
        raise ValueError(f"a maze picture is uint8, square, 3 to 16 cells of {CELL} pixels a side, "
                         f"not {image.dtype} {image.shape}")
    if like and len(like.open) != n:
        raise ValueError(f"the picture is {n} cells wide, but the task's first picture is "
                         f"{len(like.open)}")
    pixels = image.astype(np.float32)
    goal, *colours = learn(pixels) if like is None else (
        like.goal, like.wall, like.floor, like.circle_colour, like.goal_colour)
    # of each pixel: 0 wall, 1 floor, 2 circle, 3 goal
    names = distances(pixels, colours).argmin(-1)
    open = open_cells(pixels, *colours[:2])
    open[goal] = True  # its corners may be hidden
    if not like and ((names == 1) == open.repeat(CELL, 0).repeat(CELL, 1))[names < 2].mean() < 0.93:
        raise ValueError(f"the picture shows no grid of {CELL}-pixel cells")
    found = blobs((names == 2) & foreign(pixels, *colours[:2]))
    # smaller ones are smears
    found = [blob for blob in found if len(blob) >= max(14, 0.3 * len(found[0]))]
    return Reading(open, centre(found[0]) if found else None, len(found), goal, *colours)


def learn(pixels: np.ndarray) -> tuple:
    """(goal cell, wall, floor, circle's colour, goal's colour) of a picture of which nothing is
    known."""
    backgrounds = two_colours(corners(pixels).reshape(-1, 3))
    if contrast(*backgrounds) < 30:
        raise ValueError("the picture does not show two backgrounds, wall and corridor")
    backgrounds = settle(pixels, backgrounds)  # blur reaches the corners, hardly the rest
    mask = foreign(pixels, *backgrounds)
    pieces = [piece[np.square(piece - piece.mean(0)).sum(1).argsort()]
              for piece in blobs(solid(mask))]
    if not pieces:
        raise ValueError("the picture shows no circle and no goal square")
    most = 16 if len(pieces) > 1 else None  # the middles, so that a large thing does not outvote
    things = two_colours(np.concatenate([pixels[tuple(piece[:most].T)] for piece in pieces]))
    names = np.where(mask, distances(pixels, [*backgrounds, *things]).argmin(-1), 0)
    floors = backgrounds[open_cells(pixels, *backgrounds).astype(int)]
    shapes = []
    for i in (2, 3):
        for blob in blobs(names == i)[:1]:
            cell = tuple(round(x) for x in centre(blob))
            square = squareness(pixels, floors[cell], things[i - 2], blob)
            shapes.append((square, centre(blob), things[i - 2]))
    shapes.sort(key=lambda shape: shape[0])
    if len(shapes) < 2 or shapes[0][0] > 0.9:
        raise ValueError("the picture does not show one circle and one goal square")
    (_, place, circle), (_, goal, goal_colour) = shapes
    cell = tuple(round(x) for x in place)
    if not open_cells(pixels, *backgrounds)[cell]:  # a circle stands on floor
        backgrounds = backgrounds[::-1]
    return tuple(round(x) for x in goal), *map(tuple, (*backgrounds, circle, goal_colour))


def corners(pixels: np.ndarray) -> np.ndarray:
    """Mean colours (n, n, 4, 3) near the four corners of each cell, where its background shows: a
    circle that is centred in the cell hides none of them, one between two cells at most two. The
    outermost pixels are left out because of blur."""
    n = len(pixels) // CELL
    cells = pixels.reshape(n, CELL, n, CELL, 3).swapaxes(1, 2)
    ends = slice(1, 3), slice(CELL - 3, CELL - 1)
    return np.stack([cells[:, :, a, b].mean((2, 3)) for a in ends for b in ends], 2)


def open_cells(pixels: np.ndarray, wall, floor) -> np.ndarray:
    """Which cells have floor in their corners, bool (n, n). The cap makes hidden corners
    abstain."""
    cost = np.minimum(distances(corners(pixels), [wall, floor]), contrast(wall, floor) / 2).sum(2)
    return cost[..., 1] < cost[..., 0]


def foreign(pixels: np.ndarray, wall, floor) -> np.ndarray:
    """The pixels, bool (16 n, 16 n), that are neither wall nor floor nor, near a border of the two,
    a blend of them."""
    open = open_cells(pixels, wall, floor).repeat(CELL, 0).repeat(CELL, 1)
    i = np.arange(len(pixels))
    ends = np.maximum(i - BLEND, 0), np.minimum(i + BLEND, len(pixels) - 1)
    border = np.any([open[np.ix_(a, b)] != open for a in ends for b in ends], 0)
    wall, way = np.float32(wall), np.subtract(floor, wall, dtype=np.float32)
    share = np.clip((pixels - wall) @ way / (way @ way), 0, 1)
    share = np.where(border, share, share.round())
    return np.linalg.norm(pixels - wall - share[..., None] * way, axis=-1) > 35


def distances(pixels: np.ndarray, colours) -> np.ndarray:
    """How far pixels (.., 3) are from each of k colours, (.., k)."""
    return np.stack([np.sqrt(np.square(pixels - np.float32(c)).sum(-1)) for c in colours], -1)


def two_colours(samples: np.ndarray) -> np.ndarray:
    """The two colours (2, 3) that explain most of the samples (k, 3), RGB in whole numbers;
    outliers hardly count."""
    picks = samples[:1]
    for _ in range(7):  # the sample farthest from all others so far: every colour gets its turn
        picks = np.r_[picks, samples[distances(samples, picks).min(-1).argmax()][None]]
    for _ in range(3):  # to the middle of the samples near it
        near = (distances(samples, picks) <= 30).T
        picks = np.stack([np.median(samples[k], 0) for k in near if k.any()])
    far = np.minimum(distances(samples, picks), 60)
    pairs = combinations(range(len(picks)), 2)
    pair = picks[list(min(pairs, key=lambda ij: far[:, ij].min(-1).sum()))]
    return settle(samples, pair)


def settle(samples: np.ndarray, pair: np.ndarray) -> np.ndarray:
    """Two colours moved to the medians of the samples near them, RGB in whole numbers (2, 3)."""
    for _ in range(3):
        far = distances(samples, pair)
        groups = [samples[(far.argmin(-1) == i) & (far[..., i] < 60)] for i in (0, 1)]
        pair = np.stack([np.median(g, 0) if len(g) else c for g, c in zip(groups, pair)])
    return pair.round().astype(int)


def solid(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask that have at most one of their eight neighbours outside: drops the thin
    blends along edges."""
    padded = np.pad(mask.astype(int), 1)
    n, m = mask.shape
    return mask & (sum(padded[i : i + n, j : j + m] for i in range(3) for j in range(3)) >= 8)


def blobs(mask: np.ndarray) -> list:
    """The connected pieces of a mask, as (row, column) arrays (k, 2) in pixels, largest first; what
    is not solid separates them, but counts as their rim."""
    whole, left = ({tuple(p) for p in np.argwhere(m).tolist()} for m in (mask, solid(mask)))
    out = []
    while left:
        todo, blob = [left.pop()], set()
        while todo:
            r, c = todo.pop()
            around = {(r + i, c + j) for i in (-1, 0, 1) for j in (-1, 0, 1)}
            blob |= around & whole
            todo.extend(around & left)
            left -= around
        out.append(np.array(sorted(blob)))
    return sorted(out, key=len, reverse=True)


def centre(blob: np.ndarray) -> tuple:
    """The centre of a blob (row, column) in cells."""
    return tuple(((blob.mean(0) + 0.5) / CELL - 0.5).tolist())


def squareness(pixels: np.ndarray, floor, colour, blob: np.ndarray) -> float:
    """E[x^2 y^2] / E[x^2] E[y^2] of a blob: 1 for an upright square of any size, 2/3 for a disc.

    Its pixels count by how much of its colour is in them, since so few that those on the rim
    decide.
    """
    (top, left), (bottom, right) = np.maximum(blob.min(0) - 1, 0), blob.max(0) + 2
    way = np.subtract(colour, floor, dtype=float)
    share = np.clip(2 * (pixels[top:bottom, left:right] - floor) @ way / (way @ way) - 0.5, 0, 1)
    y, x = (np.square(z - np.average(z, weights=share)) for z in np.indices(share.shape))
    mean = [np.average(z, weights=share) for z in (x * y, x, y)]
    return float(mean[0] / (mean[1] * mean[2]))


def task(maze: Maze) -> str:
    """The whole maze as a task prompt."""
    circle = f"the {moves.colour_word(maze.look.circle)} circle"
    return moves.whole_tasks(circle, moves.colour_word(maze.look.goal))[1]


# -------------------------------------------------------------------------------------------- score


JUMP = 1.6  # cells: farther from one frame to the next is no movement


@dataclass(frozen=True)
class Score:
    """What a video is worth by rule. A frame is clean when it shows exactly one circle; places come
    from clean frames only."""

    # 0..1: how far along the shortest path, by its length, the last place is; 0 off the path
    progress: float
    solved: bool  # the last place is within 0.5 cell of the goal's centre, none of the faults below
    # the centre was in a wall or off the board by more than 0.2 cell, or passed through a wall
    left_corridors: bool
    jumped: bool  # it moved too far between two frames
    # the last frame is clean, and no two frames in a row and no more than a tenth of them are not
    one_circle: bool
    end: tuple | None  # (row, col) of the last place in cells; None if there is none

    @property
    def value(self) -> float:
        """The progress, or 0 if there is a fault."""
        fine = self.one_circle and not self.left_corridors and not self.jumped
        return self.progress * fine


def track(frames: np.ndarray, first: Reading) -> list:
    """The readings of all frames of a video, uint8 (T, 16 n, 16 n, 3), by the colours and the goal
    of the first picture."""
    return [read(frame, first) for frame in frames]


def first_reading(maze: Maze) -> Reading:
    """What `read` should find in the task's first picture."""
    look = maze.look
    return Reading(maze.open, maze.start, 1, tuple(maze.goal),
                   look.wall, look.floor, look.circle, look.goal)


def score(frames: np.ndarray, maze: Maze) -> Score:
    """Judge a video, uint8 (T, 16 n, 16 n, 3), against the maze it should solve, which alone says
    where walls are.

    A jump is more than 1.6 cells from one frame to the next, or from maze.start to the first. One
    flickering frame is forgiven because it is what compression does; a second circle or a vanished
    one that lasts is a fault.
    """
    path = shortest_path(maze.open, maze.start, maze.goal)
    readings = track(frames, first_reading(maze))
    clean = [(t, r.circle) for t, r in enumerate(readings) if r.circles == 1]
    left = jumped = False
    for (t, a), (u, b) in pairwise([(-1, maze.start), *clean]):
        jumped |= (jump := contrast(a, b) > JUMP * (u - t))
        near = nearest_open(maze.open, a), nearest_open(maze.open, b)
        detour = len(shortest_path(maze.open, *near)) - 1
        outside = np.abs(np.subtract(b, near[1])).max() > 0.7
        # round a wall's end it is 4 cells
        left |= bool(outside) or not jump and not 0 <= detour <= max(3, JUMP * (u - t))
    missing = sorted({-1, *range(len(frames))} - {t for t, _ in clean})[1:]
    one = (len(missing) <= len(frames) / 10 and len(frames) - 1 not in missing
           and 1 not in np.diff(missing))
    end = clean[-1][1] if clean else None
    there = bool(clean) and contrast(end, maze.goal) <= 0.5
    fine = one and not left and not jumped
    return Score(along(path, end) if end else 0.0, there and fine, left, jumped, one, end)


def nearest_open(open: np.ndarray, place) -> tuple:
    """The corridor cell whose centre is nearest to a place."""
    cells = np.argwhere(open)
    return tuple(cells[np.square(cells - place).sum(1).argmin()].tolist())


def along(path: list, place) -> float:
    """Which share of a path lies before a place on it, 0 if the place is more than 0.5 cell off
    the path."""
    if len(path) < 2:
        return 0.0
    a, step = np.array(path[:-1], float), np.diff(path, axis=0)
    t = np.clip(((place - a) * step).sum(1), 0, 1)
    off = np.hypot(*(a + t[:, None] * step - place).T)
    i = off.argmin()
    return float((i + t[i]) / len(step)) if off[i] <= 0.5 else 0.0
