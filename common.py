"""What the method scripts of Plainview share, in four rooms.

1. Data      `load_data`, `Crop`, `Batches` and the pixel operations that a method's augmentation is made of
2. ResNets   `resnet`
3. LARS      `LARS`, `larc_`
4. Books     `Run` (resuming, checkpoints, log, pictures), `features`, `knn_accuracy`, flags and process start

Images are (N, 3, H, W): uint8 as loaded, float32 in 0..1 once cropped.
"""
import argparse, contextlib, functools, json, math, os, pickle, re, signal, sys, time, traceback
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class UserError(ValueError):
    """A mistake of the user's: `launch` prints its one line and exits with status 2."""


# ---------------------------------------------------------------- 1. data: the embedded set
# Geometry is float64 with + - * / and sqrt alone, which every CPU rounds alike: labels and boxes are the same everywhere.

SHAPES = "disc square triangle star plus ring crescent heart bar bowtie".split()


def _silhouette(k, u, v):
    """Which points of the plane class k covers; v points down, everything fits into the unit disc or so."""
    r2, au, av = u * u + v * v, abs(u), abs(v)
    if k == 0: return r2 < 0.64
    if k == 1: return np.maximum(au, av) < 0.7
    if k == 2: return np.maximum(v, au * 0.8660254037844386 - v * 0.5) < 0.46
    if k == 3:
        r = np.sqrt(r2)
        c = v / np.maximum(r, 1e-9)
        return r < 0.6 - 0.33 * (((16 * c * c - 20) * c * c + 5) * c)        # cos of five times the angle
    if k == 4: return (np.minimum(au, av) < 0.25) & (np.maximum(au, av) < 0.9)
    if k == 5: return (r2 > 0.25) & (r2 < 0.8464)
    if k == 6: return (r2 < 0.8464) & ((u - 0.45) * (u - 0.45) + v * v > 0.5184)
    if k == 7:
        a = 1.3 * r2 - 0.6
        return a * a * a + 2.2 * u * u * v * v * v < 0
    if k == 8: return (au < 0.95) & (av < 0.28)
    return (au > av) & (au < 0.85)


def _texture(k, u, v):
    """The pattern that class k carries inside its silhouette, in -1..1."""
    if k == 0: return np.ones_like(u)
    if k == 1: return np.sin(16 * v)
    if k == 2: return np.sin(16 * u)
    if k == 3: return np.sin(8 * (u + v))
    if k == 4: return (1.6 * np.sin(9 * u) * np.sin(9 * v)).clip(-1, 1)
    if k == 5: return np.sin(17 * np.sqrt(u * u + v * v))
    if k == 6: return np.sin(8 * np.arctan2(v, u))
    if k == 7: return (np.cos(11 * u) + np.cos(11 * v)).clip(-1, 1)
    if k == 8: return np.sin(7 * u)
    return np.maximum(np.cos(12 * u), np.cos(12 * v))


