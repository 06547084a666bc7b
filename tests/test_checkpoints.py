"""checkpoints.py: files of other projects load as the networks that they are and run no code; every
file of no use is refused in one line."""
import argparse, contextlib, copy, functools, os, pickle, sys, types, zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import checkpoints
import common

IMAGENET = [0.485, 0.456, 0.406]                # means
CIFAR10 = [0.4914, 0.4822, 0.4465]
CIFAR100 = [0.5071, 0.4867, 0.4408]

def network(arch="resnet10x0.125", **config):
    """A network with weights and running statistics of its own, in eval mode."""
    torch.manual_seed(3)
    encoder = common.resnet(arch, **config)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return encoder.eval()

@functools.cache
def weights():
    """The state dict of the small network, which nobody may change."""
    return dict(network().state_dict())

def build(checkpoint):
    """What evaluate.py makes of a checkpoint, if it is none of CMC."""
    config = checkpoint["encoder_config"]
    keys = ["arch", "norm", "stem", "in_channels", "stem_width"]
    encoder = common.resnet(**{key: config[key] for key in keys})
    encoder.load_state_dict(checkpoint["encoder"])
    return checkpoints.adapt(encoder, config).eval()

def save(path, content, **options):
    torch.save(content, path, **options)
    return path

def refused(path, **options):
    """The message, one line, with which `read` refuses the file."""
    with pytest.raises(common.UserError) as e:
        checkpoints.read(path, **options)
    assert "\n" not in str(e.value) and str(path) in str(e.value)
    return str(e.value)

def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}

def renamed(names, state):
    """The first part of each name replaced, as nn.Sequential(*children) does."""
    changed = {}
    for name, value in state.items():
        first, rest = name.split(".", 1)
        changed[f"{names[first]}.{rest}"] = value
    return changed

def shortcut(state):
    return {name.replace("downsample", "shortcut"): value for name, value in state.items()}

# ------------------------------------------------------------------- layouts

HEAD = {"0.weight": torch.zeros(4, 4)}
FC = {"fc.weight": torch.zeros(10, 64), "fc.bias": torch.zeros(10)}
CHILDREN = dict(conv1="0", bn1="1", layer1="4", layer2="5", layer3="6", layer4="7")
FLAGS = argparse.Namespace(lr=0.1)

def moco(state):
    both = {**state, **FC}
    return dict(epoch=200, optimizer={}, state_dict={
        **prefixed("module.encoder_q.", both), **prefixed("module.encoder_k.", both),
        "module.queue": torch.zeros(128, 8), "module.queue_ptr": torch.zeros(1)})

def moco_v3(state):
    return dict(state_dict={
        **prefixed("module.base_encoder.", state), **prefixed("module.momentum_encoder.", state),
        **prefixed("module.predictor.", HEAD)})

def simsiam(state):
    return dict(state_dict={**prefixed("module.encoder.", {**state, "fc.0.weight": torch.ones(8)}),
                            **prefixed("module.predictor.", HEAD)})

def torchvisions(state):
    return {name: value for name, value in {**state, **FC}.items() if "num_batches" not in name}

def byol(state):
    backbone = prefixed("module.", state)
    return dict(online_backbone=backbone, target_backbone=backbone)

def swav(state):
    return {**prefixed("module.", state), **prefixed("module.projection_head.", HEAD),
            "module.prototypes.weight": torch.zeros(30, 4)}

def deepcluster(state):
    return {**prefixed("module.", state),
            "module.prototypes.prototypes0.weight": torch.zeros(30, 4)}

def barlow_twins(state):
    return dict(epoch=1, optimizer={}, model={**prefixed("module.backbone.", state),
                                              **prefixed("module.projector.", HEAD)})

def dino(state):
    return dict(student=prefixed("module.backbone.", state), args=FLAGS,
                teacher={**prefixed("backbone.", state), "head.mlp.0.weight": torch.zeros(4, 4)})

def supcontrast(state):
    return dict(opt=FLAGS, epoch=1, model={**prefixed("encoder.module.", shortcut(state)),
                                           **prefixed("head.", HEAD)})

def supcontrast_cross_entropy(state):
    return dict(opt=FLAGS, model={**prefixed("encoder.module.", shortcut(state)), **FC})

def pycontrast(state):
    return dict(model={**prefixed("module.encoder.", state), **prefixed("module.head.", HEAD),
                       **prefixed("module.head_jig.", HEAD)}, contrast={})

def insdis(state):
    return dict(opt=FLAGS, model=prefixed("encoder.module.", {**state, **FC}), contrast={})

def lightly(state):
    return dict(state_dict={**prefixed("backbone.", renamed(CHILDREN, state)),
                            **prefixed("projection_head.layers.", HEAD)})

