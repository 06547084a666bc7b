"""CMC: Contrastive Multiview Coding. Tian, Krishnan, Isola, ECCV 2020, arXiv 1906.05849.

Idea. What the senses agree on is what is there. Here the senses are an image's lightness and its colours: two networks, each of which sees only one of
them, must produce features by which one recognises the other's among those of all images. Neither can rely on what its half alone shows, and no
augmentation of the colours is needed. The representation is what both networks make of an image, side by side.

Objective (section 3.2, two views), a mean over the images, with the features of the other half in a memory bank as in InsDis (section 3.4):

    L = L(l -> ab) + L(ab -> l),      L(a -> b) = -log  exp(z_a . v_b,i / tau) / sum over the candidates j of exp(z_a . v_b,j / tau)

The candidates are the image's own row v_b,i of the other half's bank and m rows drawn from it, the same images in both directions. `--loss softmax` is
this; `--loss nce` holds the sum constant, as the first batch estimates it for each direction, and asks of each row whether it is the image's own or was
drawn (h = P / (P + m / n), where P is the fraction above):

    L(a -> b) = -log h_i - sum over the m drawn rows j of log (1 - h_j)

Notation. N images in the batch of one process, n in the data set.
    x            x1                        (N, 3, S, S)   one view of each image, RGB in 0..1
    V1, V2       light, color              (N, 1, S, S), (N, 2, S, S)   L and ab of `--view lab`, Y and CbCr of `--view ycbcr`
    f1, f2       encoder.light, encoder.color, projectors; z   two of (N, d), unit length; h (N, D) is both encoders' features, D / 2 each
    v            memory                    (2, n, d)      the two banks, a buffer that all processes hold alike
    m, tau       negatives, temperature

Start value 2 ln(m + 1) + 1 / (d tau^2) = 21.0 for 16384 drawn rows, for NCE about 2 more. With `--negatives 0` the sum is over the whole bank, and the
start has ln n for ln(m + 1). The log's `bound`, ln(m + 1) or ln n minus the mean of the two directions' losses, is that of insdis.py, of one half of
the channels on which image it is of. On small data at a large rate the loss falls within each epoch, on CIFAR-10 from 22 to 14, and is back at 22 when the
next one begins, presumably because rows written long ago look different, by which the networks tell whose turn has not come yet. `bound` rises and falls
with it and bounds nothing then. A larger `--memory-momentum` lets rows change, and so age, more slowly.

Image mixture (Shen et al., arXiv 2003.05438) is an option. `--mixture global|region|both`, its form of 2020, shows both networks images with others
of the batch blended or pasted into them and leaves the loss alone. `--mixture unmix` is our transfer of Un-Mix (2022), which its authors tried
with other methods: a view of the batch mixed with itself in reverse order, m = lambda x + (1 - lambda) reversed x or with a square of it, adds
lambda L(m) + (1 - lambda) L(reversed m), against the same banks, which hold whole images.

Published: ImageNet, two ResNet-50 of twice the width: linear probe 68.4 % (paper). ImageNet-100, two of half the width, YCbCr, softmax, 4096: 75.8 %
(official README).
Ours: embedded shapes, `python cmc.py`, 238 seconds on two CPU cores, 2026-11-21: kNN 56.5 % (untrained 26.7 %, pixels 41.0 %, all at its 24 pixels).
CIFAR-10: see the README. ImageNet: not run yet.

Differs from the paper:
    - The conversion of the colours is part of the encoder, so that whoever uses it gives it RGB in 0..1. `--mixture` mixes before it, the official
      code after.
    - The recipes for small images are ours; the one for the embedded `shapes` disturbs the colours as well.

Usage:
    python cmc.py                                                                 a few minutes on two CPU cores
    torchrun --nproc_per_node=8 cmc.py --data /path/to/imagenet                   two halves of a ResNet-50 on 8 GPUs
"""
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import common

