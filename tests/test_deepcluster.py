"""deepcluster.py: k-means against a plain numpy one, the loss against its equation, the memory, one process against two, whole runs."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import deepcluster
from conftest import BOOKS, TINY, check_resuming, check_two_processes, logged, mistake, train, watch

TINY = [*TINY, "--small-size", "6", "--small-crops", "2", "--num-prototypes", "12", "--hidden", "32", "--dim", "16"]


def unit(*shape, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


def spherical_kmeans_by_loops(features, start, iterations):
    """Plain numpy, one feature at a time, from the rows `start`."""
    centroids = features[start].copy()
    assign = lambda: np.array([max(range(len(centroids)), key=lambda k: float(f @ centroids[k])) for f in features])
    for _ in range(iterations):
        found = assign()
        for k in range(len(centroids)):
            if (found == k).any():
                total = sum(features[i] for i in np.flatnonzero(found == k))
                centroids[k] = total / math.sqrt(float(total @ total))
    return centroids, assign()


@pytest.mark.parametrize("n,d,k,iterations", [(40, 3, 5, 10), (60, 8, 7, 1), (30, 2, 30, 4), (5, 4, 1, 3)])
def test_kmeans_equals_a_plain_one(n, d, k, iterations):
    torch.manual_seed(n)
    features = unit(n, d)
    torch.manual_seed(1)
    start = torch.randperm(n)[:k].numpy()
    expected, labels = spherical_kmeans_by_loops(features.numpy(), start, iterations)
    torch.manual_seed(1)
    centroids, assignments = deepcluster.spherical_kmeans(features, k, iterations)
    assert np.abs(centroids.numpy() - expected).max() < 1e-10 and (assignments.numpy() == labels).all()
    assert (centroids.norm(dim=1) - 1).abs().max() < 1e-10


def test_kmeans_finds_clusters_and_keeps_the_centroid_of_an_empty_one():
    torch.manual_seed(0)
    truth = torch.arange(300) % 3
    features = F.normalize(torch.eye(3, 6)[truth] + 0.05 * torch.randn(300, 6), dim=1)
    best = max((deepcluster.spherical_kmeans(features, 3, 10) for _ in range(5)), key=lambda r: len(set(r[1].tolist())))[1]
    assert all(len(set(best[truth == k].tolist())) == 1 for k in range(3)) and len(set(best.tolist())) == 3
    same = torch.eye(4)[torch.arange(20) % 2]                  # two points, five clusters
    centroids, assignments = deepcluster.spherical_kmeans(same, 5, 3)
    assert centroids.isfinite().all() and torch.equal(centroids[assignments], same) and len(set(assignments.tolist())) == 2


def cluster_prediction_by_loops(z, prototypes, assignments, temperature):
    """The objective, one head, crop, image and prototype at a time."""
    dot = lambda a, b: sum(float(x) * float(y) for x, y in zip(a, b))
    total = 0.0
    for head, labels in zip(prototypes, assignments.tolist()):
        for crop in z:
            for image, label in zip(crop, labels):
                if label >= 0:
                    p = [math.exp(dot(image, c) / temperature) for c in head]
                    total -= math.log(p[label] / sum(p))
    return total / len(prototypes) / z.shape[0] / z.shape[1]


def test_loss_equals_its_equation():
    torch.manual_seed(0)
    z, prototypes, assignments = unit(4, 6, 8), unit(3, 5, 8), torch.randint(5, (3, 6))
    assignments[1, 2] = -100
    expected = cluster_prediction_by_loops(z, prototypes, assignments, 0.1)
    assert deepcluster.cluster_prediction(z, prototypes, assignments, 0.1).item() == pytest.approx(expected, rel=1e-10)
    assert deepcluster.cluster_prediction(z.float(), prototypes.float(), assignments, 0.1).item() == pytest.approx(expected, rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert deepcluster.cluster_prediction(z.float(), prototypes.float(), assignments, 0.1).item() == pytest.approx(expected, rel=1e-5)
    collapsed = unit(1, 1, 8).expand(4, 6, 8)
    assert deepcluster.cluster_prediction(collapsed, unit(1, 1, 8).expand(3, 5, 8), assignments.clamp(0), 0.1).item() == pytest.approx(math.log(5))
    assert deepcluster.cluster_prediction(z, prototypes, torch.full_like(assignments, -100), 0.1).item() == 0


def test_clusters_memory_and_gradient_of_two_processes_are_those_of_one(tmp_path):
    check_two_processes(tmp_path, """
