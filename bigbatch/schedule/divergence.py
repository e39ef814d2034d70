"""What to say of a run whose numbers are no longer finite: where, under which settings, what helps.

The arithmetic is that of `bigbatch.schedule.diagnostics`, at the update where it happened.
"""

from bigbatch.schedule.durations import in_epochs
from bigbatch.schedule.plan import Plan, Row

# The paper raised the effective learning rate to 1 on CIFAR-10 without trouble, and to 5 with
# warm-up; its runs lost accuracy where the velocity's lag passed a few per cent of a stage.
_LARGE_EFFECTIVE_RATE = 1.0
_LONG_LAG_EPOCHS = 0.5


def diagnosis(plan: Plan, row: Row, what: str, last_loss: float) -> str:
    """A diagnosis in words.

    Args:
      plan: the run's plan.
      row: the update whose sums are not finite.
      what: what is not finite, with its value.
      last_loss: the training loss of the log's last record, nats; nan before the first.

    Returns:
      The range of updates, the settings at the update (learning rate, effective learning rate
      lr/(1-m), batch size, noise scale, momentum lag B/(N(1-m)) in epochs), and what to try.
    """
    rate, momentum = row.hyper["learning_rate"], row.hyper.get("momentum", 0.0)
    effective = rate / (1 - momentum)
    lag_epochs = row.batch_size / (plan.train_examples * (1 - momentum))
    hyper = ", ".join(f"{name} {value:g}" for name, value in row.hyper.items())
    return (
        f"{what} in update {row.update} (epoch {row.epoch:.3g}); it arose in updates "
        f"{max(row.update - 1, 0)} to {row.update}, as all before were finite, and the last "
        f"training loss logged is {last_loss:.4g}. There: batch size {row.batch_size:,}, {hyper}, "
        f"effective learning rate lr/(1-m) {effective:.3g}, noise scale {row.noise_scale:.4g}, "
        f"momentum lag {in_epochs(lag_epochs, 2)}. Checkpoints of earlier updates are kept. To "
        "try: " + "; ".join(_advice(row, effective, lag_epochs))
    )


def _advice(row: Row, effective: float, lag_epochs: float) -> list[str]:
    """What to try, the likeliest first."""
    advice = []
    if row.epoch < 1:
        advice.append("a warm-up (transformation warmup), as it happened in the first epoch")
    if effective > _LARGE_EFFECTIVE_RATE:
        advice.append("a lower policy.learning_rate, or a smaller factor of scale")
    if lag_epochs > _LONG_LAG_EPOCHS:
        advice.append("a lower momentum or max_batch_size: the velocity follows late")
    advice.append("optimizer.clip_norm")
    return advice
