"""Runs a folder that export.py wrote, with numpy and onnxruntime alone: what one deploys.

The folder holds encoder.onnx and decoder.onnx, which a decoder-only model has alone; weights.bin
behind them; tokenizer.json; and export.json: configuration, precision, objective, the size of every
file. A static export of a decoder-only model has prefill.onnx, too.

Rows of a request are padded on the right, and each row's keys and values lie in its caches from
slot 0 on. model.Cache pads on the left; here no row needs to know of another's length.
"""

import os
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from lib.settings import UserError, from_dict, read_json

FILE = "export.json"
OUTSIDE = -100.0  # static exports add it to the score of what may not be seen: e^-100 is left of it


# What a request has to know of model.Config, and of a static export: its longest source, the
# decoder's positions, slots of its caches, tokens that prefill.onnx reads at a time.
SHAPE = "vocab_size n_enc n_dec n_kv_head head_dim src_len tgt_len rope_theta".split()
SHAPE += ["pad_id", "bos_id", "eos_id"]
STATIC = "src_len tgt_len slots chunk".split()


@dataclass
class About:
    """export.json. step_bytes: bytes of weights that one step of the decoder reads."""

    precision: str
    objective: str
    config: dict
    files: dict
    step_bytes: int
    static: dict = None


def is_export(folder):
    return os.path.exists(os.path.join(folder, FILE))


def read_about(folder):
    """export.json as a dict, its config and static as namespaces of numbers; "static" is in it for
    a static export alone. UserError if the folder is no export, or a file of it was cut off."""
    path = os.path.join(folder, FILE)
    if not os.path.exists(path):
        raise UserError(f"{path} is missing: python export.py --run={folder} makes an export")
    about = vars(from_dict(About, read_json(path), path))
    about["config"] = numbers(about["config"], SHAPE, path)
    if about["static"] is None:
        del about["static"]
    else:
        about["static"] = numbers(about["static"], STATIC, path)
    for name, size in about["files"].items():
        file = os.path.join(folder, os.path.basename(name))
        found = os.path.getsize(file) if os.path.isfile(file) else "no"
        if found != size:
            raise UserError(f"{file} has {found} bytes, not {size}: export the run again")
    return about


def numbers(values, names, path):
    whole = {n for n, x in values.items() if type(x) is int or n == "rope_theta"}
    if whole != set(names) or not all(-1 <= values[n] < 2**31 for n in names):
        raise UserError(f"{path} is damaged or not of this version: export the run again")
    return SimpleNamespace(**values)


def rope_table(slots, cfg, stretch=1.0):
    """cos and sin of RoPE's angles at positions 0 .. slots - 1, (slots, D/2) each; `stretch` as in
    model.rope_tables."""
    power = np.arange(0, cfg.head_dim, 2, dtype=np.float32) / np.float32(cfg.head_dim)
    stretch = np.float32(max(1, stretch))
    base = np.float32(cfg.rope_theta) * stretch ** np.float32(cfg.head_dim / (cfg.head_dim - 2))
    angle = np.arange(slots, dtype=np.float32)[:, None] * base**-power
    return np.cos(angle), np.sin(angle)


def padded(rows, pad):
    """Lists of ids -> (B, T) int64, padded on the right."""
    out = np.full((len(rows), max(map(len, rows))), pad, dtype=np.int64)
    for row, ids in zip(out, rows):
        row[: len(ids)] = ids
    return out


