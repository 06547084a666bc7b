"""How fast the project is, as ratios: python tests/benchmark.py [--rounds 5]

Every comparison is measured in one process, the competitors in turn, round after round, and reported as the median over the rounds of their ratio;
the machine's mood hits both alike. Other libraries are compared with when they are installed: pip install lightly; pip install solo-learn.

(a) two augmented views of 32x32 images in memory: ours, in whole batches, against torchvision's transforms on Pillow images one by one, as the
    official repositories do it; one thread, one process. Policy: SimCLR's for CIFAR (strength 0.5, no blur), and with strength 1 and blur.
(b) what loading costs at 224 from JPEG files, two workers: ours decodes and crops to uint8 (colour and blur are left to the device), theirs does it all.
(c) a whole training step (batch, augmentation, log and all, by `simclr.train` itself) against the bare model: forward, loss, backward and optimiser on
    one fixed batch. A ResNet-18 as for CIFAR; CPU, or the GPU where there is one. At most 1.05 on a CPU, 1.15 on a GPU.
"""
import argparse, os, statistics, sys, tempfile, time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import transforms as T

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import simclr

POLICIES = {"strength 0.5": (0.5, 0.0), "strength 1, blur": (1.0, 0.5)}


class PillowBlur:
    """Gaussian blur with a random radius, as MoCo's and SimSiam's loaders have it."""

    def __call__(self, image):
        from PIL import ImageFilter
        return image.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2.0)))


def pillow_pipeline(size, strength, blur):
    steps = [T.RandomResizedCrop(size), T.RandomApply([T.ColorJitter(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)], p=0.8), T.RandomGrayscale(p=0.2)]
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
    print(f"{what:52} {statistics.median(rates[ours]):9.0f} {statistics.median(rates[theirs]):9.0f} {unit:9} {ratio:7.2f} x   {goal}", flush=True)
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
            rrc=dict(enabled=True, crop_min_scale=0.08, crop_max_scale=1.0), color_jitter=jitter, grayscale=dict(prob=0.2), gaussian_blur=dict(prob=blur),
            solarization=dict(prob=0.0), equalization=dict(prob=0.0), horizontal_flip=dict(prob=0.5), crop_size=size)))
        found["solo-learn"] = lambda image: [one(image), one(image)]
    except ImportError:
        pass
    return found


def augmentation(rounds):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    images = common.draw_shapes(1024, seed=3)[0]
    data = common.Images(images, None, "cpu")
    pillow = [Image.fromarray(i.transpose(1, 2, 0)) for i in images[:256]]
    for name, (strength, blur) in POLICIES.items():
        def ours():
            views = data.crop(torch.arange(len(images)), [common.Crop(2, 32)], 0)[0]
            return sum(len(simclr.augment(v, strength, blur)) for v in views)

        pipeline = pillow_pipeline(32, strength, blur)
        others = {"Pillow": lambda: len([pipeline(i) for i in pillow for _ in range(2)])}
        others |= {k: lambda f=f: 2 * len([f(i) for i in pillow]) for k, f in other_libraries(32, strength, blur).items()}
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


class Enough(Exception):
    pass


def step(rounds):
    """Alternates stretches of `simclr.train` with as many bare steps of the same model on a fixed batch."""
    gpu = torch.cuda.is_available()
    batch, stretch = (512, 50) if gpu else (64, 3)
    device = torch.device("cuda" if gpu else "cpu")
    wait = torch.cuda.synchronize if gpu else lambda: None
    data = common.Images(np.random.default_rng(0).integers(0, 256, (10240, 3, 32, 32), dtype=np.uint8), None, device)
    load, common.load_data = common.load_data, lambda *_: data
    labelled, common.has_labels = common.has_labels, lambda _: False
    with tempfile.TemporaryDirectory() as folder:
        args = simclr.parse_args(["--recipe", "small", "--batch-size", str(batch), "--epochs", "1000", "--save-every", "1000000", "--output", folder])
        model = simclr.SimCLR(args.arch, args.stem, args.head, args.dim).to(device, memory_format=torch.channels_last)
        optimizer = common.LARS(model.parameters(), lr=0.1, weight_decay=1e-4)
        x = torch.rand(2 * batch, 3, 32, 32, device=device)

        def bare():
            for _ in range(stretch):
                with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                    z1, z2 = model(x).chunk(2)
                loss = simclr.nt_xent(z1, z2, 0.5)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            wait()

        times = {"whole": [], "bare": []}
        original, marks = common.Run._after_step, dict(steps=0, start=None)

        def after_step(run, stop):                              # in the run's own loop: every `stretch` steps, time it and then the bare model
            original(run, stop)
            marks["steps"] += 1
            if marks["steps"] % stretch == 0:
                wait()
                if marks["start"] is not None:
                    times["whole"].append(time.perf_counter() - marks["start"])
                if len(times["whole"]) == rounds + 1:
                    raise Enough
                start = time.perf_counter()
                bare()
                times["bare"].append(time.perf_counter() - start)
                marks["start"] = time.perf_counter()

        common.Run._after_step = after_step
        try:
            simclr.train(args, device)
        except Enough:
            pass
        finally:
            common.Run._after_step, common.load_data, common.has_labels = original, load, labelled
    rates = {k: [2 * batch * stretch / t for t in v[1:]] for k, v in times.items()}
    ratio = statistics.median(b / a for a, b in zip(rates["whole"], rates["bare"]))
    print(f"{f'(c) step of SimCLR, ResNet-18, batch {batch}, {device.type} {args.precision}: whole / bare':52} {statistics.median(rates['whole']):9.0f} "
          f"{statistics.median(rates['bare']):9.0f} views/s   {ratio:7.3f}     at most {1.15 if gpu else 1.05}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--photos", default=os.path.join(os.environ.get("SSL_DATA", ""), "photos"), help="directory of full-size JPEGs for (b); default $SSL_DATA/photos")
    parser.add_argument("--only", choices=["a", "b", "c"])
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}, {torch.get_num_threads()} threads; medians of {args.rounds} rounds")
    print(f"{'':52} {'ours':>9} {'theirs':>9}")
    if args.only in (None, "a"):
        augmentation(args.rounds)
    if args.only in (None, "b"):
        if Path(args.photos).is_dir():
            loading(args.rounds, args.photos)
        else:
            print("(b) needs a directory of JPEGs: --photos DIR")
    if args.only in (None, "c"):
        step(args.rounds)
