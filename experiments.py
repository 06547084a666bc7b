"""The papers' experiments, small: python experiments.py [NAME ...] [flags] [-- flags of every run]

    python experiments.py                                   lists them
    python experiments.py simclr-table5 --seeds 3           runs one
    python experiments.py simclr-table5 --scale paper       prints the paper's commands to copy

It starts the scripts and evaluates what they learn, as a person would. The table, in EXPERIMENTS.md
as well, and the picture are made of what lies in the runs' folders: what is finished is not run
again, what was stopped resumes, and experiments share runs. To run one again, delete its folder.
"""
import contextlib, importlib, json, os, re, shlex, statistics, subprocess, sys, time
from datetime import date
from pathlib import Path

import common

HERE = Path(__file__).resolve().parent
LINEAR = "evaluate.py linear RUN --protocol lbfgs"      # logistic regression on h
PAPERS = dict(simclr="simclr", byol="byol", simsiam="simsiam", swav="swav", deepcluster="swav",
              cpc_v2="cpc", supcon="simclr")            # protocol of --scale paper; others: moco
# Minutes of an epoch of shapes on one thread, from RESULTS.md; of CIFAR-10 it is some 7 times that.
MINUTES = dict(simclr=0.27, moco=0.17, byol=0.3, simsiam=0.21, swav=0.43, cpc_v2=1, insdis=0.14,
               cmc=0.19, deepcluster=0.35, densecl=0.28, supcon=0.3, image_mixture=0.25)
# On shapes the recipe's flags, on CIFAR-10 those of RESULTS.md.
CIFAR10 = "--data cifar10 --arch resnet10x0.25 --batch-size 128 --epochs 10 --warmup-epochs 0.5 "
CIFAR10_OF = dict.fromkeys(MINUTES, "--optimizer adamw --lr 0.008 --weight-decay 1e-4 ")
CIFAR10_OF |= dict(
    simclr="--lr 8 --weight-decay 1e-6 --temperature 0.2",
    byol="--lr 6 --weight-decay 1e-6 --ema-momentum 0.97 --hidden 512 --dim 128",
    simsiam="--optimizer lars --lr 6 --weight-decay 1e-6 --dim 512 --hidden 128",
    cpc_v2="--resize 56 --size 48 --batch-size 32 --lr 16e-3 --ema-momentum 0.99 --epochs 5")
CIFAR10_OF["swav"] += "--freeze-epochs 0.5 --small-crops 2 --epsilon 0.02 --num-prototypes 100"
CIFAR10_OF["deepcluster"] += "--small-crops 2 --num-prototypes 100"
CIFAR10_OF["insdis"] += "--schedule cosine"
CIFAR10_OF["cmc"] += "--schedule cosine --negatives 0"

# ============================================================================== the experiments

EXPERIMENTS = {}

def experiment(name, shows, asks, rows, **options):
    """shows: where the paper has it, and what. rows: label -> flags, which may begin with another
    script, or (flags, the paper's figure, or a tuple of them in the order of the columns). options:
    small, flags of ours alone; paper, flags of --scale paper alone; times, by what that multiplies
    numbers of a flag; evaluate, commands; log, keys of the log's last line; grid, if labels are
    "row, column"; minutes, of each run; note, what came out, one sentence for EXPERIMENTS.md."""
    rows = {label: (row, None) if isinstance(row, str) else row for label, row in rows.items()}
    base = dict(script=name.split("-")[0], shows=shows, asks=asks, rows=rows, small="", paper="",
                times={}, evaluate=[LINEAR], log=[], grid=False, minutes=0, note="")
    EXPERIMENTS[name] = {**base, **options}

def vary(flags, values):
    """Rows whose last flag has these values, or the keys of {value: the paper's figure}."""
    values = values if isinstance(values, dict) else dict.fromkeys(values)
    return {str(value): (f"{flags} {value}", figure) for value, figure in values.items()}

def cross(first, flag, values, figures=()):
    """Rows "label, value" for each of `first`, label -> flags, and each value of the flag."""
    both = [(label, value) for label in first for value in values]
    figures = figures or [None] * len(both)
    return {f"{label}, {value}": (f"{first[label]} {flag} {value}", figure)
            for (label, value), figure in zip(both, figures)}

