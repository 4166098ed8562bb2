"""The encoders, the grounding models of both papers on top of them, and where their weights come from.

    TransformerLayer              the one layer that every encoder here is a stack of, with its two ports
    VisionEncoder, TextEncoder    DETR's encoder and BERT                                 M²IST Section III-A a, b
    ClipVision, ClipText          CLIP's towers                                           HiVG Section 3.1
    GroundingEncoder              [REG], text and image tokens, the box head              both
    DetrBert, ClipGrounding       encoders and grounding encoder, with what a method plugs in
    import_weights, build_model   other people's checkpoints, checked key by key; all of it by method and size

Shapes: B batch, T text tokens, Nv vision tokens, N tokens of whichever, C a width. Padding masks are bool, True = padding;
layers count from 1; boxes are (cx, cy, w, h) in [0, 1]. Symbols (paper = here), M²IST: z_0 = images, f_v, f_l = Encoded.x,
C_p = dim of the GroundingEncoder; HiVG: f_v^i, f_l^i = Encoded.states[i - 1], W_mvp = vision_projection, H_g = dim.
"""
import argparse
import math
import os
import re
import sys
import zlib
from collections import OrderedDict, namedtuple
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file

import hilora
from adapters import ADAPTERS, BRIDGE_WEIGHTS, AdapterNetworks, CrossModalBridge, attend, quick_gelu
from losses import RegionText

class InputError(ValueError):
    """Something the user gave is wrong; the message names it and the way out. The command lines print it and exit 2."""

def run(main):
    """Run a command line: what is wrong with the input or a file is one line on stderr and exit status 2, never a traceback."""
    try:
        main()
    except (InputError, OSError) as error:      # a DataLoader's worker sends a whole traceback, whose last line is ours
        print(f"error: {str(error).rsplit('InputError: ', 1)[-1].strip()}", file=sys.stderr)
        sys.exit(2)

def save_whole(path, write):
    """Call write(a path beside `path`), then rename: killed at any time, what stood at `path` before still stands."""
    partial = Path(f"{path}.{os.getpid()}.partial")
    write(partial)
    partial.replace(path)

# --- One layer for every encoder -------------------------------------------------------------------------------------
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "quick_gelu": quick_gelu}        # DETR and grounding encoders, BERT, CLIP

class TransformerLayer(nn.Module):
    """Self-attention and a feed-forward, each added to the residual stream x.

        post-norm (DETR, BERT):  x = norm1(x + a),  a = attention(x);          x = norm2(x + g),  g = ffn(x)
        pre-norm (CLIP):         x = x + a,         a = attention(norm1(x));   x = x + g,         g = ffn(norm2(x))

    Its two ports are where a and g appear, before the residual. A side network reads them from what forward returns; an
    inserted module writes them: `plugs["attention"]` or `plugs["ffn"]` turns a sublayer's output into another, called as
    plug(output, x, context) with the residual stream x that entered the sublayer and the layer's context.
    x, position: (B, N, C). padding: (B, N), not with causal. Returns x, a, g, each (B, N, C)."""
    def __init__(self, dim, heads, hidden, activation="relu", pre_norm=False, dropout=0.0, ffn_dropout=0.0, eps=1e-5,
                 causal=False):
        super().__init__()
        self.heads, self.activation, self.pre_norm, self.causal = heads, ACTIVATIONS[activation], pre_norm, causal
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))     # apart, so that LoRA finds them
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.dropout, self.ffn_dropout = nn.Dropout(dropout), nn.Dropout(ffn_dropout)
        self.plugs = nn.ModuleDict()
        for linear in (self.q, self.k, self.v, self.out, self.fc1, self.fc2):
            nn.init.xavier_uniform_(linear.weight)      # Section IV-B a: Xavier for the V-L encoder
            nn.init.zeros_(linear.bias)

    def forward(self, x, padding=None, position=None, context=None):
        h = self.norm1(x) if self.pre_norm else x
        a = self.port("attention", self.attention(h, padding, position), x, context)
        x = x + self.dropout(a) if self.pre_norm else self.norm1(x + self.dropout(a))
        h = self.norm2(x) if self.pre_norm else x
        g = self.port("ffn", self.fc2(self.ffn_dropout(self.activation(self.fc1(h)))), x, context)
        return (x + self.dropout(g) if self.pre_norm else self.norm2(x + self.dropout(g))), a, g

    def port(self, name, out, x, context):
        return self.plugs[name](out, x, context) if name in self.plugs else out

    def attention(self, h, padding, position):
        placed = h if position is None else h + position      # of queries and keys, never of values
        dropout = self.dropout.p if self.training else 0.0
        return self.out(attend(self.q(placed), self.k(placed), self.v(h), self.heads, padding, dropout, self.causal))

    def attention_map(self, x, padding, position):
        """(B, N): how much the first token, [REG], looks at each token, the mean over the heads; for pictures."""
        placed = (self.norm1(x) if self.pre_norm else x) + position
        q, k = (linear(placed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in (self.q, self.k))
        scores = q[:, :, :1] @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        return scores.masked_fill(padding[:, None, None, :], float("-inf")).softmax(-1).mean(1)[:, 0]

# --- The encoders ----------------------------------------------------------------------------------------------------
# An encoded image or text: x (B, N, C), padding (B, N); x0 (B, N, C), what entered the layers; ports, [{"attention": a_1,
# "ffn": g_1}, ...], and states, [x_1, ...], what left each layer, shallow first; of CLIP the embedding (B, C) that it compares.
Encoded = namedtuple("Encoded", "x padding x0 ports states embedding", defaults=(None, (), (), None))

def stack(layers, *shape, **options):
    return nn.ModuleList(TransformerLayer(*shape, **options) for _ in range(layers))

def run_layers(layers, x, padding=None, position=None, context=None):
    x0, ports, states = x, [], []
    for layer in layers:
        x, a, g = layer(x, padding, position, context)
        ports.append({"attention": a, "ffn": g})
        states.append(x)
    return Encoded(x, padding, x0, ports, states)

def resnet50_body():
    """torchvision's ResNet-50 up to layer4: (B, 3, H, W) -> (B, 2048, H/32, W/32). Batch norm is frozen: buffers only."""
    net = torchvision.models.resnet50(weights=None, norm_layer=torchvision.ops.FrozenBatchNorm2d)
    return nn.Sequential(OrderedDict((n, m) for n, m in net.named_children() if n not in ("avgpool", "fc")))

class SmallStem(nn.Module):
    """The tiny size's stand-in for a ResNet: (B, 3, H, W) -> (B, width, H/8, W/8). The coordinates, in [-1, 1], are two
    more channels: a ResNet learns from its zero padding where a feature lies; two convolutions cannot."""
    def __init__(self, width):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.mix = nn.Conv2d(width + 2, width, 3, stride=2, padding=1)

    def forward(self, images):
        x = F.relu(self.patches(images))
        rows, columns = (torch.linspace(-1, 1, n, device=x.device, dtype=x.dtype) for n in x.shape[-2:])
        where = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).expand(len(x), -1, -1, -1)
        return F.relu(self.mix(torch.cat([x, where], dim=1)))

