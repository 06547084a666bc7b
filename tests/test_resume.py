"""Nothing is lost: kills, signals, full disks and other misfortunes of runs, of every method."""
import functools, importlib.util, json, math, os, random, resource, shutil, signal, subprocess
import sys, time
from pathlib import Path

import pytest
import torch

import common
import simclr
from conftest import (METHODS, ROOT, command, environment, launched_wrongly, mistake, run, tiny,
                      train)

FRESH = {"images_per_second", "waiting"}        # entries of the log that differ from run to run
OF_SIMCLR = ["--lr", "2", "--knn-every", "2"]

def flags(method):
    return [*tiny(method), *(OF_SIMCLR if method == "simclr" else [])]

def few_flags(method):
    """As many steps of 40 images, for tests with the fixture `few_labelled`."""
    return [*flags(method), "--batch-size", "40"]

def result_of(folder):
    """What a run must reproduce: its checkpoint, and its log without the timings."""
    lines = []
    for line in common.read_log(folder):
        lines.append({key: value for key, value in line.items() if key not in FRESH})
    return common.read_checkpoint(folder / "checkpoint.pt"), lines

def assert_equal_runs(a, b):
    """Bit for bit the same weights, buffers and optimizer state, and the same log."""
    one, log = result_of(a)
    other, other_log = result_of(b)
    assert log == other_log
    lines = [(line["step"], "knn" in line) for line in log]
    assert lines == sorted(set(lines))
    for part in ("encoder", "model"):
        assert one[part].keys() == other[part].keys()
        assert all(torch.equal(one[part][key], other[part][key]) for key in one[part])
    states = one["optimizer"]["state"]
    assert states
    for i, state in states.items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value),
                               torch.as_tensor(other["optimizer"]["state"][i][key]))

class Killed(BaseException):
    pass

def train_killed(script, *args, step):
    """The run of `script`, a module, in this process, until `step` is done and nothing of it is
    written: what a kill without warning leaves."""
    finish = common.Run.finish_step

    def dying(run, *args, **entries):
        if run.step == step - 1:
            raise Killed
        finish(run, *args, **entries)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(common.Run, "finish_step", dying)
        train(script, *args)

def wait_for(process, condition, seconds=90):
    """Until the condition holds; fails if the process ends before."""
    deadline = time.time() + seconds
    while not condition():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.005)

def last_step(folder):
    """The last step in the log of a run that may be writing it."""
    file = folder / "log.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return json.loads(lines[-1])["step"] if lines else -1

# ------------------------------------------------------------------- kills

DEFAULT = ["simclr", "moco"]                    # LARS; a queue and an average
SLOW = [pytest.param(m, marks=pytest.mark.slow) for m in METHODS if m not in DEFAULT]

@pytest.mark.parametrize("method", [*DEFAULT, *SLOW])
def test_a_run_that_is_killed_is_the_run_that_is_not(method, few_labelled, tmp_path):
    script = importlib.import_module(method)
    args = few_flags(method)
    step = 5 if method == "cpc_v2" else 17
    train(script, *args, "--output", tmp_path / "whole")
    train_killed(script, *args, "--output", tmp_path / "killed", "--save-every", 3, step=step)
    train(script, *args, "--output", tmp_path / "killed", "--save-every", 3)
    assert_equal_runs(tmp_path / "killed", tmp_path / "whole")

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """SimCLR's uninterrupted run."""
    folder = tmp_path_factory.mktemp("finished")
    train(simclr, *flags("simclr"), "--output", folder)
    return folder

