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


def stack(layers=6):
    """A frozen model of some layers, the same each time."""
    torch.manual_seed(0)
    blocks = [Block() for _ in range(layers)]
    return nn.Sequential(*blocks).requires_grad_(False)


def train_pairs(model):
    """A stand-in for training: whatever is trainable gets random values."""
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)


def layers_with_pairs(model):
    """The numbers, from 1, of the layers whose q is a pair."""
    numbers = set()
    for number, layer in enumerate(model, start=1):
        if isinstance(layer.q, hilora.LoRALinear):
            numbers.add(number)
    return numbers


# --- One linear -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [2, 4])
def test_lora_linear_is_hivg_eq_5(rank):
    """h = W x + α/r B A x, whether BA is added to W first or not, with the gradients of it."""
    torch.manual_seed(0)
    linear = nn.Linear(9, 7)
    pair = hilora.LoRALinear(linear, rank, alpha=6)
    nn.init.normal_(pair.B)
    x = torch.randn(9)
    h = linear.weight @ x + linear.bias + 6 / rank * (pair.B @ (pair.A @ x))
    assert torch.allclose(pair(x), h, atol=1e-6)
    expected = torch.autograd.grad(h.square().sum(), [pair.A, pair.B])
    found = torch.autograd.grad(pair(x).square().sum(), [pair.A, pair.B])
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_lora_linear_takes_over_the_weights_of_its_linear():
    """The linear's parameters keep their names and are frozen; A (r, k) and B (d, r) are new."""
    linear = nn.Linear(5, 3)
    pair = hilora.LoRALinear(linear, rank=2, alpha=6)
    assert pair.A.shape == (2, 5)
    assert pair.B.shape == (3, 2)
    assert pair.weight is linear.weight
    assert not pair.weight.requires_grad
    assert not pair.bias.requires_grad
    assert set(pair.state_dict()) == {"weight", "bias", "A", "B"}


@pytest.mark.parametrize("rank", [8, 64])
def test_a_is_gaussian_of_variance_1_by_3k_at_any_rank_and_b_is_zero(rank):
    """A is drawn from N(0, 1 / (3k)), whatever the rank, and B starts at 0."""
    torch.manual_seed(0)
    k = 4000
    pair = hilora.LoRALinear(nn.Linear(k, 4), rank, alpha=16)
    deviation = 1 / math.sqrt(3 * k)
    assert pair.A.std().item() == pytest.approx(deviation, rel=0.02)
    assert abs(pair.A.mean().item()) < 0.03 * deviation
    kurtosis = (pair.A / pair.A.std()).pow(4).mean().item()
    assert abs(kurtosis - 3) < 0.1    # a uniform distribution would give 1.8
    assert not pair.B.any()


def test_the_start_of_a_has_the_deviation_of_kaiming_uniform():
    """PEFT and loralib start A as nn.Linear starts a weight, which has the same deviation."""
    torch.manual_seed(0)
    linear = nn.Linear(4000, 64)    # nn.Linear draws its weight by Kaiming uniform with a = sqrt(5)
    pair = hilora.LoRALinear(nn.Linear(4000, 4), rank=64)
    assert pair.A.std().item() == pytest.approx(linear.weight.std().item(), rel=0.02)


# --- Groups and stages ----------------------------------------------------------------------------


@pytest.mark.parametrize("layers, groups", [(12, 3), (24, 4), (6, 4), (5, 5), (7, 1)])
def test_the_group_of_a_layer_is_ceil_of_l_g_by_l(layers, groups):
    """The group of layer l is ceil(l G / L); groups are even where G divides L."""
    found = []
    for layer in range(1, layers + 1):
        group = hilora.layer_group(layer, layers, groups)
        assert group == math.ceil(layer * groups / layers)
        found.append(group)
    assert set(found) == set(range(1, groups + 1))
    assert found == sorted(found)
    if layers % groups == 0:
        for group in range(1, groups + 1):
            assert found.count(group) == layers // groups


