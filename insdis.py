"""InsDis: Unsupervised Feature Learning via Non-Parametric Instance Discrimination.
Wu, Xiong, Yu, Lin, CVPR 2018, arXiv 1805.01978.

Idea. Every image is a class of its own. A class has no learned weight vector but the feature that
its image had when it was last seen, in a memory bank with a row for every image. The network learns
to find an image's own row among others; augmentation changes the image from visit to visit and so
says what to ignore. With a million classes, the others are a few thousand rows drawn at random.

Objective (equations 2 and 4), a mean over the images, and the update of the bank (official code):
    L = -log P(i | v),   P(i | v) = exp(v_i . v / tau) / Z,   v_i <- normalised t v_i + (1 - t) v
With `--loss softmax` Z is the sum over the image's own row and the drawn ones. With `--loss nce`
(equations 6 to 8) Z is a constant, estimated from the first batch, and h = P / (P + m / n):
    L = -log h(i, v) - sum over the m drawn rows j of log (1 - h(j, v))

Notation. N images in the global batch, n in the data set.
    x            x1                     (N, 3, S, S)   one view of each image
    f, v         encoder, projector, z  (N, d)         unit length; h (N, D) before is what is kept
    v_i          memory                 (n, d)         the memory bank, the same in every process
    m, tau, t    negatives, temperature, memory_momentum; Z is normalizer
The loss starts near ln(m + 1) + 1 / (2 d tau^2), 9.12 for 4096 rows (NCE about 1 more); with
`--negatives 0` the sum is over the whole bank, and the start has ln n. Kaiming He advises a running
mean of Z, with momentum 0.99, where the first batch misleads (issue 23 of CMC's repository).

Published: ImageNet, ResNet-50: nearest neighbours 46.8 % (official README, NCE, 4096); linear 54.0
(as quoted by MoCo), 56.5 (NCE), 58.5 (softmax, 16384; both in CMC's README). Ours: RESULTS.md.

Differs: the proximal term (equations 9, 10) is the bank's momentum, as in the official code. There
CIFAR images are not mirrored and have CIFAR's mean; it is float32, here bf16 on GPUs.
Usage:  python insdis.py    torchrun --nproc_per_node=8 insdis.py --data /path/to/imagenet
"""
import math

import common  # before torch, since it handles signals from then on
import torch
import torch.nn.functional as F
from torch import nn

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

IMAGENET = dict(                        # official main.py
    arch="resnet50", stem="imagenet", size=224,
    epochs=200, batch_size=256,
    lr=0.03, optimizer="sgd", schedule="steps", weight_decay=1e-4,      # decay on everything
    warmup_epochs=0,
    loss="nce", negatives=4096, temperature=0.07, memory_momentum=0.5,
    dim=128,
    gray_first=True, color_strength=1.0, min_scale=0.2,
    knn_every=0,
)
SMALL = dict(                           # official cifar.py: the softmax over the whole bank
    IMAGENET, arch="resnet18", stem="small", size=32,
    batch_size=128, lr=0.06, weight_decay=5e-4,         # 0.03 for 128
    loss="softmax", negatives=0, temperature=0.1, gray_first=False,
    knn_every=10,
)
SHAPES = dict(                          # ours, for a few minutes on two CPU cores
    SMALL, arch="resnet10x0.25", size=24,
    epochs=20, batch_size=64, lr=0.016, optimizer="adamw", schedule="cosine", weight_decay=1e-4,
    warmup_epochs=1, temperature=0.1,
    color_strength=2.0,                 # one tint per image, which is what the jitter removes
    min_scale=0.4,                      # smaller crops often miss the object
    knn_every=4,
)
RECIPES = dict(shapes=SHAPES, small=SMALL, imagenet=IMAGENET)

# ------------------------------------------------------------------- augmentation (official code)

@common.in_chunks
def augment(x, strength, gray_first):
    """Crops (N, 3, S, S) in 0..1, half of them flipped -> views, normalised."""
    if gray_first:
        x = common.grayscale(x, p=0.2)
    x = common.color_jitter(x, 0.4 * strength, 0.4 * strength, 0.4 * strength, 0.4 * strength,
                            p=1.0)
    if not gray_first:
        x = common.grayscale(x, p=0.2)
    return common.normalize(x, MEAN, STD)

# ------------------------------------------------------------------- model (figure 2, section 3.1)

