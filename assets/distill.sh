#!/bin/bash
# Every distillation figure of the README: the teachers (52 and 50 minutes, each on one core), the comparison (an hour a task), the ablation. What is in the
# results files already is not run again. CODEXGLUE names a local copy of the data set: CODEXGLUE=codexglue:FOLDER bash assets/distill.sh [--device=cuda]
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
codexglue=${CODEXGLUE:-codexglue}
run() { [ -e "$1/loss.png" ] || $python train.py --out="$@"; }  # a run that is there stays

run out/encdec-nano-pycode --arch=encdec
run out/teacher-codexglue --arch=dec --preset=mini --data=$codexglue --vocab_size=4096 --tgt_len=512 --batch_size=5 --max_iters=1500 --eval_interval=500 --eval_rows=128 \
    --word_dropout=0.1 --compile=true "$@"
run out/dec-mini-pycode-full --arch=dec --preset=mini --data=pycode-full --tokenizer=out/encdec-nano-pycode --decontaminate=docstring --src_len=192 --tgt_len=64 \
    --max_iters=1700 --eval_interval=425 --eval_rows=64 --compile=true "$@"
run out/teacher-docstring --arch=dec --init_from=out/dec-mini-pycode-full --data=docstring-full --batch_size=8 --lr=3e-3 --embed_lr=2e-3 --max_iters=450 --eval_interval=150 \
    --eval_rows=145 --compile=true "$@"
