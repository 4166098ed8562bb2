"""Datasets: from names and files to pictures, expressions and boxes, and from these to batches.

M²IST Section IV-A and HiVG Section 4.1 with Table 6 list the datasets that this file reads. It
also generates a small dataset, `shapes`, which needs no files. This file imports nothing of the
project, so that it can be copied alone.

    "refcoco" --load_samples--> [Sample, ...] --GroundingDataset--> [Item, ...] --collate--> batch

Conventions

    box      in a Sample: (x1, y1, x2, y2) in pixels of the stored picture
             in a batch:  (cx, cy, w, h) in [0, 1] of the padded square picture
    padding  a mask of bools, in which True means padding
    B        number of samples in a batch
    S        side of the padded square, in pixels: 640 for M²IST, 224 for HiVG, 64 for `shapes`
    T        number of tokens of the longest text in a batch
    N_v      number of vision tokens of a picture (HiVG: L_v)

    paper symbol               variable
    M²IST z_0, HiVG I          images   (B, 3, S, S)
    HiVG T (script letter)     tokens   (B, T)
    HiVG L_t                   T

Formats of annotations

Under --root (default: data), or in a folder directly below it, each dataset may
lie in one of three published formats. The files that exist tell which one.

    dataset           REFER                    TransVG       MDETR
    refcoco           refcoco/refs(unc).p      unc/          refcoco
    refcoco+          refcoco+/refs(unc).p     unc+/         refcoco+
    refcocog-umd      refcocog/refs(umd).p     gref_umd/     refcocog
    refcocog-google   refcocog/refs(google).p  gref/         -
    referit           -                        referit/      -
    flickr30k         -                        flickr/       -

    REFER    This is the format of lichengunc/refer. Each folder also holds
             instances.json. Boxes are x, y, w, h.
    TransVG  CLIP-VG and HiVG use this format too. The folder unc/ holds
             unc_train.pth, unc_val.pth and so on. Boxes are x, y, w, h, but
             those of referit and flickr are x1, y1, x2, y2.
    MDETR    The files are finetune_refcoco_train.json and so on.
             Boxes are x, y, w, h.
    JSONL    This is the format for your own pictures: FILE.jsonl, with one JSON
             object per line. Boxes are x1, y1, x2, y2 in pixels of the stored
             picture. Picture paths are relative to the folder of the file:
             {"image": "1.jpg", "text": "the red cup", "box": [12, 40, 96, 170],
              "split": "train"}

The pictures of each dataset are looked for in these folders:

    RefCOCO, RefCOCO+, RefCOCOg    images/train2014
                                   train2014
                                   other/images/mscoco/images/train2014
                                   other/images/train2014
    referit                        referit/images
    flickr30k                      Flickr30k/flickr30k-images
                                   Flickr30k/flickr30k_images

Pickled files are read without running any code.

Where the files come from

Users reported these addresses. None of them could be tried where this file was
written. An address that is too long for a line continues on the next line.

    RefCOCO in REFER's format
        https://web.archive.org/web/20220413011718/
        https://bvisionweb1.cs.unc.edu/licheng/referit/data/refcoco.zip
    RefCOCO+ in REFER's format
        https://web.archive.org/web/20220413011656/
        https://bvisionweb1.cs.unc.edu/licheng/referit/data/refcoco+.zip
    RefCOCOg in REFER's format, with both of its splits
        https://web.archive.org/web/20220413012904/
        https://bvisionweb1.cs.unc.edu/licheng/referit/data/refcocog.zip
    pictures of COCO train2014, 13.5 GB
        http://images.cocodataset.org/zips/train2014.zip
    MDETR's JSON files
        https://zenodo.org/record/4729015/files/
        mdetr_annotations.tar.gz?download=1
    TransVG's .pth files and DETR weights, ReferItGame's pictures (saiapr_tc-12)
        The READMEs of TransVG and CLIP-VG link shared drives.
    Flickr30k's pictures
        Their authors give them out after a form has been filled in.

The server of REFER's authors is gone, so these are copies in the Web Archive.
--download fetches what is missing of the four RefCOCO datasets: the annotations
in REFER's format, and the pictures that the annotations name. It continues a
download that was interrupted, overwrites no file, and keeps the archives, which
you may delete after the last dataset. --mirror ADDRESS takes the same archives
from another address.

Leaks

All pictures of the RefCOCO datasets belong to COCO train2014. The public DETR
weights were trained on all of train2014, and so have seen the pictures of val
and test. TransVG publishes weights that have not seen them: detr-r50-unc.pth
for RefCOCO and RefCOCO+, and detr-r50-gref.pth for RefCOCOg. Pass one of these
files to train.py by --vision-weights. Training and evaluation print and record
`leaky_pretraining` for each run: true, false, or null if it is not known. There
is no public list of the pictures that CLIP was pretrained on, so it is null for
CLIP.

The training split of refcocog-google holds pictures that are in the test splits
of other RefCOCO datasets. If several datasets are joined by commas, a picture
in val or test of one of them is left out of the joint training split.

Where this file differs from a paper or its released code ("code"):

[D22] the mean and standard deviation that normalise pixels for CLIP
    paper   says nothing
    code    ImageNet's values
    here    CLIP's own values
    why     a frozen encoder should see pixels as in its pretraining

[D32] random scales and places in training
    paper   HiVG Appendix B: "other data augmentation techniques remain consistent with previous
            approaches"
    code    TransVG's augmentation; HiVG's scales go down to 32 of 224 pixels
    here    TransVG's augmentation, with its scales in proportion: 0.7 to 1 of the square;
            on `shapes` only a random place in the square
    why     a picture of 32 pixels shows nothing, and the words of `shapes` are about places

[D36] crops, mirror images and fractions of pixels
    paper   says nothing
    code    a crop is accepted if the box centre's x is greater than the crop's top (a y), and its
            y greater than the crop's left edge (an x), so objects get lost; "left" and "right" are
            exchanged inside "bright" too; boxes are cut to integers
    here    the centre lies inside the crop on all four sides; "left" and "right" are exchanged
            where they begin a word, as in "lefty"; there is no crop for words about places, and no
            mirror image for digits, ordinals and other names of sides, such as "lft", "northwest"
            and "o'clock"; boxes stay floats
    why     the object must be in the picture, and the words must stay true

[D46] texts that are not plain ASCII, and texts that spell a special token
    paper   says nothing
    code    BERT gets a text as it is; HiVG's tokenizer, by CLIP's authors, mends it with ftfy and
            html.unescape first, and ends a text where it spells "<|endoftext|>"
    here    BERT gets a text as it is; for CLIP the standard library mends HTML entities, curly
            quotes, ligatures and full-width characters, but no text that was read in a wrong
            encoding (mojibake); no text makes a special token
    why     an encoder should read what it read in its pretraining: CLIP read mended texts, and
            BERT's vocabulary has curly quotes; only ftfy, which we do not require, mends mojibake
"""
import argparse
import functools
import html
import itertools
import json
import math
import operator
import os
import pickle
import random
import re
import shutil
import sys
import textwrap
import unicodedata
import urllib.request
import zipfile
import zlib
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import tokenizers
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps
from tqdm import tqdm


# -------------------------------------------------------------------------------------------------
# Errors and files: what all command lines share

class InputError(ValueError):
    """The user's input is wrong. The message names the file, line or flag, and the way out."""


def one_of(what, value, valid):
    """Raise InputError unless `value` is one of the valid values."""
    if value not in valid:
        raise InputError(f"unknown {what} {value!r}: choose one of {', '.join(valid)}")


def run_command(main):
    """Run a command line. Wrong input gives one line on stderr and exit status 2, and Ctrl-C one
    line and 130. Neither gives a traceback."""
    # A path may hold bytes that are no text, and a print must not end a run for them.
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except (InputError, OSError) as error:
        # An error inside a worker of a DataLoader arrives as a whole traceback. Its last line
        # begins with "data.InputError: " and holds our message.
        message = str(error).rsplit("InputError: ", 1)[-1].strip()
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def write_atomically(path, write):
    """Call write(temporary path), then rename: a crash never leaves a half-written file, and what
    was at `path` before stays there until the new file is whole. Raises InputError if the file
    cannot be written, for example because the disk is full."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            write(path)   # a device such as /dev/stdout, which a rename would replace
        else:
            write_and_rename(path.resolve(), write)
    except Exception as error:   # torch and safetensors have errors of their own for a full disk
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise InputError(f"cannot write {path} ({reason}): is there room on the disk, and may you "
                         f"write into that folder? What was there before is still there") from error


def write_and_rename(path, write):
    partial = Path(f"{path}.{os.getpid()}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        write(partial)
        partial.chmod(mode)   # safetensors makes a file that nobody else may read
        partial.replace(path)
    finally:
        if partial.exists():
            partial.unlink()


def write_text(path, text):
    """Write a text file by write_atomically."""
    def write(partial):
        # A path may hold bytes that are no text, which Python keeps as lone surrogates. They become
        # escapes, which a reader of JSON turns back into the same path.
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")

    write_atomically(path, write)


# -------------------------------------------------------------------------------------------------
# Samples and pixel statistics

class Sample(NamedTuple):
    """One expression about one object."""
    image: Path | int     # path of the picture, or the scene's number in `shapes`
    text: str             # the expression
    box: tuple            # (x1, y1, x2, y2) of the object, in pixels of the stored picture
    image_id: str | int   # the picture's name within its dataset, or the scene's number


class Pixels(NamedTuple):
    """How an encoder's pretraining normalised its pixels, in the order red, green, blue."""
    mean: tuple
    std: tuple


