"""The laboratory: networks, data, a trainer that resumes, sweeps, figures; for the demo and `efreg train`."""
