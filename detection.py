"""What `evaluate.py detect` is made of: scenes, average precision, Faster R-CNN on an encoder.

The protocol is that of MoCo (He et al. 2019, arXiv 1911.05722, section 4.2; detection/configs in
its repository): Faster R-CNN with a C4 backbone, all of it trained, on PASCAL VOC.

Differs from MoCo's detectron2: torchvision's smooth L1 losses (beta 1/9, there 0), initialisation
of the heads and whole-numbered anchors; a match has an IoU of at least the threshold, as in the VOC
kit (there above it). An encoder without a fourth stage to spare gets three new blocks as box head.

Boxes are x0, y0, x1, y1 in pixels from 0, the ends excluded.
"""
import math, os, zipfile, zlib
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.datasets import VOCDetection
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.models.resnet import Bottleneck
from torchvision.ops import box_iou, roi_align

import common
from shapes import CLASSES, draw_shapes

VOC = dict(                             # MoCo, detection/configs
    steps=24000, batch_size=16,
    lr=0.02, warmup=100,                # for the whole batch; steps of linear warm-up
    sizes=tuple(range(480, 801, 32)),   # shorter side: drawn in training, the last in the test
    max_size=1333,                      # longer side at most
    anchors=(32, 64, 128, 256, 512),
    proposals=(12000, 2000, 6000, 1000),    # before and after suppression: training, test
    pool=14, rois=512,                  # side of a pooled box; boxes an image for the box head
    color_drop=0.0,                     # probability of keeping one channel alone (CPC v2)
)
VOC07 = dict(VOC, steps=9000)           # without VOC2012: MoCo, table 4
SHAPES = dict(                          # ours, for two CPU cores
    VOC, steps=150, batch_size=8, warmup=50, sizes=(96,), max_size=96,
    anchors=(12, 16, 20, 26, 34), proposals=(400, 100, 400, 100), pool=7, rois=64,
)
DETECT = {"voc07+12": VOC, "voc07": VOC07, "shapes": SHAPES}
IOUS = [t / 100 for t in range(50, 100, 5)]

