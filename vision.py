r"""Pictures for the language model: a vision tower, a projector, and the training of both.

    python vision.py                               ten minutes on two cores: what shapes are there?
    python vision.py --stage=align --init_from=RUN --vision=hf:openai/clip-vit-large-patch14-336
    python sample.py --image=FILE --prompt="What is there?"            asks the trained model

The paper's section 4. A picture is cut into tiles and a thumbnail (data/images.py). Each goes
through the tower, CLIP's vision transformer. A projector of two layers makes the features of a
patch a token as wide as a word's. --tokens chooses tiles, or joins tokens. They stand in the text
where its <image> stands: in the encoder's source or, without an encoder, in the prompt. --look puts
a gated cross-attention to them in front of each layer of a stack (table 3).

It reads top to bottom: settings, the tower, the layers that look, the model, towers of others, and
main, whose loop is train.py's with pictures. More ways to call it:

    python vision.py --arch=dec                    no encoder between the pictures and the answer
    python vision.py --data=docs --image_size=48 --patch=8 --grid=6      lines of text, in tiles
    python vision.py --stage=ocr --data=tables --image_size=160 --patch=40 --grid=0 --lr=4e-3 \
        --batch_size=4 --max_minutes=8 --out=out/tables                  reads bar charts
    python vision.py --data=charts --init_from=out/tables --batch_size=4 --lr=4e-3     answers
    python vision.py --data=my.jsonl               your own: columns image (a path), source, target

Stages: `align` trains what is new between a tower from a file and a language model, both trained
before; `ocr`, `instruct` and `task` train the language model, too. A tower from a file stays as it
is without --tower_lr. assets/stages.sh has all four with the recipes of LLaVA-1.5.
"""

import json
import math
import os
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import model as lm
from data.evaluate import write_answers
from data.images import CHOICES, FILE, VisionConfig, grey, read_vision, token_orders
from data.metrics import score
from data.objectives import count_tokens
from data.picture_tasks import TASKS, open_pictures
from data.sets import evenly
from lib.device import catch_signals, compile_parts, start, to_device
from lib.runs import Log, new_run, read_run, restore, resumed, save_best, save_checkpoint
from lib.settings import UserError, from_dict, given, read_json, read_settings, script, setting
from lib.weights import local_folder, read_weights
from train import FREE, TIMED, is_better, lr_share, make_optimizers, steps_that_fit

# The last is CLIP's ViT-L/14 at 336 pixels, the paper's. CLIP's last layer is left out.
TOWERS = {
    "tiny": dict(image_size=96, patch=16, n_layer=3, n_embd=192, n_head=3, n_hidden=512),
    "large": dict(image_size=336, patch=14, n_layer=23, n_embd=1024, n_head=16, n_hidden=4096),
}
# In this share of the training passes, tiles are drawn at random (released code). Otherwise a tile
# that the gate ranks low is never read, and the gate learns nothing about it.
CHANCE = 0.8
# The paper's stages, with the data set that each has by default.
STAGES = dict(align="llava-pretrain", ocr="ureader", instruct="llava-instruct", task="shapes")


