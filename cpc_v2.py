"""CPC v2: Data-Efficient Image Recognition with Contrastive Predictive Coding. Henaff et al., ICML 2020, arXiv 1905.09272.

Idea. Cut an image into overlapping patches and encode each alone. A context network that sees only the rows at or above a place predicts what
the patches some rows further down look like to the encoder: it must pick the true one among the patches of all images of the batch. The same
goes upwards, leftwards and rightwards. Patches are disturbed one by one: what their pixels share is no help, and what the image shows is left.

Objective (section 2.1 and appendix A), a mean over images and places (i, j), a sum over the offsets k, a mean over the directions:

    l(i, j, k) = -log  exp(p . z'_(i+k, j)) / sum over all z'_l of the batch of exp(p . z'_l),      p = 0.1 W_k c_(i, j),   z' = W z

Notation. N images in the batch of one process, R x C patches an image.
    x_(i, j)     patches           (N, R, C, 3, s, s)    the patches
    f, z         encoder, z        (N, D, R, C)          one latent vector a patch
    g, c         contexts, c       (N, D, R, C)          context: c_(i, j) sees rows 0 .. i
    p            predictions       (N, R - k, C, d)      for an offset k, from the context k rows above
    z'           targets           (N, R, C, d)          W z

Start value ln(N R C) for each offset: 6.36 for the 16 images x 36 patches of one of the paper's workers. The loss falls from there. The log's `bound`,
ln(N R C) - loss / number of offsets, is a lower bound on the mutual information of context and patch as in simclr.py, and cannot exceed ln(N R C).
But it holds only if the other candidates know nothing of the context, and R C - 1 of them are of the same image: with few images it means little.

Published: ImageNet, ResNet-161, 200 epochs: linear probe 71.5 % (table 1), ResNet-50 63.8 %; with 1 % of the labels 77.1 % top-5 on the fixed
representation, 78.3 % fine-tuned (table 3).
Ours: embedded shapes, `python cpc_v2.py`, 365 seconds of one CPU core, 2026-11-21: kNN 89.3 % (pixels 37.0 %). CIFAR-10: see the README. ImageNet: not run yet.

Left open by the paper, chosen here:
    - The printed code uses one offset, k = 3 (`range(2, 3)`); `--offsets 3 4 5` is the other reading. Mean over contexts, sum over offsets, mean
      over directions. Each direction has its own predictors, with offsets, and its own W, which serves all its offsets.
    - ResNet-161 is counted as stages of 3, 4 and 46 pre-activation blocks with 64-256, 128-512 and 512-4096 channels: 303.6 M parameters. The
      paper says 305 M; with one target layer and four predictors it is 304.95 M, which would leave out four context networks of 12.15 M.
    - Layer norm is over the channels and places of one patch, with scale and offset for each channel, wherever a pre-activation ResNet has a norm.
    - The last ReLU of the context network comes once, after its five blocks. No rate schedule, no weight decay.
    - Images are mirrored at random as a whole, and normalised by ImageNet's mean and deviation. Of AutoAugment's operations cutout and sample pairing
      are left out, the strength is uniform over its table's range, the filling is grey, the interpolation linear. Elastic deformation
      and shear share a coin; the colour-histogram operation is a random curve for each channel.
    - Colour dropping leaves one channel; the other two become their mean.

Differs from the paper:
    - The order of the colour operations is drawn for every 64 patches (on a CPU at 80 pixels: 40) instead of for each.
    - The candidates are those of a process: 64 x 36 in the command below, 16 x 36 on the paper's 32 workers. `--gather` takes those of all.
    - Inception's contrast is about the mean brightness of the patch, not of each channel, and colours are clipped after each operation.
    - The average of the weights starts at the initial ones, as an exponential average with momentum 0.9999.
    - The recipes `small` and `shapes` are ours: small patches of enlarged small images, a narrow ResNet's first three
      stages, and fewer context blocks: at 7 rows a context sees three rows above its own and no more. ResNet-50 is taken with three stages too; the
      figure above is likely of four (`--stages 4`).

Usage:
    python cpc_v2.py                                                              four minutes on two CPU cores
    torchrun --nproc_per_node=8 cpc_v2.py --data /path/to/imagenet                ResNet-161 on 8 GPUs; --checkpointing if memory is short
"""
import copy, functools, math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import common

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

