"""Datasets: from names and files to batches.

    Sample, load_samples      one expression and its box, for every dataset
    shapes                    the generated default: pictures of coloured shapes, expressions that single one out
    ShapesScenes, caption     its pictures for the pretraining of tiny encoders, and captions of what is in them
    JSONL                     one's own data: {"image": "a.jpg", "text": "the red cup", "box": [x1, y1, x2, y2], "split": "train"}
    letterbox                 a picture into its padded square, with the box and the padding mask
    GroundingDataset, collate what the DataLoader uses
    draw, contact_sheet       pictures of boxes, expressions and attention

Boxes: in a Sample (x1, y1, x2, y2) in pixels of the stored image; in a batch (cx, cy, w, h) in [0, 1] of the square.
"""
import functools
import json
import math
import os
import random
import zlib
from pathlib import Path
from typing import NamedTuple, Union

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from model import InputError, one_of

# Mean and standard deviation of the pixels that an encoder was pretrained on: ImageNet's for DETR, and CLIP's own,
# which [D22] the released HiVG does not take.
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
    "testB": (30_000_000, 400, (5, 7), (2,)),         # many
}
EXPRESSIONS = 3                                       # of each scene


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
        if len(things) < counts[0] or zlib.crc32(repr((height, things)).encode()) % 8 not in residues:
            continue
        expressions = [describe(rng, things) for _ in range(EXPRESSIONS)]
        if None not in expressions:
            return height, things, expressions


# An expression is a description (colour, shape, size; None where it does not say) and one way to tell the things that
# it fits, the candidates, apart.

EXTREMES = {          # way -> (score of a thing, phrases; {} stands for the description)
    "left": (lambda t: t.x, ("the leftmost {}", "the {} furthest to the left", "the {} on the left")),
    "right": (lambda t: -t.x, ("the rightmost {}", "the {} furthest to the right", "the {} on the right")),
    "top": (lambda t: t.y, ("the topmost {}", "the highest {}", "the {} at the top")),
    "bottom": (lambda t: -t.y, ("the lowest {}", "the bottom {}", "the {} at the bottom")),
}
RELATIONS = {         # way -> (how far a thing is on that side of the anchor a, phrases; the second {} is the anchor)
    "left": (lambda t, a: a.x - t.x, ("the {} to the left of the {}", "the {} left of the {}")),
    "right": (lambda t, a: t.x - a.x, ("the {} to the right of the {}", "the {} right of the {}")),
    "above": (lambda t, a: a.y - t.y, ("the {} above the {}", "the {} higher than the {}")),
    "below": (lambda t, a: t.y - a.y, ("the {} below the {}", "the {} under the {}")),
}
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


def clearly_first(things, score, rank=0):
    """The thing of that rank by score, or None unless its score is CLEAR pixels from all others'."""
    if len(things) <= rank:
        return None
    ordered = sorted(things, key=score)
    gaps = [score(b) - score(a) for a, b in zip(ordered, ordered[1:])]
    return ordered[rank] if all(gap >= CLEAR for gap in gaps[max(rank - 1, 0):rank + 1]) else None


# Each way below returns an expression that means `target` and nothing else, or None where its random choices fail.

def by_attributes(rng, things, target):
    said = random_description(rng, target, (0.7, 0.8, 0.4))
    if any(said) and [t for t in things if fits(t, said)] == [target]:
        return "the " + words(rng, said)


def by_extreme(rng, things, target):
    said = random_description(rng, target, (0.5, 0.5, 0.2))
    candidates = [t for t in things if fits(t, said)]
    score, phrases = EXTREMES[rng.choice(list(EXTREMES))]
    if len(candidates) > 1 and clearly_first(candidates, score) is target:
        return rng.choice(phrases).format(words(rng, said))


