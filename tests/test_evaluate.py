"""evaluate.py: figures, pictures and mistakes of the two evaluations, on a tiny run."""
import json

import pytest
import torch

import common
import evaluate
from conftest import TINY, one_line, run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    result = run("simclr.py", *TINY, "--lr", "2", "--output", folder)
    assert result.returncode == 0, result.stderr
    return folder / "checkpoint.pt"


def answer(result):
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_knn(checkpoint):
    result = answer(run("evaluate.py", "knn", checkpoint))
    logged = [json.loads(line) for line in (checkpoint.parent / "log.jsonl").read_text().splitlines()][-1]["knn"]
    assert result["task"] == "knn" and result["top1"] == logged and result["k"] == 200 and result["data"] == "shapes"
    assert (checkpoint.parent / "neighbours.png").stat().st_size > 10_000
    assert answer(run("evaluate.py", "knn", checkpoint, "--k", "1", "--output", checkpoint.parent / "one"))["k"] == 1


def test_knn_of_two_processes_is_that_of_one(checkpoint):
    assert answer(run("evaluate.py", "knn", checkpoint, processes=2))["top1"] == answer(run("evaluate.py", "knn", checkpoint))["top1"]


def test_baselines(checkpoint):
    random, again, pixels = (answer(run("evaluate.py", "knn", checkpoint, "--baseline", *b))
                             for b in (["random"], ["random", "--seed", "1"], ["pixels"]))
    assert random["top1"] != again["top1"] and random["baseline"] == "random"
    images = {split: common.load_data("shapes", split=split) for split in ("train", "val")}
    bank, queries = ((common.crop_and_resize(d.images, common.CenterCrop(16, interpolation="bicubic")).flatten(1), d.labels) for d in images.values())
    assert pixels["top1"] == pytest.approx(common.knn_accuracy(*bank, *queries), abs=0.1)


@pytest.mark.parametrize("protocol", evaluate.PROTOCOLS)
def test_every_protocol_of_the_probe(checkpoint, protocol):
    result = answer(run("evaluate.py", "linear", checkpoint, "--protocol", protocol, "--epochs", "2", "--no-augment"))
    assert result["protocol"] == protocol and 10 < result["top1"] <= result["top5"] <= 100 and result["batch_size"] == 256


def test_probe_learns_and_augments(checkpoint):
    before = checkpoint.read_bytes()
    once = answer(run("evaluate.py", "linear", checkpoint, "--no-augment", "--epochs", "20"))
    crops = answer(run("evaluate.py", "linear", checkpoint, "--epochs", "4"))
    assert once["top1"] > 20 and crops["top1"] > 15 and crops["augment"] and not once["augment"]
    assert checkpoint.read_bytes() == before and (checkpoint.parent / "confusion.png").exists()


def test_probe_of_two_processes_is_that_of_one(checkpoint):
    one, two = (answer(run("evaluate.py", "linear", checkpoint, "--no-augment", "--epochs", "3", processes=p)) for p in (1, 2))
    assert one["top1"] == pytest.approx(two["top1"], abs=0.3)


def test_accuracy():
    logits = torch.tensor([[3.0, 2, 1], [1, 2, 3], [2, 3, 1], [1, 3, 2]])
    labels = torch.tensor([0, 0, 0, 2])
    assert evaluate.accuracy(logits, labels, 1) == 25 and evaluate.accuracy(logits, labels, 2) == 75 and evaluate.accuracy(logits, labels, 5) == 100


def test_frozen_encoder_that_moves_is_noticed(checkpoint, monkeypatch):
    load = evaluate.load_encoder

    def thawed(*args):
        encoder, dim, saved = load(*args)
        encoder.register_forward_hook(lambda *_: encoder.bn1.running_mean.add_(1))
        return encoder, dim, saved

    monkeypatch.setattr(evaluate, "load_encoder", thawed)
    with pytest.raises(AssertionError, match="moved"):
        evaluate.linear(evaluate.parse_args(["linear", str(checkpoint), "--no-augment", "--epochs", "1"]), torch.device("cpu"))


@pytest.mark.parametrize("args,words", [(["knn", "nowhere.pt"], "no such file"), (["linear", "CHECKPOINT", "--protocol", "dino"], "--protocol"),
                                        (["knn", "CHECKPOINT", "--data", "nothing"], "--data"), (["knn", "CHECKPOINT", "--k", "0"], "--k"),
                                        (["linear", "CHECKPOINT", "--lr", "-1"], "--lr"), (["knn", "BROKEN"], "not a readable checkpoint"),
                                        (["guess", "CHECKPOINT"], "TASK"), (["knn", "MISFIT"], "does not fit")])
def test_misuse(checkpoint, tmp_path, args, words):
    (tmp_path / "broken.pt").write_bytes(checkpoint.read_bytes()[:5000])
    misfit = torch.load(checkpoint)
    misfit["encoder_config"]["arch"] = "resnet50"
    torch.save(misfit, tmp_path / "misfit.pt")
    names = dict(CHECKPOINT=checkpoint, BROKEN=tmp_path / "broken.pt", MISFIT=tmp_path / "misfit.pt")
    assert words in one_line(run("evaluate.py", *(names.get(a, a) for a in args), cwd=tmp_path))
