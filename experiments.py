"""The papers' experiments, small: python experiments.py [NAME ...] [flags] [-- flags of every run]

    python experiments.py                                   lists them
    python experiments.py simclr-table5 --seeds 3           runs one
    python experiments.py simclr-table5 --scale paper       prints the paper's commands to copy

It starts the scripts and evaluates what they learn, as a person would. The table, in EXPERIMENTS.md
as well, and the picture are made of what lies in the runs' folders: what is finished is not run
again, what was stopped resumes, and experiments share runs. To run one again, delete its folder.
"""
import contextlib, importlib, itertools, json, math, os, re, shlex, statistics, subprocess
import sys, textwrap, time
from datetime import date
from pathlib import Path

import common  # before torch, since it handles signals from then on
import evaluate
import numpy as np

HERE = Path(__file__).resolve().parent
LINEAR = "evaluate.py linear RUN --protocol lbfgs"      # logistic regression on h
GPUS = "torchrun --nproc_per_node=8"                    # --scale paper; protocols: others have moco
PROTOCOLS = dict(simclr="simclr", byol="byol", simsiam="simsiam", swav="swav", deepcluster="swav",
                 cpc_v2="cpc", supcon="simclr")
# CPU minutes of an epoch, measured side by side on hardware A of RESULTS.md beside other work,
# 2026-11-26; the last four of CIFAR-10 are estimates from the others. START is what a run on shapes
# takes besides: imports, kNN, the linear probe.
START = 0.7
MINUTES = dict(
    shapes=dict(
        simclr=0.25, moco=0.27, byol=0.38, simsiam=0.27, swav=0.72, cpc_v2=1.8, insdis=0.15,
        cmc=0.15, deepcluster=0.45, densecl=0.33, supcon=0.39, image_mixture=0.54),
    cifar10=dict(
        simclr=3.9, moco=4.4, byol=5.4, simsiam=4.1, swav=7.1, cpc_v2=20, insdis=3.4, cmc=3.5,
        deepcluster=7, densecl=5, supcon=4.2, image_mixture=8.5))
# On shapes the recipe's flags, on CIFAR-10 those of RESULTS.md.
CIFAR10 = "--data cifar10 --arch resnet10x0.25 --batch-size 128 --epochs 10 --warmup-epochs 0.5 "
CIFAR10_OF = dict.fromkeys(MINUTES["shapes"], "--optimizer adamw --lr 0.008 --weight-decay 1e-4 ")
CIFAR10_OF |= dict(
    simclr="--lr 8 --weight-decay 1e-6 --temperature 0.2",
    byol="--lr 6 --weight-decay 1e-6 --ema-momentum 0.97 --hidden 512 --dim 128",
    simsiam="--optimizer lars --lr 6 --weight-decay 1e-6 --dim 512 --hidden 128",
    cpc_v2="--resize 56 --size 48 --batch-size 32 --lr 16e-3 --ema-momentum 0.99 --epochs 5")
CIFAR10_OF["swav"] += "--freeze-epochs 0.5 --small-crops 2 --epsilon 0.02 --num-prototypes 100"
CIFAR10_OF["deepcluster"] += "--small-crops 2 --num-prototypes 100"
CIFAR10_OF["insdis"] += "--schedule cosine --lr 0.001"
CIFAR10_OF["cmc"] += "--schedule cosine --negatives 0"

# ============================================================================== the experiments

EXPERIMENTS = {}

def experiment(name, shows, asks, rows, **options):
    """shows: where the paper has it, and what. rows: label -> flags, which may begin with another
    script, or (flags, the paper's figure, or a tuple of them in the order of the columns). Rows
    that are all "row, column" are drawn as a grid. options: small, flags on shapes alone; evaluate,
    commands; log, keys of the last lines; minutes, of each run, for the list; equal, data ->
    minutes that every training shall take. Of --scale paper alone: paper, flags; times, by what it
    multiplies numbers of a flag; instead, what other flags of ours become."""
    entry = dict(shows=shows, asks=asks, rows={}, small="", evaluate=[LINEAR], log=[], minutes=0,
                 equal={}, paper="", times={}, instead={})
    for label, row in rows.items():
        text, figures = (row, None) if isinstance(row, str) else row
        figures = figures if isinstance(figures, tuple) else (figures,)
        script, flags = re.match(r"(?:(\w+)\.py)? ?(.*)", text).groups()
        entry["rows"][label] = (script or name.split("-")[0], flags, figures)
    EXPERIMENTS[name] = {**entry, **options}

