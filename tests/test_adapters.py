"""adapters.py against literal loops over the equations of both papers."""
import copy
import math
import re
import textwrap

import pytest
import torch
import torch.nn as nn
import torchvision
import transformers

import adapters
from adapters import AdapterNetworks, CrossModalBridge, ExpertAdapter, InteractionAdapter


# --- The arithmetic of a layer, in plain numbers --------------------------------------------------


def literal_linear(x, linear):
    """W x + b for a list of numbers x."""
    out = []
    for row, bias in zip(linear.weight.tolist(), linear.bias.tolist()):
        out.append(sum(w * v for w, v in zip(row, x)) + bias)
    return out


def literal_relu(x):
    return [max(0.0, v) for v in x]


def literal_layer_norm(x, norm):
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    out = []
    for v, w, b in zip(x, norm.weight.tolist(), norm.bias.tolist()):
        out.append((v - mean) / math.sqrt(variance + norm.eps) * w + b)
    return out


def scaled(x, f, s, residual):
    """s · f, and x + s · f with the residual."""
    return [residual * x_i + s * f_i for x_i, f_i in zip(x, f)]


def disturb(module):
    """Give biases and norms random values, so that a forgotten bias or norm shows."""
    for p in module.parameters():
        if p.dim() == 1:
            nn.init.normal_(p, 0.5, 0.5)
    return module


def assert_tokens(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-5, atol=1e-5)


# --- M²IST's adapters -----------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [False, True])
def test_expert_adapter_is_m2ist_eq_1(residual):
    """VEA(x) = [x +] s · ReLU(LayerNorm(x) W_down) W_up."""
    torch.manual_seed(0)
    ea = disturb(ExpertAdapter(6, bottleneck=3, scale=0.3, residual=residual))
    x = torch.randn(4, 6)
    expected = []
    for token in x.tolist():
        z = literal_relu(literal_linear(literal_layer_norm(token, ea.norm), ea.down))
        expected.append(scaled(token, literal_linear(z, ea.up), 0.3, residual))
    assert_tokens(ea(x), expected)


@pytest.mark.parametrize("residual", [False, True])
def test_interaction_adapter_is_m2ist_eqs_2_to_5(residual):
    """IEA(x) = [x +] s · Concat[z W_up, z W_shared] with z = ReLU(x W_down), for each modality."""
    torch.manual_seed(0)
    iea = disturb(InteractionAdapter(5, 8, bottleneck=3, interaction_dim=4, scale=0.3,
                                     residual=residual))
    x_v = torch.randn(2, 5)
    x_l = torch.randn(3, 8)
    for x, out, down, up in zip((x_v, x_l), iea(x_v, x_l), (iea.vision_down, iea.text_down),
                                (iea.vision_up, iea.text_up), strict=True):
        expected = []
        for token in x.tolist():
            z = literal_relu(literal_linear(token, down))
            f = literal_linear(z, up) + literal_linear(z, iea.shared_up)    # Eq. (2), Eq. (3)
            expected.append(scaled(token, f, 0.3, residual))                # Eq. (4), Eq. (5)
        assert_tokens(out, expected)


def test_both_modalities_train_the_shared_projection():
    """The gradient of either modality's output reaches the shared up-projection, and passes it."""
    torch.manual_seed(0)
    iea = InteractionAdapter(4, 8, bottleneck=3, interaction_dim=4)
    outputs = iea(torch.randn(1, 2, 4), torch.randn(1, 2, 8))
    for output, down in zip(outputs, (iea.vision_down, iea.text_down), strict=True):
        iea.zero_grad()
        output.sum().backward()
        assert iea.shared_up.weight.grad.any()
        assert down.weight.grad.any()


