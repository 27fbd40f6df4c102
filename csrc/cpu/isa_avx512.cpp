// The AVX-512 path. Everything that is included before the target changes is either forced inline
// or built for the baseline, so that no function of the standard library is emitted for the target.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/vec/scalar.h"

#if TORCHAO8_X86
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
#include "cpu/codec.inl"
#define TORCHAO8_WINDOWS 1
#include "cpu/kernel_tables.h"
#include "cpu/squares.inl"
#include "cpu/step/step.inl"

#define TORCHAO8_KERNELS avx512_kernel_table
#define TORCHAO8_MEASURES avx512_measures
#define TORCHAO8_CODEC avx512_codec
#define TORCHAO8_ADD_SQUARES avx512_add_squares
#include "cpu/instances.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // TORCHAO8_X86
