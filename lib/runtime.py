"""Runs a folder that export.py wrote, with numpy and onnxruntime alone: what one deploys. Needs no torch.

The folder holds encoder.onnx and decoder.onnx (a decoder-only model has the latter alone; vision.onnx where it reads pictures; prefill.onnx in
a static export), weights.bin behind all of them, tokenizer.json, and export.json (configuration, precision, objective, size of every file).

Rows of a request are padded on the right, and each row's keys and values lie in its caches from slot 0 on: unlike torch's
side (`model.Cache`), which pads on the left, no row needs to know of another's length.
"""

import json
import os
from types import SimpleNamespace

import numpy as np

from lib.settings import UserError

FILE = "export.json"


def is_export(folder):
    return os.path.exists(os.path.join(folder, FILE))


def rope_table(slots, cfg, stretch=1.0):
    """cos and sin of RoPE's angles at positions 0 .. slots - 1, (slots, D/2) each; `stretch` as in model.rope_tables."""
    power = np.arange(0, cfg.head_dim, 2, dtype=np.float32) / np.float32(cfg.head_dim)
    long = cfg.rope_long and stretch > 1
    base = np.float32(cfg.rope_theta) * np.float32(1 if long else stretch) ** np.float32(
        cfg.head_dim / (cfg.head_dim - 2)
    )
    factors = np.array(cfg.rope_long if long else cfg.rope_factors or [1], np.float32)
    angle = np.arange(slots, dtype=np.float32)[:, None] * (base**-power / factors)[None]
    return np.cos(angle) * np.float32(cfg.rope_scale), np.sin(angle) * np.float32(cfg.rope_scale)


