"""Pictures: opened whatever their kind, cut into tiles, and the order in which a language model reads their tokens. Needs no torch.

A picture larger than the tower's input is seen twice (paper, section 4.1; "any resolution" of LLaVA-NeXT): whole, squeezed into one
input, the thumbnail; and enlarged or shrunk, its sides kept in proportion, onto the grid of tiles that wastes the least, each tile an input of
its own. The tokens: those of the thumbnail; then those of the tiles, row of patches after row of patches over all of the picture, each row
with an end marker; patches that hold nothing but padding are left out. With `tokens` other than "all", fewer:

    variance   the thumbnail, every marker, and the share `keep` of the other patches that vary most (paper, "Vision token compression")
    learned    the same share, chosen by a layer of the model
    concat     round(1 / keep) neighbours side by side become one token, in the thumbnail too (as Leopard does: Jia et al., 2024)

How many they are follows from the sides of the picture alone: see `n_tokens`.
"""
import contextlib
import io
import json
import os
import warnings
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from lib.settings import UserError

FILE = "vision.json"  # in a run folder: the VisionConfig
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MARKER = -1  # in an order of tokens: an end of a row of patches


@dataclass
class VisionConfig:
    """A vision tower, and how pictures become its inputs and its outputs tokens."""
    image_size: int = 96       # side of an input, in pixels
    patch: int = 8             # side of a patch
    n_layer: int = 3           # layers that run: of a pretrained tower all but the last, whose output LLaVA does not take
    n_embd: int = 192
    n_head: int = 3
    n_hidden: int = 512
    act: str = "quick_gelu"    # or gelu_tanh
    class_token: bool = True   # a token before the patches, which is not passed on
    pre_norm: bool = True      # a LayerNorm in front of the layers
    patch_bias: bool = False
    norm_eps: float = 1e-5
    mean: list = field(default_factory=lambda: list(CLIP_MEAN))  # of a pixel's channels from 0 to 1
    std: list = field(default_factory=lambda: list(CLIP_STD))
    grid: int = 3              # tiles a side at most; 0: the thumbnail alone
    thumbnail: str = "squeeze"  # or crop: the middle of the picture, as CLIP itself sees it
    tokens: str = "all"        # or variance, learned, concat
    keep: float = 0.33
    variance_of: str = "pixels"  # of a patch; or features: of its token
    from_file: bool = False    # the tower was trained by others, and stays as it is unless asked

    @property
    def side(self):
        """Patches along a side of an input."""
        return self.image_size // self.patch

    @property
    def joined(self):
        """Neighbours that make one token."""
        return round(1 / self.keep) if self.tokens == "concat" else 1

    def check(self):
        """Raises UserError naming the first field that cannot work."""
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is float and type(value) is int:
                value = float(value)
            if type(value) is not f.type:
                raise UserError(f"vision: {f.name}={value!r} should be of type {f.type.__name__}")
        for name in ("image_size", "patch", "n_layer", "n_embd", "n_head", "n_hidden"):
            if getattr(self, name) < 1:
                raise UserError(f"vision: {name}={getattr(self, name)} must be at least 1")
        choices = dict(act=("quick_gelu", "gelu_tanh"), thumbnail=("squeeze", "crop"), tokens=("all", "variance", "learned", "concat"),
                       variance_of=("pixels", "features"))
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(f"vision: {name}={getattr(self, name)!r} is none of {', '.join(known)}")
        if self.image_size % self.patch or self.n_embd % self.n_head:
            raise UserError(f"vision: image_size={self.image_size} must be a multiple of patch={self.patch}, n_embd={self.n_embd} of n_head={self.n_head}")
        if not 0 < self.keep <= 1:
            raise UserError(f"--keep={self.keep} must be above 0 and at most 1: the share of the tokens that stay")
        if self.grid < 0:
            raise UserError(f"--grid={self.grid} must not be negative")
        if self.joined > self.side or self.side % self.joined:
            raise UserError(f"--tokens=concat --keep={self.keep} makes one token of {self.joined} neighbours, and a row of {self.side} patches cannot be cut into such: "
                            f"use --keep={1 / next(n for n in range(min(self.joined, self.side), 0, -1) if self.side % n == 0):.2g}")
        return self


def read_vision(folder):
    """The VisionConfig of a run folder, None if it is a run without pictures."""
    path = os.path.join(folder, FILE)
    try:
        with open(path, encoding="utf-8") as f:
            return VisionConfig(**json.load(f)).check()
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"{path} is not written by this project ({error})") from None


# ---------------------------------------------------------------------------------------------------------------------
# Files

