"""Ready for GPUs, shown without one on the pretended device of pretend.py; and the tests that need
a GPU, `pytest -m gpu`."""
import importlib, math

import numpy as np
import pytest
import torch

import common
import pretend
from conftest import METHODS, run, tiny

# Kernel launches of a step that does not log, in the recipe `small` with a ResNet-18, at most. They
# do not depend on the width, the size of the images or the batch, from 160 images on.
LAUNCHES = dict(simclr=700, byol=1300, simsiam=900, moco=1200, densecl=1250, swav=1200,
                deepcluster=1450, supcon=550, insdis=500, cmc=650, cpc_v2=1950, image_mixture=1800)

needs_pretend = pytest.mark.skipif(not pretend.available(),
                                   reason="this torch lets no Python module be a device")

@pytest.fixture
def data(monkeypatch):
    """Random images in place of any data set, in the memory of the device."""
    images = np.random.default_rng(0).integers(0, 256, (480, 3, 32, 32), dtype=np.uint8)
    made = {}

    def load_data(name, root, split, device):
        if device not in made:
            made[device] = common.Images(images, np.arange(480) % 10, device)
        return made[device]

    monkeypatch.setattr(common, "load_data", load_data)

class Enough(Exception):
    pass

def counted_step(script, flags, monkeypatch):
    """The launches and waits of the second step of a run on the pretended device."""
    with pretend.pretended() as counter:
        finish = common.Run.finish_step
        crops = common.Run.crops

        def start(run, step):
            counter.reset()
            return crops(run, step)

        def stop(run, *args, **entries):
            if run.step == 1:
                raise Enough
            finish(run, *args, **entries)

        monkeypatch.setattr(common.Run, "crops", start)
        monkeypatch.setattr(common.Run, "finish_step", stop)
        with pytest.raises(Enough):
            script.train(script.parse_args(flags), torch.device(pretend.NAME, 0))
        return counter.launches, dict(counter.waits)

@needs_pretend
@pytest.mark.parametrize("method", METHODS)
def test_a_step_waits_for_nothing_and_launches_little(method, data, tmp_path, monkeypatch):
    script = importlib.import_module(method)
    flags = ["--recipe", "small", "--arch", "resnet18x0.125", "--precision", "bf16",
             "--batch-size", "4" if method == "cpc_v2" else "160", "--output", str(tmp_path),
             "--knn-every", "0"]
    smaller = dict(hidden=64, dim=64, num_prototypes=64, small_size=4)
    for key in smaller.keys() & script.RECIPES["small"].keys():     # launches do not depend on it
        monkeypatch.setitem(script.RECIPES["small"], key, smaller[key])
    if method != "cpc_v2":
        flags += ["--size", "16" if method == "densecl" else "8"]
    if method == "cmc":
        flags += ["--arch", "resnet18x0.25"]
    if method in ("moco", "densecl", "image_mixture"):
        flags += ["--queue-size", "480"]
    launches, waits = counted_step(script, flags, monkeypatch)
    assert not waits
    assert launches <= LAUNCHES[method], launches

@needs_pretend
@pytest.mark.parametrize("method", METHODS)
def test_a_run_trains_stops_resumes_and_is_measured(method, data, tmp_path, monkeypatch):
    """No operation of it may have operands on two devices."""
    script = importlib.import_module(method)
    monkeypatch.setattr(common, "draw_curves", lambda *_: None)
    flags = [*tiny(method), "--batch-size", "120", "--epochs", "1", "--output", str(tmp_path)]
    if method in ("moco", "densecl", "image_mixture"):
        flags += ["--queue-size", "480"]
    args = script.parse_args(flags)
    device = torch.device(pretend.NAME, 0)
    finish = common.Run.finish_step

    def stopping(run, *parts, **entries):
        common.Stopped.asked = None
        finish(run, *parts, **entries)
        if run.step == 3:
            run._save()
            raise Enough

    with pretend.pretended():
        with monkeypatch.context() as patch, pytest.raises(Enough):
            patch.setattr(common.Run, "finish_step", stopping)
            script.train(args, device)
        script.train(args, device)
    log = common.read_log(tmp_path)
    assert log[-1]["step"] == 4 and 0 <= log[-1]["knn"] <= 100
    assert all(math.isfinite(line.get("loss", line.get("knn"))) for line in log)
    saved = common.read_checkpoint(tmp_path / "checkpoint.pt")
    assert all(v.device.type == "cpu" for v in saved["model"].values())

@needs_pretend
def test_operands_on_two_devices_are_refused():
    with pretend.pretended():
        x = torch.ones(3).to(torch.device(pretend.NAME, 0))
        with pytest.raises(RuntimeError, match="two devices"):
            x + torch.ones(3)
        norms = torch._foreach_norm([x, torch.tensor(1.0)])
        assert [norm.device.type for norm in norms] == [pretend.NAME, "cpu"]
        with pytest.raises(RuntimeError, match="two devices"):
            torch.stack(norms)
        assert (x + 1).sum().item() == 6

