"""Market replay: recorded bars played as marks through the REST API, against accounts that trade as they go."""

from app.replay.player import ReplayOptions, replay

__all__ = ["ReplayOptions", "replay"]
