"""Pictures: opened whatever their format, cut into tiles, and the order of their tokens. Needs no
torch.

A picture larger than the tower's input is seen twice (paper, section 4.1; "any resolution" of
LLaVA-NeXT). The thumbnail is the whole picture, squeezed into one input. The tiles are inputs that
lie side by side on a grid; the picture is drawn on them with its sides in proportion. Its tokens:
those of the thumbnail, then those of the tiles, one row of patches after the other across the whole
picture, with a marker behind each row, read or not. Patches of padding are left out. With `tokens`
other than "all" there are fewer:

    variance   the thumbnail, and the share `keep` of the tiles whose grey values have the largest
               standard deviation. The tower reads these alone. Sections 4.2 and 5.2 choose by
               variance, too; that whole tiles are chosen, only the released code says
    learned    the same share, chosen by a gate of the model (the sections' learned weighting)
    concat     all tiles; round(1 / keep) neighbours side by side become one token, in the thumbnail
               too (Leopard's, which section 4.2 names)

The number of tokens depends on the width and height of a picture alone (`n_tokens`). So a chosen
tile is read whole, with its padding.

The released code differs. Its grids are 1x1, 2x2, 2x3 and 3x2, small pictures have a tile beside
their thumbnail, padding is half on either side, and the features of more than three tiles are
resized to those of three. It orders chosen tiles by their scores, not by their places.
"""

import contextlib
import io
import math
import os
import warnings
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from lib.runs import replacing
from lib.settings import UserError, from_dict, read_json

FILE = "vision.json"  # in a run folder: the VisionConfig
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MARKER = -1  # in an order of tokens: the end of a row of patches
LONGEST = 2**16  # pixels of a picture's side

CHOICES = dict(act=("quick_gelu", "gelu_tanh"), look=("none", "encoder", "decoder"))
CHOICES |= dict(tokens=("all", "variance", "learned", "concat"))
BOUNDS = dict(image_size=(1, 4096), patch=(1, 4096), n_layer=(1, 1024), n_embd=(1, 2**16))
BOUNDS |= dict(n_head=(1, 1024), n_hidden=(1, 2**18), grid=(0, 64), keep=(1e-4, 1))
BOUNDS |= dict(norm_eps=(0, 1), image_id=(-1, 2**31))


@dataclass
class VisionConfig:
    """A vision tower, how pictures become its inputs, and how its outputs become tokens."""

    image_size: int = 96  # side of an input, in pixels
    patch: int = 8  # side of a patch
    n_layer: int = 3  # layers that run: of a pretrained CLIP all but the last
    n_embd: int = 192
    n_head: int = 3
    n_hidden: int = 512
    act: str = "quick_gelu"
    class_token: bool = True  # a token before the patches, which is not passed on
    pre_norm: bool = True  # a LayerNorm in front of the layers
    patch_bias: bool = False
    norm_eps: float = 1e-5
    mean: list = field(default_factory=lambda: list(CLIP_MEAN))  # of the channels, from 0 to 1
    std: list = field(default_factory=lambda: list(CLIP_STD))
    from_file: bool = False  # the tower was trained by others and stays as it is unless asked
    grid: int = 3  # tiles a side at most; 0: the thumbnail alone
    tokens: str = "all"
    keep: float = 0.33
    look: str = "none"  # the stack whose layers have a cross-attention to the pictures
    image_id: int = -1  # the word that stands where a token of a picture goes

    @property
    def side(self):
        """Patches along a side of an input."""
        return self.image_size // self.patch

    @property
    def chooses(self):
        """Whether some of the tiles are left out."""
        return self.tokens in ("variance", "learned")

    @property
    def joined(self):
        """Neighbours that make one token."""
        return round(1 / self.keep) if self.tokens == "concat" else 1

    def check(self):
        """Returns itself; UserError naming the first field that cannot work."""
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise UserError(f"vision: {name} must be one of {', '.join(known)}")
        for name, (low, high) in BOUNDS.items():
            if not low <= getattr(self, name) <= high:
                raise UserError(f"--{name}={getattr(self, name)} must be from {low} to {high}")
        for low, x in ((0, self.mean), (1e-3, self.std)):
            if len(x) != 3 or not all(type(v) in (int, float) and low <= v <= 1 for v in x):
                raise UserError("vision: mean and std are three numbers from 0 to 1")
        if self.image_size % self.patch or self.n_embd % self.n_head:
            raise UserError("--image_size must be a multiple of --patch, and n_embd of n_head")
        if self.side % self.joined:
            joined = f"--keep={self.keep} joins {self.joined} neighbours"
            raise UserError(f"{joined}: a row of {self.side} patches cannot be cut into such")
        return self


