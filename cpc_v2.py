"""CPC v2: Data-Efficient Image Recognition with Contrastive Predictive Coding.
Henaff et al., ICML 2020, arXiv 1905.09272.

Idea. Cut an image into overlapping patches and encode each alone. A context network that sees only
the rows at or above a position predicts what the patches some rows below it look like to the
encoder: it must find the true one among the patches of all images. The same goes upwards, leftwards
and rightwards. Patches are augmented one by one: what their pixels share does not help.

Objective (section 2.1), a mean over images, positions and directions, a sum over the offsets k:
    l(i, j, k) = -log  exp(p . z'_(i+k, j)) / sum over all z'_l of the batch of exp(p . z'_l)
    p = 0.1 W_k c_(i, j),   z' = W z

Notation. N images in the batch of one process, R x C patches an image.
    x_(i, j)     patches       (N, R, C, 3, s, s)    f, z   encoder, z     (N, D, R, C)
    g, c         contexts, c   (N, D, R, C)          c_(i, j) sees rows 0 .. i
    p            predictions   (N, R - k, C, d)      of the patches k rows below
    z'           targets       (N, R, C, d)
The loss starts at ln(N R C) for each offset: 6.36 for 16 images of 36 patches.

Published: ImageNet, ResNet-161: linear 71.5 % (table 1). Ours: RESULTS.md.

Left open by the paper: the printed code has one offset, k = 3, `--offsets 3 4 5` is the other
reading; each direction has its own W and W_k; ResNet-161 is 3, 4 and 46 blocks, 303.6 M parameters
(the paper says 305 M); layer norms span a patch's channels and positions; the context network's
last ReLU comes once; constant rate, flips, strength of warps. Differs: AutoAugment lacks cutout and
sample pairing and has uniform strengths; negatives: 64 x 36 of each of 8 processes, there 16 x 36
of 32 (`--gather`: of all); the average starts at the initial weights; kNN is of whole images.
Usage:  python cpc_v2.py    torchrun --nproc_per_node=8 cpc_v2.py --data /path/to/imagenet
"""
import copy
import functools
import math
from typing import NamedTuple

import common  # before torch, since it handles signals from then on
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.transforms.v2.functional import equalize

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

IMAGENET = dict(
    arch="resnet161", stages=3, norm="layer", stem="imagenet",          # section 4.1
    resize=300, size=260, patch_size=80, stride=36,     # appendix A: 6 x 6 patches
    epochs=200, batch_size=512,         # appendix A
    lr=2e-4,                            # appendix A: 4e-4 = 2e-4 * 512 / 256
    weight_decay=0.0, warmup_epochs=0,
    clip=0.01, ema_momentum=0.9999,     # appendix A
    directions=4,                       # section 4.1
    offsets=[3],                        # appendix A, the printed code
    hidden=256, layers=5,               # appendix A, pixelCNN
    dim=64, scale=0.1,                  # appendix A, the printed code
    patch_augment="full",               # appendix A; "drop" is section 4.1's colour dropping
    checkpointing=True,                 # one more forward pass, and far less memory
    knn_every=0,
)
SMALL = dict(                           # ours
    IMAGENET, arch="resnet18", stem="small",
    resize=72, size=64, patch_size=16, stride=8,        # 7 x 7; rows two apart share no pixels
    batch_size=256, lr=4e-4, ema_momentum=0.999,
    offsets=[2, 3, 4], hidden=128, layers=3, checkpointing=False,
    knn_every=10,
)
SHAPES = dict(                          # ours, for a few minutes on two CPU cores
    SMALL, arch="resnet10x0.25",
    resize=56, size=48,                 # 5 x 5 patches
    epochs=2, batch_size=16, lr=32e-3, ema_momentum=0.99, hidden=64,
    knn_every=1,
)
RECIPES = dict(shapes=SHAPES, small=SMALL, imagenet=IMAGENET)

# ------------------------------------------------------------------- patches (appendix A)

class RandomCrop(NamedTuple):
    """The image resized to `resize` x `resize`, whatever its shape, and of that a random or the
    central square of `size`, as one crop of the image."""
    size: int
    resize: int
    central: bool = False
    interpolation: str = "bilinear"
    count: int = 1
    flip: float = 0.0

    def boxes(self, n, height, width):
        h = max(1, round(height * self.size / self.resize))
        w = max(1, round(width * self.size / self.resize))
        u = torch.full((2, n), 0.5) if self.central else torch.rand(2, n)
        top = (u[0] * (height - h + 1)).floor()
        left = (u[1] * (width - w + 1)).floor()
        return torch.stack([top, left, torch.full_like(top, h), torch.full_like(top, w)], dim=1)

