"""The operations that other projects can use alone: they import torch and NumPy only.

Read errors, arguments, native (what is compiled) and private (torch's names), then one file per operation with its
reference: distance, triplet, ranking/, metrics, query_expansion. `python -m mgn.ops` lists what is compiled.
"""

from mgn.ops.distance import pairwise_distance
from mgn.ops.errors import UserError
from mgn.ops.metrics import METRICS, evaluate_rank, retrieval_metrics
from mgn.ops.native import implementation
from mgn.ops.query_expansion import expand_queries
from mgn.ops.ranking.nearest import Nearest, topk, topk_from_distance
from mgn.ops.ranking.ranks import MatchRanks, match_ranks, match_ranks_from_distance
from mgn.ops.ranking.reranking import k_reciprocal_ranks
from mgn.ops.triplet import BatchHard, batch_hard, batch_hard_triplet_loss

__all__ = ['METRICS', 'BatchHard', 'MatchRanks', 'Nearest', 'UserError', 'batch_hard', 'batch_hard_triplet_loss',
           'evaluate_rank', 'expand_queries', 'implementation', 'k_reciprocal_ranks', 'match_ranks',
           'match_ranks_from_distance', 'pairwise_distance', 'retrieval_metrics', 'topk', 'topk_from_distance']
