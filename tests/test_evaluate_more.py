"""evaluate.py: other projects' files, label fractions, transfer, invariance, pictures, sweeps and memory."""
import argparse, copy, math, os, pickle

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import common
import evaluate
from conftest import ask, watch


@pytest.fixture(autouse=True)
def little_data(monkeypatch):
    load = common.load_data
    cut = {"train": 600, "pretrain": 600, "val": 200}

    def little(name, root="data", split="train", device="cpu"):
        data = load(name, root, split, device)
        return common.Images(data.images[:cut[split]], data.labels[:cut[split]], device) if name == "shapes" else data

    monkeypatch.setattr(common, "load_data", little)


# ------------------------------------------------------------------------------------------------ other projects' files

def net(arch="resnet18x0.25", stem="imagenet", channels=3, width=None):
    """A randomly initialised state dict under torchvision's names, and the encoder."""
    torch.manual_seed(3)
    encoder = common.resnet(arch, stem=stem)
    for m in encoder.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(), m.running_var.uniform_(0.5, 2)
    return dict(encoder.state_dict()), encoder.eval()


def prefixed(state, prefix):
    return {prefix + k: v for k, v in state.items()}


def numbered(state, names):
    """As nn.Sequential(*children) names them."""
    return {".".join([names[k.split(".")[0]], *k.split(".")[1:]]): v for k, v in state.items()}


def shortcut(state):
    return {k.replace(".downsample.", ".shortcut."): v for k, v in state.items()}


FC, OPT = {"fc.weight": torch.zeros(128, 128), "fc.bias": torch.zeros(128)}, argparse.Namespace(lr=0.1)
CHILDREN = dict(conv1="0", bn1="1", layer1="4", layer2="5", layer3="6", layer4="7")
OWN = dict(conv1="0", bn1="1", layer1="2", layer2="3", layer3="4", layer4="5")
FILES = {     # name: (project, stem, whole file from the backbone's state dict, what must be said to be left out)
    "moco": ("MoCo v1, v2", "imagenet", lambda s: dict(epoch=200, arch="resnet18", optimizer={}, state_dict={
        **prefixed({**s, **FC}, "module.encoder_q."), **prefixed({**s, **FC}, "module.encoder_k."), "module.queue": torch.zeros(128, 8),
        "module.queue_ptr": torch.zeros(1)}), ["encoder_q.fc (2)", "encoder_k.", "queue (1)", "queue_ptr (1)"]),
    "moco3": ("MoCo v3", "imagenet", lambda s: dict(epoch=1, state_dict={
        **prefixed(s, "module.base_encoder."), **prefixed(s, "module.momentum_encoder."),
        "module.predictor.0.weight": torch.zeros(4, 4)}), ["momentum_encoder.", "predictor."]),
    "simsiam": ("SimSiam", "imagenet", lambda s: dict(state_dict={**prefixed({**s, "fc.0.weight": torch.zeros(8, 8)}, "module.encoder."),
        "module.predictor.0.weight": torch.zeros(4, 4)}), ["encoder.fc (1)", "predictor."]),
    "byol": ("torchvision's layout", "imagenet", lambda s: {**s, **FC}, ["fc"]),
    "byol2": ("torchvision's layout", "imagenet", lambda s: dict(online_backbone=prefixed(s, "module."), target_backbone=prefixed(s, "module.")),
        ["target_backbone"]),
    "swav": ("SwAV", "imagenet", lambda s: {**prefixed(s, "module."), "module.projection_head.0.weight": torch.zeros(4, 4),
        "module.prototypes.weight": torch.zeros(3000, 4)}, ["projection_head", "prototypes"]),
    "deepcluster": ("DeepCluster-v2", "imagenet", lambda s: {**prefixed(s, "module."),
        "module.prototypes.prototypes0.weight": torch.zeros(3000, 4)}, ["prototypes"]),
    "barlow": ("torchvision's layout", "imagenet", lambda s: s, ["nothing"]),
    "barlow_full": ("Barlow Twins, VICReg", "imagenet", lambda s: dict(epoch=1, optimizer={}, model={**prefixed(s, "module.backbone."),
        "module.projector.0.weight": torch.zeros(4, 4)}), ["projector"]),
    "dino": ("DINO", "imagenet", lambda s: dict(student=prefixed(s, "module.backbone."), teacher={**prefixed(s, "backbone."), "head.mlp.0.weight":
        torch.zeros(4, 4)}, args=OPT), ["head", "student"]),
    "supcontrast": ("SupContrast", "small", lambda s: dict(opt=OPT, epoch=1, model={**prefixed(shortcut(s), "encoder.module."),
        "head.0.weight": torch.zeros(4, 4)}), ["head", "opt"]),
    "insdis": ("InsDis", "imagenet", lambda s: dict(opt=OPT, model=prefixed({**s, **FC}, "encoder.module."), contrast={}),
        ["encoder.fc (2)", "contrast"]),
    "torchvision": ("torchvision's layout", "imagenet", lambda s: {k: v for k, v in {**s, **FC}.items() if "num_batches" not in k}, ["fc (2)"]),
    "lightly": ("lightly", "imagenet", lambda s: dict(state_dict={**prefixed(numbered(s, CHILDREN), "backbone."),
        "projection_head.layers.0.weight": torch.zeros(4, 4)}), ["projection_head"]),
    "lightly_small": ("lightly", "small", lambda s: dict(state_dict=prefixed(shortcut(numbered(s, OWN)), "backbone.")), ["nothing"]),
    "solo": ("solo-learn", "small", lambda s: dict(state_dict={**prefixed(s, "backbone."), "classifier.weight": torch.zeros(4, 4),
        "projector.0.weight": torch.zeros(4, 4)}), ["classifier", "projector"]),
    "solo_old": ("solo-learn", "small", lambda s: dict(state_dict={**prefixed(s, "encoder."), "classifier.weight": torch.zeros(4, 4),
        "predictor.0.weight": torch.zeros(4, 4)}), ["classifier", "predictor"]),
    "solo_dino": ("solo-learn", "small", lambda s: dict(state_dict={**prefixed(s, "backbone."), "classifier.weight": torch.zeros(4, 4),
        "head.mlp.0.weight": torch.zeros(4, 4)}), ["classifier", "head"]),
}


