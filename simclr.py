"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations.
Chen, Kornblith, Norouzi, Hinton, ICML 2020, arXiv 2002.05709.

Idea. Augment every image of a large batch twice. A network must recognise, among all other views of
the batch, the one of the same image. What the augmentation changes it learns to ignore; what is
left is what the image shows. The projector on top is thrown away: the representation is kept.

Objective (equation 1 and Algorithm 1), the mean of l over all 2N positive pairs, in both orders:
    l(i, j) = -log  exp(s(i, j) / tau) / sum over k != i of exp(s(i, k) / tau),
    s(i, j) = z_i . z_j / (|z_i| |z_j|)

Notation. N images in the global batch.
    x~_i, x~_j   x1, x2         (N, 3, S, S)   the two views
    f, h         encoder, h     (N, D)         the representation, what is kept
    g, z         projector, z   (N, d)         the projection, which the loss sees
    tau          temperature                   tau is the momentum of the target in BYOL
The loss starts at ln(2N - 1), 9.01 at a batch of 4096, or above if the temperature is low. With
large batches it never comes near 0. The log's `bound`, ln(2N - 1) - loss, is the InfoNCE bound on
the mutual information of two views (van den Oord et al. 2018, arXiv 1807.03748): an estimate, since
the two views of another image are not independent negatives, and below 0 it says nothing.

Published: ImageNet, ResNet-50: linear 64.5 % after 100 epochs (table 1), 69.3 % after 1000 (table
6); CIFAR-10: 94.0 % (B.9). Ours: RESULTS.md.
Differs: crops are torchvision's, antialiased; convolutions start from fan_out (there fan_in).
Brightness is a factor (appendix A adds); contrast blends with the mean luma (there each channel's
mean), saturation with the luma (there HSV); the blur mirrors the border; theirs is twice this loss.

Usage:  python simclr.py    torchrun --nproc_per_node=8 simclr.py --data /path/to/imagenet
"""
import math

import common  # before torch, since it handles signals from then on
import torch
import torch.nn.functional as F
from torch import nn

MEAN = (0.0, 0.0, 0.0)                  # the official code does not normalise images
STD = (1.0, 1.0, 1.0)

IMAGENET = dict(
    arch="resnet50", stem="imagenet", size=224,
    epochs=100, batch_size=4096,        # section 2.3, Default setting
    lr=0.3, lr_scaling="linear",        # 4.8 = 0.3 * 4096 / 256 (2.3); "sqrt": B.1
    weight_decay=1e-6,                  # 2.3; the official README has 1e-4
    warmup_epochs=10,                   # 2.3
    temperature=0.1,                    # official run.py; table 5: 64.4 %, and 60.7 % with 0.5
    head="nonlinear", dim=128,          # 4.2, 2.3
    color_strength=1.0, blur=0.5,       # appendix A
    min_scale=0.08,                     # appendix A
    loss="nt-xent", margin=0.4,         # B.10 has 0, 0.4, 0.8, 1.6
    knn_every=0,
)
SMALL = dict(                           # official README, CIFAR-10 (B.9 is a ResNet-50)
    IMAGENET, arch="resnet18", stem="small", size=32,
    epochs=200, batch_size=512,         # there up to 1000 epochs
    lr=1.0, weight_decay=1e-4, temperature=0.5, color_strength=0.5, blur=0.0,
    knn_every=10,
)
SHAPES = dict(                          # ours, for a few minutes on two CPU cores
    SMALL, arch="resnet10x0.25", size=24,
    epochs=8, batch_size=64, lr=12.0, weight_decay=1e-6, warmup_epochs=0.5, temperature=0.1,
    color_strength=1.0,                 # one tint per image, which is what the jitter removes
    min_scale=0.4,                      # smaller crops often miss the object
    knn_every=2,
)
RECIPES = dict(shapes=SHAPES, small=SMALL, imagenet=IMAGENET)

# ------------------------------------------------------------------- augmentation (appendix A)

@common.in_chunks
def augment(x, strength, blur):
    """Crops (N, 3, S, S) in 0..1, half of them flipped -> views, not normalised."""
    x = common.color_jitter(x, 0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
    x = common.grayscale(x, p=0.2)
    if blur:
        tenth = 2 * (x.shape[-1] // 20) + 1                     # of the side: 23 at 224
        x = common.gaussian_blur(x, p=blur, sigma=(0.1, 2.0), kernel_size=tenth)
    return x

# ------------------------------------------------------------------- model (figure 2, section 4.2)

class SimCLR(nn.Module):
    def __init__(self, arch, stem, head, dim):
        super().__init__()
        self.encoder = common.resnet(arch, stem=stem, zero_init=True)
        self.projector = projector(self.encoder.dim, head, dim)

    def forward(self, x):
        h = self.encoder(x)                                     # (N, D)
        return self.projector(h)                                # (N, d)

def projector(dim_in, head, dim):
    """g of section 4.2: "nonlinear" is W2 relu(W1 h), "linear" W h, "none" gives h to the loss. As
    in the official code both layers are normalised, the last one without an offset."""
    if head == "none":
        return nn.Identity()
    hidden = nn.Linear(dim_in, dim_in, bias=False)
    last = nn.Linear(dim_in, dim, bias=False)
    norm = nn.BatchNorm1d(dim)
    norm.bias.requires_grad_(False)
    nn.init.normal_(hidden.weight, std=0.01)
    nn.init.normal_(last.weight, std=0.01)
    if head == "linear":
        return nn.Sequential(last, norm)
    return nn.Sequential(hidden, nn.BatchNorm1d(dim_in), nn.ReLU(), last, norm)

# ------------------------------------------------------------------- loss (equation 1)

def nt_xent(z1, z2, temperature):
    """Algorithm 1, a scalar. z1, z2 (N, d): projections of the two views, of any length."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)                 # (2N, d)
    logits = z @ z.T / temperature                              # (2N, 2N)
    logits.fill_diagonal_(-math.inf)                            # k != i
    positive = torch.arange(len(z), device=z.device).roll(len(z1))  # i and i + N are of one image
    return F.cross_entropy(logits, positive)

