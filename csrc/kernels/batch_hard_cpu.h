// Batch-hard mining on the CPU. No torch header: plain pointers, and the caller brings the threads.
#pragma once
#include "basics_cpu.h"

namespace mgn {

template <typename T> struct Features {  // row-major
  int64_t heads, n, m, d;
  bool own;             // the anchors are their own candidates: one array, one list of labels, one gradient
  const T* anchors;     // (heads, n, d)
  const T* candidates;  // (heads, m, d)
};

template <typename T> struct Mined {  // (heads, n) each
  T *dist_ap, *dist_an;
  int64_t *pos_idx, *neg_idx;
};

// Returns whether all features are finite; where not, nothing is written.
template <typename T>
bool batch_hard(const Features<T>& x, const int64_t* labels, const int64_t* candidate_labels, const Mined<T>& out,
                int instruction_set, const Parallel& parallel);

// loss: (heads), the mean over anchors with both a positive and a negative.
// slope: (heads, n), ∂loss/∂dist_ap = −∂loss/∂dist_an.
template <typename T>
void triplet_loss(int64_t heads, int64_t n, const Mined<T>& mined, const double* margin, T* loss, T* slope);

// Gradients of Σ grad_ap·dist_ap + grad_an·dist_an. With a slope (heads, n) the two are grad_ap[head]·slope and its
// negative, and grad_an is not read. Indices are below m, or −1. grad_candidates is grad_anchors where the anchors are
// their own candidates.
template <typename T>
void batch_hard_backward(const Features<T>& x, const Mined<T>& mined, const T* grad_ap, const T* grad_an,
                         const T* slope, T* grad_anchors, T* grad_candidates, const Parallel& parallel);

}  // namespace mgn
