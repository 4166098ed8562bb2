"""model.py against its formulas written out: layers, encoders, both models, and what they train."""
import copy
import inspect
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file

import adapters
import hilora
import losses
import model as m
from data import InputError

ON_DETR = ["full", "frozen", "adapter", "lora", "adaptformer", "cm-adapter", "mrs-adapter", "m2ist",
           "m2ist+lora"]
ON_CLIP = ["clip-frozen", "clip-lora", "hivg"]


def tiny(method="m2ist", **options):
    """A tiny model with random weights, the same each time."""
    torch.manual_seed(1)
    return m.build_model(method, "tiny", "random", **options)


def meta(method, size="base", **options):
    """A model of full size that costs no memory."""
    with torch.device("meta"):
        return m.build_model(method, size, "random", **options)


def inputs(batch=3, text=9, seed=0):
    """A batch. Picture i has 8 i rows of padding at its top, and text i has text - 2 i tokens."""
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
    return images, image_padding, tokens, token_padding


def one_sample(batch, i, text):
    """Sample i of a batch alone, with its text padded to `text` tokens, or trimmed."""
    images, image_padding, tokens, token_padding = batch
    length = int((~token_padding[i]).sum())
    alone = torch.zeros(1, text, dtype=torch.long)
    padding = torch.ones(1, text, dtype=torch.bool)
    alone[0, :length] = tokens[i, :length]
    padding[0, :length] = False
    return images[i:i + 1], image_padding[i:i + 1], alone, padding


def count(*modules):
    """The number of parameters of some modules."""
    total = 0
    for module in modules:
        for p in module.parameters():
            total += p.numel()
    return total


def bridges(model):
    """The cross-modal bridges of a model on CLIP, shallow first."""
    found = []
    for layer in model.clip.vision.layers:
        if "attention" in layer.plugs:
            found.append(layer.plugs["attention"])
    return found


def trained_names(model):
    """The names of the parameters that are trained."""
    return {name for name, p in model.named_parameters() if p.requires_grad}


def largest_difference(a, b):
    return (a - b).abs().max().item()


# --- The layer ------------------------------------------------------------------------------------


def relu(v):
    return max(v, 0.0)


def gelu(v):
    return v * 0.5 * (1 + math.erf(v / math.sqrt(2)))


def quick_gelu(v):
    return v / (1 + math.exp(-1.702 * v))


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("activation", [relu, gelu, quick_gelu])
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


def test_checkpointing_changes_no_bit_of_hivg():
    """Each vision layer, with its bridge, is computed again in the backward pass."""
    losses_and_gradients = []
    for checkpointing in (False, True):
        model = tiny("hivg", checkpointing=checkpointing).train()
        torch.manual_seed(3)
        model.begin_stage(1)
        found = model(*inputs())
        loss = losses.total_loss(found, torch.full((3, 4), 0.4), l1=2, giou=2, contrast=1, focal=20,
                                 dice=2)
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        losses_and_gradients.append((loss, gradients))
    (loss, gradients), (again, gradients_again) = losses_and_gradients
    assert torch.equal(loss, again)
    assert gradients.keys() == gradients_again.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_again[name]), name


def test_the_grounding_encoder_starts_as_nn_transformer_encoder_layer_after_xavier():
    """[D45] TransVG and HiVG apply Xavier to each matrix of nn's layer; q, k, v are packed in one."""
    torch.manual_seed(0)
    C = 256
    theirs = torch.nn.TransformerEncoderLayer(C, 8, 2048)
    for p in theirs.parameters():
        if p.dim() > 1:
            torch.nn.init.xavier_uniform_(p)
    ours = m.TransformerLayer(C, 8, 2048, packed_start=True)

    for name, rows in zip("qkv", theirs.self_attn.in_proj_weight.chunk(3)):
        weight = ours.get_submodule(name).weight
        assert weight.std().item() == pytest.approx(0.0442, rel=0.02)
        assert weight.std().item() == pytest.approx(rows.std().item(), rel=0.02)
        assert weight.abs().max().item() == pytest.approx(rows.abs().max().item(), rel=0.01)
    for mine, other in ((ours.out, theirs.self_attn.out_proj), (ours.fc1, theirs.linear1),
                        (ours.fc2, theirs.linear2)):
        assert mine.weight.std().item() == pytest.approx(other.weight.std().item(), rel=0.02)
        assert mine.bias.std().item() == pytest.approx(other.bias.std().item(), rel=0.3)
    for linear in (ours.q, ours.k, ours.v, ours.out):
        assert not linear.bias.any()
    assert not theirs.self_attn.in_proj_bias.any()


@pytest.mark.parametrize("method, size, deviation", [
    ("m2ist", "base", 0.0442), ("hivg", "base", 0.0312), ("hivg", "large", 0.0255),
    ("m2ist", "tiny", 0.1021), ("hivg", "tiny", 0.1021)])
def test_the_start_of_attention_at_each_size(method, size, deviation):
    """[D45] sqrt(2 / (C + 3C)) at size base and large, sqrt(2 / (C + C)) at size tiny."""
    C = m.SIZES[size][m.METHODS[method]["encoders"]]["grounding"]["dim"]
    rows = C if size == "tiny" else 3 * C
    assert deviation == pytest.approx((2 / (C + rows)) ** 0.5, abs=1e-4)
    torch.manual_seed(0)
    spec = m.architecture(method, size)
    grounding = m.GroundingEncoder(8, 8, vision_tokens=4, max_tokens=4, **spec["grounding"])
    for layer in grounding.layers:
        for linear in (layer.q, layer.k, layer.v):
            assert linear.weight.std().item() == pytest.approx(deviation, rel=0.02)


def test_attention_map_is_the_weights_that_the_layer_uses():
    """The first token's attention output is out(weights v), and padding has the weight 0."""
    torch.manual_seed(0)
    layer = m.TransformerLayer(8, heads=1, hidden=4)
    x = torch.randn(2, 5, 8)
    position = torch.randn(5, 8)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    weights = layer.attention_map(x, padding, position)
    _, a, _ = layer(x, padding, position)
    by_weights = layer.out(torch.einsum("bn,bnc->bc", weights, layer.v(x)))
    assert torch.allclose(by_weights, a[:, 0], atol=1e-5)
    assert torch.allclose(weights.sum(1), torch.ones(2))
    assert weights[1, 3:].abs().max() == 0


class DoublePlug(torch.nn.Module):
    """Returns twice the output of its port, plus the context, and keeps the x that it was given."""

    def forward(self, output, x, context):
        self.x = x
        return 2 * output + context