def draw_shapes(count, seed, size=32, cells=1):
    """Draw `count` images of textured silhouettes; `cells=1` gives one object each, `cells=c` a scene of 1 to c*c objects.

    A class is a silhouette with its own texture. What varies besides is what augmentation erases (one tint an image, polarity,
    contrast, brightness, place, size, tilt, shading, pixel noise), so that agreeing on two views leaves only the class to learn.
    Returns images (count, 3, size, size) uint8, labels (count, cells*cells) int64 with -1 for no object, and boxes
    (count, cells*cells, 4) int64 as x0, y0, x1, y1 in pixels, ends excluded. `size` must be a multiple of `cells`.
    The same on every machine: labels and boxes exactly, pixels within 1 (of 255).
    """
    if size % cells:
        raise ValueError(f"size {size} is not a multiple of cells {cells}")
    places, s = cells * cells, size // cells                   # each object lives in its own cell of s x s pixels
    n = count * places
    g = np.random.default_rng([seed, 0])
    labels = g.permutation(np.arange(n) % len(SHAPES))
    u = g.random((7, n))
    half = 0.5 + 0.45 * u[0]
    x, y = (2 * u[1] - 1) * (1 - half), (2 * u[2] - 1) * (1 - half)
    t = 0.1 * (2 * u[3] - 1)                                    # tan of half the tilt: sine and cosine without sin and cos
    cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    present = (u[4] < 0.6) | (np.arange(n) % places == (u[5].reshape(count, places)[:, :1] * places).astype(int).repeat(places, 1).ravel())
    pixel = (np.arange(2 * s) + 0.5) / s - 1                    # twice the resolution, averaged below
    mask, pattern = np.zeros((2, n, s, s), np.float32)
    average = lambda a: a.reshape(-1, s, 2, s, 2).mean((2, 4), dtype=np.float32)
    for k in range(len(SHAPES)):
        for i in np.array_split(np.flatnonzero((labels == k) & present), max(1, n // 80)):
            du, dv = (pixel[None, None, :] - x[i, None, None]) / half[i, None, None], (pixel[None, :, None] - y[i, None, None]) / half[i, None, None]
            a, b = cos[i, None, None], sin[i, None, None]
            pu, pv = a * du + b * dv, a * dv - b * du
            inside = _silhouette(k, pu, pv)
            mask[i], pattern[i] = average(inside), average(inside * (0.5 + 0.5 * _texture(k, pu, pv)))
    hit = mask > 0.4
    columns, rows = hit.any(1), hit.any(2)
    box = np.stack([columns.argmax(1), rows.argmax(1), s - columns[:, ::-1].argmax(1), s - rows[:, ::-1].argmax(1)], 1)
    corner = np.stack([np.arange(places) % cells, np.arange(places) // cells] * 2, 1) * s
    boxes = np.where(present[:, None], box + np.tile(corner, (count, 1)), 0).reshape(count, places, 4)

    light = pattern.reshape(count, cells, cells, s, s).transpose(0, 1, 3, 2, 4).reshape(count, size, size)
    g = np.random.default_rng([seed, 1])
    u = g.random((6, count, 1, 1), np.float32)
    light = np.where(u[0] < 0.5, 1 - light, light)
    shading = g.random((count, 2, 2), np.float32).repeat(size // 2, 1).repeat(size // 2, 2) * 2 - 1
    light = 0.1 + 0.8 * light * (0.4 + 0.6 * u[1]) + 0.15 * shading
    tint = 1 - 0.95 * u[2:5]
    tint = (tint / tint.max(0)).swapaxes(0, 1)                 # (count, 3, 1, 1): a random hue and saturation, the brightest channel 1
    images = np.empty((count, 3, size, size), np.uint8)
    for i in np.array_split(np.arange(count), max(1, count // 500)):
        noise = g.random((2, len(i), 3, size, size), np.float32)
        images[i] = ((light[i, None] * tint[i] + 0.1 * (noise[0] - noise[1])).clip(0, 1) * 255 + 0.5).astype(np.uint8)
    return images, np.where(present, labels, -1).reshape(count, places), boxes


def draw_sheet(path):
    """Draw a sheet of the embedded data as a PNG: a row a class, then scenes with their boxes."""
    images, labels, _ = draw_shapes(500, seed=1)
    scenes, _, boxes = draw_shapes(len(SHAPES) * 2, seed=3, size=96, cells=2)
    plt = pyplot()
    figure, axes = plt.subplots(len(SHAPES), 12, figsize=(6.6, 5.5), layout="constrained")
    for k, row in enumerate(axes):
        shown = [*images[labels[:, 0] == k][:10], *scenes[2 * k:2 * k + 2]]
        for image, ax in zip(shown, row):
            ax.imshow(image.transpose(1, 2, 0), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
        row[0].set_ylabel(SHAPES[k], fontsize=6)
        for ax, scene in zip(row[10:], boxes[2 * k:2 * k + 2]):
            for x0, y0, x1, y1 in scene:
                ax.add_patch(plt.Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor="white", linewidth=0.6))
    save_picture(figure, path)


# ---------------------------------------------------------------- 1. data: sets

class Images:
    """A data set in memory: `images` (n, 3, H, W) uint8 on the training device and `labels` (n,) int64 on the CPU (None: unknown)."""

    in_workers = False

    def __init__(self, images, labels, device):
        self.images = torch.as_tensor(images).to(device)
        self.labels = None if labels is None else torch.as_tensor(labels, dtype=torch.int64)

    def __len__(self):
        return len(self.images)

    def crop(self, indices, crops, *key):
        """Crops of the images at `indices` (n,): a list of (n, 3, size, size) float32 in 0..1, drawn from `key` and this process."""
        seed_all(*key, rank())
        images = self.images.index_select(0, indices.to(self.images.device))       # ten times faster than images[indices] on a CPU
        views = [view for crop in crops for view in crop_and_resize(images, crop)]
        return views, indices, []


class Folder:
    """A data set of image files, decoded and cropped in worker processes. `labels` as above."""

    in_workers = True
    SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

    def __init__(self, paths, labels):
        self.paths, self.broken = np.array(paths), set()
        self.labels = None if labels is None else torch.as_tensor(labels, dtype=torch.int64)

    def __len__(self):
        return len(self.paths)

    def crop(self, indices, crops, *key):
        """As `Images.crop`, but uint8, and drawn from `key` and each image alone. An image that cannot be read is replaced by the next
        one that can: returns the crops, the indices really used, and the indices of the broken files."""
        used, broken = [], []
        views = [torch.empty(len(indices), 3, crop.size, crop.size, dtype=torch.uint8, memory_format=torch.channels_last) for crop in crops
                 for _ in range(crop.count)]
        for k, i in enumerate(indices.tolist()):
            for _ in range(min(len(self), 10 + len(self) // 100)):      # more in a row than may be broken at all: `note_broken` ends the run
                image = self.read(i)
                if image is not None:
                    break
                broken.append(i)
                i = (i + 1) % len(self)
            if image is None:
                image = torch.zeros(3, 32, 32, dtype=torch.uint8)
            seed_all(*key, i)
            for batch, view in zip(views, (view for crop in crops for view in crop_one(image, crop))):
                batch[k] = view[0]
            used.append(i)
        return views, torch.tensor(used), broken

    def read(self, i):
        """Image i as (3, H, W) uint8 RGB, or None: torchvision's decoder, or Pillow for what that does not read."""
        path = str(self.paths[i])
        try:
            from torchvision.io import ImageReadMode, decode_image, read_file
            if not path.lower().endswith(".webp"):              # whose EXIF orientation torchvision does not see
                image = decode_image(read_file(path), ImageReadMode.RGB, apply_exif_orientation=True)
                if image.dtype == torch.uint8 and image.ndim == 3:
                    return image
        except (RuntimeError, ImportError):
            pass
        try:
            from PIL import Image, ImageOps
            with Image.open(path) as image:
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I;16"):               # 16-bit grey, which Pillow would clip to white
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
        except Exception:                                       # a broken file can make a decoder fail in any way
            return None


TORCHVISION = {"cifar10": ("CIFAR10", "cifar-10-batches-py", "data_batch_1 ... data_batch_5, test_batch and batches.meta"),
               "cifar100": ("CIFAR100", "cifar-100-python", "train, test and meta"),
               "stl10": ("STL10", "stl10_binary", "unlabeled_X.bin, train_X.bin, train_y.bin, test_X.bin and test_y.bin")}
DATA = ["shapes", *TORCHVISION]


@functools.lru_cache(maxsize=8)
def load_data(name, root="data", split="train", device="cpu"):
    """The data set `name`, one of `DATA` or a directory; an `Images` or a `Folder`.

    `split` is "train" and "val" (labelled) or "pretrain": all that may be learned from without labels, which is "train" for most, "train" and the
    unlabelled images for stl10, and every image below the directory where that has no class folders. A directory holds
    train/<class>/* and val/<class>/*. torchvision's sets lie in `root` and are downloaded into it if they are not there.
    Raises UserError when the data is not there or the directory has no labels for "train" and "val".
    """
    if split == "pretrain" and name != "stl10" and has_labels(name):
        return load_data(name, root, "train", device)
    if name == "shapes":
        images, labels, _ = draw_shapes(2000, seed=2) if split == "val" else draw_shapes(5000, seed=1)
        return Images(images, labels[:, 0], device)
    if name in TORCHVISION:
        return Images(*_torchvision(name, root, split), device)
    return _folder(name, split)


def _torchvision(name, root, split):
    import torchvision
    kind, folder, files = TORCHVISION[name]
    if name == "stl10":
        options = dict(split={"pretrain": "train+unlabeled", "train": "train", "val": "test"}[split])
    else:
        options = dict(train=split != "val")
    make = lambda download=False: getattr(torchvision.datasets, kind)(root, download=download, **options)
    if local_rank() == 0:
        try:
            make()
        except (RuntimeError, OSError):
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    make(download=True)
            except (RuntimeError, OSError) as e:
                raise UserError(f"--data {name}: not found and could not be downloaded ({_first_line(e)}); "
                                f"looked in {Path(root) / folder} for {files}") from None
    if dist.is_initialized():
        dist.barrier()
    data = make()
    images = data.data if name == "stl10" else data.data.transpose(0, 3, 1, 2)
    return images, data.labels if name == "stl10" else data.targets


def _folder(directory, split):
    top = Path(directory)
    if not top.is_dir():
        raise UserError(f"--data {directory}: no such directory, and not one of {', '.join(DATA)}")
    part = top / ("val" if split == "val" else "train")
    classes = {name: label for label, name in enumerate(_class_folders(top / "train"))}
    if split == "pretrain" and not classes:
        part = part if part.is_dir() else top
        found = [(p, None) for p in _image_files(part)]
    else:
        unknown = [name for name in _class_folders(part) if name not in classes]
        if unknown:
            raise UserError(f"--data {directory}: {part / unknown[0]} has no counterpart in {top / 'train'}")
        found = [(p, classes[name]) for name in _class_folders(part) for p in _image_files(part / name)]
        if not found:
            raise UserError(f"--data {directory}: no labels; expected images in {part}{os.sep}<class>{os.sep}")
    if not found:
        raise UserError(f"--data {directory}: no images ({', '.join(sorted(Folder.SUFFIXES))}) in {part}")
    paths, labels = zip(*found)
    return Folder(paths, labels if classes else None)


def _class_folders(part):
    try:
        return sorted(d.name for d in part.iterdir() if d.is_dir() and not d.name.startswith(".")) if part.is_dir() else []
    except OSError as e:
        raise UserError(f"{part}: {_first_line(e)}") from None


def _image_files(top):
    return sorted(os.path.join(folder, f) for folder, _, files in os.walk(top, followlinks=True) for f in files
                  if os.path.splitext(f)[1].lower() in Folder.SUFFIXES and not f.startswith("."))


def has_labels(name):
    """Whether the data set can be asked for "train" and "val": all but a directory without class folders."""
    return name in DATA or bool(_class_folders(Path(name) / "train") and _class_folders(Path(name) / "val"))


# ---------------------------------------------------------------- 1. data: batches

def seed_all(*key):
    """Seed torch from whole numbers >= 0: what is drawn next depends on them and on nothing that was drawn before."""
    number = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(number)                 # torch.manual_seed does this and much more, a hundred times slower
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(number)


class Batches(torch.utils.data.Dataset):
    """The batches of a run: `batches[step]` is a pure function of (seed, step, process), so a run can go on anywhere.

    Every epoch goes through a new permutation in whole batches of `batch_size` images over all processes, of which this process
    gets its slice; the last few images that do not fill a batch wait for the next epoch's permutation. `len(batches)` is the
    number of steps in an epoch. An item is (list of crops (N, 3, size, size), indices (N,), list of broken images' indices).
    Raises UserError when the batch does not divide by the processes or is larger than the data set.
    """

    def __init__(self, data, crops, batch_size, seed):
        if batch_size % world_size():
            raise UserError(f"--batch-size {batch_size}: does not divide by the {world_size()} processes")
        if batch_size > len(data):
            raise UserError(f"--batch-size {batch_size}: larger than the data set of {len(data)} images")
        self.data, self.crops, self.batch_size, self.seed = data, crops, batch_size, seed
        self.epoch, self.order = -1, None

    def __len__(self):
        return len(self.data) // self.batch_size

    def indices(self, step):
        """(N,) which images this process has in `step`."""
        epoch, i = divmod(step, len(self))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, torch.from_numpy(np.random.default_rng([self.seed, epoch]).permutation(len(self.data)))
        share = self.batch_size // world_size()
        return self.order[i * self.batch_size:][rank() * share:][:share]

    def __getitem__(self, step):
        return self.data.crop(self.indices(step), self.crops, self.seed, step)


class InOrder(torch.utils.data.Dataset):
    """This process's images, every `world_size()`-th, in order and by pieces: what evaluation goes through."""

    def __init__(self, data, crops, piece=256):
        self.data, self.crops = data, crops
        share = math.ceil(len(data) / world_size())             # as many for each: the last wrap around, and `_in_order` drops them
        self.pieces = (torch.arange(share) * world_size() + rank()).remainder(len(data)).split(piece)

    def __len__(self):
        return len(self.pieces)

    def __getitem__(self, i):
        if i >= len(self):
            raise IndexError(i)
        return self.data.crop(self.pieces[i], self.crops, 0)


def stream(batches, steps, workers, device):
    """Yield `batches[step]` for `step` in `steps` with the crops as float32 in 0..1 on `device`. Files are read in `workers` processes."""
    apart = batches.data.in_workers and workers > 0
    loader = torch.utils.data.DataLoader(batches, batch_size=None, sampler=steps, num_workers=workers if apart else 0,
                                         pin_memory=apart and device.type == "cuda", worker_init_fn=_start_worker if apart else None)
    for views, indices, broken in loader:
        views = [v.to(device, non_blocking=True) for v in views]
        yield [v.contiguous().float() / 255 if v.dtype == torch.uint8 else v for v in views], indices, broken


def note_broken(data, broken):
    """Name each image that could not be read once. Raises UserError when they are more than 1 % of the data set. All processes call it together."""
    if world_size() > 1:
        some = torch.tensor(len(broken))
        dist.all_reduce(some)
        if some:
            everyones = [None] * world_size()
            dist.all_gather_object(everyones, broken)
            broken = sum(everyones, [])
    for i in broken:
        if i not in data.broken:
            data.broken.add(i)
            say(f"cannot read {data.paths[i]}; another image takes its place ({len(data.broken)} broken so far)")
    if broken and len(data.broken) > 0.01 * len(data):
        raise UserError(f"{len(data.broken)} of {len(data)} images cannot be read, more than 1 %; the last is {data.paths[broken[-1]]}")


def _start_worker(_):
    for s in SIGNALS:                                           # the training process decides when to stop
        signal.signal(s, signal.SIG_IGN)


# ---------------------------------------------------------------- 1. data: crops

class Crop(NamedTuple):
    """`count` random crops an image, resized to `size` x `size`: area a share of the image uniform in `scale`, aspect ratio log-uniform in
    `ratio`, ten tries and then the largest central crop, as torchvision's RandomResizedCrop draws them; mirrored left and right with probability
    `flip`, which costs nothing here."""
    count: int
    size: int
    scale: tuple = (0.08, 1.0)
    ratio: tuple = (3 / 4, 4 / 3)
    interpolation: str = "bilinear"
    flip: float = 0.0

    def boxes(self, n, height, width):
        """n boxes (n, 4) as top, left, height, width: float32 that hold whole numbers."""
        u = torch.rand(n, 22).numpy()                           # numpy: a worker draws for one image at a time, where torch's calls cost more than the work
        within = lambda u, low, high: low + (high - low) * u
        area, ratio = height * width * within(u[:, :10], *self.scale), np.exp(within(u[:, 10:20], *np.log(self.ratio, dtype=np.float32)))
        w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))              # (n, 10)
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        first = np.arange(n), fits.argmax(1)
        w, h = w[first], h[first]
        boxes = np.stack([np.floor(u[:, 20] * (height - h + 1)), np.floor(u[:, 21] * (width - w + 1)), h, w], 1)
        fallback_w, fallback_h = min(width, round(height * self.ratio[1])), min(height, round(width / self.ratio[0]))
        boxes[~fits[first]] = (height - fallback_h) // 2, (width - fallback_w) // 2, fallback_h, fallback_w
        return torch.from_numpy(boxes)


class CenterCrop(NamedTuple):
    """The test crop: the central square of `fraction` of the shorter side, resized to `size` x `size` (for 0.875 and 224: to 256 and the
    central 224, in one go). Images of up to 32 pixels are not cropped [SimCLR, data_util.py]."""
    size: int
    fraction: float = 0.875
    interpolation: str = "bilinear"
    count: int = 1
    flip: float = 0.0

    def boxes(self, n, height, width):
        side = round(min(height, width) * (1 if self.size <= 32 else self.fraction))
        return torch.tensor([[(height - side) // 2, (width - side) // 2, side, side]], dtype=torch.float32).expand(n, 4)


def resize_weights(start, length, source, size, interpolation="bilinear"):
    """(n, size, source) weights that resample the `length` pixels from `start` (both (n,)) of `source` to `size`, antialiased. A negative length goes
    backwards from `start`, which mirrors.

    Pillow's filters: a triangle, or Keys' cubic with a = -1/2, as wide as one source pixel or one target pixel, whichever is more.
    """
    step, end = (length / size)[:, None], start + length                                   # (n, 1), (n,)
    centre = start[:, None] + (torch.arange(size, device=start.device) + 0.5) * step       # (n, size)
    pixel = torch.arange(source, device=start.device) + 0.5
    outside = (pixel < torch.minimum(start, end)[:, None]) | (pixel > torch.maximum(start, end)[:, None])
    width = step.abs().clamp(min=1)
    d = ((pixel.masked_fill(outside, 1e6) / width)[:, None] - (centre / width)[:, :, None]).abs_()       # (n, size, source)
    if interpolation == "bilinear":
        weights = torch.sub(1, d, out=d).clamp_(min=0)
    else:
        weights = torch.where(d < 1, (1.5 * d - 2.5) * d * d + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2).mul_(d < 2)
    return weights.div_(weights.sum(-1, keepdim=True))


def resample(x, rows, columns, out=None):
    """rows @ x @ columns^T for every channel: (N, 3, H, W), (N, h, H), (N, w, W) -> (N, 3, h, w). Crop, resize and blur are all of this form."""
    return torch.matmul(rows[:, None], (x.flatten(1, 2) @ columns.mT).unflatten(1, x.shape[1:3]), out=out)


def crop_and_resize(images, crop):
    """`crop.count` views of each image, (N, 3, H, W) uint8 or float -> (count, N, 3, size, size) float32 in 0..1, every view with its own box."""
    n, channels, height, width = images.shape
    scale = 255 if images.dtype == torch.uint8 else 1
    if isinstance(crop, CenterCrop) and (height, width) == (crop.size, crop.size) and crop.size <= 32:
        return images[None].float() / scale
    top, left, h, w = crop.boxes(crop.count * n, height, width).view(crop.count, n, 4).to(images.device, non_blocking=True).unbind(2)
    mirrored = (torch.rand(crop.count, n) < crop.flip).float().to(images.device, non_blocking=True)
    left, w = left + mirrored * w, w - 2 * mirrored * w
    views = torch.empty(crop.count, n, channels, crop.size, crop.size, device=images.device)
    for part in pieces(torch.arange(n), images):
        part = slice(int(part[0]), int(part[-1]) + 1)
        x = images[part].float()
        for k, view in enumerate(views[:, part]):
            rows = resize_weights(top[k, part], h[k, part], height, crop.size, crop.interpolation)
            columns = resize_weights(left[k, part], w[k, part], width, crop.size, crop.interpolation)
            resample(x, rows.div_(scale), columns, out=view)
            if crop.interpolation != "bilinear":
                view.clamp_(0, 1)
    return views


def crop_one(image, crop):
    """The crops of a single image, (3, H, W) uint8 -> `count` of (1, 3, size, size) uint8, with torch's antialiased resize: what a worker does."""
    views = []
    for top, left, height, width in crop.boxes(crop.count, *image.shape[1:]).int().tolist():
        box = image[None, :, top:top + height, left:left + width].contiguous(memory_format=torch.channels_last)      # twice as fast that way
        view = F.interpolate(box, (crop.size, crop.size), mode=crop.interpolation, antialias=True)
        views.append(view.flip(3) if crop.flip and torch.rand(()) < crop.flip else view)
    return views


# ---------------------------------------------------------------- 1. data: pixel operations
# (N, 3, H, W) float32 in 0..1 -> the same, on the batch's device. Every image draws for itself, with probability `p` of being changed at all.
# Numbers are drawn on the CPU, which never has to wait for a GPU to know them. All of them work in place: they change the batch and return it.

def pieces(a, images):
    """`a` (N, ...) in pieces of so many of the `images` as stay in a CPU's cache, which makes what is done to them several times faster; on a GPU whole."""
    return [a] if images.device.type != "cpu" else a.split(max(1, 256 * 32 * 32 // (images.shape[2] * images.shape[3])))


def by_pieces(augment):
    """Decorator for a method's augmentation `augment(x, ...)`, which may work in place and keeps the shape: runs it on `pieces` of the batch."""
    @functools.wraps(augment)
    def over(x, *args, **kwargs):
        for piece in pieces(x, x):
            views = augment(piece, *args, **kwargs)
            if views is not piece:
                piece.copy_(views)
        return x
    return over


def _draw(x, low, high):
    """(N, 1, 1, 1) uniform numbers in low..high, on x's device."""
    return torch.empty(len(x), 1, 1, 1).uniform_(low, high).to(x.device, non_blocking=True)


def _choose(x, p):
    """(N, 1, 1, 1) booleans, True with probability p."""
    return _draw(x, 0, 1) < p


def _on_some(x, p, change):
    """`change` on a random choice of images, each with probability p."""
    chosen = (torch.rand(len(x)) < p).nonzero()[:, 0].to(x.device, non_blocking=True)
    return x.index_copy_(0, chosen, change(x.index_select(0, chosen)))


def flip(x, p=0.5):
    """Mirror left and right."""
    return _on_some(x, p, lambda x: x.flip(3))


def to_gray(x):
    """(N, 3, H, W) -> (N, 1, H, W), the luma of ITU-R 601 that torchvision and Pillow use."""
    return (0.2989 * x[:, :1]).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:], alpha=0.114)


def grayscale(x, p=0.2):
    """Replace the colours by their luma."""
    return _on_some(x, p, lambda x: to_gray(x).expand_as(x))


# The four parts of colour jitter. They are most of what augmentation costs, so they make as few passes over the pixels as they can.

def _brightness(x, factor):
    x.mul_(factor).clamp_(0, 1)


def _contrast(x, factor):
    """Blend with the mean luma of the image."""
    mean = (x.mean((2, 3)) * torch.tensor([0.2989, 0.587, 0.114], device=x.device)).sum(1)[:, None, None, None]
    x.mul_(factor).add_((1 - factor) * mean).clamp_(0, 1)


def _saturation(x, factor):
    """Blend with the luma of each pixel."""
    torch.lerp(to_gray(x), x, factor, out=x).clamp_(0, 1)


def _hue(x, shift):
    """Turn the hue of HSV by `shift` of the whole circle.

    With r, g, b taken to 0..1 between the least and the largest channel, the hue in sixths is 1 - r + g + b, with the sign of g - b: 0 at red, 2 at
    green, 4 at blue, so that no case by case is needed. Back again, with d the distance of the hue from 3, 2 and 4, cut to 1..2, red is d - 1 and
    the others 2 - d.
    """
    r, g, b = x.unbind(1)
    largest, least = torch.maximum(r, g), torch.minimum(r, g)
    torch.maximum(largest, b, out=largest), torch.minimum(least, b, out=least)
    chroma = largest - least
    hue = (g + b).sub_(r).sub_(least).add_(chroma).div_(torch.mul(chroma, 6, out=r).clamp_(min=1e-6))     # of the whole circle
    hue = hue.copysign_(torch.sub(g, b, out=r)).add_(shift[:, 0] + 2).frac_().mul_(6)                     # 2: makes it positive
    torch.sub(hue[:, None], torch.tensor([3.0, 2.0, 4.0], device=x.device)[:, None, None], out=x).abs_().clamp_(1, 2)
    torch.addcmul(least.sub_(chroma), r, chroma, out=r)
    largest.add_(chroma)
    for channel in (g, b):
        torch.addcmul(largest, channel, chroma, value=-1, out=channel)


def _shift(x, amount):
    x.add_(amount).clamp_(0, 1)


def color_jitter(x, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, p=0.8, chunk=64, additive=False):
    """torchvision's ColorJitter: factors uniform in max(0, 1 - b)..1 + b, hue shift in -hue..hue of the circle, clipped to 0..1 after each.

    A pair (low, high) instead of a number is the range itself. The order of the four is drawn anew for every `chunk` images, not for each.
    With `additive` the brightness is a shift in -b..b, as Inception's pipeline has it.
    """
    centred = lambda v, middle: v if isinstance(v, tuple) else (max(0, middle - v) if middle else -v, middle + v)
    steps = [(_shift if additive else _brightness, centred(brightness, 1 - additive)), (_contrast, centred(contrast, 1)),
             (_saturation, centred(saturation, 1)), (_hue, centred(hue, 0))]
    steps = [(adjust, r) for adjust, r in steps if r != ((0, 0) if adjust in (_shift, _hue) else (1, 1))]

    def jitter(x):
        factors = [_draw(x, *r) for _, r in steps]
        for i in range(0, len(x), chunk):
            for k in torch.randperm(len(steps)).tolist():
                steps[k][0](x[i:i + chunk], factors[k][i:i + chunk])
        return x

    return _on_some(x, p, jitter)


def gaussian_blur(x, p=0.5, sigma=(0.1, 2.0), kernel_size=None):
    """Gaussian blur, standard deviation uniform in `sigma` pixels, mirrored at the border; `kernel_size` (odd) taps, default all that matter."""
    size = x.shape[2:]
    radius = min(math.ceil(4 * sigma[1]) if kernel_size is None else kernel_size // 2, min(size) - 1)

    def blur(x):
        sd = torch.empty(len(x), 1, 1).uniform_(*sigma).to(x.device, non_blocking=True)
        rows = _blur_weights(sd, size[0], radius)
        return resample(x, rows, rows if size[0] == size[1] else _blur_weights(sd, size[1], radius))

    return _on_some(x, p, blur)


def _blur_weights(sd, n, radius):
    """(len(sd), n, n): row i holds the Gaussian around i, what falls outside folded back by reflection about the first and last pixel."""
    i, j = torch.arange(n, device=sd.device, dtype=torch.float32)[:, None], torch.arange(n, device=sd.device, dtype=torch.float32)
    far = torch.tensor(math.inf, device=sd.device)
    distances = torch.stack([j - i, torch.where(j > 0, j + i, far), torch.where(j < n - 1, 2 * (n - 1) - j - i, far)])
    distances = torch.where(distances.abs() <= radius, distances, far).square()            # (3, n, n): direct, and mirrored at either end
    weights = sum(torch.exp(d * (-0.5 / sd ** 2)) for d in distances)
    return weights / weights.sum(-1, keepdim=True)


def solarize(x, p=0.2, threshold=0.5):
    """Invert what is at least `threshold`."""
    return _on_some(x, p, lambda x: torch.where(x >= threshold, 1 - x, x))


def cutout(x, p=1.0, size=0.5, value=0.0):
    """Fill a square of `size` of the shorter side, centred anywhere and clipped at the border, with `value`."""
    height, width = x.shape[2:]
    half = size * min(height, width) / 2
    top, left = _draw(x, 0, height) - half, _draw(x, 0, width) - half
    row, column = torch.arange(height, device=x.device)[:, None] + 0.5, torch.arange(width, device=x.device) + 0.5
    inside = (row > top) & (row < top + 2 * half) & (column > left) & (column < left + 2 * half)
    return x.masked_fill_(inside & _choose(x, p), value)


def rotate(x, p=1.0):
    """Turn counter-clockwise by 0, 90, 180 or 270 degrees, equally likely. Square images only."""
    turns = torch.where(torch.rand(len(x)) < p, torch.randint(4, (len(x),)), 0)
    for k in (1, 2, 3):
        chosen = (turns == k).nonzero()[:, 0].to(x.device, non_blocking=True)
        x.index_copy_(0, chosen, x.index_select(0, chosen).rot90(k, (2, 3)))
    return x


def sobel(x, p=1.0):
    """Strength of the luma's gradient (Sobel's 3x3 filters over 4, so that a full step gives 1), on all three channels."""
    kernel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]], device=x.device) / 4

    def edges(x):
        gx, gy = F.conv2d(F.pad(to_gray(x), (1, 1, 1, 1), mode="replicate"), torch.stack([kernel, kernel.T])[:, None]).split(1, 1)
        return (gx * gx + gy * gy).sqrt_().clamp_(0, 1).expand_as(x)

    return _on_some(x, p, edges)


def noise(x, p=1.0, std=0.1):
    """Add Gaussian noise and clip to 0..1."""
    return _on_some(x, p, lambda x: x.add_(torch.randn(x.shape).to(x.device), alpha=std).clamp_(0, 1))


def warp(x, matrix, displacement=0.0):
    """Move the pixels: where an output pixel at (u, v), -1..1 from edge to edge, comes from, matrix (N, 2, 3) @ (u, v, 1) + displacement (N, H, W, 2).
    Bilinear; grey from outside."""
    if not len(x):
        return x
    grid = F.affine_grid(matrix.to(x), x.shape, align_corners=False) + displacement
    return (F.grid_sample(x - 0.5, grid, align_corners=False) + 0.5).clamp_(0, 1)


def _affine(x, a, b, c, d, tx=0.0, ty=0.0):
    """`warp` by the matrices [[a, b, tx], [c, d, ty]], each entry a number or (N,)."""
    entries = [torch.as_tensor(v, dtype=x.dtype, device=x.device).expand(len(x)) for v in (a, b, tx, c, d, ty)]
    return warp(x, torch.stack(entries, 1).view(-1, 2, 3))


def elastic(x, p=0.2, strength=0.05, shear=0.3):
    """A smooth random deformation, by `strength` of the side (the standard deviation at 4 x 4 control points), and a shear of up to `shear` either way."""

    def deform(x):
        control = (2 * strength * torch.randn(len(x), 2, 4, 4)).to(x.device, non_blocking=True)
        displacement = F.interpolate(control, x.shape[2:], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
        amount = _draw(x, -shear, shear).flatten()
        zero, one = torch.zeros_like(amount), torch.ones_like(amount)
        return warp(x, torch.stack([one, amount, zero, zero, one, zero], 1).view(-1, 2, 3), displacement)

    return _on_some(x, p, deform)


def color_curves(x, p=0.2, strength=0.1, knots=5):
    """Bend the colour histogram: each channel of each image through its own random curve, the identity plus noise of standard deviation `strength` at
    equally spaced knots, linear between them, clipped to 0..1."""

    def bend(x):
        offsets = (strength * torch.randn(knots, len(x), 3, 1, 1)).to(x.device, non_blocking=True)
        place = x * (knots - 1)
        return sum(((place - k).abs_().neg_().add_(1).clamp_(min=0) * offset for k, offset in enumerate(offsets)), x).clamp_(0, 1)

    return _on_some(x, p, bend)


def _changed(adjust, x, *args):
    """What an in-place operation makes of a copy."""
    x = x.clone()
    adjust(x, *args)
    return x


def _autocontrast(x, _):
    """Stretch each channel to 0..1; one that is flat stays."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    flat = (high <= low).float()
    return (x - low * (1 - flat)) / (high - low + flat)


def _equalize(x, _):
    from torchvision.transforms.v2.functional import equalize
    return equalize(x) if len(x) else x


def _sharpness(x, factor):
    """Blend with a 3x3 smoothing, as Pillow does; the border stays."""
    kernel = torch.tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]], device=x.device).div(13).expand(3, 1, 3, 3)
    smooth = x.clone()
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(x, kernel, groups=3)
    return torch.lerp(smooth, x, factor).clamp_(0, 1)


# AutoAugment's operations (Cubuk et al. 2018, table 6) with the range of their strength: f(x, strength (N, 1, 1, 1)).
PRIMITIVES = {
    "shear x": (lambda x, m: _affine(x, 1, m.flatten(), 0, 1), -0.3, 0.3),
    "shear y": (lambda x, m: _affine(x, 1, 0, m.flatten(), 1), -0.3, 0.3),
    "translate x": (lambda x, m: _affine(x, 1, 0, 0, 1, 2 * m.flatten()), -150 / 331, 150 / 331),      # shares of the side; 150 pixels of 331
    "translate y": (lambda x, m: _affine(x, 1, 0, 0, 1, 0, 2 * m.flatten()), -150 / 331, 150 / 331),
    "rotate": (lambda x, m: _affine(x, m.flatten().cos(), -m.flatten().sin(), m.flatten().sin(), m.flatten().cos()), -math.pi / 6, math.pi / 6),
    "auto-contrast": (_autocontrast, 0, 0),
    "invert": (lambda x, _: 1 - x, 0, 0),
    "equalize": (_equalize, 0, 0),
    "solarize": (lambda x, m: torch.lerp(x, 1 - x, (x >= m).to(x)), 0, 1),
    "posterize": (lambda x, m: (x * 255 / 2 ** m.floor()).floor() * 2 ** m.floor() / 255, 0, 5),       # bits dropped: 0 to 4
    "contrast": (functools.partial(_changed, _contrast), 0.1, 1.9),
    "color": (functools.partial(_changed, _saturation), 0.1, 1.9),
    "brightness": (functools.partial(_changed, _brightness), 0.1, 1.9),
    "sharpness": (_sharpness, 0.1, 1.9),
}


def autoaugment_primitives(x, count=2):
    """`count` operations of AutoAugment one after the other, each drawn for each image from all of `PRIMITIVES`, with a strength uniform in its range."""
    for _ in range(count):
        kinds, u = torch.randint(len(PRIMITIVES), (len(x),)), torch.rand(len(x), 1, 1, 1)
        order, sizes = kinds.argsort(stable=True), kinds.bincount(minlength=len(PRIMITIVES)).tolist()
        back = order.argsort().to(x.device, non_blocking=True)
        parts = x[order.to(x.device, non_blocking=True)].split(sizes)                      # the images of each operation side by side
        strengths = u[order].to(x.device, non_blocking=True).split(sizes)
        x = torch.cat([f(part, low + (high - low) * m) for (f, low, high), part, m in zip(PRIMITIVES.values(), parts, strengths)])[back]
    return x


def mixture(views, kind, alpha=1.0, beta=1.0, count=2, probability=0.1, decay=1.0):
    """Image mixture of 2020 (Shen et al., the CMC repository with `--IM`): images of a batch are mixed with others of it; the loss stays as it is.

    views: a list of (N, C, S, S), of any sizes; all views of an image are mixed alike, with the same views of the same other image. `kind` "global": up
    to `count` times, each with `probability`, x <- s x + (1 - s) x' with s from Beta(alpha, alpha). "region": likewise a square of the area 1 - s of x',
    s from Beta(beta, beta), centred anywhere and clipped at the border, takes its place in x, which in the first round is multiplied by `decay` before.
    "both": the one, then the other. Any other kind: nothing. In place.
    """
    n = len(views[0])
    for level, concentration in (("global", alpha), ("region", beta)):
        others = [x.clone() for x in views] if kind in (level, "both") else []
        for i in range(count if others else 0):
            chosen = (torch.rand(n) < probability).nonzero()[:, 0]
            other = (chosen + torch.randint(1, max(n, 2), chosen.shape)) % n
            share = torch.distributions.Beta(concentration, concentration).sample((n,))[chosen]
            centre = torch.rand(n, 2)[chosen]
            for x, y in zip(views, others):
                here, there = x[chosen.to(x.device)], y[other.to(x.device)]
                if level == "global":
                    mixed = there.lerp(here, share[:, None, None, None].to(x.device))
                else:
                    mixed = torch.where(_squares(1 - share, centre, x.shape[2]).to(x.device), there, here * decay if i == 0 else here)
                x.index_copy_(0, chosen.to(x.device), mixed)


def unmix(x, global_share=0.5, alpha=1.0):
    """Un-Mix (Shen et al. 2022): a batch (N, C, S, S) mixed with itself in reverse order, all images alike: (mixed, share).

    mixed[i] holds `share` of image i, a number, and mixed.flip(0)[i] the rest. The share is from Beta(alpha, alpha); with probability `global_share` the
    images are blended, otherwise a square of the other takes its place in each, and the share is what that really leaves.
    """
    share, centre = torch.distributions.Beta(alpha, alpha).sample((1,)), torch.rand(1, 2)
    if torch.rand(()) < global_share:
        return x.flip(0).lerp(x, share.item()), share.item()
    square = _squares(1 - share, centre, x.shape[2])
    return torch.where(square.to(x.device), x.flip(0), x), 1 - square.float().mean().item()


def _squares(area, centre, size):
    """(M,) shares of the image, (M, 2) in 0..1 -> (M, 1, size, size) booleans, True in squares of those areas, clipped at the border."""
    pixel = (torch.arange(size) + 0.5) / size
    near = (pixel - centre[:, :, None]).abs() < area.sqrt()[:, None, None] / 2             # (M, 2, size)
    return (near[:, 0, :, None] & near[:, 1, None, :])[:, None]


def normalize(x, mean, std):
    """(x - mean) / std a channel; mean and std are triples. In place as well."""
    return x.sub_(torch.tensor(mean, device=x.device)[:, None, None]).div_(torch.tensor(std, device=x.device)[:, None, None])


# ---------------------------------------------------------------- 2. ResNets

DEPTHS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3),
          161: (3, 4, 46), 200: (3, 24, 36, 3)}
NORMS = {"batch": nn.BatchNorm2d, "layer": lambda channels: nn.GroupNorm(1, channels)}


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, channels, width, stride, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = norm(width)
        self.downsample = _shortcut(channels, width, stride, norm)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, channels, width, stride, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)      # the stride is here, as in torchvision, not in conv1
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = norm(4 * width)
        self.downsample = _shortcut(channels, 4 * width, stride, norm)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


def _shortcut(channels, out, stride, norm):
    if stride == 1 and channels == out:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), norm(out))


class PreBasicBlock(nn.Module):
    """The block of version 2: norm and ReLU come before each convolution, and nothing after the sum."""
    expansion = 1

    def __init__(self, channels, width, stride, norm):
        super().__init__()
        self.bn1 = norm(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn2 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.downsample = nn.Conv2d(channels, width, 1, stride, bias=False) if stride > 1 or channels != width else None

    def forward(self, x):
        y = F.relu(self.bn1(x))
        x = self.downsample(y) if self.downsample else x
        return x + self.conv2(F.relu(self.bn2(self.conv1(y))))


class PreBottleneck(nn.Module):
    expansion = 4

    def __init__(self, channels, width, stride, norm, out=None):
        super().__init__()
        out = out or 4 * width
        self.bn1 = norm(channels)
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn2 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn3 = norm(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.downsample = nn.Conv2d(channels, out, 1, stride, bias=False) if stride > 1 or channels != out else None

    def forward(self, x):
        y = F.relu(self.bn1(x))
        x = self.downsample(y) if self.downsample else x
        y = self.conv2(F.relu(self.bn2(self.conv1(y))))
        return x + self.conv3(F.relu(self.bn3(y)))


class ResNet(nn.Module):
    """He et al. 2015, and 2016 for version 2. Use `resnet` to build one. `.dim` is the width of the output; parameter names are torchvision's."""

    def __init__(self, depth, multiplier, norm, stem, stages, version, in_channels, stem_width):
        super().__init__()
        blocks_of = {(False, 1): BasicBlock, (True, 1): Bottleneck, (False, 2): PreBasicBlock, (True, 2): PreBottleneck}
        block, make_norm = blocks_of[depth >= 50, version], NORMS[norm]
        widths = [max(1, round(64 * multiplier * 2 ** i)) for i in range(stages)]
        channels = stem_width or widths[0]
        if stem == "small":
            self.conv1, self.maxpool = nn.Conv2d(in_channels, channels, 3, 1, 1, bias=False), nn.Identity()
        else:
            self.conv1, self.maxpool = nn.Conv2d(in_channels, channels, 7, 2, 3, bias=False), nn.MaxPool2d(3, 2, 1)
        self.bn1 = make_norm(channels) if version == 1 else None
        for i, (width, blocks) in enumerate(zip(widths, DEPTHS[depth])):
            layer, out = [], width * block.expansion
            if depth == 161 and i == 2:                         # 512-4096 where ResNet-101 has 256-1024
                width, out, block = 2 * width, 4 * out, functools.partial(block, out=4 * out)
            for j in range(blocks):
                layer.append(block(channels, width, 2 if i > 0 and j == 0 else 1, make_norm))
                channels = out
            setattr(self, f"layer{i + 1}", nn.Sequential(*layer))
        self.dim, self.stages = channels, stages
        self.last_bn = make_norm(channels) if version == 2 else None
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def maps(self, x):
        """(N, 3, H, W) -> (N, dim, h, w), the grid before pooling."""
        x = self.conv1(x)
        x = self.maxpool(F.relu(self.bn1(x)) if self.bn1 else x)
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return F.relu(self.last_bn(x)) if self.last_bn else x

    def forward(self, x):
        """(N, 3, H, W) -> (N, dim)."""
        return self.maps(x).mean((2, 3))


def parse_arch(arch):
    """"resnet50x2" -> (50, 2.0)"""
    match = re.fullmatch(r"resnet(\d+)(?:x(\d*\.?\d+))?", arch)
    if not match or int(match[1]) not in DEPTHS or float(match[2] or 1) <= 0:
        raise ValueError(f"{arch!r} is not resnet{', resnet'.join(map(str, DEPTHS))}, or one of them with a width: resnet50x2, resnet18x0.25")
    return int(match[1]), float(match[2] or 1)


def resnet(arch, norm="batch", stem="imagenet", zero_init=False, stages=None, version=None, in_channels=3, stem_width=None):
    """Build a ResNet: `arch` is resnet10, 18, 34, 50, 101, 152 or 200, with a width multiplier or fraction: resnet50x2, resnet18x0.25; or CPC's
    resnet161, whose third stage of 46 wide blocks is the last.

    `norm` "layer" normalises each image over (C, H, W) and shares no statistics; `stem` "small" is 3x3 without max-pooling, for 32-96
    pixel images. `stages` leaves out those after it. `version` 2 puts norm and ReLU before the convolutions, as in resnet161. `zero_init` starts
    every residual branch of version 1 at zero (last norm's scale). `in_channels` and `stem_width` are what the stem takes and gives. The result has `.dim`,
    `.maps(x)` and `.config`, the keyword arguments that build it again. Raises ValueError for anything else.
    """
    depth, multiplier = parse_arch(arch)
    stages = stages or len(DEPTHS[depth])
    version = version or (2 if depth == 161 else 1)
    for name, value, known in (("norm", norm, NORMS), ("stem", stem, ("imagenet", "small")), ("stages", stages, range(1, len(DEPTHS[depth]) + 1)),
                               ("version", version, (2,) if depth == 161 else (1, 2))):
        if value not in known:
            raise ValueError(f"{name} {value!r} is not one of {', '.join(map(str, known))}")
    model = ResNet(depth, multiplier, norm, stem, stages, version, in_channels, stem_width)
    model.config = dict(arch=arch, norm=norm, stem=stem, stages=stages, version=version, in_channels=in_channels, stem_width=stem_width)
    if zero_init:
        for block in model.modules():
            if isinstance(block, (BasicBlock, Bottleneck)):
                nn.init.zeros_((block.bn2 if isinstance(block, BasicBlock) else block.bn3).weight)
    return model


# ---------------------------------------------------------------- 3. LARS

class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017), as SimCLR and BYOL use it.

        u = g + weight_decay * w
        trust = trust_coefficient * |w| / |u|,   1 where either norm is 0
        SimCLR, `lr_in_momentum`:   v <- momentum * v + lr * trust * u,   w <- w - v
        BYOL, not:                  v <- momentum * v + trust * u,        w <- w - lr * v       (the same while lr is constant)

    Biases and norm scales, that is parameters of at most one dimension, get neither decay nor trust.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0, trust_coefficient=1e-3, lr_in_momentum=True):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust_coefficient=trust_coefficient,
                                      lr_in_momentum=lr_in_momentum))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                u = w.grad
                if w.ndim > 1:
                    u = u + group["weight_decay"] * w
                    w_norm, u_norm = w.norm(), u.norm()
                    u = u * torch.where((w_norm > 0) & (u_norm > 0), group["trust_coefficient"] * w_norm / u_norm, 1.0)
                if "momentum_buffer" not in self.state[w]:
                    self.state[w]["momentum_buffer"] = torch.zeros_like(w)
                v = self.state[w]["momentum_buffer"]
                inside, outside = (group["lr"], 1) if group["lr_in_momentum"] else (1, group["lr"])
                v.mul_(group["momentum"]).add_(u, alpha=inside)
                w.sub_(v, alpha=outside)
        return loss


@torch.no_grad()
def larc_(parameters, trust_coefficient=1e-3, weight_decay=0.0, eps=1e-8):
    """The LARS of apex, LARC without clipping, that SwAV and SimSiam's probe use: call it between `backward` and an SGD step without decay.

        g <- trust_coefficient * |w| / (|g| + weight_decay * |w| + eps) * (g + weight_decay * w),   unchanged where either norm is 0
    """
    for w in parameters:
        if w.grad is not None:
            w_norm, g_norm = w.norm(), w.grad.norm()
            trust = trust_coefficient * w_norm / (g_norm + weight_decay * w_norm + eps)
            w.grad.copy_(torch.where((w_norm > 0) & (g_norm > 0), trust * (w.grad + weight_decay * w), w.grad))


# ---------------------------------------------------------------- 4. the run's books: processes, flags, the end of a run

def rank():
    """This process's number, 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank():
    """This process's number on this machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def say(message):
    """Print for a person, in one process only."""
    if rank() == 0:
        print(message, file=sys.stderr, flush=True)


SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]      # Windows has no SIGUSR1
_stop_signal, _stepping = None, False                           # the signal that asked this process to stop; whether a loop will see to it


def _on_signal(number, _):
    global _stop_signal
    if _stop_signal == number == signal.SIGINT:                 # Ctrl-C for the second time: at once
        raise KeyboardInterrupt
    _stop_signal = number
    if not _stepping:
        raise Stopped(f"stopped by {signal.Signals(number).name}")


def start():
    """Join the processes that torchrun started, NCCL on GPUs and gloo on CPUs, or be the only one. Returns this process's device."""
    cuda = torch.cuda.is_available()
    if cuda and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
        raise UserError(f"--nproc_per_node {os.environ['LOCAL_WORLD_SIZE']}: there are only {torch.cuda.device_count()} GPUs here")
    if cuda:
        torch.cuda.set_device(local_rank())
    if "RANK" in os.environ:
        store, _, _ = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":           # on one machine torchrun's store outlives a restart, with the addresses of the dead
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank(), world_size=world_size())
    return torch.device("cuda", local_rank()) if cuda else torch.device("cpu")


def asked_to_stop(last=False):
    """Whether a signal asked for the end, in any of the processes, for a loop of steps: from the first call to the last a signal waits for the next
    one, at which all processes learn of it."""
    global _stepping
    _stepping = not last
    flag = torch.tensor(int(_stop_signal is not None))
    if world_size() > 1:
        dist.all_reduce(flag)
    return bool(flag)


class Stopped(BaseException):
    """A signal ended the run, and all is saved."""


def launch(main, args, stoppable=True):
    """Run `main(args, device)` in every process and exit: 0 when done, 2 after a UserError, 130 after Ctrl-C; and 0 after SIGTERM or SIGUSR1 where
    the program is `stoppable`, which a training run is: the same command goes on with it."""
    for s in SIGNALS if stoppable else ():
        signal.signal(s, _on_signal)
    status = 0
    try:
        main(args, start())
        if dist.is_initialized():
            dist.barrier()
    except Stopped as e:
        say(str(e))
        status = 130 if _stop_signal == signal.SIGINT else 0
    except UserError as e:
        if local_rank() == 0:                                   # not rank 0 alone: the mistake may be one machine's
            print(f"{Path(sys.argv[0]).name}: error: {e}", file=sys.stderr, flush=True)
        else:                                                   # torchrun ends the others as soon as one is gone: let local rank 0 come to its line
            for s in SIGNALS:
                signal.signal(s, signal.SIG_DFL)
            time.sleep(10)
        status = 2
    except KeyboardInterrupt:
        say("stopped at once")
        status = 130
    except Exception:                                           # printed here, since on the way out the reading processes would be waited for
        traceback.print_exc()
        status = 1
    if dist.is_initialized():
        if status:                                              # others may be waiting for this process: do not wait for them
            sys.stdout.flush()
            os._exit(status)
        dist.destroy_process_group()
    sys.exit(status)


def _number(kind, low, text, inclusive=False):
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not (value >= low if inclusive else value > low) or math.isinf(value):
        what = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"{text!r} is not a {what} {'of at least' if inclusive else 'above'} {low}")
    return value


positive = lambda text: _number(float, 0, text)
not_negative = lambda text: _number(float, 0, text, inclusive=True)
count = lambda text: _number(int, 1, text, inclusive=True)
whole = lambda text: _number(int, 0, text, inclusive=True)


def seed(text):
    """What torch and numpy take as one."""
    value = whole(text)
    if value >= 2 ** 63:
        raise argparse.ArgumentTypeError(f"{text!r} is not below 2 ** 63")
    return value


def share(text):
    """A probability or a share of an area, in 0..1."""
    value = not_negative(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number in 0..1")
    return value


def _arch(text):
    try:
        parse_arch(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None
    return text


def data_name(text):
    """A data set's name or a directory, for argparse."""
    if text not in DATA and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is neither {', '.join(DATA)} nor a directory")
    return text


class LineParser(argparse.ArgumentParser):
    """argparse, with the error on one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n" if rank() == 0 else None)


class Parser(LineParser):
    """The flags that all method scripts share. A recipe, chosen by `--data` or `--recipe`, gives the defaults that `--help` shows."""

    def __init__(self, doc, recipes, argv=None):
        super().__init__(description=doc.strip().splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
        self.argv = sys.argv[1:] if argv is None else argv
        add = self.add_argument
        add("--data", type=data_name, default="shapes", metavar="NAME|DIR", help=f"{', '.join(DATA)}, or a directory of images")
        add("--root", default="data", help="where the named data sets lie or are downloaded to")
        add("--recipe", choices=list(recipes), help="the set of defaults; without it, by the data")
        add("--arch", type=_arch, help="resnet10 ... resnet200 with a width: resnet50x2, resnet18x0.25")
        add("--stem", choices=["imagenet", "small"], help="small: 3x3 and no max-pooling, for 32-96 pixels")
        add("--size", type=count, help="side of the crops in pixels")
        add("--epochs", type=count, help="passes over the data")
        add("--batch-size", type=count, help="images in a batch over all processes")
        add("--lr", type=positive, help="learning rate per 256 images")
        add("--weight-decay", type=not_negative, help="of the optimizer")
        add("--warmup-epochs", type=not_negative, help="epochs in which the rate rises")
        add("--workers", type=whole, default=min(16, os.cpu_count() or 1), help="processes that read image files, for each training process")
        add("--seed", type=seed, default=0, help="of everything that is drawn")
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        add("--precision", choices=["bf16", "fp32"], default="bf16" if bf16 else "fp32", help="of the network; losses are float32")
        add("--compile", action="store_true", help="torch.compile the model")
        add("--output", metavar="DIR", help="the run's folder; without it runs/<method>-<data>-<arch>")
        add("--knn-every", type=whole, help="epochs between measurements of kNN accuracy, 0: only at the end")
        add("--log-every", type=count, default=10, help="steps between lines of log.jsonl")
        add("--save-every", type=count, default=100, help="steps between checkpoints")
        early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        early.add_argument("--data", default="shapes")
        early.add_argument("--recipe")
        early.error = self.error
        known = early.parse_known_args(self.argv)[0]
        name = known.recipe or ("shapes" if known.data == "shapes" else "small" if known.data in DATA else "imagenet")
        self.recipe = dict(recipes.get(name, {}), recipe=name)

    def add_mixture(self):
        """The flags of `mixture` and `unmix`, with the defaults of the official code."""
        add = self.add_argument
        add("--mixture", choices=["none", "global", "region", "both", "unmix"], default="none",
            help="of images. global, region, both: blends or squares of other images in some images, alike in all their views, the loss as it is "
            "(2020). unmix: a blend or squares of the batch with itself in reverse, besides the views, the loss weighed by the shares (2022)")
        add("--mix-alpha", type=positive, default=1.0, help="shares are drawn from Beta(alpha, alpha), in blends and in unmix")
        add("--mix-beta", type=positive, default=1.0, help="the same of squares")
        add("--mix-count", type=count, default=2, help="how often an image may be blended, and how often given a square")
        add("--mix-probability", type=share, default=0.1, help="of each of these")
        add("--mix-decay", type=share, default=1.0, help="of the pixels of an image before its first square")
        add("--unmix-global", type=share, default=0.5, help="probability that unmix blends; otherwise squares")

    def parse(self):
        self.set_defaults(**self.recipe)
        return self.parse_args(self.argv)


# ---------------------------------------------------------------- 4. the run's books: checkpoints

CHECKPOINT_KEYS = ("method", "args", "epoch", "step", "encoder", "encoder_config", "input", "model", "optimizer")


def read_checkpoint(path):
    """A checkpoint of ours as a dict, on the CPU. Never runs code from the file. Raises UserError when it is not one, whole and readable."""
    checkpoint = read_tensors(path)
    missing = [k for k in CHECKPOINT_KEYS if k not in checkpoint] if isinstance(checkpoint, dict) else CHECKPOINT_KEYS
    if missing:
        raise UserError(f"{path}: not a checkpoint of these scripts, it lacks {', '.join(missing)}")
    return checkpoint


def read_tensors(path):
    """What `torch.save` wrote, on the CPU, if it is made of tensors and plain values (and the flags of argparse, which many projects save beside
    them). Never runs code from the file. Raises UserError for any other file."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as e:                                      # torch raises half a dozen kinds for a damaged or foreign file
        wants = re.search(r"nsupported.*?(?:GLOBAL|class|function) ([\w.]+)", str(e))
        if wants:
            raise UserError(f"{path}: holds more than tensors ({wants[1]}), and reading that could run code, which is refused; if you trust its "
                            "source, save its state dict alone where nothing can be harmed, in a container, and give that file") from None
        why = "no file of torch.save" if isinstance(e, pickle.UnpicklingError) else _first_line(e)      # torch would advise what is unsafe
        raise UserError(f"{path}: not a readable checkpoint ({why})") from None


def write_atomically(path, write):
    """Call `write(file)` on a new file beside `path`, then put it in its place: `path` is always whole, the old one or the new one."""
    aside = f"{path}.new"
    try:
        with open(aside, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as e:                        # torch.save reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            os.remove(aside)
        raise UserError(f"{path}: could not be written ({_first_line(e)}); what was there before is as it was") from None


def _first_line(e):
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:200]


class Run:
    """The books of a training run. `for step, crops, indices in run:` gives the batches from where the run stands; the loop calls `log` in each step.

    The folder `--output` gets checkpoint.pt, log.jsonl, curves.png and views.png. A checkpoint that is already there is gone on from, if it was made
    with the same settings. Every `--save-every` steps, at the end and on SIGTERM, SIGUSR1 or Ctrl-C the checkpoint is replaced; a loss that is not
    finite ends the run before that. `mean` and `std` are how the method normalises its images, for those who use the encoder later; a loss that
    stays at `collapsed_loss` after the first epoch is called a collapse. `encoder` is the one that is kept and measured, where that is not `model.encoder`;
    `entries(loss)`, of a log line's mean loss, gives what else that line has.
    Raises UserError for a folder, file or loss that is no good, Stopped after a signal.
    """

    FREE = {"output", "root", "workers", "knn_every", "log_every", "save_every"}     # settings that may change when a run goes on

    def __init__(self, method, args, model, optimizer, batches, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), collapsed_loss=None, encoder=None,
                 entries=lambda loss: {}):
        self.method, self.args, self.model, self.optimizer, self.batches = method, args, model, optimizer, batches
        self.collapsed_loss, self.encoder, self.entries = collapsed_loss, model.encoder if encoder is None else encoder, entries
        self.input = dict(size=args.size, mean=list(mean), std=list(std), interpolation=batches.crops[0].interpolation)
        self.device = next(model.parameters()).device
        self.total = args.epochs * len(batches)
        self.labelled = has_labels(args.data)
        if self.labelled:                                       # a mistake in the test data should not wait for the first measurement
            load_data(args.data, args.root, "val", self.device)
        self.step, self.losses, self.z_std, self.knn = 0, [], None, None
        self.folder = Path(args.output or f"runs/{method}-{Path(args.data).name}-{args.arch}")
        self.checkpoint, self.log_file = self.folder / "checkpoint.pt", self.folder / "log.jsonl"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"--output {self.folder}: {_first_line(e)}") from None
        if self.checkpoint.exists():
            self._resume()
        if world_size() > 1:
            steps = [None] * world_size()
            dist.all_gather_object(steps, self.step)
            if len(set(steps)) > 1:
                raise UserError(f"--output {self.folder}: the processes do not see the same checkpoint; it must lie on a disk that they share")
        if rank() == 0:
            self._trim_log()

    def _resume(self):
        saved = read_checkpoint(self.checkpoint)
        if saved["method"] != self.method:
            raise UserError(f"{self.checkpoint}: made by {saved['method']}.py; give another --output")
        now = vars(self.args)
        differing = [f"--{k.replace('_', '-')} {saved['args'].get(k)} (now {now.get(k)})" for k in sorted(now.keys() | saved["args"].keys())
                     if k not in self.FREE and now.get(k) != saved["args"].get(k)]
        if differing:
            raise UserError(f"{self.checkpoint}: made with other settings: {', '.join(differing)}; use the same or give another --output")
        try:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step, self.losses, self.lr, self.z_std, self.knn = (saved[k] for k in ("step", "losses", "lr", "z_std", "knn"))
        except (KeyError, ValueError, RuntimeError) as e:
            raise UserError(f"{self.checkpoint}: from another version of {self.method}.py ({_first_line(e)}); give another --output") from None
        say(f"going on from step {self.step} of {self.total} in {self.checkpoint}")

    def _save(self):
        self._settle_losses()
        if not torch.stack([w.detach().float().norm() for w in self.model.parameters()]).isfinite().all():
            raise UserError(f"the weights are not finite after step {self.step} at learning rate {self.lr:.3g}; try a lower --lr, longer "
                            f"--warmup-epochs or --precision fp32. The last good checkpoint is in {self.folder}")
        if rank() == 0:
            content = dict(method=self.method, args=vars(self.args), epoch=self.step // len(self.batches), step=self.step,
                           encoder=self.encoder.state_dict(), encoder_config=self.encoder.config, input=self.input,
                           model=self.model.state_dict(), optimizer=self.optimizer.state_dict(),
                           losses=self.losses, lr=self.lr, z_std=self.z_std, knn=self.knn)
            write_atomically(self.checkpoint, lambda f: torch.save(content, f))

    def _trim_log(self):
        """Drop the lines that were written after the checkpoint, and a line that a kill cut in two."""
        kept = []
        with contextlib.suppress(FileNotFoundError, ValueError):
            for line in self.log_file.read_text(errors="replace").splitlines():
                if json.loads(line)["step"] > self.step:
                    break
                kept.append(line + "\n")
        write_atomically(self.log_file, lambda f: f.write("".join(kept).encode()))

    # ------------------------------------------------------------ the steps

    def __iter__(self):
        global _stepping
        _stepping = True                                        # from here on a signal waits for the end of the step
        if self.step == 0:
            say(f"{self.method} on {self.args.data}: {len(self.batches.data)} images, {self.total} steps, into {self.folder}")
        self._start_clock()
        if self.losses and self._due()[0]:                      # ended between the last step's checkpoint and its log line
            self._log_line(self._due()[1])
            self._save()
        if self.step == self.total:
            say("this run is finished")
        ready = stream(self.batches, range(self.step, self.total), self.args.workers, self.device)
        self._start_clock()
        for step in range(self.step, self.total):
            begin = time.perf_counter()
            crops, indices, broken = next(ready)
            self.waited += time.perf_counter() - begin
            stop, self.indices = asked_to_stop(), indices
            note_broken(self.batches.data, broken)
            seed_all(self.args.seed, step, rank(), 1)           # 1: another stream of numbers than the crops'
            yield step, crops, indices
            self.step = step + 1
            self._after_step(stop)
        _stepping = False
        if self.knn is not None:
            say(f"{self.method} on {self.args.data}: kNN accuracy {self.knn:.1f} % after {self.args.epochs} epochs; {self.checkpoint}")

    def log(self, loss, lr, z, views):
        """Once in every step: the loss (scalar tensor), the rate, the projections (N, d), for z_std, and the list of views, for views.png."""
        self.losses.append(loss.detach())
        self.lr, self.z = lr, z.detach()
        if rank() == 0 and not (self.folder / "views.png").exists():
            self._draw_views(views)

    def _due(self):
        """Whether a log line is due after this step, and whether kNN accuracy is."""
        last, (epoch, within), every = self.step == self.total, divmod(self.step, len(self.batches)), self.args.knn_every
        measure = self.labelled and (last or bool(every) and within == 0 and epoch % every == 0)
        return last or measure or self.step % self.args.log_every == 0, measure

    def _after_step(self, stop):
        last, (log, measure) = self.step == self.total, self._due()
        if last:
            self._save()                                        # whatever becomes of the measurement
        if log:
            self._log_line(measure)
        if last or stop or self.step % self.args.save_every == 0:
            self._save()
        if stop and not last:
            name = signal.Signals(_stop_signal).name if _stop_signal else "a signal to another process"
            raise Stopped(f"stopped by {name} after step {self.step} of {self.total}; the same command goes on from {self.checkpoint}")

    def _settle_losses(self):
        """Turn what the steps since the last log line left into numbers, the losses averaged over the processes; stop at one that is not finite."""
        fresh = [i for i, loss in enumerate(self.losses) if torch.is_tensor(loss)]
        if fresh:
            self.z_std = round(F.normalize(self.z.float(), dim=1).std(0).mean().item() * self.z.shape[1] ** 0.5, 4)
            values = torch.stack([self.losses[i].float() for i in fresh])
            if world_size() > 1:
                dist.all_reduce(values)
                values /= world_size()
            for i, value in zip(fresh, values.tolist()):
                self.losses[i] = value
                if not math.isfinite(value):
                    raise UserError(f"the loss is {value} in step {self.step - len(self.losses) + i + 1} at learning rate {self.lr:.3g}; try a "
                                    f"lower --lr, longer --warmup-epochs or --precision fp32. The last good checkpoint is in {self.folder}")

    # ------------------------------------------------------------ log and pictures

    def _start_clock(self):
        self.clock, self.clock_step, self.waited = time.perf_counter(), self.step, 0.0

    def _log_line(self, measure):
        self._settle_losses()
        seconds = max(1e-9, time.perf_counter() - self.clock)
        rate = (self.step - self.clock_step) * self.args.batch_size / seconds
        line = dict(epoch=self.step // len(self.batches), step=self.step, loss=sum(self.losses) / len(self.losses), lr=self.lr,
                    images_per_second=round(rate, 1), waiting=round(self.waited / seconds, 4), z_std=self.z_std)
        line.update(self.entries(line["loss"]))
        self.losses = []
        if self.collapsed_loss and self.step > len(self.batches) and abs(line["loss"] / self.collapsed_loss - 1) < 0.005:
            line["collapsed"] = True
            say(f"the loss stays at ln K = {self.collapsed_loss:.3f}, that of equal shares: a collapse")
        if measure:
            line["knn"] = self.knn = round(self._measure_knn(), 2)
        if rank() == 0:
            try:
                with open(self.log_file, "a") as f:
                    f.write(json.dumps(line) + "\n")
            except OSError as e:
                raise UserError(f"{self.log_file}: could not be written ({_first_line(e)}); the checkpoint before is as it was") from None
            self._progress(line, (self.total - self.step) * self.args.batch_size / max(rate, 1e-9))
            if measure or self.step == self.total:
                draw_curves([self.folder], self.folder / "curves.png")
        self._start_clock()

    def _measure_knn(self):
        if world_size() > 1:                                    # BatchNorm's running statistics may be each process's own
            for buffer in self.encoder.buffers():
                dist.broadcast(buffer, 0)
        bank, queries = (features(self.encoder, load_data(self.args.data, self.args.root, split, self.device), self.input, self.args.workers,
                                  self.args.precision) for split in ("train", "val"))
        return knn_accuracy(*bank, *queries)

    def _progress(self, line, seconds_left):
        left = f"{seconds_left / 3600:.1f} h" if seconds_left > 5400 else f"{seconds_left / 60:.1f} min"
        text = (f"epoch {line['step'] / len(self.batches):.1f}/{self.args.epochs}  loss {line['loss']:.4f}  "
                f"{line['images_per_second']:.0f} images/s  {left} left" + (f"  kNN {self.knn:.1f} %" if self.knn is not None else ""))
        if sys.stderr.isatty():
            print(f"\r\033[K{text}", end="\n" if "knn" in line or self.step == self.total else "", file=sys.stderr, flush=True)
        elif "knn" in line or time.perf_counter() - getattr(self, "told", -math.inf) > 10:
            self.told = time.perf_counter()
            say(text)

    def _draw_views(self, views):
        """A row for each of the first images of this batch: the image and its views."""
        indices = self.indices[:8]
        originals = self.batches.data.crop(indices, [CenterCrop(self.args.size, 1.0)], 0)[0][0].float().cpu()
        originals = originals / (255 if self.batches.data.in_workers else 1)
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.input["mean"], self.input["std"]))
        columns = [originals] + [v[:8].detach().float().cpu() * std + mean for v in views]
        plt = pyplot()
        figure, axes = plt.subplots(len(indices), len(columns), figsize=(1.3 * len(columns), 1.3 * len(indices) + 0.3), squeeze=False,
                                    layout="constrained")
        for row, ax_row in enumerate(axes):
            for column, (images, ax) in enumerate(zip(columns, ax_row)):
                ax.imshow(images[row].permute(1, 2, 0).clamp(0, 1), interpolation="nearest")
                ax.axis("off")
                if row == 0:
                    ax.set_title("image" if column == 0 else f"view {column}", fontsize=9)
        save_picture(figure, self.folder / "views.png")


