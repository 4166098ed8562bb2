"""evaluate.py: one's own pictures, accuracy by length, and the checkpoints that HiVG's authors released."""
import argparse
import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import evaluate
import model as m
import train


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A short run of each family on `shapes`: {method: its folder}."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for method in ("m2ist", "hivg"):
        found[method] = folder / method
        train.main(["--method", method, "--size", "tiny", "--weights", "random", "--limit", "64", "--batch-size", "16", "--epochs", "1",
                    "--warmup", "0", "--device", "cpu", "--out", str(found[method]), *(["--stage-epochs", "1"] * (method == "hivg"))])
    return found


@pytest.mark.parametrize("method", ["m2ist", "hivg"])
def test_accuracies_are_the_same_in_batches_of_1_and_of_64(runs, method):
    by_one, by_many = (evaluate.main([str(runs[method]), "--split", "val", "--split", "testB", "--limit", "130", "--batch-size", size,
                                      "--device", "cpu"])["splits"] for size in ("1", "64"))
    for split in ("val", "testB"):
        assert by_one[split]["acc@0.5"] == by_many[split]["acc@0.5"]
        assert by_one[split]["mean_iou"] == pytest.approx(by_many[split]["mean_iou"], abs=1e-5) and by_one[split]["mean_iou"] > 0.05


def test_accuracy_by_length_counts_words():
    samples = [data.Sample(0, " ".join(["word"] * length), (0, 0, 1, 1), 0) for length in (1, 5, 6, 10, 11, 20, 21, 40)]
    said = evaluate.by_length(samples, torch.tensor([0.6, 0.4, 0.5, 0.7, 0.1, 0.2, 0.9, 0.1]))
    assert said == "1-5 words 0.5000 of 2, 6-10 words 1.0000 of 2, 11-20 words 0.0000 of 2, 21- words 0.5000 of 2"
    assert evaluate.by_length(samples[:1], torch.tensor([0.6])) == "1-5 words 1.0000 of 1"


def look(capsys, out, image, *flags):
    evaluate.main([str(out), "--device", "cpu", "--image", str(image), *flags])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("method", ["m2ist", "hivg"])
def test_ones_own_picture_gets_the_box_that_the_model_gives(runs, method, tmp_path, capsys):
    picture = data.render(data.SHAPES_SPLITS["val"][0])
    picture.save(tmp_path / "a.png")
    texts = ["the red circle", "the leftmost shape"]
    found = look(capsys, runs[method], tmp_path / "a.png", "--text", texts[0], "--text", texts[1], "--save", str(tmp_path / "out/b.png"))
    model, config = evaluate.load_checkpoint(runs[method])
    args = argparse.Namespace(**{**config["args"], "device": "cpu", "batch_size": 2})
    boxes = train.predict(model, train.make_loader([data.Sample(tmp_path / "a.png", t, (0, 0, 9, 9), 0) for t in texts], args, False), args)[0]
    for line, text, box in zip(found, texts, boxes, strict=True):
        assert line == {"text": text, "box": pytest.approx(list(data.from_square(box, picture.size, 64)), abs=0.06)}
    sheet = np.asarray(Image.open(tmp_path / "out/b.png").convert("RGB"))
    assert sheet.shape[1] > 2 * 512 and (sheet == data.PREDICTED).all(-1).sum() > 500
    assert [line["text"] for line in look(capsys, runs[method], tmp_path / "a.png", "--text", texts[1])] == texts[1:]


def test_m2ist_encodes_a_picture_once_for_all_its_texts(runs, tmp_path, monkeypatch, capsys):
    data.render(0).save(tmp_path / "a.png")
    calls, encode = [], m.DetrBert.encode_image
    monkeypatch.setattr(m.DetrBert, "encode_image", lambda self, *args: calls.append(1) or encode(self, *args))
    assert len(look(capsys, runs["m2ist"], tmp_path / "a.png", "--text", "a", "--text", "b", "--text", "c")) == 3
    assert len(calls) == 1


def test_the_box_is_in_pixels_of_the_picture_as_it_is_seen(runs, tmp_path, capsys):
    picture, exif = data.render(3).resize((256, 200)), Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "seen.png")
    picture.rotate(90, expand=True).save(tmp_path / "stored.png", exif=exif)                     # EXIF turns it back
    (one,), (other,) = (look(capsys, runs["m2ist"], tmp_path / name, "--text", "the red circle") for name in ("seen.png", "stored.png"))
    assert one == other and one["box"][2] <= 256 and one["box"][3] <= 200


