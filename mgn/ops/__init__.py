"""The operations that other projects can use alone; they import torch and NumPy only. `python -m mgn.ops` tells what is compiled."""

from mgn.ops.distance import pairwise_distance
from mgn.ops.extension import implementation
from mgn.ops.match_ranks import MatchRanks, match_ranks
from mgn.ops.triplet import BatchHard, batch_hard, batch_hard_triplet_loss

__all__ = ['BatchHard', 'MatchRanks', 'batch_hard', 'batch_hard_triplet_loss', 'implementation', 'match_ranks', 'pairwise_distance']
