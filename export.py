"""Turns a run into a folder that needs no torch: ONNX graphs for ONNX Runtime.

    python export.py --run=out/encdec-nano-pycode                     to out/encdec-nano-pycode-fp32
    python export.py --run=RUN --precision=int8 --out=FOLDER          int8: a quarter of the size
    python sample.py --run=FOLDER --prompt="..."                      talks to it, without torch

Two graphs share one file of weights. The encoder's reads a source and gives every decoder layer's cross-attention keys and
values. The decoder's reads any number of tokens behind what its caches hold, writes their keys and values into the caches in
place, and gives logits at the positions it is asked for. A decoder-only model is the second graph alone.

The graphs are written here node by node rather than traced by torch.onnx: the reader sees what runs, and ONNX Runtime's fused
operators (GroupQueryAttention, MultiHeadAttention, RotaryEmbedding, SkipSimplifiedLayerNormalization, MatMulNBits) stand in them
from the start instead of having to be found again in a trace.
"""
import json
import os
import shutil
from dataclasses import asdict, dataclass, replace

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from tqdm import tqdm

from data.cli import UserError, parse, script, setting
from data.corpus import prepare
from data.exported import FILE, Exported, Request, is_export
from data.objectives import Objective, uniforms
from data.pairs import Pairs
from data.runs import newest_run, read_record, write_json
from data.tasks import load_task
from data.tokenizer import load_tokenizer
from model import Transformer, shift_right

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

    def __init__(self, weights, precision, matmul):
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

    def scalar(self, value):
        name = f"scalar_{value}"
        self.tensors[name] = onnx.numpy_helper.from_array(np.array(value, self.float), name)
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
    return tensor.detach().float().numpy()


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
    return x if cfg.embed_scale == 1 else g.op("Mul", x, g.scalar(cfg.embed_scale))


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


