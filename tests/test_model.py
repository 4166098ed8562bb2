"""model.py against its formulas written out, against PyTorch's own layers, and against the numbers
of the papers and of their released code."""
import copy
import math
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

import hilora
import losses
import model as m
import train

def tiny(method="m2ist", **options):
    """A tiny model with random weights, the same each time."""
    torch.manual_seed(1)
    return m.build_model(method, "tiny", "random", **options)


def meta(method, size="base", **options):
    """A model of full size that costs no memory."""
    with torch.device("meta"):
        return m.build_model(method, size, "random", **options)


def inputs(batch=3, text=9, seed=0):
    """A batch of normalised images. Image i has 8 i rows of padding at its top, and text i has
    text - 2 i tokens."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, 64, 64, generator=g)
    image_padding = torch.zeros(batch, 64, 64, dtype=torch.bool)
    for i in range(batch):
        image_padding[i, :8 * i] = True
    images.masked_fill_(image_padding[:, None], 0)

    tokens = torch.randint(5, 150, (batch, text), generator=g)
    token_padding = torch.zeros(batch, text, dtype=torch.bool)
    for i in range(batch):
        token_padding[i, text - 2 * i:] = True
    tokens.masked_fill_(token_padding, 0)
    return [images, image_padding, tokens, token_padding]


def in_double(method, **options):
    """A tiny model in float64, and the arguments of a batch of two images with five texts."""
    model = tiny(method, **options).double()
    images, image_padding, _, _ = inputs(2)
    _, _, tokens, token_padding = inputs(5, text=12)
    return model, images.double(), image_padding, tokens, token_padding


IMAGE_INDEX = torch.tensor([0, 0, 1, 1, 1])    # of those five texts


def outputs_and_gradients(model, *batch):
    """Boxes, and scores where there are any, of a batch, and the gradients of all that is tuned."""
    grounding = model(*batch)
    outputs = [grounding.boxes]
    if grounding.scores is not None:
        outputs.append(grounding.scores)
    tuned = [p for p in model.parameters() if p.requires_grad]
    weighted = sum((output * 3).sin().sum() for output in outputs)
    gradients = torch.autograd.grad(weighted, tuned, allow_unused=True)
    return outputs + [g for g in gradients if g is not None]


def assert_close(ours, theirs, atol=1e-10):
    """Two lists of tensors are equal up to an absolute difference."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


def count(*modules):
    """The number of parameters of some modules."""
    return sum(p.numel() for module in modules for p in module.parameters())


def bridges(model):
    """The cross-modal bridges of a model on CLIP, shallow first."""
    layers = model.clip.vision.layers
    return [layer.plugs["attention"] for layer in layers if "attention" in layer.plugs]


def trained_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def changed_names(model, before):
    """The names in both state dicts whose values differ."""
    return {name for name, value in model.state_dict().items()
            if name in before and not torch.equal(value, before[name])}


# --- The layer ------------------------------------------------------------------------------------


def relu(v):
    return max(v, 0.0)


def gelu(v):
    return v * 0.5 * (1 + math.erf(v / math.sqrt(2)))


def quick_gelu(v):
    return v / (1 + math.exp(-1.702 * v))


@pytest.mark.parametrize("pre_norm, activation", [
    (False, relu), (False, gelu), (True, quick_gelu)])    # DETR, BERT, CLIP
def test_a_layer_is_attention_and_a_feed_forward_network(pre_norm, activation):
    """x = norm1(x + a), x = norm2(x + g); with pre_norm a and g are computed from norms of x."""
    torch.manual_seed(0)
    layer = m.TransformerLayer(6, heads=2, hidden=5, activation=activation.__name__,
                               pre_norm=pre_norm).double()
    x = torch.randn(4, 6).double()
    position = torch.randn(4, 6).double()
    padding = torch.tensor([False, False, False, True])
    found_x, found_a, found_g = layer(x[None], padding[None], position[None])

    # Positions are added to queries and keys, and not to values.
    h = layer.norm1(x) if pre_norm else x
    q = layer.q(h + position)
    k = layer.k(h + position)
    v = layer.v(h)
    a = torch.zeros(4, 6).double()
    for i in range(4):
        for head in (slice(0, 3), slice(3, 6)):
            weights = []
            for j in range(3):    # token 4 is padding
                score = (q[i, head] @ k[j, head]).item() / math.sqrt(3)
                weights.append(math.exp(score))
            for j in range(3):
                a[i, head] += weights[j] / sum(weights) * v[j, head]
    a = layer.out(a)
    assert torch.allclose(found_a[0], a, atol=1e-8)

    x = x + a if pre_norm else layer.norm1(x + a)
    h = layer.norm2(x) if pre_norm else x
    hidden = layer.fc1(h).detach().apply_(activation)
    g = layer.fc2(hidden)
    assert torch.allclose(found_g[0], g, atol=1e-6)

    x = x + g if pre_norm else layer.norm2(x + g)
    assert torch.allclose(found_x[0], x, atol=1e-6)


@pytest.mark.parametrize("port", ["attention", "ffn"])
def test_an_inserted_module_rewrites_its_port_before_the_residual(port):
    """What a module at a port returns is added to the residual stream in place of a or g. It is
    called with the output, the stream x that entered the sublayer, and the context."""
    torch.manual_seed(0)
    layer = m.TransformerLayer(8, heads=2, hidden=4, pre_norm=True)
    x = torch.randn(2, 5, 8)
    _, plain_a, plain_g = layer(x)
    layer.plugs[port] = nn.Identity()
    layer.plugs[port].forward = lambda output, x, context: 2 * output + x + context
    changed_x, a, g = layer(x, context=7.0)
    if port == "attention":
        assert torch.allclose(a, 2 * plain_a + x + 7, atol=1e-6)
    else:
        assert torch.equal(a, plain_a)
        assert torch.allclose(g, 2 * plain_g + (x + a) + 7, atol=1e-6)
    assert torch.allclose(changed_x, x + a + g, atol=1e-6)


@pytest.mark.parametrize("method", ["m2ist", "full", "hivg"])
def test_checkpointing_changes_no_bit(method):
    """Each layer, with its bridge, is computed again in the backward pass."""
    found, calls = [], []
    for checkpointing in (False, True):
        model = tiny(method, checkpointing=checkpointing)
        torch.manual_seed(3)
        if method == "hivg":
            model.begin_stage(1)
        model.grounding.layers[0].register_forward_pre_hook(lambda *_: calls.append(checkpointing))
        found.append(outputs_and_gradients(model, *inputs()))
    assert_close(*found, atol=0)
    assert calls == [False, True, True]