def vary(flag, values):
    """Rows of a flag with these values, or with the keys of {value: the paper's figure}."""
    values = values if isinstance(values, dict) else dict.fromkeys(values)
    name = flag.split()[-1].strip("-")
    return {f"{name} {value}": (f"{flag} {value}", figure) for value, figure in values.items()}

def cross(first, flag, values, figures=itertools.repeat(None)):
    """Rows "label, value" for each of `first`, label -> flags, and each value of the flag."""
    both = itertools.product(first, values)
    return {f"{label}, {value}": (f"{first[label]} {flag} {value}", figure)
            for (label, value), figure in zip(both, figures)}

FIGURE_5 = dict(                                # SimCLR's; the row's operation comes first
    crop=(33.1, 33.9, 56.3, 46.0, 39.9, 35.0, 30.2),
    cutout=(32.2, 25.6, 33.9, 40.0, 26.5, 25.2, 22.4),
    color=(55.8, 35.5, 18.8, 21.0, 11.4, 16.5, 20.8),
    sobel=(46.2, 40.6, 20.9, 4.0, 9.3, 6.2, 4.2),
    noise=(38.8, 25.8, 7.5, 7.6, 9.8, 9.8, 9.6),
    blur=(35.1, 25.2, 16.6, 5.8, 9.7, 2.6, 6.7),
    rotate=(30.0, 22.5, 20.7, 4.3, 9.7, 6.5, 2.6))

def pairs(*names):
    """Rows "first, second" of figure 5; on the diagonal one operation alone."""
    rows = {}
    for first, second in itertools.product(names, names):
        listed = first if first == second else f"{first},{second}"
        figure = FIGURE_5[first][list(FIGURE_5).index(second)]
        rows[f"{first}, {second}"] = (f"--asymmetric --augment {listed}", figure)
    return rows

experiment("simclr-table1", "table 1", "How strong should the colour distortion be?", {
    **vary("--augment crop,color --color-strength", {0.125: 59.6, 0.25: 61.0, 0.5: 62.6, 1: 63.2}),
    "color-strength 1, blur": ("--augment crop,color,blur --color-strength 1", 64.5)})
experiment("simclr-figure5", "figure 5, operations on one branch",
           "Which operations are a good task only together?", pairs("crop", "cutout", "color"))
experiment("simclr-figure5-all", "figure 5", "The same for all operations, in a few epochs.",
           pairs(*FIGURE_5), small="--epochs 2")
experiment("simclr-figure7", "figure 7 and table 6, 1000 epochs of widths 1, 2, 4 (ours: 1/8)",
           "How much do larger networks gain?", {
               "width 1/8": ("--arch resnet10x0.125", 69.3),
               "width 1/4": ("--arch resnet10x0.25", 74.2),
               "width 1/2": ("--arch resnet10x0.5", 76.5),
               "deeper": "--arch resnet18x0.25", "deepest": "--arch resnet34x0.25"},
           small="--epochs 4", minutes=4, paper="--epochs 1000", instead={
               "resnet10x0.125": "resnet50", "resnet10x0.25": "resnet50x2",
               "resnet10x0.5": "resnet50x4", "resnet18x0.25": "resnet101",
               "resnet34x0.25": "resnet152"})
