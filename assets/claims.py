"""Test the papers' claims on `shapes`: does one row of their tables beat another one there, too?

    python assets/claims.py                      all claims
    python assets/claims.py m2ist/V hivg/3/1     the claims about a paper, a table or a row
    python assets/claims.py m2ist --limit 2400   other flags of train.py go to every run

This script runs `python train.py --row ROW --seed N --test` for all that is missing in runs/, as
many at a time as PyTorch has threads here. Then it prints tables in Markdown, and draws the
differences in runs/claims.png. If it is stopped, the same command goes on with what is missing.

The two rows of a claim have equally many epochs. Each takes its learning rates from equally many
factors, by its accuracy on val with a seed of its own. The two runs of a pair have one seed: they
see the same samples in the same order. Accuracy is the mean over the test splits. A claim is
supported if the 95% interval of the mean difference lies above its margin, contradicted if the
interval lies below, and inconclusive otherwise.
"""
import argparse
import functools
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # the project's modules

import data    # noqa: E402
import train    # noqa: E402
from evaluate import at_least    # noqa: E402

# (the claim, the row that should be better, the other row). The margin is 0 points, and -1 for "no
# worse".
CLAIMS = [
    ("M²IST is no worse than full fine-tuning", "m2ist/I/m2ist", "m2ist/I/full"),
    ("M²IST beats frozen encoders", "m2ist/I/m2ist", "m2ist/I/frozen"),
    ("M²IST beats Adapter", "m2ist/I/m2ist", "m2ist/I/adapter"),
    ("M²IST beats LoRA", "m2ist/I/m2ist", "m2ist/I/lora"),
    ("M²IST beats AdaptFormer", "m2ist/I/m2ist", "m2ist/I/adaptformer"),
    ("M²IST beats CM Adapter", "m2ist/I/m2ist", "m2ist/I/cm-adapter"),
    ("M²IST beats MRS-Adapter", "m2ist/I/m2ist", "m2ist/I/mrs-adapter"),
    ("LEA helps", "m2ist/V/b", "m2ist/V/a"),
    ("VEA helps", "m2ist/V/c", "m2ist/V/a"),
    ("VEA helps more than LEA", "m2ist/V/c", "m2ist/V/b"),
    ("LEA and VEA help", "m2ist/V/d", "m2ist/V/a"),
    ("IEA helps", "m2ist/V/e", "m2ist/V/a"),
    ("IEA helps beside LEA and VEA", "m2ist/V/f", "m2ist/V/d"),
    ("LEA and VEA help beside IEA", "m2ist/V/f", "m2ist/V/e"),
    ("mixed adapters beat LEA and VEA at both ports", "m2ist/VI/d", "m2ist/VI/a"),
    ("mixed adapters beat IEA at both ports", "m2ist/VI/d", "m2ist/VI/b"),
    ("IEA belongs at the attention port", "m2ist/VI/d", "m2ist/VI/c"),
    ("side beats sequential", "m2ist/VII/c", "m2ist/VII/a"),
    ("side beats parallel", "m2ist/VII/c", "m2ist/VII/b"),
    ("deep text layers beat shallow ones", "m2ist/VIII/c", "m2ist/VIII/a"),
    ("C_d of 128 beats 8", "m2ist/II/128", "m2ist/II/8"),
    ("IEA's bottleneck of 64 beats 32", "m2ist/IX/b", "m2ist/IX/a"),
    ("IEA's bottleneck of 128 beats 64", "m2ist/IX/c", "m2ist/IX/b"),
    ("M²IST with LoRA is no worse than without", "m2ist/X/d", "m2ist/X/c"),
    ("the bridge helps", "hivg/3/2", "hivg/3/1"),
    ("the bridge helps beside HiLoRA", "hivg/3/4", "hivg/3/3"),
    ("HiLoRA helps", "hivg/3/3", "hivg/3/1"),
    ("HiLoRA helps beside the bridge", "hivg/3/4", "hivg/3/2"),
    ("weights of n x L x H beat none", "hivg/4/6", "hivg/4/1"),
    ("weights of n x L x H beat 1 x 1 x H", "hivg/4/6", "hivg/4/3"),
    ("weights of n x L x H beat n x 1 x H", "hivg/4/6", "hivg/4/4"),
    ("weights of n x L x H beat n x L x 1", "hivg/4/6", "hivg/4/5"),
    ("the bridge's cross-attention helps", "hivg/4/6", "hivg/4/2"),
    ("the second stage helps", "hivg/5/2", "hivg/5/1"),
    ("the third stage helps", "hivg/5/3", "hivg/5/2"),
    ("HiLoRA in three stages beats two", "hivg/5/3", "hivg/5/4"),
    ("HiLoRA in three stages beats four", "hivg/5/3", "hivg/5/5"),
    ("shallow to deep beats deep to shallow", "hivg/5/3", "hivg/5/8"),
    ("the contrast helps", "hivg/9/3", "hivg/9/1"),
    ("the region-text constraint helps beside the contrast", "hivg/9/4", "hivg/9/3"),
    ("several levels beat the last one", "hivg/11/4", "hivg/11/1"),
    ("vanilla LoRA beats frozen CLIP", "hivg/fig4d/clip-vanilla-lora", "hivg/fig4d/original-clip"),
    ("HiLoRA beats vanilla LoRA", "hivg/fig4d/stage-3", "hivg/fig4d/vanilla-lora")]

