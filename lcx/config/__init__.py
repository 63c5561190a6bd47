"""What a run is made of: `ConfigDict` at the edge, frozen dataclasses inside.

A config file has `get_config(arg="")`, which changes what it needs on `default_config()` and returns it. Overrides of
the command line act on that ConfigDict (lcx/config/files.py); `Config.from_dict` then turns it into the frozen
dataclasses that the rest of lcx reads (lcx/config/sections.py).
"""

from lcx.config.files import assign, call_config_file, choose, default_config, load_config, override, parse_options
from lcx.config.sections import (
    MESH_AXES,
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    HealthConfig,
    LoggingConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    SourceConfig,
    StageConfig,
    TrainConfig,
    remat_chunk,
)

__all__ = [
    "MESH_AXES",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "HealthConfig",
    "LoggingConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "SourceConfig",
    "StageConfig",
    "TrainConfig",
    "assign",
    "call_config_file",
    "choose",
    "default_config",
    "load_config",
    "override",
    "parse_options",
    "remat_chunk",
]
