"""The models against PyTorch's own attention, and against the numbers that the papers and their
released code have."""
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from PIL import Image

import adapters
import data
import losses
import model as m


def largest_difference(a, b):
    return (a - b).abs().max().item()


# --- The grounding encoder against PyTorch's layers -----------------------------------------------
# TransVG, M²IST and HiVG build their V-L encoder from nn.MultiheadAttention.


def copy_layer(theirs, ours):
    """Copy the weights of an nn.TransformerEncoderLayer into a TransformerLayer."""
    packed_weight = theirs.self_attn.in_proj_weight.detach().chunk(3)    # the rows of q, k, v
    packed_bias = theirs.self_attn.in_proj_bias.detach().chunk(3)
    for name, weight, bias in zip("qkv", packed_weight, packed_bias):
        ours.get_submodule(name).load_state_dict({"weight": weight, "bias": bias})
    ours.out.load_state_dict(theirs.self_attn.out_proj.state_dict())
    ours.fc1.load_state_dict(theirs.linear1.state_dict())
    ours.fc2.load_state_dict(theirs.linear2.state_dict())
    ours.norm1.load_state_dict(theirs.norm1.state_dict())
    ours.norm2.load_state_dict(theirs.norm2.state_dict())


def torch_layer(dim, heads, hidden, pre_norm, dropout=0.0):
    """An nn.TransformerEncoderLayer with random biases and norms. It stays in training mode, in
    which PyTorch takes no short cut that skips padded tokens."""
    layer = nn.TransformerEncoderLayer(dim, heads, hidden, dropout, "relu", batch_first=True,
                                       norm_first=pre_norm)
    for name, p in layer.named_parameters():
        if p.dim() == 1:
            mean = 1.0 if name in ("norm1.weight", "norm2.weight") else 0.0
            nn.init.normal_(p, mean, std=0.3)
    return layer


