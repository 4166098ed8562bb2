"""The encoders, the grounding model of M²IST on top of them, and where their weights come from.

    TransformerLayer      the one layer that every encoder here is a stack of, with its two ports
    VisionEncoder         DETR's encoder: ResNet-50, a 1x1 projection, 6 layers       M²IST Section III-A a
    TextEncoder           BERT: 12 layers                                             M²IST Section III-A b
    GroundingEncoder      the V-L encoder: [REG], 6 layers, the box head              M²IST Section III-A c
    DetrBert              the three together, with what a method plugs in             M²IST Section III-B
    import_weights        official DETR and BERT checkpoints, checked key by key
    build_model           all of it by method and size

Shapes: B batch, T text tokens, Nv vision tokens (20 x 20 for a 640 px image), N tokens of whichever, C a width.
Symbols (paper = here): z_0 = images   f_v, f_l = Tokens.x of the encoders   C_p = dim of the GroundingEncoder
Conventions: padding masks are bool, True = padding; layers count from 1; boxes are (cx, cy, w, h) in [0, 1].
"""
import argparse
import math
import re
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file
from torchvision.ops import FrozenBatchNorm2d

from adapters import SideNetworks


class InputError(ValueError):
    """Something the user gave is wrong; the message names it and the way out. The command lines print it and exit 2."""

    def __init__(self, message):
        # A DataLoader worker re-raises an error with its whole traceback as the message; the last line is ours.
        marker = f"{type(self).__name__}: "
        message = str(message)
        super().__init__(message.rsplit(marker, 1)[-1].strip() if "Traceback" in message else message)


# ---------------------------------------------------------------------------------------------------------------------
# One layer for every encoder

ACTIVATIONS = {
    "relu": F.relu,                                           # DETR, both grounding encoders
    "gelu": F.gelu,                                           # BERT
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),     # CLIP
}