def sine_position(padding, dim):
    """DETR's 2-D sine positions (Carion et al., ECCV 2020): padding (B, H, W) -> (B, H*W, dim), half of dim for y, half
    for x. Counted over what is not padding and scaled to [0, 2π], so a picture's place in its square makes no difference."""
    real = ~padding
    y, x = real.cumsum(1, dtype=torch.float32), real.cumsum(2, dtype=torch.float32)             # (B, H, W), from 1
    y, x = y / (y[:, -1:, :] + 1e-6) * 2 * math.pi, x / (x[:, :, -1:] + 1e-6) * 2 * math.pi
    frequency = 10000 ** (2 * torch.arange(dim // 4, device=padding.device) / (dim // 2))       # (dim / 4,)
    angles = y[..., None] / frequency, x[..., None] / frequency                                 # (B, H, W, dim / 4)
    halves = [torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2) for angle in angles]  # sin, cos in turn
    return torch.cat(halves, dim=-1).flatten(1, 2)

class VisionEncoder(nn.Module):
    """DETR's encoder, M²IST Section III-A a. images (B, 3, S, S), padding (B, S, S) -> Encoded of Nv tokens."""
    def __init__(self, backbone, channels, dim, heads, hidden, layers, dropout):
        super().__init__()
        self.backbone, self.projection = backbone, nn.Conv2d(channels, dim, 1)
        self.layers = stack(layers, dim, heads, hidden, "relu", dropout=dropout, ffn_dropout=dropout)

    def forward(self, images, padding):
        z = self.projection(self.backbone(images))                                    # z', (B, C_v, H, W)
        padding = F.interpolate(padding[:, None].float(), size=z.shape[-2:])[:, 0].bool()     # nearest; (B, H, W)
        position = sine_position(padding, z.shape[1]).to(z.dtype)
        return run_layers(self.layers, z.flatten(2).transpose(1, 2), padding.flatten(1), position)

class TextEncoder(nn.Module):
    """BERT without its pooler, M²IST Section III-A b. tokens, padding: (B, T) -> Encoded of T tokens. Post-norm, GELU.
    Every token is of type 0, whose embedding BERT adds all the same; [D8] the released code has lost it."""
    def __init__(self, vocabulary, positions, dim, heads, hidden, layers, dropout):
        super().__init__()
        self.word, self.position, self.token_type = (nn.Embedding(count, dim) for count in (vocabulary, positions, 2))
        self.norm, self.dropout = nn.LayerNorm(dim, eps=1e-12), nn.Dropout(dropout)
        self.layers = stack(layers, dim, heads, hidden, "gelu", dropout=dropout, eps=1e-12)

    def forward(self, tokens, padding):
        x = self.word(tokens) + self.position.weight[:tokens.shape[1]] + self.token_type.weight[0]
        return run_layers(self.layers, self.dropout(self.norm(x)), padding)

class ClipVision(nn.Module):
    """CLIP's ViT, HiVG Section 3.1. images (B, 3, S, S), padding (B, S, S) -> Encoded of 1 + Nv tokens, [CLS] first.
    context: what the bridges in its layers, if any, are given. As in CLIP every patch is looked at, padded ones too."""
    def __init__(self, image_size, patch, dim, heads, hidden, layers, embedding):
        super().__init__()
        self.patches = nn.Conv2d(3, dim, patch, stride=patch, bias=False)
        self.cls = nn.Parameter(dim ** -0.5 * torch.randn(dim))
        # What is not loaded from CLIP starts from 2-D sines: where a patch lies must be in the tokens' values.
        sines = sine_position(torch.zeros(1, image_size // patch, image_size // patch, dtype=torch.bool), dim)[0]
        self.position = nn.Parameter(F.pad(sines, (0, 0, 1, 0)))
        self.pre_norm, self.norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.layers = stack(layers, dim, heads, hidden, "quick_gelu", pre_norm=True)
        self.projection = nn.Linear(dim, embedding, bias=False)

    def forward(self, images, padding, context=None):
        x = torch.cat([self.cls.expand(len(images), 1, -1), self.patches(images).flatten(2).transpose(1, 2)], dim=1)
        # [D30] A patch is padding if no pixel of it is of the picture; [CLS] never is.
        real = F.max_pool2d((~padding)[:, None].float(), self.patches.stride).flatten(1).bool()
        found = run_layers(self.layers, self.pre_norm(x + self.position), context=context)
        return found._replace(padding=F.pad(~real, (1, 0)), embedding=self.embed(found.x[:, 0]))

    def embed(self, x):                                     # (..., dim) -> (..., embedding): what CLIP makes of [CLS]
        return self.projection(self.norm(x))

class ClipText(nn.Module):
    """CLIP's text tower, HiVG Section 3.1. tokens, padding (B, T) -> Encoded, x after the final norm and the projection.
    Causal: no token sees what follows it, so padding, which is last, is seen by none."""
    def __init__(self, vocabulary, positions, dim, heads, hidden, layers, embedding):
        super().__init__()
        self.word = nn.Embedding(vocabulary, dim)
        self.position = nn.Parameter(0.25 * torch.randn(positions, dim))
        nn.init.normal_(self.word.weight, std=0.5)         # words and places are told apart before they are learned
        self.layers = stack(layers, dim, heads, hidden, "quick_gelu", pre_norm=True, causal=True)
        self.norm, self.projection = nn.LayerNorm(dim), nn.Linear(dim, embedding, bias=False)

    def forward(self, tokens, padding):
        found = run_layers(self.layers, self.word(tokens) + self.position[:tokens.shape[1]])
        x, eos = self.projection(self.norm(found.x)), (~padding).sum(1) - 1                  # [EOS] ends its text
        return found._replace(x=x, padding=padding, embedding=x[torch.arange(len(x), device=x.device), eos])

class Clip(nn.Module):
    """Both towers and the temperature, as pretrained together."""
    def __init__(self, vision, text):
        super().__init__()
        self.vision, self.text = vision, text
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))      # where CLIP's pretraining starts it

# --- Grounding -------------------------------------------------------------------------------------------------------
# What is found: boxes (B, 4) as (cx, cy, w, h) in [0, 1]; attention (B, Nv), how [REG] looks at the image, where asked for;
# what HiVG's constraints compare: scores and padding (B, Nv), in training; text, image (B, C) and temperature, CLIP's.
Grounding = namedtuple("Grounding", "boxes attention scores padding text image temperature", defaults=[None] * 6)

class GroundingEncoder(nn.Module):
    """The V-L encoder of M²IST (Section III-A c), the grounding encoder of HiVG (Section 3.1), and the box head.
    vision, text: Encoded, of widths vision_dim and text_dim, text of at most max_tokens tokens -> Grounding. The sequence
    is [REG], text, vision, or with `clip` [REG], [CLS], vision, text, HiVG Eq. (2), with learned positions in the queries
    and keys of every layer. region_hidden: width of the MLP of HiVG Eq. (12), if there is to be one."""
    def __init__(self, vision_dim, text_dim, vision_tokens, max_tokens, dim, heads, hidden, layers, dropout,
                 pre_norm=False, position_std=1.0, clip=False, region_hidden=None):
        super().__init__()
        self.max_tokens, self.clip = max_tokens, clip
        self.vision_projection = nn.Linear(vision_dim, dim)          # W_mvp of HiVG Eq. (1) [D28]
        self.text_projection = nn.Linear(text_dim, dim)
        self.reg = nn.Parameter(torch.randn(1, dim))
        self.position = nn.Parameter(position_std * torch.randn(1 + max_tokens + vision_tokens, dim))
        self.layers = stack(layers, dim, heads, hidden, "relu", pre_norm, dropout, dropout)
        self.norm = nn.LayerNorm(dim) if pre_norm else nn.Identity()       # post-norm layers end in one of their own
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 4))  # [D29]
        self.region = region_hidden and RegionText(dim, region_hidden)

    def sequence(self, vision, text):
        """(B, 1 + T + Nv, C), its padding, its positions, and where in it the picture's cells are."""
        reg, T, Nv = self.reg.expand(len(text.x), 1, -1), text.x.shape[1], vision.x.shape[1]
        parts = [(self.text_projection(text.x), text.padding), (self.vision_projection(vision.x), vision.padding)]
        if self.clip:      # text may be trimmed to the longest of its batch; every token keeps its position
            parts, position, cells = parts[::-1], self.position[:1 + Nv + T], slice(2, 1 + Nv)
        else:
            position, cells = torch.cat([self.position[:1 + T], self.position[1 + self.max_tokens:]]), slice(1 + T, None)
        x, padding = zip((reg, text.padding.new_zeros(len(reg), 1)), *parts)
        return torch.cat(x, 1), torch.cat(padding, 1), position, cells

    def forward(self, vision, text, attention=False):
        x, padding, position, cells = self.sequence(vision, text)
        for layer in self.layers[:-1]:
            x = layer(x, padding, position)[0]
        looks = self.layers[-1].attention_map(x, padding, position)[:, cells] if attention else None
        x = self.norm(self.layers[-1](x, padding, position)[0])
        found = Grounding(self.head(x[:, 0]).float().sigmoid(), looks)                  # the head reads [REG] alone
        if not self.region or not self.training:
            return found
        eos = x[torch.arange(len(x), device=x.device), vision.x.shape[1] + (~text.padding).sum(1)]   # [EOS] ends its text
        return found._replace(scores=self.region(eos, x[:, cells]), padding=padding[:, cells])

