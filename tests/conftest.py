"""What the tests share: running a script as a person does, and the real images in $SSL_DATA."""
import contextlib, functools, io, json, os, re, signal, subprocess, sys
from pathlib import Path

if "gpu" not in " ".join(sys.argv):             # a GPU would change precision, device and batch
    os.environ["CUDA_VISIBLE_DEVICES"] = ""     # `pytest -m gpu` keeps it

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)                        # the networks here are too small for more

import common
from two_at_once import pytest_runtestloop          # pytest finds it here

common.draw_shapes = functools.cache(common.draw_shapes)    # the same images for every run here

METHODS = ["simclr", "moco", "byol", "simsiam", "swav", "cpc_v2", "insdis", "cmc", "deepcluster",
           "densecl", "supcon", "image_mixture"]

# A run of 30 steps that takes a second or two, for every method.
TINY = ["--arch", "resnet10x0.125", "--size", "8", "--batch-size", "500", "--epochs", "3",
        "--log-every", "4", "--knn-every", "0"]
TINY_OF = {
    "moco": ["--queue-size", "2000", "--dim", "16", "--bn-splits", "2"],
    "densecl": ["--queue-size", "2000", "--dim", "16", "--bn-splits", "2", "--size", "16"],
    "image_mixture": ["--queue-size", "2000", "--bn-splits", "2"],
    "swav": ["--small-crops", "2", "--num-prototypes", "12"],
    "deepcluster": ["--small-crops", "2", "--num-prototypes", "12"],
    "cmc": ["--arch", "resnet10x0.25"],         # of which each network has half the width
    "cpc_v2": ["--size", "16", "--resize", "18", "--patch-size", "8", "--stride", "4",
               "--offsets", "1", "2", "--batch-size", "100", "--epochs", "1"],
}

def tiny(method):
    """The flags of a run of that method that takes a few seconds."""
    return [*TINY, *TINY_OF.get(method, [])]

def pytest_configure(config):
    for marker in ("learning: trains long enough to learn something; runs after all others",
                   "slow: takes half a minute or more; runs only when asked for by `-m slow`",
                   "huge: a slow test that takes much memory",
                   "gpu: needs a GPU; runs only when asked for by `-m gpu`"):
        config.addinivalue_line("markers", marker)

def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.get_closest_marker("learning") is not None)
    wanted = config.option.markexpr
    left_out = [item for item in items for marker in ("slow", "gpu")
                if item.get_closest_marker(marker) and not re.search(f"{marker}|huge", wanted)]
    if left_out:
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)

def command(script, *args, processes=1, torchrun=()):
    """The command line that starts a script of the project, or of any path."""
    start = [sys.executable]
    if processes > 1 or torchrun:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                  *torchrun]
    return [*start, str(ROOT / script), *map(str, args)]

def environment(threads=1):
    return dict(os.environ, OMP_NUM_THREADS=str(threads), PYTHONPATH=str(ROOT))

def run(script, *args, processes=1, threads=1, cwd=None, timeout=180, **options):
    """Run a script to its end; returns the CompletedProcess with text output."""
    return subprocess.run(command(script, *args, processes=processes), cwd=cwd,
                          env=environment(threads), capture_output=True, text=True,
                          timeout=timeout, **options)

def train(script, *args):
    """The run of `script`, a module, in this process, which saves the seconds a new one takes."""
    script.train(script.parse_args(list(map(str, args))), torch.device("cpu"))

def mistake(script, *args):
    """The message of a user's mistake that `script`, a module, notices before its first step."""
    with pytest.raises(common.UserError) as e:
        train(script, *args)
    assert "\n" not in str(e.value)
    return str(e.value)

def one_line(result):
    """The error line of a run that must have ended with it, and with status 2."""
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1 and ": error: " in lines[0], result.stderr
    return lines[0]

def watch(monkeypatch, *functions):
    """Note every call of each (owner, name) in the list that is returned, in order: (name,
    arguments, result)."""
    calls = []

    def noting(name, function):
        @functools.wraps(function)
        def called(*args, **kwargs):
            result = function(*args, **kwargs)
            calls.append((name, args, result))
            return result
        return called

    for owner, name in functions:
        monkeypatch.setattr(owner, name, noting(name, getattr(owner, name)))
    return calls

def logged(folder, key):
    """The values of `key` in a run's log, without the line from before the first step."""
    return [line[key] for line in common.read_log(folder) if line["step"] and key in line]

@functools.cache
def start_two_processes():
    """All checks of two_processes.py, in one start, since that is what takes the time."""
    return run("tests/two_processes.py", processes=2)

def two_processes(check):
    """The result of a check of two_processes.py in two processes: each has half of a batch, and
    must have the gradient of the whole one."""
    result = start_two_processes()
    assert result.stdout.splitlines().count(f"{check}: equal") == 2, result.stderr

@pytest.fixture
def few_labelled(monkeypatch):
    """A run has 416 images instead of 5000 and draws no curves: it takes a second."""
    draw = common.draw_shapes
    monkeypatch.setattr(common, "draw_shapes", lambda n, seed: draw(n // 12, seed))
    monkeypatch.setattr(common, "draw_curves", lambda runs, path: None)
    common.load_data.cache_clear()
    yield
    common.load_data.cache_clear()

@pytest.fixture
def few_images(monkeypatch):
    """Runs see 100 images without labels and draw no curves, which saves seconds."""
    images, _, _ = common.draw_shapes(100, 1)
    data = common.Images(images, None, "cpu")
    monkeypatch.setattr(common, "load_data", lambda *_: data)
    monkeypatch.setattr(common, "has_labels", lambda _: False)
    monkeypatch.setattr(common, "draw_curves", lambda *_: None)

@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """That of a short SimCLR run."""
    import simclr
    folder = tmp_path_factory.mktemp("run")
    train(simclr, *TINY, "--lr", "2", "--knn-every", "2", "--output", folder)
    return folder / "checkpoint.pt"

def ask(task, *args):
    """The JSON that `evaluate.py task ...` ends with; in this process."""
    import evaluate
    with contextlib.redirect_stdout(io.StringIO()) as out:
        parsed = evaluate.parse_args([task, *map(str, args)])
        getattr(evaluate, task)(parsed, torch.device("cpu"))
    return json.loads(out.getvalue().splitlines()[-1])

def wrongly(capsys, main, parse_args, args, resumes):
    """The error line that `main`, launched in this process, ends with, alone, and status 2."""
    capsys.readouterr()
    before = [(s, signal.getsignal(s)) for s in common.SIGNALS]
    arguments = list(map(str, args))
    try:
        with pytest.raises(SystemExit) as e:
            common.launch(main, lambda: parse_args(arguments), resumes)
    finally:
        for s, handler in before:
            signal.signal(s, handler)
    lines = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and len(lines) == 1 and ": error: " in lines[0], lines
    return lines[0]

def asked_wrongly(capsys, *args):
    """The line that `evaluate.py ...`, with a mistake in it, ends with."""
    import evaluate
    return wrongly(capsys, evaluate.main, evaluate.parse_args, args, resumes=False)

def launched_wrongly(capsys, script, *args):
    """The line that the run of `script`, a module, ends with; it cannot go on."""
    return wrongly(capsys, script.train, script.parse_args, args, resumes=True)

@pytest.fixture(scope="session")
def real_data():
    folder = os.environ.get("SSL_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs real images: set SSL_DATA to their folder")
    return Path(folder)