@pytest.mark.parametrize("layer, layers, groups", [(0, 12, 3), (13, 12, 3), (1, 3, 4), (1, 3, 0)])
def test_impossible_groups_are_refused(layer, layers, groups):
    """A layer outside 1 .. L, and groups without a layer, are errors."""
    with pytest.raises(ValueError, match="group"):
        hilora.layer_group(layer, layers, groups)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_stage_targets_are_the_layers_of_hivg_eq_6(groups):
    """Stage j trains the targets of the layers l <= j L / G, and no others."""
    layers = list(range(6))
    for stage in range(1, groups + 1):
        expected = []
        for number in range(1, 7):
            if number <= stage * 6 / groups:
                expected.append((number, "q"))
                expected.append((number, "ffn.0"))
        assert hilora.stage_targets(layers, stage, groups, ("q", "ffn.0")) == expected


@pytest.mark.parametrize("stage", [1, 2, 5])
def test_stage_targets_of_one_group_are_all_layers(stage):
    """A single group, such as the text tower, takes part in every stage."""
    assert hilora.stage_targets([0, 0], stage, 1, ("q",)) == [(1, "q"), (2, "q")]


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_a_stage_trains_the_pairs_of_hivg_eq_6_alone(groups):
    """In stage j the layers with l <= j L / G have pairs, and nothing else is trainable."""
    model = stack()
    L = 6
    for j in range(1, groups + 1):
        hilora.add_stage(model, j, groups, rank=2, alpha=3, targets=("q", "ffn.0"))
        inside = set()
        for l in range(1, L + 1):
            if math.ceil(l * groups / L) <= j:
                inside.add(l)
        assert layers_with_pairs(model) == inside

        expected = set()
        for l in inside:
            for target in ("q", "ffn.0"):
                expected.add(f"{l - 1}.{target}.A")
                expected.add(f"{l - 1}.{target}.B")
        assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
        hilora.merge(model)


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_the_hidden_state_is_hivg_eq_6(groups):
    """h = W_0 x + the sum of α/r B_k A_k x over the stages k = ceil(l G / L) .. j."""
    model = stack()
    start = copy.deepcopy(model)
    L = 6
    history = []    # for each stage {layer: (B, A)}, noted apart from the model
    for j in range(1, groups + 1):
        hilora.add_stage(model, j, groups, rank=2, alpha=3, targets=("q", "ffn.0"))
        train_pairs(model)
        trained = {}
        for l in layers_with_pairs(model):
            pair = model[l - 1].q
            trained[l] = (pair.B.detach().clone(), pair.A.detach().clone())
        history.append(trained)

        x = torch.randn(6)
        for l in range(1, L + 1):
            linear = start[l - 1].q
            h = linear.weight @ x + linear.bias    # W_0 x
            for k in range(math.ceil(l * groups / L), j + 1):
                B, A = history[k - 1][l]
                h = h + 3 / 2 * B @ A @ x
            assert torch.allclose(model[l - 1].q(x), h, atol=1e-5)
        hilora.merge(model)

    names = [name for name, _ in model.named_parameters()]
    assert sorted(names) == sorted(name for name, _ in start.named_parameters())


def test_hivg_eqs_7_and_8_have_the_bridge_in_the_input():
    """Within C the input is f_v^{l-1} + f_v^sa; beyond j L / G the layer applies W_0 alone."""
    model = stack(layers=2)
    start = copy.deepcopy(model)
    hilora.add_stage(model, 1, 2, rank=2, alpha=2, targets=("q",))    # layer 1 of 2
    train_pairs(model)
    f = torch.randn(6)
    f_sa = torch.randn(6)    # from a bridge
    for x in (f, f + f_sa):
        shallow = start[0].q(x) + model[0].q.B @ model[0].q.A @ x    # Eq. (8), l <= j L / G
        assert torch.allclose(model[0].q(x), shallow, atol=1e-5)
        assert torch.equal(model[1].q(x), start[1].q(x))             # Eq. (7), l > j L / G


def test_a_stage_starts_from_the_last_and_merging_changes_no_output():
    """A fresh pair changes nothing, and merging changes the outputs by rounding alone."""
    model = stack()
    x = torch.randn(5, 6)
    for stage in (1, 2, 3):
        before = model(x)
        hilora.add_stage(model, stage, 3, rank=4, alpha=8, targets=("q", "ffn.2"))
        assert torch.equal(model(x), before)    # ΔW = 0

        train_pairs(model)
        model.eval()    # does not merge
        trained = model(x)
        assert not torch.allclose(trained, before, atol=1e-3)
        assert len(hilora.find_pairs(model)) == 4 * stage

        hilora.merge(model)
        assert (model(x) - trained).abs().max() <= 1e-5
        assert not hilora.find_pairs(model)
        model.train()