experiment("simclr-figure8", "figure 8, a plot: nonlinear 3 above linear, 10 above none, h above z",
           "Which head should be between h and the loss, and how wide?", {
               "none": "--head none",
               **cross({"linear": "--head linear", "nonlinear": ""}, "--dim", (32, 128, 512))},
           evaluate=[LINEAR, f"{LINEAR} --features z"], times={"--dim": 4})
experiment("simclr-figure9", "figure 9, batch size and epochs (ours: 1/8, 1/25 of the paper's)",
           "Do small batches lose less in long runs?", cross(
               {n: f"--batch-size {n}" for n in (32, 128, 512)}, "--epochs", (4, 8, 16),
               (57.5, 61.9, 64.7, 62.8, 65.3, 67.2, 64.6, 66.5, 68.2)),
           times={"--batch-size": 8, "--epochs": 25})
experiment("simclr-tableB1", "table B.1, batch size (ours: 1/16) and the rate's rule, 100 epochs",
           "Is the square-root rule better for small batches?", cross(
               {"linear": "", "sqrt": "--lr-scaling sqrt --lr 1.5"}, "--batch-size", (16, 64, 256),
               (57.5, 62.8, 64.6, 62.8, 64.3, 64.5)),
           times={"--batch-size": 16}, paper="--lr 0.3")
experiment("simclr-table4", "tables 2 and 4", "Is NT-Xent better than other contrastive losses?", {
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
               "10, not normalised": ("--loss unnormalized --temperature 10", (57.2, 91.7, 0.5)),
               "100, not normalised": ("--loss unnormalized --temperature 100", (57.0, 92.1, 0.5))},
           log=["contrast_accuracy", "contrast_entropy"])
CPC = {"version 1": "--arch resnet10x0.125 --directions 1 --norm batch --patch-augment none "
                    "--patch-size 12 --stride 9",
       "+ larger network": "--arch resnet10x0.25", "+ bottom up": "--directions 2",
       "+ layer norm": "--norm layer", "+ colour dropping": "--patch-augment drop",
       "+ left and right": "--directions 4", "+ larger patches": "--patch-size 16 --stride 8",
       "+ patch augmentation": "--patch-augment full"}
experiment("cpc_v2-figure3", "figure 3, a plot, each step above the one before",
           "What made version 2 of CPC better?", {
               step: (" ".join(list(CPC.values())[:i]), {1: 48.7, len(CPC): 71.5}.get(i))
               for i, step in enumerate(CPC, 1)},
           instead={"resnet10x0.125": "resnet101", "resnet10x0.25": "resnet161",
                    "--patch-size 12 --stride 9": "--size 256 --patch-size 64 --stride 32",
                    "--patch-size 16 --stride 8": "--size 260 --patch-size 80 --stride 36"})
experiment("cpc_v2-directions", "figure 3: up 2 more, left and right 2.5",
           "Do more directions of prediction help?", vary("--directions", (1, 2, 4)))
experiment("cpc_v2-patches", "figure 3: dropping colours 3 more, all 4.5",
           "How should patches be augmented?", vary("--patch-augment", ("none", "drop", "full")))
experiment("cpc_v2-table2", "figure 1, table 2: 1, 10, 50 % of the labels",
           "How many labels does pre-training save?", {
               "CPC v2": ("", (52.7, 73.1, 81.2)), "supervised": ("", (23.1, 62.5, 75.9))},
           evaluate=["evaluate.py finetune RUN --protocol cpc --subset random "
                     "--labels 0.01 0.1 0.5 --baseline supervised"],
           minutes=29)
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
           times={"--batch-size": 4}, paper="--epochs 300")
