"""What two_processes() of conftest.py starts: all checks, in one start of two processes.

Each process has half of a batch of 8. The gradient that DistributedDataParallel leaves must be that
of the whole batch, which is computed first, as if in one process."""
import copy, sys, tempfile, traceback
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

import common

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
x1 = torch.randn(8, 12)
x2 = torch.randn(8, 12)
labels = torch.tensor([0, 1, 2, 0, 1, 1, 0, 3])
model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6))

def nt_xent(network, mine):
    import simclr
    z1, z2 = network(torch.cat([x1[mine], x2[mine]])).chunk(2)
    z1 = common.gather_with_gradient(z1)
    z2 = common.gather_with_gradient(z2)
    return simclr.nt_xent(z1, z2, 0.3)

def supervised_contrastive(network, mine, positives="out"):
    import supcon
    z1, z2 = network(torch.cat([x1[mine], x2[mine]])).chunk(2)
    z1 = common.gather_with_gradient(z1)
    z2 = common.gather_with_gradient(z2)
    y = common.gather(labels[mine])
    return supcon.supervised_contrastive(z1, z2, y, 0.3, 0.07, positives)

def supervised_contrastive_in(network, mine):
    return supervised_contrastive(network, mine, "in")

def info_nce(network, mine):
    import moco
    k, queue = F.normalize(x2[:, :6], dim=1), F.normalize(x1[:, 6:], dim=1)
    return moco.info_nce(F.normalize(network(x1[mine]), dim=1), k[mine], queue, 0.2)

def regression_loss(network, mine):
    import byol
    return byol.regression_loss(network(x1[mine]), x2[mine, :6])

def negative_cosine(network, mine):
    import simsiam
    return simsiam.negative_cosine(network(x1[mine]), x2[mine, :6])

def swapped_prediction(network, mine):
    """Codes of gathered scores, of which each process keeps its own rows."""
    import swav
    scores = [network(x1[mine]).tanh(), network(x2[mine]).tanh()]
    codes = []
    for s in scores:
        q = swav.sinkhorn(common.gather(s.detach()), 0.05, 3)
        codes.append(q.chunk(common.WORLD_SIZE)[common.RANK])
    return swav.swapped_prediction(scores, codes, 0.1)

def cluster_prediction(network, mine):
    import deepcluster
    prototypes = F.normalize(x2[:5, :6], dim=1)[None]
    z = F.normalize(network(torch.cat([x1[mine], x2[mine]])), dim=1).view(2, -1, 6)
    return deepcluster.cluster_prediction(z, prototypes, labels[None, mine], 0.1)

def cpc_loss(network, mine):
    """With the candidates of all processes, `--gather`."""
    import cpc_v2
    grid = torch.cat([x1, x2], dim=1).view(8, 2, 12)        # two places an image
    z = network(grid[mine])[:, :, None]                     # (N, rows, 1, d)
    z = common.gather_with_gradient(z)
    return cpc_v2.cpc_loss(z[:, :-1], z, 1)

def instance_softmax(network, mine):
    import insdis
    bank = F.normalize(x2[:, :6], dim=1)
    scores = F.normalize(network(x1[mine]), dim=1) @ bank.T
    return insdis.instance_softmax(scores, 0.2, torch.arange(8)[mine])

def nce(network, mine):
    import insdis
    bank = F.normalize(x2[:, :6], dim=1)
    return insdis.nce(F.normalize(network(x1[mine]), dim=1) @ bank.T, 3.0, 0.2, 8)

def gradient(check):
    """The gradient of the whole batch in one process, and of the halves in two."""
    several = common.RANK, common.WORLD_SIZE
    common.RANK, common.WORLD_SIZE = 0, 1
    single = copy.deepcopy(model)
    whole = check(single, slice(0, 8))
    whole.backward()
    common.RANK, common.WORLD_SIZE = several
    double = copy.deepcopy(model)
    network = common.distribute(double, compiled=False)
    half = check(network, slice(4 * common.RANK, 4 * common.RANK + 4))
    half.backward()
    mean = common.gather(half.detach()[None]).mean()
    assert (mean - whole).abs() < 1e-12
    for w, expected in zip(double.parameters(), single.parameters()):
        assert (w.grad - expected.grad).norm() <= 1e-10 * expected.grad.norm()

def shuffling(_):
    """MoCo deals the images of both processes anew, and back."""
    import moco
    mine = x1[4 * common.RANK:4 * common.RANK + 4]
    order = moco.permutation(8, 3)
    dealt = moco.shuffle(mine, order)
    back, everything = moco.unshuffle(dealt, order)
    assert torch.equal(back, mine) and torch.equal(everything, x1)
    assert torch.equal(dealt, x1[order.chunk(2)[common.RANK]]) and not torch.equal(dealt, mine)

