// Tries the kernels' root and reciprocal (csrc/cuda/device.cuh) on every float of their ranges.
//
//     nvcc -arch=native -O3 -fmad=false --expt-relaxed-constexpr -Icsrc tools/check_roots.cu \
//         -o check_roots && ./check_roots
//
// prints one line and exits with 0 if all results are right, else with 1. A result is compared with
// the compiler's own, __fsqrt_rn or __frcp_rn, and with the real number, by multiplications in
// double that are exact. The check of the latter is itself checked on the host before.
#include <cmath>
#include <cstdio>

#include "codec/dynamic_map.h"
#include "cuda/device.cuh"
#include "rules/rule.h"

using torchao8::bits_float;
using torchao8::float_bits;
using torchao8::cuda::bounded_reciprocal;
using torchao8::cuda::bounded_root;

namespace {

// The midpoints between a positive float and its neighbours: 25 bits.
__host__ __device__ double midpoint_below(float x) {
  return (double(x) + double(bits_float(float_bits(x) - 1))) / 2;
}
__host__ __device__ double midpoint_above(float x) {
  return (double(x) + double(bits_float(float_bits(x) + 1))) / 2;
}
// Whether y is the float next to the root, or the reciprocal, of the positive x. The products have
// at most 50 bits. No root and no reciprocal but a power of two's is a float or a midpoint.
__host__ __device__ bool is_nearest_root(float x, float y) {
  const double low = midpoint_below(y), high = midpoint_above(y);
  return low * low < double(x) && double(x) < high * high;
}
__host__ __device__ bool is_nearest_reciprocal(float x, float y) {
  return midpoint_below(y) * double(x) < 1 && 1 < midpoint_above(y) * double(x);
}

struct Root {
  static constexpr float kFrom = torchao8::kRootFloor8bit;  // 2^-101
  static constexpr uint32_t kEnd = 0x7f800000;              // infinity
  __device__ static bool is_right(float x) {
    const float y = bounded_root(x);
    return float_bits(y) == float_bits(__fsqrt_rn(x)) && is_nearest_root(x, y);
  }
};
struct Reciprocal {
  static constexpr float kFrom = torchao8::kMinScale;                // 2^-126
  static constexpr uint32_t kEnd = float_bits(torchao8::kOverflow);  // 2^126
  __device__ static bool is_right(float x) {
    const float y = bounded_reciprocal(x), negative = bounded_reciprocal(-x);
    return float_bits(y) == float_bits(__frcp_rn(x)) && is_nearest_reciprocal(x, y) &&
           float_bits(negative) == (float_bits(y) | 0x80000000u);
  }
};

struct Found {
  unsigned long long tried, wrong;
  unsigned first_wrong;  // bits
};

template <class Function>
__global__ void try_all(Found* found) {
  const uint64_t threads = uint64_t(gridDim.x) * blockDim.x;
  unsigned long long tried = 0, wrong = 0;
  for (uint64_t bits =
           float_bits(Function::kFrom) + uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
       bits < Function::kEnd; bits += threads) {
    tried++;
    if (Function::is_right(bits_float(uint32_t(bits)))) continue;
    wrong++;
    atomicMin(&found->first_wrong, unsigned(bits));
  }
  atomicAdd(&found->tried, tried);
  atomicAdd(&found->wrong, wrong);
}

template <class Function>
bool try_on_device(Found& found) {
  found = {0, 0, ~0u};
  Found* on_device = nullptr;
  if (cudaMalloc(&on_device, sizeof found) == cudaSuccess &&
      cudaMemcpy(on_device, &found, sizeof found, cudaMemcpyHostToDevice) == cudaSuccess) {
    try_all<Function><<<2048, 256>>>(on_device);
    cudaMemcpy(&found, on_device, sizeof found, cudaMemcpyDeviceToHost);
  }
  const cudaError_t error = cudaGetLastError();
  if (on_device) cudaFree(on_device);
  if (error == cudaSuccess) return true;
  std::printf("check_roots: CUDA error: %s\n", cudaGetErrorString(error));
  return false;
}

// Whether the check takes what the host computes, and neither of its neighbours.
bool check_tells_right_from_wrong() {
  const auto only_nearest = [](auto is_nearest, float x, float y) {
    const uint32_t bits = float_bits(y);
    return is_nearest(x, y) && !is_nearest(x, bits_float(bits - 1)) &&
           !is_nearest(x, bits_float(bits + 1));
  };
  // An odd step meets every mantissa's low bits; the two ends are tried too.
  for (uint64_t bits = float_bits(Root::kFrom); bits < Root::kEnd; bits += 99991) {
    const float x = bits_float(uint32_t(bits));
    if (!only_nearest(is_nearest_root, x, std::sqrt(x))) return false;
  }
  for (uint64_t bits = float_bits(Reciprocal::kFrom); bits < Reciprocal::kEnd; bits += 99991) {
    const float x = bits_float(uint32_t(bits));
    if (!only_nearest(is_nearest_reciprocal, x, 1.0f / x)) return false;
  }
  const float last_root = bits_float(Root::kEnd - 1), last = bits_float(Reciprocal::kEnd - 1);
  return only_nearest(is_nearest_root, last_root, std::sqrt(last_root)) &&
         only_nearest(is_nearest_reciprocal, last, 1.0f / last);
}

}  // namespace

int main() {
  if (!check_tells_right_from_wrong()) {
    std::printf("check_roots: the check itself is wrong on this host\n");
    return 1;
  }
  Found roots, reciprocals;
  if (!try_on_device<Root>(roots) || !try_on_device<Reciprocal>(reciprocals)) return 1;
  const bool all_tried = roots.tried == Root::kEnd - float_bits(Root::kFrom) &&
                         reciprocals.tried == Reciprocal::kEnd - float_bits(Reciprocal::kFrom);
  std::printf("check_roots: %llu of %llu roots are wrong", roots.wrong, roots.tried);
  if (roots.wrong) std::printf(" (first: of 0x%08x)", roots.first_wrong);
  std::printf(", %llu of %llu reciprocals", reciprocals.wrong, reciprocals.tried);
  if (reciprocals.wrong) std::printf(" (first: of 0x%08x)", reciprocals.first_wrong);
  std::printf("%s\n", all_tried ? "" : "; not all were tried");
  return all_tried && roots.wrong == 0 && reciprocals.wrong == 0 ? 0 : 1;
}