@pytest.mark.parametrize("name", FILES)
def test_other_projects_files(name, tmp_path, capsys):
    project, stem, make, left = FILES[name]
    state, encoder = net(stem=stem)
    torch.save(make(state), tmp_path / "theirs.pth")
    loaded, dim, saved = evaluate.load_encoder(evaluate.parse_args(["knn", str(tmp_path / "theirs.pth"), "--data", "shapes"]), torch.device("cpu"))
    said = capsys.readouterr().err
    assert saved["method"] == project and saved["encoder_config"]["arch"] == "resnet18x0.25" and dim == 128
    assert all(text in said.split("left out: ")[1] for text in left), said
    for k, v in state.items():
        assert torch.equal(loaded.state_dict()[k], v) or "num_batches" in k
    if project == "solo-learn":
        encoder.conv1.padding = (2, 2)
    x = torch.rand(2, 3, 32, 32)
    assert torch.allclose(loaded(x), encoder(x), atol=1e-5)


@pytest.mark.parametrize("arch", ["resnet50", "resnet50x2", "resnet34", "resnet101", "resnet18"])
def test_architecture_from_the_shapes(arch, tmp_path):
    with torch.device("meta"):
        state = {k: torch.empty(v.shape) for k, v in common.resnet(arch).state_dict().items()}
    config, encoder, used = evaluate.describe("x", state, "")
    assert config["arch"] == arch and config["stem"] == "imagenet" and used == set(state)


def test_reads_torchvisions_resnet50_as_torchvision_does(tmp_path):
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50().eval()
    torch.save(theirs.state_dict(), tmp_path / "resnet50.pth")
    encoder, dim, saved = evaluate.load_encoder(evaluate.parse_args(["knn", str(tmp_path / "resnet50.pth"), "--size", "64"]), torch.device("cpu"))
    theirs.fc = nn.Identity()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert dim == 2048 and saved["input"]["size"] == 64 and torch.allclose(encoder(x), theirs(x), rtol=1e-4, atol=1e-5)


