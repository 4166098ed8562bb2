"""data.py: the meaning of every expression, the splits, the formats, the geometry."""
import functools
import http.server
import json
import os
import pickle
import random
import re
import stat
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import train
from model import InputError

SIZE_SYNONYMS = {"small": "small", "little": "small", "large": "large", "big": "large"}


def described(phrase, things):
    """The things that fit "small red circle", "blue shape", ...; read word by word."""
    for word in phrase.split():
        if word in ("red", "green", "blue", "yellow"):
            things = [t for t in things if t.colour == word]
        elif word in ("circle", "square", "triangle"):
            things = [t for t in things if t.shape == word]
        elif word in SIZE_SYNONYMS:
            things = [t for t in things if t.size == SIZE_SYNONYMS[word]]
        else:
            assert word in ("shape", "object"), f"{word!r} in {phrase!r}"
    return things


def meant(text, things):
    """Every thing that an expression may mean, worked out from its words alone: what a reader would do."""
    text = text.removeprefix("the ")
    if match := re.fullmatch(r"(second|third|fourth) (.+) from the (left|right|top|bottom)", text):
        rank, side = ("second", "third", "fourth").index(match[1]) + 1, match[3]
        key = {"left": lambda t: t.x, "right": lambda t: -t.x, "top": lambda t: t.y, "bottom": lambda t: -t.y}[side]
        ordered = sorted(described(match[2], things), key=key)
        return [t for t in ordered if len(ordered) > rank and key(t) == key(ordered[rank])]
    if match := re.fullmatch(r"(.+?) (to the left of|left of|to the right of|right of|above|higher than|below|under) the (.+)", text):
        anchor, = described(match[3], things)                       # the thing it is told by must be clear too
        ahead = {"left": lambda t: t.x < anchor.x, "right": lambda t: t.x > anchor.x, "above": lambda t: t.y < anchor.y,
                 "higher": lambda t: t.y < anchor.y, "below": lambda t: t.y > anchor.y, "under": lambda t: t.y > anchor.y}
        return [t for t in described(match[1], things)
                if t != anchor and ahead[match[2].removeprefix("to the ").split()[0]](t)]
    for pattern, key in ((r"leftmost (.+)|(.+) furthest to the left|(.+) on the left", lambda t: t.x),
                         (r"rightmost (.+)|(.+) furthest to the right|(.+) on the right", lambda t: -t.x),
                         (r"topmost (.+)|highest (.+)|(.+) at the top", lambda t: t.y),
                         (r"lowest (.+)|bottom (.+)|(.+) at the bottom", lambda t: -t.y)):
        if match := re.fullmatch(pattern, text):
            candidates = described(next(g for g in match.groups() if g), things)
            first = min(map(key, candidates))
            return [t for t in candidates if key(t) == first]
    return described(text, things)


@pytest.fixture(scope="module")
def samples():
    return {split: data.load_samples("shapes", split) for split in ("train", "val", "testA", "testB")}


def test_every_expression_means_its_object_and_no_other(samples):
    checked = 0
    for split in samples:
        for sample in samples[split]:
            _, things, _ = data.scene(sample.image)
            assert [tuple(map(float, t.box)) for t in meant(sample.text, things)] == [sample.box], (sample, things)
            checked += 1
    assert checked == 24_000 + 3 * 1200


def test_expressions_are_varied_and_colour_alone_does_not_solve_them(samples):
    texts = [s.text for s in samples["train"]]
    share = lambda pattern: sum(bool(re.search(pattern, t)) for t in texts) / len(texts)
    for pattern in ("red|green|blue|yellow", "circle|square|triangle", "small|little|large|big", "left|right|most|top|bottom",
                    " of the | above | below | under | higher than ", "second|third"):
        assert share(pattern) > 0.02, pattern
    assert len(set(texts)) > 3000
    right = 0.0
    for sample in samples["val"]:
        _, things, _ = data.scene(sample.image)
        colours = re.findall("red|green|blue|yellow", sample.text)
        guesses = [t for t in things if t.colour == colours[0]] if colours else things
        right += sum(tuple(map(float, t.box)) == sample.box for t in guesses) / len(guesses)
    assert right / len(samples["val"]) < 0.65             # the best that one who hears only the first colour can do


def test_splits_are_disjoint_and_differ_as_they_say(samples):
    def content(number):                                    # a picture, in whatever order its things are listed
        height, things, _ = data.scene(number)
        return height, tuple(sorted(things))
    content = {split: {content(s.image) for s in samples[split]} for split in samples}
    names = list(content)
    for i, a in enumerate(names):
        for b in names[i + 1:]:
            assert not content[a] & content[b]
    residues = [set(r) for *_, r in data.SHAPES_SPLITS.values()]
    assert sum(map(len, residues)) == len(set().union(*residues))       # by construction: a checksum has one split
    things = {split: [len(data.scene(s.image)[1]) for s in samples[split]] for split in samples}
    assert max(things["testA"]) < min(things["testB"])                  # few distractors, many distractors


def test_scenes_are_functions_of_their_number():
    first = data.scene(5), np.asarray(data.render(5))
    data.scene.cache_clear()
    random.seed(99)
    assert data.scene(5) == first[0] and np.array_equal(np.asarray(data.render(5)), first[1])


def test_pictures_show_what_the_scene_says():
    """The colour of the paint at a thing's centre is the thing's, and outside of all boxes there is only ground."""
    for number in range(100):
        _, things, _ = data.scene(number)
        pixels = np.asarray(data.render(number)).astype(int)
        outside = np.ones(pixels.shape[:2], bool)
        for t in things:
            nearest = min(data.COLOURS, key=lambda c: np.abs(pixels[t.y, t.x] - data.COLOURS[c]).sum())
            assert nearest == t.colour
            x1, y1, x2, y2 = t.box
            assert x1 >= 0 and y1 >= 0 and x2 < pixels.shape[1] and y2 < pixels.shape[0]
            outside[y1:y2 + 1, x1:x2 + 1] = False
            ink = np.argwhere((pixels == pixels[t.y, t.x]).all(-1) & ~outside)
            ink = ink[(abs(ink - [t.y, t.x]) <= t.r).all(1)]                          # this thing's paint: the box is tight
            assert np.abs(np.concatenate([ink.min(0)[::-1], ink.max(0)[::-1]]) - t.box).max() <= 1
        assert pixels[outside].min() > 200


# ---------------------------------------------------------------------------------------------------------------------
# Geometry

