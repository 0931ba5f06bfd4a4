"""MR-MAE ("Mimic before Reconstruct") pre-training at scale with DeepSpeed ZeRO-3."""

__version__ = "0.1.0"
