"""LoRA, and HiLoRA: LoRA in stages from shallow to deep layers (HiVG Section 3.3).

This file imports torch alone.

    layers        1  2  3  4 | 5  6  7  8 | 9 10 11 12      L = 12 layers in G = 3 groups
    stage 1      [fresh A, B ]                              a stage trains its own fresh factors,
    stage 2      [       fresh A, B       ]                 then merges them: W <- W + α/r B A
    stage 3      [             fresh A, B             ]

    HiVG Eq. (5)          LoRALinear.forward   a linear layer with low-rank factors
    HiVG Eqs. (6), (7)    stage_targets        deeper layers, l > j L / G, get no LoRA: h = W x
    HiVG Eqs. (6), (8)    LoRALinear.forward   the other layers: W holds the factors of the stages
                                               before j, and A and B are the factors of stage j

Symbols (paper = here):
    W_0 = weight before stage 1     r = rank            α = alpha
    l = layer, or number            L = len(layers)     G = groups     j = stage
    ceil(l G / L) = layer_group     C = the layers with a bridge

Eqs. (7) and (8) are the two cases of Eq. (6) with the input of a CLIP layer filled in for x:
f_v^{l-1}, and in the layers l ∈ C the bridge's f_v^sa as well. [D44] The bridge adds f_v^sa after
the attention (Section 3.2), so q, k, v and out of its own layer do not see it.

The sum over k in Eqs. (6) and (8) is never written as a sum: the factors of the stages before j are
merged into W, and stage j adds its own. So after the last merge the model has exactly the modules
that it had before stage 1.

Plain LoRA is HiLoRA with a single stage and a single group. For stages from deep to shallow layers,
give the list of layers reversed. Any layers will do if the targets in them are plain nn.Linear
modules:

    vit = torchvision.models.vit_b_16().requires_grad_(False)
    vit.heads = torch.nn.Linear(vit.hidden_dim, 5)      # your head; torchvision's starts at zero
    for stage in (1, 2, 3):
        add_stage(vit.encoder.layers, stage, groups=3, rank=8, alpha=4, targets=("mlp.0", "mlp.3"))
        trained = [p for p in vit.parameters() if p.requires_grad]      # LoRA's factors, your head
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        loss = vit(torch.randn(2, 3, 224, 224)).square().mean()         # your data and your loss
        loss.backward()
        optimizer.step()
        merge(vit)
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


# --- One linear layer: HiVG Eq. (5) ---------------------------------------------------------------


class LoRALinear(nn.Module):
    """h = W x + α/r B A x, HiVG Eq. (5): a frozen linear layer, and low-rank factors that are
    trained.

    linear: nn.Linear (k -> d). Its parameters are taken over under the same names. So a state dict
    gains A (r, k) and B (d, r), and nothing else in it changes. rank: r. alpha: α. Raises TypeError
    for any other module, and ValueError for a rank below 1.
    """

    def __init__(self, linear, rank=32, alpha=16):
        super().__init__()
        check_linear(linear, rank)
        linear.requires_grad_(False)
        self.weight = linear.weight    # W: W_0 plus the merged factors of earlier stages, (d, k)
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
        # W is W_0 plus the merged factors of the stages before j. So W x is W_0 x plus the terms
        # k < j of the sum in Eqs. (6) and (8), and B A x is its term k = j.
        h = F.linear(x, self.weight, self.bias)
        delta = F.linear(F.linear(x, self.A), self.B)
        return h + self.scale * delta    # HiVG Eq. (5); HiVG Eqs. (6), (8), the case l <= j L / G

    @torch.no_grad()
    def merged(self):
        """Return W + α/r B A, computed in float32 and rounded to the precision of W."""
        merged = self.weight.float() + self.scale * self.B.float() @ self.A.float()
        return merged.to(self.weight.dtype)


def check_linear(linear, rank):
    """Raise an error if `linear` cannot get LoRA factors of this rank."""
    # Another module may read the weight of a subclass of nn.Linear without calling it, as
    # MultiheadAttention does with its out_proj. LoRA would then be ignored.
    if type(linear) is not nn.Linear:
        raise TypeError(f"LoRA needs a plain nn.Linear, not {type(linear).__name__}")
    if rank < 1:
        raise ValueError(f"rank is {rank}; it must be 1 or more")


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
    layer. [D34] A single group takes part in every stage, as the text tower does here; by Eq. (6) it
    would have one stage.
    """
    trained = []
    for number in range(1, len(layers) + 1):
        if layer_group(number, len(layers), groups) > stage:    # HiVG Eq. (6), the case l > j L / G
            continue                                            # HiVG Eq. (7): h = W x, no LoRA
        for target in targets:
            trained.append((number, target))
    return trained


def add_stage(layers, stage, groups, rank=32, alpha=16, targets=("q", "k", "v", "out")):
    """Begin stage j: put fresh LoRA factors on each target of the layers in groups 1 .. j.

    layers: modules, shallow first. targets: dotted names of the linear layers within each. Only the
    linear layers that get LoRA are frozen here; freeze the rest of the model yourself.

    Raises ValueError if there is no such stage, if the stage before is not merged, or if a layer
    lacks a target, and TypeError if a target is no plain nn.Linear. The model is then as it was.
    """
    layers = list(layers)
    beyond = groups > 1 and stage > groups
    if not layers or stage < 1 or beyond:
        raise ValueError(f"there is no stage {stage} of {groups} groups in {len(layers)} layers")

    # All linear layers are found and checked before the first one is replaced.
    linears = []    # (layer, target, linear)
    for number, target in stage_targets(layers, stage, groups, targets):
        layer = layers[number - 1]
        if lora_modules(layer):
            raise ValueError(f"stage {stage} cannot begin: the LoRA factors of the stage before are "
                             f"not merged yet")
        try:
            linear = layer.get_submodule(target)
        except AttributeError:
            raise ValueError(f"layer {number} has no {target!r}") from None
        check_linear(linear, rank)
        linears.append((layer, target, linear))
    if not linears:
        raise ValueError("a stage needs targets: the names of linear layers within each layer")

    # [D24] Each stage gets fresh factors. The released code trains the same ones in all stages.
    for layer, target, linear in linears:
        layer.set_submodule(target, LoRALinear(linear, rank, alpha))


def lora_modules(module):
    """Return {dotted name: LoRALinear} of all linear layers with LoRA within a module."""
    return {name: m for name, m in module.named_modules() if isinstance(m, LoRALinear)}


def merge(module, discard=False):
    """End a stage: add all LoRA factors within `module` to their weights, and leave plain nn.Linear
    modules.

    "We incorporate the low-rank matrix into the pre-trained weights after every training stage",
    Section 3.3. The outputs stay the same up to rounding. discard: drop the factors instead, so that
    the stage has changed nothing. Raises ValueError if there is nothing to merge.
    """
    found = lora_modules(module)
    if not found and not discard:
        raise ValueError("nothing to merge: there is no LoRA in this module (merged already, or no "
                         "stage begun)")
    for name, lora in found.items():
        weight = lora.weight.detach() if discard else lora.merged()    # W <- W + α/r B A
        outputs, inputs = weight.shape
        # On the meta device the layer allocates nothing and draws no random numbers for weights
        # that it will not keep.
        linear = nn.Linear(inputs, outputs, bias=lora.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = lora.bias
        module.set_submodule(name, linear.train(lora.training))
