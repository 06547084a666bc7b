"""common.py: operations against torchvision or a slow reference, batches, networks, LARS, kNN."""
import functools, itertools, math, os, pickle

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import common
import simclr

LEVEL = 1 / 255

def pictures(n=6, height=32, width=32, seed=0):
    """Smooth coloured images with edges, (n, 3, height, width) float in 0..1."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(n, 3, 5, 5, generator=generator)
    return torch.nn.functional.interpolate(low, (height, width), mode="bicubic").clamp(0, 1)

# ------------------------------------------------------------------- crops

@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [16, 32, 48])
def test_crops_equal_torchvisions(mode, size):
    x = pictures(24, 40, 52)
    crop = common.Crop(1, size, (0.08, 1.0), interpolation=mode)
    torch.manual_seed(size)
    boxes = crop.boxes(len(x), 40, 52)
    torch.manual_seed(size)
    views = common.crop_and_resize(x, crop)[0]
    for image, box, view in zip(x, boxes, views):
        box = [int(v) for v in box]
        reference = TF.resized_crop(image, *box, [size, size], TF.InterpolationMode(mode),
                                    antialias=True)
        assert (view - reference.clamp(0, 1)).abs().max() <= 2 * LEVEL

def test_a_crop_of_a_batch_equals_that_of_a_single_image_and_pillows():
    x = (pictures(8, 60, 48) * 255).round().to(torch.uint8)
    crop = common.Crop(1, 32)
    for seed, image in enumerate(x):
        torch.manual_seed(seed)
        single = common.crop_one(image, crop)[0]
        torch.manual_seed(seed)
        batched = common.crop_and_resize(image[None], crop)[0, 0]
        torch.manual_seed(seed)
        top, left, height, width = crop.boxes(1, 60, 48)[0].int().tolist()
        pillow = Image.fromarray(image.permute(1, 2, 0).numpy())
        pillow = pillow.crop((left, top, left + width, top + height))
        pillow = np.array(pillow.resize((32, 32), Image.BILINEAR))
        assert (single / 255 - batched).abs().max() <= 2 * LEVEL
        reference = torch.from_numpy(pillow).permute(2, 0, 1) / 255
        assert (reference - batched).abs().max() <= 2 * LEVEL

def ks(a, b):
    """Kolmogorov-Smirnov distance of two samples, in units of its 0.1 % critical value."""
    a = np.sort(np.asarray(a, float))
    b = np.sort(np.asarray(b, float))
    every = np.concatenate([a, b])
    below_a = np.searchsorted(a, every, "right") / len(a)
    below_b = np.searchsorted(b, every, "right") / len(b)
    critical = 1.95 * math.sqrt((len(a) + len(b)) / (len(a) * len(b)))
    return np.abs(below_a - below_b).max() / critical

@pytest.mark.parametrize("height,width,scale",
                         [(32, 32, (0.08, 1.0)), (20, 60, (0.2, 1.0)), (10, 100, (0.9, 1.0))])
def test_boxes_are_drawn_as_torchvision_draws_them(height, width, scale):
    torch.manual_seed(0)
    boxes = common.Crop(1, 32, scale).boxes(3000, height, width).numpy()
    image = torch.zeros(3, height, width)
    draw = torchvision.transforms.RandomResizedCrop.get_params
    reference = np.array([draw(image, scale, (3 / 4, 4 / 3)) for _ in range(3000)])
    for column in range(4):
        assert ks(boxes[:, column], reference[:, column]) < 1
    assert (boxes[:, 0] + boxes[:, 2] <= height).all() and boxes.min() >= 0
    assert (boxes[:, 1] + boxes[:, 3] <= width).all()

def test_the_test_crop_is_the_central_fraction():
    x = pictures(2, 128, 192)
    view = common.crop_and_resize(x, common.CenterCrop(56))[0]
    reference = TF.center_crop(TF.resize(x, [64], antialias=True), [56])
    assert (view - reference)[..., 1:-1, 1:-1].abs().max() <= 2 * LEVEL
    small = (pictures(2) * 255).to(torch.uint8)
    assert torch.equal(common.crop_and_resize(small, common.CenterCrop(32))[0], small / 255)

def test_half_of_the_crops_are_mirrored():
    """In a batch and in a worker: with one box, a view is the plain one or its mirror image."""
    image = (pictures(1) * 255).to(torch.uint8)
    whole = functools.partial(common.Crop, 400, 24, (1.0, 1.0), (1.0, 1.0))
    torch.manual_seed(0)
    batch = common.crop_and_resize(image, whole(flip=0.5))[:, 0]
    worker = torch.stack(common.crop_one(image[0], whole(flip=0.5))).float()
    plain_batch = common.crop_and_resize(image, whole())[0, 0]
    plain_worker = common.crop_one(image[0], whole())[0].float()
    for views, plain in ((batch, plain_batch), (worker, plain_worker)):
        same = (views - plain).abs().flatten(1).amax(1) < 1e-5
        mirrored = (views - plain.flip(2)).abs().flatten(1).amax(1) < 1e-5
        assert (mirrored ^ same).all() and 150 < mirrored.sum() < 250

# ------------------------------------------------------------------- operations

@pytest.mark.parametrize("value", [0.2, 0.9, 1.0, 1.7])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colour_operations_equal_torchvisions(name, value):
    x = pictures()
    reference = torch.stack([getattr(TF, f"adjust_{name}")(image, value) for image in x])
    factor = torch.full((len(x), 1, 1, 1), value)
    changed = getattr(common, f"adjust_{name}")(x.clone(), factor)
    assert (changed - reference).abs().max() <= 2 * LEVEL

@pytest.mark.parametrize("shift", [-0.5, -0.2, 0.03, 0.4])
def test_hue_equals_torchvisions(shift):
    grey = pictures(1)[:, :1].expand(1, 3, 32, 32)
    white = torch.ones(1, 3, 32, 32)
    x = torch.cat([pictures(), torch.rand(4, 3, 32, 32), grey, white, 0 * white])
    reference = torch.stack([TF.adjust_hue(image, shift) for image in x])
    changed = common.adjust_hue(x.clone(), torch.full((len(x), 1, 1, 1), shift))
    assert (changed - reference).abs().max() <= 2 * LEVEL

def test_added_brightness_is_a_shift():
    x = pictures(300)
    torch.manual_seed(0)
    shift = common.color_jitter(x.clone(), 0.125, 0, 0, 0, p=1, additive=True) - x
    inside = (x > 0.2) & (x < 0.8)
    amounts = []
    for s, i in zip(shift, inside):
        if i.any():
            amounts.append(s[i].median().item())
            assert (s[i] - s[i].median()).abs().max() < 1e-4
    assert -0.126 < min(amounts) < -0.1 and 0.1 < max(amounts) < 0.126

def test_jitter_draws_for_each_image_and_an_order_for_each_chunk(monkeypatch):
    x = pictures(1).repeat(512, 1, 1, 1)
    torch.manual_seed(0)
    y = common.color_jitter(x.clone(), 0.4, 0.4, 0.4, 0.1, p=0.8)
    same = ((y - x).abs() < 1e-5).flatten(1).all(1)
    assert 0.72 < 1 - same.float().mean() < 0.88
    assert len(y[~same].flatten(1).unique(dim=0)) == (~same).sum()

    fixed = iter([1.5, 0.3, 2.0, 0.2])          # one factor for all images: the orders show
    monkeypatch.setattr(common, "uniform",
                        lambda x, low, high: torch.full((len(x), 1, 1, 1), next(fixed)))
    torch.manual_seed(3)
    views = common.color_jitter(x.clone(), 0.4, 0.4, 0.4, 0.1, p=1)[::64]
    steps = ((TF.adjust_brightness, 1.5), (TF.adjust_contrast, 0.3), (TF.adjust_saturation, 2.0),
             (TF.adjust_hue, 0.2))
    orders = []
    for order in itertools.permutations(steps):
        image = x[0]
        for operation, factor in order:
            image = operation(image, factor)
        orders.append(image)
    for view in views:
        assert min((view - image).abs().max() for image in orders) <= 2 * LEVEL
    assert len(views.flatten(1).unique(dim=0)) > 1

def test_grayscale_equals_torchvisions():
    x = pictures()
    for image, gray in zip(x, common.grayscale(x.clone(), p=1)):
        assert (gray - TF.rgb_to_grayscale(image, 3)).abs().max() <= 2 * LEVEL

@pytest.mark.parametrize("sigma,kernel", [(0.1, 3), (0.5, 5), (1.0, 23), (2.0, 23), (2.0, None)])
def test_blur_equals_torchvisions(sigma, kernel):
    x = pictures(4, 40, 64)
    reference = TF.gaussian_blur(x, [kernel or 17] * 2, [sigma] * 2)
    blurred = common.gaussian_blur(x, 1, (sigma, sigma), kernel)
    assert (blurred - reference).abs().max() <= 2 * LEVEL

def test_blur_draws_for_each_image():
    x = pictures(1).repeat(400, 1, 1, 1)
    torch.manual_seed(0)
    y = common.gaussian_blur(x.clone(), 0.5)
    same = (y == x).flatten(1).all(1)
    assert 0.4 < same.float().mean() < 0.6
    assert len(y[~same].flatten(1).unique(dim=0)) == (~same).sum()

OPERATIONS = [functools.partial(common.color_jitter, brightness=0.8, contrast=0.8, saturation=0.8,
                                hue=0.2), common.grayscale, common.gaussian_blur]

@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_work_in_place_and_depend_on_the_seed_alone(operation):
    x = pictures(100)
    views = []
    for seed in (1, 1, 2):
        common.seed_all(seed)
        crops = x.clone()
        views.append(operation(crops))
        assert views[-1] is crops
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])
    assert views[0].shape == x.shape and views[0].min() >= -1e-6 and views[0].max() <= 1 + 1e-6
    assert torch.equal(operation(x.clone(), p=0.0), x)

def test_two_calls_of_augment_give_two_views():
    """What a notebook does: x1, x2 = augment(x), augment(x)."""
    x = pictures(300)
    before = x.clone()
    x1 = simclr.augment(x, 1.0, 0.5)
    x2 = simclr.augment(x, 1.0, 0.5)
    assert torch.equal(x, before)
    assert (x1 != x2).flatten(1).any(1).float().mean() > 0.9
    with pytest.raises(ValueError, match="not float in 0..1"):
        simclr.augment((255 * x).byte(), 1.0, 0.5)

def test_augmented_batches_have_the_distribution_of_the_pillow_pipeline():
    """Statistics of 2,000 views, ours against torchvision's transforms of Pillow images."""
    from torchvision import transforms as T
    images = common.draw_shapes(2000, seed=7)[0]
    jitter = T.ColorJitter(0.8, 0.8, 0.8, 0.2)
    pipeline = T.Compose([T.RandomResizedCrop(32, (0.2, 1.0)), T.RandomHorizontalFlip(),
                          T.RandomApply([jitter], p=0.8), T.RandomGrayscale(p=0.2), T.ToTensor()])
    torch.manual_seed(0)
    theirs = torch.stack([pipeline(Image.fromarray(i.transpose(1, 2, 0))) for i in images])
    crop = common.Crop(1, 32, (0.2, 1.0), flip=0.5)
    crops = common.crop_and_resize(torch.from_numpy(images), crop)[0]
    ours = simclr.augment(crops, 1.0, 0.0)

    def statistics(x):
        chroma = (x.max(1).values - x.min(1).values).mean((1, 2))
        gray = x.mean(1)
        energy = gray.diff(dim=1).abs().mean((1, 2)) + gray.diff(dim=2).abs().mean((1, 2))
        asymmetry = gray[:, :, :16].mean((1, 2)) - gray[:, :, 16:].mean((1, 2))
        return [*x.mean((2, 3)).T, *x.std((2, 3)).T, chroma, energy, asymmetry]

    distances = [ks(a, b) for a, b in zip(statistics(ours), statistics(theirs))]
    assert max(distances) < 1, distances
    weaker = simclr.augment(crops, 0.5, 0.0)                    # the test sees a wrong strength
    assert max(ks(a, b) for a, b in zip(statistics(weaker), statistics(theirs))) > 1