@needs_pretend
def test_waits_are_noticed():
    with pretend.pretended() as counter:
        x = torch.arange(4.0).to(torch.device(pretend.NAME, 0), non_blocking=True)
        assert not counter.waits
        x[x > 1]
        x.sum().item()
        x.cpu()
        torch.ones(2).to(x.device)
        assert sum(counter.waits.values()) == 4

@needs_pretend
def test_lars_launches_do_not_grow_with_the_network():
    launches = []
    with pretend.pretended() as counter:
        for arch in ("resnet18x0.125", "resnet101x0.125"):
            model = common.resnet(arch).to(torch.device(pretend.NAME, 0))
            for w in model.parameters():
                w.grad = torch.ones_like(w)
            optimizer = common.LARS(model.parameters(), 0.1, 0.9, 1e-6)
            optimizer.step()
            counter.reset()
            optimizer.step()
            # The trust ratios are multiplied in one by one: CUDA has no kernel for all of them.
            weights = sum(w.ndim > 1 for w in model.parameters())
            launches.append(counter.launches - weights)
    assert launches[0] == launches[1] < 30

@pytest.mark.parametrize("method", ["simclr", "simsiam", "byol", "swav", "deepcluster", "supcon"])
def test_synchronised_batch_norm_keeps_the_parameters(method, data, tmp_path, monkeypatch):
    """The conversion replaces modules, not their parameters, which the optimizer has already."""
    script = importlib.import_module(method)
    seen = []

    def noting(run, args, model, optimizer, *_, **__):
        seen.extend([model, optimizer])
        raise Enough

    monkeypatch.setattr(common.Run, "__init__", noting)
    with pytest.raises(Enough):
        script.train(script.parse_args(["--output", str(tmp_path)]), torch.device("cpu"))
    model, optimizer = seen
    before = {name: (id(w), w.requires_grad) for name, w in model.named_parameters()}
    learned = {id(w) for group in optimizer.param_groups for w in group["params"]}
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert {name: (id(w), w.requires_grad) for name, w in model.named_parameters()} == before
    assert {id(w) for w in model.parameters() if w.requires_grad} <= learned
    assert any(isinstance(m, torch.nn.SyncBatchNorm) for m in model.modules())

def test_compiling_synchronised_batch_norm_is_refused():
    norm = torch.nn.SyncBatchNorm(4)
    with pytest.raises(common.UserError, match="--compile: cannot compile SyncBatchNorm"):
        common.distribute(torch.nn.Sequential(norm), compiled=True)

@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_compile_makes_at_most_two_graphs(method, data, tmp_path, monkeypatch):
    script = importlib.import_module(method)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile(model, backend=backend))
    flags = [*tiny(method), "--batch-size", "120", "--epochs", "1", "--compile", "--knn-every", "0",
             "--output", str(tmp_path)]
    if method in ("moco", "densecl", "image_mixture"):
        flags += ["--queue-size", "480"]
    script.train(script.parse_args(flags), torch.device("cpu"))
    assert 1 <= len(graphs) <= 2

@pytest.mark.gpu
@pytest.mark.parametrize("extra", [[], ["--precision", "fp32"], ["--compile"]])
def test_training_on_a_gpu(tmp_path, extra):
    result = run("simclr.py", *tiny("simclr"), *extra, "--output", tmp_path)
    assert result.returncode == 0, result.stderr

@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_a_step_on_a_gpu_waits_for_nothing(method, data, tmp_path, monkeypatch):
    """By CUDA's own account: an operation that waits for the device is an error."""
    script = importlib.import_module(method)
    finish = common.Run.finish_step
    crops = common.Run.crops

    def start(run, step):
        torch.cuda.set_sync_debug_mode("error" if step == 1 else "default")
        return crops(run, step)

    def stop(run, *parts, **entries):
        if run.step == 1:
            torch.cuda.set_sync_debug_mode("default")
            raise Enough
        finish(run, *parts, **entries)

    monkeypatch.setattr(common.Run, "crops", start)
    monkeypatch.setattr(common.Run, "finish_step", stop)
    flags = [*tiny(method), "--batch-size", "120", "--output", str(tmp_path)]
    if method in ("moco", "densecl", "image_mixture"):
        flags += ["--queue-size", "480"]
    try:
        with pytest.raises(Enough):
            script.train(script.parse_args(flags), torch.device("cuda", 0))
    finally:
        torch.cuda.set_sync_debug_mode("default")

@pytest.mark.gpu
def test_evaluation_on_a_gpu(tmp_path):
    result = run("simclr.py", *tiny("simclr"), "--output", tmp_path)
    assert result.returncode == 0, result.stderr
    for task in ("knn", "linear --epochs 1 --lr 1e-4", "linear --protocol lbfgs",
                 "neighbours --count 50",
                 "finetune --labels 0.1 --epochs 1 --baseline supervised --baseline-epochs 1",
                 "detect --steps 2 --batch-size 2"):
        name, *flags = task.split()
        result = run("evaluate.py", name, tmp_path, *flags)
        assert result.returncode == 0, result.stderr

@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_all_gpus_of_the_machine_train(method, tmp_path):
    result = run(f"{method}.py", *tiny(method), "--output", tmp_path,
                 processes=torch.cuda.device_count())
    assert result.returncode == 0, result.stderr
