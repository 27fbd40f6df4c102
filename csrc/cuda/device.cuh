// What the kernels ask of a GPU beyond plain C++: exact arithmetic, byte permutes, exchanges within
// a warp. test/emulation/ stands in for it on a host.
#pragma once

#include <cstdint>

#include "macros.h"

#ifdef TORCHAO8_EMULATE
#include "emulate.h"
#else

namespace torchao8::cuda {

constexpr unsigned kWholeWarp = 0xffffffffu;

// Byte i of the result is byte (selector >> 4 * i & 7) of the eight bytes of b and a; where the
// selector's fourth bit is set, that byte's sign, eight times.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}
// An entry of a table in shared memory. Its address is kept as if the table began at `base`: loads
// add the constant rest themselves.
template <class T>
class SharedEntry {
 public:
  __device__ __forceinline__ SharedEntry(const void* base, const T* table, unsigned address)
      : address_(address),
        offset_(reinterpret_cast<const char*>(table) - static_cast<const char*>(base)) {}

  // The entry that lies so many behind this one.
  __device__ __forceinline__ const T& operator[](int i) const {
    const void* from_base = __cvta_shared_to_generic(address_);
    return reinterpret_cast<const T*>(static_cast<const char*>(from_base) + offset_)[i];
  }
  // Goes on by so many entries if x is below the limit: a comparison and an addition.
  template <int kCount>
  __device__ __forceinline__ void skip_if_below(float x, float limit) {
    asm("{.reg .pred p; setp.ltu.f32 p, %1, %2; @p add.u32 %0, %0, %3;}"
        : "+r"(address_)
        : "f"(x), "f"(limit), "n"(kCount * int(sizeof(T))));
  }

 private:
  unsigned address_;
  decltype(static_cast<char*>(nullptr) - static_cast<char*>(nullptr)) offset_;  // is a constant
};

// table[n - first], n being byte i of the word, or its high half; `base` is where the shared memory
// begins that holds the table. A dot product of a single factor takes n out of the word, multiplies
// it by the size of an entry and adds the base: one instruction for a permute and a multiplication.
template <class T>
__device__ __forceinline__ SharedEntry<T> entry_of_byte(const void* base, const T* table, int first,
                                                        uint32_t word, int i) {
  const unsigned start = unsigned(__cvta_generic_to_shared(base));
  return {base, table - first, __dp4a(word, unsigned(sizeof(T)) << 8 * i, start)};
}
template <class T>
__device__ __forceinline__ SharedEntry<T> entry_of_high_half(const void* base, const T* table,
                                                             int first, uint32_t word) {
  const unsigned start = unsigned(__cvta_generic_to_shared(base));
  return {base, table - first, __dp2a_lo(word, unsigned(sizeof(T)) << 8, start)};
}
// A place in an array in shared memory whose size is a power of two, and whose address a multiple
// of that. It keeps 32 bits only.
template <class T, int kCount>
class SharedRing {
 public:
  __device__ __forceinline__ explicit SharedRing(const T* entry)
      : address_(unsigned(__cvta_generic_to_shared(entry))) {}

  // Goes on to the next entry; behind the last one is the first one again, and the result true.
  __device__ __forceinline__ bool next() {
    constexpr unsigned kBytes = kCount * unsigned(sizeof(T));
    address_ += unsigned(sizeof(T));
    if (address_ % kBytes != 0) return false;
    address_ -= kBytes;
    return true;
  }
  // The entry that lies so many behind this one.
  __device__ __forceinline__ const T& operator[](int i) const {
    return static_cast<const T*>(__cvta_shared_to_generic(address_))[i];
  }

