"""Views of a program that passes share: cut points, repeated blocks, liveness, cost and storage. Nothing is changed."""