def trim(tokens, padding, limit):       # both (B, T), cut to `limit`; only padding may be cut
    if tokens.shape[1] > limit and not padding[:, limit:].all():
        raise ValueError(f"a text has more than max_tokens = {limit} tokens")
    return tokens[:, :limit], padding[:, :limit]

def chosen_layers(spec, name, count):
    """Layers that the size or the user chose of an encoder with `count`, each once; [] if the choice is the method's."""
    layers = spec[name] or []
    if not all(1 <= layer <= count for layer in layers) or len(set(layers)) < len(layers):
        raise InputError(f"--{name.replace('_', '-')} {' '.join(map(str, layers))}: must differ and lie in 1 .. {count}")
    return layers

class DetrBert(nn.Module):
    """Every method on DETR and BERT: encoders, what stands beside or in them, the grounding encoder. spec: from `architecture`.
    Encoders with nothing to train in them run under no_grad, and only those that are themselves trained leave eval mode:
    [D7] the released code leaves dropout on in frozen ones."""
    def __init__(self, vision, text, spec):
        super().__init__()
        dims = dict(vision_dim=spec["vision"]["dim"], text_dim=spec["text"]["dim"])
        self.tuned, self.insertion = spec["tune_encoders"], spec["insertion"]
        self.vision, self.text = (encoder.requires_grad_(self.tuned) for encoder in (vision, text))
        self.grounding = GroundingEncoder(**dims, vision_tokens=(spec["image_size"] // spec["stride"]) ** 2,
                                          max_tokens=spec["max_tokens"], **spec["grounding"])
        self.text_layers = chosen_layers(spec, "text_layers", spec["text"]["layers"])
        names = ("attention_port", "ffn_port", "bottleneck", "interaction_dim", "interaction_bottleneck", "scale", "residual")
        self.adapters = AdapterNetworks(**dims, layers=spec["vision"]["layers"], text_layers=self.text_layers,
                                        **{name: spec[name] for name in names})
        if self.insertion != "side":
            self.adapters.insert("vision", vision.layers, self.insertion)
            self.adapters.insert("text", text.layers, self.insertion)

    def train(self, mode=True):
        super().train(mode)
        for encoder in (self.vision, self.text):
            encoder.train(mode and self.tuned)
        return self

    def begin_stage(self, stage, stages, rank, alpha, deep_to_shallow=False):
        """LoRA, one stage or HiLoRA's, on q and v of the layers where adapters stand: "two pairs", Section IV-D f [D39]."""
        vision, text = list(self.vision.layers), [self.text.layers[layer - 1] for layer in self.text_layers]
        hilora.add_stage(vision[::-1] if deep_to_shallow else vision, stage, stages, rank, alpha, ("q", "v"))
        hilora.add_stage(text, stage, 1, rank, alpha, ("q", "v"))

    def encode_image(self, images, image_padding):
        """images (B, 3, S, S), image_padding (B, S, S) -> Encoded (B, Nv, C_v)."""
        return self._encode("vision", images, image_padding)

    def encode_text(self, tokens, token_padding):
        """tokens, token_padding (B, T) -> Encoded (B, T, C_l). T beyond max_tokens may hold nothing but padding."""
        return self._encode("text", *trim(tokens, token_padding, self.grounding.max_tokens))

    def _encode(self, modality, inputs, padding):
        encoder, side = getattr(self, modality), self.insertion == "side"
        inside = not side or any(p.requires_grad for p in encoder.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and inside):      # nothing in a frozen encoder is for a backward
            encoded = encoder(inputs, padding)
        x = encoded.x + self.adapters.side(modality, encoded.x0, encoded.ports) if side else encoded.x    # Section III-B b
        return Encoded(x, encoded.padding)

    def ground(self, vision, text, attention=False):
        return self.grounding(vision, text, attention)

    def forward(self, images, image_padding, tokens, token_padding, attention=False):
        return self.ground(self.encode_image(images, image_padding), self.encode_text(tokens, token_padding), attention)

class ClipGrounding(nn.Module):
    """Every method on CLIP, HiVG Section 3.1: the two towers, bridges within the vision tower, the grounding encoder.
    spec: from `architecture`. CLIP is frozen; what LoRA trains of it is for `begin_stage`. m, n of the paper: len(levels),
    the vision layers whose features are grounded, and len(text_layers), which the bridges see."""
    def __init__(self, clip, spec):
        super().__init__()
        vision, text = spec["vision"], spec["text"]
        self.clip = clip.requires_grad_(False)
        self.levels = chosen_layers(spec, "vision_layers", vision["layers"]) or [vision["layers"]]
        self.text_layers = chosen_layers(spec, "text_layers", text["layers"] + 1) or range(1, text["layers"] + 1)
        self.grounding = GroundingEncoder(
            len(self.levels) * vision["dim"], text["embedding"], 1 + (spec["image_size"] // spec["stride"]) ** 2,
            spec["max_tokens"], clip=True, region_hidden=spec["region_hidden"], **spec["grounding"])
        bridges, one_each = chosen_layers(spec, "bridge_layers", vision["layers"]), spec["layer_to_layer"]
        if one_each and len(bridges) != len(self.text_layers):
            raise InputError(f"--layer-to-layer: {len(bridges)} bridges need as many text layers, not {len(self.text_layers)}")
        for number, layer in enumerate(bridges):
            clip.vision.layers[layer - 1].plugs["attention"] = CrossModalBridge(
                vision["dim"], text["dim"], 1 if one_each else len(self.text_layers), spec["max_tokens"],
                0 if spec["no_cross_attention"] else vision["heads"], spec["bridge_weights"], number if one_each else None)

    def begin_stage(self, stage, stages, rank, alpha, deep_to_shallow=False):
        """HiLoRA's stage of the vision tower, in `stages` groups, and of the text tower, which is one (Section 4.1) and
        takes part in all [D34]: pairs on q, k, v and out [D25]."""
        vision = list(self.clip.vision.layers)
        hilora.add_stage(vision[::-1] if deep_to_shallow else vision, stage, stages, rank, alpha)
        hilora.add_stage(self.clip.text.layers, stage, 1, rank, alpha)

    def encode_text(self, tokens, token_padding):
        """tokens, token_padding (B, T) -> Encoded (B, T, H_g): the last layer, by CLIP's own projection."""
        return self.clip.text(*trim(tokens, token_padding, self.grounding.max_tokens))

    def encode_image(self, images, image_padding, text):
        """images (B, 3, S, S), image_padding (B, S, S), text from encode_text -> Encoded (B, 1 + Nv, m H_v)."""
        states = [*text.states, text.x]                  # the layer after the last: what the tower puts out, projected
        image = self.clip.vision(images, image_padding, ([states[i - 1] for i in self.text_layers], text.padding))
        return image._replace(x=torch.cat([image.states[level - 1] for level in self.levels], -1))    # HiVG Eq. (1)

    def ground(self, vision, text, attention=False):
        tau = (-self.clip.logit_scale).exp()                                                # τ of HiVG Eqs. (9) and (10)
        return self.grounding(vision, text, attention)._replace(text=text.embedding, image=vision.embedding, temperature=tau)

    def forward(self, images, image_padding, tokens, token_padding, attention=False):
        text = self.encode_text(tokens, token_padding)
        return self.ground(self.encode_image(images, image_padding, text), text, attention)

# --- Weights of others. A table is [(regular expression of their key, our key), ...]. --------------------------------
DETR_URL = "https://dl.fbaipublicfiles.com/detr/detr-r50-e632da11.pth"
DETR_TABLE = [                                                                # official DETR and TransVG's; transformers'
    (r"(?:backbone\.0\.body|model\.backbone\.conv_encoder\.model)\.(.+)", r"backbone.\1"),
    (r"(?:input_proj|model\.input_projection)\.(.+)", r"projection.\1"),
    (r"transformer\.encoder\.layers\.(\d+)\.self_attn\.in_proj_(.+)", r"layers.\1.q,k,v.\2"),    # three in one
    (r"(?:transformer|model)\.encoder\.layers\.(\d+)\.self_attn\.(q|k|v|out)_proj\.(.+)", r"layers.\1.\2.\3"),
    (r"(?:transformer|model)\.encoder\.layers\.(\d+)\.(?:linear|fc)([12])\.(.+)", r"layers.\1.fc\2.\3"),
    (r"(?:transformer|model)\.encoder\.layers\.(\d+)\.(?:norm1|self_attn_layer_norm)\.(.+)", r"layers.\1.norm1.\2"),
    (r"(?:transformer|model)\.encoder\.layers\.(\d+)\.(?:norm2|final_layer_norm)\.(.+)", r"layers.\1.norm2.\2")]
DETR_IGNORED = (r"(transformer|model)\.decoder\.|class_embed\.|bbox_embed\.|query_embed\.|model\.query_position_embeddings\.|"
                r"class_labels_classifier\.|bbox_predictor\.")                                # the decoder and its heads

BERT_TABLE = [                                                                             # transformers' BertModel
    (r"embeddings\.(word|position|token_type)_embeddings\.(.+)", r"\1.\2"),
    (r"embeddings\.LayerNorm\.(.+)", r"norm.\1"),
    (r"encoder\.layer\.(\d+)\.attention\.self\.(q|k|v)[a-z]+\.(.+)", r"layers.\1.\2.\3"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(.+)", r"layers.\1.out.\2"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.(.+)", r"layers.\1.norm1.\2"),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.(.+)", r"layers.\1.fc1.\2"),
    (r"encoder\.layer\.(\d+)\.output\.dense\.(.+)", r"layers.\1.fc2.\2"),
    (r"encoder\.layer\.(\d+)\.output\.LayerNorm\.(.+)", r"layers.\1.norm2.\2")]
BERT_IGNORED = r"cls\.|pooler\.|embeddings\.position_ids"             # heads of its pretraining; a buffer of old files

CLIP_TABLE = [                                                                             # transformers' CLIPModel
    (r"(text|vision)_model\.encoder\.layers\.(\d+)\.self_attn\.(q|k|v|out)_proj\.(.+)", r"\1.layers.\2.\3.\4"),
    (r"(text|vision)_model\.encoder\.layers\.(\d+)\.(?:mlp\.|layer_)(fc|norm)([12])\.(.+)", r"\1.layers.\2.\3\4.\5"),
    (r"text_model\.embeddings\.token_embedding\.(.+)", r"text.word.\1"),
    (r"(text|vision)_model\.embeddings\.position_embedding\.weight", r"\1.position"),
    (r"vision_model\.embeddings\.class_embedding", r"vision.cls"),
    (r"vision_model\.embeddings\.patch_embedding\.(.+)", r"vision.patches.\1"),
    (r"vision_model\.pre_layrnorm\.(.+)", r"vision.pre_norm.\1"),                           # their spelling
    (r"(text|vision)_model\.(?:final_layer_norm|post_layernorm)\.(.+)", r"\1.norm.\2"),
    (r"visual_projection\.(.+)", r"vision.projection.\1"),
    (r"text_projection\.(.+)", r"text.projection.\1"),
    (r"(logit_scale)", r"\1")]
CLIP_IGNORED = r".*\.position_ids"

def import_weights(module, state, table, ignored, source):
    """Load `state`, a dict in another project's names, into `module`. ignored: a pattern of keys known and not wanted.
    source: what to call the state in an error. Raises InputError that names keys missing, unexpected or of another shape."""
    wanted, found, unexpected = module.state_dict(), {}, []
    for key, value in state.items():
        name = next((re.sub(pattern, ours, key) for pattern, ours in table if re.fullmatch(pattern, key)), "")
        if ".q,k,v." in name:                                         # rows of an in-projection are q, k, v in order
            found.update((name.replace("q,k,v", part), chunk) for part, chunk in zip("qkv", value.chunk(3)))
        elif name:
            found[name] = value
        elif not re.match(ignored, key):
            unexpected.append(key)
    unexpected += [name for name in found if name not in wanted]
    missing = [name for name in wanted if name not in found]
    reshaped = [f"{name} is {list(found[name].shape)}, {list(wanted[name].shape)} is needed"
                for name in wanted if name in found and found[name].shape != wanted[name].shape]
    for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped)):
        if names:
            raise InputError(f"{source}: {len(names)} keys {what}: {', '.join(names[:5])}{', ...' if names[5:] else ''}")
    module.load_state_dict(found)

