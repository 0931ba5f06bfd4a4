"""Train a student for a few steps and use it. Needs the teacher of `make demo`, runs/mae_tiny/pretrain."""

import torch

from mrmae_ds import MRMAE

torch.manual_seed(0)
model = MRMAE.from_recipe("ds_configs/tiny.yaml", ["stages.pretrain.masking.keep_ratio=0.4"])
images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)  # a batch of yours; floats in 0 to 1 work too
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # the student's; the teachers are frozen
for _ in range(3):
    losses = model(images)  # normalizes, calls the teacher, draws the mask
    losses["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
    print({name: round(loss.item(), 3) for name, loss in losses.items()})

model.eval()
features = model.features(images)  # .tokens [8, 64, 96], .pooled [8, 96]
rebuilt = model.reconstruct(images)  # .masked, .reconstruction, .prediction: [8, 3, 32, 32] in 0 to 1
attention = model.attention(images)  # .student and .teachers["mae"]: [8, 8, 8]
print(features.pooled.shape, rebuilt.reconstruction.shape, attention.student.shape)
# A finished run: model = MRMAE.from_run("runs/tiny/pretrain")
