"""How far an autoencoder's colours drift when clip follows clip, as they do in the loop."""

from __future__ import annotations

import numpy as np
import torch

from examples import stats
from examples.maze import lessons, world

PLACES = ["floor", "wall", "circle"]
TRIPS = [1, 3, 6]  # clips in a row
SIZE = 4  # cells a side


def table(vae, count: int = 12) -> stats.Table:
    """count: mazes."""
    rows = [[place, *(f"{x:.1f}" for x in levels)]
            for place, levels in zip(PLACES, drift(vae, count).T, strict=True)]
    title = f"Levels of 255 that colours are off after so many clips (n = {count} mazes)"
    return stats.Table(title, ["", *map(str, TRIPS)], rows)


@torch.no_grad()
def drift(vae, count: int = 12) -> np.ndarray:
    """The mean over mazes, by the number of clips and the place, (3, 3).

    A clip stands still for 17 frames, and the next one begins with its last frame. A place is
    measured in the channel of RGB that is most off, in the middles of its cells.
    """
    mazes = [strange_maze(i) for i in range(count)]
    pictures = np.stack([world.draw(maze) for maze in mazes])[:, None]  # (count, 1, H, W, 3)
    device = next(vae.parameters()).device
    x = torch.from_numpy(pictures).to(device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    before, found = colours(x, mazes), []
    for trip in range(1, max(TRIPS) + 1):
        clip = x.repeat(1, 1, 17, 1, 1)
        x = vae.decode(vae.encode(clip).latent_dist.mode()).sample[:, :, -1:]
        if trip in TRIPS:
            off = np.abs(colours(x, mazes) - before).max(-1)  # (count, 3)
            found.append(off.mean(0))
    return np.stack(found)


def strange_maze(i: int) -> world.Maze:
    """Maze i, in colours of no list. Training never sees its seed."""
    rng = np.random.default_rng([79, i])
    return world.make(SIZE, None, rng, lessons.any_look(rng))


def colours(x: torch.Tensor, mazes: list[world.Maze]) -> np.ndarray:
    """The mean RGB of floor, wall and circle in pictures (B, 3, 1, H, W), 0..255: (B, 3, 3)."""
    cells = x[:, :, 0].unflatten(-1, (SIZE, world.CELL)).unflatten(-3, (SIZE, world.CELL))
    middles = cells[:, :, :, 5:-5, :, 5:-5].mean((3, 5))  # (B, 3, n, n): 6 x 6 pixels of a cell
    levels = (127.5 * (middles + 1)).permute(0, 2, 3, 1).cpu().numpy()
    found = []
    for picture, maze in zip(levels, mazes, strict=True):
        floor, wall = maze.corridors.copy(), ~maze.corridors
        floor[maze.start] = floor[maze.goal] = False
        found.append([picture[floor].mean(0), picture[wall].mean(0), picture[maze.start]])
    return np.array(found)
