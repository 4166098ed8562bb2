"""The adapters of both papers, beside or inside frozen encoders. This file imports torch alone.

    ExpertAdapter, InteractionAdapter, M3ISA, AdapterNetworks    M²IST Section III-B
    CrossModalBridge                                             HiVG Section 3.2
    record_ports                                                 for third-party encoders

A frozen encoder layer has two ports: `a` is the output of its attention and `g` is the output of
its feed-forward network, both before they are added to the residual stream. A bridge and an
inserted adapter change what a port holds, so gradients must pass through the encoder. A side
network only reads the ports. It feeds nothing back into the encoder, so the encoder runs without
autograd; this is where M²IST saves its memory:

      frozen encoder   x_0 ──[layer 1]──[layer 2]── ... ──[layer L]── x_out ──(+)──> f
                        │     │a_1 │g_1  │a_2 │g_2         │a_L │g_L           │
                        │    IEA   EA   IEA   EA          IEA   EA             │
                        └─────(+)──(+)───(+)──(+)── ... ───(+)──(+)── s_L ─────┘

Symbols (paper = here), M²IST:
    C_v, C_l = vision_dim, text_dim     x_v, x_l = tokens of vision, of text     s = scale
    C_d = bottleneck                    C_i = interaction_dim
    VEA, LEA = ExpertAdapter            IEA = InteractionAdapter
Symbols (paper = here), HiVG:
    H_v, H_l = vision_dim, text_dim     n = text_layers            L_l <= max_tokens
    f_l^i = texts[i - 1]                w_l = weights              *f_l^i = calibrated[i - 1]
    W_proj = projection                 *f_l^ml = text             f_v^sa = output of `semantic`

Shapes: B batch, N tokens of one modality, C its width, M tokens of the text. Layers count from 1.
EA stands for both VEA and LEA. Tags such as [D4] mark where a line differs from a paper or from its
released code; assets/deviations.md says how.

M²IST's side networks beside third-party encoders. This example needs
`from torchvision.models import vit_b_16` and `from transformers import BertModel`. You bring
images (B, 3, 224, 224), tokens (B, M) and your_loss. In a loop, make the optimizer once.

    vit, bert = vit_b_16().eval(), BertModel.from_pretrained("bert-base-uncased").eval()
    v = record_ports(vit.encoder.layers, attention="self_attention", ffn="mlp")
    t = record_ports(bert.encoder.layer, attention="attention.output.dense", ffn="output.dense")
    networks = AdapterNetworks(768, 768, layers=6, text_layers=[7, 8, 9, 10, 11, 12])
    with torch.no_grad():                                    # both encoders are frozen
        logits, encoded = vit(images), bert(tokens)          # each pass fills a record
    f_v = v.x_out + networks.side("vision", v.x0, v.ports)   # x0: [CLS] and patches, with positions
    f_l = t.x_out + networks.side("text", t.x0, t.ports)     # x0: the output of BERT's embeddings
    your_loss(f_v, f_l).backward()
    torch.optim.AdamW(networks.parameters(), lr=1e-3).step()
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


def init_adapter(module):
    """Initialise a linear layer as M²IST Section IV-B a says. Any other module is left as it is."""
    if isinstance(module, nn.Linear):
        # [D3] As the paper says; the released code ends up with two others, neither Kaiming.
        nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(module.bias)


# --- The adapters of M²IST, Section III-B a -------------------------------------------------------


class ExpertAdapter(nn.Module):
    """VEA or LEA, M²IST Eq. (1): a bottleneck that adapts the tokens of one modality.

    dim: the width C of the tokens. bottleneck: C_d. scale: s.
    residual: add the input too, as Eq. (1) does.
    """

    def __init__(self, dim, bottleneck=128, scale=0.1, residual=False):
        super().__init__()
        # Fig. 2 leaves this LayerNorm out: "we do not show the LayerNorm for simplicity" (III-B).
        self.norm = nn.LayerNorm(dim)
        self.down = nn.Linear(dim, bottleneck)    # with biases, as released; Eqs. (1)-(3) have none
        self.up = nn.Linear(bottleneck, dim)
        self.scale = scale
        self.residual = residual
        self.apply(init_adapter)

    def forward(self, x):
        """x: (B, N, C). Returns (B, N, C)."""
        z = F.relu(self.down(self.norm(x)))    # (B, N, C_d)
        out = self.scale * self.up(z)          # M²IST Eq. (1), the term after the plus sign
        # [D4] Eq. (1) adds x as well. As released we do not: in a side network that would add a_l
        # and g_l, which the encoder has added to its own stream already.
        if self.residual:
            out = x + out
        return out

    def zero_init(self):
        """Let the output be 0 at first."""
        nn.init.zeros_(self.up.weight)


class InteractionAdapter(nn.Module):
    """IEA, M²IST Eqs. (2)-(5): a down-projection for each modality, and a shared up-projection.

    The shared weights are the whole interaction ("channel-level alignment"): both modalities train
    them, but no token of one modality meets a token of the other. So the image is encoded once for
    all of its texts.

    vision_dim, text_dim: C_v, C_l. bottleneck: C_d. interaction_dim: C_i <= min(C_v, C_l).
    scale: s. residual: add the input too, as Eqs. (4) and (5) do.
    """

    modalities = ("vision", "text")

    def __init__(self, vision_dim, text_dim, bottleneck=128, interaction_dim=256, scale=0.1,
                 residual=False):
        super().__init__()
        if interaction_dim > min(vision_dim, text_dim):
            raise ValueError(f"interaction_dim (C_i) is {interaction_dim}, more than the "
                             f"narrower of the two encoders: C_v {vision_dim}, C_l {text_dim}")
        self.vision_down = nn.Linear(vision_dim, bottleneck)
        self.text_down = nn.Linear(text_dim, bottleneck)
        self.shared_up = nn.Linear(bottleneck, interaction_dim)    # one tensor for both modalities

        # The channels beyond C_i belong to one modality alone. At full size C_v = C_i, and vision
        # has none.
        self.vision_up = None
        if vision_dim > interaction_dim:
            self.vision_up = nn.Linear(bottleneck, vision_dim - interaction_dim)
        self.text_up = None
        if text_dim > interaction_dim:
            self.text_up = nn.Linear(bottleneck, text_dim - interaction_dim)

        self.scale = scale
        self.residual = residual
        self.apply(init_adapter)

    def vision(self, x):
        """x_v: (B, N, C_v). Returns (B, N, C_v)."""
        f = self._project(x, self.vision_down, self.vision_up)    # M²IST Eq. (2)
        return self._scaled(x, f)                                 # M²IST Eq. (4)

    def text(self, x):
        """x_l: (B, N, C_l). Returns (B, N, C_l)."""
        f = self._project(x, self.text_down, self.text_up)        # M²IST Eq. (3)
        return self._scaled(x, f)                                 # M²IST Eq. (5)

    def _project(self, x, down, own_up):
        z = F.relu(down(x))           # (B, N, C_d); the ReLU is in Section III-B a, not in the Eqs.
        shared = self.shared_up(z)    # (B, N, C_i), the "interacted tokens" of Fig. 2
        if own_up is None:
            return shared
        return torch.cat([own_up(z), shared], dim=-1)    # (B, N, C)

    def _scaled(self, x, f):
        out = self.scale * f    # [D5] The paper has s for all adapters; the released code not here.
        # Eqs. (4) and (5) add x as well; as in ExpertAdapter this is an option.
        if self.residual:
            out = x + out
        return out

    def forward(self, x_v, x_l):
        """Both modalities at once, for use alone; the side networks call `vision` and `text`.

        x_v: (B, N_v, C_v), x_l: (B, N_l, C_l). Returns both, adapted."""
        return self.vision(x_v), self.text(x_l)

    def zero_init(self):
        """Let the outputs be 0 at first."""
        for up in (self.shared_up, self.vision_up, self.text_up):
            if up is not None:
                nn.init.zeros_(up.weight)


class ExpertPair(nn.Module):
    """VEA for vision and LEA for text, at a port that a vision layer and a text layer share.

    modalities: those that get an expert; Table V (b) and (c) leave one out. The other arguments are
    those of ExpertAdapter.
    """

    def __init__(self, vision_dim, text_dim, modalities, bottleneck=128, scale=0.1, residual=False):
        super().__init__()
        self.modalities = modalities
        self.vea = None
        if "vision" in modalities:
            self.vea = ExpertAdapter(vision_dim, bottleneck, scale, residual)
        self.lea = None
        if "text" in modalities:
            self.lea = ExpertAdapter(text_dim, bottleneck, scale, residual)

    def vision(self, x):
        """x_v: (B, N, C_v). Returns (B, N, C_v)."""
        return self.vea(x)

    def text(self, x):
        """x_l: (B, N, C_l). Returns (B, N, C_l)."""
        return self.lea(x)

    def zero_init(self):
        """Let the outputs be 0 at first."""
        for expert in (self.vea, self.lea):
            if expert is not None:
                expert.zero_init()


# --- Stacks of adapters: M²IST Section III-B b ----------------------------------------------------

# What may stand at a port. To add an adapter, write a class with `vision`, `text`, `modalities` and
# `zero_init`, add its name here, and build it in M3ISA.
ADAPTERS = ("none", "iea", "ea", "vea", "lea")


class M3ISA(nn.ModuleDict):
    """M³ISA: the adapters of one vision layer and of the text layer paired with it (Fig. 2, right),
    as a dictionary {port: adapter}. The paper's M³ISA has IEA at the attention port, and VEA and LEA
    at the feed-forward port (Table VI d).

    attention_port, ffn_port: a name from ADAPTERS. bottleneck: the C_d of VEA and LEA.
    interaction_bottleneck: the C_d of IEA. modalities: those that have a layer here; a text layer
    without a vision layer has ("text",).
    """

    def __init__(self, vision_dim, text_dim, attention_port="iea", ffn_port="ea", bottleneck=128,
                 interaction_dim=256, interaction_bottleneck=128, scale=0.1, residual=False,
                 modalities=("vision", "text")):
        super().__init__()
        for port, name in (("attention", attention_port), ("ffn", ffn_port)):
            if name not in ADAPTERS:
                raise ValueError(f"there is no adapter {name!r} for the {port} port: "
                                 f"choose one of {', '.join(ADAPTERS)}")
            if name == "none":
                continue
            if name == "iea":
                if "vision" not in modalities:
                    raise ValueError("the adapter 'iea' joins a vision layer and a text layer: "
                                     "give as many text layers as vision layers")
                self[port] = InteractionAdapter(vision_dim, text_dim, interaction_bottleneck,
                                                interaction_dim, scale, residual)
                continue
            wanted = {"ea": ("vision", "text"), "vea": ("vision",), "lea": ("text",)}[name]
            present = [modality for modality in wanted if modality in modalities]
            self[port] = ExpertPair(vision_dim, text_dim, present, bottleneck, scale, residual)


class Inserted(nn.Module):
    """An adapter inside an encoder, at a port of one of its layers (Fig. 3 a, b).

    adapt: a function from tokens (B, N, C) to what is added at the port, (B, N, C).
    insertion: "sequential" adapts the output of the sublayer, "parallel" adapts its input, the
    residual stream.
    """

    def __init__(self, adapt, insertion):
        super().__init__()
        # `adapt` is a bound method, so nn.Module does not register the adapter a second time: its
        # weights appear once in a state dict, under AdapterNetworks. (copy.deepcopy of a model
        # binds the copied method to the copied adapter.)
        self.adapt = adapt
        self.insertion = insertion

    def forward(self, out, x, context):
        """Add the adapter's output at the port. `context` is for bridges and not used here.

        out: (B, N, C), the output of the sublayer. x: (B, N, C), the residual stream before it.
        """
        if self.insertion == "sequential":
            return out + self.adapt(out)
        return out + self.adapt(x)


class AdapterNetworks(nn.Module):
    """The M³ISAs of all layers of two encoders, used in one of three forms (Fig. 3, Table VII).

    `side` is M²IST's form: two side networks, one for each modality,

        s_0 = x_0        s_l = s_{l-1} + IEA_l(a_l) + EA_l(g_l)

    and s_L is added to the output of the encoder. The other two forms, "sequential" and "parallel",
    write the ports of the encoder's layers; `insert` sets them up.

    layers: how many vision layers have adapters. text_layers: the text layers that are paired with
    the vision layers 1 .. layers, in this order. Text layers beyond them have adapters of their
    own, which only experts can be. options: those of M3ISA.
    """

    def __init__(self, vision_dim, text_dim, layers, text_layers, **options):
        super().__init__()
        if len(text_layers) < layers:
            raise ValueError(f"{layers} vision layers cannot be paired with text layers "
                             f"{list(text_layers)}")
        self.layers = {
            "vision": list(range(1, layers + 1)),
            "text": list(text_layers),    # [D6] the paper's best is 7-12, the released code has 1-6
        }
        self.blocks = nn.ModuleList()
        for number in range(len(text_layers)):
            modalities = ("vision", "text") if number < layers else ("text",)
            self.blocks.append(M3ISA(vision_dim, text_dim, modalities=modalities, **options))

    def adapts(self, modality):
        """Say whether any adapter adapts this modality. If none does, it has no side network."""
        return any(modality in adapter.modalities
                   for block in self.blocks for adapter in block.values())

    def side(self, modality, x0, ports):
        """Run the side network of one modality.

        x0: (B, N, C), the tokens that entered the first encoder layer (or, see D6, the first paired
        layer). ports: for each layer of the encoder, {"attention": a_l, "ffn": g_l}. Returns s_L
        (B, N, C), to be added to the output of the encoder.
        """
        s = x0    # s_0 = x_0
        for layer, block in zip(self.layers[modality], self.blocks):
            # [D9] Both modalities read a_l and g_l before the residual. As released, IEA reads the
            # text after the residual and its LayerNorm.
            read = ports[layer - 1]    # {"attention": a_l, "ffn": g_l}
            terms = []                 # IEA_l(a_l), EA_l(g_l)
            for port, adapter in block.items():
                if modality in adapter.modalities:
                    adapt = getattr(adapter, modality)
                    terms.append(adapt(read[port]))
            s = s + sum(terms)         # s_l = s_{l-1} + IEA_l(a_l) + EA_l(g_l)
        return s

    def insert(self, modality, layers, insertion):
        """Put the adapters of one modality into the layers of its encoder.

        layers: the encoder's layers, each with a ModuleDict `plugs` of what writes to its ports.
        insertion: "sequential" or "parallel", see Inserted.
        """
        for layer, block in zip(self.layers[modality], self.blocks):
            for port, adapter in block.items():
                if modality in adapter.modalities:
                    adapt = getattr(adapter, modality)    # its method `vision` or `text`
                    layers[layer - 1].plugs[port] = Inserted(adapt, insertion)
                    # [D38] Inside an encoder an adapter starts as the identity, as in AdaptFormer's
                    # own code: noise would disturb the frozen encoder.
                    adapter.zero_init()


# --- The ports of third-party encoders ------------------------------------------------------------


class PortRecord:
    """What a side network needs from a forward pass of an encoder. Each pass fills it anew."""

    def __init__(self, layers):
        self.x0 = None                              # (B, N, C)  input of layer 1
        self.ports = [{} for _ in range(layers)]    # by layer: {"attention": a_l, "ffn": g_l}
        self.x_out = None                           # (B, N, C)  output of the last layer
        self.hooks = []

    def remove(self):
        """Remove the hooks from the encoder. What the record holds stays."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()


