"""evaluate.py detect: the official kit's figures, the VOC layout, training that goes on where it stopped, mistakes."""
import contextlib, io, json, re, shutil

import numpy as np
import pytest
import torch

import common
import evaluate
from conftest import TINY, command, environment, one_line, run


# ------------------------------------------------------------------------------------------------ the kit's rules

def literal(detections, truth, difficult, threshold, eleven_point):
    """VOCevaldet.m and VOCap.m, one detection and one box at a time."""
    ranked = sorted(range(len(detections)), key=lambda d: (-detections[d][1], d))
    taken, tp, fp = [False] * len(truth), [], []
    for d in ranked:
        image, _, bb = detections[d]
        best, which = -float("inf"), None
        for j, (other, gt) in enumerate(truth):
            iw, ih = min(bb[2], gt[2]) - max(bb[0], gt[0]) + 1, min(bb[3], gt[3]) - max(bb[1], gt[1]) + 1
            if other == image and iw > 0 and ih > 0:
                union = (bb[2] - bb[0] + 1) * (bb[3] - bb[1] + 1) + (gt[2] - gt[0] + 1) * (gt[3] - gt[1] + 1) - iw * ih
                if iw * ih / union > best:
                    best, which = iw * ih / union, j
        tp.append(0)
        fp.append(0)
        if best >= threshold:
            if not difficult[which]:
                tp[-1], fp[-1], taken[which] = (0, 1, True) if taken[which] else (1, 0, True)
        else:
            fp[-1] = 1
    positives = sum(not d for d in difficult)
    recall = [sum(tp[:i + 1]) / positives for i in range(len(tp))]
    precision = [sum(tp[:i + 1]) / max(1, sum(tp[:i + 1]) + sum(fp[:i + 1])) for i in range(len(tp))]
    if eleven_point:
        return sum(max([p for r, p in zip(recall, precision) if r >= k / 10], default=0) for k in range(11)) / 11
    r, p = [0, *recall, 1], [0, *precision, 0]
    for i in range(len(p) - 2, -1, -1):
        p[i] = max(p[i], p[i + 1])
    return sum((r[i] - r[i - 1]) * p[i] for i in range(1, len(r)) if r[i] != r[i - 1])


def ours(detections, truth, difficult, threshold, eleven_point):
    image, score, box = (np.array([d[i] for d in detections], np.float64) for i in range(3))
    matches = evaluate.voc_matches((image, score, box.reshape(-1, 4)), (np.array([t[0] for t in truth]), np.array([t[1] for t in truth], np.float64)))
    return evaluate.voc_average_precision(*evaluate.voc_recall_precision(*matches, np.array(difficult), threshold), eleven_point)


def test_average_precision_is_the_kits_on_200_random_cases():
    rng = np.random.default_rng(0)
    for case in range(200):
        box = lambda: (lambda x, y, w, h: [x, y, x + w, y + h])(*rng.integers(1, 12, 2).tolist(), *rng.integers(0, 12, 2).tolist())
        truth = [(int(rng.integers(4)), box()) for _ in range(rng.integers(1, 25))]
        near = lambda gt: (gt[0], [v + int(rng.integers(-1, 2)) * (i > 1) for i, v in enumerate(gt[1])])
        places = [near(truth[rng.integers(len(truth))]) if rng.random() < 0.7 else (int(rng.integers(4)), box()) for _ in range(rng.integers(0, 40))]
        detections = [(i, float(rng.integers(5) / 5 if case % 2 else rng.random()), [*b[:2], max(b[0], b[2]), max(b[1], b[3])]) for i, b in places]    # many ties
        difficult = [bool(d) for d in rng.random(len(truth)) < 0.3]
        difficult[0] = False
        for threshold in (0.5, 0.75):
            for rule in (True, False):
                a, b = ours(detections, truth, difficult, threshold, rule), literal(detections, truth, difficult, threshold, rule)
                assert abs(a - b) <= 1e-12, (case, threshold, rule, a, b)


BOX, FAR = [1, 1, 10, 10], [31, 31, 40, 40]


@pytest.mark.parametrize("detections,truth,difficult,eleven,area", [
    ([(0, .9, BOX)], [(0, BOX)], [0], 1, 1),
    ([(0, .9, BOX), (0, .8, BOX)], [(0, BOX)], [0], 1, 1),                                   # the duplicate comes after all recall
    ([(0, .9, BOX), (0, .8, BOX), (0, .7, FAR)], [(0, BOX), (0, FAR)], [0, 0], (6 + 5 * 2 / 3) / 11, .5 + .5 * 2 / 3),    # ... and before some
    ([(0, .9, FAR), (0, .8, BOX)], [(0, BOX)], [0], .5, .5),                                 # a wrong one first
    ([(0, .9, BOX), (0, .8, BOX), (0, .7, FAR)], [(0, BOX), (0, FAR)], [1, 0], 1, 1),        # difficult: neither right nor wrong, twice
    ([(0, .9, FAR), (0, .9, BOX)], [(0, BOX)], [0], .5, .5),                                 # ties stay in the order given
    ([(0, .9, BOX), (0, .9, FAR)], [(0, BOX)], [0], 1, 1),
    ([(1, .9, BOX)], [(0, BOX)], [0], 0, 0),                                                 # another image
    ([(0, .9, [1, 1, 10, 5])], [(0, BOX)], [0], 1, 1),                                       # an overlap of exactly a half
    ([(0, .9, [1, 1, 10, 4])], [(0, BOX)], [0], 0, 0),
    ([], [(0, BOX)], [0], 0, 0),
])
def test_average_precision_by_hand(detections, truth, difficult, eleven, area):
    difficult = [bool(d) for d in difficult]
    assert ours(detections, truth, difficult, 0.5, True) == pytest.approx(eleven, abs=1e-12)
    assert ours(detections, truth, difficult, 0.5, False) == pytest.approx(area, abs=1e-12)


def test_recall_of_exactly_three_tenths_counts():
    recall, precision = np.arange(1, 4) / 10, np.ones(3)
    assert evaluate.voc_average_precision(recall, precision, True) == pytest.approx(4 / 11)
    assert evaluate.voc_average_precision([0.5, 0.5, 1], [1, 0.5, 2 / 3], False) == pytest.approx(0.5 + 0.5 * 2 / 3)
