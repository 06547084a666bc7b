"""byol.py: the loss against its equation, who gets gradient and average, accumulation, one process against two, whole runs."""
import math

import pytest
import torch
from torch import nn

import byol
import common
from conftest import BOOKS, TINY, check_resuming, check_two_processes, logged, mistake, train, watch

TINY = [*TINY, "--dim", "16", "--hidden", "32", "--lr", "2"]


def regression_loss_by_loops(p, z):
    """Equation 2, one image and one coordinate at a time."""
    total = 0.0
    for u, v in zip(p.double(), z.double()):
        a, b = math.sqrt(sum(float(x) ** 2 for x in u)), math.sqrt(sum(float(x) ** 2 for x in v))
        total += sum((float(x) / a - float(y) / b) ** 2 for x, y in zip(u, v))
    return total / len(p)


@pytest.mark.parametrize("n,d", [(1, 2), (7, 5), (16, 32)])
def test_loss_equals_its_equation(n, d):
    torch.manual_seed(n)
    p, z = 5 * torch.randn(n, d, dtype=torch.float64), torch.randn(n, d, dtype=torch.float64)
    expected = regression_loss_by_loops(p, z)
    assert byol.regression_loss(p, z).item() == pytest.approx(expected, rel=1e-10)
    assert byol.regression_loss(p.float(), z.float()).item() == pytest.approx(expected, rel=1e-5)
    assert byol.regression_loss(p, -2 * p).item() == pytest.approx(4, rel=1e-12)
    assert byol.regression_loss(p.bfloat16(), z.bfloat16()).dtype == torch.float32


def test_target_gets_no_gradient_and_averages_parameters_only():
    torch.manual_seed(0)
    model = byol.BYOL("resnet10x0.25", "small", 32, 8)
    p1, p2, target1, target2, z1 = model(torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16))
    (byol.regression_loss(p1, target2) + byol.regression_loss(p2, target1)).backward()
    assert all(w.grad is None for m in (model.target_encoder, model.target_projector) for w in m.parameters())
    assert all(w.grad is not None for m in (model.encoder, model.projector, model.predictor) for w in m.parameters())
    with torch.no_grad():
        for w in model.encoder.parameters():
            w += torch.randn_like(w)
        model.encoder.bn1.running_mean += 1
    before = {k: v.clone() for k, v in model.target_encoder.state_dict().items()}
    online = model.encoder.state_dict()
    model.update_target(0.9)
    for k, v in model.target_encoder.state_dict().items():
        expected = before[k] if "running" in k or "tracked" in k else 0.9 * before[k] + 0.1 * online[k]
        assert torch.allclose(v.double(), expected.double(), atol=1e-6), k
    assert [type(m) for m in model.predictor] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]


def test_presets_change_rate_decay_and_momentum():
    settings = {n: vars(byol.parse_args(["--recipe", f"imagenet-{n}"])) for n in (100, 300, 1000)}
    assert [(s["epochs"], s["lr"], s["weight_decay"], s["ema_momentum"]) for s in settings.values()] == [
        (100, 0.45, 1e-6, 0.99), (300, 0.3, 1e-6, 0.99), (1000, 0.2, 1.5e-6, 0.996)]
    assert (settings[300]["blur1"], settings[300]["blur2"], settings[300]["solarize2"]) == (1.0, 0.1, 0.2)


def test_gradient_of_two_processes_is_that_of_the_whole_batch(tmp_path):
    check_two_processes(tmp_path, """
import byol
class Online(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.q = torch.nn.Linear(12, 6), torch.nn.Linear(6, 6)
    def forward(self, x1, x2):
        z1, z2 = self.f(x1), self.f(x2)
        return self.q(z1), self.q(z2)
model, target = Online().double(), torch.nn.Linear(12, 6).double().requires_grad_(False)
x1, x2 = torch.randn(2, 8, 12, dtype=torch.float64)
def loss(network, mine):
    p1, p2 = network(x1[mine], x2[mine])
    return byol.regression_loss(p1, target(x2[mine])) + byol.regression_loss(p2, target(x1[mine]))
""")


def test_accumulated_step_is_the_step_of_the_large_batch(tmp_path, monkeypatch):
    """On a model without BN: `byol.train` itself, once with the whole batch and once in four pieces."""
    monkeypatch.setitem(common.NORMS, "batch", common.NORMS["layer"])
    monkeypatch.setattr(byol, "mlp", lambda dim_in, hidden, dim: nn.Sequential(nn.Linear(dim_in, hidden), nn.ReLU(), nn.Linear(hidden, dim)))
    weights = []
    for accumulate in ("1", "4"):
        train(byol, *TINY, "--epochs", 1, "--batch-size", 496, "--accumulate", accumulate, "--output", tmp_path / accumulate)
        weights.append(torch.load(tmp_path / accumulate / "checkpoint.pt")["model"])
    for k, v in weights[0].items():
        assert (v - weights[1][k]).norm() <= 1e-4 * v.norm() + 1e-7, k


def test_momentum_rises_to_1_and_the_two_orders_are_added(tmp_path, monkeypatch):
    calls = watch(monkeypatch, (byol.BYOL, "forward"), (common.LARS, "step"), (byol.BYOL, "update_target"))
    real = byol.regression_loss
    monkeypatch.setattr(byol, "regression_loss", lambda p, z: 0 * real(p, z) + 1.5)
    train(byol, *TINY, "--ema-momentum", 0.9, "--log-every", 1, "--knn-every", 0, "--output", tmp_path)
    assert [name for name, _, _ in calls] == ["forward", "step", "update_target"] * 30
    momenta = [args[1] for name, args, _ in calls if name == "update_target"]
    assert momenta == pytest.approx([1 - 0.1 * (math.cos(math.pi * k / 30) + 1) / 2 for k in range(30)])      # section 3.3
    assert logged(tmp_path, "loss") == pytest.approx([3.0] * 30)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_run_that_was_killed_is_the_run_that_was_not(tmp_path, processes):
    check_resuming(tmp_path, byol, *TINY, *BOOKS, processes=processes)


def test_misuse(tmp_path, capsys):
    for args, words in ((["--ema-momentum", "x"], "--ema-momentum"), (["--accumulate", "7"], "--accumulate 7: does not cut the 64 images"),
                        (["--batch-size", "9999"], "larger than the data set")):
        assert words in mistake(byol, [*args, "--output", tmp_path]) + capsys.readouterr().err
