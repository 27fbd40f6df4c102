// The AVX2 path but for the formats of state.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/vec/scalar.h"

#if TORCHAO8_X86
#include "cpu/vec/begin_avx2.inl"

#include "cpu/convert.inl"
#define TORCHAO8_WINDOWS 1
#include "cpu/kernel_tables.h"
#include "cpu/squares.inl"
#include "cpu/step/elements.inl"
#include "cpu/step/measure.inl"

#define TORCHAO8_ELEMENTS avx2_elements
#define TORCHAO8_CONVERTS avx2_converts
#define TORCHAO8_ADD_SQUARES avx2_add_squares
#include "cpu/instances.inl"

#include "cpu/vec/end_target.inl"
#endif  // TORCHAO8_X86