def test_after_the_last_stage_the_model_has_the_modules_that_it_began_with():
    """Merging leaves plain, frozen linears and no parameter more."""
    model = stack()
    for stage in (1, 2, 3):
        hilora.add_stage(model, stage, 3, rank=4, alpha=8, targets=("q", "ffn.2"))
        train_pairs(model)
        hilora.merge(model)

    for block in model:
        assert type(block.q) is nn.Linear
        assert type(block.ffn[2]) is nn.Linear
        assert block.ffn[2].bias is None
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert shapes == {name: value.shape for name, value in stack().state_dict().items()}
    assert not any(p.requires_grad for p in model.parameters())


def test_merging_leaves_no_mark_on_a_linear():
    """A merged linear has the attributes of any nn.Linear, in the mode of the pair."""
    model = stack()
    hilora.add_stage(model, 1, 1, targets=("q",))
    model.eval()
    hilora.merge(model)
    assert set(vars(model[0].q)) == set(vars(nn.Linear(6, 6)))
    assert not model[0].q.training


def test_weights_without_a_pair_stay_bitwise_as_they_were():
    """Stage 1 of 3 over six layers changes the q of layers 1 and 2, and nothing else."""
    model = stack()
    start = copy.deepcopy(model.state_dict())
    hilora.add_stage(model, 1, 3, targets=("q",))
    train_pairs(model)
    hilora.merge(model)
    changed = set()
    for name, value in model.state_dict().items():
        if not torch.equal(value, start[name]):
            changed.add(name)
    assert changed == {"0.q.weight", "1.q.weight"}


def test_discard_leaves_the_weights_from_before_the_stage():
    """A discarded stage changes no weight, even if its pairs have diverged, and counts as done."""
    model = stack()
    start = copy.deepcopy(model.state_dict())
    hilora.add_stage(model, 1, 3, targets=("q", "ffn.2"))
    train_pairs(model)
    nn.init.constant_(model[0].q.A, float("nan"))
    hilora.discard(model)
    assert not hilora.find_pairs(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, start[name])
    assert not any(p.requires_grad for p in model.parameters())

    hilora.discard(model)    # with no pair there is nothing to do
    hilora.add_stage(model, 2, 3, targets=("q",))
    assert layers_with_pairs(model) == {1, 2, 3, 4}


def test_find_pairs_says_where_a_pair_is():
    """A FoundPair has the names parent, name and pair, and unpacks in this order."""
    model = stack()
    hilora.add_stage(model, 1, 6, targets=("ffn.0",))
    found = hilora.find_pairs(model)
    assert len(found) == 1
    assert found[0].parent is model[0].ffn
    assert found[0].name == "0"
    assert found[0].pair is model[0].ffn[0]
    parent, name, pair = found[0]
    assert getattr(parent, name) is pair


def test_deep_to_shallow_is_the_list_reversed():
    """The first stage of the reversed list trains the deepest layers."""
    model = stack()
    hilora.add_stage(list(model)[::-1], 1, 3, targets=("q",))
    assert layers_with_pairs(model) == {5, 6}


def test_one_group_takes_part_in_every_stage():
    """With one group all six layers have a fresh pair in each of four stages."""
    model = stack()
    for stage in (1, 2, 3, 4):
        hilora.add_stage(model, stage, 1, targets=("q",))
        assert len(hilora.find_pairs(model)) == 6
        hilora.merge(model)


@pytest.mark.parametrize("steps, message", [
    ((2,), "stages go in order"),
    ((1, "merge", 1), "stages go in order"),
    ((1, "merge", 3), "stages go in order"),
    ((1, 2), "not merged"),
    ((0,), "no stage 0"),
    ((1, "merge", 2, "merge", 3, "merge", 4), "no stage 4"),
    (("merge",), "nothing to merge"),
    ((1, "merge", "merge"), "nothing to merge"),
])
def test_a_stage_or_a_merge_out_of_order_is_refused(steps, message):
    """The last step of each list is refused, with a message that says why."""
    model = stack()

    def take(step):
        if step == "merge":
            hilora.merge(model)
        else:
            hilora.add_stage(model, step, 3, targets=("q",))

    for step in steps[:-1]:
        take(step)
    with pytest.raises(ValueError, match=message):
        take(steps[-1])