def solo_learn(state):
    return dict(state_dict={**prefixed("backbone.", state), **prefixed("projector.", HEAD),
                            "classifier.weight": torch.zeros(10, 64)})

def solo_learn_before(state):
    return dict(state_dict={**prefixed("encoder.", state), **prefixed("predictor.", HEAD),
                            "classifier.weight": torch.zeros(10, 64)})

def solo_learn_dino(state):
    return dict(state_dict={**prefixed("backbone.", state), **prefixed("head.mlp.", HEAD),
                            "classifier.weight": torch.zeros(10, 64)})

LAYOUTS = [     # file, stem, project, mean of the input, what must be said to be left out
    (moco, "imagenet", "MoCo v1, v2", IMAGENET, ["encoder_q.fc (2)", "encoder_k (74)"]),
    (moco_v3, "imagenet", "MoCo v3", IMAGENET, ["momentum_encoder (72)", "predictor (1)"]),
    (simsiam, "imagenet", "SimSiam", IMAGENET, ["encoder.fc (1)", "predictor (1)"]),
    (torchvisions, "imagenet", "torchvision's layout", IMAGENET, ["fc (2)"]),
    (byol, "imagenet", "torchvision's layout", IMAGENET, ["target_backbone"]),
    (swav, "imagenet", "SwAV", IMAGENET, ["projection_head (1)", "prototypes (1)"]),
    (deepcluster, "imagenet", "DeepCluster-v2", IMAGENET, ["prototypes (1)"]),
    (dict, "imagenet", "torchvision's layout", IMAGENET, ["nothing"]),
    (barlow_twins, "imagenet", "Barlow Twins, VICReg", IMAGENET, ["projector (1)", "optimizer"]),
    (dino, "imagenet", "DINO", IMAGENET, ["head (1)", "student", "args"]),
    (supcontrast, "small", "SupContrast", CIFAR10, ["head (1)", "opt"]),
    (supcontrast_cross_entropy, "small", "SupContrast cross entropy", CIFAR10, ["fc (2)"]),
    (pycontrast, "imagenet", "PyContrast", IMAGENET, ["head (1)", "head_jig (1)", "contrast"]),
    (insdis, "imagenet", "InsDis", IMAGENET, ["encoder.fc (2)", "contrast"]),
    (lightly, "imagenet", "lightly", IMAGENET, ["projection_head (1)"]),
    (solo_learn, "small", "solo-learn", CIFAR10, ["classifier (1)", "projector (1)"]),
    (solo_learn_before, "small", "solo-learn", CIFAR10, ["classifier (1)", "predictor (1)"]),
    (solo_learn_dino, "small", "solo-learn", CIFAR10, ["classifier (1)", "head (1)"]),
]

@pytest.mark.parametrize("make,stem,project,mean,left", LAYOUTS)
def test_layouts(make, stem, project, mean, left, tmp_path, capsys):
    theirs = network(stem=stem)
    path = save(tmp_path / "theirs.pth", make(theirs.state_dict()))
    checkpoint = checkpoints.read(path)
    said = capsys.readouterr().err
    ours = build(checkpoint)
    if project == "solo-learn":
        theirs.conv1.padding = (2, 2)
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x))
    assert checkpoint["method"] == project
    assert checkpoint["input"]["mean"] == mean
    assert checkpoint["input"]["size"] == (32 if stem == "small" else 224)
    assert checkpoint["args"] == {}
    assert said.count("\n") == 1 and f"{project}, " in said and "resnet10x0.125" in said
    for text in left:
        assert text in said.split("left out: ")[1]

def test_supervision_is_told(tmp_path):
    told = {}
    for make in (supcontrast, supcontrast_cross_entropy, pycontrast, moco, torchvisions):
        stem = "small" if make in (supcontrast, supcontrast_cross_entropy) else "imagenet"
        path = save(tmp_path / f"{make.__name__}.pth", make(network(stem=stem).state_dict()))
        told[make.__name__] = checkpoints.read(path)["supervised"]
    assert told == dict(supcontrast=True, supcontrast_cross_entropy=True, pycontrast=False,
                        moco=False, torchvisions=None)

@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50", "resnet50x2"])
def test_architecture_from_the_shapes(arch):
    with torch.device("meta"):
        state = common.resnet(arch).state_dict()
    config, encoder, used = checkpoints.find_resnet("x", state, "", 3)
    assert config == dict(arch=arch, norm="batch", stem="imagenet", in_channels=3, stem_width=None)
    assert encoder.keys() == used == state.keys()