# ------------------------------------------------------------------- training (sections 2.2, 2.3)

def learning_rate(step, warmup, total):
    """As a fraction of the peak: a linear warm-up, then a half cosine to 0."""
    if step < warmup:
        return step / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2

def train(args, device):
    data = common.load_data(args.data, args.root, "pretrain", device)
    crop = common.Crop(2, args.size, (args.min_scale, 1.0), flip=0.5, interpolation="bicubic")
    batches = common.Batches(data, [crop], args.batch_size, args.seed)

    torch.manual_seed(args.seed)
    model = SimCLR(args.arch, args.stem, args.head, args.dim)
    model.to(device, memory_format=torch.channels_last)
    optimizer = common.LARS(model.parameters(), args.lr, 0.9, args.weight_decay)
    run = common.Run(args, model, optimizer, batches, MEAN, STD)

    network = model
    if common.WORLD_SIZE > 1 and device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)      # global batch statistics
    network = common.distribute(network, args.compile)                  # DDP

    peak_lr = args.lr * args.batch_size / 256
    if args.lr_scaling == "sqrt":
        peak_lr = args.lr * args.batch_size ** 0.5 / 4                  # B.1
    warmup = args.warmup_epochs * len(batches)

    for step in range(run.step, run.total):
        x1, x2 = run.crops(step)
        lr = peak_lr * learning_rate(step, warmup, run.total)
        for group in optimizer.param_groups:
            group["lr"] = lr

        if args.augment:                                                # figure 5, table 3
            x = listed_views(x1, x2, crop, args)
        else:
            x = augment(torch.cat([x1, x2]), args.color_strength, args.blur)
        x1, x2 = x.chunk(2)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            z = network(x)                                              # (2N / W, d)
        # Every process has the whole batch's loss; the gather adds gradients: DDP's mean is exact.
        z1, z2 = [common.gather_with_gradient(v) for v in z.float().chunk(2)]   # (N, d)
        loss = nt_xent(z1, z2, args.temperature)
        if args.loss != "nt-xent":
            loss = other_loss(z1, z2, args)                             # tables 4 and 5

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.finish_step(loss, lr, z1, [x1, x2], **for_the_log(z1, z2, loss, args))

