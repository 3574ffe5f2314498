"""The Open Inference Protocol v2 over REST: `protocol` turns bytes into tensors and back, `schemas` is its JSON."""
