"""common.py: every operation against torchvision or a slow reference, the data, the networks, the optimiser, the files."""
import functools, hashlib, itertools, math, os, pickle, shutil, time

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms.v2 import functional as TF

import common

LEVEL = 1 / 255


def pictures(n=6, height=32, width=32, seed=0):
    """Smooth coloured images with edges, (n, 3, height, width) float in 0..1."""
    g = torch.Generator().manual_seed(seed)
    low = torch.rand(n, 3, 5, 5, generator=g)
    return torch.nn.functional.interpolate(low, (height, width), mode="bicubic").clamp(0, 1)


# ---------------------------------------------------------------- shapes

def test_shapes_are_the_same_everywhere():
    images, labels, boxes = common.draw_shapes(300, seed=1)
    assert images.shape == (300, 3, 32, 32) and images.dtype == np.uint8
    digest = hashlib.sha256(labels.astype("<i8").tobytes() + boxes.astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "3035b845e97774a5"
    assert np.abs(images[:4].astype(int).sum((1, 2, 3)) - np.array([139657, 245638, 286576, 143922])).max() <= 3072
    again, _, _ = common.draw_shapes.__wrapped__(300, seed=1)      # not conftest's cached ones
    assert (images == again).all()
    assert (common.draw_shapes(300, seed=2)[0] != images).any()


def test_shapes_are_balanced_quick_and_boxed():
    start = time.time()
    images, labels, boxes = common.draw_shapes(5000, seed=1)
    common.draw_shapes(2000, seed=2)
    assert time.time() - start < 10
    assert (np.bincount(labels[:, 0], minlength=10) == 500).all()
    x0, y0, x1, y1 = boxes[:, 0].T
    assert (x0 >= 0).all() and (y0 >= 0).all() and (x1 <= 32).all() and (y1 <= 32).all()
    assert ((x1 - x0) >= 10).all()
    disc = labels[:, 0] == 0
    assert np.abs((x1 - x0) - (y1 - y0))[disc].max() <= 1
    bar = labels[:, 0] == common.SHAPES.index("bar")
    assert ((x1 - x0) > (y1 - y0))[bar].all()


def test_box_of_a_disc_holds_what_differs_from_the_background():
    images, labels, boxes = common.draw_shapes(2000, seed=5)
    gray = images.mean(1)
    right = 0
    for i in np.flatnonzero(labels[:, 0] == 0):
        x0, y0, x1, y1 = boxes[i, 0]
        inside, cy, cx = gray[i, y0:y1, x0:x1], (y0 + y1) // 2, (x0 + x1) // 2
        outside = np.concatenate([gray[i, y0:y0 + 2, x0:x0 + 2].ravel(), gray[i, y1 - 2:y1, x1 - 2:x1].ravel()])      # corners of the box
        right += abs(gray[i, cy - 1:cy + 2, cx - 1:cx + 2].mean() - outside.mean()) > inside.std() / 2
    assert right > 0.9 * (labels[:, 0] == 0).sum()


def test_scenes_hold_one_to_four_objects_in_their_cells():
    images, labels, boxes = common.draw_shapes(200, seed=3, size=96, cells=2)
    assert images.shape == (200, 3, 96, 96) and labels.shape == (200, 4) and boxes.shape == (200, 4, 4)
    present = labels >= 0
    assert set(present.sum(1)) == {1, 2, 3, 4}
    assert (boxes[~present] == 0).all()
    for place in range(4):
        x, y = place % 2 * 48, place // 2 * 48
        b = boxes[:, place][present[:, place]]
        assert (b[:, 0] >= x).all() and (b[:, 2] <= x + 48).all() and (b[:, 1] >= y).all() and (b[:, 3] <= y + 48).all()
        assert (b[:, 2] - b[:, 0] >= 16).all()
    with pytest.raises(ValueError, match="multiple"):
        common.draw_shapes(1, 0, size=33, cells=2)


# ---------------------------------------------------------------- crops

@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [16, 32, 48])
def test_crop_equals_torchvision(mode, size):
    x = pictures(24, 40, 52)
    torch.manual_seed(size)
    crop = common.Crop(1, size, (0.08, 1.0), interpolation=mode)
    boxes = crop.boxes(len(x), 40, 52)
    torch.manual_seed(size)
    ours = common.crop_and_resize(x, crop)[0]
    for image, box, view in zip(x, boxes, ours):
        reference = TF.resized_crop(image, *(int(v) for v in box), [size, size], TF.InterpolationMode(mode), antialias=True).clamp(0, 1)
        assert (view - reference).abs().max() <= 2 * LEVEL


def test_crop_of_a_batch_equals_crop_of_single_images_and_pillow():
    x = (pictures(8, 60, 48) * 255).round().to(torch.uint8)
    crop = common.Crop(1, 32)
    for seed, image in enumerate(x):
        torch.manual_seed(seed)
        single = common.crop_one(image, crop)[0][0]
        torch.manual_seed(seed)
        batched = common.crop_and_resize(image[None], crop)[0, 0]
        torch.manual_seed(seed)
        top, left, height, width = crop.boxes(1, 60, 48)[0].int().tolist()
        pil = Image.fromarray(image.permute(1, 2, 0).numpy()).crop((left, top, left + width, top + height)).resize((32, 32), Image.BILINEAR)
        assert (single / 255 - batched).abs().max() <= 2 * LEVEL
        assert (torch.from_numpy(np.array(pil)).permute(2, 0, 1) / 255 - batched).abs().max() <= 2 * LEVEL


