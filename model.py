"""The encoder-decoder language model and its decoder-only rival, in one class.

Notable about this model:
- A decoder-only model is an encoder-decoder model with no encoder: n_enc=0 removes the encoder and
  the cross-attention. With src_len > 0 it is a prefix LM: its prompt is read in both directions.
- The dialect of the Llama family: pre-norm RMSNorm, RoPE on half-split pairs, grouped-query
  attention, SwiGLU, tied embeddings. QK-norm and biases of query, key and value are Config's own
  defaults; PLAIN, from 330m up, has neither.
- Self-attention in both stacks is rotated by RoPE. Cross-attention has no positions unless
  `cross_rope` gives it some. With `embed_skip` queries and keys of the first decoder layer see
  embeddings, too, so that equal tokens find each other. With `cross_next` one head reads the token
  behind the one that it finds: what comes next in a copy, or what follows a hole.
- Past the trained length the base of RoPE is stretched (NTK-aware) by a factor fixed once
  for a row, from the length that it has or may reach.
- The state of generation is explicit: a `Cache`, made once for a request, filled by `decode`.

This file needs torch and safetensors alone. Copied into an empty folder, it trains:

    model = Transformer(make_config("tiny", vocab_size=32))
    for src, tgt in batches:                 # (B, S) and (B, T) of ids, padded with pad_id
        loss = model(src, tgt) / tgt.numel() # model() sums over the targets; none is padding here
        ...

Shapes: B rows, S source tokens, T target tokens, C = n_embd, H = n_head, D = head_dim, V words.
Paper: "Return of the Encoder: Maximizing Parameter Efficiency for SLMs", section 3.1.
"""

import json
import os
from dataclasses import asdict, dataclass, fields, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence


class ModelError(ValueError):
    """A config that cannot be built, or weights that do not fit. One line."""


@dataclass
class Config:
    vocab_size: int = 4096
    n_enc: int = 4  # encoder layers; 0 makes the model decoder-only
    n_dec: int = 2  # decoder layers
    n_embd: int = 192
    n_head: int = 6  # n_head * head_dim need not be n_embd
    n_kv_head: int = 2  # grouped-query attention: n_head / n_kv_head query heads share one
    head_dim: int = 32
    n_hidden: int = 512  # width of the MLP
    src_len: int = 1024  # trained length of the encoder; decoder-only: 0 causal, more prefix LM
    tgt_len: int = 256  # trained length of the decoder; decoder-only: of prompt and answer
    mlp: str = "swiglu"  # or "gelu", the tanh approximation, which the paper's released model has
    bias: str = "qkv"  # linear layers with a bias: "none", "qkv" or "all"
    qk_norm: bool = True  # RMSNorm of every query and key head
    tied: bool = True  # the output layer is the embedding
    rope_theta: float = 10000.0
    cross_rope: bool = False  # RoPE in cross-attention, for answers that follow their source
    embed_skip: bool = False  # cross-attention of the first decoder layer sees embeddings, too
    cross_next: bool = False  # its first head reads the token behind the one that it matches
    norm_eps: float = 1e-6
    pad_id: int = 0
    bos_id: int = 1  # what the decoder reads first; -1: nothing, the first token is never a target
    eos_id: int = 2

    def check(self):
        """Returns itself; raises ModelError naming the first field that cannot work."""
        least = dict(n_enc=0, src_len=0, pad_id=0, bos_id=-1, eos_id=0, norm_eps=0)
        # A stranger's file may say anything.
        most = dict(n_enc=256, n_dec=256, src_len=2**22, tgt_len=2**22, rope_theta=2**40)
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            low, high = least.get(name, 1), most.get(name, 2**20)
            kinds = (int, float) if field.type is float else (field.type,)
            if type(value) not in kinds or not (field.type in (bool, str) or low <= value <= high):
                raise ModelError(f"config: {name} must be {field.type.__name__}, {low} to {high}")
        for wrong, what in (
            (self.n_head % self.n_kv_head, "n_head is not a multiple of n_kv_head"),
            (self.head_dim % 2 or self.head_dim < 4, "head_dim must be even and at least 4"),
            (self.mlp not in ("swiglu", "gelu"), f"mlp={self.mlp} is neither swiglu nor gelu"),
            (self.bias not in ("none", "qkv", "all"), f"bias={self.bias} is none, qkv or all"),
            (self.n_enc and not self.src_len, "an encoder needs a src_len"),
            (self.bos_id < 0 and self.src_len, "a source needs a bos_id"),
            (max(self.pad_id, self.bos_id, self.eos_id) >= self.vocab_size, "an id >= vocab_size"),
        ):
            if wrong:
                raise ModelError(f"config: {what}")
        return self


