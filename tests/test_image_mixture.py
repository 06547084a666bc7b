"""image_mixture.py: what the mixtures do to pixels, the loss of Un-Mix, and the order of a step.
Without a mixture it is moco.py, bit for bit."""
import inspect

import pytest
import torch

import common
import image_mixture
import moco
from conftest import mistake, tiny, train, watch

SMALL = [*tiny("image_mixture"), "--batch-size", "20", "--queue-size", "60", "--epochs", "1"]

# ------------------------------------------------------------------- what is moco.py's

@pytest.mark.parametrize("name", ["shuffle", "unshuffle", "SplitBatchNorm2d", "split_batch_norm",
                                  "info_nce"])
def test_what_is_mocos_is_mocos(name):
    ours, theirs = (inspect.getsource(getattr(module, name)) for module in (image_mixture, moco))
    assert ours == theirs

@pytest.mark.parametrize("recipe", ["shapes", "small", "imagenet"])
def test_recipes_are_mocos(recipe):
    ours = image_mixture.RECIPES[recipe]
    theirs = moco.RECIPES[recipe]
    own = {"mixture", "mix_alpha", "mix_count", "mix_probability", "unmix_global"}
    assert ours.keys() - theirs.keys() == own and theirs.keys() - ours.keys() == {"version"}
    assert all(ours[key] == theirs[key] for key in ours.keys() - own)