def ks(a, b):
    """Kolmogorov-Smirnov distance of two samples, in units of its 0.1 % critical value."""
    a, b = np.sort(np.asarray(a, float)), np.sort(np.asarray(b, float))
    every = np.concatenate([a, b])
    distance = np.abs(np.searchsorted(a, every, "right") / len(a) - np.searchsorted(b, every, "right") / len(b)).max()
    return distance / (1.95 * math.sqrt((len(a) + len(b)) / (len(a) * len(b))))


@pytest.mark.parametrize("height,width,scale", [(32, 32, (0.08, 1.0)), (20, 60, (0.2, 1.0)), (10, 100, (0.9, 1.0))])
def test_boxes_are_drawn_as_torchvision_draws_them(height, width, scale):
    torch.manual_seed(0)
    ours = common.Crop(1, 32, scale).boxes(3000, height, width).numpy()
    image = torch.zeros(3, height, width)
    theirs = np.array([torchvision.transforms.RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(3000)])
    for column in range(4):
        assert ks(ours[:, column], theirs[:, column]) < 1
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all() and ours.min() >= 0


def test_center_crop_is_the_central_share():
    x = pictures(2, 128, 192)
    view = common.crop_and_resize(x, common.CenterCrop(56))[0]
    reference = TF.center_crop(TF.resize(x, [64], antialias=True), [56])
    assert (view - reference)[..., 1:-1, 1:-1].abs().max() <= 2 * LEVEL
    small = (pictures(2) * 255).to(torch.uint8)
    assert torch.equal(common.crop_and_resize(small, common.CenterCrop(32))[0], small / 255)


def test_flip_of_a_crop_mirrors_half_of_the_images():
    """In the batch and in a worker: with one fixed box, each view is the plain one or its mirror image."""
    image = (pictures(1) * 255).to(torch.uint8)
    whole = functools.partial(common.Crop, 400, 24, (1.0, 1.0), (1.0, 1.0))
    torch.manual_seed(0)
    batch = common.crop_and_resize(image.repeat(400, 1, 1, 1), whole(flip=0.5))[0]
    worker = torch.cat(common.crop_one(image[0], whole(flip=0.5))).float()
    for views, plain in ((batch, common.crop_and_resize(image, whole())[0, 0]), (worker, common.crop_one(image[0], whole())[0][0].float())):
        mirrored, same = ((views - one).abs().flatten(1).amax(1) < 1e-5 for one in (plain.flip(2), plain))
        assert (mirrored ^ same).all() and 150 < mirrored.sum() < 250


# ---------------------------------------------------------------- pixel operations

@pytest.mark.parametrize("value", [0.2, 0.9, 1.0, 1.7])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_jitter_equals_torchvision(name, value):
    x = pictures()
    reference = torch.stack([getattr(TF, f"adjust_{name}")(image, value) for image in x])
    assert (common.color_jitter(x, **{name: (value, value)}, p=1) - reference).abs().max() <= 2 * LEVEL


@pytest.mark.parametrize("shift", [-0.5, -0.2, 0.03, 0.4])
def test_hue_equals_torchvision(shift):
    plain = [pictures(1)[:, :1].expand(1, 3, 32, 32), torch.ones(1, 3, 32, 32), torch.zeros(1, 3, 32, 32)]
    x = torch.cat([pictures(), torch.rand(4, 3, 32, 32), *plain])
    reference = torch.stack([TF.adjust_hue(image, shift) for image in x])
    assert (common.color_jitter(x, hue=(shift, shift), p=1) - reference).abs().max() <= 2 * LEVEL


def test_jitter_draws_for_each_image_and_an_order_for_each_chunk():
    x = pictures(1).repeat(512, 1, 1, 1)
    torch.manual_seed(0)
    y = common.color_jitter(x.clone(), 0.4, 0.4, 0.4, 0.1, p=0.8, chunk=64)
    same = ((y - x).abs() < 1e-5).flatten(1).all(1)
    assert 0.72 < 1 - same.float().mean() < 0.88
    assert len(y[~same].flatten(1).unique(dim=0)) == (~same).sum()
    torch.manual_seed(3)
    a = common.color_jitter(x.clone(), (1.5, 1.5), (0.3, 0.3), (2.0, 2.0), (0.2, 0.2), p=1, chunk=64)
    assert 1 < len(a[::64].flatten(1).unique(dim=0)) <= 8 and torch.equal(a[0], a[63])
    steps = ((TF.adjust_brightness, 1.5), (TF.adjust_contrast, 0.3), (TF.adjust_saturation, 2.0), (TF.adjust_hue, 0.2))
    orders = [functools.reduce(lambda image, step: step[0](image, step[1]), order, x[0]) for order in itertools.permutations(steps)]
    for view in a[::64]:                                        # every chunk is one of the 24 orders
        assert min((view - order).abs().max() for order in orders) <= 2 * LEVEL


