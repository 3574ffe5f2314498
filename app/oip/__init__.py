"""The Open Inference Protocol v2 over REST: `routes` names the calls, `inference` is the way of one request,
`protocol` turns bytes into tensors and back, `models` describes the two models, `statistics` counts.
"""
