"""The parts of :mod:`pyfast_ppo.check_env`: ``course.py`` has the checks in their order, the others one subject each.

A check is a small function or class that returns a :class:`~pyfast_ppo._check_env.finding.Finding` or None.
docs/check_env.md explains each of them. ``E`` environments, ``A`` action dimensions.
"""