BYOL = "byol.py --blur1 1 --blur2 0.1 --solarize2 0.2"
CROP = "byol.py --color-strength 0 --grayscale 0 --solarize2 0"
experiment("byol-figure3b", "figure 3b", "Does BYOL need its augmentations less than SimCLR?", {
    "BYOL, all": (BYOL, 72.5), "BYOL, no grey": (f"{BYOL} --grayscale 0", 70.3),
    "BYOL, no colour": (f"{BYOL} --grayscale 0 --color-strength 0", 63.4),
    "BYOL, crop and blur": (f"{CROP} --blur1 1 --blur2 0.1", 61.1),
    "BYOL, crop": (f"{CROP} --blur1 0 --blur2 0", 59.4),
    "SimCLR, all": ("simclr.py --augment crop,color,blur", 67.9),
    "SimCLR, no grey": ("simclr.py --augment crop,jitter,blur", 61.9),
    "SimCLR, crop and blur": ("simclr.py --augment crop,blur", 41.7),
    "SimCLR, crop": ("simclr.py --augment crop", 40.3)}, small="--epochs 8", paper="--epochs 300")
experiment("byol-momentum", "table 5a", "How fast should the target follow?",
           vary("--ema-momentum", (0, 0.5, 0.9, 0.99, 1)))
experiment("simsiam-figure2", "figure 2", "What does the stop-gradient prevent?", {
    "stop-gradient": ("", 68.1), "without": ("--no-stop-gradient", 0.1)}, log=["z_std"])
experiment("simsiam-table1", "table 1 (fixed: section 4.2)", "Which predictor does SimSiam need?", {
    "decayed": ("--predictor decayed", 67.7), "not decayed": ("--predictor trained", 68.1),
    "fixed": ("--predictor fixed", 1.5), "none": ("--predictor none", 0.1)}, log=["z_std"])
experiment("simsiam-table3", "table 3; all is unstable", "Where do the heads need BN?", vary(
    "--head-norm", {"none": 34.6, "hidden": 67.4, "default": 68.1, "all": None}), log=["z_std"])
experiment("simsiam-symmetric", "section 4.6", "Does SimSiam need the symmetric loss?", {
    "symmetric": ("", 68.1), "asymmetric": ("--asymmetric", 64.8)})
experiment("simsiam-alternate", "section 5", "May the targets be fixed for some steps?",
           vary("--alternate", (1, 10, 100)))
experiment("swav-crops", "official README, 400 epochs", "Do small crops help?", {
    "2": ("--small-crops 0", 70.1), "2 + 2": "--small-crops 2", "2 + 4": "--small-crops 4",
    "2 + 6": ("--small-crops 6", 74.6)}, paper="--epochs 400")
experiment("swav-prototypes", "appendix", "Does the number of prototypes matter?",
           vary("--num-prototypes", (10, 30, 100, 300)), times={"--num-prototypes": 100})
experiment("swav-iterations", "appendix", "How many Sinkhorn iterations do the codes need?",
           vary("--iterations", (1, 3, 10)))
experiment("swav-queue", "section 4, for small batches", "Do earlier images help small batches?",
           vary("--queue-size", (0, 256, 960)), times={"--queue-size": 4},
           paper="--recipe imagenet-256")
experiment("swav-frozen", "appendix", "Must the prototypes learn?",
           {"learned": "", "frozen": "--freeze-epochs 10000"})
experiment("deepcluster-versions", "official README", "What did version 2 of DeepCluster gain?",
           {"version 1": "--version 1 --small-crops 0", "version 2": ""})
experiment("deepcluster-clusters", "version 1's number of clusters", "How many clusters?",
           vary("--num-prototypes", (10, 30, 100, 300)), times={"--num-prototypes": 100})
experiment("densecl-lambda", "detection on VOC 07+12 (ours: on drawn scenes)",
           "How large should the weight of the dense loss be?",
           vary("--dense-weight", {0: 57.0, 0.25: None, 0.5: 58.7, 0.75: None, 1: None}),
           evaluate=["evaluate.py detect RUN", LINEAR], minutes=7)
experiment("supcon-temperature", "a plot", "Which temperature?",
           vary("--temperature", (0.05, 0.1, 0.2, 0.5)))
experiment("supcon-positives", "section 3", "Mean outside or inside the logarithm?",
           {"out": "", "in": "--positives in"})