# ------------------------------------------------------------------- batches

def test_batches_are_a_function_of_seed_step_and_rank(monkeypatch):
    images = torch.randint(0, 256, (100, 3, 8, 8), dtype=torch.uint8)
    data = common.Images(images, None, "cpu")

    def make(seed=0):
        return common.Batches(data, [common.Crop(2, 8)], 32, seed)

    batches = make()
    assert len(batches) == 3
    epoch = torch.cat([batches[step][1] for step in range(3)])
    following = torch.cat([batches[step][1] for step in range(3, 6)])
    assert len(epoch.unique()) == 96 and not torch.equal(epoch, following)
    views, indices, broken = make()[4]                          # without the steps before
    assert broken == [] and torch.equal(indices, batches[4][1])
    assert all(torch.equal(a, b) for a, b in zip(views, batches[4][0]))
    assert not torch.equal(views[0], views[1])
    assert not torch.equal(make(seed=1)[0][1], batches[0][1])
    monkeypatch.setattr(common, "WORLD_SIZE", 2)
    halves = []
    for rank in (0, 1):
        monkeypatch.setattr(common, "RANK", rank)
        halves.append(make()[4])
    assert torch.equal(torch.cat([half[1] for half in halves]), indices)
    assert not torch.equal(halves[0][0][0], halves[1][0][0])

