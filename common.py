"""What the method scripts share.

1. Data loading      `load_data`, `Batches`
2. Augmentation      `Crop`, and operations on a whole batch: `color_jitter`, `gaussian_blur`, ...
3. ResNets           `resnet`
4. LARS              `LARS`
5. Bookkeeping       processes, flags, checkpoints, `Run`, kNN accuracy: skip it on a first reading

Images are (N, 3, H, W): uint8 as loaded, float32 in 0..1 once cropped.
"""
import argparse, ast, contextlib, fcntl, functools, hashlib, io, json, math, os, re, signal, sys
import time, traceback, warnings, zipfile
from pathlib import Path
from typing import NamedTuple

BUSY = os.getloadavg()[0] > 0.7     # other programs ran in the last minute
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
MAIN = Path(getattr(sys.modules["__main__"], "__file__", "notebook.py")).resolve()
if MAIN.parent == Path(__file__).resolve().parent:      # a script of ours, not a notebook
    def stop_early(number, _):                          # while torch is imported
        os.write(2, f"stopped by {signal.Signals(number).name}; nothing was saved\n".encode())
        os._exit(130 if number == signal.SIGINT else 0)

    for s in SIGNALS[:1] if MAIN.stem in ("evaluate", "transfer", "experiments") else SIGNALS:
        signal.signal(s, stop_early)
    if BUSY:                        # threads that wait by spinning are slow beside other programs
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torchvision.io import decode_jpeg, read_file
from torchvision.models.resnet import BasicBlock, Bottleneck

from shapes import CLASSES, draw_shapes

for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
    if not os.environ.get(name, "0").isdecimal():
        print(f"{MAIN.name}: error: {name}={os.environ[name]!r}: no whole number", file=sys.stderr)
        sys.exit(2)
RANK = int(os.environ.get("RANK", 0))                   # torchrun sets them
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))       # on this machine

# ============================================================================== 1. Data loading

class Images:
    """A data set in memory: `images` (n, 3, H, W) uint8 on the training device, `labels` (n,) int64
    on the CPU, or None where there are none, and the names of the `classes`."""
    in_workers = False

    def __init__(self, images, labels, device, classes=None):
        self.images = torch.as_tensor(images).to(device)
        self.labels = None if labels is None else torch.as_tensor(labels, dtype=torch.int64)
        self.classes = classes

    def __len__(self):
        return len(self.images)

    def crop(self, indices, crops, *key):
        """Random crops of the images at `indices` (n,), a function of `key` and the rank: a list of
        views (n, 3, size, size) float32 in 0..1, the indices, and those of unreadable images."""
        seed_all(*key, RANK)
        images = self.images.index_select(0, indices.to(self.images.device, non_blocking=True))
        views = [view for crop in crops for view in crop_and_resize(images, crop)]
        return views, indices, []

class Folder:
    """A data set of image files, decoded and cropped in worker processes."""
    in_workers = True
    SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

    def __init__(self, paths, labels, classes=None):
        self.paths = np.array(paths)                # an array, whose memory the workers share
        self.labels = None if labels is None else torch.as_tensor(labels, dtype=torch.int64)
        self.classes = classes
        self.broken = set()

    def __len__(self):
        return len(self.paths)

    def crop(self, indices, crops, *key):
        """As `Images.crop`, but uint8, and a function of `key` and each image. An image that cannot
        be read is replaced by the next one that can: the indices are those really used."""
        views = []                                  # of each image a list
        used = []
        broken = []
        for i in indices.tolist():
            image, i = self.read_next(i, broken)
            seed_all(*key, i)
            views.append([view for crop in crops for view in crop_one(image, crop)])
            used.append(i)
        return [torch.stack(batch) for batch in zip(*views)], torch.tensor(used), broken

    def read_next(self, i, broken):
        """Image i, or the next one that can be read, and its index; adds the others to `broken`."""
        image = self.read(i)
        while image is None and len(broken) < 10 + len(self) // 100:    # more end the run
            broken.append(i)
            i = (i + 1) % len(self)
            image = self.read(i)
        return torch.zeros(3, 64, 64, dtype=torch.uint8) if image is None else image, i

    def read(self, i):
        """Image i as (3, H, W) uint8 RGB, or None if it cannot be read."""
        path = str(self.paths[i])
        try:
            if path.lower().endswith(("jpg", "jpeg")):
                with warnings.catch_warnings(), contextlib.suppress(RuntimeError):
                    warnings.simplefilter("ignore")     # deprecated, but 1.5 times Pillow's speed
                    return decode_jpeg(read_file(path), mode="RGB", apply_exif_orientation=True)
            with Image.open(path) as image:
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I;16"):       # 16-bit grey, which Pillow clips to white
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        except Exception:                               # a broken file fails in many ways
            return None

DATA = ["shapes", "cifar10", "stl10", "cifar100"]           # all but the first are torchvision's

@functools.lru_cache(maxsize=8)
def load_data(name, root="data", split="train", device="cpu"):
    """The data set `name`, an `Images`, or a directory of train/<class>/* and val/<class>/*, a
    `Folder`. `split` is "train" or "val", with labels, or "pretrain": "train", of stl10 with its
    unlabelled images, of a directory without class folders all images below it. torchvision's sets
    lie in `root`, or are downloaded there. Raises UserError."""
    if split == "pretrain" and name != "stl10" and has_labels(name):
        return load_data(name, root, "train", device)
    if name == "shapes":
        images, labels, _ = draw_shapes(*((2000, 2) if split == "val" else (5000, 1)))
        return Images(images, labels[:, 0], device, CLASSES)
    if name not in DATA:
        return load_folder(name, split)
    data_set = getattr(torchvision.datasets, name.upper())
    part = dict(train=split != "val")
    if name == "stl10":
        part = dict(split=dict(pretrain="train+unlabeled", train="train", val="test")[split])
    if LOCAL_RANK > 0:
        dist.barrier()                          # the first process of a machine downloads
    where = Path(root, data_set.base_folder)
    missing = not where.exists()
    try:
        data = data_set(root, download=missing, **part)
    except Exception as e:                      # torchvision and pickle raise many kinds
        what = "not found, and could not be downloaded" if missing else "damaged or incomplete"
        raise UserError(f"--data {name}: {what}: {where} in --root ({first_line(e)})") from None
    if LOCAL_RANK == 0 and dist.is_initialized():
        dist.barrier()
    if name == "stl10":
        return Images(data.data, data.labels, device, data.classes)
    return Images(data.data.transpose(0, 3, 1, 2), data.targets, device, data.classes)

@functools.lru_cache(maxsize=8)
def load_folder(directory, split):
    """The images of a directory, as `load_data` says."""
    top = Path(directory)
    part = top / ("val" if split == "val" else "train")
    classes = class_folders(top / "train")
    unlabelled = split == "pretrain" and not classes
    if unlabelled and not part.is_dir():
        part = top
    hint = f"; was it --data {top.parent}?" if top.name in ("train", "val") else ""
    unknown = set(class_folders(part)) - set(classes)
    if unknown and not unlabelled:
        raise UserError(f"--data {directory}: {part / min(unknown)} is not in {top / 'train'}")
    seen = set()
    files = [image_files(part / name, seen) for name in ([""] if unlabelled else classes)]
    paths = [path for of_class in files for path in of_class]
    labels = [label for label, of_class in enumerate(files) for _ in of_class]
    if not paths:
        where = part if unlabelled else part / "<class>"
        what = "images" if unlabelled or classes else "class folders, and so no labels"
        raise UserError(f"--data {directory}: no {what}; expected some in {where}{hint}")
    if unlabelled:
        if class_folders(part) and not hint:
            hint = f"; for labels, move the folders of {part} into {top}/train and {top}/val"
        say(f"{directory}: no folders train/<class>, so these are images without labels{hint}")
    elif split == "pretrain" and not class_folders(top / "val"):
        say(f"{directory}: no folders val/<class>, so there is no kNN accuracy")
    return Folder(paths, None if unlabelled else labels, classes or None)