# Student's t: 95% of the values lie within so many standard errors, by the number of seeds.
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
SEED_OF_TRIES = 100    # the runs that choose the rates have this seed, which the table never uses
CHOSEN_HERE = ("cost", "dataset", "method", "out", "resume", "root", "row", "seed", "size", "test")


# --- Runs. A run is a command line of train.py, as a tuple of words -------------------------------


@functools.cache
def options(*words):
    return train.parse_args(words)


def folder(run):
    return Path(options(*run).out)


def first_like(row):
    """The first row of the tables with the same options. Rows that are equal share their runs."""
    def meaning(name):
        return {**vars(options("--row", name)), "row": None, "title": None, "out": None}
    return next(other for other in train.ROWS if meaning(other) == meaning(row))


def command(row, flags):
    """The words of a row's runs. Where a row has fewer stages than the paper's own method, its
    warm-up is longer, so that all have equally many epochs. flags: the words that all runs share"""
    words = (*flags, "--row", first_like(row))
    args = options(*words)
    whole = options(*flags, "--method", row.partition("/")[0])
    epochs = args.epochs + train.plan(whole)[-1].last - train.plan(args)[-1].last
    if epochs < 1:
        raise data.InputError(f"row {row} has more stages than {whole.method}, and so a shorter "
                              f"warm-up: give {1 - epochs} more --epochs")
    return words if epochs == args.epochs else (*words, "--epochs", str(epochs))


def run_of(words, factor, seed):
    """A run of a row with all of its learning rates times a factor."""
    args = options(*words)
    rates = {"--lr": [args.lr], "--lr-encoder": [args.lr_encoder]}
    if args.stages and args.stage_lr:    # LoRA on DETR and BERT has --lr-encoder in its one stage
        rates["--stage-lr"] = args.stage_lr
    if factor != 1:    # else it is the run of the row without flags
        for flag, values in rates.items():
            words = (*words, flag, *(str(value * factor) for value in values))
    return (*words, "--seed", str(seed), "--test")


def check_folder(run):
    """Refuse a folder that holds a run with other options, such as those of an older version. In
    the table it would go unnoticed."""
    if (folder(run) / "args.json").is_file():
        saved = train.read_args(folder(run))
        for name, value in vars(options(*run)).items():
            if name not in train.CHANGES_NOTHING and saved.get(name) != value:
                raise data.InputError(f"{folder(run)} holds a run with {name} {saved.get(name)}, "
                                      f"not {value}: move it away")