IMAGENET = dict(
    arch="resnet161", stages=3, norm="layer", stem="imagenet",       # section 2.1
    resize=300, size=260, patch_size=80, stride=36,                  # section 2.1: 6 x 6 patches
    epochs=200, batch_size=512,      # appendix A
    lr=2e-4,                         # appendix A: 4e-4 = 2e-4 * 512 / 256
    weight_decay=0.0, warmup_epochs=0,
    clip=0.01, ema_momentum=0.9999,  # appendix A
    directions=4,                    # section 4.1
    offsets=[3],                     # appendix A, the printed code
    hidden=256, layers=5,            # appendix A, pixelCNN
    dim=64, scale=0.1,               # appendix A, the printed code
    patch_augment="full",            # appendix A; "drop" is section 4.1's colour dropping
    knn_every=0,
)
SMALL = dict(IMAGENET,               # our own
    arch="resnet18", stem="small",
    resize=72, size=64, patch_size=16, stride=8,                     # 7 x 7 patches; those two rows apart share no pixels
    batch_size=256, lr=4e-4, ema_momentum=0.999,
    offsets=[2, 3, 4], hidden=128, layers=3,
    knn_every=10,
)
SHAPES = dict(SMALL,                 # our own, for four minutes on two CPU cores
    arch="resnet10x0.25",
    resize=56, size=48,              # 5 x 5 patches
    epochs=6, batch_size=16, lr=32e-3, ema_momentum=0.99,
    hidden=64,
    knn_every=2,
)
RECIPES = dict(shapes=SHAPES, small=SMALL, imagenet=IMAGENET)


# ------------------------------------------------------------------------------------------------ augmentation (section 2.1, appendix A)

class RandomCrop(NamedTuple):
    """The image resized to `resize` x `resize`, whatever its shape, and of that a random square of `size`: in one go, as a crop of the image."""
    size: int
    resize: int
    interpolation: str = "bilinear"
    count: int = 1
    flip: float = 0.0

    def boxes(self, n, height, width):
        h, w = max(1, round(height * self.size / self.resize)), max(1, round(width * self.size / self.resize))
        u = torch.rand(2, n)
        top, left = (u[0] * (height - h + 1)).floor(), (u[1] * (width - w + 1)).floor()
        return torch.stack([top, left, torch.full((n,), float(h)), torch.full((n,), float(w))], 1)


def extract_patches(images, size, stride):
    """(N, 3, H, W) -> (N, R, C, 3, size, size): patches `stride` apart, from the top left corner on; what does not fill a patch is left out."""
    return images.unfold(2, size, stride).unfold(3, size, stride).permute(0, 2, 3, 1, 4, 5)


@common.by_pieces
def augment(x, patch_augment):
    """Patches (M, 3, s, s) in 0..1 -> the same form, each with its own draws, normalised. In float32, since evaluate.py calls it under autocast."""
    if patch_augment == "full":
        with torch.autocast(x.device.type, enabled=False):
            x = common.autoaugment_primitives(x, count=2)                                  # (i)
            x = common.elastic(x, p=0.2)                                                   # (ii)
            x = common.color_curves(x, p=0.2)
            x = common.color_jitter(x, 32 / 255, (0.5, 1.5), (0.5, 1.5), 0.2, p=0.8, additive=True)      # (iii), Inception's
            x = common.grayscale(x, p=0.25)                                                # (iv)
    x = common.normalize(x, MEAN, STD)
    if patch_augment == "drop":
        kept = torch.randint(3, (len(x),))
        x = x * F.one_hot(kept, 3)[:, :, None, None].to(x)                                 # 0 is the mean
    return x


# ------------------------------------------------------------------------------------------------ model (figure 2, appendix A)

class CPC(nn.Module):
    def __init__(self, arch, stem, norm, stages, directions, offsets, hidden, layers, dim, scale, checkpointing=False):
        super().__init__()
        self.encoder = common.resnet(arch, norm=norm, stem=stem, stages=stages, version=2)
        self.average = copy.deepcopy(self.encoder).requires_grad_(False)                   # Polyak's, what is kept
        if checkpointing:
            recompute_blocks(self.encoder)
        D, self.offsets, self.scale = self.encoder.dim, offsets, scale
        self.turns = (0, 2, 1, 3)[:directions]                                             # quarter turns: down, up, left and right
        self.contexts = nn.ModuleList(context_network(D, hidden, layers) for _ in self.turns)
        self.targets = nn.ModuleList(nn.Conv2d(D, dim, 1, bias=False) for _ in self.turns)        # a bias would cancel in the softmax
        self.predictors = nn.ModuleList(nn.ModuleList(nn.Conv2d(D, dim, 1) for _ in offsets) for _ in self.turns)

    def forward(self, patches):
        """(N, R, C, 3, s, s) -> a list of (predictions, targets, offset), `cpc_loss`'s arguments, one for each direction and offset."""
        z = encode(self.encoder, patches)                                                  # (N, D, R, C)
        found = []
        for turn, context, target, predictors in zip(self.turns, self.contexts, self.targets, self.predictors):
            turned = z.rot90(turn, (2, 3))                                                 # so that the direction is down
            c = context(turned)                                                            # (N, D, R, C)
            targets = target(turned).permute(0, 2, 3, 1)                                   # (N, R, C, d)
            for k, predictor in zip(self.offsets, predictors):
                predictions = self.scale * predictor(c[:, :, :-k]).permute(0, 2, 3, 1)     # (N, R - k, C, d)
                found.append((predictions, targets, k))
        return found

    @torch.no_grad()
    def update_average(self, ema_momentum):
        for theta, average in zip(self.encoder.parameters(), self.average.parameters()):
            average.lerp_(theta, 1 - ema_momentum)
        for theirs, ours in zip(self.encoder.buffers(), self.average.buffers()):           # of --norm batch
            ours.copy_(theirs)