def class_folders(part):
    """The names of the folders in `part`, sorted."""
    entries = os.scandir(part) if os.path.isdir(part) else ()
    return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))

def image_files(folder, seen):
    """The image files below `folder`, sorted. Every file and folder counts once, under its real
    path, which is added to `seen`: a link can neither loop nor multiply images."""
    if not os.path.isdir(folder) or os.path.exists(f"{folder}/log.jsonl"):  # a run's pictures
        return []
    real = os.path.realpath(folder)
    if real in seen:
        say(f"{folder}: a link to {real}, which has been read already; left out")
        return []
    seen.add(real)
    found = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            found += image_files(entry.path, seen)
        elif entry.is_file() and os.path.splitext(entry.name)[1].lower() in Folder.SUFFIXES:
            file = os.path.realpath(entry.path) if entry.is_symlink() else f"{real}/{entry.name}"
            found += [entry.path] if file not in seen else []
            seen.add(file)
    return found

def has_labels(name):
    """Whether "train" and "val" exist: everywhere but in directories without class folders."""
    top = Path(name)
    return name in DATA or bool(class_folders(top / "train") and class_folders(top / "val"))

def seed_all(*key):
    """Seed torch's generators from whole numbers of at least 0."""
    number = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(number)         # 100 times faster than torch.manual_seed
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(number)

class Batches:
    """The batches of a run: `batches[step]`, what `Images.crop` returns, is a pure function of
    (seed, step, rank). Every epoch, `len(batches)` steps, is a new permutation of the images, cut
    into whole global batches of `batch_size`, of which each process takes its slice."""

    def __init__(self, data, crops, batch_size, seed):
        if not 2 * WORLD_SIZE <= batch_size <= len(data) or batch_size % WORLD_SIZE:
            fits = min(batch_size, 2 ** int(math.log2(len(data) / 4 + 1)))
            fits = max(2, fits // WORLD_SIZE) * WORLD_SIZE
            hint = f"; --batch-size {fits} fits" if fits <= len(data) else ""
            raise UserError(f"--batch-size {batch_size}: needs at least 2 images for each of "
                            f"{WORLD_SIZE} processes, as many for each, and at most the "
                            f"{len(data)} that there are{hint}")
        self.data = data
        self.crops = crops
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = None

    def __len__(self):
        return len(self.data) // self.batch_size

    def indices(self, step):
        """(N,) which images this process has in `step`."""
        epoch, position = divmod(step, len(self))
        if epoch != self.epoch:
            self.epoch = epoch
            permutation = np.random.default_rng([self.seed, epoch]).permutation(len(self.data))
            self.order = torch.from_numpy(permutation)
        n = self.batch_size // WORLD_SIZE
        first = position * self.batch_size + RANK * n
        return self.order[first:first + n]

    def __getitem__(self, step):
        return self.data.crop(self.indices(step), self.crops, self.seed, step)

class InOrder:
    """All images in order, `size` at once, for evaluation. Each process has a share of the same
    size: where the images do not divide evenly, the last one repeats the first images."""

    def __init__(self, data, crops, size=256):
        self.data = data
        self.crops = crops
        share = math.ceil(len(data) / WORLD_SIZE)
        self.pieces = (RANK * share + torch.arange(share)).remainder(len(data)).split(size)

    def __len__(self):
        return len(self.pieces)

    def __getitem__(self, i):
        return self.data.crop(self.pieces[i], self.crops, 0)

def stream(batches, steps, workers, device):
    """Yield `batches[step]` for each of `steps`, the crops as float32 in 0..1 on `device`."""
    workers = workers if batches.data.in_workers else 0
    loader = torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=steps, num_workers=workers,
        pin_memory=workers > 0 and device.type == "cuda", worker_init_fn=_start_worker)
    with Stopped.postponed():
        iterator = iter(loader)
    try:
        Stopped.if_asked()
        for views, indices, broken in iterator:
            views = [view.to(device, non_blocking=True) for view in views]
            yield [v.float() / 255 if v.dtype == torch.uint8 else v for v in views], indices, broken
    finally:
        with Stopped.postponed():
            del iterator            # its workers end

def _start_worker(_):
    if Run.lock is not None:        # a lock lasts while any process has it
        os.close(Run.lock)

def note_broken(data, broken):
    """Name each of the images `broken`, indices of this process, once. All processes call it
    together. Raises UserError when more than one and more than 1 % are broken."""
    for i in sum(gather_objects(broken), []):
        if i not in data.broken:
            data.broken.add(i)
            say(f"cannot read {data.paths[i]}: another is used ({len(data.broken)} broken so far)")
        if len(data.broken) > max(1, 0.01 * len(data)):
            raise UserError(f"{len(data.broken)} of {len(data)} images cannot be read, more than "
                            f"1 %; the last is {data.paths[i]}")

# ============================================================================== 2. Augmentation

class Crop(NamedTuple):
    """`count` random crops of each image, resized to `size` x `size`, drawn as torchvision's
    RandomResizedCrop draws them: the area as a fraction of the image uniform in `scale`, the aspect
    ratio log-uniform in `ratio`; ten tries, then the largest central crop. Each is mirrored left
    and right with probability `flip`, which costs nothing here."""
    count: int
    size: int
    scale: tuple = (0.08, 1.0)
    ratio: tuple = (3 / 4, 4 / 3)
    interpolation: str = "bilinear"
    flip: float = 0.0

    def boxes(self, n, height, width):
        """n boxes (n, 4) as top, left, height, width: float32 that hold whole numbers."""
        u = torch.rand(n, 22).numpy()           # numpy is faster for the one image of a worker
        low, high = self.scale
        area = height * width * (low + (high - low) * u[:, :10])
        low, high = np.log(self.ratio, dtype=np.float32)
        ratio = np.exp(low + (high - low) * u[:, 10:20])
        w = np.rint(np.sqrt(area * ratio))
        h = np.rint(np.sqrt(area / ratio))                              # (n, 10)
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        first = np.arange(n), fits.argmax(1)    # the first of the ten tries that fits
        w = w[first]
        h = h[first]
        top = np.floor(u[:, 20] * (height - h + 1))
        left = np.floor(u[:, 21] * (width - w + 1))
        boxes = np.stack([top, left, h, w], 1)
        w = min(width, round(height * self.ratio[1]))
        h = min(height, round(width / self.ratio[0]))
        boxes[~fits[first]] = (height - h) // 2, (width - w) // 2, h, w
        return torch.from_numpy(boxes)

