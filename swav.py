"""SwAV: Unsupervised Learning of Visual Features by Contrasting Cluster Assignments. Caron et al., NeurIPS 2020, arXiv 2006.09882.

Idea. Compare cluster assignments instead of features. Prototypes are learned along with the network; every view of an image gets a soft assignment to
them, its code, and the code of one view is predicted from the others. So that not all images take the same prototype, codes are computed for a
batch at once under the condition that all prototypes are used equally (Sinkhorn). Many small crops make the prediction harder at little cost.

Objective (equations 1, 2 and 6), over the crops A with codes (the large ones) and all V crops, a mean over the images:

    L = 1/|A| sum over i in A of  1/(V-1) sum over v != i of  - sum over k of q_i(k) log p_v(k),      p_v = softmax(z_v . c / tau)

with q the solution of  max over Q of Tr(Q^T C^T Z) + epsilon H(Q), every prototype getting an equal share (equations 3 to 5).

Notation. N images in the batch of one process, W processes.
    x_1 .. x_V   crops             V of (N, 3, S, S)   large ones first; V counts all crops here, the small ones alone in the paper
    f, z         encoder, projector, z   (N, d)        unit length; h (N, D) before the projector is what is kept
    c, C         prototypes        (K, d)              unit length; K is the length of the queue in MoCo
    q, Q         codes             (N, K)              q is the query in MoCo and the predictor in BYOL
    tau, epsilon temperature, epsilon

Start value ln K = 8.006 for 3000 prototypes. A loss that stays there is a collapse (all images have the same code), and the log says so: a smaller
--epsilon (0.03) or a longer --freeze-epochs helps.

Image mixture (Shen et al., arXiv 2003.05438) is an option. `--mixture global|region|both`, its form of 2020, shows the network images with others of the
batch blended or pasted into them, the same in all crops, and leaves the loss alone. `--mixture unmix`, Un-Mix of 2022, adds a view of the batch mixed
with itself in reverse order, m = lambda x_1 + (1 - lambda) reversed x_1 or with a square of it; with m in place of x_1, code and prediction, the loss
gets lambda L(m, x_2 ...) + (1 - lambda) L(reversed m, x_2 ...). The official code mixes every second crop, small ones too, and reverses m's code alone.

Published: ImageNet, ResNet-50, 2 x 224 + 6 x 96, batch 4096: linear probe 72.1 / 73.9 / 74.6 / 75.3 % after 100 / 200 / 400 / 800 epochs
(official README).
Ours: embedded shapes, `python swav.py` with seeds 0, 1, 2, 2026-11-21: kNN 98.5, 96.0, 95.0 % (untrained 21.9, 23.6, 28.2 %, pixels
37.0 %). CIFAR-10: see the README. ImageNet: not run yet.

Differs from the paper:
    - The loss is the official code's mean over pairs of crops; equation 6 is a sum. BN is synchronised over all processes, there in groups of 8.
    - Sinkhorn's iterations run on logarithms, which is the same in exact arithmetic and cannot overflow.
    - The order of the colour operations is drawn for every 64 images instead of for each. The standard deviation is 0.229, not 0.228.
    - The recipes for small images are ours.

Usage:
    python swav.py                                                                a few minutes on two CPU cores
    torchrun --nproc_per_node=8 swav.py --data /path/to/imagenet                  ResNet-50 on 8 GPUs
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
    epochs=200, batch_size=4096,
    lr=0.3, optimizer="larc", weight_decay=1e-6,     # 4.8 * 256 / 4096; official README
    warmup_epochs=10,
    min_scale=0.14, small_crops=6, small_size=96, small_scale=0.05,      # 2 x 224 of 0.14..1 and 6 x 96 of 0.05..0.14
    num_prototypes=3000, hidden=2048, dim=128,
    temperature=0.1, epsilon=0.05, iterations=3,
    freeze_epochs=1,                                 # 312 steps; the official code, with the last batch, 313
    queue_size=0, queue_start=15,                    # for batches of 256: 3840 from epoch 15
    color_strength=1.0, blur=0.5,
    knn_every=0,
)
SMALL = dict(IMAGENET,                               # our own, after solo-learn's for CIFAR-10
    arch="resnet18", stem="small", size=32,
    epochs=200, batch_size=256, lr=0.6,
    min_scale=0.2, small_crops=4, small_size=18, small_scale=0.08,
    num_prototypes=300, freeze_epochs=2,
    color_strength=0.5, blur=0.0,
    knn_every=10,
)
SHAPES = dict(SMALL,                                 # our own, for a few minutes on two CPU cores
    arch="resnet10x0.25",
    epochs=14, batch_size=64, lr=0.016, optimizer="adamw", weight_decay=1e-4, warmup_epochs=0.5,
    min_scale=0.4, small_crops=4, small_size=16, small_scale=0.2,
    num_prototypes=30, hidden=256, freeze_epochs=0.5,
    epsilon=0.02,                                    # with 0.05 the codes stay near equal shares, and kNN accuracy near 50 %
    color_strength=1.0,                              # one tint an image, which is what the jitter erases
    knn_every=2,
)
RECIPES = dict(shapes=SHAPES, small=SMALL, imagenet=IMAGENET)


# ------------------------------------------------------------------------------------------------ augmentation (section 4, appendix A)

@common.by_pieces
def augment(x, strength, blur):
    """Crops (N, 3, S, S) in 0..1, half of them mirrored -> views of the same form, each with its own draws, normalised."""
    x = common.color_jitter(x, 0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength, p=0.8)
    x = common.grayscale(x, p=0.2)
    if blur:
        x = common.gaussian_blur(x, p=blur, sigma=(0.1, 2.0))
    return common.normalize(x, MEAN, STD)


# ------------------------------------------------------------------------------------------------ model (figure 1, section 3)

class SwAV(nn.Module):
    def __init__(self, arch, stem, hidden, dim, num_prototypes, queue_size):
        super().__init__()
        self.encoder = common.resnet(arch, stem=stem)
        self.projector = nn.Sequential(nn.Linear(self.encoder.dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.prototypes = nn.Linear(dim, num_prototypes, bias=False)
        self.register_buffer("queue", torch.zeros(2, queue_size, dim))                    # of all processes, newest first; zeros: not filled yet

    def forward(self, crops):
        sizes = list(dict.fromkeys(x.shape[-1] for x in crops))                           # in the crops' order
        h = torch.cat([self.encoder(torch.cat([x for x in crops if x.shape[-1] == size])) for size in sizes])     # one forward for each resolution
        z = F.normalize(self.projector(h).float(), dim=1)                                 # (VN, d)
        with torch.autocast(z.device.type, enabled=False):
            scores = self.prototypes(z)                                                   # (VN, K), float32 for the codes
        return z.chunk(len(crops)), scores.chunk(len(crops))

    @torch.no_grad()
    def normalize_prototypes(self):
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))

    @torch.no_grad()
    def codes(self, z, scores, crop, use_queue, epsilon, iterations, remember=True):
        """Codes (N, K) of large crop 0 or 1 (section 3.1). The queue's images take part in the equal shares; then these z (N, d) enter it, if it
        is to `remember` them."""
        scores, n = scores.detach(), len(z)
        if use_queue and self.queue[crop, -1].any():                                      # once it is full
            mine = self.queue[crop].view(-1, common.world_size(), n, z.shape[1])[:, common.rank()].flatten(0, 1)
            scores = torch.cat([mine @ self.prototypes.weight.T, scores])                 # with the prototypes of today
        if use_queue and remember:
            newest = gather(z.detach())
            self.queue[crop] = torch.cat([newest, self.queue[crop, :-len(newest)]])
        return sinkhorn(scores, epsilon, iterations)[-n:]


def gather(z):
    """(N, d) of each process -> (NW, d) of all, without gradient. The same tensor in a single process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return z
    everyones = [torch.empty_like(z) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, z.contiguous())
    return torch.cat(everyones)