def test_reads_torchvisions_resnet_as_torchvision_does(tmp_path):
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18().eval()
    ours = build(checkpoints.read(save(tmp_path / "resnet18.pth", theirs.state_dict())))
    theirs.fc = nn.Identity()
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize("key,prefix", [
    ("model_state_dict", ""), ("state_dict", "module."), ("model", "_orig_mod."),
    ("model_state_dict", "module._orig_mod."), ("model", "_orig_mod.module.")])
def test_wrappers(key, prefix, tmp_path):
    state = weights()
    path = save(tmp_path / "wrapped.pth", {key: prefixed(prefix, state), "epoch": 3})
    encoder = checkpoints.read(path)["encoder"]
    assert encoder.keys() == state.keys()

def test_half_precision_and_parameters(tmp_path):
    state = network().state_dict()
    halves = {}
    for name, value in state.items():
        halves[name] = nn.Parameter(value.half()) if value.is_floating_point() else value
    encoder = build(checkpoints.read(save(tmp_path / "half.pth", halves)))
    assert encoder.conv1.weight.dtype == torch.float32
    torch.testing.assert_close(encoder.conv1.weight.data, state["conv1.weight"], atol=1e-3, rtol=0)

# ------------------------------------------------------------------- networks that differ from ours

class LightlyResNet(nn.Module):
    """As lightly's own: its ReLU after the stem is a function, no child."""

    def __init__(self, resnet):
        super().__init__()
        for name in ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4"):
            setattr(self, name, getattr(resnet, name))

def test_lightlys_own_resnet_has_no_relu_after_the_stem(tmp_path):
    theirs = nn.Sequential(*LightlyResNet(network(stem="small")).children())
    state = shortcut(prefixed("backbone.", theirs.state_dict()))
    assert "backbone.2.0.conv1.weight" in state
    checkpoint = checkpoints.read(save(tmp_path / "lightly.ckpt", dict(state_dict=state)))
    assert checkpoint["encoder_config"]["stem_relu"] is False
    assert checkpoint["input"]["mean"] == IMAGENET      # also for CIFAR, in lightly's benchmark
    ours = build(checkpoint)
    x = torch.rand(2, 3, 16, 16)
    expected = theirs(x).mean((2, 3))
    torch.testing.assert_close(ours(x), expected)
    torch.testing.assert_close(copy.deepcopy(ours)(x), expected)
    assert (network(stem="small")(x) - expected).abs().max() > 0.1      # as it was read before

def test_lightly_of_torchvisions_children_has_its_relu(tmp_path):
    path = save(tmp_path / "lightly.ckpt", lightly(weights()))
    assert "stem_relu" not in checkpoints.read(path)["encoder_config"]