def encode(encoder, patches):
    """(N, R, C, 3, s, s) -> latents (N, D, R, C): the encoder, and its spatial mean, on each patch alone."""
    n, rows, columns = patches.shape[:3]
    x = patches.flatten(0, 2).contiguous(memory_format=torch.channels_last)                # (N R C, 3, s, s)
    return encoder(x).view(n, rows, columns, -1).permute(0, 3, 1, 2)


def context_network(dim, hidden, layers):
    """Appendix A's pixelCNN, (N, dim, R, C) -> the same. Row i of the result depends on rows 0 to i and, after five layers, on every column."""
    return nn.Sequential(*(ContextBlock(dim, hidden) for _ in range(layers)), nn.ReLU())


class ContextBlock(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, hidden, 1)
        self.conv2 = nn.Conv2d(hidden, hidden, (1, 3), padding=(0, 1))                     # along the row
        self.conv3 = nn.Conv2d(hidden, hidden, (2, 1))                                     # this row and the one above
        self.conv4 = nn.Conv2d(hidden, dim, 1)

    def forward(self, c):
        y = self.conv2(F.relu(self.conv1(c)))
        y = self.conv3(F.pad(y, (0, 0, 1, 0)))                                             # a row of zeros on top
        return c + self.conv4(F.relu(y))


def recompute_blocks(encoder):
    """Keep only what goes in and out of the residual blocks, and compute the rest again for the gradient: one more forward pass, far less memory."""
    for block in encoder.modules():
        if isinstance(block, (common.PreBasicBlock, common.PreBottleneck)):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


# ------------------------------------------------------------------------------------------------ loss (section 2.1, appendix A)

def cpc_loss(predictions, targets, offset, across=False):
    """InfoNCE, a scalar: the mean over all places that have a target `offset` rows below them.

    predictions (N, R - offset, C, d), already scaled, and targets (N, R, C, d); any float type, at least float32 is computed in. The negatives are all
    targets of the batch, the image's own among them. They are this process's, as on the paper's workers; `across` takes those of all processes,
    which must hold N images each: then the mean that DDP takes of the gradients is exactly the gradient of the loss of the whole batch.
    """
    n, rows, columns, _ = targets.shape
    if predictions.shape[:3] != (n, rows - offset, columns):
        raise ValueError(f"predictions {tuple(predictions.shape)} do not fit targets {tuple(targets.shape)} at offset {offset}")
    with torch.autocast(targets.device.type, enabled=False):
        p, t = (v.to(torch.promote_types(v.dtype, torch.float32)).flatten(0, 2) for v in (predictions, targets))
        everyones = gather(t) if across else t
        logits = p @ everyones.T                                                           # (N (R - k) C, N R C), or N R C W columns
        first = dist.get_rank() * len(t) if len(everyones) > len(t) else 0
        return F.cross_entropy(logits, first + positives(n, rows, columns, offset, p.device))


def positives(n, rows, columns, offset, device=None):
    """(N (R - offset) C,) the index, among N R C targets, of each prediction's own: same image, same column, `offset` rows below."""
    places = (rows - offset) * columns                                                     # predictions an image
    index = torch.arange(n * places, device=device)
    return index // places * rows * columns + offset * columns + index % places


def gather(z):
    """(M, d) of each process -> (MW, d) of all, in the order of the processes, with gradient. The same tensor in a single process."""
    return Gather.apply(z) if dist.is_initialized() and dist.get_world_size() > 1 else z


class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        everyones = [torch.empty_like(z) for _ in range(dist.get_world_size())]
        dist.all_gather(everyones, z.contiguous())
        return torch.cat(everyones)

    @staticmethod
    def backward(ctx, gradient):                 # (MW, d): what this process's loss wants of everyone's z
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)                # what all losses want
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


# ------------------------------------------------------------------------------------------------ training (appendix A)

