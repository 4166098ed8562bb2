"""data.py: the dataset `shapes`, the formats, the checks before training, geometry, tokenizers,
augmentation, batches, drawings, downloads."""
import functools
import gzip
import hashlib
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
import safetensors.torch
import tokenizers
import torch
import torchvision.transforms.functional as TF
import transformers
from PIL import Image

import data
import evaluate
import losses
import model as m
import train
from data import InputError

ROOT = Path(data.__file__).parent


# --- shapes ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def val():
    return data.load_samples("shapes", "val")


def test_no_sample_and_no_pixel_of_shapes_changes():
    """All figures in the results were measured on these texts, boxes, scene numbers and images.
    Python's global random state is no part of them."""
    splits = [[tuple(s) for s in data.load_samples("shapes", x)]
              for x in ("train", "val", "testA", "testB")]
    assert [len(split) for split in splits] == [24_000, 1200, 1200, 1200]
    content = hashlib.md5(repr(splits).encode()).hexdigest()
    assert content == "075741304d96dff8f94e3983dcbe04af"
    random.seed(99)
    pixels = hashlib.md5()
    for number in range(5_000_000, 5_000_300):
        image = data.load_image(number)
        assert data.image_size(number) == image.size
        pixels.update(image.tobytes())
    assert pixels.hexdigest() == "11c9fffbc053cdd0015f961a4aa5bd99"


def test_the_script_makes_the_file_again(tmp_path, monkeypatch):
    """assets/make_shapes.py writes the first scenes of each split, and the tokenizer, as they are
    in assets."""
    monkeypatch.syspath_prepend(data.ASSETS)
    import make_shapes
    few = {name: split._replace(scenes=25) for name, split in make_shapes.SPLITS.items()}
    monkeypatch.setattr(make_shapes, "SPLITS", few)
    make_shapes.write_scenes(tmp_path / "few.gz")

    whole = gzip.open(data.SHAPES_FILE, "rt").readlines()
    starts = (0, 8000, 8400, 8800)
    expected = [line for start in starts for line in whole[start:start + 25]]
    assert len(whole) == 9200
    assert gzip.open(tmp_path / "few.gz", "rt").readlines() == expected

    make_shapes.write_tokenizer(tmp_path / "tokenizer.json")
    vocabularies = [tokenizers.Tokenizer.from_file(str(folder)).get_vocab() for folder in
                    (tmp_path / "tokenizer.json", data.ASSETS / "tiny-tokenizer.json")]
    assert vocabularies[0] == vocabularies[1]
    assert len(vocabularies[0]) <= 256    # what the tiny text encoder knows


# --- Own files in JSONL ---------------------------------------------------------------------------

GOOD = {"image": "a.png", "text": "the red cup", "box": [1, 2.5, 30, 20], "split": "train"}


