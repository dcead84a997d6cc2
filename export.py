"""Turns a run into a folder that needs no torch: ONNX graphs for ONNX Runtime.

    python export.py --run=out/encdec-nano-pycode          to out/encdec-nano-pycode-fp32
    python export.py --run=RUN --precision=int8            a quarter of the size
    python export.py --run=RUN --static --precision=int8   fixed shapes, for NPUs
    python sample.py --run=FOLDER --prompt="..."           talks to it, without torch
    python export.py --run=hf:FOLDER_OR_ID --format=run --out=RUN     weights of others: a new run

Two graphs share one file of weights. The encoder's reads a source and gives every decoder layer's
cross-attention keys and values. The decoder's reads any number of tokens behind what its caches
hold, writes their keys and values into the caches in place, and gives logits where it is asked for
them. A decoder-only model is the second graph alone.

The graphs are written node by node rather than traced: the reader sees what runs, and ONNX
Runtime's fused operators stand in them from the start. So that no edit of model.py is lost on the
way, the graphs are first written in float32 and must say what torch says, whatever the precision.
"""

import argparse
import copy
import inspect
import math
import os
import shutil
import tempfile
from dataclasses import dataclass, fields, replace

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from data.objectives import OBJECTIVES, make_batch, uniforms
from data.tokenizer import load_tokenizer
from lib import runs, weights
from lib.runs import can_write, newest_run, read_run, write_json
from lib.runtime import FILE, About, Exported, Static
from lib.settings import UserError, read_json, read_settings, script, setting
from model import PRESETS, Transformer, count_params, make_config, shift_right

MS = "com.microsoft"
CHUNK = 128  # tokens of its prompt that a static decoder-only graph reads at a time
PRECISIONS = ("fp32", "fp16", "int8", "int4")
WRITTEN = {FILE, "tokenizer.json", "weights.bin"}  # all that an export has in it
WRITTEN |= {"encoder.onnx", "prefill.onnx", "decoder.onnx"}
REPORT = """{params:,} parameters in {bytes:,} bytes; on {rows} held-out rows {text}:
    loss {loss:.4f}, torch {torch_loss:.4f} ({loss_change:+.2%})
    logits up to {largest_logit:.3g}, {logit_difference:.2g} apart; {agreement:.1%} of its tokens"""


@dataclass
class Settings:
    run: str = setting(None, "run folder [newest in out/]; hf:FOLDER_OR_ID for run")
    out: str = setting(None, "folder to write [the run's name and the precision]")
    format: str = setting("onnx", "or run: weights of others become one", ("onnx", "run"))
    tokenizer: str = setting(None, "run: a tokenizer.json, where none lies beside the weights")
    n_enc: int = setting(None, "run: as an encoder-decoder, of so many layers", low=1)
    n_dec: int = setting(None, "run: the same of its decoder", low=1)
    precision: str = setting("fp32", "of the weights; an encoder has at least int8", PRECISIONS)
    static: bool = setting(False, "fixed shapes and plain operators, for compilers of NPUs")
    src_len: int = setting(None, "static: longest source [as trained]", low=1, high=2**13)
    tgt_len: int = setting(None, "static: slots of the decoder", low=4, high=2**13)
    threads: int = setting(0, "CPU threads; 0 is the libraries' own choice", high=4096)
    json: str = setting(None, "write the report to this file")


def check(cfg):
    """UserError for keys that do not go together."""
    foreign, precisions = cfg.run.startswith("hf:"), dict(onnx=PRECISIONS, run=("fp32",))
    allowed = ("fp32", "int8") if cfg.static else precisions[cfg.format]
    for wrong, message in (
        (foreign != (cfg.format == "run"), "--format=run is for hf:..., and those for it alone"),
        (cfg.format == "run" and not cfg.out, "--format=run needs --out=FOLDER"),
        (cfg.tokenizer and cfg.format != "run", "--tokenizer is for --format=run"),
        ((cfg.static or cfg.json) and cfg.format == "run", "--static, --json: for --format=onnx"),
        (cfg.json and not can_write(cfg.json), f"--json={cfg.json} cannot be written"),
        ((cfg.src_len or cfg.tgt_len) and not cfg.static, "--src_len, --tgt_len are for --static"),
        (cfg.precision not in allowed, f"--precision: there is {', '.join(allowed)} here"),
    ):
        if wrong:
            raise UserError(f"--run={cfg.run}: {message}")


# ----------------------------------------------------------------------------------------------
# Graphs as files


