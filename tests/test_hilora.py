"""hilora.py against Eqs. (5), (6) and (8) written out, and as its docstring promises to strangers' models."""
import copy
import math
import re

import pytest
import torch
import torch.nn as nn
import torchvision

import hilora


class Block(nn.Module):
    def __init__(self, dim=6):
        super().__init__()
        self.q, self.ffn = nn.Linear(dim, dim), nn.Sequential(nn.Linear(dim, 4), nn.ReLU(), nn.Linear(4, dim, bias=False))

    def forward(self, x):
        return x + self.ffn(self.q(x))


def stack(layers=6, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(*(Block() for _ in range(layers))).requires_grad_(False)


def train_pairs(model):
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)


def test_lora_linear_is_equation_5():
    torch.manual_seed(0)
    linear = nn.Linear(5, 3)
    pair = hilora.LoRALinear(linear, rank=2, alpha=6)
    nn.init.normal_(pair.B)
    x = torch.randn(5)
    h = linear(x) + 6 / 2 * (pair.B @ (pair.A @ x))
    assert torch.allclose(pair(x), h, atol=1e-6)
    assert pair.A.shape == (2, 5) and pair.B.shape == (3, 2)
    assert pair.weight is linear.weight and not pair.weight.requires_grad and not pair.bias.requires_grad
    assert set(pair.state_dict()) == {"weight", "bias", "A", "B"}


def test_a_is_gaussian_of_deviation_1_by_r_and_b_zero():
    torch.manual_seed(0)
    pair = hilora.LoRALinear(nn.Linear(4000, 4), rank=8, alpha=16)
    assert abs(pair.A.std().item() - 1 / 8) < 0.002 and abs(pair.A.mean().item()) < 0.003 and not pair.B.any()
    assert abs((pair.A / pair.A.std()).pow(4).mean().item() - 3) < 0.1               # a uniform would give 1.8


@pytest.mark.parametrize("layers, groups", [(12, 3), (24, 4), (6, 4), (5, 5), (7, 1)])
def test_layer_groups_count_up_evenly(layers, groups):
    found = [hilora.layer_group(layer, layers, groups) for layer in range(1, layers + 1)]
    assert found == [math.ceil(layer * groups / layers) for layer in range(1, layers + 1)]
    assert set(found) == set(range(1, groups + 1)) and found == sorted(found)
    if layers % groups == 0:
        assert all(found.count(group) == layers // groups for group in found)


@pytest.mark.parametrize("layer, layers, groups", [(0, 12, 3), (13, 12, 3), (1, 3, 4), (1, 3, 0)])
def test_impossible_groups_are_refused(layer, layers, groups):
    with pytest.raises(ValueError, match="group"):
        hilora.layer_group(layer, layers, groups)


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_stages_are_equation_6(groups):
    """W_0 x + the sum over k = ceil(l G / L) .. j of B_k A_k x, with all that each stage trained kept here apart."""
    model, L, history = stack(), 6, []
    start = copy.deepcopy(model)
    for j in range(1, groups + 1):
        hilora.add_stage(model, j, groups, rank=2, alpha=3, targets=("q", "ffn.0"))
        inside = {number for number, layer in enumerate(model, 1) if isinstance(layer.q, hilora.LoRALinear)}
        assert inside == {layer for layer in range(1, L + 1) if layer <= j * L / groups or hilora.layer_group(layer, L, groups) <= j}
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {f"{layer - 1}.{target}.{part}" for layer in inside for target in ("q", "ffn.0") for part in "AB"}
        train_pairs(model)
        history.append({layer: (model[layer - 1].q.B.detach().clone(), model[layer - 1].q.A.detach().clone()) for layer in inside})
        x = torch.randn(6)
        for layer in range(1, L + 1):
            h = start[layer - 1].q.weight @ x + start[layer - 1].q.bias
            for k in range(math.ceil(layer * groups / L), j + 1):
                B, A = history[k - 1][layer]
                h = h + 3 / 2 * B @ A @ x
            assert torch.allclose(model[layer - 1].q(x), h, atol=1e-5)
        hilora.merge(model)
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in start.named_parameters()}


def test_a_stage_starts_from_what_was_and_merging_changes_no_output():
    model, x = stack(), torch.randn(5, 6)
    for stage in (1, 2, 3):
        before = model(x)
        hilora.add_stage(model, stage, 3, rank=4, alpha=8, targets=("q", "ffn.2"))
        assert torch.equal(model(x), before)                                                   # ΔW = 0
        train_pairs(model)
        model.eval()                                                                           # does not merge behind one's back
        trained = model(x)
        assert not torch.allclose(trained, before, atol=1e-3) and len(hilora.find_pairs(model)) == 4 * stage
        hilora.merge(model)
        assert (model(x) - trained).abs().max() <= 1e-5 and not hilora.find_pairs(model)
        model.train()
    assert all(type(block.q) is nn.Linear and type(block.ffn[2]) is nn.Linear and block.ffn[2].bias is None for block in model)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in stack().parameters())
    assert not any(p.requires_grad for p in model.parameters())


