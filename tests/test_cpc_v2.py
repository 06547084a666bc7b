"""cpc_v2.py: the operations on patches against torchvision and Pillow, the ResNet against a slow
one, who sees what in each direction, the loss against its equation, and the order of a step."""
import functools
import math
import resource

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import nn
from torchvision.transforms.v2 import functional as TF

import common
import cpc_v2
from conftest import logged, mistake, tiny, train, two_processes, watch

SMALL = [*tiny("cpc_v2"), "--batch-size", "20"]         # 3 x 3 patches of 8 pixels, 5 steps
LEVEL = 1 / 255                                         # one of 256 grey levels

def pictures(n=6, height=32, width=32):
    """Smooth coloured images, (n, 3, height, width) in 0..1."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 3, 5, 5, generator=generator)
    return F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)

# ------------------------------------------------------------------- loss

def cpc_loss_by_loops(predictions, targets, offset):
    """The objective as it is written, one place at a time: the loss, and its gradients in the
    predictions and the targets."""
    n, rows, columns, _ = targets.shape
    every = [(b, i, j) for b in range(n) for i in range(rows) for j in range(columns)]
    places = [(b, i, j) for b, i, j in every if i < rows - offset]
    loss = 0.0
    in_predictions = torch.zeros_like(predictions)
    in_targets = torch.zeros_like(targets)
    for b, i, j in places:
        p = predictions[b, i, j]
        weights = [math.exp(p @ targets[place]) for place in every]
        positive = (b, i + offset, j)               # same image, same column, `offset` rows below
        loss -= math.log(math.exp(p @ targets[positive]) / sum(weights)) / len(places)
        for place, weight in zip(every, weights):
            error = (weight / sum(weights) - (place == positive)) / len(places)
            in_predictions[b, i, j] += error * targets[place]
            in_targets[place] += error * p
    return loss, in_predictions, in_targets

CASES = [(1, 2, 1, 1), (2, 6, 6, 3), (3, 5, 4, 2), (2, 3, 5, 1)]

@pytest.mark.parametrize("n,rows,columns,offset", CASES)
def test_loss_and_gradients_equal_the_equation(n, rows, columns, offset):
    torch.manual_seed(n)
    predictions = torch.randn(n, rows - offset, columns, 4, dtype=torch.float64)
    targets = 2 * torch.randn(n, rows, columns, 4, dtype=torch.float64)
    expected, in_predictions, in_targets = cpc_loss_by_loops(predictions, targets, offset)
    predictions.requires_grad_()
    targets.requires_grad_()
    loss = cpc_v2.cpc_loss(predictions, targets, offset)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert (predictions.grad - in_predictions).abs().max() < 1e-12
    assert (targets.grad - in_targets).abs().max() < 1e-12
    single = cpc_v2.cpc_loss(predictions.float(), targets.float(), offset)
    assert single.item() == pytest.approx(expected, rel=1e-5)

@pytest.mark.parametrize("offset", [1, 2, 3, 4, 5])
def test_labels_are_those_of_the_papers_arithmetic(monkeypatch, offset):
    """n is b ((H - k) W) + r, of which the label is b H W + k W + r."""
    calls = watch(monkeypatch, (F, "cross_entropy"))
    cpc_v2.cpc_loss(torch.randn(3, 6 - offset, 4, 8), torch.randn(3, 6, 4, 8), offset)
    (_, (logits, labels), _), = calls
    expected = []
    for n in range(3 * (6 - offset) * 4):
        b, r = divmod(n, (6 - offset) * 4)
        expected.append(b * 6 * 4 + offset * 4 + r)
    assert logits.shape == (len(expected), 3 * 6 * 4) and labels.tolist() == expected

def test_loss_of_known_cases():
    targets = torch.randn(16, 6, 6, 64)
    loss = cpc_v2.cpc_loss(torch.zeros(16, 3, 6, 64), targets, 3)
    assert loss.item() == pytest.approx(math.log(576), rel=1e-6)
    own = torch.eye(8, dtype=torch.float64).view(2, 4, 1, 8)        # a vector for each place
    loss = cpc_v2.cpc_loss(5 * own[:, 2:], own, 2)                  # of which only the true scores
    assert loss.item() == pytest.approx(-5 + math.log(math.exp(5) + 7), rel=1e-12)

def test_two_processes_with_all_negatives_learn_as_one():
    two_processes("cpc_loss")

# ------------------------------------------------------------------- crops and patches

def test_patches_are_the_slices_of_the_image():
    x = torch.rand(2, 3, 260, 260)
    patches = cpc_v2.extract_patches(x, 80, 36)
    assert patches.shape == (2, 6, 6, 3, 80, 80)
    for i in range(6):
        for j in range(6):
            expected = x[:, :, 36 * i:36 * i + 80, 36 * j:36 * j + 80]
            assert torch.equal(patches[:, i, j], expected)
    assert cpc_v2.extract_patches(x[:, :, :63, :90], 16, 8).shape == (2, 6, 10, 3, 16, 16)

def test_crop_is_anywhere_in_the_image():
    torch.manual_seed(0)
    boxes = cpc_v2.RandomCrop(260, 300).boxes(5000, 600, 400)
    top, left, height, width = boxes.unbind(1)
    assert (height == 520).all() and (width == 347).all()       # 260 / 300 of 600 and of 400
    assert top.min() == 0 and top.max() == 80 and abs(top.mean() - 40) < 2
    assert left.min() == 0 and left.max() == 53 and abs(left.mean() - 26.5) < 2

def test_crop_of_an_image_of_the_resized_size_is_a_slice_of_it():
    images = (torch.rand(4, 3, 60, 60) * 255).to(torch.uint8)
    crop = cpc_v2.RandomCrop(52, 60)
    torch.manual_seed(0)
    views = common.crop_and_resize(images, crop)[0]
    torch.manual_seed(0)
    for image, view, box in zip(images, views, crop.boxes(4, 60, 60).int().tolist()):
        top, left, height, width = box
        assert (height, width) == (52, 52)
        expected = image[:, top:top + 52, left:left + 52] / 255
        assert (view - expected).abs().max() < 1e-5
    assert common.crop_one(images[0], crop)[0].shape == (3, 52, 52)

def test_central_crop_is_the_middle():
    boxes = cpc_v2.RandomCrop(260, 300, central=True).boxes(3, 600, 400)
    assert boxes.tolist() == [[40, 27, 520, 347]] * 3
    (top, left, height, width), = cpc_v2.RandomCrop(48, 56, central=True).boxes(1, 33, 32).tolist()
    assert (height, width) == (28, 27)
    assert abs(2 * top - (33 - 28)) <= 1 and abs(2 * left - (32 - 27)) <= 1     # to half a pixel

def width_and_height(image):
    """Of what is dark in the image."""
    dark = image.mean(0) < 0.5
    return dark.any(0).sum().item(), dark.any(1).sum().item()

def test_geometry_of_the_test_is_that_of_training():
    """A circle in an image that is no square comes out with the same shape in both: squashed."""
    y, x = torch.meshgrid(torch.arange(90.0), torch.arange(120.0), indexing="ij")
    circle = (y - 45) ** 2 + (x - 60) ** 2 > 20 ** 2
    image = circle.float().expand(1, 3, 90, 120)
    central = common.crop_and_resize(image, cpc_v2.RandomCrop(52, 60, central=True))[0, 0]
    width, height = width_and_height(central)
    assert height / width == pytest.approx(120 / 90, abs=0.1)
    assert height == pytest.approx(40 * 60 / 90, abs=1.5)
    torch.manual_seed(0)
    for view in common.crop_and_resize(image.expand(20, 3, 90, 120), cpc_v2.RandomCrop(52, 60))[0]:
        found = width_and_height(view)
        assert abs(found[0] - width) <= 1 and abs(found[1] - height) <= 1

# ------------------------------------------------------------------- operations on patches

def primitive(name, x, strength):
    """An operation of AutoAugment on a batch, with one strength for all."""
    operation, _, _ = cpc_v2.PRIMITIVES[name]
    return operation(x.clone(), torch.full((len(x), 1, 1, 1), float(strength)))

def shifted(translate=(0, 0), angle=0, shear=(0, 0)):
    """torchvision's affine transform, bilinear, grey outside."""
    return functools.partial(TF.affine, angle=angle, translate=translate, scale=1, shear=shear,
                             interpolation=TF.InterpolationMode.BILINEAR, fill=0.5)

