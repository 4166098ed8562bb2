"""Train a grounding model: one command, one loop.

    python train.py                         m2ist on `shapes`, minutes on a CPU
    python train.py --method hivg           a warm-up, then HiLoRA in stages
    python train.py --dataset refcoco       M²IST at full size
    python train.py --row m2ist/V/b         a row of the papers' tables
    python train.py --row list              all of these rows
    python train.py --claims                try the papers' claims on `shapes`
    python train.py --out runs/x --resume   continue where the run stopped
    torchrun --nproc-per-node 4 train.py --dataset refcoco    on four GPUs

The folder --out receives
    args.json          every option of the run, the versions of the packages
    lock               which process trains here now, or did so last
    log.jsonl          an object for each epoch, and each --log-every steps
    best.safetensors   the tuned weights of the best epoch, for evaluate.py
    last.pt            everything that --resume needs
    val.png            predictions of the best weights
    test.json          with --test, the accuracy on the splits but train and val

The file reads in this order: recipes, options, the loop, phases, data for the loop, saving and
resuming, rows of the papers' tables, claims, main.

Where this file differs from a paper or its released code ("code"):

[D12] learning rate of the encoders in full fine-tuning
    paper   1e-5 for M³ISA; no rate is given for encoders that are trained in full
    code    1e-5 for the adapters
    here    1e-5 for both
    why     nothing better is known

[D21] batch of HiVG
    paper   60 in Section 4.1, 80 in Table 8
    code    80 in the warm-up, 60, 60, 40 in the stages, on each of seven GPUs at the same rates
    here    80 (L: 32) on one GPU, at the paper's rates
    why     Table 8 gives base and large apart, Section 4.1 gives one number. A sample then moves
            the weights seven times as far as in the released code; rates in proportion to the
            batch would be --lr 3.6e-5 --lr-encoder 3.6e-5 --stage-lr 1.9e-5 0.95e-5 0.71e-5

[D27] what HiVG's first phase trains
    paper   "the grounding encoder, regression head"
    code    the bridges too (L: without them)
    here    the bridges are trained in every phase
    why     Fig. 4 (d) shows HiVG without HiLoRA but with bridges

[D33] weights that a stage starts from
    paper   says nothing
    code    the weights of the stage before that were best on val
    here    the same; if the best are older than the last stage, that stage is undone in each layer
    why     a checkpoint lacks the layers that only a later stage has changed, and keeping those
            would mix two stages

[D35] loss of original CLIP in Fig. 4 (d)
    paper   "without using HiLoRA, cross-modal bridge, and RTCC constraint etc.", Appendix C
    code    does not contain this run
    here    the box loss alone
    why     "etc." may mean the contrast, which has nothing to train in frozen CLIP

[D41] Table IX
    paper   C_i of 64, 128, 256
    code    does not contain these runs
    here    IEA's bottleneck of 32, 64, 128 with C_i = 256
    why     these give the table's 2.00, 2.40 and 3.19M; C_i itself is --interaction-dim

[D42] Table 9
    paper   prints both ticks in lines 3 and 4
    code    does not contain these runs
    here    line 3 is CLC without RTCC
    why     this is the one combination that is missing

[D43] rows of the tables on the tiny encoders
    paper   its rows are for full size
    code    does not contain the tiny size
    here    layer numbers are scaled to the depth of the tiny encoders, on DETR and BERT to two
            pairs of layers; bottlenecks are a fourth, epochs of a stage a twentieth
    why     a row should say the same at any size

[D48] the DETR that M²IST starts from
    paper   pretrained on COCO without the val and test pictures of RefCOCO, RefCOCO+, RefCOCOg
    code    TransVG's files, of which the README names one that leaks
    here    DETR's official file, which has seen these pictures, if --vision-weights names no other;
            `leaky pretraining True` stands beside every accuracy
    why     it is the one file with an address of its own; `python data.py --help` names the others
"""
import argparse
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import hilora
import losses
from data import InputError, one_of, run_command, write_atomically
from model import (DETR_URL, METHODS, MODEL_OPTIONS, SIZES, Option, architecture, build_model,
                   check_option, count_parameters, has_lora, make_tokenizer, on_clip, read_state,
                   tuned_groups)

# ---------------------------------------------------------------------------------------------
# Recipes: the defaults that depend on the run. The key of a row is a set of words. The row applies
# if each of its words is the run's encoders ("clip" for hivg and clip-*, "detr" for the others), or
# its size, method or dataset. Where two rows apply, the lower one wins.

RECIPES = {
    "detr": dict(l1=1.0, giou=1.0, contrast=0.0, focal=0.0, dice=0.0, stage_epochs=0, stage_lr=[]),
    # M²IST Section IV-B c; the batch of Table I. 1e-5 is the paper's rate for M³ISA [D12].
    "detr base": dict(epochs=90, batch_size=64, lr=1e-4, lr_encoder=1e-5, schedule="step",
                      lr_drop=60, warmup=0),
    "detr base refcoco+": dict(epochs=180, lr_drop=120),
    "detr base refcocog-umd": dict(max_tokens=40),       # as released
    "detr base refcocog-google": dict(max_tokens=40),
    # Ours, found on `shapes`: 1,500 steps in all, so a larger rate and a warm-up. Without the
    # attention loss (D49 in losses.py) a run predicts the mean box for hundreds of steps.
    "detr tiny": dict(epochs=2, batch_size=32, lr=1e-3, lr_encoder=1e-3, schedule="linear",
                      lr_drop=1, warmup=100, weight_decay=0.1, attention_loss=0.3),
    # Adapters start from nothing and take the whole rate; pretrained encoders take a tenth of it.
    "full tiny": dict(lr_encoder=1e-4),

    # HiVG Section 4.1 and Table 8 [D21].
    "clip": dict(l1=2.0, giou=2.0, contrast=1.0, focal=20.0, dice=2.0, epochs=50, lr=2.5e-4,
                 lr_encoder=2.5e-4, schedule="cosine", lr_drop=50, warmup=0),
    "clip base": dict(batch_size=80, stage_epochs=20, stage_lr=[1e-4, 0.5e-4, 0.25e-4]),
    "clip large": dict(batch_size=32, stage_epochs=15, stage_lr=[1e-4, 0.75e-4, 0.5e-4, 0.25e-4]),
    # Ours: five epochs in all, for hivg, plain CLIP and CLIP with LoRA alike.
    "clip tiny": dict(epochs=2, batch_size=32, lr=2e-3, lr_encoder=2e-3, schedule="linear",
                      warmup=100, weight_decay=0.1, attention_loss=0.3, stage_epochs=1,
                      stage_lr=[1.5e-3, 1e-3, 7e-4]),
    "clip tiny shapes": dict(limit=12_000),    # of 24,000, so that a run takes minutes
    # HiVG Fig. 4 (d): the box loss alone [D35]. The one stage of vanilla LoRA is as long as all
    # stages of HiLoRA.
    "clip-frozen": dict(contrast=0.0, focal=0.0, dice=0.0),
    "clip-lora": dict(contrast=0.0, focal=0.0, dice=0.0, stage_epochs=60),
    "clip-frozen tiny": dict(epochs=5),
    "clip-lora tiny": dict(stage_epochs=3)}


# ---------------------------------------------------------------------------------------------
# Options. Those of the model are declared in model.py, those of a run here; each has one flag.

def has_region_text(spec):
    """methods with the region-text constraint"""
    return on_clip(spec) and spec["region_text"]


RUN_OPTIONS = [
    Option("method", str, "run", "Method of a paper.", "M²IST Table I, HiVG Fig. 4 d",
           default="m2ist", choices=METHODS),
    Option("dataset", str, "run", f"Train on {', '.join(data.DATASETS)}, shapes, a FILE.jsonl, or "
           f"several of them joined by commas, by the longest recipe and the most tokens of the "
           f"parts.", "ours", default="shapes"),
    Option("size", str, "run", "Size of the model; tiny for shapes, else base.", "ours",
           choices=SIZES),
    Option("row", str, "run", "Run this row of the papers' tables, m2ist/V/b say; `list` lists "
           "them.", "the papers' tables"),
    Option("out", str, "run", "Folder of the run; if not given, runs/DATASET-METHOD-SEED and all "
           "flags that change what is computed.", "ours"),
    Option("resume", bool, "run", "Continue the run in --out, with its own options; --epochs N "
           "makes it longer.", "ours", default=False),
    Option("save_minutes", float, "run", "Write last.pt within an epoch, too, after so many minutes.",
           "ours", default=10.0, at_least=0),
    Option("log_every", int, "run", "Write a line to log.jsonl each N steps, too.", "ours",
           default=100, at_least=1),
    Option("test", bool, "run", "At the end, evaluate the best weights on the splits but train and val, "
           "too, and write test.json.", "ours", default=False),
    Option("seed", int, "run", "Seed of new weights, order and transforms.", "ours", default=0),
    Option("root", str, "data", "Folder of annotations and pictures; `data`, or that of a .jsonl.",
           "ours"),
    Option("draft", bool, "data", "Decode a JPEG at 1/2, 1/4 or 1/8 of its size where its longer side "
           "still has that of the model's square, or twice as much in training, which crops. That "
           "takes less time. Pixels are then slightly different, in evaluation, too.", "ours",
           default=False),
    Option("limit", int, "data", "Use only the first N expressions of each split.", "ours",
           at_least=1),
    Option("weights", str, "weights", "Weights of the encoders; shapes for tiny, else pretrained.",
           "ours", choices=("pretrained", "shapes", "random")),
    Option("epochs", int, "training", "Epochs, without those of --stage-epochs.",
           "M²IST IV-B c, HiVG 4.1", at_least=1),
    Option("batch_size", int, "training", "Samples for one optimizer step.",
           "M²IST Table I, HiVG Table 8", at_least=1),
    Option("expressions_per_image", int, "training", "K: let up to K expressions of a picture share it "
           "in a step, which costs less, as M²IST encodes the picture once for all of them. They "
           "share its transforms, too, which suit all of their texts, so the samples of a batch "
           "vary less; an epoch has the same samples and as many steps.", "ours", default=1,
           at_least=1),
    Option("lr", float, "training", "Learning rate of the grounding encoder.",
           "M²IST IV-B c, HiVG Table 8", at_least=0),
    Option("lr_encoder", float, "training", "Learning rate of all else that is tuned.",
           "M²IST IV-B c, HiVG Table 8", at_least=0),
    Option("schedule", str, "training", "step: a tenth after --lr-drop epochs; cosine, linear: to zero.",
           "M²IST IV-B c, HiVG's released code", choices=("step", "cosine", "linear")),
    Option("lr_drop", int, "training", "Epochs before the step.", "M²IST IV-B c", at_least=1),
    Option("warmup", int, "training", "Steps over which the rates rise linearly at the start of a "
           "phase.", "released code", at_least=0),
    Option("weight_decay", float, "training", "Weight decay of AdamW.", "M²IST IV-B c",
           default=1e-4, at_least=0),
    Option("last_stage", int, "HiVG", "Stop after this stage.", "HiVG Table 5", at_least=1,
           only=has_lora, flag=False),
    Option("stage_epochs", int, "HiVG", "Epochs of each stage; 0: the stages share --epochs, and "
           "no phase without LoRA precedes them.", "HiVG Table 8", at_least=0, only=has_lora),
    Option("stage_lr", float, "HiVG", "Rate of each stage; the last one serves all further stages.",
           "HiVG Table 8", at_least=0, several="+", only=has_lora),
    Option("l1", float, "losses", "Weight of smooth L1.", "M²IST Eq. (6), HiVG Table 8",
           at_least=0),
    Option("beta", float, "losses", "β of smooth L1; 0 is plain L1.", "released code, D1",
           default=0.0, at_least=0),
    Option("giou", float, "losses", "λ of M²IST Eq. (6), the weight of GIoU.",
           "released code, HiVG Table 8", at_least=0),
    Option("contrast", float, "losses", "Weight of HiVG Eq. (11).", "HiVG Eq. (15)", at_least=0,
           only=on_clip),
    Option("focal", float, "losses", "λ_focal of HiVG Eq. (13).", "HiVG Table 8", at_least=0,
           only=has_region_text),
    Option("dice", float, "losses", "λ_dice of HiVG Eq. (13).", "HiVG Table 8", at_least=0,
           only=has_region_text),
    Option("attention_loss", float, "losses", "Weight of a loss that draws [REG]'s attention into the "
           "box.", "ours, D49", default=0.0, at_least=0),
    Option("clip_norm", float, "training", "Scale gradients down to this norm; 0 leaves them.",
           "released code", default=0.0, at_least=0),
    Option("device", str, "machine", "cpu, cuda, cuda:1, ...", "ours",
           default="cuda" if torch.cuda.is_available() else "cpu"),
    Option("amp", str, "machine", "Mixed precision; tf32 is float32 with faster matrix products on a "
           "GPU.", "released code", default="off", choices=("off", "tf32", "bf16", "fp16")),
    Option("compile", bool, "machine", "Compile the model by torch.compile: a minute or more at the "
           "start, then faster steps on a GPU.", "ours", default=False),
    Option("micro_batch", int, "machine", "Samples on the device at once, in training and on val; "
           "their gradients add up to those of the batch. HiVG's contrast is then within a "
           "micro-batch.", "ours; default: the whole batch", at_least=1),
    Option("workers", int, "machine", "Processes that load pictures; 0 for shapes, else 2.", "ours",
           at_least=0)]

