"""Every trainable parameter gets a gradient in every backward pass, or training stops.

Under ZeRO-3 a parameter without one is moved by the gradient that it had before: DeepSpeed copies gradients into a
buffer that it does not clear. Under the other stages it would be weight-decayed and not trained, which nobody asked
for either. What is not to be trained has ``requires_grad`` False before the engine is built.
"""

from __future__ import annotations

from typing import Any

import deepspeed
from torch import Tensor


def watch_gradients(engine: deepspeed.DeepSpeedEngine) -> None:
    """From now on ``engine.backward`` raises RuntimeError, naming them, if parameters got no gradient.

    It is noted on the host by autograd's own hooks; nothing waits for the device.
    """
    names = {id(p): name for name, p in engine.module.named_parameters() if p.requires_grad}
    seen: set[int] = set()
    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: seen.add(id(p)))
    backward = engine.backward

    def watched(loss: Tensor, *arguments: Any, **options: Any) -> Any:
        seen.clear()
        result = backward(loss, *arguments, **options)
        missing = [name for key, name in names.items() if key not in seen]
        if missing:
            shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise RuntimeError(
                f"no gradient reached {shown}: under ZeRO-3 their last one would be applied again. Every trainable "
                "parameter must take part in every loss; freeze what is not to be trained"
            )
        return result

    engine.backward = watched