def some_padding(batch, tokens):
    """(B, N): sample i has 2 i padded tokens, at the end of its first half. The first is real."""
    padding = torch.zeros(batch, tokens, dtype=torch.bool)
    for i in range(batch):
        padding[i, tokens // 2 - 2 * i:tokens // 2] = True
    return padding


@pytest.mark.parametrize("pre_norm", [False, True])
def test_a_layer_equals_nn_transformer_encoder_layer(pre_norm):
    """With the same weights and a padding mask, outputs and all gradients are the same."""
    torch.manual_seed(0)
    theirs = torch_layer(32, 8, 48, pre_norm)
    ours = m.TransformerLayer(32, heads=8, hidden=48, pre_norm=pre_norm)
    copy_layer(theirs, ours)
    padding = some_padding(3, 10)
    x = torch.randn(3, 10, 32, requires_grad=True)
    weights = torch.randn(3, 10, 32)

    out, _, _ = ours(x, padding)
    expected = theirs(x, src_key_padding_mask=padding)
    assert largest_difference(out, expected) < 1e-5

    [gradient] = torch.autograd.grad((out * weights).sum(), x, retain_graph=True)
    [expected_gradient] = torch.autograd.grad((expected * weights).sum(), x, retain_graph=True)
    assert largest_difference(gradient, expected_gradient) < 1e-5
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    packed = torch.cat([ours.q.weight.grad, ours.k.weight.grad, ours.v.weight.grad])
    assert largest_difference(packed, theirs.self_attn.in_proj_weight.grad) < 1e-4
    for mine, other in ((ours.out, theirs.self_attn.out_proj), (ours.fc1, theirs.linear1),
                        (ours.fc2, theirs.linear2), (ours.norm1, theirs.norm1),
                        (ours.norm2, theirs.norm2)):
        assert largest_difference(mine.weight.grad, other.weight.grad) < 1e-4
        assert largest_difference(mine.bias.grad, other.bias.grad) < 1e-4


def test_attention_with_positions_equals_nn_multihead_attention():
    """Positions are added to queries and keys; values are without them; padding is no key."""
    torch.manual_seed(0)
    theirs = torch_layer(32, 8, 48, pre_norm=False)
    ours = m.TransformerLayer(32, heads=8, hidden=48)
    copy_layer(theirs, ours)
    padding = some_padding(3, 10)
    x = torch.randn(3, 10, 32)
    position = torch.randn(10, 32)
    expected, weights = theirs.self_attn(x + position, x + position, x, key_padding_mask=padding)
    _, a, _ = ours(x, padding, position)
    assert largest_difference(a, expected) < 1e-5
    # The picture of [REG]'s attention shows the same weights.
    assert largest_difference(ours.attention_map(x, padding, position), weights[:, 0]) < 1e-6


class Reference(nn.Module):
    """The grounding encoder of both papers from PyTorch's layers: eight heads, six layers, a
    feed-forward width of 2048, positions added to queries and keys in each layer."""

    def __init__(self, dim, pre_norm):
        super().__init__()
        self.pre_norm = pre_norm
        layers = [torch_layer(dim, 8, 2048, pre_norm) for _ in range(6)]
        self.layers = nn.ModuleList(layers)

    def forward(self, x, padding, position):
        for layer in self.layers:
            h = layer.norm1(x) if self.pre_norm else x
            placed = h + position
            a, _ = layer.self_attn(placed, placed, h, key_padding_mask=padding)
            x = x + a
            if not self.pre_norm:
                x = layer.norm1(x)
            h = layer.norm2(x) if self.pre_norm else x
            x = x + layer.linear2(layer.linear1(h).relu())
            if not self.pre_norm:
                x = layer.norm2(x)
        return x


@pytest.mark.parametrize("method, size, dim, pre_norm", [
    ("m2ist", "base", 256, False),
    ("hivg", "base", 512, True),
    ("hivg", "large", 768, True),
])
def test_the_grounding_encoder_of_the_papers_equals_six_layers_of_pytorch(method, size, dim,
                                                                          pre_norm):
    """Boxes and gradients are those of eight heads: another number of heads gives other boxes."""
    torch.manual_seed(0)
    spec = m.architecture(method, size)
    clip = method == "hivg"
    ours = m.GroundingEncoder(24, 16, vision_tokens=9 + clip, max_tokens=6, clip=clip,
                              **spec["grounding"]).eval()
    reference = Reference(dim, pre_norm)
    assert len(ours.layers) == 6
    for theirs, layer in zip(reference.layers, ours.layers):
        copy_layer(theirs, layer)

    vision_x = torch.randn(3, 9 + clip, 24)
    vision_padding = F.pad(some_padding(3, 9), (int(clip), 0))    # [CLS] is never padding
    text_x = torch.randn(3, 6, 16, requires_grad=True)
    text_padding = torch.tensor([[False] * (6 - i) + [True] * i for i in range(3)])
    found = ours(m.Encoded(vision_x, vision_padding), m.Encoded(text_x, text_padding))

    # M²IST III-A c: [REG], text, picture. HiVG Eq. (2): [REG], [CLS], picture, text.
    reg = ours.reg.expand(3, 1, dim)
    parts = [ours.text_projection(text_x), ours.vision_projection(vision_x)]
    masks = [text_padding, vision_padding]
    if clip:
        parts.reverse()
        masks.reverse()
    x = torch.cat([reg, *parts], dim=1)
    padding = torch.cat([torch.zeros(3, 1, dtype=torch.bool), *masks], dim=1)
    x = reference(x, padding, ours.position)
    if pre_norm:
        x = F.layer_norm(x, (dim,), ours.norm.weight, ours.norm.bias)
    h = ours.head[0](x[:, 0]).relu()
    h = ours.head[2](h).relu()
    boxes = torch.sigmoid(ours.head[4](h))
    assert largest_difference(found.boxes, boxes) < 1e-5

    [gradient] = torch.autograd.grad(found.boxes.sum(), text_x)
    [expected] = torch.autograd.grad(boxes.sum(), text_x)
    assert expected.abs().max() > 1e-5    # there is something to compare
    assert largest_difference(gradient, expected) < 1e-3 * expected.abs().max()


# --- Dropout --------------------------------------------------------------------------------------


class DropoutRecord:
    """Notes each place that dropout is applied at while a function runs, as (kind, rate): kind is
    "attention" for attention probabilities, and "tokens" for everything else. A rate of 0 is no
    dropout and is not noted."""

    def __init__(self, monkeypatch):
        self.places = []
        real_dropout = F.dropout
        real_attention = F.scaled_dot_product_attention

        def dropout(x, p=0.5, training=True, inplace=False):
            if training and p > 0:
                self.places.append(("tokens", p))
            return real_dropout(x, p, training, inplace)

        def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
            if dropout_p > 0:
                self.places.append(("attention", dropout_p))
            return real_attention(q, k, v, attn_mask, dropout_p, is_causal, **options)

        monkeypatch.setattr(F, "dropout", dropout)
        monkeypatch.setattr(F, "scaled_dot_product_attention", attention)

    def notice(self, monkeypatch, function, kind, real_dropout):
        """Note each call of one of our autograd functions, whose last argument is the rate. The
        F.dropout that the function itself may use is no further place."""
        real_apply = function.apply

        def apply(*args):
            self.places.append((kind, args[-1]))
            with monkeypatch.context() as within:
                within.setattr(F, "dropout", real_dropout)
                return real_apply(*args)

        monkeypatch.setattr(function, "apply", apply)

    def of(self, function, *args):
        """(the places that a call applies dropout at, its result)"""
        self.places = []
        result = function(*args)
        return self.places, result


# A layer of nn.TransformerEncoderLayer's: the probabilities, the output of the attention, the
# hidden units of the feed-forward network, its output.
LAYER = [("attention", 0.1), ("tokens", 0.1), ("tokens", 0.1), ("tokens", 0.1)]
# BERT has no dropout on the hidden units.
BERT_LAYER = [("attention", 0.1), ("tokens", 0.1), ("tokens", 0.1)]


@pytest.mark.parametrize("pre_norm", [False, True])
def test_a_layer_has_the_dropout_of_nn_transformer_encoder_layer(monkeypatch, pre_norm):
    """Four places, in the same order and at the same rate; none of them in eval mode."""
    record = DropoutRecord(monkeypatch)
    x = torch.randn(2, 5, 8)
    theirs = torch_layer(8, 2, 16, pre_norm, dropout=0.1)
    expected, _ = record.of(theirs, x)
    assert expected == LAYER
    ours = m.TransformerLayer(8, 2, 16, pre_norm=pre_norm, dropout=0.1, ffn_dropout=0.1)
    found, _ = record.of(ours, x)
    assert found == LAYER
    found, _ = record.of(ours.eval(), x)
    assert found == []


def meta_inputs(size, text):
    """A batch of two without values, for a model of full size."""
    with torch.device("meta"):
        images = torch.zeros(2, 3, size, size)
        image_padding = torch.zeros(2, size, size, dtype=torch.bool)
        tokens = torch.zeros(2, text, dtype=torch.long)
        token_padding = torch.zeros(2, text, dtype=torch.bool)
    return images, image_padding, tokens, token_padding


@pytest.mark.parametrize("method, size, text, vision", [
    ("m2ist", "base", [], []),              # frozen encoders are in eval mode [D7]
    ("lora", "base", [], []),
    ("adapter", "base", [], []),
    ("full", "base", [("tokens", 0.1)] + 12 * BERT_LAYER, 6 * LAYER),
    ("hivg", "base", [], []),               # CLIP has no dropout
    ("hivg", "large", [], []),
])
def test_where_a_model_in_training_has_dropout(monkeypatch, method, size, text, vision):
    """0.1 in the grounding encoder and, with full fine-tuning, in DETR and BERT as pretrained."""
    with torch.device("meta"):
        model = m.build_model(method, size, "random")
    model.train()
    images, image_padding, tokens, token_padding = meta_inputs(model.spec["image_size"], 9)
    record = DropoutRecord(monkeypatch)
    in_text, encoded_text = record.of(model.encode_text, tokens, token_padding)
    in_vision, encoded = record.of(model.encode_image, images, image_padding, encoded_text)
    in_grounding, _ = record.of(model.ground, encoded, encoded_text)
    assert in_text == text
    assert in_vision == vision
    assert in_grounding == 6 * LAYER

    model.eval()
    in_evaluation, _ = record.of(model, images, image_padding, tokens, token_padding)
    assert in_evaluation == []


def test_dropout_of_attention_is_on_the_probabilities():
    """A probability is either 0 or divided by 1 - p; none of them is left as it was."""
    torch.manual_seed(0)
    q = torch.randn(1, 6, 6)
    k = torch.randn(1, 6, 6)
    v = torch.eye(6)[None]    # token i attends to j with the i-th row's j-th value
    padding = torch.tensor([[False, False, False, False, True, False]])
    scores = q @ k.transpose(1, 2) / math.sqrt(6)
    scores[:, :, 4] = float("-inf")
    probabilities = scores.softmax(-1)
    assert torch.allclose(adapters.attend(q, k, v, 1, padding), probabilities, atol=1e-6)

    dropped = adapters.attend(q, k, v, 1, padding, dropout=0.25)
    kept = dropped > 0
    assert 0 < kept.sum() < 30
    assert torch.allclose(dropped[kept], probabilities[kept] / 0.75, atol=1e-6)


def test_attention_drops_probabilities_in_training_alone(monkeypatch):
    """With all other dropout taken away, two passes differ, first of all in the attention."""
    torch.manual_seed(0)
    layer = m.TransformerLayer(8, heads=2, hidden=16, dropout=0.5, ffn_dropout=0.5)

    def no_dropout(x, *options):
        return x

    monkeypatch.setattr(F, "dropout", no_dropout)
    x = torch.randn(1, 5, 8)
    _, first, _ = layer(x)
    _, second, _ = layer(x)
    assert not torch.allclose(first, second)
    layer.eval()
    _, first, _ = layer(x)
    _, second, _ = layer(x)
    assert torch.equal(first, second)


# --- The sizes ------------------------------------------------------------------------------------
# What the papers and their released code have. A name with a dot is an entry of an entry.

M2IST_BASE = {
    # TransVG and M²IST, datasets/__init__.py: a square of 640; layer4 of ResNet-50 is 1/32.
    "image_size": 640, "stride": 32, "backbone": "resnet50",
    "max_tokens": 20,                                # README: 20, and 40 for RefCOCOg
    # M²IST III-A a and DETR: C_v = 256, six layers, eight heads, 2048, dropout of 0.1.
    "vision.channels": 2048, "vision.dim": 256, "vision.heads": 8, "vision.hidden": 2048,
    "vision.layers": 6, "vision.dropout": 0.1,
    # M²IST III-A b: bert-base-uncased with C_l = 768 and twelve layers.
    "text.vocabulary": 30522, "text.positions": 512, "text.dim": 768, "text.heads": 12,
    "text.hidden": 3072, "text.layers": 12, "text.dropout": 0.1,
    "text_weights": "bert-base-uncased",
    # M²IST III-A c and vl_transformer.py: C_p = 256, six post-norm layers, eight heads, 2048.
    "grounding.dim": 256, "grounding.heads": 8, "grounding.hidden": 2048, "grounding.layers": 6,
    "grounding.dropout": 0.1,
    # M²IST IV-B b: C_d = 128, C_i = 256; Table VIII c; the rank as D39 says.
    "text_layers": [7, 8, 9, 10, 11, 12], "bottleneck": 128, "interaction_dim": 256,
    "interaction_bottleneck": 128, "rank": 55, "alpha": 55.0,
}

HIVG_BASE = {
    # HiVG 4.1: CLIP ViT-B/16 at 224; Appendix B: texts of 77.
    "image_size": 224, "stride": 16, "max_tokens": 77,
    "vision.dim": 768, "vision.heads": 12, "vision.hidden": 3072, "vision.layers": 12,
    "vision.embedding": 512,
    "text.vocabulary": 49408, "text.positions": 77, "text.dim": 512, "text.heads": 8,
    "text.hidden": 2048, "text.layers": 12, "text.embedding": 512,
    # vl_transformer.py: six pre-norm layers, eight heads, 2048, dropout of 0.1.
    "grounding.dim": 512, "grounding.heads": 8, "grounding.hidden": 2048, "grounding.layers": 6,
    "grounding.dropout": 0.1, "grounding.pre_norm": True,
    # HiVG.py: the MLP of Eq. (12) has a width of 3072 inside. HiVG 4.1: levels and bridges.
    "region_hidden": 3072, "vision_layers": [1, 4, 8, 12], "bridge_layers": [4, 8, 12],
    # HiVG 4.1 and Table 8: three stages, r = 32, α = 16.
    "stages": 3, "rank": 32, "alpha": 16.0,
    "clip_weights": "openai/clip-vit-base-patch16",
}

HIVG_LARGE = {
    # CLIP ViT-L/14 at 224.
    "image_size": 224, "stride": 14, "max_tokens": 77,
    "vision.dim": 1024, "vision.heads": 16, "vision.hidden": 4096, "vision.layers": 24,
    "vision.embedding": 768,
    "text.vocabulary": 49408, "text.positions": 77, "text.dim": 768, "text.heads": 12,
    "text.hidden": 3072, "text.layers": 12, "text.embedding": 768,
    "grounding.dim": 768, "grounding.heads": 8, "grounding.hidden": 2048, "grounding.layers": 6,
    "grounding.dropout": 0.1, "grounding.pre_norm": True,
    "region_hidden": 3072, "vision_layers": [6, 12, 18, 24], "bridge_layers": [6, 12, 18, 24],
    # Table 8: four stages for the large size.
    "stages": 4, "rank": 32, "alpha": 16.0,
    "clip_weights": "openai/clip-vit-large-patch14",
}


def flat(size):
    """A size of SIZES with a dotted name for each entry of an entry."""
    entries = {}
    for name, value in size.items():
        if isinstance(value, dict):
            for inner, inner_value in value.items():
                entries[f"{name}.{inner}"] = inner_value
        else:
            entries[name] = value
    return entries


@pytest.mark.parametrize("size, encoders, released", [
    ("base", "detr", M2IST_BASE), ("base", "clip", HIVG_BASE), ("large", "clip", HIVG_LARGE)])
def test_the_sizes_are_those_of_the_papers_and_their_released_code(size, encoders, released):
    """Every entry of SIZES has its literal value above, and no entry is without one."""
    assert flat(m.SIZES[size][encoders]) == released


@pytest.mark.parametrize("method, size, tokens, vision, text, widths", [
    # [REG], 20 tokens of text, 20 x 20 cells; 40 tokens for RefCOCOg are in a test below.
    ("m2ist", "base", 421, (6, 8, 256, 2048), (12, 12, 768, 3072), (256, 768)),
    # [REG], [CLS], 14 x 14 patches, 77 tokens of text. Four levels of 768 channels.
    ("hivg", "base", 275, (12, 12, 768, 3072), (12, 8, 512, 2048), (3072, 512)),
    # [REG], [CLS], 16 x 16 patches, 77 tokens of text. Four levels of 1024 channels.
    ("hivg", "large", 335, (24, 16, 1024, 4096), (12, 12, 768, 3072), (4096, 768)),
])
def test_a_model_is_built_as_its_size_says(method, size, tokens, vision, text, widths):
    """(layers, heads, width, feed-forward width) of each encoder, and the learned positions."""
    with torch.device("meta"):
        model = m.build_model(method, size, "random")
    towers = model.clip if method == "hivg" else model
    grounding = model.grounding
    dim = {"m2ist": 256, "hivg": 512 if size == "base" else 768}[method]
    for layers, expected in ((towers.vision.layers, vision), (towers.text.layers, text),
                             (grounding.layers, (6, 8, dim, 2048))):
        count, heads, width, hidden = expected
        assert len(layers) == count
        for layer in layers:
            assert layer.heads == heads
            assert layer.q.weight.shape == (width, width)
            assert layer.fc1.weight.shape == (hidden, width)
    assert grounding.position.shape == (tokens, dim)
    assert grounding.vision_projection.weight.shape == (dim, widths[0])
    assert grounding.text_projection.weight.shape == (dim, widths[1])
    head = [layer.weight.shape for layer in grounding.head if isinstance(layer, nn.Linear)]
    assert head == [(dim, dim), (dim, dim), (4, dim)]
    assert all(layer.pre_norm == (method == "hivg") for layer in grounding.layers)
    assert all(layer.pre_norm == (method == "hivg") for layer in towers.vision.layers)


def test_the_norms_have_the_eps_that_they_were_pretrained_with():
    """1e-12 in BERT, as in its published configuration; 1e-5, which is PyTorch's, elsewhere."""
    with torch.device("meta"):
        m2ist = m.build_model("m2ist", "base", "random")
        hivg = m.build_model("hivg", "base", "random")
    for part, eps in ((m2ist.text, 1e-12), (m2ist.vision, 1e-5), (m2ist.grounding, 1e-5),
                      (hivg.clip, 1e-5), (hivg.grounding, 1e-5)):
        norms = [module for module in part.modules() if isinstance(module, nn.LayerNorm)]
        assert len(norms) >= 12
        assert {norm.eps for norm in norms} == {eps}


def test_a_text_of_40_tokens_has_441_positions():
    """The released code takes 40 tokens for RefCOCOg: 1 + 40 + 400 positions."""
    with torch.device("meta"):
        model = m.build_model("m2ist", "base", "random", max_tokens=40)
    assert model.grounding.position.shape == (441, 256)


@pytest.mark.parametrize("method, size, deviation", [
    # nn.Embedding starts from N(0, 1), in both released codes.
    ("m2ist", "base", 1.0), ("hivg", "base", 1.0), ("hivg", "large", 1.0),
    # Ours at the tiny size.
    ("m2ist", "tiny", 0.1), ("hivg", "tiny", 0.1)])
def test_the_deviation_of_the_positions_as_they_are_built(method, size, deviation):
    """Positions are drawn from N(0, deviation²), and [REG] is drawn from N(0, 1)."""
    torch.manual_seed(0)
    spec = m.architecture(method, size)
    grounding = m.GroundingEncoder(8, 8, vision_tokens=400, max_tokens=20, **spec["grounding"])
    assert grounding.position.std().item() == pytest.approx(deviation, rel=0.02)
    assert grounding.position.mean().item() == pytest.approx(0, abs=0.02)
    assert grounding.reg.std().item() == pytest.approx(1, rel=0.25)


# --- The pixels -----------------------------------------------------------------------------------

# As CLIP's repository and torchvision's documentation publish them: red, green, blue.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@pytest.mark.parametrize("encoders, mean, std, processor", [
    ("clip", CLIP_MEAN, CLIP_STD, transformers.CLIPImageProcessor),
    ("detr", IMAGENET_MEAN, IMAGENET_STD, transformers.DetrImageProcessor)])
