"""densecl.py: the loss and the matching of places against their equations, a shifted image, the queues, one process against two, whole runs."""
import math

import pytest
import torch
import torch.nn.functional as F

import densecl
import moco
from conftest import BOOKS, TINY, check_bound, check_resuming, check_two_processes, logged, mistake, train, watch

TINY = [*TINY, "--size", "16", "--queue-size", "2000", "--dim", "16", "--bn-splits", "2"]


def dense_loss_by_loops(q, k, maps_q, maps_k, queue, temperature):
    """Equations 2 and 4, one place of one image at a time."""
    dot = lambda a, b: sum(float(x) * float(y) for x, y in zip(a, b))
    total = 0.0
    for n in range(len(q)):
        for s in range(q.shape[1]):
            cosines = [dot(maps_q[n, s], f) / math.sqrt(dot(maps_q[n, s], maps_q[n, s]) * dot(f, f)) for f in maps_k[n]]
            positive = math.exp(dot(q[n, s], k[n, cosines.index(max(cosines))]) / temperature)
            total -= math.log(positive / (positive + sum(math.exp(dot(q[n, s], t) / temperature) for t in queue))) / q.shape[1]
    return total / len(q)


@pytest.mark.parametrize("n,p,d,size,temperature", [(1, 4, 2, 3, 1.0), (3, 9, 8, 20, 0.2), (4, 1, 5, 6, 0.07)])
def test_loss_equals_its_equation(n, p, d, size, temperature):
    torch.manual_seed(n)
    q, k, queue = (F.normalize(torch.randn(*shape, d, dtype=torch.float64), dim=-1) for shape in ((n, p), (n, p), (size,)))
    maps = 3 * torch.randn(2, n, p, 7, dtype=torch.float64)
    expected = dense_loss_by_loops(q, k, *maps, queue, temperature)
    positive = densecl.at_places(k, densecl.match(*maps))
    assert densecl.dense_info_nce(q, positive, queue, temperature).item() == pytest.approx(expected, rel=1e-10)
    assert densecl.dense_info_nce(q.float(), positive.float(), queue.float(), temperature).item() == pytest.approx(expected, rel=1e-5)
    assert densecl.info_nce(q[:, 0], k[:, 0], queue, temperature) == moco.info_nce(q[:, 0], k[:, 0], queue, temperature)


def test_places_find_each_other_again_in_a_shifted_image():
    """Two crops of one picture, one of them two places further right and one further down: what both show is matched."""
    torch.manual_seed(0)
    picture, cell = torch.randn(2, 3, 80, 80), 8
    encoder = densecl.common.resnet("resnet10x0.25", stem="small").eval()
    maps = [encoder.maps(x) for x in (picture[..., :64, :64], picture[..., cell:cell + 64, 2 * cell:2 * cell + 64])]       # 8 x 8 places
    index = densecl.match(*map(densecl.places, maps)).view(2, 8, 8)
    expected = torch.arange(64).view(8, 8)
    right = index[:, 1:, 2:] == expected[:7, :6]               # place (i, j) of the one is (i - 1, j - 2) of the other
    assert right[:, 2:-2, 2:-2].float().mean() > 0.9           # the borders see the filling


def test_matching_takes_the_backbones_features_and_not_the_projections():
    torch.manual_seed(0)
    model = densecl.DenseCL("resnet10x0.25", "small", 8, 16, 1)
    x = torch.rand(4, 3, 32, 32)
    _, _, _, dense_q, dense_k, _ = model(x, x)                 # key network equal, one batch, same image: each place is its own counterpart
    assert torch.allclose(dense_q, dense_k, atol=1e-5)
    with torch.no_grad():
        model.key_dense_projector[0].weight.copy_(torch.randn_like(model.key_dense_projector[0].weight))
    everywhere = densecl.places(model.key_encoder.maps(x))
    expected = F.normalize(model.key_dense_projector(everywhere), dim=2)
    assert torch.allclose(model(x, x)[4], expected, atol=1e-5)                             # still matched to itself, whatever the projector does


def test_model_is_mocos_with_a_second_head_and_queue():
    model = densecl.DenseCL("resnet10x0.25", "small", 8, 16, 2)
    q, k, keys, dense_q, dense_k, dense_keys = model(torch.rand(4, 3, 32, 32), torch.rand(4, 3, 32, 32))
    assert q.shape == k.shape == keys.shape == dense_keys.shape == (4, 8) and dense_q.shape == dense_k.shape == (4, 16, 8)
    assert q.requires_grad and dense_q.requires_grad and not any(v.requires_grad for v in (k, keys, dense_k, dense_keys))
    for v in (q, k, dense_q, dense_k, dense_keys):
        assert (v.norm(dim=-1) - 1).abs().max() < 1e-5
    for name in ("encoder", "projector", "dense_projector"):
        learned, average = getattr(model, name), getattr(model, f"key_{name}")
        before = {key: w.clone() for key, w in average.named_parameters()}
        with torch.no_grad():
            for w in learned.parameters():
                w += 1
        model.update_keys_network(0.75)
        assert all(torch.allclose(w, before[key] + 0.25, atol=1e-5) for key, w in average.named_parameters())
        assert not any(w.requires_grad for w in average.parameters())
    for i in range(5):
        model.enqueue(torch.full((4, 8), float(i)), torch.full((4, 8), -float(i)))
    assert model.queue[::4, 0].tolist() == [4, 1, 2, 3] and model.dense_queue[::4, 0].tolist() == [-4, -1, -2, -3]