def write(path, *lines):
    """Write a .jsonl file; a line is an object or the text of the line itself. Returns the path."""
    path.parent.mkdir(exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return str(path)


def test_jsonl_is_read(tmp_path):
    """Empty lines, a byte order mark, Windows line ends and Unicode's line separator do no harm. A
    limit takes the first samples, paths start from the file's folder or from root, and the file's
    name may hold a comma."""
    path = write(tmp_path / "my,own.jsonl", GOOD, "", {**GOOD, "split": "val", "text": "Tasse ü"},
                 {**GOOD, "split": "val"})
    assert data.split_names(path) == ["train", "val"]
    expected = data.Sample(tmp_path / "a.png", "the red cup", (1.0, 2.5, 30.0, 20.0), "a.png")
    assert data.load_samples(path, "train") == [expected]
    (tmp_path / "elsewhere").mkdir()
    sample, = data.load_samples(path, "val", tmp_path / "elsewhere", limit=1)
    assert (sample.image, sample.text) == (tmp_path / "elsewhere" / "a.png", "Tasse ü")

    line = json.dumps({**GOOD, "text": "a\u2028b"}, ensure_ascii=False)
    (tmp_path / "w.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n{line}\r\n".encode())
    assert texts_of(tmp_path / "w.jsonl", "train") == ["a\u2028b", "a\u2028b"]
    (tmp_path / "latin.jsonl").write_bytes(line.encode() + '\n{"text": "ü"}'.encode("latin-1"))
    with pytest.raises(InputError, match="latin.jsonl, line 2"):
        data.load_samples(tmp_path / "latin.jsonl", "train")


def test_a_bad_line_is_named(tmp_path):
    """The error names the file, the line and what is wrong with the line."""
    with_box = '{"image": "a", "text": "b", "split": "train", "box": [1, 2, %s, 4]}'
    for number, (line, words) in enumerate([
            ("{not json", "not JSON"), ("[" * 100_000, "not JSON"),
            ("[1, 2]", "lacks image, text, box, split"),
            ({"image": "a.png", "box": [1, 2, 3, 4]}, "lacks text, split"),
            ({**GOOD, "box": [1, 2, 3]}, "four numbers"), (with_box % "NaN", "four numbers"),
            (with_box % ("1" + 400 * "0"), "four numbers"),
            ({**GOOD, "box": [5, 5, 5, 9]}, "no area"), ({**GOOD, "text": "  "}, "not empty"),
            ({**GOOD, "text": "a \ud83d cup"}, "broken Unicode")]):
        path = write(tmp_path / f"{number}.jsonl", GOOD, line)
        with pytest.raises(InputError, match=f"{number}.jsonl, line 2: .*{words}"):
            data.load_samples(path, "train")


def test_unknown_datasets_splits_and_folders_are_named(tmp_path, monkeypatch):
    """The error names what is unknown, and what could be chosen."""
    monkeypatch.chdir(tmp_path)
    data.samples_by_split.cache_clear()
    write(tmp_path / "my.jsonl", GOOD)
    write(tmp_path / "empty.jsonl")
    write(tmp_path / "odd.jsonl", {**GOOD, "split": "Train"})
    as_transvg(tmp_path / "part")
    (tmp_path / "part/unc/unc_train.pth").unlink()
    for dataset, split, root, words in (
            ("nothing", "train", None, "nothing: no such dataset .*shapes.*no such file.*.jsonl"),
            ("gone.jsonl", "train", None, "gone.jsonl: there is no such file, seen from the folder"),
            ("shapes", "test", None, "shapes 'test': choose one of train, val, testA, testB"),
            ("my.jsonl", "train", "nowhere", "--root nowhere: there is no such folder"),
            ("my.jsonl", "test", None, "my.jsonl 'test': choose one of train"),
            ("odd.jsonl", "train", None, "write 'train' for 'Train'"),
            ("refcoco", "train", "part", "part/unc/unc_train.pth is missing; there are .*val"),
            ("my.jsonl,shapes", "train", None, "shapes .*cannot be joined"),
            ("empty.jsonl", "train", None, "empty.jsonl: the file holds no line")):
        with pytest.raises(InputError, match=words):
            data.load_samples(dataset, split, root)


# --- The published formats: the same annotations, written as each of them -------------------------

IMAGES = {7: (120, 90), 8: (90, 120), 9: (100, 100)}   # COCO's image id: (width, height)
ANNOTATIONS = {   # annotation id: (image id, [x, y, w, h])
    70: (7, [3.25, 4.5, 30.75, 40.0]),
    71: (7, [50.0, 10.0, 20.0, 20.5]),
    80: (8, [0.0, 0.0, 45.5, 60.25]),
    90: (9, [10, 20, 30, 40])}
REFS = [   # (annotation id, split, texts)
    (70, "train", ["the bright cup", "cup on the left"]),
    (71, "train", ["right plate"]),
    (80, "val", ["tall man"]),
    (90, "testA", ["a woman", "woman in blue"])]
SPLITS = ("train", "val", "testA")


def rows_of(split):
    """Return (image id, text, [x, y, w, h]) of each expression of a split."""
    return [(ANNOTATIONS[annotation][0], text, ANNOTATIONS[annotation][1])
            for annotation, ref_split, texts in REFS if ref_split == split for text in texts]


def coco(image):
    return f"COCO_train2014_{image:012}.jpg"


def write_images(folder):
    folder.mkdir(parents=True)
    for number, size in IMAGES.items():
        Image.new("RGB", size, (200, 200, 200)).save(folder / coco(number))


def as_refer(root, name="refcoco", by="unc", refs=REFS):
    """Write REFER's format as its authors do: protocol 2, and a file_name that is not the
    image's."""
    content = []
    for number, (annotation, split, texts) in enumerate(refs):
        image, _ = ANNOTATIONS[annotation]
        content.append({
            "ref_id": number, "ann_id": annotation, "image_id": image, "split": split,
            "file_name": coco(image).replace(".jpg", f"_{annotation}.jpg"),
            "sentences": [{"sent": text, "raw": text.upper()} for text in texts]})
    instances = {
        "images": [{"id": number, "file_name": coco(number)} for number in IMAGES],
        "annotations": [{"id": number, "image_id": image, "bbox": box}
                        for number, (image, box) in ANNOTATIONS.items()]}
    (root / name).mkdir(parents=True, exist_ok=True)
    (root / name / f"refs({by}).p").write_bytes(pickle.dumps(content, protocol=2))
    (root / name / "instances.json").write_text(json.dumps(instances))


def as_transvg(root, code="unc", size=None, item=list):
    """Write TransVG's format. item: the type of the boxes."""
    (root / code).mkdir(parents=True)
    for split in SPLITS:
        rows = [(coco(image), size, item(box), text, []) for image, text, box in rows_of(split)]
        torch.save(rows, root / code / f"{code}_{split}.pth")
    # TransVG has a file of train and val together, too, which must not be read.
    both = [(coco(7), size, item([1, 2, 3, 4]), "in both", [])]
    torch.save(both, root / code / f"{code}_trainval.pth")


def as_mdetr(root):
    """Write MDETR's format: each expression has an "image" of its own."""
    root.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        content = {"images": [], "annotations": []}
        for number, (image, text, box) in enumerate(rows_of(split)):
            content["images"].append({"file_name": coco(image), "id": number, "caption": text,
                                      "original_id": image})
            content["annotations"].append({"image_id": number, "id": 100 + number, "bbox": box})
        (root / f"finetune_refcoco_{split}.json").write_text(json.dumps(content))


def expected_samples(split, folder):
    return [data.Sample(folder / coco(image), text, (x, y, x + w, y + h), coco(image))
            for image, text, (x, y, w, h) in rows_of(split)]


def texts_of(dataset, split, root=None):
    return [sample.text for sample in data.load_samples(dataset, split, root)]


@pytest.mark.parametrize("write_format", [
    as_refer, as_transvg, lambda root: as_transvg(root / "ref_data_shuffled"), as_mdetr])
@pytest.mark.parametrize("place", [
    "images/train2014", "other/images/mscoco/images/train2014", "coco/train2014"])
def test_every_format_of_a_dataset_gives_the_same_samples(tmp_path, write_format, place):
    """The same annotations in any format, in root or in a folder below it, as TransVG's in HiVG,
    give the same samples, with boxes as float corners."""
    write_format(tmp_path)
    write_images(tmp_path / place)
    assert set(data.split_names("refcoco", tmp_path)) == set(SPLITS)
    for split in SPLITS:
        samples = data.load_samples("refcoco", split, tmp_path)
        assert samples == expected_samples(split, tmp_path / place)
        assert all(type(v) is float for sample in samples for v in sample.box)


@pytest.mark.parametrize("item", [list, np.array, tuple, torch.tensor])
def test_transvgs_boxes_may_be_any_kind_of_four_numbers(tmp_path, item):
    """NumPy 1 pickles arrays under the module name numpy.core, NumPy 2 under numpy._core. In the
    files of referit and flickr a box is x1, y1, x2, y2 already."""
    as_transvg(tmp_path, item=item)
    path = tmp_path / "unc/unc_train.pth"
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in content.items():
            archive.writestr(name, value.replace(b"numpy._core", b"numpy.core"))
    for split in SPLITS:
        boxes = [sample.box for sample in data.load_samples("refcoco", split, tmp_path)]
        assert boxes == [sample.box for sample in expected_samples(split, tmp_path)]

    box = item([10.5, 20.0, 30.0, 40.0])
    (tmp_path / "referit").mkdir()
    (tmp_path / "flickr").mkdir()
    torch.save([("12.jpg", "referit", box, "a dog", [])], tmp_path / "referit/referit_test.pth")
    torch.save([("12.jpg", box, "a dog")], tmp_path / "flickr/flickr_test.pth")
    folders = {"referit": "referit/images", "flickr30k": "Flickr30k/flickr30k-images"}
    for dataset, folder in folders.items():
        assert data.load_samples(dataset, "test", tmp_path) == [
            data.Sample(tmp_path / folder / "12.jpg", "a dog", (10.5, 20.0, 30.0, 40.0), "12.jpg")]


class Command:
    """An object whose pickle runs a command when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_a_pickle_that_would_run_a_command_is_refused(tmp_path, monkeypatch):
    """Both readers of pickles raise an error instead of running what the pickle asks for."""
    monkeypatch.chdir(tmp_path)
    as_refer(tmp_path / "a")
    Path("a/refcoco/refs(unc).p").write_bytes(pickle.dumps([Command()], protocol=2))
    Path("b/unc").mkdir(parents=True)
    torch.save([Command()], "b/unc/unc_train.pth")
    for root, name in (("a", r"refs\(unc\).p"), ("b", "unc_train.pth")):
        with pytest.raises(InputError, match=name):
            data.split_names("refcoco", root)
    assert not Path("ran").exists()


def test_damaged_annotations_are_named(tmp_path):
    """Whatever is wrong in the annotations, the error names the file and the fault. A box without
    area is no error in a published dataset."""
    path = tmp_path / "refcoco/instances.json"

    def fails(words):
        data.samples_by_split.cache_clear()
        with pytest.raises(InputError, match=words):
            data.split_names("refcoco", tmp_path)

    # Without annotations, the error says what was looked for, and where to get it.
    fails(r"refcoco/refs\(unc\).p or unc/unc_\*.pth or finetune_refcoco_\*.json, .*"
          "images/train2014.*data.py --help")
    as_refer(tmp_path, refs=[(70, "train", ["a"]), (71, "train", [" "])])
    fails(r"refs\(unc\).p, ref 1: .*not empty")
    as_refer(tmp_path, refs=[(70, "train", ["a"])])
    path.write_text(path.read_text().replace("30.75, 40.0", "0, 40.0"))
    assert len(data.load_samples("refcoco", "train", tmp_path)) == 1
    path.write_text(path.read_text().replace('"id": 70', '"id": 72'))
    fails(r"refs\(unc\).p: .*KeyError: 70")
    path.unlink()
    fails("instances.json")
    (tmp_path / "refcoco/refs(unc).p").write_bytes(b"\x80\x02]q\x00")
    fails(r"refs\(unc\).p: .*EOFError")


# --- Several datasets joined by commas ------------------------------------------------------------

def test_mixed_training_sees_no_image_of_any_val_or_test(tmp_path, capsys):
    """An image in val or test of any dataset is left out of the joint train, and counted. Copies of
    COCO's images in two folders are the same images. That the joint val repeats the datasets' val
    splits is no fault in the report."""
    as_refer(tmp_path)   # image 7 in train, 8 in val, 9 in testA
    as_refer(tmp_path / "b", "refcoco+",
             refs=[(90, "train", ["x", "y"]), (71, "val", ["z"]), (80, "train", ["v"])])
    as_refer(tmp_path, "refcocog", "umd", refs=[(80, "test", ["w"])])
    write_images(tmp_path / "images/train2014")
    write_images(tmp_path / "b/train2014")

    names = "refcoco,refcoco+,refcocog-umd"
    assert data.split_names(names, tmp_path) == [
        "val", "refcoco/val", "refcoco/testA", "refcoco+/val", "refcocog-umd/test"]
    with pytest.raises(InputError, match="'train': choose one of val"):
        data.load_samples(names, "train", tmp_path)
    assert "6 of 6 expressions left out" in capsys.readouterr().out
    assert texts_of(names, "val", tmp_path) == ["tall man", "z"]

    names = "refcoco,refcocog-umd"
    assert texts_of(names, "train", tmp_path) == [text for _, text, _ in rows_of("train")]
    data.main([names, "--root", str(tmp_path)])
    found = re.findall("both in .*, such", capsys.readouterr().out)
    assert found == ["both in refcoco/val and in refcocog-umd/test, such"]


def test_ones_own_images_are_recognised_by_their_paths_and_not_by_their_names(tmp_path):
    """Two files may use one name for different images, but one path is one image."""
    def own_file(path, **images):
        """Write a .jsonl file with one line per split, from split=image."""
        return write(tmp_path / path, *[{**GOOD, "image": image, "split": split}
                                        for split, image in images.items()])

    a = own_file("a/my.jsonl", train="train/1.png", val="val/1.png")
    b = own_file("b/my.jsonl", train="val/1.png", val="train/1.png")
    assert len(data.load_samples(f"{a},{b}", "train")) == 2
    c = own_file("c.jsonl", val="a/train/1.png")
    sample, = data.load_samples(f"{a},{b},{c}", "train")
    assert sample.image == tmp_path / "b/val/1.png"


def test_leaky_pretraining_follows_from_the_file_and_the_dataset():
    """True if any dataset leaks, None if something is unknown, False otherwise."""
    official = "detr-r50-e632da11.pth"
    for dataset, detr_file, leaky in (
            ("refcoco", f"folder/{official}", True), ("refcoco", "facebook/detr-resnet-50", True),
            ("refcoco+", "folder/detr-r50-unc.pth", False), ("refcoco", "mine.pth", None),
            ("refcocog-umd", "folder/detr-r50-unc.pth", True),
            ("refcocog-umd", "folder/detr-r50-gref.pth", False),
            ("referit,flickr30k", official, False), ("referit,my.jsonl", official, None),
            ("refcoco,refcocog-umd", "detr-r50-unc.pth", True),
            ("my.jsonl,refcoco", official, True)):
        assert data.leaky_pretraining(dataset, detr_file) is leaky, (dataset, detr_file)


# --- What is said before training -----------------------------------------------------------------

def test_boxes_in_another_unit_or_order_are_doubted():
    """More than a tenth of the boxes must be odd. A box without area is not inside out."""
    fine = 9 * [(9, 9, 20, 20)]
    for boxes, doubt in (
            ([(0.1, 0.2, 0.5, 1.0)], "1 of 1 boxes lie within one pixel .*in pixels"),
            ([*fine, (30, 40, 10, 60), (20, 60, 40, 9)], "in 2 of 11 boxes: .*x, y, w, h"),
            ([*fine, (0.1, 0.1, 0.2, 0.2)], None), ([*fine, (30, 30, 20, 20)], None),
            ([(5, 5, 5, 9), (0, 0, 1, 2)], None), ([], None)):
        said = data.doubt_about_boxes([data.Sample(0, "cup", box, 0) for box in boxes])
        assert re.search(doubt, said) if doubt else said is None


def for_training(tmp_path, train_boxes, val_boxes):
    """What load_for_training makes of boxes in an image of 40 x 30 pixels, as referit's -> the
    boxes of train and of val."""
    (tmp_path / "referit").mkdir(exist_ok=True)
    for split, boxes in (("train", train_boxes), ("val", val_boxes)):
        rows = [("a.png", "referit", list(box), f"in {split}", []) for box in boxes]
        torch.save(rows, tmp_path / f"referit/referit_{split}.pth")
    data.samples_by_split.cache_clear()
    return [[sample.box for sample in samples]
            for samples in data.load_for_training("referit", tmp_path)]


FINE, FLAT, AWAY = (1, 2, 30, 20), (5, 5, 5, 9), (41, 2, 53, 9)


def test_training_leaves_out_what_can_teach_nothing_and_validation_nothing(tmp_path, capsys):
    """Boxes without area, and those that end where their image begins or begin where it ends, are
    left out of train and told. In val they are misses. A dataset may have no val."""
    (tmp_path / "referit/images").mkdir(parents=True)
    Image.new("L", (40, 30)).save(tmp_path / "referit/images/a.png")
    outside = [(40, 2, 50, 9), (2, 30, 9, 40), (-9, 2, 0, 9), (2, -9, 9, 0)]
    inside = [(39, 2, 50, 9), (2, 29, 9, 40), (-9, 2, 1, 9), (2, -9, 9, 1), (-9, -9, 99, 99)]
    kept = for_training(tmp_path, [*inside, FLAT, *outside, FLAT], [FINE, FLAT, AWAY])
    assert kept == [inside, [FINE, FLAT, AWAY]]
    printed = capsys.readouterr().out
    assert "2 boxes of train have no area and are left out" in printed
    assert "4 boxes of train lie outside of their images and are left out; one is [" in printed
    assert "1 boxes of val lie outside of their images and are misses; one is [41.0" in printed
    assert for_training(tmp_path, [FINE], []) == [[FINE], []]
    assert "no split 'val'" in capsys.readouterr().out
    with pytest.raises(InputError, match="referit: .*nothing to train on"):
        for_training(tmp_path, [FLAT, AWAY], [FINE])


def test_what_would_end_a_long_run_is_named_before_it(tmp_path):
    """Boxes of another unit, a damaged image of val, a missing image."""
    image = tmp_path / "referit/images/a.png"
    image.parent.mkdir(parents=True)
    Image.effect_noise((40, 30), 80).save(image)
    small = (0.1, 0.1, 0.5, 0.9)
    for split, boxes in (("train", ([FINE, small], [FINE])), ("val", ([FINE], [small]))):
        with pytest.raises(InputError, match=f"referit, {split}: .*in pixels.*--draw"):
            for_training(tmp_path, *boxes)
    image.write_bytes(image.read_bytes()[:900])   # its header is whole
    with pytest.raises(InputError, match="a.png: the file cannot be decoded.*, 1 cannot"):
        for_training(tmp_path, [FINE], 2 * [FINE])
    image.unlink()
    with pytest.raises(InputError, match=r"a.png: no such image \(1 are missing"):
        for_training(tmp_path, [FINE], [FINE])


# --- Errors and files -----------------------------------------------------------------------------

def test_an_error_in_a_loading_process_is_still_one_line(tmp_path, capsys):
    """run_command prints the message of an InputError that a DataLoader's worker raised. Ctrl-C is
    one line, too. A bug keeps its traceback."""
    (tmp_path / "broken.jpg").write_text("hello")
    sample = data.Sample(tmp_path / "broken.jpg", "a", (0, 0, 1, 1), 0)
    loader = torch.utils.data.DataLoader(data.GroundingDataset([sample], 64, len), num_workers=1)

    def interrupted():
        raise KeyboardInterrupt

    for command, code, words in ((functools.partial(list, loader), 2, "error: .*broken.jpg: .*"),
                                 (interrupted, 130, "stopped by Ctrl-C")):
        with pytest.raises(SystemExit) as exit:
            data.run_command(command)
        assert exit.value.code == code
        assert re.fullmatch(words, capsys.readouterr().err.strip())
    with pytest.raises(ValueError, match="literal"):
        data.run_command(lambda: int("x"))


def test_a_crash_while_writing_leaves_the_old_file(tmp_path):
    """write_atomically replaces a file only after the new one is whole, and leaves no half. A link
    to a file stays a link. An error, also of PyTorch's own kind, names the file that was to be
    written. /dev/stdout may be a pipe: a file in its place would harm the whole machine."""
    path = tmp_path / "a.txt"
    path.write_text("old")
    (tmp_path / "link").symlink_to("a.txt")

    def crash(partial, error):
        partial.write_text("half")
        raise error

    for error, seen in ((KeyboardInterrupt(), KeyboardInterrupt),
                        (RuntimeError("unexpected pos 8 vs 2\nin C++"), InputError)):
        with pytest.raises(seen) as raised:
            data.write_atomically(path, functools.partial(crash, error=error))
        assert path.read_text() == "old"
        assert set(tmp_path.iterdir()) == {path, tmp_path / "link"}
    assert str(raised.value).startswith(f"cannot write {path} (unexpected pos 8 vs 2): ")
    data.write_text(tmp_path / "link", "new")
    assert path.read_text() == "new" and (tmp_path / "link").is_symlink()
    # safetensors makes a file that nobody else may read.
    data.write_atomically(tmp_path / "b", lambda partial: partial.chmod(0o600))
    (tmp_path / "other").touch()
    assert (tmp_path / "b").stat().st_mode == (tmp_path / "other").stat().st_mode

    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    data.write_text(tmp_path / "pipe", "new")
    assert os.read(reader, 10) == b"new"
    os.close(reader)
    with pytest.raises(InputError, match=f"cannot write {tmp_path}/gone/a.txt [(]No such"):
        data.write_text(tmp_path / "gone/a.txt", "new")


def test_data_can_be_copied_alone():
    """data.py imports nothing of the project, and no transformers before it needs a tokenizer."""
    source = Path(data.__file__).read_text(encoding="utf-8")
    imports = set(re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE))
    assert "torch" in imports and "transformers" not in imports
    assert not imports & {path.stem for path in ROOT.glob("*.py")}


# --- Images ---------------------------------------------------------------------------------------

def test_images_of_every_mode_become_rgb(tmp_path):
    """Each mode of PIL is read as RGB, with its colour where it has one. Transparent parts become
    white, 16 bits become 8, and floats go from 0 to 1 or are levels already."""
    colour = (200, 100, 50)
    image = Image.new("RGB", (8, 6), colour)
    for mode in ("1", "L", "P", "CMYK", "RGBA", "LA", "YCbCr"):
        path = tmp_path / f"{mode}.{'tif' if mode in ('CMYK', 'YCbCr') else 'png'}"
        (image.quantize() if mode == "P" else image.convert(mode)).save(path)
        read = data.load_image(path)
        assert (read.mode, read.size) == ("RGB", (8, 6))
        if mode not in ("1", "L", "LA"):
            assert np.abs(np.asarray(read, int) - colour).max() < 40, mode

    clear = Image.new("RGBA", (8, 6), (0, 0, 0, 0))
    clear.putpixel((0, 0), (200, 100, 50, 255))
    read = data.load_image(clear)
    assert (read.getpixel((0, 0)), read.getpixel((1, 1))) == (colour, (255, 255, 255))
    for values, levels in ((np.uint16([0, 30000, 65535]), [0, 116.7, 255]),
                           (np.float32([0, 0.5, 1]), [0, 127.5, 255]),
                           (np.float32([0, 100, 200]), [0, 100, 200])):
        Image.fromarray(values[None]).save(tmp_path / "deep.tif")
        read = data.load_image(tmp_path / "deep.tif")
        assert np.asarray(read)[0, :, 0] == pytest.approx(levels, abs=1)


def test_only_ones_own_image_is_turned_as_exif_says(tmp_path):
    """Boxes of datasets refer to the stored pixels, so only `upright` turns an image."""
    exif = Image.Exif()
    exif[0x0112] = 6   # to be turned by 90 degrees
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert data.load_image(tmp_path / "a.jpg").size == (40, 20)
    assert data.load_image(tmp_path / "a.jpg", upright=True).size == (20, 40)


@pytest.mark.parametrize("stored, side, decoded", [
    ((640, 427), 320, (320, 214)), ((640, 427), 321, (640, 427)),
    ((1200, 1600), 200, (150, 200)), ((100, 60), 224, (100, 60))])
def test_a_jpeg_is_decoded_no_smaller_than_asked(tmp_path, monkeypatch, stored, side, decoded):
    """Of a JPEG and its halves the smallest that is large enough; a PNG comes as it is. The box is
    at the same part of the image. Augmentation asks for twice the side of the square, as a crop may
    keep a half of the image."""
    image = Image.effect_noise((40, 30), 80).convert("RGB").resize(stored)
    image.save(tmp_path / "a.jpg")
    image.save(tmp_path / "a.png")
    share = np.array([0.25, 0.5, 0.75, 1])
    box = tuple(share * [*stored, *stored])
    draft, [scaled] = data.load_draft(tmp_path / "a.jpg", [box], side)
    assert draft.size == decoded
    assert scaled == pytest.approx(share * [*decoded, *decoded])
    assert data.load_image(tmp_path / "a.jpg").size == stored
    assert data.load_draft(tmp_path / "a.png", [box], side) == (image, [pytest.approx(box)])

    asked = []
    load = data.load_draft
    monkeypatch.setattr(data, "load_draft", lambda *given: asked.append(given[2]) or load(*given))
    sample = data.Sample(tmp_path / "a.jpg", "the cup on the left", box, "a.jpg")
    for train in (False, True):
        whole, draft = [data.GroundingDataset([sample], side, len, train, seed=3, augmented=True,
                                              draft=draft)[0] for draft in (False, True)]
        assert draft.box == pytest.approx(whole.box, abs=2 / side)
    assert asked == [side, 2 * side]


# --- Geometry -------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [(128, 96), (60, 128), (1, 50), (640, 427)])
@pytest.mark.parametrize("seed, fill", [(None, 1.0), (3, 0.7)])
def test_letterbox_is_torchvisions_pad_of_the_scaled_image(size, seed, fill):
    """The square holds the scaled image bit for bit, in the centre or at a random place, and zeros
    elsewhere, where padding is True."""
    width, height = size
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    square, padding, place = data.letterbox(image, 64, seed and random.Random(seed), fill)
    ratio = fill * 64 / max(size)
    w, h, left, top, scale = place
    assert (w, h) == (max(1, round(ratio * width)), max(1, round(ratio * height)))
    assert scale == pytest.approx(ratio)
    if seed is None:
        assert (left, top) == ((64 - w) // 2, (64 - h) // 2)

    edges = [left, top, 64 - w - left, 64 - h - top]
    scaled = TF.pil_to_tensor(image.resize((w, h), Image.Resampling.BILINEAR))
    assert square.dtype == torch.uint8
    assert torch.equal(square, TF.pad(scaled, edges))
    assert torch.equal(padding, TF.pad(torch.zeros(h, w, dtype=torch.bool), edges, fill=True))


def test_a_random_place_is_anywhere_in_the_square():
    """All places from one edge to the other are drawn, for the width and the height apart."""
    places = [data.placement((100, 80), 16, random.Random(seed), 0.75) for seed in range(400)]
    assert {place.left for place in places} == set(range(16 - 12 + 1))
    assert {place.top for place in places} == set(range(16 - 10 + 1))


# Of these images the shorter side does not scale to whole pixels.
@pytest.mark.parametrize("image_size", [(100, 33), (33, 100)])
def test_boxes_are_scaled_by_the_side_over_the_longer_side(image_size):
    """[D56] literally: x' = left + x S / max(W, H), also beyond the image. Back in pixels of the
    image a box is clamped to it."""
    image = Image.new("RGB", image_size)
    for rng, fill in ((None, 1.0), (random.Random(3), 0.7)):
        _, _, place = data.letterbox(image, 64, rng, fill)
        for box in ((3.5, 5, 20.25, 33), (-10, -20, 130, 140), (120, 4, 130, 9)):
            cx, cy, w, h = data.to_square(box, place, 64)
            x1, x2 = [place.left + x * fill * 64 / 100 for x in box[0::2]]
            y1, y2 = [place.top + y * fill * 64 / 100 for y in box[1::2]]
            assert (cx * 64, cy * 64) == pytest.approx(((x1 + x2) / 2, (y1 + y2) / 2))
            assert (w * 64, h * 64) == pytest.approx((x2 - x1, y2 - y1))
            if rng is None:
                back = data.from_square((cx, cy, w, h), image_size, 64)
                clamped = [min(max(value, 0), limit) for value, limit in zip(box, 2 * image_size)]
                assert back == pytest.approx(clamped, abs=1e-9)


@pytest.mark.parametrize("options", [
    {}, {"train": True}, {"train": True, "augmented": True, "flip": True}])
def test_a_box_that_reaches_beyond_its_image_is_not_cut_off(tmp_path, options):
    """[D56] in evaluation and in training, also in a flip. "corner" forbids a crop."""
    Image.new("L", (40, 30), 128).save(tmp_path / "grey.png")
    sample = data.Sample(tmp_path / "grey.png", "cup at the corner", (20, 10, 90, 70), "grey.png")
    for seed in range(20):
        dataset = data.GroundingDataset([sample], 64, len, seed=seed, **options)
        item = dataset[0]
        scale = (~item.padding).any(0).sum().item() / 40    # 1.6, or less in augmentation
        assert item.box[2:] == pytest.approx([70 * scale / 64, 60 * scale / 64], rel=0.02)


def test_a_scene_that_is_kept_gives_the_same_image_each_time():
    """Scenes are scaled once where that keeps little memory. A user of an item may change it."""
    for size, kept in ((64, 20), (200, 0)):
        data.small_scene.cache_clear()
        for number in 2 * list(range(5_000_000, 5_000_020)):
            expected, _, _ = data.letterbox(data.load_image(number), size)
            square, _, _ = data.letterbox(number, size)
            assert torch.equal(square, expected)
            square.zero_()
        assert data.small_scene.cache_info().misses == kept


# --- Augmentation ---------------------------------------------------------------------------------

BOX = (10, 20, 30, 40)   # in an image of 100 x 60 pixels


def test_a_crop_has_the_share_of_an_image_that_transvgs_has():
    """TransVG scales the short side to 400, 500 or 600 pixels and draws 384 to 600 pixels of each
    side, or as many as there are. The same random numbers give a crop of the same share."""
    width, height = 900, 750    # each crop of at least 384 of 600 pixels holds the middle
    image = Image.new("L", (width, height))
    middle = torch.tensor([[440.0, 370.0, 460.0, 380.0]])
    whole = 0
    for seed in range(500):
        rng = random.Random(seed)
        scale = height / rng.choice((400, 500, 600))    # pixels for one of TransVG's
        w = rng.randint(384, min(round(width / scale), 600))
        h = rng.randint(384, min(round(height / scale), 600))
        top, left, *cut = data.random_crop(image, middle, random.Random(seed))
        assert cut == [min(height, round(h * scale)), min(width, round(w * scale))]
        assert 0 <= top < 375 < top + cut[0] <= height and 0 <= left < 450 < left + cut[1] <= width
        whole += cut[0] == height
    assert 0 < whole < 40    # a mean of 1/17, 1/117 and 1/217


def test_the_boxes_still_cover_their_objects_after_flips_and_crops():
    """Each box is tight around the pixels of its object, for one and for two objects that share an
    image. A crop keeps the centres of both."""
    flipped, sizes = 0, set()
    for seed in range(200):
        rng = random.Random(seed)
        boxes = [(rng.randint(0, 40), rng.randint(0, 40), rng.randint(50, 75), rng.randint(50, 60)),
                 (rng.randint(80, 90), rng.randint(0, 10), 100, rng.randint(20, 30))][:1 + seed % 2]
        image = Image.new("RGB", (100, 60), "white")
        for colour, box in zip(("blue", "red"), boxes):
            image.paste(colour, box)
        image, boxes, texts = data.augment(image, boxes, ["the left one"] * len(boxes), rng, True)
        flipped += texts == ["the right one"] * len(boxes)
        image, boxes, _ = data.augment(image, boxes, ["cup"] * len(boxes), rng, True)
        sizes.add(image.size)
        red, _, blue = np.asarray(image, int).transpose(2, 0, 1)
        for difference, box in zip((blue - red, red - blue), boxes):
            ys, xs = np.nonzero(difference > 5)
            seen = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            assert seen == pytest.approx(box, abs=1.01)
    assert len(sizes) > 10
    assert 70 < flipped < 130


class FlipAlone:
    """A random generator that refuses the crop and the colours, and takes the horizontal flip."""

    def __init__(self):
        self.draws = [0.9, 0.9, 0.0]

    def random(self):
        return self.draws.pop(0)


# What people write about images, and what is true after a horizontal flip.
EXCHANGED = {
    "man on the Left": "man on the right", "guy on RIGHT": "guy on left", "right?": "left?",
    "left of the right dog": "right of the left dog", "leftmost cup": "rightmost cup",
    "rightest person": "leftest person", "the two righties": "the two lefties",
    "girl leftish middle": "girl rightish middle", "looking leftwards": "looking rightwards",
    "left_side chair": "right_side chair", "right-hand lamp": "left-hand lamp",
    "lefthand door": "righthand door", "top_left zebra": "top_right zebra",
    "horse's left ear": "horse's right ear", "right behind him": "left behind him",
    "topleft zebra": "topright zebra", "guy onright": "guy onleft",
    "kid all right": "kid all left", "clock on the left": "clock on the right"}
# Left and right inside a word, and words that are like others of which a flip is wrong.
UNCHANGED = [
    "bright red copyright sign", "upright piano", "Mr Wright", "cleft in the rock", "alright dude",
    "leftover pizza", "llama", "brown art", "two seconds", "blast", "one with three stripes",
    "least beast in a vest", "north pole", "port with boats", "night light", "theft"]
# No exchange of left and right would make these true.
UNFLIPPED = [
    "topleftmost zebra", "letf guy", "lef one", "lft guy", "far lft", "rt elephant",
    "giraffe on L", "R.", "BL corner", "rigth one", "2nd from L", "1st dude", "number 23",
    "number five", "second man", "tenth player", "eleventh jar from left", "thirteenth car",
    "twentieth car", "the last one", "guy at 3 o'clock", "guy at two o\u2019clock",
    "three oclock plate", "four o clock", "next pizza clockwise", "counter-clockwise one",
    "west side", "northwest slice", "north-east", "Southwestern corner", "easternmost boat",
    "NW piece", "starboard light", "port side of the boat"]


def test_a_horizontal_flip_keeps_the_words_true():
    """[D36]: image, box and text are flipped together, or none of the three; none without `flip`,
    and none where one of two texts of an image forbids it."""
    red = (255, 0, 0)
    image = Image.new("RGB", (100, 60), "white")
    image.paste(red, (0, 0, 50, 60))   # the left half is red
    for before, after in [*EXCHANGED.items(), *zip(UNCHANGED, UNCHANGED)]:
        flipped, boxes, texts = data.augment(image, [BOX], [before], FlipAlone(), True)
        assert (texts, boxes) == ([after], [[70, 20, 90, 40]]), before
        assert flipped.getpixel((90, 5)) == red and flipped.getpixel((10, 5)) == (255, 255, 255)
        for flip, texts in ((False, [before]), (True, [before, "number 3"])):
            unchanged = data.augment(image, [BOX] * len(texts), texts, FlipAlone(), flip)
            assert unchanged == (image, [list(BOX)] * len(texts), texts), before
    for text in UNFLIPPED:
        unchanged = data.augment(image, [BOX], [text], FlipAlone(), True)
        assert unchanged == (image, [list(BOX)], [text]), text


def test_an_image_whose_words_are_about_place_is_not_cropped():
    """A crop moves the edges and the middle, so that words about them would become false, also if
    only one of an image's texts has such words. Other words may hold parts of them."""
    def sizes(*texts):
        """The sizes that an image of 100 x 60 pixels has after augment, over 20 seeds."""
        whole = Image.new("RGB", (100, 60))
        return {data.augment(whole, [BOX] * len(texts), list(texts), random.Random(seed), True)
                [0].size for seed in range(20)}

    for text in ["man on the left", "top cup", "the middle one", "LOWER right", "in the center",
                 "bottommost", "left-hand one", "lefty", "rightest", "left_side", "topleft",
                 "lft guy", "letf guy", "northwest slice", "guy at two o'clock"]:
        assert sizes(text) == sizes("a cup", text) == {(100, 60)}, text
    for text in ["bright topping", "upright piano", "leftover pizza", "cleft", "second man"]:
        assert len(sizes(text)) > 1, text


def test_colours_change_as_in_transvg():
    """With chance 0.8, brightness, contrast and saturation change in a random order, each by 0.6 to
    1.4."""
    image = Image.effect_noise((30, 20), 80).convert("RGB")
    image.paste((200, 100, 50), (0, 0, 15, 20))
    changed = 0
    for seed in range(200):
        rng = random.Random(seed)
        rng.random()    # decides about a crop, which "left" forbids
        expected = image
        if rng.random() < 0.8:
            for change in rng.sample((TF.adjust_brightness, TF.adjust_contrast,
                                      TF.adjust_saturation), 3):
                expected = change(expected, rng.uniform(0.6, 1.4))
        found, _, _ = data.augment(image, [BOX], ["left"], random.Random(seed), False)
        assert found == expected
        changed += found != image
    assert 145 < changed < 175


def test_random_choices_depend_on_seed_epoch_and_index_in_training_alone(tmp_path):
    """The same seed gives the same items, another seed or epoch other ones, and without `train` the
    options change nothing. Each of TransVG's scales occurs, from 0.7 to 1 of the square's side."""
    Image.effect_noise((200, 150), 80).save(tmp_path / "a.png")
    samples = [data.Sample(tmp_path / "a.png", "the cup", (20.0, 30.0, 90.0, 100.0), "a.png")] * 120

    def items(epoch=1, **options):
        dataset = data.GroundingDataset(samples, 64, len, **options)
        dataset.epoch.fill_(epoch)
        return [dataset[index] for index in range(len(samples))]

    def equal(first, second):
        return {torch.equal(a.image, b.image) and a.box == b.box for a, b in zip(first, second)}

    options = {"train": True, "augmented": True, "flip": True}
    first = items(seed=0, **options)
    assert equal(first, items(seed=0, **options)) == {True}
    for others in (items(seed=1, **options), items(epoch=2, seed=0, **options), first[1:]):
        assert equal(first, others) == {False}
    assert equal(items(), items(augmented=True, flip=True, seed=1)) == {True}
    assert len({tuple(item.box) for item in items(train=True)}) > 10    # the place is random
    widths = {int((~item.padding).any(0).sum()) for item in first}      # crops have others, too
    assert {round(64 * scale) for scale in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)} <= widths


