"""Ask a trained encoder what it has learned.

    python evaluate.py knn CHECKPOINT                       nearest neighbours on the features, no training
    python evaluate.py linear CHECKPOINT                    a linear classifier on the frozen features
    python evaluate.py linear CHECKPOINT --protocol moco    ... as another paper trains it
    python evaluate.py linear CHECKPOINT --protocol cpc     ... on the patches of a checkpoint of cpc_v2.py
    python evaluate.py knn CHECKPOINT --baseline random     the same encoder untrained, ordinarily initialised; or pixels, no encoder at all

The data is the one that the checkpoint was trained on, or --data and --root. Everything is asked of h, the representation before the projector.
Prints a table and, as the last line of stdout, one line of JSON. `linear` works under torchrun as well.

Protocols of the linear probe: what the papers do differently is in PROTOCOLS, each row with its source. All train on random crops and flips and
test on the central crop; `--no-augment` computes the features once instead, much faster and a little worse. The cosine falls in every step, also where
the original does it once an epoch. Rates are per 256 images. In-memory data sets are too small for batches of 4096, so that without --batch-size
theirs is 256 at most, and the rate goes with it. CPC's encodes the patches of the pre-training, disturbed as there, and classifies by the mean of
the patches' logits; Adam's rate is constant, and the number of epochs is ours, since the paper does not give one.
"""
import copy, json, math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import common
import cpc_v2

PROTOCOLS = {         # lr: per 256 images; drops: the shares of the run after which the rate falls to a tenth (None: cosine to 0)
    "simclr": dict(epochs=90, batch_size=4096, lr=0.1, nesterov=True, weight_decay=0, drops=None, larc=False, init=0),          # SimCLR paper, B.6
    "moco": dict(epochs=100, batch_size=256, lr=30, nesterov=False, weight_decay=0, drops=(0.6, 0.8), larc=False, init=0.01),   # main_lincls.py
    "simsiam": dict(epochs=90, batch_size=4096, lr=0.1, nesterov=False, weight_decay=0, drops=None, larc=True, init=0.01),      # main_lincls.py
    "byol": dict(epochs=80, batch_size=1024, lr=0.2, nesterov=True, weight_decay=0, drops=None, larc=False, init=0),            # official code
    "swav": dict(epochs=100, batch_size=256, lr=0.3, nesterov=False, weight_decay=1e-6, drops=None, larc=False, init=0.01),     # eval_linear.py
    "cpc": dict(epochs=90, batch_size=512, lr=2.5e-4, weight_decay=0, adam=True),                # appendix B: 5e-4 = 2.5e-4 * 512 / 256
}


# ------------------------------------------------------------------------------------------------ what is asked

def load_encoder(args, device):
    """The encoder to ask, frozen: that of the checkpoint or a baseline. Returns (encoder, its width, the checkpoint)."""
    checkpoint = common.read_checkpoint(args.checkpoint)
    size = checkpoint["input"]["size"]
    if args.baseline == "pixels":
        return nn.Flatten(), 3 * size * size, checkpoint
    torch.manual_seed(args.seed)
    try:
        encoder = common.resnet(**checkpoint["encoder_config"])
        if args.baseline is None:
            encoder.load_state_dict(checkpoint["encoder"])
    except (TypeError, ValueError, RuntimeError) as e:
        raise common.UserError(f"{args.checkpoint}: its encoder does not fit {checkpoint['encoder_config']} ({str(e).splitlines()[0]})") from None
    encoder.to(device, memory_format=torch.channels_last).requires_grad_(False).eval()
    return encoder, encoder.dim, checkpoint


def load_splits(args, checkpoint, device):
    """(name, train, val), both labelled."""
    name, root = args.data or checkpoint["args"]["data"], args.root or checkpoint["args"]["root"]
    if name not in common.DATA and not Path(name).is_dir():
        raise common.UserError(f"--data {name}: neither {', '.join(common.DATA)} nor a directory")
    return name, common.load_data(name, root, "train", device), common.load_data(name, root, "val", device)


def accuracy(logits, labels, top):
    """Percent of rows whose label is among the `top` largest logits."""
    return 100 * (logits.topk(min(top, logits.shape[1]), 1).indices == labels[:, None]).any(1).float().mean().item()


# ------------------------------------------------------------------------------------------------ k nearest neighbours

