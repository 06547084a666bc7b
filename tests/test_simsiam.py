"""simsiam.py: the loss beside its equations, where the gradient stops, the kinds of predictor, the
rates, and what collapses."""
import math

import pytest
import torch
from torch import nn

import common
import simsiam
from conftest import logged, mistake, tiny, train, two_processes, watch

# With `few_labelled` an epoch has 10 steps.
RUN = [*tiny("simsiam"), "--batch-size", "40", "--log-every", "1", "--knn-every", "0",
       "--dim", "64", "--hidden", "16"]

# ------------------------------------------------------------------- loss

def negative_cosine_by_loops(p, z):
    """Equation 1, one image and one coordinate at a time."""
    total = 0.0
    for u, v in zip(p, z):
        product = 0.0
        u_squared = 0.0
        v_squared = 0.0
        for a, b in zip(u, v):
            product += a * b
            u_squared += a * a
            v_squared += b * b
        total -= product / torch.sqrt(u_squared * v_squared)
    return total / len(p)

@pytest.mark.parametrize("n,d", [(1, 2), (7, 5), (16, 32)])
def test_loss_and_its_gradient_equal_the_equation(n, d):
    torch.manual_seed(n)
    p = (5 * torch.randn(n, d, dtype=torch.float64)).requires_grad_()
    z = torch.randn(n, d, dtype=torch.float64)
    expected = negative_cosine_by_loops(p, z)
    loss = simsiam.negative_cosine(p, z)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12, abs=1e-14)
    by_loops = torch.autograd.grad(expected, p)[0]
    assert (torch.autograd.grad(loss, p)[0] - by_loops).abs().max() < 1e-14
    single = simsiam.negative_cosine(p.float(), z.float())
    assert single.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)

def test_loss_of_known_cases():
    torch.manual_seed(0)
    p = torch.randn(6, 8, dtype=torch.float64)
    assert simsiam.negative_cosine(p, 3 * p).item() == pytest.approx(-1, rel=1e-12)
    assert simsiam.negative_cosine(p, -p).item() == pytest.approx(1, rel=1e-12)
    right_angle = torch.cat([-p[:, 4:], p[:, :4]], dim=1)
    assert simsiam.negative_cosine(p, right_angle).item() == pytest.approx(0, abs=1e-12)

def test_gradient_stops_at_z():
    p = torch.randn(4, 8, requires_grad=True)
    z = torch.randn(4, 8, requires_grad=True)
    simsiam.negative_cosine(p, z).backward()
    assert p.grad.any() and z.grad is None
    simsiam.negative_cosine(p, z, stop_gradient=False).backward()
    assert z.grad.any()

def test_gradient_of_two_processes_is_that_of_the_whole_batch():
    two_processes("negative_cosine")

# ------------------------------------------------------------------- model

def test_model_is_the_papers():
    model = simsiam.SimSiam("resnet18x0.25", "small", 3, 64, 16, "trained")
    kinds = [type(module) for module in model.projector]
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert kinds == [*hidden, *hidden, nn.Linear, nn.BatchNorm1d]
    assert model.projector[1].affine and not model.projector[-1].affine
    assert [type(module) for module in model.predictor] == [*hidden, nn.Linear]
    assert model.predictor[0].out_features == 16
    assert model.predictor[0].bias is None and model.predictor[3].bias is not None
    assert all(not block.bn2.weight.any() for block in model.encoder.layer2)    # zero_init
    p1, p2, z1, z2 = model(torch.rand(4, 3, 32, 32), torch.rand(4, 3, 32, 32))
    assert p1.shape == p2.shape == z1.shape == z2.shape == (4, 64)
    assert torch.allclose(model.predictor(z2), p2, atol=1e-6)
    assert len(simsiam.projector(8, 2, 4)) == 5

@pytest.mark.parametrize("head_norm,norms", [("none", (0, 0)), ("hidden", (1, 1)),
                                             ("default", (2, 1)), ("all", (2, 2))])
def test_norms_of_the_heads(head_norm, norms):
    """Table 3: BN in the projector of two layers and in the predictor."""
    model = simsiam.SimSiam("resnet10x0.125", "small", 2, 8, 4, "trained", head_norm)
    for head, number in zip((model.projector, model.predictor), norms):
        kinds = [type(module) for module in head]
        assert kinds.count(nn.BatchNorm1d) == number
        assert kinds.count(nn.Linear) == 2 and kinds.count(nn.ReLU) == 1
        assert (kinds[-1] is nn.BatchNorm1d) == (head_norm == "all"
                                                 or head_norm == "default" and number == 2)
    p1, *_ = model(torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8))
    assert p1.shape == (4, 8)