# ----------------------------------------------------------------------------------------------
# Sizes of the decoder-only model, then encoder+decoder layers at a split of 1/3, 1/2 and 2/3, for
# which make_config solves the width of the MLP, then the defaults of train.py.


def preset(sizes, splits, train, **more):
    names = ("vocab_size", "n_embd", "n_head", "n_kv_head", "head_dim", "n_hidden", "n_dec")
    layers = [tuple(map(int, both.split("+"))) for both in splits.split()]
    shape = dict(zip(names, map(int, sizes.split())))
    return shape | dict(splits=dict(zip(("1/3", "1/2", "2/3"), layers)), train=train) | more


SHORT = dict(src_len=256, tgt_len=64, batch_size=16, lr=1e-2, embed_lr=4e-3, warmup_iters=50)
SHORT |= dict(schedule="linear", max_minutes=5)
MEDIUM = SHORT | dict(src_len=512, tgt_len=128, batch_size=64, lr=5e-3, embed_lr=3e-3)
MEDIUM |= dict(warmup_iters=100, max_minutes=10)
PAPER = dict(src_len=1024, tgt_len=256, batch_size=32, lr=3e-4, embed_lr=3e-4, warmup_iters=2000)
PAPER |= dict(schedule="cosine", max_minutes=600)  # section 3.3 of the paper
DEEP = PAPER | dict(checkpoint_blocks=True)
PLAIN = dict(qk_norm=False, bias="none")  # the paper's dialect
PRESETS = {
    # name       vocab width heads kv dim MLP layers    1/3 1/2 2/3
    "tiny": preset("768 128 2 2 64 320 3", "1+2 1+1 2+1", SHORT | dict(src_len=64, tgt_len=32)),
    "char": preset("517 128 2 2 64 352 4", "1+3 2+2 2+1", SHORT | dict(max_minutes=2)),
    "nano": preset("1024 192 3 3 64 448 5", "2+3 2+2 3+2", SHORT),
    "thin": preset("1024 128 2 2 64 416 9", "3+6 4+4 6+3", SHORT),  # nano's size, exact thirds
    "mini": preset("8192 256 4 4 64 544 9", "3+6 4+4 6+3", SHORT | dict(lr=8e-3, max_minutes=20)),
    "small": preset("16384 448 7 7 64 1216 9", "3+5 4+4 5+3", MEDIUM),
    "base": preset("32768 768 6 2 128 2072 12", "4+7 5+5 7+4", PAPER | dict(lr=2e-3)),
    "330m": preset("32768 768 6 2 128 2072 48", "12+32 22+22 32+12", DEEP, **PLAIN),
    "500m": preset("32768 960 8 2 128 2528 48", "12+32 22+22 32+12", DEEP, **PLAIN),
    "800m": preset("32768 1280 10 2 128 3088 48", "12+32 22+22 32+12", DEEP, **PLAIN),
    "1b": preset("32768 1344 10 2 128 3896 48", "12+32 22+22 32+12", DEEP, **PLAIN),
}