class TransformerLayer(nn.Module):
    """Self-attention and a feed-forward, each added to the residual stream x.

        post-norm (DETR, BERT):  x = norm1(x + a),  a = attention(x);          x = norm2(x + g),  g = ffn(x)
        pre-norm (CLIP):         x = x + a,         a = attention(norm1(x));   x = x + g,         g = ffn(norm2(x))

    Its two ports are where a and g appear, before the residual. A side network reads them from what forward returns;
    an inserted module writes them: `plugs["attention"]` or `plugs["ffn"]`, called as plug(out, x, context) with the
    sublayer's output, the residual stream that entered the sublayer and the layer's context, gives the new output.

    x, position: (B, N, C). padding: (B, N). Returns x, a, g, each (B, N, C).
    """

    def __init__(self, dim, heads, hidden, activation="relu", pre_norm=False, dropout=0.0, ffn_dropout=0.0, eps=1e-5):
        super().__init__()
        self.heads, self.activation, self.pre_norm = heads, ACTIVATIONS[activation], pre_norm
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
        x = x + self.dropout(a)
        x = x if self.pre_norm else self.norm1(x)

        h = self.norm2(x) if self.pre_norm else x
        g = self.port("ffn", self.fc2(self.ffn_dropout(self.activation(self.fc1(h)))), x, context)
        x = x + self.dropout(g)
        x = x if self.pre_norm else self.norm2(x)
        return x, a, g

    def port(self, name, out, x, context):
        return self.plugs[name](out, x, context) if name in self.plugs else out

    def queries_keys(self, h, position):
        """(B, N, C) -> two (B, heads, N, C / heads). Positions, where there are any, are added here, never to values."""
        h = h if position is None else h + position
        return self.split(self.q(h)), self.split(self.k(h))

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)      # (B, N, C) -> (B, heads, N, C / heads)

    def attention(self, h, padding, position):
        q, k = self.queries_keys(h, position)
        mask = None if padding is None else ~padding[:, None, None, :]      # True = may be looked at; over the keys
        dropout = self.dropout.p if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, self.split(self.v(h)), attn_mask=mask, dropout_p=dropout)
        return self.out(out.transpose(1, 2).flatten(2))

    def attention_map(self, x, padding, position, query=0):
        """(B, N): how much token `query` looks at each token, the mean over the heads; for pictures."""
        q, k = self.queries_keys(self.norm1(x) if self.pre_norm else x, position)
        scores = q[:, :, query:query + 1] @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        if padding is not None:
            scores = scores.masked_fill(padding[:, None, None, :], float("-inf"))
        return scores.softmax(-1).mean(1)[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# The encoders

class Tokens(NamedTuple):
    """Encoded image or text: x (B, N, C) and padding (B, N)."""
    x: torch.Tensor
    padding: torch.Tensor


class Encoded(NamedTuple):
    """What an encoder gives to read: x0 (B, N, C), what entered its layers; ports, [(a_1, g_1), ...], one pair for each
    layer; x, what left the last layer; padding (B, N)."""
    x0: torch.Tensor
    ports: list
    x: torch.Tensor
    padding: torch.Tensor


def run_layers(layers, x, padding, position=None):
    x0, ports = x, []
    for layer in layers:
        x, a, g = layer(x, padding, position)
        ports.append((a, g))
    return Encoded(x0, ports, x, padding)


def resnet50_body():
    """torchvision's ResNet-50 up to layer4: (B, 3, H, W) -> (B, 2048, H/32, W/32). Batch norm is frozen: buffers only."""
    net = torchvision.models.resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
    return nn.Sequential(OrderedDict((n, m) for n, m in net.named_children() if n not in ("avgpool", "fc")))


class SmallStem(nn.Module):
    """The tiny size's stand-in for a ResNet: (B, 3, H, W) -> (B, width, H/8, W/8).

    A deep ResNet learns from its zero padding where in the picture a feature lies; two convolutions cannot, and DETR's
    layers add positions to queries and keys alone. So the coordinates, in [-1, 1], are two more channels.
    """

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
    """DETR's 2-D sine positions: padding (B, H, W) -> (B, H*W, dim), half of dim for y, half for x.

    Rows and columns are counted over what is not padding and scaled to [0, 2π], so where the picture lies in its
    square makes no difference. Source: Carion et al., ECCV 2020.
    """
    real = ~padding
    y, x = real.cumsum(1, dtype=torch.float32), real.cumsum(2, dtype=torch.float32)             # (B, H, W), from 1
    y, x = y / (y[:, -1:, :] + 1e-6) * 2 * math.pi, x / (x[:, :, -1:] + 1e-6) * 2 * math.pi
    frequency = 10000 ** (2 * torch.arange(dim // 4, device=padding.device) / (dim // 2))       # (dim / 4,)
    halves = []
    for angle in (y[..., None] / frequency, x[..., None] / frequency):                          # (B, H, W, dim / 4)
        halves.append(torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2))              # sin, cos in turn
    return torch.cat(halves, dim=-1).flatten(1, 2)


class VisionEncoder(nn.Module):
    """DETR's encoder, M²IST Section III-A a. images (B, 3, S, S), padding (B, S, S) -> Encoded of Nv tokens.

    The layers are post-norm with ReLU; positions are added to queries and keys in each of them; no norm at the end.
    """

    def __init__(self, backbone, channels, dim, heads, hidden, layers, dropout):
        super().__init__()
        self.backbone = backbone
        self.projection = nn.Conv2d(channels, dim, 1)
        self.layers = nn.ModuleList(TransformerLayer(dim, heads, hidden, "relu", dropout=dropout, ffn_dropout=dropout)
                                    for _ in range(layers))

    def forward(self, images, padding):
        z = self.projection(self.backbone(images))                                    # z', (B, C_v, H, W)
        padding = F.interpolate(padding[:, None].float(), size=z.shape[-2:])[:, 0].bool()     # nearest; (B, H, W)
        position = sine_position(padding, z.shape[1]).to(z.dtype)
        return run_layers(self.layers, z.flatten(2).transpose(1, 2), padding.flatten(1), position)


class TextEncoder(nn.Module):
    """BERT, M²IST Section III-A b. tokens, padding: (B, T) -> Encoded of T tokens. Post-norm, GELU.

    The pooler is left out: nothing here reads it. Every token is of type 0, whose embedding BERT adds all the same;
    [D8] the released code has lost it.
    """

    def __init__(self, vocabulary, positions, dim, heads, hidden, layers, dropout):
        super().__init__()
        self.word = nn.Embedding(vocabulary, dim)
        self.position = nn.Embedding(positions, dim)
        self.token_type = nn.Embedding(2, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(TransformerLayer(dim, heads, hidden, "gelu", dropout=dropout, eps=1e-12)
                                    for _ in range(layers))

    def forward(self, tokens, padding):
        x = self.word(tokens) + self.position.weight[:tokens.shape[1]] + self.token_type.weight[0]
        return run_layers(self.layers, self.dropout(self.norm(x)), padding)


# ---------------------------------------------------------------------------------------------------------------------
# Grounding

class Grounding(NamedTuple):
    """boxes (B, 4) as (cx, cy, w, h) in [0, 1]; attention (B, Nv), how [REG] looks at the image, where asked for."""
    boxes: torch.Tensor
    attention: Optional[torch.Tensor] = None


class GroundingEncoder(nn.Module):
    """The V-L encoder and its box head, M²IST Section III-A c.

    vision: Tokens of width vision_dim. text: Tokens of width text_dim, at most max_tokens of them. Returns Grounding.
    The sequence is [REG], text, vision; learned positions are added to queries and keys in every layer.
    """

    def __init__(self, vision_dim, text_dim, vision_tokens, max_tokens, dim, heads, hidden, layers, dropout,
                 pre_norm=False, position_std=1.0):
        super().__init__()
        self.max_tokens = max_tokens
        self.vision_projection = nn.Linear(vision_dim, dim)
        self.text_projection = nn.Linear(text_dim, dim)
        self.reg = nn.Parameter(torch.randn(1, dim))
        self.position = nn.Parameter(position_std * torch.randn(1 + max_tokens + vision_tokens, dim))
        self.layers = nn.ModuleList(TransformerLayer(dim, heads, hidden, "relu", pre_norm, dropout, dropout)
                                    for _ in range(layers))
        self.norm = nn.LayerNorm(dim) if pre_norm else nn.Identity()       # post-norm layers end in one of their own
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 4))

    def forward(self, vision, text, attention=False):
        reg = self.reg.expand(len(text.x), 1, -1)
        x = torch.cat([reg, self.text_projection(text.x), self.vision_projection(vision.x)], dim=1)    # (B, 1+T+Nv, C)
        padding = torch.cat([text.padding.new_zeros(len(x), 1), text.padding, vision.padding], dim=1)
        # Text may be trimmed to the longest of its batch; the vision positions stay where they are.
        position = torch.cat([self.position[:1 + text.x.shape[1]], self.position[1 + self.max_tokens:]])
        for layer in self.layers[:-1]:
            x = layer(x, padding, position)[0]
        looks = self.layers[-1].attention_map(x, padding, position)[:, 1 + text.x.shape[1]:] if attention else None
        x = self.layers[-1](x, padding, position)[0]
        return Grounding(self.head(self.norm(x[:, 0])).float().sigmoid(), looks)        # the head reads [REG] alone


class DetrBert(nn.Module):
    """Every method on DETR and BERT: the two encoders, what a method puts beside them, the grounding encoder.

    side: SideNetworks or None. The encoders run under no_grad, and in eval mode, unless a parameter of theirs is to
    be trained. [D7] The released code leaves dropout on in its frozen encoders.
    """

    def __init__(self, vision, text, grounding, side=None):
        super().__init__()
        self.vision, self.text, self.side, self.grounding = vision, text, side, grounding

    @property
    def frozen(self):
        return not any(p.requires_grad for encoder in (self.vision, self.text) for p in encoder.parameters())

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            self.vision.eval()
            self.text.eval()
        return self

    def encode_image(self, images, image_padding):
        """images (B, 3, S, S), image_padding (B, S, S) -> Tokens (B, Nv, C_v)."""
        return self._encode(self.vision, self.side and self.side.vision, images, image_padding)

    def encode_text(self, tokens, token_padding):
        """tokens, token_padding (B, T) -> Tokens (B, T, C_l). T beyond max_tokens may hold nothing but padding."""
        limit = self.grounding.max_tokens
        if tokens.shape[1] > limit:
            if not token_padding[:, limit:].all():
                raise ValueError(f"a text has more than max_tokens = {limit} tokens")
            tokens, token_padding = tokens[:, :limit], token_padding[:, :limit]
        return self._encode(self.text, self.side and self.side.text, tokens, token_padding)

    def _encode(self, encoder, side, inputs, padding):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):       # the memory that M²IST saves
            encoded = encoder(inputs, padding)
        x = encoded.x if side is None else encoded.x + side(encoded.x0, encoded.ports)    # Section III-B b
        return Tokens(x, encoded.padding)

    def ground(self, vision, text, attention=False):
        return self.grounding(vision, text, attention)

    def forward(self, images, image_padding, tokens, token_padding, attention=False):
        return self.ground(self.encode_image(images, image_padding), self.encode_text(tokens, token_padding), attention)


