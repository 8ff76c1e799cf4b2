"""Ranges of flattened tensors as boxes, and what boxes have in common: compared with numpy's own indexing."""

import itertools
import math

import numpy as np
import pytest

from ling.checkpoint.boxes import Box, boxes_of_range, overlap, whole

SHAPES = [(), (1,), (7,), (3, 4), (4, 1), (1, 5), (2, 3, 4), (3, 1, 2), (2, 2, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_range_is_its_boxes_in_order(shape):
    numbers = np.arange(math.prod(shape)).reshape(shape)
    for first, last in itertools.combinations(range(numbers.size + 1), 2):
        boxes = list(boxes_of_range(shape, first, last))
        found = [element for box in boxes for element in numbers[box.slices()].reshape(-1)]
        assert found == list(range(first, last))
        assert len(boxes) <= max(1, 2 * len(shape) - 1)
        assert all(numbers[box.slices()].size == box.numel for box in boxes)


def test_an_empty_range_has_no_boxes():
    assert list(boxes_of_range((3, 4), 5, 5)) == []
    assert list(boxes_of_range((), 0, 0)) == []


def test_overlap_is_what_both_index():
    shape = (4, 5)
    boxes = [Box((a, b), (c, d)) for a in range(4) for b in range(5) for c in range(1, 5 - a) for d in range(1, 6 - b)]
    for one, other in itertools.product(boxes[::3], boxes[::2]):
        marks = np.zeros(shape, dtype=int)
        marks[one.slices()] += 1
        marks[other.slices()] += 1
        common = overlap(one, other)
        assert (marks == 2).sum() == (common.numel if common else 0)
        if common:
            assert (marks[common.slices()] == 2).all()
            assert common.relative_to(one.start).moved(one.start) == common
    assert overlap(whole(()), whole(())) == whole(())