@dataclass
class Settings:
    stage: str = setting("task", "what is trained, see above", tuple(STAGES))
    data: str = setting(None, f"{', '.join(TASKS)}, TASK:PATH or a file [the stage's]")
    vision: str = setting("tiny", f"the tower: {', '.join(TOWERS)}, or hf:FOLDER_OR_ID")
    image_size: int = setting(None, "side of the tower's input [the tower's]", low=1)
    patch: int = setting(None, "side of a patch, in pixels [the tower's]", low=1)
    grid: int = setting(None, "tiles a side at most [3]; 0: the thumbnail", high=64)
    tokens: str = setting(None, "which tiles are read, see data/images.py [all]", CHOICES["tokens"])
    keep: float = setting(None, "share of the tiles; concat: of tokens [0.33]", low=1e-4, high=1)
    look: str = setting(None, "the stack that looks at pictures [none]", CHOICES["look"])
    tower_lr: float = setting(0.0, "of a tower from a file; at 0 it does not learn", high=100)
    arch: str = setting("encdec", "encoder-decoder, or decoder-only", ("encdec", "dec"))
    preset: str = setting("nano", "size, with the rates tuned for it", tuple(lm.PRESETS))
    split: str = setting("2/3", "the encoder's share of the layers", ("1/3", "1/2", "2/3"))
    tokenizer: str = setting("bpe", "bpe (trained on the data), gpt2, bytes, or a file or folder")
    vocab_size: int = setting(None, "of a trained vocabulary", high=2**20)
    src_len: int = setting(None, "source tokens a row, pictures included", high=2**20)
    tgt_len: int = setting(None, "target tokens a row", low=1, high=2**20)
    init_from: str = setting("scratch", "scratch, resume (the run in --out), or a run folder")
    out: str = setting(None, "run folder [a new one in out/]")
    max_iters: int = setting(None, "optimizer steps [as fit into --max_minutes]", low=1)
    max_minutes: float = setting(None, "of training, 41 steps or more [10; large: more]", low=1e-3)
    batch_size: int = setting(None, "rows a forward pass", low=1, high=2**16)
    grad_accum: int = setting(1, "forward passes a step, on each device", low=1, high=2**16)
    optimizer: str = setting("muon", "of the matrices; the rest has AdamW", ("muon", "adamw"))
    lr: float = setting(None, "peak learning rate of the matrices", high=100)
    embed_lr: float = setting(None, "of embeddings, gains and biases", high=100)
    weight_decay: float = setting(0.1, "of the matrices, times the learning rate", high=100)
    warmup_iters: int = setting(None, "steps of linear warm-up, at most a tenth")
    schedule: str = setting(None, "after it, down to zero", ("cosine", "linear"))
    eval_interval: int = setting(None, "steps [an eighth of the run]", low=1)
    eval_rows: int = setting(256, "held-out rows an evaluation; 0 is all", high=2**20)
    seed: int = setting(1337, "of weights and rows")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = setting("auto", "of matrix products", ("auto", "float32", "bfloat16", "float16"))
    compile: str = setting("auto", "torch.compile", ("auto", "true", "false"))
    threads: int = setting(0, "CPU threads; 0 is torch's choice", high=4096)
    deterministic: bool = setting(False, "CUDA: the same bits again, but slower; a CPU gives them")
    objective: str = setting("seq2seq", "for those who read run.json", ("seq2seq",))
    checkpoint_blocks = None  # the preset's


SMALL_ROWS = dict(src_len=1024, tgt_len=64, batch_size=5, max_minutes=10, vocab_size=1024)
LARGE_ROWS = dict(src_len=8192, tgt_len=256, batch_size=4)  # nine tiles, a thumbnail: 5,832 tokens


def resolve(cfg):
    """Fills in what a run or the preset decides, and refuses what cannot work."""
    if cfg.init_from == "resume":
        cfg = resumed(cfg, FREE)
    if cfg.stage == "align" and cfg.init_from == "scratch":
        raise UserError("--stage=align needs --init_from=RUN, a trained model, and --vision=hf:...")
    decided, seen = [], read_vision(cfg.init_from)
    if cfg.init_from not in ("scratch", "resume"):
        decided += ["arch", "preset", "split", "vocab_size", "tokenizer"]
        # Loaded once more later: what is wrong with it is told before any data is read.
        cfg.arch = "encdec" if load_model(cfg.init_from).config.n_enc else "dec"
        preset = read_run(cfg.init_from)["settings"].get("preset")
        cfg.preset = preset if preset in [*lm.PRESETS] else cfg.preset
        cfg.tokenizer = f"{cfg.init_from}/"  # a folder, whatever its name
    if seen or cfg.vision.startswith("hf:"):
        decided += ["vision"] * (seen is not None) + ["image_size", "patch"]
    for name in decided:
        if name in given():
            raise UserError(f"--{name} is decided by the run or the tower that is loaded")
    if cfg.arch == "dec" and cfg.look == "encoder":
        raise UserError("--look=encoder is for --arch=encdec: use --look=decoder")
    cfg.data = cfg.data or STAGES[cfg.stage]
    preset = lm.PRESETS[cfg.preset]
    defaults = dict(preset["train"], vocab_size=preset["vocab_size"])
    defaults |= SMALL_ROWS if defaults["src_len"] < 1024 else LARGE_ROWS
    if cfg.max_iters:
        defaults["max_minutes"] = None
    for name, value in defaults.items():
        if getattr(cfg, name) is None:
            setattr(cfg, name, value)
    return cfg


