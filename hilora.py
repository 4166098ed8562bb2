"""LoRA, and HiLoRA: LoRA in stages from shallow to deep layers (HiVG Section 3.3).

This file imports torch alone.

    layers        1  2  3  4 | 5  6  7  8 | 9 10 11 12      L = 12 layers in G = 3 groups
    stage 1      [ a fresh pair ]                           a stage trains its own fresh pairs,
    stage 2      [       a fresh pair     ]                 then merges them: W <- W + α/r B A
    stage 3      [             a fresh pair            ]

    HiVG Eq. (5)          LoRALinear.forward   a linear with a low-rank pair
    HiVG Eqs. (6), (7)    stage_targets        deeper layers, l > j L / G, get no pair: h = W x
    HiVG Eqs. (6), (8)    LoRALinear.forward   the other layers: W holds the pairs of the stages
                                               before j, and A and B are the pair of stage j

Symbols (paper = here):
    W_0 = weight before stage 1     A, B = A, B         r = rank       α = alpha     x = x
    l = layer, or number            L = len(layers)     G = groups     j = stage
    ceil(l G / L) = layer_group     C = the layers with a bridge

Eqs. (7) and (8) are the two cases of Eq. (6) with the input of a CLIP layer filled in for x:
f_v^{l-1}, and in the layers l ∈ C the bridge's f_v^sa as well [D44].

The sum over k in Eqs. (6) and (8) is never written as a sum: the pairs of the stages before j are
merged into W, and stage j adds its own. So after the last merge the model has exactly the modules
that it had before stage 1.

Plain LoRA is HiLoRA with a single stage and a single group. For stages from deep to shallow layers,
give the list of layers reversed. Any layers will do if the targets in them are plain nn.Linear
modules:

    vit = torchvision.models.vit_b_16().requires_grad_(False)
    vit.heads = torch.nn.Linear(vit.hidden_dim, 5)      # your head; torchvision's starts at zero
    for stage in (1, 2, 3):
        add_stage(vit.encoder.layers, stage, groups=3, rank=8, alpha=4, targets=("mlp.0", "mlp.3"))
        trained = [p for p in vit.parameters() if p.requires_grad]      # the pairs and your head
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        loss = vit(torch.randn(2, 3, 224, 224)).square().mean()         # your data and your loss
        loss.backward()
        optimizer.step()
        merge(vit)

Where this file differs from a paper or its released code ("code"):

[D20] the initial A
    paper   Gaussian; its deviation is not given
    code    Kaiming uniform, of deviation 1 / sqrt(3k), with a dropout of 0.1 before A
    here    N(0, 1 / (3k)), where k is the number of inputs; no dropout
    why     the paper first, with the deviation of the code, PEFT and loralib. A deviation that
            falls with r would make ranks differ in their first effect too

[D24] the pairs of the stages
    paper   a fresh pair in each stage, merged after the stage, Eq. (6); groups of L / G layers
    code    one pair that all stages train, never merged; the first 5, 8, 12 layers, for ViT-L too
    here    as the paper
    why     the paper first

[D44] the place of f_v^sa in Eqs. (7) and (8)
    paper   the equations add it to the input of layer l; Section 3.2 adds it after the attention
    code    adds it after the attention
    here    adds it after the attention: q, k, v and out of this layer do not see it, its
            feed-forward network and all later layers do
    why     Section 3.2 and Fig. 7 describe the block, the equations sum it up
"""
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F


# --- One linear: HiVG Eq. (5) ---------------------------------------------------------------------


def check_linear(linear, rank):
    """Raise an error if `linear` cannot get a pair of this rank."""
    # Another module may read the weight of a subclass of nn.Linear without calling it, as
    # MultiheadAttention does with its out_proj. A pair would then be ignored.
    if type(linear) is not nn.Linear:
        raise TypeError(f"LoRA needs a plain nn.Linear, not {type(linear).__name__}")
    if rank < 1:
        raise ValueError(f"rank is {rank}; it must be 1 or more")


class LoRALinear(nn.Module):
    """h = W x + α/r B A x, HiVG Eq. (5): a frozen linear and a low-rank pair that is trained.

    linear: nn.Linear (k -> d). Its parameters are taken over under the same names. So a state dict
    gains A (r, k) and B (d, r), and nothing else in it changes. rank: r. alpha: α.
    """

    def __init__(self, linear, rank=32, alpha=16):
        super().__init__()
        check_linear(linear, rank)
        linear.requires_grad_(False)
        self.weight = linear.weight    # W: W_0 plus the merged pairs of earlier stages, (d, k)
        self.bias = linear.bias
        self.scale = alpha / rank      # "We then scale ΔWx by α/r", Section 3.3

        # A is Gaussian and B is 0, so ΔW = BA is 0 when a stage starts. The stage begins where the
        # last one ended. [D20] The paper does not give the deviation of A; 1 / sqrt(3k) is that of
        # the released code. It does not depend on the rank.
        k = linear.in_features
        A = self.weight.new_empty(rank, k).normal_(std=1 / math.sqrt(3 * k))
        B = self.weight.new_zeros(linear.out_features, rank)
        self.A = nn.Parameter(A)    # (r, k)
        self.B = nn.Parameter(B)    # (d, r)

    def forward(self, x):
        """x: (..., k). Returns (..., d)."""
        # W is W_0 plus the merged pairs of the stages before j. So W x is W_0 x plus the terms
        # k < j of the sum in Eqs. (6) and (8), and the pair A, B is its term k = j. Eq. (8) is the
        # same with an x that a bridge may have changed [D44].
        h = F.linear(x, self.weight, self.bias)
        delta = F.linear(F.linear(x, self.A), self.B)
        return h + self.scale * delta    # HiVG Eq. (5); HiVG Eqs. (6), (8), the case l <= j L / G

    @torch.no_grad()
    def merged(self):
        """Return W + α/r B A, computed in float32 and rounded to the precision of W."""
        merged = self.weight.float() + self.scale * self.B.float() @ self.A.float()
        return merged.to(self.weight.dtype)