OPTIONS = {option.name: option for option in [*RUN_OPTIONS, *MODEL_OPTIONS]}
GROUPS = ("run", "data", "weights", "training", "M²IST", "HiVG", "losses", "machine")
CHANGES_A_ROW = ("weights", "training", "M²IST", "HiVG", "losses")    # groups, see `title`
# Options that change nothing of what a run computes, apart from the last bits of its sums. A resumed
# run may change them.
MAY_CHANGE = ("device", "workers", "save_minutes", "log_every", "resume", "out", "test")


def all_defaults():
    """The defaults of all options. What an older version wrote may lack the newest options."""
    return {name: option.default for name, option in OPTIONS.items()}


def build_parser(args=None):
    """The parser. Its result holds only the options that are on the command line. With `args`, the
    resolved options of a run, its help shows the defaults of that run."""
    parser = argparse.ArgumentParser(
        description=__doc__[:__doc__.index("The file reads")].rstrip(), add_help=False,
        argument_default=argparse.SUPPRESS, usage="python train.py [options]",
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, width=80))
    for name in GROUPS:
        group = parser.add_argument_group(name)
        for option in OPTIONS.values():
            if option.group == name and option.flag:
                add_flag(group, option, args)
        if name == "run":
            # These make a command of their own, so that they are not options of a run.
            group.add_argument("--claims", nargs="*", metavar="NAME",
                               help="Try what the papers claim of their rows, on shapes: run what is "
                               "missing, and print a table. NAME is m2ist, hivg, a table, such as "
                               "m2ist/V, or a row; without a name all claims are tried.")
            group.add_argument("--seeds", type=int, metavar="N",
                               help="For --claims: how many seeds a row is trained with. (default: 5)")
            tried = " ".join(f"{factor:g}" for factor in FACTORS_TO_TRY)
            group.add_argument("--rates", type=float, nargs="+", metavar="X",
                               help="For --claims: what a row's learning rates are multiplied by. "
                               "Each row tries all of them, with a seed that the table does not "
                               "use. Of those within one standard error of the best one on val, "
                               "the row takes the nearest to its recipe. With 1 alone all rows have "
                               f"the rates of their recipes, and no rate is tried. (default: {tried})")
            group.add_argument("-h", "--help", action="store_true",
                               help="Show this help with the defaults of this command line.")
    return parser


def add_flag(group, option, args):
    """Add the flag of an option to a group of the parser."""
    text = option.help
    if option.choices is not None:
        text += f" One of {', '.join(option.choices)}."
    if args is not None and applies(option, args):
        text += f" ({source_of(option, args)}; default: {shown(option, args)})"
    elif args is not None:
        text += f" ({option.source}; not for {args.method})"
    flag = f"--{option.name.replace('_', '-')}"
    if option.type is bool:
        group.add_argument(flag, action="store_true", help=text)
    else:
        metavar = {int: "N", float: "X", str: "NAME"}[option.type]
        group.add_argument(flag, type=option.type, nargs=option.several, metavar=metavar, help=text)


def source_of(option, args):
    """Where the default of an option comes from, in a run with this method and size."""
    words = {METHODS[args.method]["encoders"], args.method, args.size}
    source = option.source
    for row, defaults in RECIPES.items():
        if set(row.split()) <= words and option.name in defaults:
            source = option.source
            if "tiny" in row.split():
                source = "ours at size tiny"
    return source


def applies(option, args):
    """Whether the method of a run takes an option."""
    if option.only is None:
        return True
    return option.only(architecture(args.method, args.size, **model_options(args)))


def shown(option, args):
    """The value of an option as --help and the start of a run show it."""
    value = getattr(args, option.name)
    if value is None:
        return "none"
    if option.type is bool:
        return "on" if value else "off"
    if option.several:
        return " ".join(str(part) for part in value) or "none"
    return str(value)


def parse_args(argv=None):
    """The options of a run, every one of them resolved, as a Namespace."""
    given = vars(build_parser().parse_args(argv))
    asks_for_help = given.pop("help", False)
    if given.get("row") == "list":
        print_rows()
        sys.exit()
    if "claims" in given and not asks_for_help:
        try_claims(given)
        sys.exit()
    for name in ("claims", "seeds", "rates"):
        if given.pop(name, None) is not None and not asks_for_help:
            raise InputError(f"--{name} is for --claims: give --claims too, or leave --{name} out")

    out = given.get("out") or default_out(given)
    if given.get("resume"):
        saved = read_args(Path(out))
        refuse_changes(given, saved)
        args = argparse.Namespace(**{**saved, **given})
    else:
        args = resolve(given)
    args.out = out

    if asks_for_help:
        build_parser(args).print_help()
        sys.exit()
    check_device(args.device)
    return args


def default_out(given):
    """runs/DATASET-METHOD-SEED, or with the row's name where a row is given. The other flags that
    change what a run computes follow, so that runs which differ have folders that differ."""
    datasets = given.get("dataset", OPTIONS["dataset"].default).split(",")
    stems = ",".join(Path(dataset).stem for dataset in datasets)
    name = given.get("row") or given.get("method") or OPTIONS["method"].default
    parts = [stems, name.replace("/", "-"), str(given.get("seed", 0))]
    said = (*MAY_CHANGE, "dataset", "row", "method", "seed", "root")
    for flag in OPTIONS:
        if flag in given and flag not in said:
            parts.append(f"{flag}={short(given[flag])}")
    return "runs/" + "-".join(parts)


def short(value):
    """The value of a flag as a part of a folder's name."""
    if isinstance(value, list):
        return "+".join(str(part) for part in value) or "none"
    return Path(str(value)).name    # of a file, the name alone


def recipe(method, size, dataset):
    """The rows of RECIPES that apply to a run, joined. Several datasets that are joined by commas
    take the longest recipe of their parts, and the most tokens."""
    parts = [recipe_of_one(method, size, name) for name in dataset.split(",")]
    longest = max(parts, key=epochs_of)
    tokens = [part["max_tokens"] for part in parts if "max_tokens" in part]
    if tokens:
        longest["max_tokens"] = max(tokens)
    return longest


def recipe_of_one(method, size, dataset):
    """The rows of RECIPES that apply to a run on one dataset, joined."""
    words = {METHODS[method]["encoders"], method, size, dataset}
    found = {}
    for row, defaults in RECIPES.items():
        if set(row.split()) <= words:
            found.update(defaults)
    return found


def epochs_of(found):
    """The epochs of a recipe. Size large has no recipe on DETR, which is refused later."""
    return found.get("epochs", 0)


def resolve(given):
    """Give every option a value -> Namespace. Where several places have a value, a later one wins:
    the option's own default, SIZES, METHODS, RECIPES, the row of --row, what is `given`."""
    dataset = given.get("dataset", OPTIONS["dataset"].default)
    size = given.get("size")
    if size is None:
        size = "tiny" if dataset == "shapes" else "base"
    row = row_options(given["row"], size) if "row" in given else {}
    for name, value in row.items():
        if given.get(name, value) != value:
            raise InputError(f"--row {given['row']} has {name} {value}: leave out "
                             f"--{name.replace('_', '-')}, or leave out --row and give its flags")
    method = given.get("method") or row.get("method") or OPTIONS["method"].default
    one_of("--method", method, METHODS)

    # 1. What somebody chose: the recipe, the row, the command line.
    chosen = {**recipe(method, size, dataset), **row, **given}

    # 2. The options of the model; None where the method does not take an option.
    of_model = {o.name: chosen[o.name] for o in MODEL_OPTIONS if o.name in chosen}
    spec = architecture(method, size, **of_model)
    values = all_defaults()
    for option in MODEL_OPTIONS:
        applies = option.only is None or option.only(spec)
        values[option.name] = spec[option.name] if applies else None

    # 3. All options, and the checks of those on the command line.
    values.update(chosen, method=method, size=size, dataset=dataset)
    for name, value in given.items():
        check_option(OPTIONS[name], value, spec, method)

    # 4. Defaults that follow from other options.
    if values["weights"] is None:
        values["weights"] = "shapes" if size == "tiny" else "pretrained"
    if values["micro_batch"] is None:
        values["micro_batch"] = values["batch_size"]
    if values["workers"] is None:
        values["workers"] = 0 if dataset == "shapes" else 2
    if on_clip(spec):
        # Without the losses of Eq. (13) there is nothing that would train the MLP of Eq. (12).
        values["region_text"] = values["focal"] > 0 or values["dice"] > 0
    check_stages(values, spec)
    return argparse.Namespace(**values)


