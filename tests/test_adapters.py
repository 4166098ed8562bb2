"""adapters.py against literal loops over the paper's equations."""
import math

import pytest
import torch
import torch.nn as nn

import adapters
from adapters import AdapterNetworks, CrossModalBridge, ExpertAdapter, InteractionAdapter


def by_hand(x, linear):
    """x W + b, one output at a time; x is a list of numbers."""
    return [sum(w * v for w, v in zip(row, x)) + b for row, b in zip(linear.weight.tolist(), linear.bias.tolist())]


def relu(x):
    return [max(0.0, v) for v in x]


def layer_norm(x, norm):
    mean = sum(x) / len(x)
    var = sum((v - mean) ** 2 for v in x) / len(x)
    return [(v - mean) / math.sqrt(var + norm.eps) * w + b for v, w, b in zip(x, norm.weight.tolist(), norm.bias.tolist())]


def disturb(module):
    """Give biases and norms values of their own, so that a forgotten one shows."""
    for p in module.parameters():
        if p.dim() == 1:
            nn.init.normal_(p, 0.5, 0.5)
    return module


def assert_tokens(actual, expected):
    assert torch.allclose(actual, torch.tensor(expected), atol=1e-5), (actual, expected)


@pytest.mark.parametrize("residual", [False, True])
def test_expert_adapter_is_eq_1(residual):
    ea = disturb(ExpertAdapter(6, bottleneck=3, scale=0.3, residual=residual))
    x = torch.randn(4, 6)
    expected = []
    for token in x.tolist():
        z = relu(by_hand(layer_norm(token, ea.norm), ea.down))
        expected.append([0.3 * f + (v if residual else 0) for v, f in zip(token, by_hand(z, ea.up))])
    assert_tokens(ea(x), expected)


@pytest.mark.parametrize("residual", [False, True])
def test_interaction_adapter_is_eqs_2_to_5(residual):
    iea = disturb(InteractionAdapter(5, 8, bottleneck=3, interaction_dim=4, scale=0.3, residual=residual))
    x_v, x_l = torch.randn(2, 5), torch.randn(3, 8)
    f_v, f_l = iea(x_v, x_l)
    for x, f, down, own_up in ((x_v, f_v, iea.vision_down, iea.vision_up), (x_l, f_l, iea.text_down, iea.text_up)):
        expected = []
        for token in x.tolist():
            z = relu(by_hand(token, down))
            both = by_hand(z, own_up) + by_hand(z, iea.shared_up)        # Concat of own and interactive channels
            expected.append([0.3 * o + (v if residual else 0) for v, o in zip(token, both)])
        assert_tokens(f, expected)


def test_one_tensor_is_shared_and_vision_may_have_no_channels_of_its_own():
    torch.manual_seed(0)
    iea = InteractionAdapter(4, 8, bottleneck=3, interaction_dim=4)
    assert iea.vision_up is None and iea.text_up.out_features == 4
    f_v, f_l = iea(torch.randn(1, 2, 4), torch.randn(1, 2, 8))
    for f in (f_v, f_l):                                 # both modalities train it
        iea.zero_grad()
        f.sum().backward(retain_graph=True)
        assert iea.shared_up.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="interaction_dim"):
        InteractionAdapter(4, 8, interaction_dim=5)


def networks(**options):
    torch.manual_seed(0)
    return disturb(AdapterNetworks(4, 6, layers=2, text_layers=[2, 4], bottleneck=3, interaction_dim=4,
                                   interaction_bottleneck=2, **options))


def random_ports(layers, dim):
    return [{"attention": torch.randn(1, 3, dim), "ffn": torch.randn(1, 3, dim)} for _ in range(layers)]


def test_side_networks_follow_the_recurrence_with_the_paired_layers():
    side = networks()
    x0_v, x0_l, ports_v, ports_l = torch.randn(1, 3, 4), torch.randn(1, 3, 6), random_ports(2, 4), random_ports(4, 6)
    s_v, s_l = x0_v, x0_l
    for l, block in enumerate(side.blocks):
        iea, pair, text_layer = block["attention"], block["ffn"], [2, 4][l] - 1
        s_v = s_v + iea.vision(ports_v[l]["attention"]) + pair.vea(ports_v[l]["ffn"])
        s_l = s_l + iea.text(ports_l[text_layer]["attention"]) + pair.lea(ports_l[text_layer]["ffn"])
    assert torch.allclose(side.side("vision", x0_v, ports_v), s_v, atol=1e-6)
    assert torch.allclose(side.side("text", x0_l, ports_l), s_l, atol=1e-6)
    with pytest.raises(ValueError, match="paired"):
        AdapterNetworks(4, 6, layers=2, text_layers=[1])


@pytest.mark.parametrize("attention, ffn, kinds", [
    ("ea", "iea", ("ExpertPair", "InteractionAdapter")), ("iea", "iea", ("InteractionAdapter", "InteractionAdapter")),
    ("none", "ea", (None, "ExpertPair")), ("iea", "none", ("InteractionAdapter", None))])