def extract_patches(images, size, stride):
    """(N, 3, H, W) -> (N, R, C, 3, size, size): patches `stride` apart, from the top left corner
    on; what does not fill a patch is left out."""
    return images.unfold(2, size, stride).unfold(3, size, stride).permute(0, 2, 3, 1, 4, 5)

@common.in_chunks
def augment(x, patch_augment):
    """Patches (M, 3, s, s) in 0..1 -> the same form, each with its own draws, normalised."""
    if patch_augment == "full":
        with torch.autocast(x.device.type, enabled=False):
            x = autoaugment_primitives(x, count=2)                              # (i)
            x = common.on_some(x, 0.2, elastic)                                 # (ii)
            x = common.on_some(x, 0.2, color_curves)
            x = common.color_jitter(x, 32 / 255, 0.5, 0.5, 0.2, additive=True)  # (iii), Inception's
            x = common.grayscale(x, p=0.25)                                     # (iv)
    x = common.normalize(x, MEAN, STD)
    if patch_augment == "drop":
        kept = F.one_hot(torch.randint(3, (len(x),)), 3).float()                # one channel of 3;
        x = x * kept[:, :, None, None].to(x.device, non_blocking=True)          # 0 is the mean
    return x

def warp(x, matrix, displacement=0.0):
    """Move pixels: an output pixel at (u, v), -1..1 from edge to edge, comes from matrix (N, 2, 3)
    @ (u, v, 1) + displacement (N, H, W, 2). Bilinear; grey from outside."""
    if not len(x):
        return x
    grid = F.affine_grid(matrix, x.shape, align_corners=False) + displacement
    return (F.grid_sample(x - 0.5, grid, align_corners=False) + 0.5).clamp_(0, 1)

def affine(x, a, b, c, d, tx=0.0, ty=0.0):
    """`warp` by [[a, b, tx], [c, d, ty]], each a number or (N, 1, 1, 1)."""
    entries = [v + torch.zeros_like(x[:, 0, 0, 0]) if isinstance(v, (int, float)) else v.flatten()
               for v in (a, b, tx, c, d, ty)]
    return warp(x, torch.stack(entries, dim=1).view(-1, 2, 3))

def elastic(x, strength=0.05, shear=0.3):
    """A smooth random displacement of standard deviation `strength` of the side at 4 x 4 control
    points, and a shear of up to `shear` either way."""
    control = 2 * strength * torch.randn(len(x), 2, 4, 4).to(x.device, non_blocking=True)
    displacement = F.interpolate(control, x.shape[2:], mode="bicubic", align_corners=True)
    amount = common.uniform(x, -shear, shear).flatten()
    zero = torch.zeros_like(amount)
    matrix = torch.stack([zero + 1, amount, zero, zero, zero + 1, zero], dim=1).view(-1, 2, 3)
    return warp(x, matrix, displacement.permute(0, 2, 3, 1))

def color_curves(x, strength=0.1, knots=5):
    """Bend the colour histogram: each channel of each image goes through its own random curve, the
    identity plus noise of standard deviation `strength` at equally spaced knots."""
    offsets = strength * torch.randn(knots, len(x), 3, 1, 1).to(x.device, non_blocking=True)
    place = x * (knots - 1)
    for k, offset in enumerate(offsets):
        x = x + (1 - (place - k).abs()).clamp(min=0) * offset
    return x.clamp(0, 1)

def autocontrast(x, _):
    """Stretch each channel to 0..1; a flat one stays."""
    low = x.amin((2, 3), keepdim=True)
    high = x.amax((2, 3), keepdim=True)
    flat = (high <= low).float()
    return (x - low * (1 - flat)) / (high - low + flat)

def posterize(x, bits):
    """Drop the lowest 0 to 4 of 8 bits."""
    step = 2 ** bits.floor()
    return (x * 255 / step).floor() * step / 255

def sharpness(x, factor):
    """Blend with a 3x3 smoothing, as Pillow does; the border stays."""
    kernel = common.constant((1.0, 1, 1, 1, 5, 1, 1, 1, 1), x.device).view(1, 1, 3, 3) / 13
    smooth = x.clone()
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(x, kernel.expand(3, -1, -1, -1), groups=3)
    return torch.lerp(smooth, x, factor).clamp_(0, 1)

