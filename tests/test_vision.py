"""Pictures: opening and cutting them, the tower beside transformers' own, the model that sees, training, export, the command line."""
import io
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import bench
import data.pictures
import distill
import export
import sample
import vision
from conftest import ROOT, call, one_line
from data import images, metrics, picture_tasks
from lib.settings import UserError
from lib.runtime import Exported
from data.images import VisionConfig, layout, n_tokens, open_image, prepare_image, token_order, token_places
from data.pairs import IMAGE, encode_sources
from data.pictures import Drawn, picture_rows, rows_of_picture, split_of
from data.tokenizer import Tokenizer
from model import Config, ModelError, Transformer
from vision import Tower, VisionLM, foreign_tower

SMALL = dict(image_size=24, patch=8, n_layer=1, n_embd=16, n_head=2, n_hidden=24)
TINY = ["--image_size=24", "--patch=8", "--tower_layers=1", "--n_embd=32", "--n_head=2", "--n_kv_head=1", "--head_dim=16", "--n_hidden=48", "--tokenizer=bytes",
        "--src_len=160", "--tgt_len=64", "--batch_size=4", "--eval_rows=4", "--warmup_iters=2", "--compile=false", "--dtype=float32", "--device=cpu"]
ENC, DEC = [*TINY, "--arch=encdec", "--n_enc=1", "--n_dec=1"], [*TINY, "--arch=dec", "--n_dec=2"]


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    monkeypatch.setattr(data.pictures, "SIZES", dict(shapes=(24, 6, 6), docs=(24, 6, 6), charts=(4, 2, 2)))


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def small_model(decoder_only=False, look="none", seed=0, **changes):
    torch.manual_seed(seed)
    text = Config(vocab_size=40, n_enc=0 if decoder_only else 2, n_dec=2, n_embd=32, n_head=2, n_kv_head=1, head_dim=16, n_hidden=48, src_len=0 if decoder_only else 256,
                  tgt_len=256, image_id=5, look=look, qkv_bias=True)
    model = VisionLM(text, VisionConfig(**SMALL | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def prompt_of(pictures, cfg, before=(7, 8), after=(9, 10, 11)):
    return [*before, *(5 for picture in pictures for _ in range(n_tokens(*picture.size, cfg))), *after]


# ---------------------------------------------------------------------------------------------------------------------
# Files

def saved(image, name, **options):
    image.save(name, **options)
    return str(name)


def test_every_kind_of_picture_opens_in_rgb(tmp_path):
    red = Image.new("RGB", (4, 3), (255, 0, 0))
    wide = np.full((3, 4), 32768, np.uint16)
    half_clear = Image.new("RGBA", (4, 3), (0, 0, 0, 0))
    half_clear.paste((255, 0, 0, 255), (0, 0, 2, 3))
    cases = [(saved(red, tmp_path / "a.png"), (255, 0, 0)), (saved(red.convert("P"), tmp_path / "b.png"), (255, 0, 0)), (saved(red.convert("L"), tmp_path / "c.png"), (76, 76, 76)),
             (saved(red.convert("CMYK"), tmp_path / "d.jpg", quality=95), (254, 0, 0)), (saved(half_clear, tmp_path / "e.png"), (255, 0, 0)),
             (saved(Image.fromarray(wide), tmp_path / "f.png"), (128, 128, 128)), (saved(red.convert("1"), tmp_path / "g.png"), None), (saved(red, tmp_path / "h.gif"), (255, 0, 0)),
             (saved(Image.fromarray(np.full((3, 4), 0.5, np.float32)), tmp_path / "i.tiff"), (128, 128, 128))]
    for path, colour in cases:
        image = open_image(path)
        assert image.mode == "RGB" and image.size == (4, 3), path
        assert colour is None or np.abs(np.array(image.getpixel((0, 1))).astype(int) - colour).max() <= 3, (path, image.getpixel((0, 1)))
    assert open_image(str(tmp_path / "e.png")).getpixel((3, 1)) == (255, 255, 255)  # what is transparent is white
    assert open_image((tmp_path / "a.png").read_bytes()).size == (4, 3)


def test_exif_rotation_is_obeyed(tmp_path):
    image = noise(6, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(image, tmp_path / "r.jpg", exif=exif, quality=100, subsampling=0)
    assert open_image(path).size == (3, 6) == picture_tasks.size_of(path, "it")


@pytest.mark.parametrize("name, content, words", [
    ("none.png", None, "no such file"), ("text.png", b"hello", "no picture"), ("empty.png", b"", "no picture"), ("cut.png", "cut", "cut off"), ("cut.jpg", "cut", "cut off")])
def test_broken_pictures_are_named(tmp_path, name, content, words):
    path = tmp_path / name
    if content == "cut":
        buffer = io.BytesIO()
        noise(40, 40).save(buffer, "PNG" if name.endswith("png") else "JPEG")
        content = buffer.getvalue()[:len(buffer.getvalue()) // 2]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        open_image(str(path))


def test_a_decompression_bomb_is_refused_with_its_size(tmp_path):
    path = saved(Image.new("1", (20000, 20000)), tmp_path / "bomb.png")
    assert os.path.getsize(path) < 100000
    with pytest.raises(UserError, match="20,000 x 20,000"):
        open_image(path)


# ---------------------------------------------------------------------------------------------------------------------
# Tiles and tokens

def test_pixels_are_those_of_clips_own_processor():
    transformers = pytest.importorskip("transformers")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    processor = CLIPImageProcessorPil(size=dict(shortest_edge=48), crop_size=dict(height=48, width=48))
    for size in ((48, 48), (100, 70), (61, 130), (20, 33), (333, 50)):
        image = noise(*size)
        theirs = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        theirs = theirs * np.array(images.CLIP_STD) + np.array(images.CLIP_MEAN)
        ours = prepare_image(image, VisionConfig(**SMALL | dict(image_size=48, grid=0, thumbnail="crop"))).tiles[0] / 255
        assert np.abs(theirs - ours).max() <= 1 / 255 + 1e-6, size


def test_the_grid_wastes_the_least():
    cfg = VisionConfig(**SMALL)
    rng = random.Random(0)
    for width, height in [(24, 24), (1, 1), (20000, 2), (2, 20000), (25, 24), *((rng.randint(1, 200), rng.randint(1, 200)) for _ in range(200))]:
        at = layout(width, height, cfg)
        if width <= 24 and height <= 24:
            assert at.rows == 0
            continue

        def shown_and_wasted(rows, columns):
            scale = min(24 * columns / width, 24 * rows / height)
            shown = min(width * height, max(1, round(width * scale)) * max(1, round(height * scale)))
            return shown, shown - rows * columns * 24 * 24
        every = {(r, c): shown_and_wasted(r, c) for r in range(1, 4) for c in range(1, 4)}
        assert every[at.grid] == max(every.values())
        assert at.drawn[0] <= 24 * at.grid[1] and at.drawn[1] <= 24 * at.grid[0] and at.rows * 8 < at.drawn[1] + 8 and at.columns * 8 < at.drawn[0] + 8


@pytest.mark.parametrize("tokens, keep", [("all", 0.33), ("variance", 0.33), ("variance", 1.0), ("learned", 0.1), ("concat", 0.33), ("concat", 1.0)])
def test_the_number_of_tokens_is_known_before(tokens, keep):
    cfg = VisionConfig(**SMALL, tokens=tokens, keep=keep).check()
    rng = random.Random(1)
    for width, height in [(24, 24), (1, 1), (400, 2), *((rng.randint(1, 120), rng.randint(1, 120)) for _ in range(60))]:
        picture = prepare_image(noise(width, height), cfg)
        scores = np.random.default_rng(0).random((picture.at.rows, picture.at.columns))
        order = token_order(picture.at, cfg, scores)
        assert len(order) == n_tokens(width, height, cfg)
        kept = order[order >= 0]
        assert len(set(kept)) == len(kept) and (order == -1).sum() == picture.at.rows
        assert kept.max() < len(picture.tiles) * cfg.side ** 2 // cfg.joined
        assert (order[:9 // cfg.joined] == np.arange(9 // cfg.joined)).all()  # the thumbnail, whole
        rows = token_places(picture.at, cfg)
        places = [np.flatnonzero(rows.reshape(-1) == k)[0] for k in kept[9 // cfg.joined:]]
        assert places == sorted(places)  # in reading order


def test_tokens_are_read_row_by_row_over_all_of_the_picture():
    cfg = VisionConfig(**SMALL)
    canvas = np.zeros((48, 72, 3), np.uint8)  # each patch has a colour of its own
    for y in range(6):
        for x in range(9):
            canvas[8 * y:8 * y + 8, 8 * x:8 * x + 8] = y, x, 99
    picture = prepare_image(Image.fromarray(canvas), cfg)
    assert picture.at.grid == (2, 3) and len(picture.tiles) == 7
    patches = picture.tiles.reshape(7, 3, 8, 3, 8, 3)[:, :, 0, :, 0].reshape(-1, 3)
    order = token_order(picture.at, cfg)[9:]
    rows = np.split(order, np.flatnonzero(order == -1) + 1)[:-1]
    for y, row in enumerate(rows):
        assert [tuple(patches[k]) for k in row[:-1]] == [(y, x, 99) for x in range(9)]


def test_variance_keeps_what_varies():
    cfg = VisionConfig(**SMALL, tokens="variance", keep=0.25)
    canvas = np.full((48, 48, 3), 200, np.uint8)
    canvas[16:32, 8:40] = np.random.default_rng(0).integers(0, 256, (16, 32, 3))  # 8 of 36 patches
    picture = prepare_image(Image.fromarray(canvas), cfg)
    order = token_order(picture.at, cfg, picture.scores)
    kept = np.isin(token_places(picture.at, cfg), order)
    assert kept.sum() == 9 and kept[2:4, 1:5].all()


# ---------------------------------------------------------------------------------------------------------------------
# The tower

@pytest.mark.parametrize("kind, size, patch, layers, width", [("clip", 32, 8, 3, 32), ("clip", 84, 14, 5, 64), ("siglip", 48, 16, 3, 32)])
def test_the_tower_is_that_of_transformers(tmp_path, kind, size, patch, layers, width):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config, model = dict(clip=(transformers.CLIPVisionConfig, transformers.CLIPVisionModel), siglip=(transformers.SiglipVisionConfig, transformers.SiglipVisionModel))[kind]
    theirs = model(config(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4, image_size=size, patch_size=patch)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    about, weights = foreign_tower(str(tmp_path))
    cfg = VisionConfig(**about).check()
    ours = Tower(cfg)
    ours.load_state_dict(weights)
    tiles = np.stack([np.asarray(noise(size, size, seed)) for seed in range(2)])
    pixels = (torch.from_numpy(tiles) / 255 - torch.tensor(cfg.mean)) / torch.tensor(cfg.std)
    with torch.no_grad():
        expected = theirs(pixels.permute(0, 3, 1, 2), output_hidden_states=True).hidden_states[-2]
        found = ours(torch.from_numpy(tiles))
    assert cfg.n_layer == layers - 1 and (found - expected[:, -(size // patch) ** 2:]).abs().max() < 1e-4


def test_foreign_towers_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        foreign_tower("./nowhere")
    with pytest.raises(UserError, match="no config.json"):
        foreign_tower(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="clip", vision_config=dict(hidden_size=32))))
    with pytest.raises(UserError, match="no .safetensors"):
        foreign_tower(str(tmp_path))
    from safetensors.torch import save_file
    save_file({"vision_model.other": torch.zeros(2)}, str(tmp_path / "model.safetensors"))
    with pytest.raises(UserError, match="lacks embeddings.position_embedding"):
        foreign_tower(str(tmp_path))
    transformers = pytest.importorskip("transformers")
    shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=8)
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**shape)).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(shape | dict(model_type="clip_vision_model", hidden_size=32)))
    with pytest.raises(UserError, match="embeddings.class_embedding is .16,. in the file, .32,. by config"):
        foreign_tower(str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# The model

@pytest.mark.parametrize("decoder_only, look", [(False, "none"), (True, "none"), (False, "encoder"), (False, "decoder"), (True, "decoder")])
@pytest.mark.parametrize("tokens", ["all", "variance", "learned", "concat"])
def test_a_row_alone_is_a_row_in_a_batch_is_a_cached_one(decoder_only, look, tokens):
    model = small_model(decoder_only, look, tokens=tokens)
    cfg = model.vision
    shown = [[prepare_image(noise(50, 30), cfg)], [], [prepare_image(noise(20, 20, 1), cfg), prepare_image(noise(30, 60, 2), cfg)]]
    prompts = [prompt_of(pictures, cfg) for pictures in shown]
    every = model.see([picture for pictures in shown for picture in pictures])[0]
    together = list(model.generate(prompts, 6, images=every))
    for row, (prompt, pictures) in enumerate(zip(prompts, shown)):
        sees = dict(images=model.see(pictures)[0]) if pictures else {}
        alone = [step[0] for step in model.generate([prompt], 6, **sees)]
        assert alone == [step[row] for step in together][:len(alone)]
        src, tgt = (None, torch.tensor([prompt + alone])) if decoder_only else (torch.tensor([prompt]), torch.tensor([alone]))
        if alone:
            logits, _ = model(src, None, tgt, torch.ones_like(tgt, dtype=torch.bool), **sees)
            logits[..., 5] = -torch.inf
            assert logits[0, -len(alone):].argmax(-1).tolist() == alone  # cached generation equals one pass over all


def test_text_alone_is_what_the_text_model_says():
    model = small_model()
    plain = Transformer(model.config).eval()
    plain.load_state_dict({name: p for name, p in model.state_dict().items() if name in plain.state_dict()})
    src, tgt = torch.randint(6, 40, (2, 9)), torch.randint(6, 40, (2, 5))
    mask = torch.ones_like(tgt, dtype=torch.bool)
    assert torch.equal(model(src, None, tgt, mask)[0], plain(src, None, tgt, mask)[0])


def test_pictures_matter_and_stand_where_their_placeholders_are():
    model = small_model()
    first, second = (prepare_image(noise(24, 24, seed), model.vision) for seed in (0, 1))
    prompt = prompt_of([first, second], model.vision)
    images = model.see([first, second])[0]
    states = model.encode(torch.tensor([prompt]), images=images)
    assert not torch.allclose(states, model.encode(torch.tensor([prompt]), images=model.see([second, first])[0]))
    embedded = model.embedded(torch.tensor([prompt]), images)[0]
    assert torch.equal(embedded[2:2 + len(images)], images)
    with pytest.raises(ModelError, match="18 placeholders .* have 9"):
        model.encode(torch.tensor([prompt]), images=model.see([first])[0])


def test_what_the_learned_weights_cost_is_a_loss_that_keeps_their_mean_at_the_share():
    model = small_model(tokens="learned", keep=0.25)
    pictures = [prepare_image(noise(60, 60), model.vision)]
    tokens, _, extra = model.tokens_of(pictures)
    assert tokens.requires_grad and extra >= 0
    optimizer = torch.optim.Adam(model.weigh.parameters(), lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        extra = model.tokens_of(pictures)[2]
        extra.backward()
        optimizer.step()
    features = model.tower(torch.from_numpy(pictures[0].tiles))[1:]
    assert abs(torch.sigmoid(model.weigh(features)).mean().item() - 0.25) < 0.05 and extra < 0.003


def test_save_and_load(tmp_path):
    model = small_model()
    model.save(str(tmp_path))
    again = VisionLM.load(str(tmp_path))
    picture = prepare_image(noise(30, 20), model.vision)
    assert torch.equal(model.see([picture])[0], again.see([picture])[0]) and again.vision == model.vision
    with pytest.raises(ModelError, match="vision.json"):
        Transformer(model.config).save(str(tmp_path / "text"))
        VisionLM.load(str(tmp_path / "text"))


def test_flops_are_those_that_torch_counts():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    tower = Tower(VisionConfig(**SMALL))
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        tower(torch.zeros(1, 24, 24, 3, dtype=torch.uint8))
    assert counter.get_total_flops() == tower.flops()


# ---------------------------------------------------------------------------------------------------------------------
# Data

def test_drawings_are_a_function_of_their_number():
    for kind in ("shapes", "docs", "charts"):
        one, two = (np.asarray(picture_tasks.load(Drawn(kind, "val", 1), "it")) for _ in range(2))
        assert np.array_equal(one, two) and one.shape[:2] == Drawn(kind, "val", 1).size()[::-1]
        assert rows_of_picture(kind, "train", 3) == rows_of_picture(kind, "train", 3)
        assert not np.array_equal(np.asarray(picture_tasks.load(Drawn(kind, "train", 0), "it")), np.asarray(picture_tasks.load(Drawn(kind, "train", 1), "it")))


def test_no_text_is_in_two_splits():
    for kind in ("shapes", "docs", "charts"):
        said = {split: {data.pictures.drawn_from(kind, split, n, data.pictures.PLANS[kind])[1][0] for n in range(300)} for split in ("train", "val", "test")}
        assert all(split_of(text) == split for split in said for text in said[split])
        assert not said["train"] & said["val"] and not said["train"] & said["test"]


def test_a_tower_from_nothing_takes_the_ground_for_zero():
    """Of charts that is white; and a picture without content is that ground."""
    cfg, tokenizer = VisionConfig(image_size=160, patch=16, grid=0), Tokenizer("bytes")
    rows = [dict(source=f"{IMAGE}?", target="x", images=[Image.new("RGB", (160, 160), (200, 100, 0))]) for _ in range(3)]
    pairs = picture_tasks.PicturePairs(rows, tokenizer, 200, 8, False, cfg)
    assert pairs.background() == pytest.approx([200 / 255, 100 / 255, 0])
    cfg.mean, pairs.blank = pairs.background(), True
    pairs.rows[0]["images"][0].putpixel((3, 3), (0, 0, 255))
    assert np.array_equal(pairs.pictures([0])[0].tiles, pairs.pictures([1])[0].tiles) and pairs.pictures([0])[0].tiles[0, 3, 3].tolist() == [200, 100, 0]
    assert picture_tasks.PicturePairs([dict(source="?", target="x", images=[])], tokenizer, 200, 8, False, cfg).background() is None


def test_charts_have_the_answers_to_their_questions():
    kinds = set()
    for number in range(30):
        _, plan = data.pictures.drawn_from("charts", "val", number, data.pictures.plan_charts)
        title, labels, values, colours = data.pictures.drawn_from("charts", "train", number, data.pictures.plan_charts)[1]
        [row] = rows_of_picture("tables", "train", number)
        n = range(len(colours))
        assert row["target"].split("; ") == [" ".join(f"{i + 1} {found[i]}" for i in n) for found in (colours, labels, values)] + [title]
        title, labels, values, colours = plan
        for row in rows_of_picture("charts", "val", number):
            kinds.add(row["kind"])
            named = [label for label in labels if f" {label}" in row["source"]]
            answer = row["target"].rpartition("=")[2].strip()
            expected = dict(title=lambda: title, largest=lambda: labels[values.index(max(values))], value=lambda: str(values[labels.index(named[0])]),
                            colour=lambda: colours[labels.index(named[0])], difference=lambda: str(abs(values[labels.index(named[0])] - values[labels.index(named[1])])))
            assert answer == expected[row["kind"]]()
            if named:
                what = colours if row["kind"] == "colour" else values
                counted, _, last = row["target"].partition("; ")
                counted = [part.split(" = ") for part in counted.split(", ")]
                assert [part[0] for part in counted] == labels[:len(counted)] and counted[-1][0] in named
                assert {part[0]: part[1] for part in counted if len(part) == 2} == {label: str(what[labels.index(label)]) for label in named}
                assert not last if len(named) == 1 else eval(last.replace("=", "=="))
            wrong = row["target"].replace(answer, "x", row["target"].count(answer) - 1)  # what is written before the answer does not count
            assert metrics.score_worked([wrong, "x = y"], [row, row])["relaxed"] == 50
    assert kinds == {"title", "largest", "value", "colour", "difference"}


def test_tables_are_the_charts_and_know_the_questions_words():
    task = picture_tasks.load_picture_task("tables")
    assert {split: len(rows) for split, rows in task.splits.items()} == dict(train=4, val=2, test=2) and task.splits["val"][1]["images"] == [Drawn("charts", "val", 1)]
    assert {"What is the title?", "Which bar is the largest?"} <= set(task.others)
    assert picture_tasks.load_picture_task("charts").others == ()


def test_own_data_with_pictures(tmp_path):
    for n in range(40):
        noise(20 + n, 20, n).save(tmp_path / f"{n}.png")
    with open(tmp_path / "rows.jsonl", "w") as f:
        for n in range(40):
            for question in ("one", "two"):
                f.write(json.dumps(dict(image=f"{n}.png", source=question, target=str(n))) + "\n")
    task = picture_tasks.load_picture_task(str(tmp_path / "rows.jsonl"))
    train, val = ({row["images"][0] for row in task.splits[split]} for split in ("train", "val"))
    assert len(train) == 38 and len(val) == 2 and not train & val  # by picture, not by question
    assert task.splits["train"][0]["source"] == f"{IMAGE}one"


def test_parquet_with_pictures_as_the_hub_has_it(tmp_path):
    import datasets
    rows = dict(image=[noise(16 + n, 12, n) for n in range(6)], query=[f"What is {n}?" for n in range(6)], label=[[str(n)] for n in range(6)], human_or_machine=[0] * 6)
    features = datasets.Features(dict(image=datasets.Image(), query=datasets.Value("string"), label=datasets.Sequence(datasets.Value("string")), human_or_machine=datasets.Value("int64")))
    found = datasets.Dataset.from_dict(rows, features=features)
    os.makedirs(tmp_path / "chartqa")
    for split in ("train", "val"):
        found.to_parquet(str(tmp_path / "chartqa" / f"{split}-00000-of-00001.parquet"))
    task = picture_tasks.load_picture_task(f"chartqa:{tmp_path / 'chartqa'}")
    row = task.splits["val"][2]
    assert (row["source"], row["target"]) == (f"{IMAGE}What is 2?", "2")
    assert np.array_equal(np.asarray(picture_tasks.load(row["images"][0], "it")), np.asarray(rows["image"][2]))


@pytest.mark.parametrize("name, record, expected", [
    ("llava-pretrain", dict(image="1.png", conversations=[{"from": "human", "value": "Describe it.\n<image>"}, {"from": "gpt", "value": "A dog."}]), [("Describe it.\n<image>", "A dog.")]),
    ("llava-instruct", dict(image="1.png", conversations=[{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "A dog."}, {"from": "human", "value": "Where?"},
                                                           {"from": "gpt", "value": "There."}]), [("<image>\nWho?", "A dog."), ("<image>\nWho?\nA dog.\nWhere?", "There.")]),
    ("ureader", dict(image=["1.png"], conversations=[{"from": "user", "value": "<image>"}, {"from": "user", "value": "What year?"}, {"from": "assistant", "value": "1999"}]),
     [("<image>\nWhat year?", "1999")]),
    ("synthdog", dict(image="1.png", ground_truth=json.dumps(dict(gt_parse=dict(text_sequence="some words")))), [("<image>Read it.", "some words")]),
    ("textvqa", dict(image="1.png", question="What?", answers=["nokia"] * 6 + ["phone"] * 4), [("<image>What?", "nokia")]),
    ("vqav2", dict(image="1.png", question="What?", multiple_choice_answer="yes", answers=[dict(answer="yes", answer_id=1)]), [("<image>What?", "yes")]),
    ("docvqa", dict(image="1.png", question="What?", answers=["a", "b"]), [("<image>What?", "a")]),
    ("ai2d", dict(image="1.png", question="What?", options=["leaf", "root"], answer="1"), [("<image>What?\nA. leaf\nB. root", "B")]),
    ("gqa", dict(image="1.png", question="What?", answer="car"), [("<image>What?", "car")]),
    ("vg", dict(image="1.png", qas=[dict(question="What?", answer="A car."), dict(question="Who?", answer="He.")]), [("<image>What?", "A car."), ("<image>Who?", "He.")]),
    ("vg", dict(image="1.png", regions=[dict(x=1, y=2, width=3, height=4, phrase="a hat")]), [("<image>What is at 1, 2, 3 wide and 4 high?", "a hat")])])
def test_the_data_sets_of_the_paper(tmp_path, name, record, expected):
    noise(20, 10).save(tmp_path / "1.png")
    with open(tmp_path / "rows.jsonl", "w") as f:
        f.write((json.dumps(record) + "\n") * 3)
    rows = [row for part in picture_tasks.load_picture_task(f"{name}:{tmp_path / 'rows.jsonl'}").splits.values() for row in part]
    assert [(row["source"], row["target"]) for row in rows] == expected * 3
    assert picture_tasks.load(rows[0]["images"][0], "it").size == (20, 10)


def test_placeholders_and_pictures_must_be_as_many(tmp_path):
    noise(20, 10).save(tmp_path / "1.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps(dict(image="1.png", source="<image> and <image>", target="x")) + "\n")
    with pytest.raises(UserError, match="2 <image> and it has 1 pictures"):
        picture_tasks.load_picture_task(str(tmp_path / "rows.jsonl"))


def test_pictures_are_never_cut(tmp_path):
    rows = [dict(source=f"{IMAGE}{'word ' * 30}", target="x", images=[noise(24, 24)])]
    cfg, tokenizer = VisionConfig(**SMALL), Tokenizer("bytes")
    pairs = picture_tasks.PicturePairs(rows, tokenizer, 20, 8, False, cfg)
    assert (pairs.sources[0] == tokenizer.image).sum() == 9 and len(pairs.sources[0]) == 20
    with pytest.raises(UserError, match="--src_len=8 has no room"):
        picture_tasks.PicturePairs(rows, tokenizer, 8, 8, False, cfg)


def test_encode_sources():
    t = Tokenizer("bytes")
    ids = encode_sources([f"a{IMAGE}b{IMAGE}", "c"], t, [[2, 1], []])
    assert ids == [[97, t.image, t.image, 98, t.image], [99]]


def test_metrics():
    row = dict(target="2", answers=["2"] * 3 + ["two"] * 1 + ["a dog"] * 6)
    assert metrics.score_vqa(["Two."], [row])["vqa"] == 100.0
    row = dict(target="x", answers=["x", "x", *"abcdefgh"])
    assert abs(metrics.score_vqa(["x"], [row])["vqa"] - 100 * (2 * (1 / 3) + 8 * (2 / 3)) / 10) < 1e-9
    for said, plain in (("The dogs' dont-know!", "dogs' don't know"), ("1,000 dont", "1000 don't"), ("2.", "2"), ("a 3.5 ft. man", "3.5 ft man"), ("yes/no", "yes no"), ("None", "0")):
        assert metrics.vqa_words(said) == plain, said
    assert metrics.score_anls(["helo"], [dict(target="x", answers=["Hello", "no"])])["anls"] == 80.0
    assert metrics.score_anls(["abc"], [dict(target="xyz")])["anls"] == 0.0
    for said, right, good in (("105", "100", True), ("106", "100", False), ("50%", "0.5", True), ("Oslo", "oslo", True), ("1,000", "1000", True), ("0", "0", True), ("nan", "3", False), ("4", "cat", False)):
        assert metrics.relaxed(said, right) == good, (said, right)
    assert metrics.edits("kitten", "sitting") == 3 and metrics.edits("", "ab") == 2


# ---------------------------------------------------------------------------------------------------------------------
# Training

def run_of(words, monkeypatch, capsys):
    status, _, err = call(vision.main, words, monkeypatch, capsys)
    assert status == 0, err
    return err


@pytest.mark.parametrize("words", [ENC, DEC, [*ENC, "--tokens=variance"], [*ENC, "--tokens=learned", "--data=docs"], [*ENC, "--tokens=concat", "--data=charts"], [*ENC, "--look=encoder"]])
def test_every_kind_trains_answers_exports(tmp_path, monkeypatch, capsys, words):
    run_of([*words, "--out=run", "--max_iters=3", "--eval_interval=2"], monkeypatch, capsys)
    log = [json.loads(line) for line in open("run/log.jsonl")]
    assert {"val_loss", "shuffled_loss", "blank"} <= set(log[-1])
    model = VisionLM.load("run")
    noise(50, 40).save("p.png")
    status, said, err = call(sample.main, ["--run=run", "--image=p.png", "--prompt=What is there?", "--max_new_tokens=8", "--dtype=float32", "--show_tokens=kept.png"], monkeypatch, capsys)
    assert status == 0, err
    assert Image.open("kept.png").size == tuple(layout(50, 40, model.vision).drawn)
    status, _, err = call(bench.main, ["quality", "--run=run", "--json=q.json", "--eval_rows=4", "--plot=q.png"], monkeypatch, capsys)
    assert status == 0 and os.path.exists("q.png"), err
    row = json.load(open("q.json"))["rows"][0]
    assert 0 <= row["blank"] <= 100 and row["picture_tokens"] > 0 and row["first_ms"] > 0
    status, _, err = call(export.main, ["--run=run", "--out=onnx", "--rows=3", "--new=4"], monkeypatch, capsys)
    if model.config.look != "none":
        assert status == 2 and "--look" in one_line(err)
        return
    assert status == 0, err
    exported = Exported("onnx")
    picture = prepare_image(open_image("p.png"), model.vision)
    assert np.abs(exported.see([picture])[0] - model.see([picture])[0].detach().numpy()).max() < 1e-3
    status, again, err = call(sample.main, ["--run=onnx", "--image=p.png", "--prompt=What is there?", "--max_new_tokens=8"], monkeypatch, capsys)
    assert status == 0 and again == said, err


def test_an_export_is_run_without_torch(tmp_path, monkeypatch, capsys):
    run_of([*ENC, "--out=run", "--max_iters=2"], monkeypatch, capsys)
    assert call(export.main, ["--run=run", "--out=onnx", "--rows=2", "--new=4", "--precision=int8"], monkeypatch, capsys)[0] == 0
    noise(50, 40).save("p.png")
    code = ("import sys; sys.modules['torch'] = None; sys.argv = ['sample.py', '--run=onnx', '--image=p.png', '--prompt=x', '--max_new_tokens=4']\n"
            "import sample; sample.main()")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=ROOT))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arch", [ENC, DEC])
def test_text_prompts_still_work(arch, tmp_path, monkeypatch, capsys):
    run_of([*arch, "--out=run", "--max_iters=2"], monkeypatch, capsys)
    assert call(export.main, ["--run=run", "--out=onnx", "--rows=2", "--new=4"], monkeypatch, capsys)[0] == 0
    outs = [call(sample.main, [f"--run={run}", "--prompt=hello", "--max_new_tokens=5", *more], monkeypatch, capsys) for run, more in (("run", ["--dtype=float32"]), ("onnx", []))]
    assert [status for status, _, _ in outs] == [0, 0] and outs[0][1] == outs[1][1]


def test_resuming_gives_what_one_run_gives(tmp_path, monkeypatch, capsys):
    more = [*ENC, "--tokens=variance", "--eval_interval=2"]
    run_of([*more, "--out=whole", "--max_iters=4"], monkeypatch, capsys)
    run_of([*more, "--out=half", "--max_iters=4"], monkeypatch, capsys)
    import shutil
    shutil.rmtree("half")
    real = vision.Seeing.loss_of

    def stop_at(self, model, batch):
        stop_at.n += 1
        if stop_at.n == 3:
            os.kill(os.getpid(), 15)
        return real(self, model, batch)
    stop_at.n = 0
    monkeypatch.setattr(vision.Seeing, "loss_of", stop_at)
    assert call(vision.main, [*more, "--out=half", "--max_iters=4"], monkeypatch, capsys)[0] == 128 + 15
    monkeypatch.setattr(vision.Seeing, "loss_of", real)
    run_of(["--init_from=resume", "--out=half"], monkeypatch, capsys)
    one, two = (VisionLM.load(folder, "model.safetensors").state_dict() for folder in ("whole", "half"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_stages(tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=24, patch_size=8)).save_pretrained("clip")
    plain = [word for word in ENC if not word.startswith(("--image_size", "--patch", "--tower_layers"))]
    import train
    with open("words.txt", "w") as f:
        f.write("some words to read " * 300)
    text = [word for word in plain if word not in ("--src_len=160", "--tgt_len=64")]
    assert call(train.main, [*text, "--data=words.txt", "--src_len=32", "--tgt_len=16", "--max_iters=2", "--out=text"], monkeypatch, capsys)[0] == 0
    sizes = ("--arch", "--n_enc", "--n_dec", "--n_embd", "--n_head", "--n_kv_head", "--head_dim", "--n_hidden", "--tokenizer")
    going_on = [word for word in plain if not word.startswith(sizes)]
    run_of([*going_on, "--init_from=text", "--vision=hf:clip", "--stage=align", "--max_iters=2", "--out=align"], monkeypatch, capsys)
    before, after = Transformer.load("text", "model.safetensors").state_dict(), VisionLM.load("align", "model.safetensors")
    assert all(torch.equal(p, after.state_dict()[name]) for name, p in before.items())  # align leaves the language model alone ...
    fresh = Tower(after.vision)
    fresh.load_state_dict(foreign_tower("clip")[1])
    assert all(torch.equal(p, after.tower.state_dict()[name]) for name, p in fresh.state_dict().items())  # ... and the tower
    assert after.vision.from_file
    run_of([*going_on, "--init_from=align", "--stage=instruct", "--max_iters=2", "--out=instruct"], monkeypatch, capsys)
    last = VisionLM.load("instruct", "model.safetensors").state_dict()
    moved = {name for name, p in after.state_dict().items() if not torch.equal(p, last[name])}
    assert not any(name.startswith("tower") for name in moved) and {"projector.up.weight", "embed.weight", "enc.0.attn.wq.weight"} <= moved


def few_pictures_elsewhere(tmp_path, monkeypatch):
    """For processes that a test starts."""
    (tmp_path / "sitecustomize.py").write_text("import data.pictures\ndata.pictures.SIZES = dict(shapes=(24, 6, 6), docs=(24, 6, 6), charts=(4, 2, 2))\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")


def test_two_processes_equal_one(tmp_path, monkeypatch, capsys):
    words = [word for word in ENC if not word.startswith("--batch_size")] + ["--data=docs", "--max_iters=3", "--eval_interval=10"]
    run_of([*words, "--batch_size=4", "--out=one"], monkeypatch, capsys)
    few_pictures_elsewhere(tmp_path, monkeypatch)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", os.path.join(ROOT, "vision.py"), *words, "--batch_size=2", "--out=two",
                           "--threads=1"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = ([row["loss"] for row in map(json.loads, open(f"{name}/log.jsonl")) if "loss" in row] for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-4)


def test_compare_trains_both_kinds(tmp_path, monkeypatch, capsys):
    words = " ".join(word for word in TINY if not word.startswith(("--device", "--n_dec", "--n_enc")))
    few_pictures_elsewhere(tmp_path, monkeypatch)
    args = ["compare", "--data=shapes", "--archs=dec,2/3", "--seeds=1", "--max_minutes=0.001", f"--train={words}", "--results=r.jsonl"]
    status, out, err = call(bench.main, args, monkeypatch, capsys)
    assert status == 0, err
    rows = [json.loads(line) for line in open("r.jsonl")]
    assert [row["arch"] for row in rows] == ["dec", "2/3"] and all("blank" in row for row in rows) and "blank" in out


# ---------------------------------------------------------------------------------------------------------------------
# Distillation

def distilled(monkeypatch, capsys, *words):
    own = [word for word in TINY if word.startswith(("--batch_size", "--eval_rows", "--warmup", "--compile", "--dtype", "--device"))]
    return call(distill.main, [*own, *words], monkeypatch, capsys)


@pytest.mark.parametrize("student", [ENC, DEC])
def test_a_teacher_with_eyes(student, tmp_path, monkeypatch, capsys):
    run_of([*DEC, "--out=teacher", "--max_iters=2", "--grid=0"], monkeypatch, capsys)  # it sees the thumbnail alone, its student tiles too
    run_of([*student, "--out=student", "--max_iters=2"], monkeypatch, capsys)
    for sequences in ("student", "teacher", "data"):
        status, _, err = distilled(monkeypatch, capsys, "--teacher=teacher", "--student=student", "--data=shapes", f"--sequences={sequences}", "--max_iters=2", f"--out=of-{sequences}")
        assert status == 0, err
        log = [json.loads(line) for line in open(f"of-{sequences}/log.jsonl")]
        assert [row["divergence"] > 0 for row in log if "divergence" in row] == [True, True]
        assert VisionLM.load(f"of-{sequences}").vision.grid == 3
    status, _, err = distilled(monkeypatch, capsys, "--teacher=teacher", "--student=nano", "--data=shapes", "--out=no")
    assert status == 2 and "--student=RUN" in one_line(err)


def test_a_model_with_eyes_does_not_diverge_from_itself(tmp_path, monkeypatch, capsys):
    run_of([*DEC, "--out=one", "--max_iters=3", "--data=docs", "--lr=0.02"], monkeypatch, capsys)
    for sequences in ("student", "data"):
        more = ["--top=0"] if sequences == "data" else []
        status, _, err = distilled(monkeypatch, capsys, "--teacher=one", "--student=one", "--data=docs", f"--sequences={sequences}", "--alpha=1", "--max_iters=1", f"--out=of-{sequences}", *more)
        assert status == 0, err
        assert abs([json.loads(line) for line in open(f"of-{sequences}/log.jsonl")][1]["divergence"]) < 1e-5


def test_a_foreign_teacher_with_eyes(tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer as Foreign
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    text = Foreign(models.BPE())
    text.pre_tokenizer, text.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text.train_from_iterator(["one two three red blue circles at the top"], trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>", "<image>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=text, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    processor = transformers.LlavaProcessor(CLIPImageProcessorPil(size=dict(shortest_edge=24), crop_size=dict(height=24, width=24)), fast, patch_size=8,
                                            vision_feature_select_strategy="default", num_additional_image_tokens=1)
    torch.manual_seed(0)
    vision_config = transformers.CLIPVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=24, patch_size=8)
    text_config = transformers.LlamaConfig(vocab_size=text.get_vocab_size(), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=256)
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(vision_config=vision_config, text_config=text_config, image_token_index=text.token_to_id("<image>")))
    model.save_pretrained("llava")
    processor.save_pretrained("llava")
    own = [word for word in ENC if not word.startswith("--tokenizer")]
    import distill as distilling
    teacher = distilling.ForeignSeeingTeacher("llava", None, distilling.train.World(vision.Settings(device="cpu", dtype="float32", max_iters=1)))
    run_of([*own, f"--tokenizer={distilling.tokenizer_file(teacher.text)}", "--out=student", "--max_iters=1"], monkeypatch, capsys)
    for sequences in ("student", "teacher", "data"):
        status, _, err = distilled(monkeypatch, capsys, "--teacher=hf:llava", "--student=student", "--data=shapes", f"--sequences={sequences}", "--max_iters=1", f"--out=of-{sequences}")
        assert status == 0, err
        assert [json.loads(line) for line in open(f"of-{sequences}/log.jsonl")][1]["divergence"] > 0
    # What it reads at an answer is what the model itself says, given the same picture and text.
    row = rows_of_picture("shapes", "train", 3)[0]
    pairs = picture_tasks.PicturePairs([row], teacher.tokenizer, 160, 64, False, VisionConfig(**SMALL))
    look = teacher.sees([0], pairs)
    answer = teacher.tokenizer.encode(row["target"])
    found = teacher.head(teacher.read(teacher.prompts([row["source"]], pairs), [answer], **look))
    ids = torch.cat((look["inputs"]["input_ids"], torch.tensor([answer])), 1)
    whole = model.eval()(input_ids=ids, pixel_values=look["inputs"]["pixel_values"]).logits[0]
    start = look["inputs"]["input_ids"].size(1)
    assert torch.allclose(found, whole[start - 1:-1], atol=1e-4) and len(found) == len(answer)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input

@pytest.mark.parametrize("words, said", [
    (["--keep=0", "--tokens=variance"], "--keep=0"), (["--keep=0.5"], "--keep=0.5"), (["--stage=align"], "--init_from"), (["--vision=huge"], "--vision=huge"),
    (["--data=nothing.jsonl"], "nothing.jsonl"), (["--data=shapes:folder"], "no path"), (["--patch=7"], "multiple"), (["--tokens=concat", "--keep=0.5"], "--keep"),
    (["--arch=dec", "--look=encoder"], "--look"), (["--variance_of=features"], "--variance_of"), (["--grid=-1"], "--grid"), (["--src_len=5"], "--src_len=5"), (["--vision=hf:./no"], "no such folder")])
def test_bad_keys(words, said, monkeypatch, capsys):
    own = [word for word in ENC if word.split("=")[0] not in [w.split("=")[0] for w in words] and not word.startswith(("--arch", "--n_enc"))]
    own = [word for word in own if not word.startswith(("--image_size", "--patch", "--tower_layers")) or "--vision=hf:./no" not in words]
    status, _, err = call(vision.main, [*own, *words, "--max_iters=1", "--out=run"], monkeypatch, capsys)
    assert status == 2 and said in one_line(err) and not os.path.exists("run")


def test_bad_prompts(tmp_path, monkeypatch, capsys):
    run_of([*ENC, "--out=run", "--max_iters=1"], monkeypatch, capsys)
    noise(20, 20).save("p.png")
    (tmp_path / "bad.png").write_bytes(b"nothing")
    for size in ((1, 1), (20000, 2), (2, 3000)):
        noise(*size).save("odd.png")
        assert call(sample.main, ["--run=run", "--image=odd.png", "--prompt=x", "--max_new_tokens=2"], monkeypatch, capsys)[0] == 0
    for words, said in ((["--image=p.png", "--prompt=<image> <image>"], "2 <image>"), (["--image=p.png,p.png", "--prompt=<image>"], "names 2"), (["--prompt=<image>?"], "names 0"),
                        (["--image=bad.png", "--prompt=x"], "no picture"), (["--image=none.png", "--prompt=x"], "no such file"), (["--prompt=x", "--show_tokens=x.png"], "--show_tokens")):
        status, _, err = call(sample.main, ["--run=run", *words], monkeypatch, capsys)
        assert status == 2 and said in one_line(err), (words, err)
    with open("words.txt", "w") as f:
        f.write("some words to read " * 300)
    import train
    from conftest import TINY_ENC
    assert call(train.main, [*TINY_ENC, "--data=words.txt", "--max_iters=1", "--out=text"], monkeypatch, capsys)[0] == 0
    status, _, err = call(sample.main, ["--run=text", "--image=p.png", "--prompt=x"], monkeypatch, capsys)
    assert status == 2 and "without pictures" in one_line(err)


def test_a_picture_that_breaks_in_the_middle_of_training(tmp_path, monkeypatch, capsys):
    buffer = io.BytesIO()
    noise(40, 40).save(buffer, "PNG")
    (tmp_path / "bad.png").write_bytes(buffer.getvalue()[:len(buffer.getvalue()) // 2])  # its header is whole
    for n in range(30):
        noise(40, 40, n).save(f"{n}.png")
    with open("rows.jsonl", "w") as f:
        for n in range(30):
            f.write(json.dumps(dict(image="bad.png" if n == 3 else f"{n}.png", source="x", target="y")) + "\n")
    words = [*ENC, "--data=rows.jsonl", "--max_iters=4", "--batch_size=32"]
    status, _, err = call(vision.main, [*words, "--out=a"], monkeypatch, capsys)
    assert status == 2 and "cut off" in one_line(err)
    status, _, err = call(vision.main, [*words, "--out=b", "--skip_bad"], monkeypatch, capsys)
    assert status == 0, err
