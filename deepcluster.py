"""DeepCluster-v2, from the SwAV paper: Caron et al., NeurIPS 2020, arXiv 2006.09882; version 1:
Deep Clustering for Unsupervised Learning of Visual Features. Caron et al., ECCV 2018, 1807.05520.

Idea. Before every epoch the images are clustered by their features; during the epoch the network
learns to tell from any view of an image which cluster the image is in. Version 2 takes the features
of the last epoch from a memory, several clusterings, and small crops; SwAV learns its prototypes
and assigns within a batch. Version 1 takes features of all images and a new linear classifier.

Objective of version 2, a mean over the H clusterings, all V crops and the images:
    L = - 1/H sum over h  1/V sum over v  log p_vh(y_h),      p_vh = softmax(z_v . C_h / tau)
with y_h and C_h from spherical k-means on the memory M of crop h mod 2:
    y(n) = argmax over k of M_n . c_k,      c_k = sum of M_n over y(n) = k, over its length
Version 1 (equations 1 and 2): cross entropy of a linear classifier on h, the clusters as labels.

Notation. N images in the global batch, n in the data set.
    x_1 .. x_V   crops               V of (N, 3, S, S)   large ones first
    f, z         encoder, projector  (N, d)              z of unit length; h (N, D) is what is kept
    C            prototypes          (H, K, d)           unit length, not learned
    y            assignments         (H, n)              -100: no embedding yet, left out
    M            memory              (2, n, d)           the last z of both large crops; 0: none yet
The loss starts below ln K. Of the first head the log has `nmi`, the normalised mutual information
of its clusters with those of the epoch before (2018, figure 2), and `empty`, how many are empty.
Published: ImageNet, ResNet-50, 800 epochs: linear 75.2 % (official README). Ours: RESULTS.md.

Differs: every process keeps the memory of all images (1.3 GB for ImageNet) and clusters a share; an
image that an epoch left out keeps its embedding. The images' standard deviation is 0.229, there
0.228 (version 2); GPUs train in bf16, there float32. Version 1 has a ResNet without Sobel's filter,
spherical k-means and one optimizer; weights, 1 / cluster size, replace even sampling of clusters.
Usage:  python deepcluster.py    torchrun --nproc_per_node=8 deepcluster.py --data /path/to/imagenet
"""
import math

import common  # before torch, since it handles signals from then on
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

IMAGENET = dict(                        # official script
    version=2,
    arch="resnet50", stem="imagenet", size=224,
    epochs=800, batch_size=4096,
    lr=0.3, optimizer="larc", weight_decay=1e-6,        # 4.8 * 256 / 4096
    warmup_epochs=10,
    large_crops=2, min_scale=0.14,      # 2 x 224 of 0.14..1 and 6 x 96 of 0.05..0.14
    small_crops=6, small_size=96, small_scale=0.05,
    num_prototypes=3000, hidden=2048, dim=128,
    temperature=0.1, heads=3, iterations=10,
    color_strength=1.0, blur=0.5,
    knn_every=0,
)
SMALL = dict(                           # ours, after swav.py's
    IMAGENET, arch="resnet18", stem="small", size=32,
    epochs=200, batch_size=256, lr=0.6,
    min_scale=0.2, small_crops=4, small_size=18, small_scale=0.08,
    num_prototypes=300, color_strength=0.5, blur=0.0,
    knn_every=10,
)
SHAPES = dict(                          # ours, for a few minutes on two CPU cores
    SMALL, arch="resnet10x0.25", size=24,
    epochs=8, batch_size=64, lr=0.016, optimizer="adamw", weight_decay=1e-4, warmup_epochs=0.5,
    min_scale=0.4, small_crops=2, small_size=16, small_scale=0.2,
    num_prototypes=30, hidden=256,
    color_strength=1.0,                 # one tint per image, which is what the jitter removes
    knn_every=2,
)
VERSION_1 = dict(version=1, large_crops=1, small_crops=0, heads=1, iterations=20)
RECIPES = {
    "shapes": SHAPES, "small": SMALL, "imagenet": IMAGENET,
    "shapes-v1": dict(SHAPES, **VERSION_1), "small-v1": dict(SMALL, **VERSION_1),
    "imagenet-v1": dict(                # official code of 2018
        IMAGENET, **VERSION_1, epochs=200, batch_size=256, lr=0.05, optimizer="sgd",
        weight_decay=1e-5, warmup_epochs=0, min_scale=0.08, num_prototypes=10000,
        color_strength=0.0, blur=0.0),
}