def check_stages(values, spec):
    stages = spec["stages"]
    epochs = values["epochs"]
    if stages > 0 and values["stage_epochs"] == 0 and epochs % stages != 0:
        raise InputError(f"--epochs is {epochs}, which --stages {stages} cannot share: give a "
                         f"multiple of {stages}, or --stage-epochs of 1 or more")
    if values["last_stage"] is not None and values["last_stage"] > stages:
        raise InputError(f"the last stage is {values['last_stage']}, but --stages is {stages}")


def check_device(device):
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {device} cannot be used ({reason}); try --device cpu") from None


def refuse_changes(given, saved):
    """Refuse flags that contradict the run that is to be resumed. A run may be made longer, unless
    it has stages, whose epochs would come later."""
    for name, value in given.items():
        if name in MAY_CHANGE or value == saved.get(name):
            continue
        if name == "micro_batch" and not saved.get("contrast"):
            continue    # which changes HiVG's contrast, and nothing else
        if name == "epochs" and not saved.get("stages") and value > saved[name]:
            print(f"the run goes on to epoch {value}; up to now its end was {saved[name]}. From here "
                  f"on its rates are those of a run of {value} epochs, which with --schedule cosine "
                  f"or linear are higher at first than the last ones were")
            continue
        raise InputError(f"--{name.replace('_', '-')} is {value}, but the run in --out has "
                         f"{saved.get(name)}: leave the flag out to resume the run, or start a "
                         f"new run in another --out")


def title(args):
    """The row of a run, or else its method. Of a row, with the flags that depart from it."""
    if args.row is None:
        return args.method
    row = resolve({"row": args.row, "size": args.size, "dataset": args.dataset})
    changed = []
    for option in OPTIONS.values():
        departs = getattr(args, option.name) != getattr(row, option.name)
        if option.group in CHANGES_A_ROW and departs:
            changed.append(f"{option.name} {shown(option, args)}")
    if not changed:
        return args.row
    return f"{args.row} changed ({', '.join(changed)})"


def print_recipe(args):
    """Print the resolved options, one group a line."""
    for group in GROUPS:
        parts = []
        for option in OPTIONS.values():
            given = getattr(args, option.name) is not None
            if option.group == group and given and applies(option, args):
                parts.append(f"{option.name} {shown(option, args)}")
        if parts:
            print(f"{group}: {', '.join(parts)}")
    if "," in args.dataset:
        print("joined datasets: the default of epochs is the longest of the parts, that of "
              "max_tokens the largest")


# ---------------------------------------------------------------------------------------------
# The loop

class Means:
    """Means over the samples of some steps, and the speed of these steps. The arguments are what
    `state` returned, where a resumed run goes on with them."""

    def __init__(self, sums=None, counts=None, samples=0, skipped=0, seconds=0.0, waited=0.0):
        self.sums = dict(sums or {})        # {name: sum over the samples}
        self.counts = dict(counts or {})    # {name: how many samples have this value}
        self.samples = samples
        self.skipped = skipped              # steps without an update, see train_step
        self.began = time.time() - seconds
        self.waited = waited                # seconds in which the loop waited for the next batch

    def add(self, values, samples):
        """Count values that are means over so many samples: {name: number}."""
        self.samples += samples
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * samples
            self.counts[name] = self.counts.get(name, 0) + samples

    def read(self):
        return {name: total / self.counts[name] for name, total in self.sums.items()}

    def speed(self, device):
        """What these steps cost."""
        seconds = time.time() - self.began
        return {"seconds": seconds, "seconds_waiting_for_data": self.waited,
                "samples_per_second": self.samples / seconds, "peak_bytes": peak_bytes(device)}

    def state(self):
        return {"sums": self.sums, "counts": self.counts, "samples": self.samples,
                "skipped": self.skipped, "seconds": time.time() - self.began,
                "waited": self.waited}


def peak_bytes(device):
    """The peak memory so far: of the GPU or, of a run on the CPU, of the process. None where the
    system does not tell."""
    if "cuda" in device:
        return torch.cuda.max_memory_allocated(device)
    if sys.platform != "linux":
        return None
    import resource    # there is no such module on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclasses.dataclass
class Progress:
    """How far a run is; last.pt holds it. An epoch goes three steps: it is trained, it is evaluated,
    and it is written down."""
    epoch: int = 0             # epochs that are trained
    step: int = 0              # steps of the next epoch that are done
    evaluated: bool = True     # whether all epochs that are trained are evaluated, too
    best: float = -1.0         # the best accuracy on val so far
    log: list = dataclasses.field(default_factory=list)      # a dictionary for each line of log.jsonl
    whole: dict = dataclasses.field(default_factory=dict)    # Means over the epoch under way
    recent: dict = dataclasses.field(default_factory=dict)   # Means since the last --log-every

    def is_over(self, phase):
        if self.epoch == phase.last:
            return self.evaluated
        return self.epoch > phase.last


class Run:
    """A run under way: what the functions of the loop share. It goes on from last.pt, if there is
    one in the folder of the run."""

    def __init__(self, model, args):
        self.model = model
        self.args = args
        self.out = Path(args.out)
        self.parallel = model     # what a step calls: the model, or DDP around it; see begin
        self.optimizer = None     # of the present phase
        self.scaler = torch.amp.GradScaler(torch.device(args.device).type,
                                           enabled=args.amp == "fp16")
        self.progress = Progress()
        self.saved = time.time()                    # when last.pt was written
        self.frozen = frozen_fingerprint(model)     # once, of the model as it was built
        self.last = read_last(self.out / "last.pt", self.frozen)    # None in a new run
        if self.last is not None:
            self.progress = Progress(**self.last["progress"])
            self.scaler.load_state_dict(self.last["scaler"])
            print(f"resumed after epoch {self.progress.epoch}, step {self.progress.step} of the "
                  f"next")


def fit(model, args, train_loader, val_loader):
    """Train in phases of epochs. After each epoch: save, evaluate on val, write everything down.
    val_loader: None if the dataset has no val; the last epoch then counts as the best."""
    run = Run(model, args)
    phases = plan(args)
    steps = len(train_loader)
    done = run.progress.epoch * steps + run.progress.step
    # A file would be filled with bars; lines of the log go there instead.
    silent = rank() > 0 or not sys.stderr.isatty()
    with (tqdm(total=phases[-1].last * steps, initial=done, desc=args.method, unit="step",
               disable=silent) as bar, Signals(run) as signals):
        for phase in phases:
            if run.progress.is_over(phase):
                continue
            begin(run, phase)
            while not run.progress.is_over(phase):
                if run.progress.evaluated:
                    train_epoch(run, train_loader, phase, bar, signals)
                evaluate_epoch(run, val_loader, phase)


def begin(run, phase):
    """Begin a phase or, in a resumed run, go on within it."""
    model, last, progress = run.model, run.last, run.progress
    run.last = None    # later phases go on from the model, and the memory is free again
    within = (progress.epoch, progress.step) != (phase.first, 0)
    # If the run stopped between two phases, last.pt holds merged weights, and they are loaded
    # before the phase adds its pairs. If it stopped within a phase, last.pt holds pairs, and
    # begin_phase makes pairs for them first.
    if last is not None and not within:
        load_tuned(model, last["model"], "last.pt")
    run.optimizer = begin_phase(model, phase, run.args)
    if last is not None and within:
        load_tuned(model, last["model"], "last.pt")
        run.optimizer.load_state_dict(last["optimizer"])
    if run.args.compile:
        model.compile()
    run.parallel = in_parallel(model)


def train_epoch(run, loader, phase, bar, signals):
    """One pass over the training data or, in a resumed run, the rest of it. Writes a line of the log
    each --log-every steps and, at the end, that of the epoch."""
    args, progress = run.args, run.progress
    epoch = progress.epoch + 1
    whole = Means(**progress.whole)
    recent = Means(**progress.recent)
    run.parallel.train()
    set_epoch(loader, epoch, first=progress.step)
    ready = time.time()
    for batch in loader:
        waited = time.time() - ready
        # The schedule counts the steps of the phase; epochs count from 1 over the whole run.
        done = (epoch - 1 - phase.first) * len(loader) + progress.step
        factor = rate_factor(args, done, len(loader), phase.last - phase.first)
        for group in run.optimizer.param_groups:
            group["lr"] = group["peak"] * factor

        with signals.held():    # a step is done, or it is not
            torch.manual_seed(seed_of_step(args, epoch, progress.step))
            values, updated = train_step(run.parallel, batch, run.optimizer, run.scaler, args)
            if not math.isfinite(sum(values.values())):
                refuse_to_go_on(values, args, epoch, progress.step, batch)
            progress.step += 1
            size = len(batch["boxes"]) * processes()
            for means in (whole, recent):
                means.add(values, size)
                means.skipped += not updated
                means.waited += waited
            if progress.step % args.log_every == 0:
                progress.log.append({"epoch": epoch, "phase": phase.name, "step": progress.step,
                                     **rates(run.optimizer), **recent.read(),
                                     **recent.speed(args.device)})
                write_log(run)
                if bar.disable:
                    print_line(progress.log[-1])
                recent = Means()
            progress.whole = whole.state()
            progress.recent = recent.state()
        if time.time() - run.saved > 60 * args.save_minutes:
            save_last(run)
        means = whole.read()
        bar.set_postfix_str(f"{phase.name}, epoch {epoch}, loss {means['train_loss']:.3f} "
                            f"acc {means['train_acc@0.5']:.3f}")
        bar.update()
        ready = time.time()

    line = {"epoch": epoch, "phase": phase.name, **rates(run.optimizer), **whole.read(),
            **whole.speed(args.device)}
    if run.scaler.is_enabled():
        line["skipped_steps"] = whole.skipped
    with signals.held():
        progress.log.append(line)
        progress.epoch = epoch
        progress.step = 0
        progress.whole = {}
        progress.recent = {}
        progress.evaluated = False
    # What is trained is saved before it is evaluated: hours of training are not lost to what may
    # happen there.
    save_last(run)


def seed_of_step(args, epoch, step):
    """The seed of a step's dropout. It depends on seed, epoch and step alone, so that a step is the
    same in a resumed run. Processes that train together differ."""
    return in_range(((args.seed * 100_003 + epoch) * 1_000_003 + step) * 1_009 + rank())


def in_range(seed):
    """torch takes seeds of 64 bits; any whole number leads to one of them."""
    return seed % 2 ** 63