def cmc_file(path, opt=OPT):
    """The two halves of CMC: stems of the full width on networks of half the width."""
    state = {}
    for name, channels in (("l_to_ab", 1), ("ab_to_l", 2)):
        half, _ = net("resnet18x0.5")
        half["conv1.weight"] = torch.randn(64, channels, 7, 7) / 10
        half.update({f"bn1.{k}": torch.rand(64) + 0.5 for k in ("weight", "bias", "running_mean", "running_var")})
        half["layer1.0.conv1.weight"] = torch.randn(32, 64, 3, 3) / 20
        half["layer1.0.downsample.0.weight"] = torch.randn(32, 64, 1, 1) / 8
        half.update({f"layer1.0.downsample.1.{k}": torch.rand(32) for k in ("weight", "bias", "running_mean", "running_var")})
        state.update(prefixed({**half, **FC}, f"encoder.module.{name}."))
    torch.save(dict(opt=opt, model=state, contrast={}, epoch=200), path)
    return state


def test_cmc_in_ycbcr(tmp_path):
    cmc_file(tmp_path / "cmc.pth", argparse.Namespace(view="YCbCr"))
    assert evaluate.read_checkpoint(tmp_path / "cmc.pth")["encoder_config"]["view"] == "ycbcr"


def test_cmc(tmp_path, capsys):
    cmc_file(tmp_path / "cmc.pth")
    encoder, dim, saved = evaluate.load_encoder(evaluate.parse_args(["knn", str(tmp_path / "cmc.pth")]), torch.device("cpu"))
    assert saved["method"] == "CMC" and dim == 512 and encoder(torch.rand(2, 3, 64, 64)).shape == (2, 512)
    assert "encoder.l_to_ab.fc (2)" in capsys.readouterr().err
    seen = {}
    encoder.light.maps, encoder.color.maps = (lambda x: seen.update(l=x) or x), (lambda x: seen.update(ab=x) or x)
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0], [0.5, 0.5, 0.5]]).view(-1, 3, 1, 1)
    encoder.maps(colours)
    lab = torch.cat([seen["l"] * 50 + 50, seen["ab"][:, :1] * 92.208 + 6.025, seen["ab"][:, 1:] * 101.1675 - 6.6895], 1).flatten(1)
    known = torch.tensor([[53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86], [100, 0, 0], [0, 0, 0], [53.39, 0, 0]])   # CIE, D65
    assert (lab - known).abs().max() < 0.1


class Evil:
    def __reduce__(self):
        return os.system, ("touch was_run",)


def test_a_file_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state, _ = net()
    torch.save(dict(state_dict=state, extra=Evil()), "evil.pth")
    with pytest.raises(common.UserError) as e:
        evaluate.read_checkpoint("evil.pth")
    assert "system" in str(e.value) and "refused" in str(e.value) and "state dict" in str(e.value) and "\n" not in str(e.value)
    assert not os.path.exists("was_run")
    with open("plain.pkl", "wb") as f:
        pickle.dump(dict(x=Evil()), f)
    with pytest.raises(common.UserError):
        evaluate.read_checkpoint("plain.pkl")
    assert not os.path.exists("was_run")


@pytest.mark.parametrize("spoil,words", [(lambda s: dict(s, **{"layer2.0.conv1.weight": torch.zeros(3, 3)}), "does not fit"),
                                         (lambda s: {k: v for k, v in s.items() if k != "layer3.1.bn2.bias"}, "layer3.1.bn2.bias"),
                                         (lambda s: {k: v for k, v in s.items() if not k.startswith("layer4.1")}, "no ResNet known here"),
                                         (lambda s: {"features.0.weight": torch.zeros(3)}, "nor in a layout known here"),
                                         (lambda s: [1, 2], "nor in a layout known here")])
def test_files_that_do_not_fit(spoil, words, tmp_path):
    torch.save(spoil(net()[0]), tmp_path / "theirs.pth")
    with pytest.raises(common.UserError) as e:
        evaluate.load_encoder(evaluate.parse_args(["knn", str(tmp_path / "theirs.pth")]), torch.device("cpu"))
    assert words in str(e.value) and "\n" not in str(e.value)


def test_other_projects_files_need_data(tmp_path):
    torch.save(net(stem="small")[0], tmp_path / "theirs.pth")
    with pytest.raises(common.UserError, match="--data: needed"):
        ask("knn", tmp_path / "theirs.pth")
    assert ask("knn", tmp_path / "theirs.pth", "--data", "shapes", "--size", 8, "--output", tmp_path)["top1"] > 0


# ------------------------------------------------------------------------------------------------ label fractions

