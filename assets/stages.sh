#!/bin/bash
# The paper's four stages on pictures (section 4.2), each from the run of the stage before.
#
#     bash assets/stages.sh drawn                     on drawn pictures, half an hour on two cores
#     WITHOUT="align ocr" bash assets/stages.sh drawn     these left out: what does a stage bring?
#     bash assets/stages.sh real RUN CLIP ALIGN OCR INSTRUCT TASK
#
# `real` needs a trained language model, a folder of CLIP's ViT-L/14-336, and four data sets as
# vision.py's --data names them: llava-pretrain:FOLDER, ureader:FOLDER, llava-instruct:FOLDER,
# textvqa. Rates, schedule and steps are LLaVA-1.5's (Liu et al., 2023): AdamW without
# weight decay, cosine, 3% of warm-up; 1e-3 and about 256 rows a step to align, then 2e-5 and about
# 128. A row here is one answer, there a whole talk. From the second stage on the tower learns, at
# 2e-6 as in the config.json of the paper's released vision model, and pictures are cut into up to
# four tiles; there up to six, shrunk to the size of three. GPUS=8 uses eight GPUs.
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
    if [ ! -f out/stages/done ]; then
        rm -rf out/stages
        $python train.py --max_iters="${STEPS:-300}" --eval_rows=128 --out=out/stages
        touch out/stages/done
    fi
    if [ ! -f out/stages-clip/config.json ]; then
        rm -rf out/stages-shapes out/stages-clip
        $python vision.py --data=shapes --image_size=160 --patch=40 --grid=0 \
            --max_iters="${STEPS:-250}" --eval_interval=100000 --out=out/stages-shapes
        $python - <<'END'
import json
import os

import torch
from safetensors.torch import save_file

from data.images import CLIP_MEAN
from vision import FIELDS, NAMES, load_model

tower = load_model("out/stages-shapes").tower
# A new tower takes the pictures' ground as zero, CLIP's has a mean of its own: positions make up
# for the difference.
shift = (torch.tensor(CLIP_MEAN) - torch.tensor(tower.cfg.mean)) / torch.tensor(tower.cfg.std)
with torch.no_grad():
    at_patches = tower.embed_position[tower.cfg.class_token :]
    at_patches += tower.patches.weight @ shift.repeat_interleave(tower.cfg.patch**2)
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
    # The last stage's task, as files of one's own: differences on charts, with some held out.
    if [ ! -d out/stages-questions ]; then
        $python - <<'END'
import json
import os

from data.pictures import picture_rows

os.makedirs("out/stages-new", exist_ok=True)
for split, rows in picture_rows("charts", (3000, 200, 0)).items():
    with open(f"out/stages-new/{split}.jsonl", "w") as file:
        for row in [row for row in rows if row.get("kind") == "difference"]:
            name = f"{split}-{row['images'][0].number}.png"
            row["images"][0].load().save(f"out/stages-new/{name}")
            image = os.path.abspath(f"out/stages-questions/{name}")
            row = dict(image=image, source=row["source"], target=row["target"])
            file.write(json.dumps(row) + "\n")
os.remove("out/stages-new/test.jsonl")
os.rename("out/stages-new", "out/stages-questions")
END
    fi
    run=out/stages
    begin=(--init_from=out/stages --vision=hf:out/stages-clip)
    common="--grid=0 --batch_size=4 --lr=4e-3 --eval_rows=200 --eval_interval=100000 --compile=true"
    stage align $common --data=shapes --max_iters="${STEPS:-150}"
    stage ocr $common --data=tables --tower_lr=1e-3 --max_iters="${STEPS:-600}"
    stage instruct $common --data=charts --tower_lr=1e-3 --max_iters="${STEPS:-350}"
    stage task $common --data=out/stages-questions --tower_lr=1e-3 --max_iters="${STEPS:-120}"
}

real() {
    launch=$python
    [ "${GPUS:-1}" = 1 ] || launch="$python -m torch.distributed.run --nproc_per_node=$GPUS"
    run=${1%/}
    begin=(--init_from="$run" --vision="hf:$2")
    # Four rows a pass: 256 or 128 rows a step are so many passes of a GPU.
    passes=$((32 / ${GPUS:-1}))
    common="--optimizer=adamw --weight_decay=0 --schedule=cosine --batch_size=4"
    slow="$common --lr=2e-5 --embed_lr=2e-5 --tower_lr=2e-6 --grid=2 --grad_accum=$passes
        --src_len=3584 --tgt_len=256"
    stage align $common --data="$3" --lr=1e-3 --embed_lr=1e-3 --grid=0 --src_len=640 \
        --tgt_len=64 --grad_accum=$((2 * passes)) --max_iters="${STEPS:-2180}" --warmup_iters=65
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
        sed -n '2,15p' assets/stages.sh
        exit 2
        ;;
esac
