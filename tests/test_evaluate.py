"""evaluate.py: accuracy, one's own pictures, HiVG's released checkpoints, costs of methods."""
import argparse
import copy
import functools
import gc
import json
import math
import re
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import evaluate
import hilora
import model as m
import train
from data import InputError

RESULTS = (Path(__file__).parents[1] / "assets/results.md").read_text()

EXIF_ORIENTATION = 0x0112
TURN_CLOCKWISE = 6    # the picture must be turned by a quarter, clockwise, to be seen upright
TEXTS = ["the red circle", "the leftmost shape", "a"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Short runs of m2ist and of hivg on `shapes`: {method: folder}."""
    folder = tmp_path_factory.mktemp("runs")
    flags = ["--size", "tiny", "--weights", "random", "--limit", "64", "--batch-size", "16",
             "--epochs", "1", "--warmup", "0", "--device", "cpu"]
    found = {}
    for method in ("m2ist", "hivg"):
        found[method] = folder / method
        more = ["--stage-epochs", "1"] if method == "hivg" else []
        train.main(["--method", method, "--out", str(found[method]), *flags, *more])
    return found


def evaluated(*flags):
    """What evaluate.py returns on the CPU."""
    return evaluate.main([*map(str, flags), "--device", "cpu"])


# --- Accuracy of a dataset ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["m2ist", "hivg"])
def test_accuracies_are_the_same_in_batches_of_1_and_of_64(runs, method):
    """No sample's box depends on the other samples of its batch."""
    flags = [runs[method], "--split", "val", "--split", "testB", "--limit", "130"]
    by_one = evaluated(*flags, "--batch-size", "1")["splits"]
    by_many = evaluated(*flags, "--batch-size", "64")["splits"]
    for split in ("val", "testB"):
        assert by_one[split]["acc@0.5"] == by_many[split]["acc@0.5"]
        assert by_one[split]["mean_iou"] == pytest.approx(by_many[split]["mean_iou"], abs=1e-5)
        assert by_one[split]["mean_iou"] > 0.05


def test_accuracy_by_length_counts_words():
    """A word more or less at a bound moves an expression to the next group; no group is empty."""
    samples = []
    for length in (1, 5, 6, 10, 11, 20, 21, 40):
        text = " ".join(["word"] * length)
        samples.append(data.Sample(0, text, (0, 0, 1, 1), 0))
    ious = torch.tensor([0.6, 0.4, 0.5, 0.7, 0.1, 0.2, 0.9, 0.1])

    assert evaluate.by_length(samples, ious) == (
        "1-5 words 0.5000 of 2, 6-10 words 1.0000 of 2, 11-20 words 0.0000 of 2, "
        "21- words 0.5000 of 2")
    assert evaluate.by_length(samples[:1], ious[:1]) == "1-5 words 1.0000 of 1"


def test_all_splits_but_train_are_evaluated_and_drawn(runs, tmp_path):
    """Without --split, the splits are val, testA and so on, each with a sheet in --figures."""
    splits = evaluated(runs["m2ist"], "--limit", "4", "--figures", tmp_path)["splits"]
    others = [name for name in data.SHAPES_SPLITS if name != "train"]
    assert list(splits) == others
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.png" for name in others}


@pytest.mark.parametrize("method, weights, detr_file, dataset, leaky", [
    ("m2ist", "pretrained", None, "refcoco", True),    # the official DETR has seen all of COCO
    ("m2ist", "pretrained", "x/detr-r50-unc.pth", "refcoco", False),
    ("m2ist", "pretrained", None, "referit", False),
    ("m2ist", "pretrained", "mine.pth", "refcoco", None),
    ("m2ist", "random", None, "refcoco", False),
    ("m2ist", "shapes", None, "shapes", False),
    ("full", "pretrained", None, "refcoco", True),
    ("hivg", "pretrained", None, "refcoco", None),     # nobody knows CLIP's pictures
    ("clip-frozen", "pretrained", None, "referit", None),
    ("hivg", "random", None, "refcoco", False)])
def test_leaky_pretraining_follows_from_weights_and_method(method, weights, detr_file, dataset,
                                                           leaky):
    """Weights that are not pretrained leak nothing; of CLIP it is unknown; DETR's file tells it."""
    args = argparse.Namespace(method=method, weights=weights, vision_weights=detr_file,
                              dataset=dataset)
    assert train.leaky_pretraining(args) is leaky


def test_leaky_pretraining_is_beside_every_accuracy(runs, tmp_path, capsys):
    """The log, the printed lines and the JSON file all hold it."""
    for line in (runs["m2ist"] / "log.jsonl").read_text().splitlines():
        assert json.loads(line)["leaky_pretraining"] is False

    path = tmp_path / "a.json"
    result = evaluated(runs["m2ist"], "--split", "val", "--limit", "8", "--json", path)
    assert "leaky pretraining False" in capsys.readouterr().out
    assert json.loads(path.read_text()) == result
    assert set(result) == {"checkpoint", "method", "epoch", "seed", "dataset", "limit",
                           "leaky_pretraining", "splits"}
    assert set(result["splits"]["val"]) == {"acc@0.5", "mean_iou", "expressions", "images",
                                            "seconds"}


def test_the_file_of_predictions_has_every_number_that_is_printed(runs, tmp_path):
    """A line for each expression of each split; accuracy and mean IoU follow from them alone. The
    IoU of the two boxes is the one that is written, as on `shapes` no box juts out."""
    path = tmp_path / "new" / "a.jsonl"
    result = evaluated(runs["m2ist"], "--split", "val", "--split", "testB", "--limit", "40",
                       "--predictions", path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for split, row in result["splits"].items():
        samples = data.load_samples("shapes", split, limit=40)
        found = [line for line in lines if line["split"] == split]
        assert [line["text"] for line in found] == [sample.text for sample in samples]
        assert [line["image"] for line in found] == [sample.image for sample in samples]
        assert [tuple(line["box"]) for line in found] == [sample.box for sample in samples]
        ious = torch.tensor([line["iou"] for line in found])
        assert row["acc@0.5"] == (ious >= 0.5).float().mean().item()
        assert row["mean_iou"] == pytest.approx(ious.mean().item())
        again = torchvision.ops.box_iou(torch.tensor([line["box"] for line in found]),
                                        torch.tensor([line["predicted"] for line in found]))
        # A box that reaches beyond the picture is cut there in the file, and at the square before
        # it is measured.
        inside = torch.tensor([min(line["predicted"]) > 0 for line in found])
        assert torch.allclose(again.diagonal()[inside], ious[inside], atol=1e-4)
        assert inside.any()


def test_predictions_and_results_keep_any_path_and_any_text(runs, tmp_path):
    """A folder may have a name of bytes that are no text. The files stay UTF-8, other letters stay
    as they are, and each reader gets the path back."""
    folder = tmp_path / "caf\udce9"
    folder.mkdir()
    data.render(0).save(folder / "a.png")
    line = {"image": "a.png", "text": "赤い円", "box": [1, 2, 30, 40], "split": "val"}
    (folder / "my.jsonl").write_text(json.dumps(line))
    command = [sys.executable, evaluate.__file__, runs["m2ist"], "--device", "cpu", "--dataset",
               folder / "my.jsonl", "--predictions", tmp_path / "b.jsonl", "--json",
               tmp_path / "b.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    text = (tmp_path / "b.jsonl").read_text(encoding="utf-8")
    assert "赤い円" in text
    found = json.loads(text)
    assert found["image"] == str(folder / "a.png")
    assert (found["text"], found["box"]) == (line["text"], line["box"])
    result = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))
    assert result["dataset"] == str(folder / "my.jsonl")


def test_what_is_written_says_which_run_it_is_of(runs, tmp_path, capsys):
    """--json has the checkpoint, its method, epoch, seed and limit. A row that was changed by flags
    says so, here and on the screen."""
    result = evaluated(runs["m2ist"], "--split", "val", "--limit", "8")
    assert result["checkpoint"] == str(runs["m2ist"])
    assert (result["method"], result["epoch"], result["seed"], result["limit"]) == ("m2ist", 1, 0, 8)

    flags = ["--row", "m2ist/V/b", "--weights", "random", "--limit", "16", "--epochs", "1",
             "--device", "cpu"]
    train.main([*flags, "--out", str(tmp_path / "row")])
    capsys.readouterr()
    result = evaluated(tmp_path / "row", "--split", "val")
    title = "m2ist/V/b changed (weights random, epochs 1)"
    assert result["method"] == title
    assert f"{title} tiny on shapes, epoch 1" in capsys.readouterr().out


# --- The command line and the options of the training ---------------------------------------------


def test_what_is_asked_wins_over_the_training_and_that_over_the_defaults():
    """Three places may have a value of an option; the batch size of the training is not taken."""
    trained = {"dataset": "refcoco", "root": "pictures", "limit": 7, "batch_size": 3, "amp": "bf16"}
    asked = evaluate.parse_args(["x", "--limit", "9", "--device", "cpu"])
    args = evaluate.merge_options(trained, asked)
    assert args.limit == 9                                      # asked
    assert (args.dataset, args.root, args.amp) == ("refcoco", "pictures", "bf16")    # trained
    assert args.seed == train.OPTIONS["seed"].default           # an older checkpoint lacks it
    assert args.batch_size == evaluate.DEFAULT_BATCH_SIZE


def test_another_dataset_does_not_take_the_folder_of_the_training():
    """With --dataset, --root is what is asked, and the dataset's own default otherwise."""
    trained = {"dataset": "refcoco", "root": "pictures"}
    other = evaluate.parse_args(["x", "--dataset", "referit", "--device", "cpu"])
    assert evaluate.merge_options(trained, other).root is None
    both = evaluate.parse_args(["x", "--dataset", "referit", "--root", "r", "--device", "cpu"])
    assert evaluate.merge_options(trained, both).root == "r"


def test_the_help_is_at_most_80_columns_wide(capsys):
    """--help fits into a terminal."""
    with pytest.raises(SystemExit):
        evaluate.parse_args(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines) <= 80


@pytest.mark.parametrize("flags, words", [
    (["x", "--limit", "0"], "--limit is 0"),
    (["x", "--batch-size", "-1"], "--batch-size is -1"),
    (["x", "--workers", "-1"], "--workers is -1"),
    (["x", "--device", "nosuch"], "--device nosuch"),
    (["x", "--clip-weights", "c"], "--clip-weights is for a released .pth"),
    (["x", "--image", "a.png", "--text", "a", "--save", "b.txt"], "--save b.txt"),
    (["nosuch"], "no such checkpoint"),
    (["nosuch.pth"], "nosuch.pth: no such file")])
def test_wrong_flags_are_refused(flags, words):
    """The error names the flag or the file."""
    with pytest.raises(InputError, match=words):
        evaluate.main(flags)


def test_a_result_cannot_be_written_over_a_folder(tmp_path):
    """The error comes before anything is loaded."""
    with pytest.raises(InputError, match="is a folder"):
        evaluated("x", "--json", tmp_path)


def test_a_file_of_another_kind_is_no_checkpoint(tmp_path):
    """Neither a damaged file nor one without our metadata is read."""
    (tmp_path / "damaged").write_bytes(b"nothing")
    with pytest.raises(InputError, match="not a checkpoint of this project"):
        evaluate.load_checkpoint(tmp_path / "damaged")


# --- One's own pictures ---------------------------------------------------------------------------


def look(capsys, out, image, *flags):
    """The JSON lines that evaluate.py prints for a picture. `flags` may begin with more pictures."""
    capsys.readouterr()
    evaluated(out, "--image", image, *flags)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def save_turned(picture, path):
    """Save a picture that lies on its side, with EXIF data that turn it upright."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = TURN_CLOCKWISE
    picture.rotate(90, expand=True).save(path, exif=exif)


@pytest.mark.parametrize("method", ["m2ist", "hivg"])
def test_ones_own_picture_gets_the_box_that_the_model_gives(runs, method, tmp_path, capsys):
    """The box is that of the dataset's own way to the model, and --save shows one tile a text."""
    path = tmp_path / "a.png"
    picture = data.render(data.SHAPES_SPLITS["val"][0])
    picture.save(path)
    texts = TEXTS[:2]
    sheet = tmp_path / "out/b.png"
    found = look(capsys, runs[method], path, "--text", texts[0], "--text", texts[1],
                 "--save", sheet)

    model, config = evaluate.load_checkpoint(runs[method])
    args = argparse.Namespace(**{**config["args"], "device": "cpu"})
    samples = [data.Sample(path, text, (0, 0, 9, 9), 0) for text in texts]
    predicted = train.predict(model, train.make_loader(samples, model, args, batch_size=2), args)

    assert len(found) == len(texts)
    for line, text, box in zip(found, texts, predicted.boxes):
        in_pixels = list(data.from_square(box, picture.size, 64))
        assert line == {"text": text, "box": pytest.approx(in_pixels, abs=0.06)}

    pixels = np.asarray(Image.open(sheet).convert("RGB"))
    assert pixels.shape[1] > 2 * 512                                  # two tiles, side by side
    assert (pixels == data.PREDICTED).all(-1).sum() > 500             # with boxes in them
    assert look(capsys, runs[method], path, "--text", texts[1])[0]["text"] == texts[1]


@pytest.mark.parametrize("method", ["m2ist", "hivg"])
def test_locate_takes_a_path_and_a_picture(runs, method, tmp_path):
    """Both give the same boxes, one for each text, inside the picture."""
    picture = data.render(1)
    picture.save(tmp_path / "a.png")
    model, _ = evaluate.load_checkpoint(runs[method])
    located = evaluate.locate(model, tmp_path / "a.png", TEXTS)
    assert located == evaluate.locate(model, str(tmp_path / "a.png"), TEXTS)
    assert located == evaluate.locate(model, picture, TEXTS)

    assert [found["text"] for found in located] == TEXTS
    for found in located:
        assert set(found) == {"text", "box"}
        x1, y1, x2, y2 = found["box"]
        assert 0 <= x1 <= x2 <= picture.width and 0 <= y1 <= y2 <= picture.height


@pytest.mark.parametrize("method", ["m2ist", "hivg"])
def test_the_command_line_prints_what_locate_returns(runs, method, tmp_path, capsys):
    """The command line rounds to a tenth of a pixel, and its --json holds the printed lines."""
    data.render(1).save(tmp_path / "a.png")
    model, _ = evaluate.load_checkpoint(runs[method])
    flags = ["--text", TEXTS[0], "--text", TEXTS[1], "--json", tmp_path / "a.json"]
    lines = look(capsys, runs[method], tmp_path / "a.png", *flags)
    expected = []
    for found in evaluate.locate(model, tmp_path / "a.png", TEXTS[:2]):
        expected.append({"text": found["text"], "box": [round(v, 1) for v in found["box"]]})
    assert lines == expected
    assert json.loads((tmp_path / "a.json").read_text()) == lines


@pytest.mark.parametrize("method", ["m2ist", "hivg", "clip-frozen"])
def test_many_texts_give_what_each_gives_alone(method):
    """Neither box nor attention depends on the other texts, which are longer and shorter."""
    torch.manual_seed(0)
    model = m.build_model(method, "tiny", "random")
    picture = data.render(2)
    together = evaluate.ground_texts(model, picture, TEXTS)
    for text, found in zip(TEXTS, together, strict=True):
        alone, = evaluate.ground_texts(model, picture, [text])
        difference = torch.tensor(found.box) - torch.tensor(alone.box)
        assert found.text == alone.text
        assert difference.abs().max() / max(picture.size) < 1e-5
        assert (found.attention - alone.attention).abs().max() < 1e-5
    boxes = [found.box for found in together]
    assert len(set(boxes)) == len(TEXTS)    # each text has a box of its own
    assert evaluate.locate(model, picture, []) == []


def test_m2ist_encodes_a_picture_once_for_all_its_texts(runs, tmp_path, monkeypatch, capsys):
    """The vision encoder of M²IST is called once, with one picture."""
    data.render(0).save(tmp_path / "a.png")
    pictures = []
    encode_image = m.DetrBert.encode_image

    def count(self, images, *rest):
        pictures.append(len(images))
        return encode_image(self, images, *rest)

    monkeypatch.setattr(m.DetrBert, "encode_image", count)
    flags = ["--text", "a", "--text", "b", "--text", "c"]
    assert len(look(capsys, runs["m2ist"], tmp_path / "a.png", *flags)) == 3
    assert pictures == [1]


def test_the_box_is_in_pixels_of_the_picture_as_it_is_seen(runs, tmp_path, capsys):
    """A picture that EXIF data turn upright has the box of the upright picture."""
    picture = data.render(3).resize((256, 200))
    picture.save(tmp_path / "seen.png")
    save_turned(picture, tmp_path / "stored.png")
    seen, = look(capsys, runs["m2ist"], tmp_path / "seen.png", "--text", "the red circle")
    stored, = look(capsys, runs["m2ist"], tmp_path / "stored.png", "--text", "the red circle")
    assert seen == stored
    assert seen["box"][2] <= 256 and seen["box"][3] <= 200


@pytest.mark.parametrize("method", ["m2ist", "hivg"])
def test_locate_turns_paths_and_opened_pictures_upright(runs, method, tmp_path):
    """A PIL picture that was opened from a file still has its EXIF data."""
    picture = data.render(3).resize((256, 200))
    save_turned(picture, tmp_path / "stored.png")
    model, _ = evaluate.load_checkpoint(runs[method])
    seen = evaluate.locate(model, picture, TEXTS)
    assert evaluate.locate(model, tmp_path / "stored.png", TEXTS) == seen
    with Image.open(tmp_path / "stored.png") as stored:
        assert stored.size == (200, 256)
        assert evaluate.locate(model, stored, TEXTS) == seen


def test_locate_refuses_what_are_no_texts():
    """One string in place of a list would be read letter by letter."""
    model = m.build_model("m2ist", "tiny", "random")
    with pytest.raises(InputError, match="give a list of texts"):
        evaluate.locate(model, data.render(0), "the red circle")
    with pytest.raises(InputError, match="must not be empty"):
        evaluate.locate(model, data.render(0), ["the red circle", " "])


@pytest.mark.parametrize("size, mode, text", [
    ((1, 1), "RGB", "a"),
    ((3, 2000), "L", "the cup"),
    ((2000, 1), "RGBA", "die rote Tasse"),
    ((50, 40), "CMYK", "赤いカップ"),
    ((50, 40), "P", "\U0001f534 \u200b?"),
    ((50, 40), "1", "x" * 5000),
    ((50, 40), "I;16", "كأس أحمر"),
    ((10_000, 10_000), "L", "big")])
def test_any_picture_and_any_language_give_a_box(runs, tmp_path, capsys, size, mode, text):
    """The box lies inside the picture, and the text comes back as it was given."""
    if mode == "I;16":
        picture = Image.fromarray(np.full(size[::-1], 30_000, np.uint16))
    else:
        picture = Image.new(mode, size)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    picture.save(path)

    found, = look(capsys, runs["m2ist"], path, "--text", text)
    x1, y1, x2, y2 = found["box"]
    assert found["text"] == text
    assert 0 <= x1 <= x2 <= size[0] and 0 <= y1 <= y2 <= size[1]

    model, _ = evaluate.load_checkpoint(runs["m2ist"])
    located, = evaluate.locate(model, picture, [text])    # a PIL picture of any mode, too
    assert located["box"] == pytest.approx(found["box"], abs=0.06)


def test_bytes_that_are_no_text_become_question_marks(runs, tmp_path, capsys):
    """A shell may pass such bytes; Python keeps them as lone surrogates."""
    data.render(0).save(tmp_path / "a.png")
    found, = look(capsys, runs["m2ist"], tmp_path / "a.png", "--text", "caf\udce9")
    assert found["text"] == "caf?"


def test_several_pictures_and_folders_are_located(runs, tmp_path, capsys):
    """--image takes files and folders. Each line names its picture and has the box that the picture
    has alone; --save is a folder then, in which no drawing replaces another."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, name in enumerate(["b.png", "a.jpg"]):
        data.render(number).save(pictures / name)
    (pictures / "notes.txt").write_text("no picture")
    data.render(2).save(tmp_path / "b.png")

    flags = ["--text", "a", "--text", "b", "--save", tmp_path / "drawn"]
    lines = look(capsys, runs["m2ist"], pictures, tmp_path / "b.png", *flags)
    paths = [pictures / "a.jpg", pictures / "b.png", tmp_path / "b.png"]
    assert [line["image"] for line in lines] == [str(path) for path in paths for _ in range(2)]
    alone = look(capsys, runs["m2ist"], paths[1], "--text", "a", "--text", "b")
    assert [line["box"] for line in lines[2:4]] == [line["box"] for line in alone]
    assert "image" not in alone[0]
    drawn = sorted(path.name for path in (tmp_path / "drawn").iterdir())
    assert drawn == ["0001-a.png", "0002-b.png", "0003-b.png"]
    with pytest.raises(InputError, match="0001-a.png, which is there already"):
        look(capsys, runs["m2ist"], pictures, *flags)


def test_a_broken_picture_among_several_is_named_before_the_first_is_located(runs, tmp_path, capsys):
    """Minutes of other pictures are not lost to it."""
    data.render(0).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match="b.png"):
        look(capsys, runs["m2ist"], tmp_path, "--text", "a")
    assert capsys.readouterr().out == ""
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: there is no picture in this folder"):
        look(capsys, runs["m2ist"], tmp_path / "empty", "--text", "a")


@pytest.mark.parametrize("flags, words", [
    (["--image", "gone.jpg", "--text", "a"], "gone.jpg"),
    (["--image", "DAMAGED", "--text", "a", "--split", "val"], "takes the place of a dataset"),
    (["--image", "DAMAGED", "--text", "a", "--predictions", "p"], "takes the place of a dataset"),
    (["--image", "DAMAGED", "--text", "a"], "decoded"),
    (["--image", "a.jpg"], "go together"),
    (["--text", "a"], "go together"),
    (["--save", "b.png"], "go together"),
    (["--image", "a.jpg", "--text", "  "], "must not be empty")])
def test_wrong_pictures_and_texts_are_refused(runs, tmp_path, flags, words):
    """The error names the file, or the flags that go together."""
    damaged = tmp_path / "a.jpg"
    damaged.write_bytes(b"\xff\xd8\xff nothing")
    flags = [str(damaged) if flag == "DAMAGED" else flag for flag in flags]
    with pytest.raises(InputError, match=words):
        evaluated(runs["m2ist"], *flags)


# --- HiVG's released checkpoints: full size, random values in their names and shapes --------------

LORA_RANK = 32
LORA_SCALE = 16 / 32     # α / r, which no file says


class ReleasedState:
    """Builds the state dict of a released checkpoint in `state`, key by key."""

    def __init__(self, base_layer):
        self.state = {}
        self.wrapped = "base_layer." if base_layer else ""    # of newer versions of PEFT

    def put(self, name, *shape):
        """Add a tensor of the size that a trained one has, so that each makes a difference."""
        value = torch.randn(shape)
        if re.search(r"norm\d?\.weight$", name):
            value = 1 + 0.2 * value
        elif len(shape) > 1:
            value = value / math.sqrt(shape[-1])
        else:
            value = value / 10
        self.state[name] = value

    def linear(self, name, out, into, bias=True):
        self.put(f"{name}.weight", out, into)
        if bias:
            self.put(f"{name}.bias", out)

    def lora_linear(self, name, out, into):
        self.put(f"{name}.{self.wrapped}weight", out, into)
        self.put(f"{name}.{self.wrapped}bias", out)
        self.put(f"{name}.lora_A.default.weight", LORA_RANK, into)
        self.put(f"{name}.lora_B.default.weight", out, LORA_RANK)

    def norm(self, name, dim):
        self.put(f"{name}.weight", dim)
        self.put(f"{name}.bias", dim)

    def layer(self, name, width):
        """A layer of one of CLIP's towers."""
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.lora_linear(f"{name}self_attn.{part}", width, width)
        self.norm(f"{name}layer_norm1", width)
        self.norm(f"{name}layer_norm2", width)
        self.linear(f"{name}mlp.fc1", 4 * width, width)
        self.linear(f"{name}mlp.fc2", width, 4 * width)

    def bridge(self, name, V, T, texts):
        """A cross-modal bridge that has weights for `texts` text layers."""
        self.norm(f"{name}cross_norm", V)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.lora_linear(f"{name}cross_attn.{part}", V, V)
        self.linear(f"{name}cross_mlp.fc1", 4 * V, V)
        self.linear(f"{name}cross_mlp.fc2", V, 4 * V)
        if texts > 0:
            self.linear(f"{name}cross_gate", V, T * texts)
        for i in range(texts):
            self.put(f"{name}cross_adaptive_weights.{i}.weight", 77, T)

    def grounding_layer(self, name, T):
        self.put(f"{name}self_attn.in_proj_weight", 3 * T, T)
        self.put(f"{name}self_attn.in_proj_bias", 3 * T)
        self.linear(f"{name}self_attn.out_proj", T, T)
        self.linear(f"{name}linear1", 2048, T)
        self.linear(f"{name}linear2", T, 2048)
        self.norm(f"{name}norm1", T)
        self.norm(f"{name}norm2", T)


def released(texts=1, bridges=(0, 3, 7, 11), nested=2, base_layer=False, large=False):
    """The state dict of a released checkpoint.

    texts: text layers that the bridges have weights for; 1 on RefCOCO, 0 on mixed data
    bridges: vision layers with a bridge, counted from 0
    nested: how many PEFT models are around CLIP
    """
    torch.manual_seed(0)
    T, V, layers, patch, cells = 512, 768, 12, 16, 196              # ViT-B/16
    if large:
        T, V, layers, patch, cells = 768, 1024, 24, 14, 256         # ViT-L/14
    r = ReleasedState(base_layer)

    clip = "clip." + nested * "base_model.model."
    r.put(clip + "logit_scale")
    for tower, width, positions, depth in (("text", T, 77, 12), ("vision", V, cells + 1, layers)):
        base = f"{clip}{tower}_model."
        r.state[base + "embeddings.position_ids"] = torch.arange(positions)[None]
        r.put(base + "embeddings.position_embedding.weight", positions, width)
        for layer in range(depth):
            name = f"{base}encoder.layers.{layer}."
            r.layer(name, width)
            if tower == "vision" and layer in bridges:
                r.bridge(name, V, T, texts)
    r.put(clip + "text_model.embeddings.token_embedding.weight", 49408, T)
    r.norm(clip + "text_model.final_layer_norm", T)
    r.put(clip + "vision_model.embeddings.class_embedding", V)
    r.put(clip + "vision_model.embeddings.patch_embedding.weight", V, 3, patch, patch)
    r.norm(clip + "vision_model.pre_layrnorm", V)
    r.norm(clip + "vision_model.post_layernorm", V)
    r.linear(clip + "visual_projection", T, V, bias=False)
    r.linear(clip + "text_projection", T, T, bias=False)

    r.linear("visu_proj", T, T)
    r.linear("condition_text_proj", V, T)
    r.linear("ml_text_feat_perceiver", V, T * max(texts, 1))
    r.linear("text_proj", T, T)
    r.linear("ml_visual_projection", T, 4 * V)
    r.linear("visu_token_mlp.fc1", 3072, T)
    r.linear("visu_token_mlp.fc2", T, 3072)
    r.norm("visu_token_norm", T)
    r.linear("bbox_embed.layers.0", T, T)
    r.linear("bbox_embed.layers.1", T, T)
    r.linear("bbox_embed.layers.2", 4, T)
    r.put("reg_token.weight", 1, T)
    r.put("vl_pos_embed.weight", cells + 79, T)
    r.put("reg_pos_embed.weight", 1, T)
    r.put("condition_text_pos_embed.weight", 77, V)
    for layer in range(6):
        r.grounding_layer(f"vl_transformer.encoder.layers.{layer}.", T)
    r.norm("vl_transformer.encoder.norm", T)
    for i in (1, 2, 3):
        r.put(f"seg_conv{i}.weight", T, T, 2, 2)
    return r.state


def attend(q, k, v, heads, causal=False, padding=None):
    """Multi-head attention of one sample: q (N, C), k and v (M, C), padding (M,) -> (N, C)."""
    q = q.unflatten(-1, (heads, -1)).transpose(0, 1)    # (heads, N, C / heads)
    k = k.unflatten(-1, (heads, -1)).transpose(0, 1)
    v = v.unflatten(-1, (heads, -1)).transpose(0, 1)
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    if causal:
        scores = scores + torch.full(scores.shape[1:], float("-inf")).triu(1)
    if padding is not None:
        scores = scores.masked_fill(padding, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


class LiteralForward:
    """The released forward of one sample, ViT-B/16, with a text padded to 77 tokens, written out.

    texts: the text layers that the bridges see, counted from 1; [] is the projected text
    """

    def __init__(self, state, texts):
        self.w = {}
        for key, value in state.items():
            self.w[re.sub(r"base_model\.model\.|base_layer\.", "", key)] = value
        self.texts = texts

    def linear(self, x, name):
        weight = self.w[f"{name}.weight"]
        if f"{name}.lora_A.default.weight" in self.w:
            B = self.w[f"{name}.lora_B.default.weight"]
            A = self.w[f"{name}.lora_A.default.weight"]
            weight = weight + LORA_SCALE * B @ A
        return F.linear(x, weight, self.w.get(f"{name}.bias"))

    def norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def mlp(self, x, name):
        hidden = self.linear(x, f"{name}.fc1")
        hidden = hidden * torch.sigmoid(1.702 * hidden)    # CLIP's GELU
        return self.linear(hidden, f"{name}.fc2")

    def attention(self, x, y, name, heads, causal=False):
        q = self.linear(x, f"{name}.q_proj")
        k = self.linear(y, f"{name}.k_proj")
        v = self.linear(y, f"{name}.v_proj")
        return self.linear(attend(q, k, v, heads, causal), f"{name}.out_proj")

    def text(self, tokens):
        """tokens (77,) -> the outputs of the text layers, and the projected text (77, 512)."""
        base = "clip.text_model."
        x = self.w[f"{base}embeddings.token_embedding.weight"][tokens]
        x = x + self.w[f"{base}embeddings.position_embedding.weight"]
        states = []
        for layer in range(12):
            name = f"{base}encoder.layers.{layer}."
            h = self.norm(x, f"{name}layer_norm1")
            x = x + self.attention(h, h, f"{name}self_attn", 8, causal=True)
            x = x + self.mlp(self.norm(x, f"{name}layer_norm2"), f"{name}mlp")
            states.append(x)
        x = self.norm(x, f"{base}final_layer_norm")
        return states, self.linear(x, "clip.text_projection")

    def bridge(self, x, name, states, projected):
        """What a bridge adds to the vision tokens x (197, 768)."""
        seen = []
        for number, layer in enumerate(self.texts):
            f = states[layer - 1]
            seen.append(self.w[f"{name}cross_adaptive_weights.{number}.weight"] * f + f)
        if seen:
            y = self.linear(torch.cat(seen, -1), f"{name}cross_gate")
        else:
            y = self.linear(projected, "condition_text_proj")
        attended = self.attention(self.norm(x, f"{name}cross_norm"), y, f"{name}cross_attn", 12)
        return self.mlp(attended, f"{name}cross_mlp")

    def vision(self, image, states, projected):
        """image (3, 224, 224) -> the outputs of the vision layers."""
        base = "clip.vision_model."
        kernel = self.w[f"{base}embeddings.patch_embedding.weight"]
        patches = F.conv2d(image[None], kernel, stride=16)[0].flatten(1).T    # (196, 768)
        x = torch.cat([self.w[f"{base}embeddings.class_embedding"][None], patches])
        x = x + self.w[f"{base}embeddings.position_embedding.weight"]
        x = self.norm(x, f"{base}pre_layrnorm")
        outputs = []
        for layer in range(12):
            name = f"{base}encoder.layers.{layer}."
            h = self.norm(x, f"{name}layer_norm1")
            x = x + self.attention(h, h, f"{name}self_attn", 12)
            if f"{name}cross_norm.weight" in self.w:
                x = x + self.bridge(x, name, states, projected)
            x = x + self.mlp(self.norm(x, f"{name}layer_norm2"), f"{name}mlp")
            outputs.append(x)
        return outputs

    def ground(self, x, padding):
        """[REG], picture and text as tokens x (275, 512), padding (275,) -> box (4,)."""
        for layer in range(6):
            name = f"vl_transformer.encoder.layers.{layer}."
            h = self.norm(x, f"{name}norm1")
            placed = h + self.w["vl_pos_embed.weight"]
            weights = self.w[f"{name}self_attn.in_proj_weight"].chunk(3)
            biases = self.w[f"{name}self_attn.in_proj_bias"].chunk(3)
            q = F.linear(placed, weights[0], biases[0])
            k = F.linear(placed, weights[1], biases[1])
            v = F.linear(h, weights[2], biases[2])
            attended = attend(q, k, v, 8, padding=padding)
            x = x + self.linear(attended, f"{name}self_attn.out_proj")
            h = self.norm(x, f"{name}norm2")
            x = x + self.linear(F.relu(self.linear(h, f"{name}linear1")), f"{name}linear2")
        reg = self.norm(x, "vl_transformer.encoder.norm")[0]
        reg = F.relu(self.linear(reg, "bbox_embed.layers.0"))
        reg = F.relu(self.linear(reg, "bbox_embed.layers.1"))
        return self.linear(reg, "bbox_embed.layers.2").sigmoid()

    def box(self, image, tokens, image_padding=None):
        """image (3, 224, 224), image_padding (224, 224), tokens (77,) with 0 as padding -> (4,).

        Only the grounding encoder masks padding: tokens of the id 0, and patches of which more than
        half is padding. The towers and the bridges see all."""
        if image_padding is None:
            image_padding = torch.zeros(224, 224, dtype=torch.bool)
        padded_patches = []
        for row in range(0, 224, 16):
            for column in range(0, 224, 16):
                patch = image_padding[row:row + 16, column:column + 16]
                padded_patches.append(patch.sum() > 128)
        never = torch.zeros(2, dtype=torch.bool)    # [REG], [CLS]
        padding = torch.cat([never, torch.stack(padded_patches), tokens == 0])

        states, projected = self.text(tokens)
        outputs = self.vision(image, states, projected)
        levels = torch.cat([outputs[layer - 1] for layer in (1, 4, 8, 12)], -1)
        seen = self.linear(self.linear(levels, "ml_visual_projection"), "visu_proj")
        said = self.linear(projected, "text_proj")
        return self.ground(torch.cat([self.w["reg_token.weight"], seen, said]), padding)


def one_box(model, image, tokens):
    """Our model's box of one sample without padding."""
    padding = torch.zeros(1, 224, 224, dtype=torch.bool)
    token_padding = torch.zeros(1, 77, dtype=torch.bool)
    return model(image[None], padding, tokens[None], token_padding).boxes[0]


def assert_same_forward(model, state, text_layers):
    """The boxes are those of the released forward, and depend on the text. The layer after the
    twelfth is the projected text, which the released forward takes where it sees no layer."""
    image = torch.randn(3, 224, 224)
    tokens = torch.randint(0, 49000, (77,))
    seen = [] if text_layers == [13] else text_layers
    ours = one_box(model, image, tokens)
    theirs = LiteralForward(state, seen).box(image, tokens)
    assert model.text_layers == text_layers
    assert (ours - theirs).abs().max() < 1e-4
    assert theirs.std() > 1e-3
    assert (ours - one_box(model, image, tokens.flip(0))).abs().max() > 1e-3


def assert_same_padding(model, state, text_layers):
    """A short text and a wide picture give the box of the released forward, alone and in a batch
    with a longer text. CLIP's tokenizer pads with another id than 0; the mask says what it is."""
    seen = [] if text_layers == [13] else text_layers
    images = torch.randn(2, 3, 224, 224)
    image_padding = torch.zeros(2, 224, 224, dtype=torch.bool)
    image_padding[0, :70] = True     # four rows of patches, and 6 of 16 pixels of the fifth
    image_padding[0, 149:] = True    # 11 of 16 pixels of the tenth row, and the rows below
    images[0][:, image_padding[0]] = 0
    tokens = torch.randint(1, 49000, (2, 20))
    token_padding = torch.zeros(2, 20, dtype=torch.bool)
    token_padding[0, 7:] = True
    tokens[0, 7:] = 49407
    ours = model(images, image_padding, tokens, token_padding).boxes
    alone = model(images[:1], image_padding[:1], tokens[:1, :7], token_padding[:1, :7]).boxes
    for sample, length in enumerate((7, 20)):
        padded = F.pad(tokens[sample, :length], (0, 77 - length))
        theirs = LiteralForward(state, seen).box(images[sample], padded, image_padding[sample])
        assert (ours[sample] - theirs).abs().max() < 1e-4
    assert (ours[0] - alone[0]).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("texts, text_layers", [(1, [12]), (2, [6, 12]), (0, [13])])
def test_a_released_checkpoint_keeps_its_three_rules_of_padding(monkeypatch, capsys, texts,
                                                                text_layers):
    """[D47] Bridges see padding, texts are padded to 77 by id 0, and a patch is masked if more than
    half of it is padding."""
    state = released(texts)
    monkeypatch.setattr(evaluate, "read_file", lambda path: {"model": dict(state)})
    model, config = evaluate.load_released("best.pth")
    assert config["args"]["released_rules"] is True
    assert_same_padding(model, state, text_layers)


@torch.no_grad()
@pytest.mark.parametrize("what", ["a short text", "a wide picture"])
def test_our_own_rules_of_padding_give_another_box(what):
    """So it matters whose rules a checkpoint was trained with. Without padding the box is the same."""
    torch.manual_seed(0)
    ours = m.build_model("hivg", "tiny", "random").eval()
    released = m.build_model("hivg", "tiny", "random", released_rules=True).eval()
    released.load_state_dict(ours.state_dict())
    images = torch.randn(1, 3, 64, 64)
    tokens = torch.randint(1, 200, (1, 20))
    image_padding = torch.zeros(1, 64, 64, dtype=torch.bool)
    token_padding = torch.zeros(1, 20, dtype=torch.bool)
    whole = released(images, image_padding, tokens, token_padding).boxes
    assert (ours(images, image_padding, tokens, token_padding).boxes - whole).abs().max() < 1e-6

    if what == "a short text":
        token_padding[0, 7:] = True
    else:
        image_padding[0, :5] = True    # 5 of the 8 pixels of the first row of patches
    box = released(images, image_padding, tokens, token_padding).boxes
    assert (ours(images, image_padding, tokens, token_padding).boxes - box).abs().max() > 1e-4


@torch.no_grad()
def test_a_released_checkpoint_gives_the_box_of_its_own_forward(tmp_path, capsys):
    """A file of RefCOCO, with flags and figures beside its 795 weights."""
    state = released()
    assert len(state) == 795
    flags = argparse.Namespace(dataset="unc", lr=1e-4)
    content = {"model": state, "args": flags, "epoch": 7, "val_accu": 0.87}
    torch.save(content, tmp_path / "best.pth")

    model, config = evaluate.load_released(str(tmp_path / "best.pth"))
    unused = capsys.readouterr().err
    for name in ("seg_conv1.weight", "ml_text_feat_perceiver.bias", "condition_text_proj.bias"):
        assert name in unused
    assert_same_forward(model, state, [12])
    assert not model.training
    assert config["args"]["bridge_layers"] == [1, 4, 8, 12]
    assert config["args"]["text_layers"] == [12]
    assert config["args"]["pixels"] == model.spec["pixels"] == "detr"
    assert config["args"]["weights"] == "pretrained"
    assert train.leaky_pretraining(argparse.Namespace(**config["args"])) is None


@torch.no_grad()
def test_bridges_that_see_two_text_layers_give_the_box_too(monkeypatch, capsys):
    """Another version of PEFT calls the frozen weights "base_layer" and nests more deeply."""
    state = released(texts=2, nested=4, base_layer=True)
    monkeypatch.setattr(evaluate, "read_file", lambda path: {"model": dict(state)})
    model, config = evaluate.load_released("best.pth")
    assert_same_forward(model, state, [6, 12])


@torch.no_grad()
def test_bridges_without_weights_give_the_box_too(monkeypatch, capsys):
    """Trained on mixed data, all bridges share one projection, which then is used."""
    state = released(texts=0, nested=1)
    monkeypatch.setattr(evaluate, "read_file", lambda path: {"model": dict(state)})
    model, config = evaluate.load_released("best.pth")
    assert "condition_text_proj" not in capsys.readouterr().err
    assert_same_forward(model, state, [13])


@torch.no_grad()
def test_weights_that_mixed_pretraining_never_calls_are_not_used(tmp_path, capsys):
    """The flags in the file tell that its bridges' weights were never called."""
    state = released(texts=1)
    content = {"model": state, "args": argparse.Namespace(mixup_pretrain=True)}
    torch.save(content, tmp_path / "best.pth")
    model, config = evaluate.load_released(str(tmp_path / "best.pth"))
    assert "condition_text_proj" not in capsys.readouterr().err
    assert_same_forward(model, state, [13])


@pytest.fixture
def load_changed(monkeypatch):
    """A function that loads a released checkpoint with changes {key: tensor, or None to drop it}.
    All is on the meta device, where no value is computed."""
    with torch.device("meta"):
        state = released()
        model = m.build_model("hivg", "base", "random", bridge_layers=[1, 4, 8, 12],
                              text_layers=[12])
    monkeypatch.setattr(evaluate, "build_model", lambda *names, **options: model)
    monkeypatch.setattr(model, "load_state_dict", lambda state: None)

    def load(changes):
        changed = {**state, **changes}
        changed = {key: value for key, value in changed.items() if value is not None}
        monkeypatch.setattr(evaluate, "read_file", lambda path: {"model": changed})
        return evaluate.load_released("best.pth")
    return load


LAYER = "clip.base_model.model.base_model.model.vision_model.encoder.layers.3."
OTHER_SHAPE = torch.empty(1, 512, device="meta")


@pytest.mark.parametrize("changes, words", [
    ({"text_proj.bias": None}, "missing: grounding.text_projection.bias"),
    ({"new.weight": OTHER_SHAPE}, "unexpected: new.weight"),
    ({"vl_pos_embed.weight": OTHER_SHAPE}, "they have grounding positions 1, and the model needs"),
    ({f"{LAYER}cross_adaptive_weights.0.weight": None}, "cross_adaptive_weights.0.weight"),
    ({f"{LAYER}self_attn.q_proj.lora_B.default.weight": None}, "self_attn.q_proj.lora_B"),
    ({f"{LAYER}self_attn.q_proj.lora_A.default.weight": None}, "layers.3.q.lora_B"),
    ({"visu_proj.bias": None}, "visu_proj.bias")])
def test_every_key_of_a_released_checkpoint_is_accounted_for(load_changed, capsys, changes, words):
    """A key that is missing, unknown or of another shape is named."""
    load_changed({})
    with pytest.raises(InputError, match=words):
        load_changed(changes)


def test_without_weights_of_the_bridges_their_shared_projection_is_needed(load_changed, capsys):
    """On mixed data condition_text_proj is a part of the forward."""
    changes = {"condition_text_proj.bias": None}
    for layer in (0, 3, 7, 11):
        name = LAYER.replace("layers.3.", f"layers.{layer}.")
        changes[f"{name}cross_adaptive_weights.0.weight"] = None
    with pytest.raises(InputError, match="condition_text_proj.bias"):
        load_changed(changes)


@pytest.mark.parametrize("content", [[1, 2], {"model": [1, 2]}, {1: torch.zeros(1)}])
def test_a_pth_that_holds_no_names_is_refused(tmp_path, content):
    """Whatever else a .pth may hold, the error names the file."""
    torch.save(content, tmp_path / "best.pth")
    with pytest.raises(InputError, match="best.pth: not a file of weights"):
        evaluate.load_released(str(tmp_path / "best.pth"))


@pytest.mark.parametrize("texts, layers", [(1, [12]), (12, list(range(1, 13)))])
def test_released_checkpoints_of_the_large_size_fit_too(monkeypatch, capsys, texts, layers):
    """ViT-L/14 on the meta device: other widths, twice the layers, other bridges."""
    with torch.device("meta"):
        state = released(texts, bridges=(4, 10, 16, 22), large=True)
        assert list(state["vl_pos_embed.weight"].shape) == [335, 768]
        monkeypatch.setattr(evaluate, "read_file", lambda path: {"model": state})
        model, config = evaluate.load_released("best.pth")    # checks every key and shape
    bridges = []
    for number, layer in enumerate(model.clip.vision.layers, start=1):
        if "attention" in layer.plugs:
            bridges.append(number)
    assert bridges == [5, 11, 17, 23]
    assert model.text_layers == layers
    assert model.levels == [6, 12, 18, 24]
    assert config["args"]["size"] == "large"


def test_a_released_checkpoint_takes_the_tokenizer_of_its_clip(load_changed, monkeypatch, capsys):
    """Its encoders are no longer random, so its texts need CLIP's tokenizer, not that of shapes."""
    model, config = load_changed({})
    asked = []
    monkeypatch.setattr(m, "cached_tokenizer", lambda *names: asked.append(names))
    m.make_tokenizer(model.spec)
    assert asked == [(77, "openai/clip-vit-base-patch16", 49408, "--clip-weights")]


# --- What a row costs -----------------------------------------------------------------------------


def arguments(row, *flags):
    return train.parse_args(["--row", row, "--weights", "random", "--device", "cpu", *flags])


@functools.cache
def cost(row, *flags):
    """The counts of a row at size base. Several tests ask for the same ones."""
    return evaluate.count_cost(arguments(row, "--size", "base", *flags))


def count_saved(args, device="meta"):
    """The saved bytes of a run for one sample, without its MACs, whose count takes longer."""
    trial = evaluate.set_up(args, device, batch=1)
    return evaluate.saved_bytes(trial.model, lambda: evaluate.training_loss(trial, args))


@functools.cache
def saved(row, *flags):
    """The saved bytes of a row at size base."""
    return count_saved(arguments(row, "--size", "base", *flags))


def test_saved_bytes_are_the_distinct_storages_that_backward_needs():
    """Weights are the model's own and do not count; a frozen linear saves nothing."""
    linear = nn.Linear(4, 8)
    x = torch.randn(3, 4)
    relu = evaluate.saved_bytes(linear, lambda: torch.relu(linear(x)))
    assert relu == 3 * 4 * 4 + 3 * 8 * 4                        # x and the output, float32

    y = torch.randn(5, requires_grad=True)
    assert evaluate.saved_bytes(linear, lambda: y * y) == 5 * 4    # y once

    z = torch.randn(6, 2)
    view = evaluate.saved_bytes(linear, lambda: linear(z[:, :1].expand(6, 4)))
    assert view == 6 * 2 * 4                                    # what the view is a view of

    h = torch.randn(3, 4, requires_grad=True)
    both = evaluate.saved_bytes(linear, lambda: linear(h))
    assert both == 3 * 4 * 4                                    # h; the weight is the model's own

    linear.requires_grad_(False)
    assert evaluate.saved_bytes(linear, lambda: linear(x)) == 0


class SavesItsOutput(torch.autograd.Function):
    """exp(x), whose node in the graph owns `owned`."""

    @staticmethod
    def forward(ctx, x, owned):
        y = x.exp()
        ctx.owned = owned
        ctx.save_for_backward(y)
        return y


def test_counting_saved_bytes_frees_the_graph():
    """Or else `--cost` with many methods would hold all of their models at once."""
    owned = nn.Module()
    watch = weakref.ref(owned)
    x = torch.randn(3, requires_grad=True)
    assert evaluate.saved_bytes(nn.Identity(), lambda: SavesItsOutput.apply(x, owned)) == 3 * 4
    del owned
    gc.collect()
    assert watch() is None


def test_macs_are_those_of_the_products():
    """If all other products are taken away, those of ResNet-50 are left."""
    found = cost("m2ist/I/frozen")
    T, C, hidden = 20, 768, 3072
    bert = 12 * (T * (4 * C * C + 2 * C * hidden) + 2 * T * T * C)
    cells, dim, wide = 400, 256, 2048
    detr = 6 * (cells * (4 * dim * dim + 2 * dim * wide) + 2 * cells * cells * dim)
    N = 1 + T + cells
    grounding = 5 * (N * (4 * dim * dim + 2 * dim * wide) + 2 * N * N * dim)
    # The last layer computes [REG] alone, but the keys and values of all tokens.
    grounding += 2 * N * dim * dim + 2 * dim * dim + 2 * dim * wide + 2 * N * dim
    projections = cells * 2048 * dim + cells * dim * dim + T * C * dim
    head = 2 * dim * dim + 4 * dim
    resnet = found["macs"] - bert - detr - grounding - projections - head
    # ResNet-50 without its classifier has 4.087 G at 224 pixels.
    assert resnet == pytest.approx(4.087e9 * (640 / 224) ** 2, rel=2e-3)


def test_saved_bytes_rank_the_methods_as_the_papers_memory():
    """M²IST saves at most 46 MiB, 11.2% of what full fine-tuning does (the paper's memory: 39.64%)
    and 1.21 of what frozen encoders do, and the least of all methods but frozen."""
    full = saved("m2ist/I/full")
    ours = saved("m2ist/I/m2ist")
    assert ours <= 46 * 2 ** 20
    assert ours <= 0.112 * full
    assert ours <= 1.21 * saved("m2ist/I/frozen")
    assert cost("m2ist/I/frozen")["saved_bytes"] == saved("m2ist/I/frozen")
    for other in ("adapter", "lora", "adaptformer", "cm-adapter", "mrs-adapter"):
        assert ours < saved(f"m2ist/I/{other}")


@pytest.mark.parametrize("row", ["a", "b", "c", "d", "e", "f"])
def test_no_side_network_saves_much_more_than_nothing(row):
    """Table V: 15.44 of 14.32 GB in the paper. Here a sample needs 8 MiB more."""
    frozen = saved("m2ist/I/frozen")
    assert saved(f"m2ist/V/{row}") - frozen <= 8 * 2 ** 20


def saved_with(monkeypatch, method, **vision):
    """The saved bytes of a method at size tiny, with other encoders: depth is how many times their
    layers, the rest replaces what the vision tower has."""
    depth = vision.pop("depth", 1)
    detr = copy.deepcopy(m.SIZES["tiny"]["detr"])
    detr["vision"].update(vision)
    with monkeypatch.context() as patch:
        patch.setitem(m.SIZES["tiny"], "detr", detr)
        with evaluate.deeper_encoders("tiny", depth):
            return count_saved(arguments(f"m2ist/I/{method}", "--size", "tiny"))


def test_m2ist_saves_nothing_of_its_encoders(monkeypatch):
    """Neither their depth nor their inner width changes what autograd keeps, but that each paired
    layer has its adapters: those of twice the layers keep twice as much. Full fine-tuning keeps
    more with either."""
    frozen = saved_with(monkeypatch, "frozen")
    assert saved_with(monkeypatch, "frozen", depth=3) == frozen
    assert saved_with(monkeypatch, "frozen", hidden=512) == frozen

    adapters_of_two = saved_with(monkeypatch, "m2ist") - frozen
    adapters_of_four = saved_with(monkeypatch, "m2ist", depth=2) - frozen
    adapters_of_six = saved_with(monkeypatch, "m2ist", depth=3) - frozen
    assert adapters_of_six - adapters_of_four == adapters_of_four - adapters_of_two > 0
    assert saved_with(monkeypatch, "m2ist", hidden=512) - frozen == adapters_of_two

    full = saved_with(monkeypatch, "full")
    assert saved_with(monkeypatch, "full", hidden=512) > full
    assert saved_with(monkeypatch, "full", depth=2) > full


def test_what_hivg_saves():
    """In the last stage, by the counts of the meta device, which has no fused attention: at most
    240 MB a sample; with each vision layer computed again at most 120 MB."""
    assert saved("hivg/3/4") <= 240e6
    assert saved("hivg/3/4", "--checkpointing") <= 120e6


@pytest.mark.parametrize("flags, most", [
    (["--max-tokens", "10"], 170e6), (["--max-tokens", "10", "--checkpointing"], 95e6)])
def test_what_hivg_saves_as_it_is_executed_on_a_cpu(flags, most):
    """With texts of ten tokens, in the last stage; attention without dropout is fused there."""
    assert count_saved(arguments("hivg/3/4", "--size", "base", *flags), "cpu") <= most


class Created(TorchDispatchMode):
    """Notes every storage that an operation creates."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        output = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self.storages[reference.cdata] = (reference, storage.nbytes())
        return output


@pytest.mark.parametrize("method, flags", [
    ("m2ist", []), ("hivg", []), ("hivg", ["--checkpointing"])])
def test_saved_bytes_are_what_is_alive_after_the_forward_pass(method, flags):
    """Another way to measure: all memory that the forward pass of a training step has created and
    that lives until the backward pass, also what is kept in order to compute it again."""
    args = train.parse_args(["--method", method, "--size", "base", "--weights", "random",
                             "--device", "cpu", *flags])
    trial = evaluate.set_up(args, "meta", batch=1)
    model = trial.model
    before = [*model.parameters(), *model.buffers(), *trial.inputs.values(), trial.boxes]
    own = {evaluate.storage_address(tensor) for tensor in before}
    with Created() as created:
        loss = evaluate.training_loss(trial, args)
    alive = 0
    for address, (reference, size) in created.storages.items():
        if address not in own and not reference.expired():
            alive += size
    assert loss.requires_grad

    counted = evaluate.saved_bytes(model, lambda: evaluate.training_loss(trial, args))
    assert alive == pytest.approx(counted, rel=0.01)


def test_inserted_adapters_save_more_than_a_side_network():
    """Table VII. A frozen linear saves no input for the backward pass; either form of inserted
    adapter saves exactly one."""
    sequential = saved("m2ist/VII/a")
    parallel = saved("m2ist/VII/b")
    side = saved("m2ist/VII/c")
    assert side < parallel == sequential


def test_what_is_evaluated_is_merged():
    """LoRA and full fine-tuning cost nothing in evaluation."""
    frozen = cost("m2ist/I/frozen")["macs"]
    assert cost("m2ist/I/lora")["macs"] == frozen
    assert cost("m2ist/I/full")["macs"] == frozen


def test_the_pairs_of_the_last_stage_are_counted():
    """The last phase of the training has pairs in all layers; an evaluation has them merged."""
    assert cost("m2ist/I/lora")["encoder_tunable"] == 2_365_440
    assert cost("hivg/3/4")["encoder_tunable"] == 40_768_512
    args = arguments("hivg/3/4", "--size", "base")
    trial = evaluate.set_up(args, "meta", batch=1)
    assert trial.model.stage == 3
    assert len(hilora.find_pairs(trial.model)) > 0
    evaluate.evaluation_step(trial, args)
    assert len(hilora.find_pairs(trial.model)) == 0


def test_macs_of_hivg_beside_the_papers():
    """The paper says 38.7 G, which fits four bridges and a segmentation head of 4.32 G; ours has
    three bridges and no such head."""
    ours = cost("hivg/3/4")["macs"]
    four = cost("hivg/3/4", "--bridge-layers", "1", "4", "8", "12")["macs"]
    assert round(ours / 1e9, 2) == 30.67
    assert round(four / 1e9, 2) == 32.31
    assert f"{ours / 1e9:.2f} G" in RESULTS


def test_the_papers_memory_is_that_of_its_tables():
    """Table I by its rows; the other tables by the sum of their column "Mem."."""
    table_1 = {"full": 38.95, "frozen": 14.32, "adapter": 28.52, "lora": 20.37,
               "adaptformer": 20.37, "cm-adapter": 27.19, "mrs-adapter": 20.07, "m2ist": 15.44}
    for method, memory in table_1.items():
        assert evaluate.paper_cost(method).memory == memory
        assert evaluate.paper_cost(f"m2ist/I/{method}").memory == memory
    assert evaluate.paper_cost("m2ist+lora").memory == 21.68
    assert evaluate.paper_cost("hivg") is None

    sums = {"V": 89.11, "VI": 61.31, "VII": 63.0, "IX": 46.13, "X": 96.44}
    for table, total in sums.items():
        memory = [paper.memory for row, paper in evaluate.PAPER.items()
                  if row.startswith(f"m2ist/{table}/")]
        assert sum(memory) == pytest.approx(total)
    for row in evaluate.PAPER:
        assert row in train.ROWS or row in m.METHODS


def test_the_command_prints_costs_with_shares_of_full_and_the_papers_figures(tmp_path, capsys):
    """Beside full fine-tuning, a method on DETR and BERT has its share of it."""
    path = tmp_path / "c.json"
    results = evaluated("--cost", "m2ist/I/full", "m2ist", "hivg/3/2", "--size", "tiny",
                        "--json", path)
    assert json.loads(path.read_text()) == results
    assert [row["method"] for row in results] == ["m2ist/I/full", "m2ist", "hivg/3/2"]
    assert set(results[0]) == {"method", "size", "total", "trainable", "encoder_tunable", "macs",
                               "saved_bytes", "batch", "saved_bytes_here", "peak_bytes",
                               "train_step_s", "train_samples_per_second", "eval_s",
                               "eval_samples_per_second"}
    for row in results:
        assert row["eval_s"] > 0 and row["train_step_s"] > 0
        assert row["batch"] == 1

    out = capsys.readouterr().out
    share = results[1]["saved_bytes"] / results[0]["saved_bytes"]
    assert f"({share:.1%})" in out
    assert "the paper: 3.19 M (2.11%), 15.44 GB (39.64%)" in out
    assert "the paper: 151 M (100.00%)" in out
    assert not re.search(r"^hivg/3/2: .*%", out, re.MULTILINE)    # CLIP is no share of DETR


def test_without_full_there_are_no_shares(capsys):
    """--batch-size sets the batch that is timed."""
    row, = evaluated("--cost", "m2ist", "--size", "tiny", "--batch-size", "3")
    assert row["batch"] == 3
    assert "%" not in capsys.readouterr().out


@pytest.mark.parametrize("what, values, differs", [
    ("batch", [1, 3], "batch"), ("side", [64, 96], "macs"), ("tokens", [5, 20], "macs"),
    ("depth", [1, 2], "total"), ("expressions", [1, 4], "saved_bytes_here")])
def test_costs_grow_with_one_quantity(capsys, what, values, differs):
    """--grow gives a row for each value, with its name, and its share of full at the same value."""
    flags = ["--batch-size", "4"] if what == "expressions" else []
    results = evaluated("--cost", "full", "m2ist", "--size", "tiny", "--grow", what,
                        *map(str, values), *flags)
    assert [row["method"] for row in results] == ["full", "full", "m2ist", "m2ist"]
    assert [row["grow"][what] for row in results] == values + values
    assert results[2][differs] != results[3][differs]

    out = capsys.readouterr().out
    for row, full in zip(results[2:], results[:2]):
        share = row["saved_bytes_here"] / full["saved_bytes_here"]
        assert re.search(rf"    {what} {row['grow'][what]}, batch .*\({share:.1%}\)", out)


def test_sharing_a_picture_saves_what_its_encoder_keeps():
    """Four samples need four, two or one vision tower, and full fine-tuning keeps as many."""
    results = evaluated("--cost", "full", "--size", "tiny", "--batch-size", "4", "--grow",
                        "expressions", "1", "2", "4")
    four, two, one = [row["saved_bytes_here"] for row in results]
    assert four - two == pytest.approx(2 * (two - one), rel=0.05)
    assert two > one


def test_growing_leaves_the_sizes_as_they_were():
    """`deeper_encoders` changes the sizes only as long as it lasts."""
    before = copy.deepcopy(m.SIZES)
    with evaluate.deeper_encoders("tiny", 2):
        assert m.SIZES["tiny"]["detr"]["vision"]["layers"] == 4
    assert m.SIZES == before


def test_costs_with_vision_layers_that_are_computed_again():
    """--checkpointing is that of train.py: half of what hivg keeps otherwise."""
    plain, = evaluated("--cost", "hivg", "--size", "tiny")
    again, = evaluated("--cost", "hivg", "--size", "tiny", "--checkpointing")
    assert again["saved_bytes"] < 0.6 * plain["saved_bytes"]
    assert again["saved_bytes_here"] < 0.6 * plain["saved_bytes_here"]


@pytest.mark.parametrize("amp", ["bf16", "tf32"])
def test_costs_are_measured_in_the_precision_that_is_asked_for(amp):
    """The exact count stays that of float32; bf16 keeps fewer bytes as executed."""
    flags = ["--cost", "m2ist", "--size", "tiny", "--batch-size", "16"]
    plain, = evaluated(*flags)
    other, = evaluated(*flags, "--amp", amp)
    assert other["saved_bytes"] == plain["saved_bytes"]
    assert (other["saved_bytes_here"] < plain["saved_bytes_here"]) == (amp == "bf16")


@pytest.mark.parametrize("flags, words", [
    (["--cost", "nosuch"], "nosuch"),
    (["--cost", "m2ist", "--grow", "width", "1"], "width.*batch, side, tokens, expressions, depth"),
    (["--cost", "hivg", "--grow", "tokens", "78"], "--max-tokens"),
    (["--cost", "m2ist", "--checkpointing"], "--checkpointing"),
    (["runs/x", "--checkpointing"], "--cost"),
    (["--cost", "m2ist", "--grow", "batch"], "--grow batch: give one or more whole numbers"),
    (["--cost", "m2ist", "--grow", "batch", "0"], "--grow batch 0: give"),
    (["--cost", "m2ist", "--grow", "batch", "x"], "--grow batch x: give"),
    (["--cost", "m2ist", "--grow", "batch", "2", "--batch-size", "2"], "contradict"),
    (["--cost", "m2ist", "--grow", "side", "330"], "--image-size"),
    (["--cost", "hivg", "--grow", "side", "320"], "--image-size"),
    (["runs/x", "--grow", "batch", "2"], "--cost"),
    (["--cost", "m2ist/V/z"], "m2ist/V/z.*--row list"),
    ([], "--cost"),
    (["runs/x", "--cost", "m2ist"], "--cost"),
    (["--cost", "hivg/3/1", "--size", "large"], "large"),
    (["--cost", "m2ist", "--size", "xl"], "xl"),
    (["--cost", "m2ist", "--dataset", "refcoco"], "--cost"),
    (["runs/x", "--size", "tiny"], "--cost")])
def test_a_wrong_question_of_cost_is_refused(flags, words):
    """The error names what is unknown, or --cost where flags do not go together."""
    with pytest.raises(InputError, match=words):
        evaluate.main(flags)