@pytest.mark.parametrize("size, mode, text", [
    ((1, 1), "RGB", "a"), ((3, 2000), "L", "the cup"), ((2000, 1), "RGBA", "die rote Tasse"), ((50, 40), "CMYK", "赤いカップ"),
    ((50, 40), "P", "\U0001f534 \u200b?"), ((50, 40), "1", "x" * 5000), ((50, 40), "I;16", "كأس أحمر"), ((10_000, 10_000), "L", "big")])
def test_any_picture_and_any_language_give_a_box(runs, tmp_path, capsys, size, mode, text):
    picture = Image.fromarray(np.full(size[::-1], 30_000, np.uint16)) if mode == "I;16" else Image.new(mode, size)
    picture.save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    found, = look(capsys, runs["m2ist"], next(tmp_path.glob("a.*")), "--text", text)
    assert found["text"] == text and 0 <= found["box"][0] <= found["box"][2] <= size[0] and 0 <= found["box"][1] <= found["box"][3] <= size[1]


def test_what_is_wrong_with_ones_own_picture_is_said(runs, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff nothing")
    for flags, words in ((["--image", "gone.jpg", "--text", "a"], "gone.jpg"), (["--image", str(tmp_path / "a.jpg"), "--text", "a"], "decoded"),
                         (["--image", "a.jpg"], "go together"), (["--text", "a"], "go together"), (["--save", "b.png"], "go together"),
                         (["--image", "a.jpg", "--text", "  "], "must not be empty")):
        with pytest.raises(m.InputError, match=words):
            evaluate.main([str(runs["m2ist"]), "--device", "cpu", *flags])


@pytest.mark.parametrize("dataset, weights, vision, leaky", [
    ("refcoco", "pretrained", None, True), ("refcoco", "pretrained", "x/detr-r50-e632da11.pth", True),
    ("refcoco", "pretrained", "facebook/detr-resnet-50", True), ("refcoco+", "pretrained", "x/detr-r50-unc.pth", False),
    ("refcocog-umd", "pretrained", "x/detr-r50-unc.pth", True), ("refcocog-umd", "pretrained", "x/detr-r50-gref.pth", False),
    ("refcoco", "pretrained", "x/detr-r50-referit.pth", True), ("referit", "pretrained", None, False), ("flickr30k", "pretrained", None, False),
    ("refcoco", "pretrained", "mine.pth", None), ("my.jsonl", "pretrained", None, None), ("refcoco", "random", None, False),
    ("shapes", "shapes", None, False), ("refcoco,refcocog-umd", "pretrained", "detr-r50-unc.pth", True), ("referit,flickr30k", "pretrained", None, False),
    ("referit,my.jsonl", "pretrained", None, None)])
def test_leaky_pretraining_is_worked_out_from_the_file_and_the_dataset(dataset, weights, vision, leaky):
    args = argparse.Namespace(method="m2ist", dataset=dataset, weights=weights, vision_weights=vision)
    assert data.leaky_pretraining(args) is leaky
    assert data.leaky_pretraining(argparse.Namespace(**{**vars(args), "method": "hivg"})) is (None if weights == "pretrained" else False)


def test_leaky_pretraining_is_beside_every_accuracy(runs, tmp_path, capsys):
    lines = [json.loads(line) for line in (runs["m2ist"] / "log.jsonl").read_text().splitlines()]
    assert all(line["leaky_pretraining"] is False for line in lines)
    result = evaluate.main([str(runs["m2ist"]), "--split", "val", "--limit", "8", "--device", "cpu", "--json", str(tmp_path / "a.json")])
    assert "leaky pretraining False" in capsys.readouterr().out and json.loads((tmp_path / "a.json").read_text()) == result
    assert set(result) == {"dataset", "method", "leaky_pretraining", "splits"}
    assert set(result["splits"]["val"]) == {"acc@0.5", "mean_iou", "expressions", "images", "seconds"}


# ---------------------------------------------------------------------------------------------------------------------
# HiVG's released checkpoints: ViT-B/16, full size, random values in their names and shapes

def released(texts=1, bridges=(0, 3, 7, 11), nested=2, base_layer=False, large=False):
    """The state dict of a released checkpoint; 795 keys of ViT-B/16 where one text layer is seen, as on RefCOCO."""
    torch.manual_seed(0)
    state, (T, V, layers, patch, cells) = {}, (768, 1024, 24, 14, 256) if large else (512, 768, 12, 16, 196)
    def put(name, *shape):          # of the size that a trained one has, so that everything makes a difference
        norm = re.search(r"norm\d?\.weight$", name)
        state[name] = 1 + 0.2 * torch.randn(shape) if norm else torch.randn(shape) / (math.sqrt(shape[-1]) if len(shape) > 1 else 10)
    def linear(name, out, into, bias=True, lora=False):
        put(f"{name}.{'base_layer.' * (lora and base_layer)}weight", out, into)
        if bias:
            put(f"{name}.{'base_layer.' * (lora and base_layer)}bias", out)
        if lora:
            put(f"{name}.lora_A.default.weight", 32, into)
            put(f"{name}.lora_B.default.weight", out, 32)
    def norm(name, dim):
        put(f"{name}.weight", dim)
        put(f"{name}.bias", dim)
    clip = "clip." + nested * "base_model.model."
    put(clip + "logit_scale")
    for tower, width, positions in (("text", T, 77), ("vision", V, cells + 1)):
        base = f"{clip}{tower}_model."
        state[base + "embeddings.position_ids"] = torch.arange(positions)[None]
        put(base + "embeddings.position_embedding.weight", positions, width)
        for layer in range(layers if tower == "vision" else 12):
            block = f"{base}encoder.layers.{layer}."
            for part in "qkv":
                linear(f"{block}self_attn.{part}_proj", width, width, lora=True)
            linear(f"{block}self_attn.out_proj", width, width, lora=True)
            norm(f"{block}layer_norm1", width), norm(f"{block}layer_norm2", width)
            linear(f"{block}mlp.fc1", 4 * width, width), linear(f"{block}mlp.fc2", width, 4 * width)
            if tower == "vision" and layer in bridges:
                norm(f"{block}cross_norm", V)
                for part in ("q", "k", "v", "out"):
                    linear(f"{block}cross_attn.{part}_proj", V, V, lora=True)
                linear(f"{block}cross_mlp.fc1", 4 * V, V), linear(f"{block}cross_mlp.fc2", V, 4 * V)
                if texts:
                    linear(f"{block}cross_gate", V, T * texts)
                for i in range(texts):
                    put(f"{block}cross_adaptive_weights.{i}.weight", 77, T)
    put(clip + "text_model.embeddings.token_embedding.weight", 49408, T)
    norm(clip + "text_model.final_layer_norm", T)
    put(clip + "vision_model.embeddings.class_embedding", V)
    put(clip + "vision_model.embeddings.patch_embedding.weight", V, 3, patch, patch)
    norm(clip + "vision_model.pre_layrnorm", V), norm(clip + "vision_model.post_layernorm", V)
    linear(clip + "visual_projection", T, V, bias=False), linear(clip + "text_projection", T, T, bias=False)
    for name, out, into in (("visu_proj", T, T), ("condition_text_proj", V, T), ("ml_text_feat_perceiver", V, T * max(texts, 1)),
                            ("text_proj", T, T), ("ml_visual_projection", T, 4 * V), ("visu_token_mlp.fc1", 3072, T),
                            ("visu_token_mlp.fc2", T, 3072), ("bbox_embed.layers.0", T, T), ("bbox_embed.layers.1", T, T),
                            ("bbox_embed.layers.2", 4, T)):
        linear(name, out, into)
    for name, *shape in (("reg_token", 1, T), ("vl_pos_embed", cells + 79, T), ("reg_pos_embed", 1, T), ("condition_text_pos_embed", 77, V)):
        put(f"{name}.weight", *shape)
    for layer in range(6):
        block = f"vl_transformer.encoder.layers.{layer}."
        put(block + "self_attn.in_proj_weight", 3 * T, T), put(block + "self_attn.in_proj_bias", 3 * T)
        linear(block + "self_attn.out_proj", T, T)
        linear(block + "linear1", 2048, T), linear(block + "linear2", T, 2048)
        norm(block + "norm1", T), norm(block + "norm2", T)
    norm("vl_transformer.encoder.norm", T), norm("visu_token_norm", T)
    for i in (1, 2, 3):
        put(f"seg_conv{i}.weight", T, T, 2, 2)
    return state


def attend(q, k, v, heads, causal=False):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v))                  # (heads, N, C / heads)
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    if causal:
        scores = scores + torch.full(scores.shape[1:], float("-inf")).triu(1)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def literal_forward(state, image, tokens, texts, nested=2):
    """What the released forward does with one sample and a text of 77 tokens, written out from what is known of it."""
    w = {re.sub(r"base_model\.model\.|base_layer\.", "", key): value for key, value in state.items()}
    def linear(x, name):
        weight = w[name + ".weight"]
        if f"{name}.lora_A.default.weight" in w:
            weight = weight + 16 / 32 * w[f"{name}.lora_B.default.weight"] @ w[f"{name}.lora_A.default.weight"]
        return F.linear(x, weight, w.get(name + ".bias"))
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"])
    gelu = lambda x: x * torch.sigmoid(1.702 * x)
    mlp = lambda x, name: linear(gelu(linear(x, name + ".fc1")), name + ".fc2")
    def attention(x, y, name, heads, causal=False):
        return linear(attend(*(linear(source, f"{name}.{part}_proj") for source, part in ((x, "q"), (y, "k"), (y, "v"))), heads, causal),
                      name + ".out_proj")
    x, said = w["clip.text_model.embeddings.token_embedding.weight"][tokens] + w["clip.text_model.embeddings.position_embedding.weight"], []
    for layer in range(12):
        name = f"clip.text_model.encoder.layers.{layer}."
        h = norm(x, name + "layer_norm1")
        x = x + attention(h, h, name + "self_attn", 8, True)
        x = x + mlp(norm(x, name + "layer_norm2"), name + "mlp")
        said.append(x)
    projected = linear(norm(x, "clip.text_model.final_layer_norm"), "clip.text_projection")
    text = linear(projected, "text_proj")
    patches = F.conv2d(image[None], w["clip.vision_model.embeddings.patch_embedding.weight"], stride=16)[0].flatten(1).T
    x = torch.cat([w["clip.vision_model.embeddings.class_embedding"][None], patches]) + w["clip.vision_model.embeddings.position_embedding.weight"]
    x, seen = norm(x, "clip.vision_model.pre_layrnorm"), []
    for layer in range(12):
        name = f"clip.vision_model.encoder.layers.{layer}."
        h = norm(x, name + "layer_norm1")
        x = x + attention(h, h, name + "self_attn", 12)
        if name + "cross_norm.weight" in w:
            chosen = [said[i - 1] * w[f"{name}cross_adaptive_weights.{n}.weight"] + said[i - 1] for n, i in enumerate(texts)]
            y = linear(torch.cat(chosen, -1), name + "cross_gate") if texts else linear(projected, "condition_text_proj")
            x = x + mlp(attention(norm(x, name + "cross_norm"), y, name + "cross_attn", 12), name + "cross_mlp")
        x = x + mlp(norm(x, name + "layer_norm2"), name + "mlp")
        seen.append(x)
    image = linear(linear(torch.cat([seen[i - 1] for i in (1, 4, 8, 12)], -1), "ml_visual_projection"), "visu_proj")
    x = torch.cat([w["reg_token.weight"], image, text])
    for layer in range(6):
        name = f"vl_transformer.encoder.layers.{layer}."
        h = norm(x, name + "norm1")
        weights, biases = w[name + "self_attn.in_proj_weight"].chunk(3), w[name + "self_attn.in_proj_bias"].chunk(3)
        q, k, v = (F.linear(source, *both) for source, both in zip((h + w["vl_pos_embed.weight"],) * 2 + (h,), zip(weights, biases)))
        x = x + linear(attend(q, k, v, 8), name + "self_attn.out_proj")
        x = x + linear(F.relu(linear(norm(x, name + "norm2"), name + "linear1")), name + "linear2")
    x = norm(x, "vl_transformer.encoder.norm")[0]
    for i in range(2):
        x = F.relu(linear(x, f"bbox_embed.layers.{i}"))
    return linear(x, "bbox_embed.layers.2").sigmoid()