class Weights:
    """weights.bin: each array once, however many graphs read it."""

    def __init__(self, folder):
        os.makedirs(folder)
        self.file = open(os.path.join(folder, "weights.bin"), "wb")
        self.places, self.modules = {}, set()  # modules: names of those that a graph has read

    def add(self, name, array):
        """Writes an array, unless one of this name is there -> the tensor that refers to it.
        "embed as rows" are the bytes of "embed" in another shape."""
        key = name.split(" as ")[0]
        if key not in self.places:
            self.file.seek(-self.file.tell() % 64, os.SEEK_CUR)
            self.places[key] = self.file.tell(), array.nbytes
            np.ascontiguousarray(array).tofile(self.file)
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor = TensorProto(name=name, data_type=kind, dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        offset, length = self.places[key]
        for key, value in dict(location="weights.bin", offset=offset, length=length).items():
            tensor.external_data.add(key=key, value=str(value))
        return tensor


class Graph:
    """Nodes, inputs, outputs and weights of one graph, in the order in which they are written."""

    def __init__(self, model, weights, precision):
        self.model, self.cfg, self.weights, self.precision = model, model.config, weights, precision
        self.float = np.float16 if precision == "fp16" else np.float32
        self.nodes, self.inputs, self.outputs, self.tensors, self.count = [], [], [], {}, 0
        self.names = {module: name for name, module in model.named_modules()}

    def declare(self, where, name, shape, dtype):
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype or self.float))
        where.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def input(self, name, *shape, dtype=None):
        return self.declare(self.inputs, name, shape, dtype)

    def output(self, name, *shape):
        return self.declare(self.outputs, name, shape, None)

    def op(self, kind, *inputs, outputs=1, domain="", **attributes):
        """Adds a node. `outputs` is how many it has, or their names, "" for one that is not wanted.
        Returns them, a single one bare."""
        self.count += 1
        name = f"{kind}_{self.count}"
        if isinstance(outputs, int):
            outputs = [f"{name}_{i}" for i in range(outputs)]
        node = helper.make_node(kind, inputs, outputs, name=name, domain=domain, **attributes)
        self.nodes.append(node)
        return outputs[0] if len(outputs) == 1 else outputs

    def weight(self, name, array):
        """A large array, which stands in weights.bin."""
        if name not in self.tensors:
            array = array.astype(self.float) if array.dtype == np.float32 else array
            self.tensors[name] = self.weights.add(name, array)
        return name

    def ints(self, *values):
        return self.vector("ints_" + "_".join(map(str, values)), np.array(values, np.int64))

    def number(self, value):
        return self.vector(f"number_{value:g}", np.array(value, self.float))

    def vector(self, name, array):
        """A small array, which stands in the graph itself."""
        self.tensors[name] = onnx.numpy_helper.from_array(array, name)
        return name

    def keys_values(self, x, attn, rope, seen=None):
        """Keys and values of x; keys of `seen`, where it is given. Axis 1 of both is the time."""
        k = self.heads(self.linear(seen or x, attn.wk), attn.k_norm, attn.n_kv_head, rope)
        if attn.cross_next:  # the first head lies one place later, behind a zero
            first = np.arange(attn.n_kv_head * attn.head_dim) < attn.head_dim
            first = first.reshape(-1, 1, attn.head_dim) if isinstance(self, Plain) else first
            later = self.op("Pad", k, self.ints(0, 1, 0, 0, -1, 0))
            k = self.op("Where", self.vector("first_head", first), later, k)
        return k, self.heads(self.linear(x, attn.wv), None, attn.n_kv_head, None)

    def parameters(self, module):
        """The name of a module, its weight and its bias, as arrays."""
        self.weights.modules.add(self.names[module])
        bias = getattr(module, "bias", None)
        return self.names[module], array(module.weight), None if bias is None else array(bias)

    def linear(self, x, module):
        """x (..., K) -> (..., N)"""
        return self.matmul(x, *self.parameters(module))

    def save(self, folder, name):
        tensors = list(self.tensors.values())
        graph = helper.make_graph(self.nodes, name, self.inputs, self.outputs, tensors)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MS, 1)]
        how = dict(producer_name="nanoEncDec", ir_version=10, opset_imports=opsets)
        model = helper.make_model(graph, **how)
        with open(os.path.join(folder, f"{name}.onnx"), "wb") as file:
            file.write(model.SerializeToString())


def array(tensor):
    return tensor.detach().float().cpu().numpy()


# ----------------------------------------------------------------------------------------------
# The model, in either dialect


def mlp(g, x, module):
    up = g.linear(x, module.up)
    if module.gate is None:
        return g.linear(g.op("Gelu", up, approximate="tanh"), module.down)
    return g.linear(g.op("Mul", g.silu(g.linear(x, module.gate)), up), module.down)


def encoder_graph(g):
    """Gives memory_key_i and memory_value_i (B, H_kv, S, D), i over the decoder's layers."""
    x = embedded = g.embedding(g.encoder_inputs())
    for block in g.model.enc:
        x = g.op("Add", x, g.self_attention(g.norm(x, block.attn_norm), block.attn))
        x = g.op("Add", x, mlp(g, g.norm(x, block.mlp_norm), block.mlp))
    h = g.norm(x, g.model.enc_norm)
    seen = g.op("Add", h, embedded) if g.cfg.embed_skip else h
    for i, block in enumerate(g.model.dec):
        g.give_memory(h, h if i else seen, block.cross, i)
    return g


def decoder_graph(g):
    """Reads memory, and past_key_i and past_value_i (B, H_kv, slots, D) -> logits (N, V), and key_i
    and value_i, to be bound to the memory of past_key_i and past_value_i."""
    x = embedded = g.embedding(g.decoder_inputs())
    g.output("logits", g.kept, g.cfg.vocab_size)
    for i, block in enumerate(g.model.dec):
        x = g.op("Add", x, g.self_attention(g.norm(x, block.attn_norm), block.attn, i))
        if block.cross is not None:
            h = g.norm(x, block.cross_norm)
            h = g.op("Add", h, embedded) if block.cross.embed_skip else h
            x = g.op("Add", x, g.cross_attention(h, block.cross, i))
        x = g.op("Add", x, mlp(g, g.norm(x, block.mlp_norm), block.mlp))
    g.output_layer(g.norm(x, g.model.dec_norm))
    return g


# ----------------------------------------------------------------------------------------------
# Weights in few bits


def block_of(k):
    """How many weights share one scale: 128, the fastest to read, where K allows it."""
    return next((block for block in (128, 64, 32) if k % block == 0), 128)


