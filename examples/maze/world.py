"""Grid mazes as in the paper's Figure 3: make them and draw them.

A maze is a square board of 4 to 8 cells, 16 pixels each. A cell is wall or corridor; a circle
stands in a corridor cell and has to reach the goal square. Cells are (row, column) counted from
the top left. A place is a pair of floats on the same scale: (1.0, 2.5) lies half-way between two
cells of row 1.
"""

from __future__ import annotations

import colorsys
from collections import deque
from dataclasses import dataclass, field
from itertools import combinations, pairwise, starmap
from typing import Any

import numpy as np

from examples.maze import moves

Cell = tuple[int, int]
Place = tuple[float, float]  # in cells
Colour = Any  # RGB, 0..255: a tuple or an array

CELL = 16  # pixels a cell
MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}

THEMES = [  # wall, floor
    ((25, 25, 30), (245, 245, 245)),  # dark walls
    ((0, 0, 0), (255, 255, 255)),
    ((70, 85, 100), (205, 212, 220)),
    ((40, 80, 140), (225, 235, 245)),  # coloured walls
    ((150, 70, 60), (240, 225, 205)),
    ((40, 90, 60), (230, 240, 220)),
    ((90, 50, 110), (240, 230, 245)),
    ((30, 110, 115), (220, 240, 238)),
    ((190, 160, 110), (255, 250, 235)),
    ((125, 125, 130), (250, 250, 245)),  # grey walls
    ((170, 175, 182), (255, 255, 255)),
    ((140, 150, 190), (20, 22, 40)),  # light walls
    ((240, 240, 240), (62, 62, 72)),
    ((225, 215, 195), (80, 55, 45)),
]
CIRCLES = {
    "red": (220, 40, 40),
    "blue": (40, 90, 220),
    "orange": (245, 140, 30),
    "pink": (240, 110, 180),
}
GOALS = {
    "green": (50, 170, 80),
    "red": (215, 50, 45),
    "yellow": (245, 205, 50),
}


@dataclass(frozen=True)
class Look:
    """The colours and the sizes in which a maze is drawn."""

    wall: Colour = THEMES[0][0]
    floor: Colour = THEMES[0][1]
    circle: Colour = CIRCLES["red"]
    goal: Colour = GOALS["green"]
    radius: float = 0.33  # of the circle, in cells
    half: float = 0.33  # half a side of the goal square, in cells


@dataclass(frozen=True)
class Maze:
    corridors: np.ndarray  # bool (n, n); the others are walls
    start: Cell
    goal: Cell
    look: Look = field(default_factory=Look)

    def path(self) -> list[Cell]:
        """The shortest way from the start to the goal."""
        return shortest_path(self.corridors, self.start, self.goal)


def task(maze: Maze) -> str:
    """The whole maze as a task prompt."""
    circle = f"the {moves.colour_word(maze.look.circle)} circle"
    return moves.whole_tasks(circle, moves.colour_word(maze.look.goal))[1]


# ------------------------------------------------------------------------------
# Make


def make(n: int, pieces: int | None, rng: np.random.Generator, look: Look | None = None) -> Maze:
    """A random n x n maze whose shortest path has that many straight segments (None: any)."""
    while True:
        corridors = carve(n, rng)
        cells = corridor_cells(corridors)
        tries = 30 if len(cells) > 1 else 0
        for _ in range(tries):
            start, goal = (cells[i] for i in rng.choice(len(cells), 2, replace=False))
            path = shortest_path(corridors, start, goal)
            if pieces in (None, len(segments(path))):
                return Maze(corridors, start, goal, look or make_look(rng))


def make_look(rng: np.random.Generator, free: float = 0.0) -> Look:
    """A random look: a listed palette, slightly jittered.

    With probability `free` circle and goal are of any colour, and half of these times wall and
    floor, too.
    """
    while True:
        wall, floor = THEMES[rng.integers(len(THEMES))]
        circle: Colour = CIRCLES[rng.choice(list(CIRCLES))]
        goal: Colour = GOALS[rng.choice(list(GOALS))]
        if rng.random() < free:
            circle, goal = any_hue(rng), any_hue(rng)
            if rng.random() < 0.5:
                wall, floor = rng.integers(0, 256, (2, 3))
        wall, floor, circle, goal = (jittered(each, rng) for each in (wall, floor, circle, goal))
        if told_apart([wall, floor, circle, goal]):
            radius = rng.uniform(0.27, 0.38)
            half = rng.choice([rng.uniform(0.27, 0.4), 0.5], p=[0.85, 0.15])
            return Look(wall, floor, circle, goal, radius, half)


def any_hue(rng: np.random.Generator) -> Colour:
    return 255 * np.array(colorsys.hsv_to_rgb(*rng.random(3)))


def jittered(colour: Colour, rng: np.random.Generator) -> Colour:
    moved = np.add(colour, rng.integers(-12, 13, 3))
    return tuple(int(level) for level in np.clip(moved, 0, 255))


def told_apart(colours) -> bool:
    """Whether any two of the colours differ enough."""
    return min(starmap(distance, combinations(colours, 2))) > 75


def distance(a, b) -> float:
    """Of two colours, 0..441, or of two places, in cells."""
    return float(np.linalg.norm(np.subtract(a, b, dtype=float)))


