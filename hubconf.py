"""Entry points for torch.hub: torch.hub.load(REPOSITORY, "encoder", FILE)."""

dependencies = ["torch", "torchvision", "timm", "deepspeed", "safetensors", "pydantic", "yaml"]

from typing import Any  # noqa: E402

from mrmae_ds import MRMAE, ImageEncoder  # noqa: E402


def encoder(path: str) -> ImageEncoder:
    """Load the encoder of a run, of a weights file that ``mrmae check`` calls usable, or of ``hf:ORG/NAME``."""
    return ImageEncoder.from_file(path)


def pretraining(path: str, teachers: bool = False) -> MRMAE:
    """Load a finished pre-training with its decoder; ``teachers`` loads its teachers too."""
    return MRMAE.from_run(path, teachers=teachers)


def model(name: str, **settings: Any) -> Any:
    """Create a model of timm by its name, a CViT among them: ``model("cvit_base", img_size=224, num_classes=10)``."""
    import timm

    return timm.create_model(name, **settings)
