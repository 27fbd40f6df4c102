// What host, device and vector code share: inlining, bit casts, and the IEEE operations by name.
//
// Everything here is forced inline. These headers are compiled into translation units built for
// different instruction sets, and an out-of-line copy could be shared between them by the linker.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define TORCHAO8_HD __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define TORCHAO8_HD __forceinline
#else
#define TORCHAO8_HD inline __attribute__((always_inline))
#endif

// Behind the parameters of a lambda: lambdas do not take the inlining of the function around them.
#if defined(_MSC_VER) || defined(__CUDACC__)
#define TORCHAO8_LAMBDA
#else
#define TORCHAO8_LAMBDA __attribute__((always_inline))
#endif

// Rarely called, and kept out of the code around the call.
#if defined(__GNUC__) || defined(__clang__)
#define TORCHAO8_COLD __attribute__((cold, noinline))
#else
#define TORCHAO8_COLD __declspec(noinline)
#endif

// MSVC builds take the scalar path: it has no way to compile one function for another target.
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define TORCHAO8_X86 1
#else
#define TORCHAO8_X86 0
#endif

namespace torchao8 {

TORCHAO8_HD constexpr uint32_t float_bits(float x) {
  return __builtin_bit_cast(uint32_t, x);
}
TORCHAO8_HD constexpr float bits_float(uint32_t u) {
  return __builtin_bit_cast(float, u);
}

// The vocabulary of an update rule (see rules/): each is one correctly rounded IEEE operation.
// Vector types provide the same names, so that a rule is written once.
TORCHAO8_HD float fma(float a, float b, float c) {
  return std::fma(a, b, c);
}
TORCHAO8_HD float sqrt(float a) {
  return std::sqrt(a);
}
TORCHAO8_HD float reciprocal(float a) {
  return 1.0f / a;
}
TORCHAO8_HD float max(float a, float b) {
  return a > b ? a : b;
}
TORCHAO8_HD float min(float a, float b) {
  return a < b ? a : b;
}
TORCHAO8_HD float sign(float a) {  // 1, -1 or 0
  return a > 0 ? 1.0f : a < 0 ? -1.0f : 0.0f;
}

}  // namespace torchao8
