"""What the rule of world.py says of a video, in words: solved or not, how far, and why not."""

from __future__ import annotations

import numpy as np

from examples.maze import world


def maze_of(picture: np.ndarray) -> world.Maze:
    """The maze that a picture shows. Raises ValueError if it shows none."""
    found = world.read(picture)
    if found.circle is None:
        raise ValueError("the picture shows no circle")
    start = world.nearest_open(found.open, found.circle)
    look = world.Look(found.wall, found.floor, found.circle_colour, found.goal_colour)
    return world.Maze(found.open, start, found.goal, look)


def verdict(frames: np.ndarray, maze: world.Maze) -> str:
    """'solved, 100 % of the way', or 'not solved, 80 % of the way: ..'. Raises ValueError."""
    score = world.score(frames, maze)
    way = f"{score.progress:.0%}".replace("%", " % of the way")
    if score.solved:
        return f"solved, {way}"
    return f"not solved, {way}: {'; '.join(reasons(frames, maze, score))}"


def reasons(frames: np.ndarray, maze: world.Maze, score: world.Score) -> list[str]:
    """Why a video is not solved."""
    found = []
    if not score.one_circle:
        found.append(other_circles(frames, maze))
    if score.left_corridors:
        found.append("the circle was in a wall or off the board")
    if score.jumped:
        found.append("the circle jumped from one frame to the next")
    if score.end is not None and world.contrast(score.end, maze.goal) > 0.5:  # cells
        row, column = score.end
        found.append(f"it ends in row {row + 1:.1f}, column {column + 1:.1f}, not on the goal")
    return found


def other_circles(frames: np.ndarray, maze: world.Maze) -> str:
    """'no circle in frames 4-9', '2 circles in frames 12, 14': frames are counted from 0."""
    frames_with: dict[int, list[int]] = {}
    for t, reading in enumerate(world.track(frames, world.first_reading(maze))):
        if reading.circles != 1:
            frames_with.setdefault(reading.circles, []).append(t)
    told = []
    for circles, numbers in frames_with.items():
        many = "no circle" if circles == 0 else f"{circles} circles"
        told.append(f"{many} in frame{'s' * (len(numbers) > 1)} {ranges(numbers)}")
    return " and ".join(told) + f" of {len(frames)}"


def ranges(numbers: list[int]) -> str:
    """[3, 4, 5, 9] as '3-5, 9'."""
    groups: list[list[int]] = []
    for n in numbers:
        if groups and n == groups[-1][-1] + 1:
            groups[-1].append(n)
        else:
            groups.append([n])
    return ", ".join(str(x[0]) if len(x) == 1 else f"{x[0]}-{x[-1]}" for x in groups)
