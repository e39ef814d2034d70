"""The course of a run: its plan, as far as that is known yet.

A planned run knows every update before it starts; its controller is empty. An adaptive run's
controller decides update k from the measurements of the updates up to k - 2, and its plan grows:
each decision makes another `Plan`, which agrees with the one before on every update that was known.
"""

import json
from collections.abc import Mapping
from typing import Any

from bigbatch.schedule.adaptive.controller import Controller, Decisions
from bigbatch.schedule.adaptive.gradient_noise import Measurement
from bigbatch.schedule.plan import Plan


class Course:
    """What a run knows of its updates.

    Attributes:
      plan: the plan; of an adaptive run as far as it is decided, going on unchanged to the end.

    Args:
      plan: of a planned run.
      controller: of an adaptive run; None for a planned one.
      saved: what `saved` was at the checkpoint to go on from; None at the start.
    """

    def __init__(
        self,
        plan: Plan,
        controller: Controller | None = None,
        saved: Mapping[str, Any] | None = None,
    ):
        self._controller = controller
        self._decisions = Decisions() if saved is None else Decisions.from_json(saved)
        self.plan = plan if controller is None else controller.plan(self._decisions)

    @property
    def known_updates(self) -> int:
        """How many updates from the start on will not change any more."""
        if self._controller is None:
            return self.plan.num_updates
        return min(self._controller.known_updates(self._decisions), self.plan.num_updates)

    @property
    def saved(self) -> dict[str, Any] | None:
        """What a checkpoint keeps, in plain values; None for a planned run."""
        return None if self._controller is None else self._decisions.to_json()

    def observe(self, measurement: Measurement | None) -> None:
        """Takes what the next update in turn has measured; the plan may change with it.

        Args:
          measurement: of each update once, in order. A planned run needs none.
        """
        if self._controller is None:
            return
        assert measurement is not None, "an adaptive run measures every update"
        decisions = self._controller.observe(self._decisions, measurement)
        if decisions.growths != self._decisions.growths:
            self.plan = self._controller.plan(decisions)
        self._decisions = decisions

    def to_json(self) -> str:
        """The plan's JSON; an adaptive run's says how many of its updates are decided."""
        text = self.plan.to_json()
        if self._controller is None:
            return text
        decided = json.dumps({"decided_updates": self.known_updates})
        return decided[:-1] + "," + text[1:]
