"""hilora.py against HiVG Eqs. (5)-(8) written out, and as its docstring promises."""
import copy
import math
import re
import textwrap

import pytest
import torch
import torch.nn as nn
import torchvision

import hilora


class Block(nn.Module):
    def __init__(self, dim=6):
        super().__init__()
        self.q = nn.Linear(dim, dim)
        self.ffn = nn.Sequential(nn.Linear(dim, 4), nn.ReLU(), nn.Linear(4, dim, bias=False))

    def forward(self, x):
        return x + self.ffn(self.q(x))


def six_layers():
    """A frozen model of six layers, the same each time."""
    torch.manual_seed(0)
    return nn.Sequential(*[Block() for _ in range(6)]).requires_grad_(False)


def train_factors(model):
    """A stand-in for training: whatever is trainable gets random values."""
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)


def changed_names(before, after):
    """The names of the tensors that differ between two state dicts of the same names."""
    assert list(before) == list(after)
    return {name for name in before if not torch.equal(before[name], after[name])}


# --- One linear layer -----------------------------------------------------------------------------


def test_lora_linear_is_hivg_eq_5():
    """h = W x + α/r B A x. W and the bias are those of the linear layer, under their names, and are
    frozen; A (r, k) and B (d, r) are new."""
    torch.manual_seed(0)
    linear = nn.Linear(9, 7)
    lora = hilora.LoRALinear(linear, rank=4, alpha=6)
    assert lora.weight is linear.weight and not lora.weight.requires_grad
    assert lora.bias is linear.bias and not lora.bias.requires_grad
    assert set(lora.state_dict()) == {"weight", "bias", "A", "B"}
    assert lora.A.shape == (4, 9)
    assert lora.B.shape == (7, 4)

    nn.init.normal_(lora.B)
    x = torch.randn(9)
    h = linear.weight @ x + linear.bias + 6 / 4 * (lora.B @ (lora.A @ x))
    assert torch.allclose(lora(x), h, atol=1e-6)


def test_a_is_gaussian_of_variance_1_by_3k_at_any_rank_and_b_is_zero():
    """A is drawn from N(0, 1 / (3k)) [D20], and B starts at 0."""
    torch.manual_seed(0)
    for rank in (8, 64):
        lora = hilora.LoRALinear(nn.Linear(4000, 4), rank)
        z = lora.A * math.sqrt(3 * 4000)
        assert z.std().item() == pytest.approx(1, rel=0.02)
        assert abs(z.mean().item()) < 0.03
        assert z.pow(4).mean().item() == pytest.approx(3, rel=0.1)    # of a uniform one, 1.8
        assert not lora.B.any()


# --- Groups and stages ----------------------------------------------------------------------------


def test_stage_targets_are_the_layers_of_hivg_eq_6():
    """Stage j trains the targets of the layers l <= j L / G alone. A single group, such as that of
    the text tower, takes part in every stage."""
    for L, G in ((12, 3), (24, 4), (6, 4), (5, 5), (7, 1)):
        for stage in range(1, G + 1):
            expected = []
            for l in range(1, L + 1):
                if l * G <= stage * L:
                    expected += [(l, "q"), (l, "ffn.0")]
            assert hilora.stage_targets(range(L), stage, G, ("q", "ffn.0")) == expected
    assert hilora.stage_targets(range(2), 5, 1, ("q",)) == [(1, "q"), (2, "q")]


def test_impossible_groups_are_refused():
    """A layer outside 1 .. L, more groups than layers, and no group at all are errors."""
    for layer, layers, groups in ((0, 12, 3), (13, 12, 3), (1, 3, 4), (1, 3, 0)):
        with pytest.raises(ValueError, match="group"):
            hilora.layer_group(layer, layers, groups)


