"""supcon.py: the loss against its equation and against NT-Xent, one process against two, labels, whole runs."""
import math

import pytest
import torch

import simclr
import supcon
from conftest import BOOKS, TINY, check_resuming, check_two_processes, logged, mistake, one_line, run, train, watch

TINY = [*TINY, "--dim", "16"]


def supervised_contrastive_by_loops(z1, z2, labels, temperature, base_temperature):
    """Equation 2, one anchor, positive and candidate at a time."""
    z = [[float(x) / math.sqrt(sum(float(y) ** 2 for y in row)) for x in row] for row in torch.cat([z1, z2]).double()]
    y = [*labels.tolist(), *labels.tolist()]
    s = lambda i, j: math.exp(sum(a * b for a, b in zip(z[i], z[j])) / temperature)
    total = 0.0
    for i in range(len(z)):
        positives = [p for p in range(len(z)) if p != i and y[p] == y[i]]
        denominator = sum(s(i, a) for a in range(len(z)) if a != i)
        total -= sum(math.log(s(i, p) / denominator) for p in positives) / len(positives)
    return temperature / base_temperature * total / len(z)


@pytest.mark.parametrize("n,d,temperature,labels", [(1, 3, 0.5, [4]), (6, 8, 0.1, [0, 1, 0, 2, 1, 0]), (7, 5, 1.0, [3] * 7), (5, 16, 0.2, [9, 8, 7, 6, 6])])
def test_loss_equals_its_equation(n, d, temperature, labels):
    torch.manual_seed(n)
    z1, z2, labels = 3 * torch.randn(n, d, dtype=torch.float64), torch.randn(n, d, dtype=torch.float64), torch.tensor(labels)
    expected = supervised_contrastive_by_loops(z1, z2, labels, temperature, 0.07)
    assert supcon.supervised_contrastive(z1, z2, labels, temperature, 0.07).item() == pytest.approx(expected, rel=1e-10)
    assert supcon.supervised_contrastive(z1.float(), z2.float(), labels, temperature, 0.07).item() == pytest.approx(expected, rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert supcon.supervised_contrastive(z1.float(), z2.float(), labels, temperature, 0.07).item() == pytest.approx(expected, rel=1e-5)
    same = torch.ones(n, d, dtype=torch.float64)
    assert supcon.supervised_contrastive(same, same, labels, temperature, temperature).item() == pytest.approx(math.log(2 * n - 1), abs=1e-12)


def test_with_all_labels_different_it_is_nt_xent_and_the_base_temperature_multiplies_the_gradient():
    torch.manual_seed(0)
    z = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    gradient = lambda loss: torch.autograd.grad(loss, z)[0]
    reference = simclr.nt_xent(z[0], z[1], 0.5)
    for base, factor in ((0.5, 1), (0.07, 0.5 / 0.07)):
        loss = supcon.supervised_contrastive(z[0], z[1], torch.arange(9), 0.5, base)
        assert loss.item() == pytest.approx(factor * reference.item(), rel=1e-12)
        assert torch.allclose(gradient(loss), factor * gradient(simclr.nt_xent(z[0], z[1], 0.5)), rtol=1e-10, atol=1e-14)
    assert supcon.supervised_contrastive(z[0], z[1], torch.zeros(9), 0.5, 0.5).item() != pytest.approx(reference.item(), rel=1e-3)


def test_gradient_of_two_processes_is_that_of_the_whole_batch(tmp_path):
    check_two_processes(tmp_path, """
import supcon
model = torch.nn.Linear(12, 6).double()
x, labels = torch.randn(2, 8, 12).double(), torch.tensor([0, 1, 2, 0, 0, 1, 3, 1])
def loss(network, mine):
    z1, z2 = network(x[:, mine])
    return supcon.supervised_contrastive(z1, z2, labels[mine], 0.1, 0.07)
""")


def test_labels_are_those_of_the_batch_and_the_log_says_supervised(tmp_path, monkeypatch, capsys):
    calls = watch(monkeypatch, (supcon.common.Batches, "indices"), (supcon, "supervised_contrastive"))
    train(supcon, *TINY, "--epochs", 1, "--lr", 0.016, "--log-every", 1, "--output", tmp_path)
    data = supcon.common.load_data("shapes")
    drawn, seen = ([c for c in calls if c[0] == name] for name in ("indices", "supervised_contrastive"))
    assert len(seen) == 10 and all(torch.equal(args[2], data.labels[indices]) for (_, _, indices), (_, args, _) in zip(drawn, seen))
    assert logged(tmp_path, "supervised") == [True] * 10 and "supervised" in capsys.readouterr().err
    peak = 0.016 * 500 / 256                                   # the warm-up takes the only epoch
    assert logged(tmp_path, "lr") == pytest.approx([peak * (i + 1) / 10 for i in range(10)])


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_run_that_was_killed_is_the_run_that_was_not(tmp_path, processes):
    check_resuming(tmp_path, supcon, *TINY, *BOOKS, processes=processes)


def test_misuse(tmp_path, capsys):
    for args, words in ((["--temperature", "0"], "--temperature"), (["--base-temperature", "-1"], "--base-temperature"),
                        (["--batch-size", "9999"], "larger than the data set")):
        assert words in mistake(supcon, [*args, "--output", tmp_path]) + capsys.readouterr().err


def test_images_without_labels_are_a_mistake(tmp_path):
    from PIL import Image
    Image.new("RGB", (40, 40)).save(tmp_path / "one.png")
    assert f"--data {tmp_path}: no labels" in one_line(run("supcon.py", "--data", tmp_path, "--output", tmp_path / "run"))