def test_adapters_start_kaiming_normal_with_zero_biases():
    """Each linear layer starts with a deviation of sqrt(2 / inputs) and zero biases [D3]."""
    torch.manual_seed(0)
    networks = AdapterNetworks(256, 768, layers=1, text_layers=[1])
    linears = [module for module in networks.modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 8    # two of VEA, two of LEA, four of IEA
    for linear in linears:
        kaiming = math.sqrt(2 / linear.in_features)
        assert linear.weight.std().item() == pytest.approx(kaiming, rel=0.03)
        assert not linear.bias.any()


# --- The side networks ----------------------------------------------------------------------------


def small_networks(**options):
    """Adapters of the vision layers 1 and 2, which are paired with the text layers 2 and 4."""
    torch.manual_seed(0)
    return AdapterNetworks(4, 6, layers=2, text_layers=[2, 4], bottleneck=3, interaction_dim=4,
                           interaction_bottleneck=2, **options)


def random_ports(dim):
    """What four layers report."""
    return [{"attention": torch.randn(1, 3, dim), "ffn": torch.randn(1, 3, dim)} for _ in range(4)]


def test_side_networks_follow_the_recurrence():
    """s_0 = x_0 and s_l = s_{l-1} + IEA_l(a_l) + EA_l(g_l), over the paired layers."""
    networks = disturb(small_networks())
    for modality, dim, layers, expert in (("vision", 4, (1, 2), "vea"), ("text", 6, (2, 4), "lea")):
        x0 = torch.randn(1, 3, dim)
        ports = random_ports(dim)
        s = x0
        for block, layer in zip(networks.blocks, layers):
            iea = getattr(block["attention"], modality)
            ea = getattr(block["ffn"], expert)
            s = s + iea(ports[layer - 1]["attention"]) + ea(ports[layer - 1]["ffn"])
        assert torch.allclose(networks.side(modality, x0, ports), s, atol=1e-6)


@pytest.mark.parametrize("attention_port, ffn_port, vision, text", [
    ("none", "none", [], []),
    ("none", "vea", ["ffn"], []),
    ("lea", "none", [], ["attention"]),
    ("ea", "iea", ["attention", "ffn"], ["attention", "ffn"]),
])
def test_an_adapter_reads_its_port_alone(attention_port, ffn_port, vision, text):
    """In Table V (a)-(c) a modality has no side network, or one that reads a single port."""
    networks = disturb(small_networks(attention_port=attention_port, ffn_port=ffn_port))
    for modality, dim, expected in (("vision", 4, vision), ("text", 6, text)):
        assert networks.adapts(modality) == bool(expected)
        x0 = torch.randn(1, 3, dim)
        ports = [{name: torch.randn(1, 3, dim) for name in expected} for _ in range(4)]
        s = networks.side(modality, x0, ports)
        for name in expected:
            silent = [{**port, name: torch.zeros(1, 3, dim)} for port in ports]
            assert not torch.equal(networks.side(modality, x0, silent), s)


def test_further_text_layers_have_language_experts_alone():
    """Experts need no partner: with two vision layers and three text layers, the third text layer
    has an LEA and no VEA."""
    networks = AdapterNetworks(4, 6, layers=2, text_layers=[1, 2, 4], attention_port="ea",
                               ffn_port="vea")
    assert networks.layers == {"vision": [1, 2], "text": [1, 2, 4]}
    adapted = [[adapter.modalities for adapter in block.values()] for block in networks.blocks]
    both = ["vision", "text"]
    assert adapted == [[both, ["vision"]], [both, ["vision"]], [["text"], []]]
    assert networks.blocks[2]["attention"].vea is None


@pytest.mark.parametrize("text_layers, options, message", [
    ([1], {}, "2 vision layers cannot be paired"),
    ([1, 2, 4], dict(interaction_dim=2), "'iea' joins"),
    ([1, 2], dict(interaction_dim=5), "interaction_dim .* is 5"),
    ([1, 2], dict(interaction_dim=4, ffn_port="eea"), "'eea' for the ffn port.* iea, ea, vea, lea"),
])
def test_networks_that_cannot_be_built_are_refused(text_layers, options, message):
    """A vision layer without a text layer, IEA without a vision layer, C_i > C_v, and a name that
    is not in ADAPTERS are errors."""
    with pytest.raises(ValueError, match=message):
        AdapterNetworks(4, 6, layers=2, text_layers=text_layers, **options)


# --- Inserted adapters ----------------------------------------------------------------------------


def inserted_networks(insertion):
    """The networks, and the four text layers that they are inserted into."""
    networks = small_networks()
    layers = nn.ModuleList(nn.Module() for _ in range(4))
    for layer in layers:
        layer.plugs = nn.ModuleDict()
    networks.insert("text", layers, insertion)
    return networks, layers


@pytest.mark.parametrize("insertion", ["sequential", "parallel"])
def test_an_inserted_adapter_adds_to_its_port(insertion):
    """It is at the paired layers alone and starts as the identity [D38]. A sequential adapter reads
    the output of the sublayer, a parallel one the input (Fig. 3)."""
    networks, layers = inserted_networks(insertion)
    assert [sorted(layer.plugs) for layer in layers] == [
        [], ["attention", "ffn"], [], ["attention", "ffn"]]
    assert list(layers.parameters()) == []    # the weights have one name, that in the networks
    out = torch.randn(1, 3, 6)
    x = torch.randn(1, 3, 6)
    for layer in (layers[1], layers[3]):
        for plug in layer.plugs.values():
            assert torch.equal(plug(out, x, None), out)

    for p in networks.parameters():
        nn.init.normal_(p)
    read = {"sequential": out, "parallel": x}[insertion]
    for block, layer in zip(networks.blocks, (layers[1], layers[3])):
        assert torch.equal(layer.plugs["attention"](out, x, None),
                           out + block["attention"].text(read))
        assert torch.equal(layer.plugs["ffn"](out, x, None), out + block["ffn"].lea(read))


def test_a_copy_of_a_model_has_inserted_adapters_of_its_own():
    """After copy.deepcopy the copied layers call the copied adapters."""
    networks, layers = inserted_networks("sequential")
    copied_networks, copied_layers = copy.deepcopy(nn.ModuleList([networks, layers]))
    for p in copied_networks.parameters():
        nn.init.normal_(p)
    out = torch.randn(1, 3, 6)
    copied = copied_layers[1].plugs["ffn"](out, out, None)
    assert torch.equal(copied, out + copied_networks.blocks[0]["ffn"].lea(out))
    assert torch.equal(layers[1].plugs["ffn"](out, out, None), out)    # the identity, as before


# --- The ports of third-party encoders ------------------------------------------------------------


def test_record_ports_refuses_what_it_cannot_record():
    """A missing submodule and an empty list of layers are named, and no hook is left behind."""
    layers = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Identity())
    with pytest.raises(ValueError, match="layer 2 has no '0'"):
        adapters.record_ports(layers, attention="0", ffn="1")
    for module in layers.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    with pytest.raises(ValueError, match="no layers"):
        adapters.record_ports([], attention="0", ffn="1")


