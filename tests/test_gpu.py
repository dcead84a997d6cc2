"""The GPU path without a GPU: waits, placement, attention's rules, memory, compiling."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import call, one_line
from softgpu import card  # noqa: F401  a fixture
from torch._dynamo.testing import CompileCounter

import data.corpus
import distill
import lib.runs
import model as M
import sample
import train
from lib.device import checkpoint_blocks, fast_attention, find_device, to_device, tune
from lib.settings import UserError, script
from model import Transformer, make_config

SHORT = ["--batch_size=4", "--compile=false", "--dtype=float32", "--max_iters=2"]
SHORT += ["--eval_interval=9", "--eval_rows=2"]
WORDS = SHORT + ["--preset=tiny", "--tokenizer=bytes", "--src_len=32", "--tgt_len=16"]


@pytest.fixture(scope="module")
def run(card, tmp_path_factory):  # noqa: F811
    """Runs a script's main on the card -> its waits, or those of the second training step alone."""
    add = lib.runs.Log.add

    def marked(log, row):
        card.extend(["step"] * ("loss" in row))
        add(log, row)

    def run(main, *words):
        card.clear()
        patch.setattr(sys, "argv", ["script.py", *words])
        with pytest.raises(SystemExit) as stop:
            script(main)
        assert not stop.value.code
        return "\n".join(card).split("step")[1 if "step" in card else 0].split()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lib.runs.Log, "add", marked)
        patch.setattr(data.corpus, "CACHE", str(tmp_path_factory.mktemp("cache")))
        yield run


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """A run on the card -> (its folder, its words, the waits of a step)."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "words.txt").write_text("the quick brown fox jumps over lazy dogs " * 300)
    words = [*WORDS, f"--data={folder}/words.txt", "--grad_accum=2"]
    return f"{folder}/run", words, run(train.main, *words, f"--out={folder}/run")


def losses(folder):
    with open(f"{folder}/log.jsonl", encoding="utf-8") as file:
        return [row["loss"] for row in map(json.loads, file) if "loss" in row]


def tiny(arch="encdec", **changes):
    torch.manual_seed(0)
    model = Transformer(make_config("tiny", arch, "1/2", vocab_size=60, **changes))
    for p in model.parameters():  # the output projections begin at zero
        p.data += 0.05 * torch.randn_like(p)
    return tune(model)


def test_a_training_step_waits_once(run, trained):
    assert len(trained[2]) == 1, trained[2]
    run(train.main, *WORDS, "--arch=dec", "--data=reverse", "--out=teacher")
    words = [*SHORT, "--teacher=teacher", "--student=tiny", "--data=reverse", "--sequences=data"]
    waits = run(distill.main, *words, "--out=student")
    assert len(waits) == 1, waits


def test_a_decoded_token_waits_once(run, trained):
    words = [f"--run={trained[0]}", "--prompt=the quick"]
    few, many = (run(sample.main, *words, f"--max_new_tokens={n}") for n in (4, 12))
    assert 0 < len(many) - len(few) <= 8, many


def test_tensors_of_two_devices_do_not_meet(card):  # noqa: F811
    x = torch.randn(3, 4).to("soft")
    for wrong in (lambda: x + torch.ones(4), lambda: torch.ones(3, 3) @ x):
        with pytest.raises(RuntimeError, match="same device"):
            wrong()
    card.clear()
    to_device([torch.ones(3).numpy()], x.device)  # pinned
    assert not card and x[x > 0].numel() and len(card) == 1


REAL = F.scaled_dot_product_attention


def check_attention(rule, q, k, v, mask=None, is_causal=False, enable_gqa=False):
    """Refuses what CUDA's kernels do not take; answers in their layout, on which .view fails."""
    assert k.shape == v.shape and (mask is None or not is_causal)
    flash = rule == "half" and mask is None
    assert rule == "any" or flash or q.size(1) == k.size(1), "all scores would be kept"
    y = REAL(q, k, v, mask, is_causal=is_causal, enable_gqa=enable_gqa)
    return y.transpose(1, 2).contiguous().transpose(1, 2)


KERNELS = [("soft", "half", fast_attention), ("soft", "float32", fast_attention)]
KERNELS += [("cpu", "any", fast_attention), ("cpu", "any", M.scaled_dot_product)]


@pytest.mark.parametrize("arch", ["encdec", "dec"])
@pytest.mark.parametrize("device, rule, kernel", KERNELS)
def test_attention_fits_the_kernels(card, monkeypatch, arch, device, rule, kernel):  # noqa: F811
    model = tiny(arch, n_head=4, n_kv_head=2).eval()
    rows, prompts = torch.randint(3, 60, (3, 20)), [[5, 6, 7], [8] * 9]
    rows[1, 7:] = 0
    batch = rows if arch == "encdec" else None, rows.flip(1)
    wanted, answer = model(*batch).item(), list(model.generate(prompts, 6))
    checked = lambda *args, **more: check_attention(rule, *args, **more)  # noqa: E731
    monkeypatch.setattr(F, "scaled_dot_product_attention", checked)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind=None: rule == "half")
    monkeypatch.setattr("lib.device.fast_attention", kernel)
    loss = tune(model.to(device))(*(x if x is None else x.to(device) for x in batch))
    loss.backward()
    assert loss.item() == pytest.approx(wanted)
    assert list(model.generate(prompts, 6)) == answer


def one_pass(model, rows):
    """Loss and gradients, and the bytes that are kept for the backward pass, weights aside."""
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = model(rows, rows)
    loss.backward()
    size = sum(n for address, n in kept.items() if address not in weights)
    return [loss, *(p.grad for p in model.parameters())], size


def test_checkpointed_blocks_keep_little_and_give_the_same_gradients():
    model, rows = tiny(), torch.randint(3, 60, (2, 64))
    wanted, before = one_pass(model, rows)
    checkpoint_blocks(model)
    found, after = one_pass(model, rows)
    assert after < before / 2 and all(map(torch.equal, found, wanted))


def test_blocks_compile_whole_and_once_for_many_shapes():
    model, counter = tiny(), CompileCounter()
    checkpoint_blocks(model)
    torch._dynamo.reset()
    for block in [*model.enc, *model.dec]:
        block.compile(backend=counter, dynamic=True, fullgraph=True)
    for B, S, T in torch.randint(2, 40, (6, 3)).tolist():
        model(torch.randint(3, 60, (B, S)), torch.randint(3, 60, (B, T))).backward()
    assert 0 < counter.frame_count <= 4


def test_too_little_memory_halves_the_rows(trained, monkeypatch, capsys):
    folder, words, _ = trained
    forward = Transformer.forward

    def short(model, src, tgt, *rest):
        if model.training and len(tgt) > 2:
            raise torch.OutOfMemoryError
        return forward(model, src, tgt, *rest)

    monkeypatch.setattr(Transformer, "forward", short)
    status, _, err = call(train.main, [*words, "--out=halved"], monkeypatch, capsys)
    assert status == 0 and "--batch_size=2 --grad_accum=4" in err
    assert losses("halved") == pytest.approx(losses(folder), abs=1e-4)
    status, _, err = call(train.main, [*words, "--batch_size=3"], monkeypatch, capsys)
    assert status == 2 and "--batch_size=3" in one_line(err)


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("auto") == torch.device("cuda:0") and find_device("cuda:1").index == 1
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_device("cuda") == find_device("auto") == torch.device("cuda:1")
    with pytest.raises(UserError, match="torchrun"):
        find_device("cuda:0")
