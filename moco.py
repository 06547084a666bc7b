"""MoCo: Momentum Contrast for Unsupervised Visual Representation Learning. He, Fan, Wu, Xie, Girshick, CVPR 2020, arXiv 1911.05722 (v1);
Improved Baselines with Momentum Contrastive Learning. Chen, Fan, Girshick, He, 2020, arXiv 2003.04297 (v2).

Idea. One view of an image, the query, must recognise the other, the key, among many keys of earlier images. Those wait in a queue, so that their
number does not hang on the batch; and because they were made at different times, the network that makes them must change slowly: it is a moving
average of the one that learns.

Objective (v1, equation 1), a mean over the queries, and the momentum update (v1, equation 2):

    L = -log  exp(q . k+ / tau) / (exp(q . k+ / tau) + sum over the queue of exp(q . k / tau)),      theta_k <- m theta_k + (1 - m) theta_q

Notation. N images in the batch of one process, W processes.
    x_q, x_k     x1, x2                         (N, 3, S, S)   the two views
    f_q          encoder, projector; q          (N, d)         unit length; h (N, D) before the projector is what is kept
    f_k          key_encoder, key_projector; k  (N, d)         unit length
    queue        queue                          (K, d)         K is the number of prototypes in SwAV
    tau, m       temperature, ema_momentum                     tau is the momentum in BYOL

Why shuffle: BatchNorm lets a network see which images share its batch. If a query and its key always have the same companions, the network tells by
those which key is the right one, and learns nothing. So the keys are shuffled over the processes before they are encoded, and back afterwards.
In a single process there is but one batch; --bn-splits makes BatchNorm see it in parts, and the keys are shuffled over the parts.

Start value ln(K + 1) = 11.09 for K = 65536, once the queue is full of keys. The log's `bound`, ln(K + 1) - loss, is a lower bound on the mutual
information of query and key as in simclr.py, and cannot exceed ln(K + 1). But it holds only if the keys of the queue are distributed like k+: they
come from older networks, and the faster these change the less it means; nothing before the queue is full of keys. Where several losses are added
(`--symmetric`, `--mixture unmix`) both are meant for their mean.

Image mixture (Shen et al., arXiv 2003.05438) is an option. `--mixture global|region|both`, its form of 2020, shows the network images with others of the
batch blended or pasted into them, the same in both views, and leaves the loss alone. `--mixture unmix`, Un-Mix of 2022, adds a query of the batch mixed
with itself in reverse order, m = lambda x_q + (1 - lambda) reversed x_q or with a square of it, and the loss
lambda L(m, k) + (1 - lambda) L(reversed m, k).

Published: ImageNet, ResNet-50, 200 epochs: linear probe 60.6 % (v1), 67.5 % (v2), 71.1 % after 800 (v2).
Ours: embedded shapes, `python moco.py` with seeds 0, 1, 2, 2026-11-21: kNN 75.4, 72.3, 75.5 % (untrained 21.9, 23.6, 28.2 %,
pixels 37.0 %). CIFAR-10: see the README. ImageNet: not run yet.

Differs from the papers:
    - The order of the colour operations is drawn for every 64 images instead of for each. The cosine falls in every step, not once an epoch.
    - The recipe for the embedded `shapes` is ours: a narrow network, small batches, few epochs, and AdamW instead of SGD.

Usage:
    python moco.py                                                                a few minutes on two CPU cores
    torchrun --nproc_per_node=8 moco.py --data /path/to/imagenet                  ResNet-50 on 8 GPUs
"""
import copy, math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import common

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

