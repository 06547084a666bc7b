"""BYOL: Bootstrap Your Own Latent. Grill et al., NeurIPS 2020, arXiv 2006.07733.

Idea. Two networks see two different augmentations of an image. The online network predicts what the target network makes of the other view; the
target is a slow average of the online network and gets no gradient. There are no negatives. Each makes the other better: a slightly better target
is a better thing to predict.

Objective (equation 2), summed over the two orders, a mean over the images:

    L = |q(z1)/|q(z1)| - z2'/|z2'||^2 + |q(z2)/|q(z2)| - z1'/|z1'||^2  =  (2 - 2 cos(q(z1), z2')) + (2 - 2 cos(q(z2), z1'))

and after every step of theta (equation 1):  xi <- tau xi + (1 - tau) theta.

Notation. N images in the batch of one process.
    v, v'        x1, x2                           (N, 3, S, S)   the views, from the distributions T and T'
    f_theta, y   encoder, h                       (N, D)         the representation, what is kept
    g_theta, z   projector, z                     (N, d)
    q_theta      predictor, p                     (N, d)         q is the query in MoCo and the code in SwAV
    f_xi, g_xi   target_encoder, target_projector, target (N, d)
    tau          ema_momentum                                    tau is the temperature in SimCLR

Start value about 4; 0 is perfect prediction and also what a collapsed network reaches. Watch `z_std`, about 1 in health and 0 after a collapse.

Published: ImageNet, ResNet-50, batch 4096: linear probe 72.5 % after 300 epochs (table 16), 74.3 % after 1000 (table 1).
Ours: embedded shapes, `python byol.py` with seeds 0, 1, 2, 2026-11-21: kNN 59.0, 64.8, 48.4 % (untrained 21.9, 23.6, 28.2 %,
pixels 37.0 %). CIFAR-10: see the README. ImageNet: not run yet.

Differs from the paper:
    - The target starts as a copy of the online network; the official code draws it anew and saw no difference.
    - Brightness is a factor, as in torchvision; the official code adds an offset. The order of the colour operations is drawn for every 64 images.
    - The classifier that the official code trains beside it is left out: evaluate.py trains one afterwards.
    - The recipes for small images are ours.

Usage:
    python byol.py                                                                a few minutes on two CPU cores
    torchrun --nproc_per_node=8 byol.py --data /path/to/imagenet                  ResNet-50 on 8 GPUs
"""
import copy, math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import common

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

IMAGENET = dict(                                     # section 3.3 and appendix F: 300 epochs
    arch="resnet50", stem="imagenet", size=224,
    epochs=300, batch_size=4096,
    lr=0.3, weight_decay=1e-6, ema_momentum=0.99,    # appendix F
    warmup_epochs=10,
    hidden=4096, dim=256,                            # 3.3
    color_strength=1.0,                              # table 6
    blur1=1.0, blur2=0.1, solarize2=0.2,             # table 6: T and T'
    min_scale=0.08,
    accumulate=1,
    knn_every=0,
)
IMAGENET_100 = dict(IMAGENET, epochs=100, lr=0.45, ema_momentum=0.99)                          # official configs/byol.py
IMAGENET_1000 = dict(IMAGENET, epochs=1000, lr=0.2, weight_decay=1.5e-6, ema_momentum=0.996)   # 3.3
SMALL = dict(IMAGENET,                               # solo-learn's for CIFAR-10, but for LARS: theirs trusts 0.02 and clips; the paper has none
    arch="resnet18", stem="small", size=32,
    epochs=1000, batch_size=256, lr=1.0, weight_decay=1e-5,
    blur1=0.0, blur2=0.0,
    knn_every=10,
)
SHAPES = dict(SMALL,                                 # our own, for a few minutes on two CPU cores
    arch="resnet10x0.25",
    epochs=20, batch_size=64, lr=12.0, weight_decay=1e-6, ema_momentum=0.97, warmup_epochs=0.5,
    hidden=512, dim=128,
    color_strength=2.0,                              # one tint an image, which is what the jitter erases
    solarize2=0.0,
    min_scale=0.4,                                   # smaller crops often miss the object
    knn_every=4,
)
RECIPES = {"shapes": SHAPES, "small": SMALL, "imagenet": IMAGENET,
           "imagenet-100": IMAGENET_100, "imagenet-300": IMAGENET, "imagenet-1000": IMAGENET_1000}


# ------------------------------------------------------------------------------------------------ augmentation (appendix B, table 6)

