"""evaluate.py neighbours and compare, and what is in its pictures."""
import json
import os
import shutil

import matplotlib
import pytest
import torch
from PIL import Image

import common
import evaluate
from conftest import ask, asked_wrongly

@pytest.fixture
def little_data(monkeypatch):
    """`shapes` of 600 and 200 images."""
    load = common.load_data

    def load_little(name, root="data", split="train", device="cpu"):
        data = load(name, root, split, device)
        count = 200 if split == "val" else 600
        return common.Images(data.images[:count], data.labels[:count], device, data.classes)

    monkeypatch.setattr(common, "load_data", load_little)

@pytest.fixture
def texts(monkeypatch):
    """{name of a picture: the texts in it}, of all that are saved."""
    saved = {}

    def noting(figure, path):
        found = figure.findobj(matplotlib.text.Text)
        saved[path.name] = {text.get_text() for text in found}
        write(figure, path)

    write = common.save_picture
    monkeypatch.setattr(common, "save_picture", noting)
    return saved

# ------------------------------------------------------------------- neighbours and pictures

def test_neighbours(checkpoint, tmp_path, texts, capsys, little_data):
    result = ask("neighbours", checkpoint, "--count", 100, "--output", tmp_path)
    assert 0 < result["nearest_of_same_class"] <= 100 and 0 < result["by_pixels"] <= 100
    told = capsys.readouterr().err
    for name in ("neighbours-and-pixels.png", "map.png"):
        assert (tmp_path / name).stat().st_size > 10_000
        assert f"picture: {tmp_path / name}" in told
        assert set(common.CLASSES) <= texts[name]

def test_classes_have_their_names_in_every_data_set(checkpoint, tmp_path, texts):
    """Here in a folder, whose class folders they are."""
    names = ["aardvark", "bison", "civet"]
    for part, count in (("train", 6), ("val", 4)):
        for k, name in enumerate(names):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                color = (80 * k + i, 10 * i, 200 - 80 * k)
                Image.new("RGB", (12, 10), color).save(tmp_path / part / name / f"{i}.png")
    args = ["--data", tmp_path, "--workers", 0, "--output", tmp_path / "pictures"]
    knn = ask("knn", checkpoint, *args)
    assert knn["k"] == 3                                        # half the images of a class
    ask("linear", checkpoint, "--no-augment", "--epochs", 1, *args)
    ask("neighbours", checkpoint, *args)
    assert set(texts) == {"neighbours.png", "confusion.png", "neighbours-and-pixels.png",
                          "map.png"}
    assert all(set(names) <= found for found in texts.values()), texts

def test_images_without_labels_have_neighbours_too(checkpoint, tmp_path, texts):
    for i in range(30):
        Image.new("RGB", (12, 10), (8 * i, 10 * i % 200, 200 - 5 * i)).save(tmp_path / f"{i}.png")
    args = ["--data", tmp_path, "--workers", 0, "--output", tmp_path / "pictures"]
    result = ask("neighbours", checkpoint, *args)
    assert result["images"] == 27 and result["test_images"] == 3
    assert "nearest_of_same_class" not in result                # there is but one class
    assert texts["neighbours-and-pixels.png"] >= {"images", "query"}
    assert len(os.listdir(tmp_path / "pictures")) == 2

def test_classes_without_names_are_numbers():
    data = common.Images(torch.zeros(3, 3, 2, 2), [0, 2, 1], "cpu")
    assert evaluate.class_names(data) == ["0", "1", "2"]

def test_the_worst_of_many_classes_are_drawn():
    truth = torch.arange(120).repeat(2)
    predicted = torch.where(truth < 50, (truth + 1) % 50, truth)        # the first 50 are wrong
    figure = evaluate.draw_confusion(predicted, truth, [f"class {c}" for c in range(120)])
    labels = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert labels == [f"class {c}" for c in range(50)]

def test_the_confusion_is_in_percent_of_a_class():
    truth = torch.tensor([0, 0, 0, 0, 1, 1])
    predicted = torch.tensor([0, 0, 0, 1, 1, 0])
    figure = evaluate.draw_confusion(predicted, truth, ["a", "b"])
    image, = figure.axes[0].images
    assert image.get_array().tolist() == [[75, 25], [50, 50]]

