"""insdis.py: the losses against their equations, the memory bank, the normaliser, and the order of
a step."""
import math

import pytest
import torch
import torch.nn.functional as F

import common
import insdis
from conftest import logged, mistake, tiny, train, two_processes, watch

SMALL = [*tiny("insdis"), "--dim", "16", "--batch-size", "20", "--epochs", "1"]         # 5 steps
NCE = ["--loss", "nce", "--negatives", "30"]

# ------------------------------------------------------------------- losses

def softmax_by_loops(scores, temperature, own):
    """Equation 2, one image at a time: the loss, and its gradient in the scores."""
    loss = 0.0
    gradient = torch.zeros_like(scores)
    for i, row in enumerate(scores.tolist()):
        weights = [math.exp(score / temperature) for score in row]
        loss -= math.log(weights[own[i]] / sum(weights)) / len(scores)
        for j, weight in enumerate(weights):
            error = weight / sum(weights) - (j == own[i])
            gradient[i, j] = error / temperature / len(scores)
    return loss, gradient

def nce_by_loops(scores, normalizer, temperature, num_images):
    """Equations 6 and 7, one candidate at a time: the loss, and its gradient in the scores."""
    loss = 0.0
    gradient = torch.zeros_like(scores)
    m = scores.shape[1] - 1
    for i, row in enumerate(scores.tolist()):
        for j, score in enumerate(row):
            p = math.exp(score / temperature) / normalizer
            h = p / (p + m / num_images)            # the probability that row j is from the data
            loss -= math.log(h if j == 0 else 1 - h) / len(scores)
            gradient[i, j] = (h - (j == 0)) / temperature / len(scores)
    return loss, gradient

CASES = [(1, 1, 1.0), (6, 20, 0.2), (9, 50, 0.07)]

def random_scores(n, m):
    torch.manual_seed(n)
    return (2 * torch.rand(n, 1 + m, dtype=torch.float64) - 1).requires_grad_()

@pytest.mark.parametrize("n,m,temperature", CASES)
def test_softmax_and_its_gradient_equal_their_equation(n, m, temperature):
    scores = random_scores(n, m)
    for own in (torch.zeros(n, dtype=torch.int64), torch.randint(1 + m, (n,))):
        expected, gradient = softmax_by_loops(scores.detach(), temperature, own.tolist())
        loss = insdis.instance_softmax(scores, temperature, own)
        assert loss.item() == pytest.approx(expected, rel=1e-12)
        assert (torch.autograd.grad(loss, scores)[0] - gradient).abs().max() < 1e-12
        single = insdis.instance_softmax(scores.float(), temperature, own)
        assert single.item() == pytest.approx(expected, rel=1e-5)

@pytest.mark.parametrize("n,m,temperature", CASES)
def test_nce_and_its_gradient_equal_their_equations(n, m, temperature):
    scores = random_scores(n, m)
    expected, gradient = nce_by_loops(scores.detach(), 300.0, temperature, 100)
    loss = insdis.nce(scores, 300.0, temperature, 100, eps=0)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert (torch.autograd.grad(loss, scores)[0] - gradient).abs().max() < 1e-12
    single = insdis.nce(scores.float(), torch.tensor(300.0), temperature, 100)
    assert single.item() == pytest.approx(expected, rel=1e-5)

def test_losses_of_scores_that_are_all_alike():
    scores = torch.zeros(3, 4097, dtype=torch.float64)
    own = torch.zeros(3, dtype=torch.int64)
    loss = insdis.instance_softmax(scores, 0.07, own)
    assert loss.item() == pytest.approx(math.log(4097), rel=1e-12)
    # Z = n: every P is 1 / n, h is 1 / (1 + m), and m drawn rows have log (m / (1 + m)) each.
    loss = insdis.nce(scores, 1e6, 0.07, 10 ** 6, eps=0)
    expected = math.log(4097) + 4096 * math.log(4097 / 4096)
    assert loss.item() == pytest.approx(expected, rel=1e-12)

