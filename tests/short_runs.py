"""Short runs of train.py, and what the tests ask of the folder of a run."""
import json
from pathlib import Path

import torch

import model as m
import train
from test_data import as_refer, pictures

# 28 expressions in batches of 8 are three steps an epoch. Four expressions are left over, because a
# batch that is not full is dropped.
FAST = ["--size", "tiny", "--weights", "random", "--limit", "28", "--batch-size", "8",
        "--epochs", "3", "--warmup", "0", "--device", "cpu"]

# Two epochs of warm-up, two of stage 1, two of stage 2.
HIVG = ["--method", "hivg", "--epochs", "2", "--stages", "2", "--stage-epochs", "2", "--rank", "4"]


def add_dropout(patch):
    """Give the tiny models dropout, so that a random number that is drawn out of turn shows."""
    for spec in m.SIZES["tiny"].values():
        patch.setitem(spec, "grounding", {**spec["grounding"], "dropout": 0.1})


def run(out, *flags):
    """Train with the flags of FAST and some more, which win. Returns the folder of the run."""
    train.main([*FAST, "--out", str(out), *flags])
    return Path(out)


# What a line of the log says of the machine, and not of what was computed.
SPEED = {"seconds", "seconds_waiting_for_data", "samples_per_second", "peak_bytes"}


def inputs_of(batch):
    """The model's arguments for a whole batch."""
    return train.part_of(batch, 0, len(batch["boxes"]), "cpu")


def begin_run(model, args, out, number=0):
    """A run in a folder, at the beginning of one of its phases, by its number from 0."""
    args.out = str(out)
    Path(out).mkdir(parents=True, exist_ok=True)
    under_way = train.Run(model, args)
    phase = train.plan(args)[number]
    under_way.progress.epoch = phase.first
    train.begin(under_way, phase)
    return under_way, phase


def one_epoch(under_way, phase, loader):
    """Train one epoch of a run -> its line of the log."""
    with train.Signals(under_way) as signals:
        train.train_epoch(under_way, loader, phase, train.tqdm(disable=True), signals)
    return under_way.progress.log[-1]


def read_log(out):
    """The lines of log.jsonl as dictionaries."""
    lines = Path(out, "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def computed(out):
    """The lines of log.jsonl without what differs from one run of the same command to the next."""
    lines = []
    for line in read_log(out):
        lines.append({name: value for name, value in line.items() if name not in SPEED})
    return lines


def last_weights(out):
    """The tuned weights at the end of a run."""
    return torch.load(Path(out, "last.pt"), weights_only=True)["model"]


def same(a, b):
    """Whether two state dicts are equal bit by bit."""
    if a.keys() != b.keys():
        return False
    return all(torch.equal(a[name], b[name]) for name in a)


def up_and_down(ious):
    """A stand-in for train.scores. The accuracy depends on the model alone, and from epoch to epoch
    it goes up and down."""
    return {"acc@0.5": ious.mean().item() * 1e4 % 1, "mean_iou": 0.0}


def write_refcoco(root):
    """Write a small RefCOCO with its pictures. Returns the flags that train on it."""
    as_refer(root)
    pictures(root / "images/train2014")
    return ["--dataset", "refcoco", "--root", str(root)]
