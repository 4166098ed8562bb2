"""adapters.py against literal loops over the paper's equations."""
import math

import pytest
import torch
import torch.nn as nn

from adapters import CrossModalBridge, ExpertAdapter, InteractionAdapter, SideNetworks


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
    iea = InteractionAdapter(4, 8, bottleneck=3, interaction_dim=4)
    assert iea.vision_up is None and iea.text_up.out_features == 4
    f_v, f_l = iea(torch.randn(1, 2, 4), torch.randn(1, 2, 8))
    for f in (f_v, f_l):                                 # both modalities train it
        iea.zero_grad()
        f.sum().backward(retain_graph=True)
        assert iea.shared_up.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="interaction_dim"):
        InteractionAdapter(4, 8, interaction_dim=5)


def test_side_networks_follow_the_recurrence_with_the_paired_layers():
    side = SideNetworks(4, 6, layers=2, text_layers=[2, 4], bottleneck=3, interaction_dim=4, interaction_bottleneck=2)
    x0_v, x0_l = torch.randn(1, 3, 4), torch.randn(1, 2, 6)
    ports_v = [(torch.randn(1, 3, 4), torch.randn(1, 3, 4)) for _ in range(2)]
    ports_l = [(torch.randn(1, 2, 6), torch.randn(1, 2, 6)) for _ in range(4)]
    s_v, s_l = x0_v, x0_l
    for l, block in enumerate(side.blocks):
        s_v = s_v + block.iea.vision(ports_v[l][0]) + block.vea(ports_v[l][1])
        text_layer = [2, 4][l] - 1
        s_l = s_l + block.iea.text(ports_l[text_layer][0]) + block.lea(ports_l[text_layer][1])
    assert torch.allclose(side.vision(x0_v, ports_v), s_v, atol=1e-6)
    assert torch.allclose(side.text(x0_l, ports_l), s_l, atol=1e-6)
    with pytest.raises(ValueError, match="paired"):
        SideNetworks(4, 6, layers=2, text_layers=[1])


def test_init_is_kaiming_normal_with_zero_biases():
    torch.manual_seed(0)
    side = SideNetworks(256, 768, layers=1, text_layers=[1])
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