# ------------------------------------------------------------------- augmentation (SwAV's)

@common.in_chunks
def augment(x, strength, blur):
    """Crops (N, 3, S, S) in 0..1, half of them flipped -> views, normalised."""
    if strength:
        x = common.color_jitter(x, 0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
        x = common.grayscale(x, p=0.2)
    if blur:
        x = common.gaussian_blur(x, p=blur, sigma=(0.1, 2.0))
    return common.normalize(x, MEAN, STD)

# ------------------------------------------------------------------- model

class DeepCluster(nn.Module):
    def __init__(self, arch, stem, version, hidden, dim, heads, num_prototypes, num_images):
        super().__init__()
        self.encoder = common.resnet(arch, stem=stem)
        D = self.encoder.dim
        if version == 1:
            self.classifier = nn.Linear(D, num_prototypes)
        else:
            self.projector = nn.Sequential(nn.Linear(D, hidden), nn.BatchNorm1d(hidden), nn.ReLU(),
                                           nn.Linear(hidden, dim))
            self.register_buffer("prototypes", torch.zeros(heads, num_prototypes, dim))
            self.register_buffer("memory", torch.zeros(2, num_images, dim))
        self.register_buffer("assignments", torch.full((heads, num_images), -100))
        self.register_buffer("weights", torch.ones(num_prototypes))
        self.register_buffer("changes", torch.zeros(2))         # nmi and empty, for the log

    def forward(self, crops):
        sizes = dict.fromkeys(x.shape[-1] for x in crops)       # one forward for each resolution
        same_size = [torch.cat([x for x in crops if x.shape[-1] == size]) for size in sizes]
        h = torch.cat([self.encoder(x) for x in same_size])     # (V N, D)
        if hasattr(self, "classifier"):
            output = self.classifier(h).float()                 # (V N, K), version 1
        else:
            output = F.normalize(self.projector(h).float(), dim=1)      # z (V N, d)
        return output.view(len(crops), -1, output.shape[1])

    @torch.no_grad()
    def remember(self, z, indices):
        """The z (2, N, d) of the large crops of the images `indices` (N,), of all processes."""
        self.memory[:, common.gather(indices)] = common.gather(z.transpose(0, 1)).transpose(0, 1)

    @torch.no_grad()
    def cluster(self, iterations, h=None):
        """New prototypes and assignments of each head from the memory; or, version 1, assignments
        from the features h (n, D) of all images, and a new classifier."""
        before = self.assignments[0].clone()
        K = len(self.weights)
        if h is None:
            seen = self.memory[0].any(1)                        # (n,)
            for head in range(len(self.prototypes)):
                z = self.memory[head % 2][seen]
                self.prototypes[head], found = spherical_kmeans(z, K, iterations)
                self.assignments[head, seen] = found
        else:
            h = F.normalize(pca_whiten(h, 256), dim=1)
            _, self.assignments[0] = spherical_kmeans(h, K, iterations, refill=True)
            self.weights.copy_(len(h) / K / self.assignments[0].bincount(minlength=K).clamp(min=1))
            nn.init.normal_(self.classifier.weight, std=0.01)
            nn.init.zeros_(self.classifier.bias)
        now = self.assignments[0]
        both = (before >= 0) & (now >= 0)
        self.changes[0] = mutual_information(before[both], now[both])
        self.changes[1] = K - len(now[now >= 0].unique())

# ------------------------------------------------------------------- clustering and loss

@torch.no_grad()
def spherical_kmeans(features, num_clusters, iterations, refill=False):
    """k-means by cosine from random rows: centroids (K, d) of unit length, assignments (n,) int64.
    features (n, d) of unit length, n >= K, and torch's seed are the same in every process; each
    does a share. An empty cluster keeps its centroid, or, `refill`, takes a full one's, moved."""
    rows = torch.randperm(len(features))[:num_clusters]
    centroids = features[rows.to(features.device)]
    mine = features[common.RANK::common.WORLD_SIZE]
    for _ in range(iterations):
        sums = torch.zeros_like(centroids).index_add_(0, nearest(mine, centroids), mine)    # (K, d)
        if common.WORLD_SIZE > 1:
            dist.all_reduce(sums)
        length = sums.norm(dim=1, keepdim=True)
        centroids = torch.where(length > 0, sums / length, centroids)
        if refill:
            is_empty = length[:, 0].cpu() == 0
            empty, full = is_empty.nonzero()[:, 0], (~is_empty).nonzero()[:, 0]
            chosen = full[torch.randint(len(full), (len(empty),))]
            noise = 1e-3 * torch.randn(len(empty), centroids.shape[1])
            centroids[empty] = F.normalize(centroids[chosen] + noise.to(centroids), dim=1)
    return centroids, nearest(features, centroids)

def nearest(features, centroids):
    """(n, d), (K, d) -> (n,) the centroid with the largest cosine, without an n x K table."""
    return torch.cat([(part @ centroids.T).argmax(1) for part in features.split(16384)])

def pca_whiten(h, dim):
    """(n, D) -> (n, min(dim, D)): principal components over sqrt(variance + 1e-5)."""
    h = h.float() - h.float().mean(0)
    values, vectors = torch.linalg.eigh(h.T @ h / len(h))       # ascending
    return h @ (vectors[:, -dim:] / (values[-dim:].clamp(min=0) + 1e-5).sqrt())

def mutual_information(a, b):
    """I(a; b) / sqrt(H(a) H(b)) of two clusterings (n,), in 0..1."""
    entropies = []
    for x in (a, b, a * 2 ** 31 + b):
        sizes = x.unique(return_counts=True)[1]
        entropies.append(torch.special.entr(sizes / max(1, len(x))).sum())
    h_a, h_b, h_ab = entropies
    return (h_a + h_b - h_ab) / (h_a * h_b).sqrt().clamp(min=1e-9)

def cluster_prediction(z, prototypes, assignments, temperature):
    """The objective of version 2, a scalar. z (V, N, d) of all crops and prototypes (H, K, d), of
    unit length; assignments (H, N), of which -100 counts as a loss of 0."""
    losses = []
    for centroids, y in zip(prototypes, assignments):
        logits = z.flatten(0, 1) @ centroids.T / temperature    # (V N, K)
        losses.append(F.cross_entropy(logits, y.repeat(len(z)), reduction="sum"))
    return sum(losses) / (len(losses) * z.shape[0] * z.shape[1])

# ------------------------------------------------------------------- training (SwAV, appendix A)

def learning_rate(step, warmup, total, version):
    """As a fraction of the peak: from 1/16 up, then a half cosine to 1/1000; v1: constant."""
    if step < warmup:
        return 1 / 16 + 15 / 16 * step / warmup
    if version == 1:
        return 1.0
    return 0.001 + 0.999 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2

def train(args, device):
    data = common.load_data(args.data, args.root, "pretrain", device)
    crops = [common.Crop(args.large_crops, args.size, (args.min_scale, 1.0), flip=0.5)]
    scale = (args.small_scale, args.min_scale)
    if args.small_crops:
        crops.append(common.Crop(args.small_crops, args.small_size, scale, flip=0.5))
    batches = common.Batches(data, crops, args.batch_size, args.seed)
    if args.num_prototypes > len(batches) * args.batch_size:
        raise common.UserError(f"--num-prototypes {args.num_prototypes}: too many for the images")

    torch.manual_seed(args.seed)
    model = DeepCluster(args.arch, args.stem, args.version, args.hidden, args.dim, args.heads,
                        args.num_prototypes, len(data))
    model.to(device, memory_format=torch.channels_last)
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay)
    else:
        decay = 0 if args.optimizer == "larc" else args.weight_decay    # larc has the decay
        optimizer = torch.optim.SGD(model.parameters(), args.lr, 0.9, weight_decay=decay)
    run = common.Run(args, model, optimizer, batches, MEAN, STD)

    network = model
    if common.WORLD_SIZE > 1 and device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)      # global batch statistics
    network = common.distribute(network, args.compile)                  # DDP

    peak_lr = args.lr * args.batch_size / 256
    warmup = args.warmup_epochs * len(batches)
    if run.step == 0 and args.version == 2:                             # fill the memory
        for views, indices, _ in common.stream(batches, range(len(batches)), args.workers, device):
            common.seed_all(args.seed, common.RANK, 2, int(indices[0]))
            views = [augment(x, args.color_strength, args.blur) for x in views[:2]]
            with torch.no_grad():
                z = network(views)
            model.remember(z, indices.to(device))

    for step in range(run.step, run.total):
        views = run.crops(step)
        lr = peak_lr * learning_rate(step, warmup, run.total, args.version)
        for group in optimizer.param_groups:
            group["lr"] = lr

        views = [augment(x, args.color_strength, args.blur) for x in views]
        if step % len(batches) == 0:
            h = None
            if args.version == 1:
                h, _ = common.features(model.encoder, data, run.input, args.workers, args.precision)
                for w in model.classifier.parameters():
                    optimizer.state.pop(w, None)                        # of the old classifier
            common.seed_all(args.seed, step, 0, 2)                      # the same in every process
            model.cluster(args.iterations, h)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            outputs = network(views)                                    # (V, N / W, d or K)
        indices = run.indices.to(device, non_blocking=True)
        y = model.assignments[:, indices]                               # (H, N / W)
        if args.version == 1:
            loss = F.cross_entropy(outputs[0], y[0], model.weights, reduction="sum") / len(y[0])
        else:
            loss = cluster_prediction(outputs, model.prototypes, y, args.temperature)

        optimizer.zero_grad()
        loss.backward()
        if args.optimizer == "larc":
            common.larc(model.parameters(), weight_decay=args.weight_decay)
        optimizer.step()
        if args.version == 2:
            model.remember(outputs[:2].detach(), indices)
        run.finish_step(loss, lr, outputs[0], views, nmi=model.changes[0], empty=model.changes[1])

# ------------------------------------------------------------------- flags

def parse_args(argv=None):
    parser = common.Parser(__doc__, RECIPES, argv)
    add = parser.add_argument
    add("--version", type=int, choices=[1, 2], help="1: DeepCluster of 2018; 2: of the SwAV paper")
    add("--temperature", type=common.positive, help="softmax temperature of the prediction")
    add("--heads", type=common.count, help="number of clusterings, H")
    add("--num-prototypes", type=common.count, help="number of clusters of each, K")
    add("--iterations", type=common.count, help="iterations of k-means")
    add("--small-crops", type=common.whole, help="small crops besides the two large ones")
    add("--small-scale", type=common.fraction, help="smallest area of a small crop as a fraction")
    add("--optimizer", choices=["larc", "adamw", "sgd"], help="version 2 has larc, version 1 sgd")
    add("--color-strength", type=common.not_negative, help="strength of the colour jitter")
    add("--min-scale", type=common.fraction, help="smallest crop area as a fraction of the image")
    args = parser.parse()
    if args.small_crops and args.small_scale >= args.min_scale:
        parser.error(f"--small-scale {args.small_scale}: not below --min-scale {args.min_scale}")
    return args

if __name__ == "__main__":
    common.launch(train, parse_args)
