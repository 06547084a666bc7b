"""cpc_v2.py: the loss against its equation, who sees what in each direction, the average of the weights, one process against two, whole runs."""
import json, math, resource

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import cpc_v2
import evaluate
from conftest import BOOKS, check_bound, check_resuming, check_two_processes, mistake, result_of, train

TINY = ["--arch", "resnet10x0.125", "--resize", "13", "--size", "12", "--patch-size", "6", "--stride", "3", "--offsets", "1", "2", "--hidden", "8",
        "--layers", "2", "--dim", "8", "--batch-size", "200", "--epochs", "1", "--lr", "0.002"]  # 3 x 3 patches, 25 steps


# ---------------------------------------------------------------- loss

def loss_by_loops(predictions, targets, offset):
    """The objective as it is written, one place at a time."""
    p, t = predictions.double(), targets.double()
    n, rows, columns, _ = t.shape
    total = []
    for b in range(n):
        for i in range(rows - offset):
            for j in range(columns):
                all_scores = [float(p[b, i, j] @ t[b2, i2, j2]) for b2 in range(n) for i2 in range(rows) for j2 in range(columns)]
                total.append(-math.log(math.exp(float(p[b, i, j] @ t[b, i + offset, j])) / sum(math.exp(s) for s in all_scores)))
    return sum(total) / len(total)


@pytest.mark.parametrize("n,rows,columns,offset", [(1, 2, 1, 1), (2, 6, 6, 3), (3, 5, 4, 2), (2, 3, 5, 1)])
def test_loss_equals_its_equation(n, rows, columns, offset):
    torch.manual_seed(n)
    p, t = torch.randn(n, rows - offset, columns, 4, dtype=torch.float64), 2 * torch.randn(n, rows, columns, 4, dtype=torch.float64)
    expected = loss_by_loops(p, t, offset)
    assert cpc_v2.cpc_loss(p, t, offset).item() == pytest.approx(expected, rel=1e-10)
    assert cpc_v2.cpc_loss(p.float(), t.float(), offset).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("offset", [1, 2, 3, 4, 5])
def test_positives_are_those_of_the_papers_arithmetic(offset):
    """Same image, same column, `offset` rows below."""
    n, rows, columns = 3, 6, 6
    place = [(b, i, j) for b in range(n) for i in range(rows) for j in range(columns)]         # of target number m
    contexts = [(b, i, j) for b in range(n) for i in range(rows - offset) for j in range(columns)]
    found = [place[m] for m in cpc_v2.positives(n, rows, columns, offset)]
    assert found == [(b, i + offset, j) for b, i, j in contexts]


def test_loss_of_known_cases():
    t = torch.randn(16, 6, 6, 64)
    assert cpc_v2.cpc_loss(torch.zeros(16, 3, 6, 64), t, 3).item() == pytest.approx(math.log(576), rel=1e-6)
    one_hot = torch.eye(8, dtype=torch.float64).view(2, 4, 1, 8)                               # every place its own vector: only the true one scores
    assert cpc_v2.cpc_loss(5 * one_hot[:, 2:], one_hot, 2).item() == pytest.approx(-5 + math.log(math.exp(5) + 7), rel=1e-12)
    with pytest.raises(ValueError, match="do not fit"):
        cpc_v2.cpc_loss(t, t, 3)


def test_logits_are_float32_whatever_the_precision():
    torch.manual_seed(0)
    p, t = torch.randn(2, 2, 3, 8).bfloat16(), torch.randn(2, 4, 3, 8).bfloat16()
    exact = cpc_v2.cpc_loss(p.double(), t.double(), 2).item()
    assert cpc_v2.cpc_loss(p, t, 2).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert cpc_v2.cpc_loss(p, t, 2).item() == pytest.approx(exact, rel=1e-5)


# ---------------------------------------------------------------- patches

def test_patches_are_the_slices_of_the_image():
    x = torch.rand(2, 3, 260, 260)
    patches = cpc_v2.extract_patches(x, 80, 36)
    assert patches.shape == (2, 6, 6, 3, 80, 80)
    assert all(torch.equal(patches[:, i, j], x[:, :, 36 * i:36 * i + 80, 36 * j:36 * j + 80]) for i in range(6) for j in range(6))
    assert cpc_v2.extract_patches(x[:, :, :63, :90], 16, 8).shape == (2, 6, 10, 3, 16, 16)
    mosaic = cpc_v2.mosaic(patches)
    assert mosaic.shape == (2, 3, 480, 480) and torch.equal(mosaic[:, :, 80:160, 400:480], patches[:, 1, 5])


