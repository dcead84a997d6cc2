"""The GPU path without a GPU: waits, placement, attention's rules, memory, compiling."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import call, log_rows
from softgpu import card  # noqa: F401  a fixture
from torch._dynamo.testing import CompileCounter

import data.corpus
import distill
import lib.device
import lib.runs
import sample
import train
import vision
from lib.device import StaticSteps, World, checkpoint_blocks, fast_attention, find_device, tune
from lib.settings import UserError
from model import Transformer, make_config, scaled_dot_product

MODEL = ["--preset=tiny", "--tokenizer=bytes"]
WORDS = ["--src_len=16", "--tgt_len=8", "--batch_size=4", "--grad_accum=2", "--data=reverse"]
WORDS += ["--max_iters=2", "--eval_interval=9", "--eval_rows=2", "--dtype=float32"]


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
        assert not main()
        steps = [i for i, line in enumerate(card) if line == "step"]
        return card[steps[0] + 1 : steps[1]] if steps else list(card)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lib.runs.Log, "add", marked)
        patch.setattr(lib.runs.Log, "plot", lambda log, metric: None)
        patch.setattr(data.corpus, "CACHE", str(tmp_path_factory.mktemp("cache")))
        yield run


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """A run on the card -> its folder, the waits of a step."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    return folder, run(train.main, *MODEL, *WORDS, f"--out={folder}")


def tiny(arch="encdec", **changes):
    torch.manual_seed(0)
    model = Transformer(make_config("tiny", arch, "1/2", vocab_size=60, **changes))
    for p in model.parameters():  # the output projections begin at zero
        p.data += 0.05 * torch.randn_like(p)
    return tune(model)


def test_a_training_step_waits_once(run, trained):
    run(train.main, *MODEL, *WORDS, "--arch=dec", "--out=teacher")
    words = [*WORDS, "--teacher=teacher", "--student=tiny", "--sequences=data"]
    waits = run(distill.main, *words, "--out=student")
    words = ["--data=shapes", "--image_size=24", "--patch=8", *WORDS[2:4], *WORDS[5:]]
    seen = run(vision.main, *MODEL, "--src_len=128", "--tgt_len=24", *words, "--out=seen")
    assert (len(trained[1]), len(waits), len(seen)) == (1, 1, 1), (trained[1], waits, seen)


def test_a_decoded_token_waits_once(run, trained):
    words = [f"--run={trained[0]}", "--prompt=a b c"]
    few, many = (run(sample.main, *words, f"--max_new_tokens={n}") for n in (4, 12))
    assert 0 < len(many) - len(few) <= 8, many


REAL = F.scaled_dot_product_attention


def check_attention(rule, q, k, v, mask=None, is_causal=False, enable_gqa=False):
    """Refuses what CUDA's kernels do not take; answers in their layout, on which .view fails."""
    assert k.shape == v.shape and (mask is None or not is_causal)
    flash = rule == "half" and mask is None
    assert rule == "any" or flash or q.size(1) == k.size(1), "all scores would be kept"
    y = REAL(q, k, v, mask, is_causal=is_causal, enable_gqa=enable_gqa)
    return y.transpose(1, 2).contiguous().transpose(1, 2)


KERNELS = [("soft", "half", fast_attention), ("soft", "float32", fast_attention)]
KERNELS += [("cpu", "any", fast_attention), ("cpu", "any", scaled_dot_product)]


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
    assert loss.item() == pytest.approx(wanted) and list(model.generate(prompts, 6)) == answer