# ----------------------------------------------------------------------------------------------
# The tower


class TowerLayer(nn.Module):
    """Pre-norm attention and MLP, as CLIP has them."""

    def __init__(self, cfg):
        super().__init__()
        C, D = cfg.n_embd, cfg.n_embd // cfg.n_head
        heads = dict(n_head=cfg.n_head, n_kv_head=cfg.n_head, head_dim=D)
        self.norm1, self.norm2 = nn.LayerNorm(C, cfg.norm_eps), nn.LayerNorm(C, cfg.norm_eps)
        self.attn = lm.Attention(lm.Config(n_embd=C, bias="all", qk_norm=False, **heads))
        self.up, self.down = nn.Linear(C, cfg.n_hidden), nn.Linear(cfg.n_hidden, C)
        self.quick = cfg.act == "quick_gelu"

    def forward(self, x):
        x = x + self.attn(self.norm1(x), rope=None)  # (B, N, C)
        h = self.up(self.norm2(x))
        h = h * torch.sigmoid(1.702 * h) if self.quick else F.gelu(h, approximate="tanh")
        return x + self.down(h)


class Tower(nn.Module):
    """CLIP's vision transformer (Radford et al., 2021) up to the layer whose output LLaVA takes:
    patches, learned positions, a class token that is dropped at the end. SigLIP's is the same
    without class token and first norm."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.patches = nn.Linear(3 * cfg.patch**2, cfg.n_embd, bias=cfg.patch_bias)
        self.embed_class = nn.Parameter(torch.zeros(cfg.n_embd)) if cfg.class_token else None
        self.embed_position = nn.Parameter(torch.zeros(cfg.side**2 + cfg.class_token, cfg.n_embd))
        self.pre_norm = nn.LayerNorm(cfg.n_embd, cfg.norm_eps) if cfg.pre_norm else nn.Identity()
        self.layers = nn.Sequential(*[TowerLayer(cfg) for _ in range(cfg.n_layer)])

    def forward(self, tiles):
        """tiles (B, size, size, 3) of bytes -> features of the patches (B, side * side, n_embd)."""
        side, patch, like = self.cfg.side, self.cfg.patch, self.patches.weight
        mean, std = to_device(map(np.float32, (self.cfg.mean, self.cfg.std)), like.device)
        x = ((tiles / 255 - mean) / std).to(like.dtype)
        x = x.unflatten(2, (side, patch)).unflatten(1, (side, patch))  # (B, side, patch, side, ...
        x = self.patches(x.permute(0, 1, 3, 5, 2, 4).flatten(3).flatten(1, 2))  # (B, side^2, C)
        if self.embed_class is not None:
            x = torch.cat((self.embed_class.to(x.dtype).expand(len(x), 1, -1), x), dim=1)
        x = self.layers(self.pre_norm(x + self.embed_position.to(x.dtype)))
        return x[:, self.cfg.class_token :]


# ----------------------------------------------------------------------------------------------
# Layers that look at the pictures


class Looking:
    """In front of a block: cross-attention to the tokens of the row's own pictures, then an MLP,
    each behind a gate that starts at zero (Flamingo; table 3), so that a trained model starts as it
    was. `sight` is their keys and values (B, H_kv, P, D), and a mask (B, P); None without
    pictures. A row without pictures is left as it is."""

    def __init__(self, cfg, *more):
        super().__init__(cfg, *more)
        self.look_norm, self.look = lm.RMSNorm(cfg.n_embd, cfg.norm_eps), lm.Attention(cfg)
        self.look_mlp_norm, self.look_mlp = lm.RMSNorm(cfg.n_embd, cfg.norm_eps), lm.MLP(cfg)
        self.look_gates = nn.Parameter(torch.zeros(2))
        self.sight = None

    def forward(self, x, *rest):
        if self.sight is not None:
            keys, values, mask = self.sight
            gates = self.look_gates.tanh().to(x.dtype)[:, None, None, None]
            a, b = mask.any(1)[:, None, None] * gates  # (B, 1, 1) each
            x = x + a * self.look.attend(self.look_norm(x), keys, values, lm.source_mask(mask))
            x = x + b * self.look_mlp(self.look_mlp_norm(x))
        return super().forward(x, *rest)


class LookingEncoderBlock(Looking, lm.EncoderBlock):
    """Pictures and an MLP, self-attention, MLP."""


class LookingDecoderBlock(Looking, lm.DecoderBlock):
    """Pictures and an MLP, self-attention, cross-attention to the source, MLP."""


# ----------------------------------------------------------------------------------------------
# The model


class VisionLM(lm.Transformer):
    """A Transformer, encoder-decoder or decoder-only, that reads pictures. `see` makes tokens of
    them; `forward` and `generate` put these where the placeholders vision.image_id stand."""

    def __init__(self, config, vision):
        super().__init__(config)
        self.vision, self.images = vision.check(), ()
        if not 0 <= vision.image_id < config.vocab_size:
            raise UserError(f"vision: image_id={vision.image_id} is no word of the vocabulary")
        if vision.look == "encoder":
            self.enc = nn.ModuleList(LookingEncoderBlock(config) for _ in self.enc)
        if vision.look == "decoder":
            blocks = [LookingDecoderBlock(config, 0.0, i == 0) for i in range(config.n_dec)]
            self.dec = nn.ModuleList(blocks)
        self.looking = [block for block in [*self.enc, *self.dec] if isinstance(block, Looking)]
        self.tower = Tower(vision)
        n_in, n_out, pixels = vision.n_embd * vision.joined, config.n_embd, vision.image_size**2
        # Two layers: section 4.1.
        self.projector = nn.Sequential(nn.Linear(n_in, n_out), nn.GELU(), nn.Linear(n_out, n_out))
        self.embed_marker = nn.Parameter(torch.empty(config.n_embd))  # the end of a row of patches
        if vision.tokens == "learned":  # the released code's: scores a tile by its grey pixels
            self.gating = nn.Sequential(nn.Linear(pixels, 128), nn.GELU(), nn.Linear(128, 1))
        self.init_weights()  # the tower's layers, too, start as the identity
        # The gates start at zero. With output matrices of zeros, neither would get a gradient.
        for layer in [x for block in self.looking for x in (block.look.wo, block.look_mlp.down)]:
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.normal_(self.tower.embed_position, std=0.5)
        nn.init.normal_(self.embed_marker)

    def tokens_of(self, pictures):
        """Pictures of data/images.py -> the tokens (N, C) of all of them, and each one's order."""
        cfg, device, scores = self.vision, self.embed.weight.device, None
        if not pictures:
            return self.embed_marker.new_zeros(0, len(self.embed_marker)), []
        inputs = np.concatenate([picture.tiles for picture in pictures])
        if cfg.tokens == "learned":
            # Divided by the side, the input has the same norm at any size.
            pixels = grey(*to_device([inputs], device), cfg).flatten(1) / cfg.image_size
            gates = self.gating(pixels.to(self.embed_marker.dtype))  # (inputs, 1)
            drawn = self.training and torch.rand(()) < CHANCE
            scores = torch.rand(len(inputs)) if drawn else gates[:, 0].float()
            scores = np.array(scores.tolist())
        orders, rows, read = token_orders(pictures, cfg, scores)
        tiles, rows, read = to_device([inputs[read], rows, read], device)
        trained = torch.is_grad_enabled() and self.tower.embed_position.requires_grad
        # A tower that is not trained keeps no activations: 16 tiles at a time save memory.
        features = torch.cat([self.tower(x) for x in tiles.split(len(tiles) if trained else 16)])
        tokens = self.projector(features.unflatten(1, (-1, cfg.joined)).flatten(2))
        if cfg.tokens == "learned":  # as weights, about 1 at first, gates get a gradient
            tokens = tokens * 2 * gates[read].sigmoid()[:, :, None].to(tokens.dtype)
        table = torch.cat((tokens.flatten(0, 1), self.embed_marker[None].to(tokens.dtype)))
        # Many rows are the marker. F.embedding adds up their gradients in a fixed order.
        return F.embedding(rows, table), orders

    see = torch.no_grad()(tokens_of)  # for answers and evaluation

    def look_at(self, images):
        """The tokens (N, C) of the pictures of the next call, in the order of their placeholders;
        None for text alone. `forward` and `generate` do this; other methods need it before."""
        kind, grad = self.embed.weight.dtype, torch.is_grad_enabled()
        # compile_parts brings tokens without a graph; in align, nothing else would have one.
        self.images = () if images is None else images.to(kind).requires_grad_(grad)
        for block in self.looking:
            block.sight = None

    def embedded(self, ids):
        """(B, T) -> (B, T, C), the pictures' tokens at their placeholders."""
        x, here = super().embedded(ids), ids == self.vision.image_id
        if ids.size(1) == 1:  # a token of an answer is no picture
            return x
        if ids.is_cpu or self.looking:  # on a GPU, tolist() would wait for its answer
            counts = here.sum(1)
            if not any(each := counts.tolist()):
                return x
            if sum(each) != len(self.images):
                raise UserError(f"{sum(each)} placeholders, {len(self.images)} tokens of pictures")
            pictures = nn.utils.rnn.pad_sequence(self.images.split(each), True)  # (B, P, C)
            mask = torch.arange(pictures.size(1), device=ids.device) < counts[:, None]
            for block in self.looking:
                block.sight = *block.look.keys_values(pictures), mask
        images = self.images if len(self.images) else x[:0, 0]
        return x.masked_scatter(here[:, :, None], images.to(x.dtype))

    def decode(self, tokens, encoded=None, src_mask=None, cache=None):
        """As Transformer's. A cache keeps what the decoder's layers see of the pictures, as
        further layers behind its own, so that rows may end or move."""
        looking = self.looking if self.vision.look == "decoder" else []
        if cache is not None and cache.length:
            for block, kept in zip(looking, cache.layers[len(self.dec) :]):
                block.sight = kept.keys, kept.values, *kept.memory
        states = super().decode(tokens, encoded, src_mask, cache)
        if cache is not None and len(cache.layers) == len(self.dec):
            cache.layers += [lm.LayerCache(*b.sight[:2], b.sight[2:]) for b in looking if b.sight]
        return states

    def forward(self, src, tgt, loss_mask=None, images=None):
        self.look_at(images)
        return super().forward(src, tgt, loss_mask)

    def generate(self, prompts, max_new_tokens, *drawing, images=None, **more):
        """As Transformer's; images: the tokens of all the prompts' pictures, in order."""
        self.look_at(images)
        yield from super().generate(prompts, max_new_tokens, *drawing, **more)

    def next_logits(self, states):
        logits = super().next_logits(states)
        logits[:, self.vision.image_id] = -torch.inf  # a placeholder is no word of an answer
        return logits

    def save(self, folder, weights="model.safetensors", **metadata):
        super().save(folder, weights, **metadata)
        with open(os.path.join(folder, FILE), "w", encoding="utf-8") as file:
            json.dump(asdict(self.vision), file, indent=1)

    @classmethod
    def of_folder(cls, folder):
        if (vision := read_vision(folder)) is None:
            raise UserError(f"{folder} is a run without pictures: {FILE} is missing")
        return cls(lm.read_config(folder), vision)


