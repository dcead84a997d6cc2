"""The machine: device, precision, processes, and what makes it fast. None of it is needed to
understand a training step. World.place puts fast_attention, narrow, in_chunks and
aligned_logits around the model; each computes what model.py says."""

import contextlib
import ctypes
import math
import os
import shutil
import signal
import sys
from datetime import timedelta
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._triton import has_triton
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from lib.settings import UserError, printable, progress
from model import Attention, Cache, LayerCache, scaled_dot_product


def start(cfg):
    """From the keys device, dtype, threads, seed and, where there are any, compile, deterministic
    and checkpoint_blocks: the World."""
    if cfg.threads:
        torch.set_num_threads(min(cfg.threads, os.cpu_count() or 1))
    torch.use_deterministic_algorithms(getattr(cfg, "deterministic", False))
    keep_memory()
    torch.manual_seed(cfg.seed)
    return World(cfg)


class World:
    """This process: rank, size, device, dtype of the matrix products, whether to compile."""

    scale, good_steps = 1.0, 0  # what the loss is multiplied by, in float16

    def __init__(self, cfg):
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.device = find_device(cfg.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        if self.size > 1 and not dist.is_initialized():
            nccl = dict(backend="cpu:gloo,cuda:nccl", device_id=self.device)
            kind = nccl if self.device.type == "cuda" else dict(backend="gloo")
            # The others wait while the first process tokenizes, which can take hours.
            dist.init_process_group(**kind, timeout=timedelta(days=2))
        self.dtype = find_dtype(cfg.dtype, self.device)
        self.checkpoint = getattr(cfg, "checkpoint_blocks", False)
        wanted, gpu = getattr(cfg, "compile", "false"), self.device.type == "cuda"
        possible = has_triton() if gpu else shutil.which("g++")
        if wanted == "true" and not possible:
            self.say(f"no {'Triton' if gpu else 'C++ compiler'} here: not compiled, thus slower")
        # Compiling takes half a minute on a CPU, and trains 1.4 times as fast after that.
        long = self.device.type == "cpu" and (getattr(cfg, "max_minutes", None) or 0) > 2
        pays = wanted == "true" or (wanted == "auto" and (gpu or long))
        self.compile = bool(possible and pays)

    def autocast(self):
        """Around every forward pass."""
        half = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype if half else None, enabled=half)

    def say(self, text):
        """A line on standard error, by the first process."""
        if self.rank == 0:
            tqdm.write(printable(text), file=sys.stderr)

    def progress(self, rows=None, what=None, **more):
        """lib.settings.progress, by the first process."""
        return progress(rows, what, disable=self.rank > 0, **more)

    def place(self, model):
        """The model on this device, with the attention that suits it."""
        model = tune(model.to(self.device))
        model.embed.register_forward_hook(narrow)
        model.loss = partial(in_chunks, model.loss, model.config.vocab_size)
        if self.device.type != "cpu" and model.config.vocab_size % 64:
            model.logits = partial(aligned_logits, (model.head or model.embed).weight)
        if self.checkpoint:
            checkpoint_blocks(model)
        return model

    def describe(self):
        how, threads = "compiled" if self.compile else "eager", torch.get_num_threads()
        return f"{self.device}, {str(self.dtype)[6:]}, {how}, {threads} threads"

    def rows(self, micro, batch_size):
        """Numbers in the global batch of the rows of this process's micro-batch."""
        return np.arange(batch_size) + (micro * self.size + self.rank) * batch_size

    def sum(self, *numbers):
        """Sums of numbers over all processes."""
        return [sum(each) for each in zip(*self.gather(numbers))]

    def agree(self, value):
        """The first process's value, for all. Also waits for all."""
        return self.gather(value)[0]

    def gather(self, value):
        """Every process's value, in a list."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def sum_gradients(self, params):
        """Sums the gradients over all processes, in one message, once a step."""
        if self.size == 1:
            return
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in params]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for p, part in zip(params, flat.split([g.numel() for g in grads])):
            p.grad = part.view_as(p)

    def usable(self, loss, norm, step, cfg):
        """Whether the gradients of a step may reach the weights; UserError if they are not finite.
        In float16 they overflow now and then: that step is left out, and the loss is multiplied by
        a smaller `scale` from then on, so that small gradients stay above zero as well as can be
        (Micikevicius et al., 2018)."""
        good = math.isfinite(loss + norm)
        if self.dtype == torch.float16 and self.scale > 2**-20:
            self.good_steps = self.good_steps + 1 if good else 0
            grow = 2 if good and self.good_steps % 500 == 0 else 1
            self.scale *= grow if good else 0.5
        elif not good:
            what = f"step {step}: the loss is {loss}, its gradient {norm}: lower --lr={cfg.lr} or"
            raise UserError(f"{what} raise --warmup_iters; the checkpoint in {cfg.out} is kept")
        return good

    def stop(self):
        if self.size > 1:
            dist.destroy_process_group()


def find_device(name):
    """The torch.device of --device; auto takes CUDA, then MPS, then the CPU. On a machine with
    several GPUs, each process has its own."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    others = ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    usable = gpus[int(os.environ.get("LOCAL_RANK", 0)) :] + others
    wanted = (gpus or others)[0].split(":")[0] if name == "auto" else name
    if "LOCAL_RANK" in os.environ and name.startswith("cuda:"):
        raise UserError(f"--device={name}: torchrun gives each process a GPU: use --device=cuda")
    if gpus and usable == others and name in ("auto", "cuda"):
        raise UserError(f"torchrun: more processes than GPUs: use --nproc_per_node={len(gpus)}")
    for device in usable:
        if wanted in (device, device.split(":")[0]):
            return torch.device(device)
    raise UserError(f"--device={name} cannot be used here: use one of {', '.join(usable)}")


