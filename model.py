"""The encoders, the grounding models of both papers, and the weights that they start from.

The file reads from the smallest part to the largest:

    TransformerLayer             the one layer of every encoder here, with its two ports
    VisionEncoder, TextEncoder   DETR's encoder and BERT                 M²IST Section III-A a, b
    ClipVision, ClipText         CLIP's two towers                       HiVG Section 3.1
    GroundingEncoder             [REG], text and image tokens, box head  M²IST III-A c, HiVG 3.1
    DetrBert, ClipGrounding      the two grounding models: encoders, a method's modules, grounding
    SIZES, METHODS               what can be built
    build_model                  a model from the names of a method and a size
    import_weights               third-party checkpoints, loaded strictly
    DETR_TABLE, ...              the tables of third-party names

Shapes
    B texts    P images (P = B, unless texts share an image)    S side of the padded square image
    T text tokens    Nv vision tokens    N tokens of either kind    C a width
Conventions
    Padding masks are bool and True means padding. Layers count from 1, as in the papers.
    Boxes are (cx, cy, w, h) in [0, 1] of the padded square image.
Symbols     paper                            here
    M²IST   z_0, the image                   images
            f_v, f_l, encoded tokens         Encoded.x
            C_p, width of the V-L encoder    GroundingEncoder's dim
    HiVG    f_v^l, output of layer l         Encoded.states[l - 1]
            f_v^i of Eq. (1), i = 1 .. m     that of layer levels[i - 1]
            f_l^i of Eq. (3), i = 1 .. n     that of layer text_layers[i - 1]
            W_mvp                            vision_projection
            H_g                              GroundingEncoder's dim

Tags such as [D7] mark where a line differs from a paper or from its released code;
assets/deviations.md says how.
"""
import argparse
import math
import re
import socket
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet50
from torchvision.ops import FrozenBatchNorm2d

import hilora
from adapters import AdapterNetworks, CrossModalBridge, attend, quick_gelu
from losses import RegionText


class ModelError(ValueError):
    """A model cannot be built as asked. The message names the flag or the file, and the way out."""


# --- One layer for every encoder ------------------------------------------------------------------

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
                 ffn_dropout=0.0, eps=1e-5, causal=False, packed_init=False):
        super().__init__()
        self.heads = heads
        self.activation = ACTIVATIONS[activation]
        self.pre_norm = pre_norm
        self.causal = causal
        # q, k, v and out are four linear layers, not one packed matrix, so that LoRA finds each.
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
        self.init_weights(packed_init)

    def init_weights(self, packed_init):
        """M²IST Section IV-B a: Xavier for the V-L encoder. Loaded weights replace it elsewhere.

        packed_init: initialise as nn.TransformerEncoderLayer does after Xavier, with q, k, v packed in
        one (3C, C) matrix. Xavier's deviation falls with the number of rows, so that q, k, v are
        smaller, by 1 / √2, than as matrices of their own [D45].
        """
        gain = 1 / math.sqrt(2) if packed_init else 1.0
        for linear in (self.q, self.k, self.v):
            nn.init.xavier_uniform_(linear.weight, gain)
            nn.init.zeros_(linear.bias)
        for linear in (self.out, self.fc1, self.fc2):
            nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(self.out.bias)
        if not packed_init:    # else the biases of the feed-forward network keep nn.Linear's start
            nn.init.zeros_(self.fc1.bias)
            nn.init.zeros_(self.fc2.bias)

    def forward(self, x, padding=None, position=None, context=None, num_queries=None):
        """x, position: (B, N, C). padding: (B, N), not together with causal. context: anything
        that the layer's inserted modules need. num_queries: compute the outputs of only the
        first num_queries tokens, which still attend to all N. Returns x, a, g, each (B, N, C), with
        num_queries in place of N where it is given."""
        h = self.norm1(x) if self.pre_norm else x
        a = self.attention(h, padding, position, num_queries)
        x = x[:, :num_queries]    # all tokens, where num_queries is None
        a = self.port("attention", a, x, context)
        x = x + self.dropout(a)
        if not self.pre_norm:
            x = self.norm1(x)

        h = self.norm2(x) if self.pre_norm else x
        # Dropout and ReLU may swap places. With dropout first, the backward pass needs one saved
        # activation less. Layers with another activation have no dropout here.
        g = self.fc2(self.activation(self.ffn_dropout(self.fc1(h))))
        g = self.port("ffn", g, x, context)
        x = x + self.dropout(g)
        if not self.pre_norm:
            x = self.norm2(x)
        return x, a, g

    def port(self, name, output, x, context):
        """The output of a sublayer, rewritten by the module at this port if there is one."""
        if name in self.plugs:
            output = self.plugs[name](output, x, context)
        return output

    def attention(self, h, padding, position, num_queries=None):
        with_pos = h if position is None else h + position    # for queries and keys, never values
        dropout = self.dropout.p if self.training else 0.0
        attended = attend(self.q(with_pos[:, :num_queries]), self.k(with_pos), self.v(h), self.heads,
                          padding, dropout, self.causal)
        return self.out(attended)

    def attention_map(self, x, padding, position):
        """How much the first token, [REG], attends to each token: (B, N), the mean over the heads.
        This is for figures and for the attention loss; the fused attention of `attention` does not
        return it."""
        h = self.norm1(x) if self.pre_norm else x
        with_pos = h + position
        q = self.q(with_pos[:, :1]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = self.k(with_pos).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, C')
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])             # (B, heads, 1, N)
        scores = scores.masked_fill(padding[:, None, None, :], float("-inf"))
        return scores.softmax(-1).mean(1)[:, 0]


# --- The encoders ---------------------------------------------------------------------------------

class Encoded(NamedTuple):
    """An encoded image or text."""
    x: Tensor                  # (B, N, C)  output tokens
    padding: Tensor            # (B, N)     True where a token is padding
    x0: Tensor = None          # (B, N, C)  tokens as they entered layer 1; s_0 of a side network
    ports: list = ()           # for each layer {"attention": a_l, "ffn": g_l}, before the residual
    states: list = ()          # for each layer x_l, its output; HiVG's f^l
    embedding: Tensor = None   # (B, C)     what CLIP compares: one vector an image or text


def make_layers(layers, *shape, **options):
    return nn.ModuleList(TransformerLayer(*shape, **options) for _ in range(layers))


