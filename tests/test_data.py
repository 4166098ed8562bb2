"""data.py: the meaning of each expression, the splits, the formats, the geometry, the downloads."""
import functools
import http.server
import json
import os
import pickle
import random
import re
import stat
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from safetensors.torch import save_file

import data
from data import InputError

DETR = data.PIXELS["detr"]


# -------------------------------------------------------------------------------------------------
# shapes: an independent reader of its expressions

SIZES = {"small": "small", "little": "small", "large": "large", "big": "large"}

# side: the phrases about the object nearest to it, with the description as their group
SUPERLATIVES = {
    "left": r"leftmost (.+)|(.+) furthest to the left|(.+) on the left",
    "right": r"rightmost (.+)|(.+) furthest to the right|(.+) on the right",
    "top": r"topmost (.+)|highest (.+)|(.+) at the top",
    "bottom": r"lowest (.+)|bottom (.+)|(.+) at the bottom",
}
COMPARATIVES = {"to the left of": "left", "left of": "left",
                "to the right of": "right", "right of": "right",
                "above": "top", "higher than": "top",
                "below": "bottom", "under": "bottom"}
ORDINALS = ("second", "third", "fourth")


def distance(thing, side):
    """How far an object's centre is from a side, up to a constant."""
    if side == "left":
        return thing.x
    if side == "right":
        return -thing.x
    if side == "top":
        return thing.y
    return -thing.y


def described(phrase, things):
    """Return the objects that fit "small red circle" or "blue shape", read word by word."""
    for word in phrase.split():
        if word in ("red", "green", "blue", "yellow"):
            things = [thing for thing in things if thing.colour == word]
        elif word in ("circle", "square", "triangle"):
            things = [thing for thing in things if thing.shape == word]
        elif word in SIZES:
            things = [thing for thing in things if thing.size == SIZES[word]]
        else:
            assert word in ("shape", "object"), f"{word!r} in {phrase!r}"
    return things


def meant(text, things):
    """Return every object that an expression may mean, from its words alone, as a reader would."""
    text = text.removeprefix("the ")

    match = re.fullmatch(r"(second|third|fourth) (.+) from the (left|right|top|bottom)", text)
    if match:
        rank = ORDINALS.index(match[1]) + 1
        return at_rank(rank, described(match[2], things), match[3])

    match = re.fullmatch(rf"(.+?) ({'|'.join(COMPARATIVES)}) the (.+)", text)
    if match:
        anchor, = described(match[3], things)   # exactly one object must fit the anchor's words
        side = COMPARATIVES[match[2]]
        return [thing for thing in described(match[1], things)
                if thing != anchor and distance(thing, side) < distance(anchor, side)]

    for side, pattern in SUPERLATIVES.items():
        match = re.fullmatch(pattern, text)
        if match:
            phrase, = [group for group in match.groups() if group]
            return at_rank(0, described(phrase, things), side)
    return described(text, things)


def at_rank(rank, candidates, side):
    """Return the candidates that share the given rank, counted from a side."""
    if rank >= len(candidates):
        return []
    distances = sorted(distance(thing, side) for thing in candidates)
    return [thing for thing in candidates if distance(thing, side) == distances[rank]]


def float_box(thing):
    return tuple(float(v) for v in thing.box)


# -------------------------------------------------------------------------------------------------
# shapes

@pytest.fixture(scope="module")
def samples():
    return {split: data.load_samples("shapes", split) for split in data.SHAPES_SPLITS}


def test_a_limit_takes_the_first_samples_and_makes_no_other_scene(samples, monkeypatch):
    """Three expressions a scene: seven samples need three scenes."""
    made = []
    scene = data.scene
    monkeypatch.setattr(data, "scene", lambda number: made.append(number) or scene(number))
    assert data.load_samples("shapes", "train", limit=7) == samples["train"][:7]
    assert len(made) == 3
    assert data.load_samples("shapes", "val", limit=10_000) == samples["val"]


def test_every_expression_means_its_object_and_no_other(samples):
    """Each expression of each split fits exactly one object, and the sample's box is its box."""
    checked = 0
    for split in samples:
        for sample in samples[split]:
            things = data.scene(sample.image).things
            boxes = [float_box(thing) for thing in meant(sample.text, things)]
            assert boxes == [sample.box], (sample, things)
            checked += 1
    assert checked == 24_000 + 3 * 1200


@pytest.mark.parametrize("pattern", [
    "red|green|blue|yellow", "circle|square|triangle", "small|little|large|big",
    "left|right|most|top|bottom", " of the | above | below | under | higher than ",
    "second|third"])
def test_every_kind_of_word_occurs_in_expressions(samples, pattern):
    """More than 2 % of the training expressions contain words of each kind."""
    texts = [sample.text for sample in samples["train"]]
    share = np.mean([re.search(pattern, text) is not None for text in texts])
    assert share > 0.02


def test_expressions_are_varied(samples):
    """The training expressions include more than 3000 different texts."""
    assert len({sample.text for sample in samples["train"]}) > 3000


def test_colour_alone_does_not_solve_the_task(samples):
    """Guessing among all objects of the first colour that is named is right in less than 65 %."""
    right = 0.0
    for sample in samples["val"]:
        guesses = data.scene(sample.image).things
        colours = re.findall("red|green|blue|yellow", sample.text)
        if colours:
            guesses = [thing for thing in guesses if thing.colour == colours[0]]
        hits = [float_box(thing) == sample.box for thing in guesses]
        right += sum(hits) / len(guesses)
    assert right / len(samples["val"]) < 0.65


def scene_content(number):
    """A scene's picture, whatever the order in which its objects are listed."""
    height, things, _ = data.scene(number)
    return height, tuple(sorted(things))


def test_no_scene_is_in_two_splits(samples):
    """No two splits share a picture, and no two splits share a residue of the checksum."""
    contents = {}
    for split in samples:
        contents[split] = {scene_content(sample.image) for sample in samples[split]}
    names = list(contents)
    for i, first in enumerate(names):
        for second in names[i + 1:]:
            assert not contents[first] & contents[second]

    residues = [residue for split in data.SHAPES_SPLITS.values() for residue in split.residues]
    assert len(residues) == len(set(residues))


def test_testa_has_few_distractors_and_testb_has_many(samples):
    """Each picture of testA has fewer objects than each picture of testB."""
    counts = {}
    for split in ("testA", "testB"):
        counts[split] = [len(data.scene(sample.image).things) for sample in samples[split]]
    assert max(counts["testA"]) < min(counts["testB"])


def test_scenes_are_functions_of_their_number():
    """A scene and its picture do not depend on the cache or on Python's global random state."""
    first_scene = data.scene(5)
    first_picture = np.asarray(data.render(5))
    data.scene.cache_clear()
    random.seed(99)
    assert data.scene(5) == first_scene
    assert np.array_equal(np.asarray(data.render(5)), first_picture)


def test_pictures_show_what_the_scene_says():
    """Each object is painted in its colour and fills its box, and outside of all boxes there is
    only background."""
    for number in range(100):
        things = data.scene(number).things
        pixels = np.asarray(data.render(number)).astype(int)   # (height, width, 3)
        outside = np.ones(pixels.shape[:2], bool)
        for thing in things:
            paint = pixels[thing.y, thing.x]
            errors = {name: np.abs(paint - rgb).sum() for name, rgb in data.COLOURS.items()}
            assert min(errors, key=errors.get) == thing.colour

            x1, y1, x2, y2 = thing.box
            assert x1 >= 0 and y1 >= 0
            assert x2 < pixels.shape[1] and y2 < pixels.shape[0]
            outside[y1:y2 + 1, x1:x2 + 1] = False

            # The box is tight around this object's paint.
            painted = np.argwhere((pixels == paint).all(-1) & ~outside)           # (pixels, 2)
            near = np.abs(painted - [thing.y, thing.x]) <= thing.r
            painted = painted[near.all(1)]
            top, left = painted.min(0)
            bottom, right = painted.max(0)
            assert np.abs(np.array([left, top, right, bottom]) - thing.box).max() <= 1
        assert pixels[outside].min() > 200


# -------------------------------------------------------------------------------------------------
# Geometry

@pytest.mark.parametrize("size", [(128, 96), (60, 128), (100, 100), (1, 50), (640, 427)])
@pytest.mark.parametrize("seed", [None, 3])
def test_letterbox_keeps_the_picture_and_its_box(size, seed):
    """The square holds the scaled picture, zeros elsewhere, and the box at the same part of it."""
    width, height = size
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    rng = random.Random(seed) if seed else None
    image, padding, place = data.letterbox(picture, 64, rng)
    w, h, left, top = place

    assert max(w, h) == 64
    assert (~padding).sum() == w * h
    if padding.any():
        assert image[:, padding].abs().max() == 0

    scaled = np.asarray(picture.resize((w, h), Image.Resampling.BILINEAR)) / 255
    shown = image[:, top:top + h, left:left + w].permute(1, 2, 0).numpy()   # (h, w, 3)
    assert np.abs(shown * np.array(DETR.std) + DETR.mean - scaled).max() < 1e-5

    box = (0.1 * width, 0.2 * height, 0.7 * width, 0.9 * height)
    cx, cy, box_w, box_h = data.to_square(box, picture.size, place, 64)
    assert (cx - box_w / 2) * 64 == pytest.approx(left + 0.1 * w)
    assert (cy + box_h / 2) * 64 == pytest.approx(top + 0.9 * h)
    if seed is None:
        back = data.from_square((cx, cy, box_w, box_h), picture.size, 64)
        assert back == pytest.approx(box, abs=1e-6)


@pytest.mark.parametrize("size", [(128, 96), (60, 128), (1, 50)])
def test_letterbox_is_torchvisions_bit_for_bit(size):
    """to_tensor, normalize and pad of torchvision give the same image and padding."""
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    image, padding, (width, height, left, top) = data.letterbox(picture, 64, random.Random(3))
    scaled = picture.resize((width, height), Image.Resampling.BILINEAR)
    edges = [left, top, 64 - width - left, 64 - height - top]
    theirs = TF.normalize(TF.to_tensor(scaled), DETR.mean, DETR.std)
    assert torch.equal(image, TF.pad(theirs, edges))
    shown = torch.zeros(height, width, dtype=torch.bool)
    assert torch.equal(padding, TF.pad(shown, edges, fill=True))


@pytest.mark.parametrize("size", [64, 200])
def test_a_scene_that_is_kept_gives_the_same_picture_each_time(samples, size):
    """Scenes are drawn once where that keeps little memory; the picture is that of letterbox."""
    data.scaled_scene.cache_clear()
    first = samples["val"][:20]
    dataset = data.GroundingDataset(first, size, data.Tokenizer(20), DETR)
    for _ in range(2):
        for index, sample in enumerate(first):
            picture = data.load_picture(sample.image)
            image, padding, place = data.letterbox(picture, size, pixels=DETR)
            item = dataset[index]
            assert torch.equal(item.image, image)
            assert torch.equal(item.padding, padding)
            box = data.to_square(sample.box, picture.size, place, size)
            assert torch.equal(torch.as_tensor(item.box), torch.as_tensor(box))
            item.image.zero_()    # a user of an item may change it
    kept = data.scaled_scene.cache_info()
    drawn = len({sample.image for sample in first}) if size == 64 else 0
    assert kept.misses == drawn


def first_rows(samples, seed, train):
    """The first row of each square that shows a part of the picture."""
    dataset = data.GroundingDataset(samples, 64, data.Tokenizer(20), DETR, train, seed)
    rows = []
    for i in range(len(samples)):
        shown = (~dataset[i].padding).float().amax(1)   # (64,): 1 where a row shows the picture
        rows.append(int(shown.argmax()))
    return rows


def test_training_puts_pictures_at_random_places_that_the_seed_decides(samples):
    """Places depend on the seed in training, and on nothing in evaluation."""
    first = samples["val"][:30]
    assert first_rows(first, 1, train=True) == first_rows(first, 1, train=True)
    assert first_rows(first, 1, train=True) != first_rows(first, 2, train=True)
    assert first_rows(first, 1, train=False) == first_rows(first, 2, train=False)


def test_a_batch_pads_texts_to_its_longest(samples):
    """A batch is as wide as its longest text, and token_padding is True behind each shorter one."""
    tokenizer = data.Tokenizer(20)
    dataset = data.GroundingDataset(samples["val"], 64, tokenizer, DETR)
    batch = data.collate([dataset[i] for i in range(5)], tokenizer.pad)
    lengths = [len(tokenizer(sample.text)) for sample in samples["val"][:5]]
    assert batch["tokens"].shape == (5, max(lengths))
    assert (~batch["token_padding"]).sum(1).tolist() == lengths
    assert (batch["tokens"][batch["token_padding"]] == tokenizer.pad).all()
    assert batch["images"].shape == (5, 3, 64, 64)
    assert batch["boxes"].shape == (5, 4)


# -------------------------------------------------------------------------------------------------
# Tokenizers

