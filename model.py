"""The encoder-decoder language model and its decoder-only rival, in one class.

Notable about this model:
- A decoder-only model is an encoder-decoder model with no encoder: n_enc=0 removes the encoder and the cross-attention.
- The dialect of the Llama family: pre-norm RMSNorm, RoPE (half-rotation), grouped-query attention, SwiGLU, tied
  embeddings, no biases (`nano` to `small` have those of Qwen's query, key and value, and its QK-norm). `Config` switches the
  few things that the paper's released model has instead.
- RoPE rotates self-attention in both stacks; cross-attention has no positions unless `cross_rope` gives it some. Past the
  trained length the base of RoPE is stretched (NTK-aware), by a factor that each row of a request gets once, from its own length.
- Inference state is explicit: a `Cache`, made once for a request, filled in place by `decode`.

Names of sizes in the shape comments: B rows, S source tokens, T target tokens, C = n_embd, H heads, D = head_dim, V words.
Paper: "Return of the Encoder: Maximizing Parameter Efficiency for SLMs", section 3.1.
"""
import json
import os
import zlib
from dataclasses import asdict, dataclass, field, fields, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


class ModelError(ValueError):
    """What a user can do wrong with a model: a config that cannot be built, weights that do not fit. One line."""


@dataclass
class Config:
    vocab_size: int = 4096
    n_enc: int = 4             # encoder layers; 0 makes the model decoder-only
    n_dec: int = 2             # decoder layers
    n_embd: int = 192
    n_head: int = 6            # n_head * head_dim need not be n_embd
    n_kv_head: int = 2         # grouped-query attention: each key-value head serves n_head / n_kv_head query heads
    head_dim: int = 32
    n_hidden: int = 512        # width of the MLP
    src_len: int = 1024        # trained length of the encoder (0 without one); RoPE is stretched past it
    tgt_len: int = 256         # trained length of the decoder; decoder-only: of prompt and answer together
    rope_theta: float = 10000.0
    rope_factors: list = field(default_factory=list)  # what each of RoPE's frequencies is divided by (Llama 3, Phi-3); empty: 1
    rope_long: list = field(default_factory=list)     # the same in a row past the trained length, in place of stretching (Phi-3's)
    rope_scale: float = 1.0    # cos and sin times this (Phi-3's)
    mlp: str = "swiglu"        # or "gelu": the tanh approximation, one projection in
    cross_rope: bool = False   # RoPE in cross-attention, source and answer both counted from 0: for answers that follow their source
    qk_norm: bool = True       # RMSNorm on every query and key head
    qkv_bias: bool = False     # biases of the query, key and value projections
    bias: bool = False         # biases of all other linear layers
    tied: bool = True          # the output layer is the embedding
    head_bias: bool = False    # a bias of the output layer
    embed_scale: float = 1.0   # embeddings enter the stacks times this
    norm_eps: float = 1e-6
    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    image_id: int = -1         # placeholder of one token of a picture (vision.py); -1: it sees none
    look: str = "none"         # encoder or decoder: its layers have a cross-attention to the tokens of the pictures, too

    def check(self):
        """Raises ModelError naming the first field that cannot work."""
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is float and type(value) is int:
                value = float(value)
            if type(value) is not f.type:
                raise ModelError(f"config: {f.name}={value!r} should be of type {f.type.__name__}")
        for name in ("vocab_size", "n_dec", "n_embd", "n_head", "n_kv_head", "head_dim", "n_hidden", "tgt_len"):
            if getattr(self, name) < 1:
                raise ModelError(f"config: {name}={getattr(self, name)} must be at least 1")
        if self.n_enc < 0 or self.src_len < (1 if self.n_enc else 0):
            raise ModelError(f"config: n_enc={self.n_enc} with src_len={self.src_len} cannot work")
        if self.n_head % self.n_kv_head:
            raise ModelError(f"config: n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}")
        if self.head_dim % 2 or self.head_dim < 4:
            raise ModelError(f"config: head_dim={self.head_dim} must be even and at least 4 (RoPE rotates pairs)")
        for name in ("rope_factors", "rope_long"):
            if getattr(self, name) and (len(getattr(self, name)) != self.head_dim // 2 or not all(type(x) in (int, float) and x > 0 for x in getattr(self, name))):
                raise ModelError(f"config: {name} should be {self.head_dim // 2} positive numbers, one for each of RoPE's frequencies")
        if self.mlp not in ("swiglu", "gelu"):
            raise ModelError(f"config: mlp={self.mlp!r} is neither swiglu nor gelu")
        if self.look not in ("none", "encoder", "decoder") or (self.look == "encoder" and not self.n_enc):
            raise ModelError(f"config: look={self.look!r} is neither none nor a stack of the model (encoder, decoder)")
        for name in ("pad_id", "bos_id", "eos_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ModelError(f"config: {name}={getattr(self, name)} is outside the vocabulary of {self.vocab_size}")
        return self


# ---------------------------------------------------------------------------------------------------------------------
# Sizes. `n_hidden` is the decoder-only model's; make_config solves it for the others. 330m has the paper's layer counts.

PRESETS = {
    "nano": dict(vocab_size=1024, n_embd=192, n_head=3, n_kv_head=3, head_dim=64, n_hidden=448, n_dec=5,
                 splits={"1/3": (2, 3), "1/2": (2, 2), "2/3": (3, 2)}),
    "mini": dict(vocab_size=8192, n_embd=256, n_head=4, n_kv_head=4, head_dim=64, n_hidden=640, n_dec=8,
                 splits={"1/3": (2, 5), "1/2": (4, 4), "2/3": (5, 2)}),
    "small": dict(vocab_size=16384, n_embd=448, n_head=7, n_kv_head=7, head_dim=64, n_hidden=1216, n_dec=9,
                  splits={"1/3": (3, 5), "1/2": (4, 4), "2/3": (5, 3)}),
    "330m": dict(vocab_size=32768, n_embd=768, n_head=6, n_kv_head=2, head_dim=128, n_hidden=2072, n_dec=48,
                 splits={"1/3": (12, 32), "1/2": (22, 22), "2/3": (32, 12)}),
    "500m": dict(vocab_size=32768, n_embd=960, n_head=8, n_kv_head=2, head_dim=128, n_hidden=2528, n_dec=48,
                 splits={"1/3": (12, 32), "1/2": (22, 22), "2/3": (32, 12)}),
    "800m": dict(vocab_size=32768, n_embd=1280, n_head=10, n_kv_head=2, head_dim=128, n_hidden=3088, n_dec=48,
                 splits={"1/3": (12, 32), "1/2": (22, 22), "2/3": (32, 12)}),
    "1b": dict(vocab_size=32768, n_embd=1344, n_head=10, n_kv_head=2, head_dim=128, n_hidden=3896, n_dec=48,
               splits={"1/3": (12, 32), "1/2": (22, 22), "2/3": (32, 12)}),
}


def make_config(preset, arch="encdec", split="2/3", n_enc=None, n_dec=None, src_len=1024, tgt_len=256, **changes):
    """The Config of a preset. All members of a preset have one width and, within 1%, one parameter count: the width of
    the MLP is solved so that any choice of layers costs what the decoder-only model costs (paper, section 3.1, equalises
    with the number of layers; at one width its layer counts leave the splits about 10% apart). `arch` is encdec or
    dec; `split` the encoder's share, or n_enc and n_dec count the layers; `changes` overwrite any field of Config."""
    shape = {key: value for key, value in PRESETS[preset].items() if key != "splits"}
    shape |= {key: value for key, value in changes.items() if key != "n_hidden"}
    small = PRESETS[preset]["n_embd"] < 768  # what makes minutes of training count; from 330m on, the paper's plain dialect
    shape = dict(qk_norm=small, qkv_bias=small, embed_scale=1 / embed_std(shape["n_embd"])) | shape
    rival = Config(n_enc=0, src_len=0, **shape | dict(tgt_len=src_len + tgt_len)).check()
    if arch == "dec":
        layers = dict(n_enc=0, n_dec=rival.n_dec if n_dec is None else n_dec, src_len=0, tgt_len=src_len + tgt_len)
    else:
        enc, dec = PRESETS[preset]["splits"][split]
        layers = dict(n_enc=enc if n_enc is None else n_enc, n_dec=dec if n_dec is None else n_dec, src_len=src_len, tgt_len=tgt_len)
    config = replace(rival, **layers)
    if "n_hidden" in changes:
        return replace(config, n_hidden=changes["n_hidden"]).check()
    step = 8  # 16 bytes in bfloat16: what tensor cores ask for
    one, two = (count_params(replace(config, n_hidden=step * n)) for n in (1, 2))
    config.n_hidden = step * round(1 + (count_params(rival) - one) / (two - one))
    if config.n_hidden < step:
        raise ModelError(f"{preset} has no parameters left for an MLP with {config.n_enc}+{config.n_dec} layers: use fewer")
    return config.check()


def embed_std(n_embd):
    """Standard deviation that embeddings start with. Tied, a token predicts itself at first with a logit of C * std, which
    must stay small for a first loss near ln(V); `embed_scale` = 1 / std gives the stacks inputs of size 1 all the same."""
    return min(0.02, 4 / n_embd)


def count_params(config):
    """Number of parameters of Transformer(config), from the shapes alone."""
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Parts

class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rope_tables(positions, cfg, stretch=None):
    """cos and sin of RoPE's angles, (B or 1, 1, T, D/2), in float32. `positions` (B or 1, T). `stretch` (B,): each row's
    length over the trained length, at least 1; NTK-aware scaling multiplies the base by stretch^(D / (D-2)), so that the
    slowest frequency is interpolated by `stretch` and the fastest is left alone; with config.rope_long, rows of more than 1 have that instead."""
    like = dict(device=positions.device, dtype=torch.float32)
    power = torch.arange(0, cfg.head_dim, 2, **like) / cfg.head_dim  # (D/2,)
    base = torch.full((1, 1), cfg.rope_theta, device=positions.device)
    if stretch is not None and not cfg.rope_long:
        base = cfg.rope_theta * stretch[:, None].float() ** (cfg.head_dim / (cfg.head_dim - 2))  # (B, 1)
    rate = base ** -power  # (B or 1, D/2)
    if cfg.rope_factors:
        factors = torch.tensor(cfg.rope_factors, **like)
        rate = rate / (factors if stretch is None or not cfg.rope_long else torch.where(stretch[:, None] > 1, torch.tensor(cfg.rope_long, **like), factors))
    angle = positions[:, :, None].float() * rate[:, None, :]  # (B, T, D/2)
    return (angle.cos() * cfg.rope_scale)[:, None], (angle.sin() * cfg.rope_scale)[:, None]


def rotate(x, rope):
    """Rotates the pairs (x[i], x[i + D/2]) of x (B, H, T, D)."""
    cos, sin = (table.to(x.dtype) for table in rope)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def has_bf16(device):
    """Whether a device multiplies bfloat16 in hardware (a CPU with AVX-512 BF16 or AMX); emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            flags = f.read()
        return "avx512_bf16" in flags or "amx_bf16" in flags
    except OSError:
        return False


def packed_linear(x, packed, bias=None):
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")  # the operator that torch.compile uses


def attend(q, k, v, mask, causal):
    """Scaled dot-product attention of q (B, H, T, D) over k, v (B, H_kv, S, D); mask (B or 1, 1, 1 or T, S), True where it
    may look. Where no mask depends on the query, a group's query heads are laid out along T: on a CPU that is up to six times
    as fast as leaving the groups to torch. And on a CPU in bfloat16, torch's fused kernel does not use the matrix units,
    so that the formula written out is twice as fast, in training and in reading a prompt."""
    B, H, T, D = q.shape
    if T > 1 and q.dtype == torch.bfloat16 and q.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):  # which would compute softmax in float32
            k, v = k.to(q.dtype), v.to(q.dtype)  # a cache keeps the weights' type
            scores = (q * D ** -0.5).reshape(B, k.size(1), -1, D) @ k.mT  # (B, H_kv, H / H_kv * T, S)
            if causal:
                mask = torch.ones(T, T, dtype=torch.bool).tril()[None, None]
            if mask is not None:
                scores = scores.view(B, H, T, -1).masked_fill(~mask, -torch.inf).view_as(scores)
            return (scores.softmax(-1) @ v).view(B, H, T, D)
    if not causal and (mask is None or mask.size(2) == 1):
        return F.scaled_dot_product_attention(q.reshape(B, k.size(1), -1, D), k, v, attn_mask=mask).view(B, H, T, D)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=H != k.size(1))


class Attention(nn.Module):
    """Grouped-query attention. Self-attention passes its own input as the keys' source; cross-attention the encoder's."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = cfg.n_head, cfg.n_kv_head, cfg.head_dim
        self.wq = nn.Linear(cfg.n_embd, cfg.n_head * cfg.head_dim, bias=cfg.qkv_bias)
        self.wk = nn.Linear(cfg.n_embd, cfg.n_kv_head * cfg.head_dim, bias=cfg.qkv_bias)
        self.wv = nn.Linear(cfg.n_embd, cfg.n_kv_head * cfg.head_dim, bias=cfg.qkv_bias)
        self.wo = nn.Linear(cfg.n_head * cfg.head_dim, cfg.n_embd, bias=cfg.bias)
        self.q_norm = RMSNorm(cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else nn.Identity()

    def keys_values(self, x, rope=None):
        """x (B, S, C) -> keys and values, (B, H_kv, S, D) each."""
        k = self.k_norm(self.wk(x).unflatten(-1, (self.n_kv_head, self.head_dim))).transpose(1, 2)
        v = self.wv(x).unflatten(-1, (self.n_kv_head, self.head_dim)).transpose(1, 2)
        return (k if rope is None else rotate(k, rope)), v

    def forward(self, x, keys, values, mask=None, causal=False, rope=None):
        """x (B, T, C) looks at keys and values (B, H_kv, S, D); mask (B, 1, 1 or T, S) is True where it may."""
        q = self.q_norm(self.wq(x).unflatten(-1, (self.n_head, self.head_dim))).transpose(1, 2)  # (B, H, T, D)
        q = q if rope is None else rotate(q, rope)
        y = attend(q, keys, values, mask, causal)  # (B, H, T, D)
        return self.wo(y.transpose(1, 2).flatten(2))


    def start_local(self):
        """Makes self-attention prefer near tokens at first: query and key get one constant on the fast third of RoPE's
        frequencies, and the product of two constants, rotated, falls with their distance. Needs biases."""
        if self.wq.bias is not None:
            for bias in (self.wq.bias, self.wk.bias):
                bias.view(-1, self.head_dim)[:, :self.head_dim // 6] = 3.0

    def start_matching(self):
        """Makes cross-attention look for the token that the decoder has just read, a sentinel for example, at first: keys
        are projected as queries are, so equal contents match."""
        q = self.wq.weight.unflatten(0, (self.n_kv_head, -1, self.head_dim))  # each group's first query head
        self.wk.weight.copy_(q[:, 0].flatten(0, 1))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate = nn.Linear(cfg.n_embd, cfg.n_hidden, bias=cfg.bias) if cfg.mlp == "swiglu" else None
        self.up = nn.Linear(cfg.n_embd, cfg.n_hidden, bias=cfg.bias)
        self.down = nn.Linear(cfg.n_hidden, cfg.n_embd, bias=cfg.bias)

    def forward(self, x):
        if self.gate is None:
            return self.down(F.gelu(self.up(x), approximate="tanh"))
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One layer: self-attention, cross-attention to pictures (with config.look), cross-attention to the source (in the decoder of an
    encoder-decoder), MLP; each after an RMSNorm."""
    dropout = 0.0  # of what each part adds, in training; no matter of the model's files, so train.py sets it

    def __init__(self, cfg, cross, look=False):
        super().__init__()
        self.attn_norm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.attn = Attention(cfg)
        self.look_norm = RMSNorm(cfg.n_embd, cfg.norm_eps) if look else None
        self.look = Attention(cfg) if look else None
        self.cross_norm = RMSNorm(cfg.n_embd, cfg.norm_eps) if cross else None
        self.cross = Attention(cfg) if cross else None
        self.mlp_norm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x, rope, mask=None, causal=False, store=None, encoded=None, memory=None, memory_mask=None, cross_rope=None, memory_rope=None,
                seen=None, seen_mask=None):
        """x (B, T, C). `store(k, v)` puts the new self-attention keys and values into a cache and returns all of them
        so far. The source: its states `encoded` (B, S, C), or `memory`, the cross-attention keys and values (B, H_kv, S, D) made of them.
        With config.cross_rope, cross_rope rotates the queries at the source and memory_rope the keys made of `encoded`. `seen`: tokens of
        pictures (B, M, C), or the keys and values made of them; seen_mask as `seen_masks` gives it."""
        h = self.attn_norm(x)
        k, v = self.attn.keys_values(h, rope)
        if store is not None:
            k, v = store(k, v)
        x = x + self.drop(self.attn(h, k, v, mask, causal, rope))
        if self.look is not None and seen is not None:
            seen = self.look.keys_values(seen) if torch.is_tensor(seen) else seen
            may, some = seen_mask  # a row without pictures adds nothing
            x = x + self.drop(self.look(self.look_norm(x), *seen, mask=may) * some)
        if self.cross is not None:
            memory = memory or self.cross.keys_values(encoded, memory_rope)
            x = x + self.drop(self.cross(self.cross_norm(x), *memory, mask=memory_mask, rope=cross_rope))
        return x + self.drop(self.mlp(self.mlp_norm(x)))

    def drop(self, y):
        """Dropout of whole channels of a row, the same at every position: on a CPU, drawing for every element costs a third
        of the training speed."""
        if not self.training or self.dropout == 0:
            return y
        return y * F.dropout(y.new_ones(y.size(0), 1, y.size(2)), self.dropout)


class Cache:
    """The state of one generation request: what a decoder step needs to know of everything before it.

    Rows share their slots: the newest token of every row lies in slot `length - 1`. Shorter prompts are padded on the
    left, `pad` (B,) slots each, which nothing attends to; a row's position is its slot minus its padding. RoPE's
    stretch is fixed here from the length the row may reach, because a factor that moved while decoding would turn the
    keys already stored into keys of another rotation."""

    def __init__(self, model, rows, slots, encoded=None, src_mask=None, pad=None, seen=None):
        cfg, like = model.config, model.embed.weight
        self.length, self.slots = 0, slots
        self.pad = pad if pad is not None and bool(pad.any()) else None  # (B,)
        reach = slots - (pad if self.pad is not None else torch.zeros(rows, dtype=torch.long, device=like.device))
        self.stretch = stretch_of(reach, slots, cfg.tgt_len)
        shape = (cfg.n_dec, rows, cfg.n_kv_head, slots, cfg.head_dim)
        self.keys = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.values = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.memory = [None] * cfg.n_dec  # per layer: cross keys and values (B, H_kv, S, D), computed here once
        if encoded is not None:
            rope = model.cross_rope(torch.arange(encoded.size(1), device=like.device)[None])
            self.memory = [block.cross.keys_values(encoded, rope) for block in model.dec]
        self.memory_mask = source_mask(src_mask)
        self.seen, self.seen_mask = [None] * cfg.n_dec, None
        if seen is not None:
            self.seen, self.seen_mask = [block.look.keys_values(seen[0]) for block in model.dec], seen_masks(seen[1])

    def store(self, layer, k, v):
        """Writes the new keys and values in place behind the stored ones; returns views of all."""
        end = self.length + k.size(2)
        self.keys[layer, :, :, self.length:end] = k
        self.values[layer, :, :, self.length:end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def mask(self, T):
        """(B or 1, 1, T, length + T): causal over the slots, blind to padding. A padding slot still sees itself: a query
        that sees nothing is 0/0 in softmax, and one NaN in a value spoils every row that gives it weight zero."""
        if self.pad is None and T == 1:
            return None
        query = torch.arange(self.length, self.length + T, device=self.keys.device)[:, None]  # (T, 1)
        key = torch.arange(self.length + T, device=self.keys.device)[None, :]  # (1, length + T)
        if self.pad is None:
            return (key <= query)[None, None]
        real = key >= self.pad[:, None, None]  # (B, 1, length + T)
        return ((key <= query) & (real | (key == query)))[:, None]

    def select(self, rows):
        """Keeps, repeats or reorders rows in place; `rows` (B',) of indices. Beam search moves its beams with it."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.pad = None if self.pad is None else self.pad[rows]
        self.stretch = None if self.stretch is None else self.stretch[rows]
        self.memory = [kv and (kv[0][rows], kv[1][rows]) for kv in self.memory]
        self.memory_mask = None if self.memory_mask is None else self.memory_mask[rows]
        self.seen = [kv and (kv[0][rows], kv[1][rows]) for kv in self.seen]
        self.seen_mask = self.seen_mask and tuple(mask[rows] for mask in self.seen_mask)


def stretch_of(lengths, longest, trained):
    """RoPE's stretch for rows of `lengths` (B,): None if even the longest row, an int, is within the trained length."""
    return None if longest <= trained else (lengths.float() / trained).clamp(min=1)


def source_mask(src_mask):
    """(B, S) -> (B, 1, 1, S). A source with no token at all lets its first padding be seen, so that softmax is finite."""
    if src_mask is None:
        return None
    first = torch.arange(src_mask.size(1), device=src_mask.device) == 0
    return (src_mask | (first & ~src_mask.any(1, keepdim=True)))[:, None, None]


def seen_masks(mask):
    """(B, M), True at tokens of pictures -> what attention to them needs: where it may look (B, 1, 1, M), and which rows have some (B, 1, 1)."""
    return None if mask is None else (source_mask(mask), mask.any(1)[:, None, None])


def shift_right(tgt, bos_id):
    """Decoder inputs of the targets (B, T): begin-of-sequence, then every target but the last."""
    return torch.cat((torch.full_like(tgt[:, :1], bos_id), tgt[:, :-1]), dim=1)


class SummedLoss(nn.Module):
    """Cross-entropy in nats of logits (B, T, V), summed over the targets (B, T) where loss_mask is True. A module only so
    that it can be compiled by itself."""

    label_smoothing = 0.0  # share of the target's probability that all words have together, in training; train.py sets it

    def forward(self, logits, tgt, loss_mask):
        labels = tgt.masked_fill(~loss_mask, -100)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum",
                               label_smoothing=self.label_smoothing if self.training else 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# The model

class Transformer(nn.Module):
    word_dropout = 0.0  # share of the tokens that are hidden, in training; train.py sets it

    def __init__(self, config):
        super().__init__()
        self.config = cfg = config.check()
        self.embed = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.enc = nn.ModuleList(Block(cfg, False, cfg.look == "encoder") for _ in range(cfg.n_enc))
        self.enc_norm = RMSNorm(cfg.n_embd, cfg.norm_eps) if cfg.n_enc else None
        self.dec = nn.ModuleList(Block(cfg, cfg.n_enc > 0, cfg.look == "decoder") for _ in range(cfg.n_dec))
        self.dec_norm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.head = None if cfg.tied else nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        self.head_bias = nn.Parameter(torch.zeros(cfg.vocab_size)) if cfg.head_bias else None
        self.packed_head = None
        self.loss = SummedLoss()
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Every block starts as the identity (its output projections are zero), so the first loss is near ln(V)."""
        for name, p in self.named_parameters():
            if name.endswith("bias") or name.endswith(("wo.weight", "down.weight")):
                p.zero_()
            elif name.startswith(("embed", "head")):
                p.normal_(std=embed_std(self.config.n_embd))
            elif p.ndim == 2:
                p.normal_(std=p.size(1) ** -0.5)
        # A start that looks at the right places, which gradients alone take long to find (README, "What worked"):
        for block in [*self.enc, *self.dec]:
            block.attn.start_local()
        for block in self.dec if self.config.n_enc else []:
            block.cross.start_matching()

    def embedded(self, ids, images=None):
        """(B, T) -> (B, T, C); `images` (N, C) take the places of the N placeholders, in order. In training, word dropout (Bowman et al., 2016)
        hides tokens of the source and of the answer so far."""
        x = self.embed(ids) * self.config.embed_scale
        if self.training and self.word_dropout:
            x = x * (torch.rand(ids.shape, device=ids.device) >= self.word_dropout)[:, :, None]
        if images is not None:
            here = ids == self.config.image_id
            if int(here.sum()) != len(images):
                raise ModelError(f"the texts have {int(here.sum())} placeholders for tokens of pictures, and the pictures have {len(images)}")
            x = x.masked_scatter(here[:, :, None], images.to(x.dtype))
        return x

    def spread(self, images, ids):
        """Tokens of pictures (N, C) and the ids (B, T) that they belong to -> what config.look looks at: (B, M, C), and a mask (B, M)."""
        counts = (ids == self.config.image_id).sum(1)
        mask = torch.arange(max(1, int(counts.max())), device=ids.device)[None] < counts[:, None]
        return images.new_zeros(*mask.shape, images.size(1)).masked_scatter(mask[:, :, None], images), mask

    def encode(self, src, src_mask=None, images=None):
        """src (B, S) of ids, padded on the right; src_mask (B, S), True at real tokens; images (N, C): tokens of pictures, for the
        placeholders among the ids -> states (B, S, C)."""
        cfg = self.config
        lengths = None if src_mask is None else src_mask.sum(1)
        if lengths is None:
            lengths = torch.full((len(src),), src.size(1), device=src.device)
        positions = torch.arange(src.size(1), device=src.device)[None]
        rope = rope_tables(positions, cfg, stretch_of(lengths, src.size(1), cfg.src_len))
        mask, x = source_mask(src_mask), self.embedded(src, images)
        seen, seen_mask = self.spread(images, src) if images is not None and cfg.look == "encoder" else (None, None)
        for block in self.enc:
            x = block(x, rope, mask, seen=seen, seen_mask=seen_masks(seen_mask))
        return self.enc_norm(x)

    def cross_rope(self, positions):
        """RoPE of cross-attention at these positions (B or 1, T); None without config.cross_rope. Never stretched: how far an
        answer strays from its place in the source does not grow with their lengths."""
        cfg = self.config
        return rope_tables(positions, cfg) if cfg.cross_rope and cfg.n_enc else None

    def decode(self, tokens, encoded=None, src_mask=None, cache=None, images=None, seen=None):
        """States (B, T, C) of the decoder after `tokens` (B, T), which are inputs, already shifted; `logits` reads them.

        Without a cache, `tokens` are the whole sequence, and `encoded` (B, S, C) the encoder's states. With one, they
        follow what the cache holds (any number of tokens at a time), and the source is already inside. Pictures: decoder-only, `images`
        (N, C) for the placeholders among the tokens; with config.look == "decoder", `seen`, as `spread` gives it."""
        cfg, T = self.config, tokens.size(1)
        positions, memory_rope = torch.arange(T, device=tokens.device)[None], None
        if cache is None:
            lengths = torch.full((len(tokens),), T, device=tokens.device)
            stretch, mask, causal = stretch_of(lengths, T, cfg.tgt_len), None, True
            memory_mask, (seen, seen_mask) = source_mask(src_mask), (None, None) if seen is None else (seen[0], seen_masks(seen[1]))
            if encoded is not None:
                memory_rope = self.cross_rope(torch.arange(encoded.size(1), device=tokens.device)[None])
        else:
            if cache.length + T > cache.slots:
                raise ModelError(f"the cache was made for {cache.slots} tokens and holds {cache.length}: no room for {T}")
            positions = positions + cache.length
            if cache.pad is not None:
                positions = (positions - cache.pad[:, None]).clamp(min=0)
            causal = cache.length == 0 and cache.pad is None and T > 1
            stretch, mask, memory_mask = cache.stretch, None if causal else cache.mask(T), cache.memory_mask
        rope, cross_rope = rope_tables(positions, cfg, stretch), self.cross_rope(positions)
        x = self.embedded(tokens, images)
        for i, block in enumerate(self.dec):
            if cache is None:
                x = block(x, rope, mask, causal, encoded=encoded, memory_mask=memory_mask, cross_rope=cross_rope, memory_rope=memory_rope, seen=seen, seen_mask=seen_mask)
            else:
                x = block(x, rope, mask, causal, store=lambda k, v, i=i: cache.store(i, k, v), memory=cache.memory[i], memory_mask=memory_mask, cross_rope=cross_rope,
                          seen=cache.seen[i], seen_mask=cache.seen_mask)
        if cache is not None:
            cache.length += T
        return self.dec_norm(x)

    def logits(self, states):
        """(..., C) -> (..., V)"""
        if self.packed_head is not None:
            return packed_linear(states, self.packed_head, self.head_bias)
        return F.linear(states, self.embed.weight if self.head is None else self.head.weight, self.head_bias)

    def forward(self, src, src_mask, tgt, loss_mask, reduction="mean", images=None):
        """Logits (B, T, V) and the loss in nats over the targets where loss_mask (B, T) is True: their mean, or their
        "sum". The loss of a batch without any is 0. src and src_mask (B, S) are None for a decoder-only model, whose
        tgt holds prompt and answer. src_mask may also be None where nothing is padded. images (N, C): tokens of pictures, for the placeholders
        in src or, decoder-only, in tgt."""
        encoded = self.encode(src, src_mask, images) if self.config.n_enc else None
        states = self.decode(shift_right(tgt, self.config.bos_id), encoded, src_mask, **self.decoder_sees(images, src, tgt))
        logits = self.logits(states)
        loss = self.loss(logits, tgt, loss_mask)
        return logits, loss / loss_mask.sum().clamp(min=1) if reduction == "mean" else loss

    def decoder_sees(self, images, src, tgt):
        """What `decode` is given of the pictures: their tokens, decoder-only in place, or to look at."""
        if images is None:
            return {}
        own = {} if self.config.n_enc else dict(images=images)
        return own | (dict(seen=self.spread(images, src if self.config.n_enc else tgt)) if self.config.look == "decoder" else {})

    # -----------------------------------------------------------------------------------------------------------------
    # Generation

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, temperature=0.0, top_k=0, top_p=1.0, seed=0, prefix=None, images=None):
        """Continues B prompts at once, streaming: yields, per step, a list of B new ids, None for rows that have ended
        (their end-of-sequence itself is not shown).

        prompts: lists of ids; the encoder's sources, or, decoder-only, the beginning of the text. prefix: lists of ids
        that the decoder's output starts with. images (N, C): tokens of pictures, for the placeholders in the prompts. temperature 0 is greedy; top_k 0 and top_p 1 keep every token. Row b
        draws from its own generator, seeded with seed + b, or with seed[b] if there is one a row. A row gives what it gives alone, whatever the others are."""
        cache, states = self.prefill(prompts, max_new_tokens, prefix, images)
        seeds = range(seed, seed + len(prompts)) if isinstance(seed, int) else seed
        rngs = [torch.Generator(states.device).manual_seed(row_seed) for row_seed in seeds]
        rows, ended = list(range(len(prompts))), set()  # which prompt each row of the cache belongs to
        for step in range(max_new_tokens):
            token = pick(self.next_logits(states), temperature, top_k, top_p, rngs)  # (rows,)
            new = [None] * len(prompts)
            for row, id in zip(rows, token.tolist()):
                if id == self.config.eos_id or row in ended:
                    ended.add(row)
                else:
                    new[row] = id
            if len(ended) == len(prompts):
                return
            yield new
            going = [i for i, row in enumerate(rows) if row not in ended]
            if 2 * len(going) <= len(rows):  # few long answers should not cost what all of them did
                cache.select(torch.tensor(going, device=token.device))
                token, rows, rngs = token[going], [rows[i] for i in going], [rngs[i] for i in going]
            if step < max_new_tokens - 1:
                states = self.decode(token[:, None], cache=cache)

    def next_logits(self, states):
        """Logits (B, V) of the next token. The placeholder of a picture is none: nothing would stand in its place."""
        logits = self.logits(states[:, -1])
        if self.config.image_id >= 0:
            logits[:, self.config.image_id] = -torch.inf
        return logits

    @torch.inference_mode()
    def prefill(self, prompts, max_new_tokens, prefix=None, images=None):
        """Reads the prompts -> a Cache with room for max_new_tokens more, and the decoder's states after the last one."""
        if max_new_tokens < 1 or not prompts:
            raise ModelError(f"cannot generate {max_new_tokens} tokens for {len(prompts)} prompts: both must be positive")
        heads = prefix or [[]] * len(prompts)
        if not self.config.n_enc:
            heads = [list(p) + list(h) for p, h in zip(prompts, heads)]
        if bad := [id for ids in (*prompts, *heads) for id in ids if not 0 <= id < self.config.vocab_size]:
            raise ModelError(f"token id {bad[0]} is outside the model's vocabulary of {self.config.vocab_size}")
        device, cfg = self.embed.weight.device, self.config
        encoded = src_mask = src = None
        if cfg.n_enc:
            width = max(1, max(map(len, prompts)))
            src = torch.tensor([list(p) + [cfg.pad_id] * (width - len(p)) for p in prompts], device=device)
            lengths = torch.tensor([len(p) for p in prompts], device=device)
            if lengths.min() < width:
                src_mask = torch.arange(width, device=device)[None] < lengths[:, None]
            encoded = self.encode(src, src_mask, images)
        width = 1 + max(map(len, heads))
        rows = [[cfg.pad_id] * (width - 1 - len(h)) + [cfg.bos_id] + list(h) for h in heads]
        pad = torch.tensor([width - 1 - len(h) for h in heads], device=device)
        tokens = torch.tensor(rows, device=device)
        sees = self.decoder_sees(images, src, tokens)
        cache = Cache(self, len(prompts), width + max_new_tokens - 1, encoded, src_mask, pad, sees.pop("seen", None))
        return cache, self.decode(tokens, cache=cache, **sees)

    # -----------------------------------------------------------------------------------------------------------------
    # What it costs

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def flops(self, src_len, tgt_len):
        """FLOPs of one forward pass over one row, a multiply-add counted as two; training costs three times that.
        Causal attention is counted in full, as most papers do; config.look's cross-attention to pictures is left out."""
        cfg = self.config
        heads, attn, cross, mlp = 4 * cfg.n_head * cfg.head_dim, 0, 0, 0
        for name, p in self.dec[0].named_parameters():
            if p.ndim == 2:
                attn += 2 * p.numel() * name.startswith("attn")
                mlp += 2 * p.numel() * name.startswith("mlp")
        kv = 2 * 2 * cfg.n_embd * cfg.n_kv_head * cfg.head_dim  # a source token's share of a cross-attention
        enc = cfg.n_enc * src_len * (attn + mlp + heads * src_len)
        dec = cfg.n_dec * tgt_len * (attn + mlp + heads * tgt_len)
        if cfg.n_enc:
            cross = cfg.n_dec * (src_len * kv + tgt_len * (attn - kv + heads * src_len))
        return enc + dec + cross + 2 * tgt_len * cfg.n_embd * cfg.vocab_size

    def pack(self):
        """Once before generating: where this CPU multiplies bfloat16, keeps a second copy of the decoder's matrices in the
        blocks that oneDNN reads fastest, 1.5 times the tokens/s. Changes nothing else; a packed model cannot be trained."""
        weight = self.embed.weight
        if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and has_bf16(weight.device):
            for module in self.dec.modules():
                if isinstance(module, nn.Linear):
                    packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), None)
                    module.forward = lambda x, packed=packed, bias=module.bias: packed_linear(x, packed, bias)
            self.packed_head = torch.ops.mkldnn._reorder_linear_weight((weight if self.head is None else self.head.weight).detach(), None)
        return self

    def compiled_parts(self):
        """What is worth compiling by itself: layers of one kind share their code, so that 48 layers compile as fast as 1."""
        return [*self.enc, *self.dec, self.loss]

    # -----------------------------------------------------------------------------------------------------------------
    # Files

    def save(self, folder, weights="model.safetensors", **metadata):
        """Writes config.json and the weights (named as in the module, tied embeddings once) into a folder. The header
        of the weights carries a checksum and `metadata` (strings)."""
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, "config.json")
        with open(path + ".new", "w", encoding="utf-8") as f:
            json.dump(asdict(self.config), f, indent=1)
        os.replace(path + ".new", path)  # whole or not at all
        tensors = {name: p.detach().cpu().contiguous() for name, p in self.state_dict().items()}
        save_file(tensors, os.path.join(folder, weights), metadata={"crc32": checksum(tensors), **metadata})

    @classmethod
    def of_folder(cls, folder):
        """The model that a folder describes, with new weights."""
        return cls(read_config(folder))

    @classmethod
    def load(cls, folder, weights=None, device="cpu", dtype=torch.float32):
        """The model of a folder that `save` wrote, with the weights that did best where training kept them apart from the
        last ones. Whatever they were saved in, they are float32 unless `dtype` is another. Raises ModelError naming what is missing, altered or does not fit."""
        weights = weights or ("best.safetensors" if os.path.exists(os.path.join(folder, "best.safetensors")) else "model.safetensors")
        path = os.path.join(folder, weights)
        read_config(folder)
        if not os.path.isfile(path):
            raise ModelError(f"{path} is missing: is {folder} a finished run folder?")
        with torch.device("meta"):
            model = cls.of_folder(folder)
        wanted = {name: tuple(p.shape) for name, p in model.state_dict().items()}
        try:
            with safe_open(path, framework="pt") as f:
                metadata = f.metadata() or {}
                found = {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}
                for name in sorted(wanted.keys() | found.keys()):
                    if wanted.get(name) != found.get(name):
                        raise ModelError(f"{path}: tensor {name} is {found.get(name, 'absent')} in the file, "
                                         f"{wanted.get(name, 'absent')} by config.json")
                tensors = {name: f.get_tensor(name) for name in wanted}
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} cannot be read, it is truncated or no safetensors file ({error})") from None
        if metadata.get("crc32", "") not in ("", checksum(tensors)):
            raise ModelError(f"{path} was altered after it was written: its checksum does not match")
        tensors = {name: t.to(device=device, dtype=dtype) for name, t in tensors.items()}
        model.load_state_dict(tensors, assign=True)
        return model


def read_metadata(path):
    """The strings in the header of a weight file; empty if there is no such file or it cannot be read."""
    try:
        with safe_open(path, framework="pt") as f:
            return f.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def read_config(folder):
    """The Config in a run folder; ModelError if there is none or it cannot be used."""
    path = os.path.join(folder, "config.json")
    try:
        with open(path, encoding="utf-8") as f:
            values = json.load(f)
        return Config(**values).check()
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: is {folder} a run folder?") from None
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, OSError) as error:
        raise ModelError(f"{path} is not a config of this project ({error})") from None


def checksum(tensors):
    """CRC-32 of the bytes of all tensors in order of their names: catches what safetensors does not, a changed weight."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def pick(logits, temperature, top_k, top_p, rngs):
    """One token a row from logits (B, V): argmax at temperature 0, else a draw from the top_k most likely and, of those,
    the fewest that hold a probability of top_p together. Row b draws with rngs[b]."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered, order = logits.softmax(-1).sort(descending=True)
        drop = ordered.cumsum(-1) - ordered >= top_p  # what stands before it already holds top_p
        logits = logits.masked_fill(drop.scatter(1, order, drop), -torch.inf)
    up_to = logits.softmax(-1).cumsum(-1)  # (B, V): of a word and all before it
    u = torch.cat([torch.rand(1, generator=rng, device=logits.device) for rng in rngs])[:, None]
    return torch.searchsorted(up_to, u.clamp(max=1 - 1e-6) * up_to[:, -1:], right=True)[:, 0]
