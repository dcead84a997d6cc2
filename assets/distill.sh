#!/bin/bash
# Every distillation figure of the README: the teachers (51 and 60 minutes, each on one core), the comparison (an hour a task), going on, the race, the ablation. What is in the
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

# In the same minutes: decoder-only and 2/3, each with cross-entropy alone and distilled.
compare() { $python bench.py compare --archs=dec,2/3 --max_minutes=3.5 --seeds=3 --distill='--alpha=0.5 --kl=forward --sequences=data' "$@"; }
compare --data=docstring --teacher=out/teacher-docstring --eval_split=test --results=assets/compare-docstring.jsonl --train='--tokenizer=out/encdec-nano-pycode' "$@"
compare --data=$codexglue --teacher=out/teacher-codexglue --results=assets/compare-codexglue.jsonl --train='--vocab_size=4096 --tgt_len=512 --batch_size=5 --eval_interval=250' "$@"

# The fourth line of the table: cross-entropy alone, for as long as a single distilled run and the reading of its teacher.
$python bench.py compare --data=docstring --archs=2/3 --seeds=1 --max_minutes=6.25 --eval_split=test --results=assets/compare-docstring.jsonl --train='--tokenizer=out/encdec-nano-pycode' "$@"
# Students that go on: those of the comparison, from the folder of its results.
students=assets/compare-codexglue first=7e1b  # what cross-entropy's folders end with: a hash of the settings above
on='--tgt_len=512 --batch_size=5 --lr=5e-3 --embed_lr=2e-3 --threads=1'
$python bench.py compare --data=$codexglue --teacher=out/teacher-codexglue --archs=2/3 --max_minutes=2.5 --seeds=3 --distill='--alpha=0.5 --kl=forward --sequences=data' \
    --results=assets/compare-codexglue-on.jsonl --train="--init_from=$students/nano-{arch}-{seed}-$first $on --eval_interval=1000" "$@"
# On-policy against fixed answers: the curves are in out/race-*/log.jsonl.
race() { [ -e out/race-$1/loss.png ] || $python distill.py --teacher=out/teacher-codexglue --data=$codexglue --student=$students/nano-23-1-$first $on --max_minutes=4 --eval_interval=40 \
    --eval_rows=128 --seed=1 --out=out/race-$1 "${@:2}"; }
race none --alpha=0 "$@"
race data --alpha=0.5 --kl=forward --sequences=data "$@"
race teacher --alpha=0.5 --kl=forward --sequences=teacher "$@"
race student --alpha=0.5 --kl=forward --sequences=student "$@"
race reverse --alpha=0.5 --kl=reverse --sequences=student "$@"

# The ablation.
$python bench.py distill --data=$codexglue --teacher=out/teacher-codexglue --kls=forward,reverse --max_minutes=2 --results=assets/distill-codexglue.jsonl \
    --plot=assets/distill-codexglue.png --train='--vocab_size=4096 --tgt_len=512 --batch_size=5 --eval_interval=250' "$@"

# What an on-policy step costs: the share of `writing_s` in out/step/log.jsonl.
[ -e out/rows.jsonl ] || $python - > out/rows.jsonl <<'X'
import glob, json, sysconfig
text = "".join(open(f, encoding="utf-8", errors="ignore").read() for f in sorted(glob.glob(sysconfig.get_paths()["stdlib"] + "/*.py")))
for i in range(0, 2000 * 1600, 1600):
    print(json.dumps(dict(source=text[i:i + 1200], target=text[i + 1200:i + 1600])))
X
shape="--data=out/rows.jsonl --src_len=256 --tgt_len=64 --batch_size=32 --eval_rows=8"
run out/step-teacher --arch=dec --preset=small --objective=seq2seq $shape --max_iters=1 "$@"
[ -e out/step ] || $python distill.py --student=small --teacher=out/step-teacher $shape --max_iters=10 --compile=true --out=out/step "$@"