def run_layers(layers, x, padding=None, position=None, context=None, checkpointing=False):
    """Send tokens x (B, N, C) through layers, and keep what side networks, bridges and levels read
    -> Encoded.
    checkpointing: save only the input of each layer for the backward pass, which then computes the
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


class FrozenBatchNorm(FrozenBatchNorm2d):
    """A batch norm whose statistics and scales are buffers, as in DETR: (P, C, H, W) -> the same.
    Unlike torchvision's it keeps the precision of x: under bf16 theirs makes float32 of it."""

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.to(x.dtype)[:, None, None] + shift.to(x.dtype)[:, None, None]


IMAGES_AT_ONCE = 8    # that a frozen backbone takes


class ResNetBody(nn.Sequential):
    """torchvision's ResNet-50 up to layer4: (P, 3, H, W) -> (P, 2048, H/32, W/32), under
    torchvision's names. As in DETR its batch norms are frozen: they are buffers."""

    def __init__(self):
        net = resnet50(weights=None, norm_layer=FrozenBatchNorm)
        body = OrderedDict(net.named_children())
        del body["avgpool"], body["fc"]
        super().__init__(body)
        # Convolutions are faster where the channels of a pixel lie side by side.
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        images = images.contiguous(memory_format=torch.channels_last)
        features = super().forward
        if torch.is_grad_enabled():
            return features(images)
        # Without gradients nothing is saved, and a few images at a time need little memory.
        return torch.cat([features(some) for some in images.split(IMAGES_AT_ONCE)])

    def freeze_shallow(self):
        """Freeze the stem and layer1, as DETR and TransVG do in full fine-tuning [D10]."""
        for part in (self.conv1, self.layer1):
            part.requires_grad_(False)

    def fold_batch_norms(self):
        """Move each batch norm, a scale and a shift, into the convolution before it where that is
        frozen, too: one pass over the features then does both. Call this when the weights are in
        place."""
        names = [("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("0", "1")]    # 0: downsample
        for module in list(self.modules()):
            for conv_name, norm_name in names:
                conv = getattr(module, conv_name, None)
                norm = getattr(module, norm_name, None)
                if not isinstance(conv, nn.Conv2d) or conv.weight.requires_grad:
                    continue
                conv.weight, bias = fuse_conv_bn_weights(
                    conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps,
                    norm.weight, norm.bias)
                del conv.bias    # The shift stays a buffer, as it was.
                conv.register_buffer("bias", bias.data)
                setattr(module, norm_name, nn.Identity())


class SmallStem(nn.Module):
    """The tiny size's stand-in for a ResNet: (P, 3, H, W) -> (P, width, H/8, W/8).
    Two extra channels hold the coordinates, in [-1, 1]. A ResNet learns from its zero padding where
    a feature lies; two convolutions cannot."""

    def __init__(self, width):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.mix = nn.Conv2d(width + 2, width, 3, stride=2, padding=1)

    def forward(self, images):
        x = F.relu(self.patches(images))                                      # (P, width, H/4, W/4)
        rows = torch.linspace(-1, 1, x.shape[-2], device=x.device, dtype=x.dtype)
        columns = torch.linspace(-1, 1, x.shape[-1], device=x.device, dtype=x.dtype)
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))      # (2, H/4, W/4)
        grid = grid.expand(len(x), -1, -1, -1)
        return F.relu(self.mix(torch.cat([x, grid], dim=1)))


def sine_position(padding, dim):
    """DETR's two-dimensional sine positions (Carion et al., ECCV 2020).
    padding: (P, H, W) -> (P, H*W, dim), where half of dim is for y and half for x. Positions count
    the cells that are not padding and are scaled to [0, 2π], so that the place of an image in its
    square makes no difference."""
    real = ~padding
    y = real.cumsum(1, dtype=torch.float32)                                   # (P, H, W), from 1
    x = real.cumsum(2, dtype=torch.float32)
    y = y / (y[:, -1:, :] + 1e-6) * 2 * math.pi
    x = x / (x[:, :, -1:] + 1e-6) * 2 * math.pi
    exponent = 2 * torch.arange(dim // 4, device=padding.device) / (dim // 2)
    frequency = 10000 ** exponent                                             # (dim / 4,)
    halves = []
    for coordinate in (y, x):
        angle = coordinate[..., None] / frequency                             # (P, H, W, dim / 4)
        waves = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)   # they alternate
        halves.append(waves)
    return torch.cat(halves, dim=-1).flatten(1, 2)


class VisionEncoder(nn.Module):
    """DETR's backbone and encoder, M²IST Section III-A a.
    images (P, 3, S, S), padding (P, S, S) -> Encoded with Nv tokens."""

    def __init__(self, backbone, channels, dim, heads, hidden, layers, dropout,
                 checkpointing=False):
        super().__init__()
        self.checkpointing = checkpointing
        self.backbone = backbone
        self.projection = nn.Conv2d(channels, dim, 1)
        self.layers = make_layers(layers, dim, heads, hidden, "relu", dropout=dropout,
                                  ffn_dropout=dropout)

    def forward(self, images, padding):
        z = self.projection(self.backbone(images))                            # z' (P, C_v, H, W)
        small = F.interpolate(padding[:, None].float(), size=z.shape[-2:])    # nearest
        padding = small[:, 0].bool()                                          # (P, H, W)
        position = sine_position(padding, z.shape[1]).to(z.dtype)
        tokens = z.flatten(2).transpose(1, 2)                                 # (P, Nv, C_v)
        return run_layers(self.layers, tokens, padding.flatten(1), position,
                          checkpointing=self.checkpointing)


