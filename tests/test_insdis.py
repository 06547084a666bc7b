"""insdis.py: the losses against their equations, the memory bank, one process against two, whole runs."""
import json
import math

import pytest
import torch
import torch.nn.functional as F

import insdis
from conftest import BOOKS, TINY, check_bound, check_resuming, check_two_processes, logged, mistake, train, watch

TINY = [*TINY, "--dim", "16"]
NCE = ["--loss", "nce", "--negatives", "20"]


def softmax_by_loops(scores, temperature, own):
    """Equation 2, one image at a time."""
    total = 0.0
    for row, i in zip(scores.tolist(), own):
        total -= math.log(math.exp(row[i] / temperature) / sum(math.exp(s / temperature) for s in row))
    return total / len(scores)


def nce_by_loops(scores, normalizer, temperature, num_images):
    """Equations 6 and 7, one candidate at a time."""
    total, m = 0.0, scores.shape[1] - 1
    for row in scores.tolist():
        h = [(p := math.exp(s / temperature) / normalizer) / (p + m / num_images) for s in row]
        total -= math.log(h[0]) + sum(math.log(1 - x) for x in h[1:])
    return total / len(scores)


@pytest.mark.parametrize("n,m,temperature", [(1, 1, 1.0), (6, 20, 0.2), (9, 50, 0.07)])
def test_losses_equal_their_equations(n, m, temperature):
    torch.manual_seed(n)
    scores = 2 * torch.rand(n, 1 + m, dtype=torch.float64) - 1
    own = torch.randint(1 + m, (n,))
    for columns in (None, own):
        expected = softmax_by_loops(scores, temperature, [0] * n if columns is None else own.tolist())
        assert insdis.instance_softmax(scores, temperature, columns).item() == pytest.approx(expected, rel=1e-10)
        assert insdis.instance_softmax(scores.float(), temperature, columns).item() == pytest.approx(expected, rel=1e-5)
    expected = nce_by_loops(scores, 300.0, temperature, 100)
    assert insdis.nce(scores, 300.0, temperature, 100, eps=0).item() == pytest.approx(expected, rel=1e-10)
    assert insdis.nce(scores.float(), torch.tensor(300.0), temperature, 100).item() == pytest.approx(expected, rel=1e-5)


def test_losses_start_where_the_docstring_says():
    equal = torch.zeros(3, 4097)
    assert insdis.instance_softmax(equal, 0.07).item() == pytest.approx(math.log(4097), rel=1e-6)
    assert insdis.nce(equal.double(), 1e6, 0.07, 10 ** 6, eps=0).item() == pytest.approx(math.log(4097) + 1, rel=1e-3)       # Z = n: every P is 1 / n
    torch.manual_seed(0)
    model = insdis.InsDis("resnet10x0.0625", "small", 128, 20000)
    scores = model.scores(F.normalize(torch.randn(64, 128), dim=1), torch.arange(64), 4096)
    model.estimate_normalizer(scores, 0.07)
    assert insdis.instance_softmax(scores, 0.07).item() == pytest.approx(9.12, abs=0.5)     # the own row's cosine is anything yet
    assert insdis.nce(scores, model.normalizer, 0.07, 20000).item() == pytest.approx(10.12, abs=0.5)


def test_scores_are_those_of_the_own_row_and_of_rows_drawn_uniformly():
    torch.manual_seed(0)
    model = insdis.InsDis("resnet10x0.0625", "small", 4, 40)
    assert (model.memory.norm(dim=1).square().mean() - 1).abs() < 0.1 and model.memory.abs().max() <= math.sqrt(3 / 4)
    z, indices = F.normalize(torch.randn(1000, 4), dim=1).requires_grad_(), torch.arange(1000) % 40
    scores, every = model.scores(z, indices, 60), model.scores(z, indices, 0)
    assert torch.allclose(every, z @ model.memory.T) and torch.allclose(scores[:, 0], every[torch.arange(1000), indices])
    drawn = (scores[:, 1:, None] - every[:, None]).abs().argmin(2)             # which rows they were: the cosines to all rows tell
    assert (drawn == indices[:, None]).any(1).float().mean() == pytest.approx(1 - (39 / 40) ** 60, abs=0.06)      # with replacement, the own one too
    counts = drawn.flatten().bincount(minlength=40).double()
    assert ((counts - 1500) ** 2 / 1500).sum() < 90                            # chi-square, 39 degrees of freedom
    insdis.instance_softmax(scores, 0.1).backward()
    assert z.grad is not None and not model.memory.requires_grad


