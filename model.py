"""The encoders, the grounding models of both papers, and the weights that they start from.

The file reads from the smallest part to the largest:

    TransformerLayer             the one layer of every encoder here, with its two ports
    VisionEncoder, TextEncoder   DETR's encoder and BERT                 M²IST Section III-A a, b
    ClipVision, ClipText         CLIP's two towers                       HiVG Section 3.1
    GroundingEncoder             [REG], text and image tokens, box head  M²IST III-A c, HiVG 3.1
    DetrBert, ClipGrounding      the two grounding models: encoders, a method's modules, grounding
    SIZES, METHODS, Option       what can be built, each size, method and option declared once
    build_model                  a model from the names of a method and a size
    import_weights               other people's checkpoints, checked key by key
    DETR_TABLE, ...              the tables of other people's names

Shapes
    B batch    T text tokens    Nv vision tokens    N tokens of either kind    C a width
Conventions
    Padding masks are bool and True means padding. Layers count from 1, as in the papers.
    Boxes are (cx, cy, w, h) in [0, 1] of the padded square picture.
Symbols     paper                            here
    M²IST   z_0, the picture                 images
            f_v, f_l, encoded tokens         Encoded.x
            C_p, width of the V-L encoder    GroundingEncoder's dim
    HiVG    f_v^i, f_l^i, layer i's output   Encoded.states[i - 1]
            W_mvp                            vision_projection
            H_g                              GroundingEncoder's dim

Where this file differs from a paper or its released code ("code"):

[D7] frozen encoders of M²IST
    paper   the encoders are frozen
    code    dropout stays on in the frozen encoders
    here    frozen encoders run in eval mode
    why     a frozen feature should not be noisy

[D8] BERT
    paper   BERT as published
    code    has no token-type embedding, and adds a second residual in six layers
    here    BERT as published
    why     a pretrained encoder should be the one that was pretrained

[D10] parameters of full fine-tuning
    paper   151M
    code    has TransVG's model file, but nothing trains it
    here    140.8M: ResNet-50, DETR's encoder and BERT without its pooler
    why     151M cannot be derived from the architecture; batch norm's statistics stay frozen

[D11] parameters of M²IST
    paper   3.19M
    code    counts the shared projection twice, and two norms for each VEA and LEA
    here    2,975,232, where each tensor counts once
    why     the code's way of counting gives 3,185,664, so the architecture is the same; tests/
            test_rows.py explains the other counts of the paper's tables row by row

[D16] layers of the bridges, and text layers that they see
    paper   vision layers 4, 8, 12 (L: 6, 12, 18, 24); text layers 1-12
    code    1, 4, 8, 12 (L: 5, 11, 17, 23); text layers 12, or 6 and 12, or all, by dataset
    here    as the paper; --bridge-layers and --text-layers change them
    why     the paper first

[D23] parameters of HiVG
    paper   206M in all, 41M of them updated (L: 468M, 52M)
    code    213-237M and 64-87M, with the parts that it never uses
    here    211,027,461 in all, with LoRA merged (L: 561,573,381); 40,768,512 are tuned in or beside
            CLIP in the last stage, LoRA pairs included, grounding encoder not (L: 99,618,816)
    why     206M seems to leave out the perceiver, projections, positions and the MLP of Eq. (12);
            four bridges that see twelve text layers are alone more than the 52M of L. That 41M
            leaves out the grounding encoder is a guess: Table 2 has 21M for CLIP-VG, which seem to
            be its grounding encoder. With it, and the box head, our last stage trains 65,338,884

[D25] linears that LoRA adapts in CLIP
    paper   Q, K, V "and the fully connected matrix in the update layer", Appendix B
    code    q, k, v and out of CLIP and of the bridges
    here    q, k, v and out of CLIP
    why     the last stage's share of CLIP is then the paper's (L 1.98%; B 2.56%, paper 2.58%);
            bridges are trained whole

[D28] linears between CLIP and the grounding encoder
    paper   vision: one W_mvp, Eq. (1); text: "the linear projection features" g_l
    code    vision: W_mvp, which starts as copies of CLIP's projection, and a second linear; text:
            CLIP's projection, frozen, and a second linear
    here    vision: W_mvp alone, with a random start; text: as the code
    why     vision's two linears are both trained, and so do no more than one; of the text's two
            only the second is trained, and g_l is the output of the first

[D29] box head
    paper   HiVG: three linears with a ReLU each; M²IST: an MLP with a linear output layer
    code    both: no ReLU after the last linear, and a sigmoid
    here    as the code
    why     a sigmoid after a ReLU is never below 1/2

[D30] padded patches of CLIP's vision tower
    paper   says nothing
    code    the grounding encoder masks a patch if more than half of it is padding
    here    it masks a patch if all of it is padding; released checkpoints keep their rule [D47]
    why     an object at the edge of the picture should be seen

[D31] start of CLIP's vision tower
    paper   is first adapted by LoRA to detection on COCO, without the test pictures
    code    starts from the file of that training, which is not released
    here    plain CLIP
    why     no boxes of another task are needed; the paper's figures rest on that file

[D34] LoRA in the text tower
    paper   the text encoder is one layer group; the trained share of CLIP grows evenly by stage
    code    the text pairs are trained in every stage
    here    a fresh text pair in every stage
    why     by Eq. (6) a single group has a single stage, but the vision tower has three; stages 1
            and 2 then train 1.55% and 2.06% of CLIP, where the paper has 0.86% and 1.72%

[D39] layers and widths of the methods that M²IST is compared with
    paper   C_d = 128; Adapter after attention and feed-forward of "each" layer, AdaptFormer beside
            "the FFN in each" layer (II-B), LoRA "two pairs into each" layer of both encoders
            (IV-D f); no rank, no s, no layers of CM-Adapter and MRS-Adapter
    code    trains none of these methods; a class Adapter_Lora is there and not used
    here    Adapter, AdaptFormer and LoRA in all 6 + 12 layers; CM-Adapter and MRS-Adapter, which
            share a part between the modalities, in the pairs of layers of M³ISA with C_i = 256;
            MRS-Adapter one for each layer (its source: one for all layers); s = 0.1; LoRA on q and
            v with r = alpha = 55
    why     r = 55 gives 2,365,440, the paper's 2.37M; MRS-Adapter gives its 1.58M exactly if the
            shared projection counts twice [D11]; Adapter (5.57M; paper 3.27M), AdaptFormer (2.79M;
            2.38M) and CM-Adapter (2.76M; 3.27M) follow the words, and no reading gives the counts

[D45] start of attention in the grounding encoder
    paper   Xavier, M²IST Section IV-B a
    code    Xavier of q, k, v packed in one (3C, C) matrix: deviation 0.0442 for C = 256; biases
            of the feed-forward network as nn.Linear has them
    here    as the code; at the tiny size Xavier of q, k and v apart, 0.0625 in place of 0.0442 if C
            were 256, and biases of 0
    why     the papers' figures were made with it; with the wider start logits double and attention
            begins peaked, which on `shapes` was learned from earlier, in one run each

[D47] padding in HiVG's released checkpoints
    paper   texts are padded to 77 tokens, pictures to a square; nothing on masks
    code    pads texts by the id 0, which the bridges do not mask [D15], and masks a patch if more
            than half of it is padding [D30]
    here    so with `released_rules`, which evaluate.py sets for a released .pth; our own training
            pads a batch to its longest text, masks padding in the bridges, and masks a patch if
            all of it is padding
    why     the weights were trained with these rules, and the boxes are then those of the released
            forward of one sample; by our rules a box is the same in any batch
"""
import argparse
import functools
import math
import re
import socket
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import data
import hilora
from adapters import (ADAPTERS, BRIDGE_WEIGHTS, AdapterNetworks, CrossModalBridge, attend,
                      quick_gelu)
from data import InputError, may_ask_hub, one_of
from losses import RegionText

# ---------------------------------------------------------------------------------------------
# One layer for every encoder

ACTIVATIONS = {
    "relu": F.relu,              # DETR and both grounding encoders
    "gelu": F.gelu,              # BERT
    "quick_gelu": quick_gelu}    # CLIP


