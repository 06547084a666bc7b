"""simclr.py: the loss against its equation, one process against two, and runs that are killed, stopped, resumed and misused."""
import json, math, os, resource, shutil, signal, subprocess, time

import pytest
import torch
from torch import nn

import common
import evaluate
import simclr
from conftest import (BOOKS, TINY, assert_equal_runs, check_bound, check_two_processes, command, environment, mistake, one_line, result_of, run, run_killed,
                      run_restarted, train)

TINY = [*TINY, "--warmup-epochs", "1", "--lr", "2"]


# ---------------------------------------------------------------- loss

def nt_xent_by_loops(z1, z2, temperature):
    """Equation 1 and Algorithm 1 as they are written, one pair at a time."""
    z = [*z1.double(), *z2.double()]
    n = len(z1)
    s = lambda i, j: float(z[i] @ z[j] / (z[i].norm() * z[j].norm()))
    pair = lambda i, j: -math.log(math.exp(s(i, j) / temperature) / sum(math.exp(s(i, k) / temperature) for k in range(2 * n) if k != i))
    return sum(pair(k, n + k) + pair(n + k, k) for k in range(n)) / (2 * n)


@pytest.mark.parametrize("n,d,temperature", [(2, 3, 1.0), (5, 4, 0.5), (16, 8, 0.1)])
def test_loss_equals_its_equation(n, d, temperature):
    torch.manual_seed(n)
    z1, z2 = 7 * torch.randn(n, d, dtype=torch.float64), torch.randn(n, d, dtype=torch.float64)
    expected = nt_xent_by_loops(z1, z2, temperature)
    assert simclr.nt_xent(z1, z2, temperature).item() == pytest.approx(expected, rel=1e-10)
    assert simclr.nt_xent(z1.float(), z2.float(), temperature).item() == pytest.approx(expected, rel=1e-5)


def test_loss_of_known_cases():
    same = torch.ones(8, 4)
    assert simclr.nt_xent(same, same, 0.1).item() == pytest.approx(math.log(15), rel=1e-6)
    apart = torch.eye(4, dtype=torch.float64)
    assert simclr.nt_xent(apart, apart, 0.5).item() == pytest.approx(-2 + math.log(math.exp(2) + 6), rel=1e-12)
    assert simclr.nt_xent(1e-3 * apart, 1e3 * apart, 0.5).item() == pytest.approx(-2 + math.log(math.exp(2) + 6), rel=1e-12)


def test_logits_are_float32_whatever_the_precision():
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, 32, 16).bfloat16()
    exact = simclr.nt_xent(z1.double(), z2.double(), 0.1).item()
    assert simclr.nt_xent(z1, z2, 0.1).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert simclr.nt_xent(z1, z2, 0.1).item() == pytest.approx(exact, rel=1e-5)


def test_model_is_the_papers():
    model = simclr.SimCLR("resnet18x0.25", "small", "nonlinear", 32)
    assert [type(m) for m in model.projector] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d]
    assert model(torch.rand(4, 3, 32, 32)).shape == (4, 32) and not model.projector[-1].bias.requires_grad
    assert all(block.bn2.weight.abs().max() == 0 for block in model.encoder.layer2)
    assert [type(m) for m in simclr.projector(8, "linear", 4)] == [nn.Linear, nn.BatchNorm1d]
    assert isinstance(simclr.projector(8, "none", 4), nn.Identity)


# ---------------------------------------------------------------- several processes

def test_gradient_of_two_processes_is_that_of_the_whole_batch(tmp_path):
    check_two_processes(tmp_path, """
import simclr
model = torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.Tanh(), torch.nn.Linear(20, 6)).double()
x1, x2 = torch.randn(2, 8, 12, dtype=torch.float64)
values = {}
def loss(network, mine):
    value = simclr.nt_xent(*network(torch.cat([x1[mine], x2[mine]])).chunk(2), 0.3)
    values[mine.start, mine.stop] = value.detach().clone()
    return value
""", """
mean = values[parts[common.rank()].start, parts[common.rank()].stop]
torch.distributed.all_reduce(mean)
assert (mean / 2 - values[0, 8]).abs() < 1e-12
""")


