"""The clips that tiny-wan learns from: single moves, and whole tasks of few straight segments."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from examples.maze import moves, world


@dataclass(frozen=True)
class Example:
    """A clip to learn from. path: what the prompt asks for; it may start between two cells."""

    maze: world.Maze
    path: list
    prompt: str


def example(n: int, rng: np.random.Generator, horizon: int = 2) -> Example:
    """One third are whole tasks of at most `horizon` straight segments, the others single moves."""
    look = look_to_learn(rng)
    noun = rng.choice(["circle", "circle", "circle", "ball", "dot"])
    thing = f"the {moves.colour_word(look.circle)} {noun}"
    if rng.random() < 1 / 3:
        return whole_task(n, rng, look, thing, horizon)
    return single_move(n, rng, look, thing)


def look_to_learn(rng: np.random.Generator) -> world.Look:
    """Half as world.py draws, half in colours of no list, as other programs draw."""
    dark = rng.random() < 0.3  # a circle on a dark floor is the hardest to learn
    while True:
        look = any_look(rng) if rng.random() < 0.5 else world.make_look(rng, free=0.6)
        if not dark or sum(look.floor) <= 300:
            return look


def any_look(rng: np.random.Generator) -> world.Look:
    while True:
        colours = [any_colour(rng) for _ in range(4)]
        if world.told_apart(colours):
            half = rng.choice([rng.uniform(0.27, 0.42), 0.5], p=[0.85, 0.15])
            return world.Look(*colours, radius=rng.uniform(0.27, 0.41), half=half)  # type: ignore


def any_colour(rng: np.random.Generator) -> world.Colour:
    """A channel is 0 or 255 two times in five: many colours of other programs are pure."""
    pure = rng.random(3) < 0.4
    red, green, blue = np.where(pure, rng.choice([0, 255], 3), rng.integers(256, size=3))
    return int(red), int(green), int(blue)


def whole_task(n: int, rng, look: world.Look, thing: str, horizon: int) -> Example:
    while True:
        maze = world.make(n, int(rng.integers(1, horizon + 1)), rng, look)
        if len(maze.path()) <= 9:
            break
    goal = moves.colour_word(look.goal)
    text = str(rng.choice(moves.whole_tasks(thing, goal)))
    if rng.random() < 0.2:
        order = moves.move(thing, f"to the {goal} square")
        text += f" Correction: {order}{rng.choice([moves.INSIDE, moves.WHOLE])}."
    return Example(maze, maze.path(), text)


def single_move(n: int, rng, look: world.Look, thing: str) -> Example:
    """A straight move. Some prompts are corrected, as `evolve` corrects them."""
    maze = world.make(n, None, rng, look)
    start, direction, free = place_to_move(maze, rng)
    step = np.array(world.MOVES[direction])
    k = int(rng.integers(1, free + 1))  # cells that it goes
    end = tuple(np.add(start, k * step).tolist())
    goal = end if rng.random() < 0.3 or maze.goal == start else maze.goal  # the hardest to reach

    # The rest of a move, as regen asks for it, begins a little before or after a cell's centre,
    # and the first order was longer.
    asked, begin = k, start
    if rng.random() < 0.3 and k < 7:
        asked = min(k + int(rng.integers(0, 3)), 7)
        offset = rng.uniform(-0.5, 0.5)
        if world.is_corridor(maze.corridors, start + step * int(np.sign(offset))):
            begin = tuple(np.add(start, offset * step))

    until = []  # what stops it
    if k == free:
        until.append("wall")
    if end == goal:
        until.append(f"{moves.colour_word(look.goal)} square")
    prompt = move_prompt(thing, direction, k, asked, until, rng)
    return Example(world.Maze(maze.corridors, start, goal, look), [begin, end], prompt)


def place_to_move(maze: world.Maze, rng) -> tuple[world.Cell, str, int]:
    """A corridor cell, a direction, and how many cells are free there."""
    cells = world.corridor_cells(maze.corridors)
    while True:
        start = cells[rng.integers(len(cells))]
        direction = str(rng.choice(list(world.MOVES)))
        step = np.array(world.MOVES[direction])
        free = 0
        while world.is_corridor(maze.corridors, start + (free + 1) * step):
            free += 1
        if free > rng.integers(4):  # long moves are rarer in a maze, not less wanted
            return start, direction, free


def move_prompt(thing: str, direction: str, k: int, asked: int, until: list[str], rng) -> str:
    """A single move in varied words. Where corrections follow, the last one counts.

    k: cells that it goes; asked: cells that the first order asks for.
    """
    tail = rng.choice([
        "", "", " Nothing else moves.", " It stays inside the corridor.",
        " The walls do not change."])
    if asked == k and until and rng.random() < 0.12:
        return f"{moves.move(thing, direction)} until the {until[0]}.{tail}"

    text = f"{moves.move(thing, way(direction, asked, rng))}.{tail}"
    for _ in range(rng.choice([0, 1, 2, 3], p=[0.55, 0.25, 0.12, 0.08])):
        order = moves.move(thing, way(direction, asked, rng))
        text += f" Correction: {order}{fix(direction, asked, rng)}."
    if asked != k:
        text += f" Correction: {moves.rest(thing, way(direction, k, rng))}"
    return text


def fix(direction: str, asked: int, rng) -> str:
    """How a correction ends."""
    counts = [str(count) for count in range(8) if count != asked]
    directions = [other for other in world.MOVES if other != direction]
    wrong = moves.but_not(rng.choice(counts + directions))
    kept = rng.choice([moves.INSIDE, moves.WHOLE])
    return str(rng.choice([wrong, wrong, kept, moves.NO_JUMP]))


def way(direction: str, count: int, rng) -> str:
    """'left 2 cells', 'two cells left' or 'two cells to the left'."""
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven"]
    cells = moves.cells(count if rng.random() < 0.7 else words[count])
    side = direction
    if direction in ("left", "right") and rng.random() < 0.5:
        side = f"to the {direction}"
    return f"{direction} {cells}" if rng.random() < 0.6 else f"{cells} {side}"