def record_ports(layers, attention, ffn):
    """Let the layers of any encoder report their ports, by forward hooks. Returns a PortRecord.

    layers: a list of modules, shallow first; the first argument of each is its tokens (B, N, C),
    batch first. attention, ffn: the dotted name, within each layer, of the submodule whose output
    is a_l or g_l. Choose the module whose output is added to the residual stream: in BERT this is
    the linear layer before the LayerNorm. Raises ValueError if a layer lacks one of the two. The
    method `remove` of the record removes the hooks.
    """
    layers = list(layers)
    if not layers:
        raise ValueError("there are no layers whose ports could be recorded")

    # All submodules are looked up before the first hook is set.
    submodules = []    # (layer number, port, submodule)
    for number, layer in enumerate(layers, start=1):
        for port, name in (("attention", attention), ("ffn", ffn)):
            try:
                submodules.append((number, port, layer.get_submodule(name)))
            except AttributeError:
                raise ValueError(f"layer {number} has no {name!r}") from None

    record = PortRecord(len(layers))

    def begin(layer, inputs):
        for port in record.ports:
            port.clear()
        record.x_out = None
        record.x0 = inputs[0]

    def save(number, port):
        def hook(submodule, inputs, output):
            record.ports[number - 1][port] = tokens_of(output)
        return hook

    def end(layer, inputs, output):
        record.x_out = tokens_of(output)    # a final LayerNorm comes later

    record.hooks.append(layers[0].register_forward_pre_hook(begin))
    for number, port, submodule in submodules:
        record.hooks.append(submodule.register_forward_hook(save(number, port)))
    record.hooks.append(layers[-1].register_forward_hook(end))
    return record


