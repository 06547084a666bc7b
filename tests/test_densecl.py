"""densecl.py: the dense loss and the matching of positions against their equations, a shifted
image, the queues, and the order of a step. What it shares with moco.py is the same code."""
import inspect
import math

import pytest
import torch
import torch.nn.functional as F

import common
import densecl
import moco
from conftest import logged, mistake, tiny, train, watch
from test_moco import dot, unit

SMALL = [*tiny("densecl"), "--batch-size", "20", "--queue-size", "60", "--epochs", "1"] # 5 steps

@pytest.mark.parametrize("name", ["shuffle", "unshuffle", "SplitBatchNorm2d", "split_batch_norm",
                                  "info_nce"])
def test_what_is_mocos_is_mocos(name):
    ours, theirs = (inspect.getsource(getattr(module, name)) for module in (densecl, moco))
    assert ours == theirs

# ------------------------------------------------------------------- loss

def match_by_loops(maps_q, maps_k):
    """Equation 4, one position at a time."""
    n, positions, _ = maps_q.shape
    index = torch.zeros(n, positions, dtype=torch.int64)
    for i in range(n):
        for s in range(positions):
            f = maps_q[i, s]
            cosines = [dot(f, g) / math.sqrt(dot(f, f) * dot(g, g)) for g in maps_k[i]]
            index[i, s] = cosines.index(max(cosines))
    return index

def dense_info_nce_by_loops(q, k, index, queue, temperature):
    """Equation 2, one position of one image at a time."""
    n, positions, _ = q.shape
    loss = 0.0
    for i in range(n):
        for s in range(positions):
            positive = math.exp(dot(q[i, s], k[i, index[i, s]]) / temperature)
            negatives = [math.exp(dot(q[i, s], t) / temperature) for t in queue]
            loss -= math.log(positive / (positive + sum(negatives))) / (n * positions)
    return loss

CASES = [(1, 4, 2, 3, 1.0), (3, 9, 8, 20, 0.2), (4, 1, 5, 6, 0.07)]

