"""simclr.py: the loss beside equation 1, the model, the order of a step, the rates; it learns."""
import math

import pytest
import torch
from torch import nn

import common
import simclr
from conftest import logged, mistake, run, tiny, train, two_processes, watch

# With `few_images` an epoch has 10 steps.
RUN = [*tiny("simclr"), "--batch-size", "40", "--log-every", "1", "--knn-every", "0"]

@pytest.fixture
def few_images(monkeypatch):
    """A run has 416 images instead of 5000 and draws no curves: it takes a second."""
    draw = common.draw_shapes
    monkeypatch.setattr(common, "draw_shapes", lambda n, seed: draw(n // 12, seed))
    monkeypatch.setattr(common, "draw_curves", lambda runs, path: None)
    common.load_data.cache_clear()
    yield
    common.load_data.cache_clear()

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

# ------------------------------------------------------------------- whole runs

def test_order_of_a_step(few_images, tmp_path, monkeypatch):
    """Both views go through the network in one pass; then the loss, then the step."""
    calls = watch(monkeypatch, (simclr.SimCLR, "forward"), (simclr, "nt_xent"),
                  (common.LARS, "step"))
    train(simclr, *RUN, "--epochs", 1, "--temperature", 0.3, "--output", tmp_path)
    assert [name for name, _, _ in calls] == ["forward", "nt_xent", "step"] * 10
    _, (_, x), z = calls[0]
    _, (z1, z2, temperature), _ = calls[1]
    assert x.shape == (80, 3, 8, 8) and temperature == 0.3
    assert torch.equal(torch.cat([z1, z2]), z)

def test_loss_is_float32_in_a_bf16_run(few_images, tmp_path, monkeypatch):
    calls = watch(monkeypatch, (simclr.SimCLR, "forward"), (simclr, "nt_xent"))
    train(simclr, *RUN, "--epochs", 1, "--precision", "bf16", "--output", tmp_path)
    _, _, z = calls[0]
    _, (z1, z2, _), loss = calls[1]
    assert z.dtype == torch.bfloat16
    assert z1.dtype == z2.dtype == loss.dtype == torch.float32

def test_loss_bound_and_rate_in_the_log(few_images, tmp_path):
    train(simclr, *RUN, "--warmup-epochs", 1, "--lr", 2, "--output", tmp_path)
    losses = logged(tmp_path, "loss")
    assert losses[0] == pytest.approx(math.log(79), abs=0.3)
    assert sum(losses[-10:]) < sum(losses[:10])
    expected = [math.log(79) - loss for loss in losses]
    assert logged(tmp_path, "bound") == pytest.approx(expected, abs=1e-5)
    peak = 2 * 40 / 256
    rates = [peak * step / 10 for step in range(10)]
    rates += [peak * (1 + math.cos(math.pi * step / 20)) / 2 for step in range(20)]
    assert logged(tmp_path, "lr") == pytest.approx(rates) and rates[0] == 0

def test_rate_by_the_square_root_of_the_batch(few_images, tmp_path):
    train(simclr, *RUN, "--epochs", 1, "--warmup-epochs", 0, "--lr", 0.3, "--lr-scaling", "sqrt",
          "--output", tmp_path)
    assert logged(tmp_path, "lr")[0] == pytest.approx(0.075 * math.sqrt(40))    # B.1

@pytest.mark.parametrize("flag,value", [
    ("--head", "deep"), ("--lr-scaling", "cubic"), ("--dim", "0"), ("--temperature", "-1")])
def test_mistakes_name_their_flag(flag, value, tmp_path):
    message = mistake(simclr, flag, value, "--output", tmp_path)
    assert flag in message and value in message

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("flags", [[], ["--precision", "fp32"], ["--compile"]])
def test_training_on_a_gpu(flags, tmp_path):
    result = run("simclr.py", *tiny("simclr"), *flags, "--output", tmp_path, timeout=400)
    assert result.returncode == 0, result.stderr

@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_training_on_all_gpus(tmp_path):
    result = run("simclr.py", *tiny("simclr"), "--output", tmp_path,
                 processes=torch.cuda.device_count())
    assert result.returncode == 0, result.stderr

@pytest.mark.learning
def test_it_learns(tmp_path):
    """Five epochs of the default run instead of thirteen: above the untrained network and above
    the pixels already."""
    result = run("simclr.py", "--epochs", 5, "--output", tmp_path, threads=2, timeout=1800)
    assert result.returncode == 0, result.stderr
    first, *_, last = common.read_log(tmp_path)
    assert first["knn"] < 35 and first["knn_pixels"] < 55
    assert last["knn"] > first["knn_pixels"] + 5
