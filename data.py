"""Datasets: from names and files to batches.

    shapes                    the generated default: pictures of coloured shapes, expressions that single one out
    DATASETS, load_samples    RefCOCO and its family, ReferItGame, Flickr30k, one's own JSONL: a Sample for each expression
    augment, letterbox        a picture into its padded square, with the box and the padding mask
    GroundingDataset, collate what the DataLoader uses
    draw, main                pictures of boxes; the command line that counts, checks and draws

Boxes: in a Sample (x1, y1, x2, y2) in pixels of the stored image; in a batch (cx, cy, w, h) in [0, 1] of the square.
"""
import argparse
import functools
import itertools
import json
import math
import os
import pickle
import random
import re
import textwrap
import urllib.request
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple, Union

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps
from torchvision.utils import make_grid
from tqdm import tqdm

from model import DETR_URL, METHODS, InputError, one_of, run, save_whole

# Mean and standard deviation of the pixels in pretraining: ImageNet's for DETR; CLIP's own, which [D22] released HiVG lacks.
PIXELS = {"detr": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
          "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))}

class Sample(NamedTuple):
    """One expression of one object. image: the picture's path, or the scene's number in `shapes`."""
    image: Union[Path, int]
    text: str
    box: tuple
    image_id: Union[str, int]

# --- shapes: the generated default. A scene is a function of its number; nothing is stored. --------------------------
COLOURS = {"red": (208, 52, 44), "green": (58, 156, 70), "blue": (48, 92, 200), "yellow": (232, 196, 50)}
SHAPES = ("circle", "square", "triangle")
RADII = {"small": (11, 14), "large": (19, 24)}        # half the side of the box, in pixels; nothing lies between
WIDTH, HEIGHTS = 128, (96, 128)                       # of a picture; letterboxing to 64 pixels halves it
CLEAR = 10                                            # pixels by which a place must differ before words may rest on it

# split: first scene number, scenes, objects in a scene, and the residues of the scene's checksum that belong to it.
# The checksum is of the scene's content, thing by thing, and each residue has one split, so no scene can be in two.
SHAPES_SPLITS = {
    "train": (0, 8000, (2, 5), (3, 4, 5, 6, 7)),
    "val": (10_000_000, 400, (2, 5), (0,)),
    "testA": (20_000_000, 400, (2, 3), (1,)),         # few distractors
    "testB": (30_000_000, 400, (5, 7), (2,))}         # many

class Thing(NamedTuple):
    """An object of a scene: its centre (x, y) and half its side r, in pixels."""
    colour: str
    shape: str
    size: str
    x: int
    y: int
    r: int

    @property
    def box(self):
        return (self.x - self.r, self.y - self.r, self.x + self.r, self.y + self.r)

def random_things(rng, height, count):
    """Up to `count` things that do not touch, of a few colours, so that some look alike."""
    colours = rng.sample(sorted(COLOURS), 3)
    things = []
    for _ in range(count):
        for _ in range(20):
            size = "large" if rng.random() < 0.35 else "small"
            r = rng.randint(*RADII[size])
            x, y = rng.randint(r + 1, WIDTH - r - 2), rng.randint(r + 1, height - r - 2)
            if all(max(abs(x - t.x), abs(y - t.y)) > r + t.r + 2 for t in things):
                things.append(Thing(rng.choice(colours), rng.choice(SHAPES), size, x, y, r))
                break
    return things

@functools.lru_cache(maxsize=50_000)
def scene(number):
    """The scene of a number: (height, [Thing, ...], [(text, index of the thing meant), ...])."""
    start, scenes, counts, residues = max((s for s in SHAPES_SPLITS.values() if s[0] <= number), key=lambda s: s[0])
    rng = random.Random(number)
    while True:
        height = rng.randint(*HEIGHTS)
        things = random_things(rng, height, rng.randint(*counts))
        if len(things) >= counts[0] and zlib.crc32(repr((height, things)).encode()) % 8 in residues:
            expressions = [describe(rng, things) for _ in range(3)]
            if None not in expressions:
                return height, things, expressions

# An expression is a description (colour, shape, size; None where unsaid; {} below) and a way to tell the things it fits apart.
SIDES = {             # side -> (score of a thing, least at the very side; phrases of that one; of one on that side of another)
    "left": (lambda t: t.x, ("the leftmost {}", "the {} furthest to the left", "the {} on the left"),
             ("the {} to the left of the {}", "the {} left of the {}")),
    "right": (lambda t: -t.x, ("the rightmost {}", "the {} furthest to the right", "the {} on the right"),
              ("the {} to the right of the {}", "the {} right of the {}")),
    "top": (lambda t: t.y, ("the topmost {}", "the highest {}", "the {} at the top"),
            ("the {} above the {}", "the {} higher than the {}")),
    "bottom": (lambda t: -t.y, ("the lowest {}", "the bottom {}", "the {} at the bottom"),
               ("the {} below the {}", "the {} under the {}"))}
ORDINALS = ("second", "third", "fourth")
NOUNS = ("shape", "object")
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}

