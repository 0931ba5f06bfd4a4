"""Train one stage of a recipe, or evaluate fine-tuned models; ``mrmae train`` is the same command.

deepspeed train.py --ds_config ds_configs/NAME.json [--stage STAGE] [key.path=value ...]
"""

from __future__ import annotations

from mrmae_ds.cli.train import end_process, main

if __name__ == "__main__":
    end_process(main())
