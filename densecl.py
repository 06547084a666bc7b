"""DenseCL: Dense Contrastive Learning for Self-Supervised Visual Pre-Training. Wang, Zhang, Shen, Kong, Li, CVPR 2021, arXiv 2011.09157.

Idea. MoCo v2 compares whole images, and what it learns need not know where in an image things are. So let also every place of the query's feature map
recognise its counterpart in the key: the place whose features, as the backbone sees them now, are the most similar. The negatives are other images'
keys again. Detection and segmentation, which need places, profit.

Objective (equations 1 to 4), with MoCo's L_q, a mean over the queries, and L_r, a mean over the queries and their P places s:

    L = (1 - lambda) L_q + lambda L_r,     L_r(s) = -log  exp(r_s . t_c / tau) / (exp(r_s . t_c / tau) + sum over the queue of exp(r_s . t / tau))

    c = c(s) = argmax over the key's places u of  f_s . f'_u / (|f_s| |f'_u|)

Notation. N images in the batch of one process, W processes, P = S x S places.
    x_q, x_k     x1, x2                                          (N, 3, ., .)   the two views
    f, f'        encoder, key_encoder; maps_q, maps_k            (N, P, D)   maps of query and key; their mean h (N, D) is what is kept
    q, k         projector, key_projector; q, k                  (N, d)      unit length, as in MoCo
    r, t         dense_projector, key_dense_projector; dense_q, dense_k      (N, P, d), unit length
    queue        queue, dense_queue                              (K, d)      keys; and dense projections of keys, averaged over their places
    lambda, m    dense_weight, ema_momentum

Why shuffle: see moco.py. Start value ln(K + 1) = 11.09 for K = 65536, once the queues are full of keys. The log's `bound`, ln(K + 1) - loss, is the mean,
weighted like the losses, of two of moco.py's. That of the places is none, strictly: their positives are chosen for being similar, and the negatives are
averages over places, as no positive is.

Published: ImageNet, ResNet-50, 200 epochs, then detection on PASCAL VOC 07+12: AP 58.7 (MoCo v2 57.0).
Ours: embedded shapes, `python densecl.py`, 221 seconds on two CPU cores, 2026-11-21: kNN 68.4 % (untrained 21.9 %, pixels 37.0 %). CIFAR-10: see the
README. ImageNet: not run yet.

Differs from the paper:
    - The order of the colour operations is drawn for every 64 images instead of for each. The cosine falls in every step, not once an epoch.
    - The global head starts from torch's initialisation, the official one from Kaiming's (weights 2.4 times as large).
    - The recipes for small images are ours, after moco.py's; with the 3x3 stem an image of 32 pixels has 4 x 4 places.

Usage:
    python densecl.py                                                             a few minutes on two CPU cores
    torchrun --nproc_per_node=8 densecl.py --data /path/to/imagenet               ResNet-50 on 8 GPUs
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
    arch="resnet50", stem="imagenet", size=224,
    epochs=200, batch_size=256,      # section 4.1
    lr=0.03, optimizer="sgd", weight_decay=1e-4,     # section 4.1; decay on everything
    warmup_epochs=0,
    queue_size=65536, ema_momentum=0.999,            # section 4.1
    temperature=0.2, dense_weight=0.5,               # sections 4.1 and 3
    dim=128,
    bn_splits=1,
    color_strength=1.0, blur=0.5,    # MoCo v2's
    min_scale=0.2,
    knn_every=0,
)
SMALL = dict(IMAGENET,               # our own, after moco.py's
    arch="resnet18", stem="small", size=32,
    epochs=200, batch_size=512, lr=0.03, weight_decay=5e-4,
    queue_size=4096, ema_momentum=0.99, temperature=0.1,
    bn_splits=8, blur=0.0, min_scale=0.08,
    knn_every=10,
)
SHAPES = dict(SMALL,                 # our own, for a few minutes on two CPU cores
    arch="resnet10x0.25",
    epochs=25, batch_size=64, lr=0.016, optimizer="adamw", weight_decay=1e-4, warmup_epochs=1,
    queue_size=2048, temperature=0.2, bn_splits=4,
    color_strength=2.0,              # one tint an image, which is what the jitter erases
    min_scale=0.4,                   # smaller crops often miss the object
    knn_every=5,
)
RECIPES = dict(shapes=SHAPES, small=SMALL, imagenet=IMAGENET)


# ------------------------------------------------------------------------------------------------ augmentation (MoCo v2, section 3)

@common.by_pieces
def augment(x, strength, blur):
    """Crops (N, 3, S, S) in 0..1, half of them mirrored -> views of the same form, each with its own draws, normalised."""
    x = common.color_jitter(x, 0.4 * strength, 0.4 * strength, 0.4 * strength, 0.1 * strength, p=0.8)
    x = common.grayscale(x, p=0.2)
    if blur:
        x = common.gaussian_blur(x, p=blur, sigma=(0.1, 2.0))
    return common.normalize(x, MEAN, STD)


# ------------------------------------------------------------------------------------------------ model (section 3)

class DenseCL(nn.Module):
    def __init__(self, arch, stem, dim, queue_size, bn_splits):
        super().__init__()
        encoder = common.resnet(arch, stem=stem)
        self.encoder = split_batch_norm(encoder, bn_splits) if bn_splits > 1 else encoder
        self.projector = projector(self.encoder.dim, dim)
        self.dense_projector = projector(self.encoder.dim, dim)
        self.key_encoder, self.key_projector, self.key_dense_projector = (
            copy.deepcopy(m).requires_grad_(False) for m in (self.encoder, self.projector, self.dense_projector))
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1))
        self.register_buffer("dense_queue", F.normalize(torch.randn(queue_size, dim), dim=1))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))               # where the oldest keys are

    def forward(self, x_q, x_k):
        maps_q = places(self.encoder.maps(x_q))                                          # (N, P, D)
        q = F.normalize(self.projector(maps_q.mean(1)).float(), dim=1)                   # (N, d)
        dense_q = F.normalize(self.dense_projector(maps_q).float(), dim=2)               # (N, P, d)
        with torch.no_grad():
            x_k, order = shuffle(x_k)
            maps_k = places(self.key_encoder.maps(x_k))
            k = F.normalize(self.key_projector(maps_k.mean(1)).float(), dim=1)
            dense_k = self.key_dense_projector(maps_k).float()
            pooled = F.normalize(dense_k.mean(1), dim=1)                                 # (N, d): what other queries' places are compared with
            k, keys = unshuffle(k, order)                                                # (N, d), (NW, d)
            _, dense_keys = unshuffle(pooled, order)                                     # (NW, d)
            dense_k, _ = unshuffle(F.normalize(dense_k, dim=2), order)                   # (N, P, d)
            maps_k, _ = unshuffle(maps_k, order)                                         # (N, P, D)
            dense_k = at_places(dense_k, match(maps_q, maps_k))                          # (N, P, d): each place's positive
        return q, k, keys, dense_q, dense_k, dense_keys

    @torch.no_grad()
    def update_keys_network(self, ema_momentum):
        """On parameters only: the key network's BN statistics are its own."""
        for learned, average in ((self.encoder, self.key_encoder), (self.projector, self.key_projector),
                                 (self.dense_projector, self.key_dense_projector)):
            for theta_q, theta_k in zip(learned.parameters(), average.parameters()):
                theta_k.lerp_(theta_q, 1 - ema_momentum)

    @torch.no_grad()
    def enqueue(self, keys, dense_keys):
        """The newest keys (M, d), of all processes, take the place of the oldest in both queues. M divides K."""
        start = int(self.pointer)
        self.queue[start:start + len(keys)] = keys
        self.dense_queue[start:start + len(keys)] = dense_keys
        self.pointer[0] = (start + len(keys)) % len(self.queue)


