"""adapters.py against literal loops over the paper's equations."""
import math

import pytest
import torch
import torch.nn as nn

from adapters import ExpertAdapter, InteractionAdapter, SideNetworks


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