@pytest.mark.parametrize("size", [(128, 96), (60, 128), (100, 100), (1, 50), (640, 427)])
@pytest.mark.parametrize("seed", [None, 3])
def test_letterbox_keeps_the_picture_and_its_box(size, seed):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    image, padding, place = data.letterbox(picture, 64, random.Random(seed) if seed else None)
    w, h, left, top = place
    assert max(w, h) == 64 and (~padding).sum() == w * h
    assert image[:, padding].abs().max() == 0 if padding.any() else True
    resized = np.asarray(picture.resize((w, h), Image.Resampling.BILINEAR)) / 255
    back = image[:, top:top + h, left:left + w].permute(1, 2, 0).numpy() * np.array(data.PIXELS["detr"][1]) + data.PIXELS["detr"][0]
    assert np.abs(back - resized).max() < 1e-5
    box = (0.1 * size[0], 0.2 * size[1], 0.7 * size[0], 0.9 * size[1])
    cx, cy, bw, bh = data.to_square(box, picture.size, place, 64)
    assert (cx - bw / 2) * 64 == pytest.approx(left + 0.1 * w) and (cy + bh / 2) * 64 == pytest.approx(top + 0.9 * h)
    if seed is None:
        assert data.from_square((cx, cy, bw, bh), picture.size, 64) == pytest.approx(box, abs=1e-6)


def test_training_puts_pictures_at_different_places_the_same_way_each_time(samples):
    tokenizer = data.Tokenizer("shapes", None, 20)
    def tops(seed, train=True):
        dataset = data.GroundingDataset(samples["val"][:30], 64, tokenizer, train, seed)
        return [int((~dataset[i][1]).float().amax(1).argmax()) for i in range(30)]
    assert tops(1) == tops(1) != tops(2)
    assert tops(1, train=False) == tops(2, train=False)


def test_a_batch_pads_texts_to_its_longest(samples):
    tokenizer = data.Tokenizer("shapes", None, 20)
    dataset = data.GroundingDataset(samples["val"], 64, tokenizer)
    batch = data.collate([dataset[i] for i in range(5)], tokenizer.pad)
    lengths = [len(tokenizer(s.text)) for s in samples["val"][:5]]
    assert batch["tokens"].shape == (5, max(lengths)) and (~batch["token_padding"]).sum(1).tolist() == lengths
    assert (batch["tokens"][batch["token_padding"]] == tokenizer.pad).all()
    assert batch["images"].shape == (5, 3, 64, 64) and batch["boxes"].shape == (5, 4)


def test_tokenizer_reads_shapes_word_by_word_and_anything_else_in_pieces(samples):
    tokenizer = data.Tokenizer("shapes", None, 12)
    assert len(tokenizer.wordpiece) <= 256                                   # the tiny text encoder's vocabulary
    for sample in samples["val"]:
        assert len(tokenizer(sample.text)) == min(12, len(sample.text.split()) + 2)
    long = tokenizer("a zebra crossing, seen from the left and from the right and from above")
    assert len(long) == 12 and long[-1] == tokenizer.wordpiece.sep_token_id
    assert tokenizer.wordpiece.unk_token_id not in tokenizer("Zebra no. 7?")
    assert tokenizer.wordpiece.unk_token_id in tokenizer("猫")


# ---------------------------------------------------------------------------------------------------------------------
# JSONL

def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8")
    return str(path)


GOOD = {"image": "a.png", "text": "the red cup", "box": [1, 2.5, 30, 20], "split": "train"}


def test_jsonl_is_read(tmp_path):
    path = write(tmp_path / "my.jsonl", GOOD, "", {**GOOD, "split": "val", "text": "die rote Tasse ü"})
    assert data.split_names(path) == ["train", "val"]
    assert data.load_samples(path, "train") == [data.Sample(tmp_path / "a.png", "the red cup", (1.0, 2.5, 30.0, 20.0), "a.png")]
    (tmp_path / "elsewhere").mkdir()
    assert data.load_samples(path, "val", tmp_path / "elsewhere")[0].image == tmp_path / "elsewhere" / "a.png"


def test_jsonl_of_other_editors_is_read(tmp_path):
    """A byte order mark, Windows line ends, and a line separator of Unicode inside a text, which ends no line of JSONL."""
    line = json.dumps({**GOOD, "text": "a\u2028b"}, ensure_ascii=False)
    (tmp_path / "w.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n{line}\r\n".encode())
    assert [s.text for s in data.load_samples(tmp_path / "w.jsonl", "train")] == ["a\u2028b"] * 2
    (tmp_path / "latin.jsonl").write_bytes(line.encode() + b"\n" + '{"text": "ü"}'.encode("latin-1"))
    with pytest.raises(InputError, match="latin.jsonl, line 2"):
        data.load_samples(tmp_path / "latin.jsonl", "train")


@pytest.mark.parametrize("line, word", [
    ("{not json", "not JSON"), ("[1, 2]", "lacks image, text, box, split"), ({**GOOD, "box": None}, "four numbers"),
    ({**GOOD, "box": [1, 2, 3]}, "four numbers"), ({**GOOD, "box": [5, 5, 5, 9]}, "no area"),
    ({**GOOD, "box": [9, 5, 5, 9]}, "no area"), ('{"image": "a", "text": "b", "split": "train", "box": [1, 2, NaN, 4]}', "four numbers"),
    ('{"image": "a", "text": "b", "split": "train", "box": [1, 2, 1%s, 4]}' % (400 * "0"), "four numbers"), ("[" * 100_000, "not JSON"),
    ({**GOOD, "text": "  "}, "not empty"), ({k: v for k, v in GOOD.items() if k != "text"}, "lacks text"),
    ({"image": "a.png"}, "lacks text, box, split")])
def test_a_bad_line_is_named(tmp_path, line, word):
    path = write(tmp_path / "my.jsonl", GOOD, line)
    with pytest.raises(InputError) as error:
        data.load_samples(path, "train")
    assert "my.jsonl, line 2" in str(error.value) and word in str(error.value)


@pytest.mark.parametrize("dataset, split, root, words", [
    ("nothing", "train", None, ("nothing", "shapes", ".jsonl")), ("shapes", "test", None, ("test", "train, val, testA, testB")),
    ("gone.jsonl", "train", None, ("gone.jsonl", "no such file", '"box"')),
    ("my.jsonl", "train", "nowhere", ("nowhere", "no such folder")), ("my.jsonl", "test", None, ("test", "train")),
    ("empty.jsonl", "train", None, ("empty.jsonl", "no line"))])
def test_unknown_datasets_splits_and_folders_are_named(tmp_path, monkeypatch, dataset, split, root, words):
    monkeypatch.chdir(tmp_path)
    data._by_split.cache_clear()
    write(tmp_path / "my.jsonl", GOOD)
    write(tmp_path / "empty.jsonl")
    with pytest.raises(InputError) as error:
        data.load_samples(dataset, split, root)
    assert all(word in str(error.value) for word in words), error.value