def test_targets_of_earlier_weights():
    """Section 5: the targets are z of the weights at the last update, in training mode."""
    torch.manual_seed(0)
    model = simsiam.SimSiam("resnet10x0.125", "small", 2, 8, 4, "trained", alternate=3)
    model.encoder.bn1.weight.data += torch.rand(8)
    x1, x2 = torch.rand(2, 6, 3, 8, 8)
    before = model.projector(model.encoder(x2))
    model.fix_targets(3)
    for step in (4, 5):
        model.fix_targets(step)
        for weight in [*model.encoder.parameters(), *model.projector.parameters()]:
            weight.data += 0.05 * torch.randn_like(weight)
        _, _, _, target2 = model(x1, x2)
        assert torch.allclose(target2, before, atol=1e-5) and not target2.requires_grad
    p1, p2, _, _ = model(x1, x2)
    assert torch.allclose(p1, model.predictor(model.projector(model.encoder(x1))), atol=1e-5)
    model.fix_targets(6)
    _, _, _, target2 = model(x1, x2)
    assert torch.allclose(target2, model.projector(model.encoder(x2)), atol=1e-5)
    assert not torch.allclose(target2, before, atol=0.01)

def test_each_view_has_its_own_batch_statistics():
    torch.manual_seed(0)
    model = simsiam.SimSiam("resnet10x0.125", "small", 2, 8, 4, "none")
    x1 = torch.rand(6, 3, 8, 8)
    x2 = 0.1 * torch.rand(6, 3, 8, 8)
    p1, p2, z1, z2 = model(x1, x2)
    assert torch.equal(p1, z1) and torch.equal(p2, z2)          # no predictor
    assert torch.allclose(z1.mean(0), torch.zeros(8), atol=1e-5)
    assert torch.allclose(z2.mean(0), torch.zeros(8), atol=1e-5)

# ------------------------------------------------------------------- whole runs

def test_order_of_a_step(few_labelled, tmp_path, monkeypatch):
    """Each prediction meets the projection of the other view, and the loss is their mean."""
    calls = watch(monkeypatch, (simsiam.SimSiam, "forward"), (simsiam, "negative_cosine"),
                  (common.LARS, "step"))
    train(simsiam, *RUN, "--epochs", 1, "--output", tmp_path)
    step = ["forward", "negative_cosine", "negative_cosine", "step"]
    assert [name for name, _, _ in calls] == step * 10
    _, _, (p1, p2, z1, z2) = calls[0]
    first = calls[1][1]
    second = calls[2][1]
    assert torch.equal(first[0], p1) and torch.equal(first[1], z2) and first[2] is True
    assert torch.equal(second[0], p2) and torch.equal(second[1], z1) and second[2] is True
    losses = [loss.item() for name, _, loss in calls if name == "negative_cosine"]
    means = [(losses[i] + losses[i + 1]) / 2 for i in range(0, 20, 2)]
    assert logged(tmp_path, "loss") == pytest.approx(means, abs=1e-6)
    assert abs(means[0]) < 0.3                                  # near 0 at the start

def test_loss_is_float32_in_a_bf16_run(few_labelled, tmp_path, monkeypatch):
    calls = watch(monkeypatch, (simsiam.SimSiam, "forward"), (simsiam, "negative_cosine"))
    train(simsiam, *RUN, "--epochs", 1, "--precision", "bf16", "--output", tmp_path)
    _, _, (p1, *_) = calls[0]
    _, (p, z, _), loss = calls[1]
    assert p1.dtype == torch.bfloat16
    assert p.dtype == z.dtype == loss.dtype == torch.float32

def rates_of_groups(monkeypatch, optimizer):
    """The list to which every step of the class `optimizer` adds the rates of all groups."""
    rates = []
    step = optimizer.step

    def noting(self, *args):
        rates.append([group["lr"] for group in self.param_groups])
        return step(self, *args)

    monkeypatch.setattr(optimizer, "step", noting)
    return rates

