"""The embedded data set: ten classes of textured silhouettes, drawn by numpy from a seed.

A class is a silhouette that carries its own texture. What varies besides is what augmentation
removes: one pale tint an image, contrast, place, size, tilt and grey noise. What two views of an
image share is thus the class, and little else.

Geometry is float64 with + - * / and sqrt alone, which every CPU rounds alike: labels and boxes are
the same on every machine, pixels within 1 (of 255).
"""
import numpy as np

CLASSES = "disc square triangle star plus ring crescent heart bar bowtie".split()

def silhouette(name, u, v):
    """Which points (u, v) of the plane belong to the class: booleans. v points down, and the
    silhouette lies in the unit disc or little outside of it."""
    r2 = u * u + v * v
    au = abs(u)
    av = abs(v)
    if name == "disc":
        return r2 < 0.64
    if name == "square":
        return np.maximum(au, av) < 0.7
    if name == "triangle":
        return np.maximum(v, au * 0.8660254037844386 - v * 0.5) < 0.46
    if name == "star":
        r = np.sqrt(r2)
        c = v / np.maximum(r, 1e-9)
        cos_5 = ((16 * c * c - 20) * c * c + 5) * c     # cosine of five times the angle
        return r < 0.6 - 0.33 * cos_5
    if name == "plus":
        return (np.minimum(au, av) < 0.25) & (np.maximum(au, av) < 0.9)
    if name == "ring":
        return (r2 > 0.25) & (r2 < 0.8464)
    if name == "crescent":
        return (r2 < 0.8464) & ((u - 0.45) * (u - 0.45) + v * v > 0.5184)
    if name == "heart":
        a = 1.3 * r2 - 0.6
        return a * a * a + 2.2 * u * u * v * v * v < 0
    if name == "bar":
        return (au < 0.95) & (av < 0.28)
    return (au > av) & (au < 0.85)                      # bowtie

def texture(name, u, v):
    """The pattern inside the silhouette of the class, in -1..1."""
    if name == "disc":
        return np.ones_like(u)
    if name == "square":
        return np.sin(16 * v)
    if name == "triangle":
        return np.sin(16 * u)
    if name == "star":
        return np.sin(8 * (u + v))
    if name == "plus":
        return (1.6 * np.cos(9 * u) * np.cos(9 * v)).clip(-1, 1)
    if name == "ring":
        return np.sin(17 * np.sqrt(u * u + v * v))
    if name == "crescent":
        return np.sin(8 * np.arctan2(v, u))
    if name == "heart":
        return (np.cos(11 * u) + np.cos(11 * v)).clip(-1, 1)
    if name == "bar":
        return np.sin(7 * u)
    return np.maximum(np.cos(12 * u), np.cos(12 * v))   # bowtie

def draw_shapes(count, seed, size=32, cells=1):
    """Draw `count` images of one object each, or scenes of 1 to cells * cells objects.

    Returns images (count, 3, size, size) uint8, labels (count, cells * cells) int64, -1 where a
    cell is empty, and boxes (count, cells * cells, 4) int64: x0, y0, x1, y1 in pixels, the ends
    excluded. Raises ValueError if `size` is not a multiple of `cells`.
    """
    if size % cells:
        raise ValueError(f"size {size} is not a multiple of cells {cells}")
    labels, pattern, boxes = _draw_objects(count, seed, size, cells)
    return _color(pattern, seed), labels, boxes

def _draw_objects(count, seed, size, cells):
    """The labels, the objects in 0..1 on a background of 0 (count, size, size), and the boxes."""
    places = cells * cells
    s = size // cells                                   # each object lives in a cell of s x s
    n = count * places
    generator = np.random.default_rng([seed, 0])
    labels = generator.permutation(np.arange(n) % len(CLASSES))
    u = generator.random((7, n))
    half = 0.5 + 0.45 * u[0]                            # half of the object's side, in half cells
    x = (2 * u[1] - 1) * (1 - half)
    y = (2 * u[2] - 1) * (1 - half)
    t = 0.1 * (2 * u[3] - 1)                            # tangent of half the tilt: the sine and
    cos = (1 - t * t) / (1 + t * t)                     # cosine without sin and cos
    sin = 2 * t / (1 + t * t)
    always = (u[5].reshape(count, places)[:, 0] * places).astype(int)       # a cell that is used
    present = (u[4] < 0.6) | (np.arange(n) % places == always.repeat(places))

    pixel = (np.arange(2 * s) + 0.5) / s - 1            # twice the resolution, averaged below
    mask = np.zeros((n, s, s), np.float32)
    pattern = np.zeros((n, s, s), np.float32)
    for k, name in enumerate(CLASSES):
        of_class = np.flatnonzero((labels == k) & present)
        for i in np.array_split(of_class, max(1, n // 80)):
            a, b, c, r, px, py = (v[i, None, None] for v in (cos, sin, -sin, half, x, y))
            du = (pixel[None, None, :] - px) / r
            dv = (pixel[None, :, None] - py) / r
            pu = a * du + b * dv
            pv = a * dv + c * du
            inside = silhouette(name, pu, pv)
            mask[i] = _halve(inside)
            pattern[i] = _halve(inside * (0.5 + 0.5 * texture(name, pu, pv)))

    hit = mask > 0.4
    columns = hit.any(1)
    rows = hit.any(2)
    box = np.stack([columns.argmax(1), rows.argmax(1),
                    s - columns[:, ::-1].argmax(1), s - rows[:, ::-1].argmax(1)], 1)
    corner = np.stack([np.arange(places) % cells, np.arange(places) // cells] * 2, 1) * s
    boxes = np.where(present[:, None], box + np.tile(corner, (count, 1)), 0)
    grid = pattern.reshape(count, cells, cells, s, s).transpose(0, 1, 3, 2, 4)
    return (np.where(present, labels, -1).reshape(count, places),
            grid.reshape(count, size, size), boxes.reshape(count, places, 4))

def _halve(a):
    """(n, 2 s, 2 s) -> (n, s, s), the mean of every 2 x 2 pixels."""
    n, side, _ = a.shape
    return a.reshape(n, side // 2, 2, side // 2, 2).mean((2, 4), dtype=np.float32)

def _color(light, seed):
    """(count, size, size) in 0..1 -> images (count, 3, size, size) uint8, each with its own
    contrast, tint and noise."""
    count, size, _ = light.shape
    generator = np.random.default_rng([seed, 1])
    u = generator.random((4, count, 1, 1), np.float32)
    light = 0.1 + 0.8 * light * (0.4 + 0.6 * u[0])
    tint = 1 - 0.5 * u[1:]                              # a random hue and a low saturation,
    tint = (tint / tint.max(0)).swapaxes(0, 1)          # the brightest channel 1: (count, 3, 1, 1)
    images = np.empty((count, 3, size, size), np.uint8)
    for i in np.array_split(np.arange(count), max(1, count // 500)):
        noise = generator.random((2, len(i), 1, size, size), np.float32)    # grey
        colored = light[i, None] * tint[i] + 0.08 * (noise[0] - noise[1])
        images[i] = (colored.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    return images
