"""Evaluate a trained encoder.

    python evaluate.py knn CHECKPOINT                       nearest neighbours, without training
    python evaluate.py linear CHECKPOINT                    a linear classifier on frozen features
    python evaluate.py linear CHECKPOINT --protocol moco    ... trained as in another paper
    python evaluate.py linear CHECKPOINT --features z       ... on the projector's output
    python evaluate.py finetune CHECKPOINT --labels 0.01 0.1 --baseline supervised
    python evaluate.py detect CHECKPOINT --data DIR         Faster R-CNN on DIR/VOCdevkit or shapes
    python evaluate.py neighbours CHECKPOINT                pictures: neighbours, a map of features
    python evaluate.py knn CHECKPOINT --baseline random     the same network untrained; or pixels
    python evaluate.py compare RUN RUN                      curves and figures of several runs

CHECKPOINT is a run's folder, its checkpoint.pt, or a file of another project, which needs --data.
The representation h is evaluated, or by `linear --features z` the projection. The last line of
stdout is JSON. knn, linear, finetune and detect also run under torchrun. --sweep chooses settings
on held-out training images; test images are not used before that.

Differs from the papers: training uses random crops and flips, tests the central crop; `linear
--no-augment` computes the features once, much faster and a little worse. A cosine decays at every
step, also where the original does so once an epoch. For data in memory a batch is 256 at most, in
`finetune` an eighth of the images, and the learning rate is scaled with it. CPC v2: the epochs of
its probe and, in fine-tuning, the rates of the second phase, the patience and what is held out are
ours: a fifth of the labelled images, so that it sees no more labels than the others.

Features are float32, or float16 from a gigabyte on: 5.2 GB in each process for ImageNet's 1.28
million of 2048 numbers. `knn` needs 0.3 GB more, `linear --protocol lbfgs` about 0.6 GB, and
--sweep copies nine tenths of them.
"""
import argparse, copy, functools, itertools, json, re, sys, textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import checkpoints
import cmc
import common
import cpc_v2
import detection
from classifiers import (Features, PatchGrid, batch_size, linear_layer, logistic_regression,
                         patch_classifier, read_projector, scores, spectrum, train_heads, tune,
                         tune_cpc)
from classifiers import autocast                        # for transfer.py

# lr: per 256 images. drops: the fractions of the run after which the rate falls to `factor` of what
# it was; None: half a cosine to 0. init: standard deviation of the classifier's weights.
BASE = dict(batch_size=256, weight_decay=0, nesterov=False, drops=None, factor=0.1)
PROTOCOLS = {
    "simclr": dict(BASE, epochs=90, batch_size=4096, lr=0.1, nesterov=True),        # B.6
    "moco": dict(BASE, epochs=100, lr=30, drops=(0.6, 0.8), init=0.01),             # main_lincls.py
    "simsiam": dict(BASE, epochs=90, batch_size=4096, lr=0.1, larc=True, init=0.01),    # likewise
    "byol": dict(BASE, epochs=80, batch_size=1024, lr=0.2, nesterov=True),          # official code
    "swav": dict(BASE, epochs=100, lr=0.3, weight_decay=1e-6, init=0.01),           # eval_linear.py
    "cpc": dict(BASE, epochs=90, batch_size=512, lr=2.5e-4, drops=(), adam=True),   # appendix B:
}                                                                   # 5e-4 = 2.5e-4 * 512 / 256
# A row for at most 2 % of the labels, and one for more; lr: of the encoder, head_lr: of the rest.
SIMCLR = dict(BASE, batch_size=4096, lr=0.05, head_lr=0.05, nesterov=True)
BYOL = dict(SIMCLR, batch_size=1024)
SWAV = dict(BASE, epochs=20, drops=(0.6, 0.8), factor=0.2)
SUPERVISED = dict(BASE, lr=0.1, head_lr=0.1, nesterov=True, weight_decay=1e-4)
FINETUNE = {
    "simclr": (dict(SIMCLR, epochs=60), dict(SIMCLR, epochs=30)),                   # B.5
    "byol": (dict(BYOL, epochs=50), dict(BYOL, epochs=30)),                         # from its sweep
    "swav": (dict(SWAV, lr=0.02, head_lr=5), dict(SWAV, lr=0.01, head_lr=0.2)),     # eval_semisup
    "supervised": (dict(SUPERVISED, epochs=180), dict(SUPERVISED, epochs=90)),      # our choice
}
CPC = dict(BASE, batch_size=32, weight_decay=1e-4, drops=())        # C.2; there 32 a worker
CPC_PHASES = [dict(CPC, epochs=100, lr=0.0, head_lr=0.8),           # encoder fixed; 0.1 at 32
              dict(CPC, epochs=30, lr=8e-4, head_lr=0.08)]          # rates are ours

# ============================================================================== encoder and data

def build(config):
    """The network of an encoder_config, randomly initialised."""
    config = dict(config)
    if config.pop("version", None) == 2:
        return cpc_v2.resnet_v2(**config)
    adapted = {key: config.pop(key) for key in ("padding", "stem_relu") if key in config}
    encoder = cmc.Halves(**config) if "view" in config else common.resnet(**config)
    return checkpoints.adapt(encoder, adapted)

