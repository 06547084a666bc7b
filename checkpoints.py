"""Checkpoint files of other projects, read as ours.

`read(path)` tells whose file it is from the names of its tensors (`LAYOUTS`), and which ResNet from
their shapes. Its `encoder_config` has arch, norm, stem, in_channels and stem_width, from which
`common.resnet` builds the encoder, and where they are needed two keys for `adapt`:

    padding      2: that of a 3x3 stem (solo-learn); "same": TensorFlow's, in the whole network
    stem_relu    False: there is no ReLU after the stem (lightly)

CMC's files have `view`, "lab" or "ycbcr", instead of in_channels: `cmc.Halves` builds the encoder.

No file runs code. The names in `HARMLESS`, which training checkpoints hold beside tensors and plain
values, become an `Inert` object that does nothing; a file with any other name is refused.
"""
import math, pickle, re, warnings
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import common
from common import UserError

IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]         # mean, standard deviation
SWAV = [0.485, 0.456, 0.406], [0.228, 0.224, 0.225]             # its code has .228
CIFAR10 = [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]
CIFAR100 = [0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761]
SOLO_CIFAR10 = [0.4914, 0.4822, 0.4465], [0.247, 0.243, 0.261]
RGB = [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]                          # `cmc.Halves` does the rest
DATA = dict(cifar10=CIFAR10, cifar100=CIFAR100, imagenet=IMAGENET, imagenet100=IMAGENET)

LAYOUTS = [     # project, prefix of the encoder, how another name begins, statistics of the input
    ("CMC", "encoder.l_to_ab.", "encoder.ab_to_l.", RGB),
    ("MoCo v1, v2", "encoder_q.", "", IMAGENET),
    ("MoCo v3", "base_encoder.", "", IMAGENET),
    ("solo-learn", "encoder.", "classifier.", IMAGENET),
    ("solo-learn", "backbone.", "classifier.", IMAGENET),
    ("SimSiam", "encoder.", "predictor.", IMAGENET),
    ("SupContrast", "encoder.", "head.", CIFAR10),
    ("SupContrast cross entropy", "encoder.", "fc.", CIFAR10),
    ("InsDis", "encoder.", "", IMAGENET),
    ("DINO", "backbone.", "head.", IMAGENET),
    ("Barlow Twins, VICReg", "backbone.", "projector.", IMAGENET),
    ("lightly", "backbone.", "", IMAGENET),
    ("DeepCluster-v2", "", "prototypes.prototypes0.", SWAV),
    ("SwAV", "", "prototypes.", SWAV),
    ("torchvision's layout", "", "", IMAGENET),
]
STATE_DICTS = ["state_dict", "model_state_dict", "model", "online_backbone", "teacher", "student"]
TRANSFORMER = r"(^|\.)(cls_token|class_token|pos_embed|patch_embed|attn|self_attention)(\.|$)"
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64]
HARMLESS = ["argparse.Namespace", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
            "numpy.dtype", "__main__.exclude_bias_and_norm"]

class Inert:
    """Stands for an object of a file. It does nothing with what it is given, and keeps as `state`
    what the object's attributes would have been."""
    state = None

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        self.state = state

