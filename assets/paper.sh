#!/bin/bash
# The paper's comparison in small: equal pretraining, then tasks, for a decoder-only model, a prefix
# LM and three encoder-decoders of 2.2 M parameters whose splits are exact thirds. Runs are by
# steps, one thread each, so that a busy machine changes nothing. What is finished is not run again.
# JOBS=all starts all runs of the first two stages at once, for a GPU. ARCHS, SEEDS and STEPS bound
# a comparison, GRID holds the rates of a search, and TUNE gives runs on a task more keys, such as
# 2/3:--cross_rope=true.
#
#     bash assets/paper.sh rates dec 2/3       their own searches of the pretraining rate
#     bash assets/paper.sh pretrain dec 2/3    these kinds
#     bash assets/paper.sh search TASK         each kind's own search of the task's rate, on val
#     bash assets/paper.sh compare TASK        after pretraining, at the rates that the search chose
#     bash assets/paper.sh scratch TASK        without it
#     bash assets/paper.sh teacher TASK        a decoder-only model of 6 M, pretrained, then tuned
#     bash assets/paper.sh ablation TASK       ways to distil it into 2/3, on val: alpha, tau ...
#     bash assets/paper.sh distil TASK         all kinds but the prefix LM, with the keys in DISTIL
#
# TASK is docstring, of all Python source on this machine, or codexglue or multi30k, of the files in
# the folder ROWS: half of what they hold out is its val, the other half its test. Results go to
# out/paper-*.jsonl; those of results.md lie in assets/.
set -eu
shopt -s inherit_errexit # a failure inside $(...) ends the script, too
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
preset=${PRESET:-thin}
text=${TEXT:-pycode-full}
jobs=${JOBS:-1} # 1, or all: every run of a stage at once
common="--threads=1"
stage=${1:-}
shift || true
mkdir -p out