FIGURE_5 = dict(                        # SimCLR's, the upper triangle: the row's operation is first
    crop=(33.1, 33.9, 56.3, 46.0, 39.9, 35.0, 30.2), cutout=(25.6, 33.9, 40.0, 26.5, 25.2, 22.4),
    color=(18.8, 21.0, 11.4, 16.5, 20.8), sobel=(4.0, 9.3, 6.2, 4.2), noise=(9.8, 9.8, 9.6),
    blur=(2.6, 6.7), rotate=(2.6,))

def pairs(*names):
    """Rows "first, second" of figure 5, without the pairs in the other order."""
    rows = {}
    for first in names:
        for second, figure in zip(list(FIGURE_5)[-len(FIGURE_5[first]):], FIGURE_5[first]):
            listed = first if first == second else f"{first},{second}"
            if second in names:
                rows[f"{first}, {second}"] = (f"--asymmetric --augment {listed}", figure)
    return rows

experiment("simclr-table1", "table 1", "How strong should the colour distortion be?", {
    **vary("--augment crop,color --color-strength", {0.125: 59.6, 0.25: 61.0, 0.5: 62.6, 1: 63.2}),
    "1, blur": ("--augment crop,color,blur --color-strength 1", 64.5)})
experiment("simclr-figure5", "figure 5, operations on one branch",
           "Which operations are a good task only together?", pairs("crop", "cutout", "color"),
           grid=True)
experiment("simclr-figure5-all", "figure 5", "The same for all operations, in half the epochs.",
           pairs(*FIGURE_5), grid=True, small="--epochs 7")
experiment("simclr-figure7", "figure 7 and table 6, 1000 epochs of widths 1, 2, 4 (ours: 1/8)",
           "How much do larger networks gain?", {
               "width 1/8": ("--arch resnet10x0.125", 69.3, "--arch resnet50"),
               "width 1/4": ("--arch resnet10x0.25", 74.2, "--arch resnet50x2"),
               "width 1/2": ("--arch resnet10x0.5", 76.5, "--arch resnet50x4"),
               "deeper": ("--arch resnet18x0.25", None, "--arch resnet101"),
               "deepest": ("--arch resnet34x0.25", None, "--arch resnet152")},
           paper="--epochs 1000", minutes=7)
experiment("simclr-figure8", "figure 8, a plot: nonlinear 3 above linear, 10 above none",
           "Which head should be between h and the loss, and how wide?", {
               "none": "--head none", **cross({"linear": "--head linear", "nonlinear": ""},
                                              "--dim", (32, 128, 512))}, times={"--dim": 4})
experiment("simclr-figure9", "figure 9, batch size and epochs (ours: 1/8, 1/25 of the paper's)",
           "Do small batches lose less in long runs?", cross(
               {n: f"--batch-size {n}" for n in (32, 128, 512)}, "--epochs", (4, 8, 16),
               (57.5, 61.9, 64.7, 62.8, 65.3, 67.2, 64.6, 66.5, 68.2)),
           grid=True, times={"--batch-size": 8, "--epochs": 25})
experiment("simclr-tableB1", "table B.1, batch size (ours: 1/16) and the rate's rule, 100 epochs",
           "Is the square-root rule better for small batches?", cross(
               {"linear": "", "sqrt": "--lr-scaling sqrt --lr 1.5"}, "--batch-size", (16, 64, 256),
               (57.5, 62.8, 64.6, 62.8, 64.3, 64.5)),
           grid=True, times={"--batch-size": 16}, paper="--lr 0.3")
experiment("simclr-table4", "tables 2 and 4", "What is better about the softmax?", {
    "margin": ("--loss margin", 50.9), "NT-logistic": ("--loss nt-logistic", 51.6),
    "margin, semi-hard": ("--loss margin --semi-hard", 57.5),
    "NT-logistic, semi-hard": ("--loss nt-logistic --semi-hard", 57.9), "NT-Xent": ("", 63.9)})