# ------------------------------------------------------------------- ablations, sections 3 to 5

def listed_views(x1, x2, crop, args):
    """Both views (2N, 3, S, S) by `--augment`, without "crop" of the same crop. `--asymmetric`: one
    view is a crop as it is, the other that crop after the operations, as in figure 5."""
    if args.asymmetric:
        return torch.cat([augment_as_listed(x1, args.augment, args.color_strength, crop), x1])
    x2 = x2 if "crop" in args.augment.split(",") else x1
    return augment_as_listed(torch.cat([x1, x2]), args.augment, args.color_strength)

@common.in_chunks
def augment_as_listed(x, operations, strength, crop=None):
    """As `augment`, by the operations in their order; "color" is "jitter" and "grayscale". The
    probabilities and strengths of those in figure 5 are ours. `crop`: cuts from x once more."""
    for operation in operations.split(","):
        if operation == "crop" and crop:
            x = common.crop_and_resize(x, crop)[0]
        if operation in ("color", "jitter"):
            x = common.color_jitter(x, *3 * [0.8 * strength], 0.2 * strength)
        if operation in ("color", "grayscale"):
            x = common.grayscale(x, p=0.2)
        if operation == "blur":
            x = common.gaussian_blur(x, kernel_size=2 * (x.shape[-1] // 20) + 1)
        if operation in FIGURE_5:
            x = FIGURE_5[operation](x)
    return x

def cutout(x, p=0.5):
    """Fill a square of half the side, anywhere within each image (N, 3, S, S), with grey."""
    place = torch.arange(x.shape[-1], device=x.device) + 0.5
    half = x.shape[-1] / 2
    rows = (place - common.uniform(x, half / 2, 1.5 * half)).abs() < half / 2
    columns = (place - common.uniform(x, half / 2, 1.5 * half)).abs() < half / 2    # (N, 1, 1, S)
    return x.masked_fill_(rows.mT & columns & (common.uniform(x, 0, 1) < p), 0.5)

def sobel(x, p=0.5):
    """The strength of the luma's gradient: Sobel's two filters over 4, at most 1."""
    down = common.constant((1.0, 2.0, 1.0, 0.0, 0.0, 0.0, -1.0, -2.0, -1.0), x.device).view(3, 3)
    gray = F.pad(common.to_gray(x), (1, 1, 1, 1), mode="replicate")
    gradient = F.conv2d(gray, torch.stack([down, down.T])[:, None] / 4)         # (N, 2, S, S)
    edges = gradient.square().sum(1, keepdim=True).sqrt().clamp(max=1)          # (N, 1, S, S)
    return x.copy_(torch.where(common.uniform(x, 0, 1) < p, edges, x))

def noise(x, p=0.5, std=0.1):
    """Add Gaussian noise and clip to 0..1."""
    return common.on_some(x, p, lambda x: (x + std * torch.randn_like(x)).clamp(0, 1))

def rotate(x, p=0.5):
    """Rotate by 90 and by 180 degrees, each with probability p; at 1/2 all turns are as likely."""
    x = common.on_some(x, p, lambda x: x.rot90(1, (2, 3)))
    return common.on_some(x, p, lambda x: x.rot90(2, (2, 3)))

FIGURE_5 = dict(cutout=cutout, sobel=sobel, noise=noise, rotate=rotate)
OPERATIONS = ["crop", "color", "jitter", "grayscale", "blur", *FIGURE_5]

def nt_logistic(z1, z2, temperature, semi_hard=False):
    """Table 2, a scalar, the mean over triples: u a first view, v+ the second view of the same
    image, v- that of another. z1, z2 (N, d): projections, of any length."""
    s = F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).T / temperature         # (N, N)
    terms = -F.logsigmoid(s.diagonal()[:, None]) - F.logsigmoid(-s)     # s(u, v+), s(u, v-)
    return (terms * triples(s, semi_hard)).sum()

def margin_loss(z1, z2, margin, semi_hard=False):
    """As `nt_logistic`, max(u . v- - u . v+ + m, 0)."""
    s = F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).T       # (N, N)
    terms = F.relu(s - s.diagonal()[:, None] + margin)
    return (terms * triples(s, semi_hard)).sum()

