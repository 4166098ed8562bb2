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
    """x W + b for a list of numbers x."""
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
    """s · f, and x + s · f where the residual is asked for."""
    out = []
    for x_i, f_i in zip(x, f):
        if residual:
            out.append(x_i + s * f_i)
        else:
            out.append(s * f_i)
    return out


def disturb(module):
    """Give biases and norms random values, so that a forgotten bias or norm shows."""
    for p in module.parameters():
        if p.dim() == 1:
            nn.init.normal_(p, 0.5, 0.5)
    return module


def assert_tokens(actual, expected):
    assert torch.allclose(actual, torch.tensor(expected), atol=1e-5), (actual, expected)


# --- M²IST's adapters -----------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [False, True])
def test_expert_adapter_is_m2ist_eq_1(residual):
    """VEA(x) = [x +] s · ReLU(LayerNorm(x) W_down) W_up."""
    torch.manual_seed(0)
    ea = disturb(ExpertAdapter(6, bottleneck=3, scale=0.3, residual=residual))
    x = torch.randn(4, 6)
    expected = []
    for token in x.tolist():
        normed = literal_layer_norm(token, ea.norm)
        z = literal_relu(literal_linear(normed, ea.down))
        f = literal_linear(z, ea.up)
        expected.append(scaled(token, f, 0.3, residual))
    assert_tokens(ea(x), expected)


@pytest.mark.parametrize("residual", [False, True])
def test_interaction_adapter_is_m2ist_eqs_2_to_5(residual):
    """IEA(x) = [x +] s · Concat[z W_up, z W_shared] with z = ReLU(x W_down), for each modality."""
    torch.manual_seed(0)
    iea = disturb(InteractionAdapter(5, 8, bottleneck=3, interaction_dim=4, scale=0.3,
                                     residual=residual))
    x_v = torch.randn(2, 5)
    x_l = torch.randn(3, 8)
    out_v, out_l = iea(x_v, x_l)

    expected_v = []
    for token in x_v.tolist():
        z_v = literal_relu(literal_linear(token, iea.vision_down))
        f_v = literal_linear(z_v, iea.vision_up) + literal_linear(z_v, iea.shared_up)    # Eq. (2)
        expected_v.append(scaled(token, f_v, 0.3, residual))                             # Eq. (4)
    assert_tokens(out_v, expected_v)

    expected_l = []
    for token in x_l.tolist():
        z_l = literal_relu(literal_linear(token, iea.text_down))
        f_l = literal_linear(z_l, iea.text_up) + literal_linear(z_l, iea.shared_up)      # Eq. (3)
        expected_l.append(scaled(token, f_l, 0.3, residual))                             # Eq. (5)
    assert_tokens(out_l, expected_l)


def test_both_modalities_train_the_shared_projection():
    """The gradient of either modality's output reaches the shared up-projection."""
    torch.manual_seed(0)
    iea = InteractionAdapter(4, 8, bottleneck=3, interaction_dim=4)
    for output in iea(torch.randn(1, 2, 4), torch.randn(1, 2, 8)):
        iea.zero_grad()
        output.sum().backward()
        assert iea.shared_up.weight.grad.abs().sum() > 0


def test_a_modality_as_narrow_as_c_i_has_no_channels_of_its_own():
    """With C_v = C_i there is no up-projection for vision alone; C_i > C_v is refused."""
    iea = InteractionAdapter(4, 8, bottleneck=3, interaction_dim=4)
    assert iea.vision_up is None
    assert iea.text_up.out_features == 4
    with pytest.raises(ValueError, match="interaction_dim"):
        InteractionAdapter(4, 8, interaction_dim=5)