class TransformerLayer(nn.Module):
    """Self-attention and a feed-forward network, each added to the residual stream x.

        post-norm (DETR, BERT)    x = norm1(x + a)    a = attention(x)
                                  x = norm2(x + g)    g = ffn(x)
        pre-norm  (CLIP)          x = x + a           a = attention(norm1(x))
                                  x = x + g           g = ffn(norm2(x))

    The two ports of a layer are the places where a and g appear, before they are added to x.
    A side network reads the ports: `forward` returns a and g beside x. An inserted module writes
    a port: `plugs["attention"]` or `plugs["ffn"]`, where there is one, is called as
    plug(output, x, context) with the sublayer's output, the residual stream x that entered the
    sublayer, and the context of the layer; what the module returns replaces the output.
    """

    def __init__(self, dim, heads, hidden, activation="relu", pre_norm=False, dropout=0.0,
                 ffn_dropout=0.0, eps=1e-5, causal=False, packed_start=False):
        super().__init__()
        self.heads = heads
        self.activation = ACTIVATIONS[activation]
        self.pre_norm = pre_norm
        self.causal = causal
        # q, k, v and out are four linears, not one packed matrix, so that LoRA finds each of them.
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.norm1 = nn.LayerNorm(dim, eps)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.dropout = nn.Dropout(dropout)
        self.ffn_dropout = nn.Dropout(ffn_dropout)
        self.plugs = nn.ModuleDict()
        self.init_weights(packed_start)

    def init_weights(self, packed_start):
        """M²IST Section IV-B a: Xavier for the V-L encoder. Loaded weights replace it elsewhere.

        packed_start: begin as nn.TransformerEncoderLayer does after Xavier, with q, k, v packed in
        one (3C, C) matrix; Xavier's deviation falls with the number of rows, so that q, k, v begin
        smaller, by 1 / √2, than as matrices of their own [D45].
        """
        gain = 1 / math.sqrt(2) if packed_start else 1.0
        for linear in (self.q, self.k, self.v):
            nn.init.xavier_uniform_(linear.weight, gain)
            nn.init.zeros_(linear.bias)
        for linear in (self.out, self.fc1, self.fc2):
            nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(self.out.bias)
        if not packed_start:    # else the biases of the feed-forward network keep nn.Linear's start
            nn.init.zeros_(self.fc1.bias)
            nn.init.zeros_(self.fc2.bias)

    def forward(self, x, padding=None, position=None, context=None, first=None):
        """x, position: (B, N, C). padding: (B, N), not together with causal. context: anything
        that the layer's inserted modules need. first: compute the outputs of the first so many
        tokens alone, which still attend to all N. Returns x, a, g, each (B, first or N, C)."""
        h = self.norm1(x) if self.pre_norm else x
        a = self.attention(h, padding, position, first)
        x = x[:, :first]    # all tokens, where first is None
        a = self.port("attention", a, x, context)
        x = x + self.dropout(a)
        if not self.pre_norm:
            x = self.norm1(x)

        h = self.norm2(x) if self.pre_norm else x
        g = self.fc2(self.hidden(h))
        g = self.port("ffn", g, x, context)
        x = x + self.dropout(g)
        if not self.pre_norm:
            x = self.norm2(x)
        return x, a, g

    def hidden(self, h):
        """The hidden features of the feed-forward network: (B, N, C) -> (B, N, hidden)."""
        # Dropout before ReLU gives the numbers of dropout after it, and ReLU then keeps what fc2
        # keeps anyway. Layers with another activation have no dropout here.
        return self.activation(self.ffn_dropout(self.fc1(h)))

    def port(self, name, output, x, context):
        """The output of a sublayer, rewritten by the module at this port if there is one."""
        if name in self.plugs:
            output = self.plugs[name](output, x, context)
        return output

    def attention(self, h, padding, position, first=None):
        placed = h if position is None else h + position    # for queries and keys, never for values
        dropout = self.dropout.p if self.training else 0.0
        attended = attend(self.q(placed[:, :first]), self.k(placed), self.v(h), self.heads,
                          padding, dropout, self.causal)
        return self.out(attended)

    def attention_map(self, x, padding, position):
        """How much the first token, [REG], looks at each token: (B, N), the mean over the heads.
        This is for pictures and for the attention loss; the fused attention of `attention` does not
        return it."""
        h = self.norm1(x) if self.pre_norm else x
        placed = h + position
        q = self.q(placed[:, :1]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = self.k(placed).unflatten(-1, (self.heads, -1)).transpose(1, 2)    # (B, heads, N, C')
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])             # (B, heads, 1, N)
        scores = scores.masked_fill(padding[:, None, None, :], float("-inf"))
        return scores.softmax(-1).mean(1)[:, 0]


# ---------------------------------------------------------------------------------------------
# The encoders

class Encoded(NamedTuple):
    """An encoded picture or text."""
    x: Tensor                  # (B, N, C)  output tokens
    padding: Tensor            # (B, N)     True where a token is padding
    x0: Tensor = None          # (B, N, C)  tokens as they entered layer 1; s_0 of a side network
    ports: list = ()           # for each layer {"attention": a_l, "ffn": g_l}, before the residual
    states: list = ()          # for each layer x_l, its output; HiVG's f^l
    embedding: Tensor = None   # (B, C)     what CLIP compares: one vector a picture or text


def stack(layers, *shape, **options):
    return nn.ModuleList(TransformerLayer(*shape, **options) for _ in range(layers))


def run_layers(layers, x, padding=None, position=None, context=None, checkpointing=False):
    """Send tokens x (B, N, C) through layers and keep all that somebody may read -> Encoded.
    checkpointing: keep only the input of each layer for the backward pass, which then computes the
    layer again, with the same random numbers."""
    x0 = x
    ports = []
    states = []
    for layer in layers:
        if checkpointing and torch.is_grad_enabled():
            x, a, g = checkpoint(layer, x, padding, position, context, use_reentrant=False)
        else:
            x, a, g = layer(x, padding, position, context)
        ports.append({"attention": a, "ffn": g})
        states.append(x)
    return Encoded(x, padding, x0, ports, states)


class ResNetBody(nn.Sequential):
    """torchvision's ResNet-50 up to layer4: (B, 3, H, W) -> (B, 2048, H/32, W/32), under
    torchvision's names. As in DETR its batch norms are frozen: their statistics and scales are
    buffers. A frozen batch norm is a scale and a shift of each channel. It is folded into the
    convolution before it where that is frozen, too, and both are one pass over the features.
    """

    def __init__(self):
        from torchvision.models import resnet50    # importing torchvision takes two seconds
        from torchvision.ops import FrozenBatchNorm2d
        net = resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
        body = OrderedDict()
        for name, module in net.named_children():
            if name not in ("avgpool", "fc"):
                body[name] = module
        super().__init__(body)
        # Convolutions are faster where the channels of a pixel lie side by side.
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        if torch.is_grad_enabled():
            return self.features(images)
        # Without gradients nothing is kept, and a few pictures at a time need little memory.
        slices = [self.features(few) for few in images.split(PICTURES_AT_ONCE)]
        return torch.cat(slices)

    def features(self, images):
        x = images.contiguous(memory_format=torch.channels_last)
        x = convolve(self.conv1, self.bn1, x, relu=True)
        x = self.maxpool(x)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = bottleneck(block, x)
        return x


PICTURES_AT_ONCE = 8


def bottleneck(block, x):
    """torchvision's Bottleneck with its batch norms folded: ReLU of x + three convolutions of x.
    It may write its output over x."""
    y = convolve(block.conv1, block.bn1, x, relu=True)
    y = convolve(block.conv2, block.bn2, y, relu=True)
    if block.downsample is not None:
        conv, norm = block.downsample
        x = convolve(conv, norm, x)
    return convolve(block.conv3, block.bn3, y, residual=x, relu=True)


def convolve(conv, norm, x, residual=None, relu=False):
    """A convolution and the frozen batch norm after it, in one: (B, C, H, W) -> (B, C', H', W').
    residual: (B, C', H', W'), added to the output, which may be written over it. relu: whether ReLU
    is the last step."""
    if conv.weight.requires_grad:
        # In full fine-tuning autograd would have to keep the folded weights, too.
        y = norm(conv(x))
    else:
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()               # (C',)
        shift = norm.bias - norm.running_mean * scale
        weight = conv.weight * scale[:, None, None, None]
        y = F.conv2d(x, weight, shift, conv.stride, conv.padding)
    if residual is not None:
        y = y.add_(residual)
    if relu:
        y = F.relu(y, inplace=True)
    return y


class SmallStem(nn.Module):
    """The tiny size's stand-in for a ResNet: (B, 3, H, W) -> (B, width, H/8, W/8).
    Two extra channels hold the coordinates, in [-1, 1]. A ResNet learns from its zero padding where
    a feature lies; two convolutions cannot."""

    def __init__(self, width):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.mix = nn.Conv2d(width + 2, width, 3, stride=2, padding=1)

    def forward(self, images):
        x = F.relu(self.patches(images))                                      # (B, width, H/4, W/4)
        rows = torch.linspace(-1, 1, x.shape[-2], device=x.device, dtype=x.dtype)
        columns = torch.linspace(-1, 1, x.shape[-1], device=x.device, dtype=x.dtype)
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))      # (2, H/4, W/4)
        grid = grid.expand(len(x), -1, -1, -1)
        return F.relu(self.mix(torch.cat([x, grid], dim=1)))


def sine_position(padding, dim):
    """DETR's two-dimensional sine positions (Carion et al., ECCV 2020).
    padding: (B, H, W) -> (B, H*W, dim), where half of dim is for y and half for x. Positions count
    the cells that are not padding and are scaled to [0, 2π], so that the place of a picture in its
    square makes no difference."""
    real = ~padding
    y = real.cumsum(1, dtype=torch.float32)                                   # (B, H, W), from 1
    x = real.cumsum(2, dtype=torch.float32)
    y = y / (y[:, -1:, :] + 1e-6) * 2 * math.pi
    x = x / (x[:, :, -1:] + 1e-6) * 2 * math.pi
    exponent = 2 * torch.arange(dim // 4, device=padding.device) / (dim // 2)
    frequency = 10000 ** exponent                                             # (dim / 4,)
    halves = []
    for coordinate in (y, x):
        angle = coordinate[..., None] / frequency                             # (B, H, W, dim / 4)
        waves = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)   # sine, cosine in turn
        halves.append(waves)
    return torch.cat(halves, dim=-1).flatten(1, 2)


class VisionEncoder(nn.Module):
    """DETR's backbone and encoder, M²IST Section III-A a.
    images (B, 3, S, S), padding (B, S, S) -> Encoded with Nv tokens."""

    def __init__(self, backbone, channels, dim, heads, hidden, layers, dropout):
        super().__init__()
        self.backbone = backbone
        self.projection = nn.Conv2d(channels, dim, 1)
        self.layers = stack(layers, dim, heads, hidden, "relu", dropout=dropout,
                            ffn_dropout=dropout)

    def forward(self, images, padding):
        z = self.projection(self.backbone(images))                            # z' (B, C_v, H, W)
        small = F.interpolate(padding[:, None].float(), size=z.shape[-2:])    # nearest
        padding = small[:, 0].bool()                                          # (B, H, W)
        position = sine_position(padding, z.shape[1]).to(z.dtype)
        tokens = z.flatten(2).transpose(1, 2)                                 # (B, Nv, C_v)
        return run_layers(self.layers, tokens, padding.flatten(1), position)