def load_encoder(args, device):
    """What is evaluated: the encoder of the checkpoint or a baseline, frozen, in eval mode; the
    dimension of h; and the checkpoint, whose input has the size that `--size` asks for.

    args: checkpoint, padding, view, size, baseline and seed. Raises UserError for files of no use,
    also where a weight is not finite."""
    checkpoint = checkpoints.read(args.checkpoint, args.padding, args.view)
    size = args.size or checkpoint["input"]["size"]
    checkpoint["input"]["size"] = size
    if args.baseline == "pixels":
        return nn.Flatten(), 3 * size * size, checkpoint
    torch.manual_seed(args.seed)
    try:
        encoder = build(checkpoint["encoder_config"])
        if args.baseline != "random":
            encoder.load_state_dict(checkpoint["encoder"])
    except (TypeError, ValueError, RuntimeError) as e:
        raise common.UserError(f"{args.checkpoint}: its encoder does not fit its encoder_config "
                               f"({checkpoints.printable(e, 200)})") from None
    encoder.to(device, memory_format=torch.channels_last).requires_grad_(False).eval()
    epochs = checkpoint["args"].get("epochs", 0)
    if checkpoint.get("epoch", epochs) < epochs:
        common.say(f"{args.checkpoint}: unfinished, epoch {checkpoint['epoch']} of {epochs}")
    if checkpoint["supervised"] and args.baseline != "random":
        common.say(f"{args.checkpoint}: supervised, it learned from labels")
    return encoder, encoder.dim, checkpoint