IMAGENET = dict(                     # official train_CMC.py
    arch="resnet50", width=0.5, stem="imagenet", size=224,
    epochs=240, batch_size=128,
    lr=0.06, optimizer="sgd", schedule="steps", weight_decay=1e-4,       # 0.03 for 128; decay on everything
    warmup_epochs=0,
    view="lab",                      # official README: ycbcr is better by 0.5 to 1
    loss="nce", negatives=16384, temperature=0.07, memory_momentum=0.5,
    dim=128,
    color_strength=0.0, min_scale=0.08,
    knn_every=0, save_every=1000,    # the banks are most of a checkpoint: 1.3 GB
)
SMALL = dict(IMAGENET,               # our own
    arch="resnet18", stem="small", size=32,
    epochs=200, batch_size=128,
    view="ycbcr", loss="softmax", negatives=4096, temperature=0.1,
    min_scale=0.2,
    knn_every=10, save_every=100,
)
SHAPES = dict(SMALL,                 # our own, for a few minutes on two CPU cores
    arch="resnet10x0.25", size=24,    # smaller than the images: two narrow networks are slow on a CPU
    epochs=40, batch_size=64, lr=0.016, optimizer="adamw", schedule="cosine", weight_decay=1e-4, warmup_epochs=1,
    negatives=0, temperature=0.2,
    memory_momentum=0.9,             # rows whose age shows less, see `bound` above
    color_strength=2.0,              # one tint an image, by which the halves would find each other
    min_scale=0.4,                   # smaller crops often miss the object
    knn_every=10,
)
RECIPES = dict(shapes=SHAPES, small=SMALL, imagenet=IMAGENET)


# ------------------------------------------------------------------------------------------------ augmentation and views (section 4, official code)

@common.by_pieces
def augment(x, strength):
    """Crops (N, 3, S, S) in 0..1, half of them mirrored -> views of the same form. With the paper's strength of 0 they stay as they are."""
    return common.color_jitter(x, 0.4 * strength, 0.4 * strength, 0.4 * strength, 0.1 * strength, p=0.8)


def rgb_to_lab(images):
    """sRGB (N, 3, H, W) in 0..1 -> CIE L*a*b* of the same form, for the white of D65: L in 0..100, a and b within about -110..110."""
    linear = torch.where(images > 0.04045, ((images + 0.055) / 1.055) ** 2.4, images / 12.92)
    x, y, z = _combine(linear, [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]).unbind(1)
    x, y, z = (torch.where(v > 0.008856, v ** (1 / 3), 7.787 * v + 16 / 116) for v in (x / 0.95047, y, z / 1.08883))
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def rgb_to_ycbcr(images):
    """RGB (N, 3, H, W) in 0..1 -> YCbCr of ITU-R BT.601 of the same form: Y in 16..235, Cb and Cr in 16..240."""
    offset = torch.tensor([16.0, 128, 128], dtype=images.dtype, device=images.device)[:, None, None]
    return _combine(images, [[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]]) + offset


def _combine(x, rows):
    """Each pixel's three channels times a 3 x 3 matrix."""
    return torch.einsum("ij,njhw->nihw", torch.tensor(rows, dtype=x.dtype, device=x.device), x)


VIEWS = dict(lab=(rgb_to_lab, (50, 6.025, -6.6895), (50, 92.208, 101.1675)),             # middle and half range, official code
             ycbcr=(rgb_to_ycbcr, (116.151, 121.080, 132.342), (109.5, 111.855, 111.964)))


# ------------------------------------------------------------------------------------------------ model (section 3.2 and 4.1)

class Halves(nn.Module):
    """Two ResNets, one for the lightness and one for the colours, `stem_width` channels in the stem of each. Takes RGB in 0..1."""

    def __init__(self, arch, stem, view, stem_width, norm="batch"):
        super().__init__()
        self.config, self.view = dict(arch=arch, stem=stem, view=view, stem_width=stem_width, norm=norm), view
        self.light = common.resnet(arch, norm=norm, stem=stem, in_channels=1, stem_width=stem_width)
        self.color = common.resnet(arch, norm=norm, stem=stem, in_channels=2, stem_width=stem_width)
        self.dim = self.light.dim + self.color.dim

    def maps(self, x):
        """(N, 3, H, W) -> (N, dim, h, w), the lightness first."""
        convert, mean, std = VIEWS[self.view]
        with torch.autocast(x.device.type, enabled=False):
            x = common.normalize(convert(x), mean, std)
        return torch.cat([self.light.maps(x[:, :1]), self.color.maps(x[:, 1:])], 1)

    def forward(self, x):
        """(N, 3, H, W) -> (N, dim)."""
        return self.maps(x).mean((2, 3))


