"""evaluate.py detect: the official kit's figures, the VOC layout, training that goes on where it stopped, mistakes."""
import signal

import numpy as np
import pytest
import torch

import common
import evaluate
from conftest import ask, asked_wrongly


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
    ends = np.array([0, 0, 1, 1])                               # the kit counts both ends
    true = np.array([t[0] for t in truth]), np.array([t[1] for t in truth], np.float64) + ends
    curve, = evaluate.voc_recall_precision(image, score, box.reshape(-1, 4) + ends, *true, np.array(difficult), [threshold])
    return evaluate.voc_average_precision(*curve, eleven_point)


def test_average_precision_is_the_kits_on_200_random_cases():
    rng = np.random.default_rng(0)
    for case in range(200):
        box = lambda: (lambda x, y, w, h: [x, y, x + w, y + h])(*rng.integers(1, 12, 2).tolist(), *rng.integers(0, 12, 2).tolist())
        truth = [(int(rng.integers(4)), box()) for _ in range(rng.integers(1, 25))]
        near = lambda gt: (gt[0], [v + int(rng.integers(-1, 2)) * (i > 1) for i, v in enumerate(gt[1])])
        places = [near(truth[rng.integers(len(truth))]) if rng.random() < 0.7 else (int(rng.integers(4)), box()) for _ in range(rng.integers(0, 40))]
        score = lambda: float(rng.integers(5) / 5 if case % 2 else rng.random())                   # many ties
        detections = [(i, score(), [*b[:2], max(b[0], b[2]), max(b[1], b[3])]) for i, b in places]
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


# ------------------------------------------------------------------------------------------------ training

FAST = ["--steps", "4", "--batch-size", "2", "--rois", "8", "--save-every", "2"]


@pytest.fixture
def few(monkeypatch):
    drawn = evaluate.drawn_scenes
    monkeypatch.setattr(evaluate, "drawn_scenes", lambda count, seed: drawn(12, seed))


@pytest.mark.parametrize("kind", ["c4", "fpn"])
def test_detects_in_drawn_scenes(checkpoint, few, tmp_path, kind):
    result = ask("detect", checkpoint, *FAST, "--steps", 2, "--detector", kind, "--image-size", 48, "--color-drop", "0.5", "--rescale", "--output",
                 tmp_path)
    keys = [a + b for b in ("", "_all") for a in ("AP", "AP50", "AP75")]
    assert all(0 <= result[k] <= 100 for k in keys) and {r["class"] for r in result["rows"]} <= set(common.SHAPES)
    assert result["AP50"] == pytest.approx(np.mean([r["AP50"] for r in result["rows"]]), abs=0.02)
    assert (tmp_path / "detections.png").stat().st_size > 10_000


def test_detection_goes_on_where_it_stopped(checkpoint, few, tmp_path, monkeypatch):
    whole = ask("detect", checkpoint, *FAST, "--output", tmp_path / "whole")
    asked = iter([False, False, True])
    with monkeypatch.context() as m:
        m.setattr(common, "asked_to_stop", lambda last: next(asked))
        with pytest.raises(common.Stopped, match="after step 3 of 4"):
            ask("detect", checkpoint, *FAST, "--output", tmp_path / "cut")
    cut = ask("detect", checkpoint, *FAST, "--output", tmp_path / "cut")
    a, b = (torch.load(tmp_path / name / "detect.pt", weights_only=True) for name in ("whole", "cut"))
    assert a["step"] == b["step"] == 4 and all(torch.equal(v, b["model"][k]) for k, v in a["model"].items()) and whole["rows"] == cut["rows"]
    with pytest.raises(common.UserError, match="lr.*another --output"):
        ask("detect", checkpoint, *FAST, "--lr", "0.5", "--output", tmp_path / "cut")


def test_a_signal_waits_for_the_end_of_a_step_and_not_for_the_evaluation(monkeypatch):
    for name in ("_stop_signal", "_stepping"):
        monkeypatch.setattr(common, name, getattr(common, name))
    assert not common.asked_to_stop()
    common._on_signal(signal.SIGTERM, None)
    assert common.asked_to_stop(last=True)
    with pytest.raises(common.Stopped, match="SIGTERM"):
        common._on_signal(signal.SIGTERM, None)


def test_an_encoder_without_a_fourth_stage_gets_new_blocks(checkpoint):
    encoder = common.resnet("resnet10x0.0625", norm="layer", stem="small", stages=3, version=2)        # as CPC's ResNet-161 ends
    model = evaluate.detector(encoder, dict(evaluate.DETECT["shapes"], rois=8), "c4", 10, dict(mean=[0] * 3, std=[1] * 3), torch.device("cpu"))
    loss = sum(model([torch.rand(3, 96, 96)], [dict(boxes=torch.tensor([[8.0, 8, 30, 30]]), labels=torch.tensor([1]))]).values())
    loss.backward()
    assert encoder.conv1.weight.grad.abs().sum() > 0 and len(model.roi_heads.box_head[0]) == 3


