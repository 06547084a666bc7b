"""Ask a trained encoder what it has learned.

    python evaluate.py knn CHECKPOINT                       nearest neighbours on the features, no training
    python evaluate.py linear CHECKPOINT                    a linear classifier on the frozen features
    python evaluate.py linear CHECKPOINT --protocol moco    ... as another paper trains it
    python evaluate.py linear CHECKPOINT --protocol cpc     ... on the patches of a checkpoint of cpc_v2.py
    python evaluate.py finetune CHECKPOINT --labels 0.01 0.1 --baseline supervised       how many labels does it save?
    python evaluate.py detect CHECKPOINT --data DIR         Faster R-CNN on DIR/VOCdevkit; without --data on drawn scenes
    python evaluate.py transfer CHECKPOINT --datasets dtd pets DIR                       logistic regression on other data sets
    python evaluate.py invariance CHECKPOINT                which transformations can still be told from h, and from g(h)?
    python evaluate.py neighbours CHECKPOINT                pictures: nearest neighbours beside those of the pixels, and a map of the features
    python evaluate.py knn CHECKPOINT --baseline random     the same encoder untrained, ordinarily initialised; or pixels, no encoder at all

CHECKPOINT is one of ours or a file of another project (LAYOUTS), which then needs --data. The data is the one that the checkpoint was trained on, or
--data and --root. Everything is asked of h, the representation before the projector. Prints a table and, as the last line of stdout, one line of JSON.
`knn`, `linear`, `finetune` and `detect` work under torchrun as well. --sweep chooses among a few settings on held-out training images; no test image
is looked at before that.

What the papers do differently is in PROTOCOLS, FINETUNE and DETECT, each row with its source. Training uses random crops and flips, tests the central
crop; `linear --no-augment` computes the features once instead, much faster and a little worse. The cosine falls in every step, also where the original
does it once an epoch. Rates are per 256 images. In-memory data sets are too small for batches of 4096, so that without --batch-size theirs is 256 at
most (in `finetune` an eighth of the images at most), and the rate goes with it. CPC's probe encodes the patches of the pre-training, disturbed as there,
and classifies by the mean of the patches' logits; Adam's rate is constant, and the number of epochs is ours, since the paper does not give one.

Memory: features are float32, or half precision from a gigabyte on. ImageNet's 1.28 million of 2048 numbers take 5.2 GB in each process. `knn` needs 0.3 GB
beside them (a process of 5.8 GiB in all, measured on a CPU with that many random features, 2026-11-21); `linear --no-augment` a batch of them.

Differs from the papers in `detect`: torchvision's smooth L1 losses (the box head's with beta 1/9, where detectron2 has 0) and initialisation.
"""
import argparse, copy, json, math, re
import xml.etree.ElementTree as ElementTree
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.detection import FasterRCNN, faster_rcnn
from torchvision.models.detection.rpn import AnchorGenerator

import cmc
import common
import cpc_v2

PROTOCOLS = {         # lr: per 256 images; drops: the shares of the run after which the rate falls to a tenth (None: cosine to 0)
    "simclr": dict(epochs=90, batch_size=4096, lr=0.1, nesterov=True, weight_decay=0, drops=None, larc=False, init=0),          # SimCLR paper, B.6
    "moco": dict(epochs=100, batch_size=256, lr=30, nesterov=False, weight_decay=0, drops=(0.6, 0.8), larc=False, init=0.01),   # main_lincls.py
    "simsiam": dict(epochs=90, batch_size=4096, lr=0.1, nesterov=False, weight_decay=0, drops=None, larc=True, init=0.01),      # main_lincls.py
    "byol": dict(epochs=80, batch_size=1024, lr=0.2, nesterov=True, weight_decay=0, drops=None, larc=False, init=0),            # official code
    "swav": dict(epochs=100, batch_size=256, lr=0.3, nesterov=False, weight_decay=1e-6, drops=None, larc=False, init=0.01),     # eval_linear.py
    "cpc": dict(epochs=90, batch_size=512, lr=2.5e-4, weight_decay=0, drops=(), larc=False),     # appendix B: Adam, 5e-4 = 2.5e-4 * 512 / 256
}
FINETUNE = {          # pairs: with up to 2 % of the labels, with more; lr of the encoder and of the head; drops: there the rate falls to a fifth
    "simclr": dict(epochs=(60, 30), batch_size=4096, lr=(0.05, 0.05), head_lr=(0.05, 0.05), nesterov=True, weight_decay=0, drops=None),     # B.5
    "byol": dict(epochs=(50, 30), batch_size=1024, lr=(0.05, 0.05), head_lr=(0.05, 0.05), nesterov=True, weight_decay=0, drops=None),  # out of its sweep
    "swav": dict(epochs=(20, 20), batch_size=256, lr=(0.02, 0.01), head_lr=(5, 0.2), nesterov=False, weight_decay=0, drops=(0.6, 0.8)),  # eval_semisup.py
}
SUPERVISED = dict(epochs=(180, 90), batch_size=256, lr=(0.1, 0.1), head_lr=(0.1, 0.1), nesterov=True, weight_decay=1e-4, drops=None)      # our choice
DETECT = {            # lr: for the whole batch; sizes: of the shorter side in training; proposals: before and after suppression, training and test
    "voc": dict(steps=24000, batch_size=16, lr=0.02, warmup=100, drops=(0.75, 11 / 12), weight_decay=1e-4, sizes=tuple(range(480, 801, 32)), size=800,
                max_size=1333, anchors=(32, 64, 128, 256, 512), pool=14, rois=512,
                proposals=(12000, 2000, 6000, 1000)),           # MoCo, detection/configs; 9000 steps for VOC2007 alone (table 4); the shares are 24000's
    "shapes": dict(steps=400, batch_size=8, lr=0.02, warmup=50, drops=(0.75, 11 / 12), weight_decay=1e-4, sizes=(96,), size=96, max_size=96,
                   anchors=(12, 16, 20, 26, 34), pool=7, rois=64, proposals=(400, 100, 400, 100)),      # our own, for a few minutes on two CPU cores
}
TRANSFER = {          # torchvision's class, its splits, images of train held out where there is no validation set, metric: SimCLR B.8
    "food101": ("Food101", ("train", None, "test"), 7575, "top1"), "cifar10": (None, ("train", None, "val"), 5000, "top1"),
    "cifar100": (None, ("train", None, "val"), 5067, "top1"), "birdsnap": (None, ("train", "val", "test"), 0, "top1"),
    "sun397": (None, ("Training_01", None, "Testing_01"), 3970, "top1"), "cars": ("StanfordCars", ("train", None, "test"), 1650, "top1"),
    "aircraft": ("FGVCAircraft", ("train", "val", "test"), 0, "mean_per_class"), "voc2007": (None, ("train", "val", "test"), 0, "map_11_point"),
    "dtd": ("DTD", ("train", "val", "test"), 0, "top1"), "pets": ("OxfordIIITPet", ("trainval", None, "test"), 740, "mean_per_class"),
    "caltech101": (None, ("train", None, "test"), 510, "mean_per_class"), "flowers": ("Flowers102", ("train", "val", "test"), 0, "mean_per_class"),
}
IMAGENET, SWAV = ([[0.485, 0.456, 0.406], std] for std in ([0.229, 0.224, 0.225], [0.228, 0.224, 0.225]))
CIFAR = [[0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]]
LAYOUTS = (           # whose files; the backbone's prefix ("module." is dropped before); how one other name begins; mean and deviation of the input
    ("CMC", "encoder.l_to_ab.", "encoder.ab_to_l.", ([0, 0, 0], [1, 1, 1])), ("MoCo v1, v2", "encoder_q.", "", IMAGENET),
    ("MoCo v3", "base_encoder.", "", IMAGENET), ("SimSiam", "encoder.", "predictor.", IMAGENET), ("SupContrast", "encoder.", "head.", CIFAR),
    ("solo-learn", "encoder.", "classifier.", IMAGENET), ("InsDis", "encoder.", "", IMAGENET), ("solo-learn", "backbone.", "classifier.", IMAGENET),
    ("DINO", "backbone.", "head.", IMAGENET), ("Barlow Twins, VICReg", "backbone.", "projector.", IMAGENET), ("lightly", "backbone.", "", IMAGENET),
    ("DeepCluster-v2", "", "prototypes.prototypes0.", SWAV), ("SwAV", "", "prototypes.", SWAV), ("torchvision's layout", "", "", IMAGENET),
)


# ------------------------------------------------------------------------------------------------ what is asked

def read_checkpoint(path):
    """A checkpoint of ours, or a file of another project as if it were one: method, args, encoder_config, encoder, input, and `model`, all there is."""
    content = common.read_tensors(path)
    if isinstance(content, dict) and "encoder_config" in content:
        return common.read_checkpoint(path)
    try:
        inner = next((content[k] for k in ("state_dict", "model", "online_backbone", "teacher", "student") if isinstance(content.get(k), dict)), content)
        state = {re.sub(r"(^|\.)module\.", r"\1", k): v for k, v in inner.items() if torch.is_tensor(v)}
        first = ("conv1.weight", "0.weight")
        project, prefix, _, (mean, std) = next(row for row in LAYOUTS if any(row[1] + k in state for k in first) and any(k.startswith(row[2]) for k in state))
    except (AttributeError, TypeError, StopIteration):
        known = ", ".join(dict.fromkeys(row[0] for row in LAYOUTS))
        raise common.UserError(f"{path}: neither a checkpoint of these scripts nor in a layout known here ({known})") from None
    config, encoder, used = describe(path, state, prefix)
    if project == "CMC":
        _, encoder_ab, used_ab = describe(path, state, "encoder.ab_to_l.")
        encoder = {**{f"light.{k}": v for k, v in encoder.items()}, **{f"color.{k}": v for k, v in encoder_ab.items()}}
        used |= used_ab
    elif project == "solo-learn" and config["stem"] == "small":
        config["padding"] = 2                                   # its 3x3 stem makes 34 pixels of 32
    left = {}
    for k in state.keys() - used:
        short = ".".join(k.split(".")[:1 + prefix.count(".")])
        left[short] = left.get(short, 0) + 1
    other = sorted(k for k in content if content is not inner and content[k] is not inner)
    common.say(f"{path}: {project}, {config['arch']}, stem {config['stem']}; {len(used)} tensors read; left out: "
               + (", ".join([f"{k} ({n})" for k, n in sorted(left.items())] + other) or "nothing"))
    small = config["stem"] == "small"
    mean, std = CIFAR if project == "solo-learn" and small else (mean, std)
    return dict(method=project, args={}, encoder_config=config, encoder=encoder, model=state,
                input=dict(size=32 if small else 224, mean=mean, std=std, interpolation="bilinear"))