def test_subsets():
    labels = torch.arange(1000) % 10
    small, large = (evaluate.label_subset(labels, f, 0, True) for f in (0.02, 0.1))
    assert len(small) == 20 and labels[small].bincount().tolist() == [2] * 10 and set(small.tolist()) <= set(large.tolist())
    assert small[:5].tolist() == [31, 57, 64, 82, 159]      # the same everywhere
    assert torch.equal(small, evaluate.label_subset(labels, 0.02, 0, True)) and not torch.equal(small, evaluate.label_subset(labels, 0.02, 1, True))
    assert labels[evaluate.label_subset(labels, 3, 0, True)].bincount().tolist() == [3] * 10
    drawn, more = (evaluate.label_subset(labels, f, 0, False) for f in (0.02, 0.1))
    assert len(drawn) == 20 and labels[drawn].bincount(minlength=10).tolist() != [2] * 10 and set(drawn.tolist()) <= set(more.tolist())
    assert len(evaluate.label_subset(labels, 1.0, 0, True)) == 1000
    for amount, words in ((0.005, "fewer than the 10 classes"), (200, "class 0 has only 100")):
        with pytest.raises(common.UserError, match=words):
            evaluate.label_subset(labels, amount, 0, True)


def test_data_gain_is_cpcs():
    fractions = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
    top1 = [23.1, 34.8, 50.6, 62.5, 70.3, 75.9, 80.2], [52.7, 60.4, 68.1, 73.1, 76.7, 81.2, 83.4]          # table 2: from pixels, on CPC
    top5 = [44.1, 59.9, 75.2, 83.9, 89.4, 93.1, 95.2], [78.3, 83.9, 88.8, 91.2, 93.3, 95.6, 96.5]
    assert evaluate.data_gain(fractions, top1[1], top1[0]) == pytest.approx([5, 2.5, 2, 2, 2.5, 2, 1])
    assert evaluate.data_gain(fractions, top5[1], top5[0]) == pytest.approx([5, 5, 2, 2, 2.5, 2, 1])
    assert evaluate.data_gain([0.1, 1], [5, 6], [10, 20]) == [None, None]


@pytest.mark.parametrize("protocol", [name for name in evaluate.FINETUNE if name != "cpc"])
def test_finetune(checkpoint, tmp_path, protocol):
    before = checkpoint.read_bytes()
    asked = ["--labels", "0.2", "4", "--protocol", protocol, "--epochs", "1", "--rescale", "--baseline", "supervised", "--output", tmp_path]
    result = ask("finetune", checkpoint, *asked)
    assert [r["images"] for r in result["rows"]] == [40, 120] and all(0 <= r["top1"] <= r["top5"] <= 100 for r in result["rows"])
    assert {"baseline_top1", "gain"} <= set(result["rows"][0]) and (tmp_path / "labels.png").stat().st_size > 5000
    assert checkpoint.read_bytes() == before
    if protocol == "simclr":
        assert result == ask("finetune", checkpoint, *asked)


def test_cpcs_two_phases(monkeypatch):
    """The encoder is fixed at first; each phase ends when five epochs were no better on held-out images, and goes on from its best state."""
    torch.manual_seed(0)
    encoder = common.resnet("resnet10x0.125", norm="layer", stem="small", stages=3, version=2)
    before, seen, losses = copy.deepcopy(encoder.state_dict()), [], [3, 1, 2, 2, 2, 2, 2, 0.5, 2, 2, 2, 2, 2, 9]
    images = torch.arange(40, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)              # which tell themselves apart
    data, val, trained = common.Images(images, torch.arange(40) % 4, "cpu"), common.Images(images[:4], torch.arange(4), "cpu"), set()

    def told(model, of, *_):
        seen.append((copy.deepcopy(model.state_dict()), set(of.images[:, 0, 0, 0].tolist())))
        return torch.tensor([[1, math.expm1(losses[len(seen) - 1])]]).log(), torch.tensor([0])                        # a loss of just that

    crop = common.Images.crop
    monkeypatch.setattr(common.Images, "crop", lambda self, i, *a: trained.update(self.images[i, 0, 0, 0].tolist()) or crop(self, i, *a))
    monkeypatch.setattr(common, "features", told)
    args = evaluate.parse_args(["finetune", "C", "--protocol", "cpc"])
    saved = dict(input=dict(size=16, mean=[0] * 3, std=[1] * 3, interpolation="bilinear"))
    evaluate.tune(args, evaluate.FINETUNE["cpc"], encoder, data, val, True, 4, saved, torch.device("cpu"))
    of_encoder = lambda state: {k.removeprefix("0."): v for k, v in state.items() if k.startswith("0.")}
    same = lambda a, b: all(torch.equal(v, b[k]) for k, v in a.items())
    assert len(seen) == 14 and all(same(of_encoder(state), before) for state, _ in seen[:7]) and not same(seen[0][0], seen[1][0])
    assert not same(of_encoder(seen[7][0]), before) and same(seen[13][0], seen[7][0]) and not same(seen[12][0], seen[7][0])
    held = seen[0][1]
    assert all(s == held for _, s in seen[:13]) and len(held) == 8 and trained == set(range(40)) - held and seen[13][1] == set(range(4))


