"""What the tests share: running a script as a person does, and the real images in $SSL_DATA."""
import contextlib, functools, io, json, math, os, random, re, signal, subprocess, sys, time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)                                        # the networks here are too small for more

import common
common.draw_shapes = functools.cache(common.draw_shapes)        # the same images for every run in this process


def pytest_configure(config):
    config.addinivalue_line("markers", "learning: trains long enough to learn something; runs after all others")
    config.addinivalue_line("markers", "slow: takes half a minute or more; runs only when asked for by `-m slow`")
    config.addinivalue_line("markers", "huge: a slow one that takes much memory")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.get_closest_marker("learning") is not None)
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow and not re.search("slow|huge", config.option.markexpr):
        items[:] = [item for item in items if item not in slow]
        config.hook.pytest_deselected(items=slow)


def command(script, *args, processes=1, torchrun=()):
    start = [sys.executable]
    if processes > 1 or torchrun:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *torchrun]
    return [*start, str(ROOT / script) if not os.path.isabs(str(script)) else str(script), *map(str, args)]


def environment(threads=1):
    return dict(os.environ, OMP_NUM_THREADS=str(threads), PYTHONPATH=str(ROOT))


def run(script, *args, processes=1, threads=1, cwd=None, timeout=180, **options):
    """Run a script to its end; returns the CompletedProcess with text output."""
    return subprocess.run(command(script, *args, processes=processes), cwd=cwd, env=environment(threads), capture_output=True, text=True,
                          timeout=timeout, **options)


def train(script, *args):
    """The run of `script`, a module, in this process: saves the five seconds that a new one takes to start."""
    script.train(script.parse_args(list(map(str, args))), torch.device("cpu"))


def mistake(script, args):
    """The message of a user's mistake that `script`, a module, must notice before its first step."""
    with pytest.raises((common.UserError, SystemExit)) as e:
        train(script, *args)
    return str(e.value)


def one_line(result):
    """The error line of a run that must have ended with one, and with status 2."""
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    return lines[0]


def watch(monkeypatch, *functions):
    """Replace each (owner, name) by itself plus a note in the list that is returned: (name, arguments, result), in the order of the calls."""
    calls = []

    def noting(name, function):
        def called(*args, **kwargs):
            result = function(*args, **kwargs)
            calls.append((name, args, result))
            return result
        return called

    for owner, name in functions:
        monkeypatch.setattr(owner, name, noting(name, getattr(owner, name)))
    return calls


def logged(folder, key):
    return [json.loads(line)[key] for line in (folder / "log.jsonl").read_text().splitlines()]


def check_bound(folder, candidates, losses=1):
    """The log's bound on mutual information is ln(candidates) minus the loss, which is a sum of so many losses."""
    expected = [math.log(candidates) - loss / losses for loss in logged(folder, "loss")]
    assert expected and logged(folder, "bound") == pytest.approx(expected, rel=1e-12)


# A run of 30 steps that takes a second or two, for every method.
TINY = ["--arch", "resnet10x0.0625", "--size", "8", "--batch-size", "500", "--epochs", "3"]
BOOKS = ["--log-every", 4, "--knn-every", 2]
FRESH = {"images_per_second", "waiting"}                        # the log's entries that differ from run to run


def result_of(folder):
    """What a run must reproduce: all tensors of its checkpoint, and its log without the timings."""
    checkpoint = common.read_checkpoint(folder / "checkpoint.pt")
    lines = [{k: v for k, v in json.loads(line).items() if k not in FRESH} for line in (folder / "log.jsonl").read_text().splitlines()]
    return checkpoint, lines


def assert_equal_runs(a, b):
    """Bit for bit the same weights, buffers and optimiser state, and the same log."""
    (one, log), (other, other_log) = result_of(a), result_of(b)
    assert log == other_log and [line["step"] for line in log] == sorted({line["step"] for line in log})
    for part in ("encoder", "model"):
        assert one[part].keys() == other[part].keys() and all(torch.equal(v, other[part][k]) for k, v in one[part].items())
    states = [c["optimizer"]["state"] for c in (one, other)]
    assert states[0] and all(torch.equal(states[0][i][k], states[1][i][k]) for i in states[0] for k in states[0][i])


class Killed(BaseException):
    pass


def train_killed(script, *args, step):
    """The run of `script`, a module, in this process, until `step` is done and nothing of it written: where a kill without warning would leave it."""
    after = common.Run._after_step

    def dying(run, stop):
        if run.step == step:
            raise Killed
        after(run, stop)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(common.Run, "_after_step", dying)
        train(script, *args)


