"""MoCo: Momentum Contrast for Unsupervised Visual Representation Learning (v1).
He, Fan, Wu, Xie, Girshick, CVPR 2020, arXiv 1911.05722.
Improved Baselines with Momentum Contrastive Learning (v2). Chen et al. 2020, arXiv 2003.04297.

Idea. One view of an image, the query, must recognise the other, the key, among the keys of earlier
images. They wait in a queue, so that their number does not depend on the batch size. Because they
were made at different times, the encoder that makes them must change slowly: it is a moving average
of the one that learns.

Objective (v1, equation 1), a mean over the queries, and the momentum update (v1, equation 2):
    L = -log  exp(q . k+ / tau) / (exp(q . k+ / tau) + sum over the queue of exp(q . k / tau))
    theta_k <- m theta_k + (1 - m) theta_q

Notation. N images in the global batch.
    x_q, x_k     x1, x2                         (N, 3, S, S)   the two views
    f_q          encoder, projector; q          (N, d)         unit length; h (N, D) is what is kept
    f_k          key_encoder, key_projector; k  (N, d)         unit length
    queue        queue                          (K, d)         K is the number of prototypes in SwAV
    tau, m       temperature, ema_momentum                     tau is the momentum in BYOL
Shuffling: by its batch statistics BN tells which images share a batch. A query could find its key
by that instead of by what the image shows (v1, A.9: pretext accuracy above 99.9 %, falling kNN), so
keys are encoded in shuffled batches. In one process `--bn-splits` makes BN see parts of a batch.
Once the queue is full of keys the loss is near ln(K + 1), 11.09 for K = 65536, and falls.

Published: ImageNet, ResNet-50, 200 epochs: linear 60.6 % (v1), 67.5 % (v2). Ours: RESULTS.md.

Differs from the papers: the cosine falls in every step, not once an epoch; `small` normalises with
ImageNet's mean and standard deviation, not CIFAR's, and has v2's head.
Usage:  python moco.py    torchrun --nproc_per_node=8 moco.py --data /path/to/imagenet
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
    version=2,
    arch="resnet50", stem="imagenet", size=224,
    epochs=200, batch_size=256,         # v1, section 4
    lr=0.03, optimizer="sgd", weight_decay=1e-4,        # v1, section 4; decay on everything
    warmup_epochs=0,
    queue_size=65536, ema_momentum=0.999,               # v1, section 4
    temperature=0.2,                    # v2, section 3, MLP head
    dim=128,
    bn_splits=8 if common.WORLD_SIZE == 1 else 1,       # the paper has 8 GPUs of 32 images
    color_strength=1.0, blur=0.5,       # v2, section 3
    min_scale=0.2,
    knn_every=0,
)
SMALL = dict(                           # the authors' CIFAR-10 demonstration
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
VERSION_1 = dict(version=1, temperature=0.07, blur=0.0)                 # v1, section 3.3
RECIPES.update({f"{name}-v1": dict(recipe, **VERSION_1) for name, recipe in RECIPES.items()})

# ------------------------------------------------------------------- augmentation (v1 3.3, v2 3)

@common.in_chunks
def augment(x, version, strength, blur):
    """Crops (N, 3, S, S) in 0..1, half of them flipped -> views, normalised."""
    if version == 1:
        x = common.grayscale(x, p=0.2)
        x = common.color_jitter(x, 0.4 * strength, 0.4 * strength, 0.4 * strength, 0.4 * strength,
                                p=1.0)
    else:
        x = common.color_jitter(x, 0.4 * strength, 0.4 * strength, 0.4 * strength, 0.1 * strength)
        x = common.grayscale(x, p=0.2)
    if blur:
        x = common.gaussian_blur(x, p=blur, sigma=(0.1, 2.0))
    return common.normalize(x, MEAN, STD)

# ------------------------------------------------------------------- model (v1, Algorithm 1)

class MoCo(nn.Module):
    def __init__(self, arch, stem, version, dim, queue_size, bn_splits):
        super().__init__()
        self.encoder = common.resnet(arch, stem=stem)
        split_batch_norm(self.encoder, bn_splits)
        self.projector = projector(self.encoder.dim, version, dim)
        self.key_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.key_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1))

    def forward(self, x_q, x_k, order):
        q = F.normalize(self.projector(self.encoder(x_q)).float(), dim=1)               # (N, d)
        with torch.no_grad():
            x_k = shuffle(x_k, order)
            k = F.normalize(self.key_projector(self.key_encoder(x_k)).float(), dim=1)
            k, keys = unshuffle(k, order)                       # this process's, all processes'
        return q, k, keys

    @torch.no_grad()
    def update_key_encoder(self, ema_momentum):
        """Equation 2, for parameters only: the key encoder's BN statistics are its own."""
        theta_k = [*self.key_encoder.parameters(), *self.key_projector.parameters()]
        theta_q = [*self.encoder.parameters(), *self.projector.parameters()]
        torch._foreach_lerp_(theta_k, theta_q, 1 - ema_momentum)    # all parameters at once

    @torch.no_grad()
    def enqueue(self, keys, step):
        """The keys (M, d) of this step replace the oldest ones of the queue. M divides K."""
        oldest = step * len(keys) % len(self.queue)
        self.queue[oldest:oldest + len(keys)] = keys

