"""Grid mazes as in the paper's Figure 3: make them, draw them, read them back from pixels, score a video by rule.

A maze is a square board of 4 to 8 cells, 16 pixels each. A cell is wall or corridor; a circle stands in a corridor
cell and has to reach the goal square. Cells are (row, column) counted from the top left; a place between two cells is
a pair of floats on the same scale, so (1.0, 2.5) lies half-way between two corridor cells of row 1.
Only numpy is used, and nothing of collabvr.py.
"""
from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

CELL = 16  # pixels a cell
MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}

# (wall, floor) as RGB: dark walls, light walls, coloured walls.
THEMES = [
    ((25, 25, 30), (245, 245, 245)), ((0, 0, 0), (255, 255, 255)), ((70, 85, 100), (205, 212, 220)),
    ((40, 80, 140), (225, 235, 245)), ((150, 70, 60), (240, 225, 205)), ((40, 90, 60), (230, 240, 220)),
    ((90, 50, 110), (240, 230, 245)), ((30, 110, 115), (220, 240, 238)), ((190, 160, 110), (255, 250, 235)),
    ((125, 125, 130), (250, 250, 245)), ((170, 175, 182), (255, 255, 255)), ((140, 150, 190), (20, 22, 40)),
    ((240, 240, 240), (62, 62, 72)), ((225, 215, 195), (80, 55, 45)),
]
CIRCLES = {"red": (220, 40, 40), "blue": (40, 90, 220), "orange": (245, 140, 30), "pink": (240, 110, 180)}
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


# ------------------------------------------------------------------------------------------------------------- make


def contrast(a, b) -> float:
    """Distance of two RGB colours, 0..441."""
    return float(np.linalg.norm(np.subtract(a, b, dtype=float)))


def make_look(rng: np.random.Generator, free: float = 0.0) -> Look:
    """A random look: a listed palette, slightly jittered; with probability `free` any colours that can be told apart."""
    while True:
        wall, floor = THEMES[rng.integers(len(THEMES))]
        circle = CIRCLES[rng.choice(list(CIRCLES))]
        goal = GOALS[rng.choice(list(GOALS))]
        if rng.random() < free:
            wall, floor = rng.integers(0, 256, 3), rng.integers(0, 256, 3)
        colours = [tuple(int(x) for x in np.clip(np.add(c, rng.integers(-12, 13, 3)), 0, 255))
                   for c in (wall, floor, circle, goal)]
        pairs = [contrast(colours[i], colours[j]) for i in range(4) for j in range(i)]
        if min(pairs) > 75:
            return Look(*colours, radius=rng.uniform(0.27, 0.38), half=rng.choice([rng.uniform(0.27, 0.4), 0.5], p=[0.85, 0.15]))


def carve(n: int, rng: np.random.Generator) -> np.ndarray:
    """Corridors one cell wide without loops, as a bool (n, n): a random tree in which each cell touches its parent only."""
    open = np.zeros((n, n), bool)
    step = 2 if rng.random() < 0.35 else 1  # 2: the classic lattice with straight corridors of odd length
    edge = 1 if step == 2 and n % 2 else 0
    stack = [(edge, edge) if step == 2 else tuple(rng.integers(0, n, 2))]
    open[stack[0]] = True
    while stack:
        i = -1 if rng.random() < 0.75 else rng.integers(len(stack))  # depth first, with some branching
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
    for a, b in zip(path, path[1:]):
        name = names[b[0] - a[0], b[1] - a[1]]
        out = [*out[:-1], (name, out[-1][1] + 1)] if out and out[-1][0] == name else [*out, (name, 1)]
    return out


def make(n: int, pieces: int | None, rng: np.random.Generator, look: Look | None = None) -> Maze:
    """A random n x n maze whose shortest path has that many straight segments (None: any number)."""
    while True:
        open = carve(n, rng)
        cells = [tuple(map(int, c)) for c in np.argwhere(open)]
        for _ in range(30):
            start, goal = (cells[i] for i in rng.choice(len(cells), 2, replace=False)) if len(cells) > 1 else (None, None)
            if start and (pieces is None or len(segments(shortest_path(open, start, goal))) == pieces):
                return Maze(open, start, goal, look or make_look(rng))


# ------------------------------------------------------------------------------------------------------------- draw


def draw(maze: Maze, at=None) -> np.ndarray:
    """The maze with its circle at a place (default: the start), as uint8 RGB of shape (16 n, 16 n, 3), edges smoothed."""
    look, n = maze.look, len(maze.open)
    image = np.where(maze.open[..., None], np.float32(look.floor), np.float32(look.wall)).repeat(CELL, 0).repeat(CELL, 1)
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
    """Places of a circle that goes along a path at constant speed and stands still after `arrive` of the frames."""
    path = np.asarray(path, float)
    lengths = np.r_[0, np.abs(np.diff(path, axis=0)).sum(1).cumsum()]
    s = np.clip(np.arange(num_frames) / (arrive * (num_frames - 1)), 0, 1) * lengths[-1]
    return list(zip(np.interp(s, lengths, path[:, 0]), np.interp(s, lengths, path[:, 1])))


def film(maze: Maze, path, num_frames: int = 17) -> np.ndarray:
    """A video of that walk, uint8 (num_frames, 16 n, 16 n, 3)."""
    return np.stack([draw(maze, at) for at in walk(path, num_frames)])