def read(path, padding=None, view=None):
    """The checkpoint in a file or a run's folder: of ours what `common.read_checkpoint` returns, of
    another project's method (the project), args ({}), encoder_config, encoder, input and model.

    Both have `supervised` as well: whether labels were learned from, None if that is not known.
    `padding` "same" is for weights converted from TensorFlow or JAX, such as BYOL's; `view`, "lab"
    or "ycbcr", for files of CMC that do not tell. Raises UserError for a file of no use."""
    path = Path(path)
    if path.is_dir():
        path = path / "checkpoint.pt"
    if path.is_fifo():
        raise UserError(f"{path}: a pipe, not a file")
    content = load(path)
    if not isinstance(content, dict) or "encoder_config" not in content:
        checkpoint = read_foreign(path, content, padding, view)
    elif padding or view:
        raise UserError(f"--padding, --view: only for files of other projects, unlike {path}")
    else:
        checkpoint = common.read_checkpoint(path)
        checkpoint["supervised"] = checkpoint["method"] == "supcon"
    for name, value in checkpoint["encoder"].items():
        if not isinstance(name, str) or not is_plain(value) or not value.isfinite().all():
            raise UserError(f"{path}: {printable(name)} is not a tensor of finite numbers")
        if not value.is_floating_point() and not name.endswith("num_batches_tracked"):
            raise UserError(f"{path}: {printable(name)} is of {value.dtype}, which no weights are")
    given = checkpoint["input"].get
    std = three_numbers(given("std"))
    fraction = given("fraction", 1.0)
    if not (isinstance(given("size"), int) and given("size") > 0 and three_numbers(given("mean"))
            and std and min(std) > 0 and given("interpolation") in ("bilinear", "bicubic")
            and isinstance(fraction, (int, float)) and 0.1 <= fraction <= 1):
        raise UserError(f"{path}: its input has no size, mean, std, interpolation and fraction "
                        "of use")
    for flag, kind in dict(data=str, root=str, epochs=int).items():
        if not isinstance(checkpoint["args"].get(flag, kind()), kind):
            raise UserError(f"{path}: its --{flag} is {printable(checkpoint['args'][flag])}")
    return checkpoint

def load(path):
    """The content of a file of torch.save or safetensors, on the CPU."""
    stand_ins = [(Inert, name) for name in HARMLESS]
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
            warnings.simplefilter("ignore")     # of old formats
            return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        why = "needs the package safetensors: pip install safetensors"
    except FileNotFoundError:
        why = "no such file"
    except Exception as e:                      # torch raises half a dozen kinds
        why = f"not a readable checkpoint ({common.first_line(e)})"
        named = re.search(r"GLOBAL ([\w.]+)", str(e))
        if named:
            why = (f"holds more than tensors ({named[1][:80]}), and reading that could run code, "
                   "which is refused; save its state dict alone, where nothing can be harmed")
        elif isinstance(e, pickle.UnpicklingError) or "weights_only" in str(e):
            # torch's own text advises what is unsafe.
            why = "no file of torch.save, or made of more than tensors and plain values"
    raise UserError(f"{path}: {why}")

def read_foreign(path, content, padding, view):
    """What `read` returns, from the content of another project's file."""
    file = content if isinstance(content, dict) else {}
    key = next((key for key in STATE_DICTS if tensors(file.get(key))), None)
    state = tensors(file.get(key, file))
    project, prefix, statistics = find_layout(path, state)
    flags = getattr(file.get("opt"), "state", file.get("opt"))          # argparse's, or a dict
    flags = flags if isinstance(flags, dict) else {}
    config, encoder, used = find_resnet(path, state, prefix, 1 if project == "CMC" else 3)
    small = config["stem"] == "small"
    supervised = None if project == "torchvision's layout" and "fc.weight" in state else False
    if project == "CMC":
        if view is None and isinstance(flags.get("view"), str):
            view = flags["view"].lower()
        if view not in ("lab", "ycbcr"):
            raise UserError(f"{path}: a file of CMC that does not tell its colours; add --view lab "
                            "or --view ycbcr")
        _, color, used_by_color = find_resnet(path, state, "encoder.ab_to_l.", 2)
        used |= used_by_color
        config = dict(arch=config["arch"], norm="batch", stem=config["stem"], view=view,
                      stem_width=len(encoder["conv1.weight"]))
        encoder = {f"light.{name}": value for name, value in encoder.items()}
        encoder.update((f"color.{name}", value) for name, value in color.items())
    elif view:
        raise UserError(f"--view: only for files of CMC, and {path} is one of {project}")
    elif project == "solo-learn" and small:
        config["padding"] = 2                   # which makes 34 x 34 pixels of 32 x 32
        statistics = CIFAR100 if has_100_classes(state) else SOLO_CIFAR10
    elif project.startswith("SupContrast"):
        project, statistics, supervised = read_flags(project, small, state, flags)
    if padding:
        config["padding"] = padding
    supervision = ", supervised" if supervised else ""
    common.say(f"{path}: {project}{supervision}, {config['arch']}, stem {config['stem']}; "
               f"{len(used)} tensors read; left out: {left_out(state, used, prefix, file, key)}")
    mean, std = map(list, statistics)
    return dict(method=project, args={}, encoder_config=config, encoder=encoder, model=state,
                input=dict(size=32 if small else 224, mean=mean, std=std, interpolation="bilinear"),
                supervised=supervised)

