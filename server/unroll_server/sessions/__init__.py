"""Sessions by id: sequences whose state the server keeps for callers.

The stores import neither models nor the engine, so that a supervisor of workers can open one.
"""