class TextEncoder(nn.Module):
    """BERT without its pooler, M²IST Section III-A b: post-norm, GELU.
    tokens, padding: (B, T) -> Encoded with T tokens."""

    def __init__(self, vocabulary, positions, dim, heads, hidden, layers, dropout,
                 checkpointing=False):
        super().__init__()
        self.checkpointing = checkpointing
        self.word = nn.Embedding(vocabulary, dim)
        self.position = nn.Embedding(positions, dim)
        self.token_type = nn.Embedding(2, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.dropout = nn.Dropout(dropout)
        self.layers = make_layers(layers, dim, heads, hidden, "gelu", dropout=dropout, eps=1e-12)

    def forward(self, tokens, padding):
        # [D8] As BERT was pretrained: a text has tokens of type 0, whose embedding is added to each.
        # The released code leaves it out.
        x = self.word(tokens) + self.position.weight[:tokens.shape[1]] + self.token_type.weight[0]
        return run_layers(self.layers, self.dropout(self.norm(x)), padding,
                          checkpointing=self.checkpointing)


class ClipVision(nn.Module):
    """CLIP's vision transformer, HiVG Section 3.1.
    images (P, 3, S, S), padding (P, S, S) -> Encoded with 1 + Nv tokens, [CLS] first. context: what
    the bridges in the layers need, if there are any. image_index (B,): the row of each text's image;
    the layers below the first bridge, which see no text, then run once for each image. As in CLIP,
    attention reaches every patch, padded patches too; the padding mask is for the grounding
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
        self.layers = make_layers(layers, dim, heads, hidden, "quick_gelu", pre_norm=True)
        self.projection = nn.Linear(dim, embedding, bias=False)

    def forward(self, images, padding, context=None, image_index=None):
        patches = self.patches(images).flatten(2).transpose(1, 2)             # (P, Nv, C)
        cls = self.cls.expand(len(images), 1, -1)
        x = torch.cat([cls, patches], dim=1)                                  # (P, 1 + Nv, C)
        x = self.pre_norm(x + self.position)
        padding = F.pad(self.patch_padding(padding), (1, 0))    # [CLS] is never padding

        first = self.first_bridge()
        below = run_layers(self.layers[:first], x, checkpointing=self.checkpointing)
        above = run_layers(self.layers[first:], expand_to_texts(below.x, image_index),
                           context=context, checkpointing=self.checkpointing)
        states = [expand_to_texts(state, image_index) for state in below.states] + above.states
        return Encoded(above.x, expand_to_texts(padding, image_index), states=states,
                       embedding=self.embed(above.x[:, 0]))

    def first_bridge(self):
        """The place in `layers` of the first one with a bridge; behind the last one if none has."""
        for place, layer in enumerate(self.layers):
            if len(layer.plugs) > 0:
                return place
        return len(self.layers)

    def patch_padding(self, padding):
        """Which patches count as padding. padding: (P, S, S) -> (P, Nv)."""
        padding = padding[:, None].float()
        if self.released_rules:
            # [D47] They resize the mask as an image, and round it.
            side = padding.shape[-1] // self.patches.stride[0]
            small = F.interpolate(padding, (side, side), mode="bilinear", antialias=True)
            return small.round().bool().flatten(1)
        share = F.avg_pool2d(padding, self.patches.stride)    # the padded share of each patch
        # [D30] A patch is padding if no pixel of it belongs to the image: an object at the edge
        # should be seen.
        return (share == 1).flatten(1)

    def embed(self, x):
        """CLIP's final norm and projection, made for [CLS]: (..., dim) -> (..., embedding)."""
        return self.projection(self.norm(x))


class ClipText(nn.Module):
    """CLIP's text tower, HiVG Section 3.1.
    tokens, padding: (B, T) -> Encoded, with x after the final norm and the projection. Attention is
    causal, so no token sees what follows it; padding comes last, so no token sees padding."""

    def __init__(self, vocabulary, positions, dim, heads, hidden, layers, embedding,
                 checkpointing=False):
        super().__init__()
        self.checkpointing = checkpointing
        self.word = nn.Embedding(vocabulary, dim)
        self.position = nn.Parameter(0.25 * torch.randn(positions, dim))
        # A tower that is not loaded from CLIP can tell words and places apart from its start.
        nn.init.normal_(self.word.weight, std=0.5)
        self.layers = make_layers(layers, dim, heads, hidden, "quick_gelu", pre_norm=True,
                                  causal=True)
        self.norm = nn.LayerNorm(dim)
        self.projection = nn.Linear(dim, embedding, bias=False)

    def forward(self, tokens, padding):
        x = self.word(tokens) + self.position[:tokens.shape[1]]
        encoded = run_layers(self.layers, x, checkpointing=self.checkpointing)
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


# --- The grounding encoder ------------------------------------------------------------------------

class Grounding(NamedTuple):
    """What a grounding model returns. The last five fields are for HiVG's constraints."""
    boxes: Tensor                # (B, 4)   (cx, cy, w, h) in [0, 1]
    attention: Tensor = None     # (B, Nv)  how much [REG] attends to the image, where asked for
    scores: Tensor = None        # (B, Nv)  HiVG Eq. (12) before its sigmoid, in training only
    padding: Tensor = None       # (B, Nv)  True where a cell of the image is padding
    text: Tensor = None          # (B, C)   CLIP's embedding of the text
    image: Tensor = None         # (B, C)   CLIP's embedding of the image
    temperature: Tensor = None   # ()       τ of HiVG Eqs. (9) and (10)


class GroundingEncoder(nn.Module):
    """The V-L encoder of M²IST (Section III-A c), the grounding encoder of HiVG (Section 3.1), and
    the box head of both.

    vision, text: Encoded, with widths vision_dim and text_dim and at most max_tokens text tokens.
    Returns a Grounding. With `clip` the vision tokens begin with [CLS] and come before the text, as
    in HiVG Eq. (2). region_hidden: the width of the MLP of HiVG Eq. (12); None: without it.
    """

    def __init__(self, vision_dim, text_dim, vision_tokens, max_tokens, dim, heads, hidden, layers,
                 dropout, pre_norm=False, position_std=1.0, packed_init=True, clip=False,
                 region_hidden=None, checkpointing=False):
        super().__init__()
        self.max_tokens = max_tokens
        self.clip = clip
        self.checkpointing = checkpointing
        # [D28] HiVG: W_mvp of Eq. (1), and a linear layer after CLIP's own projection of the text.
        # The released code has a second linear layer after W_mvp.
        self.vision_projection = nn.Linear(vision_dim, dim)
        self.text_projection = nn.Linear(text_dim, dim)
        self.reg = nn.Parameter(torch.randn(1, dim))
        tokens = 1 + max_tokens + vision_tokens
        self.position = nn.Parameter(position_std * torch.randn(tokens, dim))
        self.layers = make_layers(layers, dim, heads, hidden, "relu", pre_norm, dropout, dropout,
                                  packed_init=packed_init)
        # A post-norm layer ends in a norm of its own; a pre-norm stack needs a last one.
        self.norm = nn.LayerNorm(dim) if pre_norm else nn.Identity()
        # [D29] Three linear layers with a ReLU between them, and the sigmoid in forward. HiVG writes
        # a ReLU after the last one, too: a sigmoid after a ReLU is never below 1/2.
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(),
                                  nn.Linear(dim, 4))
        self.region = None
        if region_hidden is not None:
            self.region = RegionText(dim, region_hidden)

    def sequence(self, vision, text):
        """Join [REG], text and vision tokens -> tokens x (B, N, C), padding (B, N), position (N, C),
        and the slice of the sequence that holds the cells of the image, with N = 1 + T + Nv. A text
        may be trimmed to the longest of its batch; every token keeps the position that it has in a
        full sequence."""
        B, T = text.padding.shape
        V = vision.padding.shape[1]    # vision tokens: Nv cells, and with `clip` [CLS] before them
        reg = self.reg.expand(B, 1, -1)
        reg_padding = text.padding.new_zeros(B, 1)
        x_v = self.vision_projection(vision.x)    # HiVG Eq. (1), the product with W_mvp; M²IST's f'_v
        x_l = self.text_projection(text.x)        # HiVG's g_l; M²IST's f'_l
        if self.clip:
            # HiVG Eq. (2): [REG], [CLS], the cells of the image, the text.
            x = torch.cat([reg, x_v, x_l], dim=1)
            padding = torch.cat([reg_padding, vision.padding, text.padding], dim=1)
            position = self.position[:1 + V + T]
            cells = slice(2, 1 + V)                                           # after [REG], [CLS]
        else:
            # M²IST Section III-A c: [REG], the text, the cells of the image.
            x = torch.cat([reg, x_l, x_v], dim=1)
            padding = torch.cat([reg_padding, text.padding, vision.padding], dim=1)
            position = torch.cat([self.position[:1 + T], self.position[1 + self.max_tokens:]])
            cells = slice(1 + T, None)
        return x, padding, position, cells

    def forward(self, vision, text, attention=False):
        x, padding, position, cells = self.sequence(vision, text)
        x = run_layers(self.layers[:-1], x, padding, position, checkpointing=self.checkpointing).x
        last = self.layers[-1]
        attended = None
        if attention:
            attended = last.attention_map(x, padding, position)[:, cells]     # (B, Nv)
        # The box is read from [REG], the first token, so the last layer computes [REG] alone.
        # HiVG's region-text constraint reads nearly all tokens, so in its training all are computed.
        reads_regions = self.region is not None and self.training
        x, _, _ = last(x, padding, position, num_queries=None if reads_regions else 1)
        x = self.norm(x)

        reg = x[:, 0]                                                         # (B, C)
        boxes = self.head(reg).float().sigmoid()                              # (B, 4)
        grounding = Grounding(boxes, attended)
        if reads_regions:
            # HiVG Eq. (12) compares the token of [EOS], which ends the text, with every cell.
            # Before [EOS] are [REG], V vision tokens and the other words: 1 + V + (length - 1).
            eos = vision.padding.shape[1] + (~text.padding).sum(1)            # (B,) place of [EOS]
            t_eos = x[torch.arange(len(x), device=x.device), eos]             # (B, C)
            scores = self.region(t_eos, x[:, cells])                          # (B, Nv)
            grounding = grounding._replace(scores=scores, padding=padding[:, cells])
        return grounding