def load_model(folder, weights=None, **where):
    """The model of a run folder, a VisionLM if it reads pictures."""
    return (VisionLM if read_vision(folder) else lm.Transformer).load(folder, weights, **where)


# ----------------------------------------------------------------------------------------------
# Towers of others

# Our names of a tower's parts -> those of transformers' CLIPVisionModel and SiglipVisionModel.
NAMES = {"patches.": "embeddings.patch_embedding.", "embed_class": "embeddings.class_embedding"}
NAMES |= {"embed_position": "embeddings.position_embedding.weight", "pre_norm.": "pre_layrnorm."}
NAMES |= {"layers.": "encoder.layers.", "norm1": "layer_norm1", "norm2": "layer_norm2"}
NAMES |= {".up.": ".mlp.fc1.", ".down.": ".mlp.fc2.", "attn.wo": "self_attn.out_proj"}
NAMES |= {f"attn.w{x}": f"self_attn.{x}_proj" for x in "qkv"}
# Our fields -> theirs, with CLIP's defaults and SigLIP's.
FIELDS = dict(image_size=("image_size", 224, 224), norm_eps=("layer_norm_eps", 1e-5, 1e-6))
FIELDS |= dict(n_embd=("hidden_size", 768, 768), n_hidden=("intermediate_size", 3072, 3072))
FIELDS |= dict(n_layer=("num_hidden_layers", 12, 12), n_head=("num_attention_heads", 12, 12))
FIELDS |= dict(patch=("patch_size", 32, 16), act=("hidden_act", "quick_gelu", "gelu_pytorch_tanh"))