def random_description(rng, thing, chance):
    """Some of a thing's attributes, each with `chance`: (colour, shape, size), None where left unsaid."""
    return tuple(value if rng.random() < p else None for value, p in zip(thing[:3], chance))

def fits(thing, description):
    return all(said is None or said == value for said, value in zip(description, thing[:3]))

def words(rng, description):
    colour, shape, size = description
    noun = shape or rng.choice(NOUNS)
    return " ".join(w for w in (rng.choice(SIZE_WORDS[size]) if size else None, colour, noun) if w)

# A way returns an expression that means `target` alone, or None where its random choices fail. candidates: what `said` fits.
def by_attributes(rng, things, target, said, candidates):
    if any(said) and candidates == [target]:
        return "the " + words(rng, said)

def by_rank(rng, things, target, said, candidates, ordinal=False):
    """The one furthest to a side, or the second, third, ... from it; it and all before it are told apart by CLEAR pixels."""
    side, (score, phrases, _) = rng.choice(list(SIDES.items()))
    rank = rng.randint(1, len(ORDINALS)) if ordinal else 0
    ordered = sorted(candidates, key=score)
    gaps = [score(b) - score(a) for a, b in zip(ordered, ordered[1:])]
    if len(ordered) > max(rank, 1) and ordered[rank] is target and min(gaps[:rank + 1]) >= CLEAR:
        return (f"the {ORDINALS[rank - 1]} {{}} from the {side}" if ordinal else rng.choice(phrases)).format(words(rng, said))

def by_relation(rng, things, target, said, candidates):
    anchor = rng.choice([t for t in things if t is not target])
    called = random_description(rng, anchor, (0.8, 0.9, 0.4))
    score, _, phrases = rng.choice(list(SIDES.values()))
    others = [t for t in candidates if t is not anchor]
    if any(called) and [t for t in things if fits(t, called)] == [anchor] and len(others) > 1 \
            and [t for t in others if score(t) < score(anchor)] == [target] and score(anchor) - score(target) >= CLEAR:
        return rng.choice(phrases).format(words(rng, said), words(rng, called))

# A way, and the chances that it says colour, shape and size; as often as they stand here.
WAYS = (*[(by_attributes, (0.7, 0.8, 0.4))] * 8, *[(by_rank, (0.5, 0.5, 0.2))] * 5, *[(by_relation, (0.5, 0.5, 0.2))] * 4,
        (functools.partial(by_rank, ordinal=True), (0.5, 0.4, 0.1)))

def describe(rng, things):
    """(an expression that means exactly one of the things, that one's index), or None where 100 tries find none."""
    way, chances = rng.choice(WAYS)
    for _ in range(100):
        target = rng.randrange(len(things))
        said = random_description(rng, things[target], chances)
        if text := way(rng, things, things[target], said, [t for t in things if fits(t, said)]):
            return text, target

def render(number):
    """The picture of a scene, as PIL draws it."""
    height, things, _ = scene(number)
    rng = seeded("paint", number)
    ground = rng.randint(215, 245)
    picture = Image.new("RGB", (WIDTH, height), tuple(ground + rng.randint(-8, 8) for _ in range(3)))
    pen = ImageDraw.Draw(picture)
    for t in things:
        ink = tuple(c + rng.randint(-14, 14) for c in COLOURS[t.colour])
        outline = [(t.x, t.y - t.r), (t.x + t.r, t.y + t.r), (t.x - t.r, t.y + t.r)] if t.shape == "triangle" else t.box
        {"circle": pen.ellipse, "square": pen.rectangle, "triangle": pen.polygon}[t.shape](outline, fill=ink)
    return picture

# --- Datasets by name ------------------------------------------------------------------------------------------------
# dataset: its name in REFER, TransVG, MDETR; expressions by M²IST Section IV-A a and HiVG Table 6 (google's: their sum alone)
DATASETS = {
    "refcoco": ("refcoco/refs(unc).p", "unc", "refcoco", dict(train=120_624, val=10_834, testA=5_657, testB=5_095)),
    "refcoco+": ("refcoco+/refs(unc).p", "unc+", "refcoco+", dict(train=120_191, val=10_758, testA=5_726, testB=4_889)),
    "refcocog-umd": ("refcocog/refs(umd).p", "gref_umd", "refcocog", dict(train=80_512, val=4_896, test=9_602)),
    "refcocog-google": ("refcocog/refs(google).p", "gref", "", dict(train=85_474, val=9_536)),
    "referit": ("", "referit", "", dict(train=54_127, val=5_842, test=60_103)),
    "flickr30k": ("", "flickr", "", dict(train=427_193, val=14_433, test=14_481))}