@pytest.mark.parametrize("port", ["attention", "ffn"])
def test_an_inserted_module_rewrites_its_port_before_the_residual(port):
    """What a module at a port returns is added to the residual stream in place of a or g."""
    torch.manual_seed(0)
    layer = m.TransformerLayer(8, heads=2, hidden=4, pre_norm=True)
    x = torch.randn(2, 5, 8)
    context = torch.randn(2, 1, 8)
    _, plain_a, plain_g = layer(x)
    layer.plugs[port] = DoublePlug()
    changed_x, a, g = layer(x, context=context)

    if port == "attention":
        assert torch.allclose(a, 2 * plain_a + context, atol=1e-6)
        assert torch.equal(layer.plugs[port].x, x)
    else:
        assert torch.equal(a, plain_a)
        assert torch.allclose(g, 2 * plain_g + context, atol=1e-6)
        assert torch.allclose(layer.plugs[port].x, x + a, atol=1e-6)
    assert torch.allclose(changed_x, x + a + g, atol=1e-6)


# --- The encoders (test_weights.py compares them with transformers') ------------------------------


def test_clip_text_is_causal_and_no_token_sees_padding():
    """What follows a token, words or padding, changes no bit of its features."""
    torch.manual_seed(0)
    text = m.ClipText(60, 16, 24, heads=4, hidden=48, layers=3, embedding=20).eval()
    for p in text.parameters():
        torch.nn.init.normal_(p, std=0.3)
    tokens = torch.randint(2, 59, (1, 9))
    padding = torch.zeros(1, 9, dtype=torch.bool)
    before = text(tokens, padding).states[-1][:, :5]
    tokens[:, 5:] = 3
    padding[:, 5:] = True
    assert torch.equal(text(tokens, padding).states[-1][:, :5], before)


def test_a_patch_is_padding_if_no_pixel_of_it_belongs_to_the_picture():
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


def test_released_checkpoints_mask_a_patch_of_which_more_than_half_is_padding():
    """[D47] Exactly half a patch of padding is not masked."""
    vision = m.ClipVision(64, 8, 16, 2, 32, 1, 16, released_rules=True)
    padding = torch.zeros(1, 64, 64, dtype=torch.bool)
    padding[0, :, :4] = True     # half of the first column of patches
    padding[0, :, 59:] = True    # five of eight pixels of the last one
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[:, 7] = True
    assert torch.equal(vision.patch_padding(padding).view(8, 8), expected)


def test_the_random_weights_of_the_encoders_are_always_the_same():
    """Encoders are drawn from their own seed, and the draw does not move the global generator."""
    for method in ("m2ist", "hivg"):
        spec = m.architecture(method, "tiny")
        torch.manual_seed(1)
        one = torch.nn.ModuleDict(m.build_encoders(spec)).state_dict()
        drawn = torch.rand(3)
        torch.manual_seed(2)
        other = torch.nn.ModuleDict(m.build_encoders(spec)).state_dict()
        for name, value in one.items():
            assert torch.equal(value, other[name]), name
        torch.manual_seed(1)
        assert torch.equal(torch.rand(3), drawn)


# --- One interface for both models ----------------------------------------------------------------


def test_every_method_is_in_a_list_above():
    """A new method needs a place in ON_DETR or ON_CLIP."""
    assert set(ON_DETR + ON_CLIP) == set(m.METHODS)


@pytest.mark.parametrize("name", ["encode_image", "encode_text", "ground", "begin_stage",
                                  "lora_weights", "forward"])
def test_both_models_have_the_same_methods(name):
    """The parameters have the same names, order and defaults in DetrBert and ClipGrounding."""
    on_detr = inspect.signature(getattr(m.DetrBert, name))
    on_clip = inspect.signature(getattr(m.ClipGrounding, name))
    assert on_detr == on_clip


def test_the_text_is_an_optional_argument_of_encode_image():
    """encode_image(images, image_padding, text=None, picture=None)."""
    parameters = inspect.signature(m.DetrBert.encode_image).parameters
    assert list(parameters) == ["self", "images", "image_padding", "text", "picture"]
    assert parameters["text"].default is None
    assert parameters["picture"].default is None


@pytest.mark.parametrize("method", ON_DETR + ON_CLIP)
def test_forward_is_encode_text_encode_image_and_ground(method):
    """The three calls together are the model, for every method."""
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


@pytest.mark.parametrize("method", ON_DETR)
def test_the_vision_encoder_of_detr_needs_no_text(method):
    """One encoded picture serves any number of texts."""
    model = tiny(method).eval()
    images, image_padding, tokens, token_padding = inputs()
    text = model.encode_text(tokens, token_padding)
    alone = model.encode_image(images, image_padding)
    assert torch.equal(alone.x, model.encode_image(images, image_padding, text).x)


@pytest.mark.parametrize("method", ["m2ist", "hivg"])
def test_a_model_on_the_meta_device_gives_the_shapes(method):
    """A full-size model runs without memory, because no value is looked at."""
    model = meta(method)
    side = model.spec["image_size"]
    with torch.device("meta"):
        images = torch.empty(2, 3, side, side)
        image_padding = torch.zeros(2, side, side, dtype=torch.bool)
        tokens = torch.zeros(2, 20, dtype=torch.long)
        token_padding = torch.zeros(2, 20, dtype=torch.bool)
        assert model(images, image_padding, tokens, token_padding).boxes.shape == (2, 4)


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
    pictures = model.vision(images, image_padding)
    texts = model.text(tokens, token_padding)
    s_v = pictures.x0
    s_l = texts.x0
    for pair in (1, 2):
        iea = model.adapters.blocks[pair - 1]["attention"]
        ea = model.adapters.blocks[pair - 1]["ffn"]
        ports = pictures.ports[pair - 1]          # vision layers 1 and 2
        s_v = s_v + iea.vision(ports["attention"]) + ea.vision(ports["ffn"])
        ports = texts.ports[pair + 2 - 1]         # text layers 3 and 4
        s_l = s_l + iea.text(ports["attention"]) + ea.text(ports["ffn"])
    found_v = model.encode_image(images, image_padding)
    found_l = model.encode_text(tokens, token_padding)
    assert torch.allclose(found_v.x, pictures.x + s_v, atol=1e-5)
    assert torch.allclose(found_l.x, texts.x + s_l, atol=1e-5)


def test_a_side_network_may_start_at_its_first_paired_layer():
    """D6: s_0 of the text is then x_2, the input of layer 3; vision starts as before."""
    plain = tiny().eval()
    paired = tiny(side_start="paired").eval()
    images, image_padding, tokens, token_padding = inputs()
    texts = plain.text(tokens, token_padding)
    moved = texts.states[1] - texts.x0    # x_2 - x_0
    before = plain.encode_text(tokens, token_padding).x
    assert torch.allclose(paired.encode_text(tokens, token_padding).x, before + moved, atol=1e-5)
    assert torch.equal(paired.encode_image(images, image_padding).x,
                       plain.encode_image(images, image_padding).x)


