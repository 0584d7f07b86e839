"""Placement of point labels so that they overlap neither each other nor a point."""

from __future__ import annotations

import math
from collections.abc import Sequence

RADII = (10, 20, 32, 46, 62, 80)  # from the point to the nearest edge of its label
DIRECTIONS = 12
USUAL_SIZE = (1000.0, 400.0)  # pixels of a chart on a desktop page; label placement assumes this size
USUAL_FONT = 12.5  # pixels
WIDTH, HEIGHT = 0.58, 1.25  # width of a letter and height of a line, in font sizes
MARK = 6.0  # half the side of a marker's bounding square

Box = tuple[float, float, float, float]  # left, bottom, right, top


def place_labels(
    points: Sequence[tuple[float, float]],
    texts: Sequence[str],
    size: tuple[float, float],
    font_size: float,
    obstacles: Sequence[Box] = (),
) -> list[tuple[float, float]]:
    """For each point, the offset of its label's anchor; all lengths are in one unit, with y up.

    The anchor is the middle of the left edge for a label to the right of its point, of the right edge for one to the
    left, and the center for one directly above or below. The nearest free position wins, starting from the right;
    if none is free, the one that covers least.

    Args:
        size: width and height of the drawing, whose lower left corner is (0, 0).
        obstacles: boxes that labels should not cover, besides points and other labels.
    """
    taken = [(x - MARK, y - MARK, x + MARK, y + MARK) for x, y in points] + list(obstacles)
    inside = (0.0, 0.0, *size)
    offsets = []
    for (x, y), text in zip(points, texts, strict=True):
        width, height = WIDTH * font_size * len(text), HEIGHT * font_size
        places = []
        for radius in RADII:
            for turn in range(DIRECTIONS):
                angle = 2 * math.pi * turn / DIRECTIONS
                dx, dy = radius * math.cos(angle), radius * math.sin(angle)
                box = _box(x + dx, y + dy, width, height, anchor(dx))
                covered = sum(_overlap(box, other) for other in taken) + width * height - _overlap(box, inside)
                places.append((round(covered, 3), radius, turn, (dx, dy), box))
        _, _, _, offset, box = min(places)
        taken.append(box)
        offsets.append(offset)
    return offsets


def anchor(dx: float) -> str:
    """Where a label at this offset is anchored: ``"left"``, ``"right"`` or ``"center"``."""
    return "left" if dx > 1 else "right" if dx < -1 else "center"


def _box(x: float, y: float, width: float, height: float, held_by: str) -> Box:
    left = x - {"left": 0.0, "center": width / 2, "right": width}[held_by]
    return left, y - height / 2, left + width, y + height / 2


def _overlap(a: Box, b: Box) -> float:
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0.0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)
