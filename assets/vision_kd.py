"""vision.py with a decoder-only teacher that sees the same pictures (the paper's section 4):

    python vision.py --arch=dec --data=shapes --out=out/teacher
    python assets/vision_kd.py --teacher=out/teacher --data=shapes       --arch=dec: a student alike

Half of the loss is cross-entropy on the references, half the forward divergence from what the
teacher expects at each of their tokens. All keys but --teacher are vision.py's. Teacher and student
must have one vocabulary: the one that both train on the same data, or --tokenizer=out/teacher/.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import torch.nn.functional as F

import data.picture_tasks
import vision
from data.objectives import make_batch
from distill import divergence
from lib.device import to_device
from lib.settings import UserError, script

ALPHA = 0.5  # the divergence's share of the loss


class TaughtSet(data.picture_tasks.PictureSet):
    """Keeps what the teacher reads at a step: `lesson` (ids, mask), as decoder-only rows."""

    def batch(self, step, rows):
        chosen, real = self.share(step, rows)
        sides = ([side[i] for i in chosen] for side in (self.pairs.sources, self.pairs.targets))
        _, ids, answer = make_batch(*sides, self.tokenizer, True)
        answer[real:] = False  # the others have no loss
        TaughtSet.lesson = ids, answer
        return super().batch(step, rows)

    def pictures(self, step, rows):
        TaughtSet.seen = super().pictures(step, rows)
        return TaughtSet.seen


class Student(vision.VisionLM):
    teachers = []  # in a list, so that it is no part of the student

    def forward(self, src, tgt, loss_mask=None, images=None):
        if not self.training or not self.teachers:
            return super().forward(src, tgt, loss_mask, images)
        self.look_at(images)
        logits = self.logits(self.states(src, tgt)[loss_mask]).float()  # (N, V)
        ids, answer = to_device(TaughtSet.lesson, tgt.device)
        teacher = self.teachers[0].to(tgt.device)
        with torch.no_grad():
            teacher.look_at(teacher.see(TaughtSet.seen)[0])
            wanted = teacher.logits(teacher.states(None, ids)[answer]).float()
        both = logits.log_softmax(-1), wanted.log_softmax(-1)
        reference = F.cross_entropy(logits, tgt[loss_mask], reduction="sum")
        return ALPHA * divergence(*both, "forward").sum() + (1 - ALPHA) * reference


def main():
    folders = [word[10:] for word in sys.argv if word.startswith("--teacher=")]
    sys.argv = [word for word in sys.argv if not word.startswith("--teacher=")]
    if not folders and "--help" not in sys.argv:
        raise UserError("--teacher=RUN is missing: a run of vision.py --arch=dec on the same data")
    make_log = vision.Log

    def begin(*args):  # after compiling, which has no lesson
        teacher = vision.load_model(folders[-1]).eval().requires_grad_(False)
        Student.teachers.append(teacher)
        return make_log(*args)

    vision.VisionLM, vision.Log = Student, begin
    data.picture_tasks.PictureSet = TaughtSet
    vision.main()


if __name__ == "__main__":
    script(main)