@pytest.mark.parametrize("name,strength,reference", [
    ("shear x", 0.3, shifted(shear=[math.degrees(math.atan(0.3)), 0])),
    ("shear y", -0.2, shifted(shear=[0, -math.degrees(math.atan(0.2))])),
    ("translate x", 0.25, shifted(translate=[-4, 0])),
    ("translate y", 0.125, shifted(translate=[0, -2])),
    ("rotate", math.pi / 9, shifted(angle=-20))])
def test_geometric_primitives_equal_torchvision(name, strength, reference):
    x = pictures() * 0.8 + 0.1
    found = primitive(name, x, strength)
    expected = reference(x)
    different = ((found - expected).abs() > 2 * LEVEL).any(1).float()
    assert different[:, 8:24, 8:24].max() == 0
    assert different.mean() < 0.08              # the seam to the grey, which torchvision mixes not
    found_gray, expected_gray = ((y[:, :, ::31, ::31] == 0.5).all(1) for y in (found, expected))
    assert torch.equal(found_gray, expected_gray)       # of the corners

def pillow(x, change):
    """`change` of each image as Pillow's, for comparison."""
    changed = []
    for image in x:
        pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        result = np.array(change(Image.fromarray(pixels)))
        changed.append(torch.from_numpy(result).permute(2, 0, 1) / 255)
    return torch.stack(changed)