COCO = ("images/train2014", "train2014", "other/images/mscoco/images/train2014", "other/images/train2014")
PICTURES = {"referit": ("referit/images",), "flickr30k": ("Flickr30k/flickr30k-images", "Flickr30k/flickr30k_images")}
NUMPY = [np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8")),       # what an array is pickled as
         *((part, f"numpy.{core}.multiarray.{part.__name__}") for core in ("core", "_core")        # by numpy 1, by numpy 2
           for part in (np._core.multiarray._reconstruct, np._core.multiarray.scalar))]

# A reader takes a file and yields (where in it, the picture's name, text, box [x1, y1, x2, y2] in pixels, split).
def read_refer(path):
    """REFER: refs(BY).p beside instances.json. A ref's own file_name is of its annotation, not of the picture."""
    with open(path, "rb") as file:
        refs = PlainUnpickler(file, encoding="utf-8", errors="replace").load()
    instances = json.loads((path.parent / "instances.json").read_bytes())
    names = {image["id"]: image["file_name"] for image in instances["images"]}
    boxes = {thing["id"]: thing["bbox"] for thing in instances["annotations"]}
    for ref in refs:
        for sentence in ref["sentences"]:
            yield f"ref {ref['ref_id']}", names[ref["image_id"]], sentence["sent"], corners(boxes[ref["ann_id"]]), ref["split"]

class PlainUnpickler(pickle.Unpickler):
    """For numbers, strings, lists and dicts. Whatever else a pickle asks for by name, say a command to run, is refused."""
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}; annotations need no code")

def corners(box):
    """(x1, y1, w, h) -> [x1, y1, x2, y2]. Floats stay floats; the released loaders cut them to integers. [D36]"""
    x, y, w, h = (float(v) for v in box)
    return [x, y, x + w, y + h]

def read_index(path):
    """TransVG: DATASET_SPLIT.pth, a list of (picture, size, box, text, ...), of Flickr30k (picture, box, text)."""
    dataset, _, split = path.stem.rpartition("_")
    with torch.serialization.safe_globals(NUMPY):                           # boxes may be arrays
        rows = torch.load(path, map_location="cpu", weights_only=True)
    for number, row in enumerate(rows):
        image, box, text = row if len(row) == 3 else (row[0], *row[2:4])
        box = [float(v) for v in box] if dataset in ("referit", "flickr") else corners(box)
        yield f"item {number}", image, text, box, split

def read_mdetr(path):
    """MDETR: finetune_DATASET_SPLIT.json, COCO's format with one "image" an expression."""
    content, split = json.loads(path.read_bytes()), path.stem.rpartition("_")[2]
    boxes = {thing["image_id"]: thing["bbox"] for thing in content["annotations"]}
    for image in content["images"]:
        yield f"image {image['id']}", image["file_name"], image["caption"], corners(boxes[image["id"]]), split

def read_jsonl(path):
    """One's own pictures: an object with these four keys a line, in UTF-8."""
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            try:
                item = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: not JSON in UTF-8 ({error})") from None
            if missing := [key for key in ("image", "text", "box", "split") if not isinstance(item, dict) or key not in item]:
                raise InputError(f"{path}, line {number}: lacks {', '.join(missing)}")
            yield f"line {number}", item["image"], item["text"], item["box"], item["split"]

READERS = {".p": read_refer, ".pth": read_index, ".json": read_mdetr, ".jsonl": read_jsonl}

def check(where, image, text, box, split, area):
    """InputError says what is wrong with what a reader yields, and where. area: whether a box must have one; who wrote the
    file can mend it, who downloaded it cannot, and may evaluate on it all the same."""
    if not (isinstance(box, list) and len(box) == 4 and all(type(v) in (int, float) and abs(v) < 1e9 for v in box)):  # nor NaN
        raise InputError(f"{where}: box is {box}, not four numbers [x1, y1, x2, y2]")
    if area and (box[2] <= box[0] or box[3] <= box[1]):
        raise InputError(f"{where}: box {box} has no area; it is [x1, y1, x2, y2] in pixels, x2 > x1 and y2 > y1")
    if not all(isinstance(v, str) and v.strip() and v.encode(errors="ignore").decode() == v for v in (image, text, split)):
        raise InputError(f"{where}: image, text and split must be strings that are not empty, nor broken Unicode")

