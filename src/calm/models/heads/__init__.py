"""Heads: from a hidden state of the backbone to the latent vector of the next patch."""

from calm.models.heads.base import Head, HeadLoss
from calm.models.heads.categorical_flow import CategoricalFlowHead
from calm.models.heads.diffusion import DiffusionHead
from calm.models.heads.energy import EnergyHead
from calm.models.heads.flow import FlowHead

HEADS: dict[str, type[Head]] = {
    "energy": EnergyHead,
    "diffusion": DiffusionHead,
    "flow": FlowHead,
    "categorical_flow": CategoricalFlowHead,
}

__all__ = ["HEADS", "CategoricalFlowHead", "DiffusionHead", "EnergyHead", "FlowHead", "Head", "HeadLoss"]