# --- The two grounding models ---------------------------------------------------------------------

# How an encoder's pretraining normalised its pixels: mean and standard deviation of red, green and
# blue, (2, 3, 1, 1).
PIXELS = {
    "detr": torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None],
    # [D22] CLIP's own; HiVG's released code takes ImageNet's, which are the line above.
    "clip": torch.tensor([[0.48145466, 0.4578275, 0.40821073],
                          [0.26862954, 0.26130258, 0.27577711]])[..., None, None]}


def normalise(images, padding, pixels):
    """uint8 images (P, 3, S, S) -> floats, with 0, the mean colour, where padding (P, S, S) is True.
    Floats are taken as normalised already. pixels: an entry of PIXELS, on the device of the images."""
    if images.dtype != torch.uint8:
        return images
    mean, std = pixels
    x = images.to(pixels.dtype).div_(255).sub_(mean).div_(std)
    return x.masked_fill_(padding[:, None], 0)


def expand_to_texts(x, image_index):
    """One row for each text, of what was computed once for each image.
    x: (P, ...), image_index: (B,) -> (B, ...). Where it is None, x is returned as it is."""
    return x if image_index is None else x[image_index]


class GroundingModel(nn.Module):
    """What both grounding models share: the interface, and the stages of LoRA.

        text = model.encode_text(tokens, token_padding)
        vision = model.encode_image(images, image_padding, text)
        grounding = model.ground(vision, text)

    spec: the dictionary from `make_spec`.
    """

    def __init__(self, spec):
        super().__init__()
        self.spec = spec
        self.carried = set()    # names of frozen weights that LoRA of earlier stages is merged into
        pixels = PIXELS[spec["pixels"] or spec["encoders"]]
        self.register_buffer("pixels", pixels.clone(), persistent=False)

    def forward(self, images, image_padding, tokens, token_padding, image_index=None,
                attention=False):
        """images (P, 3, S, S), image_padding (P, S, S), tokens and token_padding (B, T)
        -> Grounding. images: uint8, or floats that are normalised already. image_index (B,): the
        row of each text's image, where P images serve B texts; None: each text has its own, P = B.
        attention: whether to return [REG]'s attention as well."""
        text = self.encode_text(tokens, token_padding)
        vision = self.encode_image(images, image_padding, text, image_index)
        return self.ground(vision, text, attention)

    def trim(self, tokens, padding):
        """Cut tokens and padding, both (B, T), to max_tokens. Only padding may be cut off."""
        limit = self.spec["max_tokens"]
        if tokens.shape[1] > limit and not padding[:, limit:].all():
            raise ValueError(f"a text has more than max_tokens = {limit} tokens")
        return tokens[:, :limit], padding[:, :limit]

    def lora_stacks(self):
        """[(layers, G), ...]: the layers of each encoder that LoRA adapts, in the order of the stages,
        and G of HiVG Eq. (6). The text layers are one group, so every stage adapts all of them [D34];
        on DETR and BERT there is one stage [D39]."""
        vision, text = self.encoders()
        vision_layers = list(vision.layers)
        if self.spec["deep_to_shallow"]:
            vision_layers.reverse()
        return [(vision_layers, self.spec["stages"]), (list(text.layers), 1)]

    def begin_stage(self, stage):
        """Begin LoRA stage `stage`: put fresh factors, whose product is 0, on the layers that it
        trains. Stage 0 has none. First merge the stage before (hilora.merge), or load merged
        weights: factors that are still in place are dropped."""
        hilora.merge(self, discard=True)
        if stage == 0:
            return
        for layers, groups in self.lora_stacks():
            hilora.add_stage(layers, stage, groups, self.spec["rank"], self.spec["alpha"],
                             self.spec["lora_targets"])


