"""Pictures: opening and cutting them, the tower beside transformers' own, the model that sees, its
data, its training."""

import json
import os
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
import transformers
from conftest import TINY_ENC, call, log_rows, one_line
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import data.pictures
import export
import train
import vision
from data import images, picture_tasks
from data.images import MARKER, VisionConfig, n_tokens, open_image, prepare_image, token_order
from data.pictures import drawn_from, rows_of_picture
from data.sets import IMAGE, evenly
from data.tokenizer import Tokenizer
from lib.device import start
from lib.settings import UserError, read_json
from model import Config, make_config
from vision import Tower, VisionLM, foreign_tower

SMALL = dict(image_size=24, patch=8, n_layer=1, n_embd=16, n_head=2, n_hidden=24)
TINY = ["--preset=tiny", "--tokenizer=bytes", "--src_len=96", "--tgt_len=24", "--batch_size=4"]
TINY += ["--eval_rows=4", "--warmup_iters=2", "--compile=false", "--dtype=float32", "--device=cpu"]
NEW = [*TINY, "--image_size=24", "--patch=8", "--grid=2"]
CLIP = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)
CLIP |= dict(image_size=24, patch_size=8)


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    monkeypatch.setattr(data.pictures, "SIZES", dict.fromkeys(data.pictures.SIZES, (20, 6, 6)))
    tiny = dict(n_layer=1, n_embd=32, n_head=2, n_hidden=48, image_size=96, patch=16)
    monkeypatch.setitem(vision.TOWERS, "tiny", tiny)


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def small_model(decoder_only=False, spread=0.8, **changes):
    torch.manual_seed(0)
    shape = dict(n_enc=0, src_len=0) if decoder_only else dict(n_enc=2, src_len=256)
    heads = dict(n_embd=32, n_head=2, n_kv_head=1, head_dim=16, n_hidden=48)
    text = Config(vocab_size=40, n_dec=2, tgt_len=256, **heads, **shape)
    model = VisionLM(text, VisionConfig(**SMALL | changes, image_id=5)).eval()
    for p in model.parameters():
        p.data += spread * torch.randn_like(p)  # a wrong mask changes answers
    return model


def prompt_of(pictures, cfg):
    places = sum(n_tokens(*picture.size, cfg) for picture in pictures)
    return [7, 8, *[5] * places, 9, 10, 11]


# ----------------------------------------------------------------------------------------------
# Files