def find_files(dataset, root):
    """([annotation file, ...] of one format, the folder of their pictures). What is there says which format it is."""
    path, base = Path(dataset), Path(root or "data")
    if dataset not in DATASETS and not (path.suffix == ".jsonl" and path.is_file()):
        example = '{"image": "a.jpg", "text": "the red cup", "box": [x1, y1, x2, y2], "split": "train"}'
        raise InputError(f"{dataset}: no such dataset (choose shapes, {', '.join(DATASETS)}, or several joined by commas) and "
                         f"no such file, FILE.jsonl, of one object a line: {example}")
    if root and not base.is_dir():
        raise InputError(f"--root {root}: no such folder; expected the one of the annotations and pictures of {dataset}")
    if dataset not in DATASETS:
        return [path], base if root else path.parent
    (refer, code, mdetr, counts), pictures = DATASETS[dataset], PICTURES.get(dataset, COCO)
    patterns = list(filter(None, (refer, f"{code}/{code}_*.pth", mdetr and f"finetune_{mdetr}_*.json")))
    for place, pattern in itertools.product([base, *sorted(base.glob("*/"))], patterns):
        if found := [f for f in sorted(place.glob(pattern)) if f.suffix == ".p" or f.stem.rpartition("_")[2] in counts]:
            folders = [folder / name for folder in (base, place, *sorted(base.glob("*/"))) for name in pictures]
            return found, next(filter(Path.is_dir, folders), folders[0])
    raise InputError(f"--root {base}: no annotations of {dataset} there or one folder below; looked for {', '.join(patterns)} "
                     f"(pictures in {' or '.join(pictures)}); the README, `The data`, says where they come from")

def mixed(datasets, root):
    """The papers' mixed setting: a picture of val or test of any dataset is in train of none. It is told by its path, those of
    DATASETS by their names too. The splits are train and val, of all, and the others as DATASET/SPLIT."""
    if "shapes" in datasets:
        raise InputError("shapes, which is generated, cannot be joined with other datasets")
    parts = [(dataset, split, samples) for dataset in datasets for split, samples in _by_split(dataset, root).items()]
    names = lambda dataset, sample: {os.path.abspath(sample.image), *[sample.image_id] * (dataset in DATASETS)}
    held_out = {name for dataset, split, samples in parts if split != "train" for s in samples for name in names(dataset, s)}
    train = [(dataset, sample) for dataset, split, samples in parts if split == "train" for sample in samples]
    clean = [sample for dataset, sample in train if held_out.isdisjoint(names(dataset, sample))]
    print(f"{','.join(datasets)}: {len(train) - len(clean):,} of {len(train):,} expressions left out of train, whose pictures "
          f"are in val or test of one of them")
    splits = {"train": clean, "val": [sample for _, split, samples in parts if split == "val" for sample in samples],
              **{f"{dataset}/{split}": samples for dataset, split, samples in parts if split != "train"}}
    return {split: samples for split, samples in splits.items() if samples}

@functools.lru_cache(maxsize=8)
def _by_split(dataset, root):
    """{split: [Sample, ...]} of a dataset of files, or of several."""
    if "," in dataset and not Path(dataset).is_file():
        return mixed(dataset.split(","), root)
    files, folder = find_files(dataset, root)
    splits = {}
    for file in files:
        try:
            for where, image, text, box, split in READERS[file.suffix](file):
                check(f"{file}, {where}", image, text, box, split, area=file.suffix == ".jsonl")
                splits.setdefault(split, []).append(Sample(folder / image, text, tuple(map(float, box)), image))
        except Exception as error:                      # whatever somebody's file may hold in place of what it should
            odd = f"{file}: not as {READERS[file.suffix].__name__}() expects it ({type(error).__name__}: {error})"
            raise error if isinstance(error, InputError) else InputError(odd) from None
    if not splits:
        raise InputError(f"{dataset}: holds no line")
    return splits

def split_names(dataset, root=None):                    # in the dataset's own order
    return list(SHAPES_SPLITS if str(dataset) == "shapes" else _by_split(str(dataset), root and str(root)))

def load_samples(dataset, split, root=None):
    """List of Sample. dataset: "shapes", one of DATASETS, the path of a FILE.jsonl, or several joined by commas. root: the
    folder that holds annotations and pictures; of a FILE.jsonl, the one that its image paths start from.
    Raises InputError for an unknown dataset or split (and lists the valid ones), a missing file or folder, a bad line."""
    dataset = str(dataset)
    one_of(f"split of {dataset}", split, split_names(dataset, root))
    if dataset == "shapes":
        first, scenes, *_ = SHAPES_SPLITS[split]
        return [Sample(number, text, tuple(map(float, scene(number)[1][target].box)), number)
                for number in range(first, first + scenes) for text, target in scene(number)[2]]
    return _by_split(dataset, root and str(root))[split]

# What TransVG's files of DETR have not seen, of COCO's pictures; the public ones have seen all of them.
UNSEEN = {"detr-r50-unc": ("refcoco", "refcoco+"), "detr-r50-gref": ("refcocog-umd", "refcocog-google")}

def leaky_pretraining(args):
    """Whether the vision encoder's pretraining has seen the pictures of val and test, by the name of its file and by the
    dataset: True, False, or None where that is not known, as of CLIP, whose pictures nobody has listed."""
    name = Path(args.vision_weights or DETR_URL).stem
    if args.weights != "pretrained":
        return False
    if METHODS[args.method]["family"] == "clip" or not name.startswith("detr-r"):
        return None
    clean = ("referit", "flickr30k", *UNSEEN.get(name, ()))                  # neither of the two has its pictures from COCO
    leaks = [False if dataset in clean else True if dataset in DATASETS else None for dataset in args.dataset.split(",")]
    return True if True in leaks else None if None in leaks else False