def small_vit_and_bert():
    """ViT and BERT of the width and depth that the example needs, with few other weights."""
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=6, num_heads=12, hidden_dim=768, mlp_dim=8)
    config = transformers.BertConfig(
        vocab_size=50, num_hidden_layers=12, intermediate_size=8, max_position_embeddings=16)
    return vit.eval(), transformers.BertModel(config).eval()


def test_the_example_of_the_docstring_trains_side_networks_beside_vit_and_bert(monkeypatch):
    """The ten lines train every adapter and leave ViT and BERT bitwise as they were."""
    vit, bert = small_vit_and_bert()
    encoders = nn.ModuleList([vit, bert])
    before = copy.deepcopy(encoders.state_dict())
    monkeypatch.setattr(transformers.BertModel, "from_pretrained", lambda name: bert)

    first_weights = {}    # of the adapters, noted when the loss is computed

    def your_loss(f_v, f_l):
        assert f_v.shape == (2, 1 + 4, 768)
        assert f_l.shape == (2, 7, 768)
        first_weights.update(copy.deepcopy(names["networks"].state_dict()))
        return f_v.square().mean() + f_l.square().mean()

    names = {
        "torch": torch,
        "vit_b_16": lambda: vit,
        "BertModel": transformers.BertModel,
        "AdapterNetworks": AdapterNetworks,
        "record_ports": adapters.record_ports,
        "images": torch.randn(2, 3, 32, 32),
        "tokens": torch.randint(50, (2, 7)),
        "your_loss": your_loss,
    }
    example = re.search(r"^    vit, bert = (?:.+\n)+", adapters.__doc__, flags=re.M)[0]
    exec(textwrap.dedent(example), names)

    assert len(example.splitlines()) <= 10
    for name, parameter in names["networks"].named_parameters():
        assert not torch.equal(parameter, first_weights[name]), name
    for name, value in encoders.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in encoders.parameters())


