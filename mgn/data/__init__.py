"""Image files → samples → identity-balanced batches of augmented tensors; and the drawn pedestrians of the demo.

Read datasets, sampler, images, augmentation, supply.
"""
