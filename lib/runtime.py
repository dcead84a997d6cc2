"""Runs a folder that export.py wrote, with numpy and onnxruntime alone: what one deploys.

The folder holds encoder.onnx and decoder.onnx (a decoder-only model has the latter alone, one that
reads pictures vision.onnx, a static export prefill.onnx), weights.bin behind all of them,
tokenizer.json, and export.json: configuration, precision, objective, the size of every file.

Rows of a request are padded on the right, and each row's keys and values lie in its caches from
slot 0 on. model.Cache pads on the left; here no row needs to know of another's length.
"""

import os
from dataclasses import dataclass, fields

import numpy as np

from lib.settings import UserError, from_dict, read_json

FILE = "export.json"
OUTSIDE = -100.0  # static exports add it to the score of what may not be seen: e^-100 is left of it
PROVIDERS = {"cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}


@dataclass
class Shape:
    """What a request has to know of model.Config."""

    vocab_size: int
    n_enc: int
    n_dec: int
    n_embd: int
    n_kv_head: int
    head_dim: int
    src_len: int
    tgt_len: int
    rope_theta: float
    pad_id: int
    bos_id: int
    eos_id: int


@dataclass
class StaticShape:
    """Of an export with --static: the longest source, positions of the decoder, slots of its
    caches, and how many tokens prefill.onnx reads at a time."""

    src_len: int
    tgt_len: int
    slots: int
    chunk: int


@dataclass
class About:
    """export.json. step_bytes: bytes of weights that one step of the decoder reads."""

    precision: str
    objective: str
    config: dict
    files: dict
    step_bytes: int
    static: dict = None
    vision: dict = None


def is_export(folder):
    return os.path.exists(os.path.join(folder, FILE))


def read_about(folder):
    """export.json as an About, its config as a Shape, its static as a StaticShape. UserError if the
    folder is no export, or a file of it is missing or was cut off."""
    path = os.path.join(folder, FILE)
    if not os.path.exists(path):
        raise UserError(f"{path} is missing: python export.py --run={folder} makes an export")
    about = from_dict(About, read_json(path), path)
    about.config = from_dict(Shape, about.config, path)
    if about.static is not None:
        about.static = from_dict(StaticShape, about.static, path)
    for part in (about.config, about.static):
        for field in fields(part) if part else ():
            value = getattr(part, field.name)
            if not (-1 if field.name == "bos_id" else 0) <= value < 2**31:
                raise UserError(f"{path}: {field.name}={value} is no usable number")
    for name, size in about.files.items():
        file = os.path.join(folder, os.path.basename(name))
        found = os.path.getsize(file) if os.path.isfile(file) else "no"
        if found != size:
            raise UserError(f"{file} has {found} bytes, not {size}: export the run again")
    return about


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
        try:
            import onnxruntime
        except ImportError:
            raise UserError(f"{folder} is an ONNX export: pip install onnxruntime") from None
        self.about, self.ort, self.device = read_about(folder), onnxruntime, device
        self.config, self.step_bytes = self.about.config, self.about.step_bytes
        self.float = np.float16 if self.about.precision == "fp16" else np.float32
        providers = PROVIDERS.get(device, ["CPUExecutionProvider"])
        if providers[0] not in onnxruntime.get_available_providers():
            raise UserError(f"--device={device}: this onnxruntime has no {providers[0]}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads  # 0 is all physical cores
        options.log_severity_level = 3
        self.sessions = {}
        for name in ("vision", "encoder", "prefill", "decoder"):
            path = os.path.join(folder, f"{name}.onnx")
            if f"{name}.onnx" not in self.about.files:
                continue
            try:
                session = onnxruntime.InferenceSession(path, options, providers=providers)
            except Exception as error:  # onnxruntime raises kinds of its own
                reason = f"{type(error).__name__}: {str(error)[:200]}"
                raise UserError(f"{path} cannot be loaded ({reason}): export again") from None
            self.sessions[name] = session
        self.check(folder)

    def check(self, folder):
        """UserError where export.json and the graphs disagree."""
        cfg, decoder = self.config, self.sessions.get("decoder")
        items = [*decoder.get_inputs(), *decoder.get_outputs()] if decoder else []
        shapes = {item.name: item.shape for item in items}
        heads = cfg.n_kv_head * self.about.static.slots if self.about.static else cfg.n_kv_head
        past = shapes.get(f"past_key_{cfg.n_dec - 1}", [])
        layers = sum(name.startswith("past_key_") for name in shapes)
        found = layers, heads in past[:2], past[-1:], shapes.get("logits", [])[-1:]
        reads = "encoder" in self.sessions
        if found != (cfg.n_dec, True, [cfg.head_dim], [cfg.vocab_size]) or reads != (cfg.n_enc > 0):
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
            value = feeds[name]
            value = self.value(value) if isinstance(value, np.ndarray) else value
            binding.bind_ortvalue_input(name, value)
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

    def images_at(self, tokens, images):
        """Feeds for the tokens of pictures (N, C), None for none: they and their places."""
        if self.about.vision is None:
            return {}
        here = np.flatnonzero(tokens == self.about.vision["image_id"])
        if images is None:
            here, images = here[:0], np.zeros((0, self.config.n_embd))
        if len(here) != len(images):
            raise UserError(f"{len(here)} placeholders for {len(images)} tokens of pictures")
        return dict(images=images.astype(self.float), at=here[:, None])

    def encode(self, prompts, images=None):
        """Lists of ids -> what the decoder is fed of them: the keys and values (B, H_kv, S, D) of
        every layer's cross-attention, and `source` (B, S), 1 at real tokens."""
        cfg = self.config
        tokens = padded([*prompts, [cfg.pad_id]], cfg.pad_id)[:-1]
        width, sizes = tokens.shape[1], np.array([len(prompt) for prompt in prompts])
        lengths = np.maximum(sizes, 1)  # an empty source lets its first padding be seen
        tables, starts = self.rope(width, sizes / cfg.src_len)
        places = np.arange(width)[None] + 0 * lengths[:, None]
        feeds = dict(tokens=tokens, last=(lengths - 1).astype(np.int32), cross_positions=places)
        feeds |= dict(total=np.array(width, np.int32), positions=starts[:, None] + places)
        memory = self.run("encoder", feeds | tables | self.images_at(tokens, images))
        return memory | dict(source=self.value((places < lengths[:, None]).astype(np.int32)))

    def start(self, prompts, max_new_tokens, prefix=None, images=None):
        """Reads the prompts, with room for max_new_tokens more -> (Request, logits (B, V) of the
        first new token). prefix: as in model.Transformer.generate."""
        cfg = self.config
        if max_new_tokens < 1 or not prompts:
            raise UserError(f"cannot generate {max_new_tokens} tokens for {len(prompts)} prompts")
        heads = prefix or [[]] * len(prompts)
        for id in (id for ids in (*prompts, *heads) for id in ids):
            if not 0 <= id < cfg.vocab_size:
                raise UserError(f"token id {id} is outside the vocabulary of {cfg.vocab_size}")
        if not cfg.n_enc:
            heads = [[*prompt, *head] for prompt, head in zip(prompts, heads)]
        heads = [[cfg.bos_id] * (cfg.bos_id >= 0) + [*head] for head in heads]
        if not all(heads):
            raise UserError("this model has no begin token: a prompt must not be empty")
        memory = self.encode(prompts, images) if cfg.n_enc else {}
        lengths = np.array([len(head) for head in heads])
        request = self.request(lengths, max_new_tokens, memory)
        tokens = padded(heads, cfg.pad_id)
        keep = np.arange(len(heads)) * tokens.shape[1] + lengths - 1
        return request, request.feed(tokens, lengths, keep, None if cfg.n_enc else images)

    def request(self, lengths, max_new_tokens, memory):
        return Request(self, lengths, max_new_tokens, memory)

    def generate(
        self, prompts, max_new_tokens, temperature=0.0, top_k=0, top_p=1.0, seed=0, prefix=None
    ):
        """Continues B prompts at once, streaming: yields, per step, a list of B new ids, None for
        rows that have ended."""
        request, logits = self.start(prompts, max_new_tokens, prefix)
        seeds = range(seed, seed + len(prompts)) if isinstance(seed, int) else seed
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

    def feed(self, tokens, lengths, keep, images=None):
        """Reads `lengths` (B,) of the tokens (B, T), of each row behind what it has -> logits
        (len(keep), V) at the positions `keep` of the flattened tokens. With more than one row, more
        than one token may only come first."""
        before, width = self.filled.copy(), tokens.shape[1]
        self.filled += lengths
        places = before[:, None] + np.arange(width)
        feeds = dict(tokens=tokens, cross_positions=places, keep=keep.astype(np.int64))
        feeds |= dict(positions=self.first[:, None] + places, total=before.max() + width)
        feeds |= dict(last=(self.filled - 1).astype(np.int32))
        feeds["total"] = np.array(feeds["total"], np.int32)
        feeds |= self.model.images_at(tokens, images)
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

    def encode(self, prompts, images=None):
        cfg, S, [prompt] = self.config, self.about.static.src_len, prompts
        if len(prompt) > S:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, and this static export takes {S}: "
                f"export.py --static --src_len={len(prompt)} makes a longer one"
            )
        mask = self.masked(np.arange(S)[None] < max(1, len(prompt)))
        tables = self.rope_at(np.arange(S), len(prompt) / cfg.src_len)
        tokens = padded([prompt, [0] * S], cfg.pad_id)[:1]
        return self.run("encoder", dict(tokens=tokens, mask=mask) | tables) | dict(source=mask)

    def start(self, prompts, max_new_tokens, prefix=None, images=None):
        if len(prompts) != 1:
            raise UserError(f"a static export answers one prompt at a time, not {len(prompts)}")
        return super().start(prompts, max_new_tokens, prefix)

    def request(self, lengths, max_new_tokens, memory):
        return StaticRequest(self, lengths, max_new_tokens, memory)

    def masked(self, seen):
        """seen (T, S) -> what is added to the scores, (1, T, S)."""
        return np.where(seen, 0, OUTSIDE).astype(np.float32)[None]

    def rope_at(self, positions, stretch):
        """RoPE's tables at positions (T,), (1, T, D/2) each; cross-attention's too."""
        end = positions[-1] + 1
        cos, sin = (part[None, positions] for part in rope_table(end, self.config, stretch))
        plain = [part[None, positions] for part in rope_table(end, self.config)]
        return dict(cos=cos, sin=sin, cross_cos=plain[0], cross_sin=plain[1])


class StaticRequest:
    """The state of one request to a static export, as `Request`."""

    def __init__(self, model, lengths, max_new_tokens, memory):
        shape, cfg, reach = model.about.static, model.config, lengths[0] + max_new_tokens - 1
        if reach > shape.tgt_len:
            raise UserError(
                f"{lengths[0]} tokens to read and {max_new_tokens} to make need {reach} positions, "
                f"and this static export has {shape.tgt_len}: ask for fewer, or make a longer one "
                f"with export.py --static --tgt_len={reach}"
            )
        self.model, self.memory, self.filled = model, memory, 0
        self.stretch, self.caches = reach / cfg.tgt_len, {}
        for name in (f"{part}_{i}" for i in range(cfg.n_dec) for part in ("key", "value")):
            zeros = np.zeros((cfg.n_kv_head * shape.slots, cfg.head_dim), np.float32)
            self.caches[name] = model.value(zeros)

    def feed(self, tokens, lengths, keep, images=None):
        """Reads tokens (1, N) -> logits (len(keep), V) at the positions `keep`, in order: a chunk
        at a time where only its last token's are wanted."""
        ids, start, logits = tokens[0, : lengths[0]], 0, []
        for end in keep + 1:
            while start < end:
                whole = "prefill" in self.model.sessions and self.filled % self.chunk == 0
                width = self.chunk if whole and end - start > 1 else 1
                some = ids[start : min(start + width, end)]
                last, start = self.read(some, width), start + len(some)
            logits.append(last)
        return np.concatenate(logits)

    @property
    def chunk(self):
        return self.model.about.static.chunk

    def read(self, ids, width):
        """Reads at most `width` ids through the graph of that width -> logits (1, V)."""
        model, cfg, slots = self.model, self.model.config, self.model.about.static.slots
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