def foreign_tower(name):
    """hf:NAME, CLIP's or SigLIP's safetensors -> VisionConfig, and the weights by our names."""
    where = f"--vision=hf:{name}"
    folder = local_folder(name, where)
    about = read_json(os.path.join(folder, "config.json"))
    about |= half if type(half := about.get("vision_config")) is dict else {}
    siglip = "siglip" in str(about.get("model_type"))
    fields = asdict(VisionConfig()) | {n: about.get(x[0], x[1 + siglip]) for n, x in FIELDS.items()}
    fields["act"] = str(fields["act"]).replace("gelu_pytorch_tanh", "gelu_tanh")
    if type(fields["n_layer"]) is int:
        fields["n_layer"] -= 1  # LLaVA takes the output of the last layer but one
    fields |= dict(mean=[0.5] * 3, std=[0.5] * 3) if siglip else {}
    fields |= dict(class_token=not siglip, pre_norm=not siglip, patch_bias=siglip, from_file=True)
    vision, tensors = from_dict(VisionConfig, fields, where).check(), read_weights(folder, where)
    tensors = {name.removeprefix("vision_model."): x for name, x in tensors.items()}
    with torch.device("meta"):
        wanted, weights = Tower(vision).state_dict(), {}
    for ours, p in wanted.items():
        theirs = ours
        for pair in NAMES.items():
            theirs = theirs.replace(*pair)
        weights[ours] = tensor = tensors.get(theirs, torch.zeros(0)).float()
        if ours == "patches.weight" and tensor.ndim == 4:  # a convolution, step equal to window
            weights[ours] = tensor = tensor.flatten(1)
        if tensor.shape != p.shape or not tensor.isfinite().all():
            raise UserError(f"{where}: {theirs} is missing, misshapen or not finite: no CLIP tower")
    return vision, weights