def describe(path, state, prefix):
    """Find the ResNet below `prefix`: (what builds it, its state dict under torchvision's names, the names used)."""
    numbered = {"0": "conv1", "1": "bn1", **{str(i): f"layer{i - 3}" for i in range(4, 8)}}        # nn.Sequential(*resnet.children())
    if prefix + "2.0.conv1.weight" in state:
        numbered.update({str(i): f"layer{i - 1}" for i in range(2, 6)})                             # ... of lightly's own ResNet, which has no ReLU module
    encoder, used = {}, set()
    for k, v in state.items():
        head, _, rest = k[len(prefix):].partition(".")
        name = f"{numbered.get(head, head)}.{rest}".replace(".shortcut.", ".downsample.")
        if k.startswith(prefix) and re.match(r"(conv1|bn1|layer[1-4])\.", name):
            encoder[name] = v
            used.add(k)
    counts = tuple(len({k.split(".")[1] for k in encoder if k.startswith(f"layer{i}.")}) for i in range(1, 5))
    bottleneck = "layer1.0.conv3.weight" in encoder
    depth = [d for d, blocks in common.DEPTHS.items() if blocks == counts and (d >= 50) == bottleneck]
    if not depth or "layer1.0.conv1.weight" not in encoder or encoder["conv1.weight"].ndim != 4:
        raise common.UserError(f"{path}: its backbone is no ResNet known here (blocks {counts}, {'bottleneck' if bottleneck else 'basic'})")
    stem, width = encoder["conv1.weight"], len(encoder["layer1.0.conv1.weight"])
    config = dict(arch=f"resnet{depth[0]}" + ("" if width == 64 else f"x{width / 64:g}"), norm="batch" if "bn1.running_mean" in encoder else "layer",
                  stem="imagenet" if stem.shape[-1] == 7 else "small")
    return config if stem.shape[1] == 3 else dict(config, view="lab", stem_width=len(stem)), encoder, used


def build(arch, norm, stem, padding=1, view=None, **rest):
    """`common.resnet`, with the `padding` that other projects' small stems have; with a `view` CMC's two halves."""
    if view:
        return cmc.Halves(arch, stem, view, norm=norm, **rest)
    encoder = common.resnet(arch, norm=norm, stem=stem, **rest)
    if stem == "small":
        encoder.conv1.padding = (padding, padding)
    return encoder


def load_encoder(args, device):
    """The encoder to ask, frozen: that of the checkpoint or a baseline. Returns (encoder, its width, the checkpoint)."""
    checkpoint = read_checkpoint(args.checkpoint)
    if args.size:
        checkpoint["input"]["size"] = args.size
    size = checkpoint["input"]["size"]
    if args.baseline == "pixels":
        return nn.Flatten(), 3 * size * size, checkpoint
    torch.manual_seed(args.seed)
    try:
        encoder = build(**checkpoint["encoder_config"])
        if args.baseline is None:
            encoder.load_state_dict(checkpoint["encoder"])
    except (TypeError, ValueError, RuntimeError) as e:
        raise common.UserError(f"{args.checkpoint}: its encoder does not fit {checkpoint['encoder_config']} ({' '.join(str(e).split())[:200]})") from None
    encoder.to(device, memory_format=torch.channels_last).requires_grad_(False).eval()
    return encoder, encoder.dim, checkpoint


def load_splits(args, checkpoint, device):
    """(name, train, val), both labelled."""
    name, root = args.data or checkpoint["args"].get("data"), args.root or checkpoint["args"].get("root", "data")
    if name is None:
        raise common.UserError(f"--data: needed, since {args.checkpoint} does not say what it was trained on")
    if name not in common.DATA and not Path(name).is_dir():
        raise common.UserError(f"--data {name}: neither {', '.join(common.DATA)} nor a directory")
    return name, common.load_data(name, root, "train", device), common.load_data(name, root, "val", device)


def take(data, indices):
    """The images at `indices` as a data set of their own."""
    if data.in_workers:
        return common.Folder(data.paths[indices.numpy()], data.labels[indices])
    return common.Images(data.images[indices.to(data.images.device)], data.labels[indices], data.images.device)