def test_what_a_run_leaves(finished, capsys):
    checkpoint, lines = result_of(finished)
    names = ["checkpoint.pt", "curves.png", "log.jsonl", "views.png"]
    assert sorted(os.listdir(finished)) == names
    assert [line["step"] for line in lines] == [0, 4, 8, 12, 16, 20, 20, 24, 28, 30, 30]
    assert [line["step"] for line in lines if "knn" in line] == [0, 20, 30]
    assert set(lines[0]) == {"epoch", "step", "knn", "knn_pixels"}
    assert {"epoch", "step", "loss", "lr", "z_std", "bound"} <= set(lines[1])
    assert checkpoint["method"] == "simclr"
    assert checkpoint["step"] == 30 and checkpoint["epoch"] == 3
    encoder = common.resnet(**checkpoint["encoder_config"])
    encoder.load_state_dict(checkpoint["encoder"], strict=True)
    train(simclr, *flags("simclr"), "--output", finished)
    said = capsys.readouterr().err
    assert "this run is finished" in said and "untrained" in said and "pixels" in said
    before, knn = lines[0], lines[-1]["knn"]
    worse = [name for name, key in (("untrained", "knn"), ("pixels", "knn_pixels"))
             if before[key] >= knn]
    assert f"no better than {' and '.join(worse)}:" in said if worse else "no better" not in said

@pytest.mark.slow
def test_sigkill_at_random_moments(finished, tmp_path):
    args = [*flags("simclr"), "--output", tmp_path, "--save-every", 3]
    moments = random.Random(0)
    for _ in range(2):
        seen = last_step(tmp_path)
        process = subprocess.Popen(command("simclr.py", *args), env=environment(),
                                   stderr=subprocess.DEVNULL)
        wait_for(process, lambda: last_step(tmp_path) > seen or last_step(tmp_path) >= 24)
        time.sleep(moments.uniform(0, 0.2))
        process.kill()
        process.wait()
    train(simclr, *args)
    assert_equal_runs(tmp_path, finished)

