"""One script a verb: `graphopt VERB ...` and `python tools/VERB.py ...` are the same code."""

if __name__ != "graphopt.tools":
    raise ImportError("import graphopt.tools instead of tools: one file must not be two modules")