@pytest.mark.parametrize("arch", ["resnet10x0.125", "resnet50x0.0625"])
def test_rescaling_changes_the_weights_norms_and_nothing_else(arch):
    torch.manual_seed(0)
    encoder, x = common.resnet(arch, stem="small").double(), torch.rand(8, 3, 16, 16).double()
    for m in encoder.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.eps = 1e-12
    convolutions = [m for m in encoder.modules() if isinstance(m, torch.nn.Conv2d)]
    for m in convolutions:
        m.weight.data *= 5 * torch.rand(1) + 1
    for _ in range(40):
        encoder(x)                                              # running statistics of its own
    states = []
    for _ in range(2):
        trained = copy.deepcopy(encoder)
        states.append((trained.eval()(x), trained.train()(x)))
        evaluate.rescale(encoder)
    for before, after in zip(*states):
        assert torch.allclose(before, after, rtol=1e-6) and before.std() > 0.01
    assert all(m.weight.norm().item() == pytest.approx(math.sqrt(2 * m.in_channels), rel=1e-5) for m in convolutions)
    with pytest.raises(common.UserError, match="--rescale"):
        evaluate.rescale(common.resnet(arch, version=2))


def test_finetuning_learns(checkpoint, tmp_path):
    result = ask("finetune", checkpoint, "--labels", "1.0", "--epochs", "12", "--lr", "0.3", "--subset", "random", "--output", tmp_path)
    assert result["rows"][0]["top1"] > 18, result


# ------------------------------------------------------------------------------------------------ logistic regression, sweeps, transfer

