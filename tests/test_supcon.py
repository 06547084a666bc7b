"""supcon.py: both losses beside their equations and beside NT-Xent, the labels of a batch, the
rates."""
import math

import pytest
import torch
from PIL import Image
from torch import nn

import common
import simclr
import supcon
from conftest import logged, mistake, tiny, train, two_processes, watch

# With `few_labelled` an epoch has 10 steps.
RUN = [*tiny("supcon"), "--batch-size", "40", "--log-every", "1", "--knn-every", "0", "--dim", "16"]

# ------------------------------------------------------------------- loss

def supervised_contrastive_by_loops(z1, z2, labels, temperature, base_temperature, positives):
    """Equation 2 ("out") or 3 ("in"), one anchor, positive and candidate at a time."""
    z = [row / row.norm() for row in torch.cat([z1, z2])]
    y = [*labels.tolist(), *labels.tolist()]
    total = 0.0
    for i in range(len(z)):
        denominator = 0.0
        for a in range(len(z)):
            if a != i:
                denominator += torch.exp(z[i] @ z[a] / temperature)
        inside = 0.0
        outside = 0.0
        count = 0
        for p in range(len(z)):
            if p != i and y[p] == y[i]:
                probability = torch.exp(z[i] @ z[p] / temperature) / denominator
                inside += probability
                outside += torch.log(probability)
                count += 1
        total -= torch.log(inside / count) if positives == "in" else outside / count
    return temperature / base_temperature * total / len(z)

@pytest.mark.parametrize("positives", ["out", "in"])
@pytest.mark.parametrize("n,d,temperature,labels", [
    (1, 3, 0.5, [4]), (6, 8, 0.1, [0, 1, 0, 2, 1, 0]), (7, 5, 1.0, [3] * 7),
    (5, 16, 0.2, [9, 8, 7, 6, 6])])
def test_loss_and_its_gradient_equal_the_equation(n, d, temperature, labels, positives):
    torch.manual_seed(n)
    z1 = (3 * torch.randn(n, d, dtype=torch.float64)).requires_grad_()
    z2 = torch.randn(n, d, dtype=torch.float64, requires_grad=True)
    rest = torch.tensor(labels), temperature, 0.07, positives
    expected = supervised_contrastive_by_loops(z1, z2, *rest)
    loss = supcon.supervised_contrastive(z1, z2, *rest)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12, abs=1e-14)
    expected_gradients = torch.autograd.grad(expected, [z1, z2])
    for gradient, by_loops in zip(torch.autograd.grad(loss, [z1, z2]), expected_gradients):
        assert (gradient - by_loops).abs().max() < 1e-12
    single = supcon.supervised_contrastive(z1.float(), z2.float(), *rest)
    assert single.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)

@pytest.mark.parametrize("positives", ["out", "in"])
def test_equal_projections_give_ln_of_the_candidates(positives):
    same = torch.ones(8, 4, dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])
    loss = supcon.supervised_contrastive(same, same, labels, 0.1, 0.1, positives)
    assert loss.item() == pytest.approx(math.log(15), rel=1e-12)

def test_loss_with_the_mean_inside_is_the_smaller_one():
    """By Jensen's inequality."""
    torch.manual_seed(0)
    z1 = torch.randn(12, 8, dtype=torch.float64)
    z2 = torch.randn(12, 8, dtype=torch.float64)
    labels = torch.arange(12) % 4
    outside = supcon.supervised_contrastive(z1, z2, labels, 0.1, 0.07, "out").item()
    inside = supcon.supervised_contrastive(z1, z2, labels, 0.1, 0.07, "in").item()
    assert inside < outside - 0.1

