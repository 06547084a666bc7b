"""What test_evaluate.py starts: torchrun --nproc_per_node=2 evaluate_in_two_processes.py CHECKPOINT
OUTPUT runs four tasks of evaluate.py, detection on nine drawn scenes."""
import sys

import common
import detection
import evaluate

CHECKPOINT, OUTPUT = sys.argv[1:]
TASKS = [["knn", CHECKPOINT],
         ["linear", CHECKPOINT, "--no-augment", "--epochs", "3"],
         ["finetune", CHECKPOINT, "--labels", "2", "--epochs", "1", "--output", OUTPUT],
         ["detect", CHECKPOINT, "--steps", "2", "--batch-size", "4", "--rois", "8",
          "--output", OUTPUT]]

def evaluate_all(_, device):
    drawn = detection.drawn_scenes
    detection.drawn_scenes = lambda count, seed: drawn(9, seed)
    for args in TASKS:
        evaluate.main(evaluate.parse_args(args), device)

if __name__ == "__main__":
    common.launch(evaluate_all, lambda: None, resumes=False)
