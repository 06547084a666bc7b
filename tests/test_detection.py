"""detection.py: the official kit's figures, the VOC layout, the detector, its training and test."""
import math
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)

import common
import detection

CPU = torch.device("cpu")
INPUT = dict(mean=[0.5, 0.4, 0.3], std=[0.25, 0.2, 0.3])

# ------------------------------------------------------------------- the kit's rules

def kit_iou(a, b):
    """Of boxes whose ends count, as in the kit; -infinity if they do not overlap."""
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    if width <= 0 or height <= 0:
        return -math.inf
    area_a = (a[2] - a[0] + 1) * (a[3] - a[1] + 1)
    area_b = (b[2] - b[0] + 1) * (b[3] - b[1] + 1)
    return width * height / (area_a + area_b - width * height)

def kit_average_precision(detections, truth, difficult, threshold, eleven_point):
    """VOCevaldet.m and VOCap.m read literally, one detection and one box at a time.

    detections: [(image, score, box)], truth: [(image, box)], difficult: [bool]."""
    ranked = sorted(range(len(detections)), key=lambda d: (-detections[d][1], d))
    taken = [False] * len(truth)
    true_positives = 0
    false_positives = 0
    recall = []
    precision = []
    for d in ranked:
        image, _, box = detections[d]
        best = -math.inf
        best_truth = None
        for j, (true_image, true_box) in enumerate(truth):
            if true_image == image and kit_iou(box, true_box) > best:
                best = kit_iou(box, true_box)
                best_truth = j
        if best < threshold:
            false_positives += 1
        elif not difficult[best_truth]:
            if taken[best_truth]:
                false_positives += 1
            else:
                true_positives += 1
                taken[best_truth] = True
        recall.append(true_positives / sum(not d for d in difficult))
        precision.append(true_positives / max(1, true_positives + false_positives))

    if eleven_point:
        total = 0
        for k in range(11):
            total += max([p for r, p in zip(recall, precision) if r >= k / 10], default=0)
        return total / 11
    r = [0, *recall, 1]
    p = [0, *precision, 0]
    for i in range(len(p) - 2, -1, -1):
        p[i] = max(p[i], p[i + 1])
    return sum((r[i] - r[i - 1]) * p[i] for i in range(1, len(r)))

def our_average_precision(detections, truth, difficult, threshold, eleven_point):
    to_excluded_ends = np.array([0, 0, 1, 1])
    image = np.array([image for image, _, _ in detections])
    score = np.array([score for _, score, _ in detections])
    box = np.array([box for _, _, box in detections], float).reshape(-1, 4) + to_excluded_ends
    true_image = np.array([image for image, _ in truth])
    true_box = np.array([box for _, box in truth], float) + to_excluded_ends
    curve, = detection.voc_recall_precision(
        image, score, box, true_image, true_box, np.array(difficult, bool), [threshold])
    return detection.voc_average_precision(*curve, eleven_point)

def random_case(rng, ties):
    """Detections, most of them near a true box, and true boxes, some of them difficult."""

    def random_box():
        x, y = rng.integers(1, 12, 2).tolist()
        width, height = rng.integers(0, 12, 2).tolist()
        return [x, y, x + width, y + height]

    truth = [(int(rng.integers(4)), random_box()) for _ in range(rng.integers(1, 25))]
    difficult = [bool(d) for d in rng.random(len(truth)) < 0.3]
    difficult[0] = False
    detections = []
    for _ in range(rng.integers(0, 40)):
        image = int(rng.integers(4))
        box = random_box()
        if rng.random() < 0.7:
            image, (x0, y0, x1, y1) = truth[rng.integers(len(truth))]
            shift = rng.integers(-1, 2, 2).tolist()
            box = [x0, y0, max(x0, x1 + shift[0]), max(y0, y1 + shift[1])]
        score = rng.integers(5) / 5 if ties else rng.random()
        detections.append((image, float(score), box))
    return detections, truth, difficult

def test_average_precision_is_the_kits_on_200_random_cases():
    rng = np.random.default_rng(0)
    for case in range(200):
        detections, truth, difficult = random_case(rng, ties=case % 2 == 1)
        for threshold in (0.5, 0.75):
            for eleven_point in (True, False):
                arguments = detections, truth, difficult, threshold, eleven_point
                ours = our_average_precision(*arguments)
                kits = kit_average_precision(*arguments)
                assert abs(ours - kits) <= 1e-12, (case, threshold, eleven_point)

NEAR = [1, 1, 10, 10]
FAR = [31, 31, 40, 40]
ONE = [(0, NEAR)]
TWO = [(0, NEAR), (0, FAR)]

