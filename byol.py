"""BYOL: Bootstrap Your Own Latent, a New Approach to Self-Supervised Learning.
Grill et al., NeurIPS 2020, arXiv 2006.07733.

Idea. Two networks see two different augmentations of an image. The online network predicts what the
target network makes of the other view; the target is a slow average of the online network and gets
no gradient. There are no negatives. Each makes the other better: a slightly better target is a
better thing to predict.

Objective (equation 2), summed over the two orders, a mean over the images; q-, z- have unit length:
    L = |q-(z1) - z-'2|^2 + |q-(z2) - z-'1|^2  =  (2 - 2 cos(q(z1), z'2)) + (2 - 2 cos(q(z2), z'1))
and after every step of theta (equation 1):  xi <- tau xi + (1 - tau) theta.

Notation. N images in the global batch.
    v, v'        x1, x2                            (N, 3, S, S)   views, of distributions T and T'
    f_theta, y   encoder, h                        (N, D)         the representation, what is kept
    g_theta, z   projector, z                      (N, d)
    q_theta      predictor, p                      (N, d)         q is MoCo's query and SwAV's code
    f_xi, g_xi   target_encoder, target_projector  (N, d)
    tau          ema_momentum                                     tau is SimCLR's temperature
The loss starts at about 4; 0 is perfect prediction, which a collapsed network reaches as well.
Watch `z_std`, about 1 when healthy and 0 after a collapse.

Published: ImageNet, ResNet-50, batch 4096: linear 72.5 % after 300 epochs (appendix), 74.3 % after
1000 (table 1). Ours: RESULTS.md.

Differs from the paper: the target starts as a copy of the online network, there from new weights;
residual branches start at 0 as in the released code, there not. Contrast and saturation are
torchvision's, resizing is antialiased, the blur mirrors the border. The classifier that the
official code trains alongside is left out. Recipes for small images are ours.
Usage:  python byol.py    torchrun --nproc_per_node=8 byol.py --data /path/to/imagenet
"""
import copy
import math

import common  # before torch, since it handles signals from then on
import torch
import torch.nn.functional as F
from torch import nn

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

IMAGENET = dict(                        # section 3.3 and appendix F: 300 epochs
    arch="resnet50", stem="imagenet", size=224,
    epochs=300, batch_size=4096,
    lr=0.3, weight_decay=1e-6, ema_momentum=0.99,       # appendix F
    warmup_epochs=10,
    hidden=4096, dim=256,               # 3.3
    color_strength=1.0, grayscale=0.2,  # table 6
    additive=True,                      # brightness, as in the official code
    blur1=1.0, blur2=0.1, solarize2=0.2,                # table 6: T and T'
    min_scale=0.08,
    knn_every=0,
)
IMAGENET_100 = dict(IMAGENET, epochs=100, lr=0.45)      # official configs/byol.py
IMAGENET_1000 = dict(                                   # 3.3
    IMAGENET, epochs=1000, lr=0.2, weight_decay=1.5e-6, ema_momentum=0.996)
SMALL = dict(                           # ours
    IMAGENET, arch="resnet18", stem="small", size=32,
    epochs=1000, batch_size=256, lr=2.0,                # DeepMind's rate for Imagenette
    blur1=0.0, blur2=0.0,
    knn_every=10,
)
SHAPES = dict(                          # ours, for a few minutes on two CPU cores
    SMALL, arch="resnet10x0.25", size=24,
    epochs=8, batch_size=64, lr=6.0, weight_decay=1e-4, ema_momentum=0.5, warmup_epochs=0.5,
    hidden=512, dim=128,
    additive=False,                     # sums of that strength leave nothing of the drawings
    solarize2=0.0,
    min_scale=0.4,                      # smaller crops often miss the object
    knn_every=2,
)
RECIPES = {"shapes": SHAPES, "small": SMALL, "imagenet": IMAGENET, "imagenet-100": IMAGENET_100,
           "imagenet-1000": IMAGENET_1000}

# ------------------------------------------------------------------- augmentation (appendix B)

