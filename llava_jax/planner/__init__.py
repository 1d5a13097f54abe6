"""Plan a run with the real TPU compiler before a pod is rented."""