def test_tokenizer_reads_shapes_word_by_word_and_anything_else_in_pieces(samples):
    """A word of `shapes` is one token, other ASCII words are letters, and long texts keep [SEP]."""
    tokenizer = data.Tokenizer(12)
    assert tokenizer.wordpiece.get_vocab_size() <= 256   # the vocabulary of the tiny text encoder
    for sample in samples["val"]:
        assert len(tokenizer(sample.text)) == min(12, len(sample.text.split()) + 2)

    long = tokenizer("a zebra crossing, seen from the left and from the right and from above")
    assert len(long) == 12
    assert long[-1] == tokenizer.wordpiece.token_to_id("[SEP]")
    unknown = tokenizer.wordpiece.token_to_id("[UNK]")
    assert unknown not in tokenizer("Zebra no. 7?")
    assert unknown in tokenizer("猫")


def test_the_tokenizer_of_shapes_is_berts(samples):
    """transformers' BertTokenizer with the same vocabulary gives the same ids, also of odd texts."""
    from transformers import BertTokenizer
    tokenizer = data.Tokenizer(12)
    reference = BertTokenizer(vocab=tokenizer.wordpiece.get_vocab())
    odd = ["", "  The RED\tcircle ", "don't, no. 7?", "猫 café", "e\u0301te\u0301", "red\u200bcup\x00",
           "[SEP] red [MASK]", "a zebra crossing, seen from the left and from the right"]
    for text in [*odd, *(sample.text for sample in samples["val"])]:
        expected = reference(text, split_special_tokens=True, truncation=True, max_length=12)
        assert tokenizer(text) == expected["input_ids"]
    assert (tokenizer.pad, tokenizer.mask) == (reference.pad_token_id, reference.mask_token_id)


@pytest.mark.parametrize("encoder, flag", [("clip", "--clip-weights"), ("bert", "--text-weights")])
def test_a_folder_with_weights_but_without_the_tokenizers_files_is_an_error(
        tmp_path, encoder, flag):
    """For such a folder transformers makes an empty vocabulary, which would hide every word."""
    import transformers
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 16}
    if encoder == "clip":
        text_config = {**small, "vocab_size": 60, "eos_token_id": 59, "bos_token_id": 58}
        config = transformers.CLIPConfig(text_config=text_config, vision_config=small)
        model = transformers.CLIPModel(config)
    else:
        model = transformers.BertModel(transformers.BertConfig(**small))
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=flag):
        data.Tokenizer(20, str(tmp_path), 49408, flag)


CLIP_SIGNS = "redcupthfisndoax's|<>[]&\""