def test_pixels_are_normalised_as_published(encoders, mean, std, processor):
    """The statistics are the published numbers, which are transformers' defaults, too."""
    assert data.PIXELS[encoders].mean == mean
    assert data.PIXELS[encoders].std == std
    theirs = processor()
    assert tuple(theirs.image_mean) == mean
    assert tuple(theirs.image_std) == std


@pytest.mark.parametrize("encoders, mean, std", [
    ("clip", CLIP_MEAN, CLIP_STD), ("detr", IMAGENET_MEAN, IMAGENET_STD)])
def test_a_picture_of_one_colour_is_normalised_channel_by_channel(encoders, mean, std):
    """(value / 255 - mean) / std of its channel; padding is 0."""
    picture = Image.new("RGB", (40, 20), (250, 120, 30))
    image, padding, _ = data.letterbox(picture, 40, pixels=data.PIXELS[encoders])
    for channel, value in enumerate((250, 120, 30)):
        expected = (value / 255 - mean[channel]) / std[channel]
        real = image[channel][~padding]
        assert largest_difference(real, torch.full_like(real, expected)) < 1e-5
        assert not image[channel][padding].any()


# --- Boxes in half precision ----------------------------------------------------------------------


def plain_iou(a, b):
    """The IoU of two boxes (cx, cy, w, h), in Python's double precision."""
    left = max(a[0] - a[2] / 2, b[0] - b[2] / 2)
    right = min(a[0] + a[2] / 2, b[0] + b[2] / 2)
    top = max(a[1] - a[3] / 2, b[1] - b[3] / 2)
    bottom = min(a[1] + a[3] / 2, b[1] + b[3] / 2)
    intersection = max(0, right - left) * max(0, bottom - top)
    return intersection / (a[2] * a[3] + b[2] * b[3] - intersection)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("side", [0.0004, 0.0015, 0.02, 0.3])
