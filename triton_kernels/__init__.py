"""Triton kernels for GPUs; installed as ``pyfast_ppo.triton_kernels``. None yet: ``pyfast_ppo.backends`` says so."""