def test_crop_is_a_square_of_the_resized_image():
    torch.manual_seed(0)
    boxes = cpc_v2.RandomCrop(260, 300).boxes(5000, 600, 400)
    top, left, height, width = boxes.unbind(1)
    assert (height == 520).all() and (width == 347).all()
    assert top.min() == 0 and top.max() == 80 and left.min() == 0 and left.max() == 53 and abs(top.mean() - 40) < 2
    image = (torch.rand(4, 3, 300, 300) * 255).to(torch.uint8)
    crops = common.crop_and_resize(image, cpc_v2.RandomCrop(260, 300))[0]
    whole = image.float() / 255
    for one, crop in zip(whole, crops):                                                        # at 300 pixels nothing is resized
        inside = one.unfold(1, 260, 1).unfold(2, 260, 1)[:, :, :, 0, 0]
        i, j = ((inside - crop[:, :1, :1]).abs().sum(0) < 1e-5).nonzero()[0]
        assert (one[:, i:i + 260, j:j + 260] - crop).abs().max() < 1e-5
    assert common.crop_one(image[0], cpc_v2.RandomCrop(260, 300))[0].shape == (1, 3, 260, 260)


def test_every_patch_draws_for_itself():
    patch = torch.from_numpy(common.draw_shapes(1, seed=5)[0]).float() / 255
    x = patch.repeat(400, 1, 1, 1)
    views = {}
    for kind in ("none", "drop", "full"):
        common.seed_all(1)
        views[kind] = cpc_v2.augment(x.clone(), kind)
        assert views[kind].shape == x.shape and views[kind].isfinite().all()
        common.seed_all(1)
        assert torch.equal(cpc_v2.augment(x.clone(), kind), views[kind])
    plain = common.normalize(x.clone(), cpc_v2.MEAN, cpc_v2.STD)
    assert torch.equal(views["none"], plain)
    kept = (views["drop"] != 0).flatten(2).any(2)                                              # (400, 3)
    assert (kept.sum(1) == 1).all() and kept.float().mean(0).min() > 0.25
    assert torch.equal(views["drop"][:, 0][kept[:, 0]], plain[:, 0][kept[:, 0]])
    assert len(views["full"].flatten(1).unique(dim=0)) > 395
    back = views["full"] * torch.tensor(cpc_v2.STD)[:, None, None] + torch.tensor(cpc_v2.MEAN)[:, None, None]
    assert back.min() > -1e-5 and back.max() < 1 + 1e-5
    gray = (back.amax(1) - back.amin(1)).amax((1, 2)) < 1e-4
    assert 0.15 < gray.float().mean() < 0.4


# ---------------------------------------------------------------- model

def millions(module):
    return round(sum(p.numel() for p in module.parameters()) / 1e6, 2)


def test_model_is_the_papers():
    args = cpc_v2.parse_args(["--recipe", "imagenet"])
    with torch.device("meta"):
        model = cpc_v2.CPC(args.arch, args.stem, args.norm, args.stages, args.directions, args.offsets, args.hidden, args.layers, args.dim, args.scale)
        assert model.encoder.maps(torch.zeros(1, 3, 224, 224)).shape == (1, 4096, 14, 14)
        assert model.encoder.maps(torch.zeros(1, 3, 80, 80)).shape == (1, 4096, 5, 5)
        patches = cpc_v2.extract_patches(torch.zeros(2, 3, 260, 260), args.patch_size, args.stride)
        found = model(patches)
    assert [(tuple(p.shape), tuple(t.shape), k) for p, t, k in found] == [((2, 3, 6, 64), (2, 6, 6, 64), 3)] * 4
    assert [len(getattr(model.encoder, f"layer{i}")) for i in (1, 2, 3)] == [3, 4, 46]
    widths = [getattr(model.encoder, f"layer{i}")[1] for i in (1, 2, 3)]
    assert [(b.conv2.out_channels, b.conv3.out_channels) for b in widths] == [(64, 256), (128, 512), (512, 4096)]
    assert sum(isinstance(m, nn.Conv2d) for b in model.encoder.modules() if isinstance(b, common.PreBottleneck)
               for name, m in b.named_children() if name != "downsample") + 1 == 160           # and a linear layer: 161
    assert millions(model.encoder) == 303.64 and millions(model.contexts[0]) == 12.15
    assert round(millions(model.encoder) + millions(model.targets[0]) + millions(model.predictors), 2) == 304.95
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    with torch.device("meta"):
        rebuilt = common.resnet(**model.encoder.config)
    assert rebuilt.state_dict().keys() == model.encoder.state_dict().keys()