def test_run_without_a_mixture_is_mocos(few_images, tmp_path):
    train(moco, *SMALL, "--output", tmp_path / "moco")
    train(image_mixture, *SMALL, "--mixture", "none", "--output", tmp_path / "none")
    ours, theirs = (torch.load(tmp_path / name / "checkpoint.pt")["model"]
                    for name in ("none", "moco"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())

# ------------------------------------------------------------------- mixtures of 2020

def mixture_by_loops(views, kind, alpha, count, probability):
    """The form of 2020, one image and one pixel at a time, with the same random numbers."""
    for level in ("global", "region") if kind == "both" else (kind,):
        originals = [view.clone() for view in views]
        for _ in range(count):
            coins = torch.rand(len(views[0])) < probability
            chosen = coins.nonzero()[:, 0].tolist()
            distance = torch.randint(1, len(views[0]), (len(chosen),)).tolist()
            shares = torch.distributions.Beta(alpha, alpha).sample((len(chosen),)).tolist()
            centres = torch.rand(len(chosen), 2).tolist()
            for i, d, share, centre in zip(chosen, distance, shares, centres):
                for view, original in zip(views, originals):
                    other = original[(i + d) % len(view)]       # without what is mixed into it
                    if level == "global":
                        view[i] = share * view[i] + (1 - share) * other
                    else:
                        paste_square(view[i], other, 1 - share, *centre)

def paste_square(image, other, area, y, x):
    size = image.shape[1]
    for row in range(size):
        for column in range(size):
            near = max(abs((row + 0.5) / size - y), abs((column + 0.5) / size - x))
            if near < area ** 0.5 / 2:
                image[:, row, column] = other[:, row, column]

@pytest.mark.parametrize("kind", ["global", "region", "both"])
def test_mixture_equals_a_slow_one(kind):
    torch.manual_seed(0)
    views = [torch.rand(10, 3, 8, 8), torch.rand(10, 3, 6, 6)]
    expected = [view.clone() for view in views]
    for mix, images in ((image_mixture.mixture, views), (mixture_by_loops, expected)):
        common.seed_all(7)
        mix(images, kind, 2.0, 3, 0.6)
    for a, b in zip(views, expected):
        assert torch.allclose(a, b, atol=1e-6)

def mixed_views(kind, n=400, alpha=1.0, count=2, probability=0.1):
    """Two views, of 16 and of 8 pixels, of n flat images: image i has the value i in the one and
    i + n in the other. They are mixed, and what was added to the second is taken off again."""
    common.seed_all(3)
    values = torch.arange(n).float()[:, None, None, None]
    views = [values.expand(n, 3, 16, 16).clone(), values.expand(n, 3, 8, 8) + n]
    image_mixture.mixture(views, kind, alpha, count, probability)
    return views[0], views[1] - n

def test_blends_have_the_same_other_image_and_share_in_both_views():
    x1, x2 = mixed_views("global", alpha=2.0, count=1, probability=0.3)
    assert torch.equal(x1, x1[:, :1, :1, :1].expand_as(x1))             # flat images stay flat
    assert torch.allclose(x1[:, 0, 0, 0], x2[:, 0, 0, 0], atol=1e-3)
    moved = x1[:, 0, 0, 0] - torch.arange(400)
    assert 90 <= (moved != 0).sum() <= 150          # 120 expected, standard deviation 9
    assert moved.abs().max() < 400                  # between two values that are there

def test_share_is_of_the_beta_distribution():
    """With two images, 0 and 1, the value of the first after one blend is the other's share."""
    for alpha, variance in ((1.0, 1 / 12), (3.0, 1 / 28)):
        common.seed_all(0)
        shares = []
        for _ in range(1000):
            views = [torch.tensor([0.0, 1.0])[:, None, None, None]]
            image_mixture.mixture(views, "global", alpha, 1, 1.0)
            shares.append(views[0][0].item())
        shares = torch.tensor(shares)
        assert shares.mean().item() == pytest.approx(0.5, abs=0.05)
        assert shares.var().item() == pytest.approx(variance, rel=0.15)

def test_probability_of_each_of_two_mixtures():
    moved = mixed_views("global")[0][:, 0, 0, 0] != torch.arange(400)
    assert moved.sum().item() == pytest.approx(400 * (1 - 0.9 ** 2), abs=30)
    x1, _ = mixed_views("both", probability=0.0)
    assert torch.equal(x1[:, 0, 0, 0], torch.arange(400.0))

def test_squares_show_one_other_image_at_the_same_place_in_both_views():
    index = torch.arange(400.0)[:, None, None]
    areas = []
    for x in mixed_views("region", count=1, probability=1.0):
        inside = x[:, 0] != index
        rows = inside.any(2)
        columns = inside.any(1)
        assert torch.equal(inside, rows[:, :, None] & columns[:, None])     # a rectangle
        assert all(len(image[mask].unique()) <= 1 for image, mask in zip(x[:, 0], inside))
        areas.append(inside.float().mean((1, 2)))
    assert (areas[0] - areas[1]).abs().mean() < 0.06        # the same square, coarser
    # A side s has s^2 uniform, and the border clips it to an area of s^2 (1 - s / 4)^2 in the mean:
    # 1/2 - 2/5 * 1/2 + 1/16 * 1/3 = 0.321.
    assert areas[0].mean().item() == pytest.approx(0.321, abs=0.04)

def test_second_square_does_not_undo_the_first():
    index = torch.arange(400.0)[:, None, None]
    covered = []
    for count in (1, 2):
        x1, _ = mixed_views("region", count=count, probability=1.0)
        covered.append((x1[:, 0] != index).float().mean().item())
    assert covered[1] > 1.3 * covered[0]

def test_both_are_blends_with_squares_in_them():
    both = mixed_views("both", count=1, probability=1.0)[0][:, 0]
    blends = mixed_views("global", count=1, probability=1.0)[0][:, 0]
    assert torch.equal(blends, blends[:, :1, :1].expand_as(blends))
    flat = both.amin((1, 2)) == both.amax((1, 2))
    assert flat.float().mean() < 0.2
    assert all(len(image.unique()) <= 2 for image in both)      # a blend, and the square in it

def test_mixture_is_a_function_of_the_seed():
    for a, b in zip(mixed_views("both"), mixed_views("both")):
        assert torch.equal(a, b)
    alone = [torch.ones(1, 3, 4, 4)]
    image_mixture.mixture(alone, "both", 1.0, 2, 1.0)       # with nobody else: itself
    assert torch.allclose(alone[0], torch.ones(1))

# ------------------------------------------------------------------- Un-Mix

@pytest.mark.parametrize("n", [6, 5])
def test_blend_has_its_share_of_each_image(n):
    x = torch.randn(n, 3, 16, 16)
    for seed in range(5):
        common.seed_all(seed)
        mixed, share = image_mixture.unmix(x, 1.0, 1.0)
        assert 0 <= share <= 1
        assert torch.allclose(mixed, share * x + (1 - share) * x.flip(0), atol=1e-6)

@pytest.mark.parametrize("n", [6, 5])
def test_square_leaves_its_share_of_each_image(n):
    x = torch.randn(n, 3, 16, 16)
    other = x.flip(0)
    for seed in range(5):
        common.seed_all(seed)
        mixed, share = image_mixture.unmix(x, 0.0, 1.0)
        assert ((mixed == x) | (mixed == other)).all()
        assert (mixed[0] == x[0]).float().mean().item() == pytest.approx(share, abs=1e-6)

def test_blends_and_squares_are_drawn_for_the_batch():
    common.seed_all(0)
    x = torch.randn(6, 3, 16, 16)
    blends = 0
    for _ in range(100):
        mixed, share = image_mixture.unmix(x, 0.5, 1.0)
        blends += torch.equal(mixed, x.flip(0).lerp(x, share))
    assert 30 <= blends <= 70

# ------------------------------------------------------------------- training

def test_unmix_weighs_two_positives_by_their_shares(few_images, tmp_path, monkeypatch):
    losses = []
    info_nce = image_mixture.info_nce

    def scoring(q, k, queue, temperature):
        losses.append((q, k, info_nce(q, k, queue, temperature)))
        return losses[-1][2]

    monkeypatch.setattr(image_mixture, "info_nce", scoring)
    calls = watch(monkeypatch, (image_mixture.MoCo, "update_key_encoder"),
                  (image_mixture.MoCo, "forward"), (image_mixture, "unmix"),
                  (image_mixture.MoCo, "enqueue"), (common.Run, "finish_step"))
    train(image_mixture, *SMALL, "--mixture", "unmix", "--output", tmp_path)
    names = ["update_key_encoder", "forward", "unmix", "forward", "enqueue", "finish_step"]
    assert [name for name, _, _ in calls] == names * 5 and len(losses) == 15
    _, pair, (_, (x1, *_), (mixed, share)), again, enqueue, finish = calls[:6]
    q, k, keys = pair[2]
    q_mixed = again[2]
    assert x1 is pair[1][1] and again[1][1] is mixed        # one more forward pass, of the mixture
    assert enqueue[1][1] is keys                            # which never enters the queue
    (q_1, k_1, plain), (q_2, k_2, own), (q_3, k_3, reverse) = losses[:3]
    assert q_1 is q and q_2 is q_mixed and torch.equal(q_3, q_mixed.flip(0))
    assert k_1 is k and k_2 is k and k_3 is k
    expected = plain.item() + share * own.item() + (1 - share) * reverse.item()
    assert finish[1][1].item() == pytest.approx(expected, rel=1e-6)
    assert len(finish[1][4]) == 3                           # views.png shows the mixture

@pytest.mark.parametrize("kind", ["global", "region", "both"])
def test_mixture_of_2020_changes_pixels_alone(few_images, tmp_path, monkeypatch, kind):
    calls = watch(monkeypatch, (image_mixture, "mixture"), (image_mixture.MoCo, "forward"),
                  (image_mixture, "info_nce"), (common.Run, "finish_step"))
    train(image_mixture, *SMALL, "--mixture", kind, "--mix-probability", 1, "--output", tmp_path)
    names = ["mixture", "forward", "info_nce", "finish_step"]
    assert [name for name, _, _ in calls] == names * 5
    (_, (views, asked, *_), _), (_, (_, x1, x2, _), _), (_, _, loss), (_, finish, _) = calls[:4]
    assert asked == kind and views[0] is x1 and views[1] is x2 and finish[1] is loss

@pytest.mark.parametrize("flags,message", [
    (["--queue-size", "1000"], "--queue-size 1000: not a multiple of --batch-size"),
    (["--bn-splits", "7"], "--bn-splits 7: does not cut the 64 images"),
    (["--mixture", "cutmix"], "--mixture"),
    (["--mix-alpha", "0"], "--mix-alpha"),
    (["--mix-probability", "1.5"], "--mix-probability"),
    (["--unmix-global", "-1"], "--unmix-global")])
def test_mistakes(tmp_path, flags, message):
    assert message in mistake(image_mixture, *flags, "--output", tmp_path)
