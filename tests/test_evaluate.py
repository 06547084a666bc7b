"""evaluate.py: encoders, knn, linear and detect as commands, baselines, sweeps, mistakes."""
import importlib
import json
import math
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import classifiers
import cmc
import common
import cpc_v2
import detection
import evaluate
import simclr
from conftest import METHODS, ask, asked_wrongly, logged, one_line, run, tiny, train

CPU = torch.device("cpu")
FAST = ["--steps", "4", "--batch-size", "2", "--rois", "8", "--save-every", "2"]

def load_encoder(*args):
    return evaluate.load_encoder(evaluate.parse_args(list(map(str, args))), CPU)

@pytest.fixture
def little_data(monkeypatch):
    """`shapes` of 600 and 200 images."""
    load = common.load_data

    def load_little(name, root="data", split="train", device="cpu"):
        data = load(name, root, split, device)
        count = 200 if split == "val" else 600
        return common.Images(data.images[:count], data.labels[:count], device, data.classes)

    monkeypatch.setattr(common, "load_data", load_little)

def untrained(method, folder):
    """The model of a run that was stopped before its first step, and its checkpoint's file."""
    args = method.parse_args(tiny(method.__name__))
    torch.manual_seed(0)
    if method is simclr:
        model = simclr.SimCLR(args.arch, args.stem, args.head, args.dim)
        encoder = model.encoder
        mean, std = simclr.MEAN, simclr.STD
    elif method is cmc:
        model = cmc.CMC(args.arch, args.width, args.stem, args.view, args.dim, 20)
        encoder = model.encoder
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    else:
        encoder = cpc_v2.resnet_v2(args.arch, args.norm, args.stem, args.stages)
        model = nn.ModuleDict(dict(average=encoder))
        mean, std = cpc_v2.MEAN, cpc_v2.STD
    encoder(torch.rand(50, 3, args.size, args.size))            # running statistics of its own
    torch.save(dict(
        method=method.__name__, args=vars(args), epoch=args.epochs, step=0,
        encoder=encoder.state_dict(),
        encoder_config=encoder.config, model=model.state_dict(), optimizer={},
        input=dict(size=args.size, mean=list(mean), std=list(std), interpolation="bilinear"),
    ), folder / "checkpoint.pt")
    return encoder, folder / "checkpoint.pt"

@pytest.fixture(scope="session")
def cpc_checkpoint(tmp_path_factory):
    _, file = untrained(cpc_v2, tmp_path_factory.mktemp("cpc"))
    return file

# ------------------------------------------------------------------- encoders

@pytest.mark.parametrize("method", [simclr, cmc, cpc_v2])
def test_the_encoder_is_the_one_that_was_saved(method, tmp_path):
    saved, _ = untrained(method, tmp_path)
    encoder, dim, checkpoint = load_encoder("knn", tmp_path)    # the folder, not the file
    x = torch.rand(2, 3, 16, 16)
    assert dim == encoder.dim == encoder(x).shape[1] and checkpoint["args"]["data"] == "shapes"
    assert torch.allclose(encoder(x), saved.eval()(x), rtol=1e-3, atol=1e-5)
    assert not any(w.requires_grad for w in encoder.parameters()) and not encoder.training

def test_an_unfinished_run_is_named(cpc_checkpoint, tmp_path, capsys):
    saved = torch.load(cpc_checkpoint)
    saved["epoch"] = 0
    torch.save(saved, tmp_path / "checkpoint.pt")
    load_encoder("knn", tmp_path)
    assert "unfinished, epoch 0 of 1" in capsys.readouterr().err

def test_a_file_of_another_project_needs_data(tmp_path):
    torch.manual_seed(0)
    torch.save(common.resnet("resnet10x0.125").state_dict(), tmp_path / "theirs.pth")
    with pytest.raises(common.UserError, match="--data: needed"):
        ask("knn", tmp_path / "theirs.pth")
    assert ask("knn", tmp_path / "theirs.pth", "--data", "shapes", "--size", 8)["top1"] > 0

def test_padding_of_another_framework(tmp_path):
    torch.manual_seed(0)
    encoder = common.resnet("resnet10x0.125").eval()
    torch.save(encoder.state_dict(), tmp_path / "theirs.pth")
    x = torch.rand(2, 3, 32, 32)
    same, _, _ = load_encoder("knn", tmp_path / "theirs.pth", "--padding", "same")
    ordinary, _, _ = load_encoder("knn", tmp_path / "theirs.pth")
    assert torch.allclose(ordinary(x), encoder(x)) and not torch.allclose(same(x), encoder(x))

