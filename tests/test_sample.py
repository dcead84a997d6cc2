"""sample.py: prompts, holes, streaming, beams, attention, a race, what a user can get wrong."""

import io
import itertools
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call, one_line
from PIL import Image
from test_model import tiny

import sample
from data.images import VisionConfig
from data.objectives import make_prompt
from data.tokenizer import Tokenizer
from lib.attention import draw
from lib.runs import newest_run
from model import Config, Transformer
from sample import beam_search, text_of
from vision import VisionLM

BYTES = Tokenizer("bytes")


@pytest.fixture
def talk(monkeypatch, capsys):
    return lambda *argv: call(sample.main, argv, monkeypatch, capsys)


def make_run(folder, objective, arch="encdec", vision=None):
    torch.manual_seed(0)
    layers = dict(n_enc=1, n_dec=1) if arch == "encdec" else dict(n_enc=0, src_len=0, n_dec=2)
    shape = dict(n_embd=32, n_head=2, n_kv_head=1, head_dim=16, n_hidden=32)
    ids = dict(vocab_size=BYTES.vocab_size, pad_id=BYTES.pad, bos_id=BYTES.bos, eos_id=BYTES.eos)
    config = Config(**layers, **shape, **ids)
    (VisionLM(config, vision) if vision else Transformer(config)).save(folder)
    BYTES.save(folder)
    Path(folder, "run.json").write_text(json.dumps(dict(settings=dict(objective=objective))))


# An answer, its digits standing for sentinels; its text so far; its text when it is done.
HOLES = [("0xy1z", "axybz", "axybzc"), ("0xy", "axy", "axyb<mask>c"), ("", "", "a<mask>b<mask>c")]
HOLES += [("1z", "a<mask>bz", "a<mask>bzc"), ("1z0xy", "axybz", "axybzc")]


@pytest.mark.parametrize("answer, so_far, done", HOLES)
def test_holes_are_filled_as_they_come(answer, so_far, done):
    prompt = make_prompt("span", "a<mask>b<mask>c", BYTES, False)
    talk = SimpleNamespace(tokenizer=BYTES, prompt=prompt, objective="span")
    ids = [BYTES.sentinel(int(x)) if x.isdigit() else ord(x) for x in answer]
    assert (text_of(talk, ids, done=False), text_of(talk, ids)) == (so_far, done)


def test_streamed_characters_are_never_cut_and_control_characters_are_shown(capsys):
    talk, shown = SimpleNamespace(tokenizer=BYTES, prompt=[], objective="causal"), ""
    ids = list("größer 🙂\x1b[2J".encode())
    for n in range(1, len(ids) + 1):
        shown = sample.show(text_of(talk, ids[:n], done=n == len(ids)), shown)
    assert capsys.readouterr().out == "größer 🙂\\x1b[2J"


@pytest.mark.parametrize("run", "encdec-span encdec-prefix dec-causal dec-span encdec-ul2".split())
def test_every_kind_of_run_talks(talk, run):
    arch, objective = run.split("-")
    make_run("out/a", objective, arch)
    for options in ("", "--beams=3", "--num_samples=2 --temperature=1 --top_k=5 --top_p=0.9"):
        words = ["--prompt=x = <mask>\\ny", "--max_new_tokens=5", *options.split()]
        status, out, err = talk(*words)
        assert status == 0 and "x = " in out, err


def test_the_newest_run_and_standard_input(talk, monkeypatch):
    make_run("out/old", "causal", "dec")
    make_run("out/new", "causal", "dec")
    os.utime("out/old/model.safetensors", (1, 1))
    assert newest_run() == os.path.join("out", "new")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from a pipe")))
    assert talk("--max_new_tokens=2")[1].startswith("from a pipe")


def test_one_beam_is_greedy_and_all_beams_find_the_best():
    model, prompt = tiny("encdec", vocab_size=6, pad_id=0, bos_id=1, eos_id=2), [3, 4, 5, 3]
    greedy = [step[0] for step in model.generate([prompt], 4)]
    assert beam_search(model, prompt, 1, 4)[: len(greedy)] == greedy
    encoded, best = model.encode(torch.tensor([prompt])), (-1e9, None)
    answers = [x for n in range(1, 4) for x in itertools.product([0, 1, 3, 4, 5], repeat=n)]
    for answer in answers:  # every answer of up to three tokens, scored by the full model
        states, n = model.decode(torch.tensor([[1, *answer]]), encoded), len(answer)
        logp = model.logits(states)[0].log_softmax(-1)
        score = sum(logp[t, id] for t, id in enumerate([*answer, 2][:3]))
        best = max(best, (score / min(n + 1, 3) ** 0.6, answer), key=lambda pair: pair[0])
    assert tuple(beam_search(model, prompt, 6**3, 3)) == best[1]


def test_a_beam_without_an_end_does_not_win_over_ended_ones():
    """[] has 0.3 and [a] 0.6 * 0.2: the search stops; an unended [a] is no answer."""
    table = torch.full((10, 9), 0.0125)  # by the last token, the start in the last row; 0 ends
    table[1], table[2, 0] = torch.tensor([0.2] + 8 * [0.1]), 0.9
    table[-1, :3] = torch.tensor([0.3, 0.6, 0.05])

    class Chain:
        config = SimpleNamespace(eos_id=0)

        def prefill(self, prompts, n):
            return SimpleNamespace(select=lambda rows: None), torch.tensor([[9]])

        def next_logits(self, states):
            return (table / table.sum(1, keepdim=True)).log()[states[:, 0]]

        def decode(self, tokens, cache):
            return tokens

    assert beam_search(Chain(), [5], 2, 6) == []


