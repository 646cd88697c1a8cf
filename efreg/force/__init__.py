"""The force: laws, `attach` and its handle, the store of coefficients, the hooks, `penalty`."""
