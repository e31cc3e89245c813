"""A quick configuration for comparisons, and the trainings among their messages."""

from dcar_core.model.config import TrainConfig

QUICK = TrainConfig(epochs=2, batch_size=6)


def trainings(messages: list[str]) -> list[str]:
    """Return the messages of `compare` that announce a training."""
    return [message for message in messages if "learning rate" in message]