def test_losses_start_where_the_docstring_says():
    torch.manual_seed(0)
    model = insdis.InsDis("resnet10x0.125", "small", 128, 20000)
    z = F.normalize(torch.randn(64, 128), dim=1)
    scores = model.scores(z, torch.arange(64), 4096)
    model.estimate_normalizer(scores, 0.07)
    own = torch.zeros(64, dtype=torch.int64)
    assert insdis.instance_softmax(scores, 0.07, own).item() == pytest.approx(9.12, abs=0.5)
    loss = insdis.nce(scores, model.normalizer, 0.07, 20000)
    assert loss.item() == pytest.approx(10.12, abs=0.5)

# ------------------------------------------------------------------- memory bank

def drawn_rows(scores, every):
    """Which rows of the bank the scores (N, m) belong to, by the cosines to all rows (N, n)."""
    return (scores[:, :, None] - every[:, None]).abs().argmin(2)

def test_scores_are_those_of_the_own_row_and_of_rows_drawn_uniformly():
    torch.manual_seed(0)
    model = insdis.InsDis("resnet10x0.125", "small", 4, 40)
    z = F.normalize(torch.randn(1000, 4), dim=1).requires_grad_()
    indices = torch.arange(1000) % 40
    scores = model.scores(z, indices, 60)
    every = model.scores(z, indices, 0)
    assert scores.shape == (1000, 61) and torch.allclose(every, z @ model.memory.T)
    assert torch.allclose(scores[:, 0], every[torch.arange(1000), indices], atol=1e-6)
    drawn = drawn_rows(scores[:, 1:], every)
    counts = drawn.flatten().bincount(minlength=40).double()
    assert ((counts - 1500) ** 2 / 1500).sum() < 90         # chi-square, 39 degrees of freedom
    again = (drawn == indices[:, None]).any(1).float().mean().item()
    assert again == pytest.approx(1 - (39 / 40) ** 60, abs=0.06)    # perhaps the own one again
    insdis.instance_softmax(scores, 0.1, torch.zeros_like(indices)).backward()
    assert z.grad is not None and not model.memory.requires_grad

def test_rows_start_with_about_unit_length():
    memory = insdis.InsDis("resnet10x0.125", "small", 128, 1000).memory
    assert memory.abs().max() <= math.sqrt(3 / 128)
    assert memory.square().sum(1).mean().item() == pytest.approx(1, abs=0.01)

@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_rows_move_towards_their_images_and_keep_unit_length(momentum):
    model = insdis.InsDis("resnet10x0.125", "small", 4, 10)
    before = model.memory.clone()
    z = F.normalize(torch.randn(3, 4), dim=1)
    indices = [7, 0, 4]
    model.remember(z, torch.tensor(indices), momentum)
    for i in range(10):
        expected = before[i]
        if i in indices:
            expected = momentum * before[i] + (1 - momentum) * z[indices.index(i)]
            expected = expected / expected.norm()
        assert torch.allclose(model.memory[i], expected, atol=1e-6)

def test_normalizer_is_n_times_the_mean_over_all_candidates():
    model = insdis.InsDis("resnet10x0.125", "small", 4, 50)
    scores = 2 * torch.rand(6, 21) - 1
    total = sum(math.exp(score / 0.2) for row in scores.tolist() for score in row)
    model.estimate_normalizer(scores, 0.2)
    assert model.normalizer.item() == pytest.approx(50 * total / (6 * 21), rel=1e-5)

def test_normalizer_is_the_mean_over_the_processes(monkeypatch):
    model = insdis.InsDis("resnet10x0.125", "small", 4, 50)
    monkeypatch.setattr(common, "gather", lambda mine: torch.cat([mine, torch.tensor([8.0])]))
    model.estimate_normalizer(torch.zeros(6, 21), 0.2)          # whose mean is 1, the other's 8
    assert model.normalizer.item() == pytest.approx(50 * 4.5)

def test_two_processes_remember_as_one():
    """The banks of insdis.py, cmc.py and deepcluster.py."""
    two_processes("memory")

@pytest.mark.parametrize("loss", ["instance_softmax", "nce"])
def test_two_processes_learn_as_one(loss):
    two_processes(loss)

# ------------------------------------------------------------------- training

