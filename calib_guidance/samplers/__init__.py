"""Samplers, one per file. The base owns the loop."""

from calib_guidance.samplers.adaptive_ode import AdaptiveODE as AdaptiveODE
from calib_guidance.samplers.base import BufferedObserver as BufferedObserver
from calib_guidance.samplers.base import Observer as Observer
from calib_guidance.samplers.base import Sampler as Sampler
from calib_guidance.samplers.base import StepRecord as StepRecord
from calib_guidance.samplers.base import Transition as Transition
from calib_guidance.samplers.ddim import DDIM as DDIM
from calib_guidance.samplers.ddpm import DDPM as DDPM
from calib_guidance.samplers.dpm_solver import DPMSolver as DPMSolver
from calib_guidance.samplers.flow_ode import FlowODE as FlowODE
from calib_guidance.samplers.flow_sde import FlowSDE as FlowSDE
from calib_guidance.samplers.heun import Heun as Heun
from calib_guidance.samplers.unipc import UniPC as UniPC