def train_missing(runs):
    """Train the runs that have no test.json, each with one thread: for models this small that is
    faster than one run with all threads. After an error, Ctrl-C or SIGTERM those under way are
    stopped."""
    missing = [run for run in dict.fromkeys(runs) if not (folder(run) / "test.json").is_file()]
    bar = tqdm(desc="claims", total=len(missing), unit="run", disable=None)
    running = {}    # {run: its process}
    try:
        while missing or running:
            while missing and len(running) < torch.get_num_threads():
                run = missing.pop(0)
                running[run] = start(run)
            time.sleep(0.2)
            for run in [run for run in running if running[run].poll() is not None]:
                bar.update()
                if running.pop(run).returncode != 0:
                    raise data.InputError(f"the run {folder(run)} has failed: its output is in "
                                          f"{folder(run)}.txt")
    finally:
        for process in running.values():
            process.terminate()    # the run writes last.pt and ends
        for process in running.values():
            process.wait()


def start(run):
    """Start or resume a run in a process of its own."""
    words = [*run, "--resume"] if (folder(run) / "args.json").is_file() else run
    folder(run).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder(run)}.txt", "a") as log:
        # In a session of its own, as the second one of Ctrl-C and SIGTERM would end it at once.
        return subprocess.Popen([sys.executable, train.__file__, *words], stdout=log, stderr=log,
                                env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)


# --- What the runs say ----------------------------------------------------------------------------


def choose_factors(commands, factors):
    """Try each factor for each row, and print the accuracies on val -> {row: its factor}."""
    tries = {row: [run_of(words, factor, SEED_OF_TRIES) for factor in factors]
             for row, words in commands.items()}
    train_missing(itertools.chain(*tries.values()))
    taken = {}
    lines = []
    for row, runs in tries.items():
        reached = {}
        for factor, run in zip(factors, runs):
            log = [json.loads(line) for line in (folder(run) / "log.jsonl").open()]
            reached[factor] = 100 * max(line.get("val_acc@0.5", 0) for line in log)
        samples = data.load_samples("shapes", "val", limit=options(*runs[0]).limit)
        taken[row] = within_one_standard_error(reached, len(samples))
        lines.append([row, *(f"{value:.1f}" for value in reached.values()), f"x {taken[row]:g}"])
    print(f"Accuracy on val by learning rates, with seed {SEED_OF_TRIES}:\n")
    print_table(["row", *(f"x {factor:g}" for factor in factors), "taken"], lines)
    return taken


def within_one_standard_error(reached, samples):
    """The factor nearest to 1 among those whose accuracy is within one standard error of the
    highest one, as a smaller difference may be luck.
    reached: {factor: accuracy in %}, each measured on so many samples"""
    highest = max(reached.values())
    error = math.sqrt(highest * (100 - highest) / samples)
    good = [factor for factor, accuracy in reached.items() if accuracy >= highest - error]
    return min(good, key=lambda factor: (max(factor, 1 / factor), -reached[factor]))


def judge(differences, margin):
    """The mean of paired differences, half of its 95% interval, the verdict and its colour."""
    middle = mean(differences)
    half = T95[len(differences)] * stdev(differences) / math.sqrt(len(differences))
    if middle - half > margin:
        return middle, half, "supported", "green"
    if middle + half < margin:
        return middle, half, "contradicted", "red"
    return middle, half, "inconclusive", "dimgrey"


def print_table(head, lines):
    print(f"| {' | '.join(head)} |\n" + "|---" * len(head) + "|")
    for cells in lines:
        print(f"| {' | '.join(cells)} |")
    print()


def chart(findings):
    """A PIL image with the interval of each claim; a short grey line is its margin.
    findings: [(text, margin, mean, half, colour), ...]"""
    font = ImageFont.load_default(13)
    left = 20 + round(max(font.getlength(text) for text, *_ in findings))
    reach = math.ceil(max(1, *(abs(middle) + half for _, _, middle, half, _ in findings)))
    bottom = 24 * len(findings)
    image = Image.new("RGB", (left + 432, bottom + 24), "white")
    pen = ImageDraw.Draw(image)

    def x_of(points):
        return left + (points + reach) / (2 * reach) * 420

    for mark in (-reach, 0, reach):
        pen.line((x_of(mark), 4, x_of(mark), bottom), "lightgrey")
        pen.text((x_of(mark), bottom + 4), str(mark), "black", font, anchor="mt")
    for y, (text, margin, middle, half, colour) in zip(range(12, bottom, 24), findings):
        pen.text((6, y), text, "black", font, anchor="lm")
        pen.line((x_of(margin), y - 7, x_of(margin), y + 7), "grey")
        pen.line((x_of(middle - half), y, x_of(middle + half), y), colour, 2)
        pen.circle((x_of(middle), y), 4, colour)
    return image


