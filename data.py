"""Datasets: from names and files to images, expressions and boxes, and from these to batches.

M²IST Section IV-A and HiVG Section 4.1 with Table 6 list the datasets that this file reads. This
file imports nothing of the project, so that it can be copied alone.

    "refcoco" --load_samples--> [Sample, ...] --GroundingDataset--> [Item, ...] --collate--> batch

Conventions

    box      in a Sample: (x1, y1, x2, y2) in pixels of the stored image
             in a batch:  (cx, cy, w, h) in [0, 1] of the padded square image
    padding  a mask of bools, in which True means padding
    B        number of samples in a batch
    P        number of images in a batch: B, or fewer where samples share an image
    S        side of the padded square, in pixels: 640 for M²IST, 224 for HiVG, 64 for `shapes`
    T        number of tokens of the longest text in a batch
    Nv       number of vision tokens of an image (HiVG: L_v)

    paper symbol               variable
    M²IST z_0, HiVG I          images   (P, 3, S, S), uint8; the model normalises them
    HiVG T (script letter)     tokens   (B, T)

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
    JSONL    This is the format for your own images: FILE.jsonl, with one JSON
             object per line. Boxes are x1, y1, x2, y2 in pixels of the stored
             image. Image paths are relative to the folder of the file:
             {"image": "1.jpg", "text": "the red cup", "box": [12, 40, 96, 170],
              "split": "train"}

The images of each dataset are looked for in these folders:

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
    images of COCO train2014, 13.5 GB
        http://images.cocodataset.org/zips/train2014.zip
    MDETR's JSON files
        https://zenodo.org/record/4729015/files/
        mdetr_annotations.tar.gz?download=1
    TransVG's .pth files and DETR weights, ReferItGame's images (saiapr_tc-12)
        The READMEs of TransVG and CLIP-VG link shared drives.
    Flickr30k's images
        Their authors give them out after a form has been filled in.

The server of REFER's authors is gone, so these are copies in the Web Archive.
--download fetches what is missing of the four RefCOCO datasets: the annotations
in REFER's format, and the images that the annotations name. It continues a
download that was interrupted, overwrites no file, and keeps the archives, which
you may delete after the last dataset. --mirror ADDRESS takes the same archives
from another address.

Leaks

All images of the RefCOCO datasets belong to COCO train2014. The public DETR
weights were trained on all of train2014, and so have seen the images of val and
test. TransVG publishes weights that have not seen them: detr-r50-unc.pth for
RefCOCO and RefCOCO+, and detr-r50-gref.pth for RefCOCOg. Pass one of these
files to train.py by --vision-weights. Training and evaluation print and record
`leaky_pretraining` for each run: true, false, or null if it is not known. There
is no public list of the images that CLIP was pretrained on, so it is null for
CLIP.

The training split of refcocog-google holds images that are in the test splits
of other RefCOCO datasets. If several datasets are joined by commas, an image
in val or test of one of them is left out of the joint training split.

Tags such as [D36] mark where a line differs from a paper or from its released code;
assets/deviations.md says how.
"""
import argparse
import functools
import gzip
import html
import itertools
import json
import math
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
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as transforms
from torchvision.utils import draw_bounding_boxes, make_grid
from tqdm import tqdm

ASSETS = Path(__file__).parent / "assets"


# --- Errors and files -----------------------------------------------------------------------------

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
    # Line by line, so that a file shows at once that a run is under way.
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:    # the reader of our output, say `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        # An error inside a worker of a DataLoader arrives as a whole traceback, whose last line has
        # the name of the error and its message.
        parts = re.split(r"\b(?:InputError|ModelError): ", f"{type(error).__name__}: {error}")
        if len(parts) == 1 and not isinstance(error, OSError):
            raise    # not ours: a bug, which needs its traceback
        print(f"error: {parts[-1].strip()}", file=sys.stderr)
        sys.exit(2)


def write_atomically(path, write):
    """Call write(temporary path), then rename: a crash never leaves a half-written file, and what
    was at `path` before stays there until the new file is whole. Raises InputError if the file
    cannot be written, for example because the disk is full."""
    path = Path(path)
    partial = Path(f"{path.resolve()}.{os.getpid()}.partial")
    try:
        if path.exists() and not path.is_file():
            write(path)   # a device such as /dev/stdout, which a rename would replace
            return
        partial.touch()
        mode = partial.stat().st_mode
        write(partial)
        partial.chmod(mode)   # safetensors makes a file that nobody else may read
        partial.replace(path.resolve())
    except Exception as error:   # torch and safetensors have errors of their own for a full disk
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise InputError(f"cannot write {path} ({reason}): is there room on the disk, and may you "
                         f"write into that folder? What was there before is still there") from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path, text):
    """Write a text file by write_atomically."""
    # A path may hold bytes that are no text, which Python keeps as lone surrogates. They become
    # escapes, which a reader of JSON turns back into the same path.
    content = text.encode("utf-8", errors="backslashreplace")
    write_atomically(path, lambda partial: partial.write_bytes(content))


def shortened(text):
    """Return a text as a message shows it: in quotes, and a hundred characters at most."""
    return repr(text) if len(text) <= 100 else f"{text[:100]!r}..."


# --- Samples --------------------------------------------------------------------------------------

class Sample(NamedTuple):
    """One expression about one object."""
    image: Path | int     # path of the image, or the scene's number in `shapes`
    text: str             # the expression
    box: tuple            # (x1, y1, x2, y2) of the object, in pixels of the stored image
    image_id: str | int   # the image's name within its dataset, or the scene's number


# --- shapes, the generated default. Its file was made by assets/make_shapes.py --------------------

SHAPES_FILE = ASSETS / "shapes.jsonl.gz"
COLOURS = {"red": (208, 52, 44), "green": (58, 156, 70), "blue": (48, 92, 200),
           "yellow": (232, 196, 50)}
WIDTH = 128   # of every scene, in pixels


@functools.cache
def read_shapes():
    """Read the file of `shapes` -> {split: list of Sample}, {number: (height, objects)}."""
    splits = {}
    scenes = {}
    with gzip.open(SHAPES_FILE, "rt") as file:
        for line in file:
            scene = json.loads(line)
            number = scene["scene"]
            scenes[number] = (scene["height"], scene["objects"])
            for text, target in scene["expressions"]:
                _, _, x, y, r = scene["objects"][target]
                box = (float(x - r), float(y - r), float(x + r), float(y + r))
                splits.setdefault(scene["split"], []).append(Sample(number, text, box, number))
    return splits, scenes


def draw_scene(number, height, objects):
    """Draw a scene as a PIL image, with small random changes to its colours that depend on its number
    alone. objects: [(colour, shape, x, y, r), ...], where r is half the side of the box."""
    rng = seeded("paint", number)
    grey = rng.randint(215, 245)
    background = tuple(grey + rng.randint(-8, 8) for _ in range(3))
    image = Image.new("RGB", (WIDTH, height), background)
    pen = ImageDraw.Draw(image)
    for name, shape, x, y, r in objects:
        colour = tuple(value + rng.randint(-14, 14) for value in COLOURS[name])
        box = (x - r, y - r, x + r, y + r)
        if shape == "circle":
            pen.ellipse(box, fill=colour)
        elif shape == "square":
            pen.rectangle(box, fill=colour)
        else:
            pen.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=colour)
    return image


def seeded(*key):
    """Return a random generator of its own for each key. What is drawn for a sample then depends on
    nothing that was drawn before."""
    return random.Random(" ".join(str(part) for part in key))


# --- Datasets by name -----------------------------------------------------------------------------

COCO_FOLDERS = ("images/train2014", "train2014", "other/images/mscoco/images/train2014",
                "other/images/train2014")


class DatasetInfo(NamedTuple):
    """Where a dataset's files lie, and how many expressions the papers count in it."""
    refer: str | None     # REFER's file
    transvg: str          # TransVG's folder, which begins the names of the files in it
    mdetr: str | None     # name in MDETR's files
    images: tuple         # folders in which the images may lie
    expressions: dict     # split: number of expressions


