"""CMC: Contrastive Multiview Coding.
Tian, Krishnan, Isola, ECCV 2020, arXiv 1906.05849.

Idea. What the senses agree on is what is there. Here the views of an image are its lightness and
its colours: two networks, each of which sees one of them, must produce features by which one can
recognise the other's among those of all images. The representation is both networks' features.

Objective (section 3.2, two views), a mean over the images, with memory banks as in InsDis (3.4):
    L = L(1 -> 2) + L(2 -> 1),   L(a -> b) = -log P(i | z_a) = -log  exp(z_a . v_b,i / tau) / Z
The candidates are the image's own row of the other view's bank and m rows drawn from it. With
`--loss softmax` Z is the sum over them. With `--loss nce` it is a constant for each direction,
estimated from the first batch, and with h = P / (P + m / n)
    L(a -> b) = -log h_i - sum over the m drawn rows j of log (1 - h_j)
Notation. N images in the global batch, n in the data set.
    x            x1                        (N, 3, S, S)   one crop of each image, RGB in 0..1
    V1, V2       light, color              (N, 1, S, S), (N, 2, S, S)   L and ab, or Y and CbCr
    f1, f2       encoder.light, encoder.color; z   two of (N, d), unit length; h (N, D) of both
    v            memory                    (2, n, d)      the two banks, the same in every process
    m, tau       negatives, temperature
The loss starts near 2 ln(m + 1) + 1 / (d tau^2), 21.0 for 16384 rows (NCE 2 more). On small data
with `--negatives 0` it falls within each epoch and jumps back with the next, presumably because old
rows look different and so tell whose turn is still to come. On Z see insdis.py.

Published: ImageNet, two ResNet-50 of twice the width: linear 68.4 % (weights trained with
FastAutoAugment, NCE, 4096 rows, mixed precision). Ours: RESULTS.md.

Differs: the encoder converts the colours and takes RGB. The official code is float32, and says that
mixed precision costs 0.5 to 1 point; here bf16 on GPUs. The recipes for small images are ours.
Usage:  python cmc.py    torchrun --nproc_per_node=8 cmc.py --data /path/to/imagenet
"""
import math

import common  # before torch, since it handles signals from then on
import torch
import torch.nn.functional as F
from torch import nn

IMAGENET = dict(                        # official train_CMC.py
    arch="resnet50", width=0.5, stem="imagenet", size=224,
    epochs=240, batch_size=128,
    lr=0.06, optimizer="sgd", schedule="steps", weight_decay=1e-4,      # 0.03 for 128
    warmup_epochs=0,
    view="lab",                         # official README: ycbcr is better by 0.5 to 1
    loss="nce", negatives=16384, temperature=0.07, memory_momentum=0.5,
    dim=128,
    color_strength=0.0, min_scale=0.08,
    knn_every=0,
)
SMALL = dict(                           # ours
    IMAGENET, arch="resnet18", stem="small", size=32,
    epochs=200,
    view="ycbcr", loss="softmax", negatives=4096, temperature=0.1,
    min_scale=0.2,
    knn_every=10,
)
SHAPES = dict(                          # ours, for a few minutes on two CPU cores
    SMALL, arch="resnet10x0.25", size=24,               # two narrow networks are slow on a CPU
    epochs=24, batch_size=64, lr=0.016, optimizer="adamw", schedule="cosine", weight_decay=1e-4,
    warmup_epochs=1, negatives=0, temperature=0.1,
    color_strength=2.0,                 # one tint per image, which both views would see
    min_scale=0.4,                      # smaller crops often miss the object
    knn_every=6,
)
RECIPES = dict(shapes=SHAPES, small=SMALL, imagenet=IMAGENET)

# ------------------------------------------------------------------- augmentation and views

@common.in_chunks
def augment(x, strength):
    """Crops (N, 3, S, S) in 0..1, half of them flipped; the paper's strength is 0."""
    if not strength:
        return x
    return common.color_jitter(x, 0.4 * strength, 0.4 * strength, 0.4 * strength, 0.1 * strength)

SRGB_TO_XYZ = ((0.412453, 0.357580, 0.180423),
               (0.212671, 0.715160, 0.072169),
               (0.019334, 0.119193, 0.950227))
WHITE_D65 = (0.95047, 1.0, 1.08883)
RGB_TO_YCBCR = ((65.481, 128.553, 24.966),              # ITU-R BT.601
                (-37.797, -74.203, 112.0),
                (112.0, -93.786, -18.214))