def run_killed(folder, script, *args, processes=1):
    """Start the run in a process of its own and kill it without warning at a random moment, three times over; it goes on afterwards."""
    args = [*args, "--output", folder, "--save-every", 3]
    moments, log, kills = random.Random(processes), folder / "log.jsonl", 0
    folder.mkdir(exist_ok=True)
    while kills < 3:
        seen = len(log.read_text().splitlines()) if log.exists() else 0
        process = subprocess.Popen(command(script, *args, processes=processes), env=environment(), stderr=subprocess.DEVNULL,
                                   start_new_session=True)
        deadline = time.time() + 60
        while process.poll() is None and time.time() < deadline and not (log.exists() and len(log.read_text().splitlines()) > max(seen - 1, 0)):
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.3))
        if process.poll() is not None:                          # finished before the kill: start over
            for name in os.listdir(folder):
                os.remove(folder / name)
            kills = 0
            continue
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1


def run_restarted(folder, script, *args):
    """Two processes, of which one is killed without warning after the first checkpoint; torchrun starts both again. Returns what was said."""
    args = [*args, "--output", folder, "--save-every", 3]
    process = subprocess.Popen(command(script, *args, processes=2, torchrun=["--max-restarts=1"]), env=environment(), stderr=subprocess.PIPE, text=True)
    while not (folder / "checkpoint.pt").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    workers = [pid for pid in children if script in open(f"/proc/{pid}/cmdline").read()]
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and "going on from step" in errors, errors
    return errors


def check_resuming(folder, script, *args, processes):
    """A run of `script`, a module, that is cut off and goes on is the one that was not, bit for bit; evaluate.py reads its checkpoint. With two processes
    one of them is killed without warning, and torchrun starts both again."""
    import evaluate
    name = f"{script.__name__}.py"
    if processes == 1:
        train(script, *args, "--output", folder / "whole")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(common, "save_picture", lambda figure, path: common.pyplot().close(figure))       # once is enough, and it takes seconds
            train_killed(script, *args, "--output", folder / "killed", "--save-every", 3, step=17)
            train(script, *args, "--output", folder / "killed", "--save-every", 3)
            evaluate.knn(evaluate.parse_args(["knn", str(folder / "whole" / "checkpoint.pt")]), torch.device("cpu"))
    else:
        result = run(name, *args, "--output", folder / "whole", processes=2)
        assert result.returncode == 0 and "kNN accuracy" in result.stderr, result.stderr
        run_restarted(folder / "killed", name, *args)
    assert_equal_runs(folder / "killed", folder / "whole")


TWO_PROCESSES = """
import sys, torch, common
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
torch.manual_seed(0)
several = common.rank, common.world_size
common.rank, common.world_size = lambda: 0, lambda: 1           # first as if alone: the whole batch
{body}
parts = [slice(0, 4), slice(4, 8)]
loss(model, slice(0, 8)).backward()
whole = [w.grad.clone() for w in model.parameters()]
model.zero_grad()
common.rank, common.world_size = several
common.start()
network = DistributedDataParallel(model)
loss(network, parts[common.rank()]).backward()
for w, expected in zip(model.parameters(), whole):
    assert (w.grad - expected).norm() <= 1e-10 * expected.norm()
{after}
torch.distributed.barrier()
print("both agree")
"""


def check_two_processes(folder, body, after=""):
    """`body` defines, in float64, `model` and `loss(network, mine)`, the loss of the images `mine` of 8. In two processes with four images each
    the gradient must be that of the whole batch in one; `after` may check more, with `common.rank()` and `parts`."""
    script = folder / "two_processes.py"
    script.write_text(TWO_PROCESSES.format(body=body, after=after))
    result = run(script, processes=2)
    assert result.returncode == 0 and result.stdout.count("both agree") == 2, result.stderr


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """That of a short SimCLR run, for what is asked of encoders."""
    import simclr
    folder = tmp_path_factory.mktemp("run")
    train(simclr, *TINY, "--lr", "2", "--output", folder)
    return folder / "checkpoint.pt"


def ask(task, *args):
    """The JSON that `evaluate.py task ...` ends with; in this process."""
    import evaluate
    with contextlib.redirect_stdout(io.StringIO()) as out:
        getattr(evaluate, task)(evaluate.parse_args([task, *map(str, args)]), torch.device("cpu"))
    return json.loads(out.getvalue().splitlines()[-1])


def asked_wrongly(capsys, *args):
    """The line that `evaluate.py ...`, with a mistake in it, ends with, and status 2; in this process."""
    import evaluate
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        parsed = evaluate.parse_args(list(map(str, args)))
        common.launch(getattr(evaluate, parsed.task), parsed, stoppable=False)
    lines = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and len(lines) == 1 and ": error: " in lines[0], lines
    return lines[0]


@pytest.fixture(scope="session")
def real_data():
    folder = os.environ.get("SSL_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs real images: set SSL_DATA to their folder")
    return Path(folder)
