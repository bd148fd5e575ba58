"""``qaa-serve compare``: several ways of training on the same rows, under the same budget, in one report.

``plan`` says which trainings there are, ``study`` prepares their rows, ``runner`` executes what is missing,
``evaluate`` has the test set answered (in a process of its own), ``results`` scores the answers and gathers
everything, ``report`` and ``figures`` show it. Importing the package loads none of them.
"""
