// The scalar path: every machine has it, and the others are compared with it.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/vec/scalar.h"

#define TORCHAO8_ISA scalar
#include "cpu/codec.inl"
#define TORCHAO8_WINDOWS 0
#include "cpu/kernel_tables.h"
#include "cpu/squares.inl"
#include "cpu/step/step.inl"

#define TORCHAO8_KERNELS scalar_kernel_table
#define TORCHAO8_MEASURES scalar_measures
#define TORCHAO8_CODEC scalar_codec
#define TORCHAO8_ADD_SQUARES scalar_add_squares
#include "cpu/instances.inl"