@common.by_pieces
def augment(x, strength, blur, solarize):
    """Crops (N, 3, S, S) in 0..1, half of them mirrored -> views of the same form, each with its own draws, normalised."""
    x = common.color_jitter(x, 0.4 * strength, 0.4 * strength, 0.2 * strength, 0.1 * strength, p=0.8)
    x = common.grayscale(x, p=0.2)
    if blur:
        x = common.gaussian_blur(x, p=blur, sigma=(0.1, 2.0), kernel_size=2 * (x.shape[-1] // 20) + 1)      # a tenth of the side: 23 at 224
    if solarize:
        x = common.solarize(x, p=solarize)
    return common.normalize(x, MEAN, STD)


# ------------------------------------------------------------------------------------------------ model (figure 2, sections 3.1 and 3.3)

class BYOL(nn.Module):
    def __init__(self, arch, stem, hidden, dim):
        super().__init__()
        self.encoder = common.resnet(arch, stem=stem)
        self.projector = mlp(self.encoder.dim, hidden, dim)
        self.predictor = mlp(dim, hidden, dim)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)

    def forward(self, x1, x2):
        z1, z2 = self.projector(self.encoder(x1)), self.projector(self.encoder(x2))       # (N, d), each with the BN statistics of its own view
        with torch.no_grad():                                                             # the target too is in training mode
            target1, target2 = self.target_projector(self.target_encoder(x1)), self.target_projector(self.target_encoder(x2))
        return self.predictor(z1), self.predictor(z2), target1, target2, z1               # (N, d)

    @torch.no_grad()
    def update_target(self, ema_momentum):
        """Equation 1, on parameters only: the target's BN statistics are its own."""
        for online, target in ((self.encoder, self.target_encoder), (self.projector, self.target_projector)):
            for theta, xi in zip(online.parameters(), target.parameters()):
                xi.lerp_(theta, 1 - ema_momentum)


def mlp(dim_in, hidden, dim):
    """Projector and predictor alike: linear, BN, ReLU, linear."""
    return nn.Sequential(nn.Linear(dim_in, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, dim, bias=False))


# ------------------------------------------------------------------------------------------------ loss (equation 2)

def regression_loss(p, z):
    """2 - 2 cos(p, z) averaged over the images, a scalar in 0..4; the caller adds the two orders and gives a z without gradient.

    p, z (N, d): any scale, any float type; at least float32 is computed in. A mean over images, so that DDP's mean of the gradients is exact.
    """
    p, z = (v.to(torch.promote_types(v.dtype, torch.float32)) for v in (p, z))
    return (2 - 2 * (F.normalize(p, dim=1) * F.normalize(z, dim=1)).sum(1)).mean()


# ------------------------------------------------------------------------------------------------ training (appendix A, Algorithm 1)

def train(args, device):
    data = common.load_data(args.data, args.root, "pretrain", device)
    batches = common.Batches(data, [common.Crop(2, args.size, (args.min_scale, 1.0), flip=0.5, interpolation="bicubic")], args.batch_size, args.seed)

    mine = args.batch_size // common.world_size()
    if mine % args.accumulate or mine < 2 * args.accumulate:
        raise common.UserError(f"--accumulate {args.accumulate}: does not cut the {mine} images of a process into equal pieces of at least 2")

    torch.manual_seed(args.seed)
    model = BYOL(args.arch, args.stem, args.hidden, args.dim).to(device, memory_format=torch.channels_last)
    online = [w for w in model.parameters() if w.requires_grad]
    optimizer = common.LARS(online, lr=args.lr, momentum=0.9, weight_decay=args.weight_decay, lr_in_momentum=False)
    run = common.Run("byol", args, model, optimizer, batches, MEAN, STD)

    network = model
    if common.world_size() > 1:
        if device.type == "cuda":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)       # statistics of all processes, of the target as well, as in the official code
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
        for group in optimizer.param_groups:
            group["lr"] = lr
        ema_momentum = 1 - (1 - args.ema_momentum) * (math.cos(math.pi * step / total) + 1) / 2       # section 3.3

        x1, x2 = augment(x1, args.color_strength, args.blur1, 0), augment(x2, args.color_strength, args.blur2, args.solarize2)
        optimizer.zero_grad()
        loss = 0
        for v1, v2 in zip(x1.chunk(args.accumulate), x2.chunk(args.accumulate)):             # small batches: average gradients, then step once
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                p1, p2, target1, target2, z1 = network(v1, v2)               # (N, d) each
            part = (regression_loss(p1, target2) + regression_loss(p2, target1)) / args.accumulate
            part.backward()
            loss = loss + part.detach()
        optimizer.step()
        model.update_target(ema_momentum)
        run.log(loss, lr, z1, [x1, x2])


# ------------------------------------------------------------------------------------------------ flags

def parse_args(argv=None):
    parser = common.Parser(__doc__, RECIPES, argv)
    parser.add_argument("--ema-momentum", type=common.share, help="of the target at the start, tau; it rises to 1 on a cosine")
    parser.add_argument("--hidden", type=common.count, help="width of the hidden layer of projector and predictor")
    parser.add_argument("--dim", type=common.count, help="width of the projection")
    parser.add_argument("--accumulate", type=common.count, help="pass each batch through the networks in so many pieces, and step once")
    parser.add_argument("--color-strength", type=common.not_negative, help="of the colour jitter, times (0.4, 0.4, 0.2, 0.1)")
    parser.add_argument("--blur1", type=common.share, help="probability of the Gaussian blur in T")
    parser.add_argument("--blur2", type=common.share, help="probability of the Gaussian blur in T'")
    parser.add_argument("--solarize2", type=common.share, help="probability of solarisation in T'")
    parser.add_argument("--min-scale", type=common.share, help="smallest share of the image's area that a crop has")
    return parser.parse()


if __name__ == "__main__":
    common.launch(train, parse_args())
