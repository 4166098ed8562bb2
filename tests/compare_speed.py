"""Measure the code of today beside that of an earlier commit, in turns.

    python tests/compare_speed.py 0d0d397                 three rounds of everything
    python tests/compare_speed.py 0d0d397 --rounds 1 --only m2ist

In a round each figure is measured once with either code, one after the other, each time in a process
of its own with one thread. A line has the medians over the rounds and their ratio. 0d0d397 is the
last commit whose costs are those of plain code: it keeps attention maps, folds nothing, and encodes
a picture once for each of its expressions.
"""
import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Measure(NamedTuple):
    """One figure: a field of what evaluate.py --cost writes, on a batch of samples."""
    what: str
    method: str
    field: str                # "train_step_s" or "eval_s"
    batch: int
    expressions: int = 1      # per picture; the earlier code knows no more than one


MEASURES = [
    Measure("m2ist: step, 2 samples", "m2ist", "train_step_s", 2),
    Measure("full: step, 2 samples", "full", "train_step_s", 2),
    Measure("frozen: step, 2 samples", "frozen", "train_step_s", 2),
    Measure("m2ist: step, 8 samples", "m2ist", "train_step_s", 8),
    Measure("m2ist: step, 8 samples of 2 pictures (K = 4)", "m2ist", "train_step_s", 8, 4),
    Measure("m2ist: evaluation of 8 expressions of a picture", "m2ist", "eval_s", 8, 8),
    Measure("hivg: step, 8 samples", "hivg", "train_step_s", 8),
    Measure("hivg: evaluation, 8 samples", "hivg", "eval_s", 8),
    Measure("hivg: evaluation of 8 expressions of a picture", "hivg", "eval_s", 8, 8)]


def python(folder, *flags):
    """Run a script of a folder with one thread -> seconds."""
    began = time.time()
    subprocess.run([sys.executable, *flags], cwd=folder, check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return time.time() - began


def cost(measure, scratch, folder):
    """One figure of a folder's code, in seconds."""
    result = scratch / "cost.json"
    flags = ["--cost", measure.method, "--batch-size", str(measure.batch), "--device", "cpu"]
    if folder == ROOT and measure.expressions > 1:
        flags += ["--grow", "expressions", str(measure.expressions)]
    python(folder, "evaluate.py", *flags, "--json", str(result))
    return json.loads(result.read_text())[0][measure.field]


def evaluation(scratch, folder):
    """Seconds of evaluate.py on all of `shapes`, with all that it imports and loads."""
    run = scratch / f"run-{folder.name}"
    if not run.exists():
        python(folder, "train.py", "--limit", "64", "--epochs", "1", "--out", str(run),
               "--device", "cpu")
    return python(folder, "evaluate.py", str(run), "--limit", "100000", "--device", "cpu")


def compare(what, seconds, before, rounds):
    """Print the line of a figure. seconds: a function of the folder of the code"""
    old = []
    new = []
    for _ in range(rounds):
        old.append(seconds(before))
        new.append(seconds(ROOT))
    then = statistics.median(old)
    now = statistics.median(new)
    print(f"{what}: {then:.3f} s before, {now:.3f} s now, {now / then:.2f} of it", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("commit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="")
    asked = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        before = scratch / "before"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(before)], check=True)
        subprocess.run(["git", "checkout", "-q", asked.commit], cwd=before, check=True)

        measures = {measure.what: functools.partial(cost, measure, scratch)
                    for measure in MEASURES}
        measures["evaluate.py on shapes"] = functools.partial(evaluation, scratch)
        for what, seconds in measures.items():
            if asked.only in what:
                compare(what, seconds, before, asked.rounds)


if __name__ == "__main__":
    main()
