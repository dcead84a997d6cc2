"""The model against oracles: transformers' Llama, a float64 loop, torch's FLOP counter, and itself done another way."""
import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import model as M
from model import Cache, Config, ModelError, Transformer, count_params, make_config, pick

TINY = dict(vocab_size=97, n_embd=32, n_head=4, n_kv_head=2, head_dim=16, n_hidden=48, src_len=24, tgt_len=16)


def tiny(arch, seed=0, **changes):
    """A tiny model whose every weight is random, those that start at zero or one too."""
    torch.manual_seed(seed)
    shape = TINY | (dict(n_enc=2, n_dec=2) if arch == "encdec" else dict(n_enc=0, n_dec=3, src_len=0)) | changes
    model = Transformer(Config(**shape)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15) if p.ndim > 1 else torch.nn.init.normal_(p, mean=1.0, std=0.2)
    return model


def ids(*shape, seed=0):
    return torch.randint(3, TINY["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=2e-5):
    assert torch.allclose(a, b, atol=tolerance, rtol=tolerance), (a - b).abs().max()


# --- sizes

@pytest.mark.parametrize("preset, low, high", [("nano", 2, 3), ("mini", 7.5, 8.5), ("small", 28, 32), ("330m", 325, 335),
                                               ("500m", 490, 510), ("800m", 790, 810), ("1b", 980, 1020)])
def test_all_members_of_a_preset_have_one_size(preset, low, high):
    configs = [make_config(preset, "dec")] + [make_config(preset, split=split) for split in ("1/3", "1/2", "2/3")]
    counts = [count_params(config) for config in configs]
    assert max(counts) / min(counts) < 1.01
    assert low <= min(counts) / 1e6 and max(counts) / 1e6 <= high
    assert len({config.n_embd for config in configs}) == 1


def test_330m_has_the_papers_layers():
    layers = {split: (c.n_enc, c.n_dec) for split in ("1/3", "1/2", "2/3") for c in [make_config("330m", split=split)]}
    assert layers == {"1/3": (12, 32), "1/2": (22, 22), "2/3": (32, 12)} and make_config("330m", "dec").n_dec == 48


def test_other_layer_counts_keep_the_size():
    wanted = count_params(make_config("nano", "dec"))
    assert abs(count_params(make_config("nano", n_enc=4, n_dec=1)) / wanted - 1) < 0.01


@pytest.mark.parametrize("preset", ["nano", "mini", "small"])
@pytest.mark.parametrize("arch", ["encdec", "dec"])
def test_first_loss_is_near_that_of_guessing(preset, arch):
    torch.manual_seed(0)
    model = Transformer(make_config(preset, arch))
    src, tgt = torch.randint(model.config.vocab_size, (2, 2, 40))
    loss = model(src if arch == "encdec" else None, None, tgt, torch.ones_like(tgt, dtype=torch.bool))[1]
    assert abs(loss.item() - math.log(model.config.vocab_size)) < 0.1


@pytest.mark.parametrize("changes, named", [(dict(n_head=3), "n_kv_head"), (dict(head_dim=7), "head_dim"), (dict(mlp="relu"), "mlp"),
                                            (dict(n_dec=0), "n_dec"), (dict(vocab_size="97"), "vocab_size"), (dict(eos_id=97), "eos_id")])
def test_a_config_that_cannot_work_is_named(changes, named):
    with pytest.raises(ModelError, match=named):
        Transformer(Config(**TINY | changes))


@pytest.mark.parametrize("arch", ["encdec", "dec"])
def test_flops_equal_torchs_count(arch):
    from torch.utils.flop_counter import FlopCounterMode
    model = tiny(arch)
    src, tgt = (ids(1, 20) if arch == "encdec" else None), ids(1, 12)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(src, None, tgt, torch.ones_like(tgt, dtype=torch.bool))
    assert abs(model.flops(20, 12) / counter.get_total_flops() - 1) < 0.01


# --- the layers, against others

def test_decoder_only_equals_transformers_llama():
    transformers = pytest.importorskip("transformers")
    model = tiny("dec", qk_norm=False)
    c = model.config
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_hidden, num_hidden_layers=c.n_dec, head_dim=c.head_dim,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, rms_norm_eps=c.norm_eps, tie_word_embeddings=True)).eval()
    names = {"attn.wq": "self_attn.q_proj", "attn.wk": "self_attn.k_proj", "attn.wv": "self_attn.v_proj", "attn.wo": "self_attn.o_proj",
             "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj", "attn_norm": "input_layernorm",
             "mlp_norm": "post_attention_layernorm", "embed": "model.embed_tokens", "dec_norm": "model.norm"}
    weights = {}
    for name, p in model.state_dict().items():
        if name.startswith("dec."):
            _, layer, part = name.removesuffix(".weight").split(".", 2)
            weights[f"model.layers.{layer}.{names[part]}.weight"] = p
        else:
            weights[names[name.removesuffix(".weight")] + ".weight"] = p
    missing, unexpected = llama.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    tokens = ids(2, 12)
    with torch.no_grad():
        close(model.logits(model.decode(tokens)), llama(tokens).logits)