def enhanced(kind, factor):
    return lambda image: kind(image).enhance(factor)

@pytest.mark.parametrize("name,strength,change", [
    ("auto-contrast", 0, ImageOps.autocontrast),
    ("invert", 0, ImageOps.invert),
    ("equalize", 0, ImageOps.equalize),
    ("solarize", 100 / 255, lambda image: ImageOps.solarize(image, 100)),
    ("posterize", 3.5, lambda image: ImageOps.posterize(image, 5)),
    ("contrast", 1.6, enhanced(ImageEnhance.Contrast, 1.6)),
    ("color", 0.3, enhanced(ImageEnhance.Color, 0.3)),
    ("brightness", 1.5, enhanced(ImageEnhance.Brightness, 1.5)),
    ("sharpness", 1.9, enhanced(ImageEnhance.Sharpness, 1.9)),
    ("sharpness", 0.1, enhanced(ImageEnhance.Sharpness, 0.1))])
def test_primitives_equal_pillow(name, strength, change):
    x = pictures()
    x[1] = 0.2 + 0.4 * x[1]                             # of little contrast
    x[2, 1] = 0.4                                       # a channel without any
    x = (x * 255).round() / 255
    assert (primitive(name, x, strength) - pillow(x, change)).abs().max() <= 3 * LEVEL

@pytest.mark.parametrize("name", cpc_v2.PRIMITIVES)
def test_primitives_keep_the_form_and_the_range(name):
    operation, low, high = cpc_v2.PRIMITIVES[name]
    x = pictures(5)
    before = x.clone()
    y = operation(x, torch.linspace(low, high, 5)[:, None, None, None])
    assert y.shape == x.shape and y.min() >= 0 and y.max() <= 1 and torch.equal(x, before)
    assert operation(x[:0], torch.zeros(0, 1, 1, 1)).shape == (0, 3, 32, 32)    # drawn for none

def test_primitives_are_drawn_for_each_image():
    torch.manual_seed(0)
    x = pictures(1, 16, 16).expand(2000, 3, 16, 16)
    y = cpc_v2.autoaugment_primitives(x, count=1)
    assert len(y.flatten(1).unique(dim=0)) > 1300       # of each kind and strength
    inverted = ((y - (1 - x)).abs() < 1e-6).flatten(1).all(1)
    assert 0.05 < inverted.float().mean() < 0.1         # 1 of 14, and solarisation near 0

def test_each_image_gets_its_own_result_back():
    """Flat images of different grey, which contrast and sharpness leave as they are."""
    gray = torch.arange(2000.0)[:, None, None, None] / 2000
    flat = gray.expand(2000, 3, 8, 8).contiguous()
    torch.manual_seed(0)
    moved = cpc_v2.autoaugment_primitives(flat, count=1)
    same = ((moved - flat).abs() < 2e-4).flatten(1).all(1)
    assert same.float().mean() > 0.25                   # 5 of 14: auto-contrast, colour, ...

def test_two_primitives_in_a_row():
    x = pictures(2000, 8, 8)
    torch.manual_seed(0)
    once = cpc_v2.autoaugment_primitives(x, count=1)
    once = cpc_v2.autoaugment_primitives(once, count=1)
    torch.manual_seed(0)
    assert torch.equal(cpc_v2.autoaugment_primitives(x, count=2), once)

def test_warp_equals_torchvisions_elastic():
    x = pictures(4) * 0.8 + 0.1
    torch.manual_seed(0)
    displacement = 0.1 * torch.randn(1, 32, 32, 2)
    same = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]]).expand(4, 2, 3)
    found = cpc_v2.warp(x, same, displacement)
    expected = TF.elastic(x, displacement, TF.InterpolationMode.BILINEAR, 0.5)
    assert (found - expected)[:, :, 8:-8, 8:-8].abs().max() <= 2 * LEVEL