# --- Tokenizers -----------------------------------------------------------------------------------

def test_the_tokenizer_of_shapes_is_berts(val):
    """transformers' BertTokenizer with the same vocabulary gives the same ids, also of odd texts. A
    word of `shapes` is one token, and a text that is cut keeps the token of its end."""
    wordpiece = tokenizers.Tokenizer.from_file(str(data.ASSETS / "tiny-tokenizer.json"))
    tokenizer = data.Tokenizer(12)
    reference = transformers.BertTokenizer(vocab=wordpiece.get_vocab())
    odd = ["", "  The RED\tcircle ", "don't, no. 7?", "猫 café", "e\u0301te\u0301",
           "red\u200bcup\x00", "[SEP] red [MASK]",
           "a zebra crossing, seen from the left and from the right"]
    for text in [*odd, *(sample.text for sample in val)]:
        expected = reference(text, split_special_tokens=True, truncation=True, max_length=12)
        assert tokenizer(text) == expected["input_ids"]
    assert (tokenizer.pad, tokenizer.mask) == (reference.pad_token_id, reference.mask_token_id)

    assert all(len(tokenizer(sample.text)) == min(12, len(sample.text.split()) + 2)
               for sample in val)
    assert (len(tokenizer(odd[-1])), tokenizer(odd[-1])[-1]) == (12, wordpiece.token_to_id("[SEP]"))
    unknown = wordpiece.token_to_id("[UNK]")
    assert unknown not in tokenizer("Zebra no. 7?") and unknown in tokenizer("猫")


