"""Train a grounding model: one command, one loop.

    python train.py                         m2ist on `shapes`, minutes on a CPU
    python train.py --method hivg           a warm-up, then HiLoRA in stages
    python train.py --dataset refcoco       M²IST at full size
    python train.py --row m2ist/V/b         a row of the papers' tables
    python train.py --row list              all of these rows
    python train.py --cost full m2ist       what methods or rows cost, without training
    python train.py --out runs/x --resume   continue where the run stopped
    torchrun --nproc-per-node 4 train.py --dataset refcoco    on four GPUs

The folder --out receives
    args.json          every option of the run, the versions of the packages
    log.jsonl          an object for each epoch, and each --log-every steps
    best.safetensors   the tuned weights of the best epoch, for evaluate.py
    last.pt            everything that --resume needs
    val.png            predictions of the best weights
    test.json          with --test, the accuracy on all splits except train and val

The file reads in this order: flags, presets, rows of the papers' tables, options of a run, optimizer
and schedule, the loop, saving and resuming, several GPUs, cost, main. Begin at "The loop".

Tags such as [D12] mark where a line differs from a paper or from its released code;
assets/deviations.md says how.
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
import shlex
import shutil
import signal
import sys
import textwrap
import time
import weakref
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import hilora
import losses
from adapters import ADAPTERS
from data import InputError, run_command
from evaluate import (at_least, autocast, check_device, default_device, default_workers,
                      draw_predictions, frozen_fingerprint, go_offline_without_hub, leaky_in_words,
                      leaky_pretraining, load_checkpoint, load_tuned, make_loader, make_tokenizer,
                      measured_ious, memory_explained, model_inputs, peak_bytes, predict, processes,
                      rank, save_checkpoint, scores, set_precision, sum_over_processes, tuned_state)
from model import (METHODS, OPTIONS, PIXELS, build_model, count_parameters, make_spec,
                   read_state, tuned_groups, used_options)

# --- Flags ----------------------------------------------------------------------------------------
# Each flag is declared once, here, with the source of its default. The defaults themselves depend on
# method, size and dataset: they are the presets below.


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults of this command line, and the description as it is."""


def build_parser():
    """The parser. It sets no defaults, so its result holds only what was typed."""
    parser = argparse.ArgumentParser(
        description=__doc__[:__doc__.index("The file reads")].rstrip(), add_help=False,
        argument_default=argparse.SUPPRESS, usage="python train.py [options]",
        formatter_class=HelpFormatter)

    add = parser.add_argument_group("run").add_argument
    add("-h", "--help", action="store_true", help="show the defaults of this command line")
    add("--method", choices=METHODS, help="method of a paper [M²IST Table I, HiVG Fig. 4 d]")
    add("--dataset", metavar="NAME",
        help=f"train on {', '.join(data.DATASETS)}, shapes, a FILE.jsonl, or several joined by "
             "commas, with the longest preset of the parts")
    add("--size", choices=("tiny", "base", "large"),
        help="size of the model; tiny for shapes, else base, which downloads the encoders")
    add("--row", metavar="ROW",
        help="run this row of the papers' tables, m2ist/V/b say; `list` lists them")
    add("--cost", nargs="+", metavar="METHOD",
        help="print what these methods or rows cost at size base, with the other flags, and train "
             "nothing; name full first to see shares of it")
    add("--json", metavar="FILE", help="write what --cost found to this file")
    add("--out", metavar="DIR",
        help="folder of the run; if not given, runs/DATASET-METHOD-SEED and all flags that change "
             "what is computed")
    add("--resume", action="store_true",
        help="continue the run in --out, with its own options; --epochs N makes it longer")
    add("--save-minutes", type=at_least(0, float), metavar="X",
        help="also write last.pt within an epoch, after X minutes")
    add("--log-every", type=at_least(1), metavar="N",
        help="also write a line to log.jsonl every N steps")
    add("--test", action="store_true",
        help="at the end, also evaluate the best weights on all splits except train and val")
    add("--seed", type=int, metavar="N", help="seed of new weights, order and transforms")

    add = parser.add_argument_group("data").add_argument
    add("--root", metavar="DIR",
        help="folder of annotations and images; `data`, or that of a .jsonl")
    add("--limit", type=at_least(1), metavar="N",
        help="use only the first N expressions of each split, val included")
    add("--image-size", type=at_least(32), metavar="N",
        help="side of the padded square in pixels, a multiple of the encoder's stride (32; tiny: 8); "
             "CLIP has positions for its own side alone [released code, HiVG Table 7]")
    add("--max-tokens", type=at_least(3), metavar="N",
        help="cut texts at this many tokens, first and last included [released code, HiVG Appendix "
             "B]")
    add("--draft", action="store_true",
        help="decode a JPEG at 1/2, 1/4 or 1/8 of its size where that has enough pixels: less "
             "time, slightly different pixels")

    add = parser.add_argument_group("weights").add_argument
    add("--weights", choices=("pretrained", "shapes", "random"),
        help="weights of the encoders: shapes (small ones in assets, for tiny), pretrained, random")
    add("--init-from", metavar="RUN",
        help="start from the tuned weights of a run of the same method and size: its folder or its "
             "best.safetensors")
    add("--vision-weights", metavar="NAME",
        help="DETR R-50: a file in official naming (TransVG's too), a folder, or a hub name; if "
             "not given, DETR's official file [M²IST IV-B a]")
    add("--text-weights", metavar="NAME", help="BERT: a folder or a hub name [M²IST IV-B a]")
    add("--clip-weights", metavar="NAME",
        help="CLIP: a folder, a hub name, or a file in HiVG's naming [HiVG 4.1]")
    add("--pixels", choices=PIXELS,
        help="normalise pixels as this encoder's pretraining did; if not given, the encoder's own")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=at_least(1), metavar="N",
        help="epochs, without those of --stage-epochs [M²IST IV-B c, HiVG 4.1]")
    add("--batch-size", type=at_least(1), metavar="N",
        help="samples for one optimizer step [M²IST Table I, HiVG Table 8]")
    add("--expressions-per-image", type=at_least(1), metavar="K",
        help="let up to K expressions of an image share it, and its transforms, in a step: less "
             "time, as M²IST encodes the image once for all, but samples that vary less")
    add("--lr", type=at_least(0, float), metavar="X",
        help="learning rate of the grounding encoder [M²IST IV-B c, HiVG Table 8]")
    add("--lr-encoder", type=at_least(0, float), metavar="X",
        help="learning rate of all else that is tuned [M²IST IV-B c, HiVG Table 8]")
    add("--schedule", choices=("step", "cosine", "linear"),
        help="step: a tenth after --lr-drop epochs; cosine, linear: to zero [M²IST IV-B c, HiVG "
             "4.1]")
    add("--lr-drop", type=at_least(1), metavar="N", help="epochs before the step [M²IST IV-B c]")
    add("--warmup", type=at_least(0), metavar="N",
        help="steps over which the rates rise linearly at the start of a phase [released code]")
    add("--weight-decay", type=at_least(0, float), metavar="X",
        help="weight decay of AdamW [M²IST IV-B c, HiVG Table 8]")
    add("--clip-norm", type=at_least(0, float), metavar="X",
        help="scale gradients down to this norm; 0 leaves them [released code]")

    add = parser.add_argument_group("M²IST").add_argument
    add("--attention-port", choices=ADAPTERS,
        help="adapter at the attention ports [M²IST Tables V, VI]")
    add("--ffn-port", choices=ADAPTERS,
        help="adapter at the feed-forward ports [M²IST Tables V, VI]")
    add("--insertion", choices=("side", "sequential", "parallel"),
        help="where adapters work: beside the encoder or inside it [M²IST Table VII]")
    add("--bottleneck", type=at_least(1), metavar="N",
        help="C_d, the bottleneck of VEA and LEA [M²IST IV-B b]")
    add("--interaction-dim", type=at_least(1), metavar="N",
        help="C_i, the shared channels of IEA [M²IST IV-B b]")
    add("--scale", type=at_least(0, float), metavar="X",
        help="s, the scale of all adapters [M²IST IV-B b]")
    add("--residual", action="store_true",
        help="adapters add their own input, as Eqs. (1), (4), (5) say [released code: off, D4]")
    add("--side-start", choices=("input", "paired"),
        help="where a side network starts: at the encoder's input, or at that of the first paired "
             "layer [released code, D6]")
    add("--text-layers", type=at_least(1), nargs="+", metavar="N",
        help="M²IST: the text layers that are paired with vision layers 1, 2, ...; HiVG: those "
             "that the bridges read, where the number after the last layer's is the projected text "
             "[M²IST Table VIII c, HiVG Table 10]")

    add = parser.add_argument_group("HiVG").add_argument
    add("--vision-layers", type=at_least(1), nargs="+", metavar="N",
        help="ground the features of these vision layers [HiVG 4.1]")
    add("--bridge-layers", type=at_least(1), nargs="*", metavar="N",
        help="vision layers with a cross-modal bridge [HiVG 4.1]")
    add("--stages", type=at_least(0), metavar="N",
        help="G, the stages and layer groups of LoRA; 0 is without LoRA [HiVG 4.1]")
    add("--rank", type=at_least(1), metavar="N",
        help="r of LoRA [HiVG Table 8; D39 on DETR and BERT]")
    add("--alpha", type=at_least(1e-6, float), metavar="X",
        help="α of LoRA; its factors are scaled by α / r [HiVG Table 8; D39 on DETR and BERT]")
    add("--stage-epochs", type=at_least(0), metavar="N",
        help="epochs of each stage; 0: the stages share --epochs, and no phase without LoRA "
             "precedes them [HiVG Table 8]")
    add("--stage-lr", type=at_least(0, float), nargs="+", metavar="X",
        help="rate of each stage; the last one serves all further stages [HiVG Table 8]")

    add = parser.add_argument_group("losses").add_argument
    add("--l1", type=at_least(0, float), metavar="X",
        help="weight of smooth L1 [M²IST Eq. (6), HiVG Table 8]")
    add("--beta", type=at_least(0, float), metavar="X",
        help="β of smooth L1; 0 is plain L1 [released code, D1]")
    add("--giou", type=at_least(0, float), metavar="X",
        help="λ of M²IST Eq. (6), the weight of GIoU [released code, HiVG Table 8]")
    add("--contrast", type=at_least(0, float), metavar="X",
        help="weight of HiVG Eq. (11) [HiVG Eq. (15)]")
    add("--focal", type=at_least(0, float), metavar="X",
        help="λ_focal of HiVG Eq. (13) [HiVG Table 8]")
    add("--dice", type=at_least(0, float), metavar="X",
        help="λ_dice of HiVG Eq. (13) [HiVG Table 8]")
    add("--attention-loss", type=at_least(0, float), metavar="X",
        help="weight of a loss that draws [REG]'s attention into the box [ours, D49]")

    add = parser.add_argument_group("machine").add_argument
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps, ...")
    add("--amp", choices=("off", "tf32", "bf16", "fp16"),
        help="mixed precision; tf32 is float32 with faster matrix products on a GPU [released "
             "code: off]")
    add("--micro-batch", type=at_least(1), metavar="N",
        help="samples on the device at once, in training and on val; their gradients add up to "
             "those of the batch. HiVG's contrast is then within a micro-batch")
    add("--checkpointing", action="store_true",
        help="compute each layer again in the backward pass: less memory, more time, the same "
             "numbers")
    add("--compile", action="store_true",
        help="compile the model by torch.compile: a minute or more at the start, then faster steps "
             "on a GPU")
    add("--workers", type=at_least(0), metavar="N", help="processes that load images")
    return parser


