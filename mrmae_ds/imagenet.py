"""Published figures of ImageNet-1K (ILSVRC 2012), and the crop on which its models are evaluated."""

from __future__ import annotations

Rgb = tuple[float, float, float]

IMAGENET_CLASSES = 1000
IMAGENET_TRAIN_SAMPLES = 1_281_167
IMAGENET_EVAL_SAMPLES = 50_000
# Statistics of its pixels, in 0 to 1, as all published models use them.
IMAGENET_MEAN: Rgb = (0.485, 0.456, 0.406)
IMAGENET_STD: Rgb = (0.229, 0.224, 0.225)


def crop_share(image_size: int) -> float:
    """Return the side of evaluation's center crop as a share of the resized short side; ``image_size`` in pixels."""
    return 0.875 if image_size <= 224 else 1.0