class Exported:
    """The model of a folder. `generate` is that of model.Transformer."""

    def __init__(self, folder, threads=0, device="cpu"):
        import onnxruntime  # sample.py reads this file for torch's runs, too

        self.about, self.ort, self.device = read_about(folder), onnxruntime, device
        self.config, self.step_bytes = self.about["config"], self.about["step_bytes"]
        self.float = np.float16 if self.about["precision"] == "fp16" else np.float32
        providers = ["CPUExecutionProvider"]
        providers = providers if device == "cpu" else ["CUDAExecutionProvider", *providers]
        if providers[0] not in onnxruntime.get_available_providers():
            raise UserError(f"--device={device}: this onnxruntime has no {providers[0]}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads  # 0 is all physical cores
        options.log_severity_level = 3
        self.sessions = {}
        for name in ("encoder", "prefill", "decoder"):
            if f"{name}.onnx" not in self.about["files"]:
                continue
            path = os.path.join(folder, f"{name}.onnx")
            try:
                self.sessions[name] = onnxruntime.InferenceSession(path, options, providers)
            except Exception as error:  # onnxruntime raises kinds of its own
                raise UserError(f"{path} cannot be loaded: {str(error)[:200]}") from None
        self.check(folder)

    def check(self, folder):
        """UserError where export.json and the graphs disagree."""
        cfg, decoder = self.config, self.sessions.get("decoder")
        items = [*decoder.get_inputs(), *decoder.get_outputs()] if decoder else []
        shapes = {item.name: item.shape for item in items}
        layers = sum(name.startswith("past_key_") for name in shapes)
        heads = cfg.n_kv_head * (self.about["static"].slots if "static" in self.about else 1)
        past, logits = shapes.get("past_key_0", [0]), shapes.get("logits", [0])
        found = layers, heads in past, past[-1], logits[-1]
        wanted = cfg.n_dec, True, cfg.head_dim, cfg.vocab_size
        if found != wanted or ("encoder" in self.sessions) != (cfg.n_enc > 0):
            raise UserError(f"{folder}: {FILE} does not describe its graphs: export the run again")

    def value(self, array):
        """An array where the sessions want it; on a CPU its own memory, not a copy."""
        return self.ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self.device)

    def run(self, graph, feeds, into=()):
        """Runs a graph on arrays or OrtValues by name; more feeds than it has inputs do not matter.
        Returns its outputs as OrtValues by name, but for those that are written `into` given ones.
        """
        session = self.sessions[graph]
        binding, names = session.io_binding(), [item.name for item in session.get_outputs()]
        for name in (item.name for item in session.get_inputs()):
            fed = feeds[name]
            fed = self.value(fed) if isinstance(fed, np.ndarray) else fed
            binding.bind_ortvalue_input(name, fed)
        for name in names:
            if name in into:
                binding.bind_ortvalue_output(name, into[name])
            else:
                binding.bind_output(name, self.device)
        session.run_with_iobinding(binding)
        outputs = dict(zip(names, binding.get_outputs()))
        return {name: value for name, value in outputs.items() if name not in into}

    def rope(self, slots, stretch):
        """RoPE's tables for a request: one for each stretch among its rows (B,), on top of one
        another, and where each row's begins; and cross-attention's, which is never stretched."""
        stretches, which = np.unique(np.maximum(stretch, 1), return_inverse=True)
        tables = [rope_table(slots, self.config, one) for one in stretches]
        cos, sin = (np.concatenate(part).astype(self.float) for part in zip(*tables))
        plain = [part.astype(self.float) for part in rope_table(slots, self.config)]
        starts = which.reshape(-1) * slots
        return dict(cos=cos, sin=sin, cross_cos=plain[0], cross_sin=plain[1]), starts

    def encode(self, prompts):
        """Lists of ids -> what the decoder is fed of them: the keys and values (B, H_kv, S, D) of
        every layer's cross-attention, and `source` (B, S), 1 at real tokens."""
        cfg = self.config
        tokens = padded([*prompts, [cfg.pad_id]], cfg.pad_id)[:-1]
        width, sizes = tokens.shape[1], np.array([len(prompt) for prompt in prompts])
        lengths = np.maximum(sizes, 1)  # an empty source lets its first padding be seen
        tables, starts = self.rope(width, sizes / cfg.src_len)
        places = np.arange(width)[None] + 0 * lengths[:, None]
        feeds = dict(tokens=tokens, positions=starts[:, None] + places, cross_positions=places)
        int32 = dict(last=lengths - 1, total=width, source=places < lengths[:, None])
        int32 = {name: np.array(value, np.int32) for name, value in int32.items()}
        memory = self.run("encoder", feeds | tables | int32)
        return memory | dict(source=self.value(int32["source"]))

    def start(self, prompts, max_new_tokens):
        """Reads the prompts, with room for max_new_tokens more -> (Request, logits (B, V) of the
        first new token)."""
        cfg = self.config
        if max_new_tokens < 1 or not prompts:
            raise UserError(f"cannot generate {max_new_tokens} tokens for {len(prompts)} prompts")
        for id in (id for ids in prompts for id in ids):
            if not 0 <= id < cfg.vocab_size:
                raise UserError(f"token id {id} is outside the vocabulary of {cfg.vocab_size}")
        memory, heads = self.encode(prompts) if cfg.n_enc else {}, prompts
        if cfg.bos_id >= 0:
            heads = [[cfg.bos_id, *([] if cfg.n_enc else prompt)] for prompt in prompts]
        if not all(heads):
            raise UserError("this model has no begin token: a prompt must not be empty")
        lengths, tokens = np.array([len(head) for head in heads]), padded(heads, cfg.pad_id)
        request = self.request(lengths, max_new_tokens, memory)
        keep = np.arange(len(heads)) * tokens.shape[1] + lengths - 1
        return request, request.feed(tokens, lengths, keep)

    def request(self, lengths, max_new_tokens, memory):
        return Request(self, lengths, max_new_tokens, memory)

    def generate(self, prompts, max_new_tokens, temperature=0.0, top_k=0, top_p=1.0, seed=0):
        """Continues B prompts at once, streaming: yields, per step, a list of B new ids, None for
        rows that have ended."""
        request, logits = self.start(prompts, max_new_tokens)
        seeds = seed if isinstance(seed, list) else range(seed, seed + len(prompts))
        rngs = [np.random.default_rng(one) for one in seeds]
        ended = np.zeros(len(prompts), dtype=bool)
        for step in range(max_new_tokens):
            tokens = pick(logits, temperature, top_k, top_p, rngs)
            ended |= tokens == self.config.eos_id
            if ended.all():
                return
            yield [None if end else int(id) for end, id in zip(ended, tokens)]
            if step < max_new_tokens - 1:
                logits = request.step(tokens)