def carve(n: int, rng: np.random.Generator) -> np.ndarray:
    """Corridors one cell wide without loops, bool (n, n): a random tree.

    Each cell touches its parent only.
    """
    corridors = np.zeros((n, n), bool)
    lattice = rng.random() < 0.35  # the classic one, with straight corridors of odd length
    step = 2 if lattice else 1
    edge = 1 if lattice and n % 2 else 0
    first = (edge, edge) if lattice else tuple(rng.integers(0, n, 2))
    corridors[first] = True
    stack = [first]
    while stack:
        # depth first, with some branching
        i = -1 if rng.random() < 0.75 else rng.integers(len(stack))
        r, c = stack[i]
        for dr, dc in rng.permutation(list(MOVES.values())):
            near = (r + dr, c + dc)
            far = (r + step * dr, c + step * dc)
            inside = all(edge <= x < n - edge for x in far)
            if inside and not corridors[far] and (lattice or touching(corridors, far) == 1):
                corridors[near] = corridors[far] = True
                stack.append(far)
                break
        else:
            stack.pop(i)
    return corridors


def touching(corridors: np.ndarray, cell) -> int:
    """How many of a cell's four neighbours are corridor."""
    r, c = cell
    return sum(is_corridor(corridors, (r + dr, c + dc)) for dr, dc in MOVES.values())


def is_corridor(corridors: np.ndarray, cell) -> bool:
    """Whether a cell lies on the board and is corridor."""
    inside = all(0 <= x < n for x, n in zip(cell, corridors.shape, strict=True))
    return inside and bool(corridors[tuple(cell)])


# ------------------------------------------------------------------------------
# Ways


def corridor_cells(corridors: np.ndarray) -> list[Cell]:
    return [(r, c) for r, c in np.argwhere(corridors).tolist()]


def nearest_corridor(corridors: np.ndarray, place) -> Cell:
    """The corridor cell whose centre is nearest to a place."""
    cells = np.argwhere(corridors)
    r, c = cells[np.square(cells - place).sum(1).argmin()].tolist()
    return r, c


def shortest_path(corridors: np.ndarray, start, goal) -> list[Cell]:
    """The cells of the shortest path, both ends included; [] if there is none."""
    before: dict = {tuple(start): None}
    queue = deque(before)
    while queue:
        cell = queue.popleft()
        if cell == tuple(goal):
            path = [cell]
            while before[path[-1]] is not None:
                path.append(before[path[-1]])
            return path[::-1]
        for dr, dc in MOVES.values():
            beside = (cell[0] + dr, cell[1] + dc)
            if is_corridor(corridors, beside) and beside not in before:
                before[beside] = cell
                queue.append(beside)
    return []


def segments(path: list[Cell]) -> list[tuple[str, int]]:
    """A path as straight pieces: [(direction, cells), ..]."""
    directions = {move: direction for direction, move in MOVES.items()}
    pieces: list[tuple[str, int]] = []
    for a, b in pairwise(path):
        direction = directions[b[0] - a[0], b[1] - a[1]]
        if pieces and pieces[-1][0] == direction:
            pieces[-1] = (direction, pieces[-1][1] + 1)
        else:
            pieces.append((direction, 1))
    return pieces


# ------------------------------------------------------------------------------
# Draw


def draw(maze: Maze, at=None) -> np.ndarray:
    """The maze with its circle at a place (None: the start), uint8 RGB (16 n, 16 n, 3).

    Edges are smoothed.
    """
    look = maze.look
    image = board(maze).astype(np.float32)
    dy, dx = offsets(image, maze.goal)
    paint(image, np.maximum(abs(dy), abs(dx)), look.half, look.goal)
    dy, dx = offsets(image, maze.start if at is None else at)
    paint(image, np.hypot(dy, dx), look.radius, look.circle)
    return image.round().astype(np.uint8)


def paint(image: np.ndarray, far: np.ndarray, size: float, colour: Colour) -> None:
    """Colours the pixels that are no farther than `size` cells; far: in pixels."""
    share = np.clip(size * CELL + 0.5 - far, 0, 1)
    image += share[..., None] * (np.float32(colour) - image)


def board(maze: Maze) -> np.ndarray:
    """The maze without circle and goal, uint8 (16 n, 16 n, 3)."""
    floor, wall = np.uint8(maze.look.floor), np.uint8(maze.look.wall)
    cells = np.where(maze.corridors[..., None], floor, wall)
    return cells.repeat(CELL, 0).repeat(CELL, 1)


def offsets(image: np.ndarray, place) -> tuple[np.ndarray, np.ndarray]:
    """How many pixels each pixel lies below and right of a place, float32 (16 n, 16 n) each."""
    side = len(image)
    y, x = np.mgrid[:side, :side].astype(np.float32)
    r, c = place
    return y - (r + 0.5) * CELL + 0.5, x - (c + 0.5) * CELL + 0.5


def walk(path, num_frames: int, arrive: float = 0.9) -> list[Place]:
    """Places of a circle that goes along a path at constant speed.

    It stands still after `arrive` of the frames.
    """
    points = np.asarray(path, float)
    lengths = np.abs(np.diff(points, axis=0)).sum(1)
    marks = np.r_[0, lengths.cumsum()]
    shares = np.clip(np.arange(num_frames) / (arrive * (num_frames - 1)), 0, 1)
    gone = shares * marks[-1]
    rows, columns = (np.interp(gone, marks, points[:, axis]) for axis in (0, 1))
    return list(zip(rows, columns, strict=True))


def film(maze: Maze, path, num_frames: int = 17) -> np.ndarray:
    """A video of that walk, uint8 (num_frames, 16 n, 16 n, 3)."""
    return np.stack([draw(maze, place) for place in walk(path, num_frames)])
