"""Evaluate a trained model, look at its boxes, or count what a method costs.

    python evaluate.py runs/shapes-m2ist-0
        accuracy on every split but train
    python evaluate.py runs/refcoco-m2ist-0 --predictions boxes.jsonl
        the same, and a line with the predicted box of each expression
    python evaluate.py runs/refcoco-m2ist-0 --image a.jpg --text "the red cup"
        the box of an expression in one's own pictures, or in a folder of them
    python evaluate.py best_checkpoint.pth --dataset refcoco --root data
        accuracy of a checkpoint that HiVG's authors released
    python evaluate.py --cost full m2ist m2ist/VII/a
        what methods, and rows of the papers' tables, cost

From Python, `locate` gives the boxes of any number of expressions in one picture:

    model, config = load_checkpoint("runs/refcoco-m2ist-0")
    locate(model, "a.jpg", ["the red cup"])
        [{"text": "the red cup", "box": (x1, y1, x2, y2)}]

The file reads in this order: the command line, accuracy of a dataset (M²IST Section IV-A b, HiVG
Section 4.1 and Fig. 4 c), one's own pictures, checkpoints of train.py, checkpoints of HiVG's
authors, what a method costs (M²IST Tables I, V-VII, IX and X), main.

    paper                        here
    Acc@0.5, Prec@0.5            "acc@0.5"
    M²IST "Params."              "encoder_tunable"
    M²IST "Mem."                 "peak_bytes" on a GPU; "saved_bytes" is the part of it that
                                 autograd keeps, the same on every machine

    B batch    S side of the padded square picture    T text tokens    Nv vision tokens

Where this file differs from a paper or its released code ("code"):

[D37] evaluation of HiVG's released checkpoints
    paper   says nothing
    code    mixes the samples of a batch in the bridges, and lets the bridges see padded text
    here    keeps the checkpoint's weights, its normalization of pixels and its rules of padding
            (D47 in model.py); a sample sees its own text alone, as in the code at batch 1; true
            boxes are not cut to integers (D36 in data.py)
    why     a box must not depend on the other samples of its batch; the authors' figures may
            differ from ours by this
"""
import argparse
import contextlib
import copy
import functools
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from PIL import Image, ImageOps
from safetensors import safe_open
from torch import Tensor

import data
import hilora
import train
from data import InputError, one_of, run_command
from model import (CLIP_IGNORED, CLIP_TABLE, DETR_LAYER, DETR_TABLE, SIZES, build_model, check_option,
                   count_parameters, import_weights, make_tokenizer, merge_peft, read_file,
                   read_state, state_in)

# ---------------------------------------------------------------------------------------------
# The command line

DEFAULT_BATCH_SIZE = 64    # samples at once, where no gradients need memory


def build_parser():
    """The parser. A flag that is not given is None: the options of the training then hold."""
    parser = argparse.ArgumentParser(
        description=__doc__[:__doc__.index("From Python")].rstrip(),
        usage="python evaluate.py CHECKPOINT [options]\n"
              "       python evaluate.py --cost METHOD ... [options]",
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, width=80))
    add = parser.add_argument
    add("checkpoint", nargs="?", metavar="CHECKPOINT",
        help="The --out folder of a run, its best.safetensors, or a released .pth of HiVG.")
    add("--dataset", metavar="NAME",
        help="Evaluate on this dataset, named as in train.py (default: that of the training).")
    add("--root", metavar="DIR",
        help="Folder of annotations and pictures (default: that of the training).")
    add("--split", action="append", metavar="NAME",
        help="Evaluate this split; may be given more than once (default: all but train).")
    add("--limit", type=int, metavar="N",
        help="Use only the first N expressions of each split (default: as in training).")
    add("--figures", metavar="DIR",
        help="Save a sheet of predictions of each split in this folder (default: none).")
    add("--predictions", metavar="FILE",
        help="Write a line of JSON for each expression to this file: split, image, text, true box, "
             "predicted box, IoU (default: none).")
    add("--image", nargs="+", action="extend", metavar="FILE",
        help="Find --text in this picture, or in several, or in all pictures of a folder, in place "
             "of a dataset (default: none).")
    add("--text", action="append", metavar="TEXT",
        help="An expression; may be given more than once (default: none).")
    add("--save", metavar="FILE",
        help="Save the picture with its boxes and [REG]'s attention as this .png or .jpg; those of "
             "several pictures in this folder (default: none).")
    add("--cost", nargs="+", metavar="METHOD",
        help="Compare the costs of methods or rows (`python train.py --row list` lists the "
             "rows), in place of a checkpoint.")
    add("--size", metavar="NAME",
        help="Size of the models that --cost compares (default: base).")
    add("--grow", nargs="+", metavar="WHAT",
        help="Show how the costs grow with one quantity, by its name and its values: batch 1 4 16, "
             "side 320 640 (pixels of the picture), tokens 10 77 (of the text), expressions 1 2 4 8 "
             "(per picture) or depth 1 2 (times the layers of both encoders).")
    add("--checkpointing", action="store_true",
        help="Measure --cost with the flag --checkpointing of train.py (default: without).")
    add("--amp", metavar="NAME",
        help="Mixed precision: off, tf32, bf16 or fp16 (default: as in training, or off for "
             "--cost).")
    add("--json", metavar="FILE",
        help="Write the results to this file (default: none).")
    add("--clip-weights", metavar="NAME",
        help="Hub name or folder of the CLIP whose tokenizer a released .pth needs (default: "
             "OpenAI's).")
    add("--batch-size", type=int, metavar="N",
        help=f"Samples at once (default: {DEFAULT_BATCH_SIZE}; for --cost the recipe's, or 1 on "
             f"a CPU).")
    add("--workers", type=int, metavar="N",
        help="Processes that load pictures (default: as in training).")
    add("--device", metavar="NAME", default=train.OPTIONS["device"].default,
        help="cpu, cuda, cuda:1, ... (default: cuda if there is one, else cpu).")
    return parser


