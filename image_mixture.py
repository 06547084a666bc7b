"""Image mixture: MoCo v2 with mixed images.
Un-Mix: Rethinking Image Mixtures for Unsupervised Visual Representation Learning.
Shen, Liu, Liu, Savvides, Darrell, Xing, 2020 and AAAI 2022, arXiv 2003.05438.

Idea. Show the network images with others blended or pasted into them: it must tell how much of
which is there, and becomes less sure of its pretext task. Two algorithms have this name.
    global, region, both   2020: blends, squares of other images, or both, in some images, alike in
                           both views; the loss stays as it is
    unmix                  2022: one more query of the batch mixed with itself in reverse order,
                           m = lambda x_q + (1 - lambda) reversed x_q, or with a square of it, and
                           two positives, weighted by their shares

Objective, with MoCo's L(q, k) of queries q and keys k (moco.py):
    L(x_q, x_k) + lambda L(m, x_k) + (1 - lambda) L(reversed m, x_k)                        (unmix)

Notation. N images in the global batch; all else as in moco.py.
    lambda       share          the share of image i in m_i; 1 - lambda is that of image N - 1 - i
    q_m          q_mixed        (N, d)      the queries of m
Once the queue is full of keys the loss is near ln(K + 1), with unmix near twice that, and falls.
Published (official README): CIFAR-10, ResNet-18, 1000 epochs, kNN: MoCo 89.1, with Un-Mix 91.3 %.

Differs: the other image of the 2020 form is one of the same process's batch, there of the data set;
squares have the blends' Beta distribution. The recipes are moco.py's, with its two-layer head.

Usage:  python image_mixture.py --mixture unmix
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
    mixture="unmix", mix_alpha=1.0,     # shares are from Beta(alpha, alpha)
    mix_count=2, mix_probability=0.1,   # 2020: mixtures of an image, and the probability of each
    unmix_global=0.5,                   # official scripts; by default the ImageNet code has 0
    arch="resnet50", stem="imagenet", size=224,
    epochs=200, batch_size=256,         # MoCo v1, section 4
    lr=0.03, optimizer="sgd", weight_decay=1e-4,        # MoCo v1, section 4
    warmup_epochs=0,
    queue_size=65536, ema_momentum=0.999,               # MoCo v1, section 4
    temperature=0.2,                    # MoCo v2
    dim=128,
    bn_splits=8 if common.WORLD_SIZE == 1 else 1,       # the paper has 8 GPUs of 32 images
    color_strength=1.0, blur=0.5,       # MoCo v2
    min_scale=0.2,
    knn_every=0,
)
SMALL = dict(                           # after official unmix_c10.py
    IMAGENET, arch="resnet18", stem="small", size=32,
    epochs=200, batch_size=512, lr=0.03, weight_decay=5e-4,
    queue_size=4096, ema_momentum=0.99, temperature=0.1, bn_splits=8,
    blur=0.0, min_scale=0.08,
    knn_every=10,
)
SHAPES = dict(                          # ours, for a few minutes on two CPU cores
    SMALL, arch="resnet10x0.25", size=24,
    epochs=10, batch_size=64, lr=0.016, optimizer="adamw", weight_decay=1e-4, warmup_epochs=1,
    queue_size=2048, temperature=0.1, bn_splits=4,
    color_strength=2.0,                 # one tint per image, which is what the jitter removes
    min_scale=0.4,                      # smaller crops often miss the object
    knn_every=2,
)
RECIPES = dict(shapes=SHAPES, small=SMALL, imagenet=IMAGENET)

# ------------------------------------------------------------------- augmentation (MoCo v2)

@common.in_chunks
def augment(x, strength, blur):
    """Crops (N, 3, S, S) in 0..1, half of them flipped -> views, normalised."""
    x = common.color_jitter(x, 0.4 * strength, 0.4 * strength, 0.4 * strength, 0.1 * strength)
    x = common.grayscale(x, p=0.2)
    if blur:
        x = common.gaussian_blur(x, p=blur, sigma=(0.1, 2.0))
    return common.normalize(x, MEAN, STD)

# ------------------------------------------------------------------- mixtures (official code)

def mixture(views, kind, alpha, count, probability):
    """The form of 2020, "global", "region" or "both": blends, then squares, in place. views: a list
    of (N, C, S, S), which are mixed alike, with the same views of the same other image.

    Up to `count` times, each with `probability`: x <- s x + (1 - s) x' with s from Beta(alpha,
    alpha); then likewise a square of area 1 - s of x', centred anywhere and clipped at the border,
    replaces that of x."""
    n = len(views[0])
    for level in ("global", "region") if kind == "both" else (kind,):
        originals = [x.clone() for x in views]
        for _ in range(count):
            chosen = (torch.rand(n) < probability).nonzero()[:, 0]
            other = (chosen + torch.randint(1, max(n, 2), chosen.shape)) % n
            share = torch.distributions.Beta(alpha, alpha).sample((len(chosen),))
            centre = torch.rand(len(chosen), 2)
            for x, original in zip(views, originals):
                here = chosen.to(x.device, non_blocking=True)
                there = original[other.to(x.device, non_blocking=True)]
                weight = share[:, None, None, None]                     # of x
                if level == "region":
                    weight = 1 - squares(1 - share, centre, x.shape[2]).float()
                mixed = there.lerp(x[here], weight.to(x.device, non_blocking=True))
                x.index_copy_(0, here, mixed)

def unmix(x, global_share, alpha):
    """Un-Mix of 2022: the batch (N, C, S, S) mixed with itself in reverse order, and the share: a
    number. mixed[i] has `share` of image i, and mixed.flip(0)[i] the rest. The share is from
    Beta(alpha, alpha); with probability `global_share` images are blended, otherwise a square of
    the other replaces that of each, and the share is what this really leaves."""
    share = torch.distributions.Beta(alpha, alpha).sample((1,))
    centre = torch.rand(1, 2)
    if torch.rand(()) < global_share:
        return x.flip(0).lerp(x, share.item()), share.item()
    square = squares(1 - share, centre, x.shape[2])
    mixed = torch.where(square.to(x.device, non_blocking=True), x.flip(0), x)
    return mixed, 1 - square.float().mean().item()

def squares(area, centre, size):
    """(M,) areas and (M, 2) centres in 0..1 -> (M, 1, size, size), True in such squares."""
    pixel = (torch.arange(size) + 0.5) / size
    near = (pixel - centre[:, :, None]).abs() < area.sqrt()[:, None, None] / 2      # (M, 2, size)
    return (near[:, 0, :, None] & near[:, 1, None, :])[:, None]

# ------------------------------------------------------------------- model (MoCo)

class MoCo(nn.Module):
    def __init__(self, arch, stem, dim, queue_size, bn_splits):
        super().__init__()
        self.encoder = common.resnet(arch, stem=stem)
        split_batch_norm(self.encoder, bn_splits)
        self.projector = projector(self.encoder.dim, dim)
        self.key_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.key_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1))

    def forward(self, x_q, x_k=None, order=None):
        q = F.normalize(self.projector(self.encoder(x_q)).float(), dim=1)               # (N, d)
        if x_k is None:
            return q
        with torch.no_grad():
            x_k = shuffle(x_k, order)
            k = F.normalize(self.key_projector(self.key_encoder(x_k)).float(), dim=1)
            k, keys = unshuffle(k, order)                       # this process's, all processes'
        return q, k, keys

    @torch.no_grad()
    def update_key_encoder(self, ema_momentum):
        """MoCo's equation 2, for parameters only: the key encoder's BN statistics are its own."""
        theta_k = [*self.key_encoder.parameters(), *self.key_projector.parameters()]
        theta_q = [*self.encoder.parameters(), *self.projector.parameters()]
        torch._foreach_lerp_(theta_k, theta_q, 1 - ema_momentum)    # all parameters at once

    @torch.no_grad()
    def enqueue(self, keys, step):
        """The keys (M, d) of this step replace the oldest ones of the queue. M divides K."""
        oldest = step * len(keys) % len(self.queue)
        self.queue[oldest:oldest + len(keys)] = keys

def projector(dim_in, dim):
    """Linear, ReLU, linear. No BN."""
    return nn.Sequential(nn.Linear(dim_in, dim_in), nn.ReLU(), nn.Linear(dim_in, dim))

def shuffle(x, order):
    """Shuffle the images (N / W, ...) of all processes by `order` (N,)."""
    mine = order.chunk(common.WORLD_SIZE)[common.RANK]
    return common.gather(x)[mine]

def unshuffle(k, order):
    """Keys (N / W, ...) of shuffled images -> the keys of this process's own images, and all keys
    (N, ...), in the order before `shuffle`."""
    shuffled = common.gather(k)
    keys = torch.empty_like(shuffled).index_copy_(0, order, shuffled)
    return keys.chunk(common.WORLD_SIZE)[common.RANK], keys

class SplitBatchNorm2d(nn.BatchNorm2d):
    """BN over each of `splits` parts of a batch, as over so many processes: image i is in part i
    modulo `splits`. Running statistics are the mean over the parts."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        n, c, h, w = x.shape
        mean = self.running_mean.repeat(self.splits)
        var = self.running_var.repeat(self.splits)
        y = F.batch_norm(x.reshape(n // self.splits, self.splits * c, h, w), mean, var,
                         self.weight.repeat(self.splits), self.bias.repeat(self.splits), True,
                         self.momentum, self.eps)
        self.running_mean.copy_(mean.view(self.splits, c).mean(0))
        self.running_var.copy_(var.view(self.splits, c).mean(0))
        return y.view(n, c, h, w)

def split_batch_norm(model, splits):
    """Turn every BatchNorm2d of the model into a split one."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and splits > 1:
            module.__class__ = SplitBatchNorm2d
            module.splits = splits

# ------------------------------------------------------------------- loss (MoCo, equation 1)

def info_nce(q, k, queue, temperature):
    """MoCo v1, equation 1: a scalar, the mean over the queries. q, k (N, d), queue (K, d), of unit
    length; the gradient flows into q alone."""
    positive = (q * k.detach()).sum(1, keepdim=True)            # (N, 1)
    negative = q @ queue.detach().T                             # (N, K)
    logits = torch.cat([positive, negative], dim=1) / temperature
    target = torch.zeros(len(q), dtype=torch.int64, device=q.device)    # column 0 is the positive
    return F.cross_entropy(logits, target)

# ------------------------------------------------------------------- training (MoCo)

def learning_rate(step, warmup, total):
    """As a fraction of the peak: a linear warm-up, if any, then a half cosine to 0."""
    if step < warmup:
        return step / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2

def train(args, device):
    data = common.load_data(args.data, args.root, "pretrain", device)
    crop = common.Crop(2, args.size, (args.min_scale, 1.0), flip=0.5)
    batches = common.Batches(data, [crop], args.batch_size, args.seed)

    torch.manual_seed(args.seed)
    model = MoCo(args.arch, args.stem, args.dim, args.queue_size, args.bn_splits)
    model.to(device, memory_format=torch.channels_last)
    weights = [w for w in model.parameters() if w.requires_grad]
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(weights, args.lr, weight_decay=args.weight_decay)
    else:
        optimizer = torch.optim.SGD(weights, args.lr, 0.9, weight_decay=args.weight_decay)
    run = common.Run(args, model, optimizer, batches, MEAN, STD)

    network = common.distribute(model, args.compile)                    # DDP; BN per process

    peak_lr = args.lr * args.batch_size / 256
    warmup = args.warmup_epochs * len(batches)

    for step in range(run.step, run.total):
        x1, x2 = run.crops(step)
        lr = peak_lr * learning_rate(step, warmup, run.total)
        for group in optimizer.param_groups:
            group["lr"] = lr

        x = augment(torch.cat([x1, x2]), args.color_strength, args.blur)
        x1, x2 = x.chunk(2)
        views = [x1, x2]
        if args.mixture in ("global", "region", "both"):
            mixture(views, args.mixture, args.mix_alpha, args.mix_count, args.mix_probability)
        model.update_key_encoder(args.ema_momentum)                     # before the keys are made
        generator = torch.Generator().manual_seed(step)                 # the same in every process
        order = torch.randperm(args.batch_size, generator=generator)
        order = order.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            q, k, keys = network(x1, x2, order)                         # (N / W, d) twice, (N, d)
        loss = info_nce(q, k, model.queue, args.temperature)
        if args.mixture == "unmix":                                     # keys are of whole images
            mixed, share = unmix(x1, args.unmix_global, args.mix_alpha)
            views.append(mixed)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                q_mixed = network(mixed)                                # (N / W, d)
            loss = (loss + share * info_nce(q_mixed, k, model.queue, args.temperature)
                    + (1 - share) * info_nce(q_mixed.flip(0), k, model.queue, args.temperature))

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.enqueue(keys, step)                                       # after they were scored
        run.finish_step(loss, lr, q, views)

# ------------------------------------------------------------------- flags

def parse_args(argv=None):
    parser = common.Parser(__doc__, RECIPES, argv)
    add = parser.add_argument
    add("--mixture", choices=["none", "global", "region", "both", "unmix"],
        help="global, region and both are of 2020, unmix is of 2022")
    add("--mix-alpha", type=common.positive, help="shares are from Beta(alpha, alpha)")
    add("--mix-probability", type=common.fraction, help="probability of each mixture of 2020")
    add("--unmix-global", type=common.fraction, help="probability that unmix blends")
    add("--temperature", type=common.positive, help="softmax temperature")
    add("--ema-momentum", type=common.fraction, help="momentum of the key encoder")
    add("--queue-size", type=common.count, help="number of keys in the queue, K")
    add("--bn-splits", type=common.count, help="parts of a process's batch that BN sees apart")
    add("--optimizer", choices=["sgd", "adamw"], help="the paper's is sgd")
    add("--color-strength", type=common.not_negative, help="strength of the colour jitter")
    add("--min-scale", type=common.fraction, help="smallest crop area as a fraction of the image")
    args = parser.parse()
    images = args.batch_size // common.WORLD_SIZE
    if args.queue_size % args.batch_size:
        parser.error(f"--queue-size {args.queue_size}: not a multiple of --batch-size")
    if images % args.bn_splits or images < 2 * args.bn_splits:
        parser.error(f"--bn-splits {args.bn_splits}: does not cut the {images} images of a process "
                     "into equal parts of at least 2")
    return args

if __name__ == "__main__":
    common.launch(train, parse_args)
