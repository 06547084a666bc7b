"""Two further measurements of SimCLR's paper (arXiv 2002.05709) on a trained encoder.

    python transfer.py CHECKPOINT --datasets dtd pets DIR       appendix B.8
    python transfer.py CHECKPOINT --invariance                  table 3

--datasets: how well the images of other data sets are classified from the features of their central
square (bicubic, without augmentation) by logistic regression at its optimum, one for each label
where an image has several (voc2007). l2 is the best of 45 values on validation images, with which
the classifier is trained again on training and validation images. The names are in DATASETS. A
directory has train/<class>, val/<class> and perhaps test/<class>; without test/, val/ is the test,
and a part of train/ is held out for validation.

--invariance: which transformations of an image can be told from h and, after the projector, from
g(h). Published, for a ResNet-50 and g(h) of 2048 dimensions:
                                chance      h    g(h)
    colour or grey                80.0   99.3    97.4
    rotation                      25.0   67.6    25.6
    original or corrupted         50.0   99.5    59.6       by Gaussian noise
    original or Sobel             50.0   96.6    56.3
For each of the last three rows the paper's network was pre-trained with that transformation as one
more augmentation, which g learned to ignore, as in `experiments.py simclr-table3`. After a default
run of simclr.py, which has none of them, g(h) tells more.

Differs from the paper, or is open there: a hidden layer of 512 units, noise of standard deviation
0.1, and when to stop. The classifiers begin at chance and stop at the lowest loss on held-out
training images. Trained to the end they learn 1500 images by heart and fall below chance where
nothing can be told: to 75 % in the first row, of a small run.
"""
import argparse
import copy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import cmc
import common
import detection
import evaluate
import simclr
from classifiers import read_projector

# B.8: torchvision's class, or None; the parts for training, validation and test; how many training
# images are for validation if there is no such part; the metric.
OFFICIAL = ("train", "val", "test")
DATASETS = {
    "food101": ("Food101", ("train", None, "test"), 7575, "top1"),
    "cifar10": (None, None, 5000, "top1"),
    "cifar100": (None, None, 5067, "top1"),
    "birdsnap": (None, OFFICIAL, None, "top1"),
    "sun397": (None, ("Training_01", None, "Testing_01"), 3970, "top1"),
    "cars": ("StanfordCars", ("train", None, "test"), 1650, "top1"),
    "aircraft": ("FGVCAircraft", OFFICIAL, None, "mean_per_class"),
    "voc2007": (None, OFFICIAL, None, "map_11_point"),
    "dtd": ("DTD", OFFICIAL, None, "top1"),
    "pets": ("OxfordIIITPet", ("trainval", None, "test"), 740, "mean_per_class"),
    "caltech101": (None, ("train", None, "test"), 510, "mean_per_class"),
    "flowers": ("Flowers102", OFFICIAL, None, "mean_per_class"),
}
FOLDERS = {"sun397": "SUN397", "caltech101": "caltech101/101_ObjectCategories"}
L2 = np.logspace(5, -6, 45)         # the strongest first, where a fit takes the fewest steps

# ============================================================================== data sets