@pytest.mark.parametrize("n,positions,d,size,temperature", CASES)
def test_loss_and_matching_equal_their_equations(n, positions, d, size, temperature):
    torch.manual_seed(n)
    q, k, queue = unit(n, positions, d), unit(n, positions, d), unit(size, d)
    maps_q, maps_k = 3 * torch.randn(2, n, positions, 7, dtype=torch.float64)
    index = densecl.match(maps_q, maps_k)
    assert torch.equal(index, match_by_loops(maps_q, maps_k))
    positives = k.gather(1, index[:, :, None].expand_as(q))
    expected = dense_info_nce_by_loops(q, k, index, queue, temperature)
    loss = densecl.dense_info_nce(q, positives, queue, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss = densecl.dense_info_nce(q.float(), positives.float(), queue.float(), temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-5)

def test_maps_may_have_different_numbers_of_positions():
    torch.manual_seed(0)
    maps_q = torch.randn(2, 4, 6, dtype=torch.float64)
    maps_k = torch.randn(2, 9, 6, dtype=torch.float64)
    index = densecl.match(maps_q, maps_k)
    assert torch.equal(index, match_by_loops(maps_q, maps_k)) and index.max() > 3

def test_positions_are_row_by_row():
    maps = torch.rand(2, 5, 3, 4)
    rows = densecl.positions(maps)
    assert rows.shape == (2, 12, 5)
    assert all(torch.equal(rows[:, 4 * i + j], maps[:, :, i, j])
               for i in range(3) for j in range(4))

# ------------------------------------------------------------------- matching

def test_positions_find_each_other_in_a_shifted_image():
    """Two crops of one picture, the second one position further down and two further right: what
    both show is matched."""
    torch.manual_seed(0)
    picture = torch.randn(2, 3, 80, 80)
    encoder = common.resnet("resnet10x0.25", stem="small").eval()       # 8 pixels a position
    maps_q = densecl.positions(encoder.maps(picture[:, :, :64, :64]))
    maps_k = densecl.positions(encoder.maps(picture[:, :, 8:72, 16:80]))
    index = densecl.match(maps_q, maps_k).view(2, 8, 8)
    place = torch.arange(64).view(8, 8)
    right = index[:, 1:, 2:] == place[:7, :6]       # (i, j) of the first is (i - 1, j - 2)
    assert right[:, 2:-2, 2:-2].float().mean() > 0.9        # the border sees the padding

def test_matching_is_by_the_backbones_features_and_not_by_projections():
    torch.manual_seed(0)
    model = densecl.DenseCL("resnet10x0.125", "small", 8, 16, 1)
    x = torch.rand(4, 3, 32, 32)
    order = torch.arange(4)
    _, _, _, dense_q, dense_k, _ = model(x, x, order)
    assert torch.allclose(dense_q, dense_k, atol=1e-5)      # each position is its own counterpart
    with torch.no_grad():
        model.key_dense_projector[0].weight.normal_()
    maps = densecl.positions(model.key_encoder.maps(x))
    expected = F.normalize(model.key_dense_projector(maps), dim=2)
    assert torch.allclose(model(x, x, order)[4], expected, atol=1e-5)   # and still is

def test_matching_is_float32_whatever_the_precision():
    torch.manual_seed(0)
    maps_q = 1 + 0.03 * torch.randn(4, 16, 32)              # all cosines are near 1
    maps_k = maps_q + 0.003 * torch.randn(4, 16, 32)
    with torch.autocast("cpu", torch.bfloat16):
        index = densecl.match(maps_q, maps_k)
    assert torch.equal(index, match_by_loops(maps_q, maps_k))

# ------------------------------------------------------------------- model

def test_model_is_mocos_with_a_second_head():
    model = densecl.DenseCL("resnet10x0.125", "small", 8, 16, 2)
    x_q, x_k = torch.rand(2, 4, 3, 32, 32)
    q, k, keys, dense_q, dense_k, dense_keys = model(x_q, x_k, torch.arange(4))
    assert q.shape == k.shape == keys.shape == dense_keys.shape == (4, 8)
    assert dense_q.shape == dense_k.shape == (4, 16, 8)
    assert q.requires_grad and dense_q.requires_grad
    assert not any(v.requires_grad for v in (k, keys, dense_k, dense_keys))
    for v in (q, k, keys, dense_q, dense_k, dense_keys):
        assert (v.norm(dim=-1) - 1).abs().max() < 1e-5

@pytest.mark.parametrize("name", ["encoder", "projector", "dense_projector"])
def test_key_networks_are_averages(name):
    model = densecl.DenseCL("resnet10x0.125", "small", 8, 16, 1)
    average = getattr(model, f"key_{name}")
    before = {key: weight.clone() for key, weight in average.named_parameters()}
    with torch.no_grad():
        for key, weight in getattr(model, name).named_parameters():
            assert torch.equal(weight, before[key])
            weight += 1
    model.update_key_encoder(0.75)
    for key, weight in average.named_parameters():
        assert torch.allclose(weight, before[key] + 0.25, atol=1e-5)
        assert not weight.requires_grad

def test_both_queues_are_first_in_first_out():
    model = densecl.DenseCL("resnet10x0.125", "small", 8, 16, 1)
    for step in range(5):
        keys = torch.full((4, 8), float(step))
        model.enqueue(keys, -keys, step)
    assert model.queue[::4, 0].tolist() == [4, 1, 2, 3]
    assert model.dense_queue[::4, 0].tolist() == [-4, -1, -2, -3]

def test_dense_keys_are_averaged_over_the_positions():
    torch.manual_seed(0)
    model = densecl.DenseCL("resnet10x0.125", "small", 8, 16, 1)
    x = torch.rand(4, 3, 32, 32)
    maps = densecl.positions(model.key_encoder.maps(x))
    expected = F.normalize(model.key_dense_projector(maps).mean(1), dim=1)
    assert torch.allclose(model(x, x, torch.arange(4))[5], expected, atol=1e-5)

def test_everything_comes_back_to_its_own_image():
    """Keys, dense keys and the features that are matched, whatever the order of the keys."""
    torch.manual_seed(0)
    model = densecl.DenseCL("resnet10x0.125", "small", 8, 16, 1).eval()     # no batch statistics
    x_q, x_k = torch.rand(2, 6, 3, 32, 32)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    for a, b in zip(model(x_q, x_k, order), model(x_q, x_k, torch.arange(6))):
        assert torch.allclose(a, b, atol=1e-6)

# ------------------------------------------------------------------- training

def test_order_of_a_step(few_images, tmp_path, monkeypatch):
    """The key encoder is updated before the keys are made; queries are scored against the queues
    before their own keys enter them."""
    scored = []
    dense_info_nce = densecl.dense_info_nce

    def scoring(q, k, queue, temperature):
        scored.append(queue.clone())
        return dense_info_nce(q, k, queue, temperature)

    monkeypatch.setattr(densecl, "dense_info_nce", scoring)
    calls = watch(monkeypatch, (densecl.DenseCL, "update_key_encoder"),
                  (densecl.DenseCL, "forward"), (densecl, "dense_info_nce"),
                  (torch.optim.AdamW, "step"), (densecl.DenseCL, "enqueue"))
    train(densecl, *SMALL, "--output", tmp_path)
    names = ["update_key_encoder", "forward", "dense_info_nce", "step", "enqueue"]
    assert [name for name, _, _ in calls] == names * 5
    for step in range(5):
        _, forward, loss_r, _, enqueue = calls[5 * step:5 * step + 5]
        q, k, keys, dense_q, dense_k, dense_keys = forward[2]
        assert loss_r[1][0] is dense_q and loss_r[1][1] is dense_k
        assert enqueue[1][1] is keys and enqueue[1][2] is dense_keys and enqueue[1][3] == step
        place = slice(step % 3 * 20, step % 3 * 20 + 20)
        assert not torch.equal(scored[step][place], dense_keys)
        if step < 4:                                    # the next queries see them
            assert torch.equal(scored[step + 1][place], dense_keys)

@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_weight_of_the_dense_loss(few_images, tmp_path, weight):
    train(densecl, *SMALL, "--dense-weight", weight, "--log-every", 1, "--output", tmp_path)
    loss, loss_q, loss_r = (logged(tmp_path, key) for key in ("loss", "loss_q", "loss_r"))
    expected = [(1 - weight) * a + weight * b for a, b in zip(loss_q, loss_r)]
    assert loss == pytest.approx(expected, rel=1e-6) and len(loss) == 5
    assert loss_q != pytest.approx(loss_r, rel=1e-3)

@pytest.mark.parametrize("flags,message", [
    (["--queue-size", "1000"], "--queue-size 1000: not a multiple of --batch-size"),
    (["--bn-splits", "7"], "--bn-splits 7: does not cut the 64 images"),
    (["--dense-weight", "2"], "--dense-weight")])
def test_mistakes(tmp_path, flags, message):
    assert message in mistake(densecl, *flags, "--output", tmp_path)