def test_init_is_kaiming_normal_with_zero_biases():
    """Each linear starts with a deviation of sqrt(2 / inputs) and zero biases."""
    torch.manual_seed(0)
    networks = AdapterNetworks(256, 768, layers=1, text_layers=[1])
    linears = [module for module in networks.modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 8    # two of VEA, two of LEA, four of IEA
    for linear in linears:
        kaiming = math.sqrt(2 / linear.in_features)
        assert linear.weight.std().item() == pytest.approx(kaiming, rel=0.03)
        assert linear.bias.abs().max() == 0


# --- The side networks ----------------------------------------------------------------------------


DIMS = {"vision": 4, "text": 6}
LAYERS = {"vision": [1, 2], "text": [2, 4]}    # the layers that small_networks pairs


def small_networks(**options):
    torch.manual_seed(0)
    return disturb(AdapterNetworks(4, 6, layers=2, text_layers=[2, 4], bottleneck=3,
                                   interaction_dim=4, interaction_bottleneck=2, **options))


def random_ports(layers, dim):
    ports = []
    for _ in range(layers):
        ports.append({"attention": torch.randn(1, 3, dim), "ffn": torch.randn(1, 3, dim)})
    return ports


def test_side_networks_follow_the_recurrence():
    """s_0 = x_0 and s_l = s_{l-1} + IEA_l(a_l) + EA_l(g_l), over the paired layers."""
    networks = small_networks()
    x0_v = torch.randn(1, 3, 4)
    x0_l = torch.randn(1, 3, 6)
    ports_v = random_ports(2, 4)
    ports_l = random_ports(4, 6)

    s_v = x0_v
    s_l = x0_l
    for block, vision_layer, text_layer in zip(networks.blocks, LAYERS["vision"], LAYERS["text"]):
        iea = block["attention"]
        pair = block["ffn"]
        read_v = ports_v[vision_layer - 1]
        read_l = ports_l[text_layer - 1]
        s_v = s_v + iea.vision(read_v["attention"]) + pair.vea(read_v["ffn"])
        s_l = s_l + iea.text(read_l["attention"]) + pair.lea(read_l["ffn"])

    assert torch.allclose(networks.side("vision", x0_v, ports_v), s_v, atol=1e-6)
    assert torch.allclose(networks.side("text", x0_l, ports_l), s_l, atol=1e-6)


def test_the_terms_of_a_layer_are_summed_before_they_are_added():
    """s_{l-1} + (IEA + EA) is bitwise what `side` computes, so that published figures stay."""
    networks = small_networks()
    x0 = torch.randn(1, 3, 4)
    ports = random_ports(2, 4)
    s = x0
    for block, read in zip(networks.blocks, ports):
        s = s + (block["attention"].vision(read["attention"]) + block["ffn"].vea(read["ffn"]))
    assert torch.equal(networks.side("vision", x0, ports), s)


def test_each_vision_layer_needs_a_text_layer():
    """Two vision layers cannot be paired with one text layer."""
    with pytest.raises(ValueError, match="paired"):
        AdapterNetworks(4, 6, layers=2, text_layers=[1])


def test_further_text_layers_have_language_experts_alone():
    """Experts need no partner: with two vision layers and three text layers, the third text layer
    has an LEA and no VEA."""
    networks = AdapterNetworks(4, 6, layers=2, text_layers=[1, 2, 4], attention_port="ea",
                               ffn_port="vea")
    assert networks.layers == {"vision": [1, 2], "text": [1, 2, 4]}
    adapted = [[pair.modalities for pair in block.values()] for block in networks.blocks]
    both = ["vision", "text"]
    assert adapted == [[both, ["vision"]], [both, ["vision"]], [["text"], []]]
    assert networks.blocks[2]["attention"].vea is None


def test_an_adapter_that_joins_two_layers_needs_both():
    """IEA cannot be at a text layer that has no vision layer beside it."""
    with pytest.raises(ValueError, match="'iea' joins a vision layer and a text layer"):
        AdapterNetworks(4, 6, layers=2, text_layers=[1, 2, 4], interaction_dim=2)


@pytest.mark.parametrize("attention, ffn, kinds", [
    ("ea", "iea", {"attention": "ExpertPair", "ffn": "InteractionAdapter"}),
    ("iea", "iea", {"attention": "InteractionAdapter", "ffn": "InteractionAdapter"}),
    ("none", "ea", {"ffn": "ExpertPair"}),
    ("iea", "none", {"attention": "InteractionAdapter"}),
])
def test_each_port_has_the_adapter_that_was_asked_for(attention, ffn, kinds):
    """A name from ADAPTERS chooses the adapter of a port, and "none" leaves the port alone."""
    networks = small_networks(attention_port=attention, ffn_port=ffn)
    assert len(networks.blocks) == 2
    for block in networks.blocks:
        assert {port: type(adapter).__name__ for port, adapter in block.items()} == kinds


@pytest.mark.parametrize("name, has, lacks", [("vea", "vision", "text"), ("lea", "text", "vision")])
def test_an_expert_of_one_modality_leaves_the_other_without_a_side_network(name, has, lacks):
    """In Table V (b) and (c) one modality has no side network and no parameters."""
    networks = small_networks(attention_port="none", ffn_port=name)
    assert networks.adapts(has)
    assert not networks.adapts(lacks)

    x0 = torch.randn(1, 3, DIMS[has])
    ports = random_ports(4, DIMS[has])
    s = x0
    for block, layer in zip(networks.blocks, LAYERS[has]):
        expert = getattr(block["ffn"], name)
        s = s + expert(ports[layer - 1]["ffn"])
    assert torch.allclose(networks.side(has, x0, ports), s, atol=1e-6)

    for parameter_name, parameter in networks.named_parameters():
        if "down.weight" in parameter_name:
            assert parameter.shape[-1] == DIMS[has]


def test_networks_without_adapters_adapt_neither_modality():
    """In Table V (a) both ports are left alone, and there is no parameter."""
    networks = small_networks(attention_port="none", ffn_port="none")
    assert not networks.adapts("vision")
    assert not networks.adapts("text")
    assert list(networks.parameters()) == []


def test_a_new_adapter_is_usable_by_its_name(monkeypatch):
    """A subclass of PairAdapter and a row in ADAPTERS are all that a new adapter takes."""

    class Double(adapters.PairAdapter):
        modalities = ("text",)

        def text(self, x):
            return 2 * x

    def make_double(vision_dim, text_dim, options):
        return Double()

    monkeypatch.setitem(adapters.ADAPTERS, "double", make_double)
    networks = small_networks(attention_port="double", ffn_port="none")
    assert networks.adapts("text")
    assert not networks.adapts("vision")
    x0 = torch.randn(1, 3, 6)
    ports = random_ports(4, 6)
    expected = x0 + 2 * ports[1]["attention"] + 2 * ports[3]["attention"]
    assert torch.allclose(networks.side("text", x0, ports), expected)


def test_an_unknown_adapter_is_refused_by_name():
    """The message names the adapter, the port and the names that exist."""
    with pytest.raises(ValueError, match="no adapter 'eea' for the ffn port: .* iea, ea, vea, lea"):
        small_networks(ffn_port="eea")


# --- Inserted adapters ----------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.plugs = nn.ModuleDict()


def inserted_networks(insertion):
    """The networks, and the four text layers that they are inserted into."""
    networks = small_networks()
    layers = nn.ModuleList([Layer(), Layer(), Layer(), Layer()])
    networks.insert("text", layers, insertion)
    return networks, layers


@pytest.mark.parametrize("insertion", ["sequential", "parallel"])
def test_an_inserted_adapter_starts_as_the_identity(insertion):
    """The weights of the last linears start at 0, so the output of the port is unchanged."""
    networks, layers = inserted_networks(insertion)
    assert [sorted(layer.plugs) for layer in layers] == [
        [], ["attention", "ffn"], [], ["attention", "ffn"]]

    for name, parameter in networks.named_parameters():
        if name.endswith("up.bias"):
            nn.init.zeros_(parameter)    # as init_adapter leaves them; `disturb` changed them
    out = torch.randn(1, 3, 6)
    x = torch.randn(1, 3, 6)
    for layer in (layers[1], layers[3]):
        for inserted in layer.plugs.values():
            assert torch.equal(inserted(out, x, None), out)


@pytest.mark.parametrize("insertion", ["sequential", "parallel"])
def test_an_inserted_adapter_adds_to_its_port(insertion):
    """A sequential adapter reads the sublayer's output, a parallel one the input (Fig. 3)."""
    networks, layers = inserted_networks(insertion)
    for name, parameter in networks.named_parameters():
        if name.endswith("up.weight"):
            nn.init.normal_(parameter)

    out = torch.randn(1, 3, 6)
    x = torch.randn(1, 3, 6)
    read = {"sequential": out, "parallel": x}[insertion]
    for block, layer in zip(networks.blocks, (layers[1], layers[3])):
        after_attention = layer.plugs["attention"](out, x, None)
        assert torch.equal(after_attention, out + block["attention"].text(read))
        assert not torch.equal(after_attention, out)
        after_ffn = layer.plugs["ffn"](out, x, None)
        assert torch.equal(after_ffn, out + block["ffn"].lea(read))
        assert not torch.equal(after_ffn, out)


def test_inserted_weights_have_one_name():
    """The weights belong to the networks, and the encoder's layers register none of them."""
    networks, layers = inserted_networks("sequential")
    assert list(layers.parameters()) == []
    assert len(list(networks.parameters())) > 0


def test_a_copy_of_a_model_has_inserted_adapters_of_its_own():
    """After copy.deepcopy the copied layers call the copied adapters."""
    networks, layers = inserted_networks("sequential")
    model = nn.ModuleDict({"networks": networks, "layers": layers})
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied["networks"].parameters():
            parameter.fill_(0.5)

    out = torch.randn(1, 3, 6)
    inserted = copied["layers"][1].plugs["ffn"]
    copied_lea = copied["networks"].blocks[0]["ffn"].lea
    assert torch.equal(inserted(out, out, None), out + copied_lea(out))
    assert not torch.equal(inserted(out, out, None), layers[1].plugs["ffn"](out, out, None))


# --- The ports of other people's encoders ---------------------------------------------------------


class TupleAttention(nn.Module):
    """Like many attention modules, this one returns a tuple."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x), None


class ForeignLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = TupleAttention()
        self.block = nn.ModuleDict({"ffn": nn.Linear(4, 4)})

    def forward(self, x):
        x = x + self.attention(x)[0]
        return x + self.block["ffn"](x)


def test_record_ports_reports_every_forward_pass_anew():
    """Each pass fills x_0, a_l, g_l and x_out with its own tokens."""
    torch.manual_seed(0)
    layers = nn.Sequential(ForeignLayer(), ForeignLayer())
    record = adapters.record_ports(layers, attention="attention", ffn="block.ffn")
    for _ in range(2):
        x0 = torch.randn(1, 3, 4)
        out = layers(x0)

        a_1 = layers[0].attention.linear(x0)
        g_1 = layers[0].block["ffn"](x0 + a_1)
        x_1 = x0 + a_1 + g_1
        a_2 = layers[1].attention.linear(x_1)
        g_2 = layers[1].block["ffn"](x_1 + a_2)

        assert record.x0 is x0
        assert record.x_out is out
        assert [sorted(port) for port in record.ports] == [["attention", "ffn"]] * 2
        assert torch.equal(record.ports[0]["attention"], a_1)
        assert torch.equal(record.ports[0]["ffn"], g_1)
        assert torch.equal(record.ports[1]["attention"], a_2)
        assert torch.equal(record.ports[1]["ffn"], g_2)


def test_removed_hooks_record_nothing():
    """After `remove` a forward pass leaves the record as it was."""
    layers = nn.Sequential(ForeignLayer(), ForeignLayer())
    record = adapters.record_ports(layers, attention="attention", ffn="block.ffn")
    record.remove()
    layers(torch.randn(1, 3, 4))
    assert record.x0 is None
    assert record.x_out is None
    assert record.ports == [{}, {}]


def test_record_ports_refuses_what_it_cannot_record():
    """A missing submodule and an empty list of layers are named, and no hook is left behind."""
    layers = nn.Sequential(ForeignLayer(), nn.Identity())
    with pytest.raises(ValueError, match="layer 2 has no 'attention'"):
        adapters.record_ports(layers, attention="attention", ffn="block.ffn")
    for module in layers.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    with pytest.raises(ValueError, match="no layers"):
        adapters.record_ports([], attention="attention", ffn="block.ffn")


def docstring_example():
    """The indented lines of adapters.py's docstring that begin with the two encoders."""
    example = re.search(r"^    vit, bert = (?:.+\n)+", adapters.__doc__, flags=re.M)
    return textwrap.dedent(example[0])


def small_vit_and_bert():
    """ViT and BERT of the width and depth that the example needs, with few other weights."""
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=6, num_heads=12, hidden_dim=768, mlp_dim=8)
    config = transformers.BertConfig(
        vocab_size=50, num_hidden_layers=12, intermediate_size=8, max_position_embeddings=16)
    return vit, transformers.BertModel(config)


