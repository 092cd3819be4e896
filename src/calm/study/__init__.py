"""Studies: the models of one plan trained in order, scored on the same text, and compared."""

from calm.study.plan import Evaluation, Fluency, Plan
from calm.study.run import run_study, study_cost

__all__ = ["Evaluation", "Fluency", "Plan", "run_study", "study_cost"]
