"""A decoder-only run as a folder for `transformers`, with its tokenizer.

    python assets/to_hf.py --run=RUN --out=FOLDER

The folder is of the class of the Llama family that computes the same: llama, qwen2 with biases of
query, key and value, or qwen3 with norms of query and key. An encoder-decoder has no class there.
"""

import json
import os
import sys
from dataclasses import dataclass

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Foreign

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from data.tokenizer import letters_of_bytes, load_tokenizer  # noqa: E402
from lib.runs import newest_run  # noqa: E402
from lib.settings import UserError, read_settings, script, setting  # noqa: E402
from lib.weights import FIELDS, llama_names  # noqa: E402
from model import Transformer  # noqa: E402


@dataclass
class Settings:
    run: str = setting(None, "a decoder-only run folder [the newest run]")
    out: str = setting(None, "a folder that does not exist yet [RUN-hf]")
    dtype: str = setting("float32", "of the weights", ("float32", "float16", "bfloat16"))


def merges_of(ranks):
    """The pairs that make each token of a byte-pair vocabulary, in order of rank: what GPT-2's way
    of writing one down has in place of ranks."""
    rank_of, merges = {token: rank for rank, token in enumerate(ranks)}, []
    for rank, token in enumerate(ranks):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:  # as encoding goes, with the tokens that come before this one
            made = [rank_of.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            best = made.index(min(made))
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append(tuple(parts))
    return merges


def to_foreign(tokenizer, bos_id):
    """(tokenizer.json, tokenizer_config.json), as texts, by which `tokenizers` and `transformers`
    give the same ids; bos_id comes before every text, unless it is -1."""
    if tokenizer.kind == "hf":
        foreign = Foreign.from_str(tokenizer.source)
    else:
        letters = letters_of_bytes()

        def spell(token):
            return "".join(letters[byte] for byte in token)

        vocabulary = {spell(token): i for i, token in enumerate(tokenizer.ranks)}
        merges = [(spell(one), spell(two)) for one, two in merges_of(tokenizer.ranks)]
        foreign = Foreign(models.BPE(vocabulary, merges))
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        if tokenizer.pattern:
            steps.insert(0, pre_tokenizers.Split(Regex(tokenizer.pattern), "isolated"))
        foreign.pre_tokenizer = pre_tokenizers.Sequence(steps)
        foreign.decoder = decoders.ByteLevel()
    for i in range(tokenizer.n_text, tokenizer.vocab_size):
        name = tokenizer.name_of(i)
        if foreign.token_to_id(name) is not None:
            name = f"<nanoencdec {name[1:]}"
        foreign.add_special_tokens([AddedToken(name, special=True, normalized=False)])
    piece_of, last = foreign.id_to_token, tokenizer.vocab_size - 1
    if foreign.get_vocab_size() != last + 1 or piece_of(last) is None:
        raise UserError("the special ids of this tokenizer have no place: its own ids have holes")
    if bos_id >= 0:
        bos = piece_of(bos_id)
        foreign.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, bos_id)]
        )
    names = {f"{name}_token": piece_of(getattr(tokenizer, name)) for name in ("eos", "pad", "sep")}
    about = dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False)
    about |= names | (dict(bos_token=piece_of(bos_id)) if bos_id >= 0 else {})
    return foreign.to_str(), json.dumps(about | dict(model_max_length=10**9), indent=1)


def write_hf(run, folder, dtype=torch.float32):
    """A decoder-only run as a folder for `transformers`, of the class that computes the same."""
    model, tokenizer = Transformer.load(run), load_tokenizer(f"{run}/")
    cfg, names = model.config, llama_names(model.config)
    if cfg.n_enc or cfg.src_len or cfg.mlp != "swiglu" or cfg.bias == "all":
        raise UserError(f"{run}: no class of the Llama family computes what it does")
    kind = {(False, "none"): "llama", (False, "qkv"): "qwen2"}.get((cfg.qk_norm, cfg.bias), "qwen3")
    about = {theirs: getattr(cfg, ours) for ours, theirs in FIELDS.items()}
    about |= dict(model_type=kind, architectures=[f"{kind.capitalize()}ForCausalLM"])
    # embed_scale becomes part of the embedding alone, which the head is then no longer.
    about |= dict(attention_bias=kind == "qwen3" and cfg.bias == "qkv", tie_word_embeddings=False)
    about |= dict(bos_token_id=cfg.bos_id, eos_token_id=cfg.eos_id, pad_token_id=cfg.pad_id)
    state = {names[ours]: p.detach() for ours, p in model.named_parameters()}
    state["lm_head.weight"] = (model.head or model.embed).weight.detach()
    state["model.embed_tokens.weight"] = model.embed.weight.detach() * model.embed_scale
    for i in range(cfg.n_dec if about["attention_bias"] else 0):  # Qwen3's output has one, too
        state[f"model.layers.{i}.self_attn.o_proj.bias"] = torch.zeros(cfg.n_embd)
    state = {name: tensor.to(dtype).contiguous() for name, tensor in state.items()}
    texts = *to_foreign(tokenizer, cfg.bos_id), json.dumps(about, indent=1)
    os.makedirs(folder)
    save_file(state, os.path.join(folder, "model.safetensors"), dict(format="pt"))
    for name, text in zip(("tokenizer.json", "tokenizer_config.json", "config.json"), texts):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            file.write(text)


def main():
    cfg = read_settings(Settings, __doc__)
    cfg.run = (cfg.run or newest_run()).rstrip("/")
    cfg.out = cfg.out or f"{cfg.run}-hf"
    if os.path.lexists(cfg.out):
        raise UserError(f"--out={cfg.out} exists: choose another")
    write_hf(cfg.run, cfg.out, getattr(torch, cfg.dtype))
    print(f"AutoModelForCausalLM.from_pretrained({cfg.out!r}) computes what {cfg.run} does")


if __name__ == "__main__":
    script(main)