# ------------------------------------------------------------------------------------------------ codes and loss (equations 2 to 6)

@torch.no_grad()
def sinkhorn(scores, epsilon, iterations):
    """Codes: the assignment of samples to prototypes that uses all prototypes equally (equations 3 to 5; Sinkhorn-Knopp, `iterations` rounds).

    scores (B, K), any float type -> (B, K) float32 (float64 from float64), rows sum to 1. Over several processes, each with B samples, the equal
    shares are those of all samples together. Works on logarithms, so that no score is too large.
    """
    log_q = scores.to(torch.promote_types(scores.dtype, torch.float32)) / epsilon
    for _ in range(iterations):
        log_q = log_q - logsumexp_of_all(log_q)                                           # each prototype: an equal share of the samples
        log_q = log_q - log_q.logsumexp(1, keepdim=True)                                  # each sample: 1
    return log_q.exp()


def logsumexp_of_all(log_q):
    """(B, K) -> (1, K): log of the sum over the samples of all processes."""
    largest = log_q.amax(0, keepdim=True)
    several = dist.is_initialized() and dist.get_world_size() > 1
    if several:
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    total = (log_q - largest).exp().sum(0, keepdim=True)
    if several:
        dist.all_reduce(total)
    return largest + total.log()


def swapped_prediction(scores, codes, temperature):
    """Equations 1, 2 and 6: each code is predicted from every other crop. A scalar; a mean over images, so that DDP's mean of the gradients is exact.

    scores: a list of (B, K), one for each of the V crops, cosines to the prototypes; codes: a list of (B, K) for the first crops, rows sum to 1.
    """
    log_p = [F.log_softmax(s.to(torch.promote_types(s.dtype, torch.float32)) / temperature, dim=1) for s in scores]
    losses = [-(q * log_p[v]).sum(1).mean() for i, q in enumerate(codes) for v in range(len(scores)) if v != i]
    return sum(losses) / len(losses)


