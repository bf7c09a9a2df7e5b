"""MGN (Multiple Granularity Network, arXiv:1804.01438) for person re-identification.

Importing the package is light: gin, absl and torchvision come only with the modules that use them.
"""

__version__ = '0.1.0'
