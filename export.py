"""Turns a run into a folder that needs no torch, ONNX graphs for ONNX Runtime; and weights of others into runs, and back.

    python export.py --run=out/encdec-nano-pycode                     to out/encdec-nano-pycode-fp32
    python export.py --run=RUN --precision=int8 --out=FOLDER          int8: a quarter of the size
    python export.py --run=RUN --static --precision=16x8 --src_len=512 --tgt_len=128      fixed shapes, for NPUs
    python sample.py --run=FOLDER --prompt="..."                      talks to it, without torch
    python export.py --run=hf:FOLDER_OR_ID --format=run --out=RUN     a Llama-family model becomes a decoder-only run
    python export.py --run=mu:FILE --format=run --out=RUN --tokenizer=FILE               the paper's released checkpoint becomes a run
    python export.py --run=RUN --format=hf                            a decoder-only run becomes a folder for `transformers`

Two graphs share one file of weights. The encoder's reads a source and gives every decoder layer's cross-attention keys and
values. The decoder's reads any number of tokens behind what its caches hold, writes their keys and values into the caches in
place, and gives logits at the positions it is asked for. A decoder-only model is the second graph alone. A run of vision.py has a third, of
its tower and projector, whose tokens the graph that reads the prompt puts in the places of pictures.

The graphs are written here node by node rather than traced by torch.onnx: the reader sees what runs, and ONNX Runtime's fused
operators (GroupQueryAttention, MultiHeadAttention, RotaryEmbedding, SkipSimplifiedLayerNormalization, MatMulNBits) stand in them
from the start instead of having to be found again in a trace.
"""
import contextlib
import copy
import json
import math
import os
import pickle
import shutil
from dataclasses import asdict, dataclass, replace

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file
from tqdm import tqdm

from lib.settings import UserError, given, parse, script, setting
from data.corpus import prepare
from lib.weights import PREFIXES, about_of, config_of, llama_names, local_folder, mu_names, read_about, weight_files
from lib.runtime import FILE, Exported, Static, is_export
from data.images import VisionConfig
from data.objectives import Objective, uniforms
from data.pairs import Pairs
from data.picture_tasks import PicturePairs, load_picture_task
from lib.runs import newest_run, read_record, write_json
from lib.runs import record as write_record
from data.tasks import load_task
from data.tokenizer import load_tokenizer, to_foreign
from model import PRESETS, Config, Transformer, shift_right
from train import Settings as TrainSettings
from train import evenly, resolve
from vision import VisionLM, load_model, read_tensors, renamed

MS = "com.microsoft"


class Weights:
    """weights.bin: each array once, however many graphs read it."""

    def __init__(self, path):
        self.path, self.places = path, {}
        self.file = open(path, "wb")

    def add(self, name, array):
        """Writes an array, unless one of this name is there, and returns the tensor that refers to it. "embed as rows" is another view of
        the bytes of "embed": the same numbers in another shape."""
        key = name.split(" as ")[0]
        if key not in self.places:
            self.file.seek(-self.file.tell() % 64, os.SEEK_CUR)
            self.places[key] = self.file.tell(), array.nbytes
            np.ascontiguousarray(array).tofile(self.file)
        offset, length = self.places[key]
        tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape, data_location=TensorProto.EXTERNAL)
        for key, value in dict(location=os.path.basename(self.path), offset=offset, length=length).items():
            tensor.external_data.add(key=key, value=str(value))
        return tensor


class Graph:
    """Nodes, inputs, outputs and weights of one graph, in the order in which they are written."""

    def __init__(self, weights, precision, matmul=None):
        self.weights, self.precision, self.matmul = weights, precision, matmul
        self.float = np.float16 if precision == "fp16" else np.float32
        self.nodes, self.inputs, self.outputs, self.tensors, self.quantized = [], [], [], {}, {}

    def declare(self, where, name, shape, dtype):
        where.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape))
        return name

    def input(self, name, *shape, dtype=None):
        return self.declare(self.inputs, name, shape, dtype or self.float)

    def output(self, name, *shape, dtype=None):
        return self.declare(self.outputs, name, shape, dtype or self.float)

    def op(self, kind, *inputs, outputs=1, domain="", **attributes):
        """Adds a node. `outputs` is how many it has, or their names ("" for one that is not wanted); returns them, a single one bare."""
        names = [f"{kind}_{len(self.nodes)}_{i}" for i in range(outputs)] if isinstance(outputs, int) else list(outputs)
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=f"{kind}_{len(self.nodes)}", domain=domain, **attributes))
        return names[0] if len(names) == 1 else names

    def weight(self, name, array):
        if name not in self.tensors:
            self.tensors[name] = self.weights.add(name, array.astype(self.float) if array.dtype == np.float32 else array)
        return name

    def constant(self, *values):
        """A small tensor of int64 that stands in the graph itself."""
        name = "constant_" + "_".join(map(str, values))
        self.tensors[name] = helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
        return name

    def vector(self, name, values):
        """A small constant, in the graph itself."""
        self.tensors[name] = onnx.numpy_helper.from_array(values, name)
        return name

    def save(self, path, name):
        graph = helper.make_graph(self.nodes, name, self.inputs, self.outputs, list(self.tensors.values()))
        model = helper.make_model(graph, producer_name="nanoEncDec", ir_version=10,
                                  opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(MS, 1)])
        with open(path, "wb") as f:
            f.write(model.SerializeToString())


# ---------------------------------------------------------------------------------------------------------------------
# Weights in few bits

def block_of(k):
    """How many weights share one scale: 128, the fastest to read, where K allows it."""
    return next((block for block in (128, 64, 32) if k % block == 0), 128)