@pytest.mark.parametrize("groups", [1, 3, 4])
def test_the_hidden_state_is_hivg_eq_6(groups):
    """h = W_0 x + the sum of α/r B_k A_k x over the stages k = ceil(l G / L) .. j."""
    model = six_layers()
    start = copy.deepcopy(model)
    L = 6
    history = []    # for each stage {layer: (B, A)}, noted apart from the model
    for j in range(1, (groups if groups > 1 else 3) + 1):
        hilora.add_stage(model, j, groups, rank=2, alpha=3, targets=("q", "ffn.0"))
        train_factors(model)
        trained = {}
        for l, layer in enumerate(model, start=1):
            if isinstance(layer.q, hilora.LoRALinear):
                trained[l] = (layer.q.B.detach().clone(), layer.q.A.detach().clone())
        history.append(trained)

        x = torch.randn(6)
        for l in range(1, L + 1):
            linear = start[l - 1].q
            h = linear.weight @ x + linear.bias    # W_0 x, which is all for l > j L / G: Eq. (7)
            for k in range(math.ceil(l * groups / L), j + 1):
                B, A = history[k - 1][l]
                h = h + 3 / 2 * B @ A @ x
            assert torch.allclose(model[l - 1].q(x), h, atol=1e-5)
        hilora.merge(model)


def test_a_stage_trains_its_factors_and_nothing_else():
    """Stage 2 of 3 over six layers trains A and B on layers 1 to 4. After the merge their weights
    have changed, and all others are bitwise as they were."""
    model = six_layers()
    start = copy.deepcopy(model.state_dict())
    hilora.add_stage(model, 2, 3, rank=2, targets=("q", "ffn.0"))
    expected = {f"{l}.{target}" for l in range(4) for target in ("q", "ffn.0")}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.{factor}" for name in expected for factor in "AB"}

    found = hilora.lora_modules(model)
    assert set(found) == expected
    assert found["3.ffn.0"] is model[3].ffn[0]

    train_factors(model)
    hilora.merge(model)
    assert changed_names(start, model.state_dict()) == {f"{name}.weight" for name in expected}


def test_a_stage_starts_from_the_last_and_merging_changes_no_output():
    """Fresh factors change nothing, and merging changes the outputs by rounding alone. After the
    last stage the model has exactly the modules that it had before the first one, all frozen."""
    model = six_layers()
    x = torch.randn(5, 6)
    for stage in (1, 2, 3):
        before = model(x)
        hilora.add_stage(model, stage, 3, rank=4, alpha=8, targets=("q", "ffn.2"))
        assert torch.equal(model(x), before)    # ΔW = 0

        train_factors(model)
        model.eval()    # does not merge
        trained = model(x)
        assert not torch.allclose(trained, before, atol=1e-3)
        hilora.merge(model)
        assert (model(x) - trained).abs().max() <= 1e-5
        assert not hilora.lora_modules(model)

    assert set(vars(model[0].q)) == set(vars(nn.Linear(6, 6)))    # no mark is left on it
    assert not model[0].q.training                                # the mode is kept
    assert str(model) == str(six_layers())
    assert list(model.state_dict()) == list(six_layers().state_dict())
    assert not any(p.requires_grad for p in model.parameters())


def test_discarded_factors_change_nothing():
    """The weights are bitwise those from before the stage, even if A and B have diverged. With no
    LoRA there is nothing to do."""
    model = six_layers()
    start = copy.deepcopy(model.state_dict())
    hilora.add_stage(model, 1, 3, targets=("q", "ffn.2"))
    train_factors(model)
    nn.init.constant_(model[0].q.A, float("nan"))
    for _ in range(2):
        hilora.merge(model, discard=True)
        assert not changed_names(start, model.state_dict())
        assert not any(p.requires_grad for p in model.parameters())


def test_deep_to_shallow_is_the_list_reversed():
    """The first stage of the reversed list trains the deepest layers."""
    model = six_layers()
    hilora.add_stage(list(model)[::-1], 1, 3, targets=("q",))
    assert set(hilora.lora_modules(model)) == {"4.q", "5.q"}


