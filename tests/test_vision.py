"""Pictures: opening and cutting them, the tower beside transformers' own, the model that sees, its
data, its training."""

import io
import json
import os
import random

import numpy as np
import pytest
import torch
import transformers
from conftest import TINY_ENC, call, one_line
from PIL import Image
from safetensors.torch import save_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import data.pictures
import train
import vision
from data import images, picture_tasks
from data.images import VisionConfig, n_tokens, open_image, prepare_image, token_order
from data.pictures import Drawn, drawn_from, rows_of_picture, split_of
from data.sets import IMAGE
from data.tokenizer import Tokenizer
from lib.settings import UserError
from model import Config, ModelError, Transformer
from vision import Tower, VisionLM, foreign_tower, load_model

SMALL = dict(image_size=24, patch=8, n_layer=1, n_embd=16, n_head=2, n_hidden=24)
TINY = ["--preset=tiny", "--tokenizer=bytes", "--src_len=160", "--tgt_len=64", "--batch_size=4"]
TINY += ["--eval_rows=4", "--warmup_iters=2", "--compile=false", "--dtype=float32", "--device=cpu"]
NEW = [*TINY, "--image_size=24", "--patch=8"]
CLIP = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)
CLIP |= dict(image_size=24, patch_size=8)


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    sizes = dict(shapes=(24, 6, 6), docs=(24, 6, 6), charts=(4, 2, 2))
    monkeypatch.setattr(data.pictures, "SIZES", sizes)
    tiny = dict(n_layer=1, n_embd=32, n_head=2, n_hidden=48, image_size=96, patch=16)
    monkeypatch.setitem(vision.TOWERS, "tiny", tiny)


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def small_model(decoder_only=False, **changes):
    torch.manual_seed(0)
    shape = dict(n_enc=0, src_len=0) if decoder_only else dict(n_enc=2, src_len=256)
    heads = dict(n_embd=32, n_head=2, n_kv_head=1, head_dim=16, n_hidden=48)
    text = Config(vocab_size=40, n_dec=2, tgt_len=256, **heads, **shape)
    model = VisionLM(text, VisionConfig(**SMALL | changes, image_id=5)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def prompt_of(pictures, cfg):
    places = sum(n_tokens(*picture.size, cfg) for picture in pictures)
    return [7, 8, *[5] * places, 9, 10, 11]


# ----------------------------------------------------------------------------------------------
# Files


def test_every_kind_of_picture_opens_in_rgb(tmp_path):
    red, half = Image.new("RGB", (4, 3), (255, 0, 0)), Image.new("RGBA", (4, 3), (0, 0, 0, 0))
    half.paste((255, 0, 0, 255), (0, 0, 2, 3))
    grey = Image.fromarray(np.full((3, 4), 32768, np.uint16))
    share = Image.fromarray(np.full((3, 4), 0.5, np.float32))
    cases = [("a.png", red, (255, 0, 0)), ("b.png", red.convert("P"), (255, 0, 0))]
    cases += [("c.png", red.convert("L"), (76,) * 3), ("d.jpg", red.convert("CMYK"), (254, 0, 0))]
    cases += [
        ("e.png", half, (255, 0, 0)),
        ("f.png", grey, (128,) * 3),
        ("g.gif", red, (255, 0, 0)),
    ]
    for name, image, colour in [*cases, ("h.tiff", share, (128,) * 3)]:
        image.save(tmp_path / name)
        image = open_image(str(tmp_path / name))
        assert image.mode == "RGB" and image.size == (4, 3), name
        assert np.abs(np.array(image.getpixel((0, 1))).astype(int) - colour).max() <= 3, name
    assert open_image(str(tmp_path / "e.png")).getpixel((3, 1)) == (255, 255, 255)
    assert open_image((tmp_path / "a.png").read_bytes()).size == (4, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    noise(6, 3).save(tmp_path / "r.jpg", exif=exif)
    path = str(tmp_path / "r.jpg")
    assert open_image(path).size == (3, 6) == picture_tasks.size_of(path, "it")


def test_pictures_that_cannot_be_used_are_named(tmp_path):
    whole = io.BytesIO()
    noise(40, 40).save(whole, "PNG")
    cases = dict(text=b"hello", empty=b"", cut=whole.getvalue()[:2000])
    cases |= dict(long=b"P6 170000000 1 255\n", bomb=b"P6 20000 20000 255\n")
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} cannot be read as a picture: ") as error:
            open_image(str(tmp_path / name))
        assert "\n" not in str(error.value)
        if name != "cut":
            with pytest.raises(UserError):
                picture_tasks.size_of(str(tmp_path / name), name)
    os.mkfifo("pipe")  # nobody writes into it
    with pytest.raises(UserError, match="pipe cannot be read as a picture: .* no plain file"):
        picture_tasks.size_of("pipe", "pipe")


def test_a_strange_vision_json_is_named(tmp_path):
    model, path = small_model(), tmp_path / "vision.json"
    model.save(str(tmp_path))
    about, again = json.loads(path.read_text()), VisionLM.load(str(tmp_path))
    picture = prepare_image(noise(30, 20), model.vision)
    assert torch.equal(model.see([picture])[0], again.see([picture])[0])
    assert again.vision == model.vision
    wrong = [dict(n_layer=1e9), dict(n_layer=10**9), dict(n_layer="3"), dict(mean=[0.5, "x", 1])]
    wrong += [dict(keep=float("nan")), dict(grid=10**6), dict(tokens="some"), dict(more=1)]
    wrong += [dict(image_id=40), dict(image_id=-1), dict(n_embd=2**16, n_head=1), dict(std=[])]
    for change in wrong:
        path.write_text(json.dumps(about | change))
        with pytest.raises((UserError, ModelError)):
            VisionLM.load(str(tmp_path))
    path.unlink()
    with pytest.raises(UserError, match="without pictures"):
        VisionLM.load(str(tmp_path))


# ----------------------------------------------------------------------------------------------
# Tiles and tokens


def test_pixels_are_those_of_clips_own_processor():
    sides = dict(size=dict(shortest_edge=48), crop_size=dict(height=48, width=48))
    for side in (48, 100, 20):
        theirs = CLIPImageProcessorPil(**sides)(noise(side, side), return_tensors="np")
        theirs = theirs["pixel_values"][0].transpose(1, 2, 0)
        theirs = theirs * np.array(images.CLIP_STD) + np.array(images.CLIP_MEAN)
        cfg = VisionConfig(**SMALL | dict(image_size=48, grid=0))
        ours = prepare_image(noise(side, side), cfg).tiles[0] / 255
        assert np.abs(theirs - ours).max() <= 1 / 255 + 1e-6, side


def some_sizes(n, most):
    rng = random.Random(0)
    return [(rng.randint(1, most), rng.randint(1, most)) for _ in range(n)]


def test_the_grid_shows_the_most_and_wastes_the_least():
    cfg = VisionConfig(**SMALL)
    for width, height in [(24, 24), (1, 1), (20000, 2), (25, 24), *some_sizes(100, 200)]:
        at, ranks = images.layout(width, height, cfg), {}
        for rows, columns in np.ndindex(3, 3):
            scale = min(24 * (columns + 1) / width, 24 * (rows + 1) / height)
            drawn = max(1, round(width * scale)) * max(1, round(height * scale))
            shown = min(width * height, drawn)
            ranks[rows + 1, columns + 1] = shown, shown - (rows + 1) * (columns + 1) * 24 * 24
        if width <= 24 and height <= 24:
            assert at.rows == 0
        else:
            assert ranks[at.grid] == max(ranks.values())


WAYS = [("all", 0.33), ("variance", 0.33), ("variance", 1.0), ("learned", 0.1), ("concat", 0.33)]


@pytest.mark.parametrize("tokens, keep", WAYS)
def test_the_number_of_tokens_is_known_before(tokens, keep):
    cfg = VisionConfig(**SMALL, tokens=tokens, keep=keep).check()
    n = 9 // cfg.joined  # tokens of the thumbnail
    for width, height in [(24, 24), (1, 1), (400, 2), *some_sizes(30, 120)]:
        picture = prepare_image(noise(width, height), cfg)
        scores = np.random.default_rng(0).random((picture.at.rows, picture.at.columns))
        order = token_order(picture.at, cfg, scores)
        assert len(order) == n_tokens(width, height, cfg)
        kept = order[order >= 0]
        assert len(set(kept)) == len(kept) and (order == -1).sum() == picture.at.rows
        assert kept.max() < len(picture.tiles) * cfg.side**2 // cfg.joined
        assert (order[:n] == np.arange(n)).all()  # the thumbnail, whole
        rows = images.token_places(picture.at, cfg).reshape(-1)
        places = [np.flatnonzero(rows == k)[0] for k in kept[n:]]
        assert places == sorted(places)  # in reading order


def test_tokens_are_read_row_by_row_and_variance_keeps_what_varies():
    canvas = np.zeros((48, 72, 3), np.uint8)  # each patch has a colour of its own
    for y, x in np.ndindex(6, 9):
        canvas[8 * y : 8 * y + 8, 8 * x : 8 * x + 8] = y, x, 99
    picture = prepare_image(Image.fromarray(canvas), VisionConfig(**SMALL))
    assert picture.at.grid == (2, 3) and len(picture.tiles) == 7
    patches = picture.tiles.reshape(7, 3, 8, 3, 8, 3)[:, :, 0, :, 0].reshape(-1, 3)
    order = token_order(picture.at, VisionConfig(**SMALL))[9:]
    for y, row in enumerate(np.split(order, 6)):
        assert [tuple(patches[k]) for k in row[:-1]] == [(y, x, 99) for x in range(9)]
        assert row[-1] == images.MARKER
    cfg, canvas = VisionConfig(**SMALL, tokens="variance", keep=0.25), np.full((48, 48, 3), 200)
    canvas[16:32, 8:40] = np.random.default_rng(0).integers(0, 256, (16, 32, 3))  # 8 of 36 patches
    picture = prepare_image(Image.fromarray(canvas.astype(np.uint8)), cfg)
    order = token_order(picture.at, cfg, picture.scores)
    kept = np.isin(images.token_places(picture.at, cfg), order)
    assert kept.sum() == 9 and kept[2:4, 1:5].all()
    images.draw_tokens(picture, order, cfg, "kept.png")
    assert np.abs(np.asarray(open_image("kept.png")).astype(int) - canvas)[16:32, 8:40].max() == 0


# ----------------------------------------------------------------------------------------------
# The tower


@pytest.mark.parametrize(
    "kind, size, patch", [("CLIP", 32, 8), ("CLIP", 84, 14), ("Siglip", 48, 16)]
)
def test_the_tower_is_that_of_transformers(tmp_path, kind, size, patch):
    torch.manual_seed(0)
    shape = CLIP | dict(hidden_size=32, image_size=size, patch_size=patch)
    config = getattr(transformers, f"{kind}VisionConfig")(**shape)
    theirs = getattr(transformers, f"{kind}VisionModel")(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    cfg, weights = foreign_tower(str(tmp_path))
    ours = Tower(cfg)
    ours.load_state_dict(weights)
    tiles = np.stack([np.asarray(noise(size, size, seed)) for seed in range(2)])
    pixels = (torch.from_numpy(tiles) / 255 - torch.tensor(cfg.mean)) / torch.tensor(cfg.std)
    with torch.no_grad():
        states = theirs(pixels.permute(0, 3, 1, 2), output_hidden_states=True).hidden_states
        features = ours(torch.from_numpy(tiles))
    expected = states[-2][:, -((size // patch) ** 2) :]
    assert cfg.n_layer == 2 and (features - expected).abs().max() < 1e-4


def test_foreign_towers_that_cannot_be_used_are_named(tmp_path):
    for config, words in (
        (None, "config.json"),
        (dict(vision_config=dict(hidden_size="x")), "n_embd should be of type int"),
        (dict(vision_config=dict(hidden_act=[1])), "act must be one of"),
        (CLIP, "safetensors"),
    ):
        if config:
            (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=words):
            foreign_tower(str(tmp_path))
    save_file({"vision_model.other": torch.zeros(2)}, str(tmp_path / "model.safetensors"))
    with pytest.raises(UserError, match="embeddings.class_embedding is missing"):
        foreign_tower(str(tmp_path))


# ----------------------------------------------------------------------------------------------
# The model


KINDS = [(False, "none"), (True, "none"), (False, "encoder"), (False, "decoder"), (True, "decoder")]


@pytest.mark.parametrize("decoder_only, look", KINDS)
@pytest.mark.parametrize("tokens", ["all", "variance", "learned", "concat"])
def test_a_row_alone_is_a_row_in_a_batch_is_a_cached_one(decoder_only, look, tokens):
    model = small_model(decoder_only, look=look, tokens=tokens)
    cfg = model.vision
    first, second = prepare_image(noise(50, 30), cfg), prepare_image(noise(30, 60, 2), cfg)
    shown = [[first], [], [prepare_image(noise(20, 20, 1), cfg), second]]
    prompts = [prompt_of(pictures, cfg) for pictures in shown]
    every, _ = model.see([picture for pictures in shown for picture in pictures])
    together = list(model.generate(prompts, 6, images=every))
    for row, (prompt, pictures) in enumerate(zip(prompts, shown)):
        seen = model.see(pictures)[0] if pictures else None
        alone = [step[0] for step in model.generate([prompt], 6, images=seen)]
        assert alone == [step[row] for step in together][: len(alone)]
        if not alone:
            continue
        src, tgt = (None, [prompt + alone]) if decoder_only else (torch.tensor([prompt]), [alone])
        model.look_at(seen)  # cached generation equals one pass over all
        logits = model.logits(model.states(src, torch.tensor(tgt)))[0, -len(alone) :]
        logits[:, 5] = -torch.inf
        assert logits.argmax(-1).tolist() == alone


def test_text_alone_is_what_the_text_model_says():
    model = small_model()
    plain = Transformer(model.config).eval()
    plain.load_state_dict({n: p for n, p in model.state_dict().items() if n in plain.state_dict()})
    src, tgt = torch.randint(6, 40, (2, 9)), torch.randint(6, 40, (2, 5))
    assert torch.equal(model(src, tgt), plain(src, tgt))


def test_pictures_matter_and_stand_where_their_placeholders_are():
    model = small_model()
    pictures = [prepare_image(noise(24, 24, seed), model.vision) for seed in (0, 1)]
    prompt = torch.tensor([prompt_of(pictures, model.vision)])
    images, _ = model.see(pictures)
    model.look_at(images)
    assert torch.equal(model.embedded(prompt)[0, 2 : 2 + len(images)], images)
    states = model.encode(prompt)
    model.look_at(model.see(pictures[::-1])[0])
    assert not torch.allclose(states, model.encode(prompt))
    for images, n in ((model.see(pictures[:1])[0], 9), (None, 0)):
        model.look_at(images)
        with pytest.raises(UserError, match=f"18 placeholders .* have {n}"):
            model.encode(prompt)


def test_the_learned_weights_are_drawn_to_the_share_that_stays():
    model = small_model(tokens="learned", keep=0.25)
    pictures = [prepare_image(noise(60, 60), model.vision)]
    optimizer = torch.optim.Adam(model.weigh.parameters(), lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        tokens, _, extra = model.tokens_of(pictures)
        extra.backward()
        optimizer.step()
    weights = torch.sigmoid(model.weigh(model.tower(torch.from_numpy(pictures[0].tiles))[1:]))
    assert tokens.requires_grad and abs(weights.mean().item() - 0.25) < 0.05 and extra < 0.003


# ----------------------------------------------------------------------------------------------
# Data


@pytest.mark.parametrize("kind", ["shapes", "docs", "charts"])
def test_drawings_follow_from_their_number_and_no_text_is_in_two_splits(kind):
    one, two = (np.asarray(Drawn(kind, "val", 1).load()) for _ in range(2))
    assert np.array_equal(one, two) and one.shape[:2] == Drawn(kind, "val", 1).size()[::-1]
    assert not np.array_equal(one, np.asarray(Drawn(kind, "val", 2).load()))
    assert rows_of_picture(kind, "train", 3) == rows_of_picture(kind, "train", 3)
    said = {}
    for split in ("train", "val", "test"):
        said[split] = {drawn_from(kind, split, n)[1][0] for n in range(100)}
        assert all(split_of(text) == split for text in said[split])
    assert not said["train"] & (said["val"] | said["test"])


def test_charts_have_the_answers_to_their_questions():
    kinds = set()
    for number in range(30):
        title, labels, values, colours = drawn_from("charts", "val", number)[1]
        value, colour = dict(zip(labels, values)), dict(zip(labels, colours))
        for row in rows_of_picture("charts", "val", number):
            kinds.add(row["kind"])
            named = [label for label in row["source"].replace("?", "").split() if label in labels]
            one, two = ([*named, *labels] * 2)[:2]
            expected = dict(title=title, largest=max(value, key=value.get), value=value[one])
            expected |= dict(colour=colour[one], difference=value[one] - value[two])
            assert row["target"].rpartition("=")[2].strip() == str(expected[row["kind"]])
            if named:  # bars are counted off from the left to the last that is asked for
                bars = [part.split(" = ")[0] for part in row["target"].split("; ")[0].split(", ")]
                assert bars == labels[: len(bars)] and bars[-1] in named
    assert kinds == {"title", "largest", "value", "colour", "difference"}
    [row] = rows_of_picture("tables", "val", 29)
    n = range(len(labels))
    lists = [" ".join(f"{i + 1} {x[i]}" for i in n) for x in (colours, labels, values)]
    assert row["target"] == "; ".join([*lists, title])


def pairs_of(rows, src_len=200, **changes):
    cfg = VisionConfig(**SMALL | changes)
    return picture_tasks.PicturePairs(rows, Tokenizer("bytes"), src_len, 8, False, cfg)


def test_pairs_never_cut_pictures_and_know_their_background():
    for n, colour in enumerate([(200, 100, 0)] * 2 + [(9, 9, 9)]):
        Image.new("RGB", (24, 24), colour).save(f"{n}.png")
    text = f"{IMAGE}{'word ' * 30}"
    rows = [dict(source=text, target="x", images=[f"{n}.png"]) for n in range(3)]
    pairs = pairs_of(rows, src_len=20)
    assert (pairs.sources[0] == pairs.tokenizer.image).sum() == 9 and len(pairs.sources[0]) == 20
    with pytest.raises(UserError, match="row 1: --src_len has room for 7"):
        pairs_of(rows, src_len=8)
    assert pairs.background() == pytest.approx([200 / 255, 100 / 255, 0])
    pairs.vision.mean, pairs.blank = pairs.background(), True
    assert pairs.pictures([2])[0].tiles[0, 3, 3].tolist() == [200, 100, 0]
    noise(30, 24).save("0.png")
    pairs.blank = False
    with pytest.raises(UserError, match="0.png has changed"):
        pairs.pictures([0])
    both = dict(source=f"a{IMAGE}b{IMAGE}", target="x", images=["1.png", "2.png"])
    pairs, image = pairs_of([both, dict(source="c", target="x", images=[])]), pairs.tokenizer.image
    assert pairs.sources[0].tolist()[:-1] == [97, *[image] * 9, 98, *[image] * 9]
    assert pairs.sources[1].tolist()[:-1] == [99] and pairs_of([rows[1]]).pictures([0])


def say(who, text):
    return {"from": who, "value": text}


TALK = [say("human", "<image>\nWho?"), say("gpt", "A dog."), say("human", "Where?")]
TALK_ROWS = [("<image>\nWho?", "A dog."), ("<image>\nWho?\nA dog.\nWhere?", "There.")]
OCR = [say("user", "<image>"), say("user", "What year?"), say("assistant", "1999")]
RECORDS = [
    ("llava-instruct", dict(conversations=[*TALK, say("gpt", "There.")]), TALK_ROWS),
    ("ureader", dict(image=["1.png"], conversations=OCR), [("<image>\nWhat year?", "1999")]),
    ("textvqa", dict(question="A?", answers=["a", "b", "b"]), [("<image>A?", "b")]),
    ("docvqa", dict(question="What?", answers=[dict(answer="yes")]), [("<image>What?", "yes")]),
    ("chartqa", dict(query="What?", label=["2"]), [("<image>What?", "2")]),
    ("pictures", dict(source="x", target="y"), [("<image>x", "y")]),
]


@pytest.mark.parametrize("name, record, expected", RECORDS)
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_records_of_the_published_data_sets(tmp_path, name, record, expected, ending):
    noise(20, 10).save(tmp_path / "1.png")
    records = [dict(image="1.png") | record] * 3
    lines = "".join(json.dumps(one) + "\n" for one in records)
    path = tmp_path / f"rows.{ending}"
    path.write_text(lines if ending == "jsonl" else json.dumps(records))
    splits = picture_tasks.load_picture_task(f"{name}:{path}").splits
    rows = [row for part in splits.values() for row in part]
    assert sorted((row["source"], row["target"]) for row in rows) == sorted(expected * 3)
    assert open_image(rows[0]["images"][0]).size == (20, 10)


def test_own_data_is_held_out_by_picture_and_parquet_keeps_its_pictures(tmp_path):
    import datasets

    with open("rows.jsonl", "w") as file:
        for n in range(40):
            noise(20 + n, 20, n).save(f"{n}.png")
            for question in ("one", "two"):
                row = dict(image=f"{n}.png", source=question, target=str(n))
                file.write(json.dumps(row) + "\n")
    splits = picture_tasks.load_picture_task("./rows.jsonl").splits
    pictures, val = ({row["images"][0] for row in splits[s]} for s in ("train", "val"))
    assert len(pictures) == 38 and len(val) == 2 and not pictures & val
    rows = [dict(image=noise(16 + n, 12, n), query=f"What {n}?", label=[str(n)]) for n in range(6)]
    os.makedirs("chartqa")
    for split in ("train", "val"):
        table = datasets.Dataset.from_list(rows)
        table.to_parquet(f"chartqa/{split}-00000-of-00001.parquet")
    row = picture_tasks.load_picture_task("chartqa:chartqa").splits["val"][2]
    assert (row["source"], row["target"]) == (f"{IMAGE}What 2?", "2")
    image = open_image(row["images"][0].load())
    assert np.array_equal(np.asarray(image), np.asarray(rows[2]["image"]))


BAD_ROWS = [("1.png", "<image> <image>", "x", "2 <image> and it has 1 pictures")]
BAD_ROWS += [(3, "x", "x", "neither a path"), ("1.png", "x", 2, "not text")]
BAD_ROWS += [("1.png", "x", None, "not text")]


@pytest.mark.parametrize("image, source, target, words", BAD_ROWS)
def test_rows_that_cannot_be_used_are_named(image, source, target, words):
    with open("bad.jsonl", "w") as file:
        file.write(json.dumps(dict(image=image, source=source, target=target)))
    with pytest.raises(UserError, match=f"bad.jsonl: 1 of 1 rows cannot be used, .*{words}"):
        picture_tasks.load_picture_task("./bad.jsonl")


# ----------------------------------------------------------------------------------------------
# Training


def run_of(words, monkeypatch, capsys):
    status, _, err = call(vision.main, words, monkeypatch, capsys)
    assert status == 0, err


WORDS = "--tokens=variance", "--arch=dec --look=decoder --dtype=bfloat16", "--look=encoder"
WORDS += "--tokens=learned --data=docs", "--tokens=concat --data=charts", "--data=tables"


@pytest.mark.parametrize("words", WORDS, ids=str)
def test_every_kind_trains(monkeypatch, capsys, words):
    own = [word for word in NEW if word[:7] != "--dtype" or "--dtype" not in words]
    run_of([*own, *words.split(), "--out=run", "--max_iters=2"], monkeypatch, capsys)
    log = [json.loads(line) for line in open("run/log.jsonl")]
    losses = [row["loss"] for row in log if "loss" in row]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert {"val_loss", "blank_loss", "rouge_lsum"} <= set(log[-1])
    assert type(load_model("run")) is VisionLM


def test_resuming_gives_what_one_run_gives(monkeypatch, capsys):
    words = [*NEW, "--tokens=variance", "--eval_interval=2", "--max_iters=4"]
    run_of([*words, "--out=whole"], monkeypatch, capsys)
    count, real = [], vision.count_tokens

    def stop_at_third(batch, pad):
        count.append(1)
        if len(count) == 3:
            os.kill(os.getpid(), 15)
        return real(batch, pad)

    monkeypatch.setattr(vision, "count_tokens", stop_at_third)
    assert call(vision.main, [*words, "--out=half"], monkeypatch, capsys)[0] == 128 + 15
    monkeypatch.setattr(vision, "count_tokens", real)
    run_of(["--init_from=resume", "--out=half"], monkeypatch, capsys)
    one, two = (VisionLM.load(name, "model.safetensors").state_dict() for name in ("whole", "half"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    logs = [[json.loads(line) for line in open(f"{name}/log.jsonl")] for name in ("whole", "half")]
    same = [[{k: x for k, x in row.items() if k != "time_s"} for row in log] for log in logs]
    assert same[0] == same[1]


def test_stages(text_file, monkeypatch, capsys):
    torch.manual_seed(0)
    clip = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**CLIP))
    clip.save_pretrained("clip")
    words = [*TINY_ENC, f"--data={text_file}", "--max_iters=1", "--out=text"]
    assert call(train.main, words, monkeypatch, capsys)[0] == 0
    more = [*TINY[2:], "--data=shapes", "--max_iters=2"]
    align = ["--init_from=text", "--vision=hf:clip", "--stage=align", "--out=align"]
    run_of([*more, *align], monkeypatch, capsys)
    text = Transformer.load("text", "model.safetensors").state_dict()
    model = VisionLM.load("align", "model.safetensors")
    first, tower = model.state_dict(), model.tower.state_dict()
    assert all(torch.equal(p, first[name]) for name, p in text.items())
    assert all(torch.equal(p, tower[name]) for name, p in foreign_tower("clip")[1].items())
    instruct = ["--init_from=align", "--stage=instruct", "--look=encoder", "--out=instruct"]
    run_of([*more, *instruct], monkeypatch, capsys)
    last = VisionLM.load("instruct", "model.safetensors").state_dict()
    moved = {name for name, p in first.items() if not torch.equal(p, last[name])}
    assert not any(name.startswith("tower") for name in moved)
    assert {"projector.0.weight", "embed.weight", "enc.0.attn.wq.weight"} <= moved
    status, _, err = call(vision.main, [*more, *instruct[:2], "--patch=8"], monkeypatch, capsys)
    assert status == 2 and "--patch" in one_line(err)


BAD = [("--keep=0", "--keep"), ("--stage=align", "--init_from"), ("--vision=huge", "--vision=huge")]
BAD += [("--data=nothing.jsonl", "nothing.jsonl"), ("--data=shapes:folder", "no path")]
BAD += [("--patch=7", "multiple"), ("--arch=dec --look=encoder", "--look"), ("--grid=-1", "--grid")]
BAD += [("--src_len=5", "--src_len"), ("--tokens=concat --keep=0.5", "--keep")]
BAD += [("--vision=hf:./no", "no such folder"), ("--init_from=none", "none/config.json")]


@pytest.mark.parametrize("words, said", BAD)
def test_bad_keys(words, said, monkeypatch, capsys):
    names = [word.split("=")[0] for word in words.split()]
    own = TINY[2 * ("init_from" in words) :] if "vision" in words or "init_from" in words else NEW
    own = [word for word in own if word.split("=")[0] not in names]
    words = [*own, *words.split(), "--max_iters=1", "--out=run"]
    status, _, err = call(vision.main, words, monkeypatch, capsys)
    assert status == 2 and said in one_line(err) and not os.path.exists("run")