class InsDis(nn.Module):
    def __init__(self, arch, stem, dim, num_images):
        super().__init__()
        self.encoder = common.resnet(arch, stem=stem)
        self.projector = nn.Linear(self.encoder.dim, dim)
        a = math.sqrt(3 / dim)                                  # rows of about unit length
        self.register_buffer("memory", torch.empty(num_images, dim).uniform_(-a, a))
        self.register_buffer("normalizer", torch.zeros(()))

    def forward(self, x):
        return F.normalize(self.projector(self.encoder(x)).float(), dim=1)      # (N, d)

    def scores(self, z, indices, negatives):
        """Cosines of z (N, d) to the image's own row of the bank and to m rows drawn from all,
        perhaps its own again, (N, 1 + m); without negatives to all rows, (N, n)."""
        if not negatives:
            return z @ self.memory.T
        rows = torch.randint(len(self.memory), (len(z), 1 + negatives), device=z.device)
        rows[:, 0] = indices
        candidates = self.memory[rows]                          # (N, 1 + m, d)
        return (candidates @ z[:, :, None])[:, :, 0]

    @torch.no_grad()
    def estimate_normalizer(self, scores, temperature):
        """Equation 8: Z is n times the mean of exp(v_j . v / tau) over all candidates."""
        mean = common.gather((scores / temperature).exp().mean()[None]).mean()
        self.normalizer.copy_(len(self.memory) * mean)
        common.say(f"Z = {self.normalizer.item():.4g}, estimated from the first batch")

    @torch.no_grad()
    def remember(self, z, indices, momentum):
        """The rows of the images `indices` (N,) of all processes move towards their z (N, d)."""
        z = common.gather(z.detach())
        indices = common.gather(indices)
        self.memory[indices] = F.normalize(z.lerp(self.memory[indices], momentum), dim=1)

# ------------------------------------------------------------------- losses (equations 2 to 8)

def instance_softmax(scores, temperature, own):
    """Equation 2, a scalar, the mean over the images. scores (N, C): cosines to the candidates; own
    (N,): the column of the image's own row."""
    return F.cross_entropy(scores / temperature, own)

def nce(scores, normalizer, temperature, num_images, eps=1e-7):
    """Equations 6 and 7, a scalar, summed over the candidates, the mean over the images. scores
    (N, 1 + m): cosines to the own row and to m rows drawn uniformly from `num_images`."""
    p = (scores / temperature).exp() / normalizer
    noise = (scores.shape[1] - 1) / num_images                  # m / n
    own = p[:, 0] / (p[:, 0] + noise + eps)
    drawn = noise / (p[:, 1:] + noise + eps)
    return -(own.log() + drawn.log().sum(1)).mean()

# ------------------------------------------------------------------- training (official code)

def learning_rate(step, warmup, total, schedule):
    """As a fraction of the peak: a linear warm-up, if any, then a tenth after 60 % and 80 % of the
    run (120 and 160 of 200 epochs), or a half cosine to 0."""
    if step < warmup:
        return step / warmup
    if schedule == "steps":
        return 0.1 ** ((step >= 0.6 * total) + (step >= 0.8 * total))
    return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2

def train(args, device):
    data = common.load_data(args.data, args.root, "pretrain", device)
    crop = common.Crop(1, args.size, (args.min_scale, 1.0), flip=0.5)
    batches = common.Batches(data, [crop], args.batch_size, args.seed)

    torch.manual_seed(args.seed)
    model = InsDis(args.arch, args.stem, args.dim, len(data))
    model.to(device, memory_format=torch.channels_last)
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay)
    else:
        optimizer = torch.optim.SGD(model.parameters(), args.lr, 0.9,
                                    weight_decay=args.weight_decay)
    run = common.Run(args, model, optimizer, batches, MEAN, STD)

    network = common.distribute(model, args.compile)                    # DDP; BN per process

    peak_lr = args.lr * args.batch_size / 256
    warmup = args.warmup_epochs * len(batches)

    for step in range(run.step, run.total):
        x1, = run.crops(step)
        lr = peak_lr * learning_rate(step, warmup, run.total, args.schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr

        x1 = augment(x1, args.color_strength, args.gray_first)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            z = network(x1)                                             # (N / W, d)
        indices = run.indices.to(device, non_blocking=True)
        scores = model.scores(z, indices, args.negatives)               # (N / W, 1 + m)
        if args.loss == "nce":
            if step == 0:
                model.estimate_normalizer(scores, args.temperature)
            loss = nce(scores, model.normalizer, args.temperature, len(data))
        else:
            own = torch.zeros_like(indices) if args.negatives else indices
            loss = instance_softmax(scores, args.temperature, own)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.remember(z, indices, args.memory_momentum)                # after they were scored
        run.finish_step(loss, lr, z, [x1])

# ------------------------------------------------------------------- flags

def parse_args(argv=None):
    parser = common.Parser(__doc__, RECIPES, argv)
    add = parser.add_argument
    add("--loss", choices=["nce", "softmax"], help="with a constant Z, or the softmax")
    add("--negatives", type=common.whole, help="rows drawn for each image, m; 0: the whole bank")
    add("--temperature", type=common.positive, help="softmax temperature")
    add("--memory-momentum", type=common.fraction, help="weight of the old row in the new one")
    add("--dim", type=common.count, help="dimension of the projection")
    add("--optimizer", choices=["sgd", "adamw"], help="the paper's is sgd")
    add("--schedule", choices=["steps", "cosine"], help="how the rate decays; the paper's is steps")
    add("--color-strength", type=common.not_negative, help="strength of the colour jitter")
    add("--min-scale", type=common.fraction, help="smallest crop area as a fraction of the image")
    args = parser.parse()
    if args.loss == "nce" and not args.negatives:
        parser.error("--negatives 0: the whole bank is for --loss softmax; nce needs drawn rows")
    return args

if __name__ == "__main__":
    common.launch(train, parse_args)