class CenterCrop(NamedTuple):
    """The test crop: the central square of `fraction` of the shorter side, resized to `size` x
    `size` (0.875 and 224: resized to 256, of which the central 224). For a `size` of up to 32 the
    whole central square is taken, as in SimCLR's official code."""
    size: int
    fraction: float = 0.875
    interpolation: str = "bilinear"
    count: int = 1
    flip: float = 0.0

    def boxes(self, n, height, width):
        side = round(min(height, width) * (1 if self.size <= 32 else self.fraction))
        box = [(height - side) // 2, (width - side) // 2, side, side]
        return torch.tensor([box], dtype=torch.float32).expand(n, 4)

def resize_weights(start, length, source, size, interpolation):
    """(n, size, source) weights that resample the `length` pixels from `start`, both (n,), of
    `source` to `size`, antialiased. A negative length runs backwards, which mirrors. The filters
    are Pillow's, a triangle or Keys' cubic (a = -1/2), as wide as the larger of both pixels."""
    step = (length / size)[:, None]                                     # (n, 1)
    end = start + length
    target = torch.arange(size, device=start.device) + 0.5
    centre = start[:, None] + target * step                             # (n, size)
    pixel = torch.arange(source, device=start.device) + 0.5
    outside = (pixel - start[:, None]) * (pixel - end[:, None]) > 0
    width = step.abs().clamp(min=1)
    pixel = pixel.masked_fill(outside, 1e6) / width                     # far from every target
    d = (pixel[:, None] - (centre / width)[:, :, None]).abs_()          # (n, size, source)
    if interpolation == "bilinear":
        weights = torch.sub(1, d, out=d).clamp_(min=0)
    else:
        near = (1.5 * d - 2.5) * d * d + 1
        far = ((-0.5 * d + 2.5) * d - 4) * d + 2
        weights = torch.where(d < 1, near, far).mul_(d < 2)
    return weights.div_(weights.sum(-1, keepdim=True))

def resample(x, rows, columns, out=None):
    """rows @ x @ columns^T for each channel: (N, 3, H, W), (N, h, H), (N, w, W) -> (N, 3, h, w).
    Crop, resize, flip and blur are all of this form."""
    y = (x.flatten(1, 2) @ columns.mT).unflatten(1, x.shape[1:3])       # (N, 3, H, w)
    return torch.matmul(rows[:, None], y, out=out)

def crop_and_resize(images, crop):
    """(N, 3, H, W) uint8, or float in 0..1 -> (count, N, 3, size, size) float32 in 0..1."""
    n, channels, height, width = images.shape
    scale = 255 if images.dtype == torch.uint8 else 1
    if isinstance(crop, CenterCrop) and height == width == crop.size <= 32:
        return images[None].float() / scale         # nothing to resize
    top, left, h, w = crop.boxes(crop.count * n, height, width).unbind(1)
    mirror = (torch.rand(crop.count * n) < crop.flip).float()
    boxes = torch.stack([top, left + mirror * w, h, w - 2 * mirror * w])
    boxes = boxes.view(4, crop.count, n).to(images.device, non_blocking=True)
    views = torch.empty(crop.count, n, channels, crop.size, crop.size, device=images.device)
    for part in chunks(images):
        x = images[part].float() / scale
        top, left, h, w = boxes[:, :, part].flatten(1)
        rows = resize_weights(top, h, height, crop.size, crop.interpolation)
        columns = resize_weights(left, w, width, crop.size, crop.interpolation)
        for view, r, c in zip(views, rows.chunk(crop.count), columns.chunk(crop.count)):
            resample(x, r, c, out=view[part])
    return views.clamp_(0, 1) if crop.interpolation != "bilinear" else views

def crop_one(image, crop):
    """The crops of one image, (3, H, W) uint8 -> `count` of (3, size, size) uint8, in a worker."""
    views = []
    for top, left, height, width in crop.boxes(crop.count, *image.shape[1:]).int().tolist():
        box = image[None, :, top:top + height, left:left + width]
        box = box.contiguous(memory_format=torch.channels_last)         # twice as fast that way
        view = F.interpolate(box, crop.size, mode=crop.interpolation, antialias=True)[0]
        mirror = crop.flip and torch.rand(()) < crop.flip
        views.append(view.flip(2) if mirror else view)
    return views

def chunks(x):
    """Slices of the batch `x`: on a CPU of as many images as fit in its cache, which makes the
    operations on them several times faster; on a GPU the whole batch."""
    chunk = 256 * 32 * 32 // (x.shape[2] * x.shape[3]) if x.device.type == "cpu" else len(x)
    return [slice(i, i + max(1, chunk)) for i in range(0, len(x), max(1, chunk))]

def in_chunks(augment):
    """Decorator for a method's `augment(x, ...)`, a batch (N, 3, S, S) in 0..1 to views of the same
    form. What it is given stays as it is, although the operations below work in place."""

    @functools.wraps(augment)
    def augment_batch(x, *args, **kwargs):
        if not x.is_floating_point():
            raise ValueError("images are not float in 0..1, as crop_and_resize returns them")
        views = torch.empty_like(x)
        for part in chunks(x):
            views[part] = augment(x[part].clone(), *args, **kwargs)
        return views

    return augment_batch

# Operations on a batch (N, 3, H, W) float32 in 0..1, on its device. Each image draws for itself,
# and is changed with probability `p`. They work in place: they change the batch and return it.
# Random numbers come from the CPU, so that nothing waits for a GPU to know them.

def uniform(x, low, high):
    """(N, 1, 1, 1) numbers in low..high, on x's device."""
    return torch.empty(len(x), 1, 1, 1).uniform_(low, high).to(x.device, non_blocking=True)

def on_some(x, p, change):
    """Apply `change` to each image with probability p."""
    chosen = (torch.rand(len(x)) < p).nonzero()[:, 0].to(x.device, non_blocking=True)
    return x.index_copy_(0, chosen, change(x.index_select(0, chosen)))

@functools.lru_cache(maxsize=None)
def constant(values, device, dtype=torch.float32):
    """The tuple `values` as a tensor on `device`, copied there once and kept."""
    return torch.tensor(values, dtype=dtype).to(device)

def to_gray(x):
    """(N, 3, H, W) -> (N, 1, H, W), the luma of ITU-R 601 that torchvision and Pillow use."""
    return (0.2989 * x[:, :1]).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:], alpha=0.114)

def grayscale(x, p=0.2):
    """Replace the colours by their luma."""
    return on_some(x, p, lambda x: to_gray(x).expand_as(x))

def color_jitter(x, brightness, contrast, saturation, hue, p=0.8, additive=False):
    """torchvision's ColorJitter: four operations in random order, with factors uniform in
    max(0, 1 - strength)..1 + strength and a hue shift in -hue..hue of the circle, clipped to 0..1
    after each. Every 64 images share one order, on a GPU every quarter of the batch. `additive`
    brightness adds a number in -brightness..brightness instead, as Inception's does."""

    def jitter(x):
        operations = [adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue]
        amounts = [uniform(x, max(0, 1 - s), 1 + s) for s in (brightness, contrast, saturation)]
        amounts.append(uniform(x, -hue, hue))
        if additive:
            operations[0] = lambda x, amount: x.add_(amount).clamp_(0, 1)
            amounts[0] = uniform(x, -brightness, brightness)
        chunk = 64 if x.device.type == "cpu" else max(64, math.ceil(len(x) / 4))
        for i in range(0, len(x), chunk):
            for k in torch.randperm(4).tolist():
                operations[k](x[i:i + chunk], amounts[k][i:i + chunk])
        return x

    return on_some(x, p, jitter)

def adjust_brightness(x, factor):
    """Multiply by `factor`, which is (N, 1, 1, 1) here and below, and clip to 0..1."""
    return x.mul_(factor).clamp_(0, 1)

def adjust_contrast(x, factor):
    """Blend with the mean luma of the image."""
    mean = (x.mean((2, 3)) @ constant((0.2989, 0.587, 0.114), x.device))[:, None, None, None]
    return x.mul_(factor).add_((1 - factor) * mean).clamp_(0, 1)

def adjust_saturation(x, factor):
    """Blend with the luma of each pixel."""
    return torch.lerp(to_gray(x), x, factor, out=x).clamp_(0, 1)

def adjust_hue(x, shift):
    """Turn the hue of HSV by `shift` of the whole circle. With r, g, b scaled to 0..1 between the
    least and the largest channel, the hue in sixths of the circle is 1 - r + g + b with the sign of
    g - b: 0 at red, 2 at green, 4 at blue. Back again, with d the distance of the hue from 3, 2 and
    4, cut to 1..2, red is d - 1 and the others are 2 - d."""
    r, g, b = x.unbind(1)
    largest = torch.maximum(r, g)
    least = torch.minimum(r, g)
    torch.maximum(largest, b, out=largest)
    torch.minimum(least, b, out=least)
    chroma = largest - least
    hue = (g + b).sub_(r).sub_(least).add_(chroma)
    hue.div_(torch.mul(chroma, 6, out=r).clamp_(min=1e-6))              # of the whole circle
    hue.copysign_(torch.sub(g, b, out=r))
    hue.add_(shift[:, 0] + 2).frac_().mul_(6)                           # 2: makes it positive
    centres = constant((3.0, 2.0, 4.0), x.device)[:, None, None]
    torch.sub(hue[:, None], centres, out=x).abs_().clamp_(1, 2)
    torch.addcmul(least.sub_(chroma), r, chroma, out=r)
    largest.add_(chroma)
    for channel in (g, b):
        torch.addcmul(largest, channel, chroma, value=-1, out=channel)
    return x

