"""The GPU path without a GPU: placement, waits, attention's rules, memory, graph breaks."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, call, one_line
from softgpu import SoftTensor, card, library  # noqa: F401  card is a fixture

import data.pictures
import distill
import lib.device
import lib.runs
import sample
import train
import vision
from lib.device import checkpoint_blocks, find_device, to_device, tune
from lib.settings import UserError
from model import Transformer, make_config

WORDS = [word for word in TINY if not word.startswith("--device")] + ["--eval_interval=9"]


@pytest.fixture
def run(card, monkeypatch, capsys):  # noqa: F811
    """Runs a script's main on the card -> its waits, by line, in the third step."""
    add = lib.runs.Log.add

    def marked(log, row):
        card.events += [("step", len(card.events))] * ("loss" in row)
        add(log, row)

    monkeypatch.setattr(lib.runs.Log, "add", marked)

    def run(main, *words):
        card.events.clear()
        status, out, err = call(main, words, monkeypatch, capsys)
        assert status == 0, err[-2000:]
        steps = [i for i, (kind, _) in enumerate(card.events) if kind == "step"]
        if steps:
            card.events = card.events[steps[1] + 1 : steps[2]]
        return card.count("sync")

    return run


def losses(folder):
    with open(f"{folder}/log.jsonl", encoding="utf-8") as file:
        return [row["loss"] for row in map(json.loads, file) if "loss" in row]


def tiny(n_enc=1, **changes):
    torch.manual_seed(0)
    arch = "encdec" if n_enc else "dec"
    model = Transformer(make_config("tiny", arch, n_enc=n_enc, n_dec=2, vocab_size=60, **changes))
    for p in model.parameters():  # the output projections begin at zero
        p.data += 0.05 * torch.randn_like(p)
    return tune(model)


def test_the_card_is_as_strict_as_cuda(card):  # noqa: F811
    x = torch.randn(3, 4).to("soft")
    for wrong in (lambda: x + torch.ones(4), lambda: torch.ones(3, 3) @ x, lambda: x.numpy()):
        with pytest.raises((RuntimeError, TypeError)):
            wrong()
    assert torch.equal((x + torch.tensor(1.0)).cpu(), x.cpu() + 1)  # a number may come along
    for waits in (
        lambda: x.sum().item(),
        lambda: x[x > 0],
        lambda: torch.tensor([1], device="soft"),
    ):
        card.events.clear()
        waits()
        assert card.count("sync").total() == 1
    card.events.clear()
    to_device([x.cpu().numpy()], x.device)
    assert card.count("copy").total() == 2 and card.count("sync").total() == 1  # x.cpu() alone
    card.mps = True
    with pytest.raises(TypeError, match="float64"):
        x.double()


@pytest.mark.parametrize("arch", ["encdec", "dec"])
def test_a_step_waits_once(run, card, text_file, monkeypatch, capsys, arch):  # noqa: F811
    words = [*WORDS, f"--arch={arch}", f"--data={text_file}", "--max_iters=3", "--grad_accum=2"]
    waits = run(train.main, *words, "--out=soft", "--device=auto")
    assert waits.total() == 1 and card.events[-1][0] != "sync", waits
    assert max(i for i, (_, line) in enumerate(card.events) if line == "backward") < next(
        i for i, (kind, _) in enumerate(card.events) if kind == "sync"
    )
    assert card.count("launch").total() < 2000
    monkeypatch.setattr(lib.device, "find_device", lambda name: torch.device("cpu"))
    assert call(train.main, [*words, "--out=cpu", "--device=cpu"], monkeypatch, capsys)[0] == 0
    assert losses("soft") == pytest.approx(losses("cpu"), abs=1e-3)
    monkeypatch.setattr(lib.device, "find_device", lambda name: torch.device("soft:0"))
    found = []
    for n in (4, 12):
        found.append(run(sample.main, "--run=soft", "--prompt=x", f"--max_new_tokens={n}"))
    assert (found[1] - found[0]).total() <= 8
    run(sample.main, "--run=soft", "--prompt=x", "--max_new_tokens=4", "--beams=2")


def test_distillation_waits_once(run):
    words = [*WORDS, "--data=reverse", "--max_iters=3"]
    run(train.main, *words, "--arch=dec", "--out=teacher")
    words = [word for word in words if not word.startswith(("--preset", "--tokenizer"))]
    words += ["--teacher=teacher", "--student=tiny", "--sequences=data", "--out=student"]
    assert run(distill.main, *words).total() == 1


