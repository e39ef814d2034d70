r"""The batch sizes and devices that make a way's progress in the least time or for the least money.

A way is in M parts, each of which takes some number of updates of each size of a ladder
(`schedule.fastest`). An update of a size takes so many seconds on so many devices. Each part is
given one size and one number of devices, such that the sizes never fall, and the sum of

    hour_weight * hours + cost_weight * cost

is least, where a change of devices takes `restart_s` of the new ones. Without those two conditions
each part would be decided alone. With them a dynamic programme over (part, size, devices) is exact:
the best way to be at a size and a number of devices after a part comes from no larger size, on the
same devices or, from whichever were the best, after a restart. It takes M * sizes * devices steps.

For one device, an update of a + B/c seconds and no conditions, the best size is sqrt(a c B_noise),
which the tests hold this against.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigbatch.schedule.run_lengths import run_starts

Array = NDArray[np.float64]
# A frontier is told as finely as this, as a share of its hours and of its cost.
_GRAIN = 0.01
_TIE = 1e-9


class Hardware(NamedTuple):
    """What there is to choose from.

    Attributes:
      sizes: the ladder of batch sizes, rising int64[sizes].
      devices: numbers of devices, int64[devices].
      seconds: of one update, float64[sizes, devices].
      restart_s: what a change of the number of devices takes.
      price: of a device-hour; 1 where device-hours stand for money.
    """

    sizes: NDArray[np.int64]
    devices: NDArray[np.int64]
    seconds: Array
    restart_s: float
    price: float = 1.0


class Choice(NamedTuple):
    """A size and a number of devices for each part.

    Attributes:
      size: index into `Hardware.sizes`, int64[M].
      device: index into `Hardware.devices`, int64[M].
      hours: of the whole way, restarts included.
      cost: likewise, in the price's money.
    """

    size: NDArray[np.int64]
    device: NDArray[np.int64]
    hours: float
    cost: float


def choice(
    updates: Array, hardware: Hardware, size: NDArray[np.int64], device: NDArray[np.int64]
) -> Choice:
    """The choice of those indices, with its hours and cost.

    Args:
      updates: that each part takes of each size, float64[M, sizes].
      hardware: what there is.
      size: as of `Choice`.
      device: likewise.
    """
    seconds = updates[np.arange(len(size)), size] * hardware.seconds[size, device]
    seconds[1:] += hardware.restart_s * (device[1:] != device[:-1])
    cost = float(seconds @ hardware.devices[device]) * hardware.price
    return Choice(size, device, float(seconds.sum()) / 3600, cost / 3600)


def cheapest(updates: Array, hardware: Hardware, hour_weight: float, cost_weight: float) -> Choice:
    """The choice with the least weighted sum of hours and cost, to 1e-9.

    Args:
      updates: as of `choice`.
      hardware: what there is.
      hour_weight: at least 0, as is `cost_weight`; one of them above 0.
      cost_weight: likewise.
    """
    money = hardware.price * hardware.devices
    a_second = hour_weight + cost_weight * money
    # Of the equally fast the cheapest, and the other way round.
    a_second = (a_second + _TIE * a_second.max() * (1 + money / money.max())) / 3600
    each = hardware.seconds * a_second
    restart = hardware.restart_s * a_second
    best = [updates[0][:, None] * each]
    for count in updates[1:]:
        before = np.minimum(best[-1], best[-1].min(axis=1, keepdims=True) + restart)
        best.append(np.minimum.accumulate(before, axis=0) + count[:, None] * each)
    size, device = (np.empty(len(updates), np.int64) for _ in range(2))
    # On the way back: of the states that may lead to the one that was chosen, the best.
    smaller, moves = len(each), np.zeros(len(restart))
    for part in reversed(range(len(updates))):
        sums = best[part][:smaller] + moves
        size[part], device[part] = np.unravel_index(np.argmin(sums), sums.shape)
        smaller = int(size[part]) + 1
        moves = restart[device[part]] * (np.arange(len(restart)) != device[part])
    return choice(updates, hardware, size, device)


def paying(
    counts: Array, size: NDArray[np.int64], hardware: Hardware, efficiency: float
) -> NDArray[np.int64]:
    """The devices of each stage that make it the fastest, of those that are efficient enough.

    Efficient is what needs no more device-seconds than those of the fewest devices, divided by the
    efficiency. Devices change only where that saves more time than it takes.

    Args:
      counts: updates of each stage, float64[stages].
      size: of each stage, as an index into `Hardware.sizes`, int64[stages].
      hardware: what there is.
      efficiency: above 0, at most 1.

    Returns:
      Indices into `Hardware.devices`, int64[stages].
    """

    def efficient(seconds: Array) -> Array:
        work = seconds * hardware.devices
        return np.where(efficiency * work <= work[:, :1] * (1 + _TIE), seconds, np.inf)

    seconds = counts[:, None] * hardware.seconds[size]
    # Neighbours that want the same are one part: a plan whose every update differs has few.
    starts = run_starts(np.argmin(efficient(seconds), axis=1))
    parts = efficient(np.add.reduceat(seconds, starts))
    own = np.where(np.eye(len(parts), dtype=bool), 1.0, np.inf)
    ladder = hardware._replace(sizes=np.arange(len(parts)), seconds=parts)
    return np.repeat(cheapest(own, ladder, 1.0, 0.0).device, np.diff(starts, append=len(counts)))


def frontier(updates: Array, hardware: Hardware) -> list[Choice]:
    """The choices that are the cheapest for some weights, from the fastest to the cheapest.

    They are the corners of the lower hull of (hours, cost); between two that lie within 1 % of each
    other none is looked for.
    """
    ends = [cheapest(updates, hardware, *weights) for weights in ((1.0, 0.0), (0.0, 1.0))]

    def between(left: Choice, right: Choice) -> list[Choice]:
        hours, cost = right.hours - left.hours, left.cost - right.cost
        if hours <= _GRAIN * left.hours or cost <= _GRAIN * right.cost:
            return []
        found = cheapest(updates, hardware, cost, hours)
        gain = cost * (left.hours - found.hours) + hours * (left.cost - found.cost)
        if gain <= 1e-9 * hours * cost:
            return []
        return [*between(left, found), found, *between(found, right)]

    is_one = ends[0].hours == ends[1].hours
    return ends[:1] if is_one else [ends[0], *between(*ends), ends[1]]