def test_what_stands_at_the_ports_is_what_was_asked_for(attention, ffn, kinds):
    for block in networks(attention_port=attention, ffn_port=ffn).blocks:
        assert tuple(type(block[port]).__name__ if port in block else None for port in ("attention", "ffn")) == kinds


@pytest.mark.parametrize("port, has, lacks", [("vea", "vision", "text"), ("lea", "text", "vision")])
def test_an_expert_of_one_modality_leaves_the_other_without_a_side_network(port, has, lacks):
    """Table V (b), (c): where no adapter stands there are no side network and no parameters."""
    side, dims = networks(attention_port="none", ffn_port=port), {"vision": 4, "text": 6}
    x0, ports = torch.randn(1, 3, dims[has]), random_ports(4, dims[has])
    layers = {"vision": [1, 2], "text": [2, 4]}[has]
    ea = [block["ffn"].vea if port == "vea" else block["ffn"].lea for block in side.blocks]
    expected = x0 + sum(adapter(ports[layer - 1]["ffn"]) for adapter, layer in zip(ea, layers))
    assert torch.allclose(side.side(has, x0, ports), expected, atol=1e-6)
    assert side.side(lacks, torch.randn(1, 3, dims[lacks]), random_ports(4, dims[lacks])) == 0
    assert {p.shape[-1] for name, p in side.named_parameters() if "down.weight" in name} == {dims[has]}


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.plugs = nn.ModuleDict()


@pytest.mark.parametrize("insertion", ["sequential", "parallel"])
def test_an_inserted_adapter_starts_as_the_identity_and_adds_to_its_port(insertion):
    """Fig. 3 (a), (b): sequential reads what the port puts out, parallel what the sublayer was given."""
    stack, layers = networks(), nn.ModuleList(Layer() for _ in range(4))
    stack.insert("text", layers, insertion)
    assert [sorted(layer.plugs) for layer in layers] == [[], ["attention", "ffn"], [], ["attention", "ffn"]]
    out, x = torch.randn(1, 3, 6), torch.randn(1, 3, 6)
    for p in (p for name, p in stack.named_parameters() if name.endswith("up.bias")):
        nn.init.zeros_(p)                                                            # as init_adapter leaves them
    for layer in (layers[1], layers[3]):
        assert all(torch.equal(plug(out, x, None), out) for plug in layer.plugs.values())
    disturb(stack), [nn.init.normal_(p) for name, p in stack.named_parameters() if name.endswith("up.weight")]
    read = out if insertion == "sequential" else x
    for block, layer in zip(stack.blocks, (layers[1], layers[3])):
        assert torch.equal(layer.plugs["attention"](out, x, None), out + block["attention"].text(read))
        assert torch.equal(layer.plugs["ffn"](out, x, None), out + block["ffn"].lea(read))
    assert not list(layers.parameters())                        # the adapters' weights go by one name, their stack's


def test_init_is_kaiming_normal_with_zero_biases():
    torch.manual_seed(0)
    side = AdapterNetworks(256, 768, layers=1, text_layers=[1])
    for linear in (m for m in side.modules() if isinstance(m, nn.Linear)):
        assert linear.weight.std().item() == pytest.approx(math.sqrt(2 / linear.in_features), rel=0.03)
        assert linear.bias.abs().max() == 0


# ---------------------------------------------------------------------------------------------------------------------
# HiVG's bridge

def bridge(n=3, places=5):
    torch.manual_seed(0)
    module = CrossModalBridge(vision_dim=4, text_dim=3, text_layers=n, max_tokens=places, heads=2)
    disturb(module)
    nn.init.normal_(module.weights)
    return module


def test_bridge_selects_the_text_by_equations_3_and_4():
    module = bridge()
    texts = [torch.randn(2, 4, 3) for _ in range(3)]                   # four of five places: a trimmed batch
    found = module.select(texts)
    for b in range(2):
        for place in range(4):
            row = []
            for i in range(3):
                for channel in range(3):
                    w, f = module.weights[i, place, channel].item(), texts[i][b, place, channel].item()
                    row.append(w * f + f)                                                            # Eq. (3)
            assert found[b, place].tolist() == pytest.approx(by_hand(row, module.projection), abs=1e-5)     # Eq. (4)