class Exported:
    """The model of a folder. `generate` is that of model.Transformer."""

    def __init__(
        self,
        folder,
        threads=0,
        device="cpu",
        graphs=("vision", "encoder", "prefill", "decoder"),
        in_order=False,
    ):
        try:
            import onnxruntime
        except ImportError:
            raise UserError(
                f"{folder} is an ONNX export: pip install onnxruntime runs it"
            ) from None
        self.about = read_about(folder)
        self.config, self.step_bytes = (
            SimpleNamespace(
                **dict(rope_factors=[], rope_long=[], rope_scale=1.0) | self.about["config"]
            ),
            self.about["step_bytes"],
        )  # bytes of weights that a step reads
        self.float = np.float16 if self.about["precision"] == "fp16" else np.float32
        self.ort, self.device = onnxruntime, device
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads  # 0 is all physical cores
        options.log_severity_level = 3
        if in_order:  # of the file: a graph that export.py calibrates frees each activation when its range is known
            options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        providers = (
            ["CPUExecutionProvider"]
            if device == "cpu"
            else ["CUDAExecutionProvider", "CPUExecutionProvider"]
        )
        if providers[0] not in onnxruntime.get_available_providers():
            raise UserError(
                f"--device={device}: this onnxruntime has no {providers[0]} (it has {', '.join(onnxruntime.get_available_providers())})"
            )

        def session(name):
            if name not in graphs or f"{name}.onnx" not in self.about["files"]:
                return None
            try:
                return onnxruntime.InferenceSession(
                    os.path.join(folder, f"{name}.onnx"), options, providers=providers
                )
            except (
                Exception
            ) as error:  # onnxruntime raises kinds of its own for what it cannot load
                raise UserError(
                    f"{folder}/{name}.onnx cannot be loaded ({type(error).__name__}: {str(error)[:200]}): export it again"
                ) from None

        self.vision, self.encoder, self.prefill, self.decoder = map(
            session, ("vision", "encoder", "prefill", "decoder")
        )

    def value(self, array):
        """An array where the sessions want it; on a CPU its own memory, so that what is written later is seen."""
        return self.ort.OrtValue.ortvalue_from_numpy(array, self.device)

    def see(self, pictures):
        """Pictures (data/images.py) -> their tokens (N, C), and each one's order, as vision.VisionLM.see."""
        from data.images import VisionConfig, in_table, token_orders

        cfg, names = (
            VisionConfig(**self.about["vision"]),
            [item.name for item in self.vision.get_outputs()],
        )
        table, *scores = self.vision.run(
            names, dict(tiles=np.concatenate([picture.tiles for picture in pictures]))
        )
        orders = token_orders(pictures, cfg, *scores)
        return table[in_table(orders, pictures, cfg)], orders

    def places(self, tokens, images):
        """What a graph is fed of pictures: their tokens `images` (N, C), None for none, and where they stand among the flattened tokens."""
        here = (
            np.flatnonzero(tokens == self.config.image_id)
            if images is not None
            else np.zeros(0, np.int64)
        )
        images = (
            np.zeros((0, self.config.n_embd), self.float)
            if images is None
            else images.astype(self.float)
        )
        if len(here) != len(images):
            raise UserError(
                f"the texts have {len(here)} placeholders for tokens of pictures, and the pictures have {len(images)}"
            )
        return dict(images=images, at=here[:, None].astype(np.int64))

    def encode(self, prompts, images=None):
        """Lists of ids -> (memory, lengths): every decoder layer's cross-attention keys and values, (B, H_kv, S, D) each, by name,
        and the sources' lengths (B,). `images` (N, C): tokens of pictures, for the placeholders among the ids."""
        cfg = self.config
        lengths = np.array(
            [max(1, len(prompt)) for prompt in prompts]
        )  # an empty source lets its first padding be seen
        width = int(lengths.max())
        tokens = np.array(
            [[*prompt, *[cfg.pad_id] * (width - len(prompt))] for prompt in prompts], dtype=np.int64
        )
        feeds = dict(
            tokens=tokens,
            last=(lengths - 1).astype(np.int32),
            total=np.array(width, np.int32),
            **self.rope(width, np.array([len(prompt) for prompt in prompts]) / cfg.src_len),
        )
        feeds |= dict(
            positions=feeds["rows"][:, None] + np.arange(width),
            cross_positions=np.arange(width)[None] + 0 * lengths[:, None],
        )
        feeds |= self.places(tokens, images) if self.about.get("vision") else {}
        binding = self.encoder.io_binding()
        for name in (item.name for item in self.encoder.get_inputs()):
            binding.bind_ortvalue_input(name, self.value(feeds[name]))
        names = [item.name for item in self.encoder.get_outputs()]
        for name in names:
            binding.bind_output(name, self.device)
        self.encoder.run_with_iobinding(binding)
        return dict(zip(names, binding.get_outputs())), lengths

    def rope(self, slots, stretch):
        """RoPE's tables for a request: those of every stretch among its rows (B,) on top of one another, and where each row's begin;
        and cross-attention's, which is never stretched."""
        cfg = self.config
        found, which = np.unique(np.maximum(stretch, 1).astype(np.float32), return_inverse=True)
        cos, sin = (
            np.concatenate(part).astype(self.float)
            for part in zip(*[rope_table(slots, cfg, s) for s in found])
        )
        plain_cos, plain_sin = (part.astype(self.float) for part in rope_table(slots, cfg))
        return dict(
            cos=cos,
            sin=sin,
            cross_cos=plain_cos,
            cross_sin=plain_sin,
            rows=which.reshape(-1) * slots,
        )

    def start(self, prompts, max_new_tokens, prefix=None, images=None):
        """Reads the prompts, with room for max_new_tokens more -> (Request, logits (B, V) of the first new token)."""
        cfg = self.config
        if max_new_tokens < 1 or not prompts:
            raise UserError(
                f"cannot generate {max_new_tokens} tokens for {len(prompts)} prompts: both must be positive"
            )
        heads = prefix or [[]] * len(prompts)
        if not cfg.n_enc:
            heads = [[*prompt, *head] for prompt, head in zip(prompts, heads)]
        if bad := [id for ids in (*prompts, *heads) for id in ids if not 0 <= id < cfg.vocab_size]:
            raise UserError(
                f"token id {bad[0]} is outside the model's vocabulary of {cfg.vocab_size}"
            )
        sees = {} if images is None else dict(images=images)
        memory = self.encode(prompts, **sees) if cfg.n_enc else ({}, None)
        request = self.request([1 + len(head) for head in heads], max_new_tokens, *memory)
        width = 1 + max(map(len, heads))
        tokens = np.array(
            [[cfg.bos_id, *head, *[cfg.pad_id] * (width - 1 - len(head))] for head in heads],
            dtype=np.int64,
        )
        lengths = np.array([1 + len(head) for head in heads])
        return request, request.feed(
            tokens,
            lengths,
            np.arange(len(heads)) * width + lengths - 1,
            **({} if cfg.n_enc else sees),
        )

    def request(self, lengths, max_new_tokens, memory, src_lengths):
        return Request(self, lengths, max_new_tokens, memory, src_lengths)

    def generate(
        self,
        prompts,
        max_new_tokens,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        seed=0,
        prefix=None,
        images=None,
    ):
        """Continues B prompts at once, streaming: yields, per step, a list of B new ids, None for rows that have ended."""
        request, logits = self.start(prompts, max_new_tokens, prefix, images)
        rngs = [np.random.default_rng(seed + b) for b in range(len(prompts))]
        ended = np.zeros(len(prompts), dtype=bool)
        for step in range(max_new_tokens):
            if self.about.get("vision"):
                logits[:, self.config.image_id] = -np.inf  # nothing would stand in its place
            tokens = pick(logits, temperature, top_k, top_p, rngs)
            ended |= tokens == self.config.eos_id
            if ended.all():
                return
            yield [None if end else int(id) for end, id in zip(ended, tokens)]
            if step < max_new_tokens - 1:
                logits = request.step(tokens)


