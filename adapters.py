"""What is plugged in beside or into frozen encoders. Imports torch alone.

    ExpertAdapter, InteractionAdapter, M3ISA, SideNetworks     M²IST Section III-B
    CrossModalBridge                                           HiVG Section 3.2

A frozen encoder layer has two ports: `a`, what its attention puts out, and `g`, what its feed-forward puts out, both
before they are added to the residual stream. A bridge writes at the attention port. A side network reads both and never
writes back, so that no gradient needs to pass the encoder:

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
    """Kaiming normal weights (paper, Section IV-B a) and zero biases, for every linear in `module`."""
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            nn.init.kaiming_normal_(linear.weight)    # [D3] the released code ends up with three other inits
            nn.init.zeros_(linear.bias)

class ExpertAdapter(nn.Module):
    """VEA or LEA, M²IST Eq. (1): a bottleneck that adapts the tokens of one modality.

    dim: width C of the tokens. bottleneck: C_d. scale: s. residual: add the input too, as Eq. (1) writes it.
    forward: (B, N, C) -> (B, N, C)."""
    def __init__(self, dim, bottleneck=128, scale=0.1, residual=False):
        super().__init__()
        self.norm = nn.LayerNorm(dim)          # "we do not show the LayerNorm for simplicity", Section III-B
        self.down = nn.Linear(dim, bottleneck)
        self.up = nn.Linear(bottleneck, dim)
        self.scale, self.residual = scale, residual
        init_adapter(self)

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
        init_adapter(self)

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

class M3ISA(nn.Module):
    """One mixture of side-adapters, for one vision layer and the text layer it is paired with (Fig. 2, right).

    IEA stands at the attention ports, VEA and LEA at the feed-forward ports (Table VI d)."""
    def __init__(self, vision_dim, text_dim, bottleneck=128, interaction_dim=256, interaction_bottleneck=128,
                 scale=0.1, residual=False):
        super().__init__()
        self.iea = InteractionAdapter(vision_dim, text_dim, interaction_bottleneck, interaction_dim, scale, residual)
        self.vea = ExpertAdapter(vision_dim, bottleneck, scale, residual)
        self.lea = ExpertAdapter(text_dim, bottleneck, scale, residual)

    def vision(self, a, g):
        return self.iea.vision(a) + self.vea(g)

    def text(self, a, g):
        return self.iea.text(a) + self.lea(g)

class SideNetworks(nn.Module):
    """The two side networks of M²IST, Section III-B b: a stack of M³ISAs beside the vision and the text encoder.

        s_0 = x_0        s_l = s_{l-1} + IEA_l(a_l) + EA_l(g_l)        returns s_L

    a_l and g_l are read before the residual and its LayerNorm. [D9] The released code reads text after them, and sends
    the adapters' output through BERT's own norms, which undo s.

    layers: how many pairs. text_layers: the text layers (from 1) that are paired with vision layers 1 .. layers, in
    that order; the paper's best is 7-12 with 1-6 (Table VIII c; [D6] the released code pairs 1-6 with 1-6).
    options: those of M3ISA."""
    def __init__(self, vision_dim, text_dim, layers, text_layers, **options):
        super().__init__()
        if len(text_layers) != layers:
            raise ValueError(f"{layers} vision layers cannot be paired with text layers {list(text_layers)}")
        self.text_layers = list(text_layers)
        self.blocks = nn.ModuleList(M3ISA(vision_dim, text_dim, **options) for _ in range(layers))

    def vision(self, x0, ports):
        """x0: (B, N, C_v), the encoder's input tokens. ports: [(a_1, g_1), ...] of all vision layers. -> s_L like x0."""
        s = x0
        for block, (a, g) in zip(self.blocks, ports):
            s = s + block.vision(a, g)
        return s

    def text(self, x0, ports):
        """x0: (B, N, C_l), the embedded words. ports: [(a_1, g_1), ...] of all text layers. -> s_L like x0."""
        s = x0
        for block, layer in zip(self.blocks, self.text_layers):
            s = s + block.text(*ports[layer - 1])
        return s

def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)

class CrossModalBridge(nn.Module):
    """MACB, HiVG Section 3.2 and Fig. 7: lets a layer of the vision encoder see the text, of all its layers at once.

    Stands at the attention port of a CLIP vision layer. Symbols (paper = here): n = text_layers, L_l <= max_tokens,
    H_v, H_l = vision_dim, text_dim, f_l^i = texts[i - 1], w_l = weights, W_proj = projection, f_v^sa = what `semantic`
    returns. heads: those of the cross-attention."""
    def __init__(self, vision_dim, text_dim, text_layers, max_tokens, heads):
        super().__init__()
        self.heads = heads
        # [D13] One weight for each layer, place and channel, the same for all samples. 0 is "as CLIP has it"; the paper
        # names no start, and the released code's N(0, 1) hides the features at first.
        self.weights = nn.Parameter(torch.zeros(text_layers, max_tokens, text_dim))
        self.projection = nn.Linear(text_layers * text_dim, vision_dim)
        self.norm = nn.LayerNorm(vision_dim)
        self.q, self.k, self.v, self.out = (nn.Linear(vision_dim, vision_dim) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(vision_dim, 4 * vision_dim), nn.Linear(4 * vision_dim, vision_dim)

    def select(self, texts):
        """n features (B, L_l, H_l) -> *f_l^ml (B, L_l, H_v)."""
        calibrated = [w[:f.shape[1]] * f + f for w, f in zip(self.weights, texts, strict=True)]     # HiVG Eq. (3)
        return self.projection(torch.cat(calibrated, dim=-1))                                       # HiVG Eq. (4)

    def semantic(self, vision, texts, padding):
        """vision (B, N, H_v), texts: n times (B, L_l, H_l), padding (B, L_l) -> f_v^sa (B, N, H_v)."""
        # [D14] The released code views (L_l, B, H) as (B, heads, ...) here, so that a sample attends to its neighbours' texts.
        split = lambda x: x.unflatten(-1, (self.heads, -1)).transpose(1, 2)          # (B, N, H_v) -> (B, heads, N, H_v / heads)
        text = self.select(texts)
        found = F.scaled_dot_product_attention(split(self.q(self.norm(vision))), split(self.k(text)), split(self.v(text)),
                                               attn_mask=~padding[:, None, None, :])     # [D15] released: not masked
        return self.fc2(quick_gelu(self.fc1(self.out(found.transpose(1, 2).flatten(2)))))

    def forward(self, out, x, context):
        """At the attention port: out = attention's output, x = what the layer was given, context = (texts, padding)."""
        return out + self.semantic(x + out, *context)         # HiVG Section 3.2: "back to the block as residuals"
