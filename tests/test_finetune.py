"""evaluate.py finetune, and how classifiers.py trains: subsets of the labels, gains, CPC v2's two
phases, what is printed, and that no step waits."""
import copy
import math
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import classifiers
import common
import cpc_v2
import evaluate
from conftest import ask, asked_wrongly, watch

CPU = torch.device("cpu")
INPUT = dict(size=16, mean=[0.0] * 3, std=[1.0] * 3, interpolation="bilinear")

@pytest.fixture
def little_data(monkeypatch):
    """`shapes` of 600 and 200 images."""
    load = common.load_data

    def load_little(name, root="data", split="train", device="cpu"):
        data = load(name, root, split, device)
        count = 200 if split == "val" else 600
        return common.Images(data.images[:count], data.labels[:count], device, data.classes)

    monkeypatch.setattr(common, "load_data", load_little)

def flags(**changes):
    """What the functions of classifiers.py need of the flags."""
    return types.SimpleNamespace(**dict(seed=0, workers=0, precision="fp32", batch_size=None,
                                        **changes))

def states_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())

# ------------------------------------------------------------------- subsets and gains

LABELS = torch.arange(1000) % 10

def test_balanced_subsets():
    small = evaluate.label_subset(LABELS, 0.02, 0, True)
    large = evaluate.label_subset(LABELS, 0.1, 0, True)
    assert LABELS[small].bincount().tolist() == [2] * 10
    assert set(small.tolist()) < set(large.tolist())
    assert small[:5].tolist() == [31, 57, 64, 82, 159]          # the same everywhere
    assert torch.equal(small, evaluate.label_subset(LABELS, 0.02, 0, True))
    assert not torch.equal(small, evaluate.label_subset(LABELS, 0.02, 1, True))
    three = evaluate.label_subset(LABELS, 3, 0, True)
    assert LABELS[three].bincount().tolist() == [3] * 10
    assert len(evaluate.label_subset(LABELS, 1.0, 0, True)) == 1000

def test_subsets_drawn_from_all():
    small = evaluate.label_subset(LABELS, 0.02, 0, False)
    large = evaluate.label_subset(LABELS, 0.1, 0, False)
    assert len(small) == 20 and LABELS[small].bincount(minlength=10).tolist() != [2] * 10
    assert set(small.tolist()) < set(large.tolist())

@pytest.mark.parametrize("amount,words", [
    (0.005, "5 of 1000 images, fewer than the 10 classes"), (200, "more than there are")])
def test_subsets_that_cannot_be(amount, words):
    with pytest.raises(common.UserError, match=words):
        evaluate.label_subset(LABELS, amount, 0, True)

def test_a_class_with_too_few_images():
    labels = torch.tensor([0] * 50 + [1] * 3)
    with pytest.raises(common.UserError, match="class 1 has 3 images"):
        evaluate.label_subset(labels, 4, 0, True)

IMAGES = [1, 2, 5, 10, 20, 50, 100]

@pytest.mark.parametrize("baseline,ours,gains", [   # CPC v2, table 2: top-1, top-5
    ([23.1, 34.8, 50.6, 62.5, 70.3, 75.9, 80.2], [52.7, 60.4, 68.1, 73.1, 76.7, 81.2, 83.4],
     [5, 2.5, 2, 2, 2.5, 2, 1]),
    ([44.1, 59.9, 75.2, 83.9, 89.4, 93.1, 95.2], [78.3, 83.9, 88.8, 91.2, 93.3, 95.6, 96.5],
     [5, 5, 2, 2, 2.5, 2, 1]),
    ([90] * 7, [10] * 7, [None] * 7)])
def test_the_gain_is_that_of_cpc(baseline, ours, gains, capsys):
    rows = [dict(images=images, top1=top1, baseline_top1=other)
            for images, top1, other in zip(IMAGES, ours, baseline)]
    evaluate.add_gains(rows)
    assert [row["gain"] for row in rows] == gains
    told = capsys.readouterr().err.splitlines()
    for gain, line in zip(gains, told):
        if gain is None:
            assert "the baseline is better with every number measured" in line
        else:
            assert f"gain at least {gain:g}, of the numbers measured; the untuned" in line

# ------------------------------------------------------------------- one phase

