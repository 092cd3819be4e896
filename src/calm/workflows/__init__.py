"""Workflows of several runs: quickstart, study, patch-size sweep."""
