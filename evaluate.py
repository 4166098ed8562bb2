"""Evaluate a checkpoint of train.py.

    python evaluate.py runs/shapes-m2ist-0                          every split but train, as a table
    python evaluate.py runs/shapes-m2ist-0 --split val --json val.json
    python evaluate.py runs/shapes-m2ist-0 --figures pictures       and a sheet of predictions of each split

Acc@0.5 is the part of the expressions whose box has IoU >= 0.5 with the true one (M²IST Section IV-A b, HiVG Section
4.1); mean IoU is over all of them.
"""
import argparse
import json
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

import data
import train
from model import InputError, build_model


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="the --out folder of a run, or its best.safetensors")
    parser.add_argument("--dataset", help="shapes, or a FILE.jsonl (default: that of the training)")
    parser.add_argument("--root", help="folder that image paths start from (default: that of the training)")
    parser.add_argument("--split", action="append", help="only this split; may be given more than once (default: all but train)")
    parser.add_argument("--json", help="file to write the results to (default: none)")
    parser.add_argument("--figures", help="folder for a sheet of predictions of each split (default: none)")
    parser.add_argument("--batch-size", type=int, default=64, help="samples at once (default: 64)")
    parser.add_argument("--workers", type=int, help="processes that load pictures (default: as in training)")
    parser.add_argument("--limit", type=int, help="only the first N expressions of each split (default: as in training)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    return parser.parse_args(argv)


def read_config(path):
    """The config of a checkpoint: a file, or the --out folder of a run, of which best.safetensors is taken."""
    path = Path(path) / "best.safetensors" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; give the --out folder of a finished epoch, or its best.safetensors")
    try:
        with safe_open(path, "pt") as file:
            config = json.loads(file.metadata()["config"])
        return path, {key: config[key] for key in ("model", "frozen", "args", "epoch")} | config
    except Exception:
        raise InputError(f"{path}: not a checkpoint of this project (best.safetensors of an --out folder)") from None


def load_checkpoint(path):
    """A checkpoint -> (model in eval mode, config). The encoders behind it must be the ones it was trained on."""
    path, config = read_config(path)
    model = build_model(**config["model"])
    state = load_file(path)
    train.load_tuned(model, state, path)
    if train.frozen_fingerprint(model, state) != config["frozen"]:
        raise InputError(f"{path}: was trained on other encoder weights than these ({config['model']['weights']}); "
                         f"its boxes would be meaningless")
    return model.eval(), config


def leaky_pretraining(config):
    """Whether the vision encoder's pretraining has seen the pictures it is tested on: False, or None for not known."""
    return None if config["model"]["weights"] == "pretrained" else False


def evaluate_split(model, samples, args):
    """One row of the results; `seconds` is the whole pass, pictures loaded and all."""
    began = time.time()
    ious = train.predict(model, train.make_loader(samples, args, False), args)[2]
    return {**train.scores(ious), "expressions": len(samples), "images": len({s.image_id for s in samples}),
            "seconds": time.time() - began}


def make_folders(asked):
    """Where --json and --figures go, before minutes are spent on what could not be written."""
    for flag, folder in (("--json", asked.json and Path(asked.json).parent), ("--figures", asked.figures)):
        try:
            if folder:
                Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{flag}: cannot make the folder {folder} ({error.strerror})") from None


def main(argv=None):
    asked = parse_args(argv)
    train.check(asked)
    make_folders(asked)
    model, config = load_checkpoint(asked.checkpoint)
    # The flags of the training, with what was asked here in their place.
    said = {flag: value for flag, value in vars(asked).items() if value is not None}
    args = argparse.Namespace(**{**vars(asked), **config["args"], **said})
    if asked.dataset:
        args.root = asked.root                            # the training's folder is not another dataset's
    model.to(args.device)
    names = data.split_names(args.dataset, args.root)
    splits = {}
    print(f"{args.method} {args.size} on {args.dataset}, epoch {config['epoch']}")
    for split in asked.split or [name for name in names if name != "train"] or names:
        samples = data.load_samples(args.dataset, split, args.root)[:args.limit]
        row = splits[split] = evaluate_split(model, samples, args)
        print(f"{split:8}  Acc@0.5 {row['acc@0.5']:.4f}  mean IoU {row['mean_iou']:.4f}  {row['expressions']:6} expressions "
              f"of {row['images']} images in {row['seconds']:.1f} s")
        if args.figures:
            path = Path(args.figures) / f"{split}.png"
            train.picture_predictions(model, data.spread(samples), args, path)
            print(f"{'':8}  {path}")
    result = {"dataset": args.dataset, "method": args.method, "leaky_pretraining": leaky_pretraining(config),
              "splits": splits}
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    train.run(main)