# --- From a Sample to a batch ----------------------------------------------------------------------------------------
def load_picture(image, upright=False):
    """A path, a scene's number, or a picture -> an RGB picture, transparent parts white. upright: turned as its EXIF says; the
    boxes of datasets are of the stored pixels."""
    if isinstance(image, (int, Image.Image)):
        return render(image) if isinstance(image, int) else image
    try:
        picture = ImageOps.exif_transpose(Image.open(image)) if upright else Image.open(image)
        if picture.mode.startswith("I"):                                    # 16 bits a pixel, which PIL would cut off at 255
            picture = Image.fromarray(np.uint8(np.asarray(picture).clip(0, 65535) // 256))
        if picture.has_transparency_data:
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
        return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError) as error:
        raise InputError(f"{image}: cannot be decoded as a picture ({error})") from None

# Words that a crop or a mirror image may make false. Whole words: there is no side in "bright" or "Wright".
SIDE = re.compile(r"\b(left|right)(?=(most|hand|side)?\b)", re.I)
PLACE = re.compile(SIDE.pattern + r"|\b((top|bottom|upper|lower)(most)?|middle|cent(er|re)|corner|edge|lft|rt|l|r)\b", re.I)
UNMIRRORED = re.compile(r"\d|\b(first|second|third|fourth|fifth|last|lft|rt|l|r|east|west|(counter)?clockwise)\b", re.I)

def augment(picture, box, text, size, rng, mirror):
    """The transforms of TransVG, which both papers take over -> picture, box, text. box: (x1, y1, x2, y2) in pixels.
    A crop with chance 1/2, unless the words are about a place; brightness, contrast, saturation with chance 0.8; with
    `mirror` the mirror image with chance 1/2, left and right exchanged in the text, unless its other words forbid it (HiVG
    Appendix B mirrors nothing). [D36] The released code compares the box's x with the crop's top, and swaps "bright"."""
    if rng.random() < 0.5 and not PLACE.search(text):
        picture, box = crop(picture, box, size, rng)
    if rng.random() < 0.8:
        for enhance in rng.sample((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), 3):
            picture = enhance(picture).enhance(rng.uniform(0.6, 1.4))
    if mirror and rng.random() < 0.5 and not UNMIRRORED.search(text):
        picture, box = ImageOps.mirror(picture), (picture.width - box[2], box[1], picture.width - box[0], box[3])
        text = SIDE.sub(lambda side: "right" if side[0].lower() == "left" else "left", text)
    return picture, box, text

def crop(picture, box, size, rng):
    """A random part of the picture that keeps the box's centre, or the whole where 20 tries find none."""
    scale = min(picture.size) / (size * rng.choice((400, 500, 600)) / 640)       # the picture's pixels for one of the square's
    for _ in range(20):
        w, h = (min(side, round(scale * size * rng.uniform(384, 600) / 640)) for side in picture.size)
        x, y = rng.randint(0, picture.width - w), rng.randint(0, picture.height - h)
        if x < (box[0] + box[2]) / 2 < x + w and y < (box[1] + box[3]) / 2 < y + h:
            return picture.crop((x, y, x + w, y + h)), tuple(v - start for v, start in zip(box, (x, y, x, y)))
    return picture, box

def placement(width, height, size, rng=None, fill=1.0):
    """Where a picture lies in its square: (its width, its height, left, top) in pixels of the square. The long side becomes
    `fill` of the square's; the picture is centred, or put anywhere by `rng` (training)."""
    scale = fill * size / max(width, height)
    w, h = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = ((size - side) // 2 if rng is None else rng.randint(0, size - side) for side in (w, h))
    return w, h, left, top

def letterbox(picture, size, rng=None, pixels=PIXELS["detr"], fill=1.0):
    """An RGB picture -> (image (3, size, size) normalised by `pixels`, padding (size, size) bool, (w, h, left, top)).
    Padding is 0 after normalisation: the mean colour."""
    w, h, left, top = place = placement(*picture.size, size, rng, fill)
    image = TF.normalize(TF.to_tensor(picture.resize((w, h), Image.Resampling.BILINEAR)), *pixels)
    edges = [left, top, size - w - left, size - h - top]
    return TF.pad(image, edges), TF.pad(torch.zeros(h, w, dtype=torch.bool), edges, fill=True), place

def to_square(box, picture_size, place, size):
    """(x1, y1, x2, y2) in pixels of the picture -> (cx, cy, w, h) in [0, 1] of the square. place: from `placement`."""
    (width, height), (w, h, left, top) = picture_size, place
    x1, x2 = (left + np.clip(x, 0, width) * w / width for x in box[0::2])
    y1, y2 = (top + np.clip(y, 0, height) * h / height for y in box[1::2])
    return [v / size for v in ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1)]

def from_square(box, picture_size, size):
    """The inverse, for a centred picture: (cx, cy, w, h) in [0, 1] -> (x1, y1, x2, y2) in pixels of the picture."""
    (width, height), (cx, cy, bw, bh) = picture_size, (float(v) * size for v in box)
    w, h, left, top = placement(width, height, size)
    xs = [min(max((x - left) * width / w, 0), width) for x in (cx - bw / 2, cx + bw / 2)]
    ys = [min(max((y - top) * height / h, 0), height) for y in (cy - bh / 2, cy + bh / 2)]
    return xs[0], ys[0], xs[1], ys[1]

class Tokenizer:
    """The text encoder's own, by a hub name or a folder, or WordPiece of the words of `shapes` and single letters. Calling it
    gives at most max_tokens ids; of a longer text the end is cut, but not the token that ends it."""
    def __init__(self, weights, name, max_tokens, vocabulary=None, flag="--text-weights"):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")          # its threads do not survive DataLoader's fork
        from transformers import AutoTokenizer, BertTokenizer
        self.max_tokens = max_tokens
        if weights == "pretrained":
            try:
                self.wordpiece = AutoTokenizer.from_pretrained(name)
                if vocabulary and len(self.wordpiece) != vocabulary:       # transformers makes an empty one where files lack
                    raise ValueError(f"of {len(self.wordpiece)} words, the text encoder has {vocabulary}; is tokenizer.json "
                                     f"missing there, or vocab.txt, or vocab.json with merges.txt?")
            except (OSError, ValueError) as error:
                raise InputError(f"no tokenizer in {name} ({str(error).splitlines()[0]}): give a hub name or folder by {flag}, "
                                 f"or take --weights random or --size tiny") from None
        else:
            said = " ".join([*COLOURS, *SHAPES, *NOUNS, *ORDINALS, "to from", *sum(SIZE_WORDS.values(), ()),
                             *SIDES, *(p for _, furthest, beside in SIDES.values() for p in furthest + beside)])
            letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
            pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters if c.isalnum()),
                      *sorted(set(said.replace("{}", "").split()))]
            self.wordpiece = BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})
        self.pad, self.mask = self.wordpiece.pad_token_id, self.wordpiece.mask_token_id

    def __call__(self, text):
        return self.wordpiece(text, truncation=True, max_length=self.max_tokens)["input_ids"]