def test_pictures_that_are_missing_broken_or_too_small_for_their_box_are_named(tmp_path):
    Image.new("L", (40, 30), 128).save(tmp_path / "grey.png")
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "grey.png").read_bytes()[:60])
    (tmp_path / "text.jpg").write_text("hello")
    tokenizer = data.Tokenizer("random", None, 20)
    def item(name, box=(1.0, 2.0, 30.0, 20.0)):
        return data.GroundingDataset([data.Sample(tmp_path / name, "a", box, name)], 64, tokenizer)[0]
    assert item("grey.png")[0].shape == (3, 64, 64)
    for name, word in (("broken.jpg", "decoded"), ("text.jpg", "decoded"), ("gone.jpg", "no such picture, nor 0 others")):
        with pytest.raises(InputError, match=word) as error:
            item(name)
        assert name in str(error.value)
    with pytest.raises(InputError, match="outside the picture, which is 40 x 30"):
        item("grey.png", (50.0, 2.0, 90.0, 20.0))
    assert item("grey.png", (20.0, 10.0, 90.0, 90.0))[3] == pytest.approx([0.75, 0.625, 0.5, 0.5], abs=0.01)


def test_an_error_in_a_loading_process_is_still_one_line(tmp_path, capsys):
    (tmp_path / "broken.jpg").write_text("hello")
    dataset = data.GroundingDataset([data.Sample(tmp_path / "broken.jpg", "a", (0, 0, 1, 1), 0)], 64, len)
    with pytest.raises(SystemExit):
        train.run(lambda: list(torch.utils.data.DataLoader(dataset, num_workers=1)))
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "broken.jpg" in said and "\n" not in said


def test_a_folder_with_weights_but_without_the_tokenizers_files_is_an_error(tmp_path):
    """transformers makes an empty vocabulary there, and every text would be its length and no more."""
    import transformers
    both = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    transformers.CLIPModel(transformers.CLIPConfig(text_config={**both, "vocab_size": 60, "eos_token_id": 59, "bos_token_id": 58},
                                                   vision_config=both)).save_pretrained(tmp_path / "clip")
    transformers.BertModel(transformers.BertConfig(**both)).save_pretrained(tmp_path / "bert")
    for name, flag in (("clip", "--clip-weights"), ("bert", "--text-weights")):
        with pytest.raises(InputError, match=flag):
            data.Tokenizer("pretrained", str(tmp_path / name), 20, 49408, flag)


