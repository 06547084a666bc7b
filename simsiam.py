"""SimSiam: Exploring Simple Siamese Representation Learning.
Chen, He, CVPR 2021, arXiv 2011.10566.

Idea. Augment every image twice. From the one view a small predictor predicts what the network makes
of the other, and the gradient flows through the prediction alone. There are no negatives, no large
batch and no second network: what keeps all images from becoming the same point is that the gradient
stops at the target of the prediction.

Objective (equations 1 to 4, Algorithm 1), in both orders, a mean over the images:
    L = D(p1, stopgrad(z2)) / 2 + D(p2, stopgrad(z1)) / 2,      D(p, z) = -p . z / (|p| |z|)

Notation. N images in the global batch.
    x1, x2       x1, x2                (N, 3, S, S)   the two views
    f            encoder, projector    (N, d)         in the paper one network, whose output is z
    -            h                     (N, D)         the representation, what is kept
    h            predictor, p          (N, d)         the paper's h is the predictor
The loss starts near 0 and falls towards -1. It says nothing about the quality: a collapsed network
reaches -1 as well. Watch `z_std`, about 1 when healthy. After a collapse all images but one of a
batch of N coincide, since the last BN keeps the variance: 2 / sqrt(N), 0.25 at 64.

Published: ImageNet, ResNet-50: linear 68.1 % after 100 epochs, 71.3 % after 800 (tables 2 and 4);
CIFAR-10, ResNet-18: 91.8 % (appendix D). Ours: RESULTS.md.

Differs from the paper: the cosine falls in every step, not once an epoch. The projector's hidden
layers are as wide as h, as in the official code; the paper says 2048, the same for a ResNet-50.

Usage:  python simsiam.py    torchrun --nproc_per_node=8 simsiam.py --data /path/to/imagenet
"""
import copy
import math

import common  # before torch, since it handles signals from then on
import torch
import torch.nn.functional as F
from torch import nn

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

IMAGENET = dict(
    arch="resnet50", stem="imagenet", size=224,
    epochs=100, batch_size=512,         # section 3, Baseline settings
    lr=0.05, optimizer="sgd",           # section 3: 0.05 * batch / 256, momentum 0.9
    weight_decay=1e-4,                  # section 3; on everything: appendix A
    warmup_epochs=0,                    # section 4.3: 10 from batches of 1024 on
    layers=3, dim=2048,                 # section 3: of the projector
    predictor="trained", hidden=512,    # section 3: the predictor's bottleneck
    head_norm="default", alternate=1,   # table 3, section 5
    color_strength=1.0, blur=0.5,       # appendix A, as MoCo v2
    min_scale=0.2,
    knn_every=0,
)
SMALL = dict(                           # appendix D, CIFAR-10
    IMAGENET, arch="resnet18", stem="small", size=32,
    epochs=800, lr=0.03, weight_decay=5e-4, layers=2, blur=0.0,
    knn_every=10,
)
SHAPES = dict(                          # ours, for a few minutes on two CPU cores
    SMALL, arch="resnet10x0.25", size=24,
    epochs=14, batch_size=64, lr=12.0, optimizer="lars", weight_decay=1e-6, warmup_epochs=0.5,
    dim=512, hidden=128, predictor="decayed",              # the constant rate is too high here
    color_strength=2.0,                 # one tint per image, which is what the jitter removes
    min_scale=0.4,                      # smaller crops often miss the object
    knn_every=2,
)
RECIPES = dict(shapes=SHAPES, small=SMALL, imagenet=IMAGENET)

# ------------------------------------------------------------------- augmentation (appendix A)

@common.in_chunks
def augment(x, strength, blur):
    """Crops (N, 3, S, S) in 0..1, half of them flipped -> views, normalised."""
    x = common.color_jitter(x, 0.4 * strength, 0.4 * strength, 0.4 * strength, 0.1 * strength)
    x = common.grayscale(x, p=0.2)
    if blur:
        x = common.gaussian_blur(x, p=blur, sigma=(0.1, 2.0))
    return common.normalize(x, MEAN, STD)

# ------------------------------------------------------------------- model (figure 1, section 3)

class SimSiam(nn.Module):
    def __init__(self, arch, stem, layers, dim, hidden, kind, head_norm="default", alternate=1):
        super().__init__()
        self.encoder = common.resnet(arch, stem=stem, zero_init=True)
        self.projector = projector(self.encoder.dim, layers, dim, head_norm)
        self.predictor = nn.Identity() if kind == "none" else predictor(dim, hidden, head_norm)
        if kind == "fixed":
            self.predictor.requires_grad_(False)
        self.alternate = alternate
        if alternate > 1:
            self.targets = copy.deepcopy(nn.Sequential(self.encoder, self.projector))
            self.targets.requires_grad_(False)

    def forward(self, x1, x2):
        z1 = self.projector(self.encoder(x1))                   # (N, d), each view with its own
        z2 = self.projector(self.encoder(x2))                   # batch statistics
        p1 = self.predictor(z1)
        p2 = self.predictor(z2)
        if self.alternate > 1:
            return p1, p2, self.targets(x1), self.targets(x2)
        return p1, p2, z1, z2

    @torch.no_grad()
    def fix_targets(self, step):
        """Section 5: eta, here the targets, is computed by the weights of every `alternate`-th
        step. With 1 these are the present ones, and that is SimSiam."""
        if self.alternate > 1 and step % self.alternate == 0:
            present = nn.Sequential(self.encoder, self.projector)
            self.targets.load_state_dict(present.state_dict())

