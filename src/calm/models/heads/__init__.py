"""Heads: from a hidden state of the backbone to the latent vector of the next patch."""

from calm.models.heads.base import Head, HeadLoss
from calm.models.heads.energy import EnergyHead

HEADS: dict[str, type[Head]] = {"energy": EnergyHead}

__all__ = ["HEADS", "EnergyHead", "Head", "HeadLoss"]
