"""moco.py: the loss against its equation, the key encoder, the queue, batch norm over parts of a
batch, what shuffling is for, and the order of a step."""
import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import moco
from conftest import logged, mistake, tiny, train, two_processes, watch

SMALL = [*tiny("moco"), "--batch-size", "20", "--queue-size", "60", "--epochs", "1"]    # 5 steps

def unit(*shape):
    """Random vectors of unit length, float64."""
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)

def dot(a, b):
    return sum(float(x) * float(y) for x, y in zip(a, b))

# ------------------------------------------------------------------- loss

def info_nce_by_loops(q, k, queue, temperature):
    """v1, equation 1, one query and one key at a time: the loss, and its gradient (N, d) in q."""
    loss = 0.0
    gradient = torch.zeros_like(q)
    for i in range(len(q)):
        candidates = [k[i], *queue]
        weights = [math.exp(dot(q[i], c) / temperature) for c in candidates]
        loss -= math.log(weights[0] / sum(weights)) / len(q)
        gradient[i] -= k[i] / temperature / len(q)
        for weight, c in zip(weights, candidates):
            gradient[i] += weight / sum(weights) * c / temperature / len(q)
    return loss, gradient

CASES = [(1, 2, 3, 1.0), (6, 8, 20, 0.2), (9, 16, 50, 0.07)]

@pytest.mark.parametrize("n,d,size,temperature", CASES)
def test_loss_and_gradient_equal_their_equation(n, d, size, temperature):
    torch.manual_seed(n)
    q, k, queue = unit(n, d).requires_grad_(), unit(n, d), unit(size, d)
    expected, gradient = info_nce_by_loops(q.detach(), k, queue, temperature)
    loss = moco.info_nce(q, k, queue, temperature)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert (q.grad - gradient).abs().max() < 1e-12
    loss = moco.info_nce(q.float(), k.float(), queue.float(), temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-5)

def test_loss_of_keys_that_are_all_alike():
    same = F.normalize(torch.ones(1, 8, dtype=torch.float64), dim=1)
    loss = moco.info_nce(same.expand(5, 8), same.expand(5, 8), same.expand(4096, 8), 0.2)
    assert loss.item() == pytest.approx(math.log(4097), rel=1e-12)

def test_gradient_flows_into_the_query_alone():
    q, k, queue = (torch.randn(4, 8, requires_grad=True) for _ in range(3))
    moco.info_nce(q, k, queue, 0.2).backward()
    assert q.grad is not None and k.grad is None and queue.grad is None
    model = moco.MoCo("resnet10x0.125", "small", 2, 8, 16, 1)
    q, k, keys = model(torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16), torch.arange(4))
    assert q.requires_grad and not k.requires_grad and not keys.requires_grad
    moco.info_nce(q, k, model.queue, 0.2).backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is None) == name.startswith("key_"), name

# ------------------------------------------------------------------- model

def test_key_encoder_starts_as_a_copy_and_averages_parameters_only():
    model = moco.MoCo("resnet10x0.125", "small", 2, 8, 16, 1)
    for name in ("encoder", "projector"):
        learned = getattr(model, name)
        average = getattr(model, f"key_{name}")
        for key, value in learned.state_dict().items():
            assert torch.equal(value, average.state_dict()[key])
        with torch.no_grad():
            for weight in learned.parameters():
                weight += 1
    model.encoder.bn1.running_mean += 1
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.update_key_encoder(0.75)
    for key, value in model.state_dict().items():
        averaged = key.startswith("key_") and key.endswith(("weight", "bias"))
        expected = before[key] + 0.25 if averaged else before[key]
        assert torch.allclose(value, expected, atol=1e-6), key

def test_queue_is_first_in_first_out():
    """Where the keys of a step go follows from the step: a run that resumes goes on there."""
    model = moco.MoCo("resnet10x0.125", "small", 1, 2, 6, 1)
    for step in range(4):
        model.enqueue(torch.full((2, 2), float(step)), step)
    assert model.queue[:, 0].tolist() == [3, 3, 1, 1, 2, 2]
    resumed = moco.MoCo("resnet10x0.125", "small", 1, 2, 6, 1)
    resumed.load_state_dict(model.state_dict())
    for each in (model, resumed):
        each.enqueue(torch.full((2, 2), 4.0), 4)
    assert torch.equal(resumed.queue, model.queue)
    assert model.queue[:, 0].tolist() == [3, 3, 4, 4, 2, 2]

