"""The words of the maze's prompts: what the oracle orders, and what tiny-wan learns from."""

from __future__ import annotations

import colorsys

# how a correction may end
INSIDE = " and keep it inside the corridor"
WHOLE = " and keep it one whole circle"
NO_JUMP = " without a jump"


def but_not(wrong) -> str:
    """wrong: what the circle did, a direction or a number of cells."""
    return f", not {wrong}"


def colour_word(rgb) -> str:
    """A plain English word for a colour, by its hue (degrees), saturation and value."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(float(level) / 255 for level in rgb))
    hue *= 360
    if value < 0.2:
        return "black"
    if saturation < 0.2 or saturation * value < 0.14:
        return "white" if value > 0.87 else "grey"
    if 8 < hue < 50 and (value < 0.65 or (saturation < 0.55 and value < 0.87)):
        return "brown"
    if (hue < 20 or hue > 345) and saturation < 0.5 and value > 0.7:
        return "pink"
    if 255 <= hue < 345:
        return "pink" if hue > 290 and value > 0.75 else "purple"
    ends = {"red": 16, "orange": 39, "yellow": 68, "green": 165, "cyan": 200, "blue": 255}
    return next((word for word, end in ends.items() if hue < end), "red")


def cells(count: int | str) -> str:
    """'1 cell', '3 cells'."""
    return f"{count} {'cell' if count in (1, '1', 'one') else 'cells'}"


def move(thing: str, way: str) -> str:
    """An order. way: 'right 3 cells', or 'to the green square'."""
    return f"Move {thing} {way}"


def rest(thing: str, way: str) -> str:
    """The order to finish a move that went well so far."""
    return f"From here move {thing} {way} and stop."


def whole_tasks(thing: str, goal: str) -> list[str]:
    """The whole maze as a task prompt, in several wordings. goal: a colour."""
    return [
        f"Move {thing} to the {goal} square.",
        f"Move {thing} through the maze to the {goal} square without crossing walls.",
        f"Move {thing} along the corridors to the {goal} goal.",
        f"Solve the maze: bring {thing} to the {goal} square and stop there.",
    ]