IMAGENET = dict(
    version=2,
    arch="resnet50", stem="imagenet", size=224,
    epochs=200, batch_size=256,      # v1, section 4
    lr=0.03, optimizer="sgd", weight_decay=1e-4,     # v1, section 4; decay on everything
    warmup_epochs=0,
    queue_size=65536, ema_momentum=0.999,            # v1, section 4
    temperature=0.2,                 # v2, section 3, MLP head (v1: 0.07)
    dim=128,
    bn_splits=1,
    color_strength=1.0, blur=0.5,    # v2 (v1: no blur)
    min_scale=0.2,
    knn_every=0,
)
SMALL = dict(IMAGENET,               # the authors' CIFAR-10 demonstration, whose head is linear; here v2's
    arch="resnet18", stem="small", size=32,
    epochs=200, batch_size=512, lr=0.03, weight_decay=5e-4,
    queue_size=4096, ema_momentum=0.99, temperature=0.1,
    bn_splits=8, blur=0.0, min_scale=0.08,
    knn_every=10,
)
SHAPES = dict(SMALL,                 # our own, for a few minutes on two CPU cores
    arch="resnet10x0.25",
    epochs=30, batch_size=64, lr=0.016, optimizer="adamw", weight_decay=1e-4, warmup_epochs=1,
    queue_size=2048, temperature=0.2, bn_splits=4,
    color_strength=2.0,              # one tint an image, which is what the jitter erases
    min_scale=0.4,                   # smaller crops often miss the object
    knn_every=5,
)
RECIPES = dict(shapes=SHAPES, small=SMALL, imagenet=IMAGENET)
VERSION_1 = dict(version=1, temperature=0.07)       # v1, section 3.3


# ------------------------------------------------------------------------------------------------ augmentation (v1 section 3.3, v2 section 3)

@common.by_pieces
def augment(x, version, strength, blur):
    """Crops (N, 3, S, S) in 0..1, half of them mirrored -> views of the same form, each with its own draws, normalised."""
    if version == 1:
        x = common.grayscale(x, p=0.2)
        x = common.color_jitter(x, 0.4 * strength, 0.4 * strength, 0.4 * strength, 0.4 * strength, p=1.0)
    else:
        x = common.color_jitter(x, 0.4 * strength, 0.4 * strength, 0.4 * strength, 0.1 * strength, p=0.8)
        x = common.grayscale(x, p=0.2)
        if blur:
            x = common.gaussian_blur(x, p=blur, sigma=(0.1, 2.0))
    return common.normalize(x, MEAN, STD)


# ------------------------------------------------------------------------------------------------ model (v1 figure 1, Algorithm 1)

class MoCo(nn.Module):
    def __init__(self, arch, stem, version, dim, queue_size, bn_splits):
        super().__init__()
        encoder = common.resnet(arch, stem=stem)
        self.encoder = split_batch_norm(encoder, bn_splits) if bn_splits > 1 else encoder
        self.projector = projector(self.encoder.dim, version, dim)
        self.key_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.key_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))               # where the oldest keys are

    def forward(self, x_q, x_k=None):
        q = F.normalize(self.projector(self.encoder(x_q)).float(), dim=1)                # (N, d)
        if x_k is None:
            return q
        with torch.no_grad():
            x_k, order = shuffle(x_k)
            k = F.normalize(self.key_projector(self.key_encoder(x_k)).float(), dim=1)
            k, keys = unshuffle(k, order)                                                # (N, d), (NW, d)
        return q, k, keys

    @torch.no_grad()
    def update_keys_network(self, ema_momentum):
        """Equation 2, on parameters only: the key network's BN statistics are its own."""
        for learned, average in ((self.encoder, self.key_encoder), (self.projector, self.key_projector)):
            for theta_q, theta_k in zip(learned.parameters(), average.parameters()):
                theta_k.lerp_(theta_q, 1 - ema_momentum)

    @torch.no_grad()
    def enqueue(self, keys):
        """The newest keys (M, d), of all processes, take the place of the oldest. M divides K."""
        start = int(self.pointer)
        self.queue[start:start + len(keys)] = keys
        self.pointer[0] = (start + len(keys)) % len(self.queue)