def test_m2ist_puts_reg_the_text_and_the_picture_in_one_sequence():
    """M²IST Section III-A c: [REG], the projected text, the projected picture."""
    model = tiny().eval()
    images, image_padding, tokens, token_padding = inputs()
    text = model.encode_text(tokens, token_padding)
    vision = model.encode_image(images, image_padding)
    grounding = model.grounding
    x, padding, position, cells = grounding.sequence(vision, text)
    assert torch.equal(x[:, 0], grounding.reg.expand(3, -1))
    assert torch.allclose(x[:, 1:10], grounding.text_projection(text.x), atol=1e-5)
    assert torch.allclose(x[:, 10:], grounding.vision_projection(vision.x), atol=1e-5)
    assert not padding[:, 0].any()
    assert torch.equal(padding[:, 1:10], token_padding)
    assert torch.equal(padding[:, 10:], vision.padding)
    assert x[:, cells].shape == (3, 64, 96)
    # A trimmed text leaves the picture's positions where they are after 20 tokens of text.
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
    W = grounding.vision_projection.weight
    b = grounding.vision_projection.bias
    assert torch.allclose(x[:, 1:66], vision.x @ W.T + b, atol=1e-4)         # HiVG Eq. (1)
    final = model.clip.text.projection(model.clip.text.norm(text.states[-1]))
    W = grounding.text_projection.weight
    b = grounding.text_projection.bias
    assert torch.allclose(x[:, 66:], final @ W.T + b, atol=1e-4)             # g_l

    assert x.shape[1] == len(position) == 1 + 65 + 9
    assert cells == slice(2, 66)
    assert not padding[:, :2].any()
    assert torch.equal(padding[:, 1:66], vision.padding)
    assert torch.equal(padding[:, 66:], token_padding)
    assert vision.padding[2].sum() == 16


def test_a_layer_of_hivg_is_eqs_7_and_8():
    """h = W f + α/r B A f on q, k, v and out; the bridge adds f_v^sa after the attention."""
    model = tiny("hivg", bridge_layers=[2], rank=4, alpha=8.0).eval()
    images, image_padding, tokens, token_padding = inputs()
    model.begin_stage(1)
    for _, _, pair in hilora.find_pairs(model):
        torch.nn.init.normal_(pair.B, std=0.1)
    text = model.encode_text(tokens, token_padding)
    texts = list(text.states)
    encoded = model.clip.vision(images, image_padding, (texts, token_padding))

    def with_pair(linear, f):
        assert isinstance(linear, hilora.LoRALinear)
        return f @ linear.weight.T + linear.bias + 8 / 4 * f @ linear.A.T @ linear.B.T

    def heads(f):
        return f.unflatten(-1, (4, 16)).transpose(1, 2)    # (B, heads, N, C / heads)

    layer = model.clip.vision.layers[1]
    bridge = bridges(model)[0]
    f = encoded.states[0]
    h = layer.norm1(f)
    q = heads(with_pair(layer.q, h))
    k = heads(with_pair(layer.k, h))
    v = heads(with_pair(layer.v, h))
    weights = (q @ k.transpose(-2, -1) / math.sqrt(16)).softmax(-1)
    attended = (weights @ v).transpose(1, 2).flatten(2)
    f = f + with_pair(layer.out, attended)
    f = f + bridge.semantic(f, texts, token_padding)    # f_v + f_v^sa
    f = f + layer.fc2(layer.activation(layer.fc1(layer.norm2(f))))
    assert torch.allclose(encoded.states[1], f, atol=1e-4)

    # Layer 3 is in group 2, l > j L / G: W alone.
    assert type(model.clip.vision.layers[2].q) is torch.nn.Linear


def test_the_scores_of_hivg_are_eq_12():
    """A score is the dot product of the normalised [EOS] token and the MLP of a cell."""
    model = tiny("hivg").train()
    batch = inputs()
    seen = []

    def keep_output(module, args, output):
        seen.append(output)

    model.grounding.norm.register_forward_hook(keep_output)
    found = model(*batch)
    x = seen[0]
    region = model.grounding.region
    for b in range(3):
        length = int((~batch[3][b]).sum())
        eos = 1 + 65 + length - 1
        t = x[b, eos] / x[b, eos].norm()
        for cell in (0, 17, 63):
            h = region.fc1(region.norm(x[b, 2 + cell]))
            score = t @ region.fc2(h * torch.sigmoid(1.702 * h))
            assert found.scores[b, cell].item() == pytest.approx(score.item(), abs=1e-4)


def test_hivg_returns_what_its_constraints_need():
    """Padding by cell, CLIP's embeddings, and the temperature; no scores outside of training."""
    model = tiny("hivg").train()
    images, image_padding, tokens, token_padding = inputs()
    found = model(images, image_padding, tokens, token_padding)
    rows = found.padding[2].view(8, 8)
    assert rows[:2].all()
    assert found.padding.sum() == 8 + 16
    assert found.temperature.item() == pytest.approx(0.07, rel=1e-4)
    text = model.encode_text(tokens, token_padding)
    assert torch.equal(found.text, text.embedding)
    vision = model.encode_image(images, image_padding, text)
    assert torch.equal(found.image, vision.embedding)
    assert model.eval()(images, image_padding, tokens, token_padding).scores is None


def test_the_bridge_lets_the_text_into_the_vision_tower():
    """Another text changes the vision layers from the first bridge, in layer 2, on."""
    model = tiny("hivg").eval()
    images, image_padding, tokens, token_padding = inputs()
    text = model.encode_text(tokens, token_padding)
    swapped = model.encode_text(tokens.flip(1), token_padding)
    here = model.clip.vision(images, image_padding, (text.states, token_padding))
    there = model.clip.vision(images, image_padding, (swapped.states, token_padding))
    same = []
    for one, other in zip(here.states, there.states):
        same.append(torch.allclose(one, other, atol=1e-6))
    assert same == [True, False, False, False, False, False]
    for bridge in bridges(model):
        assert isinstance(bridge, adapters.CrossModalBridge)


def test_without_bridges_the_text_does_not_reach_the_picture():
    """Another text changes no bit of clip-lora's vision features."""
    model = tiny("clip-lora").eval()
    images, image_padding, tokens, token_padding = inputs()
    text = model.encode_text(tokens, token_padding)
    swapped = model.encode_text(tokens.flip(1), token_padding)
    assert torch.equal(model.encode_image(images, image_padding, text).x,
                       model.encode_image(images, image_padding, swapped).x)


# --- What is computed once, or not at all ---------------------------------------------------------


@pytest.mark.parametrize("pre_norm", [False, True])
def test_a_layer_computes_its_first_tokens_as_it_computes_all(pre_norm):
    """With first=2, outputs and gradients are those of the first two tokens of the whole."""
    torch.manual_seed(0)
    layer = m.TransformerLayer(16, 4, 32, pre_norm=pre_norm).double()
    x = torch.randn(3, 7, 16, dtype=torch.float64, requires_grad=True)
    position = torch.randn(7, 16, dtype=torch.float64)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 4:] = True
    found = []
    for first in (None, 2):
        outputs = layer(x, padding, position, first=first)
        outputs = [output[:, :2] for output in outputs]
        weighted = sum((output * (k + 1)).sin().sum() for k, output in enumerate(outputs))
        found.append([*outputs, *torch.autograd.grad(weighted, [x, *layer.parameters()])])
    for whole, part in zip(*found):
        torch.testing.assert_close(part, whole, rtol=0, atol=1e-12)