def is_plain(value):
    """Whether this is an ordinary tensor of weights or, int64, a counter."""
    return (type(value) in (torch.Tensor, nn.Parameter) and value.dtype in DTYPES
            and value.device.type == "cpu" and value.layout == torch.strided
            and not value.is_nested)

def tensors(state_dict):
    """The tensors of a state dict, under the names that they had before DataParallel and
    torch.compile wrapped the model; none if it is no state dict."""
    items = state_dict.items() if isinstance(state_dict, dict) else ()
    return {re.sub(r"(^|\.)((module|_orig_mod)\.)+", r"\1", name): value.detach()
            for name, value in items if isinstance(name, str) and is_plain(value)}

def find_layout(path, state):
    """(project, prefix of the encoder's names, mean and standard deviation of its input)."""
    for project, prefix, other, statistics in LAYOUTS:
        stem = prefix + "conv1.weight" in state or prefix + "0.weight" in state
        if stem and any(name.startswith(other) for name in state):
            return project, prefix, statistics
    if any(re.search(TRANSFORMER, name) for name in state):
        raise UserError(f"{path}: a vision transformer, no ResNet")
    known = ", ".join(dict.fromkeys(layout[0] for layout in LAYOUTS))
    raise UserError(f"{path}: neither a checkpoint of these scripts nor in a layout known here "
                    f"({known})")

def find_resnet(path, state, prefix, in_channels):
    """(encoder_config, state dict under torchvision's names, names in the file) of the ResNet whose
    names begin with `prefix`."""
    # nn.Sequential(*resnet.children()) numbers its layers: the first is 4, after a ReLU and a pool,
    # or 2 in lightly's own ResNet, whose ReLU is a function, which the Sequential has lost.
    stem_relu = prefix + "2.0.conv1.weight" not in state
    new_names = {"0": "conv1", "1": "bn1"}
    for i in range(1, 5):
        new_names[str(i + 3 if stem_relu else i + 1)] = f"layer{i}"
    encoder = {}
    used = set()
    for name, value in state.items():
        first, _, rest = name.removeprefix(prefix).partition(".")
        new = f"{new_names.get(first, first)}.{rest}".replace(".shortcut.", ".downsample.")
        if name.startswith(prefix) and re.match(r"(conv1|bn1|layer[1-4])\.", new):
            encoder[new] = value.float() if value.is_floating_point() else value
            used.add(name)
    blocks = tuple(len({name.split(".")[1] for name in encoder if name.startswith(f"layer{i}.")})
                   for i in range(1, 5))
    bottleneck = "layer1.0.conv3.weight" in encoder
    depths = [depth for depth, known in common.DEPTHS.items()
              if known == blocks and (depth >= 50) == bottleneck]
    stem = encoder.get("conv1.weight", torch.empty(0))
    conv = encoder.get("layer1.0.conv1.weight", torch.empty(0))
    if not depths or stem.shape[2:] not in ((7, 7), (3, 3)) or conv.ndim != 4:
        kind = "bottleneck" if bottleneck else "basic"
        raise UserError(f"{path}: its encoder is no ResNet known here ({blocks} {kind} blocks, a "
                        f"stem of {tuple(stem.shape)})")
    width = len(conv)
    config = dict(arch=f"resnet{depths[0]}" + (f"x{width / 64:g}" if width != 64 else ""),
                  norm="batch", stem="imagenet" if stem.shape[2] == 7 else "small",
                  in_channels=in_channels, stem_width=len(stem) if len(stem) != width else None)
    try:
        with torch.device("meta"):
            common.resnet(**config).load_state_dict(encoder, assign=True)
    except (RuntimeError, ValueError) as e:
        raise UserError(f"{path}: does not fit {config['arch']} ({printable(e, 300)})") from None
    if not stem_relu:
        config["stem_relu"] = False
    return config, encoder, used

