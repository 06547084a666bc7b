"""What the tests share: running a script as a person does, and the real images in $SSL_DATA."""
import json, os, random, signal, subprocess, sys, time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(2)


def pytest_configure(config):
    config.addinivalue_line("markers", "learning: trains long enough to learn something; runs after all others")
    config.addinivalue_line("markers", "slow: takes minutes and much memory; runs only when asked for by `-m slow`")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.get_closest_marker("learning") is not None)
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow and "slow" not in config.option.markexpr:
        items[:] = [item for item in items if item not in slow]
        config.hook.pytest_deselected(items=slow)


def command(script, *args, processes=1, torchrun=()):
    start = [sys.executable]
    if processes > 1 or torchrun:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *torchrun]
    return [*start, str(ROOT / script) if not os.path.isabs(str(script)) else str(script), *map(str, args)]


def environment(processes=1):
    return dict(os.environ, OMP_NUM_THREADS=str(max(1, 2 // processes)), PYTHONPATH=str(ROOT))


def run(script, *args, processes=1, cwd=None, timeout=180, **options):
    """Run a script to its end; returns the CompletedProcess with text output."""
    return subprocess.run(command(script, *args, processes=processes), cwd=cwd, env=environment(processes), capture_output=True, text=True,
                          timeout=timeout, **options)


def mistake(script, args):
    """The message of a user's mistake that `script`, a module, must notice before its first step, in this process."""
    import common
    with pytest.raises((common.UserError, SystemExit)) as e:
        script.train(script.parse_args(list(map(str, args))), torch.device("cpu"))
    return str(e.value)


def one_line(result):
    """The error line of a run that must have ended with one, and with status 2."""
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    return lines[0]


# A run of 30 steps that takes a second or two, for every method.
TINY = ["--arch", "resnet10x0.0625", "--size", "8", "--batch-size", "500", "--epochs", "3"]
BOOKS = ["--log-every", 4, "--knn-every", 2]
FRESH = {"images_per_second", "waiting"}                        # the log's entries that differ from run to run


def result_of(folder):
    """What a run must reproduce: all tensors of its checkpoint, and its log without the timings."""
    import common
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


def run_killed(folder, script, *args, processes=1, times=3):
    """Start the run, kill it without warning at a random moment, so many times over, and then let it finish."""
    args = [*args, "--output", folder, "--save-every", 3]
    moments, log, kills = random.Random(processes), folder / "log.jsonl", 0
    folder.mkdir(exist_ok=True)
    while kills < times:
        seen = len(log.read_text().splitlines()) if log.exists() else 0
        process = subprocess.Popen(command(script, *args, processes=processes), env=environment(processes), stderr=subprocess.DEVNULL,
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
    result = run(script, *args, processes=processes)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="session")
def real_data():
    folder = os.environ.get("SSL_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs real images: set SSL_DATA to their folder")
    return Path(folder)
