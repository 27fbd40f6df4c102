// The scalar path but for the formats of state: every machine has it, and the others are compared
// with it.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/vec/scalar.h"

#define TORCHAO8_ISA scalar
#include "cpu/convert.inl"
#define TORCHAO8_WINDOWS 0
#include "cpu/kernel_tables.h"
#include "cpu/squares.inl"
#include "cpu/step/elements.inl"
#include "cpu/step/measure.inl"

#define TORCHAO8_ELEMENTS scalar_elements
#define TORCHAO8_CONVERTS scalar_converts
#define TORCHAO8_ADD_SQUARES scalar_add_squares
#include "cpu/instances.inl"