@pytest.fixture
def clip_tokenizer(tmp_path):
    """CLIP's tokenizer with a few letters and signs, and one word: "red"."""
    from transformers import CLIPTokenizer
    pieces = ["<|startoftext|>", "<|endoftext|>"]
    for sign in sorted(set(CLIP_SIGNS)):
        pieces += [sign, sign + "</w>"]
    pieces += ["re", "red</w>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    folder = tmp_path / "clip"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    (folder / "config.json").write_text(json.dumps({"model_type": "clip"}))
    saved = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    saved.save_pretrained(folder)
    return data.Tokenizer(40, str(folder), len(pieces), "--clip-weights")


def pieces_of(tokenizer, text):
    return tokenizer.wordpiece.convert_ids_to_tokens(tokenizer(text))


def test_clips_tokenizer_lowers_and_keeps_its_ends(clip_tokenizer):
    """CLIP's tokenizer ignores case and begins and ends each text with one token, cut or not."""
    clip_tokenizer.max_tokens = 5
    assert clip_tokenizer("RED cup") == clip_tokenizer("red cup")
    assert len(clip_tokenizer("red cup red cup")) == 5
    for text in ("red", "red cup red cup"):
        ids = clip_tokenizer(text)
        assert (ids[0], ids[-1]) == (0, 1)
        assert ids.count(1) == 1
    assert pieces_of(clip_tokenizer, "red") == ["<|startoftext|>", "red</w>", "<|endoftext|>"]


# What CLIP's authors' own tokenizer makes of odd texts before it cuts them into pieces.
MENDED = [
    ("Don\u2019t", "Don't"),
    ("caf\u00e9\u2019s \u201cmenu\u201d", "caf\u00e9's \"menu\""),
    ("\u201athe\u2018 \u201ecup\u201f", "'the' \"cup\""),
    ("R&amp;B", "R&B"),
    ("R&amp;amp;B", "R&B"),
    ("man&#39;s &quot;stop&quot;", "man's \"stop\""),
    ("it&rsquo;s", "it's"),
    ("&lt;red&gt;", "<red>"),
    ("\ufb01sh, o\ufb03ce, \ufb02ag", "fish, office, flag"),
    ("\uff33\uff34\uff2f\uff30\u3000\uff11", "STOP 1"),
    ("\u00bd of it \u2014 na\u00efve\u2026", "\u00bd of it \u2014 na\u00efve\u2026"),
]


@pytest.mark.parametrize("odd, plain", MENDED)
def test_texts_are_mended_as_before_clips_pretraining(odd, plain):
    """Curly quotes, entities, ligatures and full-width characters become plain, nothing else."""
    assert data.mend(odd) == plain


def test_clips_tokenizer_mends_a_text(clip_tokenizer):
    """An odd text and its plain form have the same tokens, none of which is unknown."""
    for odd, plain in (("Don\u2019t", "don't"), ("\u201c\ufb01sh\u201d", '"fish"'),
                       ("&lt;red&gt; &amp;amp; cup", "<red> & cup")):
        ids = clip_tokenizer(odd)
        assert ids == clip_tokenizer(plain)
        assert ids.count(1) == 1   # the end, which is the token of what is unknown, too


@pytest.fixture
def bert_tokenizer(tmp_path):
    """BERT's tokenizer with a few words and signs. Like the real one it knows curly quotes."""
    from transformers import BertTokenizer
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "don", "t", "'", "\u2019", "&", "amp",
              ";", "[", "]", "sep", "cls", "mask", "red"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    return data.Tokenizer(40, str(folder), len(pieces))


def test_berts_tokenizer_takes_a_text_as_it_is(bert_tokenizer):
    """BERT's pretraining has read curly quotes, which its vocabulary has."""
    assert pieces_of(bert_tokenizer, "Don\u2019t") == ["[CLS]", "don", "\u2019", "t", "[SEP]"]
    assert pieces_of(bert_tokenizer, "&amp;") == ["[CLS]", "&", "amp", ";", "[SEP]"]


def test_no_text_makes_a_special_token(clip_tokenizer, bert_tokenizer):
    """A text may spell the names of special tokens: they are cut into pieces like other words."""
    words = "[ sep ] red [ cls ] [ mask ]".split()
    assert pieces_of(bert_tokenizer, "[SEP] red [CLS] [MASK]") == ["[CLS]", *words, "[SEP]"]

    for text in ("<|endoftext|> red", "<|startoftext|> red", "red &lt;|endoftext|&gt;"):
        ids = clip_tokenizer(text)
        assert (ids[0], ids[-1]) == (0, 1)
        assert 0 not in ids[1:-1] and 1 not in ids[1:-1]
        assert len(ids) > 10   # the letters

    shapes = data.Tokenizer(20)
    special = {shapes.wordpiece.token_to_id(name) for name in ("[PAD]", "[CLS]", "[SEP]", "[MASK]")}
    assert not special & set(shapes("red [SEP] [PAD] [CLS] [MASK]")[1:-1])


@pytest.mark.parametrize("stored, side, decoded", [
    ((640, 427), 224, (320, 214)), ((640, 427), 320, (320, 214)), ((640, 427), 321, (640, 427)),
    ((1200, 1600), 200, (150, 200)), ((1200, 1600), 224, (300, 400)), ((100, 60), 224, (100, 60))])
def test_a_jpeg_is_decoded_no_smaller_than_asked(tmp_path, stored, side, decoded):
    """Of a JPEG and its halves the smallest that is large enough; a PNG comes as it is."""
    noise = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize(stored)
    picture.save(tmp_path / "a.jpg", quality=95)
    picture.save(tmp_path / "a.png")
    box = (0.25 * stored[0], 0.5 * stored[1], 0.75 * stored[0], stored[1])
    draft, boxes = data.load_draft(tmp_path / "a.jpg", [box], side)
    assert draft.size == decoded
    assert boxes == [pytest.approx((0.25 * decoded[0], 0.5 * decoded[1], 0.75 * decoded[0], decoded[1]))]
    assert data.load_picture(tmp_path / "a.jpg").size == stored
    assert data.load_draft(tmp_path / "a.png", [box], side) == (picture, [pytest.approx(box)])


@pytest.mark.parametrize("train", [False, True])
def test_draft_changes_pixels_slightly_and_boxes_by_a_pixel_at_most(tmp_path, train, monkeypatch):
    """The square and the box of a large JPEG are about those of the whole picture. Training asks for
    twice the side of the square, as a crop may keep a half of the picture."""
    asked = []

    def load(image, upright=False, at_least=None):
        asked.append(at_least)
        return load_picture(image, upright, at_least)

    load_picture = data.load_picture
    monkeypatch.setattr(data, "load_picture", load)
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
    smooth.resize((1601, 1203), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", quality=95)
    sample = data.Sample(tmp_path / "a.jpg", "the cup on the left", (100, 200, 900, 1100), 1)
    items = []
    for draft in (False, True):
        dataset = data.GroundingDataset([sample], 224, data.Tokenizer(20), DETR, train, seed=3,
                                        augmented=True, draft=draft)
        items.append(dataset[0])
    whole, draft = items
    assert not torch.equal(whole.image, draft.image)
    assert (whole.image - draft.image).abs().mean() < 0.05    # a standard deviation is 1
    assert draft.box == pytest.approx(whole.box, abs=2 / 224)
    assert asked == [None, 448 if train else 224]


# -------------------------------------------------------------------------------------------------
# JSONL

GOOD = {"image": "a.png", "text": "the red cup", "box": [1, 2.5, 30, 20], "split": "train"}


def write(path, *lines):
    """Write a .jsonl file; a line is an object or the text of the line itself."""
    texts = []
    for line in lines:
        if not isinstance(line, str):
            line = json.dumps(line)
        texts.append(line + "\n")
    path.write_text("".join(texts), encoding="utf-8")
    return str(path)


def test_jsonl_is_read(tmp_path):
    """Empty lines are skipped, and paths start from the file's folder or from root."""
    path = write(tmp_path / "my.jsonl", GOOD, "",
                 {**GOOD, "split": "val", "text": "die rote Tasse ü"})
    assert data.split_names(path) == ["train", "val"]
    expected = data.Sample(tmp_path / "a.png", "the red cup", (1.0, 2.5, 30.0, 20.0), "a.png")
    assert data.load_samples(path, "train") == [expected]

    (tmp_path / "elsewhere").mkdir()
    sample, = data.load_samples(path, "val", tmp_path / "elsewhere")
    assert sample.image == tmp_path / "elsewhere" / "a.png"


def test_jsonl_of_other_editors_is_read(tmp_path):
    """A byte order mark, Windows line ends, and Unicode's line separator inside a text are read;
    Latin-1 is an error."""
    line = json.dumps({**GOOD, "text": "a\u2028b"}, ensure_ascii=False)
    content = b"\xef\xbb\xbf" + f"{line}\r\n{line}\r\n".encode()
    (tmp_path / "w.jsonl").write_bytes(content)
    texts = [sample.text for sample in data.load_samples(tmp_path / "w.jsonl", "train")]
    assert texts == ["a\u2028b", "a\u2028b"]

    latin = '{"text": "ü"}'.encode("latin-1")
    (tmp_path / "latin.jsonl").write_bytes(line.encode() + b"\n" + latin)
    with pytest.raises(InputError, match="latin.jsonl, line 2"):
        data.load_samples(tmp_path / "latin.jsonl", "train")


NO_TEXT = {"image": "a.png", "box": [1, 2.5, 30, 20], "split": "train"}
WITH_BOX = '{"image": "a", "text": "b", "split": "train", "box": [1, 2, %s, 4]}'


@pytest.mark.parametrize("line, words", [
    ("{not json", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("[1, 2]", "lacks image, text, box, split"),
    ({"image": "a.png"}, "lacks text, box, split"),
    (NO_TEXT, "lacks text"),
    ({**GOOD, "box": None}, "four numbers"),
    ({**GOOD, "box": [1, 2, 3]}, "four numbers"),
    (WITH_BOX % "NaN", "four numbers"),
    (WITH_BOX % ("1" + 400 * "0"), "four numbers"),
    ({**GOOD, "box": [5, 5, 5, 9]}, "no area"),
    ({**GOOD, "box": [9, 5, 5, 9]}, "no area"),
    ({**GOOD, "text": "  "}, "not empty"),
    ({**GOOD, "text": "a \ud83d cup"}, "broken Unicode")])
def test_a_bad_line_is_named(tmp_path, line, words):
    """The error names the file, the line and what is wrong with the line."""
    path = write(tmp_path / "my.jsonl", GOOD, line)
    with pytest.raises(InputError) as error:
        data.load_samples(path, "train")
    assert "my.jsonl, line 2" in str(error.value)
    assert words in str(error.value)


@pytest.mark.parametrize("dataset, split, root, words", [
    ("nothing", "train", None, ("nothing", "shapes", ".jsonl")),
    ("shapes", "test", None, ("test", "train, val, testA, testB")),
    ("gone.jsonl", "train", None, ("gone.jsonl", "no such file", '"box"')),
    ("my.jsonl", "train", "nowhere", ("nowhere", "no such folder")),
    ("my.jsonl", "test", None, ("test", "train")),
    ("empty.jsonl", "train", None, ("empty.jsonl", "no line"))])
def test_unknown_datasets_splits_and_folders_are_named(
        tmp_path, monkeypatch, dataset, split, root, words):
    """The error names what is unknown, and what could be chosen."""
    monkeypatch.chdir(tmp_path)
    data.read_splits.cache_clear()
    write(tmp_path / "my.jsonl", GOOD)
    write(tmp_path / "empty.jsonl")
    with pytest.raises(InputError) as error:
        data.load_samples(dataset, split, root)
    for word in words:
        assert word in str(error.value)


def test_a_jsonl_may_have_a_comma_in_its_name(tmp_path):
    """A comma joins datasets only if there is no file of the whole name."""
    path = write(tmp_path / "a,b.jsonl", GOOD)
    assert len(data.load_samples(path, "train")) == 1


# -------------------------------------------------------------------------------------------------
# Errors

def one_item(path, box=(1.0, 2.0, 30.0, 20.0)):
    sample = data.Sample(path, "a", box, path.name)
    return data.GroundingDataset([sample], 64, data.Tokenizer(20), DETR)[0]


@pytest.mark.parametrize("name, words", [
    ("broken.jpg", "decoded"), ("text.jpg", "decoded"),
    ("gone.jpg", "no such picture .1 are missing")])
def test_pictures_that_are_missing_or_broken_are_named(tmp_path, name, words):
    """The error names the picture's file."""
    Image.new("L", (40, 30), 128).save(tmp_path / "grey.png")
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "grey.png").read_bytes()[:60])
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(InputError, match=words) as error:
        one_item(tmp_path / name)
    assert name in str(error.value)


def test_a_box_is_cut_off_at_the_edge_of_its_picture(tmp_path):
    """A box that reaches out is cut off, and a box wholly outside becomes a line at the edge."""
    Image.new("L", (40, 30), 128).save(tmp_path / "grey.png")
    # The picture is 64 x 48 in the square. The cut box is its lower right part, 32 x 32.
    item = one_item(tmp_path / "grey.png", (20.0, 10.0, 90.0, 90.0))
    assert item.box == pytest.approx([0.75, 0.625, 0.5, 0.5], abs=0.01)

    item = one_item(tmp_path / "grey.png", (50.0, 5.0, 90.0, 20.0))
    assert item.box == pytest.approx([1.0, 28 / 64, 0.0, 24 / 64], abs=0.01)


def test_a_box_outside_of_its_picture_stops_no_epoch(tmp_path):
    """Every way of training and evaluation draws such a sample, which has finite numbers."""
    Image.new("L", (40, 30), 128).save(tmp_path / "grey.png")
    samples = []
    for box in ((40.0, 2.0, 90.0, 20.0), (-9.0, 2.0, 0.0, 20.0), (1.0, 30.0, 9.0, 50.0)):
        samples.append(data.Sample(tmp_path / "grey.png", "cup", box, "grey.png"))
    for options in ({}, {"train": True}, {"train": True, "augmented": True, "mirror": True}):
        for seed in range(20):
            dataset = data.GroundingDataset(samples, 64, data.Tokenizer(20), DETR, seed=seed,
                                            **options)
            for i in range(3):
                cx, cy, w, h = dataset[i].box
                assert w * h == 0
                assert 0 <= cx <= 1 and 0 <= cy <= 1


OUTSIDE = [(40, 2, 50, 9), (2, 30, 9, 40), (-9, 2, 0, 9), (2, -9, 9, 0)]
PARTLY_INSIDE = [(39, 2, 50, 9), (2, 29, 9, 40), (-9, 2, 1, 9), (2, -9, 9, 1), (-9, -9, 99, 99),
                 (2, 2, 9, 9)]


def test_boxes_outside_of_their_pictures_are_found_by_the_headers(tmp_path):
    """A box is outside if it ends where its picture begins, or begins where it ends."""
    Image.new("L", (40, 30), 128).save(tmp_path / "whole.png")
    header = (tmp_path / "whole.png").read_bytes()[:50]   # the pixels are cut off
    (tmp_path / "a.png").write_bytes(header)
    with pytest.raises(InputError):
        data.load_picture(tmp_path / "a.png")

    outside = []
    samples = []
    for box in OUTSIDE + PARTLY_INSIDE:
        sample = data.Sample(tmp_path / "a.png", "cup", box, "a.png")
        samples.append(sample)
        if box in OUTSIDE:
            outside.append(sample)
    assert data.boxes_outside(samples) == outside


def test_no_box_of_shapes_is_outside(samples):
    """The sizes of scenes are those of their pictures, and need no files."""
    assert data.boxes_outside(samples["val"]) == []
    for sample in samples["val"][::100]:
        assert data.header_size(sample.image) == data.render(sample.image).size


@pytest.mark.parametrize("name", ["text.jpg", "gone.jpg"])
def test_a_file_without_a_pictures_header_is_named(tmp_path, name):
    """Before training, not in the middle of an epoch."""
    (tmp_path / "text.jpg").write_text("hello")
    sample = data.Sample(tmp_path / name, "cup", (1, 2, 3, 4), name)
    with pytest.raises(InputError, match=f"{name}: the file cannot be decoded"):
        data.boxes_outside([sample])


def test_all_pictures_are_decoded_before_an_epoch_if_asked(tmp_path):
    """A file with a good header may be cut off. Each picture counts once."""
    Image.effect_noise((40, 30), 80).save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    samples = []
    for name, end in (("whole.png", None), ("cut.png", 900), ("cut.png", 900), ("too.png", 60)):
        (tmp_path / name).write_bytes(content[:end])
        samples.append(data.Sample(tmp_path / name, "cup", (1, 2, 3, 4), name))
    data.check_decodable(samples[:1])
    with pytest.raises(InputError, match="cut.png: the file cannot be decoded.* 2 cannot be"):
        data.check_decodable(samples)


def boxes(*corners):
    return [data.Sample(0, "cup", box, 0) for box in corners]


@pytest.mark.parametrize("samples, doubt", [
    (boxes((0.1, 0.2, 0.5, 1.0)), "1 of 1 boxes lie within one pixel of the corner: are they in "
                                  "pixels?"),
    (boxes((9, 9, 20, 20), (30, 40, 10, 60), (20, 60, 40, 9)),
     "x2 < x1 or y2 < y1 in 2 of 3 boxes: are they x, y, w, h?"),
    (boxes(*9 * [(9, 9, 20, 20)], (0.1, 0.1, 0.2, 0.2)), None),
    (boxes(*9 * [(9, 9, 20, 20)], (30, 30, 20, 20)), None),
    (boxes((5, 5, 5, 9), (0, 0, 1, 2)), None),
    ([], None)])
def test_boxes_in_another_unit_or_order_are_doubted(samples, doubt):
    """More than a tenth of the boxes must be odd. A box without area is not inside out."""
    assert data.doubt_about_boxes(samples) == doubt


def test_the_report_doubts_boxes_of_another_unit(tmp_path, capsys):
    """The doubt names the split."""
    Image.new("L", (40, 30)).save(tmp_path / "a.png")
    line = {**GOOD, "image": "a.png"}
    path = write(tmp_path / "my.jsonl", line,
                 {**line, "box": [0.1, 0.2, 0.5, 0.6], "split": "val"})
    data.main([str(path)])
    printed = capsys.readouterr().out
    assert "val: 1 of 1 boxes lie within one pixel" in printed
    assert printed.count("one pixel") == 1


def test_an_error_in_a_loading_process_is_still_one_line(tmp_path, capsys):
    """run_command prints the message of an InputError that a DataLoader's worker raised."""
    (tmp_path / "broken.jpg").write_text("hello")
    sample = data.Sample(tmp_path / "broken.jpg", "a", (0, 0, 1, 1), 0)
    dataset = data.GroundingDataset([sample], 64, len, DETR)

    def load():
        list(torch.utils.data.DataLoader(dataset, num_workers=1))

    with pytest.raises(SystemExit) as exit:
        data.run_command(load)
    assert exit.value.code == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ") and "broken.jpg" in message
    assert "\n" not in message


def test_a_crash_while_writing_leaves_the_old_file(tmp_path):
    """write_atomically replaces a file only after the new one is whole, and leaves no half."""
    path = tmp_path / "a.txt"
    path.write_text("old")

    def crash(partial):
        partial.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.write_atomically(path, crash)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    data.write_text(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


# A program whose files may not grow beyond 100,000 bytes, and that writes a larger one.
LIMITED = """
import functools, resource, sys
import safetensors.torch, torch
from PIL import Image
import data

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
tensors = {"a": torch.rand(100_000)}
writers = {
    "last.pt": functools.partial(torch.save, tensors),
    "best.safetensors": functools.partial(safetensors.torch.save_file, tensors),
    "val.png": functools.partial(Image.effect_noise((800, 800), 80).save, format="PNG"),
    "log.jsonl": functools.partial(data.write_bytes, content=bytes(200_000)),
}
path = sys.argv[1]
data.run_command(functools.partial(data.write_atomically, path, writers[path]))
"""


@pytest.mark.parametrize("name", ["last.pt", "best.safetensors", "val.png", "log.jsonl"])
def test_a_file_that_cannot_grow_is_one_line_and_the_old_one_stays(tmp_path, name):
    """PyTorch, safetensors and PIL have errors of their own for it, and none of them names the
    file. A full disk stops a write in the same way."""
    (tmp_path / name).write_text("old")
    done = subprocess.run([sys.executable, "-c", LIMITED, name], cwd=tmp_path, text=True,
                          env={**os.environ, "PYTHONPATH": str(Path(data.__file__).parent)},
                          capture_output=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: cannot write {name} (")
    assert done.stderr.count("\n") == 1
    assert (tmp_path / name).read_text() == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / name]


@pytest.mark.parametrize("folder", ["gone", "file"])
def test_a_folder_that_takes_no_file_is_named(tmp_path, folder):
    """The message names the file that was to be written, and not the temporary one."""
    (tmp_path / "file").write_text("")
    path = tmp_path / folder / "a.txt"
    with pytest.raises(InputError, match=f"cannot write {path} [(](No such|Not a directory)"):
        data.write_text(path, "new")


def test_files_have_the_mode_of_other_files(tmp_path):
    """safetensors makes files that nobody else may read."""
    data.write_text(tmp_path / "a.txt", "new")
    data.write_atomically(tmp_path / "b.safetensors",
                          functools.partial(save_file, {"a": torch.rand(2)}))
    (tmp_path / "other").write_text("")
    modes = {stat.filemode(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    """/dev/stdout may be a pipe. A file in its place would harm the whole machine."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    data.write_text(tmp_path / "pipe", "new")
    assert os.read(reader, 10) == b"new"
    os.close(reader)


def test_a_link_to_a_file_stays_a_link(tmp_path):
    """The file that the link names is replaced."""
    (tmp_path / "a.txt").write_text("old")
    (tmp_path / "link").symlink_to("a.txt")
    data.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "a.txt").read_text() == "new"


def test_data_can_be_copied_alone():
    """data.py imports nothing of the project, and no transformers before it needs a tokenizer."""
    imports = []
    for line in Path(data.__file__).read_text(encoding="utf-8").splitlines():
        match = re.match(r"(?:import|from) (\w+)", line)
        if match:
            imports.append(match[1])
    project = {path.stem for path in Path(data.__file__).parent.glob("*.py")}
    assert "model" in project and "torch" in imports
    assert not project & set(imports)
    assert "transformers" not in imports


# -------------------------------------------------------------------------------------------------
# Texts that are cut

# In the vocabulary of `shapes`, "zq" is two tokens. Two more tokens mark the ends of a text.
FITS = "red circle"
TOO_LONG = "red zq circle"


def test_texts_that_are_cut_are_counted_by_the_tokenizer():
    """A text that has exactly max_tokens tokens is not cut. Equal texts count each time."""
    tokenizer = data.Tokenizer(4)
    assert tokenizer.length(FITS) == 4
    assert tokenizer.length(TOO_LONG) == 6
    samples = [data.Sample(0, text, (1, 2, 3, 4), 0) for text in (TOO_LONG, FITS, TOO_LONG)]
    assert data.cut_samples(samples, tokenizer) == [samples[0], samples[2]]
    tokenizer.max_tokens = 5
    assert len(data.cut_samples(samples, tokenizer)) == 2
    tokenizer.max_tokens = 6
    assert data.cut_samples(samples, tokenizer) == []


def test_clips_texts_are_counted_as_they_are_mended(clip_tokenizer):
    """ "&amp;amp;" is one sign for CLIP."""
    assert clip_tokenizer.length("&amp;amp;") == len(clip_tokenizer("&")) == 3


def counted(tmp_path, capsys, *flags):
    """The line of the report about texts that are cut, for a text of three words."""
    Image.new("L", (40, 30)).save(tmp_path / "a.png")
    path = write(tmp_path / "my.jsonl", {**GOOD, "image": "a.png", "text": "don t red"})
    data.main([str(path), *flags])
    printed = capsys.readouterr().out
    return [line for line in printed.splitlines() if "tokens" in line]


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """A machine on which nothing of the hub is stored. Returns the folder of its cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_report_counts_words_without_a_tokenizer(tmp_path, capsys, empty_cache):
    """The line says so, and how to count tokens."""
    assert counted(tmp_path, capsys, "--max-tokens", "5") == []
    line, = counted(tmp_path, capsys, "--max-tokens", "4")
    assert line == ("1 expressions that are cut at 4 tokens if each word is one token "
                    "(--text-weights counts by a tokenizer), such as 'don t red'")


def test_the_report_takes_the_tokenizer_that_is_asked_for(tmp_path, capsys, empty_cache,
                                                         clip_tokenizer):
    """For this vocabulary, "don t red" is five tokens between its ends."""
    folder = str(tmp_path / "clip")
    assert clip_tokenizer.length("don t red") == 7
    assert counted(tmp_path, capsys, "--max-tokens", "7", "--text-weights", folder) == []
    line, = counted(tmp_path, capsys, "--max-tokens", "6", "--text-weights", folder)
    assert line == "1 expressions that are cut at 6 tokens, such as 'don t red'"


def test_the_report_takes_the_bert_that_the_machine_has(tmp_path, capsys, empty_cache,
                                                       bert_tokenizer):
    """Files that the hub's library stored before are used, and nothing is fetched."""
    repository = empty_cache / "models--bert-base-uncased"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("abc")
    (repository / "snapshots").mkdir()
    (tmp_path / "bert").rename(repository / "snapshots/abc")
    line, = counted(tmp_path, capsys, "--max-tokens", "4")
    assert line == "1 expressions that are cut at 4 tokens, such as 'don t red'"


def test_shapes_has_a_tokenizer_of_its_own():
    """It needs no files."""
    assert isinstance(data.counting_tokenizer("shapes", 20, None), data.Tokenizer)


# -------------------------------------------------------------------------------------------------
# The published formats: the same annotations, written as each of them

PICTURES = {7: (120, 90), 8: (90, 120), 9: (100, 100)}   # COCO's picture id: (width, height)
ANNOTATIONS = {   # annotation id: (picture id, [x, y, w, h])
    70: (7, [3.25, 4.5, 30.75, 40.0]),
    71: (7, [50.0, 10.0, 20.0, 20.5]),
    80: (8, [0.0, 0.0, 45.5, 60.25]),
    90: (9, [10, 20, 30, 40]),
}
REFS = [   # (annotation id, split, texts)
    (70, "train", ["the bright cup", "cup on the left"]),
    (71, "train", ["right plate"]),
    (80, "val", ["tall man"]),
    (90, "testA", ["a woman", "woman in blue"]),
]
SPLITS = ("train", "val", "testA")


def rows_of(split):
    """Return (picture id, text, [x, y, w, h]) of each expression of a split."""
    rows = []
    for annotation, ref_split, texts in REFS:
        picture, box = ANNOTATIONS[annotation]
        if ref_split == split:
            for text in texts:
                rows.append((picture, text, box))
    return rows


def coco(picture):
    return f"COCO_train2014_{picture:012}.jpg"


def pictures(folder):
    folder.mkdir(parents=True)
    for number, size in PICTURES.items():
        Image.new("RGB", size, (200, 200, 200)).save(folder / coco(number))


def as_refer(root, name="refcoco", by="unc", refs=REFS):
    """Write REFER's format as its authors do: protocol 2, and a file_name that is not the
    picture's."""
    content = []
    for number, (annotation, split, texts) in enumerate(refs):
        picture, _ = ANNOTATIONS[annotation]
        sentences = []
        for i, text in enumerate(texts):
            sentences.append({"sent": text, "raw": text.upper(), "tokens": text.split(),
                              "sent_id": i})
        content.append({
            "ref_id": number, "ann_id": annotation, "image_id": picture, "split": split,
            "category_id": 1, "file_name": coco(picture).replace(".jpg", f"_{annotation}.jpg"),
            "sent_ids": list(range(len(texts))), "sentences": sentences})

    images = []
    for number, (width, height) in PICTURES.items():
        images.append({"id": number, "file_name": coco(number), "width": width, "height": height})
    annotations = []
    for number, (picture, box) in ANNOTATIONS.items():
        annotations.append({"id": number, "image_id": picture, "bbox": box, "category_id": 1})

    (root / name).mkdir(parents=True, exist_ok=True)
    (root / name / f"refs({by}).p").write_bytes(pickle.dumps(content, protocol=2))
    instances = {"images": images, "annotations": annotations}
    (root / name / "instances.json").write_text(json.dumps(instances))


def as_transvg(root, code="unc", size=None, item=list):
    """Write TransVG's format. item: the type of the boxes."""
    (root / code).mkdir(parents=True)
    for split in SPLITS:
        rows = []
        for picture, text, box in rows_of(split):
            rows.append((coco(picture), size, item(box), text, []))
        torch.save(rows, root / code / f"{code}_{split}.pth")
    # TransVG has a file of train and val together, too, which must not be read.
    both = [(coco(7), size, item([1, 2, 3, 4]), "in both", [])]
    torch.save(both, root / code / f"{code}_trainval.pth")


def as_hivg(root):
    as_transvg(root / "ref_data_shuffled", size={"height": 90, "width": 120})


def as_mdetr(root):
    """Write MDETR's format: each expression has an "image" of its own."""
    root.mkdir(parents=True, exist_ok=True)
    number = 0
    for split in SPLITS:
        images = []
        annotations = []
        for picture, text, box in rows_of(split):
            images.append({"file_name": coco(picture), "id": number, "original_id": picture,
                           "caption": text, "dataset_name": "refcoco",
                           "tokens_negative": [[0, len(text)]]})
            annotations.append({"image_id": number, "id": 100 + number, "bbox": box,
                                "original_id": 5, "area": 1.0, "iscrowd": 0, "category_id": 1,
                                "tokens_positive": [[0, 3]]})
            number += 1
        content = {"images": images, "annotations": annotations}
        (root / f"finetune_refcoco_{split}.json").write_text(json.dumps(content))


def expected_samples(split, folder):
    samples = []
    for picture, text, (x, y, w, h) in rows_of(split):
        box = (float(x), float(y), float(x + w), float(y + h))
        samples.append(data.Sample(folder / coco(picture), text, box, coco(picture)))
    return samples


def texts_of(dataset, split, root=None):
    return [sample.text for sample in data.load_samples(dataset, split, root)]


def boxes_of(dataset, split, root=None):
    return [sample.box for sample in data.load_samples(dataset, split, root)]


# -------------------------------------------------------------------------------------------------
# The published formats

@pytest.mark.parametrize("write_format", [as_refer, as_transvg, as_hivg, as_mdetr])
@pytest.mark.parametrize("place", [
    "images/train2014", "train2014", "other/images/mscoco/images/train2014"])
def test_every_format_of_a_dataset_gives_the_same_samples(tmp_path, write_format, place):
    """The same annotations in any format give the same samples, with boxes as float corners."""
    write_format(tmp_path)
    pictures(tmp_path / place)
    assert set(data.split_names("refcoco", tmp_path)) == set(SPLITS)
    for split in SPLITS:
        samples = data.load_samples("refcoco", split, tmp_path)
        assert samples == expected_samples(split, tmp_path / place)
        for sample in samples:
            assert sample.image.is_file()
            assert all(type(v) is float for v in sample.box)
    assert boxes_of("refcoco", "testA", tmp_path)[-1] == (10, 20, 40, 60)
    assert boxes_of("refcoco", "train", tmp_path)[0] == (3.25, 4.5, 34, 44.5)


def test_annotations_and_pictures_may_lie_one_folder_below_and_apart(tmp_path):
    """Annotations one folder below root go with pictures in root."""
    as_refer(tmp_path / "annotations")
    pictures(tmp_path / "images/train2014")
    sample, = data.load_samples("refcoco", "val", tmp_path)
    assert sample.image == tmp_path / "images/train2014" / coco(8)


def test_pictures_may_lie_in_a_folder_of_their_own(tmp_path):
    """COCO's pictures may lie one folder below root, beside the annotations of all datasets."""
    as_refer(tmp_path / "annotations")
    pictures(tmp_path / "coco/train2014")
    _, folder = data.find_files("refcoco", str(tmp_path))
    assert folder == tmp_path / "coco/train2014"


def test_what_is_written_as_jsonl_reads_the_same(tmp_path, capsys):
    """--write gives a file with the same samples, and overwrites no file."""
    as_refer(tmp_path)
    folder = tmp_path / "images/train2014"
    pictures(folder)
    target = tmp_path / "out" / "all.jsonl"
    target.parent.mkdir()
    data.main(["refcoco", "--root", str(tmp_path), "--write", str(target)])
    for split in SPLITS:
        again = data.load_samples(target, split)
        expected = expected_samples(split, folder)
        assert [sample.image.resolve() for sample in again] == [sample.image for sample in expected]
        assert [sample.text for sample in again] == [sample.text for sample in expected]
        assert [sample.box for sample in again] == [sample.box for sample in expected]
    with pytest.raises(InputError, match="all.jsonl: .*is there already"):
        data.main(["refcoco", "--root", str(tmp_path), "--write", str(target)])


def written(target, root, *flags):
    """The picture paths in a file that --write made."""
    data.main(["refcoco", "--root", str(root), "--write", str(target), *flags])
    return {json.loads(line)["image"] for line in target.read_text().splitlines()}


def test_written_paths_survive_a_move_together_with_the_pictures(tmp_path):
    """A root that is a link, as to another disk, changes nothing in that."""
    as_refer(tmp_path / "disk/data")
    pictures(tmp_path / "disk/data/images/train2014")
    (tmp_path / "data").symlink_to("disk/data")
    inside = written(tmp_path / "data/all.jsonl", tmp_path / "data")
    assert inside == {f"images/train2014/{coco(number)}" for number in PICTURES}
    beside = written(tmp_path / "disk/all.jsonl", tmp_path / "data")
    assert beside == {f"data/images/train2014/{coco(number)}" for number in PICTURES}

    (tmp_path / "disk").rename(tmp_path / "other")
    for target in ("all.jsonl", "data/all.jsonl"):
        sample, = data.load_samples(tmp_path / "other" / target, "val")
        assert data.load_picture(sample.image).size == PICTURES[8]


def test_written_paths_lead_through_a_folder_of_pictures_that_is_a_link(tmp_path):
    """What stands behind the link may differ from machine to machine."""
    as_refer(tmp_path)
    pictures(tmp_path / "disk")
    (tmp_path / "images").mkdir()
    (tmp_path / "images/train2014").symlink_to(tmp_path / "disk")
    paths = written(tmp_path / "all.jsonl", tmp_path)
    assert paths == {f"images/train2014/{coco(number)}" for number in PICTURES}


def test_written_paths_are_absolute_if_asked(tmp_path, monkeypatch):
    """The file alone may then be moved."""
    as_refer(tmp_path)
    pictures(tmp_path / "images/train2014")
    monkeypatch.chdir(tmp_path)
    paths = written(tmp_path / "all.jsonl", ".", "--absolute")
    assert paths == {str(tmp_path / "images/train2014" / coco(number)) for number in PICTURES}
    with pytest.raises(InputError, match="--absolute goes with --write"):
        data.main(["refcoco", "--root", str(tmp_path), "--absolute"])


@pytest.mark.parametrize("item", [list, np.array, tuple, torch.tensor])
def test_referit_and_flickr_boxes_are_corners(tmp_path, item):
    """In TransVG's files of these two datasets a box is x1, y1, x2, y2 already."""
    box = item([10.5, 20.0, 30.0, 40.0])
    (tmp_path / "referit").mkdir()
    (tmp_path / "flickr").mkdir()
    torch.save([("12.jpg", "referit", box, "a dog", [])], tmp_path / "referit/referit_test.pth")
    torch.save([("12.jpg", box, "a dog")], tmp_path / "flickr/flickr_test.pth")

    folders = {"referit": "referit/images", "flickr30k": "Flickr30k/flickr30k-images"}
    for dataset, folder in folders.items():
        sample, = data.load_samples(dataset, "test", tmp_path)
        assert sample == data.Sample(tmp_path / folder / "12.jpg", "a dog",
                                     (10.5, 20.0, 30.0, 40.0), "12.jpg")


@pytest.mark.parametrize("item", [np.array, tuple, torch.tensor])
def test_transvgs_boxes_may_be_any_kind_of_four_numbers(tmp_path, item):
    """Boxes as arrays, tuples and tensors read as boxes that are lists."""
    as_transvg(tmp_path, item=item)
    expected = [sample.box for sample in expected_samples("train", tmp_path)]
    assert boxes_of("refcoco", "train", tmp_path) == expected


def test_a_file_that_numpy_1_wrote_is_read(tmp_path):
    """NumPy 1 pickles arrays under the module name numpy.core, NumPy 2 under numpy._core."""
    as_transvg(tmp_path, item=np.array)
    path = tmp_path / "unc/unc_val.pth"
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    assert any(b"numpy._core" in value for value in content.values())
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in content.items():
            archive.writestr(name, value.replace(b"numpy._core", b"numpy.core"))
    expected = [sample.box for sample in expected_samples("val", tmp_path)]
    assert boxes_of("refcoco", "val", tmp_path) == expected


class Command:
    """An object whose pickle runs a shell command when it is loaded."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_a_pickle_that_would_run_a_command_is_refused(tmp_path):
    """Both readers of pickles raise an error instead of running what the pickle asks for."""
    hostile = [Command(tmp_path / "ran")]
    as_refer(tmp_path / "a")
    refs = tmp_path / "a/refcoco/refs(unc).p"
    refs.write_bytes(pickle.dumps(hostile, protocol=2))
    (tmp_path / "b/unc").mkdir(parents=True)
    torch.save(hostile, tmp_path / "b/unc/unc_train.pth")

    for root, name in (("a", "refs(unc).p"), ("b", "unc_train.pth")):
        with pytest.raises(InputError, match=re.escape(name)):
            data.split_names("refcoco", tmp_path / root)
    assert not (tmp_path / "ran").exists()

    pickle.loads(refs.read_bytes())   # Python's own unpickler does run the command
    assert (tmp_path / "ran").exists()


def test_damaged_annotations_are_named(tmp_path):
    """Whatever is wrong in the annotations, the error names the file and the fault."""
    instances_path = tmp_path / "refcoco/instances.json"
    refs_path = tmp_path / "refcoco/refs(unc).p"

    def fails(*words):
        data.read_splits.cache_clear()
        with pytest.raises(InputError) as error:
            data.split_names("refcoco", tmp_path)
        for word in words:
            assert word in str(error.value)

    # Without annotations, the error says what was looked for, and where to get it.
    fails("refcoco/refs(unc).p", "unc/unc_*.pth", "finetune_refcoco_*.json", "images/train2014",
          "data.py --help")

    as_refer(tmp_path, refs=[(70, "train", ["a"]), (71, "train", [" "])])
    fails("refs(unc).p, ref 1", "not empty")

    # A box without area is no error in a published dataset. Training leaves it out.
    as_refer(tmp_path, refs=[(70, "train", ["a"])])
    instances = json.loads(instances_path.read_text())
    instances["annotations"][0]["bbox"] = [3, 4, 0, 5]
    instances_path.write_text(json.dumps(instances))
    assert len(data.load_samples("refcoco", "train", tmp_path)) == 1

    del instances["annotations"][0]
    instances_path.write_text(json.dumps(instances))
    fails("refs(unc).p", "KeyError: 70")
    instances_path.write_text("{")
    fails("refs(unc).p", "JSONDecodeError")
    instances_path.unlink()
    fails("instances.json")
    refs_path.write_bytes(b"\x80\x02]q\x00")
    fails("refs(unc).p", "EOFError")


# -------------------------------------------------------------------------------------------------
# Several datasets joined by commas

def test_mixed_training_sees_no_picture_of_any_val_or_test(tmp_path, capsys):
    """A picture in val or test of any dataset is left out of the joint train, and counted."""
    as_refer(tmp_path)   # picture 7 in train, 8 in val, 9 in testA
    as_refer(tmp_path, "refcoco+",
             refs=[(90, "train", ["x", "y"]), (71, "val", ["z"]), (80, "train", ["v"])])
    as_refer(tmp_path, "refcocog", "umd", refs=[(80, "test", ["w"])])

    names = "refcoco,refcoco+,refcocog-umd"
    assert data.split_names(names, tmp_path) == [
        "val", "refcoco/val", "refcoco/testA", "refcoco+/val", "refcocog-umd/test"]
    # Picture 7 is in refcoco+'s val, 9 in refcoco's testA, and 8 in refcoco's val.
    with pytest.raises(InputError, match="'train': choose one of val"):
        data.load_samples(names, "train", tmp_path)
    assert "6 of 6 expressions left out" in capsys.readouterr().out
    assert texts_of(names, "val", tmp_path) == ["tall man", "z"]

    train = [text for _, text, _ in rows_of("train")]
    assert texts_of("refcoco,refcocog-umd", "train", tmp_path) == train


def test_shapes_cannot_be_joined_with_other_datasets(tmp_path):
    """The error names shapes."""
    as_refer(tmp_path)
    with pytest.raises(InputError, match="shapes"):
        data.split_names("refcoco,shapes", tmp_path)


def test_pictures_of_published_datasets_are_recognised_by_their_names(tmp_path):
    """Copies of COCO's pictures in two folders are the same pictures."""
    as_refer(tmp_path / "refcoco")
    pictures(tmp_path / "refcoco/train2014")
    as_refer(tmp_path / "refcoco+", "refcoco+", refs=[(70, "val", ["z"]), (90, "train", ["y"])])
    pictures(tmp_path / "refcoco+/train2014")
    assert "train" not in data.split_names("refcoco,refcoco+", tmp_path)
    assert data.split_names("refcoco,refcoco+", tmp_path)[0] == "val"


def test_the_report_of_a_mixture_does_not_compare_val_with_the_datasets_own_val(tmp_path, capsys):
    """The joint val repeats the datasets' val splits, which is no fault."""
    as_refer(tmp_path)
    as_refer(tmp_path, "refcocog", "umd", refs=[(80, "test", ["w"])])
    pictures(tmp_path / "images/train2014")
    data.main(["refcoco,refcocog-umd", "--root", str(tmp_path)])
    printed = capsys.readouterr().out
    assert re.findall("both in .*, such", printed) in (
        [], ["both in refcoco/val and in refcocog-umd/test, such"])


def own_file(path, **images):
    """Write a .jsonl file with one line per split, from split=image."""
    path.parent.mkdir(exist_ok=True)
    lines = [{**GOOD, "image": image, "split": split} for split, image in images.items()]
    return write(path, *lines)


def test_ones_own_pictures_are_recognised_by_their_paths_and_not_by_their_names(tmp_path):
    """Two files may use one name for different pictures, but one path is one picture."""
    a = own_file(tmp_path / "a/my.jsonl", train="train/1.png", val="val/1.png")
    b = own_file(tmp_path / "b/my.jsonl", train="val/1.png", val="train/1.png")
    assert len(data.load_samples(f"{a},{b}", "train")) == 2
    assert len(data.load_samples(f"{a},{b}", "train", limit=1)) == 1

    c = own_file(tmp_path / "c.jsonl", val="a/train/1.png")
    sample, = data.load_samples(f"{a},{b},{c}", "train")
    assert sample.image == tmp_path / "b/val/1.png"
    assert texts_of(a, "train") == ["the red cup"]


def test_a_file_of_ones_own_may_name_cocos_pictures(tmp_path):
    """A COCO picture in the test split of one's own file is left out of the joint train."""
    as_refer(tmp_path)
    pictures(tmp_path / "images/train2014")
    mine = own_file(tmp_path / "mine.jsonl", test=f"images/train2014/{coco(7)}")
    with pytest.raises(InputError, match="'train': choose one of val"):
        data.load_samples(f"refcoco,{mine}", "train", tmp_path)


# -------------------------------------------------------------------------------------------------
# Places of samples in files

def place_of(dataset, split, number, root):
    """The place of a split's sample, behind the folder of its dataset."""
    sample = data.load_samples(dataset, split, root)[number]
    place = data.where_is(dataset, root, sample)
    assert place.startswith(str(root))
    return place.removeprefix(f"{root}/")


@pytest.mark.parametrize("write_format, place", [
    (as_refer, "refcoco/refs(unc).p, ref 1"),
    (as_transvg, "unc/unc_train.pth, item 2"),
    (as_mdetr, "finetune_refcoco_train.json, image 2")])
def test_a_sample_is_found_in_its_file(tmp_path, write_format, place):
    """"right plate" is the third expression of train, and the first one of the second ref."""
    write_format(tmp_path)
    assert place_of("refcoco", "train", 2, tmp_path) == place


def test_a_sample_is_found_in_its_line(tmp_path):
    """Samples that differ in their box alone, their text alone or their picture alone are told
    apart. Lines count from 1, also those that are empty."""
    lines = [GOOD, {**GOOD, "box": [1, 2.5, 30, 21]}, {**GOOD, "text": "cup"},
             {**GOOD, "image": "b.png"}]
    path = write(tmp_path / "my.jsonl", "", *lines)
    for number in range(4):
        sample = data.load_samples(path, "train")[number]
        assert data.where_is(path, None, sample) == f"{path}, line {number + 2}"


def test_a_sample_is_found_in_each_of_several_datasets(tmp_path):
    """Datasets joined by commas are looked through one after the other."""
    as_refer(tmp_path)
    as_refer(tmp_path, "refcocog", "umd", refs=[(90, "train", ["y", "z"])])
    as_refer(tmp_path, "refcoco+", refs=[(71, "train", ["a"]), (71, "train", ["b"])])
    names = "refcoco,refcocog-umd,refcoco+"
    assert texts_of(names, "train", tmp_path)[-1] == "b"
    assert place_of(names, "train", 0, tmp_path) == "refcoco/refs(unc).p, ref 0"
    assert place_of(names, "train", -1, tmp_path) == "refcoco+/refs(unc).p, ref 1"


def test_of_a_sample_that_is_in_no_file_any_more_the_picture_is_told(tmp_path):
    """The annotations may change during a run, which must not fail for that."""
    path = own_file(tmp_path / "my.jsonl", train="a.png")
    sample, = data.load_samples(path, "train")
    own_file(tmp_path / "my.jsonl", train="b.png")
    assert data.where_is(path, None, sample) == str(tmp_path / "a.png")


# -------------------------------------------------------------------------------------------------
# Leaks

OFFICIAL = "detr-r50-e632da11.pth"


@pytest.mark.parametrize("dataset, detr_file, leaky", [
    ("refcoco", OFFICIAL, True),
    ("refcoco", f"folder/{OFFICIAL}", True),
    ("refcoco", "facebook/detr-resnet-50", True),
    ("refcoco", "folder/detr-r50-referit.pth", True),
    ("refcoco+", "folder/detr-r50-unc.pth", False),
    ("refcocog-umd", "folder/detr-r50-unc.pth", True),
    ("refcocog-umd", "folder/detr-r50-gref.pth", False),
    ("referit", OFFICIAL, False),
    ("flickr30k", OFFICIAL, False),
    ("refcoco", "mine.pth", None),
    ("my.jsonl", OFFICIAL, None),
    ("refcoco,refcocog-umd", "detr-r50-unc.pth", True),
    ("my.jsonl,refcoco", OFFICIAL, True),
    ("referit,flickr30k", OFFICIAL, False),
    ("referit,my.jsonl", OFFICIAL, None)])
def test_leaky_pretraining_follows_from_the_file_and_the_dataset(dataset, detr_file, leaky):
    """True if any dataset leaks, None if something is unknown, False otherwise."""
    assert data.leaky_pretraining(dataset, detr_file) is leaky


# -------------------------------------------------------------------------------------------------
# The report and the drawings

def test_the_command_line_counts_and_names_what_is_wrong(tmp_path, capsys, empty_cache):
    """The report has a line per split, and a line per fault with its count and an example."""
    as_refer(tmp_path, refs=[*REFS, (71, "testB", ["one two three four"])])
    pictures(tmp_path / "images/train2014")
    instances_path = tmp_path / "refcoco/instances.json"
    instances = json.loads(instances_path.read_text())
    instances["annotations"][1]["bbox"][0] = 120.0  # picture 7 is 120 pixels wide
    instances["annotations"][2]["bbox"][2] = 95.0   # picture 8 is 90 pixels wide
    instances["annotations"][3]["bbox"][2] = 0      # this is the box of two expressions in testA
    instances_path.write_text(json.dumps(instances))
    (tmp_path / "images/train2014" / coco(9)).write_bytes(b"\xff\xd8 broken")

    data.main(["refcoco", "--root", str(tmp_path), "--max-tokens", "5", "--save", str(tmp_path)])
    printed = capsys.readouterr().out

    def has_line(pattern):
        return re.search(f"^{pattern}", printed, re.MULTILINE)

    assert has_line("train +1 +2 +3 +120,624  differs$")
    assert has_line("testA +1 +1 +2 +5,657  differs$")
    assert has_line(f"1 pictures that are missing or broken, such as .*{coco(9)}")
    assert has_line(f"1 boxes that reach out of the picture, such as .*{coco(8)}.*'tall man'")
    assert has_line(f"2 boxes wholly outside of the picture, such as .*{coco(7)}.*'right plate'")
    assert has_line("2 expressions that are cut at 5 tokens if each word is one token .*, such as "
                    "'cup on the left'")
    assert has_line("2 boxes without area, such as")
    assert has_line("1 pictures both in train and in testB")
    assert "both in train and in val" not in printed


def test_draw_shows_the_box_where_it_is(tmp_path, capsys):
    """--draw writes a sheet per split, with the true box at its place in the scaled picture."""
    as_refer(tmp_path)
    pictures(tmp_path / "images/train2014")
    data.main(["refcoco", "--root", str(tmp_path), "--draw", "16", "--save", str(tmp_path)])
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {"train.png", "val.png", "testA.png"}

    # Picture 8 is 90 x 120 pixels. In its tile it is 192 x 256 pixels, with its left edge at 32.
    sheet = np.asarray(Image.open(tmp_path / "val.png").convert("RGB"))
    gap = 8                                                     # white pixels around a tile
    tile = sheet[data.LEGEND_HEIGHT + gap:, gap:]
    ys, xs = np.nonzero((tile == data.TRUE).all(-1))
    assert (xs.min(), ys.min()) == pytest.approx((32, 0), abs=2)
    right = 32 + 45.5 * 256 / 120
    bottom = 60.25 * 256 / 120
    assert (xs.max(), ys.max()) == pytest.approx((right, bottom), abs=3)


def test_draw_overwrites_nothing(tmp_path):
    """This is said before the pictures are opened, and before another sheet is drawn."""
    as_refer(tmp_path)
    (tmp_path / "testA.png").write_text("mine")
    with pytest.raises(InputError, match="testA.png, which is there already.*--save"):
        data.main(["refcoco", "--root", str(tmp_path), "--draw", "1", "--save", str(tmp_path)])
    assert (tmp_path / "testA.png").read_text() == "mine"
    assert not (tmp_path / "train.png").exists()


def test_draw_goes_on_behind_a_broken_picture(tmp_path, capsys):
    """The broken picture is named. A split of which nothing can be drawn has no sheet."""
    as_refer(tmp_path, refs=[(80, "train", ["gone"]), (70, "train", ["cup"]), (90, "val", ["w"])])
    pictures(tmp_path / "images/train2014")
    for number in (8, 9):
        (tmp_path / "images/train2014" / coco(number)).write_text("broken")
    data.main(["refcoco", "--root", str(tmp_path), "--draw", "16", "--save", str(tmp_path)])
    printed = capsys.readouterr().out
    assert f"not drawn: {tmp_path / 'images/train2014' / coco(8)}" in printed
    assert f"not drawn: {tmp_path / 'images/train2014' / coco(9)}" in printed
    assert [path.name for path in tmp_path.glob("*.png")] == ["train.png"]


def test_a_box_keeps_its_contrast_on_its_own_colour():
    """A light line runs along both sides of the box, and covers no other box."""
    ground = Image.new("RGB", (256, 256), data.TRUE)
    near = (52, 53, 203, 203)   # its lines cross those of the first box
    tile = data.draw(ground, "", [((50, 50, 200, 200), data.TRUE), (near, data.PREDICTED)])
    along = [tile.getpixel((x, 120)) for x in range(46, 60)]
    white = (255, 255, 255)
    assert along == [data.TRUE] * 2 + [white] * 2 + [data.TRUE] * 2 + [data.PREDICTED] * 3 + (
        [white] + [data.TRUE] * 4)


def ink(tile):
    """The rows of a tile with a white picture that hold dark letters."""
    grey = np.asarray(tile.convert("L"))
    rows, _ = np.nonzero(grey < 100)
    return rows


@pytest.mark.parametrize("size, height", [((200, 50), 64), ((50, 200), 256)])
def test_the_caption_stands_right_below_its_picture(size, height):
    """The heading has a line of its own, above the text."""
    white = Image.new("RGB", size, "white")
    alone = ink(data.draw(white, "cup", []))
    assert height < alone.min() < height + 12
    headed = ink(data.draw(white, "cup", [], heading="IoU 0.83"))
    assert headed.min() == pytest.approx(alone.min(), abs=3)
    assert headed.max() - alone.max() >= 13
    assert headed.max() < 256 + data.CAPTION_HEIGHT - 1


@pytest.mark.parametrize("heading, lines", [("", 2), ("IoU 0.83", 3)])
def test_a_long_caption_fits_below_its_picture(heading, lines):
    """Two lines of text are drawn at most, and all of a heading."""
    white = Image.new("RGB", (64, 64), "white")
    rows = ink(data.draw(white, 50 * "long text ", [], heading=heading))
    assert (lines - 1) * 17 < rows.max() - 256 < lines * 17 + 2 < data.CAPTION_HEIGHT


def test_a_sheet_says_once_which_colour_is_which():
    """The legend has the colours that it is asked for, above all tiles."""
    tile = Image.new("RGB", (256, 300), "white")
    sheet = np.asarray(data.contact_sheet([tile, tile], ["true", "attention"]))
    for colour, swatches in ((data.TRUE, 1), (data.WARM, 1), (data.PREDICTED, 0)):
        ys, _ = np.nonzero((sheet == colour).all(-1))
        assert len(ys) == 13 * 13 * swatches
        assert (ys < data.LEGEND_HEIGHT).all()
    assert sheet.shape[0] > data.LEGEND_HEIGHT + 300


@pytest.mark.parametrize("count, shape", [(1, (1, 1)), (3, (1, 3)), (5, (2, 4))])
def test_a_sheet_shows_each_tile_once(count, shape):
    """Row by row, with eight white pixels around each tile."""
    tiles = [Image.new("RGB", (20, 10), (30 + number, 0, 0)) for number in range(count)]
    sheet = np.asarray(data.contact_sheet(tiles, []))
    rows, columns = shape
    assert sheet.shape == (data.LEGEND_HEIGHT + 8 + 18 * rows, 8 + 28 * columns, 3)
    for number in range(count):
        ys, xs = np.nonzero((sheet == (30 + number, 0, 0)).all(-1))
        assert len(ys) == 20 * 10
        assert ys.min() == data.LEGEND_HEIGHT + 8 + 18 * (number // 4)
        assert xs.min() == 8 + 28 * (number % 4)
    assert (sheet == 255).all(-1).sum() == sheet.shape[0] * sheet.shape[1] - count * 200


@pytest.mark.parametrize("text", ["the cup", "don't!", "", "two\nlines\u3000of text", "x" * 500])
def test_a_text_in_english_is_its_own_caption(text, capsys):
    """Nothing is printed."""
    assert data.caption_of(text, 1, "a.png") == text
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("text", ["\u8d64\u3044\u30ab\u30c3\u30d7", "the \U0001f534",
                                  "caf\u00e9", "\u0643\u0623\u0633"])
def test_a_text_that_the_font_lacks_letters_for_is_printed(text, capsys):
    """The caption says so, in place of boxes that nobody can read."""
    assert data.caption_of(text, 3, "a.png") == "(text 3: see the terminal)"
    assert capsys.readouterr().out == f"text 3 of a.png: {text}\n"


def test_a_box_that_is_inside_out_is_drawn_as_a_line():
    """PIL refuses such rectangles, and a prediction may be one."""
    data.draw(Image.new("RGB", (40, 30)), "inside out", [((30, 10, 20, 25), data.TRUE)])


@pytest.mark.parametrize("size, cell, top", [((200, 100), (3, 6), 64), ((100, 200), (6, 3), 0)])
def test_attention_is_drawn_where_it_looks(size, cell, top):
    """Attention to one cell of 8 x 8 over the square makes warmth at the centre of this cell. The
    tile leaves out the padding above the picture. top: its height"""
    row, column = cell
    attention = torch.zeros(8, 8)
    attention[row, column] = 1.0
    grey = Image.new("RGB", size, (90, 90, 90))
    tile = np.asarray(data.draw(grey, "", [], attention.flatten()), int)[:256]
    warm = tile[..., 0] - tile[..., 2] > 60   # orange, over grey or white
    ys, xs = np.nonzero(warm)
    centre = ((row + 0.5) * 32 - top, (column + 0.5) * 32)
    assert (ys.mean(), xs.mean()) == pytest.approx(centre, abs=3)


def test_attention_is_measured_from_uniform_and_leaves_colours():
    """Uniform attention adds nothing, more adds more, and all of it half of the warm colour."""
    blue = Image.new("RGB", (160, 160), (40, 80, 200))

    def middle(share):
        """The colour at the middle, where 4 of 400 tokens share so much of the attention."""
        attention = torch.full((20, 20), (1 - share) / 396)
        attention[9:11, 9:11] = share / 4
        return data.draw(blue, "", [], attention.flatten(), side=160).getpixel((80, 80))

    assert middle(0.01) == (40, 80, 200)
    reds = [middle(share)[0] for share in (0.01, 0.1, 0.5, 1.0)]
    assert reds == sorted(set(reds))
    one = torch.zeros(400)
    one[210] = 1.0   # the cell at (84, 84)
    warmest = data.draw(blue, "", [], one, side=160).getpixel((84, 84))
    expected = (np.array(data.WARM) + (40, 80, 200)) / 2
    assert np.abs(warmest - expected).max() < 15


# -------------------------------------------------------------------------------------------------
# Pictures of any mode

@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "RGBA", "LA", "YCbCr", "F"])
def test_pictures_of_every_mode_become_rgb(tmp_path, mode):
    """Each mode of PIL is read as RGB, with its colour where it has one."""
    colour = (200, 100, 50)
    picture = Image.new("RGB", (8, 6), colour)
    picture = picture.quantize() if mode == "P" else picture.convert(mode)
    path = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr", "F") else "a.png")
    picture.save(path)

    read = data.load_picture(path)
    assert read.mode == "RGB"
    assert read.size == (8, 6)
    if mode in ("P", "CMYK", "RGBA", "YCbCr"):
        assert np.abs(np.asarray(read, int) - colour).max() < 40


def test_transparent_parts_become_white(tmp_path):
    """The colour below a transparent pixel does not show."""
    picture = Image.new("RGBA", (8, 6), (0, 0, 0, 0))
    picture.putpixel((0, 0), (200, 100, 50, 255))
    picture.save(tmp_path / "clear.png")
    read = data.load_picture(tmp_path / "clear.png")
    assert read.getpixel((0, 0)) == (200, 100, 50)
    assert read.getpixel((1, 1)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path):
    """30000 of 65535 is 117 of 255."""
    Image.fromarray(np.array([[0, 30000, 65535]], np.uint16)).save(tmp_path / "deep.png")
    read = data.load_picture(tmp_path / "deep.png")
    assert [read.getpixel((x, 0))[0] for x in range(3)] == [0, 117, 255]


def test_floats_from_0_to_1_are_not_black(tmp_path):
    """0.5 is 128 of 255. Floats that go further are levels already."""
    for values, expected in (([0, 0.5, 1], [0, 128, 255]), ([0, 100, 200], [0, 100, 200])):
        Image.fromarray(np.array([values], np.float32)).save(tmp_path / "float.tif")
        read = data.load_picture(tmp_path / "float.tif")
        assert [read.getpixel((x, 0))[0] for x in range(3)] == expected


def test_only_ones_own_picture_is_turned_as_exif_says(tmp_path):
    """Boxes of datasets refer to the stored pixels, so only `upright` turns a picture."""
    exif = Image.Exif()
    exif[0x0112] = 6   # to be turned by 90 degrees
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert data.load_picture(tmp_path / "a.jpg").size == (40, 20)
    assert data.load_picture(tmp_path / "a.jpg", upright=True).size == (20, 40)


# -------------------------------------------------------------------------------------------------
# Augmentation

def test_ten_thousand_random_boxes_survive_the_transforms():
    """After augment a box keeps its size, its centre in the picture, half of what can be seen of
    each side, and an area above zero."""
    rng = random.Random(0)
    cropped = 0
    kept = []
    for _ in range(10_000):
        width = rng.randint(20, 200)
        height = rng.randint(20, 200)
        x = rng.uniform(0, width - 1)
        y = rng.uniform(0, height - 1)
        box = (x, y, rng.uniform(x + 0.5, width), rng.uniform(y + 0.5, height))
        size = rng.choice((64, 224, 640))

        whole = Image.new("RGB", (width, height))
        picture, [(x1, y1, x2, y2)], [text] = data.augment(whole, [box], ["a cup"], rng, False)
        assert text == "a cup"
        assert (x2 - x1, y2 - y1) == pytest.approx((box[2] - box[0], box[3] - box[1]))
        assert 0 < (x1 + x2) / 2 < picture.width
        assert 0 < (y1 + y2) / 2 < picture.height
        if picture.size != (width, height):
            cropped += 1

        place = data.placement(*picture.size, size, rng, 0.7)
        _, _, w, h = data.to_square((x1, y1, x2, y2), picture.size, place, size)
        assert w > 0 and h > 0

        seen_w = min(x2, picture.width) - max(x1, 0)
        seen_h = min(y2, picture.height) - max(y1, 0)
        assert seen_w >= 0.5 * min(x2 - x1, picture.width)
        assert seen_h >= 0.5 * min(y2 - y1, picture.height)
        kept.append(seen_w * seen_h / ((x2 - x1) * (y2 - y1)))

    assert 3000 < cropped < 5000   # one half, less the crops that are as large as the picture
    lost = np.mean(np.array(kept) < 0.5)
    assert lost < 0.06, lost       # boxes as large as these; COCO's are smaller and lose less


def test_crops_are_of_transvgs_sizes():
    """A crop has 384 to 600 pixels per side of a picture whose short side is 400, 500 or 600."""
    rng = random.Random(1)
    square = Image.new("RGB", (640, 640))
    sides = []
    for _ in range(500):
        picture, _ = data.crop(square, [(319, 319, 321, 321)], rng)
        sides.extend(picture.size)
    assert min(sides) == pytest.approx(384 / 600 * 640, abs=8)
    assert max(sides) == 640

    wide = Image.new("RGB", (2000, 640))
    widths = []
    for _ in range(300):
        picture, _ = data.crop(wide, [(999, 319, 1001, 321)], rng)
        widths.append(picture.width)
    cropped = [width for width in widths if width < 2000]
    assert 850 < max(cropped) <= 600 * 640 / 400
    assert min(cropped) == pytest.approx(384 * 640 / 600, abs=20)


def transvgs_crop(width, height, rng):
    """Return the share of the width and of the height that a crop of TransVG has, for a box in the
    middle of a picture: the literal rule in pixels of the scaled picture."""
    short = rng.choice([400, 500, 600])
    scaled_width = round(width * short / min(width, height))
    scaled_height = round(height * short / min(width, height))
    for _ in range(20):
        w = rng.randint(384, min(scaled_width, 600))
        h = rng.randint(384, min(scaled_height, 600))
        left = rng.randint(0, scaled_width - w)
        top = rng.randint(0, scaled_height - h)
        if left < scaled_width / 2 < left + w and top < scaled_height / 2 < top + h:
            return w / scaled_width, h / scaled_height
    return 1.0, 1.0


@pytest.mark.parametrize("size, whole_widths, whole_heights", [
    ((640, 480), 0.0, 0.024),
    ((480, 640), 0.024, 0.0),
    ((600, 600), 0.024, 0.024)])
def test_sides_of_crops_are_distributed_as_transvgs(size, whole_widths, whole_heights):
    """One crop in 42 keeps a whole short side: a mean of 1/17, 1/117 and 1/217, as h is drawn from
    384 to 400, 500 or 600. The mean, and each tenth of the crops, have TransVG's share as well."""
    assert (1 / 17 + 1 / 117 + 1 / 217) / 3 == pytest.approx(0.024, abs=0.0001)
    picture = Image.new("L", size)
    middle = (size[0] / 2, size[1] / 2) * 2
    ours = []
    theirs = []
    for seed in range(8000):
        cut, _ = data.crop(picture, [middle], random.Random(f"ours {seed}"))
        ours.append((cut.width / size[0], cut.height / size[1]))
        theirs.append(transvgs_crop(*size, random.Random(f"theirs {seed}")))
    ours = np.array(ours)         # (8000, 2): share of the width, share of the height
    theirs = np.array(theirs)

    whole = [whole_widths, whole_heights]
    assert (ours == 1).mean(0) == pytest.approx(whole, abs=0.008)
    assert (theirs == 1).mean(0) == pytest.approx(whole, abs=0.008)
    assert ours.mean(0) == pytest.approx(theirs.mean(0), abs=0.01)
    tenths = np.arange(0.1, 1, 0.1)
    assert np.quantile(ours, tenths, 0) == pytest.approx(np.quantile(theirs, tenths, 0), abs=0.02)


@pytest.mark.parametrize("split", ["val", "testB"])
def test_the_box_still_covers_its_object_by_colour(split):
    """After a mirror image and a crop, the box is tight around the pixels of its object."""
    rng = random.Random(2)
    mirrored = 0
    seen = 0
    first = data.SHAPES_SPLITS[split].first
    for number in range(first, first + 150):
        height, things, _ = data.scene(number)
        colours = [thing.colour for thing in things]
        for thing in things:
            if colours.count(thing.colour) > 1:
                continue
            flat = Image.new("RGB", (data.WIDTH, height), "white")   # shows this object alone
            flat.paste((0, 0, 255), thing.box)
            picture, [box], [text] = data.augment(flat, [thing.box], ["the left one"], rng, True)
            if text == "the right one":
                mirrored += 1
            picture, [box], _ = data.augment(picture, [box], ["cup"], rng, True)

            pixels = np.asarray(picture, int)
            ys, xs = np.nonzero(pixels[..., 2] > pixels[..., 0] + 5)   # still blue
            x1, y1, x2, y2 = box
            inside = [max(x1, 0), max(y1, 0), min(x2, picture.width), min(y2, picture.height)]
            blue = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            assert blue == pytest.approx(inside, abs=1.01)
            seen += 1
    assert seen > 100
    assert 0.35 < mirrored / seen < 0.65


class MirrorAlone:
    """A random generator that refuses the crop and the colours, and takes the mirror image."""

    def __init__(self):
        self.draws = [0.9, 0.9, 0.0]

    def random(self):
        return self.draws.pop(0)


BOX = (10, 20, 30, 40)   # in a picture of 100 x 60 pixels


# What people write about pictures, and what is true of the mirror image. None means that the
# expression forbids a mirror image, since no exchange of left and right would make it true.
EXPRESSIONS = [
    # Left and right where they begin a word.
    ("man on the Left", "man on the right"),
    ("guy on RIGHT", "guy on left"),
    ("right?", "left?"),
    ("far right, red", "far left, red"),
    ("left of the right dog", "right of the left dog"),
    ("leftmost cup", "rightmost cup"),
    ("rightest person", "leftest person"),
    ("lefty", "righty"),
    ("the two righties", "the two lefties"),
    ("girl leftish middle", "girl rightish middle"),
    ("cat looking leftwards", "cat looking rightwards"),
    ("left_side chair", "right_side chair"),
    ("right-hand lamp", "left-hand lamp"),
    ("lefthand door", "righthand door"),
    ("top_left zebra", "top_right zebra"),
    ("horse's left ear", "horse's right ear"),
    ("right behind him", "left behind him"),
    ("kid all right", "kid all left"),
    # Left and right inside a word.
    ("bright red copyright sign", "bright red copyright sign"),
    ("upright piano", "upright piano"),
    ("Mr Wright", "Mr Wright"),
    ("cleft in the rock", "cleft in the rock"),
    ("alright dude", "alright dude"),
    ("leftover pizza", "leftover pizza"),
    ("topleft zebra", None),
    ("bottomright", None),
    # Abbreviations and typing errors.
    ("lft guy", None),
    ("far lft", None),
    ("rt elephant", None),
    ("giraffe on L", None),
    ("R.", None),
    ("BL corner", None),
    ("rigth one", None),
    ("llama", "llama"),
    ("brown art", "brown art"),
    # Digits and words that count.
    ("2nd from L", None),
    ("1st dude", None),
    ("number 23", None),
    ("number five", None),
    ("second man", None),
    ("tenth player", None),
    ("eleventh jar from left", None),
    ("thirteenth car", None),
    ("twentieth car", None),
    ("the last one", None),
    ("two seconds", "two seconds"),
    ("blast", "blast"),
    ("one with three stripes", "one with three stripes"),
    # The clock and the compass.
    ("guy at 3 o'clock", None),
    ("guy at two o'clock", None),
    ("guy at two o\u2019clock", None),
    ("three oclock plate", None),
    ("four o clock", None),
    ("next pizza clockwise", None),
    ("counter-clockwise one", None),
    ("clock on the left", "clock on the right"),
    ("west side", None),
    ("northwest slice", None),
    ("north-east", None),
    ("Southwestern corner", None),
    ("easternmost boat", None),
    ("NW piece", None),
    ("least beast in a vest", "least beast in a vest"),
    ("north pole", "north pole"),
    ("starboard light", None),
    ("port side of the boat", None),
    ("port with boats", "port with boats"),
]


@pytest.mark.parametrize("before, after", EXPRESSIONS)
def test_a_mirror_image_keeps_the_words_true(before, after):
    """Picture, box and text are mirrored together, or none of the three."""
    red = (255, 0, 0)
    picture = Image.new("RGB", (100, 60), "white")
    picture.paste(red, (0, 0, 50, 60))   # the left half is red
    unchanged = data.augment(picture, [BOX], [before], MirrorAlone(), False)
    assert unchanged == (picture, [BOX], [before])

    mirror, [box], [text] = data.augment(picture, [BOX], [before], MirrorAlone(), True)
    if after is None:
        assert (mirror, box, text) == (picture, BOX, before)
    else:
        assert text == after
        assert box == (70, 20, 90, 40)
        assert mirror.getpixel((90, 5)) == red
        assert mirror.getpixel((10, 5)) == (255, 255, 255)


def sizes_after_augment(text):
    """The sizes that a picture of 100 x 60 pixels has after augment, over 20 seeds."""
    sizes = set()
    for seed in range(20):
        whole = Image.new("RGB", (100, 60))
        picture, _, _ = data.augment(whole, [BOX], [text], random.Random(seed), True)
        sizes.add(picture.size)
    return sizes


@pytest.mark.parametrize("text", [
    "man on the left", "top cup", "the middle one", "LOWER right", "in the center", "bottommost",
    "left-hand one", "lefty", "rightest", "left_side", "topleft", "lft guy", "northwest slice",
    "guy at two o'clock"])
def test_a_picture_whose_words_are_about_place_is_not_cropped(text):
    """A crop moves the edges and the middle, so that words about them would become false."""
    assert sizes_after_augment(text) == {(100, 60)}


@pytest.mark.parametrize("text", [
    "bright topping", "upright piano", "leftover pizza", "cleft", "second man", "number 23"])
def test_a_picture_whose_words_are_not_about_place_is_cropped(text):
    """These words hold parts of words about place, or only forbid a mirror image."""
    assert len(sizes_after_augment(text)) > 1


def test_colours_change_in_four_of_five_pictures():
    """Brightness, contrast and saturation change with chance 0.8, both up and down."""
    colour = (200, 100, 50)
    picture = Image.new("RGB", (30, 20), colour)
    changed = []
    for seed in range(300):
        rng = random.Random(seed)
        result, _, _ = data.augment(picture, [(1, 2, 9, 9)], ["left"], rng, False)
        changed.append(result.getpixel((0, 0)))
    share = np.mean([pixel != colour for pixel in changed])
    assert share == pytest.approx(0.8, abs=0.06)
    brightness = [sum(pixel) for pixel in changed]
    assert min(brightness) < 250   # the colour itself has 350
    assert max(brightness) > 420


@pytest.fixture
def noise_samples(tmp_path):
    Image.effect_noise((200, 150), 80).save(tmp_path / "a.png")
    sample = data.Sample(tmp_path / "a.png", "the cup", (20.0, 30.0, 90.0, 100.0), "a.png")
    return [sample] * 120


def make_items(samples, **options):
    dataset = data.GroundingDataset(samples, 64, len, DETR, **options)
    return [dataset[i] for i in range(len(samples))]


def equal_items(first, second):
    """For each pair of items: whether the images and the boxes are the same."""
    return [torch.equal(a.image, b.image) and a.box == b.box for a, b in zip(first, second)]


def test_augmentation_is_the_same_each_time_for_a_seed(noise_samples):
    """The same seed gives the same items, and another seed changes every item."""
    options = {"train": True, "augmented": True, "mirror": True}
    first = make_items(noise_samples, seed=0, **options)
    assert all(equal_items(first, make_items(noise_samples, seed=0, **options)))
    assert not any(equal_items(first, make_items(noise_samples, seed=1, **options)))


def test_augmentation_is_for_training_alone(noise_samples):
    """Without `train`, the other options change nothing."""
    plain = make_items(noise_samples)
    assert all(equal_items(plain, make_items(noise_samples, augmented=True, mirror=True)))


def test_augmentation_scales_the_picture(noise_samples):
    """Each of TransVG's scales occurs, from 0.7 to 1 of the square's side."""
    items = make_items(noise_samples, train=True, augmented=True, mirror=True)
    widths = {int((~item.padding).any(0).sum()) for item in items}
    expected = {round(64 * scale) for scale in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)}
    assert expected <= widths   # crops have other widths, too


# -------------------------------------------------------------------------------------------------
# Download, from a server on this machine

class Server(http.server.BaseHTTPRequestHandler):
    """Serves the files of a folder, and misbehaves as the fields below say."""
    folder = None    # where the files are
    limit = None     # number of bytes after which an answer breaks off
    ranges = True    # whether the server can begin in the middle of a file
    page = None      # this answer comes, with status 200, whatever is asked for
    asked = []       # (file, first byte) of each request

    def do_GET(self):
        path = Path(self.folder) / self.path.removeprefix("/files/")
        partial = self.ranges and self.page is None
        start = 0
        if partial:
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        self.asked.append((path.name, start))

        if not path.is_file():
            self.send_error(404)
            return
        if start > 0 and start >= path.stat().st_size:
            self.send_error(416)   # the range cannot be satisfied
            return

        content = self.page
        if content is None:
            content = path.read_bytes()[start:]
        self.send_response(206 if partial else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:self.limit])

    def log_message(self, *_):
        pass


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """The address of a server with refcoco.zip and train2014.zip, laid out as the real ones are."""
    original = tmp_path / "original"
    as_refer(original)
    pictures(original / "train2014")
    served = tmp_path / "served"
    served.mkdir()
    with zipfile.ZipFile(served / "refcoco.zip", "w") as archive:
        for name in ("refs(unc).p", "instances.json"):
            archive.write(original / "refcoco" / name, f"refcoco/{name}")
        archive.writestr("__MACOSX/refcoco/._instances.json", "not for us")
    with zipfile.ZipFile(served / "train2014.zip", "w") as archive:
        for number in PICTURES:
            archive.write(original / "train2014" / coco(number), f"train2014/{coco(number)}")
        archive.writestr(f"train2014/{coco(11)}", "no expression is about this picture")

    monkeypatch.setattr(Server, "folder", served)
    monkeypatch.setattr(Server, "limit", None)
    monkeypatch.setattr(Server, "ranges", True)
    monkeypatch.setattr(Server, "page", None)
    monkeypatch.setattr(Server, "asked", [])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    serve = functools.partial(server.serve_forever, poll_interval=0.01)
    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/files/"
    server.shutdown()
    server.server_close()


def fetch_all(tmp_path, mirror, dataset="refcoco"):
    data.read_splits.cache_clear()
    data.main([dataset, "--root", str(tmp_path / "new"), "--download", "--mirror", mirror])


def files(folder):
    """The relative paths of all files in a folder and below."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


ANNOTATION_FILES = {"refcoco/refs(unc).p", "refcoco/instances.json"}
ARCHIVES = {"refcoco.zip", "train2014.zip"}
PLACED = {f"images/train2014/{coco(number)}" for number in PICTURES}


def test_download_brings_annotations_and_the_pictures_that_they_name(tmp_path, mirror, capsys):
    """An empty folder gets the archives, the annotations and the pictures with expressions."""
    fetch_all(tmp_path, mirror)
    assert re.search("^train +1 +2 +3", capsys.readouterr().out, re.MULTILINE)
    assert files(tmp_path / "new") == ARCHIVES | ANNOTATION_FILES | PLACED
    picture = f"train2014/{coco(8)}"
    fetched = (tmp_path / "new/images" / picture).read_bytes()
    assert fetched == (tmp_path / "original" / picture).read_bytes()


def test_download_fetches_nothing_that_is_there(tmp_path, mirror):
    """Once all files are there, the archives are not fetched again, even if they were deleted."""
    fetch_all(tmp_path, mirror)
    for name in ARCHIVES:
        (tmp_path / "new" / name).unlink()
    Server.asked.clear()
    fetch_all(tmp_path, mirror)
    assert Server.asked == []


def test_download_unpacks_from_a_kept_archive_and_overwrites_nothing(tmp_path, mirror, capsys):
    """A picture that is missing comes from the kept archive; a picture that is there stays."""
    fetch_all(tmp_path, mirror)
    Server.asked.clear()
    folder = tmp_path / "new/images/train2014"
    (folder / coco(8)).unlink()
    (folder / coco(7)).write_text("mine")
    fetch_all(tmp_path, mirror)
    assert Server.asked == []
    assert (folder / coco(8)).exists()
    assert (folder / coco(7)).read_text() == "mine"
    fault = f"1 pictures that are missing or broken, such as {folder / coco(7)}"
    assert fault in capsys.readouterr().out


def test_nothing_is_fetched_if_one_of_the_datasets_cannot_be(tmp_path, mirror):
    """The error comes before the first request."""
    for other, words in (("referit", "referit cannot be fetched"), ("gone", "'gone': choose one")):
        with pytest.raises(InputError, match=words):
            fetch_all(tmp_path, mirror, f"refcoco,{other}")
    assert Server.asked == []


def test_pictures_are_fetched_once_and_for_annotations_of_any_format(tmp_path, mirror):
    """With MDETR's annotations only the pictures are fetched, and the next dataset reuses them."""
    as_mdetr(tmp_path / "new/mdetr")
    fetch_all(tmp_path, mirror)
    assert Server.asked == [("train2014.zip", 0)]
    assert len(files(tmp_path / "new/images/train2014")) == 3
    as_refer(tmp_path / "new", "refcocog", "google", refs=[(71, "train", ["x"])])
    fetch_all(tmp_path, mirror, "refcoco,refcocog-google")
    assert len(Server.asked) == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_broke_off_goes_on(tmp_path, mirror, monkeypatch, ranges):
    """The next call asks for the rest, or for the whole where the server cannot send the rest."""
    monkeypatch.setattr(Server, "ranges", ranges)
    monkeypatch.setattr(Server, "limit", 300)
    message = "refcoco.zip, from http.*300 of [0-9,]+ bytes came.*The same command goes on"
    with pytest.raises(InputError, match=message):
        fetch_all(tmp_path, mirror)
    archive = tmp_path / "new/refcoco.zip"
    assert files(tmp_path / "new") == {"refcoco.zip"}
    assert archive.stat().st_size == 300

    monkeypatch.setattr(Server, "limit", None)
    fetch_all(tmp_path, mirror)
    assert Server.asked[1] == ("refcoco.zip", 300 if ranges else 0)
    assert archive.read_bytes() == (tmp_path / "served/refcoco.zip").read_bytes()
    assert len(files(tmp_path / "new/images/train2014")) == 3


@pytest.mark.parametrize("page, words", [
    (b"<html>Sorry</html>", "refcoco.zip, from http.*no zip.*<html>Sorry.*--mirror"),
    (b"", "no zip")])
def test_a_page_in_place_of_an_archive_is_named_and_not_kept(
        tmp_path, mirror, monkeypatch, page, words):
    """A web page or an empty answer neither starts an archive nor changes a part of one."""
    monkeypatch.setattr(Server, "page", page)
    with pytest.raises(InputError, match=words):
        fetch_all(tmp_path, mirror)
    assert files(tmp_path / "new") == set()

    monkeypatch.setattr(Server, "page", None)
    monkeypatch.setattr(Server, "limit", 300)
    with pytest.raises(InputError, match="bytes came"):
        fetch_all(tmp_path, mirror)
    monkeypatch.setattr(Server, "page", page)
    with pytest.raises(InputError, match=words):
        fetch_all(tmp_path, mirror)
    assert files(tmp_path / "new") == {"refcoco.zip"}
    assert (tmp_path / "new/refcoco.zip").stat().st_size == 300

    monkeypatch.setattr(Server, "page", None)
    monkeypatch.setattr(Server, "limit", None)
    fetch_all(tmp_path, mirror)
    assert Server.asked[-2:] == [("refcoco.zip", 300), ("train2014.zip", 0)]


def test_a_server_or_file_that_is_not_there_is_named(tmp_path, mirror):
    """The error names the archive, the address and the reason."""
    (tmp_path / "served/train2014.zip").unlink()
    with pytest.raises(InputError, match="train2014.zip.*404.*--mirror"):
        fetch_all(tmp_path, mirror)
    message = "train2014.zip, from http://127.0.0.1:1/train2014.zip.*refused"
    with pytest.raises(InputError, match=message):
        fetch_all(tmp_path, "http://127.0.0.1:1")
    with pytest.raises(InputError, match="nowhere/train2014.zip.*unknown url type"):
        fetch_all(tmp_path, "nowhere")


def test_an_archive_with_a_damaged_end_says_what_to_delete(tmp_path, mirror):
    """The archive is as long as the server's, so the server has nothing to add (status 416)."""
    whole = (tmp_path / "served/train2014.zip").read_bytes()
    (tmp_path / "new").mkdir()
    (tmp_path / "new/train2014.zip").write_bytes(whole[:-30] + bytes(30))
    with pytest.raises(InputError, match="new/train2014.zip.*416.*delete the archive"):
        fetch_all(tmp_path, mirror)
    assert Server.asked[1:] == [("train2014.zip", len(whole))]   # one request is enough


def test_an_archive_with_a_damaged_picture_says_what_to_delete(tmp_path, mirror):
    """The picture's checksum shows the damage, and no part of the picture is kept."""
    whole = bytearray((tmp_path / "served/train2014.zip").read_bytes())
    place = whole.index(b"\xff\xd8\xff") + 40   # inside the first JPEG
    whole[place] ^= 255
    (tmp_path / "new").mkdir()
    (tmp_path / "new/train2014.zip").write_bytes(whole)
    with pytest.raises(InputError, match="new/train2014.zip.*CRC.*delete the archive"):
        fetch_all(tmp_path, mirror)
    assert not any("COCO" in name for name in files(tmp_path / "new"))

    (tmp_path / "new/train2014.zip").unlink()
    fetch_all(tmp_path, mirror)
    assert len(files(tmp_path / "new/images/train2014")) == 3


def test_a_killed_run_leaves_no_half_picture(tmp_path, mirror, monkeypatch):
    """A file that was being unpacked when the run was killed does not appear under its name."""
    def killed(path, content):
        with open(path, "wb") as file:
            file.write(content[:50])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            fetch_all(tmp_path, mirror)
    assert not ANNOTATION_FILES & files(tmp_path / "new")
    fetch_all(tmp_path, mirror)
    picture = data.load_picture(tmp_path / "new/images/train2014" / coco(8))
    assert picture.size == PICTURES[8]


def test_a_hostile_archive_leads_nowhere(tmp_path, mirror, capsys):
    """Paths with .., absolute paths, links and folders in an archive write no file elsewhere."""
    original = tmp_path / "original/train2014"
    with zipfile.ZipFile(tmp_path / "served/train2014.zip", "w") as archive:
        archive.writestr(f"../../../{coco(7)}", (original / coco(7)).read_bytes())
        archive.writestr(f"{tmp_path}/{coco(9)}", (original / coco(9)).read_bytes())
        archive.writestr(f"{tmp_path}/escaped.jpg", "x")
        link = zipfile.ZipInfo(f"train2014/{coco(8)}")
        link.create_system = 3   # Unix
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, str(tmp_path / "secret"))
        archive.writestr(f"train2014/{coco(8)}/", "")   # a folder of the same name

    before = files(tmp_path)
    fetch_all(tmp_path, mirror)
    added = files(tmp_path) - before
    assert added == {f"new/{name}" for name in ARCHIVES | ANNOTATION_FILES | PLACED}
    for name in PLACED:
        assert not (tmp_path / "new" / name).is_symlink()

    # The link became a file that holds the link's content, which is no picture.
    linked = tmp_path / "new/images/train2014" / coco(8)
    assert linked.read_text() == str(tmp_path / "secret")
    fault = f"1 pictures that are missing or broken, such as {linked}"
    assert fault in capsys.readouterr().out


@pytest.mark.parametrize("dataset, words", [
    ("referit", ("TransVG", "CLIP-VG", "drives", "/referit/images", "referit_*.pth")),
    ("flickr30k", ("authors", "form", "TransVG", "/Flickr30k/flickr30k-images", "flickr_*.pth",
                   "/flickr")),
    ("shapes", ("'shapes'", "choose one of refcoco, ")),
    ("my.jsonl", ("'my.jsonl'", "choose one of refcoco, ")),
    ("train2014", ("'train2014'", "choose one of refcoco, "))])
def test_a_dataset_that_cannot_be_fetched_says_where_its_files_are(tmp_path, dataset, words):
    """The error says who has the files and where to put them, or what can be fetched."""
    with pytest.raises(InputError) as error:
        data.main([dataset, "--root", str(tmp_path), "--download"])
    for word in words:
        assert word in str(error.value)


def test_every_published_dataset_has_an_address_or_a_holder():
    """REFER's datasets have an archive in ADDRESSES; the others have somebody in HOLDERS."""
    for dataset, info in data.DATASETS.items():
        if info.refer:
            assert f"{Path(info.refer).parent}.zip" in data.ADDRESSES
        else:
            assert dataset in data.HOLDERS
    assert "train2014.zip" in data.ADDRESSES


def test_help_shows_formats_addresses_and_leaks_in_80_columns(capsys):
    """The help holds every address, every folder and the leaks, and no line over 80 columns."""
    with pytest.raises(SystemExit):
        data.main(["--help"])
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 80

    joined = "".join(text.split())   # long addresses continue on the next line
    for name, folder in data.ADDRESSES.items():
        assert f"{folder}/{name}" in joined
    for info in data.DATASETS.values():
        for name in (*info.pictures, info.refer, f"{info.transvg}/"):
            assert name is None or name in joined
    plain = " ".join(text.split())
    assert "as users reported" in plain
    assert "None of them could be tried" in plain
    for name in data.UNSEEN:
        assert f"{name}.pth" in plain
