"""The path of a training picture.

`train` reads a `recipe`, whose flags `cli` parses, and a folder: `data` decodes every file with the service's own
preprocessing and splits off a validation set. `loader` shuffles by seed and epoch and applies `augment`; `distillation`
adds a teacher's targets where the recipe names one. `trainer` runs the loop on one page: forward pass, loss,
`optimizers`, `checkpoint`, validation, log, and at the end the average of the final checkpoints; `distributed` shares
the batches among processes. `export` folds batch norms and quantises; `calibration` finds activation ranges,
temperature and label-smoothing correction on the validation images, with the engine that will serve. `export` stores
reference outputs, evaluates the test images once with `metrics`, and writes one weights file; `report` draws it.
`evaluate` repeats the last two steps for any weights file.
"""
