"""The Open Inference Protocol v2 over REST: `routes` has the endpoints, `handler` the path of an inference request,
`codec` converts bytes to tensors and back, `outputs` selects and encodes output tensors, `models` describes the two
models.
"""
