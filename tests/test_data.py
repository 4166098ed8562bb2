"""data.py: the meaning of every expression, the splits, the formats, the geometry."""
import json
import random
import re

import numpy as np
import pytest
import torch
from PIL import Image

import data
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
    ("{not json", "not JSON"), ("[1, 2]", "not an object"), ({**GOOD, "box": None}, "four numbers"),
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
    for name, word in (("broken.jpg", "decoded"), ("text.jpg", "decoded"), ("gone.jpg", "no such picture")):
        with pytest.raises(InputError, match=word) as error:
            item(name)
        assert name in str(error.value)
    with pytest.raises(InputError, match="outside the picture, which is 40 x 30"):
        item("grey.png", (50.0, 2.0, 90.0, 20.0))
    assert item("grey.png", (20.0, 10.0, 90.0, 90.0))[3] == pytest.approx([0.75, 0.625, 0.5, 0.5], abs=0.01)


def test_an_error_in_a_loading_process_is_still_one_line(tmp_path, capsys):
    import train
    dataset = data.GroundingDataset([data.Sample(tmp_path / "gone.jpg", "a", (0, 0, 1, 1), 0)], 64, len)
    with pytest.raises(SystemExit):
        train.run(lambda: list(torch.utils.data.DataLoader(dataset, num_workers=1)))
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "gone.jpg" in said and "\n" not in said


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
