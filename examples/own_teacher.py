"""Pre-train against a frozen network of your own that no library has: python examples/own_teacher.py.

Networks of open_clip and timm, and runs of this project, need no code: see docs/teachers.md. To train by train.py, put
the class into mrmae_ds/teachers/sources/KIND.py as CONTRIBUTING.md says.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from mrmae_ds import MRMAE, load_recipe
from mrmae_ds.config.sections import DataConfig, TeacherConfig
from mrmae_ds.factory import build_pretraining
from mrmae_ds.teachers.base import Teacher, TeacherOutput, TeacherSpec

STRIDE, WIDTH = 4, 24  # the student's stride: each of its tokens gets a target


class OwnTeacher(Teacher):
    """One convolution as an example; a teacher returns tokens in raster order and the importance of each."""

    def encode(self, images: Tensor) -> TeacherOutput:
        """Return tokens [B, L, C] and importance [B, L] of images [B, 3, H, W], normalized by the spec's statistics."""
        tokens = self.network(images).flatten(2).transpose(1, 2)
        return TeacherOutput(tokens, importance=tokens.norm(dim=-1))


def build(name: str, config: TeacherConfig, data: DataConfig, student_size: int, grid: tuple[int, int]) -> Teacher:
    """Build the teacher that the recipe calls ``name``; load your weights here."""
    network = nn.Conv2d(3, WIDTH, STRIDE, STRIDE)
    spec = TeacherSpec(
        grid=grid,
        width=WIDTH,
        image_size=student_size,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        dtype=torch.float32,
        sha256="",
    )
    return OwnTeacher(network, spec)


torch.manual_seed(0)
recipe = load_recipe(Path("ds_configs/tiny.yaml"))  # its objective "mimic" and its masking use the teacher "mae"
stage = recipe.stages.pretrain
student, teachers = build_pretraining(recipe, stage, build)
model = MRMAE(student, teachers, stage, recipe.data.mean, recipe.data.std)
images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # the student's; the teacher is frozen
for _ in range(3):
    losses = model(images)
    losses["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
    print({name: round(loss.item(), 3) for name, loss in losses.items()})
