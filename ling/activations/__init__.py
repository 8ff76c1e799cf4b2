"""FFN activations: the registry (torch-free), the reference math, and the module that a layer holds."""
