// What the bindings of the CPU kernels share: checks that keep a wrong call from touching foreign memory.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "kernels/basics_cpu.h"
#include "kernels/ranking.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void parallel(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& work) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    const mgn::Denormals denormals;
    work(begin, end);
  });
}

inline int checked_set(int64_t set) {
  STD_TORCH_CHECK(0 <= set && set < mgn::instruction_sets(), "mgn_cpu: expected an instruction set from 0 to ",
                  mgn::instruction_sets() - 1, ", but got ", set, "; torch.ops.mgn_cpu.instruction_sets() lists them");
  return int(set);
}

template <typename T> constexpr ScalarType kType = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;
template <> constexpr ScalarType kType<int64_t> = ScalarType::Long;
template <> constexpr ScalarType kType<int32_t> = ScalarType::Int;

template <typename T> T* pointer(const Tensor& tensor, int64_t count) {
  STD_TORCH_CHECK(
      tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == kType<T> && tensor.numel() == count,
      "mgn_cpu: expected a contiguous CPU tensor of ", count, " elements of the right type, but got ", tensor.numel(),
      " elements or another type, layout or device; call mgn.ops, which prepares tensors");
  return static_cast<T*>(tensor.data_ptr());
}

inline mgn::Rows rows(const Tensor& features) {
  STD_TORCH_CHECK(
      features.is_cpu() && features.dim() == 2 && features.scalar_type() == ScalarType::Float &&
          (features.size(1) <= 1 || features.stride(1) == 1),
      "mgn_cpu: expected features (n, D) of float32 on the CPU, contiguous along D; call mgn.ops, which prepares them");
  return {static_cast<const float*>(features.data_ptr()), features.size(0), features.size(1), features.stride(0)};
}

inline const int64_t* ids(const Tensor& tensor, int64_t count, int64_t below) {
  const int64_t* values = pointer<int64_t>(tensor, count);
  STD_TORCH_CHECK(std::all_of(values, values + count, [&](int64_t i) { return 0 <= i && i < below; }),
                  "mgn_cpu: expected indices from 0 to ", below - 1, ", but some lie outside");
  return values;
}

template <typename T> const T* matrix(const Tensor& matrix, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(matrix.is_cpu() && matrix.dim() == 2 && matrix.size(0) == rows && matrix.size(1) == columns &&
                      matrix.scalar_type() == kType<T> && (columns <= 1 || matrix.stride(1) == 1),
                  "mgn_cpu: expected a CPU matrix of shape (", rows, ", ", columns,
                  ") of the right type, contiguous along rows");
  return static_cast<const T*>(matrix.data_ptr());
}

// run(float()) or run(double()), as the tensor's elements are.
template <typename Run> auto with_type(const Tensor& tensor, const Run& run) {
  return tensor.scalar_type() == ScalarType::Double ? run(double()) : run(float());
}

}  // namespace