experiment("supcon-labels", "official README, CIFAR-10, 1000 epochs",
           "What do labels add to SimCLR?", {"SupCon": ("", 96.0), "SimCLR": ("simclr.py", 93.6)},
           paper="--data cifar10 --recipe small --arch resnet50 --epochs 1000")
experiment("supcon-cross-entropy", "official README, CIFAR-10 (ours: fine-tuned)",
           "Is SupCon better than cross entropy?", {"SupCon": ("", 96.0), "supervised": ("", 95.0)},
           evaluate=["evaluate.py finetune RUN --labels 1.0 --baseline supervised"], minutes=20,
           paper="--data cifar10 --recipe small --arch resnet50 --epochs 1000")
experiment("image_mixture-kinds", "Un-Mix's README, kNN on CIFAR-10",
           "Which mixture helps MoCo?", {
               "none": ("--mixture none", 89.11), "unmix": ("--mixture unmix", 91.34),
               **vary("--mixture", ("global", "region", "both"))},
           evaluate=[], paper="--data cifar10 --recipe small --epochs 1000")
experiment("methods", "solo-learn's table, CIFAR-10, 1000 epochs",
           "What does each method learn in the same minutes of one thread?", {
               "SimCLR": ("simclr.py", 90.74), "MoCo": ("moco.py", 92.94),
               "BYOL": ("byol.py", 92.58), "SimSiam": ("simsiam.py", 90.51),
               "SwAV": ("swav.py", 89.17), "CPC v2": "cpc_v2.py", "InsDis": "insdis.py",
               "CMC": "cmc.py", "DeepCluster": ("deepcluster.py", 88.85), "DenseCL": "densecl.py",
               "SupCon (labels)": ("supcon.py", 93.82), "Un-Mix": "image_mixture.py"},
           evaluate=[LINEAR, "evaluate.py finetune RUN --labels 0.01 0.1"], log=["epoch"],
           equal=dict(shapes=2, cifar10=40), paper="--epochs 100")

# ============================================================================== running them

def slug(text):
    """The text as the name of a folder or file."""
    return re.sub(r"[^\w.]+", "-", text).strip("-") or "default"

def evaluations(entry, flags):
    """Those of a run with these flags: without a projector there is no z to evaluate."""
    return [task for task in entry["evaluate"]
            if not ("--features z" in task and "--head none" in flags)]

def plan(entry, args):
    """(label, seed) -> commands, the training and then the evaluations: each a list of words, and
    the file of its standard output in the run's folder."""
    runs = {}
    for label, seed in itertools.product(entry["rows"], range(args.seeds)):
        script, flags, _ = entry["rows"][label]
        if entry["equal"]:
            count = round(entry["equal"][args.data] / MINUTES[args.data][script])
            flags += f" --epochs {max(1, count)}"
        small = entry["small"] if args.data == "shapes" else ""
        flags = " ".join([flags, small, *args.extra])
        folder = Path(args.output, args.data, script, slug(flags), f"seed{seed}")
        base = CIFAR10 + CIFAR10_OF[script] if args.data == "cifar10" else ""
        train = [f"{script}.py", *base.split(), "--root", args.root, "--knn-every", "0",
                 *flags.split(), "--seed", str(seed), "--output", str(folder)]
        runs[label, seed] = [(train, folder / "train.out")]
        for task in evaluations(entry, flags):
            words = [str(folder) if word == "RUN" else word for word in task.split()]
            runs[label, seed].append((words, folder / f"{slug(task)}.out"))
    return runs

def paper_commands(entry):
    """What the paper ran, for 8 GPUs."""
    data = "" if "--data" in entry["paper"] else "--data IMAGENET --recipe imagenet "
    for label, (script, flags, _) in entry["rows"].items():
        for ours, theirs in entry["instead"].items():
            flags = flags.replace(ours, theirs)
        for flag, factor in entry["times"].items():
            flags = re.sub(rf"(?<={flag} )\d+", lambda n: str(int(n[0]) * factor), flags)
        folder = f"runs/{slug(f'{script} {flags}')}"
        yield f"{GPUS} {script}.py {data}{flags} {entry['paper']} --output {folder}"
        for task in evaluations(entry, flags):
            task = task.replace("lbfgs", PROTOCOLS.get(script, "moco"))
            task = task.replace("detect RUN", "detect RUN --data VOC").replace("RUN", folder)
            yield f"{'python' if 'transfer' in task else GPUS} {task}"