def projector(dim_in, version, dim):
    """v1: linear; v2: linear, ReLU, linear. No BN."""
    hidden = [nn.Linear(dim_in, dim_in), nn.ReLU()] if version == 2 else []
    return nn.Sequential(*hidden, nn.Linear(dim_in, dim))


@torch.no_grad()
def shuffle(x):
    """Deal the images (N, ...) of all processes out anew. Returns N of them and the order (NW,) that `unshuffle` needs."""
    everyones = gather(x)                                                                # (NW, ...)
    order = torch.randperm(len(everyones)).to(x.device)
    if len(everyones) > len(x):
        dist.broadcast(order, 0)                                                         # the same in every process
    first = common.rank() * len(x) if len(everyones) > len(x) else 0
    return everyones[order[first:first + len(x)]], order


@torch.no_grad()
def unshuffle(k, order):
    """Keys (N, d) of shuffled images -> this process's own keys (N, d) and all keys (NW, d), in the order before `shuffle`."""
    everyones = gather(k)
    keys = torch.empty_like(everyones)
    keys[order] = everyones
    first = common.rank() * len(k) if len(keys) > len(k) else 0
    return keys[first:first + len(k)], keys


def gather(x):
    """(N, ...) of each process -> (NW, ...) of all, without gradient. The same tensor in a single process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    everyones = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, x.contiguous())
    return torch.cat(everyones)


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that takes the statistics of each of `splits` parts of a batch apart: what several processes would do."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        return torch.cat([super(SplitBatchNorm2d, self).forward(part) for part in x.chunk(self.splits)])


def split_batch_norm(model, splits):
    """Turn every BatchNorm2d of the model into a split one."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__, module.splits = SplitBatchNorm2d, splits
            module.momentum = 1 - (1 - module.momentum) ** (1 / splits)                  # the parts of a step weigh as much as one batch
    return model


# ------------------------------------------------------------------------------------------------ loss (v1 equation 1)