def in_double(method, **options):
    """A tiny model in float64, and the arguments of a batch of two pictures with five texts."""
    model = tiny(method, **options).double()
    images, image_padding, _, _ = inputs(2)
    _, _, tokens, token_padding = inputs(5, text=12)
    return model, images.double(), image_padding, tokens, token_padding


def outputs_and_gradients(model, *batch, **options):
    """Boxes, and scores where there are any, of a batch, and the gradients of all that is tuned."""
    grounding = model(*batch, **options)
    outputs = [grounding.boxes]
    if grounding.scores is not None:
        outputs.append(grounding.scores)
    tuned = [p for p in model.parameters() if p.requires_grad]
    weighted = sum((output * 3).sin().sum() for output in outputs)
    gradients = torch.autograd.grad(weighted, tuned, allow_unused=True)
    return outputs + [g for g in gradients if g is not None]


@pytest.mark.parametrize("method", ["m2ist", "hivg"])
def test_the_last_grounding_layer_needs_no_token_but_reg(method, monkeypatch):
    """Boxes and gradients are those of a layer that computes all of its tokens."""
    options = {"region_text": False} if method == "hivg" else {}
    model, *batch = in_double(method, **options)
    picture = torch.tensor([0, 0, 1, 1, 1])
    found = outputs_and_gradients(model, *batch, picture)

    asked = []
    real = m.TransformerLayer.forward

    def compute_all(layer, x, padding=None, position=None, context=None, first=None):
        asked.append(first)
        return real(layer, x, padding, position, context)

    monkeypatch.setattr(m.TransformerLayer, "forward", compute_all)
    whole = outputs_and_gradients(model, *batch, picture)
    assert asked[-1] == 1 and set(asked[:-1]) == {None}
    for one, other in zip(found, whole):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_the_region_text_constraint_sees_all_tokens():
    """In its training HiVG computes all tokens in the last layer; in evaluation [REG] alone."""
    model, *batch = in_double("hivg")
    seen = []
    model.grounding.layers[-1].register_forward_hook(
        lambda layer, arguments, output: seen.append(output[0].shape[1]))
    for training in (True, False):
        model.train(training)(*batch, torch.tensor([0, 0, 1, 1, 1]))
    assert seen == [1 + 65 + 12, 1]    # [REG], [CLS] and 64 cells, the text


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", ["m2ist", "full", "cm-adapter", "clip-frozen", "hivg"])
def test_texts_that_share_a_picture_are_as_if_each_had_its_own(method, training):
    """Two pictures with five texts, and five pictures of which some are the same: boxes, scores and
    gradients are equal."""
    model, images, image_padding, tokens, token_padding = in_double(method)
    model.train(training)
    picture = torch.tensor([0, 0, 1, 1, 1])
    shared = outputs_and_gradients(model, images, image_padding, tokens, token_padding, picture)
    alone = outputs_and_gradients(model, images[picture], image_padding[picture], tokens,
                                  token_padding)
    assert len(shared) == len(alone)
    for one, other in zip(shared, alone):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method, layers", [("m2ist", 2), ("hivg", 1), ("clip-lora", 6)])
def test_what_sees_no_text_runs_once_for_each_picture(method, layers):
    """On DETR that is the whole vision tower; in HiVG the layers below the first bridge, in layer 2;
    without bridges all layers."""
    model, *batch = in_double(method)
    tower = model.vision if method == "m2ist" else model.clip.vision
    samples = []
    for layer in tower.layers:
        layer.register_forward_hook(lambda layer, arguments, output: samples.append(len(output[0])))
    model.eval()(*batch, torch.tensor([0, 0, 1, 1, 1]))
    assert samples == [2] * layers + [5] * (len(tower.layers) - layers)


# --- A box depends on its own picture and text alone ----------------------------------------------


@pytest.mark.parametrize("method", ["m2ist", "frozen", "full"])
def test_a_box_is_the_same_alone_in_a_batch_and_with_longer_padding(method):
    """The text is trimmed, as in the batch, and padded far beyond max_tokens."""
    model = tiny(method).eval()
    batch = inputs()
    with torch.no_grad():
        together = model(*batch, attention=True)
        for i in range(3):
            length = int((~batch[3][i]).sum())
            for text in (length, 9, 20, 30):
                alone = model(*one_sample(batch, i, text), attention=True)
                assert largest_difference(alone.boxes[0], together.boxes[i]) <= 1e-5
                assert largest_difference(alone.attention[0], together.attention[i]) <= 1e-5
    assert together.attention.shape == (3, 64)