# --- The backbone ---------------------------------------------------------------------------------


def resnet():
    """A ResNet-50 whose batch norms have statistics, as a trained one has."""
    torch.manual_seed(0)
    body = m.ResNetBody()
    for module in body.modules():
        if isinstance(module, m.FrozenBatchNorm):
            module.weight.uniform_(0.3, 0.7)
            module.bias.normal_(std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return body


@pytest.mark.parametrize("shallow, norms", [(True, 53 - 1 - 10), (False, 0)])
def test_folding_changes_nothing_but_rounding(shallow, norms):
    """A batch norm is folded where its convolution is frozen: the stem's and the ten of layer1 in
    `full`, and all 53 else. Features, and gradients of what is not frozen, stay the same."""
    body = resnet().double()
    if shallow:
        body.freeze_shallow()
    else:
        body.requires_grad_(False)
    folded = copy.deepcopy(body)
    folded.fold_batch_norms()
    left = [module for module in folded.modules() if isinstance(module, m.FrozenBatchNorm)]
    assert len(left) == norms
    x = torch.randn(2, 3, 32, 32).double()
    outputs = [folded(x), body(x)]
    assert_close(outputs[:1], outputs[1:], atol=1e-12 * outputs[1].abs().max().item())
    if shallow:
        for name in ("layer2.0.conv1.weight", "layer2.0.downsample.0.weight"):
            one, other = (torch.autograd.grad(output.square().mean(), net.get_parameter(name),
                                              retain_graph=True)[0]
                          for output, net in zip(outputs, (folded, body)))
            assert_close([one], [other], atol=1e-10 * other.abs().max().item())
    assert all(not p.requires_grad for p in folded.conv1.parameters())    # the bias is a buffer
    assert "conv1.bias" in dict(folded.named_buffers())


def test_a_resnet_that_is_not_folded_keeps_bf16():
    """Under autocast torchvision's frozen batch norms make float32 of what convolutions give."""
    body = resnet()
    dtypes = set()

    def note(module, arguments, output):
        dtypes.add(output.dtype)

    for module in body.modules():
        module.register_forward_hook(note)
    with torch.autocast("cpu", torch.bfloat16):
        body(torch.randn(1, 3, 32, 32))
    assert dtypes == {torch.bfloat16}


def test_full_freezes_exactly_the_stem_and_layer1():
    """[D10] As TransVG does: 222,400 parameters. Everything else is trained."""
    model = meta("full")
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    expected = {f"vision.backbone.{part}.{name}" for part in ("conv1", "layer1")
                for name, _ in model.vision.backbone.get_submodule(part).named_parameters()}
    assert frozen == expected
    assert len(frozen) == 1 + 10
    assert count(model.vision.backbone.conv1, model.vision.backbone.layer1) == 222_400


# --- The other encoders (test_weights.py compares them with transformers') ------------------------


def test_clip_text_is_causal():
    """What follows a token, words or padding, changes no bit of its features."""
    torch.manual_seed(0)
    text = m.ClipText(60, 16, 24, heads=4, hidden=48, layers=3, embedding=20).eval()
    for p in text.parameters():
        nn.init.normal_(p, std=0.3)
    tokens = torch.randint(2, 59, (1, 9))
    padding = torch.zeros(1, 9, dtype=torch.bool)
    before = text(tokens, padding).states[-1][:, :5]
    tokens[:, 5:] = 3
    padding[:, 5:] = True
    assert torch.equal(text(tokens, padding).states[-1][:, :5], before)


def test_a_patch_is_padding_if_no_pixel_of_it_belongs_to_the_image():
    """[D30] A patch with one row of real pixels is real, and [CLS] never is padding."""
    vision = m.ClipVision(32, 8, 16, heads=2, hidden=16, layers=1, embedding=8)
    padding = torch.zeros(1, 32, 32, dtype=torch.bool)
    padding[:, :15] = True         # the first row of patches, and 7 of 8 rows of pixels below it
    padding[:, :, 24:] = True      # the last column of patches
    found = vision(torch.randn(1, 3, 32, 32), padding).padding[0]
    assert not found[0]            # [CLS]
    assert found[1:].view(4, 4).tolist() == [
        [True, True, True, True],
        [False, False, False, True],
        [False, False, False, True],
        [False, False, False, True]]


@pytest.mark.parametrize("patch, heights", [(16, (205, 206, 207)), (14, (125, 126, 127))])
def test_released_checkpoints_resize_the_mask_as_an_image(patch, heights):
    """[D47] F.interpolate(mask, (n, n), mode="bilinear", antialias=True).round(), where it differs
    from masking what is more than half padding: at the border, and at exactly a half."""
    vision = m.ClipVision(224, patch, 16, 2, 32, 1, 16, released_rules=True)
    n = 224 // patch
    for height in heights:    # of an image in the middle of its square
        top = round((224 - height) / 2 - 0.1)
        padding = torch.ones(1, 224, 224, dtype=torch.bool)
        padding[:, top:top + height] = False
        mask = padding[:, None].float()
        resized = F.interpolate(mask, (n, n), mode="bilinear", antialias=True).round()
        found = vision.patch_padding(padding).view(n, n)
        assert torch.equal(found, resized[0, 0] == 1)
        if patch == 16:
            assert not torch.equal(found, F.avg_pool2d(mask, patch)[0, 0] > 0.5)


def test_the_random_weights_of_the_encoders_are_always_the_same():
    """Encoders are drawn from their own seed, and the draw does not move the global generator."""
    for method in ("m2ist", "hivg"):
        spec = m.make_spec(method, "tiny")
        torch.manual_seed(1)
        one = nn.ModuleDict(m.build_encoders(spec)).state_dict()
        drawn = torch.rand(3)
        torch.manual_seed(2)
        other = nn.ModuleDict(m.build_encoders(spec)).state_dict()
        assert all(torch.equal(value, other[name]) for name, value in one.items())
        torch.manual_seed(1)
        assert torch.equal(torch.rand(3), drawn)


# --- The grounding encoder ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["m2ist", "hivg"])
def test_a_box_is_read_from_reg_after_all_layers(method):
    """The layers, each with the positions, a norm where they are pre-norm, three linear layers, a
    sigmoid; and the last layer's softmax of [REG]'s query with all keys, a mean of heads."""
    model = tiny(method).eval()
    images, image_padding, tokens, token_padding = inputs()
    text = model.encode_text(tokens, token_padding)
    vision = model.encode_image(images, image_padding, text)
    found = model.ground(vision, text, attention=True)
    grounding = model.grounding
    x, padding, position, cells = grounding.sequence(vision, text)
    for layer in grounding.layers[:-1]:
        x, _, _ = layer(x, padding, position)
    last = grounding.layers[-1]
    h = last.norm1(x) + position
    q, k = (linear(h).unflatten(-1, (6, 16)) for linear in (last.q, last.k))
    scores = torch.einsum("bhc,bnhc->bhn", q[:, 0], k) / math.sqrt(16)
    scores = scores.masked_fill(padding[:, None], float("-inf"))
    assert_close([found.attention], [scores.softmax(-1).mean(1)[:, cells]], atol=1e-6)
    reg = grounding.norm(last(x, padding, position)[0][:, 0])
    for linear in (grounding.head[0], grounding.head[2]):
        reg = torch.relu(linear(reg))
    assert_close([found.boxes], [torch.sigmoid(grounding.head[4](reg))], atol=1e-6)


@pytest.mark.parametrize("method, size, attention, position", [
    # [D45] Attention: sqrt(2 / (C + 3C)) at size base and large, sqrt(2 / (C + C)) at size tiny.
    # Positions: nn.Embedding's N(0, 1) in both released codes; ours at size tiny.
    ("m2ist", "base", 0.0442, 1.0), ("hivg", "base", 0.0312, 1.0), ("hivg", "large", 0.0255, 1.0),
    ("m2ist", "tiny", 0.1021, 0.1), ("hivg", "tiny", 0.1021, 0.1)])
def test_the_start_of_the_grounding_encoder(method, size, attention, position):
    """As nn.TransformerEncoderLayer with Xavier on each of its matrices, where q, k, v are one; and
    at size tiny with Xavier on q, k, v, and no bias."""
    torch.manual_seed(0)
    spec = m.make_spec(method, size)
    grounding = m.GroundingEncoder(8, 8, vision_tokens=400, max_tokens=20, **spec["grounding"])
    dim = grounding.position.shape[1]
    theirs = nn.TransformerEncoderLayer(dim, 4, len(grounding.layers[0].fc1.weight))
    for layer in grounding.layers:
        for linear in (layer.q, layer.k, layer.v):
            assert linear.weight.std().item() == pytest.approx(attention, rel=0.03)
        for mine, other in ((layer.fc1, theirs.linear1), (layer.fc2, theirs.linear2)):
            nn.init.xavier_uniform_(other.weight)
            assert mine.weight.std().item() == pytest.approx(other.weight.std().item(), rel=0.03)
            expected = 0 if size == "tiny" else other.bias.std().item()
            assert mine.bias.std().item() == pytest.approx(expected, rel=0.3)
        assert not any(linear.bias.any() for linear in (layer.q, layer.k, layer.v, layer.out))
    assert grounding.position.std().item() == pytest.approx(position, rel=0.02)
    assert grounding.reg.std().item() == pytest.approx(1, rel=0.25)


# --- One interface for both models ----------------------------------------------------------------


@pytest.mark.parametrize("method", m.METHODS)
def test_forward_is_encode_text_encode_image_and_ground(method):
    """For every method; and on DETR the vision encoder needs no text."""
    model = tiny(method).eval()
    images, image_padding, tokens, token_padding = inputs()
    text = model.encode_text(tokens, token_padding)
    vision = model.encode_image(images, image_padding, text)
    grounding = model.ground(vision, text, attention=True)
    whole = model(images, image_padding, tokens, token_padding, attention=True)
    assert torch.equal(grounding.boxes, whole.boxes)
    assert torch.equal(grounding.attention, whole.attention)
    assert whole.boxes.shape == (3, 4)
    assert whole.attention.shape == (3, 64)
    assert 0 <= whole.boxes.min() and whole.boxes.max() <= 1
    if isinstance(model, m.DetrBert):
        assert torch.equal(model.encode_image(images, image_padding).x, vision.x)
    else:
        with pytest.raises(ValueError, match="needs the text"):
            model.encode_image(images, image_padding)


# As CLIP's repository and torchvision's documentation publish them: red, green, blue.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("method, options, mean, std", [
    ("m2ist", {}, IMAGENET_MEAN, IMAGENET_STD), ("hivg", {}, CLIP_MEAN, CLIP_STD),
    ("hivg", {"pixels": "detr"}, IMAGENET_MEAN, IMAGENET_STD)])    # [D22]