def tokens_of(output):
    """A module may return a tuple, say tokens and attention weights. The tokens come first."""
    return output[0] if isinstance(output, tuple) else output


# --- Attention ------------------------------------------------------------------------------------


def quick_gelu(x):
    """x σ(1.702 x), the activation of CLIP. Written with SiLU, it saves one activation for the
    backward pass in place of two."""
    return F.silu(1.702 * x) / 1.702


def attend(q, k, v, heads, padding, dropout=0.0, causal=False):
    """Multi-head attention between tokens that are already projected.

    q: (B, N, C). k, v: (B, M, C). padding: (B, M) bool, True where a key is padding; or None.
    causal: no token attends to a later one; padding must then be None. Returns (B, N, C).
    """
    q = q.unflatten(-1, (heads, -1)).transpose(1, 2)    # (B, heads, N, C / heads)
    k = k.unflatten(-1, (heads, -1)).transpose(1, 2)    # (B, heads, M, C / heads)
    v = v.unflatten(-1, (heads, -1)).transpose(1, 2)    # (B, heads, M, C / heads)

    mask = None
    if padding is not None:
        mask = ~padding[:, None, None, :]    # (B, 1, 1, M), True where a key may be attended to

    out = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
    return out.transpose(1, 2).flatten(2)    # (B, heads, N, C / heads) -> (B, N, C)


