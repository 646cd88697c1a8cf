"""The laboratory: networks, data, a trainer that resumes, sweeps and figures, for the demo and `efreg train`."""