def test_the_example_of_the_docstring_trains_side_networks_beside_vit_and_bert(monkeypatch):
    """The ten lines train every adapter and leave ViT and BERT bitwise as they were."""
    vit, bert = small_vit_and_bert()
    before = copy.deepcopy(nn.ModuleList([vit, bert]).state_dict())
    monkeypatch.setattr(transformers.BertModel, "from_pretrained", lambda name: bert)

    first_weights = {}    # of the adapters, noted when the loss is computed
    names = {
        "torch": torch,
        "vit_b_16": lambda: vit,
        "BertModel": transformers.BertModel,
        "AdapterNetworks": AdapterNetworks,
        "record_ports": adapters.record_ports,
        "images": torch.randn(2, 3, 32, 32),
        "tokens": torch.randint(50, (2, 7)),
    }

    def your_loss(f_v, f_l):
        assert f_v.shape == (2, 1 + 4, 768)
        assert f_l.shape == (2, 7, 768)
        first_weights.update(copy.deepcopy(names["networks"].state_dict()))
        return f_v.square().mean() + f_l.square().mean()

    names["your_loss"] = your_loss
    lines = docstring_example()
    exec(lines, names)

    assert len(lines.splitlines()) <= 10
    for name, parameter in names["networks"].named_parameters():
        assert not torch.equal(parameter, first_weights[name]), name
    after = nn.ModuleList([vit, bert]).state_dict()
    for name, value in after.items():
        assert torch.equal(value, before[name]), name
    for parameter in nn.ModuleList([vit, bert]).parameters():
        assert parameter.grad is None


