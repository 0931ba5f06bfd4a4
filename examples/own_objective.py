"""Add a loss of your own to a pre-training: python examples/own_objective.py.

Losses that differ in target, tap, tokens, normalization or distance need no code: they are lists of objectives in a
recipe. To train by train.py, add the formula to mrmae_ds/models/objectives.py as CONTRIBUTING.md says.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mrmae_ds import MRMAE
from mrmae_ds.models.masking import choose_visible
from mrmae_ds.models.objectives import patchify


def similarity_loss(latent: Tensor, pixels: Tensor) -> Tensor:
    """Compare the cosines between the tokens [B, K, C] of an image with those between their pixels [B, K, D]."""
    cosines = [x @ x.transpose(1, 2) for x in (F.normalize(latent, dim=-1), F.normalize(pixels, dim=-1))]
    return F.mse_loss(*cosines)


torch.manual_seed(0)
model = MRMAE.from_recipe("ds_configs/baselines/mae_tiny.yaml")
student, grid, stride = model.student, model.student.encoder.grid, model.student.encoder.stride
images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
inputs = (images / 255 - model.mean) / model.std
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for _ in range(3):
    visible = choose_visible(torch.rand(len(images), grid[0] * grid[1]), grid, keep_ratio=0.25)
    losses = student(inputs, visible, {})  # the recipe's objectives; the second argument are features of teachers
    latent = student.latent(inputs, visible)[:, student.encoder.num_prefix_tokens :]
    losses["similarity"] = similarity_loss(latent, visible.take(patchify(inputs, stride)))
    (losses["loss"] + 0.1 * losses["similarity"]).backward()
    optimizer.step()
    optimizer.zero_grad()
    print({name: round(loss.item(), 3) for name, loss in losses.items()})