def projector(dim_in, dim):
    """MoCo v2's head; over the places of a map it is the paper's two 1x1 convolutions."""
    return nn.Sequential(nn.Linear(dim_in, dim_in), nn.ReLU(), nn.Linear(dim_in, dim))


def places(maps):
    """(N, D, S, S) -> (N, P, D), row by row."""
    return maps.flatten(2).transpose(1, 2)


def at_places(v, index):
    """(N, P, d) and (N, P') -> (N, P', d): of each image what stands at these places."""
    return v.gather(1, index[:, :, None].expand(-1, -1, v.shape[2]))


@torch.no_grad()
def match(maps_q, maps_k):
    """Equation 4: for each place of the query the place of the key whose features are most similar by cosine.

    maps_q (N, P, D), maps_k (N, P', D): the backbone's features, not the projections, any scale and float type -> (N, P) int64 in 0..P' - 1.
    """
    with torch.autocast(maps_q.device.type, enabled=False):
        maps_q, maps_k = (F.normalize(m.to(torch.promote_types(m.dtype, torch.float32)), dim=2) for m in (maps_q, maps_k))
        return (maps_q @ maps_k.transpose(1, 2)).argmax(2)                               # over the key's places


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
    """Keys (N, ...) of shuffled images -> this process's own keys (N, ...) and all keys (NW, ...), in the order before `shuffle`."""
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


