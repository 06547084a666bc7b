"""InsDis: Unsupervised Feature Learning via Non-Parametric Instance Discrimination. Wu, Xiong, Yu, Lin, CVPR 2018, arXiv 1805.01978.

Idea. Every image is a class of its own. What stands for a class is no learned weight vector but the feature that the image had when it was last seen,
kept in a memory bank with a row for every image of the data set. A network learns to find an image's own row among the others; augmentation changes the
image from visit to visit and so tells the network what to ignore. With a million classes, the others are a few thousand rows drawn at random.

Objective (equations 2 and 4), a mean over the images, and what becomes of the bank's row after each visit (official code):

    L = -log P(i | v),      P(i | v) = exp(v_i . v / tau) / Z,      v_i <- normalised t v_i + (1 - t) v

`--loss softmax` takes Z as the sum over the image's own row and the drawn ones. `--loss nce` (equations 6 to 8) holds Z constant, as the first batch
estimates it, and asks of each row whether it is the image's own or was drawn: with h = P / (P + m / n),

    L = -log h(i, v) - sum over the m drawn rows j of log (1 - h(j, v))

Notation. N images in the batch of one process, n in the data set.
    x            x1                     (N, 3, S, S)   one view of each image
    f, v         encoder, projector; z  (N, d)         unit length; h (N, D) before the projector is what is kept, another h than the one above
    v_i          memory                 (n, d)         the bank, a buffer that all processes hold alike
    m, tau, t    negatives, temperature, memory_momentum; Z is normalizer

Start value ln(m + 1) + 1 / (2 d tau^2) = 9.12 for 4096 drawn rows, since the cosines to them have the variance 1 / d; for NCE about 1 more. With
`--negatives 0` Z is the sum over the whole bank, and the start has ln n for ln(m + 1).

The log's `bound` is ln n - loss with the whole bank, ln(m + 1) - loss with drawn rows. With the whole bank it is a lower bound on what a view tells of
which image it is of, whatever the bank holds, and cannot exceed ln n. With drawn rows, which are not newly embedded views and may be the image's own,
it is only near the bound that simclr.py explains. The loss of NCE bounds nothing, and its log has none.

Published: ImageNet, ResNet-50: linear probe 54.0 %, nearest neighbours by v 46.8 % (official README: NCE, 4096). Softmax: 57.1 %, with 16384 drawn
rows 58.5 % (README of CMC, which has 56.5 % for NCE).
Ours: embedded shapes, `python insdis.py`, 276 seconds of one CPU core, 2026-11-21: kNN 67.1 % (untrained 21.9 %, pixels 37.0 %). CIFAR-10: see
the README. ImageNet: not run yet.

Differs from the paper:
    - The official CIFAR recipe does not mirror and normalises by CIFAR's mean and deviation.
    - The proximal regularisation (equations 9 and 10) is the bank's momentum, as in the official code.
    - The order of the colour operations is drawn for every 64 images instead of for each.
    - The recipe for the embedded `shapes` is ours: a narrow network, small batches, AdamW instead of SGD, and a cosine instead of steps.

Usage:
    python insdis.py                                                              a few minutes on two CPU cores
    torchrun --nproc_per_node=8 insdis.py --data /path/to/imagenet                ResNet-50 on 8 GPUs
"""
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import common

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

IMAGENET = dict(                     # official main.py
    arch="resnet50", stem="imagenet", size=224,
    epochs=200, batch_size=256,
    lr=0.03, optimizer="sgd", schedule="steps", weight_decay=1e-4,       # decay on everything
    warmup_epochs=0,
    loss="nce", negatives=4096, temperature=0.07, memory_momentum=0.5,
    dim=128,
    color_strength=1.0, min_scale=0.2,
    knn_every=0, save_every=1000,    # the bank is most of a checkpoint: 0.7 GB
)
SMALL = dict(IMAGENET,               # official cifar.py: the softmax over the whole bank
    arch="resnet18", stem="small", size=32,
    batch_size=128, lr=0.06, weight_decay=5e-4,      # 0.03 for 128
    loss="softmax", negatives=0, temperature=0.1,
    knn_every=10, save_every=100,
)
SHAPES = dict(SMALL,                 # our own, for a few minutes on two CPU cores
    arch="resnet10x0.25",
    epochs=32, batch_size=64, lr=0.016, optimizer="adamw", schedule="cosine", weight_decay=1e-4, warmup_epochs=1,
    temperature=0.2,
    color_strength=2.0,              # one tint an image, which is what the jitter erases
    min_scale=0.4,                   # smaller crops often miss the object
    knn_every=8,
)
RECIPES = dict(shapes=SHAPES, small=SMALL, imagenet=IMAGENET)


