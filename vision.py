"""Pictures for the language model: a vision tower, a projector, and the training of both.

    python vision.py                                                 ten minutes on two cores: says what shapes are in a picture
    python vision.py --stage=ocr --data=tables --image_size=160 --patch=40 --grid=0 --batch_size=4 --lr=4e-3 --max_minutes=8 --out=out/tables     reads bar charts
    python vision.py --data=charts --init_from=out/tables --batch_size=4 --lr=4e-3 --max_minutes=12                   ... and then answers questions about them
    python vision.py --data=docs --image_size=48 --patch=8 --grid=6  reads lines of text, cut into tiles
    python vision.py --arch=dec                                      the decoder-only rival: no encoder between the pictures and the answer
    python vision.py --stage=align --init_from=RUN --vision=hf:openai/clip-vit-large-patch14-336 --data=llava-pretrain
    python vision.py --stage=instruct --init_from=out/ALIGNED --data=llava-instruct      and so on: ocr, instruct, task
    python vision.py --data=my.jsonl                                 your own: columns image (a path), source, target
    python sample.py --image=FILE --prompt="What is there?"          asks a trained model

The paper's section 4: a picture is cut into tiles and a thumbnail (data/images.py), each goes through the tower (CLIP's vision transformer), a projector of two
layers makes each patch's features a token as wide as the text's, fewer of them if --tokens asks for it, and they stand in front of the text in the encoder;
without one, in front of the prompt. How many they are, with P patches a side of the tower's input: P^2 of the thumbnail and, where the picture is larger than that input,
R rows of C patches on the grid of tiles and R row ends; with --tokens=variance or learned --keep of the R C; with concat everything but the row ends times --keep.
A photograph of 1008 x 1008 pixels is 576 + 72 * 72 + 72 = 5832 tokens to CLIP's ViT-L/14 at 336 pixels, 2359 with --tokens=variance --keep=0.33.

Stages: `align` trains the projector alone (and what else is new between pictures and text); `ocr`, `instruct` and `task` the language model, too. A tower from a
file (--vision=hf:) stays as it is unless --train_tower; one that begins from nothing is trained in every stage. The paper's data: align LLaVA-Pretrain; ocr UReader,
SynthDoG; instruct LLaVA-Instruct; task VQAv2, TextVQA, ChartQA, DocVQA, AI2D, GQA, Visual Genome.
"""
import functools
import json
import os
import sys
from dataclasses import asdict, dataclass, fields, replace
from typing import ClassVar

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

import train
from lib.settings import UserError, given, script, setting
from lib.weights import local_folder, read_about, weight_files
from data.images import CLIP_MEAN, CLIP_STD, FILE, VisionConfig, in_table, layout, read_vision, token_orders
from data.metrics import score
from data.pairs import IMAGE, train_pair_tokenizer
from data.picture_tasks import TASKS, PicturePairs, load_picture_task
from lib.runs import write_json
from data.tokenizer import load_tokenizer
from model import ModelError, Transformer, attend, read_config
from train import Finetuning, answers, evenly, launch, new_config, parent_model, read_settings, resolve, to_device

# Towers. `n_layer` counts the layers that run: of CLIP all but the last.
TOWERS = {
    "tiny": dict(image_size=96, patch=16, n_layer=3, n_embd=192, n_head=3, n_hidden=512),
    "small": dict(image_size=224, patch=16, n_layer=11, n_embd=384, n_head=6, n_hidden=1536),
    "base": dict(image_size=224, patch=16, n_layer=11, n_embd=768, n_head=12, n_hidden=3072),
    "large": dict(image_size=336, patch=14, n_layer=23, n_embd=1024, n_head=16, n_hidden=4096),  # CLIP's ViT-L/14 at 336 pixels, the paper's
}