class Request:
    """The state of one request: the caches, which the decoder writes in place, and what else it is fed."""

    def __init__(self, model, lengths, max_new_tokens, memory, src_lengths):
        cfg, rows = model.config, len(lengths)
        slots = max(lengths) + max_new_tokens - 1
        tables = model.rope(slots, (np.array(lengths) + max_new_tokens - 1) / cfg.tgt_len)
        self.model, self.filled, self.first = (
            model,
            np.zeros(rows, dtype=np.int64),
            tables.pop("rows"),
        )
        self.binding = model.decoder.io_binding()
        self.inputs = names = {item.name for item in model.decoder.get_inputs()}
        if src_lengths is not None:
            tables["source"] = (np.arange(src_lengths.max()) < src_lengths[:, None]).astype(
                np.int32
            )
        fixed = memory | {
            name: model.value(array) for name, array in tables.items() if name in names
        }
        for layer in range(cfg.n_dec):
            for part in ("key", "value"):
                cache = model.value(
                    np.zeros((rows, cfg.n_kv_head, slots, cfg.head_dim), dtype=model.float)
                )
                fixed[f"past_{part}_{layer}"] = cache
                self.binding.bind_ortvalue_output(f"{part}_{layer}", cache)
        self.fixed = fixed  # keeps them alive
        for name, value in fixed.items():
            self.binding.bind_ortvalue_input(name, value)

    def feed(self, tokens, lengths, keep, images=None):
        """Reads `lengths` (B,) of the tokens (B, T), of each row behind what it has -> logits (len(keep), V) at the positions `keep` of
        the flattened tokens. `images`: as in `encode`, for a model without an encoder. With more than one row, more than one token may only come first."""
        self.filled += lengths
        width = tokens.shape[1]
        before = self.filled - lengths
        feeds = dict(
            tokens=tokens,
            positions=(self.first + before)[:, None] + np.arange(width),
            last=(self.filled - 1).astype(np.int32),
            total=np.array(before.max() + width, np.int32),
            keep=keep.astype(np.int64),
        )
        if "cross_positions" in self.inputs:
            feeds["cross_positions"] = before[:, None] + np.arange(width)
        if "images" in self.inputs:
            feeds |= self.model.places(tokens, images)
        logits = np.empty((len(keep), self.model.config.vocab_size), self.model.float)
        for name, array in feeds.items():
            self.binding.bind_ortvalue_input(
                name, self.model.ort.OrtValue.ortvalue_from_numpy(array)
            )
        self.binding.bind_ortvalue_output(
            "logits", self.model.ort.OrtValue.ortvalue_from_numpy(logits)
        )
        self.model.decoder.run_with_iobinding(self.binding)
        return logits

    def step(self, tokens):
        """One token (B,) a row -> logits (B, V) of the next."""
        rows = len(tokens)
        return self.feed(
            tokens.reshape(rows, 1).astype(np.int64), np.ones(rows, dtype=np.int64), np.arange(rows)
        )


