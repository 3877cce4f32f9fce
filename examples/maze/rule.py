"""Scores a video of a maze by rule, and says why in words."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from examples.maze import pixels
from examples.maze.pixels import Reading
from examples.maze.world import Cell, Maze, Place, distance, nearest_corridor, shortest_path

JUMP = 1.6  # cells: farther from one frame to the next is no movement
AT_GOAL = 0.5  # cells from the goal's centre


@dataclass(frozen=True)
class Score:
    """What a video is worth. A frame is clean if it shows exactly one circle.

    Places come from clean frames only.
    """

    progress: float  # 0..1: how much of the shortest path lies before the end; 0 off the path
    end: Place | None  # the last place; None if there is none
    at_goal: bool
    left_corridors: bool  # it was in a wall or off the board, or passed through a wall
    jumped: bool
    circles: list[int]  # how many circles each frame shows

    @property
    def one_circle(self) -> bool:
        """One flickering frame is forgiven, because it is what compression does.

        The last frame must be clean. Of the others, no two in a row and no more than a tenth of
        them may be not.
        """
        missing = [t for t, circles in enumerate(self.circles) if circles != 1]
        frames = len(self.circles)
        few = len(missing) <= frames / 10
        return few and frames - 1 not in missing and 1 not in np.diff(missing)

    @property
    def fine(self) -> bool:
        """It shows no fault, be it finished or not."""
        return self.one_circle and not self.left_corridors and not self.jumped

    @property
    def solved(self) -> bool:
        return self.at_goal and self.fine

    @property
    def value(self) -> float:
        """The progress, or 0 if there is a fault."""
        return self.progress * self.fine


def maze_of(picture: np.ndarray) -> Maze:
    """The maze that a picture shows. Raises ValueError if it shows none."""
    seen = pixels.read(picture)
    if seen.circle is None:
        raise ValueError("the picture shows no circle")
    start = nearest_corridor(seen.corridors, seen.circle)
    return Maze(seen.corridors, start, seen.goal, seen.look)


def score(frames: np.ndarray, maze: Maze) -> Score:
    """Judges a video, uint8 (T, 16 n, 16 n, 3), by the maze that it should solve.

    The maze alone says where walls are. Raises ValueError if the size is another one.
    """
    first = Reading(maze.corridors, maze.start, 1, maze.goal, maze.look)
    readings = [pixels.read(frame, first) for frame in frames]
    places: list[tuple[int, Place]] = []
    for t, reading in enumerate(readings):
        if reading.circle and reading.circles == 1:
            places.append((t, reading.circle))
    left = jumped = False
    for (t, a), (u, b) in pairwise([(-1, maze.start), *places]):
        reach = JUMP * (u - t)  # cells that it may go in this time
        jumped = jumped or distance(a, b) > reach
        left = left or leaves_corridors(maze.corridors, a, b, reach)
    end = places[-1][1] if places else None
    progress = along(maze.path(), end) if end else 0.0
    at_goal = end is not None and distance(end, maze.goal) <= AT_GOAL
    circles = [reading.circles for reading in readings]
    return Score(progress, end, at_goal, left, jumped, circles)


def leaves_corridors(corridors: np.ndarray, a: Place, b: Place, reach: float) -> bool:
    """Whether b is in a wall or off the board, or lies behind a wall from a."""
    near_a, near_b = nearest_corridor(corridors, a), nearest_corridor(corridors, b)
    if np.abs(np.subtract(b, near_b)).max() > 0.7:
        return True
    if distance(a, b) > reach:
        return False  # it jumped, and nobody knows by which way
    detour = len(shortest_path(corridors, near_a, near_b)) - 1
    return not 0 <= detour <= max(3, reach)  # round a wall's end it is 4 cells


def along(path: list[Cell], place: Place) -> float:
    """Which share of a path lies before a place; 0 if it is more than 0.5 cell off the path."""
    if len(path) < 2:
        return 0.0
    begins, steps = np.array(path[:-1], float), np.diff(path, axis=0)
    shares = np.clip(((place - begins) * steps).sum(1), 0, 1)
    off = np.hypot(*(begins + shares[:, None] * steps - place).T)
    i = off.argmin()
    return float((i + shares[i]) / len(steps)) if off[i] <= 0.5 else 0.0


# ------------------------------------------------------------------------------
# In words


def verdict(score: Score) -> str:
    """'solved, 100 % of the way', or 'not solved, 80 % of the way: ..'."""
    way = f"{100 * score.progress:.0f} % of the way"
    return f"solved, {way}" if score.solved else f"not solved, {way}: {'; '.join(reasons(score))}"


def reasons(score: Score) -> list[str]:
    """Why a video is not solved."""
    found = []
    if not score.one_circle:
        found.append(other_circles(score.circles))
    if score.left_corridors:
        found.append("the circle was in a wall or off the board")
    if score.jumped:
        found.append("the circle jumped from one frame to the next")
    if score.end is not None and not score.at_goal:
        row, column = score.end
        found.append(f"it ends in row {row + 1:.1f}, column {column + 1:.1f}, not on the goal")
    return found


def other_circles(circles: list[int]) -> str:
    """'no circle in frames 4-9', '2 circles in frames 12, 14': frames are counted from 0."""
    told = []
    for number in dict.fromkeys(circles):
        if number != 1:
            frames = [t for t, each in enumerate(circles) if each == number]
            many = "no circle" if number == 0 else f"{number} circles"
            told.append(f"{many} in frame{'s' * (len(frames) > 1)} {ranges(frames)}")
    return f"{' and '.join(told)} of {len(circles)}"


def ranges(numbers: list[int]) -> str:
    """[3, 4, 5, 9] as '3-5, 9'."""
    groups: list[list[int]] = []
    for n in numbers:
        if groups and n == groups[-1][-1] + 1:
            groups[-1].append(n)
        else:
            groups.append([n])
    return ", ".join(f"{g[0]}-{g[-1]}" if len(g) > 1 else str(g[0]) for g in groups)