PIXELS = {
    # DETR was pretrained with ImageNet's statistics.
    "detr": Pixels(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    # [D22] CLIP has statistics of its own, which HiVG's released code does not use.
    "clip": Pixels(mean=(0.48145466, 0.4578275, 0.40821073),
                   std=(0.26862954, 0.26130258, 0.27577711)),
}


# -------------------------------------------------------------------------------------------------
# shapes, the generated default: scenes. A scene is a function of its number; nothing is stored.

COLOURS = {"red": (208, 52, 44), "green": (58, 156, 70), "blue": (48, 92, 200),
           "yellow": (232, 196, 50)}
SHAPES = ("circle", "square", "triangle")
RADII = {"small": (11, 14), "large": (19, 24)}   # least and greatest half side of a box, in pixels
WIDTH = 128                                      # of every picture, in pixels
HEIGHTS = (96, 128)                              # least and greatest height of a picture

# Two objects must differ by so many pixels before an expression may rest on which of them is
# further left, right, up or down.
CLEAR = 10


class ShapesSplit(NamedTuple):
    """The scenes that belong to one split of `shapes`."""
    first: int        # number of the split's first scene
    scenes: int       # number of scenes
    objects: tuple    # least and greatest number of objects in a scene
    residues: tuple   # checksums of the split's scenes, modulo 8


# The checksum covers the whole content of a scene. Each residue belongs to one split alone, so no
# scene can appear in two splits.
SHAPES_SPLITS = {
    # A few scenes have one object. Where it is can be learnt without knowing which one is meant.
    "train": ShapesSplit(first=5_000_000, scenes=8000, objects=(1, 5), residues=(3, 4, 5, 6, 7)),
    "val": ShapesSplit(first=10_000_000, scenes=400, objects=(2, 5), residues=(0,)),
    # Like RefCOCO's, the two test splits differ: testA has few distractors, testB has many.
    "testA": ShapesSplit(first=20_000_000, scenes=400, objects=(2, 3), residues=(1,)),
    "testB": ShapesSplit(first=30_000_000, scenes=400, objects=(5, 7), residues=(2,)),
}

# assets/pretrain_tiny.py pretrains the tiny encoders on these scenes, which are in no split.
PRETEXT = ShapesSplit(first=0, scenes=8000, objects=(2, 5), residues=(3, 4, 5, 6, 7))


class Thing(NamedTuple):
    """One object of a scene. The checksum of a scene covers the name of this class and of its
    fields. If one of them changed, so would all pictures."""
    colour: str   # one of COLOURS
    shape: str    # one of SHAPES
    size: str     # "small" or "large"
    x: int        # centre, in pixels from the left
    y: int        # centre, in pixels from the top
    r: int        # half the side of the box, in pixels

    @property
    def box(self):
        return (self.x - self.r, self.y - self.r, self.x + self.r, self.y + self.r)


class Expression(NamedTuple):
    """An expression that fits exactly one object of a scene."""
    text: str
    target: int   # index of that object in the scene's list


class Scene(NamedTuple):
    """The content of one picture of `shapes`, and what is asked about it."""
    height: int         # of the picture, in pixels
    things: list        # of Thing
    expressions: list   # three of Expression


@functools.lru_cache(maxsize=50_000)
def scene(number):
    """Return the scene that has this number, always the same one."""
    split = split_of_scene(number)
    rng = random.Random(number)

    while True:   # until a scene belongs to the split and can be described
        height = rng.randint(*HEIGHTS)
        things = random_things(rng, height, rng.randint(*split.objects))
        if len(things) < split.objects[0]:
            continue
        if checksum(height, things) % 8 not in split.residues:
            continue
        expressions = [describe(rng, things) for _ in range(3)]
        if None not in expressions:
            return Scene(height, things, expressions)


def split_of_scene(number):
    """Return the split of `shapes` that a scene belongs to: the last one that has started."""
    splits = [PRETEXT, *SHAPES_SPLITS.values()]
    started = [split for split in splits if split.first <= number]
    return max(started, key=operator.attrgetter("first"))


def checksum(height, things):
    """Return a number that depends on the whole content of a scene."""
    return zlib.crc32(repr((height, things)).encode())


def random_things(rng, height, count):
    """Return at most `count` objects that do not touch each other, in at most three colours."""
    colours = rng.sample(sorted(COLOURS), 3)
    things = []
    for _ in range(count):
        for _ in range(20):   # tries to find a free place for one more object
            size = "large" if rng.random() < 0.35 else "small"
            r = rng.randint(*RADII[size])
            x = rng.randint(r + 1, WIDTH - r - 2)
            y = rng.randint(r + 1, height - r - 2)
            if is_free(x, y, r, things):
                colour = rng.choice(colours)
                shape = rng.choice(SHAPES)
                things.append(Thing(colour, shape, size, x, y, r))
                break
    return things


def is_free(x, y, r, things):
    """Return whether a box of half side r around (x, y) keeps clear of all objects."""
    for thing in things:
        distance = max(abs(x - thing.x), abs(y - thing.y))
        if distance <= r + thing.r + 2:
            return False
    return True


# -------------------------------------------------------------------------------------------------
# shapes: expressions. An expression names attributes of its object and, if several objects have
# these attributes (the candidates), adds what tells the object apart from the other candidates.

class Description(NamedTuple):
    """The attributes that an expression names. None means that it does not name this one."""
    colour: str | None
    shape: str | None
    size: str | None


class Chances(NamedTuple):
    """The probability with which an expression names each attribute."""
    colour: float
    shape: float
    size: float


def from_left(thing):
    return thing.x


def from_right(thing):
    return -thing.x


def from_top(thing):
    return thing.y


def from_bottom(thing):
    return -thing.y


class Side(NamedTuple):
    """How objects are compared by their position towards one side of the picture."""
    key: Callable         # sort key of an object; the object nearest to this side comes first
    superlatives: tuple   # phrases about the object nearest to this side
    comparatives: tuple   # phrases about an object that is nearer to this side than another one


SIDES = {
    "left": Side(
        from_left,
        ("the leftmost {}", "the {} furthest to the left", "the {} on the left"),
        ("the {} to the left of the {}", "the {} left of the {}")),
    "right": Side(
        from_right,
        ("the rightmost {}", "the {} furthest to the right", "the {} on the right"),
        ("the {} to the right of the {}", "the {} right of the {}")),
    "top": Side(
        from_top,
        ("the topmost {}", "the highest {}", "the {} at the top"),
        ("the {} above the {}", "the {} higher than the {}")),
    "bottom": Side(
        from_bottom,
        ("the lowest {}", "the bottom {}", "the {} at the bottom"),
        ("the {} below the {}", "the {} under the {}")),
}
ORDINALS = ("second", "third", "fourth")
NOUNS = ("shape", "object")                      # used where an expression names no shape
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}


def random_description(rng, thing, chances):
    """Return some of an object's attributes, each with its chance."""
    colour = thing.colour if rng.random() < chances.colour else None
    shape = thing.shape if rng.random() < chances.shape else None
    size = thing.size if rng.random() < chances.size else None
    return Description(colour, shape, size)


def fits(thing, description):
    """Return whether an object has all the attributes that a description names."""
    if description.colour is not None and description.colour != thing.colour:
        return False
    if description.shape is not None and description.shape != thing.shape:
        return False
    if description.size is not None and description.size != thing.size:
        return False
    return True


def words(rng, description):
    """Put a description into words, for example "little red circle" or "blue object"."""
    noun = description.shape
    if noun is None:
        noun = rng.choice(NOUNS)

    parts = []
    if description.size is not None:
        parts.append(rng.choice(SIZE_WORDS[description.size]))
    if description.colour is not None:
        parts.append(description.colour)
    parts.append(noun)
    return " ".join(parts)


# Each of the four functions below returns an expression that fits `target` and no other object, or
# None if its random choices do not lead to such an expression.
#     things       all objects of the scene
#     target       the object that the expression must single out
#     named        a description of the target
#     candidates   all objects that fit this description, the target among them

def by_attributes(rng, things, target, named, candidates):
    """Single the target out by its attributes alone: "the small red circle"."""
    if not any(named) or candidates != [target]:
        return None
    return "the " + words(rng, named)


def by_side(rng, things, target, named, candidates):
    """Single the target out as the candidate nearest to a side: "the leftmost circle"."""
    side = SIDES[rng.choice(list(SIDES))]
    if not is_clearly_at_rank(0, target, candidates, side):
        return None
    phrase = rng.choice(side.superlatives)
    return phrase.format(words(rng, named))


def by_ordinal(rng, things, target, named, candidates):
    """Single the target out by counting from a side: "the second circle from the left"."""
    name = rng.choice(list(SIDES))
    rank = rng.randint(1, len(ORDINALS))   # 0 would be the nearest one, which by_side describes
    if not is_clearly_at_rank(rank, target, candidates, SIDES[name]):
        return None
    return f"the {ORDINALS[rank - 1]} {words(rng, named)} from the {name}"


def is_clearly_at_rank(rank, target, candidates, side):
    """Return whether the target has this rank among the candidates, counted from a side, and nobody
    can doubt it: from the first candidate to the one behind the target, each lies at least CLEAR
    pixels further from the side than the one before it."""
    if len(candidates) < 2 or len(candidates) <= rank:
        return False
    ordered = sorted(candidates, key=side.key)
    if ordered[rank] is not target:
        return False
    last = min(rank + 1, len(ordered) - 1)   # there may be no candidate behind the target
    for i in range(last):
        if side.key(ordered[i + 1]) - side.key(ordered[i]) < CLEAR:
            return False
    return True


def by_relation(rng, things, target, named, candidates):
    """Single the target out by its position to an anchor: "the circle above the red square"."""
    if len(things) == 1:
        return None
    anchor = rng.choice([thing for thing in things if thing is not target])
    anchor_named = random_description(rng, anchor, Chances(colour=0.8, shape=0.9, size=0.4))
    side = SIDES[rng.choice(list(SIDES))]

    # The description of the anchor must fit the anchor alone.
    if not any(anchor_named):
        return None
    if [thing for thing in things if fits(thing, anchor_named)] != [anchor]:
        return None

    # Of at least two candidates other than the anchor, the target alone must lie on that side.
    others = [thing for thing in candidates if thing is not anchor]
    if len(others) < 2:
        return None
    if [thing for thing in others if side.key(thing) < side.key(anchor)] != [target]:
        return None
    if side.key(anchor) - side.key(target) < CLEAR:
        return None

    phrase = rng.choice(side.comparatives)
    return phrase.format(words(rng, named), words(rng, anchor_named))


class Pattern(NamedTuple):
    """One kind of expression."""
    write: Callable    # one of the four functions above
    chances: Chances   # with which it names the attributes of its target


BY_ATTRIBUTES = Pattern(by_attributes, Chances(colour=0.7, shape=0.8, size=0.4))
BY_SIDE = Pattern(by_side, Chances(colour=0.5, shape=0.5, size=0.2))
BY_RELATION = Pattern(by_relation, Chances(colour=0.5, shape=0.5, size=0.2))
BY_ORDINAL = Pattern(by_ordinal, Chances(colour=0.5, shape=0.4, size=0.1))

# A pattern is drawn as often as it is repeated in this list.
PATTERNS = 8 * [BY_ATTRIBUTES] + 5 * [BY_SIDE] + 4 * [BY_RELATION] + [BY_ORDINAL]


def describe(rng, things):
    """Return an Expression about one of the objects, or None if 100 tries lead to none."""
    pattern = rng.choice(PATTERNS)
    for _ in range(100):
        index = rng.randrange(len(things))
        target = things[index]
        named = random_description(rng, target, pattern.chances)
        candidates = [thing for thing in things if fits(thing, named)]
        text = pattern.write(rng, things, target, named, candidates)
        if text is not None:
            return Expression(text, index)
    return None


# -------------------------------------------------------------------------------------------------
# shapes: pictures and samples