def test_a_batch_that_cannot_be_names_one_that_can(monkeypatch):
    data = common.Images(torch.zeros(100, 3, 8, 8, dtype=torch.uint8), None, "cpu")
    with pytest.raises(common.UserError, match="at most the 100 .*--batch-size 16 fits"):
        common.Batches(data, [], 101, 0)
    with pytest.raises(common.UserError, match="at least 2 images.*--batch-size 2 fits"):
        common.Batches(data, [], 1, 0)              # of which batch statistics say nothing
    monkeypatch.setattr(common, "WORLD_SIZE", 3)
    with pytest.raises(common.UserError, match="each of 3 processes.*--batch-size 9 fits"):
        common.Batches(data, [], 10, 0)

# ------------------------------------------------------------------- networks

@pytest.mark.parametrize("arch,millions", [
    ("resnet18", 11.18), ("resnet34", 21.28), ("resnet50", 23.51), ("resnet101", 42.50),
    ("resnet152", 58.14), ("resnet200", 62.62), ("resnet50x2", 93.91), ("resnet50x4", 375.38)])
def test_parameter_counts(arch, millions):
    with torch.device("meta"):
        model = common.resnet(arch)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions

@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_a_resnet_is_torchvisions(arch):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, arch)()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight)
            torch.nn.init.normal_(module.bias)
    theirs.fc = torch.nn.Identity()
    ours = common.resnet(arch)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        h = ours.eval()(x)
        reference = theirs.eval()(x)
    assert ours.dim == h.shape[1]
    assert (h - reference).abs().max() <= 1e-5 * reference.abs().max()

