"""The operations that other projects can use alone; they import torch and NumPy only. `python -m mgn.ops` tells what is compiled."""

from mgn.ops.distance import pairwise_distance
from mgn.ops.drop_in import evaluate_rank
from mgn.ops.metrics import METRICS, retrieval_metrics
from mgn.ops.native import implementation
from mgn.ops.nearest import Nearest, topk, topk_from_distance
from mgn.ops.query_expansion import expand_queries
from mgn.ops.ranking import MatchRanks, match_ranks, match_ranks_from_distance
from mgn.ops.reranking import k_reciprocal_ranks, re_ranking
from mgn.ops.sharding import match_ranks_sharded
from mgn.ops.triplet import BatchHard, batch_hard, batch_hard_triplet_loss

__all__ = ['BatchHard', 'METRICS', 'retrieval_metrics', 'expand_queries', 'MatchRanks', 'Nearest', 'batch_hard', 'batch_hard_triplet_loss', 'evaluate_rank', 'implementation', 'k_reciprocal_ranks',
           'match_ranks', 'match_ranks_from_distance', 'match_ranks_sharded', 'pairwise_distance', 're_ranking', 'topk', 'topk_from_distance']
