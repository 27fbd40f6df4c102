// The mu-law format in plain C++.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/vec/scalar.h"

#define TORCHAO8_ISA scalar
#include "cpu/formats/mulaw/scalar.inl"

#define TORCHAO8_FORMAT MulawFormat
#define TORCHAO8_LOOPS mulaw
#define TORCHAO8_KERNELS scalar_kernels
#include "cpu/formats/instances.inl"