# ------------------------------------------------------------------------------------------------ training (section 3, appendix A)

def train(args, device):
    data = common.load_data(args.data, args.root, "pretrain", device)
    crops = [common.Crop(2, args.size, (args.min_scale, 1.0), flip=0.5)]
    if args.small_crops:
        if args.small_scale >= args.min_scale:
            raise common.UserError(f"--small-scale {args.small_scale}: not below --min-scale {args.min_scale}, the largest share of a small crop")
        crops.append(common.Crop(args.small_crops, args.small_size, (args.small_scale, args.min_scale), flip=0.5))
    batches = common.Batches(data, crops, args.batch_size, args.seed)
    queue_size = args.queue_size // args.batch_size * args.batch_size        # whole batches, as in the official code
    if args.queue_size and not queue_size:
        raise common.UserError(f"--queue-size {args.queue_size}: less than a batch of {args.batch_size}")

    torch.manual_seed(args.seed)
    model = SwAV(args.arch, args.stem, args.hidden, args.dim, args.num_prototypes, queue_size).to(device, memory_format=torch.channels_last)
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)                        # LARC takes care of the decay
    collapsed_loss = math.log(args.num_prototypes) * (2 if args.mixture == "unmix" else 1)
    run = common.Run("swav", args, model, optimizer, batches, MEAN, STD, collapsed_loss=collapsed_loss)

    network = model
    if common.world_size() > 1:
        if device.type == "cuda":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)       # statistics of all processes
        else:
            common.say("BatchNorm takes its statistics in each process alone: torch has no SyncBatchNorm for CPUs")
        network = DistributedDataParallel(network)
    if args.compile:
        network = torch.compile(network)

    peak_lr = args.lr * args.batch_size / 256
    warmup, total = args.warmup_epochs * len(batches), args.epochs * len(batches)

    for step, views, indices in run:
        if step < warmup:                                                    # from 1/16 of the peak, and down to 1/1000 of it
            lr = peak_lr * (1 / 16 + 15 / 16 * step / warmup)
        else:
            lr = peak_lr * (0.001 + 0.999 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2)
        for group in optimizer.param_groups:
            group["lr"] = lr

        views = [augment(x, args.color_strength, args.blur) for x in views]
        common.mixture(views, args.mixture, args.mix_alpha, args.mix_beta, args.mix_count, args.mix_probability, args.mix_decay)
        if args.mixture == "unmix":
            mixed, share = common.unmix(views[0], args.unmix_global, args.mix_alpha)
            views.insert(2, mixed)
        model.normalize_prototypes()
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            z, scores = network(views)                                       # V of (N, d), V of (N, K)
        use_queue = queue_size > 0 and step >= args.queue_start * len(batches)
        if args.mixture == "unmix":                                          # whose code is found beside view 1's queue, but never enters it
            q = model.codes(z[2], scores[2], 0, use_queue, args.epsilon, args.iterations, remember=False)
        codes = [model.codes(z[i], scores[i], i, use_queue, args.epsilon, args.iterations) for i in (0, 1)]
        if args.mixture == "unmix":                                          # the mixture in place of view 1, in both orders
            first, second, mixed, *small = scores
            loss = (swapped_prediction([first, second, *small], codes, args.temperature)
                    + share * swapped_prediction([mixed, second, *small], [q, codes[1]], args.temperature)
                    + (1 - share) * swapped_prediction([mixed.flip(0), second, *small], [q.flip(0), codes[1]], args.temperature))
        else:
            loss = swapped_prediction(scores, codes, args.temperature)

        optimizer.zero_grad()
        loss.backward()
        if step < args.freeze_epochs * len(batches):
            model.prototypes.weight.grad = None
        if args.optimizer == "larc":
            common.larc_(model.parameters(), weight_decay=args.weight_decay)
        optimizer.step()
        run.log(loss, lr, z[0], views)


