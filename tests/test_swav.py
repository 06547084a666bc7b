"""swav.py: Sinkhorn and the loss beside their equations, the order of a step, frozen prototypes,
the queue, the rates, and a collapse that is named."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import swav
from conftest import logged, mistake, run, tiny, train, two_processes, watch

# With `few_labelled` an epoch has 10 steps; 3 crops an image, 12 prototypes.
RUN = [*tiny("swav"), "--batch-size", "40", "--log-every", "1", "--knn-every", "0",
       "--small-crops", "1", "--epochs", "2"]

# ------------------------------------------------------------------- codes

def sinkhorn_by_loops(scores, epsilon, iterations):
    """Equations 3 to 5 as the official code has them: Q (K, B) of sum 1, of which in turn every row
    is scaled to 1/K and every column to 1/B; in the end every column to 1."""
    B, K = scores.shape
    q = [[math.exp(float(scores[b, k]) / epsilon) for b in range(B)] for k in range(K)]
    total = sum(sum(row) for row in q)
    q = [[value / total for value in row] for row in q]
    for _ in range(iterations):
        for k in range(K):
            row_sum = sum(q[k])
            q[k] = [value / row_sum / K for value in q[k]]
        for b in range(B):
            column_sum = sum(q[k][b] for k in range(K))
            for k in range(K):
                q[k][b] = q[k][b] / column_sum / B
    return B * torch.tensor(q, dtype=torch.float64).T                   # (B, K)

@pytest.mark.parametrize("b,k,iterations", [(4, 3, 1), (8, 5, 3), (20, 30, 3)])
def test_sinkhorn_equals_its_equation(b, k, iterations):
    torch.manual_seed(b)
    scores = 2 * torch.rand(b, k, dtype=torch.float64) - 1
    expected = sinkhorn_by_loops(scores, 0.05, iterations)
    codes = swav.sinkhorn(scores, 0.05, iterations)
    assert (codes - expected).abs().max() < 1e-12
    assert (codes.sum(1) - 1).abs().max() < 1e-12
    single = swav.sinkhorn(scores.float(), 0.05, iterations)
    assert single.dtype == torch.float32
    assert (single - expected).abs().max() < 1e-5

def test_after_many_iterations_all_prototypes_are_used_equally():
    torch.manual_seed(0)
    scores = 2 * torch.rand(24, 6, dtype=torch.float64) - 1
    codes = swav.sinkhorn(scores, 0.2, 200)
    assert (codes.sum(0) - 4).abs().max() < 1e-9
    assert (codes.sum(1) - 1).abs().max() < 1e-9

def test_codes_have_no_gradient():
    scores = torch.rand(6, 4, requires_grad=True)
    assert not swav.sinkhorn(scores, 0.05, 3).requires_grad

def one_prototype_wins():
    scores = torch.zeros(16, 6)
    scores[:, 0] = 50
    return scores

@pytest.mark.parametrize("scores", [
    torch.randn(16, 6) * 1e4, torch.eye(16, 6) * 1e4, one_prototype_wins(), torch.zeros(16, 6)])
def test_codes_of_extreme_scores_are_finite(scores):
    codes = swav.sinkhorn(scores, 0.05, 3)
    assert codes.isfinite().all()
    assert (codes.sum(1) - 1).abs().max() < 1e-5

# ------------------------------------------------------------------- loss

def swapped_prediction_by_loops(scores, codes, temperature):
    """Equations 1, 2 and 6, one code, crop, image and prototype at a time; a mean over the pairs of
    crops and the images."""
    total = 0.0
    for i in range(len(codes)):
        for v in range(len(scores)):
            if v == i:
                continue
            for b in range(len(codes[i])):
                exponentials = torch.exp(scores[v][b] / temperature)
                for k in range(len(exponentials)):
                    p = exponentials[k] / exponentials.sum()
                    total -= codes[i][b, k] * torch.log(p)
    return total / (len(codes) * (len(scores) - 1) * len(codes[0]))

@pytest.mark.parametrize("crops", [2, 4])
def test_loss_and_its_gradient_equal_the_equations(crops):
    torch.manual_seed(0)
    scores = [2 * torch.rand(6, 5, dtype=torch.float64) - 1 for _ in range(crops)]
    codes = [swav.sinkhorn(s, 0.05, 3) for s in scores[:2]]
    for s in scores:
        s.requires_grad_()
    expected = swapped_prediction_by_loops(scores, codes, 0.1)
    loss = swav.swapped_prediction(scores, codes, 0.1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    expected_gradients = torch.autograd.grad(expected, scores)
    for gradient, by_loops in zip(torch.autograd.grad(loss, scores), expected_gradients):
        assert (gradient - by_loops).abs().max() < 1e-12

def test_equal_scores_give_equal_codes_and_a_loss_of_ln_k():
    scores = torch.full((10, 7), 0.3, dtype=torch.float64)
    codes = swav.sinkhorn(scores, 0.05, 3)
    assert (codes - 1 / 7).abs().max() < 1e-12
    loss = swav.swapped_prediction([scores] * 4, [codes, codes], 0.1)
    assert loss.item() == pytest.approx(math.log(7), rel=1e-12)

def test_codes_and_gradient_of_two_processes_are_those_of_the_whole_batch():
    two_processes("swapped_prediction")

# ------------------------------------------------------------------- model

def test_model_is_the_papers():
    torch.manual_seed(0)
    model = swav.SwAV("resnet10x0.125", "small", 32, 16, 12, 8)
    kinds = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert [type(module) for module in model.projector] == kinds
    assert model.prototypes.bias is None
    assert model.queue.shape == (2, 8, 16) and not model.queue.any()
    crops = [torch.rand(5, 3, size, size) for size in (16, 16, 8, 8, 8)]
    z, scores = model(crops)
    assert [v.shape for v in z] == [(5, 16)] * 5
    assert [s.shape for s in scores] == [(5, 12)] * 5
    for v, s in zip(z, scores):
        assert (v.norm(dim=1) - 1).abs().max() < 1e-6
        assert torch.allclose(s, v @ model.prototypes.weight.T, atol=1e-6)

def test_crops_of_one_size_go_through_the_encoder_together(monkeypatch):
    model = swav.SwAV("resnet10x0.125", "small", 32, 16, 12, 8)
    calls = watch(monkeypatch, (common.ResNet, "forward"))
    model([torch.rand(5, 3, size, size) for size in (16, 16, 8, 8, 8)])
    assert [args[1].shape for _, args, _ in calls] == [(10, 3, 16, 16), (15, 3, 8, 8)]

# ------------------------------------------------------------------- whole runs

def test_order_of_a_step(few_labelled, tmp_path, monkeypatch):
    """Prototypes are normalised first; every code is that of one large crop and is predicted from
    all other crops; the log has the mean entropy of the codes."""
    calls = watch(monkeypatch, (swav.SwAV, "normalize_prototypes"), (swav.SwAV, "forward"),
                  (swav, "sinkhorn"), (swav, "swapped_prediction"), (torch.optim.AdamW, "step"))
    train(swav, *RUN, "--epochs", 1, "--output", tmp_path)
    step = ["normalize_prototypes", "forward", "sinkhorn", "sinkhorn", "swapped_prediction", "step"]
    assert [name for name, _, _ in calls] == step * 10
    _, (_, views), (_, scores) = calls[1]
    assert [x.shape[-1] for x in views] == [8, 8, 16]
    predicted_from, codes, temperature = calls[4][1]
    assert temperature == 0.1
    assert all(torch.equal(a, b) for a, b in zip(predicted_from, scores, strict=True))
    for crop in (0, 1):
        _, (of_crop, epsilon, iterations), q = calls[2 + crop]
        assert torch.equal(of_crop, scores[crop]) and torch.equal(codes[crop], q)
        assert (epsilon, iterations) == (swav.SHAPES["epsilon"], 3)
    entropies = []
    for _, _, q in calls[3::6]:
        shares = q.flatten().tolist()
        entropies.append(-sum(share * math.log(share) for share in shares) / len(q))
    assert logged(tmp_path, "code_entropy") == pytest.approx(entropies, abs=1e-4)
    assert max(entropies) <= math.log(12) + 1e-6

def test_codes_and_loss_are_float32_in_a_bf16_run(few_labelled, tmp_path, monkeypatch):
    calls = watch(monkeypatch, (common.ResNet, "forward"), (swav, "sinkhorn"),
                  (swav, "swapped_prediction"))
    train(swav, *RUN, "--epochs", 1, "--precision", "bf16", "--output", tmp_path)
    assert calls[0][2].dtype == torch.bfloat16
    of_sinkhorn = next(call for call in calls if call[0] == "sinkhorn")
    assert of_sinkhorn[1][0].dtype == of_sinkhorn[2].dtype == torch.float32
    of_loss = next(call for call in calls if call[0] == "swapped_prediction")
    assert of_loss[1][0][0].dtype == of_loss[2].dtype == torch.float32

def note_prototypes(monkeypatch):
    """The list to which every step adds the prototypes that it starts with, of unit length."""
    prototypes = []
    normalize = swav.SwAV.normalize_prototypes

    def noting(model):
        normalize(model)
        prototypes.append(model.prototypes.weight.detach().clone())

    monkeypatch.setattr(swav.SwAV, "normalize_prototypes", noting)
    return prototypes

@pytest.mark.parametrize("optimizer,lr", [("adamw", 0.5), ("larc", 50)])
def test_prototypes_are_frozen_at_first(optimizer, lr, few_labelled, tmp_path, monkeypatch):
    """For 5 steps neither a gradient nor weight decay moves them."""
    prototypes = note_prototypes(monkeypatch)
    train(swav, *RUN, "--epochs", 1, "--freeze-epochs", 0.5, "--warmup-epochs", 0,
          "--weight-decay", 0.1, "--optimizer", optimizer, "--lr", lr, "--output", tmp_path)
    start = prototypes[0]
    assert (start.norm(dim=1) - 1).abs().max() < 1e-6
    for step in range(1, 6):
        assert torch.allclose(prototypes[step], start, atol=1e-6)
    for step in range(6, 10):
        assert not torch.allclose(prototypes[step], prototypes[step - 1], atol=1e-5)
        assert (prototypes[step].norm(dim=1) - 1).abs().max() < 1e-6

def test_queue_is_filled_from_its_step_newest_first_and_used_once_full(few_labelled, tmp_path,
                                                                       monkeypatch):
    """The recipe starts it after 1 epoch of 10 steps. 100 rows become 2 batches of 40: steps 10 and
    11 fill it, step 12 is the first to use it, with the prototypes of the moment."""
    prototypes = note_prototypes(monkeypatch)
    calls = watch(monkeypatch, (swav.SwAV, "forward"), (swav, "sinkhorn"),
                  (swav, "swapped_prediction"))
    train(swav, *RUN, "--queue-size", 100, "--output", tmp_path)
    outputs = [result for name, _, result in calls if name == "forward"]
    sinkhorns = [call for call in calls if call[0] == "sinkhorn"]
    losses = [call for call in calls if call[0] == "swapped_prediction"]
    assert len(outputs) == 20 and len(sinkhorns) == 40
    for step in range(20):
        for crop in (0, 1):
            rows = [outputs[step][1][crop]]                 # the scores of this batch come last
            if step >= 12:
                queue = torch.cat([outputs[step - 1][0][crop], outputs[step - 2][0][crop]])
                rows.insert(0, queue @ prototypes[step].T)
            _, (scores, _, _), q = sinkhorns[2 * step + crop]
            expected = torch.cat(rows)
            assert scores.shape == expected.shape
            assert torch.allclose(scores, expected, atol=1e-6)
            assert torch.equal(losses[step][1][1][crop], q[-40:])
    queue = common.read_checkpoint(tmp_path / "checkpoint.pt")["model"]["queue"]
    for crop in (0, 1):
        newest = torch.cat([outputs[19][0][crop], outputs[18][0][crop]])
        assert torch.equal(queue[crop], newest)

@pytest.mark.slow
def test_queue_of_two_processes_holds_the_batches_of_both(tmp_path):
    flags = [*tiny("swav"), "--small-crops", 0, "--epochs", 2, "--queue-size", 1000]
    result = run("swav.py", *flags, "--output", tmp_path, processes=2, timeout=400)
    assert result.returncode == 0, result.stderr
    queue = common.read_checkpoint(tmp_path / "checkpoint.pt")["model"]["queue"]
    assert queue.shape[:2] == (2, 1000)
    assert (queue.norm(dim=2) - 1).abs().max() < 1e-5
    assert len(queue[0].unique(dim=0)) == 1000

def test_rate_starts_at_a_sixteenth_and_ends_above_0(few_labelled, tmp_path):
    train(swav, *RUN, "--warmup-epochs", 1, "--lr", 0.016, "--output", tmp_path)
    peak = 0.016 * 40 / 256
    expected = [peak * (1 + 15 * step / 10) / 16 for step in range(10)]
    for step in range(10):
        expected.append(peak * (0.001 + 0.999 * (1 + math.cos(math.pi * step / 10)) / 2))
    assert logged(tmp_path, "lr") == pytest.approx(expected)

@pytest.mark.parametrize("flags,words", [
    (["--epsilon", "0"], ["--epsilon", "'0' is not in"]),
    (["--min-scale", "0.1"], ["--small-scale 0.2: not below --min-scale 0.1"]),
    (["--queue-size", "10"], ["--queue-size 10: less than a batch of 64"]),
    (["--num-prototypes", "x"], ["--num-prototypes", "'x'"]),
    (["--optimizer", "sgd"], ["--optimizer", "larc"])])
def test_mistakes_name_their_flag(flags, words, tmp_path):
    message = mistake(swav, *flags, "--output", tmp_path)
    assert all(word in message for word in words), message