def test_flip_gray_solarize_rotate_equal_torchvision():
    x = pictures()
    for image, flipped, gray, solar in zip(x, common.flip(x.clone(), 1), common.grayscale(x.clone(), 1), common.solarize(x.clone(), 1, 0.4)):
        assert torch.equal(flipped, TF.horizontal_flip(image))
        assert (gray - TF.rgb_to_grayscale(image, 3)).abs().max() <= 2 * LEVEL
        assert (solar - TF.solarize(image, 0.4)).abs().max() <= 2 * LEVEL
    torch.manual_seed(0)
    many = pictures(1).repeat(200, 1, 1, 1)
    turned, seen = common.rotate(many.clone()), set()
    for view in turned:
        k = [k for k in range(4) if torch.equal(view, TF.rotate(many[0], 90 * k))]
        assert len(k) == 1
        seen.add(k[0])
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize("sigma,kernel", [(0.1, 3), (0.5, 5), (1.0, 23), (2.0, 23), (2.0, None)])
def test_blur_equals_torchvision(sigma, kernel):
    x = pictures(4, 40, 64)
    reference = TF.gaussian_blur(x, [kernel or 17] * 2, [sigma] * 2)
    assert (common.gaussian_blur(x, 1, (sigma, sigma), kernel) - reference).abs().max() <= 2 * LEVEL


def test_blur_draws_for_each_image():
    x = pictures(1).repeat(400, 1, 1, 1)
    torch.manual_seed(0)
    y = common.gaussian_blur(x.clone(), 0.5)
    same = (y == x).flatten(1).all(1)
    assert 0.4 < same.float().mean() < 0.6
    assert len(y[~same].flatten(1).unique(dim=0)) == (~same).sum()


def test_cutout_sobel_noise():
    x = pictures(300)
    torch.manual_seed(0)
    y = common.cutout(x.clone(), size=0.5, value=2.0)
    holes = (y == 2.0).all(1)
    for image, view, hole in zip(x, y, holes):
        rows, columns = hole.any(1).nonzero()[:, 0], hole.any(0).nonzero()[:, 0]
        reference = TF.erase(image, rows[0], columns[0], len(rows), len(columns), torch.tensor(2.0))
        assert torch.equal(view, reference) and len(rows) <= 17 and len(columns) <= 17
    assert holes.flatten(1).sum(1).max() >= 225 and len({tuple(h.flatten().tolist()) for h in holes}) > 200
    gray = TF.rgb_to_grayscale(x[:1], 1)[0, 0].numpy()
    edges = common.sobel(x[:1])[0]
    for r, c in ((5, 9), (20, 3), (30, 30)):
        w = gray[r - 1:r + 2, c - 1:c + 2]
        gx = (w[0, 0] + 2 * w[1, 0] + w[2, 0] - w[0, 2] - 2 * w[1, 2] - w[2, 2]) / 4
        gy = (w[0, 0] + 2 * w[0, 1] + w[0, 2] - w[2, 0] - 2 * w[2, 1] - w[2, 2]) / 4
        assert abs(edges[:, r, c] - min(1, math.hypot(gx, gy))).max() < 2 * LEVEL
    flat = torch.full((50, 3, 32, 32), 0.5)
    noisy = common.noise(flat, std=0.1)
    assert abs(noisy.std() - 0.1) < 0.01 and abs(noisy.mean() - 0.5) < 0.01 and not torch.equal(noisy[0], noisy[1])


def primitive(name, x, strength):
    """An operation of AutoAugment on a batch, with one strength for all or one for each."""
    return common.PRIMITIVES[name][0](x.clone(), torch.as_tensor(strength, dtype=torch.float32).expand(len(x)).view(-1, 1, 1, 1))


