"""The state of a run: data order, checkpoint manifests, resuming."""
