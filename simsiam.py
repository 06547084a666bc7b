"""SimSiam: Exploring Simple Siamese Representation Learning. Chen, He, CVPR 2021, arXiv 2011.10566.

Idea. Augment every image twice. From the one view a small predictor guesses what the network makes of the other, and the gradient flows through
the guess alone. There are no negatives, no large batch and no second network; what keeps all images from becoming the same point is that the
gradient stops at what is to be guessed.

Objective (equations 1 to 4, Algorithm 1), in both orders, a mean over the images:

    L = D(p1, stopgrad(z2)) / 2 + D(p2, stopgrad(z1)) / 2,      D(p, z) = -p . z / (|p| |z|)

Notation. N images in the batch of one process.
    x1, x2       x1, x2                (N, 3, S, S)   the two views
    f            encoder, projector    (N, d)         in the paper one network, whose output is z; h below is ours
    -            h                     (N, D)         the representation, what is kept
    h            predictor, p          (N, d)         the paper's h is the predictor

Start value 0; the loss falls towards -1. It says nothing about the quality: -1 is also what a collapsed network reaches. Watch `z_std`, about 1 in
health and 0 after a collapse.

Published: ImageNet, ResNet-50: linear probe 68.1 % after 100 epochs, 71.3 % after 800 (batch 256, table 4; 68.1 % with 512 as well, table 2).
CIFAR-10, ResNet-18: 91.8 % (appendix D).
Ours: embedded shapes, `python simsiam.py` with seeds 0, 1, 2, 2026-11-21: kNN 62.4, 61.3, 64.6 % (untrained 21.9, 23.6, 28.2 %,
pixels 37.0 %). CIFAR-10: see the README. ImageNet: not run yet.

Differs from the paper:
    - The order of the colour operations is drawn for every 64 images instead of for each. The cosine falls in every step, not once an epoch.
    - The projector's hidden layers are as wide as h, as in the official code; the paper says 2048, the same for ResNet-50.
    - The recipe for the embedded `shapes` is ours: a narrow network, small batches, few epochs, and LARS instead of SGD.

Usage:
    python simsiam.py                                                             a few minutes on two CPU cores
    torchrun --nproc_per_node=8 simsiam.py --data /path/to/imagenet               ResNet-50 on 8 GPUs
"""
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import common

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

IMAGENET = dict(
    arch="resnet50", stem="imagenet", size=224,
    epochs=100, batch_size=512,      # section 3, Baseline settings
    lr=0.05, optimizer="sgd",        # section 3: 0.05 * batch / 256, momentum 0.9
    weight_decay=1e-4,               # section 3; on everything: appendix A
    warmup_epochs=0,                 # section 4.3: 10 from batches of 1024
    layers=3, dim=2048, hidden=512,  # section 3: projector, its width, the predictor's bottleneck
    color_strength=1.0, blur=0.5,    # appendix A, as MoCo v2
    min_scale=0.2,
    knn_every=0,
)
SMALL = dict(IMAGENET,               # appendix D, CIFAR-10
    arch="resnet18", stem="small", size=32,
    epochs=800, lr=0.03, weight_decay=5e-4,
    layers=2, blur=0.0,
    knn_every=10,
)
SHAPES = dict(SMALL,                 # our own, for a few minutes on two CPU cores
    arch="resnet10x0.25",
    epochs=26, batch_size=64, lr=12.0, optimizer="lars", weight_decay=1e-6, warmup_epochs=0.5,
    dim=512, hidden=128,
    color_strength=2.0,              # one tint an image, which is what the jitter erases
    min_scale=0.4,                   # smaller crops often miss the object
    knn_every=5,
)
RECIPES = dict(shapes=SHAPES, small=SMALL, imagenet=IMAGENET)


# ------------------------------------------------------------------------------------------------ augmentation (appendix A)

@common.by_pieces
def augment(x, strength, blur):
    """Crops (N, 3, S, S) in 0..1, half of them mirrored -> views of the same form, each with its own draws, normalised."""
    x = common.color_jitter(x, 0.4 * strength, 0.4 * strength, 0.4 * strength, 0.1 * strength, p=0.8)
    x = common.grayscale(x, p=0.2)
    if blur:
        x = common.gaussian_blur(x, p=blur, sigma=(0.1, 2.0))
    return common.normalize(x, MEAN, STD)


# ------------------------------------------------------------------------------------------------ model (figure 1, section 3)

class SimSiam(nn.Module):
    def __init__(self, arch, stem, layers, dim, hidden, with_predictor=True):
        super().__init__()
        self.encoder = common.resnet(arch, stem=stem, zero_init=True)
        self.projector = projector(self.encoder.dim, layers, dim)
        self.predictor = predictor(dim, hidden) if with_predictor else nn.Identity()

    def forward(self, x1, x2):
        z1, z2 = self.projector(self.encoder(x1)), self.projector(self.encoder(x2))       # (N, d), each with the BN statistics of its own view
        return self.predictor(z1), self.predictor(z2), z1, z2                             # (N, d)


