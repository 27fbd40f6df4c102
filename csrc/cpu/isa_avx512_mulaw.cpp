// The mu-law format on AVX-512.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/vec/scalar.h"

#if TORCHAO8_X86
#include "cpu/vec/begin_avx512.inl"

#include "cpu/formats/mulaw/avx512.h"

#include "cpu/formats/mulaw/blocks.inl"

#define TORCHAO8_FORMAT MulawFormat
#define TORCHAO8_LOOPS mulaw
#define TORCHAO8_KERNELS avx512_kernels
#include "cpu/formats/instances.inl"

#include "cpu/vec/end_target.inl"
#endif  // TORCHAO8_X86
