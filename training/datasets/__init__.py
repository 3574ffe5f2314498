"""The forms in which people keep labelled pictures, each read into a `Listing` by a module of its own.

folders      DIR/train/<class>/* with test/ and val/, or DIR/<class>/*
tables       a CSV of path and label
arrays       MedMNIST's and Keras' .npz
parquet      Hugging Face's parquet and arrow files with image bytes
cifar        the python version of CIFAR-10 and CIFAR-100
vision       other torchvision data sets, by name
archives     a zip or tar file of any of these
discovery    which of them a path is
"""