def small_tokenizer(folder, kind):
    """CLIP's tokenizer with a few letters and signs, and one word, "red"; or BERT's, with a few
    words and signs, among them curly quotes -> data.Tokenizer, the names of its tokens."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    if kind == "clip":
        pieces = ["<|startoftext|>", "<|endoftext|>"]
        for sign in sorted(set("redcupthfisndoax's|<>[]&\"")):
            pieces += [sign, sign + "</w>"]
        pieces += ["re", "red</w>"]
        vocabulary = {piece: number for number, piece in enumerate(pieces)}
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
        theirs = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    else:
        pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "don", "t", "'", "\u2019", "&",
                  "amp", ";", "[", "]", "sep", "cls", "mask", "red"]
        theirs = transformers.BertTokenizer(
            vocab={piece: number for number, piece in enumerate(pieces)})
    theirs.save_pretrained(folder)
    return data.Tokenizer(40, str(folder), len(pieces)), pieces


def test_clips_tokenizer_ignores_case_keeps_its_ends_and_mends_a_text(tmp_path):
    """[D46] Curly quotes, entities and ligatures become plain, as before CLIP's pretraining. Each
    text begins and ends with one token, cut or not, whatever it spells."""
    tokenizer, pieces = small_tokenizer(tmp_path / "clip", "clip")
    for odd, plain in (("RED cup", "red cup"), ("Don\u2019t", "don't"), ("R&amp;amp;D", "r&d"),
                       ("\u201c\ufb01sh\u201d \u201ered\u201f", '"fish" "red"'),
                       ("it&rsquo;s &lt;red&gt;", "it's <red>"), ("\uff52ed\u3000cup", "red cup"),
                       ("red\x00 \ufeffcup", "red cup")):
        assert tokenizer(odd) == tokenizer(plain), odd
        assert tokenizer.length(odd) == len(tokenizer(plain))
        assert tokenizer(odd).count(1) == 1    # the end, which is the token of what is unknown, too
    assert tokenizer("caf\u00e9 \u00bd") != tokenizer("cafe 1/2")    # nothing else is mended
    assert [pieces[i] for i in tokenizer("red")] == ["<|startoftext|>", "red</w>", "<|endoftext|>"]

    for text in ("<|endoftext|> red", "<|startoftext|> red", "red &lt;|endoftext|&gt;"):
        ids = tokenizer(text)
        assert (ids[0], ids[-1]) == (0, 1) and not {0, 1} & set(ids[1:-1])
        assert len(ids) > 10   # the letters
    tokenizer.max_tokens = 5
    ids = tokenizer("red cup red cup")
    assert (len(ids), ids[0], ids[-1], ids.count(1)) == (5, 0, 1, 1)


def test_berts_tokenizer_takes_a_text_as_it_is(tmp_path):
    """BERT's pretraining has read curly quotes, which its vocabulary has. No text makes a special
    token."""
    tokenizer, pieces = small_tokenizer(tmp_path / "bert", "bert")
    for text, expected in (("Don\u2019t", "don \u2019 t"), ("&amp;", "& amp ;"),
                           ("[SEP] red [CLS] [MASK]", "[ sep ] red [ cls ] [ mask ]")):
        assert [pieces[i] for i in tokenizer(text)] == ["[CLS]", *expected.split(), "[SEP]"]


@pytest.mark.parametrize("kind, flag", [("clip", "--clip-weights"), ("bert", "--text-weights")])
def test_a_folder_without_the_tokenizers_files_is_an_error(tmp_path, kind, flag):
    """For such a folder transformers makes an empty vocabulary, which would hide every word."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(InputError, match=f"no tokenizer in {tmp_path} .*{flag}"):
        data.Tokenizer(20, str(tmp_path), 49408, flag)