def test_uint8_images_are_normalised_channel_by_channel(method, options, mean, std):
    """(value / 255 - mean) / std of its channel, and 0 where there is padding, whatever the pixels
    there are. Floats are taken as normalised already."""
    model = tiny(method, **options).eval()
    _, padding, tokens, token_padding = inputs()
    g = torch.Generator().manual_seed(0)
    images = torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8, generator=g)
    expected = torch.zeros(3, 3, 64, 64)
    for channel in range(3):
        values = (images[:, channel] / 255 - mean[channel]) / std[channel]
        expected[:, channel] = torch.where(padding, 0.0, values)
    assert_close([m.normalise(images, padding, model.pixels)], [expected], atol=1e-5)
    assert m.normalise(expected, padding, model.pixels) is expected
    boxes = model(images, padding, tokens, token_padding).boxes
    assert_close([boxes], [model(expected, padding, tokens, token_padding).boxes], atol=1e-5)


@pytest.mark.parametrize("method", ["m2ist", "hivg"])
def test_a_text_with_more_than_max_tokens_is_refused(method):
    """Only padding may be cut off."""
    model = tiny(method)
    tokens = torch.ones(1, 30, dtype=torch.long)
    padding = torch.zeros(1, 30, dtype=torch.bool)
    with pytest.raises(ValueError, match="more than max_tokens = 20"):
        model.encode_text(tokens, padding)
    padding[:, 20:] = True
    assert model.encode_text(tokens, padding).x.shape[1] == 20


# --- M²IST's forward pass -------------------------------------------------------------------------


