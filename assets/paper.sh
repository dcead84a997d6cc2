#!/bin/bash
# The paper's comparison in small: equal pretraining, then tasks, for a decoder-only model, a prefix
# LM and three encoder-decoders of 2.2 M parameters whose splits are exact thirds. Runs are by steps,
# one thread each, so that a busy machine changes nothing; what is finished is not run again.
#
#     bash assets/paper.sh rates               each kind's own search of the pretraining rate
#     bash assets/paper.sh pretrain dec 2/3    these kinds
#     bash assets/paper.sh search TASK         each kind's own search of the task's rate, on val
#     bash assets/paper.sh compare TASK        after pretraining, at the rates of RATES_TASK
#     bash assets/paper.sh scratch TASK        without it
#
# TASK is docstring or codexglue, whose rows ROWS=folder gives. Rows go to assets/paper-*.jsonl.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
preset=thin
common="--threads=1"
stage=${1:-}
shift || true
mkdir -p out

arch_of() {
    case $1 in
        */*) echo "--arch=encdec --split=$1" ;;
        *) echo "--arch=$1" ;;
    esac
}

# Pretraining: one row of assets/paper-pretraining.jsonl a run. The rate of embeddings is 0.4 of the
# matrices'.
pretrain() {
    kind=$1 rate=$2 steps=$3 out=$4
    rows=assets/paper-pretraining.jsonl
    [ -f "$out/done" ] && return
    extra="--init_from=resume"
    if [ ! -f "$out/train_state.pt" ]; then
        rm -rf "$out"
        extra="$(arch_of "$kind") --preset=$preset --data=pycode-full --lr=$rate
            --embed_lr=$($python -c "print(round($rate * 0.4, 6))") --max_iters=$steps
            --eval_rows=512 --compile=true"
    fi
    $python train.py $extra $common --out="$out"
    $python - "$kind" "$rate" "$steps" "$out" >>"$rows" <<'END'
import json
import sys

kind, rate, steps, out = sys.argv[1:]
with open(f"{out}/log.jsonl") as file:
    rows = [json.loads(line) for line in file]
last = [row for row in rows if "val_loss" in row][-1]
row = dict(arch=kind, lr=float(rate), steps=int(steps), tokens_m=round(last["tokens"] / 1e6, 2))
print(json.dumps(row | {key: round(x, 4) for key, x in last.items() if "val" in key or "bits" in key}))
END
    touch "$out/done"
}

# Rates that the searches chose.
declare -A pretraining_rate=([dec]=1e-2 [prefix]=1e-2 [1/3]=1e-2 [1/2]=1e-2 [2/3]=1e-2)
RATES_docstring=""
RATES_codexglue=""

compare() {
    task=$1 data=$1
    shift
    [ "$task" = codexglue ] && data="codexglue:${ROWS:?the folder of CodeXGLUE rows}"
    $python bench.py compare --data="$data" --preset=$preset $common "$@"
}

case $stage in
    rates)
        for rate in 5e-3 1e-2 2e-2; do
            for kind in "${@:-dec}"; do
                pretrain "$kind" "$rate" 300 "out/rate-${kind/\//}-$rate"
            done
        done
        ;;
    pretrain)
        for kind in "$@"; do
            pretrain "$kind" "${pretraining_rate[$kind]}" "${STEPS:-2500}" "out/pre-${kind/\//}"
        done
        ;;
esac
