"""Composition: from a configuration to everything the loop needs."""

import dataclasses
import json
import logging
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from mamba_dist.checkpoint.manifest import Progress
from mamba_dist.config.batch import BatchPlan, batch_plan
from mamba_dist.config.load import ConfigLoader
from mamba_dist.config.schema import RunConfig
from mamba_dist.data.batch import Batch
from mamba_dist.data.loader import TokenDataset, TrainLoader, ValidationLoader, open_dataset
from mamba_dist.engine import zero
from mamba_dist.engine.base import Engine, OptimizerSettings, ParameterGroup
from mamba_dist.engine.world import World
from mamba_dist.errors import ConfigError
from mamba_dist.model.flops import flops_per_token
from mamba_dist.model.init import audit, initialize
from mamba_dist.model.lm import MambaLM
from mamba_dist.model.param_groups import classify, format_table
from mamba_dist.ops.backend import resolve_backend
from mamba_dist.telemetry.metrics import ConsoleSink, JsonlSink, Metrics, Sink, TensorBoardSink
from mamba_dist.telemetry.progress import progress as progress_bar
from mamba_dist.train.guard import SkipGuard
from mamba_dist.train.meter import Meter
from mamba_dist.train.schedule import total_steps
from mamba_dist.train.state import beginning, resume, run_folder
from mamba_dist.train.stop import StopRequest
