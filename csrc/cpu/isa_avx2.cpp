// The AVX2 path. Everything that is included before the target changes is either forced inline or
// built for the baseline, so that no function of the standard library is emitted for the target.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/vec/scalar.h"

#if TORCHAO8_X86
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "cpu/vec/avx2.h"

#define TORCHAO8_ISA avx2
#include "cpu/codec.inl"
#define TORCHAO8_WINDOWS 1
#include "cpu/kernel_tables.h"
#include "cpu/squares.inl"
#include "cpu/step/step.inl"

#define TORCHAO8_KERNELS avx2_kernel_table
#define TORCHAO8_MEASURES avx2_measures
#define TORCHAO8_CODEC avx2_codec
#define TORCHAO8_ADD_SQUARES avx2_add_squares
#include "cpu/instances.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // TORCHAO8_X86