def parse_args(argv=None):
    """The flags of the command line, with all checks that need no checkpoint."""
    asked = build_parser().parse_args(argv)
    if asked.text is not None:
        asked.text = [without_undecodable_bytes(text) for text in asked.text]
    check_combination(asked)
    for name in ("batch_size", "workers", "limit", "amp"):
        value = getattr(asked, name)
        if value is not None:
            # These options are for every method, so no spec and no method is needed.
            check_option(train.OPTIONS[name], value, spec=None, method=None)
    train.check_device(asked.device)
    return asked


def without_undecodable_bytes(text):
    """A shell may pass bytes that are no text. Python keeps them as lone surrogates, which neither
    a tokenizer nor a print accepts. Each of them becomes a question mark."""
    return text.encode(errors="replace").decode()


def check_combination(asked):
    """Refuse flags that do not go together."""
    usage = ("give a checkpoint to evaluate, or --cost METHOD ... [--size] to compare what "
             "methods cost")
    if bool(asked.checkpoint) == bool(asked.cost):
        raise InputError(usage)
    if asked.cost and (asked.image or asked.dataset or asked.split or asked.figures or
                       asked.predictions):
        raise InputError(usage)
    if (asked.size or asked.grow or asked.checkpointing) and not asked.cost:
        raise InputError(usage)
    if asked.clip_weights and not is_released(asked.checkpoint):
        raise InputError("--clip-weights is for a released .pth of HiVG; a checkpoint of train.py "
                         "names the CLIP that it was trained on")
    if bool(asked.image) != bool(asked.text):
        raise InputError("--image and --text go together: give both of them")
    if asked.save and not asked.image:
        raise InputError("--save, --image and --text go together: --save needs the other two")
    if asked.image and (asked.dataset or asked.split or asked.figures or asked.predictions):
        raise InputError("--image takes the place of a dataset: leave out --dataset, --split, "
                         "--figures and --predictions, or leave out --image")
    if asked.text:
        check_texts(asked.text)


def is_released(checkpoint):
    """Whether HiVG's authors wrote this checkpoint: theirs are .pth files, and ours never are."""
    return checkpoint is not None and checkpoint.endswith(".pth")


def make_folders(asked):
    """Make the folders of all results, before minutes are spent on what could not be written."""
    files = {"json": asked.json, "predictions": asked.predictions}
    folders = {"figures": asked.figures}
    if asked.save and shows_several(asked.image):
        folders["save"] = asked.save
    elif asked.save:
        files["save"] = asked.save
        if Path(asked.save).suffix.lower() not in (".png", ".jpg", ".jpeg"):
            raise InputError(f"--save {asked.save}: give the name of a .png or .jpg file")

    for flag, path in files.items():
        if path is not None and Path(path).is_dir():
            raise InputError(f"--{flag} {path}: is a folder; give the name of a file")
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
    for flag, path in folders.items():
        if path is not None and Path(path).is_file():
            raise InputError(f"--{flag} {path}: is a file; give the name of a folder")
        if path is not None:
            Path(path).mkdir(parents=True, exist_ok=True)


def shows_several(images):
    """Whether --image is more than one file, and its results then say which picture they are of."""
    return len(images) > 1 or Path(images[0]).is_dir()


# ---------------------------------------------------------------------------------------------
# Accuracy of a dataset

LENGTHS = ((1, 5), (6, 10), (11, 20), (21, None))    # bounds in words, ours; None: no upper bound


def evaluate_dataset(model, args, asked):
    """Print and return the results of the splits that are asked for, and draw their figures.

    args: the options of the training, with what is asked here in place of them (merge_options)."""
    splits = {}
    lines = []
    for split in chosen_splits(args, asked):
        samples = data.load_samples(args.dataset, split, args.root, args.limit)
        splits[split], predictions = evaluate_split(model, samples, args, split)
        if asked.predictions:
            lines += prediction_lines(split, samples, predictions, model.spec["image_size"])
        if asked.figures:
            path = Path(asked.figures) / f"{split.replace('/', '-')}.png"
            train.picture_predictions(model, data.spread(samples), args, path)
            print(f"{'':8}  {path}")
    if asked.predictions:
        data.write_text(asked.predictions, "".join(lines))
    return {"dataset": args.dataset, "limit": args.limit,
            "leaky_pretraining": train.leaky_pretraining(args), "splits": splits}