# ---------------------------------------------------------------------------------------------------------------------
# Weights of others. A table is [(regular expression of their key, our key), ...].

DETR_URL = "https://dl.fbaipublicfiles.com/detr/detr-r50-e632da11.pth"

DETR_TABLE = [                                            # official DETR, and TransVG's DETR without REC's test pictures
    (r"backbone\.0\.body\.(.+)", r"backbone.\1"),
    (r"input_proj\.(.+)", r"projection.\1"),
    (r"transformer\.encoder\.layers\.(\d+)\.self_attn\.in_proj_(.+)", r"layers.\1.q,k,v.\2"),    # three in one
    (r"transformer\.encoder\.layers\.(\d+)\.self_attn\.out_proj\.(.+)", r"layers.\1.out.\2"),
    (r"transformer\.encoder\.layers\.(\d+)\.linear([12])\.(.+)", r"layers.\1.fc\2.\3"),
    (r"transformer\.encoder\.layers\.(\d+)\.norm([12])\.(.+)", r"layers.\1.norm\2.\3"),
]
DETR_IGNORED = r"transformer\.decoder\.|class_embed\.|bbox_embed\.|query_embed\."          # the decoder and its heads

BERT_TABLE = [                                                                             # transformers' BertModel
    (r"embeddings\.word_embeddings\.(.+)", r"word.\1"),
    (r"embeddings\.position_embeddings\.(.+)", r"position.\1"),
    (r"embeddings\.token_type_embeddings\.(.+)", r"token_type.\1"),
    (r"embeddings\.LayerNorm\.(.+)", r"norm.\1"),
    (r"encoder\.layer\.(\d+)\.attention\.self\.(q|k|v)[a-z]+\.(.+)", r"layers.\1.\2.\3"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(.+)", r"layers.\1.out.\2"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.(.+)", r"layers.\1.norm1.\2"),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.(.+)", r"layers.\1.fc1.\2"),
    (r"encoder\.layer\.(\d+)\.output\.dense\.(.+)", r"layers.\1.fc2.\2"),
    (r"encoder\.layer\.(\d+)\.output\.LayerNorm\.(.+)", r"layers.\1.norm2.\2"),
]
BERT_IGNORED = r"cls\.|pooler\.|embeddings\.position_ids"             # heads of its pretraining; a buffer of old files


