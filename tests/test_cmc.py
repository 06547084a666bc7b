"""cmc.py: the colour spaces against their published formulas, the losses against their equations, the banks, one process against two, whole runs."""
import math

import pytest
import torch
import torch.nn.functional as F

import cmc
import evaluate
from conftest import BOOKS, TINY, check_bound, check_resuming, check_two_processes, logged, mistake, train, watch
from test_insdis import nce_by_loops, softmax_by_loops

TINY = [*TINY, "--arch", "resnet10x0.125", "--dim", "16"]                      # halves of 4 channels
NCE = ["--loss", "nce", "--negatives", "20"]
COLORS = [(r, g, b) for r in (0.0, 0.02, 0.3, 1.0) for g in (0.0, 0.04, 0.7, 1.0) for b in (0.0, 0.05, 0.5, 1.0)]


def lab_by_formula(color):
    """IEC 61966-2-1 to linear light and XYZ, then CIE 15: one colour at a time."""
    r, g, b = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in color)
    x = (0.412453 * r + 0.357580 * g + 0.180423 * b) / 0.95047
    y = 0.212671 * r + 0.715160 * g + 0.072169 * b
    z = (0.019334 * r + 0.119193 * g + 0.950227 * b) / 1.08883
    x, y, z = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z))
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def ycbcr_by_formula(color):
    """ITU-R BT.601: luma of 0.299, 0.587, 0.114 in 219 steps from 16; the differences from it in 224 steps around 128."""
    r, g, b = color
    y = 0.299 * r + 0.587 * g + 0.114 * b
    return 16 + 219 * y, 128 + 112 * (b - y) / (1 - 0.114), 128 + 112 * (r - y) / (1 - 0.299)


@pytest.mark.parametrize("convert,formula,exact", [(cmc.rgb_to_lab, lab_by_formula, 1e-9), (cmc.rgb_to_ycbcr, ycbcr_by_formula, 2e-3)])
def test_colour_spaces_equal_their_formulas(convert, formula, exact):
    images = torch.tensor(COLORS, dtype=torch.float64).T.reshape(1, 3, 8, 8)
    expected = torch.tensor([formula(c) for c in COLORS], dtype=torch.float64).T.reshape(1, 3, 8, 8)
    before = images.clone()
    assert (convert(images) - expected).abs().max() < exact and torch.equal(images, before)
    assert convert(images.float()).dtype == torch.float32 and (convert(images.float()) - expected).abs().max() < 2e-3


def test_known_colours():
    images = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0]]).T.reshape(1, 3, 1, 5)
    lab, ycbcr = ([c(images)[0, :, 0, i] for i in range(5)] for c in (cmc.rgb_to_lab, cmc.rgb_to_ycbcr))
    for found, known in zip(lab, ([53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86], [100, 0, 0], [0, 0, 0])):       # CIE, D65
        assert (found - torch.tensor(known)).abs().max() < 0.1
    for found, known in zip(ycbcr, ([81, 90, 240], [145, 54, 34], [41, 240, 110], [235, 128, 128], [16, 128, 128])):                    # BT.601, rounded
        assert (found - torch.tensor(known)).abs().max() < 0.6


@pytest.mark.parametrize("n,m,temperature", [(1, 1, 1.0), (6, 20, 0.2)])
def test_losses_equal_their_equations(n, m, temperature):
    torch.manual_seed(n)
    scores = 2 * torch.rand(n, 1 + m, dtype=torch.float64) - 1
    for s, exact in ((scores, 1e-10), (scores.float(), 1e-5)):
        assert cmc.instance_softmax(s, temperature).item() == pytest.approx(softmax_by_loops(scores, temperature, [0] * n), rel=exact)
        assert cmc.nce(s, 300.0, temperature, 100, eps=0).item() == pytest.approx(nce_by_loops(scores, 300.0, temperature, 100), rel=exact)


def test_each_half_sees_its_channels_alone_and_is_scored_against_the_other():
    torch.manual_seed(0)
    model = cmc.CMC("resnet10x0.25", 0.5, "small", "ycbcr", 8, 40)
    assert model.encoder.dim == 128 and model.encoder.light.conv1.weight.shape[:2] == (16, 1) and model.encoder.color.conv1.weight.shape[:2] == (16, 2)
    x, gray = torch.rand(6, 3, 16, 16), torch.rand(6, 1, 16, 16)
    l, ab = model.eval()(x)
    brighter, tinted = x * 0.5 + 0.5 * gray, x + torch.tensor([0.114, 0, -0.299])[:, None, None] * 0.1     # luma stays: 0.299 r + 0.114 b
    assert torch.allclose(model(tinted)[0], l, atol=1e-4) and not torch.allclose(model(tinted)[1], ab, atol=1e-3)
    assert not torch.allclose(model(brighter)[0], l, atol=1e-3)
    assert (model(gray.expand_as(x))[1] - model(torch.full_like(x, 0.3))[1]).abs().max() < 1e-3
    indices = torch.arange(6) * 5
    (to_ab, to_l), (all_ab, all_l) = model.scores([l, ab], indices, 30), model.scores([l, ab], indices, 0)
    light, color = model.memory
    assert torch.allclose(all_ab, l @ color.T) and torch.allclose(all_l, ab @ light.T)
    assert torch.allclose(to_ab[:, 0], (l * color[indices]).sum(1)) and torch.allclose(to_l[:, 0], (ab * light[indices]).sum(1))
    drawn = [(s[:, 1:, None] - every[:, None]).abs().argmin(2) for s, every in ((to_ab, all_ab), (to_l, all_l))]
    assert torch.equal(*drawn) and len(drawn[0].unique()) == 40                # the same images in both directions
    expected = [F.normalize((bank[indices] + z) / 2, dim=1) for bank, z in zip(model.memory.clone(), (l, ab))]
    model.remember([l, ab], indices, 0.5)
    assert torch.allclose(model.memory[:, indices], torch.stack(expected), atol=1e-6)