def prediction_lines(split, samples, predictions, side):
    """A line of JSON for each sample of a split. Boxes are (x1, y1, x2, y2) in pixels of the
    picture. The IoU is the one that accuracy counts, in the padded square, where a true box that
    juts out of its picture is whole.
    side: of the padded square, in pixels"""
    sizes = data.picture_sizes(samples)
    lines = []
    for sample, box, iou in zip(samples, predictions.boxes, predictions.ious.tolist()):
        predicted = data.from_square(box, sizes[sample.image], side)
        line = {"split": split, "image": sample.image, "text": sample.text,
                "box": sample.box, "predicted": predicted, "iou": iou}
        lines.append(json.dumps(line, ensure_ascii=False, default=str) + "\n")    # paths as str
    return lines


def chosen_splits(args, asked):
    """Return the splits that are asked for. By default these are all but train; a dataset that has
    nothing but train is evaluated on train."""
    if asked.split:
        return asked.split
    names = data.split_names(args.dataset, args.root)
    others = [name for name in names if name != "train"]
    return others or names


def evaluate_split(model, samples, args, split):
    """Print the results of one split, and return them with the Predictions."""
    loader = train.make_loader(samples, model, args)
    began = time.time()
    predictions = train.predict(model, loader, args)
    ious = predictions.ious
    pictures = {sample.image_id for sample in samples}
    row = {**train.scores(ious), "expressions": len(samples), "images": len(pictures),
           "seconds": time.time() - began}    # of the whole pass, with the loading of pictures
    print(f"{split:8}  Acc@0.5 {row['acc@0.5']:.4f}  mean IoU {row['mean_iou']:.4f}  "
          f"{row['expressions']:6} expressions of {row['images']} images in "
          f"{row['seconds']:.1f} s")
    print(f"{'':8}  {by_length(samples, ious)}")
    return row, predictions


def by_length(samples, ious):
    """Acc@0.5 by the number of words of the expressions, as HiVG Fig. 4 (c), in one line.
    ious: (N,), one for each sample."""
    parts = []
    for least, most in LENGTHS:
        chosen = []
        for sample, iou in zip(samples, ious.tolist()):
            words = len(sample.text.split())
            if least <= words and (most is None or words <= most):
                chosen.append(iou)
        if chosen:
            right = sum(iou >= 0.5 for iou in chosen)
            bounds = f"{least}-{most or ''}"
            parts.append(f"{bounds} words {right / len(chosen):.4f} of {len(chosen)}")
    return ", ".join(parts)


# ---------------------------------------------------------------------------------------------
# One's own pictures

class Located(NamedTuple):
    """What a model finds for one expression."""
    text: str
    box: tuple           # (x1, y1, x2, y2) in pixels of the picture as it is seen
    attention: Tensor    # (Nv,) how [REG] looks at the padded square


def locate(model, picture, texts):
    """Find each of several expressions in one picture.

    model: from build_model or load_checkpoint, on any device; it is put into eval mode.
    picture: a path or a PIL picture. It is turned upright first if its EXIF data say so.
    texts: a list of expressions.
    Returns [{"text", "box"}, ...], where box is (x1, y1, x2, y2) in pixels of the upright picture.
    """
    located = ground_texts(model, upright(picture), texts)
    return [{"text": found.text, "box": found.box} for found in located]


def upright(picture):
    """A path or a PIL picture -> an RGB picture as it is meant to be seen."""
    if isinstance(picture, Image.Image):
        return data.to_rgb(ImageOps.exif_transpose(picture))
    return data.load_picture(Path(picture), upright=True)


def check_texts(texts):
    """Refuse texts that describe nothing, and a single text in place of a list."""
    if isinstance(texts, str):
        raise InputError(f"one text was given: {texts!r}; give a list of texts")
    for text in texts:
        if not text.strip():
            raise InputError("--text must not be empty: describe what to find")


@torch.no_grad()
def ground_texts(model, picture, texts):
    """Ground all texts in one RGB picture, in one batch -> [Located, ...]."""
    check_texts(texts)
    if not texts:
        return []
    model.eval()
    spec = model.spec
    batch = collate_texts(spec, picture, texts)
    device = next(model.parameters()).device
    grounding = model(**train.part_of(batch, 0, len(texts), device), attention=True)

    located = []
    for expression, box, attention in zip(texts, grounding.boxes.cpu(), grounding.attention):
        in_pixels = data.from_square(box, picture.size, spec["image_size"])
        located.append(Located(expression, in_pixels, attention))
    return located


def collate_texts(spec, picture, texts):
    """A batch of one picture with each of the texts, as data.collate returns it."""
    pixels = data.PIXELS[spec["pixels"] or spec["encoders"]]
    image, padding, _ = data.letterbox(picture, spec["image_size"], pixels=pixels)
    tokenizer = make_tokenizer(spec)
    items = []
    for index, text in enumerate(texts):
        no_box = [0.0, 0.0, 0.0, 0.0]    # nobody knows the true box
        items.append(data.Item(image, padding, tokenizer(text), no_box, index))
    return data.collate(items, tokenizer.pad)