# --------------------------------------------------------------------------------------------------


def is_about(claim, name):
    return any(f"{row}/".startswith(f"{name}/") for row in claim[1:])


def parse_args(argv):
    """What is asked, and the words that go to every run."""
    parser = argparse.ArgumentParser(
        usage="python assets/claims.py [NAME ...] [options]", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=5, choices=list(T95), metavar="N",
                        help="seeds of each row, 2 to 10 (default: 5)")
    parser.add_argument("--rates", type=at_least(0.01, float), nargs="+", default=[0.5, 1.0, 2.0],
                        metavar="X", help="factors of the learning rates to try (default: 0.5 1 2)")
    # Names come first, so that no value of a flag of train.py is taken for one.
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    asked, flags = parser.parse_known_args(argv[len(names):])
    for name in names:
        if not any(is_about(claim, name) for claim in CLAIMS):
            tables = dict.fromkeys(row.rpartition("/")[0] for _, row, _ in CLAIMS)
            raise data.InputError(f"there is no claim about {name}; there are claims about m2ist, "
                                  f"hivg, {', '.join(tables)}")
    asked.claims = [claim for claim in CLAIMS
                    if not names or any(is_about(claim, name) for name in names)]
    for name in vars(train.build_parser().parse_args(flags)):
        if name in CHOSEN_HERE:
            raise data.InputError(f"--{name}: leave it out, as this script chooses its runs itself")
    return asked, ("--device", "cpu", *flags)    # a later --device wins


def main(argv=None):
    asked, flags = parse_args(sys.argv[1:] if argv is None else argv)
    seeds = range(asked.seeds)
    factors = list(dict.fromkeys(asked.rates))
    commands = {row: command(row, flags) for _, *rows in asked.claims for row in rows}
    # A refusal after the first runs would come hours too late.
    for key in itertools.product(commands.values(), factors, (*seeds, SEED_OF_TRIES)):
        check_folder(run_of(*key))

    signal.signal(signal.SIGTERM, signal.default_int_handler)    # SIGTERM is like Ctrl-C
    taken = dict.fromkeys(commands, factors[0])
    if len(factors) > 1:
        taken = choose_factors(commands, factors)
    # Seed after seed, so that all rows are equally far if the script is stopped.
    runs = {(row, seed): run_of(commands[row], taken[row], seed)
            for seed, row in itertools.product(seeds, commands)}
    train_missing(runs.values())
    reached = {row: [] for row in commands}    # accuracies in %, by seed
    for (row, _), run in runs.items():
        splits = json.loads((folder(run) / "test.json").read_text())
        reached[row].append(100 * mean(split["acc@0.5"] for split in splits.values()))

    lines = []
    findings = []
    for text, better, other in asked.claims:
        margin = -1 if "no worse" in text else 0
        differences = [a - b for a, b in zip(reached[better], reached[other])]
        middle, half, verdict, colour = judge(differences, margin)
        rows = f"{better} - {other}" + (" > -1" if margin else "")
        lines.append([text, rows, f"{middle:+.1f} ± {half:.1f}", verdict])
        # Pillow's font has no ².
        findings.append((f"{text.replace('²', '2')}: {verdict}", margin, middle, half, colour))
    print_table(["claim", "rows", "difference in points, 95% interval", "verdict"], lines)
    lines = []
    for row, values in reached.items():
        lines.append([row, f"x {taken[row]:g}", *(f"{value:.1f}" for value in values),
                      f"{mean(values):.1f} ± {stdev(values):.1f}"])
    head = ["row", "rates", *(f"seed {seed}" for seed in seeds), "mean ± deviation"]
    print_table(head, lines)
    chart(findings).save("runs/claims.png")
    print("look at runs/claims.png")


if __name__ == "__main__":
    data.run_command(main)