experiment("simclr-table3", "table 3, which augmentation can be told from h, and from g(h)",
           "Does g throw away what h still knows?", {
               "colour or grey": ("--augment crop,color", (99.3, 97.4)),
               "rotation": ("--augment crop,color,rotate", (67.6, 25.6)),
               "original or corrupted": ("--augment crop,color,noise", (99.5, 59.6)),
               "original or Sobel": ("--augment crop,color,sobel", (96.6, 56.3))},
           evaluate=["transfer.py RUN --invariance"], paper="--dim 2048")
experiment("simclr-table5", "table 5, with accuracy and entropy of the contrastive distribution",
           "Does z need unit length and a temperature?", {
               **vary("--temperature", {0.05: (59.7, 90.5, 1.0), 0.1: (64.4, 87.8, 4.5),
                                        0.5: (60.7, 68.2, 8.2), 1: (58.0, 59.1, 8.3)}),
               "10, any length": ("--loss unnormalized --temperature 10", (57.2, 91.7, 0.5)),
               "100, any length": ("--loss unnormalized --temperature 100", (57.0, 92.1, 0.5))},
           log=["contrast_accuracy", "contrast_entropy"])
V1 = ("--patch-augment none", "--directions 1", "--norm batch")         # until the steps below
V2 = {"version 1": "", "bottom up": "--directions 2", "layer norm": "--norm layer",
      "colour dropping": "--patch-augment drop", "left and right": "--directions 4",
      "patch augmentation": "--patch-augment full"}
experiment("cpc_v2-figure3", "figure 3: from 48.7 to 71.5, each step above the one before",
           "What made version 2 of CPC better?", {
               label: " ".join([*V1, *list(V2.values())[:i + 1]]) for i, label in enumerate(V2)})
experiment("cpc_v2-table2", "figure 1, table 2: 1, 10, 50 % of the labels",
           "How many labels does pre-training save?", {
               "CPC v2": ("", (52.7, 73.1, 81.2)), "supervised": ("", (23.1, 62.5, 75.9))},
           evaluate=["evaluate.py finetune RUN --protocol cpc --subset random --labels 0.01 0.1 0.5 "
                     "--baseline supervised"], minutes=20)
experiment("moco-momentum", "section 4.1, 4096 keys; 0 fails", "Must the key encoder be slow?",
           vary("--ema-momentum", {0: None, 0.9: 55.2, 0.99: 57.8, 0.999: 59.0, 0.9999: 58.9}),
           paper="--version 1 --queue-size 4096")
experiment("moco-queue", "figure 3, a plot", "Do more keys help?",
           vary("--queue-size", (128, 512, 2048)), times={"--queue-size": 32})
experiment("moco-mechanisms", "figure 3", "End to end, memory bank or momentum encoder?", {
    "end to end": "simclr.py", "memory bank": ("insdis.py --loss softmax --negatives 2048", 58.0),
    "momentum": ("--version 1", 60.6)}, times={"--negatives": 32})
experiment("moco-shuffling", "A.9, a plot: without it kNN accuracy falls",
           "Does batch normalisation give the key away?",
           {"shuffled": "", "not shuffled": "--no-shuffle"})
experiment("insdis-negatives", "CMC's README", "Are more negatives or the softmax better?", {
    "NCE, 256": ("--loss nce --negatives 256", 56.5),
    **vary("--loss softmax --negatives", {256: 57.1, 1024: 58.5})}, times={"--negatives": 16})
experiment("cmc-negatives", "a plot", "Do more negatives help?",
           vary("--loss softmax --negatives", (64, 256, 1024)), times={"--negatives": 16})
experiment("cmc-views", "CMC's README, ImageNet-100", "Are two views better than one?", {
    "one (InsDis)": ("insdis.py", 69.1), "Lab": "--view lab", "YCbCr": ("--view ycbcr", 75.8)})