class DetrBert(GroundingModel):
    """Every method on DETR and BERT: M²IST, full fine-tuning, and the methods of its Table I.

    On DETR and BERT a method is defined by the adapter at each port, by how the adapters are
    inserted, and by the linear layers that LoRA adapts (METHODS). Only encoders that are themselves
    tuned leave eval mode [D7]: a frozen feature should not be noisy.
    """

    def __init__(self, vision, text, spec):
        super().__init__(spec)
        self.tuned = spec["tune_encoders"]
        self.insertion = spec["insertion"]
        self.vision = vision.requires_grad_(self.tuned)
        self.text = text.requires_grad_(self.tuned)
        if isinstance(vision.backbone, ResNetBody):
            vision.backbone.freeze_shallow()
        vision_dim = spec["vision"]["dim"]
        text_dim = spec["text"]["dim"]
        self.grounding = GroundingEncoder(
            vision_dim, text_dim, vision_tokens=(spec["image_size"] // spec["stride"]) ** 2,
            max_tokens=spec["max_tokens"], checkpointing=spec["checkpointing"], **spec["grounding"])
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

    def encoders(self):
        return self.vision, self.text

    def train(self, mode=True):
        super().train(mode)
        self.vision.train(mode and self.tuned)    # [D7] the released code keeps their dropout on
        self.text.train(mode and self.tuned)
        return self

    def encode_image(self, images, image_padding, text=None, image_index=None):
        """images (P, 3, S, S), image_padding (P, S, S) -> Encoded, x (P, Nv, C_v), or (B, Nv, C_v)
        with image_index (B,). M²IST's vision encoder never sees the text: one encoded image serves
        any number of texts."""
        images = normalise(images, image_padding, self.pixels)
        encoded = self.encode("vision", self.vision, images, image_padding)
        return Encoded(expand_to_texts(encoded.x, image_index),
                       expand_to_texts(encoded.padding, image_index))

    def encode_text(self, tokens, token_padding):
        """tokens, token_padding (B, T) -> Encoded, x (B, T, C_l). Beyond max_tokens there may be
        nothing but padding."""
        tokens, token_padding = self.trim(tokens, token_padding)
        return self.encode("text", self.text, tokens, token_padding)

    def encode(self, modality, encoder, inputs, padding):
        # M²IST saves its memory here. Where nothing inside the encoder is trained, it runs without
        # autograd: no activation is saved, and the backward pass stops at the side network (the red
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
        --side-start paired, that of its first paired layer [D6]: the paper's "original tokens" may
        mean either. For vision, whose first layer is paired, the two are the same."""
        first = min(self.adapters.layers[modality])
        if self.spec["side_start"] == "paired" and first > 1:
            return encoded.states[first - 2]    # x_{first - 1}; states[0] is x_1
        return encoded.x0

    def ground(self, vision, text, attention=False):
        return self.grounding(vision, text, attention)


class ClipGrounding(GroundingModel):
    """Every method on CLIP, HiVG Section 3.1: the two towers, the bridges in the vision tower, the
    grounding encoder. CLIP is frozen but for LoRA.

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
            max_tokens=spec["max_tokens"], clip=True, checkpointing=spec["checkpointing"],
            region_hidden=spec["region_hidden"] if spec["region_text"] else None,
            **spec["grounding"])
        self.add_bridges(spec)

    def add_bridges(self, spec):
        """HiVG Section 3.2: a cross-modal bridge at the attention port of each bridge layer [D16]."""
        layers = checked_layers(spec, "bridge_layers", spec["vision"]["layers"])
        one_each = spec["layer_to_layer"]
        if one_each and len(layers) != len(self.text_layers):
            raise ModelError(f"layer_to_layer: {len(layers)} bridges need as many text layers, "
                             f"not {len(self.text_layers)}")
        heads = spec["vision"]["heads"] if spec["cross_attention"] else 0
        for number, layer in enumerate(layers):
            bridge = CrossModalBridge(
                spec["vision"]["dim"], spec["text"]["dim"],
                1 if one_each else len(self.text_layers), spec["max_tokens"], heads,
                spec["bridge_weights"], only=number if one_each else None)
            self.clip.vision.layers[layer - 1].plugs["attention"] = bridge

    def encoders(self):
        return self.clip.vision, self.clip.text

    def encode_text(self, tokens, token_padding):
        """tokens, token_padding (B, T) -> Encoded, x (B, T, H_g): the last layer's features after
        CLIP's own projection."""
        tokens, token_padding = self.trim(tokens, token_padding)
        if self.spec["released_rules"]:
            # [D47] Released checkpoints were trained on texts that the id 0 pads to max_tokens.
            missing = self.spec["max_tokens"] - tokens.shape[1]
            tokens = F.pad(tokens.masked_fill(token_padding, 0), (0, missing), value=0)
            token_padding = F.pad(token_padding, (0, missing), value=True)
        return self.clip.text(tokens, token_padding)

    def encode_image(self, images, image_padding, text=None, image_index=None):
        """images (P, 3, S, S), image_padding (P, S, S), text from encode_text, image_index (B,) or
        None -> Encoded, x (B, 1 + Nv, m H_v). The text is needed: the bridges let it into the
        vision tower."""
        if text is None:
            raise ValueError("the vision tower of CLIP needs the text, from encode_text, for its "
                             "bridges")
        states = [*text.states, text.x]
        seen = [states[layer - 1] for layer in self.text_layers]
        masked = text.padding    # the text tokens that the bridges do not see
        if self.spec["released_rules"]:
            masked = torch.zeros_like(text.padding)    # [D47] Their bridges see padding too.
        images = normalise(images, image_padding, self.pixels)
        vision = self.clip.vision(images, image_padding, (seen, masked), image_index)
        levels = [vision.states[level - 1] for level in self.levels]
        return vision._replace(x=torch.cat(levels, dim=-1))    # HiVG Eq. (1), the concatenation

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
        raise ModelError(f"--{name.replace('_', '-')} {given}: must differ and lie in 1 .. {count}")
    return layers


