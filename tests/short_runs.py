"""Short runs of train.py, and what the tests ask of the folder of a run."""
import json
import pickle
from pathlib import Path

import torch
from PIL import Image

import model as m
import train

# 28 expressions in batches of 8 are three steps an epoch. Four expressions are left over, because a
# batch that is not full is dropped.
FAST = ["--size", "tiny", "--weights", "random", "--limit", "28", "--batch-size", "8",
        "--epochs", "3", "--warmup", "0", "--device", "cpu"]

# Two epochs of warm-up, two of stage 1, two of stage 2.
HIVG = ["--method", "hivg", "--epochs", "2", "--stages", "2", "--stage-epochs", "2", "--rank", "4"]

# What a line of the log says of the machine, and not of what was computed.
SPEED = {"seconds", "seconds_waiting_for_data", "samples_per_second", "peak_bytes"}


def add_dropout(patch):
    """Give the tiny models dropout, so that a random number that is drawn out of turn shows."""
    for encoders in ("detr", "clip"):
        size = m.SIZES[encoders, "tiny"]
        patch.setitem(size, "grounding", {**size["grounding"], "dropout": 0.1})


def run(out, *flags):
    """Train with the flags of FAST and some more, which win. Returns the folder of the run."""
    train.main([*FAST, "--out", str(out), *flags])
    return Path(out)


def inputs_of(batch):
    """The model's arguments for a whole batch."""
    return train.model_inputs(batch, 0, len(batch["boxes"]), "cpu")


def read_log(out):
    """The lines of log.jsonl as dictionaries."""
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def computed(out):
    """The lines of log.jsonl without what differs from one run of the same command to the next."""
    return [{name: line[name] for name in line if name not in SPEED} for line in read_log(out)]


def last_weights(out):
    """The tuned weights at the end of a run."""
    return torch.load(Path(out, "last.pt"), weights_only=True)["model"]


def same(a, b):
    """Whether two state dicts are equal bit by bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def up_and_down(ious):
    """A stand-in for train.scores. The accuracy depends on the model alone, and from epoch to epoch
    it goes up and down."""
    return {"acc@0.5": ious.mean().item() * 1e4 % 1, "mean_iou": 0.0}


def write_refcoco(root):
    """Write a small RefCOCO in REFER's format, an image an expression. Returns the flags that train
    on it."""
    refs, images, annotations = [], [], []
    folder = root / "images/train2014"
    folder.mkdir(parents=True)
    (root / "refcoco").mkdir()
    for number, split in enumerate(("train", "train", "train", "val", "testA")):
        name = f"COCO_train2014_{number:012}.jpg"
        Image.new("RGB", (120, 90), (200, 40 * number, 0)).save(folder / name)
        images.append({"id": number, "file_name": name})
        annotations.append({"id": number, "image_id": number, "bbox": [10, 20, 30 + number, 40]})
        refs.append({"ref_id": number, "ann_id": number, "image_id": number, "split": split,
                     "sentences": [{"sent": f"cup number {number} of the five on the left"}]})
    (root / "refcoco/refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    (root / "refcoco/instances.json").write_text(
        json.dumps({"images": images, "annotations": annotations}))
    return ["--dataset", "refcoco", "--root", str(root)]
