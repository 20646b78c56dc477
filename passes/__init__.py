"""FX passes: from the graph that Dynamo captured to one that computes only the active tokens.

`pipeline.py` shows all of them in order. Nothing here knows where the token mask comes from.
"""