def blobs(n=600, classes=5, dim=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    return torch.randn(n, dim, generator=g) + 1.2 * torch.eye(dim)[y], y


def test_logistic_regression_is_at_the_minimum():
    h, y = blobs()
    w = evaluate.logistic_regression(h, y, 5, 2.0).double().requires_grad_()
    logits = h.double() @ w[:, :-1].T + w[:, -1]
    loss = nn.functional.cross_entropy(logits, y, reduction="sum") + w[:, :-1].square().sum()
    gradient, = torch.autograd.grad(loss, w)
    assert gradient.abs().max() < 0.05 and loss < 600 * np.log(5)
    several = nn.functional.one_hot(y, 5).float()
    several[0] = float("nan")
    w = evaluate.logistic_regression(h, several, 5, 2.0).double().requires_grad_()
    logits = h[1:].double() @ w[:, :-1].T + w[:, -1]
    loss = nn.functional.binary_cross_entropy_with_logits(logits, several[1:].double(), reduction="sum") + w[:, :-1].square().sum()
    gradient, = torch.autograd.grad(loss, w)
    assert gradient.abs().max() < 0.05


def test_a_class_that_is_only_held_out_counts():
    h, y = blobs()
    _, weights, _ = evaluate.choose_l2((h[y < 4], y[y < 4]), (h, y), "top1", [1.0])
    assert len(weights) == 5 and evaluate.logistic_regression(h, y, 5, 1.0, weights).shape == (5, h.shape[1] + 1)
    with pytest.raises(common.UserError, match="too many.*--size"):
        evaluate.logistic_regression(torch.zeros(2, 150528), torch.tensor([0, 1]), 2, 1.0)


def test_a_file_without_its_statistics_is_refused(tmp_path):
    torch.save({k: v for k, v in net()[0].items() if "running" not in k}, tmp_path / "stripped.pth")
    with pytest.raises(common.UserError, match="does not fit.*running_mean"):
        evaluate.load_encoder(evaluate.parse_args(["knn", str(tmp_path / "stripped.pth")]), torch.device("cpu"))


def test_logistic_regression_is_scikit_learns():
    linear_model = pytest.importorskip("sklearn.linear_model")
    (h, y), (test, truth) = blobs(), blobs(seed=1)
    w = evaluate.logistic_regression(h, y, 5, 0.5)
    theirs = linear_model.LogisticRegression(C=2.0, max_iter=1000, tol=1e-6).fit(h.numpy(), y.numpy())
    assert np.abs(w[:, :-1].numpy() - theirs.coef_).max() < 2e-3
    assert abs(evaluate.measure("top1", test @ w[:, :-1].T + w[:, -1], truth) - 100 * theirs.score(test.numpy(), truth.numpy())) < 0.3


def test_metrics():
    logits, labels = torch.tensor([[2.0, 1], [2, 1], [2, 1], [1, 2]]), torch.tensor([0, 0, 1, 1])
    assert evaluate.measure("top1", logits, labels) == 75 and evaluate.measure("mean_per_class", logits[:3], labels[:3]) == 50
    several = torch.tensor([[1.0], [0], [float("nan")], [1]])
    assert evaluate.measure("map_11_point", torch.tensor([[4.0], [3], [2], [1]]), several) == pytest.approx(100 * (6 + 5 * 2 / 3) / 11)


@pytest.mark.parametrize("task,args", [("knn", []), ("linear", ["--no-augment", "--epochs", "2"]), ("linear", ["--protocol", "lbfgs"])])
def test_a_sweep_never_sees_the_test_set(checkpoint, tmp_path, monkeypatch, capsys, task, args):
    def answer():
        ask(task, checkpoint, "--sweep", *args, "--output", tmp_path)
        return [line for line in capsys.readouterr().err.splitlines() if "chosen" in line]
    first, load = answer(), common.load_data
    other = common.Images(torch.zeros(200, 3, 32, 32, dtype=torch.uint8), torch.arange(200) % 10, "cpu")
    monkeypatch.setattr(common, "load_data", lambda name, root, split, device: other if split == "val" else load(name, root, split, device))
    assert first and first == answer()


def test_held_out_images_are_no_training_images():
    split = lambda n: [part.labels.tolist() for part in evaluate.hold_out(evaluate.Features(torch.zeros(n, 1), torch.arange(n)), 0)]
    rest, held = split(1000)
    assert len(held) == 100 and sorted(rest + held) == list(range(1000)) and len(split(200_000)[1]) == 10_000


def test_transfer(checkpoint, tmp_path):
    from torchvision.io import write_jpeg
    for split, n in (("train", 6), ("val", 3)):
        for c, light in (("dark", 20), ("light", 230)):
            (tmp_path / "set" / split / c).mkdir(parents=True)
            for i in range(n):
                write_jpeg((torch.rand(3, 20, 26) * 20 + light).to(torch.uint8), str(tmp_path / "set" / split / c / f"{i}.jpg"))
    result = ask("transfer", checkpoint, "--datasets", "shapes", tmp_path / "set", "--workers", 0)
    assert [r["dataset"] for r in result["rows"]] == ["shapes", "set"] and result["rows"][0]["figure"] > 11
    assert result["rows"][1]["figure"] == 100 and result["rows"][1]["test"] == 6 and result["rows"][1]["metric"] == "top1"


def test_transfer_of_torchvisions_sets_and_voc(checkpoint, tmp_path, monkeypatch):
    from torchvision.io import write_jpeg
    top = tmp_path / "dtd" / "dtd"
    (top / "labels").mkdir(parents=True)
    for split in ("train", "val", "test"):
        names = []
        for c, light in (("banded", 20), ("dotted", 230)):
            (top / "images" / c).mkdir(parents=True, exist_ok=True)
            for i in range(3):
                names.append(f"{c}/{split}{i}.jpg")
                write_jpeg((torch.rand(3, 20, 26) * 20 + light).to(torch.uint8), str(top / "images" / names[-1]))
        (top / "labels" / f"{split}1.txt").write_text("\n".join(names) + "\n")
    result = ask("transfer", checkpoint, "--datasets", "dtd", "--root", tmp_path, "--workers", 0)
    assert result["rows"][0]["figure"] == 100 and (result["rows"][0]["train"], result["rows"][0]["val"], result["rows"][0]["test"]) == (6, 6, 6)
    monkeypatch.setattr(torchvision.datasets, "OxfordIIITPet", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("no network")))
    with pytest.raises(common.UserError, match="--datasets pets: not in .* could not be had .no network"):
        ask("transfer", checkpoint, "--datasets", "pets", "--root", tmp_path / "empty")