def test_clips_tokenizer_lowers_and_keeps_its_ends(tmp_path):
    from transformers import CLIPTokenizer
    pieces = ["<|startoftext|>", "<|endoftext|>", *"redcupth", *(c + "</w>" for c in "redcupth"), "re", "red</w>"]
    (tmp_path / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    tokenizer = data.Tokenizer("pretrained", str(tmp_path), 5, len(pieces), "--clip-weights")
    assert tokenizer("RED cup") == tokenizer("red cup") and len(tokenizer("red cup red cup")) == 5
    for text in ("red", "red cup red cup"):
        ids = tokenizer(text)
        assert (ids[0], ids[-1]) == (0, 1) and ids.count(1) == 1
    assert tokenizer("red") == [0, pieces.index("red</w>"), 1]


# ---------------------------------------------------------------------------------------------------------------------
# The formats that people have

PICTURES = {7: (120, 90), 8: (90, 120), 9: (100, 100)}                       # COCO's id: width, height
ANNOTATIONS = {70: (7, [3.25, 4.5, 30.75, 40.0]), 71: (7, [50.0, 10.0, 20.0, 20.5]), 80: (8, [0.0, 0.0, 45.5, 60.25]),
               90: (9, [10, 20, 30, 40])}                                    # annotation: picture, x, y, w, h
REFS = [(70, "train", ["the bright cup", "cup on the left"]), (71, "train", ["right plate"]), (80, "val", ["tall man"]),
        (90, "testA", ["a woman", "woman in blue"])]
ROWS = [(split, ANNOTATIONS[thing][0], text, ANNOTATIONS[thing][1]) for thing, split, texts in REFS for text in texts]


def coco(picture):
    return f"COCO_train2014_{picture:012}.jpg"


def pictures(folder):
    folder.mkdir(parents=True)
    for number, size in PICTURES.items():
        Image.new("RGB", size, (200, 200, 200)).save(folder / coco(number))


def as_refer(root, name="refcoco", by="unc", refs=REFS):
    """As REFER's authors wrote it: protocol 2, and a file_name that is not the picture's."""
    (root / name).mkdir(parents=True, exist_ok=True)
    content = [{"ref_id": number, "ann_id": thing, "image_id": ANNOTATIONS[thing][0], "split": split, "category_id": 1,
                "file_name": coco(ANNOTATIONS[thing][0]).replace(".jpg", f"_{thing}.jpg"), "sent_ids": list(range(len(texts))),
                "sentences": [{"sent": text, "raw": text.upper(), "tokens": text.split(), "sent_id": i} for i, text in enumerate(texts)]}
               for number, (thing, split, texts) in enumerate(refs)]
    (root / name / f"refs({by}).p").write_bytes(pickle.dumps(content, protocol=2))
    (root / name / "instances.json").write_text(json.dumps({
        "images": [{"id": number, "file_name": coco(number), "width": w, "height": h} for number, (w, h) in PICTURES.items()],
        "annotations": [{"id": thing, "image_id": picture, "bbox": box, "category_id": 1} for thing, (picture, box) in ANNOTATIONS.items()]}))


def as_transvg(root, code="unc", size=None, item=list):
    (root / code).mkdir(parents=True)
    for split in ("train", "val", "testA"):
        torch.save([(coco(picture), size, item(box), text, []) for part, picture, text, box in ROWS if part == split],
                   root / code / f"{code}_{split}.pth")
    torch.save([(coco(7), size, item([1, 2, 3, 4]), "in both", [])], root / code / f"{code}_trainval.pth")      # theirs has it too


def as_hivg(root):
    as_transvg(root / "ref_data_shuffled", size={"height": 90, "width": 120})


def as_mdetr(root):
    root.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val", "testA"):
        rows = [(number, row) for number, row in enumerate(ROWS) if row[0] == split]
        (root / f"finetune_refcoco_{split}.json").write_text(json.dumps({
            "images": [{"file_name": coco(picture), "id": number, "original_id": picture, "caption": text, "dataset_name": "refcoco",
                        "tokens_negative": [[0, len(text)]]} for number, (_, picture, text, _) in rows],
            "annotations": [{"image_id": number, "id": 100 + number, "bbox": box, "original_id": 5, "area": 1.0, "iscrowd": 0,
                             "category_id": 1, "tokens_positive": [[0, 3]]} for number, (_, _, _, box) in rows]}))


EXPECTED = {split: [data.Sample(None, text, (float(x), float(y), float(x + w), float(y + h)), coco(picture))
                    for part, picture, text, (x, y, w, h) in ROWS if part == split] for split in ("train", "val", "testA")}


@pytest.mark.parametrize("write_format", [as_refer, as_transvg, as_hivg, as_mdetr])
@pytest.mark.parametrize("place", ["images/train2014", "train2014", "other/images/mscoco/images/train2014"])
def test_every_format_of_a_dataset_gives_the_same_samples(tmp_path, write_format, place):
    write_format(tmp_path)
    pictures(tmp_path / place)
    assert set(data.split_names("refcoco", tmp_path)) == set(EXPECTED)
    for split, samples in EXPECTED.items():
        found = data.load_samples("refcoco", split, tmp_path)
        assert found == [sample._replace(image=tmp_path / place / sample.image_id) for sample in samples]
        assert all(sample.image.is_file() and type(v) is float for sample in found for v in sample.box)
    assert found[0].box == (10, 20, 40, 60) and data.load_samples("refcoco", "train", tmp_path)[0].box == (3.25, 4.5, 34, 44.5)


def test_annotations_and_pictures_may_lie_one_folder_below_and_apart(tmp_path):
    as_refer(tmp_path / "annotations")
    pictures(tmp_path / "images/train2014")
    assert data.load_samples("refcoco", "val", tmp_path)[0].image == tmp_path / "images/train2014" / coco(8)


def test_what_is_written_as_jsonl_reads_the_same(tmp_path, capsys):
    as_refer(tmp_path)
    pictures(tmp_path / "images/train2014")
    target = tmp_path / "out" / "all.jsonl"
    target.parent.mkdir()
    data.main(["refcoco", "--root", str(tmp_path), "--write", str(target)])
    for split, samples in EXPECTED.items():
        again = data.load_samples(target, split)
        assert [(s.image.resolve(), s.text, s.box) for s in again] == [
            (tmp_path / "images/train2014" / s.image_id, s.text, s.box) for s in samples]
    with pytest.raises(InputError, match="all.jsonl: is there already"):
        data.main(["refcoco", "--root", str(tmp_path), "--write", str(target)])


@pytest.mark.parametrize("item", [list, np.array, tuple, torch.tensor])
def test_referit_and_flickr_boxes_are_corners(tmp_path, item):
    for code in ("referit", "flickr"):
        (tmp_path / code).mkdir()
        row = ("12.jpg", "referit", item([10.5, 20.0, 30.0, 40.0]), "a dog", [])
        torch.save([row if code == "referit" else (row[0], row[2], row[3])], tmp_path / code / f"{code}_test.pth")
    for dataset, folder in (("referit", "referit/images"), ("flickr30k", "Flickr30k/flickr30k-images")):
        assert data.load_samples(dataset, "test", tmp_path) == [
            data.Sample(tmp_path / folder / "12.jpg", "a dog", (10.5, 20.0, 30.0, 40.0), "12.jpg")]


@pytest.mark.parametrize("item", [np.array, tuple, torch.tensor])
def test_an_index_may_hold_its_boxes_as_any_kind_of_four_numbers(tmp_path, item):
    as_transvg(tmp_path, item=item)
    assert [s.box for s in data.load_samples("refcoco", "train", tmp_path)] == [s.box for s in EXPECTED["train"]]


def test_an_index_that_numpy_1_wrote_is_read(tmp_path):
    as_transvg(tmp_path, item=np.array)
    path = tmp_path / "unc/unc_val.pth"
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    assert any(b"numpy._core" in value for value in content.values())
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in content.items():
            archive.writestr(name, value.replace(b"numpy._core", b"numpy.core"))
    assert [s.box for s in data.load_samples("refcoco", "val", tmp_path)] == [s.box for s in EXPECTED["val"]]


class Command:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_a_pickle_that_would_run_a_command_is_refused(tmp_path):
    as_refer(tmp_path / "a")
    (tmp_path / "a/refcoco/refs(unc).p").write_bytes(pickle.dumps([Command(tmp_path / "ran")], protocol=2))
    (tmp_path / "b/unc").mkdir(parents=True)
    torch.save([Command(tmp_path / "ran")], tmp_path / "b/unc/unc_train.pth")
    for root, name in (("a", "refs(unc).p"), ("b", "unc_train.pth")):
        with pytest.raises(InputError, match=re.escape(name)):
            data.split_names("refcoco", tmp_path / root)
    assert not (tmp_path / "ran").exists()
    pickle.loads((tmp_path / "a/refcoco/refs(unc).p").read_bytes())           # and the test's pickle does what it says
    assert (tmp_path / "ran").exists()


def test_damaged_annotations_are_named(tmp_path):
    def fails(*said):
        data._by_split.cache_clear()
        with pytest.raises(InputError) as error:
            data.split_names("refcoco", tmp_path)
        assert all(word in str(error.value) for word in said), error.value
    fails("refcoco/refs(unc).p", "unc/unc_*.pth", "finetune_refcoco_*.json", "images/train2014", "README")        # what would be found
    as_refer(tmp_path, refs=[(70, "train", ["a"]), (71, "train", [" "])])
    fails("refs(unc).p, ref 1", "not empty")
    as_refer(tmp_path, refs=[(70, "train", ["a"])])
    instances = json.loads((tmp_path / "refcoco/instances.json").read_text())
    instances["annotations"][0]["bbox"] = [3, 4, 0, 5]
    (tmp_path / "refcoco/instances.json").write_text(json.dumps(instances))
    assert len(data.load_samples("refcoco", "train", tmp_path)) == 1                 # without area, which training leaves out
    del instances["annotations"][0]
    (tmp_path / "refcoco/instances.json").write_text(json.dumps(instances))
    fails("refs(unc).p", "KeyError: 70")
    (tmp_path / "refcoco/instances.json").write_text("{")
    fails("refs(unc).p", "JSONDecodeError")
    (tmp_path / "refcoco/instances.json").unlink()
    fails("instances.json")
    (tmp_path / "refcoco/refs(unc).p").write_bytes(b"\x80\x02]q\x00")
    fails("refs(unc).p", "EOFError")


def test_mixed_training_sees_no_picture_of_any_val_or_test(tmp_path, capsys):
    as_refer(tmp_path)                                                                         # train 7, val 8, testA 9
    as_refer(tmp_path, "refcoco+", refs=[(90, "train", ["x", "y"]), (71, "val", ["z"]), (80, "train", ["v"])])
    as_refer(tmp_path, "refcocog", "umd", refs=[(80, "test", ["w"])])
    names = "refcoco,refcoco+,refcocog-umd"
    assert data.split_names(names, tmp_path) == ["val", "refcoco/val", "refcoco/testA", "refcoco+/val", "refcocog-umd/test"]
    with pytest.raises(InputError, match="'train': choose one of val"):   # 7 is in refcoco+'s val, 9 in refcoco's testA, 8 in its val
        data.load_samples(names, "train", tmp_path)
    assert "6 of 6 expressions left out" in capsys.readouterr().out
    assert [s.text for s in data.load_samples(names, "val", tmp_path)] == ["tall man", "z"]
    assert [s.text for s in data.load_samples("refcoco,refcocog-umd", "train", tmp_path)] == [s.text for s in EXPECTED["train"]]
    with pytest.raises(InputError, match="shapes"):
        data.split_names("refcoco,shapes", tmp_path)
    for name, refs in (("refcoco", REFS), ("refcoco+", [(70, "val", ["z"]), (90, "train", ["y"])])):      # each with pictures of its own
        as_refer(tmp_path / "apart" / name, name, refs=refs)
        pictures(tmp_path / "apart" / name / "train2014")
    assert data.split_names("refcoco,refcoco+", tmp_path / "apart")[0] == "val"                              # told by their names
    capsys.readouterr()
    pictures(tmp_path / "images/train2014")
    data.main(["refcoco,refcocog-umd", "--root", str(tmp_path)])
    assert "both in" not in capsys.readouterr().out.replace("both in refcoco/val and in refcocog-umd/test", "")


def test_ones_own_pictures_are_told_by_their_paths_and_not_by_their_names(tmp_path):
    for name, others in (("a", ("train", "val")), ("b", ("val", "train"))):          # four pictures; of one name in different splits
        lines = [{**GOOD, "image": f"{other}/1.png", "split": split} for split, other in zip(("train", "val"), others)]
        (tmp_path / name).mkdir()
        write(tmp_path / name / "my.jsonl", *lines)
    assert len(data.load_samples(f"{tmp_path}/a/my.jsonl,{tmp_path}/b/my.jsonl", "train")) == 2
    write(tmp_path / "c.jsonl", {**GOOD, "image": "a/train/1.png", "split": "val"})
    assert [s.image for s in data.load_samples(f"{tmp_path}/a/my.jsonl,{tmp_path}/b/my.jsonl,{tmp_path}/c.jsonl", "train")] == [
        tmp_path / "b/val/1.png"]
    as_refer(tmp_path)
    pictures(tmp_path / "images/train2014")                                              # COCO's, named in a file of one's own
    write(tmp_path / "mine.jsonl", {**GOOD, "image": f"images/train2014/{coco(7)}", "split": "test"})
    with pytest.raises(InputError, match="'train': choose one of val"):
        data.load_samples(f"refcoco,{tmp_path}/mine.jsonl", "train", tmp_path)
    assert [s.text for s in data.load_samples(f"{tmp_path}/a/my.jsonl", "train")] == ["the red cup"]


def test_a_jsonl_may_have_a_comma_in_its_name_but_no_half_character_in_its_text(tmp_path):
    assert len(data.load_samples(write(tmp_path / "a,b.jsonl", GOOD), "train")) == 1
    with pytest.raises(InputError, match="line 1: .*broken Unicode"):
        data.load_samples(write(tmp_path / "c.jsonl", {**GOOD, "text": "a \ud83d cup"}), "train")


def test_the_command_line_counts_and_names_what_is_wrong(tmp_path, capsys):
    as_refer(tmp_path, refs=[*REFS, (71, "testB", ["one two three four"])])
    pictures(tmp_path / "images/train2014")
    instances = json.loads((tmp_path / "refcoco/instances.json").read_text())
    instances["annotations"][2]["bbox"][2] = 95.0                                      # of picture 8, which is 90 wide
    instances["annotations"][3]["bbox"][2] = 0                                         # of both expressions in testA
    (tmp_path / "refcoco/instances.json").write_text(json.dumps(instances))
    (tmp_path / "images/train2014" / coco(9)).write_bytes(b"\xff\xd8 broken")
    data.main(["refcoco", "--root", str(tmp_path), "--max-tokens", "5", "--save", str(tmp_path)])
    said = capsys.readouterr().out
    assert re.search(r"^train +1 +2 +3 +120,624  differs$", said, re.M) and re.search(r"^testA +1 +1 +2 +5,657  differs$", said, re.M)
    assert re.search(rf"^1 pictures that are missing or broken, such as .*{coco(9)}", said, re.M)
    assert re.search(rf"^1 boxes that reach out of the picture, such as .*{coco(8)}.*'tall man'", said, re.M)
    assert "2 expressions of more than 5 tokens, if a word is one, such as 'cup on the left'" in said
    assert "2 boxes without area, such as" in said and "1 pictures both in train and in testB" in said and "both in train and in val" not in said


def test_draw_shows_the_box_where_it_is(tmp_path, capsys):
    as_refer(tmp_path)
    pictures(tmp_path / "images/train2014")
    data.main(["refcoco", "--root", str(tmp_path), "--draw", "16", "--save", str(tmp_path)])
    sheet = np.asarray(Image.open(tmp_path / "val.png").convert("RGB"))
    ys, xs = np.nonzero((sheet == data.TRUE).all(-1))                       # picture 8, 90 x 120, at 256 pixels: 192 x 256
    assert (xs.min(), ys.min()) == pytest.approx((32, 0), abs=2)
    assert (xs.max(), ys.max()) == pytest.approx((32 + 45.5 * 256 / 120, 60.25 * 256 / 120), abs=3)
    assert {path.name for path in tmp_path.glob("*.png")} == {"train.png", "val.png", "testA.png"}
    data.draw(Image.new("RGB", (40, 30)), "inside out", [((30, 10, 20, 25), data.TRUE)])               # is drawn as a line


def test_attention_is_drawn_where_it_looks():
    for width, height, cell in ((200, 100, (3, 6)), (100, 200, (6, 3))):          # row, column of 8 x 8 over the padded square
        attention = torch.zeros(8, 8)
        attention[cell] = 1.0
        tile = np.asarray(data.draw(Image.new("RGB", (width, height), (90, 90, 90)), "", [], attention.flatten()), int)[:256]
        warm = tile[..., 0] - tile[..., 2] > 60                                           # orange, over grey or white
        ys, xs = np.nonzero(warm)
        assert (ys.mean(), xs.mean()) == pytest.approx(((cell[0] + 0.5) * 32, (cell[1] + 0.5) * 32), abs=3)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of any kind, and transforms

def test_pictures_of_every_mode_become_rgb(tmp_path):
    rgb = Image.new("RGB", (8, 6), (200, 100, 50))
    for mode in ("1", "L", "P", "CMYK", "RGBA", "LA", "YCbCr", "F"):
        name = tmp_path / f"{mode}.{'tif' if mode in ('CMYK', 'YCbCr', 'F') else 'png'}"
        (rgb.quantize() if mode == "P" else rgb.convert(mode)).save(name)
        picture = data.load_picture(name)
        assert picture.mode == "RGB" and picture.size == (8, 6)
        if mode in ("P", "CMYK", "RGBA", "YCbCr"):
            assert np.abs(np.asarray(picture, int) - (200, 100, 50)).max() < 40, mode
    clear = Image.new("RGBA", (8, 6), (0, 0, 0, 0))                                   # transparent: white, not what lies under it
    clear.putpixel((0, 0), (200, 100, 50, 255))
    clear.save(tmp_path / "clear.png")
    assert [data.load_picture(tmp_path / "clear.png").getpixel(p) for p in ((0, 0), (1, 1))] == [(200, 100, 50), (255, 255, 255)]


def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path):
    Image.fromarray(np.array([[0, 30000, 65535]], np.uint16)).save(tmp_path / "deep.png")
    assert [data.load_picture(tmp_path / "deep.png").getpixel((x, 0))[0] for x in range(3)] == [0, 117, 255]