def projector(dim_in, layers, dim, head_norm="default"):
    """The projection MLP: BN after every layer, ReLU after all but the last, whose BN has no scale
    and offset. `head_norm`, table 3: "none" and "hidden" have no BN here."""
    hidden = []
    for _ in range(layers - 1):
        norm = nn.Identity() if head_norm == "none" else nn.BatchNorm1d(dim_in)
        hidden += [nn.Linear(dim_in, dim_in, bias=False), norm, nn.ReLU()]
    last = nn.Linear(dim_in, dim, bias=False)
    if head_norm in ("none", "hidden"):
        return nn.Sequential(*hidden, last)
    return nn.Sequential(*hidden, last, nn.BatchNorm1d(dim, affine=False))

def predictor(dim, hidden, head_norm="default"):
    """The prediction MLP, a bottleneck without BN and ReLU at its output; "all" has a BN there."""
    norm = nn.Identity() if head_norm == "none" else nn.BatchNorm1d(hidden)
    layers = [nn.Linear(dim, hidden, bias=False), norm, nn.ReLU(), nn.Linear(hidden, dim)]
    if head_norm == "all":
        layers.append(nn.BatchNorm1d(dim))
    return nn.Sequential(*layers)

# ------------------------------------------------------------------- loss (equations 1 and 3)

def negative_cosine(p, z, stop_gradient=True):
    """D(p, stopgrad(z)) averaged over the images, in -1..1. p, z (N, d), of any length."""
    if stop_gradient:
        z = z.detach()                                          # equation 3
    return -(F.normalize(p, dim=1) * F.normalize(z, dim=1)).sum(1).mean()

# ------------------------------------------------------------------- training (Algorithm 1)

def learning_rate(step, warmup, total):
    """As a fraction of the peak: a linear warm-up, then a half cosine to 0."""
    if step < warmup:
        return step / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2

def train(args, device):
    data = common.load_data(args.data, args.root, "pretrain", device)
    crop = common.Crop(2, args.size, (args.min_scale, 1.0), flip=0.5)
    batches = common.Batches(data, [crop], args.batch_size, args.seed)

    torch.manual_seed(args.seed)
    model = SimSiam(args.arch, args.stem, args.layers, args.dim, args.hidden, args.predictor,
                    args.head_norm, args.alternate)
    model.to(device, memory_format=torch.channels_last)
    groups = [dict(params=[*model.encoder.parameters(), *model.projector.parameters()]),
              dict(params=list(model.predictor.parameters()))]
    if args.optimizer == "lars":
        optimizer = common.LARS(groups, args.lr, 0.9, args.weight_decay)
    else:
        optimizer = torch.optim.SGD(groups, args.lr, 0.9, weight_decay=args.weight_decay)
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
        if args.predictor != "decayed":
            group["lr"] = peak_lr                                       # of the predictor: 4.2

        x = augment(torch.cat([x1, x2]), args.color_strength, args.blur)
        x1, x2 = x.chunk(2)
        model.fix_targets(step)                                         # section 5
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            outputs = network(x1, x2)                                   # (N / W, d) each
        p1, p2, z1, z2 = [output.float() for output in outputs]
        loss = negative_cosine(p1, z2, args.stop_gradient)
        if not args.asymmetric:
            loss = (loss + negative_cosine(p2, z1, args.stop_gradient)) / 2

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.finish_step(loss, lr, z1, [x1, x2])

# ------------------------------------------------------------------- flags

def parse_args(argv=None):
    parser = common.Parser(__doc__, RECIPES, argv)
    add = parser.add_argument
    add("--optimizer", choices=["sgd", "lars"], help="the paper's is sgd")
    add("--layers", type=common.number(int, 1, 100), help="number of layers of the projector")
    add("--dim", type=common.count, help="dimension of the projection")
    add("--hidden", type=common.count, help="width of the predictor's bottleneck")
    add("--color-strength", type=common.not_negative, help="strength of the colour jitter")
    add("--min-scale", type=common.fraction, help="smallest crop area as a fraction of the image")
    add("--no-stop-gradient", dest="stop_gradient", action="store_false",
        help="let the gradient flow into z, a collapse (section 4.1)")
    add("--predictor", choices=["trained", "decayed", "fixed", "none"],
        help="section 4.2; decayed: its learning rate decays too; none: z itself, a collapse")
    add("--head-norm", choices=["none", "hidden", "default", "all"],
        help="table 3, where heads have BN: nowhere, in hidden layers, the paper's, everywhere")
    add("--asymmetric", action="store_true", help="predict the second view alone (section 4.6)")
    add("--alternate", type=common.count, help="steps between updates of the targets (section 5)")
    args = parser.parse()
    if args.alternate > 1 and not args.stop_gradient:
        parser.error(f"--alternate {args.alternate}: targets of earlier weights have no gradient")
    return args

if __name__ == "__main__":
    common.launch(train, parse_args)
