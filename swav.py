"""SwAV: Unsupervised Learning of Visual Features by Contrasting Cluster Assignments.
Caron, Misra, Mairal, Goyal, Bojanowski, Joulin, NeurIPS 2020, arXiv 2006.09882.

Idea. Compare cluster assignments instead of features. Prototypes are learned with the network. Each
view has a soft assignment to them, its code, and the code of one view is predicted from the others.
So that not all images take the same prototype, the codes of a batch are computed together, under
equal use of all prototypes (Sinkhorn). Small crops make the prediction harder at little cost.

Objective (equations 1, 2 and 6), over the large crops A and all V crops, a mean over the images:
    L = 1/|A| sum over i in A of  1/(V-1) sum over v != i of  - sum over k of q_i(k) log p_v(k)
    p_v = softmax(z_v . c / tau);  q maximises Tr(Q^T C^T Z) + epsilon H(Q), with equal use of all
    prototypes (equations 3 to 5)

Notation. N images in the global batch.
    x_1 .. x_V   crops                V of (N, 3, S, S)   large ones first; V counts all crops here
    f, z         encoder, projector   (N, d)              z of unit length; h (N, D) is what is kept
    c, C         prototypes           (K, d)              unit length; K is MoCo's queue length
    q, Q         codes                (N, K)              q is MoCo's query and BYOL's predictor
    tau          temperature                              tau is BYOL's momentum
The loss starts at ln K = 8.006. If it stays there, all images have the same code, 1/K for each
prototype, and `code_entropy`, the mean entropy of the codes, is near ln K as well: a smaller
--epsilon (0.03) or a longer --freeze-epochs helps.

Published: ImageNet, ResNet-50, 2 x 224 + 6 x 96: linear 72.1 / 73.9 / 74.6 / 75.3 % after 100 / 200
/ 400 / 800 epochs (official README). Ours: RESULTS.md.

Differs from the paper: the loss is the official code's mean over pairs of crops, equation 6 a sum;
Sinkhorn works on logarithms, which cannot overflow; the images' standard deviation is 0.229, there
0.228. The recipes for small images are ours.
Usage:  python swav.py    torchrun --nproc_per_node=8 swav.py --data /path/to/imagenet
"""
import math

import common  # before torch, since it handles signals from then on
import torch
import torch.nn.functional as F
from torch import nn

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

IMAGENET = dict(                        # official README and scripts
    arch="resnet50", stem="imagenet", size=224,
    epochs=200, batch_size=4096,
    lr=0.3, optimizer="larc", weight_decay=1e-6,        # 4.8 * 256 / 4096
    warmup_epochs=10,
    min_scale=0.14,                     # 2 x 224 of 0.14..1 and 6 x 96 of 0.05..0.14
    small_crops=6, small_size=96, small_scale=0.05,
    num_prototypes=3000, hidden=2048, dim=128,
    temperature=0.1, epsilon=0.05, iterations=3,
    freeze_epochs=1,                    # 312 steps; a constant of 313 in the official script
    queue_size=0, queue_start=15,
    color_strength=1.0, blur=0.5,
    knn_every=0,
)
IMAGENET_256 = dict(                    # official script for batches of 256
    IMAGENET, batch_size=256, lr=0.6, warmup_epochs=0, queue_size=3840)
SMALL = dict(                           # ours, after solo-learn's for CIFAR-10
    IMAGENET, arch="resnet18", stem="small", size=32,
    epochs=200, batch_size=256, lr=0.6,
    min_scale=0.2, small_crops=4, small_size=18, small_scale=0.08,
    num_prototypes=300, freeze_epochs=2, color_strength=0.5, blur=0.0,
    knn_every=10,
)
SHAPES = dict(                          # ours, for a few minutes on two CPU cores
    SMALL, arch="resnet10x0.25", size=24,
    epochs=6, batch_size=64, lr=0.016, optimizer="adamw", weight_decay=1e-4, warmup_epochs=0.5,
    min_scale=0.4, small_crops=4, small_size=16, small_scale=0.2,
    num_prototypes=30, hidden=256, freeze_epochs=0.5, queue_start=1,
    epsilon=0.02,                       # with 0.05 codes stay near equal shares
    color_strength=1.0,                 # one tint per image, which is what the jitter removes
    knn_every=2,
)
RECIPES = {"shapes": SHAPES, "small": SMALL, "imagenet": IMAGENET, "imagenet-256": IMAGENET_256}