def test_m2ist_adds_the_side_networks_to_the_outputs_of_the_encoders():
    """f = x_L + s_L, with s_0 = x_0 and s_l = s_{l-1} + IEA_l(a_l) + EA_l(g_l)."""
    model = tiny().eval()
    images, image_padding, tokens, token_padding = inputs()
    encoded_images = model.vision(images, image_padding)
    texts = model.text(tokens, token_padding)
    s_v = encoded_images.x0
    s_l = texts.x0
    for pair in (1, 2):
        iea = model.adapters.blocks[pair - 1]["attention"]
        ea = model.adapters.blocks[pair - 1]["ffn"]
        ports = encoded_images.ports[pair - 1]    # vision layers 1 and 2
        s_v = s_v + iea.vision(ports["attention"]) + ea.vision(ports["ffn"])
        ports = texts.ports[pair + 2 - 1]         # text layers 3 and 4
        s_l = s_l + iea.text(ports["attention"]) + ea.text(ports["ffn"])
    found_v = model.encode_image(images, image_padding)
    found_l = model.encode_text(tokens, token_padding)
    assert torch.allclose(found_v.x, encoded_images.x + s_v, atol=1e-5)
    assert torch.allclose(found_l.x, texts.x + s_l, atol=1e-5)

    # [D6] With --side-start paired, s_0 of the text is x_2, the input of layer 3.
    paired = tiny(side_start="paired").eval()
    moved = found_l.x + texts.states[1] - texts.x0
    assert torch.allclose(paired.encode_text(tokens, token_padding).x, moved, atol=1e-5)
    assert torch.equal(paired.encode_image(images, image_padding).x, found_v.x)


def test_m2ist_puts_reg_the_text_and_the_image_in_one_sequence():
    """M²IST Section III-A c. A trimmed text leaves the image's positions where they are after 20
    tokens of text."""
    model = tiny().eval()
    images, image_padding, tokens, token_padding = inputs()
    text = model.encode_text(tokens, token_padding)
    vision = model.encode_image(images, image_padding)
    grounding = model.grounding
    x, padding, position, cells = grounding.sequence(vision, text)
    assert torch.equal(x[:, 0], grounding.reg.expand(3, -1))
    assert torch.allclose(x[:, 1:10], grounding.text_projection(text.x), atol=1e-5)
    assert torch.allclose(x[:, cells], grounding.vision_projection(vision.x), atol=1e-5)
    assert not padding[:, 0].any()
    assert torch.equal(padding[:, 1:10], token_padding)
    assert torch.equal(padding[:, cells], vision.padding)
    assert vision.padding[2].sum() == 16
    assert torch.equal(position[:10], grounding.position[:10])
    assert torch.equal(position[10:], grounding.position[21:])


# --- HiVG's forward pass --------------------------------------------------------------------------


def test_hivg_grounds_the_levels_of_eq_1_in_the_sequence_of_eq_2():
    """[REG], W_mvp of the levels side by side with [CLS] first, then the projected text."""
    model = tiny("hivg", vision_layers=[2, 5], text_layers=[1, 3], bridge_layers=[3]).eval()
    grounding = model.grounding
    images, image_padding, tokens, token_padding = inputs()
    text = model.encode_text(tokens, token_padding)
    vision = model.encode_image(images, image_padding, text)
    seen = [text.states[0], text.states[2]]
    tower = model.clip.vision(images, image_padding, (seen, token_padding))
    assert torch.equal(vision.x, torch.cat([tower.states[1], tower.states[4]], dim=-1))

    x, padding, position, cells = grounding.sequence(vision, text)
    assert torch.equal(x[:, 0], grounding.reg.expand(3, -1))                 # g_r
    W, b = grounding.vision_projection.weight, grounding.vision_projection.bias
    assert torch.allclose(x[:, 1:66], vision.x @ W.T + b, atol=1e-4)         # HiVG Eq. (1)
    final = model.clip.text.projection(model.clip.text.norm(text.states[-1]))
    W, b = grounding.text_projection.weight, grounding.text_projection.bias
    assert torch.allclose(x[:, 66:], final @ W.T + b, atol=1e-4)             # g_l
    assert torch.equal(position, grounding.position[:1 + 65 + 9])
    assert cells == slice(2, 66)
    assert not padding[:, :2].any()
    assert torch.equal(padding[:, 1:66], vision.padding)
    assert torch.equal(padding[:, 66:], token_padding)


def test_a_layer_of_hivg_is_eqs_7_and_8():
    """h = W f + α/r B A f on q, k, v and out; the bridge adds f_v^sa after the attention."""
    model = tiny("hivg", bridge_layers=[2], rank=4, alpha=8.0).eval()
    images, image_padding, tokens, token_padding = inputs()
    model.begin_stage(1)
    for lora in hilora.lora_modules(model).values():
        nn.init.normal_(lora.B, std=0.1)
    text = model.encode_text(tokens, token_padding)
    encoded = model.clip.vision(images, image_padding, (text.states, token_padding))

    def with_lora(linear, f):
        assert isinstance(linear, hilora.LoRALinear)
        return f @ linear.weight.T + linear.bias + 8 / 4 * f @ linear.A.T @ linear.B.T

    def heads(f):
        return f.unflatten(-1, (4, 16)).transpose(1, 2)    # (B, heads, N, C / heads)

    layer = model.clip.vision.layers[1]
    f = encoded.states[0]
    h = layer.norm1(f)
    q = heads(with_lora(layer.q, h))
    k = heads(with_lora(layer.k, h))
    v = heads(with_lora(layer.v, h))
    weights = (q @ k.transpose(-2, -1) / math.sqrt(16)).softmax(-1)
    attended = (weights @ v).transpose(1, 2).flatten(2)
    f = f + with_lora(layer.out, attended)
    f = f + bridges(model)[0].semantic(f, text.states, token_padding)    # f_v + f_v^sa
    f = f + layer.fc2(layer.activation(layer.fc1(layer.norm2(f))))
    assert torch.allclose(encoded.states[1], f, atol=1e-4)

    # Layer 3 is in group 2, l > j L / G: W alone.
    assert type(model.clip.vision.layers[2].q) is nn.Linear


def test_hivg_returns_what_its_constraints_need():
    """Eq. (12): a score is the dot product of the normalised [EOS] token and the MLP of a cell.
    With it come padding by cell, CLIP's embeddings and the temperature; scores in training only."""
    model = tiny("hivg").train()
    batch = inputs()
    seen = []
    model.grounding.norm.register_forward_hook(lambda module, args, output: seen.append(output))
    found = model(*batch)
    x = seen[0]
    region = model.grounding.region
    for b, length in enumerate((9, 7, 5)):
        eos = 1 + 65 + length - 1
        t = x[b, eos] / x[b, eos].norm()
        for cell in (0, 17, 63):
            h = region.fc1(region.norm(x[b, 2 + cell]))
            score = t @ region.fc2(h * torch.sigmoid(1.702 * h))
            assert found.scores[b, cell].item() == pytest.approx(score.item(), abs=1e-4)

    assert found.padding[2].view(8, 8)[:2].all()
    assert found.padding.sum() == 8 + 16
    assert found.temperature.item() == pytest.approx(0.07, rel=1e-4)
    text = model.encode_text(*batch[2:])
    assert torch.equal(found.text, text.embedding)
    assert torch.equal(found.image, model.encode_image(*batch[:2], text).embedding)
    assert model.eval()(*batch).scores is None