def test_options_of_resnets():
    x = torch.randn(2, 3, 32, 32)
    small = common.resnet("resnet18x0.25", stem="small")
    assert small.dim == 128 and small(x).shape == (2, 128)
    assert small.maps(x).shape == (2, 128, 4, 4)
    assert torch.allclose(small.eval().maps(x).mean((2, 3)), small(x))
    assert common.resnet("resnet10").dim == 512 and common.resnet("resnet50x0.5").dim == 1024
    layer = common.resnet("resnet10x0.25", norm="layer", stem="small")
    assert torch.allclose(layer(x)[:1], layer(x[:1]), atol=1e-5)
    assert not any("running" in key for key in layer.state_dict())
    zero = common.resnet("resnet50x0.25", zero_init=True)
    assert all(block.bn3.weight.abs().max() == 0 for block in zero.layer1)
    assert zero.bn1.weight.min() == 1
    assert common.resnet(**small.config).config == small.config

@pytest.mark.parametrize("arguments,words", [
    (dict(arch="resnet51"), "resnet10, resnet18"), (dict(arch="vgg16"), "vgg16"),
    (dict(arch="resnet50x"), "resnet50x"), (dict(arch="resnet50x0"), "resnet50x0"),
    (dict(arch="resnet18 "), "resnet18 "), (dict(arch="resnet18", norm="group"), "group"),
    (dict(arch="resnet18", stem="tiny"), "tiny")])