class Request:
    """The state of one request: the caches, which the decoder writes in place, and what else it is
    fed."""

    def __init__(self, model, lengths, max_new_tokens, memory):
        cfg, rows, slots = model.config, len(lengths), int(max(lengths)) + max_new_tokens - 1
        reach = np.array(lengths) + max_new_tokens - 1
        tables, self.first = model.rope(slots, reach / cfg.tgt_len)
        self.model, self.filled = model, np.zeros(rows, dtype=np.int64)
        self.binding = model.sessions["decoder"].io_binding()
        self.inputs = {item.name for item in model.sessions["decoder"].get_inputs()}
        self.fixed = dict(memory)  # kept alive here; the binding only points to it
        self.fixed |= {name: model.value(table) for name, table in tables.items()}
        for name in (f"{part}_{i}" for i in range(cfg.n_dec) for part in ("key", "value")):
            shape = rows, cfg.n_kv_head, slots, cfg.head_dim
            cache = self.fixed[f"past_{name}"] = model.value(np.zeros(shape, model.float))
            self.binding.bind_ortvalue_output(name, cache)
        for name in self.fixed.keys() & self.inputs:
            self.binding.bind_ortvalue_input(name, self.fixed[name])

    def feed(self, tokens, lengths, keep):
        """Reads `lengths` (B,) of the tokens (B, T), of each row behind what it has -> logits
        (len(keep), V) at the positions `keep` of the flattened tokens. With more than one row, more
        than one token may only come first."""
        before, width = self.filled.copy(), tokens.shape[1]
        self.filled += lengths
        places = before[:, None] + np.arange(width)
        feeds = dict(tokens=tokens, cross_positions=places, keep=keep.astype(np.int64))
        feeds |= dict(positions=self.first[:, None] + places)
        feeds |= dict(last=self.filled - 1, total=before.max() + width)
        feeds |= {name: np.array(feeds[name], np.int32) for name in ("last", "total")}
        logits = np.empty((len(keep), self.model.config.vocab_size), self.model.float)
        on_cpu = self.model.ort.OrtValue.ortvalue_from_numpy
        for name in feeds.keys() & self.inputs:
            self.binding.bind_ortvalue_input(name, on_cpu(feeds[name]))
        self.binding.bind_ortvalue_output("logits", on_cpu(logits))
        self.model.sessions["decoder"].run_with_iobinding(self.binding)
        return logits

    def step(self, tokens):
        """One token (B,) a row -> logits (B, V) of the next."""
        rows = len(tokens)
        return self.feed(tokens[:, None].astype(np.int64), np.ones(rows, int), np.arange(rows))