def test_wrong_neighbours_have_a_red_frame():
    images = torch.full((2, 3, 16, 16), 128, dtype=torch.uint8)
    data = common.Images(images, [0, 1], "cpu")
    inputs = dict(size=16, interpolation="bilinear")
    right, wrong = evaluate.tiles(data, torch.arange(2), inputs, torch.tensor([False, True]))
    assert right.shape == wrong.shape == (3, 20, 20)            # a frame and a space of 1
    for tile, frame in ((right, [1, 1, 1]), (wrong, [1, 0, 0])):
        assert tile[:, 0, 0].tolist() == [1, 1, 1]
        assert tile[:, 1, 1].tolist() == tile[:, 1, 9].tolist() == frame
        assert torch.allclose(tile[:, 2:18, 2:18], torch.tensor(128 / 255))

def test_the_map_keeps_clusters_together():
    torch.manual_seed(0)
    y = torch.arange(120) % 4
    x = torch.nn.functional.normalize(torch.randn(120, 10) * 0.1 + torch.eye(10)[y], dim=1)
    plane = evaluate.tsne(x, neighbours=20, steps=200)
    nearest = torch.cdist(plane, plane).fill_diagonal_(9e9).argmin(1)
    assert plane.isfinite().all() and (y[nearest] == y).float().mean() > 0.95
    assert torch.equal(plane, evaluate.tsne(x, neighbours=20, steps=200))

def test_the_map_of_two_points_or_equal_ones_is_finite():
    for x in (torch.eye(3)[:2], torch.ones(12, 4) / 2):
        assert evaluate.tsne(x, steps=20).isfinite().all()

# ------------------------------------------------------------------- compare

@pytest.fixture
def copy_run(checkpoint, tmp_path):
    """A function that copies the run of the checkpoint, with other flags."""
    def copy(name, method="simclr", images=5000, **changes):
        shutil.copytree(checkpoint.parent, tmp_path / name)
        saved = torch.load(checkpoint, weights_only=True)
        saved.update(method=method, images=images)
        saved["args"].update(changes)
        torch.save(saved, tmp_path / name / "checkpoint.pt")
        return tmp_path / name

    return copy

def test_compare(copy_run, tmp_path, texts, capsys):
    first = copy_run("first", lr=2.0)
    second = copy_run("second", lr=8.0, color_strength=0.5)
    evaluate.main(evaluate.parse_args(["compare", str(first), str(second / "checkpoint.pt")]), None)
    told = capsys.readouterr()
    *table, line = told.out.splitlines()
    result = json.loads(line)
    labels = ["color strength 1.0, lr 2.0", "color strength 0.5, lr 8.0"]
    assert result["task"] == "compare" and result["data"] == "shapes (5000 images)"
    assert [row["run"] for row in result["rows"]] == labels
    log = common.read_log(first)
    row = result["rows"][0]
    assert row["untrained"] == log[0]["knn"] and row["pixels"] == log[0]["knn_pixels"]
    assert row["knn"] == log[-1]["knn"] and row["epochs"] == 3 and row["minutes"] >= 0
    assert str(row["knn"]) in table[2] and table[2].startswith(labels[0])
    assert f"picture: {tmp_path / 'compare.png'}" in told.err
    assert set(labels) <= texts["compare.png"]
    assert not any("not drawn" in text for text in texts["compare.png"])

def test_the_picture_replaces_nothing_but_pictures(copy_run, capsys):
    runs = [copy_run("first"), copy_run("second")]
    before = (runs[0] / "checkpoint.pt").read_bytes()
    message = asked_wrongly(capsys, "compare", *runs, "--output", runs[0] / "checkpoint.pt")
    assert "not the name of a .png file" in message
    assert (runs[0] / "checkpoint.pt").read_bytes() == before

def test_minutes_are_those_of_the_steps(copy_run):
    run = copy_run("run", batch_size=600)
    lines = [dict(epoch=0, step=0, knn=10.0, knn_pixels=20.0)]
    lines += [dict(epoch=e, step=100 * e, images_per_second=1000.0, knn=30.0 + e) for e in (1, 2)]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert evaluate.read_run(run)["figures"] == dict(epochs=2, untrained=10.0, pixels=20.0,
                                                     knn=32.0, minutes=2.0)