def read_state(path, whole=False):
    """A .safetensors, .pth or .bin file -> its state dict, on the CPU, or all that stands beside it. No code in it is run."""
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):          # old training scripts save their flags
            file = torch.load(path, map_location="cpu", weights_only=True)
        state = file.get("model", file)
        "".join(state.keys())                                                 # an error, unless all in it goes by name
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:
        raise InputError(f"{path}: not a file of weights ({str(error).splitlines()[0]})") from None
    return file if whole else state

def plain(state, source):
    """A state dict without PEFT in its names, and its pairs merged, W + α/r B A; α/r is HiVG's 16/32, which no file says."""
    state = {re.sub(r"base_model\.model\.|base_layer\.|default\.", "", key): value for key, value in state.items()}
    for key in [key for key in state if key.endswith(".lora_A.weight")]:
        name = key.removesuffix("lora_A.weight")
        if len(state[key]) != 32:
            raise InputError(f"{source}: {key} is of rank {len(state[key])}; of HiVG's 32 alone it is known what α is")
        try:
            state[f"{name}weight"] = state[f"{name}weight"] + 16 / 32 * state.pop(f"{name}lora_B.weight") @ state.pop(key)
        except KeyError as missing:
            raise InputError(f"{source}: {missing} is missing") from None
    return state