def test_only_ones_own_picture_is_turned_as_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                                                   # to be turned by 90 degrees
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert data.load_picture(tmp_path / "a.jpg").size == (40, 20)
    assert data.load_picture(tmp_path / "a.jpg", upright=True).size == (20, 40)


def test_ten_thousand_random_boxes_survive_the_transforms():
    """The box's centre stays in the picture; so do its corners, or the crop's edges take their place; no area becomes zero."""
    rng, cropped, kept = random.Random(0), 0, []
    for number in range(10_000):
        width, height = rng.randint(20, 200), rng.randint(20, 200)
        x, y = rng.uniform(0, width - 1), rng.uniform(0, height - 1)
        box = (x, y, rng.uniform(x + 0.5, width), rng.uniform(y + 0.5, height))
        size = rng.choice((64, 224, 640))
        picture, (x1, y1, x2, y2), text = data.augment(Image.new("L", (width, height)).convert("RGB"), box, "a cup", size, rng, False)
        assert text == "a cup" and (x2 - x1, y2 - y1) == pytest.approx((box[2] - box[0], box[3] - box[1]))
        assert 0 < (x1 + x2) / 2 < picture.width and 0 < (y1 + y2) / 2 < picture.height
        cropped += picture.size != (width, height)
        place = data.placement(*picture.size, size, rng, 0.7)
        _, _, w, h = data.to_square((x1, y1, x2, y2), picture.size, place, size)
        assert w > 0 and h > 0
        seen = min(x2, picture.width) - max(x1, 0), min(y2, picture.height) - max(y1, 0)
        assert all(part >= 0.5 * min(side, edge) for part, side, edge in zip(seen, (x2 - x1, y2 - y1), picture.size))
        kept.append(seen[0] * seen[1] / ((x2 - x1) * (y2 - y1)))
    assert 3000 < cropped < 5000                                     # one half, less those that fit whole
    assert np.mean(np.array(kept) < 0.5) < 0.06, np.mean(np.array(kept) < 0.5)      # of boxes as large as these; of COCO's fewer


