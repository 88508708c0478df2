"""The demonstration: a small model trained on synthetic forest, how it was made, and its run.

``predict(model="demo")`` uses them. They are good for trying the software and for nothing else.
"""

#: Seeds of synthetic forests: those that the model was trained on, and those it never saw.
TRAINING_SEEDS = range(1000, 1120)
TEST_SEEDS = range(9000, 9012)