# AutoAugment's operations (Cubuk et al. 2018, table 6): f(x, strength (N, 1, 1, 1)), and the range
# of the strength. Translations are fractions of half the side: 150 pixels of 331.
PRIMITIVES = {
    "shear x": (lambda x, m: affine(x, 1, m, 0, 1), -0.3, 0.3),
    "shear y": (lambda x, m: affine(x, 1, 0, m, 1), -0.3, 0.3),
    "translate x": (lambda x, m: affine(x, 1, 0, 0, 1, tx=m), -300 / 331, 300 / 331),
    "translate y": (lambda x, m: affine(x, 1, 0, 0, 1, ty=m), -300 / 331, 300 / 331),
    "rotate": (lambda x, a: affine(x, a.cos(), -a.sin(), a.sin(), a.cos()),
               -math.pi / 6, math.pi / 6),
    "auto-contrast": (autocontrast, 0, 0),
    "invert": (lambda x, _: 1 - x, 0, 0),
    "equalize": (lambda x, _: equalize(x), 0, 0),
    "solarize": (lambda x, m: torch.where(x >= m, 1 - x, x), 0, 1),
    "posterize": (posterize, 0, 5),
    "contrast": (lambda x, m: common.adjust_contrast(x.clone(), m), 0.1, 1.9),
    "color": (lambda x, m: common.adjust_saturation(x.clone(), m), 0.1, 1.9),
    "brightness": (lambda x, m: common.adjust_brightness(x.clone(), m), 0.1, 1.9),
    "sharpness": (sharpness, 0.1, 1.9),
}

def autoaugment_primitives(x, count=2):
    """`count` operations of AutoAugment in a row, each drawn for each image from all of
    `PRIMITIVES`, with a strength uniform in its range."""
    for _ in range(count):
        kinds = torch.randint(len(PRIMITIVES), (len(x),))
        order = kinds.argsort(stable=True)                      # images of one operation together
        sizes = kinds.bincount(minlength=len(PRIMITIVES)).tolist()
        parts = x[order.to(x.device, non_blocking=True)].split(sizes)
        draws = common.uniform(x, 0, 1).split(sizes)
        changed = [operation(part, low + (high - low) * u) if len(part) else part
                   for (operation, low, high), part, u in zip(PRIMITIVES.values(), parts, draws)]
        back = order.argsort().to(x.device, non_blocking=True)
        x = torch.cat(changed)[back]
    return x

# ------------------------------------------------------------------- encoder (section 4.1)

DEPTHS = common.DEPTHS | {161: (3, 4, 46)}