# --- What can be built: sizes, methods, options ---------------------------------------------------

# SIZES[encoders, size] holds the architecture, and the options that depend on it.
SIZES = {
    # M²IST Sections III-A and IV-B. Dropout, heads and the side of the image as in the released code.
    # [D54] Text layers 7-12 are best in Table VIII c, where Section IV-B b says "same indices".
    ("detr", "base"): dict(
        image_size=640, stride=32, max_tokens=20, backbone="resnet50",
        vision=dict(channels=2048, dim=256, heads=8, hidden=2048, layers=6, dropout=0.1),
        text=dict(vocabulary=30522, positions=512, dim=768, heads=12, hidden=3072, layers=12,
                  dropout=0.1),
        grounding=dict(dim=256, heads=8, hidden=2048, layers=6, dropout=0.1),
        text_layers=[7, 8, 9, 10, 11, 12], bottleneck=128, interaction_dim=256,
        interaction_bottleneck=128, rank=55, alpha=55.0, text_weights="bert-base-uncased"),
    # HiVG Section 4.1 and Table 7. Dropout, and the hidden widths of the grounding encoder and of the
    # region-text MLP, as in the released code. [D16] Bridges as in the paper; as released they are in
    # other layers. [D31] Plain CLIP: the paper's figures start from a CLIP adapted to detection.
    ("clip", "base"): dict(
        image_size=224, stride=16, max_tokens=77,
        vision=dict(dim=768, heads=12, hidden=3072, layers=12, embedding=512),
        text=dict(vocabulary=49408, positions=77, dim=512, heads=8, hidden=2048, layers=12,
                  embedding=512),
        grounding=dict(dim=512, heads=8, hidden=2048, layers=6, dropout=0.1, pre_norm=True),
        region_hidden=3072, vision_layers=[1, 4, 8, 12], bridge_layers=[4, 8, 12],
        stages=3, rank=32, alpha=16.0, clip_weights="openai/clip-vit-base-patch16"),
    ("clip", "large"): dict(
        image_size=224, stride=14, max_tokens=77,
        vision=dict(dim=1024, heads=16, hidden=4096, layers=24, embedding=768),
        text=dict(vocabulary=49408, positions=77, dim=768, heads=12, hidden=3072, layers=12,
                  embedding=768),
        grounding=dict(dim=768, heads=8, hidden=2048, layers=6, dropout=0.1, pre_norm=True),
        region_hidden=3072, vision_layers=[6, 12, 18, 24], bridge_layers=[6, 12, 18, 24],
        stages=4, rank=32, alpha=16.0, clip_weights="openai/clip-vit-large-patch14"),
    # Ours, small enough to learn `shapes` on two cores in minutes. The grounding encoder is
    # pre-norm, as HiVG's, with small positions: with post-norm and positions from N(0, 1) a run
    # takes several times as long to predict anything but the mean box. Attention starts wider [D45].
    ("detr", "tiny"): dict(
        image_size=64, stride=8, max_tokens=20, backbone="small stem",
        vision=dict(channels=64, dim=64, heads=4, hidden=128, layers=2, dropout=0.0),
        text=dict(vocabulary=256, positions=32, dim=96, heads=4, hidden=192, layers=4, dropout=0.0),
        grounding=dict(dim=96, heads=6, hidden=192, layers=3, dropout=0.0, pre_norm=True,
                       position_std=0.1, packed_init=False),
        text_layers=[3, 4], bottleneck=32, interaction_dim=64, interaction_bottleneck=32,
        rank=14, alpha=14.0),
    ("clip", "tiny"): dict(
        image_size=64, stride=8, max_tokens=20,
        vision=dict(dim=64, heads=4, hidden=128, layers=6, embedding=64),
        text=dict(vocabulary=256, positions=32, dim=64, heads=4, hidden=128, layers=3, embedding=64),
        grounding=dict(dim=96, heads=6, hidden=192, layers=3, dropout=0.0, pre_norm=True,
                       position_std=0.1, packed_init=False),
        region_hidden=96, vision_layers=[1, 2, 4, 6], bridge_layers=[2, 4, 6],
        stages=3, rank=32, alpha=16.0)}

# What all methods on the same encoders start from: encoders frozen, nothing at the ports, no LoRA on
# DETR and BERT; the whole of HiVG on CLIP. SIZES has more.
DEFAULTS = {
    "detr": dict(
        tune_encoders=False, insertion="side", attention_port="none", ffn_port="none", scale=0.1,
        residual=False, side_start="input", pixels=None, vision_weights=None, checkpointing=False,
        lora_targets=(), stages=0, first_stage=0, deep_to_shallow=False),
    "clip": dict(
        bridge_weights="nxLxH", cross_attention=True, layer_to_layer=False, text_layers=None,
        region_text=True, released_rules=False, pixels=None, checkpointing=False,
        lora_targets=("q", "k", "v", "out"),    # [D25] as released, also in the bridges
        first_stage=0, deep_to_shallow=False)}

# LoRA on DETR and BERT is one stage that lasts the whole training [D39]. build_model begins it at
# once, so that count_parameters includes its factors. On CLIP the stages follow a warm-up without
# LoRA, and the model of the warm-up is what build_model returns.
LORA = dict(lora_targets=("q", "v"), stages=1, first_stage=1)
# HiVG Fig. 4 (d), "original CLIP": features of the last layer, neither bridges nor the region-text
# constraint.
PLAIN_CLIP = dict(encoders="clip", vision_layers=None, bridge_layers=[], region_text=False)

# A method is one row: its encoders, and the options in which it differs from DEFAULTS. Where
# text_layers is None, all text layers have adapters.
METHODS = {
    "full": dict(encoders="detr", tune_encoders=True),                      # M²IST Table I [D10]
    "frozen": dict(encoders="detr"),                                        # Table V (a)
    # The methods that M²IST is compared with in Table I, by their sources [D39].
    "adapter": dict(encoders="detr", insertion="sequential",                # Houlsby, ICML 2019
                    attention_port="ea", ffn_port="ea", text_layers=None),
    "lora": dict(encoders="detr", **LORA),                                  # Hu, ICLR 2022
    "adaptformer": dict(encoders="detr", insertion="parallel",              # Chen, NeurIPS 2022
                        ffn_port="ea", text_layers=None),
    "cm-adapter": dict(encoders="detr", insertion="sequential",             # Jiang, 2022
                       attention_port="iea", ffn_port="iea"),
    "mrs-adapter": dict(encoders="detr", insertion="parallel", ffn_port="iea"),    # Yuan, TGRS 2023
    "m2ist": dict(encoders="detr", attention_port="iea", ffn_port="ea"),    # Tables I, V (f) [D11]
    "m2ist+lora": dict(encoders="detr", attention_port="iea", ffn_port="ea", **LORA),    # Table X
    "clip-frozen": dict(PLAIN_CLIP, lora_targets=(), stages=0),             # HiVG Fig. 4 (d)
    "clip-lora": dict(PLAIN_CLIP, stages=1),                                # ... with vanilla LoRA
    "hivg": dict(encoders="clip")}                                          # [D23]