class Static(Exported):
    """An export with --static: one prompt at a time, no longer than it was made for. What the shapes leave empty is masked."""

    watch = None  # called with (graph, ranges) by graphs that have an output of that name, while they are calibrated

    def encode(self, prompts):
        S = self.about["static"]["src_len"]
        [prompt] = prompts
        if len(prompt) > S:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, and this static export takes {S}: export.py --static --src_len={len(prompt)} makes a longer one"
            )
        tokens = np.array([*prompt, *[self.config.pad_id] * (S - len(prompt))], dtype=np.int64)
        seen = np.arange(S) < max(1, len(prompt))
        found = self.run(
            "encoder",
            dict(tokens=tokens, mask=self.masked(seen[None]))
            | self.rope_at(np.arange(S), len(prompt) / self.config.src_len),
        )
        return found | dict(
            source=self.ort.OrtValue.ortvalue_from_numpy(self.masked(seen[None]))
        ), np.array([len(prompt)])

    def start(self, prompts, max_new_tokens, prefix=None, images=None):
        if len(prompts) > 1:
            raise UserError(f"a static export answers one prompt at a time, not {len(prompts)}")
        return super().start(prompts, max_new_tokens, prefix, images)

    def request(self, lengths, max_new_tokens, memory, src_lengths):
        return StaticRequest(self, lengths, max_new_tokens, memory)

    def masked(self, seen):
        """seen (T, S) -> what is added to the scores, (1, T, S)."""
        return np.where(seen, 0, self.about["static"]["outside"]).astype(np.float32)[None]

    def rope_at(self, positions, stretch):
        """RoPE's tables at positions (T,), (1, T, D/2) each; cross-attention's, which is never stretched, too."""
        cfg = self.config
        tables = [rope_table(positions[-1] + 1, cfg, factor) for factor in (max(1, stretch), 1)]
        return {
            kind + name: table[None, positions]
            for kind, pair in zip(("", "cross_"), tables)
            for name, table in zip(("cos", "sin"), pair)
        }

    def run(self, graph, feeds, into={}):
        """Runs a graph on arrays or OrtValues; outputs go `into` OrtValues by name. Returns the others' OrtValues by name."""
        session = getattr(self, graph)
        binding, names = session.io_binding(), [item.name for item in session.get_outputs()]
        for name in (item.name for item in session.get_inputs()):
            value = feeds[name]
            binding.bind_ortvalue_input(
                name,
                self.ort.OrtValue.ortvalue_from_numpy(value)
                if isinstance(value, np.ndarray)
                else value,
            )
        for name in names:
            binding.bind_ortvalue_output(name, into[name]) if name in into else binding.bind_output(
                name
            )
        session.run_with_iobinding(binding)
        found = dict(zip(names, binding.get_outputs()))
        if "ranges" in found:
            self.watch(graph, found.pop("ranges").numpy())
        return {name: value for name, value in found.items() if name not in into}


