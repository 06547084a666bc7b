"""cmc.py: the colour spaces against their published formulas, who sees which channels, the losses
and banks of both directions, and the order of a step."""
import inspect
import math

import pytest
import torch
import torch.nn.functional as F

import cmc
import common
import insdis
from conftest import logged, mistake, tiny, train, watch
from test_insdis import drawn_rows, nce_by_loops, random_scores, softmax_by_loops

SMALL = [*tiny("cmc"), "--dim", "16", "--batch-size", "20", "--epochs", "1"]             # 5 steps
NCE = ["--loss", "nce", "--negatives", "30"]

# ------------------------------------------------------------------- colour spaces

def lab_by_formula(r, g, b):
    """IEC 61966-2-1 to linear light and XYZ, then CIE 15, with the white D65."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (r, g, b)]
    r, g, b = linear
    x = (0.412453 * r + 0.357580 * g + 0.180423 * b) / 0.95047
    y = 0.212671 * r + 0.715160 * g + 0.072169 * b
    z = (0.019334 * r + 0.119193 * g + 0.950227 * b) / 1.08883
    x, y, z = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z))
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)

def ycbcr_by_formula(r, g, b):
    """ITU-R BT.601: luma in 219 steps from 16, the differences from it in 224 steps around 128."""
    y = 0.299 * r + 0.587 * g + 0.114 * b
    return 16 + 219 * y, 128 + 112 * (b - y) / (1 - 0.114), 128 + 112 * (r - y) / (1 - 0.299)

REDS = (0.0, 0.02, 0.3, 1.0)
GREENS = (0.0, 0.04, 0.7, 1.0)
BLUES = (0.0, 0.05, 0.5, 1.0)
COLORS = [(r, g, b) for r in REDS for g in GREENS for b in BLUES]

@pytest.mark.parametrize("convert,formula,tolerance", [
    (cmc.rgb_to_lab, lab_by_formula, 1e-9), (cmc.rgb_to_ycbcr, ycbcr_by_formula, 2e-3)])
def test_colour_spaces_equal_their_formulas(convert, formula, tolerance):
    images = torch.tensor(COLORS, dtype=torch.float64).T.reshape(1, 3, 8, 8)
    expected = torch.tensor([formula(*color) for color in COLORS], dtype=torch.float64)
    expected = expected.T.reshape(1, 3, 8, 8)
    before = images.clone()
    assert (convert(images) - expected).abs().max() < tolerance
    assert torch.equal(images, before)
    single = convert(images.float())
    assert single.dtype == torch.float32 and (single - expected).abs().max() < 2e-3

# red, green, blue, white, black
KNOWN_LAB = [[53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86],
             [100, 0, 0], [0, 0, 0]]
KNOWN_YCBCR = [[81, 90, 240], [145, 54, 34], [41, 240, 110], [235, 128, 128], [16, 128, 128]]

@pytest.mark.parametrize("convert,known,tolerance", [
    (cmc.rgb_to_lab, KNOWN_LAB, 0.1), (cmc.rgb_to_ycbcr, KNOWN_YCBCR, 0.6)])
def test_known_colours(convert, known, tolerance):
    colors = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0]])
    found = convert(colors.T.reshape(1, 3, 1, 5))[0, :, 0].T
    assert (found - torch.tensor(known)).abs().max() < tolerance

# ------------------------------------------------------------------- losses

@pytest.mark.parametrize("name", ["instance_softmax", "nce"])
def test_losses_are_the_code_of_insdis(name):
    ours, theirs = (inspect.getsource(getattr(module, name)) for module in (cmc, insdis))
    assert ours.split('"""')[2] == theirs.split('"""')[2]       # all but the docstring

@pytest.mark.parametrize("n,m,temperature", [(1, 1, 1.0), (6, 20, 0.2)])
def test_losses_equal_their_equations(n, m, temperature):
    scores = random_scores(n, m).detach()
    expected, _ = softmax_by_loops(scores, temperature, [0] * n)
    loss = cmc.instance_softmax(scores, temperature, torch.zeros(n, dtype=torch.int64))
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    expected, _ = nce_by_loops(scores, 300.0, temperature, 100)
    loss = cmc.nce(scores, 300.0, temperature, 100, eps=0)
    assert loss.item() == pytest.approx(expected, rel=1e-12)

def test_loss_starts_where_the_docstring_says():
    """Each direction as InsDis with 16384 rows: 10.5, with NCE about 1 more."""
    torch.manual_seed(0)
    model = cmc.CMC("resnet10x0.125", 1.0, "small", "lab", 128, 20000)
    z = list(F.normalize(torch.randn(2, 32, 128), dim=2))
    scores = model.scores(z, torch.arange(32), 16384)
    model.estimate_normalizer(scores, 0.07)
    own = torch.zeros(32, dtype=torch.int64)
    softmax = sum(cmc.instance_softmax(s, 0.07, own).item() for s in scores)
    assert softmax == pytest.approx(21.0, abs=0.7)
    nce = sum(cmc.nce(s, Z, 0.07, 20000).item() for s, Z in zip(scores, model.normalizer))
    assert nce == pytest.approx(23.0, abs=0.7)

# ------------------------------------------------------------------- model and banks

def test_stem_keeps_the_width_of_the_architecture():
    """The official networks of half and of twice the width have stems of 64 channels."""
    for width, dim in ((0.5, 1024), (1, 2048), (2, 4096)):
        with torch.device("meta"):
            model = cmc.CMC("resnet50", width, "imagenet", "lab", 128, 10)
        assert model.encoder.dim == 2 * dim
        assert model.encoder.light.conv1.weight.shape == (64, 1, 7, 7)
        assert model.encoder.color.conv1.weight.shape == (64, 2, 7, 7)
    small = cmc.CMC("resnet10x0.25", 0.5, "small", "lab", 8, 10)
    assert small.encoder.dim == 128 and small.encoder.light.conv1.weight.shape[:2] == (16, 1)

def test_each_half_sees_its_channels_alone():
    torch.manual_seed(0)
    model = cmc.CMC("resnet10x0.25", 0.5, "small", "ycbcr", 8, 40).eval()
    x = torch.rand(6, 3, 16, 16)
    gray = torch.rand(6, 1, 16, 16)
    light, color = model(x)
    tint = torch.tensor([0.114, 0, -0.299])[:, None, None]      # 0.299 r + 0.114 b stays
    other_light, other_color = model(x + 0.1 * tint)
    assert torch.allclose(other_light, light, atol=1e-4)
    assert not torch.allclose(other_color, color, atol=1e-3)
    assert not torch.allclose(model(0.5 * x + 0.5 * gray)[0], light, atol=1e-3)
    _, of_gray = model(gray.expand(6, 3, 16, 16))
    _, of_one_gray = model(torch.full_like(x, 0.3))
    assert (of_gray - of_one_gray).abs().max() < 1e-3

def test_lab_is_scaled_to_one():
    """The official middles and half ranges are those of all colours that sRGB has."""
    _, mean, std = cmc.VIEWS["lab"]
    steps = torch.linspace(0, 1, 33)
    colors = torch.cartesian_prod(steps, steps, steps).T.reshape(1, 3, 33, 33 * 33)
    channels = cmc.rgb_to_lab(colors)[0].flatten(1)                         # (3, colours)
    scaled = (channels - torch.tensor(mean)[:, None]) / torch.tensor(std)[:, None]
    assert (scaled.amin(1) + 1).abs().max() < 0.01 and (scaled.amax(1) - 1).abs().max() < 0.01

@pytest.mark.parametrize("view", ["lab", "ycbcr"])
def test_channels_are_scaled_as_the_official_code_scales_them(view):
    convert, mean, std = cmc.VIEWS[view]
    encoder = cmc.Halves("resnet10x0.125", "small", view, 8)
    seen = []
    encoder.light.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encoder.color.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.rand(2, 3, 8, 8)
    before = x.clone()
    h = encoder(x)
    channels = convert(x)
    expected = torch.stack([(channels[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    assert torch.allclose(seen[0], expected[:, :1]) and torch.allclose(seen[1], expected[:, 1:])
    assert expected.abs().max() < 1.3 and h.shape == (2, encoder.dim) and torch.equal(x, before)
    maps = encoder.maps(x)
    assert torch.allclose(maps.mean((2, 3)), h, atol=1e-6)

def test_colours_are_converted_in_float32_under_autocast():
    encoder = cmc.Halves("resnet10x0.125", "small", "lab", 8).eval()
    seen = []
    encoder.light.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.rand(2, 3, 8, 8)
    encoder(x)
    with torch.autocast("cpu", torch.bfloat16):
        encoder(x)
    assert seen[1].dtype == torch.float32 and torch.equal(*seen)

def test_each_half_is_scored_against_the_other_halfs_bank():
    torch.manual_seed(0)
    model = cmc.CMC("resnet10x0.125", 1.0, "small", "lab", 8, 40)
    light, color = z = list(F.normalize(torch.randn(2, 6, 8), dim=2))
    light_bank, color_bank = model.memory
    indices = 5 * torch.arange(6)
    to_color, to_light = model.scores(z, indices, 30)
    all_color, all_light = model.scores(z, indices, 0)
    assert torch.allclose(all_color, light @ color_bank.T)
    assert torch.allclose(all_light, color @ light_bank.T)
    assert torch.allclose(to_color[:, 0], (light * color_bank[indices]).sum(1), atol=1e-6)
    assert torch.allclose(to_light[:, 0], (color * light_bank[indices]).sum(1), atol=1e-6)
    drawn = drawn_rows(to_color[:, 1:], all_color)
    assert torch.equal(drawn, drawn_rows(to_light[:, 1:], all_light))       # the same images
    assert len(drawn.unique()) == 40

def test_each_bank_moves_towards_its_own_half():
    torch.manual_seed(0)
    model = cmc.CMC("resnet10x0.125", 1.0, "small", "lab", 8, 40)
    z = list(F.normalize(torch.randn(2, 6, 8), dim=2))
    indices = 5 * torch.arange(6)
    before = model.memory.clone()
    expected = before.clone()
    for half in range(2):
        for i, row in enumerate(indices):
            moved = 0.5 * before[half, row] + 0.5 * z[half][i]
            expected[half, row] = moved / moved.norm()
    model.remember(z, indices, 0.5)
    assert torch.allclose(model.memory, expected, atol=1e-6)

def test_normalizer_of_each_direction():
    model = cmc.CMC("resnet10x0.125", 1.0, "small", "lab", 8, 50)
    scores = [2 * torch.rand(6, 21) - 1, torch.rand(6, 21)]
    model.estimate_normalizer(scores, 0.2)
    for Z, s in zip(model.normalizer.tolist(), scores):
        total = sum(math.exp(score / 0.2) for row in s.tolist() for score in row)
        assert Z == pytest.approx(50 * total / (6 * 21), rel=1e-5)

def test_normalizer_is_the_mean_over_the_processes(monkeypatch):
    model = cmc.CMC("resnet10x0.125", 1.0, "small", "lab", 8, 50)
    others = torch.tensor([[8.0, 3.0]])
    monkeypatch.setattr(common, "gather", lambda mine: torch.cat([mine, others]))
    model.estimate_normalizer([torch.zeros(6, 21)] * 2, 0.2)    # both of whose means are 1
    assert model.normalizer.tolist() == pytest.approx([50 * 4.5, 50 * 2])

# ------------------------------------------------------------------- training

def test_order_of_a_step_and_the_normalizer_of_the_first_batch(few_images, tmp_path, monkeypatch):
    """The banks are scored before they are updated; Z is that of the first batch to the end."""
    calls = watch(monkeypatch, (cmc.CMC, "scores"), (cmc.CMC, "estimate_normalizer"), (cmc, "nce"),
                  (torch.optim.AdamW, "step"), (cmc.CMC, "remember"), (common.Run, "finish_step"))
    train(cmc, *SMALL, *NCE, "--view", "lab", "--output", tmp_path)
    step = ["scores", "nce", "nce", "step", "remember", "finish_step"]
    assert [name for name, _, _ in calls] == ["scores", "estimate_normalizer", *step[1:]] + step * 4
    _, scored, scores = calls[0]
    saved = torch.load(tmp_path / "checkpoint.pt")
    expected = [100 * (s / 0.1).exp().mean().item() for s in scores]
    assert saved["model"]["normalizer"].tolist() == pytest.approx(expected, rel=1e-5)
    one, other = calls[2], calls[3]
    assert one[1][0] is scores[0] and other[1][0] is scores[1] and one[1][3] == 100
    assert calls[5][1][1] is scored[1] and calls[5][1][2] is scored[2]
    loss = one[2].item() + other[2].item()
    assert calls[6][1][1].item() == pytest.approx(loss, rel=1e-6)       # summed, not averaged

def test_checkpoint_rebuilds_the_encoder(few_images, tmp_path, monkeypatch):
    calls = watch(monkeypatch, (cmc.CMC, "remember"))
    train(cmc, *SMALL, "--view", "lab", "--output", tmp_path)
    saved = common.read_checkpoint(tmp_path / "checkpoint.pt")
    encoder = cmc.Halves(**saved["encoder_config"])
    encoder.load_state_dict(saved["encoder"])
    trained = calls[0][1][0].encoder
    x = torch.rand(2, 3, 8, 8)
    assert encoder.view == "lab"
    assert torch.allclose(encoder.eval()(x), trained.eval()(x), atol=1e-5)
    assert saved["input"]["mean"] == [0, 0, 0] and saved["input"]["std"] == [1, 1, 1]

def test_whole_banks_are_scored_with_the_own_row_as_the_class(few_images, tmp_path, monkeypatch):
    calls = watch(monkeypatch, (cmc.CMC, "scores"), (cmc, "instance_softmax"))
    train(cmc, *SMALL, "--negatives", 0, "--output", tmp_path)
    (_, (_, _, indices, _), scores), one, other = calls[:3]
    assert scores[0].shape == (20, 100)
    assert one[1][0] is scores[0] and other[1][0] is scores[1]
    assert torch.equal(one[1][2], indices) and torch.equal(other[1][2], indices)

def test_rate_falls_in_steps(few_images, tmp_path):
    steps = [cmc.learning_rate(step, 0, 12, "steps") for step in range(12)]
    assert steps == pytest.approx([1] * 6 + [0.1] * 2 + [0.01] * 2 + [0.001] * 2)
    assert cmc.learning_rate(1, 2, 12, "steps") == 0.5
    train(cmc, *SMALL, "--schedule", "steps", "--warmup-epochs", 0, "--lr", 0.01,
          "--batch-size", 16, "--log-every", 1, "--output", tmp_path)
    rates = [0.01 * 16 / 256 * fall for fall in [1, 1, 1, 0.1, 0.01, 0.001]]
    assert logged(tmp_path, "lr") == pytest.approx(rates)

@pytest.mark.parametrize("flags,message", [
    (["--loss", "nce"], "--negatives 0: the whole bank is for --loss softmax"),
    (["--view", "rgb"], "--view"),
    (["--width", "0"], "--width"),
    (["--width", "1e-9"], "--width: '1e-9' is not in 0.01..100"),
    (["--width", "1000000"], "--width: '1000000' is not in 0.01..100")])
def test_mistakes(tmp_path, flags, message):
    assert message in mistake(cmc, *flags, "--output", tmp_path)
