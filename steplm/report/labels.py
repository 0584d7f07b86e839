"""Placement of the labels of points, so that they overlap neither each other nor a point."""

from __future__ import annotations

import math
from collections.abc import Sequence

RADII = (10, 20, 32, 46, 62, 80)  # from the point to the nearest edge of its label
DIRECTIONS = 12
USUAL_SIZE = (1000.0, 400.0)  # pixels of the page's drawing on a desktop, for which labels are placed
USUAL_FONT = 12.5  # pixels
WIDTH, HEIGHT = 0.58, 1.25  # of a letter and of a line, in font sizes
MARK = 6.0  # half the side of the square that a marker takes

Box = tuple[float, float, float, float]  # left, bottom, right, top


def place_labels(
    points: Sequence[tuple[float, float]],
    texts: Sequence[str],
    size: tuple[float, float],
    font_size: float,
    obstacles: Sequence[Box] = (),
) -> list[tuple[float, float]]:
    """For each point, the offset of its label's anchor from it; all lengths in one unit, y upwards.

    The anchor is the middle of the label's edge nearest the point: the left edge where the label stands to the
    right, the right edge where it stands to the left, its middle above and below. Of the free places the nearest is
    taken, beginning to the right; where none is free, the one that covers least.

    Args:
        size: of the drawing, whose lower left corner is (0, 0).
        obstacles: what labels should not cover, besides points and labels.
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
    """The edge by which a label at this offset is held: ``"left"``, ``"right"`` or ``"center"``."""
    return "left" if dx > 1 else "right" if dx < -1 else "center"


def _box(x: float, y: float, width: float, height: float, held_by: str) -> Box:
    left = x - {"left": 0.0, "center": width / 2, "right": width}[held_by]
    return left, y - height / 2, left + width, y + height / 2


def _overlap(a: Box, b: Box) -> float:
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0.0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)
