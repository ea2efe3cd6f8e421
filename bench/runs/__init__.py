"""Training runs of both arms: made, kept, compared and drawn; for learning.py and soak.py."""
