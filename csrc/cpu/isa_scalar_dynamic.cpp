// The dynamic format in plain C++.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/codec_tables.h"
#include "cpu/kernels.h"
#include "cpu/vec/scalar.h"

#define TORCHAO8_ISA scalar
#include "cpu/formats/dynamic/scalar.h"

#include "cpu/formats/dynamic/dynamic.inl"

#define TORCHAO8_FORMAT DynamicFormat
#define TORCHAO8_LOOPS dynamic
#define TORCHAO8_KERNELS scalar_kernels
#include "cpu/formats/instances.inl"