def one_pass(model, rows):
    """Loss and gradients, and the bytes that were kept for the backward pass."""
    kept = {}

    def note(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = model(rows, rows)
    loss.backward()
    return [loss, *(p.grad for p in model.parameters())], sum(kept.values())


def test_checkpointed_blocks_keep_little_and_give_the_same_gradients():
    model, rows = tiny(), torch.randint(3, 60, (16, 64))
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
    for B, S, T in torch.randint(2, 40, (12, 3)).tolist():
        model(torch.randint(3, 60, (B, S)), torch.randint(3, 60, (B, T))).backward()
    assert 0 < counter.frame_count <= 4


def test_too_little_memory_halves_the_rows(trained, monkeypatch, capsys):
    forward = Transformer.forward

    def short(model, src, tgt, *rest):
        if model.training and src.numel() + tgt.numel() > 3 * (16 + 8):  # three full rows
            raise torch.OutOfMemoryError
        return forward(model, src, tgt, *rest)

    monkeypatch.setattr(Transformer, "forward", short)
    status, _, err = call(train.main, [*MODEL, *WORDS, "--out=halved"], monkeypatch, capsys)
    assert status == 0 and "--batch_size=2 --grad_accum=4" in err
    losses = [[row["loss"] for row in log_rows(folder)] for folder in ("halved", trained[0])]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize("arch", ["encdec", "dec"])
def test_logits_in_parts_give_the_same_gradients(arch, world, monkeypatch):
    model, rows = tiny(arch), torch.randint(3, 60, (7, 20))  # 60 words: padded to 64 on a GPU
    batch = (rows if arch == "encdec" else None), rows.flip(0), rows > 30
    model(*batch).backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    world("cpu").place(model).logits = lambda x: lib.device.aligned_logits(model.embed.weight, x)
    most, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda *args: most.append(linear(*args)) or most[-1])
    monkeypatch.setattr("lib.device.CHUNK", 2000)
    model(*batch).backward()
    assert 0 < max(y.numel() for y in most if y.size(-1) == 64) <= 2000 * 64 // 60
    assert all(torch.allclose(p.grad, x, atol=1e-5) for p, x in zip(model.parameters(), wanted))
    assert model(*batch[:2], rows < 0) == 0  # no target


@pytest.mark.parametrize("arch", ["encdec", "dec"])
def test_compiled_steps_of_fixed_shapes_say_the_same(arch):
    model, counter = tiny(arch).eval(), CompileCounter()
    requests = [[[5, 6, 7], [8] * 9, [9, 4]], [[7] * 30, [3], [4, 5]], [[6] * 12] * 3]
    wanted = [list(model.generate(request, 40, 3.0)) for request in requests]
    torch._dynamo.reset()
    StaticSteps(model, backend=counter)
    assert [list(model.generate(request, 40, 3.0)) for request in requests] == wanted
    assert any(None in new for new in wanted[0])  # rows end, and the batch is made smaller
    assert counter.frame_count <= 3, "one graph for three rows, two and one"


# ----------------------------------------------------------------------------------------------
# Machines that are not here


@pytest.fixture
def world(monkeypatch):
    """Makes a World of a process that is told of two GPUs."""

    def make(device="cuda", dtype="float32", **about):
        monkeypatch.setattr(lib.device, "find_device", find_device)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        return World(SimpleNamespace(threads=0, device=device, dtype=dtype, seed=0, **about))

    return make


def test_torchrun_gives_each_process_its_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_device("cuda") == find_device("auto") == torch.device("cuda:1")
    with pytest.raises(UserError, match="torchrun"):
        find_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="nproc_per_node=2"):
        find_device("auto")


def test_nccl_knows_its_gpu_and_gloo_has_the_rest(world, monkeypatch):
    told = {}
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda **more: told.update(more))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    world()
    assert told["backend"] == "cpu:gloo,cuda:nccl" and told["device_id"] == torch.device("cuda:1")


@pytest.mark.parametrize("kind, dtype", [((6, 1), "float32"), ((7, 5), "float16")])
def test_old_cards(world, kind, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: kind)
    assert world(dtype="auto").dtype == getattr(torch, dtype)


def test_without_a_compiler_a_run_goes_on(world, monkeypatch, capsys):
    monkeypatch.setattr(lib.device, "has_triton", lambda: False)
    assert not world(compile="auto").compile and capsys.readouterr().err == ""
    assert not world(compile="true").compile and "no Triton" in capsys.readouterr().err