def rename(key, table):
    """Their key -> ours, or None where no row of the table fits."""
    for pattern, ours in table:
        if re.fullmatch(pattern, key):
            return re.sub(pattern, ours, key)
    return None


def import_weights(module, state, table, ignored, source):
    """Load `state`, a dict in another project's names, into `module`. Every key must be accounted for.

    ignored: a pattern of keys that are known and not wanted. source: what to call the state in an error.
    Raises InputError that names the keys which are missing, unexpected or of another shape.
    """
    wanted, found, unexpected = module.state_dict(), {}, []
    for key, value in state.items():
        name = rename(key, table)
        if name is not None and ".q,k,v." in name:                    # rows of an in-projection are q, k, v in order
            found.update((name.replace("q,k,v", part), chunk) for part, chunk in zip("qkv", value.chunk(3)))
        elif name is not None:
            found[name] = value
        elif not re.match(ignored, key):
            unexpected.append(key)
    unexpected += [name for name in found if name not in wanted]
    missing = [name for name in wanted if name not in found]
    reshaped = [f"{name} is {list(found[name].shape)}, {list(wanted[name].shape)} is needed"
                for name in wanted if name in found and found[name].shape != wanted[name].shape]
    for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise InputError(f"{source}: {len(names)} keys {what}: {', '.join(names[:5])}{more}")
    module.load_state_dict(found)


def read_state(path):
    """A .safetensors, .pth or .bin file -> its state dict, on the CPU. No code in the file is run."""
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):          # old training scripts save their flags
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:
        raise InputError(f"{path}: not a file of weights ({str(error).splitlines()[0]})") from None
    return state["model"] if "model" in state else state


