"""The operations that other projects can use alone; they import torch and NumPy only. `python -m mgn.ops` tells what is compiled."""

from mgn.ops.distance import pairwise_distance
from mgn.ops.drop_in import evaluate_rank
from mgn.ops.extension import implementation
from mgn.ops.ranking import MatchRanks, match_ranks, match_ranks_from_distance
from mgn.ops.triplet import BatchHard, batch_hard, batch_hard_triplet_loss

__all__ = ['BatchHard', 'MatchRanks', 'batch_hard', 'batch_hard_triplet_loss', 'evaluate_rank', 'implementation', 'match_ranks',
           'match_ranks_from_distance', 'pairwise_distance']