def pillow(x, change):
    """`change` of each Pillow image, for comparison."""
    images = [Image.fromarray((image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()) for image in x]
    return torch.stack([torch.from_numpy(np.array(change(image))).permute(2, 0, 1) for image in images]).float() / 255


@pytest.mark.parametrize("name,strength,reference", [
    ("shear x", 0.3, lambda x: TF.affine(x, 0, [0, 0], 1, [math.degrees(math.atan(0.3)), 0], TF.InterpolationMode.BILINEAR, 0.5)),
    ("shear y", -0.2, lambda x: TF.affine(x, 0, [0, 0], 1, [0, -math.degrees(math.atan(0.2))], TF.InterpolationMode.BILINEAR, 0.5)),
    ("translate x", 0.25, lambda x: TF.affine(x, 0, [-8, 0], 1, [0, 0], TF.InterpolationMode.BILINEAR, 0.5)),
    ("translate y", 0.125, lambda x: TF.affine(x, 0, [0, -4], 1, [0, 0], TF.InterpolationMode.BILINEAR, 0.5)),
    ("rotate", math.pi / 9, lambda x: TF.affine(x, -20, [0, 0], 1, [0, 0], TF.InterpolationMode.BILINEAR, 0.5)),
])
def test_geometric_primitives_equal_torchvision(name, strength, reference):
    x = pictures() * 0.8 + 0.1
    found, expected = primitive(name, x, strength), reference(x)
    different = ((found - expected).abs() > 2 * LEVEL).any(1).float()
    assert different.mean() < 0.08 and different[:, 8:24, 8:24].max() == 0                     # the seam along the filling, which torchvision does not mix
    corners = lambda y: (y[:, :, ::31, ::31] == 0.5).all(1)
    assert torch.equal(corners(found), corners(expected))


@pytest.mark.parametrize("name,strength,change", [
    ("auto-contrast", 0, lambda image: ImageOps.autocontrast(image)),
    ("invert", 0, lambda image: ImageOps.invert(image)),
    ("equalize", 0, lambda image: ImageOps.equalize(image)),
    ("solarize", 100 / 255, lambda image: ImageOps.solarize(image, 100)),
    ("posterize", 3.5, lambda image: ImageOps.posterize(image, 5)),
    ("contrast", 1.6, lambda image: ImageEnhance.Contrast(image).enhance(1.6)),
    ("color", 0.3, lambda image: ImageEnhance.Color(image).enhance(0.3)),
    ("brightness", 1.5, lambda image: ImageEnhance.Brightness(image).enhance(1.5)),
    ("sharpness", 1.9, lambda image: ImageEnhance.Sharpness(image).enhance(1.9)),
    ("sharpness", 0.1, lambda image: ImageEnhance.Sharpness(image).enhance(0.1)),
])
def test_primitives_equal_pillow(name, strength, change):
    x = (pictures() * 255).round() / 255
    x[1] = 0.2 + 0.4 * x[1]
    x[2, 1] = 0.4                                               # a channel without contrast
    x = (x * 255).round() / 255
    assert (primitive(name, x, strength) - pillow(x, change)).abs().max() <= 3 * LEVEL


def test_primitives_are_drawn_for_each_image():
    x = pictures(1).expand(3000, 3, 32, 32)
    torch.manual_seed(0)
    y = common.autoaugment_primitives(x, count=1)
    inverted = ((y - (1 - x)).abs() < 1e-6).flatten(1).all(1)
    assert 0.05 < inverted.float().mean() < 0.1                 # 1 of 14, and solarisation near 0
    black = (y.flatten(1).mean(1) - x[0].mean()).abs() < 1e-6   # unchanged in the mean: nearly none
    assert black.float().mean() < 0.15 and len(y.flatten(1).unique(dim=0)) > 2000
    order = torch.arange(3000.0)[:, None, None, None] / 3000    # every result goes back to its own image
    flat = order.expand(3000, 3, 8, 8).contiguous()
    torch.manual_seed(0)
    moved = common.autoaugment_primitives(flat, count=1)
    same = ((moved - flat).abs() < 2e-4).flatten(1).all(1)
    assert same.float().mean() > 0.25                           # auto-contrast, colour, sharpness, equalise and contrast leave flat images alone
    for name, (f, low, high) in common.PRIMITIVES.items():
        strength = torch.empty(4, 1, 1, 1).uniform_(low, high)
        out = f(x[:4].clone(), strength)
        assert out.shape == x[:4].shape and out.min() >= 0 and out.max() <= 1, name


def test_elastic_deformation_equals_torchvision():
    x = pictures(4) * 0.8 + 0.1
    torch.manual_seed(0)
    displacement = 0.1 * torch.randn(1, 32, 32, 2)
    same = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]]).expand(4, 2, 3)
    found, expected = common.warp(x, same, displacement), TF.elastic(x, displacement, TF.InterpolationMode.BILINEAR, 0.5)
    assert (found - expected)[:, :, 8:-8, 8:-8].abs().max() <= 2 * LEVEL
    assert (common.elastic(x.clone(), p=1, strength=0, shear=0) - x).abs().max() < 1e-5
    ramp = torch.linspace(0, 1, 64).repeat(200, 3, 64, 1)      # its value says where a pixel came from
    moved = common.elastic(ramp.clone(), p=1, strength=0.05, shear=0)[:, 0] - ramp[:, 0]
    middle = moved[:, 16:48, 16:48]
    assert 0.02 < middle.std() < 0.06 and (middle[:, 1:] - middle[:, :-1]).abs().mean() < 0.1 * middle.abs().mean()      # smooth


def test_color_curves_equal_numpy():
    x = pictures(8)
    torch.manual_seed(3)
    y = common.color_curves(x.clone(), p=1, strength=0.1, knots=5)
    torch.manual_seed(3)
    torch.rand(8)                                               # the coins
    offsets = 0.1 * torch.randn(5, 8, 3)
    knots = np.linspace(0, 1, 5)
    for i in range(8):
        for c in range(3):
            expected = np.interp(x[i, c].numpy(), knots, knots + offsets[:, i, c].numpy()).clip(0, 1)
            assert np.abs(y[i, c].numpy() - expected).max() < 1e-5


def test_additive_brightness_is_a_shift():
    x = pictures(300)
    torch.manual_seed(0)
    shift = (common.color_jitter(x.clone(), 0.125, p=1, additive=True) - x).clamp(-1, 1)
    inside = (x > 0.2) & (x < 0.8)
    amounts = [s[i].median().item() for s, i in zip(shift, inside) if i.any()]
    assert -0.126 < min(amounts) < -0.1 and 0.1 < max(amounts) < 0.126
    assert all((s[i] - s[i].median()).abs().max() < 1e-5 for s, i in zip(shift, inside) if i.any())


@pytest.mark.parametrize("operation", [common.flip, common.color_jitter, common.grayscale, common.gaussian_blur, common.solarize, common.cutout,
                                       common.rotate, common.sobel, common.noise, common.elastic, common.color_curves])
def test_operations_work_in_place_and_depend_on_the_seed_only(operation):
    x = pictures(100)
    if operation is common.color_jitter:
        operation = functools.partial(common.color_jitter, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)
    views = []
    for seed in (1, 1, 2):
        common.seed_all(seed)
        crops = x.clone()
        views.append(operation(crops))
        assert views[-1] is crops
    assert torch.equal(views[0], views[1])
    assert views[0].shape == x.shape and views[0].min() >= -1e-6 and views[0].max() <= 1 + 1e-6
    if getattr(operation, "__name__", "") != "sobel":
        assert not torch.equal(views[0], views[2])
    assert torch.equal(operation(x.clone(), p=0.0), x)


# ---------------------------------------------------------------- image mixture