@torch.no_grad()
def test_the_ports_of_the_example_are_before_the_residual():
    """In ViT and in BERT the recorded ports, x_0 and x_out fit the layers' own equations. Each pass
    fills the record anew, until its hooks are removed."""
    vit, bert = small_vit_and_bert()
    v = adapters.record_ports(vit.encoder.layers, attention="self_attention", ffn="mlp")
    t = adapters.record_ports(bert.encoder.layer, attention="attention.output.dense",
                              ffn="output.dense")
    for _ in range(2):
        vit.encoder.layers[0](torch.randn(2, 5, 768))    # this pass goes no further
        assert v.x_out is None and v.ports[1:] == [{}] * 5
        images = torch.randn(2, 3, 32, 32)
        tokens = torch.randint(50, (2, 7))
        logits = vit(images)
        encoded = bert(tokens)
    for record, encoder, other in ((v, vit, images + 1), (t, bert, tokens.flip(1))):
        record.remove()
        encoder(other)

    # ViT is pre-norm: x_l = x_{l-1} + a_l + g_l. Its head reads [CLS] after the last LayerNorm.
    patches = vit._process_input(images) + vit.encoder.pos_embedding[:, 1:]
    assert torch.allclose(v.x0[:, 1:], patches, atol=1e-6)
    x = v.x0
    for port in v.ports:
        x = x + port["attention"] + port["ffn"]
    assert torch.allclose(x, v.x_out, atol=1e-5)
    assert torch.allclose(vit.heads(vit.encoder.ln(v.x_out)[:, 0]), logits, atol=1e-5)

    # BERT is post-norm: x_l = norm2(h + g_l), h = norm1(x_{l-1} + a_l).
    assert torch.equal(t.x0, bert.embeddings(tokens))
    x = t.x0
    for layer, port in zip(bert.encoder.layer, t.ports):
        h = layer.attention.output.LayerNorm(x + port["attention"])
        x = layer.output.LayerNorm(h + port["ffn"])
    assert torch.allclose(x, t.x_out, atol=1e-5)
    assert torch.equal(t.x_out, encoded.last_hidden_state)


# --- Attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_attention_drops_the_share_of_probabilities_that_it_is_told(causal):
    """One head's probabilities, read off with the identity as values: padded or later keys have 0.
    With dropout each is either 0 or divided by 1 - p."""
    torch.manual_seed(0)
    q = torch.randn(1, 50, 8)
    k = torch.randn(1, 50, 8)
    padding = None if causal else torch.arange(50)[None] >= 40
    hidden = torch.ones(50, 50).triu(1).bool() if causal else padding.expand(50, 50)
    scores = (q @ k.mT / math.sqrt(8)).masked_fill(hidden, -math.inf)
    probabilities = scores.softmax(-1)
    v = torch.eye(50)[None]
    plain = adapters.attend(q, k, v, 1, padding, causal=causal)
    assert torch.allclose(plain, probabilities, atol=1e-6)

    dropped = adapters.attend(q, k, v, 1, padding, 0.3, causal)
    kept = dropped > 0
    assert torch.allclose(dropped[kept], probabilities[kept] / 0.7, atol=1e-6)
    assert kept.sum() / (~hidden).sum() == pytest.approx(0.7, abs=0.05)


# --- HiVG's bridge --------------------------------------------------------------------------------


def random_texts(samples, tokens, dim=3, layers=3):
    return [torch.randn(samples, tokens, dim) for _ in range(layers)]


@pytest.mark.parametrize("weights, shape", [
    ("nxLxH", (3, 5, 8)),
    ("nxLx1", (3, 5, 1)),
    ("nx1xH", (3, 1, 8)),
    ("1x1xH", (1, 1, 8)),
    ("none", None),
    ("aware", None),
])
def test_bridge_selects_the_text_by_hivg_eqs_3_and_4(weights, shape):
    """*f = w ⊙ f + f for each layer; the layers are concatenated and projected. w has a shape of
    Table 4, where an axis of size 1 is shared, or is an MLP of the text. It is 0 at first [D13]."""
    torch.manual_seed(0)
    bridge = CrossModalBridge(4, 8, text_layers=3, max_tokens=5, heads=2, weights=weights)
    texts = random_texts(2, 4, dim=8)    # four of at most five tokens: a trimmed batch
    plain = bridge.projection(torch.cat(texts, -1))
    assert torch.allclose(bridge.select(texts), plain, atol=1e-6)

    if shape is not None:
        assert bridge.weights.shape == shape
        nn.init.normal_(bridge.weights)
    if weights == "aware":
        assert bridge.aware[0].out_features == 2    # H_l / 4
        disturb(bridge.aware)
        nn.init.normal_(bridge.aware[2].weight)

    selected = bridge.select(texts)
    for b in range(2):
        for place in range(4):
            calibrated = []
            for i in range(3):
                f = texts[i][b, place].tolist()
                if shape is not None:
                    w = bridge.weights.expand(3, 5, 8)[i, place].tolist()
                elif weights == "aware":
                    hidden = literal_relu(literal_linear(f, bridge.aware[0]))
                    w = literal_linear(hidden, bridge.aware[2])
                else:
                    w = [0.0] * 8
                calibrated += [w_c * f_c + f_c for w_c, f_c in zip(w, f)]    # Eq. (3)
            expected = literal_linear(calibrated, bridge.projection)         # Eq. (4)
            assert_tokens(selected[b, place], expected)