def gaussian_blur(x, p=0.5, sigma=(0.1, 2.0), kernel_size=None):
    """Gaussian blur, the standard deviation uniform in `sigma` pixels, mirrored at the border.
    `kernel_size`, odd, is the number of taps; by default all that matter. Pillow's blur, which
    MoCo, SimSiam and SwAV use, approximates it by box filters."""
    radius = math.ceil(4 * sigma[1]) if kernel_size is None else kernel_size // 2
    radius = min(radius, min(x.shape[2:]) - 1)

    def weights(std, n):
        """(N, n, n): row i is a Gaussian around i, reflected about the first and last pixel."""
        distance = torch.arange(-radius, radius + 1, device=x.device)
        taps = torch.exp(-0.5 * (distance / std) ** 2)                  # (N, taps)
        taps = taps / taps.sum(1, keepdim=True)
        place = (torch.arange(n, device=x.device)[:, None] + distance).abs()
        place = n - 1 - (n - 1 - place).abs()                           # (n, taps)
        shape = len(std), *place.shape
        rows = torch.zeros(len(std), n, n, device=x.device)
        return rows.scatter_add_(2, place.expand(shape), taps[:, None].expand(shape))

    def blur(x):
        std = uniform(x, *sigma).view(-1, 1)
        return resample(x, weights(std, x.shape[2]), weights(std, x.shape[3]))

    return on_some(x, p, blur)

def normalize(x, mean, std):
    """(x - mean) / std for each channel; `mean` and `std` are triples."""
    mean = constant(tuple(mean), x.device)[:, None, None]
    return x.sub_(mean).div_(constant(tuple(std), x.device)[:, None, None])

# ============================================================================== 3. ResNets

DEPTHS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3),
          101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3)}
NORMS = {"batch": nn.BatchNorm2d, "layer": functools.partial(nn.GroupNorm, 1)}  # over (C, H, W)

def parse_arch(arch, depths=DEPTHS):
    """"resnet50x2" -> (50, 2.0). Raises UserError, a ValueError, for anything else."""
    match = re.fullmatch(r"resnet(\d+)(?:x(\d*\.?\d+))?", arch)
    if not match or int(match[1]) not in depths or float(match[2] or 1) < 0.125:
        known = ", ".join(f"resnet{depth}" for depth in depths)
        raise UserError(f"--arch {arch}: not one of {known}, or one with a width of at least 0.125 "
                        "(8 channels; with fewer torch crashes on CPUs): resnet50x2")
    return int(match[1]), float(match[2] or 1)

class ResNet(nn.Module):
    """He et al. 2015, arXiv 1512.03385, with torchvision's blocks and parameter names, without its
    classifier. Called `resnet` by the scripts.

    arch: resnet10, 18, 34, 50, 101, 152 or 200, with a width multiplier if need be: resnet50x2.
    norm: "batch", or "layer", which shares no statistics between images. stem: "imagenet", or
    "small" for images of 32 to 96 pixels, 3x3 without max-pooling. `zero_init` starts residual
    branches at 0 (the last norm's scale). `in_channels` and `stem_width` are what the stem takes
    and gives. It has `.dim`, `.maps(x)` and `.config`, the arguments that build it again. Raises
    ValueError for an unknown arch, norm or stem."""

    def __init__(self, arch, norm="batch", stem="imagenet", zero_init=False, in_channels=3,
                 stem_width=None):
        super().__init__()
        depth, multiplier = parse_arch(arch)
        if norm not in NORMS or stem not in ("imagenet", "small"):
            raise ValueError(f"norm {norm!r}, stem {stem!r}: not batch or layer, imagenet or small")
        self.config = dict(arch=arch, norm=norm, stem=stem, in_channels=in_channels,
                           stem_width=stem_width)
        norm = NORMS[norm]
        block = BasicBlock if depth < 50 else Bottleneck
        widths = [round(64 * multiplier * 2 ** i) for i in range(4)]
        channels = stem_width or widths[0]
        small = stem == "small"
        kernel, stride, padding = (3, 1, 1) if small else (7, 2, 3)
        self.conv1 = nn.Conv2d(in_channels, channels, kernel, stride, padding, bias=False)
        self.bn1 = norm(channels)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        for i, (width, blocks) in enumerate(zip(widths, DEPTHS[depth])):
            stride = 1 if i == 0 else 2
            out = width * block.expansion
            shortcut = None
            if stride > 1 or channels != out:
                shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), norm(out))
            layer = [block(channels, width, stride, shortcut, norm_layer=norm)]
            layer += [block(out, width, norm_layer=norm) for _ in range(blocks - 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*layer))
            channels = out
        self.dim = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if zero_init and isinstance(module, block):
                last = module.bn2 if block is BasicBlock else module.bn3
                nn.init.zeros_(last.weight)

    def maps(self, x):
        """(N, 3, H, W) -> (N, dim, h, w), the feature maps before pooling."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, x):
        """(N, 3, H, W) -> (N, dim)."""
        return self.maps(x).mean((2, 3))

resnet = ResNet

# ============================================================================== 4. LARS

class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, arXiv 1708.03888), as SimCLR and BYOL use
    it. For each weight w with gradient g:

        u = g + weight_decay * w
        trust = trust_coefficient * |w| / |u|,   1 where either norm is 0
        v <- momentum * v + lr * trust * u,   w <- w - v                  SimCLR: `lr_in_momentum`
        v <- momentum * v + trust * u,        w <- w - lr * v             BYOL: not

    The two differ only while the rate changes. Biases and norm scales, that is parameters of at
    most one dimension, have neither decay nor trust."""

    def __init__(self, params, lr, momentum=0.9, weight_decay=0, trust_coefficient=1e-3,
                 lr_in_momentum=True):
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay,
                        trust_coefficient=trust_coefficient, lr_in_momentum=lr_in_momentum)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            weights = [w for w in group["params"] if w.grad is not None]
            self._step([w for w in weights if w.ndim > 1], group, adapt=True)
            self._step([w for w in weights if w.ndim <= 1], group, adapt=False)
        return loss

    def _step(self, w, group, adapt):
        """Each operation is on a whole list of tensors: a few launches on a GPU."""
        if not w:
            return
        for weight in w:
            if "momentum_buffer" not in self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        v = [self.state[weight]["momentum_buffer"] for weight in w]
        u = [weight.grad for weight in w]
        if adapt:
            u = torch._foreach_add(u, w, alpha=group["weight_decay"])
            w_norm = torch.stack(torch._foreach_norm(w))
            u_norm = torch.stack(torch._foreach_norm(u))
            trust = group["trust_coefficient"] * w_norm / u_norm
            trust = torch.where((w_norm > 0) & (u_norm > 0), trust, 1.0)
            torch._foreach_mul_(u, list(trust.unbind()))
        torch._foreach_mul_(v, group["momentum"])
        torch._foreach_add_(v, u, alpha=group["lr"] if group["lr_in_momentum"] else 1)
        torch._foreach_sub_(w, v, alpha=1 if group["lr_in_momentum"] else group["lr"])