def by_ordinal(rng, things, target):
    said = random_description(rng, target, (0.5, 0.4, 0.1))
    candidates = [t for t in things if fits(t, said)]
    way, rank = rng.choice(list(EXTREMES)), rng.randint(1, len(ORDINALS))
    score, _ = EXTREMES[way]
    ordered = sorted(candidates, key=score)
    # Everything up to the rank must be told apart, or one could not count to it.
    if len(candidates) > rank and all(clearly_first(candidates, score, k) is ordered[k] for k in range(rank + 1)) \
            and ordered[rank] is target:
        return f"the {ORDINALS[rank - 1]} {words(rng, said)} from the {way}"


def by_relation(rng, things, target):
    said = random_description(rng, target, (0.5, 0.5, 0.2))
    anchor = rng.choice([t for t in things if t is not target])
    called = random_description(rng, anchor, (0.8, 0.9, 0.4))
    candidates = [t for t in things if fits(t, said) and t is not anchor]
    distance, phrases = RELATIONS[rng.choice(list(RELATIONS))]
    on_side = [t for t in candidates if distance(t, anchor) > 0]
    if any(called) and [t for t in things if fits(t, called)] == [anchor] and len(candidates) > 1 \
            and on_side == [target] and distance(target, anchor) >= CLEAR:
        return rng.choice(phrases).format(words(rng, said), words(rng, called))


WAYS = (*[by_attributes] * 8, *[by_extreme] * 5, *[by_relation] * 4, by_ordinal)


def describe(rng, things):
    """(an expression that means exactly one of the things, that one's index), or None where 100 tries find none."""
    way = rng.choice(WAYS)
    for _ in range(100):
        target = rng.randrange(len(things))
        text = way(rng, things, things[target])
        if text:
            return text, target
    return None


def caption(rng, thing, box):
    """What a thing is, and whereabouts in its square, in words or as on a map: "small red circle top left", "blue square
    c 5". box: as in a batch. For the contrast that the tiny CLIP is pretrained by."""
    cx, cy = box[:2]
    size = rng.choice(SIZE_WORDS[thing.size]) if rng.random() < 0.7 else ""
    if rng.random() < 0.5:
        place = ("abcdefgh"[int(8 * cx)], str(1 + int(8 * cy)))
    else:
        place = ("top" if cy < 0.38 else "bottom" if cy > 0.62 else "", "left" if cx < 0.38 else "right" if cx > 0.62 else "")
    return " ".join(word for word in (size, thing.colour, thing.shape, *place) if word)


def render(number):
    """The picture of a scene, as PIL draws it."""
    height, things, _ = scene(number)
    rng = random.Random(f"paint {number}")
    ground = rng.randint(215, 245)
    picture = Image.new("RGB", (WIDTH, height), tuple(ground + rng.randint(-8, 8) for _ in range(3)))
    pen = ImageDraw.Draw(picture)
    for t in things:
        ink = tuple(max(0, min(255, c + rng.randint(-14, 14))) for c in COLOURS[t.colour])
        x, y, r = t.x, t.y, t.r
        if t.shape == "circle":
            pen.ellipse(t.box, fill=ink)
        elif t.shape == "square":
            pen.rectangle(t.box, fill=ink)
        else:
            pen.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=ink)
    return picture


def shapes_samples(split):
    first, scenes, _, _ = SHAPES_SPLITS[split]
    for number in range(first, first + scenes):
        _, things, expressions = scene(number)
        for text, target in expressions:
            yield Sample(number, text, tuple(map(float, things[target].box)), number)