@pytest.mark.parametrize("done", [0, 1, 2])
def test_loaded_weights_go_on_with_the_next_stage(done):
    """After set_stages_done the next stage is accepted, and every other is refused."""
    for stage in (1, 2, 3):
        model = stack()
        hilora.set_stages_done(model, done)
        if stage == done + 1:
            hilora.add_stage(model, stage, 3, targets=("q",))
            assert layers_with_pairs(model) == set(range(1, 2 * stage + 1))
        else:
            with pytest.raises(ValueError, match="stages go in order"):
                hilora.add_stage(model, stage, 3, targets=("q",))


def test_fewer_than_no_stages_cannot_be_done():
    """set_stages_done refuses a negative number."""
    with pytest.raises(ValueError, match="-1 stages"):
        hilora.set_stages_done(stack(), -1)


# --- Targets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets, rank, error, message", [
    (("q", "k"), 2, ValueError, "layer 1 has no 'k'"),
    (("q", "ffn.1"), 2, TypeError, "plain nn.Linear, not ReLU"),
    ((), 2, ValueError, "needs targets"),
    (("q",), 0, ValueError, "rank"),
])
def test_bad_targets_are_refused_before_anything_is_changed(targets, rank, error, message):
    """After a refusal the model is as it was, and stage 1 can still begin."""
    model = stack().requires_grad_(True)
    with pytest.raises(error, match=message):
        hilora.add_stage(model, 1, 3, rank=rank, targets=targets)
    assert not hilora.find_pairs(model)
    assert all(p.requires_grad for p in model.parameters())
    hilora.add_stage(model, 1, 3, rank=2, targets=("q",))


def test_a_linear_that_others_read_uncalled_is_refused():
    """MultiheadAttention reads out_proj's weight without calling it, so a pair would be lost."""
    vit = torchvision.models.VisionTransformer(32, 16, 1, 2, 8, 8)
    with pytest.raises(TypeError, match="NonDynamicallyQuantizableLinear"):
        hilora.add_stage(vit.encoder.layers, 1, 1, targets=("self_attention.out_proj",))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype(dtype):
    """A merged weight has the precision of the weight before."""
    model = stack(2).to(dtype)
    hilora.add_stage(model, 1, 1, rank=2, targets=("q",))
    train_pairs(model)
    x = torch.randn(3, 6).to(dtype)
    before = model(x)
    hilora.merge(model)
    assert model[0].q.weight.dtype == dtype
    assert torch.allclose(model(x), before, atol=0.1)


# --- The example of the docstring -----------------------------------------------------------------


def docstring_example():
    """The indented lines of hilora.py's docstring that begin with the ViT."""
    example = re.search(r"^    vit = (?:.+\n)+", hilora.__doc__, flags=re.M)
    return textwrap.dedent(example[0])


def test_the_example_of_the_docstring_trains_a_vit(monkeypatch):
    """The ten lines change each stage's target weights, and nothing else of the encoder."""
    torch.manual_seed(0)
    small = torchvision.models.VisionTransformer(224, 112, 3, 2, 8, 8)
    monkeypatch.setattr(torchvision.models, "vit_b_16", lambda: small)

    # The encoder's weights before stage 1, then after each stage.
    snapshots = [copy.deepcopy(small.encoder.state_dict())]

    def merge_and_note(module):
        hilora.merge(module)
        snapshots.append(copy.deepcopy(module.encoder.state_dict()))

    names = {
        "torch": torch,
        "torchvision": torchvision,
        "add_stage": hilora.add_stage,
        "merge": merge_and_note,
    }
    lines = docstring_example()
    exec(lines, names)

    assert len(lines.splitlines()) <= 10
    assert not hilora.find_pairs(small)
    assert len(snapshots) == 4
    for stage in (1, 2, 3):
        before = snapshots[stage - 1]
        after = snapshots[stage]
        changed = set()
        for name in after:
            if not torch.equal(after[name], before[name]):
                changed.add(name)
        expected = set()
        for layer in range(stage):    # layers 1 .. stage of three
            expected.add(f"layers.encoder_layer_{layer}.mlp.0.weight")
            expected.add(f"layers.encoder_layer_{layer}.mlp.3.weight")
        assert changed == expected