@torch.no_grad()
@pytest.mark.parametrize("texts, options", [(1, {}), (2, {"nested": 4, "base_layer": True}), (0, {"nested": 1}), ("mixed", {})])
def test_a_released_checkpoint_gives_the_box_of_its_own_forward(tmp_path, monkeypatch, capsys, texts, options):
    """Trained on mixed data, a bridge has no weights (0), or has them and never calls them, as its flags tell ("mixed")."""
    state, flags = released(1 if texts == "mixed" else texts, **options), argparse.Namespace(dataset="unc", lr=1e-4)
    if texts == "mixed":
        texts, flags = 0, argparse.Namespace(mixup_pretrain=True)
        torch.save({"model": state, "args": flags}, tmp_path / "best.pth")
    if texts == 1:
        assert len(state) == 795
        torch.save({"model": state, "args": flags, "epoch": 7, "val_accu": 0.87}, tmp_path / "best.pth")
    elif not (tmp_path / "best.pth").exists():
        monkeypatch.setattr(evaluate, "read_state", lambda path, whole: {"model": dict(state)})
    model, config = evaluate.load_released(str(tmp_path / "best.pth"), None)
    said = capsys.readouterr().err
    assert "seg_conv1.weight" in said and "ml_text_feat_perceiver.bias" in said and ("condition_text_proj" in said) == (texts > 0)
    image, tokens = torch.randn(3, 224, 224), torch.randint(0, 49000, (77,))
    ours = model(image[None], torch.zeros(1, 224, 224, dtype=torch.bool), tokens[None], torch.zeros(1, 77, dtype=torch.bool)).boxes[0]
    theirs = literal_forward(state, image, tokens, {0: [], 1: [12], 2: [6, 12]}[texts])
    assert model.text_layers == {0: [13], 1: [12], 2: [6, 12]}[texts]
    assert (ours - theirs).abs().max() < 1e-4 and theirs.std() > 1e-3
    other = model(image[None], torch.zeros(1, 224, 224, dtype=torch.bool), tokens.flip(0)[None], torch.zeros(1, 77, dtype=torch.bool)).boxes[0]
    assert (ours - other).abs().max() > 1e-3                                                    # both sides really look at the text
    assert config["args"]["bridge_layers"] == [1, 4, 8, 12] and config["args"]["pixels"] == "detr"


