"""What `graphopt conformance` is made of: ONNX's own tests, and the table of what came of them."""
