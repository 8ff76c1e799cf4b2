"""Boxes: rectangular parts of tensors, which is what a checkpoint stores. Pure arithmetic on tuples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

Index = tuple[int, ...]


class Box(NamedTuple):
    """The elements `start[d] <= i[d] < start[d] + size[d]` of a tensor."""

    start: Index
    size: Index

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.size)

    def slices(self) -> tuple[slice, ...]:
        """To index a tensor with."""
        return tuple(slice(first, first + count) for first, count in zip(self.start, self.size, strict=True))

    def moved(self, by: Index) -> Box:
        """The box of the same size further on."""
        return Box(tuple(a + b for a, b in zip(self.start, by, strict=True)), self.size)

    def relative_to(self, origin: Index) -> Box:
        """The same box, counted from another corner."""
        return self.moved(tuple(-a for a in origin))


def whole(shape: Index) -> Box:
    """The box of all elements of a tensor."""
    return Box((0,) * len(shape), tuple(shape))


def overlap(a: Box, b: Box) -> Box | None:
    """What two boxes of the same tensor have in common; None where that is nothing."""
    start = tuple(map(max, a.start, b.start))
    ends = (
        min(first_a + size_a, first_b + size_b)
        for first_a, size_a, first_b, size_b in zip(a.start, a.size, b.start, b.size, strict=True)
    )
    size = tuple(end - first for end, first in zip(ends, start, strict=True))
    return Box(start, size) if all(count > 0 for count in size) else None


def boxes_of_range(shape: Index, first: int, last: int) -> Iterator[Box]:
    """The elements `first` to `last` (exclusive) of a flattened (row-major) tensor as boxes, in the order of the range.

    A range is a partial row, whole rows, and a partial row, and so on for the rows: at most `2 * dimensions - 1` boxes.
    Each of them is contiguous in the flattened tensor.
    """
    if first >= last:
        return
    if len(shape) <= 1:
        yield Box((first,), (last - first,)) if shape else Box((), ())
        return
    row = math.prod(shape[1:])
    if first // row == (last - 1) // row and last - first < row:
        index = first // row
        for box in boxes_of_range(shape[1:], first - index * row, last - index * row):
            yield Box((index, *box.start), (1, *box.size))
        return
    head, tail = -(-first // row), last // row
    yield from boxes_of_range(shape, first, head * row)
    if head < tail:
        yield Box((head,) + (0,) * (len(shape) - 1), (tail - head, *shape[1:]))
    yield from boxes_of_range(shape, tail * row, last)