class ShapesScenes(torch.utils.data.Dataset):
    """Pictures of the train split for the tiny encoders' pretraining -> image, padding, owner (Nv,), things: [(Thing, its
    box as in a batch), ...]. owner: which of the things covers a cell of the encoder's grid, -1 where none does.
    spec: of the encoder, from SIZES."""
    def __init__(self, spec, pixels, seed):
        self.first, self.count, _, _ = SHAPES_SPLITS["train"]
        self.size, self.cells, self.pixels, self.seed = spec["image_size"], spec["image_size"] // spec["stride"], pixels, seed

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        picture = render(self.first + i)
        image, padding, place = letterbox(picture, self.size, seeded(self.seed, i), self.pixels)
        owner, things = torch.full((self.cells, self.cells), -1), []
        for index, thing in enumerate(scene(self.first + i)[1]):
            cx, cy, w, h = box = to_square(thing.box, picture.size, place, self.size)
            x1, x2, y1, y2 = (round(v * self.cells) for v in (cx - w / 2, cx + w / 2, cy - h / 2, cy + h / 2))
            owner[y1:y2, x1:x2] = index                                         # cells whose centre lies in the box
            things.append((thing, box))
        return image, padding, owner.flatten(), things

    def batches(self, steps, batch):
        """images (B, 3, S, S), padding (B, S, S), owner (B, Nv), and a list of things for each picture; `steps` times."""
        order = torch.randint(len(self), (steps * batch,)).tolist()
        return torch.utils.data.DataLoader(self, batch, sampler=order, collate_fn=lambda items: [
            torch.stack(part) if torch.is_tensor(part[0]) else part for part in zip(*items)])


# --- Datasets by name ------------------------------------------------------------------------------------------------

def jsonl_samples(path, root=None):
    """Yield (split, Sample) of each line {"image", "text", "box": [x1, y1, x2, y2] in pixels, "split"} of a file.

    Image paths are relative to `root`, which is the file's own folder where it is not given.
    """
    folder = Path(root) if root else path.parent
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            item = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON in UTF-8 ({error})") from None
        if not isinstance(item, dict):
            raise InputError(f"{where}: not an object with the keys image, text, box, split")
        missing = [key for key in ("image", "text", "box", "split") if key not in item]
        if missing:
            raise InputError(f"{where}: lacks {', '.join(missing)}")
        box = item["box"]
        if not (isinstance(box, list) and len(box) == 4
                and all(type(v) in (int, float) and abs(v) < 1e9 for v in box)):           # NaN is not < 1e9 either
            raise InputError(f"{where}: box is {box}, not four numbers [x1, y1, x2, y2]")
        if box[2] <= box[0] or box[3] <= box[1]:
            raise InputError(f"{where}: box {box} has no area; it is [x1, y1, x2, y2] in pixels, x2 > x1 and y2 > y1")
        if not all(isinstance(item[key], str) and item[key].strip() for key in ("image", "text", "split")):
            raise InputError(f"{where}: image, text and split must be strings that are not empty")
        yield item["split"], Sample(folder / item["image"], item["text"], tuple(map(float, box)), item["image"])


@functools.lru_cache(maxsize=4)
def _by_split(dataset, root):
    """{split: [Sample, ...]} of a dataset, or of `shapes` {split: None}, whose splits are made one at a time."""
    if dataset == "shapes":
        return dict.fromkeys(SHAPES_SPLITS)
    path = Path(dataset)
    if path.suffix != ".jsonl":
        raise InputError(f"unknown dataset {dataset!r}: choose shapes, or the path of a FILE.jsonl")
    if not path.is_file():
        raise InputError(f"{dataset}: no such file; expected one JSON object a line, "
                         '{"image": "a.jpg", "text": "the red cup", "box": [x1, y1, x2, y2], "split": "train"}')
    if root and not Path(root).is_dir():
        raise InputError(f"--root {root}: no such folder; expected the one that the image paths in {dataset} start from")
    splits = {}
    for split, sample in jsonl_samples(path, root):
        splits.setdefault(split, []).append(sample)
    if not splits:
        raise InputError(f"{dataset}: holds no line")
    return splits


def split_names(dataset, root=None):
    """The splits of a dataset, in its own order."""
    return list(_by_split(dataset, root and str(root)))