@torch.no_grad()
def larc(weights, trust_coefficient=1e-3, weight_decay=0.0, eps=1e-8):
    """The LARS of apex, called LARC there, without clipping. Between `backward` and the step of an
    SGD without weight decay it changes each gradient g of a weight w, unless either norm is 0, to
        trust_coefficient * |w| / (|g| + weight_decay * |w| + eps) * (g + weight_decay * w)"""
    w = [weight for weight in weights if weight.grad is not None]
    g = [weight.grad for weight in w]
    w_norm = torch.stack(torch._foreach_norm(w))
    g_norm = torch.stack(torch._foreach_norm(g))
    trust = trust_coefficient * w_norm / (g_norm + weight_decay * w_norm + eps)
    factor = torch.where(w_norm > 0, trust, 1.0) * (g_norm > 0)     # 0 keeps a gradient of 0
    torch._foreach_add_(g, w, alpha=weight_decay)
    torch._foreach_mul_(g, list(factor.unbind()))

# ============================================================================== 5. Bookkeeping

class UserError(ValueError):
    """A mistake of the user: `launch` prints its one line and exits with status 2."""

class Stopped(BaseException):
    """A signal ended the run; what had to be saved is saved."""
    asked = None            # the signal that asked for it
    at_once = True          # False in a training step, the end of which sees to it

    @classmethod
    def on_signal(cls, number, _):
        if cls.asked == number == signal.SIGINT:        # Ctrl-C a second time
            raise KeyboardInterrupt
        cls.asked = number
        cls.if_asked()

    @classmethod
    def if_asked(cls):
        if cls.at_once and cls.asked is not None:
            raise cls(f"stopped by {signal.Signals(cls.asked).name}; there was nothing to save")

    @classmethod
    @contextlib.contextmanager
    def postponed(cls):
        """In this block signals are only noted, and processes that it starts never see them."""
        at_once = cls.at_once
        cls.at_once = False
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            cls.at_once = at_once

def say(message):
    """Print for a person, on rank 0 alone."""
    if RANK == 0:
        print(message, file=sys.stderr, flush=True)

def first_line(e):
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:200]

def gather(x):
    """(N, ...) of each process -> (N W, ...) of all, by rank, without gradient."""
    if WORLD_SIZE == 1:
        return x
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(WORLD_SIZE)]
    dist.all_gather(parts, x)
    return torch.cat(parts)

def gather_with_gradient(x):
    """As `gather`. The gradient is the sum over the processes: if each computes the loss of the
    whole batch, of which DDP takes the mean, it is exactly the gradient of that loss."""
    return x if WORLD_SIZE == 1 else GatherWithGradient.apply(x)

class GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return gather(x)

    @staticmethod
    def backward(ctx, gradient):                        # (N W, ...)
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(WORLD_SIZE)[RANK]

def gather_objects(x):
    """A list of what each process has."""
    everything = [x] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(everything, x)
    return everything

def start():
    """Join the processes that torchrun started, over NCCL or gloo; returns this one's device."""
    cuda = torch.cuda.is_available()
    if cuda and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
        raise UserError(f"--nproc_per_node: there are only {torch.cuda.device_count()} GPUs here")
    if cuda:
        torch.cuda.set_device(LOCAL_RANK)
        torch.backends.cudnn.benchmark = True
    if "RANK" in os.environ or WORLD_SIZE != 1:
        try:
            store, _, _ = next(dist.rendezvous("env://"))
        except (ValueError, RuntimeError) as e:
            raise UserError(f"torchrun's RANK, WORLD_SIZE, MASTER_...: {first_line(e)}") from None
        # After a restart torchrun's store still has the addresses of the processes that died.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD_SIZE)
    if WORLD_SIZE > 1 and not cuda:
        say("torch has no SyncBatchNorm for CPUs: each process normalises by its own batch")
    return torch.device("cuda", LOCAL_RANK) if cuda else torch.device("cpu")

def distribute(model, compiled):
    """The model under DistributedDataParallel where there are several processes, and `compiled`."""
    network = model
    if WORLD_SIZE > 1:
        warnings.filterwarnings("ignore", "`broadcast_buffers`")    # renamed in torch 2.14
        network = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        # DDP adds gradients in an order that it finds in the first backward pass. One pass of the
        # parameters alone gives the first step after resuming the same order.
        model.forward = lambda: sum(w.sum() for w in model.parameters() if w.requires_grad)
        network().backward()
        del model.forward                               # the class has its own
        model.zero_grad()
    if compiled and any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
        raise UserError("--compile: cannot compile SyncBatchNorm, which several GPUs need")
    return torch.compile(network) if compiled else network

def launch(main, parse_args, resumes=True):
    """Run `main(parse_args(), device)` in every process, and exit: with 0 when done, 2 after a
    user's mistake, 130 after Ctrl-C; if it `resumes` with 0 after SIGTERM and SIGUSR1."""
    for s in SIGNALS:
        signal.signal(s, Stopped.on_signal if resumes or s == signal.SIGINT else signal.SIG_DFL)
    status = 2
    message = None
    try:
        main(parse_args(), start())
        if dist.is_initialized():
            dist.barrier()
        status = 0
    except (Stopped, KeyboardInterrupt) as e:
        say(e)
        status = 130 if Stopped.asked in (None, signal.SIGINT) else 0
    except UserError as e:
        message = str(e) if LOCAL_RANK == 0 or WORLD_SIZE == 1 else None
        time.sleep(0 if message else 10)        # torchrun ends the others when one is gone
    except OSError as e:
        message = f"{e.filename}: {e.strerror}" if e.filename else e
    except Exception as e:
        if isinstance(e, MemoryError) or re.search("(?i)(allocate|out of) memory|overflow", str(e)):
            message = f"not enough memory: {first_line(e)}"
        elif re.search(r"DataLoader worker \(pid|shared memory", str(e)):
            message = "a process that reads images was killed; fewer --workers need less memory"
        else:
            traceback.print_exc()               # here, before the workers are waited for
            status = 1
    if message:
        print(f"{MAIN.name}: error: {message}".replace("\n", "\\n"), file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):          # a full disk has been named already
        print(end="", flush=True)
    for process in torch.multiprocessing.active_children():
        if process.daemon:                      # one that reads images and does not see SIGTERM
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            process.kill()
    if not dist.is_initialized():
        sys.exit(status)
    if status == 0:
        dist.destroy_process_group()
    os._exit(status)                            # nothing waits for processes that are gone

def number(kind, low, high):
    """A type for argparse: an int or float in low..high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not in {low}..{high}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"
    return parse

positive = number(float, 1e-30, 1e30)       # it, and lr * batch / 256, fit in float32
not_negative = number(float, 0, 1e30)
fraction = number(float, 0, 1)
count = number(int, 1, 2 ** 31 - 1)
whole = number(int, 0, 2 ** 63 - 1)
worker_count = number(int, 0, 1024)

def data_name(text):
    """A data set's name or a directory, for argparse."""
    if text not in DATA and not (text and os.path.isdir(text)):
        raise argparse.ArgumentTypeError(f"{text[:99]!r} is neither a folder nor {', '.join(DATA)}")
    return text

class LineParser(argparse.ArgumentParser):
    """argparse whose errors `launch` prints."""

    def error(self, message):
        raise UserError(message)