# --- Presets: what the papers use -----------------------------------------------------------------

# The same for all runs.
COMMON = dict(
    method="m2ist", dataset="shapes", row=None, init_from=None, resume=False, save_minutes=10.0,
    log_every=100, test=False, seed=0, root=None, limit=None, draft=False, expressions_per_image=1,
    amp="off", compile=False, last_stage=None, stage_epochs=0, stage_lr=[],
    warmup=0, clip_norm=0.0,      # as both released codes
    weight_decay=1e-4,            # M²IST IV-B c, HiVG Table 8
    lr_drop=60,                   # M²IST IV-B c
    l1=1.0, giou=1.0, beta=0.0,   # M²IST Eq. (6) [D1] [D2]
    contrast=0.0, focal=0.0, dice=0.0, attention_loss=0.0)

HIVG_LOSSES = dict(l1=2.0, giou=2.0, contrast=1.0, focal=20.0, dice=2.0)    # HiVG Table 8, Eq. (15)
# HiVG Fig. 4 (d): the loss of original CLIP, with and without vanilla LoRA [D35]
BOX_LOSS_ALONE = dict(contrast=0.0, focal=0.0, dice=0.0)

# PRESETS[encoders, size], and what a method changes of it, PRESETS[method, size].
PRESETS = {
    # M²IST Section IV-B c; the batch of Table I [D55]. 1e-5 is the paper's rate for M³ISA, taken for
    # the other adapters and LoRA too [D39], and TransVG's for encoders that are trained in full [D12].
    ("detr", "base"): dict(
        epochs=90, batch_size=64, lr=1e-4, lr_encoder=1e-5, schedule="step"),
    # Ours, found on `shapes`: 1,500 steps in all, so a larger rate and a warm-up. Without the
    # attention loss [D49] a run predicts the mean box for hundreds of steps.
    ("detr", "tiny"): dict(
        epochs=2, batch_size=32, lr=1e-3, lr_encoder=1e-3, schedule="linear", warmup=100,
        weight_decay=0.1, attention_loss=0.3),
    # Adapters start from nothing and take the whole rate; pretrained encoders take a tenth of it.
    ("full", "tiny"): dict(lr_encoder=1e-4),

    # HiVG Section 4.1 and Table 8. [D21] The released batches are those of several GPUs.
    ("clip", "base"): dict(
        epochs=50, batch_size=80, lr=2.5e-4, lr_encoder=2.5e-4, schedule="cosine",
        **HIVG_LOSSES, stage_epochs=20, stage_lr=[1e-4, 0.5e-4, 0.25e-4]),
    ("clip", "large"): dict(
        epochs=50, batch_size=32, lr=2.5e-4, lr_encoder=2.5e-4, schedule="cosine",
        **HIVG_LOSSES, stage_epochs=15, stage_lr=[1e-4, 0.75e-4, 0.5e-4, 0.25e-4]),
    # Ours: five epochs in all, for hivg, plain CLIP and CLIP with LoRA alike.
    ("clip", "tiny"): dict(
        epochs=2, batch_size=32, lr=2e-3, lr_encoder=2e-3, schedule="linear", warmup=100,
        weight_decay=0.1, **HIVG_LOSSES, attention_loss=0.3, stage_epochs=1,
        stage_lr=[1.5e-3, 1e-3, 7e-4]),
    # HiVG Fig. 4 (d): the box loss alone [D35]. The one stage of vanilla LoRA is as long as all
    # stages of HiLoRA.
    ("clip-frozen", "base"): dict(BOX_LOSS_ALONE),
    ("clip-frozen", "large"): dict(BOX_LOSS_ALONE),
    ("clip-frozen", "tiny"): dict(BOX_LOSS_ALONE, epochs=5),
    ("clip-lora", "base"): dict(BOX_LOSS_ALONE, stage_epochs=60),
    ("clip-lora", "large"): dict(BOX_LOSS_ALONE, stage_epochs=60),
    ("clip-lora", "tiny"): dict(BOX_LOSS_ALONE, stage_epochs=3)}

# What a dataset changes, BY_DATASET[encoders, size, dataset].
BY_DATASET = {
    ("detr", "base", "refcoco+"): dict(epochs=180, lr_drop=120),         # M²IST IV-B c
    ("detr", "base", "refcocog-umd"): dict(max_tokens=40),               # as released
    ("detr", "base", "refcocog-google"): dict(max_tokens=40),
    ("clip", "tiny", "shapes"): dict(limit=12_000)}    # of 24,000, so that a run takes minutes


def preset(method, size, dataset):
    """What a method uses at a size and on a dataset, or on several that are joined by commas: then
    the longest training of the parts, and the most tokens."""
    encoders = METHODS[method]["encoders"]
    values = {**COMMON, **PRESETS[encoders, size], **PRESETS.get((method, size), {})}
    parts = [BY_DATASET.get((encoders, size, name), {}) for name in dataset.split(",")]
    values.update(max(parts, key=lambda part: part.get("epochs", 0)))
    tokens = [part["max_tokens"] for part in parts if "max_tokens" in part]
    if tokens:
        values["max_tokens"] = max(tokens)
    return values


# --- Rows of M²IST's Tables I, II, V-X and of HiVG's Tables 3-5, 9-11 and Fig. 4 (d) --------------

# HiVG Table 11 has neither bridge nor HiLoRA nor RTCC.
FEATURES_ALONE = dict(bridge_layers=[], stages=0, focal=0.0, dice=0.0)