def workers_of(process):
    """The training processes that torchrun has started."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    pids = [int(pid) for pid in found.stdout.split()]
    return [pid for pid in pids if b".py" in Path(f"/proc/{pid}/cmdline").read_bytes()]

def kill_and_resume(method, args, folder, processes, restarts=0):
    """A run of several processes, of which all, or one with a restart, are killed."""
    args = [*args, "--output", folder]
    torchrun = [f"--max-restarts={restarts}"]
    start = command(f"{method}.py", *args, "--save-every", 1, processes=processes,
                    torchrun=torchrun)
    process = subprocess.Popen(start, env=environment(), stderr=subprocess.PIPE, text=True)
    wait_for(process, lambda: last_step(folder) >= 4)
    workers = workers_of(process)
    if restarts:
        os.kill(workers[-1], signal.SIGKILL)
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 0 and "resuming from step" in errors, errors
        return
    process.kill()
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    result = run(f"{method}.py", *args, processes=processes)
    assert result.returncode == 0 and "resuming from step" in result.stderr, result.stderr

@pytest.mark.slow
def test_one_of_two_processes_dies_and_torchrun_resumes(tmp_path):
    result = run("simclr.py", *flags("simclr"), "--output", tmp_path / "whole", processes=2)
    assert result.returncode == 0, result.stderr
    assert "each process normalises by its own batch" in result.stderr
    kill_and_resume("simclr", flags("simclr"), tmp_path / "killed", processes=2, restarts=1)
    assert_equal_runs(tmp_path / "killed", tmp_path / "whole")

@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_four_processes_resume_bit_for_bit(method, tmp_path):
    """With more than two processes it matters in which order gradients are added."""
    args = flags(method)
    if "--bn-splits" in args:
        args += ["--batch-size", "400"]         # 100 for each, which two groups share
    result = run(f"{method}.py", *args, "--output", tmp_path / "whole", processes=4, timeout=400)
    assert result.returncode == 0, result.stderr
    kill_and_resume(method, args, tmp_path / "killed", processes=4)
    assert_equal_runs(tmp_path / "killed", tmp_path / "whole")

# ------------------------------------------------------------------- signals

def started(*args):
    """A process of simclr.py whose log has a line of its fourth step."""
    process = subprocess.Popen(command("simclr.py", *args), env=environment(),
                               stderr=subprocess.PIPE, text=True)
    folder = Path(args[args.index("--output") + 1])
    wait_for(process, lambda: last_step(folder) >= 4)
    return process

def assert_it_ends(process, name, status):
    """The signal of that name ends the process soon, with that status and a line that says so."""
    process.send_signal(getattr(signal, name))
    start = time.time()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status and time.time() - start < 10
    assert f"stopped by {name}" in errors.strip().splitlines()[-1]
    assert "Traceback" not in errors

@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGUSR1", marks=pytest.mark.slow)])
def test_a_signal_saves_and_ends_the_run(finished, tmp_path, name):
    args = [*flags("simclr"), "--output", tmp_path]
    assert_it_ends(started(*args), name, 0)
    train(simclr, *args)
    assert_equal_runs(tmp_path, finished)

def test_two_runs_in_one_folder_and_ctrl_c(tmp_path):
    args = [*flags("simclr"), "--epochs", 200, "--output", tmp_path]
    process = started(*args)
    assert "another run is writing there" in mistake(simclr, *args)
    assert_it_ends(process, "SIGINT", 130)
    saved = common.read_checkpoint(tmp_path / "checkpoint.pt")
    train_killed(simclr, *args, step=saved["step"] + 1)     # the lock went with the process

@pytest.mark.parametrize("name,status", [("SIGINT", 130), ("SIGTERM", 0), ("SIGUSR1", 0)])
def test_a_signal_while_torch_is_imported_ends_in_one_line(tmp_path, name, status):
    process = subprocess.Popen(command("simclr.py", "--output", tmp_path), env=environment(),
                               stderr=subprocess.PIPE, text=True)
    maps = Path(f"/proc/{process.pid}/maps")
    wait_for(process, lambda: "libtorch_cpu" in maps.read_text())
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=30)
    assert process.returncode == status
    assert errors == f"stopped by {name}; nothing was saved\n"

def test_a_signal_while_knn_accuracy_is_measured_has_saved_before(few_labelled, tmp_path,
                                                                  monkeypatch):
    def interrupted(*_):
        if os.path.exists(tmp_path / "checkpoint.pt"):
            signal.raise_signal(signal.SIGTERM)
        return torch.randn(10, 4), torch.arange(10)

    args = [*few_flags("simclr"), "--knn-every", 1, "--output", tmp_path]
    before = signal.signal(signal.SIGTERM, common.Stopped.on_signal)
    try:
        with monkeypatch.context() as patch, pytest.raises(common.Stopped):
            patch.setattr(common, "features", interrupted)
            train(simclr, *args)
    finally:
        signal.signal(signal.SIGTERM, before)
        common.Stopped.asked = None
    assert torch.load(tmp_path / "checkpoint.pt")["step"] == 10
    train(simclr, *args)
    assert [line["step"] for line in common.read_log(tmp_path) if "knn" in line] == [0, 10, 20, 30]

# ------------------------------------------------------------------- checkpoints and folders

def test_other_settings_scripts_and_damaged_files_are_refused(finished, tmp_path):
    whole = (finished / "checkpoint.pt").read_bytes()
    path = tmp_path / "checkpoint.pt"

    def resumed(*extra):
        return mistake(simclr, *flags("simclr"), *extra, "--output", tmp_path)

    path.write_bytes(whole[:-1000])
    assert "not a checkpoint of these scripts" in resumed()
    assert path.read_bytes() == whole[:-1000]
    path.write_bytes(whole)
    message = resumed("--temperature", "0.2", "--seed", "3")
    assert "made with other settings: --seed 0 (now 3), --temperature 0.1 (now 0.2)" in message
    saved = torch.load(path)
    torch.save(dict(saved, method="moco"), path)
    assert "made by moco.py" in resumed()
    torch.save(dict(saved, images=4000), path)
    assert "--images 4000 (now 5000)" in resumed()
    saved["model"].popitem()
    torch.save(saved, path)
    assert "does not fit this simclr.py" in resumed()

@pytest.mark.parametrize("changes", [
    dict(step=99), dict(step=-1), dict(step="x"), dict(args={1: 2}), dict(step=True), "source",
    "processes"])
def test_a_checkpoint_with_fields_of_no_use_is_refused(finished, tmp_path, changes):
    saved = torch.load(finished / "checkpoint.pt")
    if isinstance(changes, str):
        del saved[changes]
    else:
        saved.update(changes)
    torch.save(saved, tmp_path / "checkpoint.pt")
    assert "checkpoint.pt: " in mistake(simclr, *flags("simclr"), "--output", tmp_path)

@pytest.mark.parametrize("state", [
    dict(momentum_buffer=torch.zeros(3)), dict(momentum_buffer=torch.zeros(())),
    dict(momentum_buffer="x"), dict(step=torch.zeros(3)), dict(step="x"),
    dict(step=True)])
def test_an_optimizer_of_another_model_is_refused(finished, tmp_path, state):
    saved = torch.load(finished / "checkpoint.pt")
    saved["optimizer"]["state"][0] = state
    torch.save(saved, tmp_path / "checkpoint.pt")
    message = mistake(simclr, *flags("simclr"), "--output", tmp_path)
    assert "checkpoint.pt: does not fit this simclr.py" in message

def test_an_optimizer_may_keep_what_is_not_shaped_like_its_weight(finished, tmp_path, capsys):
    saved = torch.load(finished / "checkpoint.pt")
    saved["optimizer"]["state"][0]["row_var"] = torch.zeros(3)          # Adafactor's
    torch.save(saved, tmp_path / "checkpoint.pt")
    train(simclr, *flags("simclr"), "--output", tmp_path)
    assert "this run is finished" in capsys.readouterr().err

def test_a_run_that_is_killed_while_curves_are_drawn_draws_them_again(few_labelled, tmp_path,
                                                                      monkeypatch):
    drawn = []

    def draw(runs, path):
        drawn.append(path.name)
        if len(drawn) == 1:
            raise Killed

    monkeypatch.setattr(common, "draw_curves", draw)
    args = [*few_flags("simclr"), "--knn-every", 0, "--output", tmp_path]
    with pytest.raises(Killed):
        train(simclr, *args)
    for _ in range(2):
        train(simclr, *args)
    assert drawn == ["curves.png", "curves.png"]
    assert [line["step"] for line in common.read_log(tmp_path) if "knn" in line] == [30]

def test_a_finished_run_without_its_log_is_measured_again(finished, tmp_path, capsys):
    shutil.copyfile(finished / "checkpoint.pt", tmp_path / "checkpoint.pt")
    train(simclr, *flags("simclr"), "--output", tmp_path)
    said = capsys.readouterr().err
    assert "this run is finished" in said and "untrained" not in said
    assert result_of(tmp_path)[1] == result_of(finished)[1][-1:]

def imported(path, monkeypatch):
    """The script at `path` as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module