def test_what_has_no_pair_stays_bitwise_as_it_was():
    model = stack()
    start = copy.deepcopy(model.state_dict())
    hilora.add_stage(model, 1, 3, targets=("q",))
    train_pairs(model)
    hilora.merge(model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    assert changed == {"0.q.weight", "1.q.weight"}


def test_deep_to_shallow_is_the_list_reversed():
    model = stack()
    hilora.add_stage(list(model)[::-1], 1, 3, targets=("q",))
    assert [isinstance(layer.q, hilora.LoRALinear) for layer in model] == [False] * 4 + [True] * 2


def test_one_group_takes_part_in_every_stage():
    model = stack()
    for stage in (1, 2, 3, 4):
        hilora.add_stage(model, stage, 1, targets=("q",))
        assert len(hilora.find_pairs(model)) == 6
        hilora.merge(model)


@pytest.mark.parametrize("order, message", [((2,), "stages go in order"), ((1, "merge", 1), "stages go in order"),
                                            ((1, "merge", 3), "stages go in order"), ((1, 2), "not merged"), ((0,), "no stage 0"),
                                            ((1, "merge", 2, "merge", 3, "merge", 4), "no stage 4"), (("merge",), "nothing to merge"),
                                            ((1, "merge", "merge"), "nothing to merge")])
def test_a_stage_or_a_merge_out_of_order_is_refused(order, message):
    model = stack()
    with pytest.raises(ValueError, match=message):
        for step in order:
            hilora.merge(model) if step == "merge" else hilora.add_stage(model, step, 3, targets=("q",))


def test_bad_targets_are_refused_before_anything_is_changed():
    model = stack().requires_grad_(True)
    with pytest.raises(ValueError, match="layer 1 has no 'k'"):
        hilora.add_stage(model, 1, 3, targets=("q", "k"))
    with pytest.raises(TypeError, match="plain nn.Linear, not ReLU"):
        hilora.add_stage(model, 1, 3, targets=("q", "ffn.1"))
    with pytest.raises(ValueError, match="needs targets"):
        hilora.add_stage(model, 1, 3, targets=())
    assert not hilora.find_pairs(model) and all(p.requires_grad for p in model.parameters())
    hilora.add_stage(model, 1, 3, rank=2, targets=("q",))                            # and stage 1 is still to be had
    vit = torchvision.models.VisionTransformer(32, 16, 1, 2, 8, 8)
    with pytest.raises(TypeError, match="NonDynamicallyQuantizableLinear"):      # MultiheadAttention reads it, uncalled
        hilora.add_stage(vit.encoder.layers, 1, 1, targets=("self_attention.out_proj",))
    with pytest.raises(ValueError, match="rank"):
        hilora.add_stage(stack(), 1, 3, rank=0, targets=("q",))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype(dtype):
    model = stack(2).to(dtype)
    hilora.add_stage(model, 1, 1, rank=2, targets=("q",))
    train_pairs(model)
    x = torch.randn(3, 6).to(dtype)
    before = model(x)
    hilora.merge(model)
    assert model[0].q.weight.dtype == dtype and torch.allclose(model(x), before, atol=0.1)


def test_the_ten_lines_of_the_docstring_run(monkeypatch):
    lines = re.search(r"modules:\n\n((?:    .+\n)+)$", hilora.__doc__)[1]
    small = torchvision.models.VisionTransformer(224, 112, 3, 2, 8, 8)
    nn.init.normal_(small.heads.head.weight)                             # torchvision's starts at 0 and lets no gradient in
    monkeypatch.setattr(torchvision.models, "vit_b_16", lambda: small)
    before = copy.deepcopy(small.state_dict())
    names = dict(torch=torch, torchvision=torchvision, add_stage=hilora.add_stage, merge=hilora.merge)
    exec(re.sub("^    ", "", lines, flags=re.M), names)
    changed = {name for name, value in small.state_dict().items() if not torch.equal(value, before[name])}
    assert len(lines.splitlines()) <= 10 and not hilora.find_pairs(small)
    assert changed == {f"encoder.layers.encoder_layer_{i}.mlp.{j}.weight" for i in range(3) for j in (0, 3)}
