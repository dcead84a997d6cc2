"""assets/exercises.md: its patches fit the code as it is, and what they make runs."""

import glob
import os
import re
import shutil
import subprocess
import sys

from conftest import ROOT

PATCHES = sorted(glob.glob(os.path.join(ROOT, "assets", "exercises", "*.patch")))
# All of them in one process: importing torch takes longer than these steps.
DRIVER = """
import math, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, "")
import distill, export, model, sample, train

def run(script, words):
    sys.argv = [script.__name__, *words.split()]
    assert not script.main(), words

tiny = "--preset=tiny --max_iters=2 --eval_rows=4 --compile=false --batch_size=2 --device=cpu "
run(train, tiny + "--data=reverse --split=1/3 --out=out/encdec")
config = model.read_config("out/encdec")
assert (config.mlp, config.n_enc, config.n_dec) == ("gelu", 1, 2)
cross = model.Transformer(config).dec[0].cross
assert not torch.equal(cross.wk.weight, cross.wq.weight)
run(train, tiny + "--data=reverse --optimizer=adamw --lr=3e-3 --arch=dec --out=out/dec")
run(train, tiny + "--objective=lines --data=text.txt --tokenizer=bytes --out=out/lines")
run(export, "--run=out/encdec --out=out/onnx")
run(distill, tiny + "--data=reverse --teacher=out/dec --student=tiny --kl=js --out=out/js")
run(sample, "--run=out/onnx --prompt=time --max_new_tokens=2")
p = torch.tensor([[1.0, 0.0], [0.5, 0.5]]).clamp(min=1e-30).log()
js = distill.divergence(p, p.flip(1), "js")
assert torch.allclose(js, torch.tensor([math.log(2), 0.0]), atol=1e-6)
"""


def git(folder, *words):
    env = dict(os.environ, GIT_CEILING_DIRECTORIES=os.path.dirname(folder))
    done = subprocess.run(["git", *words], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_patch_is_told_of_and_fits_and_runs(tmp_path):
    with open(os.path.join(ROOT, "assets", "exercises.md"), encoding="utf-8") as file:
        text = file.read()
    assert re.findall(r"^## (\d)", text, re.M) == list("12345678")
    told = set(re.findall(r"exercises/([\w-]+\.patch)", text))
    assert told == {os.path.basename(patch) for patch in PATCHES} and len(told) == 7
    for name in ("data", "lib", *glob.glob("*.py", root_dir=ROOT)):  # a copy without .git
        copy = shutil.copytree if os.path.isdir(os.path.join(ROOT, name)) else shutil.copy
        copy(os.path.join(ROOT, name), tmp_path / name)
    for patch in PATCHES:
        git(tmp_path, "apply", "--check", patch)
    git(tmp_path, "apply", *PATCHES)
    (tmp_path / "text.txt").write_text("one line\nand another one\n\n" * 200)
    words = [sys.executable, "-c", DRIVER]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    # The loop of the first one needs model.py alone.
    os.mkdir(tmp_path / "alone")
    shutil.copy(os.path.join(ROOT, "model.py"), tmp_path / "alone")
    loop = (tmp_path / "loop.py").read_text().replace("301", "101")
    (tmp_path / "alone" / "loop.py").write_text(f"import torch\ntorch.set_num_threads(1)\n{loop}")
    words = dict(cwd=tmp_path / "alone", capture_output=True, text=True)
    done = subprocess.run([sys.executable, "loop.py"], **words)
    assert float(re.search(r"step 100: loss (\S+),", done.stdout)[1]) < 2.5, done.stderr