class TextEncoder(nn.Module):
    """BERT without its pooler, M²IST Section III-A b: post-norm, GELU.
    tokens, padding: (B, T) -> Encoded with T tokens."""

    def __init__(self, vocabulary, positions, dim, heads, hidden, layers, dropout):
        super().__init__()
        self.word = nn.Embedding(vocabulary, dim)
        self.position = nn.Embedding(positions, dim)
        self.token_type = nn.Embedding(2, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.dropout = nn.Dropout(dropout)
        self.layers = stack(layers, dim, heads, hidden, "gelu", dropout=dropout, eps=1e-12)

    def forward(self, tokens, padding):
        # [D8] One text has tokens of type 0 only, and BERT adds that type's embedding to each.
        x = self.word(tokens) + self.position.weight[:tokens.shape[1]] + self.token_type.weight[0]
        return run_layers(self.layers, self.dropout(self.norm(x)), padding)


class ClipVision(nn.Module):
    """CLIP's vision transformer, HiVG Section 3.1.
    images (P, 3, S, S), padding (P, S, S) -> Encoded with 1 + Nv tokens, [CLS] first. context: what
    the bridges in the layers need, if there are any. picture (B,): the row of each text's picture;
    the layers below the first bridge, which see no text, then run once for each picture. As in
    CLIP, attention looks at every patch, padded patches too; the padding mask is for the grounding
    encoder."""

    def __init__(self, image_size, patch, dim, heads, hidden, layers, embedding,
                 released_rules=False, checkpointing=False):
        super().__init__()
        self.released_rules = released_rules
        self.checkpointing = checkpointing
        self.patches = nn.Conv2d(3, dim, patch, stride=patch, bias=False)
        self.cls = nn.Parameter(dim ** -0.5 * torch.randn(dim))
        # A tower that is not loaded from CLIP starts from two-dimensional sines, because the place
        # of a patch must show in its token's values.
        side = image_size // patch
        sines = sine_position(torch.zeros(1, side, side, dtype=torch.bool), dim)[0]
        self.position = nn.Parameter(F.pad(sines, (0, 0, 1, 0)))              # (1 + Nv, dim)
        self.pre_norm = nn.LayerNorm(dim)
        self.norm = nn.LayerNorm(dim)
        self.layers = stack(layers, dim, heads, hidden, "quick_gelu", pre_norm=True)
        self.projection = nn.Linear(dim, embedding, bias=False)

    def forward(self, images, padding, context=None, picture=None):
        patches = self.patches(images).flatten(2).transpose(1, 2)             # (P, Nv, C)
        cls = self.cls.expand(len(images), 1, -1)
        x = torch.cat([cls, patches], dim=1)                                  # (P, 1 + Nv, C)
        x = self.pre_norm(x + self.position)
        padding = F.pad(self.patch_padding(padding), (1, 0))    # [CLS] is never padding

        bridge = self.first_bridge()
        below = run_layers(self.layers[:bridge], x, checkpointing=self.checkpointing)
        above = run_layers(self.layers[bridge:], rows(below.x, picture), context=context,
                           checkpointing=self.checkpointing)
        states = [rows(state, picture) for state in below.states] + above.states
        return Encoded(above.x, rows(padding, picture), states=states,
                       embedding=self.embed(above.x[:, 0]))

    def first_bridge(self):
        """The place in `layers` of the first one with a bridge; behind the last one if none has."""
        for place, layer in enumerate(self.layers):
            if len(layer.plugs) > 0:
                return place
        return len(self.layers)

    def patch_padding(self, padding):
        """Which patches count as padding. padding: (B, S, S) -> (B, Nv)."""
        share = F.avg_pool2d(padding[:, None].float(), self.patches.stride)   # padded share of each
        if self.released_rules:
            return (share > 0.5).flatten(1)
        # [D30] A patch is padding if no pixel of it belongs to the picture.
        return (share == 1).flatten(1)

    def embed(self, x):
        """CLIP's final norm and projection, made for [CLS]: (..., dim) -> (..., embedding)."""
        return self.projection(self.norm(x))


class ClipText(nn.Module):
    """CLIP's text tower, HiVG Section 3.1.
    tokens, padding: (B, T) -> Encoded, with x after the final norm and the projection. Attention is
    causal, so no token sees what follows it; padding comes last, so no token sees padding."""

    def __init__(self, vocabulary, positions, dim, heads, hidden, layers, embedding):
        super().__init__()
        self.word = nn.Embedding(vocabulary, dim)
        self.position = nn.Parameter(0.25 * torch.randn(positions, dim))
        # A tower that is not loaded from CLIP can tell words and places apart from its start.
        nn.init.normal_(self.word.weight, std=0.5)
        self.layers = stack(layers, dim, heads, hidden, "quick_gelu", pre_norm=True, causal=True)
        self.norm = nn.LayerNorm(dim)
        self.projection = nn.Linear(dim, embedding, bias=False)

    def forward(self, tokens, padding):
        x = self.word(tokens) + self.position[:tokens.shape[1]]
        encoded = run_layers(self.layers, x)
        x = self.projection(self.norm(encoded.x))                             # (B, T, embedding)
        eos = (~padding).sum(1) - 1                                           # [EOS] ends its text
        embedding = x[torch.arange(len(x), device=x.device), eos]             # (B, embedding)
        return encoded._replace(x=x, padding=padding, embedding=embedding)


class Clip(nn.Module):
    """Both towers and the temperature, as they were pretrained together."""

    def __init__(self, vision, text):
        super().__init__()
        self.vision = vision
        self.text = text
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))    # CLIP's own start


# ---------------------------------------------------------------------------------------------
# The grounding encoder

class Grounding(NamedTuple):
    """What a grounding model returns. The last five fields are for HiVG's constraints."""
    boxes: Tensor                # (B, 4)   (cx, cy, w, h) in [0, 1]
    attention: Tensor = None     # (B, Nv)  how [REG] looks at the picture, where asked for
    scores: Tensor = None        # (B, Nv)  HiVG Eq. (12) before its sigmoid, in training only
    padding: Tensor = None       # (B, Nv)  True where a cell of the picture is padding
    text: Tensor = None          # (B, C)   CLIP's embedding of the text
    image: Tensor = None         # (B, C)   CLIP's embedding of the picture
    temperature: Tensor = None   # ()       τ of HiVG Eqs. (9) and (10)


class Sequence(NamedTuple):
    """The input of the grounding encoder."""
    x: Tensor            # (B, 1 + T + Nv, C)
    padding: Tensor      # (B, 1 + T + Nv)
    position: Tensor     # (1 + T + Nv, C)
    cells: slice         # where in the sequence the cells of the picture are


class GroundingEncoder(nn.Module):
    """The V-L encoder of M²IST (Section III-A c), the grounding encoder of HiVG (Section 3.1), and
    the box head of both.

    vision, text: Encoded, with widths vision_dim and text_dim and at most max_tokens text tokens.
    Returns a Grounding. With `clip` the vision tokens begin with [CLS] and come before the text, as
    in HiVG Eq. (2). region_hidden: the width of the MLP of HiVG Eq. (12), needed with region_text.
    """

    def __init__(self, vision_dim, text_dim, vision_tokens, max_tokens, dim, heads, hidden, layers,
                 dropout, pre_norm=False, position_std=1.0, packed_start=True, clip=False,
                 region_text=False, region_hidden=None):
        super().__init__()
        self.max_tokens = max_tokens
        self.clip = clip
        # [D28] HiVG: W_mvp of Eq. (1), and a linear after CLIP's own projection of the text.
        self.vision_projection = nn.Linear(vision_dim, dim)
        self.text_projection = nn.Linear(text_dim, dim)
        self.reg = nn.Parameter(torch.randn(1, dim))
        tokens = 1 + max_tokens + vision_tokens
        self.position = nn.Parameter(position_std * torch.randn(tokens, dim))
        self.layers = stack(layers, dim, heads, hidden, "relu", pre_norm, dropout, dropout,
                            packed_start=packed_start)
        # A post-norm layer ends in a norm of its own; a pre-norm stack needs a last one.
        self.norm = nn.LayerNorm(dim) if pre_norm else nn.Identity()
        # [D29] Three linears with a ReLU between them; the sigmoid follows in forward.
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(),
                                  nn.Linear(dim, 4))
        self.region = RegionText(dim, region_hidden) if region_text else None

    def sequence(self, vision, text):
        """Join [REG], text and vision tokens -> Sequence. A text may be trimmed to the longest of
        its batch; every token keeps the position that it has in a full sequence."""
        B, T = text.padding.shape
        V = vision.padding.shape[1]    # vision tokens: Nv cells, and with `clip` [CLS] before them
        reg = self.reg.expand(B, 1, -1)
        reg_padding = text.padding.new_zeros(B, 1)
        x_v = self.vision_projection(vision.x)                                # HiVG Eq. (1)
        x_l = self.text_projection(text.x)
        if self.clip:
            # HiVG Eq. (2): [REG], [CLS], the cells of the picture, the text.
            x = torch.cat([reg, x_v, x_l], dim=1)
            padding = torch.cat([reg_padding, vision.padding, text.padding], dim=1)
            position = self.position[:1 + V + T]
            cells = slice(2, 1 + V)                                           # after [REG], [CLS]
        else:
            # M²IST Section III-A c: [REG], the text, the cells of the picture.
            x = torch.cat([reg, x_l, x_v], dim=1)
            padding = torch.cat([reg_padding, text.padding, vision.padding], dim=1)
            position = torch.cat([self.position[:1 + T], self.position[1 + self.max_tokens:]])
            cells = slice(1 + T, None)
        return Sequence(x, padding, position, cells)

    def forward(self, vision, text, attention=False):
        x, padding, position, cells = self.sequence(vision, text)
        for layer in self.layers[:-1]:
            x, _, _ = layer(x, padding, position)
        last = self.layers[-1]
        looks = None
        if attention:
            looks = last.attention_map(x, padding, position)[:, cells]        # (B, Nv)
        # The box is read from [REG], the first token, so the last layer computes [REG] alone.
        # HiVG's region-text constraint reads nearly all tokens, so in its training all are computed.
        reads_regions = self.region is not None and self.training
        x, _, _ = last(x, padding, position, first=None if reads_regions else 1)
        x = self.norm(x)

        reg = x[:, 0]                                                         # (B, C)
        boxes = self.head(reg).float().sigmoid()                              # (B, 4)
        grounding = Grounding(boxes, looks)
        if reads_regions:
            # HiVG Eq. (12) compares the token of [EOS], which ends the text, with every cell.
            # Before [EOS] are [REG], V vision tokens and the other words: 1 + V + (length - 1).
            eos = vision.padding.shape[1] + (~text.padding).sum(1)            # (B,) place of [EOS]
            t_eos = x[torch.arange(len(x), device=x.device), eos]             # (B, C)
            scores = self.region(t_eos, x[:, cells])                          # (B, Nv)
            grounding = grounding._replace(scores=scores, padding=padding[:, cells])
        return grounding