def quantize_blocks(weight, bits, block):
    """(N, K) -> (packed (N, blocks, bytes) uint8, scales (N, blocks)), symmetric around 2^(bits - 1), by ONNX Runtime's own quantizer."""
    from onnxruntime.capi import _pybind_state as runtime
    n, k = weight.shape
    blocks = -(-k // block)
    packed, scales = np.zeros((n, blocks, block * bits // 8), np.uint8), np.zeros((n, blocks), np.float32)
    zeros = np.zeros((n, blocks if bits == 8 else -(-blocks // 2)), np.uint8)
    quantize = {4: runtime.quantize_matmul_4bits, 8: runtime.quantize_matmul_8bits}[bits]
    quantize(packed, np.ascontiguousarray(weight.T), scales, zeros, block, n, k, True)
    return packed, scales


def quantize_rows(weight):
    """(N, K) -> (int8 (N, K), scales (N,)): one scale for an output channel."""
    scales = np.maximum(np.abs(weight).max(1), 1e-12) / 127
    return np.round(weight / scales[:, None]).astype(np.int8), scales.astype(np.float32)


def array(tensor):
    return tensor.detach().float().cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Parts of the model: each takes the name of its input and returns that of its output

def linear(g, x, layer, name, order=None):
    """x (..., K) -> (..., N). `order` permutes the outputs."""
    weight, bias = array(layer.weight), None if layer.bias is None else array(layer.bias)
    return matmul(g, x, weight if order is None else weight[order], name, bias if order is None or bias is None else bias[order])


def matmul(g, x, weight, name, bias=None):
    """x (..., K) times weight (N, K), in the form that measured best for the graph and the precision."""
    n, k = weight.shape
    b = "" if bias is None else g.weight(f"{name}.bias", bias)
    if g.matmul == "integer":  # int8 activations with one scale a matrix: ONNX Runtime's fastest for many rows
        if x not in g.quantized:  # query, key and value read the same
            g.quantized[x] = g.op("DynamicQuantizeLinear", x, outputs=3)
        packed, scales = quantize_rows(weight)
        xq, scale, zero = g.quantized[x]
        return g.op("MatMulIntegerToFloat", xq, g.weight(f"{name}.int8", packed.T), scale, g.weight(f"{name}.scales", scales), zero,
                    "", *([b] if b else []), domain=MS)
    if g.matmul.startswith("blocks"):
        bits, block = int(g.matmul[6:]), block_of(k)
        packed, scales = quantize_blocks(weight, bits, block)
        return g.op("MatMulNBits", x, g.weight(f"{name}.int{bits}", packed), g.weight(f"{name}.scales{bits}", scales.reshape(-1)), "", "",
                    *([b] if b else []), domain=MS, N=n, K=k, bits=bits, block_size=block, accuracy_level=4)
    y = g.op("MatMul", x, g.weight(f"{name}.weight", weight.T))
    return g.op("Add", y, b) if b else y


def precision_bits(g):
    return {"int8": 8, "int4": 4}.get(g.precision)


def embedding(g, model, tokens):
    weight, cfg = array(model.embed.weight), model.config
    if precision_bits(g):
        bits, block = precision_bits(g), block_of(cfg.n_embd)
        packed, scales = quantize_blocks(weight, bits, block)
        x = g.op("GatherBlockQuantized", g.weight(f"embed.int{bits} as rows", packed.reshape(len(weight), -1)), tokens,
                 g.weight(f"embed.scales{bits}", scales), domain=MS, bits=bits, block_size=block, gather_axis=0, quantize_axis=1)
    else:
        x = g.op("Gather", g.weight("embed", weight), tokens)
    return x if cfg.embed_scale == 1 else g.op("Mul", x, g.vector("embed_scale", np.array(cfg.embed_scale, g.float)))


def norm(g, x, layer, name):
    return g.op("SimplifiedLayerNormalization", x, g.weight(f"{name}.weight", array(layer.weight)), axis=-1, epsilon=layer.eps, stash_type=1)


def add_norm(g, x, y, layer, name):
    """The residual stream x plus a layer's part y -> (normed, the sum)."""
    normed, _, _, total = g.op("SkipSimplifiedLayerNormalization", x, y, g.weight(f"{name}.weight", array(layer.weight)), domain=MS,
                               epsilon=layer.eps, outputs=[f"normed_{len(g.nodes)}", "", "", f"stream_{len(g.nodes)}"])
    return normed, total


def heads(g, x, layer, n_head, head_dim, name, rope):
    """Queries or keys (B, T, H * D): normed head by head where the model does, and rotated."""
    if hasattr(layer, "weight"):  # QK-norm
        x = g.op("Reshape", x, g.constant(0, -1, n_head, head_dim))
        x = g.op("Reshape", norm(g, x, layer, name), g.constant(0, -1, n_head * head_dim))
    return x if rope is None else g.op("RotaryEmbedding", x, *rope, domain=MS, num_heads=n_head)


def self_attention(g, x, attn, name, rope, last, total, past=("", ""), present=(), causal=1):
    """GroupQueryAttention masks by each row's own length, and writes keys and values behind those of `past`."""
    q = heads(g, linear(g, x, attn.wq, f"{name}.wq"), attn.q_norm, attn.n_head, attn.head_dim, f"{name}.q_norm", rope)
    k = heads(g, linear(g, x, attn.wk, f"{name}.wk"), attn.k_norm, attn.n_kv_head, attn.head_dim, f"{name}.k_norm", rope)
    v = linear(g, x, attn.wv, f"{name}.wv")
    y = f"attended_{len(g.nodes)}"
    g.op("GroupQueryAttention", q, k, v, *past, last, total, outputs=[y, *present], domain=MS, num_heads=attn.n_head,
         kv_num_heads=attn.n_kv_head, causal=causal)
    return linear(g, y, attn.wo, f"{name}.wo")


def cross_attention(g, x, attn, name, rope, memory, source):
    """The query heads of a group are laid out along T, so that MultiHeadAttention, which knows no groups, sees H_kv heads: (B, T, H * D)
    in the order (group's member, group) is (B, T * H / H_kv, H_kv * D) without a copy."""
    member, width = attn.n_head // attn.n_kv_head, attn.n_kv_head * attn.head_dim
    order = np.arange(attn.n_head * attn.head_dim).reshape(attn.n_kv_head, member, attn.head_dim).transpose(1, 0, 2).reshape(-1)
    q = heads(g, linear(g, x, attn.wq, f"{name}.wq", order), attn.q_norm, attn.n_head, attn.head_dim, f"{name}.q_norm", rope)
    q = g.op("Reshape", q, g.constant(0, -1, width)) if member > 1 else q
    y = g.op("MultiHeadAttention", q, *memory, "", source, domain=MS, num_heads=attn.n_kv_head)
    y = g.op("Reshape", y, g.constant(0, -1, member * width)) if member > 1 else y
    bias = None if attn.wo.bias is None else array(attn.wo.bias)
    return matmul(g, y, array(attn.wo.weight)[:, order], f"{name}.wo", bias)


def mlp(g, x, layer, name):
    up = linear(g, x, layer.up, f"{name}.up")
    if layer.gate is None:
        return linear(g, g.op("Gelu", up, approximate="tanh"), layer.down, f"{name}.down")
    gate = g.op("QuickGelu", linear(g, x, layer.gate, f"{name}.gate"), domain=MS, alpha=1.0)  # x * sigmoid(x): SiLU
    return linear(g, g.op("Mul", gate, up), layer.down, f"{name}.down")


def with_images(g, x, cfg):
    """x (B, T, C) with the tokens of pictures, `images` (N, C), in the places `at` (N, 1) of the flattened tokens."""
    images, at = g.input("images", "seen", cfg.n_embd), g.input("at", "seen", 1, dtype=np.int64)
    flat = g.op("ScatterND", g.op("Reshape", x, g.constant(-1, cfg.n_embd)), at, images)
    return g.op("Reshape", flat, g.op("Shape", x))


def encoder_graph(model, weights, precision):
    """tokens (B, S), positions (rows of the tables cos and sin), last (B,): each row's length - 1, total: S -> memory_key_i and
    memory_value_i (B, H_kv, S, D), i over the decoder's layers."""
    cfg = model.config
    g = Graph(weights, precision, {"int8": "integer", "int4": "integer"}.get(precision, "float"))
    tokens, positions = (g.input(name, "rows", "source", dtype=np.int64) for name in ("tokens", "positions"))
    last, total = g.input("last", "rows", dtype=np.int32), g.input("total", dtype=np.int32)
    rope = [positions, *(g.input(name, "slots", cfg.head_dim // 2) for name in ("cos", "sin"))]
    x = embedding(g, model, tokens)
    x = with_images(g, x, cfg) if cfg.image_id >= 0 else x
    h = norm(g, x, model.enc[0].attn_norm, "enc.0.attn_norm")
    for i, block in enumerate(model.enc):
        h, x = add_norm(g, x, self_attention(g, h, block.attn, f"enc.{i}.attn", rope, last, total, causal=0), block.mlp_norm, f"enc.{i}.mlp_norm")
        after = (model.enc[i + 1].attn_norm, f"enc.{i + 1}.attn_norm") if i + 1 < cfg.n_enc else (model.enc_norm, "enc_norm")
        h, x = add_norm(g, x, mlp(g, h, block.mlp, f"enc.{i}.mlp"), *after)
    cross = [g.input("cross_positions", "rows", "source", dtype=np.int64), *(g.input(name, "slots", cfg.head_dim // 2) for name in ("cross_cos", "cross_sin"))] if cfg.cross_rope else None
    for i, block in enumerate(model.dec):
        attn, name = block.cross, f"dec.{i}.cross"
        for part, y in (("key", heads(g, linear(g, h, attn.wk, f"{name}.wk"), attn.k_norm, attn.n_kv_head, attn.head_dim, f"{name}.k_norm", cross)),
                        ("value", linear(g, h, attn.wv, f"{name}.wv"))):
            y = g.op("Reshape", y, g.constant(0, -1, attn.n_kv_head, attn.head_dim))
            g.op("Transpose", y, perm=[0, 2, 1, 3], outputs=[g.output(f"memory_{part}_{i}", "rows", cfg.n_kv_head, "source", cfg.head_dim)])
    return g


def decoder_graph(model, weights, precision):
    """tokens (B, T), positions, tables, last (B,): each row's length with these - 1, total: the longest; source (B, S): 1 at its real
    tokens; memory; past_key_i and past_value_i (B, H_kv, slots, D); keep (N,): positions of the flattened tokens -> logits (N, V), and
    key_i and value_i, to be bound to the memory of past_key_i and past_value_i."""
    cfg = model.config
    # A decoder beside an encoder reads a token at a time, for which blocks are fastest; one without reads the prompt too, 1.8 times as
    # fast in integers, and its steps are then a tenth slower.
    g = Graph(weights, precision, {"int8": "blocks8" if cfg.n_enc else "integer", "int4": "blocks4"}.get(precision, "float"))
    tokens, positions = (g.input(name, "rows", "new", dtype=np.int64) for name in ("tokens", "positions"))
    last, total, keep = g.input("last", "rows", dtype=np.int32), g.input("total", dtype=np.int32), g.input("keep", "kept", dtype=np.int64)
    rope = [positions, *(g.input(name, "slots", cfg.head_dim // 2) for name in ("cos", "sin"))]
    cross = None
    if cfg.cross_rope and cfg.n_enc:
        cross = [g.input("cross_positions", "rows", "new", dtype=np.int64), *(g.input(name, "cross_slots", cfg.head_dim // 2) for name in ("cross_cos", "cross_sin"))]
    source = g.input("source", "rows", "source", dtype=np.int32) if cfg.n_enc else None
    g.output("logits", "kept", cfg.vocab_size)
    x = embedding(g, model, tokens)
    x = with_images(g, x, cfg) if cfg.image_id >= 0 and not cfg.n_enc else x
    h = norm(g, x, model.dec[0].attn_norm, "dec.0.attn_norm")
    for i, block in enumerate(model.dec):
        past = [g.input(f"past_{part}_{i}", "rows", cfg.n_kv_head, "slots", cfg.head_dim) for part in ("key", "value")]
        present = [g.output(f"{part}_{i}", "rows", cfg.n_kv_head, "slots", cfg.head_dim) for part in ("key", "value")]
        y = self_attention(g, h, block.attn, f"dec.{i}.attn", rope, last, total, past, present)
        if block.cross is not None:
            h, x = add_norm(g, x, y, block.cross_norm, f"dec.{i}.cross_norm")
            memory = [g.input(f"memory_{part}_{i}", "rows", cfg.n_kv_head, "source", cfg.head_dim) for part in ("key", "value")]
            y = cross_attention(g, h, block.cross, f"dec.{i}.cross", cross, memory, source)
        h, x = add_norm(g, x, y, block.mlp_norm, f"dec.{i}.mlp_norm")
        after = (model.dec[i + 1].attn_norm, f"dec.{i + 1}.attn_norm") if i + 1 < cfg.n_dec else (model.dec_norm, "dec_norm")
        h, x = add_norm(g, x, mlp(g, h, block.mlp, f"dec.{i}.mlp"), *after)
    h = g.op("Gather", g.op("Reshape", h, g.constant(-1, cfg.n_embd)), keep)
    output_layer(g, model, h)
    return g


def output_layer(g, model, h):
    """Logits. Tied, the weights are those that `embedding` reads."""
    cfg = model.config
    weight = array(model.embed.weight if model.head is None else model.head.weight)
    name, to = "embed" if model.head is None else "head", ["logits" if model.head_bias is None else "unbiased"]
    if precision_bits(g):
        bits, block = precision_bits(g), block_of(cfg.n_embd)
        packed, scales = quantize_blocks(weight, bits, block)
        g.op("MatMulNBits", h, g.weight(f"{name}.int{bits}", packed), g.weight(f"{name}.scales{bits} as list", scales.reshape(-1)), domain=MS, outputs=to, N=cfg.vocab_size, K=cfg.n_embd, bits=bits, block_size=block, accuracy_level=4)
    else:
        g.op("FusedMatMul", h, g.weight(name, weight), domain=MS, outputs=to, transB=1)
    if model.head_bias is not None:
        g.op("Add", *to, g.weight("head_bias", array(model.head_bias)), outputs=["logits"])


def layer_norm(g, x, layer, name):
    return g.op("LayerNormalization", x, g.weight(f"{name}.weight", array(layer.weight)), g.weight(f"{name}.bias", array(layer.bias)), axis=-1, epsilon=layer.eps)


def vision_graph(model, weights, precision):
    """tiles (n, size, size, 3) of bytes -> table (n * side * side + 1, C): the tokens of all patches, tile by tile, and the marker; scores (n, side * side), where features
    decide which tokens stay."""
    cfg, tower = model.vision, model.tower
    g = Graph(weights, precision, {"int8": "integer", "int4": "integer"}.get(precision, "float"))
    side, patch, width = cfg.side, cfg.patch, cfg.n_embd
    tiles = g.input("tiles", "tiles", cfg.image_size, cfg.image_size, 3, dtype=np.uint8)
    g.output("table", "tokens", model.config.n_embd)
    mean, std = np.array(cfg.mean, np.float32), np.array(cfg.std, np.float32)
    x = g.op("Cast", tiles, to=int(helper.np_dtype_to_tensor_dtype(np.dtype(g.float))))
    x = g.op("Mul", g.op("Sub", x, g.vector("mean", (255 * mean).astype(g.float))), g.vector("std", (1 / (255 * std)).astype(g.float)))
    x = g.op("Transpose", g.op("Reshape", x, g.constant(-1, side, patch, side, patch, 3)), perm=[0, 1, 3, 5, 2, 4])
    x = linear(g, g.op("Reshape", x, g.constant(-1, side * side, 3 * patch * patch)), tower.patches, "tower.patches")
    positions = array(tower.embed_position)
    if tower.embed_class is not None:  # with its position: a row that is put before those of the patches of every tile
        first = g.op("Expand", g.vector("class", (array(tower.embed_class) + positions[0]).astype(g.float).reshape(1, 1, -1)),
                     g.op("Concat", g.op("Shape", tiles, start=0, end=1), g.constant(1, 1), axis=0))
        x = g.op("Concat", first, g.op("Add", x, g.weight("tower.positions", positions[1:])), axis=1)
    else:
        x = g.op("Add", x, g.weight("tower.positions", positions))
    x = x if tower.pre_norm is None else layer_norm(g, x, tower.pre_norm, "tower.pre_norm")
    for i, layer in enumerate(tower.layers):
        name = f"tower.layers.{i}"
        h = layer_norm(g, x, layer.norm1, f"{name}.norm1")
        q, k, v = (linear(g, h, getattr(layer, part), f"{name}.{part}") for part in ("wq", "wk", "wv"))
        y = linear(g, g.op("MultiHeadAttention", q, k, v, domain=MS, num_heads=cfg.n_head), layer.wo, f"{name}.wo")
        h, _, _, x = g.op("SkipLayerNormalization", x, y, g.weight(f"{name}.norm2.weight", array(layer.norm2.weight)), g.weight(f"{name}.norm2.bias", array(layer.norm2.bias)), domain=MS,
                          epsilon=layer.norm2.eps, outputs=[f"normed_{len(g.nodes)}", "", "", f"stream_{len(g.nodes)}"])
        h = linear(g, h, layer.up, f"{name}.up")
        h = g.op("QuickGelu", h, domain=MS, alpha=1.702) if cfg.act == "quick_gelu" else g.op("Gelu", h, approximate="tanh")
        x = g.op("Add", x, linear(g, h, layer.down, f"{name}.down"))
    if tower.embed_class is not None:
        x = g.op("Slice", x, g.constant(1), g.constant(side * side + 1), g.constant(1))
    weigh = None
    if cfg.tokens == "learned":
        scores = g.op("Add", g.op("MatMul", x, g.weight("weigh.weight", array(model.weigh.weight).T)), g.weight("weigh.bias", array(model.weigh.bias)))
        weigh = g.op("Sigmoid", scores)
        g.op("Reshape", scores, g.constant(-1, side * side), outputs=[g.output("scores", "tiles", side * side)])
    elif cfg.tokens == "variance" and cfg.variance_of == "features":
        away = g.op("Sub", x, g.op("ReduceMean", x, g.constant(-1)))
        g.op("ReduceMean", g.op("Mul", away, away), g.constant(-1), keepdims=0, outputs=[g.output("scores", "tiles", side * side)])
    x = g.op("Reshape", x, g.constant(-1, side * side // cfg.joined, width * cfg.joined))
    h = linear(g, g.op("Gelu", linear(g, x, model.projector.up, "projector.up")), model.projector.down, "projector.down")
    h = h if weigh is None else g.op("Mul", h, g.op("Mul", weigh, g.vector("two", np.array(2, g.float))))
    g.op("Concat", g.op("Reshape", h, g.constant(-1, model.config.n_embd)), g.weight("embed_marker", array(model.embed_marker)[None]), axis=0, outputs=["table"])
    return g


# ---------------------------------------------------------------------------------------------------------------------
# --static: shapes that are fixed and ONNX's plain operators alone, the form that compilers for NPUs take. One request at a time; no
# batch dimension. Built in float32; `quantize` then rounds every activation to the range that it was seen to have.

CHUNK = 128  # tokens of its prompt that a decoder-only model reads at a time
OUTSIDE = -100.0  # added to the score of what may not be seen: e^-100 of its weight is left, and the range of the scores stays narrow


def plain_linear(g, x, layer, name):
    """x (T, K) -> (T, N). Weights in int8 have one scale an output channel."""
    weight, bias = array(layer.weight), None if layer.bias is None else array(layer.bias)
    if g.precision == "fp32":
        y = g.op("MatMul", x, g.weight(f"{name}.weight", weight.T))
    else:
        codes, scales = quantize_rows(weight)
        y = g.op("MatMul", x, g.op("DequantizeLinear", g.weight(f"{name}.int8", codes.T), g.vector(f"{name}.scales", scales), axis=1))
    return y if bias is None else g.op("Add", y, g.vector(f"{name}.bias", bias))


def plain_embedding(g, model, tokens):
    """tokens (T,) -> (T, C). In int8, rows of codes times their scales: what the output layer reads too."""
    scale = model.config.embed_scale
    if g.precision == "fp32":
        x = g.op("Gather", g.weight("embed", array(model.embed.weight)), tokens)
        return x if scale == 1 else g.op("Mul", x, g.vector("embed_scale", np.array(scale, np.float32)))
    codes, scales = quantize_rows(array(model.embed.weight))
    x = g.op("DequantizeLinear", g.op("Gather", g.weight("embed.int8", codes), tokens), g.vector("embed.step", np.array(1 / 127, np.float32)))
    return g.op("Mul", x, g.op("Gather", g.vector("embed.sizes", scales[:, None] * np.float32(127 * scale)), tokens))


def plain_norm(g, x, layer, name):
    square = g.op("ReduceMean", g.op("Mul", x, x), g.constant(-1))
    size = g.op("Sqrt", g.op("Add", square, g.vector("eps", np.array(layer.eps, np.float32))))
    return g.op("Mul", g.op("Div", x, size), g.vector(f"{name}.weight", array(layer.weight)))


def plain_heads(g, x, layer, n_head, head_dim, name, rope):
    """Queries or keys (T, H * D) -> (H, T, D), normed and rotated."""
    x = g.op("Reshape", x, g.constant(-1, n_head, head_dim))
    x = plain_norm(g, x, layer, name) if hasattr(layer, "weight") else x
    x = g.op("Transpose", x, perm=[1, 0, 2])
    if rope is None:
        return x
    cos, sin = rope
    a, b = g.op("Split", x, outputs=2, axis=-1, num_outputs=2)
    return g.op("Concat", g.op("Sub", g.op("Mul", a, cos), g.op("Mul", b, sin)), g.op("Add", g.op("Mul", b, cos), g.op("Mul", a, sin)), axis=-1)


def plain_attention(g, x, attn, name, rope, keys, values, mask, S):
    """x (T, C), keys and values (H_kv, S, D), mask (1, T or 1, S): 0, or OUTSIDE."""
    q = plain_heads(g, plain_linear(g, x, attn.wq, f"{name}.wq"), attn.q_norm, attn.n_head, attn.head_dim, f"{name}.q_norm", rope)
    q = g.op("Reshape", g.op("Mul", q, g.vector("root", np.array(attn.head_dim ** -0.5, np.float32))), g.constant(attn.n_kv_head, -1, attn.head_dim))
    scores = g.op("MatMul", q, g.op("Transpose", keys, perm=[0, 2, 1]))  # (H_kv, H / H_kv * T, S)
    scores = g.op("Softmax", g.op("Add", g.op("Reshape", scores, g.constant(attn.n_head, -1, S)), mask), axis=-1)
    y = g.op("MatMul", g.op("Reshape", scores, g.constant(attn.n_kv_head, -1, S)), values)
    y = g.op("Transpose", g.op("Reshape", y, g.constant(attn.n_head, -1, attn.head_dim)), perm=[1, 0, 2])
    return plain_linear(g, g.op("Reshape", y, g.constant(-1, attn.n_head * attn.head_dim)), attn.wo, f"{name}.wo")


def plain_mlp(g, x, layer, name):
    up = plain_linear(g, x, layer.up, f"{name}.up")
    if layer.gate is None:
        return plain_linear(g, g.op("Gelu", up, approximate="tanh"), layer.down, f"{name}.down")
    gate = plain_linear(g, x, layer.gate, f"{name}.gate")
    return plain_linear(g, g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up), layer.down, f"{name}.down")


def plain_keys_values(g, x, attn, name, rope):
    """x (T, C) -> keys and values (H_kv, T, D)."""
    k = plain_heads(g, plain_linear(g, x, attn.wk, f"{name}.wk"), attn.k_norm, attn.n_kv_head, attn.head_dim, f"{name}.k_norm", rope)
    v = g.op("Reshape", plain_linear(g, x, attn.wv, f"{name}.wv"), g.constant(-1, attn.n_kv_head, attn.head_dim))
    return k, g.op("Transpose", v, perm=[1, 0, 2])


def plain_inputs(g, cfg, T, *mask):
    """tokens (T,); mask; RoPE's tables at the tokens' positions, cross-attention's too where it has positions."""
    tokens, mask = g.input("tokens", T, dtype=np.int64), g.input("mask", *mask)
    tables = [[g.input(kind + name, 1, T, cfg.head_dim // 2) for name in ("cos", "sin")] for kind in ("", "cross_")[:1 + (cfg.cross_rope and cfg.n_enc > 0)]]
    return tokens, mask, tables[0], tables[1] if len(tables) > 1 else None


def plain_encoder(model, weights, precision, S):
    """tokens (S,) -> memory_key_i and memory_value_i (H_kv, S, D), i over the decoder's layers."""
    cfg, g = model.config, Graph(weights, precision)
    tokens, mask, rope, cross = plain_inputs(g, cfg, S, 1, 1, S)
    x = plain_embedding(g, model, tokens)
    for i, block in enumerate(model.enc):
        h, name = plain_norm(g, x, block.attn_norm, f"enc.{i}.attn_norm"), f"enc.{i}.attn"
        x = g.op("Add", x, plain_attention(g, h, block.attn, name, rope, *plain_keys_values(g, h, block.attn, name, rope), mask, S))
        x = g.op("Add", x, plain_mlp(g, plain_norm(g, x, block.mlp_norm, f"enc.{i}.mlp_norm"), block.mlp, f"enc.{i}.mlp"))
    h = plain_norm(g, x, model.enc_norm, "enc_norm")
    for i, block in enumerate(model.dec):
        for part, y in zip(("key", "value"), plain_keys_values(g, h, block.cross, f"dec.{i}.cross", cross)):
            g.op("Reshape", y, g.constant(cfg.n_kv_head, S, cfg.head_dim), outputs=[g.output(f"memory_{part}_{i}", cfg.n_kv_head, S, cfg.head_dim)])
    return g


def plain_decoder(model, weights, precision, T, slots, S):
    """tokens (T,), at (H_kv * T, 1): the rows of the caches that they take; memory; past_key_i and past_value_i (H_kv * slots, D); keep (1,):
    which of the tokens -> its logits (1, V), and key_i and value_i, to be bound to the memory of past_key_i and past_value_i."""
    cfg, g = model.config, Graph(weights, precision)
    tokens, mask, rope, cross = plain_inputs(g, cfg, T, 1, T, slots)
    at, keep = g.input("at", cfg.n_kv_head * T, 1, dtype=np.int64), g.input("keep", 1, dtype=np.int64)
    source = g.input("source", 1, 1, S) if cfg.n_enc else None
    g.output("logits", 1, cfg.vocab_size)
    x = plain_embedding(g, model, tokens)
    for i, block in enumerate(model.dec):
        h, found = plain_norm(g, x, block.attn_norm, f"dec.{i}.attn_norm"), []
        for part, new in zip(("key", "value"), plain_keys_values(g, h, block.attn, f"dec.{i}.attn", rope)):
            shape = cfg.n_kv_head * slots, cfg.head_dim
            new = g.op("Reshape", new, g.constant(-1, cfg.head_dim))
            cache = g.op("ScatterND", g.input(f"past_{part}_{i}", *shape), at, new, outputs=[g.output(f"{part}_{i}", *shape)])
            found.append(g.op("Reshape", cache, g.constant(cfg.n_kv_head, slots, cfg.head_dim)))
        x = g.op("Add", x, plain_attention(g, h, block.attn, f"dec.{i}.attn", rope, *found, mask, slots))
        if block.cross is not None:
            memory = [g.input(f"memory_{part}_{i}", cfg.n_kv_head, S, cfg.head_dim) for part in ("key", "value")]
            h = plain_norm(g, x, block.cross_norm, f"dec.{i}.cross_norm")
            x = g.op("Add", x, plain_attention(g, h, block.cross, f"dec.{i}.cross", cross, *memory, source, S))
        x = g.op("Add", x, plain_mlp(g, plain_norm(g, x, block.mlp_norm, f"dec.{i}.mlp_norm"), block.mlp, f"dec.{i}.mlp"))
    h = g.op("Gather", plain_norm(g, x, model.dec_norm, "dec_norm"), keep)
    name, weight = ("embed", model.embed.weight) if model.head is None else ("head", model.head.weight)
    if precision == "fp32":
        weight = g.weight(name, array(weight))
    else:
        codes, scales = quantize_rows(array(weight))
        weight = g.op("DequantizeLinear", g.weight(f"{name}.int8", codes), g.vector(f"{name}.scales", scales), axis=0)
    g.op("Gemm", h, weight, *([g.vector("head_bias", array(model.head_bias))] if model.head_bias is not None else []), transB=1, outputs=["logits"])
    return g


def moves(node):
    """Whether a node only moves what it gets: its output then keeps the scale of its input."""
    return node.op_type in ("Reshape", "Transpose", "Split", "ScatterND") or (node.op_type == "Gather" and node.input[1] == "keep")


def own_range(node):
    """Whether the output of a node is an activation with a range of its own: no codes of weights, nothing moved from elsewhere."""
    return not moves(node) and node.op_type != "DequantizeLinear" and not node.input[0].endswith(".int8")


def float_inputs(g):
    return [item.name for item in g.inputs if item.type.tensor_type.elem_type == TensorProto.FLOAT and not item.name.startswith("past_")]


def watched(g):
    """The graph with one more output: `ranges` (2, n), the least and largest values of what `own_range` names, and of the inputs; and their
    names. Each is taken as soon as it is there, so that no activation has to be kept."""
    names, ends, twin = [], ([], []), copy.copy(g)
    twin.nodes, twin.outputs = [], [item for item in g.outputs if item.name != "logits"]
    twin.inputs = [item for item in g.inputs if item.name != "keep"]
    if len(twin.inputs) < len(g.inputs):  # the decoder's logits at any number of positions
        twin.input("keep", "kept", dtype=np.int64)
        twin.output("logits", "kept", next(item for item in g.outputs if item.name == "logits").type.tensor_type.shape.dim[1].dim_value)

    def note(name):
        names.append(name)
        for kind, found in zip(("ReduceMin", "ReduceMax"), ends):
            least = f"{name}.{kind}"
            twin.nodes.append(helper.make_node(kind, [name], [least], name=least, keepdims=0))
            twin.nodes.append(helper.make_node("Reshape", [least, twin.constant(1)], [f"{least}.flat"], name=f"{least}.flat"))
            found.append(f"{least}.flat")
    for name in float_inputs(g):
        note(name)
    for node in g.nodes:
        twin.nodes.append(node)
        if own_range(node):
            note(node.output[0])
    both = [twin.op("Reshape", twin.op("Concat", *found, axis=0), twin.constant(1, -1)) for found in ends]
    twin.op("Concat", *both, axis=0, outputs=[twin.output("ranges", 2, len(names))])
    return twin, names


def quantize(g, ranges, known=None):
    """Puts QuantizeLinear and DequantizeLinear behind every activation, `ranges` (name -> least, largest) being what it was seen to hold.
    With precision int8, what only matrix products read has 8 bits; all else, and with 16x8 everything, has 16. Caches and memory are stored
    as their codes. `known`: scales (name -> scale, zero point) of inputs that another graph made. Returns the scales."""
    readers, makers, scales, current, nodes = {}, {name: node for node in g.nodes for name in node.output}, dict(known or {}), {}, []
    for node in g.nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def narrow(name):  # read by matrix products alone, moved or not
        return name != "logits" and all(node.op_type in ("MatMul", "Gemm") or moves(node) and all(map(narrow, node.output))
                                        for node in readers.get(name, []))

    def spread(low, high, kind):
        low, high = min(float(low), 0.0), max(float(high), 1e-6)  # 0 is exact
        scale = np.float32((high - low) / np.iinfo(kind).max)
        return scale, kind(round(-low / float(scale)))

    def scale_of(name):
        node = makers.get(name)
        if name not in scales and node is not None and not own_range(node):
            scales[name] = scale_of(node.input[2 if node.op_type == "ScatterND" else 0])
        if name not in scales:
            scales[name] = spread(*ranges[name], np.uint8 if g.precision == "int8" and narrow(name) else np.uint16)
        return scales[name]

    def pair(name):
        return [g.vector(f"{name}.{part}", np.array(value)) for part, value in zip(("scale", "zero"), scale_of(name))]

    def emit(kind, *inputs, output):
        nodes.append(helper.make_node(kind, list(inputs), [output], name=f"{output}.{kind}"))
        return output

    def coded(item):  # a declared input or output that holds codes
        item.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(scale_of(item.name)[1].dtype)

    def rounded(name):
        """What a node reads instead of `name`."""
        tensor = g.tensors.get(name)
        if name not in current and tensor is not None and tensor.data_type == TensorProto.FLOAT:  # a constant
            values = onnx.numpy_helper.to_array(tensor)
            scale, zero = scales[name] = spread(values.min(), values.max(), np.uint16)
            codes = g.vector(f"{name}.codes", np.clip(np.round(values / scale) + zero, 0, 65535).astype(np.uint16))
            current[name] = emit("DequantizeLinear", codes, *pair(name), output=f"{name}.rounded")
        return current.get(name, name)

    for item in g.inputs:
        name = item.name
        if name.startswith("past_"):
            scales[name] = scale_of(name.removeprefix("past_"))
            coded(item)
        elif name.startswith("memory_"):
            coded(item)
            current[name] = emit("DequantizeLinear", name, *pair(name), output=f"{name}.rounded")
        elif name in float_inputs(g):
            current[name] = emit("DequantizeLinear", emit("QuantizeLinear", name, *pair(name), output=f"{name}.codes"), *pair(name), output=f"{name}.rounded")
    for node in g.nodes:
        if node.op_type == "DequantizeLinear" or node.input[0].endswith(".int8"):
            nodes.append(node)
            continue
        if node.op_type == "ScatterND":
            past, at, new = node.input
            nodes.append(helper.make_node("ScatterND", [past, at, f"{new}.codes"], node.output, name=node.name))
            current[node.output[0]] = emit("DequantizeLinear", node.output[0], *pair(node.output[0]), output=f"{node.output[0]}.rounded")
            continue
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        copied.input[:] = [rounded(name) for name in node.input]
        copied.output[:] = [f"{name}.exact" for name in node.output]
        nodes.append(copied)
        for name in node.output:
            codes = emit("QuantizeLinear", f"{name}.exact", *pair(name), output=name if name.startswith("memory_") else f"{name}.codes")
            current[name] = emit("DequantizeLinear", codes, *pair(name), output=name if name == "logits" else f"{name}.rounded")
    for item in g.outputs:
        if item.name != "logits":
            coded(item)
    g.nodes = nodes
    used = {name for node in nodes for name in node.input}
    g.tensors = {name: tensor for name, tensor in g.tensors.items() if name in used}
    return scales


# ---------------------------------------------------------------------------------------------------------------------
# Files

def write(model, folder, precision, objective="seq2seq"):
    """Writes the graphs, their weights, and what lib/runtime.py has to know, into a folder."""
    os.makedirs(folder)
    weights = Weights(os.path.join(folder, "weights.bin"))
    if model.config.image_id >= 0:
        vision_graph(model, weights, precision).save(os.path.join(folder, "vision.onnx"), "vision")
    if model.config.n_enc:
        encoder_graph(model, weights, precision).save(os.path.join(folder, "encoder.onnx"), "encoder")
    g = decoder_graph(model, weights, precision)
    g.save(os.path.join(folder, "decoder.onnx"), "decoder")
    weights.file.close()
    more = dict(vision=asdict(model.vision)) if model.config.image_id >= 0 else {}
    describe(folder, model, weights, g, precision=precision, objective=objective, **more)


def describe(folder, model, weights, step, **about):
    """export.json: what is known of the export, the size of each file, and the bytes of weights that the graph of a step reads (of an untied
    embedding, next to nothing)."""
    read = {name.split(" as ")[0] for name in step.tensors if not (name.startswith("embed") and model.head is not None)}
    sizes = {name: os.path.getsize(os.path.join(folder, name)) for name in sorted(os.listdir(folder)) if name != FILE}
    write_json(os.path.join(folder, FILE), dict(about, config=asdict(model.config), files=sizes,
                                                step_bytes=sum(weights.places[name][1] for name in read if name in weights.places)))


def write_static(model, folder, precision, objective, src_len, tgt_len, batch):
    """As `write`, for one prompt of at most src_len tokens and tgt_len positions of the decoder. `batch` (src, src_mask, tgt, loss_mask):
    the rows that activations have their ranges from."""
    os.makedirs(folder)
    cfg, weights = model.config, Weights(os.path.join(folder, "weights.bin"))
    slots = -(-tgt_len // CHUNK) * CHUNK
    graphs = {"encoder": plain_encoder(model, weights, precision, src_len)} if cfg.n_enc else {}
    graphs |= {name: plain_decoder(model, weights, precision, T, slots, src_len) for name, T in (("prefill", CHUNK), ("decoder", 1))}
    weights.file.close()

    about = dict(precision=precision, objective=objective, static=dict(src_len=src_len, tgt_len=tgt_len, slots=slots, chunk=CHUNK, outside=OUTSIDE))
    if precision != "fp32":
        names = {}
        for name, g in graphs.items():
            twin, names[name] = watched(g)
            twin.save(os.path.join(folder, f"{name}.onnx"), name)
        describe(folder, model, weights, graphs["decoder"], **about)
        ranges, known = calibrate(folder, names, batch), {}
        for name in graphs:  # prefill and decoder have the same nodes, and the same caches
            scales = quantize(graphs[name], ranges["encoder" if name == "encoder" else "prefill"], known)
            known = {key: value for key, value in scales.items() if key.startswith("memory_")}
    if cfg.n_enc:
        os.remove(os.path.join(folder, "prefill.onnx")) if precision != "fp32" else None
        del graphs["prefill"]  # the encoder reads the prompt
    for name, g in graphs.items():
        g.save(os.path.join(folder, f"{name}.onnx"), name)
    describe(folder, model, weights, graphs["decoder"], **about)


def calibrate(folder, names, batch):
    """Runs the rows through graphs that `watched` made, one graph in memory at a time -> for each, name -> least and largest value."""
    found, (src, src_mask, tgt, _) = {}, batch

    def watch(graph, ranges):
        low, high = found.get(graph, ranges)
        found[graph] = np.minimum(low, ranges[0]), np.maximum(high, ranges[1])
    memories, T = [({}, None)] * len(tgt), tgt.shape[1]
    if src is not None:
        reader = Static(folder, graphs=["encoder"], in_order=True)
        reader.watch, memories = watch, []
        for b in tqdm(range(len(src)), desc="calibration, sources", leave=False):
            ids = (src[b] if src_mask is None else src[b][src_mask[b]]).tolist()
            memories.append(reader.encode([ids[:len(ids) // (2 - b % 2)]]))  # half of every other: the range of masked scores should be seen too
        del reader
    writer = Static(folder, graphs=["prefill"], in_order=True)
    writer.watch = watch
    for b in tqdm(range(len(tgt)), desc="calibration, answers", leave=False):
        writer.request([T], 1, *memories[b]).feed(np.array([[writer.config.bos_id, *tgt[b, :-1]]]), np.array([T]), np.array([T - 1]))
    return {graph: dict(zip(names[graph], zip(*found[graph]))) for graph in found}


# ---------------------------------------------------------------------------------------------------------------------
# Weights of others -> a Transformer. lib/weights.py knows their names.

def load_foreign(name):
    """"hf:FOLDER_OR_ID" (Llama family, safetensors) or "mu:FILE" (the paper's released checkpoint; a folder: its model with pictures) -> the model, with its own vocabulary and
    in its own dtype. Nothing is copied that need not be: the weights stay mapped from their file."""
    return (load_llama if name.startswith("hf:") else load_mu)(name[3:], name)


def foreign_config(name):
    """(Config, folder) of what `load_foreign` would load."""
    if name.startswith("hf:"):
        folder = local_folder(name[3:], name)
        return llama_config(read_about(folder, name), name), folder
    model = load_mu(name[3:], name)
    return model.config, name[3:] if os.path.isdir(name[3:]) else os.path.dirname(name[3:]) or "."


def llama_config(about, where):
    ids = {f"{part}_id": about.get(f"{part}_token_id") for part in ("bos", "eos", "pad")}
    ids = {key: id[0] if isinstance(id, list) and id else id for key, id in ids.items()}  # Llama 3 has several ends
    return Config(**config_of(about, where) | dict(tied=True) | {key: id if isinstance(id, int) and id >= 0 else 0 for key, id in ids.items()}).check()


def load_llama(name, where):
    folder = local_folder(name, where)
    about = read_about(folder, where)
    config, tensors = llama_config(about, where), read_tensors(weight_files(folder, where))
    config.tied = bool(about.get("tie_word_embeddings", "lm_head.weight" not in tensors))
    if config.tied:
        tensors.pop("lm_head.weight", None)  # some files have it all the same
    for key in [key for key in tensors if key.endswith("rotary_emb.inv_freq") or key.endswith("o_proj.bias") and not tensors[key].any()]:
        del tensors[key]  # follows from the config; and as good as none
    names = llama_names(config, about["model_type"] == "phi3")
    return assembled(config, tensors, {ours: (theirs, lambda t, rows=rows: t if rows is None else t[slice(*rows)]) for ours, (theirs, rows) in names.items()}, where)


def assembled(config, tensors, names, where, model=None):
    """A Transformer of `config` (or `model`, made on the meta device) from foreign `tensors`; names: ours -> (theirs, what to do with theirs). Raises UserError for one
    that is missing, left over, of another shape, or has values that are no numbers."""
    if model is None:
        with torch.device("meta"):
            model = Transformer(config)
    found, dtype = {}, tensors.get(names["embed.weight"][0], torch.empty(0)).dtype
    wanted = model.state_dict()
    for ours, p in wanted.items():
        theirs, change = names[ours]
        if theirs not in tensors:
            raise UserError(f"{where} lacks the weights {theirs}")
        found[ours] = change(tensors[theirs])
        if found[ours].shape != p.shape:
            raise UserError(f"{where}: {theirs} gives {tuple(found[ours].shape)} for {ours}, which is {tuple(p.shape)} by its configuration")
    if left := sorted(tensors.keys() - {names[ours][0] for ours in wanted}):
        raise UserError(f"{where} has {len(left)} weights that its configuration has no place for, the first is {left[0]}")
    for key, tensor in tensors.items():
        if tensor.numel() and not all(map(torch.isfinite, torch.aminmax(tensor))):  # one pass, no copy, forty times as fast as isfinite of all
            raise UserError(f"{where}: {key} holds infinities or numbers that are none" + (", as weights do that were too large for float16" if tensor.dtype == torch.float16 else ""))
    model.load_state_dict({ours: tensor.to(dtype) for ours, tensor in found.items()}, assign=True)
    return model


def load_mu(path, where):
    """The released checkpoint: {model_state_dict, and model_config in newer ones}. Of two query heads in a group the second does not follow the first but stands behind all groups,
    so that the heads are put into our order."""
    folder = path if os.path.isdir(path) else None
    about = read_about(folder, where) if folder else {}
    state = unpickled(os.path.join(folder, "pytorch_model.bin") if folder else path, where)
    if folder is None:
        if not isinstance(state, dict) or not isinstance(state.get("model_state_dict"), dict):
            raise UserError(f"{where} has no model_state_dict: it is no checkpoint of the paper's code")
        about, state = dict(n_head=6, n_kv_head=3) | dict(state.get("model_config") or {}), state["model_state_dict"]
    try:
        tensors = {key.removeprefix("_orig_mod.").removeprefix("module."): tensor for key, tensor in state.items()}
        if not all(map(torch.is_tensor, tensors.values())):
            raise ValueError("it holds more than tensors")
        n_enc, n_dec = (1 + max(int(key.split(".")[2]) for key in tensors if key.startswith(f"transformer.{stack}.")) for stack in ("e", "h"))
        (vocab_size, n_embd), n_hidden = tensors["transformer.wte.weight"].shape, len(tensors["transformer.e.0.mlp.fc1.bias"])
        n_head, n_kv_head, length = about["n_head"], about["n_kv_head"], about.get("block_size", 1024)
        config = Config(vocab_size=vocab_size, n_enc=n_enc, n_dec=n_dec, n_embd=n_embd, n_head=n_head, n_kv_head=n_kv_head, n_hidden=n_hidden, src_len=length, tgt_len=length,
                        head_dim=len(tensors["transformer.e.0.attn.q_linear.bias"]) // n_head, rope_theta=float(about.get("rope_theta", 10000)), mlp="gelu", qk_norm=False, qkv_bias=True,
                        bias=True, head_bias="lm_head.bias" in tensors, pad_id=0, bos_id=1, eos_id=min(32000, vocab_size - 1)).check()
    except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"{where} has no model of the paper's code in it ({error})") from None
    if "lm_head.weight" in tensors and not torch.equal(tensors.pop("lm_head.weight"), tensors["transformer.wte.weight"]):
        raise UserError(f"{where}: its output layer is not its embedding, as the paper's is")
    order = torch.arange(n_head) if folder or about.get("is_interleaved") else torch.arange(n_head).view(-1, n_kv_head).T.flatten()  # ours -> theirs
    changes = {"wq.weight": lambda t: t.unflatten(0, (n_head, -1))[order].flatten(0, 1), "wq.bias": lambda t: t.unflatten(0, (n_head, -1))[order].flatten(),
               "wo.weight": lambda t: t.unflatten(1, (n_head, -1))[:, order].flatten(1)}
    names = {ours: (theirs, next((change for end, change in changes.items() if ours.endswith(end)), lambda t: t)) for ours, theirs in mu_names(n_enc, n_dec).items()}
    names["head_bias"] = ("lm_head.bias", lambda t: t)
    return assembled(config, tensors, names, where) if folder is None else with_eyes(config, tensors, names, about, where)


def unpickled(path, where):
    """What torch.save wrote, if it is nothing but tensors, numbers and texts."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"{where}: {path} is missing") from None
    except pickle.UnpicklingError:
        raise UserError(f"{where} asks for code to be run when it is read, and is refused") from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{where} cannot be read, it is truncated or not written by torch.save ({str(error).splitlines()[0]})") from None


def with_eyes(config, tensors, names, about, where):
    """The model with pictures: a CLIP tower, a projector of two layers, the end of a row. Tiles are chosen by this project's rule; the paper's code has a list of four grids, and shrinks
    what is more than three tiles."""
    if about.get("mm_projector_type") != "mlp2x_gelu" or about.get("mm_vision_select_layer") != -2:
        raise UserError(f"{where}: supported are mm_projector_type mlp2x_gelu and mm_vision_select_layer -2, not {about.get('mm_projector_type')} and {about.get('mm_vision_select_layer')}")
    prefix = "vision_tower.vision_tower.vision_model."
    seen = {key.removeprefix(prefix): tensors.pop(key) for key in [key for key in tensors if key.startswith(prefix)]}
    try:
        n_embd, patch = seen["embeddings.patch_embedding.weight"].shape[0], seen["embeddings.patch_embedding.weight"].shape[-1]
        side, n_layer = math.isqrt(len(seen["embeddings.position_embedding.weight"]) - 1), max(int(key.split(".")[2]) for key in seen if key.startswith("encoder.layers."))
        shape = dict(image_size=side * patch, patch=patch, n_layer=n_layer, n_embd=n_embd, n_head=n_embd // 64, n_hidden=len(seen["encoder.layers.0.mlp.fc1.bias"]))
    except (KeyError, ValueError) as error:
        raise UserError(f"{where} has no CLIP tower in it ({error})") from None
    vision = VisionConfig(**shape, from_file=True)
    with torch.device("meta"):
        model = VisionLM(config, vision)
    tower = renamed(seen, asdict(vision), where)
    names |= {f"tower.{key}": (f"tower.{key}", lambda t: t) for key in tower} | {"embed_marker": ("image_newline", lambda t: t)}
    names |= {f"projector.{ours}.{part}": (f"mm_projector.{theirs}.{part}", lambda t: t) for ours, theirs in (("up", 0), ("down", 2)) for part in ("weight", "bias")}
    return assembled(config, tensors | {f"tower.{key}": tensor for key, tensor in tower.items()}, names, where, model)


@torch.no_grad()
def fit_vocabulary(model, tokenizer, where):
    """Gives a foreign model the ids of its tokenizer as it is here: special ones (sentinels, separator, padding) behind its own, in rows of the embedding that no id had yet. Those past
    its end begin as the mean of all others, whose logit is the mean of theirs and so never the largest."""
    cfg = model.config
    if tokenizer.kind != "hf":
        raise UserError(f"{where}: its ids are those of the tokenizer.json that it was trained with, not of one of this project's")
    if tokenizer.eos >= tokenizer.n_text:
        raise UserError(f"{where}: its tokenizer names no end of sequence: keep the tokenizer_config.json beside tokenizer.json")
    if tokenizer.n_text > cfg.vocab_size:
        raise UserError(f"{where}: its tokenizer has {tokenizer.n_text:,} ids and its embedding {cfg.vocab_size:,} rows: they do not belong together")
    size, new = max(cfg.vocab_size, tokenizer.vocab_size), max(0, tokenizer.vocab_size - cfg.vocab_size)
    holders = [(model.embed, "weight"), (model.head, "weight"), (model, "head_bias")]
    for holder, name in holders if new else []:
        if holder is not None and (p := getattr(holder, name)) is not None:
            setattr(holder, name, torch.nn.Parameter(torch.cat((p, p.float().mean(0, keepdim=True).to(p.dtype).expand(new, *p.shape[1:])))))
    model.embed.num_embeddings = size
    image = dict(image_id=tokenizer.image) if isinstance(model, VisionLM) else {}
    model.config = replace(cfg, vocab_size=size, pad_id=tokenizer.pad, bos_id=tokenizer.bos, eos_id=tokenizer.eos, **image).check()
    return model


def tokenizer_of(where, folder, chosen):
    """Where the tokenizer of foreign weights is: beside them, or as --tokenizer says."""
    own = os.path.join(folder, "tokenizer.json")
    if not chosen and not os.path.exists(own):
        raise UserError(f"{where} has no tokenizer.json beside it: name one with --tokenizer=FILE (the paper's released checkpoint has Phi-3.5's)")
    if chosen and os.path.exists(own) and load_tokenizer(chosen).hash() != load_tokenizer(folder).hash():
        raise UserError(f"--tokenizer={chosen} is not the one beside the weights of {where}: leave it out")
    return chosen or folder


@torch.no_grad()
def to_encdec(model, n_enc, n_dec):
    """A decoder-only model -> an encoder-decoder that starts from it (T5Gemma: Zhang et al., 2025): evenly spaced layers in both stacks, and each cross-attention begins as the
    self-attention of its layer."""
    cfg = model.config
    for name, n in (("n_enc", n_enc), ("n_dec", n_dec)):
        if not 1 <= n <= cfg.n_dec:
            raise UserError(f"--{name}={n}: the model to start from has {cfg.n_dec} layers")
    new = Transformer(replace(cfg, n_enc=n_enc, n_dec=n_dec, src_len=cfg.tgt_len))
    old, found = model.state_dict(), {}
    for name in new.state_dict():
        stack, *rest = name.split(".")
        if stack in ("enc", "dec"):
            n = n_enc if stack == "enc" else n_dec
            layer = round(int(rest[0]) * (cfg.n_dec - 1) / max(1, n - 1))
            found[name] = old[".".join(["dec", str(layer), *rest[1:]]).replace("cross", "attn")].clone()
        else:
            found[name] = old[name.replace("enc_norm", "dec_norm")]
    new.load_state_dict(found)
    return new


# ---------------------------------------------------------------------------------------------------------------------
# Does the export say what the run says?

def real_rows(cfg, record, model, tokenizer, split, n):
    """At most n rows of what the run was trained on, as a batch (src, src_mask, tgt, loss_mask); prompts to continue; each row's Pictures, None without."""
    data, decoder_only = cfg.data or record["data"], model.config.n_enc == 0
    if record["objective"] == "seq2seq":
        seeing, log = model.config.image_id >= 0, lambda text: None
        task = load_picture_task(data, record["skip_bad"], log) if seeing else load_task(data, record["source_col"], record["target_col"], record["skip_bad"], log)
        rows = [task.splits[split][i] for i in evenly(len(task.splits[split]), n)]
        how = tokenizer, record["src_len"], record["tgt_len"], decoder_only
        pairs = PicturePairs(rows, *how, model.vision, record["skip_bad"]) if seeing else Pairs(rows, *how)
        every = range(len(pairs))
        return pairs.batch(every), [pairs.prompt(row) for row in every], [pairs.pictures([row]) for row in every] if seeing else None
    objective = Objective(record["objective"], tokenizer, record["src_len"], record["tgt_len"], decoder_only, record["noise"], record["mean_span"])
    text = prepare(data, cfg.run, text_col=record["text_col"], max_tokens=1 if split == "val" else n * objective.window, log=lambda text: None).splits[split]
    if len(text) < objective.window:
        raise UserError(f"{data} has {len(text)} tokens of {split}, and a row of this run needs {objective.window}: --data=... names a larger text")
    starts = np.linspace(0, len(text) - objective.window, n).astype(int)
    batch = objective.batch(text.windows(starts, objective.window), uniforms(0, 0, range(n), objective.n_random))
    if decoder_only:
        halves = np.maximum(batch[3].argmax(1), batch[2].shape[1] // 2 * (record["objective"] == "causal"))
        return batch, [row[:half].tolist() for row, half in zip(batch[2], halves)], None
    return batch, [row[row != tokenizer.pad].tolist() for row in batch[0]], None


def fitting(batch, prompts, src_len, tgt_len, new):
    """The rows, prompts and number of new tokens, cut to what a static export takes; a decoder-only model's at the front, as what is scored comes last."""
    src, src_mask, tgt, loss_mask = batch
    if src is not None:
        batch = *[part if part is None else part[:, :src_len] for part in (src, src_mask)], tgt[:, :tgt_len], loss_mask[:, :tgt_len]
        return batch, [prompt[:src_len] for prompt in prompts], min(new, tgt_len)
    new = min(new, max(1, tgt_len // 2))
    width = min(tgt_len, tgt.shape[1])
    ends = [max(width, 1 + row.nonzero()[0].max(initial=0)) for row in loss_mask]  # behind them, shorter rows are padding
    tgt, loss_mask = (np.stack([row[end - width:end] for row, end in zip(part, ends)]) for part in (tgt, loss_mask))
    return (None, None, tgt, loss_mask), [prompt[max(0, len(prompt) - tgt_len + new):] for prompt in prompts], new


@torch.no_grad()
def parity(model, exported, batch, prompts, pictures, new):
    """Beside torch in float32: the largest difference of a logit, the held-out loss of both, and the share of the tokens of torch's
    greedy answers, of `new` tokens each, that the export would have chosen as well."""
    sums, widest, largest = np.zeros(3), 0.0, 0.0
    if not batch[3].any():
        raise UserError("no token of an answer is left in the held-out rows to compare by: --tgt_len is too short for them")

    def seen(b):
        """What torch and the export are given of a row's pictures."""
        return [dict(images=side.see(pictures[b])[0]) if pictures and pictures[b] else {} for side in (model, exported)]
    for b in tqdm(range(len(prompts)), desc="parity, losses", leave=False):
        src, src_mask, tgt, loss_mask = (None if part is None else torch.from_numpy(part[b:b + 1]) for part in batch)
        sees, images = seen(b)
        expected, loss = model(src, src_mask, tgt, loss_mask, reduction="sum", **sees)
        memory = exported.encode([src[0][src_mask[0]].tolist() if src_mask is not None else src[0].tolist()], **images) if src is not None else ({}, None)
        T = tgt.size(1)
        images = {} if src is not None else images
        logits = exported.request([T], 1, *memory).feed(shift_right(tgt, model.config.bos_id).numpy(), np.array([T]), np.arange(T), **images).astype(np.float32)
        widest = max(widest, np.abs(logits - expected[0].numpy())[loss_mask[0].numpy()].max(initial=0))
        largest = max(largest, expected.abs().max().item())
        sums += [loss.item(), model.loss(torch.from_numpy(logits)[None], tgt, loss_mask).item(), loss_mask.sum().item()]
    endless = type(model).__new__(type(model))
    endless.__dict__ = model.__dict__ | dict(config=replace(model.config, eos_id=-1))  # answers of full length
    same = total = 0
    for b, prompt in enumerate(tqdm(prompts[:4], desc="parity, answers", leave=False)):
        sees, images = seen(b)
        wanted = [step[0] for step in endless.generate([prompt], new, **sees)]
        request, logits = exported.start([prompt], new, **images)
        for id in wanted:
            same, total = same + int(logits[0].argmax() == id), total + 1
            if total % new:
                logits = request.step(np.array([id]))
    torch_loss, loss = sums[0] / sums[2], sums[1] / sums[2]
    return dict(rows=len(prompts), logit_difference=float(widest), largest_logit=largest, agreement=same / total, torch_loss=torch_loss, loss=loss,
                loss_change=loss / torch_loss - 1)


# ---------------------------------------------------------------------------------------------------------------------
# ... and out again

def write_run(name, folder, tokenizer_file=None):
    """Writes foreign weights as a run folder, which every script takes."""
    tokenizer = load_tokenizer(tokenizer_of(name, foreign_config(name)[1], tokenizer_file))
    model = fit_vocabulary(load_foreign(name), tokenizer, name)
    config, seeing = model.config, isinstance(model, VisionLM)
    arch, objective = ("encdec", "seq2seq" if seeing else "prefix") if config.n_enc else ("dec", "causal")  # as the released code asks its text model: no end behind the source
    sizes = dict(preset=preset_of(config), n_enc=config.n_enc or None, n_dec=config.n_dec, n_embd=config.n_embd, n_head=config.n_head, n_kv_head=config.n_kv_head, head_dim=config.head_dim,
                 n_hidden=config.n_hidden)
    data = "docstring" if seeing else "pycode"
    lengths = dict(src_len=min(1024, config.src_len or config.tgt_len * 3 // 4), tgt_len=min(256, config.tgt_len if config.n_enc else config.tgt_len // 4))  # of rows, not what it can read
    settings = asdict(resolve(replace(TrainSettings(), arch=arch, objective=objective, data=data, tokenizer=name, cross_rope=False, **sizes, **lengths)))
    settings |= dict(init_from=name, data="shapes" if seeing else data)  # rows of which an export's parity report reads
    model.save(folder)
    tokenizer.save(folder)
    write_record(folder, settings, dict(torch=torch.__version__), weights_of=name)
    return model


def preset_of(config):
    """The preset whose defaults of training suit a model of this width."""
    return next((name for name in ("nano", "mini", "small") if config.n_embd <= 1.25 * PRESETS[name]["n_embd"]), "330m")


@torch.no_grad()
def write_hf(model, tokenizer, folder, run, record, dtype):
    """Writes a decoder-only run as a folder of the Llama family: config.json, model.safetensors, tokenizer.json and a model card. Equal logits up to the trained length, past which
    our RoPE stretches. The scale of our embeddings goes into the weights, which unties them from the output layer."""
    config = model.config
    about = about_of(config)
    tied = config.tied and config.embed_scale == 1
    about |= dict(tie_word_embeddings=tied, torch_dtype=str(dtype).removeprefix("torch."))
    own = {key: p.detach().to(dtype) for key, p in model.state_dict().items()}
    own["head.weight"] = own.get("head.weight", own["embed.weight"])
    own["embed.weight"] = own["embed.weight"] * config.embed_scale
    names = llama_names(config, fused=False)
    tensors = {names[key][0]: p.contiguous() for key, p in own.items() if not (tied and key == "head.weight")}
    if bad := [key for key, p in tensors.items() if not all(map(torch.isfinite, torch.aminmax(p)))]:
        raise UserError(f"{run}: {bad[0]} is too large for {about['torch_dtype']}: use --precision=fp32")
    if about.get("attention_bias") and about["model_type"] == "qwen3":
        tensors |= {f"model.layers.{i}.self_attn.o_proj.bias": torch.zeros(config.n_embd, dtype=dtype) for i in range(config.n_dec)}
    os.makedirs(folder)
    save_file(tensors, os.path.join(folder, "model.safetensors"), metadata=dict(format="pt"))
    source, tokenizer_config = to_foreign(tokenizer)
    generation = dict(bos_token_id=config.bos_id, eos_token_id=config.eos_id, pad_token_id=config.pad_id)
    texts = {"config.json": json.dumps(about, indent=1), "generation_config.json": json.dumps(generation, indent=1), "tokenizer.json": source, "tokenizer_config.json": tokenizer_config,
             "README.md": card(model, run, record, about)}
    for name, text in texts.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
            f.write(text)


def card(model, run, record, about):
    """The model card: what the run folder knows."""
    settings, lines = record["settings"], []
    with contextlib.suppress(OSError, ValueError, KeyError):
        with open(os.path.join(run, "log.jsonl"), encoding="utf-8") as f:
            rows = [json.loads(line) for line in f]
        last, best = rows[-1], min((row["val_loss"] for row in rows if "val_loss" in row), default=math.nan)
        lines.append(f"- Trained for {last['step']:,} steps on {last['tokens']:,} tokens, {last['time_s'] / 60:.1f} minutes; lowest held-out loss {best:.3f} nats a token.")
    between = ". A prompt is the source followed by `<sep>`; what comes then is the answer" if settings["objective"] == "seq2seq" else ""
    return "\n".join(["---", "library_name: transformers", "pipeline_tag: text-generation", "---", f"# {os.path.basename(run)}", "",
                      f"A decoder-only language model of {model.num_params():,} parameters, trained with nanoEncDec and written as `{about['architectures'][0]}`.", "",
                      f"- Data: {settings['data']}; objective: {settings['objective']}{between}.",
                      *lines, f"- Trained length: {model.config.tgt_len} tokens, prompt and answer together. Every text begins with its begin-of-sequence token.",
                      f"- Command: `{' '.join(record.get('command', ['unknown']))}`", f"- Versions: {', '.join(f'{k} {v}' for k, v in record.get('versions', {}).items())}", ""])


@dataclass
class Settings:
    run: str = setting(None, "run folder; default: the newest in out/. With --format=run, weights of others: hf:FOLDER_OR_ID, mu:FILE or mu:FOLDER")
    out: str = setting(None, "folder to write; default: the run's name with the precision behind it, static- before that; or with -hf")
    format: str = setting("onnx", "onnx; hf: a folder that `transformers` loads (decoder-only runs; fp32 or fp16); run: weights of others as a run folder", ("onnx", "hf", "run"))
    tokenizer: str = setting(None, "run: tokenizer.json, where none lies beside the weights (the released checkpoint has Phi-3.5's)")
    precision: str = setting("fp32", "of the weights; with int4 the encoder, which computes more than it reads, stays int8; 16x8 is of --static: activations of "
                             "16 bits, weights of 8 (int8 there: activations of 8 into matrix products)", ("fp32", "fp16", "int8", "int4", "16x8"))
    static: bool = setting(False, "fixed shapes and plain operators, activations rounded to calibrated ranges: what compilers for NPUs take; one prompt at a time")
    src_len: int = setting(None, "static: the longest prompt of an encoder; default: the length it was trained for", type=int)
    tgt_len: int = setting(None, "static: positions of the decoder, the prompt's too if it has no encoder; default: as trained", type=int)
    calibrate: int = setting(16, "static: training rows that the ranges of the activations are taken from")
    data: str = setting(None, "what the parity report (and calibration) reads its rows of; default: what the run was trained on")
    rows: int = setting(16, "held-out rows that the parity report reads")
    new: int = setting(128, "tokens of the greedy answers that it compares")
    threads: int = setting(0, "CPU threads; 0 is the libraries' own choice")
    json: str = setting(None, "write the report to this file")


def check_static(cfg, config):
    """Lengths of a static export, and what does not go with it."""
    if not cfg.static:
        for name in ("src_len", "tgt_len"):
            if getattr(cfg, name) is not None:
                raise UserError(f"--{name} is for --static: the lengths of other exports are free")
        if cfg.precision == "16x8":
            raise UserError("--precision=16x8 is for --static")
        return
    if cfg.precision in ("fp16", "int4"):
        raise UserError(f"--static has the precisions fp32, int8 and 16x8, not {cfg.precision}")
    if cfg.src_len is not None and not config.n_enc:
        raise UserError(f"--src_len={cfg.src_len}: a decoder-only model has no encoder; --tgt_len counts its prompt and answer together")
    for name in ("src_len", "tgt_len"):
        value = getattr(config, name) if getattr(cfg, name) is None else getattr(cfg, name)
        if value < 1 and (config.n_enc or name == "tgt_len"):
            raise UserError(f"--{name}={value} must be at least 1")
        setattr(cfg, name, value)


def check_format(cfg):
    """What of the command line goes with which format."""
    foreign = cfg.run.startswith(PREFIXES)
    if foreign != (cfg.format == "run"):
        raise UserError(f"--run={cfg.run}: " + ("weights of others become a run first: --format=run --out=RUN" if foreign else "--format=run is for weights of others, hf:... or mu:..."))
    if cfg.format == "run" and not cfg.out:
        raise UserError("--format=run needs --out=FOLDER for the run")
    if cfg.tokenizer and cfg.format != "run":
        raise UserError("--tokenizer is for --format=run: a run has its own")
    if cfg.format != "onnx" and (cfg.static or cfg.precision not in (("fp32", "fp16") if cfg.format == "hf" else ("fp32",))):
        raise UserError(f"--format={cfg.format} has no --static, and {'the precisions fp32 and fp16' if cfg.format == 'hf' else 'keeps the precision of the weights'}")
    if idle := [name for name in ("src_len", "tgt_len", "calibrate", "data", "rows", "new", "json") if name in given()] if cfg.format != "onnx" else []:
        raise UserError(f"--{idle[0]} is for --format=onnx")


def convert(cfg, out):
    """--format=run and hf."""
    new = out + ".new"  # what is half written is never at `out`
    shutil.rmtree(new, ignore_errors=True)
    if cfg.format == "run":
        model = write_run(cfg.run, new, cfg.tokenizer)
        then = f"python sample.py --run={out} talks to it; train.py --init_from={out} goes on from it"
    else:
        model, record = load_model(cfg.run), read_record(cfg.run)
        write_hf(model, load_tokenizer(cfg.run), new, cfg.run, record, torch.float16 if cfg.precision == "fp16" else torch.float32)
        then = f"transformers.AutoModelForCausalLM.from_pretrained({out!r}) loads it"
    shutil.rmtree(out, ignore_errors=True)
    os.replace(new, out)
    print(f"{model.num_params():,} parameters in {out}; {then}")


def main():
    cfg = parse(Settings, __doc__)
    for name in ("rows", "new", "calibrate"):
        if getattr(cfg, name) < 1:
            raise UserError(f"--{name}={getattr(cfg, name)} must be at least 1")
    cfg.run = (cfg.run or newest_run()).rstrip("/")
    check_format(cfg)
    out = (cfg.out or f"{cfg.run}-{'hf' if cfg.format == 'hf' else 'static-' * cfg.static + cfg.precision}").rstrip("/")
    if os.path.exists(out) and not (cfg.format == "onnx" and is_export(out)) and (not os.path.isdir(out) or os.listdir(out)):
        raise UserError(f"--out={out} holds something else: choose another folder")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if cfg.format != "onnx":
        convert(cfg, out)
        return
    record, tokenizer = read_record(cfg.run)["settings"], load_tokenizer(cfg.run)
    model = load_model(cfg.run).float().eval()
    if model.config.image_id >= 0 and (cfg.static or model.config.look != "none"):
        raise UserError("--static is for runs without pictures" if cfg.static else f"{cfg.run} has --look={model.config.look}, a cross-attention that exports do not have")
    check_static(cfg, model.config)
    batch, prompts, pictures = real_rows(cfg, record, model, tokenizer, "val", cfg.rows)
    new = out + ".new"  # what is half written is never at `out`
    shutil.rmtree(new, ignore_errors=True)
    if cfg.static:
        lengths = cfg.src_len, cfg.tgt_len
        batch, prompts, cfg.new = fitting(batch, prompts, *lengths, cfg.new)
        seen, _, _ = fitting(*real_rows(cfg, record, model, tokenizer, "train", cfg.calibrate)[:2], *lengths, 1)
        write_static(model, new, cfg.precision, record["objective"], *lengths, seen)
    else:
        write(model, new, cfg.precision, record["objective"])
    tokenizer.save(new)
    size, params = sum(os.path.getsize(os.path.join(new, name)) for name in os.listdir(new)), model.num_params()
    print(f"{params:,} parameters in {size:,} bytes, {8 * size / params:.2f} bits each")
    found = parity(model, (Static if cfg.static else Exported)(new, cfg.threads), batch, prompts, pictures, cfg.new)
    print(f"on {found['rows']} held-out rows of {cfg.data or record['data']}: largest logit difference {found['logit_difference']:.2g} (logits up to "
          f"{found['largest_logit']:.3g}); loss {found['loss']:.4f}, torch {found['torch_loss']:.4f} ({found['loss_change']:+.2%}); "
          f"{found['agreement']:.1%} of torch's greedy tokens")
    if cfg.json:
        write_json(cfg.json, dict(rows=[dict(run=cfg.run, precision=cfg.precision, bytes=size, params=params) | found]))
    if cfg.precision == "fp32" and not found["logit_difference"] <= 1e-3 * max(1, found["largest_logit"]):
        raise UserError(f"the fp32 export does not say what torch says; what was written is in {new}")
    shutil.rmtree(out, ignore_errors=True)
    os.replace(new, out)
    print(f'python sample.py --run={out} --prompt="..." talks to it, without torch')


if __name__ == "__main__":
    script(main)