@pytest.mark.parametrize("training", [False, True])
def test_a_box_of_hivg_is_the_same_alone_in_any_batch_and_with_longer_padding(training):
    """[D14] The released bridge mixes the samples of a batch; here other samples change nothing."""
    model = tiny("hivg", stages=2, rank=4, alpha=8.0).train(training)    # tiny has no dropout
    model.begin_stage(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith((".B", ".weights")):
                torch.nn.init.normal_(p, std=0.3)

        batch = inputs()
        others = inputs(seed=5)
        for i in range(3):
            # Sample i among the samples of its batch, and among other samples.
            neighbours = [part.clone() for part in others]
            for part, own in zip(neighbours, batch):
                part[i] = own[i]
            together = [model(*batch, attention=True), model(*neighbours, attention=True)]

            length = int((~batch[3][i]).sum())
            for text in (length, 9, 20, 77):
                alone = model(*one_sample(batch, i, text), attention=True)
                for found in together:
                    assert largest_difference(alone.boxes[0], found.boxes[i]) <= 1e-5
                    assert largest_difference(alone.attention[0], found.attention[i]) <= 1e-5
                    if training:
                        assert largest_difference(alone.scores[0], found.scores[i]) <= 1e-4

            # The box is no constant: another sample has another box.
            assert largest_difference(model(*others).boxes[i], together[0].boxes[i]) > 1e-4


def test_what_is_padding_does_not_reach_the_box():
    """Other tokens under the padding, and other features of padded cells, change no box."""
    model = tiny().eval()
    images, image_padding, tokens, token_padding = inputs()
    with torch.no_grad():
        before = model(images, image_padding, tokens, token_padding).boxes
        other = tokens.masked_fill(token_padding, 77)
        after = model(images, image_padding, other, token_padding).boxes
        assert largest_difference(after, before) <= 1e-6

        text = model.encode_text(tokens, token_padding)
        vision = model.encode_image(images, image_padding)
        assert vision.padding[2].sum() == 16
        x = vision.x.masked_fill(vision.padding[..., None], 9.0)
        after = model.ground(vision._replace(x=x), text).boxes
        assert largest_difference(after, before) <= 1e-6


# --- What a training step changes -----------------------------------------------------------------


def train_step(model):
    """One step on the boxes."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2)
    losses.box_loss(model(*inputs()).boxes, torch.rand(3, 4)).backward()
    optimizer.step()


def test_a_step_of_m2ist_changes_what_is_tuned_and_no_bit_of_the_encoders():
    """Encoders have no gradients and stay as they are; every other parameter has one and moves."""
    model = tiny().train()
    before = copy.deepcopy(model.state_dict())
    train_step(model)
    for name, p in model.named_parameters():
        if name.startswith(("vision.", "text.")):
            assert not p.requires_grad
            assert p.grad is None
        else:
            assert p.grad is not None, name
            assert p.grad.abs().sum() > 0, name
    for name, value in model.state_dict().items():
        is_frozen = name.startswith(("vision.", "text."))
        assert torch.equal(value, before[name]) == is_frozen, name


@pytest.mark.parametrize("method, has_graph", [("m2ist", False), ("frozen", False), ("full", True)])
def test_no_graph_is_built_through_frozen_encoders(method, has_graph):
    """A picture that asks for a gradient gets one through trained encoders only."""
    model = tiny(method).train()
    images, image_padding, tokens, token_padding = inputs()
    images.requires_grad_()
    seen = []

    def keep_output(module, args, output):
        seen.append(output)

    model.vision.register_forward_hook(keep_output)
    model.text.register_forward_hook(keep_output)
    boxes = model(images, image_padding, tokens, token_padding).boxes
    boxes.sum().backward()
    assert len(seen) == 2
    for encoded in seen:
        assert encoded.x.requires_grad == has_graph
        for ports in encoded.ports:
            for output in ports.values():
                assert output.requires_grad == has_graph
    assert (images.grad is not None) == has_graph


def test_full_trains_every_parameter():
    """With full fine-tuning a box depends on each parameter of the encoders."""
    model = tiny("full").train()
    train_step(model)
    for name, p in model.named_parameters():
        assert p.grad is not None, name


def test_frozen_encoders_stay_in_eval_mode_and_trained_ones_do_not():
    """[D7] model.train() leaves frozen encoders in eval mode."""
    model = tiny().train()
    assert not model.vision.training
    assert not model.text.training
    assert model.grounding.training
    assert model.adapters.training
    full = tiny("full").train()
    assert full.vision.training
    assert full.text.training
    full.eval()
    assert not full.vision.training
    assert not full.text.training


# --- The stages of LoRA ---------------------------------------------------------------------------


def hivg_steps(model):
    """Two steps on all losses of HiVG. At the first step A has no gradient, because B is 0."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        found = model(*inputs())
        losses.total_loss(found, torch.rand(3, 4), l1=2, giou=2, contrast=1, focal=20,
                          dice=2).backward()
        optimizer.step()


def changed_names(model, before):
    """The names in both state dicts whose values differ."""
    changed = set()
    for name, value in model.state_dict().items():
        if name in before and not torch.equal(value, before[name]):
            changed.add(name)
    return changed


def pairs_of_stage(stage, deep_to_shallow):
    """The linears of tiny HiVG that stage j adapts: 2 j of the 6 vision layers, all text layers."""
    vision = [1, 2, 3, 4, 5, 6]
    if deep_to_shallow:
        vision.reverse()
    pairs = set()
    for tower, layers in (("vision", vision[:2 * stage]), ("text", [1, 2, 3])):
        for layer in layers:
            for linear in ("q", "k", "v", "out"):
                pairs.add(f"clip.{tower}.layers.{layer - 1}.{linear}")
    return pairs


@pytest.mark.parametrize("deep_to_shallow", [False, True])
def test_a_stage_of_hivg_changes_its_pairs_and_no_bit_of_the_rest_of_clip(deep_to_shallow):
    """Warm-up, then begin_stage(j), training and merge for j = 1, 2, 3."""
    model = tiny("hivg", rank=4, alpha=8.0, deep_to_shallow=deep_to_shallow).train()
    start = copy.deepcopy(model.state_dict())
    outside = {name for name in start if not name.startswith("clip.") or ".plugs." in name}
    assert model.stage == 0

    # The warm-up trains all of the bridges and of the grounding encoder.
    hivg_steps(model)
    assert changed_names(model, start) == outside

    for stage in (1, 2, 3):
        before = copy.deepcopy(model.state_dict())
        boxes = model.eval()(*inputs()).boxes
        model.begin_stage(stage)
        assert model.stage == stage
        assert torch.equal(model(*inputs()).boxes, boxes)    # ΔW = 0 when a stage starts

        pairs = pairs_of_stage(stage, deep_to_shallow)
        parts = {f"{pair}.{part}" for pair in pairs for part in "AB"}
        assert trained_names(model) == outside | parts

        # W itself is not touched before the merge.
        hivg_steps(model.train())
        assert changed_names(model, before) == outside
        for part in parts:
            assert model.get_parameter(part).abs().max() > 0

        trained_boxes = model.eval()(*inputs()).boxes
        hilora.merge(model)
        assert largest_difference(model(*inputs()).boxes, trained_boxes) <= 1e-5
        merged = {f"{pair}.weight" for pair in pairs}
        assert changed_names(model, before) - outside == merged

    # Nothing is left of LoRA.
    assert not hilora.find_pairs(model)
    assert set(model.state_dict()) == set(start)
    assert m.count_parameters(model) == m.count_parameters(tiny("hivg"))


@pytest.mark.parametrize("method, options, stages", [
    ("hivg", {}, 3),
    ("hivg", {"deep_to_shallow": True}, 3),
    ("hivg", {"stages": 6}, 6),
    ("clip-lora", {}, 1),
    ("lora", {}, 1),
    ("m2ist+lora", {}, 1),
    ("m2ist+lora", {"stages": 2}, 2),
])
def test_lora_weights_are_those_that_merging_up_to_the_stage_changes(method, options, stages):
    """They are named before the merge, and no other encoder weight differs from its start."""
    model = tiny(method, **options)
    model.begin_stage(0)
    assert model.lora_weights() == []
    start = copy.deepcopy(model.state_dict())
    for stage in range(1, stages + 1):
        model.begin_stage(stage)
        named = model.lora_weights()
        for _, _, pair in hilora.find_pairs(model):
            torch.nn.init.normal_(pair.B)
        hilora.merge(model)
        assert changed_names(model, start) == set(named)
        assert len(set(named)) == len(named)
        assert model.lora_weights() == named


def test_a_model_that_stops_between_stages_can_go_on_in_a_fresh_one():
    """Merged weights that are loaded into a fresh model are what begin_stage(2) continues."""
    model = tiny("hivg", rank=4)
    model.begin_stage(1)
    hivg_steps(model)
    hilora.merge(model)
    fresh = tiny("hivg", rank=4)
    fresh.load_state_dict(model.state_dict())
    fresh.begin_stage(2)
    model.begin_stage(2)
    assert trained_names(fresh) == trained_names(model)
    assert torch.equal(fresh.eval()(*inputs()).boxes, model.eval()(*inputs()).boxes)


def test_begin_stage_takes_out_the_pairs_that_are_left():
    """Pairs that were not merged leave the weights as they were."""
    model = tiny("hivg")
    before = copy.deepcopy(model.state_dict())
    model.begin_stage(1)
    for _, _, pair in hilora.find_pairs(model):
        torch.nn.init.normal_(pair.B)
    model.begin_stage(0)
    assert model.stage == 0
    assert not hilora.find_pairs(model)
    assert set(model.state_dict()) == set(before)
    assert changed_names(model, before) == set()


def test_the_pairs_of_lora_are_on_q_and_v_of_each_layer():
    """[D39] The tiny size has two vision layers and four text layers."""
    model = tiny("lora")
    assert model.stage == 1
    expected = set()
    for layer in ("vision.layers.0", "vision.layers.1", "text.layers.0", "text.layers.1",
                  "text.layers.2", "text.layers.3"):
        for part in ("q.A", "q.B", "v.A", "v.B"):
            expected.add(f"{layer}.{part}")
    trained = {name for name in trained_names(model) if not name.startswith("grounding.")}
    assert trained == expected


def test_the_encoders_of_lora_carry_a_graph_and_those_of_frozen_do_not():
    """The gradients of a pair pass through the encoder, which stays in eval mode."""
    model = tiny("lora").train()
    assert not model.vision.training
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        train_step(model)
    changed = changed_names(model, before)
    assert changed == trained_names(model)


# --- Numbers of parameters ------------------------------------------------------------------------


@pytest.mark.parametrize("bottleneck, unique", [(128, 2_975_232), (32, 1_794_432), (8, 1_499_232)])
def test_encoder_tunable_parameters_of_m2ist(bottleneck, unique):
    """M²IST's Table II has 3.19M, 2.20M and 1.91M, with some parameters counted twice."""
    model = meta("m2ist", bottleneck=bottleneck)
    assert m.count_parameters(model)["encoder_tunable"] == unique
    assert count(model.adapters) == unique


def test_the_papers_way_to_count_m2ist_gives_the_papers_figure():
    """[D11] 3.19M is 2,975,232, the shared projections again, and a second norm in VEA and LEA."""
    model = meta("m2ist")
    shared = 0
    norms = 0
    for block in model.adapters.blocks:
        shared += count(block["attention"].shared_up)
        norms += count(block["ffn"].vea.norm, block["ffn"].lea.norm)
    assert 2_975_232 + shared + norms == 3_185_664


def test_counts_of_detr_and_bert():
    """ResNet-50, DETR's encoder, BERT without its pooler, and the V-L encoder."""
    model = meta("frozen")
    assert count(model.vision) == 31_869_888
    assert count(model.vision.backbone) == 23_454_912
    assert count(model.vision.projection) == 524_544
    assert count(model.vision.layers) == 7_890_432
    assert count(model.text) == 108_891_648
    with torch.device("meta"):
        bert = transformers.BertModel(transformers.BertConfig())
    assert count(bert) == 109_482_240
    assert count(bert) - count(bert.pooler) == count(model.text)
    assert count(model.grounding) == 8_393_732


@pytest.mark.parametrize("method, tunable", [
    ("frozen", 0),
    ("full", 31_869_888 + 108_891_648),    # [D10]
    ("lora", 2_365_440),                   # M²IST's Table I has 2.37M
    ("m2ist", 2_975_232),
    ("m2ist+lora", 2_975_232 + 2_365_440),
    ("clip-frozen", 0),
    ("clip-lora", 0),                      # in its warm-up
    ("hivg", 36_836_352),                  # in its warm-up: the bridges
])
def test_encoder_tunable_parameters_of_a_method_as_it_is_built(method, tunable):
    """build_model gives what its name says; on CLIP this is the warm-up without LoRA."""
    assert m.count_parameters(meta(method))["encoder_tunable"] == tunable


def test_counts_add_up():
    """total is all, trainable is encoder_tunable and the grounding encoder with its head."""
    frozen = m.count_parameters(meta("frozen"))
    assert frozen == {"total": 149_155_268, "trainable": 8_393_732, "encoder_tunable": 0}
    lora = m.count_parameters(meta("m2ist+lora"))
    assert lora["encoder_tunable"] == 5_340_672
    assert lora["trainable"] == 8_393_732 + 5_340_672
    assert lora["total"] == 149_155_268 + 5_340_672


def lora_counts(model, stages):
    """For each stage, the parameters of the pairs in the vision tower and in the text tower."""
    found = []
    for stage in range(1, stages + 1):
        model.begin_stage(stage)
        counts = []
        for tower in (model.clip.vision, model.clip.text):
            total = 0
            for _, _, pair in hilora.find_pairs(tower):
                total += pair.A.numel() + pair.B.numel()
            counts.append(total)
        found.append(tuple(counts))
        hilora.merge(model)
    return found


def test_counts_of_the_parts_of_hivg_base():
    """A bridge, the grounding encoder, the region-text MLP and the box head."""
    model = meta("hivg")
    assert count(*bridges(model)) == 36_836_352
    assert count(model.clip) - 36_836_352 == 149_620_737

    bridge = bridges(model)[0]
    assert count(bridge) == 12_278_784
    assert count(bridge.norm) == 1_536
    assert count(bridge.q, bridge.k, bridge.v, bridge.out) == 2_362_368
    assert count(bridge.fc1, bridge.fc2) == 4_722_432
    assert count(bridge.projection) == 4_719_360
    assert bridge.weights.numel() == 473_088

    grounding = model.grounding
    assert count(grounding.layers, grounding.norm) == 18_915_328
    assert count(grounding.vision_projection) == 1_573_376
    assert count(grounding.text_projection) == 262_656
    assert count(grounding.head) == 527_364
    assert count(grounding.region) == 3_149_312 + 1_024
    assert grounding.position.shape == (275, 512)


def test_counts_of_hivg_base_and_of_its_stages():
    """[D23] HiVG's Table 7 has 206M in all, of which 41M are updated."""
    model = meta("hivg")
    assert m.count_parameters(model) == {
        "total": 211_027_461, "trainable": 61_406_724, "encoder_tunable": 36_836_352}
    assert lora_counts(model, 3) == [
        (786_432, 1_572_864), (1_572_864, 1_572_864), (2_359_296, 1_572_864)]
    assert m.count_parameters(model)["total"] == 211_027_461    # nothing is left of LoRA

    # 41M: the bridges and LoRA's last stage.
    assert 36_836_352 + 2_359_296 + 1_572_864 == 40_768_512
    # 206M: CLIP, bridges, the layers of the grounding encoder, the box head.
    assert 149_620_737 + 36_836_352 + 18_915_328 + 527_364 == 205_899_781


def test_counts_of_hivg_large_and_of_its_stages():
    """[D23] Table 7 has 468M and 52M, which four bridges of twelve text layers alone exceed."""
    model = meta("hivg", "large")
    assert count(bridges(model)[0]) == 22_742_016
    assert count(*bridges(model)) == 90_968_064
    assert count(model.clip) - 90_968_064 == 427_616_513
    assert count(model.grounding.layers, model.grounding.norm) == 33_085_440
    assert model.grounding.position.shape == (335, 768)
    assert m.count_parameters(model) == {
        "total": 561_573_381, "trainable": 133_956_868, "encoder_tunable": 90_968_064}
    assert lora_counts(model, 4) == [
        (1_572_864, 2_359_296), (3_145_728, 2_359_296), (4_718_592, 2_359_296),
        (6_291_456, 2_359_296)]


def test_the_share_of_clip_that_lora_trains_is_the_papers():
    """[D25] HiVG's Appendix B has 1.98% for the last stage of L."""
    pairs = 6_291_456 + 2_359_296
    share = 100 * pairs / (427_616_513 + pairs)
    assert round(share, 2) == 1.98


@pytest.mark.parametrize("method", ["clip-frozen", "clip-lora"])
def test_plain_clip_has_no_bridge_and_no_region_text_mlp(method):
    """HiVG Fig. 4 (d): the features of the last layer, and nothing of HiVG's in CLIP."""
    model = meta(method)
    assert bridges(model) == []
    assert model.levels == [12]
    assert model.grounding.region is None
    assert m.count_parameters(model)["encoder_tunable"] == 0


def test_bridges_are_where_the_options_put_them():
    """Three by default, none if the list is empty, four small ones as in the released code."""
    assert len(bridges(meta("hivg"))) == 3
    assert bridges(meta("hivg", bridge_layers=[])) == []
    released = meta("hivg", bridge_layers=[1, 4, 8, 12], text_layers=[12])
    assert [count(bridge) for bridge in bridges(released)] == [7_519_744] * 4


# --- What a stage trains --------------------------------------------------------------------------

GROUNDING_OF_HIVG = 61_406_724 - 36_836_352
TEXT_PAIRS = "LoRA pairs on q/k/v/out of text layers 1 2 3 4 5 6 7 8 9 10 11 12"


def test_what_hivg_trains_in_its_warm_up():
    """Stage 0: the bridges and the grounding encoder."""
    assert m.what_trains("hivg", stage=0) == {
        "cross-modal bridges at vision layers 4 8 12": 36_836_352,
        "grounding encoder and box head": GROUNDING_OF_HIVG}


@pytest.mark.parametrize("stage, layers, pairs", [
    (1, "1 2 3 4", 786_432),
    (2, "1 2 3 4 5 6 7 8", 1_572_864),
    (3, "1 2 3 4 5 6 7 8 9 10 11 12", 2_359_296),
])
def test_what_hivg_trains_in_a_stage(stage, layers, pairs):
    """HiVG Eq. (6): stage j also trains pairs in the vision layers l <= 12 j / 3."""
    assert m.what_trains("hivg", stage=stage) == {
        "cross-modal bridges at vision layers 4 8 12": 36_836_352,
        f"LoRA pairs on q/k/v/out of vision layers {layers}": pairs,
        TEXT_PAIRS: 1_572_864,
        "grounding encoder and box head": GROUNDING_OF_HIVG}


def test_what_hivg_trains_follows_its_options():
    """The size, the number of stages and the order of the layers are respected."""
    large = m.what_trains("hivg", stage=1, size="large")
    assert large["LoRA pairs on q/k/v/out of vision layers 1 2 3 4 5 6"] == 1_572_864
    deep = m.what_trains("hivg", stage=1, stages=6, deep_to_shallow=True)
    assert deep["LoRA pairs on q/k/v/out of vision layers 11 12"] == 2 * 4 * 32 * (768 + 768)


@pytest.mark.parametrize("method, stage, encoders", [
    ("frozen", 0, {}),
    ("full", 0, {"vision encoder": 31_869_888, "text encoder": 108_891_648}),
    ("m2ist", 0, {"adapters": 2_975_232}),
    ("lora", 1, {"LoRA pairs on q/v of vision layers 1 2 3 4 5 6": 6 * 2 * 55 * (256 + 256),
                 "LoRA pairs on q/v of text layers 1 2 3 4 5 6 7 8 9 10 11 12":
                     12 * 2 * 55 * (768 + 768)}),
    ("m2ist+lora", 1, {"LoRA pairs on q/v of vision layers 1 2 3 4 5 6": 337_920,
                       "LoRA pairs on q/v of text layers 1 2 3 4 5 6 7 8 9 10 11 12": 2_027_520,
                       "adapters": 2_975_232}),
])
def test_what_a_method_on_detr_trains(method, stage, encoders):
    """The grounding encoder and the groups of the method."""
    expected = {"grounding encoder and box head": 8_393_732, **encoders}
    assert m.what_trains(method, stage) == expected


@pytest.mark.parametrize("method", ON_DETR + ON_CLIP)
def test_the_groups_are_all_that_is_trained(method):
    """No parameter is in two groups or in none."""
    model = meta(method)
    assert sum(m.tuned_groups(model).values()) == m.count_parameters(model)["trainable"]


@pytest.mark.parametrize("method, stage", [("hivg", 4), ("hivg", -1), ("m2ist", 1), ("lora", 2)])
def test_a_stage_that_a_method_does_not_have_is_refused(method, stage):
    """The error names the stages that there are."""
    with pytest.raises(InputError, match=rf"stages 0 \.\. \d, no stage {stage}"):
        m.what_trains(method, stage)


# --- Methods and options --------------------------------------------------------------------------


def test_no_two_methods_are_the_same_row():
    """LoRA is part of its method: lora differs from frozen, m2ist+lora from m2ist."""
    rows = list(m.METHODS.values())
    for i, row in enumerate(rows):
        for other in rows[:i]:
            assert row != other
    assert m.METHODS["lora"] is not m.METHODS["frozen"]


def test_adapter_options_reach_the_adapters():
    """C_d, C_i, s and the residual arrive in the layers that they are options of."""
    model = tiny(bottleneck=5, interaction_dim=32, interaction_bottleneck=7, scale=0.5,
                 residual=True, text_layers=[1, 3])
    iea = model.adapters.blocks[0]["attention"]
    ea = model.adapters.blocks[0]["ffn"]
    assert ea.vea.down.out_features == 5
    assert ea.lea.scale == 0.5
    assert ea.vea.residual is True
    assert iea.text_down.out_features == 7
    assert iea.shared_up.out_features == 32
    assert iea.scale == 0.5
    assert iea.residual is True
    assert model.adapters.layers["text"] == [1, 3]


def test_lora_options_reach_the_pairs():
    """r, and α / r as the scale of a pair."""
    model = tiny("m2ist+lora", rank=5, alpha=15.0)
    for _, _, pair in hilora.find_pairs(model):
        assert pair.A.shape[0] == 5
        assert pair.scale == 3.0


def test_an_option_that_is_none_is_not_given():
    """build_model(bottleneck=None) takes the default of the size."""
    model = tiny(bottleneck=None, max_tokens=None)
    assert model.spec["bottleneck"] == 32
    assert model.spec["max_tokens"] == 20


@pytest.mark.parametrize("arguments, words", [
    (("nothing", "tiny", "random"), ["--method", "m2ist", "nothing"]),
    (("m2ist", "huge", "random"), ["--size", "tiny", "huge"]),
    (("m2ist", "large", "random"), ["--size", "base, tiny"]),
    (("m2ist", "tiny", "pretrained"), ["--weights", "tiny", "shapes"]),
    (("m2ist", "base", "shapes"), ["--weights", "base", "pretrained"]),
    (("m2ist", "tiny", "none"), ["--weights", "random", "none"]),
])
def test_unknown_arguments_are_named(arguments, words):
    """The error names the argument and the valid values."""
    with pytest.raises(InputError) as error:
        m.build_model(*arguments)
    for word in words:
        assert word in str(error.value)


def test_an_unknown_option_is_named():
    """A misspelt option is an error, and the error lists the options."""
    with pytest.raises(InputError, match="unknown option 'bottlenek'.*bottleneck"):
        tiny(bottlenek=3)


@pytest.mark.parametrize("method, option, message", [
    ("hivg", {"bottleneck": 5}, "--bottleneck is for .*adapter.*, not for --method hivg"),
    ("frozen", {"bottleneck": 5}, "--bottleneck is for .*adapter.*, not for --method frozen"),
    ("adapter", {"residual": True}, "--residual is for side networks.*, not for --method adapter"),
    ("m2ist", {"vision_layers": [1]}, "--vision-layers is for methods on CLIP, not for"),
    ("m2ist", {"rank": 8}, "--rank is for runs with LoRA"),
    ("clip-frozen", {"rank": 8}, "--rank is for runs with LoRA"),
    ("hivg", {"insertion": "side"}, "--insertion is for .*, not for --method hivg"),
    ("clip-lora", {"bridge_weights": "none"}, "--bridge-weights is for .*cross-modal bridges"),
])
def test_an_option_of_other_methods_is_refused_by_name(method, option, message):
    """The error says which methods the option is for."""
    with pytest.raises(InputError, match=message):
        tiny(method, **option)


@pytest.mark.parametrize("method, name, valid", [
    ("m2ist", "attention_port", "none, iea, ea, vea, lea"),
    ("m2ist", "ffn_port", "none, iea, ea, vea, lea"),
    ("m2ist", "insertion", "side, sequential, parallel"),
    ("hivg", "pixels", "detr, clip"),
    ("hivg", "bridge_weights", "nxLxH, .*aware"),
])
def test_a_wrong_choice_is_refused_with_the_valid_names(method, name, valid):
    """The error names the flag, the value, and all names that are valid."""
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(InputError, match=f"unknown {flag} 'wrong': choose one of {valid}"):
        tiny(method, **{name: "wrong"})


@pytest.mark.parametrize("method, option, message", [
    ("m2ist", {"bottleneck": 0}, "--bottleneck is 0; it must be 1 or more"),
    ("m2ist", {"scale": -0.1}, "--scale is -0.1; it must be 0 or more"),
    ("m2ist", {"max_tokens": 2}, "--max-tokens is 2; it must be 3 or more"),
    ("lora", {"rank": 0}, "--rank is 0; it must be 1 or more"),
    ("lora", {"alpha": float("nan")}, "--alpha is nan; it must be 1e-06 or more"),
    ("lora", {"alpha": float("inf")}, "--alpha is inf; it must be 1e-06 or more"),
    ("hivg", {"vision_layers": [1, 0]}, "--vision-layers is 0; it must be 1 or more"),
    ("hivg", {"stages": -1}, "--stages is -1; it must be 0 or more"),
])
def test_a_number_below_the_least_value_is_refused(method, option, message):
    """The error names the flag, the number and the least value."""
    with pytest.raises(InputError, match=message):
        tiny(method, **option)


@pytest.mark.parametrize("method, options, message", [
    ("m2ist", {"max_tokens": 33}, "--max-tokens is 33; the text encoder of size tiny has 32"),
    ("hivg", {"stages": 7}, "--stages is 7; there are 6 layers"),
    ("hivg", {"vision_layers": [1, 7]}, r"--vision-layers 1 7: must differ and lie in 1 \.\. 6"),
    ("hivg", {"bridge_layers": [2, 2]}, r"--bridge-layers 2 2: must differ and lie in 1 \.\. 6"),
    ("hivg", {"text_layers": [5]}, r"--text-layers 5: must differ and lie in 1 \.\. 4"),
    ("m2ist", {"text_layers": [4, 5]}, r"--text-layers 4 5: must differ and lie in 1 \.\. 4"),
    ("m2ist", {"text_layers": [4]}, "2 vision layers cannot be paired with text layers"),
    ("hivg", {"layer_to_layer": True, "text_layers": [1, 2]}, "3 bridges need as many text layers"),
])
def test_options_that_do_not_fit_together_are_refused(method, options, message):
    """Layers must exist and differ, and their numbers must go together."""
    with pytest.raises(InputError, match=message):
        tiny(method, **options)


def test_none_leaves_a_port_empty():
    """ADAPTERS has a row "none", and m2ist with it at one port has no module there."""
    assert adapters.ADAPTERS["none"] is None
    model = tiny(attention_port="none")
    for block in model.adapters.blocks:
        assert list(block) == ["ffn"]
    empty = tiny(attention_port="none", ffn_port="none")
    assert count(empty.adapters) == 0
    frozen = tiny("frozen")
    assert torch.equal(empty.eval()(*inputs()).boxes, frozen.eval()(*inputs()).boxes)


def test_an_adapter_that_is_registered_is_an_option_at_once(monkeypatch):
    """A row in ADAPTERS is all that a new adapter needs."""
    def make_narrow(vision_dim, text_dim, options):
        return adapters.ExpertPair(vision_dim, text_dim, 2, options["scale"], options["residual"])

    with pytest.raises(InputError, match="unknown --attention-port 'narrow'"):
        tiny(attention_port="narrow")
    monkeypatch.setitem(adapters.ADAPTERS, "narrow", make_narrow)
    model = tiny(attention_port="narrow", scale=0.3)
    assert model.adapters.blocks[0]["attention"].vea.down.out_features == 2
    assert model.adapters.blocks[0]["attention"].lea.scale == 0.3
    train_step(model)
    assert model.adapters.blocks[0]["attention"].vea.down.weight.grad is not None


# --- The encoders that are shipped ----------------------------------------------------------------


@pytest.mark.parametrize("method", ["m2ist", "hivg"])
def test_shapes_are_the_weights_that_are_shipped(method):
    """Every encoder weight of a model for `shapes` is one of the file in assets/."""
    model = m.build_model(method, "tiny", "shapes")
    state = model.state_dict()
    path = m.SHAPES_WEIGHTS[model.spec["encoders"]]
    shipped = load_file(path)
    for name, value in shipped.items():
        assert value.dtype == torch.float32
        assert torch.equal(state[name], value), name
    of_encoders = {name for name in state if name.startswith(("vision.", "text.", "clip."))}
    without_bridges = {name for name in of_encoders if ".plugs." not in name}
    assert without_bridges == set(shipped)


def test_a_file_of_shapes_that_is_missing_is_named(tmp_path, monkeypatch):
    """The error names the file."""
    monkeypatch.setitem(m.SHAPES_WEIGHTS, "detr", tmp_path / "tiny-detr.safetensors")
    with pytest.raises(InputError, match="tiny-detr.safetensors: no such file"):
        m.build_model("m2ist", "tiny", "shapes")