# --- Batches --------------------------------------------------------------------------------------

FAST = ["--size", "tiny", "--weights", "random", "--limit", "28", "--batch-size", "8", "--epochs",
        "2", "--warmup", "0", "--device", "cpu", "--workers", "0"]


def shapes(count):
    """The first samples of `shapes`, of which three share each image."""
    return data.load_samples("shapes", "train", limit=count)


def set_up(*flags, count=24):
    """Options, a new model in eval mode, and samples."""
    args = train.parse_args([*FAST, *flags])
    torch.manual_seed(0)
    return args, m.build_model(**train.model_arguments(args)).eval(), shapes(count)


@pytest.mark.parametrize("together", [1, 2, 3, 5])
def test_an_epoch_has_each_sample_once_and_k_of_an_image_together(together):
    """Groups of up to K expressions of an image follow each other, and no sample comes twice."""
    samples = shapes(60)
    [order] = list(data.TrainingBatches(samples, 60, seed=0, together=together))
    assert sorted(order) == list(range(60))
    near = sum(samples[a].image == samples[b].image for a, b in zip(order, order[1:]))
    # An image has three expressions: pairs of neighbours by K, and a few that meet by chance.
    least = {1: 0, 2: 20, 3: 40, 5: 40}[together]
    assert least <= near <= least + 8