# row: what it changes of the defaults of `m2ist` or `hivg` at size base; {} is the default itself.
# "tiny" replaces options for the tiny encoders [D43]: layer numbers in proportion to their depth (on
# DETR and BERT two paired layers in place of six), a fourth of the bottlenecks, a twentieth of the
# epochs of a stage.
ROWS = {
    "m2ist/I/full": dict(method="full"),
    "m2ist/I/frozen": dict(method="frozen"),    # V (a), beside the methods of Table I
    "m2ist/I/adapter": dict(method="adapter"),
    "m2ist/I/lora": dict(method="lora"),
    "m2ist/I/adaptformer": dict(method="adaptformer"),
    "m2ist/I/cm-adapter": dict(method="cm-adapter"),
    "m2ist/I/mrs-adapter": dict(method="mrs-adapter"),
    "m2ist/I/m2ist": {},
    # Table II, by the C_d of VEA and LEA; IEA's stays 128, as the paper's counts need
    "m2ist/II/8": dict(bottleneck=8, tiny=dict(bottleneck=2)),
    "m2ist/II/32": dict(bottleneck=32, tiny=dict(bottleneck=8)),
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
    "m2ist/VIII/a": dict(text_layers=[1, 2, 3, 4, 5, 6], tiny=dict(text_layers=[1, 2])),
    "m2ist/VIII/b": dict(text_layers=[1, 3, 5, 7, 9, 11], tiny=dict(text_layers=[2, 4])),
    "m2ist/VIII/c": {},
    # Table IX [D41]: its counts are those of IEA's bottleneck
    "m2ist/IX/a": dict(interaction_bottleneck=32, tiny=dict(interaction_bottleneck=8)),
    "m2ist/IX/b": dict(interaction_bottleneck=64, tiny=dict(interaction_bottleneck=16)),
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
    # Layer-to-layer: a bridge at layer l reads text layer l alone [D40]
    "hivg/4/7": dict(layer_to_layer=True, bridge_weights="none", text_layers=[4, 8, 12],
                     tiny=dict(text_layers=[1, 2, 3])),
    "hivg/4/8": dict(text_layers=[12], tiny=dict(text_layers=[3])),    # as 10/2, other figures [D52]
    # Table 5: HiLoRA
    "hivg/5/1": dict(last_stage=1),
    "hivg/5/2": dict(last_stage=2),
    "hivg/5/3": {},
    # Neither epochs nor rates of two or four stages are given: each has the default's epochs, and a
    # fourth stage the third's rate.
    "hivg/5/4": dict(stages=2),
    "hivg/5/5": dict(stages=4),
    "hivg/5/6": dict(rank=16),
    "hivg/5/7": dict(rank=64),
    "hivg/5/8": dict(deep_to_shallow=True),
    # Table 9: the constraints [D42]: line 3 is CLC without RTCC, where the paper ticks both
    "hivg/9/1": dict(contrast=0.0, focal=0.0, dice=0.0),
    "hivg/9/2": dict(contrast=0.0),
    "hivg/9/3": dict(focal=0.0, dice=0.0),
    "hivg/9/4": {},
    # Table 10: what the bridge sees of the text
    "hivg/10/1": dict(bridge_weights="aware"),
    "hivg/10/2": dict(text_layers=[12], tiny=dict(text_layers=[3])),
    "hivg/10/3": dict(text_layers=[6, 12], tiny=dict(text_layers=[2, 3])),
    "hivg/10/4": dict(text_layers=[1, 4, 8, 12], tiny=dict(text_layers=[1, 2, 3])),
    "hivg/10/5": {},
    # Table 11: vision layers that are grounded
    "hivg/11/1": dict(FEATURES_ALONE, vision_layers=[12], tiny=dict(vision_layers=[6])),
    "hivg/11/2": dict(FEATURES_ALONE, vision_layers=[2, 5, 9], tiny=dict(vision_layers=[1, 3, 5])),
    "hivg/11/3": dict(FEATURES_ALONE, vision_layers=[2, 5, 9, 12],
                      tiny=dict(vision_layers=[1, 3, 5, 6])),
    "hivg/11/4": dict(FEATURES_ALONE, vision_layers=[1, 4, 8, 12],
                      tiny=dict(vision_layers=[1, 2, 4, 6])),
    "hivg/11/5": dict(FEATURES_ALONE, vision_layers=[3, 6, 9, 12],
                      tiny=dict(vision_layers=[2, 3, 5, 6])),
    "hivg/11/6": dict(FEATURES_ALONE, vision_layers=[6, 7, 8, 9, 10, 11, 12],
                      tiny=dict(vision_layers=[3, 4, 5, 6])),
    "hivg/11/7": dict(FEATURES_ALONE, vision_layers=[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
                      tiny=dict(vision_layers=[1, 2, 3, 4, 5, 6])),
    # Fig. 4 (d): from original CLIP to HiVG
    "hivg/fig4d/original-clip": dict(method="clip-frozen"),
    "hivg/fig4d/clip-vanilla-lora": dict(method="clip-lora"),
    "hivg/fig4d/no-hilora-no-macb": dict(bridge_layers=[], stages=0),
    "hivg/fig4d/no-hilora": dict(stages=0),
    "hivg/fig4d/vanilla-lora": dict(stages=1, stage_epochs=60, tiny=dict(stage_epochs=3)),
    "hivg/fig4d/stage-1": dict(last_stage=1),
    "hivg/fig4d/stage-2": dict(last_stage=2),
    "hivg/fig4d/stage-3": {}}


def row_options(row, size):
    """The options that a row sets at a size, its method among them."""
    if row not in ROWS or size == "large":
        raise InputError(f"there is no row {row!r} of size {size}: `python train.py --row list` "
                         f"lists the rows; the sizes are base and tiny")
    options = {"method": row.partition("/")[0], **ROWS[row]}
    tiny = options.pop("tiny", {})
    if size == "tiny":
        options.update(tiny)
    return options


def print_rows():
    """The map of the papers' tables."""
    print(f"{'row':32}what it changes of the method's defaults at size base")
    for row in ROWS:
        own = row.partition("/")[0]
        options = row_options(row, "base")
        parts = [f"{name} {value}" for name, value in options.items() if value != own]
        print(f"{row:32}{', '.join(parts) or 'nothing: the default itself'}")


# --- From the command line to the options of a run ------------------------------------------------

# Options that change nothing of what a run computes, apart from the last bits of its sums.
CHANGES_NOTHING = ("device", "workers", "save_minutes", "log_every", "resume", "out", "test",
                   "checkpointing")


def parse_args(argv=None):
    """The options of a run as a Namespace: what is on the command line and, for the rest, what the
    papers use with this method, size and dataset."""
    parser = build_parser()
    given = vars(parser.parse_args(argv))
    asks_for_help = given.pop("help", False)
    if given.get("row") == "list":
        print_rows()
        sys.exit()
    if "cost" in given and not asks_for_help:
        print_costs(given)
        sys.exit()

    out = given.get("out") or default_out(given)
    if given.get("resume"):
        saved = read_args(Path(out))
        refuse_changes(given, saved)
        args = argparse.Namespace(**{**saved, **given, "out": out})
    else:
        args = resolve({**given, "out": out})
    if asks_for_help:
        parser.set_defaults(**vars(args))    # so that each flag shows its default
        parser.print_help()
        sys.exit()
    return args


def resolve(given):
    """The options of a new run as a Namespace. given: {option: value} of the command line. Raises
    InputError for what does not go together."""
    args = argparse.Namespace(**{**defaults(given), **given})
    if "json" in given:
        raise InputError("--json is for --cost: give --cost too, or leave --json out")
    if METHODS[args.method]["encoders"] == "clip":
        # Without the losses of Eq. (13) there is nothing that would train the MLP of Eq. (12).
        args.region_text = args.focal > 0 or args.dice > 0
    if args.micro_batch is None:
        args.micro_batch = args.batch_size
    for name in ("vision_weights", "text_weights", "clip_weights"):
        if name in given and args.weights != "pretrained":
            raise InputError(f"--{name.replace('_', '-')} is for --weights pretrained, and this run "
                             f"has --weights {args.weights}: leave it out")
    stages = args.stages or 0
    if stages > 0 and args.stage_epochs == 0 and args.epochs % stages > 0:
        raise InputError(f"--epochs is {args.epochs}, which --stages {stages} cannot share: give a "
                         f"multiple of {stages}, or --stage-epochs of 1 or more")
    if args.last_stage is not None and args.last_stage > stages:
        raise InputError(f"the last stage is {args.last_stage}, but --stages is {stages}")
    return args


def defaults(given):
    """The defaults of a command line: {option: value}, None for what its method does not use. Where
    several places have a value, a later one wins: the model's default, the preset, the row.

    given: {option: value} of the command line."""
    dataset = given.get("dataset", COMMON["dataset"])
    size = given.get("size", "tiny" if dataset == "shapes" else "base")
    row = row_options(given["row"], size) if given.get("row") else {}
    for name, value in row.items():
        if given.get(name, value) != value:
            raise InputError(f"--row {given['row']} has {name} {value}: leave out "
                             f"--{name.replace('_', '-')}, or leave out --row and give its flags")
    method = given.get("method") or row.get("method") or COMMON["method"]
    make_spec(method, size)    # refuses a size that the method does not have
    values = {**preset(method, size, dataset), **row}

    chosen = {name: value for name, value in {**values, **given}.items() if name in OPTIONS}
    spec = make_spec(method, size, **chosen)
    used = used_options(spec)
    refuse_unused(given, method, spec)
    for name in OPTIONS:
        values[name] = spec.get(name) if name in used else None
    title = given.get("row") or method
    changed = [f"{name} {given[name]}" for name in sorted(given) if changes_row(name)]
    if given.get("row") and changed:
        title = f"{title} changed ({', '.join(changed)})"
    return {**values, "method": method, "size": size, "title": title,
            "weights": "shapes" if size == "tiny" else "pretrained", "micro_batch": None,
            "device": default_device(), "workers": 0 if dataset == "shapes" else default_workers()}


def refuse_unused(given, method, spec):
    """Refuse flags that a run with this spec would not use. make_spec refuses those of the model."""
    unused = []
    if spec["encoders"] == "detr":
        unused += ["contrast", "focal", "dice"]
    elif not spec["region_text"]:
        unused += ["focal", "dice"]
    if not spec["lora_targets"] or not spec["stages"]:
        unused += ["stage_epochs", "stage_lr"]
    for name in unused:
        if name in given:
            raise InputError(f"--{name.replace('_', '-')} is not for --method {method} as it is here: "
                             f"leave it out")


def changes_row(name):
    """Whether a flag changes what a row of the tables says."""
    says_where = ("dataset", "method", "row", "size", "seed", "root", "limit", "draft", "json",
                  "cost", "amp", "compile", "micro_batch")
    return name not in CHANGES_NOTHING and name not in says_where


def default_out(given):
    """runs/DATASET-METHOD-SEED, or with the row's name where a row is given. The other flags that
    change what a run computes follow, so that runs which differ have folders that differ."""
    datasets = given.get("dataset", COMMON["dataset"]).split(",")
    stems = ",".join(Path(dataset).stem for dataset in datasets)
    name = given.get("row") or given.get("method") or COMMON["method"]
    parts = [stems, name.replace("/", "-"), str(given.get("seed", 0))]
    for flag in sorted(given):
        if flag in CHANGES_NOTHING or flag in ("dataset", "row", "method", "seed", "root"):
            continue
        value = given[flag]
        if isinstance(value, list):
            value = "+".join(str(part) for part in value) or "none"
        parts.append(f"{flag}={Path(str(value)).name}")    # of a file, the name alone
    return "runs/" + "-".join(parts)


def refuse_changes(given, saved):
    """Refuse flags that contradict the run that is to be resumed. A run may be made longer, unless
    it has stages, whose epochs would come later."""
    for name, value in given.items():
        if name in CHANGES_NOTHING or value == saved.get(name):
            continue
        if name == "root" or (name == "dataset" and value.endswith(".jsonl")):
            continue    # data may have moved; read_last checks that the samples are the same
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


def model_arguments(args):
    """The arguments of build_model that rebuild the model of a run."""
    options = {name: getattr(args, name, None) for name in OPTIONS}
    return {"method": args.method, "size": args.size, "weights": args.weights, **options}


# --- Optimizer and schedule -----------------------------------------------------------------------


class Phase(NamedTuple):
    """Epochs first + 1 .. last of a run."""
    name: str
    stage: int           # of LoRA; 0 is without
    first: int           # how many epochs of the run come before this phase
    last: int            # the number of its last epoch
    lr: float            # peak rate of the grounding encoder
    lr_encoder: float    # peak rate of all else


def plan(args):
    """The phases of a run: a warm-up without LoRA, then LoRA stage by stage (HiVG Section 4.1). The
    bridges are trained in all of them [D27]. Stages without --stage-epochs (LoRA on DETR and BERT)
    share --epochs and begin at epoch 1, as adapters do."""
    stages = args.stages or 0
    if stages == 0:
        return [Phase("training", 0, 0, args.epochs, args.lr, args.lr_encoder)]

    phases = []
    end = 0
    epochs = args.epochs // stages
    if args.stage_epochs > 0:
        phases.append(Phase("warm-up", 0, 0, args.epochs, args.lr, args.lr_encoder))
        end = args.epochs
        epochs = args.stage_epochs
    for stage in range(1, (args.last_stage or stages) + 1):
        lr, lr_encoder = args.lr, args.lr_encoder
        if args.stage_lr:    # as released, a stage has one rate for all that it trains
            lr = lr_encoder = args.stage_lr[min(stage, len(args.stage_lr)) - 1]
        phases.append(Phase(f"stage {stage}", stage, end, end + epochs, lr, lr_encoder))
        end += epochs
    return phases


def make_optimizer(model, args, phase):
    """AdamW with two rates: the grounding encoder's, and that of all that is tuned in or beside the
    encoders."""
    tuned = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head = [p for name, p in tuned if name.startswith("grounding.")]
    rest = [p for name, p in tuned if not name.startswith("grounding.")]
    groups = [dict(params=head, lr=phase.lr, peak=phase.lr),
              dict(params=rest, lr=phase.lr_encoder, peak=phase.lr_encoder)]
    return torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=True)