class CMC(nn.Module):
    def __init__(self, arch, width, stem, view, dim, num_images):
        super().__init__()
        depth, multiplier = common.parse_arch(arch)
        self.encoder = Halves(f"resnet{depth}x{multiplier * width:g}", stem, view, round(64 * multiplier))       # the width is not the stem's
        self.projectors = nn.ModuleList([nn.Linear(self.encoder.dim // 2, dim) for _ in range(2)])
        self.register_buffer("memory", (2 * torch.rand(2, num_images, dim) - 1) * math.sqrt(3 / dim))    # rows of length 1 or so
        self.register_buffer("normalizer", torch.zeros(2))

    def forward(self, x):
        halves = self.encoder(x).chunk(2, 1)                                             # two of (N, D / 2)
        return [F.normalize(project(h).float(), dim=1) for project, h in zip(self.projectors, halves)]       # two of (N, d)

    def scores(self, z, indices, negatives):
        """For each of the two z (N, d) the cosines (N, 1 + m) to its image's row of the other half's bank and to m rows drawn from all; without
        negatives those to all rows, (N, n)."""
        device = z[0].device
        with torch.autocast(device.type, enabled=False):
            if not negatives:
                return [half @ bank.to(device).T for half, bank in zip(z, self.memory.flip(0))]
            rows = torch.randint(self.memory.shape[1], (len(z[0]), 1 + negatives), device=self.memory.device)      # perhaps its own again
            rows[:, 0] = indices
            candidates = [bank.index_select(0, rows.flatten()).to(device).view(*rows.shape, -1) for bank in self.memory]       # two of (N, 1 + m, d)
            return [(others @ half[:, :, None])[:, :, 0] for half, others in zip(z, candidates[::-1])]

    @torch.no_grad()
    def estimate_normalizer(self, scores, temperature):
        """For each direction n times the mean of exp(z . v / tau), over all candidates of a batch and all processes."""
        mean = torch.stack([(s / temperature).exp().mean() for s in scores])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        self.normalizer.copy_(self.memory.shape[1] * mean)

    @torch.no_grad()
    def remember(self, z, indices, momentum):
        """The images of all processes move their rows towards their newest two z (N, d), in every process alike."""
        indices = gather(indices.to(z[0].device)).to(self.memory.device)
        for bank, half in zip(self.memory, z):
            bank[indices] = F.normalize(gather(half.detach()).to(bank.device).lerp(bank[indices], momentum), dim=1)


def gather(x):
    """(N, ...) of each process -> (NW, ...) of all, without gradient. The same tensor in a single process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    everyones = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, x.contiguous())
    return torch.cat(everyones)


# ------------------------------------------------------------------------------------------------ losses (sections 3.2 and 3.4)

def instance_softmax(scores, temperature, own=None):
    """One direction, a scalar: the mean over the images of this process, so that DDP's mean is exact.

    scores (N, C): cosines to the candidates; `own` (N,): the column of the image's own row, by default the first.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return F.cross_entropy(scores / temperature, torch.zeros(len(scores), dtype=torch.int64, device=scores.device) if own is None else own)


def nce(scores, normalizer, temperature, num_images, eps=1e-7):
    """Noise-contrastive estimation of one direction, a scalar: summed over the candidates, a mean over the images of this process.

    scores (N, 1 + m): cosines to the image's own row and to m drawn uniformly from `num_images`; `normalizer`: a number or scalar tensor.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    p = (scores / temperature).exp() / normalizer
    noise = (scores.shape[1] - 1) / num_images                                           # m / n
    own, drawn = p[:, 0], p[:, 1:]
    return -((own / (own + noise + eps)).log() + (noise / (drawn + noise + eps)).log().sum(1)).mean()


# ------------------------------------------------------------------------------------------------ training (section 4.1, official code)

def train(args, device):
    data = common.load_data(args.data, args.root, "pretrain", device)
    batches = common.Batches(data, [common.Crop(1, args.size, (args.min_scale, 1.0), flip=0.5)], args.batch_size, args.seed)
    if args.loss == "nce" and not args.negatives:
        raise common.UserError("--negatives 0: the whole bank is for --loss softmax; nce needs drawn rows")

    torch.manual_seed(args.seed)
    model = CMC(args.arch, args.width, args.stem, args.view, args.dim, len(data)).to(device, memory_format=torch.channels_last)
    if args.host_memory:
        model.memory = model.memory.cpu()
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
    losses, candidates = 4 if args.mixture == "unmix" else 2, args.negatives + 1 if args.negatives else len(data)
    run = common.Run("cmc", args, model, optimizer, batches,
                     entries=lambda loss: dict(bound=math.log(candidates) - loss / losses) if args.loss == "softmax" else {})

    network = model
    if common.world_size() > 1:
        network = DistributedDataParallel(network, broadcast_buffers=False)  # the banks are the same everywhere; BN stays with each process
    if args.compile:
        network = torch.compile(network)

    peak_lr = args.lr * args.batch_size / 256
    warmup, total = args.warmup_epochs * len(batches), args.epochs * len(batches)

    for step, (x1,), indices in run:
        if step < warmup:
            lr = peak_lr * min(1, (step + 1) / warmup)
        elif args.schedule == "steps":                                       # a tenth after 1/2, 2/3 and 5/6 of the epochs: 120, 160 and 200 of 240
            lr = peak_lr * 0.1 ** sum(6 * step >= sixths * total for sixths in (3, 4, 5))
        else:
            lr = peak_lr * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr

        views = [augment(x1, args.color_strength)]
        common.mixture(views, args.mixture, args.mix_alpha, args.mix_beta, args.mix_count, args.mix_probability, args.mix_decay)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            z = network(views[0])                                            # two of (N, d)
        weighed = [(1, z)]
        if args.mixture == "unmix":                                          # one view more, with two right rows; the banks are of whole images
            mixed, share = common.unmix(views[0], args.unmix_global, args.mix_alpha)
            views.append(mixed)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                z_mixed = network(mixed)                                     # two of (N, d)
            weighed += [(share, z_mixed), (1 - share, [half.flip(0) for half in z_mixed])]
        loss = 0
        for weight, halves in weighed:
            scores = model.scores(halves, indices, args.negatives)           # two of (N, 1 + m)
            if args.loss == "nce":
                if step == 0 and halves is z:
                    model.estimate_normalizer(scores, args.temperature)
                    common.say("Z = {:.4g} and {:.4g}, estimated from the first batch".format(*model.normalizer.tolist()))
                loss = loss + weight * sum(nce(s, normalizer, args.temperature, len(data)) for s, normalizer in zip(scores, model.normalizer))
            else:
                loss = loss + weight * sum(instance_softmax(s, args.temperature, None if args.negatives else indices.to(device)) for s in scores)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.remember(z, indices, args.memory_momentum)                     # after they were scored
        run.log(loss, lr, torch.cat(z, 1), views)


# ------------------------------------------------------------------------------------------------ flags

def parse_args(argv=None):
    parser = common.Parser(__doc__, RECIPES, argv)
    parser.add_argument("--view", choices=list(VIEWS), help="the colour space whose channels are the views")
    parser.add_argument("--width", type=common.positive, help="of each of the two networks, times that of --arch; their stems are as wide as there")
    parser.add_argument("--loss", choices=["nce", "softmax"], help="with a constant Z, or the softmax over the candidates")
    parser.add_argument("--negatives", type=common.whole, help="rows of the bank drawn for each image, m; 0: all rows, for the softmax")
    parser.add_argument("--temperature", type=common.positive, help="of the softmax, tau")
    parser.add_argument("--memory-momentum", type=common.share, help="share of the old row in the new one")
    parser.add_argument("--host-memory", action="store_true", help="keep the banks in the machine's memory, not the GPU's")
    parser.add_argument("--dim", type=common.count, help="width of the projection")
    parser.add_argument("--optimizer", choices=["sgd", "adamw"], help="the paper's is sgd")
    parser.add_argument("--schedule", choices=["steps", "cosine"], help="how the rate falls; the paper's is steps")
    parser.add_argument("--color-strength", type=common.not_negative, help="of the colour jitter, times (0.4, 0.4, 0.4, 0.1); the paper's is 0: none")
    parser.add_argument("--min-scale", type=common.share, help="smallest share of the image's area that a crop has")
    parser.add_mixture()
    return parser.parse()


if __name__ == "__main__":
    common.launch(train, parse_args())