def test_a_copied_script_has_a_run_of_its_own(few_labelled, tmp_path, monkeypatch, capsys):
    """Two traps: a copy must not report its parent's result, and a changed script must say so."""
    monkeypatch.chdir(tmp_path)
    original = tmp_path / "simclr.py"
    copy = tmp_path / "barlow.py"
    source = (ROOT / "simclr.py").read_text()
    args = [*few_flags("simclr"), "--epochs", 1]
    for path in (original, copy):
        path.write_text(source)
        train(imported(path, monkeypatch), *args)
        assert f"{path.stem} on shapes" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path / "runs")) == ["barlow-shapes-resnet10x0.125",
                                                     "simclr-shapes-resnet10x0.125"]
    train(imported(original, monkeypatch), *args)
    assert "has changed" not in capsys.readouterr().err
    original.write_text(source.replace("/ temperature ", "/ (2 * temperature) "))
    train(imported(original, monkeypatch), *args)
    assert "simclr.py has changed since this run began" in capsys.readouterr().err

def test_an_output_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("here")
    told = launched_wrongly(capsys, simclr, *flags("simclr"), "--output", tmp_path / "file" / "run")
    assert "file/run: Not a directory" in told
    told = launched_wrongly(capsys, simclr, *flags("simclr"), "--output", tmp_path / "file")
    assert f"--output {tmp_path / 'file'}: a file, not a folder" in told

