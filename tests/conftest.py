"""What the tests share: running a script as a person does, and the real images in $SSL_DATA."""
import os, subprocess, sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(2)


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


def one_line(result):
    """The error line of a run that must have ended with one, and with status 2."""
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    return lines[0]


@pytest.fixture(scope="session")
def real_data():
    folder = os.environ.get("SSL_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs real images: set SSL_DATA to their folder")
    return Path(folder)
