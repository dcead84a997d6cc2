"""The paper's released model, microsoft/encoder-decoder-slm, as a run.

    python assets/from_mu.py --file=CHECKPOINT.pt --tokenizer=tokenizer.json --out=RUN

Its dialect: GELU, biases everywhere, heads narrower than the width, and query heads in another
order. It was trained on SQuAD with a prompt of its own, not that of `--data=squad`: the released
src/mu/generate_text2text.py has it, and `sample.py --prompt=...` takes it. Up to block_size tokens
a run says what the checkpoint says. Past it our RoPE is stretched by length / block_size. Theirs is
stretched only where rope_factor is above 1, by 1 + rope_factor * (length / block_size - 1).
"""

import os
import pickle
import sys
import tempfile
from dataclasses import dataclass

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from export import write_run  # noqa: E402
from lib.settings import UserError, read_settings, script, setting  # noqa: E402
from lib.weights import assembled, layer_names  # noqa: E402
from model import Config  # noqa: E402


@dataclass
class Settings:
    file: str = setting(None, "the checkpoint")
    out: str = setting(None, "a folder that does not exist yet")
    tokenizer: str = setting(None, "a tokenizer.json [the one beside the checkpoint]")


def mu_names(n_enc, n_dec):
    names = {"embed.weight": "transformer.wte.weight", "enc_norm.weight": "transformer.ln_e.weight"}
    names["dec_norm.weight"] = "transformer.ln_f.weight"
    mlp, linear = {"mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}, dict(q="q", k="k", v="v", o="out")
    encoder = mlp | {"attn_norm": "ln1", "mlp_norm": "ln2"}
    decoder = mlp | {"attn_norm": "ln1", "cross_norm": "ln2", "mlp_norm": "ln3"}
    for ours, theirs in linear.items():
        encoder[f"attn.w{ours}"] = f"attn.{theirs}_linear"
        decoder[f"attn.w{ours}"] = f"causal_attn.{theirs}_linear"
        decoder[f"cross.w{ours}"] = f"cross_attn.{theirs}_linear"
    names |= layer_names("enc", "transformer.e", n_enc, encoder)
    return names | layer_names("dec", "transformer.h", n_dec, decoder)


def load_mu(path, where):
    """The released checkpoint: model_state_dict and, in newer ones, model_config. Of two query
    heads in a group the second stands behind all groups, so the heads are put into our order."""
    try:
        if not os.path.isfile(path):  # a pipe would wait for its writer
            raise FileNotFoundError("missing or no plain file")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        about = dict(n_head=6, n_kv_head=3, block_size=1024, rope_theta=10000)
        about |= state.get("model_config") or {}
        tensors = {key.split("_orig_mod.")[-1]: t for key, t in state["model_state_dict"].items()}
        enc, dec = ({k.split(".")[2] for k in tensors if f"transformer.{x}." in k} for x in "eh")
        words, n_head, n_kv = tensors["transformer.wte.weight"], about["n_head"], about["n_kv_head"]
        head_dim = len(tensors["transformer.e.0.attn.q_linear.bias"]) // n_head
        n_hidden, length = len(tensors["transformer.e.0.mlp.fc1.bias"]), about["block_size"]
        shape = len(words), len(enc), len(dec), words.size(1), n_head, n_kv, head_dim, n_hidden
        dialect = dict(mlp="gelu", bias="all", qk_norm=False)
        dialect |= dict(rope_theta=float(about["rope_theta"]))
        config = Config(*shape, src_len=length, tgt_len=length, **dialect).check()
        if torch.equal(tensors.get("lm_head.weight", words), words):
            tensors.pop("lm_head.weight", None)  # tied, as the paper's is
        order = torch.arange(n_head)  # ours -> theirs
        order = order if about.get("is_interleaved") else order.view(-1, n_kv).T.flatten()
        for key, t in tensors.items():
            if ".q_linear." in key:
                tensors[key] = t.unflatten(0, (n_head, -1))[order].flatten(0, 1)
            elif key.endswith("out_linear.weight"):
                tensors[key] = t.unflatten(1, (n_head, -1))[:, order].flatten(1)
    except pickle.UnpicklingError:
        raise UserError(f"{where} asks for code to be run when it is read: refused") from None
    except Exception as error:  # torch.load and a stranger's dict raise many kinds
        raise UserError(f"{where} holds no model of the paper's code ({error})"[:300]) from None
    names = mu_names(config.n_enc, config.n_dec)
    return assembled(config, tensors, names, where), os.path.dirname(path) or "."


def main():
    cfg = read_settings(Settings, __doc__)
    if not cfg.file or not cfg.out:
        raise UserError("--file=CHECKPOINT and --out=RUN are missing")
    if os.path.lexists(cfg.out):
        raise UserError(f"--out={cfg.out} exists: choose another")
    parent = os.path.dirname(os.path.abspath(cfg.out))
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=parent) as fresh:
        new = os.path.join(fresh, "new")  # what is half written is never at `out`
        write_run(*load_mu(cfg.file, f"--file={cfg.file}"), cfg.file, new, cfg.tokenizer)
        os.rename(new, cfg.out)
    print(f'python sample.py --run={cfg.out} --prompt="..." talks to it')


if __name__ == "__main__":
    script(main)
