"""Benchmarks: what each operation, an update and a whole iteration cost, against what else there is.

One file per subject (``loss``, ``timeline``, ``gae``, ``kl``, ``update``, ``profile``); ``pyfast-ppo bench`` and the
scripts in ``bench/`` run them. A subject has two functions: ``cases(device, quick)``, what is to be measured, and
``measure(case, options)``, which measures one case and returns its rows (``results.py``).
"""