@dataclass
class Settings(train.Settings):
    stage: str = setting("task", "what is trained, and on what the paper trains it: see above", ("align", "ocr", "instruct", "task"))
    data: str = setting("shapes", "shapes, docs, charts, tables (drawn on the spot), a data set of the paper (" + ", ".join(name for name in TASKS if TASKS[name].hub) + "), TASK:PATH, "
                        "or a file with the columns image, source, target")
    vision: str = setting("tiny", f"the tower: {', '.join(TOWERS)} (from nothing), or hf:FOLDER_OR_ID, CLIP's or SigLIP's weights; with --init_from a run with pictures, that run's")
    image_size: int = setting(None, "side of the tower's input in pixels; default: the tower's", type=int)
    patch: int = setting(None, "side of a patch; default: the tower's", type=int)
    tower_layers: int = setting(None, "layers of a tower from nothing; default: the preset's", type=int)
    grid: int = setting(3, "a larger picture is cut into at most so many tiles a side, beside its thumbnail; 0: the thumbnail alone")
    thumbnail: str = setting("squeeze", "how the thumbnail becomes a square: squeezed, or cropped as CLIP does", ("squeeze", "crop"))
    tokens: str = setting("all", "all; variance, learned: the share --keep of the tiles' tokens; concat: 1 / --keep neighbours become one", ("all", "variance", "learned", "concat"))
    keep: float = setting(0.33, "share of the tokens that stay")
    variance_of: str = setting("pixels", "what --tokens=variance takes the variance of: a patch's pixels, or its features", ("pixels", "features"))
    look: str = setting("none", "a cross-attention to the pictures' tokens in each layer of the encoder or decoder, beside their place in the text (paper, table 3)",
                        ("none", "encoder", "decoder"))
    train_tower: bool = setting(False, "train a tower from a file, too")
    own: ClassVar = "vision"
    objective: ClassVar = "seq2seq"
    source_col: ClassVar = None
    target_col: ClassVar = None
    noise: ClassVar = 0.15
    mean_span: ClassVar = 3.0
    text_col: ClassVar = "text"
    max_tokens: ClassVar = 0
    decontaminate: ClassVar = None


OWN = tuple(field.name for field in fields(Settings) if field.name not in {field.name for field in fields(train.Settings)})
HOW = ("grid", "thumbnail", "tokens", "keep", "variance_of")  # may differ from the run that --init_from names


# ---------------------------------------------------------------------------------------------------------------------
# The tower

