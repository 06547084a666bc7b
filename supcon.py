"""SupCon: Supervised Contrastive Learning.
Khosla, Teterwak, Wang, Sarna, Tian et al., NeurIPS 2020, arXiv 2004.11362.

SUPERVISED: it learns from the labels of the training images, as no other method here does, and its
figures do not compare with theirs. It is here because it is SimCLR with one change.

Idea. SimCLR knows one positive of a view, the other view of the same image, and pushes everything
else away, images of the same class too. With labels every view of the class is a positive.

Objective (equation 2, "out", or equation 3, "in"), over all 2N views i; P(i) are the other views
with the label of i, p(i, p) = exp(z_i . z_p / tau) / sum over a != i of exp(z_i . z_a / tau):
    out:  l(i) = -tau / tau_0  1/|P(i)| sum over p in P(i) of log p(i, p)
    in:   l(i) = -tau / tau_0  log( 1/|P(i)| sum over p in P(i) of p(i, p) )

Notation. N images in the global batch.
    x~_i         x1, x2         (N, 3, S, S)   the two views
    y            labels         (N,)           the class of each image
    Enc, r       encoder, h     (N, D)         the representation, what is kept
    Proj, z      projector, z   (N, d)         of unit length
    tau, tau_0   temperature, base_temperature
tau_0 = 0.07 is the official code's; tau / tau_0 multiplies SGD's rate by 1.43 at tau = 0.1, and the
loss, which starts at tau / tau_0 ln(2N - 1) = 10.9 at a batch of 1024.
Published (official README): CIFAR-10, ResNet-50, 1000 epochs: linear 96.0 % (cross entropy 95.0,
SimCLR 93.6); ImageNet, ResNet-50, with MoCo's queue: 79.1 %. Ours: RESULTS.md.

Differs from the paper: the mean over the views, as in the official code, where equations 2 and 3
have sums. BN is synchronised; the warm-up starts at 0 and the cosine after it; ImageNet's mean and
standard deviation normalise the images. `small` is the official CIFAR-10 recipe, `imagenet` ours.
Usage:  python supcon.py    torchrun --nproc_per_node=8 supcon.py --data /path/to/imagenet
"""
import math

import common  # before torch, since it handles signals from then on
import torch
import torch.nn.functional as F
from torch import nn

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

SMALL = dict(                           # official code and README, CIFAR-10
    arch="resnet50", stem="small", size=32,
    epochs=1000, batch_size=1024,
    lr=0.125, optimizer="sgd", weight_decay=1e-4,       # 0.5 = 0.125 * 1024 / 256
    warmup_epochs=10,
    temperature=0.1, base_temperature=0.07, positives="out",
    dim=128,
    color_strength=1.0, blur=0.0,
    min_scale=0.2,
    knn_every=10,
)
IMAGENET = dict(                        # ours, not tried
    SMALL, stem="imagenet", size=224, epochs=200, blur=0.5,
    knn_every=0,
)
SHAPES = dict(                          # ours, for a few minutes on two CPU cores
    SMALL, arch="resnet10x0.25", size=24,
    epochs=6, batch_size=64, lr=0.016, optimizer="adamw", warmup_epochs=1,
    color_strength=2.0,                 # one tint per image, which is what the jitter removes
    min_scale=0.4,                      # smaller crops often miss the object
    knn_every=2,
)
RECIPES = dict(shapes=SHAPES, small=SMALL, imagenet=IMAGENET)

# ------------------------------------------------------------------- augmentation (official code)

@common.in_chunks
def augment(x, strength, blur):
    """Crops (N, 3, S, S) in 0..1, half of them flipped -> views, normalised."""
    x = common.color_jitter(x, 0.4 * strength, 0.4 * strength, 0.4 * strength, 0.1 * strength)
    x = common.grayscale(x, p=0.2)
    if blur:
        x = common.gaussian_blur(x, p=blur, sigma=(0.1, 2.0))
    return common.normalize(x, MEAN, STD)

# ------------------------------------------------------------------- model (section 3.1)