def test_order_of_a_step_and_the_normalizer_of_the_first_batch(few_images, tmp_path, monkeypatch):
    """The bank is scored before it is updated; Z is that of the first batch to the end."""
    calls = watch(monkeypatch, (insdis.InsDis, "scores"), (insdis.InsDis, "estimate_normalizer"),
                  (insdis, "nce"), (torch.optim.AdamW, "step"), (insdis.InsDis, "remember"))
    train(insdis, *SMALL, *NCE, "--epochs", 2, "--output", tmp_path)
    step = ["scores", "nce", "step", "remember"]
    first_step = ["scores", "estimate_normalizer", "nce", "step", "remember"]
    assert [name for name, _, _ in calls] == first_step + step * 9
    first = calls[0][2]
    saved = torch.load(tmp_path / "checkpoint.pt")["model"]
    expected = 100 * (first / 0.1).exp().mean().item()
    assert first.shape == (20, 31)
    assert saved["normalizer"].item() == pytest.approx(expected, rel=1e-5)
    del calls[1]
    for i in range(0, 40, 4):
        _, (_, z, indices, _), scores = calls[i]
        assert calls[i + 1][1][0] is scores and calls[i + 1][1][3] == 100
        assert calls[i + 3][1][1] is z and calls[i + 3][1][2] is indices
    assert (saved["memory"].norm(dim=1) - 1).abs().max() < 1e-5         # all images were seen

def test_rows_of_a_step_are_those_from_before_it(few_images, tmp_path, monkeypatch):
    banks = []
    remember = insdis.InsDis.remember

    def remembering(model, z, indices, momentum):
        banks.append(model.memory.clone())
        remember(model, z, indices, momentum)

    monkeypatch.setattr(insdis.InsDis, "remember", remembering)
    calls = watch(monkeypatch, (insdis.InsDis, "scores"))
    train(insdis, *SMALL, "--negatives", 0, "--output", tmp_path)
    for bank, (_, (_, z, _, _), scores) in zip(banks, calls):
        assert torch.equal(scores, z @ bank.T)

def test_whole_bank_is_scored_with_the_own_row_as_the_class(few_images, tmp_path, monkeypatch):
    calls = watch(monkeypatch, (insdis.InsDis, "scores"), (insdis, "instance_softmax"))
    train(insdis, *SMALL, "--negatives", 0, "--output", tmp_path)
    for (_, (_, _, indices, _), scores), (_, (compared, _, own), _) in zip(calls[::2], calls[1::2]):
        assert scores.shape == (20, 100) and compared is scores and torch.equal(own, indices)
    calls.clear()
    train(insdis, *SMALL, "--negatives", 30, "--output", tmp_path / "drawn")
    for (_, _, scores), (_, (_, _, own), _) in zip(calls[::2], calls[1::2]):
        assert scores.shape == (20, 31) and not own.any()

def test_rate_falls_in_steps(few_images, tmp_path):
    steps = [insdis.learning_rate(step, 2, 20, "steps") for step in range(20)]
    assert steps == pytest.approx([0, 0.5] + [1] * 10 + [0.1] * 4 + [0.01] * 4)
    assert insdis.learning_rate(12, 4, 20, "cosine") == pytest.approx(0.5)
    train(insdis, *SMALL, "--schedule", "steps", "--warmup-epochs", 0, "--lr", 0.01,
          "--log-every", 1, "--output", tmp_path)
    rates = [0.01 * 20 / 256 * fall for fall in [1, 1, 1, 0.1, 0.01]]
    assert logged(tmp_path, "lr") == pytest.approx(rates)

@pytest.mark.parametrize("recipe,names", [
    ("imagenet", ["grayscale", "color_jitter", "normalize"]),
    ("small", ["color_jitter", "grayscale", "normalize"])])
def test_order_of_the_augmentation_is_the_official_one(monkeypatch, recipe, names):
    operations = watch(monkeypatch, *((common, name) for name in sorted(names)))
    gray_first = insdis.RECIPES[recipe]["gray_first"]
    insdis.augment(torch.rand(2, 3, 8, 8), 1.0, gray_first)
    assert [name for name, _, _ in operations] == names

@pytest.mark.parametrize("flags,message", [
    (["--loss", "nce"], "--negatives 0: the whole bank is for --loss softmax"),
    (["--loss", "hinge"], "--loss"),
    (["--memory-momentum", "2"], "--memory-momentum")])
def test_mistakes(tmp_path, flags, message):
    assert message in mistake(insdis, *flags, "--output", tmp_path)
