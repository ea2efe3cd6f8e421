"""One file per operation: its signature, its checks, its autograd."""
