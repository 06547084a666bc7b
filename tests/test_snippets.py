"""What the README calls copyable: each loss runs alone, and the change that makes Barlow Twins of
simclr.py applies, runs and learns."""
import ast, importlib, inspect, math, re, subprocess, sys

import pytest
import torch
import torch.nn.functional as F

from conftest import METHODS, ROOT, environment, tiny

def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)

SNIPPETS = {
    "simclr.nt_xent": lambda f: f(torch.randn(6, 8), torch.randn(6, 8), 0.5),
    "moco.info_nce": lambda f: f(unit(6, 8), unit(6, 8), unit(12, 8), 0.2),
    "byol.regression_loss": lambda f: f(torch.randn(6, 8), torch.randn(6, 8)),
    "simsiam.negative_cosine": lambda f: f(torch.randn(6, 8), torch.randn(6, 8)),
    "swav.sinkhorn": lambda f: f(torch.randn(6, 8), 0.05, 3).sum(),
    "swav.swapped_prediction": lambda f: f([torch.randn(6, 8)] * 3, [torch.rand(6, 8)] * 2, 0.1),
    "cpc_v2.extract_patches": lambda f: f(torch.rand(2, 3, 32, 32), 16, 8).mean(),
    "cpc_v2.cpc_loss": lambda f: f(torch.randn(2, 3, 4, 8), torch.randn(2, 4, 4, 8), 1),
    "insdis.instance_softmax": lambda f: f(torch.randn(6, 9), 0.1, torch.zeros(6).long()),
    "insdis.nce": lambda f: f(torch.rand(6, 9), 100.0, 0.1, 5000),
    "cmc.instance_softmax": lambda f: f(torch.randn(6, 9), 0.1, torch.zeros(6).long()),
    "cmc.nce": lambda f: f(torch.rand(6, 9), 100.0, 0.1, 5000),
    "deepcluster.cluster_prediction": lambda f: f(unit(3, 6, 8), unit(2, 5, 8),
                                                  torch.zeros(2, 6).long(), 0.1),
    "densecl.match": lambda f: f(torch.randn(2, 4, 8), torch.randn(2, 4, 8)).float().mean(),
    "densecl.info_nce": lambda f: f(unit(6, 8), unit(6, 8), unit(12, 8), 0.2),
    "supcon.supervised_contrastive": lambda f: f(torch.randn(6, 8), torch.randn(6, 8),
                                                 torch.arange(6) % 2, 0.1, 0.1),
    "image_mixture.info_nce": lambda f: f(unit(6, 8), unit(6, 8), unit(12, 8), 0.2),
}

@pytest.mark.parametrize("name", SNIPPETS)
def test_a_pasted_function_runs_alone(name):
    script, function = name.split(".")
    source = inspect.getsource(getattr(importlib.import_module(script), function))
    pasted = {}
    exec("import math, torch\nimport torch.nn.functional as F\n" + source, pasted)
    assert SNIPPETS[name](pasted[function]).isfinite()

def test_every_method_has_a_snippet():
    assert {name.split(".")[0] for name in SNIPPETS} == set(METHODS)

@pytest.mark.parametrize("method", METHODS)
def test_the_learning_rate_is_a_function_of_the_step(method):
    function = importlib.import_module(method).learning_rate
    parameters = list(inspect.signature(function).parameters)
    assert parameters[:3] == ["step", "warmup", "total"]
    rest = dict(version=2, schedule="cosine")
    extra = [rest[name] for name in parameters[3:]]
    rates = [function(step, 10, 100, *extra) for step in range(100)]
    assert max(rates) == 1 and rates[0] < rates[5] < 1 and min(rates) >= 0

def readme_diff():
    return re.search(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]

def patched(source, diff):
    """`source` with a unified diff applied; each hunk's old lines stand in it once."""
    for hunk in re.split(r"^@@.*\n", diff, flags=re.M):
        lines = hunk.splitlines()
        old = "\n".join(line[1:] for line in lines if line[:1] in (" ", "-"))
        new = "\n".join(line[1:] for line in lines if line[:1] in (" ", "+"))
        assert not old or source.count(old) == 1, old
        source = source.replace(old, new) if old else source
    return source

def barlow(folder):
    """barlow.py in `folder`, beside copies of what it imports."""
    for name in ("common.py", "shapes.py"):
        (folder / name).write_text((ROOT / name).read_text())
    script = folder / "barlow.py"
    script.write_text(patched((ROOT / "simclr.py").read_text(), readme_diff()))
    return script

def test_barlow_twins_of_simclr(tmp_path):
    script = barlow(tmp_path)
    tree = ast.parse(script.read_text())
    function = next(f for f in tree.body if getattr(f, "name", "") == "barlow_twins")
    pasted = {"torch": torch, "F": F}
    exec(ast.unparse(function), pasted)
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, 20, 5, dtype=torch.float64)
    normal = [(z - z.mean(0)) / z.std(0, correction=0) for z in (z1, z2)]
    expected = 0
    for i in range(5):
        for j in range(5):
            c = (normal[0][:, i] * normal[1][:, j]).mean()
            expected += (1 - c) ** 2 if i == j else 0.005 * c ** 2
    assert math.isclose(pasted["barlow_twins"](z1, z2), expected, rel_tol=1e-3)     # BN's epsilon
    result = subprocess.run([sys.executable, script, *tiny("simclr"), "--output", tmp_path / "run"],
                            env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stderr.startswith("barlow on shapes") and "this run is finished" in result.stderr