def test_supervised_files_are_called_so(tmp_path, checkpoint, capsys):
    saved = torch.load(checkpoint, weights_only=True)
    torch.save(dict(saved, method="supcon"), tmp_path / "checkpoint.pt")
    load_encoder("knn", tmp_path)
    assert "learned from labels" in capsys.readouterr().err
    load_encoder("knn", tmp_path, "--baseline", "random")
    assert capsys.readouterr().err == ""

@pytest.mark.parametrize("task", ["knn", "linear", "finetune", "detect", "neighbours"])
def test_weights_that_are_not_finite_are_refused(task, checkpoint, tmp_path, capsys):
    saved = torch.load(checkpoint, weights_only=True)
    saved["encoder"]["bn1.running_var"][0] = math.inf
    torch.save(saved, tmp_path / "checkpoint.pt")
    assert "bn1.running_var" in asked_wrongly(capsys, task, tmp_path / "checkpoint.pt")

# ------------------------------------------------------------------- knn

def test_knn(checkpoint, capsys):
    result = ask("knn", checkpoint)
    assert result["task"] == "knn" and result["k"] == 200 and result["data"] == "shapes"
    assert result["top1"] == logged(checkpoint.parent, "knn")[-1]
    picture = checkpoint.parent / "neighbours.png"
    assert picture.stat().st_size > 10_000 and f"picture: {picture}" in capsys.readouterr().err

def test_pictures_go_to_output(checkpoint, tmp_path):
    assert ask("knn", checkpoint.parent, "--k", 1, "--output", tmp_path / "one")["k"] == 1
    assert (tmp_path / "one" / "neighbours.png").exists()

def test_baselines(checkpoint, tmp_path):
    random = ask("knn", checkpoint, "--baseline", "random", "--output", tmp_path)
    again = ask("knn", checkpoint, "--baseline", "random", "--seed", 1, "--output", tmp_path)
    pixels = ask("knn", checkpoint, "--baseline", "pixels", "--output", tmp_path)
    assert random["top1"] != again["top1"] and random["baseline"] == "random"
    assert (tmp_path / "random-neighbours.png").exists()
    spaces = []
    for split in ("train", "val"):
        data = common.load_data("shapes", split=split)
        crop = common.CenterCrop(8, interpolation="bicubic")
        spaces += [common.crop_and_resize(data.images, crop)[0].flatten(1), data.labels]
    assert pixels["top1"] == pytest.approx(common.knn_accuracy(*spaces), abs=0.1)

def test_precision_is_that_of_training(monkeypatch, checkpoint):
    for has_bf16, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_bf16)
        assert evaluate.parse_args(["knn", str(checkpoint)]).precision == precision
        assert simclr.parse_args([]).precision == precision

# ------------------------------------------------------------------- linear

@pytest.mark.parametrize("protocol", [name for name in evaluate.PROTOCOLS if name != "cpc"])
def test_every_protocol_of_the_probe(checkpoint, protocol, tmp_path):
    result = ask("linear", checkpoint, "--protocol", protocol, "--epochs", 2, "--no-augment",
                 "--output", tmp_path)
    assert result["protocol"] == protocol and result["batch_size"] == 256
    assert 0 < result["top1"] <= result["top5"] <= 100
    assert result["top1"] > 12 or protocol == "simsiam"         # LARC: a thousandth a step

def test_the_probe_learns_and_augments(checkpoint, capsys):
    before = checkpoint.read_bytes()
    once = ask("linear", checkpoint, "--no-augment", "--epochs", 20)
    crops = ask("linear", checkpoint, "--epochs", 4)
    assert once["top1"] > 20 and crops["top1"] > 15
    assert crops["augment"] and not once["augment"]
    assert checkpoint.read_bytes() == before
    assert f"picture: {checkpoint.parent / 'confusion.png'}" in capsys.readouterr().err

@pytest.mark.parametrize("task", [["linear"], ["finetune", "--labels", 0.2]])
def test_in_bf16(checkpoint, tmp_path, task, little_data):
    name, *args = task
    ask(name, checkpoint, *args, "--epochs", 1, "--precision", "bf16", "--output", tmp_path)

