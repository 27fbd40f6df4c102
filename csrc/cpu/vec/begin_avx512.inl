// From here to end_target.inl functions are compiled for AVX-512, and F is a vector of it.
// Everything that is included before is either forced inline or built for the baseline, so that no
// function of the standard library is emitted for the target.
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 finds its own _mm512_undefined_ps() undefined.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((                                                                         \
        target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target(                                                           \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx2,fma,f16c," \
    "prefer-vector-width=512")
#endif

#include "cpu/vec/avx512.h"

#define TORCHAO8_ISA avx512