def test_attention_equals_a_float64_loop():
    torch.manual_seed(0)
    attention = M.Attention(Config(**TINY)).double()
    x, source = torch.randn(2, 3, 32).double(), torch.randn(2, 5, 32).double()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    k, v = attention.keys_values(source)
    got = attention(x, k, v, mask[:, None, None])
    q = attention.q_norm(attention.wq(x).view(2, 3, 4, 16))
    for b in range(2):
        for t in range(3):
            heads = []
            for h in range(4):
                scores = torch.stack([q[b, t, h] @ k[b, h // 2, s] / 4 for s in range(5) if mask[b, s]])
                heads.append(sum(w * v[b, h // 2, s] for s, w in enumerate(scores.softmax(0))))
            close(got[b, t], attention.wo(torch.cat(heads)), 1e-9)


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_every_path_of_attention_agrees(n_kv_head):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 6, 16), torch.randn(2, n_kv_head, 6, 16), torch.randn(2, n_kv_head, 6, 16)
    padding = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()[:, None, None]
    triangle = torch.ones(6, 6).tril().bool()[None, None]
    for mask, causal in ((None, False), (None, True), (padding, False), (padding & triangle, False)):
        seen = triangle if causal else mask
        scores = (q @ k.repeat_interleave(4 // n_kv_head, 1).mT / 4).masked_fill(~seen if seen is not None else torch.tensor(False), -torch.inf)
        wanted = scores.softmax(-1) @ v.repeat_interleave(4 // n_kv_head, 1)
        close(M.attend(q, k, v, mask, causal), wanted)
        low = [x.bfloat16() for x in (q, k, v)]  # the CPU's own path
        close(M.attend(*low, mask, causal).float(), wanted, 0.03)
        close(M.attend(low[0], k, v, mask, causal).float(), wanted, 0.03)  # a float32 cache under autocast
        if not causal and (mask is None or mask.size(2) == 1):
            close(M.attend(q[:, :, :1], k, v, mask, False), wanted[:, :, :1])


@pytest.mark.parametrize("arch", ["encdec", "dec"])
@torch.inference_mode()
def test_packing_changes_nothing(arch):
    torch.manual_seed(0)
    model, prompts = Transformer(make_config("nano", arch)).bfloat16().eval(), [[5, 6, 7], [8, 9]]
    cache, states = model.prefill(prompts, 3)
    before = model.logits(states)
    _, states = model.pack().prefill(prompts, 3)
    close(model.logits(states), before, 0.02)


def test_rope_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 16)

    def score(i, j):
        at = [M.rope_tables(torch.tensor([[p]]), M.Config(head_dim=16)) for p in (i, j)]
        return (M.rotate(q, at[0]) * M.rotate(k, at[1])).sum()
    close(score(3, 1), score(13, 11), 1e-4)
    assert not torch.isclose(score(3, 1), score(3, 2))


def test_ntk_stretches_the_slowest_frequency_by_the_factor_and_leaves_the_fastest():
    cos1, sin1 = M.rope_tables(torch.tensor([[1]]), M.Config(head_dim=16))
    cos4, sin4 = M.rope_tables(torch.tensor([[1]]), M.Config(head_dim=16), torch.tensor([4.0]))
    angle1, angle4 = torch.atan2(sin1, cos1).flatten(), torch.atan2(sin4, cos4).flatten()
    close(angle4[0], angle1[0])
    close(angle4[-1], angle1[-1] / 4, 1e-6)


# --- what may see what

def test_the_decoder_is_causal_and_the_encoder_is_not():
    model, src, tgt = tiny("encdec"), ids(1, 10), ids(1, 8)
    with torch.no_grad():
        encoded = model.encode(src)
        states = model.decode(tgt, encoded)
        later = tgt.clone()
        later[0, 5] += 1
        changed = model.decode(later, encoded)
        close(states[:, :5], changed[:, :5])
        assert not torch.allclose(states[:, 5], changed[:, 5])
        other = src.clone()
        other[0, -1] += 1
        assert not torch.allclose(model.encode(other)[:, 0], encoded[:, 0])


def test_targets_are_shifted_by_one_and_only_once():
    model, tgt = tiny("dec"), ids(1, 6)
    mask = torch.ones_like(tgt, dtype=torch.bool)
    logits, loss = model(None, None, tgt, mask)
    inputs = torch.cat((torch.tensor([[model.config.bos_id]]), tgt[:, :-1]), 1)
    close(logits, model.logits(model.decode(inputs)))
    close(loss, -logits.log_softmax(-1)[0, range(6), tgt[0]].mean())


def test_ignored_targets_have_no_gradient():
    model, src, tgt = tiny("encdec"), ids(2, 10), ids(2, 8)
    mask = torch.rand(2, 8) < 0.5
    logits, loss = model(src, None, tgt, mask)
    logits.retain_grad()
    loss.backward()
    touched = logits.grad.abs().sum(-1) > 0
    assert (touched == mask).all()
    total = model(src, None, tgt, mask, reduction="sum")[1]
    close(total / mask.sum(), loss)


def test_a_batch_without_targets_or_source_is_finite():
    model, src, tgt = tiny("encdec"), ids(2, 10), ids(2, 8)
    src_mask = torch.tensor([[True] * 10, [False] * 10])
    loss = model(src, src_mask, tgt, torch.zeros_like(tgt, dtype=torch.bool))[1]
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model(src, src_mask, tgt, torch.ones_like(tgt, dtype=torch.bool))[1].isfinite()


@pytest.mark.parametrize("longest", [20, 60])  # within the trained length of 24, and past it
@pytest.mark.parametrize("cross_rope", [False, True])
def test_padding_changes_nothing(longest, cross_rope):
    model, lengths = tiny("encdec", cross_rope=cross_rope), [7, longest, 30 if longest > 24 else 3]
    rows = [ids(1, n, seed=n) for n in lengths]
    tgt = ids(3, 9)
    for width in (longest, longest + 13):
        src = torch.stack([torch.cat((row[0], torch.zeros(width - row.size(1), dtype=torch.long))) for row in rows])
        src_mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
        with torch.no_grad():
            batch = model.decode(tgt, model.encode(src, src_mask), src_mask)
            for b, row in enumerate(rows):
                close(batch[b:b + 1], model.decode(tgt[b:b + 1], model.encode(row)), 1e-4)


def test_cross_rope_scores_by_the_distance_between_an_answer_and_its_place_in_the_source():
    """With equal states everywhere, what cross-attention looks at depends on the distance alone: as a float64 loop has it."""
    model = tiny("encdec", n_enc=1, n_dec=1, cross_rope=True)
    seen = []
    model.dec[0].cross.register_forward_hook(lambda module, inputs, kwargs, output: seen.append((inputs, kwargs["rope"])), with_kwargs=True)
    with torch.no_grad():
        encoded = torch.randn(1, 1, 32).expand(1, 9, 32)
        model.decode(ids(1, 5), encoded)
        (x, keys, _), rope = seen[0]
        cross = model.dec[0].cross
        q = M.rotate(cross.q_norm(cross.wq(x[:, :1].expand(1, 5, 32)).unflatten(-1, (4, 16))).transpose(1, 2), rope)
        scores = q[:, ::2] @ keys.mT  # (1, 2, 5, 9)
        q, k = q[0, 0, 0].double(), keys[0, 0, 0].double()  # at distance 0
        for t in range(5):
            for s in range(9):
                close(scores[0, :, t, s], scores[0, :, 0, s - t] if s >= t else scores[0, :, t - s, 0], 1e-4)
                angle = [(t - s) / 10000 ** (i / 8) for i in range(8)]
                by_hand = sum((q[i] * k[i] + q[i + 8] * k[i + 8]) * math.cos(a) + (q[i] * k[i + 8] - q[i + 8] * k[i]) * math.sin(a)
                              for i, a in enumerate(angle))
                close(scores[0, 0, t, s].double(), by_hand, 1e-4)


# --- cache

@pytest.mark.parametrize("arch, cross_rope", [("encdec", False), ("encdec", True), ("dec", False)])
@pytest.mark.parametrize("T", [14, 40])  # trained length 16: below, and with NTK
@pytest.mark.parametrize("chunks", [[1] * 100, [5, 1, 4, 100], [3] * 40])
def test_cached_equals_full_recomputation_at_every_position(arch, cross_rope, T, chunks):
    model, tokens, src = tiny(arch, cross_rope=cross_rope), ids(2, T), ids(2, 11, seed=1)
    src_mask = torch.arange(11)[None] < torch.tensor([[11], [6]])
    with torch.no_grad():
        encoded = model.encode(src, src_mask) if arch == "encdec" else None
        full = model.decode(tokens, encoded, src_mask)
        cache, parts, at = Cache(model, 2, T, encoded, src_mask), [], 0
        for n in chunks:
            if at < T:
                parts.append(model.decode(tokens[:, at:at + n], cache=cache))
                at += n
    close(torch.cat(parts, 1), full, 1e-4)


@pytest.mark.parametrize("arch", ["encdec", "dec"])
def test_left_padded_prompts_in_a_cache_equal_each_alone(arch):
    model, lengths, T = tiny(arch, cross_rope=True), [3, 9, 6], 9
    src = ids(3, 11, seed=1)
    with torch.no_grad():
        encoded = model.encode(src) if arch == "encdec" else None
        rows = [ids(1, n + 4, seed=n) for n in lengths]  # a prompt, then four tokens one by one
        pad = torch.tensor([T - n for n in lengths])
        prompt = torch.stack([torch.cat((torch.zeros(T - n, dtype=torch.long), row[0, :n])) for n, row in zip(lengths, rows)])
        cache = Cache(model, 3, T + 4, encoded, None, pad)
        last = [model.decode(prompt, cache=cache)[:, -1]]
        for step in range(4):
            last.append(model.decode(torch.stack([row[0, n + step] for n, row in zip(lengths, rows)])[:, None], cache=cache)[:, -1])
        for b, (n, row) in enumerate(zip(lengths, rows)):
            alone = model.decode(row, encoded[b:b + 1] if arch == "encdec" else None)
            close(torch.stack([states[b] for states in last]), alone[0, n - 1:], 1e-4)


def test_a_full_cache_says_so():
    model = tiny("dec")
    cache = Cache(model, 1, 4)
    model.decode(ids(1, 3), cache=cache)
    with pytest.raises(ModelError, match="no room"):
        model.decode(ids(1, 2), cache=cache)


# --- generation

def collect(steps, row):
    return [step[row] for step in steps if step[row] is not None]


@pytest.mark.parametrize("arch", ["encdec", "dec"])
@pytest.mark.parametrize("options", [dict(), dict(temperature=0.9, top_k=20, top_p=0.9)])
@pytest.mark.parametrize("new", [8, 40])  # 40 runs past the trained length
def test_a_row_generates_what_it_generates_alone(arch, options, new):
    model = tiny(arch)
    prompts = [ids(n, seed=n).tolist() for n in (5, 12, 2)]
    together = list(model.generate(prompts, new, seed=3, **options))
    for b, prompt in enumerate(prompts):
        alone = list(model.generate([prompt], new, seed=3 + b, **options))
        assert collect(together, b) == collect(alone, 0)


@pytest.mark.parametrize("arch", ["encdec", "dec"])
def test_greedy_equals_argmax_of_the_full_model(arch):
    model, prompt, head = tiny(arch), ids(7).tolist(), ids(3, seed=5).tolist()
    made = collect(list(model.generate([prompt], 6, prefix=[head])), 0)
    with torch.no_grad():
        encoded = model.encode(torch.tensor([prompt])) if arch == "encdec" else None
        sequence = [model.config.bos_id] + ([] if arch == "encdec" else prompt) + head
        for id in made:
            assert model.logits(model.decode(torch.tensor([sequence]), encoded))[0, -1].argmax() == id
            sequence.append(id)


def test_generation_stops_row_by_row_at_end_of_sequence():
    model, prompts = tiny("encdec"), [ids(5, seed=s).tolist() for s in range(6)]
    model.config.eos_id = -1  # no row ends
    free = list(model.generate(prompts, 12))
    model.config.eos_id = free[4][2]  # what row 2 says at its fifth step now ends a row
    steps = list(model.generate(prompts, 12))
    for b in range(6):
        said = [step[b] for step in free]
        wanted = said[:said.index(model.config.eos_id)] if model.config.eos_id in said else said
        assert collect(steps, b) == wanted
    assert len(collect(steps, 2)) <= 4


def test_draws_follow_the_distribution_and_its_cuts():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    rng = [torch.Generator().manual_seed(0)]
    counts = torch.bincount(torch.cat([pick(logits, 0.7, 0, 1.0, rng) for _ in range(4000)]), minlength=4) / 4000
    close(counts, (logits[0] / 0.7).softmax(-1), 0.03)
    assert {int(pick(logits, 1.0, 2, 1.0, rng)) for _ in range(200)} == {0, 1}
    assert {int(pick(logits, 1.0, 0, 0.7, rng)) for _ in range(200)} == {0, 1}  # 0.64 alone is not enough
    assert {int(pick(logits, 1.0, 0, 0.5, rng)) for _ in range(50)} == {0}
    assert int(pick(logits, 0, 0, 1.0, rng)) == 0


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(ModelError, match="token id 97 is outside"):
        next(tiny("dec").generate([[5, 97]], 3))


# --- files

def test_save_and_load(tmp_path):
    model = tiny("encdec", bias=True, qkv_bias=True, mlp="gelu", tied=False)
    model.save(tmp_path)
    again = Transformer.load(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(p, q) for p, q in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert Transformer.load(tmp_path, dtype=torch.bfloat16).embed.weight.dtype == torch.bfloat16


def test_the_file_holds_tied_weights_once(tmp_path):
    model = tiny("dec")
    model.save(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 4 * model.num_params() * 1.02 + 8192


@pytest.mark.parametrize("changes, tensor", [(dict(n_hidden=56), "mlp"), (dict(n_dec=3), "dec.2"), (dict(tied=False), "head.weight"),
                                             (dict(n_enc=0, src_len=0), "cross")])
def test_a_config_that_does_not_fit_the_weights_names_the_tensor(tmp_path, changes, tensor):
    model = tiny("encdec")
    model.save(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    Transformer(Config(**{**vars(model.config), **changes})).save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(ModelError, match=tensor):
        Transformer.load(tmp_path)


def test_damaged_files_are_refused(tmp_path):
    model = tiny("dec")
    model.save(tmp_path)
    path = tmp_path / "model.safetensors"
    good = path.read_bytes()
    for bad, message in [(good[:-100], "truncated"), (b"", "truncated"), (b"x" * 5000, "truncated"),
                         (good[:-1] + bytes([good[-1] ^ 1]), "altered")]:
        path.write_bytes(bad)
        with pytest.raises(ModelError, match=message):
            Transformer.load(tmp_path)
    path.write_bytes(good)
    for bad in ("{", "[]", '{"n_layer": 3}', ""):
        (tmp_path / "config.json").write_text(bad)
        with pytest.raises(ModelError, match="config.json"):
            Transformer.load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match="missing"):
        Transformer.load(tmp_path)


def test_dropout_and_smoothing_are_for_training_alone():
    model = tiny("encdec")
    src, tgt = torch.stack([ids(9), ids(9, seed=1)]), torch.stack([ids(5, seed=2), ids(5, seed=3)])
    mask = torch.ones_like(tgt, dtype=torch.bool)
    plain = model(src, None, tgt, mask)[1]
    for block in [*model.enc, *model.dec]:
        block.dropout = 0.5
    model.loss.label_smoothing, model.word_dropout = 0.1, 0.5
    model.eval()
    close(model(src, None, tgt, mask)[1], plain, 1e-6)
    model.train()
    torch.manual_seed(0)
    first = model(src, None, tgt, mask)[1]
    assert abs(first - model(src, None, tgt, mask)[1]) > 1e-4  # another draw
    torch.manual_seed(0)
    close(model(src, None, tgt, mask)[1], first, 1e-6)
    hidden = (model.embedded(ids(20, 30)) == 0).all(-1)  # whole tokens
    assert 0.4 < hidden.float().mean() < 0.6 and ((model.embedded(ids(20, 30)) == 0).float().mean() < 0.6)
    y = model.dec[0].drop(torch.ones(400, 3, 50))
    assert set(y.unique().tolist()) == {0.0, 2.0} and (y[:, 0] == y[:, 2]).all() and abs(y.mean() - 1) < 0.05
