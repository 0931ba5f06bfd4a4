"""MR-MAE ("Mimic before Reconstruct") pre-training at scale with DeepSpeed ZeRO-3.

After ``import mrmae_ds`` the models are timm's too: ``timm.create_model("cvit_base", img_size=224, num_classes=10)``.
"""

from importlib.metadata import PackageNotFoundError, version

from mrmae_ds.timm_hook import register_with_timm

try:
    __version__ = version("mrmae_ds")
except PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "0+unknown"

register_with_timm()
