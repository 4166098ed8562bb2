"""Make the dataset `shapes`: what is in each scene, and the expressions about it.

    python assets/make_shapes.py              write both files beside this script
    python assets/make_shapes.py --out DIR    write them into another folder

    shapes.jsonl.gz        one scene a line, in the order of the splits and of the scenes' numbers:
                           {"split": "val", "scene": 10000000, "height": 104,
                            "objects": [[colour, shape, x, y, r], ...],
                            "expressions": [[text, index of the object that is meant], ...]}
    tiny-tokenizer.json    BERT's WordPiece tokenizer with the words of these expressions

The centre of an object is (x, y), in pixels from the left and from the top, and its bounding box is
(x - r, y - r, x + r, y + r). Each image is 128 pixels wide. A scene depends on its number alone, so
this script always writes the same files. data.py reads them and draws the scenes.
"""
import argparse
import gzip
import itertools
import json
import random
import zlib
from collections import namedtuple
from pathlib import Path

import tokenizers

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle")
NOUNS = ("shape", "object")    # used where an expression names no shape
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
RADII = {"small": (11, 14), "large": (19, 24)}    # least and greatest r of an object, in pixels
WIDTH = 128                                       # of each image, in pixels
HEIGHTS = (96, 128)                               # least and greatest height of an image
# Two objects must differ by so many pixels before an expression may rest on which of them is
# further left, right, up or down.
CLEAR = 10

# The kinds of expressions. Each is drawn as often as it is repeated.
KINDS = 8 * ["attributes"] + 5 * ["side"] + 4 * ["relation"] + ["ordinal"]
# The probabilities that an expression names the colour, the shape and the size of its target.
CHANCES = {"attributes": (0.7, 0.8, 0.4), "side": (0.5, 0.5, 0.2), "relation": (0.5, 0.5, 0.2),
           "ordinal": (0.5, 0.4, 0.1)}
ORDINALS = ("second", "third", "fourth")
SUPERLATIVES = {
    "left": ("the leftmost {}", "the {} furthest to the left", "the {} on the left"),
    "right": ("the rightmost {}", "the {} furthest to the right", "the {} on the right"),
    "top": ("the topmost {}", "the highest {}", "the {} at the top"),
    "bottom": ("the lowest {}", "the bottom {}", "the {} at the bottom")}
COMPARATIVES = {
    "left": ("the {} to the left of the {}", "the {} left of the {}"),
    "right": ("the {} to the right of the {}", "the {} right of the {}"),
    "top": ("the {} above the {}", "the {} higher than the {}"),
    "bottom": ("the {} below the {}", "the {} under the {}")}
SIDES = list(SUPERLATIVES)

# The checksum of a scene covers the name "Thing" and those of the fields. They must stay.
Object = namedtuple("Thing", "colour shape size x y r")
Scene = namedtuple("Scene", "height objects expressions")    # expressions: [(text, index), ...]

# A split has `scenes` scenes, counted from the number `first`, with the least and the greatest
# number of objects. Each residue of the checksum modulo 8 belongs to one split alone, so no scene
# can appear in two splits.
Split = namedtuple("Split", "first scenes objects residues")
SPLITS = {
    # A few scenes have one object. Where it is can be learnt without knowing which one is meant.
    "train": Split(5_000_000, 8000, objects=(1, 5), residues=(3, 4, 5, 6, 7)),
    "val": Split(10_000_000, 400, objects=(2, 5), residues=(0,)),
    # Like RefCOCO's, the two test splits differ: testA has few distractors, and testB has many.
    "testA": Split(20_000_000, 400, objects=(2, 3), residues=(1,)),
    "testB": Split(30_000_000, 400, objects=(5, 7), residues=(2,))}
# pretrain_tiny.py pretrains the tiny encoders on these scenes, which are in no split.
PRETEXT = Split(0, 8000, objects=(2, 5), residues=(3, 4, 5, 6, 7))


def scene(number):
    """Return the Scene that has this number, always the same one."""
    splits = [PRETEXT, *SPLITS.values()]
    split = max(split for split in splits if split.first <= number)    # the last one that has begun
    rng = random.Random(number)

    while True:    # until a scene belongs to the split and can be described
        height = rng.randint(*HEIGHTS)
        objects = random_objects(rng, height, rng.randint(*split.objects))
        if len(objects) < split.objects[0]:
            continue
        checksum = zlib.crc32(repr((height, objects)).encode())    # of the whole content
        if checksum % 8 not in split.residues:
            continue
        expressions = [random_expression(rng, objects) for _ in range(3)]
        if None not in expressions:
            return Scene(height, objects, expressions)


def random_objects(rng, height, count):
    """Return at most `count` objects that do not touch each other, in at most three colours."""
    colours = rng.sample(sorted(COLOURS), 3)
    objects = []
    for _ in range(count):
        for _ in range(20):    # tries to find a free place for one more object
            size = "large" if rng.random() < 0.35 else "small"
            r = rng.randint(*RADII[size])
            x = rng.randint(r + 1, WIDTH - r - 2)
            y = rng.randint(r + 1, height - r - 2)
            if all(max(abs(x - other.x), abs(y - other.y)) > r + other.r + 2 for other in objects):
                colour = rng.choice(colours)
                shape = rng.choice(SHAPES)
                objects.append(Object(colour, shape, size, x, y, r))
                break
    return objects


def random_attributes(rng, obj, chances):
    """Return [colour, shape, size] of an object, with None in place of what is not to be named."""
    return [value if rng.random() < chance else None for value, chance in zip(obj, chances)]