# ---------------------------------------------------------------------------------------------
# The two grounding models

class LoraStack(NamedTuple):
    """Layers whose linears LoRA adapts together."""
    layers: list     # modules, in the order in which the stages reach them
    groups: int      # G of HiVG Eq. (6); a stack with one group takes part in every stage


def rows(x, picture):
    """One row for each text, of what was computed once for each picture.
    x: (P, ...), picture: (B,) -> (B, ...). picture may be None, and x is then returned as it is."""
    return x if picture is None else x[picture]


class GroundingModel(nn.Module):
    """What both grounding models share: the interface, and the stages of LoRA.

        text = model.encode_text(tokens, token_padding)
        vision = model.encode_image(images, image_padding, text)
        grounding = model.ground(vision, text)

    spec: the dictionary from `architecture`. stage: the LoRA stage whose pairs are in place now; 0
    means that there are none.
    """

    def __init__(self, spec):
        super().__init__()
        self.spec = spec
        self.stage = 0

    def forward(self, images, image_padding, tokens, token_padding, picture=None, attention=False):
        """images (P, 3, S, S), image_padding (P, S, S), tokens and token_padding (B, T)
        -> Grounding. picture (B,): the row of each text's picture in `images`, where P pictures
        serve B texts; None: each text has its own, P = B. attention: whether to return [REG]'s
        attention as well."""
        text = self.encode_text(tokens, token_padding)
        vision = self.encode_image(images, image_padding, text, picture)
        return self.ground(vision, text, attention)

    def trim(self, tokens, padding):
        """Cut tokens and padding, both (B, T), to max_tokens. Only padding may be cut off."""
        limit = self.spec["max_tokens"]
        # On the meta device a mask has no values to look at, and nothing is cut off there.
        if tokens.shape[1] > limit and not padding[:, limit:].all():
            raise ValueError(f"a text has more than max_tokens = {limit} tokens")
        return tokens[:, :limit], padding[:, :limit]

    def lora_stacks(self):
        raise NotImplementedError

    def begin_stage(self, stage):
        """Begin LoRA stage `stage`: put fresh pairs, whose product is 0, on the layers that it
        trains. Stage 0 has no pairs. First merge the pairs of the stage before (hilora.merge), or
        load merged weights: pairs that are still in place are removed unmerged."""
        hilora.discard(self)
        self.stage = stage
        if stage == 0:
            return
        for layers, groups in self.lora_stacks():
            hilora.set_stages_done(layers, stage - 1)
            hilora.add_stage(layers, stage, groups, self.spec["rank"], self.spec["alpha"],
                             self.spec["lora_targets"])

    def lora_weights(self):
        """Names of the encoder weights that the stages up to the present one change when merged."""
        if self.stage == 0:
            return []
        names = {module: name for name, module in self.named_modules()}
        weights = []
        for layers, groups in self.lora_stacks():
            for number, target in hilora.stage_targets(layers, self.stage, groups,
                                                       self.spec["lora_targets"]):
                weights.append(f"{names[layers[number - 1]]}.{target}.weight")
        return weights