def load_detr(vision, weights=None):
    """DETR R-50: as its authors keep it, or what load_hub takes, a file in their naming too."""
    if weights:
        return load_hub(vision, weights, "--vision-weights", DETR_TABLE, DETR_IGNORED)
    try:
        state = torch.hub.load_state_dict_from_url(DETR_URL, map_location="cpu", weights_only=True)["model"]
    except OSError as error:
        raise InputError(f"cannot fetch {DETR_URL} ({error}): give --vision-weights FILE, or --weights random") from None
    import_weights(vision, state, DETR_TABLE, DETR_IGNORED, DETR_URL)

def load_hub(module, weights, flag, table, ignored):
    """DETR, BERT or CLIP, in float32, as transformers saves it: a hub name, folder or file; of a file of HiVG's, its CLIP."""
    from transformers.utils import cached_file
    why = "no model.safetensors and no pytorch_model.bin there, or no connection to it"
    path = weights if Path(weights).is_file() or Path(weights).suffix in (".pth", ".pt") else None
    for name in ("model.safetensors", "pytorch_model.bin"):
        try:
            path = path or cached_file(weights, name, _raise_exceptions_for_missing_entries=False)
        except OSError as error:
            why = str(error).splitlines()[0]
    if path is None:
        raise InputError(f"no {weights} as a folder or on the hub ({why}): give {flag} FOLDER, or --weights random")
    state = {re.sub("gamma$", "weight", re.sub("beta$", "bias", key.removeprefix("bert."))): value
             for key, value in plain(read_state(path), path).items()}     # gamma, beta: LayerNorm's in the first BERT files
    prefix = "clip." if any(key.startswith("clip.") for key in state) else ""
    if other := [key for key in state if not key.startswith(prefix) or ".cross_" in key]:
        print(f"{path}: its CLIP alone is taken, without {', '.join(other)}")
    state = {key.removeprefix(prefix): value for key, value in state.items() if key not in other}
    import_weights(module, state, table, ignored, path)