def test_crops_are_of_transvgs_sizes():
    """Short side 400, 500 or 600 of 640, then a crop of 384 to 600 a side; so of a square picture 64 % to 100 % of a side."""
    rng, sides = random.Random(1), []
    for _ in range(500):
        picture, _ = data.crop(Image.new("RGB", (640, 640)), (319, 319, 321, 321), 640, rng)
        sides += picture.size
    assert min(sides) == pytest.approx(384 / 600 * 640, abs=8) and max(sides) == 640
    wide = [data.crop(Image.new("RGB", (2000, 640)), (999, 319, 1001, 321), 640, rng)[0].width for _ in range(300)]
    assert 850 < max(w for w in wide if w < 2000) <= 600 * 640 / 400 and min(wide) == pytest.approx(384 * 640 / 600, abs=20)


@pytest.mark.parametrize("split", ["val", "testB"])
def test_the_box_still_covers_its_object_by_colour(split):
    """Every pixel of a thing's colour that its box held before is in it after, where there are any left; and nothing else's."""
    rng, mirrored, seen = random.Random(2), 0, 0
    for number in range(data.SHAPES_SPLITS[split][0], data.SHAPES_SPLITS[split][0] + 150):
        height, things, _ = data.scene(number)
        for thing in things:
            if [t.colour for t in things].count(thing.colour) > 1:
                continue
            flat = Image.new("RGB", (data.WIDTH, height), "white")                    # of this one thing, in one pure colour
            flat.paste((0, 0, 255), tuple(int(v) for v in thing.box))
            picture, box, text = data.augment(flat, thing.box, "the left one", 64, rng, True)
            mirrored += text == "the right one"
            picture, box, _ = data.augment(picture, box, "cup", 64, rng, True)
            pixels = np.asarray(picture, int)
            ys, xs = np.nonzero(pixels[..., 2] > pixels[..., 0] + 5)
            assert len(xs)
            inside = [max(box[0], 0), max(box[1], 0), min(box[2], picture.width), min(box[3], picture.height)]
            assert [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] == pytest.approx(inside, abs=1.01)
            seen += 1
    assert seen > 100 and 0.35 < mirrored / seen < 0.65


class MirrorAlone:
    """Says no to the crop, no to the colours, and yes to the mirror image."""
    def __init__(self):
        self.random = iter((0.9, 0.9, 0.0)).__next__


@pytest.mark.parametrize("before, after", [
    ("man on the Left", "man on the right"), ("leftmost cup", "rightmost cup"), ("right-hand lamp", "left-hand lamp"),
    ("bright red copyright sign", "bright red copyright sign"), ("left of the right dog", "right of the left dog"),
    ("upright piano", "upright piano"), ("lefthand door", "righthand door")])
def test_a_mirror_image_swaps_left_and_right_by_whole_words(before, after):
    picture = Image.new("RGB", (100, 60), "white")
    picture.paste((255, 0, 0), (0, 0, 50, 60))                                          # red on the left
    mirror, box, text = data.augment(picture, (10, 20, 30, 40), before, 64, MirrorAlone(), True)
    assert text == after and box == (70, 20, 90, 40)
    assert mirror.getpixel((90, 5)) == (255, 0, 0) and mirror.getpixel((10, 5)) == (255, 255, 255)
    assert data.augment(picture, (10, 20, 30, 40), before, 64, MirrorAlone(), False) == (picture, (10, 20, 30, 40), before)


@pytest.mark.parametrize("text", ["second man", "2nd dog", "number 23", "the last one", "lft guy", "guy at 3 o'clock", "west side"])
def test_what_a_mirror_image_would_make_false_is_not_mirrored(text):
    picture, box, said = data.augment(Image.new("RGB", (100, 60)), (10, 20, 30, 40), text, 64, MirrorAlone(), True)
    assert (said, box) == (text, (10, 20, 30, 40))


