"""experiments.py: every command is one that its script takes; what is run, and once; what comes of
failures; the table, EXPERIMENTS.md and the pictures."""
import importlib, json, shlex, signal, subprocess, time
from pathlib import Path

import pytest
import torch

import common
import conftest
import evaluate
import experiments
import transfer
from conftest import command, environment

MINIATURE = ["--", "--arch", "resnet10x0.125", "--size", 8, "--batch-size", 500, "--epochs", 1]

def main(*args):
    """Run it in this process; returns its exit status."""
    try:
        experiments.main(experiments.parse_args(list(map(str, args))), torch.device("cpu"))
    except SystemExit as e:
        return int(e.code)
    return 0

def printed(capsys, *args):
    """The commands that it prints, as lists of words."""
    capsys.readouterr()
    assert main(*args) == 0
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]

def parse(words):
    """Read a command by its script's own parser."""
    script, *flags = words
    if script == "evaluate.py":
        return evaluate.parse_args(flags)
    if script == "transfer.py":
        return transfer.parse_args(flags)
    return importlib.import_module(script.removesuffix(".py")).parse_args(flags)

@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, in which the sections, pictures and runs are."""
    monkeypatch.chdir(tmp_path)
    return tmp_path

@pytest.fixture
def in_this_process(monkeypatch):
    """Programs run in this process, on few images, which takes a second; the list of those that
    were started. One whose words are in `broken` fails."""
    draw = common.draw_shapes
    monkeypatch.setattr(common, "draw_shapes", lambda n, seed: draw(n // 8, seed))
    common.load_data.cache_clear()
    started = []

    class Program:
        broken = "no such word"

        def __init__(self, words, stdout, stderr, env, start_new_session):
            assert env["OMP_NUM_THREADS"] == "1" and start_new_session
            _, script, *flags = map(str, words)
            started.append([Path(script).name, *flags])
            if self.broken in flags:
                return
            if Path(script).name == "evaluate.py":
                stdout.write(json.dumps(conftest.ask(*flags)))
            else:
                module = importlib.import_module(Path(script).stem)
                conftest.train(module, *flags)

        def poll(self):
            return 0

    monkeypatch.setattr(subprocess, "Popen", Program)
    yield Program, started
    common.load_data.cache_clear()

# ------------------------------------------------------------------- the table

@pytest.mark.parametrize("data", ["shapes", "cifar10"])
def test_every_command_is_one_that_its_script_takes(data, capsys, here):
    commands = printed(capsys, *experiments.EXPERIMENTS, "--data", data, "--dry-run")
    assert len(commands) > 200
    for threads, python, *words in commands:
        assert (threads, python) == ("OMP_NUM_THREADS=1", "python")
        args = parse(words)
        if words[0] not in ("evaluate.py", "transfer.py"):
            assert args.data == data and Path(args.output).parts[-1] == "seed0"
    assert not list(here.iterdir())

def test_every_command_of_the_papers_is_one_that_its_script_takes(capsys, here):
    (here / "IMAGENET").mkdir()
    commands = printed(capsys, *experiments.EXPERIMENTS, "--scale", "paper")
    assert len(commands) > 200
    for start, *words in commands:
        if start == "torchrun":
            assert words.pop(0) == "--nproc_per_node=8"
        args = parse(words)
        if words[0] not in ("evaluate.py", "transfer.py"):
            assert args.recipe.startswith("imagenet") or args.data == "cifar10"
    batches = {words[words.index("--batch-size") + 1] for words in commands
               if words[2] == "simclr.py" and "--batch-size" in words}
    assert {"256", "1024", "4096"} <= batches

def test_no_two_rows_of_an_experiment_are_the_same_run():
    args = experiments.parse_args([])
    for name, entry in experiments.EXPERIMENTS.items():
        folders = [commands[0][1].parent for commands in experiments.plan(entry, args).values()]
        shared = "supervised" in entry["rows"]  # one run, measured in two ways
        assert len(set(folders)) == (1 if shared else len(folders)), name

def test_it_lists_the_experiments_and_their_minutes(capsys, here):
    assert main() == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(experiments.EXPERIMENTS)
    assert all(0 < int(line.split()[1]) <= 30 and line.endswith(("?", ".")) for line in lines)

@pytest.mark.parametrize("data", ["shapes", "cifar10"])
def test_all_methods_have_the_same_minutes(data):
    args = experiments.parse_args(["--data", data])
    entry = experiments.EXPERIMENTS["methods"]
    trainings = [commands[0][0] for commands in experiments.plan(entry, args).values()]
    assert [train[0][:-3] for train in trainings] == conftest.METHODS
    for train in trainings:
        minutes = experiments.epochs(train) * experiments.MINUTES[data][train[0][:-3]]
        assert minutes == pytest.approx(entry["equal"][data], rel=0.13)

def test_an_unknown_name_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit) as e:
        common.launch(experiments.main, lambda: experiments.parse_args(["simclr-table55"]))
    line, = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and "error: simclr-table55: not one of simclr-table1, " in line
    assert line.endswith(", methods")

def test_a_mistake_in_a_runs_flags_shows_before_the_work(here):
    with pytest.raises(common.UserError, match="--colour"):
        main("simclr-table5", "--", "--colour", 1)
    assert not list(here.iterdir())

def test_missing_data_show_before_the_work(here, monkeypatch):
    def missing(*_):
        raise common.UserError("--data cifar10: not found")

    monkeypatch.setattr(common, "load_data", missing)
    with pytest.raises(common.UserError, match="not found"):
        main("simsiam-figure2", "--data", "cifar10")
    assert not list(here.iterdir())

# ------------------------------------------------------------------- order

def test_agreement_by_hand():
    assert experiments.agreement([1, 2, 3], [10, 20, 30]) == (3, 3)
    assert experiments.agreement([3, 2, 1], [10, 20, 30]) == (0, 3)
    assert experiments.agreement([1, 3, 2], [10, 20, 30]) == (2, 3)
    assert experiments.agreement([1, 1, 2], [10, 20, 30]) == (2, 3)       # a tie of ours
    assert experiments.agreement([1, 2, 3], [10, 10, 30]) == (2, 2)       # no order to agree with
    assert experiments.agreement([1, None, 3], [10, 20, 30]) == (1, 1)
    assert experiments.agreement([1, 2], [None, None]) == (0, 0)

def test_a_run_without_a_projector_has_no_z_to_evaluate():
    runs = experiments.plan(experiments.EXPERIMENTS["simclr-figure8"], experiments.parse_args([]))
    assert [len(commands) for commands in runs.values()] == [2] + 6 * [3]

@pytest.mark.parametrize("name,label,answer,expected", [
    ("simclr-table3", "rotation", dict(task="invariance", rows=[
        {"task": "rotation", "chance": 25, "h": 60.5, "g(h)": 30.5},
        {"task": "original or Sobel", "chance": 50, "h": 1.0, "g(h)": 2.0}]),
     {"h": 60.5, "g(h)": 30.5}),
    ("cpc_v2-table2", "CPC v2", dict(task="finetune", rows=[
        dict(labels=0.01, top1=40.0, baseline_top1=20.0), dict(labels=0.5, top1=80.0)]),
     {"1 %": 40.0, "50 %": 80.0}),
    ("cpc_v2-table2", "supervised", dict(task="finetune", rows=[
        dict(labels=0.1, top1=40.0, baseline_top1=20.0)]), {"10 %": 20.0}),
    ("densecl-lambda", "dense-weight 0.5", dict(task="detect", AP=12.0, AP50=30.0), {"AP": 12.0}),
    ("simclr-figure8", "none", dict(task="linear", features="h", top1=50.0), {"linear": 50.0}),
    ("simclr-figure8", "none", dict(task="linear", features="z", top1=40.0), {"linear z": 40.0})])
def test_figures_of_other_evaluations(name, label, answer, expected, here):
    runs = experiments.plan(experiments.EXPERIMENTS[name], experiments.parse_args([]))
    commands = runs[label, 0]
    _, file = commands[1]
    file.parent.mkdir(parents=True)
    file.write_text("a table\n" + json.dumps(answer) + "\n")
    assert experiments.figures(experiments.EXPERIMENTS[name], label, commands) == expected

# ------------------------------------------------------------------- runs

def test_a_run_of_two_seeds(in_this_process, capsys, here):
    _, started = in_this_process
    flags = ["simsiam-symmetric", "--seeds", 2, "--jobs", 1, *MINIATURE]
    assert main(*flags) == 0
    assert [words[0] for words in started] == ["simsiam.py", "evaluate.py"] * 4
    shown = capsys.readouterr().out
    assert "have the paper's order: linear " in shown and "±" in shown
    first = (here / "EXPERIMENTS.md").read_text()
    for text in ("<!-- simsiam-symmetric -->", "<!-- end simsiam-symmetric -->", "| 64.8 |",
                 "`python experiments.py simsiam-symmetric --data shapes --seeds 2 -- --arch"):
        assert first.count(text) == 1
    picture = here / "pictures/experiments/simsiam-symmetric.png"
    assert picture.read_bytes()[:4] == b"\x89PNG"

    picture.unlink()
    (here / "EXPERIMENTS.md").write_text(first.replace("64.8", "?") + "\nkept\n")
    assert main(*flags) == 0                                # nothing is run again
    assert len(started) == 8 and picture.exists()
    assert (here / "EXPERIMENTS.md").read_text() == first + "\nkept\n"

def test_a_note_stays_when_its_section_is_written_again(in_this_process, here):
    flags = ["simsiam-symmetric", "--jobs", 2, *MINIATURE]
    assert main(*flags) == 0
    file = here / "EXPERIMENTS.md"
    end = "<!-- end simsiam-symmetric -->"
    noted = file.read_text().replace(end, f"\nNote: what came\nout.\n{end}\nanother section\n")
    file.write_text(noted.replace("64.8", "?"))
    assert main(*flags) == 0
    assert file.read_text() == noted

def test_a_failed_run_is_named_and_the_others_go_on(in_this_process, capsys, here):
    program, started = in_this_process
    program.broken = "--no-stop-gradient"
    assert main("simsiam-figure2", "--jobs", 1, *MINIATURE) == 1
    shown = capsys.readouterr()
    line, = [line for line in shown.err.splitlines() if "failed" in line]
    assert "no-stop-gradient" in line and "seed0/output.txt" in line and "simsiam.py" in line
    assert [words[0] for words in started] == ["simsiam.py", "evaluate.py", "simsiam.py"]
    rows = {line[:13]: line.split()[1:] for line in shown.out.splitlines()}
    assert rows["stop-gradient"][-1] == "68.1"
    assert "| without | - | - | - | 0.1 |" in (here / "EXPERIMENTS.md").read_text()

    program.broken = "no such word"
    assert main("simsiam-figure2", "--jobs", 1, *MINIATURE) == 0
    assert [words[0] for words in started[3:]] == ["simsiam.py", "evaluate.py"]

def test_what_is_stopped_resumes(here):
    """Ctrl-C ends both trainings too, which have saved, and the same command goes on."""
    args = ["moco-shuffling", "--jobs", 2, *MINIATURE[:-1], 400, "--queue-size", 2000,
            "--bn-splits", 2]
    program = subprocess.Popen(command("experiments.py", *args), stderr=subprocess.PIPE,
                               env=environment(), text=True)
    deadline = time.time() + 180
    while len(list(here.glob("runs/experiments/shapes/moco/*/seed0/log.jsonl"))) < 2:
        if time.time() > deadline:
            program.terminate()
        assert program.poll() is None
        time.sleep(0.05)
    program.send_signal(signal.SIGINT)
    _, said = program.communicate(timeout=180)
    assert program.returncode == 130 and "Traceback" not in said, said
    for folder in here.glob("runs/experiments/shapes/moco/*/seed0"):
        checkpoint = common.read_checkpoint(folder / "checkpoint.pt")
        assert 0 < checkpoint["step"] < 4000
        assert "stopped by SIGTERM" in (folder / "output.txt").read_text()
        assert experiments.result(folder / "train.out") is None