def render(number):
    """Draw the picture of a scene, with small random changes to its colours."""
    height, things, _ = scene(number)
    rng = seeded("paint", number)

    grey = rng.randint(215, 245)
    background = tuple(grey + rng.randint(-8, 8) for _ in range(3))
    picture = Image.new("RGB", (WIDTH, height), background)
    pen = ImageDraw.Draw(picture)

    for thing in things:
        colour = tuple(value + rng.randint(-14, 14) for value in COLOURS[thing.colour])
        x1, y1, x2, y2 = thing.box
        if thing.shape == "circle":
            pen.ellipse(thing.box, fill=colour)
        elif thing.shape == "square":
            pen.rectangle(thing.box, fill=colour)
        else:
            pen.polygon([(thing.x, y1), (x2, y2), (x1, y2)], fill=colour)
    return picture


def shapes_samples(split, limit=None):
    """Return the list of Sample of the scenes of a ShapesSplit, or the first `limit` of them. No
    other scenes are made up, as all those of `train` take seconds."""
    first, scenes, _, _ = split
    samples = []
    for number in range(first, first + scenes):
        if limit is not None and len(samples) >= limit:
            break
        _, things, expressions = scene(number)
        for text, target in expressions:
            box = tuple(float(v) for v in things[target].box)
            samples.append(Sample(number, text, box, number))
    return samples[:limit]


# -------------------------------------------------------------------------------------------------
# Datasets by name

COCO_FOLDERS = ("images/train2014", "train2014", "other/images/mscoco/images/train2014",
                "other/images/train2014")


class DatasetInfo(NamedTuple):
    """Where a dataset's files lie, and how many expressions the papers count in it."""
    refer: str | None     # REFER's file
    transvg: str          # TransVG's folder, which begins the names of the files in it
    mdetr: str | None     # name in MDETR's files
    pictures: tuple       # folders in which the pictures may lie
    expressions: dict     # split: number of expressions


# The numbers of expressions are those of M²IST Section IV-A a and HiVG Table 6. For the google
# split of RefCOCOg the papers give only the sum.
DATASETS = {
    "refcoco": DatasetInfo(
        refer="refcoco/refs(unc).p", transvg="unc", mdetr="refcoco", pictures=COCO_FOLDERS,
        expressions={"train": 120_624, "val": 10_834, "testA": 5_657, "testB": 5_095}),
    "refcoco+": DatasetInfo(
        refer="refcoco+/refs(unc).p", transvg="unc+", mdetr="refcoco+", pictures=COCO_FOLDERS,
        expressions={"train": 120_191, "val": 10_758, "testA": 5_726, "testB": 4_889}),
    "refcocog-umd": DatasetInfo(
        refer="refcocog/refs(umd).p", transvg="gref_umd", mdetr="refcocog", pictures=COCO_FOLDERS,
        expressions={"train": 80_512, "val": 4_896, "test": 9_602}),
    "refcocog-google": DatasetInfo(
        refer="refcocog/refs(google).p", transvg="gref", mdetr=None, pictures=COCO_FOLDERS,
        expressions={"train": 85_474, "val": 9_536}),
    "referit": DatasetInfo(
        refer=None, transvg="referit", mdetr=None, pictures=("referit/images",),
        expressions={"train": 54_127, "val": 5_842, "test": 60_103}),
    "flickr30k": DatasetInfo(
        refer=None, transvg="flickr", mdetr=None,
        pictures=("Flickr30k/flickr30k-images", "Flickr30k/flickr30k_images"),
        expressions={"train": 427_193, "val": 14_433, "test": 14_481}),
}


def file_patterns(info):
    """Return the patterns of a dataset's annotation files, one for each format."""
    patterns = []
    if info.refer:
        patterns.append(info.refer)
    patterns.append(f"{info.transvg}/{info.transvg}_*.pth")
    if info.mdetr:
        patterns.append(f"finetune_{info.mdetr}_*.json")
    return patterns


def names_in(dataset):
    """Return the names that `dataset` joins by commas. The name of a file may hold a comma."""
    if Path(dataset).is_file():
        return [str(dataset)]
    return str(dataset).split(",")


EXAMPLE_LINE = ('{"image": "a.jpg", "text": "the red cup", "box": [x1, y1, x2, y2], '
                '"split": "train"}')


def folders_below(base):
    return sorted(base.glob("*/"))


def find_files(dataset, root):
    """Return the annotation files of a dataset, which share one format, and its picture folder."""
    base = Path(root or "data")
    path = Path(dataset)
    is_own_file = path.suffix == ".jsonl" and path.is_file()

    if dataset not in DATASETS and not is_own_file:
        raise InputError(
            f"{dataset}: no such dataset (choose shapes, {', '.join(DATASETS)}, or several joined "
            f"by commas), and no such file, which would be FILE.jsonl with one JSON object per "
            f"line: {EXAMPLE_LINE}")
    if root and not base.is_dir():
        raise InputError(f"--root {root}: there is no such folder; it should hold the annotations "
                         f"and pictures of {dataset}")

    if dataset in DATASETS:
        files, place = find_annotations(dataset, base)
        return files, find_pictures(dataset, base, place)
    if root:
        return [path], base
    return [path], path.parent


def find_annotations(dataset, base):
    """Return a dataset's annotation files and the folder, `base` or one below, that holds them."""
    info = DATASETS[dataset]
    patterns = file_patterns(info)
    for place in [base, *folders_below(base)]:
        for pattern in patterns:
            files = [file for file in sorted(place.glob(pattern)) if has_known_split(file, info)]
            if files:
                return files, place
    raise InputError(
        f"--root {base}: the annotations of {dataset} are neither there nor in a folder directly "
        f"below; they would match {' or '.join(patterns)}, with the pictures in "
        f"{' or '.join(info.pictures)}. `python data.py --help` says where the files come from")


def has_known_split(file, info):
    """Return whether an annotation file belongs to a split of the dataset. TransVG has files of
    other splits, such as trainval, that would repeat samples. REFER has one file for all splits."""
    if file.suffix == ".p":
        return True
    return split_in_name(file) in info.expressions


def split_in_name(file):
    """Return "val" for unc_val.pth or finetune_refcoco_val.json."""
    return file.stem.rpartition("_")[2]


def find_pictures(dataset, base, place):
    """Return the folder that holds a dataset's pictures, or the one that should hold them.
    place: the folder that holds the annotations."""
    names = DATASETS[dataset].pictures
    for folder in [base, place, *folders_below(base)]:
        for name in names:
            if (folder / name).is_dir():
                return folder / name
    return base / names[0]


# -------------------------------------------------------------------------------------------------
# Readers, one for each format. A reader takes a file and yields annotations.

class Annotation(NamedTuple):
    """What a reader yields for one expression, before it is checked."""
    where: str   # the place in the file, for error messages
    image: str   # name of the picture
    text: str    # the expression
    box: list    # [x1, y1, x2, y2] in pixels of the stored picture
    split: str


def corners(box):
    """Turn (x, y, w, h) into [x1, y1, x2, y2]."""
    # [D36] Coordinates stay floats. The released loaders cut them to integers.
    x, y, w, h = [float(v) for v in box]
    return [x, y, x + w, y + h]


class PlainUnpickler(pickle.Unpickler):
    """Reads pickled numbers, strings, lists and dicts. A pickle can also ask for a class or a
    function by its name, and so run any command. This class refuses to load one that does."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"the file asks for {module}.{name}, but annotations need no "
                                     f"code")


def read_refer(path):
    """Read REFER's refs(...).p, with instances.json beside it."""
    with open(path, "rb") as file:
        refs = PlainUnpickler(file, encoding="utf-8", errors="replace").load()
    instances = json.loads((path.parent / "instances.json").read_bytes())

    # A ref has a field file_name, but that is not the name of the picture file.
    names = {image["id"]: image["file_name"] for image in instances["images"]}
    boxes = {instance["id"]: instance["bbox"] for instance in instances["annotations"]}

    for ref in refs:
        for sentence in ref["sentences"]:
            image = names[ref["image_id"]]
            box = corners(boxes[ref["ann_id"]])
            yield Annotation(f"ref {ref['ref_id']}", image, sentence["sent"], box, ref["split"])


def read_transvg(path):
    """Read TransVG's DATASET_SPLIT.pth: a list of (picture, size, box, text, ...), or of
    (picture, box, text) for Flickr30k."""
    dataset = path.stem.rpartition("_")[0]
    with torch.serialization.safe_globals(numpy_globals()):   # boxes may be NumPy arrays
        rows = torch.load(path, map_location="cpu", weights_only=True)

    for number, row in enumerate(rows):
        if len(row) == 3:
            image, box, text = row
        else:
            image, box, text = row[0], row[2], row[3]
        if dataset in ("referit", "flickr"):
            box = [float(v) for v in box]   # already x1, y1, x2, y2
        else:
            box = corners(box)
        yield Annotation(f"item {number}", image, text, box, split_in_name(path))


def numpy_globals():
    """Return what torch.load may use to rebuild NumPy arrays and numbers. These names run no code.
    NumPy 1 and NumPy 2 store them under different module names."""
    allowed = [np.ndarray, np.dtype]
    for kind in ("f4", "f8", "i4", "i8"):
        allowed.append(type(np.dtype(kind)))
    for package in ("core", "_core"):   # NumPy 1, NumPy 2
        for part in (np._core.multiarray._reconstruct, np._core.multiarray.scalar):
            allowed.append((part, f"numpy.{package}.multiarray.{part.__name__}"))
    return allowed


def read_mdetr(path):
    """Read MDETR's finetune_DATASET_SPLIT.json: COCO's format, with one "image" per expression."""
    content = json.loads(path.read_bytes())
    boxes = {instance["image_id"]: instance["bbox"] for instance in content["annotations"]}
    for image in content["images"]:
        box = corners(boxes[image["id"]])
        yield Annotation(f"image {image['id']}", image["file_name"], image["caption"], box,
                         split_in_name(path))


def read_jsonl(path):
    """Read FILE.jsonl: in each line one JSON object with the keys image, text, box and split."""
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")   # some editors write this mark first
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            item = parse_line(line, f"{path}, line {number}")
            yield Annotation(f"line {number}", item["image"], item["text"], item["box"],
                             item["split"])


def parse_line(line, where):
    """Return the JSON object in one line of a .jsonl file. where: the line's file and number."""
    try:
        item = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: the line is not JSON in UTF-8 ({error})") from None

    keys = item if isinstance(item, dict) else {}
    missing = [key for key in ("image", "text", "box", "split") if key not in keys]
    if missing:
        raise InputError(f"{where}: the line lacks {', '.join(missing)}")
    return item


READERS = {".p": read_refer, ".pth": read_transvg, ".json": read_mdetr, ".jsonl": read_jsonl}


