"""Many runs of one question: what to try, equal sizes, where it runs, and the report.

A trial is a run of `lcx train` in a workdir of its own. This room knows configs as data and processes as commands; what
needs a model (counting parameters) is passed in.
"""
