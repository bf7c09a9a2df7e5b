"""The convolutions of a ResNet, on CPUs by matrix products where oneDNN's own ways are slower."""

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

SMALL_MAP = 16       # pixels up to which a whole convolution is one product
WIDE = 128           # channels, of input and output, from which the weights' gradient is products


class ProductConv(nn.Conv2d):
    """nn.Conv2d, of 1×1 or 3×3 weights with padding that keeps the map, stride 1 or 2, undilated and of one group, where it matters.

    oneDNN reaches half its matrix product's speed or less in the gradient of weights, and on maps of a few pixels in everything
    (benchmarks/convolutions.py). Channels-last, pixels are runs of C numbers and weights are matrices as they are.
    """

    def forward(self, x):
        s, k = self.stride[0], self.kernel_size[0]
        if x.device.type != 'cpu' or torch.compiler.is_compiling():
            return super().forward(x)
        height, width = ((pixels - 1) // s + 1 for pixels in x.shape[2:])
        if height * width <= SMALL_MAP and k == 3:
            windows = torch.cat(list(windows_of(x, k, s, height, width)), dim=3)            # (B, h, w, 9C)
            return F.linear(windows, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias).permute(0, 3, 1, 2)
        if (min(self.in_channels, self.out_channels) >= WIDE and self.bias is None and self.weight.requires_grad and torch.is_grad_enabled()
                and x.dtype == self.weight.dtype and not torch.is_autocast_enabled('cpu')):
            return ProductGradient.apply(x, self.weight, s)
        return super().forward(x)


class ProductGradient(torch.autograd.Function):
    """A convolution whose weights get their gradient by k² products, one for each place in the window: (O, pixels) · (pixels, C)."""

    @staticmethod
    def forward(ctx, x, weight, s):
        ctx.save_for_backward(x, weight)
        ctx.s = s
        return F.conv2d(x, weight, stride=s, padding=weight.shape[2] // 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (x, weight), s = ctx.saved_tensors, ctx.s
        (out, channels, k, _), (height, width) = weight.shape, gradient.shape[2:]
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = torch.ops.aten.convolution_backward(gradient, x, weight, None, [s, s], [k // 2, k // 2], [1, 1], False, [0, 0], 1,
                                                       [True, False, False])[0]
        if ctx.needs_input_grad[1]:
            rows = gradient.permute(0, 2, 3, 1).flatten(0, 2).t()                            # (O, Bhw)
            of_weight = weight.new_empty(out, k, k, channels)
            for place, window in zip(of_weight.flatten(1, 2).unbind(1), windows_of(x, k, s, height, width)):
                torch.mm(rows, window.flatten(0, 2), out=place)
            of_weight = of_weight.permute(0, 3, 1, 2)
        return of_x, of_weight, None


def windows_of(x, k, s, height, width):
    """For each place in a k×k window, row by row, the pixels that it meets: views (B, height, width, C) of the padded map."""
    padded = x.permute(0, 2, 3, 1)
    if k > 1:
        padded = F.pad(padded, (0, 0, *4 * (k // 2,)))
    return (padded[:, i:i + s * (height - 1) + 1:s, j:j + s * (width - 1) + 1:s] for i in range(k) for j in range(k))