def load_detr(vision, weights=None):
    """DETR R-50 in official naming, from a file, or from where its authors keep it."""
    if weights:
        state = read_state(weights)
    else:
        try:
            state = torch.hub.load_state_dict_from_url(DETR_URL, map_location="cpu", weights_only=True)["model"]
        except OSError as error:
            raise InputError(f"cannot fetch {DETR_URL} ({error}): give a file by --vision-weights, or take "
                             f"--weights random or --size tiny, which need none") from None
    import_weights(vision, state, DETR_TABLE, DETR_IGNORED, weights or DETR_URL)


def load_bert(text, weights):
    """BERT as transformers saves it: a hub name, or a folder."""
    from transformers.utils import cached_file
    path = None
    for name in ("model.safetensors", "pytorch_model.bin"):
        try:
            path = path or cached_file(weights, name, _raise_exceptions_for_missing_entries=False)
        except OSError as error:
            raise InputError(f"cannot find {weights} as a folder or on the hub ({str(error).splitlines()[0]}): give a "
                             f"folder by --text-weights, or take --weights random or --size tiny") from None
    if path is None:
        raise InputError(f"{weights}: no model.safetensors and no pytorch_model.bin in a folder of this name, nor on the hub "
                         f"(or no connection to it): give a folder by --text-weights, or take --weights random or --size tiny")
    names = {"gamma": "weight", "beta": "bias"}                # what the first BERT files call a LayerNorm's parameters
    state = {re.sub(r"(gamma|beta)$", lambda m: names[m[0]], key.removeprefix("bert.")): value
             for key, value in read_state(path).items()}
    import_weights(text, state, BERT_TABLE, BERT_IGNORED, path)


# ---------------------------------------------------------------------------------------------------------------------
# Building a model

SIZES = {
    # Section III-A and IV-B; dropout and heads as released.
    "base": dict(
        image_size=640, stride=32, max_tokens=20, text_layers=[7, 8, 9, 10, 11, 12],
        vision=dict(channels=2048, dim=256, heads=8, hidden=2048, layers=6, dropout=0.1),
        text=dict(vocabulary=30522, positions=512, dim=768, heads=12, hidden=3072, layers=12, dropout=0.1),
        grounding=dict(dim=256, heads=8, hidden=2048, layers=6, dropout=0.1),
        side=dict(bottleneck=128, interaction_dim=256, interaction_bottleneck=128)),
    # Ours: the same classes, small enough to learn `shapes` on two cores in minutes. Pre-norm, as HiVG's grounding
    # encoder, and small positions: with post-norm and N(0, 1) it takes several times as many steps to leave the mean box.
    "tiny": dict(
        image_size=64, stride=8, max_tokens=20, text_layers=[3, 4],
        vision=dict(channels=64, dim=64, heads=4, hidden=128, layers=2, dropout=0.0),
        text=dict(vocabulary=256, positions=32, dim=96, heads=4, hidden=192, layers=4, dropout=0.0),
        grounding=dict(dim=96, heads=6, hidden=192, layers=3, dropout=0.0, pre_norm=True, position_std=0.1),
        side=dict(bottleneck=32, interaction_dim=64, interaction_bottleneck=32)),
}

# A method says whether the encoders are trained and whether side networks stand beside them.
METHODS = {
    "full": dict(tune_encoders=True, side=False),       # Table I, full fine-tuning [D10]
    "frozen": dict(tune_encoders=False, side=False),    # Table V (a)
    "m2ist": dict(tune_encoders=False, side=True),      # Tables I and V (f)
}

# What a model may be built with, beside method, size and weights: name -> default (None: the size's own).
OPTIONS = dict(
    max_tokens=None,              # text tokens with [CLS] and [SEP]
    bottleneck=None,              # C_d of VEA and LEA (Table II)
    interaction_dim=None,         # C_i (Table IX)
    interaction_bottleneck=None,  # C_d of IEA
    scale=0.1,                    # s, Section IV-B b
    residual=False,               # adapters add their own input, [D4]
    text_layers=None,             # text layers paired with vision layers 1, 2, ... (Table VIII)
    vision_weights=None,          # a file of DETR's weights
    text_weights="bert-base-uncased",
    cache=".cache",               # where the tiny encoders pretrained on `shapes` are kept
    pretext_steps=800,            # how long they were pretrained
)


def one_of(name, value, valid):
    if value not in valid:
        raise InputError(f"unknown {name} {value!r}: choose one of {', '.join(valid)}")


