"""DenseCL: Dense Contrastive Learning for Self-Supervised Visual Pre-Training.
Wang, Zhang, Shen, Kong, Li, CVPR 2021, arXiv 2011.09157.

Idea. MoCo v2 compares whole images and need not know where things are. So let every position
of the query's feature map recognise its counterpart in the key as well: the position whose backbone
features are the most similar. The negatives are keys of other images. Detection gains from it.

Objective (equations 1 to 4), with MoCo's L_q, and L_r, a mean over the queries and positions s:
    L = (1 - lambda) L_q + lambda L_r
    L_r(s) = -log  exp(r_s . t_c / tau) / (exp(r_s . t_c / tau) + sum of exp(r_s . t / tau))
    c = argmax over the key's positions u of  f_s . f'_u / (|f_s| |f'_u|)

Notation. N images in the global batch, P = S x S positions.
    x_q, x_k     x1, x2                                (N, 3, ., .)   the two views
    f, f'        encoder, key_encoder; maps            (N, P, D)      their mean h (N, D) is kept
    q, k         projector, key_projector              (N, d)         unit length, as in MoCo
    r, t         dense_projector, key_dense_projector  (N, P, d)      unit length
    queue        queue, dense_queue                    (K, d)         keys; dense keys, averaged
    lambda, m    dense_weight, ema_momentum
Shuffling: see moco.py. Once the queues are full of keys the loss is near ln(K + 1) = 11.09.

Published: ImageNet, ResNet-50, 200 epochs, then detection on VOC 07+12: AP 58.7 (MoCo v2: 57.0).
Ours: RESULTS.md.

Differs from the paper: the cosine falls in every step, not once an epoch. Weights start as torch's
and He's (fan_out); in the official code the backbone's with fan_in, and the global head's biases
at 0. The recipes for small images are ours; an image of 32 pixels has 4 x 4 positions.

Usage:  python densecl.py    torchrun --nproc_per_node=8 densecl.py --data /path/to/imagenet
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
    epochs=200, batch_size=256,         # section 4.1
    lr=0.03, optimizer="sgd", weight_decay=1e-4,        # section 4.1; decay on everything
    warmup_epochs=0,
    queue_size=65536, ema_momentum=0.999,               # section 4.1
    temperature=0.2, dense_weight=0.5,                  # sections 4.1 and 3
    dim=128,
    bn_splits=8 if common.WORLD_SIZE == 1 else 1,       # the paper has 8 GPUs of 32 images
    color_strength=1.0, blur=0.5,       # MoCo v2's
    min_scale=0.2,
    knn_every=0,
)
SMALL = dict(                           # ours, after moco.py's
    IMAGENET, arch="resnet18", stem="small", size=32,
    epochs=200, batch_size=512, lr=0.03, weight_decay=5e-4,
    queue_size=4096, ema_momentum=0.99, temperature=0.1, bn_splits=8,
    blur=0.0, min_scale=0.08,
    knn_every=10,
)
SHAPES = dict(                          # ours, for a few minutes on two CPU cores
    SMALL, arch="resnet10x0.25", size=24,
    epochs=12, batch_size=64, lr=0.016, optimizer="adamw", weight_decay=1e-4, warmup_epochs=1,
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

# ------------------------------------------------------------------- model (section 3)

class DenseCL(nn.Module):
    def __init__(self, arch, stem, dim, queue_size, bn_splits):
        super().__init__()
        self.encoder = common.resnet(arch, stem=stem)
        split_batch_norm(self.encoder, bn_splits)
        self.projector = projector(self.encoder.dim, dim)
        self.dense_projector = projector(self.encoder.dim, dim)
        self.key_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.key_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.key_dense_projector = copy.deepcopy(self.dense_projector).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1))
        self.register_buffer("dense_queue", F.normalize(torch.randn(queue_size, dim), dim=1))

    def forward(self, x_q, x_k, order):
        maps_q = positions(self.encoder.maps(x_q))                              # (N, P, D)
        q = F.normalize(self.projector(maps_q.mean(1)).float(), dim=1)          # (N, d)
        dense_q = F.normalize(self.dense_projector(maps_q).float(), dim=2)      # (N, P, d)
        with torch.no_grad():
            maps_k = positions(self.key_encoder.maps(shuffle(x_k, order)))
            k = F.normalize(self.key_projector(maps_k.mean(1)).float(), dim=1)
            dense_k = self.key_dense_projector(maps_k).float()
            pooled = F.normalize(dense_k.mean(1), dim=1)                        # (N, d)
            dense_k = F.normalize(dense_k, dim=2)
            k, keys = unshuffle(k, order)                       # this process's, all processes'
            _, dense_keys = unshuffle(pooled, order)
            dense_k, _ = unshuffle(dense_k, order)
            maps_k, _ = unshuffle(maps_k, order)
            index = match(maps_q.float(), maps_k.float())                       # (N, P)
            dense_k = dense_k.gather(1, index[:, :, None].expand_as(dense_q))   # the positives
        return q, k, keys, dense_q, dense_k, dense_keys

    @torch.no_grad()
    def update_key_encoder(self, ema_momentum):
        """MoCo's equation 2, for parameters only: the key encoder's BN statistics are its own."""
        theta_k = [*self.key_encoder.parameters(), *self.key_projector.parameters(),
                   *self.key_dense_projector.parameters()]
        theta_q = [*self.encoder.parameters(), *self.projector.parameters(),
                   *self.dense_projector.parameters()]
        torch._foreach_lerp_(theta_k, theta_q, 1 - ema_momentum)    # all parameters at once

    @torch.no_grad()
    def enqueue(self, keys, dense_keys, step):
        """The keys (M, d) of this step replace the oldest ones of both queues. M divides K."""
        oldest = step * len(keys) % len(self.queue)
        self.queue[oldest:oldest + len(keys)] = keys
        self.dense_queue[oldest:oldest + len(keys)] = dense_keys

def projector(dim_in, dim):
    """MoCo v2's head; on the positions of a map it is the paper's two 1x1 convolutions."""
    return nn.Sequential(nn.Linear(dim_in, dim_in), nn.ReLU(), nn.Linear(dim_in, dim))

def positions(maps):
    """(N, D, S, S) -> (N, P, D), row by row."""
    return maps.flatten(2).transpose(1, 2)

def match(maps_q, maps_k):
    """Equation 4: for each position of the query the most similar one of the key. maps_q (N, P, D),
    maps_k (N, P', D): features of the backbone, not projections -> (N, P) int64 in 0..P' - 1."""
    with torch.autocast(maps_q.device.type, enabled=False):
        similarity = F.normalize(maps_q, dim=2) @ F.normalize(maps_k, dim=2).mT     # (N, P, P')
    return similarity.argmax(2)

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

# ------------------------------------------------------------------- loss (equations 1 to 3)

def info_nce(q, k, queue, temperature):
    """MoCo v1, equation 1: a scalar, the mean over the queries. q, k (N, d), queue (K, d), of unit
    length; the gradient flows into q alone."""
    positive = (q * k.detach()).sum(1, keepdim=True)            # (N, 1)
    negative = q @ queue.detach().T                             # (N, K)
    logits = torch.cat([positive, negative], dim=1) / temperature
    target = torch.zeros(len(q), dtype=torch.int64, device=q.device)    # column 0 is the positive
    return F.cross_entropy(logits, target)

def dense_info_nce(q, k, queue, temperature):
    """L_r, a scalar, the mean over the queries and their positions. q and their positives k
    (N, P, d), queue (K, d), of unit length."""
    return info_nce(q.flatten(0, 1), k.flatten(0, 1), queue, temperature)

# ------------------------------------------------------------------- training (section 4.1)

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
    model = DenseCL(args.arch, args.stem, args.dim, args.queue_size, args.bn_splits)
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
        model.update_key_encoder(args.ema_momentum)                     # before the keys are made
        generator = torch.Generator().manual_seed(step)                 # the same in every process
        order = torch.randperm(args.batch_size, generator=generator)
        order = order.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            q, k, keys, dense_q, dense_k, dense_keys = network(x1, x2, order)
        loss_q = info_nce(q, k, model.queue, args.temperature)
        loss_r = dense_info_nce(dense_q, dense_k, model.dense_queue, args.temperature)
        loss = (1 - args.dense_weight) * loss_q + args.dense_weight * loss_r

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.enqueue(keys, dense_keys, step)                           # after they were scored
        run.finish_step(loss, lr, q, [x1, x2], loss_q=loss_q, loss_r=loss_r)

# ------------------------------------------------------------------- flags

def parse_args(argv=None):
    parser = common.Parser(__doc__, RECIPES, argv)
    add = parser.add_argument
    add("--temperature", type=common.positive, help="softmax temperature")
    add("--dense-weight", type=common.fraction, help="weight of the dense loss, lambda")
    add("--ema-momentum", type=common.fraction, help="momentum of the key encoder")
    add("--queue-size", type=common.count, help="number of keys in each queue, K")
    add("--dim", type=common.count, help="dimension of the projections")
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