# ------------------------------------------------------------------------------------------------ flags

def parse_args(argv=None):
    parser = common.Parser(__doc__, RECIPES, argv)
    parser.add_argument("--temperature", type=common.positive, help="of the prediction's softmax, tau")
    parser.add_argument("--epsilon", type=common.positive, help="of the codes' entropy")
    parser.add_argument("--iterations", type=common.count, help="of Sinkhorn")
    parser.add_argument("--num-prototypes", type=common.count, help="K")
    parser.add_argument("--hidden", type=common.count, help="width of the projector's hidden layer")
    parser.add_argument("--dim", type=common.count, help="width of the projection")
    parser.add_argument("--freeze-epochs", type=common.not_negative, help="epochs before the prototypes begin to learn")
    parser.add_argument("--queue-size", type=common.whole,
                        help="earlier images, of all processes, that take part in the codes, rounded down to whole batches; 0: none")
    parser.add_argument("--queue-start", type=common.not_negative, help="epoch from which the queue is filled")
    parser.add_argument("--small-crops", type=common.whole,
                        help="how many small crops besides the two large ones; with 0 the paper takes --min-scale 0.08")
    parser.add_argument("--small-size", type=common.count, help="side of the small crops in pixels")
    parser.add_argument("--small-scale", type=common.share,
                        help="smallest share of the image's area that a small crop has; the largest is --min-scale")
    parser.add_argument("--optimizer", choices=["larc", "adamw"], help="the paper's is larc: SGD with layer-wise adaptive rates")
    parser.add_argument("--color-strength", type=common.not_negative, help="of the colour jitter, times (0.8, 0.8, 0.8, 0.2)")
    parser.add_argument("--blur", type=common.share, help="probability of the Gaussian blur")
    parser.add_argument("--min-scale", type=common.share, help="smallest share of the image's area that a large crop has")
    parser.add_mixture()
    return parser.parse()


if __name__ == "__main__":
    common.launch(train, parse_args())