def evaluate_images(model, args, asked):
    """Print and return the boxes of --text in each picture of --image, rounded to a tenth of a
    pixel. Save a drawing of each picture if --save is given."""
    paths = find_images(asked.image)
    several = shows_several(asked.image)
    drawings = drawing_paths(asked, paths)
    for path in paths:
        data.header_size(path)    # a file that is no picture is named before minutes have passed

    results = []
    for path, drawing in zip(paths, drawings):
        picture = upright(path)
        with train.autocast(args):
            located = ground_texts(model, picture, asked.text)
        for found in located:
            line = {"text": found.text, "box": [round(v, 1) for v in found.box]}
            if several:
                line = {"image": str(path), **line}
            print(json.dumps(line, ensure_ascii=False), flush=True)
            results.append(line)

        if drawing is not None:
            save_drawing(drawing, picture, located)
    return results


def find_images(images):
    """The pictures of --image: files as they are given, and of a folder all pictures in it, sorted.
    Its other files, hidden files and folders within it are left out."""
    paths = []
    for image in images:
        path = Path(image)
        if not path.is_dir():
            paths.append(path)
            continue
        inside = sorted(file for file in path.iterdir() if is_named_as_picture(file))
        if not inside:
            raise InputError(f"--image {path}: there is no picture in this folder")
        paths += inside
    return paths


