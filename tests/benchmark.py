"""How fast the project is, as ratios: python tests/benchmark.py [--rounds 5]

Every comparison runs in one process, the competitors in turn, round after round; what is printed is
the median over the rounds of their ratio, so that the mood of the machine hits both alike. Other
libraries take part where they are installed: pip install lightly; pip install solo-learn.

(a) Two augmented views of 32x32 images in memory: ours in whole batches, against torchvision's
    transforms of Pillow images one by one, as the official repositories do it; one thread, one
    process. SimCLR's policy for CIFAR (strength 0.5, no blur), and with strength 1 and blur.
(b) Loading at 224 from JPEG files with two workers: ours decodes and crops to uint8 (colours and
    blur are left to the device), theirs does everything.
(c) A whole training step, by a script's own `train`, against the same with one fixed batch, without
    augmentation, log and checkpoints: forward, loss, backward and optimizer. A ResNet-18 as for
    CIFAR, on a CPU, or the GPU where there is one. The goal is 1.05 on a CPU, 1.15 on a GPU; for
    CPC v2, which augments 49 patches an image, 1.15 on both.
(d) Memory per GPU of every recipe, `imagenet` on 8 GPUs and `small` on one, estimated from a few
    images on the CPU, with convolutions that give zeros: parameters, gradients, optimizer and
    buffers, and what autograd keeps for the backward pass, in bf16, for the images of one GPU.
    Without the logits of the whole batch, the workspaces of convolutions, and what is kept only
    while an operation runs. Not part of a run without --only d.
"""
import argparse, importlib, os, statistics, sys, tempfile, time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torchvision import transforms as T

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import simclr                                   # whose augmentation (a) measures

SCRIPTS = ["simclr", "moco", "byol", "simsiam", "swav", "cpc_v2", "insdis", "cmc", "deepcluster",
           "densecl", "supcon", "image_mixture"]
POLICIES = {"strength 0.5": (0.5, 0.0), "strength 1, blur": (1.0, 0.5)}

def pillow_blur(image):
    """Gaussian blur with a random radius, as in MoCo's and SimSiam's loaders."""
    return image.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2.0)))