# --- What is computed once, or not at all ---------------------------------------------------------


@pytest.mark.parametrize("method, options", [
    ("m2ist", {}), ("hivg", {"region_text": False})])
def test_the_last_grounding_layer_needs_no_token_but_reg(method, options, monkeypatch):
    """Boxes and gradients are those of a layer that computes all of its tokens."""
    model, *batch = in_double(method, **options)
    found = outputs_and_gradients(model, *batch, IMAGE_INDEX)
    asked = []
    real = m.TransformerLayer.forward

    def compute_all(layer, x, padding=None, position=None, context=None, num_queries=None):
        asked.append(num_queries)
        return real(layer, x, padding, position, context)

    monkeypatch.setattr(m.TransformerLayer, "forward", compute_all)
    whole = outputs_and_gradients(model, *batch, IMAGE_INDEX)
    assert asked[-1] == 1 and set(asked[:-1]) == {None}
    assert_close(found, whole)


@pytest.mark.parametrize("method, layers", [
    ("m2ist", 2), ("full", 2), ("cm-adapter", 2), ("hivg", 1), ("clip-frozen", 6)])
def test_texts_that_share_an_image_are_as_if_each_had_its_own(method, layers):
    """Boxes, scores and gradients are equal. What sees no text runs once for each image: on DETR
    the whole tower, in HiVG the layers below the first bridge, in plain CLIP all."""
    model, images, image_padding, tokens, token_padding = in_double(method)
    alone = outputs_and_gradients(model, images[IMAGE_INDEX], image_padding[IMAGE_INDEX], tokens,
                                  token_padding)
    tower, _ = model.encoders()
    samples = []
    for layer in tower.layers:
        layer.register_forward_hook(lambda layer, arguments, output: samples.append(len(output[0])))
    shared = outputs_and_gradients(model, images, image_padding, tokens, token_padding, IMAGE_INDEX)
    assert_close(shared, alone)
    assert samples == [2] * layers + [5] * (len(tower.layers) - layers)


# --- A box depends on its own image and text alone ------------------------------------------------


@pytest.mark.parametrize("method, options", [
    ("m2ist", {}), ("adapter", {}), ("full", {}), ("hivg", {"stages": 2, "rank": 4}),
    ("hivg", {"cross_attention": False})])