def make_recipe(name, image_size=None, **changes):
    """DETECT[name] with those of `changes` that are not None. With `image_size`, the shorter side
    in the test, sizes, anchors and numbers of proposals are scaled to it."""
    recipe = dict(DETECT[name])
    if image_size:
        scale = image_size / recipe["sizes"][-1]
        for key in ("sizes", "anchors", "proposals"):
            recipe[key] = tuple(max(4, round(value * scale)) for value in recipe[key])
        recipe["max_size"] = max(4, round(recipe["max_size"] * scale))
    recipe.update({key: value for key, value in changes.items() if value is not None})
    recipe["warmup"] = min(recipe["warmup"], max(1, recipe["steps"] // 8))
    return recipe

# ------------------------------------------------------------------- scenes

class Scenes:
    """Images with objects, as a data set. images: a Folder or (n, 3, H, W) uint8; for each of the n
    images boxes (k, 4) float32, labels (k,) int64 from 0, difficult (k,) bool."""

    def __init__(self, images, boxes, labels, difficult, classes):
        self.images = images
        self.boxes = boxes
        self.labels = labels
        self.difficult = difficult
        self.classes = classes
        self.in_workers = isinstance(images, common.Folder)
        self.paths = images.paths if self.in_workers else None
        self.broken = set()

    def __len__(self):
        return len(self.images)

    def read(self, i):
        """Image i (3, H, W) uint8, or None if it cannot be read."""
        return self.images.read(i) if self.in_workers else self.images[i]

    def crop(self, indices, crops, *key):
        """The whole images at `indices`, a list of (3, H, W) uint8; then, as `Folder.crop`, the
        indices really used, and those of unreadable images."""
        images = []
        used = indices.clone()
        broken = []
        for k, i in enumerate(indices.tolist()):
            if self.in_workers:
                image, used[k] = self.images.read_next(i, broken)
            else:
                image = self.images[i]
            images.append(image)
        return images, used, broken

def drawn_scenes(count, seed):
    """Scenes of `shapes`, 96 x 96: nine cells of the size that encoders are trained on."""
    images, labels, boxes = map(torch.from_numpy, draw_shapes(count, seed, size=96, cells=3))
    present = [k >= 0 for k in labels]
    boxes = [b[p].float() for b, p in zip(boxes, present)]
    labels = [k[p] for k, p in zip(labels, present)]
    difficult = [torch.zeros(len(k), dtype=torch.bool) for k in labels]
    return Scenes(images, boxes, labels, difficult, CLASSES)

def voc_scenes(directory, part, classes=None, years=(2007, 2012)):
    """The images that DIR/VOCdevkit/VOC<year>/ImageSets/Main/<part>.txt lists, of those `years`
    that have it. `classes`: those of the training set; without them, the names found, sorted.

    Boxes are clipped to their image, and a line says how many. Raises UserError for files that are
    missing or unreadable, for unknown classes, and where nothing is left to find."""
    images = []
    objects = []
    clipped = []
    problems = {}
    for top, name in voc_names(directory, part, years):
        image = top / "JPEGImages" / f"{name}.jpg"
        annotation = top / "Annotations" / f"{name}.xml"
        if not os.path.isfile(image):
            problems.setdefault("images missing", []).append(image)
        try:
            of_image, outside = read_annotation(annotation)
        except FileNotFoundError:
            problems.setdefault("annotations missing", []).append(annotation)
        except Exception as e:                  # a damaged file fails in many ways
            what = f"{annotation} ({common.first_line(e)})"
            problems.setdefault("annotations unreadable", []).append(what)
        else:
            images.append(str(image))
            objects.append(of_image)
            clipped += [annotation] * outside
    if problems:
        said = [f"{what}: {len(files)}, the first {files[0]}" for what, files in problems.items()]
        raise common.UserError(f"{directory}: {'; '.join(said)}")
    if clipped:
        common.say(f"{directory}: boxes of {part} that reach outside their image: {len(clipped)}, "
                   f"the first in {clipped[0]}; they are clipped, or left out if nothing remains")
    if all(difficult for of_image in objects for _, _, difficult in of_image):
        raise common.UserError(f"{directory}: {part} has no object that is not difficult")
    names = sorted({name for of_image in objects for name, _, _ in of_image})
    classes = classes or names
    unknown = [name for name in names if name not in classes]
    if unknown:
        raise common.UserError(f"{directory}: {part} has classes that the training set does not "
                               f"have: {', '.join(unknown)}")
    scenes = Scenes(common.Folder(images, None), [], [], [], classes)
    for of_image in objects:
        labels = [classes.index(name) for name, _, _ in of_image]
        scenes.labels.append(torch.tensor(labels, dtype=torch.int64))
        scenes.boxes.append(torch.tensor([box for _, box, _ in of_image]).reshape(-1, 4))
        scenes.difficult.append(torch.tensor([d for _, _, d in of_image], dtype=torch.bool))
    return scenes

def voc_names(directory, part, years):
    """The images of the set `part`: [(folder of the year, name)]."""
    tops = [Path(directory, "VOCdevkit", f"VOC{year}") for year in years]
    files = [top / "ImageSets" / "Main" / f"{part}.txt" for top in tops]
    if not any(map(os.path.isfile, files)):
        raise common.UserError(f"{directory}: no set {part}; expected {files[0]}")
    names = []
    for top, file in zip(tops, files):
        if os.path.exists(file) and not os.path.isfile(file):
            raise common.UserError(f"{file}: a pipe or a folder, not a file")
        try:
            listed = file.read_text(encoding="utf-8").split() if os.path.isfile(file) else []
        except UnicodeDecodeError:
            raise common.UserError(f"{file}: not UTF-8, so no list of image names") from None
        names += [(top, name) for name in listed]
    if not names:
        raise common.UserError(f"{directory}: set {part} is empty")
    return names

def read_annotation(file):
    """The objects in an annotation of VOC, [(name, box as a list, whether it is difficult)], and
    the number of boxes that had to be clipped. Raises an exception if it is damaged."""
    if file.is_fifo():
        raise ValueError("a pipe, not a file")
    annotation = VOCDetection.parse_voc_xml(ElementTree.parse(file).getroot())["annotation"]
    width = float(annotation["size"]["width"])
    height = float(annotation["size"]["height"])
    if not min(width, height) >= 1:
        raise ValueError(f"an image of {width} x {height}")
    objects = []
    outside = 0
    for entry in annotation["object"]:
        if not entry["name"].strip():
            raise ValueError("an object without a name")
        x0, y0, x1, y1 = (float(entry["bndbox"][k]) for k in ("xmin", "ymin", "xmax", "ymax"))
        whole = [x0 - 1, y0 - 1, x1, y1]                        # VOC counts pixels from 1
        box = [max(x0 - 1, 0.0), max(y0 - 1, 0.0), min(x1, width), min(y1, height)]
        inside = box[0] < box[2] and box[1] < box[3]
        if inside:
            objects.append((entry["name"], box, entry.get("difficult") == "1"))
        outside += box != whole or not inside
    return objects, outside

# ------------------------------------------------------------------- average precision

class Detections(NamedTuple):
    """What was found in a data set, numpy, the images in order."""
    image: np.ndarray       # (M,) int64, index of the image
    label: np.ndarray       # (M,) int64
    score: np.ndarray       # (M,) float64
    box: np.ndarray         # (M, 4) float64

def voc_recall_precision(image, score, box, true_image, true_box, difficult, thresholds):
    """VOCevaldet.m for one class. Detections: image (M,), score (M,), box (M, 4); true boxes, at
    least one: image (K,), box (K, 4), difficult (K,) bool; all numpy.

    In order of falling score, ties as given, a detection is matched to the true box that it
    overlaps most, if their IoU is at least the threshold. It is correct if it is the first one
    matched to that box, and wrong if it is a later one, or unmatched. Those matched to a difficult
    box count neither way. Returns recall and precision (M,) float64 for each of `thresholds`."""
    ranked = np.argsort(-score, kind="stable")
    image = image[ranked]
    box = torch.from_numpy(box[ranked]).double()
    true_box = torch.from_numpy(true_box).double()
    best_iou = np.zeros(len(image))
    best_truth = np.zeros(len(image), np.int64)         # the true box with that IoU
    for i in np.unique(true_image):
        detections = np.flatnonzero(image == i)
        truths = np.flatnonzero(true_image == i)
        if len(detections):
            iou = box_iou(box[detections], true_box[truths]).numpy()
            best_iou[detections] = iou.max(1)
            best_truth[detections] = truths[iou.argmax(1)]

    curves = []
    for threshold in thresholds:
        matched = best_iou >= threshold
        ignored = matched & difficult[best_truth]
        candidates = np.flatnonzero(matched & ~ignored)
        _, first = np.unique(best_truth[candidates], return_index=True)     # one for each true box
        correct = np.zeros(len(image))
        correct[candidates[first]] = 1
        num_correct = correct.cumsum()
        num_counted = (~ignored).cumsum()
        curves.append((num_correct / (~difficult).sum(), num_correct / np.maximum(num_counted, 1)))
    return curves

def voc_average_precision(recall, precision, eleven_point):
    """Average precision in 0..1 (VOCap.m). recall, precision (M,) by falling score.

    `eleven_point`, VOC2007: the mean over r = 0, 0.1 ... 1 of the best precision at a recall of r
    or more. Otherwise, since VOC2010: the area under the precision made to fall with recall. r is
    k / 10 to the last bit (the kit's 3 * 0.1 misses a recall of exactly 0.3), and recall has to be
    float64 for the same reason: ValueError for float32, in which 0.7 lies below 7 / 10."""
    recall = np.asarray(recall)
    precision = np.asarray(precision, np.float64)
    if recall.dtype.kind == "f" and recall.itemsize < 8:
        raise ValueError(f"recall is {recall.dtype}, which misses levels of recall; use float64")
    if eleven_point:
        best = [precision[recall >= k / 10].max(initial=0) for k in range(11)]
        return float(sum(best) / 11)
    recall = np.concatenate([[0], recall, [1]])
    precision = np.concatenate([precision, [0]])
    envelope = np.maximum.accumulate(precision[::-1])[::-1]     # the best at this recall or more
    return float((np.diff(recall) * envelope).sum())

def voc_rows(found, scenes):
    """A dict for each class that has an object which is not difficult: AP50, AP75 and AP, the mean
    over IOUS, in percent by eleven points, and the same by all points with the suffix "_all"."""
    image = np.repeat(np.arange(len(scenes)), [len(b) for b in scenes.boxes])
    label = torch.cat(scenes.labels).numpy()
    box = torch.cat(scenes.boxes).numpy()
    difficult = torch.cat(scenes.difficult).numpy()
    rows = []
    for k, name in enumerate(scenes.classes):
        of_class = label == k
        if not (of_class & ~difficult).any():
            common.say(f"{name} is not in the test set, and left out of the means")
            continue
        detected = found.label == k
        curves = voc_recall_precision(
            found.image[detected], found.score[detected], found.box[detected],
            image[of_class], box[of_class], difficult[of_class], IOUS)
        row = {"class": name}
        for suffix, eleven_point in (("", True), ("_all", False)):
            points = [100 * voc_average_precision(*curve, eleven_point) for curve in curves]
            row[f"AP{suffix}"] = float(np.mean(points))
            row[f"AP50{suffix}"] = points[IOUS.index(0.5)]
            row[f"AP75{suffix}"] = points[IOUS.index(0.75)]
        rows.append(row)
    return rows

# ------------------------------------------------------------------- Faster R-CNN

class Trunk(nn.Module):
    """The encoder's maps, in which objects are found: (N, 3, H, W) -> (N, C, h, w) float32. Boxes
    get their type from the maps, and bfloat16 has steps of 4 pixels at 1000."""

    def __init__(self, encoder, bf16):
        super().__init__()
        self.encoder = encoder
        self.bf16 = bf16
        with torch.no_grad():
            maps = encoder.eval().maps(torch.zeros(1, 3, 64, 64))
        self.out_channels = maps.shape[1]
        self.stride = 64 // maps.shape[3]

    def forward(self, x):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            maps = self.encoder.maps(x)
        return maps.float()

class RoIPool(nn.Module):
    """detectron2's RoIAlign: the map (N, C, h, w) and a list of boxes (k, 4) in pixels for each
    image -> (K, C, size, size). "Aligned" means shifted by half a pixel of the map."""

    def __init__(self, size, stride):
        super().__init__()
        self.size = size
        self.stride = stride

    def forward(self, maps, boxes, image_sizes):
        return roi_align(maps["0"], boxes, self.size, 1 / self.stride, 0, aligned=True)

class BoxHead(nn.Module):
    """A ResNet's last stage and MoCo's extra norm: (K, C, size, size) -> (K, dim) float32."""

    def __init__(self, stage, dim, bf16):
        super().__init__()
        self.stage = stage
        self.extra_norm = nn.BatchNorm2d(dim)
        self.bf16 = bf16

    def forward(self, x):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            x = self.extra_norm(self.stage(x))
        return x.float().mean((2, 3))

def new_stage(channels, dim):
    """Three bottleneck blocks of stride 2: (K, channels, size, size) -> (K, dim, ...)."""
    shortcut = nn.Sequential(nn.Conv2d(channels, dim, 1, 2, bias=False), nn.BatchNorm2d(dim))
    return nn.Sequential(Bottleneck(channels, dim // 4, 2, shortcut),
                         Bottleneck(dim, dim // 4), Bottleneck(dim, dim // 4))

def detector(encoder, recipe, num_classes, input, device, precision="fp32"):
    """Faster R-CNN with a C4 backbone, all of it trained. In training mode, in which it is: lists
    of images (3, H, W) in 0..1 and of targets, dict(boxes (k, 4), labels (k,) from 1) -> a dict of
    losses. In eval mode: images -> a list of dicts of boxes, labels and scores (k,).

    The box head is the fourth stage of a `common.ResNet`, which `encoder` loses; other encoders are
    the trunk as a whole, and the head is new. `input`: mean and std as in a checkpoint. With
    `precision` "bf16" trunk and box head compute in bfloat16; boxes and scores are float32.

    The images of a batch are padded with zeros to one size, over which a layer norm averages. So it
    is in training; `find_all` gives one image at a time, padded to a multiple of the stride."""
    # Channels-last networks have crashed here on CPUs.
    encoder = encoder.to("cpu", memory_format=torch.contiguous_format).requires_grad_(True)
    if isinstance(encoder, common.ResNet):
        dim = encoder.dim
        stage = encoder.layer4
        encoder.layer4 = nn.Identity()
    else:
        dim = encoder.dim // 4 * 4
        stage = new_stage(encoder.dim, dim)
    trunk = Trunk(encoder, precision == "bf16")
    before, after, before_test, after_test = recipe["proposals"]
    model = FasterRCNN(
        trunk, min_size=recipe["sizes"], max_size=recipe["max_size"], size_divisible=trunk.stride,
        image_mean=input["mean"], image_std=input["std"],
        rpn_anchor_generator=AnchorGenerator((recipe["anchors"],), ((0.5, 1.0, 2.0),)),
        rpn_pre_nms_top_n_train=before, rpn_post_nms_top_n_train=after,
        rpn_pre_nms_top_n_test=before_test, rpn_post_nms_top_n_test=after_test,
        box_head=BoxHead(stage, dim, precision == "bf16"),
        box_predictor=FastRCNNPredictor(dim, num_classes + 1),      # and the background
        box_batch_size_per_image=recipe["rois"], box_positive_fraction=0.25,
        box_score_thresh=0.05, box_nms_thresh=0.5, box_detections_per_img=100)
    model.roi_heads.box_roi_pool = RoIPool(recipe["pool"], trunk.stride)
    return model.to(device).train()

# ------------------------------------------------------------------- training and test

def augment(image, boxes, color_drop=0.0):
    """(3, H, W) and its boxes (k, 4), mirrored left and right with probability 0.5. With
    probability `color_drop` one channel takes the place of all three (CPC v2)."""
    if torch.rand(()) < 0.5:
        x0, y0, x1, y1 = boxes.unbind(1)
        width = image.shape[2]
        image = image.flip(2)
        boxes = torch.stack([width - x1, y0, width - x0, y1], 1)
    if torch.rand(()) < color_drop:
        channel = torch.randint(3, ()).item()
        image = image[channel].expand(3, -1, -1)
    return image, boxes

def augmented(scenes, images, indices, color_drop=0.0):
    """What the detector learns from: views and targets of `images`, which are those at `indices`.
    It learns difficult objects too, as detectron2's does."""
    views = []
    targets = []
    for image, i in zip(images, indices.tolist()):
        view, boxes = augment(image, scenes.boxes[i].to(image.device), color_drop)
        views.append(view)
        targets.append(dict(boxes=boxes, labels=scenes.labels[i].to(image.device) + 1))
    return views, targets

def learning_rate(step, warmup, total):
    """As a fraction of the peak: a linear warm-up from 1/1000, then a tenth from 18/24 of the run
    on, and a hundredth from 22/24 on."""
    warm = min(1, 0.001 + 0.999 * step / warmup)
    drops = (24 * step >= 18 * total) + (24 * step >= 22 * total)
    return warm * 0.1 ** drops

def train_detector(encoder, scenes, recipe, input, state, device, seed=0, precision="fp32",
                   workers=0, save_every=100):
    """Train a detector on `scenes` and return it. Its state is saved in the file `state` every
    `save_every` steps, at the end and after a signal, and a run that finds it there resumes.

    Raises UserError if the state is of other settings or the loss is not finite, Stopped after a
    signal."""
    objects = [*scenes.boxes, *scenes.labels]
    settings = dict(recipe, seed=seed, precision=precision, images=len(scenes),
                    encoder=checksum(encoder.state_dict().values()), objects=checksum(objects))
    batches = common.Batches(scenes, [], recipe["batch_size"], seed)
    torch.manual_seed(seed)
    model = detector(encoder, recipe, len(scenes.classes), input, device, precision)
    if common.WORLD_SIZE > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    network = common.distribute(model, compiled=False)
    norms = [m for m in model.modules() if isinstance(m, (_BatchNorm, nn.GroupNorm))]
    norm_weights = [p for norm in norms for p in norm.parameters()]
    of_norms = set(norm_weights)
    others = [p for p in model.parameters() if p not in of_norms]
    optimizer = torch.optim.SGD([dict(params=others, weight_decay=1e-4),
                                 dict(params=norm_weights, weight_decay=0)], momentum=0.9)
    total = recipe["steps"]
    first = resume(state, settings, model, optimizer)

    losses = []
    steps = range(first, total)
    for step, batch in zip(steps, common.stream(batches, steps, workers, device)):
        images, indices, broken = batch
        common.Stopped.at_once = False          # a signal waits for the end of the step
        flags = torch.tensor([common.Stopped.asked is not None, len(broken)], dtype=torch.int32)
        if common.WORLD_SIZE > 1:
            dist.all_reduce(flags)
        stop, any_broken = flags.tolist()
        if any_broken:
            common.note_broken(scenes, broken)
        common.seed_all(seed, step, common.RANK, 1)
        for group in optimizer.param_groups:
            group["lr"] = recipe["lr"] * learning_rate(step, recipe["warmup"], total)

        views, targets = augmented(scenes, images, indices, recipe["color_drop"])
        loss = sum(network(views, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        done = step + 1
        losses.append(loss.detach())
        if done % max(1, total // 10) == 0:
            mean = torch.stack(losses).mean().item()
            common.say(f"step {done}/{total}  loss {mean:.4f}")
            losses.clear()
        if stop or done == total or done % save_every == 0:
            save(state, settings, done, model, optimizer)
        if stop and done < total:
            raise common.Stopped(f"stopped after step {done} of {total}; the same command resumes "
                                 f"from {state}")
    common.Stopped.at_once = True
    precise_norms(model, batches, min(200, total), workers)
    return model

def checksum(tensors):
    """A number that tells one list of tensors from another."""
    crc = 0
    for tensor in tensors:
        crc = zlib.crc32(tensor.cpu().contiguous().numpy(), crc)
    return crc

def save(path, settings, step, model, optimizer):
    """Save the state after `step` steps, from one process; raises UserError if it is no good."""
    weights = [v for v in model.state_dict().values() if v.is_floating_point()]
    if not torch.stack(torch._foreach_norm(weights, math.inf)).isfinite().all():
        raise common.UserError(f"a weight is not finite after step {step}; try a lower --lr")
    if common.RANK == 0:
        state = dict(settings=settings, step=step, model=model.state_dict(),
                     optimizer=optimizer.state_dict())
        common.write_atomically(path, lambda file: torch.save(state, file))

def resume(path, settings, model, optimizer):
    """Load the state at `path` if there is one; returns the number of steps done."""
    if not os.path.exists(path):
        return 0
    try:
        if not os.path.isfile(path):
            raise ValueError("a pipe or a folder, not a file")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        differing = [f"{key} {saved['settings'].get(key)} (now {value})"
                     for key, value in settings.items() if saved["settings"].get(key) != value]
        if zipfile.ZipFile(path).testzip():     # torch.load does not look at the checksums
            raise ValueError("a checksum is wrong")
        if not differing:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            step = int(saved["step"])
            if not 0 <= step <= settings["steps"]:
                raise ValueError(f"its step is {step} of {settings['steps']}")
            if not all(w.isfinite().all() for w in model.state_dict().values()):
                raise ValueError("a weight is not finite")
    except Exception as e:                      # torch raises half a dozen kinds
        why = common.first_line(e).split(". In PyTorch")[0]     # torch advises what is unsafe
        raise common.UserError(f"{path}: not a state of this detector ({why}); give another "
                               "--output") from None
    if differing:
        raise common.UserError(f"{path}: made with other settings: {', '.join(differing)}; use the "
                               "same or give another --output")
    common.say(f"resuming after step {step} of {settings['steps']} in {path}")
    return step

@torch.no_grad()
def precise_norms(model, batches, count, workers=0):
    """Give BatchNorm the statistics of the final weights: the mean over the first `count` batches
    of training (Precise-BN)."""
    model.train()
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            norm.reset_running_stats()
            norm.momentum = None                # the mean of all batches
    device = next(model.parameters()).device
    steps = range(count)
    for step, batch in zip(steps, common.stream(batches, steps, workers, device)):
        images, indices, _ = batch
        common.seed_all(batches.seed, step, common.RANK, 6)
        model(*augmented(batches.data, images, indices))
    for buffer in model.buffers() if common.WORLD_SIZE > 1 else ():
        dist.broadcast(buffer, 0)               # on CPUs each process has its own

@torch.no_grad()
def find_all(model, scenes, workers=0):
    """The Detections in all images, one image at a time, see `detector`. Processes share them."""
    model.eval()
    device = next(model.parameters()).device
    one_by_one = common.InOrder(scenes, [], size=1)
    rows = {}
    steps = range(len(one_by_one))
    for images, indices, broken in common.stream(one_by_one, steps, workers, device):
        common.note_broken(scenes, broken)
        found, = model(images)
        columns = [found["labels"][:, None] - 1, found["scores"][:, None], found["boxes"]]
        rows[indices.item()] = torch.cat(columns, 1).cpu()              # (m, 6)
    rows = {i: r for part in common.gather_objects(rows) for i, r in part.items()}
    image = np.repeat(sorted(rows), [len(rows[i]) for i in sorted(rows)])
    table = torch.cat([rows[i] for i in sorted(rows)]).double().numpy()
    return Detections(image, table[:, 0].astype(np.int64), table[:, 1], table[:, 2:])

def draw_detections(scenes, found, path):
    """The first eight images with their true boxes and the detections, by class, as a PNG."""
    plt = common.pyplot()
    colors = plt.get_cmap("tab10" if len(scenes.classes) <= 10 else "tab20")
    figure, axes = plt.subplots(2, 4, figsize=(12, 6), layout="constrained")

    def draw_box(ax, box, color, style):
        x0, y0, x1, y1 = box - 0.5                              # matplotlib: the middle of pixels
        ax.add_patch(plt.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color,
                                   linestyle=style, linewidth=1.5))

    for i, ax in enumerate(axes.flat):
        ax.axis("off")
        image = scenes.read(i) if i < len(scenes) else None
        if image is None:
            continue
        ax.imshow(image.permute(1, 2, 0).numpy())
        for box in scenes.boxes[i].numpy():
            draw_box(ax, box, "white", "--")
        for k in np.flatnonzero((found.image == i) & (found.score >= 0.3)):
            color = colors(found.label[k] % 20)
            draw_box(ax, found.box[k], color, "-")
            text = f"{scenes.classes[found.label[k]]} {found.score[k]:.2f}"
            ax.text(*found.box[k, :2], text, fontsize=7, color="white", va="bottom",
                    bbox=dict(facecolor=color, linewidth=0, pad=0.5))
    figure.suptitle("dashed: true boxes; coloured: detections with a score of 0.3 or more")
    common.save_picture(figure, path)
