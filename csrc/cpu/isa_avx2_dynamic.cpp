// The dynamic format on AVX2.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/codec_tables.h"
#include "cpu/kernels.h"
#include "cpu/vec/scalar.h"

#if TORCHAO8_X86
#include "cpu/vec/begin_avx2.inl"

#include "cpu/formats/dynamic/avx2.h"
#include "cpu/formats/dynamic/dynamic.inl"

#define TORCHAO8_FORMAT DynamicFormat
#define TORCHAO8_LOOPS dynamic
#define TORCHAO8_KERNELS avx2_kernels
#include "cpu/formats/instances.inl"

#include "cpu/vec/end_target.inl"
#endif  // TORCHAO8_X86
