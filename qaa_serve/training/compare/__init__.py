"""``qaa-serve compare``: several ways of training on the same rows, under the same budget, in one report.

``plan`` says which trainings there are, ``rows`` what they train and are tested on, ``runner`` executes what is
missing, ``evaluate`` has the test set answered (in a process of its own), ``metrics`` scores the answers,
``results`` gathers everything, ``report`` and ``figures`` show it. Importing the package loads none of them.
"""