def test_dense_keys_are_averages_over_the_places():
    torch.manual_seed(0)
    model = densecl.DenseCL("resnet10x0.25", "small", 8, 16, 1)
    x = torch.rand(4, 3, 32, 32)
    maps = densecl.places(model.key_encoder.maps(x))
    expected = F.normalize(model.key_dense_projector(maps).mean(1), dim=1)
    assert torch.allclose(model(x, x)[5], expected, atol=1e-5)


def test_two_processes_learn_as_one(tmp_path):
    check_two_processes(tmp_path, """
import densecl
model = torch.nn.Linear(12, 6).double()
x, maps = torch.randn(8, 9, 12).double(), torch.randn(2, 8, 9, 5).double()
k, queue = (F.normalize(torch.randn(*shape, 6).double(), dim=-1) for shape in ((8, 9), (16,)))
def loss(network, mine):
    positive = densecl.at_places(k[mine], densecl.match(maps[0, mine], maps[1, mine]))
    return densecl.dense_info_nce(F.normalize(network(x[mine]), dim=2), positive, queue, 0.2)
""", """
mine = parts[common.rank()]
torch.manual_seed(1)                                            # the network whose BatchNorm has no part in this: eval
whole = densecl.DenseCL("resnet10x0.0625", "small", 4, 8, 1).eval()
pixels = torch.randn(2, 8, 3, 16, 16)
torch.manual_seed(common.rank())
q, k, keys, dense_q, dense_k, dense_keys = whole(*pixels[:, mine])
maps_q, maps_k = (densecl.places(e.maps(x)) for e, x in zip((whole.encoder, whole.key_encoder), pixels))
dense = F.normalize(whole.key_dense_projector(maps_k), dim=2)
expected = densecl.at_places(dense, densecl.match(maps_q, maps_k))
assert torch.allclose(dense_k, expected[mine], atol=1e-5) and keys.shape == dense_keys.shape == (8, 4)
assert torch.allclose(dense_keys, F.normalize(whole.key_dense_projector(maps_k).mean(1), dim=1), atol=1e-5)
""")


def test_order_of_a_step_and_the_weight_of_the_places(tmp_path, monkeypatch):
    """The key network moves before the keys are made; queries are scored against the queues before their own keys enter them."""
    names = (densecl.DenseCL, "update_keys_network"), (densecl.DenseCL, "forward"), (densecl, "dense_info_nce"), (densecl.DenseCL, "enqueue")
    calls = watch(monkeypatch, *names, (densecl, "info_nce"))
    train(densecl, *TINY, "--epochs", 1, "--dense-weight", 0.3, "--log-every", 1, "--output", tmp_path)
    assert [name for name, _, _ in calls] == ["update_keys_network", "forward", "info_nce", "info_nce", "dense_info_nce", "enqueue"] * 10
    (_, _, (_, _, keys, _, _, dense_keys)), (_, _, loss_q), _, (_, (_, _, queue, _), loss_r), (_, (_, entered, dense_entered), _) = calls[1:6]
    assert torch.equal(entered, keys) and torch.equal(dense_entered, dense_keys) and not (queue[:, None] == dense_keys).all(2).any()
    assert torch.equal(calls[10][1][2][:500], dense_keys)      # the next query sees them
    assert logged(tmp_path, "loss")[0] == pytest.approx(0.7 * loss_q.item() + 0.3 * loss_r.item(), rel=1e-6)
    check_bound(tmp_path, 2001)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_run_that_was_killed_is_the_run_that_was_not(tmp_path, processes):
    check_resuming(tmp_path, densecl, *TINY, *BOOKS, processes=processes)


def test_misuse(tmp_path, capsys):
    for args, words in ((["--queue-size", "1000"], "--queue-size 1000: not a multiple of the 64 keys of a step"),
                        (["--bn-splits", "7"], "--bn-splits 7: does not divide the 64 images"),
                        (["--dense-weight", "2"], "--dense-weight"), (["--batch-size", "9999"], "larger than the data set")):
        assert words in mistake(densecl, [*args, "--output", tmp_path]) + capsys.readouterr().err