def seeded(*key):
    """A random.Random of its own for each key: what is drawn for a sample depends on nothing that was drawn before."""
    return random.Random(" ".join(map(str, key)))

class GroundingDataset(torch.utils.data.Dataset):
    """Samples as tensors, decoded when asked for. size: the square's side in pixels. train: put the picture at a random place
    of its square. transforms: and augment and scale it, as `augment` says; {"mirror": bool}. All is drawn from seed and index
    alone, so that neither workers nor a resumed run change what is seen. [D32]"""
    def __init__(self, samples, size, tokenizer, train=False, seed=0, pixels=PIXELS["detr"], transforms=None):
        self.samples, self.size, self.tokenizer, self.train, self.seed = samples, size, tokenizer, train, seed
        self.pixels, self.transforms = pixels, transforms if train else None
        if gone := [path for path in {s.image for s in samples if isinstance(s.image, Path)} if not os.path.isfile(path)]:
            raise InputError(f"{gone[0]}: no such picture, nor {len(gone) - 1} others; paths start from the .jsonl's folder or "
                             f"--root; `python data.py DATASET --root DIR` tells what is there")

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        image, text, box, _ = self.samples[i]
        picture, rng, fill = load_picture(image), seeded(self.seed, i) if self.train else None, 1.0
        if box[0] >= picture.width or box[1] >= picture.height or min(box[2:]) <= 0:
            raise InputError(f"{image}: box {list(box)} of {text!r} lies outside the picture, which is {picture.width} x "
                             f"{picture.height}")
        if self.transforms:
            picture, box, text = augment(picture, box, text, self.size, rng, **self.transforms)
            fill = rng.choice((1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7))                 # 640, 608, ... 448 of 640
        square, padding, place = letterbox(picture, self.size, rng, self.pixels, fill)
        return square, padding, self.tokenizer(text), to_square(box, picture.size, place, self.size), i

def collate(items, pad):
    """Items -> {images (B, 3, S, S), image_padding (B, S, S), tokens (B, T), token_padding (B, T), boxes (B, 4), index (B,)},
    T the longest text of the batch. pad: the tokenizer's padding id."""
    images, padding, texts, boxes, index = zip(*items)
    lengths = torch.tensor([len(text) for text in texts])
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True, padding_value=pad)
    return dict(images=torch.stack(images), image_padding=torch.stack(padding), tokens=tokens,
                token_padding=torch.arange(tokens.shape[1]) >= lengths[:, None],
                boxes=torch.tensor(boxes, dtype=torch.float32), index=torch.tensor(index))