def open_image(source, where=None):
    """A PIL image in RGB of a path, of bytes, or of a PIL image, turned as its EXIF rotation asks. What is transparent is put on white; 16 bits become 8. UserError for
    what is no picture, is cut off, or would take too much memory. `where`: its name in messages."""
    where = where or (source if isinstance(source, str) else "an image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of broken metadata, and of sizes that are still allowed
            image = source if isinstance(source, Image.Image) else Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
            if image.width < 1 or image.height < 1:
                raise UserError(f"{where} has no pixels")
            image.load()
            with contextlib.suppress(ValueError, KeyError, SyntaxError, TypeError, OSError):  # EXIF that cannot be read says nothing
                image = ImageOps.exif_transpose(image)
            return to_rgb(image)
    except FileNotFoundError:
        raise UserError(f"{where}: no such file") from None
    except Image.DecompressionBombError:
        size = peek(source)
        raise UserError(f"{where} is refused: it unpacks to {size[0]:,} x {size[1]:,} pixels, more than {2 * Image.MAX_IMAGE_PIXELS:,}; shrink it first") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{where} is no picture that Pillow can read") from None
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, MemoryError, OverflowError, TypeError, AttributeError) as error:  # what Pillow's readers raise for broken files
        raise UserError(f"{where} cannot be read, it is cut off or damaged ({error})") from None


def peek(source):
    """Width and height as a file's header has them, without unpacking it."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return image.size
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def size_by_header(source):
    """(width, height) of a file that `open_image` would give, from its header; None where only opening it tells."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            turned = Image.Image.getexif(image).get(0x0112, 1)  # a PNG's own would unpack it whole to look behind its pixels
            if image.format == "TIFF" or image.width * image.height > Image.MAX_IMAGE_PIXELS:
                return None
            return image.size[::-1] if turned in (5, 6, 7, 8) else image.size
    except Exception:  # whatever it is, opening it says it better
        return None