@pytest.mark.parametrize("name", ["checkpoint.pt", "log.jsonl"])
@pytest.mark.parametrize("make", [
    os.mkdir, os.mkfifo, functools.partial(os.symlink, "/dev/full"),
    functools.partial(os.symlink, "/dev/null")])
def test_what_is_no_file_is_neither_read_nor_written(tmp_path, capsys, name, make):
    make(tmp_path / name)
    told = launched_wrongly(capsys, simclr, *flags("simclr"), "--output", tmp_path)
    assert f"{name}: a pipe, a device or a folder, not a file" in told
    assert os.listdir(tmp_path) == [name] and not (tmp_path / name).is_file()

def test_damaged_lines_of_a_log_go_and_whole_ones_stay(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    lines = (tmp_path / "log.jsonl").read_text().splitlines(keepends=True)
    damaged = [lines[0], '{"step": \n', "[1]\n", '{"loss": 2}\n', '{"step": 2, "lr": [1]}\n',
               '{"step": 2, "lr": 1%s}\n' % (400 * "0"), *lines[1:], '{"step": 99}\n',
               "[" * 100_000 + "\n", lines[-1][:20]]
    for text in ("".join(damaged), "".join(lines).rstrip("\n")):
        (tmp_path / "log.jsonl").write_text(text)
        train(simclr, *flags("simclr"), "--output", tmp_path)
        assert (tmp_path / "log.jsonl").read_text() == "".join(lines)

def test_a_line_of_a_log_ends_with_a_newline_alone(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"note": "a\u2028b"}\n', encoding="utf-8")
    assert common.read_log(tmp_path) == [{"note": "a\u2028b"}]

def test_a_full_disk_leaves_the_checkpoint_before(few_labelled, tmp_path):
    args = [*few_flags("simclr"), "--output", tmp_path, "--save-every", 3]
    train_killed(simclr, *args, step=5)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))    # of each file
        message = mistake(simclr, *args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "checkpoint.pt: could not be written" in message
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert "checkpoint.pt.new" not in os.listdir(tmp_path)

@pytest.mark.parametrize("part,value", [("weight", math.inf), ("running_var", math.nan)])
def test_numbers_that_are_not_finite_are_never_saved(finished, tmp_path, part, value):
    path = tmp_path / "checkpoint.pt"
    saved = torch.load(finished / "checkpoint.pt")
    saved["step"] = 12
    key = next(key for key in saved["model"] if key.startswith("projector") and part in key)
    saved["model"][key].view(-1)[0] = value
    torch.save(saved, path)
    before = path.read_bytes()
    message = mistake(simclr, *flags("simclr"), "--output", tmp_path, "--save-every", 1)
    assert "not finite" in message or "the loss is nan" in message
    assert "--lr" in message and "the last good checkpoint is in" in message
    assert path.read_bytes() == before

def test_a_rate_that_is_far_too_large_leaves_no_bad_checkpoint(few_labelled, tmp_path):
    message = mistake(simclr, *few_flags("simclr"), "--lr", "1e30", "--output", tmp_path)
    assert "try a lower --lr" in message and "last good checkpoint" not in message
    assert not (tmp_path / "checkpoint.pt").exists()

def test_another_number_of_processes_is_named(finished, tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    saved = torch.load(finished / "checkpoint.pt")
    torch.save(dict(saved, step=12, processes=2), path)
    train_killed(simclr, *flags("simclr"), "--output", tmp_path, step=13)
    assert "1 processes instead of 2" in capsys.readouterr().err

def test_a_checkpoint_is_saved_every_minute(few_labelled, tmp_path, monkeypatch):
    clock = time.perf_counter
    ticks = [0]

    def quick():
        ticks[0] += 7
        return clock() + ticks[0]

    steps = []
    save = common.Run._save

    def noting(run):
        steps.append(run.step)
        save(run)

    monkeypatch.setattr(common.time, "perf_counter", quick)
    monkeypatch.setattr(common.Run, "_save", noting)
    train(simclr, *few_flags("simclr"), "--knn-every", 0, "--output", tmp_path)
    assert len(steps) > 4 and steps[-1] == 30