# The prefix LM learns from the same rows as the encoder-decoders, holes in its prompt.
# OBJECTIVE gives all kinds this objective, and all runs another name: OBJECTIVE=span is how the
# paper's section 3.3 trains its decoder-only models, too. PRE names the runs of other keys in SHAPE.
pre="${PRE:-out/pre-${OBJECTIVE:+$OBJECTIVE-}}"
arch_of() {
    case $1 in
        */*) echo "--arch=encdec --split=$1 --objective=${OBJECTIVE:-span}" ;;
        prefix) echo "--arch=prefix --objective=${OBJECTIVE:-span}" ;;
        dec) echo "--arch=dec --objective=${OBJECTIVE:-causal}" ;;
    esac
}

# Pretraining: one row of out/paper-pretraining.jsonl a run. The rate of embeddings is 0.4 of the
# matrices'.
pretrain() {
    kind=$1 rate=$2 steps=$3 out=$4
    rows=out/paper-pretraining.jsonl
    [ -f "$out/done" ] && return
    extra="--init_from=resume"
    if [ ! -f "$out/train_state.pt" ]; then
        rm -rf "$out"
        extra="$(arch_of "$kind") --preset=$preset --data=$text --lr=$rate
            --embed_lr=$($python -c "print(round($rate * 0.4, 6))") --max_iters=$steps
            --eval_rows=512 --compile=${COMPILE:-true} ${SHAPE:-}"
    fi
    $python train.py $extra $common --out="$out"
    $python - "$kind" "$out" >>"$rows" <<'END'
import json
import sys

kind, out = sys.argv[1:]
with open(f"{out}/run.json") as file:
    cfg = json.load(file)["settings"]
with open(f"{out}/log.jsonl") as file:
    rows = [json.loads(line) for line in file]
last = [row for row in rows if "val_loss" in row][-1]
row = dict(arch=kind, objective=cfg["objective"], lr=cfg["lr"], steps=last["step"])
row["tokens_m"] = round(last["tokens"] / 1e6, 2)
row |= {key: round(last[key], 4) for key in ("val_loss", "bits_per_byte")}
print(json.dumps(row))
END
    touch "$out/done"
}

# A rate of the matrices and, times 0.4, of the embeddings, for one kind alone.
rate_of() {
    echo "$1:--lr=$2 $1:--embed_lr=$($python -c "print(round($2 * 0.4, 6))")"
}

# What the searches chose. The three encoder-decoders share the rates of 2/3.
declare -A pretraining_rate=([dec]=2e-2 [prefix]=2e-2 [1/3]=2e-2 [1/2]=2e-2 [2/3]=2e-2)
declare -A docstring_rate=([dec]=5e-3 [prefix]=5e-3 [2/3]=1e-2)
declare -A codexglue_rate=([dec]=1e-2 [prefix]=2e-2 [2/3]=2e-2)
declare -A multi30k_rate=([dec]=1e-2 [prefix]=2e-2 [2/3]=2e-2) # Java's, without a search

launch() { # a command; in the background, where all may run at once
    if [ "$jobs" = 1 ]; then
        "$@"
    else
        "$@" &
    fi
}
finish() { # waits for all; one that failed ends the script
    for pid in $(jobs -p); do
        wait "$pid"
    done
}

chosen() { # TASK -> --train's words for all kinds
    declare -n rates="$1_rate"
    for kind in dec prefix 1/3 1/2 2/3; do
        rate_of $kind "${rates[$kind]:-${rates[2/3]}}"
    done
}

# docstring-full takes minutes to read: its rows are written once.
data_of() { # TASK -> --data
    case $1 in
        codexglue)
            echo "codexglue:${ROWS:?the folder of CodeXGLUE rows}"
            return
            ;;
        multi30k)
            echo "translate:${ROWS:?the folder of Multi30k}"
            return
            ;;
    esac
    [ -d out/docstring-rows ] || $python - >&2 <<'END'
import json
import os

from data.tasks import load_task

os.makedirs("out/docstring-new", exist_ok=True)
for split, rows in load_task("docstring-full").splits.items():
    with open(f"out/docstring-new/{split}.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
os.rename("out/docstring-new", "out/docstring-rows")
END
    echo out/docstring-rows
}

compare() { # TASK, more keys
    data=$(data_of "$1")
    name=$1-$stage
    shift
    $python bench.py compare --data="$data" --preset=$preset --results="out/paper-$name.jsonl" \
        $common "$@"
}

# Scored once, at the end.
runs="--seeds=${SEEDS:-3} --max_iters=${STEPS:-1000}"
lengths="--src_len=512 --tgt_len=256"
case $stage:${1:-} in
    *:multi30k) lengths="--src_len=128 --tgt_len=128 --source_col=en --target_col=de" ;;
    *:docstring | *:codexglue | rates:* | pretrain:*) ;;
    *) stage=help ;;
esac
lengths="$lengths --eval_interval=100000 --compile=true ${TUNE:-}"
case $stage in
    compare | scratch | ablation | distil) words="$lengths $(chosen "$1")" ;;
esac
case $stage in
    rates)
        for rate in ${GRID:-5e-3 1e-2 2e-2}; do
            for kind in "${@:-dec}"; do
                launch pretrain "$kind" "$rate" "${STEPS:-300}" \
                    "${pre/pre/rate}${kind/\//}-$rate"
            done
        done
        finish
        ;;
    pretrain)
        for kind in "$@"; do
            launch pretrain "$kind" "${pretraining_rate[$kind]}" "${STEPS:-2000}" \
                "$pre${kind/\//}"
        done
        finish
        ;;
    search)
        for rate in ${GRID:-2e-3 5e-3 1e-2}; do
            compare "$1" --archs="${ARCHS:-dec,prefix,2/3}" --seeds=1 --max_iters=300 \
                --init_from="$pre{split}" \
                --train="$lengths $(for kind in dec prefix 1/3 1/2 2/3; do rate_of $kind $rate; done)"
        done
        ;;
    compare)
        compare "$1" --archs="${ARCHS:-dec,prefix,1/3,1/2,2/3}" $runs \
            --eval_split=test --init_from="$pre{split}" --train="$words"
        ;;
    scratch)
        compare "$1" --archs="${ARCHS:-dec,prefix,1/3,1/2,2/3}" $runs \
            --eval_split=test --train="$words --tokenizer=out/pre-23"
        ;;
    teacher)
        task=$1
        data=$(data_of "$task")
        train() { # a run that is there stays, one that was cut off goes on
            out=$1
            shift
            [ -f "$out/train_state.pt" ] && set -- --init_from=resume || rm -rf "$out"
            $python train.py --out="$out" $common "$@"
        }
        train out/teacher-pre --arch=dec --preset=mini --data="$text" --tokenizer=out/pre-23 \
            --max_iters="${STEPS:-2000}" --eval_rows=512 --compile=true
        train "out/teacher-$task" --init_from=out/teacher-pre --data="$data" --objective=seq2seq \
            $lengths --lr=4e-3 --embed_lr=1.6e-3 --max_iters=1200 --eval_rows=0
        ;;
    ablation)
        data=$(data_of "$1")
        $python bench.py distill --data="$data" --teacher="out/teacher-$1" --preset=$preset \
            $common --archs=2/3 --seeds=1 --max_iters="${STEPS:-300}" --init_from="$pre{split}" \
            --train="$words" --distill="${DISTIL:-}" --results="out/paper-$1-ablation.jsonl"
        ;;
    distil)
        compare "$1" --archs="${ARCHS:-dec,1/3,1/2,2/3}" $runs \
            --eval_split=test --init_from="$pre{split}" --teacher="out/teacher-$1" \
            --distill="${DISTIL:---alpha=0.5 --kl=forward --sequences=data}" \
            --train="$words"
        ;;
    *)
        sed -n '2,20p' assets/paper.sh
        exit 2
        ;;
esac
