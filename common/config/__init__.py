"""Every configuration value of the project: its type, its default, its unit."""

from common.config.base import Config, dump_yaml, explain, load_yaml, merge
from common.config.data import PackConfig, SynthConfig
from common.config.evaluate import ExportConfig, FidelityConfig, FlopsConfig, ProbeConfig, ReportConfig
from common.config.frozen import TIMM, TIMM_RANDOM, DrawConfig, FrozenConfig
from common.config.model import (
    MASK_GROUP_SIZE,
    BlockSetConfig,
    EncoderConfig,
    MaskConfig,
    MaskSetConfig,
    PredictorConfig,
    TargetDtype,
    TubeSetConfig,
    ViewConfig,
    Views,
)
from common.config.presets import MASKS, PRESETS, mask_layer, preset_layer
from common.config.serve import PrecomputeConfig, ServeConfig, ServiceConfig, StatusConfig
from common.config.train import (
    ComputeConfig,
    EmaConfig,
    LoaderConfig,
    OptimConfig,
    ServiceClientConfig,
    StudentRun,
    TeacherComputeConfig,
    TeacherRun,
    TrainConfig,
    VJepaRun,
)

__all__ = [
    "MASKS",
    "MASK_GROUP_SIZE",
    "PRESETS",
    "TIMM",
    "TIMM_RANDOM",
    "BlockSetConfig",
    "ComputeConfig",
    "Config",
    "DrawConfig",
    "EmaConfig",
    "EncoderConfig",
    "ExportConfig",
    "FidelityConfig",
    "FlopsConfig",
    "FrozenConfig",
    "LoaderConfig",
    "MaskConfig",
    "MaskSetConfig",
    "OptimConfig",
    "PackConfig",
    "PrecomputeConfig",
    "PredictorConfig",
    "ProbeConfig",
    "ReportConfig",
    "ServeConfig",
    "ServiceClientConfig",
    "ServiceConfig",
    "StatusConfig",
    "StudentRun",
    "SynthConfig",
    "TargetDtype",
    "TeacherComputeConfig",
    "TeacherRun",
    "TrainConfig",
    "TubeSetConfig",
    "VJepaRun",
    "ViewConfig",
    "Views",
    "dump_yaml",
    "explain",
    "load_yaml",
    "mask_layer",
    "merge",
    "preset_layer",
]