def epochs(train):
    """Of a training, by its script: mistakes in the flags show before any work."""
    return importlib.import_module(train[0][:-3]).parse_args(train[1:]).epochs

def minutes(entry, args):
    of_epoch = MINUTES[args.data]
    slower = of_epoch["simclr"] / MINUTES["shapes"]["simclr"]
    trainings = [commands[0][0] for commands in plan(entry, args).values()]
    return sum((slower * entry["minutes"] or epochs(train) * of_epoch[train[0][:-3]]) + START
               for train in trainings) / args.jobs

def result(file):
    """What a command has left: the JSON that an evaluation ended with, or the end of the log of a
    finished training; None before that."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        if file.name != "train.out":
            return json.loads(file.read_text().splitlines()[-1])
        run = evaluate.read_run(file.parent)
        last = run["log"][-2] | run["log"][-1]
        if "knn" in last and last["epoch"] == run["flags"]["epochs"]:
            return last
    return None

def start(words, file):
    """Start a command; what it says besides its result goes to output.txt."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a") as out, open(file.with_name("output.txt"), "a") as log:
        return subprocess.Popen([sys.executable, HERE / words[0], *words[1:]], stdout=out,
                                stderr=log, env=dict(os.environ, OMP_NUM_THREADS="1"),
                                start_new_session=True)

def run_all(runs, jobs):
    """Run what is missing of `runs`, lists of commands, `jobs` at once. Returns whether all went
    well. A signal stops the programs that run, and a training saves what it has."""
    waiting = [[command for command in commands if result(command[1]) is None]
               for commands in runs]
    waiting = [commands for commands in waiting if commands]
    total = len(waiting)
    common.say(f"{total} runs are not finished")
    began = time.time()
    running = {}                                # program -> its command and those that follow it
    ended = failed = 0
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                commands = waiting.pop(0)
                running[start(*commands[0])] = commands
            time.sleep(0.1)
            for program in [program for program in running if program.poll() is not None]:
                (words, file), *following = running.pop(program)
                what = f"{file.parent} is done"
                if result(file) is None:
                    failed += 1
                    what = f"failed, see {file.with_name('output.txt')}: {shlex.join(words)}"
                elif following:
                    waiting.insert(0, following)
                    continue
                ended += 1
                left = (time.time() - began) / ended * (total - ended) / 60
                common.say(f"{ended} of {total}, about {left:.0f} min left: {what}")
    finally:
        for program in running:
            program.terminate()
        for program in running:
            program.wait()
    return not failed

# ============================================================================== what came out

def figures(entry, label, commands):
    """{column: figure} of one run, as far as it has finished; first what the paper has."""
    found = {}
    for answer in filter(None, [result(file) for _, file in commands[1:]]):
        if answer["task"] == "invariance":
            row = next(row for row in answer["rows"] if row["task"] == label)
            found |= {"h": row["h"], "g(h)": row["g(h)"]}
        elif answer["task"] == "finetune":
            key = "baseline_top1" if label == "supervised" else "top1"
            found |= {f"{100 * row['labels']:g} %": row[key] for row in answer["rows"]}
        elif answer["task"] == "detect":
            found["AP"] = answer["AP"]
        else:
            found["linear z" if answer.get("features") == "z" else "linear"] = answer["top1"]
    last = result(commands[0][1])
    if last and label != "supervised":          # a network of its own
        found |= {key: last[key] for key in [*entry["log"], "knn"]}
    return found

