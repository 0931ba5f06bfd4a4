"""MR-MAE ("Mimic before Reconstruct") pre-training at scale with DeepSpeed ZeRO-3.

After ``import mrmae_ds`` the models are timm's too: ``timm.create_model("cvit_base", img_size=224, num_classes=10)``.
"""

from mrmae_ds.timm_hook import register_with_timm

__version__ = "0.1.0"

register_with_timm()
