"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations. Chen, Kornblith, Norouzi, Hinton, ICML 2020, arXiv 2002.05709.

Idea. Augment every image of a large batch twice. A network must recognise, among all other augmented images of the batch, the one that
comes from the same image. Whatever the augmentation changes, it has to learn to ignore; what is left is what the image shows. A small
network on top, the projector, takes the loss; it is thrown away afterwards, and the representation below it is kept.

Objective (equation 1 and Algorithm 1), the mean of l over all 2N positive pairs (i, j), in both orders:

    l(i, j) = -log  exp(s(i, j) / tau) / sum over k != i of exp(s(i, k) / tau),      s(i, j) = z_i . z_j / (|z_i| |z_j|)

Notation. N images in the batch of one process, W processes.
    x~_i, x~_j   x1, x2         (N, 3, S, S)   the two views
    f, h         encoder, h     (N, D)         the representation, what is kept
    g, z         projector, z   (N, d)         the projection, which the loss sees
    tau          temperature

Start value ln(2NW - 1) = 9.01 at a batch of 4096; the loss falls from there and never comes near 0.

The log's `bound`, ln(2NW - 1) - loss, is a lower bound, in nats, on the mutual information of an image's two views (InfoNCE: van den Oord et al. 2018,
arXiv 1807.03748). It cannot exceed ln(2NW - 1): once near, it tells that the batch is small and nothing more about the information. Nor is a higher
one better: easier views raise it and teach less.

Published: ImageNet, ResNet-50, batch 4096: linear probe 64.5 % after 100 epochs (table 1), 69.3 % after 1000
(table 6). CIFAR-10, ResNet-50: 94.0 % (B.9).
Ours: CIFAR-10, ResNet-18 of a quarter of the width, 16 epochs, 40 minutes of one CPU core, 2026-11-21: kNN 64.9 % (command in the README). Embedded
shapes, `python simclr.py` with seeds 0, 1, 2, 210 seconds of one CPU core, 2026-11-21: kNN 84.4, 82.5, 86.1 %, on two cores 89.7 %
for seed 0 (untrained 29.3, 26.6, 29.7 %, pixels 37.0 %). ImageNet: not run yet.

Differs from the paper:
    - The projector follows the official code, which normalises both layers (the last without an offset); the paper's formula has no norm.
    - Crops are drawn as torchvision draws them (area uniform, aspect ratio log-uniform); the official code draws the height and the aspect uniformly.
    - The order of the colour operations is drawn for every 64 images instead of for each. The blur mirrors the border, the official one pads zeros.
    - The official code's loss is the sum over the two orders, twice this one: with LARS that only halves the share of the decay, and doubles
      the steps of biases and norms.
    - The recipe for the embedded `shapes` is ours: a narrow ResNet-10, small batches and few epochs.

Usage:
    python simclr.py                                                              two to three minutes on two CPU cores
    torchrun --nproc_per_node=8 simclr.py --data /path/to/imagenet                ResNet-50 on 8 GPUs