def knn(args, device):
    encoder, _, checkpoint = load_encoder(args, device)
    name, train, val = load_splits(args, checkpoint, device)
    bank, labels = common.features(encoder, train, checkpoint["input"], args.workers, args.precision)
    h, truth = common.features(encoder, val, checkpoint["input"], args.workers, args.precision)
    top1 = common.knn_accuracy(bank, labels, h, truth, args.k, args.temperature)
    report(args, checkpoint, name, "knn", dict(k=args.k, temperature=args.temperature, train=len(train), val=len(val)), dict(top1=top1))
    if common.rank() == 0:
        draw_neighbours(args, checkpoint, train, val, bank, labels, h, truth)


def draw_neighbours(args, checkpoint, train, val, bank, labels, h, truth, columns=10):
    """A row for each of the first ten classes: a test image and its nearest training images, those of another class framed in red."""
    queries = torch.stack([(truth == c).nonzero()[0, 0] for c in truth.unique()[:10]])
    nearest = (F.normalize(h[queries], dim=1) @ F.normalize(bank, dim=1).T).topk(min(columns, len(bank)), 1).indices
    crop = [common.CenterCrop(checkpoint["input"]["size"], interpolation=checkpoint["input"]["interpolation"])]
    show = lambda data, i: data.crop(i.cpu(), crop, 0)[0][0].float().cpu() / (255 if data.in_workers else 1)
    plt = common.pyplot()
    figure, axes = plt.subplots(len(queries), 1 + nearest.shape[1], figsize=(0.6 * (1 + columns), 0.6 * len(queries) + 0.2), squeeze=False,
                                layout="constrained")
    for q, i, row in zip(queries, nearest, axes):
        for j, (image, ax) in enumerate(zip(torch.cat([show(val, q[None]), show(train, i)]), row)):
            ax.imshow(image.permute(1, 2, 0), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            wrong = j > 0 and labels[i[j - 1]] != truth[q]
            for side in ax.spines.values():
                side.set(visible=wrong, color="red", linewidth=2)
    axes[0, 0].set_title("query", fontsize=8)
    axes[0, 1].set_title("nearest", fontsize=8)
    save(args, figure, "neighbours.png")


# ------------------------------------------------------------------------------------------------ linear probe

def linear(args, device):
    protocol = dict(PROTOCOLS[args.protocol])
    for k in ("epochs", "batch_size", "lr", "weight_decay"):
        if getattr(args, k) is not None:
            protocol[k] = getattr(args, k)
    encoder, dim, checkpoint = load_encoder(args, device)
    patchwise = args.protocol == "cpc"
    if patchwise:
        encoder = PatchGrid(encoder, args, checkpoint)
    before = copy.deepcopy(encoder.state_dict())
    name, train, val = load_splits(args, checkpoint, device)
    if args.batch_size is None:
        protocol["batch_size"] = min(protocol["batch_size"], len(train), 4096 if train.in_workers else 256)
    crop = common.Crop(1, checkpoint["input"]["size"], (0.08, 1.0), flip=0.5, interpolation=checkpoint["input"]["interpolation"])
    if patchwise:
        crop = cpc_v2.RandomCrop(checkpoint["input"]["size"], checkpoint["args"]["resize"], flip=0.5)
    batches = common.Batches(train, [crop], protocol["batch_size"], args.seed)
    total = protocol["epochs"] * len(batches)

    torch.manual_seed(args.seed)
    if patchwise:
        head = patch_classifier(dim, int(train.labels.max()) + 1)
    else:
        head = nn.Linear(dim, int(train.labels.max()) + 1)
        nn.init.normal_(head.weight, std=protocol["init"])
        nn.init.zeros_(head.bias)
    network = head.to(device)
    if common.world_size() > 1:
        network = DistributedDataParallel(head)
    if patchwise:
        optimizer = torch.optim.Adam([w for w in head.parameters() if w.requires_grad], lr=protocol["lr"], weight_decay=protocol["weight_decay"])
    else:
        optimizer = torch.optim.SGD(head.parameters(), lr=protocol["lr"], momentum=0.9, nesterov=protocol["nesterov"],
                                    weight_decay=0 if protocol["larc"] else protocol["weight_decay"])

    if args.augment:
        ready = common.stream(batches, range(total), args.workers, device)
    else:
        bank, labels = common.features(encoder, train, checkpoint["input"], args.workers, args.precision)
    for step in range(total):
        if patchwise:
            fall = 1
        elif protocol["drops"] is None:
            fall = (1 + math.cos(math.pi * step / total)) / 2
        else:
            fall = 0.1 ** sum(step >= share * total for share in protocol["drops"])
        optimizer.param_groups[0]["lr"] = protocol["lr"] * protocol["batch_size"] / 256 * fall
        if args.augment:
            (x,), indices, broken = next(ready)
            common.note_broken(train, broken)
            common.seed_all(args.seed, step, common.rank(), 1)
            if patchwise:
                x = encoder.disturbed(x)
            else:
                x = common.normalize(x, checkpoint["input"]["mean"], checkpoint["input"]["std"])
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                h = encoder(x).float()
            y = train.labels[indices].to(device)
        else:
            indices = batches.indices(step).to(device)
            h, y = bank[indices], labels[indices]
        loss = F.cross_entropy(network(h), y)
        optimizer.zero_grad()
        loss.backward()
        if protocol.get("larc"):
            common.larc_(head.parameters(), weight_decay=protocol["weight_decay"])
        optimizer.step()
        if (step + 1) % max(1, total // 10) == 0:
            common.say(f"epoch {(step + 1) / len(batches):.1f}/{protocol['epochs']}  loss {loss.item():.4f}")

    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items()), "the frozen encoder moved"
    h, truth = common.features(encoder, val, checkpoint["input"], args.workers, args.precision)
    with torch.no_grad():
        logits = head.eval()(h)
    settings = dict(protocol, protocol=args.protocol, augment=args.augment, train=len(train), val=len(val))
    report(args, checkpoint, name, "linear", settings, dict(top1=accuracy(logits, truth, 1), top5=accuracy(logits, truth, 5)))
    if common.rank() == 0:
        draw_confusion(args, logits.argmax(1), truth)


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


# ------------------------------------------------------------------------------------------------ results and flags

def report(args, checkpoint, data, task, settings, result):
    """A table for people and one line of JSON for programs."""
    if common.rank() > 0:
        return
    asked = {"random": "untrained " + checkpoint["encoder_config"]["arch"], "pixels": "pixels", None: str(args.checkpoint)}[args.baseline]
    method = checkpoint["method"] if args.baseline is None else "-"
    result = {k: round(v, 2) for k, v in result.items()}
    print(f"{task} on {data}: " + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in settings.items()))
    widths = [max(len(asked), 7), max(len(method), 6)]
    print("  ".join([f"{'encoder':{widths[0]}}", f"{'method':{widths[1]}}", *(f"{k:>6}" for k in result)]))
    print("  ".join([f"{asked:{widths[0]}}", f"{method:{widths[1]}}", *(f"{v:6.2f}" for v in result.values())]))
    print(json.dumps(dict(task=task, data=data, checkpoint=str(args.checkpoint), baseline=args.baseline, **settings, **result)), flush=True)