experiment("byol-figure3a", "figure 3a, batch size (ours: a quarter of the paper's)",
           "Does BYOL need large batches less than SimCLR?", cross(
               {"BYOL": "byol.py", "SimCLR": "simclr.py"}, "--batch-size", (16, 64, 256),
               (59.7, 71.8, 72.2, 59.2, 64.3, 67.4)),
           grid=True, times={"--batch-size": 4}, paper="--epochs 300")
BYOL = "byol.py --blur1 1 --blur2 0.1 --solarize2 0.2"
CROP = "byol.py --color-strength 0 --grayscale 0 --solarize2 0"
experiment("byol-figure3b", "figure 3b", "Does BYOL need its augmentations less than SimCLR?", {
    "BYOL, all": (BYOL, 72.5), "BYOL, no grey": (f"{BYOL} --grayscale 0", 70.3),
    "BYOL, crop and blur": (f"{CROP} --blur1 1 --blur2 0.1", 61.1),
    "BYOL, crop": (f"{CROP} --blur1 0 --blur2 0", 59.4),
    "SimCLR, all": ("simclr.py --augment crop,color,blur", 67.9),
    "SimCLR, no grey": ("simclr.py --augment crop,jitter,blur", 61.9),
    "SimCLR, crop and blur": ("simclr.py --augment crop,blur", 41.7),
    "SimCLR, crop": ("simclr.py --augment crop", 40.3)}, grid=True, paper="--epochs 300")
experiment("byol-momentum", "table 5: neither 0 nor 1 works", "How fast should the target follow?",
           vary("--ema-momentum", (0, 0.9, 0.97, 0.99, 1)))
experiment("simsiam-figure2", "figure 2", "What does the stop-gradient prevent?", {
    "stop-gradient": ("", 68.1), "without": ("--no-stop-gradient", 0.1)}, log=["z_std"])
experiment("simsiam-table1", "table 1 (fixed: section 4.2)", "Which predictor does it need?", {
    "decayed": ("--predictor decayed", 67.7), "not decayed": ("", 68.1),
    "fixed": ("--predictor fixed", 1.5), "none": ("--predictor none", 0.1)}, log=["z_std"])
experiment("simsiam-table3", "table 3; all is unstable", "Where do the heads need BN?", vary(
    "--head-norm", {"none": 34.6, "hidden": 67.4, "default": 68.1, "all": None}), log=["z_std"])
experiment("simsiam-symmetric", "section 4.6", "Does it need to predict both ways?", {
    "symmetric": ("", 68.1), "asymmetric": ("--asymmetric", 64.8)})
experiment("simsiam-alternate", "section 5: a few steps do no harm",
           "May the targets be fixed for some steps?", vary("--alternate", (1, 10, 78)))
experiment("swav-crops", "official README, 400 epochs", "Do small crops help?", {
    "2": ("--small-crops 0", 70.1), "2 + 2": "--small-crops 2", "2 + 4": "--small-crops 4",
    "2 + 6": ("--small-crops 6", 74.6)}, paper="--epochs 400")
experiment("swav-prototypes", "appendix", "Does the number of prototypes matter?",
           vary("--num-prototypes", (10, 30, 100, 300)), times={"--num-prototypes": 100})
experiment("swav-iterations", "appendix", "How many Sinkhorn iterations do the codes need?",
           vary("--iterations", (1, 3, 10)))
experiment("swav-queue", "section 4, for small batches", "Do earlier images help small batches?",
           vary("--queue-size", (0, 256, 960)), times={"--queue-size": 4}, paper="--recipe imagenet-256")
experiment("swav-frozen", "appendix: random prototypes lose little", "Must the prototypes learn?",
           {"learned": "", "frozen": "--freeze-epochs 10000"})
experiment("deepcluster-versions", "official README", "What did version 2 of DeepCluster gain?",
           {"version 1": "--version 1 --small-crops 0", "version 2": ""})
experiment("deepcluster-clusters", "version 1's figure 3, a plot", "How many clusters?",
           vary("--num-prototypes", (10, 30, 100, 300)), times={"--num-prototypes": 100})
experiment("densecl-lambda", "detection on VOC 07+12 (ours: on drawn scenes)",
           "How much of the dense loss?",
           vary("--dense-weight", {0: 57.0, 0.25: None, 0.5: 58.7, 0.75: None, 1: None}),
           evaluate=["evaluate.py detect RUN", LINEAR])