def test_elastic_deformation_is_smooth_and_of_its_strength():
    x = pictures()
    assert (cpc_v2.elastic(x, strength=0.0, shear=0.0) - x).abs().max() < 1e-5
    torch.manual_seed(0)
    ramp = torch.linspace(0, 1, 64).repeat(200, 3, 64, 1)       # says where a pixel came from
    moved = (cpc_v2.elastic(ramp, strength=0.05, shear=0.0) - ramp)[:, 0, 16:48, 16:48]
    assert 0.02 < moved.std() < 0.06
    assert (moved[:, 1:] - moved[:, :-1]).abs().mean() < 0.1 * moved.abs().mean()

def test_elastic_shears():
    torch.manual_seed(0)
    ramp = torch.linspace(0, 1, 64).repeat(200, 3, 64, 1)
    moved = (cpc_v2.elastic(ramp, strength=0.0, shear=0.3) - ramp)[:, 0, :, 32]
    slopes = (moved[:, 40] - moved[:, 24]) / (16 / 63)          # of the columns, by row
    assert -0.3 < slopes.min() < -0.28 and 0.28 < slopes.max() < 0.3

def test_color_curves_equal_numpy():
    x = pictures(8)
    torch.manual_seed(3)
    y = cpc_v2.color_curves(x, strength=0.1, knots=5)
    torch.manual_seed(3)
    offsets = (0.1 * torch.randn(5, 8, 3)).numpy()
    knots = np.linspace(0, 1, 5)
    for i in range(8):
        for c in range(3):
            expected = np.interp(x[i, c].numpy(), knots, knots + offsets[:, i, c]).clip(0, 1)
            assert np.abs(y[i, c].numpy() - expected).max() < 1e-5

@pytest.mark.parametrize("operation", [cpc_v2.elastic, cpc_v2.color_curves,
                                       cpc_v2.autoaugment_primitives])
def test_operations_are_functions_of_the_seed_and_leave_their_input_alone(operation):
    x = pictures(20)
    before = x.clone()
    views = []
    for seed in (1, 1, 2):
        common.seed_all(seed)
        views.append(operation(x))
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])
    assert torch.equal(x, before) and views[0].shape == x.shape
    assert views[0].min() >= 0 and views[0].max() <= 1
    assert operation(x[:0]).shape == (0, 3, 32, 32)

def patch_views(kind):
    """One patch, 400 times, each augmented; and the patch, normalised."""
    images, _, _ = common.draw_shapes(100, 1)
    x = torch.from_numpy(images[:1]).repeat(400, 1, 1, 1) / 255
    before = x.clone()
    views = []
    for _ in range(2):
        common.seed_all(1)
        views.append(cpc_v2.augment(x, kind))
    assert torch.equal(*views) and torch.equal(x, before)
    return views[0], common.normalize(x, cpc_v2.MEAN, cpc_v2.STD)

def test_patches_without_augmentation_are_normalised():
    views, plain = patch_views("none")
    assert torch.equal(views, plain)

def test_every_patch_loses_two_colours_of_its_own():
    views, plain = patch_views("drop")
    kept = (views != 0).flatten(2).any(2)                       # (400, 3)
    assert (kept.sum(1) == 1).all() and kept.float().mean(0).min() > 0.25
    assert torch.equal(views[kept], plain[kept])

def test_every_patch_draws_for_itself():
    views, _ = patch_views("full")
    assert views.isfinite().all() and len(views.flatten(1).unique(dim=0)) > 395
    std = torch.tensor(cpc_v2.STD)[:, None, None]
    mean = torch.tensor(cpc_v2.MEAN)[:, None, None]
    pixels = views * std + mean
    assert pixels.min() > -1e-5 and pixels.max() < 1 + 1e-5
    gray = (pixels.amax(1) - pixels.amin(1)).amax((1, 2)) < 1e-4
    assert 0.15 < gray.float().mean() < 0.4                     # a quarter, and colour at 0.1

# ------------------------------------------------------------------- ResNet, version 2