# ------------------------------------------------------------------- augmentation (appendix A)

@common.in_chunks
def augment(x, strength, blur):
    """Crops (N, 3, S, S) in 0..1, half of them flipped -> views, normalised."""
    x = common.color_jitter(x, 0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
    x = common.grayscale(x, p=0.2)
    if blur:
        x = common.gaussian_blur(x, p=blur, sigma=(0.1, 2.0))
    return common.normalize(x, MEAN, STD)

# ------------------------------------------------------------------- model (figure 1, section 3)

class SwAV(nn.Module):
    def __init__(self, arch, stem, hidden, dim, num_prototypes, queue_size):
        super().__init__()
        self.encoder = common.resnet(arch, stem=stem)
        self.projector = nn.Sequential(nn.Linear(self.encoder.dim, hidden), nn.BatchNorm1d(hidden),
                                       nn.ReLU(), nn.Linear(hidden, dim))
        self.prototypes = nn.Linear(dim, num_prototypes, bias=False)
        self.register_buffer("queue", torch.zeros(2, queue_size, dim))      # newest z first

    def forward(self, crops):
        sizes = dict.fromkeys(x.shape[-1] for x in crops)       # one forward for each resolution
        same_size = [torch.cat([x for x in crops if x.shape[-1] == size]) for size in sizes]
        h = torch.cat([self.encoder(x) for x in same_size])     # (V N, D)
        z = F.normalize(self.projector(h).float(), dim=1)       # (V N, d)
        with torch.autocast(z.device.type, enabled=False):
            scores = self.prototypes(z)                         # (V N, K), float32
        return z.chunk(len(crops)), scores.chunk(len(crops))

    @torch.no_grad()
    def normalize_prototypes(self):
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))

    @torch.no_grad()
    def enqueue(self, z, crop):
        """The newest z (N, d) of large crop 0 or 1 enter the queue, the oldest leave it."""
        self.queue[crop] = torch.cat([z, self.queue[crop, :-len(z)]])

# ------------------------------------------------------------------- codes, loss (equations 1 to 6)

@torch.no_grad()
def sinkhorn(scores, epsilon, iterations):
    """Equations 3 to 5: the codes (B, K) for float32 scores (B, K). Each row sums to 1, each column
    to nearly B / K; a small epsilon makes them hard. Sinkhorn-Knopp on the logarithm of Q."""
    log_q = scores / epsilon
    for _ in range(iterations):
        log_q = log_q - log_q.logsumexp(0, keepdim=True)        # each prototype: an equal share
        log_q = log_q - log_q.logsumexp(1, keepdim=True)        # each sample: 1
    return log_q.exp()

def swapped_prediction(scores, codes, temperature):
    """Equations 1, 2 and 6, a scalar, the mean over the images: each code is predicted from every
    other crop. scores: (N, K) of each of the V crops; codes: (N, K) of the first crops."""
    log_p = F.log_softmax(torch.stack(list(scores)) / temperature, dim=2)   # (V, N, K)
    losses = []
    for i, q in enumerate(codes):
        others = log_p.sum(0) - log_p[i]                        # (N, K), of the other V - 1 crops
        losses.append(-(q * others).sum(1).mean() / (len(scores) - 1))
    return sum(losses) / len(losses)

# ------------------------------------------------------------------- training (appendix A)

def learning_rate(step, warmup, total):
    """As a fraction of the peak: from 1/16 up, then a half cosine down to 1/1000."""
    if step < warmup:
        return 1 / 16 + 15 / 16 * step / warmup
    return 0.001 + 0.999 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2

