"""byol.py: the loss beside equation 2, who gets a gradient and who an average, the order of a step,
the momentum of the target and the rates."""
import copy
import math

import pytest
import torch
from torch import nn

import byol
import common
from conftest import logged, mistake, tiny, train, two_processes, watch

# With `few_labelled` an epoch has 10 steps.
RUN = [*tiny("byol"), "--batch-size", "40", "--log-every", "1", "--knn-every", "0",
       "--dim", "16", "--hidden", "32"]

# ------------------------------------------------------------------- loss

def regression_loss_by_loops(p, z):
    """Equation 2: the squared distance of the vectors of unit length, coordinate by coordinate."""
    total = 0.0
    for u, v in zip(p, z):
        u_length = torch.sqrt(sum(a * a for a in u))
        v_length = torch.sqrt(sum(b * b for b in v))
        for a, b in zip(u, v):
            total += (a / u_length - b / v_length) ** 2
    return total / len(p)

@pytest.mark.parametrize("n,d", [(1, 2), (7, 5), (16, 32)])
def test_loss_and_its_gradient_equal_the_equation(n, d):
    torch.manual_seed(n)
    p = (5 * torch.randn(n, d, dtype=torch.float64)).requires_grad_()
    z = torch.randn(n, d, dtype=torch.float64)
    expected = regression_loss_by_loops(p, z)
    loss = byol.regression_loss(p, z)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    by_loops = torch.autograd.grad(expected, p)[0]
    assert (torch.autograd.grad(loss, p)[0] - by_loops).abs().max() < 1e-14
    single = byol.regression_loss(p.float(), z.float())
    assert single.item() == pytest.approx(expected.item(), rel=1e-5)

def test_loss_of_known_cases():
    torch.manual_seed(0)
    p = torch.randn(6, 8, dtype=torch.float64)
    assert byol.regression_loss(p, 2 * p).item() == pytest.approx(0, abs=1e-12)
    assert byol.regression_loss(p, -2 * p).item() == pytest.approx(4, rel=1e-12)
    right_angle = torch.cat([-p[:, 4:], p[:, :4]], dim=1)
    assert byol.regression_loss(p, right_angle).item() == pytest.approx(2, rel=1e-12)

def test_gradient_of_two_processes_is_that_of_the_whole_batch():
    two_processes("regression_loss")

# ------------------------------------------------------------------- model and views

def test_model_is_the_papers():
    model = byol.BYOL("resnet18x0.25", "small", 32, 8)
    kinds = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    for mlp in (model.projector, model.target_projector, model.predictor):
        assert [type(module) for module in mlp] == kinds
        assert mlp[0].bias is not None and mlp[3].bias is None
        assert mlp[0].out_features == 32 and mlp[3].out_features == 8
    assert not any(block.bn2.weight.any() for block in model.encoder.layer2)    # released code
    target = model.target_encoder.state_dict()
    assert all(torch.equal(v, target[k]) for k, v in model.encoder.state_dict().items())

def test_gradient_reaches_the_online_network_alone():
    torch.manual_seed(0)
    model = byol.BYOL("resnet10x0.125", "small", 32, 8)
    target_before = model.target_encoder.bn1.running_mean.clone()
    p1, p2, target1, target2, z1 = model(torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16))
    assert torch.allclose(model.predictor(z1), p1, atol=1e-6)
    (byol.regression_loss(p1, target2) + byol.regression_loss(p2, target1)).backward()
    for part in (model.target_encoder, model.target_projector):
        assert all(w.grad is None and not w.requires_grad for w in part.parameters())
    for part in (model.encoder, model.projector, model.predictor):
        assert all(w.grad is not None for w in part.parameters())
    # The target is in training mode too, with statistics of its own.
    assert not torch.equal(model.target_encoder.bn1.running_mean, target_before)

def test_target_averages_parameters_and_no_statistics():
    torch.manual_seed(0)
    model = byol.BYOL("resnet10x0.125", "small", 32, 8).double()
    online = {**model.encoder.state_dict(prefix="encoder."),
              **model.projector.state_dict(prefix="projector.")}
    for value in online.values():
        if value.is_floating_point():
            value += torch.randn_like(value)
    before = copy.deepcopy(model.state_dict())
    model.update_target(0.9)
    after = model.state_dict()
    for name, value in online.items():
        old = before[f"target_{name}"]
        if "running" in name or "tracked" in name:
            expected = old
        else:
            expected = 0.9 * old + 0.1 * value
        assert torch.allclose(after[f"target_{name}"], expected, rtol=0, atol=1e-12), name
        assert torch.equal(after[name], before[name])

def test_recipes_have_the_rate_decay_and_momentum_of_their_length():
    expected = {"imagenet-100": (100, 0.45, 1e-6, 0.99), "imagenet": (300, 0.3, 1e-6, 0.99),
                "imagenet-1000": (1000, 0.2, 1.5e-6, 0.996)}
    for recipe, values in expected.items():
        args = byol.parse_args(["--recipe", recipe])
        assert (args.epochs, args.lr, args.weight_decay, args.ema_momentum) == values
        assert (args.blur1, args.blur2, args.solarize2) == (1.0, 0.1, 0.2)
        assert args.batch_size == 4096 and args.warmup_epochs == 10

def test_solarisation_inverts_what_is_bright():
    x = torch.rand(5, 1, 12, 12).expand(5, 3, 12, 12)           # grey, which jitter of 0 leaves
    views = byol.augment(x, 0, 0, 1.0)
    expected = common.normalize(torch.where(x < 0.5, x, 1 - x), byol.MEAN, byol.STD)
    assert torch.allclose(views, expected, atol=2e-3)
    unchanged = common.normalize(x.clone(), byol.MEAN, byol.STD)
    assert torch.allclose(byol.augment(x, 0, 0, 0), unchanged, atol=2e-3)