class DetrBert(GroundingModel):
    """Every method on DETR and BERT: M²IST, full fine-tuning, and the methods of its Table I.

    On DETR and BERT a method is defined by the adapter at each port, by how the adapters are
    inserted, and by the linears that LoRA adapts (METHODS). Only encoders that are themselves
    tuned leave eval mode [D7].
    """

    def __init__(self, vision, text, spec):
        super().__init__(spec)
        self.tuned = spec["tune_encoders"]
        self.insertion = spec["insertion"]
        self.vision = vision.requires_grad_(self.tuned)
        self.text = text.requires_grad_(self.tuned)
        vision_dim = spec["vision"]["dim"]
        text_dim = spec["text"]["dim"]
        self.grounding = GroundingEncoder(
            vision_dim, text_dim, vision_tokens=(spec["image_size"] // spec["stride"]) ** 2,
            max_tokens=spec["max_tokens"], **spec["grounding"])
        self.text_layers = checked_layers(spec, "text_layers", spec["text"]["layers"])
        if not self.text_layers:
            self.text_layers = list(range(1, spec["text"]["layers"] + 1))
        self.adapters = AdapterNetworks(
            vision_dim, text_dim, spec["vision"]["layers"], self.text_layers,
            attention_port=spec["attention_port"], ffn_port=spec["ffn_port"],
            bottleneck=spec["bottleneck"], interaction_dim=spec["interaction_dim"],
            interaction_bottleneck=spec["interaction_bottleneck"], scale=spec["scale"],
            residual=spec["residual"])
        if self.insertion != "side":
            self.adapters.insert("vision", vision.layers, self.insertion)
            self.adapters.insert("text", text.layers, self.insertion)

    def train(self, mode=True):
        super().train(mode)
        self.vision.train(mode and self.tuned)    # [D7]
        self.text.train(mode and self.tuned)
        return self

    def lora_stacks(self):
        """M²IST Section IV-D f: "two pairs", on q and v, in each layer of both encoders [D39]."""
        vision = list(self.vision.layers)
        if self.spec["deep_to_shallow"]:
            vision.reverse()
        return [LoraStack(vision, self.spec["stages"]), LoraStack(list(self.text.layers), 1)]

    def encode_image(self, images, image_padding, text=None, picture=None):
        """images (P, 3, S, S), image_padding (P, S, S) -> Encoded, x (P, Nv, C_v), or (B, Nv, C_v)
        with picture (B,). M²IST's vision encoder never sees the text: one encoded picture serves
        any number of texts."""
        encoded = self.encode("vision", self.vision, images, image_padding)
        return Encoded(rows(encoded.x, picture), rows(encoded.padding, picture))

    def encode_text(self, tokens, token_padding):
        """tokens, token_padding (B, T) -> Encoded, x (B, T, C_l). Beyond max_tokens there may be
        nothing but padding."""
        tokens, token_padding = self.trim(tokens, token_padding)
        return self.encode("text", self.text, tokens, token_padding)

    def encode(self, modality, encoder, inputs, padding):
        # M²IST saves its memory here. Where nothing inside the encoder is trained, it runs without
        # autograd: no activation is kept, and the backward pass stops at the side network (the red
        # dashed arrow of Fig. 2). For M²IST the `with` below is `with torch.no_grad()`.
        tuned = any(p.requires_grad for p in encoder.parameters())    # in full, or by LoRA
        trains_inside = tuned or self.insertion != "side"
        with torch.set_grad_enabled(trains_inside and torch.is_grad_enabled()):
            encoded = encoder(inputs, padding)

        x = encoded.x
        if self.insertion == "side" and self.adapters.adapts(modality):
            # Section III-B b: the output of the side network is added to that of the encoder.
            start = self.side_start(modality, encoded)
            x = x + self.adapters.side(modality, start, encoded.ports)
        return Encoded(x, encoded.padding)

    def side_start(self, modality, encoded):
        """s_0 of a side network, (B, N, C): the input of the encoder's first layer or, with
        --side-start paired, that of its first paired layer (D6 in adapters.py). For vision, whose
        first layer is paired, the two are the same."""
        first = min(self.adapters.layers[modality])
        if self.spec["side_start"] == "paired" and first > 1:
            return encoded.states[first - 2]    # x_{first - 1}; states[0] is x_1
        return encoded.x0

    def ground(self, vision, text, attention=False):
        return self.grounding(vision, text, attention)


class ClipGrounding(GroundingModel):
    """Every method on CLIP, HiVG Section 3.1: the two towers, the bridges in the vision tower, the
    grounding encoder. CLIP is frozen but for its LoRA pairs.

    Paper's m = len(self.levels), the vision layers whose features are grounded (--vision-layers),
    and n = len(self.text_layers), the text layers that a bridge sees.
    """

    def __init__(self, clip, spec):
        super().__init__(spec)
        vision = spec["vision"]
        text = spec["text"]
        self.clip = clip.requires_grad_(False)
        self.levels = checked_layers(spec, "vision_layers", vision["layers"])
        if not self.levels:
            self.levels = [vision["layers"]]                    # the last layer alone
        # The layer after the last is what the text tower puts out, after its projection.
        self.text_layers = checked_layers(spec, "text_layers", text["layers"] + 1)
        if not self.text_layers:
            self.text_layers = list(range(1, text["layers"] + 1))
        self.grounding = GroundingEncoder(
            len(self.levels) * vision["dim"], text["embedding"],
            vision_tokens=1 + (spec["image_size"] // spec["stride"]) ** 2,
            max_tokens=spec["max_tokens"], clip=True, region_text=spec["region_text"],
            region_hidden=spec["region_hidden"], **spec["grounding"])
        self.add_bridges(spec)

    def add_bridges(self, spec):
        """HiVG Section 3.2: a cross-modal bridge at the attention port of each bridge layer."""
        layers = checked_layers(spec, "bridge_layers", spec["vision"]["layers"])
        one_each = spec["layer_to_layer"]
        if one_each and len(layers) != len(self.text_layers):
            raise InputError(f"layer_to_layer: {len(layers)} bridges need as many text layers, "
                             f"not {len(self.text_layers)}")
        heads = spec["vision"]["heads"] if spec["cross_attention"] else 0
        for number, layer in enumerate(layers):
            bridge = CrossModalBridge(
                spec["vision"]["dim"], spec["text"]["dim"],
                1 if one_each else len(self.text_layers), spec["max_tokens"], heads,
                spec["bridge_weights"], only=number if one_each else None)
            self.clip.vision.layers[layer - 1].plugs["attention"] = bridge

    def lora_stacks(self):
        """HiVG Section 4.1: the vision tower in G groups; the text tower is one [D34]."""
        vision = list(self.clip.vision.layers)
        if self.spec["deep_to_shallow"]:
            vision.reverse()
        return [LoraStack(vision, self.spec["stages"]), LoraStack(list(self.clip.text.layers), 1)]

    def encode_text(self, tokens, token_padding):
        """tokens, token_padding (B, T) -> Encoded, x (B, T, H_g): the last layer's features after
        CLIP's own projection."""
        tokens, token_padding = self.trim(tokens, token_padding)
        if self.spec["released_rules"]:
            # [D47] Texts are padded to max_tokens, by the id 0.
            missing = self.spec["max_tokens"] - tokens.shape[1]
            tokens = F.pad(tokens.masked_fill(token_padding, 0), (0, missing), value=0)
            token_padding = F.pad(token_padding, (0, missing), value=True)
        return self.clip.text(tokens, token_padding)

    def encode_image(self, images, image_padding, text=None, picture=None):
        """images (P, 3, S, S), image_padding (P, S, S), text from encode_text, picture (B,) or
        None -> Encoded, x (B, 1 + Nv, m H_v). The text is needed: the bridges let it into the
        vision tower."""
        if text is None:
            raise ValueError("the vision tower of CLIP needs the text, from encode_text, for its "
                             "bridges")
        states = [*text.states, text.x]
        seen = [states[layer - 1] for layer in self.text_layers]
        masked = text.padding    # the text tokens that the bridges do not see
        if self.spec["released_rules"]:
            masked = torch.zeros_like(text.padding)    # [D47] They see padding too.
        vision = self.clip.vision(images, image_padding, (seen, masked), picture)
        levels = [vision.states[level - 1] for level in self.levels]
        return vision._replace(x=torch.cat(levels, dim=-1))                   # HiVG Eq. (1)

    def ground(self, vision, text, attention=False):
        grounding = self.grounding(vision, text, attention)
        temperature = (-self.clip.logit_scale).exp()                          # τ, Eqs. (9), (10)
        return grounding._replace(text=text.embedding, image=vision.embedding,
                                  temperature=temperature)


def checked_layers(spec, name, count):
    """The layer numbers of an option, each once and in 1 .. count; [] where the option has none."""
    layers = list(spec[name] or [])
    in_range = all(1 <= layer <= count for layer in layers)
    if not in_range or len(set(layers)) < len(layers):
        given = " ".join(str(layer) for layer in layers)
        raise InputError(f"--{name.replace('_', '-')} {given}: must differ and lie in 1 .. {count}")
    return layers


# ---------------------------------------------------------------------------------------------
# What can be built: sizes, methods, options

# SIZES[size][encoders] holds the architecture and the defaults of the options that depend on it.
SIZES = {
    "base": {
        # M²IST Sections III-A and IV-B. Dropout and heads as in the released code.
        "detr": dict(
            image_size=640, stride=32, max_tokens=20, backbone="resnet50",
            vision=dict(channels=2048, dim=256, heads=8, hidden=2048, layers=6, dropout=0.1),
            text=dict(vocabulary=30522, positions=512, dim=768, heads=12, hidden=3072, layers=12,
                      dropout=0.1),
            grounding=dict(dim=256, heads=8, hidden=2048, layers=6, dropout=0.1),
            text_layers=[7, 8, 9, 10, 11, 12], bottleneck=128, interaction_dim=256,
            interaction_bottleneck=128, rank=55, alpha=55.0, text_weights="bert-base-uncased"),
        # HiVG Section 4.1 and Table 7 [D16]. The hidden widths of the grounding encoder and of the
        # region-text MLP as in the released code.
        "clip": dict(
            image_size=224, stride=16, max_tokens=77,
            vision=dict(dim=768, heads=12, hidden=3072, layers=12, embedding=512),
            text=dict(vocabulary=49408, positions=77, dim=512, heads=8, hidden=2048, layers=12,
                      embedding=512),
            grounding=dict(dim=512, heads=8, hidden=2048, layers=6, dropout=0.1, pre_norm=True),
            region_hidden=3072, vision_layers=[1, 4, 8, 12], bridge_layers=[4, 8, 12],
            stages=3, rank=32, alpha=16.0,
            clip_weights="openai/clip-vit-base-patch16")},    # [D31]
    "large": {
        "clip": dict(
            image_size=224, stride=14, max_tokens=77,
            vision=dict(dim=1024, heads=16, hidden=4096, layers=24, embedding=768),
            text=dict(vocabulary=49408, positions=77, dim=768, heads=12, hidden=3072, layers=12,
                      embedding=768),
            grounding=dict(dim=768, heads=8, hidden=2048, layers=6, dropout=0.1, pre_norm=True),
            region_hidden=3072, vision_layers=[6, 12, 18, 24], bridge_layers=[6, 12, 18, 24],
            stages=4, rank=32, alpha=16.0,
            clip_weights="openai/clip-vit-large-patch14")},
    # Ours, small enough to learn `shapes` on two cores in minutes. The grounding encoder is
    # pre-norm, as HiVG's, with small positions: with post-norm and positions from N(0, 1) a run
    # takes several times as long to predict anything but the mean box. Attention starts wider, see
    # [D45].
    "tiny": {
        "detr": dict(
            image_size=64, stride=8, max_tokens=20, backbone="small stem",
            vision=dict(channels=64, dim=64, heads=4, hidden=128, layers=2, dropout=0.0),
            text=dict(vocabulary=256, positions=32, dim=96, heads=4, hidden=192, layers=4,
                      dropout=0.0),
            grounding=dict(dim=96, heads=6, hidden=192, layers=3, dropout=0.0, pre_norm=True,
                           position_std=0.1, packed_start=False),
            text_layers=[3, 4], bottleneck=32, interaction_dim=64, interaction_bottleneck=32,
            rank=14, alpha=14.0),
        "clip": dict(
            image_size=64, stride=8, max_tokens=20,
            vision=dict(dim=64, heads=4, hidden=128, layers=6, embedding=64),
            text=dict(vocabulary=256, positions=32, dim=64, heads=4, hidden=128, layers=3,
                      embedding=64),
            grounding=dict(dim=96, heads=6, hidden=192, layers=3, dropout=0.0, pre_norm=True,
                           position_std=0.1, packed_start=False),
            region_hidden=96, vision_layers=[1, 2, 4, 6], bridge_layers=[2, 4, 6],
            stages=3, rank=32, alpha=16.0)}}

# A method is one row: its encoders and the options that make it what it is. It overrides the size.
# `frozen` is the row that all others on DETR and BERT start from: encoders frozen, nothing at the
# ports (names from ADAPTERS), no LoRA.
FROZEN = dict(encoders="detr", tune_encoders=False, insertion="side", attention_port="none",
              ffn_port="none", scale=0.1, lora_targets=(), stages=0)
# LoRA on DETR and BERT is one stage that lasts the whole training [D39]. build_model begins it at
# once, so that count_parameters includes its pairs.
LORA = dict(lora_targets=("q", "v"), stages=1, first_stage=1)
# On CLIP the stages follow a warm-up without LoRA, and the model of the warm-up is what build_model
# returns.
ON_CLIP = dict(encoders="clip", lora_targets=("q", "k", "v", "out"))    # [D25]
# HiVG Fig. 4 (d), "original CLIP": features of the last layer, neither bridges nor the region-text
# constraint.
PLAIN_CLIP = dict(ON_CLIP, vision_layers=None, bridge_layers=[], region_text=False)

METHODS = {
    "full": dict(FROZEN, tune_encoders=True),                               # Table I [D10]
    "frozen": FROZEN,                                                       # Table V (a)
    # The methods that M²IST is compared with in Table I, by their sources [D39]. Where text_layers
    # is None, all text layers have adapters.
    "adapter": dict(FROZEN, insertion="sequential",                         # Houlsby, ICML 2019
                    attention_port="ea", ffn_port="ea", text_layers=None),
    "lora": dict(FROZEN, **LORA),                                           # Hu, ICLR 2022
    "adaptformer": dict(FROZEN, insertion="parallel", ffn_port="ea",        # Chen, NeurIPS 2022
                        text_layers=None),
    "cm-adapter": dict(FROZEN, insertion="sequential",                      # Jiang, 2022
                       attention_port="iea", ffn_port="iea"),
    "mrs-adapter": dict(FROZEN, insertion="parallel", ffn_port="iea"),      # Yuan, TGRS 2023
    "m2ist": dict(FROZEN, attention_port="iea", ffn_port="ea"),             # Tables I, V (f) [D11]
    "m2ist+lora": {**FROZEN, "attention_port": "iea", "ffn_port": "ea", **LORA},    # Table X
    "clip-frozen": dict(PLAIN_CLIP, lora_targets=(), stages=0),             # HiVG Fig. 4 (d)
    "clip-lora": dict(PLAIN_CLIP, stages=1),                                # ... with vanilla LoRA
    "hivg": ON_CLIP}                                                        # [D23]


# Each function below says whether a spec takes an option. Its docstring becomes part of an error:
# "--scale is for methods with an adapter at a port, not for --method full".

def on_detr(spec):
    """methods on DETR and BERT"""
    return spec["encoders"] == "detr"


def on_clip(spec):
    """methods on CLIP"""
    return spec["encoders"] == "clip"


def has_adapters(spec):
    """methods with an adapter at a port"""
    return on_detr(spec) and not spec["attention_port"] == spec["ffn_port"] == "none"


def has_side_network(spec):
    """side networks"""
    # The output of an inserted adapter is always added to its port, so --residual is not for it.
    return has_adapters(spec) and spec["insertion"] == "side"


def has_text_layers(spec):
    """methods with adapters or bridges"""
    return has_adapters(spec) or has_bridges(spec)


def has_bridges(spec):
    """methods with cross-modal bridges"""
    return on_clip(spec) and bool(spec["bridge_layers"])


def can_have_lora(spec):
    """methods with linears for LoRA: lora, m2ist+lora, clip-lora and hivg"""
    return len(spec["lora_targets"]) > 0


def has_lora(spec):
    """runs with LoRA (--stages of 1 or more)"""
    return can_have_lora(spec) and spec["stages"] > 0


class Option(NamedTuple):
    """One option. The parser, the checks, --help and build_model read all of it from here.

    `default` is the same for all runs. A default that depends on size, method or dataset stands in
    SIZES, METHODS or RECIPES (train.py) instead, under the option's name; train.resolve says which
    of them wins.
    """
    name: str                     # as an argument; the flag has dashes: max_tokens, --max-tokens
    type: type                    # int, float, str, or bool for a switch
    group: str                    # its heading in --help
    help: str                     # one sentence
    source: str                   # where its default comes from
    default: object = None
    choices: object = None        # a container with the valid names
    at_least: float = None        # the least value that makes sense
    several: str = None           # "+" for a list, "*" for a list that may be empty
    only: Callable = None         # which methods take it; None: all
    flag: bool = True             # False: set by rows of the tables, by train.py or by evaluate.py


MODEL_OPTIONS = [
    Option("image_size", int, "data", "S, the side of the padded square in pixels, a multiple of 32; "
           "CLIP has positions for its own side alone.", "M²IST IV-B b", at_least=32, only=on_detr),
    Option("max_tokens", int, "data", "Cut texts at this many tokens, first and last included.",
           "released code, HiVG Appendix B", at_least=3),    # [CLS], a word, [SEP]
    Option("vision_weights", str, "weights", "DETR R-50: a file in official naming (TransVG's "
           "too), a folder, or a hub name.", "M²IST IV-B a; DETR's official file if not given",
           only=on_detr),
    Option("text_weights", str, "weights", "BERT: a folder or a hub name.", "M²IST IV-B a",
           only=on_detr),
    Option("clip_weights", str, "weights", "CLIP: a folder, a hub name, or a file in HiVG's "
           "naming.", "HiVG 4.1", only=on_clip),
    Option("pixels", str, "weights", "Normalise pixels as this encoder's pretraining did.",
           "released code; the encoder's own if not given", choices=data.PIXELS),
    Option("attention_port", str, "M²IST", "Adapter at the attention ports.", "M²IST Tables V, VI",
           choices=ADAPTERS, only=on_detr),
    Option("ffn_port", str, "M²IST", "Adapter at the feed-forward ports.", "M²IST Tables V, VI",
           choices=ADAPTERS, only=on_detr),
    Option("insertion", str, "M²IST", "Where adapters work: beside the encoder or inside it.",
           "M²IST Table VII", choices=("side", "sequential", "parallel"), only=has_adapters),
    Option("bottleneck", int, "M²IST", "C_d, the bottleneck of VEA and LEA.", "M²IST IV-B b",
           at_least=1,
           only=has_adapters),
    Option("interaction_dim", int, "M²IST", "C_i, the shared channels of IEA.", "M²IST IV-B b",
           at_least=1, only=has_adapters),
    Option("interaction_bottleneck", int, "M²IST", "C_d of IEA.", "M²IST IV-C a", at_least=1,
           only=has_adapters, flag=False),
    Option("scale", float, "M²IST", "s, the scale of all adapters.", "M²IST IV-B b", at_least=0,
           only=has_adapters),
    Option("residual", bool, "M²IST", "Adapters add their own input, as Eqs. (1), (4), (5) say.",
           "released code", default=False, only=has_side_network),
    Option("side_start", str, "M²IST", "Where a side network starts: at the encoder's input, or at "
           "that of the first paired layer.", "released code, D6", default="input",
           choices=("input", "paired"), only=has_side_network),
    Option("text_layers", int, "M²IST", "M²IST: the text layers that are paired with vision layers "
           "1, 2, ...; HiVG: those that the bridges read, where the number after the last layer's "
           "is the projected text.",
           "M²IST Table VIII c, HiVG Table 10; else all if not given",
           at_least=1, several="+", only=has_text_layers),
    Option("vision_layers", int, "HiVG", "Ground the features of these vision layers.", "HiVG 4.1",
           at_least=1, several="+", only=on_clip),
    Option("bridge_layers", int, "HiVG", "Vision layers with a cross-modal bridge.", "HiVG 4.1",
           at_least=1, several="*", only=on_clip),
    Option("bridge_weights", str, "HiVG", "Shape of the bridges' sample-agnostic weights.",
           "HiVG Tables 4, 10", default="nxLxH", choices=BRIDGE_WEIGHTS, only=has_bridges,
           flag=False),
    Option("cross_attention", bool, "HiVG", "Bridges have cross-attention.", "HiVG Table 4",
           default=True, only=has_bridges, flag=False),
    Option("layer_to_layer", bool, "HiVG", "Each bridge sees one of the text layers.",
           "HiVG Table 4",
           default=False, only=has_bridges, flag=False),
    Option("checkpointing", bool, "machine", "Compute each vision layer again in the backward pass: "
           "less memory, more time, the same numbers.", "ours", default=False, only=on_clip),
    Option("released_rules", bool, "HiVG", "Padding as in HiVG's released code [D47].",
           "released code", default=False, only=on_clip, flag=False),
    Option("region_text", bool, "HiVG", "The MLP of Eq. (12) exists.", "HiVG 3.4", default=True,
           only=on_clip, flag=False),
    Option("stages", int, "HiVG", "G, the stages and layer groups of LoRA; 0 is without LoRA.",
           "HiVG 4.1", default=0, at_least=0, only=can_have_lora),
    Option("rank", int, "HiVG", "r of LoRA.", "HiVG Table 8; D39 on DETR and BERT", at_least=1,
           only=has_lora),
    Option("alpha", float, "HiVG", "α of LoRA; pairs are scaled by α / r.",
           "HiVG Table 8; D39 on DETR and BERT", at_least=1e-6, only=has_lora),
    Option("deep_to_shallow", bool, "HiVG", "Stages begin at the last vision layers.",
           "HiVG Table 5",
           default=False, only=has_lora, flag=False)]


def check_option(option, value, spec, method):
    """Raise InputError if a value that somebody gave for an option cannot be."""
    flag = f"--{option.name.replace('_', '-')}"
    if option.only is not None and not option.only(spec):
        raise InputError(f"{flag} is for {option.only.__doc__}, not for --method {method}")
    if option.choices is not None:
        one_of(flag, value, list(option.choices))
    if option.several and not isinstance(value, (list, tuple)):
        raise InputError(f"{flag} is {value!r}; it must be a list")
    values = value if option.several else [value]
    for number in values:
        if option.at_least is not None and not isinstance(number, (int, float)):
            raise InputError(f"{flag} is {number!r}; it must be a number")
        if option.at_least is not None and not option.at_least <= number < math.inf:
            raise InputError(f"{flag} is {number}; it must be {option.at_least} or more")


def architecture(method, size, **options):
    """Everything that a model is built from, as one dictionary, the spec: the defaults of the
    options, the size, the method's row, and the options that are given (None: not given), where
    a later one wins. Raises InputError for what is unknown or what the method does not take."""
    one_of("--method", method, METHODS)
    encoders = METHODS[method]["encoders"]
    one_of(f"--size for {method}", size, [name for name in SIZES if encoders in SIZES[name]])
    declared = {option.name: option for option in MODEL_OPTIONS}
    for name in options:
        one_of("option", name, declared)

    given = {name: value for name, value in options.items() if value is not None}
    spec = {option.name: option.default for option in MODEL_OPTIONS}
    spec["first_stage"] = 0
    spec.update(SIZES[size][encoders])
    spec.update(METHODS[method])
    spec.update(given)
    for name, value in given.items():
        check_option(declared[name], value, spec, method)
    if spec["image_size"] % spec["stride"] > 0:
        raise InputError(f"--image-size is {spec['image_size']}; it must be a multiple of "
                         f"{spec['stride']}")
    positions = spec["text"]["positions"]
    if spec["max_tokens"] > positions:
        raise InputError(f"--max-tokens is {spec['max_tokens']}; the text encoder of size {size} "
                         f"has {positions} positions")
    layers = spec["vision"]["layers"]
    if spec["stages"] > layers:
        raise InputError(f"--stages is {spec['stages']}; there are {layers} layers to divide")
    return spec


# ---------------------------------------------------------------------------------------------
# Building a model

ASSETS = Path(__file__).parent / "assets"
SHAPES_WEIGHTS = {                              # made by assets/pretrain_tiny.py
    "detr": ASSETS / "tiny-detr.safetensors",
    "clip": ASSETS / "tiny-clip.safetensors"}


def build_encoders(spec):
    """The encoders of a spec by name: vision and text, or clip. Random weights are drawn from a
    seed of their own, always the same, so that a checkpoint that holds only the tuned weights can
    be rebuilt."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if spec["encoders"] == "clip":
            vision = ClipVision(spec["image_size"], spec["stride"], **spec["vision"],
                                released_rules=spec["released_rules"],
                                checkpointing=spec["checkpointing"])
            text = ClipText(**spec["text"])
            return {"clip": Clip(vision, text)}
        if spec["backbone"] == "resnet50":
            backbone = ResNetBody()
        else:
            backbone = SmallStem(spec["vision"]["channels"])
        vision = VisionEncoder(backbone, **spec["vision"])
        return {"vision": vision, "text": TextEncoder(**spec["text"])}


def load_encoders(encoders, spec, weights):
    """Load the weights of the encoders; random weights are there already."""
    if weights == "shapes":
        path = SHAPES_WEIGHTS[spec["encoders"]]
        ours = nn.ModuleDict(encoders)
        same_names = [("(.+)", r"\1")]
        import_weights(ours, read_state(path), same_names, NOTHING, path)
    elif weights == "pretrained" and spec["encoders"] == "clip":
        load_hub(encoders["clip"], spec["clip_weights"], "--clip-weights", CLIP_TABLE, CLIP_IGNORED)
    elif weights == "pretrained":
        load_detr(encoders["vision"], spec["vision_weights"])
        load_hub(encoders["text"], spec["text_weights"], "--text-weights", BERT_TABLE, BERT_IGNORED)


def build_model(method, size="base", weights="pretrained", **options):
    """Build a grounding model, ready for the first phase of its training.

    method: one of METHODS. What the method does not tune has requires_grad False.
    size: base (the papers'), large (HiVG-L) or tiny (for `shapes`).
    weights: of the encoders: pretrained, shapes (of size tiny), or random.
    options: see MODEL_OPTIONS; None means not given.
    Under torch.device("meta") a model with random weights costs no memory. Raises InputError for
    what is unknown, cannot be had or does not fit together.
    """
    spec = architecture(method, size, **options)
    one_of(f"--weights for size {size}", weights,
           ("shapes" if size == "tiny" else "pretrained", "random"))
    spec["weights"] = weights
    encoders = build_encoders(spec)
    load_encoders(encoders, spec, weights)
    try:
        if spec["encoders"] == "clip":
            model = ClipGrounding(**encoders, spec=spec)
        else:
            model = DetrBert(**encoders, spec=spec)
    except InputError:
        raise
    except ValueError as error:                 # widths or layers that do not go together
        raise InputError(str(error)) from None
    model.begin_stage(spec["first_stage"])
    return model.train()


def make_tokenizer(spec):
    """The tokenizer that the text encoder of a spec was pretrained with. Random encoders take the
    small vocabulary of `shapes`. Raises InputError if the tokenizer cannot be had."""
    kind = "clip" if spec["encoders"] == "clip" else "text"
    flag = f"--{kind}-weights"
    if spec["weights"] != "pretrained":
        return cached_tokenizer(spec["max_tokens"])
    name = spec[f"{kind}_weights"]
    if Path(name).is_file():
        # A file holds weights alone. The tokenizer then is that of the hub's encoder of this size.
        for size in SIZES.values():
            row = size.get(spec["encoders"])
            if row is not None and row["text"] == spec["text"]:
                name = row[f"{kind}_weights"]
    return cached_tokenizer(spec["max_tokens"], name, spec["text"]["vocabulary"], flag)


@functools.cache    # reading the files of a tokenizer takes longer than all else before training
def cached_tokenizer(max_tokens, name=None, vocabulary=None, flag=None):
    return data.Tokenizer(max_tokens, name, vocabulary, flag)


def count_parameters(model):
    """{"total", "trainable", "encoder_tunable"}: numbers of parameters, each tensor once.
    encoder_tunable counts what is trained in or beside the encoders, the "Params." of M²IST [D11]
    and perhaps the "Update params." of HiVG, though these may be more [D23]."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    head = sum(p.numel() for p in model.grounding.parameters() if p.requires_grad)
    return {"total": total, "trainable": trainable, "encoder_tunable": trainable - head}


def tuned_groups(model):
    """What a model trains in its present stage: {a group's name: its number of parameters}."""
    counts = {}
    layers = {}    # the encoder layers that a group is in, where it is in some of them only
    for name, p in model.named_parameters():
        if p.requires_grad:
            group, layer = group_of(name, model.spec)
            counts[group] = counts.get(group, 0) + p.numel()
            layers.setdefault(group, set())
            if layer is not None:
                layers[group].add(layer)

    named = {}
    for group, count in counts.items():
        numbers = [str(layer) for layer in sorted(layers[group])]
        named[" ".join([group, *numbers])] = count
    return named


def group_of(name, spec):
    """The group of a trained parameter, and its encoder layer or None."""
    if name.startswith("grounding."):
        return "grounding encoder and box head", None
    if name.startswith("adapters."):
        return "adapters", None
    match = re.match(r"(?:clip\.)?(vision|text)\.(?:layers\.(\d+)\.)?", name)
    tower, index = match.groups()
    if ".plugs." in name:
        return "cross-modal bridges at vision layers", int(index) + 1
    if name.endswith((".A", ".B")):
        return f"LoRA pairs on {'/'.join(spec['lora_targets'])} of {tower} layers", int(index) + 1
    return f"{tower} encoder", None


def what_trains(method, stage, size="base", **options):
    """What a method trains in a LoRA stage (0: the phase without LoRA), as tuned_groups gives it:
    what_trains("hivg", stage=2). Nothing is loaded and no memory is used."""
    with torch.device("meta"):
        model = build_model(method, size, "random", **options)
        last = model.spec["stages"]
        if not 0 <= stage <= last:
            raise InputError(f"{method} has the stages 0 .. {last}, no stage {stage}")
        model.begin_stage(stage)
    return tuned_groups(model)


# ---------------------------------------------------------------------------------------------
# Weights of other projects

def import_weights(module, state, table, ignored, source):
    """Load `state`, a state dict in another project's names, into `module`.

    table: [(regular expression of their name, our name), ...]; the first match counts.
    ignored: a regular expression of keys that are known and not wanted.
    source: what to call the state in an error.
    Raises InputError for the weights of another architecture; else for keys that are missing,
    unexpected or of another shape, by their names.
    """
    wanted = module.state_dict()
    renamed = {}
    unexpected = []
    for key, value in state.items():
        name = our_name(key, table)
        if name is None:
            if not re.match(ignored, key):
                unexpected.append(key)
        elif ".q,k,v." in name:
            # The rows of a packed in-projection are those of q, k and v, in this order.
            for part, rows in zip("qkv", value.chunk(3)):
                renamed[name.replace("q,k,v", part)] = rows
        else:
            renamed[name] = value

    refuse_architecture(source, renamed, wanted)
    unexpected += [name for name in renamed if name not in wanted]
    missing = [name for name in wanted if name not in renamed]
    reshaped = []
    for name, value in wanted.items():
        if name in renamed and renamed[name].shape != value.shape:
            reshaped.append(f"{name} is {list(renamed[name].shape)}, {list(value.shape)} is needed")
    refuse_keys(source, "missing", missing)
    refuse_keys(source, "unexpected", unexpected)
    refuse_keys(source, "of another shape", reshaped)
    module.load_state_dict(renamed)


def our_name(key, table):
    """Our name of another project's key, or None where the table has none."""
    for pattern, ours in table:
        if re.fullmatch(pattern, key):
            return re.sub(pattern, ours, key)
    return None


# What the shapes of weights say of an architecture: [(regular expression of our name, the dimension
# that says it, what it says), ...]
MEASURES = [
    (r"(.*)layers\.0\.norm1\.weight", 0, "width"),
    (r"(.*)layers\.0\.fc1\.weight", 0, "hidden width"),
    (r"(.*)patches\.weight", 2, "patch side"),
    (r"(.*)word\.weight", 0, "vocabulary"),
    (r"(.*)position(?:\.weight)?", 0, "positions")]
NUMBERED = r"(.*?)(layers|layer\d)\.(\d+)\..+"    # a layer of an encoder, a block of a ResNet


def architecture_of(state):
    """What the names and shapes of a state dict say of its architecture, {what: number}, such as
    {"text width": 512}, or {"width": 768} where names have no tower before them, as BERT's."""
    found = {}
    numbers = {}    # {what: the numbers of its layers or blocks}
    for name, value in state.items():
        match = re.fullmatch(NUMBERED, name)
        if match:
            what = match[2] if match[2] == "layers" else f"{match[2]} blocks"
            numbers.setdefault(match[1] + what, set()).add(match[3])
        for pattern, dimension, what in MEASURES:
            match = re.fullmatch(pattern, name)
            if match and value.dim() > dimension:
                found[match[1] + what] = value.shape[dimension]
    for what, those in numbers.items():
        found[what] = len(those)
    return {what.replace(".", " "): number for what, number in found.items()}


def refuse_architecture(source, state, wanted):
    """Raise InputError if a state dict in our names is that of another architecture than the one
    that is wanted, with what it has and what is needed in place of hundreds of keys."""
    if not any(name in wanted for name in state):
        raise InputError(f"{source}: the weights of another kind of model; none of them has a name "
                         f"that is needed here, such as {next(iter(wanted))}")
    there = architecture_of(state)
    needed = architecture_of(wanted)
    has = []
    needs = []
    for what, number in needed.items():
        if there.get(what, number) != number:
            has.append(f"{what} {there[what]}")
            needs.append(f"{what} {number}")
    if has:
        raise InputError(f"{source}: the weights of another architecture; they have "
                         f"{', '.join(has)}, and the model needs {', '.join(needs)}")


def refuse_keys(source, what, names):
    """Raise InputError with the first five of the names, if there are any."""
    if names:
        shown = ", ".join(names[:5])
        if len(names) > 5:
            shown += ", ..."
        raise InputError(f"{source}: {len(names)} keys {what}: {shown}")


def read_file(path):
    """All that is in a .safetensors, .pth or .bin file, on the CPU. No code in it is run."""
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):    # the flags of old scripts
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:                  # whatever a file may hold in place of weights
        raise InputError(f"{path}: not a file of weights ({str(error).splitlines()[0]})") from None


def read_state(path):
    """The state dict of a file."""
    return state_in(read_file(path), path)


def state_in(content, source):
    """The state dict in the content of a file: all of it, or its part named "model"."""
    state = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise InputError(f"{source}: not a file of weights (it holds no names)")
    return state


def merge_peft(state, source):
    """A state dict without PEFT's words in its names, and with its LoRA pairs merged: W + α/r B A.
    The files do not hold α. HiVG has α = 16 for r = 32; another rank is refused."""
    plain = {}
    for key, value in state.items():
        plain[re.sub(r"base_model\.model\.|base_layer\.|default\.", "", key)] = value
    for key in [key for key in plain if key.endswith(".lora_A.weight")]:
        name = key.removesuffix("lora_A.weight")
        if len(plain[key]) != 32:
            raise InputError(f"{source}: {key} has rank {len(plain[key])}; α is known for HiVG's "
                             f"rank 32 alone")
        for needed in (f"{name}weight", f"{name}lora_B.weight"):
            if needed not in plain:
                raise InputError(f"{source}: '{needed}' is missing")
        A = plain.pop(key)
        B = plain.pop(f"{name}lora_B.weight")
        plain[f"{name}weight"] = plain[f"{name}weight"] + 16 / 32 * B @ A
    return plain


PATIENCE = 10    # seconds until an address counts as dead; PyTorch would wait for minutes


def load_detr(vision, weights=None):
    """DETR R-50: the official file, or what --vision-weights names."""
    if weights is not None:
        load_hub(vision, weights, "--vision-weights", DETR_TABLE, DETR_IGNORED)
        return
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        state = torch.hub.load_state_dict_from_url(DETR_URL, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"cannot fetch {DETR_URL} ({error}): put the file into "
                         f"{torch.hub.get_dir()}/checkpoints, give --vision-weights FILE, or "
                         f"--weights random") from None
    finally:
        socket.setdefaulttimeout(before)
    import_weights(vision, state["model"], DETR_TABLE, DETR_IGNORED, DETR_URL)


def load_hub(module, weights, flag, table, ignored):
    """Load DETR, BERT or CLIP as transformers saves it, in float32. weights: a hub name, a folder
    or a file; from a file of HiVG's, only the CLIP is taken."""
    path = find_weights(weights, flag)
    state = {}
    for key, value in merge_peft(read_state(path), path).items():
        key = key.removeprefix("bert.")
        # The first BERT files call the weight and bias of a LayerNorm gamma and beta.
        key = re.sub("gamma$", "weight", key)
        key = re.sub("beta$", "bias", key)
        state[key] = value

    # A file of HiVG's has its CLIP under "clip.", with its bridges inside, as "cross_...".
    prefix = "clip." if any(key.startswith("clip.") for key in state) else ""
    other = [key for key in state if not key.startswith(prefix) or ".cross_" in key]
    if other:
        print(f"{path}: only its CLIP is taken, without {', '.join(other)}")
    taken = {}
    for key, value in state.items():
        if key not in other:
            taken[key.removeprefix(prefix)] = value
    import_weights(module, taken, table, ignored, f"{flag} {path}")


def find_weights(weights, flag):
    """The file behind a path, a folder or a hub name."""
    from transformers.utils import cached_file    # importing transformers takes seconds
    if Path(weights).is_file() or Path(weights).suffix in (".pth", ".pt"):
        return weights
    why = "no model.safetensors and no pytorch_model.bin there"
    offline = not may_ask_hub(weights)
    if offline and not Path(weights).is_dir():
        why = "the hub cannot be reached, and no copy of its files is on this machine"
    for name in ("model.safetensors", "pytorch_model.bin"):
        try:
            path = cached_file(weights, name, local_files_only=offline,
                               _raise_exceptions_for_missing_entries=False)
        except OSError as error:
            why = str(error).splitlines()[0]
            continue
        if path is not None:
            return path
    raise InputError(f"no {weights} as a folder or on the hub ({why}): give {flag} FOLDER, or "
                     f"--weights random")


# ---------------------------------------------------------------------------------------------
# Tables of other projects' names: [(regular expression of their name, our name), ...].
# The pattern of ignored keys follows each table.

NOTHING = r"(?!)"                               # matches no key

DETR_URL = "https://dl.fbaipublicfiles.com/detr/detr-r50-e632da11.pth"
DETR_LAYER = r"(?:transformer|model)\.encoder\.layers\.(\d+)\."
DETR_TABLE = [    # official DETR's and TransVG's names | transformers' names
    (r"(?:backbone\.0\.body|model\.backbone\.conv_encoder\.model)\.(.+)", r"backbone.\1"),
    (r"(?:input_proj|model\.input_projection)\.(.+)", r"projection.\1"),
    (DETR_LAYER + r"self_attn\.in_proj_(.+)", r"layers.\1.q,k,v.\2"),    # three linears packed
    (DETR_LAYER + r"self_attn\.(q|k|v|out)_proj\.(.+)", r"layers.\1.\2.\3"),
    (DETR_LAYER + r"(?:linear|fc)([12])\.(.+)", r"layers.\1.fc\2.\3"),
    (DETR_LAYER + r"(?:norm1|self_attn_layer_norm)\.(.+)", r"layers.\1.norm1.\2"),
    (DETR_LAYER + r"(?:norm2|final_layer_norm)\.(.+)", r"layers.\1.norm2.\2")]
DETR_IGNORED = (    # the decoder and its heads
    r"(transformer|model)\.decoder\.|class_embed\.|bbox_embed\.|query_embed\.|"
    r"model\.query_position_embeddings\.|class_labels_classifier\.|bbox_predictor\.")

BERT_TABLE = [    # transformers' BertModel
    (r"embeddings\.(word|position|token_type)_embeddings\.(.+)", r"\1.\2"),
    (r"embeddings\.LayerNorm\.(.+)", r"norm.\1"),
    (r"encoder\.layer\.(\d+)\.attention\.self\.(q|k|v)[a-z]+\.(.+)", r"layers.\1.\2.\3"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(.+)", r"layers.\1.out.\2"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.(.+)", r"layers.\1.norm1.\2"),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.(.+)", r"layers.\1.fc1.\2"),
    (r"encoder\.layer\.(\d+)\.output\.dense\.(.+)", r"layers.\1.fc2.\2"),
    (r"encoder\.layer\.(\d+)\.output\.LayerNorm\.(.+)", r"layers.\1.norm2.\2")]
BERT_IGNORED = r"cls\.|pooler\.|embeddings\.position_ids"    # pretraining heads; an old buffer

CLIP_LAYER = r"(text|vision)_model\.encoder\.layers\.(\d+)\."
CLIP_TABLE = [    # transformers' CLIPModel
    (CLIP_LAYER + r"self_attn\.(q|k|v|out)_proj\.(.+)", r"\1.layers.\2.\3.\4"),
    (CLIP_LAYER + r"(?:mlp\.|layer_)(fc|norm)([12])\.(.+)", r"\1.layers.\2.\3\4.\5"),
    (r"text_model\.embeddings\.token_embedding\.(.+)", r"text.word.\1"),
    (r"(text|vision)_model\.embeddings\.position_embedding\.weight", r"\1.position"),
    (r"vision_model\.embeddings\.class_embedding", r"vision.cls"),
    (r"vision_model\.embeddings\.patch_embedding\.(.+)", r"vision.patches.\1"),
    (r"vision_model\.pre_layrnorm\.(.+)", r"vision.pre_norm.\1"),    # their spelling
    (r"(text|vision)_model\.(?:final_layer_norm|post_layernorm)\.(.+)", r"\1.norm.\2"),
    (r"visual_projection\.(.+)", r"vision.projection.\1"),
    (r"text_projection\.(.+)", r"text.projection.\1"),
    (r"(logit_scale)", r"\1")]
CLIP_IGNORED = r".*\.position_ids"