class Layer(nn.Module):
    """Pre-norm attention and MLP, as CLIP has them."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head, self.act = cfg.n_head, cfg.act
        self.norm1, self.norm2 = nn.LayerNorm(cfg.n_embd, cfg.norm_eps), nn.LayerNorm(cfg.n_embd, cfg.norm_eps)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(cfg.n_embd, cfg.n_embd) for _ in range(4))
        self.up, self.down = nn.Linear(cfg.n_embd, cfg.n_hidden), nn.Linear(cfg.n_hidden, cfg.n_embd)

    def forward(self, x):
        """(B, N, C) -> (B, N, C)"""
        h = self.norm1(x)
        q, k, v = (w(h).unflatten(-1, (self.n_head, -1)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))  # (B, H, N, D)
        x = x + self.wo(attend(q, k, v, None, False).transpose(1, 2).flatten(2))
        h = self.up(self.norm2(x))
        return x + self.down(h * torch.sigmoid(1.702 * h) if self.act == "quick_gelu" else F.gelu(h, approximate="tanh"))


@functools.lru_cache
def on_device(values, device):
    """A tensor of constants, copied to the device once."""
    return torch.tensor(values, device=device)


class Tower(nn.Module):
    """CLIP's vision transformer (Radford et al., 2021) up to the layer whose output LLaVA takes: patches, learned positions, a class token that is dropped at the
    end. SigLIP's is the same without class token and first norm."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.patches = nn.Linear(3 * cfg.patch ** 2, cfg.n_embd, bias=cfg.patch_bias)
        self.embed_class = nn.Parameter(torch.zeros(cfg.n_embd)) if cfg.class_token else None
        self.embed_position = nn.Parameter(torch.empty(cfg.side ** 2 + cfg.class_token, cfg.n_embd))
        self.pre_norm = nn.LayerNorm(cfg.n_embd, cfg.norm_eps) if cfg.pre_norm else None
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.n_layer))

    def forward(self, tiles):
        """tiles (B, size, size, 3) of bytes -> features of the patches, row by row: (B, side * side, n_embd)."""
        cfg, like = self.cfg, self.patches.weight
        mean, std = (on_device(tuple(values), like.device) for values in (cfg.mean, cfg.std))
        x = ((tiles / 255 - mean) / std).to(like.dtype)
        x = x.unflatten(2, (cfg.side, cfg.patch)).unflatten(1, (cfg.side, cfg.patch))  # (B, side, patch, side, patch, 3)
        x = self.patches(x.permute(0, 1, 3, 5, 2, 4).flatten(3).flatten(1, 2))
        if self.embed_class is not None:
            x = torch.cat((self.embed_class.to(x.dtype).expand(len(x), 1, -1), x), dim=1)
        x = x + self.embed_position.to(x.dtype)
        x = x if self.pre_norm is None else self.pre_norm(x)
        for layer in self.layers:
            x = layer(x)
        return x[:, 1:] if self.embed_class is not None else x

    def flops(self):
        """Of one tile."""
        n, patches = len(self.embed_position), self.cfg.side ** 2
        matrices = sum(p.numel() for p in self.layers.parameters() if p.ndim == 2)
        return 2 * patches * self.patches.weight.numel() + 2 * n * matrices + 4 * n * n * self.cfg.n_embd * self.cfg.n_layer