def test_two_processes_learn_and_remember_as_one(tmp_path):
    check_two_processes(tmp_path, """
import cmc
model = torch.nn.ModuleList([torch.nn.Linear(12, 6), torch.nn.Linear(12, 6)]).double()
model.forward = lambda x: [F.normalize(half(x), dim=1) for half in model]
x, rows = torch.randn(8, 12).double(), F.normalize(torch.randn(8, 21, 6).double(), dim=2)
def loss(network, mine):
    scores = [(rows[mine] @ z[:, :, None])[:, :, 0] for z in network(x[mine])]
    return cmc.nce(scores[0], 100.0, 0.2, 50) + cmc.instance_softmax(scores[1], 0.2)

def bank(mine):
    torch.manual_seed(1)
    holder = cmc.CMC("resnet10x0.125", 0.5, "small", "lab", 6, 20).double()
    z, indices = F.normalize(torch.randn(2, 8, 6).double(), dim=2)[:, mine], torch.randperm(20)[:8][mine]
    holder.estimate_normalizer(holder.scores(z, indices, 0), 0.2)
    holder.remember(z, indices, 0.5)
    return holder
whole_bank = bank(slice(0, 8))
""", """
holder = bank(parts[common.rank()])
assert torch.equal(holder.memory, whole_bank.memory) and torch.allclose(holder.normalizer, whole_bank.normalizer, rtol=1e-12)
""")


def test_order_of_a_step_and_what_evaluation_reads(tmp_path, monkeypatch):
    """The banks are scored before they move, Z is that of the first batch, and evaluate.py builds the very encoder."""
    calls = watch(monkeypatch, (cmc.CMC, "scores"), (cmc.CMC, "estimate_normalizer"), (cmc, "nce"), (cmc.CMC, "remember"))
    train(cmc, *TINY, *NCE, "--view", "lab", "--epochs", 1, "--output", tmp_path)
    assert [name for name, _, _ in calls] == ["scores", "estimate_normalizer", "nce", "nce", "remember"] + ["scores", "nce", "nce", "remember"] * 9
    saved, first = torch.load(tmp_path / "checkpoint.pt"), calls[0][2]
    expected = [5000 * (s / 0.2).exp().mean().item() for s in first]
    assert saved["model"]["normalizer"].tolist() == pytest.approx(expected, rel=1e-5) and saved["model"]["memory"].shape == (2, 5000, 16)
    model = calls[0][1][0]
    encoder, dim, _ = evaluate.load_encoder(evaluate.parse_args(["knn", str(tmp_path / "checkpoint.pt")]), torch.device("cpu"))
    x = torch.rand(2, 3, 8, 8)
    assert dim == 64 and torch.equal(encoder(x), model.encoder.eval()(x)) and encoder.view == "lab"


def test_unmix_weighs_two_right_rows_by_their_shares(tmp_path, monkeypatch):
    calls = watch(monkeypatch, (cmc.CMC, "forward"), (cmc.common, "unmix"), (cmc.CMC, "scores"), (cmc, "instance_softmax"), (cmc.CMC, "remember"),
                  (cmc.common.Run, "log"))
    train(cmc, *TINY, "--mixture", "unmix", "--epochs", 1, "--output", tmp_path)
    assert [name for name, _, _ in calls[:14]] == ["forward", "unmix", "forward"] + ["scores", "instance_softmax", "instance_softmax"] * 3 + ["remember", "log"]
    z, (mixed, share), z_mixed = (result for _, _, result in calls[:3])
    assert torch.equal(calls[2][1][1], mixed) and calls[12][1][1] is z         # the banks get whole images
    for (_, (_, scored, _, _), _), expected in zip(calls[3:12:3], (z, z_mixed, [half.flip(0) for half in z_mixed])):
        assert all(torch.equal(a, b) for a, b in zip(scored, expected))
    losses = [loss.item() for name, _, loss in calls[:12] if name == "instance_softmax"]
    expected = sum(weight * sum(losses[i:i + 2]) for weight, i in ((1, 0), (share, 2), (1 - share, 4)))
    assert calls[13][1][1].item() == pytest.approx(expected, rel=1e-5) and len(calls[13][1][4]) == 2
    check_bound(tmp_path, 5000, losses=4)


def test_rate_falls_in_steps(tmp_path):
    train(cmc, *TINY, "--schedule", "steps", "--warmup-epochs", 0, "--lr", 0.01, "--batch-size", 832, "--epochs", 1, "--log-every", 1, "--output", tmp_path)
    assert logged(tmp_path, "lr") == pytest.approx([0.01 * 832 / 256 * fall for fall in (1, 1, 1, 0.1, 0.01, 0.001)])
    check_bound(tmp_path, 5000, losses=2)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_run_that_was_killed_is_the_run_that_was_not(tmp_path, processes):
    check_resuming(tmp_path, cmc, *TINY, *NCE, *BOOKS, processes=processes)


def test_misuse(tmp_path, capsys):
    for args, words in ((["--loss", "nce"], "--negatives 0: the whole bank is for --loss softmax"), (["--view", "rgb"], "--view"),
                        (["--width", "0"], "--width"), (["--batch-size", "9999"], "larger than the data set")):
        assert words in mistake(cmc, [*args, "--output", tmp_path]) + capsys.readouterr().err