def is_named_as_picture(path):
    """Whether a file's name ends as that of a picture that Pillow opens. It opens films, too."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    opens = kind in Image.OPEN and Image.MIME.get(kind, "").startswith("image/")
    return opens and not path.name.startswith(".") and path.is_file()


def drawing_paths(asked, paths):
    """The file that --save writes for each picture, [path or None, ...]. A folder may be that of
    the photos, so nothing that is there is overwritten in it."""
    if asked.save is None:
        return [None] * len(paths)
    if not shows_several(asked.image):
        return [Path(asked.save)]
    drawings = []
    for number, path in enumerate(paths, start=1):
        # Pictures of several folders may have the same name; the number tells them apart.
        drawings.append(Path(asked.save, f"{number:04}-{path.stem}.png"))
    for drawing in drawings:
        if drawing.exists():
            raise InputError(f"--save would write {drawing}, which is there already: give another "
                             f"folder")
    return drawings


def save_drawing(path, picture, located):
    """Write a sheet with a tile for each expression that was located in a picture."""
    tiles = []
    for number, found in enumerate(located, start=1):
        boxes = [(found.box, data.PREDICTED)]
        caption = data.caption_of(found.text, number, path)
        tiles.append(data.draw(picture, caption, boxes, found.attention, side=512))
    legend = ["predicted", "attention"]
    data.write_picture(path, data.contact_sheet(tiles, legend, columns=min(len(tiles), 2)))


# ---------------------------------------------------------------------------------------------
# Checkpoints of train.py

def load_checkpoint(path):
    """A checkpoint -> (model in eval mode, config). The encoders behind the checkpoint must be the
    ones that it was trained on.

    path: the --out folder of a run, or its best.safetensors."""
    path = find_checkpoint(path)
    config = read_config(path)
    model = build_model(**config["model"])
    if train.frozen_fingerprint(model) != config["frozen"]:
        raise InputError(f"{path}: was trained on other encoder weights than these "
                         f"({config['model']['weights']}); its boxes would be meaningless; give "
                         f"the encoders the same files as in training")
    train.load_tuned(model, read_state(path), path)
    return model.eval(), config


def find_checkpoint(path):
    """The file of a checkpoint. In the --out folder of a run, this is best.safetensors."""
    path = Path(path)
    if path.is_dir():
        path = path / "best.safetensors"
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; give the --out folder of a run that has "
                         f"finished an epoch, or its best.safetensors")
    return path


def read_config(path):
    """The metadata that train.save_checkpoint writes: {"model", "args", "frozen", "epoch", ...}."""
    try:
        with safe_open(path, "pt") as file:
            config = json.loads(file.metadata()["config"])
        for name in ("model", "args", "frozen", "epoch"):
            config[name]
    except Exception:    # a file of another kind may fail in any manner
        raise InputError(f"{path}: not a checkpoint of this project (best.safetensors of an --out "
                         f"folder)") from None
    return config


def merge_options(trained, asked):
    """The options of an evaluation, as a Namespace. Where several places have a value, a later one
    wins:

    1. the defaults of the options;
    2. the options of the training, from the checkpoint, but for the batch size;
    3. what is asked on the command line.
    """
    options = {**train.all_defaults(), **trained}
    options["batch_size"] = DEFAULT_BATCH_SIZE
    for name, value in vars(asked).items():
        if name in options and value is not None:
            options[name] = value
    if asked.dataset:
        options["root"] = asked.root    # the training's folder is not another dataset's
    return argparse.Namespace(**options)


# ---------------------------------------------------------------------------------------------
# Checkpoints that HiVG's authors released

def released_table():
    """How HiVG's authors name what ClipGrounding holds, once merge_peft has taken PEFT's words out:
    [(regular expression of their name, our name), ...]. The tables of CLIP and of DETR's layers are
    parts of it, with a prefix."""
    layer = r"clip\.vision_model\.encoder\.layers\.(\d+)\.cross_"
    bridge = r"clip.vision.layers.\1.plugs.attention."
    table = [
        (layer + r"attn\.(q|k|v|out)_proj\.(.+)", bridge + r"\2.\3"),
        (layer + r"(?:mlp\.)?(fc[12]|norm|weights)(.*)", bridge + r"\2\3"),
        (layer + r"gate\.(.+)", bridge + r"projection.\2"),
        (r"bbox_embed\.layers\.0\.(.+)", r"grounding.head.0.\1"),    # a ReLU follows each of
        (r"bbox_embed\.layers\.1\.(.+)", r"grounding.head.2.\1"),    # the first two linears, so
        (r"bbox_embed\.layers\.2\.(.+)", r"grounding.head.4.\1"),    # ours are 0, 2 and 4
        (r"(vision|text)_proj\.(.+)", r"grounding.\1_projection.\2"),
        (r"reg_token\.weight", "grounding.reg"),
        (r"vl_pos_embed\.weight", "grounding.position"),
        (r"vl_transformer\.encoder\.norm\.(.+)", r"grounding.norm.\1"),
        (r"visu_token_(?:mlp\.)?(fc[12]|norm)\.(.+)", r"grounding.region.\1.\2")]
    for theirs, ours in CLIP_TABLE:
        table.append((r"clip\." + theirs, "clip." + ours))
    for theirs, ours in DETR_TABLE:
        if theirs.startswith(DETR_LAYER):
            table.append((r"vl_" + theirs, "grounding." + ours))
    return table


# The boxes of the authors' model depend on none of these. Its forward calls none of the first four.
# (After training on mixed data it calls condition_text_proj, which join_bridges then takes out.)
# seg_conv is the head of a loss that is not in the paper.
UNUSED = (r"ml_text_feat_perceiver\.|reg_pos_embed\.|condition_text_pos_embed\.|"
          r"condition_text_proj\.|seg_conv\d\.")

# {number of text layers that the bridges have weights for: the layers that they read}. After
# training on mixed data (0) they have no weights and read the projected text, layer 13. With twelve
# they read all layers, which is our default and needs no entry.
RELEASED_TEXT_LAYERS = {0: [13], 1: [12], 2: [6, 12]}

RELEASED_SIZES = {768: "base", 1024: "large"}    # by the width of the vision tower


def load_released(path, clip_weights=None):
    """A checkpoint of HiVG's authors -> (model in eval mode, config). The options of the model are
    read off the names and shapes in the file.

    clip_weights: hub name or folder of the CLIP whose tokenizer is used; None: OpenAI's.
    """
    state = read_released(path)
    bridges = released_bridges(state)
    texts = count_text_layers(state, bridges)
    try:
        join_bridges(state, bridges, texts)
        join_projections(state)
        width = len(state["clip.vision_model.embeddings.class_embedding"])
        size = RELEASED_SIZES[width]
    except KeyError as error:
        raise InputError(f"{path}: {error} is missing") from None

    options = {"bridge_layers": [layer + 1 for layer in bridges], "pixels": "detr",
               "released_rules": True}
    if bridges and texts in RELEASED_TEXT_LAYERS:
        options["text_layers"] = RELEASED_TEXT_LAYERS[texts]
    if clip_weights is not None:
        options["clip_weights"] = clip_weights

    # [D37] Our model has the checkpoint's weights, pixels and rules of padding. A sample attends to
    # its own text alone.
    model = build_model("hivg", size, "random", **options)
    import_weights(model, state, released_table(), f"{CLIP_IGNORED}|{UNUSED}", path)
    model.spec["weights"] = "pretrained"    # no longer random: make_tokenizer now takes CLIP's
    unused = [key for key in state if re.match(UNUSED, key)]
    print(f"{path}: not used, {', '.join(unused)}", file=sys.stderr)

    args = train.resolve({"method": "hivg", "size": size, "dataset": "refcoco", **options})
    return model.eval(), {"epoch": "released", "args": {**vars(args), "seed": None}}


def read_released(path):
    """The state dict of a released checkpoint, with LoRA merged and PEFT's words taken out."""
    content = read_file(path)
    state = merge_peft(state_in(content, path), path)

    flags = content.get("args")
    if getattr(flags, "mixup_pretrain", False):
        # A model trained on mixed data may hold gates and weights of the bridges, and its forward
        # never calls them.
        for key in list(state):
            if ".cross_gate." in key or ".cross_adaptive_" in key:
                del state[key]
    return state


def released_bridges(state):
    """The vision layers with a bridge, counted from 0 as the authors do."""
    bridges = set()
    for key in state:
        match = re.search(r"layers\.(\d+)\.cross_norm", key)
        if match:
            bridges.add(int(match[1]))
    return sorted(bridges)


def count_text_layers(state, bridges):
    """How many text layers the bridges have weights for. The first bridge tells it for all."""
    if not bridges:
        return 0
    weights = f"layers.{bridges[0]}.cross_adaptive_weights."
    return sum(weights in key for key in state)