def train_step(model, batch, optimizer, scaler, args):
    """One optimizer step -> (values, updated).

    values: means over the batch, {"train_loss", each part of the loss by its name, "train_acc@0.5",
    "grad_norm"}. updated: whether the weights were changed. fp16 skips a step whose gradients
    overflow and goes on with a smaller scale; "grad_norm" is then missing.
    """
    optimizer.zero_grad(set_to_none=True)
    size = len(batch["boxes"])
    means = 0.0
    for start in range(0, size, args.micro_batch):    # gradient accumulation over micro-batches
        end = min(start + args.micro_batch, size)
        micro = part_of(batch, start, end, args.device)
        share = (end - start) / size
        # Several processes average their gradients in the last backward pass of a step alone.
        model.require_backward_grad_sync = end == size

        # Images and texts in, boxes out: text encoder, vision encoder, grounding encoder.
        with autocast(args):
            grounding = model(**micro, attention=reads_attention(args))

        # The loss is a mean over the micro-batch. Weighted by its share, the parts add up to the
        # mean over the batch.
        boxes = batch["boxes"][start:end].to(args.device, non_blocking=True)
        parts = weighted_losses(grounding, boxes, args)
        loss = sum(parts.values())    # M²IST Eq. (6), HiVG Eq. (15)
        scaler.scale(loss * share).backward()

        right = (measured_ious(grounding.boxes.detach(), boxes) >= 0.5).float().mean()
        values = {"train_loss": loss, **parts, "train_acc@0.5": right}
        means = means + share * torch.stack([value.detach() for value in values.values()])

    # Without fp16 the scaler passes gradients and steps on as they are.
    scaler.unscale_(optimizer)
    tuned = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(tuned, args.clip_norm or math.inf)
    means = mean_over_processes(means)
    # One transfer from the device in a step, as it waits until the device has caught up.
    *numbers, norm = torch.cat([means, norm[None]]).tolist()
    updated = math.isfinite(norm)
    values = dict(zip(values, numbers))
    if updated or not scaler.is_enabled():
        values["grad_norm"] = norm
    if updated or scaler.is_enabled():    # gradients that are not finite must not reach the weights
        scaler.step(optimizer)
        scaler.update()
    return values, updated


def part_of(batch, start, end, device):
    """The model's inputs for the samples start .. end of a batch, on the device: {name: tensor}."""
    inputs = {}
    for name in ("tokens", "token_padding"):
        inputs[name] = batch[name][start:end].to(device, non_blocking=True)
    # The pictures of neighbours are neighbours; see data.collate.
    picture = batch["picture"][start:end]
    first, last = picture[0], picture[-1]
    for name in ("images", "image_padding"):
        inputs[name] = batch[name][first:last + 1].to(device, non_blocking=True)
    if len(inputs["images"]) < len(picture):
        inputs["picture"] = (picture - first).to(device, non_blocking=True)
    return inputs


def refuse_to_go_on(values, args, epoch, step, batch):
    """Stop a run whose loss or gradients are not finite. No file of the run has seen them."""
    name, value = next(item for item in values.items() if not math.isfinite(item[1]))
    kept = ""
    if Path(args.out, "last.pt").exists():
        kept = f"; {args.out}/last.pt holds what came before"
    raise InputError(f"{name} is {value} at epoch {epoch}, step {step + 1}, samples "
                     f"{batch['index'].tolist()}: start again in another --out with a smaller "
                     f"--lr, with --clip-norm 1, or with --amp off{kept}")


def rates(optimizer):
    """The rates of the grounding encoder and of all else."""
    head, rest = optimizer.param_groups
    return {"lr": head["lr"], "lr_encoder": rest["lr"]}


def evaluate_epoch(run, loader, phase):
    """Evaluate the epoch that was just trained, and write down what was found."""
    progress = run.progress
    line = progress.log[-1]
    line.update(validate(run.model, loader, run.args))
    line["leaky_pretraining"] = leaky_pretraining(run.args)
    print_line(line)
    if loader is None or line["val_acc@0.5"] >= progress.best:
        progress.best = line.get("val_acc@0.5", progress.best)
        save_checkpoint(run, line)
    write_log(run)
    if run.args.stages and progress.epoch == phase.last:
        end_phase(run.model, phase, run.out / "best.safetensors", progress.log)
    # A run that is killed before this line evaluates the epoch again.
    progress.evaluated = True
    save_last(run)


@contextlib.contextmanager
def memory_explained(device, smaller):
    """Turn an error of too little memory, on any device, into one line.
    smaller: the flags to try"""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # The words are those of a GPU, of the CPU, and of cuBLAS and cuDNN.
        words = "out of memory|DefaultCPUAllocator|ALLOC_FAILED"
        if not isinstance(error, MemoryError) and not re.search(words, str(error)):
            raise
        reason = str(error).partition("\n")[0]
        peak = peak_bytes(device) or 0
        raise InputError(f"out of memory; the peak was {peak / 2 ** 30:.1f} GiB ({reason}): try "
                         f"{smaller}") from None


def half_of(flag, batch):
    """What to try where a batch of this size, which the flag sets, has too little memory."""
    if batch > 1:
        return f"{flag} {batch // 2}, or --amp bf16"
    return f"--amp bf16, or another device, as {flag} is 1 already"


def set_precision(args):
    """Let matrix products of float32 use a GPU's TF32 with --amp tf32, and only then."""
    torch.set_float32_matmul_precision("high" if args.amp == "tf32" else "highest")


def autocast(args):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.amp)
    return torch.autocast(torch.device(args.device).type, dtype, enabled=dtype is not None)


def weighted_losses(grounding, boxes, args):
    """The terms of M²IST Eq. (6) or HiVG Eq. (15), by the weights of the run: {name: scalar}."""
    return losses.loss_parts(grounding, boxes, args.l1, args.giou, args.contrast, args.focal,
                             args.dice, args.beta, args.attention_loss)


def reads_attention(args):
    """Whether the loss of a run needs [REG]'s attention."""
    return args.attention_loss > 0


def validate(model, loader, args):
    """The two columns of the log that are about val; none where there is no val."""
    if loader is None:
        return {}
    reached = scores(predict(model, loader, args).ious)
    return {f"val_{name}": value for name, value in reached.items()}


class Predictions(NamedTuple):
    """What a model says of a whole loader, on the CPU."""
    boxes: Tensor                # (N, 4)   predicted
    truths: Tensor               # (N, 4)
    ious: Tensor                 # (N,)
    attention: list              # [REG]'s, (Nv,) a sample; None where it was not asked for


@torch.no_grad()
def predict(model, loader, args, attention=False):
    """Predict the boxes of a whole loader -> Predictions, in the order of the loader's samples,
    whatever the order of its batches. Processes that evaluate together share the batches."""
    model.eval()
    count = len(loader.dataset)
    boxes = torch.zeros(count, 4, device=args.device)
    truths = torch.zeros(count, 4, device=args.device)
    looks = [None] * count
    for batch in loader:
        inputs = part_of(batch, 0, len(batch["boxes"]), args.device)
        with autocast(args):
            grounding = model(**inputs, attention=attention)
        boxes[batch["index"]] = grounding.boxes.float()
        truths[batch["index"]] = batch["boxes"].to(args.device)
        if attention:
            for index, look in zip(batch["index"].tolist(), grounding.attention):
                looks[index] = look
    # A process has zeros for the samples of the others.
    boxes = sum_over_processes(boxes).cpu()
    truths = sum_over_processes(truths).cpu()
    return Predictions(boxes, truths, measured_ious(boxes, truths), looks)


def measured_ious(boxes, truths):
    """The IoU that Acc@0.5 counts, (N,). Predictions are cut off at the border of the square first,
    as in the released code of both papers; the loss takes them whole."""
    ious, _ = losses.iou_and_giou(losses.clamp_to_square(boxes), truths)
    return ious


def scores(ious):
    """Acc@0.5: the share of samples with IoU >= 0.5 (M²IST Section IV-A b, HiVG Section 4.1)."""
    return {"acc@0.5": (ious >= 0.5).float().mean().item(), "mean_iou": ious.mean().item()}


# ---------------------------------------------------------------------------------------------
# Several processes, each with its own GPU: torchrun --nproc-per-node N train.py ...
# A batch has the same samples whatever N is. Each process takes an N-th of them, DDP averages the
# gradients, and so all processes make the same step. The first of them, of rank 0, writes the files.

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def join_processes(args):
    """Join the processes that torchrun has started. Plain `python train.py` is alone."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    if args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("nccl" if "cuda" in args.device else "gloo")
    if args.batch_size % processes() > 0:
        raise InputError(f"--batch-size is {args.batch_size}, which {processes()} processes cannot "
                         f"share: give a multiple of {processes()}")
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")    # what the first process prints is enough
    print(f"{processes()} processes share each batch, {args.batch_size // processes()} samples for "
          f"each; HiVG's contrast is within the samples of a process")


def in_parallel(model):
    """The model as each process calls it in training."""
    if processes() == 1:
        return model
    # Rows of the papers' tables leave some weights without a part in the loss.
    return DistributedDataParallel(model, find_unused_parameters=True, broadcast_buffers=False)


def mean_over_processes(numbers):
    return sum_over_processes(numbers) / processes()


def sum_over_processes(numbers):
    if processes() > 1:
        dist.all_reduce(numbers)
    return numbers


def wait_for_all():
    if processes() > 1:
        dist.barrier()


# ---------------------------------------------------------------------------------------------
# Ctrl-C and SIGTERM

class Signals:
    """Ends a run at Ctrl-C and SIGTERM with last.pt written: `with Signals(run) as signals`. A
    signal that comes inside of `with signals.held()` waits for its end."""

    def __init__(self, run):
        self.run = run
        self.holding = False
        self.waiting = None    # a signal that came while we were holding
        self.handlers = {}     # those that were there before

    def __enter__(self):
        # Only the main thread of a program may listen.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def held(self):
        self.holding = True
        yield
        self.holding = False
        if self.waiting is not None:
            self.stop(self.waiting)

    def receive(self, number, frame):
        if self.holding:
            self.waiting = number
        else:
            self.stop(number)

    def stop(self, number):
        for caught in self.handlers:
            signal.signal(caught, signal.SIG_IGN)    # a second Ctrl-C does not spoil last.pt
        if self.run.progress.step > 0:
            save_last(self.run)
        epoch = self.run.progress.epoch
        if self.run.progress.evaluated:
            epoch += 1    # the next one is being trained
        print(f"\nstopped in epoch {epoch}; python train.py --out {self.run.out} --resume goes on "
              f"from there", file=sys.stderr)
        sys.exit(128 + number)


def begin_worker(worker):
    """Workers of a DataLoader leave Ctrl-C and SIGTERM to the training process, and print nothing
    when that process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.excepthook = tell_unless_disconnected