class Parser(LineParser):
    """The flags that all method scripts share, with the defaults of a recipe."""

    def __init__(self, doc, recipes, argv=None):
        super().__init__(description=doc.splitlines()[0], allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        self.recipes = recipes
        self.argv = sys.argv[1:] if argv is None else argv
        if torch.cuda.is_available():
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        add = self.add_argument
        add("--data", type=data_name, default="shapes", metavar="NAME|DIR",
            help=f"{', '.join(DATA)}, or a directory of images")
        add("--root", default="data", help="folder that holds the named data sets")
        add("--recipe", choices=list(recipes), help="set of defaults; if missing, chosen by --data")
        add("--arch", help="resnet10 ... resnet200, with a width: resnet50x2, resnet18x0.25")
        add("--stem", choices=["imagenet", "small"], help="first layer; small: 3x3, no max-pooling")
        add("--size", type=count, help="side of the crops in pixels")
        add("--epochs", type=count, help="passes over the data")
        add("--batch-size", type=count, help="images in a batch, over all processes")
        add("--lr", type=positive, help="learning rate per 256 images")
        add("--weight-decay", type=not_negative, help="weight decay of the optimizer")
        add("--warmup-epochs", type=not_negative, help="epochs of linear warm-up")
        add("--workers", type=worker_count, default=min(16, os.cpu_count()),
            help="processes that read image files, for each training process")
        add("--seed", type=whole, default=0, help="seed of all random numbers")
        add("--precision", choices=["bf16", "fp32"], default="bf16" if bf16 else "fp32",
            help="precision of the network; losses are float32")
        add("--compile", action="store_true", help="compile the model with torch.compile")
        add("--output", metavar="DIR", help="the run's folder; default runs/<method>-<data>-<arch>")
        add("--knn-every", type=whole, help="epochs between kNN measurements; 0: at the end only")
        add("--log-every", type=count, default=10, help="steps between lines of log.jsonl")
        add("--save-every", type=whole, default=0,
            help="steps between checkpoints, besides the one that is saved every minute")

    def parse(self):
        known, _ = self.parse_known_args([a for a in self.argv if a not in ("-h", "--help")])
        name = known.recipe or known.data
        few = {}
        if not known.recipe and known.data not in DATA:
            images = len(load_folder(known.data, "pretrain"))
            few = few_images(images, self.recipes, known.epochs) if images < 50_000 else {}
            name = "shapes" if few else "imagenet"
        elif name not in self.recipes:
            name = "small"
        version = getattr(known, "version", None)
        if version:                                 # it has recipes of its own
            name = name.removesuffix("-v1") + ("-v1" if version == 1 else "")
        self.set_defaults(**self.recipes[name] | dict(recipe=name) | few)
        return self.parse_args(self.argv)

def few_images(n, recipes, epochs):
    """Changes to the recipe `shapes` for `n` photographs: ten minutes on a laptop, or on a GPU, if
    `epochs` are not given."""
    gpu = torch.cuda.is_available()
    batch = min(256 if gpu else 64, max(16, 2 ** int(math.log2(n / 16 + 1))))
    epochs = epochs or min(400, max(10, (1_000_000 if gpu else 8_000 * os.cpu_count()) // n))
    network = dict(arch="resnet18" if gpu else "resnet18x0.5")
    if "resize" not in recipes["shapes"]:       # CPC v2 cuts patches of other sizes
        network.update(stem="imagenet", size=96 if gpu else 64)
    if "small_size" in recipes["shapes"]:       # as 96 to 224 pixels in SwAV's paper
        network.update(small_size=round(96 / 224 * network["size"]))
    if recipes["shapes"].get("queue_size"):     # a key of the same image is no negative
        network.update(queue_size=min(2048, max(batch, 2 ** int(math.log2(n / 2 + 1)))))
    if "color_strength" in recipes["imagenet"]:
        network.update(color_strength=recipes["imagenet"]["color_strength"])
    return dict(network, recipe="few images", batch_size=batch, epochs=epochs,
                warmup_epochs=epochs / 20, knn_every=max(1, epochs // 5))

CHECKPOINT = dict(method=str, args=dict, epoch=int, step=int, encoder=dict, encoder_config=dict,
                  input=dict, model=dict, optimizer=dict)

def read_checkpoint(path):
    """A checkpoint of ours as a dict, on the CPU, or UserError. Never runs code from the file."""
    warnings.filterwarnings("ignore", "Detected pickle protocol")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        wrong = [key for key, kind in CHECKPOINT.items() if not isinstance(saved.get(key), kind)]
        damaged = zipfile.ZipFile(path).testzip()       # torch.load does not look at the checksums
    except OSError:
        raise
    except Exception:                           # torch raises half a dozen kinds
        wrong = True
    if wrong:
        raise UserError(f"{path}: not a checkpoint of these scripts")
    if damaged:
        raise UserError(f"{path}: damaged, the checksum of {damaged} is wrong")
    return saved

def write_atomically(path, save):
    """Write what `save(file)` puts into a binary file, to a new file, which then replaces `path`:
    that is whole at any time."""
    content = io.BytesIO()          # torch.save into a file would not say that the disk is full
    save(content)
    new = Path(f"{path}.new")
    try:
        with open(new, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as e:
        new.unlink(missing_ok=True)
        raise UserError(f"{path}: could not be written, and is as it was ({e.strerror})") from None

class Run:
    """A training run: its checkpoints, log and pictures, in the folder `--output`. Each step, from
    `step` to `total`, calls `crops` first, whose images are `indices` (N,), and `finish_step` last.

    It resumes from a checkpoint that is there, made with the same settings, and saves one every
    minute, every `--save-every` steps, before kNN accuracy is measured, at the end and after a
    signal; never with a number that is not finite. `mean` and `std` normalise the images; `encoder`
    is what is kept, if not `model.encoder`. Raises UserError for a bad folder, file or loss."""
    FREE = {"output", "root", "workers", "knn_every", "log_every", "save_every"}    # may change
    lock = None

    def __init__(self, args, model, optimizer, batches, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
                 encoder=None):
        self.args = args
        self.model = model
        self.optimizer = optimizer
        self.batches = batches
        self.encoder = model.encoder if encoder is None else encoder
        self.input = dict(size=args.size, mean=list(mean), std=list(std),
                          interpolation=batches.crops[0].interpolation)
        self.device = next(model.parameters()).device
        self.total = args.epochs * len(batches)
        self.step = 0
        self.stream = None
        self.labelled = has_labels(args.data)
        if self.labelled:           # a mistake in the test data should not wait for the end
            load_data(args.data, args.root, "val", self.device)

        script = Path(sys.modules[type(model).__module__].__file__)
        self.name = script.stem
        code = ast.dump(ast.Module(ast.parse(script.read_text()).body[1:], []))     # no docstring
        self.source = hashlib.sha256(code.encode()).hexdigest()
        self.folder = Path(args.output or f"runs/{self.name}-{Path(args.data).name}-{args.arch}")
        self.checkpoint = self.folder / "checkpoint.pt"
        self.log_file = self.folder / "log.jsonl"
        if self.folder.is_file():
            raise UserError(f"--output {self.folder}: a file, not a folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in (self.checkpoint, self.log_file):
            if path.exists() and not path.is_file():
                raise UserError(f"{path}: a pipe, a device or a folder, not a file")
        if RANK == 0:
            self._lock()
        if self.checkpoint.exists():
            self._resume()
        if len(set(gather_objects(self.step))) > 1:
            raise UserError(f"--output {self.folder}: not on a disk that all processes share")
        self.log = gather_objects(self._read_log() if RANK == 0 else None)[0]
        self.saved_at = time.perf_counter()
        if self.step and self._is_measured():
            self._measure()         # unless the run was killed after that
        if self.step == self.total:
            self._say_result()

    def _lock(self):
        """Keep the folder for this process, until it ends or has another run."""
        if Run.lock is not None:
            os.close(Run.lock)
        Run.lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(Run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--output {self.folder}: another run is writing there") from None
        except OSError:             # a network disk without locks
            pass

    def _resume(self):
        saved = read_checkpoint(self.checkpoint)
        if saved["method"] != self.name:
            raise UserError(f"{self.checkpoint}: made by {saved['method']}.py; change --output")
        before = dict(saved["args"], images=saved.get("images"))
        now = dict(vars(self.args), images=len(self.batches.data))
        differing = [f"--{str(key).replace('_', '-')} {before.get(key)} (now {now.get(key)})"
                     for key in sorted((before.keys() | now.keys()) - self.FREE, key=str)
                     if before.get(key) != now.get(key)]
        if differing:
            raise UserError(f"{self.checkpoint}: made with other settings: {', '.join(differing)}; "
                            "use the same or give another --output (an unfinished run can be "
                            "evaluated as it is)")
        try:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step = saved["step"]
            for weight, state in self.optimizer.state.items():
                steps = torch.as_tensor(state.get("step", 0))
                assert steps.ndim == 0 and steps.dtype != torch.bool, "its optimizer"
                for key in {"momentum_buffer", "exp_avg", "exp_avg_sq"} & state.keys():
                    assert state[key].shape == weight.shape, "its optimizer"
            assert type(self.step) is int and 0 <= self.step <= self.total, f"step {self.step}"
            say(f"resuming from step {self.step} of {self.total} in {self.checkpoint}")
            if saved["source"] != self.source:
                say(f"{self.name}.py has changed since this run began, and what it has trained "
                    "stays; to begin anew, delete the folder or give another --output")
            if saved["processes"] != WORLD_SIZE:
                say(f"{WORLD_SIZE} processes instead of {saved['processes']}: other random numbers")
        except Exception as e:      # whatever the file of another version lacks
            raise UserError(f"{self.checkpoint}: does not fit this {self.name}.py "
                            f"({first_line(e)}); give another --output") from None

    def _save(self):
        states = [self.model.state_dict(), *self.optimizer.state_dict()["state"].values()]
        tensors = [v for state in states for v in state.values() if torch.is_tensor(v)]
        if not all(v.isfinite().all() for v in tensors):
            self._not_finite("a weight or a running statistic is not finite")
        if RANK == 0:
            content = dict(
                method=self.name, args=vars(self.args), epoch=self.step // len(self.batches),
                encoder=self.encoder.state_dict(), encoder_config=self.encoder.config,
                input=self.input, model=self.model.state_dict(),
                optimizer=self.optimizer.state_dict(), step=self.step, source=self.source,
                processes=WORLD_SIZE, images=len(self.batches.data))
            write_atomically(self.checkpoint, lambda file: torch.save(content, file))
        self.saved_at = time.perf_counter()

    def _not_finite(self, what):
        kept = f"; the last good checkpoint is in {self.folder}" if self.checkpoint.exists() else ""
        raise UserError(f"{what} after step {self.step}; try a lower --lr{kept}")

    def _read_log(self):
        """The log as a list of dicts. Lines that come after the checkpoint, or are none of a log,
        are taken out of the file."""
        before = self.log_file.read_bytes() if self.log_file.exists() else b""
        kept = []
        for line in before.splitlines():
            with contextlib.suppress(Exception):        # another line fails in many ways
                entries = dict(json.loads(line))
                sum(entries.values(), 0.0)              # all are numbers
                if self.step and entries["step"] <= self.step:
                    kept.append(line + b"\n")
        if b"".join(kept) != before:
            write_atomically(self.log_file, lambda file: file.writelines(kept))
        return [json.loads(line) for line in kept]

    def crops(self, step):
        """The views of this step, a list of (N, 3, size, size) float32 in 0..1 on the device. All
        random numbers from here to the end of the step are a function of (seed, step, rank)."""
        if self.stream is None:
            self._begin()
        begin = time.perf_counter()
        crops, self.indices, broken = next(self.stream)
        if self.batches.data.in_workers:
            self.waited += time.perf_counter() - begin
        Stopped.at_once = False
        minute = RANK == 0 and time.perf_counter() - self.saved_at > 60
        flags = torch.tensor([Stopped.asked is not None, minute, len(broken)], dtype=torch.int32)
        if WORLD_SIZE > 1:
            dist.all_reduce(flags)              # on the CPU: no GPU waits
        self.stop, self.minute, broken_images = flags.tolist()
        if broken_images:
            note_broken(self.batches.data, broken)
        seed_all(self.args.seed, step, RANK, 1)         # 1: not the numbers of the crops
        return crops

    def _begin(self):
        args = self.args
        say(f"{self.name} on {args.data}: {len(self.batches.data)} images, {args.epochs} epochs, "
            f"{self.total} steps of {args.batch_size}, {args.arch} at {args.size} pixels, recipe "
            f"{args.recipe}, {args.precision} on {self.device.type}, into {self.folder}")
        if args.recipe == "few images" and self.step == 0:
            say("made for few images; --epochs, --batch-size, --arch and --size change it")
        if args.warmup_epochs >= args.epochs:
            say(f"the learning rate only rises: --warmup-epochs {args.warmup_epochs:g} is no "
                f"shorter than --epochs {args.epochs}")
        if BUSY and self.device.type == "cpu" and torch.get_num_threads() > 1:
            say("other programs are running: OMP_NUM_THREADS=1 may be faster beside them")
        if self.step == 0 and self.labelled and args.knn_every:
            untrained = self._knn(self.encoder, self.input)
            pixels = self._knn(nn.Flatten(), dict(self.input, size=min(32, args.size)))
            self._append(knn=untrained, knn_pixels=pixels)
        self.stream = stream(self.batches, range(self.step, self.total), args.workers, self.device)
        self._start_clock()
        self.began = self.clock
        self.began_at = self.step
        self.tell_at = self.clock + 3

    def finish_step(self, loss, lr, z, views, **entries):
        """Log, save, measure and stop, each when it is due. loss: a scalar; lr: a number;
        z (N, d): projections, for `z_std`; views: a list, for views.png; entries: further scalars
        for the log. What is logged is this step's, as the mean over the processes."""
        self.step += 1
        if RANK == 0 and not (self.folder / "views.png").exists():
            self._draw_views(views)
        last = self.step == self.total
        measure = last or self._is_measured()
        if measure or self._every(self.args.log_every):
            self._log(lr, z, loss=loss, **entries)
        if measure or self.stop or self.minute or self._every(self.args.save_every):
            self._save()
        if measure:
            self._measure()
        if self.stop and not last:
            name = signal.Signals(Stopped.asked).name if Stopped.asked else "another process"
            raise Stopped(f"stopped by {name} after step {self.step} of {self.total}; the same "
                          f"command resumes from {self.checkpoint}")
        now = time.perf_counter()
        if measure or now > self.tell_at:
            self.tell_at = now + 10
            seconds = (now - self.began) / (self.step - self.began_at)
            latest = next((line for line in reversed(self.log) if "loss" in line), None)
            loss = f"loss {latest['loss']:.4f} in step {latest['step']}  " if latest else ""
            knn = f"  kNN {self.log[-1]['knn']:.1f} %" if measure and self.labelled else ""
            say(f"epoch {self.step / len(self.batches):.1f}/{self.args.epochs}  {loss}"
                f"{self.args.batch_size / seconds:.0f} images/s  "
                f"{(self.total - self.step) * seconds / 60:.1f} min left{knn}")
        if last:
            Stopped.at_once = True
            self._say_result()

    def _every(self, steps):
        return steps > 0 and self.step % steps == 0

    def _is_measured(self):
        """Whether kNN accuracy is measured after this step."""
        every = self.args.knn_every * len(self.batches)
        return self.labelled and (self.step == self.total or self._every(every))

    def _measure(self):
        """Log kNN accuracy, where there are labels, unless it was before; draw the curves."""
        if any(line["step"] == self.step and "knn" in line for line in self.log[-1:]):
            return
        knn = dict(knn=self._knn(self.encoder, self.input)) if self.labelled else {}
        if RANK == 0:
            lines = [*self.log, dict(step=self.step, **knn)]
            draw_curves({self.folder.name: lines}, self.folder / "curves.png")
        if knn:                     # last, so that a run killed in between repeats both
            self._append(**knn)
        self._start_clock()

    @torch.no_grad()
    def _log(self, lr, z, **entries):
        """A line of the log; this is where a step waits for the device."""
        z_std = F.normalize(z.float(), dim=1).std(0).mean() * z.shape[1] ** 0.5
        numbers = torch.stack([z_std, *(value.float() for value in entries.values())])
        z_std, *means = gather(numbers[None]).mean(0).tolist()
        seconds = time.perf_counter() - self.clock
        rate = (self.step - self.first) * self.args.batch_size / seconds
        entries = dict(zip(entries, means))
        if not math.isfinite(entries["loss"]):
            self._not_finite(f"the loss is {entries['loss']}")
        self._append(lr=lr, **entries, z_std=round(z_std, 4), images_per_second=round(rate, 1),
                     waiting=round(self.waited / seconds, 4))
        self._start_clock()

    def _append(self, **entries):
        line = dict(epoch=self.step // len(self.batches), step=self.step, **entries)
        self.log.append(line)
        if RANK == 0:
            with open(self.log_file, "a") as file:
                file.write(json.dumps(line) + "\n")

    def _knn(self, encoder, input):
        Stopped.at_once = WORLD_SIZE == 1       # everything is saved
        bank, queries = [
            features(encoder, load_data(self.args.data, self.args.root, split, self.device), input,
                     self.args.workers, self.args.precision) for split in ("train", "val")]
        Stopped.at_once = False
        return round(knn_accuracy(*bank, *queries, default_k(bank[1])), 2)

    def _start_clock(self):
        self.clock = time.perf_counter()
        self.first = self.step
        self.waited = 0.0

    def _say_result(self):
        say(f"this run is finished: {self.checkpoint}, curves.png, views.png")
        knn = [line["knn"] for line in self.log if "knn" in line]
        pixels = [line["knn_pixels"] for line in self.log if "knn_pixels" in line]
        if pixels:
            few = self.args.recipe == "few images"
            on = f" on {len(load_folder(self.args.data, 'val'))} test images" if few else ""
            say(f"kNN accuracy{on} {knn[-1]:.1f} % after {self.args.epochs} epochs; untrained "
                f"{knn[0]:.1f} %, pixels {pixels[0]:.1f} %")
            better = [name for name, value in dict(untrained=knn[0], pixels=pixels[0]).items()
                      if value >= knn[-1]]
            if better:
                say(f"no better than {' and '.join(better)}: try more --epochs or another --lr")
            few = " --protocol lbfgs --sweep" if few else ""
            say(f"next: python evaluate.py linear {self.folder}{few}")
        elif not self.labelled:
            say(f"no labels to test with; next: python evaluate.py neighbours {self.folder}")

    def _draw_views(self, views):
        """A row for each of the first images of the batch: the image, and its views."""
        indices = self.indices[:8]
        whole, _, _ = self.batches.data.crop(indices, [CenterCrop(self.args.size, 1.0)], 0)
        mean, std = [torch.tensor(self.input[key])[:, None, None] for key in ("mean", "std")]
        columns = [whole[0].cpu() / (255 if whole[0].dtype == torch.uint8 else 1)]
        columns += [view[:8].detach().float().cpu() * std + mean for view in views]
        side = max(96, self.args.size)
        tiles = torch.stack([F.interpolate(column, side) for column in columns], 1).flatten(0, 1)
        write_atomically(self.folder / "views.png", lambda file: torchvision.utils.save_image(
            tiles, file, "png", nrow=len(columns), pad_value=1))

def read_log(folder):
    """The lines of a run's log as dicts."""
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_bytes().splitlines()]

def draw_curves(runs, path, loss="loss"):
    """Draw the curves of `runs`, {name: lines of the log}, into a PNG. `loss` is that title."""
    figure, axes = pyplot().subplots(2, 2, figsize=(9, 6), layout="constrained")
    titles = dict(loss=loss, knn="kNN, % (dashed: untrained, dotted: pixels)",
                  lr="learning rate", z_std="spread of z (about 1: healthy, 0: collapsed)")
    for i, (name, lines) in enumerate(runs.items()):
        for ax, (key, title) in zip(axes.flat, titles.items()):
            points = [(line["step"], line[key]) for line in lines if key in line]
            marker = "o" if key == "knn" else ""
            ax.plot(*zip(*points) if points else ((), ()), marker=marker, label=name, color=f"C{i}")
            ax.set(title=title, xlabel="step")
            ax.grid(alpha=0.3)
        before = lines[0] if lines and lines[0]["step"] == 0 else {}
        for key, style in ("knn", "--"), ("knn_pixels", ":"):
            if key in before:
                axes[0, 1].axhline(before[key], linestyle=style, color=f"C{i}", alpha=0.6)
    for ax in axes.flat:
        if not any(len(line.get_xdata()) for line in ax.lines):
            ax.set_title(f"{ax.get_title()}: not drawn")
            ax.set_axis_off()
    axes[0, 0].legend()
    axes[1, 0].set_ylim(bottom=0)
    axes[1, 1].set_ylim(0, 1.1)
    save_picture(figure, path)

def pyplot():
    """matplotlib.pyplot that draws into files and needs no screen."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams["text.parse_math"] = False     # draw a $ in a name as it is
    return plt

def save_picture(figure, path):
    write_atomically(path, functools.partial(figure.savefig, dpi=110, format="png"))
    pyplot().close(figure)

@torch.no_grad()
def features(encoder, data, input, workers=0, precision="fp32"):
    """`encoder`, in eval mode, on the test crop of every image of `data`: h (n, D), float32 or,
    above a gigabyte, float16, and labels (n,) or None, on its device, in every process. `input` is
    a checkpoint's: size, mean, std, interpolation, and the crop's `fraction` if not 0.875."""
    device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
    training = encoder.training
    encoder.eval()
    for buffer in encoder.buffers() if WORLD_SIZE > 1 else ():
        dist.broadcast(buffer, 0)           # running statistics may be each process's own
    crop = CenterCrop(input["size"], input.get("fraction", 0.875), input["interpolation"])
    in_order = InOrder(data, [crop])
    h = []
    used = []
    for (x,), indices, broken in stream(in_order, range(len(in_order)), workers, device):
        note_broken(data, broken)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            y = encoder(normalize(x, input["mean"], input["std"])).float()
        h.append(y.half() if len(data) * y[0].numel() > 2 ** 28 else y)
        used.append(indices)
    encoder.train(training)
    h = gather(torch.cat(h))[:len(data)]
    if data.labels is None:
        return h, None
    return h, gather(data.labels[torch.cat(used)].to(device))[:len(data)]

def nearest(bank, h, k):
    """For each of h (N, D) the k rows of `bank` (M, D) most similar by cosine, the best first:
    similarities (N, k) and indices (N, k). k is cut to M."""
    h = F.normalize(h.float(), dim=1)
    best = h.new_empty(len(h), 0)
    where = best.long()
    for start in range(0, len(bank), 16384):
        chunk = F.normalize(bank[start:start + 16384].float(), dim=1)
        similarity, indices = (h @ chunk.T).topk(min(k, len(chunk)))
        best, order = torch.cat([best, similarity], 1).topk(min(k, best.shape[1] + len(chunk)))
        where = torch.cat([where, indices + start], 1).gather(1, order)
    return best, where

def default_k(labels):
    """200 neighbours, or half the images of a class where these are fewer."""
    return min(200, max(1, len(labels) // (2 * int(labels.max()) + 2)))

def knn_accuracy(train_h, train_labels, h, labels, k=200, temperature=0.1):
    """Top-1 accuracy in percent of weighted k-nearest-neighbour classification (Wu et al. 2018,
    arXiv 1805.01978, section 3.4; temperature as in MoCo's CIFAR demonstration, there 0.07).
    train_h (M, D) and h (N, D) of any scale, labels (M,) and (N,) >= 0. Each of the k most similar
    training features votes for its class with exp(cosine / temperature). k is cut to M."""
    train_labels = train_labels.to(h.device)
    correct = torch.zeros((), device=h.device)
    for queries, truth in zip(h.split(512), labels.to(h.device).split(512)):
        similarity, neighbours = nearest(train_h, queries, k)           # (n, k)
        weights = ((similarity - similarity[:, :1]) / temperature).exp()    # at most 1
        votes = torch.zeros(len(queries), int(train_labels.max()) + 1, device=h.device)
        votes.scatter_add_(1, train_labels[neighbours], weights)
        correct += (votes.argmax(1) == truth).sum()
    return 100 * correct.item() / len(h)