def tiny_model(directions=4, offsets=(1, 2), norm="layer", layers=5, **options):
    return cpc_v2.CPC("resnet10x0.125", "small", norm, 3, directions, list(offsets), 8, layers, 8, 0.1, **options)


def test_patches_do_not_see_each_other_unless_by_batch_norm():
    torch.manual_seed(0)
    patches = torch.randn(2, 2, 2, 3, 8, 8)
    for norm in ("layer", "batch"):
        model = tiny_model(norm=norm)
        alone = cpc_v2.encode(model.encoder, patches[:1, :1, :1])[0, :, 0, 0] if norm == "layer" else model.encoder(patches[0, 0, :1])[0]
        among = cpc_v2.encode(model.encoder, patches)[0, :, 0, 0]
        assert torch.allclose(alone, among, atol=1e-4) == (norm == "layer")


@pytest.mark.parametrize("direction,allowed", list(enumerate((
    lambda i, j, r, c: r <= i, lambda i, j, r, c: r >= i, lambda i, j, r, c: c >= j, lambda i, j, r, c: c <= j))))
def test_context_sees_one_side_only(direction, allowed):
    """One latent (r, c) is disturbed; the contexts (i, j) that move must be those that may see it, all of them."""
    torch.manual_seed(0)
    model = tiny_model()
    turn, network = model.turns[direction], nn.Sequential(*list(model.contexts[direction])[:-1])       # without the last ReLU, which hides some changes
    rows = columns = 5
    see = lambda z: network(z.rot90(turn, (2, 3))).rot90(-turn, (2, 3))
    z = torch.randn(1, model.encoder.dim, rows, columns)
    with torch.no_grad():
        before = see(z)
        for r in range(rows):
            for c in range(columns):
                other = z.clone()
                other[0, :, r, c] += torch.randn(z.shape[1])
                moved = (see(other) != before).any(1)[0]
                assert moved.tolist() == [[allowed(i, j, r, c) for j in range(columns)] for i in range(rows)]


