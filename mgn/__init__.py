"""MGN (Multiple Granularity Network, arXiv:1804.01438) for person re-identification.

Importing the package is light: gin, absl and torchvision come only with the modules that use them.
"""

__version__ = '0.1.0'


def load(path, device='auto', precision='float32', flip_test=False, batch_size=64):
    """The network in a file, ready for `embed` (`mgn.embedder.Embedder`).

    Args:
        path: a checkpoint of mgn.train, MGN weights of fast-reid (`mgn.weights`), or an .onnx file of mgn.export, which
            runs on the CPU in the precision that it was exported in: device, precision and flip_test stay as they are.
        device: 'auto', 'cpu', 'cuda', 'cuda:1', 'mps' or a torch.device. precision: of the network, 'float32',
            'bfloat16', 'float16' or 'auto'. flip_test: average the features of image and mirrored image. batch_size:
            images at a time.
    Raises:
        UserError: a file that is missing, damaged or of something else, or an argument out of range.
    """
    from mgn.embedder import Embedder  # and torch

    return Embedder(path, device, precision, flip_test, batch_size)