def save(args, figure, name):
    folder = Path(args.output or Path(args.checkpoint).parent)
    prefix = f"{args.baseline}-" if args.baseline else ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise common.UserError(f"--output {folder}: {e}") from None
    common.save_picture(figure, folder / (prefix + name))


def parse_args(argv=None):
    parser = common.LineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    tasks = parser.add_subparsers(dest="task", required=True, parser_class=common.LineParser, metavar="TASK")
    for task, text in (("knn", "nearest neighbours"), ("linear", "linear classifier on frozen features")):
        add = tasks.add_parser(task, help=text, description=text, allow_abbrev=False).add_argument
        add("checkpoint", metavar="CHECKPOINT", help="checkpoint.pt of a run")
        add("--data", type=common.data_name, metavar="NAME|DIR", help="default: what the checkpoint was trained on")
        add("--root", help="where the named data sets lie; default: as in training")
        add("--baseline", choices=["random", "pixels"], help="ask an untrained encoder, or the pixels, instead")
        add("--workers", type=common.whole, default=2, help="processes that read image files (default 2)")
        add("--seed", type=common.seed, default=0, help="of the probe, the crops and the random baseline")
        add("--precision", choices=["bf16", "fp32"], default="fp32")
        add("--output", metavar="DIR", help="where the picture goes; default: beside the checkpoint")
        if task == "knn":
            add("--k", type=common.count, default=200, help="neighbours that vote (default 200)")
            add("--temperature", type=common.positive, default=0.1, help="of the votes (default 0.1)")
        else:
            add("--protocol", choices=list(PROTOCOLS), default="simclr", help="whose way of training the probe (default simclr)")
            add("--epochs", type=common.count)
            add("--batch-size", type=common.count)
            add("--lr", type=common.positive, help="per 256 images")
            add("--weight-decay", type=common.not_negative)
            add("--no-augment", dest="augment", action="store_false", help="compute the features once, without random crops and flips")
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = parse_args()
    common.launch(globals()[args.task], args, stoppable=False)