def test_bank_moves_half_way_and_stays_on_the_sphere():
    model = insdis.InsDis("resnet10x0.0625", "small", 4, 10)
    before = model.memory.clone()
    z, indices = F.normalize(torch.randn(3, 4), dim=1), torch.tensor([7, 0, 4])
    model.remember(z, indices, 0.5)
    for i in range(10):
        expected = before[i]
        if i in indices:
            expected = (before[i] + z[indices.tolist().index(i)]) / 2
            expected = expected / expected.norm()
        assert torch.allclose(model.memory[i], expected, atol=1e-6)


def test_two_processes_learn_and_remember_as_one(tmp_path):
    check_two_processes(tmp_path, """
import insdis
model = torch.nn.Linear(12, 6).double()
x, rows = torch.randn(8, 12).double(), F.normalize(torch.randn(8, 21, 6).double(), dim=2)
def loss(network, mine):
    scores = (rows[mine] @ F.normalize(network(x[mine]), dim=1)[:, :, None])[:, :, 0]
    return insdis.nce(scores, 100.0, 0.2, 50) + insdis.instance_softmax(scores, 0.2)

def bank(mine):
    torch.manual_seed(1)
    holder = insdis.InsDis("resnet10x0.0625", "small", 6, 20).double()
    z, indices = F.normalize(torch.randn(8, 6).double(), dim=1), torch.randperm(20)[:8]
    holder.estimate_normalizer(holder.scores(z[mine], indices[mine], 0), 0.2)
    holder.remember(z[mine], indices[mine], 0.5)
    return holder
whole_bank = bank(slice(0, 8))
""", """
holder = bank(parts[common.rank()])
assert torch.equal(holder.memory, whole_bank.memory) and torch.allclose(holder.normalizer, whole_bank.normalizer, rtol=1e-12)
""")


def test_order_of_a_step_and_the_constant_of_the_first_batch(tmp_path, monkeypatch, capsys):
    """The bank is scored before it moves, and Z is that of the first batch to the end."""
    calls = watch(monkeypatch, (insdis.InsDis, "scores"), (insdis.InsDis, "estimate_normalizer"), (insdis, "nce"), (insdis.InsDis, "remember"))
    train(insdis, *TINY, *NCE, "--epochs", 1, "--output", tmp_path)
    assert [name for name, _, _ in calls] == ["scores", "estimate_normalizer", "nce", "remember"] + ["scores", "nce", "remember"] * 9
    checkpoint, first = torch.load(tmp_path / "checkpoint.pt"), calls[0][2]
    assert first.shape == (500, 21) and checkpoint["model"]["normalizer"].item() == pytest.approx(5000 * (first / 0.2).exp().mean().item(), rel=1e-5)
    assert "Z = " in capsys.readouterr().err and "bound" not in json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert (checkpoint["model"]["memory"].norm(dim=1) - 1).abs().max() < 1e-5              # all 5000 were visited


def test_rate_falls_in_steps(tmp_path):
    train(insdis, *TINY, "--schedule", "steps", "--warmup-epochs", 0, "--lr", 0.01, "--batch-size", 1000, "--epochs", 1, "--log-every", 1, "--output", tmp_path)
    assert logged(tmp_path, "lr") == pytest.approx([0.01 * 1000 / 256 * fall for fall in (1, 1, 1, 0.1, 0.01)])
    check_bound(tmp_path, 5000)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_run_that_was_killed_is_the_run_that_was_not(tmp_path, processes):
    check_resuming(tmp_path, insdis, *TINY, *NCE, *BOOKS, processes=processes)


def test_misuse(tmp_path, capsys):
    for args, words in ((["--loss", "nce"], "--negatives 0: the whole bank is for --loss softmax"), (["--loss", "x"], "--loss"),
                        (["--memory-momentum", "2"], "--memory-momentum"), (["--batch-size", "9999"], "larger than the data set")):
        assert words in mistake(insdis, [*args, "--output", tmp_path]) + capsys.readouterr().err