def triples(s, semi_hard):
    """Weights of the pairs of s (N, N) that sum to 1, equal for all v-, or, `semi_hard`, for the
    nearest v- of each u among those that are farther than v+, and 0 for the others."""
    chosen = ~torch.eye(len(s), dtype=torch.bool, device=s.device)
    if semi_hard:
        farther = s < s.diagonal()[:, None]
        nearest = s.masked_fill(~farther, -math.inf).argmax(1, keepdim=True)
        chosen = farther & (nearest == torch.arange(len(s), device=s.device))
    return chosen.to(s.dtype) / chosen.sum().clamp(min=1)

def other_loss(z1, z2, args):
    if args.loss == "nt-logistic":
        return nt_logistic(z1, z2, args.temperature, args.semi_hard)
    if args.loss == "margin":
        return margin_loss(z1, z2, args.margin, args.semi_hard)
    z = torch.cat([z1, z2])                                     # nt_xent of z as it is
    logits = (z @ z.T / args.temperature).fill_diagonal_(-math.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z1)))

@torch.no_grad()
def for_the_log(z1, z2, loss, args):
    """NT-Xent's bound, and for table 5, over the N second views: how often an image's own is most
    similar to its first view, in percent, and the softmax's entropy in nats, at most ln N."""
    if args.loss != "unnormalized":
        z1, z2 = [F.normalize(z, dim=1) for z in (z1, z2)]
    log_p = F.log_softmax(z1 @ z2.T / args.temperature, dim=1)  # (N, N)
    own = log_p.argmax(1) == torch.arange(len(z1), device=z1.device)
    entries = dict(contrast_accuracy=100 * own.float().mean(),
                   contrast_entropy=-(log_p.exp() * log_p).sum(1).mean())
    if args.loss in ("nt-xent", "unnormalized"):
        entries["bound"] = math.log(2 * args.batch_size - 1) - loss
    return entries

# ------------------------------------------------------------------- flags

def parse_args(argv=None):
    parser = common.Parser(__doc__, RECIPES, argv)
    add = parser.add_argument
    add("--temperature", type=common.positive, help="softmax temperature")
    add("--head", choices=["nonlinear", "linear", "none"], help="kind of projector (section 4.2)")
    add("--dim", type=common.count, help="dimension of the projection")
    add("--color-strength", type=common.not_negative, help="strength of the colour jitter")
    add("--min-scale", type=common.fraction, help="smallest crop area as a fraction of the image")
    add("--lr-scaling", choices=["linear", "sqrt"],
        help="peak: lr * batch / 256, or lr * sqrt(batch) / 4, the same at 4096 and more below")
    add("--augment", metavar="LIST", help=f"instead of appendix A's: {', '.join(OPERATIONS)}")
    add("--asymmetric", action="store_true", help="figure 5: --augment changes one view alone")
    add("--loss", choices=["nt-xent", "unnormalized", "nt-logistic", "margin"],
        help="tables 4 and 5; unnormalized: nt-xent of z that is not scaled to unit length")
    add("--semi-hard", action="store_true", help="semi-hard negatives, of nt-logistic and margin")
    add("--margin", type=common.not_negative, help="margin of --loss margin")
    args = parser.parse()
    unknown = set((args.augment or "crop").split(",")) - set(OPERATIONS)
    if unknown:
        parser.error(f"--augment: {min(unknown)!r} is none of {', '.join(OPERATIONS)}")
    if args.asymmetric and not args.augment:
        parser.error("--asymmetric: needs the operations, --augment")
    if args.semi_hard and args.loss not in ("nt-logistic", "margin"):
        parser.error(f"--semi-hard: goes with --loss nt-logistic or margin, not {args.loss}")
    return args

if __name__ == "__main__":
    common.launch(train, parse_args)
