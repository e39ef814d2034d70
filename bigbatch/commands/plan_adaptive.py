"""An adaptive run before it starts, for `bigbatch plan`: what is known and what is not."""

from collections import Counter
from typing import Any

from bigbatch.commands.plan import aligned, tokens
from bigbatch.config.config import Config
from bigbatch.schedule.adaptive.controller import Controller
from bigbatch.schedule.durations import in_epochs

_HEADER = (
    "level",
    "batch size",
    "learning rate",
    "momentum",
    "noise scale",
    "microbatches",
    "until",
)
# A learning rate can go on falling past the cap; so many of those levels are shown.
_LEVELS_PAST_CAP = 2


def text(config: Config, *, devices: int) -> str:
    """The ladder, the limits of the number of updates, and what decides between them.

    Args:
      config: a validated config, with a controller.
      devices: how many to lay the run out for; none is looked for.

    Raises:
      UserError: the layout cannot be formed.
    """
    controller = config.controller
    assert controller is not None
    layout = config.layout(config.plan, devices)
    shown = len(controller.ladder) + _LEVELS_PAST_CAP
    rows = []
    for index in range(shown):
        size, rate = controller.level(index)
        shapes = Counter(part.examples_per_device for part in layout.microbatches(size))
        noise_scale = config.plan.noise_scales[0] / controller.decay(index)
        rows.append(
            (
                f"{index}",
                f"{size:,}",
                f"{rate:.4g}",
                f"{controller.momentum:.4g}",
                f"{noise_scale:.4g}",
                " + ".join(f"{n} x {layout.devices * shape:,}" for shape, n in shapes.items()),
                f"{controller.threshold(index):,.0f}",
            )
        )
    fewest, most = limits(controller)
    return "\n".join(
        [
            f"{config.experiment or 'plan'}: {config.plan.train_examples:,} training examples, "
            f"{in_epochs(config.plan.epochs)}{tokens(config.plan)}, adaptive",
            "",
            *aligned([_HEADER, *rows]),
            "",
            "known: this ladder, and the end of the run by its examples. Past the last batch size "
            f"the learning rate goes on falling, by {controller.decay(1):.4g} a level.",
            "not known: when a level ends. It does when "
            f"{controller.multiple:g} x (measured noise scale - 2 standard errors) reaches "
            "the number in its last column; measured from small "
            f"batches of {controller.small_batch_examples} examples. From epoch "
            f"{controller.cooldown_epoch:g} on the noise scale falls to zero at the end, whatever "
            "is measured.",
            f"at least {fewest:,} updates (every decision is to grow), at most {most:,} (no "
            "measurement asks for it)",
            f"planned for {devices} device{'s' * (devices > 1)} (--devices; none was looked for): "
            f"microbatches of {' or '.join(str(shape) for shape in layout.shapes)} examples for "
            "every batch size",
        ]
    )


def summary(controller: Controller) -> dict[str, Any]:
    """The same for programs, beside the plan in which nothing grows."""
    fewest, most = limits(controller)
    ladder = [level._asdict() for level in controller.ladder]
    return {"fewest_updates": fewest, "most_updates": most, "ladder": ladder}


def limits(controller: Controller) -> tuple[int, int]:
    """The fewest and the most updates that the run can have."""
    return controller.fewest_updates().num_updates, controller.most_updates().num_updates
