"""shapes.py: the embedded data is the same everywhere, balanced, and its boxes fit."""
import hashlib, time

import numpy as np
import pytest

import shapes

def test_images_are_the_same_everywhere():
    images, labels, boxes = shapes.draw_shapes(300, seed=1)
    assert images.shape == (300, 3, 32, 32) and images.dtype == np.uint8
    content = labels.astype("<i8").tobytes() + boxes.astype("<i8").tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == "3035b845e97774a5"
    sums = images[:4].astype(int).sum((1, 2, 3))
    assert np.abs(sums - np.array([118256, 95948, 106178, 112734])).max() <= 3072
    assert (shapes.draw_shapes(300, seed=1)[0] == images).all()
    assert (shapes.draw_shapes(300, seed=2)[0] != images).any()

def test_images_are_balanced_quick_and_boxed():
    start = time.process_time()
    images, labels, boxes = shapes.draw_shapes(5000, seed=1)
    shapes.draw_shapes(2000, seed=2)
    assert time.process_time() - start < 15
    assert (np.bincount(labels[:, 0], minlength=10) == 500).all()
    x0, y0, x1, y1 = boxes[:, 0].T
    assert (x0 >= 0).all() and (y0 >= 0).all() and (x1 <= 32).all() and (y1 <= 32).all()
    assert ((x1 - x0) >= 10).all()
    disc = labels[:, 0] == shapes.CLASSES.index("disc")
    assert np.abs((x1 - x0) - (y1 - y0))[disc].max() <= 1
    bar = labels[:, 0] == shapes.CLASSES.index("bar")
    assert ((x1 - x0) > (y1 - y0))[bar].all()

def test_the_box_of_a_disc_holds_what_differs_from_the_background():
    images, labels, boxes = shapes.draw_shapes(2000, seed=5)
    gray = images.mean(1)
    right = 0
    discs = np.flatnonzero(labels[:, 0] == 0)
    for i in discs:
        x0, y0, x1, y1 = boxes[i, 0]
        cy = (y0 + y1) // 2
        cx = (x0 + x1) // 2
        centre = gray[i, cy - 1:cy + 2, cx - 1:cx + 2].mean()
        corners = [gray[i, y0:y0 + 2, x0:x0 + 2], gray[i, y1 - 2:y1, x1 - 2:x1]]
        right += abs(centre - np.mean(corners)) > gray[i, y0:y1, x0:x1].std() / 2
    assert right > 0.9 * len(discs)

def test_scenes_hold_one_to_four_objects_in_their_cells():
    images, labels, boxes = shapes.draw_shapes(200, seed=3, size=96, cells=2)
    assert images.shape == (200, 3, 96, 96)
    assert labels.shape == (200, 4) and boxes.shape == (200, 4, 4)
    present = labels >= 0
    assert set(present.sum(1)) == {1, 2, 3, 4}
    assert (boxes[~present] == 0).all()
    for place in range(4):
        x = place % 2 * 48
        y = place // 2 * 48
        b = boxes[:, place][present[:, place]]
        assert (b[:, 0] >= x).all() and (b[:, 2] <= x + 48).all()
        assert (b[:, 1] >= y).all() and (b[:, 3] <= y + 48).all()
        assert (b[:, 2] - b[:, 0] >= 16).all()

def test_a_size_that_the_cells_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="multiple"):
        shapes.draw_shapes(1, 0, size=33, cells=2)