# ----------------------------------------------------------------------------------------------


def choose_tower(cfg):
    """The VisionConfig of a run, and the weights of a tower from a file, else None."""
    seen, weights = read_vision(cfg.out if cfg.init_from == "resume" else cfg.init_from), None
    if seen is None and cfg.vision.startswith("hf:"):
        seen, weights = foreign_tower(cfg.vision[3:])
    elif seen is None and cfg.vision not in TOWERS:
        raise UserError(f"--vision={cfg.vision} is none of {', '.join(TOWERS)}, hf:FOLDER_OR_ID")
    seen = seen or VisionConfig(**TOWERS[cfg.vision])
    names = ("image_size", "patch", "grid", "tokens", "keep", "look")
    chosen = {name: getattr(cfg, name) for name in names if getattr(cfg, name) is not None}
    return replace(seen, **chosen).check(), weights


def equalised(config, vision):
    """The config with a narrower MLP: with --look, as many parameters as without, within 1%."""
    kinds = (8, vision), (16, vision), (config.n_hidden, replace(vision, look="none"))
    with torch.device("meta"):
        low, high, aim = [VisionLM(replace(config, n_hidden=n), v).num_params() for n, v in kinds]
    return replace(config, n_hidden=8 * (1 + round((aim - low) / (high - low))))


def make_model(cfg, tokenizer, vision, tower_weights):
    """A new model, one with the weights of the run --init_from, or of the run to resume."""
    if cfg.init_from == "resume":
        model = VisionLM.load(cfg.out, "model.safetensors")
    elif cfg.init_from == "scratch":
        ids = dict(pad_id=tokenizer.pad, bos_id=tokenizer.bos, eos_id=tokenizer.eos)
        ids |= dict(vocab_size=tokenizer.vocab_size, src_len=cfg.src_len, tgt_len=cfg.tgt_len)
        config = lm.make_config(cfg.preset, cfg.arch, cfg.split, **ids)
        model = VisionLM(equalised(config, vision), vision)
    else:
        parent = load_model(cfg.init_from)
        old, known, src_len, tgt_len = parent.config, parent.state_dict(), cfg.src_len, cfg.tgt_len
        if cfg.arch == "dec":
            src_len, old.src_len, tgt_len = 0, 0, src_len + tgt_len
        # A length that was trained once stays trained. Answers do not follow the order of patches.
        lengths = dict(src_len=max(src_len, old.src_len), tgt_len=max(tgt_len, old.tgt_len))
        model = VisionLM(replace(old, **lengths, cross_rope=False), vision)
        for name, p in model.state_dict().items():
            if name in known and known[name].shape == p.shape:  # a projector may have changed
                p.copy_(known[name])
    if tower_weights:
        model.tower.load_state_dict(tower_weights)
    for name, p in model.named_parameters():
        new = name.startswith(("projector", "embed_marker", "gating")) or ".look" in name
        p.requires_grad_(new or cfg.stage != "align")
    model.tower.requires_grad_(not vision.from_file)
    return model