class Projector(nn.Module):
    """Features -> tokens of the language model: two layers (paper, section 4.1)."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.up, self.down = nn.Linear(n_in, n_out), nn.Linear(n_out, n_out)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


# ---------------------------------------------------------------------------------------------------------------------
# The model: a Transformer with eyes

class VisionLM(Transformer):
    """A Transformer, encoder-decoder or decoder-only, whose `see` makes tokens of pictures for `forward` and `generate` (their `images`)."""

    def __init__(self, config, vision):
        super().__init__(config)
        self.vision = vision.check()
        self.tower = Tower(vision)
        self.projector = Projector(vision.n_embd * vision.joined, config.n_embd)
        self.embed_marker = nn.Parameter(torch.zeros(config.n_embd))  # the end of a row of patches
        self.weigh = nn.Linear(vision.n_embd, 1) if vision.tokens == "learned" else None
        self.tiles_a_row = 1.0  # for `flops`
        self.init_vision()

    @torch.no_grad()
    def init_vision(self):
        """As the text's: matrices keep the size of what they read, and layers start as the identity."""
        for module in (self.tower, self.projector, *([self.weigh] if self.weigh else [])):
            for name, p in module.named_parameters():
                if name.endswith("bias"):
                    p.zero_()
                elif p.ndim == 2 and "position" not in name:
                    p.normal_(std=p.size(1) ** -0.5)
        for layer in self.tower.layers:
            layer.wo.weight.zero_()
            layer.down.weight.zero_()
        self.tower.embed_position.normal_(std=0.5)
        self.embed_marker.normal_(std=1.0)

    def see(self, pictures):
        """Pictures -> tokens (N, C) of all of them in order, as many as data/images.py's n_tokens says; and each one's order (`token_order`)."""
        with torch.no_grad():
            tokens, orders, _ = self.tokens_of(pictures)
        return tokens, orders

    def tokens_of(self, pictures):
        """`see` for training: with gradients, and a third value, what `learned` adds to the mean loss."""
        cfg, device = self.vision, self.embed.weight.device
        tiles = torch.from_numpy(np.concatenate([picture.tiles for picture in pictures])).to(device)
        size = len(tiles) if torch.is_grad_enabled() and any(p.requires_grad for p in self.tower.parameters()) else 16  # what is not kept is not needed at once
        features = torch.cat([self.tower(some) for some in tiles.split(size)])  # (tiles, side * side, n_embd)
        scores, extra = self.scores(features, pictures)
        weights = torch.sigmoid(scores) if cfg.tokens == "learned" else None
        tokens = self.projector(features.unflatten(1, (-1, cfg.joined)).flatten(2))
        tokens = tokens if weights is None else tokens * 2 * weights[:, :, None].to(tokens.dtype)  # so that what chooses is trained; the projector's at the start
        orders = token_orders(pictures, cfg, None if scores is None else scores.detach().cpu().numpy())
        table = torch.cat((tokens.flatten(0, 1), self.embed_marker[None].to(tokens.dtype)))
        return table[torch.from_numpy(in_table(orders, pictures, cfg)).to(device)], orders, extra

    def scores(self, features, pictures):
        """What decides which tokens stay, (tiles, side * side), where the features do; and the auxiliary loss of `learned`: the share of the tiles' tokens with a weight over
        one half should be `keep`, so the mean weight is drawn to it."""
        cfg = self.vision
        if cfg.tokens == "variance" and cfg.variance_of == "features":
            return features.float().var(-1), 0.0
        if cfg.tokens != "learned":
            return None, 0.0
        scores = self.weigh(features)[:, :, 0].float()
        chosen = np.concatenate([np.arange(len(picture.tiles)) > 0 for picture in pictures])  # the thumbnail, a picture's first input, stays whole
        return scores, (torch.sigmoid(scores[torch.from_numpy(chosen)]).mean() - cfg.keep) ** 2 if chosen.any() else 0.0

    def flops(self, src_len, tgt_len):
        projector = 2 * self.vision.side ** 2 // self.vision.joined * sum(p.numel() for p in self.projector.parameters() if p.ndim == 2)
        return super().flops(src_len, tgt_len) + self.tiles_a_row * (self.tower.flops() + projector)

    def compiled_parts(self):
        return [*super().compiled_parts(), *self.tower.layers]

    def save(self, folder, weights="model.safetensors", **metadata):
        os.makedirs(folder, exist_ok=True)
        write_json(os.path.join(folder, FILE), asdict(self.vision))
        super().save(folder, weights, **metadata)

    @classmethod
    def of_folder(cls, folder):
        vision = read_vision(folder)
        if vision is None:
            raise ModelError(f"{folder} is a run without pictures ({FILE} is missing)")
        return cls(read_config(folder), vision)


def load_model(folder, weights=None, **where):
    """The model of a run folder, with eyes where it has some."""
    return (VisionLM if read_vision(folder) else Transformer).load(folder, weights, **where)


# ---------------------------------------------------------------------------------------------------------------------
# Towers of others