import deepcluster
model = torch.nn.Linear(12, 6).double()
x, prototypes, assignments = torch.randn(3, 8, 12).double(), F.normalize(torch.randn(2, 5, 6).double(), dim=2), torch.randint(5, (2, 8))
assignments[0, 1] = -100
def loss(network, mine):
    return deepcluster.cluster_prediction(F.normalize(network(x[:, mine]), dim=2), prototypes, assignments[:, mine], 0.1)
features = F.normalize(torch.randn(31, 6).double(), dim=1)
torch.manual_seed(1)
alone = [deepcluster.spherical_kmeans(*case, 5) for case in ((features, 4), (features, 20), (features[:2].repeat(10, 1), 5))]     # K over a process's share; empty clusters
z, indices = torch.randn(2, 8, 4), torch.randperm(20)[:8]
def remembered(mine):
    holder = deepcluster.DeepCluster("resnet10x0.0625", "small", 8, 4, 3, 5, 20)
    holder.remember(z[:, mine], indices[mine])
    return holder.memory
whole_memory = remembered(slice(0, 8))
""", """
torch.manual_seed(1 + common.rank())                            # the start is the first process's
for (centroids, found), case in zip(alone, ((features, 4), (features, 20), (features[:2].repeat(10, 1), 5))):
    mine, mine_found = deepcluster.spherical_kmeans(*case, 5)
    assert (mine - centroids).abs().max() < 1e-12 and torch.equal(mine_found, found)
assert torch.equal(remembered(parts[common.rank()]), whole_memory) and whole_memory.any()
""")


def test_heads_take_turns_with_the_memories_and_unseen_images_are_left_out():
    torch.manual_seed(0)
    model = deepcluster.DeepCluster("resnet10x0.0625", "small", 8, 4, 3, 3, 20)
    z, indices = unit(2, 15, 4, dtype=torch.float32), torch.randperm(20)[:15]
    model.remember(z, indices)
    assert torch.equal(model.memory[:, indices], z) and (model.memory.any(2).sum(1) == 15).all()
    model.cluster(4)
    for head in range(3):
        labels = model.assignments[head]
        assert torch.equal(labels >= 0, model.memory[0].any(1)) and (labels[labels < 0] == -100).all()
        assert torch.equal(labels[indices], (z[head % 2] @ model.prototypes[head].T).argmax(1))
    assert not any("prototypes" in name for name, _ in model.named_parameters())


def test_order_of_a_run(tmp_path, monkeypatch):
    """A pass fills the memory; every epoch begins with clustering; embeddings are remembered after they were scored."""
    calls = watch(monkeypatch, *((deepcluster.DeepCluster, name) for name in ("cluster", "forward", "remember")), (deepcluster, "cluster_prediction"))
    train(deepcluster, *TINY, "--epochs", 2, "--warmup-epochs", 1, "--lr", 0.016, "--log-every", 1, "--knn-every", 0, "--output", tmp_path)
    epoch = ["cluster", *["forward", "cluster_prediction", "remember"] * 10]
    assert [name for name, _, _ in calls] == ["forward", "remember"] * 10 + epoch * 2
    (_, (_, views), _), (_, (z, _, labels, _), _), (_, (_, stored, _), _) = calls[21:24]
    assert [x.shape[-1] for x in views] == [8, 8, 6, 6] and z.shape == (4, 500, 16) and torch.equal(stored, z[:2])
    assert labels.min() >= 0 and len(labels.unique()) > 6      # 5000 images and batches of 500: all were seen
    rates, peak = logged(tmp_path, "lr"), 0.016 * 500 / 256
    assert rates[0] == pytest.approx(peak / 16) and rates[10] == pytest.approx(peak)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_run_that_was_killed_is_the_run_that_was_not(tmp_path, processes):
    check_resuming(tmp_path, deepcluster, *TINY, *BOOKS, processes=processes)


def test_misuse(tmp_path, capsys):
    for args, words in ((["--heads", "0"], "--heads"), (["--min-scale", "0.1"], "--small-scale 0.2: not below --min-scale 0.1"),
                        (["--num-prototypes", "4993"], "--num-prototypes 4993: more than the 4992 images"), (["--iterations", "x"], "--iterations"),
                        (["--batch-size", "9999"], "larger than the data set")):
        assert words in mistake(deepcluster, [*args, "--output", tmp_path]) + capsys.readouterr().err
