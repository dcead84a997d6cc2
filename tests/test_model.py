"""The model against formulas written out and against itself done another way. transformers' Llama,
Qwen and Mistral are its oracles in test_foreign.py."""

import json

import pytest
import torch
import torch.nn.functional as F

import model as M
from data.objectives import make_batch
from data.tokenizer import Tokenizer
from lib.device import fast_attention, pack, tune
from model import Cache, Config, ModelError, Transformer, count_params, make_config, pick

TINY = dict(vocab_size=97, n_embd=32, n_head=4, n_kv_head=2, head_dim=16, n_hidden=48)
TINY |= dict(src_len=24, tgt_len=16)


def tiny(arch, seed=0, **changes):
    """A tiny model whose every weight is random, those that start at zero or one too. A tied one
    says its last token again and again."""
    torch.manual_seed(seed)
    layers = dict(n_enc=2, n_dec=2) if arch == "encdec" else dict(n_enc=0, n_dec=3, src_len=0)
    layers |= dict(src_len=9) if arch == "prefix" else {}
    model = Transformer(Config(**TINY | layers | changes)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.0 if p.ndim > 1 else 1.0, 0.15)
    return model


def ids(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(3, TINY["vocab_size"], shape, generator=rng)


def close(a, b, tolerance=2e-5):
    assert torch.allclose(a, b, atol=tolerance, rtol=tolerance), (a - b).abs().max()


# --- sizes


@pytest.mark.parametrize(
    "preset, millions",
    [("tiny", 0.65), ("char", 0.85), ("nano", 2.25), ("mini", 8), ("small", 30), ("base", 100)]
    + [("330m", 330), ("500m", 500), ("800m", 800), ("1b", 1000)],
)
def test_all_members_of_a_preset_have_one_size(preset, millions):
    splits = ("1/3", "1/2", "2/3") if millions < 400 else ("2/3",)
    configs = [make_config(preset, "dec"), *(make_config(preset, split=split) for split in splits)]
    counts = [count_params(config) / 1e6 for config in configs]
    assert max(counts) / min(counts) < (1.01 if millions > 2 else 1.02)
    assert counts == pytest.approx([millions] * len(counts), rel=0.04)
    if preset == "330m":  # the paper's layers
        assert [(c.n_enc, c.n_dec) for c in configs[1:]] == [(12, 32), (22, 22), (32, 12)]


@pytest.mark.parametrize(
    "changes, named",
    [(dict(n_head=3), "n_kv_head"), (dict(head_dim=7), "head_dim"), (dict(mlp="relu"), "mlp")]
    + [(dict(n_dec=0), "n_dec"), (dict(vocab_size="97"), "vocab_size"), (dict(eos_id=97), "vocab")]
    + [(dict(n_enc=10**9), "n_enc"), (dict(n_embd=1e30), "n_embd"), (dict(bias="some"), "bias")],
)
def test_a_config_that_cannot_work_is_named(changes, named):
    with pytest.raises(ModelError, match=named):
        Transformer(Config(**TINY | changes))


# --- layers


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_every_kernel_of_attention_agrees(n_kv_head):
    torch.manual_seed(0)
    q = torch.randn(2, 4, 6, 16)
    k, v = torch.randn(2, 2, n_kv_head, 6, 16)
    padding = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()[:, None, None]
    triangle = torch.ones(6, 6).tril().bool()[None, None]
    everything = torch.ones(6, 6).bool()[None, None]
    k4, v4 = (x.repeat_interleave(4 // n_kv_head, 1) for x in (k, v))
    for mask, causal in ((None, False), (None, True), (padding, False), (padding & triangle, 0)):
        unmasked = everything if mask is None else mask
        seen = triangle if causal else unmasked
        wanted = (q @ k4.mT / 4).masked_fill(~seen, -torch.inf).softmax(-1) @ v4
        low = [x.bfloat16() for x in (q, k, v)]
        for kernel in (M.scaled_dot_product, fast_attention):
            close(kernel(q, k, v, mask, bool(causal)), wanted)
            close(kernel(*low, mask, bool(causal)).float(), wanted, 0.03)
        close(fast_attention(low[0], k, v, mask, bool(causal)).float(), wanted, 0.03)  # autocast
        if not causal and (mask is None or mask.size(2) == 1):
            close(fast_attention(q[:, :, :1], k, v, mask, False), wanted[:, :, :1])


@torch.inference_mode()
def test_packing_changes_nothing():
    torch.manual_seed(0)
    model, prompts = Transformer(make_config("nano")).bfloat16().eval(), [[5, 6, 7], [8, 9]]
    before, packed = model.next_logits(model.prefill(prompts, 3)[1]), pack(tune(model))
    close(packed.next_logits(packed.prefill(prompts, 3)[1]), before, 0.03)


def test_rope_turns_with_the_distance_and_ntk_stretches_the_slowest_frequency():
    q, k = torch.randn(2, 1, 1, 1, 16)
    cfg, one = Config(head_dim=16), torch.tensor([[1]])

    def score(i, j):
        at = [M.rope_tables(torch.tensor([[p]]), cfg) for p in (i, j)]
        return (M.rotate(q, at[0]) * M.rotate(k, at[1])).sum()

    close(score(3, 1), score(13, 11), 1e-4)
    assert not torch.isclose(score(3, 1), score(3, 2))
    tables = [M.rope_tables(one, cfg, stretch) for stretch in (1.0, torch.tensor([[4.0]]))]
    angle1, angle4 = (torch.atan2(sin, cos).flatten() for cos, sin in tables)
    close(angle4[0], angle1[0])
    close(angle4[-1], angle1[-1] / 4, 1e-6)


def test_attention_starts_near_and_cross_attention_at_equal_tokens():
    model, x = Transformer(make_config("nano")), torch.randn(5, 192)
    cross, attn, cfg = model.dec[1].cross, model.enc[0].attn, model.config
    q, k = cross.wq(x).view(5, cross.n_kv_head, -1, 64), cross.wk(x).view(5, cross.n_kv_head, 64)
    close(q[:, :, 0], k)
    q, k = (w.bias.view(1, -1, 1, 64)[:, :1] for w in (attn.wq, attn.wk))
    tables = [M.rope_tables(torch.tensor([[place]]), cfg) for place in (0, 1, 9)]
    here, near, far = (M.rotate(k, table).flatten() for table in tables)
    assert here @ here > here @ near + 1 > here @ far + 2 and torch.equal(q, k)


# --- what may see what


def test_a_prefix_lm_reads_its_prompt_in_both_directions_and_its_answer_in_one():
    model, rows = tiny("prefix", vocab_size=600), ([[5, 6, 7], [8] * 5], [[6, 9], [9] * 4])
    prompt, tgt, _ = map(torch.from_numpy, make_batch(*rows, Tokenizer("bytes"), "prefix"))
    before = model.states(prompt, tgt)[0]
    for place, seen in ((2, 0), (4, 5)):  # of the prompt; of the answer, an input one place later
        changed = tgt.clone()
        changed[0, place] = 3
        moved = (model.states(prompt, changed)[0] - before).abs().amax(1) > 1e-4
        assert moved.nonzero()[0] == seen


@pytest.mark.parametrize("bos_id", [1, -1])
def test_targets_are_shifted_by_one_and_only_once(bos_id):
    model, tgt = tiny("dec", bos_id=bos_id), ids(2, 6)
    inputs = M.shift_right(tgt, 1) if bos_id == 1 else tgt[:, :-1]
    nll = -model.logits(model.decode(inputs)).log_softmax(-1)
    wanted = nll.gather(2, tgt[:, tgt.size(1) - inputs.size(1) :, None]).sum()
    close(model(None, tgt), wanted, 1e-4)


def test_ignored_targets_have_no_gradient_and_none_at_all_is_finite():
    model, src, tgt = tiny("encdec"), ids(2, 10), ids(2, 8)
    mask, states = torch.rand(2, 8) < 0.5, model.states(src, tgt).detach().requires_grad_()
    model.loss(states, tgt, mask).backward()
    assert ((states.grad.abs().sum(-1) > 0) == mask).all()
    src[1] = model.config.pad_id  # a source without a token
    loss = model(src, tgt, torch.zeros_like(mask))
    loss.backward()
    assert loss.item() == 0 and model(src, tgt).isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("longest", [20, 60])  # within the trained length of 24, and past it
@pytest.mark.parametrize("cross_rope", [False, True])
def test_padding_changes_nothing(longest, cross_rope):
    model = tiny("encdec", cross_rope=cross_rope, embed_skip=cross_rope, cross_next=cross_rope)
    lengths, tgt = [7, longest, 30 if longest > 24 else 3], ids(3, 9)
    rows = [ids(1, n, seed=n) for n in lengths]
    for width in (longest, longest + 13):
        src = torch.cat([F.pad(row, (0, width - row.size(1))) for row in rows])
        with torch.no_grad():
            batch = model.states(src, tgt)
            for b, row in enumerate(rows):
                close(batch[b : b + 1], model.states(row, tgt[b : b + 1]), 1e-4)


# --- cache


@pytest.mark.parametrize("arch, cross", [("encdec", False), ("encdec", True), ("dec", False)])
@pytest.mark.parametrize("T", [14, 40])  # trained length 16: below, and with NTK
@pytest.mark.parametrize("chunks", [[1] * 100, [5, 1, 4, 100]])
def test_cached_equals_full_recomputation_at_every_position(arch, cross, T, chunks):
    ours = dict(cross_rope=cross, embed_skip=cross, cross_next=cross)
    model, src = tiny(arch, **ours), ids(2, 11, seed=1)
    tokens = ids(2, T)
    src_mask = torch.arange(11)[None] < torch.tensor([[11], [6]])
    with torch.no_grad():
        encoded = model.encode(src, src_mask) if arch == "encdec" else None
        full, pad = model.decode(tokens, encoded, src_mask), torch.zeros(2, dtype=torch.long)
        cache, parts, at = Cache(model, T, pad, encoded, src_mask), [], 0
        for n in chunks:
            if at < T:
                parts.append(model.decode(tokens[:, at : at + n], cache=cache))
                at += n
    close(torch.cat(parts, 1), full, 1e-4)


# --- generation


def collect(steps, row=0):
    return [step[row] for step in steps if step[row] is not None]


@pytest.mark.parametrize("arch", ["encdec", "dec", "prefix"])
@pytest.mark.parametrize("options", [dict(), dict(temperature=0.9, top_k=20, top_p=0.9)])
@pytest.mark.parametrize("new", [8, 40])  # 40 runs past the trained length
def test_a_row_generates_what_it_generates_alone(arch, options, new):
    model, prompts = tiny(arch, tied=False), [ids(n, seed=n).tolist() for n in (5, 12, 2, 0)]
    together = list(model.generate(prompts, new, seed=3, **options))
    for b, prompt in enumerate(prompts):
        alone = model.generate([prompt], new, seed=3 + b, **options)
        assert collect(together, b) == collect(alone)


@pytest.mark.parametrize("arch, bos_id", [("encdec", 1), ("dec", 1), ("dec", -1), ("prefix", 1)])
def test_greedy_equals_argmax_of_the_full_model(arch, bos_id):
    model, prompt = tiny(arch, bos_id=bos_id, tied=False), ids(7).tolist()
    made = collect(list(model.generate([prompt], 6)))
    with torch.no_grad():
        encoded = model.encode(torch.tensor([prompt])) if arch == "encdec" else None
        sequence = [bos_id] * (bos_id > 0) + prompt * (arch != "encdec")
        for id in made:
            seen = torch.arange(len(sequence))[None] <= 7 if arch == "prefix" else None
            states = model.decode(torch.tensor([sequence]), encoded, seen)
            assert model.next_logits(states)[0].argmax() == id
            sequence.append(id)


@pytest.mark.parametrize("arch", ["encdec", "dec"])
def test_a_row_goes_on_as_before_when_the_other_has_ended(arch):
    model, prompts = tiny(arch, tied=False), [ids(n, seed=n).tolist() for n in (5, 40)]
    model.config.eos_id = -1  # no row ends
    said = [*map(list, zip(*model.generate(prompts, 12, 1.0)))]
    for ended, other in ((0, 1), (1, 0)):
        end = next(id for id in said[ended][2:] if id not in said[other])
        model.config.eos_id = end
        steps = list(model.generate(prompts, 12, 1.0))
        assert collect(steps, ended) == said[ended][: said[ended].index(end)]
        assert collect(steps, other) == said[other]


def test_draws_follow_the_distribution_and_its_cuts():
    logits, rng = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), [torch.Generator().manual_seed(0)]
    draws = torch.cat([pick(logits, 0.7, 0, 1.0, rng) for _ in range(4000)])
    close(torch.bincount(draws, minlength=4) / 4000, (logits[0] / 0.7).softmax(-1), 0.03)
    for cut, wanted in (((2, 1.0), {0, 1}), ((0, 0.7), {0, 1}), ((0, 0.5), {0})):
        assert {int(pick(logits, 1.0, *cut, rng)) for _ in range(200)} == wanted
    assert int(pick(logits, 0, 0, 1.0, rng)) == int(pick(logits, 1e-42, 0, 1.0, rng)) == 0


# --- files


def test_save_and_load(tmp_path):
    model = tiny("encdec", bias="all", mlp="gelu", tied=False)
    model.save(tmp_path)
    again, state = Transformer.load(tmp_path), model.state_dict()
    assert again.config == model.config
    assert all(torch.equal(p, state[name]) for name, p in again.state_dict().items())
    assert Transformer.load(tmp_path, dtype=torch.bfloat16).embed.weight.dtype == torch.bfloat16
    assert (tmp_path / "model.safetensors").stat().st_size < 4.1 * model.num_params() + 16384


@pytest.mark.parametrize(
    "changes, named",
    [(dict(n_hidden=56), "mlp"), (dict(n_dec=3), "dec.2"), (dict(tied=False), "head.weight")]
    + [(text, "config.json") for text in ("{", "[]", '{"n_layer": 3}', "", "[" * 200000)],
)
def test_a_config_that_does_not_fit_the_weights_is_refused(tmp_path, changes, named):
    tiny("encdec").save(tmp_path)
    path, damaged = tmp_path / "config.json", type(changes) is str
    path.write_text(changes if damaged else json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ModelError, match=named):
        Transformer.load(tmp_path)


def test_damaged_weights_are_refused(tmp_path):
    model = tiny("dec")
    model.save(tmp_path)
    path = tmp_path / "model.safetensors"
    for bad in (path.read_bytes()[:-100], b"", b"x" * 5000):
        path.write_bytes(bad)
        with pytest.raises(ModelError, match="damaged"):
            Transformer.load(tmp_path)
    model.dec[0].mlp.up.weight.data[0, 0] = torch.nan
    model.save(tmp_path)
    with pytest.raises(ModelError, match="dec.0.mlp.up.weight holds numbers"):
        Transformer.load(tmp_path)


def test_dropout_and_smoothing_are_for_training_alone():
    plain = tiny("encdec")
    model = Transformer(plain.config, dropout=0.5, word_dropout=0.5, label_smoothing=0.1).eval()
    model.load_state_dict(plain.state_dict())
    src, tgt = ids(2, 9), ids(2, 5, seed=2)
    close(model(src, tgt), plain(src, tgt), 1e-6)
    model.train()
    hidden = (model.embedded(ids(20, 30)) == 0).all(-1)  # whole tokens
    assert 0.4 < hidden.float().mean() < 0.6
    y = model.dec[0].drop(torch.ones(400, 3, 50))
    assert set(y.unique().tolist()) == {0.0, 2.0} and (y[:, 0] == y[:, 2]).all()