def test_every_kind_of_picture_opens_in_rgb():
    red, half = Image.new("RGB", (4, 3), (255, 0, 0)), Image.new("RGBA", (4, 3), (0, 0, 0, 0))
    half.paste((255, 0, 0, 255), (0, 0, 2, 3))
    cases = {"a.gif": red.convert("P"), "b.jpg": red.convert("CMYK"), "c.png": half}
    cases["grey.png"] = Image.fromarray(np.full((3, 4), 32768, np.uint16))
    cases["grey.tiff"] = Image.fromarray(np.full((3, 4), 0.5, np.float32))
    for name, image in cases.items():
        image.save(name)
        pixels = np.asarray(open_image(name)).astype(int)
        colour = (128, 128, 128) if "grey" in name else (255, 0, 0)
        assert pixels.shape == (3, 4, 3) and np.abs(pixels[:, 0] - colour).max() <= 3, name
    assert open_image("c.png").getpixel((3, 1)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    noise(6, 3).save("r.jpg", exif=exif)
    assert open_image("r.jpg").size == (3, 6) == picture_tasks.size_of("r.jpg", "it")


def test_pictures_that_cannot_be_used_are_named(tmp_path):
    noise(40, 40).save("cut.png")
    os.truncate("cut.png", 2000)
    os.mkfifo("pipe")  # nobody writes into it
    (tmp_path / "empty").write_bytes(b"")
    for name in ("cut.png", "pipe", "empty"):
        with pytest.raises(UserError, match=f"^{name} cannot be read as a picture: .+$"):
            open_image(name)


# ----------------------------------------------------------------------------------------------
# Tiles and tokens


def test_pixels_are_those_of_clips_own_processor():
    sides = dict(size=dict(shortest_edge=48), crop_size=dict(height=48, width=48))
    theirs, cfg = CLIPImageProcessorPil(**sides), VisionConfig(**SMALL | dict(image_size=48))
    for picture in (noise(100, 100), noise(20, 20)):
        [expected] = theirs(picture, do_normalize=False, return_tensors="np")["pixel_values"]
        ours = prepare_image(picture, cfg).tiles[0] / 255
        assert np.abs(expected.transpose(1, 2, 0) - ours).max() <= 1 / 255 + 1e-6


GRIDS = {(24, 24): (0, 0), (25, 24): (1, 2), (40, 72): (3, 2), (60, 50): (3, 3), (999, 2): (1, 3)}


def test_the_grid_shows_the_most_and_wastes_the_least():
    for size, grid in GRIDS.items():
        assert images.layout(*size, VisionConfig(**SMALL)).grid == grid, size


WAYS = [("all", 0.33), ("variance", 0.33), ("variance", 1.0), ("learned", 0.1), ("concat", 0.33)]


@pytest.mark.parametrize("tokens, keep", WAYS)
def test_the_number_of_tokens_is_known_before_and_their_order_is_that_of_reading(tokens, keep):
    cfg, rng = VisionConfig(**SMALL, tokens=tokens, keep=keep), np.random.default_rng(0)
    n = 9 // cfg.joined  # tokens of the thumbnail
    for size in [(24, 24), (1, 1), (400, 2), *rng.integers(1, 120, (15, 2)).tolist()]:
        at = images.layout(*size, cfg)
        order = token_order(at, cfg, rng.random(at.grid[0] * at.grid[1]))
        assert len(order) == n_tokens(*size, cfg)
        assert (order == MARKER).sum() == at.rows and (order[:n] == np.arange(n)).all()
        places = images.token_places(at, cfg).reshape(-1).tolist()
        places = [places.index(k) for k in order[n:] if k != MARKER]
        assert places == sorted(set(places))


def test_every_token_is_that_of_its_place():
    canvas = np.asarray(noise(9, 6)).repeat(8, 0).repeat(8, 1)  # each patch has a colour
    picture = prepare_image(Image.fromarray(canvas), VisionConfig(**SMALL))
    patches = picture.tiles.reshape(7, 3, 8, 3, 8, 3)[:, :, 0, :, 0].reshape(-1, 3)
    rows = token_order(picture.at, VisionConfig(**SMALL))[9:].reshape(6, 10)
    assert np.array_equal(patches[rows[:, :-1]], noise(9, 6)) and (rows[:, -1] == MARKER).all()


@pytest.mark.parametrize("tokens", ["variance", "learned"])
def test_the_tiles_that_are_read_have_the_highest_scores(tokens):
    """Beside numpy: tiles are chosen, go through the tower, and are weighed by the gate."""
    model = small_model(spread=0.2, tokens=tokens)
    cfg, tiles = model.vision, np.asarray(noise(24, 216)).reshape(3, 3, 24, 24, 3)
    tiles = tiles % np.uint8([3, 90, 5, 60, 1, 2, 50, 4, 9]).reshape(3, 3, 1, 1, 1)
    picture = prepare_image(Image.fromarray(tiles.swapaxes(1, 2).reshape(72, 72, 3)), cfg)
    grey = ((picture.tiles / 255 - cfg.mean) / cfg.std).mean(-1)  # (10, 24, 24)
    scores, gates = grey.std((1, 2)), torch.full((10,), 0.5)
    if tokens == "learned":
        gates = model.gating(torch.tensor(grey / 24).float().flatten(1)).sigmoid()[:, 0]
        scores = gates.detach().numpy()
    kept = np.argsort(scores[1:])[-3:] + 1
    assert tokens == "learned" or set(kept) == {2, 4, 7}
    seen, [order] = model.see([picture])
    places = order[order != MARKER]
    assert set(places // 9) == {0, *kept} and len(seen) == 4 * 9 + 9 == n_tokens(72, 72, cfg)
    expected = model.projector(model.tower(torch.from_numpy(picture.tiles)))
    expected = (expected * 2 * gates[:, None, None]).flatten(0, 1)[places]
    assert (seen[order != MARKER] - expected).abs().max() < 1e-4
    if tokens == "learned":  # in training some are drawn, and the gate has a gradient
        made = [model.train().tokens_of([picture]) for _ in range(8)]
        assert len({order.tobytes() for _, [order] in made}) > 2
        prompt = torch.tensor([prompt_of([picture], cfg)])
        model(prompt, torch.tensor([[7, 8, 2]]), images=made[0][0]).backward()
        assert all(p.grad.abs().max() > 1e-6 for p in model.gating.parameters())


# ----------------------------------------------------------------------------------------------
# The tower


@pytest.mark.parametrize("kind, size, patch", [("CLIP", 32, 8), ("Siglip", 48, 16)])
def test_the_tower_is_that_of_transformers(tmp_path, kind, size, patch):
    torch.manual_seed(0)
    shape = CLIP | dict(hidden_size=32, image_size=size, patch_size=patch)
    config = getattr(transformers, f"{kind}VisionConfig")(**shape)
    theirs = getattr(transformers, f"{kind}VisionModel")(config).eval()
    for p in theirs.parameters():
        p.data += 0.1 * torch.randn_like(p)
    theirs.save_pretrained(tmp_path)
    cfg, weights = foreign_tower(str(tmp_path))
    ours = Tower(cfg)
    ours.load_state_dict(weights)
    tiles = torch.from_numpy(np.stack([noise(size, size, seed) for seed in range(2)]))
    pixels = (tiles / 255 - torch.tensor(cfg.mean)) / torch.tensor(cfg.std)
    with torch.no_grad():
        states = theirs(pixels.permute(0, 3, 1, 2), output_hidden_states=True).hidden_states
        features = ours(tiles)
    expected = states[-2][:, -((size // patch) ** 2) :]
    assert cfg.n_layer == 2 and (features - expected).abs().max() < 1e-4
    save_file({"vision_model.other": torch.zeros(2)}, str(tmp_path / "model.safetensors"))
    with pytest.raises(UserError, match="hf:.* embeddings.* is missing"):
        foreign_tower(str(tmp_path))


def test_the_papers_tower_has_the_shapes_of_its_file(tmp_path, monkeypatch):
    shape = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24)
    shape |= dict(num_attention_heads=16, image_size=336, patch_size=14)
    (tmp_path / "config.json").write_text(json.dumps(dict(vision_config=shape)))
    with torch.device("meta"):
        theirs = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**shape)).state_dict()
    zeros = {name: torch.zeros(()).expand(p.shape) for name, p in theirs.items()}
    monkeypatch.setattr(vision, "read_weights", lambda *_: zeros)
    large, _ = foreign_tower(str(tmp_path))
    assert large == VisionConfig(**vision.TOWERS["large"], from_file=True)


# ----------------------------------------------------------------------------------------------
# The model


KINDS = [(False, "none", "all"), (True, "none", "concat"), (False, "encoder", "variance")]
KINDS += [(False, "decoder", "learned"), (True, "decoder", "all")]


@pytest.mark.parametrize("decoder_only, look, tokens", KINDS)
def test_a_row_alone_is_a_row_in_a_batch_is_a_cached_one(decoder_only, look, tokens):
    model = small_model(decoder_only, look=look, tokens=tokens)
    cfg = model.vision
    pictures = [prepare_image(noise(*size), cfg) for size in ((50, 30), (20, 20), (30, 60))]
    shown = [pictures[:1], [], pictures[1:]]
    prompts = [prompt_of(pictures, cfg) for pictures in shown]
    together = list(model.generate(prompts, 6, images=model.see(pictures)[0]))
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


def test_of_several_pictures_each_has_its_own_tiles():
    model = small_model(tokens="learned")
    pictures = [prepare_image(noise(72, 72, seed), model.vision) for seed in range(4)]
    alone = torch.cat([model.see([picture])[0] for picture in pictures])
    assert torch.allclose(model.see(pictures)[0], alone, rtol=1e-4, atol=1e-3)


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
    model.look_at(images[:9])
    with pytest.raises(UserError, match="18 placeholders, 9 tokens"):
        model.encode(prompt)


@pytest.mark.parametrize("arch, look", [("encdec", "encoder"), ("dec", "decoder")])
def test_looking_changes_nothing_at_first_and_costs_no_parameters(arch, look):
    plain = small_model(arch == "dec", spread=0.2)
    model = VisionLM(plain.config, replace(plain.vision, look=look))
    model.load_state_dict(model.state_dict() | plain.state_dict())
    picture = prepare_image(noise(30, 20), plain.vision)
    ids = torch.tensor([prompt_of([picture], plain.vision)])
    pair = (ids, ids[:, -3:]) if arch == "encdec" else (None, ids)
    losses = [m(*pair, images=m.see([picture])[0]) for m in (plain, model)]
    losses[1].backward()
    assert losses[0] == losses[1]
    assert all(block.look_gates.grad.abs().min() > 0 for block in model.looking)
    config, kinds = make_config("nano", arch), (plain.vision, model.vision)
    one, two = (VisionLM(vision.equalised(config, kind), kind).num_params() for kind in kinds)
    assert one != two == pytest.approx(one, rel=0.01)


# ----------------------------------------------------------------------------------------------
# Data


def test_charts_have_the_answers_to_their_questions():
    kinds = set()
    for number in range(20):
        title, labels, values, colours = drawn_from("charts", "val", number)[1]
        for row in rows_of_picture("charts", "val", number):
            kinds.add(row["kind"])
            named = [label for label in row["source"].replace("?", "").split() if label in labels]
            i, j = (labels.index(label) for label in ([*named, *labels] * 2)[:2])
            expected = dict(title=title, largest=labels[values.index(max(values))])
            expected |= dict(value=values[i], colour=colours[i], difference=values[i] - values[j])
            assert row["target"].rpartition("=")[2].strip() == str(expected[row["kind"]])
    assert kinds == {"title", "largest", "value", "colour", "difference"}


def pairs_of(rows, src_len=200):
    cfg = VisionConfig(**SMALL)
    return picture_tasks.PicturePairs(rows, Tokenizer("bytes"), src_len, 8, False, cfg)


def test_pairs_never_cut_pictures_and_know_their_background():
    for n, colour in enumerate([(200, 100, 0), (200, 100, 0), (9, 9, 9)]):
        Image.new("RGB", (24, 24), colour).save(f"{n}.png")
    rows = [dict(source=IMAGE, target="x", images=[f"{n}.png"]) for n in range(3)]
    pairs, image = pairs_of(rows, src_len=10), Tokenizer("bytes").image
    with pytest.raises(UserError, match="row 1: --src_len has room for 7"):
        pairs_of(rows, src_len=8)
    pairs.vision.mean = pairs.background()
    for pairs.blank, colour in ((True, [200, 100, 0]), (False, [9, 9, 9])):
        assert pairs.pictures([2])[0].tiles[0, 3, 3].tolist() == colour
    noise(30, 24).save("0.png")
    with pytest.raises(UserError, match="0.png has changed"):
        pairs.pictures([0])
    both = dict(source=f"a{IMAGE}b{IMAGE}", target="x", images=["1.png", "2.png"])
    pairs = pairs_of([both, dict(source="c", target="x", images=[])])
    assert pairs.sources[0].tolist()[:-1] == [97, *[image] * 9, 98, *[image] * 9]
    assert pairs.sources[1].tolist()[:-1] == [99] and pairs.pictures([1]) == []


TALK = [("human", "<image>\nWho?"), ("gpt", "A dog."), ("user", "Where?"), ("assistant", "There.")]
TURNS = [{"from": who, "value": text} for who, text in TALK]
TALK_ROWS = [("<image>\nWho?", "A dog."), ("<image>\nWho?\nA dog.\nWhere?", "There.")]
RECORDS = [("llava-instruct", dict(conversations=TURNS), TALK_ROWS)]
RECORDS += [("textvqa", dict(question="A?", answers=["a", "b", "b"]), [("<image>A?", "b")])]
RECORDS += [("docvqa", dict(question="A?", answers=[dict(answer="c")]), [("<image>A?", "c")])]


@pytest.mark.parametrize("name, record, expected", RECORDS)
def test_records_of_the_published_data_sets(name, record, expected):
    rows = picture_tasks.TASKS[name].read(dict(image="1.png") | record)
    assert [(row["source"], row["target"]) for row in rows] == expected


def test_of_turns_beyond_the_limit_the_last_question_stays(tmp_path):
    noise(20, 20).save("1.png")
    turns = [*TURNS[:2], {"from": "human", "value": "Where? " * 9 + "Last?"}, TURNS[3]]
    records = [dict(image="1.png", conversations=turns)] * 2  # of the four rows one is held out
    (tmp_path / "llava.json").write_text(json.dumps(records))
    pairs = pairs_of(picture_tasks.load_picture_task("llava-instruct:.").splits["val"], 40)
    source, image = pairs.sources[0].tolist(), pairs.tokenizer.image
    assert len(source) == 40 and source[:9] == [image] * 9
    assert pairs.tokenizer.decode(source).endswith("Where? Where? Last?")
    assert "cut: 1 sources, 0 targets" in pairs.describe()


def test_own_data_is_held_out_by_picture(tmp_path):
    rows = [dict(image=f"{n // 2}.png", source=str(n % 2), target="x") for n in range(80)]
    for n in range(40):
        noise(20 + n, 20, n).save(f"{n}.png")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    splits = picture_tasks.load_picture_task("./rows.jsonl").splits
    pictures, val = ({row["images"][0] for row in splits[s]} for s in ("train", "val"))
    assert len(pictures) == 38 and len(val) == 2 and not pictures & val
    (tmp_path / "bad.jsonl").write_text(json.dumps(rows[0] | dict(source="<image> <image>")))
    with pytest.raises(UserError, match="1 of 1 rows .* 2 <image> and it has 1 pictures"):
        picture_tasks.load_picture_task("./bad.jsonl")


def test_parquet_keeps_its_pictures():
    rows = [dict(image=noise(16 + n, 12, n), query=f"What {n}?", label=[str(n)]) for n in range(3)]
    for split in ("train", "val"):
        datasets.Dataset.from_list(rows).to_parquet(f"chartqa/{split}.parquet")
    row = picture_tasks.load_picture_task("chartqa:chartqa").splits["val"][2]
    assert (row["source"], row["target"]) == (f"{IMAGE}What 2?", "2")
    assert np.array_equal(open_image(row["images"][0].load()), rows[2]["image"])


# ----------------------------------------------------------------------------------------------
# Training


def run_of(words, monkeypatch, capsys):
    status, _, err = call(vision.main, words, monkeypatch, capsys)
    assert status == 0, err


WORDS = "--arch=dec --look=decoder --tokens=variance --data=docs", "--tokens=concat --data=charts"


@pytest.mark.parametrize("words", WORDS, ids=str)
def test_every_kind_trains(monkeypatch, capsys, words):
    own = [*NEW, *words.split(), "--out=run", "--max_iters=2", "--eval_interval=9"]
    run_of(own, monkeypatch, capsys)
    first, second = log_rows("run")
    assert second["loss"] < first["loss"] and log_rows("run", "blank_loss")
    assert "neither pictures" in call(export.main, ["--run=run"], monkeypatch, capsys)[2]


def test_accumulation_equals_a_larger_batch(monkeypatch, capsys):
    words = [*NEW, "--tokens=variance", "--max_iters=3", "--eval_interval=9"]
    run_of([*words, "--out=a"], monkeypatch, capsys)
    run_of([*words, "--batch_size=2", "--grad_accum=2", "--out=b"], monkeypatch, capsys)
    a, b = ([row["loss"] for row in log_rows(name)] for name in "ab")
    assert a == pytest.approx(b, rel=1e-4)


def test_an_evaluation_is_of_each_rows_own_picture_and_answer(monkeypatch, capsys):
    run_of([*NEW, "--max_iters=1", "--out=run"], monkeypatch, capsys)
    cfg = vision.Settings(**read_json("run/run.json")["settings"])
    model = VisionLM.load("run").eval()
    valid_set = picture_tasks.open_pictures(cfg, model.vision, str, 4)[1]
    pairs, n, wanted = valid_set.pairs, 0, [0.0, 0.0]

    def perfect(shown, pairs, rows, *_):
        seen = model.see(pairs.pictures(rows))[0]
        assert not pairs.blank and torch.equal(shown.generate.keywords["images"], seen)
        return [pairs.rows[row]["target"] for row in rows]

    monkeypatch.setattr(vision, "write_answers", perfect)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    found = vision.evaluate(model, valid_set, cfg, start(cfg), 1)
    for row in evenly(len(pairs.rows), cfg.eval_rows):
        batch = [torch.from_numpy(x) for x in pairs.batch([row])]
        n += batch[2].sum().item()
        for pairs.blank in (False, True):
            images = model.see(pairs.pictures([row]))[0]
            wanted[pairs.blank] += model.eval()(*batch, images).item()
    assert [found["val_loss"], found["blank_loss"]] == pytest.approx(np.divide(wanted, n), rel=1e-4)
    assert found["exact"] == 100 and abs(wanted[0] - wanted[1]) > 1e-2


def test_resuming_gives_what_one_run_gives(monkeypatch, capsys):
    words = [*NEW, "--tokens=learned", "--look=encoder", "--eval_interval=2", "--max_iters=4"]
    run_of([*words, "--out=whole"], monkeypatch, capsys)

    def stop_at_step_2(step, cfg):
        if step == 2:
            os.kill(os.getpid(), 15)
        return train.lr_share(step, cfg)

    monkeypatch.setattr(vision, "lr_share", stop_at_step_2)
    assert call(vision.main, [*words, "--out=part"], monkeypatch, capsys)[0] == 128 + 15
    run_of(["--init_from=resume", "--out=part"], monkeypatch, capsys)
    whole, part = (load_file(f"{name}/model.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(whole[name], part[name]) for name in whole)
    assert log_rows("whole", "step") == log_rows("part", "step")


def test_stages(text_file, monkeypatch, capsys):
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**CLIP)).save_pretrained("clip")
    words = [*TINY_ENC, f"--data={text_file}", "--max_iters=1", "--out=text"]
    assert call(train.main, words, monkeypatch, capsys)[0] == 0
    more = [*TINY[2:], "--data=shapes", "--max_iters=2", "--grid=2", "--eval_interval=9"]
    stages = dict(align="text --vision=hf:clip", instruct="align --look=encoder")
    stages |= dict(task="instruct --tower_lr=1e-4")
    for name, keys in stages.items():
        keys = [f"--stage={name}", f"--out={name}", *f"--init_from={keys}".split()]
        run_of([*more, *keys], monkeypatch, capsys)
    text, first, second, last = [load_file(f"{x}/model.safetensors") for x in ("text", *stages)]
    tower = {f"tower.{name}": p for name, p in foreign_tower("clip")[1].items()}
    assert all(torch.equal(p, first[name]) for name, p in (text | tower).items())
    moved = {name for name, p in first.items() if not torch.equal(p, second[name])}
    assert not moved & set(tower) and {"projector.0.weight", "enc.0.attn.wq.weight"} <= moved
    # AdamW moves a weight by about its rate.
    assert 5e-5 < max((second[name] - last[name]).abs().max() for name in tower) < 3e-4


BAD = [("--stage=align", "--init_from"), ("--vision=huge", "--vision=huge")]
BAD += [("--data=shapes:folder", "without a path"), ("--patch=7", "multiple")]
BAD += [("--arch=dec --look=encoder", "--look"), ("--tokens=concat --keep=0.25", "--keep")]
BAD += [("--vision=hf:./no --patch=8", "--patch is decided"), ("--src_len=5", "--src_len")]


@pytest.mark.parametrize("words, said", BAD)
def test_bad_keys(words, said, monkeypatch, capsys):
    own = [word for word in TINY[2:] if word.split("=")[0] not in words]
    words = [*own, *words.split(), "--max_iters=1", "--out=run"]
    status, _, err = call(vision.main, words, monkeypatch, capsys)
    assert status == 2 and said in one_line(err) and not os.path.exists("run")