def read_flags(project, small, state, flags):
    """(project, mean and standard deviation, supervised) of a file in SupContrast's layout, which
    is also that of PyContrast (InsDis, InfoMin): that one has a 7x7 stem and saves no flags."""
    statistics = IMAGENET
    supervised = True
    if small:
        statistics = CIFAR100 if has_100_classes(state) else CIFAR10
    elif project == "SupContrast":
        project = "PyContrast"
        supervised = False
    mean = three_numbers(flags.get("mean"))
    std = three_numbers(flags.get("std"))
    if mean and std and min(std) > 0:
        statistics = mean, std
    if isinstance(flags.get("dataset"), str):       # "path" is the one that needs --mean and --std
        statistics = DATA.get(flags["dataset"], statistics)
    if isinstance(flags.get("method"), str):
        supervised = flags["method"] == "SupCon"
        project += f" {printable(flags['method'])}"
    return project, statistics, supervised

def has_100_classes(state):
    classifier = state.get("classifier.weight", state.get("fc.weight", torch.empty(0)))
    return classifier.ndim == 2 and len(classifier) == 100

def three_numbers(value):
    """Three finite numbers of a sequence, or of a text such as "(0.5, 0.5, 0.5)", or None."""
    if isinstance(value, str):
        value = value.strip(" ()[],").split(",")
    try:
        numbers = [float(number) for number in value]
    except (TypeError, ValueError, ArithmeticError, RuntimeError):
        return None
    return numbers if len(numbers) == 3 and all(map(math.isfinite, numbers)) else None

def left_out(state, used, prefix, file, key):
    """What was not read: tensors by the beginning of their names, and what the file holds beside
    its state dict, which is under `key` if not None."""
    groups = Counter()
    for name in state.keys() - used:
        parts = name.split(".")
        beside = parts[0] == prefix.split(".")[0]       # another part of the same module
        groups[".".join(parts[:1 + prefix.count(".") if beside else 1])] += 1
    parts = sorted(f"{printable(group)} ({number})" for group, number in groups.items())
    if key is not None:
        parts += sorted(printable(other) for other in file if other != key)
    return ", ".join(parts[:12] + ["more"] * (len(parts) > 12)) or "nothing"

def printable(text, length=80):
    """A text out of a file on one line, without control characters."""
    return re.sub(r"[^ -~]+", "?", " ".join(str(text).split()))[:length]

class LinearStem(common.ResNet):
    """A ResNet without the ReLU after its stem."""

    def maps(self, x):
        x = self.maxpool(self.bn1(self.conv1(x)))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

def adapt(encoder, config):
    """Change `encoder`, as `common.resnet` or `cmc.Halves` built it, in place to what `padding` and
    `stem_relu` of an encoder_config say. Parameters and their names stay as they are."""
    padding = config.get("padding")
    if padding not in (None, 2, "same"):
        raise ValueError(f"padding {padding!r}: not 2 or same")
    if padding == 2:
        encoder.conv1.padding = (2, 2)
    for module in encoder.modules() if padding == "same" else ():
        if isinstance(module, (nn.Conv2d, nn.MaxPool2d)) and module.stride in (2, (2, 2)):
            module.padding = (0, 0)
            module.register_forward_pre_hook(pad_same)
    if not config.get("stem_relu", True):
        encoder.__class__ = LinearStem          # with the same weights; copies of it stay so
    return encoder

def pad_same(module, inputs):
    """TensorFlow's SAME padding, a hook before a convolution or pool without padding of its own: as
    much as gives ceil(size / stride) outputs, the odd pixel at the bottom and right."""
    x, = inputs                                                         # (N, C, H, W)
    pool = isinstance(module, nn.MaxPool2d)
    kernel = module.kernel_size if pool else module.kernel_size[0]
    stride = module.stride if pool else module.stride[0]
    sides = []                                                          # left, right, top, bottom
    for size in (x.shape[3], x.shape[2]):
        total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        sides += [total // 2, total - total // 2]
    return F.pad(x, sides, value=-math.inf if pool else 0.0) if any(sides) else x