@pytest.mark.parametrize("text", ["man on the left", "top cup", "the middle one", "LOWER right", "in the center", "bottommost", "left-hand one"])
def test_a_picture_whose_words_are_about_place_is_not_cropped(text):
    assert all(data.augment(Image.new("RGB", (100, 60)), (10, 20, 30, 40), text, 64, random.Random(i), True)[0].size == (100, 60)
               for i in range(20))
    assert any(data.augment(Image.new("RGB", (100, 60)), (10, 20, 30, 40), "bright topping", 64, random.Random(i), True)[0].size != (100, 60)
               for i in range(20))


def test_colours_change_in_four_of_five_pictures():
    picture, changed = Image.new("RGB", (30, 20), (200, 100, 50)), []
    for seed in range(300):
        changed.append(data.augment(picture, (1, 2, 9, 9), "left", 64, random.Random(seed), False)[0].getpixel((0, 0)))
    assert np.mean([pixel != (200, 100, 50) for pixel in changed]) == pytest.approx(0.8, abs=0.06)
    assert min(sum(pixel) for pixel in changed) < 250 and max(sum(pixel) for pixel in changed) > 420


def test_transforms_are_of_training_alone_and_the_same_each_time(tmp_path):
    Image.effect_noise((200, 150), 80).save(tmp_path / "a.png")
    samples = [data.Sample(tmp_path / "a.png", "the cup", (20.0, 30.0, 90.0, 100.0), "a.png")] * 120
    def items(seed, train, transforms):
        return list(data.GroundingDataset(samples, 64, len, train, seed, transforms=transforms))
    def same(a, b):
        return [torch.equal(x[0], y[0]) and x[3] == y[3] for x, y in zip(a, b)]
    first = items(0, True, {"mirror": True})
    assert all(same(first, items(0, True, {"mirror": True}))) and not any(same(first, items(1, True, {"mirror": True})))
    assert all(same(items(0, False, {"mirror": True}), items(0, False, None)))
    widths = {int((~padding).any(0).sum()) for _, padding, *_ in first}
    assert {round(64 * scale) for scale in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)} <= widths      # of whole pictures, and of crops


# ---------------------------------------------------------------------------------------------------------------------
# Download: from this machine, by a server that does what servers do

class Server(http.server.BaseHTTPRequestHandler):
    """Serves a folder, from the middle of a file where it is asked to. limit: bytes of an answer after which it breaks off.
    page: what it says, with status 200, whatever it is asked for. asked: (file, first byte) of each request."""
    folder, limit, ranges, page, asked = None, None, True, None, []

    def do_GET(self):
        path = Path(self.folder) / self.path.removeprefix("/files/")
        start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")) if self.ranges and self.page is None else 0
        self.asked.append((path.name, start))
        if not path.is_file() or start and start >= path.stat().st_size:
            return self.send_error(416 if path.is_file() else 404)
        content = path.read_bytes()[start:] if self.page is None else self.page
        self.send_response(206 if self.ranges and self.page is None else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:self.limit])

    def log_message(self, *_):
        pass


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """An address that serves tmp_path / "served" with refcoco.zip and train2014.zip as the real ones are laid out."""
    as_refer(tmp_path / "original")
    pictures(tmp_path / "original/train2014")
    served = tmp_path / "served"
    served.mkdir()
    with zipfile.ZipFile(served / "refcoco.zip", "w") as archive:
        for name in ("refs(unc).p", "instances.json"):
            archive.write(tmp_path / "original/refcoco" / name, f"refcoco/{name}")
        archive.writestr("__MACOSX/refcoco/._instances.json", "not for us")
    with zipfile.ZipFile(served / "train2014.zip", "w") as archive:
        for number in PICTURES:
            archive.write(tmp_path / "original/train2014" / coco(number), f"train2014/{coco(number)}")
        archive.writestr(f"train2014/{coco(11)}", "a picture that no expression is about")
    for name, value in (("folder", served), ("limit", None), ("ranges", True), ("page", None), ("asked", [])):
        monkeypatch.setattr(Server, name, value)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.01), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/files/"
    server.shutdown()
    server.server_close()


def fetch_all(tmp_path, mirror, dataset="refcoco"):
    data._by_split.cache_clear()
    data.main([dataset, "--root", str(tmp_path / "new"), "--download", "--mirror", mirror])


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def test_download_brings_annotations_and_the_pictures_that_they_name(tmp_path, mirror, capsys):
    fetch_all(tmp_path, mirror)
    assert re.search(r"^train +1 +2 +3", capsys.readouterr().out, re.M)
    placed = {f"images/train2014/{coco(number)}" for number in PICTURES}
    assert files(tmp_path / "new") == {"refcoco.zip", "train2014.zip", "refcoco/refs(unc).p", "refcoco/instances.json", *placed}
    new = tmp_path / "new/images/train2014"
    assert (new / coco(8)).read_bytes() == (tmp_path / "original/train2014" / coco(8)).read_bytes()
    for gone in ("refcoco.zip", "train2014.zip"):
        (tmp_path / "new" / gone).rename(tmp_path / gone)
    Server.asked.clear()
    fetch_all(tmp_path, mirror)
    assert Server.asked == []                                                    # all is there: nothing is fetched again
    (tmp_path / "train2014.zip").rename(tmp_path / "new/train2014.zip")
    (new / coco(8)).unlink()
    (new / coco(7)).write_text("mine")
    fetch_all(tmp_path, mirror)                                                   # from the archive that was kept
    assert Server.asked == [] and (new / coco(8)).exists() and (new / coco(7)).read_text() == "mine"
    assert f"1 pictures that are missing or broken, such as {new / coco(7)}" in capsys.readouterr().out


def test_pictures_are_fetched_once_and_for_annotations_of_any_format(tmp_path, mirror):
    with pytest.raises(InputError, match="referit cannot be fetched"):                  # said before anything is fetched
        fetch_all(tmp_path, mirror, "refcoco,referit")
    assert Server.asked == []
    as_mdetr(tmp_path / "new/mdetr")
    fetch_all(tmp_path, mirror)
    assert Server.asked == [("train2014.zip", 0)] and len(files(tmp_path / "new/images/train2014")) == 3
    as_refer(tmp_path / "new", "refcocog", "google", refs=[(71, "train", ["x"])])
    fetch_all(tmp_path, mirror, "refcoco,refcocog-google")
    assert len(Server.asked) == 1


