"""What `efreg demo`, `train` and `sweep` need: networks, data sets, the trainer, sweeps and figures."""
