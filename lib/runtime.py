"""Runs a folder that export.py wrote, with numpy and onnxruntime alone: what one deploys.

The folder holds encoder.onnx and decoder.onnx, which a decoder-only model has alone; weights.bin
behind them; tokenizer.json; and export.json, an `About`. A static export has graphs of fixed
shapes, and prefill.onnx if it is decoder-only.

Rows of a request are padded on the right, and each row's keys and values lie in its caches from
slot 0 on. model.Cache pads on the left; here no row needs to know of another's length.
"""

import os
from dataclasses import dataclass

import numpy as np

from lib.settings import UserError, from_dict, read_json

FILE = "export.json"
OUTSIDE = -100.0  # static exports add it to the score of what may not be seen: e^-100 is left of it


@dataclass
class About:
    """What lib/runtime.py has to know: of the export, and of its model.Config."""

    precision: str
    objective: str
    static: bool
    vocab_size: int
    n_enc: int
    head_dim: int
    src_len: int
    tgt_len: int
    rope_theta: float
    pad_id: int
    bos_id: int
    eos_id: int


def is_export(folder):
    return os.path.exists(os.path.join(folder, FILE))


def read_about(folder):
    path = os.path.join(folder, FILE)
    return from_dict(About, read_json(path), path)


def rope_tables(slots, cfg, stretches):
    """cos and sin of RoPE's angles, (U * slots, D/2) each: at positions 0 .. slots - 1 for each of
    the stretches (U,), which are those of model.rope_tables."""
    D = cfg.head_dim
    power = np.arange(0, D, 2, dtype=np.float32) / np.float32(D)
    base = np.float32(cfg.rope_theta) * np.float32(stretches) ** np.float32(D / (D - 2))
    angle = np.arange(slots, dtype=np.float32)[:, None] * base[:, None, None] ** -power
    angle = angle.reshape(-1, D // 2)
    return np.cos(angle), np.sin(angle)


def padded(rows, pad):
    """Lists of ids -> (B, T) int64, padded on the right."""
    out = np.full((len(rows), max(1, *map(len, rows))), pad, dtype=np.int64)
    for row, ids in zip(out, rows):
        row[: len(ids)] = ids
    return out


def token_feeds(tokens, before, lengths, first):
    """What a graph is fed of tokens (B, T), `lengths` (B,) of them real, behind `before` (B,)
    others. first (B,): where each row's RoPE table begins."""
    places = before[:, None] + np.arange(tokens.shape[1])
    last, total = (before + lengths - 1).astype(np.int32), np.array(places.max() + 1, np.int32)
    feeds = dict(tokens=tokens, positions=first[:, None] + places, cross_positions=places)
    return feeds | dict(last=last, total=total)


class Exported:
    """The model of a folder. `generate` is that of model.Transformer."""

    def __init__(self, folder, threads=0, device="cpu"):
        import onnxruntime  # sample.py reads this file for torch's runs, too

        self.config = cfg = read_about(folder)
        self.ort, self.device = onnxruntime, device
        self.float = np.float16 if cfg.precision == "fp16" else np.float32
        provider = "CPUExecutionProvider" if device == "cpu" else "CUDAExecutionProvider"
        if provider not in onnxruntime.get_available_providers():
            raise UserError(f"--device={device}: this onnxruntime has no {provider}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = min(threads, os.cpu_count() or 1)  # 0 is all of them
        options.log_severity_level = 3
        graphs = ["encoder"] if cfg.n_enc else ["prefill"] * cfg.static
        self.sessions, self.shapes = {}, {}
        for name in [*graphs, "decoder"]:
            path = os.path.join(folder, f"{name}.onnx")
            if not os.path.isfile(path):  # a pipe would wait for its writer
                raise UserError(f"{path} is missing or no plain file")
            try:
                session = onnxruntime.InferenceSession(path, options, [provider])
            except Exception as error:  # onnxruntime raises kinds of its own
                # Its end: the path stands in front, twice.
                raise UserError(f"{path} cannot be loaded: {str(error)[-200:]}") from None
            self.sessions[name] = session
            self.shapes[name] = {item.name: item.shape for item in session.get_inputs()}
        logits, cache = session.get_outputs()[:2]
        inputs, half = self.shapes["decoder"].keys(), logits.type == "tensor(float16)"
        found = "mask" in inputs, "memory_key_0" in inputs, logits.shape[-1], cache.shape[-1], half
        wanted = cfg.static, cfg.n_enc > 0, cfg.vocab_size, cfg.head_dim, cfg.precision == "fp16"
        fits = found == wanted and cfg.pad_id >= 0 and cfg.bos_id >= -1
        fits = fits and min(cfg.tgt_len, cfg.src_len + (cfg.n_enc == 0), cfg.rope_theta) >= 1
        if not fits or max(cfg.pad_id, cfg.bos_id, cfg.eos_id) >= cfg.vocab_size:
            raise UserError(f"{folder}: {FILE} does not describe its graphs: export the run again")

    def run(self, graph, feeds):
        """Runs a graph on arrays by name -> its outputs by name. More feeds than it has inputs do
        not matter."""
        session = self.sessions[graph]
        values = session.run(None, {name: feeds[name] for name in self.shapes[graph]})
        return {item.name: value for item, value in zip(session.get_outputs(), values)}

    def rope(self, slots, stretch):
        """RoPE's tables for a request: one for each stretch among its rows (B,), on top of one
        another, and where each row's begins; and cross-attention's, which is never stretched."""
        stretches, which = np.unique(np.maximum(stretch, 1), return_inverse=True)
        names = "cos", "sin", "cross_cos", "cross_sin"
        tables = *rope_tables(slots, self.config, stretches), *rope_tables(slots, self.config, [1])
        tables = {name: table.astype(self.float) for name, table in zip(names, tables)}
        return tables, which.reshape(-1) * slots

    def encode(self, prompts):
        """Lists of ids -> what the decoder is fed of them: the keys and values (B, H_kv, S, D) of
        every layer's cross-attention, and `source` (B, S), 1 at real tokens."""
        cfg = self.config
        tokens, sizes = padded(prompts, cfg.pad_id), np.array([len(prompt) for prompt in prompts])
        lengths = np.maximum(sizes, 1)  # an empty source lets its first padding be seen
        tables, first = self.rope(tokens.shape[1], sizes / cfg.src_len)
        memory = self.run("encoder", tables | token_feeds(tokens, 0 * sizes, lengths, first))
        source = np.arange(tokens.shape[1]) < lengths[:, None]
        return memory | dict(source=source.astype(np.int32))

    def start(self, prompts, max_new_tokens):
        """Reads the prompts, with room for max_new_tokens more -> (Request, logits (B, V) of the
        first new token)."""
        cfg, memory, heads = self.config, {}, prompts
        if cfg.n_enc:
            memory, heads = self.encode(prompts), [[]] * len(prompts)
        heads = [[cfg.bos_id] * (cfg.bos_id >= 0) + head for head in heads]
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
        rngs = [np.random.default_rng(seed + b) for b in range(len(prompts))]
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
    fed at every step."""

    def __init__(self, model, lengths, max_new_tokens, memory):
        reach, shapes = np.array(lengths) + max_new_tokens - 1, model.shapes["decoder"]
        fixed, self.first = model.rope(reach.max(), reach / model.config.tgt_len)
        for name, shape in shapes.items():
            if name.startswith("past_"):  # (B, H_kv, slots, D)
                size = len(lengths), shape[1], reach.max(), shape[3]
                fixed[name] = np.zeros(size, model.float)
        fixed = {name: value for name, value in (fixed | memory).items() if name in shapes}
        # Kept alive here; the binding only points to it. On a CPU nothing is copied.
        self.place, there = model.ort.OrtValue.ortvalue_from_numpy, model.device
        self.fixed = {k: self.place(np.ascontiguousarray(x), there) for k, x in fixed.items()}
        self.binding = model.sessions["decoder"].io_binding()
        for name, value in self.fixed.items():
            self.binding.bind_ortvalue_input(name, value)
            if name.startswith("past_"):
                self.binding.bind_ortvalue_output(name.removeprefix("past_"), value)
        self.model, self.filled = model, np.zeros(len(lengths), dtype=np.int64)

    def feed(self, tokens, lengths, keep):
        """Reads `lengths` (B,) of the tokens (B, T), of each row behind what it has -> logits
        (len(keep), V) at the positions `keep` of the flattened tokens. With more than one row, more
        than one token may only come first."""
        feeds = token_feeds(tokens, self.filled, lengths, self.first) | dict(keep=keep)
        self.filled = self.filled + lengths
        logits = np.empty((len(keep), self.model.config.vocab_size), self.model.float)
        for name in feeds.keys() & self.model.shapes["decoder"].keys():
            self.binding.bind_ortvalue_input(name, self.place(feeds[name]))
        self.binding.bind_ortvalue_output("logits", self.place(logits))
        self.model.sessions["decoder"].run_with_iobinding(self.binding)
        return logits

    def step(self, tokens):
        """One token (B,) a row -> logits (B, V) of the next."""
        return self.feed(tokens[:, None], np.ones(len(tokens), int), np.arange(len(tokens)))


class Static(Exported):
    """An export with --static: one prompt at a time, no longer than the graphs were made for. What
    the shapes leave empty is masked."""

    def encode(self, prompts):
        prompt, S = prompts[0], self.shapes["encoder"]["tokens"][1]
        if len(prompt) > S:
            raise UserError(f"the prompt has {len(prompt)} tokens, this export has --src_len={S}")
        mask = self.masked(np.arange(S)[None] < max(1, len(prompt)))
        tables = self.rope_at(np.arange(S), len(prompt) / self.config.src_len)
        tokens = padded([prompt, [0] * S], self.config.pad_id)[:1]
        return self.run("encoder", dict(tokens=tokens, mask=mask) | tables) | dict(source=mask)

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
        shapes, reach = model.shapes["decoder"], int(lengths[0]) + max_new_tokens - 1
        self.slots = shapes["mask"][-1]
        if len(lengths) > 1:
            raise UserError(f"a static export answers one prompt at a time, not {len(lengths)}")
        if reach > self.slots:
            raise UserError(f"{reach} positions > --tgt_len={self.slots}: lower --max_new_tokens")
        self.model, self.memory, self.filled = model, memory, 0
        self.stretch = reach / model.config.tgt_len
        caches = {name: shape for name, shape in shapes.items() if name.startswith("past_")}
        self.caches = {name: np.zeros(shape, np.float32) for name, shape in caches.items()}

    def feed(self, tokens, lengths, keep):
        """As Request.feed, of a single row. `keep` are all positions, which are read one by one, or
        the last alone: then prefill.onnx reads as many at a time as its shape has."""
        ids, width = tokens[0, : lengths[0]], 1
        if len(keep) < len(ids) and "prefill" in self.model.shapes:
            width = self.model.shapes["prefill"]["tokens"][1]
        logits = [self.read(ids[i : i + width], width) for i in range(0, len(ids), width)]
        return np.concatenate(logits)[-len(keep) :]

    def read(self, ids, width):
        """Reads at most `width` ids through the graph of that width -> logits (1, V)."""
        model, positions = self.model, self.filled + np.arange(width)
        rows = np.arange(0, len(self.caches["past_key_0"]), self.slots)  # where each head's begin
        feeds = dict(tokens=padded([ids, [0] * width], model.config.pad_id)[:1])
        feeds |= dict(at=(rows[:, None] + positions).reshape(-1, 1), keep=np.array([len(ids) - 1]))
        feeds |= dict(mask=model.masked(np.arange(self.slots) <= positions[:, None]))
        feeds |= model.rope_at(positions, self.stretch) | self.memory
        outputs = model.run("prefill" if width > 1 else "decoder", feeds | self.caches)
        logits, self.filled = outputs.pop("logits"), self.filled + len(ids)
        self.caches = {f"past_{name}": cache for name, cache in outputs.items()}
        return logits

    def step(self, tokens):
        return self.feed(tokens[:, None], [1], np.array([0]))


def pick(logits, temperature, top_k, top_p, rngs):
    """One token a row from logits (B, V), as model.pick."""
    if temperature < 1e-6:
        return logits.argmax(-1)
    order = np.argsort(-logits, axis=-1, kind="stable")[:, : top_k or None]  # likeliest first
    ordered = np.take_along_axis(logits, order, -1).astype(np.float64) / temperature
    probs = np.exp(ordered - ordered[:, :1])
    probs /= probs.sum(-1, keepdims=True)
    probs[probs.cumsum(-1) - probs >= top_p] = 0  # what stands before it already holds top_p
    probs /= probs.sum(-1, keepdims=True)
    return np.array([rng.choice(ids, p=row) for rng, ids, row in zip(rngs, order, probs)])