def test_a_probe_of_the_projection(checkpoint, tmp_path, little_data):
    """That of z = g(h), which for SimCLR is five layers."""
    settings = ["--protocol", "lbfgs", "--precision", "fp32", "--output", tmp_path]
    result = ask("linear", checkpoint, "--features", "z", *settings)
    encoder, _, saved = load_encoder("linear", checkpoint)
    model = simclr.SimCLR("resnet10x0.125", "small", "nonlinear", 128)
    model.load_state_dict(saved["model"])
    z = []
    for split in ("train", "val"):
        data = common.load_data("shapes", split=split)
        h, labels = common.features(encoder, data, saved["input"])
        z.append((model.eval().projector(h).detach(), labels))
    (train_z, labels), (test_z, truth) = z
    weights = classifiers.logistic_regression(train_z, labels, 10, 1.0)
    top1 = evaluate.accuracy(classifiers.scores(weights, test_z), truth)
    assert result["top1"] == pytest.approx(top1, abs=0.51) and result["features"] == "z"
    assert result["top1"] != ask("linear", checkpoint, *settings)["top1"]
    assert {file.name for file in tmp_path.iterdir()} == {"confusion.png", "z-confusion.png"}

@pytest.mark.parametrize("method", sorted(set(METHODS) - {"cmc", "cpc_v2"}))
def test_the_projector_is_the_one_that_was_trained(method, tmp_path, monkeypatch, few_labelled):
    runs = []
    monkeypatch.setattr(common.Run, "_say_result", lambda run: runs.append(run))
    train(importlib.import_module(method), *tiny(method), "--batch-size", 100, "--epochs", 1,
          "--output", tmp_path)
    model = runs[0].model.eval()
    h = torch.rand(5, model.encoder.dim)
    found = classifiers.read_projector(tmp_path, common.read_checkpoint(tmp_path / "checkpoint.pt"))
    assert torch.allclose(found(h), model.projector(h), atol=1e-6)

def test_no_projector(checkpoint, cpc_checkpoint, tmp_path):
    saved = torch.load(checkpoint)
    without = {name: w for name, w in saved["model"].items() if "projector" not in name}
    torch.save(dict(saved, model=without), tmp_path / "none.pt")            # --head none
    foreign = {f"module.encoder_q.{name}": w for name, w in saved["encoder"].items()}
    torch.save(dict(state_dict=foreign), tmp_path / "foreign.pt")
    for file in (tmp_path / "none.pt", tmp_path / "foreign.pt", cpc_checkpoint):
        with pytest.raises(common.UserError, match=f"{file}: has no projector"):
            ask("linear", file, "--features", "z", "--data", "shapes")

@pytest.mark.parametrize("change,words", [
    (lambda w: w * math.nan, "not finite"), (lambda w: "x", "not finite"),
    (lambda w: torch.zeros(3, 5), "do not fit together")])
def test_a_damaged_projector(checkpoint, tmp_path, capsys, change, words):
    saved = torch.load(checkpoint)
    for name, value in saved["model"].items():
        if name.startswith("projector") and value.ndim == 2:
            saved["model"][name] = change(value)
    torch.save(saved, tmp_path / "damaged.pt")
    told = asked_wrongly(capsys, "linear", tmp_path / "damaged.pt", "--features", "z")
    assert words in told

def test_accuracy():
    logits = torch.tensor([[3.0, 2, 1], [1, 2, 3], [2, 3, 1], [1, 3, 2]])
    labels = torch.tensor([0, 0, 0, 2])
    assert evaluate.accuracy(logits, labels) == 25
    assert evaluate.accuracy(logits, labels, 2) == 75
    assert evaluate.accuracy(logits, labels, 5) == 100

def test_a_frozen_encoder_that_changes_is_noticed(checkpoint, monkeypatch, little_data):
    load = evaluate.load_encoder

    def changing(*args):
        encoder, dim, saved = load(*args)

        def change(*_):
            encoder.bn1.running_mean = encoder.bn1.running_mean + 1

        encoder.register_forward_pre_hook(change)
        return encoder, dim, saved

    monkeypatch.setattr(evaluate, "load_encoder", changing)
    with pytest.raises(AssertionError, match="the frozen encoder changed"):
        ask("linear", checkpoint, "--no-augment", "--epochs", 1)