@pytest.mark.parametrize("protocol", ["simclr", "byol", "swav"])
def test_finetune(checkpoint, tmp_path, protocol, capsys, little_data):
    before = checkpoint.read_bytes()
    args = ["--labels", 0.2, 4, "--protocol", protocol, "--epochs", 1, "--baseline", "supervised",
            "--baseline-epochs", 1, "--output", tmp_path]
    result = ask("finetune", checkpoint, *args)
    assert [row["images"] for row in result["rows"]] == [40, 120]
    for row in result["rows"]:
        assert 0 <= row["top1"] <= row["top5"] <= 100
        assert {"baseline_top1", "baseline_top5", "gain"} < set(row)
    assert (tmp_path / "labels.png").stat().st_size > 5000
    assert f"picture: {tmp_path / 'labels.png'}" in capsys.readouterr().err
    assert checkpoint.read_bytes() == before
    if protocol == "simclr":
        assert result == ask("finetune", checkpoint, *args)

def test_epochs_and_rate_leave_the_baseline_alone(checkpoint, tmp_path, monkeypatch, little_data):
    """Otherwise it would look worse, and the gain larger."""
    recipes = []

    def noting(args, recipe, encoder, *rest):
        recipes.append((recipe["epochs"], recipe["lr"], recipe["head_lr"]))
        return nn.Sequential(encoder, nn.Linear(encoder.dim, 10))

    monkeypatch.setattr(evaluate, "tune", noting)
    args = ["--baseline", "supervised", "--protocol", "swav", "--output", tmp_path]
    ask("finetune", checkpoint, "--labels", 1, 0.2, "--epochs", 7, "--lr", 10, *args)
    assert recipes == [(7, 0.04, 10), (180, 0.1, 0.1), (7, 0.5, 10), (90, 0.1, 0.1)]
    recipes.clear()
    ask("finetune", checkpoint, "--labels", 0.2, "--baseline-epochs", 3, *args)
    assert recipes == [(20, 0.01, 0.2), (3, 0.1, 0.1)]

def test_fine_tuning_learns(checkpoint, tmp_path, little_data):
    result = ask("finetune", checkpoint, "--labels", 1.0, "--epochs", 20, "--lr", 0.1,
                 "--subset", "random", "--output", tmp_path)
    assert result["rows"][0]["top1"] > 40, result

def test_fine_tuning_that_diverges(checkpoint, tmp_path, capsys, little_data):
    with pytest.raises(common.UserError, match="diverged.*--lr"):
        ask("finetune", checkpoint, "--labels", 0.2, "--epochs", 3, "--lr", 1e30)

# ------------------------------------------------------------------- CPC v2's two phases

def small_encoder():
    torch.manual_seed(0)
    return cpc_v2.resnet_v2("resnet10x0.125", stem="small")

def distinct_images(n, classes=4):
    """Of one grey each, which tells them apart."""
    images = torch.arange(n, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)
    return common.Images(images, torch.arange(n) % classes, "cpu")

def test_two_phases(monkeypatch):
    """The encoder is fixed at first; a phase ends when five epochs were no better on the held-out
    images; the next begins at the best state, which is what is returned."""
    encoder = small_encoder()
    before = copy.deepcopy(encoder.state_dict())
    losses = [3, 1, 2, 2, 2, 2, 2, 0.5, 2, 2, 2, 2, 2]
    states = []
    used = set()

    def told(model, data, *_):
        """Logits with the next loss of the list."""
        assert data is held
        states.append(copy.deepcopy(model.state_dict()))
        loss = losses[len(states) - 1]
        return torch.tensor([[1, math.expm1(loss)]]).log(), torch.tensor([0])

    crop = common.Images.crop

    def noting(data, indices, *rest):
        used.update(data.images[indices, 0, 0, 0].tolist())
        return crop(data, indices, *rest)

    monkeypatch.setattr(common, "features", told)
    monkeypatch.setattr(common.Images, "crop", noting)
    rest, held = evaluate.hold_out(distinct_images(40), 0, 8)
    model = classifiers.tune_cpc(flags(), evaluate.CPC_PHASES, encoder, rest, held, 4, INPUT, CPU)

    def encoder_of(state):
        return {key.removeprefix("encoder."): value for key, value in state.items()
                if key.startswith("encoder.")}

    assert len(states) == len(losses)
    assert all(states_equal(encoder_of(state), before) for state in states[:7])
    assert not states_equal(states[0], states[1])
    assert not states_equal(encoder_of(states[7]), before)
    assert states_equal(model.state_dict(), states[7])
    assert not states_equal(states[12], states[7])
    assert states_equal(encoder.state_dict(), before)           # a copy is trained
    assert len(used) == 32 and not used & set(held.images[:, 0, 0, 0].tolist())

