"""Samples → identity-balanced batches: P identities × K images, as a pure function of the step."""


from mgn.data import random_streams
from mgn.ops.errors import UserError


class IdentitySampler:
    """Batches of P identities × K images each, in fast-reid's way (recipe of `projects/MGN`).

    An epoch visits the identities in random order and drops the incomplete tail. An identity gives one random image
    and K−1 from other cameras where there are any (with replacement when too few), else K−1 of its other images.

    Args:
        labels: (N,) ints, the identity of each sample. camids: (N,) ints, its camera.
    Raises:
        UserError: fewer than P identities.
    """

    def __init__(self, labels, camids, P, K, seed):
        self.images_of = {}
        for index, label in enumerate(labels):
            self.images_of.setdefault(label, []).append(index)
        if len(self.images_of) < P:
            raise UserError(f'IdentitySampler needs at least P={P} identities, found {len(self.images_of)}; '
                            f'lower P or add data')
        self.camids, self.P, self.K, self.seed = list(camids), P, K, seed
        self.identities = sorted(self.images_of)
        self.steps_per_epoch = len(self.identities) // P

    def batch(self, step):
        """Sample indices of the batch of step 0, 1, 2, …: P·K ints, the K images of an identity side by side."""
        epoch, first = divmod(step, self.steps_per_epoch)
        order = random_streams.generator(self.seed, random_streams.IDENTITY_ORDER, epoch).permutation(self.identities)
        indices = []
        for place, identity in enumerate(order[first * self.P:(first + 1) * self.P].tolist()):
            rng = random_streams.generator(self.seed, random_streams.IDENTITY_IMAGES, step, place)
            indices += self.images(self.images_of[identity], rng)
        return indices

    def images(self, candidates, rng):
        chosen = candidates[rng.integers(len(candidates))]
        others = [i for i in candidates if self.camids[i] != self.camids[chosen]] or [
            i for i in candidates if i != chosen] or [chosen]
        return [chosen, *rng.choice(others, self.K - 1, replace=len(others) < self.K - 1).tolist()]