@pytest.mark.parametrize("args", [["--no-augment"], []])
@pytest.mark.parametrize("lr", ["1e20", "1e30"])
def test_a_probe_that_diverges_says_so(checkpoint, capsys, args, lr):
    told = asked_wrongly(capsys, "linear", checkpoint, "--lr", lr, "--epochs", 1, *args)
    assert "diverged" in told and "--lr" in told

@pytest.mark.parametrize("task,args", [
    ("knn", []), ("linear", ["--no-augment", "--epochs", 2]),
    ("linear", ["--features", "z", "--epochs", 1]),
    pytest.param("linear", ["--protocol", "lbfgs"], marks=pytest.mark.slow)])
def test_a_sweep_does_not_see_the_test_images(checkpoint, tmp_path, monkeypatch, capsys, task, args,
                                              little_data):
    def chosen():
        ask(task, checkpoint, "--sweep", *args, "--output", tmp_path)
        return [line for line in capsys.readouterr().err.splitlines() if "chosen" in line]

    first = chosen()
    load = common.load_data
    labels = torch.arange(200) % 10
    other = common.Images(torch.zeros(200, 3, 32, 32, dtype=torch.uint8), labels, "cpu",
                          common.CLASSES)

    def load_other(name, root, split, device):
        return other if split == "val" else load(name, root, split, device)

    monkeypatch.setattr(common, "load_data", load_other)
    assert len(first) == 1 and first == chosen()

@pytest.mark.parametrize("n,count", [(1000, 100), (200_000, 10_000)])
def test_held_out_images_are_no_training_images(n, count):
    rest, held = evaluate.hold_out(evaluate.Features(torch.zeros(n, 1), torch.arange(n)), 0)
    assert len(held) == count
    assert sorted(rest.labels.tolist() + held.labels.tolist()) == list(range(n))

# ------------------------------------------------------------------- CPC v2's probe

def test_probe_on_patches(cpc_checkpoint, tmp_path):
    result = ask("linear", cpc_checkpoint, "--protocol", "cpc", "--epochs", 2, "--lr", 0.01,
                 "--no-augment", "--sweep", "--output", tmp_path)
    assert result["top1"] > 12 and result["batch_size"] == 256

def test_both_phases_of_fine_tuning(cpc_checkpoint, tmp_path, capsys, little_data):
    result = ask("finetune", cpc_checkpoint, "--protocol", "cpc", "--labels", 6, "--epochs", 2,
                 "--subset", "random", "--batch-size", 16, "--output", tmp_path)
    told = capsys.readouterr().err
    row, = result["rows"]
    assert row["images"] == 60 and 0 <= row["top1"] <= row["top5"] <= 100
    assert "encoder fixed: loss " in told and "on 12 held-out training images" in told
    assert "encoder trained: loss " in told

def test_fine_tuning_sees_whole_images_of_224_pixels(cpc_checkpoint, tmp_path, monkeypatch):
    saved = torch.load(cpc_checkpoint)
    saved["input"]["size"] = 260                # of which pre-training cuts patches
    saved["args"]["resize"] = 300
    torch.save(saved, tmp_path / "checkpoint.pt")
    sizes = []

    def noting(args, phases, encoder, data, held, classes, input, device):
        sizes.append(input["size"])
        raise common.UserError("enough")

    monkeypatch.setattr(evaluate, "tune_cpc", noting)
    for size in ([], ["--size", 96]):
        with pytest.raises(common.UserError, match="enough"):
            ask("finetune", tmp_path / "checkpoint.pt", "--protocol", "cpc", "--labels", 6, *size)
    assert sizes == [224, 96]

@pytest.mark.parametrize("size", ["7", "19"])
def test_sizes_that_do_not_fit_the_patches(cpc_checkpoint, capsys, size):
    told = asked_wrongly(capsys, "linear", cpc_checkpoint, "--protocol", "cpc", "--size", size)
    assert f"--size {size}: not in 8..18" in told

