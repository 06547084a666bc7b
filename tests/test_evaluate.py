"""evaluate.py: figures, pictures and mistakes of the two evaluations, on a tiny run."""
import contextlib, io, json

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


def ask(task, *args, processes=1):
    """The JSON that `evaluate.py task ...` ends with; in this process, or in several as a person would start them."""
    if processes > 1:
        result = run("evaluate.py", task, *args, processes=processes)
        assert result.returncode == 0, result.stderr
        printed = result.stdout
    else:
        args = evaluate.parse_args([task, *map(str, args)])
        with contextlib.redirect_stdout(io.StringIO()) as out:
            getattr(evaluate, task)(args, torch.device("cpu"))
        printed = out.getvalue()
    return json.loads(printed.splitlines()[-1])


def test_knn(checkpoint):
    result = ask("knn", checkpoint)
    logged = [json.loads(line) for line in (checkpoint.parent / "log.jsonl").read_text().splitlines()][-1]["knn"]
    assert result["task"] == "knn" and result["top1"] == logged and result["k"] == 200 and result["data"] == "shapes"
    assert (checkpoint.parent / "neighbours.png").stat().st_size > 10_000
    assert ask("knn", checkpoint, "--k", "1", "--output", checkpoint.parent / "one")["k"] == 1


def test_knn_of_two_processes_is_that_of_one(checkpoint):
    assert ask("knn", checkpoint, processes=2)["top1"] == ask("knn", checkpoint)["top1"]


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


def test_probe_of_two_processes_is_that_of_one(checkpoint):
    one, two = (ask("linear", checkpoint, "--no-augment", "--epochs", "3", processes=p) for p in (1, 2))
    assert one["top1"] == pytest.approx(two["top1"], abs=0.3)


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


@pytest.mark.parametrize("args,words", [(["knn", "nowhere.pt"], "no such file"), (["linear", "CHECKPOINT", "--protocol", "dino"], "--protocol"),
                                        (["linear", "CHECKPOINT", "--protocol", "cpc"], "needs the encoder of a checkpoint of cpc_v2.py, not simclr"),
                                        (["knn", "CHECKPOINT", "--data", "nothing"], "--data"), (["knn", "CHECKPOINT", "--k", "0"], "--k"),
                                        (["linear", "CHECKPOINT", "--lr", "-1"], "--lr"), (["knn", "BROKEN"], "not a readable checkpoint"),
                                        (["guess", "CHECKPOINT"], "TASK"), (["knn", "MISFIT"], "does not fit")])
def test_misuse(checkpoint, tmp_path, capsys, args, words):
    (tmp_path / "broken.pt").write_bytes(checkpoint.read_bytes()[:5000])
    misfit = torch.load(checkpoint)
    misfit["encoder_config"]["arch"] = "resnet50"
    torch.save(misfit, tmp_path / "misfit.pt")
    names = dict(CHECKPOINT=checkpoint, BROKEN=tmp_path / "broken.pt", MISFIT=tmp_path / "misfit.pt")
    with pytest.raises((common.UserError, SystemExit)) as e:
        parsed = evaluate.parse_args([str(names.get(a, a)) for a in args])
        getattr(evaluate, parsed.task)(parsed, torch.device("cpu"))
    assert words in str(e.value) + capsys.readouterr().err


def test_mistakes_take_one_line():
    assert "no such file" in one_line(run("evaluate.py", "knn", "nowhere.pt"))
