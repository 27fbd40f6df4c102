// From here to end_target.inl functions are compiled for AVX2, and F is a vector of it. Everything
// that is included before is either forced inline or built for the baseline, so that no function of
// the standard library is emitted for the target.
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "cpu/vec/avx2.h"

#define TORCHAO8_ISA avx2