def shapes_weights(cache, pretext_steps):
    """Path of the pretrained tiny encoders; another architecture or another length of pretraining is another file."""
    return Path(cache) / f"tiny-{pretext_steps}-{zlib.crc32(repr(SIZES['tiny']).encode()):08x}.safetensors"


def build_encoders(size):
    """(VisionEncoder, TextEncoder) of a size, with random weights that are the same every time.

    They are seeded apart from everything else, so that a checkpoint of the tuned weights alone can be rebuilt.
    """
    spec = SIZES[size]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = resnet50_body() if spec["stride"] == 32 else SmallStem(spec["vision"]["channels"])
        return VisionEncoder(backbone, **spec["vision"]), TextEncoder(**spec["text"])


def load_encoders(vision, text, size, weights, options):
    if weights == "pretrained":
        if size == "tiny":
            raise InputError("the tiny encoders have no published weights: take --weights shapes or random")
        load_detr(vision, options["vision_weights"])
        load_bert(text, options["text_weights"])
    elif weights == "shapes":
        if size != "tiny":
            raise InputError(f"--weights shapes are those of --size tiny; --size {size} takes pretrained or random")
        path = shapes_weights(options["cache"], options["pretext_steps"])
        if not path.exists():
            raise InputError(f"{path}: the tiny encoders are not pretrained yet; `python train.py` does it")
        state = load_file(path)
        for name, encoder in (("vision", vision), ("text", text)):
            encoder.load_state_dict({k.removeprefix(name + "."): v for k, v in state.items() if k.startswith(name)})


def build_side(spec, dims, options, choose):
    text_layers = choose("text_layers", spec["text_layers"])
    for layer in text_layers:
        if not 1 <= layer <= spec["text"]["layers"]:
            raise InputError(f"text layer {layer} of text_layers {text_layers} is none of 1 .. {spec['text']['layers']}")
    widths = {name: choose(name, default) for name, default in spec["side"].items()}
    try:
        return SideNetworks(**dims, layers=spec["vision"]["layers"], text_layers=text_layers, scale=options["scale"],
                            residual=options["residual"], **widths)
    except ValueError as error:
        raise InputError(error) from None


def build_model(method, size="base", weights="pretrained", **options):
    """A grounding model, ready to train: what a method does not tune has requires_grad False.

    method: one of METHODS. size: base (the paper's), tiny (for `shapes`). weights: pretrained | random | shapes.
    options: see OPTIONS. Built under torch.device("meta") with random weights it costs no memory.
    Raises InputError for anything unknown, and for weights that cannot be had or do not fit.
    """
    one_of("method", method, METHODS)
    one_of("size", size, SIZES)
    one_of("weights", weights, ("pretrained", "random", "shapes"))
    for name in options:
        one_of("option", name, OPTIONS)
    spec, plugged = SIZES[size], METHODS[method]
    options = {**OPTIONS, **options}
    choose = lambda name, default: default if options[name] is None else options[name]

    vision, text = build_encoders(size)
    load_encoders(vision, text, size, weights, options)
    dims = dict(vision_dim=spec["vision"]["dim"], text_dim=spec["text"]["dim"])
    max_tokens = choose("max_tokens", spec["max_tokens"])
    if max_tokens > spec["text"]["positions"]:
        raise InputError(f"max_tokens is {max_tokens}; the text encoder of size {size} has "
                         f"{spec['text']['positions']} positions")
    grounding = GroundingEncoder(**dims, vision_tokens=(spec["image_size"] // spec["stride"]) ** 2,
                                 max_tokens=max_tokens, **spec["grounding"])
    side = build_side(spec, dims, options, choose) if plugged["side"] else None
    for encoder in (vision, text):
        encoder.requires_grad_(plugged["tune_encoders"])
    return DetrBert(vision, text, grounding, side).train()


def count_parameters(model):
    """{"total", "trainable", "encoder_tunable"}: numbers of parameters, each tensor once.

    encoder_tunable: those trained in or beside the encoders, which is what the paper's "Params." counts [D11].
    """
    head = {id(p) for p in model.grounding.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    return {"total": sum(p.numel() for p in model.parameters()),
            "trainable": sum(p.numel() for p in trainable),
            "encoder_tunable": sum(p.numel() for p in trainable if id(p) not in head)}
