"""deepcluster.py: k-means, whitening, mutual information and the loss beside slow loops; memory and
order of both versions, weights and classifier of version 1; the rates."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import common
import deepcluster
from conftest import logged, mistake, tiny, train, two_processes, watch

# With `few_labelled` an epoch has 10 steps; 3 crops an image in version 2; 12 clusters.
RUN = [*tiny("deepcluster"), "--batch-size", "40", "--log-every", "1", "--knn-every", "0",
       "--small-crops", "1", "--epochs", "2"]
RUN_1 = [*RUN, "--version", "1", "--small-crops", "0"]

def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)

# ------------------------------------------------------------------- k-means

def nearest_by_loops(features, centroids):
    """For each feature the centroid with the largest inner product."""
    found = []
    for feature in features:
        products = [float(feature @ centroid) for centroid in centroids]
        found.append(products.index(max(products)))
    return np.array(found)

def spherical_kmeans_by_loops(features, start, iterations):
    """In numpy, one cluster at a time, from the rows `start`; an empty one keeps its centroid."""
    centroids = features[start].copy()
    for _ in range(iterations):
        found = nearest_by_loops(features, centroids)
        for k in range(len(centroids)):
            if (found == k).any():
                total = features[found == k].sum(axis=0)
                centroids[k] = total / np.sqrt((total ** 2).sum())
    return centroids, nearest_by_loops(features, centroids)

def kmeans(features, num_clusters, iterations, refill=False):
    torch.manual_seed(1)                    # the same start at every call
    return deepcluster.spherical_kmeans(features, num_clusters, iterations, refill)

def start_of(features, num_clusters):
    """The rows of `features` that k-means starts from."""
    centroids, _ = kmeans(features, num_clusters, 0)
    return [int((features == row).all(1).nonzero()[0, 0]) for row in centroids]

@pytest.mark.parametrize("n,d,k,iterations", [(40, 3, 5, 10), (60, 8, 7, 1), (30, 2, 30, 4),
                                              (5, 4, 1, 3)])
def test_kmeans_equals_a_plain_one(n, d, k, iterations):
    torch.manual_seed(n)
    features = unit(n, d)
    start = start_of(features, k)
    assert len(set(start)) == k
    expected, found = spherical_kmeans_by_loops(features.numpy(), start, iterations)
    centroids, assignments = kmeans(features, k, iterations)
    assert np.abs(centroids.numpy() - expected).max() < 1e-12
    assert (assignments.numpy() == found).all()
    assert (centroids.norm(dim=1) - 1).abs().max() < 1e-12

def test_kmeans_finds_clusters():
    torch.manual_seed(0)
    truth = torch.arange(300) % 3
    features = F.normalize(torch.eye(3, 6)[truth] + 0.05 * torch.randn(300, 6), dim=1)
    _, assignments = kmeans(features, 3, 10, refill=True)
    assert deepcluster.mutual_information(truth, assignments) > 0.7

def many_copies():
    """30 copies of one point beside 30 points around another: a start has copies of it several
    times, of which all but one get no image."""
    torch.manual_seed(0)
    blob = F.normalize(torch.eye(4, dtype=torch.float64)[1] + 0.3 * unit(30, 4), dim=1)
    return torch.cat([torch.eye(4, dtype=torch.float64)[:1].expand(30, 4), blob])

def test_an_empty_cluster_keeps_its_centroid():
    features = many_copies()
    centroids, assignments = kmeans(features, 10, 5)
    assert centroids.isfinite().all()
    empty = set(range(10)) - set(assignments.tolist())
    assert len(empty) >= 2
    for k in empty:
        assert torch.equal(centroids[k], features[0])

def test_an_empty_cluster_takes_a_perturbed_centroid_of_another():
    """Section 3.3 of version 1. One step: the centroid of every cluster that was empty lies beside
    that of one that was not."""
    features = many_copies()
    _, found = kmeans(features, 10, 0)
    full = sorted(set(found.tolist()))
    expected, _ = spherical_kmeans_by_loops(features.numpy(), start_of(features, 10), 1)
    centroids, _ = kmeans(features, 10, 1, refill=True)
    assert (centroids.norm(dim=1) - 1).abs().max() < 1e-12
    chosen = []
    for k in range(10):
        if k in full:
            assert np.abs(centroids[k].numpy() - expected[k]).max() < 1e-12
        else:
            distance = (centroids[full] - centroids[k]).norm(dim=1)
            assert 0 < distance.min() < 0.01
            chosen.append(int(distance.argmin()))
    assert len(set(chosen)) > 1                                 # drawn among all of them

def test_refilled_clusters_get_images():
    features = many_copies()
    _, kept = kmeans(features, 10, 10)
    _, refilled = kmeans(features, 10, 10, refill=True)
    assert len(refilled.unique()) > len(kept.unique())

def test_kmeans_of_two_processes_is_that_of_one():
    two_processes("kmeans")

# ------------------------------------------------------------------- version 1: features

def test_whitening_equals_numpys():
    """Principal components divided by their standard deviation, up to their signs."""
    rng = np.random.default_rng(0)
    h = rng.normal(size=(50, 12)) * np.linspace(3, 0.5, 12) + 5
    centred = h - h.mean(axis=0)
    u, _, _ = np.linalg.svd(centred, full_matrices=False)
    for dim, kept in ((4, 4), (256, 12)):
        expected = np.sqrt(50) * u[:, :kept]
        whitened = deepcluster.pca_whiten(torch.from_numpy(h), dim).double().numpy()
        assert whitened.shape == (50, kept)
        assert np.abs(whitened.T @ whitened / 50 - np.eye(kept)).max() < 1e-4
        # The same inner products: the same vectors, but for the order and sign of components.
        assert np.abs(whitened @ whitened.T - expected @ expected.T).max() < 1e-3

def test_whitening_of_constant_features_is_finite():
    h = torch.randn(30, 6)
    h[:, 2:4] = 1.0
    whitened = deepcluster.pca_whiten(h, 256)
    assert whitened.isfinite().all() and whitened.abs().max() < 10

# ------------------------------------------------------------------- mutual information

def mutual_information_by_loops(a, b):
    """I(A; B) / sqrt(H(A) H(B)), one pair of clusters at a time."""
    a = a.tolist()
    b = b.tolist()
    n = len(a)
    information = 0.0
    for x in set(a):
        for y in set(b):
            both = sum(a[i] == x and b[i] == y for i in range(n)) / n
            if both > 0:
                independent = a.count(x) / n * b.count(y) / n
                information += both * math.log(both / independent)
    entropy_a = -sum(a.count(x) / n * math.log(a.count(x) / n) for x in set(a))
    entropy_b = -sum(b.count(y) / n * math.log(b.count(y) / n) for y in set(b))
    return information / math.sqrt(entropy_a * entropy_b)

@pytest.mark.parametrize("n,j,k", [(20, 3, 3), (200, 5, 9), (60, 2, 30)])
def test_mutual_information_equals_its_definition(n, j, k):
    torch.manual_seed(n)
    a = torch.randint(j, (n,))
    b = (a + torch.randint(k, (n,)) * (torch.rand(n) < 0.5)) % k
    expected = mutual_information_by_loops(a, b)
    assert deepcluster.mutual_information(a, b).item() == pytest.approx(expected, abs=2e-5)

def test_mutual_information_of_known_cases():
    torch.manual_seed(0)
    a = torch.arange(600) % 6
    renamed = torch.randperm(6)[a]
    assert deepcluster.mutual_information(a, renamed).item() == pytest.approx(1, abs=1e-5)
    independent = torch.arange(600) // 6 % 5
    assert deepcluster.mutual_information(a, independent).item() == pytest.approx(0, abs=1e-5)
    one_cluster = torch.zeros_like(a)
    assert deepcluster.mutual_information(a, one_cluster).item() == pytest.approx(0, abs=1e-5)
    nothing = a[:0]                             # before the first clustering
    assert deepcluster.mutual_information(nothing, nothing).item() == 0

# ------------------------------------------------------------------- version 1: clusters

def version_1(num_images, num_clusters):
    model = deepcluster.DeepCluster("resnet10x0.125", "small", 1, 8, 4, 1, num_clusters, num_images)
    torch.manual_seed(0)
    return model, torch.rand(num_images, model.encoder.dim)

def test_clusters_are_those_of_whitened_features_of_unit_length(monkeypatch):
    model, h = version_1(90, 6)
    calls = watch(monkeypatch, (deepcluster, "spherical_kmeans"))
    model.cluster(5, h)
    (_, (features, num_clusters, iterations), (_, assignments)), = calls
    expected = F.normalize(deepcluster.pca_whiten(h, 256), dim=1)
    assert torch.equal(features, expected) and (num_clusters, iterations) == (6, 5)
    assert torch.equal(model.assignments[0], assignments)

def test_weights_equal_even_sampling_of_clusters_in_expectation():
    """The mean over images drawn evenly, each weighted, is that over clusters drawn evenly and then
    an image of the cluster."""
    model, h = version_1(90, 6)
    model.cluster(5, h)
    labels = model.assignments[0]
    assert len(labels.unique()) == 6 and len(labels.bincount().unique()) > 1
    torch.manual_seed(1)
    losses = torch.rand(90, dtype=torch.float64)
    weighted = 0.0
    for i in range(90):
        weighted += float(model.weights[labels[i]]) * losses[i].item() / 90
    even = 0.0
    for k in range(6):
        even += losses[labels == k].mean().item() / 6
    assert weighted == pytest.approx(even, rel=1e-6)

def test_classifier_is_drawn_anew():
    model, h = version_1(90, 6)
    with torch.no_grad():
        model.classifier.weight.fill_(3)
        model.classifier.bias.fill_(3)
    model.cluster(5, h)
    assert model.classifier.weight.std().item() == pytest.approx(0.01, rel=0.2)
    assert model.classifier.weight.mean().abs() < 0.003
    assert not model.classifier.bias.any()

# ------------------------------------------------------------------- version 2: loss and memory

def cluster_prediction_by_loops(z, prototypes, assignments, temperature):
    """The objective, one clustering, crop, image and prototype at a time."""
    H, N = assignments.shape
    total = 0.0
    for head in range(H):
        for crop in range(len(z)):
            for i in range(N):
                label = int(assignments[head, i])
                if label >= 0:
                    exponentials = []
                    for centroid in prototypes[head]:
                        exponentials.append(torch.exp(z[crop, i] @ centroid / temperature))
                    total -= torch.log(exponentials[label] / sum(exponentials))
    return total / (H * len(z) * N)

def test_loss_and_its_gradient_equal_the_objective():
    torch.manual_seed(0)
    z = unit(4, 6, 8).requires_grad_()
    prototypes = unit(3, 5, 8)
    assignments = torch.randint(5, (3, 6))
    assignments[1, 2] = -100
    expected = cluster_prediction_by_loops(z, prototypes, assignments, 0.1)
    loss = deepcluster.cluster_prediction(z, prototypes, assignments, 0.1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    by_loops = torch.autograd.grad(expected, z)[0]
    assert (torch.autograd.grad(loss, z)[0] - by_loops).abs().max() < 1e-12

def test_loss_of_known_cases():
    torch.manual_seed(0)
    z = unit(4, 6, 8)
    assignments = torch.randint(5, (3, 6))
    same = unit(1, 1, 8).expand(3, 5, 8)
    loss = deepcluster.cluster_prediction(z, same, assignments, 0.1)
    assert loss.item() == pytest.approx(math.log(5), rel=1e-12)
    nobody = torch.full((3, 6), -100)
    assert deepcluster.cluster_prediction(z, unit(3, 5, 8), nobody, 0.1).item() == 0

def test_gradient_of_two_processes_is_that_of_the_whole_batch():
    two_processes("cluster_prediction")

def version_2(num_images, heads=3, num_clusters=3):
    return deepcluster.DeepCluster("resnet10x0.125", "small", 2, 8, 4, heads, num_clusters,
                                   num_images)

def test_model_is_the_papers():
    model = version_2(20)
    kinds = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert [type(module) for module in model.projector] == kinds
    assert not any("prototypes" in name for name, _ in model.named_parameters())
    z = model([torch.rand(5, 3, size, size) for size in (16, 16, 8)])
    assert z.shape == (3, 5, 4)
    assert (z.norm(dim=2) - 1).abs().max() < 1e-6

def test_heads_take_turns_with_the_memories_and_unseen_images_are_left_out():
    torch.manual_seed(0)
    model = version_2(20)
    z = unit(2, 15, 4).float()
    indices = torch.randperm(20)[:15]
    model.remember(z, indices)
    assert torch.equal(model.memory[:, indices], z)
    assert (model.memory.any(2).sum(1) == 15).all()
    model.cluster(4)
    for head in range(3):
        labels = model.assignments[head]
        assert torch.equal(labels >= 0, model.memory[0].any(1))
        assert (labels[labels < 0] == -100).all()
        of_head = z[head % 2] @ model.prototypes[head].T
        assert torch.equal(labels[indices], of_head.argmax(1))

def test_heads_of_one_memory_are_different_clusterings():
    """Each starts from other rows; else the third head would be the first once more."""
    torch.manual_seed(0)
    model = version_2(200, num_clusters=12)
    model.remember(unit(2, 200, 4).float(), torch.arange(200))
    model.cluster(3)
    assert not torch.equal(model.assignments[0], model.assignments[2])

# ------------------------------------------------------------------- whole runs

def nmi_by_loops(clusterings):
    """Of each clustering with the one before."""
    values = [0.0]
    for before, now in zip(clusterings, clusterings[1:]):
        seen = (before >= 0) & (now >= 0)
        values.append(mutual_information_by_loops(before[seen], now[seen]))
    return values

def note_clusterings(monkeypatch, name):
    """The list to which every call of DeepCluster.`name` adds the model's assignments, the weights
    of its clusters, and those of its classifier."""
    notes = []
    cluster = getattr(deepcluster.DeepCluster, name)

    def noting(model, *args):
        cluster(model, *args)
        classifier = None
        if hasattr(model, "classifier"):
            classifier = model.classifier.weight.detach().clone()
        notes.append((model.assignments.clone(), model.weights.clone(), classifier))

    monkeypatch.setattr(deepcluster.DeepCluster, name, noting)
    return notes

def test_order_of_version_2(few_labelled, tmp_path, monkeypatch):
    """A pass over the images fills the memory; every epoch begins with the clustering; embeddings
    are remembered after they were scored."""
    notes = note_clusterings(monkeypatch, "cluster")
    names = ("cluster", "forward", "remember")
    calls = watch(monkeypatch, *((deepcluster.DeepCluster, name) for name in names),
                  (deepcluster, "cluster_prediction"), (common.Batches, "indices"))
    train(deepcluster, *RUN, "--output", tmp_path)
    batches = [indices for name, _, indices in calls if name == "indices"]
    calls = [call for call in calls if call[0] != "indices"]
    epoch = ["cluster", *["forward", "cluster_prediction", "remember"] * 10]
    assert [name for name, _, _ in calls] == ["forward", "remember"] * 10 + epoch * 2
    assert all(len(args[1]) == 2 for name, args, _ in calls[:20] if name == "forward")

    _, (_, views), outputs = calls[21]
    _, (z, _, labels, temperature), _ = calls[22]
    _, (_, stored, indices), _ = calls[23]
    assert [x.shape[-1] for x in views] == [8, 8, 16]
    assert torch.equal(z, outputs) and torch.equal(stored, z[:2]) and temperature == 0.1
    assert torch.equal(indices, batches[10])
    assert torch.equal(labels, notes[0][0][:, indices])
    assert labels.min() >= 0 and len(labels.unique()) > 6      # the pass has seen all of them

    nmi = nmi_by_loops([assignments[0] for assignments, _, _ in notes])
    by_step = [value for value in nmi for _ in range(10)]
    assert logged(tmp_path, "nmi") == pytest.approx(by_step, abs=1e-4)
    clusters = [len(assignments[0][assignments[0] >= 0].unique()) for assignments, _, _ in notes]
    assert logged(tmp_path, "empty") == [12 - count for count in clusters for _ in range(10)]

def test_prototypes_do_not_learn(few_labelled, tmp_path, monkeypatch):
    calls = watch(monkeypatch, (deepcluster, "spherical_kmeans"))
    train(deepcluster, *RUN, "--epochs", 1, "--output", tmp_path)
    end = common.read_checkpoint(tmp_path / "checkpoint.pt")["model"]["prototypes"]
    assert len(calls) == 3
    for head, (_, _, (centroids, _)) in enumerate(calls):
        assert torch.equal(end[head], centroids)

def test_order_of_version_1(few_labelled, tmp_path, monkeypatch):
    """Every epoch begins with the features of all images and their clusters, which are the labels
    of a cross entropy."""
    notes = note_clusterings(monkeypatch, "cluster")
    calls = watch(monkeypatch, (common, "features"), (deepcluster.DeepCluster, "cluster"),
                  (deepcluster.DeepCluster, "forward"), (F, "cross_entropy"),
                  (common.Batches, "indices"))
    monkeypatch.setattr(common, "has_labels", lambda name: name == "x")     # no kNN accuracy
    train(deepcluster, *RUN_1, "--epochs", 3, "--output", tmp_path)
    batches = [indices for name, _, indices in calls if name == "indices"]
    calls = [call for call in calls if call[0] != "indices"]
    epoch = ["features", "cluster", *["forward", "cross_entropy"] * 10]
    assert [name for name, _, _ in calls] == epoch * 3
    h, _ = calls[0][2]
    assert len(h) == 416 and torch.equal(calls[1][1][2], h)
    steps = [call for call in calls if call[0] == "cross_entropy"]
    for step, (_, (logits, labels, _), _) in enumerate(steps):
        assignments, _, _ = notes[step // 10]
        assert logits.shape == (40, 12)
        assert torch.equal(labels, assignments[0, batches[step]])
    nmi = nmi_by_loops([assignments[0] for assignments, _, _ in notes])
    by_step = [value for value in nmi for _ in range(10)]
    assert logged(tmp_path, "nmi") == pytest.approx(by_step, abs=1e-4)

def test_every_epoch_of_version_1_has_another_classifier(few_labelled, tmp_path, monkeypatch):
    notes = note_clusterings(monkeypatch, "cluster")
    train(deepcluster, *RUN_1, "--output", tmp_path)
    (_, _, first), (_, _, second) = notes
    assert not torch.equal(first, second)

def test_version_1_clusters_images_without_labels(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(24):
        Image.new("RGB", (20, 20), (10 * i, 100, 250 - 10 * i)).save(tmp_path / f"images/{i}.png")
    train(deepcluster, *RUN_1, "--recipe", "shapes", "--data", tmp_path / "images", "--workers", 0,
          "--batch-size", 12, "--num-prototypes", 3, "--epochs", 1, "--output", tmp_path / "run")
    assert len(logged(tmp_path / "run", "loss")) == 2

def test_two_processes_have_the_same_classifier_in_version_1():
    two_processes("version_1")

def test_gradient_of_two_processes_in_version_1_is_that_of_the_whole_batch():
    two_processes("version_1_gradient")

@pytest.mark.parametrize("version", [1, 2])
def test_loss_is_float32_in_a_bf16_run(version, few_labelled, tmp_path, monkeypatch):
    calls = watch(monkeypatch, (common.ResNet, "forward"), (F, "cross_entropy"))
    train(deepcluster, *RUN, "--version", version, "--epochs", 1, "--precision", "bf16",
          "--output", tmp_path)
    encoded = [h for name, _, h in calls if name == "forward"]
    assert encoded[-1].dtype == torch.bfloat16
    losses = [call for call in calls if call[0] == "cross_entropy"]
    assert losses[0][1][0].dtype == losses[0][2].dtype == torch.float32

def test_rate_starts_at_a_sixteenth_and_ends_above_0(few_labelled, tmp_path):
    train(deepcluster, *RUN, "--warmup-epochs", 1, "--lr", 0.016, "--output", tmp_path)
    peak = 0.016 * 40 / 256
    expected = [peak * (1 + 15 * step / 10) / 16 for step in range(10)]
    for step in range(10):
        expected.append(peak * (0.001 + 0.999 * (1 + math.cos(math.pi * step / 10)) / 2))
    assert logged(tmp_path, "lr") == pytest.approx(expected)

def test_version_chooses_the_recipe():
    args = deepcluster.parse_args(["--version", "1"])
    assert args.recipe == "shapes-v1"
    assert (args.version, args.large_crops, args.small_crops, args.heads) == (1, 1, 0, 1)
    imagenet = deepcluster.parse_args(["--recipe", "imagenet-v1"])
    assert (imagenet.lr, imagenet.weight_decay, imagenet.batch_size) == (0.05, 1e-5, 256)
    assert (imagenet.num_prototypes, imagenet.optimizer) == (10000, "sgd")
    assert deepcluster.parse_args([]).version == 2

@pytest.mark.parametrize("flags,words", [
    (["--heads", "0"], ["--heads"]),
    (["--version", "3"], ["--version"]),
    (["--min-scale", "0.1"], ["--small-scale 0.2: not below --min-scale 0.1"]),
    (["--num-prototypes", "4993"], ["--num-prototypes 4993"]),
    (["--iterations", "x"], ["--iterations", "'x'"])])
def test_mistakes_name_their_flag(flags, words, tmp_path):
    message = mistake(deepcluster, *flags, "--output", tmp_path)
    assert all(word in message for word in words), message