def test_one_geometry_in_training_and_test(cpc_checkpoint, tmp_path, monkeypatch, little_data):
    """That of the pre-training: the whole image made square, of which a crop is taken."""
    used = []
    crop = common.Images.crop

    def noting(data, indices, crops, *key):
        used.append((len(data), *crops))
        return crop(data, indices, crops, *key)

    monkeypatch.setattr(common.Images, "crop", noting)
    ask("linear", cpc_checkpoint, "--protocol", "cpc", "--epochs", 1, "--output", tmp_path)
    random = cpc_v2.RandomCrop(16, 18, flip=0.5)
    assert set(used) == {(600, random), (200, random._replace(central=True, flip=0.0))}
    used.clear()
    ask("knn", cpc_checkpoint, "--output", tmp_path)
    assert all(isinstance(crop, common.CenterCrop) for _, crop in used)

def test_a_circle_in_a_wide_image_has_one_shape_in_training_and_test():
    """Width by height of what is drawn, in the random and in the central crop."""
    image = torch.zeros(1, 3, 60, 120, dtype=torch.uint8)
    y, x = torch.meshgrid(torch.arange(60), torch.arange(120), indexing="ij")
    image[:, :, (x - 60) ** 2 + (y - 30) ** 2 < 15 ** 2] = 255
    data = common.Images(image, torch.zeros(1), "cpu")
    random = cpc_v2.RandomCrop(52, 60)
    shapes = []
    for crop in (random, random._replace(central=True)):
        (view,), _, _ = evaluate.with_crop(data, crop).crop(torch.tensor([0]), ["another"], 0)
        seen = view[0, 0] > 0.5
        shapes.append((int(seen.any(0).sum()), int(seen.any(1).sum())))
    (width, height), tested = shapes
    assert abs(width - tested[0]) <= 1 and abs(height - tested[1]) <= 1
    assert width == pytest.approx(height / 2, abs=2)

# ------------------------------------------------------------------- detect

@pytest.fixture
def few_scenes(monkeypatch):
    drawn = detection.drawn_scenes
    monkeypatch.setattr(detection, "drawn_scenes", lambda count, seed: drawn(12, seed))

def test_detects_in_drawn_scenes(checkpoint, few_scenes, tmp_path, capsys):
    result = ask("detect", checkpoint, *FAST, "--steps", 2, "--image-size", 48,
                 "--color-drop", 0.5, "--output", tmp_path)
    for key in ("AP", "AP50", "AP75", "AP_all", "AP50_all", "AP75_all"):
        mean = np.mean([row[key] for row in result["rows"]])
        assert 0 <= result[key] <= 100 and result[key] == pytest.approx(mean, abs=0.02)
    assert {row["class"] for row in result["rows"]} <= set(common.CLASSES)
    assert result["size"] == 48 and result["steps"] == 2 and result["color_drop"] == 0.5
    picture = tmp_path / "detections.png"
    assert picture.stat().st_size > 10_000 and f"picture: {picture}" in capsys.readouterr().err