class StaticRequest:
    """The state of one request to a static export, as `Request`."""

    def __init__(self, model, lengths, max_new_tokens, memory):
        static, cfg, reach = model.about["static"], model.config, lengths[0] + max_new_tokens - 1
        if reach > static["tgt_len"]:
            raise UserError(
                f"{lengths[0]} tokens to read and {max_new_tokens} to make need {reach} positions, and this static export has {static['tgt_len']}: "
                f"ask for fewer, or make a longer one: export.py --static --tgt_len={reach}"
            )
        self.model, self.memory, self.filled, self.stretch = model, memory, 0, reach / cfg.tgt_len
        self.slots, self.caches = static["slots"], {}
        types = {item.name: item.type for item in (model.decoder or model.prefill).get_inputs()}
        for name in (f"{part}_{layer}" for layer in range(cfg.n_dec) for part in ("key", "value")):
            dtype = {
                "tensor(float)": np.float32,
                "tensor(uint8)": np.uint8,
                "tensor(uint16)": np.uint16,
            }[types[f"past_{name}"]]
            self.caches[name] = model.ort.OrtValue.ortvalue_from_numpy(
                np.zeros((cfg.n_kv_head * self.slots, cfg.head_dim), dtype)
            )

    def feed(self, tokens, lengths, keep):
        """Reads tokens (1, N) -> logits (len(keep), V) at the positions `keep`, in order: a chunk at a time where only its last token's are wanted."""
        ids, start, found = tokens[0, : lengths[0]], 0, []
        for end in keep + 1:
            while start < end:
                chunk = self.model.about["static"]["chunk"]
                if self.model.decoder and (
                    not self.model.prefill or self.filled % chunk or end - start == 1
                ):
                    chunk = 1
                some = ids[start : min(start + chunk, end)]
                logits, start = self.read(some, chunk), start + len(some)
            found.append(logits)
        return np.concatenate(found)

    def read(self, ids, width):
        """Reads at most `width` ids through the graph of that width -> logits (1, V) behind the last."""
        model, cfg = self.model, self.model.config
        positions = self.filled + np.arange(width)
        keep = (
            np.minimum(np.arange(width), len(ids) - 1) if model.watch else np.array([len(ids) - 1])
        )  # calibration sees every position's logits
        feeds = dict(
            tokens=np.array([*ids, *[cfg.pad_id] * (width - len(ids))], dtype=np.int64),
            keep=keep,
            at=(np.arange(cfg.n_kv_head)[:, None] * self.slots + positions).reshape(-1, 1),
            mask=model.masked(np.arange(self.slots) <= positions[:, None]),
            **model.rope_at(positions, self.stretch),
            **self.memory,
        )
        feeds |= {f"past_{name}": cache for name, cache in self.caches.items()}
        self.filled += len(ids)
        return model.run("prefill" if width > 1 else "decoder", feeds, self.caches)[
            "logits"
        ].numpy()

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
        np.put_along_axis(
            probs, order, np.where(ordered.cumsum(-1) - ordered < top_p, ordered, 0), -1
        )
        probs /= probs.sum(-1, keepdims=True)
    return np.array([rng.choice(probs.shape[1], p=row) for rng, row in zip(rngs, probs)])


def read_about(folder):
    """export.json; UserError if the folder is no export or a file of it is missing or cut off."""
    path = os.path.join(folder, FILE)
    try:
        with open(path, encoding="utf-8") as f:
            about = json.load(f)
        files = about["files"]
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: {folder} is no export; python export.py --run={folder} makes one of a run"
        ) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} cannot be read: it is damaged or not written by this project"
        ) from None
    for name, size in files.items():
        found = (
            os.path.getsize(os.path.join(folder, name))
            if os.path.exists(os.path.join(folder, name))
            else None
        )
        if found != size:
            raise UserError(
                f"{folder}/{name} "
                + (
                    "is missing"
                    if found is None
                    else f"has {found:,} bytes, not {size:,}: it was cut off or altered"
                )
                + "; export it again"
            )
    return about