# --- Building a model ------------------------------------------------------------------------------------------------
SIZES = {       # size: family: everything about the architecture, and what options are where they are not given
    "base": {
        "detr": dict(           # M²IST Section III-A and IV-B; dropout and heads as released
            image_size=640, stride=32, max_tokens=20, text_layers=[7, 8, 9, 10, 11, 12],
            vision=dict(channels=2048, dim=256, heads=8, hidden=2048, layers=6, dropout=0.1),
            text=dict(vocabulary=30522, positions=512, dim=768, heads=12, hidden=3072, layers=12, dropout=0.1),
            grounding=dict(dim=256, heads=8, hidden=2048, layers=6, dropout=0.1),
            bottleneck=128, interaction_dim=256, interaction_bottleneck=128, text_weights="bert-base-uncased"),
        "clip": dict(           # HiVG Section 4.1 and Table 7 [D16]; the hidden widths of grounding and region as released
            image_size=224, stride=16, max_tokens=77, vision_layers=[1, 4, 8, 12], bridge_layers=[4, 8, 12],
            vision=dict(dim=768, heads=12, hidden=3072, layers=12, embedding=512),
            text=dict(vocabulary=49408, positions=77, dim=512, heads=8, hidden=2048, layers=12, embedding=512),
            grounding=dict(dim=512, heads=8, hidden=2048, layers=6, dropout=0.1, pre_norm=True), region_hidden=3072,
            clip_weights="openai/clip-vit-base-patch16")},      # [D31]
    "large": {"clip": dict(
        image_size=224, stride=14, max_tokens=77, vision_layers=[6, 12, 18, 24], bridge_layers=[6, 12, 18, 24],
        vision=dict(dim=1024, heads=16, hidden=4096, layers=24, embedding=768),
        text=dict(vocabulary=49408, positions=77, dim=768, heads=12, hidden=3072, layers=12, embedding=768),
        grounding=dict(dim=768, heads=8, hidden=2048, layers=6, dropout=0.1, pre_norm=True), region_hidden=3072,
        clip_weights="openai/clip-vit-large-patch14")},
    # Ours, small enough to learn `shapes` on two cores in minutes. Pre-norm, as HiVG's grounding encoder, and small
    # positions: with post-norm and N(0, 1) it takes several times as long to leave the mean box.
    "tiny": {
        "detr": dict(
            image_size=64, stride=8, max_tokens=20,
            vision=dict(channels=64, dim=64, heads=4, hidden=128, layers=2, dropout=0.0),
            text=dict(vocabulary=256, positions=32, dim=96, heads=4, hidden=192, layers=4, dropout=0.0),
            grounding=dict(dim=96, heads=6, hidden=192, layers=3, dropout=0.0, pre_norm=True, position_std=0.1),
            text_layers=[3, 4], bottleneck=32, interaction_dim=64, interaction_bottleneck=32, pretext_steps=800),
        "clip": dict(
            image_size=64, stride=8, max_tokens=20, vision_layers=[1, 2, 4, 6], bridge_layers=[2, 4, 6],
            vision=dict(dim=64, heads=4, hidden=128, layers=6, embedding=64),
            text=dict(vocabulary=256, positions=32, dim=64, heads=4, hidden=128, layers=3, embedding=64),
            grounding=dict(dim=96, heads=6, hidden=192, layers=3, dropout=0.0, pre_norm=True, position_std=0.1),
            region_hidden=96, pretext_steps=1200)}}