def test_the_ports_of_the_example_are_before_the_residual():
    """In ViT and in BERT the recorded ports, x_0 and x_out fit the layers' own equations."""
    vit, bert = small_vit_and_bert()
    vit.eval()
    bert.eval()
    v = adapters.record_ports(vit.encoder.layers, attention="self_attention", ffn="mlp")
    t = adapters.record_ports(bert.encoder.layer, attention="attention.output.dense",
                              ffn="output.dense")
    images = torch.randn(2, 3, 32, 32)
    tokens = torch.randint(50, (2, 7))
    with torch.no_grad():
        logits = vit(images)
        encoded = bert(tokens)

        # ViT is pre-norm: x_l = x_{l-1} + a_l + g_l. Its head reads [CLS] after the last LayerNorm.
        x = v.x0
        for port in v.ports:
            x = x + port["attention"] + port["ffn"]
        assert torch.allclose(x, v.x_out, atol=1e-5)
        assert torch.allclose(vit.heads(vit.encoder.ln(v.x_out)[:, 0]), logits, atol=1e-5)
        patches = vit._process_input(images)
        position = vit.encoder.pos_embedding
        assert torch.allclose(v.x0[:, 1:], patches + position[:, 1:], atol=1e-6)

        # BERT is post-norm: x_l = norm2(h + g_l), h = norm1(x_{l-1} + a_l).
        assert torch.equal(t.x0, bert.embeddings(tokens))
        x = t.x0
        for layer, port in zip(bert.encoder.layer, t.ports):
            h = layer.attention.output.LayerNorm(x + port["attention"])
            x = layer.output.LayerNorm(h + port["ffn"])
        assert torch.allclose(x, t.x_out, atol=1e-5)
        assert torch.equal(t.x_out, encoded.last_hidden_state)


