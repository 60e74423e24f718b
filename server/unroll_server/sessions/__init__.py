"""Sessions by id: sequences whose state the server keeps, for callers that can't hold it.

The stores know nothing of models and engine, so that a parent of workers can open one.
"""