 private:
  unsigned address_;
};

// (x & mask) | bits: where both are constants, the compiler would take two instructions.
__device__ __forceinline__ uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(x), "r"(mask), "r"(bits));
  return d;
}
// Of four words that are numbers, not negative: as bytes, the first one lowest. Numbers above 255
// are 255.
__device__ __forceinline__ uint32_t pack_numbers(const uint32_t* x) {
  uint32_t high, all;
  asm("cvt.pack.sat.u8.s32.b32 %0, %1, %2, %3;" : "=r"(high) : "r"(x[3]), "r"(x[2]), "r"(0));
  asm("cvt.pack.sat.u8.s32.b32 %0, %1, %2, %3;" : "=r"(all) : "r"(x[1]), "r"(x[0]), "r"(high));
  return all;
}
// Of two pairs of signed 16-bit numbers: x + added, at most `most` and at least 0. One instruction
// from sm_90 on.
__device__ __forceinline__ uint32_t add_and_clamp_halves(uint32_t x, uint32_t added,
                                                         uint32_t most) {
  return __viaddmin_s16x2_relu(x, added, most);
}
__device__ __forceinline__ float approximate_inverse_root(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float approximate_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Of numbers, not NaN.
__device__ __forceinline__ float larger(float a, float b) {
  return fmaxf(a, b);
}
__device__ __forceinline__ float smaller(float a, float b) {
  return fminf(a, b);
}
// Of the magnitudes; NaN if one of them is.
__device__ __forceinline__ float larger_magnitude(float a, float b) {
  float larger;  // sm_80 and later
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(fabsf(a)), "f"(fabsf(b)));
  return larger;
}
// Of two pairs of 16-bit numbers: one instruction from sm_90 on.
__device__ __forceinline__ uint32_t larger_halves(uint32_t a, uint32_t b) {
  return __vmaxu2(a, b);
}
// x / 2 - 1 of two bfloat16.
__device__ __forceinline__ uint32_t half_less_one(uint32_t both) {
  uint32_t y;  // sm_80 and later
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(both), "r"(0x3f003f00), "r"(0xbf80bf80));
  return y;
}
// Of each group of so many neighbouring lanes, a power of two.
__device__ __forceinline__ uint32_t largest_of_lanes(uint32_t x, int lanes) {
  if (lanes == 32) return __reduce_max_sync(kWholeWarp, x);  // sm_80 and later
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    const uint32_t other = __shfl_xor_sync(kWholeWarp, x, distance);
    if (other > x) x = other;
  }
  return x;
}
__device__ __forceinline__ bool all_of_warp(bool x) {
  return __all_sync(kWholeWarp, x);
}
// Below 2^32.
__device__ __forceinline__ uint32_t sum_of_lanes(uint32_t x) {
  return __reduce_add_sync(kWholeWarp, x);  // sm_80 and later
}
// In memory that is shared with other threads, or with all thread blocks.
__device__ __forceinline__ void add_atomically(int64_t* to, int64_t x) {
  atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(x));
}
__device__ __forceinline__ void raise_atomically(int64_t* to, int64_t x) {  // neither is negative
  atomicMax(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(x));
}
__device__ __forceinline__ double root_of_double(double x) {
  return __dsqrt_rn(x);
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

#define TORCHAO8_SHARED(Type, name)                                \
  static_assert(alignof(Type) <= 512);                             \
  extern __shared__ __align__(512) uint4 torchao8_shared_memory[]; \
  Type& name = *reinterpret_cast<Type*>(torchao8_shared_memory)
#endif

namespace torchao8::cuda {

constexpr int kLanes = 32;
constexpr int kWarps = 8;  // of a thread block
constexpr int kThreads = kWarps * kLanes;

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

// 1 / x of a number of magnitude in [2^-126, 2^126), rounded to nearest; in the same way.
TORCHAO8_HD float bounded_reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  const float r = approximate_reciprocal(x);
  return __fmaf_rn(__fmaf_rn(-x, r, 1.0f), r, r);
#elif defined(TORCHAO8_EMULATE)
  const float r = approximate_reciprocal(x);
  return std::fma(std::fma(-x, r, 1.0f), r, r);
#else
  return 1.0f / x;
#endif
}

// A float whose operations are the IEEE ones, whatever the compiler's options are. A rule computes
// with it as with a vector of the CPU. kBounded: every number that a root or a reciprocal is taken
// of lies where the two functions above are exact, and no maximum is of NaN.
template <bool kBounded>
struct RealOf {
  float x;
  TORCHAO8_HD RealOf() {}
  TORCHAO8_HD explicit RealOf(float v) : x(v) {}

#ifdef __CUDA_ARCH__
  TORCHAO8_HD friend RealOf operator*(RealOf a, RealOf b) { return RealOf(__fmul_rn(a.x, b.x)); }
  TORCHAO8_HD friend RealOf operator+(RealOf a, RealOf b) { return RealOf(__fadd_rn(a.x, b.x)); }
  TORCHAO8_HD friend RealOf fma(RealOf a, RealOf b, RealOf c) {
    return RealOf(__fmaf_rn(a.x, b.x, c.x));
  }
  TORCHAO8_HD friend RealOf sqrt(RealOf a) {
    return RealOf(kBounded ? bounded_root(a.x) : __fsqrt_rn(a.x));
  }
  TORCHAO8_HD friend RealOf reciprocal(RealOf a) {
    return RealOf(kBounded ? bounded_reciprocal(a.x) : __frcp_rn(a.x));
  }
#else
  TORCHAO8_HD friend RealOf operator*(RealOf a, RealOf b) { return RealOf(a.x * b.x); }
  TORCHAO8_HD friend RealOf operator+(RealOf a, RealOf b) { return RealOf(a.x + b.x); }
  TORCHAO8_HD friend RealOf fma(RealOf a, RealOf b, RealOf c) {
    return RealOf(std::fma(a.x, b.x, c.x));
  }
  TORCHAO8_HD friend RealOf sqrt(RealOf a) {
    return RealOf(kBounded ? bounded_root(a.x) : std::sqrt(a.x));
  }
  TORCHAO8_HD friend RealOf reciprocal(RealOf a) {
    return RealOf(kBounded ? bounded_reciprocal(a.x) : 1.0f / a.x);
  }
#endif
  TORCHAO8_HD friend RealOf sign(RealOf a) { return RealOf(torchao8::sign(a.x)); }
  __device__ __forceinline__ friend RealOf max(RealOf a, RealOf b) {
    if (kBounded) return RealOf(larger(a.x, b.x));
    return a.x > b.x ? a : b;
  }
};
using Real = RealOf<false>;
using BoundedReal = RealOf<true>;

}  // namespace torchao8::cuda
