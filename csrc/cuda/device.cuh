// What the kernels ask of a GPU beyond plain C++: exact arithmetic, byte permutes, exchanges within
// a warp. test/emulation/ stands in for it on a host.
#pragma once

#include <cstdint>

#include "common/macros.h"

#ifdef TORCHAO8_EMULATE
#include "emulate.h"
#else

namespace torchao8::cuda {

constexpr unsigned kWholeWarp = 0xffffffffu;

// byte i of the result is byte (selector >> 4 * i & 7) of the eight bytes of b and a.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}
__device__ __forceinline__ float approximate_inverse_root(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ uint32_t largest_of_warp(uint32_t x) {
  return __reduce_max_sync(kWholeWarp, x);  // sm_80 and later
}
__device__ __forceinline__ void warp_barrier() {
  __syncwarp();
}
// Two floats rounded to nearest, the first in the low half.
__device__ __forceinline__ uint32_t round_to_bfloat16s(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
__device__ __forceinline__ uint32_t round_to_halves(float low, float high) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
__device__ __forceinline__ float widen_half(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

}  // namespace torchao8::cuda

#define TORCHAO8_SHARED(Type, name)                 \
  extern __shared__ uint4 torchao8_shared_memory[]; \
  Type& name = *reinterpret_cast<Type*>(torchao8_shared_memory)
#endif

namespace torchao8::cuda {

// The root of a number in [2^-101, 2^128), rounded to nearest: the sequence that the compiler
// emits behind a range check, without the check.
TORCHAO8_HD float bounded_root(float v) {
#if defined(__CUDA_ARCH__)
  const float r = approximate_inverse_root(v), s = __fmul_rn(v, r);
  return __fmaf_rn(__fmaf_rn(-s, s, v), __fmul_rn(r, 0.5f), s);
#elif defined(TORCHAO8_EMULATE)
  const float r = approximate_inverse_root(v), s = v * r;
  return std::fma(std::fma(-s, s, v), r * 0.5f, s);
#else
  return std::sqrt(v);
#endif
}

// A float whose operations are the IEEE ones, whatever the compiler's options are. A rule computes
// with it as with a vector of the CPU. kBounded: roots are of numbers in [2^-101, 2^128).
template <bool kBounded>
struct RealOf {
  float x;
  TORCHAO8_HD RealOf() {}
  TORCHAO8_HD explicit RealOf(float v) : x(v) {}

#ifdef __CUDA_ARCH__
  TORCHAO8_HD friend RealOf operator*(RealOf a, RealOf b) { return RealOf(__fmul_rn(a.x, b.x)); }
  TORCHAO8_HD friend RealOf operator+(RealOf a, RealOf b) { return RealOf(__fadd_rn(a.x, b.x)); }
  TORCHAO8_HD friend RealOf operator/(RealOf a, RealOf b) { return RealOf(__fdiv_rn(a.x, b.x)); }
  TORCHAO8_HD friend RealOf fma(RealOf a, RealOf b, RealOf c) {
    return RealOf(__fmaf_rn(a.x, b.x, c.x));
  }
  TORCHAO8_HD friend RealOf sqrt(RealOf a) {
    return RealOf(kBounded ? bounded_root(a.x) : __fsqrt_rn(a.x));
  }
#else
  TORCHAO8_HD friend RealOf operator*(RealOf a, RealOf b) { return RealOf(a.x * b.x); }
  TORCHAO8_HD friend RealOf operator+(RealOf a, RealOf b) { return RealOf(a.x + b.x); }
  TORCHAO8_HD friend RealOf operator/(RealOf a, RealOf b) { return RealOf(a.x / b.x); }
  TORCHAO8_HD friend RealOf fma(RealOf a, RealOf b, RealOf c) {
    return RealOf(std::fma(a.x, b.x, c.x));
  }
  TORCHAO8_HD friend RealOf sqrt(RealOf a) {
    return RealOf(kBounded ? bounded_root(a.x) : std::sqrt(a.x));
  }
#endif
  TORCHAO8_HD friend RealOf max(RealOf a, RealOf b) { return a.x > b.x ? a : b; }
};
using Real = RealOf<false>;
using BoundedReal = RealOf<true>;

}  // namespace torchao8::cuda