@pytest.mark.parametrize("positives", ["out", "in"])
@pytest.mark.parametrize("base,factor", [(0.5, 1), (0.07, 0.5 / 0.07)])
def test_with_all_labels_different_it_is_nt_xent(base, factor, positives):
    """The base temperature multiplies loss and gradient."""
    torch.manual_seed(0)
    z1 = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    z2 = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    reference = simclr.nt_xent(z1, z2, 0.5)
    loss = supcon.supervised_contrastive(z1, z2, torch.arange(9), 0.5, base, positives)
    assert loss.item() == pytest.approx(factor * reference.item(), rel=1e-12)
    expected_gradients = torch.autograd.grad(reference, [z1, z2])
    for gradient, of_nt_xent in zip(torch.autograd.grad(loss, [z1, z2]), expected_gradients):
        assert (gradient - factor * of_nt_xent).abs().max() < 1e-12
    one_class = supcon.supervised_contrastive(z1, z2, torch.zeros(9), 0.5, 0.5, positives)
    assert abs(one_class.item() - reference.item()) > 1e-3

def test_gradient_of_two_processes_is_that_of_the_whole_batch():
    two_processes("supervised_contrastive")

def test_gradient_of_two_processes_with_the_mean_inside():
    two_processes("supervised_contrastive_in")

# ------------------------------------------------------------------- model and whole runs

def test_model_is_the_papers():
    model = supcon.SupCon("resnet10x0.125", "small", 16)
    assert [type(module) for module in model.projector] == [nn.Linear, nn.ReLU, nn.Linear]
    assert all(model.projector[i].bias is not None for i in (0, 2))
    assert model(torch.rand(4, 3, 8, 8)).shape == (4, 16)

@pytest.mark.parametrize("positives", ["out", "in"])
def test_labels_are_those_of_the_batch(positives, few_labelled, tmp_path, monkeypatch, capsys):
    calls = watch(monkeypatch, (common.Batches, "indices"), (supcon.SupCon, "forward"),
                  (supcon, "supervised_contrastive"))
    train(supcon, *RUN, "--epochs", 1, "--positives", positives, "--output", tmp_path)
    assert "supervised" in capsys.readouterr().err
    labels = common.load_data("shapes").labels
    drawn = [indices for name, _, indices in calls if name == "indices"]
    outputs = [z for name, _, z in calls if name == "forward"]
    losses = [call for call in calls if call[0] == "supervised_contrastive"]
    assert len(losses) == len(outputs) == 10
    for indices, z, (_, args, loss) in zip(drawn, outputs, losses):
        assert torch.equal(torch.cat(args[:2]), z)
        assert torch.equal(args[2], labels[indices])
        assert args[3:] == (0.1, 0.07, positives)
    expected = [loss.item() for _, _, loss in losses]
    assert logged(tmp_path, "loss") == pytest.approx(expected, abs=1e-6)

def test_loss_is_float32_in_a_bf16_run(few_labelled, tmp_path, monkeypatch):
    calls = watch(monkeypatch, (supcon.SupCon, "forward"), (supcon, "supervised_contrastive"))
    train(supcon, *RUN, "--epochs", 1, "--precision", "bf16", "--output", tmp_path)
    _, _, z = calls[0]
    _, (z1, z2, *_), loss = calls[1]
    assert z.dtype == torch.bfloat16
    assert z1.dtype == z2.dtype == loss.dtype == torch.float32

def test_rate_warms_up_from_0_and_ends_above_0(few_labelled, tmp_path):
    train(supcon, *RUN, "--epochs", 2, "--warmup-epochs", 1, "--lr", 0.5, "--optimizer", "sgd",
          "--output", tmp_path)
    peak = 0.5 * 40 / 256
    expected = [peak * step / 10 for step in range(10)]
    for step in range(10):
        expected.append(peak * (0.001 + 0.999 * (1 + math.cos(math.pi * step / 10)) / 2))
    assert logged(tmp_path, "lr") == pytest.approx(expected)
    assert supcon.learning_rate(1000, 0, 1000) == pytest.approx(0.001)

@pytest.mark.parametrize("flag,value", [
    ("--temperature", "0"), ("--base-temperature", "-1"), ("--positives", "both")])
def test_mistakes_name_their_flag(flag, value, tmp_path):
    message = mistake(supcon, flag, value, "--output", tmp_path)
    assert flag in message and value in message

def test_images_without_labels_are_a_mistake(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "one.png")
    message = mistake(supcon, "--data", tmp_path, "--output", tmp_path / "run")
    assert f"--data {tmp_path}" in message and "<class>" in message