def load_parts(name, args, device):
    """(train, val, test, metric): data sets with labels (n,), or (n, C) for voc2007."""
    root = Path(args.root or "data")
    parts = OFFICIAL if Path(name, "test").is_dir() else ("train", None, "val")
    source, parts, count, metric = DATASETS.get(name, (None, parts, None, "top1"))
    val = None
    if name in common.DATA:
        train = common.load_data(name, str(root), "train", device)
        test = common.load_data(name, str(root), "val", device)
    elif name == "voc2007":
        train, val, test = load_voc(root, parts)
    else:
        lists = [part and list_images(name, source, root, part, args.seed) for part in parts]
        train, val, test = as_folders(name, lists)
    if len(train) < 2:
        raise common.UserError(f"--datasets {name}: fewer than two training images")
    if val is None:
        train, val = evaluate.hold_out(train, args.seed, count and min(count, len(train) // 4))
    return train, val, test, metric

def list_images(name, source, root, part, seed):
    """[(path, class)] of one part of a data set. Raises UserError where there are no images."""
    top = root / FOLDERS.get(name, name) if name in DATASETS else Path(name)
    try:
        if source:
            return list_torchvision(name, source, root, part)
        if name == "sun397":                    # the first of its partitions: /a/abbey/sun_x.jpg
            lines = (top / f"{part}.txt").read_text().split()
            return [(f"{top}{line}", str(Path(line).parent)) for line in lines]
    except Exception as e:                      # torchvision raises many kinds
        raise common.UserError(f"--datasets {name}: could not be read from {root} or downloaded "
                               f"({common.first_line(e)})") from None
    folder = top if name == "caltech101" else top / part
    seen = set()
    images = [(path, label) for label in common.class_folders(folder)
              for path in common.image_files(folder / label, seen)]
    if not images:
        raise common.UserError(f"--datasets {name}: no images; expected them in {folder}/<class>")
    return caltech_part(images, part, seed) if name == "caltech101" else images

def list_torchvision(name, source, root, part):
    """As `list_images`. What is missing is downloaded, but for the Cars, whose address is gone."""
    make = getattr(torchvision.datasets, source)
    options = dict(split=part, download=name != "cars")
    if name != "pets":
        data = make(root, loader=str, **options)        # items have the path instead of the pixels
        return [data[i] for i in range(len(data))]
    make(root, **options)                               # takes no loader
    folder = root / "oxford-iiit-pet"
    rows = [line.split() for line in (folder / f"annotations/{part}.txt").open()]
    return [(folder / f"images/{row[0]}.jpg", int(row[1])) for row in rows]

def caltech_part(images, part, seed):
    """30 random images of every class for training, the others for the test."""
    images = [images[i] for i in np.random.default_rng([seed, 5]).permutation(len(images))]
    chosen = set()
    for label in {label for _, label in images}:
        chosen.update([image for image in images if image[1] == label][:30])
    return sorted(image for image in images if (image in chosen) == (part == "train"))

def as_folders(name, lists):
    """Lists of (path, class), or None, as data sets with the classes of the first."""
    number = {label: i for i, label in enumerate(sorted({label for _, label in lists[0]}))}
    folders = []
    for images in lists:
        unknown = {label for _, label in images or ()} - set(number)
        if unknown:
            raise common.UserError(f"--datasets {name}: classes without training images: "
                                   f"{', '.join(map(str, sorted(unknown)))}")
        folders.append(images and common.Folder([str(path) for path, _ in images],
                                                [number[label] for _, label in images]))
    return folders

def load_voc(root, parts):
    """The images of VOC2007 with labels (n, C), float64: 1 for a class that is there, 0 for one
    that is not, nan, which counts neither way, where all its objects are difficult."""
    scenes = [detection.voc_scenes(root, part, years=(2007,)) for part in parts]
    classes = sorted({name for part in scenes for name in part.classes})
    for part in scenes:
        column = torch.tensor([classes.index(name) for name in part.classes])
        part.images.labels = torch.zeros(len(part), len(classes), dtype=torch.float64)
        for row, labels, difficult in zip(part.images.labels, part.labels, part.difficult):
            row[column[labels[difficult]]] = torch.nan
            row[column[labels[~difficult]]] = 1
    return [part.images for part in scenes]

# ============================================================================== --datasets

def transfer(args, device):
    encoder, _, checkpoint = evaluate.load_encoder(args, device)
    input = dict(checkpoint["input"], fraction=1.0, interpolation="bicubic")
    sets = [load_parts(name, args, device) for name in args.datasets]   # mistakes before the work
    rows = []
    for name, (*parts, metric) in zip(args.datasets, sets):
        train, val, test = [common.features(encoder, part, input, args.workers, args.precision)
                            for part in parts]
        l2, weights, on_val = choose_l2(train, val, metric, L2)
        h = torch.cat([train[0], val[0]])
        labels = torch.cat([train[1], val[1]])
        weights = evaluate.logistic_regression(h, labels, len(weights), l2, weights)
        on_test = measure(metric, evaluate.scores(weights, test[0]), test[1])
        rows.append(dict(dataset=Path(name).name, train=len(train[0]), val=len(val[0]),
                         test=len(test[0]), l2=float(f"{l2:.3g}"), metric=metric,
                         val_figure=on_val, figure=on_test))
    names = ", ".join(row["dataset"] for row in rows)
    evaluate.report(args, checkpoint, names, dict(seed=args.seed), {}, rows)

def choose_l2(train, val, metric, values):
    """The best of `values` on `val`, its weights (C, D + 1) and its figure. train, val: features
    (n, D) and labels, as `logistic_regression` takes them. Each fit begins where the last one
    ended: 250 steps of either precision are enough to choose by."""
    h, labels = train
    classes = labels.shape[1] if labels.ndim == 2 else int(max(labels.max(), val[1].max())) + 1
    shape = evaluate.spectrum(h)
    weights = None
    best = (-1,)
    for l2 in map(float, values):
        weights = evaluate.logistic_regression(h, labels, classes, l2, weights, shape, 250)
        figure = measure(metric, evaluate.scores(weights, val[0]), val[1])
        if figure > best[0]:
            best = (figure, l2, weights)
    figure, l2, weights = best
    common.say(f"l2 {l2:.3g} chosen: {metric} {figure:.2f} on {len(val[0])} validation images")
    return l2, weights, figure

def measure(metric, logits, labels):
    """Percent. logits (n, C); labels (n,): "top1", or "mean_per_class", the mean of the classes'
    accuracies; labels (n, C) of 1, 0 and nan: "map_11_point", VOC2007's mean average precision of
    the classes that are there, where nan is left out."""
    if metric == "top1":
        return evaluate.accuracy(logits, labels)
    if metric == "mean_per_class":
        correct = (logits.argmax(1) == labels).double()
        of_class = [correct[labels == label].mean() for label in labels.unique()]
        return 100 * torch.stack(of_class).mean().item()
    precisions = []
    for score, truth in zip(logits.T.cpu().double().numpy(), labels.T.cpu().double().numpy()):
        truth = truth[np.argsort(-score, kind="stable")]
        truth = truth[~np.isnan(truth)]
        if truth.any():
            found = np.cumsum(truth)            # float64, in which 7 of 10 is a recall of 0.7
            precision = found / np.arange(1, len(truth) + 1)
            recall = found / found[-1]
            precisions.append(detection.voc_average_precision(recall, precision, True))
    return 100 * float(np.mean(precisions))

# ============================================================================== --invariance

SHARES = {                          # of the images in each class
    "colour or grey": (0.8, 0.2),
    "rotation": (0.25, 0.25, 0.25, 0.25),
    "original or corrupted": (0.5, 0.5),
    "original or Sobel": (0.5, 0.5),
}

def transform(task, x, y):
    """x (N, 3, S, S) in 0..1, each image transformed as its class y (N,) says."""
    if task == "rotation":
        return torch.stack([image.rot90(turns, (1, 2)) for image, turns in zip(x, y.tolist())])
    if task == "colour or grey":
        changed = common.grayscale(x.clone(), p=1)
    elif task == "original or corrupted":
        changed = simclr.noise(x.clone(), p=1, std=0.1)
    else:
        changed = simclr.sobel(x.clone(), p=1)
    return torch.where(y.view(-1, 1, 1, 1) == 1, changed, x)

def invariance(args, device):
    encoder, _, checkpoint, name, train, val = evaluate.load(args, device)
    projector = read_projector(args.checkpoint, checkpoint).to(device)
    rows = []
    for task, shares in SHARES.items():
        row = dict(task=task, chance=100 * max(shares))
        spaces = []
        for split, data in enumerate((train, val)):
            common.seed_all(args.seed, 4, len(rows), split)
            some = evaluate.subset(data, torch.randperm(len(data))[:args.count])
            y = draw_classes(shares, len(some)).to(device)
            h = transformed_features(args, encoder, some, task, y, checkpoint["input"], split)
            spaces.append({"h": (h, y), "g(h)": (projector(h), y)})
        for space, of_train in spaces[0].items():
            common.seed_all(args.seed, 5, len(rows))
            row[space] = probe(*of_train, *spaces[1][space], shares)
        common.say(f"{task}: chance {row['chance']:g} %, h {row['h']:.1f} %, g(h) "
                   f"{row['g(h)']:.1f} %")
        rows.append(row)
    common.say("In the paper each of the last three rows is of a network that was pre-trained with "
               "that transformation as well, and g(h) has 2048 dimensions: see transfer.py.")
    settings = dict(train=min(args.count, len(train)), test=min(args.count, len(val)),
                    seed=args.seed)
    evaluate.report(args, checkpoint, name, settings, {}, rows)

def draw_classes(shares, n):
    """(n,) classes in random order, each with its share to the nearest image, so that naming the
    most frequent one is right as often as `chance` says."""
    first = torch.tensor(shares).cumsum(0)[:-1] * n             # where the next class begins
    return torch.bucketize(torch.arange(n) + 0.5, first)[torch.randperm(n)]

@torch.no_grad()
def transformed_features(args, encoder, data, task, y, input, split):
    """h (n, D) of the test crops of `data`, transformed as y (n,) says."""
    crop = common.CenterCrop(input["size"], interpolation=input["interpolation"])
    in_order = common.InOrder(data, [crop], size=256)
    crops = common.stream(in_order, range(len(in_order)), args.workers, y.device)
    h = []
    for ((x,), _, broken), classes in zip(crops, y.split(256)):
        if data.in_workers:
            common.note_broken(data, broken)
        common.seed_all(args.seed, 6, split, len(h))            # other noise for every batch
        x = common.normalize(transform(task, x, classes), input["mean"], input["std"])
        with torch.autocast(y.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            h.append(encoder(x).float())
    return torch.cat(h)

def probe(h, y, test_h, test_y, shares, patience=20, most_epochs=200):
    """Train a small network on h (n, D) and y (n,), from the `shares` of the classes on, and return
    the percentage of test_h (m, D) whose class test_y (m,) it tells. A fifth of h is held out: the
    epoch of the lowest loss there counts, and training ends `patience` epochs later."""
    std, mean = torch.std_mean(h, 0)
    h = (h - mean) / (std + 1e-6)
    held_out = len(h) // 5                                      # they are in random order
    network = nn.Sequential(nn.Linear(h.shape[1], 512), nn.ReLU(), nn.Linear(512, len(shares)))
    nn.init.zeros_(network[2].weight)
    network[2].bias.data = torch.tensor(shares).log()
    network.to(h.device)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    lowest = torch.inf
    for epoch in range(most_epochs):
        with torch.no_grad():
            loss = F.cross_entropy(network(h[:held_out]), y[:held_out]).item()
        if loss < lowest:
            lowest = loss
            best_epoch = epoch
            best = copy.deepcopy(network.state_dict())
        if epoch == best_epoch + patience:
            break
        for batch in (held_out + torch.randperm(len(h) - held_out)).to(h.device).split(128):
            optimizer.zero_grad()
            F.cross_entropy(network(h[batch]), y[batch]).backward()
            optimizer.step()
    network.load_state_dict(best)
    with torch.no_grad():
        return evaluate.accuracy(network((test_h - mean) / (std + 1e-6)), test_y)

# ============================================================================== flags

def dataset_name(text):
    """A data set's name or a directory, for argparse."""
    if text not in DATASETS and text not in common.DATA and not (text and Path(text).is_dir()):
        known = ", ".join(dict.fromkeys([*DATASETS, *common.DATA]))
        raise argparse.ArgumentTypeError(f"{text[:200]!r} is neither {known} nor a directory")
    return text

def parse_args(argv=None):
    parser = common.LineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--datasets", nargs="+", type=dataset_name, metavar="NAME|DIR",
                      help=f"{', '.join(DATASETS)}, shapes, stl10, or directories")
    task.add_argument("--invariance", action="store_true", help="which transformations can be told")
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT",
        help="a run's folder, its checkpoint.pt, or, for --datasets, a file of another project")
    add("--root", help="folder that holds the named data sets")
    add("--data", type=common.data_name, metavar="NAME|DIR",
        help="for --invariance; default: what the checkpoint was trained on")
    add("--count", type=common.count, default=1500,
        help="for --invariance: images of train, and of val, that are used (default 1500)")
    add("--baseline", choices=["random", "pixels"],
        help="for --datasets: evaluate an untrained network, or the pixels, instead")
    add("--size", type=common.count,
        help="side of the images; default: as in training, 224 or 32 for other projects")
    add("--padding", choices=["same"], help="TensorFlow's, for weights converted from it")
    add("--view", choices=list(cmc.VIEWS), help="colour space of a file of CMC")
    add("--workers", type=common.worker_count, default=2,
        help="processes that read files (default 2)")
    add("--seed", type=common.whole, default=0, help="seed of all random numbers")
    precision = common.Parser(__doc__, simclr.RECIPES, []).get_default("precision")
    add("--precision", choices=["bf16", "fp32"], default=precision,
        help=f"precision of the network (default {precision})")
    args = parser.parse_args(argv)
    args.task = "invariance" if args.invariance else "transfer"
    if common.WORLD_SIZE > 1:
        parser.error("transfer.py runs in one process, without torchrun")
    if args.count < 10:
        parser.error(f"--count {args.count}: --invariance needs 10 images or more")
    if args.invariance and args.baseline or args.datasets and args.data:
        parser.error("--baseline goes with --datasets alone, and --data with --invariance")
    return args

def main(args, device):
    task = invariance if args.invariance else transfer
    task(args, device)

if __name__ == "__main__":
    common.launch(main, parse_args, resumes=False)