@pytest.mark.parametrize("arch,bottleneck", [("resnet18x0.125", False), ("resnet50x0.125", True)])
def test_resnet_equals_a_slow_one(arch, bottleneck):
    """He et al. 2016, figure 1b, written out: norm, ReLU, convolution. The first block of a stage
    projects what its first norm and ReLU give."""
    torch.manual_seed(0)
    model = cpc_v2.resnet_v2(arch, stem="small", stages=2)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
        y = F.conv2d(x, model.conv1.weight, padding=1)
        for stage in (1, 2):
            for j, block in enumerate(getattr(model, f"layer{stage}")):
                stride = 2 if stage == 2 and j == 0 else 1
                convs = [m for m in block.branch if isinstance(m, nn.Conv2d)]
                norms = [block.first[0]]
                norms += [m for m in block.branch if isinstance(m, nn.GroupNorm)]
                strides = [1, stride, 1] if bottleneck else [stride, 1]
                sizes = [1, 3, 1] if bottleneck else [3, 3]
                assert [conv.weight.shape[-1] for conv in convs] == sizes
                h = norm_by_hand(y, norms[0]).relu()
                changes = stride == 2 or convs[-1].out_channels != y.shape[1]
                assert (block.shortcut is not None) == changes
                shortcut = F.conv2d(h, block.shortcut.weight, stride=stride) if changes else y
                for i, (conv, step) in enumerate(zip(convs, strides)):
                    h = h if i == 0 else norm_by_hand(h, norms[i]).relu()
                    h = F.conv2d(h, conv.weight, stride=step, padding=sizes[i] // 2)
                y = shortcut + h
        expected = norm_by_hand(y, model.last_bn).relu()
        assert model.maps(x).shape == (2, model.dim, 8, 8)
        assert torch.allclose(model.maps(x), expected, atol=1e-4)
        assert torch.allclose(model(x), expected.mean((2, 3)), atol=1e-4)

def norm_by_hand(x, norm):
    """Layer norm over the channels and places of each image."""
    mean = x.mean((1, 2, 3), keepdim=True)
    var = x.var((1, 2, 3), unbiased=False, keepdim=True)
    y = (x - mean) / (var + norm.eps).sqrt()
    return y * norm.weight[:, None, None] + norm.bias[:, None, None]

def test_config_builds_the_network_again():
    for norm in ("layer", "batch"):
        model = cpc_v2.resnet_v2("resnet10x0.125", norm, "small", stages=2)
        config = dict(model.config)
        assert config.pop("version") == 2
        again = cpc_v2.resnet_v2(**config)
        again.load_state_dict(model.state_dict(), strict=True)
        assert any("running" in key for key in model.state_dict()) == (norm == "batch")
        assert not hasattr(model, "layer3")

def millions(module):
    return sum(weight.numel() for weight in module.parameters()) / 1e6

def test_resnet161_is_the_papers():
    with torch.device("meta"):
        model = cpc_v2.resnet_v2("resnet161")
    blocks = [getattr(model, f"layer{i}") for i in (1, 2, 3)]
    assert [len(stage) for stage in blocks] == [3, 4, 46] and not hasattr(model, "layer4")
    widths = [(stage[1].branch[0].out_channels, stage[1].branch[-1].out_channels)
              for stage in blocks]
    assert widths == [(64, 256), (128, 512), (512, 4096)] and model.dim == 4096
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    shortcuts = [block for stage in blocks for block in stage if block.shortcut is not None]
    assert len(convolutions) - len(shortcuts) == 160    # and a linear layer: 161
    assert millions(model) == pytest.approx(303.64, abs=0.005)

def test_strides_of_resnet161_are_16_in_all():
    """By the same stages of few channels: 224 pixels give 14 x 14 places, 80 give 5 x 5."""
    model = cpc_v2.resnet_v2("resnet50x0.125")
    with torch.no_grad():
        assert model.maps(torch.zeros(1, 3, 224, 224)).shape == (1, model.dim, 14, 14)
        assert model.maps(torch.zeros(1, 3, 80, 80)).shape == (1, model.dim, 5, 5)

@pytest.mark.parametrize("options,message", [
    (dict(arch="resnet51"), "resnet10, resnet18, .*resnet161"),
    (dict(norm="group"), "norm 'group'"),
    (dict(stem="large"), "stem 'large'"),
    (dict(stages=5), "--stages 5: resnet18 has 4"),
    (dict(arch="resnet161", stages=4), "--stages 4: resnet161 has 3")])
def test_resnet_of_unknown_kind_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        cpc_v2.resnet_v2(**{"arch": "resnet18", **options})

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_layer_norm_stays_in_the_precision_of_its_input(dtype):
    torch.manual_seed(0)
    norm = cpc_v2.LayerNorm(1, 6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (3 * torch.randn(2, 6, 4, 4) + 1).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    assert y.dtype == dtype
    expected = norm_by_hand(x.double(), norm.double())
    assert (y - expected).abs().max() < (0.1 if dtype == torch.bfloat16 else 1e-4)

def test_layer_norm_is_out_of_reach_of_autocast(monkeypatch):
    """Which on a GPU would make its result float32, though not on a CPU."""
    enabled = []
    group_norm = F.group_norm

    def noting(*args):
        enabled.append(torch.is_autocast_enabled("cpu"))
        return group_norm(*args)

    monkeypatch.setattr(F, "group_norm", noting)
    with torch.autocast("cpu", torch.bfloat16):
        cpc_v2.LayerNorm(1, 6)(torch.randn(2, 6, 4, 4))
    assert enabled == [False]

@pytest.mark.gpu
def test_layer_norm_stays_in_bfloat16_on_a_gpu():
    x = torch.randn(2, 6, 4, 4, device="cuda", dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        assert cpc_v2.LayerNorm(1, 6).cuda()(x).dtype == torch.bfloat16

def test_activations_of_the_encoder_are_bfloat16_under_autocast():
    encoder = cpc_v2.resnet_v2("resnet10x0.125", stem="small", stages=3)
    types = set()
    for module in encoder.modules():
        if isinstance(module, (nn.Conv2d, cpc_v2.LayerNorm, cpc_v2.Block)):
            module.register_forward_hook(lambda _, inputs, output: types.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        encoder(torch.randn(2, 3, 8, 8))
    assert types == {torch.bfloat16}

# ------------------------------------------------------------------- model

def tiny_model(directions=4, offsets=(1, 2), norm="layer", layers=5):
    encoder = cpc_v2.resnet_v2("resnet10x0.125", norm, "small", stages=3)
    return cpc_v2.CPC(encoder, directions, list(offsets), 8, layers, 8, 0.1)

def test_heads_are_the_papers():
    """Appendix A for latents of 4096 numbers; with the 303.64 million of the encoder, one target
    projection and four predictors make 304.95."""
    args = cpc_v2.parse_args(["--recipe", "imagenet"])
    assert (args.directions, args.offsets, args.scale) == (4, [3], 0.1)
    with torch.device("meta"):
        encoder = cpc_v2.resnet_v2("resnet10x8", stem=args.stem, stages=4)
        model = cpc_v2.CPC(encoder, args.directions, args.offsets, args.hidden, args.layers,
                           args.dim, args.scale)
    assert encoder.dim == 4096
    assert millions(model.contexts[0]) == pytest.approx(12.15, abs=0.005)
    heads = millions(model.targets[0]) + millions(model.predictors)
    assert heads == pytest.approx(304.95 - 303.64, abs=0.01)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in [*model.contexts.modules(),
                                                           *model.predictors.modules()])

def test_shapes_of_predictions_and_targets():
    model = tiny_model(offsets=(1, 2), layers=2)
    found = model(torch.randn(2, 4, 4, 3, 8, 8))
    shapes = [(tuple(p.shape), tuple(t.shape), k) for p, t, k in found]
    assert shapes == [((2, 3, 4, 8), (2, 4, 4, 8), 1), ((2, 2, 4, 8), (2, 4, 4, 8), 2)] * 4

def test_predictions_are_scaled_by_a_tenth():
    model = tiny_model(directions=1, offsets=[1], layers=2)
    patches = torch.randn(2, 3, 3, 3, 8, 8)
    small = model(patches)[0][0]
    model.scale = 1.0
    assert torch.allclose(10 * small, model(patches)[0][0], atol=1e-5)

def test_fewer_directions_are_the_first_ones():
    """Down; and up; and left and right."""
    assert [tiny_model(directions=d).turns for d in (1, 2, 4)] == [(0,), (0, 2), (0, 2, 1, 3)]
    assert len(tiny_model(directions=2, offsets=[1])(torch.randn(2, 3, 3, 3, 8, 8))) == 2

def test_predictions_and_targets_are_float32_whatever_the_precision():
    model = tiny_model(layers=2)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(torch.randn(2, 3, 3, 3, 8, 8))
    assert all(p.dtype == t.dtype == torch.float32 for p, t, _ in found)

@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_patches_see_each_other_by_batch_norm_alone(norm):
    torch.manual_seed(0)
    encoder = cpc_v2.resnet_v2("resnet10x0.125", norm, "small")
    patches = torch.randn(2, 2, 2, 3, 8, 8)
    before = cpc_v2.encode(encoder, patches)
    assert before.shape == (2, encoder.dim, 2, 2)
    patches[1, 1, 1] *= 3
    difference = (cpc_v2.encode(encoder, patches) - before).abs().amax(1)       # (2, 2, 2)
    moved = (difference > 1e-4).nonzero().tolist()
    assert (moved == [[1, 1, 1]]) == (norm == "layer") and [1, 1, 1] in moved

DIRECTIONS = ["down", "up", "left", "right"]    # in which CPC predicts, in the order of its turns

def may_see(direction, i, j, r, c):
    """Whether the context at row i and column j may see the patch at row r and column c."""
    return {"down": r <= i, "up": r >= i, "left": c >= j, "right": c <= j}[direction]

@pytest.mark.parametrize("direction", DIRECTIONS)
def test_context_sees_one_side_and_all_of_it(direction):
    """One latent is changed at a time: the contexts that change must be those that may see it."""
    torch.manual_seed(0)
    model = tiny_model()
    turn = model.turns[DIRECTIONS.index(direction)]
    context = model.contexts[DIRECTIONS.index(direction)][:-1]      # the last ReLU hides changes
    z = torch.randn(1, model.encoder.dim, 5, 5)

    def contexts(z):
        return context(z.rot90(turn, (2, 3))).rot90(-turn, (2, 3))

    with torch.no_grad():
        before = contexts(z)
        for r in range(5):
            for c in range(5):
                changed = z.clone()
                changed[0, :, r, c] += torch.randn(z.shape[1])
                moved = (contexts(changed) != before).any(1)[0]
                expected = [[may_see(direction, i, j, r, c) for j in range(5)] for i in range(5)]
                assert moved.tolist() == expected

@pytest.mark.parametrize("direction", DIRECTIONS)
def test_predictions_are_blind_to_what_they_predict(direction):
    """By the gradient: a target depends on one patch, and its prediction on none that is less than
    `offset` steps before it."""
    torch.manual_seed(0)
    model = tiny_model(layers=2)
    patches = torch.randn(1, 4, 4, 3, 8, 8, requires_grad=True)

    def seen(value):
        """The (row, column) of the patches that the value depends on."""
        gradient, = torch.autograd.grad(value.sum(), patches, retain_graph=True)
        return gradient[0].abs().amax((2, 3, 4)).nonzero().tolist()

    def along(place):
        """How far in the direction a place is."""
        row, column = place
        return {"down": row, "up": -row, "left": -column, "right": column}[direction]

    number = DIRECTIONS.index(direction)
    for predictions, targets, offset in model(patches)[2 * number:2 * number + 2]:
        for i, j in [(0, 0), (0, 3), (1, 1), (4 - offset - 1, 2)]:
            target, = seen(targets[0, i + offset, j])
            nearest = max(along(place) for place in seen(predictions[0, i, j]))
            assert nearest == along(target) - offset

def test_average_follows_the_weights():
    torch.manual_seed(0)
    model = tiny_model(norm="batch", layers=2)
    before = {key: value.clone() for key, value in model.average.state_dict().items()}
    model(torch.randn(2, 3, 3, 3, 8, 8))                        # moves the running statistics
    with torch.no_grad():
        for weight in model.encoder.parameters():
            weight.add_(torch.randn_like(weight))
    model.update_average(0.9)
    learned = model.encoder.state_dict()
    for key, value in model.average.state_dict().items():
        expected = 0.9 * before[key] + 0.1 * learned[key]
        if "running" in key or "num_batches" in key:
            expected = learned[key]
        assert torch.allclose(value, expected, atol=1e-6), key
    assert not any(weight.requires_grad for weight in model.average.parameters())

def test_checkpointing_gives_the_same_gradients():
    patches = torch.randn(2, 3, 3, 3, 8, 8)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = tiny_model(layers=2)
        if checkpointing:
            cpc_v2.recompute_blocks(model.encoder)
        sum(cpc_v2.cpc_loss(*found) for found in model(patches)).backward()
        gradients.append({key: weight.grad for key, weight in model.named_parameters()
                          if weight.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][key], atol=1e-6), key

def test_checkpointing_runs_every_block_twice():
    model = tiny_model(layers=2)
    cpc_v2.recompute_blocks(model.encoder)
    runs = []
    blocks = [module for module in model.encoder.modules() if isinstance(module, cpc_v2.Block)]
    for block in blocks:
        block.first.register_forward_hook(lambda module, *_: runs.append(module))
    found = model(torch.randn(2, 3, 3, 3, 8, 8))
    assert runs == [block.first for block in blocks]
    sum(cpc_v2.cpc_loss(*each) for each in found).backward()
    assert runs[len(blocks):] == [block.first for block in blocks[::-1]]

# ------------------------------------------------------------------- training

def test_order_of_a_step(few_images, tmp_path, monkeypatch):
    """Clip, then Adam, then the average of the weights."""
    calls = watch(monkeypatch, (cpc_v2.CPC, "forward"), (cpc_v2, "cpc_loss"),
                  (torch.nn.utils, "clip_grad_norm_"), (torch.optim.Adam, "step"),
                  (cpc_v2.CPC, "update_average"), (common.Run, "finish_step"))
    train(cpc_v2, *SMALL, "--output", tmp_path)
    step = ["forward", *["cpc_loss"] * 8, "clip_grad_norm_", "step", "update_average",
            "finish_step"]
    assert [name for name, _, _ in calls] == step * 5
    found = calls[0][2]
    losses = [result.item() for _, _, result in calls[1:9]]
    assert all(call[1][0] is predictions and call[1][2] == offset
               for call, (predictions, _, offset) in zip(calls[1:9], found))
    loss = calls[12][1][1].item()
    assert loss == pytest.approx(sum(losses) / 4, rel=1e-6)     # a mean over the directions
    assert loss == pytest.approx(2 * math.log(20 * 9), abs=0.5)         # a sum over two offsets

def test_average_of_the_weights_is_what_is_kept(few_images, tmp_path):
    train(cpc_v2, *SMALL, "--clip", "0.001", "--ema-momentum", "0.8", "--output", tmp_path)
    saved = common.read_checkpoint(tmp_path / "checkpoint.pt")
    for key, value in saved["encoder"].items():
        assert torch.equal(value, saved["model"][f"average.{key}"])
    assert not torch.equal(saved["encoder"]["conv1.weight"], saved["model"]["encoder.conv1.weight"])
    group, = saved["optimizer"]["param_groups"]
    assert group["betas"] == (0.8, 0.999) and group["eps"] == 1e-8 and group["weight_decay"] == 0
    moments = [state["exp_avg"] for state in saved["optimizer"]["state"].values()]
    norm = torch.stack([moment.norm() for moment in moments]).norm()
    assert 0 < norm <= 0.001                    # running means of gradients of at most that norm
    assert len(logged(tmp_path, "loss")) > 0

def test_batch_norm_is_never_checkpointed(few_images, tmp_path, monkeypatch):
    """It would move the running statistics twice."""
    recipe = dict(cpc_v2.SHAPES, checkpointing=True)
    monkeypatch.setitem(cpc_v2.RECIPES, "shapes", recipe)
    calls = watch(monkeypatch, (cpc_v2, "recompute_blocks"))
    fast = [*SMALL, "--batch-size", "50", "--directions", "1", "--patch-augment", "none"]
    train(cpc_v2, *fast, "--norm", "batch", "--output", tmp_path / "batch")
    assert not calls
    train(cpc_v2, *fast, "--output", tmp_path / "layer")
    assert len(calls) == 1

def test_rate_is_constant_after_the_warm_up():
    assert [cpc_v2.learning_rate(step, 0, 9) for step in range(3)] == [1, 1, 1]
    assert [cpc_v2.learning_rate(step, 2, 9) for step in range(4)] == [0, 0.5, 1, 1]

@pytest.mark.parametrize("flags,message", [
    (["--offsets", "0"], "--offsets"),
    (["--offsets", "1", "3"], "--offsets 3: there are only 3 rows of patches"),
    (["--patch-size", "17"], "--patch-size 17: expected 3 <="),
    (["--patch-size", "2"], "--patch-size 2: expected 3 <="),
    (["--resize", "15"], "--patch-size 8: expected 3 <="),
    (["--directions", "3"], "--directions"),
    (["--norm", "group"], "--norm"),
    (["--patch-augment", "some"], "--patch-augment"),
    (["--clip", "0"], "--clip"),
    (["--arch", "resnet161", "--stages", "4"], "--stages 4: resnet161 has 3")])
def test_mistakes(few_images, tmp_path, flags, message):
    assert message in mistake(cpc_v2, *tiny("cpc_v2"), *flags, "--output", tmp_path)

@pytest.mark.slow
@pytest.mark.huge
def test_a_step_of_the_full_size_model():
    """ResNet-161 on two images: `pytest -s -m huge` says how much memory it takes."""
    args = cpc_v2.parse_args(["--recipe", "imagenet"])
    torch.manual_seed(0)
    encoder = cpc_v2.resnet_v2(args.arch, args.norm, args.stem, args.stages)
    model = cpc_v2.CPC(encoder, args.directions, args.offsets, args.hidden, args.layers, args.dim,
                       args.scale)
    cpc_v2.recompute_blocks(model.encoder)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=4e-4, betas=(0.8, 0.999))
    patches = cpc_v2.extract_patches(torch.rand(2, 3, 260, 260), args.patch_size, args.stride)
    patches = cpc_v2.augment(patches.flatten(0, 2), "full").view(patches.shape)
    found = model(patches)
    shapes = [(tuple(p.shape), tuple(t.shape), k) for p, t, k in found]
    assert shapes == [((2, 3, 6, 64), (2, 6, 6, 64), 3)] * 4
    loss = sum(cpc_v2.cpc_loss(*each) for each in found) / 4
    loss.backward()
    torch.nn.utils.clip_grad_norm_(weights, args.clip)
    optimizer.step()
    model.update_average(args.ema_momentum)
    assert loss.item() == pytest.approx(math.log(72), abs=1)
    assert all(weight.isfinite().all() for weight in weights)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20:.1f} GiB")