def train(args, device):
    rows = (args.size - args.patch_size) // args.stride + 1
    if args.patch_size > args.size:
        raise common.UserError(f"--patch-size {args.patch_size}: larger than the crop of --size {args.size}")
    if args.size > args.resize:
        raise common.UserError(f"--size {args.size}: larger than the image of --resize {args.resize}")
    if args.patch_size < 3 and args.patch_augment == "full":
        raise common.UserError(f"--patch-size {args.patch_size}: --patch-augment full sharpens and needs at least 3")
    if args.checkpointing and args.norm == "batch":
        raise common.UserError("--checkpointing: computes blocks twice, which would move the statistics of --norm batch twice")
    if args.stages > (3 if args.arch.startswith("resnet161") else 4):
        raise common.UserError(f"--stages {args.stages}: {args.arch} has 3")
    if max(args.offsets) >= rows:
        raise common.UserError(f"--offsets {max(args.offsets)}: there are only {rows} rows of patches, so at most {rows - 1}")
    data = common.load_data(args.data, args.root, "pretrain", device)
    batches = common.Batches(data, [RandomCrop(args.size, args.resize, flip=0.5)], args.batch_size, args.seed)

    torch.manual_seed(args.seed)
    model = CPC(args.arch, args.stem, args.norm, args.stages, args.directions, args.offsets, args.hidden, args.layers, args.dim, args.scale,
                args.checkpointing).to(device, memory_format=torch.channels_last)
    learned = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.Adam(learned, lr=args.lr, betas=(0.8, 0.999), eps=1e-8, weight_decay=args.weight_decay)
    candidates = args.batch_size // (1 if args.gather else common.world_size()) * rows ** 2
    run = common.Run("cpc_v2", args, model, optimizer, batches, MEAN, STD, encoder=model.average,
                     entries=lambda loss: dict(bound=math.log(candidates) - loss / len(args.offsets)))

    network = model
    if common.world_size() > 1:
        network = DistributedDataParallel(network)                           # BN, of --norm batch, stays with each process
    if args.compile:
        network = torch.compile(network)

    peak_lr = args.lr * args.batch_size / 256
    warmup = args.warmup_epochs * len(batches)

    for step, (x,), indices in run:
        lr = peak_lr * min(1, (step + 1) / warmup) if step < warmup else peak_lr
        for group in optimizer.param_groups:
            group["lr"] = lr

        patches = extract_patches(x, args.patch_size, args.stride)               # (N, R, C, 3, s, s)
        patches = augment(patches.flatten(0, 2), args.patch_augment).unflatten(0, patches.shape[:3])      # each on its own
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            found = network(patches)
        loss = sum(cpc_loss(predictions, targets, k, args.gather) for predictions, targets, k in found) / args.directions

        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, args.clip)
        optimizer.step()
        model.update_average(args.ema_momentum)
        run.log(loss, lr, found[0][1].flatten(0, 2), [mosaic(patches[:8])])


def mosaic(patches):
    """(N, R, C, 3, s, s) -> (N, 3, R s, C s), the patches side by side, for views.png."""
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


# ------------------------------------------------------------------------------------------------ flags

def parse_args(argv=None):
    parser = common.Parser(__doc__, RECIPES, argv)
    parser.add_argument("--stages", type=int, choices=[1, 2, 3, 4], help="of the ResNet that are used")
    parser.add_argument("--norm", choices=["layer", "batch"], help="of the encoder: over one patch, or over the batch as in version 1")
    parser.add_argument("--resize", type=common.count, help="side of the image from which the crop of --size is taken")
    parser.add_argument("--patch-size", type=common.count, help="side of a patch; 64 in version 1")
    parser.add_argument("--stride", type=common.count, help="pixels from one patch to the next")
    parser.add_argument("--patch-augment", choices=["none", "drop", "full"], help="of each patch: nothing, two colours dropped, appendix A")
    parser.add_argument("--directions", type=int, choices=[1, 2, 4], help="of prediction: down; and up; and left and right")
    parser.add_argument("--offsets", type=common.count, nargs="+", help="rows from context to target, k")
    parser.add_argument("--hidden", type=common.count, help="width of the context network's inner layers")
    parser.add_argument("--layers", type=common.count, help="blocks of the context network")
    parser.add_argument("--dim", type=common.count, help="width of predictions and targets")
    parser.add_argument("--scale", type=common.positive, help="of the predictions, an inverse temperature")
    parser.add_argument("--clip", type=common.positive, help="largest norm of the gradient")
    parser.add_argument("--ema-momentum", type=common.share, help="of the averaged weights, which are what is kept")
    parser.add_argument("--gather", action="store_true", help="take the negatives from all processes, not from each alone")
    parser.add_argument("--checkpointing", action="store_true", help="save memory by computing activations twice")
    return parser.parse()


if __name__ == "__main__":
    common.launch(train, parse_args())