def test_a_box_is_the_same_alone_in_any_batch_and_with_longer_padding(method, options):
    """[D14] The released bridge mixes the samples of a batch. Here other samples change nothing,
    and neither does the padding of a text: none, or far beyond max_tokens, or of other tokens."""
    model = tiny(method, **options).double().train()    # size tiny has no dropout
    if method == "hivg":
        model.begin_stage(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith((".B", ".weights")) or name.startswith("adapters."):
                nn.init.normal_(p, std=0.3)
        batch, others = inputs(), inputs(seed=5)
        batch[0], others[0] = batch[0].double(), others[0].double()
        for i in range(3):
            neighbours = [part.clone() for part in others]
            for part, own in zip(neighbours, batch):
                part[i] = own[i]
            neighbours[2].masked_fill_(neighbours[3], 77)    # other tokens under the padding
            results = [(model(*batch, attention=True), i), (model(*neighbours, attention=True), i)]

            length = 9 - 2 * i
            for text in (length, 9, 20, 30):
                tokens = torch.zeros(1, text, dtype=torch.long)
                tokens[0, :length] = batch[2][i, :length]
                padding = torch.arange(text)[None] >= length
                alone = model(batch[0][i:i + 1], batch[1][i:i + 1], tokens, padding, attention=True)
                results.append((alone, 0))
            first, _ = results[0]
            for found, row in results[1:]:
                assert_close([found.boxes[row], found.attention[row]],
                             [first.boxes[i], first.attention[i]], atol=1e-6)
                if first.scores is not None:
                    assert_close([found.scores[row]], [first.scores[i]], atol=1e-6)
            # The box is no constant: another sample has another box.
            assert (model(*others).boxes[i] - first.boxes[i]).abs().max() > 1e-4


def test_the_features_of_padded_cells_do_not_reach_the_box():
    """Other features there change no box."""
    model = tiny().eval()
    images, image_padding, tokens, token_padding = inputs()
    text = model.encode_text(tokens, token_padding)
    vision = model.encode_image(images, image_padding)
    other = vision._replace(x=vision.x.masked_fill(vision.padding[..., None], 9.0))
    assert_close([model.ground(other, text).boxes], [model.ground(vision, text).boxes], atol=1e-6)


# --- Dropout --------------------------------------------------------------------------------------


def dropout_in(monkeypatch, function, *args):
    """(the places that a call applies dropout at, its result). A place is (kind, rate): kind is
    "attention" for attention probabilities, and "tokens" for everything else."""
    places = []
    real_dropout = F.dropout
    real_attention = F.scaled_dot_product_attention

    def dropout(x, p=0.5, training=True, inplace=False):
        if training and p > 0:
            places.append(("tokens", p))
        return real_dropout(x, p, training, inplace)

    def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
        if dropout_p > 0:
            places.append(("attention", dropout_p))
        return real_attention(q, k, v, attn_mask, dropout_p, is_causal, **options)

    with monkeypatch.context() as patch:
        patch.setattr(F, "dropout", dropout)
        patch.setattr(F, "scaled_dot_product_attention", attention)
        return places, function(*args)


# A layer of nn.TransformerEncoderLayer's: the probabilities, the output of the attention, the
# hidden units of the feed-forward network, its output. BERT has no dropout on the hidden units.
LAYER = [("attention", 0.1), ("tokens", 0.1), ("tokens", 0.1), ("tokens", 0.1)]
BERT_LAYER = [("attention", 0.1), ("tokens", 0.1), ("tokens", 0.1)]


@pytest.mark.parametrize("method, size, text, vision", [
    ("m2ist", "base", [], []),              # frozen encoders are in eval mode [D7]
    ("lora", "base", [], []),
    ("full", "base", [("tokens", 0.1)] + 12 * BERT_LAYER, 6 * LAYER),
    ("hivg", "large", [], []),              # CLIP has no dropout
])
def test_where_a_model_in_training_has_dropout(monkeypatch, method, size, text, vision):
    """0.1 in the grounding encoder and, with full fine-tuning, in DETR and BERT as pretrained. A
    model of full size runs on the meta device, because no value is looked at."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1)
    assert dropout_in(monkeypatch, layer, torch.randn(2, 5, 8))[0] == LAYER
    model = meta(method, size)
    side = model.spec["image_size"]
    images = torch.zeros(2, 3, side, side, dtype=torch.uint8, device="meta")
    tokens = torch.zeros(2, 9, dtype=torch.long, device="meta")
    batch = (images, images[:, 0].bool(), tokens, tokens.bool())
    in_text, encoded_text = dropout_in(monkeypatch, model.encode_text, *batch[2:])
    in_image, encoded = dropout_in(monkeypatch, model.encode_image, *batch[:2], encoded_text)
    in_grounding, found = dropout_in(monkeypatch, model.ground, encoded, encoded_text)
    assert found.boxes.shape == (2, 4)
    assert (in_text, in_image, in_grounding) == (text, vision, 6 * LAYER)
    assert dropout_in(monkeypatch, model.eval(), *batch)[0] == []


# --- What a training step changes -----------------------------------------------------------------


@pytest.mark.parametrize("method, has_graph", [("m2ist", False), ("full", True)])
def test_no_graph_is_built_through_frozen_encoders(method, has_graph):
    """Even an image that asks for a gradient gets none through a frozen encoder: no output, from
    its first port on, is kept for the backward pass."""
    model = tiny(method)
    images, *rest = inputs()
    images.requires_grad_()
    seen = []
    for encoder in (model.vision, model.text):
        encoder.register_forward_hook(lambda module, args, output: seen.append(output))
    model(images, *rest)
    for encoded in seen:
        outputs = [encoded.x, *encoded.ports[0].values(), *encoded.ports[-1].values()]
        assert {output.requires_grad for output in outputs} == {has_graph}
    assert len(seen) == 2


# What the released codes move at the rate 1e-5; the V-L encoder and the box head move at 1e-4.
AT_1E_5 = {
    # TransVG: CNN without stem and layer1, DETR's encoder with its projection, BERT.
    "full": r"vision\.(backbone\.layer[234]|projection|layers)\.|text\.",
    # M²IST: the adapters. No encoder moves.
    "m2ist": r"adapters\."}
SOME = {
    "full": ["vision.backbone.layer2.0.conv1.weight", "text.layers.1.k.weight"],
    "m2ist": ["adapters.blocks.0.attention.shared_up.weight", "adapters.blocks.1.ffn.lea.up.bias"]}


@pytest.mark.parametrize("method", ["full", "m2ist"])
def test_a_step_moves_what_the_released_code_moves_by_adamw(method, monkeypatch):
    """In two groups with their rates, the decay 1e-4, and the gradient of L1 + 1 - GIoU. The
    encoders are tiny, but for a ResNet-50 as the backbone."""
    size = m.SIZES["detr", "tiny"]
    with_resnet = {**size, "backbone": "resnet50", "stride": 32,
                   "vision": {**size["vision"], "channels": 2048}}
    monkeypatch.setitem(m.SIZES, ("detr", "tiny"), with_resnet)
    model = tiny(method).double()
    args = train.parse_args(["--method", method, "--dataset", "refcoco", "--device", "cpu"])
    [phase] = train.plan(args)
    optimizer = train.make_optimizer(model, args, phase)

    batch = dict(zip(("images", "image_padding", "tokens", "token_padding"), inputs()))
    batch["images"] = (batch["images"] * 40 + 120).clamp(0, 255).to(torch.uint8)
    batch["boxes"] = torch.tensor([[.4, .5, .3, .2], [.6, .7, .2, .5], [.5, .4, .9, .7]])
    batch["image_index"] = torch.arange(3)
    twin = copy.deepcopy(model)
    boxes = twin(*(batch[name] for name in ("images", "image_padding", "tokens", "token_padding")))
    losses.box_loss(boxes.boxes, batch["boxes"], l1=1.0, giou=1.0, beta=0.0).backward()
    train.train_step(model, batch, optimizer, torch.amp.GradScaler("cpu", enabled=False), args)

    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        rate = 1e-4 if name.startswith("grounding.") else None
        if re.match(AT_1E_5[method], name):
            rate = 1e-5
        assert rates.get(p) == rate, name
        moved = not torch.equal(p, twin.get_parameter(name))
        assert moved == (rate is not None), name
    assert changed_names(model, twin.state_dict()) == trained_names(model)    # no buffer moves

    for name, rate in [*((name, 1e-5) for name in SOME[method]), ("grounding.head.4.weight", 1e-4)]:
        before = twin.get_parameter(name)
        gradient = before.grad
        mean = (1 - 0.9) * gradient / (1 - 0.9 ** 1)
        square = (1 - 0.999) * gradient ** 2 / (1 - 0.999 ** 1)
        expected = before - rate * 1e-4 * before - rate * mean / (square.sqrt() + 1e-8)
        assert gradient.abs().max() > 1e-6
        assert_close([model.get_parameter(name)], [expected.detach()], atol=1e-8 * rate)


# --- The stages of LoRA ---------------------------------------------------------------------------


def hivg_steps(model):
    """Two steps on all losses of HiVG. At the first step A has no gradient, because B is 0."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        terms = losses.loss_terms(model(*inputs()), torch.rand(3, 4), l1=2, giou=2, contrast=1,
                                  focal=20, dice=2)
        sum(terms.values()).backward()
        optimizer.step()