def mixed_views(kind, n=400, **settings):
    """Two views of n flat images, image i of the value i in the one and i + n in the other, mixed."""
    common.seed_all(3)
    views = [torch.arange(n).float()[:, None, None, None].expand(n, 3, size, size) + offset for size, offset in ((16, 0), (8, n))]
    common.mixture(views, kind, **settings)
    return [views[0], views[1] - n]


def test_blends_have_one_partner_and_share_for_all_views():
    x1, x2 = mixed_views("global", count=1, probability=0.3, alpha=2.0)
    assert (x1 == x1[:, :1, :1, :1]).all() and torch.allclose(x1[:, 0, 0, 0], x2[:, 0, 0, 0], atol=1e-3)
    moved = x1[:, 0, 0, 0] - torch.arange(400)
    assert 90 <= (moved != 0).sum() <= 150 and moved.abs().max() < 400        # 120 expected, standard deviation 9
    x1, _ = mixed_views("global", n=2, count=1, probability=1.0)               # one image alone to be blended with: the weights show
    assert 0 < x1[0, 0, 0, 0] < 1 and 0 < x1[1, 0, 0, 0] < 1
    assert ((mixed_views("global")[0][:, 0, 0, 0] - torch.arange(400)) != 0).sum().item() == pytest.approx(400 * (1 - 0.9 ** 2), abs=30)


def test_squares_show_one_other_image_in_its_place():
    x1, x2 = mixed_views("region", count=1, probability=1.0)
    index, shares = torch.arange(400.0)[:, None, None], []
    for x in (x1[:, 0], x2[:, 0]):
        inside = x != index
        rows, columns = inside.any(2), inside.any(1)
        assert torch.equal(inside, rows[:, :, None] & columns[:, None])        # a rectangle, clipped or not
        other = [x[i][inside[i]].unique() for i in range(400)]
        assert all(len(v) <= 1 for v in other)
        shares.append(inside.float().mean((1, 2)))
    assert (shares[0] - shares[1]).abs().mean() < 0.06                         # the same square at another size
    assert shares[0].mean().item() == pytest.approx(0.321, abs=0.04)           # of a side s, s^2 uniform, clipping leaves s - s^2 / 4
    dark = mixed_views("region", count=2, probability=1.0, decay=0.0)[0][:, 0]
    assert ((dark == 0).flatten(1).any(1)[1:]).float().mean() > 0.9            # what no square covers
    assert torch.equal(mixed_views("none")[0], mixed_views("unmix", probability=1.0)[0])
    both, blends = (mixed_views(kind, count=1, probability=1.0)[0][:, 0] for kind in ("both", "global"))
    assert (both == both[:, :1, :1]).all((1, 2)).float().mean() < 0.2 and (blends == blends[:, :1, :1]).all()


def test_mixture_is_a_function_of_the_seed():
    assert all(torch.equal(a, b) for a, b in zip(mixed_views("both"), mixed_views("both")))
    one = [torch.ones(1, 3, 4, 4)]
    common.mixture(one, "both", probability=1.0)                               # with nobody else: itself
    assert torch.allclose(one[0], torch.ones(1))


@pytest.mark.parametrize("global_share", [0.0, 1.0])
@pytest.mark.parametrize("n", [6, 5])
def test_unmix_says_what_share_of_each_image_is_left(global_share, n):
    x = torch.randn(n, 3, 16, 16)
    for seed in range(5):
        common.seed_all(seed)
        mixed, share = common.unmix(x, global_share)
        assert 0 <= share <= 1 and mixed is not x
        if global_share:
            assert torch.allclose(mixed, share * x + (1 - share) * x.flip(0), atol=1e-6)
        else:
            own = (mixed == x) & (x != x.flip(0))
            assert ((mixed == x) | (mixed == x.flip(0))).all()
            assert own[0].float().mean().item() == pytest.approx(share, abs=1e-6)
    kinds = [torch.equal(m, x.flip(0).lerp(x, s)) for m, s in (common.unmix(x, 0.5) for _ in range(100))]
    assert 30 <= sum(kinds) <= 70


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_views_on_a_gpu_are_those_of_the_cpu():
    import simclr
    x = (pictures(128) * 255).to(torch.uint8)
    views = []
    for device in ("cpu", "cuda"):
        common.seed_all(1)
        crops = common.Images(x, None, device).crop(torch.arange(128), [common.Crop(1, 32)], 5)[0][0]
        common.seed_all(2)
        views.append(common.gaussian_blur(common.grayscale(common.flip(crops))).cpu())
        assert simclr.augment(crops, 1.0, 0.5).device.type == device
    assert (views[0] - views[1]).abs().max() < 2 * LEVEL