"""
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import common

IMAGENET = dict(
    arch="resnet50", stem="imagenet", size=224,
    epochs=100, batch_size=4096,     # section 2.3, Default setting
    lr=0.3, lr_scaling="linear",     # 4.8 = 0.3 * 4096 / 256 (2.3); "sqrt" is 0.075 * sqrt(4096), the same (B.1)
    weight_decay=1e-6,               # 2.3; the official README uses 1e-4
    warmup_epochs=10,                # 2.3
    temperature=0.1,                 # official run.py; table 5: 64.4 % with 0.1, 60.7 % with 0.5
    head="nonlinear", dim=128,       # 4.2, 2.3
    color_strength=1.0, blur=0.5,    # appendix A
    min_scale=0.08,                  # appendix A
    knn_every=0,
)
SMALL = dict(IMAGENET,               # appendix B.9, CIFAR-10
    arch="resnet18", stem="small", size=32,
    epochs=200, batch_size=512,      # up to 1000 epochs in the paper and the official README
    lr=1.0, weight_decay=1e-4,       # official README, CIFAR-10
    temperature=0.5, color_strength=0.5, blur=0.0,
    knn_every=10,
)
SHAPES = dict(SMALL,                 # our own, for two to three minutes on two CPU cores
    arch="resnet10x0.25",
    epochs=13, batch_size=64, lr=12.0, weight_decay=1e-6, warmup_epochs=0.5,
    color_strength=1.0,              # one tint an image, which is what the jitter erases
    min_scale=0.4,                   # smaller crops often miss the object
    knn_every=4,
)
RECIPES = dict(shapes=SHAPES, small=SMALL, imagenet=IMAGENET)


# ------------------------------------------------------------------------------------------------ augmentation (appendix A)

@common.by_pieces
def augment(x, strength, blur):
    """Crops (N, 3, S, S) in 0..1, half of them mirrored -> views of the same form, each with its own draws; not normalised, as in the official code."""
    x = common.color_jitter(x, 0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength, p=0.8)
    x = common.grayscale(x, p=0.2)
    if blur:
        x = common.gaussian_blur(x, p=blur, sigma=(0.1, 2.0), kernel_size=2 * (x.shape[-1] // 20) + 1)      # a tenth of the side: 23 at 224
    return x


# ------------------------------------------------------------------------------------------------ model (figure 2, section 4.2)

class SimCLR(nn.Module):
    def __init__(self, arch, stem, head, dim):
        super().__init__()
        self.encoder = common.resnet(arch, stem=stem, zero_init=True)
        self.projector = projector(self.encoder.dim, head, dim)

    def forward(self, x):
        h = self.encoder(x)          # (N, D)
        return self.projector(h)     # (N, d)


def projector(dim_in, head, dim):
    """g of section 4.2: "nonlinear" is W2 relu(W1 h), "linear" is W h, "none" gives h to the loss."""
    if head == "none":
        return nn.Identity()
    hidden = [nn.Linear(dim_in, dim_in, bias=False), nn.BatchNorm1d(dim_in), nn.ReLU()] if head == "nonlinear" else []
    last = [nn.Linear(dim_in, dim, bias=False), nn.BatchNorm1d(dim)]
    last[1].bias.requires_grad_(False)           # scale only
    for layer in hidden[:1] + last[:1]:
        nn.init.normal_(layer.weight, std=0.01)
    return nn.Sequential(*hidden, *last)


# ------------------------------------------------------------------------------------------------ loss (equation 1)

def nt_xent(z1, z2, temperature):
    """The normalised temperature-scaled cross entropy of Algorithm 1, a scalar: the mean over the 2N views of this process.

    z1, z2 (N, d): projections of the two views of N images, any scale, any float type; at least float32 is computed in. Over several processes
    the negatives come from all of them, every process must hold N images, and the mean that DDP takes of the gradients is exactly the gradient of
    the loss of the whole batch (`gather` sends it back to where each z was made), with no factor for the number of processes.
    """
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = (F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1) for z in (z1, z2))
        all1, all2 = gather(z1), gather(z2)                                                # (NW, d)
        logits = torch.cat([z1, z2]) @ torch.cat([all1, all2]).T / temperature             # (2N, 2NW)
        n, total = len(z1), len(all1)
        mine = torch.arange(n, device=z1.device) + n * (dist.get_rank() if total > n else 0)       # the columns of z1
        itself, other = torch.cat([mine, mine + total]), torch.cat([mine + total, mine])   # (2N,)
        logits = logits.scatter(1, itself[:, None], -math.inf)                             # k != i
        return F.cross_entropy(logits, other)


def gather(z):
    """(N, d) of each process -> (NW, d) of all, in the order of the processes, with gradient. The same tensor in a single process."""
    return Gather.apply(z) if dist.is_initialized() and dist.get_world_size() > 1 else z


class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        everyones = [torch.empty_like(z) for _ in range(dist.get_world_size())]
        dist.all_gather(everyones, z.contiguous())
        return torch.cat(everyones)

    @staticmethod
    def backward(ctx, gradient):                 # (NW, d): what this process's loss wants of everyone's z
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)                # what all losses want
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


# ------------------------------------------------------------------------------------------------ training (Algorithm 1, sections 2.2 and 2.3)

def train(args, device):
    data = common.load_data(args.data, args.root, "pretrain", device)
    batches = common.Batches(data, [common.Crop(2, args.size, (args.min_scale, 1.0), flip=0.5, interpolation="bicubic")], args.batch_size, args.seed)

    torch.manual_seed(args.seed)
    model = SimCLR(args.arch, args.stem, args.head, args.dim).to(device, memory_format=torch.channels_last)
    optimizer = common.LARS(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
    run = common.Run("simclr", args, model, optimizer, batches, entries=lambda loss: dict(bound=math.log(2 * args.batch_size - 1) - loss))

    network = model
    if common.world_size() > 1:
        if device.type == "cuda":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)       # statistics of all processes: section 2.2, Global BN
        else:
            common.say("BatchNorm takes its statistics in each process alone: torch has no SyncBatchNorm for CPUs")
        network = DistributedDataParallel(network)
    if args.compile:
        network = torch.compile(network)

    peak_lr = args.lr * (args.batch_size / 256 if args.lr_scaling == "linear" else args.batch_size ** 0.5 / 4)       # both 4.8 at 4096
    warmup, total = args.warmup_epochs * len(batches), args.epochs * len(batches)

    for step, (x1, x2), indices in run:
        if step < warmup:
            lr = peak_lr * min(1, (step + 1) / warmup)
        else:
            lr = peak_lr * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr

        x1, x2 = augment(x1, args.color_strength, args.blur), augment(x2, args.color_strength, args.blur)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            z = network(torch.cat([x1, x2]))                                 # (2N, d)
        z1, z2 = z.chunk(2)
        loss = nt_xent(z1, z2, args.temperature)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss, lr, z1, [x1, x2])


# ------------------------------------------------------------------------------------------------ flags

def parse_args(argv=None):
    parser = common.Parser(__doc__, RECIPES, argv)
    parser.add_argument("--temperature", type=common.positive, help="of the softmax, tau")
    parser.add_argument("--head", choices=["nonlinear", "linear", "none"], help="the projector, section 4.2")
    parser.add_argument("--dim", type=common.count, help="width of the projection")
    parser.add_argument("--color-strength", type=common.not_negative, help="of the colour jitter, s of appendix A")
    parser.add_argument("--blur", type=common.share, help="probability of the Gaussian blur")
    parser.add_argument("--min-scale", type=common.share, help="smallest share of the image's area that a crop has")
    parser.add_argument("--lr-scaling", choices=["linear", "sqrt"], help="lr * batch / 256, or lr * sqrt(batch) / 4 (B.1)")
    return parser.parse()


if __name__ == "__main__":
    common.launch(train, parse_args())