def read_vision(folder):
    """The VisionConfig of a run folder; None for a run without pictures."""
    path = os.path.join(folder, FILE)
    known = os.path.lexists(path)
    return from_dict(VisionConfig, read_json(path), path).check() if known else None


# ----------------------------------------------------------------------------------------------
# Files


def open_image(source, where=None):
    """The picture in a file, in bytes or in a PIL image, in RGB and turned as its EXIF says.
    Transparent pixels become white; 16 bits become 8. `where` names it in messages. UserError for
    what is no picture, is cut off, or is too large."""
    where = where or (source if isinstance(source, str) else "an image")
    try:
        image = begin(source)
        if max(image.size) > LONGEST:
            raise ValueError(f"it is {image.width:,} x {image.height:,}; a side has {LONGEST:,}")
        image.load()
        with contextlib.suppress(ValueError, KeyError, SyntaxError, TypeError, OSError):
            image = ImageOps.exif_transpose(image)  # EXIF that cannot be read says nothing
        return to_rgb(image)
    except Exception as error:  # Pillow's readers raise many kinds
        raise UserError(f"{where} cannot be read as a picture: {error}"[:400]) from None


def begin(source):
    """A PIL image of which the header alone is read."""
    warnings.filterwarnings("ignore", module="PIL")  # of broken metadata, of large pictures
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, str) and not os.path.isfile(source):  # a pipe would wait for its writer
        raise ValueError("it is missing or no plain file")
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def size_by_header(source):
    """(width, height) of what `open_image` gives, from the header; None where opening tells."""
    try:
        image = begin(source)
        if image.format == "TIFF" or max(image.size) > LONGEST:
            return None
        turned = Image.Image.getexif(image).get(0x0112, 1) in (5, 6, 7, 8)
        return image.size[::-1] if turned else image.size
    except Exception:  # open_image says it better
        return None


def to_rgb(image):
    if image.mode[0] in "IF":  # Pillow would cut off what is above 255
        values = np.asarray(image).astype(np.float64)
        top = 65535 if ";16" in image.mode or values.max() > 255 else 255
        top = 1 if image.mode == "F" and values.max() <= 1 else top
        image = Image.fromarray(np.clip(values / top * 255 + 0.5, 0, 255).astype(np.uint8))
    if "A" in image.mode.upper() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ----------------------------------------------------------------------------------------------
# Tiles and the order of tokens


class Layout(NamedTuple):
    """How a picture of some width and height is cut."""

    grid: tuple  # (rows, columns) of tiles; (0, 0): the picture fits into the thumbnail
    drawn: tuple  # (width, height) in pixels that it has on the tiles
    rows: int  # of tokens that hold some of it
    columns: int


def layout(width, height, cfg):
    """The Layout of a picture. Of all grids of at most cfg.grid tiles a side, the one that shows
    the most of its pixels; of those, the one that wastes the fewest."""
    size = cfg.image_size
    if cfg.grid == 0 or (width <= size and height <= size):
        return Layout((0, 0), (0, 0), 0, 0)
    ranked = []
    for rows in range(1, cfg.grid + 1):
        for columns in range(1, cfg.grid + 1):
            scale = min(columns * size / width, rows * size / height)
            wide = max(1, min(columns * size, round(width * scale)))
            high = max(1, min(rows * size, round(height * scale)))
            shown = min(wide * high, width * height)
            ranked.append((shown, shown - rows * columns * size**2, (rows, columns), (wide, high)))
    _, _, grid, drawn = max(ranked, key=lambda entry: entry[:2])
    if cfg.chooses:
        return Layout(grid, drawn, grid[0] * cfg.side, grid[1] * cfg.side)
    columns = math.ceil(drawn[0] / (cfg.patch * cfg.joined))
    return Layout(grid, drawn, math.ceil(drawn[1] / cfg.patch), columns)


def n_kept(at, cfg):
    """Tiles that are read, of those to choose from."""
    n = at.grid[0] * at.grid[1]
    return min(n, max(1, round(cfg.keep * n)))


def n_tokens(width, height, cfg):
    """Tokens of a picture: thumbnail, those of the tiles that are read, a marker for each row."""
    at = layout(width, height, cfg)
    tiles = n_kept(at, cfg) * cfg.side**2 if cfg.chooses else at.rows * at.columns
    return cfg.side**2 // cfg.joined + tiles + at.rows