experiment("supcon-temperature", "a plot", "Which temperature?",
           vary("--temperature", (0.05, 0.1, 0.2, 0.5)))
experiment("supcon-positives", "section 3, out is better", "Mean outside or inside the logarithm?",
           {"out": "", "in": "--positives in"})
experiment("supcon-labels", "official README, CIFAR-10, 1000 epochs", "What do labels add to SimCLR?",
           {"SupCon": ("", 96.0), "SimCLR": ("simclr.py", 93.6)},
           paper="--data cifar10 --recipe small --arch resnet50 --epochs 1000")
experiment("image_mixture-kinds", "Un-Mix's README, kNN on CIFAR-10", "Which mixture helps MoCo?", vary(
    "--mixture", {"none": 89.11, "global": None, "region": None, "both": None, "unmix": 91.34}),
    paper="--data cifar10 --recipe small --epochs 1000")
experiment("methods", "solo-learn's table, CIFAR-10, 1000 epochs",
           "What does each method learn in some four minutes of one thread?", {
               script: (f"{script}.py --epochs {round(4 / MINUTES[script])}", figure)
               for script, figure in dict(
                   simclr=90.74, moco=92.94, byol=92.58, simsiam=90.51, swav=89.17, cpc_v2=None,
                   insdis=None, cmc=None, deepcluster=88.85, densecl=None, supcon=93.82,
                   image_mixture=None).items()},
           evaluate=[LINEAR, "evaluate.py finetune RUN --labels 0.01 0.1"], paper="--epochs 100")

# ============================================================================== running them

def slug(text):
    """The text as the name of a folder or file."""
    return re.sub(r"[^\w.,]+", "-", text).strip("-") or "default"

def script_and_flags(entry, text):
    """The script of a row, and its flags."""
    words = text.split()
    if words and words[0].endswith(".py"):
        return words[0][:-3], words[1:]
    return entry["script"], words

def make_runs(entry, args):
    """(label, seed) -> (folder, commands): the training and the evaluations, each a list of words
    and the file of its standard output."""
    runs = {}
    for label, row in entry["rows"].items():
        script, flags = script_and_flags(entry, row[0])
        flags += [*entry["small"].split(), *args.extra]
        base = f"{CIFAR10}{CIFAR10_OF[script]}".split() if args.data == "cifar10" else []
        for seed in range(args.seeds):
            folder = Path(args.output, args.data, script, slug(" ".join(flags)), f"seed{seed}")
            train = [f"{script}.py", *base, "--root", args.root, "--knn-every", "0", *flags,
                     "--seed", str(seed), "--output", str(folder)]
            commands = [(train, folder / "output.txt")]
            for text in entry["evaluate"]:
                words = [str(folder) if word == "RUN" else word for word in text.split()]
                commands.append((words, folder / f"{slug(text)}.out"))
            runs[label, seed] = (folder, commands)
    return runs

def paper_commands(entry):
    """What to run on 8 GPUs for the paper's rows."""
    for label, row in entry["rows"].items():
        script, flags = script_and_flags(entry, row[2] if len(row) > 2 else row[0])
        for i, word in enumerate(flags[1:], 1):
            flags[i] = str(int(word) * entry["times"].get(flags[i - 1], 1)) if word.isdigit() else word
        folder = f"runs/{slug(f'{script} {label}')}"
        flags = ["--recipe", "imagenet", *flags, *entry["paper"].split(), "--output", folder]
        yield ["torchrun", "--nproc_per_node=8", f"{script}.py", "--data", "IMAGENET", *flags]
        for text in entry["evaluate"]:
            text = text.replace("lbfgs", PAPERS.get(script, "moco")).replace("RUN", folder)
            yield ["python" if "transfer" in text else "torchrun --nproc_per_node=8", *text.split()]

def epochs(words):
    """Of a training command, which its script reads: mistakes in flags show before the work."""
    return importlib.import_module(words[0][:-3]).parse_args(words[1:]).epochs