def test_the_iou_of_half_precision_boxes_is_that_of_their_values(dtype, side):
    """Boxes down to a quarter of a pixel of 640, whose areas float16 rounds by up to a half."""
    a = torch.tensor([[0.7 * side, 0.8 * side, side, 1.3 * side]]).to(dtype)
    b = torch.tensor([[0.9 * side, 0.9 * side, 1.2 * side, side]]).to(dtype)
    iou, giou = losses.iou_and_giou(a, b)
    assert iou.dtype == giou.dtype == torch.float32
    assert iou.item() == pytest.approx(plain_iou(a[0].tolist(), b[0].tolist()), rel=1e-4)


@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_box_loss_of_half_precision_boxes_is_computed_in_float32(dtype, beta):
    """The loss and both of its terms are bitwise those of the same values in float32, within
    autocast, too."""
    torch.manual_seed(0)
    pred = torch.rand(7, 4).to(dtype)
    target = (pred.float() + 0.01 * torch.randn(7, 4)).clamp(0.001, 1).to(dtype)
    expected = losses.box_loss(pred.float(), target.float(), 2.0, 3.0, beta)
    loss = losses.box_loss(pred, target, 2.0, 3.0, beta)
    assert loss.dtype == torch.float32
    assert loss.item() == expected.item()
    with torch.autocast("cpu", torch.bfloat16):
        assert losses.box_loss(pred, target, 2.0, 3.0, beta).item() == expected.item()


def test_the_loss_of_a_small_box_has_a_gradient_in_half_precision():
    """The gradient of boxes in float16 is that of the same values in float32."""
    pred = torch.tensor([[0.0007, 0.0008, 0.0010, 0.0013]], dtype=torch.float16)
    target = torch.tensor([[0.0009, 0.0009, 0.0012, 0.0010]], dtype=torch.float16)
    gradients = []
    for dtype in (torch.float16, torch.float32):
        box = pred.to(dtype).detach().clone().requires_grad_()
        losses.box_loss(box, target.to(dtype)).backward()
        gradients.append(box.grad.float())
    half, single = gradients
    assert single.abs().max() > 10    # GIoU of a small box is steep
    assert largest_difference(half, single) <= 1e-3 * single.abs().max()