def encoder_graph(model, weights, precision):
    """tokens (B, S), positions (rows of the tables cos and sin), last (B,): each row's length - 1, total: S -> memory_key_i and
    memory_value_i (B, H_kv, S, D), i over the decoder's layers."""
    cfg = model.config
    g = Graph(weights, precision, {"int8": "integer", "int4": "integer"}.get(precision, "float"))
    tokens, positions = (g.input(name, "rows", "source", dtype=np.int64) for name in ("tokens", "positions"))
    last, total = g.input("last", "rows", dtype=np.int32), g.input("total", dtype=np.int32)
    rope = [positions, *(g.input(name, "slots", cfg.head_dim // 2) for name in ("cos", "sin"))]
    x = embedding(g, model, tokens)
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
    name = "embed" if model.head is None else "head"
    if precision_bits(g):
        bits, block = precision_bits(g), block_of(cfg.n_embd)
        packed, scales = quantize_blocks(weight, bits, block)
        g.op("MatMulNBits", h, g.weight(f"{name}.int{bits}", packed), g.weight(f"{name}.scales{bits} as list", scales.reshape(-1)), domain=MS, outputs=["logits"], N=cfg.vocab_size, K=cfg.n_embd, bits=bits, block_size=block, accuracy_level=4)
    else:
        g.op("FusedMatMul", h, g.weight(name, weight), domain=MS, outputs=["logits"], transB=1)


def write(model, folder, precision, objective="seq2seq"):
    """Writes the graphs, their weights, and what data/exported.py has to know, into a folder."""
    os.makedirs(folder)
    weights = Weights(os.path.join(folder, "weights.bin"))
    if model.config.n_enc:
        encoder_graph(model, weights, precision).save(os.path.join(folder, "encoder.onnx"), "encoder")
    g = decoder_graph(model, weights, precision)
    g.save(os.path.join(folder, "decoder.onnx"), "decoder")
    weights.file.close()
    read = {name.split(" as ")[0] for name in g.tensors if not (name.startswith("embed") and model.head is not None)}
    sizes = {name: os.path.getsize(os.path.join(folder, name)) for name in sorted(os.listdir(folder))}
    write_json(os.path.join(folder, FILE), dict(precision=precision, objective=objective, config=asdict(model.config), files=sizes,
                                                step_bytes=sum(weights.places[name][1] for name in read if name in weights.places)))


# ---------------------------------------------------------------------------------------------------------------------
# Does the export say what the run says?

def real_rows(cfg, record, model, tokenizer):
    """Held-out rows of what the run was trained on, as a batch (src, src_mask, tgt, loss_mask), and prompts to continue."""
    data, decoder_only = cfg.data or record["data"], model.config.n_enc == 0
    if record["objective"] == "seq2seq":
        task = load_task(data, record["source_col"], record["target_col"], record["skip_bad"], log=lambda text: None)
        rows = task.splits["val"]
        pairs = Pairs([rows[i] for i in np.linspace(0, len(rows) - 1, min(cfg.rows, len(rows))).astype(int)], tokenizer,
                      record["src_len"], record["tgt_len"], decoder_only)
        return pairs.batch(range(len(pairs))), [pairs.prompt(row) for row in range(len(pairs))]
    objective = Objective(record["objective"], tokenizer, record["src_len"], record["tgt_len"], decoder_only, record["noise"], record["mean_span"])
    text = prepare(data, cfg.run, text_col=record["text_col"], max_tokens=1, log=lambda text: None).splits["val"]
    starts = np.linspace(0, len(text) - objective.window, cfg.rows).astype(int)
    batch = objective.batch(text.windows(starts, objective.window), uniforms(0, 0, range(cfg.rows), objective.n_random))
    if decoder_only:
        halves = np.maximum(batch[3].argmax(1), batch[2].shape[1] // 2 * (record["objective"] == "causal"))
        return batch, [row[:half].tolist() for row, half in zip(batch[2], halves)]
    return batch, [row[row != tokenizer.pad].tolist() for row in batch[0]]


@torch.no_grad()
def parity(model, exported, batch, prompts, new):
    """Beside torch in float32: the largest difference of a logit, the held-out loss of both, and the share of the tokens of torch's
    greedy answers, of `new` tokens each, that the export would have chosen as well."""
    sums, widest, largest = np.zeros(3), 0.0, 0.0
    for b in tqdm(range(len(prompts)), desc="parity, losses", leave=False):
        src, src_mask, tgt, loss_mask = (None if part is None else torch.from_numpy(part[b:b + 1]) for part in batch)
        expected, loss = model(src, src_mask, tgt, loss_mask, reduction="sum")
        memory = exported.encode([src[0][src_mask[0]].tolist() if src_mask is not None else src[0].tolist()]) if src is not None else ({}, None)
        T = tgt.size(1)
        logits = Request(exported, [T], 1, *memory).feed(shift_right(tgt, model.config.bos_id).numpy(), np.array([T]), np.arange(T)).astype(np.float32)
        widest = max(widest, np.abs(logits - expected[0].numpy())[loss_mask[0].numpy()].max(initial=0))
        largest = max(largest, expected.abs().max().item())
        sums += [loss.item(), model.loss(torch.from_numpy(logits)[None], tgt, loss_mask).item(), loss_mask.sum().item()]
    endless = Transformer.__new__(Transformer)
    endless.__dict__ = model.__dict__ | dict(config=replace(model.config, eos_id=-1))  # answers of full length
    same = total = 0
    for prompt in tqdm(prompts[:4], desc="parity, answers", leave=False):
        wanted = [step[0] for step in endless.generate([prompt], new)]
        request, logits = exported.start([prompt], new)
        for id in wanted:
            same, total = same + int(logits[0].argmax() == id), total + 1
            if total % new:
                logits = request.step(np.array([id]))
    torch_loss, loss = sums[0] / sums[2], sums[1] / sums[2]
    return dict(rows=len(prompts), logit_difference=float(widest), largest_logit=largest, agreement=same / total, torch_loss=torch_loss, loss=loss,
                loss_change=loss / torch_loss - 1)


@dataclass
class Settings:
    run: str = setting(None, "run folder; default: the newest in out/")
    out: str = setting(None, "folder to write; default: the run's name with the precision behind it")
    precision: str = setting("fp32", "of the weights; with int4 the encoder, which computes more than it reads, stays int8", ("fp32", "fp16", "int8", "int4"))
    data: str = setting(None, "what the parity report reads held-out rows of; default: what the run was trained on")
    rows: int = setting(16, "held-out rows that the parity report reads")
    new: int = setting(128, "tokens of the greedy answers that it compares")
    threads: int = setting(0, "CPU threads; 0 is the libraries' own choice")
    json: str = setting(None, "write the report to this file")


def main():
    cfg = parse(Settings, __doc__)
    for name in ("rows", "new"):
        if getattr(cfg, name) < 1:
            raise UserError(f"--{name}={getattr(cfg, name)} must be at least 1")
    cfg.run = (cfg.run or newest_run()).rstrip("/")
    out = (cfg.out or f"{cfg.run}-{cfg.precision}").rstrip("/")
    if os.path.exists(out) and not is_export(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise UserError(f"--out={out} holds something else: choose another folder")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    record, tokenizer = read_record(cfg.run)["settings"], load_tokenizer(cfg.run)
    model = Transformer.load(cfg.run).float().eval()
    batch, prompts = real_rows(cfg, record, model, tokenizer)
    new = out + ".new"  # what is half written is never at `out`
    shutil.rmtree(new, ignore_errors=True)
    write(model, new, cfg.precision, record["objective"])
    tokenizer.save(new)
    size, params = sum(os.path.getsize(os.path.join(new, name)) for name in os.listdir(new)), model.num_params()
    print(f"{params:,} parameters in {size:,} bytes, {8 * size / params:.2f} bits each")
    found = parity(model, Exported(new, cfg.threads), batch, prompts, cfg.new)
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