# The numbers of expressions are those of M²IST Section IV-A a and HiVG Table 6. For the google
# split of RefCOCOg the papers give only the sum.
DATASETS = {
    "refcoco": DatasetInfo(
        refer="refcoco/refs(unc).p", transvg="unc", mdetr="refcoco", images=COCO_FOLDERS,
        expressions={"train": 120_624, "val": 10_834, "testA": 5_657, "testB": 5_095}),
    "refcoco+": DatasetInfo(
        refer="refcoco+/refs(unc).p", transvg="unc+", mdetr="refcoco+", images=COCO_FOLDERS,
        # Table 6 prints 10,768 for val; its own sum supports 10,758.
        expressions={"train": 120_191, "val": 10_758, "testA": 5_726, "testB": 4_889}),
    "refcocog-umd": DatasetInfo(
        refer="refcocog/refs(umd).p", transvg="gref_umd", mdetr="refcocog", images=COCO_FOLDERS,
        expressions={"train": 80_512, "val": 4_896, "test": 9_602}),
    "refcocog-google": DatasetInfo(
        refer="refcocog/refs(google).p", transvg="gref", mdetr=None, images=COCO_FOLDERS,
        expressions={"train": 85_474, "val": 9_536}),
    "referit": DatasetInfo(
        refer=None, transvg="referit", mdetr=None, images=("referit/images",),
        expressions={"train": 54_127, "val": 5_842, "test": 60_103}),
    "flickr30k": DatasetInfo(
        refer=None, transvg="flickr", mdetr=None,
        images=("Flickr30k/flickr30k-images", "Flickr30k/flickr30k_images"),
        expressions={"train": 427_193, "val": 14_433, "test": 14_481}),
}

EXAMPLE_LINE = ('{"image": "a.jpg", "text": "the red cup", "box": [x1, y1, x2, y2], '
                '"split": "train"}')


def names_in(dataset):
    """Return the names that `dataset` joins by commas. The name of a file may hold a comma."""
    if Path(dataset).is_file():
        return [str(dataset)]
    return str(dataset).split(",")


def find_files(dataset, root):
    """Return the annotation files of a dataset, which share one format, and its image folder."""
    base = Path(root or "data")
    path = Path(dataset)
    is_own_file = path.suffix == ".jsonl" and path.is_file()
    if dataset not in DATASETS and not is_own_file:
        if path.suffix == ".jsonl":
            raise InputError(f"{dataset}: there is no such file, seen from the folder {Path.cwd()}; "
                             f"give its path from there")
        raise InputError(
            f"{dataset}: no such dataset (choose shapes, {', '.join(DATASETS)}, or several joined "
            f"by commas), and no such file, which would be FILE.jsonl with one JSON object per "
            f"line: {EXAMPLE_LINE}")
    if root and not base.is_dir():
        raise InputError(f"--root {root}: there is no such folder; it should hold the annotations "
                         f"and images of {dataset}")
    if is_own_file:
        return [path], base if root else path.parent

    info = DATASETS[dataset]
    patterns = [f"{info.transvg}/{info.transvg}_*.pth"]
    if info.refer:
        patterns.insert(0, info.refer)
    if info.mdetr:
        patterns.append(f"finetune_{info.mdetr}_*.json")
    for place in [base, *sorted(base.glob("*/"))]:
        for pattern in patterns:
            files = [file for file in sorted(place.glob(pattern)) if has_known_split(file, info)]
            if files:
                return files, find_images(info, base, place)
    raise InputError(
        f"--root {base}: the annotations of {dataset} are neither there nor in a folder directly "
        f"below; they would match {' or '.join(patterns)}, with the images in "
        f"{' or '.join(info.images)}. `python data.py --help` says where the files come from")


def has_known_split(file, info):
    """Return whether an annotation file belongs to a split of the dataset. TransVG has files of
    other splits, such as trainval, that would repeat samples. REFER has one file for all splits."""
    return file.suffix == ".p" or split_in_name(file) in info.expressions


def split_in_name(file):
    """Return "val" for unc_val.pth or finetune_refcoco_val.json."""
    return file.stem.rpartition("_")[2]


def find_images(info, base, place):
    """Return the folder that holds a dataset's images, or the one that should hold them.
    place: the folder that holds the annotations."""
    for folder in [base, place, *sorted(base.glob("*/"))]:
        for name in info.images:
            if (folder / name).is_dir():
                return folder / name
    return base / info.images[0]


# --- Readers, one for each format. A reader takes a file and yields annotations -------------------

class Annotation(NamedTuple):
    """What a reader yields for one expression, before it is checked."""
    where: str   # the place in the file, for error messages
    image: str   # name of the image
    text: str    # the expression
    box: list    # [x1, y1, x2, y2] in pixels of the stored image
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

    # A ref has a field file_name, but that is not the name of the image file.
    names = {image["id"]: image["file_name"] for image in instances["images"]}
    boxes = {instance["id"]: instance["bbox"] for instance in instances["annotations"]}
    for ref in refs:
        for sentence in ref["sentences"]:
            box = corners(boxes[ref["ann_id"]])
            yield Annotation(f"ref {ref['ref_id']}", names[ref["image_id"]], sentence["sent"], box,
                             ref["split"])


def read_transvg(path):
    """Read TransVG's DATASET_SPLIT.pth: a list of (image, size, box, text, ...), or of
    (image, box, text) for Flickr30k."""
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
        yield Annotation(f"image {image['id']}", image["file_name"], image["caption"],
                         corners(boxes[image["id"]]), split_in_name(path))


def read_jsonl(path):
    """Read FILE.jsonl: in each line one JSON object with the keys image, text, box and split."""
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")   # some editors write this mark first
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: the line is not JSON in UTF-8 "
                             f"({error})") from None
        keys = item if isinstance(item, dict) else {}
        missing = [key for key in ("image", "text", "box", "split") if key not in keys]
        if missing:
            raise InputError(f"{path}, line {number}: the line lacks {', '.join(missing)}")
        yield Annotation(f"line {number}", item["image"], item["text"], item["box"], item["split"])


READERS = {".p": read_refer, ".pth": read_transvg, ".json": read_mdetr, ".jsonl": read_jsonl}


def check(annotation, where, needs_area):
    """Raise InputError if an annotation is not what a Sample can be made of.
    needs_area: whether a box without area is an error, too. In a file of your own you can correct
    such a box. In a published dataset you cannot, and evaluation must still count it."""
    box = annotation.box
    if not isinstance(box, list) or len(box) != 4 or not all(is_coordinate(v) for v in box):
        raise InputError(f"{where}: box is {str(box)[:100]}, not four numbers [x1, y1, x2, y2]")
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


# --- Samples of a dataset, or of several ----------------------------------------------------------

def split_names(dataset, root=None):
    """Return the names of a dataset's splits, in the dataset's own order."""
    return list(samples_by_split(str(dataset), root and str(root)))


def load_samples(dataset, split, root=None, limit=None):
    """Return the list of Sample of one split.

    dataset: "shapes", a name in DATASETS, the path of a FILE.jsonl, or several joined by commas
    root: the folder with annotations and images; for a FILE.jsonl, the folder that its image paths
        start from (default: the folder of the file)
    limit: only the first N samples; None for all

    Raises InputError for an unknown dataset or split, a missing file or folder, and a bad line.
    """
    names = split_names(dataset, root)
    if split not in names and dataset in DATASETS:
        files, _ = find_files(dataset, root)
        if files[0].suffix != ".p":    # which holds all splits
            missing = files[0].with_stem(f"{files[0].stem.rpartition('_')[0]}_{split}")
            raise InputError(f"{missing} is missing; there are {', '.join(names)}")
    one_of(f"split of {dataset}{misspelt_splits(names)}", split, names)
    return samples_by_split(str(dataset), root and str(root))[split][:limit]


def misspelt_splits(names):
    """Return what to say of splits that are nearly called train or val; "" if there is none."""
    meant = {"train": "train", "training": "train", "val": "val", "validation": "val", "valid": "val"}
    odd = [name for name in names if meant.get(name.strip().lower(), name) != name]
    return "".join(f" (write {meant[name.strip().lower()]!r} for {name!r})" for name in odd)


