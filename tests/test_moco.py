"""moco.py: the loss against its equation, the queue, the key network, shuffling, one process against two, whole runs."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moco
from conftest import BOOKS, TINY, check_bound, check_resuming, check_two_processes, logged, mistake, train, watch

TINY = [*TINY, "--queue-size", "2000", "--dim", "16", "--bn-splits", "2"]


def info_nce_by_loops(q, k, queue, temperature):
    """v1, equation 1, one query and one key at a time."""
    dot = lambda a, b: sum(float(x) * float(y) for x, y in zip(a, b))
    total = 0.0
    for a, b in zip(q.double(), k.double()):
        positive = math.exp(dot(a, b) / temperature)
        total -= math.log(positive / (positive + sum(math.exp(dot(a, c) / temperature) for c in queue.double())))
    return total / len(q)


@pytest.mark.parametrize("n,d,size,temperature", [(1, 2, 3, 1.0), (6, 8, 20, 0.2), (9, 16, 50, 0.07)])
def test_loss_equals_its_equation(n, d, size, temperature):
    torch.manual_seed(n)
    q, k, queue = (F.normalize(torch.randn(m, d, dtype=torch.float64), dim=1) for m in (n, n, size))
    expected = info_nce_by_loops(q, k, queue, temperature)
    assert moco.info_nce(q, k, queue, temperature).item() == pytest.approx(expected, rel=1e-10)
    assert moco.info_nce(q.float(), k.float(), queue.float(), temperature).item() == pytest.approx(expected, rel=1e-5)
    same = F.normalize(torch.ones(1, d, dtype=torch.float64), dim=1)
    assert moco.info_nce(same.expand(n, d), same.expand(n, d), same.expand(size, d), temperature).item() == pytest.approx(math.log(size + 1), rel=1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        assert moco.info_nce(q.float(), k.float(), queue.float(), temperature).item() == pytest.approx(expected, rel=1e-5)


def test_gradient_flows_into_the_query_alone():
    q, k, queue = (torch.randn(4, 8, requires_grad=True) for _ in range(3))
    moco.info_nce(q, k, queue, 0.2).backward()
    assert q.grad is not None and k.grad is None and queue.grad is None
    model = moco.MoCo("resnet10x0.25", "small", 2, 8, 16, 1)
    query, key, _ = model(torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16))
    assert query.requires_grad and not key.requires_grad
    moco.info_nce(query, key, model.queue, 0.2).backward()
    assert all(w.grad is None for m in (model.key_encoder, model.key_projector) for w in m.parameters())


def test_key_network_starts_as_a_copy_and_averages_parameters_only():
    model = moco.MoCo("resnet10x0.25", "small", 2, 8, 16, 1)
    assert all(torch.equal(a, b) for a, b in zip(model.encoder.state_dict().values(), model.key_encoder.state_dict().values()))
    with torch.no_grad():
        for w in model.encoder.parameters():
            w += 1
        model.encoder.bn1.running_mean += 1
    before = {k: v.clone() for k, v in model.key_encoder.state_dict().items()}
    model.update_keys_network(0.75)
    for k, v in model.key_encoder.state_dict().items():
        expected = before[k] if "running" in k or "tracked" in k else before[k] + 0.25
        assert torch.allclose(v.double(), expected.double(), atol=1e-6), k


def test_queue_is_first_in_first_out():
    model = moco.MoCo("resnet10x0.25", "small", 1, 2, 6, 1)
    for i in range(4):
        model.enqueue(torch.full((2, 2), float(i)))
    assert model.queue[:, 0].tolist() == [3, 3, 1, 1, 2, 2] and model.pointer.item() == 2


def test_versions():
    v1, v2 = (moco.projector(8, version, 4) for version in (1, 2))
    assert [type(m) for m in v1] == [nn.Linear] and [type(m) for m in v2] == [nn.Linear, nn.ReLU, nn.Linear]
    assert moco.parse_args(["--recipe", "imagenet", "--version", "1"]).temperature == 0.07
    assert moco.parse_args(["--recipe", "imagenet"]).temperature == 0.2
    assert moco.parse_args(["--recipe", "imagenet", "--version", "1", "--temperature", "0.3"]).temperature == 0.3


def companions(splits, shuffled):
    """For each of 8 images: which images share its BatchNorm statistics, as a query and as a key. Measured: image i is moved, who notices?"""
    torch.manual_seed(0)
    norm = moco.split_batch_norm(nn.Sequential(nn.BatchNorm2d(1, affine=False)), splits)
    x = torch.randn(8, 1, 2, 2)

    def as_key(x):
        if not shuffled:
            return norm(x)
        torch.manual_seed(3)
        dealt, order = moco.shuffle(x)
        return moco.unshuffle(norm(dealt), order)[0]

    noticed = []
    for encode in (norm, as_key):
        sets = []
        for i in range(8):
            moved = x.clone()
            moved[i] *= 3
            sets.append(frozenset(((encode(moved) - encode(x)).flatten(1).abs().max(1).values > 1e-6).nonzero()[:, 0].tolist()))
        noticed.append(sets)
    return noticed


def test_what_shuffling_is_for():
    query, key = companions(splits=2, shuffled=False)
    assert query == key and all(len(s) == 4 for s in query)
    query, key = companions(splits=2, shuffled=True)
    assert all(len(s) == 4 for s in key) and all(a != b for a, b in zip(query, key))
    query, key = companions(splits=1, shuffled=True)           # one batch, one set of statistics: shuffling alone does nothing
    assert query == key


def test_two_processes_shuffle_and_learn_as_one(tmp_path):
    check_two_processes(tmp_path, """