def check(annotation, where, needs_area):
    """Raise InputError if an annotation is not what a Sample can be made of.
    needs_area: whether a box without area is an error, too. In a file of your own you can correct
    such a box. In a published dataset you cannot, and evaluation must still count it."""
    box = annotation.box
    if not isinstance(box, list) or len(box) != 4 or not all(is_coordinate(v) for v in box):
        raise InputError(f"{where}: box is {box}, not four numbers [x1, y1, x2, y2]")

    x1, y1, x2, y2 = box
    if needs_area and (x2 <= x1 or y2 <= y1):
        raise InputError(f"{where}: box {box} has no area; a box is [x1, y1, x2, y2] in pixels, "
                         f"with x2 > x1 and y2 > y1. Is this one x, y, w, h? Then write "
                         f"[x, y, x + w, y + h]")

    for value in (annotation.image, annotation.text, annotation.split):
        if not is_text(value):
            raise InputError(f"{where}: image, text and split must be strings that are not empty "
                             f"and hold no broken Unicode")


def is_coordinate(value):
    # This comparison also refuses NaN, which JSON files may hold.
    return type(value) in (int, float) and abs(value) < 1e9


def is_text(value):
    if not isinstance(value, str) or not value.strip():
        return False
    # JSON can hold one half of a surrogate pair, which no file name or tokenizer can represent.
    return value.encode(errors="ignore").decode() == value


# -------------------------------------------------------------------------------------------------
# Samples of a dataset, or of several

def split_names(dataset, root=None):
    """Return the names of a dataset's splits, in the dataset's own order."""
    if str(dataset) == "shapes":
        return list(SHAPES_SPLITS)
    return list(samples_by_split(dataset, root))


def load_samples(dataset, split, root=None, limit=None):
    """Return the list of Sample of one split.

    dataset: "shapes", a name in DATASETS, the path of a FILE.jsonl, or several joined by commas
    root: the folder with annotations and pictures; for a FILE.jsonl, the folder that its picture
        paths start from (default: the folder of the file)
    limit: the first so many samples alone; None for all

    Raises InputError for an unknown dataset or split, a missing file or folder, and a bad line.
    """
    one_of(f"split of {dataset}", split, split_names(dataset, root))
    if str(dataset) == "shapes":
        return shapes_samples(SHAPES_SPLITS[split], limit)
    return samples_by_split(dataset, root)[split][:limit]


def samples_by_split(dataset, root):
    """Return {split: list of Sample} of all datasets but `shapes`."""
    if root is not None:
        root = str(root)
    return read_splits(str(dataset), root)


@functools.lru_cache(maxsize=8)
def read_splits(dataset, root):
    """Read what samples_by_split returns. Strings as arguments make repeated calls cheap."""
    names = names_in(dataset)
    if len(names) > 1:
        return mixed(names, root)

    splits = {}
    for _, split, sample in read_places(dataset, root):
        splits.setdefault(split, []).append(sample)
    if not splits:
        raise InputError(f"{dataset}: the file holds no line")
    return splits


def read_places(dataset, root):
    """Yield for each expression of one dataset its place ("FILE, line 12"), split and Sample."""
    files, folder = find_files(dataset, root)
    for file in files:
        for annotation in read_checked(file):
            box = tuple(float(v) for v in annotation.box)
            image = annotation.image
            sample = Sample(folder / image, annotation.text, box, image)
            yield f"{file}, {annotation.where}", annotation.split, sample


def where_is(dataset, root, sample):
    """Return the place at which a sample is written: "FILE, line 12" or "FILE, ref 7".

    A Sample does not know its place, which only a message about a fault needs. So the annotations
    are read again. If they have changed and hold the sample no more, its picture is the place.
    """
    for name in names_in(dataset):
        for place, _, found in read_places(name, root):
            if found == sample:
                return place
    return str(sample.image)


def read_checked(file):
    """Yield the annotations of one file, each of them checked."""
    reader = READERS[file.suffix]
    is_own_file = file.suffix == ".jsonl"
    try:
        for annotation in reader(file):
            check(annotation, f"{file}, {annotation.where}", needs_area=is_own_file)
            yield annotation
    except InputError:
        raise
    except Exception as error:   # a damaged file may hold anything, and so may fail in any manner
        raise InputError(f"{file}: the file is not as {reader.__name__}() expects it "
                         f"({type(error).__name__}: {error})") from None


def mixed(datasets, root):
    """Join several datasets, as in the papers' mixed training. A picture that is in val or test of
    any of them is in train of none.

    The joint splits are train and val, and each dataset's own splits as DATASET/SPLIT.
    """
    if "shapes" in datasets:
        raise InputError("shapes is generated and cannot be joined with other datasets")
    splits = {dataset: samples_by_split(dataset, root) for dataset in datasets}

    # 1. What is held out: the names of all pictures outside of the training splits.
    held_out = set()
    for dataset in datasets:
        for split, samples in splits[dataset].items():
            if split == "train":
                continue
            for sample in samples:
                held_out.update(picture_names(dataset, sample))

    # 2. The joint training split is what remains.
    joint = {"train": [], "val": []}
    total = 0
    for dataset in datasets:
        for sample in splits[dataset].get("train", []):
            total += 1
            if held_out.isdisjoint(picture_names(dataset, sample)):
                joint["train"].append(sample)
    left_out = total - len(joint["train"])
    print(f"{','.join(datasets)}: {left_out:,} of {total:,} expressions left out of train, because "
          f"their pictures are in val or test of one of the datasets")

    # 3. The joint val, which training needs, and each dataset's own splits, which evaluation needs.
    for dataset in datasets:
        for split, samples in splits[dataset].items():
            if split == "val":
                joint["val"].extend(samples)
            if split != "train":
                joint[f"{dataset}/{split}"] = samples
    return {split: samples for split, samples in joint.items() if samples}


def picture_names(dataset, sample):
    """Return what identifies a sample's picture in all datasets: its path and, in the published
    datasets, its file name, since COCO's pictures may be stored in several folders."""
    names = {os.path.abspath(sample.image)}
    if dataset in DATASETS:
        names.add(sample.image_id)
    return names


# -------------------------------------------------------------------------------------------------
# Leaks

# The pictures of these two datasets do not come from COCO, so no DETR has seen them.
OUTSIDE_COCO = ("referit", "flickr30k")

# TransVG's DETR files, and the datasets whose val and test pictures each one has not seen.
# All other public DETR files have seen all of them.
UNSEEN = {
    "detr-r50-unc": ("refcoco", "refcoco+"),
    "detr-r50-gref": ("refcocog-umd", "refcocog-google"),
}


def leaky_pretraining(dataset, detr_file):
    """Return whether a pretrained DETR has seen the val and test pictures of a dataset.

    dataset: one name, or several joined by commas
    detr_file: path, address or hub name of the weights; only the file name is looked at

    Returns True, False, or None if that is not known.
    """
    name = Path(detr_file).stem
    if not name.startswith("detr-r"):
        return None

    clean = OUTSIDE_COCO + UNSEEN.get(name, ())
    known = True
    for part in names_in(dataset):
        if part in clean:
            continue
        if part in DATASETS:
            return True
        known = False   # a file of one's own may hold any pictures
    return False if known else None


# -------------------------------------------------------------------------------------------------
# From a Sample to a batch: the picture

# What PIL may raise for a file that is not a picture, or not a whole one.
PICTURE_ERRORS = (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError)


def undecodable(image, error):
    return InputError(f"{image}: the file cannot be decoded as a picture ({error})")