def test_unknown_resnets_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        common.resnet(**arguments)

# ------------------------------------------------------------------- LARS

SHAPES = {"weight": (4, 5), "bias": (5,), "zero": (3, 2), "filters": (2, 3, 3, 3)}

def norm(a):
    return math.sqrt(sum(x * x for x in a.ravel()))

def lars_by_loops(start, gradients, rates, momentum, decay, eta, lr_in_momentum):
    """The docstring's formulas, one tensor at a time."""
    w = {key: a.copy() for key, a in start.items()}
    v = {key: np.zeros_like(a) for key, a in start.items()}
    for gradient, lr in zip(gradients, rates):
        for key in w:
            update = gradient[key]
            trust = 1.0
            if w[key].ndim > 1:
                update = update + decay * w[key]
                if norm(w[key]) > 0 and norm(update) > 0:
                    trust = eta * norm(w[key]) / norm(update)
            if lr_in_momentum:
                v[key] = momentum * v[key] + lr * trust * update
                w[key] = w[key] - v[key]
            else:
                v[key] = momentum * v[key] + trust * update
                w[key] = w[key] - lr * v[key]
    return w

@pytest.mark.parametrize("lr_in_momentum", [True, False])
def test_lars_equals_a_slow_reference(lr_in_momentum):
    generator = np.random.default_rng(0)
    start = {key: generator.normal(size=shape) for key, shape in SHAPES.items()}
    start["zero"] *= 0
    gradients = [{key: generator.normal(size=shape) for key, shape in SHAPES.items()}
                 for _ in range(6)]
    gradients[2]["filters"] *= 0
    rates = [0.5, 1.0, 2.0, 1.5, 0.7, 0.1]
    expected = lars_by_loops(start, gradients, rates, 0.9, 0.03, 0.01, lr_in_momentum)
    weights = {key: torch.nn.Parameter(torch.tensor(a)) for key, a in start.items()}
    optimizer = common.LARS(weights.values(), 1.0, 0.9, 0.03, 0.01, lr_in_momentum)
    for gradient, lr in zip(gradients, rates):
        optimizer.param_groups[0]["lr"] = lr
        for key, weight in weights.items():
            weight.grad = torch.tensor(gradient[key])
        optimizer.step()
    for key, weight in weights.items():
        assert np.allclose(weight.detach().numpy(), expected[key], rtol=1e-12, atol=1e-14), key

def test_larc_equals_a_slow_reference():
    generator = np.random.default_rng(1)
    start = {key: generator.normal(size=shape) for key, shape in SHAPES.items()}
    start["zero"] *= 0
    gradient = {key: generator.normal(size=shape) for key, shape in SHAPES.items()}
    weights = [torch.nn.Parameter(torch.tensor(a)) for a in start.values()]
    for weight, g in zip(weights, gradient.values()):
        weight.grad = torch.tensor(g)
    common.larc(weights, trust_coefficient=0.02, weight_decay=0.1)
    for key, weight in zip(SHAPES, weights):
        w = start[key]
        g = gradient[key]
        trust = 0.02 * norm(w) / (norm(g) + 0.1 * norm(w) + 1e-8)
        expected = g if key == "zero" else trust * (g + 0.1 * w)
        assert np.allclose(weight.grad.numpy(), expected, rtol=1e-12), key

# ------------------------------------------------------------------- nearest neighbours

