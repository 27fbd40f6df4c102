// The 4-bit format on AVX-512.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/vec/scalar.h"

#if TORCHAO8_X86
#include "cpu/vec/begin_avx512.inl"

#include "cpu/formats/four_bit/blocks.inl"

#define TORCHAO8_FORMAT FourBitFormat
#define TORCHAO8_LOOPS four_bit
#define TORCHAO8_KERNELS avx512_kernels
#include "cpu/formats/instances.inl"

#include "cpu/vec/end_target.inl"
#endif  // TORCHAO8_X86