@functools.lru_cache(maxsize=8)
def samples_by_split(dataset, root):
    """Return {split: list of Sample}. Strings as arguments make repeated calls cheap."""
    if dataset == "shapes":
        return read_shapes()[0]
    names = names_in(dataset)
    if len(names) > 1:
        return mixed(names, root)

    files, folder = find_files(dataset, root)
    splits = {}
    for file in files:
        for annotation in read_checked(file):
            box = tuple(float(v) for v in annotation.box)
            sample = Sample(folder / annotation.image, annotation.text, box, annotation.image)
            splits.setdefault(annotation.split, []).append(sample)
    if not splits:
        raise InputError(f"{dataset}: the file holds no line")
    return splits


def read_checked(file):
    """Yield the annotations of one file, each of them checked."""
    reader = READERS[file.suffix]
    try:
        for annotation in reader(file):
            check(annotation, f"{file}, {annotation.where}", needs_area=file.suffix == ".jsonl")
            yield annotation
    except InputError:
        raise
    except Exception as error:   # a damaged file may hold anything, and so may fail in any manner
        raise InputError(f"{file}: the file is not as {reader.__name__}() expects it "
                         f"({type(error).__name__}: {error})") from None


def mixed(datasets, root):
    """Join several datasets, as in HiVG's mixed training (Section 4.2). [D57] An image that is in val
    or test of any of them is in train of none: the datasets share COCO's images.

    The joint splits are train and val, and each dataset's own splits as DATASET/SPLIT.
    """
    if "shapes" in datasets:
        raise InputError("shapes is generated and cannot be joined with other datasets")
    joint = {"train": [], "val": []}
    held_out = set()   # the names of all images outside of the training splits
    for dataset in datasets:
        misspelt = misspelt_splits(split_names(dataset, root))
        if misspelt:
            raise InputError(f"{dataset}: its splits are to be called train and val{misspelt}")
        for split, samples in samples_by_split(dataset, root).items():
            if split == "val":
                joint["val"].extend(samples)
            if split != "train":
                joint[f"{dataset}/{split}"] = samples
                for sample in samples:
                    held_out.update(image_names(dataset, sample))

    total = 0
    for dataset in datasets:
        for sample in samples_by_split(dataset, root).get("train", []):
            total += 1
            if held_out.isdisjoint(image_names(dataset, sample)):
                joint["train"].append(sample)
    left_out = total - len(joint["train"])
    print(f"{','.join(datasets)}: {left_out:,} of {total:,} expressions left out of train, because "
          f"their images are in val or test of one of the datasets")
    return {split: samples for split, samples in joint.items() if samples}


def image_names(dataset, sample):
    """Return what identifies a sample's image in all datasets: its path and, in the published
    datasets, its file name, since COCO's images may be stored in several folders."""
    names = {os.path.abspath(sample.image)}
    if dataset in DATASETS:
        names.add(sample.image_id)
    return names


# The images of these two datasets do not come from COCO, so no DETR has seen them.
OUTSIDE_COCO = ("referit", "flickr30k")

# TransVG's DETR files, and the datasets whose val and test images each one has not seen. All other
# public DETR files have seen all of them.
UNSEEN = {"detr-r50-unc": ("refcoco", "refcoco+"),
          "detr-r50-gref": ("refcocog-umd", "refcocog-google")}


def leaky_pretraining(dataset, detr_file):
    """Return whether a pretrained DETR has seen the val and test images of a dataset, or of several
    joined by commas: True, False, or None if that is not known. detr_file: path, address or hub name
    of the weights; only the file name is looked at."""
    name = Path(detr_file).stem
    if not name.startswith("detr-r"):
        return None
    clean = OUTSIDE_COCO + UNSEEN.get(name, ())
    others = [part for part in names_in(dataset) if part not in clean]
    if any(part in DATASETS for part in others):
        return True
    return None if others else False   # a file of one's own may hold any images


# --- What is wrong with samples, reported before training ----------------------------------------

MAX_BAD_SHARE = 0.1   # of odd boxes; more say that the unit or the order of all of them is wrong


def load_for_training(dataset, root=None, limit=None):
    """Return the samples to train on, without those that can teach nothing, which are counted, and
    those to validate on (empty where the dataset has no val), of which nothing is left out."""
    train = load_samples(dataset, "train", root, limit)
    val = []
    if "val" in split_names(dataset, root):
        val = load_samples(dataset, "val", root, limit)
    else:
        print(f"{dataset} has no split 'val'{misspelt_splits(split_names(dataset, root))}: the last "
              f"epoch is kept as the best")

    check_images_exist([*train, *val])
    shared = {sample.image for sample in train} & {sample.image for sample in val}
    if shared:
        print(f"{len(shared)} images are both in train and in val: on new images the accuracy will be "
              f"lower than on val")
    for split, samples in (("train", train), ("val", val)):
        doubt = doubt_about_boxes(samples)
        if doubt:
            raise InputError(f"{dataset}, {split}: {doubt} Boxes of a .jsonl file are x1, y1, x2, y2 "
                             f"in pixels of the stored image; `python data.py {dataset} --draw 16` "
                             f"draws them")

    with_area = [s for s in train if s.box[0] < s.box[2] and s.box[1] < s.box[3]]
    if len(with_area) < len(train):
        print(f"{len(train) - len(with_area)} boxes of train have no area and are left out")
    outside = set(boxes_outside(with_area))
    warn_outside("train", outside, "left out")
    warn_outside("val", boxes_outside(val), "misses")

    # All images of val are decoded once: about 10 seconds for the 1,500 of RefCOCO's val.
    broken = open_images({sample.image for sample in val}, {})
    if broken:
        raise InputError(f"{broken[0]}. Of the images to validate on, {len(broken):,} cannot be "
                         f"decoded: fetch them again, or take their expressions out of val")
    kept = [sample for sample in with_area if sample not in outside]
    if not kept:
        raise InputError(f"{dataset}: there is nothing to train on, as no box of train has an area "
                         f"within its image")
    return kept, val


def warn_outside(split, samples, action):
    """Say how many boxes of a split lie outside of their images, and show one of them."""
    if samples:
        first = min(samples, key=str)
        print(f"{len(samples)} boxes of {split} lie outside of their images and are {action}; one is "
              f"{list(first.box)} of {shortened(first.text)} in {first.image}")


def doubt_about_boxes(samples):
    """Return what shows that boxes are not x1, y1, x2, y2 in pixels, or None if nothing does."""
    near_corner = sum(max(sample.box) <= 1 for sample in samples)
    inverted = sum(x2 < x1 or y2 < y1 for x1, y1, x2, y2 in (sample.box for sample in samples))
    if near_corner > MAX_BAD_SHARE * len(samples):
        return (f"{near_corner:,} of {len(samples):,} boxes lie within one pixel of the corner: "
                f"are they in pixels?")
    if inverted > MAX_BAD_SHARE * len(samples):
        return (f"x2 < x1 or y2 < y1 in {inverted:,} of {len(samples):,} boxes: "
                f"are they x, y, w, h?")
    return None


def boxes_outside(samples):
    """Return the samples whose box has no part in its image. Training can learn nothing from them.
    In evaluation each of them is a miss."""
    sizes = image_sizes(samples)
    return [sample for sample in samples if is_outside(sample.box, sizes[sample.image])]


def is_outside(box, size):
    """Return whether no part of a box lies in its image, of size (width, height)."""
    x1, y1, x2, y2 = box
    width, height = size
    return x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0


def check_images_exist(samples):
    """Raise InputError if the file of an image is missing."""
    paths = {sample.image for sample in samples if isinstance(sample.image, Path)}
    missing = sorted(path for path in paths if not os.path.isfile(path))
    if missing:
        hint = "write / in place of \\ in paths; " if "\\" in str(missing[0]) else ""
        raise InputError(f"{missing[0]}: no such image ({len(missing):,} are missing in all); {hint}"
                         f"image paths start from the folder of the .jsonl file or from --root; "
                         f"`python data.py DATASET --root DIR` reports what is there")


