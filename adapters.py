"""What is plugged in beside or into frozen encoders. Imports torch alone.

    ExpertAdapter, InteractionAdapter, M3ISA, AdapterNetworks     M²IST Section III-B
    CrossModalBridge                                              HiVG Section 3.2

A frozen encoder layer has two ports: `a`, what its attention puts out, and `g`, what its feed-forward puts out, both
before they are added to the residual stream. A bridge and an inserted adapter write at them. A side network reads both and
never writes back, so that no gradient needs to pass the encoder:

      frozen encoder   x_0 ──[layer 1]──[layer 2]── ... ──[layer L]── x_out ──(+)──> f
                        │     │a_1 │g_1  │a_2 │g_2         │a_L │g_L           │
                        │    IEA   EA   IEA   EA          IEA   EA             │
                        └─────(+)──(+)───(+)──(+)── ... ───(+)──(+)── s_L ─────┘

Symbols (paper = here):   C_v, C_l = vision_dim, text_dim        C_d = bottleneck      s = scale
    C_i = interaction_dim   VEA, LEA = ExpertAdapter   IEA = InteractionAdapter   x_v, x_l = vision, text tokens
Shapes: B batch, N tokens of one modality, C its width. Everything is (B, N, C).
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

def init_adapter(module):
    """Kaiming normal weights (paper, Section IV-B a) and zero biases, of a linear; any other module is left as it is."""
    if isinstance(module, nn.Linear):
        nn.init.kaiming_normal_(module.weight)    # [D3] the released code ends up with three other inits
        nn.init.zeros_(module.bias)

class ExpertAdapter(nn.Module):
    """VEA or LEA, M²IST Eq. (1): a bottleneck that adapts the tokens of one modality, (B, N, C) -> (B, N, C).
    dim: width C of the tokens. bottleneck: C_d. scale: s. residual: add the input too, as Eq. (1) writes it."""
    def __init__(self, dim, bottleneck=128, scale=0.1, residual=False):
        super().__init__()
        self.norm = nn.LayerNorm(dim)          # "we do not show the LayerNorm for simplicity", Section III-B
        self.down = nn.Linear(dim, bottleneck)
        self.up = nn.Linear(bottleneck, dim)
        self.scale, self.residual = scale, residual
        self.apply(init_adapter)

    def forward(self, x):
        out = self.scale * self.up(F.relu(self.down(self.norm(x))))     # M²IST Eq. (1), the scaled term
        # [D4] Eq. (1) adds x itself; in a side network that would add the frozen encoder's output once more per
        # layer. The released code leaves it out, and so does this unless `residual` is set.
        return x + out if self.residual else out

class InteractionAdapter(nn.Module):
    """IEA, M²IST Eqs. (2)-(5): vision and text keep their own down-projections and share one up-projection.
    The shared tensor is all that vision and text have in common: a token's first look at the other modality is
    through weights that both train ("channel-level alignment"), never through the other's tokens. So an image is
    encoded once, however many expressions are asked of it.
    vision_dim, text_dim: C_v, C_l. bottleneck: C_d. interaction_dim: C_i <= min(C_v, C_l). residual: as Eqs. (4), (5).
    vision, text: (B, N, C_v), (B, N, C_l) -> the same shape. forward(x_v, x_l) -> both."""
    def __init__(self, vision_dim, text_dim, bottleneck=128, interaction_dim=256, scale=0.1, residual=False):
        super().__init__()
        if interaction_dim > min(vision_dim, text_dim):
            raise ValueError(f"interaction_dim (C_i) is {interaction_dim}, more than the narrower of the two encoders: "
                             f"C_v {vision_dim}, C_l {text_dim}")
        self.vision_down = nn.Linear(vision_dim, bottleneck)
        self.text_down = nn.Linear(text_dim, bottleneck)
        self.shared_up = nn.Linear(bottleneck, interaction_dim)     # one tensor for both modalities
        # The channels beyond C_i are each modality's own. At full size C_v = C_i, and vision has none.
        self.vision_up = nn.Linear(bottleneck, vision_dim - interaction_dim) if vision_dim > interaction_dim else None
        self.text_up = nn.Linear(bottleneck, text_dim - interaction_dim) if text_dim > interaction_dim else None
        self.scale, self.residual = scale, residual
        self.apply(init_adapter)

    def _adapt(self, x, down, own_up):
        z = F.relu(down(x))                                        # (B, N, C_d); the ReLU is in the text, not in Eq. (2)
        shared = self.shared_up(z)                                 # (B, N, C_i), the "interacted tokens" of Fig. 2
        f = shared if own_up is None else torch.cat([own_up(z), shared], dim=-1)     # M²IST Eqs. (2), (3)
        out = self.scale * f                                       # [D5] the released code forgets s here
        return x + out if self.residual else out                   # M²IST Eqs. (4), (5); [D4]

    def vision(self, x):
        return self._adapt(x, self.vision_down, self.vision_up)    # M²IST Eqs. (2), (4)

    def text(self, x):
        return self._adapt(x, self.text_down, self.text_up)        # M²IST Eqs. (3), (5)

    def forward(self, x_v, x_l):
        return self.vision(x_v), self.text(x_l)

class ExpertPair(nn.Module):
    """VEA and LEA, each for its own modality; where one is not among `parts`, its method is None and nothing stands there.
    vision, text: (B, N, C_v), (B, N, C_l) -> the same shape."""
    def __init__(self, vision_dim, text_dim, bottleneck=128, scale=0.1, residual=False, parts=("vision", "text")):
        super().__init__()
        if "vision" in parts:
            self.vea = ExpertAdapter(vision_dim, bottleneck, scale, residual)
        if "text" in parts:
            self.lea = ExpertAdapter(text_dim, bottleneck, scale, residual)
        vars(self).update({modality: None for modality in ("vision", "text") if modality not in parts})

    def vision(self, x):
        return self.vea(x)

    def text(self, x):
        return self.lea(x)

# What can stand at a port: name -> how it is made of (C_v, C_l) and the options of M3ISA. It has two methods, `vision` and
# `text`, each from tokens to what is added to them. A new adapter is a class like ExpertPair, and a row here.
ADAPTERS = {
    "iea": lambda d, o: InteractionAdapter(*d, o["interaction_bottleneck"], o["interaction_dim"], o["scale"], o["residual"]),
    "ea": lambda d, o: ExpertPair(*d, o["bottleneck"], o["scale"], o["residual"]),
    "vea": lambda d, o: ExpertPair(*d, o["bottleneck"], o["scale"], o["residual"], ("vision",)),             # Table V (c)
    "lea": lambda d, o: ExpertPair(*d, o["bottleneck"], o["scale"], o["residual"], ("text",))}               # Table V (b)

class M3ISA(nn.ModuleDict):
    """A mixture of adapters, for one vision layer and the text layer it is paired with (Fig. 2, right): {port: adapter}.
    The paper's has IEA at the attention ports, VEA and LEA at the feed-forward ports (Table VI d). attention_port,
    ffn_port: a name from ADAPTERS, or "none"."""
    def __init__(self, vision_dim, text_dim, attention_port="iea", ffn_port="ea", **options):
        options = dict(bottleneck=128, interaction_dim=256, interaction_bottleneck=128, scale=0.1, residual=False) | options
        super().__init__({port: ADAPTERS[kind]((vision_dim, text_dim), options)
                          for port, kind in (("attention", attention_port), ("ffn", ffn_port)) if kind != "none"})

class Inserted(nn.Module):
    """An adapter within an encoder, at a port of one of its layers: "sequential" reads what the port puts out, "parallel"
    what the sublayer was given. adapt: the bound method `vision` or `text`, so that its weights keep the one name they have."""
    def __init__(self, adapt, insertion):
        super().__init__()
        self.adapt, self.insertion = adapt, insertion

    def forward(self, out, x, context):
        return out + self.adapt(out if self.insertion == "sequential" else x)

class AdapterNetworks(nn.Module):
    """A stack of M³ISAs on a pair of encoders, and the three forms to insert it (Fig. 3, Table VII). M²IST's is `side`,
    Section III-B b, the two side networks:
        s_0 = x_0        s_l = s_{l-1} + IEA_l(a_l) + EA_l(g_l)        to be added to the encoder's output: s_L
    a_l and g_l are read before the residual and its LayerNorm. [D9] The released code reads text after them, and sends
    the adapters' output through BERT's own norms, which undo s. `sequential` and `parallel` write the ports instead.
    layers: how many pairs. text_layers: those paired with vision layers 1 .. layers, in that order; the paper's best is
    7-12 with 1-6 (Table VIII c; [D6] the released code pairs 1-6 with 1-6). options: those of M3ISA."""
    def __init__(self, vision_dim, text_dim, layers, text_layers, **options):
        super().__init__()
        if len(text_layers) != layers:
            raise ValueError(f"{layers} vision layers cannot be paired with text layers {list(text_layers)}")
        self.layers = {"vision": list(range(1, layers + 1)), "text": list(text_layers)}
        self.blocks = nn.ModuleList(M3ISA(vision_dim, text_dim, **options) for _ in range(layers))

    def standing(self, modality):
        """[(layer, {port: the method that adapts it}), ...], shallow first."""
        return [(layer, {port: getattr(adapter, modality) for port, adapter in block.items() if getattr(adapter, modality)})
                for layer, block in zip(self.layers[modality], self.blocks)]

    def side(self, modality, x0, ports):
        """x0: (B, N, C), what entered the encoder. ports: [{"attention": a_1, "ffn": g_1}, ...] of all layers. -> s_L like x0,
        or 0 where this modality has no adapter, and so no side network."""
        standing = self.standing(modality)
        s = x0 if any(adapts for _, adapts in standing) else 0
        for layer, adapts in standing:
            s = s + sum(adapt(ports[layer - 1][port]) for port, adapt in adapts.items())
        return s

    def insert(self, modality, layers, insertion):
        """Plug the adapters into an encoder's layers. [D38] They start as the identity, their last linear at 0."""
        for layer, adapts in self.standing(modality):
            for port, adapt in adapts.items():
                layers[layer - 1].plugs[port] = Inserted(adapt, insertion)
        for name, p in self.named_parameters():
            if name.endswith("up.weight"):
                nn.init.zeros_(p)