def load(args, device):
    """What `load_encoder` returns, the name of the data, and its labelled images, train and val:
    for `neighbours` of images without labels, a split of them, all of one class."""
    encoder, dim, checkpoint = load_encoder(args, device)
    name = args.data or checkpoint["args"].get("data")
    root = args.root or checkpoint["args"].get("root", "data")
    if name is None:
        raise common.UserError(f"--data: needed, {args.checkpoint} does not name its data")
    if args.task == "neighbours" and not common.has_labels(name):
        data = common.load_data(name, root, "pretrain", device)
        data = common.Folder(data.paths, [0] * len(data), ["images"])
        train, val = hold_out(data, args.seed, max(3, len(data) // 10))
    else:
        train, val = [common.load_data(name, root, split, device) for split in ("train", "val")]
    return encoder, dim, checkpoint, name, train, val

def compute(args, encoder, data, input, device):
    """The Features of the test crops of `data`."""
    h, labels = common.features(encoder, data, input, args.workers, args.precision)
    return Features(h.to(device), labels.to(device))

def subset(data, indices):
    """The images or features at `indices`, on the CPU, as a data set of their own."""
    if isinstance(data, Features):
        return Features(*(x[indices.to(x.device)] for x in (data.h, data.labels)))
    if data.in_workers:
        return common.Folder(data.paths[indices.numpy()], data.labels[indices], data.classes)
    images = data.images[indices.to(data.images.device)]
    return common.Images(images, data.labels[indices], images.device, data.classes)

def hold_out(data, seed, count=None):
    """(the rest, held out): training images to choose settings on, by default a tenth of them and
    at most 10,000."""
    order = torch.from_numpy(np.random.default_rng([seed, 1]).permutation(len(data)))
    count = count or min(max(1, len(data) // 10), 10_000)
    if len(data) <= count:
        raise common.UserError(f"{len(data)} training images: too few to hold out {count}")
    return subset(data, order[count:].sort().values), subset(data, order[:count].sort().values)

def choose(what, top1, held):
    """The best setting of {setting: accuracy on the held-out images}."""
    best = max(top1, key=top1.get)
    common.say(f"{what} {best} chosen: {top1[best]:.2f} % on {len(held)} held-out training images")
    return best

def class_names(data):
    """The names of the classes of a labelled data set, by label."""
    return list(data.classes or map(str, range(int(data.labels.max()) + 1)))

def accuracy(logits, labels, top=1):
    """Percent of rows (n, C) whose label (n,) is among the `top` largest logits."""
    best = logits.topk(min(top, logits.shape[1]), 1).indices
    return 100 * (best == labels[:, None]).any(1).float().mean().item()

# ============================================================================== knn

def knn(args, device):
    """accuracy of nearest neighbours"""
    encoder, _, checkpoint, name, train, val = load(args, device)
    input = checkpoint["input"]
    bank, test = [compute(args, encoder, data, input, device) for data in (train, val)]
    k = args.k or common.default_k(bank.labels)
    temperature = args.temperature
    if args.sweep:
        rest, held = hold_out(bank, args.seed)
        grid = itertools.product((5, 10, 20, 50, 100, 200), (0.03, 0.07, 0.1, 0.3))
        top1 = {pair: common.knn_accuracy(rest.h, rest.labels, held.h, held.labels, *pair)
                for pair in grid}
        k, temperature = choose("k and temperature", top1, held)
    top1 = common.knn_accuracy(bank.h, bank.labels, test.h, test.labels, k, temperature)
    settings = dict(k=k, temperature=temperature, sweep=args.sweep, train=len(train), val=len(val))
    report(args, checkpoint, name, settings, dict(top1=top1))
    if common.RANK == 0:
        figure = draw_neighbours(input, train, val, {"nearest": (bank, test)}, columns=10)
        save(args, figure, "neighbours.png")

# ============================================================================== linear

def linear(args, device):
    """a linear classifier on frozen features"""
    encoder, dim, checkpoint, name, train, val = load(args, device)
    if args.features == "z":
        projector = read_projector(args.checkpoint, checkpoint).to(device)
        dim = projector(torch.zeros(1, dim, device=device)).shape[1]
        encoder = nn.Sequential(encoder, projector).eval()
    input = checkpoint["input"]
    classes = len(class_names(train))
    recipe = dict(PROTOCOLS.get(args.protocol, BASE))
    most = min(recipe["batch_size"], 4096 if train.in_workers else 256)
    for key in ("epochs", "lr", "weight_decay"):
        if getattr(args, key) is not None:
            recipe[key] = getattr(args, key)
    central = train                     # the test crops of the training images
    if args.protocol == "cpc":
        encoder = PatchGrid(encoder, patch_flags(args, checkpoint)).eval()
        change = functools.partial(encoder, augment=True)
        crop = cpc_v2.RandomCrop(input["size"], encoder.flags["resize"], flip=0.5)
        central = with_crop(train, crop._replace(central=True, flip=0.0))
        val = with_crop(val, crop._replace(central=True, flip=0.0))
        make = functools.partial(patch_classifier, dim, classes)
    else:
        crop = common.Crop(1, input["size"], flip=0.5, interpolation=input["interpolation"])
        make = functools.partial(linear_layer, dim, classes, recipe.get("init", 0.0))

        def change(x):
            return encoder(common.normalize(x, input["mean"], input["std"]))

    recipe["batch_size"] = batch_size(args, train, most, least=2 if args.protocol == "cpc" else 1)
    before = copy.deepcopy(encoder.state_dict())
    settings = dict(features=args.features, protocol=args.protocol, sweep=args.sweep,
                    train=len(train), val=len(val))
    if args.sweep or not args.augment or args.protocol == "lbfgs":
        bank = compute(args, encoder, central, input, device)
    if args.protocol == "lbfgs":
        l2 = 1.0 if args.weight_decay is None else args.weight_decay
        settings["l2"] = choose_l2(bank, classes, args.seed) if args.sweep else l2
        weights = logistic_regression(bank.h, bank.labels, classes, settings["l2"])
        predict = functools.partial(scores, weights)
    else:
        if args.sweep:
            recipe["lr"] = choose_rate(args, recipe, bank, make, device)
        source = (train, make, crop, change) if args.augment else (bank, make)
        predict, = train_heads(args, device, recipe, [recipe["lr"]], *source)
        keys = ("epochs", "batch_size", "lr", "weight_decay")
        settings.update({key: recipe[key] for key in keys}, augment=args.augment)

    for key, value in encoder.state_dict().items():
        assert torch.equal(value, before[key]), "the frozen encoder changed"
    test = compute(args, encoder, val, input, device)
    chunks = test.h.split(max(1, 2 ** 25 // test.h[0].numel()))
    logits = torch.cat([predict(h.float()) for h in chunks])
    result = dict(top1=accuracy(logits, test.labels), top5=accuracy(logits, test.labels, 5))
    report(args, checkpoint, name, settings, result)
    if common.RANK == 0:
        figure = draw_confusion(logits.argmax(1), test.labels, class_names(train))
        figure.suptitle(f"{args.protocol}: top-1 {result['top1']:.1f} %")
        save(args, figure, "z-confusion.png" if args.features == "z" else "confusion.png")

def choose_rate(args, recipe, bank, make, device):
    rest, held = hold_out(bank, args.seed)
    rates = [recipe["lr"] * factor for factor in (0.1, 0.3, 1, 3, 10)]
    heads = train_heads(args, device, recipe, rates, rest, make)
    top1 = [accuracy(head(held.h.float()), held.labels) for head in heads]
    return choose("lr", dict(zip(rates, top1)), held)

def choose_l2(bank, classes, seed):
    rest, held = hold_out(bank, seed)
    shape = spectrum(rest.h)
    weights = None
    top1 = {}
    for l2 in np.logspace(3, -4, 15).tolist():          # each begins where the last one ended
        weights = logistic_regression(rest.h, rest.labels, classes, l2, weights, shape)
        top1[l2] = accuracy(scores(weights, held.h), held.labels)
    return choose("l2", top1, held)

def patch_flags(args, checkpoint):
    """The flags of a run of cpc_v2.py, among them those by which it cuts images into patches."""
    flags = checkpoint["args"]
    size = checkpoint["input"]["size"]
    if args.baseline == "pixels" or "patch_size" not in flags:
        given = "pixels" if args.baseline == "pixels" else checkpoint["method"]
        raise common.UserError(f"--protocol cpc: needs a checkpoint of cpc_v2.py, not {given}")
    if not flags["patch_size"] <= size <= flags["resize"]:
        raise common.UserError(f"--size {size}: not in {flags['patch_size']}..{flags['resize']}, "
                               "from the patches to the images of this checkpoint")
    return flags

def with_crop(data, crop):
    """A copy of `data` whose every crop is `crop`, for `common.features`."""
    copied = copy.copy(data)
    copied.crop = functools.partial(crop_as, data, crop)
    return copied

def crop_as(data, crop, indices, crops, *key):
    return data.crop(indices, [crop], *key)

def draw_confusion(predicted, truth, names):
    """Rows: the true class, columns: the predicted one, in percent of the row. Of more than 50
    classes those with the lowest accuracy."""
    table = torch.bincount((truth * len(names) + predicted).cpu(), minlength=len(names) ** 2)
    table = table.view(len(names), -1).float()
    table = 100 * table / table.sum(1, keepdim=True).clamp(min=1)
    shown = table.diagonal().argsort()[:50].sort().values
    names = [names[c] for c in shown]
    table = table[shown][:, shown].numpy()
    side = 3.5 + 0.2 * len(names)
    figure, ax = common.pyplot().subplots(figsize=(side + 1, side), layout="constrained")
    figure.colorbar(ax.imshow(table, cmap="Blues", vmin=0, vmax=100))
    for i, j in np.argwhere(table >= 0.5) if len(names) <= 20 else ():
        color = "white" if table[i, j] > 50 else "black"
        ax.text(j, i, f"{table[i, j]:.0f}", ha="center", va="center", fontsize=7, color=color)
    ax.set_xticks(range(len(names)), names, rotation=90)
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel="predicted class", ylabel="true class", title="percent of a class's images")
    return figure

# ============================================================================== finetune

def finetune(args, device):
    """the whole network trained on a few labels"""
    encoder, _, checkpoint, name, train, val = load(args, device)
    input = checkpoint["input"]
    if args.protocol == "cpc":
        patch_flags(args, checkpoint)
        input["size"] = args.size or min(224, input["size"])    # section 2.2; patches are of 260
    classes = len(class_names(train))
    balanced = args.subset == "balanced"
    chosen = [(label_subset(train.labels, amount, args.seed, balanced), amount)
              for amount in args.labels]
    chosen.sort(key=lambda pair: len(pair[0]))
    fewest = chosen[0][0]
    batch_size(args, fewest, len(fewest), least=2)      # raises UserError for one that does not fit
    rows = []
    for indices, amount in chosen:
        data = subset(train, indices)
        more = len(data) > 0.02 * len(train)
        row = dict(labels=amount, images=len(data))
        common.say(f"{len(data)} images, fine-tuned as in {args.protocol}")
        if args.protocol == "cpc":
            phases = with_flags(CPC_PHASES, args.epochs, args.lr)
            rest, held = hold_out(data, args.seed, min(10_000, max(1, len(data) // 5)))
            model = tune_cpc(args, phases, encoder, rest, held, classes, input, device)
        else:
            recipe, = with_flags([FINETUNE[args.protocol][more]], args.epochs, args.lr)
            model = tune(args, recipe, encoder, data, classes, input, device)
        row.update(measure(args, model, val, input))
        if args.baseline:
            recipe, = with_flags([FINETUNE["supervised"][more]], args.baseline_epochs)
            common.say(f"{len(data)} images, supervised from random initialisation")
            torch.manual_seed(args.seed)
            untrained = build(checkpoint["encoder_config"])
            untrained.to(device, memory_format=torch.channels_last)
            model = tune(args, recipe, untrained, data, classes, input, device)
            row.update(measure(args, model, val, input, "baseline_"))
        rows.append(row)
    if args.baseline:
        add_gains(rows)
    settings = dict(protocol=args.protocol, subset=args.subset, seed=args.seed)
    for key in ("epochs", "batch_size", "lr", "baseline_epochs"):
        if getattr(args, key):
            settings[key] = getattr(args, key)
    settings.update(train=len(train), val=len(val))
    report(args, checkpoint, name, settings, {}, rows)
    if common.RANK == 0:
        save(args, draw_label_efficiency(args, name, rows, len(train)), "labels.png")

def with_flags(recipes, epochs=None, lr=None):
    """The recipes with so many epochs, and rates in proportion to `lr`, which is the classifier's
    in the first; as they are where these are None."""
    factor = lr / recipes[0]["head_lr"] if lr else 1
    return [dict(recipe, epochs=epochs or recipe["epochs"], lr=recipe["lr"] * factor,
                 head_lr=recipe["head_lr"] * factor) for recipe in recipes]

def label_subset(labels, amount, seed, balanced):
    """Which training images keep their label, as sorted indices. The same seed gives the same ones
    everywhere, and a smaller fraction's images are among those of a larger one.

    labels (n,); `amount` a float in 0..1, a fraction, or a whole number of images of each class.
    `balanced`: as many of every class (SimCLR), otherwise drawn from all (CPC v2). Raises UserError
    for fewer images than classes, or more than there are."""
    classes = int(labels.max()) + 1
    each = isinstance(amount, int)
    number = amount * classes if each else round(amount * len(labels))
    if not classes <= number <= len(labels):
        least = f"fewer than the {classes} classes; at least {classes / len(labels):.3g}"
        limit = least if number < classes else "more than there are"
        raise common.UserError(f"--labels {amount}: {number} of {len(labels)} images, {limit}")
    parts = {(seed, 2): torch.arange(len(labels))}
    if balanced:
        parts = {(seed, 3, c): (labels == c).nonzero()[:, 0] for c in range(classes)}
    chosen = []
    for key, part in parts.items():
        keep = number
        if balanced:
            keep = amount if each else max(1, round(amount * len(part)))
        if keep > len(part):
            raise common.UserError(f"--labels {amount}: class {key[-1]} has {len(part)} images")
        order = np.random.default_rng(key).permutation(len(part))
        chosen.append(part[torch.from_numpy(order[:keep])])
    return torch.cat(chosen).sort().values

def measure(args, model, val, input, prefix=""):
    """The accuracies of a classifier on the test images."""
    logits, labels = common.features(model, val, input, args.workers, args.precision)
    top1 = accuracy(logits, labels)
    common.say(f"top-1 accuracy {top1:.2f} %")
    return {f"{prefix}top1": top1, f"{prefix}top5": accuracy(logits, labels, 5)}

def add_gains(rows):
    """Add to each row CPC v2's gain in data efficiency (its table 2): the largest measured number
    of labelled images with which the baseline is no better than ours here, divided by the number
    here; None where there is none. It is a lower bound only on the grid of the numbers that were
    measured, and for this one baseline, which is not tuned."""
    for row in rows:
        reached = [other["images"] for other in rows if other["baseline_top1"] <= row["top1"]]
        row["gain"] = max(reached) / row["images"] if reached else None
        if reached:
            common.say(f"{row['images']} labels: gain at least {row['gain']:.3g}, of the numbers "
                       f"measured; the untuned baseline is no better with {max(reached)}")
        else:
            common.say(f"{row['images']} labels: the baseline is better with every number measured")

def draw_label_efficiency(args, name, rows, n):
    """Accuracy against the percentage of the labels, as in CPC v2's figure 1."""
    figure, ax = common.pyplot().subplots(figsize=(5.5, 4), layout="constrained")
    x = [100 * row["images"] / n for row in rows]
    ax.semilogx(x, [row["top1"] for row in rows], "o-", label=f"fine-tuned ({args.protocol})")
    if args.baseline:
        ax.semilogx(x, [row["baseline_top1"] for row in rows], "s--", label="supervised, untuned")
        gains = [f"{row['gain']:.3g} at {percent:.3g} %" for percent, row in zip(x, rows)
                 if row["gain"] and row["gain"] > 1]
        ax.set_title(f"gain, at least: {', '.join(gains)}" if gains else "", fontsize=9)
    ax.set_xticks(x, [f"{percent:.3g} %" for percent in x])
    ax.minorticks_off()
    ax.set(xlabel="labelled images", ylabel=f"top-1 accuracy on {Path(name).name}, %",
           ylim=(0, 1.05 * ax.dataLim.ymax))
    ax.grid(alpha=0.3)
    ax.legend()
    return figure

# ============================================================================== detect

def detect(args, device):
    """Faster R-CNN"""
    encoder, _, checkpoint = load_encoder(args, device)         # trained in place
    if args.data:
        train = detection.voc_scenes(args.data, args.train_set)
        test = detection.voc_scenes(args.data, args.test_set, train.classes, years=(2007,))
        years = {Path(path).parts[-3] for path in train.paths}
        name = "voc07+12" if "VOC2012" in years else "voc07"
    else:
        train = detection.drawn_scenes(1000, 11)
        test = detection.drawn_scenes(300, 12)
        name = "shapes"
    keys = ("steps", "batch_size", "lr", "rois", "color_drop")
    flags = {key: getattr(args, key) for key in keys}
    recipe = detection.make_recipe(name, args.image_size, **flags)
    folder = output_folder(args, "-".join(filter(None, ["detect", name, args.baseline])))
    model = detection.train_detector(
        encoder, train, recipe, checkpoint["input"], folder / "detect.pt", device, args.seed,
        args.precision, args.workers, args.save_every)
    found = detection.find_all(model, test, args.workers)
    rows = detection.voc_rows(found, test)
    means = {key: float(np.mean([row[key] for row in rows])) for key in rows[0] if key != "class"}
    settings = dict({key: recipe[key] for key in keys}, size=recipe["sizes"][-1], seed=args.seed,
                    train=len(train), test=len(test))
    report(args, checkpoint, name, settings, means, rows)
    if common.RANK == 0:
        detection.draw_detections(test, found, folder / "detections.png")
        common.say(f"picture: {folder / 'detections.png'}")

# ============================================================================== neighbours

def neighbours(args, device):
    """pictures: nearest neighbours beside those of the pixels, and a map of the features"""
    encoder, _, checkpoint, name, train, val = load(args, device)
    if len(val) < 3:
        raise common.UserError(f"--data {name}: fewer than three test images")
    input = checkpoint["input"]
    small = dict(input, size=min(32, input["size"]))
    by_encoder = [compute(args, encoder, data, input, device) for data in (train, val)]
    by_pixels = [compute(args, nn.Flatten(), data, small, device) for data in (train, val)]
    spaces = {"nearest by the encoder": by_encoder, "by the pixels": by_pixels}
    result = dict(images=len(train), test_images=len(val))
    for key, (bank, test) in dict(nearest_of_same_class=by_encoder, by_pixels=by_pixels).items():
        nearest = common.nearest(bank.h, test.h, 1)[1][:, 0]
        if len(class_names(train)) > 1:
            result[key] = 100 * (bank.labels[nearest] == test.labels).float().mean().item()
    report(args, checkpoint, name, dict(count=min(args.count, len(val))), result)
    common.seed_all(args.seed, 7)
    save(args, draw_neighbours(input, train, val, spaces, 8), "neighbours-and-pixels.png")
    save(args, draw_map(args, by_encoder[1], class_names(train), name), "map.png")

def draw_neighbours(input, train, val, spaces, columns):
    """A row for each of the first ten classes, or ten of a single one: a random test image and its
    nearest training images in each of `spaces`, {title: Features of both}; other classes in red."""
    classes = val.labels.unique()[:10]
    order = torch.randperm(len(val))
    queries = (order[:10] if len(classes) == 1 else
               torch.stack([order[val.labels[order] == c][0] for c in classes]))
    found = [common.nearest(bank.h, test.h[queries.to(test.h.device)], columns)[1].cpu()
             for bank, test in spaces.values()]                         # (Q, columns) each
    rows = []
    for i, query in enumerate(queries):
        row = [tiles(val, query[None], input, torch.tensor([False]))]
        for nearest in found:
            row.append(torch.ones_like(row[0]))                         # a gap
            wrong = train.labels[nearest[i]] != val.labels[query]
            row.append(tiles(train, nearest[i], input, wrong))
        rows.append(torch.cat(row))
    picture = torch.stack(rows)                                         # (Q, T, 3, S, S)
    height, width, _, side, _ = picture.shape
    picture = picture.permute(0, 3, 1, 4, 2).reshape(side * height, side * width, 3)
    figure, ax = common.pyplot().subplots(figsize=(0.6 * width + 0.8, 0.6 * height + 0.3),
                                          layout="constrained")
    ax.imshow(picture.numpy(), interpolation="nearest")
    names = class_names(train)
    ax.set_yticks([side * (i + 0.5) for i in range(height)], 
                  [names[c] for c in val.labels[queries]])
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    places = [0, *(side * (2 + i * (1 + found[i].shape[1])) for i in range(len(spaces)))]
    for place, title in zip(places, ["query", *spaces]):
        ax.text(place, -3, title)
    return figure

def tiles(data, indices, input, wrong):
    """The test crops of the images at `indices` (n,), of at most 64 pixels, framed in red where
    they are `wrong` (n,): (n, 3, S, S) in 0..1."""
    crop = common.CenterCrop(min(64, input["size"]), interpolation=input["interpolation"])
    (x,), _, _ = data.crop(indices, [crop], 0)
    x = x.cpu() / (255 if x.dtype == torch.uint8 else 1)
    border = max(1, crop.size // 16)
    x = F.pad(x, [border] * 4, value=1)
    x[wrong, 1:] *= F.pad(torch.ones(crop.size, crop.size), [border] * 4)       # white to red
    return F.pad(x, [1] * 4, value=1)                                           # space between

def draw_map(args, features, names, data):
    """`args.count` images in two dimensions, of at most 20 classes."""
    labels = features.labels.cpu()
    classes = labels.unique()[:20]
    order = torch.from_numpy(np.random.default_rng(args.seed).permutation(len(labels)))
    order = order[torch.isin(labels[order], classes)][:args.count]
    plane = tsne(F.normalize(features.h[order.to(features.h.device)].float(), dim=1)).cpu().numpy()
    figure, ax = common.pyplot().subplots(figsize=(6.4, 5.2), layout="constrained")
    labels = labels[order].numpy()
    for i, c in enumerate(classes.tolist()):
        x, y = plane[labels == c].T
        color = common.pyplot().get_cmap("tab10" if len(classes) <= 10 else "tab20")(i)
        ax.scatter(x, y, color=color, s=9, linewidths=0, label=names[c])
    ax.set(xticks=[], yticks=[], title=f"t-SNE of {len(plane)} test images of {Path(data).name}")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure

def tsne(x, neighbours=30, steps=300):
    """x (n, D) of unit length -> (n, 2): t-SNE (van der Maaten and Hinton 2008) from the first two
    principal components, in which the `neighbours` nearest of a point weigh the same. It goes
    through all pairs, which is for a few thousand points."""
    n = len(x)
    k = min(neighbours, n - 1)
    nearest = common.nearest(x, x, k + 1)[1][:, 1:]
    p = torch.zeros(n, n, device=x.device).scatter_(1, nearest, 1 / k)
    p = (p + p.T) / (2 * n)                             # sums to 1
    torch.manual_seed(0)
    y = (x - x.mean(0)) @ torch.pca_lowrank(x, 2)[2]
    y = (y / y.std().clamp(min=1e-6)).requires_grad_()
    optimizer = torch.optim.Adam([y], lr=2.0)
    for step in range(steps):
        attraction = 4 if step < steps // 4 else 1      # exaggerated at first
        length = y.square().sum(1)
        d = length[:, None] + length - 2 * y @ y.T      # squared distances
        loss = attraction * (p * d.log1p()).sum() + ((1 / (1 + d)).sum() - n).log()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return y.detach()

# ============================================================================== compare

# Flags on which the scale of a loss depends.
LOSS_SCALE = {"method", "batch_size", "size", "temperature", "base_temperature", "loss", "version",
              "positives", "queue_size", "negatives", "num_prototypes", "heads", "dense_weight",
              "mixture", "directions", "offsets", "patch_size", "stride", "gather", "symmetric",
              "margin", "semi_hard"}

def compare(args, device):
    """curves and figures of several runs"""
    runs = [read_run(path) for path in args.runs]
    data = runs[0]["data"]
    for run in runs:
        if run["data"] != data:
            raise common.UserError(f"runs of different data: {runs[0]['folder']} on {data}, "
                                   f"{run['folder']} on {run['data']}")
    every = [run["flags"] for run in runs]
    keys = sorted(set().union(*every) - common.Run.FREE - {"recipe"}, key=str)
    differ = [key for key in keys if any(flags.get(key) != every[0].get(key) for flags in every)]
    scales = ", ".join(key for key in differ if key in LOSS_SCALE)
    curves = {}
    rows = []
    for run in runs:
        shown = ["method"] if "method" in differ else differ
        label = ", ".join(f"{key.replace('_', ' ')} {run['flags'].get(key)}" for key in shown)
        if not label or label in curves or len(shown) > 5:
            label = str(run["folder"])
        curves[label] = run["log"]
        if scales:
            curves[label] = [{k: v for k, v in line.items() if k != "loss"} for line in run["log"]]
        rows.append(dict(run=label, **run["figures"]))
    title = textwrap.fill(f"losses differ in scale ({scales})", 40) if scales else "loss"
    picture = Path(args.output or runs[0]["folder"].parent / "compare.png")
    if picture.suffix != ".png":
        raise common.UserError(f"--output {picture}: not the name of a .png file")
    curves = {textwrap.fill(label, 40): log for label, log in curves.items()}
    common.draw_curves(curves, picture, title)
    common.say(f"picture: {picture}")
    print(f"{len(runs)} runs on {data}: kNN accuracy in percent, minutes of the steps by the clock")
    print_table(rows)
    print(json.dumps(dict(task="compare", data=data, picture=str(picture), rows=rows)), flush=True)

def read_run(path):
    """Folder, data, flags, log and figures of a run."""
    folder = Path(path).parent if Path(path).is_file() else Path(path)
    for file in (folder / "checkpoint.pt", folder / "log.jsonl"):
        if file.is_fifo():
            raise common.UserError(f"{file}: a pipe, not a file")
    checkpoint = common.read_checkpoint(folder / "checkpoint.pt")
    flags = dict(checkpoint["args"], method=checkpoint["method"])
    try:
        log = common.read_log(folder)
        rates = [line["images_per_second"] for line in log if "images_per_second" in line]
        knn = {line["step"]: line["knn"] for line in log if "knn" in line}
        if not rates:
            raise ValueError("no step")
        if not all(isinstance(value, (int, float)) for line in log for value in line.values()):
            raise ValueError("a value that is no number")
        figures = dict(epochs=log[-1]["epoch"], untrained=knn.pop(0, None),
                       pixels=log[0].get("knn_pixels"), knn=list(knn.values())[-1] if knn else None)
        images = log[-1]["step"] * flags["batch_size"]
        figures["minutes"] = round(images / float(np.median(rates)) / 60, 2)
    except (OSError, ValueError, TypeError, KeyError, ArithmeticError, RecursionError) as e:
        raise common.UserError(f"{folder / 'log.jsonl'}: no log of a run ({e})") from None
    data = f"{flags.get('data')} ({checkpoint.get('images')} images)"
    return dict(folder=folder, data=data, flags=flags, log=log, figures=figures)

# ============================================================================== results and flags

def report(args, checkpoint, data, settings, result, rows=()):
    """A table for people and one line of JSON for programs: `result`, and `rows` if there are
    several."""
    if common.RANK > 0:
        return
    result = rounded(result)
    rows = [rounded(row) for row in rows]
    subject = args.baseline if args.baseline in ("random", "pixels") else args.checkpoint
    shown = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in settings.items())
    print(f"{args.task} on {data}, {subject}: {shown}")
    means = [{"class": "mean", **result}] if rows and result else []
    print_table([*rows, *means] or [result])
    line = dict(task=args.task, data=data, checkpoint=str(args.checkpoint), baseline=args.baseline,
                **settings, **result)
    print(json.dumps(dict(line, rows=rows) if rows else line), flush=True)

def rounded(row):
    exact = ("labels", "l2")
    return {key: round(value, 2) if isinstance(value, float) and key not in exact else value
            for key, value in row.items()}

def print_table(rows):
    """Dicts of the same keys, the first column aligned left, the others right."""
    lines = [list(rows[0])]
    for row in rows:
        lines.append(["-" if value is None else str(value) for value in row.values()])
    widths = [max(map(len, column)) for column in zip(*lines)]
    for first, *others in lines:
        cells = [text.rjust(width) for text, width in zip(others, widths[1:])]
        print("  ".join([first.ljust(widths[0]), *cells]))

def output_folder(args, name="."):
    """`--output`, or the folder `name` beside the checkpoint."""
    path = Path(args.checkpoint)
    folder = Path(args.output or (path if path.is_dir() else path.parent) / name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise common.UserError(f"--output {folder}: a file, not a folder") from None
    except OSError as e:
        raise common.UserError(f"--output {folder}: {e.strerror}") from None
    return folder

def save(args, figure, name):
    """Save a picture and print its path."""
    prefix = f"{args.baseline}-" if args.baseline in ("random", "pixels") else ""
    path = output_folder(args) / f"{prefix}{name}"
    common.save_picture(figure, path)
    common.say(f"picture: {path}")

def labels_amount(text):
    """"0.1", "1.0": a fraction of the training images; "5": so many of every class."""
    if text.isdigit() and int(text):
        return int(text)
    if not re.fullmatch(r"0?\.\d*[1-9]\d*|1\.0*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a fraction in 0..1 nor a number of "
                                         "images of each class")
    return float(text)

TASKS = {task.__name__: task for task in (knn, linear, finetune, detect, neighbours, compare)}

def parse_args(argv=None):
    parser = common.LineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    tasks = parser.add_subparsers(dest="task", required=True, parser_class=common.LineParser,
                                  metavar="TASK")
    parsers = {name: tasks.add_parser(name, help=task.__doc__, description=task.__doc__,
                                      allow_abbrev=False) for name, task in TASKS.items()}

    def add(names, flag, **options):
        for name in names.split():
            parsers[name].add_argument(flag, **options)

    every = "knn linear finetune detect neighbours"
    labelled = "knn linear finetune neighbours"
    precision = common.Parser(__doc__, dict(shapes={}), []).get_default("precision")
    add(every, "checkpoint", metavar="CHECKPOINT",
        help="a run's folder, its checkpoint.pt, or a file of another project")
    add("compare", "runs", nargs="+", metavar="RUN", help="folders of two or more runs")
    add(labelled, "--data", type=common.data_name, metavar="NAME|DIR",
        help=f"{', '.join(common.DATA)}, or a directory; default: that of the training")
    add("detect", "--data", metavar="DIR",
        help="folder that holds VOCdevkit/VOC2007 and perhaps VOC2012; default: drawn scenes")
    add(labelled, "--root", help="folder of the named data sets; default: that of the training")
    add("knn linear neighbours", "--baseline", choices=["random", "pixels"],
        help="evaluate an untrained network, or the pixels, instead")
    add("finetune", "--baseline", choices=["supervised"],
        help="train from random initialisation as well, and report the gain: how many times the "
             "labels this baseline needs, at least, of the --labels given; it is not tuned")
    add("detect", "--baseline", choices=["random"], help="start from an untrained network")
    add(labelled, "--size", type=common.count, help="side of the images; default: as in training")
    add(every, "--padding", choices=["same"], help="for weights converted from TensorFlow or JAX")
    add(every, "--view", choices=list(cmc.VIEWS), help="colour space of a file of CMC")
    add(every, "--workers", type=common.worker_count, default=2,
        help="processes that read image files (default 2)")
    add(every, "--seed", type=common.whole, default=0,
        help="seed of all random numbers (default 0)")
    add(every, "--precision", choices=["bf16", "fp32"], default=precision,
        help=f"precision of the network (default {precision})")
    add(every, "--output", metavar="DIR", help="folder of the pictures; default: the checkpoint's")
    add("compare", "--output", metavar="PNG", help="default: compare.png beside the first run")
    add("knn linear", "--sweep", action="store_true",
        help="choose k and temperature, the rate or l2 on held-out training images")
    add("knn", "--k", type=common.count,
        help="neighbours that vote; default: 200, or half the images of a class")
    add("knn", "--temperature", type=common.positive, default=0.1,
        help="softmax temperature of the votes (default 0.1)")
    add("linear", "--protocol", choices=[*PROTOCOLS, "lbfgs"], default="simclr",
        help="method whose training is used (default simclr); lbfgs: logistic regression")
    add("linear", "--features", choices=["h", "z"], default="h",
        help="what the encoder gives, or z, what the projector makes of it (default h)")
    add("linear", "--weight-decay", type=common.not_negative,
        help="weight decay; for lbfgs l2 (default 1)")
    add("linear", "--no-augment", dest="augment", action="store_false",
        help="compute the features once, without random crops and flips")
    add("finetune", "--labels", type=labels_amount, nargs="+", default=[0.01, 0.1],
        help="fractions (0.01, 1.0), or whole numbers of images of each class (default 0.01 0.1)")
    add("finetune", "--subset", choices=["balanced", "random"], default="balanced",
        help="equally many images of each class (SimCLR), or drawn from all (CPC v2)")
    add("finetune", "--protocol", choices=["simclr", "byol", "swav", "cpc"], default="simclr",
        help="method whose training is used (default simclr)")
    add("finetune", "--baseline-epochs", type=common.count,
        help="passes over the data of the baseline; default: 180, above 2 %% of the labels 90")
    add("linear finetune", "--epochs", type=common.count,
        help="passes over the data; default: the protocol's")
    add("linear finetune detect", "--batch-size", type=common.count,
        help="images in a batch, over all processes; default: the protocol's, if there are enough")
    add("linear", "--lr", type=common.positive, help="learning rate per 256 images")
    add("finetune", "--lr", type=common.positive,
        help="learning rate of the classifier per 256 images; the encoder's goes in proportion")
    add("detect", "--lr", type=common.positive, help="learning rate for the whole batch")
    add("detect", "--train-set", default="trainval",
        help="file of ImageSets/Main that lists the training images (default trainval)")
    add("detect", "--test-set", default="test",
        help="file of VOC2007's ImageSets/Main that lists the test images (default test)")
    add("detect", "--steps", type=common.count,
        help="training steps; default: 24000, without VOC2012 9000, on drawn scenes 150")
    add("detect", "--image-size", type=common.count,
        help="shorter side in the test (default 800); anchors and proposals go in proportion")
    add("detect", "--rois", type=common.count,
        help="boxes of an image that the box head learns from (default 512)")
    add("detect", "--color-drop", type=common.fraction,
        help="probability that an image keeps one channel alone (CPC v2; default 0)")
    add("detect", "--save-every", type=common.count, default=100,
        help="steps between checkpoints (default 100)")
    add("neighbours", "--count", type=common.number(int, 10, 2 ** 31 - 1), default=1000,
        help="test images in the map (default 1000)")
    parser.set_defaults(baseline=None, size=None)
    args = parser.parse_args(argv)
    if args.task in ("neighbours", "compare") and common.WORLD_SIZE > 1:
        parser.error(f"{args.task} runs in one process")
    if args.task == "linear" and args.features == "z" and args.baseline:
        parser.error(f"--features z: of a trained network alone, not of --baseline {args.baseline}")
    if args.task == "detect" and args.data == "":
        parser.error("--data '': not the name of a folder that holds VOCdevkit")
    if args.task == "compare" and len(args.runs) < 2:
        parser.error("compare needs two runs or more")
    return args

def main(args, device):
    TASKS[args.task](args, device)

if __name__ == "__main__":
    common.launch(main, parse_args, resumes=sys.argv[1:2] == ["detect"])