# --- The stages: HiVG Eqs. (6)-(8) ----------------------------------------------------------------


def layer_group(layer, layers, groups):
    """ceil(l G / L): the group that a layer belongs to.

    layer: l, from 1. layers: L, how many there are. groups: G. Returns a number from 1 to G.
    """
    possible = 1 <= layer <= layers and 1 <= groups <= layers
    if not possible:
        raise ValueError(f"no group for layer {layer} of {layers} in {groups} groups: "
                         f"each group must hold a layer")
    return math.ceil(layer * groups / layers)


def stage_targets(layers, stage, groups, targets):
    """List what stage j trains: [(layer number from 1, target name), ...], shallow first.

    layers: a list of modules, shallow first; only their number matters. targets: names within each
    layer. A single group takes part in every stage, as HiVG's text tower does.
    """
    trained = []
    for number in range(1, len(layers) + 1):
        if layer_group(number, len(layers), groups) > stage:    # HiVG Eq. (6), the case l > j L / G
            continue                                            # HiVG Eq. (7): h = W x, and no pair
        for target in targets:
            trained.append((number, target))
    return trained


def stages_done(layers):
    """How many stages these layers have been through, by the number kept on each layer."""
    done = 0
    for layer in layers:
        done = max(done, getattr(layer, "hilora_stage", 0))
    return done


def set_stages_done(layers, stages):
    """Record that the weights of these layers contain the merged pairs of stages 1 .. stages.

    Call this after loading such weights into a fresh model. The next stage that add_stage accepts
    is then stages + 1.
    """
    if stages < 0:
        raise ValueError(f"{stages} stages cannot be done: the number must be 0 or more")
    for layer in layers:
        layer.hilora_stage = stages


def add_stage(layers, stage, groups, rank=32, alpha=16, targets=("q", "k", "v", "out")):
    """Begin stage j: put a fresh pair on each target of the layers in groups 1 .. j.

    layers: modules, shallow first. targets: dotted names of the linears within each. Only the
    linears that get a pair are frozen here; freeze the rest of the model yourself.

    Raises ValueError if the stages before are not done or not merged, or if a layer lacks a target,
    and TypeError if a target is no plain nn.Linear. The model is then as it was.
    """
    layers = list(layers)
    check_order(layers, stage, groups)

    # All linears are found and checked before the first one is replaced.
    linears = []    # (layer, target, linear)
    for number, target in stage_targets(layers, stage, groups, targets):
        layer = layers[number - 1]
        try:
            linear = layer.get_submodule(target)
        except AttributeError:
            raise ValueError(f"layer {number} has no {target!r}") from None
        linears.append((layer, target, linear))
    if not linears:
        raise ValueError("a stage needs targets: the names of linears within each layer")
    for layer, target, linear in linears:
        check_linear(linear, rank)

    # [D24] Each stage gets fresh pairs. The released code trains one pair in all stages.
    for layer, target, linear in linears:
        layer.set_submodule(target, LoRALinear(linear, rank, alpha))
    set_stages_done(layers, stage)


def check_order(layers, stage, groups):
    """Raise ValueError if `stage` does not exist or is not the next one."""
    beyond = groups > 1 and stage > groups
    if not layers or stage < 1 or beyond:
        raise ValueError(f"there is no stage {stage} of {groups} groups in {len(layers)} layers")

    for layer in layers:
        if find_pairs(layer):
            raise ValueError(f"stage {stage} cannot begin: the pairs of the stage before are not "
                             f"merged yet")

    done = stages_done(layers)
    if stage != done + 1:
        raise ValueError(f"stage {stage} cannot begin: these layers have done {done} stages, "
                         f"and stages go in order")


class FoundPair(NamedTuple):
    """A pair, and where it is in a module."""
    parent: nn.Module    # the module that holds the pair
    name: str            # the name of the pair in its parent
    pair: LoRALinear     # the pair itself, with its frozen linear


def find_pairs(module):
    """List all pairs within a module as FoundPair."""
    found = []
    for parent in module.modules():
        for name, child in parent.named_children():
            if isinstance(child, LoRALinear):
                found.append(FoundPair(parent, name, child))
    return found


def replace_by_linear(parent, name, pair, weight):
    """Replace a pair by a plain, frozen nn.Linear with this weight and the pair's bias."""
    outputs, inputs = weight.shape
    # On the meta device the linear allocates nothing and draws no random numbers for weights that
    # it will not keep.
    linear = nn.Linear(inputs, outputs, bias=pair.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = pair.bias
    linear.train(pair.training)
    setattr(parent, name, linear)


def merge(module):
    """End a stage: add every pair within `module` to its weight, and leave plain nn.Linear modules.

    "We incorporate the low-rank matrix into the pre-trained weights after every training stage",
    Section 3.3. The outputs stay the same up to rounding. Raises ValueError if there is no pair in
    `module`.
    """
    found = find_pairs(module)
    if not found:
        raise ValueError("nothing to merge: there is no LoRA pair in this module (merged already, "
                         "or no stage begun)")
    for parent, name, pair in found:
        replace_by_linear(parent, name, pair, pair.merged())    # W <- W + α/r B A


def discard(module):
    """Remove every pair within `module` unmerged. The stage counts as done and changed nothing."""
    for parent, name, pair in find_pairs(module):
        replace_by_linear(parent, name, pair, pair.weight.detach())