def slow_same(x, kernel, stride, reduce, fill):
    """TensorFlow's SAME windows of x (C, H, W), one after the other: `reduce` makes the values of
    an output pixel of its window (C, kernel, kernel)."""
    channels, height, width = x.shape
    rows = -(-height // stride)
    columns = -(-width // stride)
    pad_rows = max((rows - 1) * stride + kernel - height, 0)
    pad_columns = max((columns - 1) * stride + kernel - width, 0)
    output = []
    for row in range(rows):
        for column in range(columns):
            window = torch.full((channels, kernel, kernel), fill, dtype=x.dtype)
            for i in range(kernel):
                for j in range(kernel):
                    y = row * stride + i - pad_rows // 2            # the smaller half comes before
                    z = column * stride + j - pad_columns // 2
                    if 0 <= y < height and 0 <= z < width:
                        window[:, i, j] = x[:, y, z]
            output.append(reduce(window))
    return torch.stack(output, 1).view(-1, rows, columns)

def slow_conv(conv, x):
    weight = conv.weight.flatten(1)
    return slow_same(x, conv.kernel_size[0], conv.stride[0], lambda w: weight @ w.flatten(), 0.0)

def slow_norm(norm, x):
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return (x - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]

def slow_block(block, x):
    y = slow_norm(block.bn1, slow_conv(block.conv1, x)).relu()
    y = slow_norm(block.bn2, slow_conv(block.conv2, y))
    if hasattr(block, "conv3"):
        y = slow_norm(block.bn3, slow_conv(block.conv3, y.relu()))
    shortcut = x
    if block.downsample is not None:
        shortcut = slow_norm(block.downsample[1], slow_conv(block.downsample[0], x))
    return (y + shortcut).relu()

def slow_resnet(encoder, x):
    """(C, H, W) -> (dim,), every convolution and the pool with SAME padding."""
    x = slow_norm(encoder.bn1, slow_conv(encoder.conv1, x)).relu()
    x = slow_same(x, 3, 2, lambda window: window.amax((1, 2)), float("-inf"))
    for layer in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4):
        for block in layer:
            x = slow_block(block, x)
    return x.mean((1, 2))

@torch.no_grad()
@pytest.mark.parametrize("arch,height,width", [
    ("resnet10x0.125", 32, 32), ("resnet10x0.125", 21, 34), ("resnet50x0.125", 24, 24)])
def test_padding_same_is_tensorflows(arch, height, width, tmp_path):
    state = network(arch).state_dict()
    checkpoint = checkpoints.read(save(tmp_path / "byol.pth", state), padding="same")
    assert checkpoint["encoder_config"]["padding"] == "same"
    encoder = build(checkpoint).double()
    x = torch.rand(1, 3, height, width, dtype=torch.double)
    expected = slow_resnet(encoder, x[0])
    torch.testing.assert_close(encoder(x)[0], expected)
    torch.testing.assert_close(copy.deepcopy(encoder)(x)[0], expected)
    assert encoder.state_dict().keys() == state.keys()
    torchs = build(checkpoints.read(tmp_path / "byol.pth")).double()    # as it was read before
    assert (torchs(x)[0] - expected).norm() > 0.05 * expected.norm()

def test_padding_same_pads_every_layer_that_halves_the_size(tmp_path):
    path = save(tmp_path / "byol.pth", network("resnet50x0.125").state_dict())
    encoder = build(checkpoints.read(path, padding="same"))
    padded = []
    for name, module in encoder.named_modules():
        if module._forward_pre_hooks:
            padded.append(name)
    for name in ("conv1", "maxpool", "layer2.0.conv2", "layer3.0.conv2", "layer4.0.conv2"):
        assert name in padded
    repr(encoder)
    for side in (7, 8, 64, 65):
        assert encoder.maps(torch.zeros(1, 3, side, side)).shape[2] == -(-side // 32)

def test_a_stem_of_another_width(tmp_path):
    """InsDis's network of twice the width has a stem of the ordinary one."""
    theirs = network("resnet10x0.25", stem_width=8)
    path = save(tmp_path / "insdis.pth", insdis(theirs.state_dict()))
    checkpoint = checkpoints.read(path)
    assert checkpoint["encoder_config"]["arch"] == "resnet10x0.25"
    assert checkpoint["encoder_config"]["stem_width"] == 8
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(build(checkpoint)(x), theirs(x))

def test_adapt_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="padding 3"):
        checkpoints.adapt(network(), dict(padding=3))

# ------------------------------------------------------------------- flags of the training

FLAGS_OF_SUPCONTRAST = [    # stem, flags, method, supervised, mean
    ("small", dict(method="SupCon", dataset="cifar10"), "SupContrast SupCon", True, CIFAR10),
    ("small", dict(method="SimCLR", dataset="cifar10"), "SupContrast SimCLR", False, CIFAR10),
    ("small", dict(method="SupCon", dataset="cifar100", mean="(.1, .2, .3)", std="(1, 1, 1)"),
     "SupContrast SupCon", True, CIFAR100),
    ("small", dict(dataset="path", mean="(0.1, 0.2, 0.3)", std="(0.4, 0.5, 0.6)"),
     "SupContrast", True, [0.1, 0.2, 0.3]),
    ("small", dict(dataset="path", mean=(0.1, 0.2, 0.3), std=[0.4, 0.5, 0.6]),
     "SupContrast", True, [0.1, 0.2, 0.3]),
    ("small", dict(mean="(0.1, 0.2, 0.3)", std="(0.4, 0.5, 0)"), "SupContrast", True, CIFAR10),
    ("small", dict(mean="__import__('os')", std=None), "SupContrast", True, CIFAR10),
    ("small", dict(mean=[[1], {}, "x"], std=torch.ones(2), dataset=[], method=3),
     "SupContrast", True, CIFAR10),
    ("small", {}, "SupContrast", True, CIFAR10),
    ("imagenet", {}, "PyContrast", False, IMAGENET),
    ("imagenet", dict(method="InfoMin"), "PyContrast InfoMin", False, IMAGENET),
    ("imagenet", dict(method="SupCon", dataset="imagenet"), "PyContrast SupCon", True, IMAGENET),
]

@pytest.mark.parametrize("stem,flags,method,supervised,mean", FLAGS_OF_SUPCONTRAST)
def test_flags_of_supcontrast(stem, flags, method, supervised, mean, tmp_path, capsys):
    content = dict(supcontrast(network(stem=stem).state_dict()), opt=argparse.Namespace(**flags))
    checkpoint = checkpoints.read(save(tmp_path / "supcontrast.pth", content))
    assert checkpoint["method"] == method
    assert checkpoint["supervised"] is supervised
    assert checkpoint["input"]["mean"] == mean
    assert ("supervised" in capsys.readouterr().err) == supervised

@pytest.mark.parametrize("make", [solo_learn, supcontrast_cross_entropy])
@pytest.mark.parametrize("stem,classes,mean", [
    ("small", 100, CIFAR100), ("small", 10, CIFAR10), ("imagenet", 100, IMAGENET)])
def test_cifar_100(make, stem, classes, mean, tmp_path):
    content = make(network(stem=stem).state_dict())
    state = content.get("state_dict", content.get("model"))
    name = "classifier.weight" if make is solo_learn else "fc.weight"
    state[name] = torch.zeros(classes, 64)
    checkpoint = checkpoints.read(save(tmp_path / "theirs.pth", content))
    assert checkpoint["input"]["mean"] == mean
    if mean == CIFAR100:
        assert checkpoint["input"]["std"] == [0.2675, 0.2565, 0.2761]

def cmc(flags):
    """CMC's two networks, with stems wider than their layers."""
    model = {}
    for name, channels in (("l_to_ab", 1), ("ab_to_l", 2)):
        half = network("resnet10x0.125", in_channels=channels, stem_width=16).state_dict()
        model.update(prefixed(f"encoder.module.{name}.", {**half, **FC}))
    return dict(opt=flags, model=model, contrast={}, epoch=200)

@pytest.mark.parametrize("flags,asked,view", [
    (argparse.Namespace(view="Lab"), None, "lab"),
    (argparse.Namespace(view="YCbCr"), None, "ycbcr"), (dict(view="YCbCr"), None, "ycbcr"),
    (FLAGS, "lab", "lab"), (3, "ycbcr", "ycbcr")])
def test_cmc(flags, asked, view, tmp_path, capsys):
    content = cmc(flags)
    checkpoint = checkpoints.read(save(tmp_path / "cmc.pth", content), view=asked)
    said = capsys.readouterr().err
    assert "encoder.l_to_ab.fc (2)" in said and "encoder.ab_to_l.fc (2)" in said
    assert checkpoint["method"] == "CMC"
    assert checkpoint["input"]["mean"] == [0, 0, 0] and checkpoint["input"]["std"] == [1, 1, 1]
    assert checkpoint["encoder_config"] == dict(arch="resnet10x0.125", norm="batch",
                                                stem="imagenet", stem_width=16, view=view)
    for half, theirs, channels in (("light", "l_to_ab", 1), ("color", "ab_to_l", 2)):
        encoder = common.resnet("resnet10x0.125", in_channels=channels, stem_width=16)
        encoder.load_state_dict({name.removeprefix(f"{half}."): value
                                 for name, value in checkpoint["encoder"].items()
                                 if name.startswith(f"{half}.")})
        original = content["model"][f"encoder.module.{theirs}.layer4.0.conv2.weight"]
        assert torch.equal(encoder.layer4[0].conv2.weight, original)

@pytest.mark.parametrize("flags", [
    None, FLAGS, argparse.Namespace(view=None), argparse.Namespace(view=7), dict(view=[]),
    argparse.Namespace(view="RGB"), "Lab", torch.zeros(2)])
def test_cmc_that_does_not_tell_its_colours(flags, tmp_path):
    message = refused(save(tmp_path / "cmc.pth", cmc(flags)))
    assert "--view lab" in message and "--view ycbcr" in message

def test_view_is_for_cmc_alone(tmp_path):
    path = save(tmp_path / "moco.pth", moco(weights()))
    assert "--view: only for files of CMC" in refused(path, view="lab")

# ------------------------------------------------------------------- training checkpoints

def exclude_bias_and_norm(parameter):
    return parameter.ndim == 1

def optimizer(value):
    return dict(state={}, param_groups=[dict(lr=value, momentum=0.9, params=[0, 1])])

TRAINING = {
    "SwAV": swav, "DeepCluster-v2": deepcluster, "DINO": dino, "InsDis": insdis,
    "SupContrast": supcontrast, "Barlow Twins, VICReg": barlow_twins, "lightly": lightly}

def rewrite(path, change):
    """The file with its pickle, bytes, replaced by what `change` makes of it."""
    with zipfile.ZipFile(path) as file:
        records = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in records.items():
            file.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return path

@pytest.mark.parametrize("numpy_version", [1, 2])
@pytest.mark.parametrize("project", TRAINING)
def test_training_checkpoints_with_a_numpy_scalar(project, numpy_version, tmp_path):
    stem = "small" if project == "SupContrast" else "imagenet"
    theirs = network(stem=stem)
    content = TRAINING[project](theirs.state_dict())
    if project in ("SwAV", "DeepCluster-v2"):
        content = dict(epoch=3, state_dict=content)
    content["optimizer"] = optimizer(np.float64(0.05))
    path = save(tmp_path / "training.pth", content)
    module = b"numpy.core.multiarray" if numpy_version == 1 else b"numpy._core.multiarray"
    rewrite(path, lambda data: data.replace(b"numpy._core.multiarray", module))
    with torch.serialization.safe_globals([argparse.Namespace]):        # as it was read before
        with pytest.raises(pickle.UnpicklingError, match=module.decode()):
            torch.load(path, weights_only=True)
    checkpoint = checkpoints.read(path)
    x = torch.rand(1, 3, 32, 32)
    assert checkpoint["method"] == project
    torch.testing.assert_close(build(checkpoint)(x), theirs(x))

def test_cmc_after_its_first_rate_drop(tmp_path):
    content = dict(cmc(argparse.Namespace(view="Lab")), optimizer=optimizer(np.float64(0.003)))
    path = save(tmp_path / "cmc.pth", content)
    assert checkpoints.read(path)["encoder_config"]["view"] == "lab"

def test_barlow_twins_and_vicreg_with_their_function(tmp_path, monkeypatch):
    monkeypatch.setattr(exclude_bias_and_norm, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "exclude_bias_and_norm", exclude_bias_and_norm,
                        raising=False)
    theirs = network()
    content = dict(barlow_twins(theirs.state_dict()), optimizer=optimizer(exclude_bias_and_norm))
    checkpoint = checkpoints.read(save(tmp_path / "barlow.pth", content))
    x = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(build(checkpoint)(x), theirs(x))

def test_nothing_stays_allowed(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    checkpoints.read(save(tmp_path / "moco.pth", moco(weights())))
    assert set(torch.serialization.get_safe_globals()) == before

# ------------------------------------------------------------------- hostile files

class Call:
    """Pickled as the call of a function, which unpickling then makes."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call

    def __call__(self):
        """The function of a call may itself be one."""

def state_and(payload):
    return dict(state_dict=weights(), payload=payload)

def reduce(path, mark):
    save(path, state_and(Call(os.system, f"touch {mark}")))

def eval_in_a_legacy_file(path, mark):
    save(path, state_and(Call(eval, f"open({str(mark)!r}, 'w')")),
         _use_new_zipfile_serialization=False)

def exec_in_a_namespace(path, mark):
    payload = Call(exec, f"open({str(mark)!r}, 'w')")
    save(path, dict(state_and(None), opt=argparse.Namespace(view=payload)))

def plain_pickle(path, mark):
    path.write_bytes(pickle.dumps(Call(os.system, f"touch {mark}")))

def with_pickle(path, code):
    """A file of torch.save with this pickle instead of its own."""
    rewrite(save(path, weights()), lambda data: code)

def build_on_a_namespace(path, mark):
    """Attributes that make the next BUILD call a function."""
    with_pickle(path, b"\x80\x02cargparse\nNamespace\n)\x81}X\x0c\x00\x00\x00__setstate__"
                b"cposix\nsystem\nsbX" + len(f"touch {mark}").to_bytes(4, "little")
                + f"touch {mark}".encode() + b"b.")

def getattr_chain(path, mark):
    system = Call(getattr, Call(__import__, "os"), "system")
    save(path, state_and(Call(system, f"touch {mark}")))

def inst_opcode(path, mark):
    with_pickle(path, f"(S'touch {mark}'\nios\nsystem\n.".encode())

def torchscript(path, mark):
    path.write_bytes(b"")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/constants.pkl", pickle.dumps((), 2))
        file.writestr("archive/data.pkl", pickle.dumps(Call(os.system, f"touch {mark}"), 2))
        file.writestr("archive/code/__torch__.py", "")
        file.writestr("archive/version", "3\n")

def bad_storage(path, mark):
    """A tensor that reaches far beyond its storage."""
    storage = torch.storage.TypedStorage(wrap_storage=torch.zeros(2).untyped_storage(),
                                         dtype=torch.float32, _internal=True)
    outside = Call(torch._utils._rebuild_tensor_v2, storage, 10 ** 6, (100,), (1,), False, {})
    save(path, dict(weights(), **{"conv1.weight": outside}))

HOSTILE = [reduce, eval_in_a_legacy_file, exec_in_a_namespace, plain_pickle, build_on_a_namespace,
           getattr_chain, inst_opcode, torchscript, bad_storage]

@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_file_runs_nothing(attack, forced, tmp_path, monkeypatch):
    mark = tmp_path / "was_run"
    path = tmp_path / "hostile.pth"
    attack(path, mark)
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    message = refused(path)
    assert not mark.exists()
    assert "weights_only" not in message                # torch advises to turn it off
    if attack in (reduce, eval_in_a_legacy_file, exec_in_a_namespace):
        assert "could run code, which is refused" in message
    if attack not in (torchscript, bad_storage):        # the attack is real
        with contextlib.suppress(Exception):
            torch.load(path, weights_only=False)
        assert mark.exists()

def test_a_stand_in_ignores_what_it_is_given(tmp_path):
    """Attributes of a Namespace cannot take the place of its methods."""
    path = tmp_path / "namespace.pth"
    with_pickle(path, b"\x80\x02cargparse\nNamespace\n)\x81}X\x0c\x00\x00\x00__setstate__"
                b"c_codecs\nencode\nsbX\x01\x00\x00\x00xb.")
    assert "nor in a layout known here" in refused(path)

# ------------------------------------------------------------------- files of no use

def changed(**values):
    """torchvision's names with some tensors replaced, or left out where the value is None."""
    state = dict(weights())
    for name, value in values.items():
        state[name.replace("__", ".")] = value
    return {name: value for name, value in state.items() if value is not None}

def not_a_state_dict():
    state = weights()
    return [
        ([1, 2], "nor in a layout known here"),
        (torch.zeros(3), "nor in a layout known here"),
        ("text", "nor in a layout known here"),
        ({}, "nor in a layout known here"),
        (FLAGS, "nor in a layout known here"),
        ({"state_dict": 3, "model": [1]}, "nor in a layout known here"),
        ({1: torch.zeros(2), ("a", "b"): 3, None: None}, "nor in a layout known here"),
        ({"features.0.weight": torch.zeros(3)}, "nor in a layout known here"),
        ({"0.weight": torch.zeros(3)}, "no ResNet known here"),
        ({"conv1.weight": torch.tensor(3.0)}, "no ResNet known here"),
        ({"encoder.l_to_ab.conv1.weight": state["conv1.weight"], "encoder.ab_to_l.": 3},
         "nor in a layout known here"),
        ({name: value for name, value in state.items() if not name.startswith("layer4")},
         "no ResNet known here"),
    ]

def wrong_tensors():
    weight = torch.zeros(8, 3, 7, 7)
    infinite = torch.full((64,), float("inf"))
    return [
        (changed(conv1__weight="text"), "nor in a layout known here"),
        (changed(conv1__weight=weight.to_sparse()), "nor in a layout known here"),
        (changed(conv1__weight=weight.to("meta")), "nor in a layout known here"),
        (changed(conv1__weight=weight.to(torch.complex64)), "nor in a layout known here"),
        (changed(conv1__weight=torch.zeros(8, 3, 5, 5)), "no ResNet known here"),
        (changed(conv1__weight=torch.zeros(0, 3, 7, 7)), "does not fit resnet10x0.125"),
        (changed(conv1__weight=torch.zeros(8, 1, 7, 7)), "does not fit resnet10x0.125"),
        (changed(conv1__weight=weight.long()), "does not fit resnet10x0.125"),
        (changed(layer1__0__conv1__weight=torch.zeros(0, 8, 3, 3)), "does not fit resnet10x0"),
        (changed(layer2__0__conv1__weight=torch.zeros(3, 3)), "does not fit resnet10x0.125"),
        (changed(layer3__0__bn2__bias=None), "layer3.0.bn2.bias"),
        (changed(layer3__0__bn2__running_mean=None), "layer3.0.bn2.running_mean"),
        (changed(layer3__0__bn2__running_mean=7), "layer3.0.bn2.running_mean"),
        (changed(layer3__0__other=torch.zeros(2)), "layer3.0.other"),
        (changed(bn1__bias=torch.full((8,), float("nan"))), "bn1.bias is not a tensor of finite"),
        (changed(layer4__0__bn2__running_var=infinite), "layer4.0.bn2.running_var is not"),
        (changed(bn1__bias=torch.full((8,), 1e300, dtype=torch.double)), "bn1.bias is not"),
    ]

@pytest.mark.parametrize("content,words", not_a_state_dict() + wrong_tensors())
def test_files_of_no_use(content, words, tmp_path):
    assert words in refused(save(tmp_path / "theirs.pth", content))

@pytest.mark.parametrize("name", [
    "module.base_encoder.cls_token", "backbone.blocks.0.attn.qkv.weight", "patch_embed.proj.weight",
    "encoder.layers.encoder_layer_0.self_attention.in_proj_weight", "class_token"])
def test_a_vision_transformer_is_called_one(name, tmp_path):
    path = save(tmp_path / "vit.pth", dict(state_dict={name: torch.zeros(3)}))
    assert "a vision transformer, no ResNet" in refused(path)

def test_names_from_a_file_are_printed_on_one_line(tmp_path, capsys):
    state = weights()
    names = [f"evil\n\x1b[31m{i}." for i in range(100)]
    path = save(tmp_path / "theirs.pth", {**state, **dict.fromkeys(names, torch.zeros(1))})
    checkpoints.read(path)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "\x1b" not in said and len(said) < 1000
    refused(save(tmp_path / "theirs.pth", {**state, "layer1.0.\n\x1bx": torch.zeros(1)}))

@pytest.mark.parametrize("content", [b"", b"\x80", b"text", b"PK\x03\x04", bytes(1000)])
def test_a_file_that_torch_did_not_write(content, tmp_path):
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    refused(path)

@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_a_file_that_was_cut_off(fraction, legacy, tmp_path):
    path = save(tmp_path / "cut.pth", moco(weights()),
                _use_new_zipfile_serialization=not legacy)
    path.write_bytes(path.read_bytes()[:int(fraction * path.stat().st_size)])
    refused(path)

def test_a_file_that_is_not_there(tmp_path):
    assert "no such file" in refused(tmp_path / "nowhere.pth")

# ------------------------------------------------------------------- safetensors

def test_safetensors_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"something")
    assert "pip install safetensors" in refused(path)

def test_safetensors_with_its_package(tmp_path, monkeypatch):
    """The package itself is not among our requirements: something else stands for it."""
    state = network().state_dict()

    def load_file(path):
        if path.read_bytes() != b"weights":
            raise RuntimeError("HeaderTooSmall")
        return state

    package = types.ModuleType("safetensors.torch")
    package.load_file = load_file
    monkeypatch.setitem(sys.modules, "safetensors", types.ModuleType("safetensors"))
    monkeypatch.setitem(sys.modules, "safetensors.torch", package)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    assert checkpoints.read(path)["encoder"].keys() == state.keys()
    path.write_bytes(b"")
    assert "HeaderTooSmall" in refused(path)

# ------------------------------------------------------------------- checkpoints of ours

def own(**changes):
    encoder = network()
    content = dict(
        method="simclr", args=dict(data="shapes"), epoch=1, step=2, encoder=encoder.state_dict(),
        encoder_config=encoder.config, model={}, optimizer={},
        input=dict(size=32, mean=[0.0] * 3, std=[1.0] * 3, interpolation="bicubic"))
    return dict(content, **changes)

@pytest.mark.parametrize("method", ["simclr", "supcon"])
def test_a_checkpoint_of_ours(method, tmp_path, capsys):
    path = save(tmp_path / "checkpoint.pt", own(method=method))
    for where in (path, tmp_path, str(tmp_path)):       # the file, or the run's folder
        checkpoint = checkpoints.read(where)
        assert checkpoint["method"] == method and checkpoint["args"] == dict(data="shapes")
        assert checkpoint["supervised"] == (method == "supcon")
    assert capsys.readouterr().err == ""
    x = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(build(checkpoint)(x), network()(x))

@pytest.mark.parametrize("changes", [
    dict(encoder=3), dict(args=None), dict(encoder={"conv1.weight": 3}), dict(input={}),
    dict(encoder={3: torch.tensor(float("nan"))}), dict(method=["simclr"]),
    dict(encoder={"conv1.weight": torch.ones(8, 3, 7, 7, dtype=torch.int64)}),
    dict(encoder={3: torch.zeros(1)}), dict(args=dict(data=["x"])), dict(args=dict(root=5)),
    dict(args=dict(epochs="x")),
    dict(input=dict(size=0, mean=[0.0] * 3, std=[1.0] * 3, interpolation="bicubic")),
    dict(input=dict(size=32, mean=[0.0] * 3, std=[0.0] * 3, interpolation="bicubic")),
    dict(input=dict(size="32", mean=[0.0] * 3, std=[1.0] * 3, interpolation="bicubic")),
    dict(input=dict(size=32, mean=[0.0] * 2, std=[1.0] * 3, interpolation="bicubic")),
    dict(input=dict(size=32, mean=[0.0] * 3, std=3, interpolation="bicubic")),
    dict(input=dict(size=32, mean=[0.0] * 3, std=[1.0] * 3, interpolation=[])),
    *(dict(input=dict(size=64, mean=[0.0] * 3, std=[1.0] * 3, interpolation="bicubic", fraction=f))
      for f in ("0.5", None, -1, 0, 2.0, float("nan")))])
def test_a_checkpoint_of_ours_with_fields_of_no_use(changes, tmp_path):
    refused(save(tmp_path / "checkpoint.pt", own(**changes)))

def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "checkpoint.pt")
    assert "a pipe, not a file" in refused(tmp_path)

def test_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(common.UserError, match="checkpoint.pt: no such file"):
        checkpoints.read(tmp_path)

@pytest.mark.parametrize("options", [dict(padding="same"), dict(view="lab")])
def test_options_for_other_projects_alone(options, tmp_path):
    path = save(tmp_path / "checkpoint.pt", own())
    assert "only for files of other projects" in refused(path, **options)