class SupCon(nn.Module):
    def __init__(self, arch, stem, dim):
        super().__init__()
        self.encoder = common.resnet(arch, stem=stem)
        D = self.encoder.dim
        self.projector = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, dim))

    def forward(self, x):
        h = self.encoder(x)                                     # (N, D)
        return self.projector(h)                                # (N, d)

# ------------------------------------------------------------------- loss (equations 2 and 3)

def supervised_contrastive(z1, z2, labels, temperature, base_temperature, positives="out"):
    """A scalar, the mean over the 2N views. z1, z2 (N, d): projections of the two views, of any
    length; labels (N,). With all labels different, NT-Xent times temperature / base_temperature."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)                 # (2N, d)
    logits = z @ z.T / temperature                              # (2N, 2N)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_p = F.log_softmax(logits.masked_fill(itself, -math.inf), dim=1)     # a != i
    same = (labels[:, None] == labels).repeat(2, 2) & ~itself   # P(i), never empty
    count = same.sum(1).to(z.dtype)
    if positives == "out":
        value = log_p.masked_fill(~same, 0).sum(1) / count      # the mean outside the logarithm
    else:
        value = log_p.masked_fill(~same, -math.inf).logsumexp(1) - count.log()      # and inside
    return -temperature / base_temperature * value.mean()

# ------------------------------------------------------------------- training (official code)

def learning_rate(step, warmup, total):
    """As a fraction of the peak: a linear warm-up, then a half cosine to 1/1000."""
    if step < warmup:
        return step / warmup
    return 0.001 + 0.999 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2

def train(args, device):
    data = common.load_data(args.data, args.root, "train", device)      # "train" has labels
    crop = common.Crop(2, args.size, (args.min_scale, 1.0), flip=0.5)
    batches = common.Batches(data, [crop], args.batch_size, args.seed)
    labels = data.labels.to(device)

    torch.manual_seed(args.seed)
    model = SupCon(args.arch, args.stem, args.dim)
    model.to(device, memory_format=torch.channels_last)
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay)
    else:
        optimizer = torch.optim.SGD(model.parameters(), args.lr, 0.9,
                                    weight_decay=args.weight_decay)
    run = common.Run(args, model, optimizer, batches, MEAN, STD)
    common.say("supervised: this method learns from the labels")

    network = model
    if common.WORLD_SIZE > 1 and device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)      # global batch statistics
    network = common.distribute(network, args.compile)                  # DDP

    peak_lr = args.lr * args.batch_size / 256
    warmup = args.warmup_epochs * len(batches)

    for step in range(run.step, run.total):
        x1, x2 = run.crops(step)
        lr = peak_lr * learning_rate(step, warmup, run.total)
        for group in optimizer.param_groups:
            group["lr"] = lr

        x = augment(torch.cat([x1, x2]), args.color_strength, args.blur)
        x1, x2 = x.chunk(2)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            z = network(x)                                              # (2N / W, d)
        # Every process has the whole batch's loss; the gather adds gradients: DDP's mean is exact.
        z1, z2 = [common.gather_with_gradient(v) for v in z.float().chunk(2)]   # (N, d)
        y = common.gather(labels[run.indices.to(device, non_blocking=True)])    # (N,)
        loss = supervised_contrastive(z1, z2, y, args.temperature, args.base_temperature,
                                      args.positives)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.finish_step(loss, lr, z1, [x1, x2])

# ------------------------------------------------------------------- flags

def parse_args(argv=None):
    parser = common.Parser(__doc__, RECIPES, argv)
    add = parser.add_argument
    add("--temperature", type=common.positive, help="softmax temperature")
    add("--base-temperature", type=common.positive,
        help="the loss is multiplied by --temperature over this")
    add("--positives", choices=["out", "in"],
        help="take their mean outside the logarithm (equation 2) or inside (equation 3)")
    add("--dim", type=common.count, help="dimension of the projection")
    add("--optimizer", choices=["sgd", "adamw"], help="the paper's is sgd")
    add("--color-strength", type=common.not_negative, help="strength of the colour jitter")
    add("--min-scale", type=common.fraction, help="smallest crop area as a fraction of the image")
    return parser.parse()

if __name__ == "__main__":
    common.launch(train, parse_args)