def agreement(ours, theirs):
    """(pairs in the paper's order, pairs) of the figures that both have, if they differ there."""
    both = [pair for pair in zip(ours, theirs) if None not in pair]
    pairs = [(a, b) for a, b in itertools.combinations(both, 2) if a[1] != b[1]]
    return sum((a[0] - b[0]) * (a[1] - b[1]) > 0 for a, b in pairs), len(pairs)

def summary(values):
    """Mean and spread over the seeds, and both as text."""
    if not values:
        return None, 0, "-"
    mean = statistics.fmean(values)
    spread = statistics.stdev(values) if len(values) > 1 else 0
    return mean, spread, f"{mean:.3g}" + (f" ± {spread:.2g}" if spread else "")

def report(name, args, runs):
    """The table, on the screen and in EXPERIMENTS.md, and the picture."""
    entry = EXPERIMENTS[name]
    key = name if args.data == "shapes" else f"{name}-{args.data}"
    found = {label: [figures(entry, label, runs[label, seed]) for seed in range(args.seeds)]
             for label in entry["rows"]}
    columns = dict.fromkeys(column for row in found.values() for one in row for column in one)
    columns = sorted(columns, key=lambda column: column in (*entry["log"], "knn"))
    if not columns:
        return
    table = []
    results = []                                # {column: (mean, spread, text)} of each row
    for label, (_, _, paper) in entry["rows"].items():
        cells = {column: summary([one[column] for one in found[label] if column in one])
                 for column in columns}
        published = " / ".join("-" if value is None else f"{value:g}" for value in paper)
        texts = {column: text for column, (_, _, text) in cells.items()}
        table.append({key: label, **texts, "paper": published})
        results.append(cells)
    theirs = [paper[0] for _, _, paper in entry["rows"].values()]
    orders = []
    for column in columns if columns[0] == "linear" else columns[:1]:
        same, pairs = agreement([cells[column][0] for cells in results], theirs)
        if pairs and column in (columns[0], "knn"):
            orders.append(f"{column} {same} of {pairs}")
    order = "The paper gives no numbers to compare with."
    if orders:
        order = f"Pairs of rows that have the paper's order: {', '.join(orders)}."
    question = f"{entry['asks']} Paper: {entry['shows']}."
    print(f"\n{question}")
    evaluate.print_table(table)
    print(order, flush=True)

    picture = Path("pictures/experiments", f"{key}.png")
    drawn = [column for column in columns if column not in entry["log"]][:2]
    panels = {column: [cells[column][:2] for cells in results] for column in drawn}
    if any(theirs):
        panels["the paper" + f", {columns[0]}" * (len(paper) > 1)] = [(it, 0) for it in theirs]
    draw(key, list(entry["rows"]), panels, picture)
    day = date.fromtimestamp(max(file.stat().st_mtime for commands in runs.values()
                                 for _, file in commands if file.exists()))
    extra = ["--", *args.extra] if args.extra else []
    command = ["python", "experiments.py", name, "--data", args.data, "--seeds", str(args.seeds)]
    rows = [table[0], ["---"] * len(table[0]), *(row.values() for row in table)]
    write_section(key, [
        f"## {key}", "", textwrap.fill(question, 100), "",
        *("| " + " | ".join(row) + " |" for row in rows), "",
        order, "", f"`{shlex.join(command + extra)}`, {day}", "", f"![{key}]({picture})"])

def write_section(key, lines):
    """The lines instead of those between the markers of `key` in EXPERIMENTS.md, or at its end. A
    paragraph at the end of a section that begins with "Note:", which people write, stays."""
    path = Path("EXPERIMENTS.md")
    text = path.read_text() if path.exists() else "# Experiments\n"
    begin, end = f"<!-- {key} -->\n", f"<!-- end {key} -->\n"
    before, found, rest = text.partition(begin)
    old, _, after = rest.partition(end)
    note = "".join(old.partition("\nNote: ")[1:])
    section = begin + "\n".join(lines) + "\n" + note + end
    text = before + "\n" * (not found) + section + after
    common.write_atomically(path, lambda file: file.write(text.encode()))