@pytest.mark.parametrize("deep_to_shallow", [False, True])
def test_a_stage_of_hivg_changes_its_factors_and_no_bit_of_the_rest_of_clip(deep_to_shallow):
    """Warm-up, then begin_stage(j), training and merge for j = 1, 2, 3."""
    model = tiny("hivg", rank=4, alpha=8.0, deep_to_shallow=deep_to_shallow)
    start = copy.deepcopy(model.state_dict())
    outside = {name for name in start if not name.startswith("clip.") or ".plugs." in name}
    hivg_steps(model)    # the warm-up trains all of the bridges and of the grounding encoder
    assert changed_names(model, start) == outside

    for stage in (1, 2, 3):
        before = copy.deepcopy(model.state_dict())
        boxes = model(*inputs()).boxes
        model.begin_stage(stage)
        assert torch.equal(model(*inputs()).boxes, boxes)    # ΔW = 0 when a stage starts

        # 2 j of the 6 vision layers, all text layers.
        reached = [6, 5, 4, 3, 2, 1] if deep_to_shallow else [1, 2, 3, 4, 5, 6]
        layers = [f"vision.layers.{layer - 1}" for layer in reached[:2 * stage]]
        layers += [f"text.layers.{layer - 1}" for layer in (1, 2, 3)]
        linears = {f"clip.{layer}.{name}" for layer in layers for name in ("q", "k", "v", "out")}
        factors = {f"{linear}.{factor}" for linear in linears for factor in "AB"}
        assert trained_names(model) == outside | factors

        hivg_steps(model)    # W itself is not touched before the merge
        assert changed_names(model, before) == outside
        assert all(model.get_parameter(name).any() for name in factors)

        boxes = model(*inputs()).boxes
        hilora.merge(model)
        assert_close([model(*inputs()).boxes], [boxes], atol=1e-5)
        assert changed_names(model, before) - outside == {f"{name}.weight" for name in linears}

        fresh = tiny("hivg", rank=4, alpha=8.0, deep_to_shallow=deep_to_shallow)
        fresh.load_state_dict(model.state_dict())    # nothing is left of LoRA
        fresh.begin_stage(stage)
        for lora in hilora.lora_modules(fresh).values():
            nn.init.normal_(lora.B)
        fresh.begin_stage(0)    # factors that are left are dropped
        assert set(fresh.state_dict()) == set(start)
        assert torch.equal(fresh(*inputs()).boxes, model(*inputs()).boxes)


# --- Numbers of parameters (test_rows.py has those of every row) ----------------------------------


def test_counts_of_the_parts_on_detr_and_bert():
    """ResNet-50, DETR's encoder, BERT without its pooler, and the V-L encoder."""
    model = meta("frozen")
    assert count(model.vision.backbone) == 23_454_912
    assert count(model.vision.projection) == 524_544
    assert count(model.vision.layers) == 7_890_432
    with torch.device("meta"):
        bert = transformers.BertModel(transformers.BertConfig())
    assert count(bert) == 109_482_240
    assert count(model.text) == count(bert) - count(bert.pooler) == 108_891_648
    assert count(model.grounding) == 8_393_732
    assert m.count_parameters(model) == {
        "total": 149_155_268, "trainable": 8_393_732, "encoder_tunable": 0}
    assert meta("m2ist", max_tokens=40).grounding.position.shape == (1 + 40 + 400, 256)


@pytest.mark.parametrize("size, clip, bridge, layers, totals, factors", [
    # [D23] HiVG's Table 7 has 206M in all, of which 41M are updated.
    ("base", 149_620_737, 12_278_784, 18_915_328, (211_027_461, 61_406_724, 36_836_352),
     [(786_432, 1_572_864), (1_572_864, 1_572_864), (2_359_296, 1_572_864)]),
    # Table 7 has 468M and 52M, which four bridges of twelve text layers alone exceed.
    ("large", 427_616_513, 22_742_016, 33_085_440, (561_573_381, 133_956_868, 90_968_064),
     [(1_572_864, 2_359_296), (3_145_728, 2_359_296), (4_718_592, 2_359_296),
      (6_291_456, 2_359_296)])])
def test_counts_of_hivg_and_of_its_stages(size, clip, bridge, layers, totals, factors):
    """CLIP, a bridge, the grounding encoder; LoRA's factors in both towers, stage by stage."""
    model = meta("hivg", size)
    assert {count(found) for found in bridges(model)} == {bridge}
    assert count(model.clip) - count(*bridges(model)) == clip
    assert count(model.grounding.layers, model.grounding.norm) == layers
    assert tuple(m.count_parameters(model).values()) == totals
    for stage, expected in enumerate(factors, start=1):
        model.begin_stage(stage)
        for tower, factors_of_tower in zip(model.encoders(), expected):
            loras = hilora.lora_modules(tower).values()
            assert sum(lora.A.numel() + lora.B.numel() for lora in loras) == factors_of_tower
        hilora.merge(model)
    if size == "base":
        # 41M: the bridges and LoRA's last stage. 206M: CLIP, bridges, grounding encoder, box head.
        assert 3 * bridge + sum(factors[-1]) == 40_768_512
        assert clip + 3 * bridge + layers + count(model.grounding.head) == 205_899_781
    else:
        # [D25] HiVG's Appendix B has 1.98% for the last stage of L.
        assert round(100 * sum(factors[-1]) / (clip + sum(factors[-1])), 2) == 1.98


@pytest.mark.parametrize("method, size, tokens, heads, eps", [
    ("m2ist", "base", 421, (8, 12), 1e-12),    # [REG], 20 tokens of text, 20 x 20 cells
    ("hivg", "base", 275, (12, 8), 1e-5),      # [REG], [CLS], 14 x 14 patches, 77 tokens of text
    ("hivg", "large", 335, (16, 12), 1e-5),    # [REG], [CLS], 16 x 16 patches, 77 tokens of text
])
def test_what_counts_do_not_show_of_the_sizes(method, size, tokens, heads, eps):
    """Heads, pre- or post-norm, and the eps of norms, which is 1e-12 in BERT."""
    model = meta(method, size)
    vision, text = model.encoders()
    for stack, expected in ((vision, (heads[0], 1e-5)), (text, (heads[1], eps)),
                            (model.grounding, (8, 1e-5))):
        for layer in stack.layers:
            assert layer.pre_norm == (method == "hivg")
            assert (layer.heads, layer.norm1.eps) == (layer.heads, layer.norm2.eps) == expected
    assert len(model.grounding.layers) == 6
    assert len(model.grounding.position) == tokens


# --- What a stage trains --------------------------------------------------------------------------

TEXT_FACTORS = {"LoRA on q/k/v/out of text layers 1 2 3 4 5 6 7 8 9 10 11 12": 1_572_864}
HIVG = {"cross-modal bridges at vision layers 4 8 12": 36_836_352,
        "grounding encoder and box head": 61_406_724 - 36_836_352}
VL_ENCODER = {"grounding encoder and box head": 8_393_732}