@pytest.mark.parametrize("more", ["--look=decoder", "--tokens=learned"])
def test_vision_waits_to_count_placeholders_and_once_more(run, monkeypatch, more):
    sizes = dict(shapes=(24, 6, 6), docs=(24, 6, 6), charts=(4, 2, 2))
    monkeypatch.setattr(data.pictures, "SIZES", sizes)
    words = [*WORDS, "--src_len=160", "--tgt_len=64", "--image_size=24", "--patch=8"]
    waits = run(vision.main, *words, "--max_iters=3", "--out=v", more)
    assert waits.total() <= 3 + ("learned" in more), waits


# --- attention


def cuda_attention(q, k, v, mask=None, is_causal=False, enable_gqa=False, half=True):
    """Refuses what neither of CUDA's fused kernels takes, and returns their layout."""
    assert k.shape == v.shape and (mask is None or not is_causal)
    flash = half and mask is None
    assert flash or (q.size(1) == k.size(1) and not enable_gqa), "all scores would be kept"
    if enable_gqa:
        k, v = (x.repeat_interleave(q.size(1) // k.size(1), 1) for x in (k, v))
    scores = q @ k.mT * q.size(-1) ** -0.5
    seen = torch.ones_like(scores[:1, :1], dtype=torch.bool)
    seen = seen.tril() if is_causal else seen if mask is None else mask
    y = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    return y.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("n_enc", [1, 0])
def test_attention_fits_cudas_kernels(card, monkeypatch, half, n_enc):  # noqa: F811
    model = tiny(n_enc, n_head=4, n_kv_head=2).eval()
    rows, prompts = torch.randint(3, 60, (3, 20)), [[5, 6, 7], [8] * 9]
    rows[1, 7:] = 0
    batch = (rows if n_enc else None), rows.flip(1)
    wanted, answer = model(*batch).item(), list(model.generate(prompts, 6))
    rule = lambda *args, **more: cuda_attention(*args, half=half, **more)  # noqa: E731
    monkeypatch.setattr(F, "scaled_dot_product_attention", rule)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind=None: half)
    model = tune(model.to("soft"))
    assert model(*(x if x is None else x.to("soft") for x in batch)).item() == pytest.approx(wanted)
    assert list(model.generate(prompts, 6)) == answer


# --- memory, compiling, machines


def bytes_kept(model, batch):
    """Bytes that a forward pass keeps for the backward pass, weights aside."""
    kept, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = model(*batch)
    return sum(n for address, n in kept.items() if address not in own), loss


def test_checkpointed_blocks_keep_little_and_give_the_same_gradients():
    model, rows = tiny(), torch.randint(3, 60, (2, 64))
    before, loss = bytes_kept(model, (rows, rows))
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    checkpoint_blocks(model)
    after, again = bytes_kept(model, (rows, rows))
    again.backward()
    assert after < before / 2 and torch.equal(loss, again)
    assert all(map(torch.equal, grads, (p.grad for p in model.parameters())))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_blocks_compile_whole_and_once_for_many_shapes(monkeypatch, checkpointed):
    model, graphs = tiny(), []
    rule = lambda *args, **more: cuda_attention(*args, **more)  # noqa: E731
    monkeypatch.setattr(lib.device.F, "scaled_dot_product_attention", rule)
    if checkpointed:
        checkpoint_blocks(model)
    torch._dynamo.reset()

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for block in [*model.enc, *model.dec]:
        block.compile(backend=backend, dynamic=True, fullgraph=True)
    for B, S, T in torch.randint(2, 40, (12, 3)).tolist():
        model(torch.randint(3, 60, (B, S)), torch.randint(3, 60, (B, T))).backward()
    assert len(graphs) <= 4, len(graphs)


def test_too_little_memory(run, card, text_file, monkeypatch, capsys):  # noqa: F811
    forward = Transformer.forward

    def short(model, src, tgt, *rest):
        if model.training and len(tgt) > 2:
            raise torch.OutOfMemoryError
        return forward(model, src, tgt, *rest)

    words = [*WORDS, f"--data={text_file}", "--max_iters=3"]
    run(train.main, *words, "--out=whole")
    monkeypatch.setattr(Transformer, "forward", short)
    status, _, err = call(train.main, [*words, "--out=halved"], monkeypatch, capsys)
    assert status == 0 and "--batch_size=2 --grad_accum=2" in err
    assert losses("halved") == pytest.approx(losses("whole"), abs=1e-4)
    status, _, err = call(train.main, [*words, "--batch_size=3"], monkeypatch, capsys)
    assert status == 2 and "--batch_size=3" in one_line(err)


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("auto") == torch.device("cuda:0") and find_device("cuda:1").index == 1
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_device("cuda") == find_device("auto") == torch.device("cuda:1")
    with pytest.raises(UserError, match="torchrun"):
        find_device("cuda:0")
