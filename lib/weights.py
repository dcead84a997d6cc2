"""Models of others, in this project's words: what their config.json says, and what their weights are called. Needs no torch.

The Llama family, decoder-only: Llama 2 and 3, SmolLM2 and Mistral (model_type llama, mistral), Qwen2 and 2.5 (qwen2: biases of query, key and value), Qwen3 (qwen3: norms of
query and key, heads of any size), Phi-3 and 3.5 (phi3: fused projections, two sets of RoPE factors). And the released model of the paper, in both of its forms.
"""

import glob
import json
import math
import os

from lib.settings import UserError

FAMILIES = {
    "llama": {},
    "mistral": {},
    "qwen2": dict(qkv_bias=True),
    "qwen3": dict(qk_norm=True),
    "phi3": dict(qkv_bias=False),
}
ROPES = ("default", "linear", "llama3", "longrope")
PREFIXES = ("hf:", "mu:")


def local_folder(name, where, patterns=("*.json", "model*.safetensors")):
    """The folder of a model: `name` itself, or, where it is an id of the Hub, what is downloaded from there."""
    if os.path.isdir(name):
        return name
    if name.count("/") != 1 or name[0] in "./~":
        raise UserError(f"{where}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=["*/*"])
    except (
        Exception
    ) as error:  # no network, no such model: the library and those below it raise their own kinds
        raise UserError(
            f"{where} could not be reached ({type(error).__name__}); give a local folder with config.json and model.safetensors"
        ) from None


def read_about(folder, where):
    """The config.json of a folder."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
            about = json.load(f)
        if not isinstance(about, dict):
            raise ValueError("it holds no names")
        return about
    except FileNotFoundError:
        raise UserError(f"{where} has no config.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: its config.json cannot be read ({error})") from None


def weight_files(folder, where):
    """The safetensors files of a folder, all that its index names."""
    index = os.path.join(folder, "model.safetensors.index.json")
    if os.path.exists(index):
        try:
            with open(index, encoding="utf-8") as f:
                names = sorted(set(json.load(f)["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{index} cannot be read ({error})") from None
        files = [os.path.join(folder, name) for name in names]
        if missing := [file for file in files if not os.path.exists(file)]:
            raise UserError(
                f"{where}: {len(missing)} of its {len(files)} shards {'is' if len(missing) == 1 else 'are'} missing, the first is {os.path.basename(missing[0])}"
            )
        return files
    if os.path.exists(single := os.path.join(folder, "model.safetensors")):
        return [
            single
        ]  # what else lies there is something else: an adapter, the same in another form
    files = sorted(glob.glob(os.path.join(glob.escape(folder), "*.safetensors")))
    if not files:
        pickled = glob.glob(os.path.join(glob.escape(folder), "*.bin"))
        raise UserError(
            f"{where} has no .safetensors file"
            + (
                "; pytorch_model.bin can run code when it is read and is not taken: convert it"
                if pickled
                else ""
            )
        )
    return files


# ---------------------------------------------------------------------------------------------------------------------
# The Llama family


def config_of(about, where):
    """config.json -> the fields of our Config, but for the ids, which are the tokenizer's. UserError naming what is not supported."""
    kind = about.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"{where} is of model_type {kind}; supported are {', '.join(FAMILIES)}")
    if about.get("quantization_config"):
        raise UserError(f"{where} holds quantized weights; take the model they were made from")
    if (act := about.get("hidden_act", "silu")) != "silu":
        raise UserError(f"{where} has hidden_act {act}; supported is silu")
    if about.get("mlp_bias"):
        raise UserError(
            f"{where} has biases in its MLPs (mlp_bias), which {kind} has no place for here"
        )
    try:
        n_embd, n_head = int(about["hidden_size"]), int(about["num_attention_heads"])
        head_dim = int(about.get("head_dim") or n_embd // n_head)
        length = int(about["max_position_embeddings"])
        shape = dict(
            vocab_size=int(about["vocab_size"]),
            n_dec=int(about["num_hidden_layers"]),
            n_embd=n_embd,
            n_head=n_head,
            n_kv_head=int(about.get("num_key_value_heads") or n_head),
            head_dim=head_dim,
            n_hidden=int(about["intermediate_size"]),
            norm_eps=float(about.get("rms_norm_eps", 1e-6)),
        )
        rope, length = rope_of(about, head_dim, length, where)
    except KeyError as error:
        raise UserError(f"{where}: its config.json lacks {error.args[0]}") from None
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{where}: its config.json cannot be used ({error})") from None
    window = (
        about.get("sliding_window")
        if kind != "qwen2" and kind != "qwen3" or about.get("use_sliding_window")
        else None
    )
    length = (
        min(length, int(window)) if window else length
    )  # within its window, sliding attention is attention
    dialect = dict(qk_norm=False, qkv_bias=bool(about.get("attention_bias"))) | FAMILIES[kind]
    return dict(
        n_enc=0,
        src_len=0,
        tgt_len=length,
        embed_scale=1.0,
        bias=False,
        mlp="swiglu",
        **shape,
        **rope,
        **dialect,
    )


def rope_of(about, head_dim, length, where):
    """-> (the Config fields of RoPE, the trained length). transformers 4 writes rope_theta and rope_scaling, transformers 5 rope_parameters."""
    rope = about.get("rope_parameters") or about.get("rope_scaling") or {}
    theta, kind = (
        float(rope.get("rope_theta") or about.get("rope_theta") or 10000.0),
        rope.get("rope_type") or rope.get("type") or "default",
    )
    kind = "longrope" if kind == "su" else kind  # the name it had first
    if kind not in ROPES:
        raise UserError(f"{where} has RoPE of the kind {kind}; supported are {', '.join(ROPES)}")
    if (share := rope.get("partial_rotary_factor") or about.get("partial_rotary_factor") or 1) != 1:
        raise UserError(
            f"{where} rotates a share of {share} of each head (partial_rotary_factor); supported is all of it"
        )
    found = dict(rope_theta=theta)
    if kind == "linear":
        found["rope_factors"] = [float(rope["factor"])] * (head_dim // 2)
    if (
        kind == "llama3"
    ):  # long waves are stretched by `factor`, short ones not, those between by a share of it
        low, high, old = (
            float(rope[name])
            for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        )
        turns = [
            old / (2 * math.pi * theta ** (2 * i / head_dim)) for i in range(head_dim // 2)
        ]  # of each frequency within the first length
        shares = [min(1.0, max(0.0, (turn - low) / (high - low))) for turn in turns]
        found["rope_factors"] = [
            1 / ((1 - share) / float(rope["factor"]) + share) for share in shares
        ]
    if kind == "longrope":
        old = int(
            rope.get("original_max_position_embeddings")
            or about.get("original_max_position_embeddings")
            or length
        )
        factor = length / old if old != length else float(rope.get("factor") or 1)
        scale = rope.get("attention_factor") or (
            math.sqrt(1 + math.log(factor) / math.log(old)) if factor > 1 else 1.0
        )
        found |= dict(
            rope_factors=list(map(float, rope["short_factor"])),
            rope_long=list(map(float, rope["long_factor"])),
            rope_scale=float(scale),
        )
        length = old
    return found, length


def llama_names(cfg, fused):
    """Our names of the weights -> (theirs, (first, last) of its rows or None for all of them). `fused`: as Phi-3 lays them out."""
    names = {
        "embed.weight": ("model.embed_tokens.weight", None),
        "dec_norm.weight": ("model.norm.weight", None),
        "head.weight": ("lm_head.weight", None),
    }
    ends = (
        cfg.head_dim * cfg.n_head,
        cfg.head_dim * (cfg.n_head + cfg.n_kv_head),
        cfg.head_dim * (cfg.n_head + 2 * cfg.n_kv_head),
    )
    for i in range(cfg.n_dec):
        ours, theirs = f"dec.{i}.", f"model.layers.{i}."
        names |= {
            ours + "attn_norm.weight": (theirs + "input_layernorm.weight", None),
            ours + "mlp_norm.weight": (theirs + "post_attention_layernorm.weight", None),
            ours + "attn.wo.weight": (theirs + "self_attn.o_proj.weight", None),
            ours + "mlp.down.weight": (theirs + "mlp.down_proj.weight", None),
        }
        if fused:
            names |= {
                f"{ours}attn.w{x}.weight": (theirs + "self_attn.qkv_proj.weight", rows)
                for x, rows in zip("qkv", zip((0, *ends), ends))
            }
            names |= {
                f"{ours}mlp.{x}.weight": (theirs + "mlp.gate_up_proj.weight", rows)
                for x, rows in (
                    ("gate", (0, cfg.n_hidden)),
                    ("up", (cfg.n_hidden, 2 * cfg.n_hidden)),
                )
            }
        else:
            names |= {
                f"{ours}attn.w{x}.{part}": (f"{theirs}self_attn.{x}_proj.{part}", None)
                for x in "qkv"
                for part in ("weight", "bias")
            }
            names |= {
                f"{ours}attn.{x}_norm.weight": (f"{theirs}self_attn.{x}_norm.weight", None)
                for x in "qk"
            }
            names |= {
                f"{ours}mlp.{x}.weight": (f"{theirs}mlp.{x}_proj.weight", None)
                for x in ("gate", "up")
            }
    return names


def about_of(config):
    """The config.json of the Llama family that computes what a decoder-only Config does; UserError where there is none."""
    if config.n_enc:
        raise UserError(
            "no class of transformers computes what this encoder-decoder does: the nearest, T5Gemma, has a norm behind every part of a layer, too, which no choice of weights "
            "undoes. Decoder-only runs can be written; an encoder-decoder leaves as ONNX (--format=onnx)"
        )
    if config.mlp != "swiglu" or config.bias or config.head_bias:
        raise UserError(
            "no class of the Llama family has this run's "
            + ("MLP (gelu)" if config.mlp != "swiglu" else "biases")
        )
    if config.image_id >= 0:
        raise UserError("a run with pictures has no class in the Llama family")
    about = dict(
        hidden_size=config.n_embd,
        num_hidden_layers=config.n_dec,
        num_attention_heads=config.n_head,
        num_key_value_heads=config.n_kv_head,
        head_dim=config.head_dim,
        intermediate_size=config.n_hidden,
        vocab_size=config.vocab_size,
        rms_norm_eps=config.norm_eps,
        max_position_embeddings=config.tgt_len,
        rope_theta=config.rope_theta,
        hidden_act="silu",
        attention_dropout=0.0,
        initializer_range=0.02,
        use_cache=True,
        bos_token_id=config.bos_id,
        eos_token_id=config.eos_id,
        pad_token_id=config.pad_id,
    )
    if config.rope_factors:  # of whatever kind they were: longrope says them one by one
        about["rope_scaling"] = dict(
            rope_type="longrope",
            short_factor=config.rope_factors,
            long_factor=config.rope_long or config.rope_factors,
            attention_factor=config.rope_scale,
            original_max_position_embeddings=config.tgt_len,
        )
    if config.qk_norm:  # with qkv_bias, too: Qwen3's attention_bias has one of the output as well, which is written as zero
        return about | dict(
            model_type="qwen3",
            architectures=["Qwen3ForCausalLM"],
            attention_bias=config.qkv_bias,
            use_sliding_window=False,
        )
    if config.qkv_bias:
        return about | dict(
            model_type="qwen2", architectures=["Qwen2ForCausalLM"], use_sliding_window=False
        )
    return about | dict(
        model_type="llama", architectures=["LlamaForCausalLM"], attention_bias=False, mlp_bias=False
    )


# ---------------------------------------------------------------------------------------------------------------------
# The paper's released model (microsoft/encoder-decoder-slm): `Mu`


def mu_names(n_enc, n_dec):
    """Our names of the weights -> Mu's."""
    names = {
        "embed.weight": "transformer.wte.weight",
        "enc_norm.weight": "transformer.ln_e.weight",
        "dec_norm.weight": "transformer.ln_f.weight",
    }
    attention, mlp = (
        dict(wq="q_linear", wk="k_linear", wv="v_linear", wo="out_linear"),
        {"mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"},
    )
    parts = {f"attn.{ours}": f"attn.{theirs}" for ours, theirs in attention.items()} | mlp
    both = (
        {f"attn.{ours}": f"causal_attn.{theirs}" for ours, theirs in attention.items()}
        | {f"cross.{ours}": f"cross_attn.{theirs}" for ours, theirs in attention.items()}
        | mlp
    )
    for stack, n, theirs, found, norms in (
        ("enc", n_enc, "e", parts, ("attn_norm", "mlp_norm")),
        ("dec", n_dec, "h", both, ("attn_norm", "cross_norm", "mlp_norm")),
    ):
        for i in range(n):
            names |= {
                f"{stack}.{i}.{a}.{part}": f"transformer.{theirs}.{i}.{b}.{part}"
                for a, b in found.items()
                for part in ("weight", "bias")
            }
            names |= {
                f"{stack}.{i}.{norm}.weight": f"transformer.{theirs}.{i}.ln{k + 1}.weight"
                for k, norm in enumerate(norms)
            }
    return names
