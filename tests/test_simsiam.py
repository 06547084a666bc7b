"""simsiam.py: the loss against its equation, where the gradient goes, one process against two, whole runs."""
import math

import pytest
import torch
from torch import nn

import common
import simsiam
from conftest import BOOKS, TINY, check_resuming, check_two_processes, logged, mistake, train

TINY = [*TINY, "--dim", "64", "--hidden", "16", "--lr", "2"]


def negative_cosine_by_loops(p, z):
    """Equation 1, one image at a time."""
    p, z = p.double(), z.double()
    return -sum(sum(float(a) * float(b) for a, b in zip(u, v)) / math.sqrt(sum(float(a) ** 2 for a in u)) / math.sqrt(sum(float(b) ** 2 for b in v))
                for u, v in zip(p, z)) / len(p)


@pytest.mark.parametrize("n,d", [(1, 2), (7, 5), (16, 32)])
def test_loss_equals_its_equation(n, d):
    torch.manual_seed(n)
    p, z = 5 * torch.randn(n, d, dtype=torch.float64), torch.randn(n, d, dtype=torch.float64)
    expected = negative_cosine_by_loops(p, z)
    assert simsiam.negative_cosine(p, z).item() == pytest.approx(expected, rel=1e-10)
    assert simsiam.negative_cosine(p.float(), z.float()).item() == pytest.approx(expected, rel=1e-5)
    assert simsiam.negative_cosine(p, 3 * p).item() == pytest.approx(-1, rel=1e-12)
    assert simsiam.negative_cosine(p.bfloat16(), z.bfloat16()).dtype == torch.float32


def test_gradient_stops_at_z():
    p, z = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    simsiam.negative_cosine(p, z).backward()
    assert p.grad is not None and z.grad is None
    simsiam.negative_cosine(p, z, stop_gradient=False).backward()
    assert z.grad is not None


def test_model_is_the_papers():
    model = simsiam.SimSiam("resnet18x0.25", "small", 3, 64, 16)
    assert [type(m) for m in model.projector] == [nn.Linear, nn.BatchNorm1d, nn.ReLU] * 2 + [nn.Linear, nn.BatchNorm1d]
    assert not model.projector[-1].affine and model.projector[1].affine
    assert [type(m) for m in model.predictor] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear] and model.predictor[0].out_features == 16
    p1, p2, z1, z2 = model(torch.rand(4, 3, 32, 32), torch.rand(4, 3, 32, 32))
    assert p1.shape == z2.shape == (4, 64)
    assert isinstance(simsiam.SimSiam("resnet10x0.25", "small", 2, 8, 4, with_predictor=False).predictor, nn.Identity)


def test_gradient_of_two_processes_is_that_of_the_whole_batch(tmp_path):
    check_two_processes(tmp_path, """
import simsiam
class Twins(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.h = torch.nn.Linear(12, 6), torch.nn.Linear(6, 6)
    def forward(self, x1, x2):
        z1, z2 = self.f(x1), self.f(x2)
        return self.h(z1), self.h(z2), z1, z2
model = Twins().double()
x1, x2 = torch.randn(2, 8, 12, dtype=torch.float64)
def loss(network, mine):
    p1, p2, z1, z2 = network(x1[mine], x2[mine])
    return simsiam.negative_cosine(p1, z2) / 2 + simsiam.negative_cosine(p2, z1) / 2
""")


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_run_that_was_killed_is_the_run_that_was_not(tmp_path, processes):
    check_resuming(tmp_path, simsiam, *TINY, *BOOKS, processes=processes)


def test_predictor_keeps_its_rate_and_the_rest_follows_the_cosine(tmp_path):
    train(simsiam, *TINY, "--optimizer", "sgd", "--warmup-epochs", 0, "--output", tmp_path)
    groups = torch.load(tmp_path / "checkpoint.pt")["optimizer"]["param_groups"]
    peak = 2 * 500 / 256
    assert groups[0]["lr"] == pytest.approx(peak * (1 + math.cos(math.pi * 29 / 30)) / 2) and groups[1]["lr"] == peak


@pytest.mark.slow
def test_what_collapses_without_stop_gradient_or_predictor(tmp_path):
    """Sections 4.1 and 4.2, two epochs of the default recipe each: the spread of z falls and the neighbours are no better than an untrained network's."""
    torch.manual_seed(0)
    encoder = simsiam.SimSiam("resnet10x0.25", "small", 2, 8, 4).encoder
    bank, queries = (common.features(encoder, common.load_data("shapes", split=split), dict(size=32, mean=simsiam.MEAN, std=simsiam.STD,
                                                                                            interpolation="bilinear")) for split in ("train", "val"))
    untrained = common.knn_accuracy(*bank, *queries)
    for switch in ([], ["--no-stop-gradient"], ["--no-predictor"]):
        folder = tmp_path / "".join(["run", *switch])
        train(simsiam, "--epochs", 2 if switch else 1, *switch, "--knn-every", 0, "--output", folder)
        spread = logged(folder, "z_std")
        if switch:
            assert min(spread) < 0.5 and spread[-1] < 0.6 and spread[0] > 0.9, (switch, spread)
            assert common.read_checkpoint(folder / "checkpoint.pt")["knn"] <= untrained + 1, switch
        else:
            assert min(spread) > 0.9, spread


def test_misuse(tmp_path, capsys):
    for args, words in ((["--layers", "0"], "--layers"), (["--hidden", "few"], "--hidden"), (["--batch-size", "9999"], "larger than the data set")):
        assert words in mistake(simsiam, [*args, "--output", tmp_path]) + capsys.readouterr().err