def tell_unless_disconnected(kind, error, trace):
    """Print an error that nobody caught, except where the other end of a connection is gone. A worker
    meets this error when the training process is stopped while it fetches a batch."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


# ---------------------------------------------------------------------------------------------
# Phases: a warm-up without LoRA, then LoRA stage by stage (HiVG Section 4.1)

class Phase(NamedTuple):
    """Epochs first + 1 .. last of a run."""
    name: str
    stage: int           # of LoRA; 0 is without
    first: int           # how many epochs of the run come before this phase
    last: int            # the number of its last epoch
    lr: float            # peak rate of the grounding encoder
    lr_encoder: float    # peak rate of all else


def plan(args):
    """The phases of a run. The bridges are trained in all of them [D27]. Stages without
    --stage-epochs (LoRA on DETR and BERT) share --epochs and begin at epoch 1, as adapters do."""
    stages = args.stages or 0
    if stages == 0:
        return [Phase("training", 0, 0, args.epochs, args.lr, args.lr_encoder)]

    phases = []
    end = 0
    if args.stage_epochs > 0:
        phases.append(Phase("warm-up", 0, 0, args.epochs, args.lr, args.lr_encoder))
        end = args.epochs
        epochs = args.stage_epochs
    else:
        epochs = args.epochs // stages
    for stage in range(1, (args.last_stage or stages) + 1):
        if args.stage_lr:    # as released, a stage has one rate for all that it trains
            lr = lr_encoder = args.stage_lr[min(stage, len(args.stage_lr)) - 1]
        else:
            lr, lr_encoder = args.lr, args.lr_encoder
        phases.append(Phase(f"stage {stage}", stage, end, end + epochs, lr, lr_encoder))
        end += epochs
    return phases


def begin_phase(model, phase, args):
    """Put the pairs of the phase's stage in place, print what is trained, make the optimizer."""
    # The seed makes the start of A the same whenever the stage begins, in a resumed run too.
    torch.manual_seed(in_range(args.seed * 100_003 + 50_000 + phase.stage))
    model.begin_stage(phase.stage)
    parts = [f"{count:,} {group}" for group, count in tuned_groups(model).items()]
    tqdm.write(f"{phase.name} trains {'; '.join(parts)}")
    return make_optimizer(model, args, phase)


def end_phase(model, phase, best_path, log):
    """Load the weights that were best on val so far, with their pairs merged [D33]. They may come
    from this phase or from an earlier one."""
    # best.safetensors holds W + α/r B A, so loading it is the merge of HiVG Section 3.3. load_tuned
    # first removes the pairs of this phase unmerged. Where the best weights come from an earlier
    # phase, the layers that the file does not hold are then as they were when this phase began.
    wait_for_all()    # until the first process has written it
    load_tuned(model, read_state(best_path), best_path)
    here = best_of(log, phase.first + 1, phase.last)
    before = best_of(log, 1, phase.first)
    if here < before:
        tqdm.write(f"{phase.name} ends worse on val ({here:.4f} at best) than it began "
                   f"({before:.4f}): the weights that it began with are kept")


def best_of(log, first, last):
    """The best accuracy on val of the epochs first .. last; 0 if there is none."""
    reached = [0.0]
    for line in log:
        if first <= line["epoch"] <= last and "val_acc@0.5" in line:
            reached.append(line["val_acc@0.5"])
    return max(reached)


def make_optimizer(model, args, phase):
    """AdamW with two rates: the grounding encoder's, and that of all that is tuned in or beside the
    encoders."""
    head = []
    rest = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if name.startswith("grounding."):
            head.append(p)
        else:
            rest.append(p)
    groups = [dict(params=head, lr=phase.lr, peak=phase.lr),
              dict(params=rest, lr=phase.lr_encoder, peak=phase.lr_encoder)]
    return torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=True)


def rate_factor(args, step, steps, epochs):
    """What the peak rates are multiplied by at a step (from 0) of a phase that has `epochs` epochs
    with `steps` steps each."""
    warm = 1.0
    if args.warmup > 0:
        warm = min(1.0, (step + 1) / args.warmup)
    if args.schedule == "cosine":
        return warm * 0.5 * (1 + math.cos(math.pi * step / (epochs * steps)))
    if args.schedule == "linear":
        return warm * (1 - step / (epochs * steps))
    dropped = step // steps >= args.lr_drop
    return warm * (0.1 if dropped else 1.0)


# ---------------------------------------------------------------------------------------------
# Data for the loop

def load_splits(args):
    """The samples to train on and to validate on (empty where the dataset has no val). Boxes that
    can teach nothing are left out of training and counted; of val nothing is left out."""
    listed = data.load_samples(args.dataset, "train", args.root, args.limit)
    val_samples = []
    if "val" in data.split_names(args.dataset, args.root):
        val_samples = data.load_samples(args.dataset, "val", args.root, args.limit)
    else:
        print(f"{args.dataset} has no split 'val': the last epoch is kept as the best")
    data.check_pictures_exist([*listed, *val_samples])
    if args.test:
        for samples in test_samples(args).values():
            data.check_pictures_exist(samples)
    for split, samples in (("train", listed), ("val", val_samples)):
        doubt = data.doubt_about_boxes(samples)
        if doubt:
            raise InputError(f"{args.dataset}, {split}: {doubt} Boxes of a .jsonl file are x1, y1, "
                             f"x2, y2 in pixels of the stored picture; `python data.py "
                             f"{args.dataset} --draw 16` draws them")

    with_area = []
    for sample in listed:
        x1, y1, x2, y2 = sample.box
        if x1 < x2 and y1 < y2:
            with_area.append(sample)
    outside = set(data.boxes_outside(with_area))
    train_samples = [sample for sample in with_area if sample not in outside]
    tell_outside("train", outside, "left out", args)
    tell_outside("val", data.boxes_outside(val_samples), "misses", args)
    data.check_decodable(val_samples)

    print(f"{title(args)} {args.size} on {args.dataset}: {len(train_samples)} expressions to train "
          f"on ({len(listed) - len(with_area)} left out, without area), {len(val_samples)} to "
          f"validate; leaky pretraining {leaky_pretraining(args)}")
    return train_samples, val_samples


def tell_outside(split, samples, fate, args):
    """Say how many boxes of a split lie outside of their pictures, and where the first one is."""
    if not samples:
        return
    first = min(samples, key=str)
    where = data.where_is(args.dataset, args.root, first)
    print(f"{len(samples)} boxes of {split} lie outside of their pictures and are {fate}; one is "
          f"in {where}: {list(first.box)} of {first.text!r} in {first.image}")


def tell_cut(samples, tokenizer):
    """Say how many expressions have more tokens than the model sees, and show one of them."""
    cut = data.cut_samples(samples, tokenizer)
    if cut:
        print(f"{len(cut)} of {len(samples)} expressions are cut at {tokenizer.max_tokens} tokens, "
              f"such as {cut[0].text!r}; --max-tokens sets another limit")


def make_loader(samples, model, args, train=False, batch_size=None):
    """The DataLoader of samples for a model. In training, set_epoch must be called before each
    epoch. In evaluation each sample comes once, next to the others of its picture. Raises
    InputError if pictures are missing."""
    spec = model.spec
    tokenizer = make_tokenizer(spec)
    augmented = train and args.size != "tiny"
    mirror = not on_clip(spec)    # HiVG Appendix B mirrors nothing
    pixels = data.PIXELS[spec["pixels"] or spec["encoders"]]
    dataset = data.GroundingDataset(samples, spec["image_size"], tokenizer, pixels, train,
                                    args.seed, augmented, mirror,
                                    args.expressions_per_image > 1, args.draft)
    batch_size = batch_size or args.batch_size
    if train:
        batches = data.TrainingBatches(samples, batch_size, args.seed, args.expressions_per_image,
                                       rank(), processes())
    else:
        batches = data.evaluation_batches(samples, batch_size, rank(), processes())
    return DataLoader(dataset, batch_sampler=batches, num_workers=args.workers,
                      collate_fn=functools.partial(data.collate, pad=tokenizer.pad),
                      pin_memory="cuda" in args.device, worker_init_fn=begin_worker,
                      persistent_workers=train and args.workers > 0)


def set_epoch(loader, epoch, first=0):
    """Draw the order and the transforms of an epoch anew, and begin with its batch `first`, from 0.
    They depend on the seed of the run and the epoch alone."""
    loader.batch_sampler.epoch = epoch
    loader.batch_sampler.first = first
    loader.dataset.epoch.fill_(epoch)


def leaky_pretraining(args):
    """Whether the vision encoder's pretraining has seen pictures of val or test: True, False, or
    None where nobody knows, as with CLIP, whose pictures are not listed anywhere."""
    if args.weights != "pretrained":
        return False
    if METHODS[args.method]["encoders"] == "clip":
        return None
    # [D48] Without --vision-weights the DETR is the official one.
    return data.leaky_pretraining(args.dataset, args.vision_weights or DETR_URL)


def test_samples(args):
    """The samples of the splits but train and val: {split: samples}."""
    splits = {}
    for split in data.split_names(args.dataset, args.root):
        if split not in ("train", "val"):
            splits[split] = data.load_samples(args.dataset, split, args.root, args.limit)
    if not splits:
        raise InputError(f"--test: {args.dataset} has no split but train and val; leave --test out")
    return splits


def test(model, args, path):
    """Evaluate a model on the splits but train and val, and write {split: scores} to a file."""
    splits = {}
    for split, samples in test_samples(args).items():
        loader = make_loader(samples, model, args, batch_size=args.micro_batch)
        splits[split] = scores(predict(model, loader, args).ious)
        print_line({"split": split, **splits[split]})

    def write(partial):
        partial.write_text(json.dumps(splits))

    write_once(path, write)


def picture_predictions(model, samples, args, path):
    """Save a sheet of samples with expression, IoU, true box, predicted box and [REG]'s
    attention."""
    loader = make_loader(samples, model, args, batch_size=1)
    predictions = predict(model, loader, args, attention=True)
    tiles = []
    for i, sample in enumerate(samples):
        picture = data.load_picture(sample.image)
        pred = data.from_square(predictions.boxes[i], picture.size, model.spec["image_size"])
        boxes = [(sample.box, data.TRUE), (pred, data.PREDICTED)]
        caption = data.caption_of(sample.text, i + 1, path)
        tiles.append(data.draw(picture, caption, boxes, predictions.attention[i],
                               heading=f"IoU {predictions.ious[i]:.2f}"))
    sheet = data.contact_sheet(tiles, ["true", "predicted", "attention"])
    if rank() == 0:
        data.write_picture(path, sheet)


# ---------------------------------------------------------------------------------------------
# Saving and resuming. A checkpoint holds the tuned weights alone; its metadata rebuilds the rest.

def model_options(args):
    """The options of a run that its model takes."""
    return {option.name: getattr(args, option.name) for option in MODEL_OPTIONS}


def model_arguments(args):
    """The arguments of build_model that rebuild the model of a run."""
    return {"method": args.method, "size": args.size, "weights": args.weights,
            **model_options(args)}


def tuned_state(model, merged=False):
    """{name: tensor} of all that training has changed so far: what requires a gradient, and the
    weights that LoRA's earlier stages were merged into. merged: whether the pairs of the present
    stage are added to their weights, or are tensors of their own."""
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for name in model.lora_weights():
        state[name] = model.get_parameter(name).detach()
    if merged:
        for name, module in model.named_modules():
            if isinstance(module, hilora.LoRALinear):
                del state[f"{name}.A"]
                del state[f"{name}.B"]
                state[f"{name}.weight"] = module.merged()
    return {name: value.cpu().contiguous() for name, value in state.items()}


