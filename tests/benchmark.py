"""How fast the project is, as ratios: python tests/benchmark.py [--rounds 5]

Every comparison is measured in one process, the competitors in turn, round after round, and reported as the median over the rounds of their ratio;
the machine's mood hits both alike. Other libraries are compared with when they are installed: pip install lightly; pip install solo-learn.

(a) two augmented views of 32x32 images in memory: ours, in whole batches, against torchvision's transforms on Pillow images one by one, as the
    official repositories do it; one thread, one process. Policy: SimCLR's for CIFAR (strength 0.5, no blur), and with strength 1 and blur.
(b) what loading costs at 224 from JPEG files, two workers: ours decodes and crops to uint8 (colour and blur are left to the device), theirs does it all.
(c) a whole training step, by the script's own `train`, against the same with one fixed batch, no augmentation and no books: forward, loss, backward
    and optimiser. A ResNet-18 as for CIFAR; CPU, or the GPU where there is one. At most 1.05 on a CPU, 1.15 on a GPU; CPC v2, which disturbs 49
    patches an image, at most 1.15 on either.
"""
import argparse, importlib, os, statistics, sys, tempfile, time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import transforms as T

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import simclr                                                   # whose augmentation (a) measures

SCRIPTS = ["simclr", "moco", "byol", "simsiam", "swav", "cpc_v2", "insdis", "cmc", "deepcluster", "densecl", "supcon"]
POLICIES = {"strength 0.5": (0.5, 0.0), "strength 1, blur": (1.0, 0.5)}


class PillowBlur:
    """Gaussian blur with a random radius, as MoCo's and SimSiam's loaders have it."""

    def __call__(self, image):
        from PIL import ImageFilter
        return image.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2.0)))


