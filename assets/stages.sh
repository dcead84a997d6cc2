#!/bin/bash
# The paper's four stages on pictures (section 4.2), each from the run of the stage before.
#
#     bash assets/stages.sh drawn                     on drawn pictures: 20 minutes of two cores
#     WITHOUT="align ocr" bash assets/stages.sh drawn     these left out: what does a stage bring?
#     bash assets/stages.sh real RUN CLIP ALIGN OCR INSTRUCT TASK
#
# `real` needs a trained language model, CLIP's ViT-L/14-336 and four data sets, as vision.py's
# --data names them: llava-pretrain:FOLDER, ureader:FOLDER, llava-instruct:FOLDER, textvqa.
# Its recipes are those of LLaVA-1.5 (Liu et al., 2023, table 9): AdamW without weight decay,
# cosine, 3% of warm-up, one epoch; 1e-3 and batches of 256 to align, 2e-5 and 128 afterwards. From
# the second stage on the tower learns, too, at 2e-6, and pictures have three tiles, as in the
# config.json of the paper's released vision model. torchrun's processes divide a batch: GPUS=8.
# A stage that is finished is not run again, one that was cut off goes on.
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
without=" ${WITHOUT:-} "

stage() { # its name, keys of vision.py; begins with the run $run, or with `begin`; sets $run
    name=$1
    shift
    if [[ $without == *" $name "* ]]; then
        return
    fi
    out=$run-$name
    if [ ! -f "$out/done" ]; then
        if [ -f "$out/train_state.pt" ]; then
            $launch vision.py --init_from=resume --out="$out"
        else
            rm -rf "$out"
            $launch vision.py --stage="$name" "${begin[@]}" --out="$out" "$@"
        fi
        touch "$out/done"
    fi
    run=$out
    begin=(--init_from="$run")
}

drawn() {
    launch=$python
    # What CLIP and a pretrained language model are to the paper: a tower that knows shapes, in
    # CLIP's format, and a model of the Python source on this machine.
    if [ ! -f out/stages-clip/config.json ]; then
        rm -rf out/stages out/stages-shapes out/stages-clip
        $python train.py --max_iters="${STEPS:-400}" --eval_rows=128 --out=out/stages
        $python vision.py --data=shapes --image_size=160 --patch=40 --grid=0 \
            --max_iters="${STEPS:-300}" --eval_interval=100000 --out=out/stages-shapes
        $python - <<'END'
import json
import os

from safetensors.torch import save_file

from vision import FIELDS, NAMES, load_model

tower = load_model("out/stages-shapes").tower
weights = {}
for name, p in tower.state_dict().items():
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    weights[f"vision_model.{name}"] = p.contiguous()
about = {theirs: getattr(tower.cfg, ours) for ours, (theirs, *_) in FIELDS.items()}
about |= dict(model_type="clip_vision_model", num_hidden_layers=tower.cfg.n_layer + 1)
os.makedirs("out/stages-clip")
save_file(weights, "out/stages-clip/model.safetensors")
with open("out/stages-clip/config.json", "w") as file:
    json.dump(about, file)
END
    fi
    # The last stage's task: 400 questions on charts of one's own, 100 of them held out.
    if [ ! -d out/stages-task ]; then
        $python - <<'END'
import json
import os

from data.pictures import picture_rows

os.makedirs("out/stages-new")
for split, n in (("train", 400), ("val", 200)):
    with open(f"out/stages-new/{split}.jsonl", "w") as file:
        rows = picture_rows("charts", (2000, 200, 0))[split]
        rows = [row for row in rows if row.get("kind") == "difference"][:n]
        for number, row in enumerate(rows):
            path = os.path.abspath(f"out/stages-task/{split}-{number}.png")
            row["images"][0].load().save(path.replace("stages-task", "stages-new"))
            file.write(json.dumps(row | dict(image=path, images=None)) + "\n")
os.rename("out/stages-new", "out/stages-task")
END
    fi
    run=out/stages
    begin=(--init_from=out/stages --vision=hf:out/stages-clip)
    common="--grid=0 --batch_size=4 --lr=4e-3 --eval_rows=120 --compile=true"
    stage align $common --data=shapes --max_iters="${STEPS:-200}"
    stage ocr $common --data=tables --tower_lr=1e-3 --max_iters="${STEPS:-1000}"
    stage instruct $common --data=charts --tower_lr=1e-3 --max_iters="${STEPS:-600}"
    stage task $common --data=out/stages-task --tower_lr=1e-3 --max_iters="${STEPS:-200}"
}

real() {
    launch=$python
    [ "${GPUS:-1}" = 1 ] || launch="torchrun --nproc_per_node=$GPUS"
    run=$1
    begin=(--init_from="$1" --vision="hf:$2")
    each=$((128 / ${GPUS:-1})) # rows of a GPU and step; 4 rows a pass
    common="--optimizer=adamw --weight_decay=0 --schedule=cosine --batch_size=4"
    slow="$common --lr=2e-5 --embed_lr=2e-5 --tower_lr=2e-6 --grid=3 --grad_accum=$((each / 4))"
    stage align $common --grid=0 --data="$3" --lr=1e-3 --embed_lr=1e-3 --grad_accum=$((each / 2)) \
        --max_iters="${STEPS:-2180}" --warmup_iters=65
    stage ocr $slow --data="$4" --max_iters="${STEPS:-1563}" --warmup_iters=47
    stage instruct $slow --data="$5" --max_iters="${STEPS:-5197}" --warmup_iters=156
    stage task $slow --data="$6" --max_iters="${STEPS:-500}" --warmup_iters=15
}

case ${1:-} in
    drawn) drawn ;;
    real)
        if [ $# != 7 ]; then
            echo "real needs RUN CLIP ALIGN OCR INSTRUCT TASK" >&2
            exit 2
        fi
        real "${@:2}"
        ;;
    *)
        sed -n '2,16p' assets/stages.sh
        exit 2
        ;;
esac