def load_tuned(model, state, source):
    """Put tuned weights back into a model. If `state` holds no pairs, because they are merged, the
    pairs of the model are taken out first. Every key is checked: all that require a gradient must
    be there, and none that the model lacks."""
    if not any(name.endswith((".A", ".B")) for name in state):
        hilora.discard(model)
    wanted = model.state_dict()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    bad = sorted(trained - set(state))
    bad += sorted(set(state) - set(wanted))
    for name, value in state.items():
        if name in wanted and wanted[name].shape != value.shape:
            bad.append(name)
    if bad:
        raise InputError(f"{source}: is of another method or size; {len(bad)} weights do not fit, "
                         f"{bad[0]} among them")
    model.load_state_dict(state, strict=False)    # the frozen rest is missing, as checked above


def frozen_fingerprint(model):
    """A hash of all that is frozen in a model as build_model returns it. It tells whether the
    encoders behind a checkpoint are the same again. Hashing takes seconds at full size, so it is
    done once a run."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if name not in trained:
            digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_once(path, write):
    """Write a file of the run. Of several processes the first alone does so."""
    if rank() == 0:
        write_atomically(path, write)


def save_checkpoint(run, line):
    """Write best.safetensors: the tuned weights with the pairs merged, and in the metadata what
    rebuilds the model. line: the line of the log of this epoch."""
    config = {"model": model_arguments(run.args), "args": vars(run.args), **line,
              "frozen": run.frozen}
    state = tuned_state(run.model, merged=True)

    def write(partial):
        save_file(state, partial, {"config": json.dumps(config)})

    write_once(run.out / "best.safetensors", write)


def write_log(run):
    """Write log.jsonl whole, so that no epoch stands there twice. The line of an epoch has
    val_acc@0.5 (where there is a val), a line within an epoch has "step" in its place."""
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in run.progress.log)

    def write(partial):
        partial.write_text(text)

    write_once(run.out / "log.jsonl", write)


def print_line(line):
    parts = []
    for name, value in line.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        parts.append(f"{name} {text}")
    tqdm.write("  ".join(parts))


def save_last(run):
    """Write last.pt: all that a resumed run needs."""
    path = run.out / "last.pt"
    tuned = tuned_state(run.model)
    for name, value in tuned.items():
        if not value.isfinite().all():
            raise InputError(f"{name} is not finite after epoch {run.progress.epoch}: start again in "
                             f"another --out with a smaller --lr; {path} was not written")
    last = {"progress": vars(run.progress), "model": tuned,
            "optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict(),
            "frozen": run.frozen}

    def write(partial):
        torch.save(last, partial)

    write_once(path, write)
    run.saved = time.time()


def read_last(path, frozen):
    """last.pt of the run that is to be resumed, or None in a new run. Raises InputError if the file
    is damaged, or if the encoders are not those that the run began with.
    frozen: the frozen_fingerprint of the model as it is now."""
    if not path.exists():
        return None
    try:
        last = torch.load(path, map_location="cpu", weights_only=True)
        for name in ("progress", "model", "optimizer", "scaler", "frozen"):
            last[name]
    except Exception:
        raise InputError(f"{path}: damaged, or not what train.py writes; start a new run in "
                         f"another --out") from None
    if last["frozen"] != frozen:
        raise InputError(f"{path}: the run began with other encoder weights than these; give it "
                         f"the same files")
    return last


def read_args(out):
    """The options of the run in a folder: {name: value}. A run that was stopped before its first
    last.pt begins again with them. A run that an older version of this file began may lack the
    newest options; they have their defaults then."""
    path = out / "args.json"
    if not path.is_file():
        raise InputError(f"--resume: {out} holds no run, as there is no args.json in it; leave "
                         f"--resume out to start one there")
    try:
        saved = json.loads(path.read_text())["args"]
        saved["method"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: not what train.py writes; start a new run in another "
                         f"--out") from None
    return {**all_defaults(), **saved}


def write_args(out, args):
    """Write args.json."""
    environment = {name: importlib.metadata.version(name)
                   for name in ("torch", "torchvision", "transformers")}
    environment["device"] = "cpu"
    if "cuda" in args.device:
        environment["device"] = torch.cuda.get_device_name(args.device)
    options = {**vars(args), "resume": False}
    text = json.dumps({"args": options, "environment": environment}, indent=1)

    def write(partial):
        partial.write_text(text)

    write_once(out / "args.json", write)


@contextlib.contextmanager
def hold_folder(args):
    """Hold the folder --out for this process alone. What another run has left there is refused
    before any slow work, and what a killed run has half written is removed."""
    out = Path(args.out)
    for path in (out, *out.parents):
        if path.exists() and not path.is_dir():
            raise InputError(f"--out {out}: {path} is a file, not a folder")
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "a+") as lock:
        hold(lock, out)
        check_out(out, args.resume)
        for partial in out.glob("*.partial"):
            partial.unlink()
        try:
            yield
        finally:
            if os.listdir(out) == ["lock"]:    # a flag or a file was wrong, and no run was begun
                shutil.rmtree(out, ignore_errors=True)


def hold(lock, out):
    """Lock an open file for as long as it is open and this process lives."""
    if sys.platform == "win32":
        return    # which has no such lock
    import fcntl
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):    # the two that systems have for it
        lock.seek(0)
        raise InputError(f"--out {out} is in use by {lock.read().strip()}: wait for that run, or "
                         f"give another --out") from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {platform.node()}\n")
    lock.flush()


def check_out(out, resume):
    """Refuse a new run in a folder that holds another one, or anything else. A run that was stopped
    before its first epoch may have left args.json alone, and it is begun anew."""
    if resume:
        return
    for path in sorted(out.iterdir()):
        if path.name in ("args.json", "lock") or path.suffix == ".partial":
            continue
        raise InputError(f"--out {out} already holds {path.name}: give another --out, or --resume "
                         f"to go on with the run there")


# ---------------------------------------------------------------------------------------------
# The rows of M²IST's Tables I, II, V-X and of HiVG's Tables 3-5, 9-11 and Fig. 4 (d)

# HiVG Table 11 has neither bridge nor HiLoRA nor RTCC.
FEATURES_ALONE = dict(bridge_layers=[], stages=0, focal=0.0, dice=0.0)

# row: what it changes of the defaults of `m2ist` or `hivg` at size base; {} is the default itself.
ROWS = {
    "m2ist/I/full": dict(method="full"),
    "m2ist/I/frozen": dict(method="frozen"),    # V (a), beside the methods of Table I
    "m2ist/I/adapter": dict(method="adapter"),
    "m2ist/I/lora": dict(method="lora"),
    "m2ist/I/adaptformer": dict(method="adaptformer"),
    "m2ist/I/cm-adapter": dict(method="cm-adapter"),
    "m2ist/I/mrs-adapter": dict(method="mrs-adapter"),
    "m2ist/I/m2ist": {},
    # Table II, by C_d
    "m2ist/II/8": dict(bottleneck=8),
    "m2ist/II/32": dict(bottleneck=32),
    "m2ist/II/128": {},
    # Table V: which adapters
    "m2ist/V/a": dict(method="frozen"),
    "m2ist/V/b": dict(attention_port="none", ffn_port="lea"),
    "m2ist/V/c": dict(attention_port="none", ffn_port="vea"),
    "m2ist/V/d": dict(attention_port="none", ffn_port="ea"),
    "m2ist/V/e": dict(ffn_port="none"),
    "m2ist/V/f": {},
    # Table VI: which adapter at which port
    "m2ist/VI/a": dict(attention_port="ea"),
    "m2ist/VI/b": dict(ffn_port="iea"),
    "m2ist/VI/c": dict(attention_port="ea", ffn_port="iea"),
    "m2ist/VI/d": {},
    # Table VII: how they are inserted
    "m2ist/VII/a": dict(insertion="sequential"),
    "m2ist/VII/b": dict(insertion="parallel"),
    "m2ist/VII/c": {},
    # Table VIII: text layers that are paired with vision layers 1-6
    "m2ist/VIII/a": dict(text_layers=[1, 2, 3, 4, 5, 6]),
    "m2ist/VIII/b": dict(text_layers=[1, 3, 5, 7, 9, 11]),
    "m2ist/VIII/c": {},
    # Table IX [D41]
    "m2ist/IX/a": dict(interaction_bottleneck=32),
    "m2ist/IX/b": dict(interaction_bottleneck=64),
    "m2ist/IX/c": {},
    # Table X: with LoRA
    "m2ist/X/a": dict(method="full"),
    "m2ist/X/b": dict(method="lora"),
    "m2ist/X/c": {},
    "m2ist/X/d": dict(method="m2ist+lora"),
    # HiVG Table 3: bridge and HiLoRA
    "hivg/3/1": dict(bridge_layers=[], stages=0),
    "hivg/3/2": dict(stages=0),
    "hivg/3/3": dict(bridge_layers=[]),
    "hivg/3/4": {},
    # Table 4: the bridge
    "hivg/4/1": dict(bridge_weights="none"),
    "hivg/4/2": dict(cross_attention=False),
    "hivg/4/3": dict(bridge_weights="1x1xH"),
    "hivg/4/4": dict(bridge_weights="nx1xH"),
    "hivg/4/5": dict(bridge_weights="nxLx1"),
    "hivg/4/6": {},
    "hivg/4/7": dict(layer_to_layer=True, bridge_weights="none", text_layers=[4, 8, 12]),
    "hivg/4/8": dict(text_layers=[12]),
    # Table 5: HiLoRA
    "hivg/5/1": dict(last_stage=1),
    "hivg/5/2": dict(last_stage=2),
    "hivg/5/3": {},
    "hivg/5/4": dict(stages=2),
    "hivg/5/5": dict(stages=4),
    "hivg/5/6": dict(rank=16),
    "hivg/5/7": dict(rank=64),
    "hivg/5/8": dict(deep_to_shallow=True),
    # Table 9: the constraints [D42]
    "hivg/9/1": dict(contrast=0.0, focal=0.0, dice=0.0),
    "hivg/9/2": dict(contrast=0.0),
    "hivg/9/3": dict(focal=0.0, dice=0.0),
    "hivg/9/4": {},
    # Table 10: what the bridge sees of the text
    "hivg/10/1": dict(bridge_weights="aware"),
    "hivg/10/2": dict(text_layers=[12]),
    "hivg/10/3": dict(text_layers=[6, 12]),
    "hivg/10/4": dict(text_layers=[1, 4, 8, 12]),
    "hivg/10/5": {},
    # Table 11: vision layers that are grounded
    "hivg/11/1": dict(FEATURES_ALONE, vision_layers=[12]),
    "hivg/11/2": dict(FEATURES_ALONE, vision_layers=[2, 5, 9]),
    "hivg/11/3": dict(FEATURES_ALONE, vision_layers=[2, 5, 9, 12]),
    "hivg/11/4": dict(FEATURES_ALONE, vision_layers=[1, 4, 8, 12]),
    "hivg/11/5": dict(FEATURES_ALONE, vision_layers=[3, 6, 9, 12]),
    "hivg/11/6": dict(FEATURES_ALONE, vision_layers=[6, 7, 8, 9, 10, 11, 12]),
    "hivg/11/7": dict(FEATURES_ALONE, vision_layers=[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
    # Fig. 4 (d): from original CLIP to HiVG
    "hivg/fig4d/original-clip": dict(method="clip-frozen"),
    "hivg/fig4d/clip-vanilla-lora": dict(method="clip-lora"),
    "hivg/fig4d/no-hilora-no-macb": dict(bridge_layers=[], stages=0),
    "hivg/fig4d/no-hilora": dict(stages=0),
    "hivg/fig4d/vanilla-lora": dict(stages=1, stage_epochs=60),
    "hivg/fig4d/stage-1": dict(last_stage=1),
    "hivg/fig4d/stage-2": dict(last_stage=2),
    "hivg/fig4d/stage-3": {}}


def row_options(row, size):
    """The options that a row sets, its method among them. Its layers, bottlenecks and epochs are
    those of size base; the tiny size takes a share of them [D43]."""
    if row not in ROWS or size == "large":
        raise InputError(f"there is no row {row!r} of size {size}: `python train.py --row list` "
                         f"lists the rows; the sizes are base and tiny")
    options = {"method": row.partition("/")[0], **ROWS[row]}
    if size == "tiny":
        for name, value in options.items():
            options[name] = at_tiny_size(options["method"], name, value)
    return options


def at_tiny_size(method, name, value):
    """The value of a row's option for the tiny encoders."""
    if name in ("bottleneck", "interaction_bottleneck"):
        return value // 4
    if name == "stage_epochs":
        return value // 20
    if name not in ("text_layers", "vision_layers"):
        return value
    tower = name.removesuffix("_layers")
    base_layers = architecture(method, "base")[tower]["layers"]
    tiny_layers = architecture(method, "tiny")[tower]["layers"]
    layers = [math.ceil(layer * tiny_layers / base_layers) for layer in value]
    if METHODS[method]["encoders"] == "detr":
        return [layers[2], layers[5]]    # two pairs in place of six: the third and the sixth
    return sorted(set(layers))