def rgb_to_lab(images):
    """sRGB (N, 3, H, W) in 0..1 -> CIE L*a*b* of the white D65: L in 0..100, a, b in -110..110."""
    linear = torch.where(images > 0.04045, ((images + 0.055) / 1.055) ** 2.4, images / 12.92)
    xyz = mix(linear, SRGB_TO_XYZ) / constant(WHITE_D65, images)[:, None, None]
    f = torch.where(xyz > 0.008856, xyz ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = f.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)

def rgb_to_ycbcr(images):
    """RGB (N, 3, H, W) in 0..1 -> YCbCr of ITU-R BT.601: Y in 16..235, Cb and Cr in 16..240."""
    return mix(images, RGB_TO_YCBCR) + constant((16.0, 128.0, 128.0), images)[:, None, None]

def mix(images, matrix):
    """Each pixel's three channels times a 3 x 3 matrix."""
    return torch.einsum("ij,njhw->nihw", constant(matrix, images), images)

def constant(values, like):
    return common.constant(values, like.device, like.dtype)

VIEWS = dict(                           # with the middle and half range of the official code
    lab=(rgb_to_lab, (50.0, 6.025, -6.6895), (50.0, 92.208, 101.1675)),
    ycbcr=(rgb_to_ycbcr, (116.151, 121.080, 132.342), (109.5, 111.855, 111.964)))

# ------------------------------------------------------------------- model (sections 3.2 and 4.1)

class Halves(nn.Module):
    """Two ResNets, of the lightness and of the colours, with stems of `stem_width` channels."""

    def __init__(self, arch, stem, view, stem_width, norm="batch"):
        super().__init__()
        self.config = dict(arch=arch, stem=stem, view=view, stem_width=stem_width, norm=norm)
        self.view = view
        self.light = common.resnet(arch, norm, stem, in_channels=1, stem_width=stem_width)
        self.color = common.resnet(arch, norm, stem, in_channels=2, stem_width=stem_width)
        self.dim = self.light.dim + self.color.dim

    def maps(self, x):
        """RGB (N, 3, H, W) in 0..1 -> (N, dim, h, w), the lightness first."""
        convert, mean, std = VIEWS[self.view]
        with torch.autocast(x.device.type, enabled=False):
            x = common.normalize(convert(x), mean, std)
        return torch.cat([self.light.maps(x[:, :1]), self.color.maps(x[:, 1:])], dim=1)

    def forward(self, x):
        """(N, 3, H, W) -> (N, dim)."""
        return self.maps(x).mean((2, 3))