# --- Attention and its activation: what is kept for the backward pass -----------------------------


def kept_for_backward(step):
    """The tensors that autograd keeps during step()."""
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return kept


def plain_attention(q, k, v, heads, padding, dropout):
    """adapters.attend with dropout, as autograd would have it: with maps that are kept."""
    q, k, v = [t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v)]
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if padding is not None:
        scores = scores.masked_fill(padding[:, None, None, :], -math.inf)
    weights = scores.softmax(-1)
    dropped = weights * adapters.drop(torch.ones_like(weights), dropout)
    return (dropped @ v).transpose(1, 2).flatten(2)


def random_attention(dtype, padded=True):
    """q, k, v of 40 queries and 50 keys, and a padding that hides 20 keys of the second sample."""
    torch.manual_seed(0)
    q = torch.randn(2, 40, 16, dtype=dtype, requires_grad=True)
    k = torch.randn(2, 50, 16, dtype=dtype, requires_grad=True)
    v = torch.randn(2, 50, 16, dtype=dtype, requires_grad=True)
    padding = torch.zeros(2, 50, dtype=torch.bool)
    padding[1, 30:] = True
    return (q, k, v), padding if padded else None


def test_attention_drops_as_many_weights_as_it_is_told():
    """The mean over many maps is the attention without dropout, and 0.3 of the weights are 0."""
    (q, k, v), padding = random_attention(torch.float32)
    one_hot = torch.eye(50).expand(2, 50, 50)    # as values they make the output the map itself
    outputs = [adapters.attend(q, k, one_hot, 1, padding, 0.3) for _ in range(500)]
    mean = torch.stack(outputs).mean(0)
    without = adapters.attend(q, k, one_hot, 1, padding)
    assert (mean - without).abs().max() < 0.1
    assert (mean - without).abs().mean() < 0.002
    real = torch.cat([out[0] for out in outputs])
    assert (real == 0).float().mean().item() == pytest.approx(0.3, abs=0.003)