def print_rows():
    """The map of the papers' tables."""
    print(f"{'row':32}what it changes of the method's defaults at size base")
    for row, options in ROWS.items():
        parts = [f"{name} {value}" for name, value in options.items()]
        print(f"{row:32}{', '.join(parts) or 'nothing: the default itself'}")


# ---------------------------------------------------------------------------------------------
# Claims: what the papers say of their rows, tried on `shapes` over several seeds. A claim compares
# two rows. They have equally many epochs, and their learning rates are chosen in the same way, from
# equally many. The two runs of a pair have one seed: they see the same samples in the same order.

class Claim(NamedTuple):
    """A paper's claim that one row of its tables is better than another one, or no worse."""
    text: str
    higher: str            # the row that should be better
    lower: str
    margin: float = 0.0    # by more than so many points. "No worse" is taken as more than -1.


CLAIMS = [
    Claim("M²IST is no worse than full fine-tuning", "m2ist/I/m2ist", "m2ist/I/full", -1),
    Claim("M²IST beats frozen encoders", "m2ist/I/m2ist", "m2ist/I/frozen"),
    Claim("M²IST beats Adapter", "m2ist/I/m2ist", "m2ist/I/adapter"),
    Claim("M²IST beats LoRA", "m2ist/I/m2ist", "m2ist/I/lora"),
    Claim("M²IST beats AdaptFormer", "m2ist/I/m2ist", "m2ist/I/adaptformer"),
    Claim("M²IST beats CM Adapter", "m2ist/I/m2ist", "m2ist/I/cm-adapter"),
    Claim("M²IST beats MRS-Adapter", "m2ist/I/m2ist", "m2ist/I/mrs-adapter"),
    Claim("LEA helps", "m2ist/V/b", "m2ist/V/a"),
    Claim("VEA helps", "m2ist/V/c", "m2ist/V/a"),
    Claim("VEA helps more than LEA", "m2ist/V/c", "m2ist/V/b"),
    Claim("LEA and VEA help", "m2ist/V/d", "m2ist/V/a"),
    Claim("IEA helps", "m2ist/V/e", "m2ist/V/a"),
    Claim("IEA helps beside LEA and VEA", "m2ist/V/f", "m2ist/V/d"),
    Claim("LEA and VEA help beside IEA", "m2ist/V/f", "m2ist/V/e"),
    Claim("mixed adapters beat LEA and VEA at both ports", "m2ist/VI/d", "m2ist/VI/a"),
    Claim("mixed adapters beat IEA at both ports", "m2ist/VI/d", "m2ist/VI/b"),
    Claim("IEA belongs at the attention port", "m2ist/VI/d", "m2ist/VI/c"),
    Claim("side beats sequential", "m2ist/VII/c", "m2ist/VII/a"),
    Claim("side beats parallel", "m2ist/VII/c", "m2ist/VII/b"),
    Claim("deep text layers beat shallow ones", "m2ist/VIII/c", "m2ist/VIII/a"),
    Claim("C_d of 128 beats 8", "m2ist/II/128", "m2ist/II/8"),
    Claim("IEA's bottleneck of 64 beats 32", "m2ist/IX/b", "m2ist/IX/a"),
    Claim("IEA's bottleneck of 128 beats 64", "m2ist/IX/c", "m2ist/IX/b"),
    Claim("M²IST with LoRA is no worse than without", "m2ist/X/d", "m2ist/X/c", -1),
    Claim("the bridge helps", "hivg/3/2", "hivg/3/1"),
    Claim("the bridge helps beside HiLoRA", "hivg/3/4", "hivg/3/3"),
    Claim("HiLoRA helps", "hivg/3/3", "hivg/3/1"),
    Claim("HiLoRA helps beside the bridge", "hivg/3/4", "hivg/3/2"),
    Claim("weights of n x L x H beat none", "hivg/4/6", "hivg/4/1"),
    Claim("weights of n x L x H beat 1 x 1 x H", "hivg/4/6", "hivg/4/3"),
    Claim("weights of n x L x H beat n x 1 x H", "hivg/4/6", "hivg/4/4"),
    Claim("weights of n x L x H beat n x L x 1", "hivg/4/6", "hivg/4/5"),
    Claim("the bridge's cross-attention helps", "hivg/4/6", "hivg/4/2"),
    Claim("the second stage helps", "hivg/5/2", "hivg/5/1"),
    Claim("the third stage helps", "hivg/5/3", "hivg/5/2"),
    Claim("HiLoRA in three stages beats two", "hivg/5/3", "hivg/5/4"),
    Claim("HiLoRA in three stages beats four", "hivg/5/3", "hivg/5/5"),
    Claim("shallow to deep beats deep to shallow", "hivg/5/3", "hivg/5/8"),
    Claim("the contrast helps", "hivg/9/3", "hivg/9/1"),
    Claim("the region-text constraint helps beside the contrast", "hivg/9/4", "hivg/9/3"),
    Claim("several levels beat the last one", "hivg/11/4", "hivg/11/1"),
    Claim("vanilla LoRA beats frozen CLIP", "hivg/fig4d/clip-vanilla-lora",
          "hivg/fig4d/original-clip"),
    Claim("HiLoRA beats vanilla LoRA", "hivg/fig4d/stage-3", "hivg/fig4d/vanilla-lora")]

# Student's t: 95% of the values lie within so many standard errors, by the number of seeds.
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}

# Each row tries its learning rates times these factors, unless --rates gives others.
FACTORS_TO_TRY = [0.5, 1.0, 2.0]
# The tries have this seed, which the table never uses.
SEED_OF_TRIES = 100


class Finding(NamedTuple):
    """What the runs say of a claim, in points of accuracy."""
    claim: Claim
    difference: float    # the mean over the seeds of higher - lower
    half: float          # half of its 95% interval
    verdict: str         # "seen" if the interval is above the margin, "contradicted" if it is below,
                         # else "not seen"


def try_claims(given):
    """Run what is missing for the claims, and print a table of what they come to. given: the flags
    of the command line; those but --claims, --seeds, --rates and --out go to every run."""
    names = given.pop("claims")
    seeds = given.pop("seeds", 5)
    factors = unique(given.pop("rates", FACTORS_TO_TRY))
    picture = given.pop("out", "runs/claims.png")
    given.setdefault("device", "cpu")    # where many runs at a time are faster than one on a GPU
    for name in ("row", "method", "dataset", "size", "root", "seed", "resume", "test"):
        if name in given:
            raise InputError(f"--{name} is not for --claims, which chooses the runs itself")
    if seeds not in T95:
        raise InputError(f"--seeds is {seeds}; it must be 2 to 10")
    if Path(picture).suffix.lower() not in (".png", ".jpg"):
        raise InputError(f"--out {picture}: with --claims it is the picture of the table, a .png")
    for factor in factors:
        if not 0 < factor < math.inf:    # nan is refused too: it is neither above nor below a number
            raise InputError(f"--rates has {factor:g}; a factor of a learning rate is a number above 0")
    claims = chosen_claims(names)
    rows = rows_of(claims, given)
    every_seed = [*range(seeds), SEED_OF_TRIES]
    for factor in factors:    # after the tries, a refusal would come hours too late
        for flags in runs_of(rows, dict.fromkeys(rows, factor), every_seed).values():
            check_is_run_of(flags)
    factor_of = dict.fromkeys(rows, factors[0])
    if len(factors) > 1:
        factor_of = choose_factors(rows, factors)
    runs = runs_of(rows, factor_of, range(seeds))
    run_missing(runs.values())

    findings = []
    accuracies = {key: tested_accuracy(flags) for key, flags in runs.items()}
    for claim in claims:
        findings.append(judge(claim, accuracies, seeds))
    print_findings(findings, accuracies, seeds, factor_of)
    Path(picture).parent.mkdir(parents=True, exist_ok=True)
    data.write_picture(picture, chart(findings))
    print(f"look at {picture}")


def chosen_claims(names):
    """The claims about the papers, tables or rows in `names`; all claims if there is none."""
    chosen = []
    for claim in CLAIMS:
        if not names or any(is_about(claim, name) for name in names):
            chosen.append(claim)
    for name in names:
        if not any(is_about(claim, name) for claim in CLAIMS):
            tables = sorted({claim.higher.rpartition("/")[0] for claim in CLAIMS})
            raise InputError(f"--claims {name}: there is no claim about this; there are claims about "
                             f"m2ist, hivg, {', '.join(tables)}")
    return chosen


def is_about(claim, name):
    return any(f"{row}/".startswith(f"{name}/") for row in (claim.higher, claim.lower))