# ------------------------------------------------------------------------------------------------ augmentation (official code)

@common.by_pieces
def augment(x, strength):
    """Crops (N, 3, S, S) in 0..1, half of them mirrored -> views of the same form, each with its own draws, normalised."""
    x = common.grayscale(x, p=0.2)
    x = common.color_jitter(x, 0.4 * strength, 0.4 * strength, 0.4 * strength, 0.4 * strength, p=1.0)
    return common.normalize(x, MEAN, STD)


# ------------------------------------------------------------------------------------------------ model (figure 2, section 3.1)

class InsDis(nn.Module):
    def __init__(self, arch, stem, dim, num_images):
        super().__init__()
        self.encoder = common.resnet(arch, stem=stem)
        self.projector = nn.Linear(self.encoder.dim, dim)
        self.register_buffer("memory", (2 * torch.rand(num_images, dim) - 1) * math.sqrt(3 / dim))      # rows of length 1 or so
        self.register_buffer("normalizer", torch.zeros(()))

    def forward(self, x):
        return F.normalize(self.projector(self.encoder(x)).float(), dim=1)               # (N, d)

    def scores(self, z, indices, negatives):
        """Cosines (N, 1 + m) of z (N, d) to its image's row of the bank and to m rows drawn from all; without negatives those to all rows, (N, n)."""
        with torch.autocast(z.device.type, enabled=False):
            if not negatives:
                return z @ self.memory.to(z.device).T
            rows = torch.randint(len(self.memory), (len(z), 1 + negatives), device=self.memory.device)       # perhaps its own again
            rows[:, 0] = indices
            candidates = self.memory.index_select(0, rows.flatten()).to(z.device).view(*rows.shape, -1)      # (N, 1 + m, d)
            return (candidates @ z[:, :, None])[:, :, 0]

    @torch.no_grad()
    def estimate_normalizer(self, scores, temperature):
        """Equation 8: Z is n times the mean of exp(v_j . v / tau), here over all candidates of a batch and all processes."""
        mean = (scores / temperature).exp().mean()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        self.normalizer.copy_(len(self.memory) * mean)

    @torch.no_grad()
    def remember(self, z, indices, momentum):
        """The images of all processes move their rows towards their newest z (N, d), in every process alike."""
        z, indices = gather(z.detach()).to(self.memory.device), gather(indices.to(z.device)).to(self.memory.device)
        self.memory[indices] = F.normalize(z.lerp(self.memory[indices], momentum), dim=1)


def gather(x):
    """(N, ...) of each process -> (NW, ...) of all, without gradient. The same tensor in a single process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    everyones = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, x.contiguous())
    return torch.cat(everyones)


# ------------------------------------------------------------------------------------------------ losses (equations 2 to 8)

def instance_softmax(scores, temperature, own=None):
    """Equation 2, a scalar: the mean over the images of this process, so that DDP's mean is exact.

    scores (N, C): cosines to the candidates; `own` (N,): the column of the image's own row, by default the first.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return F.cross_entropy(scores / temperature, torch.zeros(len(scores), dtype=torch.int64, device=scores.device) if own is None else own)


