"""Every configuration value of the project: its type, its default, its unit."""

from common.config.base import Config, dump_yaml, explain, load_yaml, merge
from common.config.data import InspectConfig, MixConfig, MixExclusion, MixRecipe, MixSource, PackConfig, SynthConfig
from common.config.evaluate import ProbeConfig, ReportConfig
from common.config.model import MASK_GROUP_SIZE, EncoderConfig, MaskConfig, MaskSetConfig, PredictorConfig, TargetDtype, ViewConfig, Views
from common.config.presets import PRESETS, preset_layer
from common.config.serve import PrecomputeConfig, ServeConfig, ServiceConfig, StatusConfig
from common.config.train import LoaderConfig, OptimConfig, ServiceClientConfig, StudentRun, TeacherComputeConfig, TeacherRun, TrainConfig

__all__ = [
    "MASK_GROUP_SIZE",
    "PRESETS",
    "Config",
    "EncoderConfig",
    "InspectConfig",
    "LoaderConfig",
    "MaskConfig",
    "MaskSetConfig",
    "MixConfig",
    "MixExclusion",
    "MixRecipe",
    "MixSource",
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
    "ViewConfig",
    "Views",
    "dump_yaml",
    "explain",
    "load_yaml",
    "merge",
    "preset_layer",
]
