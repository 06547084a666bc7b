"""Ask a trained encoder what it has learned.

    python evaluate.py knn CHECKPOINT                       nearest neighbours on the features, no training
    python evaluate.py linear CHECKPOINT                    a linear classifier on the frozen features
    python evaluate.py linear CHECKPOINT --protocol moco    ... as another paper trains it; cpc: on the patches of a cpc_v2.py run
    python evaluate.py finetune CHECKPOINT --labels 0.01 0.1 --baseline supervised       how many labels does it save?
    python evaluate.py detect CHECKPOINT --data DIR         Faster R-CNN on DIR/VOCdevkit; without --data on drawn scenes
    python evaluate.py transfer CHECKPOINT --datasets dtd pets DIR                       logistic regression on other data sets
    python evaluate.py invariance CHECKPOINT                which transformations can be told from h, and from g(h)?
    python evaluate.py neighbours CHECKPOINT                pictures: nearest neighbours beside those of the pixels, a map of the features
    python evaluate.py knn CHECKPOINT --baseline random     the same encoder untrained, ordinarily initialised; or pixels, no encoder at all

CHECKPOINT is one of ours or a file of another project (LAYOUTS), which then needs --data. The data is the one that the checkpoint was
trained on, or --data and --root. Everything is asked of h, the representation before the projector. Prints a table and, as the last line
of stdout, one line of JSON. `knn`, `linear`, `finetune` and `detect` work under torchrun as well. --sweep chooses among a few settings on
held-out training images; no test image is looked at before that.

What the papers do differently is in PROTOCOLS, FINETUNE and DETECT, each row with its source. Training uses random crops and flips, tests
the central crop; `linear --no-augment` computes the features once instead, much faster and a little worse. The cosine falls in every
step, also where the original does it once an epoch. Rates are per 256 images. In-memory data sets are too small for batches of 4096, so
that without --batch-size theirs is 256 at most (in `finetune` an eighth of the images), and the rate goes with it. CPC's probe encodes
the patches of the pre-training, disturbed as there; the number of its epochs is ours, since the paper does not give one. So are the
rates of the second phase of its fine-tuning, its patience and what it holds out: a fifth of the labelled images, so that it gets no more.

Memory: features are float32, or half precision from a gigabyte on. ImageNet's 1.28 million of 2048 numbers take 5.2 GB in each process.
`knn` needs 0.3 GB beside them (a process of 5.8 GiB in all, measured on a CPU with that many random features, 2026-11-21), `linear
--no-augment` a batch of them, `linear --protocol lbfgs` about 0.6 GB (reckoned, not measured); --sweep copies nine tenths of them.

Differs from the papers in `detect`: torchvision's smooth L1 losses (the box head's with beta 1/9, where detectron2 has 0) and
initialisation; CPC's ResNet-161 and CMC's pair, which have no fourth stage to spare, get three new blocks as the box head.
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
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.rpn import AnchorGenerator

import cmc
import common
import cpc_v2

# lr: per 256 images; drops: the shares of the run after which the rate falls to `factor` of what it was (None: a cosine to 0)
BASE = dict(batch_size=256, weight_decay=0, nesterov=False, drops=None, factor=0.1)
PROTOCOLS = {
    "simclr": dict(BASE, epochs=90, batch_size=4096, lr=0.1, nesterov=True),                      # SimCLR paper, B.6
    "moco": dict(BASE, epochs=100, lr=30, drops=(0.6, 0.8), init=0.01),                           # main_lincls.py
    "simsiam": dict(BASE, epochs=90, batch_size=4096, lr=0.1, larc=True, init=0.01),              # main_lincls.py
    "byol": dict(BASE, epochs=80, batch_size=1024, lr=0.2, nesterov=True),                        # official code
    "swav": dict(BASE, epochs=100, lr=0.3, weight_decay=1e-6, init=0.01),                         # eval_linear.py
    "cpc": dict(BASE, epochs=90, batch_size=512, lr=2.5e-4, drops=(), adam=True),                 # appendix B: 5e-4 = 2.5e-4 * 512 / 256
}
# a row for each phase; pairs: with up to 2 % of the labels, with more; lr: of the encoder (0: fixed) and of the head
FINETUNE = {
    "simclr": [dict(BASE, epochs=(60, 30), batch_size=4096, lr=(0.05, 0.05), head_lr=(0.05, 0.05), nesterov=True)],      # B.5
    "byol": [dict(BASE, epochs=(50, 30), batch_size=1024, lr=(0.05, 0.05), head_lr=(0.05, 0.05), nesterov=True)],        # out of its sweep
    "swav": [dict(BASE, epochs=(20, 20), lr=(0.02, 0.01), head_lr=(5, 0.2), drops=(0.6, 0.8), factor=0.2)],              # eval_semisup.py
    "cpc": [dict(BASE, epochs=(100, 100), batch_size=32, lr=(0, 0), head_lr=(0.8, 0.8), weight_decay=1e-4, drops=()),    # C.2: out of its
            dict(BASE, epochs=(30, 30), batch_size=32, lr=(8e-4, 8e-4), head_lr=(0.08, 0.08), weight_decay=1e-4, drops=())],    # ranges; there a worker's 32
}
SUPERVISED = [dict(BASE, epochs=(180, 90), lr=(0.1, 0.1), head_lr=(0.1, 0.1), nesterov=True, weight_decay=1e-4)]         # our choice
IOUS = [0.5 + 0.05 * t for t in range(10)]
DETECT = {     # lr: for the whole batch; sizes: of the shorter side in training; proposals: before and after suppression, training and test
    "voc": dict(steps=24000, batch_size=16, lr=0.02, warmup=100, sizes=tuple(range(480, 801, 32)), size=800, max_size=1333,
                anchors=(32, 64, 128, 256, 512), pool=14, rois=512, proposals=(12000, 2000, 6000, 1000)),      # MoCo, detection/configs
    "shapes": dict(steps=150, batch_size=8, lr=0.02, warmup=50, sizes=(96,), size=96, max_size=96,
                   anchors=(12, 16, 20, 26, 34), pool=7, rois=64, proposals=(400, 100, 400, 100)),             # ours, for two CPU cores
}
OFFICIAL = ("train", "val", "test")
TRANSFER = {   # SimCLR B.8: torchvision's class, its splits, images of train held out where there is no validation set, metric
    "food101": ("Food101", ("train", None, "test"), 7575, "top1"), "cifar10": (None, (), 5000, "top1"),
    "cifar100": (None, (), 5067, "top1"),
    "birdsnap": (None, OFFICIAL, 0, "top1"), "sun397": (None, ("Training_01", None, "Testing_01"), 3970, "top1"),
    "cars": ("StanfordCars", ("train", None, "test"), 1650, "top1"), "aircraft": ("FGVCAircraft", OFFICIAL, 0, "mean_per_class"),
    "voc2007": (None, OFFICIAL, 0, "map_11_point"), "dtd": ("DTD", OFFICIAL, 0, "top1"),
    "pets": ("OxfordIIITPet", ("trainval", None, "test"), 740, "mean_per_class"),
    "caltech101": (None, ("train", None, "test"), 510, "mean_per_class"), "flowers": ("Flowers102", OFFICIAL, 0, "mean_per_class"),
}
L2 = np.logspace(-6, 5, 45)
IMAGENET, SWAV = ([[0.485, 0.456, 0.406], std] for std in ([0.229, 0.224, 0.225], [0.228, 0.224, 0.225]))
CIFAR = [[0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]]
LAYOUTS = (    # whose files; the backbone's prefix ("module." is dropped before); how one other name begins; mean, deviation of the input
    ("CMC", "encoder.l_to_ab.", "encoder.ab_to_l.", ([0, 0, 0], [1, 1, 1])), ("MoCo v1, v2", "encoder_q.", "", IMAGENET),
    ("MoCo v3", "base_encoder.", "", IMAGENET), ("solo-learn", "encoder.", "classifier.", IMAGENET),
    ("solo-learn", "backbone.", "classifier.", IMAGENET), ("SimSiam", "encoder.", "predictor.", IMAGENET),
    ("SupContrast", "encoder.", "head.", CIFAR), ("InsDis", "encoder.", "", IMAGENET), ("DINO", "backbone.", "head.", IMAGENET),
    ("Barlow Twins, VICReg", "backbone.", "projector.", IMAGENET), ("lightly", "backbone.", "", IMAGENET),
    ("DeepCluster-v2", "", "prototypes.prototypes0.", SWAV),
    ("SwAV", "", "prototypes.", SWAV), ("torchvision's layout", "", "", IMAGENET),
)


# ------------------------------------------------------------------------------------------------ what is asked

def read_checkpoint(path):
    """A checkpoint of ours, or a file of another project as if it were one: method, args, encoder_config, encoder, input, model."""
    content = common.read_tensors(path)
    if isinstance(content, dict) and "encoder_config" in content:
        return common.read_checkpoint(path)
    try:
        names = ("state_dict", "model", "online_backbone", "teacher", "student")
        inner = next((content[k] for k in names if isinstance(content.get(k), dict)), content)
        state = {re.sub(r"(^|\.)module\.", r"\1", k): v for k, v in inner.items() if torch.is_tensor(v)}
        project, prefix, _, (mean, std) = next(row for row in LAYOUTS if any(row[1] + k in state for k in ("conv1.weight", "0.weight"))
                                               and any(k.startswith(row[2]) for k in state))
    except (AttributeError, TypeError, StopIteration):
        known = ", ".join(dict.fromkeys(row[0] for row in LAYOUTS))
        raise common.UserError(f"{path}: neither a checkpoint of these scripts nor in a layout known here ({known})") from None
    config, encoder, used = describe(path, state, prefix)
    small = config["stem"] == "small"
    if project == "CMC":
        _, encoder_ab, used_ab = describe(path, state, "encoder.ab_to_l.")
        config["view"] = getattr(content.get("opt"), "view", "Lab").lower()
        encoder = {**{f"light.{k}": v for k, v in encoder.items()}, **{f"color.{k}": v for k, v in encoder_ab.items()}}
        used |= used_ab
    elif project == "solo-learn" and small:
        config["padding"], (mean, std) = 2, (CIFAR[0], [0.247, 0.243, 0.261])      # its 3x3 stem makes 34 pixels of 32
    left = [".".join(k.split(".")[:1 + prefix.count(".")]) for k in state.keys() - used]
    other = [k for k in content if content is not inner and content[k] is not inner]
    common.say(f"{path}: {project}, {config['arch']}, stem {config['stem']}; {len(used)} tensors read; left out: "
               + (", ".join([f"{k} ({left.count(k)})" for k in sorted(set(left))] + sorted(other)) or "nothing"))
    return dict(method=project, args={}, encoder_config=config, encoder=encoder, model=state,
                input=dict(size=32 if small else 224, mean=mean, std=std, interpolation="bilinear"))


def describe(path, state, prefix):
    """Find the ResNet below `prefix`: (what builds it, its state dict under torchvision's names, the names used)."""
    numbered = {"0": "conv1", "1": "bn1", **{str(i): f"layer{i - 3}" for i in range(4, 8)}}        # nn.Sequential(*resnet.children())
    if prefix + "2.0.conv1.weight" in state:
        numbered.update({str(i): f"layer{i - 1}" for i in range(2, 6)})                             # lightly's own has no ReLU module
    names = {}
    for k in state:
        head, _, rest = k[len(prefix):].partition(".")
        name = f"{numbered.get(head, head)}.{rest}".replace(".shortcut.", ".downsample.")
        if k.startswith(prefix) and re.match(r"(conv1|bn1|layer[1-4])\.", name):
            names[k] = name
    encoder = {name: state[k] for k, name in names.items()}
    counts = tuple(len({k.split(".")[1] for k in encoder if k.startswith(f"layer{i}.")}) for i in range(1, 5))
    bottleneck = "layer1.0.conv3.weight" in encoder
    depth = [d for d, blocks in common.DEPTHS.items() if blocks == counts and (d >= 50) == bottleneck]
    if not depth or "layer1.0.conv1.weight" not in encoder or encoder["conv1.weight"].ndim != 4:
        raise common.UserError(f"{path}: its backbone is no ResNet known here (blocks {counts}, {'bottleneck' if bottleneck else 'basic'})")
    stem, width = encoder["conv1.weight"], len(encoder["layer1.0.conv1.weight"])
    config = dict(arch=f"resnet{depth[0]}" + ("" if width == 64 else f"x{width / 64:g}"),
                  norm="batch", stem="imagenet" if stem.shape[-1] == 7 else "small")
    return config if stem.shape[1] == 3 else dict(config, view="lab", stem_width=len(stem)), encoder, set(names)


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
    size = checkpoint["input"]["size"] = args.size or checkpoint["input"]["size"]
    if getattr(args, "protocol", None) == "cpc" and (checkpoint["method"] != "cpc_v2" or args.baseline == "pixels"):
        raise common.UserError(f"--protocol cpc: needs a checkpoint of cpc_v2.py, not {args.baseline or checkpoint['method']}")
    if args.baseline == "pixels":
        return nn.Flatten(), 3 * size * size, checkpoint
    torch.manual_seed(args.seed)
    try:
        encoder = build(**checkpoint["encoder_config"])
        if args.baseline is None:
            encoder.load_state_dict(checkpoint["encoder"])
    except (TypeError, ValueError, RuntimeError) as e:
        why = " ".join(str(e).split())[:200]
        raise common.UserError(f"{args.checkpoint}: its encoder does not fit {checkpoint['encoder_config']} ({why})") from None
    encoder.to(device, memory_format=torch.channels_last).requires_grad_(False).eval()
    if getattr(args, "rescale", False):
        rescale(encoder)
    if checkpoint["method"] in ("supcon", "SupContrast") and args.baseline is None:
        common.say(f"{args.checkpoint}: supervised, it learned from labels")
    return encoder, encoder.dim, checkpoint


def rescale(encoder):
    """Give each convolution the norm that a new one has, sqrt(2 channels of its input). The normalisation after it undoes the factor, up to its epsilon,
    so that the network stays what it is, but not the rate of SGD: with norms five times as large, as LARS may leave them, it is worth 25 times less."""
    if any(isinstance(m, common.ResNet) and m.last_bn for m in encoder.modules()):
        raise common.UserError("--rescale: not for an encoder that normalises before its convolutions, as CPC v2's do")
    layers = [m for m in encoder.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm))]
    for conv, norm in zip(layers[::2], layers[1::2]):
        factor = math.sqrt(2 * conv.in_channels) / conv.weight.detach().norm()
        conv.weight.data *= factor
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean *= factor
            norm.running_var *= factor ** 2