def test_transfer_of_voc(checkpoint, real_data, monkeypatch):
    assert len(evaluate.L2) == 45 and evaluate.L2[[0, 44]].tolist() == pytest.approx([1e-6, 1e5])
    monkeypatch.setattr(evaluate, "L2", evaluate.L2[24:40:5])
    result = ask("transfer", checkpoint, "--datasets", "voc2007", "--root", real_data, "--workers", 0)["rows"][0]
    assert result["metric"] == "map_11_point" and 0 < result["figure"] < 100 and (result["train"], result["val"], result["test"]) == (96, 24, 70)


# ------------------------------------------------------------------------------------------------ invariance and pictures

def test_invariance(checkpoint):
    rows = ask("invariance", checkpoint, "--count", "150")["rows"]
    assert [r["chance"] for r in rows] == [80, 25, 50, 50] and all(0 <= r[k] <= 100 for r in rows for k in ("h", "g(h)"))
    assert rows[3]["h"] > 60                                    # even this network tells Sobel's edges from an image


def test_projector_is_the_one_that_was_trained(checkpoint):
    import simclr
    saved = common.read_checkpoint(checkpoint)
    model = simclr.SimCLR(**{k: saved["args"][k] for k in ("arch", "stem", "head", "dim")})
    model.load_state_dict(saved["model"])
    h = torch.randn(5, model.encoder.dim)
    assert torch.allclose(evaluate.read_projector(checkpoint, saved)(h), model.eval().projector(h), atol=1e-6)


def test_neighbours(checkpoint, tmp_path):
    result = ask("neighbours", checkpoint, "--count", "100", "--output", tmp_path)
    assert 0 < result["nearest_of_same_class"] <= 100
    assert all((tmp_path / f).stat().st_size > 10_000 for f in ("neighbours-and-pixels.png", "map.png"))


def test_tsne_keeps_clusters_together():
    torch.manual_seed(0)
    y = torch.arange(120) % 4
    x = torch.randn(120, 10) * 0.3 + 5 * torch.eye(10)[y]
    plane = evaluate.tsne(x, 20, 200)
    nearest = torch.cdist(plane, plane).fill_diagonal_(9e9).argmin(1)
    assert plane.isfinite().all() and (y[nearest] == y).float().mean() > 0.95


# ------------------------------------------------------------------------------------------------ memory

def test_nearest_in_chunks_is_the_whole_search():
    torch.manual_seed(0)
    bank, h = torch.randn(40_000, 8), torch.randn(5, 8)
    s, i = common.nearest(bank, h, 30)
    whole = (nn.functional.normalize(h, dim=1) @ nn.functional.normalize(bank, dim=1).T).topk(30)
    assert torch.allclose(s, whole.values, atol=1e-6) and torch.equal(i, whole.indices)


def test_features_of_imagenets_size_are_gone_through_in_chunks(monkeypatch):
    """Half precision is never made float32 as a whole, neither for `knn` nor for `linear`."""
    torch.manual_seed(0)
    bank, y = torch.randn(40_000, 8).half(), torch.arange(40_000) % 2
    exact = evaluate.logistic_regression(bank.float(), y, 2, 1.0)
    calls = watch(monkeypatch, (nn.functional, "normalize"), (evaluate, "scores"))
    assert common.nearest(bank, bank[:5], 1)[1][:, 0].tolist() == [0, 1, 2, 3, 4]
    assert torch.allclose(evaluate.logistic_regression(bank, y, 2, 1.0), exact, atol=1e-4)
    assert {name for name, _, _ in calls} == {"normalize", "scores"} and all(len(result) <= 16384 for _, _, result in calls)
    piece, = evaluate.Features(bank, y).crop(torch.tensor([7, 3]), [])[0]
    assert piece.dtype == torch.float32 and torch.equal(piece, bank[[7, 3]].float())
