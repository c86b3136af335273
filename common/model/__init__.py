"""The models of SALT (arXiv:2509.24317) and the frozen teacher made from one, in plain PyTorch."""