@pytest.mark.parametrize("detections, truth, difficult, eleven_point, area", [
    # one, found
    ([(0, 0.9, NEAR)], ONE, [0], 1, 1),
    # a duplicate that comes after all recall, and one that comes before
    ([(0, 0.9, NEAR), (0, 0.8, NEAR)], ONE, [0], 1, 1),
    ([(0, 0.9, NEAR), (0, 0.8, NEAR), (0, 0.7, FAR)], TWO, [0, 0],
     (6 + 5 * 2 / 3) / 11, 0.5 + 0.5 * 2 / 3),
    # a wrong one first
    ([(0, 0.9, FAR), (0, 0.8, NEAR)], ONE, [0], 0.5, 0.5),
    # a difficult one is neither right nor wrong, twice
    ([(0, 0.9, NEAR), (0, 0.8, NEAR), (0, 0.7, FAR)], TWO, [1, 0], 1, 1),
    # ties stay in the order given
    ([(0, 0.9, FAR), (0, 0.9, NEAR)], ONE, [0], 0.5, 0.5),
    ([(0, 0.9, NEAR), (0, 0.9, FAR)], ONE, [0], 1, 1),
    # another image; an IoU of exactly a half, and a little less; nothing found
    ([(1, 0.9, NEAR)], ONE, [0], 0, 0),
    ([(0, 0.9, [1, 1, 10, 5])], ONE, [0], 1, 1),
    ([(0, 0.9, [1, 1, 10, 4])], ONE, [0], 0, 0),
    ([], ONE, [0], 0, 0),
])
def test_average_precision_by_hand(detections, truth, difficult, eleven_point, area):
    by_eleven = our_average_precision(detections, truth, difficult, 0.5, True)
    by_area = our_average_precision(detections, truth, difficult, 0.5, False)
    assert by_eleven == pytest.approx(eleven_point, abs=1e-12)
    assert by_area == pytest.approx(area, abs=1e-12)

def test_every_level_of_recall_counts_when_it_is_reached_exactly():
    for k in range(1, 11):
        recall = np.arange(1, k + 1) / 10
        ap = detection.voc_average_precision(recall, np.ones(k), True)
        assert ap == pytest.approx((k + 1) / 11)
    recall = [0.5, 0.5, 1]
    precision = [1, 0.5, 2 / 3]
    ap = detection.voc_average_precision(recall, precision, False)
    assert ap == pytest.approx(0.5 + 0.5 * 2 / 3)

def test_recall_in_float32_which_would_miss_levels_is_refused():
    recall = torch.arange(1, 8) / 10
    assert recall[-1].item() < 0.7
    with pytest.raises(ValueError, match="float64"):
        detection.voc_average_precision(recall, torch.ones(7), True)

def test_an_iou_of_exactly_a_threshold_reaches_it():
    assert detection.IOUS == [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]
    for threshold, width in zip(detection.IOUS, range(10, 20)):         # width / 20
        curve, = detection.voc_recall_precision(
            np.array([0]), np.array([0.9]), np.array([[0.0, 0, width, 1]]),
            np.array([0]), np.array([[0.0, 0, 20, 1]]), np.array([False]), [threshold])
        assert curve[0].tolist() == [1.0], threshold

# ------------------------------------------------------------------- scenes

OBJECT = """<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>1</ymin>
<xmax>{}</xmax><ymax>40</ymax></bndbox></object>"""