@pytest.mark.parametrize("method, stage, options, groups", [
    ("hivg", 0, {}, HIVG),
    # HiVG Eq. (6): stage j trains factors in the vision layers l <= 12 j / 3.
    ("hivg", 1, {}, {"LoRA on q/k/v/out of vision layers 1 2 3 4": 786_432,
                     **TEXT_FACTORS, **HIVG}),
    ("hivg", 2, {}, {"LoRA on q/k/v/out of vision layers 1 2 3 4 5 6 7 8": 1_572_864,
                     **TEXT_FACTORS, **HIVG}),
    ("hivg", 1, {"stages": 6, "deep_to_shallow": True},
     {"LoRA on q/k/v/out of vision layers 11 12": 393_216, **TEXT_FACTORS, **HIVG}),
    ("frozen", 0, {}, VL_ENCODER),
    ("full", 0, {}, {"vision encoder": 31_647_488, "text encoder": 108_891_648, **VL_ENCODER}),
    ("m2ist+lora", 1, {}, {
        "LoRA on q/v of vision layers 1 2 3 4 5 6": 337_920,
        "LoRA on q/v of text layers 1 2 3 4 5 6 7 8 9 10 11 12": 2_027_520,
        "adapters": 2_975_232, **VL_ENCODER})])
def test_what_a_method_trains_in_a_stage(method, stage, options, groups):
    """Each group by its name, with its number of parameters."""
    assert m.what_trains(method, stage, **options) == groups


@pytest.mark.parametrize("method, stage", [("hivg", 4), ("hivg", -1), ("m2ist", 1), ("lora", 2)])
def test_a_stage_that_a_method_does_not_have_is_refused(method, stage):
    with pytest.raises(m.ModelError, match=rf"stages 0 \.\. \d, no stage {stage}"):
        m.what_trains(method, stage)


# --- Options --------------------------------------------------------------------------------------


def test_options_reach_the_adapters_and_lora():
    """C_d, C_i, s, the residual, r and α arrive in the layers that they are options of; None is not
    given; a port with none has no module."""
    model = tiny("m2ist+lora", bottleneck=5, interaction_dim=32, interaction_bottleneck=7,
                 scale=0.5, residual=True, text_layers=[1, 3], rank=5, alpha=15.0, max_tokens=None)
    iea = model.adapters.blocks[0]["attention"]
    ea = model.adapters.blocks[0]["ffn"]
    assert (ea.vea.down.out_features, ea.lea.scale, ea.vea.residual) == (5, 0.5, True)
    assert (iea.text_down.out_features, iea.shared_up.out_features) == (7, 32)
    assert (iea.scale, iea.residual) == (0.5, True)
    assert model.adapters.layers["text"] == [1, 3]
    assert {(len(lora.A), lora.scale) for lora in hilora.lora_modules(model).values()} == {(5, 3.0)}
    assert model.spec["max_tokens"] == 20
    assert [list(block) for block in tiny(attention_port="none").adapters.blocks] == [["ffn"]] * 2


@pytest.mark.parametrize("arguments, options, message", [
    (("nothing", "tiny", "random"), {}, "--method 'nothing': .*m2ist"),
    (("m2ist", "large", "random"), {}, "--size for m2ist 'large': choose one of base, tiny"),
    (("m2ist", "tiny", "pretrained"), {}, "--weights for size tiny 'pretrained': .*shapes, random"),
    ("m2ist", {"bottlenek": 3}, "option 'bottlenek': .*bottleneck"),
    # What a method does not use.
    ("hivg", {"bottleneck": 5}, "--bottleneck is not for --method hivg"),
    ("frozen", {"bottleneck": 5}, "--bottleneck is not for --method frozen"),
    ("adapter", {"residual": True}, "--residual is not for --method adapter"),
    ("m2ist", {"vision_layers": [1]}, "--vision-layers is not for --method m2ist"),
    ("m2ist", {"rank": 8}, "--rank is not for"),
    ("clip-lora", {"bridge_weights": "none"}, "--bridge-weights is not for"),
    # Values that there are not.
    ("m2ist", {"attention_port": "wrong"}, "'wrong' for the attention port: .*iea, ea, vea, lea"),
    ("m2ist", {"insertion": "wrong"}, "--insertion 'wrong': .*side, sequential, parallel"),
    ("m2ist", {"side_start": "wrong"}, "--side-start 'wrong': .*input, paired"),
    ("hivg", {"pixels": "wrong"}, "--pixels 'wrong': .*detr, clip"),
    ("hivg", {"bridge_weights": "wrong"}, "bridge weights 'wrong': .*nxLxH"),
    ("lora", {"rank": 0}, "rank is 0"),
    # What does not fit together.
    ("m2ist", {"image_size": 60}, "--image-size is 60; it must be a multiple of 8"),
    ("m2ist", {"max_tokens": 33}, "--max-tokens is 33; the text encoder of size tiny has 32"),
    ("m2ist", {"interaction_dim": 65}, "interaction_dim .* is 65"),
    ("m2ist", {"text_layers": [4, 5]}, r"--text-layers 4 5: must differ and lie in 1 \.\. 4"),
    ("m2ist", {"text_layers": [4]}, "2 vision layers cannot be paired with text layers"),
    ("m2ist", {"text_layers": [1, 2, 3]}, "'iea' joins a vision layer and a text layer"),
    ("hivg", {"stages": 7}, "--stages is 7; there are 6 layers"),
    ("hivg", {"vision_layers": [1, 7]}, r"--vision-layers 1 7: must differ and lie in 1 \.\. 6"),
    ("hivg", {"bridge_layers": [2, 2]}, r"--bridge-layers 2 2: must differ and lie in 1 \.\. 6"),
    ("hivg", {"layer_to_layer": True, "text_layers": [1, 2]}, "3 bridges need as many text layers"),
])
def test_what_cannot_be_built_is_refused_by_name(arguments, options, message):
    """The error names the flag and the value or, where there is a choice, the valid values."""
    if isinstance(arguments, str):
        arguments = (arguments, "tiny", "random")
    with pytest.raises(m.ModelError, match=message):
        m.build_model(*arguments, **options)


# --- The encoders that are shipped ----------------------------------------------------------------


@pytest.mark.parametrize("method", ["m2ist", "hivg"])
def test_shapes_are_the_weights_that_are_shipped(method, tmp_path, monkeypatch):
    """Every encoder weight of a model for `shapes` is one of the file in assets/; an error names a
    file that is missing."""
    model = m.build_model(method, "tiny", "shapes")
    kind = model.spec["encoders"]
    state = model.state_dict()
    shipped = load_file(m.SHAPES_WEIGHTS[kind])
    assert {name for name in state if name.startswith(("vision.", "text.", "clip."))
            and ".plugs." not in name} == set(shipped)
    for name, value in shipped.items():
        assert torch.equal(state[name], value), name
    monkeypatch.setitem(m.SHAPES_WEIGHTS, kind, tmp_path / "tiny.safetensors")
    with pytest.raises(m.ModelError, match="tiny.safetensors: no such file"):
        m.build_model(method, "tiny", "shapes")