@torch.no_grad()
def evaluate(model, valid_set, cfg, world, step):
    """Loss and scores of the held-out rows. blank_loss is the loss when every picture is replaced
    by the mean that is subtracted: what is known without looking. Shows an example."""
    model.eval()
    pairs, loss, texts, n = valid_set.pairs, {True: 0.0, False: 0.0}, [], 0
    rows = sorted(evenly(len(pairs.rows), cfg.eval_rows), key=lambda k: -len(pairs.sources[k]))
    for group in [rows[i : i + 32] for i in range(0, len(rows), 32)]:
        src, tgt, loss_mask = to_device(pairs.batch(group), world.device)
        n += int(loss_mask.sum())
        for pairs.blank in (True, False):  # it ends with the true pictures
            with world.autocast():
                images, _ = model.see(pairs.pictures(group))
                loss[pairs.blank] += model(src, tgt, loss_mask, images).item()
        if step > 0:  # at step 0, answers are noise that takes long to make
            shown = SimpleNamespace(generate=partial(model.generate, images=images))
            texts += write_answers(shown, pairs, group, pairs.tgt_len, world)
    metrics = dict(val_loss=loss[False] / n, blank_loss=loss[True] / n)
    if step > 0:
        held_out = [pairs.rows[row] for row in rows]
        metrics |= score(valid_set.task, texts, held_out)
        source, target = held_out[0]["source"][:300], held_out[0]["target"][:300]
        world.say(f"--- source: {source}\n>>> {texts[0][:300]}\n=== {target}\n---")
    model.train()
    return {name: float(value) for name, value in metrics.items()}


