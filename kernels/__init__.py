"""One file an operation, its plain PyTorch reference first. Kernels import nothing else of Burnish."""
