"""What `evaluate.py linear` and `finetune` are made of: classifiers on an encoder, and how they are
trained.

`train_heads` and `logistic_regression` train classifiers of frozen features, `tune` and `tune_cpc`
an encoder together with its classifier. The recipes are in evaluate.py; `args` are its flags, of
which seed, workers, precision and batch_size are used here.
"""
import copy
import itertools
import math
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import common
import cpc_v2

PATIENCE = 5            # CPC v2: epochs without a lower loss, after which a phase ends (ours)
CLIP = 0.01             # CPC v2, C.2: largest norm of the encoder's gradient, as in pre-training
# MoCo's rate of 30 may end at 1000 times the first loss, and is as accurate as lower ones.
DIVERGED = 1e5

# ============================================================================== training

def training_steps(args, recipe, data, crop, size, optimizers, device):
    """The steps of a training by `recipe`, each with `size` images: yields crops (N, ...), labels
    (N,), and a list for the step's losses (H,), those of H classifiers side by side. Sets the
    optimizers' rates. Everything random is a function of (seed, step, rank).

    The losses and the time left are printed after three seconds, then every ten, and at the end;
    only then does a step wait for the device. Raises UserError if no loss is finite, or in the end
    none below `DIVERGED` times what it was at first."""
    batches = common.Batches(data, [crop], size, args.seed)
    labels = data.labels.to(device)
    total = recipe["epochs"] * len(batches)
    began = time.perf_counter()
    tell_at = began + 3
    losses = []
    first = None
    loader = common.stream(batches, range(total), args.workers, device)
    for step, ((x,), indices, broken) in enumerate(loader):
        if data.in_workers:
            common.note_broken(data, broken)
        common.seed_all(args.seed, step, common.RANK, 1)
        fraction = learning_rate(step, total, recipe)
        for group in itertools.chain(*(optimizer.param_groups for optimizer in optimizers)):
            group["lr"] = group["peak"] * fraction
        yield x, labels.index_select(0, indices.to(device, non_blocking=True)), losses

        now = time.perf_counter()
        last = step + 1 == total
        first = losses[0] if first is None else first
        if common.RANK > 0:
            losses.clear()                                      # rank 0 tells
        elif last or now > tell_at:
            tell_at = now + 10
            mean = torch.stack(losses).mean(0)
            losses.clear()
            shown = ", ".join(f"{loss:.4g}" for loss in mean.tolist())
            good = mean.isfinite() & (mean <= (DIVERGED * first if last else math.inf))
            if not good.any():
                raise common.UserError(f"the loss is {shown} after {step + 1} steps: training "
                                       "diverged; try a lower --lr")
            minutes = (now - began) / (step + 1) * (total - step - 1) / 60
            common.say(f"step {step + 1}/{total}  loss {shown}  {minutes:.1f} min left")
            if last and (mean > 2 * first).all():
                common.say("that is more than at first: try a lower --lr, or more --epochs")

def learning_rate(step, total, recipe):
    """As a fraction of the peak."""
    if recipe["drops"] is None:
        return (1 + math.cos(math.pi * step / total)) / 2
    return recipe["factor"] ** sum(step >= drop * total for drop in recipe["drops"])

def batch_size(args, data, default, least=1):
    """`--batch-size`, or `default` images, or all if there are fewer. Batch norm needs `least`
    images in each process."""
    least *= common.WORLD_SIZE
    fits = min(max(default, least), len(data)) // common.WORLD_SIZE * common.WORLD_SIZE
    size = args.batch_size or fits
    if not least <= size <= len(data) or size % common.WORLD_SIZE:
        raise common.UserError(f"--batch-size {size}: not in {least}..{len(data)}, or does not "
                               f"divide by the {common.WORLD_SIZE} processes")
    return size

def distribute(model, device):
    """The model as it is trained: by all processes, on GPUs with global batch statistics."""
    if common.WORLD_SIZE > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return common.distribute(model, compiled=False)