def make_config(
    preset, arch="encdec", split="2/3", n_enc=None, n_dec=None, src_len=1024, tgt_len=256, **changes
):
    """The Config of a preset. All members of a preset have one width and, within 1%, one parameter
    count: the width of the MLP is solved so that any choice of layers costs what the decoder-only
    model costs. The paper, section 3.1, equalises with the number of layers instead.

    arch is encdec, dec or prefix. split is the encoder's share, or n_enc and n_dec count layers.
    `changes` overwrite fields of Config."""
    shape = {k: x for k, x in PRESETS[preset].items() if k not in ("splits", "train")} | changes
    rival = Config(**shape | dict(n_enc=0, src_len=0, tgt_len=src_len + tgt_len)).check()
    if arch != "encdec":
        config = replace(rival, n_dec=n_dec or rival.n_dec, src_len=src_len * (arch == "prefix"))
    else:
        enc, dec = PRESETS[preset]["splits"][split]
        config = replace(rival, n_enc=n_enc or enc, n_dec=n_dec or dec, src_len=src_len)
        config.tgt_len = tgt_len
    narrow, wide = (count_params(replace(config, n_hidden=n)) for n in (8, 16))
    # Multiples of 8 are 16 bytes in bfloat16: what tensor cores ask for.
    config.n_hidden = 8 * (1 + round((count_params(rival) - narrow) / (wide - narrow)))
    if config.n_hidden < 8:
        raise ModelError(f"--preset={preset}: so many layers leave no parameters for an MLP")
    return config.check()


def count_params(config):
    """Number of parameters of Transformer(config), from the shapes alone."""
    with torch.device("meta"):
        return Transformer(config).num_params()


# ----------------------------------------------------------------------------------------------
# Parts


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def rope_tables(positions, cfg, stretch=1.0):
    """cos and sin of RoPE's angles, (B or 1, 1, T, D/2), in float32, at positions (B or 1, T).

    stretch (B, 1) is each row's length over the trained length, at least 1. NTK-aware scaling
    multiplies the base by stretch^(D / (D-2)): the slowest frequency is interpolated by `stretch`
    and the fastest is left alone."""
    D = cfg.head_dim
    power = torch.arange(0, D, 2, device=positions.device, dtype=torch.float32) / D  # (D/2,)
    frequency = (cfg.rope_theta * stretch ** (D / (D - 2))) ** -power  # (D/2,) or (B, D/2)
    angle = positions[:, :, None].float() * frequency[..., None, :]  # (B, T, D/2)
    return angle.cos()[:, None], angle.sin()[:, None]


def rotate(x, rope):
    """Rotates the pairs (x[i], x[i + D/2]) of x (B, H, T, D)."""
    cos, sin = (table.to(x.dtype) for table in rope)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def scaled_dot_product(q, k, v, mask, causal):
    """softmax(q k^T / sqrt(D)) v of q (B, H, T, D) over k, v (B, H_kv, S, D). mask (B or 1, 1,
    1 or T, S) is True where a query may look; causal: no query looks past its own position."""
    grouped = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)