def train(args, device):
    data = common.load_data(args.data, args.root, "pretrain", device)
    crops = [common.Crop(2, args.size, (args.min_scale, 1.0), flip=0.5)]
    if args.small_crops:
        scale = (args.small_scale, args.min_scale)
        crops.append(common.Crop(args.small_crops, args.small_size, scale, flip=0.5))
    batches = common.Batches(data, crops, args.batch_size, args.seed)
    queue_steps = args.queue_size // args.batch_size                    # whole batches

    torch.manual_seed(args.seed)
    model = SwAV(args.arch, args.stem, args.hidden, args.dim, args.num_prototypes,
                 queue_steps * args.batch_size)
    model.to(device, memory_format=torch.channels_last)
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay)
    else:
        optimizer = torch.optim.SGD(model.parameters(), args.lr, 0.9)   # larc has the decay
    run = common.Run(args, model, optimizer, batches, MEAN, STD)

    network = model
    if common.WORLD_SIZE > 1 and device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)      # global batch statistics
    network = common.distribute(network, args.compile)                  # DDP

    peak_lr = args.lr * args.batch_size / 256
    warmup = args.warmup_epochs * len(batches)
    queue_from = math.ceil(args.queue_start * len(batches))

    for step in range(run.step, run.total):
        views = run.crops(step)
        lr = peak_lr * learning_rate(step, warmup, run.total)
        for group in optimizer.param_groups:
            group["lr"] = lr

        large = augment(torch.cat(views[:2]), args.color_strength, args.blur).chunk(2)
        small = views[2:]
        if small:
            small = augment(torch.cat(small), args.color_strength, args.blur).chunk(len(small))
        views = [*large, *small]
        model.normalize_prototypes()
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            z, scores = network(views)                                  # V of (N / W, d) and K
        codes = []
        for crop in (0, 1):                                             # the large crops
            all_scores = common.gather(scores[crop].detach())           # (N, K)
            if queue_steps and step >= queue_from + queue_steps:        # the queue is full
                queued = model.queue[crop] @ model.prototypes.weight.T.detach()
                all_scores = torch.cat([queued, all_scores])
            q = sinkhorn(all_scores, args.epsilon, args.iterations)[-args.batch_size:]
            codes.append(q.chunk(common.WORLD_SIZE)[common.RANK])       # (N / W, K)
            if queue_steps and step >= queue_from:
                model.enqueue(common.gather(z[crop].detach()), crop)
        loss = swapped_prediction(scores, codes, args.temperature)

        optimizer.zero_grad()
        loss.backward()
        if step < args.freeze_epochs * len(batches):
            model.prototypes.weight.grad = None
        if args.optimizer == "larc":
            common.larc(model.parameters(), weight_decay=args.weight_decay)
        optimizer.step()
        code_entropy = torch.special.entr(q).sum(1).mean()
        run.finish_step(loss, lr, z[0], views, code_entropy=code_entropy)

# ------------------------------------------------------------------- flags

def parse_args(argv=None):
    parser = common.Parser(__doc__, RECIPES, argv)
    add = parser.add_argument
    add("--temperature", type=common.positive, help="softmax temperature of the prediction")
    add("--epsilon", type=common.positive, help="weight of the entropy of the codes")
    add("--iterations", type=common.count, help="Sinkhorn iterations")
    add("--num-prototypes", type=common.count, help="number of prototypes, K")
    add("--freeze-epochs", type=common.not_negative, help="epochs before the prototypes learn")
    add("--queue-size", type=common.whole,
        help="earlier images that take part in the codes, rounded down to whole batches; 0: none")
    add("--small-crops", type=common.whole,
        help="small crops besides the two large ones; with 0 the paper has --min-scale 0.08")
    add("--small-scale", type=common.fraction,
        help="smallest area of a small crop as a fraction of the image; the largest is --min-scale")
    add("--optimizer", choices=["larc", "adamw"], help="the paper's is larc")
    add("--color-strength", type=common.not_negative, help="strength of the colour jitter")
    add("--min-scale", type=common.fraction, help="smallest crop area as a fraction of the image")
    args = parser.parse()
    if args.small_crops and args.small_scale >= args.min_scale:
        parser.error(f"--small-scale {args.small_scale}: not below --min-scale {args.min_scale}")
    if 0 < args.queue_size < args.batch_size:
        parser.error(f"--queue-size {args.queue_size}: less than a batch of {args.batch_size}")
    return args

if __name__ == "__main__":
    common.launch(train, parse_args)
