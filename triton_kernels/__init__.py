"""The Triton kernels. They know nothing of torch: ``pyfast_ppo.backends.triton`` launches them."""