def load_samples(dataset, split, root=None):
    """List of Sample. dataset: "shapes" or the path of a FILE.jsonl. root: the folder that holds its pictures.

    Raises InputError for an unknown dataset or split (and lists the valid ones), a missing file or folder, a bad line.
    """
    dataset = str(dataset)
    one_of(f"split of {dataset}", split, split_names(dataset, root))
    return list(shapes_samples(split)) if dataset == "shapes" else _by_split(dataset, root and str(root))[split]


# --- From a Sample to a batch ----------------------------------------------------------------------------------------

def load_picture(image):
    """A path, or a scene's number -> an RGB picture."""
    if isinstance(image, int):
        return render(image)
    try:
        return Image.open(image).convert("RGB")
    except FileNotFoundError:
        raise InputError(f"{image}: no such picture; image paths are relative to the .jsonl, or to --root") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{image}: cannot be decoded as a picture ({error})") from None


def placement(width, height, size, rng=None):
    """Where a picture lies in its square: (its width, its height, left, top) in pixels of the square.

    The long side becomes `size`; the picture is centred, or put anywhere along the short side by `rng` (training).
    """
    scale = size / max(width, height)
    w, h = max(1, round(width * scale)), max(1, round(height * scale))
    if rng is None:
        return w, h, (size - w) // 2, (size - h) // 2
    return w, h, rng.randint(0, size - w), rng.randint(0, size - h)


def letterbox(picture, size, rng=None, pixels=PIXELS["detr"]):
    """An RGB picture -> (image (3, size, size) normalised by `pixels`, padding (size, size) bool, (w, h, left, top)).

    Padding is 0 after normalisation: the mean colour.
    """
    w, h, left, top = placement(*picture.size, size, rng)
    values = np.asarray(picture.resize((w, h), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    values = (values - np.float32(pixels[0])) / np.float32(pixels[1])
    image = torch.zeros(3, size, size)
    padding = torch.ones(size, size, dtype=torch.bool)
    image[:, top:top + h, left:left + w] = torch.from_numpy(values).permute(2, 0, 1)
    padding[top:top + h, left:left + w] = False
    return image, padding, (w, h, left, top)


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
    """WordPiece with [CLS] and [SEP]: BERT's own vocabulary, or one of the words of `shapes` and single letters.

    Calling it gives at most max_tokens ids; of a longer text the end is cut, [SEP] stays.
    """

    def __init__(self, weights, name, max_tokens, vocabulary=None, flag="--text-weights"):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")          # its threads do not survive DataLoader's fork
        from transformers import AutoTokenizer, BertTokenizer
        self.max_tokens = max_tokens
        if weights == "pretrained":
            way_out = f"give a hub name or a folder by {flag}, or take --weights random or --size tiny"
            try:
                self.wordpiece = AutoTokenizer.from_pretrained(name)
            except (OSError, ValueError) as error:
                raise InputError(f"no tokenizer in {name} ({str(error).splitlines()[0]}): {way_out}") from None
            if vocabulary and len(self.wordpiece) != vocabulary:         # transformers makes an empty one where files lack
                raise InputError(f"{name}: its tokenizer has {len(self.wordpiece)} words, the text encoder {vocabulary}; are "
                                 f"tokenizer.json, vocab.txt or vocab.json with merges.txt missing there? Else {way_out}")
        else:
            said = " ".join([*COLOURS, *SHAPES, *NOUNS, *ORDINALS, "to from", *sum(SIZE_WORDS.values(), ()),
                             *EXTREMES, *(p for _, ways in (*EXTREMES.values(), *RELATIONS.values()) for p in ways)])
            letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
            pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters if c.isalnum()),
                      *sorted(set(said.replace("{}", "").split()))]
            self.wordpiece = BertTokenizer(vocab={piece: i for i, piece in enumerate(dict.fromkeys(pieces))})
        self.pad, self.mask = self.wordpiece.pad_token_id, self.wordpiece.mask_token_id

    def __call__(self, text):
        return self.wordpiece(text, truncation=True, max_length=self.max_tokens)["input_ids"]


