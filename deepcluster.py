"""DeepCluster-v2: Unsupervised Learning of Visual Features by Contrasting Cluster Assignments. Caron et al., NeurIPS 2020, arXiv 2006.09882 (the SwAV
paper), after Deep Clustering for Unsupervised Learning of Visual Features. Caron, Bojanowski, Joulin, Douze, ECCV 2018, arXiv 1807.05520.

Idea. Before every epoch the images are clustered by their features of the last one (spherical k-means); during the epoch the network learns to tell,
from any crop of an image, which cluster the image belongs to. Several clusterings, each with its own start, and many small crops make it better.
SwAV is the same with the clusters found anew in every batch.

Objective, a mean over the H clusterings, all V crops and the images; y_h(n) is the cluster of image n and C_h the centroids, which are not learned:

    L = - 1/H sum over h  1/V sum over v  log p_vh(y_h),      p_vh = softmax(z_v . C_h / tau)

with C_h and y_h from k-means on the memory M_(h mod 2) of the last embeddings of all images:

    y(n) = argmax over k of M_n . c_k,      c_k = sum of M_n over y(n) = k, over its length

Notation. N images in the batch of one process, W processes, n images in the data set.
    x_1 .. x_V   crops             V of (N, 3, S, S)   large ones first
    f, z         encoder, projector, z   (N, d)        unit length; h (N, D) before the projector is what is kept
    C            prototypes        (H, K, d)           unit length
    y            assignments       (H, n)              -100: the image has no embedding yet and is left out
    M            memory            (2, n, d)           embeddings of the two large crops of each image when it was last seen; 0: not seen yet
    tau          temperature

Start value: below ln K = 8.006 for 3000 prototypes, as the clusters are those of the features. A loss that rises to it and stays there is a collapse,
and the log says so.

Published: ImageNet, ResNet-50, 2 x 224 + 6 x 96, batch 4096, 800 epochs: linear probe 75.2 % (official README).
Ours: embedded shapes, `python deepcluster.py`, 335 seconds of one CPU core, 2026-11-21: kNN 56.5 % (untrained 21.9 %, pixels 37.0 %). CIFAR-10: see
the README. ImageNet: not run yet.

Differs from the official code:
    - Every process keeps the memory of all images (1.3 GB for ImageNet, in the checkpoint too) and clusters a share of it; there each keeps those of
      the last epoch, and k-means starts from the first process's. An image that the last epoch left out keeps its older embedding, there it has no
      cluster. Images not seen yet, less than a batch in the first epochs, count as a loss of 0.
    - BN is synchronised over all processes, there in groups of 8.
    - The order of the colour operations is drawn for every 64 images instead of for each. The standard deviation is 0.229, not 0.228.
    - The recipes for small images are ours.

Usage:
    python deepcluster.py                                                         a few minutes on two CPU cores
    torchrun --nproc_per_node=8 deepcluster.py --data /path/to/imagenet           ResNet-50 on 8 GPUs
"""
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import common

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

IMAGENET = dict(
    arch="resnet50", stem="imagenet", size=224,
    epochs=800, batch_size=4096,                     # official script
    lr=0.3, optimizer="larc", weight_decay=1e-6,     # 4.8 * 256 / 4096
    warmup_epochs=10,
    min_scale=0.14, small_crops=6, small_size=96, small_scale=0.05,      # 2 x 224 of 0.14..1 and 6 x 96 of 0.05..0.14
    num_prototypes=3000, hidden=2048, dim=128,
    temperature=0.1, heads=3, iterations=10,
    color_strength=1.0, blur=0.5,
    knn_every=0,
)
SMALL = dict(IMAGENET,                               # our own, after swav.py's
    arch="resnet18", stem="small", size=32,
    epochs=200, batch_size=256, lr=0.6,
    min_scale=0.2, small_crops=4, small_size=18, small_scale=0.08,
    num_prototypes=300,
    color_strength=0.5, blur=0.0,
    knn_every=10,
)
SHAPES = dict(SMALL,                                 # our own, for a few minutes on two CPU cores
    arch="resnet10x0.25",
    epochs=16, batch_size=64, lr=0.016, optimizer="adamw", weight_decay=1e-4, warmup_epochs=0.5,
    min_scale=0.4, small_crops=2, small_size=16, small_scale=0.2,
    num_prototypes=30, hidden=256,
    color_strength=1.0,                              # one tint an image, which is what the jitter erases
    knn_every=4,
)
RECIPES = dict(shapes=SHAPES, small=SMALL, imagenet=IMAGENET)


# ------------------------------------------------------------------------------------------------ augmentation (SwAV, section 4, appendix A)

