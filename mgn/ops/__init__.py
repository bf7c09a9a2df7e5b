"""The operations that other projects can use alone; they import torch and NumPy only."""

from mgn.ops.match_ranks import MatchRanks, match_ranks
from mgn.ops.triplet import batch_hard_triplet_loss

__all__ = ['MatchRanks', 'batch_hard_triplet_loss', 'match_ranks']