@pytest.mark.parametrize("k,temperature", [(5, 0.1), (20, 0.5), (200, 1.0)])
def test_knn_equals_a_double_loop(k, temperature):
    torch.manual_seed(0)
    bank = torch.randn(60, 8)
    labels = torch.randint(0, 4, (60,))
    h = 5 * torch.randn(40, 8)
    truth = torch.randint(0, 4, (40,))
    right = 0
    for query, t in zip(h.double(), truth):
        similarities = []
        for row, label in zip(bank.double(), labels):
            similarities.append((float(query @ row / query.norm() / row.norm()), int(label)))
        votes = [0.0] * 4
        for similarity, label in sorted(similarities, reverse=True)[:k]:
            votes[label] += math.exp(similarity / temperature)
        right += votes.index(max(votes)) == t
    assert common.knn_accuracy(bank, labels, h, truth, k, temperature) == pytest.approx(2.5 * right)

def test_nearest_goes_through_the_bank_in_chunks():
    torch.manual_seed(0)
    bank = torch.randn(40000, 4)
    h = torch.randn(3, 4)
    cosines = torch.nn.functional.normalize(h, dim=1) @ torch.nn.functional.normalize(bank, dim=1).T
    similarity, indices = common.nearest(bank, h, 7)
    expected, rows = cosines.topk(7)
    assert torch.allclose(similarity, expected) and torch.equal(indices, rows)

# ------------------------------------------------------------------- files

def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(common.UserError, match="as it was .No space left"):
            common.write_atomically(path, lambda file: file.write(b"half of the new"))
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
    common.write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]

class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)

def bad_files(folder):
    """{name: what is in it}, none of which is a whole checkpoint."""
    good = {key: kind() if isinstance(kind, type) else None     # the others may be None
            for key, kind in common.CHECKPOINT.items()}
    torch.save(good, folder / "good.pt")
    whole = (folder / "good.pt").read_bytes()
    (folder / "short.pt").write_bytes(whole[:len(whole) // 2])
    (folder / "empty.pt").write_bytes(b"")
    (folder / "text.pt").write_text("hello\n")
    (folder / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    torch.save({"weights": torch.ones(2)}, folder / "foreign.pt")
    torch.save([1], folder / "list.pt")
    torch.save(Evil(), folder / "evil.pt")
    torch.save(dict(good, step="three"), folder / "kinds.pt")
    return good

def test_bad_checkpoints_are_refused_and_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    good = bad_files(tmp_path)
    assert common.read_checkpoint("good.pt") == good
    for name in ("short", "empty", "text", "foreign", "list", "evil", "kinds"):
        with pytest.raises(common.UserError, match=f"{name}.pt: not a checkpoint") as e:
            common.read_checkpoint(f"{name}.pt")
        assert "\n" not in str(e.value)
    with pytest.raises(common.UserError, match="evil.pkl: not a checkpoint"):
        common.read_checkpoint("evil.pkl")
    assert not (tmp_path / "pwned").exists()

def test_a_flipped_byte_is_noticed(checkpoint, tmp_path):
    content = bytearray(checkpoint.read_bytes())
    weights = torch.load(checkpoint)["encoder"]["layer4.0.bn2.running_mean"]
    place = content.index(weights.numpy().tobytes()[:64])
    content[place + 5] ^= 1
    (tmp_path / "flipped.pt").write_bytes(content)
    with pytest.raises(common.UserError, match="flipped.pt: damaged, the checksum of .* is wrong"):
        common.read_checkpoint(tmp_path / "flipped.pt")

# ------------------------------------------------------------------- GPU

@pytest.mark.gpu
def test_views_on_a_gpu_are_those_of_the_cpu():
    x = (pictures(128) * 255).to(torch.uint8)
    views = []
    for device in ("cpu", "cuda"):
        common.seed_all(1)
        data = common.Images(x, None, device)
        crops = data.crop(torch.arange(128), [common.Crop(1, 32)], 5)[0][0]
        common.seed_all(2)
        views.append(common.gaussian_blur(common.grayscale(crops)).cpu())
        assert simclr.augment(crops, 1.0, 0.5).device.type == device
    assert (views[0] - views[1]).abs().max() < 2 * LEVEL
