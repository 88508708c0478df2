"""A benchmark that anyone can run: ``python -m tests.benchmarks``.

Every ratio comes from one run in which both sides took turns. Tables go to the screen, to JSON and
to Markdown, under the name of the machine.
"""