def minutes(entry, args):
    total = 0
    for _, ((train, _), *_) in make_runs(entry, args).values():
        epoch = MINUTES[train[0][:-3]] * (7 if args.data == "cifar10" else 1)
        total += entry["minutes"] or epoch * epochs(train)
    return total / args.jobs

def result(folder, file):
    """What a command has left: the JSON that an evaluation ended with, or the last line of the log
    of a finished training. None if it has not finished."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        if file.suffix == ".out":
            return json.loads(file.read_text().splitlines()[-1])
        last = common.read_log(folder)[-1]
        flags = common.read_checkpoint(folder / "checkpoint.pt")["args"]
        return last if "knn" in last and last["epoch"] == flags["epochs"] else None
    return None

RUNNING = []

def run(folder, commands):
    """Run what is missing of one run. Returns the command that failed, or None."""
    for words, file in commands:
        if result(folder, file) is None:
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / "output.txt", "a") as log, open(file, "a") as out:
                process = subprocess.Popen(
                    [sys.executable, HERE / words[0], *words[1:]], stdout=out, stderr=log,
                    env=dict(os.environ, OMP_NUM_THREADS="1"), start_new_session=True)
                RUNNING.append(process)
                process.wait()
            if result(folder, file) is None:
                return words
    return None

def run_all(runs, count):
    """Run what is missing of `runs`, folder -> commands, `count` at once. Returns whether all went
    well. A signal that stops this program stops them too, and trainings save what they have."""
    missing = {folder: commands for folder, commands in runs.items()
               if any(result(folder, file) is None for _, file in commands)}
    common.say(f"{len(missing)} of {len(runs)} runs are to do")
    began = time.time()
    failed = 0
    with ThreadPoolExecutor(count) as pool:
        try:
            futures = {pool.submit(run, *item): item[0] for item in missing.items()}
            for i, future in enumerate(as_completed(futures), 1):
                left = (time.time() - began) / i * (len(missing) - i) / 60
                what = f"done: {futures[future]}"
                if future.result():
                    failed += 1
                    what = (f"failed, see {futures[future]}/output.txt: "
                            f"{shlex.join(future.result())}")
                common.say(f"{i} of {len(missing)}, about {left:.0f} min left; {what}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            while any(future.running() for future in futures):
                while RUNNING:
                    RUNNING.pop().terminate()
                time.sleep(0.1)
            raise
    return not failed

# ============================================================================== what came out

def figures(entry, label, folder, commands):
    """{column: figure} of one run, as far as it has finished; the column for the paper first."""
    found = {}
    for _, file in commands[1:]:
        answer = result(folder, file) or dict(task=None)
        if answer["task"] == "invariance":
            row, = [row for row in answer["rows"] if row["task"] == label]
            found.update({"h": row["h"], "g(h)": row["g(h)"]})
        if answer["task"] == "finetune":
            key = "baseline_top1" if label == "supervised" else "top1"
            found.update({f"{100 * row['labels']:g} %": row[key] for row in answer["rows"]})
        if answer["task"] == "detect":
            found["AP"] = answer["AP"]
        if answer["task"] == "linear":
            found["linear"] = answer["top1"]
    last = result(folder, commands[0][1]) or {}
    found.update({key: last[key] for key in [*entry["log"], "kNN"] if key in last})
    return found

def agreement(ours, theirs):
    """(pairs in the paper's order, pairs) of the figures that both have and that differ there."""
    both = [pair for pair in zip(ours, theirs) if None not in pair]
    pairs = [(a, b) for i, a in enumerate(both) for b in both[:i] if a[1] != b[1]]
    return sum((a[0] - b[0]) * (a[1] - b[1]) > 0 for a, b in pairs), len(pairs)

def report(name, args, runs):
    """The table, on the screen and in EXPERIMENTS.md, and the picture."""
    entry = EXPERIMENTS[name]
    found = {label: [figures(entry, label, *runs[label, seed]) for seed in range(args.seeds)]
             for label in entry["rows"]}
    columns = list(dict.fromkeys(c for runs in found.values() for run in runs for c in run))
    ...