def quantize_blocks(weight, bits, block):
    """(N, K) -> (packed (N, blocks, bytes) uint8, scales (N, blocks)), symmetric around
    2^(bits - 1), by ONNX Runtime's own quantizer."""
    from onnxruntime.capi import _pybind_state as runtime

    n, k = weight.shape
    blocks = -(-k // block)
    packed = np.zeros((n, blocks, block * bits // 8), np.uint8)
    scales, zeros = np.zeros((n, blocks), np.float32), np.zeros((n, blocks), np.uint8)
    quantize = runtime.quantize_matmul_4bits if bits == 4 else runtime.quantize_matmul_8bits
    quantize(packed, np.ascontiguousarray(weight.T), scales, zeros, block, n, k, True)
    return packed, scales


def quantize_rows(weight):
    """(N, K) -> (int8 (N, K), scales (N,)): one scale for an output channel, codes from -64 to 64.
    CPUs without VNNI add two products in 16 bits, where 255 * 64 * 2 fits and 255 * 127 * 2 does
    not: with 8 bits, such a CPU would be silently wrong."""
    scales = np.maximum(np.abs(weight).max(1), 1e-12) / 64
    return np.round(weight / scales[:, None]).astype(np.int8), scales.astype(np.float32)


# ----------------------------------------------------------------------------------------------
# Two dialects of operators, with the same methods: ONNX Runtime's, and the plain ones of --static


class Fused(Graph):
    """x is (B, T, C). `products` says how matrices are multiplied: "float"; "integer", fastest for
    many tokens; "blocks8" and "blocks4", fastest for one. Embeddings and the output layer have 8
    bits in int4, too: in 4, they cost two thirds of what it loses."""

    def __init__(self, model, weights, precision, products):
        super().__init__(model, weights, precision)
        self.products, self.coded, self.bits = products, {}, 8 * precision.startswith("int")

    def encoder_inputs(self):
        """tokens (B, S), positions: rows of the tables cos and sin; last (B,): each row's length
        - 1; total: S."""
        tokens = self.input("tokens", "rows", "new", dtype=np.int64)
        self.last = self.input("last", "rows", dtype=np.int32)
        self.total = self.input("total", dtype=np.int32)
        self.rope, self.cross_rope = self.rope_inputs(""), None
        if self.cfg.cross_rope and self.cfg.n_enc:
            self.cross_rope = self.rope_inputs("cross_")
        return tokens

    def rope_inputs(self, kind):
        half, slots = self.cfg.head_dim // 2, f"{kind}slots"
        positions = self.input(f"{kind}positions", "rows", "new", dtype=np.int64)
        tables = [self.input(name, slots, half) for name in (f"{kind}cos", f"{kind}sin")]
        return positions, *tables

    def decoder_inputs(self):
        """The same, of the new tokens behind the caches, and: source (B, S), 1 at its real tokens;
        keep (N,): positions of the flattened tokens whose logits are wanted."""
        self.source = None
        if self.cfg.n_enc:
            self.source = self.input("source", "rows", "source", dtype=np.int32)
        self.keep, self.kept = self.input("keep", "kept", dtype=np.int64), "kept"
        return self.encoder_inputs()

    def matmul(self, x, name, weight, bias):
        """x (..., K) times weight (N, K)"""
        if self.products == "integer":
            y = self.integer_matmul(x, name, weight)
        elif self.products == "float":
            y = self.op("MatMul", x, self.weight(f"{name}.weight", weight.T))
        else:
            y = self.block_matmul(x, name, weight, int(self.products[6:]))
        return y if bias is None else self.op("Add", y, self.weight(f"{name}.bias", bias))

    def integer_matmul(self, x, name, weight):
        """Every token has a scale of its own, so that it does not depend on its neighbours: its
        largest value becomes 1, and 1 becomes the code 128 + 127."""
        step, zero = self.number(1 / 127), self.vector("code_128", np.array(128, np.uint8))
        if x not in self.coded:  # query, key and value read the same
            size = self.op("ReduceMax", self.op("Abs", x), self.ints(-1))
            size = self.op("Max", size, self.number(1e-9))
            unit = self.op("Mul", x, self.op("Reciprocal", size))
            self.coded[x] = self.op("QuantizeLinear", unit, step, zero), size
        (codes, size), (packed, scales) = self.coded[x], quantize_rows(weight)
        packed = self.weight(f"{name}.int8", packed.T)
        scales = self.weight(f"{name}.scales", scales)
        y = self.op("MatMulIntegerToFloat", codes, packed, step, scales, zero, domain=MS)
        return self.op("Mul", y, size)

    def block_matmul(self, x, name, weight, bits, **outputs):
        (n, k), block = weight.shape, block_of(weight.shape[1])
        packed, scales = quantize_blocks(weight, bits, block)
        packed = self.weight(f"{name}.int{bits}", packed)
        scales = self.weight(f"{name}.scales{bits} as list", scales.reshape(-1))
        how = dict(N=n, K=k, bits=bits, block_size=block, accuracy_level=4)
        return self.op("MatMulNBits", x, packed, scales, domain=MS, **how, **outputs)

    def embedding(self, tokens):
        name, weight, _ = self.parameters(self.model.embed)
        if self.bits:
            block = block_of(self.cfg.n_embd)
            packed, scales = quantize_blocks(weight, self.bits, block)
            packed = self.weight(f"{name}.int{self.bits} as rows", packed.reshape(len(weight), -1))
            scales = self.weight(f"{name}.scales{self.bits}", scales)
            how = dict(bits=self.bits, block_size=block, gather_axis=0, quantize_axis=1)
            x = self.op("GatherBlockQuantized", packed, tokens, scales, domain=MS, **how)
        else:
            x = self.op("Gather", self.weight(name, weight), tokens)
        return self.op("Mul", x, self.number(self.model.embed_scale.item()))

    def output_layer(self, h):
        """Logits at the positions `keep`. Tied, the weights are those that `embedding` reads."""
        h = self.op("Gather", self.op("Reshape", h, self.ints(-1, self.cfg.n_embd)), self.keep)
        module = self.model.embed if self.model.head is None else self.model.head
        name, weight, _ = self.parameters(module)
        if self.bits:
            self.block_matmul(h, name, weight, self.bits, outputs=["logits"])
        else:
            weight = self.weight(name, weight)
            self.op("FusedMatMul", h, weight, domain=MS, outputs=["logits"], transB=1)

    def norm(self, x, module):
        name, weight, _ = self.parameters(module)
        how = dict(axis=-1, epsilon=module.eps, stash_type=1)
        return self.op("SimplifiedLayerNormalization", x, self.weight(name, weight), **how)

    def silu(self, x):
        return self.op("QuickGelu", x, domain=MS, alpha=1.0)

    def heads(self, x, norm, n_head, rope):
        """Queries or keys (B, T, H * D): normed head by head where the model does, and rotated."""
        if isinstance(norm, torch.nn.RMSNorm):
            x = self.op("Reshape", x, self.ints(0, -1, n_head, self.cfg.head_dim))
            x = self.norm(x, norm)
            x = self.op("Reshape", x, self.ints(0, -1, n_head * self.cfg.head_dim))
        if rope is None:
            return x
        return self.op("RotaryEmbedding", x, *rope, domain=MS, num_heads=n_head)

    def self_attention(self, x, attn, layer=None):
        """GroupQueryAttention masks by each row's own length, and writes keys and values into the
        caches of decoder layer `layer`. The encoder has none."""
        H, D = attn.n_kv_head, attn.head_dim
        q = self.heads(self.linear(x, attn.wq), attn.q_norm, attn.n_head, self.rope)
        past, present = ["", ""], []
        if layer is not None:
            names = f"key_{layer}", f"value_{layer}"
            past = [self.input(f"past_{name}", "rows", H, "slots", D) for name in names]
            present = [self.output(name, "rows", H, "slots", D) for name in names]
        inputs = [q, *self.keys_values(x, attn, self.rope), *past, self.last, self.total]
        how = dict(num_heads=attn.n_head, kv_num_heads=H, causal=int(layer is not None))
        y = f"attended_{self.count}"
        self.op("GroupQueryAttention", *inputs, outputs=[y, *present], domain=MS, **how)
        return self.linear(y, attn.wo)

    def give_memory(self, h, seen, attn, layer):
        for part, y in zip(("key", "value"), self.keys_values(h, attn, self.cross_rope, seen)):
            y = self.op("Reshape", y, self.ints(0, -1, attn.n_kv_head, attn.head_dim))
            shape = "rows", attn.n_kv_head, "source", attn.head_dim
            name = self.output(f"memory_{part}_{layer}", *shape)
            self.op("Transpose", y, perm=[0, 2, 1, 3], outputs=[name])

    def cross_attention(self, x, attn, layer):
        """MultiHeadAttention knows no groups: the query heads of a group are laid out along T.
        (B, T, H * D) with the heads in the order (member of its group, group) is
        (B, T * H / H_kv, H_kv * D) without a copy."""
        H, D, members = attn.n_kv_head, attn.head_dim, attn.n_head // attn.n_kv_head
        order = np.arange(members * H * D).reshape(H, members, D).transpose(1, 0, 2).reshape(-1)
        name, weight, bias = self.parameters(attn.wq)
        q = self.matmul(x, name, weight[order], None if bias is None else bias[order])
        q = self.heads(q, attn.q_norm, attn.n_head, self.cross_rope)
        q = self.op("Reshape", q, self.ints(0, -1, H * D)) if members > 1 else q
        names = f"memory_key_{layer}", f"memory_value_{layer}"
        memory = [self.input(name, "rows", H, "source", D) for name in names]
        y = self.op("MultiHeadAttention", q, *memory, "", self.source, domain=MS, num_heads=H)
        y = self.op("Reshape", y, self.ints(0, -1, members * H * D)) if members > 1 else y
        name, weight, bias = self.parameters(attn.wo)
        return self.matmul(y, name, weight[:, order], bias)


class Plain(Graph):
    """ONNX's own operators and shapes that are fixed, the form that compilers for NPUs take. One
    prompt at a time: x is (1, T, C), keys and values are (H_kv, S, D)."""

    def __init__(self, model, weights, precision, T, S, slots):
        super().__init__(model, weights, precision)
        self.T, self.S, self.slots, self.raw = T, S, slots, set()

    def encoder_inputs(self, width=None):
        """tokens (1, T); mask (1, 1 or T, S), 0 or OUTSIDE; RoPE's tables at the positions."""
        shape, self.cross_rope = (1, self.T, self.cfg.head_dim // 2), None
        self.rope = [self.input(name, *shape) for name in ("cos", "sin")]
        if self.cfg.cross_rope and self.cfg.n_enc:
            self.cross_rope = [self.input(name, *shape) for name in ("cross_cos", "cross_sin")]
        self.mask = self.input("mask", 1, self.T if width else 1, width or self.S)
        return self.input("tokens", 1, self.T, dtype=np.int64)

    def decoder_inputs(self):
        """The same, and: at (H_kv * T, 1), the rows of the caches that the tokens take; source
        (1, 1, S): 0 or runtime.OUTSIDE; keep (1,): which of the tokens gives the logits."""
        self.at = self.input("at", self.cfg.n_kv_head * self.T, 1, dtype=np.int64)
        self.keep, self.kept = self.input("keep", 1, dtype=np.int64), 1
        self.source = self.input("source", 1, 1, self.S) if self.cfg.n_enc else None
        return self.encoder_inputs(self.slots)

    def matrix(self, name, weight, axis):
        """The name of a matrix, whose outputs lie along `axis`; in int8, of codes times scales."""
        if self.precision == "fp32":
            return self.weight(name, weight)
        codes, scales = quantize_rows(np.moveaxis(weight, axis, 0))
        codes = self.weight(f"{name}.int8", np.moveaxis(codes, 0, axis))
        return self.decoded(codes, self.vector(f"{name}.scales", scales), axis=axis)

    def decoded(self, codes, scales, **how):
        """Codes of weights as floats, which `quantize` leaves alone."""
        y = self.op("DequantizeLinear", codes, scales, **how)
        self.raw.add(y)
        return y

    def matmul(self, x, name, weight, bias):
        y = self.op("MatMul", x, self.matrix(f"{name}.weight", weight.T, 1))
        return y if bias is None else self.op("Add", y, self.vector(f"{name}.bias", bias))

    def embedding(self, tokens):
        """In int8, rows of codes times their scales: what the output layer reads too."""
        (name, weight, _), scale = self.parameters(self.model.embed), self.model.embed_scale.item()
        if self.precision == "fp32":
            x = self.op("Gather", self.weight(name, weight), tokens)
            return self.op("Mul", x, self.number(scale))
        codes, scales = quantize_rows(weight)
        x = self.op("Gather", self.weight(f"{name}.int8", codes), tokens)
        self.raw.add(x)
        sizes = self.vector(f"{name}.sizes", scales[:, None] * np.float32(64 * scale))
        x = self.decoded(x, self.vector("1/64", np.array(1 / 64, np.float32)))
        return self.op("Mul", x, self.op("Gather", sizes, tokens))

    def output_layer(self, h):
        h = self.op("Gather", self.op("Reshape", h, self.ints(-1, self.cfg.n_embd)), self.keep)
        module = self.model.embed if self.model.head is None else self.model.head
        name, weight, _ = self.parameters(module)
        self.op("Gemm", h, self.matrix(name, weight, 0), transB=1, outputs=["logits"])

    def norm(self, x, module):
        name, weight, _ = self.parameters(module)
        square = self.op("ReduceMean", self.op("Mul", x, x), self.ints(-1))
        size = self.op("Sqrt", self.op("Add", square, self.number(module.eps)))
        return self.op("Mul", self.op("Div", x, size), self.vector(f"{name}.weight", weight))

    def silu(self, x):
        return self.op("Mul", x, self.op("Sigmoid", x))

    def heads(self, x, norm, n_head, rope):
        """Queries or keys (1, T, H * D) -> (H, T, D), normed and rotated."""
        x = self.op("Reshape", x, self.ints(-1, n_head, self.cfg.head_dim))
        x = self.norm(x, norm) if isinstance(norm, torch.nn.RMSNorm) else x
        x = self.op("Transpose", x, perm=[1, 0, 2])
        if rope is None:
            return x
        cos, sin = rope
        a, b = self.op("Split", x, outputs=2, axis=-1, num_outputs=2)
        left = self.op("Sub", self.op("Mul", a, cos), self.op("Mul", b, sin))
        right = self.op("Add", self.op("Mul", b, cos), self.op("Mul", a, sin))
        return self.op("Concat", left, right, axis=-1)

    def attend(self, x, attn, memory, mask, rope):
        """x (1, T, C) looks at keys and values (H_kv, S, D) under mask (1, T or 1, S)."""
        (keys, values), H, D = memory, attn.n_kv_head, attn.head_dim
        q = self.heads(self.linear(x, attn.wq), attn.q_norm, attn.n_head, rope)
        q = self.op("Reshape", self.op("Mul", q, self.number(D**-0.5)), self.ints(H, -1, D))
        scores = self.op("MatMul", q, self.op("Transpose", keys, perm=[0, 2, 1]))
        scores = self.op("Reshape", scores, self.ints(attn.n_head, self.T, -1))
        scores = self.op("Softmax", self.op("Add", scores, mask), axis=-1)
        scores = self.op("Reshape", scores, self.ints(H, attn.n_head // H * self.T, -1))
        y = self.op("Reshape", self.op("MatMul", scores, values), self.ints(attn.n_head, -1, D))
        y = self.op("Transpose", y, perm=[1, 0, 2])
        return self.linear(self.op("Reshape", y, self.ints(1, -1, attn.n_head * D)), attn.wo)

    def self_attention(self, x, attn, layer=None):
        memory = self.keys_values(x, attn, self.rope)
        if layer is not None:
            shape = attn.n_kv_head * self.slots, attn.head_dim
            caches = []
            for part, new in zip(("key", "value"), memory):
                past = self.input(f"past_{part}_{layer}", *shape)
                new = self.op("Reshape", new, self.ints(-1, attn.head_dim))
                name = self.output(f"{part}_{layer}", *shape)
                cache = self.op("ScatterND", past, self.at, new, outputs=[name])
                caches.append(self.op("Reshape", cache, self.ints(attn.n_kv_head, -1, shape[1])))
            memory = caches
        return self.attend(x, attn, memory, self.mask, self.rope)

    def give_memory(self, h, seen, attn, layer):
        shape = attn.n_kv_head, self.S, attn.head_dim
        for part, y in zip(("key", "value"), self.keys_values(h, attn, self.cross_rope, seen)):
            name = self.output(f"memory_{part}_{layer}", *shape)
            self.op("Reshape", y, self.ints(*shape), outputs=[name])

    def cross_attention(self, x, attn, layer):
        shape = attn.n_kv_head, self.S, attn.head_dim
        memory = [self.input(f"memory_{part}_{layer}", *shape) for part in ("key", "value")]
        return self.attend(x, attn, memory, self.source, self.cross_rope)


# ----------------------------------------------------------------------------------------------
# --static --precision=int8: every activation is rounded to 16 bits over the range that it was seen
# to have, weights have 8. No product is of 8 bits on both sides, so none can saturate.


def activations(g):
    """The names of what is rounded."""
    floats = [
        item.name for item in g.inputs if item.type.tensor_type.elem_type == TensorProto.FLOAT
    ]
    made = [name for node in g.nodes for name in node.output if name not in g.raw]
    return [name for name in (*floats, *made) if name != "logits"]


def watched(g):
    """The graph with two more outputs, least and largest, of what `activations` names."""
    names = activations(g)
    for item in (*g.inputs, *g.outputs):
        if item.name in ("keep", "logits"):  # of every position, so that their ranges are seen
            item.type.tensor_type.shape.dim[0].dim_param = "kept"
    for kind, output in (("ReduceMin", "least"), ("ReduceMax", "largest")):
        ends = [g.op("Reshape", g.op(kind, name, keepdims=0), g.ints(1)) for name in names]
        g.op("Concat", *ends, axis=0, outputs=[g.output(output, len(names))])
    return g, names


class Watching(Static):
    """A static export of `watched` graphs, which notes the ranges that it sees."""

    def run(self, graph, feeds):
        if "keep" in feeds:
            every = np.arange(feeds["tokens"].shape[1])
            feeds = feeds | dict(keep=np.minimum(every, feeds["keep"]))
        outputs = super().run(graph, feeds)
        graph = "encoder" if graph == "encoder" else "decoder"  # prefill's nodes are the decoder's
        low, high = outputs.pop("least"), outputs.pop("largest")
        lowest, highest = self.ranges.get(graph, (low, high))
        self.ranges[graph] = np.minimum(low, lowest), np.maximum(high, highest)
        return outputs


def calibrate(folder, names, batch):
    """Reads rows through watched graphs -> for each graph, name -> (least, largest)."""
    twin, (src, tgt, _) = Watching(folder), batch
    twin.ranges = {}
    for b, row in enumerate(tgt):
        memory, ids = {}, row[: 1 + (row != twin.config.pad_id).nonzero()[0].max(initial=0)]
        if src is not None:
            source = src[b][src[b] != twin.config.pad_id].tolist()
            # Half of every other one: masked scores should be seen too.
            memory = twin.encode([source[: len(source) // (2 - b % 2)]])
        inputs = np.array([[max(0, twin.config.bos_id), *ids[:-1]]])
        twin.request([len(ids)], 1, memory).feed(inputs, [len(ids)], np.array([len(ids) - 1]))
    return {graph: dict(zip(names[graph], zip(*twin.ranges[graph]))) for graph in twin.ranges}


def quantize(g, ranges):
    """Puts QuantizeLinear and DequantizeLinear behind every activation; constants become codes."""

    def scales(name, low, high):
        low, high = min(float(low), 0.0), max(float(high), 1e-6)  # 0 stays 0
        scale = np.array((high - low) / 65535, np.float32)
        zero = np.array(round(-low / float(scale)), np.uint16)
        return g.vector(f"{name}.scale", scale), g.vector(f"{name}.zero", zero), scale, zero

    def round_off(source, name, target):
        scale, zero, *_ = scales(name, *ranges[name.removeprefix("past_")])
        codes = g.op("QuantizeLinear", source, scale, zero)
        g.op("DequantizeLinear", codes, scale, zero, outputs=[target])

    inputs = {item.name for item in g.inputs}
    rounded, renamed, nodes, g.nodes = set(activations(g)), {}, g.nodes, []
    for name in rounded & inputs:
        renamed[name] = f"{name}.rounded"
        round_off(name, name, renamed[name])
    for node in nodes:
        for i, name in enumerate(node.input if node.op_type != "DequantizeLinear" else ()):
            tensor = g.tensors.get(name, TensorProto())
            if tensor.data_type == TensorProto.FLOAT and name not in renamed:  # a constant
                values = onnx.numpy_helper.to_array(tensor)
                *names, scale, zero = scales(name, values.min(), values.max())
                codes = np.clip(np.round(values / scale) + zero, 0, 65535).astype(np.uint16)
                codes, renamed[name] = g.vector(f"{name}.codes", codes), f"{name}.rounded"
                g.op("DequantizeLinear", codes, *names, outputs=[renamed[name]])
            node.input[i] = renamed.get(name, name)
        outputs = list(node.output)
        node.output[:] = [f"{name}.exact" if name in rounded else name for name in outputs]
        g.nodes.append(node)
        for name in outputs:
            if name in rounded:
                round_off(f"{name}.exact", name, name)
    used = {name for node in g.nodes for name in node.input}
    g.tensors = {name: tensor for name, tensor in g.tensors.items() if name in used}


# ----------------------------------------------------------------------------------------------
# Files


def write(model, folder, precision, objective="seq2seq"):
    """Writes the graphs, their weights, and what lib/runtime.py has to know, into a new folder."""
    weights = Weights(folder)
    # A decoder beside an encoder reads one token at a time, for which blocks are fastest. One
    # without reads the prompt too, 1.8 times as fast in integers.
    many = dict(int8="integer", int4="integer").get(precision, "float")
    few = dict(int8="blocks8", int4="blocks4").get(precision, "float")
    if model.config.n_enc:
        encoder_graph(Fused(model, weights, precision, many)).save(folder, "encoder")
    elif precision == "int8":
        few = many
    decoder_graph(Fused(model, weights, precision, few)).save(folder, "decoder")
    describe(folder, weights, model, precision=precision, objective=objective, static=False)


def write_static(model, folder, precision, objective, lengths, batch):
    """As `write`, for one prompt of at most lengths[0] tokens and lengths[1] positions of the
    decoder. batch: the rows that activations have their ranges from."""
    (S, slots), weights = lengths, Weights(folder)
    widths = dict(decoder=1)
    if not model.config.n_enc:
        slots = -(-slots // CHUNK) * CHUNK  # the last chunk of a prompt may be padding
        widths = dict(prefill=CHUNK, decoder=1)
    about = dict(precision=precision, objective=objective, static=True)

    def graphs():
        for name, T in widths.items():
            yield name, decoder_graph(Plain(model, weights, precision, T, S, slots))
        if model.config.n_enc:
            yield "encoder", encoder_graph(Plain(model, weights, precision, S, S, slots))

    ranges, names = {}, {}
    if precision == "int8":
        for name, g in graphs():
            g, names[name] = watched(g)
            g.save(folder, name)
        describe(folder, weights, model, **about)
        ranges = calibrate(folder, names, batch)
    for name, g in graphs():
        if precision == "int8":
            quantize(g, ranges["encoder" if name == "encoder" else "decoder"])
        g.save(folder, name)
    describe(folder, weights, model, **about)


def describe(folder, weights, model, **about):
    """export.json, once every parameter of the model stands in a graph."""
    weights.file.flush()
    for name, _ in model.named_parameters():
        if name.rpartition(".")[0] not in weights.modules:
            raise UserError(f"model.py has {name}, which the graphs of export.py do not know")
    names = {field.name for field in fields(About)} & vars(model.config).keys()
    about |= {name: getattr(model.config, name) for name in names}
    write_json(os.path.join(folder, FILE), about)


# ----------------------------------------------------------------------------------------------
# Held-out rows, for the report


def held_out(run, objective, tokenizer, cfg):
    """A batch (src, tgt, loss_mask) of 16 rows, and where it is from: the run's own samples, or,
    for weights of others, the source of Python's library. The training data may be gone."""
    path = os.path.join(run, "samples.json")
    if not os.path.exists(path):
        return library_rows(objective, tokenizer, cfg), "of the Python library"
    batch = read_json(path)
    try:
        tgt, mask = np.array(batch["tgt"], np.int64), np.array(batch["loss_mask"], bool)
        src = np.array(batch["src"], np.int64) if cfg.n_enc else None
        ids = tgt if src is None else np.concatenate((src, tgt), axis=1)
        fits = mask.shape == tgt.shape and mask.any()
        if not fits or ids.min() < 0 or ids.max() >= cfg.vocab_size:
            raise ValueError
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UserError(f"{path} is damaged: remove it, and the report takes other text") from None
    return (src, tgt, mask), "that the run kept"


def library_rows(name, tokenizer, cfg):
    lengths = max(8, min(256, cfg.src_len or cfg.tgt_len)), max(8, min(64, cfg.tgt_len))
    objective = OBJECTIVES[name if name in ("span", "causal", "ul2") else "prefix"]
    objective = objective(tokenizer, *lengths)
    ids = np.array(tokenizer.encode(inspect.getsource(argparse) + inspect.getsource(inspect)))
    starts = np.linspace(0, len(ids), 16).astype(int)[:, None]
    windows = np.take(ids, starts + np.arange(objective.window), mode="wrap")
    u = uniforms(0, 0, range(16), objective.n_random)
    return make_batch(*objective.rows(windows, u), tokenizer, cfg.n_enc == 0)


def fitting(batch, src_len, tgt_len):
    """The rows, cut to what a static export takes. A decoder-only row keeps its end: what is
    scored comes last."""
    src, tgt, mask = batch
    if src is not None:
        return src[:, :src_len], tgt[:, :tgt_len], mask[:, :tgt_len]
    width = min(tgt_len, tgt.shape[1])
    ends = tgt.shape[1] - mask[:, ::-1].argmax(1)  # behind the last target
    places = np.maximum(ends - width, 0)[:, None] + np.arange(width)
    return None, np.take_along_axis(tgt, places, 1), np.take_along_axis(mask, places, 1)


def prompts_of(batch, cfg, room):
    """What is asked in the report: the source or, decoder-only, what comes before the targets, at
    most `room` tokens of it."""
    src, tgt, mask = batch
    if src is not None:
        return [row[row != cfg.pad_id].tolist() for row in src]
    first = mask.argmax(1)
    first = np.where(first > 1, first, mask.sum(1) // 2)  # all are targets: half of them
    return [row[max(0, n - room) : n].tolist() for row, n in zip(tgt, first)]


# ----------------------------------------------------------------------------------------------
# Does the export say what torch says?


def inputs_of(tgt, bos_id):
    """What the decoder reads to predict tgt (B, T): without a begin token, from its second on."""
    return shift_right(tgt, bos_id)[:, int(bos_id < 0) :]


@torch.no_grad()
def prove(model, twin):
    """UserError unless float32 graphs say what torch says in training: for one row and several,
    for short sources and ones past the trained length, for pasts of several lengths."""
    # Graphs know of no trained length, so a short one will do.
    model, twin, rng, steps = copy.copy(model), copy.copy(twin), np.random.default_rng(0), 3
    short = dict(src_len=min(64, model.config.src_len), tgt_len=64)
    model.config, twin.config = (replace(x.config, **short) for x in (model, twin))
    cfg = model.config
    cases = [([5], [4]), ([1, 9, 4], [2, 6, 3]), ([cfg.src_len + 8], [cfg.tgt_len + 5])]
    if twin.config.static:
        longest = twin.shapes["encoder"]["tokens"][1] if cfg.n_enc else 1
        slots = twin.shapes["decoder"]["mask"][-1]
        cases = [([1], [1]), ([longest], [slots - 3])]
    for sources, pasts in cases:
        rows, pasts = np.arange(len(pasts)), np.array(pasts)
        shape = len(pasts), max(*sources, *pasts) + steps + 1
        draw = torch.from_numpy(rng.integers(0, cfg.vocab_size - 1, shape))
        draw += draw >= cfg.pad_id  # no padding among them
        src, tgt, memory = None, draw[:, : max(pasts) + steps + (cfg.bos_id < 0)], {}
        if cfg.n_enc:
            src = draw.flip(1)[:, : max(sources)]
            src[torch.arange(max(sources)) >= torch.tensor(sources)[:, None]] = cfg.pad_id
            memory = twin.encode([row[:n].tolist() for row, n in zip(src, sources)])
        wanted = model.logits(model.states(src, tgt)).numpy()[:, int(cfg.bos_id < 0) :]
        tokens, width = inputs_of(tgt, cfg.bos_id).numpy(), max(pasts)
        request = twin.request(pasts, steps + 1, memory)
        logits = request.feed(tokens[:, :width], pasts, rows * width + pasts - 1)
        for step in range(steps + 1):
            expected = wanted[rows, pasts + step - 1]
            apart, largest = np.abs(logits - expected).max(), np.abs(expected).max()
            if not apart <= 1e-4 * max(1, largest):  # a NaN is not
                raise UserError(
                    f"the graphs do not say what model.py says: logits are {apart:.2g} apart. Has "
                    "model.py been edited? Then mlp, heads or the graphs here must be, too"
                )
            if step < steps:
                logits = request.step(tokens[rows, pasts + step])


@torch.no_grad()
def compare(model, twin, batch, prompts, new):
    """Beside torch in float32, on held-out rows: the largest difference of a logit, the loss of
    both, and the share of the tokens of torch's greedy answers, of `new` tokens each, that the
    export would have chosen as well."""
    (src, tgt, mask), bos, cfg = batch, model.config.bos_id, model.config
    mask = mask & (np.arange(tgt.shape[1]) >= int(bos < 0))  # nothing predicts the first token
    losses, widest, largest = np.zeros(2), 0.0, 0.0
    for b in range(len(prompts)):
        memory, one, seen = {}, None, torch.from_numpy(mask[b : b + 1])
        if src is not None:
            one = torch.from_numpy(src[b : b + 1])
            memory = twin.encode([src[b][src[b] != cfg.pad_id].tolist()])
        row = torch.from_numpy(tgt[b : b + 1])
        wanted = model.logits(model.states(one, row))
        tokens = inputs_of(row, bos).numpy()
        T = tokens.shape[1]
        logits = twin.request([T], 1, memory).feed(tokens, np.array([T]), np.arange(T))
        logits = torch.from_numpy(logits.astype(np.float32))[None]
        logits = torch.cat((wanted[:, : int(bos < 0)], logits), dim=1)
        both = wanted.log_softmax(-1), logits.log_softmax(-1)
        losses -= [logp.gather(2, row[..., None])[seen].sum().item() for logp in both]
        widest = max(widest, (wanted - logits)[seen].abs().max().item() if seen.any() else 0)
        largest = max(largest, wanted.abs().max().item())
    endless, same, total = copy.copy(model), 0, 0
    endless.config = replace(cfg, eos_id=-1)  # answers of full length
    for prompt in prompts[:4]:
        wanted = [step[0] for step in endless.generate([prompt], new)]
        request, logits = twin.start([prompt], new)
        for step, id in enumerate(wanted):
            same, total = same + int(logits[0].argmax() == id), total + 1
            logits = request.step(np.array([id])) if step < new - 1 else None
    torch_loss, loss = losses / mask.sum()
    found = dict(rows=len(prompts), logit_difference=widest, largest_logit=largest)
    found |= dict(agreement=same / total, torch_loss=torch_loss, loss=loss)
    return found | dict(loss_change=loss / torch_loss - 1)


# ----------------------------------------------------------------------------------------------


def export_run(cfg, folder):
    """Writes an ONNX export of a run -> the report, a dict."""
    objective, tokenizer = read_run(cfg.run)["settings"]["objective"], load_tokenizer(f"{cfg.run}/")
    shape = read_json(os.path.join(cfg.run, "config.json"))
    prefix = shape.get("src_len") and not shape.get("n_enc")
    if prefix or os.path.exists(os.path.join(cfg.run, "vision.json")):
        raise UserError(f"{cfg.run}: ONNX graphs read neither pictures nor a prefix LM's prompt")
    model = Transformer.load(cfg.run).eval()
    config, new, lengths = model.config, 32, None
    batch, origin = held_out(cfg.run, objective, tokenizer, config)
    seen, room = batch, config.tgt_len
    if cfg.static:
        if cfg.src_len and not config.n_enc:
            raise UserError("--src_len: a decoder-only model has no encoder")
        lengths = cfg.src_len or config.src_len, cfg.tgt_len or max(4, config.tgt_len)
        lengths = [min(length, 2**13) for length in lengths]
        new = min(new, lengths[1] // 2)
        batch, room = fitting(batch, *lengths), lengths[1] - new
        # Ranges of activations are not taken from the rows of the report.
        seen, batch = ([p if p is None else p[i % len(p) :: 2] for p in batch] for i in (0, 1))

    def make(precision):
        if not cfg.static:
            write(model, folder, precision, objective)
            return Exported(folder, cfg.threads)
        write_static(model, folder, precision, objective, lengths, seen)
        return Static(folder, cfg.threads)

    try:
        twin = make("fp32")
    except AttributeError as error:
        raise UserError(f"export.py does not know this model.py: {error}") from None
    prove(model, twin)
    if cfg.precision != "fp32":
        del twin
        shutil.rmtree(folder)
        twin = make(cfg.precision)
    report = compare(model, twin, batch, prompts_of(batch, config, room), new)
    if not np.isfinite(report["loss"]):
        raise UserError(f"--precision={cfg.precision} is too narrow: the loss is {report['loss']}")
    tokenizer.save(folder)
    size = sum(entry.stat().st_size for entry in os.scandir(folder))
    named = dict(run=cfg.run, precision=cfg.precision, bytes=size, params=model.num_params())
    return named | report | dict(text=origin)


def to_encdec(model, n_enc, n_dec):
    """A decoder-only model -> an encoder-decoder that starts from it (T5Gemma: Zhang et al., 2025):
    evenly spaced layers in both stacks; each cross-attention begins as the self-attention of its
    layer."""
    cfg = model.config
    n_enc, n_dec = n_enc or cfg.n_dec, n_dec or cfg.n_dec
    if cfg.n_enc or max(n_enc, n_dec) > cfg.n_dec:
        raise UserError(f"--n_enc and --n_dec take layers from the decoder, which has {cfg.n_dec}")
    new = Transformer(replace(cfg, n_enc=n_enc, n_dec=n_dec, src_len=cfg.tgt_len))
    new.load_state_dict(model.state_dict(), strict=False)  # embeddings, the last norm, the head
    new.enc_norm.load_state_dict(model.dec_norm.state_dict())
    for stack in (new.enc, new.dec):
        for i, block in enumerate(stack):
            old = model.dec[round(i * (cfg.n_dec - 1) / max(1, len(stack) - 1))].state_dict()
            cross = {k.replace("attn", "cross"): x for k, x in old.items() if k[:4] == "attn"}
            block.load_state_dict(old | cross, strict=False)  # an encoder's block has no cross
    return new


def write_run(model, place, name, folder, tokenizer=None):
    """A foreign model as a run in a new folder; its tokenizer's file is in `place`."""
    words = load_tokenizer(tokenizer or place)
    weights.fit_vocabulary(model, words, name)
    model.save(folder)
    words.save(folder)
    sizes = {preset: count_params(make_config(preset, "dec")) for preset in PRESETS}
    nearest = min(sizes, key=lambda preset: abs(math.log(sizes[preset] / model.num_params())))
    settings = dict(preset=nearest, src_len=1024, tgt_len=256)
    settings["objective"] = "prefix" if model.config.n_enc else "causal"
    runs.write_run(folder, settings, None, weights_of=name)


def main():
    cfg = read_settings(Settings, __doc__)
    cfg.run = (cfg.run or newest_run()).rstrip("/")
    check(cfg)
    out = (cfg.out or f"{cfg.run}-{'static-' * cfg.static}{cfg.precision}").rstrip("/")
    there = os.listdir(out) if os.path.isdir(out) and not os.path.islink(out) else [out]
    if os.path.lexists(out) and there and not {FILE} <= {*there} <= WRITTEN:
        raise UserError(f"--out={out} holds something else: choose another folder")
    if cfg.threads:
        torch.set_num_threads(min(cfg.threads, os.cpu_count() or 1))
    parent = os.path.dirname(os.path.abspath(out))
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=parent) as fresh:
        new = os.path.join(fresh, "new")  # what is half written is never at `out`
        if cfg.format == "onnx":
            report = export_run(cfg, new)
        else:
            model, place = weights.load_llama(cfg.run[3:], cfg.run)
            if cfg.n_enc or cfg.n_dec:
                model = to_encdec(model, cfg.n_enc, cfg.n_dec)
            write_run(model, place, cfg.run, new, cfg.tokenizer)
        shutil.rmtree(out, ignore_errors=True)
        os.replace(new, out)
    if cfg.json:
        write_json(cfg.json, dict(rows=[report]))
    if cfg.format == "onnx":
        print(REPORT.format(**report))
    print(f'python sample.py --run={out} --prompt="..." talks to it')


if __name__ == "__main__":
    script(main)
