"""Image files → samples → identity-balanced batches → augmented tensors, and the drawn pedestrians of the demo.

Read datasets, sampler, images, loader, augmentation; random_streams gives every random draw of them its numbers.
"""