@common.in_chunks
def augment(x, strength, blur, solarize, grayscale=0.2, additive=True):
    """Crops (N, 3, S, S) in 0..1, half of them flipped -> views, normalised."""
    x = common.color_jitter(x, 0.4 * strength, 0.4 * strength, 0.2 * strength, 0.1 * strength,
                            additive=additive)
    x = common.grayscale(x, grayscale)
    if blur:
        tenth = 2 * (x.shape[-1] // 20) + 1                     # of the side: 23 at 224
        x = common.gaussian_blur(x, p=blur, sigma=(0.1, 2.0), kernel_size=tenth)
    if solarize:
        x = common.on_some(x, solarize, lambda x: torch.where(x < 0.5, x, 1 - x))
    return common.normalize(x, MEAN, STD)

# ------------------------------------------------------------------- model (figure 2, section 3)

class BYOL(nn.Module):
    def __init__(self, arch, stem, hidden, dim):
        super().__init__()
        self.encoder = common.resnet(arch, stem=stem, zero_init=True)
        self.projector = mlp(self.encoder.dim, hidden, dim)
        self.predictor = mlp(dim, hidden, dim)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)

    def forward(self, x1, x2):
        z1 = self.projector(self.encoder(x1))                   # (N, d), each view with its own
        z2 = self.projector(self.encoder(x2))                   # batch statistics
        with torch.no_grad():                                   # the target in training mode too
            target1 = self.target_projector(self.target_encoder(x1))
            target2 = self.target_projector(self.target_encoder(x2))
        return self.predictor(z1), self.predictor(z2), target1, target2, z1

    @torch.no_grad()
    def update_target(self, ema_momentum):
        """Equation 1, for parameters only: the target's BN statistics are its own."""
        xi = [*self.target_encoder.parameters(), *self.target_projector.parameters()]
        theta = [*self.encoder.parameters(), *self.projector.parameters()]
        torch._foreach_lerp_(xi, theta, 1 - ema_momentum)       # all parameters at once

def mlp(dim_in, hidden, dim):
    """Projector and predictor alike: linear, BN, ReLU, linear."""
    return nn.Sequential(nn.Linear(dim_in, hidden), nn.BatchNorm1d(hidden), nn.ReLU(),
                         nn.Linear(hidden, dim, bias=False))

# ------------------------------------------------------------------- loss (equation 2)

def regression_loss(p, z):
    """Equation 2, one order: 2 - 2 cos(p, z), in 0..4, averaged over the images. p, z (N, d),
    of any length; z should have no gradient."""
    return (2 - 2 * (F.normalize(p, dim=1) * F.normalize(z, dim=1)).sum(1)).mean()

# ------------------------------------------------------------------- training (Algorithm 1)

def learning_rate(step, warmup, total):
    """As a fraction of the peak: a linear warm-up, then a half cosine to 0."""
    if step < warmup:
        return step / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2

def target_momentum(step, total, base):
    """Section 3.3: from `base` to 1 by a half cosine; 0 stays 0, as in table 5a."""
    if base == 0:
        return 0
    return 1 - (1 - base) * (math.cos(math.pi * step / total) + 1) / 2

def train(args, device):
    data = common.load_data(args.data, args.root, "pretrain", device)
    crop = common.Crop(2, args.size, (args.min_scale, 1.0), flip=0.5, interpolation="bicubic")
    batches = common.Batches(data, [crop], args.batch_size, args.seed)

    torch.manual_seed(args.seed)
    model = BYOL(args.arch, args.stem, args.hidden, args.dim)
    model.to(device, memory_format=torch.channels_last)
    weights = [w for w in model.parameters() if w.requires_grad]
    optimizer = common.LARS(weights, args.lr, 0.9, args.weight_decay, lr_in_momentum=False)
    run = common.Run(args, model, optimizer, batches, MEAN, STD)

    network = model
    if common.WORLD_SIZE > 1 and device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)      # global batch statistics
    network = common.distribute(network, args.compile)                  # DDP

    peak_lr = args.lr * args.batch_size / 256
    warmup = args.warmup_epochs * len(batches)

    for step in range(run.step, run.total):
        x1, x2 = run.crops(step)
        lr = peak_lr * learning_rate(step, warmup, run.total)
        for group in optimizer.param_groups:
            group["lr"] = lr

        x1 = augment(x1, args.color_strength, args.blur1, 0, args.grayscale, args.additive)
        x2 = augment(x2, args.color_strength, args.blur2, args.solarize2, args.grayscale,
                     args.additive)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            outputs = network(x1, x2)                                   # (N / W, d) each
        p1, p2, target1, target2, z1 = [output.float() for output in outputs]
        loss = regression_loss(p1, target2) + regression_loss(p2, target1)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_target(target_momentum(step, run.total, args.ema_momentum))
        run.finish_step(loss, lr, z1, [x1, x2])

# ------------------------------------------------------------------- flags

def parse_args(argv=None):
    parser = common.Parser(__doc__, RECIPES, argv)
    add = parser.add_argument
    add("--ema-momentum", type=common.fraction,
        help="momentum of the target at the start; it rises to 1 on a cosine, but 0 stays")
    add("--hidden", type=common.count, help="hidden width of projector and predictor")
    add("--dim", type=common.count, help="dimension of the projection")
    add("--color-strength", type=common.not_negative, help="strength of the colour jitter")
    add("--grayscale", type=common.fraction, help="probability that a view loses its colours")
    add("--blur1", type=common.fraction, help="probability of the Gaussian blur in T")
    add("--blur2", type=common.fraction, help="probability of the Gaussian blur in T'")
    add("--solarize2", type=common.fraction, help="probability of solarisation in T'")
    add("--min-scale", type=common.fraction, help="smallest crop area as a fraction of the image")
    return parser.parse()

if __name__ == "__main__":
    common.launch(train, parse_args)
