"""simclr.py: the loss beside equation 1, the model, the order of a step, the rates; it learns."""
import math

import pytest
import torch
from torch import nn

import torch.nn.functional as F

import common
import simclr
from conftest import logged, mistake, run, tiny, train, two_processes, watch

# With `few_labelled` an epoch has 10 steps.
RUN = [*tiny("simclr"), "--batch-size", "40", "--log-every", "1", "--knn-every", "0"]

# ------------------------------------------------------------------- loss

def similarity(u, v):
    return (u @ v) / (u.norm() * v.norm())

def nt_xent_by_loops(z1, z2, temperature):
    """Equation 1 and Algorithm 1 as they are written, one pair at a time."""
    z = [*z1, *z2]
    n = len(z1)
    total = 0.0
    for i in range(2 * n):
        denominator = 0.0
        for k in range(2 * n):
            if k != i:
                denominator += torch.exp(similarity(z[i], z[k]) / temperature)
        j = (i + n) % (2 * n)                   # the other view of the same image
        total -= torch.log(torch.exp(similarity(z[i], z[j]) / temperature) / denominator)
    return total / (2 * n)

@pytest.mark.parametrize("n,d,temperature", [(1, 3, 0.5), (2, 3, 1.0), (5, 4, 0.5), (12, 8, 0.1)])
def test_loss_and_its_gradient_equal_the_equation(n, d, temperature):
    torch.manual_seed(n)
    z1 = (7 * torch.randn(n, d, dtype=torch.float64)).requires_grad_()
    z2 = torch.randn(n, d, dtype=torch.float64, requires_grad=True)
    expected = nt_xent_by_loops(z1, z2, temperature)
    loss = simclr.nt_xent(z1, z2, temperature)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12, abs=1e-15)
    expected_gradients = torch.autograd.grad(expected, [z1, z2])
    for gradient, by_loops in zip(torch.autograd.grad(loss, [z1, z2]), expected_gradients):
        assert (gradient - by_loops).abs().max() < 1e-12
    single = simclr.nt_xent(z1.float(), z2.float(), temperature)
    assert single.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)

def test_loss_of_known_cases():
    same = torch.ones(8, 4, dtype=torch.float64)
    assert simclr.nt_xent(same, same, 0.1).item() == pytest.approx(math.log(15), rel=1e-12)
    apart = torch.eye(4, dtype=torch.float64)       # 1 positive and 6 negatives at right angles
    expected = -2 + math.log(math.exp(2) + 6)
    assert simclr.nt_xent(apart, apart, 0.5).item() == pytest.approx(expected, rel=1e-12)
    scaled = simclr.nt_xent(1e-3 * apart, 1e3 * apart, 0.5)
    assert scaled.item() == pytest.approx(expected, rel=1e-12)

def triples_by_loops(z1, z2, term, semi_hard):
    """The mean of term(u . v+, u . v-) over the triples, one at a time."""
    total = 0.0
    count = 0
    for i in range(len(z1)):
        positive = similarity(z1[i], z2[i])
        negatives = [similarity(z1[i], z2[k]) for k in range(len(z2)) if k != i]
        if semi_hard:
            farther = [s for s in negatives if s < positive]
            negatives = sorted(farther, key=lambda s: s.item())[-1:]
        for negative in negatives:
            total += term(positive, negative)
            count += 1
    return total / max(count, 1)

@pytest.mark.parametrize("semi_hard", [False, True])
@pytest.mark.parametrize("n,d", [(2, 3), (5, 4), (12, 8)])
def test_other_losses_equal_table_2(n, d, semi_hard):
    torch.manual_seed(n)
    z1 = (7 * torch.randn(n, d, dtype=torch.float64)).requires_grad_()
    z2 = (z1.detach() / 7 + torch.randn(n, d, dtype=torch.float64)).requires_grad_()

    def logistic(positive, negative):
        return -F.logsigmoid(positive / 0.3) - F.logsigmoid(-negative / 0.3)

    def margin(positive, negative):
        return (negative - positive + 0.4).clamp(min=0)

    for term, loss in ((logistic, simclr.nt_logistic(z1, z2, 0.3, semi_hard)),
                       (margin, simclr.margin_loss(z1, z2, 0.4, semi_hard))):
        expected = triples_by_loops(z1, z2, term, semi_hard)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12, abs=1e-15)
        gradients = torch.autograd.grad(loss, [z1, z2])
        for gradient, by_loops in zip(gradients, torch.autograd.grad(expected, [z1, z2])):
            assert (gradient - by_loops).abs().max() < 1e-12

