"""Heads: from a hidden state of the backbone to the latent vector of the next patch. One file per head."""

from calm.models.heads.base import Head, HeadConfig, HeadLoss
from calm.models.heads.registry import find_head, head_types, register_head

__all__ = ["Head", "HeadConfig", "HeadLoss", "find_head", "head_types", "register_head"]