def test_detection_resumes(checkpoint, few_scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(common.Stopped, "asked", None)
    monkeypatch.setattr(common.Stopped, "at_once", True)
    whole = ask("detect", checkpoint, *FAST, "--output", tmp_path / "whole")
    augmented = detection.augmented
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            common.Stopped.asked = signal.SIGTERM
        return augmented(*args)

    with monkeypatch.context() as patch, pytest.raises(common.Stopped, match="of 4"):
        patch.setattr(detection, "augmented", interrupted)
        ask("detect", checkpoint, *FAST, "--output", tmp_path / "cut")
    common.Stopped.asked = None
    cut = ask("detect", checkpoint, *FAST, "--output", tmp_path / "cut")
    assert whole["rows"] == cut["rows"]
    with pytest.raises(common.UserError, match="lr.*another --output"):
        ask("detect", checkpoint, *FAST, "--lr", 0.5, "--output", tmp_path / "cut")

def test_where_detections_go(checkpoint, few_scenes, capsys):
    assert "--batch-size 13" in asked_wrongly(capsys, "detect", checkpoint, "--batch-size", 13)
    ask("detect", checkpoint, *FAST, "--steps", 1, "--baseline", "random")
    assert (checkpoint.parent / "detect-shapes-random" / "detections.png").exists()

def test_detection_in_photographs(real_data, checkpoint, tmp_path):
    result = ask("detect", checkpoint, "--data", real_data, "--train-set", "val", "--test-set",
                 "val", "--image-size", 40, *FAST, "--steps", 2, "--workers", 0,
                 "--output", tmp_path)
    assert 0 <= result["AP50"] <= 100 and result["train"] == 24 and result["data"] == "voc07"

# ------------------------------------------------------------------- several processes, mistakes

@pytest.mark.slow
def test_two_processes_are_one(checkpoint, tmp_path):
    result = run("tests/evaluate_in_two_processes.py", checkpoint, tmp_path, processes=2,
                 timeout=300)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    knn, linear, finetune, detect = map(json.loads, lines)
    assert knn["top1"] == ask("knn", checkpoint)["top1"]
    alone = ask("linear", checkpoint, "--no-augment", "--epochs", 3)
    assert linear["top1"] == pytest.approx(alone["top1"], abs=0.3)
    assert finetune["rows"][0]["images"] == 20
    assert detect["test"] == 9 and (tmp_path / "detections.png").exists()

def folder_of_classes(top, train, val):
    for part, classes in (("train", train), ("val", val)):
        for name in classes:
            (top / part / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (8, 8)).save(top / part / name / f"{i}.png")
    return top

@pytest.mark.parametrize("args,words", [
    (["knn", "nowhere.pt"], "no such file"),
    (["guess", "RUN"], "TASK"),
    ([], "TASK"),
    (["knn", "BROKEN"], "not a readable checkpoint"),
    (["knn", "MISFIT"], "does not fit"),
    (["knn", "RUN", "--data", "nothing"], "--data"),
    (["knn", "RUN", "--data", ""], "--data"),
    (["knn", "RUN", "--k", "0"], "--k"),
    (["knn", "RUN", "--view", "lab"], "--view"),
    (["knn", "RUN", "--output", "FILE"], "misfit.pt: a file, not a folder"),
    (["linear", "RUN", "--lr", "-1"], "--lr"),
    (["linear", "RUN", "--protocol", "dino"], "--protocol"),
    (["linear", "RUN", "--features", "z", "--baseline", "random"], "--features z"),
    (["linear", "RUN", "--protocol", "cpc"], "needs a checkpoint of cpc_v2.py, not simclr"),
    (["linear", "RUN", "--batch-size", "5001"], "--batch-size 5001: not in 1..5000"),
    (["finetune", "RUN", "--protocol", "cpc"], "needs a checkpoint of cpc_v2.py, not simclr"),
    (["finetune", "RUN", "--batch-size", "1", "--labels", "2"], "--batch-size 1: not in 2..20"),
    (["finetune", "RUN", "--batch-size", "21", "--labels", "2"], "--batch-size 21: not in 2..20"),
    (["finetune", "RUN", "--labels", "0"], "--labels"),
    (["finetune", "RUN", "--labels", "1.5"], "--labels"),
    (["finetune", "RUN", "--labels", "-2"], "--labels"),
    (["finetune", "RUN", "--labels", "0.0"], "--labels"),
    (["finetune", "RUN", "--labels", "0.001"], "5 of 5000 images, fewer than the 10 classes"),
    (["finetune", "RUN", "--labels", "5000"], "more than there are"),
    (["finetune", "RUN", "--data", "CLASSES"], "is not in"),
    (["neighbours", "RUN", "--count", "1"], "--count: '1' is not in 10"),
    (["detect", "RUN", "--data", "CLASSES"], "no set trainval"),
    (["detect", "RUN", "--data", "/nowhere"], "no set trainval"),
    (["detect", "RUN", "--data", ""], "--data ''"),
    (["detect", "RUN", "--baseline", "pixels"], "pixels"),
    (["detect", "RUN", "--rescale"], "--rescale"),
])
def test_misuse(checkpoint, tmp_path, capsys, args, words):
    (tmp_path / "broken.pt").write_bytes(checkpoint.read_bytes()[:5000])
    misfit = torch.load(checkpoint, weights_only=True)
    misfit["encoder_config"]["arch"] = "resnet50"
    torch.save(misfit, tmp_path / "misfit.pt")
    names = dict(RUN=checkpoint, BROKEN=tmp_path / "broken.pt", MISFIT=tmp_path / "misfit.pt",
                 FILE=tmp_path / "misfit.pt", CLASSES=tmp_path / "images")
    folder_of_classes(tmp_path / "images", "ab", "ac")
    told = asked_wrongly(capsys, *(names.get(arg, arg) for arg in args))
    assert str(names.get(words, words)) in told

def test_a_mistake_takes_one_line_and_status_2():
    assert "no such file" in one_line(run("evaluate.py", "knn", "nowhere.pt"))