def seeded(*key):
    """A random.Random of its own for each key: what is drawn for a sample depends on nothing that was drawn before."""
    return random.Random(" ".join(map(str, key)))


class GroundingDataset(torch.utils.data.Dataset):
    """Samples as tensors. size: the square's side in pixels. train: put the picture at a random place of its square,
    drawn from seed and index alone, so that neither workers nor a resumed run change what is seen. [D32]"""

    def __init__(self, samples, size, tokenizer, train=False, seed=0, pixels=PIXELS["detr"]):
        self.samples, self.size, self.tokenizer, self.train, self.seed, self.pixels = samples, size, tokenizer, train, seed, pixels

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        sample = self.samples[i]
        picture = load_picture(sample.image)
        rng = seeded(self.seed, i) if self.train else None
        image, padding, place = letterbox(picture, self.size, rng, self.pixels)
        box = to_square(sample.box, picture.size, place, self.size)
        if box[2] <= 0 or box[3] <= 0:
            raise InputError(f"{sample.image}: box {list(sample.box)} of {sample.text!r} lies outside the picture, which "
                             f"is {picture.width} x {picture.height}")
        return image, padding, self.tokenizer(sample.text), box, i


def collate(items, pad):
    """Items -> {images (B, 3, S, S), image_padding (B, S, S), tokens (B, T), token_padding (B, T), boxes (B, 4), index (B,)},
    T the longest text of the batch. pad: the tokenizer's padding id."""
    images, padding, texts, boxes, index = zip(*items)
    lengths = torch.tensor([len(t) for t in texts])
    tokens = torch.full((len(texts), int(lengths.max())), pad)
    for row, text in zip(tokens, texts):
        row[:len(text)] = torch.tensor(text)
    return dict(images=torch.stack(images), image_padding=torch.stack(padding), tokens=tokens,
                token_padding=torch.arange(tokens.shape[1]) >= lengths[:, None],
                boxes=torch.tensor(boxes, dtype=torch.float32), index=torch.tensor(index))


# --- Pictures --------------------------------------------------------------------------------------------------------

TRUE, PREDICTED, WARM = (0, 130, 40), (220, 0, 90), (255, 140, 0)


def spread(samples, count=12):
    """Some of the samples, from all over the list."""
    return samples[::max(1, len(samples) // count)][:count]


def draw(picture, caption, boxes, attention=None, side=256):
    """A tile: the picture at `side` pixels, boxes [(box in its pixels, colour), ...], a caption below, and attention,
    a (rows, columns) array over the letterboxed square, as warmth."""
    scale = side / max(picture.size)
    w, h, left, top = placement(*picture.size, side)
    view = picture.resize((w, h), Image.Resampling.BICUBIC)
    if attention is not None:
        heat = Image.fromarray(np.uint8(255 * attention / attention.max()))
        heat = heat.resize((side, side), Image.Resampling.BICUBIC).crop((left, top, left + w, top + h))
        view = Image.composite(Image.new("RGB", view.size, WARM), view, heat.point(lambda v: v * 3 // 4))
    pen, font = ImageDraw.Draw(view), ImageFont.load_default(13)
    for box, colour in boxes:
        pen.rectangle([v * scale for v in box], outline=colour, width=3)
    lines, line = [], ""
    for word in caption.split():
        if pen.textlength(f"{line} {word}", font) > side - 8 and line:
            lines, line = lines + [line], word
        else:
            line = f"{line} {word}".strip()
    tile = Image.new("RGB", (side, side + 36), "white")
    tile.paste(view, (left, top))
    ImageDraw.Draw(tile).text((4, side + 2), "\n".join([*lines, line][:2]), "black", font)
    return tile


def contact_sheet(tiles, columns=4):
    """Tiles of one size, side by side."""
    w, h = tiles[0].size
    sheet = Image.new("RGB", (columns * (w + 8), math.ceil(len(tiles) / columns) * (h + 8)), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % columns * (w + 8) + 4, i // columns * (h + 8) + 4))
    return sheet
