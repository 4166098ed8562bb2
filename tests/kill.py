"""Kill runs at random moments, go on with --resume each time, and compare what comes out with runs
that were left alone.

    python tests/kill.py                  fifty kills
    python tests/kill.py --kills 6 --seed 1

SIGKILL can be caught by no program. It comes within a step, within the write of a file, in
evaluation, between two stages of LoRA, or before the first file. M²IST and HiVG are killed in turn:
a run is killed and resumed until it ends, and then its log, its last and its best weights must be
bitwise those of the run that was left alone, with each epoch once in log.jsonl.
"""
import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))    # the project's modules

import torch    # noqa: E402
from safetensors.torch import load_file    # noqa: E402

import train    # noqa: E402
from short_runs import FAST, HIVG, computed, last_weights, same    # noqa: E402

# Twelve steps an epoch, each followed by a last.pt and a log.jsonl, so that many kills fall into a
# write.
OFTEN = [*FAST, "--limit", "100", "--save-minutes", "0", "--log-every", "1"]
FLAGS = {"m2ist": OFTEN, "hivg": [*OFTEN, *HIVG]}
LONGEST = 4.0    # seconds that pass at most before a kill
MOST = 5         # kills of a run


def begin(flags):
    """Run train.py in a process of its own -> its number. It is a fork, which has imported all."""
    process = os.fork()
    if process > 0:
        return process
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, sys.stdout.fileno())
    os.dup2(quiet, sys.stderr.fileno())
    train.main(flags)
    os._exit(0)


def run_with_kills(out, flags, rng, most):
    """Run until the end, with at most so many kills -> (kills, kills within a write)."""
    kills = within_writes = 0
    while True:
        begun = (out / "args.json").exists()
        process = begin(["--out", str(out), *(["--resume"] if begun else flags)])
        if kills < most:
            time.sleep(rng.uniform(0, LONGEST))
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if status == 0:
            return kills, within_writes
        if status != signal.SIGKILL:
            sys.exit(f"a run failed with status {status}")
        kills += 1
        within_writes += any(out.glob("*.partial"))


def is_same_run(a, b):
    """Logs, last weights and best weights are equal bit by bit."""
    return (computed(a) == computed(b) and same(last_weights(a), last_weights(b)) and
            same(load_file(a / "best.safetensors"), load_file(b / "best.safetensors")))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rng = random.Random(asked.seed)

    with tempfile.TemporaryDirectory() as scratch:
        whole = {}
        torch.set_num_threads(1)    # OpenMP's threads would not survive a fork
        for method, flags in FLAGS.items():
            whole[method] = Path(scratch, f"whole-{method}")
            train.main(["--out", str(whole[method]), *flags])    # this imports everything, too

        kills = within_writes = runs = 0
        while kills < asked.kills:
            method = list(FLAGS)[runs % 2]
            out = Path(scratch, f"run-{runs}")
            most = min(MOST, -(-asked.kills // 2), asked.kills - kills)
            more, more_within = run_with_kills(out, FLAGS[method], rng, most)
            kills += more
            within_writes += more_within
            runs += 1
            if not is_same_run(whole[method], out):
                sys.exit(f"{method}: after {more} kills the run differs; --seed {asked.seed}")
            print(f"{method}: {more} kills, and the run is the same", flush=True)
    print(f"{kills} kills in {runs} runs, {within_writes} of them within the write of a file: all "
          f"runs are bitwise those that were left alone")


if __name__ == "__main__":
    main()