def test_batches_depend_on_seed_and_epoch_and_may_begin_later():
    """The order is drawn from the seed and the epoch; `first` leaves out the first batches of it.
    With fewer samples than a batch has, they are one batch."""
    def drawn(seed, epoch, first=0):
        batches = data.TrainingBatches(shapes(60), 16, seed)
        batches.epoch, batches.first = epoch, first
        assert len(batches) == 3
        return list(batches)

    assert drawn(0, 1) == drawn(0, 1) != drawn(0, 2)
    assert drawn(0, 1) != drawn(1, 1)
    assert drawn(0, 1, first=2) == drawn(0, 1)[2:]
    assert [sorted(batch) for batch in data.TrainingBatches(shapes(3), 16, 0)] == [[0, 1, 2]]


def test_processes_share_each_batch():
    """The parts of two processes make up the batch of one; in evaluation no sample comes twice."""
    samples = shapes(60)
    whole = list(data.TrainingBatches(samples, 16, 0))
    parts = [list(data.TrainingBatches(samples, 16, 0, rank=rank, processes=2)) for rank in (0, 1)]
    assert [first + second for first, second in zip(*parts)] == whole
    parts = [data.evaluation_batches(samples, 16, rank, 3) for rank in range(3)]
    assert sorted(index for part in parts for batch in part for index in batch) == list(range(60))
    with pytest.raises(InputError, match="1 samples cannot be shared by 2 processes"):
        data.TrainingBatches(samples[:1], 16, 0, processes=2)


def test_a_batch_holds_an_image_once_for_neighbours_and_pads_texts_to_the_longest():
    """Six expressions of two images are a batch of two images; `image_index` says which is whose,
    and token_padding is True behind each shorter text. In training, neighbours share their image
    and its transforms only if this is asked for, as it is for K > 1."""
    samples = shapes(6)
    tokenizer = data.Tokenizer(20)
    dataset = data.GroundingDataset(samples, 64, tokenizer)
    batch = data.collate(dataset.__getitems__([0, 1, 2, 4, 3, 5]), pad=9)
    assert batch["images"].shape == (2, 3, 64, 64) and batch["images"].dtype == torch.uint8
    assert batch["image_index"].tolist() == [0, 0, 0, 1, 1, 1]
    assert batch["index"].tolist() == [0, 1, 2, 4, 3, 5]
    longest = max(len(tokenizer(sample.text)) for sample in samples)
    for row, (index, image) in enumerate(zip(batch["index"], batch["image_index"])):
        item = dataset[index]
        assert torch.equal(batch["images"][image], item.image)
        assert torch.equal(batch["image_padding"][image], item.padding)
        assert batch["boxes"][row].tolist() == pytest.approx(item.box)
        ids = tokenizer(samples[index].text)
        assert batch["tokens"][row].tolist() == ids + [9] * (longest - len(ids))
        assert batch["token_padding"][row].tolist() == [k >= len(ids) for k in range(longest)]
    for shared, rows in ((False, [0, 1, 2]), (True, [0, 0, 0])):
        dataset = data.GroundingDataset(samples, 64, tokenizer, train=True, shared=shared)
        assert data.collate(dataset.__getitems__([0, 1, 2]), 0)["image_index"].tolist() == rows


@pytest.mark.parametrize("method", ["m2ist", "full", "hivg"])
def test_a_shared_image_gives_the_boxes_and_gradients_of_copies(method):
    """One image for three texts is the same as three copies of it, in the boxes and all gradients,
    and in a micro-batch that begins between its texts. HiVG runs its layers below the first bridge
    once."""
    args, model, samples = set_up("--method", method, "--batch-size", "6", count=6)
    [batch] = evaluate.make_loader(samples, model, args)
    inputs = evaluate.model_inputs(batch, 0, 6, "cpu")
    rows = inputs["image_index"]
    copies = {**inputs, "images": inputs["images"][rows], "image_index": None,
              "image_padding": inputs["image_padding"][rows]}
    assert (len(inputs["images"]), len(copies["images"])) == (2, 6)
    found = []
    for given in (inputs, copies):
        model.zero_grad()
        boxes = model(**given).boxes
        losses.box_loss(boxes, batch["boxes"], 1, 1).backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append({"boxes": boxes, **gradients})
    assert len(found[0]) > 20
    for name, value in found[1].items():
        assert torch.allclose(found[0][name], value, rtol=1e-4, atol=1e-6), name
    part = model(**evaluate.model_inputs(batch, 2, 5, "cpu")).boxes
    assert torch.allclose(part, boxes[2:5], atol=1e-6)


def test_an_evaluation_encodes_each_image_once():
    """24 expressions of 8 images, in whatever order they come, are 8 images for the encoder. The
    results are in the order of the samples, and those of each sample alone."""
    args, model, samples = set_up("--batch-size", "24")
    random.Random(0).shuffle(samples)
    counts = []
    model.vision.register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[0])))
    together = evaluate.predict(model, evaluate.make_loader(samples, model, args), args)
    assert counts == [8]
    loader = evaluate.make_loader(samples, model, args, batch_size=1)
    one_by_one = evaluate.predict(model, loader, args)
    assert torch.allclose(together.boxes, one_by_one.boxes, atol=1e-5)
    truths = torch.tensor([loader.dataset[index].box for index in range(24)])
    assert torch.allclose(together.ious, evaluate.measured_ious(together.boxes, truths))


def test_workers_live_on_and_see_the_epoch():
    """The transforms of each epoch are the same with workers, which are not started anew. With
    three expressions of an image together, 8 samples have at most 4 images."""
    boxes = {}
    for workers in ("0", "2"):
        args, model, samples = set_up("--workers", workers, "--expressions-per-image", "3")
        loader = evaluate.make_loader(samples, model, args, train=True)
        assert loader.persistent_workers is (workers == "2")
        for epoch in (1, 2):
            loader.dataset.epoch.fill_(epoch)
            batches = list(loader)
            assert all(len(batch["images"]) <= 4 for batch in batches)
            boxes[workers, epoch] = torch.cat([batch["boxes"] for batch in batches])
    assert torch.equal(boxes["0", 1], boxes["2", 1])
    assert torch.equal(boxes["0", 2], boxes["2", 2])
    assert not torch.equal(boxes["0", 1], boxes["0", 2])


def test_two_processes_train_and_evaluate_as_one(tmp_path):
    """2 x 4 samples a step give the weights and the log of 1 x 8; evaluation counts each of the 28
    samples of val once. The tiny size has no dropout."""
    flags = [*FAST, "--micro-batch", "2", "--out"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               "--standalone", str(ROOT / "train.py"), *flags, str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes share each batch, 4 samples for each") == 1   # one prints
    train.main([*flags, str(tmp_path / "one")])

    one, two = [safetensors.torch.load_file(tmp_path / name / "best.safetensors")
                for name in ("one", "two")]
    assert one.keys() == two.keys()
    for name, value in one.items():
        # Softmax does not change with a bias of the keys, so the gradient of this bias is rounding.
        if not name.endswith(".k.bias"):
            assert torch.allclose(value, two[name], atol=1e-4), name
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
            for name in ("one", "two")]
    for line, other in zip(*logs, strict=True):
        assert line.keys() == other.keys()
        for name in ("epoch", "lr", "train_loss", "l1", "giou", "grad_norm", "val_acc@0.5"):
            assert other[name] == pytest.approx(line[name], rel=1e-3, abs=1e-6), name