@common.by_pieces
def augment(x, strength, blur):
    """Crops (N, 3, S, S) in 0..1, half of them mirrored -> views of the same form, each with its own draws, normalised."""
    x = common.color_jitter(x, 0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength, p=0.8)
    x = common.grayscale(x, p=0.2)
    if blur:
        x = common.gaussian_blur(x, p=blur, sigma=(0.1, 2.0))
    return common.normalize(x, MEAN, STD)


# ------------------------------------------------------------------------------------------------ model

class DeepCluster(nn.Module):
    def __init__(self, arch, stem, hidden, dim, heads, num_prototypes, num_images):
        super().__init__()
        self.encoder = common.resnet(arch, stem=stem)
        self.projector = nn.Sequential(nn.Linear(self.encoder.dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.register_buffer("prototypes", torch.zeros(heads, num_prototypes, dim))
        self.register_buffer("assignments", torch.full((heads, num_images), -100))
        self.register_buffer("memory", torch.zeros(2, num_images, dim))

    def forward(self, crops):
        sizes = list(dict.fromkeys(x.shape[-1] for x in crops))                           # in the crops' order
        h = torch.cat([self.encoder(torch.cat([x for x in crops if x.shape[-1] == size])) for size in sizes])     # one forward for each resolution
        z = F.normalize(self.projector(h).float(), dim=1)                                 # (VN, d)
        return z.view(len(crops), -1, z.shape[1])                                         # (V, N, d)

    @torch.no_grad()
    def remember(self, z, indices):
        """The embeddings z (2, N, d) of the large crops of the images `indices` (N,), from all processes."""
        self.memory[:, gather(indices)] = gather(z.transpose(0, 1)).transpose(0, 1)

    @torch.no_grad()
    def cluster(self, iterations):
        """New prototypes and assignments from the memory, for each head."""
        seen = self.memory[0].any(1)                                                      # (n,)
        if seen.sum() < self.prototypes.shape[1]:
            raise common.UserError(f"--num-prototypes {self.prototypes.shape[1]}: more than the {seen.sum()} images that could be read")
        for head in range(len(self.prototypes)):
            self.prototypes[head], found = spherical_kmeans(self.memory[head % 2][seen], self.prototypes.shape[1], iterations)
            self.assignments[head, seen] = found


def gather(z):
    """(N, ...) of each process -> (NW, ...) of all, without gradient. The same tensor in a single process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return z
    everyones = [torch.empty_like(z, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, z.contiguous())
    return torch.cat(everyones)


# ------------------------------------------------------------------------------------------------ clustering and loss

@torch.no_grad()
def spherical_kmeans(features, num_clusters, iterations):
    """k-means by cosine from random rows: centroids (K, d), unit length, and assignments (N,) int64 to them.

    features (N, d): unit length, N >= K; over several processes the same in each, which does its share of the work. A cluster that loses all its
    features keeps its centroid.
    """
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    centroids, mine = features[torch.randperm(len(features))[:num_clusters].to(features.device)], features[rank::processes]
    if processes > 1:
        dist.broadcast(centroids, 0)                                                      # the same in every process
    for _ in range(iterations):
        sums = torch.zeros_like(centroids).index_add_(0, nearest(mine, centroids), mine)  # (K, d)
        if processes > 1:
            dist.all_reduce(sums)
        length = sums.norm(dim=1, keepdim=True)
        centroids = torch.where(length > 0, sums / length, centroids)
    assignments = torch.zeros_like(features[:, 0], dtype=torch.int64)
    assignments[rank::processes] = nearest(mine, centroids)
    if processes > 1:
        dist.all_reduce(assignments)
    return centroids, assignments


def nearest(features, centroids):
    """(N, d), (K, d) -> (N,): the centroid with the largest cosine, without an N x K table in memory."""
    return torch.cat([(piece @ centroids.T).argmax(1) for piece in features.split(16384)])


def cluster_prediction(z, prototypes, assignments, temperature):
    """The objective, a scalar; a mean over images, so that DDP's mean of the gradients is exact. An image with assignment -100 counts as 0.

    z (V, N, d): all crops' embeddings, unit length; prototypes (H, K, d); assignments (H, N). At least float32 is computed in.
    """
    with torch.autocast(z.device.type, enabled=False):
        z, prototypes = (v.to(torch.promote_types(z.dtype, torch.float32)) for v in (z, prototypes))
        losses = [F.cross_entropy(z.flatten(0, 1) @ c.T / temperature, y.repeat(len(z)), reduction="sum") for c, y in zip(prototypes, assignments)]
        return sum(losses) / (len(losses) * z[..., 0].numel())


# ------------------------------------------------------------------------------------------------ training (SwAV, appendix A)

def train(args, device):
    data = common.load_data(args.data, args.root, "pretrain", device)
    crops = [common.Crop(2, args.size, (args.min_scale, 1.0), flip=0.5)]
    if args.small_crops:
        if args.small_scale >= args.min_scale:
            raise common.UserError(f"--small-scale {args.small_scale}: not below --min-scale {args.min_scale}, the largest share of a small crop")
        crops.append(common.Crop(args.small_crops, args.small_size, (args.small_scale, args.min_scale), flip=0.5))
    batches = common.Batches(data, crops, args.batch_size, args.seed)
    if args.num_prototypes > len(batches) * args.batch_size:
        raise common.UserError(f"--num-prototypes {args.num_prototypes}: more than the {len(batches) * args.batch_size} images of an epoch")

    torch.manual_seed(args.seed)
    model = DeepCluster(args.arch, args.stem, args.hidden, args.dim, args.heads, args.num_prototypes, len(data))
    model = model.to(device, memory_format=torch.channels_last)
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)                        # LARC takes care of the decay
    run = common.Run("deepcluster", args, model, optimizer, batches, MEAN, STD, collapsed_loss=math.log(args.num_prototypes))

    network = model
    if common.world_size() > 1:
        if device.type == "cuda":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)       # statistics of all processes
        else:
            common.say("BatchNorm takes its statistics in each process alone: torch has no SyncBatchNorm for CPUs")
        network = DistributedDataParallel(network, broadcast_buffers=False)  # the memory is large, and the same in every process
    if args.compile:
        network = torch.compile(network)

    peak_lr = args.lr * args.batch_size / 256
    warmup, total = args.warmup_epochs * len(batches), args.epochs * len(batches)

    if run.step == 0:                                                        # a pass to fill the memory
        for i, (views, indices, broken) in enumerate(common.stream(batches, range(len(batches)), args.workers, device)):
            if common.asked_to_stop(last=i == len(batches) - 1):
                raise common.Stopped("stopped before the first step")
            common.note_broken(data, broken)
            common.seed_all(args.seed, i, common.rank(), 2)
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                z = network([augment(x, args.color_strength, args.blur) for x in views[:2]])
            model.remember(z, indices.to(device))

    for step, views, indices in run:
        if step < warmup:                                                    # from 1/16 of the peak, and down to 1/1000 of it
            lr = peak_lr * (1 / 16 + 15 / 16 * step / warmup)
        else:
            lr = peak_lr * (0.001 + 0.999 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2)
        for group in optimizer.param_groups:
            group["lr"] = lr

        views = [augment(x, args.color_strength, args.blur) for x in views]
        if step % len(batches) == 0:
            model.cluster(args.iterations)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            z = network(views)                                               # (V, N, d)
        indices = indices.to(device)
        loss = cluster_prediction(z, model.prototypes, model.assignments[:, indices], args.temperature)

        optimizer.zero_grad()
        loss.backward()
        if args.optimizer == "larc":
            common.larc_(model.parameters(), weight_decay=args.weight_decay)
        optimizer.step()
        model.remember(z[:2].detach(), indices)
        run.log(loss, lr, z[0], views)


# ------------------------------------------------------------------------------------------------ flags

def parse_args(argv=None):
    parser = common.Parser(__doc__, RECIPES, argv)
    parser.add_argument("--temperature", type=common.positive, help="of the prediction's softmax, tau")
    parser.add_argument("--heads", type=common.count, help="clusterings, H")
    parser.add_argument("--num-prototypes", type=common.count, help="clusters of each, K")
    parser.add_argument("--iterations", type=common.count, help="of k-means")
    parser.add_argument("--hidden", type=common.count, help="width of the projector's hidden layer")
    parser.add_argument("--dim", type=common.count, help="width of the projection")
    parser.add_argument("--small-crops", type=common.whole,
                        help="how many small crops besides the two large ones; with 0 the paper takes --min-scale 0.08")
    parser.add_argument("--small-size", type=common.count, help="side of the small crops in pixels")
    parser.add_argument("--small-scale", type=common.share,
                        help="smallest share of the image's area that a small crop has; the largest is --min-scale")
    parser.add_argument("--optimizer", choices=["larc", "adamw"], help="the paper's is larc: SGD with layer-wise adaptive rates")
    parser.add_argument("--color-strength", type=common.not_negative, help="of the colour jitter, times (0.8, 0.8, 0.8, 0.2)")
    parser.add_argument("--blur", type=common.share, help="probability of the Gaussian blur")
    parser.add_argument("--min-scale", type=common.share, help="smallest share of the image's area that a large crop has")
    return parser.parse()


if __name__ == "__main__":
    common.launch(train, parse_args())