def test_augmented_batches_have_the_distribution_of_the_pillow_pipeline():
    """Per-view statistics of 2,000 views, ours against torchvision's transforms on Pillow images."""
    import simclr
    from torchvision import transforms as T
    images = common.draw_shapes(2000, seed=7)[0]
    pipeline = T.Compose([T.RandomResizedCrop(32, (0.2, 1.0)), T.RandomHorizontalFlip(), T.RandomApply([T.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
                          T.RandomGrayscale(p=0.2), T.ToTensor()])
    torch.manual_seed(0)
    theirs = torch.stack([pipeline(Image.fromarray(i.transpose(1, 2, 0))) for i in images])
    crops = common.crop_and_resize(torch.from_numpy(images), common.Crop(1, 32, (0.2, 1.0), flip=0.5))[0]
    ours = simclr.augment(crops, 1.0, 0.0)

    def statistics(x):
        chroma = (x.max(1).values - x.min(1).values).mean((1, 2))
        gray = x.mean(1)
        energy = (gray.diff(dim=1).abs().mean((1, 2)) + gray.diff(dim=2).abs().mean((1, 2)))
        return [*x.mean((2, 3)).T, *x.std((2, 3)).T, chroma, energy, gray[:, :, :16].mean((1, 2)) - gray[:, :, 16:].mean((1, 2))]

    distances = [ks(a, b) for a, b in zip(statistics(ours), statistics(theirs))]
    assert max(distances) < 1, distances
    weaker = simclr.augment(crops, 0.5, 0.0)                    # the test sees a wrong strength
    assert max(ks(a, b) for a, b in zip(statistics(weaker), statistics(theirs))) > 1


# ---------------------------------------------------------------- batches

def test_batches_are_a_function_of_seed_step_and_process(monkeypatch):
    data = common.Images(*[torch.randint(0, 256, (100, 3, 8, 8), dtype=torch.uint8)], None, "cpu")
    make = lambda seed=0: common.Batches(data, [common.Crop(2, 8)], 32, seed)
    batches = make()
    assert len(batches) == 3
    epoch = torch.cat([batches[s][1] for s in range(3)])
    assert len(epoch.unique()) == 96 and not torch.equal(epoch, torch.cat([batches[s][1] for s in range(3, 6)]))
    other = make()
    views, indices, broken = other[4]                           # without the steps before
    assert broken == [] and torch.equal(indices, batches[4][1]) and all(torch.equal(a, b) for a, b in zip(views, batches[4][0]))
    assert not torch.equal(views[0], views[1])
    assert not torch.equal(make(seed=1)[0][1], batches[0][1])
    monkeypatch.setenv("WORLD_SIZE", "2")
    halves = []
    for r in ("0", "1"):
        monkeypatch.setenv("RANK", r)
        halves.append(make()[4])
    assert torch.equal(torch.cat([h[1] for h in halves]), indices)
    assert not torch.equal(halves[0][0][0], halves[1][0][0])


def test_batches_refuse_a_batch_that_cannot_be(monkeypatch):
    data = common.Images(torch.zeros(10, 3, 8, 8, dtype=torch.uint8), None, "cpu")
    with pytest.raises(common.UserError, match="larger than the data set of 10"):
        common.Batches(data, [], 11, 0)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(common.UserError, match="does not divide by the 3"):
        common.Batches(data, [], 10, 0)


# ---------------------------------------------------------------- folders

@pytest.fixture
def folder(tmp_path):
    """train and val with two classes of 64x48 pictures, in every kind of file."""
    rgb = (pictures(1, 48, 64)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    image = Image.fromarray(rgb)
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6                                            # shown turned clockwise by 90 degrees
    files = {"train/a/plain.png": image, "train/a/photo.JPG": image, "train/a/web.webp": image, "train/a/turned.jpeg": image.rotate(90, expand=True),
             "train/a/turned.webp": image.rotate(90, expand=True),
             "train/b/cmyk.jpg": image.convert("CMYK"), "train/b/palette.png": image.convert("P", palette=Image.ADAPTIVE, colors=256),
             "train/b/gray.png": image.convert("L"), "train/b/alpha.png": image.convert("RGBA"), "train/b/gray16.png":
             Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "val/a/x.bmp": image, "val/b/y.gif": image}
    for name, picture in files.items():
        options = dict(quality=95) if name.lower().endswith(("jpg", "jpeg", "webp")) else {}
        picture.save(tmp_path / name, **options, **(dict(exif=exif) if "turned" in name else {}))
    (tmp_path / "train/a/notes.txt").write_text("not an image")
    return tmp_path, torch.from_numpy(rgb).permute(2, 0, 1)


def test_every_kind_of_file_comes_out_as_rgb(folder):
    top, rgb = folder
    data = common.load_data(str(top), split="train")
    assert len(data) == 10 and data.labels.tolist() == [0] * 5 + [1] * 5
    gray = TF.rgb_to_grayscale(rgb, 3)
    for i, path in enumerate(data.paths):
        image = data.read(i)
        assert image.shape == (3, 48, 64) and image.dtype == torch.uint8, path
        difference = (image.float() - (gray if "gray" in path else rgb).float()).abs().mean()
        assert difference < (12 if "palette" in path else 6), (path, difference)
    assert len(common.load_data(str(top), split="val")) == 2


def test_folder_without_classes_and_bad_folders(folder, tmp_path):
    top, _ = folder
    data = common.load_data(str(top / "train" / "b"), split="pretrain")
    assert len(data) == 5 and data.labels is None and not common.has_labels(str(top / "train" / "b"))
    assert common.has_labels(str(top))
    with pytest.raises(common.UserError, match="no labels"):
        common.load_data(str(top / "train" / "b"), split="train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(common.UserError, match="no images"):
        common.load_data(str(tmp_path / "empty"), split="pretrain")
    with pytest.raises(common.UserError, match="no such directory"):
        common.load_data(str(tmp_path / "missing"), split="pretrain")


def test_classes_of_val_are_those_of_train(folder):
    top, _ = folder
    shutil.rmtree(top / "val" / "a")
    assert common.load_data(str(top), split="val").labels.tolist() == [1]
    (top / "val" / "c").mkdir()
    common.load_data.cache_clear()
    with pytest.raises(common.UserError, match="val/c has no counterpart"):
        common.load_data(str(top), split="val")


def test_folder_batches_are_the_same_with_and_without_workers(folder):
    data = common.load_data(str(folder[0]), split="pretrain")
    batches = common.Batches(data, [common.Crop(2, 16), common.Crop(1, 8, (0.05, 0.2))], 4, 0)
    results = [list(common.stream(batches, range(1, 4), workers, torch.device("cpu"))) for workers in (0, 2)]
    for (a, i, _), (b, j, _) in zip(*results):
        assert [v.shape for v in a] == [(4, 3, 16, 16)] * 2 + [(4, 3, 8, 8)] and torch.equal(i, j)
        assert all(torch.equal(u, v) and u.max() <= 1 for u, v in zip(a, b))


def test_broken_image_is_replaced_by_the_next(folder):
    top, _ = folder
    path = top / "train/a/plain.png"
    path.write_bytes(path.read_bytes()[:300])
    (top / "train/a/photo.JPG").write_bytes(b"")
    data = common.load_data(str(top), split="train")
    bad = [i for i, p in enumerate(data.paths) if "plain" in p or "photo" in p]
    views, used, broken = data.crop(torch.tensor(bad), [common.Crop(1, 16)], 0)
    assert set(broken) == set(bad) and not set(used.tolist()) & set(bad) and views[0].shape == (2, 3, 16, 16)


# ---------------------------------------------------------------- torchvision's sets

def test_cifar10_is_read(real_data):
    train, val = (common.load_data("cifar10", str(real_data), split) for split in ("train", "val"))
    assert train.images.shape == (50000, 3, 32, 32) and len(val) == 10000
    assert (torch.bincount(train.labels) == 5000).all()
    reference = torchvision.datasets.CIFAR10(str(real_data), train=False)
    assert np.array_equal(val.images[17].permute(1, 2, 0), reference[17][0]) and val.labels[17] == reference[17][1]


def test_refused_download_says_what_is_looked_for(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("network unreachable")
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", refuse)
    with pytest.raises(common.UserError, match="network unreachable.*cifar-10-batches-py for data_batch_1"):
        common.load_data("cifar10", str(tmp_path))


# ---------------------------------------------------------------- networks

@pytest.mark.parametrize("arch,millions", [("resnet18", 11.18), ("resnet34", 21.28), ("resnet50", 23.51), ("resnet101", 42.50), ("resnet152", 58.14),
                                           ("resnet200", 62.62), ("resnet50x2", 93.91), ("resnet50x4", 375.38), ("resnet161", 303.64)])
def test_parameter_counts(arch, millions):
    with torch.device("meta"):
        model = common.resnet(arch)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_resnet_is_torchvisions(arch):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, arch)()
    for m in theirs.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(), m.running_var.uniform_(0.5, 2), torch.nn.init.uniform_(m.weight), torch.nn.init.normal_(m.bias)
    theirs.fc = torch.nn.Identity()
    ours = common.resnet(arch)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 96, 96)
    ours.eval(), theirs.eval()
    with torch.no_grad():
        h, reference = ours(x), theirs(x)
    assert ours.dim == h.shape[1] and (h - reference).abs().max() <= 1e-5 * reference.abs().max()


def test_resnet_options():
    small = common.resnet("resnet18x0.25", stem="small")
    x = torch.randn(2, 3, 32, 32)
    assert small.dim == 128 and small(x).shape == (2, 128) and small.maps(x).shape == (2, 128, 4, 4)
    assert torch.allclose(small.eval().maps(x).mean((2, 3)), small(x))
    assert common.resnet("resnet10").dim == 512 and common.resnet("resnet50x0.5").dim == 1024
    layer = common.resnet("resnet10x0.25", norm="layer", stem="small")
    both = layer(x)
    assert torch.allclose(both[:1], layer(x[:1]), atol=1e-5) and not any("running" in k for k in layer.state_dict())
    zero = common.resnet("resnet50x0.25", zero_init=True)
    assert all(b.bn3.weight.abs().max() == 0 for b in zero.layer1) and zero.bn1.weight.min() == 1
    assert common.resnet(**small.config).config == small.config
    for bad in ("resnet51", "vgg16", "resnet50x", "resnet50x0", "resnet18 "):
        with pytest.raises(ValueError, match="resnet10, resnet18"):
            common.resnet(bad)
    for bad in (dict(norm="group"), dict(stages=5), dict(version=3), dict(arch="resnet161", stages=4), dict(arch="resnet161", version=1)):
        with pytest.raises(ValueError, match="not one of"):
            common.resnet(**{"arch": "resnet18", **bad})


def test_version_2_equals_a_slow_reference():
    """He et al. 2016, figure 1b, written out: norm, ReLU, convolution; the first of a stage projects what the first norm gives."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    relu, conv = torch.relu, torch.nn.functional.conv2d
    for arch, layers in (("resnet18x0.125", 2), ("resnet50x0.0625", 3)):
        model = common.resnet(arch, norm="layer", stem="small", stages=2, version=2)
        with torch.no_grad():
            for w in model.parameters():
                w.add_(0.1 * torch.randn_like(w))
            y = conv(x, model.conv1.weight, padding=1)
            for stage in (model.layer1, model.layer2):
                for j, block in enumerate(stage):
                    stride = 2 if stage is model.layer2 and j == 0 else 1
                    h = relu(block.bn1(y))
                    shortcut = y if block.downsample is None else conv(h, block.downsample.weight, stride=stride)
                    assert (block.downsample is None) == (shortcut.shape == y.shape and shortcut is y)
                    strided = 1 if layers == 2 else 2           # which convolution has the stride
                    for i in range(1, layers + 1):
                        h = relu(getattr(block, f"bn{i}")(y if i == 1 else h))
                        weight = getattr(block, f"conv{i}").weight
                        h = conv(h, weight, stride=stride if i == strided else 1, padding=weight.shape[-1] // 2)
                    y = shortcut + h
            expected = relu(model.last_bn(y))
            assert model.maps(x).shape == (2, model.dim, 16, 16) and torch.allclose(model.maps(x), expected, atol=1e-5)
        again = common.resnet(**model.config)
        again.load_state_dict(model.state_dict(), strict=True)
        assert not any("running" in k for k in model.state_dict()) and not hasattr(model, "layer3")


# ---------------------------------------------------------------- optimisers

@pytest.mark.parametrize("inside", [True, False])
def test_lars_equals_a_slow_reference(inside):
    g = np.random.default_rng(0)
    start = {"weight": g.normal(size=(4, 5)), "bias": g.normal(size=5), "zero": np.zeros((3, 2)), "filters": g.normal(size=(2, 3, 3, 3))}
    gradients = [{k: g.normal(size=v.shape) for k, v in start.items()} for _ in range(6)]
    gradients[2]["filters"] *= 0
    rates = [0.5, 1.0, 2.0, 1.5, 0.7, 0.1]
    momentum, decay, eta = 0.9, 0.03, 0.01

    w, v = {k: a.copy() for k, a in start.items()}, {k: np.zeros_like(a) for k, a in start.items()}
    for gradient, lr in zip(gradients, rates):
        for k in w:
            update, trust = gradient[k], 1.0
            if w[k].ndim > 1:
                update = update + decay * w[k]
                a, b = math.sqrt(sum(x * x for x in w[k].ravel())), math.sqrt(sum(x * x for x in update.ravel()))
                trust = eta * a / b if a > 0 and b > 0 else 1.0
            v[k] = momentum * v[k] + (lr if inside else 1) * trust * update
            w[k] = w[k] - (1 if inside else lr) * v[k]

    parameters = {k: torch.nn.Parameter(torch.tensor(a)) for k, a in start.items()}
    optimizer = common.LARS(parameters.values(), lr=1.0, momentum=momentum, weight_decay=decay, trust_coefficient=eta,
                            lr_in_momentum=inside)
    for gradient, lr in zip(gradients, rates):
        optimizer.param_groups[0]["lr"] = lr
        for k, p in parameters.items():
            p.grad = torch.tensor(gradient[k])
        optimizer.step()
    for k, p in parameters.items():
        assert np.allclose(p.detach().numpy(), w[k], rtol=1e-12, atol=1e-14), k


def test_larc_equals_a_slow_reference():
    g = np.random.default_rng(1)
    for shape, zero in (((4, 3), False), ((3,), False), ((3,), True)):
        w, grad = g.normal(size=shape) * (not zero), g.normal(size=shape)
        p = torch.nn.Parameter(torch.tensor(w))
        p.grad = torch.tensor(grad)
        common.larc_([p], trust_coefficient=0.02, weight_decay=0.1)
        a, b = np.sqrt((w * w).sum()), np.sqrt((grad * grad).sum())
        expected = grad if zero else 0.02 * a / (b + 0.1 * a + 1e-8) * (grad + 0.1 * w)
        assert np.allclose(p.grad.numpy(), expected, rtol=1e-12)


# ---------------------------------------------------------------- nearest neighbours

def test_knn_equals_a_double_loop():
    torch.manual_seed(0)
    bank, labels, h, truth = torch.randn(60, 8), torch.randint(0, 4, (60,)), torch.randn(40, 8) * 5, torch.randint(0, 4, (40,))
    for k, temperature in ((5, 0.1), (20, 0.5), (200, 1.0)):
        right = 0
        for query, t in zip(h.double(), truth):
            s = sorted(((float(query @ b / query.norm() / b.norm()), int(y)) for b, y in zip(bank.double(), labels)), reverse=True)[:k]
            votes = [sum(math.exp(a / temperature) for a, y in s if y == c) for c in range(4)]
            right += votes.index(max(votes)) == t
        assert common.knn_accuracy(bank, labels, h, truth, k, temperature) == pytest.approx(100 * right / 40)


# ---------------------------------------------------------------- files

def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(f):
        f.write(b"half of the n")
        raise OSError(28, "No space left on device")
    with pytest.raises(common.UserError, match="No space left"):
        common.write_atomically(path, fail)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
    common.write_atomically(path, lambda f: f.write(b"new"))
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_bad_checkpoints_are_refused_and_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = {k: {} for k in common.CHECKPOINT_KEYS}
    torch.save(good, "good.pt")
    assert common.read_checkpoint("good.pt") == good
    whole = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "short.pt").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("hello\n")
    torch.save({"weights": torch.ones(2)}, "foreign.pt")
    torch.save([1], "list.pt")
    torch.save(Evil(), "evil.pt")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    for name, message in (("short.pt", "not a readable"), ("empty.pt", "not a readable"), ("text.pt", "not a readable"),
                          ("evil.pt", "could run code, which is refused"), ("evil.pkl", "not a readable|refused"), ("foreign.pt", "lacks method"), ("list.pt", "lacks method"), ("none.pt", "no such file")):
        with pytest.raises(common.UserError, match=message) as e:
            common.read_checkpoint(name)
        assert name in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "pwned").exists()
