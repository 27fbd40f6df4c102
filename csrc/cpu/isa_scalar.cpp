// The scalar path: every machine has it, and the others are compared with it.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/vec_scalar.h"

#define TORCHAO8_ISA scalar
#include "cpu/codec.inl"
#include "cpu/step.inl"

#define TORCHAO8_KERNELS scalar_kernels
#define TORCHAO8_CODEC scalar_codec
#include "cpu/instances.inl"