def test_pictures_are_found_in_a_folder_of_their_own(tmp_path):
    """One below --root, as annotations may be: COCO is there once for all datasets."""
    as_refer(tmp_path / "annotations")
    pictures(tmp_path / "coco/train2014")
    assert data.find_files("refcoco", str(tmp_path))[1] == tmp_path / "coco/train2014"


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_broke_off_goes_on(tmp_path, mirror, monkeypatch, ranges):
    monkeypatch.setattr(Server, "ranges", ranges)
    monkeypatch.setattr(Server, "limit", 300)
    with pytest.raises(InputError, match="refcoco.zip, from http.*300 of [0-9,]+ bytes came.*The same command goes on"):
        fetch_all(tmp_path, mirror)
    assert files(tmp_path / "new") == {"refcoco.zip"} and (tmp_path / "new/refcoco.zip").stat().st_size == 300
    monkeypatch.setattr(Server, "limit", None)
    fetch_all(tmp_path, mirror)
    assert Server.asked[1] == ("refcoco.zip", 300 if ranges else 0)
    assert (tmp_path / "new/refcoco.zip").read_bytes() == (tmp_path / "served/refcoco.zip").read_bytes()
    assert len(files(tmp_path / "new/images/train2014")) == 3


def test_a_page_in_place_of_an_archive_is_named_and_not_kept(tmp_path, mirror, monkeypatch):
    for limit in (None, 300):                                              # with nothing there, and with a part there
        monkeypatch.setattr(Server, "limit", limit)
        if limit:
            with pytest.raises(InputError, match="bytes came"):
                fetch_all(tmp_path, mirror)
        monkeypatch.setattr(Server, "page", b"<html>Sorry</html>")
        with pytest.raises(InputError, match="refcoco.zip, from http.*no zip.*<html>Sorry.*--mirror"):
            fetch_all(tmp_path, mirror)
        assert files(tmp_path / "new") == ({"refcoco.zip"} if limit else set())
        monkeypatch.setattr(Server, "page", b"")                                               # nor is an empty answer a zip
        with pytest.raises(InputError, match="no zip"):
            fetch_all(tmp_path, mirror)
        assert not limit or (tmp_path / "new/refcoco.zip").stat().st_size == limit
        monkeypatch.setattr(Server, "page", None)
    monkeypatch.setattr(Server, "limit", None)
    fetch_all(tmp_path, mirror)
    assert Server.asked[-2:] == [("refcoco.zip", 300), ("train2014.zip", 0)]


def test_a_server_or_file_that_is_not_there_is_named(tmp_path, mirror):
    (tmp_path / "served/train2014.zip").unlink()
    with pytest.raises(InputError, match="train2014.zip.*404.*--mirror"):
        fetch_all(tmp_path, mirror)
    with pytest.raises(InputError, match="train2014.zip, from http://127.0.0.1:1/train2014.zip.*refused"):
        fetch_all(tmp_path, "http://127.0.0.1:1")
    with pytest.raises(InputError, match="nowhere/train2014.zip.*unknown url type"):
        fetch_all(tmp_path, "nowhere")


def test_a_whole_archive_that_is_damaged_says_what_to_delete(tmp_path, mirror):
    whole = (tmp_path / "served/train2014.zip").read_bytes()
    (tmp_path / "new").mkdir()
    (tmp_path / "new/train2014.zip").write_bytes(whole[:-30] + bytes(30))               # its end: the server has no more, 416
    with pytest.raises(InputError, match="new/train2014.zip.*416.*delete the archive"):
        fetch_all(tmp_path, mirror)
    assert Server.asked[1:] == [("train2014.zip", len(whole))]                                            # and once is enough
    place = whole.index(b"\xff\xd8\xff") + 40
    (tmp_path / "new/train2014.zip").write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1:])
    with pytest.raises(InputError, match="new/train2014.zip.*CRC.*delete the archive"):                  # a picture's content
        fetch_all(tmp_path, mirror)
    assert not any("COCO" in name for name in files(tmp_path / "new"))                             # nor a part of the picture
    (tmp_path / "new/train2014.zip").unlink()
    fetch_all(tmp_path, mirror)
    assert len(files(tmp_path / "new/images/train2014")) == 3


def test_a_killed_run_leaves_no_half_picture(tmp_path, mirror, monkeypatch):
    def killed(path, content):
        open(path, "wb").write(content[:50])
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            fetch_all(tmp_path, mirror)
    assert not {"refs(unc).p", "instances.json"} & {path.name for path in (tmp_path / "new/refcoco").iterdir()}
    fetch_all(tmp_path, mirror)
    assert data.load_picture(tmp_path / "new/images/train2014" / coco(8)).size == PICTURES[8]


def test_a_hostile_archive_leads_nowhere(tmp_path, mirror, capsys):
    with zipfile.ZipFile(tmp_path / "served/train2014.zip", "w") as archive:
        archive.writestr(f"../../../{coco(7)}", (tmp_path / "original/train2014" / coco(7)).read_bytes())
        archive.writestr(f"{tmp_path}/{coco(9)}", (tmp_path / "original/train2014" / coco(9)).read_bytes())
        archive.writestr(f"{tmp_path}/escaped.jpg", "x")
        link = zipfile.ZipInfo(f"train2014/{coco(8)}")
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, str(tmp_path / "secret"))
        archive.writestr(f"train2014/{coco(8)}/", "")                                                # a folder of that name
    before = files(tmp_path)
    fetch_all(tmp_path, mirror)
    placed = {f"new/images/train2014/{coco(number)}" for number in PICTURES}
    assert files(tmp_path) - before == {"new/refcoco.zip", "new/train2014.zip", "new/refcoco/refs(unc).p", "new/refcoco/instances.json",
                                        *placed}
    assert not any((tmp_path / name).is_symlink() for name in placed)
    assert f"1 pictures that are missing or broken, such as {tmp_path}/new/images/train2014/{coco(8)}" in capsys.readouterr().out
    assert (tmp_path / "new/images/train2014" / coco(8)).read_text() == str(tmp_path / "secret")           # the link's content


@pytest.mark.parametrize("dataset, words", [
    ("referit", ("TransVG", "CLIP-VG", "drives", "/referit/images", "referit_*.pth")),
    ("flickr30k", ("authors", "form", "TransVG", "/Flickr30k/flickr30k-images", "flickr_*.pth", "/flickr")),
    ("shapes", ("'shapes'", "choose one of refcoco, ")), ("my.jsonl", ("'my.jsonl'", "choose one of refcoco, ")),
    ("train2014", ("'train2014'", "choose one of refcoco, "))])
def test_what_cannot_be_fetched_is_told(tmp_path, dataset, words):
    with pytest.raises(InputError) as error:
        data.main([dataset, "--root", str(tmp_path), "--download"])
    assert all(word in str(error.value) for word in words), error.value


def test_addresses_are_the_readmes(capsys):
    readme = (Path(data.__file__).parent / "README.md").read_text(encoding="utf-8")
    assert all(f"`{folder}/{name}`" in readme for name, folder in data.ADDRESSES.items() if name.endswith(".zip"))
    assert {f"{data.Path(refer).parent}.zip" for refer, *_ in data.DATASETS.values() if refer} < set(data.ADDRESSES)
    with pytest.raises(SystemExit):
        data.main(["--help"])
    assert "as users reported" in " ".join(capsys.readouterr().out.split())