# ---------------------------------------------------------------- whole runs

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Uninterrupted runs with one and with two processes."""
    folders = {}
    for processes in (1, 2):
        folders[processes] = tmp_path_factory.mktemp(f"finished{processes}")
        result = run("simclr.py", *TINY, "--output", folders[processes], *BOOKS, processes=processes)
        assert result.returncode == 0, result.stderr
        assert "kNN accuracy" in result.stderr
        assert ("BatchNorm takes its statistics in each process alone" in result.stderr) == (processes == 2)
    return folders


def test_run_leaves_its_books(finished, capsys):
    checkpoint, lines = result_of(finished[1])
    assert sorted(os.listdir(finished[1])) == ["checkpoint.pt", "curves.png", "log.jsonl", "views.png"]
    assert [line["step"] for line in lines] == [4, 8, 12, 16, 20, 24, 28, 30] and [line["step"] for line in lines if "knn" in line] == [20, 30]
    full = [json.loads(line) for line in (finished[1] / "log.jsonl").read_text().splitlines()]
    assert set(full[-1]) == {"epoch", "step", "loss", "lr", "images_per_second", "waiting", "z_std", "bound", "knn"}
    check_bound(finished[1], 999)
    assert lines[0]["loss"] == pytest.approx(math.log(999), abs=0.3) and lines[-1]["loss"] < lines[0]["loss"]
    assert lines[1]["lr"] == pytest.approx(2 * 500 / 256 * 8 / 10) and lines[-1]["lr"] == pytest.approx(2 * 500 / 256 * (1 + math.cos(math.pi * 19 / 20)) / 2)
    assert checkpoint["method"] == "simclr" and checkpoint["step"] == 30 and checkpoint["epoch"] == 3
    encoder = common.resnet(**checkpoint["encoder_config"])
    encoder.load_state_dict(checkpoint["encoder"], strict=True)
    train(simclr, *TINY, "--output", finished[1], *BOOKS)
    assert "this run is finished" in capsys.readouterr().err


@pytest.mark.parametrize("processes", [1, 2])
def test_run_killed_three_times_is_the_run_that_was_not(finished, tmp_path, processes):
    run_killed(tmp_path, "simclr.py", *TINY, *BOOKS, processes=processes)
    if processes == 1:
        train(simclr, *TINY, *BOOKS, "--output", tmp_path, "--save-every", 3)
    else:
        result = run("simclr.py", *TINY, *BOOKS, "--output", tmp_path, "--save-every", 3, processes=2)
        assert result.returncode == 0, result.stderr
    assert_equal_runs(tmp_path, finished[processes])


@pytest.mark.parametrize("name,status", [("SIGTERM", 0), ("SIGUSR1", 0), ("SIGINT", 130)])
def test_signals_save_and_end(finished, tmp_path, name, status):
    args = [*TINY, "--output", tmp_path, *BOOKS]
    process = subprocess.Popen(command("simclr.py", *args), env=environment(), stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "log.jsonl").exists() or not (tmp_path / "log.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(getattr(signal, name))
    start = time.time()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == status and time.time() - start < 5
    last = errors.strip().splitlines()[-1]
    assert last.startswith(f"stopped by {name} after step") and "Traceback" not in errors
    if name == "SIGTERM":
        train(simclr, *args)
        assert_equal_runs(tmp_path, finished[1])


def test_one_of_two_processes_dies_and_torchrun_goes_on(finished, tmp_path):
    run_restarted(tmp_path, "simclr.py", *TINY, *BOOKS)
    assert_equal_runs(tmp_path, finished[2])


# ---------------------------------------------------------------- misuse

@pytest.mark.parametrize("args,words", [
    (["--arch", "resnet51"], ["--arch", "resnet51", "resnet10, resnet18, resnet34, resnet50"]),
    (["--data", "cifar11"], ["--data", "cifar11", "shapes, cifar10, cifar100, stl10"]),
    (["--epochs", "0"], ["--epochs", "'0' is not a whole number of at least 1"]),
    (["--batch-size", "many"], ["--batch-size", "'many' is not a whole number"]),
    (["--lr", "-1"], ["--lr", "'-1' is not a number above 0"]),
    (["--lr", "nan"], ["--lr", "nan"]),
    (["--temperature", "0"], ["--temperature", "above 0"]),
    (["--seed", "-3"], ["--seed", "at least 0"]),
    (["--seed", "18446744073709551616"], ["--seed", "below 2 ** 63"]),
    (["--min-scale", "2"], ["--min-scale", "not a number in 0..1"]),
    (["--colour", "1"], ["--colour"]),
])
def test_bad_flags_take_one_line(args, words, capsys):
    with pytest.raises(SystemExit) as e:
        simclr.parse_args(args)
    error = capsys.readouterr().err
    assert e.value.code == 2 and len(error.splitlines()) == 1 and all(w in error for w in words), error


def test_help_shows_the_recipe_that_would_be_used(capsys):
    for args, words in ((["--help"], ["resnet10x0.25", "12.0"]), (["--data", "cifar10", "--help"], ["resnet18)", "512"]),
                        (["--data", "/tmp", "--help"], ["resnet50)", "4096", "1e-06"])):
        with pytest.raises(SystemExit):
            simclr.parse_args(args)
        shown = " ".join(capsys.readouterr().out.split())
        assert all(w in shown for w in words), (args, shown)
    assert simclr.parse_args(["--data", "/tmp", "--lr", "7"]).lr == 7


def test_bad_data_and_batches(tmp_path):
    assert "no images" in one_line(run("simclr.py", "--data", tmp_path, cwd=tmp_path))
    assert "larger than the data set of 5000" in mistake(simclr, ["--batch-size", 6000, "--output", tmp_path / "run"])
    result = run("simclr.py", "--batch-size", 65, "--output", tmp_path / "run", processes=2)
    assert result.returncode != 0 and "--batch-size 65: does not divide by the 2 processes" in result.stderr and "simclr.py\", line" not in result.stderr


def test_bad_checkpoints(finished, tmp_path):
    start = lambda *extra: mistake(simclr, [*TINY, *BOOKS, *extra, "--output", tmp_path])
    whole = (finished[1] / "checkpoint.pt").read_bytes()
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(whole[:-1000])
    assert "not a readable checkpoint" in start()
    assert path.read_bytes() == whole[:-1000]
    path.write_bytes(whole)
    error = start("--temperature", "0.2", "--seed", "3")
    assert "made with other settings: --seed 0 (now 3), --temperature 0.5 (now 0.2)" in error
    torch.save(dict(torch.load(path), method="moco"), path)
    assert "made by moco.py" in start()


def test_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("here")
    assert "--output" in mistake(simclr, [*TINY, "--output", tmp_path / "file" / "run"])


def test_full_disk_leaves_the_checkpoint_before(finished, tmp_path):
    args = [*TINY, "--output", tmp_path, *BOOKS]
    process = subprocess.Popen(command("simclr.py", *args, "--save-every", 3), env=environment(), stderr=subprocess.DEVNULL)
    while not (tmp_path / "checkpoint.pt").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = (tmp_path / "checkpoint.pt").read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))      # files cannot grow past this
    result = run("simclr.py", *args, "--save-every", 3, preexec_fn=limit)
    assert result.returncode == 2 and "checkpoint.pt: could not be written" in result.stderr.strip().splitlines()[-1]
    assert (tmp_path / "checkpoint.pt").read_bytes() == before and "checkpoint.pt.new" not in os.listdir(tmp_path)


def test_loss_that_is_not_finite_stops_before_the_checkpoint(finished, tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint = torch.load(finished[1] / "checkpoint.pt")
    checkpoint["step"], checkpoint["losses"] = 12, []
    checkpoint["model"]["projector.0.weight"][0, 0] = math.inf
    torch.save(checkpoint, path)
    before = path.read_bytes()
    result = run("simclr.py", *TINY, "--output", tmp_path, "--log-every", 4, "--save-every", 1)
    error = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2 and "the loss is nan in step 13" in error and "--lr" in error and "Traceback" not in result.stderr
    assert path.read_bytes() == before


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """120 small JPEGs in two classes for training, 20 for validation."""
    from PIL import Image
    top = tmp_path_factory.mktemp("photos")
    images, labels, _ = common.draw_shapes(700, seed=9)
    for k in (0, 1):
        for part, chosen in (("train", images[labels[:, 0] == k][:60]), ("val", images[labels[:, 0] == k][60:70])):
            (top / part / str(k)).mkdir(parents=True)
            for i, image in enumerate(chosen):
                Image.fromarray(image.transpose(1, 2, 0)).resize((40, 36)).save(top / part / str(k) / f"{i:03}.jpg")
    return top


SMALL_RUN = ["--recipe", "small", "--arch", "resnet10x0.0625", "--size", "24", "--epochs", "2", "--batch-size", "20", "--lr", "1", "--warmup-epochs", "0"]


def test_training_on_a_folder_with_one_broken_image(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "data")
    (tmp_path / "data/train/0/007.jpg").write_bytes(b"\xff\xd8 broken")
    result = run("simclr.py", "--data", tmp_path / "data", *SMALL_RUN, "--workers", 2, "--output", tmp_path / "run", processes=2)
    assert result.returncode == 0, result.stderr
    assert sum("cannot read" in line and "(1 broken so far)" in line for line in result.stderr.splitlines()) == 1
    assert "kNN accuracy" in result.stderr
    (tmp_path / "data/train/0/008.jpg").write_bytes(b"broken")
    for processes in (1, 2):
        result = run("simclr.py", "--data", tmp_path / "data", *SMALL_RUN, "--output", tmp_path / "run2", processes=processes)
        assert result.returncode != 0 and "2 of 120 images cannot be read, more than 1 %" in result.stderr and "simclr.py\", line" not in result.stderr


def test_workers_change_nothing_and_unlabelled_folders_train(photos, tmp_path, capsys):
    for workers in (0, 2):
        train(simclr, "--data", photos, *SMALL_RUN, "--workers", workers, "--output", tmp_path / str(workers))
    assert_equal_runs(tmp_path / "0", tmp_path / "2")
    capsys.readouterr()
    train(simclr, "--data", photos / "train" / "0", *SMALL_RUN, "--workers", 0, "--output", tmp_path / "plain")
    assert "kNN" not in capsys.readouterr().err and "knn" not in (tmp_path / "plain/log.jsonl").read_text()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_training_on_a_gpu(tmp_path):
    for extra in ([], ["--precision", "fp32"], ["--compile"]):
        result = run("simclr.py", *TINY, *extra, "--output", tmp_path / ("run" + "".join(extra)))
        assert result.returncode == 0, result.stderr
    result = run("simclr.py", *TINY, "--output", tmp_path / "torchrun", processes=torch.cuda.device_count())
    assert result.returncode == 0, result.stderr


@pytest.mark.learning
def test_it_learns(tmp_path, capsys):
    """Five epochs instead of thirteen: well above the untrained network and the pixels already."""
    result = run("simclr.py", "--epochs", "5", "--output", tmp_path, threads=2, timeout=400)
    assert result.returncode == 0, result.stderr
    top1 = {}
    for baseline in (None, "random", "pixels"):
        evaluate.knn(evaluate.parse_args(["knn", str(tmp_path / "checkpoint.pt"), *(["--baseline", baseline] if baseline else [])]), torch.device("cpu"))
        top1[baseline] = json.loads(capsys.readouterr().out.splitlines()[-1])["top1"]
    assert top1["random"] < 35 and top1["pixels"] < 55 and top1[None] > top1["pixels"] + 5, top1