def gradient_on_the_sphere(gradient, z):
    """The gradient by u of table 2, carried to z = |z| u."""
    u = z / z.norm()
    return (gradient - (gradient @ u) * u) / z.norm()

@pytest.mark.parametrize("seed", range(4))
def test_gradients_of_table_2(seed):
    """Of two images each u has one negative: minus the formulas of table 2, which ascend."""
    torch.manual_seed(seed)
    z1 = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    z2 = torch.randn(2, 5, dtype=torch.float64)
    v = F.normalize(z2, dim=1)
    for i in range(2):
        u = F.normalize(z1[i].detach(), dim=0)
        positive = v[i]
        negative = v[1 - i]
        near = torch.sigmoid(u @ negative / 0.5)
        logistic = torch.sigmoid(-u @ positive / 0.5) / 0.5 * positive - near / 0.5 * negative
        margin = (u @ positive - u @ negative < 0.8) * (positive - negative)
        for loss, formula in ((simclr.nt_logistic(z1, z2, 0.5), logistic),
                              (simclr.margin_loss(z1, z2, 0.8), margin)):
            expected = gradient_on_the_sphere(-formula / 2, z1[i].detach())     # of the mean
            assert torch.allclose(torch.autograd.grad(loss, z1)[0][i], expected, atol=1e-12)

def test_semi_hard_negatives():
    """The nearest of those farther than the positive; none where all are nearer."""
    s = torch.tensor([[0.5, 0.4, 0.45, 0.9], [0.0, -1.0, 0.2, 0.3],
                      [0.1, 0.7, 0.8, 0.2], [0.9, 0.9, 0.9, 0.9]])
    weights = simclr.triples(s, semi_hard=True)
    assert weights.nonzero().tolist() == [[0, 2], [2, 1]] and weights.sum() == 1
    assert torch.equal(simclr.triples(s, semi_hard=False) > 0, ~torch.eye(4).bool())
    assert simclr.triples(torch.ones(3, 3), semi_hard=True).sum() == 0

def test_distribution_of_table_5():
    args = simclr.parse_args(["--temperature", "0.5", "--batch-size", "8"])
    z = torch.eye(8)
    wrong = torch.cat([z[:6], z[[7, 6]]])           # two of eight take another's place
    figures = simclr.for_the_log(3 * z, wrong, torch.tensor(1.0), args)
    assert figures["contrast_accuracy"].item() == 75
    p = torch.tensor([math.exp(2)] + 7 * [1.0]) / (math.exp(2) + 7)
    assert figures["contrast_entropy"].item() == pytest.approx(-(p * p.log()).sum().item())
    assert figures["bound"].item() == pytest.approx(math.log(15) - 1)
    args = simclr.parse_args(["--temperature", "10", "--loss", "unnormalized"])
    figures = simclr.for_the_log(30 * z, 10 * z, torch.tensor(1.0), args)
    assert figures["contrast_entropy"].item() < 0.01

def test_unnormalized_loss():
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, 6, 4, dtype=torch.float64)
    args = simclr.parse_args(["--temperature", "3", "--loss", "unnormalized"])
    unit = [F.normalize(z, dim=1) for z in (z1, z2)]
    assert torch.allclose(simclr.other_loss(*unit, args), simclr.nt_xent(z1, z2, 3), atol=1e-12)
    assert (simclr.other_loss(z1, z2, args) - simclr.nt_xent(z1, z2, 3)).abs() > 0.01

def test_gradient_of_two_processes_is_that_of_the_whole_batch():
    two_processes("nt_xent")

# ------------------------------------------------------------------- model and views

def test_model_is_the_papers():
    model = simclr.SimCLR("resnet18x0.25", "small", "nonlinear", 32)
    kinds = [type(module) for module in model.projector]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d]
    assert model(torch.rand(4, 3, 32, 32)).shape == (4, 32)
    for linear in (model.projector[0], model.projector[3]):
        assert linear.bias is None
        assert linear.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert model.projector[1].bias.requires_grad
    assert not model.projector[4].bias.requires_grad
    assert model.projector[4].weight.requires_grad
    assert all(not block.bn2.weight.any() for block in model.encoder.layer2)    # zero_init

@pytest.mark.parametrize("head,kinds", [("linear", [nn.Linear, nn.BatchNorm1d]), ("none", [])])
def test_other_projectors(head, kinds):
    projector = simclr.projector(8, head, 4)
    assert [type(module) for module in projector.children()] == kinds
    h = torch.randn(6, 8)
    if head == "none":
        assert torch.equal(projector(h), h)
    else:
        assert projector(h).shape == (6, 4)