# --- The bridge: HiVG Section 3.2 -----------------------------------------------------------------

# The forms of the bridge's weights w_l. Four are named by their shape in n (layers), L_l (tokens)
# and H_l (channels), as in Table 4; "none" has no weights; "aware" computes the weights from the
# text (Table 10, line 1).
BRIDGE_WEIGHTS = ("nxLxH", "nxLx1", "nx1xH", "1x1xH", "none", "aware")


class CrossModalBridge(nn.Module):
    """MACB, HiVG Section 3.2 and Fig. 7: a layer of the vision encoder sees the text of all layers.

    The bridge writes the attention port of a CLIP vision layer.

    vision_dim, text_dim: H_v, H_l. text_layers: n, how many text layers the bridge reads.
    max_tokens: the largest L_l. heads: those of the cross-attention; 0 means no cross-attention
    (Table 4, line 2). weights: a name from BRIDGE_WEIGHTS. only: None, or the place in `texts`,
    counted from 0, of the one text that the bridge reads (Table 4, line 7).
    """

    def __init__(self, vision_dim, text_dim, text_layers, max_tokens, heads, weights="nxLxH",
                 only=None):
        super().__init__()
        if weights not in BRIDGE_WEIGHTS:
            raise ValueError(f"there are no bridge weights {weights!r}: "
                             f"choose one of {', '.join(BRIDGE_WEIGHTS)}")
        self.n = text_layers
        self.heads = heads
        self.only = only

        # [D13] Weights of 0 leave the text as CLIP has it: the residual of Eq. (3) starts as the
        # identity, where the released code starts with noise. They do not depend on the sample
        # ("sample-agnostic"). An axis of size 1 is shared.
        self.weights = None
        if weights not in ("none", "aware"):
            sizes = {"n": text_layers, "L": max_tokens, "H": text_dim, "1": 1}
            shape = [sizes[axis] for axis in weights.split("x")]
            self.weights = nn.Parameter(torch.zeros(shape))

        # [D40] The sample-aware weights are an MLP of the text, whose output is 0 at first.
        self.aware = None
        if weights == "aware":
            self.aware = nn.Sequential(
                nn.Linear(text_dim, text_dim // 4),
                nn.ReLU(),
                nn.Linear(text_dim // 4, text_dim),
            )
            nn.init.zeros_(self.aware[2].weight)
            nn.init.zeros_(self.aware[2].bias)

        self.projection = nn.Linear(text_layers * text_dim, vision_dim)    # W_proj

        # The multi-head cross-attention, and the LayerNorm of its query.
        if heads:
            self.norm = nn.LayerNorm(vision_dim)
            self.q = nn.Linear(vision_dim, vision_dim)
            self.k = nn.Linear(vision_dim, vision_dim)
            self.v = nn.Linear(vision_dim, vision_dim)
            self.out = nn.Linear(vision_dim, vision_dim)

        # The feed-forward network.
        self.fc1 = nn.Linear(vision_dim, 4 * vision_dim)
        self.fc2 = nn.Linear(4 * vision_dim, vision_dim)

    def select(self, texts):
        """Weigh the text features of all layers and project them into the vision encoder's space.

        texts: n features f_l^i, each (B, L_l, H_l). Returns *f_l^ml (B, L_l, H_v).
        """
        if len(texts) != self.n:
            raise ValueError(f"the bridge reads {self.n} text layers, not {len(texts)}")

        calibrated = []    # n features *f_l^i, each (B, L_l, H_l)
        if self.weights is not None:
            by_layer = self.weights.expand(self.n, -1, -1)    # one w_l^i for each of the n layers
            for w, f in zip(by_layer, texts):
                w = w[:f.shape[1]]              # a batch may be trimmed to its longest text
                calibrated.append(w * f + f)    # HiVG Eq. (3)
        elif self.aware is not None:
            for f in texts:
                w = self.aware(f)               # (B, L_l, H_l), computed from the text itself
                calibrated.append(w * f + f)
        else:
            calibrated = texts

        return self.projection(torch.cat(calibrated, dim=-1))    # HiVG Eq. (4)

    def semantic(self, vision, texts, padding):
        """f_v^sa, the semantic-aware visual features.

        vision: (B, N, H_v). texts: n features (B, L_l, H_l). padding: (B, L_l), True where a token
        is padding. Returns (B, N, H_v).
        """
        text = self.select(texts)    # (B, L_l, H_v)
        if self.heads:
            # [D14] Each sample attends to its own text; in the released code to those of other
            # samples, too. [D15] Padded text tokens are masked, so that trimming a text changes
            # nothing; in the released code they are not.
            q = self.q(self.norm(vision))    # (B, N, H_v)
            attended = attend(q, self.k(text), self.v(text), self.heads, padding)
            attended = self.out(attended)    # (B, N, H_v)
        else:
            # Without cross-attention every image token gets the mean of the real text tokens.
            real = (~padding)[..., None].to(text.dtype)                  # (B, L_l, 1)
            attended = (text * real).sum(1, True) / real.sum(1, True)    # (B, 1, H_v)
        return self.fc2(quick_gelu(self.fc1(attended)))

    def forward(self, out, x, context):
        """Add f_v^sa at the attention port: the layers l ∈ C of HiVG Section 3.3.

        out: (B, N, H_v), the output of the attention. x: (B, N, H_v), the input of the layer.
        context: (texts, padding), as `semantic` takes them. Returns (B, N, H_v).
        """
        texts, padding = context
        if self.only is not None:
            texts = [texts[self.only]]
        # [D53] The query is the residual stream after the self-attention, x + out, as released. The
        # paper's "visual features outputted by the self-attention" (Section 3.2) may also mean out
        # alone. The result returns "back to the block as residuals". [D44] Eqs. (7) and (8) write it
        # into the layer's input; here q, k, v and out of this layer do not see it.
        return out + self.semantic(x + out, texts, padding)