def token_places(at, cfg):
    """(rows, columns): numbers of the tiles' tokens among all of the tower's outputs."""
    side, across = cfg.side, cfg.side // cfg.joined
    y, x = np.arange(at.rows)[:, None], np.arange(at.columns)[None]
    tile = 1 + y // side * at.grid[1] + x // across  # the thumbnail is input 0
    return tile * side * across + y % side * across + x % across


def token_order(at, cfg, scores=None):
    """What is read in the place of a picture: numbers of the tower's tokens, in order, and MARKER
    behind each row. The tiles of the highest `scores` (tiles,) stay; of equals, the first."""
    each = cfg.side**2 // cfg.joined
    if not at.rows:
        return np.arange(each)
    ends = np.full((at.rows, 1), MARKER)
    rows = np.concatenate((token_places(at, cfg), ends), axis=1)
    if cfg.chooses:
        kept = 1 + np.argsort(-scores, kind="stable")[: n_kept(at, cfg)]
        rows = rows[np.isin(rows // each, kept) | (rows == MARKER)]
    return np.concatenate((np.arange(each), rows.reshape(-1)))


def token_orders(pictures, cfg, scores=None):
    """Three things: token_order of each Picture; the same as rows of one table, which holds the
    tokens of all inputs that the tower reads, then the marker; and which inputs these are.
    scores (inputs of all pictures,), of `learned`."""
    orders, rows, first, each = [], [], 0, cfg.side**2 // cfg.joined
    for picture in pictures:
        own = picture.scores if scores is None else scores[first + 1 :][: len(picture.tiles) - 1]
        orders.append(token_order(picture.at, cfg, own))
        rows.append(np.where(orders[-1] == MARKER, MARKER, orders[-1] + first * each))
        first += len(picture.tiles)
    rows = np.concatenate(rows)
    read = np.unique(rows[rows != MARKER] // each)
    places = np.searchsorted(read, rows // each) * each + rows % each
    return orders, np.where(rows == MARKER, len(read) * each, places), read


# ----------------------------------------------------------------------------------------------
# Pixels


class Picture(NamedTuple):
    """What the tower and the model are given of a picture."""

    tiles: np.ndarray  # (n, size, size, 3) uint8, the thumbnail first
    at: Layout
    scores: np.ndarray | None  # (tiles,): how much their grey values vary, if that decides
    size: tuple  # (width, height) of the picture


def prepare_image(image, cfg):
    """A PIL image in RGB -> Picture."""
    at, size, scores = layout(*image.size, cfg), cfg.image_size, None
    tiles = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))[None]
    if at.rows:
        drawn = np.asarray(image.resize(at.drawn, Image.Resampling.BICUBIC))
        canvas = np.zeros((at.grid[0] * size, at.grid[1] * size, 3), dtype=np.uint8)
        canvas[: at.drawn[1], : at.drawn[0]] = drawn
        split = canvas.reshape(at.grid[0], size, at.grid[1], size, 3).swapaxes(1, 2)
        tiles = np.concatenate((tiles, split.reshape(-1, size, size, 3)))
        if cfg.tokens == "variance":  # padding counts, as in the released code
            scores = grey(tiles[1:], cfg).std((1, 2))
    return Picture(tiles, at, scores, image.size)


def grey(tiles, cfg):
    """(n, size, size, 3) of bytes -> (n, size, size): the mean of the channels that the tower is
    given. Of numpy's arrays or torch's."""
    return sum((tiles[..., k] / 255 - cfg.mean[k]) / cfg.std[k] for k in range(3)) / 3


def draw_tokens(picture, order, cfg, path):
    """A picture of which patches of the tiles are read, the others whitened; of a picture without
    tiles, its thumbnail."""
    at, drawn = picture.at, picture.tiles[0]
    if at.rows:
        rows = [np.concatenate(line, axis=1) for line in np.split(picture.tiles[1:], at.grid[0])]
        read = np.isin(token_places(at, cfg), order)
        read = read.repeat(cfg.patch, 0).repeat(cfg.patch * cfg.joined, 1)
        width, height = at.drawn
        drawn = np.concatenate(rows)[:height, :width]
        drawn = np.where(read[:height, :width, None], drawn, 200 + drawn // 5)
    with replacing(path) as new:
        Image.fromarray(drawn.astype(np.uint8)).save(new, "PNG")