def test_views_stay_in_0_to_1_and_the_blur_has_a_tenth_of_the_side(monkeypatch):
    taps = []
    blur = common.gaussian_blur

    def noting(x, p, sigma, kernel_size):
        taps.append((p, sigma, kernel_size))
        return blur(x, p, sigma, kernel_size)

    monkeypatch.setattr(common, "gaussian_blur", noting)
    x = torch.rand(2, 3, 224, 224)
    before = x.clone()
    views = simclr.augment(x, 1.0, 0.5)
    assert set(taps) == {(0.5, (0.1, 2.0), 23)}
    assert views.min() >= 0 and views.max() <= 1 and not torch.equal(views, x)
    assert torch.equal(x, before)

def test_operations_of_figure_5():
    torch.manual_seed(0)
    x = torch.rand(200, 3, 16, 16)
    for name, operation in simclr.FIGURE_5.items():
        same = operation(x.clone(), p=0)
        assert torch.equal(same, x), name
        given = x.clone()
        views = operation(given)
        assert views is given and views.min() >= 0 and views.max() <= 1
        changed = (views != x).flatten(1).any(1).float().mean().item()
        assert changed == pytest.approx(0.75 if name == "rotate" else 0.5, abs=0.12), name

def test_cutout_is_a_square_of_half_the_side():
    torch.manual_seed(0)
    grey = simclr.cutout(torch.zeros(3000, 3, 16, 16), p=1) == 0.5
    assert torch.equal(grey[:, 0], grey[:, 2])
    rows = grey[:, 0].any(2).sum(1)
    columns = grey[:, 0].any(1).sum(1)
    assert torch.equal(grey[:, 0].sum((1, 2)), rows * columns)
    assert set(rows.tolist()) | set(columns.tolist()) == {8}
    assert grey[:, 0].any(0).all()                              # anywhere

def test_sobel_finds_the_edge():
    x = torch.zeros(1, 3, 8, 8)
    x[..., 4:] = 1
    for image in (x, x.mT):
        edges = simclr.sobel(image.clone(), p=1)
        assert torch.allclose(edges.sum(), torch.tensor(3 * 2 * 8.0), rtol=1e-3)
        assert edges.amax() <= 1 and torch.equal(edges[:, 0], edges[:, 1])
    assert not simclr.sobel(torch.full((1, 3, 8, 8), 0.3), p=1).round(decimals=5).any()

def test_turns_are_as_likely():
    torch.manual_seed(0)
    x = torch.arange(16.0).view(1, 1, 4, 4).expand(800, 3, 4, 4) / 16
    views = simclr.rotate(x.clone())
    for turns in range(4):
        share = (views == x.rot90(turns, (2, 3))).flatten(1).all(1).float().mean().item()
        assert share == pytest.approx(0.25, abs=0.05)

def test_listed_operations():
    """The default list makes the default views; operations come in their order; "crop" alone
    leaves crops as they are."""
    x = torch.rand(300, 3, 40, 40)
    for listed, blur in (("crop,color", 0.0), ("crop,color,blur", 0.5), ("jitter,grayscale", 0.0)):
        torch.manual_seed(3)
        expected = simclr.augment(x, 0.7, blur)
        torch.manual_seed(3)
        assert torch.equal(simclr.augment_as_listed(x, listed, 0.7), expected)
    assert torch.equal(simclr.augment_as_listed(x, "crop", 1.0), x)
    cut = simclr.augment_as_listed(x, "sobel,cutout", 1.0)
    assert (cut == 0.5).flatten(1).any(1).sum() > 100           # no edges of the cut squares

@pytest.mark.parametrize("flags,same", [
    (["--asymmetric", "--augment", "color"], True), (["--asymmetric", "--augment", "crop"], True),
    (["--augment", "crop,color"], False), (["--augment", "rotate"], True)])
def test_views_of_figure_5(flags, same):
    """In the asymmetric study the second view is the crop; without "crop" both are of one crop."""
    torch.manual_seed(0)
    x1, x2 = torch.rand(2, 50, 3, 16, 16)
    args = simclr.parse_args([*flags, "--size", "16", "--min-scale", "0.1"])
    crop = common.Crop(2, 16, (0.1, 1.0), flip=0.5)
    views1, views2 = simclr.listed_views(x1, x2, crop, args).chunk(2)
    assert (views1 != x1).any()
    if args.asymmetric:
        assert torch.equal(views2, x1)
    else:
        of_one = common.to_gray(views2).mean() - common.to_gray(x1).mean()
        assert (of_one.abs() < 1e-4) == same