def test_bridge_is_section_3_2_by_a_literal_loop():
    """LayerNorm, multi-head cross-attention over what is not padding, FFN; added to what attention put out."""
    module, texts = bridge(), [torch.randn(2, 4, 3) for _ in range(3)]
    padding = torch.tensor([[False, False, False, True], [False, False, False, False]])
    out, x = torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    found = module(out, x, (texts, padding))
    text = module.select(texts)
    for b in range(2):
        k, v = ([by_hand(row, linear) for row in text[b].tolist()] for linear in (module.k, module.v))
        for token in range(6):
            q = by_hand(layer_norm((x + out)[b, token].tolist(), module.norm), module.q)
            attended = []
            for head in (slice(0, 2), slice(2, 4)):
                real = [j for j in range(4) if not padding[b, j]]
                scores = [math.exp(sum(p * r for p, r in zip(q[head], k[j][head])) / math.sqrt(2)) for j in real]
                attended += [sum(score * v[j][channel] for score, j in zip(scores, real)) / sum(scores)
                             for channel in range(4)[head]]
            hidden = [h / (1 + math.exp(-1.702 * h)) for h in by_hand(by_hand(attended, module.out), module.fc1)]
            expected = [o + f for o, f in zip(out[b, token].tolist(), by_hand(hidden, module.fc2))]
            assert found[b, token].tolist() == pytest.approx(expected, abs=1e-4)


def test_bridge_starts_from_the_text_as_it_is_and_its_weights_have_every_axis():
    module = CrossModalBridge(4, 3, text_layers=2, max_tokens=5, heads=2)
    assert module.weights.shape == (2, 5, 3) and not module.weights.any()
    texts = [torch.randn(1, 5, 3), torch.randn(1, 5, 3)]
    assert torch.allclose(module.select(texts), module.projection(torch.cat(texts, -1)))
    with pytest.raises(ValueError):
        module.select(texts[:1])                                       # as many layers as it was built for


def test_a_sample_of_the_bridge_knows_nothing_of_its_neighbours():
    module, texts = bridge(), [torch.randn(3, 5, 3) for _ in range(3)]
    padding = torch.arange(5) >= torch.tensor([[5], [3], [2]])
    out, x = torch.randn(3, 6, 4), torch.randn(3, 6, 4)
    together = module(out, x, (texts, padding))
    for b in range(3):
        length = int((~padding[b]).sum())
        alone = module(out[b:b + 1], x[b:b + 1], ([t[b:b + 1, :length] for t in texts], padding[b:b + 1, :length]))
        assert (alone[0] - together[b]).abs().max() <= 1e-6


@pytest.mark.parametrize("name, shape", [("nxLxH", (3, 5, 3)), ("nxLx1", (3, 5, 1)), ("nx1xH", (3, 1, 3)), ("1x1xH", (1, 1, 3))])
def test_the_weights_of_a_bridge_have_the_shape_that_table_4_names(name, shape):
    """One of the shape of 1 along an axis is shared by all layers, places or channels; Eq. (3) is the same."""
    torch.manual_seed(0)
    module = CrossModalBridge(4, 3, text_layers=3, max_tokens=5, heads=2, weights=name)
    assert module.weights.shape == shape
    nn.init.normal_(module.weights)
    texts = [torch.randn(2, 4, 3) for _ in range(3)]
    full = module.weights.expand(3, 5, 3)
    calibrated = [full[i, :4] * texts[i] + texts[i] for i in range(3)]
    assert torch.allclose(module.select(texts), module.projection(torch.cat(calibrated, -1)), atol=1e-6)


def test_a_bridge_without_weights_or_with_weights_aware_of_the_sample():
    texts = [torch.randn(2, 4, 8) for _ in range(3)]
    none = CrossModalBridge(4, 8, 3, 5, 2, weights="none")
    assert none.weights is None and torch.equal(none.select(texts), none.projection(torch.cat(texts, -1)))
    aware = CrossModalBridge(4, 8, 3, 5, 2, weights="aware")
    assert torch.allclose(aware.select(texts), aware.projection(torch.cat(texts, -1)))             # at first: the text as it is
    nn.init.normal_(aware.aware[2].weight)
    assert torch.allclose(aware.select(texts), aware.projection(torch.cat([aware.aware(f) * f + f for f in texts], -1)))


def test_a_bridge_without_cross_attention_gives_all_of_the_picture_the_mean_of_the_real_tokens():
    module = disturb(CrossModalBridge(4, 3, text_layers=2, max_tokens=5, heads=0))
    texts, padding = [torch.randn(2, 4, 3) for _ in range(2)], torch.tensor([[False, False, True, True], [False] * 4])
    out, x = torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    text = module.select(texts)
    mean = torch.stack([text[0, :2].mean(0), text[1].mean(0)])[:, None]
    expected = out + module.fc2(adapters.quick_gelu(module.fc1(mean)))
    assert torch.allclose(module(out, x, (texts, padding)), expected, atol=1e-6)
    assert not hasattr(module, "q")


def test_a_bridge_of_one_layer_is_given_that_layer_alone():
    torch.manual_seed(0)
    module = CrossModalBridge(4, 3, text_layers=1, max_tokens=5, heads=2, only=1)
    texts, padding = [torch.randn(2, 4, 3) for _ in range(3)], torch.zeros(2, 4, dtype=torch.bool)
    out, x = torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    assert torch.equal(module(out, x, (texts, padding)), out + module.semantic(x + out, [texts[1]], padding))