# The options of build_model, by what a model must have to use them.
ANY_OPTIONS = ("max_tokens", "pixels", "checkpointing")
DETR_OPTIONS = ("image_size", "vision_weights", "text_weights", "attention_port", "ffn_port")
ADAPTER_OPTIONS = ("insertion", "bottleneck", "interaction_dim", "interaction_bottleneck", "scale",
                     "text_layers")
SIDE_NETWORK_OPTIONS = ("residual", "side_start")
CLIP_OPTIONS = ("clip_weights", "vision_layers", "bridge_layers", "region_text", "released_rules")
BRIDGE_OPTIONS = ("text_layers", "bridge_weights", "cross_attention", "layer_to_layer")
STAGE_OPTIONS = ("stages",)
LORA_OPTIONS = ("rank", "alpha", "deep_to_shallow")
OPTIONS = tuple(dict.fromkeys(ANY_OPTIONS + DETR_OPTIONS + ADAPTER_OPTIONS + SIDE_NETWORK_OPTIONS
                              + CLIP_OPTIONS + BRIDGE_OPTIONS + STAGE_OPTIONS + LORA_OPTIONS))


def used_options(spec):
    """The options that a model with this spec uses."""
    used = [*ANY_OPTIONS]
    if spec["encoders"] == "detr":
        used += DETR_OPTIONS
        if not spec["attention_port"] == spec["ffn_port"] == "none":
            used += ADAPTER_OPTIONS
            # An inserted adapter is always added to its port, so --residual is not for it.
            if spec["insertion"] == "side":
                used += SIDE_NETWORK_OPTIONS
    else:
        used += CLIP_OPTIONS
        if spec["bridge_layers"]:
            used += BRIDGE_OPTIONS
    if spec["lora_targets"]:
        used += STAGE_OPTIONS
        if spec["stages"]:
            used += LORA_OPTIONS
    return used


def one_of(what, value, valid):
    """Raise ModelError unless `value` is one of the valid values."""
    if value not in valid:
        raise ModelError(f"unknown {what} {value!r}: choose one of {', '.join(valid)}")


def make_spec(method, size, **options):
    """Everything that a model is built from, as one dictionary: the defaults, the size, the method's
    row, and the options that are given (None: not given), where a later one wins. Raises ModelError
    for what is unknown, or what the method does not use."""
    one_of("--method", method, METHODS)
    encoders = METHODS[method]["encoders"]
    one_of(f"--size for {method}", size, [name for kind, name in SIZES if kind == encoders])

    given = {name: value for name, value in options.items() if value is not None}
    spec = {**DEFAULTS[encoders], **SIZES[encoders, size], **METHODS[method], **given}
    used = used_options(spec)
    for name in given:
        one_of("option", name, OPTIONS)
        if name not in used:
            raise ModelError(f"--{name.replace('_', '-')} is not for --method {method} as it is here: "
                             f"leave it out")
    if spec["image_size"] % spec["stride"] > 0:
        raise ModelError(f"--image-size is {spec['image_size']}; it must be a multiple of "
                         f"{spec['stride']}")
    positions = spec["text"]["positions"]
    if spec["max_tokens"] > positions:
        raise ModelError(f"--max-tokens is {spec['max_tokens']}; the text encoder of size {size} "
                         f"has {positions} positions")
    if spec["stages"] > spec["vision"]["layers"]:
        raise ModelError(f"--stages is {spec['stages']}; there are {spec['vision']['layers']} layers "
                         f"to divide")
    for name, valid in (("pixels", PIXELS), ("insertion", ("side", "sequential", "parallel")),
                        ("side_start", ("input", "paired"))):
        if spec.get(name) is not None:
            one_of(f"--{name.replace('_', '-')}", spec[name], valid)
    return spec


# --- Building a model -----------------------------------------------------------------------------

ASSETS = Path(__file__).parent / "assets"
SHAPES_WEIGHTS = {                              # made by assets/pretrain_tiny.py
    "detr": ASSETS / "tiny-detr.safetensors",
    "clip": ASSETS / "tiny-clip.safetensors"}