@pytest.mark.parametrize("direction,step", list(enumerate([(1, 0), (-1, 0), (0, -1), (0, 1)])))
def test_predictions_are_blind_to_what_they_predict(direction, step):
    """By the gradient: a prediction depends on patches at most up to its context's row, its target on one patch, `k` steps further in the direction."""
    torch.manual_seed(0)
    model, rows, columns = tiny_model(layers=2), 4, 4
    patches = torch.randn(1, rows, columns, 3, 8, 8, requires_grad=True)
    for predictions, targets, k in [f for i, f in enumerate(model(patches)) if i // 2 == direction]:
        labels = cpc_v2.positives(1, rows, columns, k)
        seen = lambda v: [tuple(p) for p in torch.autograd.grad(v.sum(), patches, retain_graph=True)[0][0].abs().amax((2, 3, 4)).nonzero().tolist()]
        for p, label in list(zip(predictions.flatten(0, 2), labels))[::3]:
            target = seen(targets.flatten(0, 2)[label])
            assert len(target) == 1
            along = lambda place: step[0] * place[0] + step[1] * place[1]                      # how far in the direction
            assert max(map(along, seen(p))) == along(target[0]) - k


def test_fewer_directions_are_the_first_ones():
    assert [tiny_model(directions=d).turns for d in (1, 2, 4)] == [(0,), (0, 2), (0, 2, 1, 3)]
    assert len(tiny_model(directions=2, offsets=[1])(torch.randn(2, 3, 3, 3, 8, 8))) == 2


def test_average_follows_the_weights_and_is_what_is_kept(tmp_path):
    torch.manual_seed(0)
    model = tiny_model(norm="batch")
    before = {k: v.clone() for k, v in model.average.state_dict().items()}
    model(torch.randn(2, 3, 3, 3, 8, 8))                                                       # moves BN's statistics
    with torch.no_grad():
        for w in model.encoder.parameters():
            w.add_(torch.randn_like(w))
    model.update_average(0.9)
    now, learned = model.average.state_dict(), dict(model.encoder.state_dict())
    for k, v in before.items():
        expected = learned[k] if "running" in k or "num_batches" in k else 0.9 * v + 0.1 * learned[k]
        assert torch.allclose(now[k], expected, atol=1e-6)
    train(cpc_v2, *TINY, "--clip", "0.001", "--ema-momentum", "0.8", "--patch-augment", "none", "--output", tmp_path)
    checkpoint, lines = result_of(tmp_path)
    kept = {k[len("average."):]: v for k, v in checkpoint["model"].items() if k.startswith("average.")}
    assert kept.keys() == checkpoint["encoder"].keys() and all(torch.equal(v, kept[k]) for k, v in checkpoint["encoder"].items())
    assert not torch.equal(kept["conv1.weight"], checkpoint["model"]["encoder.conv1.weight"])
    encoder = common.resnet(**checkpoint["encoder_config"])
    encoder.load_state_dict(checkpoint["encoder"], strict=True)
    bank, queries = (common.features(encoder, common.load_data("shapes", split=s), checkpoint["input"]) for s in ("train", "val"))
    assert common.knn_accuracy(*bank, *queries) == pytest.approx(lines[-1]["knn"], abs=0.1)
    assert lines[0]["loss"] == pytest.approx(2 * math.log(1800), abs=0.5)
    moments = checkpoint["optimizer"]["state"].values()                                        # running means of gradients no longer than 0.001
    norm = torch.stack([s["exp_avg"].norm() for s in moments]).norm()
    assert 0 < norm <= 0.001 and checkpoint["optimizer"]["param_groups"][0]["betas"] == (0.8, 0.999)


def test_checkpointing_changes_nothing():
    gradients = []
    patches = torch.randn(2, 3, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = tiny_model(checkpointing=checkpointing)
        sum(cpc_v2.cpc_loss(*f) for f in model(patches)).backward()
        gradients.append({k: w.grad for k, w in model.named_parameters() if w.requires_grad})
    assert gradients[0].keys() == gradients[1].keys() and all(torch.allclose(g, gradients[1][k], atol=1e-6) for k, g in gradients[0].items())


# ---------------------------------------------------------------- several processes

@pytest.mark.parametrize("across", [True, False])
def test_gradient_of_two_processes_is_that_of_the_whole_batch(tmp_path, across):
    """Negatives from all processes; or each process's own, which is the mean of the two halves' losses."""
    check_two_processes(tmp_path, f"""
import cpc_v2
model = cpc_v2.CPC("resnet10x0.125", "small", "layer", 3, 4, [1, 2], 8, 2, 8, 0.1).double()
model.average = None
patches = torch.randn(8, 3, 3, 3, 8, 8, dtype=torch.float64)
def loss(network, mine):
    if mine == slice(0, 8) and not {across}:
        return (loss(network, parts[0]) + loss(network, parts[1])) / 2
    return sum(cpc_v2.cpc_loss(*found, {across}) for found in network(patches[mine])) / 4
""")


@pytest.mark.parametrize("processes,extra", [(1, ["--patch-augment", "full", "--stride", "6", "--offsets", "1", "--norm", "batch"]),
                                             pytest.param(2, ["--patch-augment", "drop", "--gather", "--directions", "2"], marks=pytest.mark.slow)])
def test_run_that_was_killed_is_the_run_that_was_not(tmp_path, processes, extra, capsys):
    """All of it: weights, their average, Adam's moments."""
    check_resuming(tmp_path, cpc_v2, *TINY, *extra, *BOOKS, processes=processes)
    check_bound(tmp_path / "whole", *((200 * 4, 1) if processes == 1 else (200 * 9, 2)))       # patches of all images, offsets
    if processes == 1:
        asked = ["linear", str(tmp_path / "whole" / "checkpoint.pt"), "--protocol", "cpc", "--epochs", "2", "--lr", "0.01", "--no-augment", "--sweep"]
        evaluate.linear(evaluate.parse_args(asked), torch.device("cpu"))
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["top1"] > 12
        for size in ("5", "14"):                                    # patches have 6 pixels, images 13
            with pytest.raises(common.UserError, match=f"--size {size}: not in 6..13"):
                evaluate.linear(evaluate.parse_args([*asked, "--size", size]), torch.device("cpu"))
        asked = ["finetune", asked[1], "--protocol", "cpc", "--labels", "20", "--subset", "random", "--epochs", "2", "--batch-size", "32"]
        evaluate.finetune(evaluate.parse_args(asked), torch.device("cpu"))
        said = capsys.readouterr()
        assert json.loads(said.out.splitlines()[-1])["rows"][0]["images"] == 200 and "encoder fixed" in said.err and "encoder trained" in said.err


def test_classifiers_are_the_papers():
    with torch.device("meta"):
        net = evaluate.MapsClassifier(4096, 1000)
        assert [type(m) for m in net.children()] == [nn.Sequential, nn.BatchNorm2d, nn.Dropout, nn.Linear]
        assert net(torch.zeros(2, 4096, 14, 14)).shape == (2, 1000) and net.blocks(torch.zeros(1, 4096, 14, 14)).shape == (1, 4096, 7, 7)
    assert sum(isinstance(m, nn.Conv2d) for b in net.blocks for name, m in b.named_children() if name != "downsample") == 33
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(217.1, abs=0.1)
    torch.manual_seed(0)
    head, z = evaluate.patch_classifier(16, 3), 5 * torch.randn(8, 16, 4, 5) + 2
    logits, n = head(z), head[0]
    assert not n.weight.requires_grad and n.weight.eq(1).all() and n.bias.requires_grad
    white = (z - z.mean((0, 2, 3), keepdim=True)) / (z.var((0, 2, 3), unbiased=False, keepdim=True) + n.eps).sqrt()
    expected = sum(head[1].weight[:, :, 0, 0] @ white[:, :, i, j].T + head[1].bias[:, None] for i in range(4) for j in range(5)).T / 20
    assert torch.allclose(logits, expected, atol=1e-4)


def test_probe_on_patches(tmp_path):
    """What evaluation encodes are the patches of the training."""
    torch.manual_seed(0)
    encoder = common.resnet("resnet10x0.125", norm="layer", stem="small", stages=3, version=2)
    grid = evaluate.PatchGrid(encoder, dict(patch_size=8, stride=4, patch_augment="none"))
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        z = grid(common.normalize(x.clone(), cpc_v2.MEAN, cpc_v2.STD))
        assert z.shape == (2, 32, 3, 3) and torch.allclose(z, grid(x.clone(), disturb=True), atol=1e-5)
        assert torch.allclose(z[:, :, 1, 2], encoder(common.normalize(x.clone(), cpc_v2.MEAN, cpc_v2.STD)[:, :, 4:12, 8:16]), atol=1e-5)


def test_misuse(tmp_path, capsys):
    for args, words in ((["--offsets", "0"], "--offsets"), (["--offsets", "3"], "--offsets 3: there are only 3 rows of patches"),
                        (["--patch-size", "13"], "--patch-size 13: larger than the crop"), (["--resize", "11"], "--size 12: larger than the image"),
                        (["--directions", "3"], "--directions"), (["--norm", "group"], "--norm"), (["--patch-augment", "some"], "--patch-augment"),
                        (["--clip", "0"], "--clip"), (["--patch-size", "2"], "--patch-size 2: --patch-augment full"), (["--checkpointing", "--norm", "batch"], "--checkpointing"),
                        (["--arch", "resnet161", "--stages", "4"], "--stages 4"), (["--batch-size", "9999"], "larger than the data set")):
        assert words in mistake(cpc_v2, [*TINY, *args, "--output", tmp_path]) + capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.huge
def test_a_step_of_the_full_size_model(tmp_path):
    """ResNet-161 on two images, with checkpointing: `pytest -s -m huge` says how much memory it took."""
    args = cpc_v2.parse_args(["--recipe", "imagenet"])
    torch.manual_seed(0)
    model = cpc_v2.CPC(args.arch, args.stem, args.norm, args.stages, args.directions, args.offsets, args.hidden, args.layers, args.dim, args.scale, True)
    learned = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.Adam(learned, lr=4e-4, betas=(0.8, 0.999))
    patches = cpc_v2.extract_patches(torch.rand(2, 3, 260, 260), 80, 36)
    patches = cpc_v2.augment(patches.flatten(0, 2), "full").view(patches.shape)
    loss = sum(cpc_v2.cpc_loss(*f) for f in model(patches)) / 4
    loss.backward()
    torch.nn.utils.clip_grad_norm_(learned, 0.01)
    optimizer.step()
    model.update_average(0.9999)
    assert loss.item() == pytest.approx(math.log(72), abs=1) and all(w.isfinite().all() for w in learned)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20:.1f} GiB")