def test_without_the_grey_views():
    """Figure 3b: what a probability of 0 takes away."""
    x = torch.rand(200, 3, 12, 12)
    for p, share in ((0.2, 0.2), (0.0, 0.0), (1.0, 1.0)):
        views = byol.augment(x, 0, 0, 0, p) * torch.tensor(byol.STD)[:, None, None]
        views = views + torch.tensor(byol.MEAN)[:, None, None]
        grey = (views[:, 0] - views[:, 1]).abs().flatten(1).amax(1) < 1e-4
        assert grey.float().mean().item() == pytest.approx(share, abs=0.1)

# ------------------------------------------------------------------- whole runs

def test_order_of_a_step(few_labelled, tmp_path, monkeypatch):
    """Each prediction meets the target's projection of the other view; the two losses are added."""
    calls = watch(monkeypatch, (byol.BYOL, "forward"), (byol, "regression_loss"),
                  (common.LARS, "step"), (byol.BYOL, "update_target"))
    train(byol, *RUN, "--epochs", 1, "--output", tmp_path)
    step = ["forward", "regression_loss", "regression_loss", "step", "update_target"]
    assert [name for name, _, _ in calls] == step * 10
    _, _, (p1, p2, target1, target2, _) = calls[0]
    assert torch.equal(calls[1][1][0], p1) and torch.equal(calls[1][1][1], target2)
    assert torch.equal(calls[2][1][0], p2) and torch.equal(calls[2][1][1], target1)
    losses = [loss.item() for name, _, loss in calls if name == "regression_loss"]
    sums = [losses[i] + losses[i + 1] for i in range(0, 20, 2)]
    assert logged(tmp_path, "loss") == pytest.approx(sums, abs=1e-5)
    assert 3 < sums[0] < 5                                      # about 4 at the start

def test_loss_is_float32_in_a_bf16_run(few_labelled, tmp_path, monkeypatch):
    calls = watch(monkeypatch, (byol.BYOL, "forward"), (byol, "regression_loss"))
    train(byol, *RUN, "--epochs", 1, "--precision", "bf16", "--output", tmp_path)
    _, _, (p1, *_) = calls[0]
    _, (p, z), loss = calls[1]
    assert p1.dtype == torch.bfloat16
    assert p.dtype == z.dtype == loss.dtype == torch.float32

def test_target_follows_the_new_weights_with_a_momentum_that_rises_to_1(few_labelled, tmp_path,
                                                                        monkeypatch):
    momenta = []
    weights = []                # of the online encoder, at each update
    update_target = byol.BYOL.update_target

    def checking(model, ema_momentum):
        theta = model.encoder.conv1.weight.detach().clone()
        xi = model.target_encoder.conv1.weight.detach().clone()
        update_target(model, ema_momentum)
        expected = ema_momentum * xi + (1 - ema_momentum) * theta
        assert torch.allclose(model.target_encoder.conv1.weight, expected, atol=1e-6)
        momenta.append(ema_momentum)
        weights.append(theta)

    monkeypatch.setattr(byol.BYOL, "update_target", checking)
    flags = [*RUN, "--ema-momentum", 0.9, "--warmup-epochs", 0, "--lr", 2]
    train(byol, *flags, "--output", tmp_path)
    expected = [1 - 0.1 * (math.cos(math.pi * k / 30) + 1) / 2 for k in range(30)]  # section 3.3
    assert momenta == pytest.approx(expected)
    args = byol.parse_args(list(map(str, flags)))
    torch.manual_seed(args.seed)
    start = byol.BYOL(args.arch, args.stem, args.hidden, args.dim)
    assert not torch.equal(weights[0], start.encoder.conv1.weight)      # the step came first

@pytest.mark.parametrize("ema_momentum", [0, 1])
def test_targets_that_follow_at_once_or_never(ema_momentum, few_labelled, tmp_path):
    """Table 5a."""
    flags = [*RUN, "--epochs", 1, "--ema-momentum", ema_momentum, "--lr", 2]
    train(byol, *flags, "--output", tmp_path)
    saved = common.read_checkpoint(tmp_path / "checkpoint.pt")["model"]
    args = byol.parse_args(list(map(str, flags)))
    torch.manual_seed(args.seed)
    start = byol.BYOL(args.arch, args.stem, args.hidden, args.dim).state_dict()
    target = saved["target_encoder.conv1.weight"]
    assert torch.equal(target, saved["encoder.conv1.weight"]) == (ema_momentum == 0)
    assert torch.equal(target, start["encoder.conv1.weight"]) == (ema_momentum == 1)

def test_rate_warms_up_from_0_and_falls_on_a_cosine(few_labelled, tmp_path):
    train(byol, *RUN, "--epochs", 2, "--warmup-epochs", 1, "--lr", 2, "--output", tmp_path)
    peak = 2 * 40 / 256
    expected = [peak * step / 10 for step in range(10)]
    expected += [peak * (1 + math.cos(math.pi * step / 10)) / 2 for step in range(10)]
    assert logged(tmp_path, "lr") == pytest.approx(expected)

@pytest.mark.parametrize("flag,value", [
    ("--ema-momentum", "x"), ("--ema-momentum", "1.5"), ("--solarize2", "2"), ("--hidden", "0")])
def test_mistakes_name_their_flag(flag, value, tmp_path):
    message = mistake(byol, flag, value, "--output", tmp_path)
    assert flag in message and value in message
