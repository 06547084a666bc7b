"""evaluate.py: figures and pictures of knn and linear, and every mistake, on a tiny run."""
import json

import pytest
import torch

import common
import evaluate
from conftest import ask, asked_wrongly, one_line, run


def test_knn(checkpoint):
    result = ask("knn", checkpoint)
    logged = [json.loads(line) for line in (checkpoint.parent / "log.jsonl").read_text().splitlines()][-1]["knn"]
    assert result["task"] == "knn" and result["top1"] == logged and result["k"] == 200 and result["data"] == "shapes"
    assert (checkpoint.parent / "neighbours.png").stat().st_size > 10_000
    assert ask("knn", checkpoint, "--k", "1", "--output", checkpoint.parent / "one")["k"] == 1


TWO_PROCESSES = """
import torch, common, evaluate
common.start()
drawn = evaluate.drawn_scenes
evaluate.drawn_scenes = lambda count, seed: drawn(9, seed)
for asked in {asked}:
    args = evaluate.parse_args(asked)
    getattr(evaluate, args.task)(args, torch.device("cpu"))
few = common.Images(torch.zeros(200, 3, 1, 1), torch.zeros(200), "cpu")
few.broken, few.paths = set(), [f"{{i}}.jpg" for i in range(200)]
common.note_broken(few, [7] if common.rank() else [])           # what the second process could not read
assert few.broken == {{7}}
"""


def test_two_processes_are_one(checkpoint, tmp_path):
    asked = [["knn", str(checkpoint)], ["linear", str(checkpoint), "--no-augment", "--epochs", "3"],
             ["finetune", str(checkpoint), "--labels", "2", "--epochs", "1", "--output", str(tmp_path)],
             ["detect", str(checkpoint), "--steps", "2", "--batch-size", "4", "--rois", "8", "--output", str(tmp_path)]]
    (tmp_path / "two_processes.py").write_text(TWO_PROCESSES.format(asked=asked))
    result = run(tmp_path / "two_processes.py", processes=2)
    assert sum("cannot read 7.jpg" in line for line in result.stderr.splitlines()) == 1, result.stderr
    knn, linear, finetune, detect = (json.loads(line) for line in result.stdout.splitlines() if line.startswith("{"))
    assert knn["top1"] == ask("knn", checkpoint)["top1"]
    assert linear["top1"] == pytest.approx(ask(*asked[1])["top1"], abs=0.3)
    assert finetune["rows"][0]["images"] == 20 and detect["test"] == 9 and (tmp_path / "detections.png").exists()


def test_baselines(checkpoint):
    random, again, pixels = (ask("knn", checkpoint, "--baseline", *b)
                             for b in (["random"], ["random", "--seed", "1"], ["pixels"]))
    assert random["top1"] != again["top1"] and random["baseline"] == "random"
    images = {split: common.load_data("shapes", split=split) for split in ("train", "val")}
    bank, queries = ((common.crop_and_resize(d.images, common.CenterCrop(8, interpolation="bicubic"))[0].flatten(1), d.labels) for d in images.values())
    assert pixels["top1"] == pytest.approx(common.knn_accuracy(*bank, *queries), abs=0.1)


@pytest.mark.parametrize("protocol", [name for name in evaluate.PROTOCOLS if name != "cpc"])      # which test_cpc_v2.py tests
def test_every_protocol_of_the_probe(checkpoint, protocol):
    result = ask("linear", checkpoint, "--protocol", protocol, "--epochs", "2", "--no-augment")
    assert result["protocol"] == protocol and result["batch_size"] == 256 and 0 < result["top1"] <= result["top5"] <= 100
    assert result["top1"] > 12 or protocol == "simsiam"        # whose LARC moves the weights by a thousandth a step


def test_probe_learns_and_augments(checkpoint):
    before = checkpoint.read_bytes()
    once = ask("linear", checkpoint, "--no-augment", "--epochs", "20")
    crops = ask("linear", checkpoint, "--epochs", "4")
    assert once["top1"] > 20 and crops["top1"] > 15 and crops["augment"] and not once["augment"]
    assert checkpoint.read_bytes() == before and (checkpoint.parent / "confusion.png").exists()