class CMC(nn.Module):
    def __init__(self, arch, width, stem, view, dim, num_images):
        super().__init__()
        depth, multiplier = common.parse_arch(arch)             # `width` is not the stem's
        self.encoder = Halves(f"resnet{depth}x{multiplier * width:g}", stem, view,
                              round(64 * multiplier))
        self.projectors = nn.ModuleList(nn.Linear(self.encoder.dim // 2, dim) for _ in range(2))
        a = math.sqrt(3 / dim)                                  # rows of about unit length
        self.register_buffer("memory", torch.empty(2, num_images, dim).uniform_(-a, a))
        self.register_buffer("normalizer", torch.zeros(2))

    def forward(self, x):
        z = []
        for projector, h in zip(self.projectors, self.encoder(x).chunk(2, dim=1)):
            z.append(F.normalize(projector(h).float(), dim=1))
        return z                                                # two of (N, d)

    def scores(self, z, indices, negatives):
        """For each of the two z (N, d) its cosines to the image's own row of the other view's bank
        and to m rows drawn from all, (N, 1 + m); without negatives to all rows, (N, n)."""
        if not negatives:
            return [z[0] @ self.memory[1].T, z[1] @ self.memory[0].T]
        rows = torch.randint(self.memory.shape[1], (len(z[0]), 1 + negatives), device=z[0].device)
        rows[:, 0] = indices
        return [(self.memory[1, rows] @ z[0][:, :, None])[:, :, 0],
                (self.memory[0, rows] @ z[1][:, :, None])[:, :, 0]]

    @torch.no_grad()
    def estimate_normalizer(self, scores, temperature):
        """For each direction n times the mean of exp(z . v / tau) over all candidates."""
        means = torch.stack([(s / temperature).exp().mean() for s in scores])
        self.normalizer.copy_(self.memory.shape[1] * common.gather(means[None]).mean(0))
        common.say(f"Z = {self.normalizer.tolist()}, estimated from the first batch")

    @torch.no_grad()
    def remember(self, z, indices, momentum):
        """The rows of the images `indices` (N,) of all processes move towards their z (N, d)."""
        indices = common.gather(indices)
        for bank, v in zip(self.memory, z):
            v = common.gather(v.detach())
            bank[indices] = F.normalize(v.lerp(bank[indices], momentum), dim=1)

# ------------------------------------------------------------------- losses (sections 3.2 and 3.4)

def instance_softmax(scores, temperature, own):
    """One direction, a scalar, the mean over the images. scores (N, C): cosines to the candidates;
    own (N,): the column of the image's own row."""
    return F.cross_entropy(scores / temperature, own)

def nce(scores, normalizer, temperature, num_images, eps=1e-7):
    """One direction, a scalar, summed over the candidates, the mean over the images. scores
    (N, 1 + m): cosines to the own row and to m rows drawn uniformly from `num_images`."""
    p = (scores / temperature).exp() / normalizer
    noise = (scores.shape[1] - 1) / num_images                  # m / n
    own = p[:, 0] / (p[:, 0] + noise + eps)
    drawn = noise / (p[:, 1:] + noise + eps)
    return -(own.log() + drawn.log().sum(1)).mean()

# ------------------------------------------------------------------- training (section 4.1)

def learning_rate(step, warmup, total, schedule):
    """As a fraction of the peak: a linear warm-up, if any, then a tenth after 1/2, 2/3 and 5/6 of
    the run (120, 160 and 200 of 240 epochs), or a half cosine to 0."""
    if step < warmup:
        return step / warmup
    if schedule == "steps":
        return 0.1 ** sum(6 * step >= sixths * total for sixths in (3, 4, 5))
    return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2

def train(args, device):
    data = common.load_data(args.data, args.root, "pretrain", device)
    crop = common.Crop(1, args.size, (args.min_scale, 1.0), flip=0.5)
    batches = common.Batches(data, [crop], args.batch_size, args.seed)

    torch.manual_seed(args.seed)
    model = CMC(args.arch, args.width, args.stem, args.view, args.dim, len(data))
    model.to(device, memory_format=torch.channels_last)
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay)
    else:
        optimizer = torch.optim.SGD(model.parameters(), args.lr, 0.9,
                                    weight_decay=args.weight_decay)
    run = common.Run(args, model, optimizer, batches)

    network = common.distribute(model, args.compile)                    # DDP; BN per process

    peak_lr = args.lr * args.batch_size / 256
    warmup = args.warmup_epochs * len(batches)

    for step in range(run.step, run.total):
        x1, = run.crops(step)
        lr = peak_lr * learning_rate(step, warmup, run.total, args.schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr

        x1 = augment(x1, args.color_strength)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            z = network(x1)                                             # two of (N / W, d)
        indices = run.indices.to(device, non_blocking=True)
        scores = model.scores(z, indices, args.negatives)               # two of (N / W, 1 + m)
        if args.loss == "nce":
            if step == 0:
                model.estimate_normalizer(scores, args.temperature)
            losses = [nce(s, Z, args.temperature, len(data))
                      for s, Z in zip(scores, model.normalizer)]
        else:
            own = torch.zeros_like(indices) if args.negatives else indices
            losses = [instance_softmax(s, args.temperature, own) for s in scores]
        loss = losses[0] + losses[1]

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.remember(z, indices, args.memory_momentum)                # after they were scored
        run.finish_step(loss, lr, torch.cat(z, dim=1), [x1])

# ------------------------------------------------------------------- flags

def parse_args(argv=None):
    parser = common.Parser(__doc__, RECIPES, argv)
    add = parser.add_argument
    add("--view", choices=list(VIEWS), help="colour space whose channels are the views")
    add("--width", type=common.number(float, 0.01, 100),
        help="width of each network, times that of --arch")
    add("--loss", choices=["nce", "softmax"], help="with a constant Z, or the softmax")
    add("--negatives", type=common.whole, help="rows drawn for each image, m; 0: the whole bank")
    add("--temperature", type=common.positive, help="softmax temperature")
    add("--memory-momentum", type=common.fraction, help="weight of the old row in the new one")
    add("--dim", type=common.count, help="dimension of the projections")
    add("--optimizer", choices=["sgd", "adamw"], help="the paper's is sgd")
    add("--schedule", choices=["steps", "cosine"], help="how the rate decays; the paper's is steps")
    add("--color-strength", type=common.not_negative, help="strength of the colour jitter")
    add("--min-scale", type=common.fraction, help="smallest crop area as a fraction of the image")
    args = parser.parse()
    if args.loss == "nce" and not args.negatives:
        parser.error("--negatives 0: the whole bank is for --loss softmax; nce needs drawn rows")
    return args

if __name__ == "__main__":
    common.launch(train, parse_args)
