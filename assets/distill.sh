#!/bin/bash
# The distillation figures but 15's: the teachers (an hour each, on one core), the comparison, the
# ablation. What is in the results files already is not run again. CODEXGLUE names a local copy of
# the data set: CODEXGLUE=codexglue:FOLDER bash assets/distill.sh [--device=cuda]
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
codexglue=${CODEXGLUE:-codexglue}
train() { # a run that is there stays, one that was cut off goes on
    out=$1
    shift
    # Before its first checkpoint, there is nothing to go on with.
    [ -e "$out/train_state.pt" ] && set -- --init_from=resume || rm -rf "$out"
    $python train.py --out="$out" "$@"
}

train out/encdec-nano-pycode --arch=encdec
train out/teacher-codexglue --arch=dec --preset=mini --data="$codexglue" --vocab_size=4096 \
    --tgt_len=512 --batch_size=5 --max_iters=1500 --eval_interval=500 --eval_rows=128 \
    --word_dropout=0.1 --compile=true "$@"
train out/dec-mini-pycode-full --arch=dec --preset=mini --data=pycode-full \
    --tokenizer=out/encdec-nano-pycode --src_len=192 --tgt_len=64 --max_iters=1700 \
    --eval_interval=425 --eval_rows=64 --compile=true "$@"
train out/teacher-docstring --init_from=out/dec-mini-pycode-full --data=docstring --batch_size=8 \
    --lr=3e-3 --embed_lr=2e-3 --max_iters=450 --eval_interval=150 --eval_rows=145 \
    --compile=true "$@"

# Decoder-only and 2/3, each with cross-entropy alone and distilled, on equal steps and minutes.
compare() {
    $python bench.py compare --archs=dec,2/3 --max_iters=900 --max_minutes=3.5 \
        --distill='--alpha=0.5 --kl=forward --sequences=data' --eval_split=test "$@"
}
compare --data=docstring --teacher=out/teacher-docstring --results=assets/kd-docstring.jsonl "$@"
rows='--tgt_len=512 --batch_size=5 --eval_interval=250'
compare --data="$codexglue" --teacher=out/teacher-codexglue --results=assets/kd-codexglue.jsonl \
    --train="$rows" "$@"

# The ablation, whose settings are chosen on val.
$python bench.py distill --data="$codexglue" --teacher=out/teacher-codexglue --max_iters=500 \
    --results=assets/distill-codexglue.jsonl --train="$rows" "$@"
