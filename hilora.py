"""LoRA, and HiLoRA: LoRA in stages from shallow to deep layers (HiVG Section 3.3). Imports torch alone.

    layers        1  2  3  4 | 5  6  7  8 | 9 10 11 12      L = 12 layers in G = 3 groups
    stage 1      [ a fresh pair ]                           each stage trains its pairs alone, over frozen weights,
    stage 2      [       a fresh pair     ]                 and ends by merging them: W <- W + α/r B A
    stage 3      [             a fresh pair            ]

So after stage j layer l holds W_0 and the sum of the pairs of stages ceil(l G / L) .. j, HiVG Eq. (6), and no module more
than it began with. [D24] The released code has one pair that it goes on training, and never merges. Vanilla LoRA is one stage
of one group; deep to shallow is the list reversed. Any layers will do whose linears are plain nn.Linear modules:

    vit = torchvision.models.vit_b_16().requires_grad_(False)
    for stage in (1, 2, 3):
        add_stage(vit.encoder.layers, stage, groups=3, rank=8, alpha=4, targets=("mlp.0", "mlp.3"))
        pairs = [p for p in vit.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(pairs, lr=1e-4)
        loss = vit(torch.randn(2, 3, 224, 224)).square().mean()       # your data, your loss, as many steps as you like
        loss.backward()
        optimizer.step()
        merge(vit)
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

def check_linear(linear, rank):
    if type(linear) is not nn.Linear:        # a subclass may be read by others without being called: MultiheadAttention
        raise TypeError(f"LoRA needs a plain nn.Linear, not {type(linear).__name__}")
    if rank < 1:
        raise ValueError(f"rank is {rank}; it must be 1 or more")

class LoRALinear(nn.Module):
    """h = W x + α/r B A x, HiVG Eq. (5): a linear whose own weight is frozen, and a low-rank pair that is trained.
    linear: nn.Linear (k -> d), whose parameters it takes over under the same names, so that a state dict gains A
    (r, k) and B (d, r) and changes in nothing else. rank: r. alpha: α. forward: (..., k) -> (..., d)."""
    def __init__(self, linear, rank=32, alpha=16):
        super().__init__()
        check_linear(linear, rank)
        linear.requires_grad_(False)
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        # Section 3.3: Gaussian A and zero B, so ΔW = BA is 0 when a stage starts. [D20] The paper gives no deviation; 1/r
        # is the usual one.
        self.A = nn.Parameter(self.weight.new_empty(rank, linear.in_features).normal_(std=1 / rank))
        self.B = nn.Parameter(self.weight.new_zeros(linear.out_features, rank))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + self.scale * F.linear(F.linear(x, self.A), self.B)

    @torch.no_grad()
    def merged(self):
        """W + α/r B A, computed in float32 and given in W's own precision."""
        return (self.weight.float() + self.scale * self.B.float() @ self.A.float()).to(self.weight.dtype)

def layer_group(layer, layers, groups):
    """ceil(l G / L): which of `groups` a layer is in; layers and groups count from 1."""
    if not (1 <= layer <= layers and 1 <= groups <= layers):
        raise ValueError(f"no group for layer {layer} of {layers} in {groups} groups: each must hold a layer")
    return math.ceil(layer * groups / layers)

def find_pairs(module):                 # [(parent, name, LoRALinear), ...] within it
    return [(parent, name, child) for parent in module.modules() for name, child in parent.named_children()
            if isinstance(child, LoRALinear)]

def add_stage(layers, stage, groups, rank=32, alpha=16, targets=("q", "k", "v", "out")):
    """Begin a stage j: a fresh pair on each target of the layers in groups 1 .. j, HiVG Eq. (6).
    layers: modules, shallow first. targets: dotted names of the linears within each. A single group takes part in
    every stage, as the text tower does. Only the linears that get a pair are frozen here; freeze the rest yourself.
    Raises ValueError if the stages before are not done or not merged, or if a layer lacks a target; TypeError for a target
    that is no plain nn.Linear. How many stages were done is kept on the layers, not in their state dict: who loads merged
    weights of j stages into a fresh model begins and merges j stages first, whose pairs, still 0, change nothing."""
    layers = list(layers)
    if not layers or stage < 1 or (groups > 1 and stage > groups):
        raise ValueError(f"there is no stage {stage} of {groups} groups in {len(layers)} layers")
    if any(find_pairs(layer) for layer in layers):
        raise ValueError(f"stage {stage} cannot begin: the pairs of the stage before are not merged yet")
    done = max(getattr(layer, "hilora_stage", 0) for layer in layers)
    if done != stage - 1:
        raise ValueError(f"stage {stage} cannot begin: the last of these layers was {done or 'none'}, and stages go in order")
    linears = []
    for number, layer in enumerate(layers, start=1):
        for target in targets if layer_group(number, len(layers), groups) <= stage else ():
            try:
                linears.append((layer, target, layer.get_submodule(target)))
            except AttributeError:
                raise ValueError(f"layer {number} has no {target!r}") from None
    if not linears:
        raise ValueError("a stage needs targets: the names of linears within each layer")
    for _, _, linear in linears:
        check_linear(linear, rank)
    for layer, target, linear in linears:          # only now, when nothing can go wrong halfway
        layer.set_submodule(target, LoRALinear(linear, rank, alpha))
    for layer in layers:
        layer.hilora_stage = stage

def merge(module):
    """End a stage: every pair within `module` goes into its weight, and plain nn.Linear modules are left.
    The outputs stay what they were, to rounding. Raises ValueError if there is no pair: merged already, or never begun."""
    if not (found := find_pairs(module)):
        raise ValueError("nothing to merge: there is no LoRA pair in this module (merged already, or no stage begun)")
    for parent, name, pair in found:
        linear = nn.Linear(pair.weight.shape[1], pair.weight.shape[0], pair.bias is not None, device="meta")
        linear.weight = nn.Parameter(pair.merged(), requires_grad=False)
        linear.bias, linear.hilora_merged = pair.bias, True           # a mark for who saves what was changed
        setattr(parent, name, linear.train(pair.training))

def discard(module):
    """Take every pair within `module` out unmerged: the weights stay what they were before the stage."""
    if pairs := find_pairs(module):
        for _, _, pair in pairs:
            nn.init.zeros_(pair.B)
        merge(module)