def rows_of(claims, given):
    """The rows that claims need, and their flags: {row: flags}. Rows of two tables that are the same
    model have the flags of the first one, and so share its runs."""
    first_like = {}    # the options of a row: the first row that has them
    for row in ROWS:
        first_like.setdefault(meaning(row), row)

    flags_of = {}
    for row in unique(row for claim in claims for row in (claim.higher, claim.lower)):
        first = first_like[meaning(row)]
        try:
            flags_of[row] = {"row": first, **given, **equal_length(first, given)}
            resolve(flags_of[row])
        except InputError as error:
            raise InputError(f"--claims needs row {row}, and there {error}") from None
    return flags_of


def runs_of(rows, factor_of, seeds):
    """The flags of every row with every seed: {(row, seed): flags}. rows: {row: flags}. factor_of:
    {row: what its learning rates are multiplied by}. seeds: numbers"""
    runs = {}
    for seed in seeds:    # seed after seed, so that rows are even where the runs are stopped
        for row, flags in rows.items():
            runs[row, seed] = {**flags, **scaled_rates(flags, factor_of[row]), "seed": seed}
    return runs


def scaled_rates(flags, factor):
    """The learning rates of a run times a factor, as flags."""
    if factor == 1:
        return {}    # its recipe's, and so the folder of the row without flags
    args = resolve(flags)
    scaled = {}
    for name in ("lr", "lr_encoder", "stage_lr"):
        if not applies(OPTIONS[name], args):
            continue
        rate = getattr(args, name)
        if rate == []:
            continue    # LoRA on DETR and BERT: its one stage has --lr-encoder
        if isinstance(rate, list):
            scaled[name] = [part * factor for part in rate]
        else:
            scaled[name] = rate * factor
    return scaled


def choose_factors(rows, factors):
    """Train each row with its learning rates times each factor -> {row: the factor it takes}. The
    tries are compared on val. The table has the accuracies on the test splits, and other seeds."""
    tries = {}    # {factor: {(row, seed): flags}}
    for factor in factors:
        tries[factor] = runs_of(rows, dict.fromkeys(rows, factor), [SEED_OF_TRIES])
    run_missing([flags for runs in tries.values() for flags in runs.values()])

    taken = {}
    columns = " | ".join(f"x {factor:g}" for factor in factors)
    print(f"Accuracy on val by rates, with seed {SEED_OF_TRIES}:\n\n| row | {columns} | taken |")
    print("|---" * (len(factors) + 2) + "|")
    for row, flags in rows.items():
        reached = {}
        for factor in factors:
            reached[factor] = val_accuracy(tries[factor][row, SEED_OF_TRIES])
        taken[row] = within_one_standard_error(reached, val_size(flags))
        columns = " | ".join(f"{accuracy:.1f}" for accuracy in reached.values())
        print(f"| {row} | {columns} | x {taken[row]:g} |")
    print()
    return taken


def within_one_standard_error(reached, samples):
    """Choose the factor of a row: the one nearest to 1, and so to the recipe, among those whose accuracy
    is within one standard error of the highest one. A smaller difference may be luck. reached:
    {factor: accuracy in %}, each measured on so many samples."""
    highest = max(reached.values())
    error = (highest * (100 - highest) / samples) ** 0.5    # of a percentage
    good = [factor for factor, accuracy in reached.items() if accuracy >= highest - error]
    return min(good, key=lambda factor: (max(factor, 1 / factor), -reached[factor]))


def val_size(flags):
    """How many expressions val has in a run."""
    args = resolve(flags)
    return len(data.load_samples(args.dataset, "val", args.root, args.limit))


def meaning(row):
    """All options of a row but its name, as a text that can be compared."""
    return json.dumps({**vars(resolve({"row": row})), "row": None}, sort_keys=True)


def equal_length(row, given):
    """--epochs for a row, if it has fewer or more epochs than the paper's own method: a row with
    fewer stages has a longer warm-up."""
    own = row.partition("/")[0]
    whole = plan(resolve({"method": own, **given}))[-1].last
    args = resolve({"row": row, **given})
    epochs = args.epochs + whole - plan(args)[-1].last
    if epochs < 1:
        raise InputError(f"--epochs is {epochs}; it must be 1 or more: the row has more stages than "
                         f"{own}, and so a shorter warm-up. Give {1 - epochs} more --epochs")
    return {"epochs": epochs} if epochs != args.epochs else {}


def unique(values):
    """The values without repetitions, in their order."""
    found = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def check_is_run_of(flags):
    """Refuse a folder in which a run was made by other options, an older recipe say. A run in the
    table that was made otherwise than the rest would go unseen."""
    out = Path(default_out(flags))
    if not (out / "args.json").is_file():
        return
    saved = read_args(out)
    for name, value in vars(resolve(flags)).items():
        if name not in MAY_CHANGE and saved.get(name) != value:
            raise InputError(f"{out} holds a run with {name} {saved.get(name)}, and --claims needs "
                             f"{value}: move the folder away")


def run_missing(runs):
    """Train the runs that are not there."""
    run_side_by_side([flags for flags in unique(runs) if not is_tested(flags)])


def is_tested(flags):
    return Path(default_out(flags), "test.json").is_file()


def tested_accuracy(flags):
    """The accuracy of a run in %, the mean over the test splits."""
    path = Path(default_out(flags), "test.json")
    splits = json.loads(path.read_text())
    return 100 * sum(row["acc@0.5"] for row in splits.values()) / len(splits)


def val_accuracy(flags):
    """The accuracy of a run on val in %, of its best epoch."""
    lines = Path(default_out(flags), "log.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    return 100 * best_of(log, 1, log[-1]["epoch"])


def run_side_by_side(runs):
    """Train runs, as many at a time as PyTorch has threads here, each with one thread: for models
    this small that is faster than one run with all threads. A run that was stopped goes on. After
    an error, Ctrl-C or SIGTERM the runs under way are stopped, and no further one begins."""
    stopping = threading.Event()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        waiting = [pool.submit(run_alone, flags, stopping) for flags in runs]
        try:
            for done in tqdm(as_completed(waiting), "claims", len(waiting), unit="run",
                             disable=None):    # None: no progress bar outside a terminal
                done.result()
        except BaseException:
            stopping.set()
            print("stopping the runs under way; the same command goes on with what is missing")
            raise
        finally:
            signal.signal(signal.SIGTERM, before)


def run_alone(flags, stopping):
    """Train one run in a process of its own, until it ends or `stopping` is set. What the run
    prints goes to a file beside its folder."""
    if stopping.is_set():
        return
    out = Path(default_out(flags))
    if (out / "args.json").is_file():
        flags = {**flags, "resume": True}
    words = [sys.executable, str(Path(__file__).resolve()), "--out", str(out), "--test",
             *words_of(flags)]
    log = out.parent / f"{out.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as printed:    # in a session of its own: Ctrl-C reaches this process alone
        process = subprocess.Popen(words, stdout=printed, stderr=subprocess.STDOUT,
                                   start_new_session=True,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None:
        if stopping.wait(0.2):
            process.terminate()    # the run writes last.pt and ends
            process.wait()
            return
    if process.returncode != 0:
        stopping.set()
        raise InputError(f"the run {out} has stopped; {log} says why")


def words_of(flags):
    """The words that give flags, {name: value}, on a command line."""
    words = []
    for name, value in flags.items():
        words.append(f"--{name.replace('_', '-')}")
        if isinstance(value, list):
            words += [str(part) for part in value]
        elif value is not True:
            words.append(str(value))
    return words


def judge(claim, accuracies, seeds):
    """What the runs say of a claim -> Finding. The differences are those of pairs with one seed.
    accuracies: {(row, seed): %}"""
    differences = []
    for seed in range(seeds):
        differences.append(accuracies[claim.higher, seed] - accuracies[claim.lower, seed])
    mean = sum(differences) / seeds
    variance = sum((difference - mean) ** 2 for difference in differences) / (seeds - 1)
    half = T95[seeds] * math.sqrt(variance / seeds)
    verdict = "not seen"
    if mean - half > claim.margin:
        verdict = "seen"
    if mean + half < claim.margin:
        verdict = "contradicted"
    return Finding(claim, mean, half, verdict)


def print_findings(findings, accuracies, seeds, factor_of):
    """Print the claims and then their rows as tables in Markdown."""
    print("| claim | rows | difference in points, 95% interval | verdict |")
    print("|---|---|---|---|")
    for claim, difference, half, verdict in findings:
        more = f" > {claim.margin:g}" if claim.margin else ""
        print(f"| {claim.text} | {claim.higher} - {claim.lower}{more} "
              f"| {difference:+.1f} ± {half:.1f} | {verdict} |")
    columns = " | ".join(f"seed {seed}" for seed in range(seeds))
    print(f"\n| row | rates | {columns} | mean ± deviation |")
    print("|---" * (seeds + 3) + "|")
    for row in unique(row for row, _ in accuracies):
        reached = torch.tensor([accuracies[row, seed] for seed in range(seeds)],
                               dtype=torch.float64)
        columns = " | ".join(f"{accuracy:.1f}" for accuracy in reached)
        print(f"| {row} | x {factor_of[row]:g} | {columns} "
              f"| {reached.mean():.1f} ± {reached.std():.1f} |")


def chart(findings):
    """A PIL picture of the differences: a point and its interval for each claim."""
    bars = []
    for claim, difference, half, verdict in findings:
        text = claim.text.replace("²", "2")    # Pillow's font has no ²
        bars.append((f"{text}: {verdict}", difference, half, claim.margin))
    return data.interval_chart(bars)


# ---------------------------------------------------------------------------------------------

def main(argv=None):
    args = parse_args(argv)
    join_processes(args)
    set_precision(args)
    with contextlib.ExitStack() as held:
        if rank() == 0:
            held.enter_context(hold_folder(args))
        wait_for_all()
        with memory_explained(args.device, half_of("--micro-batch", args.micro_batch)):
            train_model(args)


def train_model(args):
    """Train the model of a run, and look at what it has learnt."""
    began = time.time()
    out = Path(args.out)
    print_recipe(args)
    train_samples, val_samples = load_splits(args)

    torch.manual_seed(in_range(args.seed))    # for the new weights of the model
    model = build_model(**model_arguments(args)).to(args.device)
    print(f"parameters {count_parameters(model)}")
    tell_cut([*train_samples, *val_samples], make_tokenizer(model.spec))
    train_loader = make_loader(train_samples, model, args, train=True)
    val_loader = None
    if val_samples:
        # What fits on the device in training fits in evaluation, too.
        val_loader = make_loader(val_samples, model, args, batch_size=args.micro_batch)
    write_args(out, args)
    fit(model, args, train_loader, val_loader)

    best = out / "best.safetensors"
    wait_for_all()
    load_tuned(model, read_state(best), best)
    picture_predictions(model, data.spread(val_samples or train_samples), args, out / "val.png")
    if args.test:
        test(model, args, out / "test.json")
    minutes = (time.time() - began) / 60
    print(f"{minutes:.1f} minutes; look at {args.out}/val.png; python evaluate.py {args.out}")


if __name__ == "__main__":
    run_command(main)