import moco
model = torch.nn.Linear(12, 6).double()
x = torch.randn(8, 12).double()
k, queue = (F.normalize(torch.randn(n, 6).double(), dim=1) for n in (8, 16))
def loss(network, mine):
    return moco.info_nce(F.normalize(network(x[mine]), dim=1), k[mine], queue, 0.2)
""", """
mine = parts[common.rank()]
torch.manual_seed(common.rank())
dealt, order = moco.shuffle(x[mine])
back, everyones = moco.unshuffle(dealt, order)
assert torch.equal(back, x[mine]) and torch.equal(everyones, x) and not torch.equal(dealt, x[mine])
""")


def test_order_of_a_step(tmp_path, monkeypatch):
    """The key network moves before the keys are made; a query is scored against the queue before its own keys enter it."""
    calls = watch(monkeypatch, (moco.MoCo, "update_keys_network"), (moco.MoCo, "forward"), (moco, "info_nce"), (moco.MoCo, "enqueue"))
    train(moco, *TINY, "--epochs", 1, "--output", tmp_path)
    assert [name for name, _, _ in calls] == ["update_keys_network", "forward", "info_nce", "enqueue"] * 10
    (_, _, (_, _, keys)), (_, (_, _, queue, _), _), (_, (_, entered), _) = calls[1:4]
    assert torch.equal(entered, keys) and not (queue[:, None] == keys).all(2).any()
    assert torch.equal(calls[6][1][2][:500], keys)             # the next query sees them
    check_bound(tmp_path, 2001)


@pytest.mark.parametrize("symmetric", [[], ["--symmetric"]])
def test_unmix_weighs_two_right_keys_by_their_shares(tmp_path, monkeypatch, symmetric):
    calls = watch(monkeypatch, (moco.MoCo, "forward"), (moco.common, "unmix"), (moco, "info_nce"), (moco.MoCo, "enqueue"), (moco.common.Run, "log"))
    train(moco, *TINY, "--mixture", "unmix", *symmetric, "--epochs", 1, "--output", tmp_path)
    step = calls[:next(i for i, (name, _, _) in enumerate(calls) if name == "log") + 1]
    results = {name: [(args, result) for other, args, result in step if other == name] for name, _, _ in step}
    q, k, keys = results["forward"][0][1]
    (args, (mixed, share)), = results["unmix"]
    q_mixed = results["forward"][-1][1]
    assert torch.equal(results["forward"][-1][0][1], mixed) and q_mixed.shape == q.shape
    right = [k, results["forward"][1][1][1]] if symmetric else [k]
    queue = results["info_nce"][0][0][2]
    expected = sum(loss.item() for _, loss in results["info_nce"][:len(right)])
    for key in right:
        expected += share * moco.info_nce(q_mixed, key, queue, 0.2).item() + (1 - share) * moco.info_nce(q_mixed.flip(0), key, queue, 0.2).item()
    (_, loss, _, _, views), _ = results["log"][0]
    assert loss.item() == pytest.approx(expected, rel=1e-5) and len(views) == 3
    assert len(results["enqueue"][0][0][1]) == 500 * len(right)                # the mixture never enters the queue
    check_bound(tmp_path, 2001, losses=2 * len(right))


def test_mixture_of_2020_changes_pixels_only(tmp_path, monkeypatch):
    calls = watch(monkeypatch, (moco.MoCo, "forward"), (moco.common, "mixture"), (moco, "info_nce"))
    train(moco, *TINY, "--mixture", "both", "--mix-probability", 1, "--epochs", 1, "--output", tmp_path)
    assert [name for name, _, _ in calls] == ["mixture", "forward", "info_nce"] * 10 and (tmp_path / "views.png").exists()
    (_, (views, kind, *_), _), (_, (_, x1, x2), _) = calls[:2]
    assert kind == "both" and views[0] is x1 and views[1] is x2


def test_version_1_has_its_own_schedule_and_augmentation(tmp_path, monkeypatch):
    operations = watch(monkeypatch, *((moco.common, name) for name in ("grayscale", "color_jitter", "gaussian_blur", "normalize")))
    train(moco, *TINY, "--version", 1, "--lr", 0.01, "--log-every", 1, "--knn-every", 0, "--output", tmp_path)
    assert logged(tmp_path, "lr") == pytest.approx([0.01 * 500 / 256 * fall for fall in [1] * 18 + [0.1] * 6 + [0.01] * 6])
    x = torch.rand(2, 3, 8, 8)
    for version, blur, names in ((1, 0.5, "grayscale color_jitter normalize"), (2, 0, "color_jitter grayscale normalize"),
                                 (2, 0.5, "color_jitter grayscale gaussian_blur normalize")):
        operations.clear()
        moco.augment(x, version, 1.0, blur)
        assert [name for name, _, _ in operations] == names.split()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_run_that_was_killed_is_the_run_that_was_not(tmp_path, processes):
    check_resuming(tmp_path, moco, *TINY, "--symmetric", *BOOKS, processes=processes)
    check_bound(tmp_path / "whole", 2001, losses=2)


def test_misuse(tmp_path, capsys):
    for args, words in ((["--queue-size", "1000"], "--queue-size 1000: not a multiple of the 64 keys of a step"), (["--version", "3"], "--version"),
                        (["--bn-splits", "7"], "--bn-splits 7: does not divide the 64 images"), (["--batch-size", "9999"], "larger than the data set")):
        assert words in mistake(moco, [*args, "--output", tmp_path]) + capsys.readouterr().err