def foreign_tower(name):
    """--vision=hf:NAME -> (VisionConfig fields, weights by this file's names). Reads CLIP's and SigLIP's config.json and safetensors, of the whole model or of its vision half."""
    where = f"--vision=hf:{name}"
    folder = local_folder(name, where)
    about = read_about(folder, where)
    try:
        about = about.get("vision_config", about)
        clip = "siglip" not in about.get("model_type", "clip")
        known = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224, patch_size=32 if clip else 16,
                     hidden_act="quick_gelu" if clip else "gelu_pytorch_tanh", layer_norm_eps=1e-5 if clip else 1e-6) | about
        mean, std = (CLIP_MEAN, CLIP_STD) if clip else ([0.5] * 3, [0.5] * 3)
        path = os.path.join(folder, "preprocessor_config.json")
        if os.path.exists(path):
            with open(path, encoding="utf-8") as f:
                read = json.load(f)
            mean, std = read.get("image_mean", mean), read.get("image_std", std)
        mean, std = list(map(float, mean)), list(map(float, std))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{where}: its configuration cannot be read ({error})") from None
    acts = {"quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}
    if known["hidden_act"] not in acts:
        raise UserError(f"{where} has the activation {known['hidden_act']}; towers here have quick_gelu or gelu_pytorch_tanh")
    config = dict(image_size=known["image_size"], patch=known["patch_size"], n_layer=known["num_hidden_layers"] - 1, n_embd=known["hidden_size"], n_head=known["num_attention_heads"],
                  n_hidden=known["intermediate_size"], act=acts[known["hidden_act"]], class_token=clip, pre_norm=clip, patch_bias=not clip, norm_eps=known["layer_norm_eps"],
                  mean=mean, std=std)
    tensors = read_tensors(weight_files(folder, where), lambda key: key.startswith(("vision_model.", "embeddings.", "encoder.", "pre_layrnorm.")))
    tensors = {key.removeprefix("vision_model."): tensor for key, tensor in tensors.items()}
    return config, renamed(tensors, config, where)


def read_tensors(files, wanted=lambda key: True):
    """The tensors of safetensors files by name, mapped rather than copied."""
    tensors = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as f:
                tensors |= {key: f.get_tensor(key) for key in f.keys() if wanted(key)}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read, it is truncated or no safetensors file ({error})") from None
    return tensors


def renamed(tensors, config, where):
    """The weights of transformers' CLIPVisionModel or SiglipVisionModel under this file's names; each shape is checked by load_state_dict."""
    names = {"embed_position": "embeddings.position_embedding.weight"}
    if config["class_token"]:
        names["embed_class"] = "embeddings.class_embedding"
    if config["pre_norm"]:
        names |= {f"pre_norm.{part}": f"pre_layrnorm.{part}" for part in ("weight", "bias")}
    parts = dict(norm1="layer_norm1", norm2="layer_norm2", wq="self_attn.q_proj", wk="self_attn.k_proj", wv="self_attn.v_proj", wo="self_attn.out_proj", up="mlp.fc1", down="mlp.fc2")
    for i in range(config["n_layer"]):
        names |= {f"layers.{i}.{ours}.{part}": f"encoder.layers.{i}.{theirs}.{part}" for ours, theirs in parts.items() for part in ("weight", "bias")}
    names["patches.weight"] = "embeddings.patch_embedding.weight"
    if config["patch_bias"]:
        names["patches.bias"] = "embeddings.patch_embedding.bias"
    if missing := [theirs for theirs in names.values() if theirs not in tensors]:
        raise UserError(f"{where} lacks {missing[0]}: are these the weights of a CLIP or SigLIP vision tower?")
    found = {ours: tensors[theirs].float() for ours, theirs in names.items()}
    found["patches.weight"] = found["patches.weight"].flatten(1)  # a convolution whose steps are as wide as its window
    with torch.device("meta"):
        wanted = Tower(VisionConfig(**config).check()).state_dict()
    for name, p in wanted.items():
        if p.shape != found[name].shape:
            raise UserError(f"{where}: {names[name]} is {tuple(found[name].shape)} in the file, {tuple(p.shape)} by config.json")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The job

class Seeing(Finetuning):
    """The rows of a task with pictures."""

    def load_task(self, say):
        return load_picture_task(self.cfg.data, self.cfg.skip_bad, say)

    def __init__(self, cfg, world, say):
        self.say = say
        self.vision, self.tower_weights = vision_of(cfg)
        super().__init__(cfg, world, say)
        begins = cfg.init_from == "scratch" or cfg.init_from != "resume" and read_vision(cfg.init_from) is None
        if begins and self.tower_weights is None:  # what most of a picture is should be zero: a constant in every patch outweighs thin strokes, and reading is not learnt
            self.vision.mean = self.pairs["train"].background() or self.vision.mean
        example = self.pairs["val"].sizes[0]
        for size in example[:1]:
            at = layout(*size, self.vision)
            say(f"a picture of {size[0]} x {size[1]}: {at.grid[0]} x {at.grid[1]} tiles beside the thumbnail, {self.pairs['val'].n_tokens[0][0]} tokens" if at.rows else
                f"a picture of {size[0]} x {size[1]}: the thumbnail alone, {self.pairs['val'].n_tokens[0][0]} tokens")
        if max(self.pairs["train"].tiles()) < 2 and self.vision.tokens in ("variance", "learned"):
            say(f"no picture is cut into tiles, so --tokens={self.vision.tokens} leaves nothing out: the thumbnail is always kept")

    def make_tokenizer(self, rows):
        if self.cfg.tokenizer != "bpe":
            return load_tokenizer(self.cfg.tokenizer)
        texts = [dict(source=row["source"].replace(IMAGE, ""), target=row["target"]) for row in rows] + [dict(source=text, target="") for text in self.task.others]
        return train_pair_tokenizer(texts, self.cfg.vocab_size)

    def make_pairs(self, rows):
        return PicturePairs(rows, self.tokenizer, self.cfg.src_len, self.cfg.tgt_len, self.cfg.arch == "dec", self.vision, self.cfg.skip_bad, self.say)

    def make_model(self):
        model = self.built()
        model.tiles_a_row = float(np.mean(self.pairs["train"].tiles()))
        for name, p in model.named_parameters():
            p.requires_grad_(self.is_trained(name))
        return model

    def is_trained(self, name):
        part = name.split(".")[0]
        if part == "tower":
            return self.cfg.train_tower or not self.vision.from_file
        between = part in ("projector", "embed_marker", "weigh") or ".look" in name
        return between or self.cfg.stage != "align"

    def built(self):
        cfg = self.cfg
        if cfg.init_from == "resume":
            return VisionLM.load(cfg.out, "model.safetensors")
        config, weights = new_config(cfg, self.tokenizer), {}
        if cfg.init_from != "scratch":
            parent = parent_model(cfg, self.tokenizer, load_model)
            config, weights = parent.config, parent.state_dict()
        if "look" not in given() and cfg.init_from != "scratch":
            cfg.look = config.look
        model = VisionLM(replace(config, image_id=self.tokenizer.image, look=cfg.look), self.vision)
        own = model.state_dict()
        weights = {name: p for name, p in weights.items() if name in own and (own[name].shape == p.shape or not name.startswith("projector"))}
        model.load_state_dict(own | weights)
        if self.tower_weights:
            model.tower.load_state_dict(self.tower_weights)
        return model

    def about(self):
        return dict(vision={name: getattr(self.cfg, name) for name in OWN})

    def batch_at(self, step, rows):
        rows, real = self.share(step, rows)
        pairs = self.pairs["train"]
        tensors, pictures = pairs.batch(rows), pairs.pictures(rows)
        tensors[3][real:] = False
        tensors[3][[row in pairs.bad for row in rows]] = False
        return (*to_device(tensors, self.world.device), pictures, int(pairs.lengths[rows[:real]].sum()))

    def loss_of(self, model, batch):
        *tensors, pictures, _ = batch
        images, _, extra = model.tokens_of(pictures) if pictures else (None, [], 0.0)
        n = int(tensors[-1].sum())
        extra = extra if pictures else 0 * model.embed_marker.sum()  # a batch of texts alone still has a gradient, where all else is frozen
        return model(*tensors, reduction="sum", images=images)[1] + n * extra, n

    def evaluate(self, model, step, say):
        metrics = super().evaluate(model, step, say)
        if step:
            rows = evenly(len(self.pairs["val"]), min(self.cfg.eval_rows or 256, 256))
            model.eval()
            metrics["blank"] = blind_score(model, self.task, self.pairs["val"], rows, self.cfg.tgt_len, 128, self.world)
            model.train()
        return metrics


def blind_score(model, task, pairs, rows, max_new_tokens, batch_rows, world):
    """The task's own metric on the same questions with an empty ground for each picture: what is known without looking."""
    pairs.blank = True
    texts = answers(model, pairs, rows, max_new_tokens, batch_rows, world)
    pairs.blank = False
    return next(iter(score(task, texts, [pairs.rows[row] for row in rows]).values()))


def vision_of(cfg):
    """-> (VisionConfig, weights of the tower from a file or None)."""
    how = {name: getattr(cfg, name) for name in HOW}
    if cfg.init_from not in ("scratch", "resume") and (parent := read_vision(cfg.init_from)):
        for name in ("vision", "image_size", "patch", "tower_layers"):
            if name in given():
                raise UserError(f"--{name}={getattr(cfg, name)} cannot be chosen with --init_from={cfg.init_from}, which has a tower already")
        vision = replace(parent, **{name: value for name, value in how.items() if name in given()}).check()
        for name in HOW:
            setattr(cfg, name, getattr(vision, name))
        return vision, None
    if cfg.init_from == "resume":
        vision = read_vision(cfg.out)
        if vision is None:
            raise UserError(f"{cfg.out} has no {FILE}: it cannot be resumed")
        return vision, None
    if cfg.vision.startswith("hf:"):
        for name in ("image_size", "patch", "tower_layers"):
            if name in given():
                raise UserError(f"--{name}={getattr(cfg, name)} cannot be chosen with --vision={cfg.vision}, whose weights have theirs")
        fields_of_tower, weights = foreign_tower(cfg.vision[3:])
        return VisionConfig(**fields_of_tower, from_file=True, **how).check(), weights
    if cfg.vision not in TOWERS:
        raise UserError(f"--vision={cfg.vision} is neither a tower ({', '.join(TOWERS)}) nor hf:FOLDER_OR_ID")
    chosen = dict(image_size=cfg.image_size, patch=cfg.patch, n_layer=cfg.tower_layers)
    return VisionConfig(**TOWERS[cfg.vision] | {name: value for name, value in chosen.items() if value is not None}, **how).check(), None


DEFAULTS = dict(src_len=1024, tgt_len=64, batch_size=5, max_minutes=10, vocab_size=1024)  # where train.py's are a text's; of nano, mini and small
LARGE = dict(src_len=8192, tgt_len=256, batch_size=4)  # ... and of the others: nine tiles of CLIP's are 5,832 tokens


def check(cfg):
    if cfg.stage == "align" and cfg.init_from == "scratch":
        raise UserError("--stage=align trains what stands between a tower and a language model that both know something: --init_from=RUN, and --vision=hf:FOLDER")
    if cfg.look == "encoder" and cfg.arch == "dec":
        raise UserError("--look=encoder is for --arch=encdec: a decoder-only model has no encoder; use --look=decoder")
    if cfg.init_from != "scratch":
        return  # what is not given is its parent's
    if cfg.variance_of != "pixels" and cfg.tokens != "variance":
        raise UserError(f"--variance_of={cfg.variance_of} is for --tokens=variance")
    if "keep" in given() and cfg.tokens == "all":
        raise UserError(f"--keep={cfg.keep} is for --tokens=variance, learned or concat")


def main():
    cfg = read_settings(Settings, __doc__)
    cfg.cross_rope = bool(cfg.cross_rope)  # an answer does not follow the order of patches
    for name, value in (DEFAULTS if cfg.preset in ("nano", "mini", "small") else LARGE).items():
        if getattr(cfg, name) is None and not (name == "max_minutes" and cfg.max_iters):
            setattr(cfg, name, value)
    cfg = resolve(cfg)
    check(cfg)
    data = os.path.splitext(os.path.basename(cfg.data.rstrip("/")))[0]
    launch(cfg, Seeing, f"vision-{cfg.arch}-{cfg.preset}-{data}")
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"see {os.path.join(cfg.out, 'loss.png')}, and ask it: python sample.py --run={cfg.out} --image=FILE --prompt=...", file=sys.stderr)


if __name__ == "__main__":
    script(main)
