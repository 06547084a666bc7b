"""Draws the README's pictures that need no training: python pictures/draw.py

methods.png shows all methods as small architectures with the same symbols, shapes.png a sheet of
the embedded data."""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Circle, FancyBboxPatch, Polygon, Rectangle

import shapes

BLUE, GREEN, ORANGE, RED, GREY = "#2a6f97", "#52796f", "#e07a1f", "#bc4749", "#6c757d"
TOP, BOTTOM, MIDDLE = 0.72, 0.28, 0.5           # heights of the two branches, and between them

class Panel:
    """One method: a unit square with symbols, the name above and the loss below."""

    def __init__(self, ax, title, loss):
        self.ax = ax
        ax.set(xlim=(0, 1.52), ylim=(-0.02, 1.08), xticks=[], yticks=[], aspect="equal")
        for spine in ax.spines.values():
            spine.set(color="#d0d0d0")
        ax.text(0.04, 1.0, title, fontsize=11, weight="bold", va="center")
        ax.text(0.04, 0.06, loss, fontsize=8, va="center", color="#333333")

    def arrow(self, start, end, color=GREY, style="-"):
        self.ax.annotate("", end, start, arrowprops=dict(
            arrowstyle="-|>", color=color, linewidth=1.1, linestyle=style, shrinkA=0, shrinkB=0,
            mutation_scale=8))

    def image(self, x, y, text="x"):
        self.ax.add_patch(Rectangle((x - 0.06, y - 0.07), 0.12, 0.14, facecolor="#f1ede4",
                                    edgecolor=GREY, linewidth=1))
        self.ax.text(x, y, text, fontsize=8.5, ha="center", va="center")

    def network(self, x, y, text, color, average=False):
        """A trapezoid; with a dashed edge and a light face the moving average of one (EMA)."""
        corners = [(x - 0.07, y - 0.1), (x - 0.07, y + 0.1), (x + 0.07, y + 0.065),
                   (x + 0.07, y - 0.065)]
        self.ax.add_patch(Polygon(corners, facecolor="white" if average else color,
                                  edgecolor=color, linewidth=1.3,
                                  linestyle="--" if average else "-"))
        self.ax.text(x, y, text, fontsize=9, ha="center", va="center",
                     color=color if average else "white")

    def branch(self, y, image, names, start=0.1, average=False, step=0.24):
        """An image and the networks it goes through; returns where the last one ends."""
        self.image(start, y, image)
        x = start + 0.06
        for name in names:
            self.arrow((x, y), (x + 0.09, y))
            x += 0.16
            self.network(x, y, name, {"f": BLUE, "g": GREEN}.get(name[0], ORANGE), average)
            x += 0.07
        return x

    def stop(self, x, y):
        """Stop-gradient: two bars across an arrow."""
        for offset in (-0.012, 0.018):
            self.ax.plot([x + offset - 0.012, x + offset + 0.012], [y - 0.045, y + 0.045],
                         color=RED, linewidth=1.8)

    def loss(self, x, y=MIDDLE, text="L"):
        self.ax.add_patch(Circle((x, y), 0.065, facecolor="#ffe8b6", edgecolor=GREY, linewidth=1))
        self.ax.text(x, y, text, fontsize=9, ha="center", va="center")

    def rows(self, x, y, color, count=5, highlight=None, label=""):
        """A queue, a memory bank or prototypes: a stack of vectors."""
        height = 0.032
        bottom = y - count * height / 2
        for i in range(count):
            face = "#ffd166" if i == highlight else color
            self.ax.add_patch(Rectangle((x - 0.075, bottom + i * height), 0.15, height * 0.8,
                                        facecolor=face, edgecolor="white", linewidth=0.4))
        self.ax.text(x, bottom - 0.035, label, fontsize=7, ha="center", va="center", color=GREY)

    def text(self, x, y, text, **options):
        self.ax.text(x, y, text, **dict(dict(fontsize=7.5, ha="center", va="center", color=GREY),
                                        **options))

    def average(self, x):
        """The upper network's weights flow slowly into the lower one."""
        self.arrow((x, TOP - 0.11), (x, BOTTOM + 0.11), BLUE, "--")

def simclr(ax, title="SimCLR", loss="the other view among all views of the batch", labels=False):
    p = Panel(ax, title, loss)
    for y, image in ((TOP, "$x_1$"), (BOTTOM, "$x_2$")):
        end = p.branch(y, image, ["f", "g"])
        p.arrow((end, y), (0.98, MIDDLE + (0.05 if y == TOP else -0.05)))
    p.loss(1.05)
    p.rows(1.34, MIDDLE, "#b5c9d6", label="other views")
    p.arrow((1.26, MIDDLE), (1.12, MIDDLE))
    if labels:
        p.text(1.05, 0.74, "labels y", fontsize=8.5, color=RED, weight="bold")
        p.arrow((1.05, 0.7), (1.05, 0.575), RED)