def to_rgb(image):
    if image.mode.startswith("I") or image.mode == "F":  # Pillow would cut off what is above 255
        values = np.asarray(image).astype(np.float64)
        top = 1.0 if image.mode == "F" and values.max() <= 1 else 65535.0 if values.max() > 255 or image.mode.startswith("I;16") else 255.0
        return Image.fromarray(np.clip(values / top * 255 + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


# ---------------------------------------------------------------------------------------------------------------------
# Tiles and the order of tokens

class Layout(NamedTuple):
    """How a picture of some width and height is cut: a grid of tiles (0, 0: none, it fits into the thumbnail), the size it is drawn at on them, and
    the rows and columns of tokens that hold some of it."""
    grid: tuple    # (rows, columns) of tiles
    drawn: tuple   # (width, height) in pixels
    rows: int
    columns: int


def layout(width, height, cfg):
    """The Layout of a picture. Of all grids of at most cfg.grid tiles a side: the one that shows it with the most pixels, up to its own number, and, of those, wastes the
    fewest."""
    size, best = cfg.image_size, None
    if cfg.grid == 0 or (width <= size and height <= size):
        return Layout((0, 0), (0, 0), 0, 0)
    for rows in range(1, cfg.grid + 1):
        for columns in range(1, cfg.grid + 1):
            scale = min(columns * size / width, rows * size / height)
            drawn = max(1, min(columns * size, round(width * scale))), max(1, min(rows * size, round(height * scale)))
            shown = min(drawn[0] * drawn[1], width * height)
            rank = (shown, shown - rows * columns * size * size)
            if best is None or rank > best[0]:
                best = rank, (rows, columns), drawn
    _, grid, drawn = best
    return Layout(grid, drawn, -(-drawn[1] // cfg.patch), -(-drawn[0] // (cfg.patch * cfg.joined)))


def n_kept(at, cfg):
    """Tokens of the tiles that stay, of at.rows * at.columns."""
    every = at.rows * at.columns
    return max(1, round(cfg.keep * every)) if every and cfg.tokens in ("variance", "learned") else every


def n_tokens(width, height, cfg):
    """Tokens of a picture: thumbnail + tiles that stay + a marker for each of their rows."""
    at = layout(width, height, cfg)
    return cfg.side * cfg.side // cfg.joined + n_kept(at, cfg) + at.rows


def token_places(at, cfg):
    """(rows, columns): where the tokens of the tiles stand among all of the tower's, the thumbnail's coming first."""
    side, across = cfg.side, cfg.side // cfg.joined
    y, x = np.arange(at.rows)[:, None], np.arange(at.columns)[None]
    tile = 1 + y // side * at.grid[1] + x // across
    return tile * side * across + y % side * across + x % across


def token_order(at, cfg, scores=None):
    """What is read in the place of a picture: numbers of the tower's tokens, in order, and MARKER behind each row. `scores` (rows, columns) decides which stay."""
    thumbnail = np.arange(cfg.side * cfg.side // cfg.joined)
    if not at.rows:
        return thumbnail
    places, stays = token_places(at, cfg), np.ones((at.rows, at.columns), dtype=bool)
    if cfg.tokens in ("variance", "learned"):
        stays = np.zeros(stays.size, dtype=bool)
        stays[np.argsort(-np.asarray(scores, dtype=np.float64).reshape(-1), kind="stable")[:n_kept(at, cfg)]] = True
        stays = stays.reshape(at.rows, at.columns)
    rows = np.concatenate((places, np.full((at.rows, 1), MARKER)), axis=1)
    return np.concatenate((thumbnail, rows[np.concatenate((stays, np.ones((at.rows, 1), dtype=bool)), axis=1)]))


def token_orders(pictures, cfg, scores=None):
    """token_order of each Picture. `scores` (tiles of all of them, side * side): of the tower's tokens, where features decide which stay."""
    found, first = [], 0
    for picture in pictures:
        own = picture.scores
        if scores is not None and picture.at.rows:
            own = scores[first:first + len(picture.tiles)].reshape(-1)[token_places(picture.at, cfg)]
        found.append(token_order(picture.at, cfg, own))
        first += len(picture.tiles)
    return found


def in_table(orders, pictures, cfg):
    """The orders as one, numbers of rows in a table of the tower's tokens of all pictures with the marker behind them."""
    each = cfg.side ** 2 // cfg.joined
    first = np.cumsum([0, *[len(picture.tiles) * each for picture in pictures]])
    return np.concatenate([np.where(order == MARKER, first[-1], order + start) for order, start in zip(orders, first)])


# ---------------------------------------------------------------------------------------------------------------------
# Pixels

class Picture(NamedTuple):
    """What the tower and the model are given of a picture."""
    tiles: np.ndarray          # (n, size, size, 3) uint8, the thumbnail first
    at: Layout
    scores: np.ndarray | None  # (rows, columns): variance of the pixels of each patch of the tiles, where it decides
    size: tuple                # (width, height) of the picture


def prepare_image(image, cfg):
    """A PIL image in RGB -> Picture."""
    at, size = layout(*image.size, cfg), cfg.image_size
    tiles = [np.asarray(clip_crop(image, size) if cfg.thumbnail == "crop" else resized(image, (size, size)))]
    scores = None
    if at.rows:
        canvas = np.zeros((at.grid[0] * size, at.grid[1] * size, 3), dtype=np.uint8)
        drawn = np.asarray(resized(image, at.drawn))
        canvas[:at.drawn[1], :at.drawn[0]] = drawn
        split = canvas.reshape(at.grid[0], size, at.grid[1], size, 3).swapaxes(1, 2)
        tiles += list(split.reshape(-1, size, size, 3))
        if cfg.tokens == "variance" and cfg.variance_of == "pixels":
            more = [(0, -length % cfg.patch) for length in drawn.shape[:2]]
            scores = pixel_variance(np.pad(drawn, (*more, (0, 0)), mode="edge"), cfg.patch)  # against black padding, every edge would vary
    return Picture(np.stack(tiles), at, scores, image.size)


def resized(image, size):
    return image if image.size == tuple(size) else image.resize(size, Image.Resampling.BICUBIC)


def clip_crop(image, size):
    """CLIP's own view: the shorter side becomes `size`, and the middle is cut out."""
    width, height = image.size
    short = min(width, height)
    if max(width, height) > 20 * short:  # what is cut away need not be made
        box = [(length - short) / 2 for length in (width, height)]
        return image.resize((size, size), Image.Resampling.BICUBIC, box=(*box, box[0] + short, box[1] + short))
    image = resized(image, (int(size * width / short), int(size * height / short)))
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def pixel_variance(canvas, patch):
    """(H, W, 3) uint8 -> (H / patch, W / patch): variance of the brightness over the pixels of each patch."""
    grey = canvas.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    patches = grey.reshape(grey.shape[0] // patch, patch, grey.shape[1] // patch, patch)
    return patches.var(axis=(1, 3))


def draw_tokens(picture, order, cfg, path):
    """A picture of which patches of the tiles are read: the others are whitened out. Of one without tiles, the thumbnail."""
    at, drawn = picture.at, picture.tiles[0].copy()
    if at.rows:
        read = np.isin(token_places(at, cfg), order)
        rows = [np.concatenate(line, axis=1) for line in np.split(picture.tiles[1:], at.grid[0])]
        drawn = np.concatenate(rows)[:at.drawn[1], :at.drawn[0]]
        dim = ~np.repeat(np.repeat(read, cfg.patch, 0), cfg.patch * cfg.joined, 1)[:drawn.shape[0], :drawn.shape[1]]
        drawn[dim] = 200 + drawn[dim] // 5
    try:
        Image.fromarray(drawn).save(path)
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be written ({error}): give a name that ends in .png") from None