# --- Pictures --------------------------------------------------------------------------------------------------------
TRUE, PREDICTED, WARM = (0, 130, 40), (220, 0, 90), (255, 140, 0)

def spread(samples, count=12):                          # some of the samples, from all over the list
    return samples[::max(1, len(samples) // count)][:count]

def draw(picture, caption, boxes, attention=None, side=256):
    """A tile: the picture at `side` pixels, boxes [(box in its pixels, colour), ...], a caption below, and attention (Nv,) over
    the letterboxed square, as warmth."""
    scale = side / max(picture.size)
    w, h, left, top = placement(*picture.size, side)
    view = picture.resize((w, h), Image.Resampling.BICUBIC)
    if attention is not None:
        cells = attention.float().cpu().unflatten(0, (math.isqrt(len(attention)), -1))
        heat = Image.fromarray(np.uint8(255 * cells / cells.max().clamp(min=1e-9)))
        heat = heat.resize((side, side), Image.Resampling.BICUBIC).crop((left, top, left + w, top + h))
        view = Image.composite(Image.new("RGB", view.size, WARM), view, heat.point(lambda v: v * 3 // 4))
    pen = ImageDraw.Draw(view)
    for box, colour in boxes:
        x1, y1, x2, y2 = (v * scale for v in box)
        pen.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=3)
    tile = ImageOps.expand(view, (left, top, side - w - left, side - h - top + 36), "white")
    lines = textwrap.fill(caption, (side - 8) // 7, max_lines=2, placeholder=" ...")         # a letter is about 7 pixels wide
    ImageDraw.Draw(tile).text((4, side + 2), lines, "black", ImageFont.load_default(13))
    return tile

def contact_sheet(tiles, columns=4):                    # tiles of one size, side by side
    return TF.to_pil_image(make_grid([TF.to_tensor(tile) for tile in tiles], columns, padding=8, pad_value=1.0))

# --- The command line: look at a dataset before it is trained on -----------------------------------------------------
# archive: its folder, or dataset: who has its pictures; as users reported it. None could be tried where this was written.
REFER = "https://web.archive.org/web/{}/https://bvisionweb1.cs.unc.edu/licheng/referit/data"
ADDRESSES = {"refcoco.zip": REFER.format(20220413011718), "refcoco+.zip": REFER.format(20220413011656),
             "refcocog.zip": REFER.format(20220413012904), "train2014.zip": "http://images.cocodataset.org/zips",
             "referit": "the drives that TransVG's and CLIP-VG's READMEs link", "flickr30k": "its authors, who have a form"}

def fetch(address, path):
    """Fetch the rest of a zip, of which a part may be there; all of it where the server cannot begin in the middle."""
    had = path.stat().st_size if path.exists() else 0
    with urllib.request.urlopen(urllib.request.Request(address, headers={"Range": f"bytes={had}-"}), timeout=60) as reply:
        had = had if reply.status == 206 else 0
        if not had and reply.peek(2)[:2] != b"PK":                                # say a page, or nothing; what is there stays
            raise ValueError(f"what comes is no zip, it begins {reply.peek(40)[:40]}")
        size = had + int(reply.headers["Content-Length"] or 0)
        with tqdm.wrapattr(reply, "read", size, desc=path.name, initial=had) as rest, open(path, "ab" if had else "wb") as out:
            out.writelines(iter(lambda: rest.read(1 << 20), b""))
    if path.stat().st_size < size:
        raise EOFError(f"{path.stat().st_size:,} of {size:,} bytes came")

def unpack(name, folder, wanted, base, mirror):
    """Unpack what is wanted and not there. Of a member only its last name and its content count: `..`, links lead nowhere."""
    archive, address = base / name, f"{(mirror or ADDRESSES[name]).rstrip('/')}/{name}"
    if not (missing := {file for file in wanted if not os.path.lexists(folder / file)}):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not zipfile.is_zipfile(archive):
            fetch(address, archive)
        with zipfile.ZipFile(archive) as file:
            members = {last: member for member in file.infolist() if (last := member.filename.rpartition("/")[2]) in missing}
            for last, member in tqdm(members.items(), f"unpacking {name}"):
                save_whole(folder / last, lambda partial: partial.write_bytes(file.read(member)))     # read checks the sum
    except Exception as error:                                                 # whatever a server or an archive may hold
        raise InputError(f"{archive}, from {address}: {type(error).__name__}, {error}. The same command goes on where this "
                         f"broke off; if that is no use, delete the archive, or have it from elsewhere by --mirror") from None

def download(dataset, root, mirror):
    """Fetch a dataset's annotations where there are none, REFER's, and of COCO's pictures those that they name."""
    one_of("dataset to --download", dataset, DATASETS)
    base, (refer, code, *_) = Path(root or "data"), DATASETS[dataset]
    if not refer:
        raise InputError(f"{dataset} cannot be fetched: get its pictures from {ADDRESSES[dataset]}, into "
                         f"{base / PICTURES[dataset][0]}, and {code}_*.pth from TransVG's shared drive, into {base / code}")
    try:
        _by_split(dataset, root)
    except InputError:
        unpack(f"{Path(refer).parent}.zip", base / Path(refer).parent, {Path(refer).name, "instances.json"}, base, mirror)
    pictures = {sample.image_id for samples in _by_split(dataset, root).values() for sample in samples}
    unpack("train2014.zip", find_files(dataset, root)[1], pictures, base, mirror)

def report(dataset, root, max_tokens):
    """Print what each split holds beside the papers' counts; then how often there is what hurts in training, with examples."""
    counts, found, pictures, sizes = DATASETS.get(dataset, [{}])[-1], {}, {}, {}
    print(f"{'split':12}{'images':>9}{'objects':>9}{'expressions':>13}{'the papers':>12}")
    for split in split_names(dataset, root):
        samples, said = load_samples(dataset, split, root), counts.get(split)
        pictures[split], objects = {s.image for s in samples}, len({(s.image, s.box) for s in samples})
        paper = f"{said:12,}{'  differs' * (said != len(samples))}" if said else f"{'-':>12}"
        print(f"{split:12}{len(pictures[split]):9,}{objects:9,}{len(samples):13,}{paper}")
        for image in tqdm(pictures[split] - set(sizes), "opening each picture", leave=False):
            try:
                sizes[image] = load_picture(image).size
            except InputError as error:
                found.setdefault("pictures that are missing or broken", []).append(error)
        for image, text, (x1, y1, x2, y2), _ in samples:
            width, height = sizes.get(image, (math.inf, math.inf))
            if min(x1, y1) < -1 or x2 > width + 1 or y2 > height + 1:
                found.setdefault("boxes that reach out of the picture", []).append(f"{image}, {text!r}, {[x1, y1, x2, y2]}")
            if x2 <= x1 or y2 <= y1:
                found.setdefault("boxes without area", []).append(f"{image}, {text!r}, {[x1, y1, x2, y2]}")
            if len(text.split()) > max_tokens - 2:
                found.setdefault(f"expressions of more than {max_tokens} tokens, if a word is one", []).append(repr(text))
    for a, b in itertools.combinations(pictures, 2):
        if (both := pictures[a] & pictures[b]) and a != "val":              # a mixture's val is in its datasets' once more
            found[f"pictures both in {a} and in {b}"] = list(both)
    for fault, where in found.items():
        print(f"{len(where):,} {fault}, such as {where[0]}")

def main(argv=None):
    parser = argparse.ArgumentParser(description="What a dataset holds, and what is wrong with it.")
    add = parser.add_argument
    add("dataset", help=f"{', '.join(DATASETS)}, shapes, a FILE.jsonl, or several joined by commas")
    add("--root", help="folder of annotations and pictures (default: data; of a .jsonl its own)")
    add("--draw", type=int, default=0, help="how many samples of each split to draw (default: none)")
    add("--save", type=Path, default=".", help="folder for what is drawn (default: this one)")
    add("--write", type=Path, help="FILE.jsonl to write all splits to (default: none)")
    add("--download", action="store_true", help="fetch what is missing, from addresses as users reported them (default: no)")
    add("--mirror", help="--download, from this address of a folder (default: ADDRESSES in data.py)")
    add("--max-tokens", type=int, default=20, help="limit that expressions are held against (default: 20)")
    asked = parser.parse_args(argv)
    if asked.write and (asked.write.exists() or asked.dataset == "shapes"):
        raise InputError(f"--write {asked.write}: is there already, or is of shapes, which has no files")
    for dataset in sorted(asked.dataset.split(","), key=lambda d: d not in PICTURES) if asked.download or asked.mirror else ():
        download(dataset, asked.root, asked.mirror)
    report(asked.dataset, asked.root, asked.max_tokens)
    samples = {split: load_samples(asked.dataset, split, asked.root) for split in split_names(asked.dataset, asked.root)}
    for split, chosen in samples.items() if asked.draw > 0 else ():
        asked.save.mkdir(parents=True, exist_ok=True)
        sheet = asked.save / f"{split.replace('/', '-')}.png"
        contact_sheet([draw(load_picture(s.image), s.text, [(s.box, TRUE)]) for s in spread(chosen, asked.draw)]).save(sheet)
        print(sheet)
    if asked.write:
        asked.write.parent.mkdir(parents=True, exist_ok=True)
        folder = os.path.realpath(asked.write.parent)
        save_whole(asked.write, lambda partial: partial.write_text("".join(json.dumps(
            {"image": os.path.relpath(s.image, folder), "text": s.text, "box": s.box, "split": split}) + "\n"
            for split, chosen in samples.items() for s in chosen)))

if __name__ == "__main__":
    run(main)