class Attention(nn.Module):
    """Grouped-query attention, to the tokens themselves or to a source."""

    kernel = staticmethod(scaled_dot_product)  # lib/device.py puts a faster one here on a CPU

    def __init__(self, cfg, embed_skip=False, cross_next=False):
        super().__init__()
        self.embed_skip, self.cross_next = embed_skip, cross_next  # as Config tells
        self.n_head, self.n_kv_head, self.head_dim = cfg.n_head, cfg.n_kv_head, cfg.head_dim
        heads, kv_heads = cfg.n_head * cfg.head_dim, cfg.n_kv_head * cfg.head_dim
        self.wq = nn.Linear(cfg.n_embd, heads, bias=cfg.bias != "none")
        self.wk = nn.Linear(cfg.n_embd, kv_heads, bias=cfg.bias != "none")
        self.wv = nn.Linear(cfg.n_embd, kv_heads, bias=cfg.bias != "none")
        self.wo = nn.Linear(heads, cfg.n_embd, bias=cfg.bias == "all")
        self.q_norm = RMSNorm(cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else nn.Identity()

    def forward(self, x, rope, mask=None, causal=False, past=None):
        """Self-attention of x (B, T, C). past: a LayerCache with the tokens before them."""
        keys, values = self.keys_values(x, rope)
        if past is not None:
            keys, values = past.append(keys, values)
        return self.attend(x, keys, values, mask, causal, rope)

    def read(self, x, source, past=None):
        """Cross-attention of x (B, T, C). source, the same for all layers: what `encode` gave, or
        None if `past` holds its keys and values; mask (B, 1, 1, S); RoPE of keys; RoPE of queries;
        embeddings (B, T, C) of x's tokens."""
        states, mask, k_rope, q_rope, embedded = source
        keys, values = past.memory if past else self.keys_values(states, k_rope)
        return self.attend(x + embedded if self.embed_skip else x, keys, values, mask, rope=q_rope)

    def keys_values(self, x, rope=None):
        """x (B, S, C), or (B, S, 2C), states beside embeddings -> keys and values, (B, H_kv, S, D)
        each. With embed_skip keys are made of the sum of both; else embeddings are left out."""
        x, *more = x.split(self.wk.in_features, -1)
        seen = x + more[0] if self.embed_skip else x
        k = self.k_norm(self.wk(seen).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        v = self.wv(x).unflatten(-1, (self.n_kv_head, self.head_dim)).transpose(1, 2)
        k = k if rope is None else rotate(k, rope)
        if self.cross_next:  # a query that matches a token reads the value of the next one
            k = torch.cat((F.pad(k[:, :1], (0, 0, 1, -1)), k[:, 1:]), dim=1)
        return k, v

    def attend(self, x, keys, values, mask=None, causal=False, rope=None):
        """x (B, T, C) looks at keys and values (B, H_kv, S, D) -> (B, T, C)."""
        q = self.q_norm(self.wq(x).unflatten(-1, (self.n_head, self.head_dim))).transpose(1, 2)
        q = q if rope is None else rotate(q, rope)  # (B, H, T, D)
        y = self.kernel(q, keys, values, mask, causal)  # (B, H, T, D)
        return self.wo(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        bias = cfg.bias == "all"
        self.gate = nn.Linear(cfg.n_embd, cfg.n_hidden, bias) if cfg.mlp == "swiglu" else None
        self.up = nn.Linear(cfg.n_embd, cfg.n_hidden, bias)
        self.down = nn.Linear(cfg.n_hidden, cfg.n_embd, bias)

    def forward(self, x):
        if self.gate is None:
            return self.down(F.gelu(self.up(x), approximate="tanh"))
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Dropout(nn.Dropout1d):
    """Drops whole channels of a row, the same at every position: on a CPU, drawing for every
    element costs a third of the training speed."""

    def forward(self, y):  # (B, T, C)
        return super().forward(y.mT).mT


class EncoderBlock(nn.Module):
    def __init__(self, cfg, dropout=0.0):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(cfg.n_embd, cfg.norm_eps), Attention(cfg)
        self.mlp_norm, self.mlp = RMSNorm(cfg.n_embd, cfg.norm_eps), MLP(cfg)
        self.drop = Dropout(dropout)

    def forward(self, x, rope, mask=None):
        x = x + self.drop(self.attn(self.attn_norm(x), rope, mask))
        return x + self.drop(self.mlp(self.mlp_norm(x)))


class DecoderBlock(nn.Module):
    def __init__(self, cfg, dropout=0.0, first=False):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(cfg.n_embd, cfg.norm_eps), Attention(cfg)
        self.cross_norm = RMSNorm(cfg.n_embd, cfg.norm_eps) if cfg.n_enc else None
        self.cross = Attention(cfg, first and cfg.embed_skip, cfg.cross_next) if cfg.n_enc else None
        self.mlp_norm, self.mlp = RMSNorm(cfg.n_embd, cfg.norm_eps), MLP(cfg)
        self.drop = Dropout(dropout)

    def forward(self, x, rope, mask=None, causal=False, source=None, past=None):
        x = x + self.drop(self.attn(self.attn_norm(x), rope, mask, causal, past))
        if self.cross is not None:
            x = x + self.drop(self.cross.read(self.cross_norm(x), source, past))
        return x + self.drop(self.mlp(self.mlp_norm(x)))


class LayerCache:
    """One decoder layer's keys and values, (B, H_kv, slots, D) each, of which `length` slots are
    filled, and its cross-attention's keys and values `memory`."""

    def __init__(self, keys, values, memory):
        self.keys, self.values, self.memory, self.length = keys, values, memory, 0

    def append(self, k, v):
        """Writes new keys and values in place behind the stored ones; returns views of all."""
        start, self.length = self.length, self.length + k.size(2)
        self.keys[:, :, start : self.length] = k
        self.values[:, :, start : self.length] = v
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class Cache:
    """The state of one generation request: what a decoder step needs to know of all before it.

    Rows share their slots: the newest token of every row lies in slot `length - 1`. Shorter prompts
    are padded on the left, `pad` (B,) slots each, which nothing attends to; a row's position is its
    slot minus its padding. RoPE's stretch is fixed here, from the length a row may reach: a factor
    that moved while decoding would turn the keys already stored into keys of another rotation."""

    def __init__(self, model, slots, pad, encoded=None, src_mask=None):
        cfg, like = model.config, model.embed.weight
        self.src_mask, self.layers, self.prefix = src_mask, [], cfg.src_len > 0 and not cfg.n_enc
        self.pad = pad if bool(pad.any()) else None
        self.stretch = stretch_of(slots - pad, slots, cfg.tgt_len)
        if encoded is not None:
            key_rope = model.cross_rope(torch.arange(encoded.size(1), device=like.device)[None])
        for block in model.dec:
            keys = like.new_zeros(len(pad), cfg.n_kv_head, slots, cfg.head_dim)
            memory = None if encoded is None else block.cross.keys_values(encoded, key_rope)
            self.layers.append(LayerCache(keys, torch.zeros_like(keys), memory))

    @property
    def length(self):
        return self.layers[0].length

    def positions(self, T):
        """Of the next T tokens: (B or 1, T)."""
        slots = torch.arange(self.length, self.length + T, device=self.layers[0].keys.device)[None]
        return slots if self.pad is None else (slots - self.pad[:, None]).clamp(min=0)

    def mask(self, T):
        """For the next T tokens, (mask, causal) as the kernel takes them: mask (B or 1, 1, T,
        length + T) is causal over the slots, but for the prompt of a prefix LM, and blind to
        padding. A padding slot still sees itself: a query that sees nothing is 0/0 in softmax, and
        one NaN in a value spoils every row that gives it weight zero."""
        if self.pad is None and (T == 1 or self.length == 0):
            return None, T > 1 and not self.prefix
        key = torch.arange(self.length + T, device=self.layers[0].keys.device)
        query = key[self.length :, None]  # (T, 1)
        first = key.new_zeros(1, 1, 1) if self.pad is None else self.pad[:, None, None]
        seen = (key <= query) | (self.prefix and self.length == 0)
        return (seen & ((key >= first) | (key == query)))[:, None], False

    def select(self, rows):
        """Keeps, repeats or reorders rows; `rows` (B',) of indices. Beam search does that."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
            layer.memory = layer.memory and tuple(part[rows] for part in layer.memory)
        for name in ("pad", "stretch", "src_mask"):
            if torch.is_tensor(part := getattr(self, name)):
                setattr(self, name, part[rows])


def stretch_of(lengths, longest, trained):
    """RoPE's stretch (B, 1) of rows of `lengths` (B,); 1.0 if even `longest` is within the trained
    length."""
    return 1.0 if longest <= trained else (lengths / trained).clamp(min=1)[:, None]


def source_mask(src_mask):
    """(B, S) -> (B, 1, 1, S). A source with no token at all lets its first padding be seen, so that
    softmax is finite."""
    if src_mask is None:
        return None
    first = torch.arange(src_mask.size(1), device=src_mask.device) == 0
    return (src_mask | (first & ~src_mask.any(1, keepdim=True)))[:, None, None]


def shift_right(tgt, bos_id):
    """Decoder inputs of the targets (B, T): begin-of-sequence, then every target but the last."""
    return torch.cat((torch.full_like(tgt[:, :1], bos_id), tgt[:, :-1]), dim=1)


# ----------------------------------------------------------------------------------------------
# The model


class Transformer(nn.Module):
    """dropout: of what each part of a block adds. word_dropout: share of the tokens, of the source
    and of the answer so far, that are hidden in training (Bowman et al., 2016). label_smoothing:
    share of a target's probability that all words have together in training."""

    def __init__(self, config, dropout=0.0, word_dropout=0.0, label_smoothing=0.0):
        super().__init__()
        self.config = cfg = config.check()
        self.word_dropout, self.label_smoothing = word_dropout, label_smoothing
        # nn.Embedding's own start imports torch's compiler on the meta device, which takes seconds.
        start = torch.randn(cfg.vocab_size, cfg.n_embd)
        self.embed = nn.Embedding.from_pretrained(start, freeze=False)
        # Tied, a token predicts itself at first with a logit of C times the size of embeddings. It
        # must be small for a first loss near ln(V). Embeddings enter the stacks with size 1.
        self.embed_std = min(0.02, 4 / cfg.n_embd)
        self.register_buffer("embed_scale", torch.tensor(1 / self.embed_std))
        self.enc = nn.ModuleList(EncoderBlock(cfg, dropout) for _ in range(cfg.n_enc))
        self.enc_norm = RMSNorm(cfg.n_embd, cfg.norm_eps) if cfg.n_enc else None
        self.dec = nn.ModuleList(DecoderBlock(cfg, dropout, i == 0) for i in range(cfg.n_dec))
        self.dec_norm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.head = None if cfg.tied else nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Every block starts as the identity, because its output projections are zero: the first
        loss is near ln(V)."""
        for name, p in self.named_parameters():
            if p.is_meta or name.endswith(("bias", "wo.weight", "down.weight")):
                p.zero_()
            elif name.startswith(("embed", "head")):
                p.normal_(std=self.embed_std)
            elif p.ndim == 2:
                p.normal_(std=p.size(1) ** -0.5)
        for block in [*self.enc, *self.dec]:
            start_local(block.attn)
        for block in self.dec if self.config.n_enc else []:
            start_matching(block.cross)

    def embedded(self, ids):
        """(B, T) -> (B, T, C)"""
        x = self.embed(ids) * self.embed_scale
        if self.training and self.word_dropout:
            x = x * (torch.rand(ids.shape, device=ids.device) >= self.word_dropout)[:, :, None]
        return x

    def encode(self, src, src_mask=None):
        """src (B, S) of ids, padded on the right; src_mask (B, S), True at real tokens, None where
        nothing is padded -> states (B, S, C); with embed_skip states beside embeddings (B, S, 2C).

        In span corruption, the decoder must find the sentinel that it has just read. The states of
        two stacks soon differ, even where the token is the same; embeddings do not."""
        lengths = (torch.ones_like(src) if src_mask is None else src_mask).sum(1)  # (B,)
        mask, stretch = source_mask(src_mask), stretch_of(lengths, src.size(1), self.config.src_len)
        rope = rope_tables(torch.arange(src.size(1), device=src.device)[None], self.config, stretch)
        x = embedded = self.embedded(src)
        for block in self.enc:
            x = block(x, rope, mask)
        x = self.enc_norm(x)
        return torch.cat((x, embedded), -1) if self.config.embed_skip else x

    def cross_rope(self, positions):
        """RoPE of cross-attention at positions (B or 1, T); None without config.cross_rope. Never
        stretched: how far an answer strays from its place in the source does not grow with their
        lengths."""
        return rope_tables(positions, self.config) if self.config.cross_rope else None

    def decode(self, tokens, encoded=None, src_mask=None, cache=None):
        """States (B, T, C) of the decoder after `tokens` (B, T), which are inputs, already shifted.

        Without a cache, `tokens` are the whole sequence, whose padding counts where RoPE is
        stretched, and `encoded` is what `encode` gave; in a prefix LM src_mask (B, T) is True at
        the prompt. With one, they follow what the cache holds, any number at a time, and the source
        is already inside."""
        T, device = tokens.size(1), tokens.device
        positions, key_rope = torch.arange(T, device=device)[None], None
        if cache is None:
            stretch = stretch_of(tokens.new_full((len(tokens),), T), T, self.config.tgt_len)
            mask, causal, layers = None, True, [None] * len(self.dec)
            if encoded is not None:
                key_rope = self.cross_rope(torch.arange(encoded.size(1), device=device)[None])
            elif self.config.src_len and src_mask is not None:
                earlier = torch.ones(T, T, dtype=torch.bool, device=device).tril()
                mask, causal = earlier | src_mask[:, None, None], False
        else:
            positions, stretch, layers = cache.positions(T), cache.stretch, cache.layers
            (mask, causal), src_mask = cache.mask(T), cache.src_mask
        rope, query_rope = rope_tables(positions, self.config, stretch), self.cross_rope(positions)
        x = self.embedded(tokens)
        source = encoded, source_mask(src_mask), key_rope, query_rope, x
        for block, past in zip(self.dec, layers):
            x = block(x, rope, mask, causal, source, past)
        return self.dec_norm(x)

    def logits(self, states):
        """(..., C) -> (..., V)"""
        return F.linear(states, (self.head or self.embed).weight)

    def states(self, src, tgt):
        """States (B, T, C) that predict the targets tgt (B, T). Decoder-only, tgt holds prompt and
        answer; src is None, or for a prefix LM a mask (B, T), True at inputs of the prompt. Padding
        is told by pad_id."""
        cfg, encoded, src_mask = self.config, None, src
        if cfg.n_enc:
            src_mask = src != cfg.pad_id
            # Not on a GPU: reading all() would make the CPU wait.
            src_mask = None if src.is_cpu and src_mask.all() else src_mask
            encoded = self.encode(src, src_mask)
        if cfg.bos_id < 0:  # nothing predicts the first token
            return F.pad(self.decode(tgt[:, :-1], encoded, src_mask), (0, 0, 1, 0))
        return self.decode(shift_right(tgt, cfg.bos_id), encoded, src_mask)

    def forward(self, src, tgt, loss_mask=None):
        """Cross-entropy in nats, summed over the targets where loss_mask (B, T) is True; by default
        all that are not padding. No target: 0."""
        loss_mask = tgt != self.config.pad_id if loss_mask is None else loss_mask
        if self.config.bos_id < 0:  # nothing predicts the first token
            loss_mask = F.pad(loss_mask[:, 1:], (1, 0))
        states = self.states(src, tgt)
        if states.is_cpu and not self.config.n_enc:  # nobody needs logits of a prompt
            states, tgt, loss_mask = (x[loss_mask][:, None] for x in (states, tgt, loss_mask))
        return self.loss(states, tgt, loss_mask)

    def loss(self, states, tgt, loss_mask):
        """Summed cross-entropy of the targets that the states (B, T, C) predict."""
        logits, labels = self.logits(states.flatten(0, 1)), tgt.masked_fill(~loss_mask, -100)
        how = dict(reduction="sum", label_smoothing=self.label_smoothing * self.training)
        return F.cross_entropy(logits.float(), labels.flatten(), **how)

    # ------------------------------------------------------------------------------------------
    # Generation

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, temperature=0.0, top_k=0, top_p=1.0, seed=0):
        """Continues B prompts at once, streaming: yields, per step, a list of B new ids, None for
        rows that have ended; their end-of-sequence itself is not shown.

        prompts: lists of ids, the encoder's sources or, decoder-only, the beginning of the text.
        temperature 0 is greedy; top_k 0 and top_p 1 keep every token. Row b draws from a generator
        of its own, seeded with seed + b, or with seed[b] of a list: a row gives what it gives
        alone, whatever the others are."""
        cache, states = self.prefill(prompts, max_new_tokens)
        seeds = seed if isinstance(seed, list) else range(seed, seed + len(prompts))
        rngs = [torch.Generator(states.device).manual_seed(row_seed) for row_seed in seeds]
        rows, ended = list(range(len(prompts))), set()  # which prompt each row of the cache is of
        for step in range(max_new_tokens):
            token = pick(self.next_logits(states), temperature, top_k, top_p, rngs)  # (rows,)
            said = dict(zip(rows, token.tolist()))
            ended |= {row for row, id in said.items() if id == self.config.eos_id}
            new = [None if row in ended else said[row] for row in range(len(prompts))]
            if len(ended) == len(prompts):
                return
            yield new
            going = [i for i, row in enumerate(rows) if row not in ended]
            if 2 * len(going) <= len(rows):  # a few long answers should not cost what all did
                cache.select(torch.tensor(going, device=token.device))
                token, rows, rngs = token[going], [rows[i] for i in going], [rngs[i] for i in going]
            if step < max_new_tokens - 1:
                states = self.decode(token[:, None], cache=cache)

    def next_logits(self, states):
        """Logits (B, V) of the next token."""
        return self.logits(states[:, -1])

    @torch.inference_mode()
    def prefill(self, prompts, max_new_tokens):
        """Reads the prompts -> a Cache with room for max_new_tokens more, and the decoder's states
        after the last prompt token."""
        cfg, device = self.config, self.embed.weight.device
        encoded, src_mask, starts = None, None, prompts
        if cfg.n_enc:
            starts = [[] for _ in prompts]  # the decoder's; the prompts are the encoder's
            lengths = torch.tensor([len(p) for p in prompts], device=device)
            src = pad_sequence([torch.tensor(p or [cfg.pad_id]) for p in prompts], True, cfg.pad_id)
            if min(map(len, prompts)) < src.size(1):
                src_mask = torch.arange(src.size(1), device=device) < lengths[:, None]
            encoded = self.encode(src.to(device), src_mask)
        starts = [torch.tensor([cfg.bos_id] * (cfg.bos_id >= 0) + [*ids]) for ids in starts]
        tokens = pad_sequence(starts, True, cfg.pad_id, "left").to(device)  # (B, T)
        pad = torch.tensor([tokens.size(1) - len(ids) for ids in starts], device=device)
        cache = Cache(self, tokens.size(1) + max_new_tokens - 1, pad, encoded, src_mask)
        return cache, self.decode(tokens, cache=cache)

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    # ------------------------------------------------------------------------------------------
    # Files

    def save(self, folder, weights="model.safetensors", **metadata):
        """Writes config.json and the weights into a folder. `metadata`, strings, goes into the
        header of the weights."""
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
            json.dump(asdict(self.config), file, indent=1)
        save_file(self.state_dict(), os.path.join(folder, weights), metadata)

    @classmethod
    def of_folder(cls, folder, **dropouts):
        """The model that a folder describes, with new weights."""
        return cls(read_config(folder), **dropouts)

    @classmethod
    def load(cls, folder, weights=None, device="cpu", dtype=torch.float32, **dropouts):
        """The model of a folder that `save` wrote. weights: a file in it; by default the ones that
        did best, where training kept them apart from the last. Raises ModelError naming what is
        missing or does not fit."""
        best = os.path.exists(os.path.join(folder, "best.safetensors"))
        path = os.path.join(folder, weights or ("best" if best else "model") + ".safetensors")
        if not os.path.isfile(path):
            raise ModelError(f"{path} is missing: is {folder} a finished run folder?")
        with torch.device("meta"):  # no memory is taken before the shapes agree
            model = cls.of_folder(folder, **dropouts)
        try:
            tensors = {name: t.to(device, dtype) for name, t in load_file(path).items()}
            model.load_state_dict(tensors, assign=True)
        except (SafetensorError, OSError, RuntimeError) as error:
            what = f"{path} is damaged, of vision.py, or of another model.py (see source/): {error}"
            raise ModelError(what[:400]) from None
        if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise ModelError(f"{path}: {bad[0]} holds numbers that are not finite")
        return model


def start_local(attn):
    """Makes self-attention prefer near tokens at first. Query and key get one constant on the fast
    third of RoPE's frequencies; the product of two constants, rotated, falls with their distance.
    Gradients alone take long to find that. Needs biases."""
    for bias in filter(torch.is_tensor, (attn.wq.bias, attn.wk.bias)):
        bias.view(-1, attn.head_dim)[:, : attn.head_dim // 6] = 3.0


def start_matching(cross):
    """Makes cross-attention look for the token that the decoder has just read, a sentinel for
    example, at first: keys are projected as queries are, so equal contents match."""
    q = cross.wq.weight.unflatten(0, (cross.n_kv_head, -1, cross.head_dim))
    cross.wk.weight.copy_(q[:, 0].flatten(0, 1))  # each group's first query head


def pick(logits, temperature, top_k, top_p, rngs):
    """One token a row from logits (B, V): argmax at temperature 0, else a draw from the top_k most
    likely and, of those, the fewest that hold a probability of top_p together. Row b draws with
    rngs[b]."""
    if temperature < 1e-6:  # less would overflow
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


def read_config(folder):
    """The Config in a folder; ModelError if there is none or it cannot be used."""
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):  # a pipe would wait for its writer
        raise ModelError(f"{path} is missing: is {folder} a run folder?")
    try:
        with open(path, encoding="utf-8") as file:
            return Config(**json.loads(file.read(2**20))).check()
    except (ValueError, TypeError, OSError, RecursionError) as error:
        raise ModelError(f"{path} is not a config of this project ({error})"[:400]) from None