def test_the_encoder_is_trained_as_in_pre_training(monkeypatch):
    """C.2: by Adam with beta1 0.8, its gradient's norm clipped at 0.01; the classifier by SGD."""
    adam = watch(monkeypatch, (torch.optim, "Adam"))
    clipped = watch(monkeypatch, (nn.utils, "clip_grad_norm_"))
    rest, held = evaluate.hold_out(distinct_images(40), 0, 8)
    phases = [dict(phase, epochs=1) for phase in evaluate.CPC_PHASES]
    model = classifiers.tune_cpc(flags(), phases, small_encoder(), rest, held, 4, INPUT, CPU)
    (_, _, optimizer), = adam
    (_, (weights, limit), _), = clipped         # the one step of the second phase
    of_encoder = list(model.encoder.parameters())
    assert limit == 0.01 and all(a is b for a, b in zip(weights, of_encoder, strict=True))
    group, = optimizer.param_groups
    assert group["betas"] == (0.8, 0.999) and group["peak"] == pytest.approx(8e-4 * 32 / 256)
    assert all(a is b for a, b in zip(group["params"], of_encoder, strict=True))

def test_the_rate_and_epochs_of_both_phases():
    phases = evaluate.with_flags(evaluate.CPC_PHASES, 4, 0.4)
    assert [phase["epochs"] for phase in phases] == [4, 4]
    assert [phase["head_lr"] for phase in phases] == pytest.approx([0.4, 0.04])
    assert [phase["lr"] for phase in phases] == pytest.approx([0, 4e-4])

def test_never_a_finite_loss(monkeypatch):
    nothing = torch.tensor([[math.nan]]), torch.tensor([0])
    monkeypatch.setattr(common, "features", lambda *_: nothing)
    rest, held = evaluate.hold_out(distinct_images(40), 0, 8)
    with pytest.raises(common.UserError, match="never finite.*--lr"):
        classifiers.tune_cpc(flags(), evaluate.CPC_PHASES, small_encoder(), rest, held, 4, INPUT,
                             CPU)

def test_the_classifier_is_the_papers():
    class Encoder(nn.Module):
        dim = 4096

        def maps(self, x):
            return x

    with torch.device("meta"):
        net = classifiers.MapsClassifier(Encoder(), 1000)
        assert net(torch.zeros(2, 4096, 14, 14)).shape == (2, 1000)
        assert net.blocks(torch.zeros(1, 4096, 14, 14)).shape == (1, 4096, 7, 7)
    convolutions = [module for block in net.blocks for name, module in block.named_modules()
                    if isinstance(module, nn.Conv2d) and name != "shortcut"]
    assert len(convolutions) == 33
    assert sum(w.numel() for w in net.parameters()) / 1e6 == pytest.approx(217.1, abs=0.1)
    assert [type(m) for m in list(net.children())[2:]] == [nn.BatchNorm2d, nn.Dropout, nn.Linear]

# ------------------------------------------------------------------- probes

def test_the_patch_classifier_is_a_mean_over_places():
    torch.manual_seed(0)
    head = classifiers.patch_classifier(16, 3)
    z = 5 * torch.randn(8, 16, 4, 5) + 2
    norm, linear = head[0], head[1]
    assert not norm.weight.requires_grad and norm.weight.eq(1).all() and norm.bias.requires_grad
    logits = head(z)
    mean = z.mean((0, 2, 3), keepdim=True)
    var = z.var((0, 2, 3), unbiased=False, keepdim=True)
    white = (z - mean) / (var + norm.eps).sqrt()
    expected = torch.zeros(8, 3)
    for i in range(4):
        for j in range(5):
            expected += F.linear(white[:, :, i, j], linear.weight[:, :, 0, 0], linear.bias) / 20
    assert torch.allclose(logits, expected, atol=1e-4)

def test_the_probe_encodes_the_patches_of_pre_training():
    encoder = small_encoder()
    patches = dict(patch_size=8, stride=4, patch_augment="none")
    grid = classifiers.PatchGrid(encoder, patches)
    x = torch.rand(2, 3, 16, 16)
    normalized = common.normalize(x.clone(), cpc_v2.MEAN, cpc_v2.STD)
    with torch.no_grad():
        z = grid(normalized)
        assert z.shape == (2, encoder.dim, 3, 3)
        assert torch.allclose(z, grid(x, augment=True), atol=1e-5)
        assert torch.allclose(z[:, :, 1, 2], encoder(normalized[:, :, 4:12, 8:16]), atol=1e-5)

def blobs(n=200, classes=4, dim=6):
    torch.manual_seed(0)
    y = torch.arange(n) % classes
    return evaluate.Features(torch.randn(n, dim) + 3 * torch.eye(dim)[y], y)