def moco(ax, title="MoCo", loss="the key among a queue of keys of earlier images", mixed=False):
    p = Panel(ax, title, loss)
    end = p.branch(TOP, "$m$" if mixed else "$x_q$", ["f", "g"])
    p.arrow((end, TOP), (0.98, MIDDLE + 0.05))
    end = p.branch(BOTTOM, "$x_k$", ["f", "g"], average=True)
    p.arrow((end, BOTTOM), (0.98, MIDDLE - 0.05))
    p.stop(0.75, 0.365)
    p.average(0.32)
    p.average(0.55)
    p.text(0.21, MIDDLE, "EMA", color=BLUE)
    p.loss(1.05)
    p.rows(1.34, MIDDLE, "#b5c9d6", label="queue")
    p.arrow((1.26, MIDDLE), (1.12, MIDDLE))
    p.arrow((0.95, 0.3), (1.25, 0.36))
    p.text(1.1, 0.27, "enqueue", fontsize=7)
    return p

def densecl(ax):
    p = moco(ax, "DenseCL", "MoCo, also for each position of the feature map")
    for y in (TOP, BOTTOM):
        for i in range(9):
            p.ax.add_patch(Rectangle((0.65 + 0.035 * (i % 3), y - 0.05 + 0.035 * (i // 3)), 0.03,
                                     0.03, facecolor="#ffd166" if i == 4 else "#b5c9d6",
                                     edgecolor="white", linewidth=0.3, zorder=3))

def mixture(ax):
    p = moco(ax, "Image mixture", "MoCo; a mixed query has two keys, by their shares", mixed=True)
    p.text(0.36, 0.87, "m = λ x + (1 − λ) x′", fontsize=8)

def insdis(ax):
    p = Panel(ax, "InsDis", "its own row among those of the memory bank")
    end = p.branch(MIDDLE, "$x$", ["f", "g"])
    p.arrow((end, MIDDLE), (0.98, MIDDLE))
    p.loss(1.05)
    p.rows(1.34, MIDDLE, "#b5c9d6", highlight=3, label="memory")
    p.arrow((1.26, MIDDLE), (1.12, MIDDLE))
    p.ax.annotate("", (1.34, 0.6), (0.7, 0.56), arrowprops=dict(
        arrowstyle="-|>", color=GREY, linestyle="--", mutation_scale=8,
        connectionstyle="arc3,rad=-0.5"))
    p.text(1.0, 0.82, "update after the step")

def cmc(ax):
    p = Panel(ax, "CMC", "the other view's row: lightness against colours")
    for y, image, names in ((TOP, "L", ["f₁", "g₁"]), (BOTTOM, "ab", ["f₂", "g₂"])):
        end = p.branch(y, image, names)
        p.arrow((end, y), (0.9, y))
        p.loss(0.97, y)
    p.rows(1.34, TOP, "#b5c9d6", 4, 2, "bank of L")
    p.rows(1.34, BOTTOM, "#b5c9d6", 4, 2, "bank of ab")
    p.arrow((1.26, TOP - 0.02), (1.03, BOTTOM + 0.05))
    p.arrow((1.26, BOTTOM + 0.02), (1.03, TOP - 0.05))

def byol(ax):
    p = Panel(ax, "BYOL", "predict the averaged target of the other view")
    end = p.branch(TOP, "$x_1$", ["f", "g", "q"])
    p.arrow((end, TOP), (1.2, MIDDLE + 0.05))
    end = p.branch(BOTTOM, "$x_2$", ["f", "g"], average=True)
    p.arrow((end, BOTTOM), (1.2, MIDDLE - 0.05))
    p.stop(0.93, 0.385)
    p.average(0.32)
    p.average(0.55)
    p.text(0.21, MIDDLE, "EMA", color=BLUE)
    p.loss(1.27)

def simsiam(ax):
    p = Panel(ax, "SimSiam", "predict the other view, whose gradient stops")
    end = p.branch(TOP, "$x_1$", ["f", "g", "q"])
    p.arrow((end, TOP), (1.2, MIDDLE + 0.05))
    end = p.branch(BOTTOM, "$x_2$", ["f", "g"])
    p.arrow((end, BOTTOM), (1.2, MIDDLE - 0.05))
    p.stop(0.93, 0.385)
    p.loss(1.27)

def swav(ax):
    p = Panel(ax, "SwAV", "predict a view's code from the other views")
    for y, image in ((TOP, "$x_1$"), (BOTTOM, "$x_2$")):
        end = p.branch(y, image, ["f", "g"])
        p.arrow((end, y), (0.72, MIDDLE + (0.04 if y == TOP else -0.04)))
    p.rows(0.8, MIDDLE, "#cdb4db", 6)
    p.text(0.86, MIDDLE + 0.14, "prototypes", fontsize=7)
    p.arrow((0.89, MIDDLE + 0.04), (1.05, TOP - 0.02))
    p.arrow((0.89, MIDDLE - 0.04), (1.0, BOTTOM + 0.02))
    p.text(1.13, TOP, "softmax")
    p.text(1.12, BOTTOM - 0.02, "Sinkhorn\ncode")
    p.arrow((1.22, TOP - 0.03), (1.34, MIDDLE + 0.06))
    p.arrow((1.26, BOTTOM + 0.02), (1.35, MIDDLE - 0.065))
    p.stop(1.31, 0.39)
    p.loss(1.38)

def deepcluster(ax):
    p = Panel(ax, "DeepCluster", "tell the image's cluster of before the epoch")
    end = p.branch(TOP, "$x$", ["f", "g"])
    p.arrow((end, TOP), (0.78, TOP))
    p.rows(0.88, TOP, "#cdb4db", 5, label="centroids")
    p.arrow((0.98, TOP), (1.2, TOP - 0.08))
    p.rows(0.4, BOTTOM, "#b5c9d6", 5, label="memory of all z")
    p.arrow((0.5, BOTTOM), (0.74, BOTTOM))
    p.text(0.88, BOTTOM, "k-means")
    p.arrow((0.88, BOTTOM + 0.05), (0.88, TOP - 0.17))
    p.arrow((1.0, BOTTOM), (1.23, MIDDLE - 0.0))
    p.text(1.2, 0.31, "clusters")
    p.loss(1.27, 0.56)

def cpc(ax):
    p = Panel(ax, "CPC v2", "find the patches below among all patches")
    for i in range(16):
        p.ax.add_patch(Rectangle((0.05 + 0.075 * (i % 4), 0.34 + 0.095 * (i // 4)), 0.065, 0.085,
                                 facecolor="#f1ede4", edgecolor=GREY, linewidth=0.7))
    p.text(0.2, 0.26, "patches")
    p.arrow((0.37, 0.53), (0.45, 0.53))
    p.network(0.53, 0.53, "f", BLUE)
    p.arrow((0.61, 0.53), (0.69, 0.53))
    for i in range(16):
        row = i // 4
        face = "#52796f" if row >= 2 else "#ffd166" if i == 1 else "#b5c9d6"
        p.ax.add_patch(Rectangle((0.72 + 0.075 * (i % 4), 0.34 + 0.095 * row), 0.065, 0.085,
                                 facecolor=face, edgecolor="white", linewidth=0.7))
    p.text(1.04, 0.66, "context of\nrows above", ha="left", color=GREEN)
    p.text(1.04, 0.4, "predicted\nrows below", ha="left")
    p.arrow((0.83, 0.58), (0.83, 0.42))
    p.loss(1.43, 0.53)
    p.arrow((1.04, 0.53), (1.36, 0.53))

def draw_methods():
    panels = [simclr, simsiam, byol, moco, densecl, mixture, swav, deepcluster, insdis, cmc, cpc]
    figure, axes = plt.subplots(4, 3, figsize=(9, 9))
    figure.subplots_adjust(left=0.01, right=0.99, top=0.99, bottom=0.045, wspace=0.03, hspace=0.03)
    for ax, panel in zip(axes.flat, panels):
        panel(ax)
    simclr(axes.flat[-1], "SupCon (supervised)", "all views of the class are positives", True)
    figure.text(0.5, 0.015, "f encoder    g projector    q predictor    dashed: moving average "
                "(EMA)    red bars: no gradient    L loss", ha="center", fontsize=9)
    figure.savefig(HERE / "methods.png", dpi=130)
    plt.close(figure)

def draw_shapes():
    """A row for each class, and scenes with their boxes on the right."""
    images, labels, _ = shapes.draw_shapes(500, seed=1)
    scenes, _, boxes = shapes.draw_shapes(2 * len(shapes.CLASSES), seed=3, size=96, cells=2)
    figure, axes = plt.subplots(len(shapes.CLASSES), 12, figsize=(6.6, 5.5), layout="constrained")
    for k, row in enumerate(axes):
        shown = [*images[labels[:, 0] == k][:10], *scenes[2 * k:2 * k + 2]]
        for image, ax in zip(shown, row):
            ax.imshow(image.transpose(1, 2, 0), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
        row[0].set_ylabel(shapes.CLASSES[k], fontsize=6)
        for ax, scene in zip(row[10:], boxes[2 * k:2 * k + 2]):
            for x0, y0, x1, y1 in scene:
                ax.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False,
                                       edgecolor="white", linewidth=0.6))
    figure.savefig(HERE / "shapes.png", dpi=110)
    plt.close(figure)

if __name__ == "__main__":
    draw_methods()
    draw_shapes()