def join_bridges(state, bridges, texts):
    """Write the weights of each bridge as our CrossModalBridge has them: one tensor `weights`
    (n, T, H_l) for all n text layers, and a projection ("gate"). Changes `state`; raises KeyError
    for what is missing."""
    shared = {}
    if texts == 0:
        # Trained on mixed data the bridges have no weights and share one projection, of the text
        # as CLIP puts it out. Weights of 0 change nothing: w f + f = f.
        positions = state["clip.text_model.embeddings.position_embedding.weight"]    # (T, H_l)
        no_weights = torch.zeros_like(positions)[None]                               # (1, T, H_l)
        for kind in ("weight", "bias"):
            shared[kind] = state.pop(f"condition_text_proj.{kind}")

    for layer in bridges:
        name = f"clip.vision_model.encoder.layers.{layer}.cross_"
        if texts == 0:
            state[f"{name}weights"] = no_weights
            for kind, value in shared.items():
                state[f"{name}gate.{kind}"] = value
        else:
            weights = []
            for i in range(texts):
                weights.append(state.pop(f"{name}adaptive_weights.{i}.weight"))      # (T, H_l)
            state[f"{name}weights"] = torch.stack(weights)                           # (n, T, H_l)


def join_projections(state):
    """The authors project the vision features by two linears in a row. Two linears in a row are one
    linear: W_2 (W_1 x + b_1) + b_2. Changes `state`; raises KeyError for what is missing."""
    W1 = state.pop("ml_visual_projection.weight")
    b1 = state.pop("ml_visual_projection.bias")
    W2 = state.pop("visu_proj.weight")
    b2 = state.pop("visu_proj.bias")
    state["vision_proj.weight"] = W2 @ W1
    state["vision_proj.bias"] = W2 @ b1 + b2


# ---------------------------------------------------------------------------------------------
# What a method costs

class PaperCost(NamedTuple):
    """What M²IST says that a method costs."""
    params: float    # "Params.", in millions: what is tuned in or beside the encoders
    memory: float    # "Mem.", in GB, for training with a batch of 64


PAPER = {
    # M²IST Table I
    "m2ist/I/full": PaperCost(151, 38.95),
    "m2ist/I/frozen": PaperCost(0, 14.32),
    "m2ist/I/adapter": PaperCost(3.27, 28.52),
    "m2ist/I/lora": PaperCost(2.37, 20.37),
    "m2ist/I/adaptformer": PaperCost(2.38, 20.37),
    "m2ist/I/cm-adapter": PaperCost(3.27, 27.19),
    "m2ist/I/mrs-adapter": PaperCost(1.58, 20.07),
    "m2ist/I/m2ist": PaperCost(3.19, 15.44),
    # Table V
    "m2ist/V/a": PaperCost(0, 14.32),
    "m2ist/V/b": PaperCost(0.59, 14.90),
    "m2ist/V/c": PaperCost(1.02, 14.52),
    "m2ist/V/d": PaperCost(1.61, 15.09),
    "m2ist/V/e": PaperCost(1.58, 14.84),
    "m2ist/V/f": PaperCost(3.19, 15.44),
    # Table VI
    "m2ist/VI/a": PaperCost(3.22, 15.65),
    "m2ist/VI/b": PaperCost(3.17, 14.84),
    "m2ist/VI/c": PaperCost(3.19, 15.38),
    "m2ist/VI/d": PaperCost(3.19, 15.44),
    # Table VII
    "m2ist/VII/a": PaperCost(3.19, 27.19),
    "m2ist/VII/b": PaperCost(3.19, 20.37),
    "m2ist/VII/c": PaperCost(3.19, 15.44),
    # Table IX
    "m2ist/IX/a": PaperCost(2.00, 15.34),
    "m2ist/IX/b": PaperCost(2.40, 15.35),
    "m2ist/IX/c": PaperCost(3.19, 15.44),
    # Table X; its row (d) has no row in Table I
    "m2ist/X/a": PaperCost(151, 38.95),
    "m2ist/X/b": PaperCost(2.37, 20.37),
    "m2ist/X/c": PaperCost(3.19, 15.44),
    "m2ist/X/d": PaperCost(6.46, 21.68),
    "m2ist+lora": PaperCost(6.46, 21.68)}

PAPER_FULL = PAPER["m2ist/I/full"]    # the paper gives its shares of this
FULL = ("full", "m2ist/I/full", "m2ist/X/a")    # our names of full fine-tuning


def paper_cost(name):
    """What M²IST says of a row or a method, or None. A method is a row of Table I."""
    return PAPER.get(name, PAPER.get(f"m2ist/I/{name}"))


class Trial(NamedTuple):
    """A model with a random batch."""
    model: nn.Module
    inputs: dict     # the model's arguments
    boxes: Tensor    # (B, 4) targets


def set_up(args, device, batch, expressions=1):
    """Build the model of a run in the last stage of its plan, where all its LoRA pairs are in
    place, and a batch of random samples -> Trial. Both are on the device.
    expressions: how many samples share a picture"""
    pictures = math.ceil(batch / expressions)
    with torch.device(device):
        model = build_model(**train.model_arguments(args))
        model.begin_stage(train.plan(args)[-1].stage)
        side = model.spec["image_size"]
        tokens = torch.randint(100, 200, (batch, model.spec["max_tokens"]))
        inputs = {
            # Pictures of zeros would be slow: they lead to denormal gradients.
            "images": torch.randn(pictures, 3, side, side),
            "image_padding": torch.zeros(pictures, side, side, dtype=torch.bool),
            "tokens": tokens,
            "token_padding": torch.zeros_like(tokens, dtype=torch.bool)}
        if expressions > 1:
            inputs["picture"] = torch.arange(batch) // expressions
        boxes = torch.full((batch, 4), 0.5)
    return Trial(model, inputs, boxes)


