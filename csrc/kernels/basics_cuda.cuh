// What all CUDA kernels use: the types of features, sums over a warp, and launching.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "feature_type_cuda.h"

namespace mgn {
namespace {

constexpr unsigned kWarp = 0xffffffffu;

template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;  // the type that computes

__device__ float widen(float x) { return x; }
__device__ double widen(double x) { return x; }
__device__ float widen(__half x) { return __half2float(x); }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
template <typename T> __device__ T narrow(Wide<T> x) {
  if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(x);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(x);
  else
    return x;
}

template <typename C> __device__ constexpr C infinity() { return C(HUGE_VAL); }

template <typename V> __device__ V sum_over_warp(V value) {
  for (int distance = 16; distance; distance /= 2) value += __shfl_xor_sync(kWarp, value, distance);
  return value;
}

// Nothing to launch is no error.
template <typename Argument>
cudaError_t launch(void (*kernel)(Argument), int64_t blocks, int threads, cudaStream_t stream,
                   const Argument& argument) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(threads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, argument);
}

// Calls run with a value of the features' type.
template <typename Run> cudaError_t with_type(FeatureType type, Run run) {
  switch (type) {
    case FeatureType::float32: return run(float());
    case FeatureType::float64: return run(double());
    case FeatureType::float16: return run(__half());
    default: return run(__nv_bfloat16());
  }
}

}  // namespace
}  // namespace mgn