def small_bridge(**options):
    """A bridge with weights other than 0, and what it reads: text of at most five tokens."""
    torch.manual_seed(0)
    shape = dict(text_layers=3, max_tokens=5, heads=2)
    bridge = disturb(CrossModalBridge(4, 3, **{**shape, **options}))
    nn.init.normal_(bridge.weights)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [2]])
    return bridge, torch.randn(3, 6, 4), torch.randn(3, 6, 4), random_texts(3, 5), padding


def test_bridge_is_hivg_section_3_2():
    """LayerNorm, multi-head cross-attention over the real text tokens, FFN, residual."""
    bridge, out, x, texts, padding = small_bridge()
    bridged = bridge(out, x, (texts, padding))

    text = bridge.select(texts).tolist()
    stream = (x + out).tolist()
    for b in range(3):
        keys = [literal_linear(token, bridge.k) for token in text[b]]
        values = [literal_linear(token, bridge.v) for token in text[b]]
        real = [j for j in range(5) if not padding[b, j]]
        for token in range(6):
            query = literal_linear(literal_layer_norm(stream[b][token], bridge.norm), bridge.q)

            attended = []
            for channels in ([0, 1], [2, 3]):    # two heads of two channels each
                weights = []
                for j in real:
                    dot = sum(query[c] * keys[j][c] for c in channels)
                    weights.append(math.exp(dot / math.sqrt(2)))
                for c in channels:
                    mean = sum(w * values[j][c] for w, j in zip(weights, real)) / sum(weights)
                    attended.append(mean)

            h = literal_linear(literal_linear(attended, bridge.out), bridge.fc1)
            h = [v / (1 + math.exp(-1.702 * v)) for v in h]    # QuickGELU
            semantic = literal_linear(h, bridge.fc2)           # f_v^sa
            expected = [o + f for o, f in zip(out[b, token].tolist(), semantic)]
            assert bridged[b, token].tolist() == pytest.approx(expected, abs=1e-4)


def test_a_bridge_without_cross_attention_adds_the_mean_of_the_real_tokens():
    """With heads=0 all image tokens get the FFN of the mean of the text tokens that are real."""
    bridge, out, x, texts, padding = small_bridge(heads=0)
    assert not hasattr(bridge, "q")
    text = bridge.select(texts)
    bridged = bridge(out, x, (texts, padding))
    for b, length in enumerate((5, 3, 2)):
        mean = text[b, :length].mean(0)
        semantic = bridge.fc2(adapters.quick_gelu(bridge.fc1(mean)))
        assert torch.allclose(bridged[b], out[b] + semantic, atol=1e-5)


def test_a_bridge_of_one_layer_reads_that_layer_alone():
    """With only=1 the bridge reads the second text and no other (Table 4, line 7)."""
    bridge, out, x, texts, padding = small_bridge(text_layers=1, only=1)
    expected = out + bridge.semantic(x + out, [texts[1]], padding)
    assert torch.equal(bridge(out, x, (texts, padding)), expected)


def test_a_bridge_refuses_what_it_cannot_read():
    """Another number of text layers, and weights that are not in BRIDGE_WEIGHTS, are errors."""
    bridge, out, x, texts, padding = small_bridge()
    with pytest.raises(ValueError, match="reads 3 text layers, not 2"):
        bridge(out, x, (texts[:2], padding))
    with pytest.raises(ValueError, match="'nxL': .* nxLxH"):
        small_bridge(weights="nxL")
