"""Membership inference: members that were learned by heart are told from others, and of an untrained model nobody is."""

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from fedlora import worker
from fedlora.audit.membership import MOST, against, attack, bound, both, measures, record_losses
from fedlora.checks.tiny import world
from fedlora.errors import CheckpointError, ConfigError
from fedlora.folder import RunFolder
from fedlora.lora import LoRA
from fedlora.strategy import Job, Training
from tests.models import make
from tests.test_simulate import fedlora