def pillow_pipeline(size, strength, blur):
    jitter = T.ColorJitter(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
    steps = [T.RandomResizedCrop(size), T.RandomApply([jitter], p=0.8), T.RandomGrayscale(p=0.2)]
    return T.Compose([*steps, *([T.RandomApply([PillowBlur()], p=blur)] if blur else []), T.RandomHorizontalFlip(), T.ToTensor(),
                      T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])


def compare(rounds, competitors):
    """{name: function() -> items done} -> {name: [items a second, a round each]}; one round to warm up is not counted."""
    rates = {name: [] for name in competitors}
    for i in range(rounds + 1):
        for name, function in competitors.items():
            start = time.perf_counter()
            items = function()
            if i > 0:
                rates[name].append(items / (time.perf_counter() - start))
    return rates


def row(what, rates, ours, theirs, unit, goal):
    ratio = statistics.median(a / b for a, b in zip(rates[ours], rates[theirs]))
    print(f"{what:62} {statistics.median(rates[ours]):9.0f} {statistics.median(rates[theirs]):9.0f} {unit:9} {ratio:7.2f} x   {goal}", flush=True)
    return ratio


def other_libraries(size, strength, blur):
    """{name: transform of a Pillow image into its views}, of those that are installed."""
    found = {}
    try:
        from lightly.transforms import SimCLRTransform
        found["lightly"] = SimCLRTransform(input_size=size, cj_strength=strength, gaussian_blur=blur)
    except ImportError:
        pass
    try:
        from omegaconf import OmegaConf
        from solo.data.pretrain_dataloader import build_transform_pipeline
        jitter = dict(prob=0.8, brightness=0.8 * strength, contrast=0.8 * strength, saturation=0.8 * strength, hue=0.2 * strength)
        one = build_transform_pipeline("cifar10" if size == 32 else "imagenet", OmegaConf.create(dict(
            rrc=dict(enabled=True, crop_min_scale=0.08, crop_max_scale=1.0), color_jitter=jitter, grayscale=dict(prob=0.2),
            gaussian_blur=dict(prob=blur), solarization=dict(prob=0.0), equalization=dict(prob=0.0), horizontal_flip=dict(prob=0.5),
            crop_size=size)))
        found["solo-learn"] = lambda image: [one(image), one(image)]
    except ImportError:
        pass
    return found


def augmentation(rounds):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    images = common.draw_shapes(8192, seed=3)[0]
    data = common.Images(images, None, "cpu")
    pillow = [Image.fromarray(i.transpose(1, 2, 0)) for i in images[:256]]
    for name, (strength, blur) in POLICIES.items():
        def ours():
            batches = (data.crop(i, [common.Crop(2, 32, flip=0.5)], 0)[0] for i in torch.arange(len(images)).split(256))
            return sum(len(simclr.augment(v, strength, blur)) for views in batches for v in views)

        pipeline = pillow_pipeline(32, strength, blur)
        others = {"Pillow": lambda: len([pipeline(i) for i in pillow for _ in range(2)])}
        libraries = other_libraries(32, strength, blur)
        others |= {k: lambda f=f: 2 * len([f(i) for i in pillow]) for k, f in libraries.items()}
        rates = compare(rounds, {"ours": ours, **others})
        for other in others:
            row(f"(a) views at 32x32, {name}, against {other}", rates, "ours", other, "views/s", "at least 10" if other == "Pillow" else "")
    torch.set_num_threads(threads)


class PillowFolder(torch.utils.data.Dataset):
    def __init__(self, paths, two_views):
        self.paths, self.two_views = paths, two_views

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        with Image.open(self.paths[i]) as image:
            return self.two_views(image.convert("RGB"))


class Repeated(torch.utils.data.Dataset):
    """The loading half of ours: batches of two crops, over and over."""

    def __init__(self, folder, batch):
        self.data, self.batch = folder, batch

    def __getitem__(self, step):
        indices = torch.arange(step * self.batch, (step + 1) * self.batch) % len(self.data)
        return self.data.crop(indices, [common.Crop(2, 224)], 0, step)


def loading(rounds, directory, images=512, workers=2, batch=32):
    paths = common.load_data(directory, split="pretrain").paths
    paths = np.resize(paths, images)
    pipeline = pillow_pipeline(224, 1.0, 0.5)
    pairs = {"Pillow": lambda image: [pipeline(image), pipeline(image)], **other_libraries(224, 1.0, 0.5)}
    options = dict(num_workers=workers, persistent_workers=True)
    loaders = {k: torch.utils.data.DataLoader(PillowFolder(paths, f), batch, **options) for k, f in pairs.items()}
    loaders["ours"] = torch.utils.data.DataLoader(Repeated(common.Folder(paths, None), batch), batch_size=None, sampler=range(images // batch), **options)
    rates = compare(rounds, {k: lambda loader=loader: 2 * images * (sum(1 for _ in loader) > 0) for k, loader in loaders.items()})
    for other in pairs:
        row(f"(b) loading at 224, {workers} workers, against {other}", rates, "ours", other, "views/s", "at least 4" if other == "Pillow" else "")


class Timed(common.Run):
    """A run that notes when its second and its last but one step are over."""

    def __iter__(self):
        for item in super().__iter__():
            yield item
            note(self, item[0], self.total)


class Bare:
    """In place of `common.Run`: one fixed batch again and again, no books."""

    def __init__(self, method, args, model, optimizer, batches, *_, **__):
        crops, self.indices, _ = batches[0]
        self.crops = [v.float() / 255 if v.dtype == torch.uint8 else v for v in crops]
        self.step, self.total = 0, args.epochs * len(batches)

    def __iter__(self):
        for step in range(self.total):
            yield step, self.crops, self.indices
            note(self, step, self.total)

    def log(self, *_):
        pass


def note(run, step, total):
    if step in (1, total - 2):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if step == 1:
            run.__class__.start = time.perf_counter()
        else:
            run.__class__.seconds = (time.perf_counter() - run.__class__.start) / (total - 3)


def step(rounds, script):
    """`train` as it is, and `train` with a fixed batch, no augmentation and no books, in turn."""
    gpu = torch.cuda.is_available()
    patchwise = script.__name__ == "cpc_v2"
    batch, steps = (512, 60) if gpu else (32, 8)
    batch //= 8 if patchwise else 1
    device = torch.device("cuda" if gpu else "cpu")
    data = common.Images(np.random.default_rng(0).integers(0, 256, (batch * steps, 3, 32, 32), dtype=np.uint8), np.arange(batch * steps) % 10, device)
    kept = common.Run, common.load_data, common.has_labels, script.augment
    times = {Timed: [], Bare: []}
    try:
        common.load_data, common.has_labels = lambda *_: data, lambda _: False
        for i in range(rounds):
            for kind in (Timed, Bare):
                with tempfile.TemporaryDirectory() as folder:
                    flags = ["--recipe", "small", "--arch", "resnet18", "--batch-size", str(batch), "--epochs", "1", "--output", folder]
                    args = script.parse_args(flags + (["--num-prototypes", "100"] if script.__name__ == "deepcluster" else []))
                    common.Run, script.augment = kind, kept[3] if kind is Timed else lambda x, *_: x
                    script.train(args, device)
                    times[kind].append(kind.seconds)
    finally:
        common.Run, common.load_data, common.has_labels, script.augment = kept
    ratio = statistics.median(a / b for a, b in zip(times[Timed], times[Bare]))
    what = f"(c) step of {script.__name__}, ResNet-18, {device.type} {args.precision}: whole / bare"
    per_image = 49 if patchwise else 1 if script.__name__ in ("insdis", "cmc") else 2
    rates = (per_image * batch / statistics.median(times[kind]) for kind in (Timed, Bare))
    unit, goal = ("patches/s", 1.15) if patchwise else ("views/s", 1.15 if gpu else 1.05)
    print(f"{what:62} {next(rates):9.0f} {next(rates):9.0f} {unit:9} {ratio:7.3f}     at most {goal}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--photos", default=os.path.join(os.environ.get("SSL_DATA", ""), "photos"),
                        help="directory of full-size JPEGs for (b); default $SSL_DATA/photos")
    parser.add_argument("--only", choices=["a", "b", "c"])
    parser.add_argument("--scripts", nargs="*", choices=SCRIPTS, default=SCRIPTS, help="of (c)")
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads; medians of {args.rounds} rounds")
    print(f"{'':62} {'ours':>9} {'theirs':>9}")
    if args.only in (None, "a"):
        augmentation(args.rounds)
    if args.only in (None, "b"):
        if Path(args.photos).is_dir():
            loading(args.rounds, args.photos)
        else:
            print("(b) needs a directory of JPEGs: --photos DIR")
    if args.only in (None, "c"):
        for name in args.scripts:
            step(args.rounds, importlib.import_module(name))
