"""common.py's data: files of every kind, folders and links, broken images, torchvision's sets."""
import os, shutil, signal, subprocess, time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import common
import moco
import simclr
import swav
from conftest import command, environment, launched_wrongly, mistake, run, train
from test_common import pictures

@pytest.fixture
def folder(tmp_path):
    """train and val with two classes of 64 x 48 pictures, in every kind of file, and the pixels."""
    rgb = (pictures(1, 48, 64)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    image = Image.fromarray(rgb)
    gray = image.convert("L")
    turned = image.rotate(90, expand=True)
    files = {
        "train/a/plain.png": image, "train/a/photo.JPG": image, "train/a/web.webp": image,
        "train/a/turned.jpeg": turned, "train/a/turned.webp": turned,
        "train/b/cmyk.jpg": image.convert("CMYK"),
        "train/b/palette.png": image.convert("P", palette=Image.ADAPTIVE, colors=256),
        "train/b/gray.png": gray, "train/b/alpha.png": image.convert("RGBA"),
        "train/b/gray16.png": Image.fromarray(np.asarray(gray).astype(np.uint16) * 257),
        "val/a/x.bmp": image, "val/b/y.gif": image}
    exif = Image.Exif()
    exif[0x0112] = 6                            # shown turned clockwise by 90 degrees
    for name, picture in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        options = {}
        if name.lower().endswith(("jpg", "jpeg", "webp")):
            options["quality"] = 95
        if "turned" in name:
            options["exif"] = exif
        picture.save(tmp_path / name, **options)
    (tmp_path / "train/a/notes.txt").write_text("not an image")
    common.load_data.cache_clear()
    common.load_folder.cache_clear()
    return tmp_path, torch.from_numpy(rgb).permute(2, 0, 1)

def test_every_kind_of_file_comes_out_as_rgb(folder):
    top, rgb = folder
    data = common.load_data(str(top), split="train")
    assert len(data) == 10 and data.labels.tolist() == [0] * 5 + [1] * 5
    assert data.classes == ["a", "b"]
    gray = TF.rgb_to_grayscale(rgb, 3)
    for i, path in enumerate(data.paths):
        image = data.read(i)
        assert image.shape == (3, 48, 64) and image.dtype == torch.uint8, path
        expected = gray if "gray" in path else rgb
        difference = (image.float() - expected.float()).abs().mean()
        assert difference < (12 if "palette" in path else 6), (path, difference)
    assert len(common.load_data(str(top), split="val")) == 2

def test_a_folder_without_classes_has_images_but_no_labels(folder):
    top, _ = folder
    name = str(top / "train" / "b")
    data = common.load_data(name, split="pretrain")
    assert len(data) == 5 and data.labels is None
    assert common.has_labels(str(top)) and not common.has_labels(name)

@pytest.mark.parametrize("part,split,words", [
    ("train/b", "train", "no class folders, .*; expected some in .*train/<class>"),
    ("empty", "pretrain", "no images; expected some in .*empty"),
    ("other", "val", "val/c is not in .*train")])
def test_folders_that_are_no_data_set(folder, part, split, words):
    top, _ = folder
    (top / "empty").mkdir()
    (top / "other/train/a").mkdir(parents=True)
    (top / "other/val/c").mkdir(parents=True)
    with pytest.raises(common.UserError, match=words):
        common.load_data(str(top / part), split=split)

def test_classes_of_val_are_those_of_train(folder):
    top, _ = folder
    shutil.rmtree(top / "val" / "a")
    assert common.load_data(str(top), split="val").labels.tolist() == [1]

def test_links_neither_loop_nor_multiply_images(folder, capsys):
    top, _ = folder
    (top / "train/a/back").symlink_to(top, target_is_directory=True)
    (top / "train/b/again.png").symlink_to(top / "train/a/plain.png")
    (top / "train/b/self").symlink_to(top / "train/b", target_is_directory=True)
    data = common.load_data(str(top), split="train")
    names = sorted(os.path.realpath(path) for path in data.paths)
    assert len(names) == len(set(names)) == 12          # the link up leads to val's two as well
    assert "a link to" in capsys.readouterr().err

def test_a_pipe_is_no_image(folder):
    top, _ = folder
    os.mkfifo(top / "train/a/pipe.jpg")
    assert len(common.load_data(str(top), split="train")) == 10

@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_an_error(folder):
    top, _ = folder
    (top / "train/a").chmod(0)
    with pytest.raises(OSError):
        common.load_data(str(top), split="train")

def test_batches_are_the_same_with_and_without_workers(folder):
    data = common.load_data(str(folder[0]), split="pretrain")
    crops = [common.Crop(2, 16, flip=0.5), common.Crop(1, 8, (0.05, 0.2))]
    batches = common.Batches(data, crops, 4, 0)
    alone, helped = [list(common.stream(batches, range(1, 4), workers, torch.device("cpu")))
                     for workers in (0, 2)]
    for (a, i, _), (b, j, _) in zip(alone, helped):
        assert [view.shape for view in a] == [(4, 3, 16, 16)] * 2 + [(4, 3, 8, 8)]
        assert torch.equal(i, j)
        assert all(torch.equal(u, v) and u.max() <= 1 for u, v in zip(a, b))

def test_a_broken_image_is_replaced_by_the_next(folder):
    top, _ = folder
    path = top / "train/a/plain.png"
    path.write_bytes(path.read_bytes()[:300])
    (top / "train/a/photo.JPG").write_bytes(b"")
    data = common.load_data(str(top), split="train")
    bad = [i for i, p in enumerate(data.paths) if "plain" in p or "photo" in p]
    views, used, broken = data.crop(torch.tensor(bad), [common.Crop(1, 16)], 0)
    assert set(broken) == set(bad) and not set(used.tolist()) & set(bad)
    assert views[0].shape == (2, 3, 16, 16)

# ------------------------------------------------------------------- training on a folder

@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """120 small JPEGs in two classes for training, 20 for validation."""
    top = tmp_path_factory.mktemp("photos")
    images, labels, _ = common.draw_shapes(700, seed=9)
    for k in (0, 1):
        of_class = images[labels[:, 0] == k]
        for part, chosen in (("train", of_class[:60]), ("val", of_class[60:70])):
            (top / part / str(k)).mkdir(parents=True)
            for i, image in enumerate(chosen):
                image = Image.fromarray(image.transpose(1, 2, 0)).resize((40, 36))
                image.save(top / part / str(k) / f"{i:03}.jpg")
    return top

SMALL = ["--recipe", "small", "--arch", "resnet10x0.125", "--size", 24, "--epochs", 2,
         "--batch-size", 20, "--lr", 1, "--warmup-epochs", 0]

def test_few_images_have_a_recipe_whose_warmup_follows_the_epochs(photos):
    args = simclr.parse_args(["--data", str(photos)])
    assert args.recipe == "few images" and args.warmup_epochs == args.epochs / 20
    args = simclr.parse_args(["--data", str(photos), "--epochs", "6"])
    assert args.epochs == 6 and args.warmup_epochs == 0.3
    args = moco.parse_args(["--data", str(photos)])             # 120 images
    assert args.batch_size == 16 and args.queue_size == 32
    args = swav.parse_args(["--data", str(photos)])
    assert args.size == 64 and args.small_size == 27            # as 224 and 96

def test_one_broken_image_is_named_once_and_more_than_1_percent_stop_the_run(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "data")
    (tmp_path / "data/train/0/007.jpg").write_bytes(b"\xff\xd8 broken")
    args = ["--data", tmp_path / "data", *SMALL, "--workers", 2]
    result = run("simclr.py", *args, "--output", tmp_path / "run", processes=2)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("cannot read") == 1 and "(1 broken so far)" in result.stderr
    (tmp_path / "data/train/0/008.jpg").write_bytes(b"broken")
    message = mistake(simclr, *args, "--output", tmp_path / "run2")
    assert "2 of 120 images cannot be read, more than 1 %" in message

def test_workers_change_nothing_and_folders_without_labels_train(photos, tmp_path, capsys):
    for workers in (0, 2):
        train(simclr, "--data", photos, *SMALL, "--workers", workers,
              "--output", tmp_path / str(workers))
    alone, helped = [torch.load(tmp_path / name / "checkpoint.pt")["model"] for name in "02"]
    assert all(torch.equal(alone[key], helped[key]) for key in alone)
    capsys.readouterr()
    train(simclr, "--data", photos / "train" / "0", *SMALL, "--workers", 0,
          "--output", tmp_path / "plain")
    assert "kNN" not in capsys.readouterr().err
    assert "knn" not in (tmp_path / "plain/log.jsonl").read_text()

@pytest.mark.parametrize("name,status", [("SIGINT", 130), ("SIGTERM", 0)])
def test_a_signal_to_the_whole_group_while_workers_start(photos, tmp_path, name, status):
    """As a terminal's Ctrl-C is: processes that read images get it as well."""
    args = ["--data", photos, *SMALL, "--workers", 4, "--output", tmp_path]
    process = subprocess.Popen(command("simclr.py", *args), env=environment(), text=True,
                               stderr=subprocess.PIPE, start_new_session=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.time() + 90
    while process.poll() is None and time.time() < deadline:
        if len(children.read_text().split()) >= 3:
            break
    os.killpg(process.pid, getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in errors, errors
    assert f"stopped by {name}" in errors.splitlines()[-1]

def test_an_error_in_a_worker_ends_the_run(photos, tmp_path):
    result = run("simclr.py", "--data", photos, *SMALL, "--workers", 2, "--knn-every", 0,
                 "--size", 300_000, "--output", tmp_path, timeout=60)
    assert result.returncode == 2 and "error: not enough memory" in result.stderr

def test_the_pictures_of_a_run_are_no_training_images(photos, tmp_path):
    shutil.copytree(photos / "train" / "0", tmp_path, dirs_exist_ok=True)
    args = ["--data", tmp_path, *SMALL, "--workers", 0, "--output", tmp_path / "run"]
    train(simclr, *args)
    common.load_folder.cache_clear()
    train(simclr, *args)                        # with as many images as before
    assert len(common.load_data(str(tmp_path), split="pretrain")) == 60

def test_missing_labels_are_explained(folder, capsys):
    top, _ = folder
    shutil.rmtree(top / "val")
    assert len(common.load_data(str(top), split="pretrain")) == 10
    assert "no folders val/<class>, so there is no kNN accuracy" in capsys.readouterr().err
    assert common.load_data(str(top / "train"), split="pretrain").labels is None
    assert f"was it --data {top}?" in capsys.readouterr().err
    os.rename(top / "train", top / "flowers")           # as if all were given as classes
    assert len(common.load_data(str(top / "flowers"), split="pretrain")) == 10
    told = capsys.readouterr().err
    assert f"move the folders of {top}/flowers into {top}/flowers/train and " in told

def test_one_broken_image_of_few_does_not_stop_a_run():
    data = common.Folder(["a.jpg", "b.jpg"], [0, 1], ["a", "b"])
    common.note_broken(data, [0])
    with pytest.raises(common.UserError, match="2 of 2 images cannot be read"):
        common.note_broken(data, [1])

def test_an_empty_folder_ends_in_one_line(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    assert "no images" in launched_wrongly(capsys, simclr, "--data", tmp_path / "data",
                                           "--output", tmp_path / "run")

# ------------------------------------------------------------------- torchvision's sets

def test_cifar10_is_read(real_data):
    train, val = [common.load_data("cifar10", str(real_data), split) for split in ("train", "val")]
    assert train.images.shape == (50000, 3, 32, 32) and len(val) == 10000
    assert (torch.bincount(train.labels) == 5000).all() and train.classes[3] == "cat"
    reference = torchvision.datasets.CIFAR10(str(real_data), train=False)
    assert np.array_equal(val.images[17].permute(1, 2, 0), reference[17][0])
    assert val.labels[17] == reference[17][1]

def test_a_refused_download_says_what_is_missing(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("network unreachable")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", refuse)
    message = mistake(simclr, "--data", "cifar10", "--root", tmp_path, "--output", tmp_path / "r")
    assert "not found, and could not be downloaded" in message and "network unreachable" in message
    assert "cifar-10-batches-py" in message

def test_damaged_files_are_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py/data_batch_1").write_bytes(b"damaged")
    message = mistake(simclr, "--data", "cifar10", "--root", tmp_path, "--output", tmp_path / "r")
    assert "damaged or incomplete" in message
