"""evaluate.py on the pretended GPU of pretend.py: nothing is on two devices, and no training step
waits for the device."""
import numpy as np
import pytest
import torch

import classifiers
import common
import cpc_v2
import detection
import evaluate
import pretend
import simclr
from test_evaluate import untrained

pytestmark = pytest.mark.skipif(not pretend.available(),
                                reason="this torch lets no Python module be a device")

@pytest.fixture
def data(monkeypatch):
    """Random images in place of any data set, in the memory of the device."""
    images = np.random.default_rng(0).integers(0, 256, (300, 3, 32, 32), dtype=np.uint8)

    def load_data(name, root, split, device):
        return common.Images(images, np.arange(300) % 10, device, common.CLASSES)

    drawn = detection.drawn_scenes
    monkeypatch.setattr(common, "load_data", load_data)
    monkeypatch.setattr(detection, "drawn_scenes", lambda count, seed: drawn(4, seed))

def run_task(folder, method, task, *flags):
    untrained(method, folder)
    args = evaluate.parse_args([task, str(folder), "--workers", "0", *flags])
    assert args.precision == "bf16"
    evaluate.main(args, torch.device(pretend.NAME, 0))

@pytest.mark.parametrize("args", [
    ["knn", "--sweep"], ["knn", "--baseline", "pixels"],
    ["linear", "--protocol", "lbfgs"], ["linear", "--epochs", "1", "--no-augment", "--sweep"],
    ["linear", "--epochs", "1", "--baseline", "pixels"],
    pytest.param(["neighbours", "--count", "20"], marks=pytest.mark.slow),
    ["detect", "--steps", "1", "--batch-size", "2", "--rois", "8"]])
def test_a_task_runs(args, data, tmp_path, capsys):
    with pretend.pretended():
        run_task(tmp_path, simclr, *args)
    assert capsys.readouterr().out.splitlines()[-1].startswith('{"task": ')

@pytest.mark.parametrize("method,args", [
    (simclr, ["linear", "--epochs", "3"]),
    (simclr, ["linear", "--epochs", "3", "--protocol", "simsiam"]),
    (simclr, ["finetune", "--labels", "0.4", "--epochs", "1"]),
    (cpc_v2, ["linear", "--epochs", "3", "--protocol", "cpc"]),
    pytest.param(cpc_v2, ["finetune", "--labels", "0.8", "--epochs", "1", "--protocol", "cpc"],
                 marks=pytest.mark.slow)])
def test_a_training_step_waits_for_nothing(method, args, data, tmp_path, monkeypatch):
    """Here the second: constants are copied in the first one, and the last one prints."""
    steps = classifiers.training_steps
    waits = []

    def counting(*arguments):
        counter.reset()
        for item in steps(*arguments):
            waits.append(dict(counter.waits))       # of the step before
            counter.reset()
            yield item

    monkeypatch.setattr(classifiers, "training_steps", counting)
    monkeypatch.setattr(classifiers.time, "perf_counter", lambda: 0.0)       # no time to print
    with pretend.pretended() as counter:
        run_task(tmp_path, method, *args)
    assert len(waits) > 2 and not waits[2]
