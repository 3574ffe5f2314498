"""What is wrong with a data set: `python -m training.audit --data DIR`.

inspection     every picture, decoded once
duplicates     the same and nearly the same pictures
embedding      frozen features on the engine that serves
label_errors   labels that a cross-validated classifier contradicts
findings       all of these together, as JSON
page           the findings as Markdown with sheets of pictures
summary        the cheap findings, in a few lines before a training
"""