def rate_factor(args, step, steps, epochs):
    """What the peak rates are multiplied by at a step (from 0) of a phase that has `epochs` epochs
    with `steps` steps each. [D50] Cosine falls by step; in HiVG's released code by epoch."""
    warm = 1.0
    warmup = min(args.warmup, epochs * steps // 10)    # a tenth of the phase at most
    if warmup > 0:
        warm = min(1.0, (step + 1) / warmup)
    if args.schedule == "cosine":
        return warm * 0.5 * (1 + math.cos(math.pi * step / (epochs * steps)))
    if args.schedule == "linear":
        return warm * (1 - step / (epochs * steps))
    dropped = step // steps >= args.lr_drop
    return warm * (0.1 if dropped else 1.0)


def seed_of_step(args, epoch, step):
    """The seed of a step's dropout. It depends only on seed, epoch and step, so that a step is the
    same in a resumed run. Processes that train together differ."""
    return in_range(((args.seed * 100_003 + epoch) * 1_000_003 + step) * 1_009 + rank())


def in_range(seed):
    """torch takes seeds of 64 bits; any whole number leads to one of them."""
    return seed % 2 ** 63


# --- The loop -------------------------------------------------------------------------------------


@dataclasses.dataclass
class State:
    """How far a run is; last.pt holds it as it is. Each epoch is first trained, then evaluated, and
    then written down."""
    epoch: int = 0             # epochs that are trained
    step: int = 0              # steps of the next epoch that are done
    evaluated: bool = True     # whether all epochs that are trained are evaluated, too
    warned: bool = False       # whether warn_standstill has looked
    best: float = -1.0         # the best accuracy on val so far
    log: list = dataclasses.field(default_factory=list)       # a dictionary a line of log.jsonl
    sums: dict = dataclasses.field(default_factory=dict)      # over the epoch under way, see add_step
    recent: dict = dataclasses.field(default_factory=dict)    # since the last --log-every
    frozen: str = ""           # fingerprint of the encoders as they were built
    samples: str = ""          # fingerprint of the samples to train on
    model: dict = None         # tuned weights ...
    optimizer: dict = None     # ... and AdamW's state, as they were when last.pt was written
    scaler: dict = None


def train(args):
    """Build the model of a run and train it in phases of epochs."""
    began = time.time()
    out = Path(args.out)
    train_samples, val_samples = data.load_for_training(args.dataset, args.root, args.limit)
    if args.test and not test_splits(args):
        raise InputError(f"--test: {args.dataset} has no split but train and val; leave --test out")
    print(f"{args.title} {args.size} on {args.dataset}: {len(train_samples)} expressions to train "
          f"on, {len(val_samples)} to validate; leaky pretraining {leaky_in_words(args)}")

    torch.manual_seed(in_range(args.seed))    # for the new weights of the model
    model = build_model(**model_arguments(args)).to(args.device)
    counts = count_parameters(model)
    print(f"{counts['total']:,} parameters in all, {counts['trainable']:,} trained, "
          f"{counts['encoder_tunable']:,} of them in or beside the encoders")
    if "cuda" in args.device:
        peak = simulate(last_model(args, "meta"), args, samples_at_once(args))["peak"]
        print(f"a step with {samples_at_once(args)} samples at once needs {peak / 2 ** 30:.2f} GiB "
              f"(simulated), and CUDA's context and workspaces")
    warn_truncated([*train_samples, *val_samples], make_tokenizer(model.spec))
    train_loader = make_loader(train_samples, model, args, train=True)
    val_loader = None
    if val_samples:
        # What fits on the device in training fits in evaluation, too.
        val_loader = make_loader(val_samples, model, args, batch_size=samples_at_once(args))

    state = read_last(out / "last.pt", frozen_fingerprint(model), fingerprint(train_samples))
    if args.init_from and state.model is None:
        init_from(model, state.frozen, args)
    write_args(out, args)
    scaler = torch.amp.GradScaler(torch.device(args.device).type, enabled=args.amp == "fp16")
    if state.scaler is not None:
        scaler.load_state_dict(state.scaler)
    phases = plan(args)
    warn_of_schedule(args, phases, train_samples, len(train_loader))
    # Where stderr is a file, lines of the log are printed in place of a progress bar.
    silent = rank() > 0 or not sys.stderr.isatty()
    steps = len(train_loader)
    if state.epoch >= phases[-1].last and state.evaluated:
        print("nothing is left to train; --epochs N makes a run without stages longer")
    with tqdm(total=phases[-1].last * steps, initial=state.epoch * steps + state.step,
              desc=args.method, unit="step", disable=silent) as bar:
        for phase in phases:
            if state.epoch > phase.last or (state.epoch == phase.last and state.evaluated):
                continue    # a resumed run has done this phase
            optimizer = begin_phase(model, phase, state, args)
            parallel = in_parallel(model)    # what a step calls: the model, or DDP around it
            while state.epoch < phase.last or not state.evaluated:
                if state.evaluated:
                    train_epoch(parallel, train_loader, optimizer, scaler, phase, state, args, bar)
                    # What is trained is saved before it is evaluated: hours of training are not
                    # lost to what may happen there.
                    save_last(out, state, model, optimizer, scaler)
                    if stop.number:    # a signal came after the last step had asked for one
                        raise Stopped(stop.number)
                evaluate_epoch(model, val_loader, state, args)
                save_last(out, state, model, optimizer, scaler)
            warn_worse(phase, state.log)

    wait_for_all()    # until the first process has written the best weights
    load_tuned(model, read_state(out / "best.safetensors"), out / "best.safetensors")
    with torch.compiler.set_stance("force_eager"):
        draw_predictions(model, data.spread(val_samples or train_samples), args, out / "val.png")
        if args.test:
            test(model, args, out / "test.json")
    reached = ""
    if val_samples:
        reached = f"accuracy on val {best_of(state.log, 1, phases[-1].last):.4f} at best; "
    print(f"{(time.time() - began) / 60:.1f} minutes; {reached}look at {out}/val.png; "
          f"python evaluate.py {shlex.quote(str(out))}")


def init_from(model, frozen, args):
    """Put the tuned weights of another run into `model`, which is new. frozen: the fingerprint of the
    encoders of `model`, which must be those of the other run."""
    initial, config = load_checkpoint(args.init_from)
    theirs = (config["model"]["method"], config["model"]["size"])
    if theirs != (args.method, args.size):
        raise InputError(f"--init-from {args.init_from}: is a run of --method {theirs[0]} --size "
                         f"{theirs[1]}, not of {args.method} {args.size}")
    if config["frozen"] != frozen:
        raise InputError(f"--init-from {args.init_from}: was trained on other encoder weights; give "
                         f"the same --vision-weights, --text-weights or --clip-weights")
    load_tuned(model, tuned_state(initial), args.init_from)
    print(f"starts from {args.init_from}, which was trained on {config['args']['dataset']}")


def begin_phase(model, phase, state, args):
    """Put the LoRA factors of the phase's stage in place, and make the optimizer. A resumed run goes
    on within the phase."""
    begins = state.epoch == phase.first and state.step == 0
    if begins and phase.first > 0:
        # [D33] A stage starts from the weights that were best on val so far, as released. Their file
        # holds W + α/r B A, so loading it is the merge of HiVG Section 3.3. If they are older than
        # the last stage, that stage is undone: its factors are dropped in all layers.
        wait_for_all()    # until the first process has written it
        best = Path(args.out) / "best.safetensors"
        load_tuned(model, read_state(best), best)
    # The seed makes the start of A the same whenever the stage begins, in a resumed run too.
    torch.manual_seed(in_range(args.seed * 100_003 + 50_000 + phase.stage))
    model.begin_stage(phase.stage)
    groups = [f"{count:,} {group}" for group, count in tuned_groups(model).items()]
    tqdm.write(f"{phase.name} trains {'; '.join(groups)}")
    optimizer = make_optimizer(model, args, phase)
    if not begins:
        load_tuned(model, state.model, "last.pt")
        optimizer.load_state_dict(state.optimizer)
    if args.compile:
        # Each phase is another model. Its batches have one shape, as texts are padded to
        # --max-tokens then: other lengths would be compiled again, until the compiler gives up.
        torch.compiler.reset()
        model.compile()
    return optimizer


def train_epoch(model, loader, optimizer, scaler, phase, state, args, bar):
    """One pass over the training data or, in a resumed run, the rest of it."""
    epoch = state.epoch + 1
    steps = len(loader)
    model.train()
    # Order and transforms depend on the seed of the run and the epoch alone.
    loader.dataset.epoch.fill_(epoch)
    loader.batch_sampler.epoch = epoch
    loader.batch_sampler.first = state.step
    stop.in_epoch = True
    if "cuda" in args.device:
        torch.cuda.reset_peak_memory_stats()    # the log has the peak of training, without val
    began = time.time()
    for batch in loader:
        waited = time.time() - began
        # The schedule counts the steps of the phase; epochs count from 1 over the whole run.
        done = (epoch - 1 - phase.first) * steps + state.step
        factor = rate_factor(args, done, steps, phase.last - phase.first)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor

        torch.manual_seed(seed_of_step(args, epoch, state.step))
        metrics, stopping = train_step(model, batch, optimizer, scaler, args)
        if not math.isfinite(sum(metrics.values())):
            refuse_to_go_on(metrics, args, epoch, state.step, batch)

        state.step += 1
        samples = len(batch["boxes"]) * processes()
        for sums in (state.sums, state.recent):
            add_step(sums, metrics, samples, time.time() - began, waited)
        if state.step % args.log_every == 0:
            state.log.append({"epoch": epoch, "phase": phase.name, "step": state.step,
                              **rates_of(optimizer), **means_of(state.recent, args)})
            state.recent = {}
            write_log(args, state)
            if bar.disable:
                print_line(state.log[-1])
            warn_standstill(state, steps, plan(args)[-1].last)
        if stopping or time.time() - stop.saved > 60 * args.save_minutes:
            save_last(Path(args.out), state, unwrapped(model), optimizer, scaler)
        if stopping:
            raise Stopped(stop.number or signal.SIGTERM)    # or another process was asked to stop
        bar.set_postfix_str(f"{phase.name}, epoch {epoch}, loss {metrics['train_loss']:.3f}")
        bar.update()
        began = time.time()

    stop.in_epoch = False
    state.log.append({"epoch": epoch, "phase": phase.name, **rates_of(optimizer),
                      **means_of(state.sums, args)})
    state.epoch = epoch
    state.step = 0
    state.sums = {}
    state.recent = {}
    state.evaluated = False
    warn_standstill(state, steps, plan(args)[-1].last)    # also where an epoch has few steps


def train_step(model, batch, optimizer, scaler, args):
    """One optimizer step -> metrics, and whether this process or another one is asked to stop.
    metrics: means over the batch, {"train_loss", each term of the loss by its name,
    "train_acc@0.5", "grad_norm"}. fp16 skips a step whose gradients overflow and goes on with a
    smaller scale; "grad_norm" is then missing."""
    optimizer.zero_grad(set_to_none=True)
    size = len(batch["boxes"])
    means = 0.0
    for start in range(0, size, args.micro_batch):    # gradient accumulation over micro-batches
        end = min(start + args.micro_batch, size)
        inputs = model_inputs(batch, start, end, args.device)
        boxes = batch["boxes"][start:end].to(args.device, non_blocking=True)
        share = (end - start) / size
        # With several processes, gradients are averaged only in the last backward pass of a step.
        model.require_backward_grad_sync = end == size

        # Images and texts in, boxes out: text encoder, vision encoder, grounding encoder.
        with autocast(args):
            outputs = model(**inputs, attention=args.attention_loss > 0)
        # The loss is a mean over the micro-batch. Weighted by its share, the parts add up to the
        # mean over the batch.
        terms = weighted_losses(outputs, boxes, args)
        loss = sum(terms.values())    # M²IST Eq. (6), HiVG Eq. (15)
        scaler.scale(loss * share).backward()

        correct = (measured_ious(outputs.boxes.detach(), boxes) >= 0.5).float().mean()
        metrics = {"train_loss": loss, **terms, "train_acc@0.5": correct}
        means = means + share * torch.stack([value.detach() for value in metrics.values()])

    # Without fp16 the scaler passes gradients and steps on as they are.
    scaler.unscale_(optimizer)
    tuned = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.get_total_norm([p.grad for p in tuned if p.grad is not None])
    if args.clip_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(tuned, args.clip_norm, norm)
    # Processes average what they measured, and agree on whether one of them is asked to stop.
    signal_number = torch.tensor([float(stop.number)], device=means.device)
    shared = sum_over_processes(torch.cat([means, signal_number])) / processes()
    # One transfer from the device in a step, as it waits until the device has caught up.
    *numbers, stopping, norm = torch.cat([shared, norm[None]]).tolist()
    metrics = dict(zip(metrics, numbers))
    overflow = not math.isfinite(norm)
    if not overflow or not scaler.is_enabled():
        metrics["grad_norm"] = norm
    if not overflow or scaler.is_enabled():    # gradients that are not finite must not reach weights
        scaler.step(optimizer)
        scaler.update()
    return metrics, stopping > 0


def weighted_losses(outputs, boxes, args):
    """The terms of M²IST Eq. (6) or HiVG Eq. (15), by the weights of the run: {name: scalar}."""
    return losses.loss_terms(outputs, boxes, l1=args.l1, giou=args.giou, beta=args.beta,
                             contrast=args.contrast, focal=args.focal, dice=args.dice,
                             attention=args.attention_loss)


def rates_of(optimizer):
    """The rates of the last step, from the optimizer: a resumed run may have no step left in its
    epoch."""
    head, rest = optimizer.param_groups
    return {"lr": head["lr"], "lr_encoder": rest["lr"]}


def add_step(sums, metrics, samples, seconds, waited):
    """Add a step to the sums of an epoch: {name: [sum over the samples, samples]} for metrics, which
    are means over the samples of the step, and what the step took."""
    for name, value in metrics.items():
        total, count = sums.get(name, (0.0, 0))
        sums[name] = [total + value * samples, count + samples]
    for name, value in (("samples", samples), ("seconds", seconds), ("waited", waited),
                        ("skipped_steps", "grad_norm" not in metrics)):
        sums[name] = sums.get(name, 0) + value


def means_of(sums, args):
    """The line of the log that sums come to: means over the samples, and what the steps cost."""
    line = {name: value[0] / value[1] for name, value in sums.items() if isinstance(value, list)}
    line["seconds"] = sums["seconds"]
    line["seconds_waiting_for_data"] = sums["waited"]
    line["samples_per_second"] = sums["samples"] / sums["seconds"]
    line["peak_bytes"] = peak_bytes(args.device)
    if args.amp == "fp16":
        line["skipped_steps"] = sums["skipped_steps"]
    return line


def refuse_to_go_on(metrics, args, epoch, step, batch):
    """Stop a run whose loss or gradients are not finite. Neither last.pt nor best.safetensors has
    them."""
    name, value = next(item for item in metrics.items() if not math.isfinite(item[1]))
    kept = ""
    if Path(args.out, "last.pt").exists():
        kept = f"; {args.out}/last.pt holds what came before"
    raise InputError(f"{name} is {value} at epoch {epoch}, step {step + 1}, samples "
                     f"{batch['index'].tolist()}: start again in another --out with a smaller "
                     f"--lr, with --clip-norm 1, or with --amp off{kept}")


def evaluate_epoch(model, loader, state, args):
    """Evaluate the epoch that was just trained, and write down what was found. loader: None if the
    dataset has no val; the last epoch then counts as the best."""
    line = state.log[-1]
    if loader is not None:
        with torch.compiler.set_stance("force_eager"):    # batches of any shape
            found = scores(predict(model, loader, args).ious)
        line.update({f"val_{name}": value for name, value in found.items()})
    line["leaky_pretraining"] = leaky_pretraining(args)
    print_line(line)
    if loader is None or line["val_acc@0.5"] >= state.best:
        state.best = line.get("val_acc@0.5", state.best)
        config = {"model": model_arguments(args), "args": vars(args), **line, "frozen": state.frozen}
        if rank() == 0:
            save_checkpoint(Path(args.out) / "best.safetensors", model, config)
    write_log(args, state)
    state.evaluated = True


def best_of(log, first, last):
    """The best accuracy on val of the epochs first .. last; 0 if there is none."""
    reached = [line.get("val_acc@0.5", 0.0) for line in log if first <= line["epoch"] <= last]
    return max(reached, default=0.0)


def warn_worse(phase, log):
    """Say so if a stage ends worse on val than it began."""
    here = best_of(log, phase.first + 1, phase.last)
    before = best_of(log, 1, phase.first)
    if phase.stage > 0 and here < before:
        tqdm.write(f"{phase.name} ends worse on val ({here:.4f} at best) than it began "
                   f"({before:.4f}): the weights that it began with are kept")


def warn_of_schedule(args, phases, samples, steps):
    """Say how long a run is, and what does not fit one this short."""
    print(f"{phases[-1].last} epochs of {steps} steps, {phases[-1].last * steps:,} steps in all")
    if len(samples) < args.batch_size:
        print(f"--batch-size is {args.batch_size}, but there are {len(samples)} samples: each step "
              f"has all of them")
    left_over = len(samples) % min(args.batch_size, len(samples))
    if left_over > 0:
        print(f"each epoch leaves out {left_over} expressions, which fill no batch; they are others "
              f"in each epoch")
    for phase in phases:
        longest = (phase.last - phase.first) * steps // 10
        if args.warmup > longest:
            print(f"{phase.name} is short, so its warm-up is {longest} steps, a tenth of them, not "
                  f"{args.warmup}")
    if args.contrast and min(args.micro_batch, len(samples) // processes()) == 1:
        print("HiVG's contrast among one sample is 0: give a larger --micro-batch, or --contrast 0")


def warn_standstill(state, steps, epochs):
    """Say so once if the loss has not moved over the first fifth of a run: if the second half of its
    lines in the log is no better than the first."""
    history = [line["train_loss"] for line in state.log]
    half = len(history) // 2
    done = state.epoch * steps + state.step
    if state.warned or half < 5 or done < epochs * steps / 5:
        return
    state.warned = True
    before = sum(history[:half]) / half
    after = sum(history[half:]) / (len(history) - half)
    if after > 0.97 * before:
        tqdm.write(f"the training loss has not moved yet ({before:.3f}, then {after:.3f}): try "
                   f"another --lr, and a run on a handful of images first, which must reach an "
                   f"accuracy of 1")


def warn_truncated(samples, tokenizer):
    """Say how many expressions have more tokens than the model sees, and show one of them."""
    cut = data.cut_samples(samples, tokenizer.length, tokenizer.max_tokens)
    if cut:
        print(f"{len(cut)} of {len(samples)} expressions are cut at {tokenizer.max_tokens} tokens, "
              f"such as {data.shortened(cut[0].text)}; --max-tokens sets another limit (the tokenizer "
              f"of size tiny spells unknown words letter by letter)")


def test_splits(args):
    names = data.split_names(args.dataset, args.root)
    return [name for name in names if name not in ("train", "val")]


def test(model, args, path):
    """Evaluate a model on the splits but train and val, and write {split: scores} to a file."""
    splits = {}
    for split in test_splits(args):
        samples = data.load_samples(args.dataset, split, args.root, args.limit)
        loader = make_loader(samples, model, args, batch_size=args.micro_batch)
        splits[split] = scores(predict(model, loader, args).ious)
        print_line({"split": split, **splits[split]})
    write_once(path, lambda partial: partial.write_text(json.dumps(splits)))


# --- Saving and resuming --------------------------------------------------------------------------


def write_once(path, write):
    """Write a file of the run. Of several processes the first alone does so."""
    if rank() == 0:
        data.write_atomically(path, write)


def write_log(args, state):
    """Write log.jsonl whole, so that no epoch stands there twice. The line of an epoch has
    val_acc@0.5 (where there is a val), a line within an epoch has "step" in its place."""
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in state.log)
    write_once(Path(args.out) / "log.jsonl", lambda partial: partial.write_text(text))


def print_line(line):
    parts = []
    for name, value in line.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        parts.append(f"{name} {text}")
    tqdm.write("  ".join(parts))


def save_last(out, state, model, optimizer, scaler):
    """Write last.pt: the state of the run, which is all that a resumed run needs."""
    state.model = tuned_state(model)
    state.optimizer = optimizer.state_dict()
    state.scaler = scaler.state_dict()
    for name, value in state.model.items():
        if not value.isfinite().all():
            raise InputError(f"{name} is not finite after epoch {state.epoch}: start again in "
                             f"another --out with a smaller --lr; {out}/last.pt was not written")
    write_once(out / "last.pt", lambda partial: torch.save(vars(state), partial))
    stop.saved = time.time()


def read_last(path, frozen, samples):
    """The state of the run that is to be resumed, or that of a new one. Raises InputError if the file
    is damaged, or if encoders or samples are not those that the run began with.
    frozen, samples: the fingerprints as they are now."""
    if not path.exists():
        return State(frozen=frozen, samples=samples)
    try:
        state = State(**torch.load(path, map_location="cpu", weights_only=True))
    except Exception:
        raise InputError(f"{path}: damaged, or not what this version of train.py writes; start a new "
                         f"run in another --out") from None
    if state.frozen != frozen:
        raise InputError(f"{path}: the run began with other encoder weights than these; give it "
                         f"the same files")
    if state.samples != samples:
        raise InputError(f"{path}: the run began with other samples than these; give it the same "
                         f"--dataset and --root, which may have moved")
    print(f"resumed: {state.epoch} epochs are done, and {state.step} steps of the next")
    return state


def fingerprint(samples):
    """A hash of texts, boxes and names of images. It is the same where the files have moved."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample.image_id} {sample.text} {sample.box}".encode())
    return f"{len(samples)} {digest.hexdigest()}"


def read_args(out):
    """The options of the run in a folder: {name: value}. A run that was stopped before its first
    last.pt begins again with them."""
    path = out / "args.json"
    if not path.is_file():
        raise InputError(f"--resume: {out} holds no run, as there is no args.json in it; leave "
                         f"--resume out to start one there")
    try:
        saved = json.loads(path.read_text())["args"]
        for name in ("method", "size", "device", "epochs", "batch_size", "weights"):
            saved[name]
        return {**COMMON, "title": saved["method"], **saved}    # which older runs lack
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: not what train.py writes; start a new run in another "
                         f"--out") from None


def write_args(out, args):
    """Write args.json."""
    environment = {name: importlib.metadata.version(name)
                   for name in ("torch", "torchvision", "transformers")}
    environment["device"] = "cpu"
    if "cuda" in args.device:
        environment["device"] = torch.cuda.get_device_name(args.device)
    options = {**vars(args), "resume": False}
    text = json.dumps({"args": options, "environment": environment}, indent=1)
    write_once(out / "args.json", lambda partial: partial.write_text(text))


@contextlib.contextmanager
def hold_folder(args):
    """Hold the folder --out for this run alone. What another run has left there is refused before any
    slow work, and what a killed run has half written is removed."""
    if rank() > 0:
        yield    # the first process holds it for all
        return
    out = Path(args.out)
    for path in (out, *out.parents):
        if path.exists() and not path.is_dir():
            raise InputError(f"--out {out}: {path} is a file, not a folder")
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "a+") as lock:
        lock_file(lock, out)
        ours = ("args.json", "log.jsonl", "last.pt", "best.safetensors", "val.png", "test.json")
        half_written = [path for name in ours for path in out.glob(f"{name}.*.partial")]
        for path in sorted(out.iterdir()):
            # A run that was stopped before its first epoch may have left args.json alone, and it
            # starts again.
            known = path.name in ("args.json", "lock") or path in half_written
            if not args.resume and not known:
                raise InputError(f"--out {out} already holds {path.name}: give another --out, or "
                                 f"--resume to go on with the run there")
        for path in half_written:
            path.unlink()
        try:
            yield
        finally:
            if os.listdir(out) == ["lock"]:    # a flag or a file was wrong, and no run was begun
                shutil.rmtree(out, ignore_errors=True)


def lock_file(lock, out):
    """Lock an open file for as long as it is open and this process lives."""
    try:
        import fcntl    # Windows has no such module
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):    # the two that systems have for a lock that is held
        lock.seek(0)
        raise InputError(f"--out {out} is in use by {lock.read().strip()}: wait for that run, or "
                         f"give another --out") from None
    except (ImportError, OSError):    # a system or a disk without locks
        return
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {platform.node()}\n")
    lock.flush()


class Stopped(BaseException):
    """Ctrl-C or SIGTERM ends the run. It is no Exception, so that nothing on the way swallows it."""


class Stop:
    """Hears Ctrl-C and SIGTERM. Within an epoch they are noted, and the loop stops after its step,
    with last.pt written. Elsewhere last.pt is written already, and they stop the run at once, as a
    second signal always does."""
    in_epoch = False
    number = 0     # of the signal that was noted
    saved = 0.0    # when last.pt was written

    def __call__(self, number, frame):
        if self.number or not self.in_epoch:
            raise Stopped(number)
        self.number = number


stop = Stop()


# --- Several processes, each with its own GPU: torchrun --nproc-per-node N train.py ... -----------
# A batch has the same samples whatever N is. Each process takes an N-th of them, DDP averages the
# gradients, and so all processes make the same step. The first of them, of rank 0, writes the files.


def join_processes(args):
    """Join the processes that torchrun has started. Plain `python train.py` is alone."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))    # "cuda" is this process's GPU now
    dist.init_process_group("nccl" if "cuda" in args.device else "gloo")
    if args.batch_size % processes() > 0:
        raise InputError(f"--batch-size is {args.batch_size}, which {processes()} processes cannot "
                         f"share: give a multiple of {processes()}")
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")    # what the first process prints is enough
    print(f"{processes()} processes share each batch, {args.batch_size // processes()} samples for "
          f"each; HiVG's contrast is within the samples of a process")


def samples_at_once(args):
    """How many samples are on one device at once: at most the part of a batch that a process takes."""
    return min(args.micro_batch, args.batch_size // processes())


def in_parallel(model):
    """The model as each process calls it in training."""
    if processes() == 1:
        return model
    # Rows of the papers' tables leave some weights without a part in the loss.
    return DistributedDataParallel(model, find_unused_parameters=True, broadcast_buffers=False)


def unwrapped(model):
    """The model within DDP."""
    return getattr(model, "module", model)


def wait_for_all():
    if processes() > 1:
        dist.barrier()


# --- Cost: parameters, multiplications, and the memory of a training step (M²IST Tables I, V-X) ----

BATCHES = (1, 8, 16, 32, 64, 128)
CARDS = (8, 12, 16, 24)      # GB
RESERVE = 2 * 2 ** 30        # for what is not simulated: CUDA's context, workspaces, fragments

# What M²IST says: tuned parameters in millions, and GB of memory for training with a batch of 64.
PAPER_COSTS = {
    "full": (151, 38.95), "frozen": (0, 14.32), "adapter": (3.27, 28.52), "lora": (2.37, 20.37),
    "adaptformer": (2.38, 20.37), "cm-adapter": (3.27, 27.19), "mrs-adapter": (1.58, 20.07),
    "m2ist": (3.19, 15.44), "m2ist/V/b": (0.59, 14.90), "m2ist/V/c": (1.02, 14.52),
    "m2ist/V/d": (1.61, 15.09), "m2ist/V/e": (1.58, 14.84), "m2ist/VI/a": (3.22, 15.65),
    "m2ist/VI/b": (3.17, 14.84), "m2ist/VI/c": (3.19, 15.38), "m2ist/VII/a": (3.19, 27.19),
    "m2ist/VII/b": (3.19, 20.37), "m2ist/IX/a": (2.00, 15.34), "m2ist/IX/b": (2.40, 15.35),
    "m2ist+lora": (6.46, 21.68)}


@contextlib.contextmanager
def as_on_gpu(half):
    """Patch torch.nn.functional so that operators on the meta device save what they save on a GPU:
    fused attention no attention map, dropout one byte an element. half: cast as autocast to bf16
    does, but without caching the cast of a weight."""
    def low(function):
        return lambda *args: function(*[cast(value, torch.bfloat16) for value in args])

    def high(function):
        return lambda *args, **kwargs: function(*[cast(value, torch.float32) for value in args],
                                                **kwargs)

    def attention(q, k, v, mask, dropout, causal):
        bias = None
        if mask is not None:
            bias = q.new_zeros(mask.shape).expand(*q.shape[:3], k.shape[2])
        fused = torch.ops.aten._scaled_dot_product_efficient_attention
        return fused(q, k, v, bias, torch.is_grad_enabled(), dropout, causal)[0]

    def dropout(x, p, training, inplace):
        return torch.native_dropout(x, p, True)[0] if training and p > 0 else x

    replaced = {"scaled_dot_product_attention": low(attention) if half else attention,
                "dropout": dropout}
    if half:
        for name in ("linear", "conv2d"):
            replaced[name] = low(getattr(F, name))
        for name in ("layer_norm", "normalize", "cross_entropy"):
            replaced[name] = high(getattr(F, name))
    matmul = low(torch.matmul) if half else torch.matmul
    with mock.patch.multiple(F, **replaced), mock.patch.object(torch, "matmul", matmul):
        yield


def cast(value, dtype):
    """A float tensor in another precision; anything else as it is."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(dtype)
    return value


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, as a GPU allocates them: in blocks of 512."""

    def __init__(self):
        super().__init__()
        self.live = 0
        self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.add(value)
        return result

    def add(self, tensor):
        """Count the storage of a tensor until it is freed, once."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self.known:
            return
        size = math.ceil(storage.nbytes() / 512) * 512
        self.known.add(address)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.free, address, size)

    def free(self, address, size):
        self.known.remove(address)
        self.live -= size


def random_batch(model, batch, device):
    """The inputs of a model, and boxes. No text is padded, so none is trimmed."""
    side, length = model.spec["image_size"], model.spec["max_tokens"]
    with torch.device(device):
        tokens = torch.randint(100, 200, (batch, length))
        inputs = {"images": torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8),
                  "image_padding": torch.zeros(batch, side, side, dtype=torch.bool),
                  "tokens": tokens, "token_padding": torch.zeros_like(tokens, dtype=torch.bool)}
        return inputs, torch.full((batch, 4), 0.5)


def last_model(args, device):
    """The model of a run in the last phase of its plan, where all its LoRA is in place."""
    with torch.device(device):
        model = build_model(**{**model_arguments(args), "weights": "random"})
        model.begin_stage(plan(args)[-1].stage)
        return model


def simulate(model, args, batch):
    """The memory of a training step on a GPU, simulated on the meta device, in bytes: {"parameters",
    "optimizer", "gradients", "activations" (saved for the backward pass), "peak"}. model: on the
    meta device. It is what PyTorch allocates: CUDA's context and workspaces come on top."""
    model.train()
    model.zero_grad(set_to_none=True)
    tuned = [p for p in model.parameters() if p.requires_grad]
    inputs, boxes = random_batch(model, batch, "meta")
    memory = LiveBytes()
    for tensor in [*model.parameters(), *model.buffers()]:
        memory.add(tensor)
    parts = {"parameters": memory.live}
    states = [torch.zeros_like(p) for p in tuned for _ in range(2)]    # AdamW's m and v
    for tensor in states:
        memory.add(tensor)
    parts["optimizer"] = memory.live - parts["parameters"]
    parts["gradients"] = parts["optimizer"] // 2
    for tensor in [*inputs.values(), boxes]:
        memory.add(tensor)
    before = memory.live
    with as_on_gpu(args.amp in ("bf16", "fp16")), memory:
        outputs = model(**inputs, attention=args.attention_loss > 0)
        loss = sum(weighted_losses(outputs, boxes, args).values())
        del outputs
        parts["activations"] = memory.live - before
        loss.backward()
    return {**parts, "peak": memory.peak}


def largest_fit(peaks, capacity):
    """The largest batch whose peak and RESERVE fit into `capacity` bytes; 0 if none does. peaks:
    {batch: bytes}. Between and beyond the batches of `peaks` memory is taken to grow linearly."""
    points = sorted(peaks.items())
    fits = 0
    for (b1, p1), (b2, p2) in zip(points, points[1:]):
        slope = (p2 - p1) / (b2 - b1)
        reached = int(b1 + (capacity - RESERVE - p1) / slope)
        if reached >= b1:
            fits = reached if b2 == points[-1][0] else min(reached, b2)
    return fits


def fitting_micro_batch(args):
    """A micro-batch to try where that of a run had too little memory."""
    half = max(1, samples_at_once(args) // 2)
    if "cuda" not in args.device:
        return half
    model = last_model(args, "meta")
    peaks = {batch: simulate(model, args, batch)["peak"] for batch in (1, 8, 16)}
    capacity = torch.cuda.get_device_properties(args.device).total_memory
    return max(1, min(half, largest_fit(peaks, capacity)))


def count_macs(model):
    """Multiply-accumulates of a forward pass on one sample, with LoRA merged."""
    hilora.merge(model, discard=True)
    inputs, _ = random_batch(model, 1, "meta")
    # FlopCounterMode needs autograd's graph to follow the modules, so this runs without no_grad.
    with FlopCounterMode(display=False) as flops:
        model.eval()(**inputs)
    return flops.get_total_flops() // 2    # a product and a sum are one MAC


def cost_of(name, args):
    """What a method or row costs, as --json writes it."""
    model = last_model(args, "meta")
    peaks = {batch: simulate(model, args, batch)["peak"] for batch in BATCHES}
    row = {"method": name, "size": args.size, **count_parameters(model),
           "groups": tuned_groups(model), "batch": args.batch_size,
           "parts": simulate(model, args, args.batch_size),
           "peak_bytes": {str(batch): peak for batch, peak in peaks.items()},
           "fits": {str(card): largest_fit(peaks, card * 2 ** 30) for card in CARDS},
           "simulated": True}
    row["macs"] = count_macs(model)
    if "cuda" in args.device:
        row["measured"] = measure(args)
    return row


def measure(args):
    """What training steps take on this GPU: {"batch", "peak_bytes", "samples_per_second"}."""
    model = last_model(args, args.device).train()
    optimizer = make_optimizer(model, args, plan(args)[-1])
    inputs, boxes = random_batch(model, args.micro_batch, args.device)
    torch.cuda.reset_peak_memory_stats()
    for step in range(8):
        if step == 3:    # the first ones choose algorithms
            torch.cuda.synchronize()
            began = time.time()
        optimizer.zero_grad(set_to_none=True)
        with autocast(args):
            outputs = model(**inputs, attention=args.attention_loss > 0)
        sum(weighted_losses(outputs, boxes, args).values()).backward()
        optimizer.step()
    torch.cuda.synchronize()
    speed = 5 * args.micro_batch / (time.time() - began)
    return {"batch": args.micro_batch, "peak_bytes": peak_bytes(args.device),
            "samples_per_second": speed}


def print_costs(given):
    """Print what methods and rows cost with the other flags of the command line, beside what the
    paper says. Those that follow full fine-tuning are printed with their share of it, too."""
    flags = {name: value for name, value in given.items() if name not in ("cost", "json")}
    if "json" in given:
        Path(given["json"]).parent.mkdir(parents=True, exist_ok=True)
    runs = []
    for name in given["cost"]:    # all are checked before the first is simulated
        kind = "row" if "/" in name else "method"
        runs.append((name, resolve({"size": "base", **flags, kind: name, "weights": "random"})))
    results = []
    full = None
    for name, args in runs:
        row = cost_of(name, args)
        results.append(row)
        peak, saved = row["parts"]["peak"], row["parts"]["activations"]
        if args.method == "full":
            full = peak
        share = f" ({peak / full:.1%} of full)" if full and args.method in PAPER_COSTS else ""
        print(f"{name}: {row['encoder_tunable']:,} tuned in or beside the encoders, "
              f"{row['trainable']:,} trainable, {row['total']:,} in all; {row['macs'] / 1e9:.2f} GMACs")
        print(f"    training with {args.amp if args.amp != 'off' else 'float32'}, simulated: batch "
              f"{row['batch']} {peak / 2 ** 30:.2f} GiB{share}, of which {saved / 2 ** 30:.2f} are "
              f"saved activations")
        by_batch = [f"{batch}: {bytes_ / 2 ** 30:.2f}" for batch, bytes_ in row["peak_bytes"].items()]
        print(f"    GiB by samples at once (--micro-batch)   {'   '.join(by_batch)}")
        fits = [f"{card} GB: {batch}" for card, batch in row["fits"].items()]
        print(f"    samples that fit, {RESERVE / 2 ** 30:.0f} GiB kept free   {'   '.join(fits)}")
        if "measured" in row:
            found = row["measured"]
            print(f"    measured: batch {found['batch']} {found['peak_bytes'] / 2 ** 30:.2f} GiB, "
                  f"{found['samples_per_second']:.1f} samples a second")
        if name.removeprefix("m2ist/I/") in PAPER_COSTS:
            millions, memory = PAPER_COSTS[name.removeprefix("m2ist/I/")]
            print(f"    the paper: {millions} M tuned, {memory} GB with a batch of 64 "
                  f"({memory / PAPER_COSTS['full'][1]:.1%} of full)")
    if "json" in given:
        data.write_text(given["json"], json.dumps(results, indent=1) + "\n")


# --------------------------------------------------------------------------------------------------


def main(argv=None):
    args = parse_args(argv)
    join_processes(args)
    check_device(args.device)
    set_precision(args.amp)
    if args.weights == "pretrained":
        go_offline_without_hub()
    options = [f"{name} {value}" for name, value in vars(args).items()
               if value not in (None, False, 0.0, [])]
    print(textwrap.fill(", ".join(options), 100))
    stop.number, stop.in_epoch, stop.saved = 0, False, time.time()
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with hold_folder(args):
            wait_for_all()
            fitting = functools.partial(fitting_micro_batch, args)
            with memory_explained(args.device, "--micro-batch", samples_at_once(args), fitting):
                train(args)
    except Stopped as stopped:
        how = ""
        if Path(args.out, "args.json").exists():
            how = f"; python train.py --out {shlex.quote(args.out)} --resume goes on from there"
        print(f"\nstopped{how}", file=sys.stderr)
        sys.exit(128 + stopped.args[0])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