def pillow_pipeline(size, strength, blur):
    jitter = T.ColorJitter(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
    steps = [T.RandomResizedCrop(size), T.RandomApply([jitter], p=0.8), T.RandomGrayscale(p=0.2)]
    if blur:
        steps.append(T.RandomApply([T.Lambda(pillow_blur)], p=blur))
    steps += [T.RandomHorizontalFlip(), T.ToTensor()]
    return T.Compose([*steps, T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])

def compare(rounds, competitors):
    """{name: function() -> number of items} -> {name: [items a second in each round]}; one round
    before warms up."""
    rates = {name: [] for name in competitors}
    for i in range(rounds + 1):
        for name, function in competitors.items():
            start = time.perf_counter()
            items = function()
            if i > 0:
                rates[name].append(items / (time.perf_counter() - start))
    return rates

def show(what, rates, ours, theirs, goal):
    ratio = statistics.median(a / b for a, b in zip(rates[ours], rates[theirs]))
    numbers = [statistics.median(rates[name]) for name in (ours, theirs)]
    print(f"{what:62} {numbers[0]:9.0f} {numbers[1]:9.0f} views/s {ratio:7.2f} x  {goal}",
          flush=True)

def other_libraries(size, strength, blur):
    """{name: transform of a Pillow image into its views}, of those that are installed."""
    found = {}
    try:
        from lightly.transforms import SimCLRTransform
        found["lightly"] = SimCLRTransform(input_size=size, cj_strength=strength,
                                           gaussian_blur=blur)
    except ImportError:
        pass
    try:
        from omegaconf import OmegaConf
        from solo.data.pretrain_dataloader import build_transform_pipeline
        jitter = dict(prob=0.8, brightness=0.8 * strength, contrast=0.8 * strength,
                      saturation=0.8 * strength, hue=0.2 * strength)
        policy = dict(rrc=dict(enabled=True, crop_min_scale=0.08, crop_max_scale=1.0),
                      color_jitter=jitter, grayscale=dict(prob=0.2), gaussian_blur=dict(prob=blur),
                      solarization=dict(prob=0.0), equalization=dict(prob=0.0),
                      horizontal_flip=dict(prob=0.5), crop_size=size)
        name = "cifar10" if size == 32 else "imagenet"
        one = build_transform_pipeline(name, OmegaConf.create(policy))
        found["solo-learn"] = lambda image: [one(image), one(image)]
    except ImportError:
        pass
    return found

# ------------------------------------------------------------------- (a)

def augmentation(rounds):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    images = common.draw_shapes(8192, seed=3)[0]
    data = common.Images(images, None, "cpu")
    pillow = [Image.fromarray(i.transpose(1, 2, 0)) for i in images[:256]]
    for name, (strength, blur) in POLICIES.items():
        pipeline = pillow_pipeline(32, strength, blur)
        libraries = other_libraries(32, strength, blur)

        def ours():
            for indices in torch.arange(len(images)).split(256):
                for view in data.crop(indices, [common.Crop(2, 32, flip=0.5)], 0)[0]:
                    simclr.augment(view, strength, blur)
            return 2 * len(images)

        competitors = {"ours": ours, "Pillow": lambda: len([pipeline(i) for i in 2 * pillow])}
        for library, transform in libraries.items():
            competitors[library] = lambda f=transform: 2 * len([f(i) for i in pillow])
        rates = compare(rounds, competitors)
        for other in list(competitors)[1:]:
            goal = "at least 10" if other == "Pillow" else ""
            show(f"(a) views at 32x32, {name}, against {other}", rates, "ours", other, goal)
    torch.set_num_threads(threads)

# ------------------------------------------------------------------- (b)

class PillowFolder(torch.utils.data.Dataset):
    def __init__(self, paths, two_views):
        self.paths = paths
        self.two_views = two_views

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        with Image.open(self.paths[i]) as image:
            return self.two_views(image.convert("RGB"))

class Ours(torch.utils.data.Dataset):
    """Batches of two crops, decoded as in training."""

    def __init__(self, folder, batch):
        self.data = folder
        self.batch = batch

    def __getitem__(self, step):
        indices = torch.arange(step * self.batch, (step + 1) * self.batch) % len(self.data)
        return self.data.crop(indices, [common.Crop(2, 224)], 0, step)

def loading(rounds, directory, images=512, workers=2, batch=32):
    paths = np.resize(common.load_data(directory, split="pretrain").paths, images)
    pipeline = pillow_pipeline(224, 1.0, 0.5)
    transforms = {"Pillow": lambda image: [pipeline(image), pipeline(image)],
                  **other_libraries(224, 1.0, 0.5)}
    options = dict(num_workers=workers, persistent_workers=True)
    ours = Ours(common.Folder(paths, None), batch)
    loaders = {"ours": torch.utils.data.DataLoader(ours, batch_size=None,
                                                   sampler=range(images // batch), **options)}
    for name, transform in transforms.items():
        data = PillowFolder(paths, transform)
        loaders[name] = torch.utils.data.DataLoader(data, batch, **options)

    def views(loader):
        for _ in loader:
            pass
        return 2 * images

    rates = compare(rounds, {name: lambda loader=loader: views(loader)
                             for name, loader in loaders.items()})
    for other in transforms:
        goal = "at least 4" if other == "Pillow" else ""
        show(f"(b) loading at 224, {workers} workers, against {other}", rates, "ours", other, goal)

# ------------------------------------------------------------------- (c)

class Whole(common.Run):
    """A run that notes when its second and its last but one step are over."""

    def finish_step(self, *args, **entries):
        super().finish_step(*args, **entries)
        note(self, self.step - 1, self.total)

class Bare:
    """In place of `common.Run`: one fixed batch again and again, and nothing else."""

    def __init__(self, args, model, optimizer, batches, *_, **__):
        crops, self.indices, _ = batches[0]
        self.batch = [v.float() / 255 if v.dtype == torch.uint8 else v for v in crops]
        self.step = 0
        self.total = args.epochs * len(batches)
        self.input = None

    def crops(self, step):
        return self.batch

    def finish_step(self, *_, **__):
        self.step += 1
        note(self, self.step - 1, self.total)

def note(run, step, total):
    if step in (1, total - 2):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if step == 1:
            run.__class__.start = time.perf_counter()
        else:
            run.__class__.seconds = (time.perf_counter() - run.__class__.start) / (total - 3)

def step(rounds, script):
    """`train` as it is, and with a fixed batch and without augmentation, in turn."""
    gpu = torch.cuda.is_available()
    patches = script.__name__ == "cpc_v2"
    batch, steps = (512, 60) if gpu else (32, 8)
    batch //= 8 if patches else 1
    device = torch.device("cuda" if gpu else "cpu")
    images = np.random.default_rng(0).integers(0, 256, (batch * steps, 3, 32, 32), dtype=np.uint8)
    data = common.Images(images, np.arange(batch * steps) % 10, device)
    kept = common.Run, common.load_data, common.has_labels, script.augment
    times = {Whole: [], Bare: []}
    try:
        common.load_data = lambda *_: data
        common.has_labels = lambda _: False
        for _ in range(rounds):
            for kind in (Whole, Bare):
                with tempfile.TemporaryDirectory() as folder:
                    flags = ["--recipe", "small", "--arch", "resnet18", "--epochs", "1",
                             "--batch-size", str(batch), "--output", folder]
                    if script.__name__ == "deepcluster":
                        flags += ["--num-prototypes", "100"]
                    args = script.parse_args(flags)
                    common.Run = kind
                    script.augment = kept[3] if kind is Whole else lambda x, *_: x
                    script.train(args, device)
                    times[kind].append(kind.seconds)
    finally:
        common.Run, common.load_data, common.has_labels, script.augment = kept
    ratio = statistics.median(a / b for a, b in zip(times[Whole], times[Bare]))
    views = 49 if patches else 1 if script.__name__ in ("insdis", "cmc") else 2
    rates = [views * batch / statistics.median(times[kind]) for kind in (Whole, Bare)]
    goal = 1.15 if gpu or patches else 1.05
    what = f"(c) step of {script.__name__}, ResNet-18, {device.type} {args.precision}"
    print(f"{what:62} {rates[0]:9.0f} {rates[1]:9.0f} views/s {ratio:7.3f}    at most {goal}",
          flush=True)

class Many(common.Images):
    """`n` images, of which two are different."""

    def __init__(self, n):
        super().__init__(np.zeros((2, 3, 256, 256), np.uint8), np.zeros(n), "cpu")

    def __len__(self):
        return len(self.labels)

    def crop(self, indices, *rest):
        views, _, broken = super().crop(indices % 2, *rest)
        return views, indices, broken

class NoConvolutions(TorchDispatchMode):
    """Convolutions and their gradients are zeros of the right form, which takes no time."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if function not in (aten.convolution.default, aten.convolution_backward.default):
            return function(*args, **(kwargs or {}))
        shapes = function(*tree_map_only(torch.Tensor, lambda x: x.to("meta"), args))
        return tree_map_only(torch.Tensor, lambda x: torch.zeros_like(x, device="cpu"), shapes)

class Counted(Bare):
    """One step, which is not an epoch's first, of which the bytes that autograd keeps are noted."""

    def __init__(self, args, model, optimizer, batches, *rest, **named):
        super().__init__(args, model, optimizer, batches, *rest, **named)
        self.model = model
        self.optimizer = optimizer
        self.step = 1
        self.total = 2

    def crops(self, step):
        self.kept = {}
        parameters = {p.data_ptr() for p in self.model.parameters()}

        def pack(x):
            if x.data_ptr() not in parameters:
                self.kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        def backward(loss):
            Counted.kept_bytes = sum(self.kept.values())
            self.hooks.__exit__(None, None, None)
            self.backward(loss)

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
        self.hooks.__enter__()
        self.backward = torch.Tensor.backward
        torch.Tensor.backward = backward
        return super().crops(step)

    def finish_step(self, *_, **__):
        torch.Tensor.backward = self.backward
        state = [v for s in self.optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        tensors = [*self.model.parameters(), *self.model.buffers(), *gradients, *state]
        Counted.static_bytes = sum(t.numel() * t.element_size() for t in tensors)

def memory(script, recipe):
    kept = common.Run, common.load_data
    common.Run = Counted
    data = Many(50_000 if recipe.startswith("small") else 1_281_167)    # CIFAR's, ImageNet's
    common.load_data = lambda *_: data
    constants = script.RECIPES[recipe]
    used = []
    try:
        for batch in (2, 4):
            flags = ["--recipe", recipe, "--precision", "bf16", "--batch-size", str(batch)]
            flags += ["--bn-splits", "1"] if "bn_splits" in constants else []
            with NoConvolutions():
                script.train(script.parse_args(flags), torch.device("cpu"))
            used.append(Counted.kept_bytes)
    finally:
        common.Run, common.load_data = kept
    image = (used[1] - used[0]) / 2
    images = constants["batch_size"] // (1 if recipe.startswith("small") else 8)
    total = Counted.static_bytes + image * images
    print(f"{script.__name__:14} {recipe:13} {constants['arch']:10} {images:4} images of "
          f"{image / 1e6:6.1f} MB, the rest {Counted.static_bytes / 1e9:5.2f} GB, together "
          f"{total / 1e9:6.1f} GB", flush=True)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--photos", default=os.path.join(os.environ.get("SSL_DATA", ""), "photos"),
                        help="directory of full-size JPEGs for (b); default $SSL_DATA/photos")
    parser.add_argument("--only", choices=["a", "b", "c", "d"])
    parser.add_argument("--scripts", nargs="*", choices=SCRIPTS, default=SCRIPTS, help="of (c)")
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads; medians of "
          f"{args.rounds} rounds")
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
    if args.only == "d":
        for name in args.scripts:
            script = importlib.import_module(name)
            for recipe in script.RECIPES:
                if not recipe.startswith("shapes"):
                    memory(script, recipe)