def training_loss(trial, args):
    """The loss of one training step."""
    trial.model.train()
    with train.autocast(args):
        grounding = trial.model(**trial.inputs, attention=train.reads_attention(args))
    return sum(train.weighted_losses(grounding, trial.boxes, args).values())


def evaluation_step(trial, args):
    """One evaluation. LoRA's pairs are taken out first, as evaluation has them merged."""
    hilora.discard(trial.model)
    trial.model.eval()
    with train.autocast(args):
        return trial.model(**trial.inputs)


def storage_address(tensor):
    """The same for all tensors that share their memory."""
    return tensor.untyped_storage()._cdata


def saved_bytes(model, step):
    """How many bytes autograd keeps during step() for the backward pass: each storage once, and not
    the model's own tensors. M²IST's "Mem." is the peak memory of a GPU; these bytes are a part of
    it that is the same on every machine."""
    # {address: a tensor there}. While we hold the tensor, its address is not given out again.
    kept = {}

    def keep(tensor):
        # An operation may save its own output. As it is, the output would lead back to the operation,
        # and so the graph would hold itself, and the whole model, for ever.
        tensor = tensor.detach()
        kept.setdefault(storage_address(tensor), tensor)
        return tensor

    def give_back(tensor):
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, give_back):
        step()

    for tensor in [*model.parameters(), *model.buffers()]:
        kept.pop(storage_address(tensor), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def count_cost(args):
    """Numbers of parameters, and for one sample the MACs of a forward pass and the saved_bytes of a
    training step in float32. All of this is counted on the meta device, where attention is not
    fused, so the counts are the same on every machine."""
    from torch.utils.flop_counter import FlopCounterMode    # importing it takes a while
    exact = argparse.Namespace(**{**vars(args), "amp": "off", "device": "cpu"})
    trial = set_up(exact, "meta", batch=1)
    counts = count_parameters(trial.model)

    def step():
        training_loss(trial, exact)

    counts["saved_bytes"] = saved_bytes(trial.model, step)
    # FlopCounterMode needs autograd's graph to follow the modules, so this runs without no_grad.
    with FlopCounterMode(display=False) as flops:
        evaluation_step(trial, exact)
    counts["macs"] = flops.get_total_flops() // 2    # a product and a sum are one MAC
    return counts


def measure_cost(args, batch_size=None, expressions=1):
    """What a batch costs on this machine: the saved_bytes of a training step as it is executed
    here, the peak memory, and mean seconds of a training step and of an evaluation.
    batch_size: None means the recipe's on a GPU, and 1 on a CPU. expressions: per picture"""
    on_gpu = "cuda" in args.device
    if batch_size is None:
        batch_size = args.batch_size if on_gpu else 1
    trial = set_up(args, args.device, batch_size, expressions)
    optimizer = train.make_optimizer(trial.model, args, train.plan(args)[-1])

    def train_step():
        optimizer.zero_grad(set_to_none=True)
        training_loss(trial, args).backward()
        optimizer.step()

    @torch.no_grad()
    def eval_step():
        evaluation_step(trial, args)

    def forward():
        training_loss(trial, args)

    cost = {"batch": batch_size, "saved_bytes_here": saved_bytes(trial.model, forward)}
    train_step()    # AdamW now has its own memory
    forget_peak(args.device)
    cost["train_step_s"] = mean_seconds(train_step)
    cost["peak_bytes"] = train.peak_bytes(args.device)
    cost["eval_s"] = mean_seconds(eval_step)
    cost["train_samples_per_second"] = batch_size / cost["train_step_s"]
    cost["eval_samples_per_second"] = batch_size / cost["eval_s"]
    return cost


def forget_peak(device):
    """Let train.peak_bytes begin anew."""
    if "cuda" in device:
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")    # Linux: forget the peak of this process


def mean_seconds(work):
    """The mean time of five calls of work(), after two that do not count."""
    from torch.utils.benchmark import Timer    # imported here: it may warn where there is no GPU
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return timer.timeit(5).mean


def compare_costs(asked):
    """Print and return what methods and rows cost. Where full fine-tuning is among them, print each
    share of it, and the paper's figures beside."""
    what, values = growth(asked)
    size = asked.size or "base"
    one_of("--size", size, SIZES)
    # All names and values are checked before the first of them is measured.
    runs = []
    for name in asked.cost:
        for value in values:
            times = value if what == "depth" else 1
            with deeper_encoders(size, times):
                runs.append((name, value, times, cost_options(name, asked, what, value)))

    results = []
    for name, value, times, args in runs:
        with deeper_encoders(size, times):
            row = {"method": name, "size": args.size, **count_cost(args),
                   **measure_cost(args, value if what == "batch" else asked.batch_size,
                                  value if what == "expressions" else 1)}
        if what is not None:
            row["grow"] = {what: value}
        results.append(row)

    for row in results:
        print_cost(row, full_beside(row, results))
    return results


def full_beside(row, results):
    """The row of full fine-tuning that a row is compared with, or None."""
    for other in results:
        if other["method"] in FULL and other.get("grow") == row.get("grow"):
            return other
    return None


GROWTHS = ("batch", "side", "tokens", "expressions", "depth")


def growth(asked):
    """What --grow asks for: (the name of the quantity or None, its values)."""
    if not asked.grow:
        return None, [None]
    what, *values = asked.grow
    one_of("quantity of --grow", what, GROWTHS)
    if not values or not all(value.isdecimal() and int(value) > 0 for value in values):
        raise InputError(f"--grow {' '.join(asked.grow)}: give one or more whole numbers after "
                         f"{what}, say --grow {what} 1 2 4")
    if what == "batch" and asked.batch_size:
        raise InputError("--grow batch and --batch-size contradict each other: leave out the latter")
    return what, [int(value) for value in values]


@contextlib.contextmanager
def deeper_encoders(size, times):
    """Within this context the encoders of a size have so many times their layers. DETR's are paired
    with the last layers of BERT, as at any depth."""
    own = copy.deepcopy(SIZES[size])
    for sizes in SIZES[size].values():
        for tower in ("vision", "text"):
            sizes[tower]["layers"] *= times
    detr = SIZES[size].get("detr")
    if detr is not None:
        last = detr["text"]["layers"]
        detr["text_layers"] = list(range(last - detr["vision"]["layers"] + 1, last + 1))
    yield
    SIZES[size].update(own)


def cost_options(name, asked, what=None, value=None):
    """The options of a method or a row, as train.py would run it, but with random weights."""
    flag = "--row" if "/" in name else "--method"
    flags = [flag, name, "--size", asked.size or "base", "--weights", "random",
             "--device", asked.device, "--amp", asked.amp or "off"]
    if what == "side":
        flags += ["--image-size", str(value)]
    if what == "tokens":
        flags += ["--max-tokens", str(value)]
    if asked.checkpointing:
        flags.append("--checkpointing")
    return train.parse_args(flags)


def print_cost(row, full):
    """Print one row of costs. full: the row of full fine-tuning, or None."""
    # Full fine-tuning is about DETR and BERT, so a method on CLIP has no share of it.
    compared = full
    if row["method"].startswith(("hivg", "clip")):
        compared = None
    line = (f"{row['method']}: {row['encoder_tunable']:,} tuned in or beside the encoders"
            f"{share(row, compared, 'encoder_tunable')}, {row['trainable']:,} trainable, "
            f"{row['total']:,} in all; {row['macs'] / 1e9:.2f} GMACs; "
            f"{row['saved_bytes'] / 2 ** 20:.1f} MiB saved for a sample"
            f"{share(row, compared, 'saved_bytes')}")
    print(line)
    grown = ""
    if "grow" in row:
        [(what, value)] = row["grow"].items()
        grown = f"{what} {value}, "
    peak = ""
    if row["peak_bytes"] is not None:
        peak = f"peak {row['peak_bytes'] / 2 ** 30:.2f} GiB; "
    print(f"    {grown}batch {row['batch']}: {row['saved_bytes_here'] / 2 ** 20:.1f} MiB saved as "
          f"executed{share(row, compared, 'saved_bytes_here')}; {peak}step {row['train_step_s']:.3f} s"
          f"{share(row, compared, 'train_step_s')}, {row['train_samples_per_second']:.2f} samples/s; "
          f"evaluation {row['eval_s']:.3f} s, {row['eval_samples_per_second']:.2f} samples/s")

    paper = paper_cost(row["method"])
    if full is not None and paper is not None:
        print(f"    the paper: {paper.params} M ({paper.params / PAPER_FULL.params:.2%}), "
              f"{paper.memory} GB ({paper.memory / PAPER_FULL.memory:.2%})")


def share(row, full, name):
    """A row's share of full fine-tuning as " (12.3%)", or nothing."""
    if full is None:
        return ""
    return f" ({row[name] / full[name]:.1%})"


# ---------------------------------------------------------------------------------------------

def evaluate_checkpoint(asked):
    """Load the checkpoint and evaluate it on a picture or on a dataset."""
    if is_released(asked.checkpoint):
        model, config = load_released(asked.checkpoint, asked.clip_weights)
    else:
        model, config = load_checkpoint(asked.checkpoint)
    args = merge_options(config["args"], asked)
    train.set_precision(args)
    model.to(args.device)

    if asked.image:
        return evaluate_images(model, args, asked)
    # The name is that of the training, whatever is asked here.
    title = train.title(argparse.Namespace(**{**train.all_defaults(), **config["args"]}))
    print(f"{title} {args.size} on {args.dataset}, epoch {config['epoch']}; "
          f"leaky pretraining {train.leaky_pretraining(args)}")
    found = evaluate_dataset(model, args, asked)
    return {"checkpoint": asked.checkpoint, "method": title, "epoch": config["epoch"],
            "seed": config["args"].get("seed"), **found}


def main(argv=None):
    asked = parse_args(argv)
    make_folders(asked)
    smaller = train.half_of("--batch-size", asked.batch_size or DEFAULT_BATCH_SIZE)
    with train.memory_explained(asked.device, smaller):
        if asked.cost:
            result = compare_costs(asked)
        else:
            result = evaluate_checkpoint(asked)
    if asked.json:
        data.write_text(asked.json, json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    run_command(main)