# What a method puts in or beside the encoders of its family; it may replace what the size says. Methods on DETR and BERT are
# what stands at the ports, by a name from ADAPTERS, and how (adapters.py); LoRA comes with its stage (train.py). [D39]
PORTS = dict(family="detr", tune_encoders=False, insertion="side", attention_port="none", ffn_port="none", scale=0.1)
METHODS = {
    "full": dict(PORTS, tune_encoders=True),                                                      # Table I [D10]
    "frozen": PORTS,                                                                              # Table V (a)
    "adapter": dict(PORTS, insertion="sequential", attention_port="ea", ffn_port="ea"),           # Houlsby et al., ICML 2019
    "lora": PORTS,                                                                                # Hu et al., ICLR 2022
    "adaptformer": dict(PORTS, insertion="parallel", ffn_port="ea"),                              # Chen et al., NeurIPS 2022
    "cm-adapter": dict(PORTS, insertion="sequential", attention_port="iea", ffn_port="iea"),      # Jiang et al., 2022
    "mrs-adapter": dict(PORTS, insertion="parallel", ffn_port="iea"),                             # Yuan et al., TGRS 2023
    "m2ist": dict(PORTS, attention_port="iea", ffn_port="ea"),                                    # Tables I and V (f)
    "m2ist+lora": dict(PORTS, attention_port="iea", ffn_port="ea"),                               # Table X
    "clip-frozen": dict(family="clip", vision_layers=[], bridge_layers=[], region_hidden=None),   # HiVG Fig. 4 (d), no LoRA
    "clip-lora": dict(family="clip", vision_layers=[], bridge_layers=[], region_hidden=None),     # ... with vanilla LoRA
    "hivg": dict(family="clip")}