def draw_curves(folders, path):
    """Loss, kNN accuracy, spread of z and learning rate of the runs in `folders`, a line each, as a PNG."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
    titles = dict(loss="loss", knn="kNN accuracy, %", z_std="spread of z (about 1: healthy, 0: collapsed)", lr="learning rate")
    for folder in map(Path, folders):
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for ax, key in zip(axes.flat, titles):
            points = [(line["step"], line[key]) for line in lines if key in line]
            ax.plot(*zip(*points) if points else ([], []), marker="o" if key == "knn" else "", label=folder.name)
    for ax, title in zip(axes.flat, titles.values()):
        ax.set(title=title, xlabel="step")
        ax.grid(alpha=0.3)
    axes[1, 0].set_ylim(0, 1.1)
    axes[1, 1].set_ylim(bottom=0)
    axes[0, 0].legend()
    save_picture(figure, path)


def pyplot():
    """matplotlib.pyplot that draws into files and needs no screen."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def save_picture(figure, path):
    write_atomically(path, lambda f: figure.savefig(f, dpi=110, format="png"))
    pyplot().close(figure)


# ---------------------------------------------------------------- 4. the run's books: features and nearest neighbours

@torch.no_grad()
def features(encoder, data, input, workers=0, precision="fp32"):
    """`encoder` on the test crop of every image of `data`, BatchNorm in eval mode: h (n, D) and labels (n,) on its device, in order.

    `input` is a checkpoint's: size, mean, std, interpolation, and `fraction` of the central crop if not 0.875. h is float32, or half precision where
    float32 would take more than a gigabyte: ImageNet's 1.28 million times 2048 take 5.2 GB. Several processes share the work and all get the result.
    """
    device = next((p.device for p in encoder.parameters()), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    training = encoder.training
    encoder.eval()
    pieces = InOrder(data, [CenterCrop(input["size"], input.get("fraction", 0.875), input["interpolation"])])
    h, used = None, []
    for (x,), indices, broken in stream(pieces, range(len(pieces)), workers, device):
        note_broken(data, broken)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            y = encoder(normalize(x, input["mean"], input["std"])).float()
        if h is None:
            h = y.new_empty(sum(map(len, pieces.pieces)), *y.shape[1:], dtype=torch.float16 if len(data) * y[0].numel() > 2 ** 28 else torch.float32)
        h[sum(map(len, used)):][:len(y)] = y
        used.append(indices)
    encoder.train(training)
    labels = data.labels[torch.cat(used)].to(device)
    return _in_order(h, len(data)), _in_order(labels, len(data))


def _in_order(mine, n):
    """What each process has of every `world_size()`-th of n things -> all n, in every process."""
    if world_size() == 1:
        return mine
    everyones = mine.new_empty(n, *mine.shape[1:])
    for i, piece in enumerate(mine.split(4096)):
        parts = [torch.empty_like(piece) for _ in range(world_size())]
        dist.all_gather(parts, piece.contiguous())
        place = everyones[4096 * i * world_size():][:len(piece) * world_size()]
        place.copy_(torch.stack(parts, 1).flatten(0, 1)[:len(place)])
    return everyones


def nearest(bank, h, k):
    """For each of h (N, D) the k rows of `bank` (M, D) most similar by cosine, best first: similarities (N, k) and indices (N, k). k is cut to M.

    The bank is gone through in chunks: beside it, and whatever its precision, this needs some 300 MB at D = 2048.
    """
    h, best, where = F.normalize(h.float(), dim=1), None, None
    for start, chunk in zip(range(0, len(bank), 16384), bank.split(16384)):
        s, i = (h @ F.normalize(chunk.float(), dim=1).T).topk(min(k, len(chunk)))
        s, i = (s, i + start) if best is None else (torch.cat([best, s], 1), torch.cat([where, i + start], 1))
        best, order = s.topk(min(k, s.shape[1]))
        where = i.gather(1, order)
    return best, where


def knn_accuracy(train_h, train_labels, h, labels, k=200, temperature=0.1):
    """Top-1 accuracy in percent of weighted k-nearest-neighbour classification (Wu et al. 2018, section 3.4).

    train_h (M, D) and h (N, D) of any scale, labels (M,), (N,) whole numbers >= 0. Each of the k training features most similar by cosine s votes for
    its class with exp(s / temperature). k is cut to M.
    """
    train_labels, labels = train_labels.to(h.device), labels.to(h.device)
    classes, right = int(train_labels.max()) + 1, 0
    for queries, truth in zip(h.split(512), labels.split(512)):
        similarity, neighbours = nearest(train_h, queries, k)                              # (n, k)
        votes = torch.zeros(len(queries), classes, device=h.device)
        weights = ((similarity - similarity[:, :1]) / temperature).exp()                   # relative to the nearest: no overflow
        votes.scatter_add_(1, train_labels[neighbours], weights)
        right += (votes.argmax(1) == truth).sum().item()
    return 100 * right / len(h)