def share_buffers(model):
    """BatchNorm's running statistics may be each process's own: all take those of rank 0."""
    for buffer in model.buffers() if common.WORLD_SIZE > 1 else ():
        dist.broadcast(buffer, 0)

def autocast(args, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")

# ============================================================================== frozen features

class Features:
    """Features h (n, ...) and their labels (n,) as a data set, whose "crops" are the features."""
    in_workers = False

    def __init__(self, h, labels):
        self.h = h
        self.labels = labels

    def __len__(self):
        return len(self.h)

    def crop(self, indices, crops, *key):
        h = self.h.index_select(0, indices.to(self.h.device, non_blocking=True))
        return [h.float()], indices, []

def train_heads(args, device, recipe, rates, data, make, crop=None, change=None):
    """Train classifiers that `make()` builds, one for each of `rates`, side by side on the same
    batches of `data`: on its `crop`s as `change` encodes them, or on Features as they are. Returns
    them as a ModuleList, frozen, in eval mode. Raises UserError if all diverge."""
    size = min(recipe["batch_size"], len(data) // common.WORLD_SIZE * common.WORLD_SIZE)
    torch.manual_seed(args.seed)
    first = make().to(device)
    heads = nn.ModuleList(copy.deepcopy(first) for _ in rates)
    networks = [distribute(head, device) for head in heads]
    groups = []
    for head, rate in zip(heads, rates):
        weights = [w for w in head.parameters() if w.requires_grad]
        groups.append(dict(params=weights, peak=rate * size / 256))
    larc = recipe.get("larc", False)
    decay = recipe["weight_decay"]
    if recipe.get("adam"):
        optimizer = torch.optim.Adam(groups, weight_decay=decay)
    else:
        optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=recipe["nesterov"],
                                    weight_decay=0 if larc else decay)
    for x, y, losses in training_steps(args, recipe, data, crop, size, [optimizer], device):
        if change is not None:
            with torch.no_grad(), autocast(args, device):
                x = change(x).float()
        loss = torch.stack([F.cross_entropy(network(x), y) for network in networks])
        optimizer.zero_grad()
        loss.sum().backward()                   # the gradient of each is its own
        if larc:
            common.larc(heads.parameters(), weight_decay=decay)
        optimizer.step()
        losses.append(loss.detach())
    share_buffers(heads)
    return heads.requires_grad_(False).eval()

def linear_layer(dim, classes, std=0.0):
    """Weights are drawn with that standard deviation, biases are 0."""
    layer = nn.Linear(dim, classes)
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer

def read_projector(path, checkpoint):
    """g of a checkpoint of ours, from h (n, D) to z (n, d), frozen, in eval mode. Its layers are
    known from their tensors; an index without tensors is a ReLU. Raises UserError where there is no
    projector of such layers."""
    state = {name.removeprefix("projector."): value for name, value in checkpoint["model"].items()
             if name.startswith("projector.")}
    if "weight" in state:                                       # one layer, no Sequential
        state = {f"0.{name}": value for name, value in state.items()}
    numbers = [name.split(".")[0] for name in state]
    if not state or not checkpoint["args"] or not all(map(str.isdigit, numbers)):
        raise common.UserError(f"{path}: has no projector, from h to z, that one of these scripts "
                               "trained")
    if not all(torch.is_tensor(value) and value.isfinite().all() for value in state.values()):
        raise common.UserError(f"{path}: its projector has numbers that are not finite")
    layers = []
    for i in range(max(map(int, numbers)) + 1):
        weight = state.get(f"{i}.weight")
        if f"{i}.running_mean" in state:
            width = len(state[f"{i}.running_mean"])
            layers.append(nn.BatchNorm1d(width, affine=weight is not None))
        elif weight is not None:
            layers.append(nn.Linear(weight.shape[1], weight.shape[0], bias=f"{i}.bias" in state))
        else:
            layers.append(nn.ReLU())
    projector = nn.Sequential(*layers).requires_grad_(False).eval()
    try:
        projector.load_state_dict(state)
        projector(torch.zeros(1, next(iter(state.values())).shape[-1]))
    except RuntimeError:
        raise common.UserError(f"{path}: the layers of its projector do not fit together") from None
    return projector

class PatchGrid(nn.Module):
    """The encoder on patches as in a run of cpc_v2.py: images (N, 3, H, W) -> (N, D, R, C)."""

    def __init__(self, encoder, flags):
        super().__init__()
        self.encoder = encoder
        self.flags = flags

    def forward(self, x, augment=False):
        """x: normalised; to `augment` every patch as in pre-training, in 0..1."""
        patches = cpc_v2.extract_patches(x, self.flags["patch_size"], self.flags["stride"])
        if augment:
            changed = cpc_v2.augment(patches.flatten(0, 2), self.flags["patch_augment"])
            patches = changed.unflatten(0, patches.shape[:3])
        return cpc_v2.encode(self.encoder, patches)

def patch_classifier(dim, classes):
    """CPC v2, appendix B: (N, dim, R, C) -> logits (N, classes), the mean over the positions of a
    linear classifier after batch norm without scale."""
    norm = nn.BatchNorm2d(dim)
    norm.weight.requires_grad_(False)                           # stays 1; the bias is learned
    return nn.Sequential(norm, nn.Conv2d(dim, classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())

# ============================================================================== fine-tuning

def tune(args, recipe, encoder, data, classes, input, device):
    """Train a copy of `encoder` and a new linear classifier on it by a row of FINETUNE. Returns the
    model, images -> logits."""
    most = len(data) if data.in_workers else min(256, max(len(data) // 8, 8))
    size = batch_size(args, data, min(recipe["batch_size"], most), least=2)
    crop = common.Crop(1, input["size"], flip=0.5, interpolation=input["interpolation"])
    torch.manual_seed(args.seed)
    encoder = copy.deepcopy(encoder).requires_grad_(True)
    head = linear_layer(encoder.dim, classes)
    model = nn.Sequential(encoder, head).to(device).train()
    network = distribute(model, device)
    groups = [dict(params=head.parameters(), peak=recipe["head_lr"] * size / 256),
              dict(params=encoder.parameters(), peak=recipe["lr"] * size / 256)]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=recipe["nesterov"],
                                weight_decay=recipe["weight_decay"])
    for x, y, losses in training_steps(args, recipe, data, crop, size, [optimizer], device):
        with autocast(args, device):
            logits = network(common.normalize(x, input["mean"], input["std"]))
        loss = F.cross_entropy(logits.float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach()[None])
    share_buffers(model)
    return model

def tune_cpc(args, phases, encoder, data, held, classes, input, device):
    """CPC v2, C.2: train a MapsClassifier on a copy of `encoder`, which is fixed, then both. A
    phase ends when the loss on the images `held` has not fallen for `PATIENCE` epochs, and the
    state with the lowest loss is kept. Returns the model, images -> logits."""
    torch.manual_seed(args.seed)
    model = MapsClassifier(copy.deepcopy(encoder), classes).to(device)
    best_loss = math.inf
    best_state = None
    for phase in phases:
        waited = 0
        for loss in train_epochs(args, phase, model, data, held, input, device):
            waited += 1
            if loss < best_loss:
                best_loss = loss
                best_state = copy.deepcopy(model.state_dict())
                waited = 0
            if waited == PATIENCE:
                break
        if best_state is None:
            raise common.UserError("the loss on held-out images was never finite: training "
                                   "diverged; try a lower --lr")
        model.load_state_dict(best_state)
        common.say(f"encoder {'trained' if phase['lr'] else 'fixed'}: loss {best_loss:.4f} on "
                   f"{len(held)} held-out training images")
    return model

def train_epochs(args, phase, model, data, held, input, device):
    """One phase of `tune_cpc`: trains a MapsClassifier and, if it has a rate, the encoder, and
    yields the loss on `held` after each epoch."""
    size = batch_size(args, data, phase["batch_size"], least=2)
    crop = common.Crop(1, input["size"], flip=0.5, interpolation=input["interpolation"])
    encoder_learns = phase["lr"] > 0
    model.encoder.requires_grad_(encoder_learns)
    network = distribute(model, device)
    of_encoder = list(model.encoder.parameters())
    others = [w for name, w in model.named_parameters() if not name.startswith("encoder.")]
    groups = [dict(params=others, peak=phase["head_lr"] * size / 256)]
    optimizers = [torch.optim.SGD(groups, lr=1.0, momentum=0.9,
                                  weight_decay=phase["weight_decay"])]
    if encoder_learns:                          # C.2: by Adam, as in pre-training
        groups = [dict(params=of_encoder, peak=phase["lr"] * size / 256)]
        optimizers.append(torch.optim.Adam(groups, betas=(0.8, 0.999)))
    steps = training_steps(args, phase, data, crop, size, optimizers, device)
    for step, (x, y, losses) in enumerate(steps):
        model.train()
        model.encoder.train(encoder_learns)
        with autocast(args, device):
            logits = network(cpc_v2.augment(x, "full"))
        loss = F.cross_entropy(logits.float(), y)
        model.zero_grad()
        loss.backward()
        if encoder_learns:
            nn.utils.clip_grad_norm_(of_encoder, CLIP)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.detach()[None])
        if (step + 1) % (len(data) // size) == 0:               # the end of an epoch
            share_buffers(model)
            predicted = common.features(model, held, input, args.workers, args.precision)
            yield F.cross_entropy(*predicted).item()

class MapsClassifier(nn.Module):
    """CPC v2, section 2.2: eleven pre-activation bottleneck blocks on the encoder's maps (N, D, h,
    w), then norm, mean, dropout and a linear layer: images -> logits (N, classes). For ResNet-161's
    4096 x 14 x 14 the blocks have 33 convolutions, the paper's "ResNet-33". The fifth halves the
    grid, which the paper leaves open; its shortcut has a convolution."""

    def __init__(self, encoder, classes, blocks=11, halve=5, dropout=0.2):
        super().__init__()
        dim = encoder.dim
        self.encoder = encoder
        strides = [2 if i == halve else 1 for i in range(1, blocks + 1)]
        self.blocks = nn.Sequential(*(
            cpc_v2.Block(dim, dim // 4, dim, stride, nn.BatchNorm2d, bottleneck=True)
            for stride in strides))
        self.bn = nn.BatchNorm2d(dim)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(dim, classes)

    def forward(self, x):
        h = F.relu(self.bn(self.blocks(self.encoder.maps(x)))).mean((2, 3))
        return self.fc(self.dropout(h))

# ============================================================================== logistic regression

def scores(weights, h):
    """Weights (C, D + 1), the last column the bias, and features (n, D) -> logits (n, C)."""
    weights = weights.float()
    return F.linear(h.float(), weights[:, :-1], weights[:, -1])

def spectrum(h):
    """The mean (D,) of features (n, D), and the eigenvalues (D,) and eigenvectors (D, D) of their
    covariance, float64. Raises UserError where D is too large."""
    if h.shape[1] > 16384:
        raise common.UserError(f"{h.shape[1]} numbers an image are too many for logistic "
                               "regression; give a smaller --size")
    mean = 0
    for chunk in h.split(16384):
        mean = mean + chunk.double().sum(0) / len(h)
    covariance = 0
    for chunk in h.split(16384):
        centered = chunk.double() - mean
        covariance = covariance + centered.T @ centered / len(h)
    values, vectors = torch.linalg.eigh(covariance)
    return mean, values, vectors

def loss_and_gradient(logits, y):
    """The sum of the losses of logits (n, C), float64, and its gradient (n, C).

    y (n,): the classes, for a softmax. y (n, C): 1 or 0 for each of several labels, for a sigmoid
    each; nan is not counted."""
    if y.ndim == 1:
        log_p = logits.log_softmax(1)
        label = y[:, None]
        loss = -log_p.gather(1, label).sum(dtype=torch.float64)
        gradient = log_p.exp_()                                         # p - 1 at the label
        return loss, gradient.scatter_add_(1, label, -torch.ones_like(gradient[:, :1]))
    known = ~y.isnan()
    y = y.nan_to_num().to(logits.dtype)
    losses = F.binary_cross_entropy_with_logits(logits, y, known, reduction="none")
    return losses.sum(dtype=torch.float64), (logits.sigmoid() - y) * known

def logistic_regression(h, y, classes, l2, start=None, shape=None, iterations=1000):
    """Weights (C, D + 1), float64, the last column the bias, at the minimum over W and b of
    sum_i loss(W h_i + b, y_i) + l2 / 2 |W|^2, by L-BFGS. scikit-learn's C is 1 / l2.

    h (n, D) of any float type, gone through in chunks; y (n,) classes, or (n, C) of 1, 0 and nan,
    several labels at once. `start`: weights to begin with; `shape`: spectrum(h), if it is known.

    L-BFGS works on V, with W = V T^T, where T is about the inverse root of the Hessian: the same
    minimum in ten times fewer steps. It stops where the gradient of the mean loss with respect to V
    is at most 3e-6 everywhere. Products of h are float32 first, then float64, without which
    rounding hides the last steps from the line search. Either takes at most `iterations` steps. On
    features that separate the classes almost perfectly these are too few for l2 below 1e-2: at 1e-6
    the norm of the gradient with respect to W then ends at about 2e-4."""
    n = len(h)
    mean, values, vectors = shape or spectrum(h)
    curvature = values.clamp(min=0) / classes + max(l2, 1e-6) / n + 1e-8 * values[-1]
    transform = vectors * curvature.rsqrt()                             # T (D, D)
    v = torch.zeros(classes, h.shape[1] + 1, dtype=torch.float64, device=h.device)
    if start is not None:
        v[:, :-1] = start[:, :-1].double() @ (vectors * curvature.sqrt())
        v[:, -1] = start[:, -1] + start[:, :-1].double() @ mean
    v.grad = torch.zeros_like(v)

    def weights_and_bias():
        w = v[:, :-1] @ transform.T
        return w, v[:, -1] - w @ mean           # the last column of V is the bias of h - mean

    def closure():
        """The mean loss; its gradient goes to v.grad."""
        w, b = weights_and_bias()
        loss = l2 / 2 * w.square().sum()
        w_gradient = l2 * w
        b_gradient = torch.zeros_like(b)
        for chunk, labels in zip(h.split(16384), y.split(16384)):
            x = chunk.to(precision)
            part, gradient = loss_and_gradient(x @ w.T.to(precision) + b.to(precision), labels)
            loss += part
            w_gradient += gradient.T @ x
            b_gradient += gradient.sum(0, dtype=torch.float64)
        v.grad[:, :-1] = (w_gradient - b_gradient[:, None] * mean) @ transform / n
        v.grad[:, -1] = b_gradient / n
        return loss / n

    for precision, tolerance in ((torch.float32, 1e-8), (torch.float64, 1e-11)):
        optimizer = torch.optim.LBFGS([v], max_iter=iterations, max_eval=2 * iterations,
                                      history_size=10, tolerance_grad=3e-6,
                                      tolerance_change=tolerance, line_search_fn="strong_wolfe")
        optimizer.step(closure)
    w, b = weights_and_bias()
    return torch.cat([w, b[:, None]], 1)