# ------------------------------------------------------------------- whole runs

@pytest.mark.parametrize("flags", [
    ["--augment", "crop,cutout,color,sobel,noise,blur,rotate"], ["--loss", "margin", "--semi-hard"],
    ["--asymmetric", "--augment", "crop,color"], ["--loss", "nt-logistic"],
    ["--loss", "unnormalized", "--temperature", "10"]])
def test_runs_of_the_experiments(flags, few_labelled, tmp_path):
    train(simclr, *RUN, *flags, "--epochs", 1, "--output", tmp_path)
    assert len(logged(tmp_path, "loss")) == 10
    assert all(0 <= accuracy <= 100 for accuracy in logged(tmp_path, "contrast_accuracy"))
    assert all(0 <= entropy <= math.log(40) for entropy in logged(tmp_path, "contrast_entropy"))

def test_order_of_a_step(few_labelled, tmp_path, monkeypatch):
    """Both views go through the network in one pass; then the loss, then the step."""
    calls = watch(monkeypatch, (simclr.SimCLR, "forward"), (simclr, "nt_xent"),
                  (common.LARS, "step"))
    train(simclr, *RUN, "--epochs", 1, "--temperature", 0.3, "--output", tmp_path)
    assert [name for name, _, _ in calls] == ["forward", "nt_xent", "step"] * 10
    _, (_, x), z = calls[0]
    _, (z1, z2, temperature), _ = calls[1]
    assert x.shape == (80, 3, 8, 8) and temperature == 0.3
    assert torch.equal(torch.cat([z1, z2]), z)

def test_loss_is_float32_in_a_bf16_run(few_labelled, tmp_path, monkeypatch):
    calls = watch(monkeypatch, (simclr.SimCLR, "forward"), (simclr, "nt_xent"))
    train(simclr, *RUN, "--epochs", 1, "--precision", "bf16", "--output", tmp_path)
    _, _, z = calls[0]
    _, (z1, z2, _), loss = calls[1]
    assert z.dtype == torch.bfloat16
    assert z1.dtype == z2.dtype == loss.dtype == torch.float32

def test_loss_bound_and_rate_in_the_log(few_labelled, tmp_path):
    train(simclr, *RUN, "--warmup-epochs", 1, "--lr", 2, "--temperature", 0.5, "--output", tmp_path)
    losses = logged(tmp_path, "loss")
    assert losses[0] == pytest.approx(math.log(79), abs=0.3)
    assert sum(losses[-10:]) < sum(losses[:10])
    expected = [math.log(79) - loss for loss in losses]
    assert logged(tmp_path, "bound") == pytest.approx(expected, abs=1e-5)
    peak = 2 * 40 / 256
    rates = [peak * step / 10 for step in range(10)]
    rates += [peak * (1 + math.cos(math.pi * step / 20)) / 2 for step in range(20)]
    assert logged(tmp_path, "lr") == pytest.approx(rates) and rates[0] == 0

def test_rate_by_the_square_root_of_the_batch(few_labelled, tmp_path):
    train(simclr, *RUN, "--epochs", 1, "--warmup-epochs", 0, "--lr", 0.3, "--lr-scaling", "sqrt",
          "--output", tmp_path)
    assert logged(tmp_path, "lr")[0] == pytest.approx(0.075 * math.sqrt(40))    # B.1

@pytest.mark.parametrize("flag,value", [
    ("--head", "deep"), ("--lr-scaling", "cubic"), ("--dim", "0"), ("--temperature", "-1"),
    ("--augment", "crop,colour"), ("--augment", ","), ("--loss", "triplet"), ("--margin", "-1")])
def test_mistakes_name_their_flag(flag, value, tmp_path):
    message = mistake(simclr, flag, value, "--output", tmp_path)
    assert flag in message and value.split(",")[-1] in message

def test_flags_that_go_together(tmp_path):
    assert "--augment" in mistake(simclr, "--asymmetric", "--output", tmp_path)
    assert "--loss" in mistake(simclr, "--semi-hard", "--output", tmp_path)

@pytest.mark.learning
def test_it_learns(tmp_path):
    """Three epochs of the default run instead of eight, at 16 pixels: far above the untrained
    network already."""
    result = run("simclr.py", "--epochs", 3, "--size", 16, "--output", tmp_path, threads=2)
    assert result.returncode == 0, result.stderr
    first, *_, last = common.read_log(tmp_path)
    assert last["knn"] > first["knn"] + 10
