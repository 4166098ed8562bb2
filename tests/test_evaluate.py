"""evaluate.py: accuracy, one's own images, checkpoints, and those that HiVG's authors released."""
import argparse
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import data
import evaluate
import model as m
import train
from data import InputError

TEXTS = ["the red circle", "the leftmost shape", "a"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Short runs of a row of M²IST and of hivg on `shapes`: {method: folder}."""
    folder = tmp_path_factory.mktemp("runs")
    flags = ["--weights", "random", "--limit", "64", "--batch-size", "16", "--epochs", "1",
             "--warmup", "0", "--device", "cpu", "--seed", "3"]
    found = {"m2ist": folder / "m2ist", "hivg": folder / "hivg"}
    train.main(["--row", "m2ist/V/b", "--out", str(found["m2ist"]), *flags])
    train.main(["--method", "hivg", "--stages", "1", "--out", str(found["hivg"]), *flags])
    return found


def evaluated(*flags):
    """What evaluate.py returns on the CPU."""
    return evaluate.main([*map(str, flags), "--device", "cpu"])


def changed_checkpoint(runs, path, change):
    """A copy of a checkpoint of M²IST. change(weights, config) changes both in place."""
    with safe_open(runs["m2ist"] / "best.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
    weights = load_file(runs["m2ist"] / "best.safetensors")
    change(weights, config)
    save_file(weights, path, {"config": json.dumps(config)})


# --- Accuracy of a dataset ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["m2ist", "hivg"])
def test_accuracy_is_that_of_the_log_in_batches_of_any_size(runs, method):
    """No sample's box depends on the other samples of its batch, and the checkpoint is the model
    that was evaluated in training, with LoRA merged."""
    log = [json.loads(line) for line in (runs[method] / "log.jsonl").read_text().splitlines()]
    best = max(reversed(log), key=lambda line: line["val_acc@0.5"])
    assert best["val_mean_iou"] > 0.05
    for batch_size in (1, 64):
        result = evaluated(runs[method], "--split", "val", "--batch-size", batch_size)
        assert result["splits"]["val"]["acc@0.5"] == best["val_acc@0.5"]
        assert result["splits"]["val"]["mean_iou"] == pytest.approx(best["val_mean_iou"], abs=1e-5)


def test_accuracy_by_length_counts_words():
    """A word more or less at a bound moves an expression to the next group; no group is empty."""
    samples = [data.Sample(0, " ".join(["word"] * length), (0, 0, 1, 1), 0)
               for length in (1, 5, 6, 10, 11, 20, 21, 40)]
    ious = torch.tensor([0.6, 0.4, 0.5, 0.7, 0.1, 0.2, 0.9, 0.1])
    assert evaluate.by_length(samples, ious) == (
        "1-5 words 0.5000 of 2, 6-10 words 1.0000 of 2, 11-20 words 0.0000 of 2, "
        "21 or more words 0.5000 of 2")
    assert evaluate.by_length(samples[:1], ious[:1]) == "1-5 words 1.0000 of 1"


def test_predictions_are_cut_at_the_square_before_they_are_measured():
    """The loss takes them whole. An IoU of 0.5 is right."""
    box = torch.tensor([[0.0, 0.5, 0.8, 0.5]])      # a half of it lies in the square
    truth = torch.tensor([[0.2, 0.5, 0.4, 0.5]])
    assert evaluate.measured_ious(box, truth).item() == pytest.approx(1)
    found = evaluate.scores(torch.tensor([0.5, 0.49, 0.2, 0.81]))
    assert found == {"acc@0.5": 0.5, "mean_iou": pytest.approx(0.5)}


@pytest.mark.parametrize("method, weights, detr_file, dataset, leaky", [
    ("m2ist", "pretrained", None, "refcoco", True),    # the official DETR has seen all of COCO
    ("m2ist", "pretrained", "x/detr-r50-unc.pth", "refcoco", False),
    ("m2ist", "pretrained", None, "referit", False),
    ("full", "pretrained", "mine.pth", "refcoco", None),
    ("m2ist", "random", None, "refcoco", False),
    ("clip-frozen", "pretrained", None, "referit", None),    # nobody knows CLIP's images
    ("hivg", "random", None, "refcoco", False)])
def test_leaky_pretraining_follows_from_weights_and_method(method, weights, detr_file, dataset,
                                                           leaky):
    args = argparse.Namespace(method=method, weights=weights, vision_weights=detr_file,
                              dataset=dataset)
    assert evaluate.leaky_pretraining(args) is leaky


def test_results_have_the_promised_form_and_say_which_run_they_are_of(runs, tmp_path, capsys):
    """By default all splits but train are evaluated, and drawn in --figures. A row that was changed
    by flags says so."""
    path = tmp_path / "new" / "a.json"
    flags = ["--limit", "8", "--json", path, "--figures", tmp_path / "drawn"]
    result = evaluated(runs["m2ist"], *flags)
    assert json.loads(path.read_text()) == result
    title = "m2ist/V/b changed (batch_size 16, epochs 1, warmup 0, weights random)"
    splits = result.pop("splits")
    expected = {"checkpoint": str(runs["m2ist"]), "method": title, "epoch": 1, "seed": 3,
                "dataset": "shapes", "limit": 8, "leaky_pretraining": False}
    assert expected.items() <= result.items()
    assert list(splits) == ["val", "testA", "testB"]
    for row in splits.values():
        assert set(row) == {"acc@0.5", "mean_iou", "expressions", "images", "seconds"}
        assert row["expressions"] == 8 > row["images"]
    assert {file.name for file in (tmp_path / "drawn").iterdir()} == {
        "val.png", "testA.png", "testB.png"}
    printed = capsys.readouterr().out
    assert f"{title} tiny" in printed and "leaky pretraining no" in printed
    line = json.loads((runs["m2ist"] / "log.jsonl").read_text().splitlines()[-1])
    assert line["leaky_pretraining"] is False


def test_the_file_of_predictions_has_every_number_that_is_printed(runs, tmp_path):
    """A line for each expression of each split; accuracy and mean IoU follow from them alone."""
    path = tmp_path / "new" / "a.jsonl"
    result = evaluated(runs["m2ist"], "--split", "val", "--split", "testB", "--limit", "40",
                       "--predictions", path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 80
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
        # In the file a box is clamped to its image. It is measured in the square, which is larger.
        inside = torch.tensor([min(line["predicted"]) > 0 for line in found])
        assert inside.any()
        assert torch.allclose(again.diagonal()[inside], ious[inside], atol=1e-4)


def test_predictions_and_results_keep_any_path_and_any_text(runs, tmp_path):
    """A folder may have a name of bytes that are no text. The files stay UTF-8, other letters stay
    as they are, and each reader gets the path back."""
    folder = tmp_path / "caf\udce9"
    folder.mkdir()
    data.load_image(5_000_000).save(folder / "a.png")
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
    assert (found["image"], found["text"]) == (str(folder / "a.png"), line["text"])
    result = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))
    assert result["dataset"] == str(folder / "my.jsonl")


def test_a_sheet_shows_true_and_predicted_boxes(monkeypatch, tmp_path):
    """Tiles of 256 pixels lie below a legend of 26, with borders of 8. A scene has 128 pixels."""
    [sample] = data.load_samples("shapes", "val", limit=1)
    box = (20.0, 30.0, 60.0, 90.0)
    found = evaluate.Located(sample.text, box, torch.full((64,), 1 / 64))
    monkeypatch.setattr(evaluate, "ground_texts", lambda model, image, texts: [found])
    captions = []
    strip = data.text_strip
    monkeypatch.setattr(data, "text_strip", lambda *a: captions.append(a[0]) or strip(*a))
    args = argparse.Namespace(device="cpu", amp="off")
    model = m.build_model("m2ist", "tiny", "random")
    evaluate.draw_predictions(model, [sample, sample], args, tmp_path / "a.png")
    sheet = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    top = 26 + 8 + 128 - data.image_size(sample.image)[1]
    assert tuple(sheet[top + 2 * 60, 8 + 2 * 20]) == data.PREDICTED
    x1, y1, x2, y2 = sample.box
    assert tuple(sheet[top + round(y1 + y2), 8 + round(2 * x1)]) == data.TRUE
    iou = torchvision.ops.box_iou(torch.tensor([box]), torch.tensor([sample.box])).item()
    assert captions[0] == f"IoU {iou:.2f}\n{sample.text}"


# --- The command line -----------------------------------------------------------------------------


def test_what_is_asked_wins_over_the_training(runs, tmp_path, monkeypatch):
    """But the batch size of the training is not taken, and neither is its folder of images where
    another dataset is asked for. A checkpoint of an older version has fewer options."""
    def of_an_older_version(weights, config):
        config["args"].update(root="images", limit=7, amp="bf16")
        for name in ("draft", "title", "compile", "expressions_per_image"):
            del config["args"][name]
        for name in ("residual", "pixels", "checkpointing"):
            del config["model"][name]

    changed_checkpoint(runs, tmp_path / "old.safetensors", of_an_older_version)
    taken = []
    monkeypatch.setattr(evaluate, "evaluate_dataset",
                        lambda model, args, asked: taken.append(args) or {})
    result = evaluated(tmp_path / "old.safetensors", "--limit", "9")
    assert result["method"] == "m2ist/V/b"
    evaluated(tmp_path / "old.safetensors", "--dataset", "referit")
    evaluated(tmp_path / "old.safetensors", "--dataset", "referit", "--root", "other")
    same, other, both = taken
    assert (same.limit, same.dataset, same.root, same.amp) == (9, "shapes", "images", "bf16")
    assert same.batch_size == evaluate.DEFAULT_BATCH_SIZE and same.draft is False
    assert (other.dataset, other.root, other.limit) == ("referit", None, 7)
    assert both.root == "other"


IMAGE = ["--image", "a.png", "--text", "a"]


@pytest.mark.parametrize("flags, words", [
    (["x", "--device", "nosuch"], "--device nosuch"),
    (["x", "--clip-weights", "c"], "--clip-weights.*released .pth"),
    (["x", *IMAGE, "--save", "b.txt"], "--save b.txt"),
    (["x", *IMAGE, "--split", "val"], "--split"),
    (["x", *IMAGE, "--predictions", "p"], "--predictions"),
    (["x", "--image", "a.png"], "go together"),
    (["x", "--text", "a"], "go together"),
    (["x", "--save", "b.png"], "go together"),
    (["x", "--image", "a.png", "--text", "  "], "must not be empty"),
    (["x", "--json", "."], "--json .: is a folder"),
    (["x", "--figures", evaluate.__file__], "--figures .*is a file"),
    (["nosuch"], "nosuch.*no such checkpoint"),
    (["nosuch.pth"], "nosuch.pth: no such file")])
def test_wrong_flags_are_refused(flags, words):
    """The error names the flag or the file, and comes before anything is loaded."""
    with pytest.raises(ValueError, match=words):
        evaluate.main([*flags, *([] if "--device" in flags else ["--device", "cpu"])])


# --- Checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("change, words", [
    (lambda weights, config: config["model"].update(weights="shapes"), "other encoder weights"),
    (lambda weights, config: weights.pop("grounding.reg"), "do not fit: grounding.reg"),
    (lambda weights, config: weights.update(new=torch.ones(1)), "do not fit: new"),
    (lambda weights, config: weights.update({"grounding.reg": torch.ones(3)}),
     "do not fit: .*grounding.reg"),
    (lambda weights, config: config.pop("frozen"), "not a checkpoint of this project")])
def test_a_checkpoint_that_does_not_fit_is_refused(runs, tmp_path, change, words):
    """Boxes of other encoders, or of weights that are partly random, would be meaningless."""
    changed_checkpoint(runs, tmp_path / "a.safetensors", change)
    with pytest.raises(InputError, match=f"a.safetensors.*{words}"):
        evaluate.load_checkpoint(tmp_path / "a.safetensors")


def test_a_file_of_another_kind_is_no_checkpoint(tmp_path):
    (tmp_path / "damaged").write_bytes(b"nothing")
    with pytest.raises(InputError, match="not a checkpoint of this project"):
        evaluate.load_checkpoint(tmp_path / "damaged")


# --- One's own images -----------------------------------------------------------------------------


def look(capsys, out, image, *flags):
    """The JSON lines that evaluate.py prints for an image. `flags` may begin with more images."""
    capsys.readouterr()
    evaluated(out, "--image", image, *flags)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("method", ["m2ist", "hivg"])
def test_ones_own_image_gets_the_box_that_a_dataset_gives(runs, method, tmp_path, capsys):
    """The command line prints what `locate` returns, rounded to a tenth of a pixel. --json holds
    the same, and --save shows a tile for each text."""
    image = data.load_image(10_000_000)
    path = tmp_path / "a.png"
    image.save(path)
    model, config = evaluate.load_checkpoint(runs[method])
    args = argparse.Namespace(**{**config["args"], "device": "cpu"})
    samples = [data.Sample(path, text, (0, 0, 9, 9), 0) for text in TEXTS]
    predicted = evaluate.predict(model, evaluate.make_loader(samples, model, args), args)

    texts = [word for text in TEXTS for word in ("--text", text)]
    flags = [*texts, "--json", tmp_path / "a.json", "--save", tmp_path / "out" / "b.png"]
    lines = look(capsys, runs[method], path, *flags)
    assert json.loads((tmp_path / "a.json").read_text()) == lines
    located = evaluate.locate(model, str(path), TEXTS)
    assert located == evaluate.locate(model, image, TEXTS)
    for text, line, found, box in zip(TEXTS, lines, located, predicted.boxes, strict=True):
        assert found == {"text": text, "box": pytest.approx(data.from_square(box, image.size, 64))}
        assert line == {"text": text, "box": [round(v, 1) for v in found["box"]]}
        x1, y1, x2, y2 = found["box"]
        assert 0 <= x1 <= x2 <= image.width and 0 <= y1 <= y2 <= image.height

    sheet = np.asarray(Image.open(tmp_path / "out" / "b.png").convert("RGB"))
    assert sheet.shape[1] > 2 * 512                                 # two tiles, side by side
    assert (sheet == data.PREDICTED).all(-1).sum() > 500            # with boxes in them


def test_ones_own_image_takes_the_pixels_of_the_model(tmp_path):
    """--pixels says how an image is normalised, here as in the loader of a dataset."""
    data.load_image(10_000_001).save(tmp_path / "a.png")
    boxes = {}
    for pixels in ("clip", "detr"):
        torch.manual_seed(0)
        model = m.build_model("hivg", "tiny", "random", pixels=pixels).eval()
        args = argparse.Namespace(batch_size=2, size="tiny", expressions_per_image=1, draft=False,
                                  workers=0, device="cpu", amp="off")
        samples = [data.Sample(tmp_path / "a.png", "the red circle", (0, 0, 9, 9), 0)]
        predicted = evaluate.predict(model, evaluate.make_loader(samples, model, args), args)
        [found] = evaluate.locate(model, tmp_path / "a.png", ["the red circle"])
        boxes[pixels] = torch.tensor(found["box"])
        square = data.from_square(predicted.boxes[0], data.image_size(tmp_path / "a.png"), 64)
        assert (boxes[pixels] - torch.tensor(square)).abs().max() < 1e-4
    assert (boxes["clip"] - boxes["detr"]).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["m2ist", "hivg"])
def test_many_texts_give_what_each_gives_alone(method):
    """Neither box nor attention depends on the other texts, which are longer and shorter."""
    torch.manual_seed(0)
    model = m.build_model(method, "tiny", "random")
    image = data.load_image(10_000_002)
    together = evaluate.ground_texts(model, image, TEXTS)
    for text, found in zip(TEXTS, together, strict=True):
        [alone] = evaluate.ground_texts(model, image, [text])
        difference = torch.tensor(found.box) - torch.tensor(alone.box)
        assert found.text == alone.text
        assert difference.abs().max() / max(image.size) < 1e-5
        assert (found.attention - alone.attention).abs().max() < 1e-5
    assert len({found.box for found in together}) == len(TEXTS)    # each text has its own box
    assert evaluate.locate(model, image, []) == []


def test_m2ist_encodes_an_image_once_for_all_its_texts(monkeypatch):
    model = m.build_model("m2ist", "tiny", "random")
    images = []
    model.vision.register_forward_pre_hook(lambda module, inputs: images.append(len(inputs[0])))
    evaluate.locate(model, data.load_image(10_000_000), TEXTS)
    assert images == [1]


def test_the_box_is_in_pixels_of_the_image_as_it_is_seen(runs, tmp_path, capsys):
    """An image that EXIF data turn upright has the box of the upright image, from the command line
    and from Python, also if PIL has opened it."""
    image = data.load_image(10_000_003).resize((256, 200))
    exif = Image.Exif()
    exif[0x0112] = 6    # orientation: a quarter turn clockwise is needed
    image.rotate(90, expand=True).save(tmp_path / "stored.png", exif=exif)
    model, _ = evaluate.load_checkpoint(runs["m2ist"])
    seen = evaluate.locate(model, image, TEXTS[:1])
    assert evaluate.locate(model, tmp_path / "stored.png", TEXTS[:1]) == seen
    with Image.open(tmp_path / "stored.png") as stored:
        assert stored.size == (200, 256)
        assert evaluate.locate(model, stored, TEXTS[:1]) == seen
    [line] = look(capsys, runs["m2ist"], tmp_path / "stored.png", "--text", TEXTS[0])
    assert line["box"] == pytest.approx(seen[0]["box"], abs=0.06)


def test_locate_refuses_what_are_no_texts():
    """One string in place of a list would be read letter by letter."""
    model = m.build_model("m2ist", "tiny", "random")
    with pytest.raises(InputError, match="list of texts"):
        evaluate.locate(model, data.load_image(10_000_000), "the red circle")
    with pytest.raises(InputError, match="must not be empty"):
        evaluate.locate(model, data.load_image(10_000_000), ["the red circle", " "])


@pytest.mark.parametrize("size, mode, text", [
    ((1, 1), "RGB", "a"),
    ((3, 2000), "L", "the cup"),
    ((2000, 1), "RGBA", "die rote Tasse"),
    ((50, 40), "CMYK", "赤いカップ"),
    ((50, 40), "P", "\U0001f534 \u200b?"),
    ((50, 40), "1", "x" * 5000),
    ((50, 40), "I;16", "كأس أحمر"),
    ((50, 40), "RGB", "caf\udce9")])
def test_any_image_and_any_language_give_a_box(runs, tmp_path, capsys, size, mode, text):
    """The box lies inside the image, and the text comes back as it was given. A shell may pass
    bytes that are no text; they become question marks."""
    if mode == "I;16":
        image = Image.fromarray(np.full(size[::-1], 30_000, np.uint16))
    else:
        image = Image.new(mode, size)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    [found] = look(capsys, runs["m2ist"], path, "--text", text)
    x1, y1, x2, y2 = found["box"]
    assert found["text"] == text.replace("\udce9", "?")
    assert 0 <= x1 <= x2 <= size[0] and 0 <= y1 <= y2 <= size[1]


def test_several_images_and_folders_are_located(runs, tmp_path, capsys):
    """--image takes files and folders. Each line names its image and has the box that the image
    has alone; --save is a folder then, in which no drawing replaces another."""
    images = tmp_path / "images"
    images.mkdir()
    for number, name in enumerate(["b.png", "a.jpg"]):
        data.load_image(10_000_000 + number).save(images / name)
    (images / "notes.txt").write_text("no image")
    data.load_image(10_000_002).save(tmp_path / "b.png")

    flags = ["--text", "a", "--text", "b", "--save", tmp_path / "drawn"]
    lines = look(capsys, runs["m2ist"], images, tmp_path / "b.png", *flags)
    paths = [images / "a.jpg", images / "b.png", tmp_path / "b.png"]
    assert [line["image"] for line in lines] == [str(path) for path in paths for _ in range(2)]
    alone = look(capsys, runs["m2ist"], paths[1], "--text", "a", "--text", "b")
    assert [line["box"] for line in lines[2:4]] == [line["box"] for line in alone]
    assert "image" not in alone[0]
    drawn = sorted(path.name for path in (tmp_path / "drawn").iterdir())
    assert drawn == ["0001-a.png", "0002-b.png", "0003-b.png"]
    with pytest.raises(InputError, match="0001-a.png, which is there already"):
        look(capsys, runs["m2ist"], images, *flags)


def test_a_broken_image_is_named_before_the_first_is_located(runs, tmp_path, capsys):
    """Minutes of other images are not lost to it."""
    data.load_image(10_000_000).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match="b.png"):
        look(capsys, runs["m2ist"], tmp_path, "--text", "a")
    assert capsys.readouterr().out == ""
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: there is no image"):
        look(capsys, runs["m2ist"], tmp_path / "empty", "--text", "a")


# --- HiVG's released checkpoints: full size, random values in their names and shapes --------------

LORA_RANK = 32
LORA_SCALE = 16 / 32     # α / r, which no file says


def released(texts=1, bridges=(0, 3, 7, 11), nested=2, frozen="", large=False, narrow=False):
    """The state dict of a released checkpoint, with random values of about the trained ones' size.

    texts: text layers that the bridges have weights for; 1 on RefCOCO, 0 on mixed data
    bridges: vision layers with a bridge, counted from 0
    nested: how many PEFT models are around CLIP. frozen: what newer ones call a frozen weight
    """
    T, V, layers, patch, cells, words = 512, 768, 12, 16, 196, 49408    # ViT-B/16
    if large:
        T, V, layers, patch, cells = 768, 1024, 24, 14, 256             # ViT-L/14
    if narrow:
        T, V, words = 64, 96, 500                                       # see the fixture
    shapes = {}

    def linear(name, out, into):
        shapes[f"{name}.weight"] = (out, into)
        shapes[f"{name}.bias"] = (out,)

    def norm(name, dim):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (dim,)

    def attention(name, dim):
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{name}.{part}{frozen}", dim, dim)
            shapes[f"{name}.{part}.lora_A.default.weight"] = (LORA_RANK, dim)
            shapes[f"{name}.{part}.lora_B.default.weight"] = (dim, LORA_RANK)

    clip = "clip." + nested * "base_model.model."
    shapes[clip + "logit_scale"] = ()
    for tower, dim, positions, depth in (("text", T, 77, 12), ("vision", V, cells + 1, layers)):
        base = f"{clip}{tower}_model."
        shapes[base + "embeddings.position_ids"] = (1, positions)
        shapes[base + "embeddings.position_embedding.weight"] = (positions, dim)
        for layer in range(depth):
            name = f"{base}encoder.layers.{layer}."
            attention(f"{name}self_attn", dim)
            norm(f"{name}layer_norm1", dim)
            norm(f"{name}layer_norm2", dim)
            linear(f"{name}mlp.fc1", 4 * dim, dim)
            linear(f"{name}mlp.fc2", dim, 4 * dim)
            if tower == "text" or layer not in bridges:
                continue
            norm(f"{name}cross_norm", V)
            attention(f"{name}cross_attn", V)
            linear(f"{name}cross_mlp.fc1", 4 * V, V)
            linear(f"{name}cross_mlp.fc2", V, 4 * V)
            if texts > 0:
                linear(f"{name}cross_gate", V, T * texts)
            for i in range(texts):
                shapes[f"{name}cross_adaptive_weights.{i}.weight"] = (77, T)
    shapes[clip + "text_model.embeddings.token_embedding.weight"] = (words, T)
    norm(clip + "text_model.final_layer_norm", T)
    shapes[clip + "vision_model.embeddings.class_embedding"] = (V,)
    shapes[clip + "vision_model.embeddings.patch_embedding.weight"] = (V, 3, patch, patch)
    norm(clip + "vision_model.pre_layrnorm", V)
    norm(clip + "vision_model.post_layernorm", V)
    shapes[clip + "visual_projection.weight"] = (T, V)
    shapes[clip + "text_projection.weight"] = (T, T)

    linear("visu_proj", T, T)
    linear("condition_text_proj", V, T)
    linear("ml_text_feat_perceiver", V, T * max(texts, 1))
    linear("text_proj", T, T)
    linear("ml_visual_projection", T, 4 * V)
    linear("visu_token_mlp.fc1", 3072, T)
    linear("visu_token_mlp.fc2", T, 3072)
    norm("visu_token_norm", T)
    linear("bbox_embed.layers.0", T, T)
    linear("bbox_embed.layers.1", T, T)
    linear("bbox_embed.layers.2", 4, T)
    shapes["reg_token.weight"] = shapes["reg_pos_embed.weight"] = (1, T)
    shapes["vl_pos_embed.weight"] = (cells + 79, T)
    shapes["condition_text_pos_embed.weight"] = (77, V)
    for layer in range(6):
        name = f"vl_transformer.encoder.layers.{layer}."
        shapes[f"{name}self_attn.in_proj_weight"] = (3 * T, T)
        shapes[f"{name}self_attn.in_proj_bias"] = (3 * T,)
        linear(f"{name}self_attn.out_proj", T, T)
        linear(f"{name}linear1", 2048, T)
        linear(f"{name}linear2", T, 2048)
        norm(f"{name}norm1", T)
        norm(f"{name}norm2", T)
    norm("vl_transformer.encoder.norm", T)
    for i in (1, 2, 3):
        shapes[f"seg_conv{i}.weight"] = (T, T, 2, 2)

    torch.manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        value = torch.randn(shape)
        if re.search(r"norm\d?\.weight$", name):
            state[name] = 1 + 0.2 * value
        elif len(shape) > 1:
            state[name] = value / math.sqrt(shape[-1])
        else:
            state[name] = value / 10
    return state


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
        """[REG], image and text as tokens x (275, 512), padding (275,) -> box (4,)."""
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

    def box(self, image, tokens, image_padding):
        """image (3, 224, 224), image_padding (224, 224), tokens (77,) with 0 as padding -> (4,).

        Only the grounding encoder masks padding: tokens of the id 0, and patches by their resized
        and rounded mask. The towers and the bridges see all."""
        # Each patch has the mean of the mask around it, weighted by a triangle of twice its width.
        centres = 16 * torch.arange(14)[:, None] + 8
        weights = (1 - (torch.arange(224) + 0.5 - centres).abs() / 16).clamp(min=0)
        weights = weights / weights.sum(1, keepdim=True)
        padded = (weights @ image_padding.float() @ weights.T).round().bool().flatten()
        never = torch.zeros(2, dtype=torch.bool)    # [REG], [CLS]
        padding = torch.cat([never, padded, tokens == 0])

        states, projected = self.text(tokens)
        outputs = self.vision(image, states, projected)
        levels = torch.cat([outputs[layer - 1] for layer in (1, 4, 8, 12)], -1)
        seen = self.linear(self.linear(levels, "ml_visual_projection"), "visu_proj")
        said = self.linear(projected, "text_proj")
        return self.ground(torch.cat([self.w["reg_token.weight"], seen, said]), padding)


@pytest.fixture
def narrow(monkeypatch):
    """Make size base as narrow as `released(narrow=True)`, with all of its layers, to save time.
    The tests on the meta device have the real widths."""
    size = m.SIZES["clip", "base"]
    changed = {"vision": dict(dim=96, hidden=384, embedding=64),
               "text": dict(dim=64, hidden=256, embedding=64, vocabulary=500),
               "grounding": dict(dim=64)}
    parts = {name: {**size[name], **part} for name, part in changed.items()}
    monkeypatch.setitem(m.SIZES, ("clip", "base"), {**size, **parts})
    monkeypatch.setattr(evaluate, "RELEASED_SIZES", {96: "base"})


@torch.no_grad()
@pytest.mark.parametrize("how, mixed, text_layers", [
    (dict(texts=1), False, [12]),                                      # RefCOCO
    (dict(texts=2, nested=4, frozen=".base_layer"), False, [6, 12]),    # another version of PEFT
    (dict(texts=0, nested=1), False, [13]),    # mixed data: the bridges share one projection
    (dict(texts=1), True, [13])])              # ... and what they hold is never called
def test_a_released_checkpoint_gives_the_boxes_of_its_own_forward(narrow, tmp_path, capsys, how,
                                                                  mixed, text_layers):
    """A short text and a wide image, alone and in a batch with a longer text. Its rules of padding
    [D47] are kept. CLIP's tokenizer pads with another id than 0; the mask says what it is."""
    state = released(**how, narrow=True)
    flags = argparse.Namespace(dataset="unc", lr=1e-4, mixup_pretrain=mixed)
    torch.save({"model": state, "args": flags, "epoch": 7}, tmp_path / "best.pth")
    model, config = evaluate.load_released(str(tmp_path / "best.pth"))
    unused = capsys.readouterr().err
    assert "seg_conv1.weight" in unused and "ml_text_feat_perceiver.bias" in unused
    assert ("condition_text_proj" in unused) == (text_layers != [13])
    assert model.text_layers == text_layers and not model.training
    assert model.spec["bridge_layers"] == [1, 4, 8, 12] and model.spec["pixels"] == "detr"
    assert evaluate.leaky_pretraining(argparse.Namespace(**config["args"])) is None

    torch.manual_seed(1)
    images = torch.randn(2, 3, 224, 224)
    image_padding = torch.zeros(2, 224, 224, dtype=torch.bool)
    image_padding[0, :70] = True     # four rows of patches, and 6 of 16 pixels of the fifth
    image_padding[0, 149:] = True    # 11 of 16 pixels of the tenth row, and the rows below
    tokens = torch.randint(1, 500, (2, 20))
    token_padding = torch.zeros(2, 20, dtype=torch.bool)
    token_padding[0, 7:] = True
    tokens[0, 7:] = 499
    ours = model(images, image_padding, tokens, token_padding).boxes
    literal = LiteralForward(state, [] if text_layers == [13] else text_layers)
    for sample, length in enumerate((7, 20)):
        padded = F.pad(tokens[sample, :length], (0, 77 - length))
        theirs = literal.box(images[sample], padded, image_padding[sample])
        assert (ours[sample] - theirs).abs().max() < 1e-4
    first = (images[:1], image_padding[:1], tokens[:1, :7], token_padding[:1, :7])
    assert (ours[0] - model(*first).boxes[0]).abs().max() < 1e-5
    first[2].copy_(first[2].flip(1))
    assert (ours[0] - model(*first).boxes[0]).abs().max() > 1e-3    # the text matters


@pytest.fixture
def load_changed(monkeypatch):
    """A function that loads a released checkpoint with changes {key: tensor, or None to drop it}.
    All is on the meta device, where no value is computed."""
    with torch.device("meta"):
        state = released()
        model = m.build_model("hivg", "base", "random", bridge_layers=[1, 4, 8, 12],
                              text_layers=[12])
    assert len(state) == 795
    monkeypatch.setattr(evaluate, "build_model", lambda *names, **options: model)

    def load(changes):
        changed = {**state, **changes}
        changed = {key: value for key, value in changed.items() if value is not None}
        monkeypatch.setattr(evaluate, "read_file", lambda path: {"model": changed})
        return evaluate.load_released("best.pth")
    return load


LAYER = "clip.base_model.model.base_model.model.vision_model.encoder.layers.3."
OTHER_SHAPE = torch.empty(1, 512, device="meta")
NO_WEIGHTS = {f"{LAYER.replace('3.', f'{layer}.')}cross_adaptive_weights.0.weight": None
              for layer in (0, 3, 7, 11)}


@pytest.mark.parametrize("changes, words", [
    ({"text_proj.bias": None}, "grounding.text_projection.bias"),
    ({"new.weight": OTHER_SHAPE}, "new.weight"),
    ({"vl_pos_embed.weight": OTHER_SHAPE}, "grounding.position"),
    ({f"{LAYER}cross_adaptive_weights.0.weight": None}, "cross_adaptive_weights.0.weight"),
    ({f"{LAYER}self_attn.q_proj.lora_B.default.weight": None}, "self_attn.q_proj.lora_B"),
    ({f"{LAYER}self_attn.q_proj.lora_A.default.weight": None}, "layers.3.q.lora_B"),
    ({"visu_proj.bias": None}, "visu_proj.bias"),
    # On mixed data the bridges have no weights, and their shared projection is needed.
    ({**NO_WEIGHTS, "condition_text_proj.bias": None}, "condition_text_proj.bias")])
def test_every_key_of_a_released_checkpoint_is_accounted_for(load_changed, capsys, changes, words):
    """A key that is missing, unknown or of another shape is named."""
    load_changed({})
    with pytest.raises(m.ModelError, match=f"best.pth.*{re.escape(words)}"):
        load_changed(changes)


@pytest.mark.parametrize("texts, layers", [(1, [12]), (12, list(range(1, 13)))])
def test_released_checkpoints_of_the_large_size_fit_too(monkeypatch, capsys, texts, layers):
    """ViT-L/14 on the meta device: other widths, twice the layers, other bridges."""
    with torch.device("meta"):
        state = released(texts, bridges=(4, 10, 16, 22), large=True)
        monkeypatch.setattr(evaluate, "read_file", lambda path: {"model": state})
        model, config = evaluate.load_released("best.pth")    # checks every key and shape
    with_bridge = [number for number, layer in enumerate(model.clip.vision.layers, start=1)
                   if "attention" in layer.plugs]
    assert with_bridge == [5, 11, 17, 23]
    assert model.text_layers == layers
    assert model.levels == [6, 12, 18, 24]
    assert config["args"]["size"] == "large"


def test_a_released_checkpoint_takes_the_tokenizer_of_its_clip(load_changed, monkeypatch, capsys):
    """Its encoders are no longer random, so its texts need CLIP's tokenizer, not that of shapes."""
    model, _ = load_changed({})
    asked = []
    monkeypatch.setattr(evaluate, "cached_tokenizer", lambda *names: asked.append(names))
    evaluate.make_tokenizer(model.spec)
    assert asked == [(77, "openai/clip-vit-base-patch16", 49408, "--clip-weights")]


@pytest.mark.parametrize("content", [[1, 2], {1: torch.zeros(1)}])
def test_a_pth_that_holds_no_names_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "best.pth")
    with pytest.raises(m.ModelError, match="best.pth: not a file of weights"):
        evaluate.load_released(str(tmp_path / "best.pth"))


def test_no_flag_overwrites_what_another_one_names(tmp_path):
    """Neither a photo nor another result."""
    photo = tmp_path / "a.png"
    Image.new("RGB", (20, 20)).save(photo)
    for flags in (["--image", str(photo), "--text", "x", "--save", str(photo)],
                  ["--image", str(photo), "--text", "x", "--json", str(photo)],
                  ["--json", str(tmp_path / "r"), "--predictions", str(tmp_path / "r")]):
        with pytest.raises(data.InputError, match="would overwrite"):
            evaluate.parse_args(["run", "--device", "cpu", *flags])