def memory(_):
    """The memory banks of InsDis, CMC and DeepCluster are the same in both processes."""
    import cmc, deepcluster, insdis
    indices = torch.arange(4 * common.RANK, 4 * common.RANK + 4)
    z = F.normalize(x1[:, :6], dim=1)
    one = insdis.InsDis("resnet10x0.125", "small", 6, 8)
    one.memory.copy_(F.normalize(x2[:, :6], dim=1))
    before = one.memory.clone()
    one.remember(z[indices], indices, 0.5)
    assert torch.allclose(one.memory, F.normalize(0.5 * before + 0.5 * z, dim=1))
    two = cmc.CMC("resnet10x0.125", 1.0, "small", "lab", 6, 8)
    two.remember([z[indices], -z[indices]], indices, 0.0)
    assert torch.allclose(two.memory, torch.stack([z, -z]))
    three = deepcluster.DeepCluster("resnet10x0.125", "small", 2, 8, 6, 1, 3, 8)
    three.remember(torch.stack([z[indices], -z[indices]]), indices)
    assert torch.allclose(three.memory, torch.stack([z, -z]))

def kmeans(_):
    """k-means in two processes is k-means in one."""
    import deepcluster
    features = F.normalize(torch.randn(101, 5), dim=1)
    several = common.RANK, common.WORLD_SIZE
    common.RANK, common.WORLD_SIZE = 0, 1
    torch.manual_seed(1)
    centroids, assignments = deepcluster.spherical_kmeans(features, 7, 10)
    common.RANK, common.WORLD_SIZE = several
    torch.manual_seed(1)
    others = deepcluster.spherical_kmeans(features, 7, 10)
    assert torch.allclose(others[0], centroids) and torch.equal(others[1], assignments)

VERSION_1 = ["--version", "1", "--arch", "resnet10x0.125", "--size", "8", "--batch-size", "100",
             "--num-prototypes", "6", "--epochs", "2", "--knn-every", "0", "--precision", "fp32"]

def train_version_1():
    """The first version of DeepCluster on 416 images, for 8 steps."""
    import deepcluster
    torch.set_default_dtype(torch.float32)
    folder = common.gather_objects(tempfile.mkdtemp())[0]
    draw = common.draw_shapes
    with mock.patch.object(common, "draw_shapes", lambda n, seed: draw(n // 12, seed)):
        deepcluster.train(deepcluster.parse_args([*VERSION_1, "--output", folder]),
                          torch.device("cpu"))

def version_1(_):
    """The first version of DeepCluster, whose classifier is drawn anew at every epoch, has the same
    one in both processes at every step."""
    import deepcluster
    classifiers = []
    forward = deepcluster.DeepCluster.forward

    def noting(model, crops):
        classifiers.append(model.classifier.weight.detach().clone())
        return forward(model, crops)

    with mock.patch.object(deepcluster.DeepCluster, "forward", noting):
        train_version_1()
    assert len(classifiers) == 8
    for mine in classifiers:
        first, second = common.gather(mine[None])
        assert torch.equal(first, second)

def version_1_gradient(_):
    """The first step of the first version of DeepCluster leaves the gradient of the whole batch:
    of the mean of every image's cross entropy, times the weight of its cluster. The network has
    layer norm, because batch norm would see the images of one process alone."""
    import deepcluster
    seen = {}
    resnet = common.resnet
    forward = deepcluster.DeepCluster.forward
    cross_entropy = F.cross_entropy

    def with_layer_norm(arch, stem):
        return resnet(arch, norm="layer", stem=stem)

    def noting_forward(model, crops):
        seen.update(model=model, before=copy.deepcopy(model), x=crops[0])
        return forward(model, crops)

    def noting_labels(logits, labels, *args, **options):
        seen.update(labels=labels)
        return cross_entropy(logits, labels, *args, **options)

    class FirstStep(Exception):
        pass

    def stop(*_, **__):
        raise FirstStep

    with mock.patch.object(common, "resnet", with_layer_norm), \
            mock.patch.object(deepcluster.DeepCluster, "forward", noting_forward), \
            mock.patch.object(F, "cross_entropy", noting_labels), \
            mock.patch.object(common.Run, "finish_step", stop):
        try:
            train_version_1()
        except FirstStep:
            pass
    single = seen["before"]
    single.zero_grad()
    labels = common.gather(seen["labels"])
    logits = forward(single, [common.gather(seen["x"])])[0]
    assert len(labels) == len(logits) == 100
    total = 0.0
    for i, label in enumerate(labels):
        p = logits[i].softmax(0)[label]
        total -= single.weights[label] * torch.log(p)
    (total / 100).backward()
    for w, expected in zip(seen["model"].parameters(), single.parameters(), strict=True):
        assert (w.grad - expected.grad).norm() <= 1e-4 * expected.grad.norm()

GRADIENTS = [nt_xent, supervised_contrastive, supervised_contrastive_in, info_nce, regression_loss,
             negative_cosine, swapped_prediction, cluster_prediction, cpc_loss, instance_softmax,
             nce]

if __name__ == "__main__":
    common.start()
    for check in [*GRADIENTS, shuffling, memory, kmeans, version_1,
                  version_1_gradient]:
        torch.manual_seed(0)
        try:
            gradient(check) if check in GRADIENTS else check(None)
            sys.stdout.write(f"{check.__name__}: equal\n")     # at once, as the other does too
            sys.stdout.flush()
        except Exception:
            traceback.print_exc()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