RECIPE = dict(evaluate.BASE, epochs=3, batch_size=50)

def heads(rates, data=None, **changes):
    def make():
        return classifiers.linear_layer(6, 4, 0.01)

    return classifiers.train_heads(flags(), CPU, dict(RECIPE, **changes), rates, data or blobs(),
                                   make)

@pytest.mark.parametrize("changes", [{}, dict(adam=True, drops=(0.5,)), dict(larc=True)])
def test_side_by_side_is_one_by_one(changes):
    together = heads([0.5, 4.0], **changes)
    for head, rate in zip(together, [0.5, 4.0]):
        alone, = heads([rate], **changes)
        assert states_equal(head.state_dict(), alone.state_dict())
    assert not together.training and not any(w.requires_grad for w in together.parameters())

def test_one_that_diverges_leaves_the_others_alone():
    good, bad = heads([0.5, 1e38], epochs=20)
    alone, = heads([0.5], epochs=20)
    assert states_equal(good.state_dict(), alone.state_dict())
    assert not bad.weight.isfinite().all()

@pytest.mark.parametrize("drops,factor,expected", [
    (None, 0.1, [1, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 + math.cos(3 * math.pi / 4)) / 2]),
    ((0.5, 0.75), 0.1, [1, 1, 0.1, 0.01]), ((), 0.1, [1, 1, 1, 1])])
def test_learning_rate(drops, factor, expected):
    recipe = dict(drops=drops, factor=factor)
    rates = [classifiers.learning_rate(step, 4, recipe) for step in range(4)]
    assert rates == pytest.approx(expected)

# ------------------------------------------------------------------- what is printed, and when

@pytest.fixture
def clock(monkeypatch):
    """Every look at the clock takes a second."""
    seconds = iter(range(10 ** 6))
    fake = types.SimpleNamespace(perf_counter=lambda: float(next(seconds)))
    monkeypatch.setattr(classifiers, "time", fake)

def test_the_time_left_is_told_soon_and_then_every_ten_seconds(clock, capsys):
    heads([0.5], epochs=10)                                     # 40 steps
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in told] == ["4/40", "15/40", "26/40", "37/40", "40/40"]
    assert "0.6 min left" in told[0] and "0.0 min left" in told[-1]

def test_no_step_waits_for_the_device(monkeypatch):
    """Nothing is copied to Python in a step that prints nothing."""
    copies = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu"):
        method = getattr(torch.Tensor, name)

        def noting(tensor, *args, name=name, method=method):
            copies.append(name)
            return method(tensor, *args)

        monkeypatch.setattr(torch.Tensor, name, noting)

    def copies_of(epochs):
        copies.clear()
        heads([0.5], epochs=epochs)
        return len(copies)

    assert copies_of(10) == copies_of(1)

def test_a_high_loss_is_said(capsys):
    heads([1e4], epochs=1)
    assert "more than at first: try a lower --lr" in capsys.readouterr().err

@pytest.mark.parametrize("lr", [1e30, 1e38])
def test_divergence(lr):
    with pytest.raises(common.UserError, match="the loss is .*diverged; try a lower --lr"):
        heads([lr])

# ------------------------------------------------------------------- batches

@pytest.mark.parametrize("given,images,default,processes,size", [
    (None, 100, 256, 1, 100), (None, 1000, 256, 1, 256), (64, 100, 256, 1, 64),
    (None, 100, 8, 1, 8), (None, 50, 8, 8, 16), (None, 101, 256, 4, 100)])
def test_batch_size(given, images, default, processes, size, monkeypatch):
    monkeypatch.setattr(common, "WORLD_SIZE", processes)
    args = flags()
    args.batch_size = given
    assert classifiers.batch_size(args, range(images), default, least=2) == size

@pytest.mark.parametrize("given,images,processes", [
    (1, 100, 1), (101, 100, 1), (3, 100, 2), (33, 100, 2), (None, 1, 1), (None, 5, 4)])
def test_batches_that_do_not_fit(given, images, processes, monkeypatch):
    monkeypatch.setattr(common, "WORLD_SIZE", processes)
    args = flags()
    args.batch_size = given
    with pytest.raises(common.UserError, match="--batch-size"):
        classifiers.batch_size(args, range(images), 256, least=2)

def test_batch_norm_needs_two_images(capsys, checkpoint):
    told = asked_wrongly(capsys, "finetune", checkpoint, "--batch-size", 1)
    assert "--batch-size 1: not in 2.." in told