def load(args, device):
    """What `load_encoder` returns, the name of the data, and its labelled images, train and val."""
    encoder, dim, checkpoint = load_encoder(args, device)
    name, root = args.data or checkpoint["args"].get("data"), args.root or checkpoint["args"].get("root", "data")
    if name is None:
        raise common.UserError(f"--data: needed, since {args.checkpoint} does not say what it was trained on")
    return encoder, dim, checkpoint, name, *(common.load_data(name, root, split, device) for split in ("train", "val"))


class Features:
    """Features (n, ...) and their labels (n,) as a data set, whose "crops" are the features."""
    in_workers = False

    def __init__(self, h, labels):
        self.h, self.labels = h, labels

    def __len__(self):
        return len(self.h)

    def crop(self, indices, crops, *key):
        return [self.h[indices.to(self.h.device)].float()], indices, []


def take(data, indices):
    """The images at `indices` as a data set of their own."""
    if data.in_workers:
        return common.Folder(data.paths[indices.numpy()], data.labels[indices])
    if isinstance(data, Features):
        return Features(data.h[indices.to(data.h.device)], data.labels[indices.to(data.h.device)])
    return common.Images(data.images[indices.to(data.images.device)], data.labels[indices], data.images.device)


def hold_out(data, seed, count=None):
    """(the rest, held out): training images to choose settings on, a tenth of them and 10,000 at most."""
    order = torch.from_numpy(np.random.default_rng([seed, 1]).permutation(len(data)))
    count = count or min(max(1, len(data) // 10), 10_000)
    return take(data, order[count:].sort().values), take(data, order[:count].sort().values)


def look(data, indices, checkpoint):
    """The test crops of the images at `indices`, (n, 3, S, S) in 0..1."""
    size, interpolation = (checkpoint["input"][k] for k in ("size", "interpolation"))
    (x,), _, broken = data.crop(indices.cpu(), [common.CenterCrop(size, interpolation=interpolation)], 0)
    if common.world_size() == 1:                                # otherwise all have read them before
        common.note_broken(data, broken)
    return x.float() / 255 if data.in_workers else x


def accuracy(logits, labels, top=1):
    """Percent of rows whose label is among the `top` largest logits."""
    return 100 * (logits.topk(min(top, logits.shape[1]), 1).indices == labels[:, None]).any(1).float().mean().item()


def descend(args, batches, optimizers, recipe, loss_of, total, first=0, after=lambda step: False):
    """Steps `first` to `total`: the optimizers go down `loss_of(crops, indices)`, each group at its "peak" rate times what `recipe` leaves.
    `after(step)` is called with the number of steps done; if it says so that was the last one."""
    device, losses = optimizers[0].param_groups[0]["params"][0].device, []
    for step, (crops, indices, broken) in zip(range(first, total), common.stream(batches, range(first, total), args.workers, device)):
        common.note_broken(batches.data, broken)
        common.seed_all(args.seed, step, common.rank(), 1)
        left = min(1, 1e-3 + (1 - 1e-3) * step / recipe["warmup"]) if recipe.get("warmup") else 1
        if recipe["drops"] is None:
            left *= (1 + math.cos(math.pi * step / total)) / 2
        else:
            left *= recipe["factor"] ** sum(step >= share * total for share in recipe["drops"])
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["lr"] = group["peak"] * left
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            loss = loss_of(crops, indices)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise common.UserError(f"the loss is {losses[-1]} in step {step + 1}; try a lower --lr")
        if (step + 1) % max(1, total // 10) == 0:
            common.say(f"step {step + 1}/{total}  loss {sum(losses) / len(losses):.4f}")
            losses = []
        if after(step + 1):
            return


def parallel(model, device):
    """The model as it is trained: by all processes, which share BatchNorm's statistics on GPUs."""
    if common.world_size() == 1:
        return model
    return DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(model) if device.type == "cuda" else model)


def agree(model):
    """BatchNorm's running statistics may be each process's own: take the first one's."""
    for buffer in model.buffers() if common.world_size() > 1 else ():
        dist.broadcast(buffer, 0)


# ------------------------------------------------------------------------------------------------ k nearest neighbours

def knn(args, device):
    encoder, _, checkpoint, name, train, val = load(args, device)
    bank = Features(*common.features(encoder, train, checkpoint["input"], args.workers, args.precision))
    k, temperature = args.k, args.temperature
    if args.sweep:
        rest, held = hold_out(bank, args.seed)
        chosen, k, temperature = max((common.knn_accuracy(rest.h, rest.labels, held.h, held.labels, k, t), k, t)
                                     for k in (5, 10, 20, 50, 100, 200) for t in (0.03, 0.07, 0.1, 0.3))
        common.say(f"k {k} and temperature {temperature} chosen: {chosen:.2f} % on {len(held)} held-out training images")
    h, truth = common.features(encoder, val, checkpoint["input"], args.workers, args.precision)
    top1 = common.knn_accuracy(bank.h, bank.labels, h, truth, k, temperature)
    report(args, checkpoint, name, dict(k=k, temperature=temperature, sweep=args.sweep, train=len(train), val=len(val)), dict(top1=top1))
    if common.rank() == 0:
        draw_neighbours(args, checkpoint, train, val, [("nearest", bank.h, h)], bank.labels, truth, 10, "neighbours.png")


def draw_neighbours(args, checkpoint, train, val, spaces, labels, truth, columns, file):
    """A row for each of the first ten classes: a test image and, for each (title, bank, h) of `spaces`, its nearest training images, those
    of another class framed in red."""
    queries = torch.stack([(truth == c).nonzero()[0, 0] for c in truth.unique()[:10]])
    found = torch.stack([common.nearest(bank, h[queries], columns)[1] for _, bank, h in spaces], 1)              # (Q, spaces, columns)

    def framed(data, indices, red):
        images = look(data, indices, checkpoint).cpu()
        if images.shape[3] > 64:
            images = F.interpolate(images, size=(64, 64), mode="bilinear", antialias=True)
        edge = [max(1, images.shape[3] // 16)] * 4
        ring = F.pad(F.pad(torch.zeros_like(images), edge, value=1), edge).bool() & red.cpu()[:, None, None, None]
        return torch.where(ring, torch.tensor([1.0, 0, 0])[:, None, None], F.pad(F.pad(images, edge, value=1), edge, value=1))

    tiles = []
    for q, near in zip(queries, found):
        tiles.append(framed(val, q[None], torch.tensor([False])))
        for i in near:
            tiles += [torch.ones_like(tiles[0]), framed(train, i, labels[i] != truth[q])]                        # a gap before each space
    width, side = 1 + len(spaces) * (1 + found.shape[2]), tiles[0].shape[3]
    figure, ax = common.pyplot().subplots(figsize=(0.6 * width, 0.6 * len(queries) + 0.25), layout="constrained")
    ax.imshow(torchvision.utils.make_grid(torch.cat(tiles), nrow=width, padding=0).permute(1, 2, 0), interpolation="nearest")
    for place, title in [(0, "query")] + [(2 + i * (1 + found.shape[2]), title) for i, (title, _, _) in enumerate(spaces)]:
        ax.text(side * place, -3, title, fontsize=8)
    ax.set_axis_off()
    save(args, figure, file)


def neighbours(args, device):
    encoder, _, checkpoint, name, train, val = load(args, device)
    (bank, labels), (h, truth) = (common.features(encoder, d, checkpoint["input"], args.workers, args.precision) for d in (train, val))
    small = dict(checkpoint["input"], size=min(32, checkpoint["input"]["size"]))
    pixels, queries = (common.features(nn.Flatten().to(device), d, small, args.workers)[0] for d in (train, val))
    spaces = [("nearest by the encoder", bank, h), ("by the pixels", pixels, queries)]
    draw_neighbours(args, checkpoint, train, val, spaces, labels, truth, 8, "neighbours-and-pixels.png")
    some = torch.from_numpy(np.random.default_rng(args.seed).permutation(len(h))[:args.count]).to(h.device)
    plane, classes = tsne(F.normalize(h[some].float(), dim=1)).cpu(), truth[some].cpu()
    figure, ax = common.pyplot().subplots(figsize=(6, 5.2), layout="constrained")
    colors = common.pyplot().get_cmap("tab10" if classes.max() < 10 else "nipy_spectral", int(classes.max()) + 1)
    for c in classes.unique():
        ax.scatter(*plane[classes == c].T, color=colors(int(c)), s=9, linewidths=0, label=common.SHAPES[c] if name == "shapes" else int(c))
    ax.set(xticks=[], yticks=[], title=f"t-SNE of {len(plane)} test images of {Path(name).name}")
    if classes.max() < 20:
        ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    save(args, figure, "map.png")
    same, by_pixels = (100 * (labels[common.nearest(b, q, 1)[1][:, 0]] == truth).float().mean().item() for _, b, q in spaces)
    report(args, checkpoint, name, dict(count=len(some)), dict(nearest_of_same_class=same, by_pixels=by_pixels))


def tsne(x, perplexity=30, steps=500):
    """x (n, D) -> (n, 2), van der Maaten and Hinton 2008, from the first principal components: all pairs, for a few thousand points."""
    n, perplexity = len(x), min(perplexity, (len(x) - 1) / 3)
    y = (x - x.mean(0)) @ torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:2].T
    d = torch.cdist(x, x).square().fill_diagonal_(math.inf)
    low, high = torch.zeros(n, 1, device=x.device), torch.full((n, 1), 1e6, device=x.device)
    for _ in range(60):                                         # each point's precision, by halving, for that perplexity
        beta = (low + high) / 2
        p = torch.softmax(-beta * d, 1)
        wide = -torch.xlogy(p, p).sum(1, keepdim=True) > math.log(perplexity)
        low, high = torch.where(wide, beta, low), torch.where(wide, high, beta)
    p, y = (p + p.T) / (2 * n), y / y.std() * 1e-4
    velocity, gain = torch.zeros_like(y), torch.ones_like(y)
    for step in range(steps):
        early = step < steps // 4                               # p exaggerated at first
        q = 1 / (1 + torch.cdist(y, y).square()).fill_diagonal_(math.inf)
        w = ((12 if early else 1) * p - q / q.sum()) * q
        gradient = 4 * (w.sum(1, keepdim=True) * y - w @ y)
        gain = torch.where(gradient * velocity > 0, gain * 0.8, gain + 0.2).clamp(min=0.01)
        velocity = (0.5 if early else 0.8) * velocity - max(n / 48, 50) * gain * gradient
        y = y + velocity
    return y


# ------------------------------------------------------------------------------------------------ linear probe

def linear(args, device):
    given = {k: v for k in ("epochs", "batch_size", "lr", "weight_decay") if (v := getattr(args, k)) is not None}
    recipe = dict(PROTOCOLS.get(args.protocol, BASE), **given)
    encoder, dim, checkpoint, name, train, val = load(args, device)
    size, mean, std, interpolation = (checkpoint["input"][k] for k in ("size", "mean", "std", "interpolation"))
    classes, settings = int(train.labels.max()) + 1, dict(protocol=args.protocol, sweep=args.sweep, train=len(train), val=len(val))
    if args.batch_size is None:
        recipe["batch_size"] = min(recipe["batch_size"], 4096 if train.in_workers else 256)
    if args.protocol == "cpc":
        settings_there = checkpoint["args"]
        if not settings_there["patch_size"] <= size <= settings_there["resize"]:
            raise common.UserError(f"--size {size}: not in {settings_there['patch_size']}..{settings_there['resize']}, this checkpoint's patch and image")
        encoder = PatchGrid(encoder, settings_there).eval()
        checkpoint["input"]["fraction"] = size / settings_there["resize"]
        crop, change = cpc_v2.RandomCrop(size, settings_there["resize"], flip=0.5), lambda x: encoder(x, disturb=True)
        make = lambda: patch_classifier(dim, classes)
    else:
        crop = common.Crop(1, size, (0.08, 1.0), flip=0.5, interpolation=interpolation)
        change = lambda x: encoder(common.normalize(x, mean, std))
        make = lambda: linear_layer(dim, classes, recipe.get("init", 0.0))
    before = copy.deepcopy(encoder.state_dict())
    if args.sweep or not args.augment or args.protocol == "lbfgs":
        bank = Features(*common.features(encoder, train, checkpoint["input"], args.workers, args.precision))
    if args.sweep:
        rest, held = hold_out(bank, args.seed)
    if args.protocol == "lbfgs":                                # to the optimum, as `transfer` does
        settings["l2"] = 1.0 if args.weight_decay is None else args.weight_decay
        if args.sweep:
            settings["l2"] = choose_l2((rest.h, rest.labels), (held.h, held.labels), "top1", np.logspace(-4, 3, 15))[0]
        weights = logistic_regression(bank.h, bank.labels, classes, settings["l2"])
        predict = lambda h: scores(weights, h)
    else:
        if args.sweep:
            rates = [recipe["lr"] * f for f in (0.1, 0.3, 1, 3, 10)]
            tops = [accuracy(head(held.h.float()), held.labels) for head in train_heads(args, device, recipe, rates, rest, make)]
            recipe["lr"] = rates[tops.index(max(tops))]
            tried = ", ".join(f"{lr:g}: {top:.2f}" for lr, top in zip(rates, tops))
            common.say(f"lr {recipe['lr']:g} chosen: {max(tops):.2f} % on {len(held)} held-out training images ({tried})")
        source = (train, make, crop, change) if args.augment else (bank, make)
        predict, = train_heads(args, device, recipe, [recipe["lr"]], *source)
        settings = dict({k: recipe[k] for k in ("epochs", "batch_size", "lr", "weight_decay")}, **settings, augment=args.augment)

    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items()), "the frozen encoder moved"
    h, truth = common.features(encoder, val, checkpoint["input"], args.workers, args.precision)
    logits = torch.cat([predict(piece.float()) for piece in h.split(max(1, 2 ** 25 // h[0].numel()))])
    report(args, checkpoint, name, settings, dict(top1=accuracy(logits, truth), top5=accuracy(logits, truth, 5)))
    if common.rank() == 0:
        draw_confusion(args, logits.argmax(1), truth)


def train_heads(args, device, recipe, rates, data, make, crop=None, change=lambda x: x):
    """Classifiers that `make` makes, trained side by side on the same batches of `data`, one for each of `rates`, on what `change` makes of
    the crops. Returns them, frozen."""
    batch_size = min(recipe["batch_size"], len(data) // common.world_size() * common.world_size())
    batches = common.Batches(data, [crop], batch_size, args.seed)
    torch.manual_seed(args.seed)
    first = make().to(device)
    heads = nn.ModuleList(copy.deepcopy(first) for _ in rates)
    networks = [parallel(head, device) for head in heads]
    groups = [dict(params=[w for w in head.parameters() if w.requires_grad], peak=rate * batch_size / 256)
              for head, rate in zip(heads, rates)]
    if recipe.get("adam"):
        optimizer = torch.optim.Adam(groups, weight_decay=recipe["weight_decay"])
    else:
        decay = 0 if recipe.get("larc") else recipe["weight_decay"]
        optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=recipe["nesterov"], weight_decay=decay)
    if recipe.get("larc"):
        optimizer.register_step_pre_hook(lambda *_: common.larc_(heads.parameters(), weight_decay=recipe["weight_decay"]))

    def loss_of(crops, indices):
        with torch.no_grad():
            x, y = change(crops[0]).float(), data.labels[indices].to(device)
        with torch.autocast(device.type, enabled=False):
            return sum(F.cross_entropy(network(x), y) for network in networks)

    descend(args, batches, [optimizer], recipe, loss_of, recipe["epochs"] * len(batches))
    agree(heads)
    return heads.requires_grad_(False).eval()


def linear_layer(dim, classes, std=0.0):
    """With weights drawn with that deviation, and no offset."""
    layer = nn.Linear(dim, classes)
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer


class PatchGrid(nn.Module):
    """The encoder on the patches that a checkpoint of cpc_v2.py was trained with: images (N, 3, H, W) -> latents (N, D, R, C)."""

    def __init__(self, encoder, settings):
        super().__init__()
        self.encoder, self.settings = encoder, settings

    def forward(self, x, disturb=False):
        """Normalised images; or, to `disturb` each patch as in the pre-training, images in 0..1."""
        patches = cpc_v2.extract_patches(x, self.settings["patch_size"], self.settings["stride"])
        if disturb:
            patches = cpc_v2.augment(patches.flatten(0, 2), self.settings["patch_augment"]).unflatten(0, patches.shape[:3])
        return cpc_v2.encode(self.encoder, patches)


def patch_classifier(dim, classes):
    """CPC v2, appendix B: (N, dim, R, C) -> logits (N, classes), the mean over the places of a linear classifier after BN without scale."""
    norm = nn.BatchNorm2d(dim)
    norm.weight.requires_grad_(False)                           # stays 1; the offset is learned
    return nn.Sequential(norm, nn.Conv2d(dim, classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def draw_confusion(args, predicted, truth):
    """Rows: the true class; columns: what the probe says, in percent of the row."""
    classes = int(max(predicted.max(), truth.max())) + 1
    table = torch.bincount((truth * classes + predicted).cpu(), minlength=classes * classes).view(classes, classes).float()
    table = 100 * table / table.sum(1, keepdim=True).clamp(min=1)
    figure, ax = common.pyplot().subplots(figsize=(5.5, 4.8), layout="constrained")
    figure.colorbar(ax.imshow(table, cmap="Blues", vmin=0, vmax=100))
    for i, j in (table >= 0.5).nonzero().tolist() if classes <= 20 else ():
        ax.text(j, i, f"{table[i, j]:.0f}", ha="center", va="center", fontsize=7, color="white" if table[i, j] > 50 else "black")
    ax.set(xlabel="predicted class", ylabel="true class", title="percent of the images of a class")
    if classes <= 20:
        ax.set(xticks=range(classes), yticks=range(classes))
    save(args, figure, "confusion.png")


# ------------------------------------------------------------------------------------------------ logistic regression

def scores(weights, h):
    """Weights (C, D + 1), the last column the bias, and features (n, D) -> logits (n, C)."""
    return F.linear(h.float(), weights[:, :-1], weights[:, -1])


def spectrum(h):
    """The mean (D,) of features (n, D), and the eigenvalues (D,) and eigenvectors (D, D) of their covariance, gone through in chunks."""
    if h.shape[1] > 16384:
        raise common.UserError(f"{h.shape[1]} numbers an image are too many for logistic regression; give a smaller --size")
    mean = sum(piece.double().sum(0) for piece in h.split(16384)) / len(h)
    covariance = sum((x := piece.double() - mean).T @ x for piece in h.split(16384)) / len(h)
    return mean.float(), *(a.float() for a in torch.linalg.eigh(covariance))


def logistic_regression(h, y, classes, l2, start=None, shape=None, iterations=1000):
    """Weights (C, D + 1) at the minimum of  sum_i loss(W h_i + b, y_i) + l2 / 2 |W|^2  by L-BFGS, scikit-learn's C = 1 / l2.

    h (n, D) of any float type; y (n,) classes, or (n, C) of 1, 0 and nan, several labels at once, where nan is not counted. `start`:
    weights to begin at; `shape`: `spectrum(h)`. What L-BFGS sees is V in W = V T, T about the inverse root of the Hessian: the same
    minimum in ten times fewer steps.
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
            logits = scores(weights, piece)
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
    """(the best of `values` on `val`, its weights, its figure): one fit on `train` for each, the strongest first, each from where the last
    one ended."""
    classes = int(torch.cat([train[1], val[1]]).max()) + 1 if train[1].ndim == 1 else train[1].shape[1]
    best, weights, shape = (-1,), None, spectrum(train[0])
    for l2 in sorted(map(float, values), reverse=True):
        weights = logistic_regression(*train, classes, l2, weights, shape)
        figure = measure(metric, scores(weights, val[0]), val[1])
        best = max(best, (figure, l2, weights), key=lambda b: b[0])
    common.say(f"l2 {best[1]:.3g} chosen: {metric} {best[0]:.2f} on {len(val[0])} held-out images")
    return best[1], best[2], best[0]


# ------------------------------------------------------------------------------------------------ fine-tuning on a few labels

def label_subset(labels, amount, seed, balanced):
    """Which training images keep their label: the same for the same seed everywhere, a smaller share's images among a larger one's.

    labels (n,); `amount` a float in 0..1, a share, or a whole number of images a class. `balanced`: as many of every class (SimCLR),
    otherwise drawn from all (CPC v2). Raises UserError for fewer images than classes."""
    classes, chosen = int(labels.max()) + 1, []
    number = amount * classes if isinstance(amount, int) else round(amount * len(labels))
    if number < classes:
        raise common.UserError(f"--labels {amount}: {number} of {len(labels)} images, fewer than the {classes} classes")
    for c in range(classes) if balanced else [None]:
        mine = torch.arange(len(labels)) if c is None else (labels == c).nonzero()[:, 0]
        keep = number if c is None else amount if isinstance(amount, int) else max(1, round(amount * len(mine)))
        if keep > len(mine):
            raise common.UserError(f"--labels {amount}: {'there are' if c is None else f'class {c} has'} only {len(mine)} images")
        order = np.random.default_rng([seed, 2] if c is None else [seed, 3, c]).permutation(len(mine))
        chosen.append(mine[torch.from_numpy(order[:keep])])
    return torch.cat(chosen).sort().values


def data_gain(fractions, ours, baseline):
    """For each fraction, or number of images, CPC v2's gain in data efficiency (its table 2): the largest of the measured ones at which the
    baseline is no better than we are at this one, over this one: a lower bound. None where there is none."""
    reached = [[g for g, other in zip(fractions, baseline) if other <= top1] for top1 in ours]
    return [max(r) / f if r else None for f, r in zip(fractions, reached)]


def finetune(args, device):
    encoder, _, checkpoint, name, train, val = load(args, device)
    classes, rows = int(train.labels.max()) + 1, []
    for subset, amount in sorted(((label_subset(train.labels, a, args.seed, args.subset == "balanced"), a) for a in args.labels),
                                 key=lambda s: len(s[0])):
        row, some, few = dict(labels=amount, images=len(subset)), take(train, subset), len(subset) <= 0.02 * len(train)
        for prefix, phases in (("", FINETUNE[args.protocol]), ("baseline_", SUPERVISED))[:2 if args.supervised else 1]:
            common.say(f"{len(subset)} images, {'from random initialisation' if prefix else args.protocol}")
            torch.manual_seed(args.seed)
            network = build(**checkpoint["encoder_config"]).to(device, memory_format=torch.channels_last) if prefix else copy.deepcopy(encoder)
            logits, truth = tune(args, phases, network, some, val, few, classes, checkpoint, device)
            row.update({f"{prefix}top1": accuracy(logits, truth), f"{prefix}top5": accuracy(logits, truth, 5)})
        common.say(", ".join(f"{k} {v:.4g}" for k, v in row.items()))
        rows.append(row)
    if args.supervised:
        columns = ([row[k] for row in rows] for k in ("images", "top1", "baseline_top1"))
        for row, gain in zip(rows, data_gain(*columns)):
            row["gain"] = gain
    given = {k: v for k in ("epochs", "batch_size", "lr", "rescale") if (v := getattr(args, k))}
    settings = dict(protocol=args.protocol, **given, subset=args.subset, seed=args.seed, train=len(train), val=len(val))
    report(args, checkpoint, name, settings, {}, rows)
    if common.rank() == 0:
        draw_label_efficiency(args, name, rows, len(train))


def tune(args, phases, encoder, data, val, few, classes, checkpoint, device):
    """Train `encoder` and a new classifier on `data` in the phases of a row of FINETUNE; returns the logits (n, classes) of `val` and its
    labels. CPC v2's phases end when the loss on a fifth of `data`, held out, has not been lower for five epochs; the best state counts."""
    size, mean, std, interpolation = (checkpoint["input"][k] for k in ("size", "mean", "std", "interpolation"))
    crop, cpc, best = common.Crop(1, size, (0.08, 1.0), flip=0.5, interpolation=interpolation), len(phases) > 1, (math.inf, None)
    if cpc:
        data, held = hold_out(data, args.seed, min(10_000, max(1, len(data) // 5)))
        encoder.forward = encoder.maps                          # the grid before pooling
        head, change = MapsClassifier(encoder.dim, classes), lambda x: cpc_v2.augment(x, "full")
    else:
        head, change = linear_layer(encoder.dim, classes), lambda x: common.normalize(x, mean, std)
    model = nn.Sequential(encoder, head).to(device)
    for recipe in phases:
        epochs, lr, head_lr = (recipe[k][0 if few else 1] for k in ("epochs", "lr", "head_lr"))
        factor = args.lr / phases[0]["head_lr"][0 if few else 1] if args.lr and phases is not SUPERVISED else 1
        most = min(recipe["batch_size"], len(data), len(data) if data.in_workers else min(256, max(len(data) // 8, 8)))
        batches = common.Batches(data, [crop], args.batch_size or max(1, most // common.world_size()) * common.world_size(), args.seed)
        encoder.requires_grad_(lr > 0)
        groups = [dict(params=part.parameters(), peak=rate * factor * batches.batch_size / 256)
                  for part, rate in ((head, head_lr), (encoder, lr))]
        sgd = lambda groups: torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=recipe["nesterov"], weight_decay=recipe["weight_decay"])
        optimizers = [sgd(groups[:1])] + ([torch.optim.Adam(groups[1:]) if cpc else sgd(groups[1:])] if lr else [])
        network, waited = parallel(model, device), 0
        loss_of = lambda crops, indices: F.cross_entropy(network(change(crops[0])).float(), data.labels[indices].to(device))

        def converged(step):
            nonlocal best, waited
            if not cpc or step % len(batches):
                return False
            agree(model)
            loss = F.cross_entropy(*common.features(model, held, checkpoint["input"], args.workers, args.precision)).item()
            best, waited = ((loss, copy.deepcopy(model.state_dict())), 0) if loss < best[0] else (best, waited + 1)
            encoder.train(lr > 0)
            return waited == 5

        model.train()
        encoder.train(lr > 0)
        descend(args, batches, optimizers, recipe, loss_of, (args.epochs or epochs) * len(batches), after=converged)
        if cpc:
            model.load_state_dict(best[1])
            common.say(f"encoder {'trained' if lr else 'fixed'}: loss {best[0]:.4f} on {len(held)} held-out training images")
    agree(model)
    return common.features(model, val, checkpoint["input"], args.workers, args.precision)


class MapsClassifier(nn.Module):
    """CPC v2, section 2.2: eleven pre-activation bottleneck blocks on the encoder's maps (N, dim, h, w), then BN, mean, dropout and a
    linear layer. For ResNet-161's 4096 x 14 x 14: 4096-1024-4096 blocks, 33 convolutions, the "ResNet-33" of the paper. The fifth block
    halves the grid, which the paper leaves open; its shortcut has a convolution."""

    def __init__(self, dim, classes, blocks=11, halve=5, dropout=0.2):
        super().__init__()
        self.blocks = nn.Sequential(*(common.PreBottleneck(dim, dim // 4, 2 if i == halve else 1, nn.BatchNorm2d, out=dim)
                                      for i in range(1, blocks + 1)))
        self.bn = nn.BatchNorm2d(dim)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(dim, classes)

    def forward(self, maps):
        return self.fc(self.dropout(F.relu(self.bn(self.blocks(maps))).mean((2, 3))))


def draw_label_efficiency(args, name, rows, n):
    """Accuracy against the share of the labels, as in CPC v2's figure 1."""
    figure, ax = common.pyplot().subplots(figsize=(5.5, 4), layout="constrained")
    x = [100 * row["images"] / n for row in rows]
    ax.semilogx(x, [row["top1"] for row in rows], "o-", color="#2a6f97", label=f"fine-tuned ({args.protocol})")
    if args.supervised:
        ax.semilogx(x, [row["baseline_top1"] for row in rows], "s--", color="#bc4749", label="supervised from random initialisation")
        gains = ", ".join(f"{row['gain']:.3g} at {v:.3g} %" for v, row in zip(x, rows) if row["gain"] and row["gain"] > 1)
        ax.set_title(f"worth at least so many times the labels: {gains}" if gains else "", fontsize=9)
    ax.set_xticks(x, [f"{v:.3g} %" for v in x])
    ax.minorticks_off()
    ax.set(xlabel="labelled images", ylabel=f"top-1 accuracy on {Path(name).name}, %", ylim=(0, 1.05 * ax.dataLim.ymax))
    ax.grid(alpha=0.3)
    ax.legend()
    save(args, figure, "labels.png")


# ------------------------------------------------------------------------------------------------ transfer

def measure(metric, logits, labels):
    """Percent: "top1"; "mean_per_class"; or "map_11_point", VOC's, for labels (n, C) of 1, 0 and nan, which counts neither way."""
    if metric == "top1":
        return accuracy(logits, labels)
    if metric == "mean_per_class":
        right = (logits.argmax(1) == labels).float()
        return 100 * torch.stack([right[labels == c].mean() for c in labels.unique()]).mean().item()
    points = []
    for column, truth in zip(logits.T.double().cpu().numpy(), labels.T.cpu().numpy()):
        truth = truth[np.argsort(-column, kind="stable")]
        hits = truth[~np.isnan(truth)]
        if hits.sum():
            right = np.cumsum(hits)
            points.append(voc_average_precision(right / hits.sum(), right / np.arange(1, len(hits) + 1), True))
    return 100 * float(np.mean(points))


def image_list(name, kind, root, split, seed):
    """[(path, class)] of one split of a data set that common.py does not know, or of a directory with class folders."""
    top = root / {"sun397": "SUN397", "caltech101": "caltech101/101_ObjectCategories"}.get(name, name) if name in TRANSFER else Path(name)
    try:
        if kind:
            data = getattr(torchvision.datasets, kind)(root, split=split, download=name != "cars")       # whose address is gone
            return data._samples if name == "cars" else list(zip(getattr(data, "_image_files", None) or data._images, data._labels))
        if name == "sun397":                                    # the first of the official partitions: lines like /a/abbey/sun_abc.jpg
            return [(str(top) + line, str(Path(line).parent)) for line in (top / f"{split}.txt").read_text().split()]
    except (OSError, RuntimeError, ImportError, ValueError) as e:         # no network, a moved file, scipy missing: it says what
        raise common.UserError(f"--datasets {name}: not in {root} and could not be had ({' '.join(str(e).split())[:200]})") from None
    part = top if name == "caltech101" else top / split
    found = [(path, c) for c in common._class_folders(part) for path in common._image_files(part / c)]
    if name == "caltech101":                                    # 30 images a class to learn from
        order = np.random.default_rng([seed, 5]).permutation(len(found))
        first = {i for c in {c for _, c in found} for i in [i for i in order if found[i][1] == c][:30]}
        found = [sample for i, sample in enumerate(found) if (i in first) == (split == "train")]
    if not found:
        raise common.UserError(f"--datasets {name}: no images; expected them in {part}/<class> (known by name: {', '.join(TRANSFER)})")
    return found


def transfer_splits(name, args, device):
    """(train, val, test, metric): data sets, labels (n,), or (n, C) for voc2007. Without validation images some of train are held out."""
    root = Path(args.root or "data")
    splits = OFFICIAL if Path(name, "test").is_dir() else ("train", None, "val")
    kind, splits, held, metric = TRANSFER.get(name, (None, splits, 0, "top1"))
    if name in common.DATA:
        train, val, test = common.load_data(name, str(root), "train", device), None, common.load_data(name, str(root), "val", device)
    elif name == "voc2007":
        parts = [voc_scenes(root, split, years=(2007,)) for split in splits]
        classes = sorted({c for scenes in parts for c in scenes.classes})
        for scenes in parts:
            scenes.images.labels = torch.zeros(len(scenes), len(classes))
            place = torch.tensor([classes.index(c) for c in scenes.classes])
            for row, labels, hard in zip(scenes.images.labels, scenes.labels, scenes.difficult):
                row[place[labels[hard]]] = math.nan             # a class counts as difficult if all its objects are
                row[place[labels[~hard]]] = 1
        train, val, test = (scenes.images for scenes in parts)
    else:
        lists = [split and image_list(name, kind, root, split, args.seed) for split in splits]
        classes = {c: i for i, c in enumerate(sorted({c for _, c in lists[0]}))}
        unknown = sorted({str(c) for part in lists if part for _, c in part if c not in classes})
        if unknown:
            raise common.UserError(f"--datasets {name}: classes without training images: {', '.join(unknown)}")
        train, val, test = (part and common.Folder([str(p) for p, _ in part], [classes[c] for _, c in part]) for part in lists)
    if val is None:
        train, val = hold_out(train, args.seed, min(held, len(train) // 4) or None)
    return train, val, test, metric


def transfer(args, device):
    encoder, _, checkpoint = load_encoder(args, device)
    whole, rows = dict(checkpoint["input"], fraction=1.0, interpolation="bicubic"), []      # the shorter side resized, the central square
    for name, (*parts, metric) in [(name, transfer_splits(name, args, device)) for name in args.datasets]:      # mistakes come before the work
        train, val, test = (common.features(encoder, part, whole, args.workers, args.precision) for part in parts)
        l2, weights, tuned = choose_l2(train, val, metric, L2)
        weights = logistic_regression(*map(torch.cat, zip(train, val)), len(weights), l2, weights)
        rows.append(dict(dataset=Path(name).name, train=len(train[0]), val=len(val[0]), test=len(test[0]), l2=float(f"{l2:.3g}"),
                         metric=metric, val_figure=tuned, figure=measure(metric, scores(weights, test[0]), test[1])))
    report(args, checkpoint, ", ".join(r["dataset"] for r in rows), dict(seed=args.seed), {}, rows)


# ------------------------------------------------------------------------------------------------ invariance

def invariance(args, device):
    """SimCLR's table 3: small networks (one hidden layer of 512, our choice) that tell from h and from g(h) what was done to the image."""
    encoder, _, checkpoint, name, train, val = load(args, device)
    project, rows = read_projector(args.checkpoint, checkpoint).to(device), []
    tasks = {      # the share of each class, x and y -> x
        "colour or grey": ((0.8, 0.2), lambda x, y: torch.where(y == 1, common.grayscale(x.clone(), 1), x)),
        "rotation": ((0.25,) * 4, lambda x, y: torch.stack([image.rot90(int(k), (1, 2)) for image, k in zip(x, y)])),
        "original or corrupted": ((0.5, 0.5), lambda x, y: torch.where(y == 1, common.noise(x.clone(), 1, 0.1), x)),
        "original or Sobel": ((0.5, 0.5), lambda x, y: torch.where(y == 1, common.sobel(x.clone(), 1), x)),
    }
    for number, (task, (shares, change)) in enumerate(tasks.items()):
        sets = []
        for split, data in enumerate((train, val)):
            common.seed_all(args.seed, 4, number, split)
            order, spaces = torch.randperm(len(data))[:args.count], []
            answers = torch.multinomial(torch.tensor(shares), len(order), True)
            for some, y in zip(order.split(256), answers.split(256)):
                x = look(data, some, checkpoint).to(device)
                common.seed_all(args.seed, 5, number, split, len(spaces))
                with torch.no_grad():
                    x = common.normalize(change(x, y.view(-1, 1, 1, 1).to(device)), checkpoint["input"]["mean"], checkpoint["input"]["std"])
                    spaces.append((h := encoder(x).float(), project(h)))
            sets.append([Features(torch.cat(s), answers.to(device)) for s in zip(*spaces)])
        row = dict(task=task, chance=100 * max(shares))
        for space, a, b in zip(("h", "g(h)"), *sets):
            common.say(f"{task}, from {space}")
            mean, std = a.h.mean(0), a.h.std(0) + 1e-6
            a.h, b.h = (a.h - mean) / std, (b.h - mean) / std
            make = lambda: nn.Sequential(nn.Linear(a.h.shape[1], 512), nn.ReLU(), nn.Linear(512, len(shares)))
            network, = train_heads(args, device, dict(BASE, epochs=20, batch_size=128, drops=(), adam=True), [2e-3], a, make)
            row[space] = accuracy(network(b.h), b.labels)
        rows.append(row)
    report(args, checkpoint, name, dict(train=min(args.count, len(train)), test=min(args.count, len(val)), seed=args.seed), {}, rows)


def read_projector(path, checkpoint):
    """g out of one of our checkpoints: its layers are known from their tensors, and a ReLU stands where a number has none."""
    state = {k.removeprefix("projector."): v for k, v in checkpoint["model"].items() if k.startswith("projector.")}
    state = {f"0.{k}": v for k, v in state.items()} if "weight" in state else state
    if not state or not checkpoint["args"]:
        raise common.UserError(f"{path}: has no projector to compare with; invariance needs a checkpoint of these scripts that has one")
    layers = []
    for i in range(max(int(k.split(".")[0]) for k in state) + 1):
        weight, mean = state.get(f"{i}.weight"), state.get(f"{i}.running_mean")
        layers.append(nn.BatchNorm1d(len(mean), affine=weight is not None) if mean is not None else
                      nn.ReLU() if weight is None else nn.Linear(*weight.shape[::-1], bias=f"{i}.bias" in state))
    network = nn.Sequential(*layers)
    network.load_state_dict(state)
    return network.requires_grad_(False).eval()


# ------------------------------------------------------------------------------------------------ detection

class Scenes:
    """Images with boxes, as a data set: `images` a Folder or (n, 3, H, W) uint8; `boxes` a list of (k, 4) float32, x0, y0, x1, y1 in pixels
    from 0, ends excluded; `labels` of (k,) from 0; `difficult` of (k,) booleans."""

    def __init__(self, images, boxes, labels, difficult, classes):
        self.images, self.boxes, self.labels, self.difficult, self.classes = images, boxes, labels, difficult, classes
        self.in_workers, self.broken, self.paths = isinstance(images, common.Folder), set(), getattr(images, "paths", None)

    def __len__(self):
        return len(self.images)

    def read(self, i):
        """Image i, (3, H, W) uint8; black if it cannot be read, which makes its index the second thing returned."""
        image = self.images.read(i) if self.in_workers else self.images[i]
        return (torch.zeros(3, 64, 64, dtype=torch.uint8), [i]) if image is None else (image, [])

    def crop(self, indices, crops, *key):
        images, broken = zip(*map(self.read, indices.tolist()))
        return list(images), indices, sum(broken, [])


def drawn_scenes(count, seed):
    """Scenes of `shapes`, 96 pixels, three by three cells of the size that the encoder was trained on."""
    images, labels, boxes = (torch.from_numpy(a) for a in common.draw_shapes(count, seed, size=96, cells=3))
    there = [k >= 0 for k in labels]
    return Scenes(images, [b[t].float() for b, t in zip(boxes, there)], [k[t] for k, t in zip(labels, there)],
                  [torch.zeros(int(t.sum()), dtype=torch.bool) for t in there], common.SHAPES)


def voc_scenes(directory, part, classes=None, years=(2007, 2012)):
    """The images that DIR/VOCdevkit/VOC<year>/ImageSets/Main/<part>.txt lists, of all `years` that have it."""
    tops = [Path(directory, "VOCdevkit", f"VOC{year}") for year in years]
    lists = {top: top / "ImageSets" / "Main" / f"{part}.txt" for top in tops}
    if not any(file.is_file() for file in lists.values()):
        raise common.UserError(f"{directory}: no set {part}; expected {lists[tops[0]]}")
    paths, scenes, problems = [], [], {}
    for top, name in [(top, name) for top, file in lists.items() if file.is_file() for name in file.read_text().split()]:
        image, note = top / "JPEGImages" / f"{name}.jpg", top / "Annotations" / f"{name}.xml"
        try:
            if not image.is_file():
                raise ValueError("images missing", image)
            root = ElementTree.parse(note).getroot()
            width, height = (float(root.findtext(f"size/{k}")) for k in ("width", "height"))
            objects = [(o.findtext("name"), [float(o.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax")],
                        o.findtext("difficult") == "1") for o in root.iter("object")]
            if not all(name for name, _, _ in objects):
                raise ValueError("objects without a name", note)
            if not all(1 <= x0 <= x1 <= width and 1 <= y0 <= y1 <= height for _, (x0, y0, x1, y1), _ in objects):
                raise ValueError("boxes outside their image", note)
            paths.append(str(image))
            scenes.append(objects)
        except FileNotFoundError:
            problems.setdefault("annotations missing", []).append(note)
        except (ElementTree.ParseError, TypeError, ValueError) as e:
            what, where = e.args if len(e.args) == 2 else ("annotations unreadable", note)
            problems.setdefault(what, []).append(where)
    if problems or not paths:
        said = "; ".join(f"{what}: {len(where)}, the first {where[0]}" for what, where in problems.items())
        raise common.UserError(f"{directory}: {said or f'set {part} is empty'}")
    found = sorted({name for objects in scenes for name, _, _ in objects})
    unknown = [name for name in found if classes and name not in classes]
    if unknown:
        raise common.UserError(f"{directory}: {part} has classes that the training set does not have: {', '.join(unknown)}")
    classes = classes or found
    first = torch.tensor([1.0, 1, 0, 0])                        # VOC counts pixels from 1
    return Scenes(common.Folder(paths, None), [torch.tensor([box for _, box, _ in objects]).reshape(-1, 4) - first for objects in scenes],
                  [torch.tensor([classes.index(name) for name, _, _ in objects], dtype=torch.int64) for objects in scenes],
                  [torch.tensor([hard for _, _, hard in objects], dtype=torch.bool) for objects in scenes], classes)


def voc_recall_precision(image, score, box, truth_image, truth_box, difficult, thresholds):
    """VOCevaldet.m for one class: detections (M,), (M,), (M, 4), true boxes (K,), (K, 4), (K,), numpy; ends excluded: the kit's widths.

    By falling score, ties in the order given, a detection claims the box that it overlaps most, the first of equals. It is right when that
    is by the threshold or more and nobody claimed it before; later ones are wrong, those that claim a difficult box count neither way.
    Returns recall and precision (M,), nothing counted yet: 0, for each threshold.
    """
    order = np.argsort(-score, kind="stable")
    overlap, which, curves = np.zeros(len(order)), np.zeros(len(order), np.int64), []
    for i in np.unique(truth_image):
        mine, theirs = np.flatnonzero(image[order] == i), np.flatnonzero(truth_image == i)
        if len(mine):
            iou = torchvision.ops.box_iou(*(torch.from_numpy(b).double() for b in (box[order[mine]], truth_box[theirs]))).numpy()
            overlap[mine], which[mine] = iou.max(1), theirs[iou.argmax(1)]
    for threshold in thresholds:
        ignored, right = (overlap >= threshold) & difficult[which], np.zeros(len(order))
        ranks = np.flatnonzero((overlap >= threshold) & ~ignored)
        right[ranks[np.unique(which[ranks], return_index=True)[1]]] = 1
        right = np.cumsum(right)
        curves.append((right / (~difficult).sum(), right / np.maximum(np.cumsum(~ignored), 1)))
    return curves


def voc_average_precision(recall, precision, eleven_point):
    """recall, precision (M,) by falling score -> average precision in 0..1.

    `eleven_point`, VOC2007: the mean over r = 0, 0.1 ... 1 of the best precision at recall r or more. Otherwise, since VOC2010: the area
    under the precision made to fall with recall. r is k / 10 to the last bit: with the kit's 3 * 0.1 a recall of exactly 0.3 misses it.
    """
    recall, precision = np.asarray(recall, np.float64), np.asarray(precision, np.float64)
    if eleven_point:
        return float(sum(precision[recall >= k / 10].max(initial=0) for k in range(11)) / 11)
    r, p = np.concatenate([[0], recall, [1]]), np.concatenate([[0], precision, [0]])
    return float((np.diff(r) * np.maximum.accumulate(p[::-1])[::-1][1:]).sum())


def voc_rows(found, scenes):
    """found: image (M,), label (M,), score (M,), box (M, 4) as numpy. A row for each class that has a box to find: AP, AP50, AP75 in
    percent by eleven points, and `_all`, by all points; AP is the mean over overlaps of 0.5, 0.55 ... 0.95."""
    image = np.repeat(np.arange(len(scenes)), [len(b) for b in scenes.boxes])
    label, box, difficult = (torch.cat(a).numpy() for a in (scenes.labels, scenes.boxes, scenes.difficult))
    rows = []
    for k, name in enumerate(scenes.classes):
        mine, theirs = found[1] == k, label == k
        if not (theirs & ~difficult).any():
            common.say(f"{name} is not in the test set, and left out of the means")
            continue
        boxes = (a[theirs] for a in (image, box, difficult))
        curves = voc_recall_precision(found[0][mine], found[2][mine], found[3][mine], *boxes, IOUS)
        row = {"class": name}
        for rule, suffix in ((True, ""), (False, "_all")):
            points = [100 * voc_average_precision(*curve, rule) for curve in curves]
            row.update({f"AP{suffix}": float(np.mean(points)), f"AP50{suffix}": points[0], f"AP75{suffix}": points[5]})
        rows.append(row)
    return rows


def detector(encoder, recipe, kind, classes, input, device):
    """torchvision's Faster R-CNN on `encoder`, everything trained: the papers' C4, its fourth stage as the box head; or a pyramid."""
    encoder = encoder.to("cpu", memory_format=torch.contiguous_format).requires_grad_(True)      # channels-last crashes torch 2.15 on a CPU
    stage, anchors = getattr(encoder, "layer4", None) if getattr(encoder, "bn1", None) else None, recipe["anchors"]
    if kind == "fpn":
        if not stage:
            raise common.UserError("--detector fpn: needs an encoder of four stages; use c4")
        names = {f"layer{i}": str(i - 1) for i in range(1, 5)}
        body = OrderedDict((k, nn.ReLU() if k == "relu" else getattr(encoder, k)) for k in ("conv1", "bn1", "relu", "maxpool", *names))
        widths = [[m for m in body[k][-1].modules() if isinstance(m, nn.Conv2d)][-1].out_channels for k in names]
        trunk, dim, anchors = BackboneWithFPN(nn.Sequential(body), names, widths, 256), 1024, tuple((a,) for a in anchors)
        pool, head = torchvision.ops.MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2), faster_rcnn.TwoMLPHead(256 * 7 * 7, dim)
    else:
        trunk, dim, anchors = encoder, encoder.dim, (anchors,)
        if stage:
            encoder.layer4 = nn.Identity()
        stage = stage or nn.Sequential(*(common.Bottleneck(dim, dim // 4, 2 if i == 0 else 1, nn.BatchNorm2d) for i in range(3)))
        head = nn.Sequential(stage, nn.BatchNorm2d(dim), nn.AdaptiveAvgPool2d(1), nn.Flatten())      # MoCo's extra norm
        with torch.no_grad():
            y = encoder.eval().maps(torch.zeros(1, 3, 64, 64))
        encoder.forward, encoder.out_channels, pool = encoder.maps, y.shape[1], torchvision.ops.MultiScaleRoIAlign(["0"], recipe["pool"], 0)
        pool.forward = lambda x, boxes, sizes: torchvision.ops.roi_align(      # detectron2's: half a pixel shifted
            x["0"], boxes, pool.output_size, y.shape[3] / 64, sampling_ratio=0, aligned=True)
    before, after, before_test, after_test = recipe["proposals"]
    return FasterRCNN(trunk, min_size=recipe["sizes"], max_size=recipe["max_size"], image_mean=input["mean"], image_std=input["std"],
                      rpn_anchor_generator=AnchorGenerator(anchors, ((0.5, 1.0, 2.0),) * len(anchors)),
                      rpn_pre_nms_top_n_train=before, rpn_post_nms_top_n_train=after, rpn_pre_nms_top_n_test=before_test,
                      rpn_post_nms_top_n_test=after_test, box_roi_pool=pool, box_head=head, box_batch_size_per_image=recipe["rois"],
                      box_predictor=faster_rcnn.FastRCNNPredictor(dim, classes + 1), box_positive_fraction=0.25,
                      box_score_thresh=0.05, box_nms_thresh=0.5, box_detections_per_img=100).to(device).train()


def detect(args, device):
    encoder, _, checkpoint = load_encoder(args, device)
    if args.data:
        train, name = voc_scenes(args.data, args.train_set), Path(args.data).name
        test = voc_scenes(args.data, args.test_set, train.classes, years=(2007,))
        recipe = dict(DETECT["voc"], **{} if any(Path(p).parts[-3] == "VOC2012" for p in train.paths) else dict(steps=9000))       # MoCo, table 4
    else:
        train, test, name, recipe = drawn_scenes(1000, 11), drawn_scenes(300, 12), "shapes", dict(DETECT["shapes"])
    if args.image_size:
        scale = args.image_size / recipe["size"]
        recipe.update({k: tuple(max(4, round(side * scale)) for side in recipe[k]) for k in ("sizes", "anchors", "proposals")})
        recipe.update(size=args.image_size, max_size=round(recipe["max_size"] * scale))
    recipe.update({k: v for k in ("steps", "batch_size", "lr", "rois") if (v := getattr(args, k)) is not None})
    # the rate falls after 18000 and 22000 of 24000 steps
    recipe.update(warmup=min(recipe["warmup"], max(1, recipe["steps"] // 8)), drops=(0.75, 11 / 12), factor=0.1)
    settings = dict(recipe, **{k: v for k, v in vars(args).items() if k not in ("checkpoint", "output", "workers", "save_every", *recipe)})
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    settings.update(images=[len(train), len(test)], encoder=sum(v.double().abs().sum().item() for v in checkpoint["encoder"].values()))
    batches, step, total = common.Batches(train, [], recipe["batch_size"], args.seed), 0, recipe["steps"]
    torch.manual_seed(args.seed)
    model = detector(encoder, recipe, args.detector, len(train.classes), checkpoint["input"], device)
    network = parallel(model, device)
    norms = {p for m in model.modules() if isinstance(m, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)) for p in m.parameters()}
    groups = [dict(params=[p for p in model.parameters() if (p in norms) == of_norm], peak=recipe["lr"], weight_decay=decay)
              for of_norm, decay in ((False, 1e-4), (True, 0))]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    folder = output(args, "-".join(filter(None, ["detect", name, args.detector, args.baseline, args.rescale and "rescaled"])))
    file = folder / "detect.pt"
    if file.exists():
        saved = common.read_tensors(file)
        differing = [k for k in settings if saved.get("settings", {}).get(k) != settings[k]]
        if differing:
            raise common.UserError(f"{file}: made with other settings: {', '.join(differing)}; use the same or give another --output")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
        common.say(f"going on from step {step} of {total} in {file}")

    def loss_of(images, indices):
        return sum(network(*disturb(train, images, indices, args.color_drop)).values())

    def save_state(step):
        stop = common.asked_to_stop(last=step == total)
        if common.rank() == 0 and (stop or step == total or step % args.save_every == 0):
            state = dict(settings=settings, step=step, model=model.state_dict(), optimizer=optimizer.state_dict())
            common.write_atomically(file, lambda f: torch.save(state, f))
        if stop:
            raise common.Stopped(f"stopped after step {step} of {total}; the same command goes on from {file}")

    descend(args, batches, [optimizer], recipe, loss_of, total, step, save_state)
    precise_norms(model, train, batches, min(200, total), args, device)
    model.transform.min_size = (recipe["size"],)
    found = find_all(model, test, args, device)
    rows = voc_rows(found, test)
    if not rows:
        raise common.UserError(f"--data {args.data}: {args.test_set} has no box that is not difficult")
    shown = {k: settings[k] for k in ("detector", "steps", "batch_size", "lr", "size", "rois", "color_drop", "rescale", "seed")}
    means = {k: float(np.mean([row[k] for row in rows])) for k in rows[0] if k != "class"}
    report(args, checkpoint, name, dict(shown, train=len(train), test=len(test)), means, rows)
    if common.rank() == 0:
        draw_detections(folder, test, found)


def disturb(data, images, indices, color_drop=0.0):
    """What torchvision's detectors learn from: images in 0..1, mirrored by chance, with one channel in place of all three by the chance
    `color_drop` (CPC v2); and their boxes, difficult ones too, as detectron2 has it."""
    views, targets = [], []
    for x, i in zip(images, indices.tolist()):
        boxes = data.boxes[i].to(x.device)
        if torch.rand(1) < 0.5:
            x, boxes = x.flip(2), torch.stack([x.shape[2] - boxes[:, 2], boxes[:, 1], x.shape[2] - boxes[:, 0], boxes[:, 3]], 1)
        if torch.rand(1) < color_drop:
            x = x[torch.randint(3, (1,))].expand(3, -1, -1)
        views.append(x)
        targets.append(dict(boxes=boxes, labels=data.labels[i].to(x.device) + 1))            # 0 is the background
    return views, targets


@torch.no_grad()
def precise_norms(model, data, batches, count, args, device):
    """BatchNorm's statistics anew, as the mean over `count` batches with the final weights (Precise-BN)."""
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.reset_running_stats()
            m.momentum = None
    for step, (images, indices, _) in enumerate(common.stream(batches, range(count), args.workers, device)):
        common.seed_all(args.seed, step, common.rank(), 6)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            model(*disturb(data, images, indices))
    agree(model)


@torch.no_grad()
def find_all(model, test, args, device):
    """The detections in all test images, which the processes share: image (M,), label (M,), score (M,), box (M, 4) as numpy."""
    model.eval()
    pieces, found = common.InOrder(test, [], piece=8), []
    for images, indices, broken in common.stream(pieces, range(len(pieces)), args.workers, device):
        common.note_broken(test, broken)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            results = model(images)
        for i, y in zip(indices.tolist(), results):
            found += [(i, int(k) - 1, float(s), *map(float, b)) for k, s, b in zip(y["labels"], y["scores"], y["boxes"])]
    if common.world_size() > 1:
        everyones = [None] * common.world_size()
        dist.all_gather_object(everyones, found)
        found = sorted({row for part in everyones for row in part})                          # the last images may have come twice
    table = np.array(found, np.float64).reshape(-1, 7)
    return table[:, 0].astype(int), table[:, 1].astype(int), table[:, 2], table[:, 3:]


def draw_detections(folder, test, found, columns=4):
    """The first test images: what was found (score 0.3 or more, colour by class), and dashed in white what is there."""
    plt = common.pyplot()
    colors = plt.get_cmap("tab10" if len(test.classes) <= 10 else "tab20")
    figure, axes = plt.subplots(2, columns, figsize=(3 * columns, 6), squeeze=False, layout="constrained")
    for i, ax in enumerate(axes.flat):
        ax.axis("off")
        if i >= len(test):
            continue
        ax.imshow(test.read(i)[0].permute(1, 2, 0))
        shown = [("white", "--", None, box) for box in test.boxes[i].numpy()]
        for _, k, score, box in zip(*(a[(found[0] == i) & (found[2] >= 0.3)] for a in found)):
            shown.append((colors(int(k) % 20), "-", f"{test.classes[k]} {score:.2f}", box))
        for color, style, text, box in shown:
            ax.add_patch(plt.Rectangle(box[:2] - 0.5, *(box[2:] - box[:2]), fill=False, edgecolor=color, linestyle=style, linewidth=1.5))
            if text:
                ax.text(*box[:2], text, fontsize=7, color="white", va="bottom", bbox=dict(facecolor=color, linewidth=0, pad=0.5))
    figure.suptitle("dashed: what is there; coloured: found, with a score of 0.3 or more", fontsize=9)
    common.save_picture(figure, folder / "detections.png")


# ------------------------------------------------------------------------------------------------ results and flags

def report(args, checkpoint, data, settings, result, rows=()):
    """A table for people and one line of JSON for programs: `result`, and `rows` if there are several."""
    if common.rank() > 0:
        return
    tidy = lambda row: {k: round(v, 2) if isinstance(v, float) and k not in ("labels", "l2") else v for k, v in row.items()}
    asked = {"random": "untrained " + checkpoint["encoder_config"]["arch"], "pixels": "pixels"}
    shown = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in settings.items())
    print(f"{args.task} on {data}, {asked.get(args.baseline, args.checkpoint)}: {shown}")
    table = [*rows, *([dict({"class": "mean"} if rows else {}, **result)] if result else [])]
    lines = [list(table[0]), *(["-" if v is None else str(v) for v in tidy(row).values()] for row in table)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(f"{text:{'>' if i else '<'}{width}}" for i, (text, width) in enumerate(zip(line, widths))))
    baseline = args.baseline or getattr(args, "supervised", None)
    line = dict(task=args.task, data=data, checkpoint=str(args.checkpoint), baseline=baseline, **settings, **tidy(result))
    print(json.dumps(dict(line, rows=[tidy(row) for row in rows]) if rows else line), flush=True)


def output(args, *inside):
    """The folder for pictures."""
    folder = Path(args.output or Path(args.checkpoint).parent.joinpath(*inside))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise common.UserError(f"--output {folder}: {e}") from None
    return folder


def save(args, figure, name):
    common.save_picture(figure, output(args) / ((f"{args.baseline}-" if args.baseline else "") + name))


def labels_amount(text):
    """"0.1", "1.0": a share of the training images; "5": so many of every class."""
    if text.isdigit() and int(text):
        return int(text)
    if not re.fullmatch(r"0?\.\d*[1-9]\d*|1\.0*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a share above 0 and up to 1.0 nor a whole number of images a class")
    return float(text)


TASKS = dict(knn="nearest neighbours", linear="linear classifier on frozen features", finetune="the whole network trained on a few labels",
             detect="Faster R-CNN", transfer="logistic regression on other data sets",
             neighbours="pictures of neighbours, and a map of the features", invariance="which transformations can be told from h and g(h)")


def parse_args(argv=None):
    parser = common.LineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    tasks = parser.add_subparsers(dest="task", required=True, parser_class=common.LineParser, metavar="TASK")
    adders = {task: tasks.add_parser(task, help=text, description=text, allow_abbrev=False).add_argument for task, text in TASKS.items()}

    def flag(which, name, **options):
        for task in which.split():
            adders[task](name, **options)

    every, named = " ".join(TASKS), "knn linear finetune invariance neighbours"
    flag(every, "checkpoint", metavar="CHECKPOINT", help="checkpoint.pt of a run, or a file of another project")
    flag("detect", "--data", metavar="DIR", help="with VOCdevkit/VOC2007 and, to train on, VOC2012; default: drawn scenes")
    flag("transfer", "--datasets", nargs="+", required=True, metavar="NAME|DIR",
         help=f"{', '.join(TRANSFER)}, shapes, stl10, or directories with train/<class>, val/<class> and perhaps test/<class>")
    flag(named, "--data", type=common.data_name, metavar="NAME|DIR", help="default: what the checkpoint was trained on")
    flag(named + " transfer", "--root", help="where the named data sets lie; default: as in training, or data")
    flag("finetune", "--baseline", dest="supervised", choices=["supervised"], help="train from random initialisation as well")
    flag("knn linear transfer neighbours", "--baseline", choices=["random", "pixels"], help="ask an untrained one, or the pixels")
    flag("detect", "--baseline", choices=["random"], help="start from an untrained encoder instead")
    flag(named + " transfer", "--size", type=common.count,
         help="side of the images that the encoder is given; default: as in its training (224 or 32 for other projects)")
    flag(every, "--workers", type=common.whole, default=2, help="processes that read image files (default 2)")
    flag(every, "--seed", type=common.seed, default=0, help="of everything that is drawn, and of the random baseline")
    flag(every, "--precision", choices=["bf16", "fp32"], default="fp32")
    flag("knn linear finetune detect neighbours", "--output", metavar="DIR",
         help="where the pictures go; default: beside the checkpoint, those of detect in a folder")
    flag("knn linear", "--sweep", action="store_true", help="choose k and temperature, or the rate, on held-out training images")
    flag("knn", "--k", type=common.count, default=200, help="neighbours that vote (default 200)")
    flag("knn", "--temperature", type=common.positive, default=0.1, help="of the votes (default 0.1)")
    flag("linear", "--protocol", choices=[*PROTOCOLS, "lbfgs"], default="simclr",
         help="whose way of training the probe (default simclr); lbfgs: to the optimum")
    flag("linear", "--weight-decay", type=common.not_negative, help="for lbfgs: l2 (default 1)")
    flag("linear", "--no-augment", dest="augment", action="store_false", help="compute the features once, without random crops and flips")
    flag("finetune", "--labels", type=labels_amount, nargs="+", default=[0.01, 0.1],
         help="shares (0.01, 1.0) or whole numbers of images a class (default 0.01 0.1)")
    flag("finetune", "--subset", choices=["balanced", "random"], default="balanced", help="as many of each class (SimCLR), or any (CPC v2)")
    flag("finetune", "--protocol", choices=list(FINETUNE), default="simclr", help="whose way of fine-tuning (default simclr)")
    flag("finetune detect", "--rescale", action="store_true", help="bring the weights to a new network's norms first, which changes the rate alone")
    flag("linear finetune", "--epochs", type=common.count, help="default: the protocol's")
    flag("linear finetune detect", "--batch-size", type=common.count, help="of all processes; default: the protocol's, if the data are enough")
    flag("linear finetune", "--lr", type=common.positive, help="per 256 images; in finetune the head's, which the encoder's follows")
    flag("detect", "--lr", type=common.positive, help="for the whole batch")
    flag("detect", "--train-set", default="trainval", help="of ImageSets/Main (default trainval)")
    flag("detect", "--test-set", default="test", help="of ImageSets/Main of VOC2007 (default test)")
    flag("detect", "--detector", choices=["c4", "fpn"], default="c4", help="as in the papers' tables (default); or a pyramid")
    flag("detect", "--steps", type=common.count, help="default: 24000, without VOC2012 9000, on drawn scenes 150")
    flag("detect", "--image-size", type=common.count, help="shorter side in the test (default 800); the rest goes with it")
    flag("detect", "--rois", type=common.count, help="boxes an image that the head learns from (default 512)")
    flag("detect", "--color-drop", type=common.share, default=0.0, help="share of images of which one channel is kept (CPC v2)")
    flag("detect", "--save-every", type=common.count, default=100, help="steps between savings of the state")
    flag("invariance neighbours", "--count", type=common.count, default=1500, help="images used, of each part (default 1500)")
    parser.set_defaults(baseline=None, size=None)
    parsed = parser.parse_args(argv)
    if parsed.task in ("invariance", "neighbours") and (common.world_size() > 1 or parsed.count < 10):
        parser.error(f"{parsed.task} runs in one process, on 10 images or more")
    return parsed


if __name__ == "__main__":
    args = parse_args()
    common.launch(globals()[args.task], args, stoppable=args.task == "detect")