def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch):
    """15 samples are not two halves."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(train.dist, "init_process_group", lambda backend: None)
    monkeypatch.setattr(train, "processes", lambda: 2)
    with pytest.raises(InputError, match="--batch-size is 15, which 2 processes cannot share"):
        train.join_processes(train.parse_args([*FAST, "--batch-size", "15"]))


# --- Drawings -------------------------------------------------------------------------------------

def is_colour(tile, colour):
    """Where an image (3, H, W) has a colour -> (H, W) bools."""
    return (tile == torch.tensor(colour)[:, None, None]).all(0)


def test_a_box_is_drawn_at_its_place_and_in_its_colour(tmp_path):
    """In its tile, the image of 90 x 120 pixels is 192 x 256, with its left edge at 32. A box that
    is inside out, which a prediction may be, is drawn as a line. A sheet has four tiles in a row,
    below the legend of the colours that it is asked for."""
    grey = Image.new("RGB", (90, 120), (200, 200, 200))
    boxes = [((0, 0, 45.5, 60.25), data.TRUE), ((80, 90, 60, 75), data.PREDICTED)]
    tile = data.draw(grey, 50 * "long text ", boxes)
    rows, columns = is_colour(tile, data.TRUE).nonzero().T
    corners = [columns.min(), rows.min(), columns.max(), rows.max()]
    assert corners == pytest.approx([32, 0, 32 + 45.5 * 256 / 120, 60.25 * 256 / 120], abs=2)
    rows, columns = is_colour(tile, data.PREDICTED).nonzero().T
    assert columns.max() - columns.min() <= 3 and rows.max() - rows.min() <= 3
    assert columns.float().mean() == pytest.approx(32 + 80 * 256 / 120, abs=2)

    data.write_sheet(tmp_path / "a.png", 5 * [tile], ["true", "attention"])
    sheet = torch.from_numpy(np.array(Image.open(tmp_path / "a.png"))).permute(2, 0, 1)
    legend = sheet.shape[1] - 2 * (tile.shape[1] + 8) - 8
    assert (legend, sheet.shape[2]) == (26, 4 * (256 + 8) + 8)
    assert torch.equal(sheet[:, -8 - tile.shape[1]:-8, 8:264], tile)
    colours = [is_colour(sheet[:, :legend], colour).any().item() for colour in data.LEGEND.values()]
    assert colours == [True, False, True]


def test_attention_is_drawn_where_it_looks_and_from_uniform_on():
    """Attention to one cell of 8 x 8 over the square makes warmth at the centre of this cell, and
    none in the padding. Uniform attention adds nothing, more adds more, all of it half of the warm
    colour."""
    attention = torch.zeros(8, 8)
    attention[3, 6] = 1.0
    grey = Image.new("RGB", (200, 100), (90, 90, 90))
    tile = data.draw(grey, "", [], attention.flatten()).int()
    rows, columns = (tile[0] - tile[2] > 60).nonzero().T
    assert rows.float().mean() == pytest.approx(3.5 * 32, abs=3)
    assert columns.float().mean() == pytest.approx(6.5 * 32, abs=3)
    assert (tile[:, :64] == 255).all()

    blue = Image.new("RGB", (160, 160), (40, 80, 200))
    seen = []
    for share in (0.01, 0.1, 0.5, 1.0):    # of the attention, for 4 of 400 tokens in the middle
        attention = torch.full((20, 20), (1 - share) / 396)
        attention[9:11, 9:11] = share / 4
        tile = data.draw(blue, "", [], attention.flatten(), side=160)
        seen.append(tile[:, 80, 80].tolist())
    assert seen[0] == [40, 80, 200]
    assert [red for red, _, _ in seen] == sorted({red for red, _, _ in seen})
    attention = torch.eye(400)[210]    # all of it for the cell at (84, 84)
    warmest = data.draw(blue, "", [], attention, side=160)[:, 84, 84]
    assert warmest.tolist() == pytest.approx((np.array(data.HEAT) + (40, 80, 200)) / 2, abs=15)


def test_a_text_that_the_font_lacks_letters_for_is_printed(capsys):
    """The caption says so, in place of boxes that nobody can read. English is its own caption."""
    for text in ("don't!", "", "two\nlines\u3000of text"):
        assert data.drawable(text, 1, "a.png") == text
    for text in ("\u8d64\u3044\u30ab\u30c3\u30d7", "the \U0001f534", "\u0643\u0623\u0633"):
        assert data.drawable(text, 3, "a.png") == "(text 3: see the terminal)"
        assert capsys.readouterr().out == f"text 3 of a.png: {text}\n"


# --- The command line -----------------------------------------------------------------------------

@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """A machine on which nothing of the hub is stored. Returns the folder of its cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_report_counts_and_names_what_is_wrong(tmp_path, capsys, empty_cache):
    """It has a line per split, and a line per fault with its count and an example."""
    as_refer(tmp_path, refs=[*REFS, (71, "testB", ["one two three four"])])
    write_images(tmp_path / "images/train2014")
    instances_path = tmp_path / "refcoco/instances.json"
    instances = json.loads(instances_path.read_text())
    instances["annotations"][1]["bbox"][0] = 120.0  # image 7 is 120 pixels wide
    instances["annotations"][2]["bbox"][2] = 95.0   # image 8 is 90 pixels wide
    instances["annotations"][3]["bbox"][2] = 0      # this is the box of two expressions in testA
    instances_path.write_text(json.dumps(instances))
    (tmp_path / "images/train2014" / coco(9)).write_bytes(b"\xff\xd8 broken")

    data.main(["refcoco", "--root", str(tmp_path), "--max-tokens", "5"])
    printed = capsys.readouterr().out
    for line in ("train +1 +2 +3 +120,624  differs$", "testA +1 +1 +2 +5,657  differs$",
                 f"1 images that are missing or broken, such as .*{coco(9)}",
                 f"1 boxes that reach out of the image, such as .*{coco(8)}.*'tall man'",
                 f"2 boxes wholly outside of the image, such as .*{coco(7)}.*'right plate'",
                 "2 expressions that are cut at 5 tokens if each word is one token .*, such as "
                 "'cup on the left'",
                 "2 boxes without area, such as", "1 images both in train and in testB"):
        assert re.search(f"^{line}", printed, re.MULTILINE), line
    assert "both in train and in val" not in printed


def test_images_in_train_and_in_val_are_named_in_any_order(tmp_path, capsys, empty_cache):
    """A split by box and not by image makes val look better than new images would. Without such an
    image the report says that it found nothing."""
    for name in ("a.png", "b.png"):
        Image.new("L", (40, 30)).save(tmp_path / name)
    val = {**GOOD, "split": "val"}
    shared = write(tmp_path / "shared.jsonl", val, GOOD)
    apart = write(tmp_path / "apart.jsonl", val, {**GOOD, "image": "b.png"})
    data.main([shared])
    assert "\n1 images both in val and in train, such as" in capsys.readouterr().out
    data.load_for_training(shared)
    assert "1 images are both in train and in val" in capsys.readouterr().out
    data.main([apart])
    assert "\nno fault was found\n" in capsys.readouterr().out
    data.load_for_training(apart)
    assert capsys.readouterr().out == ""


def test_the_report_doubts_boxes_of_another_unit_and_counts_tokens(tmp_path, capsys, empty_cache):
    """The doubt names the split. Tokens are counted by the tokenizer that is asked for, or by the
    BERT that the machine has; without one, words are counted."""
    Image.new("L", (40, 30)).save(tmp_path / "a.png")
    line = {**GOOD, "text": "don t red"}    # CLIP's tokenizer below has five tokens for it
    path = write(tmp_path / "my.jsonl", line, {**line, "box": [0.1, 0.2, 0.5, 0.6], "split": "val"})

    def counted(limit, *flags):
        data.main([path, "--max-tokens", str(limit), *flags])
        printed = capsys.readouterr().out
        assert re.findall("(.*): . of . boxes lie within one pixel", printed) == ["val"]
        return re.findall("(.*), such as 'don t red'", printed)

    assert counted(5) == []
    [fault] = counted(4)
    assert fault.startswith("2 expressions that are cut at 4 tokens if each word is one token")
    # [CLS], d o n, t, red, [SEP]: the tokenizer of size tiny knows one of the words.
    assert counted(7, "--text-weights", "tiny") == []
    assert counted(6, "--text-weights", "tiny") == ["2 expressions that are cut at 6 tokens"]
    small_tokenizer(tmp_path / "clip", "clip")
    flags = ["--text-weights", str(tmp_path / "clip")]
    assert counted(7, *flags) == []
    assert counted(6, *flags) == ["2 expressions that are cut at 6 tokens"]
    repository = empty_cache / "models--bert-base-uncased"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("abc")
    (repository / "snapshots").mkdir()
    small_tokenizer(repository / "snapshots/abc", "bert")
    assert counted(4) == ["2 expressions that are cut at 4 tokens"]


def test_drawings_go_on_behind_a_broken_image_and_overwrite_nothing(tmp_path, capsys):
    """The broken image is named. A split of which nothing can be drawn has no sheet."""
    as_refer(tmp_path, refs=[(80, "train", ["gone"]), (70, "train", ["cup"]), (90, "val", ["w"])])
    folder = tmp_path / "images/train2014"
    write_images(folder)
    for number in (8, 9):
        (folder / coco(number)).write_text("broken")
    command = ["refcoco", "--root", str(tmp_path), "--draw", "16", "--save", str(tmp_path)]
    data.main(command)
    printed = capsys.readouterr().out
    assert all(f"not drawn: {folder / coco(number)}" in printed for number in (8, 9))
    [path] = tmp_path.glob("*.png")
    assert path.name == "train.png"
    path.rename(tmp_path / "val.png")
    with pytest.raises(InputError, match="val.png, which is there already.*--save"):
        data.main(command)
    assert not path.exists()    # said before another sheet is drawn