def open_images(images, sizes):
    """Decode each image that is not in `sizes` yet, and note its size there. Returns the InputErrors
    of those that are missing or broken."""
    broken = []
    for image in tqdm(sorted(images - set(sizes)), "opening each image", leave=False, disable=None):
        try:
            sizes[image] = load_image(image).size
        except InputError as error:
            broken.append(error)
    return broken


def cut_samples(samples, length, max_tokens):
    """Return the samples whose texts lose words, because they have more than max_tokens tokens.
    length: a function that counts the tokens of a text, such as Tokenizer.length."""
    texts = {sample.text for sample in samples}   # 120,000 texts take about 5 seconds
    cut = {text for text in texts if length(text) > max_tokens}
    return [sample for sample in samples if sample.text in cut]


# --- From a Sample to a batch: the image ----------------------------------------------------------

# What PIL may raise for a file that is not an image, or not a whole one.
IMAGE_ERRORS = (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError)


def load_image(image, upright=False, at_least=None):
    """Return an RGB image, with transparent parts in white.

    image: path of a file, number of a scene of `shapes`, or a PIL image
    upright: whether to turn the image as its EXIF data say; for images from a camera, but not for
        datasets, whose boxes refer to the stored pixels
    at_least: the longer side, in pixels, that the caller needs. A JPEG is decoded at the smallest of
        1/2, 1/4 and 1/8 of its size that still has it, which takes less time; None: at full size
    """
    if isinstance(image, int):
        return draw_scene(image, *read_shapes()[1][image])
    try:
        opened = image if isinstance(image, Image.Image) else Image.open(image)
        if at_least is not None:
            # Pillow takes the smallest of these sizes that has as many pixels. For files other than
            # JPEG this does nothing. The mode None keeps that of the file.
            longer = max(opened.size)
            opened.draft(None, [max(1, side * at_least // longer) for side in opened.size])
        if upright:
            opened = ImageOps.exif_transpose(opened)
        return to_rgb(opened)
    except FileNotFoundError:
        raise InputError(f"{image}: no such file") from None
    except IMAGE_ERRORS as error:
        raise InputError(f"{image}: the file cannot be decoded as an image ({error})") from None


def to_rgb(image):
    """Turn a PIL image of any mode into RGB."""
    if image.mode.startswith("I"):
        # 16 bits per pixel are scaled to 8. PIL would cut them off at 255.
        image = Image.fromarray(np.uint8(np.asarray(image).clip(0, 65535) // 256))
    if image.mode == "F" and image.getextrema()[1] <= 1:
        # Floats from 0 to 1 are scaled to 255. PIL would make all of them black.
        image = Image.fromarray(np.uint8((np.asarray(image).clip(0, 1) * 255).round()))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def image_size(image):
    """Return (width, height) of an image from the header of its file, without decoding it.
    image: path of a file, number of a scene of `shapes`, or a PIL image"""
    if isinstance(image, int):
        return WIDTH, read_shapes()[1][image][0]
    if isinstance(image, Image.Image):
        return image.size
    try:
        with Image.open(image) as opened:
            return opened.size
    except FileNotFoundError:
        raise InputError(f"{image}: no such file") from None
    except IMAGE_ERRORS as error:
        raise InputError(f"{image}: the file cannot be decoded as an image ({error})") from None


def image_sizes(samples):
    """Return {image: (width, height)} of all images of a list of Sample."""
    images = sorted({sample.image for sample in samples})
    progress = tqdm(images, "reading each image's size", leave=False, disable=None)
    return {image: image_size(image) for image in progress}


# Words that a crop or a horizontal flip may make false.
#
# [D36] In a horizontal flip left and right change places wherever they begin a word ("lefty",
# "rightmost", "left_side") or end one that is glued to another ("onright", "topleft"). Elsewhere they
# name no side: "bright", "cleft". "Right" is exchanged in "right behind him" and in "all right", too,
# as TransVG does, since one cannot tell from the letters whether a side is meant. But "leftover"
# never means one.
NO_SIDES = ("[a-z]*bright|[a-z]*wright|upright|outright|downright|forthright|copyright|alright"
            "|birthright|fright|cleft|theft")
SIDE_WORD = re.compile(rf"(?<![a-z])(left(?!over)|right)|"
                       rf"(?<![a-z])(?!(?:{NO_SIDES})(?![a-z]))([a-z]+)(left|right)(?![a-z])",
                       re.IGNORECASE)


def misspelt_sides():
    """Return all words that are one letter, or one exchange of letters, away from left or right, but
    for those that mean something else. ("lefty" begins with a side, and is none of them.)"""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = set()
    for side in ("left", "right"):
        for i in range(len(side) + 1):
            before, after = side[:i], side[i:]
            words.add(before + after[1:])                     # a letter is missing
            words.add(before + after[1:2] + after[:1] + after[2:])
            for letter in letters:
                words.add(before + letter + after)            # one too many
                words.add(before + letter + after[1:])        # another one
    meaningful = {"light", "night", "sight", "tight", "eight", "fight", "might", "bright", "wright",
                  "fright", "lift", "loft", "let", "lent", "lest", "weft", "deft", "heft", "cleft"}
    return {word for word in words if not word.startswith(("left", "right"))} - meaningful


MISSPELT_SIDES = misspelt_sides()


def whole_words(words):
    """Return a pattern that finds words with no letter before and behind them: "l" in "top_l"."""
    return f"(?<![a-z])({words})(?![a-z])"


# Other names of sides, which no exchange of left and right would make true again.
OTHER_SIDES = whole_words(
    "l|r|lf|lft|lt|rt|rht|rgt|rght|lhs|rhs"                  # abbreviations
    "|[tblu][lr]"                                            # such as "br" for "bottom right"
    "|rite"                                                  # for others see misspelt_sides
    "|(top|bottom|upper|lower|far|front|back|mid|middle|center|centre)(left|right)most"
    "|(north|south|mid)?(east|west)[a-z]*|[ns][ew]"          # "northwest", "eastern", "SE"
    r"|o\W*clock"                                            # "o'clock", "oclock"
    r"|starboard|port\W?side")

# Words that count, for example from left to right, and figures, which a flip reverses.
ORDER_WORDS = whole_words(
    "first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth"
    "|[a-z]+teenth|[a-z]+tieth|last|final|penultimate|numbers?|(counter|anti)?clockwise")

PLACE_WORD = re.compile(
    SIDE_WORD.pattern + "|" + OTHER_SIDES + "|"
    + whole_words("(top|bottom|upper|lower)(most)?|middle|cent(er|re)|corner|edge"),
    re.IGNORECASE)
UNFLIPPED_WORD = re.compile(r"\d|" + OTHER_SIDES + "|" + ORDER_WORDS, re.IGNORECASE)


def augment(image, boxes, texts, rng, flip):
    """Change a training image at random, with its boxes and texts, as TransVG does, which both
    papers take over. There is one box and one text; more where expressions share their image.

    boxes: list of (x1, y1, x2, y2) in pixels of the image
    flip: whether horizontal flips are allowed; HiVG Appendix B uses none

    Returns the changed image, boxes and texts.
    """
    # Boxes that know the size of their image: the library changes both in the same way.
    width, height = image.size
    boxes = tv_tensors.BoundingBoxes(torch.tensor(boxes, dtype=torch.float64), format="XYXY",
                                     canvas_size=(height, width))

    # [D36] A crop would make words about places false, and must keep the centre of each box.
    if rng.random() < 0.5 and not (found_in(PLACE_WORD, texts) or misspells_side(texts)):
        top_left_height_width = random_crop(image, boxes, rng)
        image = transforms.crop(image, *top_left_height_width)
        boxes = transforms.crop(boxes, *top_left_height_width)

    # [D51] Colours change before the one resampling of `letterbox`; TransVG resamples twice.
    if rng.random() < 0.8:
        adjust = (transforms.adjust_brightness, transforms.adjust_contrast,
                  transforms.adjust_saturation)
        for change in rng.sample(adjust, 3):   # in a random order
            image = change(image, rng.uniform(0.6, 1.4))

    # [D36] A horizontal flip exchanges left and right, but other words would become false.
    if flip and rng.random() < 0.5 and not any(stays_unflipped(text) for text in texts):
        image = transforms.horizontal_flip(image)
        boxes = transforms.horizontal_flip(boxes)
        texts = [SIDE_WORD.sub(opposite_side, text) for text in texts]
    return image, boxes.tolist(), texts


def found_in(pattern, texts):
    """Return whether a pattern is found in any of the texts."""
    return any(pattern.search(text) for text in texts)


def stays_unflipped(text):
    """Return whether a horizontal flip would make a text false even if left and right change places."""
    return misspells_side([text]) or UNFLIPPED_WORD.search(text) is not None


def misspells_side(texts):
    """Return whether any of the texts has a word of MISSPELT_SIDES."""
    words = re.findall("[a-z]+", " ".join(texts).lower())
    return not MISSPELT_SIDES.isdisjoint(words)


def opposite_side(match):
    """Return what replaces a match of SIDE_WORD in a horizontal flip."""
    glued = match[2] or ""
    return glued + ("right" if match[0].lower().endswith("left") else "left")


def random_crop(image, boxes, rng):
    """Return top, left, height and width of a random part of the image that keeps the centre of each
    box; those of the whole image, if 20 tries lead to none.

    TransVG scales the image before it crops, so that its short side has 400, 500 or 600 pixels. Here
    the crop has the same share of the image, which keeps its own pixels until it is scaled to a
    square of any size.
    """
    scale = min(image.size) / rng.choice((400, 500, 600))   # pixels for one pixel of TransVG
    centres = ((boxes[:, :2] + boxes[:, 2:]) / 2).tolist()
    for _ in range(20):
        w = crop_side(image.width, scale, rng)
        h = crop_side(image.height, scale, rng)
        x = rng.randint(0, image.width - w)
        y = rng.randint(0, image.height - h)
        # [D36] The centres must lie inside the crop on all four sides. The released code compares
        # x with the top and y with the left, so that objects get lost.
        if all(x < centre_x < x + w and y < centre_y < y + h for centre_x, centre_y in centres):
            return y, x, h, w
    return 0, 0, image.height, image.width


def crop_side(side, scale, rng):
    """Return the random width or height of a crop. side: the whole image's, in pixels

    As in TransVG, no draw exceeds the scaled image, whose sides have at least 400 pixels. To draw
    up to 600 and cut off afterwards would leave the whole height to half of the crops.
    """
    longest = min(round(side / scale), 600)
    return min(side, round(scale * rng.randint(384, longest)))


# --- From a Sample to a batch: the padded square --------------------------------------------------

class Placement(NamedTuple):
    """Where a scaled image lies in its square, in pixels of the square."""
    width: int
    height: int
    left: int
    top: int
    scale: float   # pixels of the square for one pixel of the image


def placement(image_size, size, rng=None, fill=1.0):
    """Return the Placement of an image of (width, height) pixels in a square of side `size`.

    The longer side is scaled to `fill` times the side of the square. The image is centred or,
    if there is an `rng` (in training), put at a random place.
    """
    width, height = image_size
    scale = fill * size / max(width, height)
    w = max(1, round(width * scale))
    h = max(1, round(height * scale))
    if rng is None:
        return Placement(w, h, (size - w) // 2, (size - h) // 2, scale)
    left = rng.randint(0, size - w)
    top = rng.randint(0, size - h)
    return Placement(w, h, left, top, scale)


def letterbox(image, size, rng=None, fill=1.0):
    """Scale an image, keeping its proportions, and pad it to a square (HiVG Appendix B: "long edge
    alignment and short edge pad filling").

    image: a PIL image, or the number of a scene of `shapes`. Returns
        square     (3, S, S) uint8, 0 where there is no image
        padding    (S, S)    True where there is no image
        place      Placement of the image in the square
    """
    place = placement(image_size(image), size, rng, fill)
    if isinstance(image, int) and size <= WIDTH:
        content = small_scene(image, place.width, place.height)
    else:
        content = resize(load_image(image), place.width, place.height)
    rows = slice(place.top, place.top + place.height)
    columns = slice(place.left, place.left + place.width)
    square = torch.zeros(3, size, size, dtype=torch.uint8)
    square[:, rows, columns] = content
    padding = torch.ones(size, size, dtype=torch.bool)
    padding[rows, columns] = False
    return square, padding, place


def resize(image, width, height):
    """Return a PIL image in another size, as a tensor (3, height, width) of values from 0 to 255."""
    scaled = image.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(scaled)).permute(2, 0, 1)


# A scene is drawn in the first epoch alone. One that is 64 pixels wide has 12 kB at most.
@functools.lru_cache(maxsize=10_000)
def small_scene(number, width, height):
    return resize(load_image(number), width, height)


def to_square(box, place, size):
    """Turn (x1, y1, x2, y2) in pixels of the image into [cx, cy, w, h] in [0, 1] of the square.
    place: from `letterbox`."""
    # [D56] As released, a box is scaled by the ratio itself, not by the rounded size of the image,
    # and what reaches beyond the image is not cut off.
    x1, y1, x2, y2 = [v * place.scale / size for v in box]
    left = place.left / size
    top = place.top / size
    return [left + (x1 + x2) / 2, top + (y1 + y2) / 2, x2 - x1, y2 - y1]


def from_square(box, image_size, size):
    """Turn (cx, cy, w, h) in [0, 1] of the square into (x1, y1, x2, y2) in pixels of the image, the
    inverse of to_square for an image that is centred in its square. The result is clamped to the
    image."""
    width, height = image_size
    place = placement(image_size, size)
    cx, cy, w, h = [float(v) * size for v in box]   # in pixels of the square
    x1 = (cx - w / 2 - place.left) / place.scale
    y1 = (cy - h / 2 - place.top) / place.scale
    x2 = (cx + w / 2 - place.left) / place.scale
    y2 = (cy + h / 2 - place.top) / place.scale
    return clamp(x1, 0, width), clamp(y1, 0, height), clamp(x2, 0, width), clamp(y2, 0, height)


def clamp(value, low, high):
    return min(max(value, low), high)


# --- From a Sample to a batch: the text -----------------------------------------------------------

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
    # Control characters but tab and newlines, and the marks that begin some files, vanish.
    for code in [*range(9), 0x0B, *range(0x0E, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF]:
        table[code] = None
    return table


MENDED = mending_table()


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
            # By the library `tokenizers` itself, as importing transformers takes seconds.
            wordpiece = tokenizers.Tokenizer.from_file(str(ASSETS / "tiny-tokenizer.json"))
            self.encode_plain = lambda text: wordpiece.encode(text).ids
            self.pad = wordpiece.token_to_id("[PAD]")
            self.mask = wordpiece.token_to_id("[MASK]")
        else:
            from transformers import CLIPTokenizer
            theirs = pretrained_tokenizer(name, vocabulary, flag)
            # A text that spells "[SEP]" or "<|endoftext|>" is split like any other. verbose=False:
            # otherwise a long text gives a warning.
            self.encode_plain = lambda text: theirs(text, split_special_tokens=True,
                                                    verbose=False)["input_ids"]
            self.mends = isinstance(theirs, CLIPTokenizer)
            self.pad = theirs.pad_token_id
            self.mask = theirs.mask_token_id

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
        if self.mends:
            # [D46] CLIP's pretraining mended each text, twice for HTML: a web page may hold
            # "&amp;amp;". BERT's did not.
            text = html.unescape(html.unescape(text)).translate(MENDED)
        return self.encode_plain(text)


def pretrained_tokenizer(name, vocabulary, flag):
    """Return transformers' tokenizer by a hub name or folder."""
    from transformers import AutoTokenizer   # importing transformers takes seconds
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        # Where its files are missing, transformers makes an empty tokenizer without a warning.
        if vocabulary and len(tokenizer) != vocabulary:
            raise ValueError(
                f"it has {len(tokenizer)} tokens, but the text encoder has {vocabulary}; is "
                f"tokenizer.json missing there, or vocab.txt, or vocab.json with merges.txt?")
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"no tokenizer in {name} fits ({reason}): give a hub name or folder by "
                         f"{flag}, or take --weights random or --size tiny") from None
    return tokenizer


# --- From a Sample to a batch: what the DataLoader uses -------------------------------------------

# [D32] TransVG scales the long side to one of 640, 608, ... 448 of 640 pixels. HiVG's released code
# goes down to 32 of 224, where nothing is seen.
SCALES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


class Item(NamedTuple):
    """One sample as GroundingDataset gives it."""
    image: torch.Tensor     # (3, S, S) uint8
    padding: torch.Tensor   # (S, S)    True where there is no image
    tokens: list            # token ids of the text
    box: list               # [cx, cy, w, h] in [0, 1] of the square
    index: int              # of the sample in the dataset


class GroundingDataset(torch.utils.data.Dataset):
    """Samples as tensors. An image is decoded when its sample is asked for.

    size: side of the padded square, in pixels
    train: whether an image is put at a random place of its square, instead of the centre
    seed: all random choices depend on the seed, on `epoch` and on the index of the sample alone, so
        that they are the same with any number of workers and after a resume
    augmented: whether, in training, `augment` and a random scale are applied, too
    flip: whether `augment` may use horizontal flips
    shared: whether neighbours in a batch that have the same image share it, in training with one
        choice of transforms; in evaluation, where nothing is random, they always do
    draft: whether a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that is large enough; its
        pixels are then slightly different ones
    """

    def __init__(self, samples, size, tokenizer, train=False, seed=0, augmented=False, flip=False,
                 shared=False, draft=False):
        self.samples = samples
        self.size = size
        self.tokenizer = tokenizer
        self.train = train
        self.seed = seed
        # Workers live from epoch to epoch with a copy of this object. They see the number of the
        # epoch because its memory is shared.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.augmented = augmented
        self.flip = flip
        self.shared = shared or not train
        self.draft = draft
        check_images_exist(samples)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        """Return the list of Item of a batch; the DataLoader calls this. Neighbours that share an
        image hold the same tensor, by which collate knows them."""
        items = []
        if not self.shared:
            for index in indices:
                items += self.load([index])
            return items
        for _, neighbours in itertools.groupby(indices, lambda index: self.samples[index].image):
            items += self.load(list(neighbours))
        return items

    def load(self, indices):
        """Return the list of Item of samples that share one image."""
        image = self.samples[indices[0]].image
        boxes = [self.samples[index].box for index in indices]
        texts = [self.samples[index].text for index in indices]
        rng = None
        if self.train:
            rng = seeded(self.seed, self.epoch.item(), indices[0])

        fill = 1.0
        augmented = self.train and self.augmented
        if self.draft:
            # A crop may keep only half of a side, and should not be enlarged.
            image, boxes = load_draft(image, boxes, 2 * self.size if augmented else self.size)
        elif augmented or not isinstance(image, int):    # letterbox keeps the scenes of `shapes`
            image = load_image(image)
        if augmented:
            image, boxes, texts = augment(image, boxes, texts, rng, self.flip)
            fill = rng.choice(SCALES)
        square, padding, place = letterbox(image, self.size, rng, fill)

        items = []
        for index, box, text in zip(indices, boxes, texts):
            target = to_square(box, place, self.size)
            items.append(Item(square, padding, self.tokenizer(text), target, index))
        return items


def load_draft(image, boxes, side):
    """Load an image smaller than it is stored, where its longer side still has `side` pixels
    -> image, boxes in its pixels. boxes: [(x1, y1, x2, y2), ...] in stored pixels"""
    drafted = load_image(image, at_least=side)
    width, height = image_size(image)
    x = drafted.width / width
    y = drafted.height / height
    return drafted, [(x * x1, y * y1, x * x2, y * y2) for x1, y1, x2, y2 in boxes]


def by_image(samples):
    """Return the indices of a list of Sample as [[index, ...], ...], a list for each image."""
    indices = {}
    for index, sample in enumerate(samples):
        indices.setdefault(sample.image, []).append(index)
    return list(indices.values())


class TrainingBatches:
    """The batches of an epoch, each a list of indices: a batch_sampler for torch's DataLoader. The
    order depends on seed and `epoch` alone; samples that do not fill a last batch are left out.

    together: K, how many samples of an image follow each other; an image may have fewer
    rank, processes: give this process its part of each batch, where several train together

    Set `epoch` before each pass, and `first` to begin at a later batch than the first, 0.
    """

    def __init__(self, samples, batch_size, seed, together=1, rank=0, processes=1):
        self.images = by_image(samples)
        self.batch_size = min(batch_size, len(samples))
        self.batches = len(samples) // self.batch_size
        self.seed = seed
        self.together = together
        self.part = self.batch_size // processes
        if self.part == 0:
            raise InputError(f"{len(samples)} samples cannot be shared by {processes} processes")
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
        for indices in self.images:
            shuffled = rng.sample(indices, len(indices))
            for start in range(0, len(shuffled), self.together):
                groups.append(shuffled[start:start + self.together])
        rng.shuffle(groups)
        return list(itertools.chain(*groups))


def evaluation_batches(samples, batch_size, rank=0, processes=1):
    """Return batches of indices that hold each sample once, [[index, ...], ...]. The samples of an
    image follow each other, so that it is loaded and encoded once for all of them.
    rank, processes: give this process its share of the batches, where several evaluate together"""
    order = list(itertools.chain(*by_image(samples)))
    batches = [order[start:start + batch_size] for start in range(0, len(order), batch_size)]
    return batches[rank::processes]


def collate(items, pad, length=0):
    """Join a list of Item into a batch. pad: the tokenizer's id of padding. length: pad texts to so
    many tokens at least; else to the longest of the batch.

    Returns a dict of, for P images of B samples,
        images         (P, 3, S, S)   image_padding   (P, S, S)
        tokens         (B, T)         token_padding   (B, T)
        boxes          (B, 4)         index           (B,)
        image_index    (B,)           the row of each sample's image in images; it rises by 0 or 1
    """
    first_items = []   # the first Item of each image
    rows = []
    for item in items:
        if not first_items or item.image is not first_items[-1].image:
            first_items.append(item)
        rows.append(len(first_items) - 1)
    texts = [torch.tensor(item.tokens) for item in items]
    tokens = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=pad)   # (B, T)
    tokens = torch.nn.functional.pad(tokens, (0, max(0, length - tokens.shape[1])), value=pad)
    lengths = torch.tensor([len(text) for text in texts])                                  # (B,)
    positions = torch.arange(tokens.shape[1])                                              # (T,)
    return {
        "images": torch.stack([item.image for item in first_items]),
        "image_padding": torch.stack([item.padding for item in first_items]),
        "tokens": tokens,
        "token_padding": positions >= lengths[:, None],
        "boxes": torch.tensor([item.box for item in items], dtype=torch.float32),
        "index": torch.tensor([item.index for item in items]),
        "image_index": torch.tensor(rows),
    }


# --- Drawings -------------------------------------------------------------------------------------

TRUE = (0, 130, 40)         # colour of a true box
PREDICTED = (220, 0, 90)    # colour of a predicted box
HEAT = (255, 140, 0)        # colour of attention
LEGEND = {"true": TRUE, "predicted": PREDICTED, "attention": HEAT}


def spread(samples, count=12):
    """Return `count` samples from all over a list, or all if there are fewer."""
    step = max(1, len(samples) // count)
    return samples[::step][:count]


def draw(image, caption, boxes, attention=None, side=256):
    """Return a tile (3, H, W) uint8: the image with boxes in it, and the caption below.

    image: PIL. boxes: list of ((x1, y1, x2, y2) in pixels of the image, colour)
    attention: (Nv,) over the vision tokens of the padded square, drawn as a heat map
    side: of the square, in pixels
    """
    view, padding, place = letterbox(image, side)
    view = view.masked_fill(padding, 255)
    if attention is not None:
        view = add_heat_map(view, attention).masked_fill(padding, 255)
    for (x1, y1, x2, y2), colour in boxes:
        cx, cy, w, h = to_square((x1, y1, x2, y2), place, side)
        corners = torch.tensor([[cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]]) * side
        corners[:, 2:] = corners[:, 2:].maximum(corners[:, :2])   # a box with x2 < x1 becomes a line
        view = draw_bounding_boxes(view, corners, colors=colour, width=2)
    return torch.cat([view, text_strip(caption, side)], dim=1)


def add_heat_map(view, attention):
    """Colour a square view (3, S, S) uint8 where the attention is high.

    The strength is 0 where attention is 1 / Nv, as if it were uniform, or less, and 1 where it is 1.
    Between them it grows with the logarithm, as attention of a tenth is much in 400 tokens. Even at
    strength 1 the colours below can be recognised.
    """
    count = len(attention)                                                # Nv
    cells = attention.float().cpu().unflatten(0, (math.isqrt(count), -1))
    strength = (cells * count).clamp(1, count).log() / math.log(count)
    opacity = 0.5 * transforms.resize(strength[None], list(view.shape[1:]))   # (1, S, S)
    heat = torch.tensor(HEAT)[:, None, None]
    return (view * (1 - opacity) + heat * opacity).to(torch.uint8)


def text_strip(text, width, colours=None):
    """Return an image (3, 54, width) uint8 with up to three lines of text. colours: draw the words
    side by side instead, {word: colour}."""
    font = ImageFont.load_default(13)
    strip = Image.new("RGB", (width, 54 if colours is None else 26), "white")
    pen = ImageDraw.Draw(strip)
    if colours is None:
        lines = []
        for part in text.split("\n"):
            lines += textwrap.wrap(part, (width - 8) // 7, max_lines=2, placeholder=" ...")
        pen.text((4, 2), "\n".join(lines), "black", font)
    else:
        x = 8
        for word, colour in colours.items():
            pen.text((x, 5), word, colour, font)
            x += 24 + round(font.getlength(word))
    return torch.from_numpy(np.array(strip)).permute(2, 0, 1)


def drawable(text, number, path):
    """Return what can be drawn for a text. The font that Pillow brings has the letters of English
    and few others. A text in other letters is printed, under its number.

    number: of the text on its sheet. path: the sheet's file.
    """
    font = ImageFont.load_default(13)
    missing = bytes(font.getmask("\U0010fffd"))   # no font has this character
    if any(bytes(font.getmask(c)) == missing for c in set("".join(text.split()))):
        print(f"text {number} of {path}: {text}")
        return f"(text {number}: see the terminal)"
    return text


def write_sheet(path, tiles, legend, columns=4):
    """Write tiles of equal size side by side into an image file, below a legend.
    legend: names in LEGEND of the colours that the tiles have"""
    sheet = make_grid(torch.stack(tiles), nrow=columns, padding=8, pad_value=255)
    strip = text_strip("", sheet.shape[2], {name: LEGEND[name] for name in legend})
    sheet = torch.cat([strip, sheet], dim=1).permute(1, 2, 0)
    image = Image.fromarray(sheet.contiguous().numpy())
    kind = Image.registered_extensions()[Path(path).suffix.lower()]
    write_atomically(path, functools.partial(image.save, format=kind))


# --- Download -------------------------------------------------------------------------------------

WEB_ARCHIVE = ("https://web.archive.org/web/{}/"
               "https://bvisionweb1.cs.unc.edu/licheng/referit/data")

# archive: address of its folder, as users reported it. The docstring above lists these addresses.
ADDRESSES = {
    "refcoco.zip": WEB_ARCHIVE.format(20220413011718),
    "refcoco+.zip": WEB_ARCHIVE.format(20220413011656),
    "refcocog.zip": WEB_ARCHIVE.format(20220413012904),
    "train2014.zip": "http://images.cocodataset.org/zips",
}

# dataset that cannot be fetched: who has its images
HOLDERS = {"referit": "the shared drives that the READMEs of TransVG and CLIP-VG link",
           "flickr30k": "its authors, who ask for a form"}


def check_downloadable(dataset, root):
    """Raise InputError if a dataset cannot be fetched, and say where its files are."""
    one_of("dataset to --download", dataset, DATASETS)
    if dataset in HOLDERS:
        info = DATASETS[dataset]
        base = Path(root or "data")
        raise InputError(
            f"{dataset} cannot be fetched: get its images from {HOLDERS[dataset]}, and put them "
            f"into {base / info.images[0]}; get {info.transvg}_*.pth from the drive that TransVG "
            f"shares, and put them into {base / info.transvg}")


def download(dataset, root, mirror):
    """Fetch what is missing of a dataset: REFER's annotations, unless there are annotations of any
    format, and those of COCO's images that the annotations name.
    mirror: address of a folder to fetch from; None means the ones in ADDRESSES."""
    base = Path(root or "data")
    base.mkdir(parents=True, exist_ok=True)
    refer = Path(DATASETS[dataset].refer)   # for example refcoco/refs(unc).p
    try:
        samples_by_split(dataset, root)
    except InputError:   # the annotations are missing or damaged
        wanted = {refer.name, "instances.json"}
        unpack(f"{refer.parent}.zip", base / refer.parent, wanted, base, mirror)

    images = set()
    for samples in samples_by_split(dataset, root).values():
        images.update(sample.image_id for sample in samples)
    _, folder = find_files(dataset, root)
    unpack("train2014.zip", folder, images, base, mirror)


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
        with zipfile.ZipFile(archive) as file:
            # Only the last part of a member's path is used, so that neither `..` nor links in an
            # archive lead out of the folder.
            members = {member.filename.rpartition("/")[2]: member for member in file.infolist()}
            found = sorted(missing & set(members))
            for wanted_file in tqdm(found, f"unpacking {name}", disable=None):
                content = file.read(members[wanted_file])   # this also compares the checksum
                write_atomically(folder / wanted_file, lambda path: path.write_bytes(content))
    except Exception as error:   # a server or an archive may fail in any manner
        raise InputError(
            f"{archive}, from {address}: {type(error).__name__}, {error}. The same command goes on "
            f"where this download broke off. If that does not help, delete the archive, or take it "
            f"from another address by --mirror") from None


def fetch(address, path):
    """Fetch an archive. If a part of it is there already, fetch the rest: 13.5 GB seldom come in one
    piece, and neither torch.hub nor torchvision goes on with a download."""
    present = path.stat().st_size if path.exists() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={present}-"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        if reply.status != 206:   # 206 is "partial content"; otherwise the server sends the whole
            present = 0
        # An answer may be an error page, or empty. What is there must then stay as it is.
        if present == 0 and reply.peek(2)[:2] != b"PK":
            raise ValueError(f"the answer is no zip archive, it begins with {reply.peek(40)[:40]}")
        size = present + int(reply.headers["Content-Length"] or 0)
        progress = tqdm.wrapattr(reply, "read", size, desc=path.name, initial=present)
        with progress as source, open(path, "ab" if present else "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    if path.stat().st_size < size:
        raise EOFError(f"only {path.stat().st_size:,} of {size:,} bytes came")


# --- The command line: look at a dataset before a model is trained on it --------------------------

def text_length(dataset, max_tokens, text_weights):
    """Return a function that counts the tokens of a text, and a note on how: by the tokenizer of
    --text-weights or, by default, by that of `shapes` or BERT. For BERT nothing is fetched: if its
    files are not on this machine, words are counted."""
    if dataset == "shapes" or text_weights == "tiny":
        return Tokenizer(max_tokens).length, ""
    if text_weights:
        return Tokenizer(max_tokens, text_weights).length, ""
    from huggingface_hub import try_to_load_from_cache   # transformers brings this library
    files = [try_to_load_from_cache("bert-base-uncased", name)
             for name in ("tokenizer.json", "config.json")]
    if all(isinstance(file, str) for file in files):
        return Tokenizer(max_tokens, str(Path(files[0]).parent)).length, ""
    # One token marks the beginning of a text, and one its end.
    return (lambda text: len(text.split()) + 2,
            " if each word is one token (--text-weights counts by a tokenizer; that of size tiny, "
            "--text-weights tiny, spells unknown words letter by letter)")


def report(dataset, root, max_tokens, text_weights):
    """Print the size of each split beside the papers' count. Then print each fault that harms
    training, with its number of cases and an example."""
    expected = DATASETS[dataset].expressions if dataset in DATASETS else {}
    length, how = text_length(dataset, max_tokens, text_weights)
    faults = {}     # fault: list of cases
    doubts = []     # about the boxes of whole splits
    images = {}     # split: set of images
    sizes = {}      # image: (width, height), for those that could be opened

    papers = f"{'the papers':>12}" if expected else ""
    print(f"{'split':12}{'images':>9}{'objects':>9}{'expressions':>13}{papers}")
    for split, samples in samples_by_split(dataset, root).items():
        images[split] = {sample.image for sample in samples}
        objects = {(sample.image, sample.box) for sample in samples}
        paper = f"{expected[split]:12,}" if split in expected else ""
        differs = "  differs" if expected.get(split, len(samples)) != len(samples) else ""
        print(f"{split:12}{len(images[split]):9,}{len(objects):9,}{len(samples):13,}{paper}{differs}")

        for error in open_images(images[split], sizes):
            faults.setdefault("images that are missing or broken", []).append(error)
        for sample in samples:
            for fault in faults_of(sample.box, sizes.get(sample.image, (math.inf, math.inf))):
                case = f"{sample.image}, {shortened(sample.text)}, {list(sample.box)}"
                faults.setdefault(fault, []).append(case)
        cut = cut_samples(samples, length, max_tokens)
        if cut:
            fault = f"expressions that are cut at {max_tokens} tokens{how}"
            faults.setdefault(fault, []).extend(shortened(sample.text) for sample in cut)
        doubt = doubt_about_boxes(samples)
        if doubt:
            doubts.append(f"{split}: {doubt}")

    turned = [image for image in sizes if isinstance(image, Path) and is_turned(image)]
    if turned:
        fault = "images are stored turned (EXIF), and boxes must be in the stored pixels"
        faults[fault] = turned
    for first, second in itertools.combinations(images, 2):
        both = sorted(images[first] & images[second])
        # The val of joined datasets repeats that of each one, DATASET/val, which is compared, too.
        repeats = first == "val" and "/" in second
        if both and not repeats:
            faults.setdefault(f"images both in {first} and in {second}", []).extend(both)
    if misspelt_splits(list(images)):
        print(f"training looks for train and val{misspelt_splits(list(images))}")
    for doubt in doubts:
        print(doubt)
    for fault, cases in faults.items():
        print(f"{len(cases):,} {fault}, such as {cases[0]}")
    if not faults:
        print("no fault was found")


def is_turned(path):
    """Return whether the EXIF data of an image say that it is to be turned before it is seen."""
    with Image.open(path) as opened:
        return opened.getexif().get(0x0112, 1) != 1


def faults_of(box, size):
    """List what is wrong with the box of a sample. size: (width, height) of its image"""
    x1, y1, x2, y2 = box
    width, height = size
    faults = []
    if is_outside(box, size):
        faults.append("boxes wholly outside of the image")
    # Published boxes reach out of their images by less than a pixel now and then.
    elif min(x1, y1) < -1 or x2 > width + 1 or y2 > height + 1:
        faults.append("boxes that reach out of the image")
    if x2 <= x1 or y2 <= y1:
        faults.append("boxes without area")
    return faults


def draw_splits(splits, count, folder):
    """Draw `count` samples of each split into one file per split. An image that is missing or broken
    is named and left out. splits: {split: list of Sample}"""
    for split, samples in splits.items():
        path = folder / f"{split.replace('/', '-')}.png"
        tiles = []
        for sample in spread(samples, count):
            try:
                image = load_image(sample.image)
            except InputError as error:
                print(f"not drawn: {error}")
                continue
            caption = drawable(sample.text, len(tiles) + 1, path)
            tiles.append(draw(image, caption, [(sample.box, TRUE)]))
        if tiles:
            write_sheet(path, tiles, ["true"])
            print(path)


def write_jsonl(splits, path, absolute):
    """Write all splits as JSONL, with image paths that are absolute or relative to the file's
    folder, so that both can be moved together."""
    lines = []
    for split, samples in splits.items():
        for sample in samples:
            image = os.path.abspath(sample.image)
            if not absolute:
                image = relative_path(image, path.parent)
            line = {"image": image, "text": sample.text, "box": sample.box, "split": split}
            lines.append(json.dumps(line) + "\n")
    write_text(path, "".join(lines))


def relative_path(image, folder):
    """Return the path of an image from a folder. Below the folder it leads through links."""
    relative = os.path.relpath(image, folder)
    if relative.startswith(os.pardir):
        # The way up from a folder that is a link begins at the place that the link names.
        return os.path.relpath(os.path.realpath(image), os.path.realpath(folder))
    return relative


def build_parser():
    """Return the parser. Its help ends with the formats, addresses and leaks of the docstring."""
    epilog = __doc__[__doc__.index("Formats of annotations"):__doc__.index("Tags such as")]
    parser = argparse.ArgumentParser(
        description="Print what a dataset holds and which faults it has. Options also draw,\n"
                    "convert and download it.", epilog=epilog.rstrip(),
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, width=80))
    add = parser.add_argument
    add("dataset",
        help=f"shapes, {', '.join(DATASETS)}, a FILE.jsonl, or several joined by commas")
    add("--root",
        help="folder of annotations and images (default: data; for a .jsonl file: its folder)")
    add("--draw", type=int, default=0, metavar="N",
        help="draw N samples of each split (default: 0)")
    add("--save", type=Path, default=".", metavar="DIR",
        help="write the drawings into this folder, as SPLIT.png; none that is there is overwritten "
             "(default: the current one)")
    add("--write", type=Path, metavar="FILE.jsonl",
        help="write all splits to this file, with image paths that are relative to its folder: "
             "move the file and the images together, or take --absolute (default: write nothing)")
    add("--absolute", action="store_true",
        help="with --write: absolute image paths, so that the file alone may be moved (default: "
             "relative ones)")
    add("--download", action="store_true",
        help="fetch what is missing, from the addresses below as users reported them (default: "
             "fetch nothing)")
    add("--mirror", metavar="ADDRESS",
        help="fetch what is missing from this folder instead (default: the addresses below)")
    add("--max-tokens", type=int, default=20, metavar="N",
        help="count expressions of more than N tokens (default: 20)")
    add("--text-weights", metavar="NAME",
        help="count tokens by the tokenizer of this text encoder, a hub name or a folder, or tiny for "
             "that of size tiny (default: bert-base-uncased if its files are on this machine; if not, "
             "words are counted)")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    dataset, root = args.dataset, args.root
    if args.absolute and not args.write:
        raise InputError("--absolute goes with --write FILE.jsonl")
    if args.write and args.write.exists():
        raise InputError(f"--write {args.write}: the file is there already; choose another name")
    if args.write and dataset == "shapes":
        raise InputError(f"--write {args.write}: shapes has no image files to refer to; choose "
                         f"another dataset")

    if args.download or args.mirror:
        names = names_in(dataset)
        for name in names:   # refuse before the first byte is fetched
            check_downloadable(name, root)
        for name in names:
            download(name, root, args.mirror)

    splits = samples_by_split(dataset, root)
    report(dataset, root, args.max_tokens, args.text_weights)
    if args.draw > 0:
        args.save.mkdir(parents=True, exist_ok=True)
        for split in splits:
            path = args.save / f"{split.replace('/', '-')}.png"
            if path.exists():
                raise InputError(f"--draw would write {path}, which is there already; choose another "
                                 f"folder by --save")
        draw_splits(splits, args.draw, args.save)
    if args.write:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(splits, args.write, args.absolute)


if __name__ == "__main__":
    run_command(main)
