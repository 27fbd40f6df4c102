// The 4-bit format in plain C++.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/vec/scalar.h"

#define TORCHAO8_ISA scalar
#include "cpu/formats/four_bit/scalar.inl"

#define TORCHAO8_FORMAT FourBitFormat
#define TORCHAO8_LOOPS four_bit
#define TORCHAO8_KERNELS scalar_kernels
#include "cpu/formats/instances.inl"