def draw(title, labels, panels, path):
    """A row for each of the labels. panels: title -> (value or None, spread) of each label."""
    grid = all(", " in label for label in labels)
    size = (5 * len(panels), 2 + (0.15 if grid else 0.45) * len(labels))
    figure, axes = common.pyplot().subplots(1, len(panels), figsize=size, layout="constrained",
                                            squeeze=False)
    figure.suptitle(title)
    for ax, (name, figures) in zip(axes[0], panels.items()):
        values, spread = np.array(figures, float).T             # nan for None
        ax.set_title(name)
        if grid:
            draw_grid(ax, labels, values)
        else:
            bars = ax.barh(labels, values, 0.6, xerr=spread if spread.any() else None)
            ax.bar_label(bars, fmt="%.1f", padding=4)
            ax.set_ylim(len(labels) - 0.5, -0.5)                # the first row on top
            ax.margins(x=0.15)
    path.parent.mkdir(parents=True, exist_ok=True)
    common.save_picture(figure, path)

def draw_grid(ax, labels, values):
    """A heat map; labels are "row, column"."""
    cells = [label.split(", ", 1) for label in labels]
    rows, columns = [list(dict.fromkeys(names)) for names in zip(*cells)]
    table = np.full((len(rows), len(columns)), math.nan)
    for (row, column), value in zip(cells, values):
        table[rows.index(row), columns.index(column)] = value
    ax.imshow(table, cmap="summer", aspect="auto")
    for i, j in np.argwhere(~np.isnan(table)):
        ax.text(j, i, f"{table[i, j]:.1f}", ha="center", va="center")
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows)

# ============================================================================== flags

def parse_args(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = common.LineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="experiments to run; without any they are listed")
    add("--data", choices=["shapes", "cifar10"], default="shapes", help="default shapes")
    add("--root", default="data", help="folder that holds cifar10 (default data)")
    add("--seeds", type=common.count, default=1, help="runs of each row, seeds from 0 (default 1)")
    add("--jobs", type=common.count, default=2, help="processes at once, of one thread (default 2)")
    add("--epochs", type=common.count, help="epochs of every run, to shorten it")
    add("--scale", choices=["small", "paper"], default="small",
        help="paper: print the paper's commands for 8 GPUs and run nothing")
    add("--dry-run", action="store_true", help="print the commands and run nothing")
    add("--output", metavar="DIR", default="runs/experiments",
        help="folder of the runs (default runs/experiments)")
    args = parser.parse_args(argv[:cut])
    args.extra = ["--epochs", str(args.epochs)] if args.epochs else []
    args.extra += argv[cut + 1:]
    unknown = [name for name in args.names if name not in EXPERIMENTS]
    if unknown:
        parser.error(f"{unknown[0]}: not one of {', '.join(EXPERIMENTS)}")
    return args

def main(args, device):
    if not args.names:
        print(f"On {args.data}, {args.jobs} at once, in minutes of two CPU cores:")
        for name, entry in EXPERIMENTS.items():
            print(f"{name:21} {minutes(entry, args):3.0f} min  {entry['asks']}")
        return
    if args.scale == "paper":
        print("\n".join(line for name in args.names for line in paper_commands(EXPERIMENTS[name])))
        return
    plans = {name: plan(EXPERIMENTS[name], args) for name in args.names}
    runs = {}                                   # those that experiments share, once
    for commands in itertools.chain(*(runs.values() for runs in plans.values())):
        train, file = commands[0]
        epochs(train)
        known = runs.setdefault(file.parent, [])
        known += [command for command in commands if command not in known]
    if args.dry_run:
        for words, _ in itertools.chain(*runs.values()):
            print("OMP_NUM_THREADS=1 python " + shlex.join(words))
        return
    common.load_data(args.data, args.root)      # a mistake shows before any work
    well = run_all(runs.values(), args.jobs)
    for name in args.names:
        report(name, args, plans[name])
    sys.exit(not well)

if __name__ == "__main__":
    common.launch(main, parse_args)