def find_dtype(name, device):
    """The torch.dtype of --dtype; auto is bfloat16 where the device multiplies it in hardware, and
    float16 on older cards with tensor cores, as V100 and T4."""
    if name != "auto":
        return getattr(torch, name)
    if has_bf16(device):
        return torch.bfloat16
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
    return torch.float16 if old else torch.float32


def has_bf16(device):
    """Whether a device multiplies bfloat16 in hardware; emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def keep_memory():
    """Tells glibc to keep freed memory for the next tensor. By default it hands large blocks back
    to the system, which zeroes their pages when they are wanted again, at every step: 7% of the
    training time of 30 M parameters on a CPU."""
    with contextlib.suppress(OSError, AttributeError):  # another libc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large tensor
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep what is free


# ----------------------------------------------------------------------------------------------
# What makes the model faster or smaller, put around it


def fast_attention(q, k, v, mask, causal):
    """The same as model.scaled_dot_product. In bfloat16, torch's fused kernel does not use a CPU's
    matrix units: the formula written out is twice as fast, as long as all scores fit. Where no mask
    depends on the query, a group's query heads are laid out along T: up to six times as fast."""
    B, H, T, D = q.shape
    if q.is_cpu and T > 1 and q.dtype == torch.bfloat16 and B * H * T * k.size(2) < 2**30:
        with torch.autocast("cpu", enabled=False):  # which would compute softmax in float32
            k, v = k.to(q.dtype), v.to(q.dtype)  # a cache keeps the weights' type
            scores = (q * D**-0.5).reshape(B, k.size(1), -1, D) @ k.mT  # (B, H_kv, H/H_kv T, S)
            if causal:
                mask = torch.ones(T, T, dtype=torch.bool).tril()[None, None]
            if mask is not None:
                scores = scores.view(B, H, T, -1).masked_fill(~mask, -torch.inf).view_as(scores)
            return (scores.softmax(-1) @ v).reshape(B, H, T, D)
    if not causal and (mask is None or mask.size(2) == 1):
        grouped = q.reshape(B, k.size(1), -1, D)
        return F.scaled_dot_product_attention(grouped, k, v, mask).reshape(B, H, T, D)
    half = q.dtype != torch.float32 or torch.is_autocast_enabled("cuda")
    if not q.is_cpu and k.size(1) < H and (mask is not None or not half):
        # On a GPU only flash attention knows groups; without it, all scores would be kept.
        k, v = (x.repeat_interleave(H // x.size(1), dim=1) for x in (k, v))
    return scaled_dot_product(q, k, v, mask, causal)


def tune(model):
    """Gives the model the attention that is fast on its device."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.kernel = fast_attention
    return model


def narrow(embed, ids, x):
    """Casts embeddings once; else autocast would add up the residual stream in float32."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def aligned_logits(weight, states):
    """As model.logits. Tensor cores are fast when the vocabulary is a multiple of 64: in training
    the matrix is padded with zeros, and their logits are cut off again."""
    padded = F.pad(weight, (0, 0, 0, -len(weight) % 64)) if torch.is_grad_enabled() else weight
    return F.linear(states, padded)[..., : len(weight)]


CHUNK = 2**26  # logits that exist at a time: 256 MB in float32


def in_chunks(function, n_words, states, *more):
    """Sums function(*parts) over parts of the rows of `states` (rows, ..., C) and of `more`. No
    more than CHUNK logits exist at a time; the backward pass computes each part's again."""
    size = CHUNK // max(1, n_words * states[:1, ..., 0].numel()) or 1
    if len(states) <= size:
        return function(states, *more)
    parts = zip(*(tensor.split(size) for tensor in (states, *more)))
    return sum(checkpoint(function, *part, use_reentrant=False) for part in parts)


def checkpoint_blocks(model):
    """Of each block only the input is kept for the backward pass, which computes the rest again: a
    third more work for a fraction of the memory."""
    for block in [*model.enc, *model.dec]:
        block.forward = partial(recomputed, block.forward)


def recomputed(forward, *inputs):  # a frame of its own, which torch.compile looks for
    return checkpoint(forward, *inputs, use_reentrant=False)


def fit_memory(model, train_set, cfg, world):
    """Before training on CUDA: one pass over the largest of the first batches, beside room for the
    optimizers. Where memory is short, rows a pass are halved and passes doubled until it fits; the
    rows of a step stay what they are."""
    while world.device.type not in ("cpu", "mps"):
        batches = [train_set.batch(step, world.rows(0, cfg.batch_size)) for step in range(16)]
        largest = max(batches, key=lambda batch: sum(np.size(part) for part in batch[:2]))
        room = []
        with contextlib.suppress(torch.OutOfMemoryError), world.autocast():
            room += [torch.empty_like(p) for p in model.parameters() for _ in range(3)]
            model(*to_device(largest, world.device)).backward()
            room.append("enough")
        model.zero_grad(set_to_none=True)
        if all(world.gather(room[-1:] == ["enough"])):
            return
        if cfg.batch_size % 2:
            raise UserError(f"--batch_size={cfg.batch_size} does not fit: choose a smaller one")
        cfg.batch_size, cfg.grad_accum = cfg.batch_size // 2, cfg.grad_accum * 2
        size = f"--batch_size={cfg.batch_size} --grad_accum={cfg.grad_accum}, the same rows"
        world.say(f"too little memory: going on with {size}")


def pack(model):
    """Once before generating: where this CPU multiplies bfloat16, keeps a second copy of the
    decoder's matrices in the blocks that oneDNN reads fastest, 1.5 times the tokens/s. A packed
    model cannot be trained. Returns the model."""
    weight = model.embed.weight
    if weight.is_cpu and weight.dtype == torch.bfloat16 and has_bf16(weight.device):
        for module in model.dec.modules():
            if isinstance(module, nn.Linear):
                module.forward = packed_linear(module.weight, module.bias)
        model.logits = packed_linear((model.head or model.embed).weight, None)
    return model


def packed_linear(weight, bias):
    """A function that multiplies by a packed copy of `weight`: the operator of torch.compile."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def compile_parts(model, batches, world):
    """Compiles each block and the loss by itself: blocks of one kind share their code, so that 48
    layers compile as fast as one. The code is made for `batches`, a list; where there are several,
    for shapes that differ. Rarer shapes run as they are later, because compiling for one in
    mid-training takes as long as thirty steps."""
    world.say("compiling, a minute or so")
    # With vectors of 512 bits, torch 2.13 makes NaN of bfloat16's gradients.
    options = {"cpp.simdlen": 256} if torch.cpu._is_avx512_supported() else None
    how = dict(dynamic=len(batches) > 1, options=options)
    for block in [*model.enc, *model.dec]:
        block.compile(**how)
    model.loss = partial(in_chunks, torch.compile(model.loss.args[0], **how), *model.loss.args[1:])
    for batch in batches:
        with world.autocast():
            model(*to_device(batch, world.device)).backward()
    model.zero_grad(set_to_none=True)
    torch.compiler.set_stance("eager_on_recompile")


class StaticLayer(LayerCache):
    """A LayerCache that writes at `slot`, a tensor, and returns all slots."""

    def append(self, k, v):
        self.keys[:, :, self.slot], self.values[:, :, self.slot] = k, v
        return self.keys, self.values


class StaticCache(Cache):
    """A Cache for a step of one token, whose shapes stay: what lies behind `slot` is not seen."""

    def __init__(self, slot, pad, stretch, src_mask, layers):
        self.slot, self.pad, self.stretch, self.src_mask = slot, pad, stretch, src_mask
        self.layers = [StaticLayer(*parts[:2], parts[2:]) for parts in layers]
        for layer in self.layers:
            layer.slot = slot

    def positions(self, T):
        return self.slot - self.pad

    def mask(self, T):
        key = torch.arange(self.layers[0].keys.size(2), device=self.slot.device)
        return ((self.pad <= key) & (key <= self.slot))[:, None, None], False


class StaticSteps:
    """Takes the place of model.decode, for one request at a time, and not with --look: steps of one
    token run as compiled code of fixed shapes, on a GPU as one CUDA graph instead of hundreds of
    launches that each take longer than their work. A graph is recorded for addresses, so a request
    moves into tensors that stay; their lengths are multiples of 128, so that a graph serves many
    requests."""

    def __init__(self, model, **how):
        torch._dynamo.config.recompile_limit = 64  # shapes
        self.decode, self.places, self.layers, model.decode = model.decode, {}, [[None]], self
        self.step = torch.compile(self.one_token, fullgraph=True, dynamic=False, **how)

    def one_token(self, tokens, *state):
        return self.decode(tokens, cache=StaticCache(*state))

    def __call__(self, tokens, encoded=None, src_mask=None, cache=None):
        if cache is None or tokens.size(1) > 1:
            return self.decode(tokens, encoded, src_mask, cache)
        if cache.layers[0].keys is not self.layers[0][0]:
            self.move(cache)  # a new request, or one of fewer rows than before
        slot = torch.full_like(tokens[:1, 0], cache.length)
        cache.layers[0].length += 1
        # Cloned: the next step writes over what a CUDA graph returns.
        return self.step(tokens, slot, *self.rows, self.layers).clone()

    def move(self, cache):
        first, B = cache.layers[0], len(cache.layers[0].keys)
        rows, seen = first.keys.new_zeros(B, 1, dtype=torch.long), cache.src_mask
        if first.memory:
            whole = torch.ones_like(first.memory[0][:, 0, :, 0], dtype=torch.bool)
            seen = F.pad(whole if seen is None else seen, (0, -whole.size(1) % 128))
            cache.src_mask = seen
        stretch = torch.as_tensor(cache.stretch, device=rows.device).expand(B, 1)
        self.rows = rows if cache.pad is None else cache.pad[:, None], stretch, seen
        self.layers = []
        for i, layer in enumerate(cache.layers):
            parts = enumerate((layer.keys, layer.values, *(layer.memory or ())))
            parts = [self.placed((i, j), part) for j, part in parts]
            layer.keys, layer.values, layer.memory = *parts[:2], parts[2:]
            self.layers.append(parts)

    def placed(self, name, x):
        """x (B, H_kv, slots, D), longer, where the last one of this name and shape was."""
        x = F.pad(x, (0, 0, 0, -x.size(2) % 128))
        if (name, x.shape) not in self.places:
            self.places[name, x.shape] = torch.empty_like(x)
            torch._dynamo.mark_static_address(self.places[name, x.shape])
        return self.places[name, x.shape].copy_(x)


def to_device(batch, device):
    """numpy arrays, or None -> tensors on a device, or None. A copy to a GPU is not waited for."""
    tensors = [x if x is None else torch.from_numpy(x) for x in batch]
    if device.type in ("cpu", "mps"):
        return [x if x is None else x.to(device) for x in tensors]
    return [x if x is None else x.pin_memory().to(device, non_blocking=True) for x in tensors]


def catch_signals():
    """A list that Ctrl-C and SIGTERM are noted in, for the loop to see between steps. A second one
    stops at once."""
    caught = []

    def note(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return caught