# ------------------------------------------------------------------------------------------------ loss (equations 1 to 3)

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


def dense_info_nce(q, k, queue, temperature):
    """L_r, a scalar: `info_nce` of each place, q (N, P, d), with its positive, k (N, P, d), and queue (K, d); the mean over images and places."""
    return info_nce(q.flatten(0, 1), k.flatten(0, 1), queue, temperature)


# ------------------------------------------------------------------------------------------------ training (section 4.1)

def train(args, device):
    data = common.load_data(args.data, args.root, "pretrain", device)
    batches = common.Batches(data, [common.Crop(2, args.size, (args.min_scale, 1.0), flip=0.5)], args.batch_size, args.seed)
    if args.queue_size % args.batch_size:
        raise common.UserError(f"--queue-size {args.queue_size}: not a multiple of the {args.batch_size} keys of a step")
    if args.batch_size // common.world_size() % args.bn_splits:
        raise common.UserError(f"--bn-splits {args.bn_splits}: does not divide the {args.batch_size // common.world_size()} images of a process")

    torch.manual_seed(args.seed)
    model = DenseCL(args.arch, args.stem, args.dim, args.queue_size, args.bn_splits).to(device, memory_format=torch.channels_last)
    learned = [w for w in model.parameters() if w.requires_grad]
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(learned, lr=args.lr, weight_decay=args.weight_decay)
    else:
        optimizer = torch.optim.SGD(learned, lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
    run = common.Run("densecl", args, model, optimizer, batches, MEAN, STD, entries=lambda loss: dict(bound=math.log(args.queue_size + 1) - loss))

    network = model
    if common.world_size() > 1:
        network = DistributedDataParallel(network)                           # BN stays with each process: that is what shuffling is for
    if args.compile:
        network = torch.compile(network)

    peak_lr = args.lr * args.batch_size / 256
    warmup, total = args.warmup_epochs * len(batches), args.epochs * len(batches)

    for step, (x1, x2), indices in run:
        if step < warmup:
            lr = peak_lr * min(1, (step + 1) / warmup)
        else:
            lr = peak_lr * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr

        x1, x2 = augment(x1, args.color_strength, args.blur), augment(x2, args.color_strength, args.blur)
        model.update_keys_network(args.ema_momentum)                         # before the keys are made
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            q, k, keys, dense_q, dense_k, dense_keys = network(x1, x2)
        loss_q = info_nce(q, k, model.queue.clone(), args.temperature)
        loss_r = dense_info_nce(dense_q, dense_k, model.dense_queue.clone(), args.temperature)
        loss = (1 - args.dense_weight) * loss_q + args.dense_weight * loss_r

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.enqueue(keys, dense_keys)                                      # after they were scored
        run.log(loss, lr, q, [x1, x2])


# ------------------------------------------------------------------------------------------------ flags

def parse_args(argv=None):
    parser = common.Parser(__doc__, RECIPES, argv)
    parser.add_argument("--temperature", type=common.positive, help="of the softmax, tau")
    parser.add_argument("--dense-weight", type=common.share, help="of the places' loss, lambda; with 0 MoCo v2's loss is left")
    parser.add_argument("--ema-momentum", type=common.share, help="of the key network, m")
    parser.add_argument("--queue-size", type=common.count, help="keys that wait, K; a multiple of the batch")
    parser.add_argument("--dim", type=common.count, help="width of the projection")
    parser.add_argument("--bn-splits", type=common.count, help="parts of a process's batch that BatchNorm sees apart")
    parser.add_argument("--optimizer", choices=["sgd", "adamw"], help="the paper's is sgd")
    parser.add_argument("--color-strength", type=common.not_negative, help="of the colour jitter, times (0.4, 0.4, 0.4, 0.1)")
    parser.add_argument("--blur", type=common.share, help="probability of the Gaussian blur")
    parser.add_argument("--min-scale", type=common.share, help="smallest share of the image's area that a crop has")
    return parser.parse()


if __name__ == "__main__":
    common.launch(train, parse_args())
