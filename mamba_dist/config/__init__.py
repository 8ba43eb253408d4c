"""The configuration of a run: schema, files, older versions, rules. Needs no torch."""

from mamba_dist.config.batch import BatchPlan, batch_plan
from mamba_dist.config.engine import EngineConfig
from mamba_dist.config.load import (
    ConfigLoader,
    LoadedConfig,
    create_default_config,
    load_config,
    validate_config_compatibility,
)
from mamba_dist.config.schema import (
    SCHEMA_VERSION,
    CheckpointConfig,
    DataConfig,
    MambaConfig,
    RunConfig,
    TelemetryConfig,
    TrainingConfig,
)

__all__ = [
    "SCHEMA_VERSION",
    "BatchPlan",
    "CheckpointConfig",
    "ConfigLoader",
    "DataConfig",
    "EngineConfig",
    "LoadedConfig",
    "MambaConfig",
    "RunConfig",
    "TelemetryConfig",
    "TrainingConfig",
    "batch_plan",
    "create_default_config",
    "load_config",
    "validate_config_compatibility",
]