def fits(obj, named):
    """Return whether an object has all the attributes that are named."""
    return all(name in (None, value) for name, value in zip(named, obj))


def words(rng, named):
    """Put attributes into words, for example "little red circle" or "blue object"."""
    colour, shape, size = named
    noun = shape or rng.choice(NOUNS)
    size_word = size and rng.choice(SIZE_WORDS[size])
    return " ".join(word for word in (size_word, colour, noun) if word)


def distance(obj, side):
    """Return a number that is the greater the further an object lies from a side of the image."""
    return {"left": obj.x, "right": -obj.x, "top": obj.y, "bottom": -obj.y}[side]


def is_clearly_at_rank(rank, target, candidates, side):
    """Return whether the target has this rank among the candidates, counted from a side, and nobody
    can doubt it: from the first candidate to the one behind the target, each lies at least CLEAR
    pixels further from the side than the one before it."""
    distances = sorted(distance(obj, side) for obj in candidates)
    if len(distances) <= max(rank, 1) or distances[rank] != distance(target, side):
        return False
    return all(b - a >= CLEAR for a, b in itertools.pairwise(distances[:rank + 2]))


def by_relation(rng, objects, target, named, candidates):
    """Single the target out by its position to another object, the anchor."""
    anchor = rng.choice([obj for obj in objects if obj != target])
    anchor_named = random_attributes(rng, anchor, (0.8, 0.9, 0.4))
    side = rng.choice(SIDES)

    # What is named of the anchor must fit the anchor alone.
    if not any(anchor_named) or [obj for obj in objects if fits(obj, anchor_named)] != [anchor]:
        return None
    # Of at least two candidates other than the anchor, the target alone must lie on that side.
    others = [obj for obj in candidates if obj != anchor]
    nearer = [obj for obj in others if distance(obj, side) < distance(anchor, side)]
    if len(others) < 2 or nearer != [target]:
        return None
    if distance(anchor, side) - distance(target, side) < CLEAR:
        return None
    return rng.choice(COMPARATIVES[side]).format(words(rng, named), words(rng, anchor_named))


def single_out(kind, rng, objects, target):
    """Return an expression that fits the target and no other object, or None if the random choices
    do not lead to one. It names attributes of the target and, if several objects have them (the
    candidates), adds what tells the target apart from the other candidates."""
    named = random_attributes(rng, target, CHANCES[kind])
    candidates = [obj for obj in objects if fits(obj, named)]
    if kind == "attributes":    # such as "the small red circle"
        if any(named) and candidates == [target]:
            return "the " + words(rng, named)
    elif kind == "side":        # such as "the leftmost circle"
        side = rng.choice(SIDES)
        if is_clearly_at_rank(0, target, candidates, side):
            return rng.choice(SUPERLATIVES[side]).format(words(rng, named))
    elif kind == "ordinal":     # such as "the second circle from the left"
        side = rng.choice(SIDES)
        rank = rng.randint(1, len(ORDINALS))
        if is_clearly_at_rank(rank, target, candidates, side):
            return f"the {ORDINALS[rank - 1]} {words(rng, named)} from the {side}"
    elif len(objects) > 1:      # such as "the circle above the red square"
        return by_relation(rng, objects, target, named, candidates)
    return None


def random_expression(rng, objects):
    """Return (text, index of the object that it means), or None if 100 tries lead to none."""
    kind = rng.choice(KINDS)
    for _ in range(100):
        index = rng.randrange(len(objects))
        text = single_out(kind, rng, objects, objects[index])
        if text is not None:
            return text, index
    return None


def write_scenes(path):
    # Without a time and a file name in its header, the file has the same bytes each time.
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
        for name, split in SPLITS.items():
            for number in range(split.first, split.first + split.scenes):
                height, objects, expressions = scene(number)
                drawn = [[obj.colour, obj.shape, obj.x, obj.y, obj.r] for obj in objects]
                line = {"split": name, "scene": number, "height": height, "objects": drawn,
                        "expressions": expressions}
                file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")


def write_tokenizer(path):
    """Write a tokenizer that knows all words of the expressions, and spells any other word. None of
    its tokens is marked as special, so that a text with "[SEP]" in it makes no [SEP] token."""
    phrases = ["to", "from", *COLOURS, *SHAPES, *NOUNS, *ORDINALS, *SIDES]
    for table in (SIZE_WORDS, SUPERLATIVES, COMPARATIVES):
        for synonyms in table.values():
            phrases += synonyms
    known_words = set(" ".join(phrases).replace("{}", "").split())
    characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]    # of ASCII
    inner_characters = ["##" + c for c in characters if c.isalnum()]    # not the first of a word

    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens += characters + inner_characters + sorted(known_words)
    ids = {token: number for number, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(
        ("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))    # the end of a text, and its beginning
    tokenizer.save(str(path))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, metavar="DIR",
                        help="folder for the files (default: that of this script)")
    parser.add_argument("--force", action="store_true", help="overwrite files that are there")
    asked = parser.parse_args()

    files = {asked.out / "shapes.jsonl.gz": write_scenes,
             asked.out / "tiny-tokenizer.json": write_tokenizer}
    for path in files:
        if path.exists() and not asked.force:
            parser.error(f"{path} is there already: give another --out, or --force to overwrite it")
    asked.out.mkdir(parents=True, exist_ok=True)
    for path, write in files.items():
        write(path)
        print(path)


if __name__ == "__main__":
    main()