BAD = {"--run=nowhere": "nowhere", "--max_new_tokens=0": "--max_new_tokens", "--race": "takes TEXT"}
BAD |= {"--num_samples=2": "--temperature", "--beams=2 --temperature=1": "one of them"}
BAD |= {"--device=cuda:99": "--device", "--temprature=1": "did you mean --temperature?"}
BAD |= {"--race=out/a --beams=2": "--race", "--show_attention=a.gif": ".html or .png"}
BAD |= {"--image=a.png": "without pictures", "--run=out/half": "model.safetensors is missing"}


@pytest.mark.parametrize("words", BAD)
def test_bad_input(talk, words):
    status, _, err = talk("--prompt=x")
    assert status == 2 and "no run in out/" in one_line(err)
    make_run("out/half", "span")
    os.remove("out/half/model.safetensors")
    make_run("out/a", "causal", "dec")
    status, _, err = talk("--prompt=x", *words.split())
    assert status == 2 and BAD[words] in one_line(err)


def test_a_task_run_prints_its_answer_alone(talk):
    make_run("out/a", "seq2seq")
    assert make_prompt("seq2seq", "ab", BYTES, False) == [97, 98, BYTES.eos]
    assert make_prompt("seq2seq", "ab", BYTES, True) == [97, 98, BYTES.eos, BYTES.sep]
    outs = [talk(f"--prompt={text}", "--max_new_tokens=4")[1] for text in ("q", " q \\n")]
    assert outs[0] == outs[1] and "q" not in outs[0]


@pytest.mark.parametrize("arch, bos", [("encdec", 1), ("dec", 1), ("dec", -1)])
def test_attention_is_what_the_model_computes(arch, bos):
    """The kernel that keeps its weights gives the same states."""
    source, answer = [5, 6, 7, 8, 9], [10, 11, 12]
    model = tiny(arch, cross_rope=arch == "encdec", bos_id=bos)
    both = torch.tensor([(arch == "dec") * source + answer])
    before = model.logits(model.states(torch.tensor([source]), both))[0, -3:].softmax(-1)
    weights, probs = sample.attention_weights(model, source, answer)
    assert np.allclose(probs, before.detach().numpy(), atol=1e-5)
    assert weights.shape == (model.config.n_dec, model.config.n_head, 3, 5) and weights.all()
    # Decoder-only, what predicts the first token sees the prompt and, where there is one, bos.
    all_of_it = np.isclose(weights.sum(-1), 1, atol=1e-5).all((0, 1)).tolist()
    assert all_of_it == [arch == "encdec" or bos < 0] + 2 * [arch == "encdec"]


@pytest.mark.parametrize("arch, tokens", [("encdec", "learned"), ("dec", "all")])
def test_pictures_are_read_and_shown(talk, arch, tokens):
    shape = dict(n_layer=1, n_embd=16, n_head=2, n_hidden=16, tokens=tokens)
    vision = VisionConfig(image_size=16, patch=8, grid=2, image_id=BYTES.image, **shape)
    make_run("out/a", "seq2seq", arch, vision)
    Image.new("RGB", (30, 20), "red").save("red.png")
    words = ["--prompt=What?", "--image=red.png", "--max_new_tokens=4"]
    status, first, err = talk(*words, "--show_attention=a.html", "--show_tokens=tokens.png")
    assert status == 0 and Image.open("tokens.png").size == (32, 21), err
    assert talk(*words, "--beams=2")[0] == 0
    drawn = [talk(*words, "--temperature=9", f"--seed={seed}")[1] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and first not in drawn
    status, out, _ = talk(*words, "--num_samples=2", "--temperature=1")
    assert status == 0 and out.count("-" * 80) == 2
    data = page_data("a.html")
    n = len(data["pictures"][0]["order"])
    assert n == sum(data["source"][i] == ["<image>", True] for i in range(n)) > 8
    assert data["decoder_only"] == (arch == "dec")
    status, _, err = talk(*words, "--prompt=<image><image>")
    assert status == 2 and "2 <image>" in one_line(err)


def page_data(path):
    page = Path(path).read_text("utf-8")
    return json.loads(page.split('<script type="application/json" id="data">')[1].split("</s")[0])


def test_a_page_is_no_door_for_its_text():
    text = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
    source, answer = list(text.encode()), list(b"abc")
    weights, probs = np.ones((2, 2, 3, len(source))), np.ones((3, BYTES.vocab_size))
    draw("a.html", weights, probs, source, answer, BYTES, run=text, decoder_only=0, pictures=[])
    page = Path("a.html").read_text("utf-8")
    assert "<script>window" not in page and "<img src=x" not in page
    assert page_data("a.html")["run"] == text


def test_a_race(talk):
    make_run("out/a", "span")
    make_run("out/b", "causal", "dec")
    words = ["--run=out/a", "--race=out/b", "--prompt=x<mask>y", "--max_new_tokens=6"]
    status, out, err = talk(*words)
    assert status == 0 and out.index("out/a") < out.index("out/b") and "\x1b" not in out, err
    assert out.count(" tokens/s, ") == 2
    assert out.endswith(talk("--run=out/b", *words[2:])[1])