@pytest.mark.parametrize("kind", ["trained", "decayed", "fixed", "none"])
def test_kinds_of_predictor(kind, few_labelled, tmp_path, monkeypatch):
    """Section 4.2: the predictor keeps its rate while the rest follows the cosine, or its rate
    decays as well, or it stays as it was drawn, or there is none."""
    rates = rates_of_groups(monkeypatch, torch.optim.SGD)
    flags = [*RUN, "--epochs", 2, "--optimizer", "sgd", "--lr", 0.5, "--warmup-epochs", 0,
             "--predictor", kind]
    train(simsiam, *flags, "--output", tmp_path)
    peak = 0.5 * 40 / 256
    cosine = [peak * (1 + math.cos(math.pi * step / 20)) / 2 for step in range(20)]
    assert [of_encoder for of_encoder, _ in rates] == pytest.approx(cosine)
    assert logged(tmp_path, "lr") == pytest.approx(cosine)
    expected = cosine if kind == "decayed" else [peak] * 20
    assert [of_predictor for _, of_predictor in rates] == pytest.approx(expected)

    args = simsiam.parse_args(list(map(str, flags)))
    torch.manual_seed(args.seed)
    start = simsiam.SimSiam(args.arch, args.stem, args.layers, args.dim, args.hidden, kind)
    end = common.read_checkpoint(tmp_path / "checkpoint.pt")["model"]
    moved = [not torch.equal(end[f"predictor.{name}"], weight)
             for name, weight in start.predictor.named_parameters()]
    assert moved == {"fixed": [False] * 5, "none": []}.get(kind, [True] * 5)
    assert not torch.equal(end["encoder.conv1.weight"], start.encoder.conv1.weight)

def test_asymmetric_loss(few_labelled, tmp_path, monkeypatch):
    calls = watch(monkeypatch, (simsiam.SimSiam, "forward"), (simsiam, "negative_cosine"))
    train(simsiam, *RUN, "--epochs", 1, "--asymmetric", "--output", tmp_path)
    assert [name for name, _, _ in calls] == ["forward", "negative_cosine"] * 10
    _, _, (p1, _, _, z2) = calls[0]
    assert torch.equal(calls[1][1][0], p1) and torch.equal(calls[1][1][1], z2)
    losses = [loss.item() for name, _, loss in calls if name == "negative_cosine"]
    assert logged(tmp_path, "loss") == pytest.approx(losses)

def test_alternating_optimisation(few_labelled, tmp_path):
    """Targets of one step's age at most are SimSiam; older ones are not, and are in the checkpoint,
    by which a run resumes between two updates."""
    losses = {}
    for steps in (1, 4):
        train(simsiam, *RUN, "--epochs", 1, "--alternate", steps, "--output", tmp_path / str(steps))
        losses[steps] = logged(tmp_path / str(steps), "loss")
    assert losses[1][0] == pytest.approx(losses[4][0], abs=1e-6)
    assert losses[1][3] != pytest.approx(losses[4][3], abs=1e-6)
    saved = common.read_checkpoint(tmp_path / "4/checkpoint.pt")["model"]
    assert not torch.equal(saved["targets.0.conv1.weight"], saved["encoder.conv1.weight"])
    message = mistake(simsiam, "--alternate", 4, "--no-stop-gradient", "--output", tmp_path / "5")
    assert "--alternate 4" in message

def test_rate_warms_up_from_0(few_labelled, tmp_path):
    train(simsiam, *RUN, "--epochs", 2, "--warmup-epochs", 1, "--lr", 2, "--output", tmp_path)
    peak = 2 * 40 / 256
    expected = [peak * step / 10 for step in range(10)]
    expected += [peak * (1 + math.cos(math.pi * step / 10)) / 2 for step in range(10)]
    assert logged(tmp_path, "lr") == pytest.approx(expected)

@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--no-stop-gradient"], ["--predictor", "none"]])
def test_what_collapses(flags, tmp_path):
    """Sections 4.1 and 4.2, two epochs of the default run: without stop-gradient or predictor the
    loss falls towards -1 and the spread of z falls, and neighbours are hardly better than those of
    the untrained network."""
    train(simsiam, "--epochs", 2, *flags, "--knn-every", 2, "--output", tmp_path)
    first, *_, last = common.read_log(tmp_path)
    spread = logged(tmp_path, "z_std")
    losses = logged(tmp_path, "loss")
    assert spread[0] > 0.9
    if flags:
        assert min(spread) < 0.5 and spread[-1] < 0.6
        assert min(losses) < -0.9
        assert last["knn"] < first["knn"] + 6
    else:
        assert min(spread) > 0.6
        assert min(losses) > -0.85
        assert last["knn"] > first["knn"] + 12

@pytest.mark.parametrize("flag,value", [
    ("--layers", "0"), ("--layers", "1000000000"), ("--hidden", "few"), ("--predictor", "frozen"),
    ("--optimizer", "adam")])
def test_mistakes_name_their_flag(flag, value, tmp_path):
    message = mistake(simsiam, flag, value, "--output", tmp_path)
    assert flag in message and value in message