def test_what_is_written_as_jsonl_reads_the_same(tmp_path, monkeypatch):
    """--write gives a file with the same samples, and overwrites no file. Its paths survive a move
    together with the images, of which a folder may be a link, as to another disk. With --absolute
    the file alone may be moved."""
    as_refer(tmp_path / "disk/data")
    write_images(tmp_path / "disk/data/images/train2014")
    (tmp_path / "data").symlink_to("disk/data")
    names = [f"images/train2014/{coco(number)}" for number in IMAGES]

    def written(target, root, *flags):
        """The image paths in a file that --write makes."""
        data.main(["refcoco", "--root", str(root), "--write", str(target), *flags])
        lines = target.read_text().splitlines()
        return sorted({json.loads(line)["image"] for line in lines})

    assert written(tmp_path / "data/all.jsonl", tmp_path / "data") == names
    assert written(tmp_path / "disk/out/all.jsonl", tmp_path / "data") == [
        f"../data/{name}" for name in names]
    with pytest.raises(InputError, match="all.jsonl: .*is there already"):
        written(tmp_path / "data/all.jsonl", tmp_path / "data")
    (tmp_path / "disk").rename(tmp_path / "other")
    folder = tmp_path / "other/data/images/train2014"
    for target in ("out/all.jsonl", "data/all.jsonl"):
        for split in SPLITS:
            again = data.load_samples(tmp_path / "other" / target, split)
            for one, other in zip(again, expected_samples(split, folder), strict=True):
                assert one.image.resolve() == other.image and one.image.is_file()
                assert (one.text, one.box) == (other.text, other.box)

    folder.rename(tmp_path / "elsewhere")    # what stands behind a link may differ on a machine
    folder.symlink_to(tmp_path / "elsewhere")
    data.samples_by_split.cache_clear()
    monkeypatch.chdir(tmp_path / "other/data")
    assert written(Path("linked.jsonl"), ".") == names
    absolute = written(Path("absolute.jsonl"), ".", "--absolute")
    assert absolute == [str(tmp_path / "other/data" / name) for name in names]


@pytest.mark.parametrize("command, words", [
    (["my.jsonl", "--absolute"], "--absolute goes with --write"),
    (["shapes", "--write", "a.jsonl"], "--write a.jsonl: shapes has no image files"),
    (["referit", "--download"], "referit.*CLIP-VG.*data/referit/images.*referit_.*pth.*TransVG"),
    (["flickr30k", "--download"], "flickr30k.*form.*data/Flickr30k/flickr30k-images"),
    (["refcoco,shapes", "--download"], "'shapes': choose one of refcoco, ")])
def test_what_the_command_line_cannot_do_is_said(tmp_path, monkeypatch, command, words):
    """Of what cannot be fetched, the error says who has it and where to put it, before the first
    byte is fetched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "fetch", lambda *_: pytest.fail("something was fetched"))
    write(tmp_path / "my.jsonl", GOOD)
    with pytest.raises(InputError, match=words):
        data.main(command)


def test_help_shows_formats_addresses_and_leaks_in_80_columns(capsys):
    """The help holds every address, every folder and the leaks. Each published dataset can be
    fetched, or somebody is named who has it."""
    with pytest.raises(SystemExit):
        data.main(["--help"])
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 80
    joined = "".join(text.split())   # long addresses continue on the next line
    addresses = [f"{folder}/{name}" for name, folder in data.ADDRESSES.items()]
    assert all(words in joined for words in ["Noneofthemcouldbetried", *addresses, *data.UNSEEN])
    for dataset, info in data.DATASETS.items():
        for name in filter(None, (*info.images, info.refer, f"{info.transvg}/")):
            assert name in joined
        archive = f"{str(info.refer).partition('/')[0]}.zip"
        assert archive in data.ADDRESSES or dataset in data.HOLDERS


# --- Download, from a server on this machine ------------------------------------------------------

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
        content = path.read_bytes()[start:] if self.page is None else self.page
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
    write_images(original / "train2014")
    served = tmp_path / "served"
    served.mkdir()
    with zipfile.ZipFile(served / "refcoco.zip", "w") as archive:
        for name in ("refs(unc).p", "instances.json"):
            archive.write(original / "refcoco" / name, f"refcoco/{name}")
        archive.writestr("__MACOSX/refcoco/._instances.json", "not for us")
    with zipfile.ZipFile(served / "train2014.zip", "w") as archive:
        for number in IMAGES:
            archive.write(original / "train2014" / coco(number), f"train2014/{coco(number)}")
        archive.writestr(f"train2014/{coco(11)}", "no expression is about this image")

    for field, value in {"folder": served, "limit": None, "ranges": True, "page": None,
                         "asked": []}.items():
        monkeypatch.setattr(Server, field, value)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    serve = functools.partial(server.serve_forever, poll_interval=0.01)
    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/files/"
    server.shutdown()
    server.server_close()


def fetch_all(tmp_path, mirror, dataset="refcoco"):
    data.samples_by_split.cache_clear()
    data.main([dataset, "--root", str(tmp_path / "new"), "--download", "--mirror", mirror])


def files(folder):
    """The relative paths of all files in a folder and below."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


ANNOTATION_FILES = {"refcoco/refs(unc).p", "refcoco/instances.json"}
ARCHIVES = {"refcoco.zip", "train2014.zip"}
PLACED = {f"images/train2014/{coco(number)}" for number in IMAGES}


def test_download_brings_what_is_missing_and_overwrites_nothing(tmp_path, mirror, capsys):
    """An empty folder gets the archives, the annotations and the images with expressions. Then
    nothing is fetched again: an image that is missing comes from the kept archive."""
    fetch_all(tmp_path, mirror)
    assert re.search("^train +1 +2 +3", capsys.readouterr().out, re.MULTILINE)
    assert files(tmp_path / "new") == ARCHIVES | ANNOTATION_FILES | PLACED
    folder = tmp_path / "new/images/train2014"
    fetched = (folder / coco(8)).read_bytes()
    assert fetched == (tmp_path / "original/train2014" / coco(8)).read_bytes()

    Server.asked.clear()
    (folder / coco(8)).unlink()
    (folder / coco(7)).write_text("mine")
    fetch_all(tmp_path, mirror)
    assert (folder / coco(8)).read_bytes() == fetched
    assert (folder / coco(7)).read_text() == "mine"
    for name in ARCHIVES:
        (tmp_path / "new" / name).unlink()
    fetch_all(tmp_path, mirror)
    assert Server.asked == []


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_broke_off_goes_on(tmp_path, mirror, monkeypatch, ranges):
    """The next call asks for the rest, or for the whole where the server cannot send the rest. A
    web page or an empty answer neither starts an archive nor changes a part of one."""
    archive = tmp_path / "new/refcoco.zip"
    monkeypatch.setattr(Server, "ranges", ranges)
    for page, limit, words, size in (
            (b"<html>Sorry</html>", None, "no zip.*--mirror", None), (b"", None, "no zip", None),
            (None, 300, "300 of [0-9,]+ bytes came.*The same command goes on", 300),
            (b"<html>Sorry</html>", None, "no zip", 300)):
        monkeypatch.setattr(Server, "page", page)
        monkeypatch.setattr(Server, "limit", limit)
        with pytest.raises(InputError, match=f"refcoco.zip, from http.*{words}"):
            fetch_all(tmp_path, mirror)
        assert files(tmp_path / "new") == ({"refcoco.zip"} if size else set())
        assert size is None or archive.stat().st_size == size

    monkeypatch.setattr(Server, "page", None)
    fetch_all(tmp_path, mirror)
    assert Server.asked[-2:] == [("refcoco.zip", 300 if ranges else 0), ("train2014.zip", 0)]
    assert archive.read_bytes() == (tmp_path / "served/refcoco.zip").read_bytes()
    assert len(files(tmp_path / "new/images/train2014")) == 3


def test_a_server_or_an_archive_that_is_damaged_is_named(tmp_path, mirror):
    """An archive with a damaged end is as long as the server's, which has nothing to add (status
    416). A damaged image shows by its checksum, and no part of it is kept."""
    whole = (tmp_path / "served/train2014.zip").read_bytes()
    place = whole.index(b"\xff\xd8\xff") + 40   # inside the first JPEG
    damaged = whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1:]
    (tmp_path / "new").mkdir()
    for content, words in ((whole[:-30] + bytes(30), "416"), (damaged, "CRC")):
        (tmp_path / "new/train2014.zip").write_bytes(content)
        with pytest.raises(InputError, match=f"new/train2014.zip.*{words}.*delete the archive"):
            fetch_all(tmp_path, mirror)
        assert not PLACED & files(tmp_path / "new")
    assert Server.asked[1:] == [("train2014.zip", len(whole))]   # one request is enough

    (tmp_path / "new/train2014.zip").unlink()
    (tmp_path / "served/train2014.zip").unlink()
    for address, words in ((mirror, "train2014.zip.*404.*--mirror"),
                           ("http://127.0.0.1:1", "http://127.0.0.1:1/train2014.zip.*refused"),
                           ("nowhere", "nowhere/train2014.zip.*unknown url type")):
        with pytest.raises(InputError, match=words):
            fetch_all(tmp_path, address)


def test_a_hostile_archive_leads_nowhere(tmp_path, mirror):
    """Paths with .., absolute paths, links and folders in an archive write no file elsewhere."""
    original = tmp_path / "original/train2014"
    with zipfile.ZipFile(tmp_path / "served/train2014.zip", "w") as archive:
        archive.writestr(f"../../../{coco(7)}", (original / coco(7)).read_bytes())
        archive.writestr(f"{tmp_path}/{coco(9)}", (original / coco(9)).read_bytes())
        link = zipfile.ZipInfo(f"train2014/{coco(8)}")
        link.create_system = 3   # Unix
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, str(tmp_path / "secret"))
        archive.writestr(f"train2014/{coco(8)}/", "")   # a folder of the same name
    before = files(tmp_path)
    fetch_all(tmp_path, mirror)
    added = files(tmp_path) - before
    assert added == {f"new/{name}" for name in ARCHIVES | ANNOTATION_FILES | PLACED}
    # The link became a file that holds the link's content, which is no image.
    linked = tmp_path / "new/images/train2014" / coco(8)
    assert not linked.is_symlink() and linked.read_text() == str(tmp_path / "secret")