def load_picture(image, upright=False, at_least=None):
    """Return an RGB picture, with transparent parts in white.

    image: path of a file, number of a scene of `shapes`, or a PIL picture
    upright: whether to turn the picture as its EXIF data say; for pictures from a camera, but not
        for datasets, whose boxes refer to the stored pixels
    at_least: the longer side, in pixels, that the caller needs. A JPEG is decoded at the smallest of
        1/2, 1/4 and 1/8 of its size that still has it, which takes less time; None: at full size
    """
    if isinstance(image, int):
        return render(image)
    if isinstance(image, Image.Image):
        return image
    try:
        picture = Image.open(image)
        if at_least is not None:
            longer = max(picture.size)
            # Pillow takes the smallest of these sizes that has as many pixels. For files other than
            # JPEG this does nothing. The mode None keeps that of the file.
            picture.draft(None, [max(1, side * at_least // longer) for side in picture.size])
        if upright:
            picture = ImageOps.exif_transpose(picture)
        return to_rgb(picture)
    except PICTURE_ERRORS as error:
        raise undecodable(image, error) from None


def load_draft(image, boxes, side):
    """Load a picture smaller than it is stored, where its longer side still has `side` pixels
    -> picture, boxes in its pixels. boxes: [(x1, y1, x2, y2), ...] in stored pixels"""
    picture = load_picture(image, at_least=side)
    width, height = header_size(image)
    x = picture.width / width
    y = picture.height / height
    return picture, [(x * x1, y * y1, x * x2, y * y2) for x1, y1, x2, y2 in boxes]


def to_rgb(picture):
    """Turn a PIL picture of any mode into RGB."""
    if picture.mode.startswith("I"):
        # 16 bits per pixel are scaled to 8. PIL would cut them off at 255.
        values = np.asarray(picture).clip(0, 65535) // 256
        picture = Image.fromarray(np.uint8(values))
    if picture.mode == "F" and picture.getextrema()[1] <= 1:
        # Floats from 0 to 1 are scaled to 255. PIL would make all of them black.
        values = np.asarray(picture).clip(0, 1) * 255
        picture = Image.fromarray(np.uint8(values.round()))
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return picture.convert("RGB")


def header_size(image):
    """Return (width, height) of a picture from the header of its file, without decoding it.
    image: path of a file, or number of a scene of `shapes`"""
    if isinstance(image, int):
        return WIDTH, scene(image).height
    try:
        with Image.open(image) as picture:
            return picture.size
    except PICTURE_ERRORS as error:
        raise undecodable(image, error) from None


def picture_sizes(samples):
    """Return {image: (width, height)} of all pictures of a list of Sample."""
    images = sorted({sample.image for sample in samples})
    sizes = {}
    for image in tqdm(images, "reading each picture's size", leave=False, disable=None):
        sizes[image] = header_size(image)
    return sizes


def is_outside(box, size):
    """Return whether no part of a box lies in its picture, of size (width, height)."""
    x1, y1, x2, y2 = box
    width, height = size
    return x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0


MANY = 0.1   # this share of odd boxes says that the unit or the order of all of them is wrong


def doubt_about_boxes(samples):
    """Return what shows that boxes are not x1, y1, x2, y2 in pixels, or None if nothing does."""
    near_corner = 0
    inverted = 0
    for sample in samples:
        x1, y1, x2, y2 = sample.box
        if max(sample.box) <= 1:
            near_corner += 1
        if x2 < x1 or y2 < y1:
            inverted += 1

    if near_corner > MANY * len(samples):
        return (f"{near_corner:,} of {len(samples):,} boxes lie within one pixel of the corner: "
                f"are they in pixels?")
    if inverted > MANY * len(samples):
        return (f"x2 < x1 or y2 < y1 in {inverted:,} of {len(samples):,} boxes: "
                f"are they x, y, w, h?")
    return None


def boxes_outside(samples):
    """Return the samples whose box has no part in its picture. Training can learn nothing from
    them. In evaluation each of them is a miss."""
    sizes = picture_sizes(samples)
    return [sample for sample in samples if is_outside(sample.box, sizes[sample.image])]


# Words that a crop or a mirror image may make false.
#
# [D36] In a mirror image left and right change places wherever they begin a word: "lefty",
# "rightmost", "left_side". Inside a word they name no side: "bright", "Wright", "cleft". "Right" is
# exchanged in "right behind him" and in "all right", too, as TransVG does, since one cannot tell
# from the letters whether a side is meant. But "leftover" never means one.
SIDE_WORD = re.compile(r"(?<![a-z])(left(?!over)|right)", re.IGNORECASE)


def whole_words(words):
    """Return a pattern that finds words with no letter before and behind them: "l" in "top_l"."""
    return f"(?<![a-z])({words})(?![a-z])"


# Other names of sides, which no exchange of left and right would make true again.
OTHER_SIDES = whole_words(
    "l|r|lf|lft|lt|rt|rht|rgt|rght|lhs|rhs"                  # abbreviations
    "|[tblu][lr]"                                            # such as "br" for "bottom right"
    "|lef|letf|rigt|rigth|rihgt"                             # typing errors
    "|(top|bottom|upper|lower|far|front|back|mid|middle|center|centre)(left|right)(most)?"
    "|(north|south|mid)?(east|west)[a-z]*|[ns][ew]"          # "northwest", "eastern", "SE"
    r"|o\W*clock"                                            # "o'clock", "oclock"
    r"|starboard|port\W?side")

# Words that count, for example from left to right, and figures, which a mirror image turns round.
ORDER_WORDS = whole_words(
    "first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth"
    "|[a-z]+teenth|[a-z]+tieth|last|final|penultimate|numbers?|(counter|anti)?clockwise")

PLACE_WORD = re.compile(
    SIDE_WORD.pattern + "|" + OTHER_SIDES + "|"
    + whole_words("(top|bottom|upper|lower)(most)?|middle|cent(er|re)|corner|edge"),
    re.IGNORECASE)
UNMIRRORED_WORD = re.compile(r"\d|" + OTHER_SIDES + "|" + ORDER_WORDS, re.IGNORECASE)


def augment(picture, boxes, texts, rng, mirror):
    """Change a training picture at random, with its boxes and texts, as TransVG does, which both
    papers take over. There is one box and one text; more where expressions share their picture.

    boxes: list of (x1, y1, x2, y2) in pixels of the picture
    mirror: whether mirror images are allowed; HiVG Appendix B uses none

    Returns the changed picture, boxes and texts.
    """
    # [D36] A crop would make words about places false, and must keep the centre of each box.
    if rng.random() < 0.5 and not found_in(PLACE_WORD, texts):
        picture, boxes = crop(picture, boxes, rng)

    if rng.random() < 0.8:
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for enhancer in rng.sample(enhancers, 3):   # in a random order
            picture = enhancer(picture).enhance(rng.uniform(0.6, 1.4))

    # [D36] A mirror image exchanges left and right, but other words would become false.
    if mirror and rng.random() < 0.5 and not found_in(UNMIRRORED_WORD, texts):
        boxes = [(picture.width - x2, y1, picture.width - x1, y2) for x1, y1, x2, y2 in boxes]
        picture = ImageOps.mirror(picture)
        texts = [SIDE_WORD.sub(opposite_side, text) for text in texts]
    return picture, boxes, texts


def found_in(pattern, texts):
    """Return whether a pattern is found in any of the texts."""
    return any(pattern.search(text) for text in texts)


def opposite_side(match):
    """Return the word that replaces a match of SIDE_WORD in a mirror image."""
    if match[0].lower() == "left":
        return "right"
    return "left"


def crop(picture, boxes, rng):
    """Cut a random part out of the picture that keeps the centre of each box. If 20 tries lead to
    none, the whole picture stays.

    TransVG scales the picture before it crops, so that its short side has 400, 500 or 600 pixels.
    Here the crop has the same share of the picture, which keeps its own pixels until it is scaled
    to a square of any size.
    """
    scale = min(picture.size) / rng.choice((400, 500, 600))   # pixels for one pixel of TransVG
    centres = [((x1 + x2) / 2, (y1 + y2) / 2) for x1, y1, x2, y2 in boxes]

    for _ in range(20):
        w = crop_side(picture.width, scale, rng)
        h = crop_side(picture.height, scale, rng)
        x = rng.randint(0, picture.width - w)
        y = rng.randint(0, picture.height - h)
        # [D36] The centres must lie inside the crop on all four sides.
        if all(x < centre_x < x + w and y < centre_y < y + h for centre_x, centre_y in centres):
            moved = [(x1 - x, y1 - y, x2 - x, y2 - y) for x1, y1, x2, y2 in boxes]
            return picture.crop((x, y, x + w, y + h)), moved
    return picture, boxes


def crop_side(side, scale, rng):
    """Return the random width or height of a crop. side: the whole picture's, in pixels

    As in TransVG, no draw exceeds the scaled picture, whose sides have at least 400 pixels. To draw
    up to 600 and cut off afterwards would leave the whole height to half of the crops.
    """
    longest = min(round(side / scale), 600)
    return min(side, round(scale * rng.randint(384, longest)))


# -------------------------------------------------------------------------------------------------
# From a Sample to a batch: the padded square

class Placement(NamedTuple):
    """Where a scaled picture lies in its square, in pixels of the square."""
    width: int
    height: int
    left: int
    top: int


def placement(width, height, size, rng=None, fill=1.0):
    """Return the Placement of a picture of width x height pixels in a square of side `size`.

    The longer side is scaled to `fill` times the side of the square. The picture is centred or,
    if there is an `rng` (in training), put at a random place.
    """
    scale = fill * size / max(width, height)
    w = max(1, round(width * scale))
    h = max(1, round(height * scale))
    if rng is None:
        left = (size - w) // 2
        top = (size - h) // 2
    else:
        left = rng.randint(0, size - w)
        top = rng.randint(0, size - h)
    return Placement(w, h, left, top)


def letterbox(picture, size, rng=None, pixels=PIXELS["detr"], fill=1.0):
    """Scale a picture, keeping its proportions, and pad it to a square (HiVG Appendix B: "long edge
    alignment and short edge pad filling").

    Returns
        image      (3, S, S) normalised by `pixels`; padding is 0, which is the mean colour
        padding    (S, S)    True where there is no picture
        place      Placement of the picture in the square
    """
    place = placement(*picture.size, size, rng, fill)
    image, padding = pad(scale(picture, place.width, place.height), place, size, pixels)
    return image, padding, place


def scale(picture, width, height):
    """Return a picture in another size, as a tensor (3, height, width) of values from 0 to 255."""
    scaled = picture.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(scaled)).permute(2, 0, 1)


# Scenes do not change, so each is drawn in the first epoch alone. A scene that is 64 pixels wide has
# 12 kB at most.
@functools.lru_cache(maxsize=10_000)
def scaled_scene(number, width, height):
    """Draw the picture of a scene and scale it, as `scale` does."""
    return scale(render(number), width, height)


def pad(content, place, size, pixels):
    """Put what `scale` returns into its place in a square -> image and padding of `letterbox`."""
    mean = torch.tensor(pixels.mean)[:, None, None]                  # (3, 1, 1)
    std = torch.tensor(pixels.std)[:, None, None]

    rows = slice(place.top, place.top + place.height)
    columns = slice(place.left, place.left + place.width)
    image = torch.zeros(3, size, size)
    image[:, rows, columns] = content
    image[:, rows, columns].div_(255).sub_(mean).div_(std)    # in place, without megabytes of copies
    padding = torch.ones(size, size, dtype=torch.bool)
    padding[rows, columns] = False
    return image, padding


def clip(value, low, high):
    return min(max(value, low), high)


def to_square(box, picture_size, place, size):
    """Turn (x1, y1, x2, y2) in pixels of the picture into [cx, cy, w, h] in [0, 1] of the square.
    Parts of the box outside of the picture are cut off, so that a box wholly outside has no area.
    place: from `placement`."""
    width, height = picture_size
    x1 = place.left + clip(box[0], 0, width) * place.width / width
    y1 = place.top + clip(box[1], 0, height) * place.height / height
    x2 = place.left + clip(box[2], 0, width) * place.width / width
    y2 = place.top + clip(box[3], 0, height) * place.height / height

    cx = (x1 + x2) / 2
    cy = (y1 + y2) / 2
    return [cx / size, cy / size, (x2 - x1) / size, (y2 - y1) / size]


def from_square(box, picture_size, size):
    """Turn (cx, cy, w, h) in [0, 1] of the square into (x1, y1, x2, y2) in pixels of the picture.
    This is the inverse of to_square for a picture that is centred in its square."""
    width, height = picture_size
    cx, cy, w, h = [float(v) * size for v in box]   # in pixels of the square
    place = placement(width, height, size)

    x1 = (cx - w / 2 - place.left) * width / place.width
    y1 = (cy - h / 2 - place.top) * height / place.height
    x2 = (cx + w / 2 - place.left) * width / place.width
    y2 = (cy + h / 2 - place.top) * height / place.height
    return clip(x1, 0, width), clip(y1, 0, height), clip(x2, 0, width), clip(y2, 0, height)


# -------------------------------------------------------------------------------------------------
# From a Sample to a batch: the text

def mending_table():
    """Return for str.translate what CLIP's authors had ftfy replace in each text."""
    table = {}
    for quote in "\u2018\u2019\u201a\u201b\u02bc":
        table[ord(quote)] = "'"
    for quote in "\u201c\u201d\u201e\u201f":
        table[ord(quote)] = '"'
    ligatures = range(0xFB00, 0xFB07)               # such as "\ufb01", which becomes "fi"
    full_width = [0x3000, *range(0xFF01, 0xFFF0)]   # such as "\uff33", which becomes "S"
    for code in [*ligatures, *full_width]:
        table[code] = unicodedata.normalize("NFKC", chr(code))
    return table


MENDED = mending_table()


def mend(text):
    """Return a text as CLIP's pretraining has read it, but for mojibake [D46]. Its tokenizer itself
    joins accents with their letters, joins white space and makes letters small."""
    # CLIP's authors unescape twice: a web page may hold "&amp;amp;".
    return html.unescape(html.unescape(text)).translate(MENDED)


class Tokenizer:
    """Turns a text into a list of at most max_tokens token ids. A longer text loses words at its
    end, but keeps the token that marks the end.

    name: hub name or folder of a text encoder, whose own tokenizer is used; None means WordPiece
        with the words of `shapes`, and single letters for all other words
    vocabulary: number of tokens that the text encoder knows, if that is to be checked
    flag: the command line's flag that sets `name`, for error messages
    """

    def __init__(self, max_tokens, name=None, vocabulary=None, flag="--text-weights"):
        # The tokenizer's threads do not survive the fork of a DataLoader's workers.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.max_tokens = max_tokens
        self.mends = False
        if name is None:
            self.wordpiece = shapes_wordpiece()
            self.pad = self.wordpiece.token_to_id("[PAD]")
            self.mask = self.wordpiece.token_to_id("[MASK]")
        else:
            self.wordpiece = pretrained_wordpiece(name, vocabulary, flag)
            self.mends = is_clips(self.wordpiece)
            self.pad = self.wordpiece.pad_token_id
            self.mask = self.wordpiece.mask_token_id

    def __call__(self, text):
        ids = self.encode(text)
        if len(ids) > self.max_tokens:
            ids = ids[:self.max_tokens - 1] + ids[-1:]   # the last token marks the end
        return ids

    def length(self, text):
        """Return the number of tokens of a text before it is cut."""
        return len(self.encode(text))

    def encode(self, text):
        """Return all token ids of a text."""
        # [D46] CLIP's pretraining mended each text, BERT's did not. A text that spells "[SEP]" or
        # "<|endoftext|>" is split like any other, and makes no special token.
        if self.mends:
            text = mend(text)
        if isinstance(self.wordpiece, tokenizers.Tokenizer):
            return self.wordpiece.encode(text).ids
        # verbose=False: otherwise a long text gives a warning
        return self.wordpiece(text, split_special_tokens=True, verbose=False)["input_ids"]


class WordCounter:
    """Stands in for a Tokenizer whose files are not there: each word counts as one token."""

    def __init__(self, max_tokens):
        self.max_tokens = max_tokens

    def length(self, text):
        return len(text.split()) + 2   # one token marks the beginning of a text, and one its end


def cut_samples(samples, tokenizer):
    """Return the samples whose texts lose words, because they have more than max_tokens tokens."""
    texts = {sample.text for sample in samples}   # 120,000 texts take about 5 seconds
    cut = {text for text in texts if tokenizer.length(text) > tokenizer.max_tokens}
    return [sample for sample in samples if sample.text in cut]


def is_clips(wordpiece):
    from transformers import CLIPTokenizer   # importing transformers takes seconds
    return isinstance(wordpiece, CLIPTokenizer)


def pretrained_wordpiece(name, vocabulary, flag):
    """Return transformers' tokenizer by a hub name or folder."""
    from transformers import AutoTokenizer   # importing transformers takes seconds
    try:
        wordpiece = AutoTokenizer.from_pretrained(name, local_files_only=not may_ask_hub(name))
        # Where its files are missing, transformers makes an empty tokenizer without a warning.
        if vocabulary and len(wordpiece) != vocabulary:
            raise ValueError(
                f"it has {len(wordpiece)} tokens, but the text encoder has {vocabulary}; is "
                f"tokenizer.json missing there, or vocab.txt, or vocab.json with merges.txt?")
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"no tokenizer in {name} fits ({reason}): give a hub name or folder by "
                         f"{flag}, or take --weights random or --size tiny") from None
    return wordpiece


def may_ask_hub(name):
    """Return whether a folder is a hub name, and the hub answers. Without a network the hub's own
    retries would take a minute, before its error comes."""
    return not Path(name).exists() and hub_answers()


@functools.lru_cache(maxsize=1)
def hub_answers():
    from huggingface_hub.constants import ENDPOINT
    try:
        urllib.request.urlopen(urllib.request.Request(ENDPOINT, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        return True   # an answer, too
    except OSError:
        return False
    return True


def shapes_wordpiece():
    """Return BERT's WordPiece with the words of `shapes`, and letters. It needs no files, and comes
    from the library `tokenizers`, because importing transformers takes seconds."""
    phrases = ["to", "from", *COLOURS, *SHAPES, *NOUNS, *ORDINALS, *SIDES]
    for synonyms in SIZE_WORDS.values():
        phrases.extend(synonyms)
    for side in SIDES.values():
        phrases.extend(side.superlatives)
        phrases.extend(side.comparatives)
    known_words = set(" ".join(phrases).replace("{}", "").split())

    characters = [chr(code) for code in range(33, 127)]   # what ASCII can print
    letters = [c for c in characters if not c.isupper()]
    inner_letters = ["##" + c for c in letters if c.isalnum()]

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces += letters + inner_letters + sorted(known_words)
    ids = {piece: number for number, piece in enumerate(pieces)}

    wordpiece = tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token="[UNK]"))
    wordpiece.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    wordpiece.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    wordpiece.post_processor = tokenizers.processors.BertProcessing(
        ("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))   # the end of a text, and its beginning
    return wordpiece


# -------------------------------------------------------------------------------------------------
# From a Sample to a batch: what the DataLoader uses

def seeded(*key):
    """Return a random generator of its own for each key. What is drawn for a sample then depends on
    nothing that was drawn before."""
    return random.Random(" ".join(str(part) for part in key))


# [D32] TransVG scales the long side to one of 640, 608, ... 448 of 640 pixels.
SCALES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


class Item(NamedTuple):
    """One sample as GroundingDataset gives it."""
    image: torch.Tensor     # (3, S, S) normalised
    padding: torch.Tensor   # (S, S)    True where there is no picture
    tokens: list            # token ids of the text
    box: list               # [cx, cy, w, h] in [0, 1] of the square
    index: int              # of the sample in the dataset


class GroundingDataset(torch.utils.data.Dataset):
    """Samples as tensors. A picture is decoded when its sample is asked for.

    size: side of the padded square, in pixels
    train: whether a picture is put at a random place of its square, instead of the centre
    seed: all random choices depend on the seed, on `epoch` and on the index of the sample alone, so
        that they are the same with any number of workers and after a resume
    augmented: whether, in training, `augment` and a random scale are applied, too
    mirror: whether `augment` may use mirror images
    shared: whether neighbours in a batch that have the same picture share it, in training with one
        choice of transforms; in evaluation, where nothing is random, they always do
    draft: whether a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that is large enough; its
        pixels are then slightly different ones
    """

    def __init__(self, samples, size, tokenizer, pixels, train=False, seed=0, augmented=False,
                 mirror=False, shared=False, draft=False):
        self.samples = samples
        self.size = size
        self.tokenizer = tokenizer
        self.pixels = pixels
        self.train = train
        self.seed = seed
        # Workers live from epoch to epoch with a copy of this object. They see the number of the
        # epoch because its memory is shared.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.augmented = augmented
        self.mirror = mirror
        self.shared = shared or not train
        self.draft = draft
        check_pictures_exist(samples)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        """Return the list of Item of a batch; the DataLoader calls this. Neighbours that share a
        picture hold the same tensor, by which collate knows them."""
        items = []
        if not self.shared:
            for index in indices:
                items += self.load([index])
            return items
        for _, neighbours in itertools.groupby(indices, self.picture_of):
            items += self.load(list(neighbours))
        return items

    def picture_of(self, index):
        return self.samples[index].image

    def load(self, indices):
        """Return the list of Item of samples that share one picture."""
        image = self.picture_of(indices[0])
        boxes = [self.samples[index].box for index in indices]
        texts = [self.samples[index].text for index in indices]

        rng = None
        if self.train:
            rng = seeded(self.seed, self.epoch.item(), indices[0])
        augmented = self.train and self.augmented

        # Scaled scenes of `shapes` are kept. For larger squares they would fill the memory.
        if isinstance(image, int) and not augmented and self.size <= WIDTH:
            picture_size = header_size(image)
            place = placement(*picture_size, self.size, rng)
            content = scaled_scene(image, place.width, place.height)
            square, padding = pad(content, place, self.size, self.pixels)
        else:
            if self.draft:
                # A crop may keep a half of a side, and should not be made larger.
                enough = 2 * self.size if augmented else self.size
                picture, boxes = load_draft(image, boxes, enough)
            else:
                picture = load_picture(image)
            fill = 1.0
            if augmented:
                picture, boxes, texts = augment(picture, boxes, texts, rng, self.mirror)
                fill = rng.choice(SCALES)
            picture_size = picture.size
            square, padding, place = letterbox(picture, self.size, rng, self.pixels, fill)

        items = []
        for index, box, text in zip(indices, boxes, texts):
            target = to_square(box, picture_size, place, self.size)
            items.append(Item(square, padding, self.tokenizer(text), target, index))
        return items


def by_picture(samples):
    """Return the indices of a list of Sample as [[index, ...], ...], a list for each picture."""
    indices = {}
    for index, sample in enumerate(samples):
        indices.setdefault(sample.image, []).append(index)
    return list(indices.values())


class TrainingBatches:
    """The batches of an epoch, each a list of indices: a batch_sampler for torch's DataLoader. The
    order depends on seed and `epoch` alone; samples that do not fill a last batch are left out.

    together: K, how many samples of a picture follow each other; a picture may have fewer
    rank, processes: give this process its part of each batch, where several train together

    Set `epoch` before each pass, and `first` to begin at a later batch than the first, 0.
    """

    def __init__(self, samples, batch_size, seed, together=1, rank=0, processes=1):
        self.pictures = by_picture(samples)
        self.batch_size = min(batch_size, len(samples))
        self.batches = len(samples) // self.batch_size
        self.seed = seed
        self.together = together
        self.part = self.batch_size // processes
        self.offset = rank * self.part
        self.epoch = 0
        self.first = 0

    def __len__(self):
        return self.batches

    def __iter__(self):
        order = self.order()
        for batch in range(self.first, self.batches):
            start = batch * self.batch_size + self.offset
            yield order[start:start + self.part]

    def order(self):
        """Return all indices in the order of this epoch."""
        rng = seeded("order", self.seed, self.epoch)
        groups = []
        for indices in self.pictures:
            shuffled = rng.sample(indices, len(indices))
            for start in range(0, len(shuffled), self.together):
                groups.append(shuffled[start:start + self.together])
        rng.shuffle(groups)
        return list(itertools.chain(*groups))


def evaluation_batches(samples, batch_size, rank=0, processes=1):
    """Return batches of indices that hold each sample once, [[index, ...], ...]. The samples of a
    picture follow each other, so that it is loaded and encoded once for all of them.
    rank, processes: give this process its share of the batches, where several evaluate together"""
    order = list(itertools.chain(*by_picture(samples)))
    batches = [order[start:start + batch_size] for start in range(0, len(order), batch_size)]
    return batches[rank::processes]


def check_pictures_exist(samples):
    """Raise InputError if a picture's file is missing, before hours of training have passed."""
    paths = {sample.image for sample in samples if isinstance(sample.image, Path)}
    missing = sorted(path for path in paths if not os.path.isfile(path))
    if missing:
        raise InputError(f"{missing[0]}: no such picture ({len(missing):,} are missing in all); "
                         f"picture paths start from the folder of the .jsonl file or from --root; "
                         f"`python data.py DATASET --root DIR` reports what is there")


def check_decodable(samples):
    """Raise InputError if a picture cannot be decoded, before hours of training have passed. This
    takes about 10 seconds for the 1,500 pictures of RefCOCO's val."""
    faults = {}
    open_pictures({sample.image for sample in samples}, {}, faults)
    for errors in faults.values():
        raise InputError(f"{errors[0]}. Of the pictures to validate on, {len(errors):,} cannot be "
                         f"decoded: fetch them again, or take their expressions out of val")


def collate(items, pad):
    """Join a list of Item into a batch. pad: the tokenizer's id of padding.

    Returns a dict of, for P pictures of B samples,
        images         (P, 3, S, S)   image_padding   (P, S, S)
        tokens         (B, T)         token_padding   (B, T)
        boxes          (B, 4)         index           (B,)
        picture        (B,)           the row of each sample's picture in images; it rises by 0 or 1
    """
    pictures = []      # the first Item of each picture
    rows = []
    for item in items:
        if not pictures or item.image is not pictures[-1].image:
            pictures.append(item)
        rows.append(len(pictures) - 1)
    texts = [torch.tensor(item.tokens) for item in items]
    tokens = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=pad)   # (B, T)
    lengths = torch.tensor([len(text) for text in texts])                                  # (B,)
    positions = torch.arange(tokens.shape[1])                                              # (T,)
    return {
        "images": torch.stack([item.image for item in pictures]),
        "image_padding": torch.stack([item.padding for item in pictures]),
        "tokens": tokens,
        "token_padding": positions >= lengths[:, None],
        "boxes": torch.tensor([item.box for item in items], dtype=torch.float32),
        "index": torch.tensor([item.index for item in items]),
        "picture": torch.tensor(rows),
    }


# -------------------------------------------------------------------------------------------------
# Pictures of boxes

TRUE = (0, 130, 40)         # colour of a true box
PREDICTED = (220, 0, 90)    # colour of a predicted box
WARM = (255, 140, 0)        # colour of attention
LEGEND = {"true": TRUE, "predicted": PREDICTED, "attention": WARM}

CAPTION_HEIGHT = 54         # pixels below a picture, enough for three lines
LEGEND_HEIGHT = 24          # pixels above all pictures


@functools.cache
def font():
    return ImageFont.load_default(13)


def spread(samples, count=12):
    """Return `count` samples from all over a list, or all if there are fewer."""
    step = max(1, len(samples) // count)
    return samples[::step][:count]


def caption_of(text, number, path):
    """Return what can be drawn below a picture for a text. The font that Pillow brings has the
    letters of English and few others. A text in other letters is printed, under its number.

    number: of the text on its sheet. path: the sheet's file.
    """
    missing = "\U0010fffd"   # no font has this character, so it looks like all that are missing
    characters = set("".join(text.split()))
    if any(bytes(font().getmask(c)) == bytes(font().getmask(missing)) for c in characters):
        print(f"text {number} of {path}: {text}")
        return f"(text {number}: see the terminal)"
    return text


def draw(picture, caption, boxes, attention=None, side=256, heading=""):
    """Return a tile: the picture with boxes in it, and below it the heading and the caption.

    boxes: list of ((x1, y1, x2, y2) in pixels of the picture, colour)
    attention: (N_v,) over the vision tokens of the padded square, drawn as warmth
    side: of the square, in pixels
    heading: a line above the caption
    """
    scale = side / max(picture.size)
    w, h, left, top = placement(*picture.size, side)
    view = picture.resize((w, h), Image.Resampling.BICUBIC)
    if attention is not None:
        view = add_warmth(view, attention, left, top, side)
    draw_boxes(view, boxes, scale)

    tile = Image.new("RGB", (side, side + CAPTION_HEIGHT), "white")
    tile.paste(view, (left, 0))
    letters = (side - 8) // 7   # per line, each about 7 pixels wide
    lines = textwrap.wrap(caption, letters, max_lines=2, placeholder=" ...")
    if heading:
        lines.insert(0, heading)
    ImageDraw.Draw(tile).text((4, h + 2), "\n".join(lines), "black", font())
    return tile


def draw_boxes(view, boxes, scale):
    """Draw boxes into a picture that was scaled. A light line around each keeps its contrast on any
    ground. These lines come first, so that none of them covers another box."""
    pen = ImageDraw.Draw(view)
    corners = []
    for box, _ in boxes:
        x1, y1, x2, y2 = [v * scale for v in box]
        corners.append((x1, y1, max(x1, x2), max(y1, y2)))   # inside out, it becomes a line

    for x1, y1, x2, y2 in corners:
        pen.rectangle((x1 - 2, y1 - 2, x2 + 2, y2 + 2), outline="white", width=6)
    for rectangle, (_, colour) in zip(corners, boxes):
        pen.rectangle(rectangle, outline=colour, width=3)


def add_warmth(view, attention, left, top, side):
    """Colour a picture, which lies at (left, top) in a square, where the attention is high.

    The strength is 0 where attention is 1 / N_v, as if it were uniform, or less, and 1 where it is
    1. Between them it grows with the logarithm, as attention of a tenth is much in 400 tokens.
    Even at strength 1 the colours below can be recognised.
    """
    count = len(attention)                                             # N_v
    grid = math.isqrt(count)
    cells = attention.float().cpu().unflatten(0, (grid, -1))           # (N_v,) -> (grid, grid)
    strength = (cells * count).clamp(1, count).log() / math.log(count)
    opacity = Image.fromarray(np.uint8(0.5 * 255 * strength))
    opacity = opacity.resize((side, side), Image.Resampling.BICUBIC)
    opacity = opacity.crop((left, top, left + view.width, top + view.height))
    warm = Image.new("RGB", view.size, WARM)
    return Image.composite(warm, view, opacity)


def contact_sheet(tiles, legend, columns=4):
    """Return one picture that shows tiles of equal size side by side, below a legend.
    legend: names in LEGEND of the colours that the tiles have"""
    gap = 8                                  # pixels between tiles
    width, height = tiles[0].size
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    size = (gap + columns * (width + gap), LEGEND_HEIGHT + gap + rows * (height + gap))
    sheet = Image.new("RGB", size, "white")
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        corner = (gap + column * (width + gap), LEGEND_HEIGHT + gap + row * (height + gap))
        sheet.paste(tile, corner)
    pen = ImageDraw.Draw(sheet)
    x = 8
    for name in legend:
        pen.rectangle((x, 8, x + 12, 20), LEGEND[name])
        pen.text((x + 18, 6), name, "black", font())
        x += 36 + round(font().getlength(name))
    return sheet


def interval_chart(bars):
    """Return a PIL picture with a line of text, a point and its interval for each of `bars`.

    bars: [(text, value, half of the interval, threshold), ...], all in the same unit. The threshold
        is a short grey line. An interval above its threshold is green, one below it red."""
    side = 24            # pixels of a line
    left = 12 + max(round(font().getlength(text)) for text, *_ in bars)
    width = 420
    ends = [max(abs(value) + half, abs(threshold)) for _, value, half, threshold in bars]
    reach = math.ceil(max(1.0, *ends))           # the axis goes from -reach to reach
    picture = Image.new("RGB", (left + width + 12, side * (len(bars) + 1)), "white")
    pen = ImageDraw.Draw(picture)

    def place(value):
        return left + (value + reach) / (2 * reach) * width

    bottom = side * len(bars)
    for mark in (-reach, 0, reach):
        pen.line((place(mark), 4, place(mark), bottom), "lightgrey")
        label = f"{mark:+d}" if mark else "0"
        pen.text((place(mark) - font().getlength(label) / 2, bottom + 4), label, "black", font())
    for number, (text, value, half, threshold) in enumerate(bars):
        y = side * number + side // 2
        colour = "dimgrey"
        if value - half > threshold:
            colour = "green"
        elif value + half < threshold:
            colour = "red"
        pen.text((6, y - 8), text, "black", font())
        pen.line((place(threshold), y - 7, place(threshold), y + 7), "grey")
        pen.line((place(value - half), y, place(value + half), y), colour, 2)
        pen.ellipse((place(value) - 4, y - 4, place(value) + 4, y + 4), fill=colour)
    return picture


def write_picture(path, picture):
    """Write a PIL picture by write_atomically, in the format that the file's name ends with."""
    formats = Image.registered_extensions()
    kind = formats[Path(path).suffix.lower()]
    write_atomically(path, functools.partial(picture.save, format=kind))


# -------------------------------------------------------------------------------------------------
# Download

WEB_ARCHIVE = ("https://web.archive.org/web/{}/"
               "https://bvisionweb1.cs.unc.edu/licheng/referit/data")

# archive: address of its folder, as users reported it. The docstring above lists these addresses.
ADDRESSES = {
    "refcoco.zip": WEB_ARCHIVE.format(20220413011718),
    "refcoco+.zip": WEB_ARCHIVE.format(20220413011656),
    "refcocog.zip": WEB_ARCHIVE.format(20220413012904),
    "train2014.zip": "http://images.cocodataset.org/zips",
}

# dataset that cannot be fetched: who has its pictures
HOLDERS = {
    "referit": "the shared drives that the READMEs of TransVG and CLIP-VG link",
    "flickr30k": "its authors, who ask for a form",
}


def check_downloadable(dataset, root):
    """Raise InputError if a dataset cannot be fetched, and say where its files are."""
    one_of("dataset to --download", dataset, DATASETS)
    info = DATASETS[dataset]
    base = Path(root or "data")
    if dataset in HOLDERS:
        raise InputError(
            f"{dataset} cannot be fetched: get its pictures from {HOLDERS[dataset]}, and put them "
            f"into {base / info.pictures[0]}; get {info.transvg}_*.pth from the drive that TransVG "
            f"shares, and put them into {base / info.transvg}")


def download(dataset, root, mirror):
    """Fetch what is missing of a dataset: REFER's annotations, unless there are annotations of any
    format, and those of COCO's pictures that the annotations name.
    mirror: address of a folder to fetch from; None means the ones in ADDRESSES."""
    check_downloadable(dataset, root)
    base = Path(root or "data")
    refer = Path(DATASETS[dataset].refer)   # for example refcoco/refs(unc).p

    try:
        samples_by_split(dataset, root)
    except InputError:   # the annotations are missing or damaged
        wanted = {refer.name, "instances.json"}
        unpack(f"{refer.parent}.zip", base / refer.parent, wanted, base, mirror)

    pictures = set()
    for samples in samples_by_split(dataset, root).values():
        pictures.update(sample.image_id for sample in samples)
    _, folder = find_files(dataset, root)
    unpack("train2014.zip", folder, pictures, base, mirror)


def unpack(name, folder, wanted, base, mirror):
    """Unpack the wanted files that `folder` lacks from an archive, which is fetched if need be.
    name: of the archive, which is kept in the folder `base`."""
    missing = {file for file in wanted if not os.path.lexists(folder / file)}
    if not missing:
        return

    archive = base / name
    address = f"{(mirror or ADDRESSES[name]).rstrip('/')}/{name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not zipfile.is_zipfile(archive):
            fetch(address, archive)
        unpack_files(archive, folder, missing)
    except Exception as error:   # a server or an archive may fail in any manner
        raise InputError(
            f"{archive}, from {address}: {type(error).__name__}, {error}. The same command goes on "
            f"where this download broke off. If that does not help, delete the archive, or take it "
            f"from another address by --mirror") from None


def fetch(address, path):
    """Fetch an archive. If a part of it is there already, fetch the rest."""
    present = path.stat().st_size if path.exists() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={present}-"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        if reply.status != 206:   # 206 is "partial content"; otherwise the server sends the whole
            present = 0
        # An answer may be an error page, or empty. What is there must then stay as it is.
        if present == 0 and reply.peek(2)[:2] != b"PK":
            raise ValueError(f"the answer is no zip archive, it begins with {reply.peek(40)[:40]}")

        size = present + int(reply.headers["Content-Length"] or 0)
        mode = "ab" if present else "wb"
        progress = tqdm.wrapattr(reply, "read", size, desc=path.name, initial=present)
        with progress as source, open(path, mode) as target:
            shutil.copyfileobj(source, target, 1 << 20)

    if path.stat().st_size < size:
        raise EOFError(f"only {path.stat().st_size:,} of {size:,} bytes came")


def unpack_files(archive, folder, names):
    """Unpack files by their names. Only the last part of a member's path and its content are used,
    so that neither `..` nor links in an archive lead out of the folder."""
    with zipfile.ZipFile(archive) as file:
        members = {}
        for member in file.infolist():
            name = member.filename.rpartition("/")[2]
            if name in names:
                members[name] = member

        for name, member in tqdm(members.items(), f"unpacking {archive.name}", disable=None):
            content = file.read(member)   # this also compares the checksum
            write_atomically(folder / name, functools.partial(write_bytes, content=content))


def write_bytes(path, content):
    path.write_bytes(content)


# -------------------------------------------------------------------------------------------------
# The command line: look at a dataset before a model is trained on it

def counting_tokenizer(dataset, max_tokens, text_weights):
    """Return the tokenizer of --text-weights or, by default, that of `shapes` or BERT. For BERT
    nothing is fetched: if its files are not on this machine, words are counted."""
    if text_weights:
        return Tokenizer(max_tokens, text_weights)
    if dataset == "shapes":
        return Tokenizer(max_tokens)
    from huggingface_hub import try_to_load_from_cache   # transformers brings this library
    for name in ("tokenizer.json", "config.json"):
        path = try_to_load_from_cache("bert-base-uncased", name)
        if not isinstance(path, str):
            return WordCounter(max_tokens)
    return Tokenizer(max_tokens, str(Path(path).parent))


def report(dataset, root, tokenizer):
    """Print the size of each split beside the papers' count. Then print each fault that harms
    training, with its number of cases and an example."""
    info = DATASETS.get(dataset)
    faults = {}     # fault: list of cases
    doubts = []     # about the boxes of whole splits
    pictures = {}   # split: set of pictures
    sizes = {}      # picture: (width, height), for those that could be opened

    print(f"{'split':12}{'images':>9}{'objects':>9}{'expressions':>13}{'the papers':>12}")
    for split in split_names(dataset, root):
        samples = load_samples(dataset, split, root)
        pictures[split] = {sample.image for sample in samples}
        objects = {(sample.image, sample.box) for sample in samples}
        expected = info.expressions.get(split) if info else None
        print(f"{split:12}{len(pictures[split]):9,}{len(objects):9,}{len(samples):13,}"
              f"{paper_column(expected, len(samples))}")

        open_pictures(pictures[split], sizes, faults)
        for sample in samples:
            inspect(sample, sizes.get(sample.image), faults)
        note_cut_texts(samples, tokenizer, faults)
        doubt = doubt_about_boxes(samples)
        if doubt:
            doubts.append(f"{split}: {doubt}")

    compare_splits(pictures, faults)
    for doubt in doubts:
        print(doubt)
    for fault, cases in faults.items():
        print(f"{len(cases):,} {fault}, such as {cases[0]}")


def paper_column(expected, counted):
    """Return the last column of the report: the papers' count, and whether ours differs."""
    if expected is None:
        return f"{'-':>12}"
    if expected != counted:
        return f"{expected:12,}  differs"
    return f"{expected:12,}"


def add_case(faults, fault, case):
    faults.setdefault(fault, []).append(case)


def open_pictures(images, sizes, faults):
    """Open each picture that is not in `sizes` yet, and note its size there or the fault."""
    for image in tqdm(sorted(images - set(sizes)), "opening each picture", leave=False, disable=None):
        try:
            sizes[image] = load_picture(image).size
        except InputError as error:
            add_case(faults, "pictures that are missing or broken", error)


def inspect(sample, picture_size, faults):
    """Note the faults of one sample. picture_size: None if the picture could not be opened."""
    x1, y1, x2, y2 = sample.box
    where = f"{sample.image}, {sample.text!r}, {[x1, y1, x2, y2]}"
    width, height = picture_size or (math.inf, math.inf)

    if is_outside(sample.box, (width, height)):
        add_case(faults, "boxes wholly outside of the picture", where)
    # Published boxes reach out of their pictures by less than a pixel now and then.
    elif min(x1, y1) < -1 or x2 > width + 1 or y2 > height + 1:
        add_case(faults, "boxes that reach out of the picture", where)
    if x2 <= x1 or y2 <= y1:
        add_case(faults, "boxes without area", where)


def note_cut_texts(samples, tokenizer, faults):
    """Note the expressions of which the model does not see the end."""
    fault = f"expressions that are cut at {tokenizer.max_tokens} tokens"
    if isinstance(tokenizer, WordCounter):
        fault += " if each word is one token (--text-weights counts by a tokenizer)"
    for sample in cut_samples(samples, tokenizer):
        add_case(faults, fault, repr(sample.text))


def compare_splits(pictures, faults):
    """Note the pictures that two splits share. pictures: {split: set of pictures}"""
    for first, second in itertools.combinations(pictures, 2):
        if first == "val":   # the val of joined datasets repeats the val of each dataset
            continue
        for picture in sorted(pictures[first] & pictures[second]):
            add_case(faults, f"pictures both in {first} and in {second}", picture)


def sheet_path(folder, split):
    return folder / f"{split.replace('/', '-')}.png"


def make_drawing_folder(folder, splits):
    """Make the folder of --save. Raise InputError if one of the sheets is there already."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in splits:
        path = sheet_path(folder, split)
        if path.exists():
            raise InputError(f"--draw would write {path}, which is there already; choose another "
                             f"folder by --save")


def draw_splits(samples, count, folder):
    """Draw `count` samples of each split, and write one file per split. A picture that is missing
    or broken is named and left out. samples: {split: list of Sample}"""
    for split, all_samples in samples.items():
        path = sheet_path(folder, split)
        tiles = []
        for sample in spread(all_samples, count):
            try:
                picture = load_picture(sample.image)
            except InputError as error:
                print(f"not drawn: {error}")
                continue
            text = caption_of(sample.text, len(tiles) + 1, path)
            tiles.append(draw(picture, text, [(sample.box, TRUE)]))
        if tiles:
            write_picture(path, contact_sheet(tiles, ["true"]))
            print(path)


def write_jsonl(samples, path, absolute):
    """Write all splits as JSONL, with picture paths that are absolute or relative to the file's
    folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for split, split_samples in samples.items():
        for sample in split_samples:
            image = os.path.abspath(sample.image)
            if not absolute:
                image = relative_path(image, path.parent)
            line = {"image": image, "text": sample.text, "box": sample.box, "split": split}
            lines.append(json.dumps(line) + "\n")

    write_text(path, "".join(lines))


def relative_path(image, folder):
    """Return the path of a picture from a folder, so that both can be moved together."""
    relative = os.path.relpath(image, folder)
    if relative.startswith(os.pardir):
        # The way up from a folder that is a link begins at the place that the link names.
        return os.path.relpath(os.path.realpath(image), os.path.realpath(folder))
    return relative


def build_parser():
    """Return the parser. Its help ends with the formats, addresses and leaks of the docstring."""
    start = __doc__.index("Formats of annotations")
    end = __doc__.index("Where this file differs")
    parser = argparse.ArgumentParser(
        description="Print what a dataset holds and which faults it has. Options also draw,\n"
                    "convert and download it.",
        epilog=__doc__[start:end].rstrip(),
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, width=80))

    add = parser.add_argument
    add("dataset",
        help=f"shapes, {', '.join(DATASETS)}, a FILE.jsonl, or several joined by commas")
    add("--root",
        help="folder of annotations and pictures (default: data; for a .jsonl file: its folder)")
    add("--draw", type=int, default=0, metavar="N",
        help="draw N samples of each split (default: 0)")
    add("--save", type=Path, default=".", metavar="DIR",
        help="write the drawings into this folder, as SPLIT.png; none that is there is overwritten "
             "(default: the current one)")
    add("--write", type=Path, metavar="FILE.jsonl",
        help="write all splits to this file, with picture paths that are relative to its folder: "
             "move the file and the pictures together, or take --absolute (default: write "
             "nothing)")
    add("--absolute", action="store_true",
        help="with --write: absolute picture paths, so that the file alone may be moved (default: "
             "relative ones)")
    add("--download", action="store_true",
        help="fetch what is missing, from the addresses below as users reported them (default: "
             "fetch nothing)")
    add("--mirror", metavar="ADDRESS",
        help="fetch what is missing from this folder instead (default: the addresses below)")
    add("--max-tokens", type=int, default=20, metavar="N",
        help="count expressions of more than N tokens (default: 20)")
    add("--text-weights", metavar="NAME",
        help="count tokens by the tokenizer of this text encoder, a hub name or a folder (default: "
             "bert-base-uncased if its files are on this machine; if not, words are counted)")
    return parser


def main(argv=None):
    asked = build_parser().parse_args(argv)
    dataset, root = asked.dataset, asked.root

    if asked.absolute and not asked.write:
        raise InputError("--absolute goes with --write FILE.jsonl")
    if asked.write and asked.write.exists():
        raise InputError(f"--write {asked.write}: the file is there already; choose another name")
    if asked.write and dataset == "shapes":
        raise InputError(f"--write {asked.write}: shapes has no picture files to refer to; choose "
                         f"another dataset")

    if asked.download or asked.mirror:
        names = names_in(dataset)
        for name in names:   # refuse before the first byte is fetched
            check_downloadable(name, root)
        for name in names:
            download(name, root, asked.mirror)

    splits = split_names(dataset, root)
    if asked.draw > 0:
        make_drawing_folder(asked.save, splits)
    tokenizer = counting_tokenizer(dataset, asked.max_tokens, asked.text_weights)
    report(dataset, root, tokenizer)

    samples = {split: load_samples(dataset, split, root) for split in splits}
    if asked.draw > 0:
        draw_splits(samples, asked.draw, asked.save)
    if asked.write:
        write_jsonl(samples, asked.write, asked.absolute)


if __name__ == "__main__":
    run_command(main)