# None: as the size or the method says; in HiVG no text_layers: all, no vision_layers: the last. See train.py --help.
OPTIONS = dict.fromkeys(
    "max_tokens attention_port ffn_port insertion bottleneck interaction_dim interaction_bottleneck scale text_layers "
    "vision_layers bridge_layers vision_weights text_weights clip_weights pretext_steps pixels region_hidden".split())
OPTIONS |= dict(residual=False, bridge_weights="nxLxH", no_cross_attention=False, layer_to_layer=False, cache=".cache")
CHOICES = dict(attention_port=("none", *ADAPTERS), ffn_port=("none", *ADAPTERS), bridge_weights=BRIDGE_WEIGHTS,
               insertion=("side", "sequential", "parallel"), pixels=("detr", "clip"))

def one_of(name, value, valid):
    if value not in valid:
        raise InputError(f"unknown {name} {value!r}: choose one of {', '.join(valid)}")

def architecture(method, size, weights=None, **options):
    """Everything a model is built from, by name: the size's part of SIZES, the method's row, the options that are given."""
    one_of("method", method, METHODS)
    family = METHODS[method]["family"]
    one_of(f"size of {method}", size, [name for name in SIZES if family in SIZES[name]])
    for name in options:
        one_of("option", name, OPTIONS)
    given = {name: value for name, value in options.items() if value is not None}
    for name in filter(CHOICES.get, given):
        one_of(name, given[name], CHOICES[name])
    return {**OPTIONS, **SIZES[size][family], **METHODS[method], **given}

def shapes_weights(cache, pretext_steps, family):
    """Path of the pretrained tiny encoders; another architecture or another length of pretraining is another file."""
    return Path(cache) / f"{family}-{pretext_steps}-{zlib.crc32(repr(SIZES['tiny'][family]).encode()):08x}.safetensors"

def build_encoders(spec):
    """{name: module} of an architecture: vision and text, or clip. The random weights are the same every time, seeded
    apart from everything else, so that a checkpoint of the tuned weights alone can be rebuilt."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if spec["family"] == "clip":
            return {"clip": Clip(ClipVision(spec["image_size"], spec["stride"], **spec["vision"]), ClipText(**spec["text"]))}
        backbone = resnet50_body() if spec["stride"] == 32 else SmallStem(spec["vision"]["channels"])
        return {"vision": VisionEncoder(backbone, **spec["vision"]), "text": TextEncoder(**spec["text"])}

def build_model(method, size="base", weights="pretrained", **options):
    """A grounding model; what its method, one of METHODS, does not tune has requires_grad False. size: base (the papers'),
    large (HiVG-L), tiny (for `shapes`). weights: pretrained, shapes (of tiny), random. options: see OPTIONS. Built under
    torch.device("meta") with random weights it costs no memory. Raises InputError for what is unknown, cannot be had or
    does not fit."""
    spec = architecture(method, size, **options)
    one_of(f"weights of size {size}", weights, ("shapes" if size == "tiny" else "pretrained", "random"))
    if spec["max_tokens"] > spec["text"]["positions"]:
        raise InputError(f"max_tokens is {spec['max_tokens']}; the text encoder of size {size} has "
                         f"{spec['text']['positions']} positions")
    encoders = build_encoders(spec)
    if weights == "shapes":
        path = shapes_weights(spec["cache"], spec["pretext_steps"], spec["family"])
        if not path.exists():
            raise InputError(f"{path}: the tiny encoders are not pretrained yet; `python train.py` does it")
        nn.ModuleDict(encoders).load_state_dict(load_file(path))
    elif weights == "pretrained" and "clip" in encoders:
        load_hub(encoders["clip"], spec["clip_weights"], "--clip-weights", CLIP_TABLE, CLIP_IGNORED)
    elif weights == "pretrained":
        load_detr(encoders["vision"], spec["vision_weights"])
        load_hub(encoders["text"], spec["text_weights"], "--text-weights", BERT_TABLE, BERT_IGNORED)
    try:
        return (ClipGrounding if spec["family"] == "clip" else DetrBert)(**encoders, spec=spec).train()
    except ValueError as error:                                      # widths or layers that do not go together
        raise InputError(error) from None

def count_parameters(model):
    """{"total", "trainable", "encoder_tunable"}: numbers of parameters, each tensor once. encoder_tunable: those trained in
    or beside the encoders, which is what M²IST's "Params." counts [D11], and, it seems, HiVG's "Update params." [D23]."""
    trainable, head = (sum(p.numel() for p in part.parameters() if p.requires_grad) for part in (model, model.grounding))
    return {"total": sum(p.numel() for p in model.parameters()), "trainable": trainable, "encoder_tunable": trainable - head}