class LayerNorm(nn.GroupNorm):
    """Over the channels and places of one patch, in the precision of its input: autocast would keep
    float32 copies of all activations on a GPU, 157 GB of them in the recipe `imagenet`."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, 1, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)

NORMS = {"layer": functools.partial(LayerNorm, 1), "batch": nn.BatchNorm2d}

def conv(channels, out, kernel, stride=1):
    return nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)

class Block(nn.Module):
    """The block of He et al. 2016 (arXiv 1603.05027, figure 1b): norm and ReLU come before each
    convolution, and nothing after the sum. Two 3x3 convolutions, or a bottleneck."""

    def __init__(self, channels, width, out, stride, norm, bottleneck):
        super().__init__()
        self.first = nn.Sequential(norm(channels), nn.ReLU())
        if bottleneck:
            layers = [conv(channels, width, 1), norm(width), nn.ReLU(),
                      conv(width, width, 3, stride), norm(width), nn.ReLU(), conv(width, out, 1)]
        else:
            layers = [conv(channels, width, 3, stride), norm(width), nn.ReLU(), conv(width, out, 3)]
        self.branch = nn.Sequential(*layers)
        same = stride == 1 and channels == out
        self.shortcut = None if same else conv(channels, out, 1, stride)

    def forward(self, x):
        y = self.first(x)
        x = self.shortcut(y) if self.shortcut else x
        return x + self.branch(y)

class ResNetV2(nn.Module):
    """`resnet_v2` builds one."""

    def __init__(self, depth, multiplier, norm, stem, stages):
        super().__init__()
        channels = max(1, round(64 * multiplier))
        small = stem == "small"
        self.conv1 = conv(3, channels, 3) if small else conv(3, channels, 7, 2)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        self.stages = stages
        for i, blocks in enumerate(DEPTHS[depth][:stages]):
            width = max(1, round(64 * multiplier * 2 ** i))
            out = 4 * width if depth >= 50 else width
            if depth == 161 and i == 2:                         # 512-4096, ResNet-101: 256-1024
                width, out = 2 * width, 4 * out
            layer = []
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                layer.append(Block(channels, width, out, stride, norm, bottleneck=depth >= 50))
                channels = out
            setattr(self, f"layer{i + 1}", nn.Sequential(*layer))
        self.last_bn = norm(channels)
        self.dim = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def maps(self, x):
        """(N, 3, H, W) -> (N, dim, h, w), the feature maps before pooling."""
        x = self.maxpool(self.conv1(x))
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return F.relu(self.last_bn(x))

    def forward(self, x):
        """(N, 3, H, W) -> (N, dim)."""
        return self.maps(x).mean((2, 3))

def resnet_v2(arch, norm="layer", stem="imagenet", stages=3):
    """Build a pre-activation ResNet of the first `stages` stages: `arch` as in `common.resnet`, or
    resnet161, whose third stage of 46 wide blocks is the last; norm "layer" or "batch". The result
    has `.dim`, `.maps(x)` and `.config`. Raises ValueError for anything else."""
    depth, multiplier = common.parse_arch(arch, DEPTHS)
    if norm not in NORMS or stem not in ("imagenet", "small"):
        raise ValueError(f"norm {norm!r}, stem {stem!r}: not layer or batch, imagenet or small")
    if not 1 <= stages <= len(DEPTHS[depth]):
        raise common.UserError(f"--stages {stages}: {arch} has {len(DEPTHS[depth])}")
    model = ResNetV2(depth, multiplier, NORMS[norm], stem, stages)
    model.config = dict(version=2, arch=arch, norm=norm, stem=stem, stages=stages)
    return model

# ------------------------------------------------------------------- model (figure 2, appendix A)

class CPC(nn.Module):
    def __init__(self, encoder, directions, offsets, hidden, layers, dim, scale):
        super().__init__()
        self.encoder = encoder
        self.average = copy.deepcopy(encoder).requires_grad_(False)     # Polyak's, what is kept
        self.offsets = offsets
        self.scale = scale
        self.turns = (0, 2, 1, 3)[:directions]          # quarter turns: down, up, left and right
        D = encoder.dim
        self.contexts = nn.ModuleList(context_network(D, hidden, layers) for _ in self.turns)
        self.targets = nn.ModuleList(nn.Conv2d(D, dim, 1, bias=False) for _ in self.turns)
        self.predictors = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(D, dim, 1) for _ in offsets) for _ in self.turns)

    def forward(self, patches):
        """(N, R, C, 3, s, s) -> a list of (predictions, targets, offset), the arguments of
        `cpc_loss`, for each direction and offset."""
        z = encode(self.encoder, patches)                               # (N, D, R, C)
        found = []
        for turn, context, target, predictors in zip(self.turns, self.contexts, self.targets,
                                                     self.predictors):
            turned = z.rot90(turn, (2, 3))                              # the direction is now down
            c = context(turned)                                         # (N, D, R, C)
            targets = target(turned).permute(0, 2, 3, 1)                # (N, R, C, d)
            for k, predictor in zip(self.offsets, predictors):
                predictions = self.scale * predictor(c[:, :, :-k])      # (N, d, R - k, C)
                found.append((predictions.permute(0, 2, 3, 1).float(), targets.float(), k))
        return found

    @torch.no_grad()
    def update_average(self, ema_momentum):
        weights = list(self.average.parameters())
        torch._foreach_lerp_(weights, list(self.encoder.parameters()), 1 - ema_momentum)
        for average, buffer in zip(self.average.buffers(), self.encoder.buffers()):
            average.copy_(buffer)                                       # of --norm batch

def encode(encoder, patches):
    """(N, R, C, 3, s, s) -> z (N, D, R, C): the encoder, with its mean, on each patch alone."""
    n, rows, columns = patches.shape[:3]
    x = patches.flatten(0, 2).contiguous(memory_format=torch.channels_last)     # (N R C, 3, s, s)
    return encoder(x).view(n, rows, columns, -1).permute(0, 3, 1, 2)

def context_network(dim, hidden, layers):
    """Appendix A's pixelCNN, (N, dim, R, C) -> the same form. Each layer sees one more row above
    and one more column on either side; five cover the paper's 6 x 6."""
    return nn.Sequential(*(ContextBlock(dim, hidden) for _ in range(layers)), nn.ReLU())

class ContextBlock(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, hidden, 1)
        self.conv2 = nn.Conv2d(hidden, hidden, (1, 3), padding=(0, 1))  # along the row
        self.conv3 = nn.Conv2d(hidden, hidden, (2, 1))                  # this row and the one above
        self.conv4 = nn.Conv2d(hidden, dim, 1)

    def forward(self, c):
        y = self.conv2(F.relu(self.conv1(c)))
        y = self.conv3(F.pad(y, (0, 0, 1, 0)))                          # a row of zeros on top
        return c + self.conv4(F.relu(y))

