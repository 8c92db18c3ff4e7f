"""TorchTitan: a PyTorch-native platform for pretraining generative models.

Importing the package imports nothing heavy; `torch` is imported by the modules that need it.
"""

__version__ = "0.1.0"