def test_a_merged_weight_is_computed_in_float32_and_keeps_its_precision():
    """W + α/r B A is rounded once, to the precision of W."""
    model = six_layers().to(torch.bfloat16)
    hilora.add_stage(model, 1, 1, rank=2, alpha=3, targets=("q",))
    train_factors(model)
    q = model[0].q
    exact = q.weight.double() + 3 / 2 * q.B.double() @ q.A.double()
    hilora.merge(model)
    assert torch.equal(model[0].q.weight, exact.bfloat16())


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("stage, options, error, message", [
    (0, {}, ValueError, "no stage 0"),
    (4, {}, ValueError, "no stage 4"),
    (1, dict(targets=("q", "k")), ValueError, "layer 1 has no 'k'"),
    (1, dict(targets=("q", "ffn.1")), TypeError, "plain nn.Linear, not ReLU"),
    (1, dict(targets=()), ValueError, "needs targets"),
    (1, dict(rank=0), ValueError, "rank"),
])
def test_a_bad_stage_is_refused_before_anything_is_changed(stage, options, error, message):
    """After a refusal the model is as it was, and stage 1 can still begin."""
    model = six_layers().requires_grad_(True)
    with pytest.raises(error, match=message):
        hilora.add_stage(model, stage, 3, **{"targets": ("q",), **options})
    assert not hilora.lora_modules(model)
    assert all(p.requires_grad for p in model.parameters())
    hilora.add_stage(model, 1, 3, targets=("q",))


def test_a_stage_or_a_merge_out_of_order_is_refused():
    """A stage cannot begin before the last one is merged, nor can anything be merged twice."""
    model = six_layers()
    with pytest.raises(ValueError, match="nothing to merge"):
        hilora.merge(model)
    hilora.add_stage(model, 1, 3, targets=("q",))
    with pytest.raises(ValueError, match="not merged yet"):
        hilora.add_stage(model, 2, 3, targets=("ffn.0",))
    assert set(hilora.lora_modules(model)) == {"0.q", "1.q"}
    with pytest.raises(ValueError, match="in 0 layers"):
        hilora.add_stage([], 1, 1)


def test_a_linear_layer_that_others_read_uncalled_is_refused():
    """MultiheadAttention reads the weight of out_proj without calling it, so LoRA would be lost."""
    vit = torchvision.models.VisionTransformer(32, 16, 1, 2, 8, 8)
    with pytest.raises(TypeError, match="NonDynamicallyQuantizableLinear"):
        hilora.add_stage(vit.encoder.layers, 1, 1, targets=("self_attention.out_proj",))


# --- The example of the docstring -----------------------------------------------------------------


def test_the_example_of_the_docstring_trains_a_vit(monkeypatch):
    """The ten lines change each stage's target weights, and nothing else of the encoder."""
    torch.manual_seed(0)
    small = torchvision.models.VisionTransformer(224, 112, 3, 2, 8, 8)
    monkeypatch.setattr(torchvision.models, "vit_b_16", lambda: small)
    snapshots = [copy.deepcopy(small.encoder.state_dict())]    # before stage 1, after each stage

    def merge_and_note(module):
        hilora.merge(module)
        snapshots.append(copy.deepcopy(module.encoder.state_dict()))

    example = re.search(r"^    vit = (?:.+\n)+", hilora.__doc__, flags=re.M)[0]
    exec(textwrap.dedent(example), {"torch": torch, "torchvision": torchvision,
                                    "add_stage": hilora.add_stage, "merge": merge_and_note})
    assert len(example.splitlines()) <= 10
    assert len(snapshots) == 4
    for stage in (1, 2, 3):
        expected = set()
        for layer in range(stage):    # layers 1 .. stage of three
            expected.add(f"layers.encoder_layer_{layer}.mlp.0.weight")
            expected.add(f"layers.encoder_layer_{layer}.mlp.3.weight")
        assert changed_names(snapshots[stage - 1], snapshots[stage]) == expected