@pytest.fixture
def voc(tmp_path):
    """A VOC2007 of four images of 60 x 40; the last one of "test" is 90 x 40."""
    top = tmp_path / "VOCdevkit" / "VOC2007"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (top / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(4):
        width = 90 if i == 3 else 60
        pixels = rng.integers(256, size=(40, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(top / f"JPEGImages/{i}.jpg")
        objects = OBJECT.format("cat", 0, 1, 20) + OBJECT.format("dog", i % 2, 41, 60)
        size = f"<size><width>{width}</width><height>40</height></size>"
        (top / f"Annotations/{i}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    (top / "ImageSets/Main/trainval.txt").write_text("0\n1\n")
    (top / "ImageSets/Main/test.txt").write_text("2\n3\n")
    return top

def rewrite(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))

def test_voc_layout(voc):
    scenes = detection.voc_scenes(voc.parents[1], "test")
    assert scenes.classes == ["cat", "dog"]
    assert scenes.boxes[0].tolist() == [[0, 0, 20, 40], [40, 0, 60, 40]]
    assert scenes.labels[0].tolist() == [0, 1]
    assert [d.tolist() for d in scenes.difficult] == [[False, False], [False, True]]
    images, indices, broken = scenes.crop(torch.tensor([1, 0]), [], 0, 7)
    assert [image.shape for image in images] == [(3, 40, 90), (3, 40, 60)]
    assert images[0].dtype == torch.uint8
    assert indices.tolist() == [1, 0]
    assert not broken

def test_both_years_are_read_where_both_have_the_set(voc):
    voc.rename(voc.parent / "VOC2012")
    assert len(detection.voc_scenes(voc.parents[1], "trainval")) == 2
    with pytest.raises(common.UserError, match="no set test; expected .*VOC2007"):
        detection.voc_scenes(voc.parents[1], "test", years=(2007,))

def test_boxes_outside_their_image_are_clipped_and_counted(voc, capsys):
    rewrite(voc / "Annotations/0.xml", "<xmax>60", "<xmax>61")          # a pixel too far
    rewrite(voc / "Annotations/1.xml", "<xmin>1<", "<xmin>-4.5<")
    more = OBJECT.format("cat", 0, 70, 80) + OBJECT.format("cat", 0, 30, 10)   # outside; reversed
    rewrite(voc / "Annotations/1.xml", "</annotation>", more + "</annotation>")
    scenes = detection.voc_scenes(voc.parents[1], "trainval")
    assert scenes.boxes[0].tolist() == [[0, 0, 20, 40], [40, 0, 60, 40]]
    assert scenes.boxes[1].tolist() == [[0, 0, 20, 40], [40, 0, 60, 40]]
    line, = capsys.readouterr().err.splitlines()
    assert "reach outside their image: 4, the first in" in line
    assert line.count(".xml") == 1 and "0.xml" in line

def test_an_image_without_objects_has_no_boxes(voc):
    text = (voc / "Annotations/0.xml").read_text()
    (voc / "Annotations/0.xml").write_text(text[:text.index("<object>")] + "</annotation>")
    scenes = detection.voc_scenes(voc.parents[1], "trainval")
    assert scenes.boxes[0].shape == (0, 4)
    views, targets = detection.augmented(scenes, [torch.rand(3, 40, 60)], torch.tensor([0]))
    assert targets[0]["boxes"].shape == (0, 4)

def unlink_image(voc):
    (voc / "JPEGImages/0.jpg").unlink()

def unlink_annotations(voc):
    (voc / "Annotations/0.xml").unlink()
    (voc / "Annotations/1.xml").unlink()

def cut_annotation(voc):
    (voc / "Annotations/1.xml").write_text("<annotation>")

def make_annotation_a_directory(voc):
    (voc / "Annotations/1.xml").unlink()
    (voc / "Annotations/1.xml").mkdir()

def make_annotation_a_pipe(voc):
    (voc / "Annotations/1.xml").unlink()
    os.mkfifo(voc / "Annotations/1.xml")

def another_root(voc):
    (voc / "Annotations/1.xml").write_text("<note><size/></note>")

def nest_deeply(voc):
    (voc / "Annotations/1.xml").write_text("<a>" * 5000 + "</a>" * 5000)

def a_box_of_words(voc):
    rewrite(voc / "Annotations/1.xml", "<xmax>60", "<xmax>sixty")

def no_size(voc):
    rewrite(voc / "Annotations/1.xml", "<width>60", "<width>0")

def no_name(voc):
    rewrite(voc / "Annotations/2.xml", "<name>dog</name>", "")

def empty_name(voc):
    rewrite(voc / "Annotations/2.xml", "<name>dog</name>", "<name> </name>")

def two_names(voc):
    rewrite(voc / "Annotations/2.xml", "<name>dog</name>", "<name>dog</name><name>cow</name>")

def unknown_class(voc):
    rewrite(voc / "Annotations/2.xml", "dog", "cow")

def no_set(voc):
    (voc / "ImageSets/Main/test.txt").unlink()

def make_one_set_of_two_a_pipe(voc):
    shutil.copytree(voc, voc.parent / "VOC2012")
    (voc / "ImageSets/Main/trainval.txt").unlink()
    os.mkfifo(voc / "ImageSets/Main/trainval.txt")

def empty_set(voc):
    (voc / "ImageSets/Main/trainval.txt").write_text("\n")

def latin_set(voc):
    (voc / "ImageSets/Main/test.txt").write_bytes("h\u00fctte\n".encode("latin-1"))

def set_of_long_names(voc):
    (voc / "ImageSets/Main/test.txt").write_text("x" * 5000)

def all_difficult(voc):
    for i in (2, 3):
        rewrite(voc / f"Annotations/{i}.xml", "<difficult>0", "<difficult>1")

@pytest.mark.parametrize("damage, words", [
    (unlink_image, "images missing: 1, the first .*0.jpg"),
    (unlink_annotations, "annotations missing: 2, the first .*0.xml"),
    (cut_annotation, "annotations unreadable: 1, the first .*1.xml"),
    (make_annotation_a_directory, "annotations unreadable: 1, the first .*1.xml"),
    (make_annotation_a_pipe, "annotations unreadable: 1, the first .*1.xml .a pipe"),
    (another_root, "annotations unreadable: 1"),
    (nest_deeply, "annotations unreadable: 1"),
    (a_box_of_words, "annotations unreadable: 1, .*sixty"),
    (no_size, "annotations unreadable: 1"),
    (no_name, "annotations unreadable: 1, .*name"),
    (empty_name, "annotations unreadable: 1, .*name"),
    (two_names, "annotations unreadable: 1"),
    (unknown_class, "does not have: cow"),
    (no_set, "no set test; expected .*test.txt"),
    (make_one_set_of_two_a_pipe, "VOC2007.*trainval.txt: a pipe"),
    (empty_set, "set trainval is empty"),
    (latin_set, "test.txt: not UTF-8"),
    (set_of_long_names, "images missing: 1"),
    (all_difficult, "no object that is not difficult"),
])
def test_mistakes_in_a_voc_directory_are_one_line(voc, damage, words):
    damage(voc)
    with pytest.raises(common.UserError, match=words) as e:
        train = detection.voc_scenes(voc.parents[1], "trainval")
        detection.voc_scenes(voc.parents[1], "test", train.classes)
    assert "\n" not in str(e.value)

def test_an_unreadable_image_is_replaced_and_named(voc, capsys):
    scenes = detection.voc_scenes(voc.parents[1], "test")
    (voc / "JPEGImages/2.jpg").write_bytes(b"no image")
    images, used, broken = scenes.crop(torch.tensor([0, 1]), [])
    assert torch.equal(images[0], images[1])
    assert used.tolist() == [1, 1]
    assert broken == [0]
    common.note_broken(scenes, broken)
    assert "2.jpg: another is used" in capsys.readouterr().err
    with pytest.raises(common.UserError, match="2 of . images cannot be read, more than 1 %"):
        common.note_broken(scenes, [1])

def test_drawn_scenes_have_their_objects_in_cells():
    scenes = detection.drawn_scenes(20, seed=1)
    assert scenes.images.shape == (20, 3, 96, 96)
    assert len(scenes.classes) == 10
    for boxes, labels, difficult in zip(scenes.boxes, scenes.labels, scenes.difficult):
        assert 1 <= len(boxes) == len(labels) == len(difficult) <= 9
        assert not difficult.any()
        for x0, y0, x1, y1 in boxes.tolist():
            assert x0 < x1 and y0 < y1
            assert x0 // 32 == (x1 - 1) // 32 and y0 // 32 == (y1 - 1) // 32

def test_boxes_are_mirrored_with_their_image():
    image = torch.rand(3, 10, 16)
    boxes = torch.tensor([[2.0, 1, 7, 9], [0, 0, 16, 4]])
    marked = torch.zeros(3, 10, 16)
    marked[:, 1:9, 2:7] = 1                     # the first box
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        view, moved = detection.augment(image, boxes)
        mirrored = not torch.equal(view, image)
        seen.add(mirrored)
        assert torch.equal(view, image.flip(2) if mirrored else image)
        marked_view = marked.flip(2) if mirrored else marked
        x0, y0, x1, y1 = moved[0].int().tolist()
        assert marked_view[:, y0:y1, x0:x1].all()
        assert marked_view.sum() == 3 * (y1 - y0) * (x1 - x0)
        assert moved[1].tolist() == [0, 0, 16, 4]
    assert seen == {False, True}

def test_colour_drop_keeps_one_channel():
    image = torch.rand(3, 4, 4)
    kept = set()
    for seed in range(20):
        torch.manual_seed(seed)
        view, _ = detection.augment(image, torch.zeros(0, 4), color_drop=1.0)
        assert torch.equal(view[0], view[1]) and torch.equal(view[0], view[2])
        for channel in range(3):
            original = image[channel]
            if torch.equal(view[0], original) or torch.equal(view[0], original.flip(1)):
                kept.add(channel)
    assert kept == {0, 1, 2}

def test_targets_count_from_one_and_keep_difficult_objects(voc):
    scenes = detection.voc_scenes(voc.parents[1], "test")
    _, targets = detection.augmented(scenes, [torch.rand(3, 40, 90)], torch.tensor([1]))
    assert targets[0]["labels"].tolist() == [1, 2]

# ------------------------------------------------------------------- the detector

def small_encoder(norm="batch", stem="small"):
    torch.manual_seed(0)
    return common.resnet("resnet10x0.125", norm=norm, stem=stem)

class ThreeStages(nn.Module):
    """An encoder without a stage to spare, as CPC's ResNet-161 and CMC's pair are."""

    def __init__(self, dim):
        super().__init__()
        self.conv1 = nn.Conv2d(3, dim, 7, 4, 3)
        self.norm = nn.GroupNorm(1, dim)
        self.layer4 = nn.Conv2d(dim, dim, 1)    # a name alone does not make it common.ResNet's
        self.dim = dim

    def maps(self, x):
        return self.layer4(self.norm(self.conv1(x)).relu())

def small_recipe(**changes):
    return detection.make_recipe("shapes", **dict(dict(steps=4, batch_size=2, rois=8), **changes))

def test_recipes_are_mocos_and_follow_the_size():
    recipe = detection.make_recipe("voc07+12")
    assert recipe["steps"] == 24000 and recipe["batch_size"] == 16 and recipe["lr"] == 0.02
    assert recipe["sizes"] == tuple(range(480, 801, 32)) and recipe["max_size"] == 1333
    assert detection.make_recipe("voc07")["steps"] == 9000
    half = detection.make_recipe("voc07", image_size=400, lr=0.1, steps=None)
    assert half["sizes"][0] == 240 and half["sizes"][-1] == 400 and half["max_size"] == 666
    assert half["anchors"] == (16, 32, 64, 128, 256)
    assert half["lr"] == 0.1 and half["steps"] == 9000
    assert detection.make_recipe("voc07", steps=80)["warmup"] == 10
    for side in range(4, 900):
        assert detection.make_recipe("voc07", image_size=side)["sizes"][-1] == side
    assert detection.DETECT["voc07"]["sizes"][-1] == 800

def test_the_rate_is_mocos():
    for total, first, second in ((24000, 18000, 22000), (9000, 6750, 8250)):
        rates = [detection.learning_rate(step, 100, total) for step in range(total)]
        assert rates[0] == pytest.approx(0.001)
        assert rates[50] == pytest.approx(0.5005)
        assert rates[100] == rates[first - 1] == 1
        assert rates[first] == rates[second - 1] == pytest.approx(0.1)
        assert rates[second] == rates[-1] == pytest.approx(0.01)

def losses(model, image, boxes):
    target = dict(boxes=torch.tensor(boxes), labels=torch.tensor([1] * len(boxes)))
    return model([image], [target])

def test_the_fourth_stage_is_the_box_head_and_everything_is_trained():
    encoder = small_encoder()
    stage = encoder.layer4
    encoder.requires_grad_(False).eval()        # as evaluate.load_encoder gives it
    model = detection.detector(encoder, small_recipe(), 10, INPUT, CPU)
    assert model.roi_heads.box_head.stage is stage
    assert isinstance(model.roi_heads.box_head.extra_norm, nn.BatchNorm2d)
    assert model.backbone.stride == 4 and model.backbone.out_channels == 32
    assert all(module.training for module in model.modules())
    sum(losses(model, torch.rand(3, 96, 96), [[8.0, 8, 30, 30]]).values()).backward()
    for name, weight in model.named_parameters():
        assert weight.requires_grad and weight.grad is not None, name
    assert encoder.conv1.weight.grad.abs().sum() > 0
    assert model.roi_heads.fg_bg_sampler.positive_fraction == 0.25
    assert model.roi_heads.fg_bg_sampler.batch_size_per_image == 8

@pytest.mark.parametrize("dim", [32, 30])       # 30: four does not divide it
def test_an_encoder_without_a_fourth_stage_gets_three_new_blocks(dim):
    encoder = ThreeStages(dim)
    model = detection.detector(encoder, small_recipe(), 10, INPUT, CPU)
    stage = model.roi_heads.box_head.stage
    assert len(stage) == 3
    assert stage(torch.rand(2, dim, 8, 8)).shape == (2, dim // 4 * 4, 4, 4)
    assert isinstance(encoder.layer4, nn.Conv2d)
    sum(losses(model, torch.rand(3, 96, 96), [[8.0, 8, 30, 30]]).values()).backward()
    assert encoder.conv1.weight.grad.abs().sum() > 0

def test_roi_pooling_is_aligned():
    """On a map whose values are its columns a bin's mean is the column below its centre: that of
    the image's pixel x is x / stride - 1/2."""
    stride = 4
    ramp = torch.arange(24.0).expand(1, 2, 24, 24)
    pool = detection.RoIPool(3, stride)
    x0, x1 = 10.0, 52.0
    pooled = pool({"0": ramp}, [torch.tensor([[x0, 20, x1, 60]])], None)
    assert pooled.shape == (1, 2, 3, 3)
    for k in range(3):
        centre = x0 + (k + 0.5) * (x1 - x0) / 3
        assert pooled[0, :, :, k] == pytest.approx(np.full((2, 3), centre / stride - 0.5), abs=1e-4)

def without_opinion(model):
    """The model, with offsets and scores of 0: what is left is geometry."""
    head = model.rpn.head
    predictor = model.roi_heads.box_predictor
    for layer in (head.cls_logits, head.bbox_pred, predictor.cls_score, predictor.bbox_pred):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model.eval()

def test_boxes_are_float32_in_bf16_and_as_many():
    recipe = detection.make_recipe("shapes", image_size=600)    # beyond the whole numbers of bf16
    image = torch.rand(3, 150, 160)
    proposals = {}
    found = {}
    for precision in ("fp32", "bf16"):
        encoder = small_encoder(stem="imagenet")
        model = detection.detector(encoder, recipe, 10, INPUT, CPU, precision)
        model = without_opinion(model)
        with torch.no_grad():
            images, _ = model.transform([image])
            maps = model.backbone(images.tensors)
            assert maps.dtype == torch.float32
            anchors, = model.rpn.anchor_generator(images, [maps])
            assert anchors.dtype == torch.float32
            (proposals[precision],), _ = model.rpn(images, {"0": maps})
            found[precision], = model([image])
    assert proposals["bf16"].dtype == found["bf16"]["boxes"].dtype == torch.float32
    assert len(proposals["fp32"]) > 100
    assert torch.equal(proposals["bf16"], proposals["fp32"])
    assert len(found["fp32"]["boxes"]) == len(found["bf16"]["boxes"]) > 0
    assert torch.equal(found["bf16"]["boxes"], found["fp32"]["boxes"])

def test_bf16_is_used_inside():
    model = detection.detector(small_encoder(), small_recipe(), 10, INPUT, CPU, "bf16")
    dtypes = []

    def note(module, inputs, output):
        dtypes.append(output.dtype)

    model.backbone.encoder.layer1[0].conv1.register_forward_hook(note)
    model.roi_heads.box_head.stage[0].conv1.register_forward_hook(note)
    result = losses(model, torch.rand(3, 96, 96), [[8.0, 8, 30, 30]])
    assert dtypes == [torch.bfloat16, torch.bfloat16]
    assert all(loss.dtype == torch.float32 for loss in result.values())

# ------------------------------------------------------------------- training and test

def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)

def in_order(found):
    return list(zip(*[column.tolist() for column in found]))

def test_an_images_detections_do_not_depend_on_its_companions(voc):
    """A layer norm averages over the padding of a batch."""
    both = detection.voc_scenes(voc.parents[1], "test")                 # 60 x 40 and 90 x 40
    (voc / "ImageSets/Main/alone.txt").write_text("2\n")
    alone = detection.voc_scenes(voc.parents[1], "alone", both.classes)
    recipe = small_recipe(image_size=40, max_size=100)
    model = detection.detector(small_encoder(norm="layer"), recipe, 2, INPUT, CPU)
    found_both = detection.find_all(model, both)
    found_alone = detection.find_all(model, alone)
    of_first = detection.Detections(*[column[found_both.image == 0] for column in found_both])
    assert len(of_first.image) > 0
    assert in_order(of_first) == in_order(found_alone)
    images = [both.read(i).float() / 255 for i in (0, 1)]
    with torch.no_grad():
        in_a_batch = model(images)[0]["boxes"].numpy()
    assert in_a_batch.shape != of_first.box.shape or abs(in_a_batch - of_first.box).max() > 0.1

def test_find_all_gives_the_models_results_of_every_image():
    scenes = detection.drawn_scenes(5, seed=3)
    model = detection.detector(small_encoder(), small_recipe(), 10, INPUT, CPU)
    found = detection.find_all(model, scenes)
    with torch.no_grad():
        for i in range(5):
            result, = model([scenes.read(i).float() / 255])
            of_image = found.image == i
            assert found.label[of_image].tolist() == (result["labels"] - 1).tolist()
            assert found.score[of_image].tolist() == result["scores"].tolist()
            assert found.box[of_image].tolist() == result["boxes"].tolist()
    assert (np.diff(found.image) >= 0).all()
    assert found.label.dtype == np.int64 and found.box.dtype == np.float64

def test_nothing_found_is_a_result(tmp_path):
    scenes = detection.drawn_scenes(3, seed=3)
    model = detection.detector(small_encoder(), small_recipe(), 10, INPUT, CPU)
    model.roi_heads.score_thresh = 1.0
    found = detection.find_all(model, scenes)
    assert found.box.shape == (0, 4)
    assert all(row["AP"] == 0 for row in detection.voc_rows(found, scenes))

def test_perfect_detections_score_100_and_can_be_drawn(voc, tmp_path):
    scenes = detection.voc_scenes(voc.parents[1], "test")
    perfect = detection.Detections(
        image=np.array([0, 0, 1, 1]), label=np.array([0, 1, 0, 1]),
        score=np.array([0.9, 0.7, 0.8, 0.6]), box=torch.cat(scenes.boxes).double().numpy())
    rows = detection.voc_rows(perfect, scenes)
    names = ["class", "AP", "AP50", "AP75", "AP_all", "AP50_all", "AP75_all"]
    assert [list(row) for row in rows] == [names, names]
    assert [row.pop("class") for row in rows] == ["cat", "dog"]
    assert all(value == pytest.approx(100) for row in rows for value in row.values())
    detection.draw_detections(scenes, perfect, tmp_path / "detections.png")
    with Image.open(tmp_path / "detections.png") as picture:
        assert picture.size[0] > 1000

def test_ap_is_the_mean_over_ten_thresholds_and_absent_classes_are_left_out(voc, capsys):
    scenes = detection.voc_scenes(voc.parents[1], "test", ["bird", "cat", "dog"])
    box = torch.cat(scenes.boxes).double().numpy()
    box[:, 2] -= [4, 0, 4, 0]                   # cats: an IoU of 16 / 20
    found = detection.Detections(np.array([0, 0, 1, 1]), np.array([1, 2, 1, 2]), np.ones(4), box)
    cat, dog = detection.voc_rows(found, scenes)
    assert cat["AP50"] == cat["AP75"] == dog["AP"] == pytest.approx(100)
    assert cat["AP"] == cat["AP_all"] == pytest.approx(70)              # 0.50, 0.55 ... 0.80
    assert "bird is not in the test set" in capsys.readouterr().err

def test_norms_get_the_statistics_of_the_final_weights():
    scenes = detection.drawn_scenes(12, seed=1)
    encoder = small_encoder()
    model = detection.detector(encoder, small_recipe(), 10, INPUT, CPU)
    batches = common.Batches(scenes, [], 4, seed=0)
    detection.precise_norms(model, batches, 3)
    images = torch.cat([scenes.images[batches.indices(step)] for step in range(3)])
    x = common.normalize(images.float() / 255, INPUT["mean"], INPUT["std"])
    mean = encoder.conv1(x).mean((0, 2, 3))     # mirroring hardly changes it
    assert torch.allclose(encoder.bn1.running_mean, mean, atol=1e-2)
    assert encoder.bn1.num_batches_tracked == 3

@pytest.fixture
def signals(monkeypatch):
    """SIGTERM goes to common.Stopped, as in a script."""
    monkeypatch.setattr(common.Stopped, "asked", None)
    monkeypatch.setattr(common.Stopped, "at_once", True)
    before = signal.signal(signal.SIGTERM, common.Stopped.on_signal)
    yield
    signal.signal(signal.SIGTERM, before)

def train(state, scenes, **changes):
    return detection.train_detector(small_encoder(), scenes, small_recipe(**changes), INPUT, state,
                                    CPU, seed=3, save_every=2)

def test_training_resumes_bit_for_bit_where_a_signal_stopped_it(signals, tmp_path, monkeypatch):
    scenes = detection.drawn_scenes(12, seed=1)
    whole = train(tmp_path / "whole.pt", scenes)
    calls = []
    augmented = detection.augmented

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)        # in the second step, which goes on
        return augmented(*args)

    with monkeypatch.context() as patch:
        patch.setattr(detection, "augmented", interrupted)
        with pytest.raises(common.Stopped, match="after step 3 of 4.*cut.pt"):
            train(tmp_path / "cut.pt", scenes)
    assert torch.load(tmp_path / "cut.pt", weights_only=True)["step"] == 3
    common.Stopped.asked = None
    cut = train(tmp_path / "cut.pt", scenes)
    assert same(whole.state_dict(), cut.state_dict())
    saved = torch.load(tmp_path / "whole.pt", weights_only=True)
    resumed = torch.load(tmp_path / "cut.pt", weights_only=True)
    assert saved["step"] == resumed["step"] == 4
    for a, b in zip(saved["optimizer"]["state"].values(), resumed["optimizer"]["state"].values()):
        assert torch.equal(a["momentum_buffer"], b["momentum_buffer"])
    assert common.Stopped.at_once               # what follows the training can be repeated
    again = train(tmp_path / "cut.pt", scenes)  # nothing is left but Precise-BN
    assert same(whole.state_dict(), again.state_dict())

def test_norms_are_not_decayed_and_all_weights_are_trained(tmp_path, monkeypatch):
    groups = []
    sgd = torch.optim.SGD

    def noted(params, **options):
        groups.extend(params)
        return sgd(params, **options)

    monkeypatch.setattr(torch.optim, "SGD", noted)
    model = train(tmp_path / "detect.pt", detection.drawn_scenes(12, seed=1), steps=1)
    decay = {p: group["weight_decay"] for group in groups for p in group["params"]}
    assert set(decay) == set(model.parameters())
    assert decay[model.backbone.encoder.bn1.weight] == 0
    assert decay[model.roi_heads.box_head.extra_norm.bias] == 0
    assert decay[model.backbone.encoder.conv1.weight] == 1e-4
    assert decay[model.rpn.head.cls_logits.bias] == 1e-4

def test_a_state_of_other_settings_is_refused(tmp_path):
    scenes = detection.drawn_scenes(12, seed=1)
    state = tmp_path / "detect.pt"
    train(state, scenes, steps=1)
    before = state.read_bytes()
    with pytest.raises(common.UserError, match=r"lr 0.02 \(now 0.5\).*another --output"):
        train(state, scenes, steps=1, lr=0.5)
    with pytest.raises(common.UserError, match="objects"):
        train(state, detection.drawn_scenes(12, seed=2), steps=1)
    assert state.read_bytes() == before

@pytest.mark.parametrize("content", [b"", b"no zip", "flipped", "a list", "without a step",
                                     "a step too many", "not finite"])
def test_a_damaged_state_is_one_line(tmp_path, content):
    scenes = detection.drawn_scenes(12, seed=1)
    state = tmp_path / "detect.pt"
    train(state, scenes, steps=1)
    if content == "flipped":
        content = bytearray(state.read_bytes())
        content[len(content) // 2] ^= 1
    elif content == "a list":
        torch.save([1, 2], state)
        content = state.read_bytes()
    elif isinstance(content, str):
        saved = torch.load(state, weights_only=True)
        if content == "without a step":
            del saved["step"]
        elif content == "a step too many":
            saved["step"] = 2
        else:
            next(iter(saved["model"].values())).fill_(math.nan)
        torch.save(saved, state)
        content = state.read_bytes()
    state.write_bytes(content)
    with pytest.raises(common.UserError, match="detect.pt: not a state of this detector") as e:
        train(state, scenes, steps=1)
    assert "\n" not in str(e.value) and "weights_only" not in str(e.value)

def test_a_state_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "detect.pt")
    with pytest.raises(common.UserError, match="detect.pt: not a state of this .* .a pipe"):
        train(tmp_path / "detect.pt", detection.drawn_scenes(12, seed=1), steps=1)

def test_a_loss_that_is_not_finite_is_not_saved(tmp_path):
    with pytest.raises(common.UserError, match="not finite after step 2; try a lower --lr"):
        train(tmp_path / "detect.pt", detection.drawn_scenes(12, seed=1), lr=1e30)
    assert not (tmp_path / "detect.pt").exists()

@pytest.mark.skipif("SSL_DATA" not in os.environ, reason="SSL_DATA names no data sets")
def test_real_photographs(tmp_path, capsys):
    directory = os.environ["SSL_DATA"]
    whole = detection.voc_scenes(directory, "trainval")
    assert len(whole) == 120 and "person" in whole.classes
    assert "outside" not in capsys.readouterr().err
    scenes = detection.voc_scenes(directory, "val")
    recipe = small_recipe(image_size=40, steps=2, max_size=80)
    model = detection.train_detector(small_encoder(), scenes, recipe, INPUT, tmp_path / "detect.pt",
                                     CPU, workers=1)
    found = detection.find_all(model, scenes, workers=1)
    assert set(found.image) <= set(range(24))
    rows = detection.voc_rows(found, scenes)
    assert all(0 <= row["AP50"] <= 100 for row in rows)
    detection.draw_detections(scenes, found, tmp_path / "detections.png")
