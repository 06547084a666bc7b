"""swav.py: Sinkhorn and the loss against their equations, known cases, one process against two, the queue, whole runs."""
import math

import pytest
import torch
import torch.nn.functional as F

import swav
from conftest import BOOKS, TINY, check_resuming, check_two_processes, logged, mistake, train, watch

TINY = [*TINY, "--small-size", "6", "--small-crops", "2", "--num-prototypes", "12", "--hidden", "32", "--dim", "16"]


def sinkhorn_by_loops(scores, epsilon, iterations):
    """Equations 3 to 5 as the official code runs them: Q is (K, B), rows to 1/K, columns to 1/B, columns to 1 at the end."""
    b, k = scores.shape
    q = [[math.exp(float(scores[j, i]) / epsilon) for j in range(b)] for i in range(k)]
    total = sum(map(sum, q))
    q = [[x / total for x in row] for row in q]
    for _ in range(iterations):
        q = [[x / sum(row) / k for x in row] for row in q]
        columns = [sum(row[j] for row in q) for j in range(b)]
        q = [[x / columns[j] / b for j, x in enumerate(row)] for row in q]
    return torch.tensor(q, dtype=torch.float64).T * b


@pytest.mark.parametrize("b,k,iterations", [(4, 3, 1), (8, 5, 3), (20, 30, 3)])
def test_sinkhorn_equals_its_equation(b, k, iterations):
    torch.manual_seed(b)
    scores = (2 * torch.rand(b, k, dtype=torch.float64) - 1)
    expected = sinkhorn_by_loops(scores, 0.05, iterations)
    assert (swav.sinkhorn(scores, 0.05, iterations) - expected).abs().max() < 1e-10
    assert (swav.sinkhorn(scores.float(), 0.05, iterations) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("scores", [torch.randn(16, 6) * 1e4, torch.eye(16, 6) * 1e4, torch.cat([torch.full((16, 1), 50.0), torch.zeros(16, 5)], 1),
                                    torch.randn(16, 6).half() * 100, torch.randn(16, 6).bfloat16(), torch.zeros(16, 6)])
def test_sinkhorn_is_finite_whatever_comes(scores):
    codes = swav.sinkhorn(scores, 0.05, 3)
    assert codes.dtype == torch.float32 and codes.isfinite().all() and (codes.sum(1) - 1).abs().max() < 1e-5


def test_equal_scores_give_equal_codes_and_a_collapsed_network_ln_k():
    codes = swav.sinkhorn(torch.full((10, 7), 0.3), 0.05, 3)
    assert (codes - 1 / 7).abs().max() < 1e-6
    scores = [torch.full((10, 7), 0.3)] * 4
    assert swav.swapped_prediction(scores, [codes, codes], 0.1).item() == pytest.approx(math.log(7), rel=1e-6)


def swapped_prediction_by_loops(scores, codes, temperature):
    """Equations 1, 2 and 6, one crop, image and prototype at a time."""
    total = 0.0
    for i, q in enumerate(codes):
        for v, s in enumerate(scores):
            if v != i:
                for b in range(len(q)):
                    norm = sum(math.exp(float(x) / temperature) for x in s[b])
                    total -= sum(float(q[b, k]) * math.log(math.exp(float(s[b, k]) / temperature) / norm) for k in range(q.shape[1])) / len(q)
    return total / len(codes) / (len(scores) - 1)


def test_loss_equals_its_equation():
    torch.manual_seed(0)
    scores = [2 * torch.rand(6, 5, dtype=torch.float64) - 1 for _ in range(4)]
    codes = [swav.sinkhorn(s, 0.05, 3) for s in scores[:2]]
    expected = swapped_prediction_by_loops(scores, codes, 0.1)
    assert swav.swapped_prediction(scores, codes, 0.1).item() == pytest.approx(expected, rel=1e-10)
    assert swav.swapped_prediction([s.float() for s in scores], [q.float() for q in codes], 0.1).item() == pytest.approx(expected, rel=1e-5)


def test_codes_queue_and_gradient_of_two_processes_are_those_of_the_whole_batch(tmp_path):
    check_two_processes(tmp_path, """
import swav
model = torch.nn.Linear(12, 6).double()
x = torch.randn(2, 8, 12).double()
seen = {}
def loss(network, mine):
    scores = network(x[:, mine]).tanh()
    seen[mine.start, mine.stop] = codes = [swav.sinkhorn(s.detach(), 0.05, 3) for s in scores]
    return swav.swapped_prediction(list(scores), codes, 0.1)

def queued(mine):
    torch.manual_seed(1)
    holder = swav.SwAV("resnet10x0.0625", "small", 8, 6, 5, 16).double()
    batches = F.normalize(torch.randn(4, 8, 6).double(), dim=2)
    return [holder.codes(z[mine], holder.prototypes(z[mine]), 0, True, 0.05, 3) for z in batches], holder.queue
whole_codes, whole_queue = queued(slice(0, 8))
""", """
mine = parts[common.rank()]
for codes, expected in zip(seen[mine.start, mine.stop], seen[0, 8]):
    assert (codes - expected[mine]).abs().max() < 1e-12
codes, queue = queued(mine)                                     # the queue is full for the last two of the four batches
assert torch.equal(queue, whole_queue) and queue[0].any(1).all()
assert all((a - b[mine]).abs().max() < 1e-12 for a, b in zip(codes, whole_codes))
""")


def test_queue_is_used_once_full_and_newest_come_first():
    torch.manual_seed(0)
    model = swav.SwAV("resnet10x0.25", "small", 16, 8, 5, queue_size=8)
    model.normalize_prototypes()
    assert (model.prototypes.weight.norm(dim=1) - 1).abs().max() < 1e-6
    batches = [F.normalize(torch.randn(4, 8), dim=1) for _ in range(4)]
    score = lambda z: (z @ model.prototypes.weight.T).detach()
    for i, z in enumerate(batches[:3]):
        codes = model.codes(z, score(z), 1, True, 0.05, 3)
        before = torch.cat([batches[1], batches[0], z]) if i == 2 else z            # full after two batches
        assert torch.allclose(codes, swav.sinkhorn(score(before), 0.05, 3)[-4:], atol=1e-6)
    codes = model.codes(batches[3], score(batches[3]), 1, True, 0.05, 3, remember=False)         # a mixture's: beside the queue, but not into it
    assert torch.allclose(codes, swav.sinkhorn(score(torch.cat([batches[2], batches[1], batches[3]])), 0.05, 3)[-4:], atol=1e-6)
    assert torch.equal(model.queue[1], torch.cat([batches[2], batches[1]])) and not model.queue[0].any()


def test_prototypes_are_frozen_at_first(tmp_path):
    weights = []
    for freeze in ("3", "0"):
        train(swav, *TINY, "--epochs", 1, "--freeze-epochs", freeze, "--output", tmp_path / freeze)
        weights.append(torch.load(tmp_path / freeze / "checkpoint.pt")["model"]["prototypes.weight"])
    args = swav.parse_args(TINY)
    torch.manual_seed(args.seed)
    start = swav.SwAV(args.arch, args.stem, args.hidden, args.dim, args.num_prototypes, 0).prototypes.weight
    assert torch.allclose(weights[0], F.normalize(start, dim=1), atol=1e-6) and not torch.allclose(weights[1], weights[0], atol=1e-3)


def test_prototypes_are_normalised_first_and_the_rate_ends_above_0(tmp_path, monkeypatch):
    calls = watch(monkeypatch, (swav.SwAV, "normalize_prototypes"), (swav.SwAV, "forward"), (swav.SwAV, "codes"), (swav, "swapped_prediction"))
    train(swav, *TINY, "--warmup-epochs", 1, "--lr", 0.016, "--log-every", 1, "--knn-every", 0, "--output", tmp_path)
    assert [name for name, _, _ in calls] == ["normalize_prototypes", "forward", "codes", "codes", "swapped_prediction"] * 30
    rates, peak = logged(tmp_path, "lr"), 0.016 * 500 / 256
    assert rates[0] == pytest.approx(peak / 16) and rates[9] == pytest.approx(peak * (1 + 9 * 15 / 10) / 16) and rates[10] == pytest.approx(peak)
    assert rates[-1] == pytest.approx(peak * (0.001 + 0.999 * (1 + math.cos(math.pi * 19 / 20)) / 2))


def test_unmix_puts_the_mixture_in_the_place_of_view_1(tmp_path, monkeypatch):
    calls = watch(monkeypatch, (swav.common, "unmix"), (swav.SwAV, "forward"), (swav.SwAV, "codes"), (swav, "swapped_prediction"), (swav.common.Run, "log"))
    train(swav, *TINY, "--mixture", "unmix", "--epochs", 1, "--output", tmp_path)
    assert [name for name, _, _ in calls] == (["unmix", "forward", "codes", "codes", "codes"] + ["swapped_prediction"] * 3 + ["log"]) * 10
    (x1, *_), (mixed, share) = calls[0][1:]
    (_, views), (z, (first, second, of_mixed, *small)) = calls[1][1:]
    assert torch.equal(views[0], x1) and torch.equal(views[2], mixed) and len(views) == 5
    assert torch.equal(calls[2][1][1], z[2]) and torch.equal(calls[3][1][1], z[0])
    q = swav.sinkhorn(of_mixed, swav.SHAPES["epsilon"], 3)
    for (_, (scores, codes, _), _), (m, code) in zip(calls[5:8], ((first, calls[3][2]), (of_mixed, q), (of_mixed.flip(0), q.flip(0)))):
        assert all(torch.allclose(a, b) for a, b in zip(scores, [m, second, *small])) and len(scores) == 4
        assert torch.allclose(codes[0], code) and torch.equal(codes[1], calls[4][2])
    losses = [loss.item() for _, _, loss in calls[5:8]]
    assert calls[8][1][1].item() == pytest.approx(losses[0] + share * losses[1] + (1 - share) * losses[2], rel=1e-5)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_run_that_was_killed_is_the_run_that_was_not(tmp_path, processes):
    check_resuming(tmp_path, swav, *TINY, "--queue-size", 1000, "--queue-start", 0.5, *BOOKS, processes=processes)


def test_a_collapse_is_named_in_the_log(tmp_path, capsys):
    train(swav, *TINY, "--epochs", 2, "--lr", 1e-12, "--optimizer", "larc", "--temperature", 50, "--output", tmp_path)       # all crops: nearly equal shares
    assert "ln K" in capsys.readouterr().err


def test_misuse(tmp_path, capsys):
    for args, words in ((["--epsilon", "0"], "--epsilon"), (["--min-scale", "0.1"], "--small-scale 0.2: not below --min-scale 0.1"),
                        (["--queue-size", "10"], "--queue-size 10: less than a batch of 64"), (["--num-prototypes", "x"], "--num-prototypes"), (["--batch-size", "9999"], "larger than the data set")):
        assert words in mistake(swav, [*args, "--output", tmp_path]) + capsys.readouterr().err