def test_norms_are_trained_and_then_those_of_the_final_weights(checkpoint, few):
    encoder, _, saved = evaluate.load_encoder(evaluate.parse_args(["detect", str(checkpoint)]), torch.device("cpu"))
    model = evaluate.detector(encoder, dict(evaluate.DETECT["shapes"], rois=8), "c4", 10, saved["input"], torch.device("cpu"))
    assert all(m.training for m in model.modules()) and all(p.requires_grad for p in encoder.parameters())
    scenes = evaluate.drawn_scenes(12, 1)
    batches = common.Batches(scenes, [], 4, 0)
    evaluate.precise_norms(model, scenes, batches, 3, evaluate.parse_args(["detect", str(checkpoint)]), torch.device("cpu"))
    x = torch.cat([torch.stack([scenes.images[j] for j in batches.indices(i)]) for i in range(3)]).float() / 255
    y = encoder.conv1(common.normalize(x, saved["input"]["mean"], saved["input"]["std"]))
    assert torch.allclose(encoder.bn1.running_mean, y.mean((0, 2, 3)), atol=1e-2) and encoder.bn1.num_batches_tracked == 3


def test_boxes_are_mirrored_with_their_image(few):
    scenes = evaluate.drawn_scenes(12, 1)
    for seed in range(4):
        torch.manual_seed(seed)
        (image,), (target,) = evaluate.disturb(scenes, [scenes.images[3].float() / 255], torch.tensor([3]))
        original, boxes = scenes.images[3].float() / 255, scenes.boxes[3]
        mirrored = not torch.equal(image, original)
        assert torch.equal(image.flip(2) if mirrored else image, original)
        if mirrored:
            boxes = torch.stack([96 - boxes[:, 2], boxes[:, 1], 96 - boxes[:, 0], boxes[:, 3]], 1)
        assert torch.equal(target["boxes"], boxes)


# ------------------------------------------------------------------------------------------------ the VOC layout

@pytest.fixture
def voc(tmp_path):
    """A VOC2007 of four images."""
    from torchvision.io import write_jpeg
    top = tmp_path / "VOCdevkit" / "VOC2007"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (top / folder).mkdir(parents=True)
    for i in range(4):
        write_jpeg(torch.randint(256, (3, 40, 60), dtype=torch.uint8), str(top / f"JPEGImages/{i}.jpg"))
        objects = "".join(f"<object><name>{name}</name><difficult>{hard}</difficult><bndbox><xmin>{x}</xmin><ymin>1</ymin><xmax>{x + 19}</xmax>"
                          f"<ymax>40</ymax></bndbox></object>" for name, hard, x in (("cat", 0, 1), ("dog", i % 2, 41)))
        (top / f"Annotations/{i}.xml").write_text(f"<annotation><size><width>60</width><height>40</height></size>{objects}</annotation>")
    (top / "ImageSets/Main/trainval.txt").write_text("0\n1\n")
    (top / "ImageSets/Main/test.txt").write_text("2\n3\n")
    return tmp_path


def test_voc_layout(voc):
    scenes = evaluate.voc_scenes(voc, "test")
    assert scenes.classes == ["cat", "dog"] and scenes.boxes[0].tolist() == [[0, 0, 20, 40], [40, 0, 60, 40]]
    assert [d.tolist() for d in scenes.difficult] == [[False, False], [False, True]] and scenes.crop(torch.tensor([1]), [])[0][0].shape == (3, 40, 60)
    boxes = np.array([[0, 0, 20, 40]] * 2 + [[40, 0, 60, 40]] * 2, float)
    perfect = np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1]), np.array([.9, .8, .7, .6]), boxes
    assert all(v == 100 for row in evaluate.voc_rows(perfect, scenes) for k, v in row.items() if k != "class")


def rewrite(file, old, new):
    file.write_text(file.read_text().replace(old, new))


@pytest.mark.parametrize("change,words", [
    (lambda top: (top / "JPEGImages/0.jpg").unlink(), "images missing: 1, the first"),
    (lambda top: [(top / f"Annotations/{i}.xml").unlink() for i in (0, 1)], "annotations missing: 2, the first"),
    (lambda top: (top / "Annotations/1.xml").write_text("<annotation>"), "annotations unreadable: 1"),
    (lambda top: rewrite(top / "Annotations/1.xml", "<xmax>60", "<xmax>61"), "boxes outside their image: 1"),
    (lambda top: rewrite(top / "Annotations/1.xml", "<name>", "<title>"), "unreadable"),
    (lambda top: rewrite(top / "Annotations/2.xml", "<name>dog</name>", ""), "objects without a name: 1"),
    (lambda top: rewrite(top / "Annotations/2.xml", "dog", "cow"), "does not have: cow"),
    (lambda top: (top / "ImageSets/Main/test.txt").unlink(), "no set test"),
    (lambda top: (top / "ImageSets/Main/trainval.txt").write_text("\n"), "is empty"),
])
def test_voc_mistakes(voc, checkpoint, capsys, change, words):
    change(voc / "VOCdevkit" / "VOC2007")
    assert words in asked_wrongly(capsys, "detect", checkpoint, "--data", voc, *FAST)


def test_real_photographs(real_data, checkpoint, tmp_path):
    scenes = evaluate.voc_scenes(real_data, "trainval")
    assert len(scenes) == 120 and "person" in scenes.classes
    result = ask("detect", checkpoint, "--data", real_data, "--train-set", "val", "--test-set", "val", "--image-size", 40, "--steps", 2,
                 "--batch-size", 2, "--rois", 8, "--workers", 0, "--output", tmp_path)
    assert 0 <= result["AP50"] <= 100 and result["train"] == 24