def nce(scores, normalizer, temperature, num_images, eps=1e-7):
    """Noise-contrastive estimation (equations 6 and 7), a scalar: summed over the candidates, a mean over the images of this process.

    scores (N, 1 + m): cosines to the image's own row and to m drawn uniformly from `num_images`; `normalizer`: Z, a number or scalar tensor.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    p = (scores / temperature).exp() / normalizer
    noise = (scores.shape[1] - 1) / num_images                                           # m / n
    own, drawn = p[:, 0], p[:, 1:]
    return -((own / (own + noise + eps)).log() + (noise / (drawn + noise + eps)).log().sum(1)).mean()


# ------------------------------------------------------------------------------------------------ training (section 3, official code)

def train(args, device):
    data = common.load_data(args.data, args.root, "pretrain", device)
    batches = common.Batches(data, [common.Crop(1, args.size, (args.min_scale, 1.0), flip=0.5)], args.batch_size, args.seed)
    if args.loss == "nce" and not args.negatives:
        raise common.UserError("--negatives 0: the whole bank is for --loss softmax; nce needs drawn rows")

    torch.manual_seed(args.seed)
    model = InsDis(args.arch, args.stem, args.dim, len(data)).to(device, memory_format=torch.channels_last)
    if args.host_memory:
        model.memory = model.memory.cpu()
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
    candidates = args.negatives + 1 if args.negatives else len(data)
    run = common.Run("insdis", args, model, optimizer, batches, MEAN, STD,
                     entries=lambda loss: dict(bound=math.log(candidates) - loss) if args.loss == "softmax" else {})

    network = model
    if common.world_size() > 1:
        network = DistributedDataParallel(network, broadcast_buffers=False)  # the bank is the same everywhere; BN stays with each process
    if args.compile:
        network = torch.compile(network)

    peak_lr = args.lr * args.batch_size / 256
    warmup, total = args.warmup_epochs * len(batches), args.epochs * len(batches)

    for step, (x1,), indices in run:
        if step < warmup:
            lr = peak_lr * min(1, (step + 1) / warmup)
        elif args.schedule == "steps":                                       # a tenth after 60 % and after 80 % of the epochs: 120 and 160 of 200
            lr = peak_lr * 0.1 ** ((step >= 0.6 * total) + (step >= 0.8 * total))
        else:
            lr = peak_lr * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr

        x1 = augment(x1, args.color_strength)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            z = network(x1)                                                  # (N, d)
        scores = model.scores(z, indices, args.negatives)                    # (N, 1 + m)
        if args.loss == "nce":
            if step == 0:
                model.estimate_normalizer(scores, args.temperature)
                common.say(f"Z = {model.normalizer:.4g}, estimated from the first batch")
            loss = nce(scores, model.normalizer, args.temperature, len(data))
        else:
            loss = instance_softmax(scores, args.temperature, None if args.negatives else indices.to(device))

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.remember(z, indices, args.memory_momentum)                     # after they were scored
        run.log(loss, lr, z, [x1])


# ------------------------------------------------------------------------------------------------ flags

def parse_args(argv=None):
    parser = common.Parser(__doc__, RECIPES, argv)
    parser.add_argument("--loss", choices=["nce", "softmax"], help="with a constant Z, or the softmax over the candidates")
    parser.add_argument("--negatives", type=common.whole, help="rows of the bank drawn for each image, m; 0: all rows, for the softmax")
    parser.add_argument("--temperature", type=common.positive, help="of the softmax, tau")
    parser.add_argument("--memory-momentum", type=common.share, help="share of the old row in the new one, t")
    parser.add_argument("--host-memory", action="store_true", help="keep the bank in the machine's memory, not the GPU's")
    parser.add_argument("--dim", type=common.count, help="width of the projection")
    parser.add_argument("--optimizer", choices=["sgd", "adamw"], help="the paper's is sgd")
    parser.add_argument("--schedule", choices=["steps", "cosine"], help="how the rate falls; the paper's is steps")
    parser.add_argument("--color-strength", type=common.not_negative, help="of the colour jitter, times (0.4, 0.4, 0.4, 0.4)")
    parser.add_argument("--min-scale", type=common.share, help="smallest share of the image's area that a crop has")
    return parser.parse()


if __name__ == "__main__":
    common.launch(train, parse_args())