@pytest.mark.parametrize("changes,scales", [
    (dict(temperature=0.2), "temperature"), (dict(batch_size=100), "batch_size"),
    (dict(method="supcon"), "method")])
def test_losses_of_different_scales_are_not_drawn(copy_run, tmp_path, monkeypatch, changes, scales):
    drawn = {}
    titles = []

    def draw(curves, path, title):
        drawn.update(curves)
        titles.append(title)

    monkeypatch.setattr(common, "draw_curves", draw)
    runs = [copy_run("first"), copy_run("second", **changes)]
    ask("compare", *runs, "--output", tmp_path / "picture.png")
    title, = titles
    assert title == f"losses differ in scale ({scales})"
    assert not any("loss" in line for log in drawn.values() for line in log)
    assert sum("knn" in line for log in drawn.values() for line in log) > 2

def test_runs_with_the_same_flags_have_their_folders_names(copy_run):
    runs = [copy_run("first"), copy_run("second")]
    rows = ask("compare", *runs)["rows"]
    assert [row["run"] for row in rows] == [str(run) for run in runs]

def test_runs_of_different_methods_are_named_by_them(copy_run):
    rows = ask("compare", copy_run("first"), copy_run("second", method="byol", dim=3))["rows"]
    assert [row["run"] for row in rows] == ["method simclr", "method byol"]

def test_a_run_without_labels_has_no_accuracy(copy_run):
    run = copy_run("run")
    line = dict(epoch=1, step=4, loss=1.0, lr=0.1, z_std=1.0, images_per_second=10.0)
    (run / "log.jsonl").write_text(json.dumps(line) + "\n")
    figures = evaluate.read_run(run)["figures"]
    assert figures["knn"] is figures["untrained"] is figures["pixels"] is None

def write_line(run, **changes):
    line = dict(epoch=1, step=4, loss=1.0, lr=0.1, images_per_second=10.0)
    (run / "log.jsonl").write_text(json.dumps(dict(line, **changes)) + "\n")

def make_a_pipe(path):
    path.unlink()
    os.mkfifo(path)

@pytest.mark.parametrize("spoil,words", [
    (lambda run: (run / "log.jsonl").unlink(), "log.jsonl: no log of a run"),
    (lambda run: (run / "log.jsonl").write_text(""), "log.jsonl: no log of a run (no step)"),
    (lambda run: (run / "log.jsonl").write_text('{"epoch": 1}\n'), "log.jsonl: no log of a run"),
    (lambda run: (run / "log.jsonl").write_text("[1]\n{"), "log.jsonl: no log of a run"),
    (lambda run: (run / "log.jsonl").write_text("[" * 100_000), "log.jsonl: no log of a run"),
    (lambda run: write_line(run, images_per_second=0), "log.jsonl: no log of a run"),
    (lambda run: write_line(run, lr=[1]), "a value that is no number"),
    (lambda run: make_a_pipe(run / "log.jsonl"), "log.jsonl: a pipe"),
    (lambda run: make_a_pipe(run / "checkpoint.pt"), "checkpoint.pt: a pipe"),
    (lambda run: (run / "checkpoint.pt").unlink(), "checkpoint.pt"),
    (lambda run: (run / "checkpoint.pt").write_text("x"), "not a checkpoint of these scripts")])
def test_folders_that_cannot_be_compared(copy_run, capsys, spoil, words):
    good = copy_run("good")
    bad = copy_run("bad")
    spoil(bad)
    assert words in asked_wrongly(capsys, "compare", good, bad)

def test_runs_of_different_data_are_not_compared(copy_run, capsys):
    runs = [copy_run("first"), copy_run("second", images=4000)]
    told = asked_wrongly(capsys, "compare", *runs)
    assert "different data" in told and "(5000 images)" in told and "(4000 images)" in told

@pytest.mark.parametrize("args,words", [
    (["compare"], "RUN"), (["compare", "one"], "two runs"), (["compare", "no", "no"], "no")])
def test_mistakes_in_compare(args, words, capsys):
    assert words in asked_wrongly(capsys, *args)

def test_pictures_need_one_process(monkeypatch, capsys, checkpoint):
    monkeypatch.setattr(common, "WORLD_SIZE", 2)
    for task in ("neighbours", "compare"):
        with pytest.raises(common.UserError, match=f"{task} runs in one process"):
            evaluate.parse_args([task, str(checkpoint)])