def test_attention_with_dropout_runs_in_bf16():
    """Under autocast outputs and gradients are near those of float32."""
    tensors, padding = random_attention(torch.float32)
    results = []
    for enabled in (False, True):
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = adapters.attend(*[t.bfloat16() if enabled else t for t in tensors], 4, padding, 0.3)
        gradients = torch.autograd.grad(out.float().square().sum(), tensors)
        results.append([out.float(), *gradients])
    for exact, found in zip(*results, strict=True):
        assert (found - exact).abs().max() < 0.03 * exact.abs().max()


# --- HiVG's bridge --------------------------------------------------------------------------------


def small_bridge():
    """A bridge over three text layers of up to five tokens, with weights other than 0."""
    torch.manual_seed(0)
    bridge = CrossModalBridge(vision_dim=4, text_dim=3, text_layers=3, max_tokens=5, heads=2)
    disturb(bridge)
    nn.init.normal_(bridge.weights)
    return bridge


def random_texts(samples, tokens, dim=3, layers=3):
    return [torch.randn(samples, tokens, dim) for _ in range(layers)]


def test_bridge_selects_the_text_by_hivg_eqs_3_and_4():
    """*f = w ⊙ f + f for each layer; the layers are concatenated and projected."""
    bridge = small_bridge()
    texts = random_texts(2, 4)    # four of at most five tokens: a trimmed batch
    selected = bridge.select(texts)
    for b in range(2):
        for place in range(4):
            calibrated = []
            for i in range(3):
                for channel in range(3):
                    w = bridge.weights[i, place, channel].item()
                    f = texts[i][b, place, channel].item()
                    calibrated.append(w * f + f)                          # Eq. (3)
            expected = literal_linear(calibrated, bridge.projection)      # Eq. (4)
            assert selected[b, place].tolist() == pytest.approx(expected, abs=1e-5)


def test_bridge_is_hivg_section_3_2():
    """LayerNorm, multi-head cross-attention over the real text tokens, FFN, residual."""
    bridge = small_bridge()
    texts = random_texts(2, 4)
    padding = torch.tensor([[False, False, False, True], [False, False, False, False]])
    out = torch.randn(2, 6, 4)
    x = torch.randn(2, 6, 4)
    bridged = bridge(out, x, (texts, padding))

    text = bridge.select(texts).tolist()
    stream = (x + out).tolist()
    for b in range(2):
        keys = [literal_linear(token, bridge.k) for token in text[b]]
        values = [literal_linear(token, bridge.v) for token in text[b]]
        real = [j for j in range(4) if not padding[b, j]]
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


def test_bridge_starts_from_the_text_as_it_is():
    """The weights w start at 0 with one number for each layer, place and channel."""
    bridge = CrossModalBridge(4, 3, text_layers=2, max_tokens=5, heads=2)
    assert bridge.weights.shape == (2, 5, 3)
    assert not bridge.weights.any()
    texts = random_texts(1, 5, layers=2)
    expected = bridge.projection(torch.cat(texts, -1))
    assert torch.allclose(bridge.select(texts), expected)


@pytest.mark.parametrize("weights", ["nxLxH", "none", "aware"])
def test_bridge_refuses_another_number_of_text_layers(weights):
    """A bridge over two text layers cannot read one."""
    bridge = CrossModalBridge(4, 8, text_layers=2, max_tokens=5, heads=2, weights=weights)
    with pytest.raises(ValueError, match="reads 2 text layers, not 1"):
        bridge.select(random_texts(1, 5, dim=8, layers=1))


def test_unknown_bridge_weights_are_refused():
    """The message names the weights that exist."""
    with pytest.raises(ValueError, match="no bridge weights 'nxL': .* nxLxH"):
        CrossModalBridge(4, 3, text_layers=2, max_tokens=5, heads=2, weights="nxL")