def build_encoders(spec):
    """The encoders of a spec by name: vision and text, or clip. Random weights are drawn from a
    seed of their own, always the same, so that a checkpoint that holds only the tuned weights can
    be rebuilt."""
    checkpointing = spec["checkpointing"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if spec["encoders"] == "clip":
            vision = ClipVision(spec["image_size"], spec["stride"], **spec["vision"],
                                released_rules=spec["released_rules"], checkpointing=checkpointing)
            return {"clip": Clip(vision, ClipText(**spec["text"], checkpointing=checkpointing))}
        if spec["backbone"] == "resnet50":
            backbone = ResNetBody()
        else:
            backbone = SmallStem(spec["vision"]["channels"])
        vision = VisionEncoder(backbone, **spec["vision"], checkpointing=checkpointing)
        return {"vision": vision, "text": TextEncoder(**spec["text"], checkpointing=checkpointing)}


def load_encoders(encoders, spec, weights):
    """Load the weights of the encoders; random weights are there already."""
    if weights == "shapes":
        path = SHAPES_WEIGHTS[spec["encoders"]]
        import_weights(nn.ModuleDict(encoders), read_state(path), [("(.+)", r"\1")], NOTHING, path)
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
    options: see OPTIONS; None means not given.
    Under torch.device("meta") a model with random weights costs no memory. Raises ModelError for
    what is unknown, cannot be had or does not fit together.
    """
    spec = make_spec(method, size, **options)
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
        model.begin_stage(spec["first_stage"])
    except ModelError:
        raise
    except (ValueError, TypeError) as error:    # widths or layers that do not go together
        raise ModelError(f"{method}: {error}") from None
    for module in model.modules():
        if isinstance(module, ResNetBody):
            module.fold_batch_norms()
    return model.train()


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
        return f"LoRA on {'/'.join(spec['lora_targets'])} of {tower} layers", int(index) + 1
    return f"{tower} encoder", None


def what_trains(method, stage, size="base", **options):
    """What a method trains in a LoRA stage (0: the phase without LoRA), as tuned_groups gives it:
    what_trains("hivg", stage=2). Nothing is loaded and no memory is used."""
    with torch.device("meta"):
        model = build_model(method, size, "random", **options)
        last = model.spec["stages"]
        if not 0 <= stage <= last:
            raise ModelError(f"{method} has the stages 0 .. {last}, no stage {stage}")
        model.begin_stage(stage)
    return tuned_groups(model)


# --- Third-party weights --------------------------------------------------------------------------

def import_weights(module, state, table, ignored, source):
    """Load `state`, a state dict in third-party names, into `module`.

    table: [(regular expression of their name, our name), ...]; the first match counts.
    ignored: a regular expression of keys that are known and not wanted.
    source: what to call the state in an error.
    Raises ModelError for keys that are missing, unexpected or of another shape, by their names.
    """
    renamed = {}
    for key, value in state.items():
        name = our_name(key, table)
        if name is None:
            if not re.match(ignored, key):
                renamed[key] = value    # which strict loading then calls unexpected
        elif ".q,k,v." in name:
            # The rows of a packed in-projection are those of q, k and v, in this order.
            for part, rows in zip("qkv", value.chunk(3)):
                renamed[name.replace("q,k,v", part)] = rows
        else:
            renamed[name] = value
    try:
        module.load_state_dict(renamed)
    except RuntimeError as error:
        theirs, ours = next(iter(state), None), next(iter(module.state_dict()))
        raise ModelError(f"{source}: these weights do not fit (their first name is {theirs}, ours is "
                         f"{ours}): {shortened(error)}") from None


def our_name(key, table):
    """Our name of a third-party key, or None where the table has none."""
    for pattern, ours in table:
        if re.fullmatch(pattern, key):
            return re.sub(pattern, ours, key)
    return None


def shortened(error):
    """The message of a strict load_state_dict on one line: of hundreds of keys, the first ones."""
    lines = [line.strip() for line in str(error).splitlines()[1:]]
    parts = []
    for line in lines[:4]:
        parts.append(line if len(line) <= 200 else f"{line[:200]} ...")
    if len(lines) > 4:
        parts.append(f"and {len(lines) - 4} more of this kind")
    return "; ".join(parts)


def read_file(path):
    """All that is in a .safetensors, .pth or .bin file, on the CPU. No code in it is run."""
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):    # the flags of old scripts
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except Exception as error:                  # whatever a file may hold in place of weights
        raise ModelError(f"{path}: not a file of weights ({str(error).splitlines()[0]})") from None


def read_state(path):
    """The state dict of a file."""
    return state_in(read_file(path), path)


def state_in(content, source):
    """The state dict in the content of a file: all of it, or its part named "model", "state_dict" or
    "model_state_dict". Prefixes of DDP and of torch.compile are taken off."""
    state = content
    for name in ("model", "state_dict", "model_state_dict"):
        if isinstance(content, dict) and name in content:
            state = content[name]
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise ModelError(f"{source}: not a file of weights (it holds no names)")
    for prefix in ("module.", "_orig_mod.", "module."):
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def merge_peft(state, source):
    """A state dict without PEFT's words in its names, and with its LoRA merged: W + α/r B A.
    The files do not hold α. HiVG has α = 16 for r = 32; another rank is refused."""
    plain = {}
    for key, value in state.items():
        plain[re.sub(r"base_model\.model\.|base_layer\.|default\.", "", key)] = value
    for key in [key for key in plain if key.endswith(".lora_A.weight")]:
        name = key.removesuffix("lora_A.weight")
        if len(plain[key]) != 32:
            raise ModelError(f"{source}: {key} has rank {len(plain[key])}; α is known for HiVG's "
                             f"rank 32 alone")
        for needed in (f"{name}weight", f"{name}lora_B.weight"):
            if needed not in plain:
                raise ModelError(f"{source}: '{needed}' is missing")
        A = plain.pop(key)
        B = plain.pop(f"{name}lora_B.weight")
        plain[f"{name}weight"] = plain[f"{name}weight"] + 16 / 32 * B @ A
    return plain


TRY_WITHOUT = "To try the machinery alone, take --size tiny, or --weights random"


def load_detr(vision, weights=None):
    """DETR R-50: the official file, or what --vision-weights names."""
    if weights is not None:
        load_hub(vision, weights, "--vision-weights", DETR_TABLE, DETR_IGNORED)
        return
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)    # PyTorch would wait for minutes for an address that is dead
    try:
        state = torch.hub.load_state_dict_from_url(DETR_URL, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ModelError(f"cannot fetch {DETR_URL} ({error}): put the file into "
                         f"{torch.hub.get_dir()}/checkpoints, or give --vision-weights FILE. "
                         f"{TRY_WITHOUT}") from None
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
    for name in ("model.safetensors", "pytorch_model.bin"):
        try:
            path = cached_file(weights, name, _raise_exceptions_for_missing_entries=False)
        except OSError as error:
            why = str(error).splitlines()[0]
            continue
        if path is not None:
            return path
    raise ModelError(f"no {weights} as a folder or on the hub ({why}): give {flag} FOLDER. "
                     f"{TRY_WITHOUT}")


# --- Tables of third-party names: [(regular expression of their name, our name), ...] -------------
# The pattern of ignored keys follows each table.

NOTHING = r"(?!)"                               # matches no key

DETR_URL = "https://dl.fbaipublicfiles.com/detr/detr-r50-e632da11.pth"
DETR_LAYER = r"(?:transformer|model)\.encoder\.layers\.(\d+)\."
DETR_TABLE = [    # official DETR's and TransVG's names | transformers' names
    (r"(?:backbone\.0\.body|model\.backbone\.conv_encoder\.model)\.(.+)", r"backbone.\1"),
    (r"(?:input_proj|model\.input_projection)\.(.+)", r"projection.\1"),
    (DETR_LAYER + r"self_attn\.in_proj_(.+)", r"layers.\1.q,k,v.\2"),    # three linear layers packed
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
