"""Check that every trainable parameter gets a gradient in every backward pass.

Under ZeRO-3 a parameter without one is moved by its previous gradient: DeepSpeed copies gradients into a buffer that it
does not clear. Under the other stages it would be weight-decayed and not trained, which is not intended either.
Parameters that are not trained must have ``requires_grad`` False before the engine is built.
"""

from __future__ import annotations

from typing import Any

import deepspeed
from torch import Tensor


def watch_gradients(engine: deepspeed.DeepSpeedEngine) -> None:
    """Make ``engine.backward`` raise a RuntimeError that names the parameters without a gradient.

    Autograd's own hooks record the gradients on the host; nothing waits for the device.
    """
    names = {id(p): name for name, p in engine.module.named_parameters() if p.requires_grad}
    reached: set[int] = set()
    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: reached.add(id(p)))
    backward = engine.backward

    def watched(loss: Tensor, *arguments: Any, **options: Any) -> Any:
        reached.clear()
        result = backward(loss, *arguments, **options)
        missing = [name for key, name in names.items() if key not in reached]
        if missing:
            shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise RuntimeError(
                f"no gradient reached {shown}: under ZeRO-3 their last one would be applied again. Every trainable "
                "parameter must take part in every loss; freeze parameters that are not trained"
            )
        return result

    engine.backward = watched