def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)

def attend(q, k, v, heads, padding, dropout=0.0, causal=False):
    """Multi-head attention: q (B, N, C); k, v (B, M, C) and their padding (B, M), or None -> (B, N, C)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))          # (B, heads, N, C / heads)
    mask = None if padding is None else ~padding[:, None, None, :]                       # True = may be looked at
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal).transpose(1, 2).flatten(2)

# A bridge's sample-agnostic weights, HiVG Table 4, by their shape of n, L_l and H_l; and what may stand in their place.
BRIDGE_WEIGHTS = ("nxLxH", "nxLx1", "nx1xH", "1x1xH", "none", "aware")

class CrossModalBridge(nn.Module):
    """MACB, HiVG Section 3.2 and Fig. 7: lets a layer of the vision encoder see the text, of all its layers at once.
    Stands at the attention port of a CLIP vision layer. Symbols (paper = here): n = text_layers, L_l <= max_tokens,
    H_v, H_l = vision_dim, text_dim, f_l^i = texts[i - 1], w_l = weights, W_proj = projection, f_v^sa = what `semantic`
    returns. heads: those of the cross-attention; 0 for none, where every token of the picture is given the mean of the
    text's (Table 4, line 2) [D40]. weights: a name from BRIDGE_WEIGHTS, "aware" for an MLP of the text in their place
    (Table 10, line 1) [D40]. only: the one of the context's texts that this bridge is given, from 0 (Table 4, line 7)."""
    def __init__(self, vision_dim, text_dim, text_layers, max_tokens, heads, weights="nxLxH", only=None):
        super().__init__()
        self.n, self.heads, self.only = text_layers, heads, only
        # [D13] One weight for each layer, place and channel, the same for all samples. 0 is "as CLIP has it"; the paper
        # names no start, and the released code's N(0, 1) hides the features at first.
        sizes = {"n": text_layers, "L": max_tokens, "H": text_dim, "1": 1}
        self.weights = nn.Parameter(torch.zeros([sizes[axis] for axis in weights.split("x")])) if "x" in weights else None
        self.aware = None
        if weights == "aware":
            self.aware = nn.Sequential(nn.Linear(text_dim, text_dim // 4), nn.ReLU(), nn.Linear(text_dim // 4, text_dim))
            nn.init.zeros_(self.aware[2].weight), nn.init.zeros_(self.aware[2].bias)
        self.projection = nn.Linear(text_layers * text_dim, vision_dim)
        if heads:
            self.norm = nn.LayerNorm(vision_dim)
            self.q, self.k, self.v, self.out = (nn.Linear(vision_dim, vision_dim) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(vision_dim, 4 * vision_dim), nn.Linear(4 * vision_dim, vision_dim)

    def select(self, texts):
        """n features (B, L_l, H_l) -> *f_l^ml (B, L_l, H_v)."""
        if self.weights is not None:
            by_layer = self.weights.expand(self.n, -1, -1)
            texts = [w[:f.shape[1]] * f + f for w, f in zip(by_layer, texts, strict=True)]          # HiVG Eq. (3)
        elif self.aware:
            texts = [self.aware(f) * f + f for f in texts]
        return self.projection(torch.cat(texts, dim=-1))                                            # HiVG Eq. (4)

    def semantic(self, vision, texts, padding):
        """vision (B, N, H_v), texts: n times (B, L_l, H_l), padding (B, L_l) -> f_v^sa (B, N, H_v)."""
        text = self.select(texts)
        if self.heads:
            # [D14] The released code views (L_l, B, H) as (B, heads, ...) here, so that a sample attends to its neighbours'
            # texts. [D15] Nor does it mask the padding.
            found = self.out(attend(self.q(self.norm(vision)), self.k(text), self.v(text), self.heads, padding))
        else:
            real = (~padding)[..., None].to(text.dtype)
            found = (text * real).sum(1, True) / real.sum(1, True)
        return self.fc2(quick_gelu(self.fc1(found)))

    def forward(self, out, x, context):
        """At the attention port: out = attention's output, x = what the layer was given, context = (texts, padding)."""
        texts, padding = context
        texts = texts if self.only is None else [texts[self.only]]
        return out + self.semantic(x + out, texts, padding)         # HiVG Section 3.2: "back to the block as residuals"
