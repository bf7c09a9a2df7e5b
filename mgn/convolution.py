"""The convolutions of a ResNet, on CPUs by matrix products where oneDNN's own algorithms are slower."""

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

SMALL_MAP = 16       # pixels of an output map up to which the whole convolution is one product
WIDE = 128           # input and output channels from which the gradient of the weights is made of products


class ProductConv(nn.Conv2d):
    """An nn.Conv2d that uses matrix products on CPUs where they are faster.

    For 1×1 and 3×3 weights with padding that keeps the map, stride 1 or 2, no dilation and one group. oneDNN reaches
    half the speed of its own matrix product or less in the gradient of weights, and in everything on maps of a few
    pixels (benchmarks/convolutions.py). Channels-last, pixels are runs of C numbers and weights already are matrices.
    """

    def forward(self, x):
        stride, k = self.stride[0], self.kernel_size[0]
        if x.device.type != 'cpu' or torch.compiler.is_compiling():
            return super().forward(x)
        height, width = ((pixels - 1) // stride + 1 for pixels in x.shape[2:])
        if height * width <= SMALL_MAP and k == 3:
            pixels = torch.cat(list(windows(x, k, stride, height, width)), dim=3)  # (B, h, w, 9C)
            return F.linear(pixels, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias).permute(0, 3, 1, 2)
        learning = self.weight.requires_grad and torch.is_grad_enabled()
        plain = self.bias is None and x.dtype == self.weight.dtype and not torch.is_autocast_enabled('cpu')
        if min(self.in_channels, self.out_channels) >= WIDE and learning and plain:
            return ProductGradient.apply(x, self.weight, stride)
        return super().forward(x)


class ProductGradient(torch.autograd.Function):
    """A convolution whose gradient of weights is k² products (O, pixels) · (pixels, C), one per place in a window."""

    @staticmethod
    def forward(ctx, x, weight, stride):
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (x, weight), stride = ctx.saved_tensors, ctx.stride
        (out, channels, k, _), (height, width) = weight.shape, gradient.shape[2:]
        x_gradient = weight_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient, _, _ = torch.ops.aten.convolution_backward(
                gradient, x, weight, None, [stride] * 2, [k // 2] * 2, [1, 1], False, [0, 0], 1, [True, False, False])
        if ctx.needs_input_grad[1]:
            rows = gradient.permute(0, 2, 3, 1).flatten(0, 2).t()  # (O, Bhw)
            weight_gradient = weight.new_empty(out, k, k, channels)
            for place, pixels in zip(weight_gradient.flatten(1, 2).unbind(1), windows(x, k, stride, height, width)):
                torch.mm(rows, pixels.flatten(0, 2), out=place)
            weight_gradient = weight_gradient.permute(0, 3, 1, 2)
        return x_gradient, weight_gradient, None


def use_products(module):
    """Makes ProductConvs of the convolutions in `module`: the same layers and parameters, with another `forward`."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            layer.__class__ = ProductConv


def windows(x, k, stride, height, width):
    """For each place in a k×k window, by rows, the pixels under it: views (B, height, width, C) of the padded map."""
    padded, border = x.permute(0, 2, 3, 1), k // 2
    if border:
        padded = F.pad(padded, (0, 0, border, border, border, border))
    return (padded[:, i:i + stride * (height - 1) + 1:stride, j:j + stride * (width - 1) + 1:stride]
            for i in range(k) for j in range(k))