def test_accuracy():
    logits = torch.tensor([[3.0, 2, 1], [1, 2, 3], [2, 3, 1], [1, 3, 2]])
    labels = torch.tensor([0, 0, 0, 2])
    assert evaluate.accuracy(logits, labels, 1) == 25 and evaluate.accuracy(logits, labels, 2) == 75 and evaluate.accuracy(logits, labels, 5) == 100


def test_frozen_encoder_that_moves_is_noticed(checkpoint, monkeypatch):
    load = evaluate.load_encoder

    def thawed(*args):
        encoder, dim, saved = load(*args)
        encoder.register_forward_pre_hook(lambda *_: setattr(encoder.bn1, "running_mean", encoder.bn1.running_mean + 1))
        return encoder, dim, saved

    monkeypatch.setattr(evaluate, "load_encoder", thawed)
    with pytest.raises(AssertionError, match="moved"):
        evaluate.linear(evaluate.parse_args(["linear", str(checkpoint), "--no-augment", "--epochs", "1"]), torch.device("cpu"))


@pytest.mark.parametrize("args,words", [
    (["knn", "nowhere.pt"], "no such file"), (["guess", "RUN"], "TASK"), (["knn", "BROKEN"], "not a readable checkpoint"),
    (["knn", "MISFIT"], "does not fit"), (["knn", "RUN", "--data", "nothing"], "--data"), (["knn", "RUN", "--k", "0"], "--k"),
    (["linear", "RUN", "--lr", "-1"], "--lr"), (["linear", "RUN", "--protocol", "dino"], "--protocol"),
    (["linear", "RUN", "--protocol", "cpc"], "needs a checkpoint of cpc_v2.py, not simclr"),
    (["finetune", "RUN", "--protocol", "cpc"], "needs a checkpoint of cpc_v2.py, not simclr"),
    (["finetune", "RUN", "--labels", "0"], "--labels"), (["finetune", "RUN", "--labels", "1.5"], "--labels"),
    (["finetune", "RUN", "--labels", "-2"], "--labels"), (["finetune", "RUN", "--labels", "0.0"], "--labels"),
    (["finetune", "RUN", "--labels", "0.001"], "5 of 5000 images, fewer than the 10 classes"),
    (["finetune", "RUN", "--labels", "5000"], "class 0 has only"), (["finetune", "RUN", "--data", "CLASSES"], "no counterpart"),
    (["transfer", "RUN"], "--datasets"), (["neighbours", "RUN", "--count", "1"], "10 images or more"),
    (["transfer", "RUN", "--datasets", "CLASSES"], "without training images: c"),
    (["transfer", "RUN", "--datasets", "birdsnap", "--root", "CLASSES"], "--datasets birdsnap: no images"),
    (["transfer", "RUN", "--datasets", "caltech101", "--root", "CLASSES"], "--datasets caltech101: no images"),
    (["transfer", "RUN", "--datasets", "sun397", "--root", "CLASSES"], "--datasets sun397: not in"),
    (["detect", "RUN", "--data", "CLASSES"], "no set trainval"), (["detect", "RUN", "--baseline", "pixels"], "pixels"),
])
def test_misuse(checkpoint, tmp_path, capsys, args, words):
    from torchvision.io import write_jpeg
    (tmp_path / "broken.pt").write_bytes(checkpoint.read_bytes()[:5000])
    misfit = torch.load(checkpoint)
    misfit["encoder_config"]["arch"] = "resnet50"
    torch.save(misfit, tmp_path / "misfit.pt")
    for part in ("train/a", "train/b", "val/a", "val/c"):       # sets that do not share their classes
        (tmp_path / part).mkdir(parents=True)
        write_jpeg(torch.zeros(3, 8, 8, dtype=torch.uint8), str(tmp_path / part / "0.jpg"))
    names = dict(RUN=checkpoint, BROKEN=tmp_path / "broken.pt", MISFIT=tmp_path / "misfit.pt", CLASSES=tmp_path)
    assert words in asked_wrongly(capsys, *(names.get(a, a) for a in args))


def test_a_mistake_takes_one_line_and_status_2():
    assert "no such file" in one_line(run("evaluate.py", "knn", "nowhere.pt"))