def recompute_blocks(encoder):
    """Keep only what goes in and out of blocks, and compute the rest again for the gradient."""
    for block in encoder.modules():
        if isinstance(block, Block):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False,
                                              preserve_rng_state=False)

# ------------------------------------------------------------------- loss (section 2.1, appendix A)

def cpc_loss(predictions, targets, offset):
    """InfoNCE, a scalar, the mean over all positions with a target `offset` rows below. predictions
    (N, R - offset, C, d), scaled; targets (N, R, C, d), which are all of the candidates."""
    n, rows, columns, _ = targets.shape
    logits = predictions.flatten(0, 2) @ targets.flatten(0, 2).T        # (N (R - k) C, N R C)
    positives = torch.arange(n * rows * columns, device=targets.device)
    positives = positives.view(n, rows, columns)[:, offset:]            # same image and column
    return F.cross_entropy(logits, positives.flatten())

# ------------------------------------------------------------------- training (appendix A)

def learning_rate(step, warmup, total):
    """As a fraction of the peak: a linear warm-up, if any, then constant, whatever the `total`."""
    return step / warmup if step < warmup else 1.0

def train(args, device):
    data = common.load_data(args.data, args.root, "pretrain", device)
    crop = RandomCrop(args.size, args.resize, flip=0.5)
    batches = common.Batches(data, [crop], args.batch_size, args.seed)

    torch.manual_seed(args.seed)
    encoder = resnet_v2(args.arch, args.norm, args.stem, args.stages)
    model = CPC(encoder, args.directions, args.offsets, args.hidden, args.layers, args.dim,
                args.scale)
    model.to(device, memory_format=torch.channels_last)
    if args.checkpointing and args.norm == "layer":                     # else norms would run twice
        recompute_blocks(model.encoder)
    weights = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.Adam(weights, args.lr, betas=(0.8, 0.999), eps=1e-8,
                                 weight_decay=args.weight_decay)
    run = common.Run(args, model, optimizer, batches, MEAN, STD, encoder=model.average)

    network = common.distribute(model, args.compile)                    # DDP; BN per process

    peak_lr = args.lr * args.batch_size / 256
    warmup = args.warmup_epochs * len(batches)

    for step in range(run.step, run.total):
        x, = run.crops(step)
        lr = peak_lr * learning_rate(step, warmup, run.total)
        for group in optimizer.param_groups:
            group["lr"] = lr

        patches = extract_patches(x, args.patch_size, args.stride)      # (N / W, R, C, 3, s, s)
        patches = augment(patches.flatten(0, 2), args.patch_augment).view(patches.shape)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            found = network(patches)
        loss = 0
        for predictions, targets, k in found:
            if args.gather:                                             # the whole batch
                predictions = common.gather_with_gradient(predictions)
                targets = common.gather_with_gradient(targets)
            loss = loss + cpc_loss(predictions, targets, k) / args.directions

        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, args.clip)
        optimizer.step()
        model.update_average(args.ema_momentum)
        mosaic = patches[:8].permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        run.finish_step(loss, lr, found[0][1].flatten(0, 2), [mosaic])

# ------------------------------------------------------------------- flags

def parse_args(argv=None):
    parser = common.Parser(__doc__, RECIPES, argv)
    add = parser.add_argument
    add("--stages", type=common.count, help="number of stages of the ResNet")
    add("--norm", choices=["layer", "batch"], help="over one patch, or over the batch (version 1)")
    add("--resize", type=common.count, help="side of the image of which --size is cropped")
    add("--patch-size", type=common.count, help="side of a patch; 64 in version 1")
    add("--stride", type=common.count, help="pixels from one patch to the next")
    add("--patch-augment", choices=["none", "drop", "full"], help="drop: two colours; appendix A")
    add("--directions", type=int, choices=[1, 2, 4], help="down; and up; and left and right")
    add("--offsets", type=common.count, nargs="+", help="rows from context to target, k")
    add("--clip", type=common.positive, help="largest norm of the gradient")
    add("--ema-momentum", type=common.fraction, help="momentum of the average of the weights")
    add("--gather", action="store_true", help="negatives of all processes, not of each alone")
    args = parser.parse()
    rows = (args.size - args.patch_size) // args.stride + 1
    if not 3 <= args.patch_size <= args.size <= args.resize:
        parser.error(f"--patch-size {args.patch_size}: expected 3 <= patch <= --size <= --resize")
    if max(args.offsets) >= rows:
        parser.error(f"--offsets {max(args.offsets)}: there are only {rows} rows of patches")
    return args

if __name__ == "__main__":
    common.launch(train, parse_args)