def info_nce(q, k, queue, temperature):
    """InfoNCE, a scalar: the mean over the queries of this process. Queries of other processes take no part, so that DDP's mean is exact.

    q, k (N, d) and queue (K, d) of unit length; any float type, at least float32 is computed in. The gradient flows into q alone.
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k, queue = (v.to(torch.promote_types(q.dtype, torch.float32)) for v in (q, k.detach(), queue.detach()))
        positive = (q * k).sum(1, keepdim=True)                                          # (N, 1)
        negative = q @ queue.T                                                           # (N, K)
        logits = torch.cat([positive, negative], 1) / temperature
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device))      # the positive is column 0


# ------------------------------------------------------------------------------------------------ training (v1 Algorithm 1)

def train(args, device):
    data = common.load_data(args.data, args.root, "pretrain", device)
    batches = common.Batches(data, [common.Crop(2, args.size, (args.min_scale, 1.0), flip=0.5)], args.batch_size, args.seed)
    keys = args.batch_size * (2 if args.symmetric else 1)
    if args.queue_size % keys:
        raise common.UserError(f"--queue-size {args.queue_size}: not a multiple of the {keys} keys of a step")
    if args.batch_size // common.world_size() % args.bn_splits:
        raise common.UserError(f"--bn-splits {args.bn_splits}: does not divide the {args.batch_size // common.world_size()} images of a process")

    torch.manual_seed(args.seed)
    model = MoCo(args.arch, args.stem, args.version, args.dim, args.queue_size, args.bn_splits).to(device, memory_format=torch.channels_last)
    learned = [w for w in model.parameters() if w.requires_grad]
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(learned, lr=args.lr, weight_decay=args.weight_decay)
    else:
        optimizer = torch.optim.SGD(learned, lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
    losses = (2 if args.symmetric else 1) * (2 if args.mixture == "unmix" else 1)      # which are added
    run = common.Run("moco", args, model, optimizer, batches, MEAN, STD, entries=lambda loss: dict(bound=math.log(args.queue_size + 1) - loss / losses))

    network = model
    if common.world_size() > 1:
        network = DistributedDataParallel(network)                           # BN stays with each process: that is what shuffling is for
    if args.compile:
        network = torch.compile(network)

    peak_lr = args.lr * args.batch_size / 256
    warmup, total = args.warmup_epochs * len(batches), args.epochs * len(batches)

    for step, (x1, x2), indices in run:
        if args.version == 1:                                                # a tenth after 60 % and after 80 % of the epochs: 120 and 160 of 200
            lr = peak_lr * 0.1 ** ((step >= 0.6 * total) + (step >= 0.8 * total))
        elif step < warmup:
            lr = peak_lr * min(1, (step + 1) / warmup)
        else:
            lr = peak_lr * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr

        x1, x2 = augment(x1, args.version, args.color_strength, args.blur), augment(x2, args.version, args.color_strength, args.blur)
        views = [x1, x2]
        common.mixture(views, args.mixture, args.mix_alpha, args.mix_beta, args.mix_count, args.mix_probability, args.mix_decay)
        model.update_keys_network(args.ema_momentum)                         # before the keys are made
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            q, k, keys = network(x1, x2)                                     # (N, d), (N, d), (NW, d)
        queue, positives = model.queue.clone(), [k]
        loss = info_nce(q, k, queue, args.temperature)
        if args.symmetric:
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                q2, k2, keys2 = network(x2, x1)
            loss = loss + info_nce(q2, k2, queue, args.temperature)
            keys = torch.cat([keys, keys2])
            positives.append(k2)
        if args.mixture == "unmix":                                          # one query more, with two right keys; the keys are of whole images
            mixed, share = common.unmix(x1, args.unmix_global, args.mix_alpha)
            views.append(mixed)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                q_mixed = network(mixed)                                     # (N, d)
            for k in positives:
                loss = loss + share * info_nce(q_mixed, k, queue, args.temperature) + (1 - share) * info_nce(q_mixed.flip(0), k, queue, args.temperature)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.enqueue(keys)                                                  # after they were scored
        run.log(loss, lr, q, views)


# ------------------------------------------------------------------------------------------------ flags

def parse_args(argv=None):
    early = common.LineParser(add_help=False, allow_abbrev=False)
    early.add_argument("--version", type=int)
    version_1 = early.parse_known_args(argv)[0].version == 1
    recipes = {name: dict(recipe, **VERSION_1) if version_1 else recipe for name, recipe in RECIPES.items()}
    parser = common.Parser(__doc__, recipes, argv)
    parser.add_argument("--version", type=int, choices=[1, 2], help="1: linear head, first augmentation, rate in steps; 2: MLP head, blur, cosine")
    parser.add_argument("--temperature", type=common.positive, help="of the softmax, tau")
    parser.add_argument("--ema-momentum", type=common.share, help="of the key network, m")
    parser.add_argument("--queue-size", type=common.count, help="keys that wait, K; a multiple of the batch")
    parser.add_argument("--dim", type=common.count, help="width of the projection")
    parser.add_argument("--bn-splits", type=common.count, help="parts of a process's batch that BatchNorm sees apart")
    parser.add_argument("--symmetric", action="store_true", help="let each view be the query once, the losses added")
    parser.add_argument("--optimizer", choices=["sgd", "adamw"], help="the paper's is sgd")
    parser.add_argument("--color-strength", type=common.not_negative,
                        help="of the colour jitter, times (0.4, 0.4, 0.4, 0.1), in version 1 (0.4, 0.4, 0.4, 0.4)")
    parser.add_argument("--blur", type=common.share, help="probability of the Gaussian blur, in version 2")
    parser.add_argument("--min-scale", type=common.share, help="smallest share of the image's area that a crop has")
    parser.add_mixture()
    return parser.parse()


if __name__ == "__main__":
    common.launch(train, parse_args())
