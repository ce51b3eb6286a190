"""Classifier guidance and how it is scheduled."""

from calib_guidance.guidance.base import Aux as Aux
from calib_guidance.guidance.base import Guidance as Guidance
from calib_guidance.guidance.base import Guided as Guided
from calib_guidance.guidance.base import Plan as Plan
from calib_guidance.guidance.classifier_guidance import ClassifierGuidance as ClassifierGuidance
from calib_guidance.guidance.classifier_guidance import SwitchedGuidance as SwitchedGuidance
from calib_guidance.guidance.norms import match_norm as match_norm
from calib_guidance.guidance.norms import rms as rms
from calib_guidance.guidance.pipelines import guide_pipeline as guide_pipeline
from calib_guidance.guidance.pipelines import guided_scheduler as guided_scheduler
from calib_guidance.guidance.resolution import ClassifierResolution as ClassifierResolution
from calib_guidance.guidance.resolution import fit_gain as fit_gain
from calib_guidance.guidance.reuse import GradientReuse as GradientReuse
from calib_guidance.guidance.schedules import GuidanceSchedule as GuidanceSchedule
from calib_guidance.guidance.stabilizer import GradientStabilizer as GradientStabilizer
from calib_guidance.guidance.training_free import TrainingFreeGuidance as TrainingFreeGuidance