class Static(Exported):
    """An export with --static: one prompt at a time, no longer than the graphs were made for. What
    the shapes leave empty is masked."""

    def encode(self, prompts):
        cfg, S, [prompt] = self.config, self.about["static"].src_len, prompts
        if len(prompt) > S:
            raise UserError(f"the prompt has {len(prompt)} tokens, this export has --src_len={S}")
        mask = self.masked(np.arange(S)[None] < max(1, len(prompt)))
        tables = self.rope_at(np.arange(S), len(prompt) / cfg.src_len)
        tokens = padded([prompt, [0] * S], cfg.pad_id)[:1]
        return self.run("encoder", dict(tokens=tokens, mask=mask) | tables) | dict(source=mask)

    def start(self, prompts, max_new_tokens):
        if len(prompts) != 1:
            raise UserError(f"a static export answers one prompt at a time, not {len(prompts)}")
        return super().start(prompts, max_new_tokens)

    def request(self, lengths, max_new_tokens, memory):
        return StaticRequest(self, lengths, max_new_tokens, memory)

    def masked(self, seen):
        """seen (T, S) -> what is added to the scores, (1, T, S)."""
        return np.where(seen, 0, OUTSIDE).astype(np.float32)[None]

    def rope_at(self, positions, stretch):
        """RoPE's tables at positions (T,), (1, T, D/2) each; cross-attention's too."""
        tables, _ = self.rope(positions[-1] + 1, np.array([stretch]))
        return {name: table[None, positions] for name, table in tables.items()}


class StaticRequest:
    """The state of one request to a static export, as `Request`."""

    def __init__(self, model, lengths, max_new_tokens, memory):
        shape, cfg, reach = model.about["static"], model.config, lengths[0] + max_new_tokens - 1
        if reach > shape.tgt_len:
            raise UserError(
                f"{reach} positions are needed, this export has --tgt_len={shape.tgt_len}"
            )
        self.model, self.memory, self.filled = model, memory, 0
        self.stretch, self.caches = reach / cfg.tgt_len, {}
        for name in (f"{part}_{i}" for i in range(cfg.n_dec) for part in ("key", "value")):
            zeros = np.zeros((cfg.n_kv_head * shape.slots, cfg.head_dim), np.float32)
            self.caches[name] = model.value(zeros)

    def feed(self, tokens, lengths, keep):
        """Reads tokens (1, N) -> logits (len(keep), V) at the positions `keep`, in order: a chunk
        at a time where only its last token's are wanted."""
        ids, start, logits = tokens[0, : lengths[0]], 0, []
        chunk = self.model.about["static"].chunk if "prefill" in self.model.sessions else 1
        for end in keep + 1:
            while start < end:
                width = chunk if self.filled % chunk == 0 and end - start > 1 else 1
                some = ids[start : min(start + width, end)]
                last, start = self.read(some, width), start + len(some)
            logits.append(last)
        return np.concatenate(logits)

    def read(self, ids, width):
        """Reads at most `width` ids through the graph of that width -> logits (1, V)."""
        model, cfg, slots = self.model, self.model.config, self.model.about["static"].slots
        positions = self.filled + np.arange(width)
        at = np.arange(cfg.n_kv_head)[:, None] * slots + positions
        feeds = dict(tokens=padded([ids, [0] * width], cfg.pad_id)[:1], at=at.reshape(-1, 1))
        feeds |= dict(keep=np.array([len(ids) - 1]), **self.memory)
        feeds |= dict(mask=model.masked(np.arange(slots) <= positions[:, None]))
        feeds |= model.rope_at(positions, self.stretch)
        feeds |= {f"past_{name}": cache for name, cache in self.caches.items()}
        self.filled += len(ids)
        graph = "prefill" if width > 1 else "decoder"
        return model.run(graph, feeds, self.caches)["logits"].numpy()

    def step(self, tokens):
        return self.feed(tokens[:, None], [1], np.array([0]))


def pick(logits, temperature, top_k, top_p, rngs):
    """One token a row from logits (B, V), as model.pick."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.astype(np.float64) / temperature
    if top_k:
        least = np.sort(logits, axis=-1)[:, -min(top_k, logits.shape[1])][:, None]
        logits = np.where(logits < least, -np.inf, logits)
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    if top_p < 1:
        order = np.argsort(-probs, axis=-1, kind="stable")
        ordered = np.take_along_axis(probs, order, -1)
        keep = np.where(ordered.cumsum(-1) - ordered < top_p, ordered, 0)
        np.put_along_axis(probs, order, keep, -1)
        probs /= probs.sum(-1, keepdims=True)
    return np.array([rng.choice(probs.shape[1], p=row) for rng, row in zip(rngs, probs)])