def test_a_sample_of_the_bridge_does_not_depend_on_the_batch():
    """A sample alone, its text trimmed, gives what it gives in a batch, its text padded."""
    bridge = small_bridge()
    texts = random_texts(3, 5)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [2]])
    out = torch.randn(3, 6, 4)
    x = torch.randn(3, 6, 4)
    together = bridge(out, x, (texts, padding))
    for b in range(3):
        length = int((~padding[b]).sum())
        own_texts = [text[b:b + 1, :length] for text in texts]
        own_padding = padding[b:b + 1, :length]
        alone = bridge(out[b:b + 1], x[b:b + 1], (own_texts, own_padding))
        assert (alone[0] - together[b]).abs().max() <= 1e-6


@pytest.mark.parametrize("name, shape", [
    ("nxLxH", (3, 5, 3)),
    ("nxLx1", (3, 5, 1)),
    ("nx1xH", (3, 1, 3)),
    ("1x1xH", (1, 1, 3)),
])
def test_the_weights_of_a_bridge_have_the_shape_that_table_4_names(name, shape):
    """An axis of size 1 is shared by all layers, places or channels; Eq. (3) is the same."""
    torch.manual_seed(0)
    bridge = CrossModalBridge(4, 3, text_layers=3, max_tokens=5, heads=2, weights=name)
    assert bridge.weights.shape == shape
    nn.init.normal_(bridge.weights)

    texts = random_texts(2, 4)
    w = bridge.weights.expand(3, 5, 3)
    calibrated = []
    for i in range(3):
        calibrated.append(w[i, :4] * texts[i] + texts[i])
    expected = bridge.projection(torch.cat(calibrated, -1))
    assert torch.allclose(bridge.select(texts), expected, atol=1e-6)


def test_a_bridge_without_weights_projects_the_text_as_it_is():
    """With weights="none" there is no Eq. (3)."""
    bridge = CrossModalBridge(4, 8, 3, 5, 2, weights="none")
    texts = random_texts(2, 4, dim=8)
    assert bridge.weights is None
    assert torch.equal(bridge.select(texts), bridge.projection(torch.cat(texts, -1)))


def test_a_bridge_with_sample_aware_weights_computes_them_from_the_text():
    """With weights="aware" w is an MLP of f, and 0 at first."""
    bridge = CrossModalBridge(4, 8, 3, 5, 2, weights="aware")
    texts = random_texts(2, 4, dim=8)
    assert bridge.aware[0].out_features == 2    # H_l / 4
    assert torch.allclose(bridge.select(texts), bridge.projection(torch.cat(texts, -1)))

    nn.init.normal_(bridge.aware[2].weight)
    calibrated = []
    for f in texts:
        calibrated.append(bridge.aware(f) * f + f)
    expected = bridge.projection(torch.cat(calibrated, -1))
    assert torch.allclose(bridge.select(texts), expected)


def test_a_bridge_without_cross_attention_adds_the_mean_of_the_real_tokens():
    """With heads=0 all image tokens get the FFN of the mean of the text tokens that are real."""
    torch.manual_seed(0)
    bridge = disturb(CrossModalBridge(4, 3, text_layers=2, max_tokens=5, heads=0))
    texts = random_texts(2, 4, layers=2)
    padding = torch.tensor([[False, False, True, True], [False, False, False, False]])
    out = torch.randn(2, 6, 4)
    x = torch.randn(2, 6, 4)

    text = bridge.select(texts)
    bridged = bridge(out, x, (texts, padding))
    means = [text[0, :2].mean(0), text[1].mean(0)]
    for b in range(2):
        semantic = bridge.fc2(adapters.quick_gelu(bridge.fc1(means[b])))
        for token in range(6):
            assert torch.allclose(bridged[b, token], out[b, token] + semantic, atol=1e-6)
    assert not hasattr(bridge, "q")


def test_a_bridge_of_one_layer_reads_that_layer_alone():
    """With only=1 the bridge reads the second text and no other."""
    torch.manual_seed(0)
    bridge = CrossModalBridge(4, 3, text_layers=1, max_tokens=5, heads=2, only=1)
    texts = random_texts(2, 4)
    padding = torch.zeros(2, 4, dtype=torch.bool)
    out = torch.randn(2, 6, 4)
    x = torch.randn(2, 6, 4)
    expected = out + bridge.semantic(x + out, [texts[1]], padding)
    assert torch.equal(bridge(out, x, (texts, padding)), expected)