def test_queue_starts_with_random_directions():
    queue = moco.MoCo("resnet10x0.125", "small", 1, 16, 4000, 1).queue
    assert (queue.norm(dim=1) - 1).abs().max() < 1e-5 and queue.mean(0).norm() < 0.05

def test_versions():
    v1, v2 = (moco.projector(8, version, 4) for version in (1, 2))
    assert [type(module) for module in v1] == [nn.Linear]
    assert [type(module) for module in v2] == [nn.Linear, nn.ReLU, nn.Linear]
    assert moco.parse_args(["--recipe", "imagenet"]).temperature == 0.2
    version_1 = ["--recipe", "imagenet", "--version", "1"]
    assert moco.parse_args(version_1).temperature == 0.07
    assert moco.parse_args([*version_1, "--temperature", "0.3"]).temperature == 0.3
    assert moco.parse_args(["--recipe", "imagenet-v1", "--version", "2"]).temperature == 0.2

# ------------------------------------------------------------------- split batch norm, shuffling

def split_norm(channels, splits, momentum=0.1):
    model = nn.Sequential(nn.BatchNorm2d(channels, momentum=momentum))
    moco.split_batch_norm(model, splits)
    norm = model[0].double()
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    return norm

@pytest.mark.parametrize("splits", [2, 4])
def test_split_norm_uses_the_statistics_of_each_part(splits):
    """Part g is the images g, g + splits, ...: each is normalised as if it were a whole batch."""
    torch.manual_seed(splits)
    norm = split_norm(3, splits)
    x = torch.randn(8, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(x)
    expected = torch.zeros_like(x)
    for part in range(splits):
        images = x[part::splits]
        mean = images.mean((0, 2, 3), keepdim=True)
        var = images.var((0, 2, 3), unbiased=False, keepdim=True)
        normal = (images - mean) / (var + norm.eps).sqrt()
        y = normal * norm.weight[:, None, None] + norm.bias[:, None, None]
        expected = expected.index_add(0, torch.arange(part, 8, splits), y)
    y = norm(x)
    assert (y - expected).abs().max() < 1e-12
    wanted = [x, norm.weight, norm.bias]
    gradients = torch.autograd.grad((weights * y).sum(), wanted)
    for g, e in zip(gradients, torch.autograd.grad((weights * expected).sum(), wanted)):
        assert (g - e).abs().max() < 1e-11

def test_running_statistics_weigh_all_parts_alike():
    """As the official ones: each part updates a copy of the old statistics, and the new ones are
    the mean of the copies. An update by one part after the other would favour the last."""
    torch.manual_seed(0)
    norm = split_norm(2, 4, momentum=0.3)
    scale = torch.tensor([1.0, 5.0]).double().repeat_interleave(2).repeat(3)    # of the parts
    x = scale[:, None, None, None] * (torch.randn(12, 2, 3, 3).double() + 1)
    mean = torch.zeros(2).double()
    var = torch.ones(2).double()
    one_by_one = mean.clone()
    for _ in range(2):
        norm(x)
        means = torch.stack([x[part::4].mean((0, 2, 3)) for part in range(4)])
        variances = torch.stack([x[part::4].var((0, 2, 3)) for part in range(4)])   # unbiased
        mean = 0.7 * mean + 0.3 * means.mean(0)
        var = 0.7 * var + 0.3 * variances.mean(0)
        for m in means:
            one_by_one = 0.7 * one_by_one + 0.3 * m
    assert (norm.running_mean - mean).abs().max() < 1e-12
    assert (norm.running_var - var).abs().max() < 1e-12
    assert (norm.running_mean - one_by_one).abs().min() > 0.1

def test_split_norm_in_evaluation_is_batch_norm():
    norm = split_norm(3, 2)
    norm(torch.randn(4, 3, 2, 2).double())
    plain = nn.BatchNorm2d(3).double()
    plain.load_state_dict(norm.state_dict())
    x = torch.randn(3, 3, 2, 2).double()                # whose number the parts do not divide
    assert torch.equal(norm.eval()(x), plain.eval()(x))

def images_that_notice(encode):
    """For each of 8 images the set of those whose output changes when it alone is changed: those
    that share its batch statistics."""
    torch.manual_seed(0)
    x = torch.randn(8, 1, 2, 2)
    noticed = []
    for i in range(8):
        changed = x.clone()
        changed[i] *= 3
        difference = (encode(changed) - encode(x)).flatten(1).abs().amax(1)
        noticed.append(set((difference > 1e-6).nonzero()[:, 0].tolist()))
    return noticed

def test_shuffled_keys_share_statistics_with_other_images_than_queries():
    order = moco.permutation(8, step=3)

    def as_keys(norm):
        return lambda x: moco.unshuffle(norm(moco.shuffle(x, order)), order)[0]

    norm = nn.Sequential(nn.BatchNorm2d(1))
    everybody = [set(range(8))] * 8         # one batch with one set of statistics for all of it:
    assert images_that_notice(norm) == images_that_notice(as_keys(norm)) == everybody
    moco.split_batch_norm(norm, 2)          # shuffling alone does nothing
    queries = images_that_notice(norm)
    keys = images_that_notice(as_keys(norm))
    assert queries == [{i for i in range(8) if i % 2 == j % 2} for j in range(8)]
    assert all(len(others) == 4 for others in keys)
    assert all(a != b for a, b in zip(queries, keys))

def test_order_is_a_permutation_for_each_step():
    order = moco.permutation(50, step=7)
    assert torch.equal(order.sort().values, torch.arange(50))
    torch.manual_seed(5)                    # the same in every process, whatever it drew before
    assert torch.equal(order, moco.permutation(50, step=7))
    assert not torch.equal(order, moco.permutation(50, step=8))
    assert torch.equal(moco.permutation(50, 7, shuffled=False), torch.arange(50))

def test_keys_come_back_to_their_own_images():
    torch.manual_seed(0)
    model = moco.MoCo("resnet10x0.125", "small", 2, 8, 16, 1).eval()    # no batch statistics
    x_q, x_k = torch.rand(2, 6, 3, 16, 16)
    order = moco.permutation(6, step=1)
    for a, b in zip(model(x_q, x_k, order), model(x_q, x_k, torch.arange(6))):
        assert torch.allclose(a, b, atol=1e-6)

@pytest.mark.parametrize("script", ["moco", "densecl", "image_mixture"])
def test_every_recipe_splits_the_batch_of_one_process_for_bn(script):
    recipes = importlib.import_module(script).RECIPES
    assert all(recipe["bn_splits"] > 1 for recipe in recipes.values())

def test_two_processes_shuffle_as_one():
    two_processes("shuffling")

def test_two_processes_learn_as_one():
    two_processes("info_nce")

# ------------------------------------------------------------------- training

def test_order_of_a_step(few_images, tmp_path, monkeypatch):
    """The key encoder is updated before the keys are made; a query is scored against the queue
    before its own keys enter it."""
    calls = watch(monkeypatch, (moco.MoCo, "update_key_encoder"), (moco.MoCo, "forward"),
                  (moco, "info_nce"), (torch.optim.AdamW, "step"), (moco.MoCo, "enqueue"))
    train(moco, *SMALL, "--output", tmp_path)
    names = ["update_key_encoder", "forward", "info_nce", "step", "enqueue"]
    assert [name for name, _, _ in calls] == names * 5
    queues = []                             # as each step's queries were scored against them
    seen = []                               # the keys of all steps
    for step in range(5):
        _, forward, info_nce, _, enqueue = calls[5 * step:5 * step + 5]
        q, k, keys = forward[2]
        assert info_nce[1][0] is q and info_nce[1][1] is k and enqueue[1][1] is keys
        assert enqueue[1][2] == step
        queues.append(info_nce[1][2])
        seen.append(keys)
    queue = queues[-1]                      # the buffer itself, as it is at the end
    assert torch.equal(queue, torch.cat([seen[3], seen[4], seen[2]]))

def test_queries_are_scored_against_keys_of_earlier_steps(few_images, tmp_path, monkeypatch):
    snapshots = []
    keys = []
    info_nce = moco.info_nce
    enqueue = moco.MoCo.enqueue

    def scoring(q, k, queue, temperature):
        snapshots.append(queue.clone())
        return info_nce(q, k, queue, temperature)

    def entering(model, new, step):
        keys.append(new.clone())
        enqueue(model, new, step)

    monkeypatch.setattr(moco, "info_nce", scoring)
    monkeypatch.setattr(moco.MoCo, "enqueue", entering)
    train(moco, *SMALL, "--output", tmp_path)
    for step in range(5):
        is_key = [[(snapshots[step] == key).all(1).any().item() for key in keys[t]]
                  for t in range(5)]
        for t in range(5):                  # a queue of 60 holds the last three steps
            assert all(is_key[t]) == (step - 3 <= t < step) == any(is_key[t])

def test_symmetric_loss_is_the_sum_over_both_directions(few_images, tmp_path, monkeypatch):
    calls = watch(monkeypatch, (moco.MoCo, "update_key_encoder"), (moco.MoCo, "forward"),
                  (moco, "info_nce"), (moco.MoCo, "enqueue"), (common.Run, "finish_step"))
    train(moco, *SMALL, "--symmetric", "--queue-size", "80", "--output", tmp_path)
    names = ["update_key_encoder", "forward", "info_nce", "forward", "info_nce", "enqueue",
             "finish_step"]
    assert [name for name, _, _ in calls] == names * 5
    _, one, loss_1, other, loss_2, enqueue, finish = calls[:7]
    assert one[1][1] is other[1][2] and one[1][2] is other[1][1]        # x1 and x2 change places
    assert torch.equal(enqueue[1][1], torch.cat([one[2][2], other[2][2]]))
    total = loss_1[2].item() + loss_2[2].item()
    assert finish[1][1].item() == pytest.approx(total, rel=1e-6)

def test_learning_rate_of_both_versions(few_images, tmp_path):
    falls = [moco.learning_rate(step, 0, 10, version=1) for step in range(10)]
    assert falls == pytest.approx([1] * 6 + [0.1] * 2 + [0.01] * 2)
    cosine = [moco.learning_rate(step, 4, 12, version=2) for step in range(12)]
    expected = [step / 4 for step in range(4)]
    expected += [0.5 + 0.5 * math.cos(math.pi * step / 8) for step in range(8)]
    assert cosine == pytest.approx(expected)
    train(moco, *SMALL, "--version", 1, "--lr", 0.01, "--warmup-epochs", 0, "--log-every", 1,
          "--output", tmp_path)
    rates = [0.01 * 20 / 256 * fall for fall in [1, 1, 1, 0.1, 0.01]]
    assert logged(tmp_path, "lr") == pytest.approx(rates)

@pytest.mark.parametrize("version,blur,names", [
    (1, 0, ["grayscale", "color_jitter", "normalize"]),
    (2, 0, ["color_jitter", "grayscale", "normalize"]),
    (2, 0.5, ["color_jitter", "grayscale", "gaussian_blur", "normalize"])])
def test_order_of_the_augmentation(monkeypatch, version, blur, names):
    every = ["grayscale", "color_jitter", "gaussian_blur", "normalize"]
    operations = watch(monkeypatch, *((common, name) for name in every))
    moco.augment(torch.rand(2, 3, 8, 8), version, 1.0, blur)
    assert [name for name, _, _ in operations] == names

@pytest.mark.parametrize("flags,message", [
    (["--queue-size", "1000"], "--queue-size 1000: not a multiple of the 64 keys of a step"),
    (["--queue-size", "192", "--symmetric"], "not a multiple of the 128 keys of a step"),
    (["--bn-splits", "7"], "--bn-splits 7: does not cut the 64 images"),
    (["--bn-splits", "64"], "into equal parts of at least 2"),
    (["--version", "3"], "--version")])
def test_mistakes(tmp_path, flags, message):
    assert message in mistake(moco, *flags, "--output", tmp_path)