def projector(dim_in, layers, dim):
    """The projection MLP: BN after every layer, ReLU after all but the last, whose BN has no scale and offset."""
    hidden = [m for _ in range(layers - 1) for m in (nn.Linear(dim_in, dim_in, bias=False), nn.BatchNorm1d(dim_in), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(dim_in, dim, bias=False), nn.BatchNorm1d(dim, affine=False))


def predictor(dim, hidden):
    """The prediction MLP, a bottleneck; no BN and no ReLU at its output."""
    return nn.Sequential(nn.Linear(dim, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, dim))


# ------------------------------------------------------------------------------------------------ loss (equations 1 and 3)

def negative_cosine(p, z, stop_gradient=True):
    """D(p, z) averaged over the images, a scalar in -1..1 (equation 1). No gradient flows into z (equation 3).

    p, z (N, d): any scale, any float type; at least float32 is computed in. A mean over images, so that DDP's mean of the gradients is exact.
    """
    p, z = (v.to(torch.promote_types(v.dtype, torch.float32)) for v in (p, z.detach() if stop_gradient else z))
    return -(F.normalize(p, dim=1) * F.normalize(z, dim=1)).sum(1).mean()


# ------------------------------------------------------------------------------------------------ training (Algorithm 1)

def train(args, device):
    data = common.load_data(args.data, args.root, "pretrain", device)
    batches = common.Batches(data, [common.Crop(2, args.size, (args.min_scale, 1.0), flip=0.5)], args.batch_size, args.seed)

    torch.manual_seed(args.seed)
    model = SimSiam(args.arch, args.stem, args.layers, args.dim, args.hidden, args.with_predictor).to(device, memory_format=torch.channels_last)
    groups = [dict(params=[*model.encoder.parameters(), *model.projector.parameters()]), dict(params=list(model.predictor.parameters()))]
    groups = [group for group in groups if group["params"]]
    if args.optimizer == "lars":
        optimizer = common.LARS(groups, lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
    else:
        optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
    run = common.Run("simsiam", args, model, optimizer, batches, MEAN, STD)

    network = model
    if common.world_size() > 1:
        if device.type == "cuda":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)       # section 3: BN is synchronised
        else:
            common.say("BatchNorm takes its statistics in each process alone: torch has no SyncBatchNorm for CPUs")
        network = DistributedDataParallel(network)
    if args.compile:
        network = torch.compile(network)

    peak_lr = args.lr * args.batch_size / 256
    warmup, total = args.warmup_epochs * len(batches), args.epochs * len(batches)

    for step, (x1, x2), indices in run:
        if step < warmup:
            lr = peak_lr * min(1, (step + 1) / warmup)
        else:
            lr = peak_lr * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
        optimizer.param_groups[0]["lr"] = lr
        if args.with_predictor:
            optimizer.param_groups[1]["lr"] = peak_lr                        # the predictor's rate does not fall: section 4.2

        x1, x2 = augment(x1, args.color_strength, args.blur), augment(x2, args.color_strength, args.blur)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            p1, p2, z1, z2 = network(x1, x2)                                 # (N, d) each
        loss = negative_cosine(p1, z2, args.stop_gradient) / 2 + negative_cosine(p2, z1, args.stop_gradient) / 2

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss, lr, z1, [x1, x2])


# ------------------------------------------------------------------------------------------------ flags

def parse_args(argv=None):
    parser = common.Parser(__doc__, RECIPES, argv)
    parser.add_argument("--optimizer", choices=["sgd", "lars"], help="the paper's is sgd")
    parser.add_argument("--layers", type=common.count, help="of the projector")
    parser.add_argument("--dim", type=common.count, help="width of the projection")
    parser.add_argument("--hidden", type=common.count, help="width of the predictor's bottleneck")
    parser.add_argument("--color-strength", type=common.not_negative, help="of the colour jitter, times (0.4, 0.4, 0.4, 0.1)")
    parser.add_argument("--blur", type=common.share, help="probability of the Gaussian blur")
    parser.add_argument("--min-scale", type=common.share, help="smallest share of the image's area that a crop has")
    parser.add_argument("--no-stop-gradient", dest="stop_gradient", action="store_false", help="let the gradient into z: collapses, section 4.1")
    parser.add_argument("--no-predictor", dest="with_predictor", action="store_false", help="compare z itself: collapses, section 4.2")
    return parser.parse()


if __name__ == "__main__":
    common.launch(train, parse_args())