def hold_out(n, seed, count=None):
    """(the rest, held out): indices of training images for choosing settings on, a tenth of them and 10,000 at most."""
    order = torch.from_numpy(np.random.default_rng([seed, 1]).permutation(n))
    count = count or min(max(1, n // 10), 10_000)
    return order[count:].sort().values, order[:count].sort().values


def accuracy(logits, labels, top):
    """Percent of rows whose label is among the `top` largest logits."""
    return 100 * (logits.topk(min(top, logits.shape[1]), 1).indices == labels[:, None]).any(1).float().mean().item()


# ------------------------------------------------------------------------------------------------ k nearest neighbours

def knn(args, device):
    encoder, _, checkpoint = load_encoder(args, device)
    name, train, val = load_splits(args, checkpoint, device)
    bank, labels = common.features(encoder, train, checkpoint["input"], args.workers, args.precision)
    k, temperature = args.k, args.temperature
    if args.sweep:
        rest, held = (i.to(bank.device) for i in hold_out(len(bank), args.seed))
        tried = [(common.knn_accuracy(bank[rest], labels[rest], bank[held], labels[held], k, t), k, t)
                 for k in (5, 10, 20, 50, 100, 200) for t in (0.03, 0.07, 0.1, 0.3)]
        chosen, k, temperature = max(tried)
        common.say(f"k {k} and temperature {temperature} chosen: {chosen:.2f} % on {len(held)} held-out training images")
    h, truth = common.features(encoder, val, checkpoint["input"], args.workers, args.precision)
    top1 = common.knn_accuracy(bank, labels, h, truth, k, temperature)
    report(args, checkpoint, name, "knn", dict(k=k, temperature=temperature, sweep=args.sweep, train=len(train), val=len(val)), dict(top1=top1))
    if common.rank() == 0:
        draw_neighbours(args, checkpoint, train, val, [("", bank, h)], labels, truth)


def draw_neighbours(args, checkpoint, train, val, spaces, labels, truth, columns=10):
    """A row for each of the first ten classes: a test image and, for each (title, bank, h) of `spaces`, its nearest training images, those of another
    class framed in red."""
    queries = torch.stack([(truth == c).nonzero()[0, 0] for c in truth.unique()[:10]])
    crop = [common.CenterCrop(checkpoint["input"]["size"], interpolation=checkpoint["input"]["interpolation"])]
    show = lambda data, i: data.crop(i.cpu(), crop, 0)[0][0].float().cpu() / (255 if data.in_workers else 1)
    plt = common.pyplot()
    found = [(title, common.nearest(bank, h[queries], columns)[1]) for title, bank, h in spaces]
    width = 1 + sum(i.shape[1] for _, i in found)
    figure, axes = plt.subplots(len(queries), width, figsize=(0.6 * width, 0.6 * len(queries) + 0.2), squeeze=False, layout="constrained")
    for r, (q, row) in enumerate(zip(queries, axes)):
        pictures = torch.cat([show(val, q[None]), *(show(train, i[r]) for _, i in found)])
        wrong = [False, *(labels[torch.cat([i[r] for _, i in found])] != truth[q]).tolist()]
        for image, ax, red in zip(pictures, row, wrong):
            ax.imshow(image.permute(1, 2, 0), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            for side in ax.spines.values():
                side.set(visible=red, color="red", linewidth=2)
    axes[0, 0].set_title("query", fontsize=8)
    place = 1
    for title, i in found:
        axes[0, place].set_title(f"nearest{title}", fontsize=8, loc="left")
        place += i.shape[1]
    save(args, figure, "neighbours.png" if len(spaces) == 1 else "neighbours-and-pixels.png")


def neighbours(args, device):
    encoder, _, checkpoint = load_encoder(args, device)
    name, train, val = load_splits(args, checkpoint, device)
    (bank, labels), (h, truth) = (common.features(encoder, d, checkpoint["input"], args.workers, args.precision) for d in (train, val))
    pixel = dict(checkpoint["input"], size=min(32, checkpoint["input"]["size"]))
    (pixels, _), (queries, _) = (common.features(nn.Flatten().to(device), d, pixel, args.workers) for d in (train, val))
    draw_neighbours(args, checkpoint, train, val, [(" by the encoder", bank, h), (" by the pixels", pixels, queries)], labels, truth, 8)
    some = torch.from_numpy(np.random.default_rng(args.seed).permutation(len(h))[:args.count]).to(h.device)
    flat, classes = F.normalize(h[some].float(), dim=1), truth[some].cpu()
    flat = flat - flat.mean(0)
    plane = flat @ torch.linalg.svd(flat, full_matrices=False)[2][:2].T
    plane = (plane if args.map == "pca" else tsne(flat, plane, min(30, (len(flat) - 1) / 3))).cpu()
    figure, ax = common.pyplot().subplots(figsize=(6, 5.2), layout="constrained")
    dots = ax.scatter(*plane.T, c=classes, cmap="tab10" if int(classes.max()) < 10 else "nipy_spectral", s=9, linewidths=0)
    ax.set(xticks=[], yticks=[], title=f"{len(plane)} test images of {Path(name).name}, {args.map}")
    if int(classes.max()) < 10:
        ax.legend(*dots.legend_elements(), title="class", fontsize=7, title_fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    save(args, figure, "map.png")
    (same,), rivals = [(labels[common.nearest(bank, h, 1)[1][:, 0]] == truth).float().mean().item() * 100], common.nearest(pixels, queries, 1)[1][:, 0]
    report(args, checkpoint, name, "neighbours", dict(map=args.map, count=len(some)),
           dict(nearest_of_same_class=same, by_pixels=(labels[rivals] == truth).float().mean().item() * 100))


def tsne(x, start, perplexity, steps=500):
    """x (n, D) -> (n, 2), van der Maaten and Hinton 2008, from `start` (n, 2): all pairs, for a few thousand points."""
    d = torch.cdist(x, x).square().fill_diagonal_(math.inf)
    low, high = torch.zeros(len(x), 1, device=x.device), torch.full((len(x), 1), 1e6, device=x.device)
    for _ in range(60):                                         # each point's precision, by halving, so that its neighbours' entropy is that of perplexity
        beta = (low + high) / 2
        p = torch.softmax(-beta * d, 1)
        wide = -torch.xlogy(p, p).sum(1, keepdim=True) > math.log(perplexity)
        low, high = torch.where(wide, beta, low), torch.where(wide, high, beta)
    p = (p + p.T) / (2 * len(x))
    y = start / start.std() * 1e-4
    velocity, gain = torch.zeros_like(y), torch.ones_like(y)
    for step in range(steps):
        q = 1 / (1 + torch.cdist(y, y).square()).fill_diagonal_(math.inf)
        w = ((12 if step < steps // 4 else 1) * p - q / q.sum()) * q                       # exaggerated at first
        gradient = 4 * (w.sum(1, keepdim=True) * y - w @ y)
        gain = torch.where(gradient * velocity > 0, gain * 0.8, gain + 0.2).clamp(min=0.01)
        velocity = (0.5 if step < steps // 4 else 0.8) * velocity - max(len(x) / 48, 50) * gain * gradient
        y = y + velocity
    return y


# ------------------------------------------------------------------------------------------------ linear probe

def fall(protocol, step, total, factor=0.1):
    """The share of the peak rate that is left in `step` of `total`."""
    if protocol["drops"] is None:
        return (1 + math.cos(math.pi * step / total)) / 2
    return factor ** sum(step >= share * total for share in protocol["drops"])


def linear(args, device):
    protocol = dict(PROTOCOLS.get(args.protocol, PROTOCOLS["simclr"]))
    for k in ("epochs", "batch_size", "lr", "weight_decay"):
        if getattr(args, k) is not None:
            protocol[k] = getattr(args, k)
    encoder, dim, checkpoint = load_encoder(args, device)
    patchwise = args.protocol == "cpc"
    if patchwise:
        encoder = PatchGrid(encoder, args, checkpoint)
    before = copy.deepcopy(encoder.state_dict())
    name, train, val = load_splits(args, checkpoint, device)
    classes, settings = int(train.labels.max()) + 1, dict(protocol=args.protocol, sweep=args.sweep, train=len(train), val=len(val))
    if args.batch_size is None:
        protocol["batch_size"] = min(protocol["batch_size"], len(train), 4096 if train.in_workers else 256)
    if args.sweep or not args.augment or args.protocol == "lbfgs":
        bank, labels = common.features(encoder, train, checkpoint["input"], args.workers, args.precision)
    if args.sweep:
        rest, held = (i.to(bank.device) for i in hold_out(len(bank), args.seed))

    if args.protocol == "lbfgs":                                # to the optimum, as `transfer` does
        l2 = 1.0 if args.weight_decay is None else args.weight_decay
        if args.sweep:
            l2, _, _ = choose_l2((bank[rest], labels[rest]), (bank[held], labels[held]), "top1", np.logspace(-4, 3, 15))
        weights = logistic_regression(bank, labels, classes, l2)
        predict, settings = lambda h: h.float() @ weights[:, :-1].T + weights[:, -1], dict(settings, l2=l2)
    else:
        if args.sweep:
            rates = [protocol["lr"] * f for f in (0.1, 0.3, 1, 3, 10)]
            heads = train_probes(args, protocol, rates, (bank[rest], labels[rest]), encoder, dim, classes, checkpoint, device)
            tops = [accuracy(head(bank[held].float()), labels[held], 1) for head in heads]
            protocol["lr"] = rates[tops.index(max(tops))]
            common.say(f"lr {protocol['lr']:g} chosen: {max(tops):.2f} % on {len(held)} held-out training images (" +
                       ", ".join(f"{lr:g}: {top:.2f}" for lr, top in zip(rates, tops)) + ")")
        predict, = train_probes(args, protocol, [protocol["lr"]], train if args.augment else (bank, labels), encoder, dim, classes, checkpoint, device)
        settings = dict(protocol, **settings, augment=args.augment)

    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items()), "the frozen encoder moved"
    h, truth = common.features(encoder, val, checkpoint["input"], args.workers, args.precision)
    with torch.no_grad():
        logits = torch.cat([predict(piece.float()) for piece in h.split(65536)])
    report(args, checkpoint, name, "linear", settings, dict(top1=accuracy(logits, truth, 1), top5=accuracy(logits, truth, 5)))
    if common.rank() == 0:
        draw_confusion(args, logits.argmax(1), truth)


def train_probes(args, protocol, rates, source, encoder, dim, classes, checkpoint, device):
    """Linear classifiers trained side by side on the same batches, one for each of `rates`: on the cached features and labels ((n, D), (n,)) that
    `source` is, or on random crops of the data set that it is. Returns them."""
    cached = isinstance(source, tuple)
    data, (bank, labels) = (source[0], source) if cached else (source, (None, None))
    patchwise = isinstance(encoder, PatchGrid)
    crop = common.Crop(1, checkpoint["input"]["size"], (0.08, 1.0), flip=0.5, interpolation=checkpoint["input"]["interpolation"])
    if patchwise:
        crop = cpc_v2.RandomCrop(checkpoint["input"]["size"], checkpoint["args"]["resize"], flip=0.5)
    batches = common.Batches(data, [crop], min(protocol["batch_size"], len(data)) if len(rates) > 1 else protocol["batch_size"], args.seed)
    total = protocol["epochs"] * len(batches)

    torch.manual_seed(args.seed)
    if patchwise:
        first = patch_classifier(dim, classes)
    else:
        first = nn.Linear(dim, classes)
        nn.init.normal_(first.weight, std=protocol["init"])
        nn.init.zeros_(first.bias)
    heads = nn.ModuleList(copy.deepcopy(first) for _ in rates).to(device)
    networks = [DistributedDataParallel(head) if common.world_size() > 1 else head for head in heads]
    groups = [dict(params=[w for w in head.parameters() if w.requires_grad]) for head in heads]
    if patchwise:
        optimizer = torch.optim.Adam(groups, weight_decay=protocol["weight_decay"])
    else:
        optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=protocol["nesterov"],
                                    weight_decay=0 if protocol["larc"] else protocol["weight_decay"])
    ready = None if cached else common.stream(batches, range(total), args.workers, device)
    for step in range(total):
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * protocol["batch_size"] / 256 * fall(protocol, step, total)
        if not cached:
            (x,), indices, broken = next(ready)
            common.note_broken(data, broken)
            common.seed_all(args.seed, step, common.rank(), 1)
            x = encoder.disturbed(x) if patchwise else common.normalize(x, checkpoint["input"]["mean"], checkpoint["input"]["std"])
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                h = encoder(x).float()
            y = data.labels[indices].to(device)
        else:
            indices = batches.indices(step).to(device)
            h, y = bank[indices].float(), labels[indices]
        loss = sum(F.cross_entropy(network(h), y) for network in networks)
        optimizer.zero_grad()
        loss.backward()
        if protocol["larc"]:
            common.larc_(heads.parameters(), weight_decay=protocol["weight_decay"])
        optimizer.step()
        if (step + 1) % max(1, total // 10) == 0:
            common.say(f"epoch {(step + 1) / len(batches):.1f}/{protocol['epochs']}  loss {loss.item() / len(rates):.4f}")
    return heads.requires_grad_(False).eval()


class PatchGrid(nn.Module):
    """The encoder on the patches that a checkpoint of cpc_v2.py was trained with: images (N, 3, H, W) -> latents (N, D, R, C)."""

    def __init__(self, encoder, args, checkpoint):
        super().__init__()
        if checkpoint["method"] != "cpc_v2" or args.baseline == "pixels":
            raise common.UserError(f"--protocol cpc: needs the encoder of a checkpoint of cpc_v2.py, not {args.baseline or checkpoint['method']}")
        self.encoder, self.settings = encoder, checkpoint["args"]

    def forward(self, x):
        """Normalised images, or patches (N, R, C, 3, s, s) of them."""
        patches = x if x.ndim == 6 else cpc_v2.extract_patches(x, self.settings["patch_size"], self.settings["stride"])
        return cpc_v2.encode(self.encoder, patches)

    def disturbed(self, x):
        """Images in 0..1 -> patches, each with the augmentation of the pre-training."""
        patches = cpc_v2.extract_patches(x, self.settings["patch_size"], self.settings["stride"])
        return cpc_v2.augment(patches.flatten(0, 2), self.settings["patch_augment"]).unflatten(0, patches.shape[:3])


def patch_classifier(dim, classes):
    """CPC v2, appendix B: (N, dim, R, C) -> logits (N, classes), the mean over the places of a linear classifier after BatchNorm without scale."""
    norm = nn.BatchNorm2d(dim)
    norm.weight.requires_grad_(False)                           # stays 1; the offset is learned
    return nn.Sequential(norm, nn.Conv2d(dim, classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class MapsClassifier(nn.Module):
    """CPC v2, section 2.2: eleven pre-activation bottleneck blocks on the encoder's maps (N, dim, h, w), then BN, mean, dropout and a linear layer.

    For ResNet-161's 4096 x 14 x 14: 4096-1024-4096 blocks, 33 convolutions, the "ResNet-33" of the paper. The fifth block halves the grid, which the
    paper leaves open; its shortcut has a convolution.
    """

    def __init__(self, dim, classes, blocks=11, halve=5, dropout=0.0):
        super().__init__()
        self.blocks = nn.Sequential(*(common.PreBottleneck(dim, dim // 4, 2 if i == halve else 1, nn.BatchNorm2d, out=dim) for i in range(1, blocks + 1)))
        self.bn = nn.BatchNorm2d(dim)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(dim, classes)

    def forward(self, maps):
        return self.fc(self.dropout(F.relu(self.bn(self.blocks(maps))).mean((2, 3))))


def draw_confusion(args, predicted, truth):
    """Rows: the true class; columns: what the probe says, in percent of the row."""
    classes = int(max(predicted.max(), truth.max())) + 1
    table = torch.bincount((truth * classes + predicted).cpu(), minlength=classes * classes).view(classes, classes).float()
    table = 100 * table / table.sum(1, keepdim=True).clamp(min=1)
    figure, ax = common.pyplot().subplots(figsize=(5.5, 4.8), layout="constrained")
    shown = ax.imshow(table, cmap="Blues", vmin=0, vmax=100)
    if classes <= 20:
        for i in range(classes):
            for j in range(classes):
                if table[i, j] >= 0.5:
                    ax.text(j, i, f"{table[i, j]:.0f}", ha="center", va="center", fontsize=7, color="white" if table[i, j] > 50 else "black")
    ax.set(xlabel="predicted class", ylabel="true class", title="percent of the images of a class")
    figure.colorbar(shown)
    save(args, figure, "confusion.png")


def spectrum(h):
    """The mean (D,) of features (n, D), and the eigenvalues (D,) and eigenvectors (D, D) of their covariance, gone through in chunks."""
    mean = sum(piece.double().sum(0) for piece in h.split(16384)) / len(h)
    covariance = sum((x := piece.double() - mean).T @ x for piece in h.split(16384)) / len(h)
    return mean.float(), *(a.float() for a in torch.linalg.eigh(covariance))


def logistic_regression(h, y, classes, l2, start=None, shape=None, iterations=1000):
    """Weights (C, D + 1), the last column the bias, at the minimum of  sum_i loss(W h_i + b, y_i) + l2 / 2 |W|^2  by L-BFGS, scikit-learn's C = 1 / l2.

    h (n, D) of any float type; y (n,) classes, or (n, C) of 1, 0 and nan, several labels at once, where nan is not counted. `start`: weights to begin at;
    `shape`: `spectrum(h)`. What L-BFGS sees is V in W = V T, T about the inverse root of the Hessian: the same minimum in ten times fewer steps.
    """
    n, (mean, values, vectors) = len(h), shape or spectrum(h)
    scale = (values.clamp(min=0) / classes + l2 / n + 1e-8 * values[-1]).rsqrt()
    into = lambda v: torch.cat([(w := (v[:, :-1] * scale) @ vectors.T), (v[:, -1] - w @ mean)[:, None]], 1)
    v = torch.zeros(classes, h.shape[1] + 1, device=h.device)
    if start is not None:
        v = torch.cat([start[:, :-1] @ vectors / scale, (start[:, -1] + start[:, :-1] @ mean)[:, None]], 1)
    v.requires_grad_()
    optimizer = torch.optim.LBFGS([v], max_iter=iterations, history_size=10, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        w = into(v)
        weights = w.detach().requires_grad_()
        total = l2 / (2 * n) * weights[:, :-1].square().sum()
        total.backward()
        for piece, truth in zip(h.split(16384), y.split(16384)):
            logits = F.linear(piece.float(), weights[:, :-1], weights[:, -1])
            if y.ndim == 1:
                loss = F.cross_entropy(logits, truth, reduction="sum") / n
            else:
                loss = F.binary_cross_entropy_with_logits(logits, truth.nan_to_num(), ~truth.isnan(), reduction="sum") / n
            loss.backward()
            total = total.detach() + loss.detach()
        w.backward(weights.grad)
        return total

    optimizer.step(closure)
    return into(v).detach()


def choose_l2(train, val, metric, values):
    """(the best of `values` on `val`, its weights, its figure): one fit on `train` for each, from the strongest on, each from where the last one ended."""
    best, weights, classes = (-1,), None, int(train[1].max()) + 1 if train[1].ndim == 1 else train[1].shape[1]
    shape = spectrum(train[0])
    for l2 in sorted(map(float, values), reverse=True):
        weights = logistic_regression(*train, classes, l2, weights, shape)
        best = max(best, (measure(metric, val[0].float() @ weights[:, :-1].T + weights[:, -1], val[1]), l2, weights), key=lambda b: b[0])
    common.say(f"l2 {best[1]:.3g} chosen: {metric} {best[0]:.2f} on {len(val[0])} held-out images")
    return best[1], best[2], best[0]


# ------------------------------------------------------------------------------------------------ fine-tuning on a few labels

def label_subset(labels, amount, seed, balanced):
    """Which training images keep their label: the same for the same seed everywhere, and a smaller share's images are among a larger one's.

    labels (n,); `amount` a float in 0..1, a share, or a whole number of images a class. `balanced`: as many of every class (SimCLR), otherwise drawn
    from all (CPC v2). Raises UserError for fewer images than classes."""
    classes = int(labels.max()) + 1
    number = amount * classes if isinstance(amount, int) else round(amount * len(labels))
    if number < classes:
        raise common.UserError(f"--labels {amount}: {number} of {len(labels)} images, fewer than the {classes} classes")
    if not balanced:
        return torch.from_numpy(np.random.default_rng([seed, 2]).permutation(len(labels))[:number]).sort().values
    chosen = []
    for c in range(classes):
        mine = (labels == c).nonzero()[:, 0]
        keep = amount if isinstance(amount, int) else max(1, round(amount * len(mine)))
        if isinstance(amount, int) and keep > len(mine):
            raise common.UserError(f"--labels {amount}: class {c} has only {len(mine)} images")
        chosen.append(mine[torch.from_numpy(np.random.default_rng([seed, 3, c]).permutation(len(mine))[:keep])])
    return torch.cat(chosen).sort().values


def data_gain(fractions, ours, baseline):
    """For each fraction, CPC v2's gain in data efficiency (its table 2): the largest of the measured fractions at which the baseline is no better than
    we are at this one, over this one. None where there is none, or where even the baseline's last figure is below ours at a smaller fraction."""
    gains = []
    for f, top1 in zip(fractions, ours):
        reached = [g for g, other in zip(fractions, baseline) if other <= top1]
        gains.append(max(reached) / f if reached else None)
    return gains


def finetune(args, device):
    encoder, _, checkpoint = load_encoder(args, device)
    name, train, val = load_splits(args, checkpoint, device)
    amounts = sorted(args.labels, key=lambda a: a * (int(train.labels.max()) + 1) if isinstance(a, int) else a * len(train))
    subsets = [label_subset(train.labels, amount, args.seed, args.subset == "balanced") for amount in amounts]
    rows = []
    for amount, subset in zip(amounts, subsets):
        row = dict(labels=amount, images=len(subset))
        for who, protocol in [("", FINETUNE[args.protocol])] + [("baseline_", SUPERVISED)] * (args.supervised is not None):
            torch.manual_seed(args.seed)
            start = copy.deepcopy(encoder) if not who else build(**checkpoint["encoder_config"]).to(device, memory_format=torch.channels_last)
            logits, truth = tune(args, protocol, start, take(train, subset), val, len(subset) / len(train), int(train.labels.max()) + 1, checkpoint,
                                 device)
            row.update({who + "top1": accuracy(logits, truth, 1), who + "top5": accuracy(logits, truth, 5)})
            common.say(f"labels {amount}: {'supervised baseline' if who else 'fine-tuned'} top-1 {row[who + 'top1']:.2f}")
        rows.append(row)
    if args.supervised:
        for row, gain in zip(rows, data_gain([r["images"] / len(train) for r in rows], *([r[k] for r in rows] for k in ("top1", "baseline_top1")))):
            row["gain"] = gain
    report(args, checkpoint, name, "finetune", dict(protocol=args.protocol, subset=args.subset, seed=args.seed, train=len(train), val=len(val)), {}, rows)
    if common.rank() == 0:
        draw_label_efficiency(args, name, rows, len(train))


def tune(args, protocol, encoder, data, val, share, classes, checkpoint, device):
    """Train `encoder` and a new linear head on all of `data`; returns the logits (n, classes) of `val` and its labels."""
    few = 0 if share <= 0.02 else 1
    epochs = args.epochs or protocol["epochs"][few]
    rates = [args.lr] * 2 if args.lr and protocol is not SUPERVISED else [protocol["lr"][few], protocol["head_lr"][few]]
    most = protocol["batch_size"] if data.in_workers else min(256, max(len(data) // 8, 8))
    batch = args.batch_size or max(common.world_size(), min(most, protocol["batch_size"], len(data)) // common.world_size() * common.world_size())
    crop = common.Crop(1, checkpoint["input"]["size"], (0.08, 1.0), interpolation=checkpoint["input"]["interpolation"])
    batches = common.Batches(data, [crop], min(batch, len(data)), args.seed)
    total = epochs * len(batches)
    head = nn.Linear(encoder.dim, classes).to(device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    encoder.requires_grad_(True).train()
    optimizer = torch.optim.SGD([dict(params=part.parameters()) for part in (encoder, head)], lr=1.0, momentum=0.9, nesterov=protocol["nesterov"],
                                weight_decay=protocol["weight_decay"])
    network = model = nn.Sequential(encoder, head)
    if common.world_size() > 1:
        network = DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(model) if device.type == "cuda" else model)
    for step, ((x,), indices, broken) in enumerate(common.stream(batches, range(total), args.workers, device)):
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * batches.batch_size / 256 * fall(protocol, step, total, 0.2)
        common.note_broken(data, broken)
        common.seed_all(args.seed, step, common.rank(), 1)
        x = common.normalize(common.flip(x), checkpoint["input"]["mean"], checkpoint["input"]["std"])
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            logits = network(x)
        loss = F.cross_entropy(logits.float(), data.labels[indices].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not math.isfinite(loss.item()):
            raise common.UserError(f"the loss is {loss.item()} in step {step + 1}; try a lower --lr")
        if (step + 1) % max(1, total // 5) == 0:
            common.say(f"epoch {(step + 1) / len(batches):.1f}/{epochs}  loss {loss.item():.4f}")
    if common.world_size() > 1:                                 # BatchNorm's running statistics may be each process's own
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    return common.features(network.module if common.world_size() > 1 else model, val, checkpoint["input"], args.workers, args.precision)


def draw_label_efficiency(args, name, rows, n):
    """Accuracy against the share of the labels, as in CPC v2's figure 1."""
    figure, ax = common.pyplot().subplots(figsize=(5.5, 4), layout="constrained")
    x = [100 * row["images"] / n for row in rows]
    ax.semilogx(x, [row["top1"] for row in rows], "o-", color="#2a6f97", label=f"fine-tuned ({args.protocol})")
    if args.supervised:
        ax.semilogx(x, [row["baseline_top1"] for row in rows], "s--", color="#bc4749", label="supervised from random initialisation")
        ax.set_title(", ".join(f"{row['gain']:.3g} times the data at {v:.3g} %" for v, row in zip(x, rows) if row["gain"]), fontsize=8)
    ax.set_xticks(x, [f"{v:.3g} %" for v in x])
    ax.minorticks_off()
    ax.set(xlabel="labelled images", ylabel=f"top-1 accuracy on {Path(name).name}, %", ylim=(0, None))
    ax.grid(alpha=0.3)
    ax.legend()
    save(args, figure, "labels.png")


# ------------------------------------------------------------------------------------------------ transfer

def measure(metric, logits, labels):
    """Percent: "top1"; "mean_per_class"; or "map_11_point", VOC's, for labels (n, C) of 1, 0 and nan, difficult ones, which count neither way."""
    if metric == "top1":
        return accuracy(logits, labels, 1)
    if metric == "mean_per_class":
        right = (logits.argmax(1) == labels).float()
        return 100 * torch.stack([right[labels == c].mean() for c in labels.unique()]).mean().item()
    points = []
    for scores, truth in zip(logits.T.double().cpu().numpy(), labels.T.cpu().numpy()):
        order = np.argsort(-scores, kind="stable")
        hits = truth[order][~np.isnan(truth[order])]
        if hits.sum():
            right = np.cumsum(hits)
            points.append(voc_average_precision(right / hits.sum(), right / np.arange(1, len(hits) + 1), True))
    return 100 * float(np.mean(points))


def image_lists(name, top, splits, seed):
    """For each split the (path, class name) of its images, for the sets that torchvision does not split, and for directories with class folders."""
    images = lambda folder: [str(p) for p in sorted(folder.iterdir()) if p.suffix.lower() in common.Folder.SUFFIXES]
    folders = lambda folder: [(path, c.name) for c in sorted(folder.iterdir()) if c.is_dir() for path in images(c)]
    try:
        if name == "sun397":                                    # the first of the official partitions: lines like /a/abbey/sun_abc.jpg
            lists = [[line.strip().lstrip("/") for line in (top / f"{split}.txt").read_text().split("\n") if line.strip()] for split in splits if split]
            return [split and [(str(top / p), str(Path(p).parent)) for p in lists.pop(0)] for split in splits]
        if name == "caltech101":                                # 30 images a class to learn from
            lists = ([], [])
            for folder in sorted(p for p in (top / "101_ObjectCategories").iterdir() if p.is_dir()):
                paths = images(folder)
                for place, i in enumerate(np.random.default_rng(seed).permutation(len(paths))):
                    lists[place >= 30].append((paths[i], folder.name))
            return [lists[0], None, lists[1]]
        return [split and folders(top / split) for split in splits]
    except OSError as e:
        raise common.UserError(f"--datasets {name}: {e.filename} is missing") from None


def transfer_splits(name, args, device):
    """(train, val, test, metric): data sets, labels (n,), or (n, C) for voc2007. Where the set has no validation images some of train are held out."""
    root = Path(args.root or "data")
    kind, splits, held, metric = TRANSFER.get(name, (None, ("train", None, "val"), 0, "top1"))
    if name in common.DATA:
        train, val, test = common.load_data(name, str(root), "train", device), None, common.load_data(name, str(root), "val", device)
    elif name == "voc2007":
        scenes = [voc_scenes(root, split) for split in splits]
        classes = sorted({c for s in scenes for c in s.classes})
        for s in scenes:
            s.images.labels = torch.zeros(len(s), len(classes))
            for i, k, hard in sorted(((i, k, hard) for i in range(len(s)) for k, hard in zip(s.labels[i].tolist(), s.difficult[i].tolist())),
                                     key=lambda o: -o[2]):      # a class counts as difficult if all its objects are
                s.images.labels[i, classes.index(s.classes[k])] = math.nan if hard else 1
        train, val, test = (s.images for s in scenes)
    else:
        if kind:
            lists = []
            for split in splits:
                try:
                    data = split and getattr(torchvision.datasets, kind)(root, split=split, download=True)
                except Exception as e:                          # no network, a moved file, scipy missing: it says what
                    raise common.UserError(f"--datasets {name}: torchvision's {kind} is not in {root} and could not be had "
                                           f"({' '.join(str(e).split())[:150]})") from None
                lists.append(data and (data._samples if name == "cars" else list(zip(getattr(data, "_image_files", None) or data._images, data._labels))))
        else:
            top = root / {"sun397": "SUN397"}.get(name, name) if name in TRANSFER else Path(name)
            if name not in TRANSFER and (top / "test").is_dir():
                splits = ("train", "val", "test")
            lists = image_lists(name, top, splits, args.seed)
        classes = {c: i for i, c in enumerate(sorted({c for _, c in lists[0]}))}
        unknown = sorted({str(c) for part in lists if part for _, c in part if c not in classes})
        if unknown or not all(part or split is None for part, split in zip(lists, splits)):
            raise common.UserError(f"--datasets {name}: " + (f"classes without training images: {', '.join(unknown)}" if unknown else
                                                            "no images in one of its splits"))
        train, val, test = (part and common.Folder([str(p) for p, _ in part], [classes[c] for _, c in part]) for part in lists)
    if val is None:
        rest, chosen = hold_out(len(train), args.seed, min(held, len(train) // 5) or None)
        train, val = take(train, rest), take(train, chosen)
    return train, val, test, metric


def transfer(args, device):
    encoder, _, checkpoint = load_encoder(args, device)
    look, rows = dict(checkpoint["input"], fraction=1.0, interpolation="bicubic"), []       # the shorter side resized, the central square: B.8
    for name in args.datasets:
        *parts, metric = transfer_splits(name, args, device)
        sets = []
        for part in parts:
            labels, part.labels = part.labels, torch.arange(len(part))                      # several labels an image are looked up afterwards
            h, order = common.features(encoder, part, look, args.workers, args.precision)
            part.labels = labels
            sets.append((h, labels[order.cpu()].to(h.device)))
        train, val, test = sets
        l2, weights, tuned = choose_l2(train, val, metric, np.logspace(-6, 5, 45))
        both = tuple(torch.cat(pair) for pair in zip(train, val))
        weights = logistic_regression(*both, len(weights), l2, weights)
        rows.append(dict(dataset=Path(name).name, train=len(train[0]), val=len(val[0]), test=len(test[0]), l2=float(f"{l2:.3g}"), metric=metric,
                         val_figure=tuned, figure=measure(metric, test[0].float() @ weights[:, :-1].T + weights[:, -1], test[1])))
    report(args, checkpoint, ", ".join(r["dataset"] for r in rows), "transfer", dict(seed=args.seed), {}, rows)


# ------------------------------------------------------------------------------------------------ invariance

def invariance(args, device):
    """SimCLR's table 3: small networks (one hidden layer of 512, our choice) that tell from h and from g(h) what was done to the image."""
    encoder, dim, checkpoint = load_encoder(args, device)
    name, train, val = load_splits(args, checkpoint, device)
    project = read_projector(args.checkpoint, checkpoint, dim).to(device)
    tasks = {     # classes, the share of each, x and y -> x
        "colour or grey": ((0.8, 0.2), lambda x, y: torch.where(y == 1, common.grayscale(x.clone(), 1), x)),
        "rotation": ((0.25,) * 4, lambda x, y: torch.stack([image.rot90(int(k), (1, 2)) for image, k in zip(x, y)])),
        "original or corrupted": ((0.5, 0.5), lambda x, y: torch.where(y == 1, common.noise(x.clone(), 1, 0.1), x)),
        "original or Sobel": ((0.5, 0.5), lambda x, y: torch.where(y == 1, common.sobel(x.clone(), 1), x)),
    }
    crop, rows = [common.CenterCrop(checkpoint["input"]["size"], interpolation=checkpoint["input"]["interpolation"])], []
    for number, (task, (shares, change)) in enumerate(tasks.items()):
        sets = []
        for split, data in enumerate((train, val)):
            common.seed_all(args.seed, 4, number, split)
            spaces, answers, generator = [], [], torch.Generator().manual_seed(args.seed * 100 + number * 2 + split)
            some = take(data, torch.randperm(len(data), generator=generator)[:args.count])
            pieces = common.InOrder(some, crop)
            for (x,), _, broken in common.stream(pieces, range(len(pieces)), args.workers, device):
                common.note_broken(some, broken)
                y = torch.multinomial(torch.tensor(shares), len(x), True, generator=generator)
                x = change(x, y.view(-1, 1, 1, 1).to(device))
                with torch.no_grad():
                    h = encoder(common.normalize(x, checkpoint["input"]["mean"], checkpoint["input"]["std"])).float()
                    spaces.append((h, project(h)))
                answers.append(y.to(device))
            sets.append(([torch.cat(s) for s in zip(*spaces)], torch.cat(answers)))
        (train_spaces, y), (test_spaces, truth) = sets
        row = dict(task=task, chance=100 * max(shares))
        for space, a, b in zip(("h", "g(h)"), train_spaces, test_spaces):
            mean, std = a.mean(0), a.std(0) + 1e-6
            row[space] = accuracy(small_network((a - mean) / std, y, len(shares), args.seed)((b - mean) / std), truth, 1)
        rows.append(row)
    report(args, checkpoint, name, "invariance", dict(train=min(args.count, len(train)), test=min(args.count, len(val)), seed=args.seed), {}, rows)


def small_network(h, y, classes, seed, epochs=20):
    common.seed_all(seed, 5)
    network = nn.Sequential(nn.Linear(h.shape[1], 512), nn.ReLU(), nn.Linear(512, classes)).to(h.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(epochs):
        for piece in torch.randperm(len(h)).to(h.device).split(128):
            optimizer.zero_grad()
            F.cross_entropy(network(h[piece]), y[piece]).backward()
            optimizer.step()
    return network.requires_grad_(False)


def read_projector(path, checkpoint, dim):
    """g out of one of our checkpoints: its layers are known from their tensors, and a ReLU stands where a number has none."""
    state = {k.removeprefix("projector."): v for k, v in checkpoint["model"].items() if k.startswith("projector.")}
    if not state or "encoder_config" not in checkpoint or not checkpoint["args"]:
        raise common.UserError(f"{path}: has no projector to compare with; invariance needs a checkpoint of these scripts that has one")
    if "weight" in state:
        state = {f"0.{k}": v for k, v in state.items()}
    layers = []
    for i in range(max(int(k.split(".")[0]) for k in state) + 1):
        weight = state.get(f"{i}.weight")
        if weight is not None and weight.ndim == 2:
            layers.append(nn.Linear(*weight.shape[::-1], bias=f"{i}.bias" in state))
        elif f"{i}.running_mean" in state:
            layers.append(nn.BatchNorm1d(len(state[f"{i}.running_mean"]), affine=weight is not None))
        else:
            layers.append(nn.ReLU())
    network = nn.Sequential(*layers)
    network.load_state_dict(state)
    return network.requires_grad_(False).eval()

# ------------------------------------------------------------------------------------------------ detection: data

class Scenes(torch.utils.data.Dataset):
    """Images with boxes: `boxes` a list of (k, 4) float32, x0, y0, x1, y1 in pixels from 0, ends excluded; `labels` of (k,) from 0; `difficult` of (k,)."""

    def __init__(self, images, boxes, labels, difficult, names, classes):
        self.boxes, self.labels, self.difficult, self.names, self.classes = boxes, labels, difficult, names, classes
        self.images, self.in_workers = images, isinstance(images, common.Folder)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, indices):
        """[(image (3, H, W) uint8, its index)]; reads files here, in a worker."""
        images = [self.images.read(int(i)) if self.in_workers else self.images[int(i)] for i in indices]
        return list(zip(images, map(int, indices)))


def drawn_scenes(count, seed):
    """Scenes of `shapes`, 96 pixels, three by three cells of the size that the encoder was trained on."""
    images, labels, boxes = common.draw_shapes(count, seed, size=96, cells=3)
    there = [torch.from_numpy(k >= 0) for k in labels]
    return Scenes(torch.from_numpy(images), [torch.from_numpy(b).float()[t] for b, t in zip(boxes, there)],
                  [torch.from_numpy(k)[t] for k, t in zip(labels, there)], [torch.zeros(int(t.sum()), dtype=torch.bool) for t in there],
                  [str(i) for i in range(count)], common.SHAPES)


def voc_scenes(directory, part, classes=None):
    """The images of VOC2007 and, for training, VOC2012 below DIR/VOCdevkit that ImageSets/Main/<part>.txt lists, all years that have it."""
    top = Path(directory) / "VOCdevkit" if (Path(directory) / "VOCdevkit").is_dir() else Path(directory)
    years = [top / f"VOC{year}" for year in (2007, 2012) if (top / f"VOC{year}" / "ImageSets" / "Main" / f"{part}.txt").is_file()]
    if not years:
        raise common.UserError(f"--data {directory}: no set {part}; expected {top / 'VOC2007' / 'ImageSets' / 'Main' / part}.txt")
    paths, scenes, problems = [], [], {"annotations missing": [], "images missing": [], "annotations unreadable": [], "boxes outside their image": []}
    for year in years:
        for name in (year / "ImageSets" / "Main" / f"{part}.txt").read_text().split("\n"):
            if not name.strip():
                continue
            note, image = year / "Annotations" / f"{name.split()[0]}.xml", year / "JPEGImages" / f"{name.split()[0]}.jpg"
            if not note.is_file() or not image.is_file():
                problems["images missing" if note.is_file() else "annotations missing"].append(image if note.is_file() else note)
                continue
            try:
                root = ElementTree.parse(note).getroot()
                size = [float(root.findtext(f"size/{k}")) for k in ("width", "height")]
                objects = [(o.findtext("name"), [float(o.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax")], o.findtext("difficult") == "1")
                           for o in root.iter("object")]
            except (ElementTree.ParseError, TypeError, ValueError):
                problems["annotations unreadable"].append(note)
                continue
            if any(not (1 <= x0 <= x1 <= size[0] and 1 <= y0 <= y1 <= size[1]) for _, (x0, y0, x1, y1), _ in objects):
                problems["boxes outside their image"].append(note)
            paths.append(str(image))
            scenes.append(objects)
    for what, where in problems.items():
        if where:
            raise common.UserError(f"--data {directory}: {what}: {len(where)}, the first {where[0]}")
    if not paths:
        raise common.UserError(f"--data {directory}: set {part} is empty")
    found = sorted({name for objects in scenes for name, _, _ in objects})
    unknown = sorted(set(found) - set(classes)) if classes else []
    if unknown:
        raise common.UserError(f"--data {directory}: {part} has classes that the training set does not have: {', '.join(unknown)}")
    classes = classes or found
    boxes = [torch.tensor([box for _, box, _ in objects]).reshape(-1, 4) - torch.tensor([1.0, 1, 0, 0]) for objects in scenes]       # VOC counts from 1
    return Scenes(common.Folder(paths, None), boxes, [torch.tensor([classes.index(name) for name, _, _ in objects], dtype=torch.int64) for objects in scenes],
                  [torch.tensor([hard for _, _, hard in objects], dtype=torch.bool) for objects in scenes], [Path(p).stem for p in paths], classes)


# ------------------------------------------------------------------------------------------------ detection: the official kit's figures

def voc_matches(detections, truth):
    """Rank the detections of one class and find the box that each may claim. All arguments are numpy arrays.

    detections: image (M,), score (M,), box (M, 4); truth: image (K,), box (K, 4); boxes as VOC writes them, from 1, ends included. Returns, by falling
    score (ties in the order given), the largest overlap (M,) with a box of the same image, and which (M,), the first of equals; overlap -inf for none.
    """
    image, score, box = detections
    order = np.argsort(-score, kind="stable")
    overlap, which = np.full(len(order), -np.inf), np.zeros(len(order), np.int64)
    area = lambda b: (b[..., 2] - b[..., 0] + 1) * (b[..., 3] - b[..., 1] + 1)
    for i in np.unique(truth[0]):
        mine, theirs = np.flatnonzero(image[order] == i), np.flatnonzero(truth[0] == i)
        a, b = box[order[mine]][:, None], truth[1][theirs][None]
        width = np.minimum(a[..., 2], b[..., 2]) - np.maximum(a[..., 0], b[..., 0]) + 1
        height = np.minimum(a[..., 3], b[..., 3]) - np.maximum(a[..., 1], b[..., 1]) + 1
        meet = (width > 0) & (height > 0)
        union = np.where(meet, area(a) + area(b) - width * height, 1)
        iou = np.where(meet, width * height / union, -np.inf)
        if len(mine):
            overlap[mine], which[mine] = iou.max(1), theirs[iou.argmax(1)]
    return overlap, which


def voc_recall_precision(overlap, which, difficult, threshold):
    """VOCevaldet.m: a detection is right when it overlaps its box by `threshold` or more and is the first to claim it; the next ones are wrong, those
    that claim a difficult box count neither way. overlap, which (M,) from `voc_matches`, difficult (K,) -> recall, precision (M,); nothing counted yet: 0."""
    claims = overlap >= threshold
    ignored = claims & difficult[which] if len(difficult) else np.zeros_like(claims)
    right = np.zeros(len(overlap))
    ranks = np.flatnonzero(claims & ~ignored)
    right[ranks[np.unique(which[ranks], return_index=True)[1]]] = 1
    counted = np.cumsum(~ignored)
    right = np.cumsum(right)
    return right / (~difficult).sum(), right / np.maximum(counted, 1)


def voc_average_precision(recall, precision, eleven_point):
    """recall, precision (M,) by falling score -> average precision in 0..1.

    `eleven_point`, VOC2007: the mean over r = 0, 0.1 ... 1 of the best precision at recall r or more. Otherwise, VOC2010 and later: the area under the
    precision that is made to fall with recall. r is k / 10 to the last bit: with the kit's own 3 * 0.1 a recall of exactly 0.3 would miss it.
    """
    recall, precision = np.asarray(recall, np.float64), np.asarray(precision, np.float64)
    if eleven_point:
        return float(sum(precision[recall >= k / 10].max(initial=0) for k in range(11)) / 11)
    r, p = np.concatenate([[0], recall, [1]]), np.concatenate([[0], precision, [0]])
    return float((np.diff(r) * np.maximum.accumulate(p[::-1])[::-1][1:]).sum())


def voc_table(found, scenes):
    """found: image (M,), label (M,), score (M,), box (M, 4) as numpy, boxes as in `Scenes`. Percent: {(class, rule): (10,)} over the overlaps 0.5, 0.55 ...
    0.95, for both rules, without the classes that have no box to find."""
    image = np.repeat(np.arange(len(scenes)), [len(b) for b in scenes.boxes])
    label, box, difficult = (torch.cat(a).numpy() for a in (scenes.labels, scenes.boxes, scenes.difficult))
    table = {}
    for k, name in enumerate(scenes.classes):
        mine, theirs = found[1] == k, label == k
        if not (theirs & ~difficult).any():
            continue
        matches = voc_matches((found[0][mine], found[2][mine], found[3][mine] + [1, 1, 0, 0]), (image[theirs], box[theirs].astype(np.float64) + [1, 1, 0, 0]))
        curves = [voc_recall_precision(*matches, difficult[theirs], 0.5 + 0.05 * t) for t in range(10)]
        for rule in (True, False):
            table[name, rule] = np.array([100 * voc_average_precision(*curve, rule) for curve in curves])
    return table


# ------------------------------------------------------------------------------------------------ detection: the network

class Trunk(nn.Module):
    """What the detector looks at: the papers' C4, an encoder without its last stage; or, with four `stages`, a pyramid on them."""

    def __init__(self, encoder, fpn):
        super().__init__()
        self.encoder, self.pyramid = encoder, None
        self.eval()                                             # the zeros below must not count as an image
        with torch.no_grad():
            widths = [y.shape[1] for y in self.stages(torch.zeros(1, 3, 64, 64))] if fpn else []
            y = encoder.maps(torch.zeros(1, 3, 64, 64))
        self.out_channels, self.stride = y.shape[1], 64 // y.shape[3]
        if fpn:
            self.out_channels = 256
            self.pyramid = torchvision.ops.FeaturePyramidNetwork(widths, 256, torchvision.ops.feature_pyramid_network.LastLevelMaxPool())

    def stages(self, x):
        x, e = self.encoder.maxpool(F.relu(self.encoder.bn1(self.encoder.conv1(x)))), self.encoder
        return [x := stage(x) for stage in (e.layer1, e.layer2, e.layer3, e.layer4)]

    def forward(self, x):
        if self.pyramid is None:
            return OrderedDict({"0": self.encoder.maps(x)})
        return self.pyramid(OrderedDict((str(i), y) for i, y in enumerate(self.stages(x))))


class Align(torchvision.ops.MultiScaleRoIAlign):
    """RoIAlign as detectron2 has it (half a pixel shifted, as many samples as the box needs), on the one map of C4."""

    def __init__(self, size, stride):
        super().__init__(["0"], size, sampling_ratio=0)
        self.stride = stride

    def forward(self, x, boxes, image_shapes):
        return torchvision.ops.roi_align(x["0"], boxes, self.output_size, 1 / self.stride, sampling_ratio=0, aligned=True)


def detector(encoder, recipe, kind, classes, input, device):
    """torchvision's Faster R-CNN on `encoder`, everything trained."""
    encoder = encoder.to("cpu", memory_format=torch.contiguous_format).requires_grad_(True)      # channels-last: torch 2.15's backward crashes on a CPU
    splits = getattr(encoder, "layer4", None) is not None and getattr(encoder, "bn1", None) is not None
    if kind == "fpn" and not splits:
        raise common.UserError("--detector fpn: needs an encoder of four stages; use c4")
    if kind == "fpn":
        trunk, anchors = Trunk(encoder, True), tuple((a,) for a in recipe["anchors"])
        pool = torchvision.ops.MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
        head, dim = faster_rcnn.TwoMLPHead(256 * 7 * 7, 1024), 1024
    else:
        if splits:
            stage, dim, encoder.layer4 = encoder.layer4, encoder.dim, nn.Identity()
            trunk = Trunk(encoder, False)
        else:                                                   # CPC's ResNet-161 ends with its third stage: three new blocks, our choice
            trunk = Trunk(encoder, False)
            dim = trunk.out_channels
            blocks = [common.Bottleneck(dim, dim // 4, 2 if i == 0 else 1, nn.BatchNorm2d) for i in range(3)]
            stage = nn.Sequential(*blocks)
        head = nn.Sequential(stage, nn.BatchNorm2d(dim), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())       # the extra norm of MoCo's configs
        pool, anchors = Align(recipe["pool"], trunk.stride), (recipe["anchors"],)
    proposals = recipe["proposals"]
    model = FasterRCNN(trunk, min_size=recipe["sizes"], max_size=recipe["max_size"], image_mean=input["mean"], image_std=input["std"],
                       rpn_anchor_generator=AnchorGenerator(anchors, ((0.5, 1.0, 2.0),) * len(anchors)), rpn_pre_nms_top_n_train=proposals[0],
                       rpn_post_nms_top_n_train=proposals[1], rpn_pre_nms_top_n_test=proposals[2], rpn_post_nms_top_n_test=proposals[3], box_roi_pool=pool, box_head=head,
                       box_predictor=faster_rcnn.FastRCNNPredictor(dim, classes + 1), box_batch_size_per_image=recipe["rois"],
                       box_positive_fraction=0.25, box_score_thresh=0.05, box_nms_thresh=0.5, box_detections_per_img=100)
    return model.to(device).train()


# ------------------------------------------------------------------------------------------------ detection: training and test

def detect(args, device):
    encoder, _, checkpoint = load_encoder(args, device)
    if args.baseline == "pixels":
        raise common.UserError("--baseline pixels: a detector needs an encoder; give random")
    kind = "voc" if args.data else "shapes"
    recipe = dict(DETECT[kind])
    if args.data:
        train, name = voc_scenes(args.data, args.train_set), Path(args.data).name
        test = voc_scenes(args.data, args.test_set, train.classes)
        if not any("VOC2012" in p for p in train.images.paths):
            recipe["steps"] = 9000
    else:
        train, test, name = drawn_scenes(1000, 11), drawn_scenes(300, 12), "shapes"
    if args.image_size:
        scale = args.image_size / recipe["size"]
        recipe.update(size=args.image_size, sizes=tuple(round(s * scale) for s in recipe["sizes"]), max_size=round(recipe["max_size"] * scale),
                      anchors=tuple(max(4, round(a * scale)) for a in recipe["anchors"]))
    for k in ("steps", "batch_size", "lr", "rois"):
        if getattr(args, k) is not None:
            recipe[k] = getattr(args, k)
    recipe["warmup"] = min(recipe["warmup"], max(1, recipe["steps"] // 8))
    settings = dict(recipe, detector=args.detector, color_drop=args.color_drop, seed=args.seed, baseline=args.baseline, train=len(train), test=len(test))
    batches = common.Batches(train, [], recipe["batch_size"], args.seed)
    torch.manual_seed(args.seed)
    model = detector(encoder, recipe, args.detector, len(train.classes), checkpoint["input"], device)
    network = model
    if common.world_size() > 1:
        network = DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(model) if device.type == "cuda" else model)
        model = network.module
    norms = {id(p) for m in model.modules() if isinstance(m, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)) for p in m.parameters()}
    groups = [[p for p in model.parameters() if (id(p) in norms) == of_norm] for of_norm in (False, True)]
    optimizer = torch.optim.SGD([dict(params=groups[0]), dict(params=groups[1], weight_decay=0)], lr=recipe["lr"], momentum=0.9,
                                weight_decay=recipe["weight_decay"])
    folder = Path(args.output or Path(args.checkpoint).parent / "-".join(filter(None, ["detect", name, args.detector, args.baseline])))
    file, step, total = folder / "detect.pt", 0, recipe["steps"]
    make_folder(folder)
    mine = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    mine.update(classes=list(train.classes), encoder=fingerprint(checkpoint["encoder"]))
    if file.exists():
        saved = common.read_tensors(file)
        differing = [k for k in mine if saved.get("settings", {}).get(k) != mine[k]]
        if differing:
            raise common.UserError(f"{file}: made with other settings: {', '.join(differing)}; use the same or give another --output")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
        common.say(f"going on from step {step} of {total} in {file}")

    def save_state(step):
        if common.rank() == 0:
            common.write_atomically(file, lambda f: torch.save(dict(settings=mine, step=step, model=model.state_dict(), optimizer=optimizer.state_dict()), f))

    losses = []
    for first, scenes in zip(range(step, total), scene_stream(train, [batches.indices(i) for i in range(step, total)], args.workers)):
        rate = fall(recipe, first, total) * min(1, 1e-3 + (1 - 1e-3) * first / recipe["warmup"])
        for group in optimizer.param_groups:
            group["lr"] = recipe["lr"] * rate
        common.seed_all(args.seed, first, common.rank(), 1)
        inputs = prepare(train, scenes, device, args.color_drop)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            loss = sum(network(*inputs).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise common.UserError(f"the loss is {losses[-1]} in step {first + 1}; try a lower --lr. The last good state is in {folder}")
        step = first + 1
        if step % max(1, total // 20) == 0:
            common.say(f"step {step}/{total}  loss {sum(losses) / len(losses):.4f}")
            losses = []
        stop = common.asked_to_stop()
        if stop or step == total or step % args.save_every == 0:
            save_state(step)
        if stop and step < total:
            raise common.Stopped(f"stopped after step {step} of {total}; the same command goes on from {file}")

    precise_norms(model, train, batches, min(200, total), args, device)
    model.transform.min_size = (recipe["size"],)
    found = find_all(model, test, args, device)
    table = voc_table(found, test)
    if not table:
        raise common.UserError(f"--data {args.data}: {args.test_set} has no box that is not difficult")
    ap = lambda rule, t: float(np.mean([v[t] if t is not None else v.mean() for (_, r), v in table.items() if r == rule]))
    result = {key + ("" if rule else "_all"): ap(rule, t) for rule in (True, False) for key, t in (("AP", None), ("AP50", 0), ("AP75", 5))}
    rows = [dict({"class": c}, **{key + ("" if rule else "_all"): (table[c, rule][t] if t is not None else table[c, rule].mean()).item()
                                  for rule in (True, False) for key, t in (("AP", None), ("AP50", 0), ("AP75", 5))})
            for c in test.classes if (c, True) in table]
    missing = [c for c in test.classes if (c, True) not in table]
    if missing:
        common.say(f"not in the test set, and left out of the means: {', '.join(missing)}")
    shown = {k: settings[k] for k in ("detector", "steps", "batch_size", "lr", "size", "rois", "color_drop", "seed", "train", "test")}
    report(args, checkpoint, name, "detect", shown, result, rows)
    if common.rank() == 0:
        draw_detections(folder, test, found)


def fingerprint(state):
    """A number that tells one encoder from another."""
    return float(sum(v.double().abs().sum() for v in state.values()))


def scene_stream(scenes, batches, workers):
    """[(image (3, H, W) uint8, index)] for each tensor of indices in `batches`."""
    return torch.utils.data.DataLoader(scenes, batch_size=None, sampler=batches, num_workers=workers if scenes.in_workers else 0)


def prepare(data, scenes, device, color_drop=0.0, train=True):
    """What torchvision's detectors take: images in 0..1, mirrored by chance, with one channel in place of all three by the chance `color_drop` (CPC v2);
    and their boxes, difficult ones too, as detectron2 has it."""
    images, targets = [], []
    for image, i in scenes:
        if image is None:
            raise common.UserError(f"{data.images.paths[i]}: cannot be read")
        x, boxes = image.to(device).float() / 255, data.boxes[i].to(device)
        if train and torch.rand(1) < 0.5:
            x, boxes = x.flip(2), torch.stack([x.shape[2] - boxes[:, 2], boxes[:, 1], x.shape[2] - boxes[:, 0], boxes[:, 3]], 1)
        if train and torch.rand(1) < color_drop:
            x = x[torch.randint(3, (1,))].expand(3, -1, -1)
        images.append(x)
        targets.append(dict(boxes=boxes, labels=data.labels[i].to(device) + 1))             # 0 is the background
    return (images, targets) if train else (images,)


@torch.no_grad()
def precise_norms(model, train, batches, count, args, device):
    """BatchNorm's statistics anew, as the mean over `count` batches with the final weights (Precise-BN)."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None
    for step, scenes in enumerate(scene_stream(train, [batches.indices(i) for i in range(count)], args.workers)):
        common.seed_all(args.seed, step, common.rank(), 6)
        model(*prepare(train, scenes, device))
    for buffer in model.buffers() if common.world_size() > 1 else ():
        dist.broadcast(buffer, 0)


@torch.no_grad()
def find_all(model, test, args, device):
    """The detections in all test images, which the processes share: image (M,), label (M,), score (M,), box (M, 4) as numpy."""
    model.eval()
    mine, found = torch.arange(common.rank(), len(test), common.world_size()), []
    for scenes in scene_stream(test, list(mine.split(8)), args.workers):
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            results = model(*prepare(test, scenes, device, train=False))
        for (_, i), y in zip(scenes, results):
            found += [(i, int(k) - 1, float(s), *map(float, b)) for k, s, b in zip(y["labels"], y["scores"], y["boxes"])]
    if common.world_size() > 1:
        everyones = [None] * common.world_size()
        dist.all_gather_object(everyones, found)
        found = sorted(row for part in everyones for row in part)
    table = np.array(found, np.float64).reshape(-1, 7)
    return table[:, 0].astype(int), table[:, 1].astype(int), table[:, 2], table[:, 3:]


def draw_detections(folder, test, found, columns=4):
    """The first test images: what was found (score 0.3 or more, colour by class), and dashed in white what is there."""
    plt = common.pyplot()
    figure, axes = plt.subplots(2, columns, figsize=(3 * columns, 6), squeeze=False, layout="constrained")
    for i, ax in enumerate(axes.flat):
        ax.axis("off")
        if i >= len(test):
            continue
        ax.imshow(test[[i]][0][0].permute(1, 2, 0))
        frame = lambda box, color, style: ax.add_patch(plt.Rectangle(box[:2] - 0.5, *(box[2:] - box[:2]), fill=False, edgecolor=color, linestyle=style))
        for box in test.boxes[i].numpy():
            frame(box, "white", "--")
        for _, k, score, box in zip(*(a[(found[0] == i) & (found[2] >= 0.3)] for a in found)):
            color = plt.get_cmap("tab20")(int(k) % 20)
            frame(box, color, "-")
            ax.text(box[0], box[1], f"{test.classes[int(k)]} {score:.2f}", fontsize=7, color="white", verticalalignment="bottom",
                    bbox=dict(facecolor=color, linewidth=0, pad=0.5))
    common.save_picture(figure, folder / "detections.png")


# ------------------------------------------------------------------------------------------------ results and flags

def report(args, checkpoint, data, task, settings, result, rows=()):
    """A table for people and one line of JSON for programs: `result`, and `rows` if there are several."""
    if common.rank() > 0:
        return
    asked = {"random": "untrained " + checkpoint["encoder_config"]["arch"], "pixels": "pixels", None: str(args.checkpoint)}[args.baseline]
    method = checkpoint["method"] if args.baseline is None else "-"
    tidy = lambda row: {k: round(v, 2) if isinstance(v, float) and k not in ("labels", "l2") else v for k, v in row.items()}
    result, rows = tidy(result), [tidy(row) for row in rows]
    print(f"{task} on {data}: " + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in settings.items()))
    cell = lambda v: f"{v:.2f}" if isinstance(v, float) else "-" if v is None else str(v)
    for part in (rows, [dict(encoder=asked, method=method, **result)]):
        lines = [list(part[0])] + [[cell(v) if k not in ("labels", "l2") else str(v) for k, v in row.items()] for row in part] if part else []
        widths = [max(map(len, column)) for column in zip(*lines)]
        for line in lines:
            print("  ".join(f"{text:{'<' if i == 0 or not part[0] or isinstance(list(part[0].values())[i], str) else '>'}{w}}"
                            for i, (text, w) in enumerate(zip(line, widths))).rstrip())
    print(json.dumps(dict(task=task, data=data, checkpoint=str(args.checkpoint), baseline=args.baseline, **settings, **result,
                          **(dict(rows=rows) if rows else {}))), flush=True)


def make_folder(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise common.UserError(f"--output {folder}: {e}") from None


def save(args, figure, name):
    folder = Path(args.output or Path(args.checkpoint).parent)
    make_folder(folder)
    common.save_picture(figure, folder / ((f"{args.baseline}-" if args.baseline else "") + name))


def labels_amount(text):
    """"0.1", "1.0": a share of the training images; "5": so many of every class."""
    try:
        value = int(text) if text.isdigit() else float(text)
    except ValueError:
        value = 0
    if not (value > 0 and (isinstance(value, int) or value <= 1)):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a share above 0 and up to 1.0 nor a whole number of images a class")
    return value


TASKS = dict(knn="nearest neighbours", linear="linear classifier on frozen features", finetune="the whole network trained on a few labels",
             detect="Faster R-CNN", transfer="logistic regression on other data sets", invariance="which transformations can be told from h and g(h)",
             neighbours="pictures of neighbours, and a map of the features")


def parse_args(argv=None):
    parser = common.LineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    tasks = parser.add_subparsers(dest="task", required=True, parser_class=common.LineParser, metavar="TASK")
    for task, text in TASKS.items():
        add = tasks.add_parser(task, help=text, description=text, allow_abbrev=False).add_argument
        add("checkpoint", metavar="CHECKPOINT", help="checkpoint.pt of a run, or a file of another project")
        if task == "detect":
            add("--data", metavar="DIR", help="with VOCdevkit/VOC2007 and, to train on, VOC2012; default: drawn scenes")
        elif task == "transfer":
            add("--datasets", nargs="+", required=True, metavar="NAME|DIR", help=f"{', '.join(TRANSFER)}, shapes, stl10, or directories with train/<class>, "
                "val/<class> and perhaps test/<class>")
        else:
            add("--data", type=common.data_name, metavar="NAME|DIR", help="default: what the checkpoint was trained on")
        if task != "detect":
            add("--root", help="where the named data sets lie; default: as in training, or data")
        if task == "finetune":
            add("--baseline", dest="supervised", choices=["supervised"], help="train the same network from random initialisation as well")
        elif task != "invariance":
            add("--baseline", choices=["random", "pixels"], help="ask an untrained encoder, or the pixels, instead")
        if task != "detect":
            add("--size", type=common.count, help="side of the images that the encoder is given; default: as in its training (224 or 32 for other projects)")
        add("--workers", type=common.whole, default=2, help="processes that read image files (default 2)")
        add("--seed", type=common.seed, default=0, help="of everything that is drawn, and of the random baseline")
        add("--precision", choices=["bf16", "fp32"], default="fp32")
        add("--output", metavar="DIR", help="where the pictures go; default: beside the checkpoint" + (", in a folder" if task == "detect" else ""))
        if task in ("knn", "linear"):
            add("--sweep", action="store_true", help="choose k and temperature, or the rate, on held-out training images")
        if task == "knn":
            add("--k", type=common.count, default=200, help="neighbours that vote (default 200)")
            add("--temperature", type=common.positive, default=0.1, help="of the votes (default 0.1)")
        if task == "linear":
            add("--protocol", choices=[*PROTOCOLS, "lbfgs"], default="simclr", help="whose way of training the probe (default simclr); lbfgs: to the optimum")
            add("--weight-decay", type=common.not_negative, help="for lbfgs: l2 (default 1)")
            add("--no-augment", dest="augment", action="store_false", help="compute the features once, without random crops and flips")
        if task == "finetune":
            add("--labels", type=labels_amount, nargs="+", default=[0.01, 0.1], help="shares (0.01, 1.0) or whole numbers of images a class (default 0.01 0.1)")
            add("--subset", choices=["balanced", "random"], default="balanced", help="as many of every class (SimCLR) or drawn from all (CPC v2)")
            add("--protocol", choices=list(FINETUNE), default="simclr", help="whose way of fine-tuning (default simclr)")
        if task in ("linear", "finetune"):
            add("--epochs", type=common.count)
        if task in ("linear", "finetune", "detect"):
            add("--batch-size", type=common.count)
            add("--lr", type=common.positive, help="for the whole batch" if task == "detect" else "per 256 images")
        if task == "detect":
            add("--train-set", default="trainval", help="of ImageSets/Main (default trainval)")
            add("--test-set", default="test", help="of ImageSets/Main (default test)")
            add("--detector", choices=["c4", "fpn"], default="c4", help="on the third stage, as the papers' tables (default); or on a pyramid")
            add("--steps", type=common.count, help="default: 24000, without VOC2012 9000, on drawn scenes 400")
            add("--image-size", type=common.count, help="shorter side in the test (default 800); those of training and the anchors go with it")
            add("--rois", type=common.count, help="boxes an image that the head learns from (default 512)")
            add("--color-drop", type=common.share, default=0.0, help="share of images of which one channel is kept (CPC v2)")
            add("--save-every", type=common.count, default=100, help="steps between savings of the state")
        if task in ("invariance", "neighbours"):
            add("--count", type=common.count, default=5000 if task == "invariance" else 1500, help="images used, of each part, or in the map")
        if task == "neighbours":
            add("--map", choices=["tsne", "pca"], default="tsne")
    parsed = parser.parse_args(argv)
    parsed.baseline, parsed.size = getattr(parsed, "baseline", None), getattr(parsed, "size", None)
    if parsed.task in ("invariance", "neighbours") and common.world_size() > 1:
        parser.error(f"{parsed.task} runs in one process")
    return parsed


if __name__ == "__main__":
    args = parse_args()
    common.launch(globals()[args.task], args, stoppable=args.task == "detect")
