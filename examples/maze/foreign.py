"""Held-out mazes: world.py's own, and mazes that it had no hand in."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from examples.maze import world

PALETTES = [  # wall, corridor, circle, goal
    ("black", "white", "red", "green"),
    ("navy", "lightyellow", "crimson", "limegreen"),
    ("saddlebrown", "wheat", "blue", "red"),
    ("gray", "white", "orange", "blue"),
    ("white", "black", "yellow", "red"),
    ("darkgreen", "palegreen", "magenta", "gold"),
    ("slategray", "snow", "purple", "cyan"),
    ("firebrick", "mistyrose", "teal", "gold"),
    ("#1e1e2e", "#cdd6f4", "#f38ba8", "#a6e3a1"),
    ("peru", "cornsilk", "darkviolet", "orange"),
    ("white", "#202020", "deepskyblue", "tomato"),
    ("#444", "#aaa", "lime", "red"),
]
CELL = 40  # pixels, as Pillow draws it; 16 in the picture


def held_out(segments: int, i: int, seed: int) -> world.Maze:
    """The i-th held-out maze of that many straight segments, 4 to 8 cells a side."""
    rng = np.random.default_rng([seed, 77, segments, i])
    return world.make(int(rng.integers(4, 9)), segments, rng)


def foreign(i: int, seed: int) -> tuple[world.Maze, np.ndarray]:
    """The i-th foreign maze, and its picture: 5 to 8 cells a side, drawn by Pillow."""
    rng = np.random.default_rng([seed, 78, i])
    n = int(rng.integers(5, 9))
    edge = int(rng.integers(2)) if n % 2 else 0  # a wall all around, or corridors up to the edge
    corridors = prim(n, edge, rng)
    cells = world.corridor_cells(corridors)
    start, goal = (cells[i] for i in rng.choice(len(cells), 2, replace=False))
    wall, floor, circle, square = map(ImageColor.getrgb, PALETTES[rng.integers(len(PALETTES))])
    half = int(rng.integers(11, 17))
    radius = int(rng.integers(11, 16))
    look = world.Look(wall, floor, circle, square, radius / CELL, half / CELL)

    picture = Image.new("RGB", (CELL * n, CELL * n), wall)
    pen = ImageDraw.Draw(picture)
    for cell in cells:
        pen.rectangle(box(cell, CELL // 2), fill=floor)
    pen.rectangle(box(goal, half), fill=square)
    pen.ellipse(box(start, radius), fill=circle)
    small = picture.resize((16 * n, 16 * n), Image.Resampling.LANCZOS)
    return world.Maze(corridors, start, goal, look), np.array(small)


def prim(n: int, edge: int, rng: np.random.Generator) -> np.ndarray:
    """Corridors one cell wide by Prim's algorithm: bool (n, n)."""
    corridors = np.zeros((n, n), bool)
    corridors[edge, edge] = True
    while True:
        ways = growing(corridors, edge)
        if not ways:
            return corridors
        r, c, dr, dc = ways[rng.integers(len(ways))]
        corridors[r + dr, c + dc] = True
        corridors[r + 2 * dr, c + 2 * dc] = True


def growing(corridors: np.ndarray, edge: int) -> list[tuple]:
    """Where a corridor can be made longer by two cells: (row, column, its direction)."""
    n = len(corridors)
    ways = []
    for r, c in np.argwhere(corridors):
        if (r - edge) % 2 or (c - edge) % 2:
            continue
        for dr, dc in world.MOVES.values():
            r2, c2 = r + 2 * dr, c + 2 * dc
            inside = edge <= r2 < n - edge and edge <= c2 < n - edge
            if inside and not corridors[r2, c2]:
                ways.append((r, c, dr, dc))
    return ways


def box(cell, half: int) -> list[int]:
    """The corners of a square, or round a circle, in the middle of a cell."""
    x, y = CELL * cell[1] + CELL // 2, CELL * cell[0] + CELL // 2
    return [x - half, y - half, x + half - 1, y + half - 1]