def projector(dim_in, version, dim):
    """v1: linear; v2: linear, ReLU, linear. No BN."""
    if version == 1:
        return nn.Sequential(nn.Linear(dim_in, dim))
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

# ------------------------------------------------------------------- loss (v1, equation 1)

def info_nce(q, k, queue, temperature):
    """MoCo v1, equation 1: a scalar, the mean over the queries. q, k (N, d), queue (K, d), of unit
    length; the gradient flows into q alone."""
    positive = (q * k.detach()).sum(1, keepdim=True)            # (N, 1)
    negative = q @ queue.detach().T                             # (N, K)
    logits = torch.cat([positive, negative], dim=1) / temperature
    target = torch.zeros(len(q), dtype=torch.int64, device=q.device)    # column 0 is the positive
    return F.cross_entropy(logits, target)

# ------------------------------------------------------------------- training (v1, Algorithm 1)

def learning_rate(step, warmup, total, version):
    """As a fraction of the peak: a linear warm-up, if any, then v1: a tenth after 60 % and 80 % of
    the run (120 and 160 of 200 epochs); v2: a half cosine to 0."""
    if step < warmup:
        return step / warmup
    if version == 1:
        return 0.1 ** ((step >= 0.6 * total) + (step >= 0.8 * total))
    return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2

def train(args, device):
    data = common.load_data(args.data, args.root, "pretrain", device)
    crop = common.Crop(2, args.size, (args.min_scale, 1.0), flip=0.5)
    batches = common.Batches(data, [crop], args.batch_size, args.seed)

    torch.manual_seed(args.seed)
    model = MoCo(args.arch, args.stem, args.version, args.dim, args.queue_size, args.bn_splits)
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
        lr = peak_lr * learning_rate(step, warmup, run.total, args.version)
        for group in optimizer.param_groups:
            group["lr"] = lr

        x = augment(torch.cat([x1, x2]), args.version, args.color_strength, args.blur)
        x1, x2 = x.chunk(2)
        model.update_key_encoder(args.ema_momentum)                     # before the keys are made
        order = permutation(args.batch_size, step, args.shuffle).to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            q, k, keys = network(x1, x2, order)                         # (N / W, d) twice, (N, d)
        loss = info_nce(q, k, model.queue, args.temperature)
        if args.symmetric:
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                q2, k2, keys2 = network(x2, x1, order)
            loss = loss + info_nce(q2, k2, model.queue, args.temperature)
            keys = torch.cat([keys, keys2])

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.enqueue(keys, step)                                       # after they were scored
        run.finish_step(loss, lr, q, [x1, x2])

def permutation(n, step, shuffled=True):
    """(n,) the order of the keys' images in `step`, the same in every process."""
    if not shuffled:
        return torch.arange(n)
    return torch.randperm(n, generator=torch.Generator().manual_seed(step))

# ------------------------------------------------------------------- flags

def parse_args(argv=None):
    parser = common.Parser(__doc__, RECIPES, argv)
    add = parser.add_argument
    add("--version", type=int, choices=[1, 2],
        help="1: linear head, v1's augmentation, step schedule; 2: MLP head, blur, cosine")
    add("--temperature", type=common.positive, help="softmax temperature")
    add("--ema-momentum", type=common.fraction, help="momentum of the key encoder")
    add("--queue-size", type=common.count, help="number of keys in the queue, K")
    add("--dim", type=common.count, help="dimension of the projection")
    add("--bn-splits", type=common.count, help="parts of a process's batch that BN sees apart")
    add("--no-shuffle", dest="shuffle", action="store_false", help="do not shuffle keys (v1, A.9)")
    add("--symmetric", action="store_true", help="each view is the query once; losses are added")
    add("--optimizer", choices=["sgd", "adamw"], help="the paper's is sgd")
    add("--color-strength", type=common.not_negative, help="strength of the colour jitter")
    add("--min-scale", type=common.fraction, help="smallest crop area as a fraction of the image")
    args = parser.parse()
    keys = args.batch_size * (2 if args.symmetric else 1)
    images = args.batch_size // common.WORLD_SIZE
    if args.queue_size % keys:
        parser.error(f"--queue-size {args.queue_size}: not a multiple of the {keys} keys of a step")
    if images % args.bn_splits or images < 2 * args.bn_splits:
        parser.error(f"--bn-splits {args.bn_splits}: does not cut the {images} images of a process "
                     "into equal parts of at least 2")
    return args

if __name__ == "__main__":
    common.launch(train, parse_args)