def main():
    cfg = resolve(read_settings(Settings, __doc__))
    vision, tower_weights = choose_tower(cfg)
    world = start(cfg)

    # Data, model, optimizers, run folder.
    rows_a_step = cfg.batch_size * cfg.grad_accum * world.size
    train_set, valid_set = open_pictures(cfg, vision, world.say, rows_a_step)
    if vision.image_id < 0 and not vision.from_file:  # a new tower
        # Subtract the background; otherwise thin strokes drown in a constant.
        vision.mean = train_set.pairs.background() or vision.mean
    vision.image_id = train_set.tokenizer.image
    torch.manual_seed(cfg.seed)
    model = world.place(make_model(cfg, train_set.tokenizer, vision, tower_weights))
    optimizers = make_optimizers(model, cfg, world)
    if cfg.tower_lr and vision.from_file:
        model.tower.requires_grad_(True)
        slow = replace(cfg, optimizer="adamw", lr=cfg.tower_lr, embed_lr=cfg.tower_lr)
        optimizers += make_optimizers(model.tower, slow, world)
    params = [p for p in model.parameters() if p.requires_grad]
    state = dict(step=0, time_s=0.0, tokens=0, max_iters=cfg.max_iters, best=None, last=None)
    if cfg.init_from == "resume":
        state |= restore(cfg.out, model, optimizers, train_set, valid_set, world)
        cfg.max_iters = cfg.max_iters if "max_iters" in given() else state["max_iters"]
    else:
        name = f"vision-{cfg.arch}-{cfg.preset}-{os.path.basename(cfg.data.rstrip('/'))}"
        cfg.out = new_run(name, cfg, world, train_set, valid_set)
    pad, metric = train_set.tokenizer.pad, train_set.metric  # metric: chooses the best checkpoint
    if world.compile:
        rows = world.rows(0, cfg.batch_size)
        seen = [model.see(train_set.pictures(k, rows))[0].cpu().numpy() for k in range(16)]
        compile_parts(model, [(*train_set.batch(k, rows), seen[k]) for k in range(16)], world)
    log = Log(cfg.out, state["step"], world)
    world.say(f"{model.num_params():,} parameters; {rows_a_step} rows a step; {world.describe()}")

    stop, seconds, step = catch_signals(), [], state["step"]
    bar = world.progress(total=cfg.max_iters, initial=step, unit="step")
    while True:
        # Evaluation and checkpoint.
        last = step >= (cfg.max_iters or math.inf)
        stopping = world.sum(len(stop))[0] > 0
        interval = cfg.eval_interval or math.ceil((cfg.max_iters or 1e9) / 8)
        if (last or step % interval == 0) and not stopping and state["last"] != step:
            # Held-out shapes would be compiled one by one.
            with torch.compiler.set_stance("force_eager"):
                metrics = evaluate(model, valid_set, cfg, world, step)
            shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            world.say(f"step {step}: {shown}")
            log.add(dict(step=step, time_s=state["time_s"], tokens=state["tokens"], **metrics))
            log.plot(metric)
            if metric in metrics and is_better(metrics, state["best"], metric):
                state["best"] = dict(metrics, step=step)
                save_best(cfg.out, model, step, world)
            state |= dict(last=step, metrics=metrics)
        if last or stopping or state["last"] == step:
            state |= dict(step=step, max_iters=cfg.max_iters)
            save_checkpoint(cfg.out, model, optimizers, state, world)
        if last or stopping:
            break

        # One step: losses are summed over micro-batches and processes, then divided by targets.
        begin, share = time.perf_counter(), lr_share(step, cfg)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * share
        # Draws of tiles, too, are a function of seed and step.
        torch.manual_seed((cfg.seed * 1_000_003 + step) * world.size + world.rank)
        loss_sum, targets, tokens = 0.0, 0, 0
        for micro in range(cfg.grad_accum):
            batch = train_set.batch(step, world.rows(micro, cfg.batch_size))
            src, tgt, loss_mask = to_device(batch, world.device)
            pictures = train_set.pictures(step, world.rows(micro, cfg.batch_size))
            with world.autocast():
                images, _ = model.tokens_of(pictures)
                # Summed over the targets. In align, rows without pictures train nothing.
                loss = model(src, tgt, loss_mask, images) + 0 * model.embed_marker.sum()
            (loss * world.scale).backward()
            loss_sum = loss_sum + loss.detach()
            targets, tokens = targets + int(batch[2].sum()), tokens + count_tokens(batch, pad)
        targets, tokens = map(float, world.sum(targets, tokens))
        world.sum_gradients(params)
        grads = [p.grad for p in params if p.grad is not None]
        # Until here gradients are sums over the targets, from here on means.
        torch._foreach_div_(grads, max(1.0, targets) * world.scale)
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        loss_sum, norm = torch.stack((loss_sum, norm)).tolist()  # here a step waits for its GPU
        loss = world.sum(loss_sum)[0] / max(1, targets)
        if world.usable(loss, norm, step, cfg):
            for optimizer in optimizers:
                optimizer.step()
        model.zero_grad(set_to_none=True)

        # What it took.
        seconds.append(time.perf_counter() - begin)
        row = dict(step=step, time_s=state["time_s"], tokens=state["tokens"], lr=cfg.lr * share)
        log.add(row | dict(loss=loss))
        step += 1
        state["time_s"] += seconds[-1]
        state["tokens"] += int(tokens)
        speed = {"tok/s": f"{tokens / seconds[-1]:.0f}"}
        bar.set_postfix(loss=f"{loss:.3f}", lr=f"{cfg.lr * share:.1e}", refresh=False, **speed)
        bar.update()
        if cfg.max_iters is None and len(seconds) == TIMED[1]:
            fit = steps_that_fit(seconds, step, state["time_s"], cfg)
            cfg.max_iters = bar.total = world.agree(fit)
            world.say(f"{fit} steps fit into {cfg.max_minutes:g} minutes")
    bar.close()
    if stopping:
        world.say(f"step {step} is saved; go on with --init_from=resume --out={cfg.out}")
        return 128 + stop[0] if stop else 143
    best = state["best"] or state["metrics"]
    world.say(
        f"trained {state['time_s']:.0f} s, {state['tokens']:,} tokens; the best: "
        + ", ".join(f"{name} {value:.4g}" for name, value in best.items())
        + f"\nsee {cfg.out}/loss.png, and ask: python sample.py --run={cfg.out} --image=FILE"
    )
    world.stop()


if __name__ == "__main__":
    script(main)
