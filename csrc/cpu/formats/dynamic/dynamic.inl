// The loops of the dynamic format over memory, written once for every instruction set and rule. An
// isa_*_dynamic.cpp includes this after the vector type F and the codec of its set.
//
// A block takes two passes. The first decodes the state, computes the new moments into buffers in
// the first-level cache and finds the extreme elements; the second updates the parameter and
// encodes. The second pass of a block and the first of the next one run in one loop (blocks.inl).
//
// On the vector paths a block with an element that is not usable (a gradient that is NaN or
// infinite, or whose square overflows) is found after the first pass, when nothing has been
// written, and left to the scalar path, which selects for each element. The common case pays
// nothing for it.
#pragma once

#include "cpu/formats/dynamic/blocks.inl"
#include "cpu/formats/dynamic/codec.inl"
#include "cpu/formats/dynamic/decode.inl"
#include "cpu/formats/dynamic/encode.inl"
#include "cpu/formats/dynamic/moments.inl"
