"""Studies: the models of one plan trained in order, scored on the same text, and compared."""

from calm.workflows.study.plan import Evaluation, Fluency, Plan
from calm.workflows.study.run import run_study, study_cost

__all__ = ["Evaluation", "Fluency", "Plan", "run_study", "study_cost"]
