"""Parity: the same training by many engines and by one plain torch process, compared.

The engine's side (engine.py) is the project's own: the engine config is read from a file, the recipe is
ds_configs/tiny.yaml (of detection, that of tests/support/small_detections.py), and ``prepare_stage``, ``build_engine``,
the reader and the loop are those of train.py. The plain side (plain.py) shares with it only the model, the task and the
images: a loop without DeepSpeed in a single process, with its own groups and learning rates.

Letters: W processes, A accumulation, G images a step; a part is one process's micro-batch, and a step has W * A.
"""