def test_every_key_of_a_released_checkpoint_is_accounted_for(monkeypatch, capsys):
    state = released()
    with torch.device("meta"):
        state = {key: torch.empty_like(value) for key, value in state.items()}
        model = m.build_model("hivg", "base", "random", bridge_layers=[1, 4, 8, 12], text_layers=[12])
    monkeypatch.setattr(evaluate, "build_model", lambda *_, **__: model)
    monkeypatch.setattr(model, "load_state_dict", lambda *_, **__: None)
    def load(**changes):
        changed = {key: value for key, value in {**state, **changes}.items() if value is not None}
        monkeypatch.setattr(evaluate, "read_state", lambda path, whole: {"model": changed})
        return evaluate.load_released("best.pth", None)
    load()
    layer = "clip.base_model.model.base_model.model.vision_model.encoder.layers.3."
    for change, words in (({"text_proj.bias": None}, "missing: grounding.text_projection.bias"), ({"new.weight": state["reg_token.weight"]}, "unexpected: new.weight"),
                          ({"vl_pos_embed.weight": state["reg_token.weight"]}, "another shape: grounding.position"),
                          ({layer + "cross_adaptive_weights.0.weight": None}, "cross_adaptive_weights.0.weight"),
                          ({layer + "self_attn.q_proj.lora_B.default.weight": None}, "self_attn.q_proj.lora_B"),
                          ({layer + "self_attn.q_proj.lora_A.default.weight": None}, "layers.3.q.lora_B"),
                          ({"visu_proj.bias": None}, "visu_proj.bias"),
                          ({"condition_text_proj.bias": None, **{key: None for key in state if "adaptive" in key}}, "condition_text_proj.bias")):
        with pytest.raises(m.InputError, match=words):
            load(**change)


@pytest.mark.parametrize("texts, layers", [(1, [12]), (12, range(1, 13))])
def test_released_checkpoints_of_the_large_size_fit_too(monkeypatch, texts, layers):
    """ViT-L/14, on the meta device: other widths, twice the layers, bridges in the released code's 4, 10, 16, 22 (from 0)."""
    built = []
    with torch.device("meta"):
        state = released(texts, bridges=(4, 10, 16, 22), large=True)
        assert list(state["vl_pos_embed.weight"].shape) == [335, 768]
        monkeypatch.setattr(evaluate, "read_state", lambda path, whole: {"model": state})
        monkeypatch.setattr(evaluate, "build_model", lambda *args, **options: built.append(m.build_model(*args, **options)) or built[-1])
        _, config = evaluate.load_released("best.pth", None)                                # every key and shape is checked there
    model, = built
    assert model.text_layers == layers and model.levels == [6, 12, 18, 24] and config["args"]["size"] == "large"
    assert [i for i, layer in enumerate(model.clip.vision.layers, 1) if "attention" in layer.plugs] == [5, 11, 17, 23]
